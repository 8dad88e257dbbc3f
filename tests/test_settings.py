"""nntools: what counts as a setting, and what is no conflict."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.data as td
from torch import nn
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, Stats, conflict, make, same, with_optimizer, without_settings


@pytest.mark.parametrize(
    'change',
    [
        {'optimizer': 'SGD'},
        {'scheduler': lambda o: lr_scheduler.StepLR(o, 1)},
        {'stats': nt.StatsManager()},
        {'precision': 'bfloat16'},
        {'batch_size': 2},
        {'train': Data(noise=0.5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_counts(tmp_path, change):
    make(tmp_path).run(1)
    net = Net()
    if 'optimizer' in change:
        change = {'net': net, 'optimizer': torch.optim.SGD(net.parameters(), lr=0.01)}
    with pytest.raises(ValueError, match='holds a checkpoint made with other settings'):
        make(tmp_path, **change)


class Layers(Net):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1))

    def forward(self, x):
        return self.layers(x)


NETWORKS = [
    (Net(dropout=0.5), Net(dropout=0.0)), (Layers(nn.Tanh()), Layers(nn.ReLU())),
    (Layers(nn.BatchNorm1d(4, eps=1e-5)), Layers(nn.BatchNorm1d(4, eps=1e-3)))]


class Told(Data):
    """A data set that describes itself as it is told."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def __repr__(self):
        return self.text


@pytest.mark.parametrize(
    'old, new',
    [
        *[({'net': old}, {'net': new}) for old, new in NETWORKS],
        ({'train': Told('Faces(60)')}, {'train': Told('Cats(60)')}),
        ({'train': Told('Dataset Faces\n    split: a\n    size: 60')},
         {'train': Told('Dataset Faces\n    split: b\n    size: 60')}),
        ({'drop_last': True}, {'drop_last': False}),
    ],
    ids=['dropout', 'activation', 'eps', 'data', 'data of many lines', 'drop_last'],
)
def test_what_describes_itself_otherwise_is_a_conflict(tmp_path, old, new):
    make(tmp_path, **old).run(1)
    message = conflict(tmp_path, **new)
    name = {'net': 'Net', 'train': 'TrainSet', 'drop_last': 'DropLast'}[next(iter(new))]
    assert f'\n  {name}: ' in message, message
    assert len(re.findall('^  ', message, re.MULTILINE)) == 1, message
    assert make(tmp_path, **old).epoch == 1


def shapes(net):
    return {name: value.shape for name, value in net.state_dict().items()}


@pytest.mark.parametrize('old, new', NETWORKS, ids=['dropout', 'activation', 'eps'])
def test_of_another_torch_names_and_shapes_are_compared(tmp_path, monkeypatch, old, new):
    with monkeypatch.context() as patch:
        patch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.6.0'))
        make(tmp_path, old).run(1)
    assert make(tmp_path, old).epoch == 1
    if shapes(old) == shapes(new):
        assert make(tmp_path, new).epoch == 1
    message = conflict(tmp_path, Net(width=9))
    if type(old) is Net:
        assert 'size mismatch for hidden.weight' in message
        assert 'torch.Size([4, 3])' in message and str(tmp_path) in message


def test_addresses_modules_and_printing_do_not_count(tmp_path):
    def data_set(module):
        class Plain(td.Dataset):  # no repr: its address is printed
            __module__ = module
            transform = staticmethod(lambda x: x)

            def __len__(self):
                return 9

            def __getitem__(self, k):
                return Data()[k]

        return Plain()

    def build(module, indent):
        return make(tmp_path, train=data_set(module), val=Told(f'Faces\n{indent}size: 60'),
                    perform_validation_during_training=True)

    build('tests.test_settings', '    ').run(1)
    assert 'object at 0x' in (tmp_path / 'config.txt').read_text()
    assert build('tests.test_settings', '    ').epoch == 1
    assert build('__main__', '  ').epoch == 1


@pytest.mark.parametrize(
    'here, there',
    [
        ("Faces(root='/home/ann/data/faces', size=60)", "Faces(root='/mnt/disk2/faces', size=60)"),
        ('Faces\n    Root location: /home/ann/faces\n    Split: a',
         'Faces\n    Root location: ./faces\n    Split: a'),
        ("Faces('C:\\Users\\ann\\faces')", "Faces('/home/ann/faces')"),
        ("Faces('C:\\\\Users\\\\ann\\\\faces')", "Faces('/home/ann/faces')"),
        ("Faces(PosixPath('/home/ann/faces'))", "Faces(PosixPath('/root/faces'))"),
        ("Faces('~/faces')", "Faces('faces')"),
    ],
)
def test_the_folder_of_another_machine_is_no_conflict(tmp_path, here, there):
    make(tmp_path, train=Told(here)).run(1)
    assert make(tmp_path, train=Told(there)).epoch == 1
    assert 'TrainSet' in conflict(tmp_path, train=Told(there.replace('Faces', 'Cats')))


