"""How fast it is, side by side with the plainest PyTorch that does the same.

    make benchmark                      # minutes; leave the machine alone meanwhile
    python tests/benchmark.py --quick   # seconds: only shows that it runs

Each comparison alternates between its two sides and takes the median of each, so that a machine that
gets slower meanwhile slows both. Needs the photographs (environment variable BSDS300, or it fetches).
"""
import argparse
import contextlib
import copy
import functools
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data as td
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import denoising_utils as du  # noqa: E402
import nntools as nt  # noqa: E402


def rounds(*functions, repeats):
    """The seconds of each function, a list of ``repeats``; called in turns after one call to warm up."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for k in range(len(functions)):
            k = (k + turn) % len(functions)  # each goes first as often
            begin = time.perf_counter()
            functions[k]()
            times[k].append(time.perf_counter() - begin)
    return [t[1:] for t in times]


def seconds(*functions, repeats):
    """Median seconds of each function."""
    return [statistics.median(t) for t in rounds(*functions, repeats=repeats)]


def row(name, *columns):
    print(f'{name:<46}' + ''.join(f' {column:>18}' for column in columns), flush=True)


def quietly(function, *args, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **options)


# --- the loop -------------------------------------------------------------------------------------

class Small(nt.NeuralNetwork):
    """A classifier of a few thousand parameters: here the overhead of a step shows."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)

    def criterion(self, y, d):
        return F.cross_entropy(y, d)


def there_and_back(make, repeats):
    """For each round, the seconds of several functions: it goes through them and back (A B C C B A), so
    that a drift cancels, and begins with another one each time. ``make`` builds them anew for each round,
    as it matters where in memory they lie; each is called once to warm up, and returns its seconds."""
    found = []
    for turn in range(repeats):
        functions = make()
        order = [(k + turn) % len(functions) for k in range(len(functions))]
        times = [0.0] * len(functions)
        for function in functions:
            function()
        for k in order + order[::-1]:
            times[k] += functions[k]() / 2
        found.append(times)
    return found


