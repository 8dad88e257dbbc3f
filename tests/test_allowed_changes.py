"""nntools: `allow` keeps what fits of a checkpoint, and the file until an epoch is trained."""

from pathlib import Path

import pytest
import torch
import torch.utils.data as td
from torch import nn

import nntools as nt
from tests.helpers import (
    Data,
    Net,
    OneLayer,
    conflict,
    content,
    cosine,
    make,
    same,
    weights,
    with_optimizer,
    without_settings,
)

pytestmark = pytest.mark.filterwarnings('ignore:Using a target size')  # of nets with two outputs


class Deeper(Net):
    """With one more layer."""

    def __init__(self, width=4):
        super().__init__(width)
        self.more = nn.Linear(width, width)

    def forward(self, x):
        hidden = torch.tanh(self.more(torch.tanh(self.norm(self.hidden(x)))))
        return self.out(self.drop(hidden))


def stored(folder):
    return nt.load_checkpoint(folder / 'checkpoint.pth.tar')


def written_as_2019(folder, **options):
    make(folder, **options).run(2)
    without_settings(folder)


# --- all weights fit -----------------------------------------------------------------------------

class Classifier(nt.NeuralNetwork):
    """Of points in the plane: are they in a circle?"""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 2))

    def forward(self, x):
        return self.layers(x)

    criterion = staticmethod(nn.functional.cross_entropy)


