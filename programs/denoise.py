"""Denoises image files at full size.

    python -m programs.denoise IN OUT
    python -m programs.denoise IN... --to FOLDER

Prints the level of the noise of each file before and after, as scikit-image estimates it.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import denoising_utils as du
import nntools as nt
from programs import run, say
from programs.formats import new_file
from programs.image_files import check_format, read_image, write_image
from programs.inference import (
    TRAINED_LEVEL,
    denoise_image,
    find_noise,
    fold,
    for_level,
    half_precision,
    noise_level,
    trust,
)
from programs.pixels import Pixels

# Both find the level of the noise themselves: white noise, and that of people's files too.
BLIND, PHOTO = 'dudncnn_blind', 'dudncnn_photo'


class Report(NamedTuple):
    """What is said of a file that was denoised."""
    before: float  # the `noise_level` of the file
    after: float
    strength: float  # see `denoise_image`
    left_out: list  # the names of what it has and the format of the result can't hold


def denoise_file(net, source, target, *, strength=None, precision=torch.float32, force=False):
    """Denoises an image file at full size and writes the result to ``target``.

    What is read and what is kept: see `read_image` and `write_image`. For ``strength`` and
    ``precision`` see `denoise_image`; by default ``strength`` is 1, or less where the network finds
    hardly any noise, see `trust`. Returns a `Report`. ``target`` appears whole or not at all.

    Raises ValueError if ``source`` can't be read as an image, or ``target`` not written in the
    format that its name says; FileExistsError if there is such a file, unless ``force`` is true.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target} is the file to read: choose another name for the result')
    with new_file(target, force) as file:
        # Anything that is wrong with the two files is found before the work.
        image = read_image(source, file.parent)
        check_format(image, file)

        if strength is None:
            strength = trust(find_noise(net, image.pixels, precision))
        result = Pixels(file.with_name('denoised'), image.header[:image.pixels.shape[0]])
        denoise_image(net, image.pixels, strength=strength, precision=precision, out=result)
        left_out = write_image(image, result, file)
        return Report(noise_level(image.pixels), noise_level(result), strength, left_out)


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
    add('--net', choices=[*du.COMPARED, 'dudncnn_400', BLIND, PHOTO], default=PHOTO,
        help='which network (default: %(default)s)')
    add('--sigma', type=float,
        help=f'level of the noise, for networks that were trained on one ({TRAINED_LEVEL})')
    add('--strength', type=float,
        help='0 leaves the image as it is, between 0 and 1 is a blend, up to 2 takes away more '
             '(default: 1, or less where there is hardly any noise)')
    add('--force', action='store_true', help='replace files that exist')
    return parser.parse_args(words)


def check_options(args):
    """Raises ValueError for a level or a strength that makes no sense."""
    if args.sigma is not None:
        if args.net in (BLIND, PHOTO) or not args.sigma > 0:
            raise ValueError('--sigma is for networks of one level, and above 0: '
                             f'{BLIND} and {PHOTO} find the level themselves')
        if args.sigma < TRAINED_LEVEL:
            raise ValueError(f'--sigma must be {TRAINED_LEVEL}, on which these networks were '
                             f'trained, or more, got {args.sigma:g}: '
                             f'take {PHOTO}, which finds the level itself')
    if args.strength is not None and not 0 <= args.strength <= 2:
        raise ValueError(f'--strength must be from 0 to 2, got {args.strength}')


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


def describe(report, source, target, by_rule):
    """What is said of a file, in lines. ``by_rule``: nobody has asked for another strength."""
    yield (f'{target}: noise level {report.before:.1f} before, {report.after:.1f} after '
           '(estimated, of 255)')
    if by_rule and report.strength == 0:
        yield f'{target}: hardly any noise was found, so nothing was changed; --strength 1 does'
    elif by_rule and report.strength < 1:
        yield (f'{target}: hardly any noise was found, so the strength is {report.strength:.2f}; '
               '--strength 1 takes away all of it')
    if report.after > report.before + 0.05:
        yield f'{target}: the level rose, as the estimate takes fine detail for noise'
    if report.left_out:
        yield (f"{target}: {target.suffix} can't hold all of {source.name}, left out: "
               + ', '.join(report.left_out))


def main(words=None):
    args = parse(words)
    check_options(args)
    pairs = name_results(args.files, args.to)

    # The network, on the device and in the precision that are fastest here.
    net, _ = du.load_network(args.net)
    if args.sigma is not None:
        net = for_level(net, args.sigma)
    net = fold(net).to(nt.find_device(), memory_format=torch.channels_last)
    precision = half_precision(net.device)

    # A file that can't be denoised doesn't keep the others waiting.
    done = failed = 0
    for source, target in pairs:
        try:
            report = denoise_file(net, source, target, strength=args.strength,
                                  precision=precision, force=args.force)
        except (OSError, ValueError) as error:
            failed += 1
            nameless = getattr(error, 'errno', None) and not error.filename  # as of a full disk
            print(f'{target}: {error}' if nameless else error, file=sys.stderr)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f'{done} of {len(pairs)} files are done') from None
        else:
            done += 1
            for line in describe(report, source, target, args.strength is None):
                say(line)
    if failed:
        raise SystemExit(f'{failed} of {len(pairs)} files could not be denoised')


if __name__ == '__main__':
    run(main)
