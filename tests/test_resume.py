"""nntools: a resumed training, and who may write in its folder."""

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import nntools as nt
from tests.helpers import Data, Net, OneLayer, conflict, content, end, make, same, weights


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'perform_validation_during_training': True, 'best_by': 'loss'},
        {'num_workers': 2},
        {'scheduler': lambda o: lr_scheduler.StepLR(o, 2)},
        {'precision': 'bfloat16', 'grad_clip': 0.1},
        {'scheduler': lambda o: lr_scheduler.MultiStepLR(o, [2, 4])},
        {'scheduler': lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8)},
        {
            'scheduler': lambda o: lr_scheduler.ReduceLROnPlateau(
                o, patience=0, factor=0.5, threshold=0.5
            )
        },
        {
            'scheduler': lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)],
                [2])
        },
        {'scheduler': lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch)},
        {'save_every': 2},
    ],
    ids=lambda options: (
        '-'.join(options) + str(options.get('scheduler', lambda o: '').__code__.co_names[1:3])
    ),
)
def test_a_resumed_run_is_the_same_run(tmp_path, options):
    def build(name):
        return make(
            tmp_path / name, Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1), **options
        )

    def draw_and_evaluate(e):
        torch.rand(3)
        np.random.rand()
        e.evaluate()

    whole = build('whole')
    whole.run(5)
    for epochs in (1, 3, 5):  # a new process each time
        torch.rand(epochs)
        parts = build('parts')
        parts.run(epochs, plot=draw_and_evaluate)
    assert same(end(whole), end(parts))
    assert len(parts.seconds) == 5
    other = make(
        tmp_path / 'other', Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1),
        **options | {'seed': 7})
    other.run(5)
    assert not same(other.net.state_dict(), whole.net.state_dict())  # the seed matters


def test_a_checkpoint_of_no_epoch_gives_nothing(tmp_path):
    """Networks that are only evaluated, or given anew after a failed epoch, stay as they are."""
    for k in range(3):
        torch.manual_seed(k)
        net = OneLayer()
        given = weights(net)
        make(tmp_path, net, seed=None).evaluate()
        assert same(weights(net), given)
    torch.manual_seed(5)
    seed = make(tmp_path / 'new', seed=None).seed
    torch.manual_seed(5)
    assert make(tmp_path, seed=None).seed == seed


def test_what_another_experiment_trained_is_kept(tmp_path):
    """Two of them in one program, as when a cell is run again: no lock keeps them apart."""
    first = make(tmp_path)
    first.run(1)
    make(tmp_path).run(3)
    saved = content(tmp_path)
    with pytest.raises(
        RuntimeError,
        match='now of epoch 3, trained by another experiment; this one is at 1: call load'):
        first.run(2)
    with pytest.raises(RuntimeError, match='trained by another experiment'):
        first.save()
    assert content(tmp_path) == saved and first.epoch == 1
    first.load()
    first.run(4)
    assert same(end(make(tmp_path)), end(first)) and first.epoch == 4


def test_a_load_that_fails_leaves_the_guard_on(tmp_path):
    first = make(tmp_path)
    first.run(1)
    make(tmp_path).run(3)
    with pytest.raises(RuntimeError, match='there is no checkpoint'):
        first.load(tmp_path / 'misspelt')
    with pytest.raises(RuntimeError, match='now of epoch 3, trained by another experiment'):
        first.run(2)


def test_an_earlier_epoch_may_be_taken_on_purpose(tmp_path):
    exp = make(tmp_path, best_by='loss')
    exp.run(1)
    exp.save(str(tmp_path / 'early'))
    exp.run(3)
    exp.load(str(tmp_path / 'early'))
    exp.run(2)
    assert make(tmp_path).epoch == 2


def test_going_back_writes_nothing_until_it_trains(tmp_path):
    exp = make(tmp_path, best_by='loss')
    exp.run(1)
    exp.save(str(tmp_path / 'early'))
    exp.run(3)
    saved = content(tmp_path)['checkpoint.pth.tar']
    exp.load(str(tmp_path / 'early'))
    exp.run(1)
    with pytest.raises(ZeroDivisionError):
        exp.run(2, lambda e: 1 / 0)
    assert content(tmp_path)['checkpoint.pth.tar'] == saved and exp.epoch == 1
    exp.run(2)
    assert len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 2


def at_most(epochs):
    return lambda e: e.epoch >= epochs and e.stop()


@pytest.mark.parametrize(
    'again', [lambda exp: exp.run(100, at_most(3)), lambda exp: exp.run(3), lambda exp: exp.run(1)]
)
def test_a_run_that_trains_nothing_writes_nothing(tmp_path, again):
    """As when a cell is run again after `load_best`, or with a network that another one trained."""
    exp = make(tmp_path / 'a', best_by='error', best_mode='max', lr=0.03)
    exp.run(100, at_most(3))
    saved, last = content(tmp_path / 'a'), weights(exp.net)
    exp.load()
    make(tmp_path / 'b', exp.net).run(2)
    again(exp)
    exp.load_best()
    again(exp)
    assert content(tmp_path / 'a') == saved
    exp.load()
    assert same(weights(exp.net), last) and exp.epoch == 3


def test_something_can_be_saved_from_now_on(tmp_path):
    make(tmp_path).run(2)
    averaged = swa_utils.AveragedModel(Net())
    with pytest.raises(
        ValueError, match=r"no averaged; allow=\('averaged',\) begins with what is given"
    ):
        make(tmp_path, also_save={'averaged': averaged})
    exp = make(tmp_path, also_save={'averaged': averaged}, allow='averaged')
    exp.run(3)
    assert 'averaged' in nt.load_checkpoint(exp.checkpoint_path)
    assert make(tmp_path, also_save={'averaged': averaged}).epoch == 3


def test_what_was_saved_too_is_not_left_out_silently(tmp_path):
    net = Net()
    make(tmp_path, net, also_save={'ema': swa_utils.AveragedModel(net)}).run(2)
    assert 'ema: stored AveragedModel, given nothing' in conflict(tmp_path)
    assert make(tmp_path, allow='ema').epoch == 2
    assert 'ema: stored' in conflict(tmp_path)  # nothing was trained without it
    make(tmp_path, allow='ema').run(3)
    make(tmp_path)  # from now on
