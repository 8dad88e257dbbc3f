"""A small training helper for PyTorch: networks, statistics and resumable experiments.

Copy this one file beside your assignment. It needs torch (2.6 or newer), numpy (1.26 or newer) and
tqdm, on Python 3.10 or newer. A complete use::

    import torch
    import nntools as nt

    class Line(nt.NeuralNetwork):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
        def forward(self, x):
            return self.layer(x)
        def criterion(self, y, d):
            return torch.nn.functional.mse_loss(y, d)

    x = torch.linspace(-1, 1, 64)[:, None]
    data = torch.utils.data.TensorDataset(x, 3 * x + 1)
    net = Line()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    exp = nt.Experiment(net, data, data, adam, nt.StatsManager(), output_dir='line')
    exp.run(num_epochs=20)
    print(exp.evaluate())

Run it twice: the second time it finds its checkpoint in ``line/`` and has nothing left to do.
Ask for 40 epochs and it goes on from the 20th, exactly as if it had never stopped.

Started by ``torchrun``, the same script trains on all its processes. The interface is that of the
helper of the UCSD course ECE 285 (C. Deledalle, 2019): its programs and checkpoints keep working.
"""
import ast
import atexit
import codecs
import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import inspect
import io
import itertools
import math
import os
import random
import re
import sys
import time
import warnings
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.data as td
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['NeuralNetwork', 'StatsManager', 'Experiment', 'find_device', 'load_checkpoint', 'mix_seeds']

FORMAT = 3  # of checkpoints; 2 kept its settings in config.txt, and so did that of 2019, which has no number
KEYS = {'Net', 'Optimizer', 'History'}  # of every checkpoint


# --- network and statistics ----------------------------------------------------------------------

class readable:
    """A property that a subclass of 2019 may cover with an attribute or a method of its own."""

    def __init__(self, get):
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance, owner=None):
        return self if instance is None else self.get(instance)


