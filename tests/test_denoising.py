"""Data, networks, statistics, pictures and command line of denoising_utils, as a user sees them."""
import contextlib
import copy
import errno
import hashlib
import http.server
import io
import math
import shutil
import socket
import tarfile
import threading

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import denoising_utils as du
import nntools as nt

matplotlib.use('agg')


@pytest.fixture
def folder(tmp_path):
    """Six photographs to train and three to test, of both orientations; written in no order."""
    random = np.random.default_rng(0)
    for mode, count in (('train', 6), ('test', 3)):
        (tmp_path / mode).mkdir()
        for k in reversed(range(count)):
            size = (48, 64, 3) if k % 2 else (64, 48, 3)
            pixels = random.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / mode / f'{k}.png')
    (tmp_path / 'train' / 'Thumbs.db').write_text('not an image, and not to be read')
    return tmp_path


# --- data ----------------------------------------------------------------------------------------

@settings(max_examples=30)
@given(height=st.integers(1, 48), width=st.integers(1, 48), mode=st.sampled_from(['train', 'test']))
def test_image_size_is_respected_for_both_orientations(height, width, mode):
    data = samples(mode, (height, width))
    for k in range(len(data)):
        noisy, clean = data[k]
        assert noisy.shape == clean.shape == (3, height, width)
        assert -1 <= clean.min() and clean.max() <= 1


def samples(mode, image_size, **options):
    """A data set over images in memory of 48x64 and 64x48 pixels."""
    if not hasattr(samples, 'folder'):
        import tempfile
        from pathlib import Path
        samples.folder = tempfile.TemporaryDirectory()
        for sub in ('train', 'test'):
            (Path(samples.folder.name) / sub).mkdir()
            for k, size in enumerate(((48, 64), (64, 48))):
                ramp = np.add.outer(np.arange(size[0]), 3 * np.arange(size[1])) % 256
                Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)).save(
                    Path(samples.folder.name) / sub / f'{k}.png')
    return du.NoisyBSDSDataset(samples.folder.name, mode, image_size, **options)


def test_crops_come_from_everywhere_in_the_photograph(folder):
    """Corners are drawn for the crop that is taken: the first and last row and column are reached."""
    rows, columns = np.mgrid[:64, :48].astype(np.uint8)
    Image.fromarray(np.stack([rows, columns, 0 * rows], 2)).save(folder / 'train' / '0.png')
    data = du.NoisyBSDSDataset(folder, 'train', (40, 40), sigma=0, subset=[0])
    corners = ((data[0][1][:2, 0, 0] + 1) * 127.5 for _ in range(600))
    tops, lefts = zip(*(corner.round().int().tolist() for corner in corners))
    assert set(tops) == set(range(64 - 40 + 1))
    assert set(lefts) == set(range(48 - 40 + 1))


def test_a_crop_as_large_as_the_photograph(folder):
    data = du.NoisyBSDSDataset(folder, 'test', (64, 48), sigma=0, subset=[0, 2])
    assert torch.equal(data[0][1], du.read_photograph(folder / 'test' / '0.png') / 127.5 - 1)


def test_noise_has_the_standard_deviation_asked_for(folder):
    data = du.NoisyBSDSDataset(folder, 'test', (48, 48), sigma=50)
    noise = torch.stack([noisy - clean for noisy, clean in (data[k] for k in range(3))])
    assert noise.std().item() == pytest.approx(2 * 50 / 255, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_test_items_are_fixed_and_training_items_are_not(folder):
    test, train = (du.NoisyBSDSDataset(folder, mode, (32, 32)) for mode in ('test', 'train'))
    assert all(torch.equal(a, b) for a, b in zip(test[1], test[1]))
    assert not torch.equal(test[0][0] - test[0][1], test[1][0] - test[1][1])
    assert not torch.equal(train[1][0], train[1][0])
    assert not torch.equal(test[1][0], du.NoisyBSDSDataset(folder, 'test', (32, 32), seed=1)[1][0])
    torch.manual_seed(5)
    first = train[1]
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, train[1]))


def test_evaluation_is_the_same_to_the_last_bit_on_any_number_of_workers(folder, tmp_path):
    net = du.DnCNN(1, C=4)
    summaries = []
    for workers in (0, 1, 2):
        data = du.NoisyBSDSDataset(folder, 'test', (32, 32))
        exp = nt.Experiment(net, data, data, torch.optim.Adam(net.parameters()), du.DenoisingStatsManager(),
                            output_dir=tmp_path / f'w{workers}', batch_size=2, num_workers=workers)
        summaries += [exp.evaluate(), exp.evaluate()]
    assert all(summary == summaries[0] for summary in summaries)


def test_augmentation_gives_all_eight_flips_and_turns(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (48, 48), sigma=0, augment=True, subset=[0])
    seen = {data[0][1].numpy().tobytes() for _ in range(1500)}
    assert len(seen) == 8 * 17  # every row that the crop can start at


@pytest.mark.parametrize('mode, seed', [('train', None), ('train', 3), ('test', None)])
def test_levels_of_a_range(folder, mode, seed):
    """Each sample has a level of its own, uniform between the two; where it is seeded, always the same."""
    data = du.NoisyBSDSDataset(folder, mode, (48, 48), sigma=(10, 50), seed=seed, crops=80)
    torch.manual_seed(0)
    noises = [noisy - clean for noisy, clean in data]
    levels = np.array([noise.std().item() * 127.5 for noise in noises])
    assert 9 < levels.min() < 13 and 47 < levels.max() < 53 and abs(levels.mean() - 30) < 3
    again = data[7][0] - data[7][1]
    assert torch.equal(again, noises[7]) == (mode == 'test' or seed is not None)
    assert 'sigma=(10, 50)' in repr(data)


