"""Scores of the trained networks: measures, stores and prints them. All tables are Markdown.

    python -m programs.results evaluate     # the trained networks on the fixed test: minutes
    python -m programs.results levels       # by level of noise, from stored scores
    python -m programs.results ablation     # what skips, dilation and pooling give, likewise
    python -m programs.results peers        # published networks and BM3D beside ours, likewise
    python -m programs.results bm3d         # measures BM3D: a quarter of an hour
    python -m programs.results trials       # how the recipe was chosen, from checkpoints/trials.csv
"""
import argparse
import csv
import dataclasses
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch

import denoising_utils as du
from programs import run
from programs.inference import fold_batch_norm, for_level, self_ensemble
from programs.tables import as_cell, line, read_rows, table
from programs.trials import between_markers, trial_tables, write_trials

CHECKPOINTS = du.HERE / 'checkpoints'
TRIALS_PAGE = du.HERE / 'docs' / 'trials.md'
COLUMNS = ('network', 'seed', 'set', 'photograph', 'psnr')  # of a file of scores

# What networks are called in tables, where it isn't their name in the files.
TITLES = {
    'noisy': 'noisy images',
    'dncnn': 'DnCNN(6)',
    'udncnn': 'UDnCNN(6)',
    'dudncnn': 'DUDnCNN(6)',
    'dncnn_400': 'DnCNN(6), 400 epochs',
    'udncnn_400': 'UDnCNN(6), 400 epochs',
    'dudncnn_400': 'DUDnCNN(6), 400 epochs',
    'dudncnn_scaled': 'DUDnCNN(6), input scaled',
    'dudncnn_blind': 'DUDnCNN(6), blind',
    'FFDNet': 'FFDNet, told the level',
    'FFDNet-Clip': 'FFDNet-Clip, told the level',
}


# --- measuring -----------------------------------------------------------------------------------

@dataclasses.dataclass
class Training:
    """A trained network, scored."""
    seed: int
    net: torch.nn.Module
    epochs: int
    scores: dict  # of `denoising_utils.benchmark`


def find_trainings(name, checkpoints, seeds=None):
    """The folders NAME, NAME_seed1, ... in ``checkpoints``: a dict of seed to folder.

    Raises ValueError if there is none with one of the ``seeds`` (default: all seeds).
    """
    folders = {0: Path(checkpoints) / name}
    for folder in Path(checkpoints).glob(f'{name}_seed*'):
        folders[int(folder.name.partition('_seed')[2])] = folder
    if seeds:
        folders = {seed: folder for seed, folder in folders.items() if seed in seeds}
    if not folders:
        raise ValueError(f'{name} has no training with --seeds {seeds}')
    return dict(sorted(folders.items()))


def score_level(name, sigma, clip, root):
    """The PSNR of each test photograph at a level of noise, with ``clip`` as in 8-bit files.

    ``name`` is that of a trained network, ``'noisy'`` for none, or ``'dudncnn_scaled'`` for DUDnCNN
    made fit for the level by `for_level`.
    """
    if name == 'noisy':
        denoise = torch.clone
    else:
        denoise = fold_batch_norm(du.load_network(name.removesuffix('_scaled'))[0])
    if name.endswith('_scaled'):
        denoise = for_level(denoise, sigma)
    values = []
    with torch.inference_mode():
        for noisy, clean in du.benchmark_pairs(root, sigma, clip=clip):
            values.append(du.psnr(denoise(noisy), clean).item())
    return values


def train_arm(arm, seed, args):
    """Trains one network of the ablation, or goes on with it. Returns rows of `COLUMNS`."""
    net, D = du.ARMS[arm]
    recipe = dataclasses.replace(
        du.Recipe(hold_out=True), net=net, D=D, C=args.C, epochs=args.epochs, seed=seed)
    root = du.find_photographs(args.data)
    exp = recipe.experiment(root, Path(args.out) / f'{arm}_seed{seed}')
    exp.run(recipe.epochs)

    rows = []
    for which, options in (('held out', {'mode': 'train', 'subset': du.HELD_OUT}), ('test', {})):
        scores = du.benchmark(exp.net, du.benchmark_pairs(root, **options))
        rows += as_rows(arm, seed, which, scores['psnr'])
    return rows


