"""The used field: how many values of the noisy image a network averages at a place.

    python -m programs.used_field             # prints it, from checkpoints/used_field.csv
    python -m programs.used_field --measure   # measures it again: a quarter of an hour

For small changes of its input a network is a linear filter, another one at each place: the row of
its Jacobian there, g = d y[c, row, column] / d x, over all pixels and channels of the input x
(Mohan et al., "Robust and interpretable blind image denoising via bias-free convolutional neural
networks", ICLR 2020). A plain mean of n values has n weights of 1 / n, so that 1 / sum(g ** 2) = n.
This is the field that the network uses there, of that which it could use. It counts values: a pixel
has three. Each channel c of the output has its filter; ``field`` is the mean of 1 / sum(g ** 2)
over the three.

Places: 12 in every tenth photograph of the fixed test, drawn by a fixed seed. ``field`` is that for
the test's noisy image. ``error`` is the mean squared error in the 17x17 pixels around the place
(images are in [-1, 1]), averaged over eight other draws of the noise, the same for all networks.

The narrow networks are those of the ablation, of seed 0, trained again for this, on another machine
than those whose scores are in ablation.csv.
"""
import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import denoising_utils as du
from programs import run
from programs.results import CHECKPOINTS, check_scores
from programs.tables import read_rows, table

COLUMNS = ('network', 'photograph', 'row', 'column', 'field', 'error')
WIDE = (*du.COMPARED, 'dncnn_14')  # folders of checkpoints/
NARROW = {f'{name}_14_narrow' if D == 14 else f'{name}_narrow': arm
          for arm, (name, D) in du.ARMS.items()}  # others, and the arm of the ablation
NETWORKS = [*WIDE, *NARROW]

STEP, PLACES = 10, 12  # every tenth photograph, and places in each
MARGIN = 40  # pixels from a place to the border, or more: fields reach 19 at most
CROP = 96  # side of what the network gets to see around a place
WINDOW, DRAWS = 17, 8  # side of what the error is measured in, and draws of noise


# --- measuring -----------------------------------------------------------------------------------

def equivalent_filters(net, x, row, column):
    """The filters that ``net`` applies at a place of ``x`` (channels, height, width): (channels,
    channels, height, width), where the first index is the channel of the output."""
    x = x[None].clone().requires_grad_()
    y = net(x)[0, :, row, column]
    return torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in y])


def used_field(net, x, row, column):
    """How many values ``net`` averages at a place of ``x``, mean over the channels it returns."""
    filters = equivalent_filters(net, x, row, column).double()
    return (1 / filters.square().sum((1, 2, 3))).mean().item()


