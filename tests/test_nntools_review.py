"""nntools: one test for each of the 46 behaviours that a review of the first edition found (issue 9).

This file is also the program that some of them start: ``python test_nntools_review.py hold FOLDER``
trains until it is told to go on, ``torchrun ... processes FOLDER`` is one of two processes.
"""
import collections
import contextlib
import csv
import gc
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data as td

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from test_nntools import Data, Net, Stats, content, end, forks, make, same, without_settings  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler, swa_utils  # noqa: E402

import nntools as nt  # noqa: E402

torch.set_num_threads(1)


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def conflict(*args, **options):
    """The message with which an experiment is refused; nothing that was saved may be touched."""
    saved = content(Path(args[0]))
    with pytest.raises(ValueError) as error:
        make(*args, **options)
    assert content(Path(args[0])) == saved
    return str(error.value)


class Steps(nt.Experiment):
    """Counts the batches of training."""
    steps = 0

    def step(self, batch):
        self.steps += self.net.training
        return super().step(batch)


def experiment(folder, kind=nt.Experiment, net=None, data=None, stats=None, **options):
    """As `make`, of another class."""
    net = net or Net()
    options = {'batch_size': 4, 'seed': 0} | options
    return kind(net, data or Data(), Data(7), torch.optim.Adam(net.parameters(), lr=0.01), stats or Stats(), str(folder), **options)


# --- silent loss, silently wrong --------------------------------------------------------------------

@forks
def test_01_two_presses_of_ctrl_c_change_nothing(tmp_path):
    """Real signals in real processes, at 40 random moments, 3 to 90 ms apart; some run on, some start anew."""
    from test_nntools_resume import command
    result = command('presses', tmp_path, 40)
    assert result['double presses'] >= 40 and result['trainings'] >= 4, result


def interrupted(function, *moments):
    """Calls it, with a KeyboardInterrupt at the n-th line of nntools that it comes to; then at the n-th line of the fall-back,
    for each further n given. Returns at how many lines it was."""
    left, lines, fall_back = list(moments), 0, nt._fall_back

    def at_a_line(frame, event, _):
        nonlocal lines
        lines += event == 'line'
        if event == 'line' and left and lines == left[0]:
            del left[0]
            raise KeyboardInterrupt  # Python stops tracing then
        return at_a_line

    def trace():
        sys.settrace(lambda frame, *_: at_a_line if frame.f_code.co_filename == nt.__file__ else None)

    def traced_fall_back(*args):
        nonlocal lines
        lines = 0
        trace()
        fall_back(*args)

    nt._fall_back = traced_fall_back
    try:
        trace()
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        nt._fall_back = fall_back
    torch.set_grad_enabled(True)  # such an interrupt can come between the body of a `with` and its end; a real one does not
    return lines


@pytest.mark.parametrize('options', [{}, {'save_every': 3, 'best_by': 'loss'},
                                     {'save_every': 2, 'best_by': 'loss', 'perform_validation_during_training': True}])
def test_01_interrupts_at_any_line_change_nothing(tmp_path, options):
    """Twice in a run, the second time in the fall-back; then in the next run, which begins with going back; or in a load before."""
    moments = random.Random(0)
    whole = make(tmp_path / 'whole', **options)
    whole.run(2)
    lines = interrupted(lambda: whole.run(4))
    for k in range(40):
        exp = make(tmp_path / str(k), **options)
        exp.run(2)
        first = moments.choice([moments.randrange(1, lines), moments.randrange(1, 60), lines - moments.randrange(60)])
        if k % 3 == 2:
            interrupted(exp.load, moments.randrange(1, 30))
        for _ in range(1 + k % 2):
            interrupted(lambda: exp.run(4), first, moments.randrange(1, 40))  # noqa: B023
            first = moments.randrange(1, 40)
        exp.run(4)
        for name in content(tmp_path / 'whole').keys() - {'config.txt'}:
            a, b = (nt.load_checkpoint(e.checkpoint_path.replace('checkpoint.pth.tar', name)) for e in (whole, exp))
            assert same(a | {'Seconds': 0}, b | {'Seconds': 0}), (k, first, name)
        assert same(end(whole), end(exp)), (k, first)
        assert content(tmp_path / str(k)).keys() == content(tmp_path / 'whole').keys(), (k, first)


@pytest.mark.parametrize('line', range(8, 24, 4))
def test_01_after_two_presses_and_a_load_the_hand_counts(tmp_path, line):
    exp, rates = make(tmp_path), []
    exp.run(2)
    interrupted(lambda: exp.run(4), 150, line)  # the second one in the fall-back
    exp.load()
    exp.optimizer.param_groups[0]['lr'] = 1e-4
    exp.run(3, lambda e: rates.append(e.optimizer.param_groups[0]['lr']))
    assert rates == [1e-4, 1e-4]


@pytest.mark.parametrize('where', ['save', 'run'])
def test_01_an_interrupt_inside_of_torch_save_is_an_interrupt(tmp_path, monkeypatch, where):
    """As torch does it: closing the half-written file fails with a RuntimeError of its own."""
    def interrupted(state, file):
        try:
            file.write(b'half of it')
            raise KeyboardInterrupt
        finally:
            raise RuntimeError('unexpected pos 18084096 vs 18083988')

    exp = make(tmp_path)
    exp.run(1)
    saved = content(tmp_path)
    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        exp.run(3) if where == 'run' else exp.save()
    assert content(tmp_path) == saved
    monkeypatch.undo()
    exp.run(3)
    whole = make(tmp_path / 'whole')
    whole.run(3)
    assert same(end(whole), end(exp))


def test_01_a_fall_back_that_is_interrupted_is_not_saved(tmp_path):
    """The second press comes while the weights are put back: the next run, and `save`, have the last finished epoch."""
    class Interruptible(Net):
        loads = 0

        def load_state_dict(self, *args, **options):
            self.loads += 1
            if self.loads <= 3:
                nn.Module.load_state_dict(self.hidden, {k: v * math.nan for k, v in self.hidden.state_dict().items()})
                raise KeyboardInterrupt
            return super().load_state_dict(*args, **options)

    def press(exp):
        if exp.epoch == 2 and not pressed:
            pressed.append(1)
            raise KeyboardInterrupt

    pressed, net = [], Interruptible()
    exp = make(tmp_path / 'a', net)
    while net.loads < 3:
        with pytest.raises(KeyboardInterrupt):
            exp.run(4, press)
    exp.save()
    assert nt.load_checkpoint(exp.checkpoint_path)['Net']['hidden.weight'].isfinite().all()
    exp.run(4, press)
    whole = make(tmp_path / 'whole', Net())
    whole.run(4)
    assert net.loads >= 3 and same(whole.history, exp.history) and same(weights(whole.net), weights(net))


@pytest.mark.parametrize('twice', [False, True])
def test_01_a_best_epoch_whose_file_was_interrupted_is_written(tmp_path, monkeypatch, twice):
    """The first press comes while best.pth.tar is written, the second while the weights are put back."""
    class Interruptible(Net):
        def load_state_dict(self, *args, **options):
            if len(presses) == 1 and twice:
                presses.append('in the fall-back')
                raise KeyboardInterrupt
            return super().load_state_dict(*args, **options)

    def save(state, file):
        if len(state['History']) == 1 and not presses:
            presses.append('in writing')
            raise KeyboardInterrupt
        saved(state, file)

    presses, saved, options = [], torch.save, {'best_by': 'loss', 'best_mode': 'max'}  # the first epoch is the best
    exp = make(tmp_path / 'a', Interruptible(), **options)
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(KeyboardInterrupt):
        exp.run(4)
    exp.run(4)
    assert len(presses) == 1 + twice and exp.best[0] == 1 and best_agrees(exp)
    whole = make(tmp_path / 'whole', Net(), **options)
    whole.run(4)
    assert same(nt.load_checkpoint(exp.best_path)['Net'], nt.load_checkpoint(whole.best_path)['Net'])


def cosine(T_max):
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max)


@pytest.mark.parametrize('old, new, line', [
    (cosine(5), cosine(10), 'Scheduler: T_max stored 5, given 10'),
    (lambda o: lr_scheduler.StepLR(o, 2), lambda o: lr_scheduler.StepLR(o, 2, 0.5), 'Scheduler: gamma stored 0.1, given 0.5'),
    (lambda o: lr_scheduler.StepLR(o, 2), cosine(2), 'Scheduler: stored StepLR, given CosineAnnealingLR'),
    (cosine(5), None, 'Scheduler: stored CosineAnnealingLR, given None'),
    (lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), cosine(5)(o)], [2]),
     lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), cosine(9)(o)], [2]), 'T_max'),
], ids=['an argument', 'a default', 'another', 'none', 'inside'])
def test_02_a_changed_schedule_is_a_conflict(tmp_path, old, new, line):
    make(tmp_path, scheduler=old).run(5)
    message = conflict(tmp_path, scheduler=new)
    assert line in message and message.rstrip('.').endswith("allow=('Scheduler',) goes on with the new ones"), message
    assert make(tmp_path, scheduler=old).epoch == 5


def test_02_a_changed_schedule_goes_on_as_if_it_had_been_there(tmp_path):
    make(tmp_path, scheduler=cosine(5)).run(5)
    exp = make(tmp_path, scheduler=cosine(10), allow=('Scheduler',))
    assert exp.epoch == 5 and exp.optimizer.param_groups[0]['lr'] == pytest.approx(0.01 * 0.5)
    exp.run(10)
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-9)
    assert make(tmp_path, scheduler=cosine(10)).epoch == 10  # now it is the stored one


class Layers(Net):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1))

    def forward(self, x):
        return self.layers(x)


class Told(Data):
    """A data set that describes itself as it is told."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def __repr__(self):
        return self.text


NETWORKS = [
    (Net(dropout=0.5), Net(dropout=0.0)), (Layers(nn.Tanh()), Layers(nn.ReLU())),
    (Layers(nn.BatchNorm1d(4, eps=1e-5)), Layers(nn.BatchNorm1d(4, eps=1e-3)))]


@pytest.mark.parametrize('old, new', [
    *[({'net': old}, {'net': new}) for old, new in NETWORKS],
    ({'train': Told('Faces(60)')}, {'train': Told('Cats(60)')}),
    ({'train': Told('Dataset Faces\n    split: a\n    size: 60')}, {'train': Told('Dataset Faces\n    split: b\n    size: 60')}),
    ({'drop_last': True}, {'drop_last': False}),
], ids=['dropout', 'activation', 'eps', 'data', 'data of many lines', 'drop_last'])
def test_03_what_describes_itself_otherwise_is_a_conflict(tmp_path, old, new):
    make(tmp_path, **old).run(1)
    message = conflict(tmp_path, **new)
    name = {'net': 'Net', 'train': 'TrainSet', 'drop_last': 'DropLast'}[next(iter(new))]
    assert f'\n  {name}: ' in message and len(re.findall('^  ', message, re.MULTILINE)) == 1, message
    assert make(tmp_path, **old).epoch == 1


@pytest.mark.parametrize('old, new', NETWORKS, ids=['dropout', 'activation', 'eps'])
def test_03_of_another_torch_names_and_shapes_are_compared(tmp_path, monkeypatch, old, new):
    with monkeypatch.context() as patch:
        patch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.6.0'))
        make(tmp_path, old).run(1)
    assert make(tmp_path, old).epoch == 1
    if same({k: v.shape for k, v in old.state_dict().items()}, {k: v.shape for k, v in new.state_dict().items()}):
        assert make(tmp_path, new).epoch == 1
    message = conflict(tmp_path, Net(width=9))
    assert type(old) is not Net or 'size mismatch for hidden.weight' in message and 'torch.Size([4, 3])' in message and str(tmp_path) in message


class Two(nt.NeuralNetwork):
    """A network with two losses and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(9, 9)
        self.second = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class TwoLosses(nt.Experiment):
    def step(self, batch):
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        other = (self.net.second(torch.tanh(self.net.body(x))) + d).square().mean()
        self.update(other, self.also_save['second'])
        return loss + other.detach(), x, y, d