def timed(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def spread(values, pattern='{:+.1f}'):
    """Median, and in brackets the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else 3 * values
    return f'{pattern} ({pattern} {pattern})'.format(middle, low, high)


def compare_epochs(name, net, data, batch_size, repeats, aim):
    """An epoch of `Experiment` (its checkpoint apart, which has a row of its own; the second of a run), the bare loop over
    the same batches, and that once more: how far two measurements of the same thing differ."""
    loader = td.DataLoader(data, batch_size, shuffle=True, drop_last=True)

    def bare(net, adam):
        total = 0.0
        for x, d in loader:
            adam.zero_grad()
            loss = net.criterion(net(x), d)
            loss.backward()
            adam.step()
            total += loss.item()

    with tempfile.TemporaryDirectory() as folder:
        def make():
            nets = [copy.deepcopy(net).train() for _ in range(3)]
            adams = [torch.optim.Adam(n.parameters(), 1e-4) for n in nets]
            exp = quietly(nt.Experiment, nets[2], data, None, adams[2], nt.StatsManager(),
                          tempfile.mkdtemp(dir=folder), batch_size)

            def epoch():
                quietly(exp.run, exp.epoch + 2)
                return exp.table()[-1]['seconds']  # without the checkpoint, and what a run checks at its first batch

            return [*(functools.partial(timed, bare, n, adam) for n, adam in zip(nets[:2], adams)), epoch]

        times = there_and_back(make, repeats)
    step = statistics.median(a for a, _, _ in times) / len(loader)
    difference, control = ([100 * (t[k] / t[0] - 1) for t in times] for k in (2, 1))
    row(name, f'{1e3 * step:.2f} ms', f'{1e4 * step * statistics.median(difference):+.0f} us', spread(difference),
        spread(control), aim)


def loop(args, root):
    row('A step of an epoch (in %: median, quartiles)', 'bare loop', 'Experiment', 'difference', 'bare, again', 'aim')
    n = 8 if args.quick else 32
    images = td.TensorDataset(torch.randn(n, 3, args.size, args.size), torch.randn(n, 3, args.size, args.size))
    compare_epochs(f'  DnCNN(6), 4 crops of {args.size}x{args.size}', du.DnCNN(6), images, 4, args.repeats, '1 %')
    n, nn = 256 if args.quick else 4096, torch.nn
    convolutions = Small(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(16 * 36, 10))
    perceptron = Small(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for name, net, shape, aim in (('convolutional', convolutions, (1, 28, 28), '3 %'), ('perceptron', perceptron, (64,), '5 %')):
        rows = td.TensorDataset(torch.randn(n, *shape), torch.randint(10, (n,)))
        compare_epochs(f'  {name}, {du.count_parameters(net):,} parameters', net, rows, 32, 5 * args.repeats, aim)


# --- the start, a long history, a large network ---------------------------------------------------

def start(args, root):
    """The start of a program whose data set is a list of samples."""
    samples = [(torch.randn(1, 28, 28), k % 10) for k in range(100 if args.quick else 10_000)]
    row(f'Start with a list of {len(samples):,} images', 'bare program', 'Experiment', 'resumed', 'aim')
    net = Small(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    with tempfile.TemporaryDirectory() as folder:
        def bare():
            torch.optim.Adam(net.parameters())
            iter(td.DataLoader(samples, 16, shuffle=True))

        def experiment(new):
            path = tempfile.mkdtemp(dir=folder) if new else f'{folder}/old'
            quietly(nt.Experiment, net, samples, None, torch.optim.Adam(net.parameters()), nt.StatsManager(), path)

        times = seconds(bare, lambda: experiment(True), lambda: experiment(False), repeats=args.repeats)
    row('', *(f'{1e3 * t:.1f} ms' for t in times), '+ 1 s')


def history(args, root):
    """An epoch, with all that follows it, after many others and after none."""
    epochs = 200 if args.quick else 20_000
    row('An epoch and its end', 'the first', f'after {epochs:,}', 'difference (%)', 'aim')
    data = td.TensorDataset(torch.randn(512, 64), torch.randint(10, (512,)))
    for save_every in (10 ** 9, 1):
        with tempfile.TemporaryDirectory() as folder:
            def make(folder=folder, save_every=save_every):
                def one(past):
                    net = Small(torch.nn.Linear(64, 10))
                    exp = quietly(nt.Experiment, net, data, data, torch.optim.Adam(net.parameters()), nt.StatsManager(),
                                  tempfile.mkdtemp(dir=folder), 32, True, save_every=save_every)
                    exp.history = [(2.3, 2.3) for _ in range(past)]

                    def some():
                        begins = []  # the callback comes before the first epoch, and after each
                        quietly(exp.run, exp.epoch + 5, lambda exp: begins.append(time.perf_counter()))
                        return statistics.median(b - a for a, b in zip(begins, begins[1:]))

                    return some

                return [one(0), one(epochs)]

            times = there_and_back(make, args.repeats)
        first, late = (statistics.median(t) for t in zip(*times))
        row(f'  save_every={save_every}', f'{1e3 * first:.1f} ms', f'{1e3 * late:.1f} ms',
            spread([100 * (b / a - 1) for a, b in times]), '0 %')


RESUME = """
import sys, time, torch, torch.utils.data as td
sys.path[:0] = ['..']
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


def resume(args, root):
    """Seconds and peak memory of a resume, each in a program of its own."""
    if not Path('/proc/self/status').exists():
        return print('Resume: peak memory is read from /proc, which is not here')
    width = 1000 if args.quick else 10_000
    row(f'Resume, {width ** 2 / 1e6:.0f} M parameters', 'load, s', 'Experiment, s', 'ratio', 'load, MB', 'Experiment, MB', 'ratio')
    kept = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '4294967296'}
    with tempfile.TemporaryDirectory() as folder:
        child(['-c', RESUME, 'train', folder, str(width)])
        for label, settings in (('memory given back', {}), ('memory kept', kept)):
            runs = {'bare': [], 'resume': []}
            for kind in ('bare', 'resume', 'resume', 'bare'):
                *_, line = child(['-c', RESUME, kind, folder, str(width)], settings).splitlines()
                runs[kind].append([float(word) for word in line.split()])
            (a, m), (b, n) = (np.mean(found, 0) for found in runs.values())
            row(f'  {label}', f'{a:.2f}', f'{b:.2f}', f'{b / a:.2f} x', f'{m:.0f}', f'{n:.0f}', f'{n / m:.2f} x')


