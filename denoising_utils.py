"""The assignment: photographs, data set, networks, statistics, pictures, test, and recipe.

In the order of the notebook ``Assignment4.ipynb``. Images are tensors (channels, height, width)
with values in [-1, 1]; noise levels ``sigma`` are on the usual scale 0..255.
"""
import contextlib
import copy
import csv
import ctypes
import dataclasses
import getpass
import hashlib
import itertools
import math
import os
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data as td
from PIL import Image, ImageOps
from scipy import stats
from torch import nn

import nntools as nt

HERE = Path(__file__).resolve().parent
BSDS_URL = 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz'
ADVICE = 'Try again, or set the environment variable BSDS300 to a folder with its train/ and test/.'
MANIFEST = HERE / 'checkpoints' / 'BSDS300.sha256'
PUBLISHED = HERE / 'checkpoints' / 'published.csv'


def keep_freed_memory():
    """Asks glibc, where it is the C library, to keep the memory that one layer frees for the next.

    A photograph then takes half the time (``make benchmark``). It changes the whole process, so a
    program asks for it, before its first tensor. ``MALLOC_...`` in the environment goes before.
    """
    if not any(name.startswith('MALLOC_') for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # another system, or C library
            mallopt = ctypes.CDLL('libc.so.6').mallopt  # see mallopt(3)
            mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside of the heap, which go back when freed
            mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end stays


# --- photographs ---------------------------------------------------------------------------------
def find_photographs(root=None):
    """The folder that holds ``train/`` and ``test/``: a `Path`.

    It is ``root`` if given, else the environment variable ``BSDS300``, else ``BSDS300/images``
    beside this file, see `fetch`. Where that can't be reached, written or checked,
    `sample_photographs` stand in. Raises FileNotFoundError if the folder named by ``root`` or
    ``BSDS300`` has no photographs, and OSError if the download is damaged.
    """
    given = root or os.environ.get('BSDS300')
    if given:
        for folder in (Path(given), Path(given) / 'images'):
            if (folder / 'train').is_dir() and (folder / 'test').is_dir():
                return folder
        name = 'root' if root else 'the environment variable BSDS300'
        raise FileNotFoundError(
            f'{name} is {str(given)!r}, but there are no folders train/ and test/ in it')
    folder = HERE / 'BSDS300' / 'images'
    try:
        return folder if folder.is_dir() else fetch()
    except (ConnectionError, FileNotFoundError, PermissionError):
        return sample_photographs()


def describe_photographs(folder):
    """What is in ``folder``: ``(True, text)`` if it is BSDS300, otherwise ``(False, text)``."""
    train, test = (len(image_files(Path(folder) / mode)) for mode in ('train', 'test'))
    counts = f'{train} to train and {test} to test'
    try:
        check_photographs(folder)
        return True, f'BSDS300: {counts}, all checksums right'
    except FileNotFoundError:
        return False, f'not known to be BSDS300, as {MANIFEST} is missing: {counts}'
    except OSError:
        return False, f'NOT BSDS300, but other images: {counts}'


def fetch(destination=None):
    """Downloads BSDS300 (22 MB) into ``destination`` (default: ``BSDS300/`` beside this file), if
    it isn't there already. Returns the folder that holds ``train/`` and ``test/``; it appears
    only when all 300 photographs are there and have the right checksums. Raises ConnectionError if
    Berkeley can't be reached, FileNotFoundError if the list of checksums is missing,
    PermissionError if the folder can't be written, and OSError if what comes is damaged.
    """
    import pooch  # here, as nothing else needs it
    wanted, images = _manifest(), Path(destination or HERE / 'BSDS300') / 'images'
    if images.is_dir():
        check_photographs(images)
        return images
    try:
        images.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=images.parent, prefix='.download-')
    except OSError as error:  # also of a file system to read only
        raise PermissionError(error.errno, error.strerror, str(images.parent)) from error
    with temporary as folder:
        archive, unpacked = Path(folder) / 'images.tgz', Path(folder) / 'images'
        try:
            pooch.HTTPDownloader(progressbar=True, timeout=20)(BSDS_URL, str(archive), pooch=None)
        except OSError as error:  # those of requests, too
            raise ConnectionError(f'BSDS300 could not be downloaded from {BSDS_URL} ({error}). '
                                  + ADVICE) from error
        _unpack(archive, unpacked, wanted)
        check_photographs(unpacked, ADVICE)
        if not images.is_dir():  # another process may have been quicker
            os.replace(unpacked, images)
    return images


