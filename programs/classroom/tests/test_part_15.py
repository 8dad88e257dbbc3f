"""Part 15: UDnCNN."""
import torch

import denoising_utils as du


def make(D=4):
    torch.manual_seed(0)
    return du.UDnCNN(D, C=4)


def test_down_and_up_again():
    net, h = make(), torch.randn(1, 4, 9, 6)
    smaller, way_back = net.down(h.clone())
    assert smaller.shape == (1, 4, 4, 3), (
        f'9x6 pixels become {smaller.shape[2]}x{smaller.shape[3]}, asked for 4x3')
    larger = net.up(smaller, way_back)
    assert larger.shape == h.shape, (
        f'and back {larger.shape[2]}x{larger.shape[3]}, asked for 9x6 as before')


def test_a_join_keeps_the_spread():
    a, b = torch.randn(2, 1, 4, 64, 64)
    spread = make().join(a.clone(), b.clone()).std().item()
    assert abs(spread - 1) < 0.05, (
        f'features of spread 1 join to a spread of {spread:.2f}, asked for 1')


def test_images_of_any_size():
    net = make().eval()
    for size in ((16, 16), (33, 47), (9, 10)):
        y = net(torch.randn(1, 3, *size))
        assert y.shape[2:] == size, f'{size[0]}x{size[1]} becomes {tuple(y.shape[2:])}'


def test_every_layer_takes_part():
    net = make(6)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    idle = [k for k, conv in enumerate(net.conv)
            if conv.weight.grad is None or conv.weight.grad.abs().max() == 0]
    assert not idle, f'convolutions {idle} have no influence on the result'
