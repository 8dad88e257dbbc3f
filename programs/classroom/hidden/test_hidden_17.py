import pytest

pytestmark = pytest.mark.part(17)


@pytest.mark.points(1)
def test_receptive_field(du):
    """The receptive field of UDnCNN is right for any depth."""
    assert [du.UDnCNN(D, C=1).receptive_field for D in (2, 4, 6, 8)] == [9, 18, 36, 72]


@pytest.mark.points(1)
def test_as_measured(du):
    """It is the one that `measure_receptive_field` finds, which needs the right `pooling_cell`."""
    assert [du.UDnCNN(D, C=1).pooling_cell for D in (2, 4, 6, 8)] == [1, 2, 4, 8]
    net = du.UDnCNN(4, C=2)
    assert du.measure_receptive_field(net) == net.receptive_field