def score_bm3d(root, sigma):
    """BM3D on the test photographs, see `denoising_utils.benchmark`."""
    import bm3d as package

    def denoise(noisy):
        image = ((noisy[0] + 1) / 2).permute(1, 2, 0).double().numpy()  # (height, width, 3)
        denoised = torch.from_numpy(package.bm3d_rgb(image, sigma / 255))
        return denoised.permute(2, 0, 1)[None].float() * 2 - 1

    return du.benchmark(denoise, du.benchmark_pairs(root, sigma))


# --- writing -------------------------------------------------------------------------------------

def set_at(sigma):
    """What the scores of the test photographs at a level of noise are called in a file."""
    return 'test' if sigma == 30 else f'test, sigma {sigma:g}'


def as_rows(network, seed, which, values):
    """Rows of `COLUMNS`, from the PSNR of each photograph of a set."""
    photographs = range(len(values))
    if which == 'held out':
        photographs = du.HELD_OUT
    return [[network, str(seed), which, str(photograph), f'{value:.3f}']
            for photograph, value in zip(photographs, values)]


def write_scores(file, rows):
    """Writes rows of `COLUMNS` to a file of scores (CSV), all or nothing.

    They take the place of those of the same network, seed and set. Raises ValueError if the file
    is another one.
    """
    header, old = COLUMNS, []
    if Path(file).exists():
        with open(file, newline='') as stream:
            header, *old = [*csv.reader(stream)] or [COLUMNS]
    if tuple(header) != COLUMNS:
        raise ValueError(f'{file} is not a file of scores, whose first line is '
                         f'{",".join(COLUMNS)}: name another one')
    renewed = {tuple(row[:3]) for row in rows}
    kept = [row for row in old if tuple(row[:3]) not in renewed]

    temporary = Path(f'{file}.tmp')
    with open(temporary, 'w', newline='') as stream:
        csv.writer(stream, lineterminator='\n').writerows([COLUMNS, *kept, *rows])
    os.replace(temporary, file)


def check_scores(file, root):
    """Raises ValueError before scores of other photographs get among the committed ones."""
    if not file or Path(file).resolve().parent != CHECKPOINTS:
        return
    if not du.describe_photographs(root)[0]:
        raise ValueError(f'{file} is for scores on BSDS300, and {root} is not: '
                         'name another file with --scores')


# --- reading -------------------------------------------------------------------------------------

def read_peers():
    """Our networks (mean over their trainings), BM3D and the published ones, on the fixed test.

    The best first: rows (title, parameters, PSNR in dB, PSNR on CBSD68).
    """
    peers = []
    scores = du.read_scores(CHECKPOINTS / 'scores.csv', 'test')
    for name in (*du.COMPARED, *(f'{name}_400' for name in du.COMPARED)):
        net = du.make_network(name.removesuffix('_400'))
        peers.append((TITLES[name], f'{du.count_parameters(net):,}',
                      scores[name].mean(), scores[name][:, du.CBSD68].mean()))
    bm3d = scores['bm3d']
    peers.append(('BM3D (package bm3d)', '–', bm3d.mean(), bm3d[:, du.CBSD68].mean()))

    # FFDNet's score on the fixed test stands with those at other levels.
    on_test = du.read_published('test') | du.read_published('sigma 30')
    on_68 = du.read_published('CBSD68')
    about = {row['network']: row for row in read_rows(CHECKPOINTS / 'published.csv')}
    for name, score in on_test.items():
        paper = about[name]['source'].partition(';')[0]
        parameters = int(about[name]['parameters'])
        peers.append((f'{name} ({paper})', f'{parameters:,}', score, on_68[name]))
    return sorted(peers, key=lambda peer: -peer[2])


# --- printing ------------------------------------------------------------------------------------

def evaluate_title(name, training, is_ensemble):
    words = [f'{type(training.net).__name__}({training.net.D})', f'{training.epochs} epochs']
    if '_course' in name:
        words.append("course's batch norm")
    if name.endswith('_assignment'):
        words.append("the assignment's recipe")
    if is_ensemble:
        words.append('self-ensemble')
    return ', '.join(words)


