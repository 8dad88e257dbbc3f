"""The program that denoises photographs: kinds of files, what is kept of them, and what it says."""
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms

import denoising_utils as du

HERE = Path(__file__).resolve().parent.parent
RAMP = np.arange(20 * 30).reshape(20, 30)
COLOURS = np.stack([RAMP % 256, RAMP % 200, RAMP % 99], 2).astype(np.uint8)
DEEP = (RAMP * 109).astype(np.uint16)
DEEP_COLOURS = np.stack([DEEP, DEEP // 2, DEEP // 3], 2)
Tag = ExifTags.Base


@pytest.fixture
def identity():
    """A network that changes nothing, so that the pixels can be followed through the files."""
    return du.DnCNN(0, C=2, zero_last=True)


def picture(mode):
    image = Image.fromarray(COLOURS)
    if 'A' in mode:
        image.putalpha(Image.fromarray((RAMP % 251).astype(np.uint8)))
    return image.quantize(16) if mode == 'P' else image.convert(mode)


# --- kinds of files ------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, suffix, expected', [
    ('RGB', 'png', 'RGB'), ('RGB', 'tif', 'RGB'), ('RGB', 'bmp', 'RGB'), ('L', 'png', 'L'), ('P', 'png', 'RGB'),
    ('RGBA', 'png', 'RGBA'), ('RGBA', 'tif', 'RGBA'), ('LA', 'png', 'LA'), ('1', 'png', 'L'), ('CMYK', 'tif', 'RGB')])
def test_8_bits(identity, tmp_path, mode, suffix, expected):
    source, target = tmp_path / f'in.{suffix}', tmp_path / f'out.{suffix}'
    picture(mode).save(source)
    du.denoise_file(identity, source, target)
    with Image.open(target) as result:
        assert result.mode == expected
        assert np.array_equal(np.array(result), np.array(picture(mode).convert(expected)))


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_of_grey(identity, tmp_path, suffix):
    source, target = tmp_path / f'in.{suffix}', tmp_path / f'out.{suffix}'
    Image.fromarray(DEEP).save(source)
    du.denoise_file(identity, source, target)
    with Image.open(target) as result:
        assert np.array_equal(np.array(result), DEEP)
    du.denoise_file(identity, source, tmp_path / 'out.webp')
    assert np.abs(du.read_photograph(tmp_path / 'out.webp')[0].numpy() - DEEP / 257).mean() < 2


def test_16_bits_of_colours(identity, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    tifffile.imwrite(tmp_path / 'in.tif', DEEP_COLOURS, photometric='rgb',
                     extratags=[(Tag.Make, 's', 0, 'Camera', True), (34675, 'B', len(profile), profile, True)])
    du.denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)
    with Image.open(tmp_path / 'out.tif') as result:
        assert result.getexif()[Tag.Make] == 'Camera' and result.info['icc_profile'] == profile
    du.denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.png')
    with Image.open(tmp_path / 'out.png') as result:
        assert np.abs(np.array(result) - DEEP_COLOURS / 257).max() <= 0.51


def test_16_bits_of_colours_stored_plane_by_plane(identity, tmp_path):
    tifffile.imwrite(tmp_path / 'in.tif', np.moveaxis(DEEP_COLOURS, 2, 0), photometric='rgb', planarconfig='separate', metadata=None)
    du.denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), DEEP_COLOURS)


@pytest.mark.filterwarnings('ignore:.*of which 8 were read')
def test_16_bits_of_colours_that_are_compressed_or_of_another_model(tmp_path, monkeypatch):
    cmyk = np.dstack([DEEP_COLOURS, DEEP])
    tifffile.imwrite(tmp_path / 'cmyk.tif', cmyk, photometric='separated')
    tifffile.imwrite(tmp_path / 'lzw.tif', DEEP_COLOURS, photometric='rgb')

    def needs_another_package(file):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(du, '_read_tiff', needs_another_package)
    for name in ('cmyk.tif', 'lzw.tif'):
        with pytest.warns(UserWarning, match=f'{name} has colours of 16 bits, of which 8 were read'):
            assert du.read_image(tmp_path / name).pixels.dtype == torch.uint8
    assert np.abs(du.read_image(tmp_path / 'lzw.tif').pixels.permute(1, 2, 0).numpy() - DEEP_COLOURS / 257.0).max() <= 1


