"""nntools: seeds, and whose random numbers a training draws."""

import random

import numpy as np
import pytest
import torch

import nntools as nt
from tests.helpers import Data, Net, Stats, end, make, same


def test_the_random_stream_stays_what_it_was(tmp_path):
    """Trainings that were begun with an earlier version of the file go on with this one."""
    class Watch(nt.Experiment):
        def step(self, batch):
            drawn.extend([torch.rand(1).item(), random.random(), np.random.rand()])
            order.extend(round(22 * v) for v in batch[0][:, 2].tolist())
            return super().step(batch)

    net, order, drawn = Net(), [], []
    Watch(
        net, Data(), Data(7), torch.optim.Adam(net.parameters()), Stats(), str(tmp_path), 4, seed=0
    ).run(1)
    assert nt.mix_seeds(0, 1, 0) == 2918264622725855778
    assert order[:8] == [9, 6, 12, 18, 20, 14, 8, 19]
    assert drawn[:3] == pytest.approx(
        [0.8556534051895142, 0.23069021445216942, 0.26373721948458095]
    )


@pytest.mark.parametrize('act', ['run', 'evaluate', 'predict', 'make'])
def test_the_random_numbers_of_the_caller_are_left_alone(tmp_path, act):
    exp = make(tmp_path, Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if act == 'run':
        exp.run(1)
    elif act == 'make':
        nt.Experiment(exp.net, Data(), Data(), exp.optimizer, Stats(), str(tmp_path / 'new'))
    else:
        getattr(exp, act)(Data(noise=0.1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_seeds_without_a_shift_of_numpy(monkeypatch):
    """np.uint64 >> 1 is a TypeError in numpy 1.26, which requirements.txt allows."""
    class Old(int):
        def __rshift__(self, other):
            raise TypeError("ufunc 'right_shift' not supported for the input types")

    class Sequence(np.random.SeedSequence):
        def generate_state(self, *args):
            return list(map(Old, super().generate_state(*args)))

    monkeypatch.setattr(np.random, 'SeedSequence', Sequence)
    assert nt.mix_seeds(0, 1, 0) == 2918264622725855778
    assert type(nt.mix_seeds(np.uint64(3), np.int32(4))) is int


def test_seeds_are_drawn_from_torchs_generator(tmp_path):
    def run(name, manual_seed, *epochs):
        for number in epochs:
            torch.manual_seed(manual_seed)
            state = torch.get_rng_state()
            exp = make(tmp_path / name, Net(dropout=0.5), Data(noise=0.1), seed=None)
            assert torch.equal(state, torch.get_rng_state())
            exp.run(number)
            manual_seed += 7
        return exp

    five = [run(f'seed{seed}', seed, 3) for seed in range(5)]
    assert len({exp.history[-1]['loss'] for exp in five}) == 5
    assert same(end(run('again', 2, 3)), end(five[2]))  # reproducible
    # Exact, too, whatever is drawn before the resume.
    assert same(end(run('resumed', 2, 1, 2, 3)), end(five[2]))
    given = make(tmp_path / 'given', Net(dropout=0.5), Data(noise=0.1), seed=11)
    given.run(3)
    assert len({exp.history[-1]['loss'] for exp in [*five, given]}) == 6


def test_who_iterates_the_loader_gets_new_orders(tmp_path):
    """A subclass with a `run` of its own does: each of its epochs must be shuffled anew."""
    net = Net()
    exp = nt.Experiment(
        net, Data(), Data(), torch.optim.Adam(net.parameters()), nt.StatsManager(), str(tmp_path)
    )
    orders = []
    for _ in range(3):
        orders.append([x[:, 2].tolist() for x, d in exp.train_loader])
    assert orders[0] != orders[1] != orders[2] != orders[0]
