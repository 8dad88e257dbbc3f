"""nntools: plain attributes of an experiment decide numbers too: others are said."""

import math

import numpy as np
import pytest
import torch

import nntools as nt
from tests.helpers import Net, experiment


class Weighted(nt.Experiment):
    """The loss has a weight, that of an attribute, as of the divergence in a VAE."""
    beta = 1

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d) + self.beta * y.square().mean()
        self.update(loss)
        return loss, x, y, d


def build(folder, kind=Weighted, **attributes):
    """What is set after the experiment has been made, before it runs."""
    exp = experiment(folder, kind)
    for name, value in attributes.items():
        setattr(exp, name, value)
    return exp


def said_in_run(exp, epochs, capsys):
    """The NOTE, if any, and the last line."""
    capsys.readouterr()
    exp.run(epochs)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith('NOTE')], lines[-1]


def test_another_weight_of_a_loss(tmp_path, capsys):
    build(tmp_path).run(5)
    capsys.readouterr()
    exp = build(tmp_path, beta=100)
    assert exp.epoch == 5 and 'NOTE' not in capsys.readouterr().out  # it may be set until run
    note = (f'NOTE: {exp.output_dir} was trained for 5 epochs by other attribute '
            'beta (1, now 100)')
    last = '5 epochs were trained before, by other attribute beta'
    assert said_in_run(exp, 5, capsys) == ([note], last)
    assert said_in_run(exp, 6, capsys) == ([], 'Finish training for 6 epochs')
    again = build(tmp_path, beta=100)
    assert said_in_run(again, 6, capsys) == ([], 'Finish training for 6 epochs')


def test_an_attribute_of_the_class(tmp_path, capsys):
    class Heavy(Weighted):
        beta = 100

    Heavy.__name__ = 'Weighted'
    build(tmp_path).run(2)
    (note,), _ = said_in_run(build(tmp_path, Heavy), 3, capsys)
    assert note.endswith('by other attribute beta (1, now 100)')


@pytest.mark.parametrize(
    'before, now, text',
    [
        (True, False, 'attribute x (True, now False)'),
        (0.5, 0.25, 'attribute x (0.5, now 0.25)'),
        ('max', 'mean', 'attribute x (max, now mean)'),
        (1, 1.5, 'attribute x (1, now 1.5)'),
        (np.float64(2), np.float64(3), 'attribute x (2.0, now 3.0)'),
    ],
)
def test_numbers_truths_and_texts(tmp_path, capsys, before, now, text):
    build(tmp_path, x=before).run(2)
    assert said_in_run(build(tmp_path, x=before), 2, capsys)[0] == []
    (note,), _ = said_in_run(build(tmp_path, x=now), 2, capsys)
    assert note.endswith(f'by other {text}')


@pytest.mark.parametrize(
    'before, now',
    [
        ({'_x': 1}, {'_x': 2}),  # private
        ({'x': torch.ones(2)}, {'x': torch.zeros(2)}),
        ({'x': [1]}, {'x': [2]}),
        ({}, {'x': 1}),  # not there before: of an older program
        ({'x': 1}, {}),
        ({'x': math.nan}, {'x': math.nan}),
        ({'x': '/home/ann/faces'}, {'x': '/mnt/faces'}),  # the same folder on another machine
        ({'best_path': 'a'}, {'best_path': 'b'}),  # those of Experiment itself
    ],
    ids=['private', 'tensor', 'list', 'new', 'gone', 'nan', 'folder', 'own'],
)
def test_what_does_not_count(tmp_path, capsys, before, now):
    build(tmp_path, **before).run(2)
    notes, last = said_in_run(build(tmp_path, **now), 2, capsys)
    assert notes == [] and last == 'Finish training for 2 epochs'


class Annealed(Weighted):
    """Changes its attribute in training."""

    def step(self, batch):
        if self.net.training:
            self.beta = self.beta * 0.9
        return super().step(batch)


def test_an_attribute_that_training_changes(tmp_path, capsys):
    """Compared is the value with which the first run began."""
    exp = build(tmp_path, Annealed)
    exp.run(1)
    assert said_in_run(exp, 2, capsys)[0] == []
    assert said_in_run(build(tmp_path, Annealed), 3, capsys)[0] == []


class Counting(Annealed):
    """Keeps it in the checkpoint."""

    def state_dict(self):
        return super().state_dict() | {'beta': self.beta}

    def load_state_dict(self, checkpoint):
        super().load_state_dict(checkpoint)
        self.beta = checkpoint['beta']


def test_an_attribute_that_is_restored(tmp_path, capsys):
    build(tmp_path, Counting).run(2)
    for epochs in (3, 4):
        notes, last = said_in_run(build(tmp_path, Counting), epochs, capsys)
        assert notes == [] and last == f'Finish training for {epochs} epochs'


def test_an_interrupt_forgets_nothing(tmp_path, capsys):
    build(tmp_path).run(2)
    exp = build(tmp_path, beta=100)
    with pytest.raises(ZeroDivisionError):
        exp.run(3, after_batch=lambda e, loss: 1 / 0)
    assert capsys.readouterr().out.count('NOTE') == 1
    last = '2 epochs were trained before, by other attribute beta'
    assert said_in_run(exp, 2, capsys) == ([], last)
    assert said_in_run(build(tmp_path, beta=100), 2, capsys)[0] != []
    assert nt.load_checkpoint(exp.checkpoint_path)['Circumstances']['attribute beta'] == 1


def test_other_source_and_attributes(tmp_path, capsys):
    """A source is said at construction, attributes at the first run; both at its end."""
    def before():
        class Line(Net):
            def criterion(self, y, d):
                return (y - d).square().mean()
        return Line()

    def now():
        class Line(Net):
            def criterion(self, y, d):
                return (y - d).abs().mean()
        return Line()

    experiment(tmp_path, Weighted, before()).run(2)
    capsys.readouterr()
    exp = experiment(tmp_path, Weighted, now())
    exp.beta = 100
    assert 'by other source of network' in capsys.readouterr().out
    (note,), last = said_in_run(exp, 2, capsys)
    assert 'source of' not in note and note.endswith('by other attribute beta (1, now 100)')
    assert last == '2 epochs were trained before, by other source of network, attribute beta'