class SometimesUsed(nt.Experiment):
    """A layer that only the process with the first half of the batch uses."""

    def step(self, batch):
        x, d = batch
        y = self.net(x)
        if x[0, 2] < 0.5:
            y = y + self.net.second(torch.tanh(self.net.body(x)))
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d


class Adversarial(nt.Experiment):
    """As the docstring of `step` has it."""

    def step(self, batch):
        x, _ = batch
        fake = self.net(torch.ones_like(x))
        score = nn.functional.softplus
        loss_d = score(-self.net.second(x.repeat(1, 2)[:, :4])).mean() + score(self.net.second(fake.detach().repeat(1, 4))).mean()
        self.update(loss_d, self.also_save['second'])
        loss_g = score(-self.net.second(fake.repeat(1, 4))).mean()
        self.update(loss_g)
        return loss_g + loss_d, x, None, None


def build_two(folder, kind=nt.Experiment, seed=0, **options):
    torch.manual_seed(seed)
    net = Two()
    first = torch.optim.SGD([*net.body.parameters(), *net.head.parameters(), *net.unused.parameters(),
                             *(net.second.parameters() if kind is SometimesUsed else ())], lr=0.1, momentum=0.9, weight_decay=0.1)
    also = {} if kind in (nt.Experiment, SometimesUsed) else {'second': torch.optim.SGD(
        [*net.second.parameters(), *(net.body.parameters() if kind is TwoLosses else ())], lr=0.1)}
    return kind(net, Data(24), Data(7), first, nt.StatsManager(), str(folder), 4, seed=0, also_save=also, **options)


class Largest(nt.StatsManager):
    """A statistic that is not a sum."""

    def init(self):
        super().init()
        self.largest = -math.inf

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.largest = max(self.largest, d.max().item())

    def summarize(self):
        return {'loss': super().summarize(), 'largest': self.largest, 'samples': self.number_samples}


class Failing(nt.Experiment):
    """One process meets an error, in the second epoch."""

    def step(self, batch):
        if self.epoch == 1 and self.batch == 2 and os.environ.get('RANK') == '1':
            raise ArithmeticError('on one process only')
        return super().step(batch)


def processes(folder):
    """What each of two processes does."""
    folder, rank = Path(folder), int(os.environ['RANK'])
    said, called = {}, []
    for kind in (nt.Experiment, TwoLosses, SometimesUsed, Adversarial):
        exp = build_two(folder / kind.__name__, kind, seed=rank, grad_clip=1.0)
        exp.run(3)
        said[kind.__name__] = {name: value.tolist() for name, value in exp.net.state_dict().items()}
    exp = build_two(folder / 'accumulated', seed=rank, batches_per_step=2)
    exp.run(2)
    said['accumulated'] = {name: value.tolist() for name, value in exp.net.state_dict().items()}

    def callback(e):
        called.append(e.epoch)
        (folder / f'callback{rank}').touch()
        e.to_csv(folder / 'history.csv')
        e.save(folder / 'copy.pth.tar')
        called.append(round(e.evaluate()['samples']))
        if e.epoch == 2:
            e.stop()

    net = Two()
    exp = nt.Experiment(net, Data(24), td.DataLoader(Data(7), 2), torch.optim.SGD(net.parameters(), lr=0.1), Largest(),
                        str(folder / 'called'), 4, seed=0, perform_validation_during_training=True)
    exp.run(5, callback)
    said['called'], said['epoch'] = called, exp.epoch
    said['own loader'] = exp.evaluate()
    said['trained on'] = exp.history[0][0]
    torch.manual_seed(rank)
    net, other = Two(), Net()
    other.out.bias.data.fill_(rank)
    parts = [net.body, net.second]
    exp = nt.Experiment(net, Data(24), td.Subset(Data(8), range(rank, 8, 2)), torch.optim.SGD(
        [{'params': part.parameters()} for part in parts], lr=0.3), nt.StatsManager(), str(folder / 'phases'), 4, True, seed=0,
        also_save={'other': other})

    def phases(e):
        thawed = e.epoch >= 2
        net.body.requires_grad_(thawed)
        for group, rate in zip(e.optimizer.param_groups, (0.01, 0.1) if thawed else (0, 0.3)):
            group['lr'] = rate

    exp.run(4, phases)
    said['phases'] = {'weights': [p.tolist() for _, p in nn.Module.named_parameters(net)], 'bias': other.out.bias.tolist(),
                      'rates': [group['lr'] for group in exp.optimizer.param_groups], 'history': exp.history,
                      'frozen': not net.body.weight.requires_grad}
    exp = build_two(folder / 'failing', Failing)
    try:
        exp.run(3)
    except Exception as error:
        said['error'] = type(error).__name__
    try:
        exp.run(3)
    except RuntimeError as error:
        said['parted'] = str(error)
    (folder / f'rank{rank}.json').write_text(json.dumps(said))


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """The folder, and what two processes of torchrun said."""
    if sys.platform == 'win32':
        pytest.skip('torchrun needs libuv, which wheels for Windows lack (PyTorch issue 139990)')
    folder = tmp_path_factory.mktemp('torchrun')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__,
                           'processes', str(folder)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f'rank{rank}.json').read_text()) for rank in (0, 1)]


@pytest.mark.parametrize('kind', [nt.Experiment, TwoLosses, SometimesUsed, Adversarial])
def test_04_gradients_are_averaged_at_every_update(ranks, tmp_path, kind):
    """Two losses, unused layers and a GAN end with the same bits on both processes, and as in one process."""
    _, (first, second) = ranks
    assert first[kind.__name__] == second[kind.__name__]
    one = build_two(tmp_path, kind, grad_clip=1.0)
    before = weights(one.net)
    one.run(3)
    assert np.allclose(first[kind.__name__]['unused.weight'], before['unused.weight'], atol=0)  # weight decay leaves it alone
    if kind is not SometimesUsed:  # whose two halves are other functions than the whole
        assert all(np.allclose(first[kind.__name__][name], value, atol=1e-5) for name, value in one.net.state_dict().items())
    assert not np.allclose(first[kind.__name__]['body.weight'], before['body.weight'])


class Own(nt.Experiment):
    def step(self, batch):
        return torch.tensor(float(len(batch['loss']))), batch['x'], None, batch.get('d')


def packed(sizes):
    return nn.utils.rnn.pack_sequence([torch.zeros(n, 5) for n in sizes], enforce_sorted=False)


@pytest.mark.parametrize('x, d, samples', [
    (torch.zeros(3, 5), torch.zeros(3), 3),
    ({'a': torch.zeros(3, 5), 'b': torch.zeros(3, 2)}, None, 3),
    ([torch.zeros(3, 5), torch.zeros(3, 1)], torch.zeros(3), 3),
    ([torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)], [torch.zeros(5), torch.zeros(2)], 2),
    ([{'image': torch.zeros(3, 4, 4)}, {'image': torch.zeros(3, 6, 4)}], [torch.zeros(2, 4), torch.zeros(7, 4)], 2),
    (packed([4, 2, 7]), None, 3), (packed([4]), None, 1),
], ids=['tensor', 'dict', 'parts', 'pairs of sizes', 'detection', 'packed', 'packed one'])
def test_05_samples_are_counted_rightly(tmp_path, x, d, samples):
    """What default_collate gives, lists of samples, packed sequences."""
    batch = {'x': x, 'loss': torch.zeros(2)} | ({} if d is None else {'d': d})
    other = {'x': torch.zeros(2, 5), 'loss': torch.zeros(7)}
    exp = experiment(tmp_path, Own, stats=nt.StatsManager())
    loss = exp.evaluate(td.DataLoader([batch, other], batch_size=None))
    assert exp.stats_manager.number_samples == samples + 2
    assert loss == pytest.approx((2 * samples + 7 * 2) / (samples + 2))


def test_05_what_can_not_be_counted_is_asked_for(tmp_path):
    class Words(nt.StatsManager):
        def count_samples(self, x, d):
            return len(x.split())

    batches = td.DataLoader([{'x': 'three small words', 'loss': torch.zeros(2)}], batch_size=None)
    with pytest.raises(TypeError, match=r'how many samples.* a str .*count_samples\(x, d\)'):
        experiment(tmp_path, Own, stats=nt.StatsManager()).evaluate(batches)
    two_or_three = [torch.zeros(3, 5), torch.zeros(3, 1)]  # two images, or three samples in two parts?
    with pytest.raises(TypeError, match=r'how many samples.* a list of 2 tensors.*count_samples\(x, d\)'):
        nt.StatsManager().count_samples(two_or_three, None)
    exp = experiment(tmp_path / 'b', Own, stats=Words())
    exp.evaluate(batches)
    assert exp.stats_manager.number_samples == 3


def test_06_the_best_weights_do_not_shorten_the_history(tmp_path):
    def build():
        return make(tmp_path, best_by='error', best_mode='max', perform_validation_during_training=True, lr=0.03)

    exp = build()
    exp.run(5)
    k, value = exp.best
    assert k < 5
    optimizer = exp.optimizer.state_dict()
    exp.load_best()
    assert exp.epoch == 5 and exp.evaluate()['error'] == value
    assert same(optimizer, exp.optimizer.state_dict())
    exp = build()
    exp.load_best()
    exp.run(6)
    assert exp.epoch == 6 and len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 6
    exp.load(exp.best_path)  # and this goes back
    assert exp.epoch == k and exp.evaluate()['error'] == value
    with pytest.raises(RuntimeError, match='there is no checkpoint.*best.pth.tar'):
        make(tmp_path / 'new').load_best()


def test_07_what_an_interrupt_says_is_on_disk(tmp_path, capsys):
    def interrupt(e):
        if e.epoch == 8:
            raise KeyboardInterrupt

    exp = make(tmp_path / 'cut', save_every=5)
    with pytest.raises(KeyboardInterrupt):
        exp.run(20, interrupt)
    assert 'KeyboardInterrupt: back to epoch 8' in capsys.readouterr().out
    assert len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 8
    again, whole = make(tmp_path / 'cut', save_every=5), make(tmp_path / 'whole')
    again.run(9)
    whole.run(9)
    assert again.epoch == 9 and same(end(whole), end(again))


def test_08_averaged_weights_leave_out_the_untrained_ones(tmp_path):
    """The recipe: after each batch. Resumed, it is the average of the run that was never interrupted."""
    seen = []

    def build(name):
        net = Net()
        average = swa_utils.AveragedModel(net)
        exp = make(tmp_path / name, net, also_save={'average': average})

        def after_batch(exp, loss):
            assert math.isfinite(loss) and type(loss) is float
            average.update_parameters(exp.net)
            seen.append(exp.net.out.weight.detach().clone())

        return exp, average, after_batch

    exp, average, after_batch = build('whole')
    exp.run(4, after_batch=after_batch)
    assert average.n_averaged == 20 == len(seen)
    assert torch.allclose(average.module.out.weight, torch.stack(seen).mean(0), atol=1e-6)
    for epochs in (1, 2, 4):
        parts, again, after_batch = build('parts')
        parts.run(epochs, after_batch=after_batch)
    assert same(weights(average), weights(again)) and same(end(exp), end(parts))


