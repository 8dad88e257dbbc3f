"""Image files: read as tensors of integers with what describes the photograph, and written again.

    image = read_image('in.tif')   # image.pixels: (1 or 3, height, width), 8 or 16 bits a value
    write_image(image, 'out.tif')  # with its transparency, EXIF and colour profile
"""
import contextlib
import dataclasses
import io
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageOps

import denoising_utils as du

Tag = ExifTags.Base

# The tags of a TIFF (EXIF has the same ones) that describe the photograph.
# The others below 700 say how the pixels are stored, which is no longer true of a new file.
DESCRIPTIVE_TAGS = {
    Tag.ImageDescription, Tag.Make, Tag.Model, Tag.Software, Tag.DateTime, Tag.Artist,
    Tag.HostComputer, Tag.XResolution, Tag.YResolution, Tag.ResolutionUnit,
}


@dataclasses.dataclass
class ImageFile:
    """What an image file holds, see `read_image` and `write_image`."""
    pixels: torch.Tensor  # (1 or 3, height, width) of uint8 or uint16
    alpha: Image.Image | None = None  # its transparency, 8 bits
    exif: bytes = b''
    icc_profile: bytes | None = None


# --- reading -------------------------------------------------------------------------------------

def read_image(file):
    """Reads an image file of any kind that Pillow knows: an `ImageFile`.

    A camera's rotation mark (EXIF) is applied, and left out of the EXIF of the result. Palettes,
    CMYK and other models of colour become RGB. 16 bits are kept in grey files and in TIFF; of other
    colours of 16 bits Pillow reads 8, and a warning says so (but for PPM). An EXIF that is damaged
    is left out, with a warning.

    Raises ValueError, naming the file and why, if it can't be read as one still image.
    """
    if Path(file).is_dir():
        raise ValueError(f'{file} is a folder: name the image files in it')

    # Everything that decodes the file, and so may fail in any way if the file is damaged.
    deep_pixels = None
    try:
        with Image.open(file) as image:
            frames = getattr(image, 'n_frames', 1)
            if image.format == 'MPO':  # a camera's JPEG, with previews behind it
                frames = 1
            is_deep = _has_deep_colours(image)
            is_upright = image.getexif().get(Tag.Orientation, 1) == 1
            ImageOps.exif_transpose(image, in_place=True)
            exif = _descriptive_exif(image, file)
            is_tiff_in_rgb = image.format == 'TIFF' and image.mode == 'RGB'
            if is_deep and is_tiff_in_rgb and is_upright and frames == 1:
                # Some compressions need another package, and Pillow's 8 bits must do.
                with contextlib.suppress(ValueError):
                    deep_pixels = _to_tensor(_read_tiff(file))
            if deep_pixels is None:
                image.load()
    except FileNotFoundError:
        raise ValueError(f'there is no file {file}') from None
    except Exception as error:
        raise ValueError(f'{file} is not a readable image ({error})') from error

    icc_profile = image.info.get('icc_profile')
    if image.mode == 'CMYK':  # it becomes RGB, of which this profile knows nothing
        icc_profile = None
    if deep_pixels is not None:
        return ImageFile(deep_pixels, exif=exif, icc_profile=icc_profile)

    # What can't be read, or only in part.
    if frames > 1:
        raise ValueError(f'{file} has {frames} frames or pages: '
                         'save the one to denoise as a file of its own')
    if is_deep:
        warnings.warn(f'{file} has colours of 16 bits, of which 8 were read: TIFF that is upright '
                      'and opaque, and not compressed by LZW, keeps them', stacklevel=2)
    is_of_32_bits = image.mode == 'F'
    if image.mode == 'I':
        lowest, highest = image.getextrema()
        is_of_32_bits = lowest < 0 or highest > 65535
    if is_of_32_bits:
        raise ValueError(f'{file} has values of 32 bits, whose range is unknown: '
                         'save it with 8 or 16 bits')

    # Grey of 16 bits (Pillow's modes I and I;16) is taken as it is, all else as grey or RGB of 8.
    alpha = None
    if not image.mode.startswith('I'):
        if image.has_transparency_data:
            alpha = image.convert('RGBA').getchannel('A')
        is_grey = image.mode in ('1', 'L', 'LA')
        image = image.convert('L' if is_grey else 'RGB')
    return ImageFile(_to_tensor(np.array(image)), alpha, exif, icc_profile)


def _has_deep_colours(image):
    """Whether a file has colours of more than 8 bits, of which Pillow reads 8."""
    if image.mode[0] in 'IF':  # grey, which it reads as it is
        return False
    if image.format == 'TIFF':
        return max(image.tag_v2.get(Tag.BitsPerSample, [8])) > 8
    return ';16' in str(image.tile)


def _read_tiff(file):
    """The pixels of a TIFF in colour, (height, width, 3), whichever way they are stored."""
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        values = page.asarray()
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        values = np.moveaxis(values, 0, -1)  # (3, height, width) -> (height, width, 3)
    return values


