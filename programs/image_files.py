"""Photographs: read from files as grey or RGB, and written again with what describes them."""
import dataclasses
from pathlib import Path

import pyvips

from programs import formats, metadata
from programs.pixels import Pixels


@dataclasses.dataclass
class ImageFile:
    """What an image file holds, see `read_image`."""
    source: Path
    header: pyvips.Image  # its size, resolution, colour profile and texts
    pixels: Pixels  # on disk


# --- reading -------------------------------------------------------------------------------------

def read_image(source, folder):
    """Reads a photograph of any format that libvips or Pillow knows; its pixels lie in ``folder``.

    It stands upright, in grey or RGB of 8 or 16 bits. Other models of colour become sRGB by the
    profile in the file. Where it is transparent, it gets the colours around: what nobody sees would
    spread into what one does.

    Raises ValueError, naming the file and why, if it can't be read as one photograph.
    """
    _refuse_by_kind(source)
    try:
        image = formats.load(source, folder)
        _refuse_by_contents(source, image)
        image = _to_grey_or_rgb(image)
        if image.hasalpha():
            image = _without_the_unseen(image)
        pixels = Pixels(folder / 'pixels', image)
        with formats.disk_errors():
            image.rawsave(str(pixels.file))
    except pyvips.Error as error:
        raise _explained(error, source) from error
    return ImageFile(source, image, pixels)


def _refuse_by_kind(source):
    if source.is_dir():
        raise ValueError(f'{source} is a folder: name the image files in it')
    if not source.exists():
        raise ValueError(f'there is no file {source}')
    if metadata.is_raw(source):
        raise ValueError(f'{source} is a raw file, with what the sensor of a camera measured: '
                         'develop it first, into TIFF of 16 bits')
    frames = formats.count_frames(source)
    if frames > 1:
        raise ValueError(f'{source} has {frames} frames or pages: '
                         'save the one to denoise as a file of its own')


def _refuse_by_contents(source, image):
    if image.get('vips-loader').startswith('svg'):
        raise ValueError(f'{source} is a drawing of lines, not pixels: save it as .png')
    if image.format not in ('uchar', 'ushort') and image.interpretation != 'labs':
        raise ValueError(f'{source} has values of the type {image.format}, whose range is unknown: '
                         'save it with 8 or 16 bits')
    if image.bands > 4:
        raise ValueError(f'{source} has {image.bands} channels: save it as grey or RGB')


def _explained(error, source):
    """What libvips says of a file that it can't read, as a ValueError."""
    reason = [line for line in error.detail.split('\n') if ': ' in line][-1]
    with open(source, 'rb') as stream:
        kind = stream.read(12)[4:]
    if kind in (b'ftypheic', b'ftypheix', b'ftypmif1'):
        reason = 'HEIC, for which there is no decoder here: save it as JPEG, PNG or TIFF'
    return ValueError(f'{source} is not a readable image ({reason})')


def _to_grey_or_rgb(image):
    if image.interpretation == 'cmyk':
        depth = 16 if image.format == 'ushort' else 8
        return image.icc_transform('srgb', input_profile='cmyk', embedded=True, depth=depth)
    if image.interpretation == 'labs':
        return image.colourspace('rgb16')
    return image


def _without_the_unseen(image):
    """An image whose transparent pixels have the mean colour of those within about 20 pixels."""
    colours, alpha = image[:image.bands - 1], image[image.bands - 1]
    seen = (alpha > 0) / 255
    around = (colours * seen).gaussblur(8, min_ampl=0.01) / seen.gaussblur(8, min_ampl=0.01)
    return (alpha > 0).ifthenelse(colours, around.rint().cast(image.format)).bandjoin(alpha)


# --- writing -------------------------------------------------------------------------------------

def check_format(image, file):
    """Raises ValueError if an image can't be written in the format of ``file``: before the work."""
    width, height = image.header.width, image.header.height
    for size in ((width, 1), (1, height)):
        try:
            kept = _written_and_read(image, file, *size)
        except (pyvips.Error, OSError, ValueError) as error:
            if getattr(error, 'errno', None):  # of the disk, not of the format
                raise
            kept = None
        if kept is None or (kept.width, kept.height) != size:
            raise ValueError(f"{file.suffix} can't hold {image.source}, {width}x{height} pixels: "
                             'choose another format, such as .png or .tif')
    if image.header.hasalpha() and not kept.hasalpha():
        raise ValueError(f"{file.suffix} can't hold the transparency of {image.source}: "
                         'choose another format, such as .png or .tif')


def write_image(image, pixels, file):
    """Writes ``pixels`` in place of those of an image, and all else of it, into ``file``.

    The suffix says the format. Returns the names of what that can't hold, in a list.
    """
    header = image.header
    picture = pixels.to_vips()
    if header.hasalpha():
        picture = picture.bandjoin(image.pixels.to_vips()[header.bands - 1])
    picture = metadata.with_header(picture, header)

    # As the format has it: 8 bits, rounded, and no grey.
    kept = _written_and_read(image, file, 1, 1)
    if kept.format == 'uchar' and picture.format == 'ushort':
        eight = 'b-w' if picture.bands < 3 else 'srgb'
        picture = (picture / 257).rint().cast('uchar').copy(interpretation=eight)
    if picture.bands < 3 <= kept.bands and picture.get_typeof('icc-profile-data'):
        picture = picture.icc_transform('srgb', embedded=True)
    written = _save_and_load(image, picture, file)
    return sorted(metadata.kinds_in(image.source, header) - metadata.kinds_in(file, written))


def _written_and_read(image, file, width, height):
    """A black image of this size, otherwise like ``image``, as it is once it has been in a file."""
    like = image.header
    black = pyvips.Image.black(width, height, bands=like.bands).cast(like.format)
    return _save_and_load(image, black.copy(interpretation=like.interpretation), file)


def _save_and_load(image, picture, file):
    formats.save(picture, file)
    metadata.copy(image.source, image.header, file)
    return formats.load(file, file.parent)