def test_08_the_averages_of_a_callback_that_asks_for_the_epoch(tmp_path):
    def build(name):
        net = Net()
        average = swa_utils.AveragedModel(net)
        exp = make(tmp_path / name, net, also_save={'average': average})
        return exp, average, lambda e: e.epoch > average.n_averaged and average.update_parameters(e.net)

    exp, average, callback = build('whole')
    exp.run(4, callback)
    for epochs in (1, 3, 4):
        parts, again, callback = build('parts')
        parts.run(epochs, callback)
    assert average.n_averaged == again.n_averaged == 4 and same(weights(average), weights(again))


def best_agrees(exp):
    path = Path(exp.best_path)
    return path.exists() and len(nt.load_checkpoint(path)['History']) == exp.best[0]


def test_09_the_best_checkpoint_is_that_of_exp_best(tmp_path, capsys):
    """Whether best_by is given later, or changed, or best_mode is."""
    options = {'lr': 0.03, 'perform_validation_during_training': True}
    make(tmp_path, **options).run(3)
    exp = make(tmp_path, **options, best_by='error')
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    exp.run(5)
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    exp = make(tmp_path / 'b', **options, best_by='error')
    exp.run(4)
    assert best_agrees(exp)
    old = Path(exp.best_path).read_bytes()
    capsys.readouterr()
    exp = make(tmp_path / 'b', **options, best_by='error', best_mode='max')
    assert Path(exp.best_path).read_bytes() == old  # who only looks changes nothing
    with pytest.raises(RuntimeError, match=r'best.pth.tar is of epoch \d, but the best one is 1'):
        exp.load_best()
    exp.run(12)
    assert Path(f'{exp.best_path}.old').read_bytes() == old and 'best.pth.tar.old' in capsys.readouterr().out  # nothing is lost
    assert not Path(exp.best_path).exists() or best_agrees(exp)
    assert exp.best[1] == max(val['error'] for _, val in exp.history)


def hold(folder):
    """Trains, and waits in the callback until it may go on."""
    exp = make(folder)

    def wait(e):
        if e.epoch == 2:
            (Path(folder) / 'holding').touch()
        while e.epoch == 2 and not (Path(folder) / 'go').exists():
            time.sleep(0.02)

    exp.run(4, wait)


@forks
def test_10_a_folder_in_use(tmp_path):
    make(tmp_path)  # the folder is there
    child = subprocess.Popen([sys.executable, __file__, 'hold', str(tmp_path)])
    try:
        while not (tmp_path / 'holding').exists():
            assert child.poll() is None
            time.sleep(0.05)
        second = make(tmp_path)
        saved = content(tmp_path)
        with pytest.raises(RuntimeError, match='is in use') as error:
            second.run(4)
        assert str(tmp_path) in str(error.value) and second.epoch == 2
        assert content(tmp_path) == saved  # the first one is waiting, and has lost nothing
        elsewhere = make(tmp_path / 'elsewhere')
        elsewhere.run(4)
    finally:
        (tmp_path / 'go').touch()
        assert child.wait() == 0
    third = make(tmp_path)
    assert third.epoch == 4 and same(end(third), end(elsewhere))
    third.run(5)  # it is free again


@forks
def test_10_two_that_start_at_once(tmp_path):
    """Neither meets a damaged file; what is there afterwards is the training of one."""
    program = (f'import sys; sys.path[:0] = {sys.path[:4]!r}; from test_nntools import make; input()\n'
               f'try: make({str(tmp_path)!r}).run(4)\nexcept RuntimeError as error: print(error)')
    both = [subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in both:
        child.stdin.write('\n')
        child.stdin.flush()
    said = [child.communicate()[0] for child in both]
    assert all(child.returncode == 0 for child in both)
    # the last: it read a checkpoint of an epoch before the other one had finished, and found the folder free again
    ends = 'Finish training for 4', 'is in use', 'trained by another experiment'
    assert all(any(words in text for words in ends) for text in said), said
    exp, whole = make(tmp_path), make(tmp_path / 'whole')
    whole.run(4)
    assert exp.epoch == 4 and same(end(exp), end(whole))


def test_10_under_torchrun_a_callback_runs_once(ranks):
    folder, (first, second) = ranks
    assert first['called'] == [0, 7, 1, 7, 2, 7] and second['called'] == []  # it may evaluate, save, write and stop
    assert first['epoch'] == second['epoch'] == 2
    assert not (folder / 'callback1').exists() and nt.load_checkpoint(folder / 'copy.pth.tar')['History'][1:]
    assert len(list(csv.DictReader(open(folder / 'history.csv')))) == 2


def test_11_freezing_and_unfreezing(tmp_path):
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    net.requires_grad_(False)
    assert list(net.parameters()) == []
    net.requires_grad_(True)
    assert [name for name, _ in net.named_parameters()] == names and len(names) == 6
    net.hidden.requires_grad_(False)
    assert [name for name, _ in net.named_parameters()] == names[2:]
    exp = make(tmp_path, net)  # Adam(net.parameters()), as in 2019
    frozen = net.hidden.weight.clone()
    exp.run(2)
    assert torch.equal(frozen, net.hidden.weight) and exp.epoch == 2


def test_11_averages_after_freezing():
    net = Net()
    whole = nn.ModuleList([net])  # whose parameters() hides nothing
    average = swa_utils.AveragedModel(whole)
    net.hidden.requires_grad_(False)
    average.update_parameters(whole)
    with torch.no_grad():
        net.out.weight += 1
    average.update_parameters(whole)
    assert torch.allclose(average.module[0].out.weight, net.out.weight - 0.5)
    assert torch.equal(average.module[0].hidden.weight, net.hidden.weight)


def test_12_seeds_without_a_shift_of_numpy(monkeypatch):
    """np.uint64 >> 1 is a TypeError in numpy 1.26, which requirements.txt allows."""
    class Old(int):
        def __rshift__(self, other):
            raise TypeError("ufunc 'right_shift' not supported for the input types")

    class Sequence(np.random.SeedSequence):
        def generate_state(self, *args):
            return list(map(Old, super().generate_state(*args)))

    monkeypatch.setattr(np.random, 'SeedSequence', Sequence)
    assert nt.mix_seeds(0, 1, 0) == 2918264622725855778 and type(nt.mix_seeds(np.uint64(3), np.int32(4))) is int


# --- crashes and blocked uses -------------------------------------------------------------------------

def test_13_a_list_of_samples_is_not_printed(tmp_path):
    data = [(torch.full((28, 28), k / 1000), torch.ones(1)) for k in range(1000)]

    class Flat(Net):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :3])

    def build(samples):
        return make(tmp_path, Flat(), samples, samples, stats=nt.StatsManager())

    exp = build(data)
    exp.run(1)
    assert len(repr(exp)) < 4000 and (tmp_path / 'config.txt').stat().st_size < 4000
    assert (tmp_path / 'checkpoint.pth.tar').stat().st_size < 100_000
    assert build(data).epoch == 1
    with pytest.raises(ValueError, match='TrainSet.*1000.*999'):
        build(data[1:])


class Pids(Data):
    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return x, d * 0 + os.getpid()


