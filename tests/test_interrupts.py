"""nntools: Ctrl-C at any moment falls back to the last finished epoch."""

import math
import os
import random
import sys

import pytest
import torch
from torch import nn

import nntools as nt
from tests.helpers import (
    Data,
    Net,
    best_agrees,
    content,
    end,
    is_checkpoint,
    make,
    same,
    weights,
)


class Interrupted(Data):
    """Raises KeyboardInterrupt, as Ctrl-C does, at the n-th access."""

    def __init__(self, after, **options):
        super().__init__(**options)
        self.after = after

    def __getitem__(self, k):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt
        return super().__getitem__(k)


@pytest.mark.parametrize('save_every', [1, 4])
@pytest.mark.parametrize('where', ['first epoch', 'third epoch', 'callback'])
def test_ctrl_c_falls_back_and_a_new_run_goes_on(tmp_path, capsys, where, save_every):
    whole = make(tmp_path / 'whole', Net(dropout=0.5), Data(noise=0.1), save_every=save_every)
    whole.run(5)
    data = Interrupted({'first epoch': 7, 'third epoch': 53, 'callback': -1}[where], noise=0.1)
    exp = make(tmp_path / 'cut', Net(dropout=0.5), data, save_every=save_every)

    def plot(e):
        if where == 'callback' and e.epoch == 2:
            for p in e.net.parameters():  # something half done
                p.data.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exp.run(5, plot=plot)
    epoch = 0 if where == 'first epoch' else 2
    assert exp.epoch == epoch and exp.net.training  # the mode that it had before
    assert f'KeyboardInterrupt: back to epoch {epoch}' in capsys.readouterr().out
    exp.run(5)
    assert same(end(whole), end(exp))


def test_a_shared_network_loses_nothing_on_ctrl_c(tmp_path):
    first = make(tmp_path / 'first')
    second = make(tmp_path / 'second', first.net, Interrupted(3), optimizer=first.optimizer)
    first.run(3)
    before = weights(first.net)
    with pytest.raises(KeyboardInterrupt):
        second.run(1)
    assert same(before, dict(first.net.state_dict()))


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    exp = make(tmp_path)
    exp.run(1)
    monkeypatch.setattr(os, 'fsync', interrupted)
    saved = content(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        exp.save()
    assert content(tmp_path) == saved


@pytest.mark.parametrize('part', [False, True])
@pytest.mark.parametrize('where', ['save', 'run'])
def test_an_interrupt_inside_of_torch_save(tmp_path, monkeypatch, where, part):
    """As torch does it: closing the half-written file fails with a RuntimeError of its own."""
    def interrupted(state, file):
        if not (part or is_checkpoint(state)):
            return save(state, file)
        try:
            file.write(b'half of it')
            raise KeyboardInterrupt
        finally:
            raise RuntimeError('unexpected pos 18084096 vs 18083988')

    exp, save = make(tmp_path), torch.save
    exp.run(1)
    saved = content(tmp_path)
    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        if where == 'run':
            exp.run(3)
        else:
            exp.save()
    assert content(tmp_path) == saved
    monkeypatch.undo()
    exp.run(3)
    whole = make(tmp_path / 'whole')
    whole.run(3)
    assert same(end(whole), end(exp))


def test_what_an_interrupt_says_is_on_disk(tmp_path, capsys):
    def interrupt(e):
        if e.epoch == 8:
            raise KeyboardInterrupt

    exp = make(tmp_path / 'cut', save_every=5)
    with pytest.raises(KeyboardInterrupt):
        exp.run(20, interrupt)
    assert 'KeyboardInterrupt: back to epoch 8' in capsys.readouterr().out
    assert len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 8
    again, whole = make(tmp_path / 'cut', save_every=5), make(tmp_path / 'whole')
    again.run(9)
    whole.run(9)
    assert again.epoch == 9 and same(end(whole), end(again))


def interrupted_at(function, *moments):
    """Calls it, with a KeyboardInterrupt at the n-th line of nntools that it comes to.

    Then at the n-th line of the fall-back, for each further n given. Returns at how many lines it
    was, and which moments did not come.
    """
    left, lines, go_back = list(moments), 0, nt.Experiment._go_back

    def at_a_line(frame, event, _):
        nonlocal lines
        lines += event == 'line'
        if event == 'line' and left and lines == left[0]:
            del left[0]
            raise KeyboardInterrupt  # Python stops tracing then
        return at_a_line

    def trace():
        def in_nntools(frame, *_):
            return at_a_line if frame.f_code.co_filename == nt.__file__ else None

        sys.settrace(in_nntools)

    def traced_go_back(*args):
        nonlocal lines
        lines = 0
        trace()
        go_back(*args)

    nt.Experiment._go_back = traced_go_back
    try:
        trace()
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        nt.Experiment._go_back = go_back
    # Such an interrupt can come between the body of a `with` and its end; a real one does not.
    torch.set_grad_enabled(True)
    return lines, left


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'save_every': 3, 'best_by': 'loss'},
        {'save_every': 2, 'best_by': 'loss', 'perform_validation_during_training': True},
    ],
)
def test_interrupts_at_any_line_change_nothing(tmp_path, options):
    """Twice in a run, the second time in the fall-back.

    Then in the next run, which begins with going back; or in a load before.
    """
    moments = random.Random(0)
    whole = make(tmp_path / 'whole', **options)
    whole.run(2)
    lines, _ = interrupted_at(lambda: whole.run(4))
    to_load, _ = interrupted_at(whole.load)
    back = 120  # lines of the fall-back, about
    for k in range(40):
        exp = make(tmp_path / str(k), **options)
        exp.run(2)
        first = moments.choice(
            [moments.randrange(1, lines), moments.randrange(1, 60), lines - moments.randrange(60)]
        )
        if k % 3 == 2:
            interrupted_at(exp.load, moments.randrange(1, to_load))
        for _ in range(1 + k % 2):
            interrupted_at(lambda: exp.run(4), first, moments.randrange(1, back))  # noqa: B023
            first = moments.randrange(1, back)
        exp.run(4)
        for name in content(tmp_path / 'whole').keys() - {'config.txt'}:
            a = nt.load_checkpoint(tmp_path / 'whole' / name)
            b = nt.load_checkpoint(tmp_path / str(k) / name)
            assert same(a | {'Seconds': 0}, b | {'Seconds': 0}), (k, first, name)
        assert same(end(whole), end(exp)), (k, first)
        assert content(tmp_path / str(k)).keys() == content(tmp_path / 'whole').keys(), (k, first)


