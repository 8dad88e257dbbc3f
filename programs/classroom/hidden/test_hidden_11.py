import matplotlib.pyplot as plt
import pytest
import torch
import torch.utils.data as td

import nntools as nt
from programs.classroom.hidden.helpers import close, noise

pytestmark = pytest.mark.part(11)


def training(du, folder, epochs, **options):
    """A short training with a plot: the experiment, the axes, the pair shown, what was drawn."""
    torch.manual_seed(0)
    net = du.DnCNN(1, C=2)
    pairs = td.TensorDataset(noise(4, 3, 8, 8), noise(4, 3, 8, 9)[..., :8])
    exp = nt.Experiment(net, pairs, pairs, torch.optim.Adam(net.parameters()),
                        du.DenoisingStatsManager(), folder / 'exp', batch_size=2,
                        perform_validation_during_training=True)
    fig, axes = plt.subplots(2, 2, dpi=10)  # quick to draw
    noisy, clean = pairs[0]
    drawn = []

    def draw(exp):
        state = [value.clone() for value in net.state_dict().values()]
        mode = net.training
        du.plot(exp, fig, axes, noisy, **options)
        drawn.append(shown(axes[0][1]))
        assert all(torch.equal(a, b) for a, b in zip(state, net.state_dict().values()))
        assert net.training == mode and len(exp.history) == exp.epoch

    exp.run(epochs, plot=draw)
    plt.close(fig)
    return exp, axes, noisy, clean, drawn


def shown(ax):
    """The last image on the axes, in [-1, 1]."""
    return torch.tensor(ax.images[-1].get_array()).permute(2, 0, 1) * 2 - 1


@pytest.mark.points(1)
def test_pictures(du, folder):
    """Above are the noisy image and what the network makes of it, at the state of the training."""
    exp, axes, noisy, _, drawn = training(du, folder, 1, visu_rate=1)
    assert close(shown(axes[0][0]), noisy.clamp(-1, 1))
    assert close(shown(axes[0][1]), exp.predict(noisy[None])[0].clamp(-1, 1))
    assert not torch.equal(drawn[0], drawn[-1])


@pytest.mark.points(1)
def test_curves(du, folder):
    """Below are the loss and the PSNR of each epoch, of training and validation."""
    exp, axes, *_ = training(du, folder, 3, visu_rate=3)
    rows = exp.table()
    for ax, name in zip(axes[1], ('loss', 'PSNR')):
        curves = [list(line.get_ydata()) for line in ax.lines]
        expected = [[row[prefix + name] for row in rows] for prefix in ('', 'val_')]
        assert len(curves) == 2
        assert all(pytest.approx(values) in curves for values in expected)


@pytest.mark.points(1)
def test_rate(du, folder):
    """It is drawn before the first epoch and after every ``visu_rate``-th."""
    *_, drawn = training(du, folder, 3, visu_rate=2)
    changes = [not torch.equal(a, b) for a, b in zip(drawn, drawn[1:])]
    assert changes == [False, True, False]


@pytest.mark.points(1)
def test_again(du, folder):
    """Drawn again, the axes have no more on them than before; titles tell the PSNR if asked."""
    clean = noise(4, 3, 8, 9)[0, ..., :8]
    _, axes, noisy, clean, _ = training(du, folder, 2, visu_rate=1, clean=clean)
    assert [len(ax.images) for ax in axes[0]] == [1, 1]
    assert [len(ax.lines) for ax in axes[1]] == [2, 2]
    value = du.psnr(noisy[None], clean[None]).item()
    assert any(text in axes[0][0].get_title() for text in (f'{value:.1f}', f'{value:.2f}'))
