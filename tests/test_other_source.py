"""nntools: a program that has changed since is said, as its numbers may be others.

A changed source is no conflict: it is one line, and the last one of a run with nothing to do.
"""

import importlib
import sys

import pytest
import torch

import nntools as nt
from tests.helpers import OneLayer, content, experiment, make

PROGRAM = '''import torch
from torch import nn
import nntools as nt
from tests.helpers import Data


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Line(nt.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.block(x))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, y):
        return self.layer(y)


class Training(nt.Experiment):
    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d


class Counts(nt.StatsManager):
    def accumulate(self, loss, x=None, y=None, d=None):
        super().accumulate(loss, x, y, d)


def error(y, d):
    return (y - d).abs()


def collate(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([d for _, d in samples])


def rate(epoch):
    return 0.9 ** epoch


def build(folder):
    net = Line()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    return Training(
        net, Data(), Data(7), adam, Counts({'error': error}), folder, 4, seed=0,
        scheduler=scheduler, collate_fn=collate, also_save={'critic': Critic()})
'''

CHANGES = {
    # What it is of: (what is written, what is written now, whose source it is).
    'network': ('self.out(self.block(x))', 'self.out(self.block(2 * x))', 'network'),
    'loss': ('mse_loss', 'l1_loss', 'network'),
    'layer': ('torch.tanh', 'torch.relu', 'network'),
    'also saved': ('self.layer(y)', 'self.layer(-y)', 'network'),
    'step': ('self.update(loss)', 'self.update(2 * loss)', 'experiment'),
    'statistics': ('.accumulate(loss, x', '.accumulate(2 * loss, x', 'statistics'),
    'metric': ('(y - d).abs()', '(y - d).square()', 'statistics'),
    'collate_fn': ('[d for _, d', '[2 * d for _, d', 'collate_fn'),
    'schedule': ('0.9 ** epoch', '0.5 ** epoch', 'schedule'),
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Writes the program with some texts replaced, and builds the experiment of it."""
    def written(*changes):
        text = PROGRAM
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / 'student.py').write_text(text)
        sys.modules.pop('student', None)
        importlib.invalidate_caches()
        return importlib.import_module('student').build(str(tmp_path / 'exp'))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    yield written
    sys.modules.pop('student', None)


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize('old, new, whose', CHANGES.values(), ids=CHANGES)
def test_another_source_is_said(build, capsys, old, new, whose):
    build().run(2)
    capsys.readouterr()
    exp = build((old, new))
    said = f'NOTE: {exp.output_dir} was trained for 2 epochs by other source of {whose}\n'
    assert exp.epoch == 2 and capsys.readouterr().out == said
    exp.run(2)
    assert last_line(capsys) == f'2 epochs were trained before, by other source of {whose}'
    # Trained on, the training is of the source of now.
    exp.run(3)
    assert last_line(capsys) == 'Finish training for 3 epochs'
    exp = build((old, new))
    assert capsys.readouterr().out == ''
    exp.run(3)
    assert last_line(capsys) == 'Finish training for 3 epochs'


def test_several_sources_are_one_line(build, capsys):
    build().run(2)
    capsys.readouterr()
    build(*[(old, new) for old, new, _ in CHANGES.values()])
    line, = capsys.readouterr().out.splitlines()
    others = line.split(' by other ')[1].split(', ')
    assert sorted(others) == sorted({f'source of {whose}' for _, _, whose in CHANGES.values()})


def test_the_same_source_is_not_said(build, capsys):
    build().run(2)
    capsys.readouterr()
    build()
    build(('import nntools as nt\n', 'import nntools as nt\n\n# other lines, the same source\n'))
    assert capsys.readouterr().out == ''


def test_until_an_epoch_is_trained_each_start_says_it(build, tmp_path, capsys):
    build().run(2)
    saved = content(tmp_path / 'exp')
    capsys.readouterr()
    for _ in range(2):
        exp = build(CHANGES['loss'][:2])
        exp.run(2)
        said = capsys.readouterr().out
        assert said.count('NOTE: ') == 1 and said.endswith(', by other source of network\n')
        with pytest.raises(ZeroDivisionError):
            exp.run(3, after_batch=lambda e, loss: 1 / 0)
    assert content(tmp_path / 'exp') == saved


def test_a_checkpoint_that_did_not_store_it(build, tmp_path, capsys):
    build().run(2)
    path = tmp_path / 'exp' / 'checkpoint.pth.tar'
    state = nt.load_checkpoint(path)
    del state['Circumstances']
    torch.save(state, path)
    capsys.readouterr()
    exp = build(*[(old, new) for old, new, _ in CHANGES.values()])
    exp.run(2)
    said = capsys.readouterr().out
    assert 'NOTE' not in said and said.endswith('Finish training for 2 epochs\n')


class Halved(nt.Experiment):
    """Another class with another step, in the place of nt.Experiment."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss / 2)
        return loss, x, y, d


def collate(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([2 * d for _, d in samples])


@pytest.mark.parametrize(
    'whose, change', [('experiment', {'kind': Halved}), ('collate_fn', {'collate_fn': collate})],
    ids=['experiment', 'collate_fn'])
def test_what_was_not_given_before(tmp_path, capsys, whose, change):
    experiment(tmp_path).run(2)
    capsys.readouterr()
    experiment(tmp_path, **change)
    assert 'was trained for 2 epochs by other source of ' + whose in capsys.readouterr().out


def squares():
    class Plain(OneLayer):
        @staticmethod
        def criterion(y, d):
            return torch.nn.functional.mse_loss(y, d)

        @property
        def scale(self):
            return 1.0
    return Plain()


def distances():
    class Plain(OneLayer):
        @staticmethod
        def criterion(y, d):
            return torch.nn.functional.l1_loss(y, d)

        @property
        def scale(self):
            return 1.0
    return Plain()


def scaled():
    class Plain(OneLayer):
        @staticmethod
        def criterion(y, d):
            return torch.nn.functional.mse_loss(y, d)

        @property
        def scale(self):
            return 2.0
    return Plain()


@pytest.mark.parametrize('other', [distances, scaled])
def test_static_methods_and_properties_count(tmp_path, capsys, other):
    make(tmp_path, squares()).run(2)
    make(tmp_path, squares())
    assert 'source' not in capsys.readouterr().out
    make(tmp_path, other())
    assert 'by other source of network' in capsys.readouterr().out
