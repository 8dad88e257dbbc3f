"""nntools: experiments with a step, an update or attributes of their own."""

import pytest
import torch
from torch import nn

import nntools as nt
from tests.helpers import Data, Stats, content, end, experiment, same


class AutoEncoder(nt.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Unlabelled(nt.Experiment):
    def step(self, batch):  # batches are dicts {'image': x}
        x = batch['image']
        y = self.net(x)
        loss = self.net.criterion(y, x)
        self.update(loss)
        return loss, x, y, x


def test_an_autoencoder(tmp_path):
    data = [{'image': Data()[k][0]} for k in range(22)]

    def build(name):
        torch.manual_seed(0)
        net = AutoEncoder()
        return Unlabelled(net, data, data, torch.optim.Adam(net.parameters(), lr=0.03), Stats(),
                          output_dir=str(tmp_path / name), batch_size=5)

    exp = build('a')
    exp.run(20)
    assert exp.history[-1]['loss'] < 0.5 * exp.history[0]['loss']
    build('b').run(7)
    resumed = build('b')
    resumed.run(20)
    assert same(end(exp), end(resumed))


class Adversarial(nt.Experiment):
    def step(self, x):
        net = self.net
        fake = net(torch.randn(len(x), 2))
        real_score, fake_score = net.discriminator(x), net.discriminator(fake.detach())
        loss_d = net.criterion(real_score, 1) + net.criterion(fake_score, 0)
        self.update(loss_d, self.also_save['discriminator'])
        loss_g = net.criterion(net.discriminator(fake), 1)
        self.update(loss_g)
        return loss_g + loss_d, x, fake, None


class AdversarialStats(nt.StatsManager):
    def init(self):
        super().init()
        self.sum = 0.0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.sum += y.sum().item()

    def summarize(self):
        return {'loss': super().summarize(), 'mean': self.sum / self.number_samples}


class GAN(nt.NeuralNetwork):
    """Learns to draw numbers like those of the data set."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, z):
        return self.generator(z)

    def criterion(self, score, real):
        return nn.functional.binary_cross_entropy_with_logits(score, torch.full_like(score, real))


def test_a_gan_with_two_optimizers(tmp_path):
    data = 3 + 0.1 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))

    def build(name):
        torch.manual_seed(0)
        net = GAN()
        adam_g = torch.optim.Adam(net.generator.parameters(), lr=0.01, betas=(0.0, 0.9))
        adam_d = torch.optim.Adam(net.discriminator.parameters(), lr=0.02, betas=(0.0, 0.9))
        return Adversarial(
            net, data, data, adam_g, AdversarialStats(), output_dir=str(tmp_path / name),
            also_save={'discriminator': adam_d})

    exp = build('a')
    exp.run(30)
    assert abs(exp.history[-1]['mean'] - 3) < 0.5 * abs(exp.history[0]['mean'] - 3)
    before = exp.net.state_dict()['generator.0.weight'].clone()
    exp.evaluate()
    assert torch.equal(before, exp.net.state_dict()['generator.0.weight'])
    build('b').run(11)
    resumed = build('b')
    resumed.run(30)
    assert same(end(exp), end(resumed))


@pytest.mark.parametrize('method', ['setting', 'state_dict'])
def test_attributes_that_are_set_too_late(tmp_path, method):
    class Late(nt.Experiment):
        def __init__(self, *args, early, **options):
            if early:
                self.extra = 7
            super().__init__(*args, **options)
            self.extra = 7

    setattr(Late, method, lambda self: getattr(nt.Experiment, method)(self) | {'Extra': self.extra})
    with pytest.raises(AttributeError, match='extra'):
        experiment(tmp_path, Late, early=False)
    assert content(tmp_path) == {}
    experiment(tmp_path, Late, early=True).run(1)
    assert experiment(tmp_path, Late, early=True).epoch == 1


class OwnStep(nt.Experiment):
    def step(self):
        pass


class OwnUpdate(nt.Experiment):
    def update(self, learning_rate, momentum):
        pass


@pytest.mark.parametrize('kind', [OwnStep, OwnUpdate])
def test_another_signature_is_told_at_the_first_batch(tmp_path, kind):
    name = kind.__name__[3:].lower()
    exp = experiment(tmp_path, kind)
    with pytest.raises(TypeError, match=rf'{kind.__name__}.{name}\(\) (takes|missing) 1 '):
        exp.run(1)
    assert exp.epoch == 0 and exp.batch == 0 and experiment(tmp_path).epoch == 0


@pytest.mark.parametrize('when', ['before', 'after'])
def test_attributes_named_as_those_of_nntools(tmp_path, when):
    class Mine(nt.Experiment):
        def __init__(self, *args, **options):
            if when == 'before':
                self.set()
            super().__init__(*args, **options)
            if when == 'after':
                self.set()

        def set(self):
            self.table = []
            self.scaler, self.model, self.stopped = None, None, False

    def build(name, kind=Mine):
        return experiment(tmp_path / name, kind, best_by='error', best_mode='min',
                          perform_validation_during_training=True)

    build('a').run(2)
    exp, plain = build('a'), build('b', nt.Experiment)
    exp.run(3)
    plain.run(3)
    assert same(plain.history, exp.history) and exp.table == []
    assert (exp.scaler, exp.model, exp.stopped) == (None, None, False)


@pytest.mark.parametrize('name', ['best', 'seconds'])
def test_what_is_read_only_can_not_be_assigned(tmp_path, name):
    exp = experiment(tmp_path)
    with pytest.raises(AttributeError, match=f"'{name}'"):
        setattr(exp, name, 0)


def test_methods_named_as_those_of_nntools(tmp_path):
    class Mine(nt.Experiment):
        def table(self):
            return 'mine'

        def best(self, k):
            return k

        def seconds(self):
            return 'mine'

    options = {'best_by': 'error', 'best_mode': 'min'}
    exp = experiment(tmp_path, Mine, **options)
    exp.run(2)
    assert (exp.table(), exp.best(3), exp.seconds()) == ('mine', 3, 'mine')
    assert experiment(tmp_path, Mine, **options).epoch == 2
