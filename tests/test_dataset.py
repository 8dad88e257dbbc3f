"""The noisy data set: crops, noise, what is fixed, and what is refused."""
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import denoising_utils as du
import nntools as nt


@settings(max_examples=30)
@given(height=st.integers(1, 48), width=st.integers(1, 48), mode=st.sampled_from(['train', 'test']))
def test_image_size_is_respected_for_both_orientations(height, width, mode):
    data = samples(mode, (height, width))
    for k in range(len(data)):
        noisy, clean = data[k]
        assert noisy.shape == clean.shape == (3, height, width)
        assert -1 <= clean.min() and clean.max() <= 1


def samples(mode, image_size, **options):
    """A data set over images in memory of 48x64 and 64x48 pixels."""
    if not hasattr(samples, 'folder'):
        import tempfile
        from pathlib import Path
        samples.folder = tempfile.TemporaryDirectory()
        for sub in ('train', 'test'):
            (Path(samples.folder.name) / sub).mkdir()
            for k, size in enumerate(((48, 64), (64, 48))):
                ramp = np.add.outer(np.arange(size[0]), 3 * np.arange(size[1])) % 256
                Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)).save(
                    Path(samples.folder.name) / sub / f'{k}.png')
    return du.NoisyBSDSDataset(samples.folder.name, mode, image_size, **options)


def test_crops_come_from_everywhere_in_the_photograph(folder):
    """Corners are drawn for the crop that is taken: all rows and columns are reached."""
    rows, columns = np.mgrid[:64, :48].astype(np.uint8)
    Image.fromarray(np.stack([rows, columns, 0 * rows], 2)).save(folder / 'train' / '0.png')
    data = du.NoisyBSDSDataset(folder, 'train', (40, 40), sigma=0, subset=[0])
    corners = ((data[0][1][:2, 0, 0] + 1) * 127.5 for _ in range(600))
    tops, lefts = zip(*(corner.round().int().tolist() for corner in corners))
    assert set(tops) == set(range(64 - 40 + 1))
    assert set(lefts) == set(range(48 - 40 + 1))


def test_a_crop_as_large_as_the_photograph(folder):
    data = du.NoisyBSDSDataset(folder, 'test', (64, 48), sigma=0, subset=[0, 2])
    assert torch.equal(data[0][1], du.read_photograph(folder / 'test' / '0.png') / 127.5 - 1)


def test_noise_has_the_standard_deviation_asked_for(folder):
    data = du.NoisyBSDSDataset(folder, 'test', (48, 48), sigma=50)
    noise = torch.stack([noisy - clean for noisy, clean in (data[k] for k in range(3))])
    assert noise.std().item() == pytest.approx(2 * 50 / 255, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_test_items_are_fixed_and_training_items_are_not(folder):
    test, train = (du.NoisyBSDSDataset(folder, mode, (32, 32)) for mode in ('test', 'train'))
    assert all(torch.equal(a, b) for a, b in zip(test[1], test[1]))
    assert not torch.equal(test[0][0] - test[0][1], test[1][0] - test[1][1])
    assert not torch.equal(train[1][0], train[1][0])
    assert not torch.equal(test[1][0], du.NoisyBSDSDataset(folder, 'test', (32, 32), seed=1)[1][0])
    torch.manual_seed(5)
    first = train[1]
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, train[1]))


def test_evaluation_is_the_same_on_any_number_of_workers(folder, tmp_path):
    net = du.DnCNN(1, C=4)
    summaries = []
    for workers in (0, 1, 2):
        data = du.NoisyBSDSDataset(folder, 'test', (32, 32))
        exp = nt.Experiment(net, data, data, torch.optim.Adam(net.parameters()),
                            du.DenoisingStatsManager(),
                            output_dir=tmp_path / f'w{workers}', batch_size=2, num_workers=workers)
        summaries += [exp.evaluate(), exp.evaluate()]
    assert all(summary == summaries[0] for summary in summaries)


def test_augmentation_gives_all_eight_flips_and_turns(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (48, 48), sigma=0, augment=True, subset=[0])
    seen = {data[0][1].numpy().tobytes() for _ in range(1500)}
    assert len(seen) == 8 * 17  # every row that the crop can start at


def test_cache_off_gives_the_same_items(folder):
    on, off = (du.NoisyBSDSDataset(folder, 'test', (32, 32), cache=cache)
               for cache in (True, False))
    assert off.images is None
    assert all(torch.equal(on[k][0], off[k][0]) for k in range(3))


def test_repr_tells_what_identifies_the_data_but_no_path(folder):
    text = repr(du.NoisyBSDSDataset(folder, 'train', (32, 40), 25, subset=range(4), crops=3,
                                    augment=True))
    assert str(folder) not in text
    for part in ('train', '(32, 40)', 'sigma=25', 'photographs=4', 'range(0, 4)', 'crops=3',
                 'augment'):
        assert part in text


def test_files_are_sorted_and_crops_repeat_them(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (32, 32), crops=2)
    assert [file.name for file in data.files] == [f'{k}.png' for k in range(6)]
    assert len(data) == 12 and len(list(data)) == 12


@pytest.mark.parametrize('options, error, words', [
    (dict(mode='validation'), ValueError, "'train' or 'test', got 'validation'"),
    (dict(sigma=-1), ValueError, 'sigma must be a number, 0 or more, got -1'),
    (dict(sigma=(10, 30)), ValueError, 'sigma must be a number, 0 or more, got (10, 30)'),
    (dict(sigma=math.nan), ValueError, 'sigma'),
    (dict(image_size=(65, 32)), ValueError, '1.png has 48x64 pixels, less than image_size 65x32'),
    (dict(image_size=(0, 5)), ValueError, 'image_size must be (height, width)'),
    (dict(image_size=(5.5, 5)), ValueError, 'image_size'),
    (dict(crops=0), ValueError, 'crops must be'),
    (dict(subset=[0, 5]), ValueError, 'subset must be positions from 0 to 4'),
    (dict(subset=[]), ValueError, 'subset must be positions from 0 to 4 '),
])
def test_bad_arguments_of_the_data_set(folder, options, error, words):
    (folder / 'train' / '0.png').unlink()
    with pytest.raises(error, match='(?s)' + __import__('re').escape(words)):
        du.NoisyBSDSDataset(folder, **{'image_size': (32, 32), **options})


def test_bad_folders_and_files(folder):
    with pytest.raises(FileNotFoundError, match='there is no folder .*nowhere'):
        du.NoisyBSDSDataset(folder / 'nowhere')
    (folder / 'train' / 'torn.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.raises(ValueError, match='torn.jpg is not a readable image'):
        du.NoisyBSDSDataset(folder, 'train', (32, 32))
    shutil.rmtree(folder / 'test')
    (folder / 'test').mkdir()
    with pytest.raises(FileNotFoundError, match='no image in'):
        du.NoisyBSDSDataset(folder, 'test', (32, 32))
    with pytest.raises(IndexError):
        samples('test', (8, 8))[2]


def test_16_bits_and_a_subset_that_is_a_generator(folder):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(folder / 'train' / '0.png')
    data = du.NoisyBSDSDataset(folder, 'train', 64, 0, subset=(k for k in [0]))
    difference = data[0][1] - torch.from_numpy(ramp / 65535 * 2 - 1)
    assert len(data) == 1 and difference.abs().max() < 1 / 127
