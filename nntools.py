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
import inspect
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

FORMAT = 3  # of checkpoints; in older ones, the settings are in config.txt
KEYS = {'Net', 'Optimizer', 'History'}  # of every checkpoint
STATE = KEYS | {'Seconds', 'Best', 'Setting', 'Format', 'Scheduler', 'Scaler'}  # of those written here
PRECISIONS = ('float32', 'bfloat16', 'float16')


# --- network and statistics ------------------------------------------------------------------------

class readable:
    """A property that a subclass may cover with an attribute of its own, as those of 2019 do."""

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
        """As in `torch.nn.Module`: freezes all parameters, or thaws all, the frozen ones too."""
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

    ``metrics`` is a dict of name to function of (y, d), which returns a value for each sample, (N,) or
    (N, ...), or one for the batch; they are averaged over the samples. For more, extend three methods:
    ``init`` begins a pass, ``accumulate`` adds a batch, ``summarize`` returns a dict. What they count
    stays readable after the pass. Under torchrun every process adds the batches of all.
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
        of the tensors in a dict, of a list of samples. To be overridden where TypeError asks for it."""
        for part in (d, x):
            if isinstance(part, nn.utils.rnn.PackedSequence):
                return int(part.batch_sizes[0])
            if isinstance(part, torch.Tensor):
                return len(part) if part.ndim else 1
        sizes = {len(tensor) if tensor.ndim else 0 for tensor in _tensors([x, d])}
        if isinstance(x, (list, tuple)) and (len(sizes) > 1 or sizes <= {len(x)}):
            return len(x)
        if isinstance(x, dict) and len(sizes) == 1:
            return sizes.pop()
        raise TypeError(f'how many samples are in a batch with a {type(x).__name__} of {len(_tensors(x))} tensors? '
                        f'Override {type(self).__name__}.count_samples(x, d)')


# --- the experiment --------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False, repr=False)
class Experiment:
    """Trains a network and keeps, in one folder, all that is needed to go on later.

    If ``output_dir`` already holds a checkpoint, it is loaded, after a check that it was made with the
    same settings; else a first one is written, at epoch 0. TypeError and ValueError say which argument
    is wrong, RuntimeError that the checkpoint can't be read, OSError that the folder can't be written;
    what was saved is left alone by all of them.

    Meant to be overridden: `step`, `setting`, `state_dict`, `load_state_dict`. Set what these use before
    you call ``super().__init__``.
    """
    net: nn.Module  # a `NeuralNetwork`, or any module with a method ``criterion(y, d)``; not lazy
    train_set: td.Dataset  # of pairs (x, d); or a ready `DataLoader`, used as it is
    val_set: td.Dataset  # the same; None if nothing is to be evaluated
    optimizer: torch.optim.Optimizer  # of ``net``; not LBFGS, whose step needs a closure
    stats_manager: StatsManager
    output_dir: str = None  # the folder (default: ``experiment_`` and the time), shared by all machines
    batch_size: int = 16  # samples of a batch, over all processes
    perform_validation_during_training: bool = False  # `history` then has pairs (training, validation)
    _: dataclasses.KW_ONLY
    seed: int = None  # of batch order, dropout, noise; default: the checkpoint's, at first drawn from torch's generator
    device: str = None  # 'cuda', 'mps', 'cpu' or 'auto': where ``net`` is moved; by default it stays
    scheduler: dataclasses.InitVar[object] = None  # stepped after each epoch, `ReduceLROnPlateau` with ``best_by``
    grad_clip: float = None  # upper bound on the norm of the gradient
    batches_per_step: int = 1  # batches whose mean gradient makes one step; at the end of an epoch, what is left
    precision: str = 'float32'  # of training; or 'bfloat16', or 'float16', with loss scaling
    num_workers: int = 0  # of the loaders
    collate_fn: object = None  # of the loaders
    drop_last: bool = True  # leave out the last batch of an epoch if it is short
    drop_last_in_evaluation: bool = False  # by default every sample is evaluated
    best_by: str = None  # a statistic ('PSNR'; in validation if there is one): best.pth.tar has its best epoch
    best_mode: str = 'min'  # or 'max'
    save_every: int = 1  # epochs between two checkpoints; the last one of a run is always saved
    also_save: dict = None  # name to what has state_dict and load_state_dict: a second optimizer, averages
    allow: tuple = ()  # settings that may differ from the checkpoint's: ``('Optimizer', 'Scheduler')``

    # For subclasses of 2019, which need not call __init__.
    train_loader = val_loader = _scheduler = _scaler = _saved = _untrained = None
    _state = None  # what a run that was left goes back to
    batch, _seconds, _stopped = 0, (), False

    def __post_init__(self, scheduler):
        self._scheduler, self.also_save, self.history = scheduler, dict(self.also_save or {}), []
        self.allow = (self.allow,) if isinstance(self.allow, str) else tuple(self.allow)
        _check_arguments(self)
        _start_distributed()
        if self.device is not None:
            device = find_device(self.device)
            self.net.to(device)
            if 'device' in vars(self.net):
                self.net.device = device
        self.device = _device_of(self.net)
        if self.precision == 'float16' and self.device.type in ('cuda', 'cpu'):
            self._scaler = torch.amp.GradScaler(self.device.type)
        self.output_dir = os.path.expanduser(self.output_dir or f'experiment_{_from_rank_0(time.time())}')
        self.checkpoint_path, self.best_path, self.config_path = (
            os.path.join(self.output_dir, name) for name in ('checkpoint.pth.tar', 'best.pth.tar', 'config.txt'))
        stored = self._read(self.checkpoint_path) if _from_rank_0(os.path.isfile(self.checkpoint_path)) else {}
        self.seed = _stored_seed(self, stored) if self.seed is None else int(self.seed)
        if self.best_by is None:
            self.best_by, self.best_mode = stored.get('Best', (None, self.best_mode))
        self.train_loader = _loader(self, self.train_set, training=True)
        self.val_loader = None if self.val_set is None else _loader(self, self.val_set)
        for tensor in self.net.state_dict().values() if _world_size() > 1 else ():
            dist.broadcast(tensor, 0)  # all start from the weights of the first process
        try:
            _open(self, stored)
        except AttributeError as error:
            raise AttributeError(f'{error}. Set it before you call super().__init__(), which needs it') from error

    # --- the loop ----------------------------------------------------------------------------------

    def run(self, num_epochs, callback=None, *, after_batch=None, plot=None):
        """Trains until ``num_epochs`` epochs are done in all, those of earlier runs included.

        ``callback(exp)`` (``plot`` in the course) is called before training and after every epoch, in
        evaluation mode and on one process only: draw, log, or call `stop`; ``after_batch(exp, loss)``
        after every batch of training, whose number is ``exp.batch``. Both without gradients.

        Whatever interrupts it, the experiment goes back to the last epoch that was finished, and the
        exception goes on to the caller: a new ``run`` continues from there. A loss or weights that are
        not finite raise FloatingPointError, which names epoch and batch.
        """
        _check_whole('num_epochs', num_epochs, 0)
        if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
            raise RuntimeError('the processes of torchrun have parted after an error: start the program again')
        callback, mode = callback or plot, self.net.training
        lock = _locked(self.checkpoint_path) if self.epoch < num_epochs else contextlib.nullcontext()
        with lock, torch.no_grad(), _progress_bar(self.train_loader) as bar:
            try:
                self._begin(num_epochs)
                self._call(callback)
                while self.epoch < num_epochs and not self._stopped:
                    bar.set_description(f'Epoch {self.epoch + 1}/{num_epochs}', refresh=False)
                    self._run_epoch(bar, after_batch)
                    self._keep(last=self.epoch == num_epochs)
                    _say(f'Epoch {self.epoch}/{num_epochs}: {_line(self)} ({self._seconds[-1]:.2f} s)')
                    self._call(callback)
                self._keep(last=True)
            except BaseException as error:
                self._fall_back(error)
                raise
            finally:
                self.net.train(mode)
        self._state = None
        _say(f'{"Stopped after" if self.epoch < num_epochs else "Finish training for"} {self.epoch} epochs')

    def _run_epoch(self, bar, after_batch):
        """Trains for one epoch, validates, and adds a line to the history."""
        start = time.time()
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
                if number == 1 and not self.perform_validation_during_training:
                    _check_summary(self)
                if after_batch is not None:
                    after_batch(self, loss)
                if not bar.disable:
                    bar.set_postfix_str(f'loss {loss:.4g}', refresh=False)
                    bar.update()
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):  # spoilt by the last update
            raise _not_finite(self, 'weights are not finite', batch)
        self.batch = 0
        self.net.eval()
        for buffer in self.net.buffers() if _world_size() > 1 else ():
            dist.broadcast(buffer, 0)  # the batch-norm statistics of the first process count
        summary = _kept(self.stats_manager.summarize())
        self.history.append((summary, _kept(self.evaluate())) if self.perform_validation_during_training else summary)
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
        over the processes of torchrun, and over ``batches_per_step`` batches (with one optimizer)."""
        if not self.net.training:
            return
        if loss.numel() != 1:
            raise ValueError(f'the loss must be one number, got the shape {tuple(loss.shape)}: take its mean')
        optimizer, scaler, number, batches = optimizer or self.optimizer, self._scaler, 1, 1
        if self.batches_per_step > 1:
            number = (self.batch - 1) % self.batches_per_step + 1  # of this batch among those of the step
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

    def stop(self):
        """Ends the run after the present epoch: ``if exp.epoch - exp.best[0] >= 10: exp.stop()``."""
        self._stopped = True

    # --- what surrounds an epoch -------------------------------------------------------------------

    def _begin(self, num_epochs):
        """Starts from a whole state, and remembers it."""
        if self._state is not None:  # a run was left, and interrupted again on its way back
            self._take(self._state)
        self.seed = _stored_seed(self, {}) if self.seed is None else self.seed
        _say(f'Start/Continue training from epoch {self.epoch}')
        _say_what_is_not_trained(self)
        self._stopped, self.batch = False, 0
        self.net.eval()
        if self.epoch < num_epochs:
            if self.perform_validation_during_training:
                _try_evaluation(self)
            self.save()  # the weights may have changed since: another experiment can share them
        self._state = self._copied_state()

    def _keep(self, last):
        """Remembers the epoch just finished, and saves it. The best goes first: if a kill comes between
        the two, the epoch is done again, and both are written again."""
        if self._saved == self.epoch:
            return
        self._state = self._copied_state()
        if self.best_by is not None and _best(self)[0] == self.epoch:
            _save(self._state, self.best_path)
        if last or self.epoch % self.save_every == 0:
            self.save()

    def _call(self, callback):
        """On one process; the others wait for it, and hear whether it called `stop`."""
        if callback is not None and _rank() == 0:
            callback(self)
        self._stopped = _from_rank_0(self._stopped)

    def _fall_back(self, error):
        """Returns to the last epoch that was finished, and saves it if it is not on disk."""
        if self._state is None:  # nothing has been done yet
            return
        self.batch, saved = 0, 'saved'
        self._take(self._state)
        try:
            if self._saved != self.epoch and _world_size() == 1:
                self.save()
        except OSError as full:
            saved = f'in memory only ({full})'
        _say(f'{type(error).__name__}: back to epoch {self.epoch}, the last one finished, which is {saved}. '
             'Call run again to go on from there.')
        if _world_size() > 1:
            dist.destroy_process_group()  # so that the others don't wait for this one for ever

    def _take(self, state):
        """Goes to a state; if that is interrupted, the next `run` does it again."""
        before, self._state = self._state, state
        try:
            self.load_state_dict(state)
        except Exception:  # it does not fit, and nothing was changed
            self._state = before
            raise
        self._state = None

    def _copied_state(self):
        state = self.state_dict()  # but for the entries of the history, which don't change
        return copy.deepcopy(state, {id(entries): list(entries) for entries in [state.get('History')]})

    # --- evaluation --------------------------------------------------------------------------------

    def evaluate(self, data=None):
        """The summary over all of ``data`` (data set or `DataLoader`; default: the validation set), in
        evaluation mode. Random numbers drawn meanwhile follow from the seed alone, and leave those of
        the training and of the caller as they were. Under torchrun each process evaluates it all."""
        loader = self.val_loader if data is None else _loader(self, data)
        if loader is None:
            raise ValueError('there is nothing to evaluate: val_set is None; pass a data set')
        stats = copy.copy(self.stats_manager) if self.batch else self.stats_manager  # called by a step, or not
        stats.init()
        with _evaluating(self, loader):
            for batch in _batches(self, loader):
                loss, *rest = self.step(batch)
                stats.accumulate(float(loss), *rest)
        return stats.summarize()

    def predict(self, data, targets=False):
        """The network's outputs for all of ``data``, in order: a tensor (N, ...) on the CPU; with
        ``targets`` a pair of it and what was desired. ``data`` is a tensor of inputs (N, ...), a data
        set, or a `DataLoader`, whose data set is gone through in order. Of outputs in a tuple the first
        is taken. Under torchrun each process computes them all."""
        collate = None if isinstance(data, torch.Tensor) else getattr(data, 'collate_fn', self.collate_fn)
        data = getattr(data, 'dataset', data) if isinstance(data, td.DataLoader) else data
        loader, outputs, desired = td.DataLoader(data, self.batch_size, collate_fn=collate), [], []
        with _evaluating(self, loader):
            for batch in _batches(self, loader):
                y, d = (self.net(batch), None) if isinstance(batch, torch.Tensor) else self.step(batch)[2:]
                outputs.append((y[0] if isinstance(y, (tuple, list)) else y).cpu())
                desired.append(d.cpu() if targets else None)
        return (torch.cat(outputs), torch.cat(desired)) if targets else torch.cat(outputs)

    # --- history -----------------------------------------------------------------------------------

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
        validation statistics with ``val_`` before their names, and ``seconds``; numbers and lists."""
        seconds = itertools.chain(self._seconds, itertools.repeat(math.nan))
        return [{'epoch': k, **_row(self, entry), 'seconds': next(seconds)}
                for k, entry in enumerate(self.history, start=1)]

    def to_csv(self, path):
        """Writes `table` to a CSV file."""
        rows = Experiment.table(self)
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)

    # --- checkpoints -------------------------------------------------------------------------------

    def state_dict(self):
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {'Net': _unwrapped(self.net).state_dict(), 'Optimizer': self.optimizer.state_dict(),
                'History': self.history, 'Seconds': list(self._seconds), 'Best': (self.best_by, self.best_mode),
                'Setting': _describe_settings(self), 'Format': FORMAT,
                **{name: item.state_dict() for name, item in _also(self).items()}}

    def load_state_dict(self, checkpoint):
        """Takes over a state that `state_dict` returned, or one of the original helper. Raises
        ValueError, and leaves everything as it was, if it doesn't fit network or optimizer."""
        _check_fit(self, checkpoint)
        history = [_kept(entry) for entry in checkpoint['History']]
        items = {name: item for name, item in _also(self).items() if name in checkpoint}
        before = copy.deepcopy({name: item.state_dict() for name, item in items.items()})
        try:
            _load(items, checkpoint)
        except Exception:
            _load(items, before)
            raise
        _unwrapped(self.net).load_state_dict(checkpoint['Net'])
        if 'Optimizer' in checkpoint:
            self.optimizer.load_state_dict(copy.deepcopy(checkpoint['Optimizer']))
        self.history = history
        self._seconds = list(checkpoint.get('Seconds', [math.nan] * self.epoch))

    def save(self, path=None):
        """Writes a checkpoint (default: ``checkpoint.pth.tar``), and beside the first one ``config.txt``,
        for people. The file that was there stays whole until the new one is complete. During a run, and
        after one that was left, what is written is the last epoch that was finished."""
        if _rank() == 0 and not os.path.isfile(self.config_path):
            _write(self.config_path, lambda file: file.write(f'{self!r}\n'.encode()))
        _save(self._state or self.state_dict(), path or self.checkpoint_path)
        self._saved = self.epoch if path is None else self._saved

    def load(self, path=None):
        """Goes back to a checkpoint (default: the last), history and all.
        Raises RuntimeError if the file can't be read, and says why and what to do."""
        self._take(self._read(path or self.checkpoint_path))
        self._saved = None
        _put_aside_stale_best(self)

    def load_best(self):
        """Takes the weights of the best epoch, those of ``best.pth.tar``. History and optimizer stay.
        Raises RuntimeError if there are none: give ``best_by`` before training."""
        _unwrapped(self.net).load_state_dict(self._read(self.best_path)['Net'])

    def _read(self, path):
        return load_checkpoint(path, keys=KEYS if type(self).state_dict is Experiment.state_dict else set())

    def setting(self):
        """The settings, by name, that a checkpoint must share with the experiment that loads it.
        Subclasses may add their own. Stored and compared are plain values and texts (`repr`)."""
        sets = {name: getattr(self, attribute, None) for name, attribute in (('TrainSet', 'train_set'), ('ValSet', 'val_set'))}
        data = {name: part.dataset if isinstance(part, td.DataLoader) else part for name, part in sets.items()}
        sizes = {f'{name}Size': operator.length_hint(part) for name, part in data.items() if operator.length_hint(part)}
        return {'Net': self.net, **sets, 'Optimizer': self.optimizer, 'StatsManager': self.stats_manager,
                'BatchSize': sets['TrainSet'].batch_size if data['TrainSet'] is not sets['TrainSet'] else self.batch_size,
                'PerformValidationDuringTraining': self.perform_validation_during_training, **sizes,
                'Seed': self.seed, 'Precision': self.precision, 'GradClip': self.grad_clip and float(self.grad_clip),
                'BatchesPerStep': self.batches_per_step, 'DropLast': self.drop_last, 'Scheduler': self._scheduler}

    def __repr__(self):
        return ''.join(f'{name}({_text(value)})\n' for name, value in self.setting().items())