class NeuralNetwork(nn.Module, ABC):
    """A module with a loss. Subclasses define ``forward`` and ``criterion``.

    `parameters()` and `named_parameters()` show only what requires a gradient, so that an optimizer
    built from them leaves frozen layers alone. `state_dict()` holds everything.
    """

    @property
    def device(self):
        """The `torch.device` of the first parameter or buffer (the CPU if there is none)."""
        return _device_of(self)

    def named_parameters(self, *args, **kwargs):
        """As in `torch.nn.Module`, without the parameters that are frozen."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if p.requires_grad)

    def requires_grad_(self, requires_grad=True):
        """As in `torch.nn.Module`: freezes all parameters, or thaws all, those too that are frozen."""
        for _, parameter in super().named_parameters():
            parameter.requires_grad_(requires_grad)
        return self

    @abstractmethod
    def forward(self, x):
        """The prediction for a batch ``x``."""

    @abstractmethod
    def criterion(self, y, d):
        """The loss of the prediction ``y`` when ``d`` was desired: a tensor with one element."""


class StatsManager:
    """The statistics of one pass over a data set: the mean loss per sample, and ``metrics``.

    ``metrics`` is a dict of name to function of (y, d). It returns a value for each sample, (N,) or
    (N, ...), or one for the batch; the mean over the samples is taken.

    For more, extend three methods: ``init`` begins a pass, ``accumulate`` adds a batch, ``summarize``
    returns the statistics as a dict. What they count stays readable after the pass. Under torchrun,
    every process is given the batches of all.
    """
    _metrics = {}

    def __init__(self, metrics=None):
        self._metrics = dict(metrics or {})

    def __repr__(self):
        return ', '.join([type(self).__name__, *self._metrics])

    def __getattr__(self, name):
        hint = ' yet: init must call super().init()' if name in ('running_loss', 'number_update', '_samples') else ''
        raise AttributeError(f'{type(self).__name__} has no {name}{hint}')

    def init(self):
        """Begins a pass."""
        self.running_loss, self.number_update = 0.0, 0  # of 2019: by batches
        self._loss, self._samples, self._sums = 0.0, 0, dict.fromkeys(self._metrics, 0.0)

    def accumulate(self, loss, x=None, y=None, d=None):
        """Adds a batch: ``loss`` is its mean loss (a float), ``x`` the input (N, ...), ``y`` the
        prediction, ``d`` what was desired. Called without gradients."""
        if self.number_update == 0:
            StatsManager.init(self)  # a subclass of 2019 may have an init that does not call this one
        samples = self.count_samples(x, d)
        self.running_loss += loss
        self.number_update += 1
        self._loss += loss * samples
        self._samples += samples
        for name, metric in self._metrics.items():
            values = torch.as_tensor(metric(y, d)).double()
            self._sums[name] += values.mean().item() * samples

    def summarize(self):
        """The mean loss per sample (a float); with metrics a dict of ``'loss'`` and theirs."""
        loss = self._loss / self._samples if vars(self).get('_samples') else self.running_loss / self.number_update
        return {'loss': loss, **{k: v / self._samples for k, v in self._sums.items()}} if self._metrics else loss

    @readable
    def number_samples(self):
        """How many samples were counted in this pass: what a mean should rest on."""
        return self._samples

    def count_samples(self, x, d):
        """How many samples a batch has: tensors (N, ...), alone or in lists and dicts (as
        `default_collate` makes them), a `PackedSequence`, or a list of samples of several sizes.
        Raises TypeError, and asks to be overridden, for anything else."""
        for part in (d, x):
            if isinstance(part, torch.Tensor):
                return len(part) if part.ndim else 1
        for part in (x, d):
            if isinstance(part, nn.utils.rnn.PackedSequence):
                return int(part.batch_sizes[0])
        if isinstance(x, (list, tuple)) and isinstance(d, (list, tuple)) and len(x) == len(d) and not (
                len({len(t) if t.ndim else 1 for t in _tensors([x, d])}) == 1):
            return len(x)
        sizes = {len(tensor) if tensor.ndim else 1 for tensor in _tensors(x)}
        if len(sizes) == 1:
            return sizes.pop()
        if len(sizes) > 1 and isinstance(x, (list, tuple)):
            return len(x)
        raise TypeError(f'how many samples has a batch whose x is a {type(x).__name__}? '
                        f'Override {type(self).__name__}.count_samples(x, d)')


# --- the experiment ------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False, repr=False)
class Experiment:
    """Trains a network and keeps, in one folder, all that is needed to go on later.

    If ``output_dir`` already holds a checkpoint, it is loaded, after a check that it was made with
    the same settings. Otherwise a first one is written, at epoch 0. Arguments are checked first:
    ValueError and TypeError say what is wrong with which. RuntimeError: the checkpoint can't be read.
    OSError: the folder can't be written. What was saved is left alone by all of them.

    Meant to be overridden: `step`, `setting`, `state_dict`, `load_state_dict`. Set what they use
    before you call ``super().__init__``.
    """
    net: nn.Module  # a `NeuralNetwork`, or any module with a method ``criterion(y, d)``
    train_set: td.Dataset  # of pairs (x, d); or a ready `DataLoader`, used as it is
    val_set: td.Dataset  # the same; None if nothing is to be evaluated
    optimizer: torch.optim.Optimizer  # of ``net``; not LBFGS, whose step needs a closure
    stats_manager: StatsManager
    output_dir: str = None  # the folder (default: ``experiment_`` and the time), shared by all machines
    batch_size: int = 16  # samples of one step, over all processes
    perform_validation_during_training: bool = False  # after each epoch; `history` then has pairs (training, validation)
    _: dataclasses.KW_ONLY
    seed: int = None  # of batch order, dropout, noise; default: the checkpoint's, at first drawn from torch's generator
    device: str = None  # 'cuda', 'mps', 'cpu' or 'auto': where ``net`` is moved; by default it stays
    scheduler: dataclasses.InitVar[object] = None  # stepped after each epoch, `ReduceLROnPlateau` with ``best_by``
    grad_clip: float = None  # upper bound on the norm of the gradient
    batches_per_step: int = 1  # batches whose mean gradient makes one step; at the end of an epoch, what is left
    precision: str = 'float32'  # of training; or 'bfloat16', or 'float16' (with loss scaling on CUDA)
    num_workers: int = 0  # of the loaders
    collate_fn: object = None  # of the loaders
    drop_last: bool = True  # leave out the last batch of an epoch if it is short
    drop_last_in_evaluation: bool = False  # by default every sample is evaluated
    best_by: str = None  # a statistic ('PSNR'; in validation if there is one): best.pth.tar has its best epoch
    best_mode: str = 'min'  # or 'max'
    save_every: int = 1  # epochs between two checkpoints; the last one of a run is always saved
    also_save: dict = None  # name to what has state_dict: a second optimizer, averages
    allow: tuple = ()  # settings that may differ from the checkpoint's: ``('Optimizer', 'Scheduler')``

    # For subclasses of 2019 that never call __init__.
    train_loader = val_loader = _scheduler = _scaler = _state = None
    batch, _seconds, _clean, _stopped, _parted, _saved = 0, (), True, False, False, None

    def __post_init__(self, scheduler):
        self._scheduler, self.history, self._seconds, self.also_save = scheduler, [], [], dict(self.also_save or {})
        self.allow = (self.allow,) if isinstance(self.allow, str) else tuple(self.allow)
        _check_arguments(self)
        _start_distributed()
        if self.device is not None:
            device = _device(self.device)
            self.net.to(device)
            if 'device' in vars(self.net):
                self.net.device = device
        self.device = _device_of(self.net)
        if self.precision == 'float16' and self.device.type == 'cuda':
            self._scaler = torch.amp.GradScaler('cuda')
        self.output_dir = os.path.expanduser(self.output_dir or f'experiment_{_from_rank_0(time.time())}')
        for name in ('checkpoint', 'best'):
            setattr(self, f'{name}_path', os.path.join(self.output_dir, f'{name}.pth.tar'))
        self.config_path = os.path.join(self.output_dir, 'config.txt')
        stored = _read(self, self.checkpoint_path) if _from_rank_0(os.path.isfile(self.checkpoint_path)) else {}
        if self.seed is None:
            self.seed = _stored_seed(self, stored)
        if self.best_by is None:
            self.best_by, self.best_mode = stored.get('Best', (None, self.best_mode))
        self.train_loader = _loader(self, self.train_set, training=True)
        self.val_loader = None if self.val_set is None else _loader(self, self.val_set)
        if _world_size() > 1:
            for tensor in self.net.state_dict().values():  # all start from the weights of rank 0
                dist.broadcast(tensor, 0)
        try:
            self._open(stored)
        except AttributeError as error:
            raise AttributeError(f'{error}. Set it before you call super().__init__(), which needs it') from error

    def _open(self, stored):
        """Goes on from the checkpoint that was found, or writes the first one."""
        differences = _compare_settings(self, stored) if stored else {}
        if stored and stored.get('History', True):
            _refuse_conflicts(self, differences)
            _take_with_changes(self, stored, differences)
        elif stored and not differences:
            self._take(stored)
        if not stored or differences:  # other settings at epoch 0: there is nothing to lose
            self.save()
        self._saved = self.epoch
        _check_best(self)

    # --- the loop --------------------------------------------------------------------------------

    def run(self, num_epochs, callback=None, *, after_batch=None, plot=None):
        """Trains until ``num_epochs`` epochs are done in all, those of earlier runs included.

        ``callback(exp)`` (``plot`` in the course) is called before training and after every epoch:
        draw, log, or call `stop` there; ``after_batch(exp, loss)`` after every batch of training
        (number ``exp.batch``). Both without gradients; ``callback`` with the network in evaluation
        mode, and on one process only.

        Whatever interrupts it, the experiment goes back to the last epoch that was finished, and the
        exception goes on to the caller: a new ``run`` continues from there. A loss that is NaN or
        infinite raises FloatingPointError, which names epoch and batch.
        """
        _check_whole('num_epochs', num_epochs, 0)
        if callback is not None and plot is not None:
            raise ValueError('callback and plot are two names of one thing: give one of them')
        callback, mode = callback or plot, self.net.training
        with _locked(os.path.dirname(self.checkpoint_path)), torch.no_grad(), _progress_bar(self.train_loader) as bar:
            self._begin(num_epochs)
            try:
                self.net.eval()
                self._call(callback)
                while self.epoch < num_epochs and not self._stopped:
                    start = time.time()
                    bar.set_description(f'Epoch {self.epoch + 1}/{num_epochs}', refresh=False)
                    summary = self._train_epoch(bar, after_batch)
                    if self.perform_validation_during_training:
                        summary = summary, _kept(self.evaluate())
                    self._end_epoch(summary, time.time() - start)
                    self._save_state(only_if_due=self.epoch < num_epochs)
                    _say(f'Epoch {self.epoch}/{num_epochs}: {_line(self)} ({self._seconds[-1]:.2f} s)')
                    self._call(callback)
                self._save_state()
            except BaseException as error:
                self._fall_back(error)
                raise
            finally:
                self.net.train(mode)
        self._clean = True
        _say(f'{"Stopped after" if self.epoch < num_epochs else "Finish training for"} {self.epoch} epochs')

    def _train_epoch(self, bar, after_batch):
        """One pass over the training set. Returns its summary."""
        bar.reset()
        self.net.train()
        self.stats_manager.init()
        with _randomness(self.seed, self.epoch + 1, self.train_loader, _rank()):
            for number, batch in enumerate(_batches(self, self.train_loader), start=1):
                self.batch = number
                with torch.enable_grad(), _autocast(self):
                    loss, x, y, d = self.step(batch)
                loss = float(loss)
                if not math.isfinite(loss):
                    raise _not_finite(self, f'the loss is {loss}', batch)
                for part in _from_all((loss, x, y, d)):
                    self.stats_manager.accumulate(*part)
                if self.batch == 1:
                    _check_summary(self, self.stats_manager.summarize(), training=True)
                if after_batch is not None:
                    after_batch(self, loss)
                if not bar.disable:
                    bar.set_postfix_str(f'loss {loss:.4g}', refresh=False)
                    bar.update()
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):  # spoilt by the last update
            raise _not_finite(self, 'weights are not finite', batch)
        self.batch = 0
        self.net.eval()
        if _world_size() > 1:  # each process has its own batch-norm statistics: rank 0's count
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        return _kept(self.stats_manager.summarize())

    def step(self, batch):
        """What is done with one batch, in training and in evaluation: **the method to override**.

        ``batch`` is what the loader gives, on the network's device. Return the loss (one value), and
        the x, y, d that `StatsManager.accumulate` takes. Call ``self.update(loss)`` where the weights
        are to change; it does nothing in evaluation. For instance, with two optimizers::

            def step(self, x):
                loss_d = self.net.loss_of_discriminator(x)
                self.update(loss_d, self.also_save['discriminator'])
                loss_g = self.net.loss_of_generator(len(x))
                self.update(loss_g)
                return loss_g + loss_d, x, None, None
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f' of {len(batch)}' if hasattr(batch, '__len__') else ''
            raise TypeError(f'a batch must be a pair (x, d), got a {type(batch).__name__}{size}: override step')
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d

    def update(self, loss, optimizer=None):
        """One step of ``optimizer`` (default: the experiment's) down the gradient of ``loss``, which
        is averaged over the processes of torchrun, and over ``batches_per_step`` batches."""
        if not self.net.training:
            return
        if loss.numel() != 1:
            raise ValueError(f'the loss must be one number, got the shape {tuple(loss.shape)}: take its mean')
        if optimizer is not None and self.batches_per_step > 1:
            raise ValueError(f'batches_per_step={self.batches_per_step} works with one optimizer; update got another')
        optimizer, scaler = optimizer or self.optimizer, self._scaler
        number, batches = 1, 1  # this batch's among those of this step, and how many these are
        if self.batches_per_step > 1:
            number = (self.batch - 1) % self.batches_per_step + 1
            batches = min(self.batches_per_step, len(self.train_loader) - self.batch + number)
            loss = loss / batches
        if number == 1:
            optimizer.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        if number < batches:
            return
        _average_gradients(optimizer)
        if self.grad_clip is not None:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(_parameters(optimizer), self.grad_clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    def evaluate(self, data=None):
        """The summary over all of ``data`` (data set or `DataLoader`; default: the validation set), in
        evaluation mode. Random numbers drawn meanwhile follow from the seed alone, and leave those of
        the training and of the caller as they were. The processes of torchrun share the batches."""
        loader = self.val_loader if data is None else _loader(self, data)
        if loader is None:
            raise ValueError('there is nothing to evaluate: val_set is None; pass a data set')
        stats = copy.copy(self.stats_manager) if self.batch else self.stats_manager  # called in a step
        stats.init()
        with self._evaluating(loader):
            batches = _batches(self, loader)
            while some := list(itertools.islice(batches, _world_size())):  # one for each process
                mine = self.step(some[_rank()]) if _rank() < len(some) else None
                for part in _from_all(mine and (float(mine[0]), *mine[1:])):
                    if part is not None:
                        stats.accumulate(*part)
        return stats.summarize()

    def predict(self, data, targets=False):
        """The network's outputs for all of ``data``, in order: a tensor (N, ...) on the CPU; with
        ``targets`` a pair of it and what was desired. ``data`` is a tensor of inputs (N, ...), a data
        set or a `DataLoader`, which is gone through in order whatever it does in training. Of outputs
        in a tuple the first is taken. Under torchrun each process computes them all."""
        if isinstance(data, td.DataLoader) and not isinstance(data.dataset, td.IterableDataset):
            data = td.DataLoader(data.dataset, data.batch_size or self.batch_size, collate_fn=data.collate_fn)
        elif not isinstance(data, td.DataLoader):
            collate = None if isinstance(data, torch.Tensor) else self.collate_fn
            data = td.DataLoader(data, self.batch_size, collate_fn=collate)
        outputs, desired = [], []
        with self._evaluating(data):
            for batch in _batches(self, data):
                y, d = (self.net(batch), None) if isinstance(batch, torch.Tensor) else self.step(batch)[2:]
                outputs.append((y[0] if isinstance(y, (tuple, list)) else y).cpu())
                desired.append(d.cpu() if targets else None)
        return (torch.cat(outputs), torch.cat(desired)) if targets else torch.cat(outputs)

    def stop(self):
        """Ends the run after the present epoch: ``if exp.epoch - exp.best[0] >= 10: exp.stop()``."""
        self._stopped = True

    # --- the parts of a run ----------------------------------------------------------------------

    def _begin(self, num_epochs):
        """Makes sure that the run begins with a whole state, which is kept, and that it can end."""
        if self._parted:
            raise RuntimeError('the processes of torchrun have parted after an error: start the program again')
        if not self._clean:
            self._take(self._state)  # a run was left, and perhaps interrupted again on its way back
        if self.seed is None:
            self.seed = _stored_seed(self, {})
        _say(f'Start/Continue training from epoch {self.epoch}')
        self._stopped, self.batch = False, 0
        _warn_of_parameters_without_optimizer(self)
        if self.epoch < num_epochs:
            if self.perform_validation_during_training:
                _try_evaluation(self)
            self.save()  # the weights may have changed since: another experiment can share them
        self._state, self._clean = self._snapshot(), False

    def _end_epoch(self, summary, seconds):
        """Everything that belongs to the epoch just done; its state is what a run goes back to."""
        self.history.append(summary)
        _step_scheduler(self, summary)
        self._seconds = [*self._seconds, *[math.nan] * self.epoch][:self.epoch - 1] + [seconds]
        self._state = self._snapshot()

    def _save_state(self, only_if_due=False):
        """Writes the epoch last finished. The best goes first: if a kill comes between the two, the
        epoch is done again, and both are written again."""
        if self.best_by is not None and self.epoch and _best(self)[0] == self.epoch and self._saved != self.epoch:
            _write_state(self._state, self.best_path)
        if self._saved != self.epoch and not (only_if_due and self.epoch % self.save_every):
            _write_state(self._state, self.checkpoint_path)
            self._saved = self.epoch

    def _call(self, callback):
        """A callback runs on one process; the others wait, and hear whether it called `stop`."""
        if callback is not None and _rank() == 0:
            with _alone():
                callback(self)
        self._stopped = _from_rank_0(self._stopped)

    def _fall_back(self, error):
        """Returns to the last epoch that was finished, and saves it if it can."""
        self.batch = 0
        self._take(self._state)
        text = f'{type(error).__name__}: back to epoch {self.epoch}, the last one finished'
        if _world_size() > 1:
            _say(f'{text}. Start the program again to go on.')
            self._parted = True
            dist.destroy_process_group()  # so that the others don't wait for this one
            return
        try:
            self._save_state()
            _say(f'{text}, which is saved. Call run again to go on from there.')
        except OSError as full:
            _say(f'{text}; it is not saved ({full}). Call run again to go on from there.')

    @contextlib.contextmanager
    def _evaluating(self, loader):
        mode = self.net.training
        self.net.eval()
        try:
            with torch.no_grad(), _randomness(self.seed or 0, 0, loader):
                yield
        finally:
            self.net.train(mode)

    # --- history ---------------------------------------------------------------------------------

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.history)

    @readable
    def seconds(self):
        """How long each epoch took, a list."""
        return list(self._seconds)

    @readable
    def best(self):
        """(epoch, value) at which the statistic ``best_by`` (by default the loss) was best, the
        first epoch being 1; (0, nan) before it. Values that are NaN don't count."""
        return _best(self)

    def table(self):
        """The history as a list of flat dicts, one an epoch: ``epoch``, the training statistics, the
        validation statistics with ``val_`` before their names, and ``seconds``; all plain numbers
        and lists. ``pandas.DataFrame(exp.table())`` is a data frame."""
        rows = [{'epoch': k, **_row(self, entry)} for k, entry in enumerate(self.history, start=1)]
        return [row | {'seconds': s} for row, s in zip(rows, self._seconds)] + rows[len(self._seconds):]

    def to_csv(self, path):
        """Writes the history, as in `table`, to a CSV file."""
        text, rows = io.StringIO(newline=''), Experiment.table(self)
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        _write(path, lambda file: file.write(text.getvalue().encode()))

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self):
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {'Net': _unwrapped(self.net).state_dict(), 'Optimizer': self.optimizer.state_dict(),
                'History': self.history, 'Format': FORMAT, 'Seconds': list(self._seconds), 'Seed': self.seed,
                'Best': (self.best_by, self.best_mode), 'Setting': _describe_settings(self), **{name: item.state_dict() for name, item in _also(self).items()}}

    def load_state_dict(self, checkpoint):
        """Takes over a state that `state_dict` returned, or one of the original helper. Raises
        ValueError, before anything is changed, if it doesn't fit network or optimizer."""
        _check_fit(self, checkpoint)
        items = {name: item for name, item in _also(self).items() if name in checkpoint}
        before = copy.deepcopy({name: item.state_dict() for name, item in items.items()})
        try:
            for name, item in items.items():
                item.load_state_dict(copy.deepcopy(checkpoint[name]))
        except Exception:
            for name, item in items.items():
                item.load_state_dict(before[name])
            raise
        _unwrapped(self.net).load_state_dict(checkpoint['Net'])
        if 'Optimizer' in checkpoint:
            self.optimizer.load_state_dict(copy.deepcopy(checkpoint['Optimizer']))
        self.history = [_kept(entry) for entry in checkpoint['History']]
        self._seconds = list(checkpoint.get('Seconds', [math.nan] * self.epoch))
        self.seed = checkpoint.get('Seed') if self.seed is None else self.seed

    def save(self, path=None):
        """Writes a checkpoint (default: ``checkpoint.pth.tar``), and beside the first one
        ``config.txt``, for people. The file that was there stays whole until the new one is complete.
        During a run, and after one that was left, it is the last finished epoch that is written."""
        if _rank() == 0 and not os.path.isfile(self.config_path):
            _write(self.config_path, lambda file: file.write(f'{self!r}\n'.encode()))
        _write_state(self.state_dict() if self._clean else self._state, path or self.checkpoint_path)
        self._saved = self.epoch if path is None else self._saved

    def load(self, path=None):
        """Goes back to a checkpoint (default: the last), history and all.
        Raises RuntimeError if the file can't be read, and says why and what to do."""
        self._take(_read(self, path or self.checkpoint_path))
        self._saved = self.epoch if path is None else None
        _check_best(self)

    def load_best(self):
        """Takes the weights of the best epoch, those of ``best.pth.tar``. History and optimizer stay.
        Raises RuntimeError if there are none: give ``best_by`` before training."""
        _unwrapped(self.net).load_state_dict(_read(self, self.best_path)['Net'])

    def _take(self, state):
        """Goes to a state. If that is interrupted, the next `run` does it again."""
        before = self._state, self._clean
        self._state, self._clean = state, False
        try:
            self.load_state_dict(state)
        except Exception:  # of one that does not fit; nothing has been changed
            self._state, self._clean = before
            raise
        self._clean = True

    def _snapshot(self):
        state = self.state_dict()  # entries of the history don't change: copying them would take long
        return copy.deepcopy(state, {id(entries): list(entries) for entries in [state.get('History')] if entries})

    def setting(self):
        """The settings, by name, that a checkpoint must share with the experiment that loads it.
        Subclasses may add their own. Stored and compared are plain values and texts (`repr`)."""
        def get(name, default=None):
            return getattr(self, name, default)

        loaders = get('train_loader'), get('val_loader') if self.perform_validation_during_training else None
        sizes = [len(loader.dataset) if hasattr(getattr(loader, 'dataset', None), '__len__') else None for loader in loaders]
        batch_size = self.train_set.batch_size if isinstance(get('train_set'), td.DataLoader) else self.batch_size
        return {'Net': self.net, 'TrainSet': get('train_set'), 'ValSet': get('val_set'), 'Optimizer': self.optimizer,
                'StatsManager': self.stats_manager, 'BatchSize': batch_size,
                'PerformValidationDuringTraining': self.perform_validation_during_training,
                'TrainSetSize': sizes[0], 'ValSetSize': sizes[1], 'Seed': self.seed, 'Precision': self.precision,
                'GradClip': self.grad_clip and float(self.grad_clip), 'BatchesPerStep': self.batches_per_step,
                'DropLast': self.drop_last, 'Scheduler': self._scheduler}

    def __repr__(self):
        return ''.join(f'{name}({_text(value)})\n' for name, value in self.setting().items())


