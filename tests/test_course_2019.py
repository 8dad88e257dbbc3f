"""Programs in the manner of those written for the course's helper of 2019.

One client for each kind: they use what the helper of 2019 had, and nothing else.
"""

import os
import re

import pytest
import torch
import torch.utils.data as td
from torch import nn

import nntools as nt
from tests.helpers import Data, Denoiser, DenoisingStats, Net, Noisy, same


class Classes(td.Dataset):
    """No repr: what is printed has its address."""

    def __init__(self, n):
        random = torch.Generator().manual_seed(n)
        self.d = torch.randint(3, (n,), generator=random)
        self.x = torch.randn(n, 4, generator=random) + 4 * nn.functional.one_hot(self.d, 4)

    def __len__(self):
        return len(self.d)

    def __getitem__(self, k):
        return self.x[k], self.d[k]


class ClassificationStats(nt.StatsManager):
    def __init__(self):
        super(ClassificationStats, self).__init__()

    def init(self):
        super(ClassificationStats, self).init()
        self.running_accuracy = 0

    def accumulate(self, loss, x, y, d):
        super(ClassificationStats, self).accumulate(loss, x, y, d)
        _, winner = torch.max(y, 1)
        self.running_accuracy += torch.mean((winner == d).float())

    def summarize(self):
        loss = super(ClassificationStats, self).summarize()
        accuracy = 100 * self.running_accuracy / self.number_update  # a tensor
        return {'loss': loss, 'accuracy': accuracy}


class Classifier(nt.NeuralNetwork):
    def __init__(self):
        super(Classifier, self).__init__()
        self.cross_entropy = nn.CrossEntropyLoss()

    def criterion(self, y, d):
        return self.cross_entropy(y, d)


class Transfer(Classifier):
    """A pretrained body that stays as it is, and a new head."""

    def __init__(self):
        super(Transfer, self).__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        for parameter in self.body.parameters():
            parameter.requires_grad = False
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_classification_with_frozen_layers(tmp_path):
    lr = 1e-1

    def program(epochs):
        torch.manual_seed(0)
        net = Transfer()
        net = net.to('cpu')
        adam = torch.optim.Adam(net.parameters(), lr=lr)
        exp = nt.Experiment(
            net, Classes(48), Classes(20), adam, ClassificationStats(),
            output_dir=str(tmp_path / 'birdclass1'), perform_validation_during_training=True)
        exp.run(
            num_epochs=epochs,
            plot=lambda e: shown.append([e.history[k][0]['loss'] for k in range(e.epoch)]))
        return exp

    shown = []
    assert [name for name, _ in Transfer().named_parameters()] == ['head.weight', 'head.bias']
    assert len(Transfer().state_dict()) == 4
    torch.manual_seed(0)
    frozen = Transfer().body[0].weight.clone()
    exp = program(4)
    assert [len(losses) for losses in shown] == [0, 1, 2, 3, 4]
    assert torch.equal(exp.net.body[0].weight, frozen)
    assert exp.history[3][0]['loss'] < exp.history[0][0]['loss']
    assert exp.history[3][1]['accuracy'] > 60
    # As the client made it.
    accuracies = exp.history[3][1]['accuracy'], exp.evaluate()['accuracy']
    assert all(type(accuracy) is torch.Tensor for accuracy in accuracies)
    assert program(6).epoch == 6 and len(shown) == 5 + 3
    stored = torch.load(exp.checkpoint_path, weights_only=True)
    assert list(stored['Net']) == list(exp.net.state_dict()) and len(stored['History']) == 6
    assert exp.setting()['Net'] is exp.net and exp.setting()['BatchSize'] == 16
    with open(exp.config_path) as file:
        assert re.match(r'Net\(Transfer\(\n(.*\n)*TrainSet\(<.*Classes object at', file.read())
    lr = 1e-2
    with pytest.raises(ValueError):
        program(6)


