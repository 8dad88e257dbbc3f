"""Part 2: the data set."""
import torch

import denoising_utils as du


def in_words(tensor):
    return 'x'.join(map(str, tensor.shape[1:]))


def test_a_crop_has_the_size_that_is_asked_for(folder):
    for size in ((64, 48), (40, 56)):
        noisy, clean = du.NoisyBSDSDataset(folder, 'train', size)[0]
        for name, image in (('clean', clean), ('noisy', noisy)):
            assert image.ndim == 3 and len(image) == 3, (
                f'{name} has the shape {tuple(image.shape)}, asked for (3, height, width)')
            assert image.shape[1:] == size, (
                f'{name} is {in_words(image)}, asked for {size[0]}x{size[1]}')


def test_values_are_from_minus_one_to_one(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (64, 64), sigma=0)
    clean = torch.stack([data[k % 2][1] for k in range(8)])
    assert clean.is_floating_point(), f'clean is of the type {clean.dtype}, asked for floats'
    low, high = clean.min().item(), clean.max().item()
    assert low < -0.9 and high > 0.9, f'values go from {low:.2f} to {high:.2f}, asked for -1 to 1'


def test_noise_has_the_level_that_is_asked_for(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (64, 64), sigma=20)
    noise = torch.stack([noisy - clean for noisy, clean in (data[k % 2] for k in range(8))])
    level = noise.std().item() * 255 / 2
    assert abs(level - 20) < 1, f'the noise is {level:.1f} of 255, asked for 20'
    assert abs(noise.mean().item()) < 0.02, 'the noise has a mean that is not 0'


def test_crops_come_from_everywhere(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (64, 48), sigma=0)
    tops = {round((data[0][1][0, 0, 0].item() + 1) * 127.5) for _ in range(400)}
    assert min(tops) == 0, f'no crop of 400 begins in the first row; the highest is row {min(tops)}'
    assert max(tops) == 32, f'of rows 0 to 32 that a crop can begin in, the last was {max(tops)}'


def test_the_test_set_stays_the_same(folder):
    data = du.NoisyBSDSDataset(folder, 'test', (64, 48))
    (noisy, clean), (noisy_again, clean_again) = data[1], data[1]
    assert torch.equal(clean, clean_again), 'a test crop is another at each access'
    assert torch.equal(noisy, noisy_again), 'the noise of a test image is another at each access'