@pytest.mark.parametrize('context', ['spawn', 'fork'])
def test_14_persistent_workers_live_on(tmp_path, context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip('no such processes here')

    class Watch(nt.StatsManager):
        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            pids.update(d.flatten().tolist())

    pids = set()
    loader = td.DataLoader(Pids(8), 4, num_workers=1, persistent_workers=True, multiprocessing_context=context)
    with pytest.warns(UserWarning, match='persistent_workers.*a resumed run does not repeat what they draw'):
        exp = make(tmp_path, train=loader, stats=Watch())
    exp.run(3)
    assert len(pids) == 1 and pids != {os.getpid()}
    loader._iterator._shutdown_workers()  # else they end with the test session


def test_15_a_scheduler_step_a_batch(tmp_path):
    """One too many and OneCycleLR would raise: none in evaluation."""
    def build(name):
        net = Net()
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        cycle = lr_scheduler.OneCycleLR(adam, 0.1, total_steps=15)
        return make(tmp_path / name, net, optimizer=adam, also_save={'cycle': cycle}, perform_validation_during_training=True), cycle

    rates = []
    exp, cycle = build('whole')
    exp.run(3, after_batch=lambda e, loss: (cycle.step(), rates.append(cycle.get_last_lr()[0])))
    assert len(rates) == 15 and max(rates) > 0.09 > 0.01 > rates[-1]
    for epochs in (1, 3):
        parts, again = build('parts')
        parts.run(epochs, after_batch=lambda e, loss, cycle=again: cycle.step())
    assert same(end(exp), end(parts))


class Rising(nt.StatsManager):
    """An accuracy that rises from epoch to epoch."""
    passes = 0

    def summarize(self):
        Rising.passes += 1
        return {'loss': 1.0, 'accuracy': float(Rising.passes)}


def test_16_a_plateau_of_something_to_be_large(tmp_path):
    def plateau(mode):
        return lambda o: lr_scheduler.ReduceLROnPlateau(o, mode, patience=0)

    exp = make(tmp_path, stats=Rising(), best_by='accuracy', best_mode='max', scheduler=plateau('max'))
    exp.run(5)
    assert exp.optimizer.param_groups[0]['lr'] == 0.01
    with pytest.raises(ValueError, match="mode of the scheduler must be best_mode, 'max', got 'min'"):
        make(tmp_path / 'b', stats=Rising(), best_by='accuracy', best_mode='max', scheduler=plateau('min'))


def test_17_evaluate_inside_of_step(tmp_path):
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
    assert len(looked) == 10 and same(end(exp), end(plain))


class Counting(Net):
    """Has a state that is no tensor."""
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {'calls': self.calls}

    def set_extra_state(self, state):
        self.calls = state['calls']


def test_18_a_module_with_extra_state(tmp_path):
    make(tmp_path, Counting()).run(2)
    exp = make(tmp_path, Counting())
    exp.run(3)
    assert exp.net.calls == 15


def test_18_lazy_modules_are_refused(tmp_path):
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.hidden = nn.LazyLinear(4)

    net = Lazy()
    with pytest.raises(ValueError, match='lazy modules: send one batch through it first'):
        make(tmp_path / 'a', net, optimizer=torch.optim.Adam(net.out.parameters()))
    assert content(tmp_path) == {}
    net(torch.zeros(2, 3))
    make(tmp_path / 'b', net).run(1)


def test_18_the_compiled_and_the_plain_network_share_checkpoints(tmp_path):
    def compiled():
        return torch.compile(Net(), backend='eager')

    make(tmp_path / 'a', compiled()).run(1)
    make(tmp_path / 'a', Net()).run(2)
    exp = make(tmp_path / 'a', compiled())
    exp.run(3)
    whole = make(tmp_path / 'b')
    whole.run(3)
    assert exp.epoch == 3 and same(whole.history, exp.history)
    assert list(nt.load_checkpoint(exp.checkpoint_path)['Net']) == list(Net().state_dict())


def test_19_an_optimizer_with_a_closure_is_refused(tmp_path):
    net = Net()
    with pytest.raises(ValueError, match='LBFGS needs a closure'):
        make(tmp_path, net, optimizer=torch.optim.LBFGS(net.parameters()))
    assert content(tmp_path) == {}


def test_19_a_group_that_is_added_later(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.out.parameters(), lr=0.01)
    exp = make(tmp_path, net, optimizer=adam)
    exp.run(1)
    adam.add_param_group({'params': list(net.hidden.parameters()), 'lr': 0.001})
    exp.run(2)

    def build(*groups):
        net = Net()
        layers = {'out': 0.01, 'hidden': 0.001}
        groups = [{'params': list(getattr(net, name).parameters()), 'lr': layers[name]} for name in groups]
        return make(tmp_path, net, optimizer=torch.optim.Adam(groups))

    with pytest.raises(ValueError) as error:
        build('out')
    assert str(tmp_path) in str(error.value) and 'group' in str(error.value)
    exp = build('out', 'hidden')
    exp.run(3)
    assert exp.epoch == 3


@pytest.mark.parametrize('method', ['setting', 'state_dict'])
def test_20_attributes_that_are_set_too_late(tmp_path, method):
    class Late(nt.Experiment):
        def __init__(self, *args, early, **options):
            if early:
                self.extra = 7
            super().__init__(*args, **options)
            self.extra = 7

    setattr(Late, method, lambda self: getattr(nt.Experiment, method)(self) | {'Extra': self.extra})
    with pytest.raises(AttributeError, match=r'extra.*before you call super\(\).__init__\(\)'):
        experiment(tmp_path, Late, early=False)
    assert not (tmp_path / 'checkpoint.pth.tar').exists()
    experiment(tmp_path, Late, early=True).run(1)
    assert experiment(tmp_path, Late, early=True).epoch == 1


@pytest.mark.parametrize('here, there', [
    ("Faces(root='/home/ann/data/faces', size=60)", "Faces(root='/mnt/disk2/faces', size=60)"),
    ('Faces\n    Root location: /home/ann/faces\n    Split: a', 'Faces\n    Root location: ./faces\n    Split: a'),
    ("Faces('C:\\Users\\ann\\faces')", "Faces('/home/ann/faces')"),
    ("Faces('C:\\\\Users\\\\ann\\\\faces')", "Faces('/home/ann/faces')"),
    ("Faces(PosixPath('/home/ann/faces'))", "Faces(PosixPath('/root/faces'))"),
    ("Faces('~/faces')", "Faces('faces')"),
])
def test_21_the_folder_of_another_machine_is_no_conflict(tmp_path, here, there):
    make(tmp_path, train=Told(here)).run(1)
    assert make(tmp_path, train=Told(there)).epoch == 1
    assert 'TrainSet' in conflict(tmp_path, train=Told(there.replace('Faces', 'Cats')))


def test_21_a_validation_set_that_training_does_not_use(tmp_path):
    net = Net()
    nt.Experiment(net, Data(), None, torch.optim.Adam(net.parameters(), lr=0.01), Stats(), str(tmp_path), 4, seed=0).run(1)
    assert make(tmp_path, val=Data(7)).epoch == make(tmp_path, val=Data(9)).epoch == 1
    make(tmp_path / 'b', perform_validation_during_training=True).run(1)
    assert 'ValSet' in conflict(tmp_path / 'b', val=Data(9), perform_validation_during_training=True)


def test_22_a_statistic_that_is_added_later(tmp_path):
    class Growing(Stats):
        more = False

        def summarize(self):
            return super().summarize() | ({'new': self.error} if self.more else {})

    make(tmp_path, stats=Growing()).run(3)
    Growing.more = True
    exp = make(tmp_path, stats=Growing(), best_by='new', best_mode='max')
    assert exp.best[0] == 0
    exp.run(5)
    assert exp.best[0] > 3 and exp.best[1] == max(row['new'] for row in exp.history[3:])
    assert [('new' in row) for row in exp.table()] == [False] * 3 + [True] * 2


@pytest.mark.parametrize('validation', [False, True])
def test_22_a_misspelt_best_by_is_noticed_at_the_first_batch(tmp_path, validation):
    exp = experiment(tmp_path, Steps, best_by='acuracy', perform_validation_during_training=validation)
    with pytest.raises(ValueError, match="no statistic 'acuracy'"):
        exp.run(2)
    assert exp.steps == 1 and exp.epoch == 0


class OwnEvaluation(nt.Experiment):
    """As a subclass of 2019: without an argument, and with a statistic of its own."""

    def evaluate(self):
        return {'mIoU': 0.5 + 0.1 * self.epoch}


def test_22_an_evaluation_of_its_own_has_its_own_statistics(tmp_path):
    options = {'perform_validation_during_training': True, 'best_mode': 'max'}
    exp = experiment(tmp_path / 'a', OwnEvaluation, best_by='mIoU', **options)
    exp.run(2)
    assert exp.best == (2, 0.6) and best_agrees(exp)
    exp = experiment(tmp_path / 'b', OwnEvaluation, best_by='mIuO', **options)
    with pytest.raises(ValueError, match="no statistic 'mIuO'.*did you mean 'val_mIoU'"):
        exp.run(2)
    assert exp.epoch == 0


class Dicts(Data):
    def __getitem__(self, k):
        x, d = super().__getitem__(k)
        return {'image': x, 'target': d}


class OfDicts(nt.Experiment):
    def step(self, batch):
        y = self.net(batch['image'])
        loss = self.net.criterion(y, batch['target'])
        self.update(loss)
        return loss, batch['image'], y, batch['target']


INPUTS = torch.stack([Data()[k][0] for k in range(22)])


def collate_pairs(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([d for _, d in samples])


@pytest.mark.parametrize('data, kind, options', [
    (INPUTS, nt.Experiment, {'collate_fn': collate_pairs}),
    (Dicts(), OfDicts, {}),
    (td.DataLoader(Data(), 4, shuffle=True), nt.Experiment, {}),
    (td.DataLoader(Data(), 4, shuffle=True, drop_last=True), nt.Experiment, {}),
    (td.DataLoader(Data(), batch_sampler=td.BatchSampler(td.RandomSampler(Data()), 5, True)), nt.Experiment, {}),
    (td.DataLoader(Dicts(), 5, shuffle=True, collate_fn=td.default_collate), OfDicts, {}),
    (td.DataLoader(INPUTS, 5), nt.Experiment, {}),
    ('train_loader', nt.Experiment, {}),
], ids=['tensor with collate_fn', 'dicts', 'shuffled', 'shuffled, short one left out', 'batch sampler', 'shuffled dicts', 'inputs', 'train_loader'])
def test_23_predictions_are_complete_and_in_order(tmp_path, data, kind, options):
    exp = experiment(tmp_path, kind, data=Dicts() if kind is OfDicts else None, **options)
    y = exp.predict(exp.train_loader if isinstance(data, str) else data)
    with torch.no_grad():
        assert torch.allclose(y, exp.net.eval()(INPUTS), atol=1e-6)


def test_24_an_evaluation_repeats_itself_on_any_loader(tmp_path):
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


def test_25_statistics_under_torchrun(ranks):
    """A maximum is that of all; an own validation loader's samples count once."""
    _, (first, second) = ranks
    largest = max(Data(24)[k][1].item() for k in range(24))
    assert first['trained on'] == second['trained on'] and first['trained on']['samples'] == 24
    assert first['trained on']['largest'] == pytest.approx(largest)
    assert first['own loader'] == second['own loader'] and first['own loader']['samples'] == 7
    assert first['own loader']['largest'] == pytest.approx(max(Data(7)[k][1].item() for k in range(7)))


def test_25_an_error_on_one_process_ends_the_others_too(ranks):
    folder, (first, second) = ranks
    assert second['error'] == 'ArithmeticError' and 'error' in first
    assert all('start the program again' in said['parted'] for said in (first, second))
    assert len(nt.load_checkpoint(folder / 'failing' / 'checkpoint.pth.tar')['History']) == 1


class Stubborn:
    """Can't take back a state of another size."""

    def __init__(self, size=3):
        self.values = torch.zeros(size)

    def state_dict(self):
        return {'values': self.values}

    def load_state_dict(self, state):
        if len(state['values']) != len(self.values):
            raise RuntimeError(f'size {len(state["values"])}, expected {len(self.values)}')
        self.values = state['values']


@pytest.mark.parametrize('spoil', [
    lambda state: state.pop('History'), lambda state: state.pop('Net'), lambda state: state.pop('also'),
    lambda state: state.update(also={'values': torch.zeros(4)}), lambda state: state.update(also={}),
    lambda state: state.update(Net=Net(width=6).state_dict()),
    lambda state: state['Net'].pop('norm.running_mean'),
    lambda state: state.update(Optimizer=torch.optim.Adam(Net().out.parameters()).state_dict()),
    lambda state: state.update(Optimizer={}), lambda state: state.update(Scheduler={}), lambda state: state.update(History=5),
], ids=['no history', 'no net', 'nothing of also_save', 'other also_save', 'empty also_save', 'other net', 'a buffer is missing',
        'other optimizer', 'no groups', 'odd scheduler', 'odd history'])
def test_26_load_state_dict_changes_nothing_when_it_raises(tmp_path, spoil):
    def build(name):
        return make(tmp_path / name, scheduler=cosine(5), also_save={'also': Stubborn(), 'second': Stubborn()})

    exp, other = build('a'), build('b')
    exp.run(2)
    other.run(3)
    state = nt.load_checkpoint(other.checkpoint_path)
    state['second'] = {'values': torch.ones(3)}
    before = nt.load_checkpoint(exp.checkpoint_path)
    try:
        spoil(state)
        exp.load_state_dict(state)
    except Exception:
        assert same({k: v for k, v in before.items() if k != 'Seconds'}, end(exp))
        exp.run(3)
        assert same(end(exp), end(other))
    else:  # what could be taken has been
        assert exp.epoch == 3 and exp.also_save['second'].values.sum() == 3


def test_27_the_tests_are_collected_without_the_modules_of_unix():
    program = ('import sys, os\nfor name in ("resource", "fcntl", "pwd", "grp", "termios"): sys.modules[name] = None\n'
               f'del os.fork\nsys.path[:0] = {sys.path[:4]!r}\nimport test_nntools, test_nntools_clients, test_nntools_resume, test_nntools_review\n'
               'import tempfile\ntest_nntools.make(tempfile.mkdtemp()).run(1)')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_27_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))
    exp = make('~/exp')
    exp.run(1)
    assert (tmp_path / 'home' / 'exp' / 'checkpoint.pth.tar').exists() and not (tmp_path / '~').exists()
    assert Path(exp.checkpoint_path).is_absolute()


def test_28_the_steps_of_adam_stay_on_the_cpu(tmp_path, monkeypatch):
    """They would go where the file is mapped to."""
    exp = make(tmp_path)
    exp.run(1)
    monkeypatch.setattr(nt, '_device_of', lambda net: torch.device('meta'))  # as a GPU that is not here
    exp.device = torch.device('meta')
    exp.load()
    steps = [state['step'] for state in exp.optimizer.state.values()]
    assert len(steps) == 6 and all(step.device.type == 'cpu' and step == 5 for step in steps)


