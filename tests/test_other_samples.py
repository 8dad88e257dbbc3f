"""nntools: data that is not as it was is said; so are random numbers that can't be repeated."""

import numpy as np
import pytest
import torch
import torch.utils.data as td

import nntools as nt
from tests.helpers import Data, make, same


class Scaled(Data):
    """Describes itself as before, whatever it gives."""

    def __init__(self, n=22, scale=1.0, noise=0.0):
        super().__init__(n, noise)
        self.scale = scale

    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x * self.scale, d


def test_data_that_was_normalised_since(tmp_path, capsys):
    """The history says one loss, an evaluation another: now the program says why."""
    make(tmp_path, train=Scaled()).run(5)
    capsys.readouterr()
    exp = make(tmp_path, train=Scaled(scale=0.1))
    note = f'NOTE: {exp.output_dir} was trained for 5 epochs by other samples of train_set\n'
    assert exp.epoch == 5 and capsys.readouterr().out == note
    exp.run(5)
    last = '5 epochs were trained before, by other samples of train_set\n'
    assert capsys.readouterr().out.endswith(last)
    exp.run(6)
    assert capsys.readouterr().out.endswith('Finish training for 6 epochs\n')
    make(tmp_path, train=Scaled(scale=0.1))
    assert capsys.readouterr().out == ''


class Relabelled(Data):
    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x, 1 - d


class Images(td.Dataset):
    """Arrays of bytes and classes, which a collate_fn makes tensors of."""

    def __init__(self, inverted=False):
        self.inverted = inverted

    def __len__(self):
        return 22

    def __getitem__(self, k):
        pixels = np.full(3, 10 * k, np.uint8)
        return 255 - pixels if self.inverted else pixels, k % 2

    def __repr__(self):
        return 'Images()'


def tensors(samples):
    pixels = np.stack([x for x, _ in samples]).astype(np.float32)
    return torch.from_numpy(pixels) / 255, torch.tensor([[float(d)] for _, d in samples])


@pytest.mark.parametrize(
    'before, now',
    [
        ({'train': Data()}, {'train': Relabelled()}),
        ({'train': Images()}, {'train': Images(inverted=True)}),
        ({'train': td.DataLoader(Data(), 4)}, {'train': td.DataLoader(Scaled(scale=2.0), 4)}),
    ],
    ids=['targets', 'arrays', 'a ready loader'],
)
def test_other_samples_of_any_kind(tmp_path, capsys, before, now):
    options = {'collate_fn': tensors} if isinstance(before['train'], Images) else {}
    make(tmp_path, **before, **options).run(1)
    capsys.readouterr()
    make(tmp_path, **before, **options)
    assert 'NOTE' not in capsys.readouterr().out
    make(tmp_path, **now, **options)
    assert 'by other samples of train_set\n' in capsys.readouterr().out


@pytest.mark.parametrize('validates', [True, False])
def test_the_validation_set_counts_where_training_uses_it(tmp_path, capsys, validates):
    options = {'perform_validation_during_training': validates}
    make(tmp_path, val=Scaled(7), **options).run(1)
    capsys.readouterr()
    make(tmp_path, val=Scaled(7, scale=0.1), **options)
    assert ('by other samples of val_set\n' in capsys.readouterr().out) == validates


