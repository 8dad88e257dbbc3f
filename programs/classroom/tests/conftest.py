"""For all checks: photographs to try things on, and what is said of parts that aren't written."""
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use('Agg')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A part that isn't written yet is said in words; a check that needs another part waits."""
    try:
        return (yield)
    except NotImplementedError as error:
        missing = re.match(r'part (\d+)', str(error))
        own = re.search(r'test_part_(\d+)', item.path.name)
        if missing and int(missing[1]) != int(own[1]):
            pytest.skip(f'waits for {missing[0]}')
        pytest.fail(f'not written yet: {error}', pytrace=False)


@pytest.fixture
def folder(tmp_path):
    """Two photographs to train and two to test; red says in which row a pixel was, green where."""
    random = np.random.default_rng(0)
    for mode in ('train', 'test'):
        (tmp_path / mode).mkdir()
        for k, (height, width) in enumerate([(96, 72), (72, 96)]):
            rows, columns = np.mgrid[:height, :width]
            blue = random.integers(0, 256, (height, width))
            pixels = np.stack([rows, columns, blue], axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / mode / f'{k}.png')
    return tmp_path