# --- checks: what is wrong, and what to do ---------------------------------------------------------

def _check_whole(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number, {least} or more, got {value!r}')


def _check_arguments(exp):
    """Raises TypeError or ValueError for what can't work, before anything is made or written."""
    def need(name, attributes, what, value):
        if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
            raise TypeError(f'{name} must be {what}, got {value if isinstance(value, type) else type(value).__name__}')

    net, optimizer, scheduler, kind = exp.net, exp.optimizer, exp._scheduler, type(exp)
    need('net', ['named_parameters', 'state_dict'], 'a torch.nn.Module', net)
    if kind.step is Experiment.step:
        need('net', ['criterion'], 'a module with a method criterion(y, d), its loss', net)
    need('optimizer', ['step', 'zero_grad', 'param_groups'],
         'a torch.optim.Optimizer (the order is net, train_set, val_set, optimizer, stats_manager)', optimizer)
    need('stats_manager', ['init', 'accumulate', 'summarize'], 'a StatsManager', exp.stats_manager)
    for name, item in exp.also_save.items():
        need(f'also_save[{name!r}]', ['state_dict', 'load_state_dict'], 'something with state_dict', item)
        if name in KEYS | {'Format', 'Seconds', 'Seed', 'Best', 'Setting', 'Scheduler', 'Scaler'}:
            raise ValueError(f'also_save[{name!r}] needs another name: the checkpoint has that one already')
    for name in ('step', 'update'):
        try:
            inspect.signature(getattr(exp, name)).bind(None)
        except TypeError:
            raise TypeError(f'{kind.__name__}.{name} is called with one argument ({name} is a method of '
                            f'nntools.Experiment, see its docstring): rename yours') from None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError('LBFGS needs a closure at each step, which update does not give: use another optimizer')
    own = dict(nn.Module.named_parameters(net))
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in own.values()):
        raise ValueError('net has lazy modules: send one batch through it first, and then build the optimizer')
    if not {id(p) for p in own.values()} & {id(p) for p in _parameters(optimizer)}:
        raise ValueError('optimizer holds no parameter of net: build it from net.parameters()')
    if getattr(scheduler, 'optimizer', optimizer) is not optimizer:
        raise ValueError('scheduler belongs to another optimizer: build it from the one given here')
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != exp.best_mode:
        raise ValueError(f'best_mode is {exp.best_mode!r}, but scheduler has mode={scheduler.mode!r}: make them alike')
    for name, least in (('batch_size', 1), ('batches_per_step', 1), ('num_workers', 0), ('save_every', 1), ('seed', 0)):
        if name != 'seed' or exp.seed is not None:
            _check_whole(name, getattr(exp, name), least)
            setattr(exp, name, int(getattr(exp, name)))
    if exp.grad_clip is not None and not (isinstance(exp.grad_clip, (int, float)) and exp.grad_clip > 0):
        raise ValueError(f'grad_clip must be a number, more than 0, got {exp.grad_clip!r}')
    for name, words in (('precision', ('float32', 'bfloat16', 'float16')), ('best_mode', ('min', 'max'))):
        if getattr(exp, name) not in words:
            raise ValueError(f'{name} must be one of {words}, got {getattr(exp, name)!r}')
    if exp.val_set is None and exp.perform_validation_during_training:
        raise ValueError('perform_validation_during_training needs a val_set, got None')
    if exp.batches_per_step > 1 and isinstance(exp.train_set, td.DataLoader) and not hasattr(exp.train_set.batch_sampler, '__len__'):
        raise ValueError(f'batches_per_step={exp.batches_per_step} needs a loader with a length')


