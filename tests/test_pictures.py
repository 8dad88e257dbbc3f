"""Images and curves."""

import matplotlib.pyplot as plt
import pytest
import torch

import denoising_utils as du
import nntools as nt


def test_myimshow_maps_and_clips():
    _, ax = plt.subplots()
    image = torch.tensor([[-1.0, 0.0], [1.0, 3.0]]).expand(3, 2, 2)
    shown = du.myimshow(image, ax=ax).get_array()
    assert shown.shape == (2, 2, 3)
    assert shown[..., 0].tolist() == [[0, 0.5], [1, 1]]
    assert du.myimshow(image[:1]).get_array().shape == (2, 2)
    shown = du.myimshow(torch.full((1, 2, 2), 0.5))
    assert shown.get_clim() == (0, 1)  # grey is not stretched to black and white
    plt.close('all')


def test_plot_draws_images_and_both_curves(folder, tmp_path):
    train, test = (du.NoisyBSDSDataset(folder, mode, (16, 16)) for mode in ('train', 'test'))
    net = du.DnCNN(0, C=2)
    adam = torch.optim.Adam(net.parameters())
    exp = nt.Experiment(net, train, test, adam, du.DenoisingStatsManager(), tmp_path / 'exp',
                        batch_size=2, perform_validation_during_training=True)
    fig, axes = plt.subplots(2, 2)
    calls = []
    exp.run(3, plot=lambda exp: (du.plot(exp, fig, axes, test[0][0], visu_rate=1, clean=test[0][1]),
                                 calls.append(len(axes[1][0].lines))))
    assert calls == [0, 2, 2, 2]
    assert len(axes[1][1].lines[0].get_xdata()) == 3
    assert axes[0][0].get_title().endswith('dB') and len(axes[0][1].images) == 1
    assert [text.get_text() for text in axes[1][1].get_legend().get_texts()] == ['training',
                                                                                 'validation']
    plt.close('all')


@pytest.mark.parametrize('net', [du.DnCNN(0), du.DnCNN(6), du.UDnCNN(6), du.DUDnCNN(4)])
def test_the_drawing_of_a_network_has_its_layers(net):
    _, ax = plt.subplots()
    du.draw_network(net, ax)
    words = [text.get_text() for text in ax.texts]
    assert len(ax.patches) == len(net.conv)
    assert words.count('+') == 1 + (net.D // 2 if isinstance(net, du.UDnCNN) else 0)
    assert words.count('pool') == words.count('unpool') == (2 if type(net) is du.UDnCNN else 0)
    assert '2' in words if type(net) is du.DUDnCNN else '1' not in words
    plt.close('all')
