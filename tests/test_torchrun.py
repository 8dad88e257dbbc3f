"""nntools: two processes of torchrun that train together."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import nntools as nt
from tests.helpers import CHECKOUT, Data, weights
from tests.together import Adversarial, SometimesUsed, TwoLosses, build, build_two, plain

pytestmark = [
    pytest.mark.xdist_group('torchrun'),  # all with one start
    pytest.mark.skipif(
        sys.platform == 'win32',
        reason='torchrun needs libuv, which wheels for Windows lack (PyTorch issue 139990)')]


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    """The folder of two processes, what one process had found there before, and the output."""
    folder = tmp_path_factory.mktemp('torchrun')
    one = build(folder / 'shared')
    one.run(2)
    figures = plain(one.evaluate())
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                '--nproc-per-node', '2', '-m', 'tests.trainings', 'processes', str(folder)]
    done = subprocess.run(torchrun, cwd=CHECKOUT, env=os.environ | {'OMP_NUM_THREADS': '1'},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, figures, done.stdout


def said_by_both(folder, part):
    """What each of the two processes said."""
    return [json.loads((folder / f'rank{rank}.json').read_text())[part] for rank in (0, 1)]


@pytest.fixture
def ranks(together):
    """The folder, and what each of the two processes said of the trainings with callbacks."""
    folder, _, _ = together
    return folder, said_by_both(folder, 'several trainings')


def test_two_processes_train_as_one(together, tmp_path):
    folder, figures, stdout = together
    first, second = said_by_both(folder, 'one training')
    assert first == second
    assert first['epoch'] == 2 and first['predicted'] == 5
    for name in ('loss', 'error', 'array'):
        assert first['evaluation'].pop(name) == pytest.approx(figures.pop(name), rel=1e-6)
    assert first['evaluation'] == figures
    assert figures['count'] == [7, 2] and figures['constant'] == 7
    assert figures['names'] == ['a', 'b'] and figures['ready'] is True
    assert first['one sample'] == [1, 1]
    assert first['trained on'] == [4, 2]  # one step of 4 samples, 2 on each
    assert first['odd'] == 'batch_size must be a multiple of the number of processes, 2, got 3'
    # Two trainings of four epochs, one of which begins with the third: each is told once.
    assert stdout.count('Epoch 3/4') == 2 and stdout.count('Epoch 1/4') == 1
    # Only the first process writes; the other one's folders are not there.
    assert (folder / 'fresh0').exists() and not (folder / 'fresh1').exists()

    def close(state, exp):
        return all(np.allclose(state[name], value.numpy(), atol=1e-6)
                   for name, value in exp.net.state_dict().items())

    one = build(tmp_path / 'one')  # the same training in one process
    one.run(3)
    assert close(first['fresh'], one) and close(first['by_hand'], one)
    one.run(4)
    assert close(first['shared'], one)
    back = build(folder / 'shared')  # and the two's checkpoint in one process again
    assert back.epoch == 4
    back.run(6)
    one.run(6)
    assert close({k: v.tolist() for k, v in back.net.state_dict().items()}, one)
    assert back.history[5][1]['loss'] == pytest.approx(one.history[5][1]['loss'], rel=1e-4)


@pytest.mark.parametrize('kind', [nt.Experiment, TwoLosses, SometimesUsed, Adversarial])
def test_gradients_are_averaged_at_every_update(ranks, tmp_path, kind):
    """Two losses, unused layers and a GAN end with the same bits on both, and as in one process."""
    _, (first, second) = ranks
    assert first[kind.__name__] == second[kind.__name__]
    one = build_two(tmp_path, kind, grad_clip=1.0)
    before = weights(one.net)
    one.run(3)
    # Weight decay leaves it alone.
    assert np.allclose(first[kind.__name__]['unused.weight'], before['unused.weight'], atol=0)
    if kind is not SometimesUsed:  # whose two halves are other functions than the whole
        assert all(
            np.allclose(first[kind.__name__][name], value, atol=1e-5)
            for name, value in one.net.state_dict().items()
        )
    assert not np.allclose(first[kind.__name__]['body.weight'], before['body.weight'])


def test_a_callback_runs_on_one_process(ranks):
    folder, (first, second) = ranks
    # It may evaluate, save, write and stop.
    assert first['called'] == [0, 7, 1, 7, 2, 7] and second['called'] == []
    assert first['epoch'] == second['epoch'] == 2
    assert not (folder / 'callback1').exists()
    assert nt.load_checkpoint(folder / 'copy.pth.tar')['History'][1:]
    assert len(list(csv.DictReader(open(folder / 'history.csv')))) == 2


def test_statistics_are_those_of_all_processes(ranks):
    """A maximum is that of all; an own validation loader's samples count once."""
    _, (first, second) = ranks
    largest = max(Data(24)[k][1].item() for k in range(24))
    assert first['trained on'] == second['trained on'] and first['trained on']['samples'] == 24
    assert first['trained on']['largest'] == pytest.approx(largest)
    assert first['own loader'] == second['own loader'] and first['own loader']['samples'] == 7
    assert first['own loader']['largest'] == pytest.approx(
        max(Data(7)[k][1].item() for k in range(7))
    )


def test_an_error_on_one_process_ends_the_others_too(ranks):
    folder, (first, second) = ranks
    assert second['error'] == 'ArithmeticError' and 'error' in first
    assert all('start the program again' in said['parted'] for said in (first, second))
    assert len(nt.load_checkpoint(folder / 'failing' / 'checkpoint.pth.tar')['History']) == 1


def test_all_processes_follow_the_callback_of_the_first(ranks):
    """Rates, what is frozen, the weights of a second network.

    And a schedule that each process would step otherwise.
    """
    _, (first, second) = ranks
    assert first['phases'] == second['phases']
    assert first['phases']['rates'] == [0.01, 0.1] and not first['phases']['frozen']