def evaluate_cells(trainings, is_bsds300):
    """What the table of results has on the trainings of one network, but for its title."""
    net = trainings[0].net
    psnr = np.array([training.scores['psnr'] for training in trainings])  # (seeds, photographs)
    ssim = np.array([training.scores['ssim'] for training in trainings])
    seconds = np.array([training.scores['seconds'] for training in trainings])
    error = psnr.mean(axis=0).std(ddof=1) / math.sqrt(psnr.shape[1])
    on_68 = ''
    if is_bsds300:
        on_68 = f'{psnr[:, du.CBSD68].mean():.2f}'
    return [f'{du.count_parameters(net):,}', net.receptive_field,
            f'{psnr.mean():.2f} ± {error:.2f}',
            ', '.join(f'{value:.2f}' for value in psnr.mean(axis=1)),
            on_68, f'{ssim.mean():.3f}', f'{seconds.mean():.2f}']


def level_table(scores, clip):
    """The PSNR by level of noise, from a file of scores, with that of published networks."""
    kind = 'clipped to 8 bits' if clip else 'not clipped'
    header = [f'PSNR (dB), {kind}', *(f'σ = {sigma}' for sigma in du.LEVELS)]
    rows = [[TITLES.get(name, name), *map(as_cell, values)]
            for name, values in du.by_level(scores, clip).items()]
    return table(header, rows)


def ablation_table(scores, C):
    """The networks of the ablation with ``C`` features, from a file of scores."""
    held_out, test = du.read_scores(scores, 'held out'), du.read_scores(scores, 'test')
    rows = []
    for arm, (name, D) in du.ARMS.items():
        if arm in held_out:
            net = du.make_network(name, D, C=C)
            rows.append([f'{type(net).__name__}({D})', f'{du.count_parameters(net):,}',
                         net.receptive_field, len(held_out[arm]),
                         f'{held_out[arm].mean():.2f}',
                         du.difference_in_words(held_out, arm, 'dncnn'),
                         f'{test[arm].mean():.2f}',
                         du.difference_in_words(test, arm, 'dncnn')])
    return table(['network', 'parameters', 'receptive field', 'seeds', 'held out', 'difference',
                  'test', 'difference'], rows)


# --- commands ------------------------------------------------------------------------------------

def evaluate(args):
    """measure the trained networks on the fixed test, mean over their seeds"""
    root = du.find_photographs(args.data)
    check_scores(args.scores, root)
    is_bsds300, description = du.describe_photographs(root)
    print(f'Test images: {description}; sigma = {args.sigma:g}.\n')
    print(*table(['network', 'parameters', 'receptive field', 'PSNR (dB)', 'of each seed',
                  'on CBSD68', 'SSIM', 's / image']), sep='\n')
    for name in args.nets:
        trainings = []
        label = f'{name}_ensemble' if args.self_ensemble else name
        for seed, folder in find_trainings(name, args.checkpoints, args.seeds).items():
            net, history = du.load_network(folder.name, folder)
            denoise = self_ensemble(net) if args.self_ensemble else net
            scores = du.benchmark(denoise, du.benchmark_pairs(root, args.sigma))
            trainings.append(Training(seed, net, len(history), scores))
            if args.scores:
                rows = as_rows(label, seed, set_at(args.sigma), scores['psnr'])
                write_scores(args.scores, rows)
        title = evaluate_title(name, trainings[0], args.self_ensemble)
        print(line([title, *evaluate_cells(trainings, is_bsds300)]), flush=True)


def levels(args):
    """print the PSNR by level of noise, or measure it with --retest"""
    if args.retest:
        root = du.find_photographs(args.data)
        check_scores(args.scores, root)
        for name in args.nets:
            rows = []
            for sigma, clip in itertools.product(du.LEVELS, (False, True)):
                # A network scaled for a level that it knows, or a lower one, is the network itself.
                if name.endswith('_scaled') and sigma <= 30:
                    continue
                which = f'sigma {sigma}, 8 bits' if clip else f'sigma {sigma}'
                rows += as_rows(name, 0, which, score_level(name, sigma, clip, root))
            write_scores(args.scores, rows)
    for clip in (False, True):
        print(*level_table(args.scores, clip), '', sep='\n')


