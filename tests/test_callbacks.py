"""nntools: what is called after each epoch (plot) and after each batch (after_batch)."""

import math

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import nntools as nt
from tests.helpers import Net, end, make, same, weights


def test_callbacks_run_without_gradients(tmp_path):
    modes = []
    exp = make(tmp_path)
    exp.run(2, lambda e: modes.append((torch.is_grad_enabled(), e.net.training)),
            after_batch=lambda e, loss: modes.append((torch.is_grad_enabled(), None)))
    assert set(modes) == {(False, False), (False, None)} and len(modes) == 3 + 10
    assert torch.is_grad_enabled()


def test_empty_objects_are_called_and_two_callbacks_too(tmp_path):
    class Recorder(list):
        def __call__(self, exp):
            self.append(exp.epoch)

    epochs, exp = Recorder(), make(tmp_path)
    exp.run(2, epochs)
    assert epochs == [0, 1, 2]
    exp.run(3, epochs, plot=epochs)
    assert epochs[3:] == [2, 2, 3, 3]


def test_the_recipe_for_tensorboard(tmp_path):
    """The callback of docs/nntools.md, with a writer that takes notes."""
    class Writer:
        def add_scalar(self, name, value, epoch):
            notes.append((epoch, name, value))

    def log(exp):
        for name, value in exp.table()[-1].items() if exp.epoch else ():
            writer.add_scalar(name, value, exp.epoch)

    notes, writer = [], Writer()
    exp = make(tmp_path)
    exp.run(2, plot=log)
    epochs = [(epoch, name) for epoch, name, _ in notes if name == 'loss']
    assert epochs == [(1, 'loss'), (2, 'loss')]
    errors = [value for _, name, value in notes if name == 'error']
    assert errors == [row['error'] for row in exp.history]


def test_averaged_weights_leave_out_the_untrained_ones(tmp_path):
    """The recipe: after each batch. Resumed, it is the average of the uninterrupted run."""
    seen = []

    def build(name):
        net = Net()
        average = swa_utils.AveragedModel(net)
        exp = make(tmp_path / name, net, also_save={'average': average})

        def after_batch(exp, loss):
            assert math.isfinite(loss) and type(loss) is float
            average.update_parameters(exp.net)
            seen.append(exp.net.out.weight.detach().clone())

        return exp, average, after_batch

    exp, average, after_batch = build('whole')
    exp.run(4, after_batch=after_batch)
    assert average.n_averaged == 20 == len(seen)
    assert torch.allclose(average.module.out.weight, torch.stack(seen).mean(0), atol=1e-6)
    for epochs in (1, 2, 4):
        parts, again, after_batch = build('parts')
        parts.run(epochs, after_batch=after_batch)
    assert same(weights(average), weights(again)) and same(end(exp), end(parts))


def test_averages_of_a_callback_that_asks_for_the_epoch(tmp_path):
    def build(name):
        net = Net()
        average = swa_utils.AveragedModel(net)
        exp = make(tmp_path / name, net, also_save={'average': average})

        def callback(e):
            if e.epoch > average.n_averaged:
                average.update_parameters(e.net)

        return exp, average, callback

    exp, average, callback = build('whole')
    exp.run(4, callback)
    for epochs in (1, 3, 4):
        parts, again, callback = build('parts')
        parts.run(epochs, callback)
    assert average.n_averaged == again.n_averaged == 4 and same(weights(average), weights(again))


def test_averages_after_freezing():
    net = Net()
    whole = nn.ModuleList([net])  # whose parameters() hides nothing
    average = swa_utils.AveragedModel(whole)
    net.hidden.requires_grad_(False)
    average.update_parameters(whole)
    with torch.no_grad():
        net.out.weight += 1
    average.update_parameters(whole)
    assert torch.allclose(average.module[0].out.weight, net.out.weight - 0.5)
    assert torch.equal(average.module[0].hidden.weight, net.hidden.weight)


def test_an_update_by_hand_in_a_callback(tmp_path):
    def update(e):
        e.net.train()
        with torch.enable_grad():
            e.update(e.net.criterion(e.net(torch.ones(4, 3)), torch.zeros(4, 1)))

    exp, before = make(tmp_path), weights(Net())
    exp.run(0, update)
    assert not same(weights(exp.net), before)


def test_an_error_after_a_callback_has_loaded(tmp_path):
    def fail_once(e, loss):
        if e.batch == 3 and not failed:
            failed.append(1)
            raise ValueError

    failed, exp, whole = [], make(tmp_path / 'a'), make(tmp_path / 'b')
    exp.run(2)
    with pytest.raises(ValueError):
        exp.run(4, lambda e: e.load(), after_batch=fail_once)
    assert exp.epoch == 2 and exp.batch == 0
    exp.run(4)
    whole.run(4)
    assert same(end(exp), end(whole))


@pytest.mark.parametrize('save_every', [1, 5])
def test_what_the_last_callback_does_is_not_saved(tmp_path, save_every):
    def halve(e):
        if e.epoch:
            e.optimizer.param_groups[0]['lr'] /= 2
            e.stop()

    exp = make(tmp_path, save_every=save_every)
    exp.run(3, halve)
    assert nt.load_checkpoint(exp.checkpoint_path)['Optimizer']['param_groups'][0]['lr'] == 0.01
