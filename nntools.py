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
Ask for 40 epochs and it goes on from the 20th, exactly as if it had never stopped. Started by
``torchrun``, it trains on all its processes. The interface is that of the helper of the UCSD course
ECE 285 (C. Deledalle, 2019): its programs and checkpoints keep working.
"""
import ast
import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import math
import operator
import os
import random
import re
import sys
import time
import warnings
from abc import ABC, abstractmethod
from typing import Literal, get_args

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

FORMAT = 3  # of checkpoints; before, the settings were in config.txt alone
KEYS = {'Net', 'Optimizer', 'History'}  # of every checkpoint


# --- network and statistics ------------------------------------------------------------------------

class NeuralNetwork(nn.Module, ABC):
    """A module with a loss. Subclasses define ``forward(x)``, the prediction for a batch, and
    ``criterion(y, d)``, the loss of a prediction y when d was desired: a tensor with one element.

    `parameters()` and `named_parameters()` show only what requires a gradient, so that an optimizer
    built from them leaves frozen layers alone. `state_dict()` holds everything. (`AveragedModel` goes by
    `parameters()`: of a network to be frozen, give it ``torch.nn.ModuleList([net])``.)
    """

    @property
    def device(self):
        """The `torch.device` of the first parameter or buffer (the CPU if there is none)."""
        return _device_of(self)

    def named_parameters(self, *args, **kwargs):
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if p.requires_grad)

    def requires_grad_(self, requires_grad=True):
        """Freezes all parameters, or thaws all, those that are frozen too."""
        for _, parameter in super().named_parameters():
            parameter.requires_grad_(requires_grad)
        return self

    @abstractmethod
    def forward(self, x): ...

    @abstractmethod
    def criterion(self, y, d): ...


class readable:
    """A property that a subclass may cover with an attribute of its own, as those of 2019 do."""

    def __init__(self, get):
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance, owner=None):
        return self if instance is None else self.get(instance)


class StatsManager:
    """The statistics of one pass over a data set: the mean loss per sample, and ``metrics``.

    ``metrics`` is a dict of name to function of (y, d), which returns a value for each sample, (N,) or
    (N, ...), or one for the batch; they are averaged over the samples. For more, extend three methods:
    ``init`` begins a pass (with new lists; it doesn't clear those of the last one), ``accumulate`` adds a
    batch, ``summarize`` returns a dict. What they count stays readable after the pass. Under torchrun,
    in training, every process adds the batches of all.
    """
    _metrics = {}

    def __init__(self, metrics=None):
        self._metrics = dict(metrics or {})

    def __repr__(self):
        return ', '.join([type(self).__name__, *self._metrics])

    def __getattr__(self, name):
        raise AttributeError(f'{type(self).__name__} has no {name}; if it is counted in a pass, init must '
                             'set it, and call super().init()')

    def init(self):
        """Begins a pass."""
        self.running_loss, self.number_update = 0.0, 0  # as in 2019: counted in batches
        self._loss, self._samples, self._sums = 0.0, 0, dict.fromkeys(self._metrics, 0.0)

    def accumulate(self, loss, x=None, y=None, d=None):
        """Adds a batch: ``loss`` is its mean loss (a float), ``x`` the input (N, ...), ``y`` the
        prediction, ``d`` what was desired. Called without gradients."""
        if self.number_update == 0:
            StatsManager.init(self)  # an init of 2019 need not have called it
        samples = self.count_samples(x, d)
        self.running_loss += loss
        self.number_update += 1
        self._loss += loss * samples
        self._samples += samples
        for name, metric in self._metrics.items():
            self._sums[name] += torch.as_tensor(metric(y, d)).double().mean().item() * samples

    def summarize(self):
        """The mean loss per sample (a float); with metrics, a dict of ``'loss'`` and theirs."""
        if not vars(self).get('_samples'):  # counted by a subclass of 2019
            return self.running_loss / self.number_update
        means = {name: total / self._samples for name, total in self._sums.items()}
        return {'loss': self._loss / self._samples} | means if means else self._loss / self._samples

    @readable
    def number_samples(self):
        """How many samples this pass has counted: what a mean should rest on."""
        return self._samples

    def count_samples(self, x, d):
        """How many samples a batch has: the length of the tensor ``d`` or ``x``, of a `PackedSequence`,
        of the tensors in a dict, of a list of samples. To be overridden where TypeError asks for it, and where
        ``d`` has several rows a sample, such as the boxes in an image."""
        for part in (d, x):
            if isinstance(part, torch.Tensor):
                return len(part) if part.ndim else 1
            if isinstance(part, nn.utils.rnn.PackedSequence):
                return int(part.batch_sizes[0])
        sizes = {len(tensor) if tensor.ndim else 0 for tensor in _tensors([x, d])}
        if isinstance(x, (list, tuple)) and (len(sizes) > 1 or sizes <= {len(x)}):
            return len(x)
        if isinstance(x, dict) and len(sizes) == 1:
            return sizes.pop()
        raise TypeError(f'how many samples are in a batch with a {type(x).__name__} of {len(_tensors(x))} '
                        f'tensors? Override {type(self).__name__}.count_samples(x, d)')


# --- the experiment --------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False, repr=False)
class Experiment:
    """Trains a network and keeps, in one folder, all that is needed to go on later.

    If ``output_dir`` already holds a checkpoint of some epochs, it is loaded, after a check that it was made
    with the same settings; else a first one is written, at epoch 0. TypeError and ValueError say which argument
    is wrong, RuntimeError that the checkpoint can't be read, OSError that the folder can't be written.
    Meant to be overridden: `step`, `setting`, `state_dict`, `load_state_dict`; set what these use first.
    """
    net: nn.Module  # a `NeuralNetwork`, or any module with a method ``criterion(y, d)``
    train_set: td.Dataset  # of pairs (x, d); or a ready `DataLoader`, used as it is
    val_set: td.Dataset  # the same; None if nothing is to be evaluated
    optimizer: torch.optim.Optimizer  # of ``net``; not LBFGS, whose step needs a closure
    stats_manager: StatsManager
    output_dir: str = None  # the folder (default: ``experiment_`` and the time), shared by all machines
    batch_size: int = 16  # samples of a batch, in training over all processes
    perform_validation_during_training: bool = False  # `history` then has pairs (training, validation)
    _: dataclasses.KW_ONLY
    seed: int = None  # of batch order, dropout, noise; default: the checkpoint's, at first from torch's generator
    device: str = None  # 'cuda', 'mps', 'cpu' or 'auto': where ``net`` is moved; by default it stays
    scheduler: dataclasses.InitVar[object] = None  # stepped after each epoch, `ReduceLROnPlateau` with ``best_by``
    grad_clip: float = None  # upper bound on the norm of the gradient
    batches_per_step: int = 1  # batches whose mean gradient makes one step; at the end of an epoch, what is left
    precision: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of training; the last one with loss scaling
    num_workers: int = 0  # of the loaders
    collate_fn: object = None  # of the loaders
    drop_last: bool = True  # leave out the last batch of an epoch if it is short
    drop_last_in_evaluation: bool = False  # by default every sample is evaluated
    best_by: str = None  # a statistic ('PSNR'; in validation if there is one): best.pth.tar has its best epoch
    best_mode: Literal['min', 'max'] = 'min'
    save_every: int = 1  # epochs between two checkpoints; the last one of a run is always saved
    also_save: dict = None  # name to what has state_dict and load_state_dict: a second optimizer, averages
    allow: tuple = ()  # settings that may differ from the checkpoint's: ``('Optimizer', 'Scheduler')``

    # For subclasses of 2019, which need not call __init__. (_state: what a run goes back to; _stored: whether that is on disk.)
    train_loader = val_loader = _scheduler = _state = _written = _untrained = _training = None
    batch, _seconds, _stored, _running, _stopped, _checked = 0, (), True, False, False, False
    _scaler = torch.amp.GradScaler(enabled=False)

    def __post_init__(self, scheduler):
        self._scheduler, self.also_save, self.history = scheduler, dict(self.also_save or {}), []
        if scheduler is not None:
            self.scheduler = scheduler
        self.allow = (self.allow,) if isinstance(self.allow, str) else tuple(self.allow)
        _check_arguments(self)
        _join_processes()
        self.device = _device_of(self.net if self.device is None else self.net.to(find_device(self.device)))
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == 'float16')
        self.output_dir = os.path.expanduser(self.output_dir or f'experiment_{_from_all(time.time())[0]}')
        self.checkpoint_path, self.best_path, self.config_path = (
            os.path.join(self.output_dir, name) for name in ('checkpoint.pth.tar', 'best.pth.tar', 'config.txt'))
        try:
            _open(self)
        except AttributeError as error:
            if error.obj is not self:
                raise
            raise AttributeError(f'{error}. Set it before you call super().__init__(), which needs it') from error

    # --- the loop ----------------------------------------------------------------------------------

    def run(self, num_epochs, callback=None, *, after_batch=None, plot=None):
        """Trains until ``num_epochs`` epochs are done in all, those of earlier runs included.

        ``callback(exp)`` (``plot`` in the course) is called before training and after every epoch, in
        evaluation mode and on one process only: draw, log, or call `stop`; ``after_batch(exp, loss)``
        after every batch of training, whose number is ``exp.batch``. Both without gradients.

        Whatever interrupts it, the experiment goes back to the last epoch that was finished; a new ``run``
        continues from there. A loss or weights that are not finite raise FloatingPointError.
        """
        _check_whole('num_epochs', num_epochs, 0)
        callbacks = [function for function in (callback, plot) if function is not None]
        with _locked(self, num_epochs), torch.no_grad(), _modes_kept(self.net), _progress_bar(self.train_loader) as bar:
            try:
                _begin(self)
                _call(self, callbacks)
                while self.epoch < num_epochs and not self._stopped:
                    if not self._checked:  # the first epoch of this run
                        _prepare(self)
                    bar.set_description(f'Epoch {self.epoch + 1}/{num_epochs}', refresh=False)
                    self._run_epoch(bar, after_batch)
                    self._stored, self._state = False, _copied_state(self)
                    _save_new(self, self.epoch % self.save_every == 0 or self.epoch == num_epochs)
                    _say(f'Epoch {self.epoch}/{num_epochs}: {_line(self)} ({self._seconds[-1]:.2f} s)')
                    _call(self, callbacks)
                _save_new(self)
            except BaseException as error:
                _fall_back(self, error)
                raise
            finally:
                self._running = False
        self._state = None
        _say(f'{"Stopped after" if self.epoch < num_epochs else "Finish training for"} {self.epoch} epochs')

    def _run_epoch(self, bar, after_batch):
        start, gradients, step = time.time(), torch.enable_grad(), self.step
        if self.precision != 'float32':  # without a cache of cast weights, as a step can update twice
            step = torch.autocast(_device_of(self.net).type, getattr(torch, self.precision), cache_enabled=False)(step)
        bar.reset()
        self.stats_manager.init()
        self._waiting = {}
        with _one_pass(self, self.train_loader, self.epoch + 1):
            for number, batch in enumerate(_batches(self, self.train_loader), start=1):
                self.batch = number
                with gradients:
                    loss, x, y, d = step(batch)
                loss = float(loss)
                if not math.isfinite(loss):
                    raise _not_finite(self, f'the loss is {loss}', batch)
                for part in _from_all((loss, x, y, d)):
                    self.stats_manager.accumulate(*part)
                if not self._checked:
                    _check_statistics(self)
                if after_batch is not None:
                    after_batch(self, loss)
                if not bar.disable:
                    bar.set_postfix_str(f'loss {loss:.4g}', refresh=False)
                    bar.update()
            for optimizer in list(self._waiting):
                _step(self, optimizer)
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):  # spoilt by the last update
            raise _not_finite(self, 'weights are not finite', batch)
        for buffer in self.net.buffers() if _world_size() > 1 else ():
            dist.broadcast(buffer, 0)  # the batch-norm statistics of the first process count
        self.batch, summary = 0, _kept(self.stats_manager.summarize())
        entry = (summary, _kept(self.evaluate())) if self.perform_validation_during_training else summary
        self.history.append(_from_all(entry)[0])
        _check_names(self, self.history[-1])
        _step_scheduler(self, self.history[-1])
        self._seconds = [*self._seconds, *[math.nan] * self.epoch][:self.epoch - 1] + [time.time() - start]

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
            raise TypeError(f'a batch must be a pair (x, d), got a {type(batch).__name__} of '
                            f'{operator.length_hint(batch)}: override step')
        x, d = batch
        y = self.net(x)
        loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d

    def update(self, loss, optimizer=None):
        """One step of ``optimizer`` (default: the experiment's) down the gradient of ``loss``, averaged
        over the processes of torchrun, and over ``batches_per_step`` calls. In evaluation it does nothing."""
        if not (self.net.training if self._training is None else self._training):
            return
        if loss.numel() != 1:
            raise ValueError(f'the loss must be one number, got the shape {tuple(loss.shape)}: take its mean')
        optimizer, waiting = optimizer or self.optimizer, vars(self).setdefault('_waiting', {})
        if optimizer not in waiting:
            optimizer.zero_grad()
        waiting[optimizer] = waiting.get(optimizer, 0) + 1  # batches whose gradients it holds
        self._scaler.scale(loss / self.batches_per_step if self.batches_per_step > 1 else loss).backward()
        if waiting[optimizer] == self.batches_per_step:
            _step(self, optimizer)

    def stop(self):
        """Ends the run after the present epoch: ``if exp.epoch - exp.best[0] >= 10: exp.stop()``."""
        self._stopped = True

    # --- evaluation and history --------------------------------------------------------------------

    def evaluate(self, data=None):
        """The summary over all of ``data`` (data set or `DataLoader`; default: the validation set), in
        evaluation mode. Random numbers drawn meanwhile follow from the seed alone, and leave those of
        the training and of the caller as they were. Under torchrun each process evaluates it all."""
        loader = self.val_loader if data is None else _loader(self, data)
        if loader is None:
            raise ValueError('there is nothing to evaluate: val_set is None; pass a data set')
        stats = copy.copy(self.stats_manager) if self.batch else self.stats_manager  # in the middle of an epoch, or not
        stats.init()
        with _one_pass(self, loader):
            for batch in _batches(self, loader):
                loss, *rest = self.step(batch)
                stats.accumulate(float(loss), *rest)
        return stats.summarize()

    def predict(self, data, targets=False):
        """The network's outputs (of several, the first) for all of ``data``, in order: a tensor (N, ...) on
        the CPU; with ``targets`` a pair of it and what was desired. ``data`` is a tensor of inputs (N, ...),
        a data set, or a `DataLoader`, whose data set is gone through in order."""
        collate = None if isinstance(data, torch.Tensor) else getattr(data, 'collate_fn', self.collate_fn)
        data = data.dataset if isinstance(data, td.DataLoader) else data
        loader, outputs, desired = td.DataLoader(data, self.batch_size, collate_fn=collate), [], []
        with _one_pass(self, loader):
            for batch in _batches(self, loader):
                y, d = (self.net(batch), None) if isinstance(batch, torch.Tensor) else self.step(batch)[2:]
                outputs.append((y[0] if isinstance(y, (tuple, list)) else y).cpu())
                desired.append(d.cpu() if targets else None)
        return (torch.cat(outputs), torch.cat(desired)) if targets else torch.cat(outputs)

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
        """(epoch, value) at which the statistic ``best_by`` (by default the loss) was best, the first
        epoch being 1; (0, nan) before it. Values that are NaN don't count."""
        return _best(self)

    def table(self):
        """The history as a list of flat dicts, one an epoch: ``epoch``, the training statistics, the
        validation statistics with ``val_`` before their names, and ``seconds``; tensors as numbers and lists."""
        seconds = [*self._seconds, *[math.nan] * self.epoch]
        return [{'epoch': k + 1, **_row(self, self.history[k]), 'seconds': seconds[k]} for k in range(self.epoch)]

    def to_csv(self, path):
        """Writes `table` to a CSV file."""
        rows, text = Experiment.table(self), io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        _write(path, text.getvalue().encode())

    # --- checkpoints -------------------------------------------------------------------------------

    def state_dict(self):
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {name: item.state_dict() for name, item in _items(self).items()} | {
            'History': self.history, 'Seconds': list(self._seconds), 'Best': (self.best_by, self.best_mode),
            'Setting': _settings(self), 'Format': FORMAT}

    def load_state_dict(self, checkpoint):
        """Takes over a state that `state_dict` returned, or one of the original helper. ValueError: it
        doesn't fit what is here; everything is left as it was."""
        if missing := sorted({'Net', 'History', *(self.also_save or ())} - checkpoint.keys() - set(self.allow)):
            raise ValueError(f'the checkpoint has no {", ".join(missing)}; allow={tuple(missing)!r} begins with what is given')
        items = {name: item for name, item in _items(self).items() if name in checkpoint}
        before = copy.deepcopy({name: item.state_dict() for name, item in items.items()})
        history = [_kept(entry) for entry in checkpoint['History']]
        try:
            for name, item in items.items():
                item.load_state_dict(copy.deepcopy(checkpoint[name]))
        except Exception as error:
            for key, item in items.items():
                item.load_state_dict(before[key])
            raise ValueError(f'{self.output_dir} holds another {name}: {error}. Give all groups of '
                             'an optimizer from the start, and freeze and thaw by requires_grad_ '
                             'and by rates') from error
        self.history, self._seconds = history, list(checkpoint.get('Seconds', [math.nan] * len(history)))

    def save(self, path=None):
        """Writes a checkpoint (default: ``checkpoint.pth.tar``), all of it or nothing: of the present state,
        or in a run of the last finished epoch. Where ``config.txt``, for people, is missing, it is written too."""
        if _rank() == 0:
            if not os.path.isfile(self.config_path):
                _write(self.config_path, f'{self!r}\n'.encode())
            if path is None:
                _refuse_to_overwrite(self)
            _write(path or self.checkpoint_path, _as_bytes(self._state or self.state_dict()))
            if self.epoch < 2:  # lest a training ends with what can't be read
                _read(self, path or self.checkpoint_path)
        if path is None:
            self._stored, self._written = True, _written(self.checkpoint_path)

    def load(self, path=None):
        """Goes back to a checkpoint (default: the last), history and all. RuntimeError: it can't be read; ValueError:
        it doesn't fit."""
        _take(self, path or self.checkpoint_path)

    def load_best(self):
        """Takes the weights of the best epoch (see ``best_by``). History and optimizer stay. RuntimeError: the
        file is of another epoch, as when ``best_by`` was given later."""
        state = _read(self, self.best_path)
        if _best(self)[0] != (epoch := len(state['History'])) <= self.epoch:
            raise RuntimeError(f'{self.best_path} is of epoch {epoch}, but the best one is {_best(self)[0]}')
        _unwrapped(self.net).load_state_dict(state['Net'])

    def setting(self):
        """The settings, by name, that a checkpoint must share with the experiment that loads it.
        Subclasses may add their own. Stored and compared are plain values and texts (`repr`)."""
        train_set, val_set = getattr(self, 'train_set', None), getattr(self, 'val_set', None)
        size = train_set.batch_size if isinstance(train_set, td.DataLoader) else self.batch_size
        return {**(self.also_save or {}), 'Net': self.net, 'TrainSet': train_set, 'ValSet': val_set, 'Optimizer': self.optimizer,
                'StatsManager': self.stats_manager, 'BatchSize': size, 'TrainSetSize': _size(train_set),
                'PerformValidationDuringTraining': self.perform_validation_during_training,
                'ValSetSize': _size(val_set), 'Seed': self.seed, 'Precision': self.precision, 'Scheduler': self._scheduler,
                'GradClip': self.grad_clip, 'BatchesPerStep': self.batches_per_step, 'DropLast': self.drop_last}

    def __repr__(self):
        return ''.join(f'{name}({_text(value)})\n' for name, value in self.setting().items())


def _step(exp, optimizer):
    """The second half of `update`, when all gradients of a step are there."""
    number = exp._waiting.pop(optimizer)
    _average_gradients(optimizer)
    for p in _parameters(optimizer) if number < exp.batches_per_step else ():  # what is left at the end of an epoch
        if p.grad is not None:
            p.grad *= exp.batches_per_step / number
    if exp.grad_clip is not None:
        exp._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(_parameters(optimizer), exp.grad_clip)
    exp._scaler.step(optimizer)
    exp._scaler.update()


# --- state: what a run begins with, keeps, and goes back to ------------------------------------------

def _items(exp):
    """What has a state of its own, by its name in the checkpoint."""
    items = {'Net': _unwrapped(exp.net), 'Optimizer': exp.optimizer, 'Scheduler': exp._scheduler,
             'Scaler': exp._scaler if exp._scaler.is_enabled() else None, **(exp.also_save or {})}
    return {name: item for name, item in items.items() if item is not None}


def _open(exp):
    """Goes on from the checkpoint in the folder, if its settings agree, or writes the first one."""
    exp._written = _written(exp.checkpoint_path)
    stored = _read(exp, exp.checkpoint_path) if _from_all(exp._written)[0] else {}
    stored = stored if stored.get('History', stored) else {}  # of no epoch: what is given now counts
    old = (stored.get('Setting') or _settings_of_config(exp.config_path)) if stored else {}
    exp.seed = old.get('Seed', _new_seed()) if exp.seed is None else exp.seed
    if exp.best_by is None:
        exp.best_by, exp.best_mode = stored.get('Best', (None, exp.best_mode))
    exp.train_loader = _loader(exp, exp.train_set, training=True)
    exp.val_loader = None if exp.val_set is None else _loader(exp, exp.val_set)
    _follow_first(exp)
    differences = _compare_settings(exp, old, stored)
    if lines := [line for name in differences if name not in exp.allow for line in differences[name]]:
        raise ValueError('\n  '.join([f'{exp.output_dir} holds a checkpoint made with other settings:', *lines])
                         + '\nUse the stored settings, or another output_dir to start anew; '
                         f'allow={tuple(differences)!r} goes on with the new ones.')
    if stored:
        _take_with_changes(exp, stored, differences.keys() & _items(exp).keys(), old)
    if exp._written is None or differences:
        exp.save()


def _read(exp, path):
    return load_checkpoint(path, keys=KEYS if type(exp).state_dict is Experiment.state_dict else set())


def _take_with_changes(exp, state, changed, old):
    """Takes a state, but of what ``changed`` (names of items) what was given: of an optimizer of the same class
    its options, with the schedule as if from the first epoch, of anything else all."""
    changed = changed | {'Optimizer', 'Scheduler'} if changed & {'Optimizer', 'Scheduler'} else changed
    optimizers = {name: item for name, item in _items(exp).items() if name in changed and hasattr(item, 'param_groups')}
    given = [dict(group) for item in optimizers.values() for group in item.param_groups]
    of_use = {name for name, item in optimizers.items() if old.get(name) == type(item).__name__}
    exp.load_state_dict({name: value for name, value in state.items() if name in of_use or name not in changed})
    for group, options in zip((group for item in optimizers.values() for group in item.param_groups), given):
        group.update(options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch misses the steps of the optimizer
        for entry in exp.history if 'Scheduler' in changed else ():
            _step_scheduler(exp, entry)


def _take(exp, path):
    """Goes to a checkpoint. It is what the next run begins with if this is interrupted, and what the present one goes back to."""
    written, state, before = _written(exp.checkpoint_path), _read(exp, path), (exp._state, exp._stored)
    exp._state, exp._stored = state, True
    try:
        exp.load_state_dict(state)
    except ValueError:  # it doesn't fit, and nothing was changed
        exp._state, exp._stored = before
        raise
    exp._state, exp._written = _copied_state(exp) if exp._running else None, written


def _begin(exp):
    """A run starts from a whole state, and remembers it."""
    if exp._state is not None:  # a run or `load` was left, and interrupted on its way back
        _go_back(exp)
    exp.seed = _new_seed() if exp.seed is None else exp.seed
    _say(f'Start/Continue training from epoch {exp.epoch}')
    exp._running, exp._stopped, exp._checked, exp._training = True, False, False, None
    exp.net.eval()
    exp._state = _copied_state(exp)


def _prepare(exp):
    """What comes before the first epoch of a run, once it is sure to come: a run without one changes no file."""
    _say_what_is_not_trained(exp)
    if exp.perform_validation_during_training:
        _try_last_batch(exp)
    _save_new(exp)
    exp.save()  # the weights may have changed since: another experiment can share them
    _put_aside_stale_best(exp)


def _save_new(exp, now=True):
    """Saves the epoch just finished, if it is not on disk. The best goes first: if a kill comes between the
    two, the epoch is done again, and both are written again."""
    if not exp._stored:
        if exp.best_by is not None and _best(exp)[0] == exp.epoch:
            exp.save(exp.best_path)
        if now:
            exp.save()


def _go_back(exp):
    exp.batch = 0
    exp.load_state_dict(exp._state)
    exp._state = None


def _copied_state(exp):  # but for the entries of the history, which don't change
    return copy.deepcopy(exp.state_dict(), {id(exp.history): list(exp.history)})


def _call(exp, callbacks):
    """On one process; the others wait for it, and follow in what it has changed."""
    for callback in callbacks if _rank() == 0 else ():
        callback(exp)
    if callbacks:
        _follow_first(exp)
    exp._stopped = _from_all(exp._stopped)[0]


def _fall_back(exp, error):
    """Returns to the last epoch that was finished, and saves it if it is not on disk."""
    if exp._state is None:  # nothing has been done yet
        return
    _go_back(exp)
    memory = ''
    try:
        _save_new(exp)
    except (OSError, RuntimeError) as failure:  # the next run tries again
        memory = f', in memory only ({failure})'
    _say(f'{type(error).__name__}: back to epoch {exp.epoch}, the last one finished{memory}. Call run again to go on from there.')
    if _world_size() > 1:
        dist.destroy_process_group()  # so that the others don't wait for this one for ever


# --- checks: what is wrong, and what to do about it --------------------------------------------------

def _check_whole(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number, {least} or more, got {value!r}')


def _check_arguments(exp):
    """Raises TypeError or ValueError for what can't work, before anything is made or written."""
    needed = 'criterion' if type(exp).step is Experiment.step else 'state_dict'
    for name, value, attribute, what in (
            ('net', exp.net, 'named_modules', 'a torch.nn.Module'),
            ('net', exp.net, needed, 'a module with a method criterion(y, d), its loss'),
            ('optimizer', exp.optimizer, 'param_groups',
             'a torch.optim.Optimizer (the order is net, train_set, val_set, optimizer, stats_manager)'),
            ('stats_manager', exp.stats_manager, 'accumulate', 'a StatsManager'),
            *((f'also_save[{key!r}]', item, 'load_state_dict', 'something with state_dict')
              for key, item in exp.also_save.items())):
        if isinstance(value, type) or not hasattr(value, attribute):
            raise TypeError(f'{name} must be {what}, got {value if isinstance(value, type) else type(value).__name__}')
    for name in ('step', 'update'):  # a subclass of 2019 may have its own, of another kind
        try:
            inspect.signature(getattr(exp, name)).bind(None)
        except TypeError:
            raise TypeError(f'{type(exp).__name__}.{name} must take one argument, as that of nntools does: '
                            'see its docstring, or rename yours') from None
    for field in dataclasses.fields(Experiment):
        value, words = getattr(exp, field.name), get_args(field.type)
        if words and value not in words:
            raise ValueError(f'{field.name} must be one of {words}, got {value!r}')
        if field.type is int and value is not None:
            _check_whole(field.name, value, 0 if field.name in ('seed', 'num_workers') else 1)
            setattr(exp, field.name, int(value))
    _check_combinations(exp)


def _check_combinations(exp):
    """Raises ValueError for arguments that don't go together."""
    own, clip = [p for _, p in nn.Module.named_parameters(exp.net)], exp.grad_clip
    taken = exp.also_save.keys() & (KEYS | {'Scheduler', 'Scaler', 'Seconds', 'Best', 'Setting', 'Format'})
    for wrong, message in (
            (isinstance(exp.optimizer, torch.optim.LBFGS), 'LBFGS needs a closure at each step: take another optimizer'),
            (any(isinstance(p, nn.parameter.UninitializedParameter) for p in own),
             'net has lazy modules: send one batch through it first, and build the optimizer then'),
            (not set(map(id, own)) & set(map(id, _parameters(exp.optimizer))),
             'optimizer holds no parameter of net: build it from net.parameters()'),
            (getattr(exp._scheduler, 'optimizer', exp.optimizer) is not exp.optimizer,
             'scheduler belongs to another optimizer: build it from the one given here'),
            (isinstance(exp._scheduler, ReduceLROnPlateau) and exp._scheduler.mode != exp.best_mode,
             f'mode of the scheduler must be best_mode, {exp.best_mode!r}, got {getattr(exp._scheduler, "mode", None)!r}'),
            (clip is not None and not (isinstance(clip, (int, float)) and clip > 0),
             f'grad_clip must be a number, more than 0, got {clip!r}'),
            (exp.val_set is None and exp.perform_validation_during_training,
             'perform_validation_during_training needs a val_set, got None'),
            (taken, f'also_save{list(taken)} needs another name: the checkpoint has that one already')):
        if wrong:
            raise ValueError(message)


def _say_what_is_not_trained(exp):
    known = {id(p) for item in _items(exp).values() if hasattr(item, 'param_groups') for p in _parameters(item)}
    names = [name for name, p in nn.Module.named_parameters(exp.net) if p.requires_grad and id(p) not in known]
    if names and names != exp._untrained:
        _say(f'In no group of the optimizer, so that they will not be trained: {", ".join(names[:5])}' + ' ...' * (len(names) > 5))
    exp._untrained = names


def _try_last_batch(exp):
    """Evaluates the last batch, which may be short, so that what is wrong shows before the first epoch."""
    loader, data = exp.val_loader, exp.val_loader.dataset
    if (isinstance(data, td.IterableDataset) or not hasattr(data, '__len__') or not loader.batch_size or loader.worker_init_fn
            or type(exp).evaluate is not Experiment.evaluate):
        return
    short = 0 if loader.drop_last else len(data) % loader.batch_size
    last = td.Subset(data, range(max(len(data) - (short or loader.batch_size), 0), len(data)))
    loader = td.DataLoader(last, loader.batch_size, collate_fn=loader.collate_fn)
    try:
        with _one_pass(exp, loader):
            exp.step(next(_batches(exp, loader)))
    except RuntimeError as error:
        if not short:
            raise
        raise RuntimeError(f'the last batch of the evaluation has {short} samples, others {loader.batch_size}: {error}. '
                           'If the network can take no fewer, give drop_last_in_evaluation=True') from error


def _check_statistics(exp):
    """Refuses after the first batch what can't be kept, and a ``best_by`` that is no statistic."""
    exp._checked = True
    try:
        summary = copy.deepcopy(exp.stats_manager).summarize()  # which can end a pass
    except Exception:  # a lock that can't be copied, or statistics for which one batch is too little
        return
    summary, validates = _kept(summary), exp.perform_validation_during_training
    if not validates or type(exp).evaluate is Experiment.evaluate:  # another one can have other statistics
        _check_names(exp, (summary, summary) if validates else summary)


def _check_names(exp, entry):
    names = _row(exp, entry)
    if _column(exp) not in names and (exp.best_by is not None or isinstance(exp._scheduler, ReduceLROnPlateau)):
        close = difflib.get_close_matches(_column(exp), names, 1)
        raise ValueError(f'best_by: there is no statistic {exp.best_by or "loss"!r}, there is {", ".join(map(repr, names))}'
                         + (f'; did you mean {close[0]!r}?' if close else ''))


def _not_finite(exp, what, batch):
    finite = all(torch.isfinite(tensor).all() for tensor in _tensors(batch))
    hint = ('the data of that batch is finite: a lower learning rate or grad_clip may help' if finite else
            'the batch itself holds values that are not finite: mend the data')
    return FloatingPointError(f'{what} in epoch {exp.epoch + 1}, batch {exp.batch}; {hint}')


# --- settings: described, stored and compared --------------------------------------------------------

def _settings(exp):
    """What `setting` returns as a flat dict of numbers and texts: ``name`` for a whole, ``name: part`` for
    its parts. Each is described once, when it is given: rates change later, by schedule or by hand."""
    known, described = vars(exp).setdefault('_described', {}), {}
    for name, value in exp.setting().items():
        key = id(value), len(getattr(value, 'param_groups', ()))  # a group may have been added
        if known.get(name, (None,))[0] != key:
            known[name] = key, value, _describe(name, value)
        described |= known[name][2]
    return described | {'Source': _source(type(_unwrapped(exp.net))), 'Torch': str(torch.__version__)}


def _describe(name, value):
    value, parts = _unwrapped(value), {}
    if isinstance(value, nn.Module):
        parts = {layer: f'{type(m).__name__}({m.extra_repr()})' for layer, m in value.named_modules() if layer}
    elif hasattr(value, 'param_groups'):
        for k, group in enumerate(value.param_groups):
            group = group | {'lr': group.get('initial_lr', group.get('lr'))}
            parts |= {option + f' of group {k}' * (k > 0): group[option] for option in ('lr', *value.defaults)}
    elif hasattr(value, 'optimizer') and hasattr(value, 'state_dict'):  # a scheduler: what stays as it is in training
        changing, state = ('last_epoch', 'best', 'num_bad_epochs', 'cooldown_counter', 'T_cur', 'T_i'), value.state_dict()
        nested = {f'{k}: {key}': v for k, part in enumerate(state.get('_schedulers', ())) for key, v in part.items()}
        parts = {key: v for key, v in (state | nested).items() if not key.split(' ')[-1].startswith('_')
                 and key.split(' ')[-1] not in changing}
    elif isinstance(value, td.DataLoader):
        parts = {'data': value.dataset, 'drop_last': value.drop_last}
    else:
        return {name: _plain(value)}
    return {name: type(value).__name__} | {f'{name}: {part}': _plain(v) for part, v in parts.items()}


def _plain(value):
    """A number as it is, anything else as text, without addresses and folders, which differ from run to run."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (torch.Tensor, np.generic)) and value.ndim == 0:
        return value.item()
    text = value if isinstance(value, str) else _text(value)
    text = re.sub(r' at 0x\w+', '', re.sub(r'<\S*?(\w+) object at 0x\w+>', r'<\1 object>', text))
    return ' '.join(re.sub(r'(?<![\w.])(?:[A-Za-z]:|\.{1,2}|~)?[\\/]+(?:[^\\/\s\'"(),]+[\\/]+)*', '', text).split())


def _text(value):
    """An object as it describes itself; of samples in a list only how many they are."""
    samples = isinstance(value, (list, tuple, dict)) and (len(value) > 100 or _tensors(value))
    if samples or isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return f'{type(value).__name__} of {len(value)}'
    return type(value).__name__ if hasattr(value, 'optimizer') else repr(value)


@functools.cache
def _source(kind):
    """The source of the methods of a network's own classes; '' where Python has none, as for a console."""
    with contextlib.suppress(Exception):  # and there are many ways in which the file can be another one
        return '\n'.join(inspect.getsource(part) for base in kind.__mro__ for part in vars(base).values()
                         if inspect.isfunction(part) and part.__module__.split('.')[0] not in ('torch', __name__))
    return ''


def _compare_settings(exp, old, stored):
    """What differs from the settings of a checkpoint: a dict of the setting's name to lines."""
    given, differences = _settings(exp), {}
    given |= dict.fromkeys(stored.keys() & old.keys() - given.keys(), 'nothing')  # of what it saved too
    names = [key for key in given if ': ' not in key]
    if unknown := sorted(set(exp.allow) - set(names)):
        raise ValueError(f'allow has {unknown}, but the settings are {", ".join(names)}')
    if old.get('Source', given['Source']) != given['Source']:
        _say(f'The source of {type(exp.net).__name__} has changed since the checkpoint in {exp.output_dir}')
    other_torch = old.get('Torch') != given['Torch']  # which prints layers differently, and has other options
    validates = given['PerformValidationDuringTraining'] and old.get('PerformValidationDuringTraining', True)
    for key in dict.fromkeys([*given, *old]):
        (name, _, part), a, b = key.partition(': '), old.get(key, 'nothing'), given.get(key, 'nothing')
        known = name in old and name in given and name not in ('Source', 'Torch')
        if a == b or not known or name.startswith('ValSet') and not validates:
            continue
        if part and (old[name] != given[name] or other_torch and (name in ('Net', *(exp.also_save or ())) or 'nothing' in (a, b))):
            continue  # of another class, all parts differ
        differences.setdefault(name, []).append(f'{name}: {part}{" " * bool(part)}stored {a}, given {b}')
    return differences


# --- history: from entries to rows -------------------------------------------------------------------

def _kept(value):
    """A summary as the history keeps it: tensors and arrays as tensors on the CPU, plain numbers and texts."""
    def kept(leaf):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            return torch.as_tensor(leaf).detach().cpu().clone().as_subclass(torch.Tensor)
        leaf = leaf.item() if isinstance(leaf, np.generic) else leaf
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise TypeError(f'summarize must return numbers, got a {type(leaf).__name__}')
    return _map(kept, value._asdict() if hasattr(value, '_asdict') else value)


def _flat(summary):
    """A summary as a dict of plain numbers and lists; of an odd one, an empty dict."""
    if isinstance(summary, dict):
        values = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in summary.items()}
        return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in values.items()}
    return {'loss': float(summary)} if isinstance(summary, (int, float)) or getattr(summary, 'ndim', 1) == 0 else {}


def _row(exp, entry):
    """An entry of the history, (training, validation) or training alone, as a flat dict."""
    pair = isinstance(entry, tuple) and len(entry) == 2 and (
        exp.perform_validation_during_training or all(isinstance(part, dict) for part in entry))
    train, val = entry if pair else (entry, {})
    return _flat(train) | {f'val_{name}': value for name, value in _flat(val).items()}


def _column(exp):
    """What the statistic that counts is called in a row."""
    name = exp.best_by or 'loss'
    return f'val_{name}' if exp.perform_validation_during_training and not name.startswith('val_') else name


def _score(exp, entry):
    value = _row(exp, entry).get(_column(exp))
    return float(value) if isinstance(value, (int, float)) else math.nan


def _best(exp):
    scores = {k: score for k, entry in enumerate(exp.history, 1) if not math.isnan(score := _score(exp, entry))}
    better = max if exp.best_mode == 'max' else min
    return better(scores.items(), key=lambda pair: pair[1], default=(0, math.nan))


def _line(exp):
    return ', '.join(f'{name} {value:.4g}' for name, value in _row(exp, exp.history[-1]).items()
                     if isinstance(value, (int, float)))


def _step_scheduler(exp, entry):
    if exp._scheduler is not None:
        exp._scheduler.step(*[_score(exp, entry)] * isinstance(exp._scheduler, ReduceLROnPlateau))


# --- devices and data --------------------------------------------------------------------------------

def find_device(name='auto'):
    """The device of that name, or the best one of this machine: CUDA (under torchrun, this process's
    own), MPS or CPU. Raises ValueError if it is not here."""
    if name == 'auto' and torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    for kind in ('mps', 'cpu') if name == 'auto' else (name,):
        try:
            return torch.zeros(1, device=kind).device
        except (RuntimeError, AssertionError, TypeError) as error:  # also of a virtual machine's MPS without memory
            wrong = error
    raise ValueError(f"device must be 'cuda', 'mps', 'cpu' or 'auto', got {name!r}, and {name!r} is not available "
                     "here; use device='auto' for the best one that is") from wrong


def _device_of(net):
    tensors = itertools.chain(nn.Module.named_parameters(net), net.named_buffers())
    return next((tensor.device for _, tensor in tensors), torch.device('cpu'))


def _unwrapped(net):
    """The network inside of `torch.compile`: both write and read the same checkpoints."""
    return next(net.children()) if type(net).__name__ == 'OptimizedModule' else net


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def _map(change, value):
    """``change`` applied to all that is in lists, tuples and dicts."""
    if isinstance(value, dict):
        return {key: _map(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, 'to'):  # as a PackedSequence has
        parts = [_map(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    return change(value)


def _to(batch, device):
    options = {'non_blocking': True} if device.type == 'cuda' else {}
    return _map(lambda part: part.to(device, **options) if hasattr(part, 'to') else part, batch)


def _tensors(batch):
    found = []
    _map(found.append, batch)
    return [part for part in found if isinstance(part, torch.Tensor)]


class _Share(td.RandomSampler):
    """Samples in random order, each at most once; of each batch, every process has its share."""

    def __iter__(self):
        return itertools.islice(super().__iter__(), _rank(), len(self) * _world_size(), _world_size())

    def __len__(self):
        return len(self.data_source) // _world_size()


def _loader(exp, data, training=False):
    """The loader of a data set. In training each process has its share of every batch."""
    if isinstance(data, td.DataLoader):
        if training and data.persistent_workers:
            warnings.warn('persistent_workers go on with random numbers of their own: '
                          'a resumed run does not repeat what they draw', stacklevel=5)
        return data
    name, size, world = 'train_set' if training else 'the data set to evaluate', exp.batch_size, _world_size()
    drop_last = exp.drop_last if training else exp.drop_last_in_evaluation
    if not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
        raise TypeError(f'{name} must be a data set with a length, or in a DataLoader of your own, got {type(data).__name__}')
    if training and size % world:
        raise ValueError(f'batch_size must be a multiple of the number of processes, {world}, got {size}')
    if len(data) < (size if drop_last else 1):
        raise ValueError(f'{name} has {len(data)} samples, too few for one batch of {size}: '
                         'lower batch_size, or keep the last short batch')
    sampler = _Share(data, generator=torch.Generator().manual_seed(mix_seeds(exp.seed))) if training else None
    return td.DataLoader(data, size // world if training else size, sampler=sampler, num_workers=exp.num_workers,
                         collate_fn=exp.collate_fn, drop_last=drop_last, pin_memory=_device_of(exp.net).type == 'cuda')


def _size(data):
    return operator.length_hint(data.dataset if isinstance(data, td.DataLoader) else data) or None


def _batches(exp, loader):
    device, batch = _device_of(exp.net), None
    for batch in loader:
        yield batch if device.type == 'cpu' else _to(batch, device)  # where loaders give them
    if batch is None:
        raise ValueError('the data gave no batch: it is empty, or shorter than one batch that may not be short')


# --- random numbers ----------------------------------------------------------------------------------

def mix_seeds(*numbers):
    """A 63-bit seed made of several numbers. (Zeros at the end don't count.)"""
    return int(np.random.SeedSequence([int(n) % 2**64 for n in numbers]).generate_state(1, np.uint64)[0]) >> 1


def _new_seed():
    """Drawn from torch's generator, which stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return _from_all(int(torch.randint(2**31, ())))[0]


@contextlib.contextmanager
def _modes_kept(net):
    """Leaves each layer in the mode, training or evaluation, that it had before."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _one_pass(exp, loader, epoch=0):
    """One pass over a loader: of training, or, in epoch 0, of evaluation. Random numbers drawn inside follow
    from (seed, epoch, rank), the order of the samples from (seed, epoch); what is outside, the mode of
    the network too, is unaffected."""
    seeds, training = (exp.seed or 0, epoch), exp._training
    mixed = mix_seeds(*seeds, _rank() if epoch else 0)
    owners = [loader, getattr(loader, 'sampler', None), getattr(loader, 'batch_sampler', None)]
    owners.append(getattr(owners[-1], 'sampler', None))
    generators = [(g, g.get_state()) for g in {getattr(owner, 'generator', None) for owner in owners} - {None}]
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.no_grad(), _modes_kept(exp.net), torch.random.fork_rng(devices):
        torch.manual_seed(mixed)
        np.random.seed(mixed % 2**32)
        random.seed(mixed)
        for generator, _ in generators:
            generator.manual_seed(mix_seeds(*seeds))
        for sampler in owners:
            hasattr(sampler, 'set_epoch') and sampler.set_epoch(epoch)
        exp.net.train(epoch > 0)
        exp._training = epoch > 0
        try:
            yield
        finally:
            exp._training = training
            random.setstate(before[0])
            np.random.set_state(before[1])
            for generator, state in generators:
                generator.set_state(state)


# --- processes ---------------------------------------------------------------------------------------

def _join_processes():
    """Where torchrun has started this process, it becomes one of its group."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        torch.cuda.is_available() and torch.cuda.set_device(find_device())
        dist.init_process_group()
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # its threads can crash the exit


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _world_size() > 1 else 0


def _from_all(value):
    """What each process has, in the order of their ranks, on the CPU."""
    values = [value] * _world_size()
    if len(values) > 1:
        dist.all_gather_object(values, _to(value, torch.device('cpu')))
    return values


def _follow_first(exp):
    """All take over the state of the first process, and what is frozen in it."""
    if _world_size() > 1:
        own = [p for _, p in nn.Module.named_parameters(exp.net)]
        state = {name: item.state_dict() for name, item in _items(exp).items()}, [p.requires_grad for p in own]
        states, trained = _from_all(None if _rank() else state)[0]
        for name, item in _items(exp).items():
            item.load_state_dict(states[name])
        for p, wanted in zip(own, trained):
            p.requires_grad_(wanted)


def _average_gradients(optimizer):
    """The mean over the processes; who has no gradient, as its batch did not use a layer, counts as zero.
    Where nobody has one, there stays none, and the optimizer leaves that layer alone."""
    if _world_size() == 1:
        return
    parameters = [p for p in _parameters(optimizer) if p.requires_grad]
    for p, *has_gradient in zip(parameters, *_from_all([p.grad is not None for p in parameters])):
        if any(has_gradient):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= _world_size()


@contextlib.contextmanager
def _locked(exp, num_epochs):
    """Keeps a second process from training into the same folder, where the system has such locks."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        raise RuntimeError('the processes of torchrun have parted after an error: start the program again')
    if fcntl is None or _rank() > 0 or exp.epoch >= num_epochs:
        yield
        return
    if not os.path.isfile(exp.config_path):
        exp.save()
    with open(exp.config_path, 'a') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f'{exp.output_dir} is in use: another process trains there. Wait for it, '
                               'stop it, or give another output_dir') from None
        except OSError:  # a file system without locks
            pass
        yield


def _progress_bar(loader):
    """To be seen where somebody is watching: in a terminal or notebook, without CI and TQDM_DISABLE."""
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    watched = (hasattr(shell, 'kernel') or sys.stderr.isatty()) and _rank() == 0
    quiet = not watched or bool(os.environ.get('CI') or os.environ.get('TQDM_DISABLE'))
    return tqdm(total=operator.length_hint(loader) or None, leave=False, disable=quiet)


def _say(text):
    if _rank() == 0:
        with tqdm.external_write_mode():  # above the progress bar
            print(text, flush=True)


# --- files -------------------------------------------------------------------------------------------

def _write(path, data):
    """Puts bytes into a file: all of them at once, or nothing."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'could not write {path} ({error}); what was saved before is untouched. '
                      'Check that the disk has room and the folder is writable.') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _written(path):
    """Which file it is, by number and time, as each checkpoint is a new one; None if there is none."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino, os.stat(path).st_mtime_ns


def _refuse_to_overwrite(exp):
    """What another experiment has trained in this folder since this one wrote or read the checkpoint."""
    if exp._written and _written(exp.checkpoint_path) not in (exp._written, None):
        if (epoch := len(_read(exp, exp.checkpoint_path).get('History', ()))) > exp.epoch:
            raise RuntimeError(f'{exp.checkpoint_path} is now of epoch {epoch}, trained by another experiment; this one is at '
                               f'{exp.epoch}: call load() to go on from there, or give another output_dir')


def _as_bytes(state):
    """What `torch.save` writes. Into a file it would write on after an interrupt, and could abort the process."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:  # which torch can make of an interrupt
        interrupted = isinstance(error.__context__, KeyboardInterrupt)
        raise (error.__context__ if interrupted else error) from None
    return buffer.getbuffer()


def load_checkpoint(path, device='cpu', keys=KEYS):
    """A checkpoint of `Experiment` as a dict: ``Net``, ``Optimizer``, ``History`` and more. Nothing in it
    is executed: it is read with ``weights_only``. RuntimeError says what is wrong with the file."""
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


def _put_aside_stale_best(exp):
    """best.pth.tar is of another epoch than `exp.best` if best_by was changed, or the history."""
    path = getattr(exp, 'best_path', '')
    if _rank() == 0 and os.path.isfile(path) and len(_read(exp, path)['History']) != _best(exp)[0]:
        os.replace(path, f'{path}.old')
        _say(f'{path} is not of the best epoch any more: it is now {path}.old')


# --- files of 2019, and those without settings -------------------------------------------------------

def _numpy_scalars():
    """What the unpickler needs for numpy's numbers and arrays, which old histories have."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')
            for function, name in ((scalar, 'scalar'), (array, '_reconstruct'))] + [
        np.dtype, np.ndarray, *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]


def _settings_of_config(path):
    """``config.txt`` as a flat dict like that of `_settings`; of objects only the class."""
    def plain(text):
        with contextlib.suppress(ValueError, SyntaxError):
            return _plain(ast.literal_eval(text))
        return _plain(text)

    settings, pieces = {}, []
    with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8', errors='replace') as file:
        pieces = re.split(r'^(\w+)\(', file.read(), flags=re.MULTILINE)[1:]
    for name, text in zip(pieces[::2], (piece.strip()[:-1].strip() for piece in pieces[1::2])):
        head, *groups = text.split('Parameter Group')
        called = re.match(r'(\w+) ?\(', head) if name not in ('TrainSet', 'ValSet') else None  # a network or optimizer
        settings[name] = called[1] if called else plain(text)
        for k, group in enumerate(groups):
            options = {key: plain(word) for key, word in re.findall(r'^\s+(\w+): (.*?)\s*$', group, flags=re.MULTILINE)}
            options['lr'] = options.pop('initial_lr', options.get('lr'))
            settings |= {f'{name}: {option}' + f' of group {k}' * (k > 0): value for option, value in options.items()}
    if 'BatchSize' not in settings:
        _say(f'{path} can not be read: only the parameters of the network are compared')
    return settings
