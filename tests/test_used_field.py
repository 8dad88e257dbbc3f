"""The used field: how it is measured, its file, and what is printed of it."""
import csv

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import denoising_utils as du
from programs import used_field
from programs.tables import read_rows

FILE = du.HERE / 'checkpoints' / 'used_field.csv'
NAMES = [*used_field.WIDE, *used_field.NARROW]
ROWS = read_rows(FILE)


def mean_of(pixels, channels):
    """A network that is a plain mean over a square of pixels, of one channel or of all three."""
    net = nn.Conv2d(3, 3, pixels, padding=pixels // 2, groups=3 // channels, bias=False)
    nn.init.constant_(net.weight, 1 / (pixels ** 2 * channels))
    return net


def cells(line):
    return [cell.strip() for cell in line.split('|')[1:-1]]


# --- measuring -----------------------------------------------------------------------------------

@pytest.mark.parametrize('pixels, channels, values', [(1, 1, 1), (3, 1, 9), (5, 1, 25), (3, 3, 27)])
def test_the_field_of_a_mean_is_its_number_of_values(pixels, channels, values):
    x = torch.randn(3, 12, 14)
    found = used_field.used_field(mean_of(pixels, channels), x, 6, 7)
    assert found == pytest.approx(values, rel=1e-5)


def test_the_filter_of_a_network_is_what_it_does():
    """DUDnCNN is linear for changes so small that no ReLU switches."""
    torch.manual_seed(0)
    net, x = du.DUDnCNN(4, C=4).double().eval(), torch.rand(3, 40, 40, dtype=torch.float64)
    filters = used_field.equivalent_filters(net, x, 19, 20)
    change = 1e-7 * torch.randn_like(x)
    with torch.no_grad():
        found = (net((x + change)[None]) - net(x[None]))[0, :, 19, 20]
    assert filters.shape == (3, *x.shape)
    assert found.numpy() == pytest.approx((filters * change).sum((1, 2, 3)).numpy(), rel=1e-3)


@pytest.mark.parametrize('name', ['dncnn', 'udncnn', 'dudncnn', 'dncnn_14'])
@pytest.mark.parametrize('row, column', [(40, 279), (101, 42), (163, 166)])
def test_the_crop_is_large_enough(name, row, column):
    """Field and error in the crop are those in the whole image, of 320x320."""
    net = used_field.load(name, None)
    clean = torch.zeros(3, 320, 320)
    random = torch.Generator().manual_seed(0)
    noisy = clean + 2 * 30 / 255 * torch.randn(clean.shape, generator=random)
    top, left = used_field.crop_around(row), used_field.crop_around(column)
    assert top % net.pooling_cell == left % net.pooling_cell == 0
    assert min(row - top, column - left) >= 40
    assert max(row - top, column - left) < used_field.CROP - 40
    # A part that is larger by 32 pixels on each side, as far as there are so many.
    larger = [(max(0, start - 32), start + used_field.CROP + 32) for start in (top, left)]
    found = []
    usual = [(start, start + used_field.CROP) for start in (top, left)]
    for (first_row, last_row), (first_column, last_column) in (usual, larger):
        place = row - first_row, column - first_column
        x, d = (image[:, first_row:last_row, first_column:last_column]
                for image in (noisy, clean))
        found.append((used_field.used_field(net, x, *place),
                      used_field.local_error(net, x[None], d, *place)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_measurement_again_gives_the_file(photographs, monkeypatch):
    """The first places of the first photograph."""
    def first_pair(root):
        yield next(pairs(root))

    pairs = du.benchmark_pairs
    monkeypatch.setattr(du, 'benchmark_pairs', first_pair)
    monkeypatch.setattr(used_field, 'PLACES', 2)
    for name in ('dudncnn', 'pooling_narrow'):
        again = used_field.measure({name: used_field.load(name, None)}, photographs)
        stored = [row for row in ROWS if row['network'] == name][:2]
        for row, values in zip(stored, again, strict=True):
            assert list(row.values())[:4] == [str(value) for value in values[:4]]
            assert [float(row['field']), float(row['error'])] == pytest.approx(
                [float(value) for value in values[4:]], rel=0.02)


# --- the file ------------------------------------------------------------------------------------

def test_all_networks_were_measured_at_the_same_places():
    """At least a hundred, in ten photographs, far from the border."""
    by_network = {}
    for row in ROWS:
        place = tuple(int(row[key]) for key in ('photograph', 'row', 'column'))
        by_network.setdefault(row['network'], []).append(place)
    assert [*by_network] == NAMES
    places = by_network['dncnn']
    assert all(others == places for others in by_network.values())
    assert len(set(places)) == len(places) >= 100
    assert {place[0] for place in places} == {*range(0, 100, 10)}
    assert all(40 <= n < 280 for place in places for n in place[1:])


def test_rows_of_a_network_are_renewed(tmp_path):
    file = tmp_path / 'places.csv'
    used_field.write_places(file, [['skips_narrow', 0, 40, 50, '9.00', '0.1'],
                                   ['dncnn', 0, 40, 50, '7.00', '0.2']])
    used_field.write_places(file, [['skips_narrow', 0, 40, 50, '8.00', '0.3']])
    with open(file, newline='') as stream:
        header, *rows = csv.reader(stream)
    assert tuple(header) == used_field.COLUMNS
    assert [row[0] for row in rows] == ['dncnn', 'skips_narrow'] and rows[1][4:] == ['8.00', '0.3']


# --- what is printed -----------------------------------------------------------------------------

def test_what_is_printed_is_in_the_file(capsys):
    used_field.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    values = {name: {key: np.array([float(row[key]) for row in ROWS if row['network'] == name])
                     for key in ('field', 'error')} for name in NAMES}
    fields, gains = lines[:len(NAMES) + 1], lines[len(NAMES) + 1:]

    for name, line in zip(NAMES, fields[1:], strict=True):
        field = values[name]['field']
        shown, median, _, mean = cells(line)
        low, high = stats.ttest_1samp(field.reshape(10, -1).mean(1), 0).confidence_interval()
        assert shown == used_field.title(name)
        assert median == f'{np.median(field):.0f}'
        assert mean == f'{field.mean():.0f} ± {(high - low) / 2:.0f}'

    compared = [name for name in NAMES if name not in ('dncnn', 'dncnn_narrow')]
    for name, line in zip(compared, gains[1:], strict=True):
        other = values['dncnn_narrow' if name.endswith('narrow') else 'dncnn']
        ratio = values[name]['field'] / other['field']
        gain = 10 * np.log10(other['error'] / values[name]['error'])
        shown, times, mean, everywhere, within, between, with_error = cells(line)
        assert shown == used_field.title(name)
        assert times.startswith(f'{stats.gmean(ratio):.2f} (')
        assert mean.startswith(f'{gain.mean():+.2f} ± ')
        assert everywhere.startswith(f'{stats.spearmanr(ratio, gain).statistic:+.2f} (')
        photographs = [stats.spearmanr(*pair).statistic
                       for pair in zip(ratio.reshape(10, -1), gain.reshape(10, -1))]
        assert within.startswith(f'{np.mean(photographs):+.2f} ± ')
        means = np.log(ratio).reshape(10, -1).mean(1), gain.reshape(10, -1).mean(1)
        assert between == f'{stats.spearmanr(*means).statistic:+.2f}'
        assert with_error == f'{stats.spearmanr(other["error"], gain).statistic:+.2f}'


def test_the_interval_of_a_correlation():
    """It is narrow about 1 where the two agree, and wide about 0 where they have no relation."""
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 10, 12))
    assert used_field.correlation(a, np.exp(a)) == pytest.approx((1, 1, 1))
    r, low, high = used_field.correlation(a, b)
    assert r == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic)
    assert low < 0 < high and 0.2 < high - low < 1
