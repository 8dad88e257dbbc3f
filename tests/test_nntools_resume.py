"""nntools: killed and interrupted processes, and torchrun.

This file is also the program that these tests and ``make soak`` start: ``python test_nntools_resume.py
kills FOLDER 100`` forks, kills and compares trainings (torch is imported once), ``presses FOLDER 100``
presses Ctrl-C twice each time, ``torchrun ... processes FOLDER`` is one of two processes that train
together.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data as td

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from test_nntools import Data, Net, Stats, forks, make, same  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

import nntools as nt  # noqa: E402

EPOCHS = 5


# --- kills and interrupts -------------------------------------------------------------------------

class Ballast:
    """Makes the checkpoint large, so that many kills hit while it is written."""

    def state_dict(self):
        return {'zeros': torch.zeros(300_000)}

    def load_state_dict(self, state):
        pass


def build_training(folder, width=4, **options):
    """A training with dropout, noise, a schedule and validation."""
    torch.set_num_threads(1)
    random.seed(time.time())  # whatever was drawn before must not matter
    torch.manual_seed(random.getrandbits(32))
    return make(folder, Net(width, dropout=0.5), Data(24, noise=0.1), Data(5, noise=0.1), best_by='loss',
                scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS),
                perform_validation_during_training=True, **options)


def train(folder, workers=0):
    """One process of a training, with a callback that draws."""
    exp = build_training(folder, num_workers=workers, also_save={'ballast': Ballast()})
    exp.run(EPOCHS, lambda e: (torch.rand(random.randrange(1, 9)), np.random.rand(), random.random()))


def train_on(folder, again):
    """A process that is interrupted, of 700,000 parameters: as in a notebook, where run is called
    ``again``, or as a script, which ends."""
    exp = build_training(folder, width=100_000)
    while True:  # also after the last epoch: a second press can come while that is saved
        try:
            return exp.run(EPOCHS)
        except KeyboardInterrupt:
            if not again:
                raise


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """Arranges that this process kills itself at a moment of its writing: (where, n-th time)."""
    where, left = moment
    fsync, replace, save = os.fsync, os.replace, torch.save

    def counted(function, before=None, after=None):
        def call(*args):
            nonlocal left
            left -= 1
            if left == 0 and before:
                before(*args)
            function(*args)
            if left == 0 and after:
                after(*args)
        return call

    def half(state, file):
        import io
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[:buffer.tell() // 2])
        file.flush()
        die()

    if where == 'in the middle':
        torch.save = counted(save, before=half)
    elif where == 'before fsync':
        os.fsync = counted(fsync, before=die)
    elif where == 'before rename':
        os.replace = counted(replace, before=die)
    else:
        os.replace = counted(replace, after=die)


def start(work, *args, moment=None):
    """Forks a training, in a group of its own with its workers. Exit status: 0 done, 2 interrupted, 1 failed."""
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child == 0:
        code = 2
        try:
            try:
                os.setpgid(0, 0)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if moment:
                    die_at(moment)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                work(*args)
                code = 0
            except KeyboardInterrupt:
                pass
            except BaseException:
                code = 1
                traceback.print_exc()
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.setpgid(child, child)  # here too: the parent may kill the group before the child has come to make it
    return child


def finish(work, folder, *args):
    """Trains without an interruption. Returns the checkpoints, the last and the best, and the seconds."""
    begin = time.time()
    assert os.waitpid(start(work, folder, *args), 0)[1] == 0
    return read(folder), time.time() - begin


def read(folder):
    return {name: nt.load_checkpoint(folder / name) for name in ('checkpoint.pth.tar', 'best.pth.tar')}


def differing(folder, expected):
    return [f'{folder}/{name}: {key}' for name, state in read(folder).items() for key in expected[name]
            if key != 'Seconds' and not same(expected[name][key], state.get(key))]


def kill_trainings(folder, count):
    """Kills processes; says of each finished training whether it is the one never interrupted."""
    moments = random.Random(0)
    whole, seconds = finish(train, folder / 'whole')
    with_workers, _ = finish(train, folder / 'workers', 1)
    result = {'kills': 0, 'in writing': 0, 'trainings': 0, 'different': [], 'failed': 0}
    planned = [(where, n) for where in ('in the middle', 'before fsync', 'before rename', 'after rename')
               for n in (1, 3, 4)]
    while (result['kills'] < count or result['trainings'] < 4) and not result['failed']:
        workers = int(result['trainings'] == 1)
        here = folder / str(result['trainings'])
        while True:
            moment = planned.pop() if planned and not workers else None
            child = start(train, here, workers, moment=moment)
            if moment is None:
                time.sleep(moments.uniform(0, 0.6) * seconds * (4 if workers else 1))
                status = os.waitpid(child, os.WNOHANG)
                if status[0] == 0:
                    os.killpg(child, signal.SIGKILL)
                    status = os.waitpid(child, 0)
            else:
                status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status[1]):
                break
            result['kills'] += 1
            result['in writing'] += moment is not None or any(here.glob('*.tmp'))
        result['trainings'] += 1
        result['failed'] += status[1] != 0
        result['different'] += differing(here, with_workers if workers else whole)
    return result


def press_trainings(folder, count):
    """Interrupts processes, twice within 3 to 90 ms each time; says as above what came of them."""
    moments = random.Random(0)
    whole, seconds = finish(train_on, folder / 'whole', True)
    result = {'double presses': 0, 'trainings': 0, 'different': [], 'failed': 0}
    while (result['double presses'] < count or result['trainings'] < 4) and not result['failed']:
        here, ended = folder / str(result['trainings']), (2 << 8)
        while ended == 2 << 8:
            child, done = start(train_on, here, result['trainings'] % 2 == 0), 0
            while not done:
                time.sleep(moments.uniform(0, 0.5) * seconds)
                if result['double presses'] >= count:
                    done, ended = os.waitpid(child, 0)
                    break
                done, ended = os.waitpid(child, os.WNOHANG)
                if not done:
                    os.kill(child, signal.SIGINT)
                    time.sleep(moments.uniform(0.003, 0.09))
                    os.kill(child, signal.SIGINT)  # of a process that has ended it is harmless: nobody has waited for it
                    result['double presses'] += 1
        result['trainings'] += 1
        result['failed'] += ended != 0
        result['different'] += differing(here, whole) if ended == 0 else []
    return result


def command(name, folder, count):
    """What such a command says, as a dict."""
    done = subprocess.run([sys.executable, __file__, name, str(folder), str(count)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@forks
def test_killed_processes_end_as_if_they_had_not_been(tmp_path):
    result = command('kills', tmp_path, 33)
    assert result['kills'] >= 33 and result['in writing'] >= 12 and result['trainings'] >= 4, result


# --- torchrun -------------------------------------------------------------------------------------

class Affine(nt.NeuralNetwork):
    """Without batch norm or dropout, so that two halves of a batch are as good as the whole."""

    def __init__(self):
        super().__init__()
        self.frozen, self.layer = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.frozen(x))

    def criterion(self, y, d):
        return torch.nn.functional.mse_loss(y, d)


class AllKinds(Stats):
    """Sums of all kinds, beside a constant."""
    tenth = 0.1

    def init(self):
        super().init()
        self.count, self.array, self.values, self.constant = torch.zeros(2), np.zeros(1), [], 7
        self.names, self.ready, self.classes = ['a', 'b'], True, {'x': 1}

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.count += torch.tensor([len(x), 1])  # in place
        self.array = self.array + d.sum().item()
        self.values += d.flatten().tolist()

    def summarize(self):
        return super().summarize() | {'count': self.count, 'array': self.array, 'constant': self.constant,
                                      'values': sorted(self.values), 'names': self.names, 'ready': self.ready}


class ByHand(nt.Experiment):
    """A step of its own, as subclasses have."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d