def test_16_bits_that_pillow_cuts_off_are_announced(identity, tmp_path):
    tifffile.imwrite(tmp_path / 'in.tif', DEEP_COLOURS, photometric='rgb', extratags=[(Tag.Orientation, 'H', 1, 6, True)])
    with pytest.warns(UserWarning, match='in.tif has colours of 16 bits, of which 8 were read'):
        du.denoise_file(identity, tmp_path / 'in.tif', tmp_path / 'out.tif')
    with Image.open(tmp_path / 'out.tif') as result:
        assert np.array_equal(np.array(result), np.rot90(DEEP_COLOURS // 256, -1))


def test_rotation_is_applied_once_and_exif_and_profile_are_kept(identity, tmp_path):
    exif = Image.Exif()
    exif[Tag.Orientation], exif[Tag.Model] = 6, 'Camera'
    exif[ExifTags.IFD.Exif] = {Tag.ExposureTime: 0.01}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitude: (32.0, 52.0, 48.0)}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    smooth = np.stack([RAMP // 3, RAMP // 5, 255 - RAMP // 4], 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / 'in.jpg', exif=exif, icc_profile=profile, quality=100, subsampling=0)
    for suffix in ('jpg', 'png', 'tif', 'webp'):
        source, target = tmp_path / 'in.jpg', tmp_path / f'out.{suffix}'
        for _ in range(2):  # the second time from what was written
            du.denoise_file(identity, source, target, force=True)
            source, target = target, tmp_path / f'again.{suffix}'
        with Image.open(tmp_path / f'again.{suffix}') as result:
            kept = result.getexif()
            assert kept.get(Tag.Orientation, 1) == 1 and kept[Tag.Model] == 'Camera', suffix
            assert kept.get_ifd(ExifTags.IFD.Exif).get(Tag.ExposureTime) == 0.01, suffix
            assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (32, 52, 48)
            assert result.info['icc_profile'] == profile
            assert np.abs(np.array(result, dtype=float) - np.rot90(smooth, -1)).mean() < 3, suffix


def test_compression_and_layout_of_a_tiff_are_not_taken_for_exif(identity, tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / 'in.tif', compression='tiff_lzw')
    for name in ('out.tif', 'out.jpg'):
        du.denoise_file(identity, tmp_path / 'in.tif', tmp_path / name)
        with Image.open(tmp_path / name) as result:
            assert result.size == (30, 20) and np.array(result).shape == (20, 30, 3)
            assert name.endswith('tif') or not {Tag.Compression, Tag.StripOffsets} & set(result.getexif())


@pytest.mark.filterwarnings('ignore:Corrupt EXIF', 'ignore:Tag data')
@pytest.mark.parametrize('junk', [b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\0',
                                  b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\x06\0\0'])
def test_damaged_exif_does_not_matter(identity, tmp_path, junk):
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=junk)
    du.denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg')
    assert du.read_photograph(tmp_path / 'out.jpg').shape == (3, 20, 30)


def test_exif_that_has_other_types_than_it_should(identity, tmp_path):
    unit_as_text = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x28\0\x02\0\0\0\x03in\0\0\0\0\0\0'
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=unit_as_text)
    with pytest.warns(UserWarning, match='in.jpg has an EXIF that is damaged .*, and left out'):
        du.denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.png')
    with Image.open(tmp_path / 'out.png') as result:
        assert result.size == (30, 20) and not result.getexif()


def test_texts_in_other_letters_than_those_of_english_are_kept(identity, tmp_path):
    exif = Image.Exif()
    exif[Tag.Artist] = 'José'.encode()
    Image.fromarray(COLOURS).save(tmp_path / 'in.jpg', exif=exif.tobytes())
    for suffix in ('jpg', 'png'):
        du.denoise_file(identity, tmp_path / 'in.jpg', tmp_path / f'out.{suffix}')
        with Image.open(tmp_path / f'out.{suffix}') as result:
            assert result.getexif()[Tag.Artist].encode('latin-1').decode() == 'José'


def test_jpeg_loses_little_and_a_preview_inside_is_no_animation(identity, tmp_path):
    smooth = Image.fromarray(COLOURS).resize((90, 60), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / 'in.jpg', format='MPO', save_all=True, append_images=[smooth.resize((9, 6))], quality=98)
    du.denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.jpg')
    source, result = (du.read_photograph(tmp_path / name).float() for name in ('in.jpg', 'out.jpg'))
    assert (source - result).abs().mean() < 2


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (3, 2)])
def test_images_of_a_few_pixels(tmp_path, size):
    Image.new('RGB', size, (10, 200, 30)).save(tmp_path / 'in.png')
    levels = du.denoise_file(du.DUDnCNN(6, C=2, zero_last=True), tmp_path / 'in.png', tmp_path / 'out.png')
    assert levels == pytest.approx((0, 0), abs=1e-6)
    with Image.open(tmp_path / 'out.png') as result:
        assert result.size == size and result.getpixel((0, 0)) == (10, 200, 30)


def odd_files(folder):
    """Files that can't be denoised, and what is said about each."""
    (folder / 'folder.png').mkdir()
    yield 'folder.png', 'is a folder'
    yield 'absent.png', 'there is no file'
    for name, content in (('empty.jpg', b''), ('text.png', b'hello'), ('video.mp4', b'\0\0\0\x20ftypisom\0\0\2\0isomiso2')):
        (folder / name).write_bytes(content)
        yield name, 'is not a readable image'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(folder / 'torn.jpg')
    os.truncate(folder / 'torn.jpg', 3000)
    yield 'torn.jpg', 'is not a readable image'
    picture('RGB').save(folder / 'moving.gif', save_all=True, append_images=[picture('RGB').rotate(180)])
    yield 'moving.gif', 'has 2 frames or pages'
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / 'floats.tif')
    yield 'floats.tif', 'has values of 32 bits'
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(folder / 'integers.tif')
    yield 'integers.tif', 'has values of 32 bits'