def _to_tensor(values):
    """Integers (height, width) or (height, width, 3) as a tensor (1 or 3, height, width)."""
    if values.dtype != np.uint8:
        values = values.astype(np.uint16)
    return torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)


def _descriptive_exif(image, file):
    """The EXIF of a Pillow image, without the tags that say how its pixels are stored."""
    try:
        exif = image.getexif()
        for tag in list(exif):
            is_of_storage = tag < 700 and tag not in DESCRIPTIVE_TAGS
            if is_of_storage or tag == Tag.InterColorProfile:
                del exif[tag]
        # Pillow decodes texts as Latin-1, but would encode them as ASCII.
        for tag, text in exif.items():
            if isinstance(text, str):
                exif[tag] = text.encode('latin-1')
        return exif.tobytes()
    except Exception as error:  # any, where a value has another type than its tag should have
        warnings.warn(f'{file} has an EXIF that is damaged ({error}), and left out', stacklevel=3)
        return b''


# --- writing -------------------------------------------------------------------------------------

def check_new(target, force):
    """Raises FileExistsError if there is a file ``target``, unless ``force`` is true."""
    if target.exists() and not force:
        raise FileExistsError(f'{target} exists already: choose another name for the result, '
                              'or force it to be replaced')


def check_target(image, target):
    """Raises ValueError if an `ImageFile` can't be written to ``target``: before the work."""
    kind = _format_of(target)
    if kind not in Image.SAVE:
        raise ValueError(f'{target} must have the suffix of an image format, such as .png or .jpg')
    if not target.parent.is_dir():
        raise ValueError(f'there is no folder {target.parent} to write {target.name} into')

    # Pillow is asked to save one pixel of the same kind.
    sample = Image.new('L' if len(image.pixels) == 1 else 'RGB', (1, 1))
    if image.alpha is not None:
        sample.putalpha(255)
    try:
        sample.save(io.BytesIO(), kind, **_save_options(image, kind))
    except (OSError, ValueError) as error:
        raise ValueError(f"{target} can't hold this image ({error}): "
                         'choose another format, such as .png') from error


def write_image(image, target):
    """Writes an `ImageFile` in the format that the suffix of ``target`` says: all of it or nothing.

    Lossy formats at a quality of 95. 16 bits where the format has them, which is PNG and TIFF for
    grey and TIFF for colours (with the texts of the EXIF); elsewhere 8 bits. Raises OSError, of
    Pillow, for what the format can't hold, such as transparency in JPEG.
    """
    target = Path(target)
    kind = _format_of(target)

    # 8 bits where 16 can't be kept, a few rows at a time: as floats, all would take much memory.
    pixels = image.pixels
    if pixels.dtype == torch.uint16 and not _keeps_16_bits(image, kind):
        parts = [du.to_integers(du.to_floats(rows)) for rows in pixels.split(64, 1)]
        pixels = torch.cat(parts, 1)
    values = pixels.permute(1, 2, 0).numpy()  # (height, width, 1 or 3)

    # The file is complete before it gets its name.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.denoised-') as folder:
        file = Path(folder) / target.name
        if pixels.dtype == torch.uint16 and len(pixels) == 3:
            _write_tiff(file, values, image)
        else:
            _write_with_pillow(file, values, image, kind)
        os.replace(file, target)


def _format_of(target):
    """Pillow's name of the format that a file's suffix says, or None."""
    return Image.registered_extensions().get(target.suffix.lower())


def _keeps_16_bits(image, kind):
    """Whether 16 bits of an `ImageFile` can be written in this format."""
    if image.alpha is not None:
        return False
    if kind == 'PNG':
        return len(image.pixels) == 1
    return kind == 'TIFF'


def _save_options(image, kind):
    """The options of `PIL.Image.Image.save` for an `ImageFile`."""
    options = {'exif': image.exif, 'icc_profile': image.icc_profile, 'quality': 95}
    if kind == 'JPEG':
        options['subsampling'] = 0
    return options


def _write_with_pillow(file, values, image, kind):
    if values.shape[2] == 1:
        values = values.squeeze(2)
    picture = Image.fromarray(values)
    if image.alpha is not None:
        picture.putalpha(image.alpha)
    picture.save(file, kind, **_save_options(image, kind))


def _write_tiff(file, values, image):
    """Writes colours of 16 bits, of which Pillow would keep 8."""
    exif = Image.Exif()
    exif.load(image.exif)
    tags = []  # each (number, type, count, value, whether on the first page only)
    for tag, text in exif.items():
        if isinstance(text, str):
            tags.append((tag, 's', 0, text.encode('latin-1'), True))
    if image.icc_profile:
        profile = image.icc_profile
        tags.append((int(Tag.InterColorProfile), 'B', len(profile), profile, True))
    tifffile.imwrite(file, values, photometric='rgb', software=False, metadata=None, extratags=tags)