def build(folder, kind=nt.Experiment, seed=0, **options):
    torch.manual_seed(seed)
    net = Affine()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return kind(net, Data(22), Data(7), sgd, AllKinds(), str(folder), 4,
                scheduler=lr_scheduler.StepLR(sgd, 3), perform_validation_during_training=True, **options)


def plain(summary):
    """For JSON."""
    return {name: value.tolist() if hasattr(value, 'tolist') else value for name, value in summary.items()}


def processes(folder):
    """What each of two processes does."""
    folder, rank = Path(folder), int(os.environ['RANK'])
    said = {}
    exp = build(folder / 'shared', seed=rank)  # goes on from the one process before
    said['epoch'] = exp.epoch
    said['evaluation'] = plain(exp.evaluate())
    said['one sample'] = plain(exp.evaluate(Data(1)))['count']
    exp.run(4)
    said['predicted'] = len(exp.predict(Data(5)))
    fresh = build(folder / f'fresh{rank}', seed=rank)  # other weights on each: those of rank 0 count
    fresh.run(3)
    by_hand = build(folder / f'by_hand{rank}', ByHand, seed=rank)
    by_hand.run(3)
    for name, e in (('shared', exp), ('fresh', fresh), ('by_hand', by_hand)):
        said[name] = {k: v.tolist() for k, v in e.net.state_dict().items()}
    said['steps'] = exp.stats_manager.number_update
    short = nt.Experiment(exp.net, td.Subset(Data(), range(7)), Data(7), exp.optimizer, AllKinds(), str(folder / 'short'), 4)
    short.run(1)
    said['trained on'] = plain(short.history[0])['count']
    try:
        nt.Experiment(exp.net, Data(), Data(), exp.optimizer, Stats(), str(folder / 'odd'), 3)
    except ValueError as error:
        said['odd'] = str(error)
    (folder / f'rank{rank}.json').write_text(json.dumps(said))


