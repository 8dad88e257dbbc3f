"""The networks: layers, parameters, receptive fields, initialisation."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import denoising_utils as du

NETS = [du.DnCNN, du.UDnCNN, du.DUDnCNN]


@pytest.mark.parametrize('D', [0, 1, 2, 6, 14])
def test_dncnn_parameters_and_receptive_field(D):
    net = du.DnCNN(D)
    assert sum(conv.weight.numel() for conv in net.conv) == 36864 * D + 3456
    assert du.count_parameters(net) == 37056 * D + 3523
    assert du.measure_receptive_field(net) == net.receptive_field == 2 * D + 5


@pytest.mark.parametrize('D', [2, 4, 6, 8])
def test_udncnn_and_dudncnn_parameters_and_fields(D):
    pooled, dilated = du.UDnCNN(D), du.DUDnCNN(D)
    assert du.count_parameters(pooled) == du.count_parameters(dilated) == 37056 * D + 3523
    assert dilated.receptive_field == 2 ** (D // 2 + 2) + 1
    assert pooled.receptive_field == 9 * 2 ** (D // 2 - 1)
    assert du.measure_receptive_field(dilated) == dilated.receptive_field
    if D <= 6:  # the measurement takes long for 8
        assert du.measure_receptive_field(pooled) == pooled.receptive_field


def test_dilations():
    assert [conv.dilation[0] for conv in du.DUDnCNN(6).conv] == [1, 1, 2, 4, 4, 2, 1, 1]


@pytest.mark.parametrize('arm', du.ARMS)
def test_networks_of_the_ablation_differ_as_they_say(arm):
    """Parameters by name and size as in DnCNN of the same depth; receptive field as measured."""
    network, D = du.ARMS[arm]
    net, plain = du.make_network(network, D, C=4), du.DnCNN(D, C=4)
    assert ({name: p.shape for name, p in net.state_dict().items()}
            == {name: p.shape for name, p in plain.state_dict().items()})
    assert du.measure_receptive_field(net) == net.receptive_field
    assert net.receptive_field == {'dncnn': 17, 'skips': 17, 'dncnn14': 33, 'dilation': 33,
                                   'dudncnn': 33,
                                   'pooling': 36, 'udncnn': 36}[arm]


def test_skips_and_dilation_by_hand():
    """D = 2 has no room for dilation: without skips it is DnCNN, with them one sum is new."""
    torch.manual_seed(0)
    plain, x = du.DnCNN(2, C=3).eval(), torch.randn(1, 3, 9, 8)
    first = torch.relu(plain.conv[0](x))
    with_skip = x + plain.conv[-1]((plain.features(x) + first) / 2 ** 0.5)
    for make, expected in ((du.DilationOnly, plain(x)), (du.PoolingOnly, plain(x)),
                           (du.SkipsOnly, with_skip)):
        net = make(2, C=3).eval()
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(x), expected)


def test_receptive_field_of_udncnn_depends_on_the_place():
    for offset, (first, last) in (((0, 0), (-16, 19)), ((3, 0), (-19, 16))):
        seen = du.receptive_field_map(du.UDnCNN(6), offset)
        rows = seen.any(1).nonzero() - len(seen) // 2 - offset[0]
        assert (rows.min(), rows.max()) == (first, last)


@pytest.mark.parametrize('make', NETS)
def test_names_in_the_state_dict(make):
    names = set(make(6).state_dict())
    assert {f'conv.{k}.{kind}' for k in range(8) for kind in ('weight', 'bias')} <= names
    norms = {name.rsplit('.', 1)[0] for name in names if name.startswith('bn')}
    assert norms == {f'bn.{k}' for k in range(6)}


@settings(max_examples=25)
@given(make=st.sampled_from(NETS), half=st.integers(1, 4), channels=st.integers(1, 4),
       n=st.integers(1, 2),
       height=st.integers(8, 40), width=st.integers(8, 40))
def test_any_size_and_any_number_of_channels(make, half, channels, n, height, width):
    net = make(2 * half, C=2, channels=channels).eval()
    x = torch.randn(n, channels, height, width)
    assert net(x).shape == x.shape


@pytest.mark.parametrize('make', NETS)
def test_every_convolution_takes_part(make):
    """Each weight changes the output: if a block returned nothing, most would have no effect."""
    torch.manual_seed(0)
    net = make(6, C=4)
    x = torch.randn(1, 3, 32, 32)
    before = net(x)
    for conv in net.conv:
        with torch.no_grad():
            conv.weight.mul_(1.1).add_(0.01)
        after = net(x)
        assert not torch.allclose(before, after, atol=1e-5)
        before = after


def test_udncnn_by_hand():
    """The forward pass of D = 4 written out, from the assignment's text."""
    torch.manual_seed(1)
    net = du.UDnCNN(4, C=3).eval()
    relu = torch.relu
    pool, unpool = torch.nn.functional.max_pool2d, torch.nn.functional.max_unpool2d
    x = torch.randn(1, 3, 13, 10)
    first = relu(net.conv[0](x))
    h = relu(net.bn[0](net.conv[1](first)))
    pooled, where = pool(h, 2, return_indices=True)
    h = relu(net.bn[1](net.conv[2](pooled)))
    h = relu(net.bn[2](net.conv[3](h)))
    h = unpool((h + pooled) / 2 ** 0.5, where, 2, output_size=(13, 10))
    h = relu(net.bn[3](net.conv[4](h)))
    expected = x + net.conv[5]((h + first) / 2 ** 0.5)
    torch.testing.assert_close(net(x), expected)


