"""nntools: devices, and what goes where."""


import pytest
import torch
from torch import nn

import nntools as nt
from tests.helpers import make


def test_devices(tmp_path):
    class Plain(nn.Linear):
        criterion = staticmethod(nn.functional.mse_loss)

    assert nt.find_device().type in ('cuda', 'mps', 'cpu')
    for name in ('auto', 'cpu', torch.device('cpu')):
        exp = make(tmp_path / str(name), device=name)
        expected = nt.find_device() if name == 'auto' else torch.device('cpu')
        assert exp.device.type == exp.net.device.type == expected.type
        assert exp.train_loader.pin_memory is (expected.type == 'cuda')  # only where it helps
        exp.run(1)
    exp = make(tmp_path / 'plain', Plain(3, 1), stats=nt.StatsManager(), device='cpu')
    assert exp.device == torch.device('cpu') and exp.evaluate() > 0


@pytest.mark.parametrize('device, expected', [('cuda', True), ('mps', False)])
def test_copies_that_do_not_wait_are_for_cuda(tmp_path, monkeypatch, device, expected):
    def to(tensor, *args, non_blocking=False, **options):
        asked.append(non_blocking)
        return tensor

    asked = []
    exp = make(tmp_path, stats=nt.StatsManager())
    monkeypatch.setattr(nt, '_device_of', lambda net: torch.device(device))
    monkeypatch.setattr(torch.Tensor, 'to', to)
    exp.evaluate()
    assert asked and set(asked) == {expected}


def test_the_steps_of_adam_stay_on_the_cpu(tmp_path, monkeypatch):
    """They would go where the file is mapped to."""
    exp = make(tmp_path)
    exp.run(1)
    # In place of a GPU that is not here.
    monkeypatch.setattr(nt, '_device_of', lambda net: torch.device('meta'))
    exp.device = torch.device('meta')
    exp.load()
    steps = [state['step'] for state in exp.optimizer.state.values()]
    assert len(steps) == 6 and all(step.device.type == 'cpu' and step == 5 for step in steps)
