import pytest
import torch

from programs.classroom.hidden.helpers import noise

pytestmark = pytest.mark.part(4)


@pytest.mark.points(1)
def test_mean(du):
    """The criterion is the mean of the squared error, over all images, channels and pixels."""
    y, d = noise(2, 3, 4, 5), noise(2, 3, 4, 6)[..., :5]
    loss = du.NNRegressor.criterion(None, y, d)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(((y - d) ** 2).sum().item() / 120, rel=1e-5)


@pytest.mark.points(1)
def test_gradient(du):
    """It can be used to train: its gradient is that of the mean squared error."""
    y, d = noise(4, 1, 2, 2).requires_grad_(), torch.zeros(4, 1, 2, 2)
    du.NNRegressor.criterion(None, y, d).backward()
    assert torch.allclose(y.grad, 2 * y.detach() / 16)
