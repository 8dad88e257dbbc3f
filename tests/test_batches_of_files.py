"""Many photographs at once: no file ends the batch, and what ends it is said in one line."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import denoising_utils as du
from programs import denoise

HERE = Path(__file__).resolve().parents[1]
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
needs_full = pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full')
needs_shell = pytest.mark.skipif(os.name != 'posix', reason='needs a shell of Unix')


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a.png', 'b.png', 'c.png'):
        Image.fromarray(COLOURS).save(name)
    return tmp_path


def shell(line, folder):
    """A line of a shell, in which $DENOISE is the program with a network that is quick."""
    program = f'{sys.executable} -m programs.denoise --net dncnn --strength 0'
    return subprocess.run(['bash', '-c', line], cwd=folder, text=True, capture_output=True,
                          env=os.environ | {'DENOISE': program, 'PYTHONPATH': str(HERE)})


@needs_shell
def test_a_reader_that_goes_is_no_failure(files):
    done = shell('set -o pipefail; $DENOISE a.png b.png c.png --to o | head -1', files)
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout.startswith('o/a.png: noise level')
    assert sorted(os.listdir(files / 'o')) == ['a.png', 'b.png', 'c.png']


@needs_shell
@needs_full
def test_what_can_not_be_said_is_done_all_the_same(files):
    done = shell('$DENOISE a.png b.png --to o > /dev/full', files)
    assert done.returncode == 0 and 'but it is done' in done.stderr
    assert sorted(os.listdir(files / 'o')) == ['a.png', 'b.png']
    closed = shell('$DENOISE a.png b.png --to p >&-', files)
    assert closed.returncode == 0
    assert sorted(os.listdir(files / 'p')) == ['a.png', 'b.png']


@needs_shell
def test_ctrl_c_is_one_line_and_130(files):
    """Between the files of a batch that would take minutes."""
    large = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(large).save('large.png')
    for k in range(20):
        os.link('large.png', f'large{k}.png')
    program = subprocess.Popen(
        [sys.executable, '-m', 'programs.denoise', 'a.png', *map(str, Path().glob('large?*.png')),
         '--to', 'o'], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'PYTHONPATH': str(HERE)})
    program.stdout.readline()
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert said == 'Stopped: 1 of 21 files are done\n'
    assert os.listdir('o') == ['a.png']


def test_a_large_format_of_tiff_is_read(files, monkeypatch):
    monkeypatch.setattr(du, 'load_network', lambda name: (du.DnCNN(0, C=2, zero_last=True), []))
    tifffile.imwrite('big.tif', COLOURS, photometric='rgb', bigtiff=True)
    denoise.main(['a.png', 'big.tif', 'b.png', '--to', 'o'])
    assert sorted(os.listdir('o')) == ['a.png', 'b.png', 'big.tif']
