import pytest
import torch
from torch import nn

from programs.classroom.hidden.helpers import close, lively, noise

pytestmark = pytest.mark.part(5)


@pytest.mark.points(1)
def test_layers(du):
    """Convolutions and batch norms are as many as D asks for, with the right names and shapes."""
    for D, C in ((0, 4), (1, 5), (3, 4)):
        net = du.DnCNN(D, C)
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        widths = [3] + [C] * (D + 1) + [3]
        expected = {f'conv.{k}.weight': (widths[k + 1], widths[k], 3, 3) for k in range(D + 2)}
        expected |= {f'conv.{k}.bias': (widths[k + 1],) for k in range(D + 2)}
        expected |= {f'bn.{k}.{name}': (C,) for k in range(D) for name in ('weight', 'bias')}
        assert shapes == expected
        assert (net.D, net.C) == (D, C)


@pytest.mark.points(1)
def test_padding(du):
    """Convolutions keep height and width, also dilated ones (as in later parts) and of grey
    images."""
    class Dilated(du.DnCNN):
        @staticmethod
        def _dilations(D):
            return [3] * D

    for make in (du.DnCNN, Dilated):
        net = make(2, C=4, channels=1)
        h = noise(1, 1, 7, 9)
        for conv in net.conv:
            h = conv(h)
            assert h.shape[2:] == (7, 9)
        assert h.shape[1] == 1
    assert [conv.dilation for conv in net.conv] == [(1, 1), (3, 3), (3, 3), (1, 1)]


@pytest.mark.points(1)
def test_batch_norms(du):
    """The three kinds of batch norm are what the docstring says."""
    usual, course, none = (list(du.DnCNN(2, C=9, batch_norm=kind).bn)
                           for kind in ('usual', 'course', 'none'))
    assert [bn.eps for bn in usual] == [1e-5] * 2
    assert [bn.eps for bn in course] == [9] * 2
    assert all(isinstance(bn, nn.BatchNorm2d) for bn in usual + course)
    x = noise(2, 9, 4, 4)
    assert all(torch.equal(bn(x), x) for bn in none) and len(none) == 2


@pytest.mark.points(1)
def test_options(du):
    """``zero_last`` and ``he_init`` do what the docstring says."""
    x = noise(1, 3, 6, 6)
    torch.manual_seed(0)
    last = du.DnCNN(1, C=4, zero_last=True).conv[-1]
    assert not last.weight.any() and not last.bias.any()
    assert du.DnCNN(1, C=4).conv[-1].weight.any()
    calls = []

    class Counts(du.DnCNN):
        def initialise(self, batch_norm):
            calls.append((batch_norm, len(self.conv), len(self.bn)))

    Counts(1, C=4, batch_norm='course')
    Counts(1, C=4, he_init=False)
    assert calls == [('course', 3, 1)]
    assert torch.equal(du.DnCNN(0, C=2, zero_last=True)(x), x)


@pytest.mark.points(1)
def test_errors(du):
    """A wrong C or batch norm is refused with a ValueError that names it, a wrong D by `_check`."""
    for arguments, options, words in (
            ((2, 0), {}, '0'), ((2, 2.5), {}, '2.5'), ((-1,), {}, '-1'),
            ((2,), {'batch_norm': 'batch'}, 'batch')):
        with pytest.raises(ValueError, match=words):
            du.DnCNN(*arguments, **options)


@pytest.mark.points(2)
def test_block(du):
    """A block is convolution, batch norm and ReLU, in this order, each with its own layers."""
    net = lively(du.DnCNN(3, C=4))
    h = noise(2, 4, 7, 6)
    for k in range(3):
        expected = torch.relu(net.bn[k](net.conv[k + 1](h)))
        assert close(net.block(k, h.clone()), expected)


@pytest.mark.points(2)
def test_features(du):
    """Features are those after the first convolution with its ReLU, and all blocks in turn."""
    for D in (0, 1, 3):
        net = lively(du.DnCNN(D, C=4))
        x = noise(2, 3, 7, 6)
        h = torch.relu(net.conv[0](x))
        for k in range(D):
            h = net.block(k, h)
        assert close(net.features(x), h)


@pytest.mark.points(2)
def test_forward(du):
    """The result is the input plus what the last convolution makes of the features."""
    net = lively(du.DnCNN(2, C=4))
    x = noise(2, 3, 7, 6)
    kept = x.clone()
    assert close(net(x), x + net.conv[-1](net.features(x)))
    assert torch.equal(x, kept)
