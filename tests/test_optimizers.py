"""nntools: clipping, frozen layers, groups of parameters, steps of several batches."""

import pytest
import torch
import torch.utils.data as td
from torch import nn

import nntools as nt
from tests.helpers import Data, Net, conflict, content, end, make, same, weights


def test_gradient_clipping(tmp_path):
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad.flatten() for p in self.param_groups[0]['params']]
            norms.append(torch.cat(gradients).norm().item())
            return super().step(closure)

    net = Net()
    make(tmp_path, net, optimizer=Spy(net.parameters(), lr=0.1), grad_clip=0.05).run(1)
    assert max(norms) <= 0.0501 and max(norms) > 0.049


def test_freezing_and_unfreezing(tmp_path):
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    net.requires_grad_(False)
    assert list(net.parameters()) == []
    net.requires_grad_(True)
    assert [name for name, _ in net.named_parameters()] == names and len(names) == 6
    net.hidden.requires_grad_(False)
    assert [name for name, _ in net.named_parameters()] == names[2:]
    exp = make(tmp_path, net)  # Adam(net.parameters()), as in 2019
    frozen = net.hidden.weight.clone()
    exp.run(2)
    assert torch.equal(frozen, net.hidden.weight) and exp.epoch == 2


def test_what_will_not_be_trained_is_said_once(tmp_path, capsys):
    net = Net()
    net.hidden.requires_grad_(False)
    exp = make(tmp_path, net)  # without the frozen layer
    exp.run(2)
    assert 'will not be trained' not in capsys.readouterr().out
    net.hidden.requires_grad_(True)
    exp.run(3)
    exp.run(4)
    said = capsys.readouterr().out
    assert said.count('will not be trained') == 1 and 'hidden.weight, hidden.bias' in said


@pytest.mark.parametrize('stops', [(1,), (2,), (3,), (1, 2, 3, 5)], ids=str)
def test_the_recipe_for_freezing_and_unfreezing(tmp_path, stops):
    """Both groups from the start; the callback sets `requires_grad_` and the rate by the epoch."""
    def phase(exp):
        exp.net.hidden.requires_grad_(exp.epoch >= 3)
        exp.optimizer.param_groups[0]['lr'] = 0.001 if exp.epoch >= 3 else 0.0

    def build(name):
        net = Net(dropout=0.5)
        groups = [
            {'params': list(net.hidden.parameters())},
            {'params': [*net.norm.parameters(), *net.out.parameters()]},
        ]
        return make(tmp_path / name, net, optimizer=torch.optim.Adam(groups, lr=0.01))

    whole = build('whole')
    before = weights(whole.net)
    whole.run(3, lambda e: e.epoch < 3 and phase(e))
    assert torch.equal(before['hidden.weight'], whole.net.hidden.weight)
    whole.run(6, phase)
    assert not torch.equal(before['hidden.weight'], whole.net.hidden.weight)
    for epochs in (*stops, 6):
        parts = build('parts')
        parts.run(epochs, phase)
    assert same(end(whole), end(parts))


def test_another_optimizer_names_the_recipe(tmp_path):
    net = Net()
    net.hidden.requires_grad_(False)
    make(tmp_path, net).run(2)
    for options in ({}, {'allow': 'Optimizer'}, {'allow': 'Optimizer', 'lr': 0.02}):
        message = conflict(tmp_path, **options)  # all parameters now
        assert str(tmp_path) in message and 'requires_grad_' in message, message


def test_an_optimizer_with_a_closure_is_refused(tmp_path):
    net = Net()
    exp = make(tmp_path, net, optimizer=torch.optim.LBFGS(net.parameters()))
    saved = content(tmp_path)
    with pytest.raises(TypeError, match='closure'):
        exp.run(1)
    assert exp.epoch == 0 and content(tmp_path).keys() == saved.keys()


def test_a_group_that_is_added_later(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.out.parameters(), lr=0.01)
    exp = make(tmp_path, net, optimizer=adam)
    exp.run(1)
    adam.add_param_group({'params': list(net.hidden.parameters()), 'lr': 0.001})
    exp.run(2)

    def build(*groups, **options):
        net = Net()
        layers = {'out': 0.01, 'hidden': 0.001}
        groups = [{'params': list(getattr(net, name).parameters()), 'lr': layers[name]}
                  for name in groups]
        return make(tmp_path, net, optimizer=torch.optim.Adam(groups), **options)

    with pytest.raises(ValueError) as error:
        build('out')
    assert str(tmp_path) in str(error.value) and 'group' in str(error.value)
    with pytest.raises(ValueError, match='Optimizer: lr of group 1 stored nothing, given 0.001'):
        build('out', 'hidden')
    exp = build('out', 'hidden', allow=('Optimizer',))
    assert exp.epoch == 2 and exp.optimizer.state[exp.net.hidden.weight]['step'] == 5
    exp.run(3)
    assert exp.epoch == 3 and build('out', 'hidden').epoch == 3


@pytest.mark.parametrize('samples', [24, 20])
def test_gradients_of_two_batches_make_a_step(tmp_path, samples):
    """Two batches of 4 make the step of one of 8; what is left at the end makes one, too."""
    class Plain(nt.NeuralNetwork):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x)

        criterion = staticmethod(nn.functional.mse_loss)

    def build(name, **options):
        net = Plain()
        return make(
            tmp_path / name, net, Data(samples),
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1), grad_clip=0.5, **options)

    one, two = build('one', batch_size=8, drop_last=False), build('two', batches_per_step=2)
    one.run(2)
    two.run(2)
    assert torch.allclose(one.net.layer.weight, two.net.layer.weight, atol=1e-6)
    assert one.history[1]['loss'] == pytest.approx(two.history[1]['loss'], rel=1e-2)


def test_gradients_of_a_stream_are_accumulated(tmp_path):
    """Of a data set without a length nobody knows the last batch."""
    class Stream(td.IterableDataset):
        def __iter__(self):
            return (Data()[k] for k in range(22))

    exp = make(tmp_path, train=td.DataLoader(Stream(), 4), batches_per_step=2)
    exp.run(1)
    assert exp.optimizer.state[exp.net.out.weight]['step'] == 3


@pytest.mark.parametrize('stream', [False, True])
def test_an_update_left_out_and_one_left_at_the_end(tmp_path, stream):
    """Two calls of `update` make a step, with the mean of their gradients.

    The last one of five has a step of its own.
    """
    class Line(nt.NeuralNetwork):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w * x

        def criterion(self, y, d):
            return y.mean()  # the gradient is the mean of x

    class Numbers(td.IterableDataset):
        def __iter__(self):
            return ((torch.tensor(10.0 ** k), torch.tensor(0.0)) for k in range(6))

    class Skips(nt.Experiment):
        def update(self, loss, optimizer=None):
            if self.batch != 3:
                super().update(loss, optimizer)

    net, steps = Line(), []
    sgd = torch.optim.SGD(net.parameters(), lr=1)
    sgd.register_step_pre_hook(lambda *_: steps.append(net.w.grad.item()))
    data = td.DataLoader(Numbers() if stream else [*Numbers()], 1)
    Skips(net, data, None, sgd, nt.StatsManager(), str(tmp_path), batches_per_step=2).run(1)
    assert steps == pytest.approx([5.5, 5500, 1e5])
