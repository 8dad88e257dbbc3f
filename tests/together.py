"""What two processes of torchrun do together, for tests/test_torchrun.py.

tests/trainings.py is the program that torchrun starts.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.utils.data as td
from torch import nn
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, Stats, write_csv


class Affine(nt.NeuralNetwork):
    """Without batch norm or dropout, so that two halves of a batch are as good as the whole."""

    def __init__(self):
        super().__init__()
        self.frozen, self.layer = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.frozen(x))

    def criterion(self, y, d):
        return torch.nn.functional.mse_loss(y, d)


class AllKinds(Stats):
    """Sums of all kinds, beside a constant."""
    tenth = 0.1

    def init(self):
        super().init()
        self.count, self.array, self.values, self.constant = torch.zeros(2), np.zeros(1), [], 7
        self.names, self.ready, self.classes = ['a', 'b'], True, {'x': 1}

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.count += torch.tensor([len(x), 1])  # in place
        self.array = self.array + d.sum().item()
        self.values += d.flatten().tolist()

    def summarize(self):
        return super().summarize() | {
            'count': self.count, 'array': self.array, 'constant': self.constant,
            'values': sorted(self.values), 'names': self.names, 'ready': self.ready}


class ByHand(nt.Experiment):
    """A step of its own, as subclasses have."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d


def build(folder, kind=nt.Experiment, seed=0, **options):
    torch.manual_seed(seed)
    net = Affine()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return kind(
        net, Data(22), Data(7), sgd, AllKinds(), str(folder), 4,
        scheduler=lr_scheduler.StepLR(sgd, 3), perform_validation_during_training=True, **options)


def plain(summary):
    """For JSON."""
    return {name: value.tolist() if hasattr(value, 'tolist') else value
            for name, value in summary.items()}


def one_training(folder, rank):
    """A training that one process began, and others that one process could do as well."""
    said = {}
    exp = build(folder / 'shared', seed=rank)  # goes on from the one process before
    said['epoch'] = exp.epoch
    said['evaluation'] = plain(exp.evaluate())
    said['one sample'] = plain(exp.evaluate(Data(1)))['count']
    exp.run(4)
    said['predicted'] = len(exp.predict(Data(5)))

    # Other weights on each: those of rank 0 count.
    fresh = build(folder / f'fresh{rank}', seed=rank)
    fresh.run(3)
    by_hand = build(folder / f'by_hand{rank}', ByHand, seed=rank)
    by_hand.run(3)
    for name, e in (('shared', exp), ('fresh', fresh), ('by_hand', by_hand)):
        said[name] = {k: v.tolist() for k, v in e.net.state_dict().items()}
    said['steps'] = exp.stats_manager.number_update

    # One batch of 4, without the short one; and batches that can't be halved.
    short = nt.Experiment(
        exp.net, td.Subset(Data(), range(7)), Data(7), exp.optimizer, AllKinds(),
        str(folder / 'short'), 4)
    short.run(1)
    said['trained on'] = plain(short.history[0])['count']
    try:
        nt.Experiment(exp.net, Data(), Data(), exp.optimizer, Stats(), str(folder / 'odd'), 3)
    except ValueError as error:
        said['odd'] = str(error)
    return said


class Two(nt.NeuralNetwork):
    """A network with two losses and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(9, 9)
        self.second = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class TwoLosses(nt.Experiment):
    """Two losses, each with an optimizer; both train the body."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        other = (self.net.second(torch.tanh(self.net.body(x))) + d).square().mean()
        self.update(other, self.also_save['second'])
        return loss + other.detach(), x, y, d


