"""The fixed test, the commands of programs.results, and the page docs/results.md."""
import csv
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import denoising_utils as du
from programs import results, used_field

PAGE = (du.HERE / 'docs' / 'results.md').read_text(encoding='utf-8')
PROSE = ' '.join(PAGE.split())
CHECKPOINTS = du.HERE / 'checkpoints'


@pytest.fixture
def large(folder):
    """The photographs of ``folder``, as large as the fixed test needs them."""
    for file in folder.glob('t*/*.png'):
        Image.open(file).resize((330, 340)).save(file)
    return folder


def cells(row):
    return [cell.strip() for cell in row.split('|')[1:-1]]


# --- the fixed test ------------------------------------------------------------------------------

def test_cbsd68_is_68_of_the_test_photographs():
    """One is not in it, of the first 69 (the folder testsets/CBSD68 of cszn/IRCNN)."""
    lines = du.MANIFEST.read_text(encoding='utf-8').splitlines()
    names = sorted(line.split()[1] for line in lines if ' test/' in line)
    assert len(names) == 100 and len(du.CBSD68) == 68
    assert {names[k] for k in range(69)} - {names[k] for k in du.CBSD68} == {'test/156065.jpg'}


# --- intervals -----------------------------------------------------------------------------------

def test_intervals_are_those_of_students_t_tests():
    random = np.random.default_rng(0)
    scores = {'a': random.normal(30, 2, (3, 50)), 'b': random.normal(30.1, 2, (4, 50))}
    a, b = (values.mean(axis=1) for values in scores.values())
    mean, half = du.over_trainings(scores['a'], scores['b'])
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(du.over_trainings(scores['a'], scores['b'][:1])[1])
    mean, half = du.over_photographs(scores['a'][0] - scores['b'][0])
    low, high = stats.ttest_rel(scores['a'][0], scores['b'][0]).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))


# --- evaluate ------------------------------------------------------------------------------------

@pytest.fixture
def evaluated(large, tmp_path):
    """``evaluated(*words)`` evaluates two equal trainings of a small DnCNN; and the network."""
    checkpoints = tmp_path / 'checkpoints'
    exp = du.Recipe(D=1, C=2, size=16).experiment(large, checkpoints / 'dncnn')
    exp.run(1)
    shutil.copytree(checkpoints / 'dncnn', checkpoints / 'dncnn_seed1')

    def evaluate(*words):
        results.main(['evaluate', 'dncnn', '--data', str(large),
                      '--checkpoints', str(checkpoints), *map(str, words)])

    return evaluate, exp.net


def test_evaluate_prints_the_mean_over_trainings(evaluated, tmp_path, capsys):
    evaluate, net = evaluated
    evaluate('--scores', tmp_path / 'scores.csv')
    out = capsys.readouterr().out
    scores = du.read_scores(tmp_path / 'scores.csv', 'test')['dncnn']
    assert scores.shape == (2, 3) and (scores[0] == scores[1]).all()
    assert 'NOT BSDS300' in out and 'sigma = 30.' in out
    start = f'| DnCNN(1), 1 epochs | {du.count_parameters(net)} | 7 | {scores.mean():.2f} ± '
    assert start in out
    last = cells(out.splitlines()[-1])
    assert last[4] == f'{scores.mean():.2f}, {scores.mean():.2f}'
    assert last[5] == '', 'these photographs are not CBSD68'


def test_scores_keep_apart_what_is_not_the_same(evaluated, tmp_path):
    evaluate, _ = evaluated
    file = tmp_path / 'scores.csv'
    evaluate('--scores', file)
    before = du.read_scores(file, 'test')['dncnn']
    evaluate('--scores', file, '--sigma', 50)
    evaluate('--scores', file, '--self-ensemble', '--seeds', 1)
    after = du.read_scores(file, 'test')
    assert after.keys() == {'dncnn', 'dncnn_ensemble'}
    assert len(after['dncnn_ensemble']) == 1 and (after['dncnn'] == before).all()
    assert du.read_scores(file, 'test, sigma 50').keys() == {'dncnn'}


def test_a_seed_that_was_not_trained(evaluated):
    with pytest.raises(ValueError, match=r'dncnn has no training with --seeds \[7\]'):
        evaluated[0]('--seeds', 7)


def test_other_files_are_not_written_to(evaluated, tmp_path):
    expenses = tmp_path / 'expenses.csv'
    expenses.write_text('day,expense\n1,2\n')
    committed = CHECKPOINTS / 'scores.csv'
    for file, problem in ((expenses, 'is not a file of scores'), (committed, 'BSDS300')):
        before = file.read_text()
        with pytest.raises(ValueError, match=problem):
            evaluated[0]('--scores', file)
        assert file.read_text() == before