@pytest.mark.parametrize('validation', [False, True])
def test_denoising_with_and_without_validation(tmp_path, validation):
    net = Denoiser()
    exp = nt.Experiment(
        net, Noisy(), Noisy(), torch.optim.Adam(net.parameters(), lr=1e-3), DenoisingStats(),
        str(tmp_path), 4, validation)
    curves = []

    def plot(exp, noisy):
        with torch.no_grad():
            denoised = exp.net(noisy[None].to(exp.net.device))[0]
        assert denoised.shape == noisy.shape
        if validation:
            training = [h[0]['PSNR'] for h in exp.history]
            curves.append((training, [exp.history[k][1]['PSNR'] for k in range(exp.epoch)]))
        else:
            curves.append([exp.history[k]['PSNR'] for k in range(exp.epoch)])

    exp.run(num_epochs=3, plot=lambda exp: plot(exp, Noisy()[0][0]))
    assert len(curves) == 4 and len(exp.history) == 3
    assert exp.evaluate()['PSNR'] == exp.evaluate()['PSNR']
    stored = torch.load(exp.checkpoint_path, weights_only=True)['Net']
    assert stored.keys() == net.state_dict().keys()


def test_the_training_loader_drops_the_short_batch(tmp_path):
    net = Denoiser()
    exp = nt.Experiment(
        net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(), str(tmp_path),
        4)
    assert [len(x) for x, d in exp.train_loader] == [4, 4]
    assert len(exp.train_loader) == 2 and len(exp.val_loader) == 3


class GANExperiment(nt.Experiment):
    def __init__(self, net, net_d, train_set, optimizer, optimizer_d, output_dir, batch_size=4):
        self.train_loader = td.DataLoader(
            train_set, batch_size=batch_size, shuffle=True, drop_last=True
        )
        self.net, self.net_d, self.optimizer, self.optimizer_d = net, net_d, optimizer, optimizer_d
        self.train_set, self.batch_size = train_set, batch_size
        self.device = 'cpu'
        self.history = []
        os.makedirs(output_dir, exist_ok=True)
        self.checkpoint_path = os.path.join(output_dir, 'checkpoint.pth.tar')
        self.config_path = os.path.join(output_dir, 'config.txt')
        if os.path.isfile(self.config_path):
            with open(self.config_path, 'r') as f:
                if f.read()[:-1] != repr(self):
                    raise ValueError('the settings differ')
            self.load()
        else:
            self.save()

    def setting(self):
        return {
            'NetG': self.net, 'NetD': self.net_d, 'TrainSet': self.train_set,
            'BatchSize': self.batch_size}

    def state_dict(self):
        return {
            'NetG': self.net.state_dict(), 'NetD': self.net_d.state_dict(),
            'OptimizerG': self.optimizer.state_dict(), 'OptimizerD': self.optimizer_d.state_dict(),
            'History': self.history}

    def load_state_dict(self, checkpoint):
        self.net.load_state_dict(checkpoint['NetG'])
        self.net_d.load_state_dict(checkpoint['NetD'])
        self.optimizer.load_state_dict(checkpoint['OptimizerG'])
        self.optimizer_d.load_state_dict(checkpoint['OptimizerD'])
        self.history = checkpoint['History']

    def run(self, num_epochs):
        for _ in range(self.epoch, num_epochs):
            for real in self.train_loader:
                fake = self.net(torch.randn(len(real), 2).to(self.device))
                self.optimizer_d.zero_grad()
                loss_d = (self.net_d(fake.detach()) - self.net_d(real)).mean()
                loss_d.backward()
                self.optimizer_d.step()
                self.optimizer.zero_grad()
                loss_g = -self.net_d(fake).mean()
                loss_g.backward()
                self.optimizer.step()
            self.history.append((loss_g.item(), loss_d.detach()))
            self.save()


def test_a_gan_that_never_calls_the_init(tmp_path):
    def program(epochs):
        torch.manual_seed(0)
        net, net_d = nn.Linear(2, 1), nn.Linear(1, 1)  # plain modules without device
        exp = GANExperiment(
            net, net_d, torch.randn(8, 1), torch.optim.SGD(net.parameters(), lr=0.1),
            torch.optim.SGD(net_d.parameters(), lr=0.1), str(tmp_path))
        exp.run(epochs)
        return exp

    first = program(2)
    second = program(4)
    assert second.epoch == 4 and second.history[:2] == first.history
    assert 'BatchSize(4)\n' in repr(second)
    assert not (tmp_path / 'checkpoint.pth.tar.tmp').exists()
    del second.history
    second.history = []
    second.load()
    assert second.epoch == 4


