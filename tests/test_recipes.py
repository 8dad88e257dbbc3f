"""The programs in README.md and docs/nntools.md do what they claim, also when interrupted."""
import contextlib
import copy
import csv
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

import nntools as nt

HERE = Path(__file__).resolve().parents[1]


def snippets(page):
    """The Python code on a page: a dict of heading to a list of snippets."""
    text = (HERE / page).read_text(encoding='utf-8')
    _, *sections = re.split(r'^##+ (.*)\n', text, flags=re.MULTILINE)
    found = {}
    for title, section in zip(sections[::2], sections[1::2]):
        codes = re.findall(r'^```python\n(.*?)^```', section, re.MULTILINE | re.DOTALL)
        if codes:
            found[title] = codes
    return found


(PROGRAM,) = snippets('README.md')['nntools']
RECIPES = snippets('docs/nntools.md')


def recipe(title, number=0):
    return RECIPES[title][number]


def replaced(code, old, new):
    """The code with another text in it. The text must be there."""
    assert old in code
    return code.replace(old, new)


def sentence(pattern):
    """The match with a sentence of the page."""
    page = (HERE / 'docs/nntools.md').read_text(encoding='utf-8')
    return re.search(pattern, ' '.join(page.split()))


def variants():
    """What the page describes in sentences: a dict of name to code."""
    averaged = recipe('Averaged weights')
    condition = sentence(r'update where `(.*?)`')[1]
    plain_mean = replaced(averaged, 'multi_avg_fn=get_ema_multi_avg_fn(0.99),', '')
    plain_mean = replaced(plain_mean, 'loss: averaged.', f'loss: {condition} and averaged.')

    plain_validation = replaced(averaged, 'exp = Averaging(', 'exp = nt.Experiment(')
    plain_validation += f'summary = {sentence("and `([^`]*)` is of the average")[1]}\n'

    options = "best_by='accuracy', best_mode='max', also_save="
    best_average = replaced(averaged, 'also_save=', options) + 'exp.load_best()\n'

    large_batches = replaced(PROGRAM, *sentence('Replace `(.*?)` by `(.*?)`').groups())
    large_batches = replaced(large_batches, 'num_epochs=20', 'num_epochs=5')
    return {'SWA': plain_mean, 'plain validation': plain_validation,
            'best average': best_average, 'large batches': large_batches}


VARIANTS = variants()


def trainings():
    """Every snippet that trains, each with the name that pytest shows."""
    described = {name: [code] for name, code in VARIANTS.items()}
    found = []
    for title, codes in {'program': [PROGRAM], **RECIPES, **described}.items():
        for k, code in enumerate(codes):
            if 'exp.run(' in code:
                found.append(pytest.param(code, id=f'{title} {k}'))
    return found


torch.set_num_threads(1)


def execute(code, names):
    """Runs a snippet with the names of the program, as a new process would. Returns all names."""
    names = {'__name__': 'digits'} | names
    torch.manual_seed(0)
    exec(compile(code, 'snippet', 'exec'), names)
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
    """``start(name)`` enters a new folder where only the program has run, and returns its names."""
    names, written = program

    def enter(name):
        folder = tmp_path / name
        shutil.copytree(written, folder / 'digits')
        monkeypatch.chdir(folder)
        return names

    return enter


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """What a stand-in for TensorBoard is told: a list of (name, value, epoch)."""
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, epoch):
            scalars.append((name, value, epoch))

    tensorboard = types.ModuleType('torch.utils.tensorboard')
    tensorboard.SummaryWriter = SummaryWriter
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
    saved = [plain(nt.load_checkpoint(path)) for path in (exp.checkpoint_path, exp.best_path)
             if os.path.exists(path)]
    return saved + [plain(exp.net.state_dict())]


# --- every training ------------------------------------------------------------------------------

@pytest.mark.parametrize('code', trainings())
def test_an_interrupted_training_ends_with_the_same_bits(code, start, capsys):
    def enter(name):
        names = start(name)
        if "output_dir='digits'" in code:
            shutil.rmtree('digits')
        return names

    first = enter('uninterrupted')
    with steps_counted() as steps:
        names = execute(code, first)
    expected = outcome(names)
    half, fifth = names['exp'].epoch // 2, len(steps) // 5

    # Interrupted, and started again for half of the epochs.
    enter('interrupted')
    with steps_counted(interrupt_at=fifth), pytest.raises(KeyboardInterrupt):
        execute(code, first)
    execute(re.sub(r'(exp\.run\(\D*)\d+', rf'\g<1>{half}', code), first)

    # A new program finds these, is interrupted too, and goes on, as in a notebook.
    capsys.readouterr()
    building, running = code.split('exp.run(')
    names = execute(building, first)
    with steps_counted(interrupt_at=fifth), pytest.raises(KeyboardInterrupt):
        exec(f'exp.run({running}', names)
    assert 'from epoch 0' not in capsys.readouterr().out
    exec(f'exp.run({running}', names)
    assert outcome(names) == expected

    with steps_counted() as more:
        assert outcome(execute(code, first)) == expected
    assert not more, 'nothing was left to train'


