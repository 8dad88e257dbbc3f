"""Trains the network that finds the level of the noise itself, from one that knows a single level.

    python -m programs.train_blind --start checkpoints/dudncnn --out experiments/first

How checkpoints/dudncnn_blind was trained, in two stages, stands in docs/trials.md.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as transforms

import denoising_utils as du
from programs import run
from programs.camera import draw_between
from programs.inference import fold_batch_norm
from programs.train import number, train


class BlindBSDSDataset(du.NoisyBSDSDataset):
    """What a network is trained on that is to denoise any photograph, whatever its level of noise.

    Args, beside those of `denoising_utils.NoisyBSDSDataset`:
        sigma: (lowest, highest), between which a level is drawn for each sample, uniformly.
        clip: the share of the samples whose noisy image is clipped and rounded to 8 bits, as a file
            has it: 0 to 1.
        jitter: make half of the samples as different as photographs are: reduced in size (up to 2.5
            times, so sharper), colours exchanged, saturation and contrast changed; a quarter of
            these are grey, and so is their noise.
    """

    OPTIONS = du.NoisyBSDSDataset.OPTIONS | {'clip': 0.0, 'jitter': False}

    def __init__(self, root_dir, mode='train', image_size=(180, 180), sigma=(0, 55), *, clip=0.0,
                 jitter=False, **options):
        if len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1] < np.inf:
            raise ValueError(f'sigma must be (lowest, highest), 0 or more, got {sigma!r}')
        if not 0 <= clip <= 1:
            raise ValueError(f'clip must be a share of the samples, 0 to 1, got {clip!r}')
        super().__init__(root_dir, mode, image_size, **options)
        self.sigma, self.clip, self.jitter = tuple(sigma), float(clip), jitter

    def __getitem__(self, index):
        index = range(len(self))[index]
        random = self._random(index)
        clean, channels = self._clean(self._photograph(index % len(self.files)), random)
        return self._noisy(clean, channels, random), clean

    def _clean(self, image, random):
        """A crop, and its number of channels: 1 if it is grey."""
        channels = 3
        if self.jitter and du.draw(2, random):
            clean, channels = self._changed_crop(image, random)
        else:
            clean = self._crop(image, random)
        if self.augment:
            clean = self._flip(clean, random)
        return clean, channels

    def _noisy(self, clean, channels, random):
        sigma = draw_between(*self.sigma, random)
        noise = torch.randn(channels, *clean.shape[1:], generator=random)
        noisy = clean + 2 * sigma / 255 * noise
        if self.clip and draw_between(0, 1, random) < self.clip:
            noisy = du.to_floats(du.to_integers(noisy))
        return noisy

    def _changed_crop(self, image, random):
        """A crop of another size and other colours, and its number of channels."""
        height, width = self.image_size
        zoom = draw_between(1, min(2.5, image.shape[1] / height, image.shape[2] / width), random)
        crop = self._crop(image, random, (int(zoom * height), int(zoom * width)))
        grey = not du.draw(4, random)
        saturation = 0 if grey else draw_between(0, 2.5, random)
        crop = crop[torch.randperm(3, generator=random)]
        contrast = draw_between(0.5, 1.5, random)

        # From [-1, 1] to [0, 1] and back; bicubic interpolation overshoots.
        crop = F.interpolate(crop[None], self.image_size, mode='bicubic', antialias=True)[0]
        crop = crop.add(1).div(2).clamp(0, 1)
        crop = transforms.adjust_contrast(transforms.adjust_saturation(crop, saturation), contrast)
        return crop.mul(2).sub(1), 1 if grey else 3


@dataclasses.dataclass
class BlindRecipe(du.Recipe):
    """How the blind network is trained. The defaults are the first stage of the committed one."""
    start: str = du.option('checkpoints/dudncnn', 'folder of the trained network to begin with; if '
                           'batch-norm is none, its batch norm becomes part of its convolutions')
    net: str = du.option('dudncnn', 'which network', choices=[*du.NETWORKS])
    batch_norm: str = du.option('none', 'see DnCNN', choices=['usual', 'course', 'none'])
    sigma: tuple = du.option((0, 55), 'lowest and highest level, 0..255', type=number, nargs=2)
    clip: float = du.option(0.5, 'share of the samples clipped and rounded to 8 bits')
    jitter: bool = du.option(True, 'change size and colours of half of the samples')
    epochs: int = du.option(75, 'epochs in all')
    crops: int = du.option(8, 'crops of each photograph an epoch')
    lr: float = du.option(7e-4, 'peak learning rate of Adam')
    warm_up: float = du.option(0.05, 'share of the epochs before the peak; then a cosine to 0')

    def network(self):
        folder = Path(self.start)
        name = folder.name if folder.name.split('_')[0] in du.NETWORKS else self.net
        net, _ = du.load_network(name, folder)
        if type(net) is not du.NETWORKS[self.net]:
            raise ValueError(f'--start {folder} holds a {type(net).__name__}: name it with --net')
        return fold_batch_norm(net) if self.batch_norm == 'none' else net

    def data_set(self, photographs, mode, size, **options):
        return BlindBSDSDataset(photographs, mode, size, self.sigma, clip=self.clip,
                                jitter=self.jitter, **options)


def main(words=None):
    train(words, BlindRecipe, 'train_blind', __doc__, print_levels)


def print_levels(recipe, net, photographs):
    """Prints the PSNR on the held-out photographs by level of noise, as Markdown."""
    print('| sigma | noisy | held out (dB) | in 8 bits | changed by jitter |')
    print('|---|---|---|---|---|')
    for sigma in (3, 5, 15, 25, 30, 50):
        held_out = {'mode': 'train', 'subset': du.HELD_OUT}
        plain = list(du.benchmark_pairs(photographs, sigma, 160, **held_out))
        clipped = du.benchmark_pairs(photographs, sigma, 160, clip=True, **held_out)
        changed = BlindBSDSDataset(photographs, 'train', 128, (sigma, sigma), subset=du.HELD_OUT,
                                   seed=0, jitter=True)
        scores = [du.benchmark(torch.clone, plain), du.benchmark(net, plain),
                  du.benchmark(net, clipped),
                  du.benchmark(net, [(noisy[None], clean[None]) for noisy, clean in changed])]
        cells = ' | '.join(f'{score["psnr"].mean():.3f}' for score in scores)
        print(f'| {sigma} | {cells} |', flush=True)


if __name__ == '__main__':
    run(main)