@pytest.mark.parametrize('line', range(8, 72, 16))
def test_after_two_presses_and_a_load_the_hand_counts(tmp_path, line):
    exp, rates = make(tmp_path), []
    exp.run(2)
    _, left = interrupted_at(lambda: exp.run(4), 1000, line)  # the second one in the fall-back
    assert left == [] and exp.epoch < 4
    exp.load()
    exp.optimizer.param_groups[0]['lr'] = 1e-4
    exp.run(3, lambda e: rates.append(e.optimizer.param_groups[0]['lr']))
    assert rates == [1e-4, 1e-4]


def test_a_fall_back_that_is_interrupted_is_not_saved(tmp_path):
    """The second press comes while the weights are put back.

    The next run, and `save`, have the last finished epoch.
    """
    class Interruptible(Net):
        loads = 0

        def load_state_dict(self, *args, **options):
            self.loads += 1
            if self.loads <= 3:
                nn.Module.load_state_dict(
                    self.hidden, {k: v * math.nan for k, v in self.hidden.state_dict().items()}
                )
                raise KeyboardInterrupt
            return super().load_state_dict(*args, **options)

    def press(exp):
        if exp.epoch == 2 and not pressed:
            pressed.append(1)
            raise KeyboardInterrupt

    pressed, net = [], Interruptible()
    exp = make(tmp_path / 'a', net)
    while net.loads < 3:
        with pytest.raises(KeyboardInterrupt):
            exp.run(4, press)
    exp.save()
    assert nt.load_checkpoint(exp.checkpoint_path)['Net']['hidden.weight'].isfinite().all()
    exp.run(4, press)
    whole = make(tmp_path / 'whole', Net())
    whole.run(4)
    assert net.loads >= 3
    assert same(whole.history, exp.history)
    assert same(weights(whole.net), weights(net))


@pytest.mark.parametrize('twice', [False, True])
def test_a_best_epoch_that_was_interrupted_is_written(tmp_path, monkeypatch, twice):
    """One press comes while best.pth.tar is written, another while the weights are put back."""
    class Interruptible(Net):
        def load_state_dict(self, *args, **options):
            if len(presses) == 1 and twice:
                presses.append('in the fall-back')
                raise KeyboardInterrupt
            return super().load_state_dict(*args, **options)

    def save(state, file):
        if is_checkpoint(state) and len(state['History']) == 1 and not presses:
            presses.append('in writing')
            raise KeyboardInterrupt
        saved(state, file)

    # The first epoch is the best.
    presses, saved, options = [], torch.save, {'best_by': 'loss', 'best_mode': 'max'}
    exp = make(tmp_path / 'a', Interruptible(), **options)
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(KeyboardInterrupt):
        exp.run(4)
    exp.run(4)
    assert len(presses) == 1 + twice and exp.best[0] == 1 and best_agrees(exp)
    whole = make(tmp_path / 'whole', Net(), **options)
    whole.run(4)
    assert same(
        nt.load_checkpoint(exp.best_path)['Net'], nt.load_checkpoint(whole.best_path)['Net']
    )
