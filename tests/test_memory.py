"""nntools: how many copies of the weights are in memory."""

import contextlib
import gc

import pytest
import torch
from torch import nn

from tests.helpers import Net, make


@pytest.fixture(autouse=True)
def only_new_objects():
    """The collector leaves out what is there already: many objects of the libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize('options', [{}, {'save_every': 3}])
@pytest.mark.parametrize('error', [False, True])
def test_a_run_keeps_one_copy_in_memory_and_leaves_none(tmp_path, options, error):
    def count():
        gc.collect()
        return sum(type(value) in (torch.Tensor, nn.Parameter) and value.shape == (1001, 3)
                   for value in gc.get_objects())

    def look(e):
        if e.epoch:
            counted.append(count() - before)
        if error and e.epoch == 4:
            raise ZeroDivisionError

    exp, counted, before = make(tmp_path, Net(width=1001), **options), [], count()
    assert before >= 1  # the weights are found
    with contextlib.suppress(ZeroDivisionError):
        exp.run(4, look)
    # The gradient and what Adam keeps are of that size; in a run, the copy is too.
    assert max(counted) <= 6 and count() - before <= 3