class SometimesUsed(nt.Experiment):
    """A layer that only the process with the first half of the batch uses."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        if x[0, 2] < 0.5:
            y = y + self.net.second(torch.tanh(self.net.body(x)))
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d


class Adversarial(nt.Experiment):
    """As the docstring of `step` has it."""

    def step(self, batch):
        x, _ = batch
        fake = self.net(torch.ones_like(x))
        score = nn.functional.softplus
        loss_d = (
            score(-self.net.second(x.repeat(1, 2)[:, :4])).mean()
            + score(self.net.second(fake.detach().repeat(1, 4))).mean()
        )
        self.update(loss_d, self.also_save['second'])
        loss_g = score(-self.net.second(fake.repeat(1, 4))).mean()
        self.update(loss_g)
        return loss_g + loss_d, x, None, None


def build_two(folder, kind=nt.Experiment, seed=0, **options):
    torch.manual_seed(seed)
    net = Two()
    parameters = [*net.body.parameters(), *net.head.parameters(), *net.unused.parameters()]
    second, also = [*net.second.parameters()], {}
    if kind is SometimesUsed:
        parameters += second
    if kind is TwoLosses:
        second += net.body.parameters()
    if kind not in (nt.Experiment, SometimesUsed):
        also = {'second': torch.optim.SGD(second, lr=0.1)}
    first = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    return kind(net, Data(24), Data(7), first, nt.StatsManager(), str(folder), 4, seed=0,
                also_save=also, **options)


class Largest(nt.StatsManager):
    """A statistic that is not a sum."""

    def init(self):
        super().init()
        self.largest = -math.inf

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.largest = max(self.largest, d.max().item())

    def summarize(self):
        return {
            'loss': super().summarize(), 'largest': self.largest, 'samples': self.number_samples}


class Failing(nt.Experiment):
    """One process meets an error, in the second epoch."""

    def step(self, batch):
        if self.epoch == 1 and self.batch == 2 and os.environ.get('RANK') == '1':
            raise ArithmeticError('on one process only')
        return super().step(batch)


def several_trainings(folder, rank):
    """Trainings with several updates, callbacks and statistics; the last one fails on a process."""
    said, called = {}, []

    # Several updates in a step, layers that are not always used, steps of several batches.
    for kind in (nt.Experiment, TwoLosses, SometimesUsed, Adversarial):
        exp = build_two(folder / kind.__name__, kind, seed=rank, grad_clip=1.0)
        exp.run(3)
        said[kind.__name__] = {name: value.tolist() for name, value in exp.net.state_dict().items()}
    exp = build_two(folder / 'accumulated', seed=rank, batches_per_step=2)
    exp.run(2)
    said['accumulated'] = {name: value.tolist() for name, value in exp.net.state_dict().items()}

    # A callback, statistics and a validation loader.
    def callback(e):
        called.append(e.epoch)
        (folder / f'callback{rank}').touch()
        write_csv(folder / 'history.csv', e.table())
        e.save(folder / 'copy.pth.tar')
        called.append(round(e.evaluate()['samples']))
        if e.epoch == 2:
            e.stop()

    net = Two()
    exp = nt.Experiment(
        net, Data(24), td.DataLoader(Data(7), 2), torch.optim.SGD(net.parameters(), lr=0.1),
        Largest(), str(folder / 'called'), 4, seed=0, perform_validation_during_training=True)
    exp.run(5, callback)
    said['called'], said['epoch'] = called, exp.epoch
    said['own loader'] = exp.evaluate()
    said['trained on'] = exp.history[0][0]

    # Networks that begin with other weights on each process, and a callback that sets rates.
    torch.manual_seed(rank)
    net, other = Two(), Net()
    other.out.bias.data.fill_(rank)
    parts = [net.body, net.second]
    exp = nt.Experiment(
        net, Data(24), td.Subset(Data(8), range(rank, 8, 2)),
        torch.optim.SGD([{'params': part.parameters()} for part in parts], lr=0.3),
        nt.StatsManager(), str(folder / 'phases'), 4, True, seed=0, also_save={'other': other})

    def phases(e):
        thawed = e.epoch >= 2
        net.body.requires_grad_(thawed)
        for group, rate in zip(e.optimizer.param_groups, (0.01, 0.1) if thawed else (0, 0.3)):
            group['lr'] = rate

    exp.run(4, phases)
    said['phases'] = {
        'weights': [p.tolist() for _, p in nn.Module.named_parameters(net)],
        'bias': other.out.bias.tolist(),
        'rates': [group['lr'] for group in exp.optimizer.param_groups], 'history': exp.history,
        'frozen': not net.body.weight.requires_grad}

    # An error on one process.
    exp = build_two(folder / 'failing', Failing)
    try:
        exp.run(3)
    except Exception as error:
        said['error'] = type(error).__name__
    try:
        exp.run(3)
    except RuntimeError as error:
        said['parted'] = str(error)
    return said


def processes(folder):
    """What each of two processes does. What it says is in rank0.json and rank1.json."""
    folder, rank = Path(folder), int(os.environ['RANK'])
    said = {
        'one training': one_training(folder, rank),
        'several trainings': several_trainings(folder, rank)}
    (folder / f'rank{rank}.json').write_text(json.dumps(said))
