"""How fast nntools is, side by side with the plainest PyTorch that does the same.

    make benchmark                         # minutes; leave the machine alone meanwhile
    python -m programs.benchmark --quick   # seconds: only shows that it runs

Networks, data and photographs are measured by programs.benchmark_denoise.
"""
import copy
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data as td
from torch import nn

import denoising_utils as du
import nntools as nt
from programs import run
from programs.timing import (
    GIVEN_BACK,
    child,
    measure,
    ms,
    quietly,
    row,
    seconds,
    spread,
    there_and_back,
    timed,
)


class Small(nt.NeuralNetwork):
    """A classifier of a few thousand parameters: here the overhead of a step shows."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)

    def criterion(self, y, d):
        return F.cross_entropy(y, d)


# --- the loop -------------------------------------------------------------------------------------

def loop(args):
    row('A step of an epoch (in %: median, quartiles)', 'bare loop', 'Experiment', 'difference',
        'bare, again', 'aim')
    n = 8 if args.quick else 32
    crops = td.TensorDataset(*torch.randn(2, n, 3, args.size, args.size))
    name = f'  DnCNN(6), 4 crops of {args.size}x{args.size}'
    compare_epochs(name, du.DnCNN(6), crops, 4, args.repeats, '1 %')

    n = 256 if args.quick else 4096
    convolutions = Small(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(16 * 36, 10))
    perceptron = Small(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for kind, net, shape, aim in (('convolutional', convolutions, (1, 28, 28), '3 %'),
                                  ('perceptron', perceptron, (64,), '5 %')):
        samples = td.TensorDataset(torch.randn(n, *shape), torch.randint(10, (n,)))
        name = f'  {kind}, {du.count_parameters(net):,} parameters'
        compare_epochs(name, net, samples, 32, 5 * args.repeats, aim)


def compare_epochs(name, net, data, batch_size, repeats, aim):
    """An epoch of the bare loop, the same again, and one of `Experiment` over the same batches.

    That of the bare loop again shows how far two measurements of the same thing differ. That of
    `Experiment` is the second of a run, without its checkpoint, which has a row of its own.
    """
    loader = td.DataLoader(data, batch_size, shuffle=True, drop_last=True)

    def bare(net, adam):
        total = 0.0
        for x, d in loader:
            adam.zero_grad()
            loss = net.criterion(net(x), d)
            loss.backward()
            adam.step()
            total += loss.item()

    def make(folder):
        nets = [copy.deepcopy(net).train() for _ in range(3)]
        adams = [torch.optim.Adam(n.parameters(), 1e-4) for n in nets]
        exp = quietly(nt.Experiment, nets[2], data, None, adams[2], nt.StatsManager(),
                      tempfile.mkdtemp(dir=folder), batch_size)

        def epoch():
            quietly(exp.run, exp.epoch + 2)
            # without the checkpoint, and without what a run checks at its first batch
            return exp.table()[-1]['seconds']

        loops = [functools.partial(timed, bare, *pair) for pair in zip(nets[:2], adams)]
        return [*loops, epoch]

    with tempfile.TemporaryDirectory() as folder:
        times = there_and_back(functools.partial(make, folder), repeats)
    step = statistics.median(first for first, _, _ in times) / len(loader)
    control = [100 * (again / first - 1) for first, again, _ in times]
    difference = [100 * (ours / first - 1) for first, _, ours in times]
    microseconds = 1e4 * step * statistics.median(difference)
    row(name, ms(step, 2), f'{microseconds:+.0f} us', spread(difference), spread(control), aim)


# --- the start, and a long history ----------------------------------------------------------------

def start(args):
    """The start of a program whose data set is a list of samples."""
    n = 100 if args.quick else 10_000
    samples = [(torch.randn(1, 28, 28), k % 10) for k in range(n)]
    net = Small(nn.Flatten(), nn.Linear(784, 10))

    def bare():
        torch.optim.Adam(net.parameters())
        iter(td.DataLoader(samples, 16, shuffle=True))

    def experiment(path):
        adam = torch.optim.Adam(net.parameters())
        quietly(nt.Experiment, net, samples, None, adam, nt.StatsManager(), path)

    row(f'Start with a list of {n:,} images', 'bare program', 'Experiment', 'resumed', 'aim')
    with tempfile.TemporaryDirectory() as folder:
        times = seconds(bare, lambda: experiment(tempfile.mkdtemp(dir=folder)),
                        lambda: experiment(f'{folder}/old'), repeats=args.repeats)
    row('', *map(ms, times), '+ 1 s')


def history(args):
    """An epoch, with all that follows it, after many others and after none."""
    epochs = 200 if args.quick else 20_000
    row('An epoch and its end', 'the first', f'after {epochs:,}', 'difference (%)', 'aim')
    data = td.TensorDataset(torch.randn(512, 64), torch.randint(10, (512,)))

    def after(past, folder, save_every):
        net = Small(nn.Linear(64, 10))
        adam = torch.optim.Adam(net.parameters())
        exp = quietly(nt.Experiment, net, data, data, adam, nt.StatsManager(),
                      tempfile.mkdtemp(dir=folder), 32, True, save_every=save_every)
        exp.history = [(2.3, 2.3) for _ in range(past)]

        def epoch():
            begins = []  # the callback comes before the first epoch, and after each
            quietly(exp.run, exp.epoch + 5, lambda exp: begins.append(time.perf_counter()))
            return statistics.median(b - a for a, b in zip(begins, begins[1:]))

        return epoch

    for save_every in (10 ** 9, 1):
        with tempfile.TemporaryDirectory() as folder:
            first_and_late = [functools.partial(after, past, folder, save_every)
                              for past in (0, epochs)]
            times = there_and_back(functools.partial(called, first_and_late), args.repeats)
        first, late = (statistics.median(of_one) for of_one in zip(*times))
        difference = [100 * (b / a - 1) for a, b in times]
        row(f'  save_every={save_every}', ms(first), ms(late), spread(difference), '0 %')


def called(functions):
    return [function() for function in functions]


def given_back(args):
    """The loop, start and history once more, as where nobody has made the two settings of glibc."""
    print('The same where memory that was freed is given back:')
    words = ['-m', 'programs.benchmark', '--only', 'loop', 'start', 'history',
             '--size', args.size, '--repeats', args.repeats]
    if args.quick:
        words.append('--quick')
    print(child(words, GIVEN_BACK), end='')


# --- a large network ------------------------------------------------------------------------------

RESUME = """
import sys, time, torch, torch.utils.data as td
import nntools as nt
kind, folder, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
net = torch.nn.Linear(width, width, bias=False)
net.criterion = torch.nn.functional.mse_loss
adam = torch.optim.Adam(net.parameters())
data = td.TensorDataset(torch.randn(1, width), torch.randn(1, width))
begin = time.perf_counter()
if kind == 'bare':
    checkpoint = torch.load(f'{folder}/checkpoint.pth.tar', weights_only=True)
    net.load_state_dict(checkpoint['Net'])
    adam.load_state_dict(checkpoint['Optimizer'])
