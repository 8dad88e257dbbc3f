"""Image denoising with deep CNNs: data, networks, statistics, pictures, and a command line.

In the order of the notebook ``Assignment4.ipynb``. Images are tensors (channels, height, width)
with values in [-1, 1]; noise levels ``sigma`` are on the usual scale 0..255.

    python -m denoising_utils --help      # train, ablation, evaluate, levels, bm3d, denoise, example, fetch
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import getpass
import hashlib
import http.client
import io
import itertools
import math
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tifffile
import torch
import torch.nn.functional as F
import torch.utils.data as td
from PIL import ExifTags, Image, ImageOps
from scipy import stats
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.datasets.utils import download_url
from torchvision.transforms import functional as transforms
from tqdm.auto import tqdm

import nntools as nt

HERE = Path(__file__).resolve().parent
BSDS_URL = 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz'
MANIFEST = HERE / 'checkpoints' / 'BSDS300.sha256'


def keep_freed_memory():
    """Asks glibc, where that is the C library, to keep memory that one layer frees for the next, instead
    of giving it back to the system in between: a photograph takes half the time (``make benchmark``).

    Settings of the environment (``MALLOC_...``, see mallopt(3)) go before.
    """
    if not any(name.startswith('MALLOC_') for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL('libc.so.6').mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside of the heap, which go back when they are freed
            mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: how much is free at the heap's end before that goes back


keep_freed_memory()  # before the first tensor


# --- data ----------------------------------------------------------------------------------------

def find_photographs(root=None):
    """The folder that holds ``train/`` and ``test/``: a `Path`.

    It is ``root`` if given, else the environment variable ``BSDS300``, else ``BSDS300/images``
    beside this file, which is downloaded from Berkeley and checked if it is not there. If Berkeley
    can't be reached, this folder not be written, or the list of checksums in ``checkpoints/`` is missing,
    `sample_photographs` stand in; `describe_photographs` tells which it is.

    Raises FileNotFoundError if the folder named by ``root`` or ``BSDS300`` has no photographs, and
    OSError if the download is damaged.
    """
    for name, given in (('root', root), ('the environment variable BSDS300', os.environ.get('BSDS300'))):
        if given:
            for folder in (Path(given), Path(given) / 'images'):
                if (folder / 'train').is_dir() and (folder / 'test').is_dir():
                    return folder
            raise FileNotFoundError(f'{name} is {str(given)!r}, but there are no folders train/ and test/ in it')
    folder = HERE / 'BSDS300' / 'images'
    if folder.is_dir():
        return folder
    try:
        return fetch()
    except OSError as error:
        if not isinstance(error, (ConnectionError, PermissionError, FileNotFoundError)) and error.errno != errno.EROFS:
            raise
        return sample_photographs()


def describe_photographs(folder):
    """What the photographs in ``folder`` are: ``(True, text)`` if they are BSDS300, all 300 of them
    with the right checksums, otherwise ``(False, text)``."""
    counts = {mode: len(_image_files(Path(folder) / mode)) for mode in ('train', 'test')}
    counts = f'{counts["train"]} to train and {counts["test"]} to test'
    try:
        check_photographs(folder)
        return True, f'BSDS300: {counts}, all checksums right'
    except FileNotFoundError:
        return False, f'not known to be BSDS300, as {MANIFEST} is missing: {counts}'
    except OSError:
        return False, f'NOT BSDS300, but other images: {counts}'


def fetch(destination=None):
    """Downloads BSDS300 (22 MB) into ``destination`` (default: ``BSDS300/`` beside this file) and
    checks each of its 300 photographs. Returns the folder that holds ``train/`` and ``test/``.

    The folder appears only when it is complete. Raises ConnectionError if Berkeley can't be reached,
    FileNotFoundError if the list of its checksums is missing, and OSError if what comes is damaged or
    is not BSDS300.
    """
    _manifest()  # before the download
    destination = Path(destination or HERE / 'BSDS300')
    if (destination / 'images').is_dir():
        check_photographs(destination / 'images')
        return destination / 'images'
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination, prefix='.download-') as temporary:
        advice = 'Try again, or set the environment variable BSDS300 to a folder with its train/ and test/.'
        try:
            with _time_limit_of_connections(20):
                download_url(BSDS_URL, temporary, 'BSDS300-images.tgz')
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ConnectionError(f'BSDS300 could not be downloaded from {BSDS_URL} ({error}). {advice}') from error
        images = Path(temporary) / 'images'
        try:
            _unpack(Path(temporary) / 'BSDS300-images.tgz', images)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise OSError(f'the download of {BSDS_URL} is damaged ({error}). {advice}') from error
        check_photographs(images, advice)
        try:
            os.replace(images, destination / 'images')
        except OSError:
            if not (destination / 'images').is_dir():  # or another process was quicker
                raise
    return destination / 'images'


def _manifest():
    """The photographs of BSDS300: a dict of ``train/NAME`` or ``test/NAME`` to SHA-256."""
    if not MANIFEST.is_file():
        raise FileNotFoundError(errno.ENOENT, 'BSDS300 can\'t be checked without its list of checksums', str(MANIFEST))
    lines = MANIFEST.read_text(encoding='utf-8').splitlines()
    return {name: digest for digest, name in map(str.split, lines)}


def _unpack(archive, folder):
    """Writes the photographs of the manifest from the archive into ``folder``, and nothing else that
    is in there: no name is trusted. (The filters of `tarfile` are missing in Python 3.11.2.)"""
    wanted = {f'BSDS300/images/{name}': folder / name for name in _manifest()}
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and member.name in wanted:
                wanted[member.name].parent.mkdir(parents=True, exist_ok=True)
                wanted[member.name].write_bytes(members.extractfile(member).read())


def check_photographs(folder, advice='Delete that folder and fetch it again.'):
    """Compares the photographs in ``folder`` with the manifest of BSDS300: 300 names and SHA-256.

    Raises OSError, naming the files that are missing or different, and giving the ``advice``.
    """
    wrong = []
    for name, digest in _manifest().items():
        file = Path(folder) / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        raise OSError(f'{len(wrong)} of the 300 photographs of BSDS300 are missing or damaged in {folder}: '
                      f'{", ".join(wrong[:5])}{" ..." if len(wrong) > 5 else ""}. {advice}')


@contextlib.contextmanager
def _time_limit_of_connections(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def sample_photographs(destination=None):
    """A small stand-in for BSDS300 that needs no network. Returns its folder.

    ``test/`` has six photographs that come with scikit-image, ``train/`` 12 images of "dead leaves":
    discs of random size and colour that hide each other, whose statistics are close to those of
    photographs (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001).
    """
    from skimage import data

    user = getattr(os, 'getuid', getpass.getuser)()  # in a container, a user may have a number but no name
    folder = Path(destination or Path(tempfile.gettempdir()) / f'sample-photographs-{user}')

    def is_complete():
        return len([*folder.glob('t*/*.png')]) == 18

    if is_complete():
        return folder
    images = {f'test/{name}.png': getattr(data, name)()
              for name in ('astronaut', 'coffee', 'hubble_deep_field', 'immunohistochemistry', 'rocket')}
    images['test/motorcycle.png'] = data.stereo_motorcycle()[0]
    images |= {f'train/dead_leaves_{k:02}.png': dead_leaves(seed=k) for k in range(12)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for name, pixels in images.items():
            file = Path(temporary) / 'complete' / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        if not is_complete():  # a cleaner of temporary files has left a part
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was quicker
            os.replace(Path(temporary) / 'complete', folder)
    return folder


def dead_leaves(height=321, width=481, discs=2000, seed=0):
    """An image of overlapping discs, radius r with density r**-3: bytes (height, width, 3)."""
    random = np.random.default_rng(seed)
    radii = np.clip(3 / np.sqrt(random.uniform(size=discs)), 3, 150)
    rows, columns = random.uniform(0, height, discs), random.uniform(0, width, discs)
    image = np.zeros((height, width, 3))
    for r, row, column, colour in zip(radii, rows, columns, random.uniform(0, 255, (discs, 3))):
        top, left = max(0, int(row - r)), max(0, int(column - r))
        y, x = np.ogrid[top:min(height, int(row + r) + 2), left:min(width, int(column + r) + 2)]
        part = image[top:top + y.shape[0], left:left + x.shape[1]]
        part[(y - row) ** 2 + (x - column) ** 2 <= r ** 2] = colour
    return image.astype(np.uint8)


def _image_files(folder):
    """The images in ``folder`` in sorted order."""
    suffixes = Image.registered_extensions()
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)


def read_photograph(file):
    """A photograph, see `read_image`, as a tensor (3, height, width) of bytes. Raises ValueError, naming the file."""
    pixels = read_image(file).pixels
    return (pixels if pixels.dtype == torch.uint8 else to_integers(to_floats(pixels))).expand(3, -1, -1).contiguous()


class NoisyBSDSDataset(td.Dataset):
    """Pairs (noisy, clean) of crops of the photographs in ``root_dir/train`` or ``root_dir/test``.

    Item: two tensors (3, height, width); clean is in [-1, 1], noisy is clean plus white Gaussian
    noise, not clipped unless asked for. For ``mode='train'``, crop and noise are new at each access (drawn from
    torch's random stream); for ``'test'``, or with a seed, they are a function of (seed, index).

    Args:
        root_dir: the folder, see `find_photographs`.
        mode: ``'train'`` or ``'test'``.
        image_size: (height, width) of the crops in pixels, or one number for both.
        sigma: standard deviation of the noise on the scale 0..255 (that is 2 sigma / 255 here), or
            (lowest, highest), between which one is drawn for each sample, uniformly.
        seed: of crops and noise that are the same at each access (default: 0 for ``'test'``).
        subset: positions in the sorted list of files (default: all of them).
        crops: how often each photograph comes in one pass.
        augment: random flips, and quarter turns if the crops are square.
        clip: the share of the samples whose noisy image is clipped and rounded to 8 bits, as a file
            has it: 0 to 1 (True for all of them).
        jitter: make half of the samples as different as photographs are: reduced in size (up to 2.5
            times, so sharper), colours exchanged, saturation and contrast changed; a quarter of
            these are grey, and so is their noise.
        cache: keep the decoded photographs in memory as bytes (BSDS300: 139 MB).

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
        ValueError: a bad mode, size, sigma, clip, subset or number of crops, an unreadable file, or one that is
            smaller than the crop; the message names it.
    """

    def __init__(self, root_dir, mode='train', image_size=(180, 180), sigma=30, *, seed=None,
                 subset=None, crops=1, augment=False, clip=False, jitter=False, cache=True):
        if mode not in ('train', 'test'):
            raise ValueError(f"mode must be 'train' or 'test', got {mode!r}")
        levels = tuple(sigma) if np.iterable(sigma) else (sigma, sigma)
        if len(levels) != 2 or not 0 <= levels[0] <= levels[1] < math.inf:
            raise ValueError(f'sigma must be 0 or more, or a pair (lowest, highest), got {sigma!r}')
        if not 0 <= clip <= 1:
            raise ValueError(f'clip must be a share of the samples, 0 to 1, got {clip!r}')
        if not isinstance(crops, int) or crops < 1:
            raise ValueError(f'crops must be a whole number, 1 or more, got {crops!r}')
        size = tuple(image_size) if np.iterable(image_size) else (image_size, image_size)
        if len(size) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in size):
            raise ValueError(f'image_size must be (height, width) in pixels, got {image_size!r}')
        folder = Path(root_dir) / mode
        if not folder.is_dir():
            raise FileNotFoundError(f'there is no folder {folder}: root_dir must hold train/ and test/')
        self.files = _image_files(folder)
        if not self.files:
            raise FileNotFoundError(f'there is no image in {folder}')
        if subset is not None:
            subset = subset if isinstance(subset, range) else [*subset]
            if not subset or not all(0 <= k < len(self.files) for k in subset):
                raise ValueError(f'subset must be positions from 0 to {len(self.files) - 1} of the photographs in '
                                 f'{folder}, got {subset!r}')
            self.files = [self.files[k] for k in subset]
        self.mode, self.image_size, self.sigma = mode, size, levels if np.iterable(sigma) else sigma
        self.seed = 0 if seed is None and mode == 'test' else seed
        self.subset, self.crops, self.augment = subset, crops, augment
        self.clip, self.jitter = float(clip), jitter
        self.images = [read_photograph(file) for file in self.files] if cache else None
        for k in range(len(self.files) if cache else 0):
            self._photograph(k)  # so that one that is too small is found now

    def __len__(self):
        return len(self.files) * self.crops

    def __repr__(self):
        more = {'photographs': len(self.files)}
        more |= {'seed': self.seed} if self.seed is not None else {}
        more |= {'subset': self.subset} if self.subset is not None else {}
        more |= {'crops': self.crops} if self.crops > 1 else {}
        more |= {'augment': True} if self.augment else {}
        more |= {'clip': self.clip} if self.clip else {}
        more |= {'jitter': True} if self.jitter else {}
        more = ''.join(f', {name}={value}' for name, value in more.items())
        return (f'{type(self).__name__}(mode={self.mode}, image_size={self.image_size}, '
                f'sigma={self.sigma}{more})')

    def _photograph(self, k):
        image = self.images[k] if self.images else read_photograph(self.files[k])
        if image.shape[1] < self.image_size[0] or image.shape[2] < self.image_size[1]:
            raise ValueError(f'{self.files[k].name} has {image.shape[1]}x{image.shape[2]} pixels, less than '
                             f'image_size {self.image_size[0]}x{self.image_size[1]} (height x width)')
        return image

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} of a data set of {len(self)}')
        index %= len(self)
        image = self._photograph(index % len(self.files))
        random = None if self.seed is None else torch.Generator().manual_seed(nt.mix_seeds(self.seed, index))

        def draw(n):
            return int(torch.randint(n, (), generator=random))

        def uniform(low, high):
            return low + (high - low) * torch.rand((), generator=random).item()

        height, width = rows, columns = self.image_size
        jitter = self.jitter and draw(2)
        if jitter:
            zoom = uniform(1, min(2.5, image.shape[1] / height, image.shape[2] / width))
            rows, columns = int(zoom * height), int(zoom * width)
        top, left = draw(image.shape[1] - rows + 1), draw(image.shape[2] - columns + 1)
        clean = image[:, top:top + rows, left:left + columns].float().div_(127.5).sub_(1)
        grey = jitter and not draw(4)
        if jitter:
            saturation = 0 if grey else uniform(0, 2.5)
            order = torch.randperm(3, generator=random)
            clean = _changed(clean[order], (height, width), saturation, contrast=uniform(0.5, 1.5))
        if self.augment:
            clean = clean.flip([axis for axis in (1, 2) if draw(2)])
            clean = clean.transpose(1, 2) if height == width and draw(2) else clean
        sigma = uniform(*self.sigma) if np.iterable(self.sigma) else self.sigma
        noise = torch.randn((1 if grey else 3, *clean.shape[1:]), generator=random).mul_(2 * sigma / 255)
        noisy = noise + clean
        if self.clip and uniform(0, 1) < self.clip:
            noisy = to_floats(to_integers(noisy))
        return noisy, clean.contiguous()


def _changed(image, size, saturation, contrast):
    """An image (3, height, width) in [-1, 1] at another size and with other colours."""
    image = F.interpolate(image[None], size, mode='bicubic', antialias=True)[0].add(1).div(2).clamp(0, 1)
    image = transforms.adjust_contrast(transforms.adjust_saturation(image, saturation), contrast)
    return image.mul_(2).sub_(1)


def to_floats(values):
    """The integers of an image file (uint8 or uint16) as floats in [-1, 1]; floats as float32."""
    return values.float() if values.is_floating_point() else values.float().div_(torch.iinfo(values.dtype).max / 2).sub_(1)


def to_integers(image, dtype=torch.uint8):
    """Floats in [-1, 1] as integers of an image file: clipped and rounded; as they are if ``dtype`` is of floats."""
    if dtype.is_floating_point:
        return image
    largest = torch.iinfo(dtype).max
    return ((image + 1) * (largest / 2)).round_().clamp_(0, largest).to(dtype)


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
    denoiser", IEEE TIP 2017. The receptive field is 2D + 5 pixels wide.

    Args:
        D: the number of blocks, 0 or more.
        C: features per layer.
        channels: of the images (1 for grey).
        he_init: start every convolution but the last at He's initialisation (normal, fan-in; He
            et al., ICCV 2015), and the weights of the course's batch norm at 1.25 sqrt(C); otherwise
            everything stays at PyTorch's defaults.
        batch_norm: ``'usual'`` (eps = 1e-5) or ``'course'`` (eps = C, which is what the assignment's
            ``BatchNorm2d(C, C)`` means: the second argument is **eps**), or ``'none'``.
        zero_last: start the last convolution at zero, so that the network starts as the identity.

    Raises:
        ValueError: ``D``, ``C`` or ``batch_norm`` is out of range.
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
            for conv in self.conv[:-1]:
                nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
            if batch_norm == 'course':
                for bn in self.bn:
                    nn.init.constant_(bn.weight, 1.25 * math.sqrt(C))
        if zero_last:
            nn.init.zeros_(self.conv[-1].weight)
            nn.init.zeros_(self.conv[-1].bias)

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
    by sqrt(2), which keeps their variance. Parameters as in `DnCNN`. The receptive field is
    9 * 2**(D/2 - 1) pixels wide.

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
    ("à trous"). Parameters as in `DnCNN`. The receptive field is 2**(D/2 + 2) + 1 pixels wide.

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


def fold_batch_norm(net):
    """A copy of a trained network in which each batch norm is part of the convolution before it: the same
    function, but trained on as a network without batch norm."""
    net = copy.deepcopy(net).eval()
    for k, bn in enumerate(net.bn):
        if isinstance(bn, nn.BatchNorm2d):
            net.conv[k + 1] = fuse_conv_bn_eval(net.conv[k + 1], bn)
            net.bn[k] = nn.Identity()
    return net


def count_parameters(net):
    """The number of weights and biases that are trained."""
    return sum(p.numel() for p in net.parameters())


def receptive_field_map(net, offset=(0, 0), draws=8):
    """Which input pixels an output pixel depends on: a square of booleans, measured by autograd.

    The output pixel is ``offset`` rows and columns below and right of the middle one, which is the first
    of its pooling cell. A copy of ``net`` with positive weights is used, so that nothing cancels, and
    several random inputs, because max-pooling picks other pixels each time.
    """
    net = type(net)(net.D, C=2).double().eval()
    for name, parameter in net.named_parameters():
        nn.init.constant_(parameter, 0.1 if name.endswith('weight') else 0)
    cell = net.pooling_cell
    middle = math.ceil((net.receptive_field + cell) / cell) * cell
    random = torch.Generator().manual_seed(0)
    seen = torch.zeros(2 * middle, 2 * middle, dtype=torch.bool)
    for part in torch.arange(draws).split(50):
        x = torch.rand(len(part), 3, *seen.shape, generator=random, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x)[:, 0, middle + offset[0], middle + offset[1]].sum(), x)
        seen |= (gradient != 0).flatten(0, 1).any(0)
    return seen


def measure_receptive_field(net):
    """The width in pixels of the largest `receptive_field_map` over all positions in a pooling cell.

    To be held against ``net.receptive_field``, which is the formula.
    """
    columns = [receptive_field_map(net, (k, k)).any(0).nonzero() for k in range(net.pooling_cell)]
    return max(int(where.max() - where.min()) + 1 for where in columns)


def make_network(name, D=6, **options):
    """`DnCNN`, `UDnCNN` or `DUDnCNN` by its name in lower case, or `SkipsOnly` as ``'skips'`` and so on.

    Raises ValueError for another name.
    """
    networks = NETWORKS | ABLATED
    if name not in networks:
        raise ValueError(f'the network must be one of {", ".join(networks)}, got {name!r}')
    return networks[name](D, **options)


NETWORKS = {'dncnn': DnCNN, 'udncnn': UDnCNN, 'dudncnn': DUDnCNN}
ABLATED = {'skips': SkipsOnly, 'dilation': DilationOnly, 'pooling': PoolingOnly}


def load_network(name, folder=None, device='cpu'):
    """A trained network and its history, from ``checkpoints/NAME`` or another ``folder``.

    ``name`` begins with that of the network; ``_course`` after it stands for the course's batch norm
    (``'dncnn'``, ``'dncnn_14'``, ``'dncnn_course_assignment'``). Returns the network, in evaluation mode, and a
    list as `nntools.Experiment.history` has. Raises RuntimeError if there is no checkpoint, it can't
    be read, or is known to be of another network.
    """
    network, *options = name.split('_')
    checkpoint = nt.load_checkpoint(str(Path(folder or HERE / 'checkpoints' / name) / 'checkpoint.pth.tar'), device)
    state, setting = checkpoint['Net'], checkpoint.get('Setting', {})
    course = 'course' in options or 'eps=1e-05' not in setting.get('Net: bn.0', 'eps=1e-05')
    D = sum(key.startswith('conv') and key.endswith('weight') for key in state) - 2
    net = make_network(network, D, C=len(state['conv.0.bias']), channels=len(state[f'conv.{D + 1}.bias']),
                       batch_norm='none' if 'bn.0.weight' not in state else 'course' if course else 'usual')
    if setting.get('Net', type(net).__name__) != type(net).__name__:
        raise RuntimeError(f'{folder or name} holds a {setting["Net"]}, not a {type(net).__name__}')
    net.load_state_dict(state)
    return net.to(device).eval(), checkpoint['History']


# --- statistics ----------------------------------------------------------------------------------

def psnr(y, d):
    """The PSNR in dB of each image of the batch ``y`` for ``d``, both (N, ...) in [-1, 1]: (N,).

    10 log10(4 / MSE): the peak-to-peak range 2, squared, over the image's mean squared error.
    """
    return 10 * torch.log10(4 / (y - d).double().square().flatten(1).mean(1))


class DenoisingStatsManager(nt.StatsManager):
    """The mean loss, and the mean over the images of their `psnr` in dB, whatever the batch size."""

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
    """Shows a tensor (channels, height, width) in [-1, 1], clipped to it. Returns matplotlib's image."""
    image = ((image.detach().cpu().float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    handle = ax.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap='gray', vmin=0, vmax=1)
    ax.axis('off')
    return handle


def plot(exp, fig, axes, noisy, visu_rate=2, clean=None):
    """Draws the state of a training: to be called by ``exp.run(plot=lambda exp: plot(exp, ...))``.

    ``axes`` is an array of 2x2: the noisy image, the same denoised, the loss and the PSNR of each
    epoch (training, and validation if there is one). Drawn before the first epoch and after every
    ``visu_rate``-th. The figure changes in place in every kind of notebook, and in a window outside of one.

    ``noisy`` is (channels, height, width); with ``clean`` the titles give the PSNR.
    """
    if exp.epoch % visu_rate:
        return
    denoised = exp.predict(noisy[None])[0]
    for ax, image, title in zip(axes[0], (noisy, denoised), ('Noisy', 'Denoised')):
        ax.clear()
        myimshow(image, ax=ax)
        ax.set_title(title if clean is None else f'{title}: {psnr(image[None], clean[None])[0]:.2f} dB')
    rows = exp.table()
    epochs = [row['epoch'] for row in rows]
    for ax, name, label in zip(axes[1], ('loss', 'PSNR'), ('Loss (mean squared error)', 'PSNR (dB)')):
        ax.clear()
        for key, text in ((name, 'training'), ('val_' + name, 'validation')):
            if rows and key in rows[0]:
                ax.plot(epochs, [row[key] for row in rows], '.-', label=text)
        ax.set(xlabel='Epoch', ylabel=label)
        if rows:
            ax.legend()
    fig.tight_layout()
    _refresh(fig)


def draw_network(net, ax):
    """Draws the layers of a network of this file as they run on an image of 64x64 pixels.

    A bar is a convolution: its height is that of the features it makes, its number the dilation if the
    network has any. Arcs lead to where (+) earlier features, or the input x, are added.
    """
    heights = []
    hooks = [conv.register_forward_hook(lambda conv, x, y: heights.append(y.shape[-2])) for conv in net.conv]
    training, net = net.training, net.eval()
    with torch.no_grad():
        net(torch.zeros(1, net.conv[0].in_channels, 64, 64, device=net.device))
    net.train(training)
    for hook in hooks:
        hook.remove()
    last = len(net.conv) - 1
    for positions, colour, kind in (((0,), 'tab:orange', 'convolution, ReLU'),
                                    (range(1, last), 'tab:blue', 'convolution, batch norm, ReLU'),
                                    ((last,), 'tab:green', 'convolution')):
        if positions:
            bars = [heights[k] for k in positions]
            ax.bar(positions, bars, 0.6, [-height / 2 for height in bars], color=colour, alpha=0.8, label=kind)
    ax.annotate('', (last + 1.3, 0), (-1.3, 0), arrowprops={'arrowstyle': '->', 'color': '0.4'}, zorder=0)
    for x, text in ((-1.4, '$x$'), (last + 1.45, '$y$')):
        ax.text(x, 0, text, ha='center', va='center', size='large')
    if any(conv.dilation[0] > 1 for conv in net.conv):
        for k, conv in enumerate(net.conv):
            ax.text(k, 0, conv.dilation[0], ha='center', va='center', color='white', weight='bold')
    for k, (before, after) in enumerate(zip(heights, heights[1:])):
        if before != after:
            ax.text(k + 0.5, -8, 'pool' if after < before else 'unpool', ha='center', rotation=90, va='top',
                    size='small')
    sums = [(k, net.D - k) for k in range(1, net.D // 2)] + [(0, last - 1)] if isinstance(net, UDnCNN) else []
    for start, end in [*sums, (-1.25, last + 0.05)]:
        start, end, top = start + 0.5, end + 0.5, 40 + 5 * (end - start)
        ax.plot([start, start, end, end], [0, top, top, 4], color='0.4', lw=1.2)
        ax.text(end, 0, '+', ha='center', va='center', color='0.2', weight='bold', zorder=3,
                bbox={'boxstyle': 'circle,pad=0.1', 'facecolor': 'white', 'edgecolor': '0.4'})
    ax.set(xlim=(-1.7, last + 1.7), ylim=(-36, 52 + 5 * last))
    ax.set_title(f'{type(net).__name__}({net.D})', loc='left')
    ax.legend(loc='upper center', bbox_to_anchor=(0.5, 0), ncols=3)
    ax.axis('off')


def _refresh(fig):
    """Shows a figure where it is already shown. (Only a display handle works in all notebooks.)"""
    if 'inline' not in matplotlib.get_backend():
        fig.canvas.draw_idle()
        fig.canvas.flush_events()
    elif hasattr(fig, 'display_handle'):
        fig.display_handle.update(fig)
    else:
        from IPython.display import display
        fig.display_handle = display(fig, display_id=True)
        plt.close(fig)  # or the notebook would show it once more at the end of the cell


# --- whole photographs ---------------------------------------------------------------------------

def denoise_image(net, image, tile=192, strength=1.0, precision=torch.float32):
    """Denoises an image of any size with bounded memory, in tiles of ``tile`` pixels.

    Each tile is read with a margin of half the receptive field or more, and cut where the pooling
    cells of the whole image would be, so that the result is that of the untiled image up to rounding.
    A progress bar shows in a terminal or notebook, unless TQDM_DISABLE is set.

    Args:
        net: a network for three channels, on any device.
        image: a tensor (channels, height, width): floats in [-1, 1], or the integers of a file
            (uint8 or uint16), of which only one tile at a time becomes floats. One channel (grey)
            goes through the network as three equal ones, of whose results the mean is taken.
        tile: side of the tiles in pixels.
        strength: 1 for what the network returns, 0 for the image as it is, or a blend of both.
        precision: the type in which the layers compute, see `half_precision`.

    Returns a tensor like ``image`` on the CPU. Raises ValueError for another shape.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f'image must be (channels, height, width) with 1 or 3 channels, got the shape {tuple(image.shape)}')
    height, width = image.shape[1:]
    tile, margin = (math.ceil(n / net.pooling_cell) * net.pooling_cell for n in (max(tile, 1), net.receptive_field // 2 + 1))
    result = torch.empty_like(image, device='cpu')
    training, device = net.training, net.device
    net.eval()
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for top, left in tqdm([*itertools.product(range(0, height, tile), range(0, width, tile))], unit='tile',
                              leave=False, disable=bool(os.environ.get('TQDM_DISABLE')) or None):
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            part = image[:, first_row:top + tile + margin, first_column:left + tile + margin].to(device)
            part = to_floats(part).expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            part = part.lerp(net(part).float(), strength)[0, :, top - first_row:, left - first_column:][:, :tile, :tile]
            part = part.mean(0, keepdim=True) if len(image) == 1 else part
            result[:, top:top + tile, left:left + tile] = to_integers(part, image.dtype)
    net.train(training)
    return result


def half_precision(device):
    """The `torch.dtype` in which layers compute fastest on ``device``: half precision where it has
    instructions for it. In 8 bits that changes about one value in five to eight, nearly always by one."""
    if device.type == 'cuda':
        return torch.float16
    abilities = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    return torch.bfloat16 if abilities.get('avx512_bf16') or abilities.get('amx_bf16') else torch.float32


def for_level(net, sigma, trained=30):
    """A copy of a network, trained on noise of level ``trained``, for a higher level ``sigma``: it scales
    its input down, so that the noise has the level it knows, and what it adds to it up again.

    As the network is linear in its input up to the first bias, that is a matter of two layers. Not for
    lower levels, where it doesn't help: there the copy is the network as it is.
    """
    net, factor = copy.deepcopy(net), min(1, trained / sigma)
    with torch.no_grad():
        net.conv[0].weight.mul_(factor)
        net.conv[-1].weight.div_(factor)
        net.conv[-1].bias.div_(factor)
    return net


def self_ensemble(net):
    """A function of images (N, channels, height, width): the mean of what ``net`` makes of their eight
    flips and quarter turns, turned back (Timofte, Rothe and Van Gool, "Seven ways to improve
    example-based single image super resolution", CVPR 2016). Eight times the work."""
    def denoise(x):
        total = torch.zeros_like(x)
        for turns in range(4):
            for axes in ([], [-1]):
                total += net(x.rot90(turns, (-2, -1)).flip(axes)).flip(axes).rot90(-turns, (-2, -1))
        return total / 8
    return denoise


def noise_level(image):
    """An estimate of the standard deviation of white noise on the scale 0..255, as a number.

    From the wavelet coefficients of the finest scale (`skimage.restoration.estimate_sigma`) of the
    middle of an ``image`` (channels, height, width), at most 1024x1024 pixels. Fine texture counts as
    noise; noise that was clipped, or is smooth itself, is underestimated.
    """
    from skimage.restoration import estimate_sigma

    top, left = (max(0, (n - 1024) // 2) for n in image.shape[1:])
    middle = to_floats(image[:, top:top + 1024, left:left + 1024]).numpy() * 127.5
    with warnings.catch_warnings():  # of an image of a few pixels, on which there is nothing to estimate
        warnings.simplefilter('ignore')
        return float(np.nan_to_num(estimate_sigma(middle, channel_axis=0, average_sigmas=True)))


def denoise_file(net, source, target, *, strength=1.0, precision=torch.float32, force=False):
    """Denoises an image file at full size, see `denoise_image`, and writes it to ``target``.

    What is read and what is kept: see `read_image` and `write_image`. Returns the `noise_level` of the
    file before and after. ``target`` appears whole or not at all.

    Raises ValueError if ``source`` can't be read as an image, or ``target`` not written in the format
    that its name says; FileExistsError if there is such a file, unless ``force`` is true.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target} is the file to read: choose another name for the result')
    _check_new(target, force)
    image = read_image(source)
    _check_target(image, target)
    before = noise_level(image.pixels)
    image.pixels = denoise_image(net, image.pixels, strength=strength, precision=precision)
    write_image(image, target)
    return before, noise_level(image.pixels)


@dataclasses.dataclass
class ImageFile:
    """What an image file holds, see `read_image` and `write_image`."""
    pixels: torch.Tensor  # (1 or 3, height, width) of uint8 or uint16
    alpha: Image.Image | None = None  # its transparency, 8 bits
    exif: bytes = b''
    icc_profile: bytes | None = None


def read_image(file):
    """Reads an image file of any kind that Pillow knows: an `ImageFile`.

    A camera's rotation mark (EXIF) is applied, and left out of the EXIF of the result. Palettes, CMYK
    and other models of colour become RGB. 16 bits are kept in grey files and in TIFF; of other colours
    of 16 bits Pillow reads 8, and a warning says so (but for PPM). An EXIF that is damaged is left out, with a warning.

    Raises ValueError, naming the file and why, if it can't be read as one still image.
    """
    if Path(file).is_dir():
        raise ValueError(f'{file} is a folder: name the image files in it')
    try:
        with Image.open(file) as image:
            frames = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)  # MPO: a camera's, with previews
            deep = image.mode[0] not in 'IF' and (
                max(image.tag_v2.get(BITS_PER_SAMPLE, [8])) > 8 if image.format == 'TIFF' else ';16' in str(image.tile))
            upright = image.getexif().get(ORIENTATION, 1) == 1
            ImageOps.exif_transpose(image, in_place=True)
            result = ImageFile(None, exif=_descriptive_exif(image, file))
            result.icc_profile = image.info.get('icc_profile') if image.mode != 'CMYK' else None  # it will be RGB
            if frames == 1 and deep and image.format == 'TIFF' and image.mode == 'RGB' and upright:
                with contextlib.suppress(ValueError):  # of a compression that needs one more package
                    result.pixels = _pixels(_read_tiff(file))
                    return result
            image.load()
    except FileNotFoundError:
        raise ValueError(f'there is no file {file}') from None
    except Exception as error:  # of a damaged file it can be any
        raise ValueError(f'{file} is not a readable image ({error})') from error
    if frames > 1:
        raise ValueError(f'{file} has {frames} frames or pages: save the one to denoise as a file of its own')
    if deep:
        warnings.warn(f'{file} has colours of 16 bits, of which 8 were read: TIFF that is upright and opaque, and not '
                      'compressed by LZW, keeps them', stacklevel=2)
    if image.mode == 'F' or image.mode == 'I' and not all(0 <= value <= 65535 for value in image.getextrema()):
        raise ValueError(f'{file} has values of 32 bits, whose range is unknown: save it with 8 or 16 bits')
    if image.mode[0] != 'I' and image.has_transparency_data:
        result.alpha = image.convert('RGBA').getchannel('A')
    if image.mode[0] != 'I':
        image = image.convert('L' if image.mode in ('1', 'L', 'LA') else 'RGB')
    result.pixels = _pixels(np.array(image))
    return result


def _read_tiff(file):
    """The pixels of a TIFF in colour, (height, width, 3), whichever way they are stored."""
    with tifffile.TiffFile(file) as tiff:
        values = tiff.pages[0].asarray()
        return np.moveaxis(values, 0, -1) if tiff.pages[0].planarconfig == tifffile.PLANARCONFIG.SEPARATE else values


def _descriptive_exif(image, file):
    """The EXIF of a Pillow image, without the tags that tell how its pixels are stored."""
    try:
        exif = image.getexif()
        for tag in [tag for tag in exif if tag < 700 and tag not in DESCRIPTIVE or tag == ICC_PROFILE]:
            del exif[tag]
        for tag, text in exif.items():
            if isinstance(text, str):  # which Pillow has decoded by Latin-1, and would encode by ASCII
                exif[tag] = text.encode('latin-1')
        return exif.tobytes()
    except Exception as error:  # of values of another type than their tag has, it can be any
        warnings.warn(f'{file} has an EXIF that is damaged ({error}), and left out', stacklevel=3)
        return b''


def write_image(image, target):
    """Writes an `ImageFile` in the format that the suffix of ``target`` says: all of it or nothing.

    Lossy formats at a quality of 95. 16 bits where the format has them, which is PNG and TIFF for grey
    and TIFF for colours (with the texts of the EXIF); elsewhere 8 bits. Raises OSError, of Pillow, for
    what the format can't hold, such as transparency in JPEG.
    """
    target, pixels = Path(target), image.pixels
    kind = Image.registered_extensions()[target.suffix.lower()]
    deep = pixels.dtype == torch.uint16 and not image.alpha and (kind == 'TIFF' or kind == 'PNG' and len(pixels) == 1)
    if pixels.dtype == torch.uint16 and not deep:
        pixels = torch.cat([to_integers(to_floats(rows)) for rows in pixels.split(64, 1)], 1)
    values = pixels.permute(1, 2, 0).numpy()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.denoised-') as folder:
        file = Path(folder) / target.name
        if deep and len(pixels) == 3:
            exif = Image.Exif()
            exif.load(image.exif)
            tags = [(tag, 's', 0, text.encode('latin-1'), True) for tag, text in exif.items() if isinstance(text, str)]
            if image.icc_profile:
                tags.append((int(ICC_PROFILE), 'B', len(image.icc_profile), image.icc_profile, True))
            tifffile.imwrite(file, values, photometric='rgb', software=False, metadata=None, extratags=tags)
        else:
            picture = Image.fromarray(values.squeeze(2) if len(pixels) == 1 else values)
            if image.alpha:
                picture.putalpha(image.alpha)
            picture.save(file, kind, **_options(image, kind))
        os.replace(file, target)


# The TIFF tags (as EXIF has them) that tell about the photograph; others tell how its pixels are stored.
DESCRIPTIVE = {ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
               ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit,
               ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.HostComputer}
ORIENTATION, ICC_PROFILE = ExifTags.Base.Orientation, ExifTags.Base.InterColorProfile
BITS_PER_SAMPLE = ExifTags.Base.BitsPerSample


def _pixels(values):
    """An array (height, width) or (height, width, 3) of integers as a tensor (1 or 3, height, width)."""
    values = values if values.dtype == np.uint8 else values.astype(np.uint16)
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def _options(image, kind):
    """The options of `PIL.Image.Image.save` for an `ImageFile`."""
    return {'exif': image.exif, 'icc_profile': image.icc_profile, 'quality': 95} | (
        {'subsampling': 0} if kind == 'JPEG' else {})


def _check_new(target, force):
    if target.exists() and not force:
        raise FileExistsError(f'{target} exists already: choose another name for the result, or force it to be replaced')


def _check_target(image, target):
    """Raises ValueError if an `ImageFile` can't be written to ``target``: before the work, not after it."""
    kind = Image.registered_extensions().get(target.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f'{target} must have the suffix of an image format, such as .png or .jpg')
    if not target.parent.is_dir():
        raise ValueError(f'there is no folder {target.parent} to write {target.name} into')
    mode = ('L', 'RGB')[len(image.pixels) == 3] + 'A' * (image.alpha is not None)
    try:
        Image.new(mode, (1, 1)).save(io.BytesIO(), kind, **_options(image, kind))
    except (OSError, ValueError) as error:
        raise ValueError(f'{target} can\'t hold this image ({error}): choose another format, such as .png') from error


# --- evaluation ----------------------------------------------------------------------------------

def benchmark_pairs(root_dir, sigma=30, size=320, seed=123, mode='test', subset=None, clip=False):
    """The fixed test on which networks are compared: a generator of pairs (noisy, clean).

    All photographs in sorted order, the centre crop of ``size`` pixels, noise from one generator
    for all of them, not clipped, or with ``clip`` as 8-bit files have it. Tensors (1, 3, size, size).
    """
    random = torch.Generator().manual_seed(seed)
    data = NoisyBSDSDataset(root_dir, mode, size, sigma, subset=subset)
    for image in data.images:
        top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
        clean = image[None, :, top:top + size, left:left + size].float() / 127.5 - 1
        noisy = clean + 2 * sigma / 255 * torch.randn(clean.shape, generator=random)
        yield to_floats(to_integers(noisy)) if clip else noisy, clean


def benchmark(denoise, pairs):
    """Scores ``denoise(noisy)`` on each of the ``pairs``: a dict of arrays, one value an image:
    ``psnr`` in dB, ``ssim`` (of scikit-image, at its defaults) and ``seconds``. ``denoise`` is a function
    on the CPU, or a network on any device, which is used in evaluation mode."""
    from skimage.metrics import structural_similarity

    rows, net = [], denoise
    if isinstance(net, nn.Module):
        training, device = net.training, next(net.parameters()).device
        net.eval()

        def denoise(noisy):
            return net(noisy.to(device)).cpu()

    with torch.inference_mode():
        for noisy, clean in pairs:
            start = time.perf_counter()
            denoised = denoise(noisy)
            seconds = time.perf_counter() - start
            y, d = denoised[0].cpu().numpy(), clean[0].numpy()
            rows.append((psnr(denoised, clean).item(),
                         structural_similarity(y, d, channel_axis=0, data_range=2), seconds))
    if isinstance(net, nn.Module):
        net.train(training)
    return dict(zip(('psnr', 'ssim', 'seconds'), np.array(rows).T))


# --- scores of several trainings -----------------------------------------------------------------

HELD_OUT = range(0, 200, 10)  # of the training photographs of BSDS300: what recipes are chosen on
COLUMNS = ('network', 'seed', 'set', 'photograph', 'psnr')  # of a file of scores
CBSD68 = [*range(22), *range(23, 69)]  # the test photographs of BSDS300 that are CBSD68, as the folder in cszn/IRCNN has it
ARMS = {  # of the ablation: the class of each network, and D
    'dncnn': ('dncnn', 6), 'skips': ('skips', 6), 'dilation': ('dilation', 6), 'dudncnn': ('dudncnn', 6),
    'pooling': ('pooling', 6), 'udncnn': ('udncnn', 6), 'dncnn14': ('dncnn', 14)}


def test_at(sigma):
    """What the scores on the test photographs are called in a file of scores: ``'test'``, if at the usual level."""
    return 'test' if sigma == 30 else f'test, sigma {sigma:g}'


def scores_as_rows(network, seed, which, values):
    """Rows of `COLUMNS`, from the PSNR of each photograph of the ``'test'`` or ``'held out'`` set."""
    photographs = HELD_OUT if which == 'held out' else range(len(values))
    return [[network, str(seed), which, str(k), f'{value:.3f}'] for k, value in zip(photographs, values)]


def write_scores(file, rows):
    """Writes rows of `COLUMNS` to a file of scores (CSV), in place of those of the same network, seed and
    set; all or nothing. Raises ValueError if the file is another one."""
    renewed = {tuple(row[:3]) for row in rows}
    if Path(file).exists():
        with open(file, newline='') as stream:
            header, *old = [*csv.reader(stream)] or [COLUMNS]
        if tuple(header) != COLUMNS:
            raise ValueError(f'{file} is not a file of scores, whose first line is {",".join(COLUMNS)}: name another one')
        rows = [row for row in old if tuple(row[:3]) not in renewed] + rows
    temporary = Path(f'{file}.tmp')
    with open(temporary, 'w', newline='') as stream:
        csv.writer(stream, lineterminator='\n').writerows([COLUMNS, *rows])
    os.replace(temporary, file)


def _check_scores(file, root):
    """Raises ValueError before scores of other photographs than BSDS300 get among the committed ones."""
    if file and Path(file).resolve().parent == HERE / 'checkpoints' and not describe_photographs(root)[0]:
        raise ValueError(f'{file} is for scores on BSDS300, and {root} is not: name another file with --scores')


def read_scores(file, which):
    """The PSNR in dB of one set of photographs, ``'test'`` or ``'held out'``, from a file of
    `write_scores`: for each network an array (seeds, photographs)."""
    by_network = {}
    with open(file, newline='') as stream:
        for row in csv.DictReader(stream):
            if row['set'] == which:
                by_seed = by_network.setdefault(row['network'], {})
                by_seed.setdefault(row['seed'], []).append(float(row['psnr']))
    return {network: np.array(list(by_seed.values())) for network, by_seed in by_network.items()}


LEVELS = (3, 10, 15, 25, 30, 50)
# PSNR (dB) of FFDNet for colour, told the level, on the same noisy images (100 test photographs, see
# `benchmark_pairs`), with its authors' weights; measured elsewhere for this project. By set of scores.
FFDNET = {'sigma 10': 35.83, 'sigma 15': 33.53, 'sigma 25': 30.82, 'sigma 30': 29.92, 'sigma 50': 27.54,
          'sigma 10, 8 bits': 35.68, 'sigma 15, 8 bits': 33.28, 'sigma 25, 8 bits': 30.30, 'sigma 50, 8 bits': 25.96}
FFDNET_CLIP = {'sigma 10, 8 bits': 35.82, 'sigma 15, 8 bits': 33.53, 'sigma 25, 8 bits': 30.84, 'sigma 50, 8 bits': 27.55}


def score_levels(name, root_dir):
    """The PSNR on the test photographs at all `LEVELS`, not clipped and as 8-bit files: rows of `COLUMNS`.

    ``name`` is that of a trained network, ``'noisy'`` for none, or ``'dudncnn_scaled'`` for DUDnCNN made
    fit for each level above 30 by `for_level`.
    """
    rows = []
    for sigma, clip in itertools.product(LEVELS, (False, True)):
        if name == 'noisy':
            denoise = torch.clone
        elif name == 'dudncnn_scaled' and sigma <= 30:
            continue
        else:
            denoise = fold_batch_norm(load_network(name.removesuffix('_scaled'))[0])
            denoise = for_level(denoise, sigma) if name.endswith('_scaled') else denoise
        with torch.inference_mode():
            values = [psnr(denoise(noisy), clean).item() for noisy, clean in benchmark_pairs(root_dir, sigma, clip=clip)]
        rows += scores_as_rows(name, 0, f'sigma {sigma}' + ', 8 bits' * clip, values)
    return rows


def by_level(file, clip=False):
    """The mean PSNR at each of `LEVELS`, from a file of scores (see `score_levels`), with FFDNet's: a dict
    of the network's name to a list, with NaN where nothing was measured."""
    sets = [f'sigma {sigma}' + ', 8 bits' * clip for sigma in LEVELS]
    columns = [{name: values.mean() for name, values in read_scores(file, which).items()} for which in sets]
    for which, column in zip(sets, columns):
        column |= {name: values[which] for name, values in (('FFDNet', FFDNET), ('FFDNet-Clip', FFDNET_CLIP)) if which in values}
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, math.nan) for column in columns] for name in names}


def over_photographs(difference):
    """The mean of an array of paired differences, one a photograph, and half its 95 % interval: what
    other photographs of the same kind would give with the *same* trained networks."""
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return difference.mean(), stats.t.ppf(0.975, len(difference) - 1) * error


def over_trainings(first, second):
    """The difference of the mean PSNR of two networks, and half its 95 % interval: what other seeds
    would give on the *same* photographs. NaN for the interval if one of them was trained only once.

    ``first`` and ``second`` are arrays (seeds, photographs), see `read_scores`; the variance between seeds
    is taken to be the same for the two.
    """
    first, second = first.mean(axis=1), second.mean(axis=1)
    half = math.nan
    if min(len(first), len(second)) > 1:
        low, high = stats.ttest_ind(first, second).confidence_interval()
        half = (high - low) / 2
    return first.mean() - second.mean(), half


# --- command line --------------------------------------------------------------------------------


def make_experiment(args):
    """The training of one network by the recipe of the committed checkpoints, as an Experiment.

    ``args``: the options of ``python -m denoising_utils train``, see `parse`.
    """
    if args.epochs < 1:
        raise ValueError(f'--epochs must be 1 or more, got {args.epochs}')
    torch.manual_seed(args.seed)
    if args.start:
        folder = Path(args.start)
        net = load_network(folder.name if folder.name.split('_')[0] in NETWORKS else args.net, folder)[0]
        if type(net) is not (NETWORKS | ABLATED)[args.net]:
            raise ValueError(f'--start {folder} holds a {type(net).__name__}: name it with --net')
        net = fold_batch_norm(net) if args.batch_norm == 'none' else net
    else:
        net = make_network(args.net, args.D, C=args.C, he_init=args.he_init, batch_norm=args.batch_norm,
                           zero_last=args.zero_last)
    net = net.to(nt.find_device(), memory_format=torch.channels_last)
    root = find_photographs(args.data)
    photographs = {mode: len(_image_files(root / mode)) for mode in ('train', 'test')}
    subset = [k for k in range(photographs['train']) if k not in HELD_OUT] if args.hold_out else None
    if args.hold_out and photographs['train'] <= HELD_OUT[-1]:
        raise ValueError(f'--hold-out needs the 200 training photographs of BSDS300, and {root} has {photographs["train"]}')
    sigma = [int(level) if level == int(level) else level for level in args.sigma]  # 30.0 is 30, also in words
    options = dict(sigma=sigma[0] if len(sigma) == 1 else sigma, clip=args.clip, jitter=args.jitter)
    train_set = NoisyBSDSDataset(root, 'train', args.size, subset=subset, crops=args.crops,
                                 augment=not args.no_augment, **options)
    if args.hold_out:
        val_set = NoisyBSDSDataset(root, 'train', 96, subset=HELD_OUT, seed=0, **options)
    else:
        val_set = NoisyBSDSDataset(root, 'test', 96, subset=range(0, photographs['test'], 5), **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    scheduler = None if args.constant_rate else torch.optim.lr_scheduler.LambdaLR(optimizer, Cosine(args.epochs, args.warm_up))
    return nt.Experiment(
        net, train_set, val_set, optimizer, DenoisingStatsManager(), batch_size=args.batch,
        output_dir=args.out or f'experiments/{args.net}', perform_validation_during_training=True,
        seed=args.seed, scheduler=scheduler, grad_clip=args.grad_clip, precision=args.precision, allow=args.allow)


def learning_rate(epoch, epochs, warm_up=0.1):
    """The learning rate in units of its peak, in epoch 0, 1, ... of ``epochs``: linear for the share
    ``warm_up`` of them, and a cosine to 0."""
    return min((epoch + 1) / max(1, warm_up * epochs), (1 + math.cos(math.pi * epoch / epochs)) / 2)


@dataclasses.dataclass
class Cosine:
    """`learning_rate` as a function of the epoch alone. (An object, as a checkpoint keeps what is in it,
    so that a training isn't continued with another length by mistake.)"""
    epochs: int
    warm_up: float

    def __call__(self, epoch):
        return learning_rate(epoch, self.epochs, self.warm_up)


def train(args):
    """Trains a network, or goes on where an interrupted training of it stopped."""
    exp = make_experiment(args)
    exp.run(args.epochs)
    if args.hold_out:
        print_held_out(exp.net, args)
        print(f'training took {sum(exp.seconds) / 60:.1f} minutes')


def print_held_out(net, args):
    """Prints the PSNR on the held-out photographs, and for a network of several levels a table of them."""
    root = find_photographs(args.data)

    def score(pairs):
        return f'{benchmark(net, pairs)["psnr"].mean():.3f}'

    if len(args.sigma) == 1:
        print(f'held out: {score(benchmark_pairs(root, *args.sigma, mode="train", subset=HELD_OUT))} dB')
        return
    print('| sigma | noisy | held out (dB) | in 8 bits | changed by jitter |\n|---|---|---|---|---|')
    for sigma in (3, 5, 15, 25, 30, 50):
        pairs = [list(benchmark_pairs(root, sigma, 160, mode='train', subset=HELD_OUT, clip=clip)) for clip in (False, True)]
        changed = NoisyBSDSDataset(root, 'train', 128, sigma, subset=HELD_OUT, seed=0, jitter=True)
        pairs.append([(noisy[None], clean[None]) for noisy, clean in changed])
        noisy = f'{benchmark(lambda noisy: noisy, pairs[0])["psnr"].mean():.3f}'
        print(f'| {sigma} | {noisy} | {" | ".join(map(score, pairs))} |', flush=True)


def ablation(args):
    """Prints what skips, dilation and pooling give, each alone and together; --retrain measures it again."""
    if args.retrain:
        for seed, arm in itertools.product(args.seeds, args.arms):
            write_scores(args.scores, train_arm(arm, seed, args))
    print('PSNR in dB: mean over the seeds, and difference to DnCNN(6) with 95 % intervals over '
          'photographs (p) and over trainings (t).\n')
    tables = [read_scores(args.scores, which) for which in ('held out', 'test')]
    print('| network | parameters | receptive field | seeds | held out | difference | test | difference |')
    print('|---|---|---|---|---|---|---|---|')
    for arm in [arm for arm in ARMS if arm in tables[0]]:
        net = make_network(*ARMS[arm], C=args.C)
        cells = [f'{type(net).__name__}({net.D})', f'{count_parameters(net):,}', net.receptive_field, len(tables[0][arm])]
        for scores in tables:
            cells += [f'{scores[arm].mean():.2f}', difference_in_words(scores, arm, 'dncnn')]
        print('| ' + ' | '.join(map(str, cells)) + ' |')


def difference_in_words(scores, first, second):
    """The difference of two networks in ``scores``, see `read_scores`, with both its intervals."""
    if first == second or second not in scores:
        return ''
    mean, photographs = over_photographs(scores[first].mean(axis=0) - scores[second].mean(axis=0))
    trainings = over_trainings(scores[first], scores[second])[1]
    return f'{mean:+.2f} ± {photographs:.2f} (p)' + (f' ± {trainings:.2f} (t)' if trainings > 0 else ', one training')


def train_arm(arm, seed, args):
    """Trains one network of the ablation, or goes on with it. Returns its scores, see `scores_as_rows`."""
    net, D = ARMS[arm]
    folder = Path(args.out) / f'{arm}_seed{seed}'
    words = f'train --net {net} --D {D} --C {args.C} --epochs {args.epochs} --seed {seed} --hold-out'.split()
    exp = make_experiment(parse([*words, '--out', str(folder)] + (['--data', args.data] if args.data else [])))
    exp.run(args.epochs)
    root = find_photographs(args.data)
    return [row for which, options in (('held out', {'mode': 'train', 'subset': HELD_OUT}), ('test', {}))
            for row in scores_as_rows(arm, seed, which,
                                      benchmark(exp.net.eval(), benchmark_pairs(root, **options))['psnr'])]


def evaluate(args):
    """Prints the table of results of the trained networks, mean over their seeds, as Markdown."""
    root = find_photographs(args.data)
    _check_scores(args.scores, root)
    is_bsds300, description = describe_photographs(root)
    print(f'Test images: {description}; sigma = {args.sigma}.\n')
    print('| network | parameters | receptive field | PSNR (dB) | of each seed | on CBSD68 | SSIM | s / image |')
    print('|---|---|---|---|---|---|---|---|')
    for name in args.nets:
        runs = []
        for folder in [Path(args.checkpoints) / name, *sorted(Path(args.checkpoints).glob(f'{name}_seed*'))]:
            seed = int(folder.name.partition('_seed')[2] or 0)
            if args.seeds and seed not in args.seeds:
                continue
            net, history = load_network(folder.name, folder)
            denoise = self_ensemble(net) if args.self_ensemble else net
            runs.append(benchmark(denoise, benchmark_pairs(root, args.sigma)))
            if args.scores:
                label = name + '_ensemble' * args.self_ensemble
                write_scores(args.scores, scores_as_rows(label, seed, test_at(args.sigma), runs[-1]['psnr']))
        if not runs:
            raise ValueError(f'{name} has no training with --seeds {args.seeds}')
        psnr, ssim, seconds = (np.array([run[key] for run in runs]) for key in ('psnr', 'ssim', 'seconds'))
        error = psnr.mean(axis=0).std(ddof=1) / math.sqrt(psnr.shape[1])
        title = (f'{type(net).__name__}({net.D}), {len(history)} epochs'
                 + ", course's batch norm" * ('_course' in name) + ", the assignment's recipe" * name.endswith('_assignment')
                 + ', self-ensemble' * args.self_ensemble)
        print(f'| {title} | {count_parameters(net):,} | {net.receptive_field} | {psnr.mean():.2f} ± {error:.2f} | '
              f'{", ".join(f"{value:.2f}" for value in psnr.mean(axis=1))} | '
              f'{f"{psnr[:, CBSD68].mean():.2f}" if is_bsds300 else ""} | {ssim.mean():.3f} | {seconds.mean():.2f} |', flush=True)


def levels(args):
    """Prints the PSNR by level of noise, not clipped and in 8-bit files, beside FFDNet's; --retest measures it."""
    if args.retest:
        root = find_photographs(args.data)
        _check_scores(args.scores, root)
        for name in args.nets:
            write_scores(args.scores, score_levels(name, root))
    for clip in (False, True):
        print('| PSNR (dB), ' + ('clipped to 8 bits' if clip else 'not clipped') + ''.join(f' | σ = {sigma}' for sigma in LEVELS) + ' |')
        print('|---' * (len(LEVELS) + 1) + '|')
        for name, values in by_level(args.scores, clip).items():
            print(f'| {name} | ' + ' | '.join('' if math.isnan(value) else f'{value:.2f}' for value in values) + ' |')
        print()


def bm3d(args):
    """Scores BM3D on the test photographs, for comparison (needs `pip install bm3d`; a quarter of an hour)."""
    import bm3d as package

    def denoise(noisy):
        image = ((noisy[0] + 1) / 2).permute(1, 2, 0).double().numpy()
        return torch.from_numpy(package.bm3d_rgb(image, args.sigma / 255)).permute(2, 0, 1)[None].float() * 2 - 1

    root = find_photographs(args.data)
    _check_scores(args.scores, root)
    scores = benchmark(denoise, benchmark_pairs(root, args.sigma))
    write_scores(args.scores, scores_as_rows('bm3d', 0, test_at(args.sigma), scores['psnr']))
    print(f'BM3D: {scores["psnr"].mean():.2f} dB, SSIM {scores["ssim"].mean():.3f}, '
          f'{scores["seconds"].mean():.1f} s / image')


def denoise(args):
    """Denoises image files: IN OUT, or IN... --to FOLDER."""
    pairs = name_results(args)
    net = load_network(args.net)[0].to(nt.find_device(), memory_format=torch.channels_last)
    net = for_level(net, args.sigma) if args.sigma else net
    failed = 0
    for source, target in pairs:
        try:
            before, after = denoise_file(net, source, target, strength=args.strength, force=args.force,
                                         precision=half_precision(net.device))
            print(f'{target}: noise level {before:.1f} before, {after:.1f} after (estimated, of 255)', flush=True)
        except (OSError, ValueError) as error:
            failed += 1
            print(error, file=sys.stderr)
    if failed:
        raise SystemExit(f'{failed} of {len(pairs)} files could not be denoised')


def example(args):
    """Makes the picture in the README: a photograph of scikit-image (CC0) with noise, and denoised."""
    from skimage import data

    _check_new(args.target, args.force)
    clean = to_floats(_pixels(data.coffee()[60:320, 130:470]))
    torch.manual_seed(0)
    noisy = to_integers(clean + 2 * args.sigma / 255 * torch.randn(clean.shape))
    _check_target(ImageFile(noisy), args.target)
    denoised = denoise_image(load_network('dudncnn_blind')[0], noisy)
    write_image(ImageFile(torch.cat([noisy, denoised], 2)), args.target)
    before, after = (psnr(to_floats(image)[None], clean[None]).item() for image in (noisy, denoised))
    print(f'{args.target}: {before:.2f} dB before, {after:.2f} dB after; estimated noise level '
          f'{noise_level(noisy):.1f} before, {noise_level(denoised):.1f} after')


def name_results(args):
    """The files to read and to write of the command ``denoise``: a list of pairs. Raises ValueError."""
    if args.sigma is not None and (args.net.endswith('_blind') or not args.sigma > 0):
        raise ValueError('--sigma is for networks of one level, and above 0: dudncnn_blind finds the level itself')
    if args.sigma is not None and args.sigma < 30:
        raise ValueError(f'--sigma must be 30, on which these networks were trained, or more, got {args.sigma:g}: '
                         'take dudncnn_blind, which finds the level itself')
    if not 0 <= args.strength <= 1:
        raise ValueError(f'--strength must be from 0 to 1, got {args.strength}')
    if args.to is None:
        if len(args.files) != 2:
            raise ValueError('name two files, IN OUT, or several and a folder: IN... --to FOLDER')
        return [args.files]
    args.to.mkdir(parents=True, exist_ok=True)
    targets = [args.to / file.name for file in args.files]
    if len(set(targets)) < len(targets):
        raise ValueError(f'two of these files have the same name: their results can\'t both be in {args.to}')
    return list(zip(args.files, targets))


def parse(words=None):
    """The options of the command line. Each command's are explained by ``COMMAND --help``."""
    parser = argparse.ArgumentParser(prog='denoising_utils', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='train | ablation | evaluate | levels | bm3d | denoise | example | fetch')

    def command(function, **options):
        sub = commands.add_parser(function.__name__, help=function.__doc__.split('\n')[0],
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(function=function, **options)
        return sub.add_argument

    add = command(train)
    add('--net', choices=NETWORKS | ABLATED, default='dncnn', help='which network')
    add('--data', help='folder with train/ and test/ (default: see find_photographs)')
    add('--out', help='folder of the checkpoint (default: experiments/NET)')
    add('--D', type=int, default=6, help='blocks')
    add('--C', type=int, default=64, help='features per layer')
    add('--batch-norm', choices=('usual', 'course', 'none'), default='usual', help='see DnCNN')
    add('--start', metavar='FOLDER', help='begin with the trained network in a folder, of its size, as in checkpoints/dudncnn '
        '(with --batch-norm none, its batch norm becomes part of its convolutions)')
    add('--he-init', action=argparse.BooleanOptionalAction, default=True, help="He's initialisation, see DnCNN")
    add('--zero-last', action=argparse.BooleanOptionalAction, default=True, help='start as the identity')
    add('--sigma', type=float, nargs='+', default=[30], help='noise level, 0..255, or the lowest and the highest')
    add('--clip', type=float, default=0, help='share of the samples clipped and rounded to 8 bits')
    add('--jitter', action='store_true', help='change size and colours of half of the samples, see NoisyBSDSDataset')
    add('--epochs', type=int, default=200, help='epochs in all')
    add('--crops', type=int, default=2, help='crops of each photograph an epoch')
    add('--size', type=int, default=64, help='side of the crops in pixels')
    add('--batch', type=int, default=4, help='crops a step')
    add('--no-augment', action='store_true', help='no flips and quarter turns')
    add('--lr', type=float, default=5e-3, help='peak learning rate of Adam')
    add('--warm-up', type=float, default=0.1, help='share of the epochs before the peak; then a cosine to 0')
    add('--constant-rate', action='store_true', help='no warm-up, no cosine')
    add('--grad-clip', type=float, default=0.2, help='bound on the norm of the gradient')
    add('--precision', choices=('float32', 'bfloat16', 'float16'), default='bfloat16', help='of training')
    add('--seed', type=int, default=0, help='of initialisation, batches and noise')
    add('--hold-out', action='store_true', help='train without every tenth photograph and test on those')
    add('--allow', nargs='+', default=(), metavar='SETTING', help='settings that may differ from those of the checkpoint, '
        'as its refusal names them')
    add = command(ablation)
    add('--retrain', action='store_true', help='train again (resumes), or print the stored scores')
    add('--scores', default=HERE / 'checkpoints' / 'ablation.csv', help='file of the scores')
    add('--arms', nargs='+', choices=ARMS, default=list(ARMS), help='which networks to train')
    add('--seeds', nargs='+', type=int, default=[0, 1, 2], help='which seeds to train')
    add('--out', default='experiments/ablation', help='folder of the checkpoints')
    add('--data', help='folder with train/ and test/ (default: see find_photographs)')
    add('--C', type=int, default=32, help='features per layer')
    add('--epochs', type=int, default=89, help='of 90 steps')
    add = command(evaluate)
    add('nets', nargs='*', default=list(NETWORKS), help='which networks')
    add('--data', help='folder with train/ and test/ (default: see find_photographs)')
    add('--checkpoints', default=HERE / 'checkpoints', help='folder that holds a folder a network')
    add('--sigma', type=float, default=30, help='noise level, 0..255')
    add('--seeds', nargs='+', type=int, help='which trainings (default: all there are)')
    add('--scores', help='also keep the PSNR of each photograph and seed in this file (CSV)')
    add('--self-ensemble', action='store_true', help='mean over the eight flips and quarter turns of each image')
    add = command(levels)
    add('--retest', action='store_true', help='measure again (half an hour), or print the stored scores')
    add('--nets', nargs='+', default=['noisy', *NETWORKS, 'dudncnn_scaled', 'dudncnn_blind'], help='what to measure')
    add('--scores', default=HERE / 'checkpoints' / 'levels.csv', help='file of the scores')
    add('--data', help='folder with train/ and test/ (default: see find_photographs)')
    add = command(bm3d)
    add('--data', help='folder with train/ and test/ (default: see find_photographs)')
    add('--sigma', type=float, default=30, help='noise level, 0..255')
    add('--scores', default=HERE / 'checkpoints' / 'scores.csv', help='file of the scores')
    add = command(denoise)
    add('files', nargs='+', type=Path, metavar='FILE', help='image file to read and image file to write (IN OUT), '
        'or with --to any number of files to read')
    add('--to', type=Path, metavar='FOLDER', help='folder for the results, which have the names of the files')
    add('--net', choices=[*NETWORKS, 'dudncnn_blind'], default='dudncnn_blind', help='which network')
    add('--sigma', type=float, help='the level of the noise, for networks that were trained on one (30)')
    add('--strength', type=float, default=1, help='0 leaves the image as it is, between 0 and 1 is a blend')
    add('--force', action='store_true', help='replace files that exist')
    add = command(example)
    add('target', nargs='?', type=Path, default=Path('denoised.jpg'), help='image file to write')
    add('--force', action='store_true', help='replace it if it exists')
    add('--sigma', type=float, default=30, help='noise level, 0..255')
    add = command(fetch)
    add('--destination', help='folder (default: BSDS300/ beside this file)')
    return parser.parse_args(words)


def main(words=None):
    args = parse(words)
    args.function(args) if args.function is not fetch else print(fetch(args.destination))


if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')  # σ, or the name of a file, where Windows has another encoding
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f'{type(error).__name__}: {error}') from None
