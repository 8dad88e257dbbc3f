"""nntools: the loop, the statistics, the checkpoints, the settings, and wrong uses.

The programs written for the course's helper are in test_nntools_clients.py, the killed processes
and torchrun in test_nntools_resume.py.
"""
import contextlib
import csv
import math
import os
import random
import re
import textwrap

import numpy as np
import pytest
import torch
import torch.utils.data as td
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import nntools as nt

torch.set_num_threads(1)
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, which Windows does not')


class Net(nt.NeuralNetwork):
    def __init__(self, width=4, dropout=0.0, outputs=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the same at each call
            self.hidden = nn.Linear(3, width)
            self.norm = nn.BatchNorm1d(width)
            self.drop = nn.Dropout(dropout)
            self.out = nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.norm(self.hidden(x)))))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Data(td.Dataset):
    """Pairs that are a function of the index, with noise from the global generators if wanted."""

    def __init__(self, n=22, noise=0.0, bad=None):
        self.n, self.noise, self.bad = n, noise, bad

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        x = torch.tensor([math.sin(k), math.cos(k), k / self.n])
        if self.noise:
            x = x + self.noise * (torch.randn(3) + random.random() + float(np.random.rand()))
        return x * (math.nan if k == self.bad else 1), x.sum(0, keepdim=True)

    def __repr__(self):
        return f'Data({self.n}, {self.noise})'


class Stats(nt.StatsManager):
    def init(self):
        super().init()
        self.error = 0.0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.error += (y - d).abs().sum().item()

    def summarize(self):
        return {'loss': super().summarize(), 'error': self.error / self.number_samples}


def make(folder, net=None, train=None, val=None, *, lr=0.01, optimizer=None, stats=None, scheduler=None, **options):
    """A small experiment, the same at each call."""
    net = Net() if net is None else net  # a compiled network has a length
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=lr)
    options = {'batch_size': 4, 'seed': 0, 'output_dir': str(folder)} | options
    return nt.Experiment(net, Data() if train is None else train, Data(7) if val is None else val,
                         optimizer, stats or Stats(), scheduler=scheduler and scheduler(optimizer), **options)


