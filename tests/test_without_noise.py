"""Pictures without noise: what is found in them, and that they are left as they are."""
import math

import numpy as np
import pytest
import torch

import denoising_utils as du
from programs.inference import find_noise, trust
from programs.without_noise import draw_lines


class Sharp(du.NNRegressor):
    """Takes for noise what differs from the mean of 3x3 pixels."""
    pooling_cell, receptive_field = 1, 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3, 1, 3, 3), 1 / 9))

    def forward(self, x):
        x = torch.nn.functional.pad(x, (1, 1, 1, 1), mode='replicate')
        return torch.nn.functional.conv2d(x, self.weight, groups=3)


def noisy(level, shape=(3, 200, 300)):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return du.to_integers(2 * level / 255 * noise)


@pytest.mark.parametrize('level', [3, 10, 30])
def test_noise_is_found_at_its_level(level):
    found = find_noise(Sharp(), noisy(level))
    assert found == pytest.approx(level * math.sqrt(8 / 9), rel=0.15)
    grey = find_noise(Sharp(), noisy(level, (1, 200, 300)))
    assert grey == pytest.approx(found, rel=0.15)


def test_lines_on_paper_are_no_noise():
    drawing = draw_lines(10, np.random.default_rng(0))
    assert find_noise(Sharp(), drawing) < 0.5
    assert (du.to_floats(drawing)[None] - Sharp()(du.to_floats(drawing)[None])).std() > 0.05


@pytest.mark.parametrize('shape', [(3, 1, 1), (1, 3, 500), (3, 129, 7)])
def test_pictures_of_any_size(shape):
    flat = torch.full(shape, 90, dtype=torch.uint8)
    assert find_noise(Sharp(), flat) == pytest.approx(0, abs=1e-3)


def test_the_network_is_left_as_it_was():
    net = Sharp().train()
    find_noise(net, noisy(5))
    assert net.training


def test_trust_rises_with_the_level():
    levels = [0, 0.6, 0.8, 0.9, 1.3, 30]
    trusts = [trust(level) for level in levels]
    assert trusts == sorted(trusts) and trusts[:2] == [0, 0] and trusts[-2:] == [1, 1]
    assert 0 < trusts[2] < trusts[3] < 1
