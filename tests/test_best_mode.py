"""nntools: which epoch is the best: of a statistic other than the loss it must be said."""

import pytest
import torch

import nntools as nt
from tests.helpers import Data, content, make


def near(y, d):
    """1 for each sample that is hit, as in an accuracy."""
    return ((y - d).abs() < 0.5).float()


def test_a_statistic_needs_best_mode(tmp_path):
    for name in ('error', 'val_error', 'accuracy'):
        with pytest.raises(ValueError) as error:
            make(tmp_path, best_by=name)
        assert str(error.value) == (
            f"best_by='{name}' needs best_mode='max' if more of it is better, "
            "or best_mode='min' if less is")
    assert content(tmp_path) == {}


def test_the_loss_needs_none(tmp_path):
    for name in ('loss', 'val_loss', None):
        exp = make(tmp_path / str(name), best_by=name, perform_validation_during_training=True)
        exp.run(3)
        losses = [validation['loss'] for _, validation in exp.history]
        assert exp.best == (1 + losses.index(min(losses)), min(losses))


@pytest.mark.parametrize('mode, choose', [('max', max), ('min', min)])
def test_the_mode_that_is_given_counts(tmp_path, mode, choose):
    options = {'stats': nt.StatsManager({'accuracy': near}), 'lr': 0.1}
    exp = make(tmp_path, train=Data(40), best_by='accuracy', best_mode=mode, **options)
    exp.run(6)
    accuracies = [entry['accuracy'] for entry in exp.history]
    assert max(accuracies) > min(accuracies)
    assert exp.best == (1 + accuracies.index(choose(accuracies)), choose(accuracies))
    assert len(nt.load_checkpoint(exp.best_path)['History']) == exp.best[0]
    # Of a checkpoint, both are taken over.
    again = make(tmp_path, train=Data(40), **options)
    assert (again.best_by, again.best_mode, again.best) == ('accuracy', mode, exp.best)


def test_a_plateau_by_a_statistic(tmp_path):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, 'max')

    with pytest.raises(ValueError, match="best_by='error' needs best_mode"):
        make(tmp_path, scheduler=plateau, best_by='error')
    make(tmp_path, scheduler=plateau, best_by='error', best_mode='max').run(1)