def _warn_of_parameters_without_optimizer(exp):
    """Says, once, what wants a gradient and is in no optimizer: it would never be trained."""
    optimizers = [exp.optimizer, *(item for item in (exp.also_save or {}).values() if hasattr(item, 'param_groups'))]
    known = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
    names = [name for name, p in nn.Module.named_parameters(exp.net) if p.requires_grad and id(p) not in known]
    if names and names != vars(exp).get('_named'):
        _say(f'These parameters want a gradient, but are in no group of the optimizer, and will not be trained: '
             f'{", ".join(names[:5])}{" ..." if len(names) > 5 else ""}')
    exp._named = names


def _check_summary(exp, summary, training):
    """Refuses, at the first batch, statistics that can't be kept, and a ``best_by`` that is not among them."""
    names = [('' if training else 'val_') + name for name in _flat(_kept(summary))]
    wanted = exp.best_by or ('loss' if isinstance(exp._scheduler, ReduceLROnPlateau) else None)
    if wanted is None or training and exp.perform_validation_during_training or _column(exp) in names:
        return
    close = difflib.get_close_matches(_column(exp), names, 1)
    raise ValueError(f'best_by: there is no statistic {wanted!r}, there is {", ".join(map(repr, names))}'
                     + (f'; did you mean {close[0]!r}?' if close else ''))


