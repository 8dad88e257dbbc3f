"""For all tests: no windows, no deadlines, and photographs."""
import os
from pathlib import Path

import hypothesis
import matplotlib
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parents[1]

matplotlib.use('Agg')  # tests open no window (not by MPLBACKEND, which notebooks would inherit)
hypothesis.settings.register_profile('tests', deadline=None)
hypothesis.settings.load_profile('tests')


@pytest.fixture(scope='session')
def photographs():
    """The folder with train/ and test/ of BSDS300, where it is at hand."""
    given = os.environ.get('BSDS300')
    folders = [HERE / 'BSDS300' / 'images']
    if given:
        folders = [Path(given), Path(given) / 'images']
    for folder in folders:
        if (folder / 'train').is_dir() and (folder / 'test').is_dir():
            return folder
    pytest.skip(f'no BSDS300 here: BSDS300 is {given!r}, and there is no folder BSDS300/images')


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
