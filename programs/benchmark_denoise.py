"""How fast the photographs, the networks and the denoiser of files are, and what helps.

    make benchmark                                 # minutes; leave the machine alone meanwhile
    python -m programs.benchmark_denoise --quick   # seconds: only shows that it runs

nntools is measured by programs.benchmark.
"""
import copy
import functools
import os
import sys
import tempfile

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
import torch.utils.data as td
from PIL import Image

import denoising_utils as du
from programs import run
from programs.inference import denoise_image, fold, fold_batch_norm, half_precision
from programs.timing import GIVEN_BACK, child, measure, ms, row, seconds, threads

LAST = torch.channels_last


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


def data(args):
    row('Samples a second', 'decoding each', 'NoisyBSDSDataset', 'ratio', 'aim')
    photographs = du.find_photographs()
    subset = range(20 if args.quick else 200)
    for size in (180, args.size):
        fast = du.NoisyBSDSDataset(photographs, 'train', (size, size), subset=subset)
        compare_data(Decoding(fast.files, size), fast, size, args.repeats)


def compare_data(slow, fast, size, repeats):
    n = len(fast)
    a, b, c = seconds(lambda: [slow[k] for k in range(n)],
                      lambda: [fast[k] for k in range(n)],
                      lambda: [torch.randn(3, size, size) for _ in range(n)], repeats=repeats)
    row(f'  crops of {size}x{size}', f'{n / a:.0f}', f'{n / b:.0f}', f'{a / b:.2f}', '4')
    row('    of which drawing the noise', '', f'{100 * c / b:.0f} %')


# --- arithmetic -----------------------------------------------------------------------------------

def sgemm_peak(repeats):
    """GFLOP/s of the best of several square matrix products: what this machine can do."""
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.randn(2, n, n)
        (time,) = seconds(functools.partial(torch.matmul, a, b), repeats=max(3, repeats))
        best = max(best, 2 * n**3 / time / 1e9)
    return best


def flops(net, x):
    """Floating-point operations of the convolutions of one training step.

    Forward, and twice that backward, but for the gradient with respect to the image, which nobody
    needs.
    """
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        forward = 2 * output.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        total += forward * (2 if conv is net.conv[0] else 3)

    hooks = [conv.register_forward_hook(count) for conv in net.conv]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return total


def train_step(net, x, d, precision=None):
    """A function that makes one training step."""
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


def arithmetic(args):
    peak = sgemm_peak(args.repeats)
    print(f'sgemm peak: {peak:.0f} GFLOP/s with {torch.get_num_threads()} threads')
    row(f'A training step, 4 crops of {args.size}x{args.size}', 'ms', 'GFLOP/s', 'of the peak',
        'to plain')
    for name in du.COMPARED:
        compare_steps(name, peak, args)
    row('Inference, one photograph of 481x321', 'ms', '', '', 'to plain')
    for name in du.COMPARED:
        compare_inference(name, args.repeats)


def compare_steps(name, peak, args):
    """A training step in two layouts of memory, two precisions, and with one thread."""
    net = du.make_network(name)
    x, d = torch.randn(2, 4, 3, args.size, args.size)
    work = flops(net, x) / 1e9

    def plain(precision=None):
        return train_step(copy.deepcopy(net), x, d, precision)

    def channels_last(precision=None):
        net_last = copy.deepcopy(net).to(memory_format=LAST)
        return train_step(net_last, x.to(memory_format=LAST), d.to(memory_format=LAST), precision)

    steps = {'plain': plain(), 'channels_last': channels_last(),
             'bfloat16': plain(torch.bfloat16),
             'bfloat16, channels_last': channels_last(torch.bfloat16)}
    times = dict(zip(steps, seconds(*steps.values(), repeats=args.repeats)))
    if torch.get_num_threads() > 1:
        step = channels_last()
        with threads(1):
            (times['channels_last, one thread'],) = seconds(step, repeats=args.repeats)
    for label, time in times.items():
        speed = work / time
        row(f'  {name}(6), {label}', f'{1e3 * time:.1f}', f'{speed:.0f}',
            f'{100 * speed / peak:.0f} %', f'{times["plain"] / time:.2f} x')


