import pytest
import torch
import torch.nn.functional as F

from programs.classroom.hidden.helpers import close, lively, noise

pytestmark = pytest.mark.part(15)


@pytest.mark.points(2)
def test_down(du):
    """`down` takes the largest of each 2x2 pixels; odd rows and columns at the end are left out."""
    net = du.UDnCNN(4, C=3)
    for height, width in ((8, 6), (7, 6), (5, 9)):
        h = noise(2, 3, height, width)
        smaller, _ = net.down(h.clone())
        assert torch.equal(smaller, F.max_pool2d(h, 2))


@pytest.mark.points(1)
def test_too_small(du):
    """An image that is too small is refused with a ValueError that names the smallest."""
    for D, smallest in ((4, 2), (6, 4)):
        net = du.UDnCNN(D, C=2).eval()
        with pytest.raises(ValueError, match=rf'\b{smallest}\b'):
            net(noise(1, 3, smallest - 1, 20))
        assert net(noise(1, 3, smallest, 20)).shape == (1, 3, smallest, 20)


@pytest.mark.points(1)
def test_up(du):
    """`up` puts values where the maxima were, and zeros elsewhere."""
    net = du.UDnCNN(4, C=3)
    h = noise(2, 3, 8, 6)
    smaller, way_back = net.down(h.clone())
    larger = net.up(smaller, way_back)
    assert larger.shape == h.shape
    kept = larger != 0
    assert kept.sum() == smaller.numel()
    assert torch.equal(larger[kept], h[kept])


@pytest.mark.points(2)
def test_up_to_odd_sizes(du):
    """`up` comes back to the size that `down` came from, odd ones too."""
    net = du.UDnCNN(4, C=3)
    for height, width in ((7, 6), (6, 7), (5, 9)):
        h = noise(1, 3, height, width)
        smaller, way_back = net.down(h.clone())
        larger = net.up(smaller, way_back)
        assert larger.shape == h.shape
        assert torch.equal(F.max_pool2d(larger, 2).relu(), smaller.relu())


@pytest.mark.points(2)
def test_join(du):
    """`join` adds, divides by the square root of 2, and leaves its arguments as they are."""
    net = du.UDnCNN(2, C=3)
    h, earlier = noise(2, 3, 4, 5), noise(2, 3, 4, 6)[..., :5].contiguous()
    kept = earlier.clone()
    assert close(net.join(h.clone(), earlier), (h + earlier) / 2 ** 0.5)
    assert torch.equal(earlier, kept)


def features(net, x):
    """As the text of the assignment says, by the network's own methods."""
    half = net.D // 2
    first = torch.relu(net.conv[0](x))
    h, kept = first.clone(), []
    for k in range(half - 1):
        h, way_back = net.down(net.block(k, h))
        kept.append((h.clone(), way_back))
    h = net.block(half, net.block(half - 1, h))
    for k in range(half + 1, net.D):
        earlier, way_back = kept.pop()
        h = net.block(k, net.up(net.join(h, earlier), way_back))
    return net.join(h, first)


def agree(du, D):
    net = lively(du.UDnCNN(D, C=4))
    x = noise(2, 3, 16, 24)
    with torch.no_grad():
        assert close(net.features(x.clone()), features(net, x))


@pytest.mark.points(1)
def test_features_without_pooling(du):
    """For D = 2, the features are those of the two blocks, joined with those before them."""
    agree(du, 2)


@pytest.mark.points(2)
def test_features(du):
    """For larger D, blocks, poolings, skips and unpoolings come in the right order."""
    for D in (4, 6, 8):
        agree(du, D)


@pytest.mark.points(2)
def test_training(du):
    """Each convolution takes part in the result, and has a gradient that is not zero."""
    torch.manual_seed(0)
    net = du.UDnCNN(6, C=4)
    net(noise(2, 3, 16, 16)).square().sum().backward()
    for conv in net.conv:
        assert conv.weight.grad is not None and conv.weight.grad.abs().max() > 0
