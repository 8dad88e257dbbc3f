"""The training of the blind network: levels of noise, clipping, jitter, and where it starts."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import denoising_utils as du
from programs import train_blind
from programs.train_blind import BlindBSDSDataset, BlindRecipe


@pytest.mark.parametrize('mode, seed', [('train', None), ('train', 3), ('test', None)])
def test_levels_of_a_range(folder, mode, seed):
    """Each sample has a level of its own, uniform between the two; a seed keeps them."""
    data = BlindBSDSDataset(folder, mode, (48, 48), sigma=(10, 50), seed=seed, crops=80)
    torch.manual_seed(0)
    noises = [noisy - clean for noisy, clean in data]
    levels = np.array([noise.std().item() * 127.5 for noise in noises])
    assert 9 < levels.min() < 13 and 47 < levels.max() < 53 and abs(levels.mean() - 30) < 3
    again = data[7][0] - data[7][1]
    assert torch.equal(again, noises[7]) == (mode == 'test' or seed is not None)
    assert 'sigma=(10, 50)' in repr(data)


@pytest.mark.parametrize('clip', [0, 0.5, True])
def test_a_share_of_the_samples_is_as_8_bit_files(folder, clip):
    options = {'image_size': (48, 48), 'sigma': (50, 50), 'crops': 60}
    data = BlindBSDSDataset(folder, 'test', clip=clip, **options)
    values = [(noisy + 1) * 127.5 for noisy, _ in data]
    clipped = []
    for v in values:
        whole = (v - v.round()).abs().max() < 1e-3
        clipped.append((v.min() >= 0 and v.max() <= 255 and whole).item())
    assert np.mean(clipped) == pytest.approx(float(clip), abs=0.1 * (clip == 0.5))
    if clip is True:
        noisy, _ = data[4]
        unclipped, _ = BlindBSDSDataset(folder, 'test', **options)[4]
        torch.testing.assert_close(noisy, unclipped.clamp(-1, 1), atol=1.01 / 255, rtol=0)


def test_jitter_changes_half_of_the_samples(folder):
    colours = np.zeros((64, 48, 3), np.uint8) + np.array([200, 120, 40], np.uint8)
    colours[::2] //= 2  # stripes, which a reduction in size blurs
    Image.fromarray(colours).save(folder / 'train' / '0.png')
    data = BlindBSDSDataset(folder, 'train', (24, 16), (20, 20), seed=0, subset=[0], crops=400,
                            jitter=True)
    pairs = [data[k] for k in range(400)]
    original = torch.from_numpy(colours).unique() / 127.5 - 1
    unchanged = [torch.equal(clean.unique(), original) for _, clean in pairs]
    assert np.mean(unchanged) == pytest.approx(0.5, abs=0.08)
    changed = [pair for pair, same in zip(pairs, unchanged) if not same]

    def is_grey(image):
        return all(torch.allclose(image[0], image[k], atol=1e-4) for k in (1, 2))

    grey = [(noisy, clean) for noisy, clean in changed if is_grey(clean)]
    assert 0.15 < len(grey) / len(changed) < 0.35
    assert all(is_grey(noisy) for noisy, _ in grey)
    assert all(clean.shape == (3, 24, 16) and clean.abs().max() <= 1 for _, clean in changed)
    assert {int(clean.mean((1, 2)).argmax()) for _, clean in changed} == {0, 1, 2}
    stripes = [clean.std(1).mean() / clean.std() for _, clean in changed]
    assert min(stripes) < 0.5 * max(stripes)
    assert 'jitter=True' in repr(data)


@pytest.mark.parametrize('options, words', [
    ({'sigma': (30, 10)}, r'got \(30, 10\)'),
    ({'sigma': (0, 10, 20)}, r'got \(0, 10, 20\)'),
    ({'sigma': (0, math.inf)}, r'sigma must be \(lowest, highest\), 0 or more'),
    ({'clip': 1.5}, 'clip must be a share of the samples, 0 to 1, got 1.5')])
def test_bad_noise_of_the_blind_data_set(folder, options, words):
    with pytest.raises(ValueError, match=words):
        BlindBSDSDataset(folder, 'train', 32, **options)


def test_it_starts_from_the_network_that_is_named(folder, tmp_path, capsys, monkeypatch):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((200, 190)).save(file)
    first = du.Recipe(D=2, C=4, size=16, epochs=1, batch_norm='course')
    first.experiment(folder, tmp_path / 'dncnn').run(1)
    trained, _ = du.load_network('dncnn', tmp_path / 'dncnn')
    assert trained.bn[0].eps == 4
    with pytest.raises(RuntimeError, match='holds a DnCNN, not a DUDnCNN'):
        du.load_network('dudncnn', tmp_path / 'dncnn')

    words = ['--data', str(folder), '--start', str(tmp_path / 'dncnn'), '--epochs', '1',
             '--crops', '1', '--size', '16', '--out', str(tmp_path / 'next')]
    with pytest.raises(ValueError, match='start .*dncnn holds a DnCNN: name it with --net'):
        train_blind.main([*words, '--net', 'udncnn'])
    options = {'net': 'dncnn', 'start': str(tmp_path / 'dncnn'), 'size': 16}
    whole = BlindRecipe(batch_norm='course', **options).network()
    assert whole.bn[0].eps == 4 and torch.equal(whole.conv[0].weight, trained.conv[0].weight)
    folded = BlindRecipe(**options).network()
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(folded.eval()(x), trained(x))

    train_blind.main([*words, '--net', 'dncnn', '--sigma', '0', '40'])
    assert 'Epoch 1/1' in capsys.readouterr().out
    config = (tmp_path / 'next' / 'config.txt').read_text()
    assert 'BlindBSDSDataset' in config and 'sigma=(0, 40)' in config and 'clip=0.5' in config
