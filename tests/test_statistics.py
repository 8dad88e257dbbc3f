"""nntools: StatsManager, how samples are counted, metrics as functions."""

import math

import pytest
import torch
import torch.utils.data as td
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nntools as nt
from tests.helpers import Data, Net, Stats, Steps, collate_pairs, experiment, make


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_means_do_not_depend_on_the_batches(samples, batch, outputs):
    """The loss of the base statistics is the mean over samples, however they are grouped."""
    losses = torch.rand(samples, generator=torch.Generator().manual_seed(samples)).double()
    stats = nt.StatsManager()
    stats.init()
    for part in losses.split(batch):
        stats.accumulate(part.mean().item(), torch.zeros(len(part), outputs), None, None)
    assert stats.summarize() == pytest.approx(losses.mean().item())
    assert stats.number_update == math.ceil(samples / batch) and stats.number_samples == samples


class Pair(Data):
    """Inputs in two parts."""

    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return {'a': x, 'b': [x, x]}, d


def test_samples_are_counted_in_inputs_of_parts(tmp_path):
    class Joining(Net):
        def forward(self, x):
            return super().forward(x['a'] + x['b'][0] - x['b'][1])

        def criterion(self, y, d):
            return super().criterion(y, d)[None]  # one element, though not a scalar

    exp = make(tmp_path / 'pairs', Joining(), Pair(), Pair(7), stats=nt.StatsManager())
    whole = make(tmp_path / 'whole', stats=nt.StatsManager())
    exp.run(1)
    whole.run(1)
    assert exp.stats_manager.number_samples == 20
    assert exp.history[0] == pytest.approx(whole.history[0])
    assert exp.evaluate() == pytest.approx(whole.evaluate())


class Own(nt.Experiment):
    def step(self, batch):
        return torch.tensor(float(len(batch['loss']))), batch['x'], None, batch.get('d')


def packed(sizes):
    return nn.utils.rnn.pack_sequence([torch.zeros(n, 5) for n in sizes], enforce_sorted=False)


@pytest.mark.parametrize(
    'x, d, samples',
    [
        (torch.zeros(3, 5), torch.zeros(3), 3),
        ({'a': torch.zeros(3, 5), 'b': torch.zeros(3, 2)}, None, 3),
        ([torch.zeros(3, 5), torch.zeros(3, 1)], torch.zeros(3), 3),
        ([torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)], [torch.zeros(5), torch.zeros(2)], 2),
        ([{'image': torch.zeros(3, 4, 4)}, {'image': torch.zeros(3, 6, 4)}],
         [torch.zeros(2, 4), torch.zeros(7, 4)], 2),
        (packed([4, 2, 7]), None, 3),
        (packed([4]), None, 1),
    ],
    ids=['tensor', 'dict', 'parts', 'pairs of sizes', 'detection', 'packed', 'packed one'],
)
def test_samples_are_counted_rightly(tmp_path, x, d, samples):
    """What default_collate gives, lists of samples, packed sequences."""
    batch = {'x': x, 'loss': torch.zeros(2)} | ({} if d is None else {'d': d})
    other = {'x': torch.zeros(2, 5), 'loss': torch.zeros(7)}
    exp = experiment(tmp_path, Own, stats=nt.StatsManager())
    loss = exp.evaluate(td.DataLoader([batch, other], batch_size=None))
    assert exp.stats_manager.number_samples == samples + 2
    assert loss == pytest.approx((2 * samples + 7 * 2) / (samples + 2))


def test_what_can_not_be_counted_is_asked_for(tmp_path):
    class Words(nt.StatsManager):
        def count_samples(self, x, d):
            return len(x.split())

    batches = td.DataLoader([{'x': 'three small words', 'loss': torch.zeros(2)}], batch_size=None)
    with pytest.raises(TypeError, match=r'how many samples.* a str .*count_samples\(x, d\)'):
        experiment(tmp_path, Own, stats=nt.StatsManager()).evaluate(batches)
    # Two images, or three samples in two parts?
    two_or_three = [torch.zeros(3, 5), torch.zeros(3, 1)]
    with pytest.raises(
        TypeError, match=r'how many samples.* a list of 2 tensors.*count_samples\(x, d\)'
    ):
        nt.StatsManager().count_samples(two_or_three, None)
    exp = experiment(tmp_path / 'b', Own, stats=Words())
    exp.evaluate(batches)
    assert exp.stats_manager.number_samples == 3


class OwnSums(nt.StatsManager):
    """Counts by itself, under names that a base class might use."""

    names = (
        'number_samples', 'total_loss', 'running_accuracy', 'samples', 'metrics', 'sums', 'count',
        'losses')

    def init(self):
        super().init()
        for name in self.names:
            setattr(self, name, 0)

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.number_samples += len(x)
        self.total_loss += loss * len(x)
        for name in self.names[2:]:
            setattr(self, name, getattr(self, name) + 1)

    def summarize(self):
        return {
            'loss': super().summarize(), 'own': self.total_loss / self.number_samples,
            'samples': self.number_samples}


def test_sums_under_names_that_a_base_class_might_use(tmp_path):
    exp = make(tmp_path, stats=OwnSums())
    exp.run(1)
    summary = exp.evaluate()
    assert summary == {'loss': pytest.approx(summary['own']), 'own': summary['own'], 'samples': 7}
    base = make(tmp_path / 'base', exp.net, stats=nt.StatsManager(), optimizer=exp.optimizer)
    assert base.evaluate() == pytest.approx(summary['loss'])
    assert exp.history[0]['samples'] == 20


