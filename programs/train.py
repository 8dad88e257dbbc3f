"""Trains a network, or goes on where an interrupted training of it stopped.

    python -m programs.train --net dncnn            # as the networks in checkpoints/ were trained
    python -m programs.train --net dncnn --hold-out # for trials: without every tenth photograph
"""
import argparse
import dataclasses
from pathlib import Path

import denoising_utils as du
from programs import run


def main(words=None):
    train(words, du.Recipe, 'train', __doc__, print_score)


def train(words, kind, program, description, report):
    """Trains by a recipe of this kind. With ``hold_out``, ``report(recipe, net, photographs)`` says
    how well it does on what was held out."""
    recipe, args = parse(words, kind, program, description)
    photographs = du.find_photographs(args.data)
    exp = recipe.experiment(photographs, args.out, args.allow)
    exp.run(recipe.epochs)
    if recipe.hold_out:
        report(recipe, exp.net, photographs)
        print(f'training took {sum(exp.seconds) / 60:.1f} minutes')


def print_score(recipe, net, photographs):
    """Prints the PSNR on the held-out photographs."""
    pairs = du.benchmark_pairs(photographs, recipe.sigma, mode='train', subset=du.HELD_OUT)
    print(f'held out: {du.benchmark(net, pairs)["psnr"].mean():.3f} dB')


def parse(words, kind, program, description):
    """A recipe of this kind, filled by the words of a command line, and the other options.

    Each option of the recipe has its default, its values and its help there.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m programs.{program}', description=description.split('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(kind):
        options = {'type': number if field.type is float else field.type}
        if field.type is bool:
            options = {'action': argparse.BooleanOptionalAction}
        name = '--' + field.name.replace('_', '-')
        parser.add_argument(name, default=field.default, **options | field.metadata)
    add = parser.add_argument
    add('--data', help='folder with train/ and test/; None: see find_photographs')
    add('--out', type=Path, help='folder of the checkpoint; None: experiments/NET')
    add('--allow', nargs='+', default=(), metavar='SETTING',
        help='settings that may differ from those of the checkpoint, as its refusal names them')
    args = parser.parse_args(words)
    recipe = kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})
    args.out = args.out or Path('experiments') / recipe.net
    return recipe, args


def number(text):
    """A number, whole if it is: a checkpoint compares its settings as texts, and 30.0 isn't 30."""
    value = float(text)
    return int(value) if value.is_integer() else value


if __name__ == '__main__':
    run(main)