def test_what_can_not_be_denoised_says_why(identity, tmp_path):
    for name, words in odd_files(tmp_path):
        with pytest.raises(ValueError, match=f'{name} .*{words}|{words} .*{name}'):
            du.denoise_file(identity, tmp_path / name, tmp_path / 'out.png')
        assert not (tmp_path / 'out.png').exists()


# --- the result appears whole, or not at all ------------------------------------------------------

def test_nothing_is_overwritten_unless_forced(identity, tmp_path):
    picture('RGB').save(tmp_path / 'in.png')
    (tmp_path / 'out.png').write_text('precious')
    with pytest.raises(FileExistsError, match='out.png exists already'):
        du.denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.png')
    assert (tmp_path / 'out.png').read_text() == 'precious'
    du.denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.png', force=True)
    assert du.read_photograph(tmp_path / 'out.png').shape == (3, 20, 30)
    with pytest.raises(ValueError, match='is the file to read'):
        du.denoise_file(identity, tmp_path / 'in.png', tmp_path / 'in.png', force=True)


@pytest.mark.parametrize('error', [OSError('No space left on device'), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(identity, tmp_path, monkeypatch, error):
    picture('RGB').save(tmp_path / 'in.png')
    (tmp_path / 'out.png').write_text('precious')
    save = Image.Image.save

    def fail(image, file, *args, **options):
        save(image, file, *args, **options)
        if not isinstance(file, io.BytesIO):
            Path(file).write_bytes(Path(file).read_bytes()[:50])
            raise error

    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(type(error)):
        du.denoise_file(identity, tmp_path / 'in.png', tmp_path / 'out.png', force=True)
    assert (tmp_path / 'out.png').read_text() == 'precious'
    assert sorted(file.name for file in tmp_path.iterdir()) == ['in.png', 'out.png']


@pytest.mark.parametrize('target, words', [
    ('out', 'must have the suffix'), ('out.mp4', 'must have the suffix'), ('nowhere/out.png', 'there is no folder'),
    ('out.jpg', "out.jpg can't hold this image")])
def test_a_bad_target_is_found_before_the_work(tmp_path, target, words):
    picture('RGBA').save(tmp_path / 'in.png')
    with pytest.raises(ValueError, match=words):
        du.denoise_file(None, tmp_path / 'in.png', tmp_path / target)  # no network: it would fail later


# --- denoising -----------------------------------------------------------------------------------

@pytest.fixture
def net():
    torch.manual_seed(0)
    return du.DUDnCNN(4, C=4).eval()


def test_integers_are_denoised_as_the_floats_that_they_stand_for(net):
    floats = torch.rand(3, 40, 50) * 2 - 1
    for dtype in (torch.uint8, torch.uint16):
        image = du.to_integers(floats, dtype)
        result = du.denoise_image(net, image, tile=24)
        assert result.dtype == dtype
        expected = du.denoise_image(net, du.to_floats(image)).clamp(-1, 1)
        assert (du.to_floats(result) - expected).abs().max() < 1.01 / torch.iinfo(dtype).max


def test_grey_is_the_mean_of_three_equal_channels(net):
    image = torch.rand(1, 20, 30) * 2 - 1
    expected = du.denoise_image(net, image.expand(3, -1, -1)).mean(0, keepdim=True)
    torch.testing.assert_close(du.denoise_image(net, image), expected)


def test_strength_blends(net):
    image = torch.rand(3, 20, 30) * 2 - 1
    full = du.denoise_image(net, image)
    assert torch.equal(du.denoise_image(net, image, strength=0), image)
    torch.testing.assert_close(du.denoise_image(net, image, strength=0.25), 0.75 * image + 0.25 * full)


@pytest.mark.parametrize('make', du.NETWORKS.values())
def test_for_a_higher_level_the_input_is_scaled(make):
    torch.manual_seed(1)
    net, x = make(4, C=4).eval(), torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(du.for_level(net, 75)(x), net(x * 0.4) / 0.4)
        assert torch.equal(du.for_level(net, 15)(x), net(x))


@pytest.mark.parametrize('sigma', [2, 10, 40])
def test_the_estimated_level_is_that_of_white_noise(sigma):
    torch.manual_seed(0)
    image = torch.linspace(-0.3, 0.3, 200).expand(3, 300, 200) + 2 * sigma / 255 * torch.randn(3, 300, 200)
    assert du.noise_level(image) == pytest.approx(sigma, rel=0.05)
    assert du.noise_level(du.to_integers(image, torch.uint16)[:1]) == pytest.approx(sigma, rel=0.05)


# --- the command ---------------------------------------------------------------------------------

@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command ``denoise``, with a network that changes nothing."""
    picture('RGB').save(tmp_path / 'in.png')
    monkeypatch.setattr(du, 'load_network', lambda name: (du.DnCNN(0, C=2, zero_last=True), []))
    monkeypatch.chdir(tmp_path)
    return lambda words: du.main(['denoise', *words.split()])


def test_one_file_and_many(command, tmp_path, capsys):
    command('in.png out.png')
    said = capsys.readouterr()
    assert said.out.startswith('out.png: noise level ') and said.err == ''
    picture('L').save('grey.jpg')
    Path('torn.png').write_bytes(b'\x89PNG')
    with pytest.raises(SystemExit, match='1 of 3 files could not be denoised'):
        command('in.png torn.png grey.jpg --to results/new --strength 0.5')
    assert sorted(file.name for file in Path('results/new').iterdir()) == ['grey.jpg', 'in.png']
    assert 'torn.png is not a readable image' in capsys.readouterr().err


@pytest.mark.parametrize('words, message', [
    ('in.png', 'name two files'), ('in.png b.png c.png', 'name two files'), ('in.png folder/in.png --to r', 'same name'),
    ('in.png out.png --strength 2', '--strength must be from 0 to 1, got 2'),
    ('in.png out.png --sigma 30', 'dudncnn_blind finds the level itself'),
    ('in.png out.png --net dncnn --sigma 0', 'above 0'),
    ('in.png out.png --net dncnn --sigma 10', 'must be 30, on which these networks were trained, or more, got 10')])
def test_bad_options(command, words, message):
    with pytest.raises(ValueError, match=message):
        command(words)


def test_the_example_replaces_nothing_unless_forced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('denoised.jpg').write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='denoised.jpg exists already'):
        du.main(['example'])
    with pytest.raises(ValueError, match='denoised must have the suffix of an image format'):
        du.main(['example', 'denoised'])
    assert Path('denoised.jpg').read_bytes() == b'mine' and len(list(tmp_path.iterdir())) == 1


def run(program, *words, **environment):
    return subprocess.run([sys.executable, '-c', program, *words], cwd=HERE, check=True, text=True, capture_output=True,
                          env={k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')} | environment).stdout


MEMORY = """
import resource, sys, torch, denoising_utils as du
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != 'darwin' else 2 ** 20)
net = du.DnCNN(0, C=2, zero_last=True)
du.denoise_file(net, sys.argv[1], sys.argv[2])  # so that all is loaded
before = peak()
du.denoise_file(net, sys.argv[3], sys.argv[2], force=True)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no module resource')
def test_24_megapixels_take_300_megabytes_beside_the_result(tmp_path):
    """Here for the files; what the features of a tile take is measured in tests/benchmark.py."""
    picture('RGB').save(tmp_path / 'small.png')
    Image.fromarray(COLOURS).resize((6000, 4000)).save(tmp_path / 'large.jpg')
    assert float(run(MEMORY, tmp_path / 'small.png', tmp_path / 'out.jpg', tmp_path / 'large.jpg')) < 300 + 72


FAULTS = """
import resource, denoising_utils, torch
for k in range(21):
    torch.ones(10_000_000)
    if k == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
def test_freed_memory_is_kept_without_settings_of_the_environment():
    """20 times 40 MB that are given back and taken again cause a page fault each 4 KiB."""
    kept, given_back = int(run(FAULTS)), int(run(FAULTS, MALLOC_PERTURB_='0'))
    assert 5 * kept < given_back