def test_both_sets_and_a_source_are_one_line(tmp_path, capsys):
    def error(y, d):
        return (y - d).abs()

    def larger(y, d):
        return 2 * (y - d).abs()

    options = {'perform_validation_during_training': True}
    make(tmp_path, train=Scaled(), val=Scaled(7), stats=nt.StatsManager({'e': error}),
         **options).run(5)
    capsys.readouterr()
    exp = make(tmp_path, train=Scaled(scale=0.1), val=Scaled(7, scale=0.1),
               stats=nt.StatsManager({'e': larger}), **options)
    assert capsys.readouterr().out == (
        f'NOTE: {exp.output_dir} was trained for 5 epochs by other '
        'source of statistics, samples of train_set, samples of val_set\n')
    exp.run(5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ('5 epochs were trained before, by other source of statistics, '
                    'samples of train_set, samples of val_set')


def test_noise_of_the_global_generators_is_the_same_each_time(tmp_path, capsys):
    options = {'train': Data(noise=1.0), 'val': Data(7, noise=1.0),
               'perform_validation_during_training': True}
    make(tmp_path, **options).run(1)
    torch.manual_seed(5)
    np.random.seed(5)
    drawn = torch.get_rng_state(), np.random.get_state()[2]
    make(tmp_path, **options)
    assert same((torch.get_rng_state(), np.random.get_state()[2]), drawn)
    said = capsys.readouterr().out
    assert 'NOTE' not in said and 'generator' not in said


def test_rounding_of_another_machine_is_not_said(tmp_path, capsys):
    make(tmp_path, train=Scaled()).run(1)
    make(tmp_path, train=Scaled(scale=1 + 1e-5))
    assert 'NOTE' not in capsys.readouterr().out


class Opened(Data):
    """Must be opened by the worker that reads it."""
    opened = 0

    def __getitem__(self, k):
        Opened.opened += 1
        return super().__getitem__(k)


def test_with_workers_no_sample_is_looked_at(tmp_path, capsys):
    make(tmp_path, train=Opened())
    assert Opened.opened > 0
    Opened.opened = 0
    make(tmp_path / 'b', train=Opened(), num_workers=1)
    assert Opened.opened == 0


class Broken(Data):
    def __getitem__(self, k):
        if k == 21:
            raise FileNotFoundError('the last one is missing')
        return super().__getitem__(k)


class Stream(td.IterableDataset):
    def __iter__(self):
        return (Data()[k] for k in range(8))


def test_data_that_can_not_be_looked_at(tmp_path, capsys):
    """An error shows in training, and no sooner; of a stream nothing is read ahead."""
    exp = make(tmp_path / 'a', train=Broken())
    with pytest.raises(FileNotFoundError, match='the last one is missing'):
        exp.run(9)
    for _ in range(2):
        make(tmp_path / 'b', train=td.DataLoader(Stream(), 4)).run(1)
    assert 'NOTE' not in capsys.readouterr().out


# --- generators of its own -----------------------------------------------------------------------

class OfTorch(Data):
    def __init__(self, n=22):
        super().__init__(n)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x + torch.randn(3, generator=self.generator), d


class OfNumpy(Data):
    def __init__(self, n=22):
        super().__init__(n)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x + torch.from_numpy(self.generator.normal(size=3)).float(), d


@pytest.mark.parametrize('kind', [OfTorch, OfNumpy])
def test_a_generator_of_its_own_is_said(tmp_path, capsys, kind):
    text = 'draws random numbers from a generator of its own'
    make(tmp_path / 'a', train=kind()).run(1)
    assert capsys.readouterr().out.count(f'train_set {text}') == 1
    make(tmp_path / 'b', train=td.DataLoader(kind(), 4))
    assert capsys.readouterr().out.count(f'train_set {text}') == 1
    make(tmp_path / 'c', val=kind(7), perform_validation_during_training=True)
    said = capsys.readouterr().out
    assert said.count(f'val_set {text}') == 1 and 'train_set' not in said
    make(tmp_path / 'd', val=kind(7))
    assert text not in capsys.readouterr().out


def test_samples_that_can_not_be_repeated_are_no_others(tmp_path, capsys):
    """They are others each time: that is said, and nothing more."""
    for _ in range(2):
        data = OfNumpy()
        data.generator = np.random.default_rng()
        make(tmp_path, train=data).run(2)
        said = capsys.readouterr().out
        assert 'generator of its own' in said and 'NOTE' not in said
        assert said.endswith('Finish training for 2 epochs\n')
