"""Presses Ctrl-C in trainings with worker processes, for tests/test_ctrl_c_with_workers.py.

    python -m tests.interrupted_workers FOLDER 20          of loaders that nntools makes
    python -m tests.interrupted_workers FOLDER 20 ready    of a DataLoader with workers of its own

It starts in the checkout. Each training is a group of processes; as in a terminal, all of them get
SIGINT, at a random moment. It prints a list in JSON: how each ended, and what it said.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.data as td

from tests.helpers import Data, make
from tests.trainings import start

ENDINGS = {0: 'done', 1: 'failed', 2: 'interrupted'}


class Slow(Data):
    def __getitem__(self, k):
        time.sleep(0.005)
        return super().__getitem__(k)


def train(folder, ready, said):
    """Trains on, until it is interrupted; then for one epoch more, as in a notebook."""
    with open(said, 'w') as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)  # for the workers too
        data = Slow(24, noise=0.1)
        if ready:
            data = td.DataLoader(data, 4, shuffle=True, num_workers=2)
        exp = make(folder, train=data, val=Slow(7), num_workers=2,
                   perform_validation_during_training=True)
        (folder / 'begun').touch()
        try:
            exp.run(10_000)
        except KeyboardInterrupt:
            exp.run(exp.epoch + 1)
            raise


def press(folder, ready, moment):
    """Starts a training, interrupts it, and says what came of it."""
    said = folder / 'said'
    folder.mkdir(parents=True)
    child = start(train, folder, ready, said)
    while not (folder / 'begun').exists():
        time.sleep(0.01)
    time.sleep(moment)
    done = 0
    while not done:  # a press in the middle of a fork is lost, as Python ignores it: again, then
        os.killpg(child, signal.SIGINT)
        waited = time.monotonic()
        while not done and time.monotonic() - waited < 5:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # nobody should be left
        os.killpg(child, signal.SIGKILL)
        return 'left workers', said.read_text()
    return ENDINGS.get(os.waitstatus_to_exitcode(status), 'killed'), said.read_text()


def main():
    folder, count, *ready = sys.argv[1:]
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # imports once what it needs
    moments = random.Random(0)
    results = [press(Path(folder) / str(k), bool(ready), moments.uniform(0, 1))
               for k in range(int(count))]
    print(json.dumps(results))


if __name__ == '__main__':
    main()
