"""Makes the picture in the README: a photograph with noise, denoised, and as it was.

The photograph is a part of "coffee" (Rachel Michetti, CC0), which comes with scikit-image.

    python -m programs.picture .github/denoised.jpg --force
"""
import argparse
from pathlib import Path

import pyvips
import torch
from skimage import data

import denoising_utils as du
from programs import run
from programs.denoise import BLIND
from programs.formats import new_file, save
from programs.inference import denoise_image, noise_level

GAP = 8  # white pixels between two panels


def side_by_side(panels):
    """Images of bytes (3, height, width), each beside the one before, with white between them."""
    height = panels[0].shape[1]
    gap = torch.full((3, height, GAP), 255, dtype=torch.uint8)
    parts = [panels[0]]
    for panel in panels[1:]:
        parts += [gap, panel]
    return torch.cat(parts, 2)


def psnr(image, clean):
    """The PSNR in dB of one image of bytes (3, height, width), as a number."""
    return du.psnr(du.to_floats(image)[None], du.to_floats(clean)[None]).item()


def parse(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.picture', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('target', type=Path, help='image file to write')
    add('--force', action='store_true', help='replace it if it exists')
    add('--sigma', type=float, default=30,
        help='level of the noise, 0..255 (default: %(default)s)')
    return parser.parse_args(words)


def main(words=None):
    args = parse(words)

    # The same noise each time.
    clean = torch.from_numpy(data.coffee()[60:320, 130:470]).permute(2, 0, 1)  # (3, 260, 340)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = du.to_integers(du.to_floats(clean) + 2 * args.sigma / 255 * noise)

    with new_file(args.target, args.force) as file:
        net, _ = du.load_network(BLIND)
        denoised = denoise_image(net, noisy)
        panels = side_by_side([noisy, denoised, clean]).permute(1, 2, 0)  # (height, width, 3)
        save(pyvips.Image.new_from_array(panels.numpy()), file)
    print(f'{args.target}: {psnr(noisy, clean):.2f} dB before, '
          f'{psnr(denoised, clean):.2f} dB after; estimated noise level '
          f'{noise_level(noisy):.1f} before, {noise_level(denoised):.1f} after')


if __name__ == '__main__':
    run(main)
