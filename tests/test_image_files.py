"""The kinds of image files that are read and written, and what is kept of them."""
import os

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms

import denoising_utils as du
from programs.denoise import denoise_file

RAMP = np.arange(20 * 30).reshape(20, 30)
COLOURS = np.stack([RAMP % 256, RAMP % 200, RAMP % 99], 2).astype(np.uint8)
DEEP = (RAMP * 109).astype(np.uint16)
DEEP_COLOURS = np.stack([DEEP, DEEP // 2, DEEP // 3], 2)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
Tag = ExifTags.Base


@pytest.fixture
def identity():
    """A network that changes nothing, so that the pixels can be followed through the files."""
    return du.DnCNN(0, C=2, zero_last=True)


def picture(mode):
    image = Image.fromarray(COLOURS)
    if 'A' in mode:
        image.putalpha(Image.fromarray((RAMP % 251).astype(np.uint8)))
    if mode == 'P':
        return image.quantize(16)
    return image.convert(mode)


def pixels_of(file):
    with Image.open(file) as image:
        return np.array(image)


# --- 8 bits --------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, suffix, expected', [
    ('RGB', 'png', 'RGB'),
    ('RGB', 'tif', 'RGB'),
    ('RGB', 'bmp', 'RGB'),
    ('L', 'png', 'L'),
    ('P', 'png', 'RGB'),
    ('RGBA', 'png', 'RGBA'),
    ('RGBA', 'tif', 'RGBA'),
    ('LA', 'png', 'LA'),
    ('1', 'png', 'L'),
])
def test_8_bits(identity, tmp_path, mode, suffix, expected):
    source, target = tmp_path / f'in.{suffix}', tmp_path / f'out.{suffix}'
    picture(mode).save(source)
    denoise_file(identity, source, target)
    with Image.open(target) as result:
        assert result.mode == expected
        values, given = (np.array(image) for image in (result, picture(mode).convert(expected)))
    if 'A' in mode:  # what nobody sees has no colours of its own
        seen = given[..., -1] > 0
        assert not values[~seen, -1].any()
        values, given = values[seen], given[seen]
    assert np.array_equal(values, given)


def test_jpeg_loses_little_and_its_preview_is_no_animation(identity, tmp_path):
    smooth = Image.fromarray(COLOURS).resize((90, 60), Image.Resampling.BICUBIC)
    preview = smooth.resize((9, 6))
    smooth.save(tmp_path / 'in.jpg', 'MPO', save_all=True, append_images=[preview], quality=98)
    denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg')
    source, result = (pixels_of(tmp_path / name).astype(float) for name in ('in.jpg', 'out.jpg'))
    assert np.abs(source - result).mean() < 2


# --- 16 bits -------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_of_grey(identity, tmp_path, suffix):
    source, target = tmp_path / f'in.{suffix}', tmp_path / f'out.{suffix}'
    Image.fromarray(DEEP).save(source)
    denoise_file(identity, source, target)
    assert np.array_equal(pixels_of(target), DEEP)

    # WebP has 8 bits, and no grey.
    denoise_file(identity, source, tmp_path / 'out.webp')
    assert np.abs(pixels_of(tmp_path / 'out.webp')[..., 0] - DEEP / 257).mean() < 2


def test_16_bits_of_colours(identity, tmp_path):
    tags = [(Tag.Make, 's', 0, 'Camera', True), (34675, 'B', len(PROFILE), PROFILE, True)]
    tifffile.imwrite(tmp_path / 'in.tif', DEEP_COLOURS, photometric='rgb', extratags=tags)
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)
    with Image.open(tmp_path / 'out.tif') as result:
        assert result.getexif()[Tag.Make] == 'Camera'
        assert result.info['icc_profile'] == PROFILE

    # In a format that has 8 bits, they are rounded.
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.bmp')
    assert np.abs(pixels_of(tmp_path / 'out.bmp') - DEEP_COLOURS / 257).max() <= 0.51


def test_16_bits_of_colours_stored_plane_by_plane(identity, tmp_path):
    planes = np.moveaxis(DEEP_COLOURS, 2, 0)
    tifffile.imwrite(tmp_path / 'in.tif', planes, photometric='rgb', planarconfig='separate',
                     metadata=None)
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)


@pytest.mark.parametrize('options', [
    {'compression': 'zlib'}, {'compression': 'lzw'}, {'predictor': True, 'compression': 'zlib'},
    {'bigtiff': True}])
def test_16_bits_however_a_tiff_has_them(identity, tmp_path, options):
    if options.get('compression') == 'lzw':
        image = pyvips.Image.new_from_array(DEEP_COLOURS).copy(interpretation='rgb16')
        image.tiffsave(str(tmp_path / 'in.tif'), compression='lzw')
    else:
        tifffile.imwrite(tmp_path / 'in.tif', DEEP_COLOURS, photometric='rgb', **options)
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)