def crop_around(place, size=320):
    """Where the crop around a row or column begins: at a border of UDnCNN's pooling cells."""
    return min(max(0, (place - CROP // 2 + 2) // 4 * 4), size - CROP)


def local_error(net, noisy, clean, row, column):
    """The mean squared error around a place, over a batch of noisy images of the same one."""
    half = WINDOW // 2
    window = (..., slice(row - half, row + half + 1), slice(column - half, column + half + 1))
    with torch.inference_mode():
        return (net(noisy)[window] - clean[window]).double().square().mean().item()


def measure(nets, root):
    """Rows of `COLUMNS` for ``nets``, a dict of name to network, on the photographs in ``root``."""
    random, rows = torch.Generator().manual_seed(0), []
    for photograph, images in enumerate(du.benchmark_pairs(root)):  # all, as they share a generator
        if photograph % STEP:
            continue
        for _ in range(PLACES):
            row, column = (MARGIN + du.draw(320 - 2 * MARGIN, random) for _ in range(2))
            top, left = crop_around(row), crop_around(column)
            noisy, clean = (image[0, :, top:top + CROP, left:left + CROP] for image in images)
            others = clean + 2 * 30 / 255 * torch.randn(DRAWS, *clean.shape, generator=random)
            place = row - top, column - left
            for name, net in nets.items():
                field = used_field(net, noisy, *place)
                error = local_error(net, others, clean, *place)
                rows.append([name, photograph, row, column, f'{field:.4g}', f'{error:.4g}'])
    return rows


def load(name, arms):
    """A trained network; one of the ablation from the folder ``arms`` if there is one."""
    folder = CHECKPOINTS / name
    if arms and name in NARROW:
        folder = Path(arms) / f'{NARROW[name]}_seed0'
    return du.load_network(name, folder)[0].requires_grad_(False)


def write_places(file, rows):
    """Writes rows of `COLUMNS` to a CSV file; they take the place of those of the same networks."""
    renewed = {row[0] for row in rows}
    kept = [list(row.values()) for row in read_rows(file)] if Path(file).exists() else []
    rows = rows + [row for row in kept if row[0] not in renewed]
    rows.sort(key=lambda row: NETWORKS.index(row[0]))  # the places of a network keep their order
    with open(file, 'w', newline='', encoding='utf-8') as stream:
        csv.writer(stream, lineterminator='\n').writerows([COLUMNS, *rows])


# --- reading -------------------------------------------------------------------------------------

def read_places(file):
    """For each network the arrays field and error, both (photographs, places)."""
    by_network = {}
    for row in read_rows(file):
        places = by_network.setdefault(row['network'], {}).setdefault(row['photograph'], [])
        places.append((float(row['field']), float(row['error'])))
    return {name: np.moveaxis(np.array([*photographs.values()]), 2, 0)
            for name, photographs in by_network.items()}


def spearman(a, b):
    """The rank correlation of arrays (..., places), along the last axis."""
    a, b = (stats.rankdata(values, axis=-1) for values in (a, b))
    a, b = (values - values.mean(-1, keepdims=True) for values in (a, b))
    return (a * b).sum(-1) / np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1))


def correlation(a, b, draws=2000):
    """The rank correlation of two arrays (photographs, places) over all places, and its 95 %
    interval by the bootstrap over photographs: places of one photograph are much alike."""
    chosen = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    again = spearman(a[chosen].reshape(draws, -1), b[chosen].reshape(draws, -1))
    return spearman(a.ravel(), b.ravel()), *np.quantile(again, (0.025, 0.975))


def against(places, name, other):
    """At each place: log2 of the ratio of the fields of two networks, and the gain in dB."""
    (field, error), (other_field, other_error) = places[name], places[other]
    return np.log2(field / other_field), 10 * np.log10(other_error / error)


# --- printing ------------------------------------------------------------------------------------

def title(name):
    """What a network is called in the tables."""
    network, *words = name.split('_')
    narrow = ', narrow' if 'narrow' in words else ''
    return f'{du.NETWORKS[network].__name__}({14 if "14" in words else 6}){narrow}'


def field_table(places):
    """How many values each network averages."""
    rows = []
    for name, (field, _) in places.items():
        mean, half = du.over_photographs(field.mean(axis=1))
        low, middle, high = np.quantile(field, (0.1, 0.5, 0.9))
        rows.append([title(name), f'{middle:.0f}', f'{low:.0f} to {high:.0f}',
                     f'{mean:.0f} ± {half:.0f}'])
    return table(['network', 'median', 'tenth to ninth decile', 'mean'], rows)


def gain_table(places):
    """Whether a network gains where it uses a larger field than DnCNN(6)."""
    rows = []
    for name in places:
        other = 'dncnn_narrow' if name in NARROW else 'dncnn'
        if name == other or other not in places:
            continue
        ratio, gain = against(places, name, other)
        middle, half = du.over_photographs(ratio.mean(axis=1))
        times = f'{2 ** middle:.2f} ({2 ** (middle - half):.2f} to {2 ** (middle + half):.2f})'
        within, margin = du.over_photographs(spearman(ratio, gain))
        between = spearman(ratio.mean(axis=1), gain.mean(axis=1))
        with_error, *_ = correlation(places[other][1], gain)
        local = '{:+.2f} ± {:.2f}'.format(*du.over_photographs(gain.mean(axis=1)))
        everywhere = '{:+.2f} ({:+.2f} to {:+.2f})'.format(*correlation(ratio, gain))
        rows.append([title(name), times, local, everywhere, f'{within:+.2f} ± {margin:.2f}',
                     f'{between:+.2f}', f'{with_error:+.2f}'])
    return table(['network', "field / DnCNN(6)'s", 'local gain (dB)', 'over all places',
                  'within photographs', 'of their means', "of the gain with DnCNN(6)'s error"],
                 rows)


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.used_field', description=__doc__.split('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--measure', action='store_true', help='measure it again: a quarter of an hour')
    add('--nets', nargs='+', choices=NETWORKS, default=NETWORKS, help='what to measure')
    add('--arms', help='folder of `programs.results ablation --out`; None: checkpoints/')
    add('--data', help='folder with train/ and test/ (see find_photographs)')
    add('--scores', default=CHECKPOINTS / 'used_field.csv', help='file of the places (CSV)')
    args = parser.parse_args(words)
    if args.measure:
        root = du.find_photographs(args.data)
        check_scores(args.scores, root)
        nets = {name: load(name, args.arms) for name in args.nets}
        write_places(args.scores, measure(nets, root))
    places = read_places(args.scores)
    print('Values averaged at a place, 1 / sum(g ** 2); mean with its 95 % interval over '
          'photographs.\n')
    print(*field_table(places), '', sep='\n')
    print('Against DnCNN(6) of the same width: the ratio of the fields (geometric mean), the local '
          'gain,\nand rank correlations of the two. 95 % intervals are over photographs.\n')
    print(*gain_table(places), sep='\n')


if __name__ == '__main__':
    run(main)
