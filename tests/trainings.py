"""The program of the trainings that tests and `make soak` start as processes of their own.

    python -m tests.trainings kills FOLDER 100      kills trainings 100 times, and compares them
    python -m tests.trainings presses FOLDER 100    presses Ctrl-C twice, 100 times
    python -m tests.trainings hold FOLDER           trains, and waits for a file to go on
    python -m tests.trainings starts FOLDER 2       starts two trainings of one folder at once
    torchrun ... -m tests.trainings processes FOLDER    is one of several processes

It starts in the checkout. `kills`, `presses` and `starts` print a dict in JSON, and exit with 1
if a training failed, or ended otherwise than without the interruption. They fork: torch is imported
once.
"""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, is_checkpoint, make, same
from tests.together import processes

EPOCHS = 5


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
    return make(
        folder, Net(width, dropout=0.5), Data(24, noise=0.1), Data(5, noise=0.1), best_by='loss',
        scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS),
        perform_validation_during_training=True, **options)


def train(folder, workers=0):
    """One process of a training, with a callback that draws."""
    exp = build_training(folder, num_workers=workers, also_save={'ballast': Ballast()})

    def draw(e):
        torch.rand(random.randrange(1, 9))
        np.random.rand()
        random.random()

    exp.run(EPOCHS, draw)


def train_on(folder, again):
    """A process that is interrupted, of 700,000 parameters.

    As in a notebook, where run is called ``again``, or as a script, which ends.
    """
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
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[:buffer.tell() // 2])
        file.flush()
        die()

    if where == 'in the middle':
        of_checkpoint = counted(save, before=half)

        def save_or_die(state, file):
            (of_checkpoint if is_checkpoint(state) else save)(state, file)

        torch.save = save_or_die
    elif where == 'before fsync':
        os.fsync = counted(fsync, before=die)
    elif where == 'before rename':
        os.replace = counted(replace, before=die)
    else:
        os.replace = counted(replace, after=die)


def start(work, *args, moment=None):
    """Forks a training, in a group of its own with its workers.

    Its exit status is 0 when it is done, 2 when it was interrupted, 1 when it failed.
    """
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
    # Here too: the parent may kill the group before the child has come to make it.
    os.setpgid(child, child)
    return child


def read(folder):
    return {name: nt.load_checkpoint(folder / name)
            for name in ('checkpoint.pth.tar', 'best.pth.tar')}


def finish(work, folder, *args):
    """Trains without an interruption. Returns the checkpoints, last and best, and the seconds."""
    begin = time.time()
    assert os.waitpid(start(work, folder, *args), 0)[1] == 0
    return read(folder), time.time() - begin


def differing(folder, expected):
    """What is another value than in the uninterrupted training."""
    different = []
    for name, state in read(folder).items():
        for key, value in expected[name].items():
            if key != 'Seconds' and not same(value, state.get(key)):
                different.append(f'{folder}/{name}: {key}')
    return different


def kill_trainings(folder, count):
    """Kills processes; says of each finished training whether it is the one never interrupted."""
    moments = random.Random(0)
    whole, seconds = finish(train, folder / 'whole')
    with_workers, _ = finish(train, folder / 'workers', 1)
    result = {'kills': 0, 'in writing': 0, 'trainings': 0, 'different': [], 'failed': 0}
    places = 'in the middle', 'before fsync', 'before rename', 'after rename'
    planned = list(itertools.product(places, (1, 3, 4)))
    while (result['kills'] < count or result['trainings'] < 4) and not result['failed']:
        workers = int(result['trainings'] == 1)
        here = folder / str(result['trainings'])
        # One process after the other, until one has not been killed.
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
        # One process after the other, until one has not been interrupted.
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
                    # Harmless for a process that has ended: nobody has waited for it yet.
                    os.kill(child, signal.SIGINT)
                    result['double presses'] += 1
        result['trainings'] += 1
        result['failed'] += ended != 0
        result['different'] += differing(here, whole) if ended == 0 else []
    return result


def hold(folder):
    """Trains, and waits in the callback until it may go on."""
    exp = make(folder)

    def wait(e):
        if e.epoch == 2:
            (Path(folder) / 'holding').touch()
        while e.epoch == 2 and not (Path(folder) / 'go').exists():
            time.sleep(0.02)

    exp.run(4, wait)


def begin(folder, output):
    """Trains, and writes into a file what it says."""
    with open(output, 'w') as file, contextlib.redirect_stdout(file):
        try:
            make(folder).run(4)
        except RuntimeError as error:
            print(error)


def start_trainings(folder, count):
    """Starts processes with one folder at once; returns what each of them said."""
    outputs = [folder / f'said{k}' for k in range(count)]
    folder.mkdir(exist_ok=True)
    children = [start(begin, folder / 'shared', output) for output in outputs]
    failed = [os.waitpid(child, 0)[1] != 0 for child in children]
    said = [output.read_text() for output in outputs]
    return {'said': said, 'different': [], 'failed': sum(failed)}


def main():
    name, folder, *count = sys.argv[1:]
    torch.set_num_threads(1)
    if count:
        # What an optimizer imports is imported once, and not in every process: a second each.
        torch.optim.Adam([torch.zeros(1)])
        work = {'kills': kill_trainings, 'presses': press_trainings, 'starts': start_trainings}
        result = work[name](Path(folder), int(count[0]))
        print(json.dumps(result))
        sys.exit(bool(result['different'] or result['failed']))
    else:
        {'hold': hold, 'processes': processes}[name](folder)


if __name__ == '__main__':
    main()