def test_16_bits_are_turned_upright(identity, tmp_path):
    turned = pyvips.Image.new_from_array(DEEP_COLOURS).copy(interpretation='rgb16')
    turned.set_type(pyvips.GValue.gint_type, 'orientation', 6)
    turned.tiffsave(str(tmp_path / 'in.tif'))
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), np.rot90(DEEP_COLOURS, -1))


def test_16_bits_of_colours_in_png(identity, tmp_path):
    image = pyvips.Image.new_from_array(DEEP_COLOURS).copy(interpretation='rgb16')
    image.pngsave(str(tmp_path / 'in.png'))
    denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)


# --- colours -------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_white_may_be_the_smallest_value(identity, tmp_path, dtype):
    grey = DEEP if dtype == np.uint16 else COLOURS[..., 0]
    tifffile.imwrite(tmp_path / 'in.tif', np.iinfo(dtype).max - grey, photometric='miniswhite')
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    with Image.open(tmp_path / 'out.tif') as result:
        assert np.array_equal(np.array(result), grey)


def test_inks_become_the_colours_that_they_print(identity, tmp_path):
    inks = np.zeros((8, 40, 4), np.uint8)
    for k in range(4):
        inks[:, 10 * k:10 * k + 10, k] = 255  # cyan, magenta, yellow, black
    Image.fromarray(inks, 'CMYK').save(tmp_path / 'in.tif')
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.png')
    cyan, magenta, yellow, black = pixels_of(tmp_path / 'out.png')[4, 5::10].astype(int)
    assert cyan.argmin() == 0 and magenta.argmin() == 1 and yellow.argmin() == 2
    assert black.max() < 80


def test_lab_becomes_srgb(identity, tmp_path):
    lab = np.zeros((8, 8, 3), np.uint8)
    lab[..., 0] = 128
    lab[:, 4:, 1] = 60  # a: towards red
    tifffile.imwrite(tmp_path / 'in.tif', lab, photometric='cielab')
    denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.png')
    grey, red = pixels_of(tmp_path / 'out.png')[4, [1, 6]].astype(int)
    assert np.ptp(grey) <= 3 and abs(grey[0] - 119) < 6
    assert red[0] > red[1] + 60


def test_what_is_transparent_does_not_show(tmp_path):
    """Noise that nobody sees changed its neighbours by up to 34 of 255."""
    torch.manual_seed(0)
    net = du.DnCNN(2, C=4).eval()
    colours = np.full((40, 40, 4), 128, np.uint8)
    colours[:, 20:, 3] = 0
    results = []
    for name in ('plain', 'noisy'):
        if name == 'noisy':
            noise = np.random.default_rng(0).integers(0, 256, (40, 20, 3))
            colours[:, 20:, :3] = noise
        Image.fromarray(colours).save(tmp_path / f'{name}.png')
        denoise_file(net, tmp_path / f'{name}.png', tmp_path / f'{name}_out.png', strength=1)
        results.append(pixels_of(tmp_path / f'{name}_out.png')[:, :20])
    assert np.array_equal(*results)


# --- EXIF and colour profile ---------------------------------------------------------------------

def test_rotation_is_applied_once_exif_and_profile_kept(identity, tmp_path):
    exif = Image.Exif()
    exif[Tag.Orientation] = 6
    exif[Tag.Model] = 'Camera'
    exif[ExifTags.IFD.Exif] = {Tag.ExposureTime: 0.01}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitude: (32.0, 52.0, 48.0)}
    smooth = np.stack([RAMP // 3, RAMP // 5, 255 - RAMP // 4], 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / 'in.jpg', exif=exif, icc_profile=PROFILE, quality=100,
                                 subsampling=0)
    for suffix in ('jpg', 'png', 'tif', 'webp'):
        # Twice, the second time from what the first has written.
        once, again = tmp_path / f'out.{suffix}', tmp_path / f'again.{suffix}'
        denoise_file(identity, tmp_path / 'in.jpg', once)
        denoise_file(identity, once, again)
        with Image.open(again) as result:
            kept = result.getexif()
            assert kept.get(Tag.Orientation, 1) == 1, suffix
            assert kept[Tag.Model] == 'Camera', suffix
            assert kept.get_ifd(ExifTags.IFD.Exif).get(Tag.ExposureTime) == 0.01, suffix
            place = kept.get_ifd(ExifTags.IFD.GPSInfo)
            assert place[ExifTags.GPS.GPSLatitude] == (32, 52, 48), suffix
            assert result.info['icc_profile'] == PROFILE, suffix
            difference = np.array(result, dtype=float) - np.rot90(smooth, -1)
            assert np.abs(difference).mean() < 3, suffix


def test_compression_and_layout_of_a_tiff_are_not_kept(identity, tmp_path):
    """They stand among the tags of a TIFF as the EXIF does."""
    Image.fromarray(COLOURS).save(tmp_path / 'in.tif', compression='tiff_lzw')
    for name in ('out.tif', 'out.jpg'):
        denoise_file(identity, tmp_path / 'in.tif', tmp_path / name)
        assert pixels_of(tmp_path / name).shape == (20, 30, 3)
    with Image.open(tmp_path / 'out.jpg') as result:
        assert not {Tag.Compression, Tag.StripOffsets} & set(result.getexif())


@pytest.mark.filterwarnings('ignore:Corrupt EXIF', 'ignore:Tag data')
@pytest.mark.parametrize('junk', [
    b'Exif\0\0garbage',
    b'Exif\0\0II*\0\xff\xff\xff\0',
    b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\x06\0\0',
])
def test_damaged_exif_does_not_matter(identity, tmp_path, junk):
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=junk)
    denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg')
    assert pixels_of(tmp_path / 'out.jpg').shape == (20, 30, 3)