@pytest.mark.parametrize('device, expected', [('cuda', True), ('mps', False)])
def test_28_copies_that_do_not_wait_are_for_cuda(tmp_path, monkeypatch, device, expected):
    def to(tensor, *args, non_blocking=False, **options):
        asked.append(non_blocking)
        return tensor

    asked = []
    exp = make(tmp_path, stats=nt.StatsManager())
    monkeypatch.setattr(nt, '_device_of', lambda net: torch.device(device))
    monkeypatch.setattr(torch.Tensor, 'to', to)
    exp.evaluate()
    assert asked and set(asked) == {expected}


def test_29_the_archive_is_unpacked_without_filters(tmp_path, monkeypatch):
    """Python 3.11.2 has no ``filter`` of tarfile; tests/test_denoising.py has the rest of fetch."""
    import denoising_utils as du
    archive = tmp_path / 'archive.tgz'
    (tmp_path / 'iids_train.txt').write_text('1\n')
    with tarfile.open(archive, 'w:gz') as file:
        file.add(tmp_path / 'iids_train.txt', 'BSDS300/images/train/1.jpg')
    unpack = tarfile.TarFile.extractall

    def old(self, path='.', members=None, *, numeric_owner=False):
        return unpack(self, path, members, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, 'extractall', old)
    monkeypatch.setattr(du, 'download_url', lambda url, folder, name, **_: Path(folder, name).write_bytes(archive.read_bytes()))
    with pytest.raises(OSError):  # most photographs are not in there; it is no TypeError
        du.fetch(tmp_path / 'BSDS300')


# --- public programs, run unmodified -------------------------------------------------------------------

class Written(Net):
    """Has the size of the batch written into it."""

    def forward(self, x):
        return super().forward(x.view(4, -1))


def test_30_the_short_last_batch_is_tried_first(tmp_path):
    exp = experiment(tmp_path, Steps, Written(), perform_validation_during_training=True)
    with pytest.raises(RuntimeError, match='3 samples.*drop_last_in_evaluation=True'):
        exp.run(2)
    assert exp.steps == 0 and exp.epoch == 0
    exp = experiment(tmp_path / 'b', Steps, Written(), perform_validation_during_training=True, drop_last_in_evaluation=True)
    exp.run(2)
    assert exp.epoch == 2 and exp.steps == 10


def test_30_trying_a_batch_first_leaves_no_trace(tmp_path):
    def build(name, validation):
        net = Net(dropout=0.5)
        return make(tmp_path / name, net, Data(noise=0.1), perform_validation_during_training=validation)

    exp, plain = build('a', True), build('b', False)
    exp.run(2)
    plain.run(2)
    assert [train for train, _ in exp.history] == plain.history and same(weights(exp.net), weights(plain.net))


class AllKinds(Stats):
    def summarize(self):
        error = torch.tensor(self.error / self.number_samples, requires_grad=True)
        return super().summarize() | {'PSNR': error * 1, 'confusion': torch.eye(2, dtype=torch.int64), 'array': np.eye(2),
                                      'single': np.float32(0.5), 'whole': np.int64(3), 'words': ['a', 'b'], 'none': None}


@pytest.mark.parametrize('validation', [False, True])
def test_31_the_history_keeps_what_summarize_returned(tmp_path, validation):
    def build():
        return make(tmp_path, stats=AllKinds(), best_by='PSNR', perform_validation_during_training=validation)

    exp = build()
    exp.run(2)
    again = build()
    assert same(exp.history, again.history)
    for e in (exp, again):
        entry = e.history[-1][1] if validation else e.history[-1]
        assert entry['PSNR'].cpu().item() == pytest.approx(entry['error']) and not entry['PSNR'].requires_grad
        assert entry['confusion'][0, 0] == 1 and entry['confusion'].dtype == torch.int64 and entry['array'][1, 1] == 1
        assert [type(entry[name]) for name in ('single', 'whole', 'error')] == [float, int, float]
        row = e.table()[-1]
        assert row['PSNR'] == pytest.approx(row['error']) and type(row['PSNR']) is float and row['confusion'] == [[1, 0], [0, 1]]
        assert type(e.best[1]) is float
        e.to_csv(tmp_path / 'history.csv')
        rows = list(csv.DictReader(open(tmp_path / 'history.csv')))
        assert float(rows[1]['PSNR']) == row['PSNR'] and float(rows[1]['single']) == 0.5
    torch.load(exp.checkpoint_path, weights_only=True)  # anybody's torch.load reads it


@pytest.mark.parametrize('validation', [False, True])
def test_31_what_can_not_be_stored_is_refused_at_the_first_batch(tmp_path, validation):
    class Odd(Stats):
        def summarize(self):
            return super().summarize() | {'object': object()}

    exp = experiment(tmp_path, Steps, stats=Odd(), perform_validation_during_training=validation)
    with pytest.raises(TypeError, match='summarize must return numbers.* object'):
        exp.run(2)
    assert exp.steps <= 1 and exp.epoch == 0


class OwnSums(nt.StatsManager):
    """Counts by itself, under names that a base class might use."""
    names = 'number_samples', 'total_loss', 'running_accuracy', 'samples', 'metrics', 'sums', 'count', 'losses'

    def init(self):
        super().init()
        for name in self.names:
            setattr(self, name, 0)

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.number_samples += len(x)
        self.total_loss += loss * len(x)
        for name in self.names[2:]:
            setattr(self, name, getattr(self, name) + 1)

    def summarize(self):
        return {'loss': super().summarize(), 'own': self.total_loss / self.number_samples, 'samples': self.number_samples}


def test_32_statistics_that_count_by_themselves(tmp_path):
    exp = make(tmp_path, stats=OwnSums())
    exp.run(1)
    summary = exp.evaluate()
    assert summary == {'loss': pytest.approx(summary['own']), 'own': summary['own'], 'samples': 7}
    base = make(tmp_path / 'base', exp.net, stats=nt.StatsManager(), optimizer=exp.optimizer)
    assert base.evaluate() == pytest.approx(summary['loss'])
    assert exp.history[0]['samples'] == 20


def test_33_seeds_are_drawn_from_torchs_generator(tmp_path):
    def run(name, manual_seed, *epochs):
        for number in epochs:
            torch.manual_seed(manual_seed)
            state = torch.get_rng_state()
            exp = make(tmp_path / name, Net(dropout=0.5), Data(noise=0.1), seed=None)
            assert torch.equal(state, torch.get_rng_state())
            exp.run(number)
            manual_seed += 7
        return exp

    five = [run(f'seed{seed}', seed, 3) for seed in range(5)]
    assert len({exp.history[-1]['loss'] for exp in five}) == 5
    assert same(end(run('again', 2, 3)), end(five[2]))  # reproducible
    assert same(end(run('resumed', 2, 1, 2, 3)), end(five[2]))  # and exact, whatever is drawn before the resume
    given = make(tmp_path / 'given', Net(dropout=0.5), Data(noise=0.1), seed=11)
    given.run(3)
    assert len({exp.history[-1]['loss'] for exp in [*five, given]}) == 6


def adam(kind, lr):
    net = Net()
    return {'net': net, 'optimizer': kind(net.parameters(), lr=lr)}


def test_34_settings_are_stored_with_every_checkpoint(tmp_path):
    """Adam, then AdamW on purpose, then Adam again by mistake; and without config.txt."""
    make(tmp_path, **adam(torch.optim.Adam, 0.01)).run(1)
    exp = make(tmp_path, **adam(torch.optim.AdamW, 0.5), allow='Optimizer')
    exp.run(2)
    assert 'Optimizer: stored AdamW, given Adam' in conflict(tmp_path, **adam(torch.optim.Adam, 0.01))
    (tmp_path / 'config.txt').unlink()
    assert 'Optimizer: lr stored 0.5, given 0.01' in conflict(tmp_path, **adam(torch.optim.AdamW, 0.01))
    assert make(tmp_path, **adam(torch.optim.AdamW, 0.5)).epoch == 2


def test_34_an_edited_config_is_not_believed(tmp_path):
    exp = make(tmp_path)
    exp.run(1)
    config = Path(exp.config_path)
    config.write_text(config.read_text().replace('lr: 0.01', 'lr: 0.02').replace('BatchSize(4)', 'BatchSize(5)'))
    assert make(tmp_path).epoch == 1
    assert 'BatchSize: stored 4, given 5' in conflict(tmp_path, batch_size=5)


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('ending', ['done', 'nothing to do', 'an error'])
def test_35_after_run_the_network_has_the_mode_of_before(tmp_path, mode, ending):
    exp = make(tmp_path)
    exp.net.train(mode)
    if ending == 'an error':
        with pytest.raises(ZeroDivisionError):
            exp.run(1, after_batch=lambda e, loss: 1 / 0)
    else:
        exp.run(1 if ending == 'done' else 0)
    assert exp.net.training is mode


@pytest.mark.parametrize('when', ['before', 'after'])
def test_36_names_of_a_subclass_of_2019(tmp_path, when):
    class Mine(nt.Experiment):
        def __init__(self, *args, **options):
            if when == 'before':
                self.set()
            super().__init__(*args, **options)
            if when == 'after':
                self.set()

        def set(self):
            self.table, self.best, self.seconds, self.scaler, self.model, self.stopped = [], 1e9, 0, None, None, False

    def build(name, kind=Mine):
        return experiment(tmp_path / name, kind, best_by='error', perform_validation_during_training=True)

    build('a').run(2)
    exp, plain = build('a'), build('b', nt.Experiment)
    exp.run(3)
    plain.run(3)
    exp.to_csv(tmp_path / 'history.csv')
    assert same(plain.history, exp.history) and (exp.table, exp.best, exp.seconds) == ([], 1e9, 0)


def test_36_methods_of_a_subclass_of_2019(tmp_path):
    class Mine(nt.Experiment):
        def table(self):
            return 'mine'

        def best(self, k):
            return k

        def seconds(self):
            return 'mine'

    exp = experiment(tmp_path, Mine, best_by='error')
    exp.run(2)
    exp.to_csv(tmp_path / 'history.csv')
    assert (exp.table(), exp.best(3), exp.seconds()) == ('mine', 3, 'mine') and experiment(tmp_path, Mine, best_by='error').epoch == 2


def test_36_a_scheduler_that_is_assigned_and_stepped_in_the_callback(tmp_path):
    exp = make(tmp_path)
    exp.scheduler = lr_scheduler.StepLR(exp.optimizer, 1, 0.5)
    exp.run(3, plot=lambda e: e.epoch and e.scheduler.step())
    assert exp.optimizer.param_groups[0]['lr'] == pytest.approx(0.01 * 0.5 ** 3)


class OwnStep(nt.Experiment):
    def step(self):
        pass


class OwnUpdate(nt.Experiment):
    def update(self, learning_rate, momentum):
        pass


@pytest.mark.parametrize('kind', [OwnStep, OwnUpdate])
def test_36_another_signature_is_told_at_construction(tmp_path, kind):
    name = kind.__name__[3:].lower()
    with pytest.raises(TypeError, match=f'{kind.__name__}.{name} must take one argument.*rename yours'):
        experiment(tmp_path, kind)
    assert content(tmp_path) == {}