def same(a, b):
    """Whether two nested structures are alike, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def end(exp):
    """What must be alike after two runs that should be alike."""
    return {name: value for name, value in exp.state_dict().items() if name != 'Seconds'}


def without_settings(folder, *changes):
    """Makes a checkpoint one of the first edition, whose settings were the text of config.txt; texts in it are replaced."""
    path, config = folder / 'checkpoint.pth.tar', folder / 'config.txt'
    state = nt.load_checkpoint(path)
    torch.save({name: value for name, value in state.items() if name not in ('Setting', 'Format')}, path)
    text = config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


# --- the module's example ------------------------------------------------------------------------

def test_the_docstring_is_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = textwrap.dedent(nt.__doc__.split('::\n', 1)[1].split('\nRun it twice')[0])
    for _ in range(2):
        torch.manual_seed(0)
        exec(code, {'__name__': 'example'})
    first, second = capsys.readouterr().out.split('Finish training for 20 epochs\n')[:2]
    assert 'Start/Continue training from epoch 0' in first and 'Epoch 20/20: loss' in first
    assert 'from epoch 20' in second and 'Epoch 1/' not in second
    assert float(second.splitlines()[0]) < 0.1  # 3x + 1 has been learnt


# --- the loop ------------------------------------------------------------------------------------

def test_run_is_the_total_and_goes_on(tmp_path):
    def plot(e):
        assert not e.net.training  # what is drawn must not change the batch norms
        calls.append(e.epoch)

    exp, calls = make(tmp_path), []
    exp.net.train()
    exp.run(num_epochs=2, plot=plot)
    exp.run(num_epochs=5, plot=plot)
    exp.run(num_epochs=3, plot=plot)
    assert calls == [0, 1, 2, 2, 3, 4, 5, 5]
    assert exp.epoch == len(exp.history) == 5
    assert all(type(value) is float for row in exp.history for value in row.values())
    assert exp.history[-1]['loss'] < exp.history[0]['loss']


def test_the_loop_is_that_of_plain_pytorch(tmp_path):
    """The same weights as a loop by hand over the batches that the experiment saw."""
    class Watch(Stats):
        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            batches.append((x.clone(), d.clone()))

    batches = []
    exp = make(tmp_path, stats=Watch(), train=Data(noise=0.1))
    exp.run(2)
    assert len(batches) == 10 and all(len(x) == 4 for x, _ in batches)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for x, d in batches:
        optimizer.zero_grad()
        net.criterion(net(x), d).backward()
        optimizer.step()
    assert same(net.state_dict(), exp.net.state_dict())


def test_every_sample_once_an_epoch_in_a_new_order(tmp_path):
    class Seen(Stats):
        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            seen.extend(round(v * 22) for v in x[:, 2].tolist())

    seen = []
    make(tmp_path, stats=Seen(), drop_last=False).run(2)
    assert sorted(seen[:22]) == sorted(seen[22:]) == list(range(22))
    assert seen[:22] != seen[22:] != list(range(22))


def test_the_random_stream_stays_what_it_was(tmp_path):
    """Trainings that were begun with an earlier version of the file go on with this one."""
    class Watch(nt.Experiment):
        def step(self, batch):
            drawn.extend([torch.rand(1).item(), random.random(), np.random.rand()])
            order.extend(round(22 * v) for v in batch[0][:, 2].tolist())
            return super().step(batch)

    net, order, drawn = Net(), [], []
    Watch(net, Data(), Data(7), torch.optim.Adam(net.parameters()), Stats(), str(tmp_path), 4, seed=0).run(1)
    assert nt.mix_seeds(0, 1, 0) == 2918264622725855778
    assert order[:8] == [9, 6, 12, 18, 20, 14, 8, 19]
    assert drawn[:3] == pytest.approx([0.8556534051895142, 0.23069021445216942, 0.26373721948458095])


@pytest.mark.parametrize('options', [
    {}, {'perform_validation_during_training': True, 'best_by': 'loss'}, {'num_workers': 2},
    {'scheduler': lambda o: lr_scheduler.StepLR(o, 2)}, {'precision': 'bfloat16', 'grad_clip': 0.1},
    {'scheduler': lambda o: lr_scheduler.MultiStepLR(o, [2, 4])},
    {'scheduler': lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8)},
    {'scheduler': lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.5)},
    {'scheduler': lambda o: lr_scheduler.SequentialLR(o, [
        lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2])},
    {'scheduler': lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9 ** epoch)},
    {'save_every': 2},
], ids=lambda options: '-'.join(options) + str(options.get('scheduler', lambda o: '').__code__.co_names[1:3]))
def test_a_resumed_run_is_the_same_run(tmp_path, options):
    def build(name):
        return make(tmp_path / name, Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1), **options)

    whole = build('whole')
    whole.run(5)
    for epochs in (1, 3, 5):  # a new process each time
        torch.rand(epochs)
        parts = build('parts')
        parts.run(epochs, plot=lambda e: (torch.rand(3), np.random.rand(), e.evaluate()))
    assert same(end(whole), end(parts))
    assert len(parts.seconds) == 5
    other = make(tmp_path / 'other', Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1), **options | {'seed': 7})
    other.run(5)
    assert not same(other.net.state_dict(), whole.net.state_dict())  # the seed matters


def test_schedulers_do_change_the_rate(tmp_path):
    exp = make(tmp_path, scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.1))
    exp.run(4)
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(1e-4)
    plateau = make(tmp_path / 'p', scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=0, threshold=10.0, threshold_mode='abs'), best_by='error')
    plateau.run(2)
    assert plateau.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3)


def test_gradient_clipping(tmp_path):
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]['params']]).norm().item())
            return super().step(closure)

    net = Net()
    make(tmp_path, net, optimizer=Spy(net.parameters(), lr=0.1), grad_clip=0.05).run(1)
    assert max(norms) <= 0.0501 and max(norms) > 0.049


def test_precision(tmp_path):
    kinds = []

    class Spy(Net):
        def criterion(self, y, d):
            kinds.append((self.training, y.dtype))
            return super().criterion(y.float(), d)

    exp = make(tmp_path, Spy(), precision='bfloat16', perform_validation_during_training=True)
    exp.run(2)
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(p.dtype == torch.float32 for p in exp.net.parameters())
    assert exp.history[1][0]['loss'] < exp.history[0][0]['loss']


def test_loss_scaling_is_kept_in_the_checkpoint(tmp_path):
    """As on CUDA, with torch's scaler for the CPU."""
    def build(name):
        return make(tmp_path / name, precision='float16', grad_clip=0.5)

    whole = build('whole')
    whole.run(3)
    build('parts').run(2)
    parts = build('parts')
    assert parts.state_dict()['Scaler']['_growth_tracker'] > 0
    parts.run(3)
    assert same(end(whole), end(parts)) and whole.state_dict()['Scaler']['_growth_tracker'] >= 10
    assert whole.history[2]['loss'] < whole.history[0]['loss']


def test_own_loaders_and_collate(tmp_path):
    generator = torch.Generator()
    train = td.DataLoader(Data(noise=0.1), 5, shuffle=True, generator=generator, drop_last=True)
    val = td.DataLoader(Data(7), 3)
    exp = make(tmp_path / 'a', train=train, val=val)
    assert exp.train_loader is train and exp.val_loader is val
    exp.run(3)
    again = make(tmp_path / 'b', train=train, val=val)
    again.run(2)
    torch.rand(5, generator=generator)
    make(tmp_path / 'b', exp_net := Net(), train=train, val=val).run(3)
    assert same(exp_net.state_dict(), exp.net.state_dict())

    def collate(samples):
        return torch.stack([x for x, _ in samples]), 1 + torch.stack([d for _, d in samples])

    exp = make(tmp_path / 'c', collate_fn=collate)
    assert exp.evaluate()['error'] > make(tmp_path / 'd').evaluate()['error'] + 0.5