def compare_inference(name, repeats):
    """A photograph with the batch norm folded into the convolutions, and other layouts."""
    x = torch.randn(1, 3, 321, 481)
    net = du.make_network(name).eval()
    folded = fold_batch_norm(net)
    x_last = x.to(memory_format=LAST)
    net_last = copy.deepcopy(net).to(memory_format=LAST)
    folded_last = copy.deepcopy(folded).to(memory_format=LAST)

    def bfloat16():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return folded_last(x_last)

    ways = {'plain': lambda: net(x), 'batch norm folded': lambda: folded(x),
            'channels_last': lambda: net_last(x_last),
            'channels_last, folded': lambda: folded_last(x_last),
            'channels_last, folded, bfloat16': bfloat16}
    with torch.inference_mode():
        # Nearly all: of two values that are nearly equal, max-pooling may now take the other one.
        assert torch.isclose(net(x), folded(x), atol=1e-4).float().mean() > 0.99
        times = dict(zip(ways, seconds(*ways.values(), repeats=repeats)))
    for label, time in times.items():
        row(f'  {name}(6), {label}', f'{1e3 * time:.1f}', '', '', f'{times["plain"] / time:.2f} x')


# --- memory ---------------------------------------------------------------------------------------

# What keep_freed_memory gives. It does nothing in a program started with GIVEN_BACK.
TIMES = """
import sys, torch
import denoising_utils as du
from programs import benchmark_denoise as b
du.keep_freed_memory()
size, repeats = int(sys.argv[1]), int(sys.argv[2])
x = torch.randn(4, 3, size, size)
for name in du.COMPARED:
    net = du.make_network(name)
    print(*b.seconds(b.train_step(net, x, x), repeats=repeats))
    net.eval()
    with torch.inference_mode():
        image = torch.randn(1, 3, 321, 481)
        print(*b.seconds(lambda: net(image), repeats=repeats))
"""


def memory(args):
    """The C library may give memory back after each layer, or keep it for the next."""
    row('Memory that was freed (glibc)', 'given back', 'kept', 'speed-up')
    runs = []
    for settings in (GIVEN_BACK, {}, {}, GIVEN_BACK):  # in this order, against a drift
        said = child(['-c', TIMES, args.size, args.repeats], settings)
        runs.append([float(line) for line in said.split()])
    given = np.mean([runs[0], runs[3]], 0)
    kept = np.mean([runs[1], runs[2]], 0)
    what = []
    for name in du.COMPARED:
        what.append(f'{name}(6), step on 4 crops of {args.size}x{args.size}')
        what.append(f'{name}(6), photograph of 481x321')
    for label, a, b in zip(what, given, kept):
        row(f'  {label}', ms(a, 0), ms(b, 0), f'{a / b:.2f} x')


# --- photographs ----------------------------------------------------------------------------------

class FFDNet(du.NNRegressor):
    """The layers of the FFDNet for colour, with random weights: 12 convolutions with 96 features at
    half the resolution, and the level as one more channel (Zhang et al., "FFDNet", IEEE TIP 2018).
    """
    pooling_cell, receptive_field = 2, 50

    def __init__(self):
        super().__init__()
        widths = [4 * 3 + 1] + 11 * [96] + [4 * 3]
        layers = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])]
        self.conv = torch.nn.ModuleList(layers)

    def forward(self, x):
        height, width = x.shape[-2:]
        h = F.pad(x, (0, width % 2, 0, height % 2), mode='replicate')
        h = F.pixel_unshuffle(h, 2)  # (N, 12, H/2, W/2)
        h = torch.cat([h, torch.full_like(h[:, :1], 30 / 255)], 1)
        for conv in self.conv[:-1]:
            h = F.relu(conv(h), inplace=True)
        return F.pixel_shuffle(self.conv[-1](h), 2)[..., :height, :width]


def photograph(args):
    """The denoiser of photographs: its speed beside FFDNet's layers, and its memory."""
    precisions = [torch.float32]
    if half_precision(torch.device('cpu')) != torch.float32:
        precisions.append(half_precision(torch.device('cpu')))
    speed_of_photographs(precisions, args)
    memory_of_photographs(precisions, args)


