"""nntools: the folder of an experiment stays where it was when the program changes its own."""

import os
from pathlib import Path

import pytest

from tests.helpers import Net, content, make


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two folders, in the first of which the program is."""
    for name in ('first', 'second'):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'first')
    return tmp_path / 'first', tmp_path / 'second'


@pytest.mark.parametrize('name', ['exp', './exp', '../first/exp'])
def test_a_change_of_folder_splits_nothing(two, name):
    first, second = two
    exp = make(name, best_by='loss')
    for path in (exp.output_dir, exp.checkpoint_path, exp.best_path, exp.config_path):
        assert Path(path).is_absolute()
    exp.run(1)
    os.chdir(second)
    exp.run(2)
    exp.load()
    exp.load_best()
    names = {'checkpoint.pth.tar', 'best.pth.tar', 'config.txt'}
    assert content(first / 'exp').keys() == names and content(second) == {}
    assert make(first / 'exp', best_by='loss').epoch == 2


def test_a_change_in_the_middle_of_a_run(two):
    first, second = two
    exp = make('exp')
    exp.run(3, lambda e: os.chdir(second))
    assert make(first / 'exp').epoch == 3 and content(second) == {}


def test_the_folder_that_is_made_up(two):
    first, second = two
    exp = make('')
    os.chdir(second)
    exp.run(1)
    folder, = first.iterdir()
    assert folder.name.startswith('experiment_') and exp.output_dir == str(folder)
    assert content(second) == {}


def test_a_conflict_names_the_whole_folder(two):
    first, _ = two
    make('exp').run(1)
    with pytest.raises(ValueError) as error:
        make('exp', Net(width=5))
    assert str(first / 'exp') in str(error.value)
