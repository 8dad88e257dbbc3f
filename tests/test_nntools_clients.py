"""Programs in the manner of those written for the course's helper of 2019, and its checkpoints.

One client for each kind: they use what the helper of 2019 had, and nothing else.
"""
import os
import re

import numpy as np
import pytest
import torch
import torch.utils.data as td
from test_nntools import Data, Net, content, same, without_settings
from torch import nn

import nntools as nt

# --- classification with frozen layers ------------------------------------------------------------

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
        return {'loss': loss, 'accuracy': 100 * self.running_accuracy / self.number_update}  # a 0-d tensor


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


def test_classification_with_frozen_layers(tmp_path):
    lr = 1e-1

    def program(epochs):
        torch.manual_seed(0)
        net = Transfer()
        net = net.to('cpu')
        adam = torch.optim.Adam(net.parameters(), lr=lr)
        exp = nt.Experiment(net, Classes(48), Classes(20), adam, ClassificationStats(),
                            output_dir=str(tmp_path / 'birdclass1'), perform_validation_during_training=True)
        exp.run(num_epochs=epochs, plot=lambda e: shown.append([e.history[k][0]['loss'] for k in range(e.epoch)]))
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
    assert all(type(a) is torch.Tensor for a in (exp.history[3][1]['accuracy'], exp.evaluate()['accuracy']))  # as the client made it
    assert program(6).epoch == 6 and len(shown) == 5 + 3
    stored = torch.load(exp.checkpoint_path, weights_only=True)
    assert list(stored['Net']) == list(exp.net.state_dict()) and len(stored['History']) == 6
    assert exp.setting()['Net'] is exp.net and exp.setting()['BatchSize'] == 16
    with open(exp.config_path) as file:
        assert re.match(r'Net\(Transfer\(\n(.*\n)*TrainSet\(<.*Classes object at', file.read())
    lr = 1e-2
    with pytest.raises(ValueError):
        program(6)


# --- denoising, with and without validation ---------------------------------------------------------

class Denoiser(nt.NeuralNetwork):
    def __init__(self):
        super(Denoiser, self).__init__()
        self.mse = nn.MSELoss()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def criterion(self, y, d):
        return self.mse(y, d)

    def forward(self, x):
        return self.conv(x)


class DenoisingStats(nt.StatsManager):
    def init(self):
        super(DenoisingStats, self).init()
        self.running_psnr = 0

    def accumulate(self, loss, x, y, d):
        super(DenoisingStats, self).accumulate(loss, x, y, d)
        n = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]
        self.running_psnr += 10 * torch.log10(4 * n / (torch.norm(y - d) ** 2))

    def summarize(self):
        loss = super(DenoisingStats, self).summarize()
        return {'loss': loss, 'PSNR': np.float64((self.running_psnr / self.number_update).cpu())}


class Noisy(td.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, k):
        clean = torch.full((1, 6, 6), k / 10)
        return clean + torch.randn(1, 6, 6), clean

    def __repr__(self):
        return 'Noisy(mode=train, sigma=30)'


@pytest.mark.parametrize('validation', [False, True])
def test_denoising(tmp_path, validation):
    net = Denoiser()
    exp = nt.Experiment(net, Noisy(), Noisy(), torch.optim.Adam(net.parameters(), lr=1e-3), DenoisingStats(),
                        str(tmp_path), 4, validation)
    curves = []

    def plot(exp, noisy):
        with torch.no_grad():
            denoised = exp.net(noisy[None].to(exp.net.device))[0]
        assert denoised.shape == noisy.shape
        if validation:
            curves.append(([h[0]['PSNR'] for h in exp.history], [exp.history[k][1]['PSNR'] for k in range(exp.epoch)]))
        else:
            curves.append([exp.history[k]['PSNR'] for k in range(exp.epoch)])

    exp.run(num_epochs=3, plot=lambda exp: plot(exp, Noisy()[0][0]))
    assert len(curves) == 4 and len(exp.history) == 3
    assert exp.evaluate()['PSNR'] == exp.evaluate()['PSNR']
    assert torch.load(exp.checkpoint_path, weights_only=True)['Net'].keys() == net.state_dict().keys()


def test_the_training_loader_drops_the_short_batch(tmp_path):
    net = Denoiser()
    exp = nt.Experiment(net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(), str(tmp_path), 4)
    assert [len(x) for x, d in exp.train_loader] == [4, 4]
    assert len(exp.train_loader) == 2 and len(exp.val_loader) == 3