# --- checks: what is wrong, and what to do about it --------------------------------------------------

def _check_whole(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number, {least} or more, got {value!r}')


def _check_arguments(exp):
    """Raises TypeError or ValueError for what can't work, before anything is made or written."""
    own_step = type(exp).step is not Experiment.step
    for name, value, attributes, what in (
            ('net', exp.net, ['state_dict', 'named_modules'], 'a torch.nn.Module'),
            ('net', exp.net, [] if own_step else ['criterion'], 'a module with a method criterion(y, d), its loss'),
            ('optimizer', exp.optimizer, ['step', 'zero_grad', 'param_groups'],
             'a torch.optim.Optimizer (the order is net, train_set, val_set, optimizer, stats_manager)'),
            ('stats_manager', exp.stats_manager, ['init', 'accumulate', 'summarize'], 'a StatsManager'),
            *((f'also_save[{key!r}]', item, ['state_dict', 'load_state_dict'], 'something with state_dict')
              for key, item in exp.also_save.items())):
        if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
            raise TypeError(f'{name} must be {what}, got {value if isinstance(value, type) else type(value).__name__}')
    for name in ('step', 'update'):  # a subclass of 2019 may have its own, of another kind
        try:
            inspect.signature(getattr(exp, name)).bind(None)
        except TypeError:
            raise TypeError(f'{type(exp).__name__}.{name} must take one argument, as that of nntools does: '
                            'see its docstring, or rename yours') from None
    for name, least in (('batch_size', 1), ('batches_per_step', 1), ('num_workers', 0), ('save_every', 1), ('seed', 0)):
        if getattr(exp, name) is not None:
            _check_whole(name, getattr(exp, name), least)
    if isinstance(exp.optimizer, torch.optim.LBFGS):
        raise TypeError('LBFGS needs a closure at each step, which update does not give: take another optimizer')
    own, trained = (set(map(id, parameters)) for parameters in (nn.Module.parameters(exp.net), _parameters(exp.optimizer)))
    scheduler, mode = exp._scheduler, exp.best_mode
    for wrong, message in (
            (any(isinstance(p, nn.parameter.UninitializedParameter) for p in nn.Module.parameters(exp.net)),
             'net has lazy modules: send one batch through it first, and build the optimizer then'),
            (not own & trained, 'optimizer holds no parameter of net: build it from net.parameters()'),
            (getattr(scheduler, 'optimizer', exp.optimizer) is not exp.optimizer,
             'scheduler belongs to another optimizer: build it from the one given here'),
            (mode not in ('min', 'max'), f"best_mode must be one of ('min', 'max'), got {mode!r}"),
            (isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode,
             f'scheduler has mode={getattr(scheduler, "mode", None)!r}, but best_mode is {mode!r}: make them alike'),
            (exp.precision not in PRECISIONS, f'precision must be one of {PRECISIONS}, got {exp.precision!r}'),
            (exp.grad_clip is not None and not (isinstance(exp.grad_clip, (int, float)) and exp.grad_clip > 0),
             f'grad_clip must be a number, more than 0, got {exp.grad_clip!r}'),
            (exp.val_set is None and exp.perform_validation_during_training,
             'perform_validation_during_training needs a val_set, got None'),
            (exp.also_save.keys() & STATE, f'also_save has {sorted(exp.also_save)}: take other names than {sorted(STATE)}')):
        if wrong:
            raise ValueError(message)


def _say_what_is_not_trained(exp):
    optimizers = [exp.optimizer, *(item for item in (exp.also_save or {}).values() if hasattr(item, 'param_groups'))]
    known = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
    names = [name for name, p in nn.Module.named_parameters(exp.net) if p.requires_grad and id(p) not in known]
    if names and names != exp._untrained:
        _say(f'In no group of the optimizer, so that they will not be trained: {", ".join(names[:5])}'
             + ' ...' * (len(names) > 5))
    exp._untrained = names


def _try_evaluation(exp):
    """Evaluates the last batch, which may be short, so that what is wrong shows before the first epoch."""
    loader, stats = exp.val_loader, exp.stats_manager
    if isinstance(loader.dataset, td.IterableDataset) or not loader.batch_size:
        return
    size, n = loader.batch_size, len(loader.dataset)
    left = 0 if loader.drop_last else n % size
    part = td.DataLoader(td.Subset(loader.dataset, range(n - (left or min(n, size)), n)), size, collate_fn=loader.collate_fn)
    stats.init()
    with _evaluating(exp, part):
        for batch in _batches(exp, part):
            try:
                loss, *rest = exp.step(batch)
            except RuntimeError as error:
                if not left:
                    raise
                raise RuntimeError(f'the last batch of the evaluation has {left} samples instead of {size}: {error}. If '
                                   'the network can take no fewer, give drop_last_in_evaluation=True') from error
            stats.accumulate(float(loss), *rest)
    _check_summary(exp, 'val_')


def _check_summary(exp, prefix=''):
    """Refuses after one batch what can't be kept, and a ``best_by`` that is no statistic."""
    try:
        summary = exp.stats_manager.summarize()
    except (ValueError, ArithmeticError):  # there are statistics for which one batch is too little
        return
    names = [prefix + name for name in _flat(_kept(summary))]
    needed = exp.best_by is not None or isinstance(exp._scheduler, ReduceLROnPlateau)
    if needed and _column(exp) not in names:
        close = difflib.get_close_matches(_column(exp), names, 1)
        raise ValueError(f'best_by: there is no statistic {exp.best_by or "loss"!r}, there is {", ".join(map(repr, names))}'
                         + (f'; did you mean {close[0]!r}?' if close else ''))


def _not_finite(exp, what, batch):
    finite = all(torch.isfinite(tensor).all() for tensor in _tensors(batch))
    hint = ('the data of that batch is finite: a lower learning rate or grad_clip may help' if finite else
            'the batch itself holds values that are not finite: mend the data')
    return FloatingPointError(f'{what} in epoch {exp.epoch + 1}, batch {exp.batch}; {hint}')


# --- settings: described, stored and compared ------------------------------------------------------

def _describe(value):
    """A setting as a dict of numbers and texts: ``''`` for the whole, and the names of its parts."""
    value, parts = _unwrapped(value), {}
    if isinstance(value, nn.Module):
        parts = {name: f'{type(m).__name__}({m.extra_repr()})' for name, m in value.named_modules() if name}
    elif hasattr(value, 'param_groups'):
        for k, group in enumerate(value.param_groups):
            group = group | {'lr': group.get('initial_lr', group.get('lr'))}
            parts |= {f'{name}{f" of group {k}" if k else ""}': group[name] for name in ('lr', *value.defaults)}
    elif hasattr(value, 'optimizer') and hasattr(value, 'state_dict'):  # a scheduler: what does not change in training
        parts = {name: v for name, v in value.state_dict().items() if name == '_schedulers' or name[0] != '_' and name not in (
            'last_epoch', 'best', 'num_bad_epochs', 'cooldown_counter', 'T_cur', 'T_i')}
    elif isinstance(value, td.DataLoader):
        parts = {'data': value.dataset, 'drop_last': value.drop_last}
    elif isinstance(value, (bool, int, float, str, type(None))):
        return {'': value}
    else:
        return {'': _clean(_text(value))}
    plain = {name: _describe(part) for name, part in parts.items()}
    return {'': type(value).__name__} | {name: p[''] if len(p) == 1 else _clean(str(p)) for name, p in plain.items()}


def _text(value):
    """An object as it describes itself; of samples in a list only how many they are."""
    samples = isinstance(value, (list, tuple, dict)) and (len(value) > 100 or _tensors(value))
    if samples or isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return f'{type(value).__name__} of {len(value)}'
    return type(value).__name__ if hasattr(value, 'optimizer') else repr(value)


def _clean(text):
    """Without memory addresses, modules of classes and folders, which differ from run to run."""
    text = re.sub(r' at 0x\w+', '', re.sub(r'<\S*?(\w+) object at 0x\w+>', r'<\1 object>', text))
    return ' '.join(re.sub(r'(?<![\w.])(?:[A-Za-z]:|\.{1,2})?[\\/]+(?:[^\\/\s\'"(),]+[\\/]+)*', '', text).split())


def _describe_settings(exp):
    """What `setting` returns, described as it was when first given: rates change by schedule or by hand."""
    given, settings = vars(exp).setdefault('_given', {}), exp.setting()
    for name, value in settings.items():
        groups = len(getattr(value, 'param_groups', ()))  # one may have been added
        if name not in given or given[name][0] is not value or given[name][1] != groups:
            given[name] = value, groups, _describe(value)
    try:
        kinds = [c for c in type(_unwrapped(exp.net)).__mro__ if c.__module__.split('.')[0] not in ('torch', 'builtins', 'abc')]
        source = '\n'.join(map(inspect.getsource, kinds))
    except (OSError, TypeError):  # made in a console
        source = ''
    return {name: given[name][2] for name in settings} | {'Source': {'': source}, 'Torch': {'': str(torch.__version__)}}


def _compare_settings(exp, stored):
    """What differs between a checkpoint and an experiment: a dict of the setting's name to lines."""
    given, differences = _describe_settings(exp), {}
    old = stored.get('Setting') or _setting_of_config(exp.config_path)
    same_torch = old.get('Torch') == given['Torch']
    if unknown := set(exp.allow) - given.keys():
        raise ValueError(f'allow has {sorted(unknown)}, but the settings are {", ".join(given)}')
    if old.get('Source', given['Source']) != given['Source']:
        _say(f'The source of {type(exp.net).__name__} has changed since the checkpoint in {exp.output_dir}')
    if lines := _weight_differences(exp, stored):
        differences['Weights'] = lines
    validates = 'PerformValidationDuringTraining'
    unused = () if given[validates][''] and old.get(validates, {'': True})[''] else ('ValSet', 'ValSetSize')
    for name in [name for name in given if name in old and name not in ('Source', 'Torch', *unused)]:
        a, b = old[name], given[name]
        parts = [''] if a[''] != b[''] else a | b if same_torch else [] if name == 'Net' else a.keys() & b.keys()
        if lines := [f'{name}: {part}{" " * bool(part)}stored {a.get(part, "nothing")}, given {b.get(part, "nothing")}'
                     for part in parts if a.get(part) != b.get(part)]:
            differences[name] = lines
    return differences


def _weight_differences(exp, stored):
    """In which parameters and buffers two networks differ: a line for each of the first ten."""
    a, b = ({name: tuple(getattr(value, 'shape', ())) for name, value in net.items()
             if not name.endswith('num_batches_tracked')}
            for net in (stored.get('Net', {}), _unwrapped(exp.net).state_dict() if 'Net' in stored else {}))
    return [f'{name}: stored {a.get(name, "nothing")}, given {b.get(name, "nothing")}'
            for name in a | b if a.get(name) != b.get(name)][:10]


def _open(exp, stored):
    """Goes on from the checkpoint that was found, if its settings agree, or writes the first one. Where
    optimizer and schedule may differ the new ones count, the schedule as if from the first epoch."""
    differences = _compare_settings(exp, stored) if stored else {}
    epochs = stored.get('History', [0]) if stored else []  # without any, there is nothing to lose
    if conflicts := [name for name in differences if name not in exp.allow] if epochs else []:
        advice = '' if 'Weights' in conflicts else f'; allow={tuple(differences)!r} goes on with the new ones'
        raise ValueError('\n  '.join([f'{exp.output_dir} holds a checkpoint made with other settings:',
                                      *(line for name in conflicts for line in differences[name])])
                         + f'\nUse the stored settings, or another output_dir to start anew{advice}.')
    if epochs or stored and not differences:
        groups = [{k: v for k, v in group.items() if k != 'params'} for group in exp.optimizer.param_groups]
        changed = {'Optimizer', 'Scheduler'} & differences.keys()
        if changed:  # the state of another kind of optimizer is of no use
            kind = stored.get('Setting', {}).get('Optimizer', {}).get('')
            stored = {name: value for name, value in stored.items() if name != 'Scheduler' and (
                name != 'Optimizer' or kind == type(exp.optimizer).__name__)}
        exp._take(stored)
        for group, given in zip(exp.optimizer.param_groups, groups) if changed else ():
            group.update(given)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch misses the steps of the optimizer
            for entry in exp.history if changed else ():
                _step_scheduler(exp, entry)
    if not epochs or differences:
        exp.save()
        if _rank() == 0:
            exp._read(exp.checkpoint_path)  # lest a training ends with what can't be read
    exp._saved = exp.epoch
    _put_aside_stale_best(exp)


def _check_fit(exp, checkpoint):
    """Raises ValueError if a checkpoint is not of these networks and optimizers."""
    if missing := sorted({'Net', 'History', *(exp.also_save or ())} - checkpoint.keys()):
        raise ValueError(f'the checkpoint has no {", ".join(missing)}')
    if lines := _weight_differences(exp, checkpoint):
        raise ValueError('\n  '.join(['the checkpoint is that of another network:', *lines]))
    stored, given = ([len(group['params']) for group in optimizer['param_groups']]
                     for optimizer in (checkpoint.get('Optimizer', exp.optimizer.state_dict()), exp.optimizer.state_dict()))
    if stored != given:
        raise ValueError(f'{os.path.dirname(exp.checkpoint_path)}: the stored optimizer has groups of {stored} parameters, '
                         f'the one given of {given}. Give all groups from the start, and freeze and thaw by requires_grad_ '
                         'and the rates of the groups (README, "Freeze, train, thaw, train on")')


# --- history: from entries to rows -----------------------------------------------------------------

def _kept(value):
    """A summary as the history keeps it: tensors and arrays as tensors on the CPU, plain numbers and texts."""
    def kept(leaf):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            return torch.as_tensor(leaf).detach().cpu().clone()
        leaf = leaf.item() if isinstance(leaf, np.generic) else leaf
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise TypeError(f'summarize must return numbers, got a {type(leaf).__name__}')
    return _map(kept, value)


def _flat(summary):
    """A summary as a dict of plain numbers and lists; of an odd one, an empty dict."""
    if isinstance(summary, dict):
        return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in summary.items()}
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
    scores = [(_score(exp, entry), k) for k, entry in enumerate(exp.history, start=1)]
    better = max if exp.best_mode == 'max' else min
    return better((pair for pair in scores if not math.isnan(pair[0])), key=lambda pair: pair[0], default=(math.nan, 0))[::-1]


