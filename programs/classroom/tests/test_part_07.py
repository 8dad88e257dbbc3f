"""Part 7: the initialisation of He."""
import math

import torch

import denoising_utils as du


def spread(conv):
    return conv.weight.std().item() * math.sqrt(conv.in_channels * 9)


def test_the_spread_of_weights():
    torch.manual_seed(0)
    net = du.DnCNN(2, 32)
    for k, conv in enumerate(net.conv[:-1]):
        assert abs(spread(conv) - math.sqrt(2)) < 0.15, (
            f'weights of convolution {k} have a standard deviation of {spread(conv):.2f} / sqrt(n) '
            'for n inputs, He asks for 1.41')
    assert spread(net.conv[-1]) < 1, 'the last convolution is to stay at its default'