def ablation(args):
    """print what skips, dilation and pooling give, or train for it with --retrain"""
    if args.retrain:
        check_scores(args.scores, du.find_photographs(args.data))
        for seed, arm in itertools.product(args.seeds, args.arms):
            write_scores(args.scores, train_arm(arm, seed, args))
    print('PSNR in dB: mean over the seeds, and difference to DnCNN(6) with 95 % intervals over '
          'photographs (p) and over trainings (t).\n')
    print(*ablation_table(args.scores, args.C), sep='\n')


def peers(args):
    """print published networks and BM3D beside ours, on the same noisy images"""
    rows = [[title, parameters, as_cell(psnr), as_cell(on_68)]
            for title, parameters, psnr, on_68 in read_peers()]
    print(*table(['denoiser', 'parameters', 'PSNR (dB)', 'on CBSD68'], rows), sep='\n')


def bm3d(args):
    """measure BM3D on the fixed test (needs pip install bm3d; a quarter of an hour)"""
    root = du.find_photographs(args.data)
    check_scores(args.scores, root)
    scores = score_bm3d(root, args.sigma)
    write_scores(args.scores, as_rows('bm3d', 0, set_at(args.sigma), scores['psnr']))
    print(f'BM3D: {scores["psnr"].mean():.2f} dB, SSIM {scores["ssim"].mean():.3f}, '
          f'{scores["seconds"].mean():.1f} s / image')


def trials(args):
    """print how the recipe was chosen, the tables of docs/trials.md"""
    if args.write:
        write_trials(TRIALS_PAGE)
        return
    for section, lines in trial_tables().items():
        print(between_markers(section, lines), end='\n\n')


def make_parser():
    """The options of each command."""
    parser = argparse.ArgumentParser(
        prog='python -m programs.results', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def command(function):
        sub = commands.add_parser(function.__name__, help=function.__doc__,
                                  description=f'{function.__doc__}.',
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(function=function)
        return sub.add_argument

    def add_common(add, scores):
        add('--data', help='folder with train/ and test/ (see find_photographs)')
        add('--scores', default=scores, help='file of the scores (CSV)')

    add = command(evaluate)
    add('nets', nargs='*', default=du.COMPARED, metavar='NETWORK', help='which networks')
    add_common(add, None)
    add('--checkpoints', default=CHECKPOINTS, help='folder that holds a folder a network')
    add('--sigma', type=float, default=30, help='noise level, 0..255')
    add('--seeds', nargs='+', type=int, help='which trainings (None: all there are)')
    add('--self-ensemble', action='store_true',
        help='mean over the eight flips and quarter turns of each image')

    add = command(levels)
    add_common(add, CHECKPOINTS / 'levels.csv')
    add('--retest', action='store_true', help='measure again: half an hour')
    add('--nets', nargs='+', default=['noisy', *du.COMPARED, 'dudncnn_scaled', 'dudncnn_blind'],
        help='what to measure')

    add = command(ablation)
    add_common(add, CHECKPOINTS / 'ablation.csv')
    add('--retrain', action='store_true', help='train again, or go on: hours')
    add('--arms', nargs='+', choices=du.ARMS, default=[*du.ARMS], help='which networks to train')
    add('--seeds', nargs='+', type=int, default=[0, 1, 2], help='which seeds to train')
    add('--out', default='experiments/ablation', help='folder of the checkpoints')
    add('--C', type=int, default=32, help='features per layer')
    add('--epochs', type=int, default=89, help='of 90 steps')

    command(peers)

    add = command(bm3d)
    add_common(add, CHECKPOINTS / 'scores.csv')
    add('--sigma', type=float, default=30, help='noise level, 0..255')

    add = command(trials)
    add('--write', action='store_true', help='renew the tables in docs/trials.md instead')
    return parser


def main(words=None):
    args = make_parser().parse_args(words)
    args.function(args)


if __name__ == '__main__':
    run(main)
