"""Noise as a camera makes it: in linear light, on a mosaic of colours, developed and compressed.

After Brooks et al., "Unprocessing images for learned raw denoising", CVPR 2019: a photograph is
taken back to what the sensor saw, noise comes to it there, and both are developed. All images here
are tensors (3, height, width) with values in [0, 1]; random numbers come from a `torch.Generator`,
or torch's own stream if it is None.
"""
import dataclasses
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

BLACK = 1e-8  # where powers have no derivative, and logarithms no value
BILINEAR = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]])[None, None].expand(3, 1, 3, 3)


def draw_between(low, high, random):
    """A random number between the two."""
    return low + (high - low) * torch.rand((), generator=random).item()


def draw_exponent(low, high, random):
    """A random number between the two, whose logarithm is uniform."""
    return math.exp(draw_between(math.log(low), math.log(high), random))


@dataclasses.dataclass
class Camera:
    """How light becomes a photograph, and back.

    ``colours`` (3, 3) takes the sensor's red, green and blue to those of sRGB; ``gains`` (3,) are
    those of the white balance; between linear light and the file are sRGB's gamma and a tone curve.
    """
    colours: torch.Tensor
    gains: torch.Tensor

    @classmethod
    def draw(cls, random):
        """A camera and its light. Sensors overlap in colour, so each takes from its neighbours."""
        spill = -0.5 * torch.rand(3, 3, generator=random)
        spill.fill_diagonal_(0)
        colours = spill + torch.diag(1 - spill.sum(1))  # grey stays grey: rows add up to 1
        red, blue = draw_between(1.4, 2.4, random), draw_between(1.3, 2.2, random)
        return cls(colours, torch.tensor([red, 1, blue]))

    def to_sensor(self, image):
        """The linear light, 0..1, that this camera develops to ``image``."""
        light = 0.5 - torch.sin(torch.asin(1 - 2 * image.clamp(0, 1)) / 3)  # x^2 (3 - 2x), inverted
        light = light.clamp_min(BLACK)
        light = torch.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
        light = torch.tensordot(torch.linalg.inv(self.colours), light, 1)
        return (light / self.gains[:, None, None]).clamp(0, 1)

    def develop(self, light):
        """sRGB, with gamma and tone curve, of the sensor's linear ``light``."""
        image = torch.tensordot(self.colours, light * self.gains[:, None, None], 1)
        image = image.clamp(BLACK, 1)
        image = torch.where(image <= 0.0031308, image * 12.92,
                            1.055 * image ** (1 / 2.4) - 0.055)
        return image * image * (3 - 2 * image)


def mosaic(light):
    """What a sensor records, a colour a pixel in Bayer's order, and its three colours filled in."""
    mask = torch.zeros_like(light)
    mask[0, ::2, ::2] = 1
    mask[1, ::2, 1::2] = 1
    mask[1, 1::2, ::2] = 1
    mask[2, 1::2, 1::2] = 1
    known = F.conv2d((light * mask)[None], BILINEAR, padding=1, groups=3)
    weight = F.conv2d(mask[None], BILINEAR, padding=1, groups=3)
    return (known / weight)[0]


def sensor_noise(light, random):
    """Shot noise, whose variance grows with the light, and read noise; strengths as in the paper,
    up to three times its highest."""
    shot = draw_exponent(1e-4, 0.036, random)
    read = math.exp(2.18 * math.log(shot) + 1.2 + 0.26 * torch.randn((), generator=random).item())
    noise = torch.randn(light.shape, generator=random)
    return light + noise * (shot * light + read).sqrt()


def camera_noise(clean, random):
    """The noise that a photograph ``clean`` would have from a camera drawn at random: a tensor of
    its shape, to be added.

    Half of the photographs were enlarged or reduced afterwards, and half smoothed by the camera,
    colours more than brightness.
    """
    size = clean.shape[1:]
    zoom = 1
    if draw_between(0, 1, random) < 0.5:
        zoom = draw_exponent(0.5, 2, random)
    sensor_size = [max(8, round(zoom * n)) for n in size]
    camera = Camera.draw(random)
    light = camera.to_sensor(resize(clean, sensor_size))
    noise = camera.develop(mosaic(sensor_noise(light, random))) - camera.develop(mosaic(light))
    if draw_between(0, 1, random) < 0.5:
        noise = smooth(noise, draw_between(0.3, 0.8, random), draw_between(0.5, 2.5, random))
    return resize(noise, size)


def smooth_noise(clean, random):
    """White noise of a level up to 50 of 255, smoothed by a Gaussian or not, at the same level."""
    noise = torch.randn(clean.shape, generator=random)
    if draw_between(0, 1, random) < 0.5:
        noise = gaussian_blur(noise, 7, draw_between(0.4, 1.5, random))
    return noise * draw_between(0, 50 / 255, random) / noise.std()


def resize(image, size):
    return F.interpolate(image[None], list(size), mode='bicubic', antialias=True)[0]


def smooth(image, brightness, colours):
    """Blurs the mean of the three colours and their differences to it by a Gaussian each."""
    grey = image.mean(0, keepdim=True)
    return (gaussian_blur(grey, 5, brightness) + gaussian_blur(image - grey, 9, colours))


def compress(image, quality, subsampling, corner=(0, 0)):
    """``image`` after JPEG: ``subsampling`` as in Pillow, 0 for colours at full size, 2 at half.

    JPEG works in blocks of 8x8 pixels: ``corner`` is where in one of them the image begins.
    """
    top, left = corner
    image = F.pad(image[None], (left, 0, top, 0), mode='replicate')[0]
    values = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, 'JPEG', quality=quality, subsampling=subsampling)
    values = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
    return values[:, top:, left:].float() / 255


def photographed(clean, random, camera=0.5):
    """``clean`` as people's files have it, in 8 bits, and four of five compressed: a share of
    ``camera`` with noise from one, the others with noise that is the same in light and dark."""
    make = camera_noise if draw_between(0, 1, random) < camera else smooth_noise
    noisy = (clean + make(clean, random)).clamp(0, 1)
    if draw_between(0, 1, random) < 0.8:
        quality = int(draw_between(60, 101, random))
        subsampling = 2 if draw_between(0, 1, random) < 0.5 else 0
        corner = torch.randint(8, (2,), generator=random).tolist()
        return compress(noisy, quality, subsampling, corner)
    return (noisy * 255).round() / 255