def test_iterable_data_in_an_own_loader(tmp_path):
    class Stream(td.IterableDataset):
        def __iter__(self):
            return (Data()[k] for k in range(10))

    exp = make(tmp_path, train=td.DataLoader(Stream(), 4))
    exp.run(2)
    assert exp.stats_manager.number_samples == 10 and exp.epoch == 2


def test_evaluation_covers_every_sample_with_its_weight(tmp_path):
    exp = make(tmp_path, val=Data(7), batch_size=4)
    exp.run(1)
    with torch.no_grad():
        errors = [(exp.net.eval()(x[None]) - d).abs().item() for x, d in map(Data(7).__getitem__, range(7))]
        losses = [(exp.net(x[None]) - d).square().item() for x, d in map(Data(7).__getitem__, range(7))]
    assert exp.evaluate() == {'loss': pytest.approx(np.mean(losses)), 'error': pytest.approx(np.mean(errors))}
    assert exp.stats_manager.number_samples == 7
    exp.evaluate(td.DataLoader(Data(5), 2))
    assert exp.stats_manager.number_samples == 5
    old = make(tmp_path / 'old', val=Data(7), drop_last_in_evaluation=True)
    old.evaluate()
    assert old.stats_manager.number_samples == 4


class Pair(Data):
    """Inputs in two parts."""

    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return {'a': x, 'b': [x, x]}, d


def test_samples_are_counted_in_inputs_of_parts(tmp_path):
    class Joining(Net):
        def forward(self, x):
            return super().forward(x['a'] + x['b'][0] - x['b'][1])

        def criterion(self, y, d):
            return super().criterion(y, d)[None]  # one element, though not a scalar

    exp = make(tmp_path / 'pairs', Joining(), Pair(), Pair(7), stats=nt.StatsManager())
    whole = make(tmp_path / 'whole', stats=nt.StatsManager())
    exp.run(1)
    whole.run(1)
    assert exp.stats_manager.number_samples == 20 and exp.history[0] == pytest.approx(whole.history[0])
    assert exp.evaluate() == pytest.approx(whole.evaluate())


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


def test_numbers_of_numpy_and_paths(tmp_path):
    exp = make(tmp_path / 'a', batch_size=np.int64(4), seed=np.int64(3), grad_clip=1)
    exp.run(np.int64(1))
    net = Net()
    exp = nt.Experiment(net, Data(), Data(7), torch.optim.Adam(net.parameters(), lr=0.01), Stats(), tmp_path / 'a',
                        4, seed=3, grad_clip=1.0)
    assert exp.epoch == 1
    exp.save(tmp_path / 'copies' / 'one.tar')
    exp.load(tmp_path / 'copies' / 'one.tar')


def test_a_validation_set_smaller_than_a_batch(tmp_path):
    exp = make(tmp_path, val=Data(1), perform_validation_during_training=True)
    exp.run(1)
    assert math.isfinite(exp.history[0][1]['loss'])


def test_predict(tmp_path):
    exp = make(tmp_path, Net(dropout=0.9))
    x = torch.stack([Data()[k][0] for k in range(22)])
    exp.net.train()
    y = exp.predict(x)
    assert exp.net.training and y.shape == (22, 1) and not y.requires_grad
    assert torch.allclose(y, exp.net.eval()(x), atol=1e-6)
    assert torch.equal(y, exp.predict(Data())) and torch.equal(y, exp.predict(td.DataLoader(Data(), 4)))