def _line(exp):
    return ', '.join(f'{name} {value:.4g}' for name, value in _row(exp, exp.history[-1]).items()
                     if isinstance(value, (int, float)))


def _also(exp):
    """What the checkpoint keeps beside network and optimizer."""
    more = {'Scheduler': exp._scheduler, 'Scaler': exp._scaler}
    return {name: item for name, item in more.items() if item is not None} | (exp.also_save or {})


def _load(items, states):
    for name, item in items.items():
        item.load_state_dict(copy.deepcopy(states[name]))


def _step_scheduler(exp, entry):
    if exp._scheduler is not None:
        exp._scheduler.step(*[_score(exp, entry)] * isinstance(exp._scheduler, ReduceLROnPlateau))


# --- devices and data ------------------------------------------------------------------------------

def find_device(name='auto'):
    """The device of that name, or the best one of this machine: CUDA (under torchrun, this process's
    own), MPS or CPU. Raises ValueError if it is not here."""
    if name == 'auto':
        if torch.cuda.is_available():
            return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be 'cuda', 'mps', 'cpu' or 'auto', got {name!r}, and {name!r} is not available "
                         "here; use device='auto' for the best one that is") from error


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


def _map(change, value):
    """``change`` applied to all that is in lists, tuples and dicts."""
    if isinstance(value, dict):
        return {key: _map(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, 'to'):
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


def _loader(exp, data, training=False):
    """The loader of a data set. In training each process has its share of every batch."""
    if isinstance(data, td.DataLoader):
        if training and data.persistent_workers:
            warnings.warn('persistent_workers go on with random numbers of their own: '
                          'a resumed run does not repeat what they draw', stacklevel=4)
        return data
    name, world, size = 'train_set' if training else 'the data set to evaluate', _world_size(), exp.batch_size
    drop_last = exp.drop_last if training else exp.drop_last_in_evaluation
    if not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
        raise TypeError(f'{name} must be a data set with a length, or in a DataLoader of your own, got {type(data).__name__}')
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

    def __init__(self, dataset, *args, **options):
        super().__init__(dataset, *args, **options)
        self.length = len(dataset)

    def __iter__(self):
        if len(self.dataset) != self.length:
            raise RuntimeError(f'the data set had {self.length} samples and has {len(self.dataset)} now: '
                               'make a new Experiment of it')
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


@contextlib.contextmanager
def _evaluating(exp, loader):
    mode = exp.net.training
    exp.net.eval()
    try:
        with torch.no_grad(), _randomness(exp.seed or 0, 0, loader):
            yield
    finally:
        exp.net.train(mode)


def _autocast(exp):
    if exp.precision == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(_device_of(exp.net).type, dtype=getattr(torch, exp.precision))


# --- random numbers --------------------------------------------------------------------------------

def mix_seeds(*numbers):
    """A 63-bit seed made of several numbers, unlike that of any other combination."""
    return int(np.random.SeedSequence([int(n) % 2**64 for n in numbers]).generate_state(1, np.uint64)[0]) >> 1


def _stored_seed(exp, stored):
    """The seed of the checkpoint, or a new one from torch's generator, which stays as it was."""
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**31, ()))
    if stored:
        seed = (stored.get('Setting') or _setting_of_config(exp.config_path)).get('Seed', {'': seed})['']
    return int(_from_rank_0(seed))


