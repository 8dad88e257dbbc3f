"""What describes a photograph in its file stays, in every format that can hold it."""
import exiv2
import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms, PngImagePlugin

import denoising_utils as du
from programs.denoise import denoise_file

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
EXIF = {'Exif.Image.Model': 'Camera', 'Exif.Image.Artist': 'José',
        'Exif.Photo.ISOSpeedRatings': 800, 'Exif.Photo.LensModel': '50 mm',
        'Exif.Photo.DateTimeOriginal': '2026:11:28 12:00:00',
        'Exif.GPSInfo.GPSLatitude': '32/1 52/1 48/1', 'Exif.Image.XResolution': '300/1',
        'Exif.Image.YResolution': '300/1', 'Exif.Image.ResolutionUnit': 2}
XMP = {'Xmp.xmp.Rating': '5', 'Xmp.dc.creator': 'José'}
IPTC = {'Iptc.Application2.Caption': 'A quay'}
COMMENT = 'by hand'


@pytest.fixture
def identity():
    return du.DnCNN(0, C=2, zero_last=True)


def describe(file, comment=False):
    """Gives a file all there is to describe a photograph."""
    image = exiv2.ImageFactory.open(str(file))
    image.readMetadata()
    exif, xmp, iptc = image.exifData(), image.xmpData(), image.iptcData()
    for data, entries in ((exif, EXIF), (xmp, XMP), (iptc, IPTC)):
        for key, value in entries.items():
            data[key] = value
    image.setExifData(exif)
    image.setXmpData(xmp)
    image.setIptcData(iptc)
    if comment:
        image.setComment(COMMENT)
    image.writeMetadata()


def described(file):
    image = exiv2.ImageFactory.open(str(file))
    image.readMetadata()
    found = {}
    for data, entries in ((image.exifData(), EXIF), (image.xmpData(), XMP),
                          (image.iptcData(), IPTC)):
        for key in entries:
            found[key] = data[key].toString() if key in data else None
    return found, image.comment()


@pytest.mark.parametrize('source', ['in.jpg', 'in.png', 'in.tif', 'in.webp'])
@pytest.mark.parametrize('target', ['out.jpg', 'out.png', 'out.tif', 'out.webp'])
def test_what_describes_a_photograph_stays(identity, tmp_path, source, target):
    Image.fromarray(COLOURS).save(tmp_path / source, icc_profile=PROFILE)
    describe(tmp_path / source, comment=source == 'in.jpg')
    given, comment = described(tmp_path / source)
    report = denoise_file(identity, tmp_path / source, tmp_path / target)
    kept, _ = described(tmp_path / target)
    lost = {key for key, value in given.items() if value is not None and kept[key] != value}
    assert not {key for key in lost if not key.startswith('Iptc')}
    assert not lost or 'IPTC' in report.left_out  # WebP has no place for it
    with Image.open(tmp_path / target) as image:
        assert image.info['icc_profile'] == PROFILE
    if comment and target == 'out.jpg':
        assert described(tmp_path / target)[1] == COMMENT
    elif comment:
        assert 'comment' in report.left_out or described(tmp_path / target)[1] == COMMENT


def test_16_bits_keep_it_too(identity, tmp_path):
    deep = pyvips.Image.new_from_array(COLOURS.astype(np.uint16) * 257)
    deep.copy(interpretation='rgb16').tiffsave(str(tmp_path / 'in.tif'))
    describe(tmp_path / 'in.tif')
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert described(tmp_path / 'out.tif') == described(tmp_path / 'in.tif')
    assert pyvips.Image.new_from_file(str(tmp_path / 'out.tif')).format == 'ushort'


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif'])
def test_resolution_stays_without_exif(identity, tmp_path, suffix):
    Image.fromarray(COLOURS).save(tmp_path / f'in.{suffix}', dpi=(240, 240))
    for target in ('out.jpg', 'out.png', 'out.tif'):
        denoise_file(identity, tmp_path / f'in.{suffix}', tmp_path / target, force=True)
        with Image.open(tmp_path / target) as image:
            assert image.info['dpi'] == pytest.approx((240, 240), abs=0.1), target


TEXTS = {'Title': 'café', 'Author': 'Γειά', 'Software': 'by hand', 'Description': 'señal'}


def png_with_texts(file, late):
    """Latin-1, as the oldest kind of text has it, compressed, Unicode; after the pixels or not."""
    texts = PngImagePlugin.PngInfo()
    for name, text in TEXTS.items():
        if name == 'Author':
            texts.add_itxt(name, text)
        else:
            texts.add_text(name, text, zip=name == 'Software')
    image = Image.fromarray(COLOURS)
    image.save(file)
    plain = file.read_bytes()
    image.save(file, pnginfo=texts)
    if late:
        described = file.read_bytes()
        chunks = described[33:33 + len(described) - len(plain)]
        file.write_bytes(plain[:-12] + chunks + plain[-12:])


@pytest.mark.parametrize('late', [False, True])
def test_texts_of_a_png_stay_in_any_letters(identity, tmp_path, late):
    png_with_texts(tmp_path / 'in.png', late)
    report = denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.png')
    with Image.open(tmp_path / 'out.png') as image:
        assert image.text == TEXTS
    assert not report.left_out
    report = denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.jpg')
    assert described(tmp_path / 'out.jpg')[1] == TEXTS['Description']
    assert report.left_out == ['texts']


def test_what_can_not_be_held_is_named(identity, tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', icc_profile=PROFILE)
    describe(tmp_path / 'in.jpg', comment=True)
    report = denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.ppm')
    assert {'EXIF', 'XMP', 'IPTC', 'colour profile', 'comment'} <= set(report.left_out)
    assert denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg').left_out == []


def test_the_small_picture_of_how_it_was_goes(identity, tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg')
    Image.fromarray(COLOURS[:10, :15]).save(tmp_path / 'small.jpg')
    image = exiv2.ImageFactory.open(str(tmp_path / 'in.jpg'))
    image.readMetadata()
    exif = image.exifData()
    exif['Exif.Image.Model'] = 'Camera'
    exiv2.ExifThumb(exif).setJpegThumbnail(str(tmp_path / 'small.jpg'))
    image.setExifData(exif)
    image.writeMetadata()
    denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg')
    result = exiv2.ImageFactory.open(str(tmp_path / 'out.jpg'))
    result.readMetadata()
    keys = {datum.key() for datum in result.exifData()}
    assert 'Exif.Image.Model' in keys
    assert not any(key.startswith('Exif.Thumbnail') for key in keys)