def test_a_validation_set_that_training_does_not_use(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    nt.Experiment(net, Data(), None, adam, Stats(), str(tmp_path), 4, seed=0).run(1)
    assert make(tmp_path, val=Data(7)).epoch == make(tmp_path, val=Data(9)).epoch == 1
    make(tmp_path / 'b', perform_validation_during_training=True).run(1)
    message = conflict(tmp_path / 'b', val=Data(9), perform_validation_during_training=True)
    assert 'ValSet' in message


SOURCE = '''import nntools, torch
class {name}(nntools.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def forward(self, x):
        return self.layer({x})
    def criterion(self, y, d):
        return torch.nn.functional.{loss}(y, d)
'''


@pytest.mark.parametrize('change', [{'x': 'x * 2'}, {'loss': 'l1_loss'}])
def test_another_source_of_the_network_is_said(tmp_path, capsys, monkeypatch, change):
    def build(**parts):
        parts = {'x': 'x', 'loss': 'mse_loss', 'name': 'Line'} | parts
        (tmp_path / 'student.py').write_text(SOURCE.format(**parts))
        sys.modules.pop('student', None)
        importlib.invalidate_caches()
        return make(tmp_path / 'exp', importlib.import_module('student').Line())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    build().run(1)
    assert build().epoch == 1
    assert 'source' not in capsys.readouterr().out
    exp = build(**change)
    said = capsys.readouterr().out
    assert exp.epoch == 1 and said.count('trained for 1 epochs by other source of network\n') == 1
    exp.run(2)
    assert build(**change).epoch == 2 and 'source' not in capsys.readouterr().out


def test_where_python_finds_no_source(tmp_path, capsys):
    names = {'__name__': '__console__'}
    exec(SOURCE.format(x='x', loss='mse_loss', name='Typed'), names)
    make(tmp_path, names['Typed']()).run(1)
    assert make(tmp_path, names['Typed']()).epoch == 1 and 'source' not in capsys.readouterr().out


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


def second_optimizer(folder, lr=1e-3, total=20, net=None, **options):
    net = net or Net()
    other = torch.optim.SGD(net.out.parameters(), lr=lr, momentum=0.9)
    cycle = lr_scheduler.OneCycleLR(other, max_lr=lr, total_steps=total)
    return make(folder, net, optimizer=torch.optim.Adam(net.hidden.parameters(), lr=0.01),
                also_save={'D': other, 'cycle': cycle}, **options)


def test_settings_of_what_is_also_saved_are_compared(tmp_path):
    second_optimizer(tmp_path).run(1)
    with pytest.raises(ValueError, match=r'D: lr stored 4e-05, given 0.0004[\s\S]*allow='):
        second_optimizer(tmp_path, lr=1e-2)
    with pytest.raises(ValueError, match='cycle: total_steps stored 20, given 40'):
        second_optimizer(tmp_path, total=40)
    momenta = second_optimizer(tmp_path).also_save['D'].state_dict()['state']
    exp = second_optimizer(tmp_path, lr=1e-2, allow=('D', 'cycle'))
    assert exp.epoch == 1 and exp.also_save['D'].param_groups[0]['max_lr'] == 1e-2
    assert same(exp.also_save['D'].state_dict()['state'], momenta)
    assert exp.also_save['cycle'].last_epoch == 0  # begins as it is given


def test_settings_are_stored_with_every_checkpoint(tmp_path):
    """Adam, then AdamW on purpose, then Adam again by mistake; and without config.txt."""
    make(tmp_path, **with_optimizer(torch.optim.Adam, 0.01)).run(1)
    exp = make(tmp_path, **with_optimizer(torch.optim.AdamW, 0.5), allow='Optimizer')
    exp.run(2)
    message = conflict(tmp_path, **with_optimizer(torch.optim.Adam, 0.01))
    assert 'Optimizer: stored AdamW, given Adam' in message
    (tmp_path / 'config.txt').unlink()
    message = conflict(tmp_path, **with_optimizer(torch.optim.AdamW, 0.01))
    assert 'Optimizer: lr stored 0.5, given 0.01' in message
    assert make(tmp_path, **with_optimizer(torch.optim.AdamW, 0.5)).epoch == 2


def test_an_edited_config_is_not_believed(tmp_path):
    exp = make(tmp_path)
    exp.run(1)
    config = Path(exp.config_path)
    edited = config.read_text().replace('lr: 0.01', 'lr: 0.02')
    config.write_text(edited.replace('BatchSize(4)', 'BatchSize(5)'))
    assert make(tmp_path).epoch == 1
    assert 'BatchSize: stored 4, given 5' in conflict(tmp_path, batch_size=5)


@pytest.mark.parametrize('config', ['as it was', 'unreadable', 'none'])
def test_where_no_settings_are_stored(tmp_path, capsys, config):
    """As in a checkpoint of the first edition, or of 2019."""
    make(tmp_path).run(1)
    without_settings(tmp_path)
    if config == 'unreadable':
        tmp_path.joinpath('config.txt').write_bytes(b'\xff\xfe\x00 BatchSize(')
    elif config == 'none':
        tmp_path.joinpath('config.txt').unlink()
    capsys.readouterr()
    assert make(tmp_path).epoch == 1
    said = capsys.readouterr().out
    assert said.count('has no settings: only names and shapes are compared\n') == 1
    assert said.startswith(str(tmp_path)) and 'NOTE' not in said
    # The parameters are compared all the same.
    with pytest.raises(ValueError, match='hidden.weight'):
        make(tmp_path, Net(width=6))


@pytest.mark.parametrize('stored', [False, True])
def test_allow_keeps_the_state_of_the_optimizer(tmp_path, stored):
    make(tmp_path).run(2)
    if not stored:
        without_settings(tmp_path)
    momenta = nt.load_checkpoint(tmp_path / 'checkpoint.pth.tar')['Optimizer']['state']
    net = Net()
    exp = make(
        tmp_path, net, optimizer=torch.optim.Adam(net.parameters(), lr=0.5), allow='Optimizer'
    )
    assert len(exp.optimizer.state) == len(list(net.parameters()))
    assert same(exp.optimizer.state_dict()['state'], momenta)
    assert exp.optimizer.param_groups[0]['lr'] == 0.5