def _try_evaluation(exp):
    """Evaluates the last, short batch before the first epoch, so that what is wrong shows at once."""
    data, size, stats = exp.val_set, exp.batch_size, exp.stats_manager
    if isinstance(data, td.DataLoader):
        loader, short = data, False
    else:
        left = 0 if exp.drop_last_in_evaluation else len(data) % size
        loader, short = td.DataLoader(td.Subset(data, range(len(data) - (left or min(size, len(data))), len(data))),
                                      size, collate_fn=exp.collate_fn), 0 < left
    stats.init()
    try:
        with exp._evaluating(loader):
            for batch in itertools.islice(_batches(exp, loader), 1):
                loss, *rest = exp.step(batch)
                stats.accumulate(float(loss), *rest)
    except Exception as error:
        if short:
            raise RuntimeError(f'the last batch of the evaluation has {left} samples instead of {size}: {error}. If the '
                               'network can not take fewer, give drop_last_in_evaluation=True') from error
        raise
    _check_summary(exp, stats.summarize(), training=False)


def _not_finite(exp, what, batch):
    hint = ('the data of that batch is finite: a lower learning rate or grad_clip may help'
            if all(torch.isfinite(tensor).all() for tensor in _tensors(batch)) else
            'the batch itself holds values that are not finite: mend the data')
    return FloatingPointError(f'{what} in epoch {exp.epoch + 1}, batch {exp.batch}; {hint}')


# --- settings --------------------------------------------------------------------------------------

