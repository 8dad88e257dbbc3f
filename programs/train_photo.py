"""Trains the network for people's photographs: white noise, and noise as cameras make it.

    python -m programs.train_photo --out experiments/photo

It goes on from dudncnn_blind. How checkpoints/dudncnn_photo was trained stands in docs/trials.md.
"""
import dataclasses

import torch

import denoising_utils as du
from programs import run
from programs.camera import compress, draw_between, photographed
from programs.tables import line, table
from programs.train import parse
from programs.train_blind import BlindBSDSDataset, BlindRecipe

KINDS = ('sigma 5', 'sigma 10', 'sigma 15', 'sigma 25', 'sigma 30', 'sigma 50', 'camera',
         'correlated', 'correlated, JPEG', 'white, JPEG', 'clean')


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

    def network(self):
        net = super().network()
        net.criterion = relative_error
        return net

    def data_set(self, photographs, mode, size, **options):
        return PhotoBSDSDataset(photographs, mode, size, self.sigma, clip=self.clip,
                                jitter=self.jitter, **options)


def pairs_of(kind, photographs, which):
    """Pairs (noisy, clean) in 8 bits, the same at each call: the fixed test's crops of 160 pixels
    (`denoising_utils.benchmark_pairs`) with one of the `KINDS` of noise."""
    random = torch.Generator().manual_seed(0)
    sigma = float(kind.removeprefix('sigma ')) if kind.startswith('sigma') else 0
    for noisy, clean in du.benchmark_pairs(photographs, sigma, 160, clip=True, **which):
        image = (clean[0] + 1) / 2
        if kind == 'camera':
            image = photographed(image, random)
        if kind.startswith(('correlated', 'white')):
            noise = 15 / 255 * torch.randn(image.shape, generator=random)
            if kind.startswith('correlated'):  # by its neighbours, at the same strength
                noise = 3 * torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
            image = (image + noise).clamp(0, 1)
        if kind.endswith('JPEG'):
            image = compress(image, 75, 2)
        if not kind.startswith('sigma'):
            noisy = du.to_floats(du.to_integers(image * 2 - 1))[None]
        yield noisy, clean


def print_kinds(nets, photographs, which):
    """Prints the PSNR of networks by kind of noise, as Markdown: a dict of name to network."""
    print(*table(['noise, in 8 bits', 'noisy (dB)', *nets]), sep='\n')
    for kind in KINDS:
        scores = []
        for denoise in (torch.clone, *nets.values()):
            pairs = pairs_of(kind, photographs, which)
            scores.append(du.benchmark(denoise, pairs)['psnr'].mean())
        print(line([kind, *(f'{score:.2f}' for score in scores)]), flush=True)


def main(words=None):
    recipe, args = parse(words, PhotoRecipe, 'train_photo', __doc__)
    photographs = du.find_photographs(args.data)
    exp = recipe.experiment(photographs, args.out, args.allow)
    exp.run(recipe.epochs)
    if recipe.hold_out:
        start, _ = du.load_network('dudncnn_blind')
        print_kinds({'dudncnn_blind': start, 'trained': exp.net}, photographs,
                    {'mode': 'train', 'subset': du.HELD_OUT})
        print(f'training took {sum(exp.seconds) / 60:.1f} minutes')


if __name__ == '__main__':
    run(main)