class ManualExperiment(nt.Experiment):
    """Sets its attributes itself, and inherits everything else."""

    def __init__(self, net, train_loader, optimizer, folder):
        self.net, self.optimizer, self.train_loader = net, optimizer, train_loader
        self.stats_manager, self.history = nt.StatsManager(), []
        self.checkpoint_path = f'{folder}/checkpoint.pth.tar'
        self.config_path = f'{folder}/config.txt'
        if os.path.isfile(self.checkpoint_path):
            self.load()


def test_inherited_run_without_init(tmp_path):
    def build():
        net = Net()
        return ManualExperiment(
            net, td.DataLoader(Data(), 4), torch.optim.Adam(net.parameters()), tmp_path
        )

    build().run(2)
    exp = build()
    exp.run(3)
    assert exp.epoch == 3 and all(type(loss) is float for loss in exp.history)
    assert [row['loss'] for row in exp.table()] == exp.history
    exp.val_loader = exp.train_loader
    assert exp.evaluate() > 0


def test_a_subclass_may_call_its_network_model(tmp_path):
    class Named(ManualExperiment):
        def __init__(self, net, *others):
            self.model = net
            super().__init__(net, *others)

    net = Net()
    exp = Named(net, td.DataLoader(Data(), 4), torch.optim.Adam(net.parameters()), tmp_path)
    exp.run(2)
    assert exp.model is net and exp.epoch == 2 and exp.history[1] < exp.history[0]


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.device = 'cpu'

    def forward(self, x):
        return self.layer(x)

    def criterion(self, y, d):
        return nn.functional.l1_loss(y, d)


def test_a_plain_module_and_the_base_statistics(tmp_path, capsys):
    torch.manual_seed(0)
    net = PlainNet()
    exp = nt.Experiment(
        net, Data(), Data(), torch.optim.SGD(net.parameters(), lr=0.1), nt.StatsManager(),
        str(tmp_path))
    exp.run(2)
    assert type(exp.history[1]) is float and exp.history[1] < exp.history[0]
    assert type(exp.evaluate()) is float and exp.net.device == 'cpu'
    both = nt.Experiment(
        net, Data(), Data(), torch.optim.SGD(net.parameters(), lr=0.1), nt.StatsManager(),
        str(tmp_path / 'both'), perform_validation_during_training=True)
    both.run(1)
    assert [type(value) for value in both.history[0]] == [float, float]
    assert both.table()[0]['val_loss'] == both.history[0][1] == both.best[1]
    exp.device = 'meta'  # the attribute is for clients; nothing is sent there
    exp.run(3)


def test_experiments_that_share_everything(tmp_path):
    def program():
        torch.manual_seed(0)
        net, stats = Net(), nt.StatsManager()
        adam = torch.optim.Adam(net.parameters(), lr=1e-2)
        exp1 = nt.Experiment(net, Data(), Data(), adam, stats, output_dir=str(tmp_path / 'exp1'))
        exp2 = nt.Experiment(
            net, Data(12), Data(), adam, stats, output_dir=str(tmp_path / 'exp2'), batch_size=3
        )
        exp1.run(num_epochs=3)
        exp2.run(num_epochs=2)
        return exp1, exp2

    exp1, exp2 = program()
    weights = {k: v.clone() for k, v in exp2.net.state_dict().items()}
    assert (exp1.epoch, exp2.epoch) == (3, 2) and exp1.net is exp2.net
    again1, again2 = program()  # nothing left to do, and the network is the last one
    assert again2.history == exp2.history and same(weights, dict(again2.net.state_dict()))


def test_networks_are_abstract():
    with pytest.raises(TypeError):
        nt.NeuralNetwork()
    with pytest.raises(TypeError):
        Classifier()