def given_back(args, root):
    """The loop, start and history once more, as where nobody has made the two settings of glibc."""
    print('The same where memory that was freed is given back:')
    words = [__file__, '--only', 'loop', 'start', 'history', '--size', str(args.size), '--repeats', str(args.repeats)]
    print(child(words + ['--quick'] * args.quick, GIVEN_BACK), end='')


def child(words, settings=None):
    """What another Python printed, with these settings of glibc and no others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')} | (settings or {})
    return subprocess.run([sys.executable, *words], check=True, text=True, cwd=Path(__file__).resolve().parent,
                          env=environment, stdout=subprocess.PIPE).stdout


# --- data -----------------------------------------------------------------------------------------

class Decoding(td.Dataset):
    """The same pairs, each JPEG decoded at each access, as the course's data set did."""

    def __init__(self, files, size, sigma=30):
        self.files, self.size, self.sigma = files, size, sigma

    def __len__(self):
        return len(self.files)

    def __getitem__(self, k):
        image = Image.open(self.files[k]).convert('RGB')
        left = np.random.randint(image.size[0] - self.size + 1)
        top = np.random.randint(image.size[1] - self.size + 1)
        image = image.crop([left, top, left + self.size, top + self.size])
        clean = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return clean + 2 / 255 * self.sigma * torch.randn(clean.shape), clean


def data(args, root):
    row('Samples a second', 'decoding each', 'NoisyBSDSDataset', 'ratio', 'aim')
    for size in (180, args.size):
        compare_data(args, root, size)


def compare_data(args, root, size):
    fast = du.NoisyBSDSDataset(root, 'train', (size, size), subset=range(20 if args.quick else 200))
    slow, n = Decoding(fast.files, size), len(fast)
    a, b, c = seconds(lambda: [slow[k] for k in range(n)], lambda: [fast[k] for k in range(n)],
                      lambda: [torch.randn(3, size, size) for _ in range(n)], repeats=args.repeats)
    row(f'  crops of {size}x{size}', f'{n / a:.0f}', f'{n / b:.0f}', f'{a / b:.2f}', '4')
    row('    of which drawing the noise', '', f'{100 * c / b:.0f} %')


# --- evaluation and checkpoints -------------------------------------------------------------------

def evaluation(args, root):
    row('Evaluation', 'bare loop', 'Experiment', 'difference')
    test = du.NoisyBSDSDataset(root, 'test', (180, 180), subset=range(4 if args.quick else 20))
    net = du.DnCNN(6)
    with tempfile.TemporaryDirectory() as folder:
        exp = nt.Experiment(net, test, test, torch.optim.Adam(net.parameters()), du.DenoisingStatsManager(), folder, 4)

        def bare():
            net.eval()
            scores = []
            with torch.inference_mode():
                for x, d in td.DataLoader(test, 4):
                    y = net(x)
                    net.criterion(y, d).item()
                    scores.append(du.psnr(y, d).mean().item())

        a, b = seconds(bare, exp.evaluate, repeats=args.repeats)
        row(f'  DnCNN(6), {len(test)} crops of 180x180', f'{1e3 * a:.0f} ms', f'{1e3 * b:.0f} ms', f'{100 * (b / a - 1):+.2f} %')

        quietly(exp.run, 1)  # so that Adam has a state
        bare_path = Path(folder) / 'bare.pth'
        save, load, plain = seconds(exp.save, exp.load, lambda: torch.save(exp.state_dict(), bare_path), repeats=args.repeats)
        row('Checkpoint of DnCNN(6) with Adam', 'torch.save', 'save', 'load', 'bytes')
        row('', f'{1e3 * plain:.1f} ms', f'{1e3 * save:.1f} ms', f'{1e3 * load:.1f} ms',
            f'{os.path.getsize(exp.checkpoint_path):,}')


# --- arithmetic -----------------------------------------------------------------------------------

def sgemm_peak(repeats):
    """GFLOP/s of the best of several square matrix products: what this machine can do."""
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        (t,) = seconds(lambda a=a, b=b: a @ b, repeats=max(3, repeats))
        best = max(best, 2 * n**3 / t / 1e9)
    return best


def flops(net, x):
    """Floating-point operations of the convolutions of one training step: forward, and twice that
    backward, but for the gradient with respect to the image, which nobody needs."""
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        n = 2 * output.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        total += 2 * n if conv is net.conv[0] else 3 * n

    hooks = [conv.register_forward_hook(count) for conv in net.conv]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return total


