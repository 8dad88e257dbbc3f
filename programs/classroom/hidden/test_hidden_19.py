import pytest
import torch

from programs.classroom.hidden.helpers import close, lively, noise

pytestmark = pytest.mark.part(19)


@pytest.mark.points(2)
def test_dilations(du):
    """Each convolution has a dilation that fits the scale of its block in UDnCNN(6)."""
    assert [conv.dilation[0] for conv in du.DUDnCNN(6, C=1).conv] == [1, 1, 2, 4, 4, 2, 1, 1]


@pytest.mark.points(2)
def test_dilations_of_other_depths(du):
    """So it is for other depths."""
    assert list(du.DUDnCNN._dilations(2)) == [1, 1]
    assert list(du.DUDnCNN._dilations(4)) == [1, 2, 2, 1]
    assert list(du.DUDnCNN._dilations(8)) == [1, 2, 4, 8, 8, 4, 2, 1]


@pytest.mark.points(1)
def test_down(du):
    """`down` leaves the features as they are, at full resolution, of images of any size too."""
    net = lively(du.DUDnCNN(6, C=4))
    h = noise(2, 4, 7, 9)
    same, _ = net.down(h)
    assert torch.equal(same, h)
    assert net.down(noise(1, 4, 1, 1))[0].shape == (1, 4, 1, 1)


@pytest.mark.points(1)
def test_up(du):
    """So does `up`; the forward pass is then that of UDnCNN without a change of scale."""
    net = lively(du.DUDnCNN(4, C=4))
    x = noise(1, 3, 13, 10)
    assert torch.equal(net.up(x, None), x)
    first = torch.relu(net.conv[0](x))
    fine = net.block(0, first.clone())
    h = net.block(2, net.block(1, fine.clone()))
    h = net.block(3, (h + fine) / 2 ** 0.5)
    assert close(net(x), x + net.conv[-1]((h + first) / 2 ** 0.5))