def _unpack(archive, folder, wanted):
    """Writes the ``wanted`` photographs, and nothing else: no name in the archive is trusted."""
    targets = {f'BSDS300/images/{name}': folder / name for name in wanted}
    try:
        with tarfile.open(archive) as members:  # whose filters are missing in Python 3.11.2
            for member in members:
                if member.isfile() and member.name in targets:
                    targets[member.name].parent.mkdir(parents=True, exist_ok=True)
                    targets[member.name].write_bytes(members.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise OSError(f'the download of {BSDS_URL} is damaged ({error}). {ADVICE}') from error


def check_photographs(folder, advice='Delete that folder and fetch it again.'):
    """Raises OSError if ``folder`` has not all of BSDS300, by name and SHA-256; it names five."""
    wrong = []
    for name, digest in _manifest().items():
        file = Path(folder) / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        raise OSError(f'{len(wrong)} of the 300 photographs of BSDS300 are missing or damaged in '
                      f'{folder}: {", ".join(wrong[:5])}. {advice}')


def _manifest():
    """The photographs of BSDS300: a dict of ``train/NAME`` or ``test/NAME`` to SHA-256."""
    if not MANIFEST.is_file():
        raise FileNotFoundError(f"there is no {MANIFEST}, the list of BSDS300's checksums")
    lines = MANIFEST.read_text(encoding='utf-8').splitlines()
    return {name: digest for digest, name in map(str.split, lines)}


def sample_photographs(destination=None):
    """A small stand-in for BSDS300: photographs that come with scikit-image. Returns its folder."""
    from skimage import data

    user = getattr(os, 'getuid', getpass.getuser)()  # in a container, users may have no name
    folder = Path(destination or Path(tempfile.gettempdir()) / f'stand-ins-for-BSDS300-{user}')
    names = {'train': 'brick camera grass gravel retina',
             'test': 'astronaut coffee hubble_deep_field immunohistochemistry moon rocket'}
    for mode in names:
        (folder / mode).mkdir(parents=True, exist_ok=True)
        for name in names[mode].split():
            file = folder / mode / f'{name}.png'
            if not file.exists():  # not yet, or a cleaner of temporary files has taken it
                unfinished = file.with_suffix(f'.{os.getpid()}')
                Image.fromarray(getattr(data, name)()).save(unfinished, 'PNG')
                os.replace(unfinished, file)
    return folder


def image_files(folder):
    """The images in ``folder``, sorted by name. Raises FileNotFoundError if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}: root_dir must hold train/ and test/')
    suffixes = Image.registered_extensions()
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise FileNotFoundError(f'there is no image in {folder}')
    return files


def read_photograph(file):
    """A photograph as Pillow reads it, turned upright: a tensor (3, height, width) of bytes.
    Raises ValueError, naming the file."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in 'IF':  # grey of more than 8 bits, which `convert` would clip
                values = np.asarray(image)
                if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
                    raise ValueError('its values have 32 bits: save it with 8 or 16')
                image = Image.fromarray((values / 257).round().astype(np.uint8))
            pixels = np.array(image.convert('RGB'))
    except Exception as error:  # of a damaged file it can be any
        raise ValueError(f'{file} is not a readable image ({error})') from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_floats(values):
    """The integers of an image file (uint8 or uint16) as floats in [-1, 1]; floats as float32."""
    if values.is_floating_point():
        return values.float()
    return values.float().div_(torch.iinfo(values.dtype).max / 2).sub_(1)


def to_integers(image, dtype=torch.uint8):
    """Floats in [-1, 1] as the integers of an image file (uint8 or uint16), clipped and rounded."""
    largest = torch.iinfo(dtype).max
    return ((image + 1) * (largest / 2)).round_().clamp_(0, largest).to(dtype)


# --- the data set --------------------------------------------------------------------------------
class NoisyBSDSDataset(td.Dataset):
    """Pairs (noisy, clean) of crops of the photographs in ``root_dir/train`` or ``root_dir/test``.

    Item: two tensors (3, height, width); clean is in [-1, 1], noisy is clean plus white Gaussian
    noise, not clipped. For ``mode='train'``, crop and noise are new at each access (drawn from
    torch's random stream); for ``'test'``, or with a seed, they are a function of (seed, index).

    Args:
        root_dir: the folder, see `find_photographs`.
        mode: ``'train'`` or ``'test'``.
        image_size: (height, width) of the crops in pixels, or one number for both.
        sigma: standard deviation of the noise on the scale 0..255 (that is 2 sigma / 255 here).
        seed: of crops and noise that are the same at each access (default: 0 for ``'test'``).
        subset: positions in the sorted list of files (default: all of them).
        crops: how often each photograph comes in one pass.
        augment: random flips, and quarter turns if the crops are square.
        cache: keep the decoded photographs in memory as bytes (BSDS300: 139 MB).

    Raises FileNotFoundError if the folder is missing or holds no image, and ValueError for a bad
    argument, an unreadable file, or one that is smaller than the crop; the message names it.
    """

    def __init__(self, root_dir, mode='train', image_size=(180, 180), sigma=30, *, seed=None,
                 subset=None, crops=1, augment=False, cache=True):
        size = tuple(image_size) if np.iterable(image_size) else (image_size, image_size)
        if mode not in ('train', 'test'):
            raise ValueError(f"mode must be 'train' or 'test', got {mode!r}")
        if len(size) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in size):
            raise ValueError(f'image_size must be (height, width) in pixels, got {image_size!r}')
        if np.iterable(sigma) or not 0 <= sigma < math.inf:
            raise ValueError(f'sigma must be a number, 0 or more, got {sigma!r}')
        if not isinstance(crops, int) or crops < 1:
            raise ValueError(f'crops must be a whole number, 1 or more, got {crops!r}')
        self.files = image_files(Path(root_dir) / mode)
        if subset is not None:
            subset = subset if isinstance(subset, range) else list(subset)
            if not subset or min(subset) < 0 or max(subset) >= len(self.files):
                raise ValueError(f'subset must be positions from 0 to {len(self.files) - 1} of the '
                                 f'photographs in {Path(root_dir) / mode}, got {subset!r}')
            self.files = [self.files[k] for k in subset]
        self.mode, self.image_size, self.sigma = mode, size, sigma
        self.seed = 0 if seed is None and mode == 'test' else seed
        self.subset, self.crops, self.augment = subset, crops, augment
        self.images = None
        if cache:
            self.images = [self._photograph(k) for k in range(len(self.files))]

    OPTIONS = {'seed': None, 'subset': None, 'crops': 1, 'augment': False}  # shown if not so

    def __repr__(self):
        shown = {'mode': self.mode, 'image_size': self.image_size, 'sigma': self.sigma,
                 'photographs': len(self.files)}
        for name, default in self.OPTIONS.items():
            if getattr(self, name) != default:
                shown[name] = getattr(self, name)
        words = ', '.join(f'{name}={value}' for name, value in shown.items())
        return f'{type(self).__name__}({words})'

    def __len__(self):
        return len(self.files) * self.crops

    def __getitem__(self, index):
        index = range(len(self))[index]  # as of a list: -1 is the last, too large an IndexError
        random = self._random(index)
        clean = self._crop(self._photograph(index % len(self.files)), random)
        if self.augment:
            clean = self._flip(clean, random)
        noise = 2 * self.sigma / 255 * torch.randn(clean.shape, generator=random)
        return clean + noise, clean

    def _random(self, index):
        """A generator for the random numbers of a sample, or None for torch's own."""
        if self.seed is not None:
            return torch.Generator().manual_seed(nt.mix_seeds(self.seed, index))

    def _photograph(self, k):
        if self.images:
            return self.images[k]
        image = read_photograph(self.files[k])
        (height, width), (rows, columns) = image.shape[1:], self.image_size
        if height < rows or width < columns:
            raise ValueError(f'{self.files[k].name} has {height}x{width} pixels, less than '
                             f'image_size {rows}x{columns} (height x width)')
        return image

    def _crop(self, image, random, size=None):
        """A random crop, of ``image_size`` or another size: floats in [-1, 1]."""
        rows, columns = size or self.image_size
        top = draw(image.shape[1] - rows + 1, random)
        left = draw(image.shape[2] - columns + 1, random)
        return to_floats(image[:, top:top + rows, left:left + columns])

    def _flip(self, image, random):
        """Flipped at random, and transposed if it is square: with both come the quarter turns."""
        image = image.flip([axis for axis in (1, 2) if draw(2, random)])
        if image.shape[1] == image.shape[2] and draw(2, random):
            image = image.transpose(1, 2)
        return image.contiguous()


