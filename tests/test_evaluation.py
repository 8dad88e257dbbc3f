"""nntools: evaluate and predict."""

import numpy as np
import pytest
import torch
import torch.utils.data as td

import nntools as nt
from tests.helpers import Data, Net, Stats, collate_pairs, end, experiment, make, same


def test_evaluation_covers_every_sample_with_its_weight(tmp_path):
    exp = make(tmp_path, val=Data(7), batch_size=4)
    exp.run(1)
    with torch.no_grad():
        net = exp.net.eval()
        differences = [(net(x[None]) - d).item() for x, d in map(Data(7).__getitem__, range(7))]
    loss, error = np.mean(np.square(differences)), np.mean(np.abs(differences))
    assert exp.evaluate() == {'loss': pytest.approx(loss), 'error': pytest.approx(error)}
    assert exp.stats_manager.number_samples == 7
    exp.evaluate(td.DataLoader(Data(5), 2))
    assert exp.stats_manager.number_samples == 5
    old = make(tmp_path / 'old', val=Data(7), drop_last_in_evaluation=True)
    old.evaluate()
    assert old.stats_manager.number_samples == 4


def test_evaluation_repeats_itself_and_keeps_the_mode(tmp_path):
    exp = make(tmp_path, Net(dropout=0.5), val=Data(7, noise=1.0))
    for training in (True, False):
        exp.net.train(training)
        first = exp.evaluate()
        torch.rand(3)
        assert exp.evaluate() == first and exp.net.training is training


def test_an_evaluation_repeats_itself_on_any_loader(tmp_path):
    class Spy(Stats):
        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            seen.append(x.clone())

    seen = []
    exp = make(tmp_path, Net(dropout=0.5), Data(noise=0.5), stats=Spy())
    first = exp.evaluate(exp.train_loader)
    half = len(seen)
    assert exp.evaluate(exp.train_loader) == first and same(seen[:half], seen[half:])
    generator = torch.Generator().manual_seed(5)
    own = td.DataLoader(Data(noise=0.5), 4, shuffle=True, generator=generator)
    state = generator.get_state()
    assert exp.evaluate(own) == exp.evaluate(own)
    assert torch.equal(state, generator.get_state())
    exp.run(2)
    whole = make(tmp_path / 'whole', Net(dropout=0.5), Data(noise=0.5), stats=Stats())
    whole.run(2)
    assert same(end(whole)['Net'], end(exp)['Net'])  # the order of the training is what it was


def test_evaluate_inside_of_step(tmp_path):
    class Curious(nt.Experiment):
        def step(self, batch):
            parts = super().step(batch)
            if self.net.training:
                looked.append(self.evaluate(Data(3))['loss'])
                assert self.net.training
            return parts

    looked = []
    exp, plain = experiment(tmp_path / 'a', Curious), experiment(tmp_path / 'b')
    exp.run(2)
    plain.run(2)
    assert len(looked) == 10
    assert same(end(exp, 'Circumstances'), end(plain, 'Circumstances'))


def test_a_frozen_network_can_be_evaluated(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    net.requires_grad_(False)
    assert make(tmp_path, net, optimizer=adam).evaluate()


def test_no_update_in_evaluation_with_gradients(tmp_path):
    """Of a network whose loss has a gradient in it; evaluated in the middle of an epoch."""
    class Penalty(nt.Experiment):
        def step(self, batch):
            x, d = batch
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                y = self.net(x)
                gradient, = torch.autograd.grad(y.sum(), x, create_graph=True)
                loss = self.net.criterion(y, d) + 1e-3 * gradient.square().mean()
                self.update(loss)
            return loss, x, y, d

    def look(e, loss):
        e.evaluate()
        e.predict(Data(7))

    exp = experiment(tmp_path, Penalty)
    exp.run(1, after_batch=look)
    assert exp.optimizer.state[exp.net.out.weight]['step'] == 5


def test_predict(tmp_path):
    exp = make(tmp_path, Net(dropout=0.9))
    x = torch.stack([Data()[k][0] for k in range(22)])
    exp.net.train()
    y = exp.predict(x)
    assert exp.net.training and y.shape == (22, 1) and not y.requires_grad
    assert torch.allclose(y, exp.net.eval()(x), atol=1e-6)
    assert torch.equal(y, exp.predict(Data()))
    assert torch.equal(y, exp.predict(td.DataLoader(Data(), 4)))


class Dicts(Data):
    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return {'image': x, 'target': d}


INPUTS = torch.stack([Data()[k][0] for k in range(22)])


class OfDicts(nt.Experiment):
    def step(self, batch):
        y = self.net(batch['image'])
        loss = self.net.criterion(y, batch['target'])
        self.update(loss)
        return loss, batch['image'], y, batch['target']


@pytest.mark.parametrize(
    'data, kind, options',
    [
        (INPUTS, nt.Experiment, {'collate_fn': collate_pairs}),
        (Dicts(), OfDicts, {}),
        (td.DataLoader(Data(), 4, shuffle=True), nt.Experiment, {}),
        (td.DataLoader(Data(), 4, shuffle=True, drop_last=True), nt.Experiment, {}),
        (
            td.DataLoader(Data(), batch_sampler=td.BatchSampler(td.RandomSampler(Data()), 5, True)),
            nt.Experiment,
            {},
        ),
        (td.DataLoader(Dicts(), 5, shuffle=True, collate_fn=td.default_collate), OfDicts, {}),
        (td.DataLoader(INPUTS, 5), nt.Experiment, {}),
        ('train_loader', nt.Experiment, {}),
    ],
    ids=[
        'tensor with collate_fn', 'dicts', 'shuffled', 'shuffled, short one left out',
        'batch sampler', 'shuffled dicts', 'inputs', 'train_loader'],
)
def test_predictions_are_complete_and_in_order(tmp_path, data, kind, options):
    exp = experiment(tmp_path, kind, data=Dicts() if kind is OfDicts else None, **options)
    y = exp.predict(exp.train_loader if isinstance(data, str) else data)
    with torch.no_grad():
        assert torch.allclose(y, exp.net.eval()(INPUTS), atol=1e-6)


class WithState(Net):
    """Returns its state beside the output, as recurrent networks do."""

    def forward(self, x):
        y = super().forward(x)
        return y, y * 2

    def criterion(self, y, d):
        return super().criterion(y[0], d)


def test_predictions_of_networks_that_return_tuples(tmp_path):
    exp = make(tmp_path, WithState(), stats=nt.StatsManager())
    with torch.no_grad():
        expected = exp.net.eval()(INPUTS)[0]
    for data in (INPUTS, Data()):
        assert torch.allclose(exp.predict(data), expected, atol=1e-6)


def test_predictions_with_targets(tmp_path):
    exp = make(tmp_path)
    y, d = exp.predict(Data(), targets=True)
    assert torch.equal(y, exp.predict(Data()))
    assert torch.equal(d, torch.stack([Data()[k][1] for k in range(22)]))