@pytest.mark.parametrize('act', ['run', 'evaluate', 'predict', 'make'])
def test_the_random_numbers_of_the_caller_are_left_alone(tmp_path, act):
    exp = make(tmp_path, Net(dropout=0.5), Data(noise=0.1), Data(7, noise=0.1))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if act == 'run':
        exp.run(1)
    elif act == 'make':
        nt.Experiment(exp.net, Data(), Data(), exp.optimizer, Stats(), str(tmp_path / 'new'))
    else:
        getattr(exp, act)(Data(noise=0.1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_evaluation_repeats_itself_and_keeps_the_mode(tmp_path):
    exp = make(tmp_path, Net(dropout=0.5), val=Data(7, noise=1.0))
    for training in (True, False):
        exp.net.train(training)
        first = exp.evaluate()
        torch.rand(3)
        assert exp.evaluate() == first and exp.net.training is training


def test_stop(tmp_path):
    exp = make(tmp_path, save_every=5)

    def patience(e):
        if e.epoch == 3:
            e.stop()

    exp.run(10, plot=patience)
    assert exp.epoch == 3 and make(tmp_path, save_every=5).epoch == 3  # the stop has been saved too
    exp.run(10, plot=patience)
    assert exp.epoch == 3
    exp.run(4)
    assert exp.epoch == 4


def test_best_is_kept_beside_the_last_and_survives_a_resume(tmp_path):
    def build():
        return make(tmp_path, best_by='error', best_mode='max', perform_validation_during_training=True, lr=0.03)

    exp = build()
    exp.run(3)
    exp = build()
    exp.run(6)
    errors = [val['error'] for _, val in exp.history]
    k = errors.index(max(errors)) + 1
    assert exp.best == (k, max(errors)) and k < 6
    last = exp.evaluate()
    assert last['error'] == pytest.approx(errors[-1])
    exp.load(exp.best_path)
    assert exp.epoch == k and exp.evaluate()['error'] == pytest.approx(max(errors))
    exp.load()
    assert exp.epoch == 6


def test_table_and_csv(tmp_path):
    exp = make(tmp_path, perform_validation_during_training=True)
    assert exp.table() == []
    exp.run(2)
    exp.to_csv(tmp_path / 'h' / 'history.csv')
    rows = list(csv.DictReader(open(tmp_path / 'h' / 'history.csv')))
    assert list(rows[0]) == ['epoch', 'loss', 'error', 'val_loss', 'val_error', 'seconds']
    assert [float(row['val_error']) for row in rows] == [val['error'] for _, val in exp.history]


def test_the_recipe_for_tensorboard(tmp_path):
    """The callback of README.md, with a writer that takes notes."""
    class Writer:
        def add_scalar(self, name, value, epoch):
            notes.append((epoch, name, value))

    def log(exp):
        for name, value in exp.table()[-1].items() if exp.epoch else ():
            writer.add_scalar(name, value, exp.epoch)

    notes, writer = [], Writer()
    exp = make(tmp_path)
    exp.run(2, plot=log)
    assert [(epoch, name) for epoch, name, _ in notes if name == 'loss'] == [(1, 'loss'), (2, 'loss')]
    assert [value for _, name, value in notes if name == 'error'] == [row['error'] for row in exp.history]


def test_quiet_without_a_terminal_and_one_line_an_epoch(tmp_path, capsys, monkeypatch):
    exp = make(tmp_path)
    exp.run(2)
    out, err = capsys.readouterr()
    assert err == '' and len(out.splitlines()) == 4
    assert out.splitlines()[1].startswith('Epoch 1/2: loss ')
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    monkeypatch.setitem(os.environ, 'CI', 'true')
    exp.run(3)
    assert capsys.readouterr().err == ''
    monkeypatch.delitem(os.environ, 'CI')
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr('tqdm.std.tqdm.monitor_interval', 0)
    monkeypatch.setattr(nt, 'tqdm', lambda **k: __import__('tqdm').tqdm(mininterval=0, **k))
    monkeypatch.setattr(nt.tqdm, 'external_write_mode', contextlib.nullcontext, raising=False)
    exp.run(5)
    out, err = capsys.readouterr()
    assert 'Epoch 4/5' in err and 'Epoch 5/5' in err and '5/5' in err and 'loss' in err and '100%' in err
    assert len(out.splitlines()) == 4


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_means_do_not_depend_on_the_batches(samples, batch, outputs):
    """The loss of the base statistics is the mean over samples, however they are grouped."""
    losses = torch.rand(samples, generator=torch.Generator().manual_seed(samples)).double()
    stats = nt.StatsManager()
    stats.init()
    for part in losses.split(batch):
        stats.accumulate(part.mean().item(), torch.zeros(len(part), outputs), None, None)
    assert stats.summarize() == pytest.approx(losses.mean().item())
    assert stats.number_update == math.ceil(samples / batch) and stats.number_samples == samples


# --- other shapes of training ---------------------------------------------------------------------

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


class Adversarial(nt.Experiment):
    def step(self, x):
        net = self.net
        fake = net(torch.randn(len(x), 2))
        loss_d = net.criterion(net.discriminator(x), 1) + net.criterion(net.discriminator(fake.detach()), 0)
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


def test_a_gan_with_two_optimizers(tmp_path):
    data = 3 + 0.1 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))

    def build(name):
        torch.manual_seed(0)
        net = GAN()
        adam_g = torch.optim.Adam(net.generator.parameters(), lr=0.01, betas=(0.0, 0.9))
        adam_d = torch.optim.Adam(net.discriminator.parameters(), lr=0.02, betas=(0.0, 0.9))
        return Adversarial(net, data, data, adam_g, AdversarialStats(), output_dir=str(tmp_path / name),
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


# --- interrupts and losses that are not finite ------------------------------------------------------

class Interrupted(Data):
    """Raises KeyboardInterrupt, as Ctrl-C does, at the n-th access."""

    def __init__(self, after, **options):
        super().__init__(**options)
        self.after = after

    def __getitem__(self, k):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt
        return super().__getitem__(k)


@pytest.mark.parametrize('save_every', [1, 4])
@pytest.mark.parametrize('where', ['first epoch', 'third epoch', 'callback'])
def test_ctrl_c_falls_back_and_a_new_run_goes_on(tmp_path, capsys, where, save_every):
    whole = make(tmp_path / 'whole', Net(dropout=0.5), Data(noise=0.1), save_every=save_every)
    whole.run(5)
    data = Interrupted({'first epoch': 7, 'third epoch': 53, 'callback': -1}[where], noise=0.1)
    exp = make(tmp_path / 'cut', Net(dropout=0.5), data, save_every=save_every)

    def plot(e):
        if where == 'callback' and e.epoch == 2:
            for p in e.net.parameters():  # something half done
                p.data.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exp.run(5, plot=plot)
    epoch = 0 if where == 'first epoch' else 2
    assert exp.epoch == epoch and exp.net.training  # the mode that it had before
    assert f'KeyboardInterrupt: back to epoch {epoch}' in capsys.readouterr().out
    exp.run(5)
    assert same(end(whole), end(exp))


def test_experiments_that_share_a_network_lose_nothing_on_ctrl_c(tmp_path):
    first = make(tmp_path / 'first')
    second = make(tmp_path / 'second', first.net, Interrupted(3), optimizer=first.optimizer)
    first.run(3)
    before = {name: value.clone() for name, value in first.net.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        second.run(1)
    assert same(before, dict(first.net.state_dict()))


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    exp = make(tmp_path, train=Data(bad=13))
    saved = content(tmp_path)
    with pytest.raises(FloatingPointError, match=r'the loss is nan in epoch 1, batch \d; the batch itself holds'):
        exp.run(2)
    assert content(tmp_path).keys() == saved.keys()
    assert all(torch.isfinite(p).all() for p in exp.net.parameters()) and exp.epoch == 0
    exp = make(tmp_path / 'b', lr=1e30)
    with pytest.raises(FloatingPointError, match='in epoch [12], batch [1-5]; the data of that batch is finite: a lower'):
        exp.run(9)


def test_weights_that_the_last_update_spoilt_are_not_saved(tmp_path):
    """No loss of that epoch shows it."""
    class Spoiling(torch.optim.SGD):
        left = 10  # two epochs of 5 batches

        def step(self, closure=None):
            super().step(closure)
            self.left -= 1
            if self.left == 0:
                self.param_groups[0]['params'][0].data.fill_(math.nan)

    net = Net()
    exp = make(tmp_path, net, optimizer=Spoiling(net.parameters(), lr=0.01))
    with pytest.raises(FloatingPointError, match='weights are not finite in epoch 2, batch 5; the data of that batch is'):
        exp.run(3)
    assert exp.epoch == 1 and all(torch.isfinite(p).all() for p in net.parameters())
    exp.run(3)
    assert exp.epoch == 3


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    exp = make(tmp_path)
    exp.run(1)
    monkeypatch.setattr(os, 'fsync', interrupted)
    saved = content(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        exp.save()
    assert content(tmp_path) == saved


# --- checkpoints ----------------------------------------------------------------------------------

def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/executed',)

    exp = make(tmp_path / 'a')
    state = exp.state_dict() | {'Extra': Evil()}
    torch.save(state, exp.checkpoint_path)
    saved = content(tmp_path / 'a')
    with pytest.raises(RuntimeError, match='holds objects that could run code and was not loaded.*Restore'):
        make(tmp_path / 'a')
    assert not (tmp_path / 'executed').exists() and content(tmp_path / 'a') == saved
    torch.load(exp.checkpoint_path, weights_only=False)  # the test would notice
    assert (tmp_path / 'executed').exists()


@pytest.mark.parametrize('damage, message', [
    (lambda p, s: p.write_bytes(s[:len(s) // 2]), 'is damaged or no checkpoint'),
    (lambda p, s: p.write_bytes(s[:-1]), 'is damaged or no checkpoint'),
    (lambda p, s: p.write_bytes(b''), 'is damaged or no checkpoint'),
    (lambda p, s: p.write_bytes(os.urandom(500)), 'is damaged or no checkpoint'),
    (lambda p, s: p.write_text('hello'), 'is damaged or no checkpoint'),
    (lambda p, s: torch.save({'model': 1}, p), r"file of another program: it has \['model'\], not History, Net"),
    (lambda p, s: torch.save([1], p), 'file of another program: it has list'),
    (lambda p, s: torch.save(torch.load(p) | {'Format': 99}, p), 'newer nntools .format 99, this one reads up to 3'),
], ids=['half', 'last byte', 'empty', 'noise', 'text', 'foreign', 'list', 'newer'])
def test_an_unusable_checkpoint_is_an_error_never_a_fresh_start(tmp_path, damage, message):
    exp = make(tmp_path)
    exp.run(1)
    path = tmp_path / 'checkpoint.pth.tar'
    damage(path, path.read_bytes())
    saved = content(tmp_path)
    for again in (lambda: make(tmp_path), exp.load):
        with pytest.raises(RuntimeError, match=message) as error:
            again()
        assert str(path) in str(error.value)
    assert content(tmp_path) == saved


@settings(max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_are_mistaken_for_a_checkpoint(tmp_path_factory, noise, pickled):
    path = tmp_path_factory.mktemp('noise') / 'checkpoint.pth.tar'
    path.write_bytes(b'\x80\x02' * pickled + noise)
    with pytest.raises(RuntimeError, match='Restore it from a copy, or move it away'):
        nt.load_checkpoint(str(path), 'cpu')


def in_child(function):
    """Runs a function in a forked process (which must not train) and returns what it says."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write, str(function()).encode())
        except BaseException as error:
            os.write(write, f'{type(error).__name__}: {error}'.encode())
        finally:
            os._exit(0)
    os.wait()
    os.close(write)
    with os.fdopen(read) as file:
        return file.read()


@forks
@pytest.mark.parametrize('limit', [0, 1, 100, 4096, 5000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, limit):
    exp = make(tmp_path, Net(width=100))
    exp.run(1)
    saved = content(tmp_path)

    def save():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        exp.save()

    message = in_child(save)
    assert message.startswith('OSError: could not write') and 'untouched' in message, message
    assert content(tmp_path) == saved  # no temporary file either
    assert make(tmp_path, Net(width=100)).epoch == 1


@pytest.mark.parametrize('writes', [0, 1, 2])  # that succeed: the one before the first epoch, then one an epoch
def test_a_write_that_fails_while_training(tmp_path, monkeypatch, writes):
    def replace(*paths):
        done.append(paths)
        if len(done) > writes:
            raise OSError(28, 'No space left on device')
        moved(*paths)

    exp, done, moved = make(tmp_path), [], os.replace
    exp.run(2)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError, match='No space left.*what was saved before is untouched'):
        exp.run(4)
    monkeypatch.undo()
    assert exp.epoch == 2 + writes and make(tmp_path).epoch == max(2, 1 + writes)  # the last one is in memory
    exp.run(2)  # and is written
    assert make(tmp_path).epoch == 2 + writes
    exp.run(4)
    whole = make(tmp_path / 'whole')
    whole.run(4)
    assert same(end(whole), end(exp))


def test_states_that_could_not_be_read_back_are_refused_at_once(tmp_path):
    class Odd:
        def state_dict(self):
            return {'object': textwrap.TextWrapper()}

        def load_state_dict(self, state):
            pass

    with pytest.raises(RuntimeError, match='(?s)holds objects that could run code.*TextWrapper'):
        make(tmp_path, also_save={'odd': Odd()})


def test_a_start_killed_before_its_first_checkpoint_leaves_no_settings(tmp_path):
    tmp_path.joinpath('config.txt').write_text('BatchSize(77)\n')
    make(tmp_path).run(1)
    assert make(tmp_path).epoch == 1


# --- settings ---------------------------------------------------------------------------------------

def test_conflicts_are_listed_with_stored_and_given(tmp_path):
    make(tmp_path).run(1)
    saved = content(tmp_path)
    with pytest.raises(ValueError) as error:
        make(tmp_path, Net(width=5), Data(23), batch_size=5, lr=0.5, grad_clip=1.0, seed=3,
             perform_validation_during_training=True)
    text = str(error.value)
    for line in ('Net: out stored Linear(in_features=4, out_features=1, bias=True), given Linear(in_features=5,', 'TrainSet: stored Data(22, 0.0), given Data(23, 0.0)',
                 'BatchSize: stored 4, given 5', 'Seed: stored 0, given 3', 'GradClip: stored None, given 1.0',
                 'PerformValidationDuringTraining: stored False, given True', 'Optimizer: lr stored 0.01, given 0.5'):
        assert line in text, text
    assert 'StatsManager' not in text and str(tmp_path) in text
    assert 'betas' not in text  # which are alike
    assert content(tmp_path) == saved
    assert make(tmp_path).epoch == 1


@pytest.mark.parametrize('change', [
    {'optimizer': 'SGD'}, {'scheduler': lambda o: lr_scheduler.StepLR(o, 1)}, {'stats': nt.StatsManager()},
    {'precision': 'bfloat16'}, {'batch_size': 2}, {'train': Data(noise=0.5)}],
    ids=lambda change: next(iter(change)))
def test_each_setting_counts(tmp_path, change):
    make(tmp_path).run(1)
    net = Net()
    if 'optimizer' in change:
        change = {'net': net, 'optimizer': torch.optim.SGD(net.parameters(), lr=0.01)}
    with pytest.raises(ValueError, match='holds a checkpoint made with other settings'):
        make(tmp_path, **change)


def test_addresses_modules_and_printing_do_not_count(tmp_path):
    def data_set():
        class Plain(td.Dataset):  # no repr: its address is printed
            transform = staticmethod(lambda x: x)

            def __len__(self):
                return 9

            def __getitem__(self, k):
                return Data()[k]

        return Plain()

    make(tmp_path, train=data_set()).run(1)
    assert 'object at 0x' in (tmp_path / 'config.txt').read_text()
    assert make(tmp_path, train=data_set()).epoch == 1
    without_settings(tmp_path, ('test_nntools.', '__main__.'), ('    ', '  '))
    assert make(tmp_path, train=data_set()).epoch == 1


def test_a_scheduled_rate_is_no_conflict(tmp_path):
    def build(**options):
        return make(tmp_path, scheduler=lambda o: lr_scheduler.StepLR(o, 1), **options)

    exp = build()
    exp.run(2)
    assert build().epoch == 2
    config = re.sub(r'^Scheduler.*', 'Scheduler(StepLR)', f'{exp}\n', flags=re.MULTILINE)  # with the rate of now
    (tmp_path / 'config.txt').write_text(config)
    without_settings(tmp_path)
    assert build().epoch == 2
    with pytest.raises(ValueError, match='Optimizer'):
        build(lr=0.02)


def test_settings_that_can_not_be_read(tmp_path, capsys):
    make(tmp_path).run(1)
    without_settings(tmp_path)
    tmp_path.joinpath('config.txt').write_bytes(b'\xff\xfe\x00 BatchSize(')
    assert make(tmp_path).epoch == 1
    assert 'config.txt can not be read: only the parameters' in capsys.readouterr().out
    with pytest.raises(ValueError, match='hidden.weight'):  # the parameters are compared all the same
        make(tmp_path, Net(width=6))


def test_settings_of_a_subclass(tmp_path):
    class Mine(nt.Experiment):
        def setting(self):
            return super().setting() | {'Extra': self.extra}

    def build(extra):
        Mine.extra = extra
        net = Net()
        return Mine(net, Data(), Data(), torch.optim.Adam(net.parameters()), Stats(), str(tmp_path))

    build(1).run(1)
    with pytest.raises(ValueError, match='Extra: stored 1, given 2'):
        build(2)
    net = Net()  # the base class does not know Extra, and does not compare it
    nt.Experiment(net, Data(), Data(), torch.optim.Adam(net.parameters()), Stats(), str(tmp_path))


# --- wrong uses: each gets a message, and what was saved stays as it is -------------------------------

class TwoLosses(Net):
    def criterion(self, y, d):
        return (y - d).square().flatten()


def foreign_optimizer():
    return torch.optim.Adam(Net().parameters())


def other_scheduler(_):
    return lr_scheduler.StepLR(foreign_optimizer(), 1)


class Namesake(Net):
    """Other than Net, with the same parameters."""


class Wordy(Stats):
    def summarize(self):
        return {'loss': object()}


class Triples(Data):
    def __getitem__(self, k):
        return *super().__getitem__(k), k


def run(exp, *args, **options):
    exp.run(*args, **options)


ABSENT = 'cuda' if torch.backends.mps.is_available() else 'mps'
WRONG = [
    # (what is wrong, arguments, what is done with the experiment, error, its message)
    ('empty data set', {'train': Data(0)}, None, ValueError, 'train_set has 0 samples, too few for one batch of 4'),
    ('batch larger than the data', {'batch_size': 23}, None, ValueError, 'train_set has 22 samples.*lower batch_size'),
    ('empty validation set', {'val': []}, None, ValueError, 'the data set to evaluate has 0 samples'),
    ('batch size 0', {'batch_size': 0}, None, ValueError, 'batch_size must be a whole number, 1 or more, got 0'),
    ('batch size 2.5', {'batch_size': 2.5}, None, ValueError, 'batch_size must be a whole number'),
    ('no network', {'net': 'resnet', 'optimizer': foreign_optimizer()}, None, TypeError, 'must be a torch.nn.Module, got str'),
    ('optimizer of another network', {'optimizer': foreign_optimizer()}, None, ValueError, 'no parameter of net'),
    ('no optimizer', {'optimizer': Stats()}, None, TypeError, 'must be a torch.optim.Optimizer .the order.*got Stats'),
    ('no statistics', {'stats': 'loss'}, None, TypeError, 'must be a StatsManager, got str'),
    ('a class as statistics', {'stats': Stats}, None, TypeError, 'must be a StatsManager, got <class'),
    ('a list of numbers as data', {'train': 5}, None, TypeError, 'must be a data set with a length.*got int'),
    ('unknown precision', {'precision': 'half'}, None, ValueError, "precision must be one of .'float32', 'bfloat16', 'float16'., got 'half'"),
    ('unknown device', {'device': 'gpu'}, None, ValueError, "device must be 'cuda', 'mps', 'cpu' or 'auto', got 'gpu'"),
    ('a device that is not here', {'device': ABSENT}, None, ValueError, f"'{ABSENT}' is not available here; use device='auto'"),
    ('a bare module', {'net': nn.Linear(3, 1)}, None, TypeError, r'method criterion\(y, d\), its loss, got Linear'),
    ('negative workers', {'num_workers': -1}, None, ValueError, 'num_workers must be a whole number, 0 or more, got -1'),
    ('clip at 0', {'grad_clip': 0}, None, ValueError, 'grad_clip must be a number, more than 0, got 0'),
    ('clip by a word', {'grad_clip': 'norm'}, None, ValueError, "grad_clip must be a number, more than 0, got 'norm'"),
    ('save never', {'save_every': 0}, None, ValueError, 'save_every must be a whole number, 1 or more, got 0'),
    ('unknown mode', {'best_mode': 'largest'}, None, ValueError, "best_mode must be one of .'min', 'max'., got 'largest'"),
    ('seed by a word', {'seed': 'lucky'}, None, ValueError, "seed must be a whole number, 0 or more, got 'lucky'"),
    ('scheduler of another optimizer', {'scheduler': other_scheduler}, None, ValueError, 'belongs to another optimizer'),
    ('also_save without a state', {'also_save': {'a': 3}}, None, TypeError, r"also_save\['a'\] must be something with state_dict, got int"),
    ('also_save by a taken name', {'also_save': {'Net': Net()}}, None, ValueError, r"also_save\['Net'\] needs another name"),
    ('also_save that was not saved', {'also_save': {'ema': Net()}}, None, ValueError, 'the checkpoint has no ema'),
    ('other network', {'net': Net(width=6)}, None, ValueError, r'Net: hidden stored Linear\(in_features=3, out_features=4, bias=True\), given'),
    ('another class of network', {'net': Namesake()}, None, ValueError, 'Net: stored Net, given Namesake'),
    ('other outputs', {'net': Net(outputs=2)}, None, ValueError, r'Net: out stored Linear\(in_features=4, out_features=1, bias=True\), given'),
    ('epochs by a word', {}, lambda e: run(e, 'ten'), ValueError, "num_epochs must be a whole number, 0 or more, got 'ten'"),
    ('negative epochs', {}, lambda e: run(e, -1), ValueError, 'num_epochs must be a whole number, 0 or more, got -1'),
    ('unknown statistic', {'best_by': 'psnr'}, lambda e: run(e, 2), ValueError, "no statistic 'psnr', there is 'loss', 'error'"),
    ('batches of three', {'train': Triples()}, lambda e: run(e, 2), TypeError, r'must be a pair \(x, d\), got a list of 3: override'),
    ('a loss for each sample', {'net': TwoLosses()}, lambda e: run(e, 2), ValueError, r'must be one number, got the shape .4,.: take its mean'),
    ('data that is not finite', {'train': Data(bad=3)}, lambda e: run(e, 2), FloatingPointError, 'batch itself holds values'),
    ('statistics that are no numbers', {'stats': Wordy()}, lambda e: run(e, 2), TypeError, 'must return numbers, got a object'),
    ('a training loader without a batch', {'train': td.DataLoader(Data(3), 4, drop_last=True)}, lambda e: run(e, 2),
     ValueError, 'the data gave no batch: it is empty, or shorter'),
    ('a validation loader without a batch', {'val': td.DataLoader(Data(3), 4, drop_last=True)},
     lambda e: e.evaluate(), ValueError, 'the data gave no batch: it is empty, or shorter'),
    ('evaluate nothing', {}, lambda e: e.evaluate([]), ValueError, 'the data set to evaluate has 0 samples'),
    ('predict nothing', {}, lambda e: e.predict([]), ValueError, 'the data gave no batch: it is empty'),
    ('load what is not there', {}, lambda e: e.load('nowhere.tar'), RuntimeError, 'there is no checkpoint nowhere.tar'),
    ('an error in the callback', {}, lambda e: run(e, 2, plot=lambda e: 1 / 0), ZeroDivisionError, 'division by zero'),
]


@pytest.mark.parametrize('options, act, error, message', [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_uses(tmp_path, options, act, error, message):
    exp = make(tmp_path, **options) if act else make(tmp_path)  # wrong in what is done, or in the arguments
    if not act:
        exp.run(1)
    saved = content(tmp_path)
    with pytest.raises(error, match=message):
        act(exp) if act else make(tmp_path, **options)
    assert content(tmp_path) == saved
    again = make(tmp_path, **options) if act else make(tmp_path)
    assert again.epoch == (0 if act else 1)


def test_more_wrong_uses(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError, match='perform_validation_during_training needs a val_set'):
        nt.Experiment(net, Data(), None, adam, Stats(), str(tmp_path), perform_validation_during_training=True)
    with pytest.raises(ValueError, match='val_set is None; pass a data set'):
        nt.Experiment(net, Data(), None, adam, Stats(), str(tmp_path)).evaluate()
    with pytest.raises(TypeError, match='abstract'):
        nt.NeuralNetwork()
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='could not write.*folder is writable'):
        make(tmp_path / 'file' / 'below')


@forks
def test_a_folder_without_permission(tmp_path):
    exp = make(tmp_path)
    exp.run(1)
    saved = content(tmp_path)

    def save():
        if os.geteuid() == 0:  # root may write everywhere
            os.setuid(65534)
        exp.save()

    tmp_path.chmod(0o500)
    message = in_child(save)
    tmp_path.chmod(0o700)
    assert message.startswith('OSError: could not write') and 'folder is writable' in message, message
    assert content(tmp_path) == saved and make(tmp_path).epoch == 1
