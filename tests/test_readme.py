"""The README's programs and recipes do what they claim, also when interrupted; what it names is there."""
import contextlib
import copy
import csv
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import denoising_utils as du
import nntools as nt

HERE = Path(__file__).resolve().parent.parent
README = (HERE / 'README.md').read_text(encoding='utf-8')
_, *SECTIONS = re.split(r'^##+ (.*)\n', README, flags=re.MULTILINE)
CODE = {title: re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
        for title, text in zip(SECTIONS[::2], SECTIONS[1::2])}
(PROGRAM,) = CODE['Use nntools in your own assignment']
# The variant that the recipe of averaged weights describes in a sentence.
SWA = CODE['Averaged weights'][0].replace(', multi_avg_fn=get_ema_multi_avg_fn(0.99)', '').replace(
    ': averaged.', f": {re.search('update where `(.*)`', README)[1]} and averaged.")
TRAININGS = [pytest.param(code, id=f'{title} {k}') for title, codes in (CODE | {'SWA': [SWA]}).items()
             for k, code in enumerate(codes) if 'exp.run(' in code]

torch.set_num_threads(1)


def recipe(title, number=0):
    return CODE[title][number]


def execute(code, names):
    """Runs a snippet with the names of the program, as a new process would. Returns the names afterwards."""
    names = {'__name__': 'digits'} | names
    torch.manual_seed(0)
    exec(compile(code, 'README.md', 'exec'), names)
    return names


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    """The names that the complete program leaves behind, and the folder with what it wrote."""
    folder = tmp_path_factory.mktemp('program')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return execute(PROGRAM, {}), folder / 'digits'


@pytest.fixture
def start(program, tmp_path, monkeypatch):
    """``start(name)`` enters a new folder where only the complete program has run, and returns its names."""
    def enter(name):
        folder = tmp_path / name
        shutil.copytree(program[1], folder / 'digits')
        monkeypatch.chdir(folder)
        return program[0]

    return enter


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """What a stand-in for TensorBoard is told: (name, value, epoch)."""
    scalars = []
    tensorboard = types.ModuleType('torch.utils.tensorboard')
    tensorboard.SummaryWriter = lambda folder: types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', tensorboard)
    return scalars


@contextlib.contextmanager
def steps_counted(interrupt_at=None):
    """Counts the steps of all optimizers; Ctrl-C is pressed at one of them."""
    steps = []

    def count(optimizer, *_):
        steps.append(optimizer)
        if len(steps) == interrupt_at:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


