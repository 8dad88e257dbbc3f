import matplotlib.pyplot as plt
import pytest
import torch

pytestmark = pytest.mark.part(3)


@pytest.mark.points(1)
def test_values(du):
    """-1 is black, 1 is white, and what is beyond them is clipped."""
    image = torch.tensor([[-1.0, 0.0], [1.0, 3.0], [-7.0, 0.5]]).expand(3, 3, 2)
    _, ax = plt.subplots()
    shown = du.myimshow(image.clone().requires_grad_(), ax=ax).get_array()
    assert shown[..., 1].tolist() == [[0, 0.5], [1, 1], [0, 0.75]]
    plt.close('all')


@pytest.mark.points(1)
def test_orientation(du):
    """Rows are rows, columns are columns, and red is red."""
    image = torch.rand(3, 4, 6) * 2 - 1
    shown = torch.tensor(du.myimshow(image).get_array())
    assert shown.shape == (4, 6, 3)
    assert torch.allclose(shown, (image.permute(1, 2, 0) + 1) / 2, atol=1e-6)
    plt.close('all')


@pytest.mark.points(1)
def test_grey_images_and_axes(du):
    """Grey images are shown in grey, not stretched; on the axes that are given, without a frame."""
    fig, axes = plt.subplots(1, 2)
    handle = du.myimshow(torch.full((1, 2, 3), 0.5), ax=axes[0])
    assert handle.get_array().shape == (2, 3)
    assert handle.get_clim() == (0, 1)
    assert handle.get_cmap().name in ('gray', 'grey')
    assert len(axes[0].images) == 1 and not axes[0].axison
    assert not axes[1].images and axes[1].axison
    plt.close(fig)