@pytest.mark.skipif(sys.platform == 'win32', reason='torchrun needs libuv, which wheels for Windows lack (PyTorch issue 139990)')
def test_two_processes_of_torchrun(tmp_path):
    one = build(tmp_path / 'shared')
    one.run(2)
    figures = plain(one.evaluate())
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                           __file__, 'processes', str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f'rank{rank}.json').read_text()) for rank in (0, 1))
    assert first == second
    assert first['epoch'] == 2 and first['predicted'] == 5
    assert first['evaluation'].pop('loss') == pytest.approx(figures.pop('loss'), rel=1e-6)
    assert first['evaluation'].pop('error') == pytest.approx(figures.pop('error'), rel=1e-6)
    assert first['evaluation'].pop('array') == pytest.approx(figures.pop('array'), rel=1e-6)
    assert first['evaluation'] == figures and figures['count'] == [7, 2] and figures['constant'] == 7
    assert figures['names'] == ['a', 'b'] and figures['ready'] is True
    assert first['one sample'] == [1, 1]
    assert first['trained on'] == [4, 2]  # one step of 4 samples, 2 on each
    assert first['odd'] == 'batch_size must be a multiple of the number of processes, 2, got 3'
    assert done.stdout.count('Epoch 3/4') == 1
    # only the first process writes; the other one's folders are not there
    assert (tmp_path / 'fresh0').exists() and not (tmp_path / 'fresh1').exists()

    def close(state, exp):
        return all(np.allclose(state[k], v.numpy(), atol=1e-6) for k, v in exp.net.state_dict().items())

    one = build(tmp_path / 'one')  # the same training in one process
    one.run(3)
    assert close(first['fresh'], one) and close(first['by_hand'], one)
    one.run(4)
    assert close(first['shared'], one)
    back = build(tmp_path / 'shared')  # and the two's checkpoint in one process again
    assert back.epoch == 4
    back.run(6)
    one.run(6)
    assert close({k: v.tolist() for k, v in back.net.state_dict().items()}, one)
    assert back.history[5][1]['loss'] == pytest.approx(one.history[5][1]['loss'], rel=1e-4)


if __name__ == '__main__':
    name, folder, *count = sys.argv[1:]
    torch.set_num_threads(1)
    if name == 'processes':
        processes(folder)
    else:
        result = {'kills': kill_trainings, 'presses': press_trainings}[name](Path(folder), int(count[0]))
        print(json.dumps(result))
        sys.exit(bool(result['different'] or result['failed']))