def draw(n, random):
    """A random whole number, 0 to n - 1."""
    return int(torch.randint(n, (), generator=random))


# --- networks ------------------------------------------------------------------------------------
class NNRegressor(nt.NeuralNetwork):
    """A network trained for the least mean squared error."""

    def criterion(self, y, d):
        """The mean squared error of ``y`` for ``d``, over all their elements."""
        return F.mse_loss(y, d)


class DnCNN(NNRegressor):
    """A residual CNN for denoising: input and output (N, channels, height, width), of any size.

    Convolution and ReLU, D blocks of convolution, batch norm and ReLU, and a last convolution whose
    output is added to the input; all 3x3, with C features. After Zhang et al., "Beyond a Gaussian
    denoiser", IEEE TIP 2017.

    Args:
        D: the number of blocks, 0 or more.
        C: features per layer.
        channels: of the images (1 for grey).
        he_init: start as `initialise` says; otherwise everything stays at PyTorch's defaults.
        batch_norm: ``'usual'`` (eps = 1e-5) or ``'course'`` (eps = C, which is what the
            assignment's ``BatchNorm2d(C, C)`` means: its second argument is eps), or ``'none'``.
        zero_last: start the last convolution at zero, so that the network starts as the identity.

    Raises ValueError if ``D``, ``C`` or ``batch_norm`` is out of range.
    """

    def __init__(self, D, C=64, *, channels=3, he_init=True, batch_norm='usual', zero_last=False):
        super().__init__()
        self._check(D)
        if not isinstance(C, int) or C < 1:
            raise ValueError(f'C must be a whole number, 1 or more, got {C!r}')
        if batch_norm not in ('usual', 'course', 'none'):
            raise ValueError(f"batch_norm must be 'usual', 'course' or 'none', got {batch_norm!r}")
        self.D, self.C = D, C
        widths = [channels] + [C] * (D + 1) + [channels]
        self.conv = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=d, dilation=d)
            for a, b, d in zip(widths, widths[1:], [1, *self._dilations(D), 1]))
        self.bn = nn.ModuleList(
            nn.Identity() if batch_norm == 'none' else
            nn.BatchNorm2d(C, eps=C if batch_norm == 'course' else 1e-5) for _ in range(D))
        if he_init:
            self.initialise(batch_norm)
        if zero_last:
            for values in self.conv[-1].parameters():
                nn.init.zeros_(values)

    def initialise(self, batch_norm):
        """He's (ICCV 2015) for all convolutions but the last; 1.25 sqrt(C) for eps = C."""
        for conv in self.conv[:-1]:
            nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
        if batch_norm == 'course':
            for bn in self.bn:
                nn.init.constant_(bn.weight, 1.25 * math.sqrt(self.C))

    @staticmethod
    def _check(D):
        if not isinstance(D, int) or D < 0:
            raise ValueError(f'D must be a whole number, 0 or more, got {D!r}')

    @staticmethod
    def _dilations(D):
        return [1] * D

    @property
    def receptive_field(self):
        """The width in pixels of the part of the input that an output pixel depends on."""
        return 2 * self.D + 5

    pooling_cell = 1  # the side in pixels of what becomes one value at the coarsest scale

    def block(self, k, h):
        """The k-th block, k = 0 ... D-1: convolution, batch norm, ReLU."""
        return F.relu(self.bn[k](self.conv[k + 1](h)), inplace=True)

    def features(self, x):
        """All but the last convolution: (N, C, height, width)."""
        h = F.relu(self.conv[0](x), inplace=True)
        for k in range(self.D):
            h = self.block(k, h)
        return h

    def forward(self, x):
        return x + self.conv[-1](self.features(x))