# --- ablation ------------------------------------------------------------------------------------

def test_ablation_trains_what_is_asked_for(large, tmp_path, capsys, monkeypatch):
    """And prints what is stored."""
    monkeypatch.setattr(du, 'HELD_OUT', range(0, 6, 3))
    words = ['ablation', '--scores', str(tmp_path / 'scores.csv'), '--C', '2']
    train = ['--retrain', '--data', str(large), '--out', str(tmp_path / 'runs'), '--epochs', '1']
    results.main([*words, *train, '--seeds', '0', '1', '--arms', 'dncnn', 'udncnn'])
    # Again: the scores take the place of the old ones.
    results.main([*words, *train, '--seeds', '1', '--arms', 'udncnn'])
    capsys.readouterr()
    results.main(words)
    out = capsys.readouterr().out

    held_out = du.read_scores(tmp_path / 'scores.csv', 'held out')
    test = du.read_scores(tmp_path / 'scores.csv', 'test')
    for scores, count in ((held_out, 2), (test, 3)):
        shapes = {arm: values.shape for arm, values in scores.items()}
        assert shapes == {'dncnn': (2, count), 'udncnn': (2, count)}
    parameters = du.count_parameters(du.UDnCNN(6, C=2))
    mean = held_out['udncnn'].mean()
    assert (f'| UDnCNN(6) | {parameters} | 36 | 2 | {mean:.2f} | '
            f'{mean - held_out["dncnn"].mean():+.2f} ± ') in out


# --- levels --------------------------------------------------------------------------------------

def test_levels_are_measured_stored_and_printed(large, tmp_path, capsys, monkeypatch):
    """Beside FFDNet's figures."""
    net = du.DUDnCNN(2, C=2, zero_last=True)  # the identity
    monkeypatch.setattr(du, 'load_network', lambda name: (net, []))
    words = ['levels', '--scores', str(tmp_path / 'levels.csv')]
    nets = ['noisy', 'dudncnn', 'dudncnn_scaled']
    results.main([*words, '--retest', '--data', str(large), '--nets', *nets])
    measured = capsys.readouterr().out
    results.main(words)
    assert capsys.readouterr().out == measured

    rows = {row[0]: row[1:] for row in map(cells, measured.splitlines()[2:6])}
    assert rows['noisy images'] == rows['DUDnCNN(6)']
    assert rows['DUDnCNN(6), input scaled'] == [*5 * [''], rows['noisy images'][-1]]
    assert float(rows['noisy images'][4]) == pytest.approx(20 * math.log10(255 / 30), abs=0.05)
    ffdnet = '| FFDNet, told the level |  | 35.83 | 33.53 | 30.82 | 29.92 | 27.54 |'
    assert ffdnet in measured
    not_clipped, _, clipped = measured.partition('clipped to 8 bits')
    assert 'FFDNet-Clip' in clipped and 'FFDNet-Clip' not in not_clipped


# --- BM3D and others -----------------------------------------------------------------------------

def test_bm3d_is_scored_on_the_fixed_test(large, tmp_path, capsys, monkeypatch):
    """With a stand-in for the package, which is told the level on the scale 0 to 1."""
    levels = []

    def bm3d_rgb(image, level):
        levels.append(level)
        return image

    monkeypatch.setitem(sys.modules, 'bm3d', types.SimpleNamespace(bm3d_rgb=bm3d_rgb))
    file = tmp_path / 'scores.csv'
    results.main(['bm3d', '--data', str(large), '--scores', str(file)])
    assert levels == 3 * [30 / 255]
    (values,) = du.read_scores(file, 'test')['bm3d']
    assert values == pytest.approx(18.59, abs=0.1)
    assert f'BM3D: {values.mean():.2f} dB' in capsys.readouterr().out


def test_peers_are_sorted_and_ours_are_the_means(capsys):
    results.main(['peers'])
    rows = {row[0]: row[1:] for row in map(cells, capsys.readouterr().out.splitlines()[2:])}
    assert rows['FFDNet (Zhang et al., IEEE TIP 2018)'] == ['852,108', '29.92', '30.11']
    for name in ('dncnn', 'udncnn', 'dudncnn', 'dudncnn_400', 'bm3d'):
        values = du.read_scores(CHECKPOINTS / 'scores.csv', 'test')[name]
        title = results.TITLES.get(name, 'BM3D (package bm3d)')
        assert rows[title][1:] == [f'{values.mean():.2f}', f'{values[:, du.CBSD68].mean():.2f}']
    scores = [float(row[1]) for row in rows.values()]
    assert scores == sorted(scores, reverse=True) and len(scores) == 11


