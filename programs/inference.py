"""How a network is applied to a photograph of any size, and what it can be made fit for."""
import contextlib
import copy
import itertools
import math
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from skimage.restoration import estimate_sigma
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

import denoising_utils as du

TRAINED_LEVEL = 30  # of the noise on which the networks of the assignment were trained


def noise_level(image):
    """An estimate of the standard deviation of white noise on the scale 0..255, as a number.

    From the wavelet coefficients of the finest scale (`skimage.restoration.estimate_sigma`) of the
    middle of an ``image`` (channels, height, width), at most 1024x1024 pixels. Fine texture counts
    as noise; noise that was clipped, or is smooth itself, is underestimated.
    """
    height, width = image.shape[1:]
    top, left = max(0, (height - 1024) // 2), max(0, (width - 1024) // 2)
    middle = du.to_floats(image[:, top:top + 1024, left:left + 1024]).numpy() * 127.5
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a few pixels give nothing to estimate from: nan, here 0
        level = estimate_sigma(middle, channel_axis=0, average_sigmas=True)
    return float(np.nan_to_num(level))


def find_noise(net, image, precision=torch.float32):
    """How much noise a network finds where it finds least, on the scale 0..255, as a number.

    It is the root mean square of what it takes away from blocks of 8x8 pixels, at nine places
    spread over the ``image`` (channels, height, width): the level that three quarters of the blocks
    exceed. Noise is everywhere; the flat parts of drawings have none.
    """
    side, levels = 128, []
    tops, lefts = ({max(0, size - side) * third // 2 for third in range(3)}
                   for size in image.shape[1:])
    with _ready(net, precision):
        for top, left in itertools.product(tops, lefts):
            part = _as_input(net, image[:, top:top + side, left:left + side])
            removed = (part - net(part)).square().mean(1, keepdim=True)
            levels.append(F.avg_pool2d(removed, 8, ceil_mode=True).flatten())
    return 127.5 * torch.cat(levels).quantile(0.25).sqrt().item()


def trust(level):
    """How much of what a network takes away is noise, 0 to 1, by what `find_noise` says.

    Between the two levels is a blend. How they were chosen: docs/results.md, *Without noise*.
    """
    none, full = 0.7, 1.0
    return min(1.0, max(0.0, (level - none) / (full - none)))


# --- ways to apply a network ---------------------------------------------------------------------

@contextlib.contextmanager
def _ready(net, precision):
    """Inside, ``net`` is in evaluation mode, and its layers compute in that precision."""
    training = net.training
    half = torch.autocast(net.device.type, precision, enabled=precision != torch.float32)
    net.eval()
    try:
        with torch.inference_mode(), half:
            yield
    finally:
        net.train(training)


def _as_input(net, part):
    """A part of an image as floats (1, 3, height, width), where the network is."""
    part = du.to_floats(part.to(net.device)).expand(1, 3, -1, -1)
    return part.contiguous(memory_format=torch.channels_last)


def denoise_image(net, image, tile=384, strength=1.0, precision=torch.float32, out=None):
    """Denoises an image of any size with bounded memory, in tiles of ``tile`` pixels.

    Each tile is read with a margin of half the receptive field or more, and cut where the pooling
    cells of the whole image would be, so that the result is that of the untiled image up to
    rounding. A progress bar shows in a terminal or notebook, unless TQDM_DISABLE is set.

    Args:
        net: a network for three channels, on any device.
        image: a tensor (channels, height, width): floats in [-1, 1], or the integers of a file
            (uint8 or uint16), of which only one tile at a time becomes floats. One channel (grey)
            goes through the network as three equal ones, of whose results the mean is taken.
        tile: side of the tiles in pixels.
        strength: 1 for what the network returns, 0 for the image as it is, between them a blend,
            and above 1 more than what the network takes away.
        precision: the type in which the layers compute, such as ``torch.bfloat16``.
        out: what the result is written into, slice by slice, if not into a new tensor. It and
            ``image`` may be `Pixels` of a file, which need not fit into memory.

    Returns ``out``, or a tensor like ``image`` on the CPU. Raises ValueError for another shape.
    """
    if len(image.shape) != 3 or image.shape[0] not in (1, 3):
        raise ValueError('image must be (channels, height, width) with 1 or 3 channels, '
                         f'got the shape {tuple(image.shape)}')
    channels, height, width = image.shape
    cell = net.pooling_cell
    tile = math.ceil(max(tile, 1) / cell) * cell
    margin = math.ceil(net.receptive_field // 2 / cell) * cell
    corners = [*itertools.product(range(0, height, tile), range(0, width, tile))]
    quiet = bool(os.environ.get('TQDM_DISABLE')) or None  # None: where there is no terminal

    if out is None:
        out = torch.empty_like(image, device='cpu')
    with _ready(net, precision):
        nets = {sides: without_padding(net, *sides)
                for sides in itertools.product((False, True), repeat=2)}
        for top, left in tqdm(corners, unit='tile', leave=False, disable=quiet):
            above, before = min(top, margin), min(left, margin)
            part = image[:, top - above:top + tile + margin, left - before:left + tile + margin]
            part = _as_input(net, part)
            rows, columns = (size == tile + 2 * margin for size in part.shape[-2:])
            part = part.lerp(nets[rows, columns](part).float(), strength)[0]
            part = part[:, above:above + tile, before:before + tile]
            if channels == 1:
                part = part.mean(0, keepdim=True)
            if not image.dtype.is_floating_point:
                part = du.to_integers(part, image.dtype)
            out[:, top:top + tile, left:left + tile] = part
    return out


def self_ensemble(net):
    """The mean over the eight flips and quarter turns of an image, as a function of images.

    Images are (N, channels, height, width); each is turned, denoised by ``net``, and turned back,
    for eight times the work (Timofte, Rothe and Van Gool, "Seven ways to improve example-based
    single image super resolution", CVPR 2016).
    """
    def denoise(x):
        total = torch.zeros_like(x)
        for turns in range(4):
            for axes in ([], [-1]):
                changed = x.rot90(turns, (-2, -1)).flip(axes)
                total += net(changed).flip(axes).rot90(-turns, (-2, -1))
        return total / 8
    return denoise


def fold_batch_norm(net):
    """A copy of a trained network in which each batch norm is part of the convolution before it.

    It is the same function, but trained on as a network without batch norm.
    """
    net = copy.deepcopy(net).eval()
    for k, bn in enumerate(net.bn):
        if isinstance(bn, torch.nn.BatchNorm2d):
            net.conv[k + 1] = fuse_conv_bn_eval(net.conv[k + 1], bn)
            net.bn[k] = torch.nn.Identity()
    return net


# Of oneDNN, by which torch computes convolutions on the CPU. Not public, so it may be missing.
FUSES = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_convolution_pointwise')


class FusedDUDnCNN(du.DUDnCNN):
    """DUDnCNN for inference alone, see `fold`: convolution and ReLU go over the features once.

    Where its convolutions don't pad, see `without_padding`, features get smaller from layer to
    layer, and what is at the sides of an image returns as it was.
    """

    def block(self, k, h):
        conv = self.conv[k + 1]
        if not FUSES or h.device.type != 'cpu' or torch.is_grad_enabled():
            return F.relu(conv(h), inplace=True)
        return torch.ops.mkldnn._convolution_pointwise(
            h, conv.weight.to(h.dtype), conv.bias.to(h.dtype), conv.padding, conv.stride,
            conv.dilation, conv.groups, 'relu', [], '')

    def join(self, h, earlier):
        return h.add_(_middle(earlier, h))

    def forward(self, x):
        y, change = x.clone(), self.conv[-1](self.features(x))
        _middle(y, change).add_(change)
        return y


def _middle(x, y):
    """The middle of ``x`` that has the height and width of ``y``."""
    top, left = ((a - b) // 2 for a, b in zip(x.shape[-2:], y.shape[-2:]))
    return x[..., top:top + y.shape[-2], left:left + y.shape[-1]]


def without_padding(net, rows, columns):
    """A copy of a network whose convolutions don't pad above and below, or left and right.

    For a tile with a margin there, of which so much less has to be computed. Other networks than
    `FusedDUDnCNN` are returned as they are.
    """
    if not isinstance(net, FusedDUDnCNN):
        return net
    net = copy.deepcopy(net)
    for conv in net.conv:
        height, width = conv.padding
        conv.padding = (0 if rows else height, 0 if columns else width)
    return net


def fold(net):
    """A copy of a trained network that computes the same with fewer steps, for inference alone.

    Batch norms are part of the convolutions before them; of DUDnCNN, divisions by the square root
    of two are part of those after them, and ReLUs of those before.
    """
    net = fold_batch_norm(net)
    if type(net) is not du.DUDnCNN:
        return net
    fused = FusedDUDnCNN(net.D, net.C, batch_norm='none', channels=net.conv[-1].out_channels)
    fused.load_state_dict(net.state_dict())
    with torch.no_grad():
        for conv in fused.conv[net.D // 2 + 2:]:
            conv.weight.div_(math.sqrt(2))
    return fused.to(net.device).eval()


def for_level(net, sigma, trained=TRAINED_LEVEL):
    """A copy of a network, trained on noise of level ``trained``, for a higher level ``sigma``.

    It scales its input down, so that the noise has the level it knows, and what it adds to it up
    again. As the network is linear in its input up to the first bias, that is a matter of two
    layers. Not for lower levels, where it doesn't help: there the copy is the network as it is.
    """
    net = copy.deepcopy(net)
    factor = min(1, trained / sigma)
    with torch.no_grad():
        net.conv[0].weight.mul_(factor)
        net.conv[-1].weight.div_(factor)
        net.conv[-1].bias.div_(factor)
    return net


def half_precision(device):
    """The `torch.dtype` in which layers compute fastest on ``device``.

    It is half precision where the device has instructions for it. In 8 bits that changes about one
    value in five to eight, nearly always by one.
    """
    if device.type == 'cuda':
        return torch.float16
    # Older versions of torch can't tell what the processor is able to do.
    if device.type != 'cpu' or not hasattr(torch.cpu, 'get_capabilities'):
        return torch.float32
    abilities = torch.cpu.get_capabilities()
    if abilities.get('avx512_bf16') or abilities.get('amx_bf16'):
        return torch.bfloat16
    return torch.float32
