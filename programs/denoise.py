"""Denoises image files at full size.

    python -m programs.denoise IN OUT
    python -m programs.denoise IN... --to FOLDER

Prints the level of the noise of each file before and after, as scikit-image estimates it.
"""
import argparse
import sys
from pathlib import Path

import torch

import denoising_utils as du
import nntools as nt
from programs import run
from programs.image_files import check_new, check_target, read_image, write_image
from programs.inference import (
    TRAINED_LEVEL,
    denoise_image,
    for_level,
    half_precision,
    noise_level,
)

BLIND = 'dudncnn_blind'  # finds the level of the noise itself


def denoise_file(net, source, target, *, strength=1.0, precision=torch.float32, force=False):
    """Denoises an image file at full size and writes the result to ``target``.

    What is read and what is kept: see `read_image` and `write_image`. For ``strength`` and
    ``precision`` see `denoise_image`. Returns the `noise_level` of the file before and after.
    ``target`` appears whole or not at all.

    Raises ValueError if ``source`` can't be read as an image, or ``target`` not written in the
    format that its name says; FileExistsError if there is such a file, unless ``force`` is true.
    """
    # Anything that is wrong with the two files is found before the work.
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target} is the file to read: choose another name for the result')
    check_new(target, force)
    image = read_image(source)
    check_target(image, target)

    before = noise_level(image.pixels)
    image.pixels = denoise_image(net, image.pixels, strength=strength, precision=precision)
    write_image(image, target)
    return before, noise_level(image.pixels)


# --- command line --------------------------------------------------------------------------------

def parse(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.denoise', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('files', nargs='+', type=Path, metavar='FILE',
        help='image file to read and image file to write (IN OUT), '
             'or with --to any number of files to read')
    add('--to', type=Path, metavar='FOLDER',
        help='folder for the results, which have the names of the files')
    add('--net', choices=[*du.COMPARED, BLIND], default=BLIND,
        help='which network (default: %(default)s)')
    add('--sigma', type=float,
        help=f'level of the noise, for networks that were trained on one ({TRAINED_LEVEL})')
    add('--strength', type=float, default=1,
        help='0 leaves the image as it is, between 0 and 1 is a blend (default: %(default)s)')
    add('--force', action='store_true', help='replace files that exist')
    return parser.parse_args(words)


def check_options(args):
    """Raises ValueError for a level or a strength that makes no sense."""
    if args.sigma is not None:
        if args.net == BLIND or not args.sigma > 0:
            raise ValueError('--sigma is for networks of one level, and above 0: '
                             f'{BLIND} finds the level itself')
        if args.sigma < TRAINED_LEVEL:
            raise ValueError(f'--sigma must be {TRAINED_LEVEL}, on which these networks were '
                             f'trained, or more, got {args.sigma:g}: '
                             f'take {BLIND}, which finds the level itself')
    if not 0 <= args.strength <= 1:
        raise ValueError(f'--strength must be from 0 to 1, got {args.strength}')


def name_results(files, folder):
    """Pairs (file to read, file to write): the two ``files``, or each and its result in ``folder``.

    The folder is made. Raises ValueError if there are not two files, or, with a folder, if two
    results would have the same name.
    """
    if folder is None:
        if len(files) != 2:
            raise ValueError('name two files, IN OUT, or several and a folder: IN... --to FOLDER')
        return [tuple(files)]
    targets = [folder / file.name for file in files]
    if len(set(targets)) < len(targets):
        raise ValueError('two of these files have the same name: '
                         f"their results can't both be in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return list(zip(files, targets))


def main(words=None):
    args = parse(words)
    check_options(args)
    pairs = name_results(args.files, args.to)

    # The network, on the device and in the precision that are fastest here.
    net, _ = du.load_network(args.net)
    if args.sigma is not None:
        net = for_level(net, args.sigma)
    net = net.to(nt.find_device(), memory_format=torch.channels_last)
    precision = half_precision(net.device)

    # A file that can't be denoised doesn't keep the others waiting.
    failed = 0
    for source, target in pairs:
        try:
            before, after = denoise_file(net, source, target, strength=args.strength,
                                         precision=precision, force=args.force)
        except (OSError, ValueError) as error:
            failed += 1
            print(error, file=sys.stderr)
        else:
            print(f'{target}: noise level {before:.1f} before, {after:.1f} after '
                  '(estimated, of 255)', flush=True)
    if failed:
        raise SystemExit(f'{failed} of {len(pairs)} files could not be denoised')


if __name__ == '__main__':
    run(main)
