import math

import pytest
import torch

pytestmark = pytest.mark.part(7)


def spread(weight):
    """The standard deviation of weights in units of that of He's initialisation."""
    return weight.std().item() / math.sqrt(2 / weight[0].numel())


@pytest.mark.points(2)
def test_he(du):
    """All convolutions but the last have weights of the standard deviation that He et al. ask for,
    normally distributed."""
    torch.manual_seed(0)
    for make in (du.DnCNN, du.UDnCNN):
        *convolutions, _ = make(2, C=48).conv
        for conv in convolutions:
            assert 0.93 < spread(conv.weight) < 1.07
            assert conv.weight.abs().max() > 2.5 * conv.weight.std()  # a uniform one ends at 1.7


@pytest.mark.points(1)
def test_the_last_one(du):
    """The last convolution keeps PyTorch's default initialisation."""
    torch.manual_seed(0)
    net = du.DnCNN(2, C=48)
    assert 0.93 < spread(net.conv[1].weight) < 1.07
    last = net.conv[-1].weight
    bound = 1 / math.sqrt(last[0].numel())
    assert 0.95 * bound < last.abs().max() <= bound


@pytest.mark.points(1)
def test_batch_norm(du):
    """Weights of the course's batch norm are what the assignment asks for; of the usual one, 1."""
    for C in (4, 16):
        for bn in du.DnCNN(2, C=C, batch_norm='course').bn:
            assert torch.allclose(bn.weight, torch.full((C,), 1.25 * C ** 0.5))
        for bn in du.DnCNN(2, C=C).bn:
            assert torch.equal(bn.weight, torch.ones(C))
    assert len(du.DnCNN(2, C=4, batch_norm='none').bn) == 2
