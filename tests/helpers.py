"""What tests of several files use: a small network, its data and an experiment with them."""

import csv
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data as td
from torch import nn
from torch.optim import lr_scheduler

import nntools as nt

CHECKOUT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # the networks are small; and the results don't depend on the machine
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, which Windows does not')


class Net(nt.NeuralNetwork):
    def __init__(self, width=4, dropout=0.0, outputs=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the same at each call
            self.hidden = nn.Linear(3, width)
            self.norm = nn.BatchNorm1d(width)
            self.drop = nn.Dropout(dropout)
            self.out = nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.norm(self.hidden(x)))))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Data(td.Dataset):
    """Pairs that are a function of the index, with noise from the global generators if wanted."""

    def __init__(self, n=22, noise=0.0, bad=None):
        self.n, self.noise, self.bad = n, noise, bad

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        x = torch.tensor([math.sin(k), math.cos(k), k / self.n])
        if self.noise:
            x = x + self.noise * (torch.randn(3) + random.random() + float(np.random.rand()))
        return x * (math.nan if k == self.bad else 1), x.sum(0, keepdim=True)

    def __repr__(self):
        return f'Data({self.n}, {self.noise})'


class Stats(nt.StatsManager):
    def init(self):
        super().init()
        self.error = 0.0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.error += (y - d).abs().sum().item()

    def summarize(self):
        return {'loss': super().summarize(), 'error': self.error / self.number_samples}


def make(folder, net=None, train=None, val=None, *, lr=0.01, optimizer=None, stats=None,
         scheduler=None, **options):
    """A small experiment, the same at each call."""
    net = Net() if net is None else net  # a compiled network has a length
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=lr)
    options = {'batch_size': 4, 'seed': 0, 'output_dir': str(folder)} | options
    return nt.Experiment(
        net, Data() if train is None else train, Data(7) if val is None else val, optimizer,
        stats or Stats(), scheduler=scheduler and scheduler(optimizer), **options)


def same(a, b):
    """Whether two nested structures are alike, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def end(exp, *but):
    """What must be alike after two runs that should be alike; ``but`` what these names stand for.

    Of experiments of two classes, the `Circumstances` are not alike.
    """
    return {name: value for name, value in exp.state_dict().items()
            if name not in ('Seconds', *but)}


def without_settings(folder):
    """Makes a checkpoint one of the first edition, which did not store the settings in it."""
    path = folder / 'checkpoint.pth.tar'
    state = nt.load_checkpoint(path)
    for name in ('Setting', 'Circumstances', 'Best', 'Format'):
        state.pop(name, None)
    torch.save(state, path)


def is_checkpoint(state):
    """Whether `torch.save` writes a whole checkpoint, and not a part, to see if it can be read."""
    return isinstance(state, dict) and 'History' in state


def write_csv(path, rows):
    """The table of an experiment, with the columns of all its rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


# --- the denoiser of test_course_2019.py and test_checkpoints_2019.py ----------------------------

class Denoiser(nt.NeuralNetwork):
    def __init__(self):
        super(Denoiser, self).__init__()
        self.mse = nn.MSELoss()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def criterion(self, y, d):
        return self.mse(y, d)

    def forward(self, x):
        return self.conv(x)


class DenoisingStats(nt.StatsManager):
    def init(self):
        super(DenoisingStats, self).init()
        self.running_psnr = 0

    def accumulate(self, loss, x, y, d):
        super(DenoisingStats, self).accumulate(loss, x, y, d)
        n = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]
        self.running_psnr += 10 * torch.log10(4 * n / (torch.norm(y - d) ** 2))

    def summarize(self):
        loss = super(DenoisingStats, self).summarize()
        return {'loss': loss, 'PSNR': np.float64((self.running_psnr / self.number_update).cpu())}


class Noisy(td.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, k):
        clean = torch.full((1, 6, 6), k / 10)
        return clean + torch.randn(1, 6, 6), clean

    def __repr__(self):
        return 'Noisy(mode=train, sigma=30)'


# --- experiments and what is asked of them -------------------------------------------------------

def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def conflict(*args, **options):
    """The message with which an experiment is refused; nothing that was saved may be touched."""
    saved = content(Path(args[0]))
    with pytest.raises(ValueError) as error:
        make(*args, **options)
    assert content(Path(args[0])) == saved
    return str(error.value)


class Steps(nt.Experiment):
    """Counts the batches of training."""
    steps = 0

    def step(self, batch):
        self.steps += self.net.training
        return super().step(batch)


def experiment(folder, kind=nt.Experiment, net=None, data=None, stats=None, **options):
    """As `make`, of another class."""
    net = net or Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    options = {'batch_size': 4, 'seed': 0} | options
    return kind(net, data or Data(), Data(7), adam, stats or Stats(), str(folder), **options)


def cosine(T_max):
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max)


def best_agrees(exp):
    """Whether the best checkpoint is that of the epoch which is the best."""
    path = Path(exp.best_path)
    return path.exists() and len(nt.load_checkpoint(path)['History']) == exp.best[0]


def collate_pairs(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([d for _, d in samples])


def with_optimizer(kind, lr):
    """Arguments for `make`."""
    net = Net()
    return {'net': net, 'optimizer': kind(net.parameters(), lr=lr)}


class Changing(Data):
    """A data set that describes itself without its length, which may change."""

    def __repr__(self):
        return 'Changing()'


class OneLayer(nt.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x)

    criterion = staticmethod(nn.functional.mse_loss)
