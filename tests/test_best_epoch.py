"""nntools: the best epoch so far (best_by), its checkpoint and its weights."""

from pathlib import Path

import pytest

import nntools as nt
from tests.helpers import Steps, best_agrees, experiment, make, same


def build(folder):
    """A training with the largest error as the best, which is not the last one."""
    return make(folder, best_by='error', best_mode='max', lr=0.03,
                perform_validation_during_training=True)


def test_best_is_kept_beside_the_last_and_resumed(tmp_path):
    exp = build(tmp_path)
    exp.run(3)
    exp = build(tmp_path)
    exp.run(6)
    errors = [val['error'] for _, val in exp.history]
    k = errors.index(max(errors)) + 1
    assert exp.best == (k, max(errors)) and k < 6
    last = exp.evaluate()
    assert last['error'] == pytest.approx(errors[-1])
    exp.load(exp.best_path)
    assert exp.epoch == k and exp.evaluate()['error'] == pytest.approx(max(errors))
    exp.load()
    assert exp.epoch == 6


def test_the_best_weights_do_not_shorten_the_history(tmp_path):
    exp = build(tmp_path)
    exp.run(5)
    k, value = exp.best
    assert k < 5
    optimizer = exp.optimizer.state_dict()
    exp.load_best()
    assert exp.epoch == 5 and exp.evaluate()['error'] == value
    assert same(optimizer, exp.optimizer.state_dict())
    exp = build(tmp_path)
    exp.load_best()
    exp.run(6)
    assert exp.epoch == 6 and len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 6
    exp.load(exp.best_path)  # and this goes back
    assert exp.epoch == k and exp.evaluate()['error'] == value
    with pytest.raises(RuntimeError, match='there is no checkpoint.*best.pth.tar'):
        make(tmp_path / 'new').load_best()


def test_the_best_checkpoint_is_that_of_exp_best(tmp_path, capsys):
    """Whether best_by is given later, or changed, or best_mode is."""
    options = {'lr': 0.03, 'perform_validation_during_training': True}
    make(tmp_path, **options).run(3)
    exp = make(tmp_path, **options, best_by='error', best_mode='min')
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    exp.run(5)
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    exp = make(tmp_path / 'b', **options, best_by='error', best_mode='min')
    exp.run(4)
    assert best_agrees(exp)
    old = Path(exp.best_path).read_bytes()
    capsys.readouterr()
    exp = make(tmp_path / 'b', **options, best_by='error', best_mode='max')
    assert Path(exp.best_path).read_bytes() == old  # who only looks changes nothing
    with pytest.raises(RuntimeError, match=r'best.pth.tar is of epoch \d, but the best one is 1'):
        exp.load_best()
    exp.run(12)
    # Nothing is lost.
    assert Path(f'{exp.best_path}.old').read_bytes() == old
    assert 'best.pth.tar.old' in capsys.readouterr().out
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    assert exp.best[1] == max(val['error'] for _, val in exp.history)


def test_who_only_looks_leaves_the_best_weights(tmp_path):
    """Another process trains on, and has written its best epoch, but not yet its last one."""
    class BestInEpoch7(nt.StatsManager):
        def summarize(self):
            return {'score': abs(exp.epoch + 1 - 7)}

    def look(e):
        if e.epoch == 8:
            other = make(tmp_path, stats=BestInEpoch7())
            other.load_best()  # which is later than the checkpoint, and may be used
            looked.append((other.epoch, len(nt.load_checkpoint(other.best_path)['History'])))

    looked = []
    exp = make(
        tmp_path, stats=BestInEpoch7(), save_every=5, best_by='score', best_mode='min')
    exp.run(10, look)
    assert looked == [(5, 7)] and exp.best == (7, 0)
    assert len(nt.load_checkpoint(exp.best_path)['History']) == 7


@pytest.mark.parametrize('validation', [False, True])
def test_a_misspelt_best_by_is_noticed_at_once(tmp_path, validation):
    exp = experiment(
        tmp_path, Steps, best_by='acuracy', best_mode='max',
        perform_validation_during_training=validation)
    with pytest.raises(ValueError, match="no statistic 'acuracy'"):
        exp.run(2)
    assert exp.steps == 1 and exp.epoch == 0


@pytest.mark.parametrize('validation', [False, True])
def test_a_misspelt_statistic_is_told_the_right_name(tmp_path, validation):
    def build(best_by, folder='a'):
        stats = nt.StatsManager({'accuracy': lambda y, d: (y - d).abs() < 0.5})
        return make(tmp_path / folder, stats=stats, best_by=best_by, best_mode='max',
                    perform_validation_during_training=validation)

    with pytest.raises(ValueError) as error:
        build('acuracy').run(2)
    text, own = str(error.value), 'val_accuracy' if validation else 'accuracy'
    assert "no statistic 'acuracy'" in text
    assert f"'{own}'" in text and 'loss' in text and len(text) < 150
    exp = build(own, 'b')
    exp.run(3)
    assert exp.best[1] == max(row[own] for row in exp.table()) == exp.table()[exp.best[0] - 1][own]


class OwnEvaluation(nt.Experiment):
    """As a subclass of 2019: without an argument, and with a statistic of its own."""

    def evaluate(self):
        return {'mIoU': 0.5 + 0.1 * self.epoch}


def test_an_own_evaluation_has_its_own_statistics(tmp_path):
    options = {'perform_validation_during_training': True, 'best_mode': 'max'}
    exp = experiment(tmp_path / 'a', OwnEvaluation, best_by='mIoU', **options)
    exp.run(2)
    assert exp.best == (2, 0.6) and best_agrees(exp)
    exp = experiment(tmp_path / 'b', OwnEvaluation, best_by='mIuO', **options)
    with pytest.raises(ValueError, match="no statistic 'mIuO', there is .*'val_mIoU'"):
        exp.run(2)
    assert exp.epoch == 0
