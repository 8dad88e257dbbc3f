import math

import pytest
import torch

from programs.classroom.hidden.helpers import noise

pytestmark = pytest.mark.part(9)


@pytest.mark.points(1)
def test_psnr(du):
    """The PSNR is in dB, with a peak that is the range of the values, -1 to 1."""
    zeros = torch.zeros(1, 3, 4, 5)
    for error, expected in ((2, 0), (0.2, 20), (0.02, 40)):
        assert du.psnr(zeros + error, zeros).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.points(1)
def test_psnr_of_each_image(du):
    """Each image of a batch has its own PSNR, whatever the size of image and batch."""
    d = torch.zeros(3, 1, 6, 2)
    y = d + torch.tensor([0.2, 2, 0.02])[:, None, None, None]
    y[1] *= noise(1, 6, 2)
    values = du.psnr(y, d)
    assert values.shape == (3,)
    assert [value.item() for value in values] == [
        pytest.approx(du.psnr(y[k:k + 1], d[k:k + 1]).item(), abs=1e-4) for k in range(3)]


@pytest.mark.points(1)
def test_psnr_of_the_same(du):
    """The PSNR of an image without an error is infinite, and that of another in its batch isn't."""
    d = noise(2, 3, 4, 4)
    y = d.clone()
    y[1] += 0.2
    perfect, other = du.psnr(y, d).tolist()
    assert perfect == math.inf
    assert other == pytest.approx(20, abs=1e-3)


def statistics(du, sizes):
    """The summary of six images in batches of these sizes; and what it should be."""
    d = torch.zeros(6, 3, 4, 4)
    y = d + torch.tensor([0.01, 0.1, 0.3, 0.5, 1, 2])[:, None, None, None]
    losses = (y - d).square().flatten(1).mean(1)
    stats = du.DenoisingStatsManager()
    stats.init()
    for rows in torch.arange(6).split(sizes):
        stats.accumulate(losses[rows].mean().item(), d[rows], y[rows], d[rows])
    expected = {'loss': pytest.approx(losses.mean().item(), rel=1e-4),
                'PSNR': pytest.approx(du.psnr(y, d).mean().item(), rel=1e-4)}
    return stats, expected


@pytest.mark.points(1)
def test_a_second_pass(du):
    """A second pass over the data begins anew."""
    stats, expected = statistics(du, [6])
    stats.summarize()
    stats.init()
    image = torch.zeros(1, 3, 4, 4)
    stats.accumulate(0.04, image, image + 0.2, image)
    assert stats.summarize() == {'loss': pytest.approx(0.04),
                                 'PSNR': pytest.approx(du.psnr(image + 0.2, image).item())}


@pytest.mark.points(2)
def test_means_over_images(du):
    """The PSNR is the mean over the images, whatever the batches."""
    for sizes in ([6], [1] * 6, [4, 2], [1, 5]):
        stats, expected = statistics(du, sizes)
        assert stats.summarize()['PSNR'] == expected['PSNR']


@pytest.mark.points(2)
def test_summary(du):
    """The summary has the loss and the PSNR under their names, as numbers, and can be asked for
    twice."""
    stats, expected = statistics(du, [4, 2])
    for _ in range(2):
        summary = stats.summarize()
        assert summary == expected
        assert all(math.isfinite(float(value)) for value in summary.values())