def test_exif_that_has_other_types_than_it_should(identity, tmp_path):
    unit_as_text = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x28\0\x02\0\0\0\x03in\0\0\0\0\0\0'
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=unit_as_text)
    denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.png')
    assert pixels_of(tmp_path / 'out.png').shape == (20, 30, 3)


def test_texts_with_accents_are_kept(identity, tmp_path):
    exif = Image.Exif()
    exif[Tag.Artist] = 'José'.encode()
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=exif.tobytes())
    for suffix in ('jpg', 'png'):
        denoise_file(identity, tmp_path / 'in.jpg', tmp_path / f'out.{suffix}')
        with Image.open(tmp_path / f'out.{suffix}') as result:
            assert result.getexif()[Tag.Artist].encode('latin-1').decode() == 'José'


# --- what can't be read --------------------------------------------------------------------------

def odd_files(folder):
    """Files that can't be denoised, and what is said about each."""
    (folder / 'folder.png').mkdir()
    yield 'folder.png', 'is a folder'
    yield 'absent.png', 'there is no file'

    # Not images, or no longer.
    (folder / 'empty.jpg').write_bytes(b'')
    yield 'empty.jpg', 'is not a readable image'
    (folder / 'text.png').write_bytes(b'hello')
    yield 'text.png', 'is not a readable image'
    (folder / 'video.mp4').write_bytes(b'\0\0\0\x20ftypisom\0\0\2\0isomiso2')
    yield 'video.mp4', 'is not a readable image'
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / 'torn.jpg')
    os.truncate(folder / 'torn.jpg', 3000)
    yield 'torn.jpg', 'is not a readable image'

    # Images, but of another kind.
    other = picture('RGB').rotate(180)
    picture('RGB').save(folder / 'moving.gif', save_all=True, append_images=[other])
    yield 'moving.gif', 'has 2 frames or pages'
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / 'floats.tif')
    yield 'floats.tif', 'has values of the type float'
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(folder / 'integers.tif')
    yield 'integers.tif', 'has values of the type int'
    tags = [(50706, 'B', 4, b'\1\4\0\0', True)]
    tifffile.imwrite(folder / 'raw.dng', COLOURS, photometric='rgb', extratags=tags)
    yield 'raw.dng', 'is a raw file'
    for name, signature in {'canon.cr2': b'II*\0\x10\0\0\0CR\2\0', 'olympus.orf': b'IIRO\x08\0\0\0',
                            'canon.cr3': b'\0\0\0\x18ftypcrx \0\0\0\1crx isom'}.items():
        (folder / name).write_bytes(signature + bytes(300))
        yield name, 'is a raw file'
    (folder / 'phone.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100))
    yield 'phone.heic', 'HEIC, for which there is no decoder here'
    (folder / 'deep.ppm').write_bytes(b'P6 # by hand\n30 20\n65535\n' + bytes(2 * COLOURS.size))
    yield 'deep.ppm', 'has more than 8 bits a colour'
    picture('RGB').save(folder / 'deep.jp2')
    size = b'\xff\x4f\xff\x51'  # begins the description of the pixels
    start, rest = (folder / 'deep.jp2').read_bytes().split(size)
    (folder / 'deep.jp2').write_bytes(start + size + rest[:38] + 3 * b'\x0f\1\1' + rest[47:])
    yield 'deep.jp2', 'has more than 8 bits a colour'


def test_what_can_not_be_denoised_says_why(identity, tmp_path):
    for name, words in odd_files(tmp_path):
        with pytest.raises(ValueError, match=f'{name} .*{words}|{words} .*{name}'):
            denoise_file(identity, tmp_path / name, tmp_path / 'out.png')
        assert not (tmp_path / 'out.png').exists()
