"""What hidden checks share: photographs whose pixels tell where they are, and small networks."""
import numpy as np
import torch
from PIL import Image

SIZES = [(64, 48), (48, 64)]  # height and width of the photographs in each folder


def photographs(folder):
    """Fills ``train/`` and ``test/``: red is a pixel's row, green its column, blue at random."""
    random = np.random.default_rng(0)
    for mode in ('train', 'test'):
        (folder / mode).mkdir()
        for k, (height, width) in enumerate(SIZES):
            rows, columns = np.mgrid[:height, :width]
            blue = random.integers(0, 256, (height, width))
            pixels = np.stack([rows, columns, blue], axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(folder / mode / f'{k}.png')
    return folder


def as_bytes(image):
    """The values of an image in [-1, 1] as those of a file."""
    return ((image + 1) * 127.5).round().long()


def lively(net):
    """The network in evaluation mode, where no batch norm leaves things as they are."""
    random = torch.Generator().manual_seed(1)
    for bn in net.bn:
        with torch.no_grad():
            for values in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                values.copy_(torch.rand(values.shape, generator=random) + 0.5)
    return net.eval()


def noise(*shape):
    """The same numbers for the same shape, at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
