"""Checkpoints that the course's helper of 2019 wrote, and their settings."""

import numpy as np
import pytest
import torch
import torch.utils.data as td
from torch import nn

import nntools as nt
from tests.helpers import Denoiser, DenoisingStats, Noisy, content, same, without_settings

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
        return Two(
            net, Noisy(), Noisy(), torch.optim.Adam(net.parameters()), DenoisingStats(),
            str(tmp_path), 4)

    build().run(1)
    without_settings(tmp_path, ('ReLU(inplace=True)', 'ReLU(inplace)'))
    assert build().epoch == 1
    without_settings(tmp_path, ('NetD(Sequential', 'NetD(Other'))
    with pytest.raises(ValueError, match='NetD: stored Other, given Sequential'):
        build()


@pytest.mark.parametrize(
    'old, new, name',
    [
        ('BatchSize(4)', 'BatchSize(8)', 'BatchSize: stored 8, given 4'),
        ('initial_lr: 0.001', 'initial_lr: 0.01', 'Optimizer'),
        ('betas: (0.9, 0.999)', 'betas: (0.5, 0.999)', 'Optimizer'),
        ('Adam (', 'SGD (', 'Optimizer'),
        ('ValSet(<__main__.Noisy2019', 'ValSet(<__main__.Other', 'ValSet: stored <Other object>'),
        ('Training(True)', 'Training(False)', 'stored False, given True'),
        ('DenoisingStats', 'MyStats', 'StatsManager'),
    ],
)
def test_real_conflicts_with_a_checkpoint_of_2019(tmp_path, old, new, name):
    assert CONFIG.count(old) == 1
    write_2019(tmp_path / 'a', HISTORIES['tensors'], True, CONFIG.replace(old, new))
    saved = content(tmp_path / 'a')
    net = Denoiser()
    with pytest.raises(ValueError, match=name):
        nt.Experiment(
            net, Noisy2019(), Noisy2019(), torch.optim.Adam(net.parameters()), DenoisingStats(),
            str(tmp_path / 'a'), 4, True)
    assert content(tmp_path / 'a') == saved