@pytest.mark.parametrize('clip', [0, 0.5, True])
def test_a_share_of_the_samples_is_as_8_bit_files_have_them(folder, clip):
    data = du.NoisyBSDSDataset(folder, 'test', (48, 48), sigma=50, crops=60, clip=clip)
    values = [(noisy + 1) * 127.5 for noisy, _ in data]
    clipped = [(v.min() >= 0 and v.max() <= 255 and (v - v.round()).abs().max() < 1e-3).item() for v in values]
    assert np.mean(clipped) == pytest.approx(float(clip), abs=0.1 * (clip == 0.5))
    if clip is True:
        noisy, clean = data[4]
        unclipped = du.NoisyBSDSDataset(folder, 'test', (48, 48), sigma=50, crops=60)[4][0]
        torch.testing.assert_close(noisy, unclipped.clamp(-1, 1), atol=1.01 / 255, rtol=0)


def test_jitter_changes_size_and_colours_of_half_of_the_samples(folder):
    colours = np.zeros((64, 48, 3), np.uint8) + np.array([200, 120, 40], np.uint8)
    colours[::2] //= 2  # stripes, which a reduction in size blurs
    Image.fromarray(colours).save(folder / 'train' / '0.png')
    data = du.NoisyBSDSDataset(folder, 'train', (24, 16), sigma=20, seed=0, subset=[0], crops=400, jitter=True)
    pairs = [data[k] for k in range(400)]
    unchanged = [torch.equal(clean.unique(), torch.from_numpy(colours).unique() / 127.5 - 1) for _, clean in pairs]
    assert np.mean(unchanged) == pytest.approx(0.5, abs=0.08)
    changed = [pair for pair, same in zip(pairs, unchanged) if not same]
    grey = [(noisy, clean) for noisy, clean in changed if torch.allclose(clean[0], clean[1], atol=1e-4)
            and torch.allclose(clean[0], clean[2], atol=1e-4)]
    assert 0.15 < len(grey) / len(changed) < 0.35
    assert all(torch.allclose(noisy[0], noisy[2], atol=1e-4) for noisy, _ in grey)
    assert all(clean.shape == (3, 24, 16) and clean.abs().max() <= 1 for _, clean in changed)
    assert {int(clean.mean((1, 2)).argmax()) for _, clean in changed} == {0, 1, 2}
    stripes = [clean.std(1).mean() / clean.std() for _, clean in changed]
    assert min(stripes) < 0.5 * max(stripes)
    assert 'jitter=True' in repr(data)


def test_cache_off_gives_the_same_items(folder):
    on, off = (du.NoisyBSDSDataset(folder, 'test', (32, 32), cache=cache) for cache in (True, False))
    assert off.images is None
    assert all(torch.equal(on[k][0], off[k][0]) for k in range(3))


def test_repr_tells_what_identifies_the_data_but_no_path(folder):
    text = repr(du.NoisyBSDSDataset(folder, 'train', (32, 40), 25, subset=range(4), crops=3, augment=True))
    assert str(folder) not in text
    for part in ('train', '(32, 40)', 'sigma=25', 'photographs=4', 'range(0, 4)', 'crops=3', 'augment'):
        assert part in text


def test_files_are_sorted_and_crops_repeat_them(folder):
    data = du.NoisyBSDSDataset(folder, 'train', (32, 32), crops=2)
    assert [file.name for file in data.files] == [f'{k}.png' for k in range(6)]
    assert len(data) == 12 and len(list(data)) == 12


@pytest.mark.parametrize('options, error, words', [
    (dict(mode='validation'), ValueError, "'train' or 'test', got 'validation'"),
    (dict(sigma=-1), ValueError, 'sigma must be 0 or more, or a pair (lowest, highest), got -1'),
    (dict(sigma=(30, 10)), ValueError, 'got (30, 10)'),
    (dict(sigma=(0, 10, 20)), ValueError, 'got (0, 10, 20)'),
    (dict(clip=1.5), ValueError, 'clip must be a share of the samples, 0 to 1, got 1.5'),
    (dict(sigma=math.nan), ValueError, 'sigma'),
    (dict(image_size=(65, 32)), ValueError, '1.png has 48x64 pixels, less than image_size 65x32'),
    (dict(image_size=(0, 5)), ValueError, 'image_size must be (height, width)'),
    (dict(image_size=(5.5, 5)), ValueError, 'image_size'),
    (dict(crops=0), ValueError, 'crops must be'),
    (dict(subset=[0, 5]), ValueError, 'subset must be positions from 0 to 4'),
    (dict(subset=[]), ValueError, 'subset must be positions from 0 to 4 '),
])
def test_bad_arguments_of_the_data_set(folder, options, error, words):
    (folder / 'train' / '0.png').unlink()
    with pytest.raises(error, match='(?s)' + __import__('re').escape(words)):
        du.NoisyBSDSDataset(folder, **{'image_size': (32, 32), **options})


