"""The program that denoises photographs: its network, options, names, messages and memory."""
import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import denoising_utils as du
from programs import denoise, formats, picture
from programs.denoise import denoise_file
from programs.inference import denoise_image, for_level, half_precision, noise_level

HERE = Path(__file__).resolve().parents[1]
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    """A small photograph."""
    Image.fromarray(COLOURS).save(tmp_path / 'in.png')
    return tmp_path / 'in.png'


@pytest.fixture
def identity():
    """A network that changes nothing."""
    return du.DnCNN(0, C=2, zero_last=True)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return du.DUDnCNN(4, C=4).eval()


def pixels_of(file):
    with Image.open(file) as image:
        return np.array(image)


# --- the network and its input -------------------------------------------------------------------

def test_integers_are_denoised_as_the_floats_they_stand_for(net):
    floats = torch.rand(3, 40, 50) * 2 - 1
    for dtype in (torch.uint8, torch.uint16):
        image = du.to_integers(floats, dtype)
        result = denoise_image(net, image, tile=24)
        assert result.dtype == dtype
        expected = denoise_image(net, du.to_floats(image)).clamp(-1, 1)
        assert (du.to_floats(result) - expected).abs().max() < 1.01 / torch.iinfo(dtype).max


def test_grey_is_the_mean_of_three_equal_channels(net):
    image = torch.rand(1, 20, 30) * 2 - 1
    expected = denoise_image(net, image.expand(3, -1, -1)).mean(0, keepdim=True)
    torch.testing.assert_close(denoise_image(net, image), expected)


def test_strength_blends(net):
    image = torch.rand(3, 20, 30) * 2 - 1
    full = denoise_image(net, image)
    assert torch.equal(denoise_image(net, image, strength=0), image)
    quarter = denoise_image(net, image, strength=0.25)
    torch.testing.assert_close(quarter, 0.75 * image + 0.25 * full)
    twice = denoise_image(net, image, strength=2)
    torch.testing.assert_close(twice, image + 2 * (full - image))


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (3, 2)])
def test_images_of_a_few_pixels(tmp_path, size):
    Image.new('RGB', size, (10, 200, 30)).save(tmp_path / 'in.png')
    net = du.DUDnCNN(6, C=2, zero_last=True)
    report = denoise_file(net, tmp_path / 'in.png', tmp_path / 'out.png')
    assert (report.before, report.after) == pytest.approx((0, 0), abs=1e-6)
    with Image.open(tmp_path / 'out.png') as result:
        assert result.size == size
        assert result.getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize('make', du.NETWORKS.values())
def test_for_a_higher_level_the_input_is_scaled(make):
    torch.manual_seed(1)
    net, x = make(4, C=4).eval(), torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(for_level(net, 75)(x), net(x * 0.4) / 0.4)
        assert torch.equal(for_level(net, 15)(x), net(x))


@pytest.mark.parametrize('sigma', [2, 10, 40])
def test_the_estimated_level_is_that_of_white_noise(sigma):
    torch.manual_seed(0)
    smooth = torch.linspace(-0.3, 0.3, 200).expand(3, 300, 200)
    image = smooth + 2 * sigma / 255 * torch.randn(3, 300, 200)
    assert noise_level(image) == pytest.approx(sigma, rel=0.05)
    grey = du.to_integers(image, torch.uint16)[:1]
    assert noise_level(grey) == pytest.approx(sigma, rel=0.05)


