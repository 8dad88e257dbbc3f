"""nntools: schedules of the learning rate."""


import pytest
import torch
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, Stats, conflict, cosine, end, make, same, without_settings


def test_schedulers_do_change_the_rate(tmp_path):
    exp = make(tmp_path, scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.1))
    exp.run(4)
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(1e-4)
    plateau = make(tmp_path / 'p', scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=0, threshold=10.0, threshold_mode='abs'),
        best_by='error', best_mode='min')
    plateau.run(2)
    assert plateau.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3)


def test_a_scheduler_step_a_batch(tmp_path):
    """One too many and OneCycleLR would raise: none in evaluation."""
    def build(name):
        net = Net()
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        cycle = lr_scheduler.OneCycleLR(adam, 0.1, total_steps=15)
        return make(
            tmp_path / name, net, optimizer=adam, also_save={'cycle': cycle},
            perform_validation_during_training=True), cycle

    def step_and_note(e, loss):
        cycle.step()
        rates.append(cycle.get_last_lr()[0])

    rates = []
    exp, cycle = build('whole')
    exp.run(3, after_batch=step_and_note)
    assert len(rates) == 15 and max(rates) > 0.09 > 0.01 > rates[-1]
    for epochs in (1, 3):
        parts, again = build('parts')
        parts.run(epochs, after_batch=lambda e, loss, cycle=again: cycle.step())
    assert same(end(exp), end(parts))


class Rising(nt.StatsManager):
    """An accuracy that rises from epoch to epoch."""
    passes = 0

    def summarize(self):
        Rising.passes += 1
        return {'loss': 1.0, 'accuracy': float(Rising.passes)}


def test_a_plateau_of_something_to_be_large(tmp_path):
    def plateau(mode):
        return lambda o: lr_scheduler.ReduceLROnPlateau(o, mode, patience=0)

    exp = make(
        tmp_path, stats=Rising(), best_by='accuracy', best_mode='max', scheduler=plateau('max')
    )
    exp.run(5)
    assert exp.optimizer.param_groups[0]['lr'] == 0.01
    with pytest.raises(
        ValueError, match="mode of the scheduler must be best_mode, 'max', got 'min'"
    ):
        make(
            tmp_path / 'b', stats=Rising(), best_by='accuracy', best_mode='max',
            scheduler=plateau('min'))


def test_a_scheduler_stepped_in_the_callback(tmp_path):
    exp = make(tmp_path)
    exp.scheduler = lr_scheduler.StepLR(exp.optimizer, 1, 0.5)
    exp.run(3, plot=lambda e: e.epoch and e.scheduler.step())
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(0.01 * 0.5 ** 3)


def step(gamma):
    return lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma)


def constant_then_cosine(T_max):
    def schedule(optimizer):
        parts = [lr_scheduler.ConstantLR(optimizer), cosine(T_max)(optimizer)]
        return lr_scheduler.SequentialLR(optimizer, parts, [2])

    return schedule


@pytest.mark.parametrize(
    'old, new, line',
    [
        (cosine(5), cosine(10), 'Scheduler: T_max stored 5, given 10'),
        (step(0.1), step(0.5), 'Scheduler: gamma stored 0.1, given 0.5'),
        (step(0.1), cosine(2), 'Scheduler: stored StepLR, given CosineAnnealingLR'),
        (cosine(5), None, 'Scheduler: stored CosineAnnealingLR, given None'),
        (constant_then_cosine(5), constant_then_cosine(9), 'T_max'),
    ],
    ids=['an argument', 'a default', 'another', 'none', 'inside'],
)
def test_a_changed_schedule_is_a_conflict(tmp_path, old, new, line):
    make(tmp_path, scheduler=old).run(5)
    message = conflict(tmp_path, scheduler=new)
    assert line in message, message
    assert message.rstrip('.').endswith("allow=('Scheduler',) goes on with the new ones"), message
    assert make(tmp_path, scheduler=old).epoch == 5


def test_a_changed_schedule_as_if_it_had_been_there(tmp_path):
    make(tmp_path, scheduler=cosine(5)).run(5)
    exp = make(tmp_path, scheduler=cosine(10), allow=('Scheduler',))
    assert exp.epoch == 5 and exp.optimizer.param_groups[0]['lr'] == pytest.approx(0.01 * 0.5)
    exp.run(10)
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-9)
    assert make(tmp_path, scheduler=cosine(10)).epoch == 10  # now it is the stored one


def test_a_scheduled_rate_is_no_conflict(tmp_path):
    def build(**options):
        return make(tmp_path, scheduler=lambda o: lr_scheduler.StepLR(o, 1), **options)

    build().run(2)
    assert build().epoch == 2
    with pytest.raises(ValueError, match='Optimizer: lr stored 0.01, given 0.02'):
        build(lr=0.02)
    # In the checkpoint of the first edition is the rate of now.
    without_settings(tmp_path)
    exp = build()
    assert exp.epoch == 2 and exp.optimizer.param_groups[0]['lr'] == pytest.approx(1e-4)


def test_a_second_experiment_with_the_same_objects(tmp_path):
    """As when a cell is run again: a schedule of several parts has moved on, and is what it was."""
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    parts = [
        lr_scheduler.LinearLR(adam, total_iters=2), lr_scheduler.CosineAnnealingLR(adam, T_max=4)]
    schedule = lr_scheduler.SequentialLR(adam, parts, milestones=[2])

    def build(schedule):
        return nt.Experiment(
            net, Data(), Data(7), adam, Stats(), str(tmp_path), 4, seed=0, scheduler=schedule
        )

    build(schedule).run(3)
    rate = adam.param_groups[0]['lr']
    exp = build(schedule)
    assert exp.epoch == 3 and adam.param_groups[0]['lr'] == rate and exp.scheduler is schedule
    parts = [
        lr_scheduler.LinearLR(adam, total_iters=2), lr_scheduler.CosineAnnealingLR(adam, T_max=8)]
    with pytest.raises(ValueError, match='Scheduler: 1: T_max stored 4, given 8'):
        build(lr_scheduler.SequentialLR(adam, parts, milestones=[2]))
