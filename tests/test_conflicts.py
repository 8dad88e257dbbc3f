"""nntools: how a conflict of settings is refused, and how `allow` takes the new ones."""

import re

import pytest
import torch

import nntools as nt
from tests.helpers import (
    Changing,
    Data,
    Net,
    conflict,
    content,
    cosine,
    end,
    make,
    same,
    with_optimizer,
)


def test_conflicts_are_listed_with_stored_and_given(tmp_path):
    make(tmp_path).run(1)
    saved = content(tmp_path)
    with pytest.raises(ValueError) as error:
        make(tmp_path, Net(width=5), Data(23), batch_size=5, lr=0.5, grad_clip=1.0, seed=3,
             perform_validation_during_training=True)
    text = str(error.value)
    for line in (
        'Net: out stored Linear(in_features=4, out_features=1, bias=True), '
        'given Linear(in_features=5,',
        'TrainSet: stored Data(22, 0.0), given Data(23, 0.0)',
        'BatchSize: stored 4, given 5',
        'Seed: stored 0, given 3',
        'GradClip: stored None, given 1.0',
        'PerformValidationDuringTraining: stored False, given True',
        'Optimizer: lr stored 0.01, given 0.5',
    ):
        assert line in text, text
    assert 'StatsManager' not in text and str(tmp_path) in text
    assert 'betas' not in text  # which are alike
    assert content(tmp_path) == saved
    assert make(tmp_path).epoch == 1


@pytest.mark.parametrize(
    'change, lines',
    [
        ({'lr': 0.02}, ['Optimizer: lr stored 0.01, given 0.02']),
        ({'batch_size': 5}, ['BatchSize: stored 4, given 5']),
        (
            {'grad_clip': 1.0, 'lr': 0.5},
            ['Optimizer: lr stored 0.01, given 0.5', 'GradClip: stored None, given 1.0'],
        ),
        (with_optimizer(torch.optim.SGD, 0.01), ['Optimizer: stored Adam, given SGD']),
        ({'stats': nt.StatsManager()}, ['StatsManager: stored Stats, given StatsManager']),
        (
            {'batches_per_step': 2, 'precision': 'bfloat16'},
            ['Precision: stored float32, given bfloat16', 'BatchesPerStep: stored 1, given 2'],
        ),
    ],
    ids=['rate', 'batch size', 'two', 'kind', 'statistics', 'steps'],
)
def test_a_refusal_shows_what_differs(tmp_path, change, lines):
    make(tmp_path).run(1)
    first, *rest = conflict(tmp_path, **change).splitlines()
    assert str(tmp_path) in first and sorted(line.strip() for line in rest[:-1]) == sorted(lines)
    names = tuple(re.findall(r"'(\w+)'", rest[-1].split('allow=')[1]))
    assert sorted(names) == sorted(line.split(':')[0] for line in lines)
    assert 'another output_dir' in rest[-1]
    exp = make(tmp_path, **change, allow=names)
    exp.run(3)
    assert exp.epoch == 3 and make(tmp_path, **change).epoch == 3


def with_new_network(change):
    """The same arguments; a network is made anew, and is not yet trained."""
    if 'net' in change:
        net = change['net']
        change = change | {'net': Net(net.hidden.out_features, net.drop.p)}
    return change


@pytest.mark.parametrize(
    'change',
    [
        {'lr': 0.02},
        {'net': Net(width=7)},
        {'net': Net(dropout=0.5)},
        {'batch_size': 5},
        {'seed': 5},
        {'scheduler': cosine(4)},
        {'train': Data(23)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_at_epoch_0_never_refuses(tmp_path, change):
    """It has nothing to lose: what is trained is what is given now."""
    exp = make(tmp_path / 'a', lr=1e30)
    with pytest.raises(FloatingPointError):
        exp.run(1)
    torch.manual_seed(4)
    exp = make(tmp_path / 'a', **with_new_network(change))
    change = with_new_network(change)
    fresh = make(tmp_path / 'b', **change)
    assert exp.epoch == 0
    exp.run(2)
    fresh.run(2)
    assert same(end(fresh), end(exp)) and make(tmp_path / 'a', **change).epoch == 2


def test_more_images_the_next_day(tmp_path):
    make(tmp_path, train=Changing(22)).run(1)
    assert 'TrainSetSize: stored 22, given 30' in conflict(tmp_path, train=Changing(30))
    exp = make(tmp_path, train=Changing(30), allow=('TrainSet', 'TrainSetSize'))
    exp.run(2)
    assert exp.epoch == 2 and exp.stats_manager.number_update == 7
    assert make(tmp_path, train=Changing(30)).epoch == 2
