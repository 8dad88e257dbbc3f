"""What the two benchmarks share: measuring in turns, programs of their own, and rows of a table.

Each comparison alternates between its sides and takes the median of each, so that a machine that
gets slower meanwhile slows all of them.
"""
import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
GIVEN_BACK = {'MALLOC_PERTURB_': '0'}  # changes nothing but that keep_freed_memory does nothing


def measure(parts, prog, description, words=None):
    """The ``main()`` of a benchmark: runs those of its ``parts`` that the command line names.

    ``parts`` is a dict of functions, which get the options: ``quick``, ``size`` and ``repeats``.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true',
                        help='small and few: the figures mean nothing')
    parser.add_argument('--only', choices=parts, nargs='+', default=list(parts))
    parser.add_argument('--size', type=int, help='of the crops in training (default: 64)')
    parser.add_argument('--repeats', type=int, help='of each measurement (default: 9)')
    args = parser.parse_args(words)
    args.size = args.size or (32 if args.quick else 64)
    args.repeats = args.repeats or (1 if args.quick else 9)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, '
          f'{torch.backends.cpu.get_cpu_capability()}, median of {args.repeats}')
    for name in args.only:
        print()
        parts[name](args)


# --- measuring ------------------------------------------------------------------------------------

def timed(function, *args):
    """The seconds that a call takes."""
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def seconds(*functions, repeats):
    """Median seconds of each function, called in turns after one call each to warm up."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for k in range(len(functions)):
            k = (k + turn) % len(functions)  # each goes first as often
            times[k].append(timed(functions[k]))
    return [statistics.median(of_one[1:]) for of_one in times]


def there_and_back(make, repeats):
    """For each of several rounds, the seconds of several functions.

    A round goes through them and back (A B C C B A), so that a drift cancels, and begins with
    another one each time. ``make`` builds them anew for each round, as it matters where in memory
    they lie. Each is called once to warm up, and returns its seconds.
    """
    rounds = []
    for turn in range(repeats):
        functions = make()
        for function in functions:
            function()
        order = [(k + turn) % len(functions) for k in range(len(functions))]
        times = [0.0] * len(functions)
        for k in order + order[::-1]:
            times[k] += functions[k]() / 2
        rounds.append(times)
    return rounds


def quietly(function, *args, **options):
    """Calls a function; what it prints is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **options)


@contextlib.contextmanager
def threads(n):
    """Inside of it, torch computes with ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def child(words, settings=None):
    """What another Python printed, with these settings of glibc and no others."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith('MALLOC_')}
    return subprocess.run([sys.executable, *map(str, words)], check=True, text=True, cwd=HERE,
                          env=environment | (settings or {}), stdout=subprocess.PIPE).stdout


# --- printing -------------------------------------------------------------------------------------

def row(name, *columns):
    print(f'{name:<46}' + ''.join(f' {column:>18}' for column in columns), flush=True)


def ms(value, digits=1):
    """Seconds as a text in milliseconds."""
    return f'{1e3 * value:.{digits}f} ms'


def spread(values):
    """Median, and in brackets the quartiles."""
    low = middle = high = values[0]
    if len(values) > 1:
        low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return f'{middle:+.1f} ({low:+.1f} {high:+.1f})'
