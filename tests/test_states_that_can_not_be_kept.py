"""nntools: what a checkpoint can't hold is named, and leaves the one before as it was."""

import pytest
import torch

import nntools as nt
from tests.helpers import Data, Net, content, make, same


class Keeps:
    """Something with a state: what it is told to keep."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {'value': self.value}

    def load_state_dict(self, state):
        self.value = state['value']


ODD = r'the state of \S*odd\S* holds objects that could run code'


@pytest.mark.parametrize(
    'value', [Data(), [1, {'a': Data()}], print], ids=['object', 'list', 'function'])
def test_a_state_that_can_not_be_read_back(tmp_path, value):
    with pytest.raises(RuntimeError, match=ODD):
        make(tmp_path, also_save={'fine': Keeps(1), 'odd': Keeps(value)})
    assert 'checkpoint.pth.tar' not in content(tmp_path)
    exp = make(tmp_path, also_save={'fine': Keeps(1), 'odd': Keeps(2)})
    exp.run(1)
    assert exp.epoch == 1


def test_a_state_that_can_not_even_be_written(tmp_path):
    with pytest.raises(RuntimeError, match=ODD):
        make(tmp_path, also_save={'odd': Keeps(lambda: 1)})


@pytest.mark.parametrize('epoch', [1, 3])
def test_a_state_that_becomes_one(tmp_path, epoch):
    """It is found in the epoch in which it comes, and not when all epochs are done."""
    odd = Keeps(1)

    def spoil(e, loss):
        if e.epoch == epoch:
            odd.value = Data()

    exp = make(tmp_path, also_save={'odd': odd})
    with pytest.raises(RuntimeError, match=ODD):
        exp.run(6, after_batch=spoil)
    assert len(nt.load_checkpoint(exp.checkpoint_path)['History']) == epoch
    again = make(tmp_path, also_save={'odd': Keeps(1)})
    again.run(6)
    whole = make(tmp_path / 'whole', also_save={'odd': Keeps(1)})
    whole.run(6)
    assert same(again.history, whole.history)


class Storing(Net):
    """Keeps an object as its extra state."""

    def get_extra_state(self):
        return Data()

    def set_extra_state(self, state):
        pass


def test_the_network_itself(tmp_path):
    with pytest.raises(RuntimeError, match='the state of Net holds objects that could run code'):
        make(tmp_path, Storing())
    assert 'checkpoint.pth.tar' not in content(tmp_path)


def test_what_can_be_kept(tmp_path):
    value = {'a': [1, 2.5, None, True, 'text'], 'b': (torch.ones(2), {'c': torch.Size([3])})}
    exp = make(tmp_path, also_save={'kept': Keeps(value)})
    exp.run(1)
    again = Keeps(None)
    make(tmp_path, also_save={'kept': again})
    assert same(again.value, value)