def plain(value):
    """Lists and numbers, which ``==`` compares exactly."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != 'Seconds'}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def outcome(names):
    """All that an experiment has saved, and the weights that it has now."""
    exp = names['exp']
    paths = [path for path in (exp.checkpoint_path, exp.best_path) if os.path.exists(path)]
    return [plain(nt.load_checkpoint(path)) for path in paths] + [plain(exp.net.state_dict())]


# --- every training ------------------------------------------------------------------------------

@pytest.mark.parametrize('code', TRAININGS)
def test_a_training_that_was_interrupted_ends_with_the_same_bits(code, start, capsys):
    def enter(name):
        names = start(name)
        if code == PROGRAM:
            shutil.rmtree('digits')
        return names

    first = enter('uninterrupted')
    with steps_counted() as steps:
        names = execute(code, first)
    expected, half = outcome(names), names['exp'].epoch // 2

    enter('interrupted')
    with steps_counted(interrupt_at=len(steps) // 5), pytest.raises(KeyboardInterrupt):
        execute(code, first)
    execute(re.sub(r'(exp\.run\(\D*)\d+', rf'\g<1>{half}', code), first)  # again, and then as a new program
    capsys.readouterr()
    building, running = code.split('exp.run(')
    names = execute(building, first)
    with steps_counted(interrupt_at=len(steps) // 5), pytest.raises(KeyboardInterrupt):
        exec(f'exp.run({running}', names)
    assert 'from epoch 0' not in capsys.readouterr().out
    exec(f'exp.run({running}', names)  # again, as in a notebook
    assert outcome(names) == expected

    with steps_counted() as more:
        assert outcome(execute(code, first)) == expected
    assert not more, 'nothing was left to train'


# --- the program ---------------------------------------------------------------------------------

def test_the_program(program, start, capsys):
    names, folder = program
    exp = names['exp']
    y = torch.cat([exp.net.eval()(x[None]) for x, _ in names['val_set']])
    expected = (y.argmax(1) == names['labels'][1500:]).float().mean().item()
    assert exp.evaluate()['accuracy'] == pytest.approx(expected) and expected > 0.85
    assert len(exp.history) == 20 and exp.history[-1][1] == exp.evaluate()

    start('again')
    again = execute(PROGRAM, {})
    assert 'Epoch' not in capsys.readouterr().out, 'the second run should find its checkpoint'
    assert again['exp'].evaluate() == exp.evaluate()
    again['exp'].run(num_epochs=30)
    start('never stopped')
    shutil.rmtree('digits')
    longer = execute(PROGRAM.replace('num_epochs=20', 'num_epochs=30'), {})
    assert outcome(again) == outcome(longer)


@pytest.mark.skipif(sys.platform == 'win32', reason='torchrun needs libuv, which wheels for Windows lack (PyTorch issue 139990)')
def test_the_program_under_torchrun(tmp_path):
    (tmp_path / 'digits.py').write_text(PROGRAM.replace('num_epochs=20', 'num_epochs=5'))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'digits.py']
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Epoch 5/5: ') == 1
    results = re.findall(r'\{.*?\}', done.stdout)  # of print, on both processes
    assert len(results) == 2 and results[0] == results[1]
    assert float(re.search(r"'accuracy': ([\d.]+)", results[0])[1]) > 0.8


# --- the recipes ---------------------------------------------------------------------------------

def test_best_weights(start):
    names = execute(recipe('The best weights at the end'), start('best'))
    exp, values = names['exp'], [val['accuracy'] for _, val in names['exp'].history]
    assert len(values) == 30 and names['value'] == max(values) == values[names['epoch'] - 1]
    assert names['epoch'] < 30, 'the best epoch is not the last one, or this test shows nothing'
    assert exp.evaluate()['accuracy'] == names['value']
    exp.load()
    exp.run(35)
    start('never stopped')
    longer = execute(recipe('The best weights at the end').replace('run(30)', 'run(35)'), names)
    longer['exp'].load()
    assert outcome(names) == outcome(longer)


def test_other_settings(start):
    code, names = recipe('Go on with other settings, on purpose'), start('allow')
    before = Path('digits/checkpoint.pth.tar').read_bytes()
    refused = re.sub(r', allow=\(.*?\)', '', code)
    with pytest.raises(ValueError) as error:
        execute(refused, names)
    for part in ('lr stored 0.001, given 0.0001', 'BatchSize', 'stored 32, given 64', 'allow='):
        assert part in str(error.value)
    assert Path('digits/checkpoint.pth.tar').read_bytes() == before
    with steps_counted() as steps:
        exp = execute(code, names)['exp']
    assert len(steps) == 5 * (1500 // 64) and steps[0].param_groups[0]['lr'] == 1e-4
    assert exp.history[:20] == names['exp'].history and exp.epoch == 25
    assert execute(refused, names)['exp'].epoch == 25, 'allow can go'


def test_early_stop(start, capsys):
    exp = execute(recipe('Stop early'), start('early'))['exp']
    losses = [val['loss'] for _, val in exp.history]
    assert exp.epoch < 100 and min(losses) == losses[-4], 'it ends three epochs after the best'
    assert f'Stopped after {exp.epoch} epochs' in capsys.readouterr().out


def test_schedules(start):
    names = execute(recipe('A schedule for the rate'), start('epochs'))
    assert names['cosine'].last_epoch == 10 and names['cosine'].get_last_lr() == [pytest.approx(0)]
    rates = []
    code = recipe('A schedule for the rate', 1).replace('cycle.step()', '(rates.append(cycle.get_last_lr()[0]), cycle.step())')
    names = execute(code, names | {'rates': rates})
    assert len(rates) == 10 * 46 == names['cycle'].last_epoch and max(rates) == pytest.approx(1e-2) and rates[-1] < 1e-6


def test_averaged_weights(start):
    weights = []
    names = start('averaged') | {'weights': weights, 'copy': copy}
    note = 'averaged.update_parameters(net)', '(averaged.update_parameters(net), weights.append(copy.deepcopy(net)))'

    moving = execute(recipe('Averaged weights').replace(*note), names)
    assert moving['averaged'].n_averaged == len(weights) == 10 * 46 and moving['right'] > 0.85
    expected = weights[0].state_dict()
    for net in weights[1:]:
        expected = {name: 0.99 * mean + 0.01 * net.state_dict()[name] for name, mean in expected.items()}
    torch.testing.assert_close(dict(moving['averaged'].module.state_dict()), expected, rtol=1e-3, atol=1e-4)

    weights.clear()
    start('swa')
    averaged = execute(SWA.replace(*note), names)['averaged']
    assert averaged.n_averaged == len(weights) == 10
    expected = {name: sum(net.state_dict()[name] for net in weights) / 10 for name in expected}
    torch.testing.assert_close(dict(averaged.module.state_dict()), expected)


def test_accumulated_batches(start):
    """Without dropout, and without a remainder at the end, they give what large batches give."""
    names = start('accumulated')

    class Plain(names['Classifier']):
        def __init__(self):
            super().__init__()
            self.layers[2] = torch.nn.Identity()

    names = names | {'Classifier': Plain, 'train_set': torch.utils.data.Subset(names['train_set'], range(46 * 32))}
    code = recipe('Larger batches than fit in memory')
    with steps_counted() as steps:
        parts = execute(code, names)['net']
    assert len(steps) == 5 * 46
    whole = execute(code.replace("'accumulated', 8", "'whole', 32").replace('batches_per_step=4', 'batches_per_step=1'), names)
    assert whole['exp'].batch_size == 32
    for a, b in zip(parts.parameters(), whole['net'].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_freezing(start):
    code, names = recipe('Freeze, train, thaw, train on'), start('frozen')
    torch.manual_seed(0)
    initial = plain(names['Classifier']().state_dict())
    half = execute(code.replace('run(8', 'run(4'), names)
    trained = plain(half['net'].state_dict())
    assert [name for name in initial if trained[name] == initial[name]] == ['layers.0.weight', 'layers.0.bias']
    whole = execute(code, names)
    thawed = plain(whole['net'].state_dict())
    assert all(thawed[name] != trained[name] for name in trained)
    assert [group['lr'] for group in whole['adam'].param_groups] == [1e-4, 1e-3]
    advised = re.search(r'\(README.*?, "(.*?)"', inspect.getsource(nt))[1]
    assert advised in CODE, 'an error message of nntools names this recipe'


def test_predictions(start):
    names = execute(recipe('Predictions with their targets'), start('predict'))
    labels, confusion = names['labels'][1500:], names['confusion']
    assert torch.equal(names['d'], labels) and torch.equal(confusion.sum(1), labels.bincount(minlength=10))
    assert confusion.trace() / 297 == pytest.approx(names['exp'].evaluate()['accuracy'])
    assert len(names['worst']) == 6 and names['worst'][0].shape == (8, 8)
    worst = (names['images'][1500:] == names['worst'][0].flatten()).all(1).nonzero()[0, 0]
    assert names['losses'][worst] == names['losses'].max()
    assert torch.equal(names['answers'], names['exp'].net(names['images'][:5]).argmax(1))


def test_several_optimizers(start):
    code, names = recipe('Several losses, several optimizers'), start('gan')
    with steps_counted() as steps:
        names = execute(code, names)
    assert len(steps) == 2 * 5 * 46 and steps[0] is names['other'] and steps[1] is names['adam']
    before = plain(names['net'].state_dict())
    assert names['exp'].evaluate() == names['exp'].history[-1][1]
    assert plain(names['net'].state_dict()) == before


def test_logs(start, logged):
    exp = execute(recipe('TensorBoard, CSV, pandas'), start('logged'))['exp']
    assert {name: value for name, value, epoch in logged if epoch == 5} == exp.table()[-1]
    assert [value for name, value, _ in logged if name == 'val_accuracy'] == [val['accuracy'] for _, val in exp.history]
    with open('logged/history.csv', newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == exp.table()


# --- what it names -------------------------------------------------------------------------------

def test_the_results_are_those_of_the_stored_scores():
    scores = du.read_scores(HERE / 'checkpoints' / 'scores.csv', 'test')
    table = [[cell.strip() for cell in row.split('|')[1:-1]] for row in README.splitlines() if row.startswith('| D') or row.startswith('| U')]
    rows = [row for row in table if len(row) == 8]
    names = 'dncnn', 'udncnn', 'dudncnn', 'dncnn_course', 'dncnn_14', 'dncnn_course_assignment', 'dncnn_400', 'udncnn_400', 'dudncnn_400'
    assert len(rows) == len(names)
    for name, row in zip(names, rows):
        values = scores[name]
        error = values.mean(axis=0).std(ddof=1) / values.shape[1] ** 0.5
        assert row[3] == f'{values.mean():.2f} ± {error:.2f}', row
        assert row[4] == ', '.join(f'{mean:.2f}' for mean in values.mean(axis=1)), row
        assert row[5] == f'{values[:, du.CBSD68].mean():.2f}', row
    others = {row[0]: row[2:] for row in table if len(row) == 4}
    assert len(others) == 3
    for name, means in others.items():
        values = scores[name.removesuffix('(6)').lower()]
        assert means == [f'{values.mean():.2f}', f'{values[:, du.CBSD68].mean():.2f}']
    prose = ' '.join(README.split())
    for ending, words in (
            ('', '0.21 dB ahead of DnCNN (95 % intervals: ± 0.02 over photographs, ± 0.01 over trainings), and UDnCNN '
                 '0.03 dB behind it (± 0.01, ± 0.01)'),
            ('_400', '0.19 dB (± 0.02, ± 0.01) ahead, and UDnCNN 0.04 dB behind (± 0.02, ± 0.01)')):
        differences = [du.difference_in_words(scores, first + ending, second + ending)
                       for first, second in (('dudncnn', 'dncnn'), ('dncnn', 'udncnn'))]
        number = r'\d\.\d\d'
        assert words in prose and re.findall(number, words) == re.findall(number, ' '.join(differences))


def test_cbsd68_is_68_of_the_test_photographs():
    """One is not in it, of the first 69 (the folder testsets/CBSD68 of cszn/IRCNN)."""
    names = sorted(name for name in du._manifest() if name.startswith('test/'))
    assert len(du.CBSD68) == 68 and {names[k] for k in range(69)} - {names[k] for k in du.CBSD68} == {'test/156065.jpg'}


def test_targets_of_make():
    makefile = (HERE / 'Makefile').read_text()
    prose = re.sub(r'^```.*?^```', '', README, flags=re.MULTILINE | re.DOTALL)
    code = ' '.join(re.findall(r'^    .*|`[^`]+`', prose, flags=re.MULTILINE))
    targets = set(re.findall(r'\bmake ([a-z]+)', code))
    assert len(targets) > 8
    assert [target for target in targets if not re.search(rf'^{target}:', makefile, re.MULTILINE)] == []


def test_links_and_files():
    links = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    anchors = [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in SECTIONS[::2]]
    assert len(set(anchors)) == len(anchors)
    assert [link for link in links if link.startswith('#') and link[1:] not in anchors] == []
    files = {link for link in links if not link.startswith('#')}
    files |= set(re.findall(r'`((?:tests/|\.ci/)?[\w.]+\.(?:py|ipynb|txt|toml|cfg))`', README))
    assert len(files) > 8
    assert [file for file in files if not (HERE / file).exists() and file != 'config.txt'] == []


def test_names_of_nntools():
    prose = README.split('## Use nntools', 1)[1]
    options = {field.name for field in dataclasses.fields(nt.Experiment)} | set(inspect.signature(nt.Experiment.run).parameters)
    for name in set(re.findall(r'`([a-z_]+)=', prose)):
        assert name in options, name
