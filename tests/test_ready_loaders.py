"""nntools: what a ready DataLoader as train_set does otherwise than the options say."""

import pytest
import torch
import torch.utils.data as td

from tests.helpers import Data, make

START = 'train_set is a DataLoader, used as it is: '
SIZE = 'its batches have 5 samples, and not batch_size=4'
ORDER = 'it is not shuffled'


def weighted():
    return td.WeightedRandomSampler(torch.ones(22), 22, generator=torch.Generator())


class Stream(td.IterableDataset):
    def __iter__(self):
        return (Data()[k] for k in range(8))


@pytest.mark.parametrize(
    'loader, said',
    [
        (td.DataLoader(Data(), 5), f'{SIZE}; {ORDER}'),
        (td.DataLoader(Data(), 5, shuffle=True), SIZE),
        (td.DataLoader(Data(), 4), ORDER),
        (td.DataLoader(Data(), 4, shuffle=True), ''),
        (td.DataLoader(Data(), 4, sampler=weighted()), ''),
        (td.DataLoader(Data(), 4, sampler=td.SequentialSampler(Data())), ORDER),
        (td.DataLoader(Data(), batch_sampler=td.BatchSampler(weighted(), 4, True)), ''),
        (td.DataLoader(Stream(), 4), ''),
        (td.DataLoader(Stream(), 5), SIZE),
    ],
    ids=['both', 'size', 'order', 'neither', 'a sampler', 'in order on purpose', 'batch sampler',
         'a stream', 'size of a stream'],
)
def test_what_is_ignored_is_said(tmp_path, capsys, loader, said):
    exp = make(tmp_path, train=loader)
    exp.run(1)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'DataLoader' in line]
    assert lines == ([START + said] if said else [])


def test_it_is_said_once(tmp_path, capsys):
    loader = td.DataLoader(Data(), 5)
    exp = make(tmp_path, train=loader, val=td.DataLoader(Data(7), 3),
               perform_validation_during_training=True)
    assert capsys.readouterr().out == f'{START}{SIZE}; {ORDER}\n'
    exp.run(2)
    exp.run(3)
    exp.evaluate(loader)
    exp.predict(loader)
    assert 'DataLoader' not in capsys.readouterr().out


def test_of_a_data_set_nothing_is_said(tmp_path, capsys):
    make(tmp_path, val=td.DataLoader(Data(7), 3))
    assert capsys.readouterr().out == ''