@pytest.mark.parametrize('change', ['validation later', 'validation no more', 'appended', 'cut short', 'odd'])
def test_37_an_irregular_history(tmp_path, change):
    options = {'best_by': 'error', 'perform_validation_during_training': change == 'validation no more'}
    exp = make(tmp_path, **options)
    exp.run(3)
    if change.startswith('validation'):
        options['perform_validation_during_training'] ^= True
        with pytest.raises(ValueError) as error:
            make(tmp_path, **options)
        options['allow'] = tuple(re.findall(r"'(\w+)'", str(error.value).split('allow=')[1]))
        exp = make(tmp_path, **options)
    elif change == 'appended':
        exp.history.append({'loss': 0.5, 'error': 0.25})
    elif change == 'odd':
        exp.history[1:1] = ['a remark', None, 7, {'another': 'text'}]
    else:
        del exp.history[1:]
    n = exp.epoch
    exp.run(n + 2)
    assert exp.epoch == n + 2 and len(exp.seconds) == n + 2 and all(s > 0 for s in exp.seconds[n:])
    exp.to_csv(tmp_path / 'history.csv')
    rows = exp.table()
    assert len(rows) == n + 2 and {'loss', 'error', 'seconds'} <= rows[-1].keys()
    assert exp.best[1] > 0
    again = make(tmp_path, **options)
    again.run(n + 3)
    assert again.epoch == n + 3 and same(again.history[:n + 2], exp.history)


class Changing(Data):
    def __repr__(self):
        return 'Changing()'


@pytest.mark.parametrize('after', [30, 15])
def test_38_a_data_set_that_changes_its_length(tmp_path, after):
    data, val = Changing(22), Changing(22)
    exp = make(tmp_path, train=data, val=val, perform_validation_during_training=True)
    exp.run(1)
    val.n = after  # of a validation set all samples are evaluated that are there
    exp.evaluate()
    assert exp.stats_manager.number_samples == after
    data.n = after  # of a training set, too, from the next epoch on
    seen = set()
    exp.run(2, after_batch=lambda e, loss: seen.add(e.batch))
    assert seen == set(range(1, after // 4 + 1)) and exp.history[1][0].keys() == {'loss', 'error'}
    assert make(tmp_path, train=data, val=val, perform_validation_during_training=True).epoch == 2


def test_38_more_images_the_next_day(tmp_path):
    make(tmp_path, train=Changing(22)).run(1)
    assert 'TrainSetSize: stored 22, given 30' in conflict(tmp_path, train=Changing(30))
    exp = make(tmp_path, train=Changing(30), allow=('TrainSet', 'TrainSetSize'))
    exp.run(2)
    assert exp.epoch == 2 and exp.stats_manager.number_update == 7
    assert make(tmp_path, train=Changing(30)).epoch == 2


def test_39_the_validation_loader_has_a_batch_size(tmp_path):
    assert make(tmp_path).val_loader.batch_size == 4


class InAList(Net):
    def __init__(self):
        super().__init__()
        self.hidden = self.norm = self.drop = self.out = None
        self.layers = [nn.Linear(3, 1)]

    def forward(self, x):
        return self.layers[0](x)

    def criterion(self, y, d):
        return nn.functional.mse_loss(y, d)


class Wrapper:
    """An optimizer in another one, without its groups."""

    def __init__(self, net):
        self.inner = torch.optim.SGD(net.parameters(), lr=0.1)
        self.step, self.zero_grad = self.inner.step, self.inner.zero_grad
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict


class Skipping(torch.optim.SGD):
    """Leaves out a step whose gradient is not finite."""

    def step(self, closure=None):
        if all(p.grad.isfinite().all() for group in self.param_groups for p in group['params']):
            super().step(closure)


def test_39_each_is_decided(tmp_path):
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
    exp = make(tmp_path / 'skipping', net := Net(), Data(bad=3), optimizer=Skipping(net.parameters(), lr=0.1))
    with pytest.raises(FloatingPointError, match='the loss is nan in epoch 1'):
        exp.run(1)
    assert exp.epoch == 0


# --- tried with nothing but the README --------------------------------------------------------------------

class MeanIoU(nt.StatsManager):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def init(self):
        super().init()
        self.union = [0] * self.classes


class Forgetful(nt.StatsManager):
    def init(self):
        self.correct = 0


def test_40_init_is_called_at_the_start_of_each_pass_only(tmp_path):
    exp = make(tmp_path, stats=MeanIoU(3))
    exp.run(1)
    assert exp.stats_manager.union == [0, 0, 0]
    exp = make(tmp_path / 'b', stats=Forgetful())
    with pytest.raises(AttributeError, match=r'Forgetful has no number_update.*init must.*call super\(\).init\(\)'):
        exp.run(1)


def test_41_what_will_not_be_trained_is_said_once(tmp_path, capsys):
    net = Net()
    net.hidden.requires_grad_(False)
    exp = make(tmp_path, net)  # without the frozen layer
    exp.run(2)
    assert 'will not be trained' not in capsys.readouterr().out
    net.hidden.requires_grad_(True)
    exp.run(3)
    exp.run(4)
    said = capsys.readouterr().out
    assert said.count('will not be trained') == 1 and 'hidden.weight, hidden.bias' in said


@pytest.mark.parametrize('stops', [(1,), (2,), (3,), (1, 2, 3, 5)], ids=str)
def test_41_the_recipe_for_freezing_and_unfreezing(tmp_path, stops):
    """Both groups from the start; the callback sets `requires_grad_` and the rate from the epoch."""
    def phase(exp):
        exp.net.hidden.requires_grad_(exp.epoch >= 3)
        exp.optimizer.param_groups[0]['lr'] = 0.001 if exp.epoch >= 3 else 0.0

    def build(name):
        net = Net(dropout=0.5)
        groups = [{'params': list(net.hidden.parameters())}, {'params': [*net.norm.parameters(), *net.out.parameters()]}]
        return make(tmp_path / name, net, optimizer=torch.optim.Adam(groups, lr=0.01))

    whole = build('whole')
    before = weights(whole.net)
    whole.run(3, lambda e: e.epoch < 3 and phase(e))
    assert torch.equal(before['hidden.weight'], whole.net.hidden.weight)
    whole.run(6, phase)
    assert not torch.equal(before['hidden.weight'], whole.net.hidden.weight)
    for epochs in (*stops, 6):
        parts = build('parts')
        parts.run(epochs, phase)
    assert same(end(whole), end(parts))


def test_41_another_optimizer_after_a_restart_names_the_recipe(tmp_path):
    net = Net()
    net.hidden.requires_grad_(False)
    make(tmp_path, net).run(2)
    for options in ({}, {'allow': 'Optimizer'}, {'allow': 'Optimizer', 'lr': 0.02}):
        message = conflict(tmp_path, **options)  # all parameters now
        assert str(tmp_path) in message and 'group' in message and 'README' in message, message


@pytest.mark.parametrize('change, lines', [
    ({'lr': 0.02}, ['Optimizer: lr stored 0.01, given 0.02']),
    ({'batch_size': 5}, ['BatchSize: stored 4, given 5']),
    ({'grad_clip': 1.0, 'lr': 0.5}, ['Optimizer: lr stored 0.01, given 0.5', 'GradClip: stored None, given 1.0']),
    (adam(torch.optim.SGD, 0.01), ['Optimizer: stored Adam, given SGD']),
    ({'stats': nt.StatsManager()}, ['StatsManager: stored Stats, given StatsManager']),
    ({'batches_per_step': 2, 'precision': 'bfloat16'}, ['Precision: stored float32, given bfloat16', 'BatchesPerStep: stored 1, given 2']),
], ids=['rate', 'batch size', 'two', 'kind', 'statistics', 'steps'])
def test_42_a_refusal_shows_what_differs(tmp_path, change, lines):
    make(tmp_path).run(1)
    first, *rest = conflict(tmp_path, **change).splitlines()
    assert str(tmp_path) in first and sorted(line.strip() for line in rest[:-1]) == sorted(lines)
    names = tuple(re.findall(r"'(\w+)'", rest[-1].split('allow=')[1]))
    assert sorted(names) == sorted(line.split(':')[0] for line in lines) and 'another output_dir' in rest[-1]
    exp = make(tmp_path, **change, allow=names)
    exp.run(3)
    assert exp.epoch == 3 and make(tmp_path, **change).epoch == 3


@pytest.mark.parametrize('change', [{'lr': 0.02}, {'net': Net(width=7)}, {'net': Net(dropout=0.5)}, {'batch_size': 5}, {'seed': 5},
                                    {'scheduler': cosine(4)}, {'train': Data(23)}], ids=lambda change: next(iter(change)))
def test_42_a_checkpoint_at_epoch_0_never_refuses(tmp_path, change):
    """It has nothing to lose: what is trained is what is given now."""
    exp = make(tmp_path / 'a', lr=1e30)
    with pytest.raises(FloatingPointError):
        exp.run(1)
    torch.manual_seed(4)
    change = {key: Net(value.hidden.out_features, value.drop.p) if key == 'net' else value for key, value in change.items()}
    exp = make(tmp_path / 'a', **change)
    change = {key: Net(value.hidden.out_features, value.drop.p) if key == 'net' else value for key, value in change.items()}
    fresh = make(tmp_path / 'b', **change)
    assert exp.epoch == 0
    exp.run(2)
    fresh.run(2)
    assert same(end(fresh), end(exp)) and make(tmp_path / 'a', **change).epoch == 2


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
def test_43_another_source_of_the_network_is_said(tmp_path, capsys, monkeypatch, change):
    def build(**parts):
        (tmp_path / 'student.py').write_text(SOURCE.format(**{'x': 'x', 'loss': 'mse_loss', 'name': 'Line'} | parts))
        sys.modules.pop('student', None)
        importlib.invalidate_caches()
        return make(tmp_path / 'exp', importlib.import_module('student').Line())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    build().run(1)
    assert build().epoch == 1
    assert 'source' not in capsys.readouterr().out
    exp = build(**change)
    assert exp.epoch == 1 and capsys.readouterr().out.count('The source of Line has changed') == 1
    exp.run(2)
    assert build(**change).epoch == 2 and 'source' not in capsys.readouterr().out


def test_43_where_python_finds_no_source(tmp_path, capsys):
    names = {'__name__': '__console__'}
    exec(SOURCE.format(x='x', loss='mse_loss', name='Typed'), names)
    make(tmp_path, names['Typed']()).run(1)
    assert make(tmp_path, names['Typed']()).epoch == 1 and 'source' not in capsys.readouterr().out


@pytest.mark.parametrize('validation', [False, True])
def test_44_a_misspelt_statistic(tmp_path, validation):
    def build(best_by, folder='a'):
        return make(tmp_path / folder, stats=nt.StatsManager({'accuracy': lambda y, d: (y - d).abs() < 0.5}), best_by=best_by,
                    best_mode='max', perform_validation_during_training=validation)

    with pytest.raises(ValueError) as error:
        build('acuracy').run(2)
    text, own = str(error.value), 'val_accuracy' if validation else 'accuracy'
    assert "no statistic 'acuracy'" in text and f"did you mean '{own}'?" in text and 'loss' in text and len(text) < 150
    exp = build(own, 'b')
    exp.run(3)
    assert exp.best[1] == max(row[own] for row in exp.table()) == exp.table()[exp.best[0] - 1][own]


def test_45_callbacks_run_without_gradients(tmp_path):
    modes = []
    exp = make(tmp_path)
    exp.run(2, lambda e: modes.append((torch.is_grad_enabled(), e.net.training)),
            after_batch=lambda e, loss: modes.append((torch.is_grad_enabled(), None)))
    assert set(modes) == {(False, False), (False, None)} and len(modes) == 3 + 10
    assert torch.is_grad_enabled()


def test_45_an_early_stop_says_so(tmp_path, capsys):
    exp = make(tmp_path)
    exp.run(5, lambda e: e.epoch == 2 and e.stop())
    assert 'Stopped after 2 epochs' in (said := capsys.readouterr().out) and 'Finish' not in said
    exp.run(3)
    assert 'Finish training for 3 epochs' in capsys.readouterr().out


def test_45_the_batch_size_of_a_ready_loader(tmp_path):
    exp = make(tmp_path, train=td.DataLoader(Data(8), batch_sampler=td.BatchSampler(td.SequentialSampler(Data(8)), 2, False)))
    assert 'BatchSize(None)\n' in repr(exp) and exp.setting()['BatchSize'] is None
    assert make(tmp_path / 'b', train=td.DataLoader(Data(8), 2), batch_size=16).setting()['BatchSize'] == 2


def test_45_the_sums_stay_readable_after_evaluate(tmp_path):
    exp = make(tmp_path)
    summary = exp.evaluate()
    stats = exp.stats_manager
    assert (stats.number_samples, stats.number_update) == (7, 2) and stats.error / 7 == summary['error']
    assert stats.running_loss > 0


class WithState(Net):
    """Returns its state beside the output, as recurrent networks do."""

    def forward(self, x):
        y = super().forward(x)
        return y, y * 2

    def criterion(self, y, d):
        return super().criterion(y[0], d)


class Unreduced(Net):
    def criterion(self, y, d):
        return (y - d).square()


def test_46_predictions_of_networks_that_return_tuples(tmp_path):
    exp = make(tmp_path, WithState(), stats=nt.StatsManager())
    with torch.no_grad():
        expected = exp.net.eval()(INPUTS)[0]
    for data in (INPUTS, Data()):
        assert torch.allclose(exp.predict(data), expected, atol=1e-6)


def test_46_an_unreduced_loss(tmp_path):
    exp = make(tmp_path, Unreduced())
    with pytest.raises(ValueError, match=r'the loss must be one number, got the shape \(4, 1\): take its mean'):
        exp.run(1)


def test_46_init_tells_when_a_pass_begins(tmp_path):
    class Passes(nt.StatsManager):
        begun = 0

        def init(self):
            super().init()
            self.begun += 1

    exp = make(tmp_path, stats=Passes())
    assert exp.stats_manager.begun == 0
    exp.run(2)
    assert exp.stats_manager.begun == 2
    exp.evaluate()
    assert exp.stats_manager.begun == 3


# --- wanted -----------------------------------------------------------------------------------------------

def test_wanted_metrics_as_functions(tmp_path):
    """Averaged over the samples, whatever the batches; the subclass of twelve lines says the same."""
    metrics = {'hits': lambda y, d: (y - d).abs() < 0.5, 'error': lambda y, d: (y - d).abs().mean()}
    exp = make(tmp_path, stats=nt.StatsManager(metrics), perform_validation_during_training=True)
    exp.run(2)
    with torch.no_grad():
        x, d = collate_pairs([Data(7)[k] for k in range(7)])
        y = exp.net.eval()(x)
    summary = exp.evaluate()
    assert summary['hits'] == pytest.approx(((y - d).abs() < 0.5).float().mean().item())
    assert summary['error'] == pytest.approx((y - d).abs().mean().item()) and list(summary) == ['loss', 'hits', 'error']
    assert exp.history[1][1] == summary
    with pytest.raises(ValueError, match='StatsManager'):
        make(tmp_path, stats=nt.StatsManager({'other': metrics['hits']}), perform_validation_during_training=True)


@pytest.mark.parametrize('samples', [24, 20])
def test_wanted_gradient_accumulation(tmp_path, samples):
    """Two batches of 4 make the step of one of 8; what is left at the end of the epoch makes one, too."""
    class Plain(nt.NeuralNetwork):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x)

        criterion = staticmethod(nn.functional.mse_loss)

    def build(name, **options):
        net = Plain()
        return make(tmp_path / name, net, Data(samples), optimizer=torch.optim.SGD(net.parameters(), lr=0.1), grad_clip=0.5, **options)

    one, two = build('one', batch_size=8, drop_last=False), build('two', batches_per_step=2)
    one.run(2)
    two.run(2)
    assert torch.allclose(one.net.layer.weight, two.net.layer.weight, atol=1e-6)
    assert one.history[1]['loss'] == pytest.approx(two.history[1]['loss'], rel=1e-2)


def test_wanted_predictions_with_targets(tmp_path):
    exp = make(tmp_path)
    y, d = exp.predict(Data(), targets=True)
    assert torch.equal(y, exp.predict(Data())) and torch.equal(d, torch.stack([Data()[k][1] for k in range(22)]))


# --- found after the review ---------------------------------------------------------------------------

class Plain(nt.NeuralNetwork):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x)

    criterion = staticmethod(nn.functional.mse_loss)


