"""The PSNR of networks by kind of noise: white, from a camera, shared by neighbours, compressed.

    python -m programs.kinds                # on the test photographs; minutes
    python -m programs.kinds --hold-out     # on those held out of training
"""
import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F

import denoising_utils as du
from programs import run
from programs.camera import compress, photographed
from programs.inference import fold
from programs.tables import line, table


class Kind(NamedTuple):
    """Noise of a level on the scale 0..255, white or shared by neighbours, then JPEG or not."""
    level: float
    shared: bool = False
    quality: int | None = None


CAMERA = 'camera'  # each photograph has one of its own, see programs.camera
KINDS = {f'white, {level}': Kind(level) for level in (5, 10, 15, 25, 30, 50)} | {
    'white, 15, JPEG': Kind(15, quality=75),
    'shared, 15': Kind(15, shared=True),
    'shared, 15, JPEG': Kind(15, shared=True, quality=75),
    CAMERA: None,
    'clean': Kind(0)}


def pairs_of(name, photographs, which):
    """Pairs (noisy, clean) with one of the `KINDS` of noise, the same at each call: the middle 160
    pixels of photographs, the noisy ones in 8 bits."""
    random = torch.Generator().manual_seed(0)
    for _, clean in du.benchmark_pairs(photographs, 0, 160, **which):
        image = (clean[0] + 1) / 2
        if name == CAMERA:
            noisy = photographed(image, random, camera=1)
        else:
            noisy = add(KINDS[name], image, random)
        yield du.to_floats(du.to_integers(noisy * 2 - 1))[None], clean


def add(kind, image, random):
    """``image``, in [0, 1], with that kind of noise."""
    noise = kind.level / 255 * torch.randn(image.shape, generator=random)
    if kind.shared:
        noise = 3 * F.avg_pool2d(noise, 3, 1, 1)  # the mean of nine has a third of their spread
    noisy = (image + noise).clamp(0, 1)
    if kind.quality is not None:
        noisy = compress(noisy, kind.quality, subsampling=2)
    return noisy


def print_kinds(nets, photographs, hold_out=False):
    """Prints the PSNR of networks by kind of noise, as Markdown: a dict of name to network."""
    which = {}
    if hold_out:
        which = {'mode': 'train', 'subset': du.HELD_OUT}
    print(*table(['noise, in 8 bits', 'noisy (dB)', *nets]), sep='\n')
    for kind in KINDS:
        scores = []
        for denoise in (torch.clone, *nets.values()):
            pairs = pairs_of(kind, photographs, which)
            scores.append(du.benchmark(denoise, pairs)['psnr'].mean())
        print(line([kind, *(f'{score:.2f}' for score in scores)]), flush=True)


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.kinds', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('nets', nargs='*', default=['dudncnn_blind', 'dudncnn_photo'],
                        metavar='NETWORK', help='which, in checkpoints/ (default: %(default)s)')
    parser.add_argument('--data', help='folder with train/ and test/ (see find_photographs)')
    parser.add_argument('--hold-out', action='store_true',
                        help='every tenth training photograph in place of the test photographs')
    args = parser.parse_args(words)
    nets = {name: fold(du.load_network(name)[0]) for name in args.nets}
    print_kinds(nets, du.find_photographs(args.data), args.hold_out)


if __name__ == '__main__':
    run(main)
