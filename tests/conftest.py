"""For all tests: no windows, no deadlines, and where the photographs are."""
import os
from pathlib import Path

import hypothesis
import matplotlib
import pytest

HERE = Path(__file__).resolve().parents[1]

matplotlib.use('Agg')  # tests open no window (not by MPLBACKEND, which notebooks would inherit)
hypothesis.settings.register_profile('tests', deadline=None)
hypothesis.settings.load_profile('tests')


@pytest.fixture(scope='session')
def photographs():
    """The folder with train/ and test/ of BSDS300, where it is at hand."""
    given = os.environ.get('BSDS300')
    for folder in [Path(given), Path(given) / 'images'] if given else [HERE / 'BSDS300' / 'images']:
        if (folder / 'train').is_dir() and (folder / 'test').is_dir():
            return folder
    pytest.skip(f'no BSDS300 here: BSDS300 is {given!r}, and there is no folder BSDS300/images')
