"""nntools: wrong uses. Each gets a message, and what was saved stays as it is."""

import pytest
import torch
import torch.utils.data as td
from torch import nn
from torch.optim import lr_scheduler

import nntools as nt
from tests.helpers import Data, Net, Stats, content, make

ABSENT = 'cuda' if torch.backends.mps.is_available() else 'mps'


class Namesake(Net):
    """Other than Net, with the same parameters."""


class Triples(Data):
    def __getitem__(self, k):
        return *super().__getitem__(k), k


class LossOfEachSample(Net):
    def criterion(self, y, d):
        return (y - d).square().flatten()


class Wordy(Stats):
    def summarize(self):
        return {'loss': object()}


def foreign_optimizer():
    return torch.optim.Adam(Net().parameters())


def other_scheduler(_):
    return lr_scheduler.StepLR(foreign_optimizer(), 1)


def run(exp, *args, **options):
    exp.run(*args, **options)


WRONG = [
    # (what is wrong, arguments, what is done with the experiment, error, its message)
    ('empty data set', {'train': Data(0)}, None, ValueError,
     'train_set has 0 samples, too few for one batch of 4'),
    ('batch larger than the data', {'batch_size': 23}, None, ValueError,
     'train_set has 22 samples.*lower batch_size'),
    ('empty validation set', {'val': []}, None, ValueError,
     'the data set to evaluate has 0 samples'),
    ('batch size 0', {'batch_size': 0}, None, ValueError,
     'batch_size must be a whole number, 1 or more, got 0'),
    ('batch size 2.5', {'batch_size': 2.5}, None, ValueError, 'batch_size must be a whole number'),
    ('no network', {'net': 'resnet', 'optimizer': foreign_optimizer()}, None, TypeError,
     'must be a torch.nn.Module, got str'),
    ('optimizer of another network', {'optimizer': foreign_optimizer()}, None, ValueError,
     'no parameter of net'),
    ('no optimizer', {'optimizer': Stats()}, None, TypeError,
     'must be a torch.optim.Optimizer .the order.*got Stats'),
    ('no statistics', {'stats': 'loss'}, None, TypeError, 'must be a StatsManager, got str'),
    ('a class as statistics', {'stats': Stats}, None, TypeError,
     'must be a StatsManager, got <class'),
    ('a list of numbers as data', {'train': 5}, None, TypeError,
     'must be a data set with a length.*got int'),
    ('unknown precision', {'precision': 'half'}, None, ValueError,
     "precision must be one of .*'float32', 'bfloat16', 'float16'.*, got 'half'"),
    ('unknown device', {'device': 'gpu'}, None, ValueError,
     "device must be 'cuda', 'mps', 'cpu' or 'auto', got 'gpu'"),
    ('a device that is not here', {'device': ABSENT}, None, ValueError,
     f"'{ABSENT}' is not available here; use device='auto'"),
    ('a bare module', {'net': nn.Linear(3, 1)}, None, TypeError,
     r'method criterion\(y, d\), its loss, got Linear'),
    ('negative workers', {'num_workers': -1}, None, ValueError,
     'num_workers must be a whole number, 0 or more, got -1'),
    ('clip at 0', {'grad_clip': 0}, None, ValueError,
     'grad_clip must be a number, more than 0, got 0'),
    ('clip by a word', {'grad_clip': 'norm'}, None, ValueError,
     "grad_clip must be a number, more than 0, got 'norm'"),
    ('save never', {'save_every': 0}, None, ValueError,
     'save_every must be a whole number, 1 or more, got 0'),
    ('unknown mode', {'best_mode': 'largest'}, None, ValueError,
     "best_mode must be one of .*'min', 'max'.*, got 'largest'"),
    ('seed by a word', {'seed': 'lucky'}, None, ValueError,
     "seed must be a whole number, 0 or more, got 'lucky'"),
    ('scheduler of another optimizer', {'scheduler': other_scheduler}, None, ValueError,
     'belongs to another optimizer'),
    ('also_save without a state', {'also_save': {'a': 3}}, None, TypeError,
     r"also_save\['a'\] must be something with state_dict, got int"),
    ('also_save by a taken name', {'also_save': {'Net': Net()}}, None, ValueError,
     r"also_save\['Net'\] needs another name"),
    ('also_save that was not saved', {'also_save': {'ema': Net()}}, None, ValueError,
     'the checkpoint has no ema'),
    ('other network', {'net': Net(width=6)}, None, ValueError,
     r'Net: hidden stored Linear\(in_features=3, out_features=4, bias=True\), given'),
    ('another class of network', {'net': Namesake()}, None, ValueError,
     'Net: stored Net, given Namesake'),
    ('other outputs', {'net': Net(outputs=2)}, None, ValueError,
     r'Net: out stored Linear\(in_features=4, out_features=1, bias=True\), given'),
    ('epochs by a word', {}, lambda e: run(e, 'ten'), ValueError,
     "num_epochs must be a whole number, 0 or more, got 'ten'"),
    ('negative epochs', {}, lambda e: run(e, -1), ValueError,
     'num_epochs must be a whole number, 0 or more, got -1'),
    ('unknown statistic', {'best_by': 'psnr', 'best_mode': 'max'}, lambda e: run(e, 2), ValueError,
     "no statistic 'psnr', there is 'loss', 'error'"),
    ('batches of three', {'train': Triples()}, lambda e: run(e, 2), TypeError,
     r'must be a pair \(x, d\), got a list of 3: override'),
    ('a loss for each sample', {'net': LossOfEachSample()}, lambda e: run(e, 2), RuntimeError,
     'grad can be .* only for scalar outputs'),
    ('data that is not finite', {'train': Data(bad=3)}, lambda e: run(e, 2), FloatingPointError,
     'batch itself holds values'),
    ('statistics that are no numbers', {'stats': Wordy()}, lambda e: run(e, 2), TypeError,
     'must return numbers, got a object'),
    ('a training loader without a batch', {'train': td.DataLoader(Data(3), 4, drop_last=True)},
     lambda e: run(e, 2), ValueError, 'the data gave no batch: it is empty, or shorter'),
    ('a validation loader without a batch', {'val': td.DataLoader(Data(3), 4, drop_last=True)},
     lambda e: e.evaluate(), ValueError, 'the data gave no batch: it is empty, or shorter'),
    ('evaluate nothing', {}, lambda e: e.evaluate([]), ValueError,
     'the data set to evaluate has 0 samples'),
    ('predict nothing', {}, lambda e: e.predict([]), ValueError,
     'the data gave no batch: it is empty'),
    ('load what is not there', {}, lambda e: e.load('nowhere.tar'), RuntimeError,
     'there is no checkpoint nowhere.tar'),
    ('an error in the callback', {}, lambda e: run(e, 2, plot=lambda e: 1 / 0), ZeroDivisionError,
     'division by zero'),
]