# --- the program ---------------------------------------------------------------------------------

def test_the_program(program, start, capsys):
    names, _ = program
    exp = names['exp']
    y = torch.cat([exp.net.eval()(x[None]) for x, _ in names['val_set']])
    expected = (y.argmax(1) == names['labels'][1500:]).float().mean().item()
    assert exp.evaluate()['accuracy'] == pytest.approx(expected)
    assert expected > 0.85
    assert len(exp.history) == 20
    assert exp.history[-1][1] == exp.evaluate()

    start('again')
    again = execute(PROGRAM, {})
    assert 'Epoch' not in capsys.readouterr().out, 'the second run should find its checkpoint'
    assert again['exp'].evaluate() == exp.evaluate()
    again['exp'].run(num_epochs=30)
    start('never stopped')
    shutil.rmtree('digits')
    longer = execute(replaced(PROGRAM, 'num_epochs=20', 'num_epochs=30'), {})
    assert outcome(again) == outcome(longer)


# PyTorch issue 139990
@pytest.mark.skipif(sys.platform == 'win32', reason='the wheels for Windows lack libuv')
def test_the_program_under_torchrun(tmp_path):
    (tmp_path / 'digits.py').write_text(replaced(PROGRAM, 'num_epochs=20', 'num_epochs=5'))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               '--nproc-per-node', '2', 'digits.py']
    environment = os.environ | {'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Epoch 5/5: ') == 1
    printed = re.findall(r'\{.*?\}', done.stdout)  # by both processes
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert float(re.search(r"'accuracy': ([\d.]+)", printed[0])[1]) > 0.8


# --- the recipes ---------------------------------------------------------------------------------

def accuracy_of(y, d):
    return (y.argmax(1) == d).float().mean().item()


def test_stop_early_with_the_best_weights(start, capsys):
    code, names = recipe('Stop early, with the best weights'), start('best')
    with pytest.raises(ValueError, match='best_mode'):
        execute(replaced(code, ", best_mode='max'", ''), names)
    exp = execute(code, names)['exp']
    values = [val['accuracy'] for _, val in exp.history]
    assert exp.epoch < 100
    assert f'Stopped after {exp.epoch} epochs' in capsys.readouterr().out
    assert exp.best == (exp.epoch - 5, max(values))
    assert exp.evaluate()['accuracy'] == max(values) != values[-1]

    exp.load()
    exp.run(exp.epoch + 3)
    start('never stopped')
    longer = execute(replaced(code, 'run(100, patience)', f'run({exp.epoch})'), names)['exp']
    longer.load()
    assert outcome({'exp': exp}) == outcome({'exp': longer})


def test_two_callbacks(start):
    logged = []
    names = start('two') | {'log': lambda exp: logged.append(exp.epoch)}
    call = sentence(r'two callbacks, as in `(.*?)`')[1]
    code = recipe('Stop early, with the best weights')
    exp = execute(replaced(code, 'exp.run(100, patience)', call), names)['exp']
    assert logged == list(range(exp.epoch + 1))
    assert exp.epoch < 100, 'the other one has stopped it'


def test_a_schedule_of_epochs(start):
    names = execute(recipe('A schedule for the rate'), start('epochs'))
    assert names['cosine'].last_epoch == 10
    assert names['cosine'].get_last_lr() == [pytest.approx(0)]


def test_a_schedule_of_batches(start):
    rates = []
    code = replaced(recipe('A schedule for the rate', 1), 'cycle.step()',
                    '(rates.append(cycle.get_last_lr()[0]), cycle.step())')
    names = execute(code, start('batches') | {'rates': rates})
    assert len(rates) == 10 * 46 == names['cycle'].last_epoch
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-6


def weights_kept(code):
    """The code of averaged weights, which now keeps the networks it averages in ``weights``."""
    update = 'averaged.update_parameters(net)'
    return replaced(code, update, f'({update}, weights.append(copy.deepcopy(net)))')


def averages(states, share):
    """The moving average of states, which begins with the first one."""
    mean = states[0]
    for state in states[1:]:
        mean = {name: (1 - share) * value + share * state[name] for name, value in mean.items()}
    return mean