def test_dudncnn_by_hand():
    """The same for the dilated one: without poolings and unpoolings."""
    torch.manual_seed(1)
    net = du.DUDnCNN(4, C=3).eval()

    def conv(k, h, dilation):
        return torch.conv2d(h, net.conv[k].weight, net.conv[k].bias, padding=dilation,
                            dilation=dilation)

    x = torch.randn(1, 3, 13, 10)
    first = torch.relu(conv(0, x, 1))
    fine = torch.relu(net.bn[0](conv(1, first, 1)))
    h = torch.relu(net.bn[1](conv(2, fine, 2)))
    h = torch.relu(net.bn[2](conv(3, h, 2)))
    h = torch.relu(net.bn[3](conv(4, (h + fine) / 2 ** 0.5, 1)))
    torch.testing.assert_close(net(x), x + conv(5, (h + first) / 2 ** 0.5, 1))


def test_initialisation_options():
    torch.manual_seed(0)
    he, default = du.DnCNN(2, C=64), du.DnCNN(2, C=64, he_init=False)
    assert he.conv[1].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert default.conv[1].weight.std().item() == pytest.approx(math.sqrt(1 / (3 * 9 * 64)),
                                                                rel=0.02)
    assert he.bn[0].eps == 1e-5 and he.bn[0].weight[0] == 1
    course = du.DnCNN(2, C=16, batch_norm='course')
    assert course.bn[0].eps == 16 and course.bn[0].weight[0] == 5
    assert du.DnCNN(2, C=16, batch_norm='course', he_init=False).bn[0].weight[0] == 1
    assert not any('bn' in name for name in du.DnCNN(2, batch_norm='none').state_dict())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(du.DUDnCNN(6, zero_last=True)(x), x)


@pytest.mark.parametrize('make, words', [
    (lambda: du.DnCNN(-1), 'D must be a whole number, 0 or more, got -1'),
    (lambda: du.DnCNN(2.5), 'got 2.5'),
    (lambda: du.DnCNN(2, C=0), 'C must be'),
    (lambda: du.DnCNN(2, batch_norm='batch'), "'usual', 'course' or 'none', got 'batch'"),
    (lambda: du.UDnCNN(0), 'D must be an even number, 2 or more, got 0'),
    (lambda: du.UDnCNN(3), 'got 3'),
    (lambda: du.DUDnCNN(5), 'got 5'),
    (lambda: du.UDnCNN(6)(torch.zeros(1, 3, 3, 30)), 'at least 4 pixels for D = 6'),
    (lambda: du.make_network('unet'),
     "dncnn, udncnn, dudncnn, skips, dilation, pooling, got 'unet'"),
])
def test_bad_networks(make, words):
    with pytest.raises(ValueError, match=words):
        make()