def speed_of_photographs(precisions, args):
    shape = (3, 400, 500) if args.quick else (3, 1000, 1500)
    image = torch.randint(256, shape, dtype=torch.uint8)
    megapixels = image[0].numel() / 1e6
    ours = fold(du.load_network('dudncnn_photo')[0])
    ffdnet = FFDNet().eval()
    repeats = min(args.repeats, 3)

    row(f'Seconds a megapixel ({megapixels:.1f} megapixels)', 'FFDNet', 'DUDnCNN', 'speed-up')
    for n in sorted({1, torch.get_num_threads()}):
        for precision in precisions:
            for tile, label in ((384, 'in tiles of 384x384'), (10 ** 6, 'whole')):
                ways = [functools.partial(denoise_image, net, image, tile, precision=precision)
                        for net in (ffdnet, ours)]
                with threads(n):
                    a, b = seconds(*ways, repeats=repeats)
                row(f'  {label}, {n} threads, {str(precision)[6:]}', f'{a / megapixels:.2f}',
                    f'{b / megapixels:.2f}', f'{a / b:.2f} x')


class Nothing(du.NNRegressor):
    """A network that changes nothing, so that only files are left to work on."""
    pooling_cell, receptive_field = 1, 1

    def forward(self, x):
        return x


# By how much the memory in use grows at most while the second of two files is denoised. What the
# system holds of files, and can drop, is left out: Linux counts that apart.
PEAK = """
import sys, threading, time, torch
import denoising_utils as du
from programs.benchmark_denoise import Nothing
from programs.denoise import denoise_file
from programs.inference import fold
du.keep_freed_memory()
def used():
    with open('/proc/self/status') as status:
        return int(dict(line.split(':') for line in status)['RssAnon'].split()[0]) / 1024
def watch():
    while True:
        uses.append(used())
        time.sleep(0.02)
net, precision, small, large, result = sys.argv[1:]
net = fold(du.load_network(net)[0]) if net else Nothing()
precision = getattr(torch, precision)
denoise_file(net, small, result, precision=precision, force=True)
uses = [used()]
threading.Thread(target=watch, daemon=True).start()
denoise_file(net, large, result, precision=precision, force=True)
print(max(uses) - uses[0])
"""


def memory_of_photographs(precisions, args):
    row('Peak memory beyond that of a small file', 'megapixels', 'file (MB)', 'memory (MB)')
    for precision in precisions:
        side = 600 if args.quick else 5000
        compare_peak('dudncnn_photo', precision, side, '.jpg')


def large(args):
    """Files alone: their memory when there are far more pixels than in a tile."""
    row('Peak memory beyond that of a small file', 'megapixels', 'file (MB)', 'memory (MB)')
    for suffix in ('.jpg', '.tif'):
        compare_peak('', torch.float32, 1000 if args.quick else 22400, suffix)


def compare_peak(net, precision, side, suffix):
    precision = str(precision)[6:]
    if not sys.platform.startswith('linux'):
        row(f'  {net or "nothing"}, {suffix}, {precision}', '', '', 'only on Linux')
        return
    with tempfile.TemporaryDirectory() as folder:
        small, big, result = (f'{folder}/{name}{suffix}' for name in ('small', 'large', 'result'))
        for file, width in ((small, 60), (big, side)):
            noise = pyvips.Image.gaussnoise(width, width, mean=128, sigma=20).cast('uchar')
            noise.copy(interpretation='srgb').bandjoin([noise, noise]).write_to_file(file)
        said = child(['-c', PEAK, net, precision, small, big, result])
        size = os.path.getsize(result) / 1e6
    row(f'  {net or "nothing"}, {suffix}, {precision}', f'{side**2 / 1e6:.0f}', f'{size:.0f}',
        f'{float(said):.0f}')


PARTS = {'data': data, 'arithmetic': arithmetic, 'memory': memory, 'photograph': photograph,
         'large': large}


def main(words=None):
    measure(PARTS, 'python -m programs.benchmark_denoise', __doc__, words)


if __name__ == '__main__':
    run(main)
