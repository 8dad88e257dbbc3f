"""Part 19: DUDnCNN."""
import torch

import denoising_utils as du


def test_one_dilation_a_block():
    for D in (2, 4, 8):
        dilations = [conv.dilation[0] for conv in du.DUDnCNN(D, C=2).conv]
        assert len(dilations) == D + 2, f'D = {D} has {len(dilations)} convolutions'
        assert dilations == dilations[::-1], (
            f'for D = {D} they are {dilations}: not the same from both ends, as poolings and '
            'unpoolings are')


def test_full_resolution_throughout():
    net, h = du.DUDnCNN(4, C=4), torch.randn(1, 4, 9, 6)
    same, way_back = net.down(h.clone())
    assert same.shape == h.shape, f'down makes {tuple(same.shape)} of {tuple(h.shape)}'
    assert net.up(same, way_back).shape == h.shape, 'up changes the size'


def test_images_of_any_size():
    net = du.DUDnCNN(4, C=4).eval()
    for size in ((16, 16), (5, 7)):
        y = net(torch.randn(1, 3, *size))
        assert y.shape[2:] == size, f'{size[0]}x{size[1]} becomes {tuple(y.shape[2:])}'
