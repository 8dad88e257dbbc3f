"""nntools: averaged weights can be evaluated, predict, and be the best, resumed or not."""

import copy

import pytest
import torch
from torch.optim import swa_utils

import nntools as nt
from tests.helpers import Data, Net, Stats, end, experiment, make, same, weights

INPUTS = torch.stack([Data()[k][0] for k in range(22)])


def averaged(net, **options):
    """A moving average, that of half the present weights and half the average before."""
    return swa_utils.AveragedModel(
        net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), **options)


def follow(exp, loss):
    exp.also_save['averaged'].update_parameters(exp.net)


def build(folder, kind=nt.Experiment, use_buffers=True, **options):
    net = Net(dropout=0.5)
    also = {'averaged': averaged(net, use_buffers=use_buffers)}
    return experiment(folder, kind, net, Data(noise=0.1), also_save=also, **options)


@pytest.fixture
def trained(tmp_path):
    exp = build(tmp_path / 'trained')
    exp.run(2, after_batch=follow)
    return exp


# --- evaluate and predict ------------------------------------------------------------------------

@pytest.mark.parametrize('wrapped', [True, False], ids=['AveragedModel', 'a network'])
def test_evaluate_another_network(tmp_path, trained, wrapped):
    average = trained.also_save['averaged']
    net, given = average.module, average if wrapped else average.module
    alone = make(tmp_path / 'alone', copy.deepcopy(net))
    before, own = weights(trained.net), trained.evaluate()
    assert trained.evaluate(net=given) == alone.evaluate() != own
    assert trained.evaluate(Data(5), given) == alone.evaluate(Data(5))
    # Nothing of the experiment is other afterwards.
    assert same(weights(trained.net), before) and trained.evaluate() == own
    assert trained.net is not net and trained.net.training and net.training


def test_what_was_counted_stays_readable(trained):
    trained.evaluate(Data(5), trained.also_save['averaged'])
    assert trained.stats_manager.number_samples == 5


def test_predict_with_another_network(trained):
    average = trained.also_save['averaged']
    with torch.no_grad():
        expected = copy.deepcopy(average.module).eval()(INPUTS)
    for data in (INPUTS, Data()):
        assert torch.allclose(trained.predict(data, net=average), expected, atol=1e-6)
    y, d = trained.predict(Data(), targets=True, net=average)
    assert torch.allclose(y, expected, atol=1e-6) and torch.equal(d, INPUTS.sum(1, keepdim=True))
    assert not torch.allclose(trained.predict(INPUTS), expected, atol=1e-6)


class Twice(nt.Experiment):
    """A step of its own, and an evaluation of its own."""

    def step(self, batch):
        x, d = batch
        y = 2 * self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d

    def evaluate(self, data=None, net=None):
        return super().evaluate(data, net or self.also_save['averaged'])


def test_the_step_of_a_subclass_is_used(tmp_path):
    exp = build(tmp_path, Twice)
    exp.run(1, after_batch=follow)
    average = exp.also_save['averaged']
    with torch.no_grad():
        expected = 2 * copy.deepcopy(average.module).eval()(INPUTS)
    assert torch.allclose(exp.predict(Data(), net=average), expected, atol=1e-6)
    y, d = exp.predict(Data(7), targets=True, net=average)
    assert exp.evaluate()['loss'] == pytest.approx(Net().criterion(y, d).item(), rel=1e-5)


def test_in_the_middle_of_an_epoch_nothing_is_lost(tmp_path):
    def look(e, loss):
        follow(e, loss)
        seen.append(e.evaluate(net=e.also_save['averaged'])['loss'])
        e.predict(INPUTS, net=e.also_save['averaged'])

    seen = []
    exp, plain = build(tmp_path / 'a'), build(tmp_path / 'b')
    exp.run(2, after_batch=look)
    plain.run(2, after_batch=follow)
    assert len(set(seen)) == 10 and same(end(exp), end(plain))


def test_nothing_is_trained_by_it(trained):
    trained.net.train()
    before = copy.deepcopy(trained.optimizer.state_dict())
    with torch.enable_grad():
        trained.evaluate(net=trained.also_save['averaged'])
    assert same(trained.optimizer.state_dict(), before)


# --- batch norm ----------------------------------------------------------------------------------

def test_with_use_buffers_the_statistics_of_batch_norm_follow(trained):
    average = trained.also_save['averaged'].module
    mean = average.norm.running_mean
    assert not same(mean, Net().norm.running_mean) and not same(mean, trained.net.norm.running_mean)
    assert trained.evaluate(net=average)['loss'] < 3


def test_without_it_they_are_those_of_the_network(tmp_path):
    exp = build(tmp_path, use_buffers=False)
    exp.run(2, after_batch=follow)
    average = exp.also_save['averaged']
    norm, own = average.module.norm, exp.net.norm
    assert same(norm.running_mean, own.running_mean) and not same(norm.weight, own.weight)
    before = exp.evaluate(net=average)
    # Torch counts them anew for the averaged weights.
    swa_utils.update_bn(exp.train_loader, average)
    assert not same(norm.running_mean, own.running_mean)
    assert exp.evaluate(net=average) != before


# --- modes ---------------------------------------------------------------------------------------