else:
    exp = nt.Experiment(net, data, None, adam, nt.StatsManager(), folder, 1)
seconds = time.perf_counter() - begin
if kind == 'train':
    exp.run(1)
peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]
print(seconds, int(peak[0]) / 1024)
"""
KEPT = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '4294967296'}


def resume(args):
    """Seconds and peak memory of a resume, each in a program of its own."""
    if not Path('/proc/self/status').exists():
        print('Resume: peak memory is read from /proc, which is not here')
        return
    width = 1000 if args.quick else 10_000
    row(f'Resume, {width ** 2 / 1e6:.0f} M parameters', 'load, s', 'Experiment, s', 'ratio',
        'load, MB', 'Experiment, MB', 'ratio')
    with tempfile.TemporaryDirectory() as folder:
        child(['-c', RESUME, 'train', folder, width])
        for label, settings in (('memory given back', {}), ('memory kept', KEPT)):
            runs = {'bare': [], 'resume': []}
            for kind in ('bare', 'resume', 'resume', 'bare'):
                said = child(['-c', RESUME, kind, folder, width], settings).splitlines()[-1]
                runs[kind].append([float(word) for word in said.split()])
            load_s, load_mb = np.mean(runs['bare'], 0)
            ours_s, ours_mb = np.mean(runs['resume'], 0)
            row(f'  {label}', f'{load_s:.2f}', f'{ours_s:.2f}', f'{ours_s / load_s:.2f} x',
                f'{load_mb:.0f}', f'{ours_mb:.0f}', f'{ours_mb / load_mb:.2f} x')


# --- evaluation and checkpoints -------------------------------------------------------------------

def evaluation(args):
    row('Evaluation', 'bare loop', 'Experiment', 'difference')
    subset = range(4 if args.quick else 20)
    test = du.NoisyBSDSDataset(du.find_photographs(), 'test', (180, 180), subset=subset)
    net = du.DnCNN(6)
    with tempfile.TemporaryDirectory() as folder:
        exp = nt.Experiment(net, test, test, torch.optim.Adam(net.parameters()),
                            du.DenoisingStatsManager(), folder, 4)

        def bare():
            net.eval()
            scores = []
            with torch.inference_mode():
                for x, d in td.DataLoader(test, 4):
                    y = net(x)
                    net.criterion(y, d).item()
                    scores.append(du.psnr(y, d).mean().item())

        a, b = seconds(bare, exp.evaluate, repeats=args.repeats)
        row(f'  DnCNN(6), {len(test)} crops of 180x180', ms(a, 0), ms(b, 0),
            f'{100 * (b / a - 1):+.2f} %')

        quietly(exp.run, 1)  # so that Adam has a state
        path = Path(folder) / 'bare.pth'
        plain, save, load = seconds(lambda: torch.save(exp.state_dict(), path), exp.save, exp.load,
                                    repeats=args.repeats)
        row('Checkpoint of DnCNN(6) with Adam', 'torch.save', 'save', 'load', 'bytes')
        row('', ms(plain), ms(save), ms(load), f'{os.path.getsize(exp.checkpoint_path):,}')


PARTS = {'loop': loop, 'start': start, 'history': history, 'given-back': given_back,
         'resume': resume, 'evaluation': evaluation}


def main(words=None):
    measure(PARTS, 'python -m programs.benchmark', __doc__, words)


if __name__ == '__main__':
    run(main)
