"""nntools: a scheduler that a resumed training would start over is said, once."""

import pytest
import torch
from torch.optim import lr_scheduler

from tests.helpers import Net, cosine, make, same

TEXT = 'A scheduler changes the rates of {}, but '


def cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def warmup(optimizer):
    constant = lr_scheduler.ConstantLR(optimizer, 0.1, 2)
    falling = lr_scheduler.CosineAnnealingLR(optimizer, 4)
    return lr_scheduler.SequentialLR(optimizer, [constant, falling], [2])


def product(optimizer):
    return lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(optimizer, 2)])


def with_scheduler(folder, kind, saved):
    """A training whose scheduler steps after each batch; and the function that does it."""
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = kind(adam)
    also = {'cycle': scheduler} if saved else {}
    exp = make(folder, net, optimizer=adam, also_save=also)
    return exp, lambda e, loss: scheduler.step()


@pytest.mark.parametrize('kind', [cycle, warmup, product])
def test_a_scheduler_that_is_not_saved(tmp_path, capsys, kind):
    exp, step = with_scheduler(tmp_path, kind, saved=False)
    exp.run(0)
    assert 'scheduler' not in capsys.readouterr().out  # before an epoch begins
    exp.run(1, after_batch=step)
    exp.run(2, after_batch=step)
    said = capsys.readouterr().out
    assert said.count(TEXT.format('Adam')) == 1
    assert said.index('scheduler') < said.index('Epoch 1/1')


@pytest.mark.parametrize('kind', [cycle, warmup, product])
def test_a_scheduler_that_is_saved(tmp_path, capsys, kind):
    exp, step = with_scheduler(tmp_path, kind, saved=True)
    exp.run(2, after_batch=step)
    assert 'scheduler' not in capsys.readouterr().out
    # And it goes on where it was.
    again, _ = with_scheduler(tmp_path, kind, saved=True)
    assert same(again.also_save['cycle'].state_dict(), exp.also_save['cycle'].state_dict())


@pytest.mark.parametrize(
    'kind', [cosine(4), warmup, product, lr_scheduler.ReduceLROnPlateau],
    ids=['cosine', 'warmup', 'product', 'plateau'])
def test_the_option_scheduler(tmp_path, capsys, kind):
    make(tmp_path, scheduler=kind).run(2)
    make(tmp_path, scheduler=kind).run(3)
    assert 'A scheduler' not in capsys.readouterr().out


def test_of_a_second_optimizer(tmp_path, capsys):
    def build(folder, saved):
        net = Net()
        second = torch.optim.SGD(net.out.parameters(), lr=0.1)
        scheduler = lr_scheduler.StepLR(second, 2)
        adam = torch.optim.Adam(net.hidden.parameters())
        also = {'second': second} | ({'its scheduler': scheduler} if saved else {})
        return make(folder, net, optimizer=adam, also_save=also)

    build(tmp_path / 'a', saved=False).run(1)
    said = capsys.readouterr().out
    assert said.count(TEXT.format('SGD')) == 1 and TEXT.format('Adam') not in said
    build(tmp_path / 'b', saved=True).run(1)
    assert 'A scheduler' not in capsys.readouterr().out


def test_where_a_scheduler_was_and_is_no_more(tmp_path, capsys):
    """Its traces in the optimizer's state are no scheduler."""
    make(tmp_path, scheduler=cosine(4)).run(2)
    exp = make(tmp_path, allow='Scheduler')
    exp.run(3)
    make(tmp_path).run(4)
    assert 'A scheduler' not in capsys.readouterr().out