def train_step(net, x, d, precision=None):
    adam = torch.optim.Adam(net.parameters(), 1e-4)
    net.train()

    def step():
        adam.zero_grad()
        with torch.autocast('cpu', dtype=precision, enabled=precision is not None):
            loss = net.criterion(net(x), d)
        loss.backward()
        adam.step()
        return loss.item()

    return step


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arithmetic(args, root):
    peak = sgemm_peak(args.repeats)
    last = memory_format = torch.channels_last
    print(f'sgemm peak: {peak:.0f} GFLOP/s with {torch.get_num_threads()} threads')
    row(f'A training step, 4 crops of {args.size}x{args.size}', 'ms', 'GFLOP/s', 'of the peak', 'to plain')
    x, d = torch.randn(4, 3, args.size, args.size), torch.randn(4, 3, args.size, args.size)
    for name in du.NETWORKS:
        net = du.make_network(name)
        work = flops(net, x)

        def variant(channels_last=False, precision=None, net=net):
            copied, a, b = copy.deepcopy(net), x, d
            if channels_last:
                copied, a, b = copied.to(memory_format=memory_format), x.to(memory_format=last), d.to(memory_format=last)
            return train_step(copied, a, b, precision)

        names = ['plain', 'channels_last', 'bfloat16', 'bfloat16, channels_last']
        times = seconds(variant(), variant(True), variant(False, torch.bfloat16), variant(True, torch.bfloat16),
                        repeats=args.repeats)
        if torch.get_num_threads() > 1:
            single = variant(True)
            with threads(1):
                times += seconds(single, repeats=args.repeats)
            names.append('channels_last, one thread')
        for label, t in zip(names, times):
            row(f'  {name}(6), {label}', f'{1e3 * t:.1f}', f'{work / t / 1e9:.0f}', f'{100 * work / t / 1e9 / peak:.0f} %',
                f'{times[0] / t:.2f} x')

    row('Inference, one photograph of 481x321', 'ms', '', '', 'to plain')
    x = torch.randn(1, 3, 321, 481)
    for name in du.NETWORKS:
        net = du.make_network(name).eval()
        folded = du.fold_batch_norm(net)
        lasts = [copy.deepcopy(n).to(memory_format=last) for n in (net, folded)]
        xl = x.to(memory_format=last)

        def bf16(net=lasts[1], xl=xl):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                return net(xl)

        with torch.inference_mode():
            assert torch.allclose(net(x), folded(x), atol=1e-4)
            times = seconds(lambda: net(x), lambda: folded(x), lambda: lasts[0](xl), lambda: lasts[1](xl), bf16,  # noqa: B023
                            repeats=args.repeats)
        for label, t in zip(('plain', 'batch norm folded', 'channels_last', 'channels_last, folded',
                             'channels_last, folded, bfloat16'), times):
            row(f'  {name}(6), {label}', f'{1e3 * t:.1f}', '', '', f'{times[0] / t:.2f} x')


# --- memory and photographs -----------------------------------------------------------------------

GIVEN_BACK = {'MALLOC_PERTURB_': '0'}  # changes nothing but that denoising_utils leaves glibc alone
TIMES = """
import sys, torch, benchmark as b
x, repeats = torch.randn(4, 3, int(sys.argv[1]), int(sys.argv[1])), int(sys.argv[2])
for name in b.du.NETWORKS:
    net = b.du.make_network(name)
    print(*b.seconds(b.train_step(net, x, x), repeats=repeats))
    net.eval()
    with torch.inference_mode():
        image = torch.randn(1, 3, 321, 481)
        print(*b.seconds(lambda: net(image), repeats=repeats))
"""


def python(program, *words, settings=None):
    """What a program of its own printed, with these settings in its environment and no other MALLOC_."""
    return child(['-c', program, *map(str, words)], settings)


def memory(args, root):
    """The C library may give memory back to the system after each layer, or keep it for the next."""
    def times(settings):
        return [float(line) for line in python(TIMES, args.size, args.repeats, settings=settings).split()]

    row('Memory that was freed (glibc)', 'given back', 'kept', 'speed-up')
    runs = [times(settings) for settings in (GIVEN_BACK, {}, {}, GIVEN_BACK)]  # in this order, against a drift
    given, kept = np.mean([runs[0], runs[3]], 0), np.mean([runs[1], runs[2]], 0)
    what = [f'{name}(6), {kind}' for name in du.NETWORKS
            for kind in (f'step on 4 crops of {args.size}x{args.size}', 'photograph of 481x321')]
    for label, a, b in zip(what, given, kept):
        row(f'  {label}', f'{1e3 * a:.0f} ms', f'{1e3 * b:.0f} ms', f'{a / b:.2f} x')