def test_more_dropout_keeps_the_accuracy(tmp_path):
    """What the refusal proposes does not destroy the training."""
    x = torch.rand(512, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = td.TensorDataset(x, (x.norm(dim=1) < 0.8).long())
    correct = {'accuracy': lambda y, d: (y.argmax(1) == d).float()}

    def build(dropout, **options):
        net = Classifier(dropout)
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        return nt.Experiment(net, data, data, adam, nt.StatsManager(correct), str(tmp_path),
                             seed=0, **options)

    exp = build(0.2)
    exp.run(12)
    before = exp.evaluate()['accuracy']
    assert before > 0.9
    with pytest.raises(ValueError, match=r"allow=\('Net',\) goes on with the new ones"):
        build(0.5)
    exp = build(0.5, allow=('Net',))
    assert exp.epoch == 12 and exp.evaluate()['accuracy'] == before
    exp.run(13)
    assert exp.evaluate()['accuracy'] > before - 0.05


def test_where_all_weights_fit_the_optimizer_goes_on(tmp_path, capsys):
    old = make(tmp_path, Net(dropout=0.2))
    old.run(2)
    exp = make(tmp_path, Net(dropout=0.5), allow='Net')
    assert same(weights(exp.net), weights(old.net)) and exp.net.drop.p == 0.5
    assert same(exp.optimizer.state_dict(), old.optimizer.state_dict())
    assert same(exp.history, old.history)
    said = capsys.readouterr().out
    assert 'begin as given' not in said and 'not used' not in said


# --- some weights fit ----------------------------------------------------------------------------

def test_each_weight_that_fits_is_kept(tmp_path, capsys):
    old = make(tmp_path)
    old.run(2)
    exp = make(tmp_path, Net(outputs=2), allow=('Net',))
    before, now, given = weights(old.net), weights(exp.net), weights(Net(outputs=2))
    for name in now:
        new = name in ('out.weight', 'out.bias')
        assert same(now[name], given[name] if new else before[name]), name
    assert exp.epoch == 2 and same(exp.history, old.history)
    assert exp.optimizer.state_dict()['state'] == {}  # its momenta were of other weights
    assert capsys.readouterr().out.count(
        'Net: no stored weights fit out.weight, out.bias; they and optimizers begin anew\n') == 1
    exp.run(3)
    assert exp.epoch == 3 and make(tmp_path, Net(outputs=2)).epoch == 3


def test_a_layer_more_and_a_layer_less(tmp_path, capsys):
    make(tmp_path).run(2)
    change = ('Net',)
    exp = make(tmp_path, Deeper(), allow=change)
    assert 'no stored weights fit more.weight, more.bias; they' in capsys.readouterr().out
    exp.run(3)
    capsys.readouterr()
    less = make(tmp_path, Net(), allow=change)
    said = capsys.readouterr().out
    assert 'Net: more.weight, more.bias of the checkpoint are not used; optimizers' in said
    assert 'begin as given' not in said
    deeper = weights(exp.net)
    assert same(weights(less.net), {name: deeper[name] for name in weights(Net())})


def test_many_names_are_shortened(tmp_path, capsys):
    make(tmp_path).run(1)
    make(tmp_path, Net(width=5), allow='Net')
    line, = [line for line in capsys.readouterr().out.splitlines() if 'no stored' in line]
    assert 'hidden.weight, hidden.bias, ' in line and ' ...; they' in line
    assert 'out.weight' not in line


@pytest.mark.parametrize('also', [{}, {'scheduler': cosine(4)}], ids=['alone', 'with a schedule'])
def test_new_weights_begin_with_the_rates_of_now(tmp_path, also):
    old = make(tmp_path, **also)
    old.run(2)
    exp = make(tmp_path, Net(outputs=2), **also, allow='Net')
    assert exp.optimizer.param_groups[0]['lr'] == old.optimizer.param_groups[0]['lr']
    exp.run(3)
    assert exp.epoch == 3


def test_where_no_weight_fits(tmp_path):
    make(tmp_path).run(1)
    message = conflict(tmp_path, OneLayer(), allow='Net')
    assert 'holds another Net, of which no weight fits' in message and str(tmp_path) in message
    assert make(tmp_path).epoch == 1


def test_modules_in_also_save_keep_what_fits(tmp_path, capsys):
    old = make(tmp_path, also_save={'critic': Net()})
    nn.init.constant_(old.also_save['critic'].hidden.weight, 3.0)
    old.run(1)
    changed = Net(outputs=2)
    assert 'critic: out stored' in conflict(tmp_path, also_save={'critic': changed})
    capsys.readouterr()
    exp = make(tmp_path, also_save={'critic': changed}, allow='critic')
    assert (changed.hidden.weight == 3).all() and same(weights(exp.net), weights(old.net))
    said = capsys.readouterr().out
    assert 'critic: no stored weights fit out.weight, out.bias; they' in said
    assert 'Net: ' not in said
    message = conflict(tmp_path, also_save={'critic': OneLayer()}, allow='critic')
    assert 'holds another critic, of which no weight fits' in message


# --- the file ------------------------------------------------------------------------------------

def fail(*_):
    raise ZeroDivisionError


CHANGES = {
    'optimizer': lambda: {'lr': 0.5, 'allow': ('Optimizer',)},
    'another optimizer': lambda: {
        **with_optimizer(torch.optim.SGD, 0.1), 'allow': ('Optimizer',)},
    'dropout': lambda: {'net': Net(dropout=0.5), 'allow': ('Net',)},
    'layers': lambda: {'net': Net(outputs=2), 'allow': ('Net',)},
    'schedule': lambda: {'scheduler': cosine(4), 'allow': ('Scheduler',)},
    'data': lambda: {'train': Data(30), 'allow': ('TrainSet', 'TrainSetSize')},
}


@pytest.mark.parametrize('change', CHANGES)
def test_nothing_is_overwritten_before_an_epoch_is_trained(tmp_path, change):
    make(tmp_path, best_by='loss').run(2)
    before = content(tmp_path)
    exp = make(tmp_path, best_by='loss', **CHANGES[change]())
    assert exp.epoch == 2 and content(tmp_path) == before
    exp.run(2)  # nothing to do
    assert content(tmp_path) == before
    for options in ({'callback': fail}, {'after_batch': fail}):
        with pytest.raises(ZeroDivisionError):
            exp.run(3, **options)
        assert exp.epoch == 2 and content(tmp_path) == before, options
    exp.run(3)
    assert content(tmp_path) != before


@pytest.mark.parametrize('change', CHANGES)
def test_the_checkpoint_before_is_kept_as_a_copy(tmp_path, change, capsys):
    make(tmp_path).run(2)
    path = tmp_path / 'checkpoint.pth.tar'
    before = path.read_bytes()
    exp = make(tmp_path, **CHANGES[change]())
    assert 'is kept' not in capsys.readouterr().out
    exp.run(4)
    copy = Path(f'{path}.old')
    assert capsys.readouterr().out.count(
        f'The checkpoint of the settings before is kept: {copy}\n') == 1
    assert copy.read_bytes() == before and path.read_bytes() != before
    assert len(stored(tmp_path)['History']) == 4
    exp.run(5)
    names = {'checkpoint.pth.tar', 'checkpoint.pth.tar.old', 'config.txt'}
    assert content(tmp_path).keys() == names


def test_each_change_keeps_a_copy_of_its_own(tmp_path):
    make(tmp_path).run(1)
    for epoch, rate in enumerate((0.02, 0.03, 0.04), start=2):
        make(tmp_path, lr=rate, allow='Optimizer').run(epoch)
    for ending, epoch in (('', 4), ('.old', 1), ('.old2', 2), ('.old3', 3)):
        state = nt.load_checkpoint(tmp_path / f'checkpoint.pth.tar{ending}')
        assert len(state['History']) == epoch


def test_without_a_change_there_is_no_copy(tmp_path):
    make(tmp_path).run(1)
    make(tmp_path, allow=('Net', 'Optimizer')).run(2)
    assert not list(tmp_path.glob('*.old*'))


def test_the_copy_can_be_gone_back_to(tmp_path):
    old = make(tmp_path, Net(dropout=0.2))
    old.run(2)
    make(tmp_path, Net(dropout=0.5), allow='Net').run(3)
    path = tmp_path / 'checkpoint.pth.tar'
    Path(f'{path}.old').replace(path)
    again = make(tmp_path, Net(dropout=0.2))
    assert again.epoch == 2 and same(weights(again.net), weights(old.net))


def test_a_folder_without_config_loses_nothing(tmp_path):
    """Only the checkpoint was copied to another machine."""
    make(tmp_path).run(2)
    (tmp_path / 'config.txt').unlink()
    before = stored(tmp_path)
    exp = make(tmp_path, Net(dropout=0.5), allow='Net')
    with pytest.raises(ZeroDivisionError):
        exp.run(3, fail)
    assert same(stored(tmp_path), before) and not list(tmp_path.glob('*.old*'))


# --- checkpoints without settings ----------------------------------------------------------------

def test_without_stored_settings_the_given_options_count(tmp_path):
    written_as_2019(tmp_path, lr=0.01)
    momenta = stored(tmp_path)['Optimizer']['state']
    assert make(tmp_path, lr=0.5).optimizer.param_groups[0]['lr'] == 0.01
    exp = make(tmp_path, lr=0.5, allow='Optimizer')
    assert exp.optimizer.param_groups[0]['lr'] == 0.5
    assert same(exp.optimizer.state_dict()['state'], momenta)


def test_of_a_checkpoint_without_settings_what_fits_is_kept(tmp_path, capsys):
    written_as_2019(tmp_path)
    before = stored(tmp_path)
    assert 'out.weight' in conflict(tmp_path, Net(outputs=2))
    capsys.readouterr()
    exp = make(tmp_path, Net(outputs=2), allow='Net')
    assert 'no stored weights fit out.weight, out.bias; they' in capsys.readouterr().out
    assert same(exp.net.hidden.weight.detach(), before['Net']['hidden.weight'])
    exp.run(3)
    assert same(nt.load_checkpoint(tmp_path / 'checkpoint.pth.tar.old'), before)