def test_a_checkpoint_of_no_epoch_gives_nothing(tmp_path):
    """Networks that are only evaluated in one folder, or given anew after a failed first epoch, stay as they are."""
    for k in range(3):
        torch.manual_seed(k)
        net = Plain()
        given = weights(net)
        make(tmp_path, net, seed=None).evaluate()
        assert same(weights(net), given)
    torch.manual_seed(5)
    seed = make(tmp_path / 'new', seed=None).seed
    torch.manual_seed(5)
    assert make(tmp_path, seed=None).seed == seed


class Adds(nt.Experiment):
    """Two updates a step, each with the weights that the first has left."""
    def step(self, batch):
        x, d = batch
        for _ in range(2):
            y = self.net(x)
            self.seen.append(y.detach().float().clone())
            loss = self.net.criterion(y.float(), d)
            self.update(loss)
        return loss, x, y, d


def test_each_update_sees_the_weights_of_the_one_before(tmp_path):
    """Autocast keeps weights that it has cast; not beyond an update."""
    net = Plain()
    exp = Adds(net, Data(), Data(7), torch.optim.SGD(net.parameters(), lr=0.5), nt.StatsManager(), str(tmp_path), 4,
               seed=0, precision='bfloat16')
    exp.seen = []
    exp.run(1)
    assert all(not torch.equal(a, b) for a, b in zip(exp.seen[::2], exp.seen[1::2]))


def test_all_processes_follow_the_callback_of_the_first(ranks):
    """Rates, what is frozen, the weights of a second network; a schedule that each process would step otherwise."""
    _, (first, second) = ranks
    assert first['phases'] == second['phases']
    assert first['phases']['rates'] == [0.01, 0.1] and not first['phases']['frozen']


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


def test_something_can_be_saved_from_now_on(tmp_path):
    make(tmp_path).run(2)
    averaged = swa_utils.AveragedModel(Net())
    with pytest.raises(ValueError, match=r"no averaged; allow=\('averaged',\) begins with what is given"):
        make(tmp_path, also_save={'averaged': averaged})
    exp = make(tmp_path, also_save={'averaged': averaged}, allow='averaged')
    exp.run(3)
    assert 'averaged' in nt.load_checkpoint(exp.checkpoint_path)
    assert make(tmp_path, also_save={'averaged': averaged}).epoch == 3


class Resetting(nt.StatsManager):
    """Computes and begins anew, as the metrics of torchmetrics are used."""
    def init(self):
        super().init()
        self.seen = 0

    def accumulate(self, loss, x, y, d):
        super().accumulate(loss, x, y, d)
        self.seen += len(x)

    def summarize(self):
        seen, self.seen = self.seen, 0
        return {'loss': super().summarize(), 'seen': seen}


@pytest.mark.parametrize('validation', [False, True])
def test_a_summary_that_ends_the_pass_counts_every_batch(tmp_path, validation):
    exp = make(tmp_path, stats=Resetting(), perform_validation_during_training=validation)
    exp.run(2)
    assert [entry[0]['seen'] if validation else entry['seen'] for entry in exp.history] == [20, 20]


def test_a_step_may_set_the_network_to_evaluation(tmp_path):
    class FixedNorm(Net):
        def train(self, mode=True):
            return super().train(False)

    exp = make(tmp_path, FixedNorm())
    before = weights(exp.net)
    exp.evaluate()
    assert same(weights(exp.net), before)
    exp.run(1)
    assert not same(weights(exp.net), before)


def test_a_summary_of_another_kind_can_be_resumed(tmp_path):
    class Named(nt.StatsManager):
        def summarize(self):
            return collections.namedtuple('Result', 'loss accuracy')(super().summarize(), torch.ones(1))

    class Unreadable(nt.StatsManager):
        def summarize(self):
            return {lr_scheduler.ReduceLROnPlateau: super().summarize()}

    make(tmp_path, stats=Named(), best_by='accuracy', best_mode='max').run(1)
    exp = make(tmp_path, stats=Named())
    assert exp.epoch == 1 and exp.history[0].keys() == {'loss', 'accuracy'} and exp.best == (1, 1.0)
    with pytest.raises(RuntimeError, match='holds objects that could run code'):  # and not only at the next start
        make(tmp_path / 'other', stats=Unreadable()).run(5)


def test_who_only_looks_leaves_the_best_weights(tmp_path):
    """Another process trains on, and has written its best epoch, but not yet its last one."""
    class BestInEpoch7(nt.StatsManager):
        def summarize(self):
            return {'score': abs(exp.epoch + 1 - 7)}

    def look(e):
        if e.epoch == 8:
            other = make(tmp_path, stats=BestInEpoch7())
            other.load_best()  # which is later than the checkpoint, and may be used
            looked.append((other.epoch, len(nt.load_checkpoint(other.best_path)['History'])))

    looked, exp = [], make(tmp_path, stats=BestInEpoch7(), save_every=5, best_by='score')
    exp.run(10, look)
    assert looked == [(5, 7)] and exp.best == (7, 0)
    assert len(nt.load_checkpoint(exp.best_path)['History']) == 7


@pytest.mark.parametrize('save_every', [1, 5])
def test_what_the_last_callback_does_is_not_saved(tmp_path, save_every):
    def halve(e):
        if e.epoch:
            e.optimizer.param_groups[0]['lr'] /= 2
            e.stop()

    exp = make(tmp_path, save_every=save_every)
    exp.run(3, halve)
    assert nt.load_checkpoint(exp.checkpoint_path)['Optimizer']['param_groups'][0]['lr'] == 0.01


def test_a_second_experiment_with_the_same_objects(tmp_path):
    """As when a cell is run again: a schedule of several parts has moved on, and is what it was."""
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    parts = [lr_scheduler.LinearLR(adam, total_iters=2), lr_scheduler.CosineAnnealingLR(adam, T_max=4)]
    schedule = lr_scheduler.SequentialLR(adam, parts, milestones=[2])

    def build(schedule):
        return nt.Experiment(net, Data(), Data(7), adam, Stats(), str(tmp_path), 4, seed=0, scheduler=schedule)

    build(schedule).run(3)
    rate = adam.param_groups[0]['lr']
    exp = build(schedule)
    assert exp.epoch == 3 and adam.param_groups[0]['lr'] == rate and exp.scheduler is schedule
    parts = [lr_scheduler.LinearLR(adam, total_iters=2), lr_scheduler.CosineAnnealingLR(adam, T_max=8)]
    with pytest.raises(ValueError, match='Scheduler: 1: T_max stored 4, given 8'):
        build(lr_scheduler.SequentialLR(adam, parts, milestones=[2]))