class Modes(nt.Experiment):
    """Notes the modes of the network and of what is also saved."""

    def step(self, batch):
        self.note('step in training' if self.net.training else 'step in evaluation')
        return super().step(batch)

    def note(self, where):
        modes = self.net.training, self.also_save['other'].training
        self.__dict__.setdefault('seen', {}).setdefault(where, set()).add(modes)


@pytest.mark.parametrize('mode', [True, False])
def test_modules_in_also_save_are_evaluated_too(tmp_path, mode):
    other = Net(dropout=0.5).train(mode)
    exp = experiment(tmp_path, Modes, also_save={'other': other},
                     perform_validation_during_training=True)
    exp.run(2, lambda e: e.note('callback'), after_batch=lambda e, loss: e.note('after_batch'))
    assert exp.seen == {
        'step in training': {(True, mode)}, 'step in evaluation': {(False, False)},
        'after_batch': {(True, mode)}, 'callback': {(False, False)}}
    for look in (exp.evaluate, lambda: exp.predict(Data(7))):
        look()
        assert other.training is mode and other.drop.training is mode and exp.net.training
    with pytest.raises(ZeroDivisionError):
        exp.run(3, lambda e: 1 / 0)
    assert other.training is mode


def test_each_layer_of_it_keeps_its_mode(tmp_path):
    other = Net()
    other.norm.eval()
    exp = make(tmp_path, also_save={'other': other})
    exp.run(1, lambda e: e.evaluate())
    assert other.training and other.drop.training and not other.norm.training


# --- the best epoch ------------------------------------------------------------------------------

class ByAverage(nt.Experiment):
    """Validates averaged weights."""

    def evaluate(self, data=None, net=None):
        return super().evaluate(data, net=net or self.also_save['averaged'])


BEST = {'perform_validation_during_training': True, 'best_by': 'error', 'best_mode': 'min'}


def test_the_best_of_an_average(tmp_path):
    exp, kept = build(tmp_path, ByAverage, **BEST), {}

    def keep(e):
        kept[e.epoch] = weights(e.also_save['averaged']), weights(e.net)

    exp.run(6, keep, after_batch=follow)
    errors = [validation['error'] for _, validation in exp.history]
    assert exp.best == (1 + errors.index(min(errors)), min(errors))
    # The history is that of the average.
    assert exp.evaluate() == exp.evaluate(net=exp.also_save['averaged']) == exp.history[-1][1]
    assert exp.evaluate(net=exp.net) != exp.history[-1][1]


def test_load_best_takes_the_average_too(tmp_path):
    """Of an epoch that is not the last: with growing errors, the first is the best."""
    options = BEST | {'best_mode': 'max'}
    exp, kept = build(tmp_path, ByAverage, **options), {}

    def keep(e):
        kept[e.epoch] = weights(e.also_save['averaged']), weights(e.net)

    exp.run(4, keep, after_batch=follow)
    best, error = exp.best
    state = copy.deepcopy(exp.optimizer.state_dict())
    assert best < 4
    exp.load_best()
    assert same((weights(exp.also_save['averaged']), weights(exp.net)), kept[best])
    assert exp.evaluate()['error'] == pytest.approx(error)
    assert exp.epoch == 4 and same(exp.optimizer.state_dict(), state)


def test_a_best_file_without_the_average(tmp_path):
    """It was written when nothing was in also_save: the network's weights are taken."""
    make(tmp_path, best_by='loss').run(2)
    net = Net()
    exp = make(tmp_path, net, best_by='loss', also_save={'averaged': averaged(net)},
               allow='averaged')
    before = weights(exp.also_save['averaged'])
    exp.load_best()
    assert same(weights(exp.also_save['averaged']), before)


@pytest.mark.parametrize('use_buffers', [True, False])
def test_resumed_it_is_the_same(tmp_path, use_buffers):
    options = BEST | {'use_buffers': use_buffers}
    whole = build(tmp_path / 'whole', ByAverage, **options)
    whole.run(5, after_batch=follow)
    for epochs in (1, 3, 5):
        parts = build(tmp_path / 'parts', ByAverage, **options)
        parts.run(epochs, after_batch=follow)
    assert same(end(parts), end(whole)) and parts.best == whole.best
    assert parts.evaluate() == whole.evaluate()
    for name in ('Net', 'averaged', 'History'):
        assert same(nt.load_checkpoint(parts.best_path)[name],
                    nt.load_checkpoint(whole.best_path)[name])


def test_interrupted_it_is_the_same(tmp_path):
    def press(e, loss):
        follow(e, loss)
        if e.epoch == 2 and e.batch == 3 and not pressed:
            pressed.append(1)
            raise KeyboardInterrupt

    pressed = []
    exp, whole = build(tmp_path / 'a', ByAverage, **BEST), build(tmp_path / 'b', ByAverage, **BEST)
    with pytest.raises(KeyboardInterrupt):
        exp.run(4, after_batch=press)
    exp.run(4, after_batch=press)
    whole.run(4, after_batch=follow)
    assert same(end(exp), end(whole))


def test_a_plateau_by_the_average(tmp_path):
    """The schedule goes by what is validated."""
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=0)
    exp = ByAverage(
        net, Data(), Data(7), adam, Stats(), str(tmp_path), 4, True, seed=0, scheduler=plateau,
        also_save={'averaged': averaged(net, use_buffers=True)})
    exp.run(3, after_batch=follow)
    assert plateau.best == min(validation['loss'] for _, validation in exp.history)
