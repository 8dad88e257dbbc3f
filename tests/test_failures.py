"""nntools: full disks, folders without permission, losses that are not finite.

What was saved before stays, and the next run goes on from there.
"""

import math
import os

import pytest
import torch

import nntools as nt
from tests.helpers import Data, Net, content, end, experiment, forks, make, same


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
    assert same(end(whole, 'Circumstances'), end(exp, 'Circumstances'))


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    exp = make(tmp_path, train=Data(bad=13))
    saved = content(tmp_path)
    with pytest.raises(
        FloatingPointError, match=r'the loss is nan in epoch 1, batch \d; the batch itself holds'
    ):
        exp.run(2)
    assert content(tmp_path).keys() == saved.keys()
    assert all(torch.isfinite(p).all() for p in exp.net.parameters()) and exp.epoch == 0
    exp = make(tmp_path / 'b', lr=1e30)
    with pytest.raises(
        FloatingPointError,
        match='in epoch [12], batch [1-5]; the data of that batch is finite: a lower'):
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
    with pytest.raises(
        FloatingPointError,
        match='weights are not finite in epoch 2, batch 5; the data of that batch is'):
        exp.run(3)
    assert exp.epoch == 1 and all(torch.isfinite(p).all() for p in net.parameters())
    exp.run(3)
    assert exp.epoch == 3


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
    assert message.startswith('OSError: could not write'), message
    assert 'folder is writable' in message, message
    assert content(tmp_path) == saved and make(tmp_path).epoch == 1


def test_after_a_full_disk_what_was_set_by_hand_counts(tmp_path, monkeypatch):
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


# How many writes succeed: the one before the first epoch, then one an epoch.
@pytest.mark.parametrize('writes', [0, 1, 2])
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
    # The last epoch is in memory.
    assert exp.epoch == 2 + writes and make(tmp_path).epoch == max(2, 1 + writes)
    exp.run(2)  # and is written
    assert make(tmp_path).epoch == 2 + writes
    exp.run(4)
    whole = make(tmp_path / 'whole')
    whole.run(4)
    assert same(end(whole), end(exp))