def test_gradients_of_a_stream_are_accumulated(tmp_path):
    """Of a data set without a length nobody knows the last batch."""
    class Stream(td.IterableDataset):
        def __iter__(self):
            return (Data()[k] for k in range(22))

    exp = make(tmp_path, train=td.DataLoader(Stream(), 4), batches_per_step=2)
    exp.run(1)
    assert exp.optimizer.state[exp.net.out.weight]['step'] == 3


def test_an_error_in_validation_is_not_blamed_on_a_short_batch(tmp_path):
    wrong = td.TensorDataset(torch.zeros(8, 5), torch.zeros(8, 1))
    with pytest.raises(RuntimeError) as error:
        make(tmp_path, val=wrong, perform_validation_during_training=True).run(1)
    assert 'mat1 and mat2' in str(error.value) and 'last batch' not in str(error.value)


def test_workers_that_open_a_file_are_left_to_it(tmp_path):
    class Opened(Data):
        file = None

        def __getitem__(self, k):
            return self.file[k]

    def open_it(worker):
        data = td.get_worker_info().dataset
        data.file = Data(7)

    loader = td.DataLoader(Opened(7), 4, num_workers=1, worker_init_fn=open_it, multiprocessing_context='fork')
    exp = make(tmp_path, val=loader, perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


def test_a_frozen_network_can_be_evaluated(tmp_path):
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    net.requires_grad_(False)
    assert make(tmp_path, net, optimizer=adam).evaluate()


def test_what_another_experiment_has_trained_is_not_overwritten(tmp_path):
    """Two of them in one program, as when a cell is run again: no lock keeps them apart."""
    first = make(tmp_path)
    first.run(1)
    make(tmp_path).run(3)
    saved = content(tmp_path)
    with pytest.raises(RuntimeError, match='now of epoch 3, trained by another experiment; this one is at 1: call load'):
        first.run(2)
    with pytest.raises(RuntimeError, match='trained by another experiment'):
        first.save()
    assert content(tmp_path) == saved and first.epoch == 1
    first.load()
    first.run(4)
    assert same(end(make(tmp_path)), end(first)) and first.epoch == 4


def test_an_earlier_epoch_may_be_taken_on_purpose(tmp_path):
    exp = make(tmp_path, best_by='loss')
    exp.run(1)
    exp.save(str(tmp_path / 'early'))
    exp.run(3)
    exp.load(str(tmp_path / 'early'))
    exp.run(2)
    assert make(tmp_path).epoch == 2


def at_most(epochs):
    return lambda e: e.epoch >= epochs and e.stop()


@pytest.mark.parametrize('again', [lambda exp: exp.run(100, at_most(3)), lambda exp: exp.run(3), lambda exp: exp.run(1)])
def test_a_run_that_trains_nothing_writes_nothing(tmp_path, again):
    """As when a cell is run again after `load_best`, or with a network that another experiment trained on."""
    exp = make(tmp_path / 'a', best_by='error', best_mode='max', lr=0.03)
    exp.run(100, at_most(3))
    saved, last = content(tmp_path / 'a'), weights(exp.net)
    exp.load()
    make(tmp_path / 'b', exp.net).run(2)
    again(exp)
    exp.load_best()
    again(exp)
    assert content(tmp_path / 'a') == saved
    exp.load()
    assert same(weights(exp.net), last) and exp.epoch == 3


def test_going_back_writes_nothing_until_it_trains(tmp_path):
    exp = make(tmp_path, best_by='loss')
    exp.run(1)
    exp.save(str(tmp_path / 'early'))
    exp.run(3)
    saved = content(tmp_path)['checkpoint.pth.tar']
    exp.load(str(tmp_path / 'early'))
    exp.run(1)
    with pytest.raises(ZeroDivisionError):
        exp.run(2, lambda e: 1 / 0)
    assert content(tmp_path)['checkpoint.pth.tar'] == saved and exp.epoch == 1
    exp.run(2)
    assert len(nt.load_checkpoint(exp.checkpoint_path)['History']) == 2


def test_no_update_in_evaluation_where_gradients_are_needed(tmp_path):
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


def test_an_error_after_a_callback_has_loaded(tmp_path):
    def fail_once(e, loss):
        if e.batch == 3 and not failed:
            failed.append(1)
            raise ValueError

    failed, exp, whole = [], make(tmp_path / 'a'), make(tmp_path / 'b')
    exp.run(2)
    with pytest.raises(ValueError):
        exp.run(4, lambda e: e.load(), after_batch=fail_once)
    assert exp.epoch == 2 and exp.batch == 0
    exp.run(4)
    whole.run(4)
    assert same(end(exp), end(whole))


@pytest.mark.parametrize('stream', [False, True])
def test_an_update_that_is_left_out_and_what_is_left_at_the_end(tmp_path, stream):
    """Two calls of `update` make a step, with the mean of their gradients; the last one of five has a step of its own."""
    class Line(nt.NeuralNetwork):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w * x

        def criterion(self, y, d):
            return y.mean()  # the gradient is the mean of x

    class Numbers(td.IterableDataset):
        def __iter__(self):
            return ((torch.tensor(10.0 ** k), torch.tensor(0.0)) for k in range(6))

    class Skips(nt.Experiment):
        def update(self, loss, optimizer=None):
            if self.batch != 3:
                super().update(loss, optimizer)

    net, steps = Line(), []
    sgd = torch.optim.SGD(net.parameters(), lr=1)
    sgd.register_step_pre_hook(lambda *_: steps.append(net.w.grad.item()))
    data = td.DataLoader(Numbers() if stream else [*Numbers()], 1)
    Skips(net, data, None, sgd, nt.StatsManager(), str(tmp_path), batches_per_step=2).run(1)
    assert steps == pytest.approx([5.5, 5500, 1e5])


def test_allow_keeps_the_state_of_the_optimizer_of_a_checkpoint_without_settings(tmp_path):
    make(tmp_path).run(2)
    without_settings(tmp_path)
    net = Net()
    exp = make(tmp_path, net, optimizer=torch.optim.Adam(net.parameters(), lr=0.5), allow='Optimizer')
    assert len(exp.optimizer.state) == len(list(net.parameters())) and exp.optimizer.param_groups[0]['lr'] == 0.5


def test_what_was_saved_too_is_not_left_out_without_a_word(tmp_path):
    net = Net()
    make(tmp_path, net, also_save={'ema': swa_utils.AveragedModel(net)}).run(2)
    assert 'ema: stored AveragedModel, given nothing' in conflict(tmp_path)
    assert make(tmp_path, allow='ema').epoch == 2
    make(tmp_path)  # from now on


def test_an_object_that_is_empty_is_called_and_two_are_too(tmp_path):
    class Recorder(list):
        def __call__(self, exp):
            self.append(exp.epoch)

    epochs, exp = Recorder(), make(tmp_path)
    exp.run(2, epochs)
    assert epochs == [0, 1, 2]
    exp.run(3, epochs, plot=epochs)
    assert epochs[3:] == [2, 2, 3, 3]


@pytest.mark.parametrize('options', [{}, {'save_every': 3}])
@pytest.mark.parametrize('error', [False, True])
def test_a_run_keeps_one_copy_in_memory_and_leaves_none(tmp_path, options, error):
    def count():
        gc.collect()
        return sum(type(value) in (torch.Tensor, nn.Parameter) and value.shape == (1001, 3) for value in gc.get_objects())

    exp, counted, before = make(tmp_path, Net(width=1001), **options), [], count()
    with contextlib.suppress(ZeroDivisionError):
        exp.run(4, lambda e: e.epoch and (counted.append(count() - before), 1 / (not error or e.epoch < 4)))
    assert max(counted) <= 6 and count() - before <= 3  # of the gradient, and of what Adam keeps; in a run, of the copy too


def test_a_load_that_fails_leaves_the_guard_on(tmp_path):
    first = make(tmp_path)
    first.run(1)
    make(tmp_path).run(3)
    with pytest.raises(RuntimeError, match='there is no checkpoint'):
        first.load(tmp_path / 'misspelt')
    with pytest.raises(RuntimeError, match='now of epoch 3, trained by another experiment'):
        first.run(2)


def test_an_error_on_the_way_back_is_no_full_disk(tmp_path):
    """The next run tries again, and does not begin with what is half put back."""
    class Broken(nt.Experiment):
        def load_state_dict(self, checkpoint):
            if len(tried) < 2:
                tried.append(self.net.out.bias.data.fill_(math.nan))
                raise RuntimeError('half')
            super().load_state_dict(checkpoint)

    tried, exp, whole = [], experiment(tmp_path / 'a', Broken), experiment(tmp_path / 'b')
    with pytest.raises(RuntimeError, match='half'):
        exp.run(2, lambda e: e.epoch and 1 / 0)
    with pytest.raises(RuntimeError, match='half'):
        exp.run(3)
    exp.run(3)
    whole.run(3)
    assert same(end(whole), end(exp))


def test_after_a_full_disk_the_hand_counts(tmp_path, monkeypatch):
    """What is set by hand after an error is what the next run begins with."""
    def full(*_):
        raise OSError(28, 'No space left on device')

    def fill(e):
        if e.epoch == 2:
            monkeypatch.setattr(os, 'replace', full)

    exp = make(tmp_path)
    with pytest.raises(OSError):
        exp.run(4, fill)
    monkeypatch.undo()
    exp.optimizer.param_groups[0]['lr'] = 1e-4
    rates = []
    exp.run(4, lambda e: rates.append(e.optimizer.param_groups[0]['lr']))
    assert rates == [1e-4, 1e-4] and exp.epoch == 4 and make(tmp_path).epoch == 4


def test_an_update_by_hand_in_a_callback(tmp_path):
    def update(e):
        e.net.train()
        with torch.enable_grad():
            e.update(e.net.criterion(e.net(torch.ones(4, 3)), torch.zeros(4, 1)))

    exp, before = make(tmp_path), weights(Net())
    exp.run(0, update)
    assert not same(weights(exp.net), before)


def test_a_validation_loader_of_a_subclass(tmp_path):
    class Single(nt.Experiment):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.val_loader = td.DataLoader(Data(7), 1)

        def step(self, batch):
            assert self.net.training or len(batch[0]) == 1
            return super().step(batch)

    exp = experiment(tmp_path, Single, perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


def test_each_layer_keeps_its_mode(tmp_path):
    exp = make(tmp_path, perform_validation_during_training=True)
    exp.net.norm.eval()
    for use in (exp.evaluate, lambda: exp.predict(Data(7)), lambda: exp.run(1)):
        use()
        assert exp.net.training and not exp.net.norm.training


def test_statistics_that_one_batch_is_too_little_for(tmp_path):
    class Rare(Stats):
        def init(self):
            super().init()
            self.kept = []

        def accumulate(self, loss, x, y, d):
            super().accumulate(loss, x, y, d)
            if self.number_update > 1:
                self.kept.append(y)

        def summarize(self):
            return {'mean': torch.cat(self.kept).mean().item()}

    exp = make(tmp_path, stats=Rare(), val=Data(7), perform_validation_during_training=True)
    exp.run(1)
    assert exp.epoch == 1


if __name__ == '__main__':
    {'hold': hold, 'processes': processes}[sys.argv[1]](sys.argv[2])
