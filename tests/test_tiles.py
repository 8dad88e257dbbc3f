"""Ways to apply a network: tiles, flips and turns, folded batch norm."""
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import denoising_utils as du
from programs import inference
from programs.inference import denoise_image, fold, fold_batch_norm, self_ensemble

NETS = [du.DnCNN, du.UDnCNN, du.DUDnCNN]


def folded_dudncnn(D, C):
    return fold(du.DUDnCNN(D, C=C))


@pytest.mark.parametrize('make', NETS)
def test_a_folded_batch_norm_changes_nothing(make):
    torch.manual_seed(0)
    net, x = make(4, C=4), torch.randn(2, 3, 16, 12)
    net(10 * x)  # statistics
    folded = fold_batch_norm(net)
    torch.testing.assert_close(folded(x), net.eval()(x))
    assert not any('bn' in name for name in folded.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(fold(net)(x), net.eval()(x))


@pytest.mark.parametrize('fuses', [True, False])
@pytest.mark.parametrize('D', [2, 4, 6])
def test_a_folded_network_changes_nothing(D, fuses, monkeypatch):
    """Fused or, where oneDNN is missing, not; in bfloat16 up to its rounding."""
    monkeypatch.setattr(inference, 'FUSES', inference.FUSES and fuses)
    torch.manual_seed(0)
    net, x = du.DUDnCNN(D, C=8), torch.randn(1, 3, 33, 40)
    net(x)  # statistics
    net.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fold(net)(x), net(x))
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(fold(net)(x), net(x), atol=0.05, rtol=0)


@settings(max_examples=20)
@given(make=st.sampled_from([*NETS, folded_dudncnn]), height=st.integers(20, 90),
       width=st.integers(20, 90), tile=st.integers(1, 60))
def test_tiles_leave_no_trace(make, height, width, tile):
    torch.manual_seed(height)
    net, image = make(4, C=3).eval(), torch.rand(3, height, width) * 2 - 1
    with torch.no_grad():
        whole = net(image[None])[0]
    torch.testing.assert_close(denoise_image(net, image, tile), whole, atol=2e-5, rtol=0)


def test_memory_is_bounded():
    """Features of the whole image would take C times its size; tiles take hardly any."""
    net, image = du.DnCNN(1, C=16), torch.zeros(3, 1500, 2000)
    before = peak_memory()
    denoise_image(net, image, tile=128)
    assert peak_memory() - before < 4 * image.nbytes


def peak_memory():
    """The process's peak resident memory in bytes."""
    resource = pytest.importorskip('resource')
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize('make', NETS)
def test_self_ensemble_treats_flips_and_turns_alike(make):
    torch.manual_seed(0)
    denoise = self_ensemble(make(2, C=4).eval())
    x = torch.randn(1, 3, 12, 16)
    with torch.no_grad():
        y = denoise(x)
        assert y.shape == x.shape
        assert torch.allclose(denoise(x.flip(-1)), y.flip(-1), atol=1e-5)
        assert torch.allclose(denoise(x.rot90(1, (-2, -1))), y.rot90(1, (-2, -1)), atol=1e-5)