def test_moving_average_of_the_weights(start):
    weights = []
    names = start('averaged') | {'weights': weights, 'copy': copy}
    names = execute(weights_kept(recipe('Averaged weights')), names)
    exp, averaged = names['exp'], names['averaged']
    assert averaged.n_averaged == len(weights) == 10 * 46
    expected = averages([net.state_dict() for net in weights], share=0.01)
    found = dict(averaged.module.state_dict())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    # It is what is validated.
    right = accuracy_of(averaged.module.eval()(names['images'][1500:]), names['labels'][1500:])
    assert right > 0.85
    assert exp.history[-1][1]['accuracy'] == exp.evaluate()['accuracy'] == pytest.approx(right)


def test_average_beside_a_validation_of_the_network(start):
    names = execute(VARIANTS['plain validation'], start('plain'))
    images, labels = names['images'][1500:], names['labels'][1500:]
    of_both = [accuracy_of(net.eval()(images), labels)
               for net in (names['net'], names['averaged'].module)]
    validated = names['exp'].history[-1][1]['accuracy']
    assert [validated, names['summary']['accuracy']] == pytest.approx(of_both)
    assert of_both[0] != of_both[1], 'or this test shows nothing'


def test_best_epoch_of_the_average(start):
    names = execute(VARIANTS['best average'], start('best average'))
    exp, averaged = names['exp'], names['averaged']
    epoch, value = exp.best
    assert value == max(val['accuracy'] for _, val in exp.history)
    assert exp.evaluate()['accuracy'] == value
    stored = nt.load_checkpoint(exp.best_path)
    assert len(stored['History']) == epoch < 10, 'or this test shows nothing'
    assert plain(averaged.state_dict()) == plain(stored['averaged'])
    assert plain(names['net'].state_dict()) == plain(stored['Net'])


@pytest.mark.parametrize('averages_buffers', [True, False])
def test_average_with_batch_norm(start, averages_buffers):
    names = start('norm')

    class Normed(names['Classifier']):
        def __init__(self):
            super().__init__()
            self.layers.insert(1, torch.nn.BatchNorm1d(64))

    weights = []
    names = names | {'Classifier': Normed, 'weights': weights, 'copy': copy}
    code = weights_kept(recipe('Averaged weights'))
    code = replaced(code, 'use_buffers=True', f'use_buffers={averages_buffers}')
    averaged = execute(replaced(code, 'run(10', 'run(1'), names)['averaged']
    means = [{'mean': net.layers[1].running_mean} for net in weights]
    expected = averages(means, share=0.01) if averages_buffers else means[-1]
    torch.testing.assert_close(averaged.module.layers[1].running_mean, expected['mean'])


def test_plain_average_of_the_weights(start):
    weights = []
    names = start('swa') | {'weights': weights, 'copy': copy}
    averaged = execute(weights_kept(VARIANTS['SWA']), names)['averaged']
    assert averaged.n_averaged == len(weights) == 10

    states = [net.state_dict() for net in weights]
    expected = {name: sum(state[name] for state in states) / 10 for name in states[0]}
    torch.testing.assert_close(dict(averaged.module.state_dict()), expected)


