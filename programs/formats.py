"""Files of every image format as images of libvips, and back; Pillow has those that it lacks."""
import contextlib
import errno
import os
import re
import tempfile
import warnings
from pathlib import Path

import pyvips
from PIL import Image, ImageCms

# How libvips writes what it can. The other formats are Pillow's.
LOSSY = {'Q': 95, 'subsample_mode': 'off'}
OPTIONS = {'.png': {}, '.tif': {}, '.tiff': {}, '.webp': {'Q': 95}, '.avif': LOSSY,
           '.jpg': LOSSY, '.jpeg': LOSSY, '.jpe': LOSSY, '.jfif': LOSSY}

# PPM and JPEG 2000 in colour, with their largest value, or one less than their number of bits.
GAP = rb'(?:\s|#.*\n)+'
PPM = re.compile(rb'P[36]' + GAP + rb'\d+' + GAP + rb'\d+' + GAP + rb'(\d+)')
JPEG_2000 = re.compile(rb'\xff\x4f\xff\x51.{36}\0[\3\4](.)', re.DOTALL)

LARGEST_TIFF = 4e9  # bytes; above, it is a BigTIFF, which fewer programs can read

pyvips.cache_set_max(0)  # it would give the former contents of a file that has changed
Image.MAX_IMAGE_PIXELS = None  # there are photographs of every size


# --- reading -------------------------------------------------------------------------------------

def count_frames(file):
    """How many frames or pages a file has, as far as Pillow can tell."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with Image.open(file) as image:
            if image.format != 'MPO':  # a camera's JPEG, with previews behind it
                return getattr(image, 'n_frames', 1)
    return 1


def load(file, folder):
    """The upright image in a file, of which no pixels are read yet. ``folder`` is for other files.

    Raises `pyvips.Error` if it can't be read, ValueError if colours of 16 bits would become 8.
    """
    try:
        return _load_with_vips(file)
    except pyvips.Error as error:
        if _has_deep_colours(file):
            raise ValueError(f'{file} has more than 8 bits a colour, which in this format '
                             "can't be read here: save it as TIFF or PNG") from None
        translated = folder / 'translated.tif'
        try:
            _translate(file, translated)
        except Exception:  # of any kind: Pillow doesn't know it either, or it is torn
            raise error from None
        return _load_with_vips(translated)


def _has_deep_colours(file):
    """Whether a file has colours that Pillow would make 8 bits of, without a word."""
    with open(file, 'rb') as stream:
        start = stream.read(65536)
    ppm, jpeg_2000 = PPM.match(start), JPEG_2000.search(start)
    return bool(ppm and int(ppm[1]) > 255 or jpeg_2000 and jpeg_2000[1][0] % 128 > 7)


def _load_with_vips(file):
    def opened(access):
        source = pyvips.Source.new_from_file(str(file))  # a name may have [options] of libvips
        return pyvips.Image.new_from_source(source, '', fail_on='error', access=access)

    # From top to bottom needs least memory, but doesn't do where the image has to be turned.
    image = opened('sequential')
    if image.get_typeof('orientation') and image.get('orientation') > 1:
        return opened('random').autorot()
    return image


# --- writing -------------------------------------------------------------------------------------

@contextlib.contextmanager
def new_file(target, force=False):
    """Gives the name of a file to write, in a folder of its own. It then becomes ``target``.

    So that appears whole or not at all. Raises FileExistsError if there is such a file, now or by
    then, unless ``force`` is true; ValueError if no image can have that name.
    """
    if target.suffix.lower() not in {*OPTIONS, *Image.registered_extensions()}:
        raise ValueError(f'{target} must have the suffix of an image format, such as .png or .jpg')
    if not target.parent.is_dir():
        raise ValueError(f'there is no folder {target.parent} to write {target.name} into')
    _check_absent(target, force)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.denoised-') as folder:
        file = Path(folder) / f'result{target.suffix.lower()}'
        yield file

        # It must not have appeared meanwhile, and from here on nobody else can make it.
        _check_absent(target, force)
        if not force:
            target.touch(exist_ok=False)
        os.replace(file, target)


@contextlib.contextmanager
def disk_errors():
    """A write that fails in libvips is an OSError with a number, as it is in Python."""
    try:
        yield
    except pyvips.Error as error:
        if 'write error' not in error.detail:
            raise
        reason = error.detail.strip().replace('\n', ', ')
        raise OSError(errno.EIO, reason) from error


def _check_absent(target, force):
    if target.exists() and not force:
        raise FileExistsError(f'{target} exists already: choose another name for the result, '
                              'or force it to be replaced')


def save(image, file):
    """Writes an image of libvips in the format that the suffix says."""
    if file.suffix not in OPTIONS:
        between = file.with_name('to_translate.tif')
        save(image, between)
        _translate(between, file)
        return
    options = dict(OPTIONS[file.suffix])
    if file.suffix in ('.tif', '.tiff'):
        bytes_a_value = 2 if image.format == 'ushort' else 1
        size = image.width * image.height * image.bands * bytes_a_value
        options['bigtiff'] = size > LARGEST_TIFF
    with disk_errors():
        image.write_to_target(pyvips.Target.new_to_file(str(file)), file.suffix, **options)


def _translate(source, target):
    """Copies an image into a file of another format with Pillow."""
    with Image.open(source) as image:
        if image.mode == 'LAB':
            lab, srgb = (ImageCms.createProfile(name) for name in ('LAB', 'sRGB'))
            image = ImageCms.profileToProfile(image, lab, srgb, outputMode='RGB')
        image.save(target, dpi=image.info.get('dpi'))
