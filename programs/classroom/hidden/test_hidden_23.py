import pytest

pytestmark = pytest.mark.part(23)


@pytest.mark.points(1)
def test_receptive_field(du):
    """The receptive field of DUDnCNN is right for any depth."""
    assert [du.DUDnCNN(D, C=1).receptive_field for D in (2, 4, 6, 8)] == [9, 17, 33, 65]


@pytest.mark.points(1)
def test_as_measured(du):
    """It is the one that `measure_receptive_field` finds."""
    net = du.DUDnCNN(4, C=2)
    assert du.measure_receptive_field(net) == net.receptive_field
