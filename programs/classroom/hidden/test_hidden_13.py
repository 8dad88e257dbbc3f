import pytest

pytestmark = pytest.mark.part(13)


@pytest.mark.points(1)
def test_receptive_field(du):
    """The receptive field of DnCNN is right for any depth, none too."""
    assert [du.DnCNN(D, C=1).receptive_field for D in (0, 1, 6, 14, 20)] == [5, 7, 17, 33, 45]


@pytest.mark.points(1)
def test_as_measured(du):
    """It is the one that `measure_receptive_field` finds."""
    net = du.DnCNN(3, C=2)
    assert du.measure_receptive_field(net) == net.receptive_field
