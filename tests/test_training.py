"""nntools: the loop, `run` and `stop`, and what is printed."""

import contextlib
import os
import textwrap

import numpy as np
import torch

import nntools as nt
from tests.helpers import Data, Net, Stats, make, same


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
    for row in exp.history:
        assert all(type(value) is float for value in row.values())
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


def test_numbers_of_numpy_and_paths(tmp_path):
    exp = make(tmp_path / 'a', batch_size=np.int64(4), seed=np.int64(3), grad_clip=1)
    exp.run(np.int64(1))
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    exp = nt.Experiment(net, Data(), Data(7), adam, Stats(), tmp_path / 'a', 4, seed=3,
                        grad_clip=1.0)
    assert exp.epoch == 1
    exp.save(tmp_path / 'copies' / 'one.tar')
    exp.load(tmp_path / 'copies' / 'one.tar')


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


def test_an_early_stop_says_so(tmp_path, capsys):
    exp = make(tmp_path)
    exp.run(5, lambda e: e.epoch == 2 and e.stop())
    assert 'Stopped after 2 epochs' in (said := capsys.readouterr().out) and 'Finish' not in said
    exp.run(3)
    assert 'Finish training for 3 epochs' in capsys.readouterr().out


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
    assert all(words in err for words in ('Epoch 4/5', 'Epoch 5/5', '5/5', 'loss', '100%'))
    assert len(out.splitlines()) == 4