@pytest.mark.parametrize(
    'options, act, error, message', [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_uses(tmp_path, options, act, error, message):
    if act:  # what is done is wrong
        exp, epoch = make(tmp_path, **options), 0
    else:  # the arguments are
        exp, epoch = make(tmp_path), 1
        exp.run(1)
    saved = content(tmp_path)
    with pytest.raises(error, match=message):
        if act:
            act(exp)
        else:
            make(tmp_path, **options)
    assert content(tmp_path) == saved
    again = make(tmp_path, **options) if act else make(tmp_path)
    assert again.epoch == epoch


def test_more_wrong_uses(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError, match='perform_validation_during_training needs a val_set'):
        nt.Experiment(
            net, Data(), None, adam, Stats(), str(tmp_path), perform_validation_during_training=True
        )
    with pytest.raises(ValueError, match='val_set is None; pass a data set'):
        nt.Experiment(net, Data(), None, adam, Stats(), str(tmp_path)).evaluate()
    with pytest.raises(TypeError, match='abstract'):
        nt.NeuralNetwork()
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='could not write.*folder is writable'):
        make(tmp_path / 'file' / 'below')


class InAList(Net):
    def __init__(self):
        super().__init__()
        self.hidden = self.norm = self.drop = self.out = None
        self.layers = [nn.Linear(3, 1)]

    def forward(self, x):
        return self.layers[0](x)

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Skipping(torch.optim.SGD):
    """Leaves out a step whose gradient is not finite."""

    def step(self, closure=None):
        group, = self.param_groups
        if all(p.grad.isfinite().all() for p in group['params']):
            super().step(closure)


class Wrapper:
    """An optimizer in another one, without its groups."""

    def __init__(self, net):
        self.inner = torch.optim.SGD(net.parameters(), lr=0.1)
        self.step, self.zero_grad = self.inner.step, self.inner.zero_grad
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict


def test_optimizers_and_losses_that_are_refused(tmp_path):
    net = InAList()
    with pytest.raises(ValueError, match='optimizer holds no parameter of net'):
        make(tmp_path, net, optimizer=torch.optim.Adam(net.layers[0].parameters()))
    net = Net()
    with pytest.raises(TypeError, match='optimizer must be a torch.optim.Optimizer.*got Wrapper'):
        make(tmp_path, net, optimizer=Wrapper(net))
    assert content(tmp_path) == {}
    exp = make(tmp_path, net)
    with pytest.raises(ValueError, match='num_epochs must be a whole number, 0 or more, got -1'):
        exp.run(-1)
    exp = make(
        tmp_path / 'skipping', net := Net(), Data(bad=3),
        optimizer=Skipping(net.parameters(), lr=0.1))
    with pytest.raises(FloatingPointError, match='the loss is nan in epoch 1'):
        exp.run(1)
    assert exp.epoch == 0


class Unreduced(Net):
    def criterion(self, y, d):
        return (y - d).square()


def test_an_unreduced_loss(tmp_path):
    exp = make(tmp_path, Unreduced())
    with pytest.raises(RuntimeError, match='grad can be .* only for scalar outputs'):
        exp.run(1)
    assert exp.epoch == 0
