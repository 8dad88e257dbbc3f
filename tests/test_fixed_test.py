"""PSNR, and the fixed test on which networks are compared."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import denoising_utils as du


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_psnr_is_the_mean_over_images_whatever_the_batches(sizes):
    random = torch.Generator().manual_seed(sum(sizes))
    d = torch.rand(sum(sizes), 3, 8, 8, generator=random) * 2 - 1
    y = d + torch.rand(len(d), 1, 1, 1, generator=random) * torch.randn(d.shape, generator=random)
    stats = du.DenoisingStatsManager()
    stats.init()
    for y_batch, d_batch in zip(y.split(sizes), d.split(sizes)):
        stats.accumulate((y_batch - d_batch).square().mean().item(), y_batch, y_batch, d_batch)
    by_hand = [10 * math.log10(4 / (a - b).double().square().mean().item()) for a, b in zip(y, d)]
    summary = stats.summarize()
    assert summary['PSNR'] == pytest.approx(np.mean(by_hand))
    assert summary['loss'] == pytest.approx((y - d).square().mean().item(), rel=1e-5)


def test_the_fixed_test_is_the_centre_with_one_noise(folder):
    pairs = list(du.benchmark_pairs(folder, sigma=30, size=32))
    random = torch.Generator().manual_seed(123)
    for k, (noisy, clean) in enumerate(pairs):
        photograph = du.read_photograph(folder / 'test' / f'{k}.png')
        top, left = (photograph.shape[1] - 32) // 2, (photograph.shape[2] - 32) // 2
        expected = photograph[None, :, top:top + 32, left:left + 32] / 127.5 - 1
        assert torch.equal(clean, expected)
        torch.testing.assert_close(noisy - clean,
                                   60 / 255 * torch.randn(clean.shape, generator=random),
                                   atol=1e-6, rtol=0)
    scores = du.benchmark(lambda noisy: noisy, pairs)
    assert scores['psnr'].mean() == pytest.approx(18.59, abs=0.2)


def test_a_network_is_scored_in_evaluation_mode(folder):
    """A training leaves it in training mode, where batch norm would go by the one image."""
    net, pairs = du.DnCNN(2, C=4), list(du.benchmark_pairs(folder, size=32))
    for bn in net.bn:
        bn.running_var.fill_(3)
    expected, state = du.benchmark(net.eval().__call__,
                                   pairs)['psnr'], copy.deepcopy(net.state_dict())
    assert (du.benchmark(net.train(), pairs)['psnr'] == expected).all() and net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
