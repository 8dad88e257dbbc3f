"""Part 5: DnCNN."""
import torch

import denoising_utils as du


def make(D=2, C=4):
    return du.DnCNN(D, C, he_init=False)


def test_the_number_of_layers():
    net = make(3)
    assert len(net.conv) == 5, f'D = 3 has {len(net.conv)} convolutions, asked for 5'
    assert len(net.bn) == 3, f'D = 3 has {len(net.bn)} batch norms, asked for 3'


def test_names_that_load_network_needs():
    names = set(make(1).state_dict())
    for name in ('conv.0.weight', 'conv.2.bias', 'bn.0.running_mean'):
        assert name in names, f'there is no {name}, only {sorted(names)}'


def test_images_of_any_size():
    for size in ((8, 8), (7, 13)):
        y = make()(torch.randn(2, 3, *size))
        assert y is not None, 'the network returns nothing'
        assert y.shape == (2, 3, *size), (
            f'for images of {size[0]}x{size[1]} the result is {tuple(y.shape)}')


def test_the_input_is_added():
    net, x = make().eval(), torch.randn(1, 3, 8, 8)
    for values in net.conv[-1].parameters():
        torch.nn.init.zeros_(values)
    assert torch.allclose(net(x), x), (
        'with a last convolution of zeros the result is not the input: where is it added?')


def test_every_layer_takes_part():
    net = make(3)
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    idle = [name for name, values in net.named_parameters() if values.grad is None]
    assert not idle, f'these have no influence on the result: {", ".join(idle)}'
