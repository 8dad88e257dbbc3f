"""nntools: the history, its table, and summaries of all kinds."""

import collections
import csv
import re

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, Stats, make, same, write_csv


def test_table_and_csv(tmp_path):
    exp = make(tmp_path, perform_validation_during_training=True)
    assert exp.table() == []
    exp.run(2)
    write_csv(tmp_path / 'history.csv', exp.table())
    rows = list(csv.DictReader(open(tmp_path / 'history.csv')))
    assert list(rows[0]) == ['epoch', 'loss', 'error', 'val_loss', 'val_error', 'seconds']
    assert [float(row['val_error']) for row in rows] == [val['error'] for _, val in exp.history]


@pytest.mark.parametrize(
    'summary',
    [
        {'accuracy': torch.tensor(0.5)},
        {'loss': np.float32(0.5), 'top': np.int64(3)},
        torch.tensor(1.5),
        np.float64(2),
        {
            'loss': 0.1, 'confusion': np.eye(2), 'per class': [torch.tensor(1.0)],
            'nested': {'a': np.bool_(True)}},
        (0.5, 0.25),
        (1, 2, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize('validation', [False, True])
def test_summaries_of_all_kinds(tmp_path, summary, validation):
    class Any(nt.StatsManager):
        def summarize(self):
            return summary

    def build():
        net = Net()
        return nt.Experiment(
            net, Data(), Data(), torch.optim.Adam(net.parameters()), Any(), str(tmp_path),
            perform_validation_during_training=validation)

    build().run(1)
    exp = build()
    exp.run(2)
    assert exp.epoch == 2 and same(exp.history[0], exp.history[1])
    entry = exp.history[0][1] if validation else exp.history[0]
    if isinstance(summary, dict):
        assert entry.keys() == summary.keys()
        value = entry[next(iter(summary))]
        kept = torch.Tensor if isinstance(summary.get('accuracy'), torch.Tensor) else float
        assert type(value) is kept and value == float(summary[next(iter(summary))])
    write_csv(tmp_path / 'table.csv', exp.table())
    assert len(exp.table()) == 2


class AllKinds(Stats):
    def summarize(self):
        error = torch.tensor(self.error / self.number_samples, requires_grad=True)
        return super().summarize() | {
            'PSNR': error * 1, 'confusion': torch.eye(2, dtype=torch.int64), 'array': np.eye(2),
            'single': np.float32(0.5), 'whole': np.int64(3), 'words': ['a', 'b'], 'none': None}


@pytest.mark.parametrize('validation', [False, True])
def test_the_history_keeps_what_summarize_returned(tmp_path, validation):
    def build():
        return make(
            tmp_path, stats=AllKinds(), best_by='PSNR', best_mode='min',
            perform_validation_during_training=validation)

    exp = build()
    exp.run(2)
    again = build()
    assert same(exp.history, again.history)
    for e in (exp, again):
        entry = e.history[-1][1] if validation else e.history[-1]
        assert entry['PSNR'].cpu().item() == pytest.approx(entry['error'])
        assert not entry['PSNR'].requires_grad
        assert entry['confusion'][0, 0] == 1 and entry['confusion'].dtype == torch.int64
        assert entry['array'][1, 1] == 1
        assert [type(entry[name]) for name in ('single', 'whole', 'error')] == [float, int, float]
        row = e.table()[-1]
        assert row['PSNR'] == pytest.approx(row['error']) and type(row['PSNR']) is float
        assert row['confusion'] == [[1, 0], [0, 1]]
        assert type(e.best[1]) is float
        write_csv(tmp_path / 'history.csv', e.table())
        rows = list(csv.DictReader(open(tmp_path / 'history.csv')))
        assert float(rows[1]['PSNR']) == row['PSNR'] and float(rows[1]['single']) == 0.5
    torch.load(exp.checkpoint_path, weights_only=True)  # anybody's torch.load reads it


def test_a_summary_of_another_kind_can_be_resumed(tmp_path):
    Result = collections.namedtuple('Result', 'loss accuracy')

    class Named(nt.StatsManager):
        def summarize(self):
            return Result(super().summarize(), torch.ones(1))

    class Unreadable(nt.StatsManager):
        def summarize(self):
            return {lr_scheduler.ReduceLROnPlateau: super().summarize()}

    make(tmp_path, stats=Named(), best_by='accuracy', best_mode='max').run(1)
    exp = make(tmp_path, stats=Named())
    assert exp.epoch == 1 and exp.history[0].keys() == {'loss', 'accuracy'} and exp.best == (1, 1.0)
    # Not only at the next start.
    with pytest.raises(RuntimeError, match='holds objects that could run code'):
        make(tmp_path / 'other', stats=Unreadable()).run(5)


def test_a_statistic_that_is_added_later(tmp_path):
    class Growing(Stats):
        more = False

        def summarize(self):
            return super().summarize() | ({'new': self.error} if self.more else {})

    make(tmp_path, stats=Growing()).run(3)
    Growing.more = True
    exp = make(tmp_path, stats=Growing(), best_by='new', best_mode='max')
    assert exp.best[0] == 0
    exp.run(5)
    assert exp.best[0] > 3 and exp.best[1] == max(row['new'] for row in exp.history[3:])
    assert [('new' in row) for row in exp.table()] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    'change', ['validation later', 'validation no more', 'appended', 'cut short', 'odd']
)
def test_an_irregular_history(tmp_path, change):
    options = {
        'best_by': 'error', 'best_mode': 'min',
        'perform_validation_during_training': change == 'validation no more'}
    exp = make(tmp_path, **options)
    exp.run(3)
    if change.startswith('validation'):
        options['perform_validation_during_training'] ^= True
        with pytest.raises(ValueError) as error:
            make(tmp_path, **options)
        options['allow'] = tuple(re.findall(r"'(\w+)'", str(error.value).split('allow=')[1]))
        exp = make(tmp_path, **options)
    elif change == 'appended':
        exp.history.append({'loss': 0.5, 'error': 0.25})
    elif change == 'odd':
        exp.history[1:1] = ['a remark', None, 7, {'another': 'text'}]
    else:
        del exp.history[1:]
    n = exp.epoch
    exp.run(n + 2)
    assert exp.epoch == n + 2 and len(exp.seconds) == n + 2 and all(s > 0 for s in exp.seconds[n:])
    rows = exp.table()
    assert len(rows) == n + 2 and {'loss', 'error', 'seconds'} <= rows[-1].keys()
    assert exp.best[1] > 0
    again = make(tmp_path, **options)
    again.run(n + 3)
    assert again.epoch == n + 3 and same(again.history[:n + 2], exp.history)