def test_half_precision_is_that_of_the_device(monkeypatch):
    cpu = torch.device('cpu')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'amx_bf16': True}, raising=False)
    assert half_precision(cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx2': True})
    assert half_precision(cpu) == torch.float32
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert half_precision(cpu) == torch.float32
    assert half_precision(torch.device('cuda')) == torch.float16
    assert half_precision(torch.device('mps')) == torch.float32


# --- the result appears whole, or not at all -----------------------------------------------------

def test_nothing_is_overwritten_unless_forced(identity, source):
    target = source.with_name('out.png')
    target.write_text('precious')
    with pytest.raises(FileExistsError, match='out.png exists already'):
        denoise_file(identity, source, target)
    assert target.read_text() == 'precious'
    denoise_file(identity, source, target, force=True)
    assert np.array_equal(pixels_of(target), COLOURS)
    with pytest.raises(ValueError, match='is the file to read'):
        denoise_file(identity, source, source, force=True)


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space'), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(identity, source, monkeypatch, error):
    target = source.with_name('out.png')
    target.write_text('precious')

    def fail(image, file):
        file.write_bytes(b'torn')
        raise error

    monkeypatch.setattr(formats, 'save', fail)
    with pytest.raises(type(error)):
        denoise_file(identity, source, target, force=True)
    assert target.read_text() == 'precious'
    assert sorted(file.name for file in source.parent.iterdir()) == ['in.png', 'out.png']


@pytest.mark.parametrize('target, words', [
    ('out', 'must have the suffix'),
    ('out.mp4', 'must have the suffix'),
    ('nowhere/out.png', 'there is no folder'),
    ('out.jpg', ".jpg can't hold the transparency of"),
])
def test_a_bad_target_is_found_before_the_work(tmp_path, target, words):
    Image.fromarray(COLOURS).convert('RGBA').save(tmp_path / 'in.png')
    with pytest.raises(ValueError, match=words):
        denoise_file(None, tmp_path / 'in.png', tmp_path / target)  # no network: it fails later


# --- the command ---------------------------------------------------------------------------------

@pytest.fixture
def command(source, identity, monkeypatch):
    """The program, with a network that changes nothing, in the folder of the photograph."""
    monkeypatch.setattr(du, 'load_network', lambda name: (identity, []))
    monkeypatch.chdir(source.parent)
    return lambda words: denoise.main(words.split())


def test_one_file_and_many(command, capsys):
    command('in.png out.png')
    said = capsys.readouterr()
    assert said.out.startswith('out.png: noise level ')
    assert said.err == ''

    # One that can't be read doesn't keep the others from being denoised.
    Image.fromarray(COLOURS).convert('L').save('grey.jpg')
    Path('torn.png').write_bytes(b'\x89PNG')
    with pytest.raises(SystemExit, match='1 of 3 files could not be denoised'):
        command('in.png torn.png grey.jpg --to results/new --strength 0.5')
    assert sorted(os.listdir('results/new')) == ['grey.jpg', 'in.png']
    assert 'torn.png is not a readable image' in capsys.readouterr().err


def test_hardly_any_noise_is_said_and_left(command, capsys):
    """The network here finds none."""
    command('in.png out.png')
    assert 'out.png: hardly any noise was found, so nothing was changed' in capsys.readouterr().out
    command('in.png again.png --strength 1')
    assert 'hardly' not in capsys.readouterr().out


def test_what_is_left_out_is_said(command, capsys):
    Image.fromarray(COLOURS).save('in.tif', dpi=(300, 300))
    command('in.tif out.ppm')
    said = capsys.readouterr().out
    assert "out.ppm: .ppm can't hold all of in.tif, left out: " in said and 'resolution' in said


@pytest.mark.parametrize('words, message', [
    ('in.png', 'name two files'),
    ('in.png b.png c.png', 'name two files'),
    ('in.png folder/in.png --to r', 'same name'),
    ('in.png out.png --strength 2.5', '--strength must be from 0 to 2, got 2.5'),
    ('in.png out.png --sigma 30', 'dudncnn_blind and dudncnn_photo find the level themselves'),
    ('in.png out.png --net dncnn --sigma 0', 'above 0'),
    ('in.png out.png --net dncnn --sigma 10',
     'must be 30, on which these networks were trained, or more, got 10'),
])
def test_bad_options(command, words, message):
    with pytest.raises(ValueError, match=message):
        command(words)


def test_a_trained_network_for_a_higher_level(folder, tmp_path, monkeypatch):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((330, 340)).save(file)
    recipe = du.Recipe(net='dncnn', D=1, C=2, size=16, epochs=1)
    recipe.experiment(folder, tmp_path / 'checkpoints' / 'dncnn').run(1)
    monkeypatch.setattr(du, 'HERE', tmp_path)
    target = tmp_path / 'out.png'
    denoise.main([str(folder / 'test' / '0.png'), str(target), '--net', 'dncnn', '--sigma', '50'])
    assert pixels_of(target).shape == (340, 330, 3)


def test_the_exit_status_tells_of_failure(source, capsys):
    """0 for success, 1 with one line for what is wrong with a file, 2 for wrong words."""
    def start(*words):
        return subprocess.run([sys.executable, '-m', 'programs.denoise', *words], cwd=HERE,
                              text=True, capture_output=True)

    target = str(source.with_name('out.png'))
    done = start(str(source), target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{target}: noise level ')
    alone = start(str(source))
    assert alone.returncode == 1
    assert alone.stderr == ('ValueError: name two files, IN OUT, '
                            'or several and a folder: IN... --to FOLDER\n')
    with pytest.raises(SystemExit) as ended:
        denoise.main([])
    assert ended.value.code == 2
    assert 'the following arguments are required: FILE' in capsys.readouterr().err


# --- the picture in the README -------------------------------------------------------------------

def test_the_picture_has_three_panels(tmp_path, capsys, identity, monkeypatch):
    monkeypatch.setattr(du, 'load_network', lambda name: (identity, []))
    picture.main([str(tmp_path / 'new.png')])
    values = pixels_of(tmp_path / 'new.png').astype(float)
    assert values.shape == (260, 3 * 340 + 2 * 8, 3)
    noisy, denoised, clean = (values[:, left:left + 340] for left in (0, 348, 696))
    assert np.array_equal(noisy, denoised)
    assert (noisy - clean).std() == pytest.approx(30, rel=0.15)  # what is clipped is missing
    assert (values[:, 340:348] == 255).all() and (values[:, 688:696] == 255).all()
    assert 'new.png: 19.49 dB before, 19.49 dB after' in capsys.readouterr().out


def test_the_picture_replaces_nothing_unless_forced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('denoised.jpg').write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='denoised.jpg exists already'):
        picture.main(['denoised.jpg'])
    with pytest.raises(ValueError, match='denoised must have the suffix of an image format'):
        picture.main(['denoised'])
    assert Path('denoised.jpg').read_bytes() == b'mine'
    assert os.listdir() == ['denoised.jpg']


# --- memory --------------------------------------------------------------------------------------

def run(program, *words, **environment):
    """What a program prints that runs in a process of its own, without settings of malloc."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    return subprocess.run([sys.executable, '-c', program, *words], cwd=HERE, check=True, text=True,
                          capture_output=True, env=inherited | environment).stdout


MEMORY = """
import resource, sys
import denoising_utils as du
from programs.denoise import denoise_file

def peak():
    unit = 2 ** 20 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

du.keep_freed_memory()
net = du.DnCNN(0, C=2, zero_last=True)
denoise_file(net, sys.argv[1], sys.argv[2])  # so that all is loaded
before = peak()
denoise_file(net, sys.argv[3], sys.argv[2], force=True)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no module resource')
def test_24_megapixels_take_300_megabytes_beside_the_result(source):
    """Here for the files; programs/benchmark.py measures what the features of a tile take."""
    large, target = source.with_name('large.jpg'), source.with_name('out.jpg')
    Image.fromarray(COLOURS).resize((6000, 4000)).save(large)
    assert float(run(MEMORY, source, target, large)) < 300 + 72


FAULTS = """
import resource
import torch
import denoising_utils as du

du.keep_freed_memory()
for k in range(21):
    torch.ones(10_000_000)
    if k == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
def test_freed_memory_is_kept_without_settings_of_malloc():
    """20 times 40 MB that are given back and taken again cause a page fault each 4 KiB."""
    kept, given_back = int(run(FAULTS)), int(run(FAULTS, MALLOC_PERTURB_='0'))
    assert 5 * kept < given_back
