"""The recipe, and the program that trains by it."""
import dataclasses

import pytest
import torch
from PIL import Image

import denoising_utils as du
import nntools as nt
from programs import train

SMALL = {'D': 2, 'C': 4, 'size': 16}


@pytest.fixture
def larger(folder):
    """The photographs, large enough for validation, whose crops have 96 pixels."""
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((200, 190)).save(file)
    return folder


def words(recipe, photographs, out):
    """A command line: what differs from the defaults, and where."""
    options = ['--data', photographs, '--out', out]
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value != field.default:
            options += ['--' + field.name.replace('_', '-'), value]
    return [str(option) for option in options]


def test_training_twice_gives_the_same_weights_and_resumes(larger, tmp_path, capsys):
    recipe = du.Recipe(net='dudncnn', epochs=4, **SMALL)
    train.main(words(recipe, larger, tmp_path / 'a'))
    recipe.experiment(larger, tmp_path / 'b').run(2)  # interrupted
    train.main(words(recipe, larger, tmp_path / 'b'))
    a, b = (nt.load_checkpoint(tmp_path / name / 'checkpoint.pth.tar') for name in 'ab')
    assert a['History'] == b['History'] and len(a['History']) == 4
    assert all(torch.equal(a['Net'][name], b['Net'][name]) for name in a['Net'])
    assert a['Optimizer']['param_groups'][0]['lr'] < 3e-3 / 2  # the schedule went down
    assert 'Epoch 4/4' in capsys.readouterr().out


def test_a_longer_schedule_must_be_allowed(larger, tmp_path, capsys):
    recipe, out = du.Recipe(epochs=1, **SMALL), tmp_path / 'out'
    train.main(words(recipe, larger, out))
    train.main([*words(recipe, larger, out), '--sigma', '30'])  # which is the default
    longer = words(dataclasses.replace(recipe, epochs=2), larger, out)
    with pytest.raises(ValueError, match="lr_lambdas stored .*'epochs': 1.*, given .*'epochs': 2"):
        train.main(longer)
    train.main([*longer, '--allow', 'Scheduler'])
    assert 'Epoch 2/2' in capsys.readouterr().out


@pytest.mark.parametrize('options, problem', [
    ({'epochs': 0}, 'epochs must be 1 or more, got 0'),
    ({'net': 'unet'}, "the network must be one of .*, got 'unet'"),
    ({'hold_out': True}, 'hold_out needs the 200 training photographs of BSDS300, and .* has 6')])
def test_bad_options_of_a_recipe(larger, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        du.Recipe(**SMALL | options).experiment(larger, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_held_out_photographs_are_not_trained_on(larger, tmp_path, capsys, monkeypatch):
    for mode in ('train', 'test'):  # they are scored by their middle 320 pixels
        for file in (larger / mode).glob('*.png'):
            Image.open(file).resize((330, 340)).save(file)
    monkeypatch.setattr(du, 'HELD_OUT', range(0, 6, 3))
    recipe = du.Recipe(epochs=1, hold_out=True, **SMALL)
    train_set, val_set = recipe.data_sets(larger)
    assert {file.name for file in train_set.files} == {'1.png', '2.png', '4.png', '5.png'}
    assert {file.name for file in val_set.files} == {'0.png', '3.png'}
    train.main([*words(recipe, larger, tmp_path / 'out')[:-1], '--hold-out'])
    out = capsys.readouterr().out
    net, _ = du.load_network('dncnn', tmp_path / 'out')
    pairs = du.benchmark_pairs(larger, mode='train', subset=du.HELD_OUT)
    assert f'held out: {du.benchmark(net, pairs)["psnr"].mean():.3f} dB' in out


def test_every_option_of_the_recipe_is_one_of_the_program():
    recipe, args = train.parse([], du.Recipe, 'train', '')
    assert recipe == du.Recipe() and str(args.out) == 'experiments/dncnn'
    given = du.Recipe(net='udncnn', D=4, C=8, batch_norm='none', he_init=False, zero_last=False,
                      sigma=25, epochs=3, crops=1, size=32, batch_size=2, augment=False, lr=1e-3,
                      warm_up=0.2, constant_rate=True, grad_clip=float('inf'), precision='float32',
                      seed=5, hold_out=True)
    typed = ('--net udncnn --D 4 --C 8 --batch-norm none --no-he-init --no-zero-last --sigma 25.0 '
             '--epochs 3 --crops 1 --size 32 --batch-size 2 --no-augment --lr 1e-3 --warm-up 0.2 '
             '--constant-rate --grad-clip inf --precision float32 --seed 5 --hold-out')
    assert train.parse(typed.split(), du.Recipe, 'train', '')[0] == given
    assert all(getattr(given, field.name) != field.default for field in dataclasses.fields(given))


@pytest.mark.parametrize('epochs, warm_up', [(200, 0.1), (89, 0.1), (5, 0)])
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(epochs, warm_up):
    rates = [du.Cosine(epochs, warm_up)(k) for k in range(epochs)]
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:])[::-1]
    assert top <= max(1, warm_up * epochs) and 0.9 < max(rates) <= 1
    assert rates[-1] < 0.1 or epochs < 10
