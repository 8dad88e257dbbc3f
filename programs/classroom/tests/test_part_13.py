"""Part 13: the receptive field of DnCNN."""
import pytest

import denoising_utils as du


@pytest.mark.parametrize('D', [0, 1, 3])
def test_it_is_what_autograd_measures(D):
    net = du.DnCNN(D, C=2)
    measured = du.measure_receptive_field(net)
    assert net.receptive_field == measured, (
        f'for D = {D} it is {net.receptive_field} by your formula, and {measured} as measured')