def test_accumulated_batches(start):
    """Without dropout, and without a remainder at the end, they give what large batches give."""
    start('accumulated')
    shutil.rmtree('digits')
    code = replaced(VARIANTS['large batches'], 'Dropout(0.2)', 'Identity()')
    code = replaced(code, 'images[:1500], labels[:1500]', 'images[:46 * 32], labels[:46 * 32]')
    code = replaced(code, 'Adam(net.parameters(), lr=1e-3)', 'SGD(net.parameters(), lr=0.1)')
    with steps_counted() as steps:
        parts = execute(code, {})['net']
    assert len(steps) == 5 * 46

    code = replaced(code, 'batch_size=8, batches_per_step=4', 'batch_size=32')
    whole = execute(replaced(code, "'digits'", "'whole'"), {})['net']
    for a, b in zip(parts.parameters(), whole.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_samplers(start, capsys):
    """Half of the images are zeros, yet each digit is drawn equally often."""
    names = start('sampler')
    zeros = (names['labels'][:1500] == 0).nonzero().flatten()
    chosen = torch.cat([torch.arange(750), zeros.repeat(6)[:750], torch.arange(1500, 1797)])
    images, labels = names['images'][chosen], names['labels'][chosen]
    train_set = torch.utils.data.TensorDataset(images[:1500], labels[:1500])
    assert labels[:1500].bincount()[0] > 750

    names = names | {'images': images, 'labels': labels, 'train_set': train_set}
    names = execute(recipe('Samplers'), names)
    assert 'used as it is' not in capsys.readouterr().out, 'there is nothing that it ignores'
    drawn = torch.cat([d for _ in range(10) for _, d in names['loader']])
    assert len(drawn) == 10 * 46 * 32
    shares = drawn.bincount(minlength=10) / len(drawn)
    torch.testing.assert_close(shares, torch.full([10], 0.1), rtol=0, atol=0.02)


def test_freezing(start):
    code, names = recipe('Freeze, train, thaw, train on'), start('frozen')
    torch.manual_seed(0)
    initial = plain(names['Classifier']().state_dict())
    half = execute(replaced(code, 'run(8', 'run(4'), names)
    trained = plain(half['net'].state_dict())
    frozen = [name for name in initial if trained[name] == initial[name]]
    assert frozen == ['layers.0.weight', 'layers.0.bias']

    whole = execute(code, names)
    thawed = plain(whole['net'].state_dict())
    assert all(thawed[name] != trained[name] for name in trained)
    assert [group['lr'] for group in whole['adam'].param_groups] == [1e-4, 1e-3]


def test_predictions(start):
    names = execute(recipe('Predictions with their targets'), start('predict'))
    exp, confusion = names['exp'], names['confusion']
    images, labels = names['images'][1500:], names['labels'][1500:]
    assert torch.equal(names['d'], labels)
    assert torch.equal(confusion.sum(1), labels.bincount(minlength=10))
    assert confusion.trace() / 297 == pytest.approx(exp.evaluate()['accuracy'])

    assert [image.shape for image in names['worst']] == 6 * [(8, 8)]
    worst = (images == names['worst'][0].flatten()).all(1).nonzero()[0, 0]
    assert names['losses'][worst] == names['losses'].max()
    assert torch.equal(names['answers'], exp.net(names['images'][:5]).argmax(1))


def test_batches_that_are_not_pairs(start):
    names = execute(recipe('Batches that are not pairs'), start('coded'))
    exp, images = names['exp'], names['images']
    assert exp.history[4] < exp.history[0]
    expected = torch.nn.functional.mse_loss(exp.net(images[1500:]), images[1500:]).item()
    assert exp.evaluate() == exp.history[4][1] == pytest.approx(expected)


def test_several_optimizers(start):
    names = start('gan')
    with steps_counted() as steps:
        names = execute(recipe('Several losses, several optimizers'), names)
    assert len(steps) == 2 * 5 * 46
    assert steps[0] is names['other']
    assert steps[1] is names['adam']
    before = plain(names['net'].state_dict())
    assert names['exp'].evaluate() == names['exp'].history[-1][1]
    assert plain(names['net'].state_dict()) == before


def test_logs(start, logged):
    exp = execute(recipe('TensorBoard, CSV, pandas'), start('logged'))['exp']
    assert {name: value for name, value, epoch in logged if epoch == 5} == exp.table()[-1]
    accuracies = [value for name, value, _ in logged if name == 'val_accuracy']
    assert accuracies == [val['accuracy'] for _, val in exp.history]
    with open('logged/history.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    numbers = [{name: float(value) for name, value in row.items()} for row in rows]
    assert numbers == exp.table()


def test_other_settings(start):
    code, names = recipe('Go on with other settings'), start('allow')
    before = Path('digits/checkpoint.pth.tar').read_bytes()
    allow = re.search(r',\s+(allow=\(.*?\))', code)
    refused = code.replace(allow[0], '')
    with pytest.raises(ValueError) as error:
        execute(refused, names)
    for part in ('p=0.2', 'lr stored 0.001, given 0.0001', 'stored 32, given 64', allow[1]):
        assert part in str(error.value)

    # It begins with the weights that it had, and replaces the checkpoint when it has trained.
    given = execute(replaced(code, 'run(25)', 'run(20)'), names)
    assert given['exp'].evaluate() == pytest.approx(names['exp'].evaluate())
    assert given['adam'].state[given['net'].layers[0].weight]['step'] == 20 * 46
    assert Path('digits/checkpoint.pth.tar').read_bytes() == before
    with steps_counted() as steps:
        exp = execute(code, names)['exp']
    assert len(steps) == 5 * (1500 // 64)
    assert steps[0].param_groups[0]['lr'] == 1e-4
    assert exp.history[:20] == names['exp'].history
    assert exp.epoch == 25
    assert Path('digits', sentence('is kept as `(.*?)`')[1]).read_bytes() == before
    assert execute(refused, names)['exp'].epoch == 25, 'allow can go'