@contextlib.contextmanager
def _randomness(seed, epoch, loader, rank=0):
    """All random numbers drawn inside follow from (seed, epoch, rank); those outside are unaffected."""
    seed, batch_sampler = mix_seeds(seed, epoch, rank), getattr(loader, 'batch_sampler', None)
    owners = [loader, batch_sampler, getattr(loader, 'sampler', None), getattr(batch_sampler, 'sampler', None)]
    samplers = [(owner, getattr(owner, 'epoch', 0)) for owner in owners if hasattr(owner, 'set_epoch')]
    generators = [(g, g.get_state()) for g in {getattr(owner, 'generator', None) for owner in owners} - {None}]
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator, _ in generators:
            generator.manual_seed(seed)
        for sampler, _ in samplers:
            sampler.set_epoch(max(epoch - 1, 0))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            for generator, state in generators:
                generator.set_state(state)
            for sampler, old in samplers:
                sampler.set_epoch(old)


# --- processes -------------------------------------------------------------------------------------

def _start_distributed():
    """Joins the processes that torchrun started, once."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(find_device())
        dist.init_process_group()
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _world_size() > 1 else 0


def _from_rank_0(value):
    """The value that the first process has: all must decide alike."""
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
def _locked(path):
    """Keeps a second process from training into the same folder, where the system has such locks."""
    if fcntl is None or _rank() > 0:
        yield
        return
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(f'{path}.lock', 'a') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f'{os.path.dirname(path)} is in use: another process trains there. Wait for it, '
                               'stop it, or give another output_dir') from None
        try:
            yield
        finally:
            os.remove(file.name)


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
    except (OSError, RuntimeError) as error:  # what torch makes of a full disk, and of an interrupt
        cause = error
        while cause := cause.__context__:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise OSError(f'could not write {path} ({error}); what was saved before is untouched. '
                      'Check that the disk has room and the folder is writable.') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _save(state, path):
    if _rank() == 0:
        _write(path, lambda file: torch.save(state, file))


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
    """best.pth.tar must be that of `exp.best`: it is not if best_by was changed, or the history."""
    path = getattr(exp, 'best_path', '')
    if _rank() == 0 and os.path.isfile(path) and len(exp._read(path)['History']) != _best(exp)[0]:
        os.replace(path, f'{path}.old')
        _say(f'{path} is not of the best epoch any more: it is now {path}.old')


# --- files of 2019, and those without settings -----------------------------------------------------

def _numpy_scalars():
    """What the unpickler needs for numpy's numbers and arrays, which old histories have."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')
            for function, name in ((scalar, 'scalar'), (array, '_reconstruct'))] + [
        (codecs.encode, '_codecs.encode'), np.dtype, np.ndarray,
        *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]


def _setting_of_config(path):
    """``config.txt`` as a dict like that of `_describe_settings`; of objects only the class."""
    def plain(text):
        with contextlib.suppress(ValueError, SyntaxError):
            return _describe(ast.literal_eval(text))['']
        return _clean(text)

    setting = {}
    if os.path.isfile(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            pieces = re.split(r'^(\w+)\(', file.read(), flags=re.MULTILINE)[1:]
        for name, text in zip(pieces[::2], (piece.strip()[:-1].strip() for piece in pieces[1::2])):
            head, *groups = text.split('Parameter Group')
            called = re.match(r'(\w+) ?\(', head)  # a network, or an optimizer
            setting[name] = {'': called[1] if called and name not in ('TrainSet', 'ValSet') else plain(text)}
            for k, group in enumerate(groups):
                options = {key: plain(word) for key, word in re.findall(r'^\s+(\w+): (.*?)\s*$', group, flags=re.MULTILINE)}
                options['lr'] = options.pop('initial_lr', options.get('lr'))
                setting[name] |= {f'{key}{f" of group {k}" if k else ""}': value for key, value in options.items()}
    if 'BatchSize' not in setting:
        _say(f'{path} can not be read: only the parameters of the network are compared')
    return setting
