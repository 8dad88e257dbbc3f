"""Trains the network for people's photographs: white noise, and noise as cameras make it.

    python -m programs.train_photo --out experiments/photo

It goes on from dudncnn_blind. How checkpoints/dudncnn_photo was trained stands in docs/trials.md.
"""
import dataclasses

import denoising_utils as du
from programs import run
from programs.camera import draw_between, photographed
from programs.kinds import KINDS, add, print_kinds
from programs.train import train
from programs.train_blind import BlindBSDSDataset, BlindRecipe


class OneKindBSDSDataset(BlindBSDSDataset):
    """Every sample with the same kind of noise, see `programs.kinds`."""

    OPTIONS = BlindBSDSDataset.OPTIONS | {'kind': None}

    def __init__(self, *args, kind, **options):
        super().__init__(*args, **options)
        self.kind = KINDS[kind]

    def _noisy(self, clean, channels, random):
        noisy = add(self.kind, (clean + 1) / 2, random)
        return du.to_floats(du.to_integers(noisy * 2 - 1))


class PhotoBSDSDataset(BlindBSDSDataset):
    """Half of the samples with white noise, as `BlindBSDSDataset` has it, one in sixteen clean, and
    the others as people's files are, see `programs.camera`."""

    def _noisy(self, clean, channels, random):
        kind = draw_between(0, 1, random)
        if kind < 0.5:
            return super()._noisy(clean, channels, random)
        if kind < 0.5 + 1 / 16:
            return du.to_floats(du.to_integers(clean))
        noisy = photographed((clean + 1) / 2, random) * 2 - 1
        if channels == 1:
            noisy = noisy.mean(0, keepdim=True).expand(3, -1, -1)
        return noisy


def relative_error(y, d):
    """The mean logarithm of each image's squared error, so that a decibel counts the same whether
    there is much noise or little. From 36 dB on, less and less is gained by more of them."""
    return ((y - d).square().flatten(1).mean(1) + 1e-3).log().mean()


@dataclasses.dataclass
class PhotoRecipe(BlindRecipe):
    """How the network for photographs is trained. The defaults are those of the committed one."""
    start: str = du.option('checkpoints/dudncnn_blind', 'folder of the network to begin with')
    epochs: int = du.option(100, 'epochs in all')
    warm_up: float = du.option(0.03, 'share of the epochs before the peak; then a cosine to 0')
    only: str = du.option(None, 'one kind of noise instead, to see how much there is to gain',
                          choices=[name for name, kind in KINDS.items() if kind])

    def network(self):
        net = super().network()
        net.criterion = relative_error
        return net

    def data_set(self, photographs, mode, size, **options):
        if self.only:
            return OneKindBSDSDataset(photographs, mode, size, self.sigma, kind=self.only,
                                      jitter=self.jitter, **options)
        return PhotoBSDSDataset(photographs, mode, size, self.sigma, clip=self.clip,
                                jitter=self.jitter, **options)


def main(words=None):
    train(words, PhotoRecipe, 'train_photo', __doc__, print_beside_blind)


def print_beside_blind(recipe, net, photographs):
    """Prints the PSNR on the held-out photographs by kind of noise, and that of dudncnn_blind."""
    blind, _ = du.load_network('dudncnn_blind')
    print_kinds({'dudncnn_blind': blind, 'trained': net}, photographs, hold_out=True)


if __name__ == '__main__':
    run(main)
