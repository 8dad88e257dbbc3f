"""The log of trainings, checkpoints/trials.csv, and the page that prints it, docs/trials.md."""
import importlib
import re
import shlex

import pytest

import denoising_utils as du
import nntools as nt
from programs import results, trials
from programs.tables import read_rows

CHECKPOINTS = du.HERE / 'checkpoints'
PAGE = du.HERE / 'docs' / 'trials.md'
ROWS = read_rows(CHECKPOINTS / 'trials.csv')
MACHINES = {'Intel Xeon with AMX', 'another Intel Xeon with AMX', 'AMD EPYC'}


def in_section(section):
    return [row for row in ROWS if row['section'] == section]


# --- the page ------------------------------------------------------------------------------------

def test_the_page_has_what_the_command_prints(capsys):
    results.main(['trials'])
    printed = capsys.readouterr().out.strip().split('\n\n<!-- trials')
    parts = [printed[0], *(f'<!-- trials{part}' for part in printed[1:])]
    text = PAGE.read_text(encoding='utf-8')
    assert len(parts) == text.count('<!-- trials: ') == text.count('<!-- end -->') == 10
    assert [part for part in parts if part not in text] == []


def test_the_tables_of_the_page_are_renewed(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding='utf-8')
    page = tmp_path / 'trials.md'
    monkeypatch.setattr(results, 'TRIALS_PAGE', page)
    page.write_text(text.replace('29.345', '99.999').replace('| 41.89', '| 0.00'), encoding='utf-8')
    results.main(['trials', '--write'])
    assert page.read_text(encoding='utf-8') == text


def test_a_page_without_a_marker_is_left_alone(tmp_path):
    page = tmp_path / 'trials.md'
    text = PAGE.read_text(encoding='utf-8').replace('<!-- trials: long -->', '')
    page.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='<!-- trials: long -->'):
        trials.write_trials(page)
    assert page.read_text(encoding='utf-8') == text


def test_no_training_is_left_out_of_the_page():
    assert {row['section'] for row in ROWS} == {*trials.SECTIONS, 'repeats'}
    text = PAGE.read_text(encoding='utf-8')
    for row in ROWS:
        assert row['change'] in text and row['held_out'] in text


# --- the rows ------------------------------------------------------------------------------------

class Begun(Exception):
    """A program has filled its recipe and would train now."""


@pytest.mark.parametrize('row', ROWS, ids=[f'{k} {row["section"]}' for k, row in enumerate(ROWS)])
def test_a_row_and_its_command(row, monkeypatch):
    def experiment(recipe, photographs, folder, allow=()):
        raise Begun(recipe)

    monkeypatch.setattr(du, 'find_photographs', lambda folder: folder)
    monkeypatch.setattr(du.Recipe, 'experiment', experiment)
    program, *words = shlex.split(row['command'].removeprefix('python -m programs.'))
    with pytest.raises(Begun) as begun:
        importlib.import_module(f'programs.{program}').main(words)
    recipe = begun.value.args[0]
    assert row['network'] == du.NETWORKS[recipe.net].__name__
    assert row['seed'] == str(recipe.seed)
    assert row['machine'] in MACHINES
    assert re.fullmatch(r'2026-11-\d\d|unknown', row['date'])
    assert bool(row['held_out']) == recipe.hold_out
    if recipe.hold_out:
        assert 28 < float(row['held_out']) < 32


def test_the_committed_networks_are_all_there():
    """With the seed and the time that are stored beside the weights."""
    folders = {}
    for row in in_section('committed') + in_section('blind')[-1:] + in_section('photo')[-1:]:
        folders[row['command'].rpartition('/')[2]] = row
    there = {path.name for path in CHECKPOINTS.iterdir() if path.is_dir()}
    assert folders.keys() == {name for name in there if not name.endswith('_narrow')}
    for folder, row in folders.items():
        settings = (CHECKPOINTS / folder / 'config.txt').read_text(encoding='utf-8')
        assert f'Seed({row["seed"]})' in settings
        assert settings.startswith(f'Net({row["network"]}(')
        state = nt.load_checkpoint(str(CHECKPOINTS / folder / 'checkpoint.pth.tar'), 'cpu')
        assert row['minutes'] == f'{sum(state["Seconds"]) / 60:.0f}'


def test_the_networks_of_the_ablation_have_its_scores():
    stored = du.read_scores(CHECKPOINTS / 'ablation.csv', 'held out')['dncnn']
    rows = in_section('half width')[:3]
    assert [row['seed'] for row in rows] == ['0', '1', '2']
    assert [row['held_out'] for row in rows] == [f'{values.mean():.3f}' for values in stored]


def test_the_noise_floor():
    """What the page says of it."""
    text = ' '.join(PAGE.read_text(encoding='utf-8').split())
    first, second = (float(row['held_out']) for row in in_section('short')[:2])
    three = [float(row['held_out']) for row in in_section('half width')[:3]]
    moved = [float(line.split('|')[4]) for line in trials.repeats_table(ROWS)[2:]]
    assert f'differ by {abs(first - second):.2f} dB' in text
    assert f'DnCNN(6) by {max(three) - min(three):.2f} dB' in text
    assert f'moved by {min(moved):.3f} to {max(moved):.3f} dB' in text
