"""nntools: networks with modes, states or layers of their own, and compiled ones."""


import pytest
import torch
from torch import nn

import nntools as nt
from tests.helpers import Data, Net, make, same, weights


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('ending', ['done', 'nothing to do', 'an error'])
def test_after_run_the_network_has_the_mode_of_before(tmp_path, mode, ending):
    exp = make(tmp_path)
    exp.net.train(mode)
    if ending == 'an error':
        with pytest.raises(ZeroDivisionError):
            exp.run(1, after_batch=lambda e, loss: 1 / 0)
    else:
        exp.run(1 if ending == 'done' else 0)
    assert exp.net.training is mode


def test_each_layer_keeps_its_mode(tmp_path):
    exp = make(tmp_path, perform_validation_during_training=True)
    exp.net.norm.eval()
    for use in (exp.evaluate, lambda: exp.predict(Data(7)), lambda: exp.run(1)):
        use()
        assert exp.net.training and not exp.net.norm.training


def test_a_step_may_set_the_network_to_evaluation(tmp_path):
    class FixedNorm(Net):
        def train(self, mode=True):
            return super().train(False)

    exp = make(tmp_path, FixedNorm())
    before = weights(exp.net)
    exp.evaluate()
    assert same(weights(exp.net), before)
    exp.run(1)
    assert not same(weights(exp.net), before)


def test_lazy_modules_are_refused(tmp_path):
    """They have no weights yet, and can't be stored: torch names what it does not read."""
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.hidden = nn.LazyLinear(4)

    net = Lazy()
    with pytest.raises(RuntimeError, match='(?s)the state of Net .*UninitializedParameter'):
        make(tmp_path / 'a', net, optimizer=torch.optim.Adam(net.out.parameters()))
    assert not (tmp_path / 'a' / 'checkpoint.pth.tar').exists()
    net(torch.zeros(2, 3))
    make(tmp_path / 'b', net).run(1)


class Counting(Net):
    """Has a state that is no tensor."""
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {'calls': self.calls}

    def set_extra_state(self, state):
        self.calls = state['calls']


def test_a_module_with_extra_state(tmp_path):
    make(tmp_path, Counting()).run(2)
    exp = make(tmp_path, Counting())
    exp.run(3)
    assert exp.net.calls == 15


def test_compiled_and_plain_networks_share_checkpoints(tmp_path):
    def compiled():
        return torch.compile(Net(), backend='eager')

    make(tmp_path / 'a', compiled()).run(1)
    make(tmp_path / 'a', Net()).run(2)
    exp = make(tmp_path / 'a', compiled())
    exp.run(3)
    whole = make(tmp_path / 'b')
    whole.run(3)
    assert exp.epoch == 3 and same(whole.history, exp.history)
    assert list(nt.load_checkpoint(exp.checkpoint_path)['Net']) == list(Net().state_dict())
