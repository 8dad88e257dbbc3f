"""nntools: data sets, own loaders, short batches and worker processes."""

import math
import os

import pytest
import torch
import torch.utils.data as td

import nntools as nt
from tests.helpers import Changing, Data, Net, Steps, experiment, make, same, weights


def test_own_loaders_and_collate(tmp_path):
    generator = torch.Generator()
    train = td.DataLoader(Data(noise=0.1), 5, shuffle=True, generator=generator, drop_last=True)
    val = td.DataLoader(Data(7), 3)
    exp = make(tmp_path / 'a', train=train, val=val)
    assert exp.train_loader is train and exp.val_loader is val
    exp.run(3)
    again = make(tmp_path / 'b', train=train, val=val)
    again.run(2)
    torch.rand(5, generator=generator)
    make(tmp_path / 'b', exp_net := Net(), train=train, val=val).run(3)
    assert same(exp_net.state_dict(), exp.net.state_dict())

    def collate(samples):
        return torch.stack([x for x, _ in samples]), 1 + torch.stack([d for _, d in samples])

    exp = make(tmp_path / 'c', collate_fn=collate)
    assert exp.evaluate()['error'] > make(tmp_path / 'd').evaluate()['error'] + 0.5


def test_iterable_data_in_an_own_loader(tmp_path):
    class Stream(td.IterableDataset):
        def __iter__(self):
            return (Data()[k] for k in range(10))

    exp = make(tmp_path, train=td.DataLoader(Stream(), 4))
    exp.run(2)
    assert exp.stats_manager.number_samples == 10 and exp.epoch == 2


def test_a_validation_set_smaller_than_a_batch(tmp_path):
    exp = make(tmp_path, val=Data(1), perform_validation_during_training=True)
    exp.run(1)
    assert math.isfinite(exp.history[0][1]['loss'])


def test_the_validation_loader_has_a_batch_size(tmp_path):
    assert make(tmp_path).val_loader.batch_size == 4


def test_the_batch_size_of_a_ready_loader(tmp_path):
    sampler = td.BatchSampler(td.SequentialSampler(Data(8)), 2, False)
    exp = make(tmp_path, train=td.DataLoader(Data(8), batch_sampler=sampler))
    assert 'BatchSize(None)\n' in repr(exp) and exp.setting()['BatchSize'] is None
    exp = make(tmp_path / 'b', train=td.DataLoader(Data(8), 2), batch_size=16)
    assert exp.setting()['BatchSize'] == 2


@pytest.mark.parametrize('after', [30, 15])
def test_a_data_set_that_changes_its_length(tmp_path, after):
    data, val = Changing(22), Changing(22)
    exp = make(tmp_path, train=data, val=val, perform_validation_during_training=True)
    exp.run(1)
    val.n = after  # of a validation set all samples are evaluated that are there
    exp.evaluate()
    assert exp.stats_manager.number_samples == after
    data.n = after  # of a training set, too, from the next epoch on
    seen = set()
    exp.run(2, after_batch=lambda e, loss: seen.add(e.batch))
    assert seen == set(range(1, after // 4 + 1)) and exp.history[1][0].keys() == {'loss', 'error'}
    again = make(tmp_path, train=data, val=val, perform_validation_during_training=True,
                 allow=('TrainSetSize', 'ValSetSize'))  # which are those of the start
    assert again.epoch == 2


def test_a_list_of_samples_is_not_printed(tmp_path):
    data = [(torch.full((28, 28), k / 1000), torch.ones(1)) for k in range(1000)]

    class Flat(Net):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :3])

    def build(samples):
        return make(tmp_path, Flat(), samples, samples, stats=nt.StatsManager())

    exp = build(data)
    exp.run(1)
    assert len(repr(exp)) < 4000 and (tmp_path / 'config.txt').stat().st_size < 4000
    assert (tmp_path / 'checkpoint.pth.tar').stat().st_size < 100_000
    assert build(data).epoch == 1
    with pytest.raises(ValueError, match='TrainSet.*1000.*999'):
        build(data[1:])


def test_a_validation_loader_of_a_subclass(tmp_path):
    class Single(nt.Experiment):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.val_loader = td.DataLoader(Data(7), 1)

        def step(self, batch):
            assert self.net.training or len(batch[0]) == 1
            return super().step(batch)

    exp = experiment(tmp_path, Single, perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


class Pids(Data):
    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x, d * 0 + os.getpid()


@pytest.mark.parametrize('context', ['spawn', 'fork'])
def test_persistent_workers_live_on(tmp_path, capsys, context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip('no such processes here')

    class Watch(nt.StatsManager):
        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            pids.update(d.flatten().tolist())

    pids = set()
    loader = td.DataLoader(
        Pids(8), 4, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    exp = make(tmp_path, train=loader, stats=Watch())
    assert 'what its persistent_workers draw, a resumed' in capsys.readouterr().out
    exp.run(3)
    assert len(pids) == 1 and pids != {os.getpid()}
    loader._iterator._shutdown_workers()  # else they end with the test session


def test_workers_that_open_a_file_are_left_to_it(tmp_path):
    class Opened(Data):
        file = None

        def __getitem__(self, k):
            return self.file[k]

    def open_it(worker):
        data = td.get_worker_info().dataset
        data.file = Data(7)

    loader = td.DataLoader(
        Opened(7), 4, num_workers=1, worker_init_fn=open_it, multiprocessing_context='fork'
    )
    exp = make(tmp_path, val=loader, perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


class Written(Net):
    """Has the size of the batch written into it."""

    def forward(self, x):
        return super().forward(x.view(4, -1))


def test_the_short_last_batch_is_tried_first(tmp_path):
    exp = experiment(tmp_path, Steps, Written(), perform_validation_during_training=True)
    with pytest.raises(RuntimeError, match='3 samples.*drop_last_in_evaluation=True'):
        exp.run(2)
    assert exp.steps == 0 and exp.epoch == 0
    exp = experiment(
        tmp_path / 'b', Steps, Written(), perform_validation_during_training=True,
        drop_last_in_evaluation=True)
    exp.run(2)
    assert exp.epoch == 2 and exp.steps == 10


def test_trying_a_batch_first_leaves_no_trace(tmp_path):
    def build(name, validation):
        net = Net(dropout=0.5)
        return make(
            tmp_path / name, net, Data(noise=0.1), perform_validation_during_training=validation
        )

    exp, plain = build('a', True), build('b', False)
    exp.run(2)
    plain.run(2)
    assert [train for train, _ in exp.history] == plain.history
    assert same(weights(exp.net), weights(plain.net))


def test_an_error_is_not_blamed_on_a_short_batch(tmp_path):
    wrong = td.TensorDataset(torch.zeros(8, 5), torch.zeros(8, 1))
    with pytest.raises(RuntimeError) as error:
        make(tmp_path, val=wrong, perform_validation_during_training=True).run(1)
    assert 'mat1 and mat2' in str(error.value) and 'last batch' not in str(error.value)