def _describe(value):
    """A setting as plain values, texts and dicts of these: what a checkpoint can keep and compare."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module):
        layers = {f'layer {name}': f'{type(m).__name__}({m.extra_repr()})'
                  for name, m in _unwrapped(value).named_modules() if name}
        return {'class': type(_unwrapped(value)).__name__, **layers}
    if isinstance(value, td.DataLoader):
        return {'class': 'DataLoader', 'data': _describe(value.dataset), 'drop_last': value.drop_last}
    if hasattr(value, 'param_groups'):
        groups = [{'lr': group.get('initial_lr', group.get('lr'))} | {
            name: _describe(group[name]) for name in getattr(value, 'defaults', ()) if name != 'lr'}
            for group in value.param_groups]
        return {'class': type(value).__name__} | {
            (f'group {k} ' if k else '') + name: v for k, group in enumerate(groups) for name, v in _describe(group).items()}
    if hasattr(value, 'optimizer') and hasattr(value, 'state_dict'):  # a scheduler, without what changes in training
        return {'class': type(value).__name__} | {
            name: _describe(v) for name, v in value.state_dict().items() if name == '_schedulers' or not (
                name.startswith('_') or name in ('last_epoch', 'best', 'num_bad_epochs', 'cooldown_counter', 'T_cur', 'T_i'))}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and getattr(value, 'ndim', 0) == 0:
        return value.item()
    if isinstance(value, dict) and len(value) <= 100:
        return {str(name): _describe(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)) and len(value) <= 100:
        return tuple(map(_describe, value))
    return _clean(_text(value))


def _text(value):
    """An object as it describes itself; of samples in a list only the number."""
    samples = isinstance(value, (list, tuple, dict)) and (len(value) > 100 or any(True for _ in _tensors(value)))
    if samples or isinstance(value, (torch.Tensor, np.ndarray)):
        return f'{type(value).__name__} of {len(value)}'
    return repr(value)


def _clean(text):
    """Without memory addresses, modules of classes and folders, which differ between machines."""
    text = re.sub(r' at 0x\w+', '', re.sub(r'<\S*?(\w+) object at 0x\w+>', r'<\1 object>', text))
    return ' '.join(re.sub(r'(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\\/\s\'"(),]+[\\/])+', '', text).split())


def _describe_settings(exp):
    """What `setting` returns, described as it was when first given: rates change by schedule or by hand."""
    given = vars(exp).setdefault('_given', {})
    for name, value in exp.setting().items():
        if name not in given or given[name][0] is not value:
            given[name] = value, _describe(value)
    described = {name: given[name][1] for name in exp.setting()}
    return described | {'Torch': str(torch.__version__), 'Source': _source(type(_unwrapped(exp.net)))}


def _source(kind):
    """A digest of the source of a class and its bases, or None where Python can't find it."""
    try:
        own = [c for c in kind.__mro__ if c.__module__.split('.')[0] not in ('torch', 'builtins', 'abc', __name__)]
        return hashlib.sha256('\n'.join(map(inspect.getsource, own)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def _differences(stored, given, same_torch, name):
    """A line for each difference of two settings; between versions of torch, in what both know of."""
    if not (isinstance(stored, dict) and isinstance(given, dict)):
        stored, given = (v.get('class', v) if isinstance(v, dict) else v for v in (stored, given))
        return [] if stored == given else [f'{name}: stored {stored}, given {given}']
    if stored.get('class') != given.get('class'):
        return [f'{name}: stored {stored.get("class")}, given {given.get("class")}']
    keys = stored | given if same_torch else [k for k in given if k in stored and not k.startswith('layer ')]
    a, b = ({k: v.get(k, 'nothing') for k in keys} for v in (stored, given))
    return [f'{name}: {k} stored {a[k]}, given {b[k]}' for k in keys if a[k] != b[k]]


def _compare_settings(exp, stored):
    """What differs between a checkpoint and an experiment: a dict of the setting's name to lines."""
    given = _describe_settings(exp)
    old = stored.get('Setting') or _setting_of_config(exp.config_path, given)
    if unknown := [name for name in exp.allow if name not in given]:
        raise ValueError(f'allow: there is no setting {unknown[0]!r}; there is {", ".join(given)}')
    same_torch = old.get('Torch') == given['Torch']
    if old.get('Source') and given['Source'] and old['Source'] != given['Source']:
        _say(f'The source of {type(exp.net).__name__} has changed since the checkpoint in {exp.output_dir}')
    left_out = {'Torch', 'Source'} | ({'ValSet', 'ValSetSize'} if not exp.perform_validation_during_training else set())
    lines = {'Weights': _weight_differences(stored, exp)} | {
        name: _differences(old[name], value, same_torch, name) for name, value in given.items()
        if name in old and name not in left_out}
    return {name: some for name, some in lines.items() if some}


def _weight_differences(stored, exp):
    """In which parameters and buffers two networks differ: a line for each of the first ten."""
    a, b = ({name: tuple(getattr(value, 'shape', ())) for name, value in net.items()
             if not name.endswith('num_batches_tracked')}
            for net in (stored.get('Net', {}), _unwrapped(exp.net).state_dict() if 'Net' in stored else {}))
    return [f'{name}: stored {a.get(name, "nothing")}, given {b.get(name, "nothing")}'
            for name in a | b if a.get(name) != b.get(name)][:10]


def _refuse_conflicts(exp, differences):
    names = [name for name in differences if name not in exp.allow]
    if not names:
        return
    lines = '\n  '.join(line for name in names for line in differences[name])
    advice = 'Use the stored settings, or another output_dir to start anew'
    if 'Weights' not in names:
        advice += f'; allow={tuple(differences)!r} goes on with the new ones'
    raise ValueError(f'{exp.output_dir} holds a checkpoint made with other settings:\n  {lines}\n{advice}.')


def _take_with_changes(exp, stored, differences):
    """Loads a checkpoint; where optimizer or schedule are to differ, the new ones count, the schedule
    as if it had been there from the start. The optimizer's state goes on if it is of the same kind."""
    changed = {'Optimizer', 'Scheduler'} & differences.keys()
    groups = [{k: v for k, v in group.items() if k != 'params'} for group in exp.optimizer.param_groups]
    if changed:
        new_kind = any(not line.startswith('Optimizer: ') or 'Optimizer: stored' in line for line in differences.get('Optimizer', ()))
        stored = {k: v for k, v in stored.items() if k != 'Scheduler' and not (k == 'Optimizer' and new_kind)}
    exp._take(stored)
    if changed:
        for group, given in zip(exp.optimizer.param_groups, groups):
            group.update(given)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch: that no step of the optimizer came before
            for entry in exp.history if exp._scheduler is not None else ():
                _step_scheduler(exp, entry)


def _check_fit(exp, checkpoint):
    """Raises before anything is changed if a checkpoint is not of these networks and optimizers."""
    if missing := sorted({'Net', 'History', *(exp.also_save or ())} - checkpoint.keys()):
        raise ValueError(f'the checkpoint has no {", ".join(missing)}')
    if lines := _weight_differences(checkpoint, exp):
        raise ValueError('\n  '.join(['the checkpoint is that of another network:', *lines]))
    if 'Optimizer' in checkpoint:
        stored, given = ([len(group['params']) for group in optimizer['param_groups']]
                         for optimizer in (checkpoint['Optimizer'], exp.optimizer.state_dict()))
        if stored != given:
            raise ValueError(
                f'{os.path.dirname(exp.checkpoint_path)}: the optimizer of the checkpoint has groups of {stored} parameters, '
                f'the one given of {given}. Give it all groups from the start, and freeze and thaw by requires_grad_ '
                'and the rates of the groups (README of nntools, "Freeze, train, thaw, train on")')


# --- history ---------------------------------------------------------------------------------------

def _kept(value):
    """Statistics as the history keeps them: tensors on the CPU (arrays, too), numbers, texts, in containers."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_kept, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'summarize must return numbers, got a {type(value).__name__}')


def _flat(summary):
    """A summary as a dict of plain numbers and lists; of something odd, nothing."""
    if isinstance(summary, dict):
        return {name: value.tolist() if hasattr(value, 'tolist') else value for name, value in summary.items()}
    number = isinstance(summary, (int, float)) or getattr(summary, 'ndim', 1) == 0
    return {'loss': float(summary)} if number else {}


def _row(exp, entry):
    """An entry of the history as a flat dict. Pairs are (training, validation)."""
    pair = isinstance(entry, tuple) and len(entry) == 2 and (
        exp.perform_validation_during_training or all(isinstance(part, dict) for part in entry))
    train, val = entry if pair else (entry, {})
    return _flat(train) | {f'val_{name}': value for name, value in _flat(val).items()}


def _column(exp):
    """The name in `_row` of the statistic that counts."""
    name = exp.best_by or 'loss'
    return f'val_{name}' if exp.perform_validation_during_training and not name.startswith('val_') else name


def _score(exp, entry):
    """The statistic that counts, as a float; NaN where an entry does not have it."""
    value = _row(exp, entry).get(_column(exp))
    return float(value) if isinstance(value, (int, float)) else math.nan


def _best(exp):
    """(epoch, value) of the best epoch."""
    scores = [(score, k) for k, score in enumerate((_score(exp, entry) for entry in exp.history), start=1)
              if not math.isnan(score)]
    better = max if exp.best_mode == 'max' else min
    return better(scores, key=lambda pair: pair[0], default=(math.nan, 0))[::-1]


def _line(exp):
    """The last entry as text."""
    return ', '.join(f'{name} {value:.4g}' for name, value in _row(exp, exp.history[-1]).items()
                     if isinstance(value, (int, float)))


def _also(exp):
    """What the checkpoint keeps beside network and optimizer."""
    more = {'Scheduler': exp._scheduler, 'Scaler': exp._scaler}
    return {name: item for name, item in more.items() if item is not None} | (exp.also_save or {})


def _step_scheduler(exp, entry):
    if isinstance(exp._scheduler, ReduceLROnPlateau):
        exp._scheduler.step(_score(exp, entry))
    elif exp._scheduler is not None:
        exp._scheduler.step()


# --- device and data -------------------------------------------------------------------------------

def find_device():
    """The best device of this machine: CUDA (under torchrun, this process's own), MPS or CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')


def _device(name):
    """The device of that name; ValueError if there is none here."""
    try:
        device = find_device() if name == 'auto' else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cuda', 'mps', 'cpu' or 'auto', got {name!r}") from error
    here = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available}
    if not here.get(device.type, bool)() and device.type in here:
        raise ValueError(f"device {name!r} is not available here; use device='auto' for the best one that is")
    return device


def _device_of(net):
    """Where a network is: where it says, else where its first parameter or buffer is."""
    if not isinstance(net, NeuralNetwork) and getattr(net, 'device', None) is not None:
        return torch.device(net.device)
    tensors = itertools.chain(nn.Module.named_parameters(net), nn.Module.named_buffers(net))
    return next((tensor.device for _, tensor in tensors), torch.device('cpu'))


def _unwrapped(net):
    """The network inside of `torch.compile`: both write and read the same checkpoints."""
    return next(net.children()) if type(net).__name__ == 'OptimizedModule' else net


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def _tensors(batch):
    """The tensors in a batch of lists, tuples and dicts, one after the other."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, dict)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)


def _to(batch, device):
    """A batch (tensors in lists, tuples, dicts) moved to a device; anything else stays."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == 'cuda')
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, '_fields') else type(batch)(moved)
    return batch.to(device) if hasattr(batch, 'to') else batch