class OwnCount(nt.StatsManager):
    """Keeps the sums of 2019 without the base class, but for the mean."""

    def init(self):
        self.running_loss, self.number_update = 0, 0

    def accumulate(self, loss, x, y, d):
        self.running_loss += loss
        self.number_update += 1

    def summarize(self):
        return {'loss': super().summarize()}


class OwnInit(OwnCount):
    """Lets the base class count, but not begin."""

    def accumulate(self, loss, x, y, d):
        nt.StatsManager.accumulate(self, loss, x, y, d)


@pytest.mark.parametrize('kind', [OwnCount, OwnInit])
def test_statistics_that_count_by_themselves(tmp_path, kind):
    net = Net()
    exp = nt.Experiment(
        net, Data(), Data(8), torch.optim.Adam(net.parameters()), kind(), str(tmp_path), 4
    )
    exp.run(2)
    first = exp.evaluate()
    assert first == exp.evaluate() and exp.stats_manager.number_update == 2
    base = nt.Experiment(
        net, Data(), Data(8), exp.optimizer, nt.StatsManager(), str(tmp_path / 'base'), 4
    )
    assert first['loss'] == pytest.approx(base.evaluate())


class Forgetful(nt.StatsManager):
    def init(self):
        self.correct = 0


class MeanIoU(nt.StatsManager):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def init(self):
        super().init()
        self.union = [0] * self.classes


def test_init_is_called_at_the_start_of_each_pass_only(tmp_path):
    exp = make(tmp_path, stats=MeanIoU(3))
    exp.run(1)
    assert exp.stats_manager.union == [0, 0, 0]
    exp = make(tmp_path / 'b', stats=Forgetful())
    with pytest.raises(
        AttributeError, match=r'Forgetful has no number_update.*init must.*call super\(\).init\(\)'
    ):
        exp.run(1)


def test_init_tells_when_a_pass_begins(tmp_path):
    class Passes(nt.StatsManager):
        begun = 0

        def init(self):
            super().init()
            self.begun += 1

    exp = make(tmp_path, stats=Passes())
    assert exp.stats_manager.begun == 0
    exp.run(2)
    assert exp.stats_manager.begun == 2
    exp.evaluate()
    assert exp.stats_manager.begun == 3


def test_the_sums_stay_readable_after_evaluate(tmp_path):
    exp = make(tmp_path)
    summary = exp.evaluate()
    stats = exp.stats_manager
    assert (stats.number_samples, stats.number_update) == (7, 2)
    assert stats.error / 7 == summary['error']
    assert stats.running_loss > 0


class Resetting(nt.StatsManager):
    """Computes and begins anew, as the metrics of torchmetrics are used."""
    def init(self):
        super().init()
        self.seen = 0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.seen += len(x)

    def summarize(self):
        seen, self.seen = self.seen, 0
        return {'loss': super().summarize(), 'seen': seen}


@pytest.mark.parametrize('validation', [False, True])
def test_a_summary_that_ends_the_pass_counts_every_batch(tmp_path, validation):
    exp = make(tmp_path, stats=Resetting(), perform_validation_during_training=validation)
    exp.run(2)
    assert [entry[0]['seen'] if validation else entry['seen'] for entry in exp.history] == [20, 20]


def test_statistics_that_one_batch_is_too_little_for(tmp_path):
    class Rare(Stats):
        def init(self):
            super().init()
            self.kept = []

        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            if self.number_update > 1:
                self.kept.append(y)

        def summarize(self):
            return {'mean': torch.cat(self.kept).mean().item()}

    exp = make(tmp_path, stats=Rare(), val=Data(7), perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


@pytest.mark.parametrize('validation', [False, True])
def test_what_can_not_be_stored_is_refused_at_once(tmp_path, validation):
    class Odd(Stats):
        def summarize(self):
            return super().summarize() | {'object': object()}

    exp = experiment(tmp_path, Steps, stats=Odd(), perform_validation_during_training=validation)
    with pytest.raises(TypeError, match='summarize must return numbers.* object'):
        exp.run(2)
    assert exp.steps <= 1 and exp.epoch == 0


def test_metrics_as_functions(tmp_path):
    """Averaged over the samples, whatever the batches."""
    metrics = {'hits': lambda y, d: (y - d).abs() < 0.5, 'error': lambda y, d: (y - d).abs().mean()}
    exp = make(tmp_path, stats=nt.StatsManager(metrics), perform_validation_during_training=True)
    exp.run(2)
    with torch.no_grad():
        x, d = collate_pairs([Data(7)[k] for k in range(7)])
        y = exp.net.eval()(x)
    summary = exp.evaluate()
    assert summary['hits'] == pytest.approx(((y - d).abs() < 0.5).float().mean().item())
    assert summary['error'] == pytest.approx((y - d).abs().mean().item())
    assert list(summary) == ['loss', 'hits', 'error']
    assert exp.history[1][1] == summary
    with pytest.raises(ValueError, match='StatsManager'):
        make(
            tmp_path, stats=nt.StatsManager({'other': metrics['hits']}),
            perform_validation_during_training=True)
