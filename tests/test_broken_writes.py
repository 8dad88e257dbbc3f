"""A disk that is full, or a target that appears meanwhile: what was there stays, and it is said."""
import contextlib
import os
import sys

import exiv2
import pytest
from PIL import ExifTags, Image

import denoising_utils as du
from programs.denoise import denoise_file, main

XMP = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
       b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
       b'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Label="' + b'z' * 3000 + b'"/>'
       b'</rdf:RDF></x:xmpmeta>')


@pytest.fixture
def identity():
    return du.DnCNN(0, C=2, zero_last=True)


needs_limits = pytest.mark.skipif(sys.platform == 'win32', reason='there files have no limits')


@contextlib.contextmanager
def files_of_at_most(size):
    """Inside, more bytes can't be written into a file."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_limits
@pytest.mark.parametrize('suffix', ['jpg', 'tif', 'png', 'webp', 'avif'])
def test_a_file_that_is_too_short_never_replaces_a_good_one(identity, tmp_path, suffix):
    """Exiv2 says nothing of the last bytes that it can't write, as Pillow didn't."""
    source, target = tmp_path / 'in.jpg', tmp_path / f'out.{suffix}'
    Image.new('RGB', (8, 8), (9, 99, 9)).save(source, xmp=XMP)
    denoise_file(identity, source, target)
    size = target.stat().st_size

    for limit in (size // 4, size // 2, size - 100, size - 1):
        target.write_bytes(b'precious')
        with files_of_at_most(limit), pytest.raises(OSError, match='File too large'):
            denoise_file(identity, source, target, force=True)
        assert target.read_bytes() == b'precious'
        assert sorted(os.listdir(tmp_path)) == ['in.jpg', f'out.{suffix}']


@needs_limits
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path, capfd):
    source, target = tmp_path / 'in.png', tmp_path / 'out.png'
    Image.effect_noise((40, 40), 50).save(source)
    with files_of_at_most(1000), pytest.raises(SystemExit, match='1 of 1 files'):
        main([str(source), str(target)])
    assert f'{target}: [Errno' in capfd.readouterr().err


def test_a_target_that_appears_during_the_work_stays(tmp_path):
    source, target = tmp_path / 'in.png', tmp_path / 'out.png'
    Image.new('RGB', (8, 8)).save(source)

    class Slow(du.DnCNN):
        def forward(self, x):
            target.write_text('precious')
            return super().forward(x)

    with pytest.raises(FileExistsError, match='out.png exists already'):
        denoise_file(Slow(0, C=2, zero_last=True), source, target)
    assert target.read_text() == 'precious'
    assert sorted(os.listdir(tmp_path)) == ['in.png', 'out.png']


@pytest.mark.parametrize('size, suffix', [((16384, 1), 'webp'), ((1, 16384), 'webp'),
                                          ((65501, 1), 'jpg'), ((257, 1), 'ico')])
def test_sizes_that_a_format_lacks_are_said_before_the_work(tmp_path, size, suffix):
    Image.new('RGB', size).save(tmp_path / 'in.png')
    with pytest.raises(ValueError, match=f"can't hold .*in.png, {size[0]}x{size[1]} pixels"):
        denoise_file(None, tmp_path / 'in.png', tmp_path / f'out.{suffix}')  # no network
    assert os.listdir(tmp_path) == ['in.png']


def test_a_turned_photograph_is_upright_in_avif_too(identity, tmp_path):
    """Exiv2 doesn't write AVIF, libvips does."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (30, 20)).save(tmp_path / 'in.jpg', exif=exif)
    denoise_file(identity, tmp_path / 'in.jpg', tmp_path / 'out.avif')
    file = exiv2.ImageFactory.open(str(tmp_path / 'out.avif'))
    file.readMetadata()
    assert (file.pixelWidth(), file.pixelHeight()) == (20, 30)
    if 'Exif.Image.Orientation' in file.exifData():
        assert file.exifData()['Exif.Image.Orientation'].toString() == '1'
