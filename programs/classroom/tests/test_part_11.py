"""Part 11: a plot of the training."""
import matplotlib.pyplot as plt
import torch
import torch.utils.data as td

import denoising_utils as du
import nntools as nt


class Damp(nt.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x

    def criterion(self, y, d):
        return ((y - d) ** 2).mean()


class Stats(nt.StatsManager):
    def summarize(self):
        return {'loss': super().summarize(), 'PSNR': 20.0}


def test_pictures_and_curves(tmp_path):
    pairs = td.TensorDataset(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
    net = Damp()
    exp = nt.Experiment(net, pairs, pairs, torch.optim.SGD(net.parameters(), 0.1), Stats(),
                        tmp_path / 'exp', batch_size=2, perform_validation_during_training=True)
    fig, axes = plt.subplots(2, 2)
    exp.run(3, plot=lambda exp: du.plot(exp, fig, axes, pairs[0][0], visu_rate=1))
    for ax, name in zip(axes[0], ('the noisy image', 'the denoised image')):
        assert len(ax.images) == 1, f'{name} is on its axes {len(ax.images)} times, asked for once'
    for ax, name in zip(axes[1], ('loss', 'PSNR')):
        assert len(ax.lines) == 2, (
            f'{name} has {len(ax.lines)} curves, asked for two: training and validation')
    plt.close(fig)
