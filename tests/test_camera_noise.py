"""Noise as cameras make it, and the data set and the training with it."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import denoising_utils as du
from programs import camera, train_photo
from programs.camera import Camera, camera_noise, compress, photographed, smooth_noise
from programs.train_photo import OneKindBSDSDataset, PhotoBSDSDataset, relative_error


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def neighbours(noise):
    """The correlation of horizontal neighbours."""
    return ((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()).item()


@pytest.mark.parametrize('seed', range(5))
def test_what_a_camera_develops_is_the_photograph(seed):
    image = torch.rand(3, 8, 8, generator=seeded()) * 0.5 + 0.2
    grey = torch.full((3, 8, 8), 0.4)
    one = Camera.draw(seeded(seed))
    light = one.to_sensor(grey)
    torch.testing.assert_close(one.develop(light), grey, atol=1e-4, rtol=0)
    assert light.min() < light.max()  # the sensor sees grey in other colours
    known = one.develop(one.to_sensor(image))
    torch.testing.assert_close(one.develop(one.to_sensor(known)), known, atol=1e-4, rtol=0)


def test_more_light_has_more_noise_of_the_sensor():
    dark, light = torch.full((3, 64, 64), 0.05), torch.full((3, 64, 64), 0.8)
    spreads = [(camera.sensor_noise(image, seeded()) - image).std() for image in (dark, light)]
    assert spreads[1] > 1.5 * spreads[0]


@pytest.mark.parametrize('value', [0.0, 0.5, 1.0])
def test_noise_at_the_ends_of_the_scale(value):
    """Black and white have no derivative of a power, nor a logarithm: still numbers come out."""
    for seed in range(10):
        noise = camera_noise(torch.full((3, 24, 32), value), seeded(seed))
        assert noise.shape == (3, 24, 32) and noise.isfinite().all()


def test_neighbours_share_the_noise_of_a_camera():
    clean = torch.full((3, 96, 96), 0.5)
    shares = [neighbours(camera_noise(clean, seeded(seed))) for seed in range(12)]
    assert min(shares) > 0.2
    white = [neighbours(smooth_noise(clean, seeded(seed))) for seed in range(12)]
    assert min(white) < 0.05 < 0.3 < max(white)


def test_a_mosaic_keeps_flat_colours_and_mixes_others():
    flat = torch.tensor([0.2, 0.5, 0.8])[:, None, None].expand(3, 10, 12).clone()
    torch.testing.assert_close(camera.mosaic(flat), flat)
    assert neighbours(camera.mosaic(torch.randn(3, 64, 64, generator=seeded()))) > 0.3


def test_blocks_of_jpeg_begin_where_they_are_told():
    """Between blocks are jumps: with a corner they lie elsewhere."""
    image = torch.rand(3, 64, 64, generator=seeded()) * 0.2 + 0.4

    def jumps(corner):
        values = compress(image, 10, 0, corner)
        assert values.shape == image.shape
        return (values[..., 1:] - values[..., :-1]).abs().mean((0, 1))

    assert jumps((0, 0))[7::8].mean() > 1.3 * jumps((0, 0))[3::8].mean()
    assert jumps((0, 4))[3::8].mean() > 1.3 * jumps((0, 4))[7::8].mean()


def test_the_same_generator_gives_the_same_file():
    clean = torch.rand(3, 32, 40, generator=seeded())
    first, again, other = (photographed(clean, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(first * 255, (first * 255).round(), atol=1e-3)
    assert 0 <= first.min() and first.max() <= 1


def test_what_the_samples_of_the_data_set_are(folder):
    """Half with white noise as the blind network's, one in sixteen without any."""
    grey = np.full((64, 48, 3), 128, np.uint8)
    Image.fromarray(grey).save(folder / 'train' / '0.png')
    data = PhotoBSDSDataset(folder, 'train', 32, (20, 20), seed=0, subset=[0], crops=400)
    noises = [noisy - clean for noisy, clean in data]
    clean = [noise.abs().max() < 1e-6 for noise in noises]
    assert np.mean(clean) == pytest.approx(1 / 16, abs=0.04)
    white = [abs(noise.std() * 127.5 - 20) < 2 and abs(neighbours(noise)) < 0.12
             for noise in noises]
    assert np.mean(white) == pytest.approx(0.5, abs=0.1)
    assert torch.equal(data[7][0] - data[7][1], noises[7])


def test_one_kind_alone(folder):
    data = OneKindBSDSDataset(folder, 'train', 32, seed=0, subset=[0], crops=9, kind='white, 15')
    noise = torch.stack([noisy - clean for noisy, clean in data]) * 127.5
    assert noise.std() == pytest.approx(15, rel=0.1)


def test_an_image_with_less_noise_counts_as_much():
    """Half the error is worth the same at any level, up to the 36 dB from which less is gained."""
    d = torch.zeros(1, 3, 8, 8)
    losses = {error: relative_error(d + error, d) for error in (0.5, 0.25, 0.2, 0.1)}
    assert losses[0.5] - losses[0.25] == pytest.approx(2 * math.log(2), abs=0.02)
    assert losses[0.2] - losses[0.1] == pytest.approx(2 * math.log(2), abs=0.1)
    assert relative_error(d + 0.002, d) - relative_error(d + 0.001, d) < 0.01


def test_it_trains(folder, tmp_path, capsys):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((200, 190)).save(file)
    start = tmp_path / 'dncnn'
    du.Recipe(D=2, C=4, size=16, epochs=1).experiment(folder, start).run(1)
    train_photo.main(['--data', str(folder), '--net', 'dncnn', '--start', str(start), '--epochs',
                      '1', '--crops', '1', '--size', '16', '--out', str(tmp_path / 'photo')])
    assert 'Epoch 1/1' in capsys.readouterr().out
    before = du.load_network('dncnn', start)[0]
    after, history = du.load_network('dncnn', tmp_path / 'photo')
    assert len(history) == 1 and not torch.equal(before.conv[0].weight, after.conv[0].weight)