def _loader(exp, data, training=False):
    """The loader of a data set. In training each process has its share of every batch."""
    if isinstance(data, td.DataLoader):
        if training and data.persistent_workers:
            warnings.warn('persistent_workers go on with random numbers of their own: '
                          'what they draw is not repeated by a resumed run', stacklevel=4)
        return data
    name = 'train_set' if training else 'the data set to evaluate'
    if not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
        raise TypeError(f'{name} must be a data set with a length (an iterable one goes in a DataLoader of '
                        f'your own), got {type(data).__name__}')
    world, size = _world_size(), exp.batch_size
    drop_last = exp.drop_last if training else exp.drop_last_in_evaluation
    if training and size % world:
        raise ValueError(f'batch_size must be a multiple of the number of processes, {world}, got {size}')
    if len(data) < (size if drop_last else 1):
        raise ValueError(f'{name} has {len(data)} samples, too few for one batch of {size}: '
                         'lower batch_size, or keep the last short batch')
    options = dict(num_workers=exp.num_workers, collate_fn=exp.collate_fn, drop_last=drop_last,
                   pin_memory=_device_of(exp.net).type == 'cuda')
    if not training:
        return td.DataLoader(data, size, **options)
    sampler = _Shuffle(data, world, _rank(), seed=mix_seeds(exp.seed) % 2**31, drop_last=drop_last)
    return td.DataLoader(data, size // world, sampler=sampler, **options)


class _Shuffle(td.DistributedSampler):
    """Its order is a function of (seed, epoch); who iterates without `set_epoch` gets new ones, too."""

    def __iter__(self):
        order = super().__iter__()
        self.epoch += 1
        return order


def _batches(exp, loader):
    """The batches of a loader, on the network's device."""
    device, batch = _device_of(exp.net), None
    for batch in loader:  # which gives them on the CPU
        yield batch if device.type == 'cpu' else _to(batch, device)
    if batch is None:
        raise ValueError('the data gave no batch: it is empty, or shorter than one batch that may not be short')


# --- random numbers --------------------------------------------------------------------------------

def mix_seeds(*numbers):
    """A 63-bit seed made of several numbers, unlike that of any other combination."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0]) >> 1


def _stored_seed(exp, stored):
    """The seed of the checkpoint, or a new one from torch's generator, which stays as it was."""
    old = stored and (stored.get('Setting') or _setting_of_config(exp.config_path, {'Seed': 0}))
    with torch.random.fork_rng(devices=[]):
        new = int(torch.randint(2**31, ()))
    return _from_rank_0(old['Seed'] if old and 'Seed' in old else new)


@contextlib.contextmanager
def _randomness(seed, epoch, loader, rank=0):
    """All random numbers drawn inside follow from (seed, epoch, rank); those outside are unaffected."""
    seed = mix_seeds(seed, epoch, rank)
    batch_sampler = getattr(loader, 'batch_sampler', None)
    owners = [loader, batch_sampler, getattr(loader, 'sampler', None), getattr(batch_sampler, 'sampler', None)]
    samplers = [owner for owner in owners if hasattr(owner, 'set_epoch')]
    generators = {getattr(owner, 'generator', None) for owner in owners} - {None}
    before = random.getstate(), np.random.get_state(), [(g, g.get_state()) for g in generators]
    epochs = [(sampler, getattr(sampler, 'epoch', 0)) for sampler in samplers if epoch == 0]
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        for sampler in samplers:
            sampler.set_epoch(max(epoch - 1, 0))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            for generator, state in before[2]:
                generator.set_state(state)
            for sampler, old in epochs:
                sampler.set_epoch(old)


# --- processes -------------------------------------------------------------------------------------

_is_alone = False  # while a callback runs, on one process


@contextlib.contextmanager
def _alone():
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def _start_distributed():
    """Joins the processes that torchrun started, once."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(find_device())
        dist.init_process_group()
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def _world_size():
    return dist.get_world_size() if not _is_alone and dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _world_size() > 1 else 0


def _from_rank_0(value):
    """The value that rank 0 has: all processes must decide alike."""
    values = [value]
    if _world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _from_all(value):
    """What each process has, in the order of their ranks, on the CPU."""
    if _world_size() == 1:
        return [value]
    values = [None] * _world_size()
    dist.all_gather_object(values, _to(value, torch.device('cpu')))
    return values


def _average_gradients(optimizer):
    """The mean over all processes, in one exchange. Who has no gradient for a parameter that others
    have one for counts as zero; where nobody has one, there stays none."""
    if _world_size() == 1:
        return
    parameters = [p for p in _parameters(optimizer) if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = torch.tensor([p.grad is not None for p in parameters])
    flat = torch.cat([*(g.flatten() for g in grads), used.to(grads[0])])
    dist.all_reduce(flat)
    *grads, used = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for p, grad, times in zip(parameters, grads, used.tolist()):
        p.grad = (grad / _world_size()).view_as(p) if times else None


@contextlib.contextmanager
def _locked(folder):
    """Keeps other processes from training into the same folder, where the system has such locks."""
    if fcntl is None or _rank() > 0 or not folder:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        for left in range(60, -1, -1):  # workers of a process that was killed live some seconds longer
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise RuntimeError(f'{folder} is in use: another process trains there. Wait for it, stop it, '
                                       'or give another output_dir') from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def _autocast(exp):
    if exp.precision == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(_device_of(exp.net).type, dtype=getattr(torch, exp.precision))


def _progress_bar(loader):
    """Seen where somebody is watching: in a terminal or notebook, without CI and TQDM_DISABLE."""
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    watched = (hasattr(shell, 'kernel') or sys.stderr.isatty()) and _rank() == 0
    quiet = os.environ.get('CI') or os.environ.get('TQDM_DISABLE') or not watched
    try:
        total = len(loader)
    except TypeError:  # an iterable data set
        total = None
    return tqdm(total=total, leave=False, disable=bool(quiet))


def _say(text):
    if _rank() == 0:
        with tqdm.external_write_mode():  # above the progress bar
            print(text, flush=True)


# --- files -----------------------------------------------------------------------------------------

def _write(path, write):
    """Calls ``write(file)`` and puts the result at ``path`` at once: all of it, or nothing."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error
        while cause := cause.__context__:
            if isinstance(cause, KeyboardInterrupt):  # and an interrupt, too
                raise cause from None
        raise OSError(f'could not write {path} ({error}); what was saved before is untouched. '
                      'Check that the disk has room and the folder is writable.') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _write_state(state, path):
    if _rank() == 0:
        _write(path, lambda file: torch.save(state, file))
    if _world_size() > 1:
        dist.barrier()


def load_checkpoint(path, device='cpu', keys=KEYS):
    """A checkpoint of `Experiment` as a dict: ``Net``, ``Optimizer``, ``History`` and more. Nothing in
    it is executed: it is read with ``weights_only``. RuntimeError says what is wrong with the file."""
    advice = 'Restore it from a copy, or move it away to start from scratch.'
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RuntimeError(f'there is no checkpoint {path}') from None
    except Exception as error:  # of a damaged pickle it can be any
        what = 'holds objects that could run code' if 'GLOBAL' in str(error) else 'is damaged or no checkpoint'
        raise RuntimeError(f'{path} {what} and was not loaded. {advice} ({type(error).__name__}: {error})') from error
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise RuntimeError(f'{path} is a file of another program: it has {found}, not {", ".join(sorted(keys))}. {advice}')
    if checkpoint.get('Format', 1) > FORMAT:
        raise RuntimeError(f'{path} was written by a newer nntools (format {checkpoint["Format"]}, this one reads '
                           f'up to {FORMAT}): get the newer nntools.py')
    return checkpoint


def _read(exp, path):
    return load_checkpoint(path, keys=KEYS if type(exp).state_dict is Experiment.state_dict else set())


def _check_best(exp):
    """Puts best.pth.tar aside if its epoch is not `exp.best`: best_by was changed, or the history."""
    path = getattr(exp, 'best_path', '')
    if _rank() == 0 and os.path.isfile(path) and len(load_checkpoint(path, keys=set())['History']) != _best(exp)[0]:
        os.replace(path, f'{path}.old')
        _say(f'{path} is not that of the best epoch any more: it is now {path}.old')


# --- files of 2019, and those without settings -----------------------------------------------------

def _numpy_scalars():
    """What the unpickler needs for numpy's numbers and arrays, which old histories have."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')
            for function, name in ((scalar, 'scalar'), (array, '_reconstruct'))] + [
        (codecs.encode, '_codecs.encode'), np.dtype, np.ndarray,
        *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]


def _setting_of_config(path, given):
    """``config.txt`` as a dict like that of `_describe_settings`, with whose help its texts are read."""
    def value(text):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
        return _clean(text)

    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            pieces = re.split(r'^(\w+)\(', file.read(), flags=re.MULTILINE)[1:]
    except OSError:
        pieces = []
    setting = {}
    for name, text in zip(pieces[::2], pieces[1::2]):
        text = text.strip()[:-1].strip()
        if not isinstance(given.get(name), dict):
            setting[name] = value(text)
            continue
        head, *groups = text.split('Parameter Group')
        setting[name] = {'class': re.match(r'\w*', head)[0]}
        for k, group in enumerate(groups):
            options = {key: value(word) for key, word in re.findall(r'^\s+(\w+): (.*?)\s*$', group, flags=re.MULTILINE)}
            options['lr'] = options.pop('initial_lr', options.get('lr'))
            setting[name] |= {(f'group {k} ' if k else '') + key: v for key, v in options.items()}
    if 'BatchSize' not in setting and 'BatchSize' in given:
        _say(f'{path} can not be read: only the parameters of the network are compared')
    return setting
