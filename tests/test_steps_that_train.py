"""nntools: a step that trains nothing, or that leaves out what was asked for, is an error."""

import pytest
import torch

import nntools as nt
from tests.helpers import content, end, experiment, same, weights


class Forgetful(nt.Experiment):
    """Never calls update."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        return self.net.criterion(y, d), x, y, d


class ByHand(nt.Experiment):
    """Changes the weights as a program without nntools does."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        if self.net.training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss, x, y, d


def test_a_step_without_an_update(tmp_path, capsys):
    exp = experiment(tmp_path, Forgetful)
    saved, before = content(tmp_path), weights(exp.net)
    with pytest.raises(RuntimeError) as error:
        exp.run(3)
    message = str(error.value)
    assert message.startswith('Forgetful.step never calls self.update(loss)')
    assert message.endswith('nothing is trained')
    assert exp.epoch == 0 and content(tmp_path).keys() == saved.keys()
    assert nt.load_checkpoint(exp.checkpoint_path)['History'] == []
    exp.net.norm.reset_running_stats()
    assert same(dict(exp.net.state_dict()), before)
    assert 'Call run again' not in capsys.readouterr().out  # which would not help


def test_a_step_that_has_lost_its_update(tmp_path):
    experiment(tmp_path).run(2)
    exp = experiment(tmp_path, Forgetful)
    saved = nt.load_checkpoint(exp.checkpoint_path)
    with pytest.raises(RuntimeError, match='nothing is trained'):
        exp.run(3)
    assert exp.epoch == 2 and same(nt.load_checkpoint(exp.checkpoint_path), saved)


def test_a_step_by_hand_trains(tmp_path):
    exp, usual = experiment(tmp_path / 'a', ByHand), experiment(tmp_path / 'b')
    exp.run(3)
    usual.run(3)
    assert same(end(exp)['Net'], end(usual)['Net']) and same(exp.history, usual.history)


def test_a_step_by_hand_in_bfloat16_trains(tmp_path):
    """Autocast is around the step, whoever takes it."""
    exp = experiment(tmp_path, ByHand, precision='bfloat16')
    exp.run(2)
    assert exp.history[1]['loss'] < exp.history[0]['loss']


class TrainsTheOther(nt.Experiment):
    """The network stays as it is; a module in also_save learns, by hand."""

    def step(self, batch):
        x, d = batch
        y = self.also_save['other'](x)
        loss = (y - d).square().mean()
        if self.net.training:
            optimizer = self.also_save['of other']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss, x, y, d


def test_a_step_by_hand_may_train_a_module_of_also_save(tmp_path):
    other = torch.nn.Linear(3, 1)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    exp = experiment(tmp_path, TrainsTheOther, also_save={'other': other, 'of other': sgd})
    exp.run(3)
    assert exp.history[2]['loss'] < exp.history[0]['loss']


@pytest.mark.parametrize(
    'options, names',
    [
        ({'grad_clip': 1.0}, 'grad_clip'),
        ({'batches_per_step': 2}, 'batches_per_step'),
        ({'precision': 'float16'}, 'precision'),
        ({'grad_clip': 1.0, 'batches_per_step': 2}, 'grad_clip, batches_per_step'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_options_that_a_step_by_hand_would_ignore(tmp_path, options, names):
    exp = experiment(tmp_path, ByHand, **options)
    with pytest.raises(RuntimeError) as error:
        exp.run(3)
    message = str(error.value)
    assert message.startswith('ByHand.step ') and 'call self.update(loss)' in message
    assert names in message and exp.epoch == 0


class Gated(nt.Experiment):
    """Updates in some batches only."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        if self.batch == 3:
            self.update(loss)
        return loss, x, y, d


@pytest.mark.parametrize('options', [{}, {'grad_clip': 1.0, 'batches_per_step': 2}])
def test_one_update_in_an_epoch_is_enough(tmp_path, options):
    exp = experiment(tmp_path, Gated, **options)
    exp.run(2)
    assert exp.epoch == 2


class Frozen(nt.Experiment):
    """In its first phase another network is trained."""

    def step(self, batch):
        x, d = batch
        y = self.net(x) + self.also_save['head'](x)
        loss = self.net.criterion(y, d)
        self.update(loss, self.also_save['second'])
        return loss, x, y, d


def test_an_update_of_another_optimizer_is_one(tmp_path):
    head = torch.nn.Linear(3, 1)
    also = {'head': head, 'second': torch.optim.SGD(head.parameters(), lr=0.1)}
    before = weights(head)
    exp = experiment(tmp_path, Frozen, also_save=also)
    exp.run(1)
    assert exp.epoch == 1 and not same(weights(head), before)


def test_what_stands_under_an_error(tmp_path, capsys):
    """To run again helps after an interrupt, not after an error of the program."""
    for error, helps in ((KeyboardInterrupt, True), (ValueError, False), (TypeError, False)):
        def fail(e, loss, error=error):
            raise error

        exp = experiment(tmp_path / error.__name__)
        with pytest.raises(error):
            exp.run(1, after_batch=fail)
        said = capsys.readouterr().out
        assert f'{error.__name__}: back to epoch 0, the last one finished' in said
        assert ('Call run again to go on from there' in said) == helps
