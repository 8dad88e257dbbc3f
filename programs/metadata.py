"""What describes the photograph in an image file, by Exiv2: EXIF, IPTC, XMP and a comment."""
import contextlib
import os

import exiv2
import numpy as np
import pyvips

from programs import png_texts

exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)  # what is wrong in a file is no news to its owner

# Among the tags of a TIFF, those that say how the pixels are stored, which will not be true of
# another file, and copies of what is written elsewhere in the file.
SECTIONS_OF_STORAGE = {'ImageStructure', 'RecordingOffset', 'ImageCharacteristics', 'DngTags'}
COPIES = {'XMLPacket', 'ImageResources', 'IPTCNAA', 'InterColorProfile', 'SubIFDs'}
DESCRIPTIVE = {'XResolution', 'YResolution', 'ResolutionUnit', 'DocumentName', 'PageName',
               'WhitePoint', 'PrimaryChromaticities'}

FIELDS_OF_STORAGE = {'bits-per-sample', 'palette', 'orientation', 'n-pages', 'vips-loader'}

# Raw formats with a signature of their own; those of other makers are TIFF files.
RAW_TYPES = tuple(f'image/x-{maker}-'
                  for maker in ('canon', 'fuji', 'minolta', 'olympus', 'panasonic'))
SENSOR_VALUES = {'32803', '34892'}  # photometric interpretations: a colour filter, linear raw


def read(file):
    """An `exiv2.Image` with what it finds in a file, or None if it doesn't know the format."""
    try:
        image = exiv2.ImageFactory.open(str(file))
        image.readMetadata()
    except exiv2.Exiv2Error:
        return None
    return image


def is_raw(file):
    """Whether a file is of the values of a camera's sensor, whatever its name says."""
    image = read(file)
    if image is None:
        return False
    exif = image.exifData()
    models = {datum.toString() for datum in exif if datum.tagName() == 'PhotometricInterpretation'}
    return (image.mimeType().startswith(RAW_TYPES) or 'Exif.Image.DNGVersion' in exif
            or bool(models & SENSOR_VALUES))


def _is_of_storage(datum):
    """Whether an `exiv2.Exifdatum` is about the file that it stands in, not the photograph."""
    if datum.groupName().startswith('SubImage'):
        return True
    if datum.groupName() != 'Image' or datum.tagName() in DESCRIPTIVE:
        return False
    section = exiv2.ExifTags.sectionName(exiv2.ExifKey(datum.key()))
    return section in SECTIONS_OF_STORAGE or datum.tagName() in COPIES


def _descriptive(exif):
    """The EXIF of a photograph that stands upright, and without a small picture of how it was."""
    kept = exiv2.ExifData()
    for datum in exif:
        if not _is_of_storage(datum):
            kept.add(datum)
    exiv2.ExifThumb(kept).erase()
    return kept


def copy(source, header, target):
    """Writes what is in the file ``source`` into ``target``, as far as the format can hold it.

    Corrects what it says of the size in pixels, and adds the resolution where the EXIF doesn't
    have it: not every format has another place for it. Both are those of the libvips ``header``.
    """
    width, height = header.width, header.height
    exif, xmp, iptc, comment = exiv2.ExifData(), exiv2.XmpData(), exiv2.IptcData(), ''
    old = read(source)
    if old is not None:
        exif = _descriptive(old.exifData())
        xmp, iptc, comment = old.xmpData(), old.iptcData(), _comment(old)
    true_now = {'Exif.Photo.PixelXDimension': width, 'Exif.Photo.PixelYDimension': height,
                'Xmp.exif.PixelXDimension': width, 'Xmp.exif.PixelYDimension': height,
                'Xmp.tiff.ImageWidth': width, 'Xmp.tiff.ImageLength': height,
                'Xmp.tiff.Orientation': 1}
    for key, value in true_now.items():
        data = exif if key.startswith('Exif') else xmp
        if key in data:
            data[key] = value
    if _has_resolution(header) and 'Exif.Image.XResolution' not in exif:
        inch = f'{round(25.4 * header.xres)}/1', f'{round(25.4 * header.yres)}/1'
        exif['Exif.Image.XResolution'], exif['Exif.Image.YResolution'] = inch
        exif['Exif.Image.ResolutionUnit'] = 2

    kinds = {'ExifData': exif, 'IptcData': iptc, 'XmpData': xmp, 'Comment': comment}
    texts = png_texts.read(source) if target.suffix == '.png' else b''
    described = target.with_stem('described')
    with contextlib.suppress(exiv2.Exiv2Error):  # it doesn't know the format, or has no room
        _write(kinds, texts, target, described)
        os.replace(described, target)


def _write(kinds, texts, file, described):
    """Writes the image in ``file`` with what describes it into another file.

    ``kinds`` are what Exiv2 knows, ``texts`` the chunks of a PNG that it doesn't.
    """
    image = exiv2.ImageFactory.open(np.memmap(file, mode='r'))
    image.readMetadata()
    for kind, data in kinds.items():
        with contextlib.suppress(exiv2.Exiv2Error):  # the format doesn't have this kind
            getattr(image, f'set{kind}')(data)
    image.writeMetadata()

    # Not by Exiv2, which says nothing where the end of a file can't be written.
    data = image.data()
    with open(described, 'wb') as stream:
        stream.write(data[:png_texts.HEADER])
        stream.write(texts)
        stream.write(data[png_texts.HEADER:])


def _comment(image):
    """The comment in an `exiv2.Image`, which takes it for UTF-8; older programs wrote Latin-1."""
    text = image.comment().encode(errors='surrogateescape')
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode('latin-1')


def with_header(picture, header):
    """An image of libvips with the resolution, the colour profile and the like of another one."""
    picture = picture.copy(interpretation=header.interpretation, xres=header.xres, yres=header.yres)
    for name in header.get_fields():
        if name.startswith('png-comment-') or name in FIELDS_OF_STORAGE:
            continue
        if picture.get_typeof(name) == 0:
            picture.set_type(header.get_typeof(name), name, header.get(name))
    picture.set_type(pyvips.GValue.gint_type, 'orientation', 1)  # upright, also in the EXIF
    return picture


def _has_resolution(header):
    """Whether the resolution is known: if not, libvips says 1 or 72/25.4 pixels a millimetre."""
    return header.xres != 1 and abs(25.4 * header.xres - 72) > 0.1


def kinds_in(file, header):
    """The names of all that there is in a file beside grey or colours of 8 bits."""
    fields = set(header.get_fields())
    there = {
        'texts': bool(png_texts.read(file)),
        'colour profile': 'icc-profile-data' in fields,
        'resolution': _has_resolution(header),
        '16 bits': 'bits-per-sample' in fields and header.get('bits-per-sample') == 16,
        'more than 256 colours': 'palette' not in fields,
    }
    image = read(file)
    if image is not None:
        exif = image.exifData()
        there['resolution'] |= 'Exif.Image.XResolution' in exif
        there |= {'EXIF': 'exif-data' in fields or not _descriptive(exif).empty(),
                  'IPTC': not image.iptcData().empty(),
                  'XMP': not image.xmpData().empty(),
                  'comment': bool(image.comment())}
    return {kind for kind in there if there[kind]}
