"""Where the photographs come from: found, fetched, checked, or stood in for."""
import contextlib
import errno
import hashlib
import http.server
import io
import shutil
import socket
import tarfile
import threading

import numpy as np
import pooch
import pytest

import denoising_utils as du


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
    """A BSDS300-images.tgz of a folder, as bytes. Before the photographs come members ``others``:
    (name, type)."""
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

    A function of the bytes to serve (None: nothing listens). With ``promised``, that many are
    announced.
    """
    large = np.random.default_rng(0).bytes(300_000)  # in several blocks of gzip
    (folder / 'test' / 'large.png').write_bytes(large)
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
                with contextlib.suppress(ConnectionError):
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
    assert images == tmp_path / 'home' / 'images'
    assert list((tmp_path / 'home').iterdir()) == [images]
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
    (lambda serve, good: serve(good[:len(good) // 2], promised=len(good)), ConnectionError,
     'could not be downloaded'),
], ids=['nothing listens', 'no HTTP', 'a page', 'empty', 'half', 'bad half', 'cut off'])
def test_a_download_that_fails_leaves_nothing(folder, served, tmp_path, damage, error, problem):
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


def test_nothing_else_is_taken_out_of_the_archive(folder, served, tmp_path):
    outside = tmp_path / 'outside.png'
    served(archive_of(
        folder, ('../outside.png', tarfile.REGTYPE), ('../../outside.png', tarfile.REGTYPE),
        (str(outside), tarfile.REGTYPE), ('BSDS300/images/../../../outside.png', tarfile.REGTYPE),
        ('BSDS300/images/more.png', tarfile.REGTYPE), ('BSDS300/images/train/0.png',
                                                       tarfile.SYMTYPE),
        ('BSDS300/images/train', tarfile.SYMTYPE), ('BSDS300/images/test/pipe', tarfile.FIFOTYPE)))
    before = set(tmp_path.rglob('*'))
    images = du.fetch(tmp_path / 'home')
    assert {str(file.relative_to(images)) for file in images.glob('*/*')} == {
        str(file.relative_to(folder)) for file in folder.glob('*/*.png')}
    assert not any(file.is_symlink() for file in images.rglob('*'))
    added = set(tmp_path.rglob('*')) - before
    elsewhere = [file for file in added if images.parent not in [file, *file.parents]]
    assert not outside.exists() and elsewhere == []


def test_a_damaged_download_is_an_error(served, tmp_path, monkeypatch):
    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path)
    served(b'please log in to this hotspot')
    with pytest.raises(OSError, match='is damaged'):
        du.find_photographs()


def test_photographs_of_the_manifest(photographs):
    is_bsds300, text = du.describe_photographs(photographs)
    assert is_bsds300 and '200 to train and 100 to test' in text


def test_without_network_samples_stand_in_and_say_so(tmp_path, served, monkeypatch):
    served(None)
    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path / 'empty')
    monkeypatch.setattr(du.tempfile, 'gettempdir', lambda: str(tmp_path))
    folder = du.find_photographs()
    is_bsds300, text = du.describe_photographs(folder)
    assert not is_bsds300 and text.startswith('NOT BSDS300')
    assert len(du.NoisyBSDSDataset(folder, 'test', (320, 320))) == 6
    assert len(du.NoisyBSDSDataset(folder, 'train', (320, 320))) == 5
    assert du.find_photographs() == folder
    next((folder / 'test').iterdir()).unlink()  # by a cleaner of temporary files
    assert len(du.NoisyBSDSDataset(du.find_photographs(), 'test', (320, 320))) == 6


@pytest.mark.parametrize('problem', ['no list of checksums', 'read-only'])
def test_where_bsds300_can_not_be_checked_or_kept(tmp_path, served, monkeypatch, problem):
    """As with the two .py files alone, or in a folder of the system."""
    def refuse(*args, **options):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.delenv('BSDS300', raising=False)
    monkeypatch.setattr(du, 'HERE', tmp_path / 'empty')
    monkeypatch.setattr(du.tempfile, 'gettempdir', lambda: str(tmp_path))
    if problem == 'read-only':
        monkeypatch.setattr(du.tempfile, 'TemporaryDirectory', refuse)
        assert du.describe_photographs(du.find_photographs())[1].startswith('NOT BSDS300')
    else:
        monkeypatch.setattr(du, 'MANIFEST', tmp_path / 'nowhere')
        with pytest.raises(FileNotFoundError, match="the list of BSDS300's checksums"):
            du.fetch(tmp_path / 'new')
        assert not (tmp_path / 'new').exists()
        text = du.describe_photographs(du.find_photographs())[1]
        assert text.startswith('not known to be BSDS300, as ')


def test_the_archive_is_unpacked_without_filters(tmp_path, monkeypatch):
    """Python 3.11.2 has none in tarfile."""
    archive = tmp_path / 'archive.tgz'
    (tmp_path / 'iids_train.txt').write_text('1\n')
    with tarfile.open(archive, 'w:gz') as file:
        file.add(tmp_path / 'iids_train.txt', 'BSDS300/images/train/1.jpg')
    unpack = tarfile.TarFile.extractall

    def old(self, path='.', members=None, *, numeric_owner=False):
        return unpack(self, path, members, numeric_owner=numeric_owner)

    class Berkeley:
        def __init__(self, **_):
            pass

        def __call__(self, url, output_file, pooch):
            shutil.copy(archive, output_file)

    monkeypatch.setattr(tarfile.TarFile, 'extractall', old)
    monkeypatch.delattr(tarfile, 'data_filter', raising=False)
    monkeypatch.setattr(pooch, 'HTTPDownloader', Berkeley)
    # Most photographs are not in there. It is no TypeError.
    with pytest.raises(OSError, match='missing or damaged'):
        du.fetch(tmp_path / 'BSDS300')
