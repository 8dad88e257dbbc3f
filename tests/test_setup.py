"""What `make setup` and `pip install .` install, with small indexes on 127.0.0.1."""
import email
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
PYTORCH = 'https://download.pytorch.org/whl/cpu'

needs_make = pytest.mark.skipif(
    sys.platform == 'win32' or not shutil.which('make'), reason='no make here, as on Windows')


def wheel(index, name, version, requires=''):
    """Writes a package that holds nothing into the folder of an index."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    info = f'{name}-{version}.dist-info'
    metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    if requires:
        metadata += f'Requires-Dist: {requires}\n'
    with zipfile.ZipFile(folder / f'{name}-{version}-py3-none-any.whl', 'w') as file:
        file.writestr(f'{info}/METADATA', metadata)
        file.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any')
        file.writestr(f'{info}/RECORD', '')


@pytest.fixture(scope='module')
def indexes(tmp_path_factory):
    """The address of a server: /pypi is PyPI, /cpu has PyTorch without CUDA, /half lacks a part."""
    folder = tmp_path_factory.mktemp('indexes')
    for index, ending in (('pypi', ''), ('cpu', '+cpu'), ('half', '+cpu')):
        for version in ('1.0', '2.0'):
            wheel(folder / index, 'torch', version + ending)
            if index != 'half':
                wheel(folder / index, 'torchvision', version + ending, f'torch (=={version})')
    wheel(folder / 'pypi', 'torch', '3.0')  # newer, but torchvision is not for it
    wheel(folder / 'pypi', 'tqdm', '1.0')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def make(folder, *words, pypi=''):
    """Runs make in the folder, with this PyPI, and without what pip and make are told elsewhere."""
    names = ('MAKEFLAGS', 'MFLAGS', 'MAKEOVERRIDES', 'MAKELEVEL', 'TORCH_INDEX', 'VENV', 'PYTHON')
    environment = {name: value for name, value in os.environ.items()
                   if name not in names and not name.startswith('PIP_')}
    environment |= {'PIP_CONFIG_FILE': os.devnull, 'PIP_NO_CACHE_DIR': '1', 'NO_PROXY': '127.0.0.1',
                    'no_proxy': '127.0.0.1', 'PIP_INDEX_URL': pypi}
    done = subprocess.run(['make', *words, f'PYTHON={sys.executable}'], cwd=folder, env=environment,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def empty_environment(tmp_path_factory):
    """An environment with nothing but pip: to copy it is faster than to make one."""
    folder = tmp_path_factory.mktemp('environment') / '.venv'
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    return folder


@pytest.fixture
def checkout(tmp_path, empty_environment):
    """A folder with the Makefile and requirements that are small."""
    shutil.copy(HERE / 'Makefile', tmp_path)
    (tmp_path / 'requirements.txt').write_text('torch>=1.0\ntorchvision>=1.0\ntqdm>=1.0\n')
    for name in ('.venv', '.venv-lowest'):
        shutil.copytree(empty_environment, tmp_path / name, symlinks=True)
    return tmp_path


def versions(environment):
    """Those of torch, torchvision and tqdm in this environment."""
    python = next(environment.glob('lib/python*/site-packages'))
    found = {}
    for name in ('torch', 'torchvision', 'tqdm'):
        (info,) = python.glob(f'{name}-*.dist-info')
        found[name] = info.name.removesuffix('.dist-info').split('-')[1]
    return found


# --- PyTorch without CUDA -------------------------------------------------------------------------

@needs_make
def test_pytorch_without_cuda(checkout, indexes):
    """From the index that is named; the rest comes from PyPI. Also with the lowest versions."""
    said = make(checkout, 'setup', f'TORCH_INDEX={indexes}/cpu', pypi=f'{indexes}/pypi')
    assert f'PyTorch comes from {indexes}/cpu' in said and 'not to be had' not in said
    assert versions(checkout / '.venv') == {
        'torch': '2.0+cpu', 'torchvision': '2.0+cpu', 'tqdm': '1.0'}
    make(checkout, '.venv-lowest/.ready', f'TORCH_INDEX={indexes}/cpu', pypi=f'{indexes}/pypi')
    assert versions(checkout / '.venv-lowest') == {
        'torch': '1.0+cpu', 'torchvision': '1.0+cpu', 'tqdm': '1.0'}
    assert 'pip' not in make(checkout, 'setup'), 'it is set up once'


@needs_make
def test_pytorch_of_pypi(checkout, indexes):
    said = make(checkout, 'setup', 'TORCH_INDEX=', pypi=f'{indexes}/pypi')
    assert 'PyTorch' not in said
    assert versions(checkout / '.venv') == {'torch': '2.0', 'torchvision': '2.0', 'tqdm': '1.0'}


@needs_make
@pytest.mark.parametrize('index', ['http://127.0.0.1:9', 'half'])
def test_an_index_that_fails(checkout, indexes, index):
    """Nobody answers there, or it has no torchvision: both come from PyPI."""
    address = f'{indexes}/half' if index == 'half' else index
    said = make(checkout, 'setup', f'TORCH_INDEX={address}', pypi=f'{indexes}/pypi')
    assert 'PyTorch is not to be had there' in said
    assert versions(checkout / '.venv') == {'torch': '2.0', 'torchvision': '2.0', 'tqdm': '1.0'}


@needs_make
@pytest.mark.parametrize('card, system', [('', 'Linux'), ('nvidia-smi', 'Linux'), ('', 'Darwin')])
def test_where_pytorch_comes_without_cuda(checkout, card, system):
    """On Linux where there is no NVIDIA card. ``uname`` is one that says what the system is."""
    (checkout / 'bin').mkdir()
    uname = checkout / 'bin' / 'uname'
    uname.write_text(f'#!/bin/sh\necho {system}\n')
    uname.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PATH', f'{uname.parent}{os.pathsep}{os.environ["PATH"]}')
        planned = make(checkout, '-n', 'setup', f'NVIDIA={card}')
    assert (PYTORCH in planned) == (system == 'Linux' and not card)


# --- nntools alone --------------------------------------------------------------------------------

def test_pip_installs_nntools_alone(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    source = tmp_path / 'source'
    shutil.copytree(HERE / 'programs', source / 'programs')
    shutil.copytree(HERE / 'docs', source / 'docs')
    for name in ('nntools.py', 'denoising_utils.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(HERE / name, source)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation',
               '--no-index', '--wheel-dir', tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    (built,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(built) as file:
        names = file.namelist()
        (metadata,) = [name for name in names if name.endswith('.dist-info/METADATA')]
        needed = email.message_from_string(file.read(metadata).decode()).get_all('Requires-Dist')
        file.extract('nntools.py', tmp_path / 'installed')
    assert [name for name in names if '.dist-info/' not in name] == ['nntools.py']
    assert {word.split('>=')[0] for word in needed} == {'torch', 'numpy', 'tqdm'}
    program = 'import nntools; print(nntools.Experiment.__name__, nntools.__file__)'
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path / 'installed', text=True,
                          capture_output=True, timeout=300)
    assert done.stdout.split()[0] == 'Experiment', done.stderr