def test_who_iterates_the_training_loader_gets_new_orders(tmp_path):
    """A subclass with a `run` of its own does: each of its epochs must be shuffled anew."""
    net = Net()
    exp = nt.Experiment(net, Data(), Data(), torch.optim.Adam(net.parameters()), nt.StatsManager(), str(tmp_path))
    orders = [[x[:, 2].tolist() for x, d in exp.train_loader] for _ in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


# --- a GAN that brings its own set-up and its own run -------------------------------------------------

class GANExperiment(nt.Experiment):
    def __init__(self, net, net_d, train_set, optimizer, optimizer_d, output_dir, batch_size=4):
        self.train_loader = td.DataLoader(train_set, batch_size=batch_size, shuffle=True, drop_last=True)
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
        return {'NetG': self.net, 'NetD': self.net_d, 'TrainSet': self.train_set, 'BatchSize': self.batch_size}

    def state_dict(self):
        return {'NetG': self.net.state_dict(), 'NetD': self.net_d.state_dict(),
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
        exp = GANExperiment(net, net_d, torch.randn(8, 1), torch.optim.SGD(net.parameters(), lr=0.1),
                            torch.optim.SGD(net_d.parameters(), lr=0.1), str(tmp_path))
        exp.run(epochs)
        return exp

    first = program(2)
    second = program(4)
    assert second.epoch == 4 and second.history[:2] == first.history and 'BatchSize(4)\n' in repr(second)
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
        self.checkpoint_path, self.config_path = f'{folder}/checkpoint.pth.tar', f'{folder}/config.txt'
        if os.path.isfile(self.checkpoint_path):
            self.load()


def test_inherited_run_without_init(tmp_path):
    def build():
        net = Net()
        return ManualExperiment(net, td.DataLoader(Data(), 4), torch.optim.Adam(net.parameters()), tmp_path)

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


# --- a plain module, shared networks, bare statistics -------------------------------------------------

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
    exp = nt.Experiment(net, Data(), Data(), torch.optim.SGD(net.parameters(), lr=0.1), nt.StatsManager(), str(tmp_path))
    exp.run(2)
    assert type(exp.history[1]) is float and exp.history[1] < exp.history[0]
    assert type(exp.evaluate()) is float and exp.net.device == 'cpu'
    both = nt.Experiment(net, Data(), Data(), torch.optim.SGD(net.parameters(), lr=0.1), nt.StatsManager(),
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
        exp2 = nt.Experiment(net, Data(12), Data(), adam, stats, output_dir=str(tmp_path / 'exp2'), batch_size=3)
        exp1.run(num_epochs=3)
        exp2.run(num_epochs=2)
        return exp1, exp2

    exp1, exp2 = program()
    weights = {k: v.clone() for k, v in exp2.net.state_dict().items()}
    assert (exp1.epoch, exp2.epoch) == (3, 2) and exp1.net is exp2.net
    again1, again2 = program()  # nothing left to do, and the network is the last one
    assert again2.history == exp2.history and same(weights, dict(again2.net.state_dict()))


@pytest.mark.parametrize('summary', [
    {'accuracy': torch.tensor(0.5)}, {'loss': np.float32(0.5), 'top': np.int64(3)}, torch.tensor(1.5), np.float64(2),
    {'loss': 0.1, 'confusion': np.eye(2), 'per class': [torch.tensor(1.0)], 'nested': {'a': np.bool_(True)}},
    (0.5, 0.25), (1, 2, 3)], ids=str)
@pytest.mark.parametrize('validation', [False, True])
def test_summaries_of_all_kinds(tmp_path, summary, validation):
    class Any(nt.StatsManager):
        def summarize(self):
            return summary

    def build():
        net = Net()
        return nt.Experiment(net, Data(), Data(), torch.optim.Adam(net.parameters()), Any(), str(tmp_path),
                             perform_validation_during_training=validation)

    build().run(1)
    exp = build()
    exp.run(2)
    assert exp.epoch == 2 and same(exp.history[0], exp.history[1])
    entry = exp.history[0][1] if validation else exp.history[0]
    if isinstance(summary, dict):
        assert entry.keys() == summary.keys()
        value = entry[next(iter(summary))]
        kept = torch.Tensor if isinstance(summary.get('accuracy'), torch.Tensor) else float
        assert type(value) is kept and value == float(summary[next(iter(summary))])
    exp.to_csv(tmp_path / 'table.csv')
    assert len(exp.table()) == 2


class OwnCount(nt.StatsManager):
    """Keeps the sums of 2019 without the base class, but for the mean."""

    def init(self):
        self.running_loss, self.number_update = 0, 0

    def accumulate(self, loss, x, y, d):
        self.running_loss += loss
        self.number_update += 1

    def summarize(self):
        return {'loss': super().summarize()}


class OwnInit(OwnCount):
    """Lets the base class count, but not begin."""

    def accumulate(self, loss, x, y, d):
        nt.StatsManager.accumulate(self, loss, x, y, d)


@pytest.mark.parametrize('kind', [OwnCount, OwnInit])
def test_statistics_that_count_by_themselves(tmp_path, kind):
    net = Net()
    exp = nt.Experiment(net, Data(), Data(8), torch.optim.Adam(net.parameters()), kind(), str(tmp_path), 4)
    exp.run(2)
    first = exp.evaluate()
    assert first == exp.evaluate() and exp.stats_manager.number_update == 2
    base = nt.Experiment(net, Data(), Data(8), exp.optimizer, nt.StatsManager(), str(tmp_path / 'base'), 4)
    assert first['loss'] == pytest.approx(base.evaluate())


def test_abstract_network():
    with pytest.raises(TypeError):
        nt.NeuralNetwork()
    with pytest.raises(TypeError):
        Classifier()


# --- checkpoints of 2019 ----------------------------------------------------------------------------

CONFIG = '''Net(Denoiser(
  (mse): MSELoss()
  (conv): Conv2d(1, 1, kernel_size=(3, 3), stride=(1, 1), padding=1, old_words)
))
TrainSet(<__main__.Noisy2019 object at 0x7f3c5c0b9c50>)
ValSet(<__main__.Noisy2019 object at 0x7f3c5c0b9d68>)
Optimizer(Adam (
Parameter Group 0
    amsgrad: False
    betas: (0.9, 0.999)
    eps: 1e-08
    initial_lr: 0.001
    lr: 1e-05
    weight_decay: 0
))
StatsManager(DenoisingStats)
BatchSize(4)
PerformValidationDuringTraining(True)

'''


class Noisy2019(Noisy):
    __repr__ = td.Dataset.__repr__


def write_2019(folder, history, zipped, config=CONFIG):
    """A checkpoint as the helper of 2019 wrote it with the torch of its day."""
    torch.manual_seed(3)
    net = Denoiser()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        net.criterion(net(torch.randn(2, 1, 6, 6)), torch.zeros(2, 1, 6, 6)).backward()
        adam.step()
    optimizer = adam.state_dict()
    for state in optimizer['state'].values():
        state['step'] = int(state['step'])  # a tensor today
    for group in optimizer['param_groups']:
        for key in set(group) - {'lr', 'betas', 'eps', 'weight_decay', 'amsgrad', 'params'}:
            del group[key]
        group |= {'initial_lr': 1e-3, 'lr': 1e-5}
        group['params'] = [139804, 139905]  # ids, then
    optimizer['state'] = dict(zip([139804, 139905], optimizer['state'].values()))
    folder.mkdir()
    if config:
        (folder / 'config.txt').write_text(config)
    path = folder / 'checkpoint.pth.tar'
    torch.save({'Net': net.state_dict(), 'Optimizer': optimizer, 'History': history}, path,
               _use_new_zipfile_serialization=zipped)
    return net.state_dict()


HISTORIES = {
    'tensors': [({'loss': 0.5, 'PSNR': torch.tensor(20.0)}, {'loss': 0.4, 'PSNR': torch.tensor(21.0)})] * 2,
    'numbers of numpy': [({'loss': np.float64(0.5), 'PSNR': np.float32(20.0)},
                          {'loss': np.float64(0.4), 'PSNR': np.float64(21.0)})] * 2,
    'arrays': [({'loss': 0.5, 'PSNR': np.array(20.0)}, {'loss': 0.4, 'PSNR': np.array([21.0])})] * 2,
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', HISTORIES)
def test_a_checkpoint_of_2019_loads_and_goes_on(tmp_path, kind, zipped):
    weights = write_2019(tmp_path / 'a', HISTORIES[kind], zipped)
    net = Denoiser()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    exp = nt.Experiment(net, Noisy2019(), Noisy2019(), adam, DenoisingStats(), str(tmp_path / 'a'), 4, True)
    assert exp.epoch == 2 and same(dict(net.state_dict()), dict(weights))
    assert exp.history[0][0] == {'loss': 0.5, 'PSNR': 20.0} and np.allclose(exp.history[1][1]['PSNR'], 21.0)
    assert adam.param_groups[0]['lr'] == 1e-5 and adam.state[net.conv.weight]['step'] == 3
    exp.run(num_epochs=4)
    assert exp.epoch == 4 and adam.state[net.conv.weight]['step'] == 7
    assert [row['seconds'] > 0 for row in exp.table()] == [False, False, True, True]
    again = Denoiser()
    assert nt.Experiment(again, Noisy2019(), Noisy2019(), torch.optim.Adam(again.parameters(), lr=1e-3),
                         DenoisingStats(), str(tmp_path / 'a'), 4, True).epoch == 4
    assert same(dict(again.state_dict()), dict(net.state_dict()))


def test_numbers_under_the_old_path_of_numpy(tmp_path):
    """As numpy 1 wrote them, by the protocol of torch.save: the global numpy.core.multiarray.scalar."""
    write_2019(tmp_path / 'a', HISTORIES['numbers of numpy'], zipped=False)
    path = tmp_path / 'a' / 'checkpoint.pth.tar'
    old = path.read_bytes().replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')
    assert b'numpy.core.multiarray' in old
    path.write_bytes(old)
    history = nt.load_checkpoint(str(path), 'cpu')['History']
    assert history[0][0]['loss'] == 0.5 and history[0][1]['PSNR'] == 21.0


def test_a_checkpoint_of_2019_without_config(tmp_path):
    write_2019(tmp_path / 'a', HISTORIES['tensors'], True, config=None)
    net = Denoiser()
    exp = nt.Experiment(net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(),
                        str(tmp_path / 'a'), 4, True)
    exp.run(3)
    assert exp.epoch == 3 and 'BatchSize(4)' in (tmp_path / 'a' / 'config.txt').read_text()


def test_a_gan_of_2019_that_calls_the_init(tmp_path):
    """Its settings name two networks, which torch printed otherwise."""
    class Two(nt.Experiment):
        net_d = nn.Sequential(nn.Linear(1, 4), nn.ReLU(inplace=True))

        def setting(self):
            return super().setting() | {'NetD': self.net_d, 'Criterion': nn.MSELoss()}

        def state_dict(self):
            return super().state_dict() | {'NetD': self.net_d.state_dict()}

        def load_state_dict(self, checkpoint):
            super().load_state_dict(checkpoint)
            self.net_d.load_state_dict(checkpoint['NetD'])

    def build():
        net = Denoiser()
        return Two(net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(), str(tmp_path), 4)

    build().run(1)
    without_settings(tmp_path, ('ReLU(inplace=True)', 'ReLU(inplace)'))
    assert build().epoch == 1
    without_settings(tmp_path, ('NetD(Sequential', 'NetD(Other'))
    with pytest.raises(ValueError, match='NetD: stored Other, given Sequential'):
        build()


@pytest.mark.parametrize('old, new, name', [
    ('BatchSize(4)', 'BatchSize(8)', 'BatchSize: stored 8, given 4'), ('initial_lr: 0.001', 'initial_lr: 0.01', 'Optimizer'),
    ('betas: (0.9, 0.999)', 'betas: (0.5, 0.999)', 'Optimizer'), ('Adam (', 'SGD (', 'Optimizer'),
    ('ValSet(<__main__.Noisy2019', 'ValSet(<__main__.Other', 'ValSet: stored <Other object>'),
    ('Training(True)', 'Training(False)', 'stored False, given True'), ('DenoisingStats', 'MyStats', 'StatsManager')])
def test_real_conflicts_with_a_checkpoint_of_2019(tmp_path, old, new, name):
    assert CONFIG.count(old) == 1
    write_2019(tmp_path / 'a', HISTORIES['tensors'], True, CONFIG.replace(old, new))
    saved = content(tmp_path / 'a')
    net = Denoiser()
    with pytest.raises(ValueError, match=name):
        nt.Experiment(net, Noisy2019(), Noisy2019(), torch.optim.Adam(net.parameters()), DenoisingStats(),
                      str(tmp_path / 'a'), 4, True)
    assert content(tmp_path / 'a') == saved