class FFDNet(du.NNRegressor):
    """The layers of the FFDNet for colour, with random weights: 12 convolutions with 96 features at half
    the resolution, and the level as one more channel (Zhang et al., "FFDNet", IEEE TIP 2018)."""
    pooling_cell, receptive_field = 2, 50

    def __init__(self):
        super().__init__()
        widths = [4 * 3 + 1] + 11 * [96] + [4 * 3]
        self.conv = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        height, width = x.shape[-2:]
        h = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2), mode='replicate'), 2)
        h = torch.cat([h, torch.full_like(h[:, :1], 30 / 255)], 1)
        for conv in self.conv[:-1]:
            h = F.relu(conv(h), inplace=True)
        return F.pixel_shuffle(self.conv[-1](h), 2)[..., :height, :width]


PEAK = """
import resource, sys, torch, benchmark as b
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != 'darwin' else 2 ** 20)
net = b.du.load_network('dudncnn_blind')[0]
def denoise(source):
    b.du.denoise_file(net, source, sys.argv[3], precision=getattr(torch, sys.argv[4]), force=True)
denoise(sys.argv[1])
before = peak()
denoise(sys.argv[2])
print(peak() - before)
"""


def photograph(args, root):
    """Seconds a megapixel of the denoiser of photographs, beside FFDNet's layers, and its memory."""
    image = torch.randint(256, (3, 400, 500) if args.quick else (3, 1000, 1500), dtype=torch.uint8)
    megapixels = image[0].numel() / 1e6
    blind, ffdnet = du.load_network('dudncnn_blind')[0], FFDNet().eval()
    precisions = sorted({torch.float32, du.half_precision(torch.device('cpu'))}, key=str, reverse=True)
    row(f'Seconds a megapixel ({megapixels:.1f} megapixels)', 'FFDNet', 'DUDnCNN', 'speed-up')
    for n in sorted({1, torch.get_num_threads()}):
        for precision in precisions:
            for tile, label in ((192, 'in tiles of 192x192'), (10 ** 6, 'whole')):
                with threads(n):
                    a, b = seconds(*(functools.partial(du.denoise_image, net, image, tile, precision=precision)
                                     for net in (ffdnet, blind)), repeats=min(args.repeats, 3))
                row(f'  {label}, {n} threads, {str(precision)[6:]}', f'{a / megapixels:.2f}', f'{b / megapixels:.2f}',
                    f'{a / b:.2f} x')

    row('Memory beside the result', 'megapixels', 'MB')
    size = (600, 400) if args.quick else (6000, 4000)
    with tempfile.TemporaryDirectory() as folder:
        names = [f'{folder}/{name}.jpg' for name in ('small', 'large', 'result')]
        for name, pixels in zip(names, ((60, 40), size)):
            Image.effect_noise(pixels, 50).convert('RGB').save(name)
        for precision in precisions:
            result = 3 * size[0] * size[1] / 2 ** 20
            used = float(python(PEAK, *names, str(precision)[6:])) - result
            row(f'  denoise_file, {str(precision)[6:]}', f'{size[0] * size[1] / 1e6:.0f}', f'{used:.0f}')


PARTS = {'loop': loop, 'start': start, 'history': history, 'given-back': given_back, 'resume': resume, 'data': data, 'evaluation': evaluation, 'arithmetic': arithmetic, 'memory': memory,
         'photograph': photograph}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small and few: the figures mean nothing')
    parser.add_argument('--only', choices=PARTS, nargs='+', default=list(PARTS))
    parser.add_argument('--size', type=int, help='of the crops in training (default: 64)')
    parser.add_argument('--repeats', type=int, help='of each measurement (default: 9)')
    args = parser.parse_args()
    args.size = args.size or (32 if args.quick else 64)
    args.repeats = args.repeats or (1 if args.quick else 9)
    root = du.find_photographs() if {'data', 'evaluation'} & set(args.only) else None
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, '
          f'median of {args.repeats}')
    for part in args.only:
        print()
        PARTS[part](args, root)


if __name__ == '__main__':
    main()
