"""Checkpoints that the course's helper of 2019 wrote, and their settings."""

import numpy as np
import pytest
import torch
import torch.utils.data as td
from torch import nn

import nntools as nt
from tests.helpers import Denoiser, DenoisingStats, Noisy, Stats, content, same, without_settings

HISTORIES = {
    'tensors': 2 * [(
        {'loss': 0.5, 'PSNR': torch.tensor(20.0)}, {'loss': 0.4, 'PSNR': torch.tensor(21.0)})],
    'numbers of numpy': 2 * [(
        {'loss': np.float64(0.5), 'PSNR': np.float32(20.0)},
        {'loss': np.float64(0.4), 'PSNR': np.float64(21.0)})],
    'arrays': 2 * [(
        {'loss': 0.5, 'PSNR': np.array(20.0)}, {'loss': 0.4, 'PSNR': np.array([21.0])})]}


class Noisy2019(Noisy):
    __repr__ = td.Dataset.__repr__


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


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', HISTORIES)
def test_a_checkpoint_of_2019_loads_and_goes_on(tmp_path, kind, zipped):
    weights = write_2019(tmp_path / 'a', HISTORIES[kind], zipped)
    net = Denoiser()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    exp = nt.Experiment(
        net, Noisy2019(), Noisy2019(), adam, DenoisingStats(), str(tmp_path / 'a'), 4, True
    )
    assert exp.epoch == 2 and same(dict(net.state_dict()), dict(weights))
    assert exp.history[0][0] == {'loss': 0.5, 'PSNR': 20.0}
    assert np.allclose(exp.history[1][1]['PSNR'], 21.0)
    assert adam.param_groups[0]['lr'] == 1e-5 and adam.state[net.conv.weight]['step'] == 3
    exp.run(num_epochs=4)
    assert exp.epoch == 4 and adam.state[net.conv.weight]['step'] == 7
    assert [row['seconds'] > 0 for row in exp.table()] == [False, False, True, True]
    again = Denoiser()
    adam = torch.optim.Adam(again.parameters(), lr=1e-3)
    exp = nt.Experiment(
        again, Noisy2019(), Noisy2019(), adam, DenoisingStats(), str(tmp_path / 'a'), 4, True)
    assert exp.epoch == 4
    assert same(dict(again.state_dict()), dict(net.state_dict()))


def test_numbers_under_the_old_path_of_numpy(tmp_path):
    """As numpy 1 wrote them with torch.save: the global numpy.core.multiarray.scalar."""
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
    """Its settings and states are those of two networks."""
    class Two(nt.Experiment):
        def __init__(self, net_d, *args):
            self.net_d = net_d
            super().__init__(*args)

        def setting(self):
            return super().setting() | {'NetD': self.net_d, 'Criterion': nn.MSELoss()}

        def state_dict(self):
            return super().state_dict() | {'NetD': self.net_d.state_dict()}

        def load_state_dict(self, checkpoint):
            super().load_state_dict(checkpoint)
            self.net_d.load_state_dict(checkpoint['NetD'])

    def build(net_d):
        net = Denoiser()
        return Two(
            net_d, net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(),
            str(tmp_path), 4)

    first = nn.Sequential(nn.Linear(1, 4))
    build(first).run(1)
    with pytest.raises(ValueError, match='NetD: stored Sequential, given Linear'):
        build(nn.Linear(1, 4))
    without_settings(tmp_path)
    second = nn.Sequential(nn.Linear(1, 4))
    assert build(second).epoch == 1
    assert same(dict(second.state_dict()), dict(first.state_dict()))


def build_otherwise(folder, net, **options):
    """With other settings than those of CONFIG: all that it has, but the network."""
    adam = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    return nt.Experiment(net, Noisy(), Noisy(), adam, Stats(), str(folder), 5, True, **options)


def test_settings_of_2019_are_not_compared_and_it_is_said(tmp_path, capsys):
    weights = write_2019(tmp_path / 'a', HISTORIES['tensors'], True)
    saved, net = content(tmp_path / 'a'), Denoiser()
    exp = build_otherwise(tmp_path / 'a', net, allow='Optimizer')
    path = tmp_path / 'a' / 'checkpoint.pth.tar'
    said = capsys.readouterr().out
    assert said.count(f'{path} has no settings: only names and shapes are compared\n') == 1
    assert exp.epoch == 2 and same(dict(net.state_dict()), dict(weights))
    assert content(tmp_path / 'a') == saved
    # From now on they are.
    exp.run(3)
    with pytest.raises(ValueError, match='BatchSize: stored 5, given 4'):
        nt.Experiment(net, Noisy(), Noisy(), exp.optimizer, Stats(), exp.output_dir, 4, True)
    build_otherwise(tmp_path / 'a', Denoiser())
    assert 'no settings' not in capsys.readouterr().out


class Renamed(Denoiser):
    def __init__(self):
        super().__init__()
        self.layer = self.conv
        del self.conv


class Wider(Denoiser):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 5, padding=2)


@pytest.mark.parametrize('kind, name', [(Renamed, 'layer.weight'), (Wider, 'conv.weight')])
def test_names_and_shapes_of_2019_are_compared(tmp_path, kind, name):
    write_2019(tmp_path / 'a', HISTORIES['tensors'], True)
    saved, net = content(tmp_path / 'a'), kind()
    with pytest.raises(ValueError, match=f'(?s)holds another Net: .*{name}'):
        nt.Experiment(
            net, Noisy2019(), Noisy2019(), torch.optim.Adam(net.parameters()), DenoisingStats(),
            str(tmp_path / 'a'), 4, True)
    assert content(tmp_path / 'a') == saved
