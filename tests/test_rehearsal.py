"""nntools: before the first epoch the evaluation is tried: full batches, then the short one."""

import pytest
import torch
import torch.utils.data as td

import nntools as nt
from tests.helpers import Data, Net, Stats, Steps, experiment, make, same, weights

BLAMED = 'the last batch of the evaluation has 3 samples, others 4'


class Sizes(Net):
    """Notes the sizes of batches, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(('train' if self.training else 'evaluate', len(x)))
        return super().forward(x)


@pytest.mark.parametrize(
    'samples, options, expected',
    [
        (11, {}, [4, 4, 3]),
        (7, {}, [4, 3]),
        (8, {}, [4, 4]),
        (3, {}, [3]),
        (99, {}, [4, 4, 3]),
        (11, {'drop_last_in_evaluation': True}, [4, 4]),
    ],
    ids=['11', '7', '8', '3', '99', '11, without the short one'],
)
def test_full_batches_come_first(tmp_path, samples, options, expected):
    exp = make(tmp_path, Sizes(), val=Data(samples), perform_validation_during_training=True,
               **options)
    exp.run(1)
    training = exp.net.seen.index(('train', 4))
    assert exp.net.seen[:training] == [('evaluate', size) for size in expected]


def test_without_validation_nothing_is_tried(tmp_path):
    exp = experiment(tmp_path, net=Sizes())
    exp.run(1)
    assert exp.net.seen == [('train', 4)] * 5


def test_it_is_done_once_a_run(tmp_path):
    exp = experiment(tmp_path, net=Sizes(), perform_validation_during_training=True)
    exp.run(2)
    exp.run(2)  # nothing to do
    epoch = [('train', 4)] * 5 + [('evaluate', 4), ('evaluate', 3)]
    assert exp.net.seen == [('evaluate', 4), ('evaluate', 3)] + 2 * epoch


WRONG = {
    'features': (torch.zeros(7, 5), torch.zeros(7, 1), 'mat1 and mat2'),
    'type': (torch.zeros(7, 3, dtype=torch.float64), torch.zeros(7, 1), 'same dtype'),
    'targets': (torch.zeros(7, 3), torch.zeros(7, 3, 2), 'must match the size'),
    'fewer than a batch': (torch.zeros(3, 5), torch.zeros(3, 1), 'mat1 and mat2'),
}


@pytest.mark.filterwarnings('ignore:Using a target size')
@pytest.mark.parametrize('x, d, message', WRONG.values(), ids=WRONG)
def test_a_wrong_shape_is_not_blamed_on_the_short_batch(tmp_path, capsys, x, d, message):
    exp = make(tmp_path, val=td.TensorDataset(x, d), perform_validation_during_training=True)
    with pytest.raises(RuntimeError) as error:
        exp.run(1)
    assert message in str(error.value) and 'last batch' not in str(error.value)
    assert 'Call run again' not in capsys.readouterr().out


class Written(Net):
    """Has the size of the batch written into it."""

    def forward(self, x):
        return super().forward(x.view(4, -1))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_of_the_short_batch_alone_is(tmp_path, workers):
    exp = experiment(
        tmp_path, Steps, Written(), perform_validation_during_training=True, num_workers=workers)
    with pytest.raises(RuntimeError) as error:
        exp.run(2)
    assert str(error.value).startswith(f"{BLAMED}: shape '[4, -1]' is invalid")
    assert 'give drop_last_in_evaluation=True' in str(error.value)
    assert exp.steps == 0 and exp.epoch == 0


def test_statistics_are_tried_too(tmp_path):
    """Before an epoch, and not at its end."""
    class Alone(Stats):
        def accumulate(self, loss, x, y, d):
            assert len(x) == 4 or self.number_samples == 4
            super().accumulate(loss, x, y, d.reshape(4, 1) if len(x) == 3 else d)

    exp = experiment(tmp_path, Steps, stats=Alone(), perform_validation_during_training=True)
    with pytest.raises(RuntimeError, match=r"shape '\[4, 1\]' is invalid"):
        exp.run(1)
    assert exp.steps == 0


def test_it_leaves_no_trace(tmp_path):
    class Counting(Stats):
        passes = 0

        def init(self):
            super().init()
            self.passes += 1

    def build(name, validates):
        return make(tmp_path / name, Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1),
                    stats=Counting(), perform_validation_during_training=validates)

    exp, plain = build('a', True), build('b', False)
    exp.run(2)
    plain.run(2)
    assert [training for training, _ in exp.history] == plain.history
    assert same(weights(exp.net), weights(plain.net))
    assert exp.stats_manager.passes == 4 and plain.stats_manager.passes == 2


def test_an_evaluation_of_its_own_is_left_alone(tmp_path):
    class Own(Steps):
        evaluations = 0

        def evaluate(self, data=None, net=None):
            self.evaluations += 1
            assert self.steps > 0
            return {'loss': 0.0}

    exp = experiment(tmp_path, Own, Sizes(), perform_validation_during_training=True)
    exp.run(2)
    assert exp.evaluations == 2 and {kind for kind, _ in exp.net.seen} == {'train'}


class Stream(td.IterableDataset):
    def __iter__(self):
        return (Data()[k] for k in range(7))


def test_a_stream_is_not_tried(tmp_path):
    exp = make(tmp_path, net := Sizes(), val=td.DataLoader(Stream(), 4), stats=nt.StatsManager(),
               perform_validation_during_training=True)
    exp.run(1)
    assert net.seen[0][0] == 'train' and exp.epoch == 1