def test_bad_folders_and_files(folder):
    with pytest.raises(FileNotFoundError, match='there is no folder .*nowhere'):
        du.NoisyBSDSDataset(folder / 'nowhere')
    (folder / 'train' / 'torn.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.raises(ValueError, match='torn.jpg is not a readable image'):
        du.NoisyBSDSDataset(folder, 'train', (32, 32))
    shutil.rmtree(folder / 'test')
    (folder / 'test').mkdir()
    with pytest.raises(FileNotFoundError, match='no image in'):
        du.NoisyBSDSDataset(folder, 'test', (32, 32))
    with pytest.raises(IndexError):
        samples('test', (8, 8))[2]


def test_photographs_of_16_bits_and_a_subset_that_is_a_generator(folder):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(folder / 'train' / '0.png')
    data = du.NoisyBSDSDataset(folder, 'train', 64, 0, subset=(k for k in [0]))
    assert len(data) == 1 and (data[0][1] - torch.from_numpy(ramp / 65535 * 2 - 1)).abs().max() < 1 / 127


# --- where the photographs are -------------------------------------------------------------------

def test_argument_before_environment_before_checkout(folder, tmp_path, monkeypatch):
    other = tmp_path / 'other' / 'images'
    shutil.copytree(folder / 'train', other / 'train')
    shutil.copytree(folder / 'test', other / 'test')
    monkeypatch.setenv('BSDS300', str(tmp_path / 'other'))
    assert du.find_photographs() == other
    assert du.find_photographs(folder) == folder
    monkeypatch.setenv('BSDS300', str(tmp_path / 'absent'))
    with pytest.raises(FileNotFoundError, match='environment variable BSDS300 is .*absent'):
        du.find_photographs()
    monkeypatch.delenv('BSDS300')
    monkeypatch.setattr(du, 'HERE', tmp_path)
    shutil.copytree(other, tmp_path / 'BSDS300' / 'images')
    assert du.find_photographs() == tmp_path / 'BSDS300' / 'images'


def archive_of(folder, *others):
    """A BSDS300-images.tgz of a folder, as bytes; before the photographs, members ``others``: (name, type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        for name, kind in others:
            member = tarfile.TarInfo(name)
            if kind == tarfile.REGTYPE:
                member.size = len(b'planted')
            else:
                member.type, member.linkname = kind, '../../..'
            archive.addfile(member, io.BytesIO(b'planted'))
        archive.add(folder / 'train', 'BSDS300/images/train')
        archive.add(folder / 'test', 'BSDS300/images/test')
    return buffer.getvalue()


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    """A server on 127.0.0.1 in Berkeley's place, and the manifest of ``folder`` in that of BSDS300.

    A function of the bytes to serve (None: nothing listens). With ``promised``, that many are announced.
    """
    (folder / 'test' / 'large.png').write_bytes(np.random.default_rng(0).bytes(300_000))  # in several blocks of gzip
    names = sorted(f'{f.parent.name}/{f.name}' for f in folder.glob('*/*.png'))
    manifest = tmp_path / 'manifest'
    manifest.write_text(''.join(
        f'{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n' for name in names))
    monkeypatch.setattr(du, 'MANIFEST', manifest)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    answer = {}

    class Berkeley(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/moved':
                self.send_response(302)
                self.send_header('Location', '/BSDS300-images.tgz')
                self.end_headers()
            elif self.path == '/no-http':
                self.wfile.write(b'220 mail.example.org ready\r\n')
            else:
                self.send_response(200)
                self.send_header('Content-Length', answer['promised'])
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the first of two requests is only looked at
                    self.wfile.write(answer['content'])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Berkeley) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()

        def serve(content, promised=None, path='/BSDS300-images.tgz'):
            answer.update(content=content, promised=promised or len(content or b''))
            port = server.server_port if content is not None else unused_port()
            monkeypatch.setattr(du, 'BSDS_URL', f'http://127.0.0.1:{port}{path}')
        yield serve
        server.shutdown()


def unused_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@pytest.mark.parametrize('path', ['/BSDS300-images.tgz', '/moved'])
def test_download(folder, served, tmp_path, path):
    served(archive_of(folder), path=path)
    images = du.fetch(tmp_path / 'home')
    assert images == tmp_path / 'home' / 'images' and list((tmp_path / 'home').iterdir()) == [images]
    assert {str(file.relative_to(images)): file.read_bytes() for file in images.glob('*/*')} == {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.glob('*/*.png')}
    served(None)  # once complete, it isn't downloaded again
    assert du.fetch(tmp_path / 'home') == images


@pytest.mark.parametrize('damage, error, problem', [
    (lambda serve, good: serve(None), ConnectionError, 'could not be downloaded'),
    (lambda serve, good: serve(good, path='/no-http'), ConnectionError, 'could not be downloaded'),
    (lambda serve, good: serve(b'a page that says no'), OSError, 'is damaged'),
    (lambda serve, good: serve(b''), OSError, 'is damaged'),
    (lambda serve, good: serve(good[:len(good) // 2]), OSError, 'is damaged'),
    (lambda serve, good: serve(good[:len(good) // 2] + b'\xff' * 100_000), OSError, 'is damaged'),
    (lambda serve, good: serve(good[:len(good) // 2], promised=len(good)), OSError, 'is damaged'),
], ids=['nothing listens', 'no HTTP', 'a page', 'empty', 'half', 'bad half', 'cut off'])
def test_a_download_that_fails_leaves_nothing_and_can_be_repeated(folder, served, tmp_path, damage, error, problem):
    good, home = archive_of(folder), tmp_path / 'home'
    damage(served, good)
    with pytest.raises(error, match=f'(?s){problem} .*Try again'):
        du.fetch(home)
    assert list(home.iterdir()) == []
    served(good)
    assert len(list(du.fetch(home).glob('*/*.png'))) == 10


def test_a_download_with_another_photograph_is_refused(folder, served, tmp_path):
    (folder / 'train' / '3.png').write_bytes(b'other')
    served(archive_of(folder))
    with pytest.raises(OSError, match='1 of the .* missing or damaged.*train/3.png. Try again'):
        du.fetch(tmp_path / 'home')
    assert list((tmp_path / 'home').iterdir()) == []


def test_nothing_but_the_photographs_is_taken_out_of_the_archive(folder, served, tmp_path):
    outside = tmp_path / 'outside.png'
    served(archive_of(
        folder, ('../outside.png', tarfile.REGTYPE), ('../../outside.png', tarfile.REGTYPE),
        (str(outside), tarfile.REGTYPE), ('BSDS300/images/../../../outside.png', tarfile.REGTYPE),
        ('BSDS300/images/more.png', tarfile.REGTYPE), ('BSDS300/images/train/0.png', tarfile.SYMTYPE),
        ('BSDS300/images/train', tarfile.SYMTYPE), ('BSDS300/images/test/pipe', tarfile.FIFOTYPE)))
    before = set(tmp_path.rglob('*'))
    images = du.fetch(tmp_path / 'home')
    assert {str(file.relative_to(images)) for file in images.glob('*/*')} == {
        str(file.relative_to(folder)) for file in folder.glob('*/*.png')}
    assert not any(file.is_symlink() for file in images.rglob('*'))
    assert not outside.exists() and {
        file for file in set(tmp_path.rglob('*')) - before if images.parent not in [file, *file.parents]} == set()


def test_a_damaged_download_is_an_error_even_where_photographs_could_stand_in(served, tmp_path, monkeypatch):
    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path)
    served(b'please log in to this hotspot')
    with pytest.raises(OSError, match='is damaged'):
        du.find_photographs()


def test_photographs_of_the_manifest(photographs):
    is_bsds300, text = du.describe_photographs(photographs)
    assert is_bsds300 and '200 to train and 100 to test' in text


def test_without_network_sample_photographs_stand_in_and_say_so(tmp_path, served, monkeypatch):
    served(None)
    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path / 'empty')
    monkeypatch.setattr(du.tempfile, 'gettempdir', lambda: str(tmp_path))
    folder = du.find_photographs()
    is_bsds300, text = du.describe_photographs(folder)
    assert not is_bsds300 and text.startswith('NOT BSDS300')
    assert len(du.NoisyBSDSDataset(folder, 'test', (320, 320))) == 6
    assert len(du.NoisyBSDSDataset(folder, 'train', (180, 180))) == 12
    assert du.find_photographs() == folder
    next((folder / 'test').iterdir()).unlink()  # by a cleaner of temporary files
    assert du.find_photographs() == folder and len(du.NoisyBSDSDataset(folder, 'test', (320, 320))) == 6


@pytest.mark.parametrize('problem', ['no list of checksums', 'read-only'])
def test_where_bsds300_can_not_be_checked_or_kept_samples_stand_in(tmp_path, served, monkeypatch, problem):
    """As with the two .py files alone, or in a folder of the system."""
    def refuse(*args, **options):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path / 'empty')
    monkeypatch.setattr(du.tempfile, 'gettempdir', lambda: str(tmp_path))
    if problem == 'read-only':
        monkeypatch.setattr(du, 'fetch', refuse)
        assert du.describe_photographs(du.find_photographs())[1].startswith('NOT BSDS300')
    else:
        monkeypatch.setattr(du, 'MANIFEST', tmp_path / 'nowhere')
        with pytest.raises(FileNotFoundError, match='without its list of checksums'):
            du.fetch(tmp_path / 'new')
        assert not (tmp_path / 'new').exists()
        assert du.describe_photographs(du.find_photographs())[1].startswith('not known to be BSDS300, as ')


# --- networks ------------------------------------------------------------------------------------

NETS = [du.DnCNN, du.UDnCNN, du.DUDnCNN]


@pytest.mark.parametrize('D', [0, 1, 2, 6, 14])
def test_dncnn_parameters_and_receptive_field(D):
    net = du.DnCNN(D)
    assert sum(conv.weight.numel() for conv in net.conv) == 36864 * D + 3456
    assert du.count_parameters(net) == 37056 * D + 3523
    assert du.measure_receptive_field(net) == net.receptive_field == 2 * D + 5


@pytest.mark.parametrize('D', [2, 4, 6, 8])
def test_udncnn_and_dudncnn_parameters_and_receptive_fields(D):
    assert du.count_parameters(du.UDnCNN(D)) == du.count_parameters(du.DUDnCNN(D)) == 37056 * D + 3523
    assert du.measure_receptive_field(du.DUDnCNN(D)) == du.DUDnCNN(D).receptive_field == 2 ** (D // 2 + 2) + 1
    if D <= 6:  # the measurement takes long for 8
        assert du.measure_receptive_field(du.UDnCNN(D)) == du.UDnCNN(D).receptive_field == 9 * 2 ** (D // 2 - 1)


def test_dilations():
    assert [conv.dilation[0] for conv in du.DUDnCNN(6).conv] == [1, 1, 2, 4, 4, 2, 1, 1]


@pytest.mark.parametrize('arm', du.ARMS)
def test_networks_of_the_ablation_differ_in_what_they_say_only(arm):
    """Parameters by name and size as in DnCNN of the same depth; the receptive field as measured."""
    network, D = du.ARMS[arm]
    net, plain = du.make_network(network, D, C=4), du.DnCNN(D, C=4)
    assert ({name: p.shape for name, p in net.state_dict().items()}
            == {name: p.shape for name, p in plain.state_dict().items()})
    assert du.measure_receptive_field(net) == net.receptive_field
    assert net.receptive_field == {'dncnn': 17, 'skips': 17, 'dncnn14': 33, 'dilation': 33, 'dudncnn': 33,
                                   'pooling': 36, 'udncnn': 36}[arm]


def test_skips_and_dilation_by_hand():
    """D = 2 has no room for dilation: without skips it is DnCNN, with them only the last sum is new."""
    torch.manual_seed(0)
    plain, x = du.DnCNN(2, C=3).eval(), torch.randn(1, 3, 9, 8)
    first = torch.relu(plain.conv[0](x))
    with_skip = x + plain.conv[-1]((plain.features(x) + first) / 2 ** 0.5)
    for make, expected in ((du.DilationOnly, plain(x)), (du.PoolingOnly, plain(x)), (du.SkipsOnly, with_skip)):
        net = make(2, C=3).eval()
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(x), expected)


def test_receptive_field_of_udncnn_depends_on_the_place_in_the_pooling_cell():
    for offset, (first, last) in (((0, 0), (-16, 19)), ((3, 0), (-19, 16))):
        seen = du.receptive_field_map(du.UDnCNN(6), offset)
        rows = seen.any(1).nonzero() - len(seen) // 2 - offset[0]
        assert (rows.min(), rows.max()) == (first, last)


@pytest.mark.parametrize('make', NETS)
def test_names_in_the_state_dict(make):
    names = set(make(6).state_dict())
    assert {f'conv.{k}.{kind}' for k in range(8) for kind in ('weight', 'bias')} <= names
    assert {name.rsplit('.', 1)[0] for name in names if name.startswith('bn')} == {f'bn.{k}' for k in range(6)}


@settings(max_examples=25)
@given(make=st.sampled_from(NETS), half=st.integers(1, 4), channels=st.integers(1, 4), n=st.integers(1, 2),
       height=st.integers(8, 40), width=st.integers(8, 40))
def test_any_size_and_any_number_of_channels(make, half, channels, n, height, width):
    net = make(2 * half, C=2, channels=channels).eval()
    x = torch.randn(n, channels, height, width)
    assert net(x).shape == x.shape


@pytest.mark.parametrize('make', NETS)
def test_every_convolution_takes_part(make):
    """Each weight changes the output: a lost return value of a block would leave most without effect."""
    torch.manual_seed(0)
    net = make(6, C=4)
    x = torch.randn(1, 3, 32, 32)
    before = net(x)
    for conv in net.conv:
        with torch.no_grad():
            conv.weight.mul_(1.1).add_(0.01)
        after = net(x)
        assert not torch.allclose(before, after, atol=1e-5)
        before = after


def test_udncnn_by_hand():
    """The forward pass of D = 4 written out, from the assignment's text."""
    torch.manual_seed(1)
    net = du.UDnCNN(4, C=3).eval()
    relu, pool, unpool = torch.relu, torch.nn.functional.max_pool2d, torch.nn.functional.max_unpool2d
    x = torch.randn(1, 3, 13, 10)
    first = relu(net.conv[0](x))
    h = relu(net.bn[0](net.conv[1](first)))
    pooled, where = pool(h, 2, return_indices=True)
    h = relu(net.bn[1](net.conv[2](pooled)))
    h = relu(net.bn[2](net.conv[3](h)))
    h = unpool((h + pooled) / 2 ** 0.5, where, 2, output_size=(13, 10))
    h = relu(net.bn[3](net.conv[4](h)))
    expected = x + net.conv[5]((h + first) / 2 ** 0.5)
    torch.testing.assert_close(net(x), expected)


def test_dudncnn_by_hand():
    """The same for the dilated one: without poolings and unpoolings."""
    torch.manual_seed(1)
    net = du.DUDnCNN(4, C=3).eval()

    def conv(k, h, dilation):
        return torch.conv2d(h, net.conv[k].weight, net.conv[k].bias, padding=dilation, dilation=dilation)

    x = torch.randn(1, 3, 13, 10)
    first = torch.relu(conv(0, x, 1))
    fine = torch.relu(net.bn[0](conv(1, first, 1)))
    h = torch.relu(net.bn[1](conv(2, fine, 2)))
    h = torch.relu(net.bn[2](conv(3, h, 2)))
    h = torch.relu(net.bn[3](conv(4, (h + fine) / 2 ** 0.5, 1)))
    torch.testing.assert_close(net(x), x + conv(5, (h + first) / 2 ** 0.5, 1))


def test_initialisation_options():
    torch.manual_seed(0)
    he, default = du.DnCNN(2, C=64), du.DnCNN(2, C=64, he_init=False)
    assert he.conv[1].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert default.conv[1].weight.std().item() == pytest.approx(math.sqrt(1 / (3 * 9 * 64)), rel=0.02)
    assert he.bn[0].eps == 1e-5 and he.bn[0].weight[0] == 1
    course = du.DnCNN(2, C=16, batch_norm='course')
    assert course.bn[0].eps == 16 and course.bn[0].weight[0] == 5
    assert du.DnCNN(2, C=16, batch_norm='course', he_init=False).bn[0].weight[0] == 1
    assert not any('bn' in name for name in du.DnCNN(2, batch_norm='none').state_dict())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(du.DUDnCNN(6, zero_last=True)(x), x)


@pytest.mark.parametrize('make', NETS)
def test_a_folded_batch_norm_changes_nothing(make):
    torch.manual_seed(0)
    net, x = make(4, C=4), torch.randn(2, 3, 16, 12)
    net(10 * x)  # statistics
    folded = du.fold_batch_norm(net)
    torch.testing.assert_close(folded(x), net.eval()(x))
    assert not any('bn' in name for name in folded.state_dict())


@pytest.mark.parametrize('make, words', [
    (lambda: du.DnCNN(-1), 'D must be a whole number, 0 or more, got -1'),
    (lambda: du.DnCNN(2.5), 'got 2.5'),
    (lambda: du.DnCNN(2, C=0), 'C must be'),
    (lambda: du.DnCNN(2, batch_norm='batch'), "'usual', 'course' or 'none', got 'batch'"),
    (lambda: du.UDnCNN(0), 'D must be an even number, 2 or more, got 0'),
    (lambda: du.UDnCNN(3), 'got 3'),
    (lambda: du.DUDnCNN(5), 'got 5'),
    (lambda: du.UDnCNN(6)(torch.zeros(1, 3, 3, 30)), 'at least 4 pixels for D = 6'),
    (lambda: du.make_network('unet'), "dncnn, udncnn, dudncnn, skips, dilation, pooling, got 'unet'"),
])
def test_bad_networks(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- statistics and pictures ---------------------------------------------------------------------

@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_psnr_is_the_mean_over_images_whatever_the_batches(sizes):
    random = torch.Generator().manual_seed(sum(sizes))
    d = torch.rand(sum(sizes), 3, 8, 8, generator=random) * 2 - 1
    y = d + torch.rand(len(d), 1, 1, 1, generator=random) * torch.randn(d.shape, generator=random)
    stats = du.DenoisingStatsManager()
    stats.init()
    for y_batch, d_batch in zip(y.split(sizes), d.split(sizes)):
        stats.accumulate((y_batch - d_batch).square().mean().item(), y_batch, y_batch, d_batch)
    by_hand = [10 * math.log10(4 / (a - b).double().square().mean().item()) for a, b in zip(y, d)]
    summary = stats.summarize()
    assert summary['PSNR'] == pytest.approx(np.mean(by_hand))
    assert summary['loss'] == pytest.approx((y - d).square().mean().item(), rel=1e-5)


def test_myimshow_maps_and_clips():
    import matplotlib.pyplot as plt
    _, ax = plt.subplots()
    image = torch.tensor([[-1.0, 0.0], [1.0, 3.0]]).expand(3, 2, 2)
    shown = du.myimshow(image, ax=ax).get_array()
    assert shown.shape == (2, 2, 3)
    assert shown[..., 0].tolist() == [[0, 0.5], [1, 1]]
    assert du.myimshow(image[:1]).get_array().shape == (2, 2)
    assert du.myimshow(torch.full((1, 2, 2), 0.5)).get_clim() == (0, 1)  # grey is not stretched to black and white
    plt.close('all')


def test_plot_draws_images_and_both_curves(folder, tmp_path):
    import matplotlib.pyplot as plt
    train, test = (du.NoisyBSDSDataset(folder, mode, (16, 16)) for mode in ('train', 'test'))
    net = du.DnCNN(0, C=2)
    exp = nt.Experiment(net, train, test, torch.optim.Adam(net.parameters()), du.DenoisingStatsManager(),
                        output_dir=tmp_path / 'exp', batch_size=2, perform_validation_during_training=True)
    fig, axes = plt.subplots(2, 2)
    calls = []
    exp.run(3, plot=lambda exp: (du.plot(exp, fig, axes, test[0][0], visu_rate=1, clean=test[0][1]),
                                 calls.append(len(axes[1][0].lines))))
    assert calls == [0, 2, 2, 2]
    assert len(axes[1][1].lines[0].get_xdata()) == 3
    assert axes[0][0].get_title().endswith('dB') and len(axes[0][1].images) == 1
    assert [text.get_text() for text in axes[1][1].get_legend().get_texts()] == ['training', 'validation']
    plt.close('all')


# --- whole photographs ---------------------------------------------------------------------------

@settings(max_examples=15)
@given(make=st.sampled_from(NETS), height=st.integers(20, 90), width=st.integers(20, 90), tile=st.integers(1, 60))
def test_tiles_leave_no_trace(make, height, width, tile):
    torch.manual_seed(height)
    net, image = make(4, C=3).eval(), torch.rand(3, height, width) * 2 - 1
    with torch.no_grad():
        whole = net(image[None])[0]
    torch.testing.assert_close(du.denoise_image(net, image, tile), whole, atol=2e-5, rtol=0)


def test_memory_is_bounded():
    """Features of the whole image would take C times its size; tiles take no more than the result."""
    net, image = du.DnCNN(1, C=16), torch.zeros(3, 1500, 2000)
    before = peak_memory()
    du.denoise_image(net, image, tile=128)
    assert peak_memory() - before < 4 * image.nbytes


def peak_memory():
    """The process's peak resident memory in bytes."""
    resource = pytest.importorskip('resource')
    import sys
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


@pytest.mark.parametrize('make', NETS)
def test_self_ensemble_treats_flips_and_turns_alike(make):
    torch.manual_seed(0)
    denoise = du.self_ensemble(make(2, C=4).eval())
    x = torch.randn(1, 3, 12, 16)
    with torch.no_grad():
        y = denoise(x)
        assert y.shape == x.shape
        assert torch.allclose(denoise(x.flip(-1)), y.flip(-1), atol=1e-5)
        assert torch.allclose(denoise(x.rot90(1, (-2, -1))), y.rot90(1, (-2, -1)), atol=1e-5)


# --- evaluation and command line -----------------------------------------------------------------

def test_benchmark_pairs_are_the_centre_with_one_noise_for_all(folder):
    pairs = list(du.benchmark_pairs(folder, sigma=30, size=32))
    random = torch.Generator().manual_seed(123)
    for k, (noisy, clean) in enumerate(pairs):
        photograph = du.read_photograph(folder / 'test' / f'{k}.png')
        top, left = (photograph.shape[1] - 32) // 2, (photograph.shape[2] - 32) // 2
        expected = photograph[None, :, top:top + 32, left:left + 32] / 127.5 - 1
        assert torch.equal(clean, expected)
        torch.testing.assert_close(noisy - clean, 60 / 255 * torch.randn(clean.shape, generator=random),
                                   atol=1e-6, rtol=0)
    scores = du.benchmark(lambda noisy: noisy, pairs)
    assert scores['psnr'].mean() == pytest.approx(18.59, abs=0.2)


def test_a_network_is_scored_in_evaluation_mode(folder):
    """As after a training, which leaves it in training mode: batch norm would go by the one image."""
    net, pairs = du.DnCNN(2, C=4), list(du.benchmark_pairs(folder, size=32))
    for bn in net.bn:
        bn.running_var.fill_(3)
    expected, state = du.benchmark(net.eval().__call__, pairs)['psnr'], copy.deepcopy(net.state_dict())
    assert (du.benchmark(net.train(), pairs)['psnr'] == expected).all() and net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_train_command_twice_gives_the_same_weights_and_resumes(folder, tmp_path, capsys):
    words = ['train', '--net', 'dudncnn', '--data', str(folder), '--D', '2', '--C', '4', '--size', '16',
             '--crops', '2', '--epochs', '4']
    (folder / 'small').mkdir()
    for mode in ('train', 'test'):  # validation crops have 96 pixels
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((200, 190)).save(file)
    du.main([*words, '--out', str(tmp_path / 'a')])
    interrupted = du.make_experiment(du.parse([*words, '--out', str(tmp_path / 'b')]))
    interrupted.run(2)
    du.main([*words, '--out', str(tmp_path / 'b')])
    a, b = (nt.load_checkpoint(str(tmp_path / name / 'checkpoint.pth.tar'), 'cpu') for name in 'ab')
    assert a['History'] == b['History'] and len(a['History']) == 4
    assert all(torch.equal(a['Net'][name], b['Net'][name]) for name in a['Net'])
    assert a['Optimizer']['param_groups'][0]['lr'] < 3e-3 / 2  # the schedule went down
    assert 'Epoch 4/4' in capsys.readouterr().out
    du.main([*words, '--out', str(tmp_path / 'b'), '--sigma', '30'])  # which is the default
    with pytest.raises(ValueError, match="Scheduler: lr_lambdas stored .*'epochs': 4.*, given .*'epochs': 6"):
        du.main([*words, '--out', str(tmp_path / 'b'), '--epochs', '6'])
    du.main([*words, '--out', str(tmp_path / 'b'), '--epochs', '6', '--allow', 'Scheduler'])
    assert 'Epoch 6/6' in capsys.readouterr().out
    for options, problem in ((['--epochs', '0'], '--epochs must be 1 or more, got 0'),
                             (['--hold-out'], '--hold-out needs the 200 training photographs of BSDS300, and .* has 6')):
        with pytest.raises(ValueError, match=problem):
            du.main([*words, '--out', str(tmp_path / 'c'), *options])


def test_a_checkpoint_of_another_network_is_not_taken_for_one_with_the_same_layers(folder, tmp_path):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((200, 190)).save(file)
    words = ['train', '--data', str(folder), '--D', '2', '--C', '4', '--size', '16', '--epochs', '1', '--out']
    du.main([*words, str(tmp_path / 'dncnn'), '--batch-norm', 'course'])
    assert du.load_network('dncnn', tmp_path / 'dncnn')[0].bn[0].eps == 4
    with pytest.raises(RuntimeError, match='holds a DnCNN, not a DUDnCNN'):
        du.load_network('dudncnn', tmp_path / 'dncnn')
    with pytest.raises(ValueError, match='--start .*dncnn holds a DnCNN: name it with --net'):
        du.main([*words, str(tmp_path / 'next'), '--net', 'udncnn', '--start', str(tmp_path / 'dncnn')])
    exp = du.make_experiment(du.parse([*words, str(tmp_path / 'next'), '--start', str(tmp_path / 'dncnn')]))
    assert exp.net.bn[0].eps == 4 and torch.equal(exp.net.conv[0].weight, du.load_network('dncnn', tmp_path / 'dncnn')[0].conv[0].weight)


def test_evaluate_and_denoise_commands(folder, tmp_path, capsys, monkeypatch):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((330, 340)).save(file)
    exp = du.make_experiment(du.parse(['train', '--data', str(folder), '--D', '1', '--C', '2', '--size', '16',
                                       '--out', str(tmp_path / 'checkpoints' / 'dncnn')]))
    exp.run(1)
    shutil.copytree(tmp_path / 'checkpoints' / 'dncnn', tmp_path / 'checkpoints' / 'dncnn_seed1')
    du.main(['evaluate', 'dncnn', '--data', str(folder), '--checkpoints', str(tmp_path / 'checkpoints'),
             '--scores', str(tmp_path / 'scores.csv')])
    out = capsys.readouterr().out
    scores = du.read_scores(tmp_path / 'scores.csv', 'test')['dncnn']
    assert scores.shape == (2, 3) and (scores[0] == scores[1]).all()
    assert 'NOT BSDS300' in out
    assert f'| DnCNN(1), 1 epochs | {du.count_parameters(exp.net)} | 7 | {scores.mean():.2f} ± ' in out
    words = ['evaluate', 'dncnn', '--data', str(folder), '--checkpoints', str(tmp_path / 'checkpoints'), '--scores']
    du.main([*words, str(tmp_path / 'scores.csv'), '--sigma', '50'])
    du.main([*words, str(tmp_path / 'scores.csv'), '--self-ensemble', '--seeds', '1'])
    with pytest.raises(ValueError, match=r'dncnn has no training with --seeds \[7\]'):
        du.main([*words, str(tmp_path / 'scores.csv'), '--seeds', '7'])
    assert len(du.read_scores(tmp_path / 'scores.csv', 'test')['dncnn_ensemble']) == 1
    assert du.read_scores(tmp_path / 'scores.csv', 'test').keys() == {'dncnn', 'dncnn_ensemble'}
    assert (du.read_scores(tmp_path / 'scores.csv', 'test')['dncnn'] == scores).all()
    assert du.read_scores(tmp_path / 'scores.csv', 'test, sigma 50').keys() == {'dncnn'}
    (tmp_path / 'expenses.csv').write_text('day,expense\n1,2\n')
    for file, problem in (('expenses.csv', 'is not a file of scores'), (du.HERE / 'checkpoints' / 'scores.csv', 'BSDS300')):
        before = (tmp_path / file).read_text()
        with pytest.raises(ValueError, match=problem):
            du.main([*words, str(tmp_path / file)])
        assert (tmp_path / file).read_text() == before
    monkeypatch.setattr(du, 'HERE', tmp_path)
    du.main(['denoise', str(folder / 'test' / '0.png'), str(tmp_path / 'out.png'), '--net', 'dncnn', '--sigma', '50'])
    with Image.open(tmp_path / 'out.png') as image:
        assert image.size == (330, 340)


def test_ablation_command_trains_what_is_asked_for_and_prints_what_is_stored(folder, tmp_path, capsys, monkeypatch):
    for mode in ('train', 'test'):
        for file in (folder / mode).glob('*.png'):
            Image.open(file).resize((330, 340)).save(file)
    monkeypatch.setattr(du, 'HELD_OUT', range(0, 6, 3))
    words = ['ablation', '--scores', str(tmp_path / 'scores.csv'), '--C', '2']
    train = ['--retrain', '--data', str(folder), '--out', str(tmp_path / 'runs'), '--epochs', '1', '--seeds']
    du.main([*words, *train, '0', '1', '--arms', 'dncnn', 'udncnn'])
    du.main([*words, *train, '1', '--arms', 'udncnn'])  # again: the scores take the place of the old ones
    capsys.readouterr()
    du.main(words)
    out = capsys.readouterr().out
    tables = [du.read_scores(tmp_path / 'scores.csv', which) for which in ('held out', 'test')]
    assert [{arm: values.shape for arm, values in scores.items()} for scores in tables] == [
        {'dncnn': (2, 2), 'udncnn': (2, 2)}, {'dncnn': (2, 3), 'udncnn': (2, 3)}]
    assert (f'| UDnCNN(6) | {du.count_parameters(du.UDnCNN(6, C=2))} | 36 | 2 | {tables[0]["udncnn"].mean():.2f} | '
            f'{tables[0]["udncnn"].mean() - tables[0]["dncnn"].mean():+.2f} ± ') in out


def test_intervals_are_those_of_students_t_tests():
    random = np.random.default_rng(0)
    scores = {'a': random.normal(30, 2, (3, 50)), 'b': random.normal(30.1, 2, (4, 50))}
    a, b = (values.mean(axis=1) for values in scores.values())
    mean, half = du.over_trainings(scores['a'], scores['b'])
    low, high = stats.ttest_ind(a, b).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(du.over_trainings(scores['a'], scores['b'][:1])[1])
    mean, half = du.over_photographs(scores['a'][0] - scores['b'][0])
    low, high = stats.ttest_rel(scores['a'][0], scores['b'][0]).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_levels_command(folder, tmp_path, capsys, monkeypatch):
    """The table by level of noise: measured into a file, and printed from it beside FFDNet's figures."""
    for file in (folder / 'test').glob('*.png'):
        Image.open(file).resize((330, 340)).save(file)
    net = du.DUDnCNN(2, C=2, zero_last=True)  # the identity
    monkeypatch.setattr(du, 'load_network', lambda name: (net, []))
    words = ['levels', '--scores', str(tmp_path / 'levels.csv')]
    du.main([*words, '--retest', '--data', str(folder), '--nets', 'noisy', 'dudncnn', 'dudncnn_scaled'])
    measured = capsys.readouterr().out
    du.main(words)
    assert capsys.readouterr().out == measured
    rows = {row.split('|')[1].strip(): [cell.strip() for cell in row.split('|')[2:-1]] for row in measured.splitlines()[2:6]}
    noisy, dudncnn, scaled = (rows[name] for name in ('noisy', 'dudncnn', 'dudncnn_scaled'))
    assert noisy == dudncnn and scaled == [*5 * [''], noisy[-1]]
    assert float(noisy[4]) == pytest.approx(20 * math.log10(255 / 30), abs=0.05)
    assert '| FFDNet |  | 35.83 | 33.53 | 30.82 | 29.92 | 27.54 |' in measured
    assert '| FFDNet-Clip |' in measured.partition('clipped to 8 bits')[2]


@pytest.mark.parametrize('name', sorted(path.name for path in (du.HERE / 'checkpoints').iterdir() if path.is_dir()))
def test_committed_networks_denoise(name, photographs):
    """Far better than the noisy image, on four test photographs."""
    net, history = du.load_network(name)
    assert len(history) >= 75 and isinstance(history[0][1]['PSNR'], float)
    scores = du.benchmark(net, du.benchmark_pairs(photographs, size=200, subset=range(0, 100, 25)))
    assert scores['psnr'].mean() > 28