class UDnCNN(DnCNN):
    """DnCNN in the shape of a U-Net: the D blocks work at D/2 scales.

    Each of the first D/2 - 1 blocks is followed by 2x2 max-pooling, and each of the last D/2 - 1
    preceded by unpooling to where the maxima were; features of the same scale are added and divided
    by sqrt(2), which keeps their variance. Parameters as in `DnCNN`.

    Args: as in `DnCNN`; D is even, 2 or more.
    """

    @staticmethod
    def _check(D):
        if not isinstance(D, int) or D < 2 or D % 2:
            raise ValueError(f'D must be an even number, 2 or more, got {D!r}')

    @property
    def receptive_field(self):
        """See `DnCNN`; some output pixels depend on less."""
        return 9 * self.pooling_cell

    @property
    def pooling_cell(self):
        return 2 ** (self.D // 2 - 1)

    def down(self, h):
        """To the next coarser scale. Returns the features, and what `up` needs to come back."""
        size = h.shape[-2:]
        if min(size) < 2:
            raise ValueError(f'the image is too small: height and width must be at least '
                             f'{2 ** (self.D // 2 - 1)} pixels for D = {self.D}')
        h, indices = F.max_pool2d(h, 2, return_indices=True)
        return h, (indices, size)

    def up(self, h, way_back):
        """Back to the next finer scale."""
        indices, size = way_back
        return F.max_unpool2d(h, indices, 2, output_size=size)

    def join(self, h, earlier):
        """An inner skip: adds earlier features of the same scale."""
        return (h + earlier).div_(math.sqrt(2))

    def features(self, x):
        first = h = F.relu(self.conv[0](x), inplace=True)
        scales = []
        for k in range(self.D // 2 - 1):
            h, way_back = self.down(self.block(k, h))
            scales.append((h, way_back))
        for k in (self.D // 2 - 1, self.D // 2):
            h = self.block(k, h)
        for k in range(self.D // 2 + 1, self.D):
            same_scale, way_back = scales.pop()
            h = self.block(k, self.up(self.join(h, same_scale), way_back))
        return self.join(h, first)


class DUDnCNN(UDnCNN):
    """UDnCNN with dilated convolutions in place of pooling: every scale at full resolution.

    Where UDnCNN has pooled k times more than it has unpooled, the convolution has dilation 2**k
    ("à trous"). Parameters as in `DnCNN`.

    Args: as in `UDnCNN`.
    """

    @staticmethod
    def _dilations(D):
        return [2 ** min(k, D - 1 - k) for k in range(D)]

    @property
    def receptive_field(self):
        """See `DnCNN`."""
        return 2 ** (self.D // 2 + 2) + 1

    pooling_cell = 1

    def down(self, h):
        return h, None

    def up(self, h, way_back):
        return h


class SkipsOnly(DUDnCNN):
    """DUDnCNN without dilation: DnCNN with inner skips. For the ablation, see `ARMS`."""

    _dilations = staticmethod(DnCNN._dilations)
    receptive_field = DnCNN.receptive_field


class DilationOnly(DUDnCNN):
    """DUDnCNN without inner skips: DnCNN with dilation. For the ablation, see `ARMS`."""

    def join(self, h, earlier):
        return h


class PoolingOnly(UDnCNN):
    """UDnCNN without inner skips: DnCNN with pooling. For the ablation, see `ARMS`."""

    def join(self, h, earlier):
        return h


NETWORKS = {'dncnn': DnCNN, 'udncnn': UDnCNN, 'dudncnn': DUDnCNN,
            'skips': SkipsOnly, 'dilation': DilationOnly, 'pooling': PoolingOnly}
COMPARED = ('dncnn', 'udncnn', 'dudncnn')  # the assignment's; the others are of the ablation


def make_network(name, D=6, **options):
    """One of `NETWORKS` by its name. Raises ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f'the network must be one of {", ".join(NETWORKS)}, got {name!r}')
    return NETWORKS[name](D, **options)


def load_network(name, folder=None, device='cpu'):
    """A trained network, in evaluation mode, and its history as `nntools.Experiment` has it.

    It comes from ``checkpoints/NAME`` or another ``folder``; ``name`` begins with that of the
    network, and ``_course`` after it stands for the course's batch norm. Raises RuntimeError if
    there is no checkpoint, it can't be read, or is of another network.
    """
    folder = Path(folder or HERE / 'checkpoints' / name)
    checkpoint = nt.load_checkpoint(str(folder / 'checkpoint.pth.tar'), device)
    state, settings = checkpoint['Net'], checkpoint.get('Setting', {})
    network, *words = name.split('_')
    D = sum(key.startswith('conv') and key.endswith('weight') for key in state) - 2
    usual = 'course' not in words and 'eps=1e-05' in settings.get('Net: bn.0', 'eps=1e-05')
    batch_norm = 'usual' if usual else 'course'
    if 'bn.0.weight' not in state:
        batch_norm = 'none'
    net = make_network(network, D, C=len(state['conv.0.bias']),
                       channels=len(state[f'conv.{D + 1}.bias']), batch_norm=batch_norm)
    stored = settings.get('Net', type(net).__name__)
    if stored != type(net).__name__:
        raise RuntimeError(f'{folder} holds a {stored}, not a {type(net).__name__}')
    net.load_state_dict(state)
    return net.to(device).eval(), checkpoint['History']


def count_parameters(net):
    """The number of weights and biases that are trained."""
    return sum(p.numel() for p in net.parameters())


def receptive_field_map(net, offset=(0, 0), draws=8):
    """Which input pixels an output pixel depends on: a square of booleans, measured by autograd.

    The output pixel is ``offset`` rows and columns below and right of the middle one, which is the
    first of its pooling cell. A copy of ``net`` with positive weights is used, so that nothing
    cancels, and several random inputs, because max-pooling picks other pixels each time.
    """
    net = type(net)(net.D, C=2).double().eval()
    for name, parameter in net.named_parameters():
        nn.init.constant_(parameter, 0.1 if name.endswith('weight') else 0)
    cell = net.pooling_cell
    middle = math.ceil((net.receptive_field + cell) / cell) * cell
    row, column, size = middle + offset[0], middle + offset[1], 2 * middle
    random = torch.Generator().manual_seed(0)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for part in torch.arange(draws).split(50):
        x = torch.rand(len(part), 3, size, size, generator=random, dtype=torch.float64)
        y = net(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y[:, 0, row, column].sum(), x)
        seen |= (gradient != 0).flatten(0, 1).any(0)  # (N, 3, size, size) -> (size, size)
    return seen


def measure_receptive_field(net):
    """The width in pixels of the largest `receptive_field_map` at any position in a cell."""
    columns = [receptive_field_map(net, (k, k)).any(0).nonzero() for k in range(net.pooling_cell)]
    return max(int(where.max() - where.min()) + 1 for where in columns)


# --- statistics ----------------------------------------------------------------------------------
def psnr(y, d):
    """The PSNR in dB of each image of the batch ``y`` for ``d``, both (N, ...) in [-1, 1]: (N,).
    It is 10 log10(4 / MSE): the range 2, squared, over the image's mean squared error."""
    return 10 * torch.log10(4 / (y - d).double().square().flatten(1).mean(1))


class DenoisingStatsManager(nt.StatsManager):
    """The mean loss, and the mean of the images' `psnr` in dB, whatever the batch size."""

    def init(self):
        super().init()
        self.running_psnr = 0.0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.running_psnr += psnr(y, d).sum().item()

    def summarize(self):
        return {'loss': super().summarize(), 'PSNR': self.running_psnr / self.number_samples}


# --- pictures ------------------------------------------------------------------------------------
def myimshow(image, ax=plt):
    """Shows a tensor (channels, height, width) in [-1, 1], clipped. Returns matplotlib's image."""
    image = ((image.detach().cpu().float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    handle = ax.imshow(image.numpy(), cmap='gray', vmin=0, vmax=1)
    ax.axis('off')
    return handle


def plot(exp, fig, axes, noisy, visu_rate=2, clean=None):
    """Draws the state of a training: to be called by ``exp.run(plot=lambda exp: plot(exp, ...))``.

    ``axes`` is an array of 2x2: the image ``noisy`` (channels, height, width), the same denoised,
    the loss and the PSNR of each epoch. With ``clean`` the titles give the PSNR. Drawn before the
    first epoch and after every ``visu_rate``-th, in place in notebooks of every kind.
    """
    if exp.epoch % visu_rate:
        return
    denoised = exp.predict(noisy[None])[0]
    for ax, image, title in zip(axes[0], (noisy, denoised), ('Noisy', 'Denoised')):
        if clean is not None:
            title += f': {psnr(image[None], clean[None])[0]:.2f} dB'
        ax.clear()
        myimshow(image, ax=ax)
        ax.set_title(title)
    rows = exp.table()
    epochs = [row['epoch'] for row in rows]
    labels = {'loss': 'Loss (mean squared error)', 'PSNR': 'PSNR (dB)'}
    for ax, name in zip(axes[1], labels):
        ax.clear()
        ax.set(xlabel='Epoch', ylabel=labels[name])
        for key, text in ((name, 'training'), ('val_' + name, 'validation')):
            if rows and key in rows[0]:
                ax.plot(epochs, [row[key] for row in rows], '.-', label=text)
                ax.legend()
    fig.tight_layout()
    _refresh(fig)


def _refresh(fig):
    """Shows a figure where it is already shown. (Only a display handle works in all notebooks.)"""
    if 'inline' not in plt.get_backend():
        fig.canvas.draw_idle()
        fig.canvas.flush_events()
    elif hasattr(fig, 'display_handle'):
        fig.display_handle.update(fig)
    else:
        from IPython.display import display
        fig.display_handle = display(fig, display_id=True)
        plt.close(fig)  # or the notebook would show it once more at the end of the cell


def draw_network(net, ax):
    """Draws the layers of a network of this file as they run on an image of 64x64 pixels.

    A bar is a convolution: its height is that of the features it makes, its number the dilation if
    there is any. Arcs lead to where (+) earlier features, or the input x, are added.
    """
    net, heights = copy.deepcopy(net).cpu().eval(), []
    for conv in net.conv:
        conv.register_forward_hook(lambda conv, x, y: heights.append(y.shape[-2]))
    with torch.no_grad():
        net(torch.zeros(1, net.conv[0].in_channels, 64, 64))
    last = len(heights) - 1
    # Layers, with x before and y after them.
    kinds = ['convolution, ReLU', *['convolution, batch norm, ReLU'] * net.D, 'convolution']
    labels = [kind if kinds.index(kind) == k else '_' for k, kind in enumerate(kinds)]
    colours = ['tab:orange', *['tab:blue'] * net.D, 'tab:green']
    ax.bar(range(last + 1), heights, 0.6, -np.array(heights) / 2, color=colours, alpha=0.8,
           label=labels)
    middle = {'ha': 'center', 'va': 'center', 'weight': 'bold'}
    arrow = {'arrowstyle': '->', 'color': '0.4'}
    ax.annotate('', (last + 1.3, 0), (-1.3, 0), arrowprops=arrow, zorder=0)
    ax.text(-1.4, 0, '$x$', middle, size='large')
    ax.text(last + 1.45, 0, '$y$', middle, size='large')
    # Dilations, and changes of resolution.
    dilations = [conv.dilation[0] for conv in net.conv]
    for k in range(len(heights)):
        if max(dilations) > 1:
            ax.text(k, 0, dilations[k], middle, color='white')
        if k < last and heights[k] != heights[k + 1]:
            words = 'pool' if heights[k] > heights[k + 1] else 'unpool'
            ax.text(k + 0.5, -8, words, ha='center', va='top', rotation=90, size='small')
    # Additions: after which layer features are kept, and before which they are added.
    sums = [(-1.25, last + 0.05)]
    if isinstance(net, UDnCNN):
        sums += [(k, net.D - k) for k in range(1, net.D // 2)] + [(0, last - 1)]
    circle = {'boxstyle': 'circle,pad=0.1', 'facecolor': 'white', 'edgecolor': '0.4'}
    for start, end in sums:
        start, end, top = start + 0.5, end + 0.5, 40 + 5 * (end - start)
        ax.plot([start, start, end, end], [0, top, top, 4], color='0.4', lw=1.2)
        ax.text(end, 0, '+', middle, color='0.2', zorder=3, bbox=circle)
    ax.set(xlim=(-1.7, last + 1.7), ylim=(-36, 52 + 5 * last))
    ax.set_title(f'{type(net).__name__}({net.D})', loc='left')
    ax.legend(loc='upper center', bbox_to_anchor=(0.5, 0), ncols=3)
    ax.axis('off')


# --- the fixed test ------------------------------------------------------------------------------
def benchmark_pairs(root_dir, sigma=30, size=320, seed=123, mode='test', subset=None, clip=False):
    """The fixed test on which networks are compared: a generator of pairs (noisy, clean).

    All photographs in sorted order, the centre crop of ``size`` pixels, noise from one generator
    for all, not clipped, or with ``clip`` as 8-bit files have it. Tensors (1, 3, size, size).
    """
    random = torch.Generator().manual_seed(seed)
    for image in NoisyBSDSDataset(root_dir, mode, size, subset=subset).images:
        top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
        clean = to_floats(image[None, :, top:top + size, left:left + size])
        noisy = clean + 2 * sigma / 255 * torch.randn(clean.shape, generator=random)
        if clip:
            noisy = to_floats(to_integers(noisy))
        yield noisy, clean


def benchmark(denoise, pairs):
    """Scores ``denoise(noisy)`` on ``pairs``: a dict of arrays, one value an image: ``psnr`` in dB,
    ``ssim`` (of scikit-image, at its defaults) and ``seconds``. ``denoise`` is a function on the
    CPU, or a network on any device, used in evaluation mode."""
    from skimage.metrics import structural_similarity

    net = denoise if isinstance(denoise, nn.Module) else nn.Identity()
    training, device = net.training, getattr(net, 'device', 'cpu')
    net.eval()
    scores = {'psnr': [], 'ssim': [], 'seconds': []}
    with torch.inference_mode():
        for noisy, clean in pairs:
            start = time.perf_counter()
            denoised = denoise(noisy.to(device)).cpu()
            scores['seconds'].append(time.perf_counter() - start)
            scores['psnr'].append(psnr(denoised, clean).item())
            y, d = denoised[0].numpy(), clean[0].numpy()
            scores['ssim'].append(structural_similarity(y, d, channel_axis=0, data_range=2))
    net.train(training)
    return {name: np.array(values) for name, values in scores.items()}


# --- stored scores -------------------------------------------------------------------------------
HELD_OUT = range(0, 200, 10)  # of the training photographs of BSDS300: what recipes are chosen on
CBSD68 = [*range(22), *range(23, 69)]  # of the test photographs, as the folder in cszn/IRCNN has it
LEVELS = (3, 10, 15, 25, 30, 50)  # of noise, in levels.csv
ARMS = {name: (name, 6) for name in ('dncnn', 'skips', 'dilation', 'dudncnn', 'pooling', 'udncnn')}
ARMS['dncnn14'] = ('dncnn', 14)  # of the ablation: the name of the network, and D


def read_scores(file, which):
    """The PSNR in dB of one set of photographs, ``'test'`` or ``'held out'``, from a file of scores
    (CSV): for each network an array (seeds, photographs)."""
    by_network = {}
    with open(file, newline='') as stream:
        for row in csv.DictReader(stream):
            if row['set'] == which:
                by_seed = by_network.setdefault(row['network'], {})
                by_seed.setdefault(row['seed'], []).append(float(row['psnr']))
    return {network: np.array(list(by_seed.values())) for network, by_seed in by_network.items()}


def read_published(which):
    """The mean PSNR in dB of published networks on one set: a dict of network to number. The file
    says where each is from; they were measured elsewhere, with their authors' weights."""
    with open(PUBLISHED, newline='', encoding='utf-8') as stream:
        rows = [row for row in csv.DictReader(stream) if row['set'] == which]
    return {row['network']: float(row['psnr']) for row in rows}


def by_level(file, clip=False):
    """The mean PSNR at each of `LEVELS`, from a file of scores, and that of published networks: a
    dict of the network's name to a list, with NaN where nothing was measured."""
    columns = []
    for sigma in LEVELS:
        which = f'sigma {sigma}, 8 bits' if clip else f'sigma {sigma}'
        ours = {name: values.mean() for name, values in read_scores(file, which).items()}
        columns.append(ours | read_published(which))
    names = dict.fromkeys(itertools.chain(*columns))
    return {name: [column.get(name, math.nan) for column in columns] for name in names}


def over_photographs(difference):
    """The mean of paired differences, one a photograph, and half its 95 % interval: what other
    photographs of the same kind would give with the *same* trained networks."""
    low, high = stats.ttest_1samp(difference, 0).confidence_interval()
    return difference.mean(), (high - low) / 2


def over_trainings(first, second):
    """The difference of the mean PSNR of two arrays (seeds, photographs), and half its 95 %
    interval by Welch's t: what other seeds would give on the *same* photographs. It is NaN for a
    single seed. The two may vary by different amounts from seed to seed."""
    first, second = first.mean(axis=1), second.mean(axis=1)
    if min(len(first), len(second)) == 1:
        return first.mean() - second.mean(), math.nan
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    return first.mean() - second.mean(), (high - low) / 2


def difference_in_words(scores, first, second):
    """The difference of two networks in ``scores``, see `read_scores`, with both its intervals."""
    if first == second or second not in scores:
        return ''
    mean, photographs = over_photographs(scores[first].mean(axis=0) - scores[second].mean(axis=0))
    _, trainings = over_trainings(scores[first], scores[second])
    words = f' ± {trainings:.2f} (t)' if trainings > 0 else ', one training'
    return f'{mean:+.2f} ± {photographs:.2f} (p){words}'


# --- the recipe ----------------------------------------------------------------------------------
def option(default, text, **more):
    """A field of `Recipe`: its default, and what ``programs.train --help`` says about it."""
    return dataclasses.field(default=default, metadata={'help': text} | more)


@dataclasses.dataclass
class Recipe:
    """How a network is trained. The defaults are the recipe of the networks in ``checkpoints/``."""
    net: str = option('dncnn', 'which network', choices=[*NETWORKS])
    D: int = option(6, 'blocks')
    C: int = option(64, 'features per layer')
    batch_norm: str = option('usual', 'see DnCNN', choices=['usual', 'course', 'none'])
    he_init: bool = option(True, "He's initialisation, see DnCNN")
    zero_last: bool = option(True, 'start as the identity')
    sigma: float = option(30, 'noise level, 0..255')
    epochs: int = option(200, 'epochs in all')
    crops: int = option(2, 'crops of each photograph an epoch')
    size: int = option(64, 'side of the crops in pixels')
    batch_size: int = option(4, 'crops a step')
    augment: bool = option(True, 'flips and quarter turns')
    lr: float = option(5e-3, 'peak learning rate of Adam')
    warm_up: float = option(0.1, 'share of the epochs before the peak; then a cosine to 0')
    constant_rate: bool = option(False, 'no warm-up, no cosine')
    grad_clip: float = option(0.2, 'bound on the norm of the gradient')
    precision: str = option('bfloat16', 'of training', choices=['float32', 'bfloat16', 'float16'])
    seed: int = option(0, 'of initialisation, batches and noise')
    hold_out: bool = option(False, 'train without every tenth photograph, and test on those')

    def experiment(self, photographs, folder, allow=()):
        """The training as an `nntools.Experiment` in ``folder``; its ``run(epochs)`` trains. Raises
        ValueError if an option makes no sense, or isn't that of the checkpoint in ``folder``."""
        if self.epochs < 1:
            raise ValueError(f'epochs must be 1 or more, got {self.epochs}')
        torch.manual_seed(self.seed)
        net = self.network().to(nt.find_device(), memory_format=torch.channels_last)
        train_set, val_set = self.data_sets(Path(photographs))
        adam = torch.optim.Adam(net.parameters(), lr=self.lr)
        scheduler = None
        if not self.constant_rate:
            cosine = Cosine(self.epochs, self.warm_up)
            scheduler = torch.optim.lr_scheduler.LambdaLR(adam, cosine)
        return nt.Experiment(
            net, train_set, val_set, adam, DenoisingStatsManager(), folder, self.batch_size,
            perform_validation_during_training=True, seed=self.seed, scheduler=scheduler,
            grad_clip=self.grad_clip, precision=self.precision, allow=allow)

    def network(self):
        """The network as it is before training."""
        return make_network(self.net, self.D, C=self.C, he_init=self.he_init,
                            batch_norm=self.batch_norm, zero_last=self.zero_last)

    def data_sets(self, photographs):
        """To train on, and to validate on: every fifth test photograph, or those held out."""
        files = image_files(photographs / 'train')
        if self.hold_out and len(files) <= HELD_OUT[-1]:
            raise ValueError('hold_out needs the 200 training photographs of BSDS300, and '
                             f'{photographs} has {len(files)}')
        subset = [k for k in range(len(files)) if k not in HELD_OUT] if self.hold_out else None
        train_set = self.data_set(photographs, 'train', self.size, subset=subset,
                                  crops=self.crops, augment=self.augment)
        if self.hold_out:
            return train_set, self.data_set(photographs, 'train', 96, subset=HELD_OUT, seed=0)
        fifth = range(0, len(image_files(photographs / 'test')), 5)
        return train_set, self.data_set(photographs, 'test', 96, subset=fifth)

    def data_set(self, photographs, mode, size, **options):
        """What decides on the noise: another recipe overrides it."""
        return NoisyBSDSDataset(photographs, mode, size, self.sigma, **options)


@dataclasses.dataclass
class Cosine:
    """The learning rate in units of its peak, in epoch 0, 1, ...: linear for the share ``warm_up``
    of the ``epochs``, and a cosine to 0. (An object, as a checkpoint keeps what is in it, so that a
    training isn't continued with another length by mistake.)"""
    epochs: int
    warm_up: float = 0.1

    def __call__(self, epoch):
        linear = (epoch + 1) / max(1, self.warm_up * self.epochs)
        return min(linear, (1 + math.cos(math.pi * epoch / self.epochs)) / 2)


if __name__ == '__main__':  # where the commands were until the third edition
    moved = {'evaluate': 'results evaluate', 'levels': 'results levels', 'bm3d': 'results bm3d',
             'ablation': 'results ablation', 'example': 'picture'}
    command = ' '.join(sys.argv[1:2]) or 'NAME'
    print(f'it is now: python -m programs.{moved.get(command, command)}', file=sys.stderr)
    sys.exit(2)