def test_published_figures_have_a_source():
    with open(CHECKPOINTS / 'published.csv', newline='', encoding='utf-8') as stream:
        rows = [*csv.DictReader(stream)]
    assert [*rows[0]] == ['network', 'parameters', 'set', 'psnr', 'source']
    for row in rows:
        assert re.match(r'\w+ et al\., .* 20\d\d; .*measured elsewhere', row['source']), row
        assert int(row['parameters']) > 0 and 20 < float(row['psnr']) < 40
    assert len({(row['network'], row['set']) for row in rows}) == len(rows)


# --- docs/results.md -----------------------------------------------------------------------------

@pytest.mark.parametrize('command', ['ablation', 'levels', 'peers'])
def test_the_page_has_the_tables_of_a_command(command, capsys):
    results.main([command])
    tables = re.findall(r'(?:^\|.*\n)+', capsys.readouterr().out, flags=re.MULTILINE)
    assert tables and all(table in PAGE for table in tables)


def test_the_page_has_the_used_field(capsys):
    used_field.main([])
    tables = re.findall(r'(?:^\|.*\n)+', capsys.readouterr().out, flags=re.MULTILINE)
    assert len(tables) == 2 and all(table in PAGE for table in tables)


def test_the_page_has_the_stored_scores():
    """What the command evaluate prints, but for SSIM and times, which aren't stored."""
    scores = du.read_scores(CHECKPOINTS / 'scores.csv', 'test')
    names = [*du.COMPARED, 'dncnn_course', 'dncnn_14', 'dncnn_course_assignment',
             *(f'{name}_400' for name in du.COMPARED)]
    rows = [cells(row) for row in PAGE.splitlines() if ' epochs' in row and row.count('|') == 9]
    assert len(rows) == len(names)
    for name, row in zip(names, rows):
        net, history = du.load_network(name)
        unknown = {key: np.array([math.nan]) for key in ('ssim', 'seconds')}
        trainings = [results.Training(0, net, len(history), unknown | {'psnr': psnr})
                     for psnr in scores[name]]
        assert row[0] == results.evaluate_title(name, trainings[0], is_ensemble=False)
        expected = results.evaluate_cells(trainings, is_bsds300=True)
        assert row[1:6] == [str(cell) for cell in expected[:5]]


@pytest.mark.parametrize('ending, words', [
    ('', '0.21 dB ahead of DnCNN(6) (95 % intervals: ± 0.02 over photographs, ± 0.01 over '
         'trainings). UDnCNN(6) is 0.03 dB behind DnCNN(6) (± 0.01, ± 0.01)'),
    ('_400', 'DUDnCNN(6) is 0.19 dB ahead (± 0.02, ± 0.02), and UDnCNN(6) 0.04 dB behind '
             '(± 0.02, ± 0.01)'),
])
def test_the_page_states_the_differences(ending, words):
    scores = du.read_scores(CHECKPOINTS / 'scores.csv', 'test')
    differences = [du.difference_in_words(scores, first + ending, second + ending)
                   for first, second in (('dudncnn', 'dncnn'), ('dncnn', 'udncnn'))]
    number = r'\d\.\d\d'
    assert words in PROSE
    assert re.findall(number, words) == re.findall(number, ' '.join(differences))


def test_the_blind_network_makes_none_worse():
    """But three, after the first stage of its training."""
    for file, count in (('levels.csv', 0), ('blind_first_stage.csv', 3)):
        worse = set()
        for sigma in du.LEVELS:
            noisy = du.read_scores(CHECKPOINTS / 'levels.csv', f'sigma {sigma}')['noisy'][0]
            blind = du.read_scores(CHECKPOINTS / file, f'sigma {sigma}')['dudncnn_blind'][0]
            worse |= {(sigma, k) for k in np.flatnonzero(blind < noisy)}
        assert len(worse) == count and all(sigma == 3 for sigma, _ in worse)


def test_the_page_has_the_classical_denoisers():
    """As the stored notebook has them."""
    notebook = json.loads((du.HERE / 'Assignment4.ipynb').read_text(encoding='utf-8'))
    printed = [text for cell in notebook['cells'] for output in cell.get('outputs', ())
               for text in output.get('data', {}).get('text/markdown', ())]
    for name, verb in (('non-local means', ' reaches'), ('total variation', ''), ('wavelets', '')):
        (row,) = [row for row in printed if row.startswith(f'| {name} |')]
        assert f'{name}{verb} {cells(row)[1].split()[0]}' in PROSE
