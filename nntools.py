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

Four concepts make it up. A **pass** goes through a data set, to train or to evaluate, with random
numbers of its own. The **state after the last finished epoch** is what every error and interrupt
goes back to. **Settings** are stored with it, and compared before a training goes on. **Gradients
wait** in their optimizer until there are enough batches for a step.
"""
import atexit
import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from abc import ABC, abstractmethod
from types import MappingProxyType

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.data as td
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['NeuralNetwork', 'StatsManager', 'Experiment', 'find_device', 'load_checkpoint',
           'mix_seeds']

FORMAT = 3  # of checkpoints; before, the settings were in config.txt alone
KEYS = {'Net', 'Optimizer', 'History'}  # of every checkpoint
TAKEN = KEYS | {'Scheduler', 'Scaler', 'Seconds', 'Best', 'Setting', 'Circumstances', 'Format'}
EVALUATION = 0  # in the place of an epoch's number: a pass that does not train


# --- networks and statistics ---------------------------------------------------------------------

class NeuralNetwork(nn.Module, ABC):
    """A module with a loss. Subclasses define ``forward(x)``, the prediction for a batch, and
    ``criterion(y, d)``, the loss of a prediction y when d was desired: a tensor with one element.

    `parameters()` and `named_parameters()` show only what requires a gradient, so that an optimizer
    built from them leaves frozen layers alone. `state_dict()` holds everything. (`AveragedModel`
    goes by `parameters()`: of a network to be frozen, give it ``torch.nn.ModuleList([net])``.)
    """

    @property
    def device(self):
        """The `torch.device` of the first parameter or buffer (the CPU if there is none)."""
        return _device_of(self)

    def named_parameters(self, *args, **kwargs):
        named = super().named_parameters(*args, **kwargs)
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def requires_grad_(self, requires_grad=True):
        """Freezes all parameters, or thaws all, those that are frozen too."""
        for _, parameter in super().named_parameters():
            parameter.requires_grad_(requires_grad)
        return self

    @abstractmethod
    def forward(self, x): ...

    @abstractmethod
    def criterion(self, y, d): ...


class StatsManager:
    """The statistics of one pass over a data set: the mean loss per sample, and ``metrics``.

    ``metrics`` is a dict of name to function of (y, d), which returns a value for each sample, (N,)
    or (N, ...), or one for the batch; they are averaged over the samples. For more, extend three
    methods: ``init`` begins a pass (with new lists; it doesn't clear those of the last one),
    ``accumulate`` adds a batch, ``summarize`` returns a dict. What they count stays readable after
    the pass, as do ``number_samples`` and ``number_update``, the samples and batches that were
    counted. Under torchrun, in training, every process adds the batches of all.
    """
    _metrics = {}

    def __init__(self, metrics=None):
        self._metrics = dict(metrics or {})

    def __repr__(self):
        return ', '.join([type(self).__name__, *self._metrics])

    def __getattr__(self, name):  # called for what is not there
        if name == 'number_samples':  # no property: subclasses of 2019 count by this name
            return self._samples
        raise AttributeError(f'{type(self).__name__} has no {name}; if it is counted in a pass, '
                             'init must set it, and call super().init()')

    def init(self):
        """Begins a pass."""
        self.running_loss, self.number_update = 0.0, 0  # as in 2019: counted in batches
        self._loss, self._samples = 0.0, 0
        self._sums = dict.fromkeys(self._metrics, 0.0)

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
            mean = torch.as_tensor(metric(y, d)).double().mean()
            self._sums[name] += mean.item() * samples

    def summarize(self):
        """The mean loss per sample (a float); with metrics, a dict of ``'loss'`` and theirs."""
        if not vars(self).get('_samples'):  # counted by a subclass of 2019
            return self.running_loss / self.number_update
        loss = self._loss / self._samples
        means = {name: total / self._samples for name, total in self._sums.items()}
        return {'loss': loss, **means} if means else loss

    def count_samples(self, x, d):
        """How many samples a batch has: the length of the tensor ``d`` or ``x``, of a
        `PackedSequence`, of the tensors in a dict, of a list of samples. To be overridden where
        TypeError asks for it, and where ``d`` has several rows a sample, as boxes in an image."""
        for part in (d, x):
            if isinstance(part, torch.Tensor):
                return part.size(0) if part.ndim else 1
            if isinstance(part, nn.utils.rnn.PackedSequence):
                return int(part.batch_sizes[0])
        sizes = {len(tensor) if tensor.ndim else 0 for tensor in _tensors([x, d])}
        if isinstance(x, (list, tuple)) and (len(sizes) > 1 or sizes <= {len(x)}):
            return len(x)
        if isinstance(x, dict) and len(sizes) == 1:
            return sizes.pop()
        raise TypeError(f'how many samples has a {type(x).__name__} of {len(_tensors(x))} tensors? '
                        f'Override {type(self).__name__}.count_samples(x, d)')


# --- the experiment ------------------------------------------------------------------------------

def _option(text, *default):
    return dataclasses.field(metadata={'text': text}, **dict(zip(['default'], default)))


@dataclasses.dataclass(eq=False, repr=False)
class Experiment:
    """Trains a network and keeps, in one folder, all that is needed to go on later.

    If ``output_dir`` already holds a checkpoint of some epochs, it is loaded, after a check that it
    was made with the same settings; else a first one is written. TypeError and ValueError say which
    argument is wrong, RuntimeError that the checkpoint can't be read, OSError that the folder can't
    be written. Meant to be overridden: `step`, `evaluate`, `setting`, `state_dict` and
    `load_state_dict`; set what these use before ``super().__init__()``. The arguments:
    """
    net: nn.Module = _option('a `NeuralNetwork`, or a module with ``criterion(y, d)``, its loss')
    train_set: td.Dataset = _option('a data set of pairs (x, d); or a `DataLoader`, used as it is, '
                                    'with its batch size, order and sampler')
    val_set: td.Dataset = _option('the same; None if nothing is to be evaluated')
    optimizer: torch.optim.Optimizer = _option('of ``net``; not LBFGS, which needs a closure')
    stats_manager: StatsManager = _option('what is counted in each pass')
    output_dir: str = _option('the folder; by default ``experiment_`` and the time', None)
    batch_size: int = _option('samples of a batch, in training over all processes', 16)
    perform_validation_during_training: bool = _option(
        'evaluate after each epoch; `history` then has pairs (training, validation)', False)
    _: dataclasses.KW_ONLY
    seed: int = _option("of batch order, dropout, noise; by default the checkpoint's, at first "
                        "drawn from torch's generator", None)
    device: str = _option("'cuda', 'mps', 'cpu' or 'auto': where ``net`` is moved", None)
    scheduler: LRScheduler = _option(
        'of ``optimizer``, stepped after each epoch; `ReduceLROnPlateau` by ``best_by``', None)
    grad_clip: float = _option('upper bound on the norm of the gradient', None)
    batches_per_step: int = _option(
        'batches whose mean gradient makes one step; at the end of an epoch, what is left', 1)
    precision: str = _option(
        "of training: 'float32', 'bfloat16', or 'float16' with loss scaling", 'float32')
    num_workers: int = _option('of the loaders', 0)
    collate_fn: object = _option('of the loaders', None)
    drop_last: bool = _option('leave out the last batch of an epoch if it is short', True)
    drop_last_in_evaluation: bool = _option('by default every sample is evaluated', False)
    best_by: str = _option(
        'a statistic (in validation if there is one): its best epoch is in best.pth.tar', None)
    best_mode: str = _option("'max' or 'min' of it; needed, but for the loss", None)
    save_every: int = _option('epochs between two checkpoints; the last of a run is saved', 1)
    also_save: dict = _option('name to what has state_dict and load_state_dict: a second '
                              'optimizer, a scheduler stepped each batch, averaged weights', None)
    allow: tuple = _option("settings that may differ from the checkpoint's, as its refusal names "
                           'them; of a network, every weight that fits is kept', ())

    # No options. They stand here for subclasses of 2019, which need not call __init__.
    train_loader = val_loader = _scheduler = None
    batch = 0  # the number of the batch in training, from 1; 0 outside of an epoch
    _finished = None  # in a run: the state after the last finished epoch, to which errors go back
    _pass = None  # the epoch of the pass that is on, or EVALUATION
    _on_disk = None, None  # the epoch that is saved in the folder, and which file that is
    _settings = None  # what must be the same when a training goes on, as texts and numbers
    _circumstances = MappingProxyType({})  # what is only said if it is not the same
    _replaces = False  # whether the checkpoint on disk has other settings, which `allow` lets go
    _other = ()  # those that are not as they were in the epochs before
    _seconds, _said, _stopped = (), frozenset(), False
    _scaler = None  # of the loss in float16

    def __post_init__(self):
        self.history = []
        self.also_save = dict(self.also_save or {})
        self.allow = (self.allow,) if isinstance(self.allow, str) else tuple(self.allow)
        self._scheduler = self.scheduler  # one assigned later is stepped by who assigns it
        self._check_options()
        _join_processes()
        if self.device is not None:
            self.net.to(find_device(self.device))
        self.device = _device_of(self.net)
        self._waiting = {}  # optimizer to number of batches whose gradients it holds
        if self.precision == 'float16':
            self._scaler = torch.amp.GradScaler(self.device.type)
        folder = self.output_dir or f'experiment_{_from_all(time.time())[0]}'
        self.output_dir = os.path.abspath(os.path.expanduser(folder))
        self.checkpoint_path = os.path.join(self.output_dir, 'checkpoint.pth.tar')
        self.best_path = os.path.join(self.output_dir, 'best.pth.tar')
        self.config_path = os.path.join(self.output_dir, 'config.txt')
        self._open_folder()

    def _check_options(self):
        """Raises TypeError or ValueError for what can't work, before anything is written."""
        needed = 'criterion' if type(self).step is Experiment.step else 'state_dict'
        kinds = [('net', self.net, 'named_modules', 'a torch.nn.Module'),
                 ('net', self.net, needed, 'a module with a method criterion(y, d), its loss'),
                 ('optimizer', self.optimizer, 'param_groups', 'a torch.optim.Optimizer (the order '
                  'is net, train_set, val_set, optimizer, stats_manager)'),
                 ('stats_manager', self.stats_manager, 'accumulate', 'a StatsManager')]
        kinds += [(f'also_save[{name!r}]', item, 'load_state_dict', 'something with state_dict')
                  for name, item in self.also_save.items()]
        for name, value, attribute, what in kinds:
            if isinstance(value, type) or not hasattr(value, attribute):
                got = value if isinstance(value, type) else type(value).__name__
                raise TypeError(f'{name} must be {what}, got {got}')
        for name, least in (('batch_size', 1), ('batches_per_step', 1), ('save_every', 1),
                            ('num_workers', 0), ('seed', 0)):
            if getattr(self, name) is not None:
                setattr(self, name, _whole(name, getattr(self, name), least))
        for name, words in (('precision', ('float32', 'bfloat16', 'float16')),
                            ('best_mode', ('min', 'max', None))):
            if getattr(self, name) not in words:
                raise ValueError(f'{name} must be one of {words}, got {getattr(self, name)!r}')
        clip = self.grad_clip
        if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
            raise ValueError(f'grad_clip must be a number, more than 0, got {clip!r}')

        # What doesn't go together.
        if taken := self.also_save.keys() & TAKEN:
            raise ValueError(f'also_save{list(taken)} needs another name: the checkpoint has it')
        if self.best_mode is None and self.best_by not in (None, 'loss', 'val_loss'):
            raise ValueError(f"best_by={self.best_by!r} needs best_mode='max' if more of it is "
                             "better, or best_mode='min' if less is")
        if self.val_set is None and self.perform_validation_during_training:
            raise ValueError('perform_validation_during_training needs a val_set, got None')
        own = {id(parameter) for _, parameter in nn.Module.named_parameters(self.net)}
        if own.isdisjoint(map(id, _parameters(self.optimizer))):
            raise ValueError('optimizer holds no parameter of net: build it from net.parameters()')
        if getattr(self._scheduler, 'optimizer', self.optimizer) is not self.optimizer:
            raise ValueError('scheduler belongs to another optimizer: build it from the one here')
        plateau, mode = isinstance(self._scheduler, ReduceLROnPlateau), self.best_mode or 'min'
        if plateau and self._scheduler.mode != mode:
            raise ValueError(f'mode of the scheduler must be best_mode, {mode!r}, '
                             f'got {self._scheduler.mode!r}')

    def _open_folder(self):
        """Goes on from the checkpoint in the folder if its settings agree, or writes a first one.

        With ``allow``, the checkpoint on disk stays as it is until an epoch has been trained.
        """
        there = _stamp(self.checkpoint_path)
        exists = _from_all(there)[0] is not None
        stored = self._read(self.checkpoint_path) if exists else {}
        if not stored.get('History', stored):
            stored = {}  # of no epoch, it has nothing to lose: what is given now counts
        if self.seed is None:
            self.seed = stored.get('Setting', {}).get('Seed', _new_seed())
        if self.best_by is None:
            self.best_by, mode = stored.get('Best', (None, None))
            self.best_mode = self.best_mode or mode
        self.best_mode = self.best_mode or 'min'
        self.train_loader = self._loader(self.train_set, training=True)
        self.val_loader = None if self.val_set is None else self._loader(self.val_set)
        self._follow_first()

        self._settings = _described(self.setting())
        differing = self._differing(stored)
        if stored and 'Setting' not in stored:
            _say(f'{self.checkpoint_path} has no settings: only names and shapes are compared')
            differing = dict.fromkeys(self.allow, ())
        lines = [line for name in differing if name not in self.allow for line in differing[name]]
        if lines:
            raise ValueError('\n  '.join([f'{self.output_dir} holds a checkpoint made with other '
                                          'settings:', *lines])
                             + '\nUse the stored settings, or another output_dir to start anew; '
                             f'allow={tuple(differing)!r} goes on with the new ones.')
        if stored:
            self._take_what_fits(stored, differing.keys())
            self._replaces = bool(differing)
            self._circumstances = stored.get('Circumstances', {})
        self._on_disk = self.epoch if stored else None, there
        self._note(self._sources_and_samples())
        if not exists:
            self.save()

    # --- training --------------------------------------------------------------------------------

    def run(self, num_epochs, callback=None, *, after_batch=None, plot=None):
        """Trains until ``num_epochs`` epochs are done in all, those of earlier runs included.

        ``callback(exp)`` (``plot`` in the course) is called before training and after every epoch,
        in evaluation mode and on one process only: draw, log, or call `stop`;
        ``after_batch(exp, loss)`` after every batch of training, whose number is ``exp.batch``.
        Both without gradients.

        Whatever interrupts it, the experiment goes back to the last epoch that was finished; a new
        ``run`` continues from there. A loss or weights that are not finite raise
        FloatingPointError; a step that trains nothing raises RuntimeError.
        """
        _whole('num_epochs', num_epochs, 0)
        callbacks = [function for function in (callback, plot) if function is not None]
        with self._locked(num_epochs), torch.no_grad(), self._progress_bar() as bar:
            try:
                self._begin()
                self._call(callbacks)
                began = self.epoch
                if began < num_epochs and not self._stopped:
                    self._prepare()
                while self.epoch < num_epochs and not self._stopped:
                    bar.set_description(f'Epoch {self.epoch + 1}/{num_epochs}', refresh=False)
                    self._train_epoch(bar, after_batch, first=self.epoch == began)
                    self._finished = self._copied_state()
                    self._save_epoch(self.epoch % self.save_every == 0 or self.epoch == num_epochs)
                    _say(f'Epoch {self.epoch}/{num_epochs}: {self._figures()}')
                    self._call(callbacks)
                self._save_epoch()
            except BaseException as error:
                self._go_back(error)
                raise
        self._finished = None
        if self._other and self.epoch == began:
            _say(f'{self.epoch} epochs were trained before, by other {", ".join(self._other)}')
        elif self.epoch < num_epochs:
            _say(f'Stopped after {self.epoch} epochs')
        else:
            _say(f'Finish training for {self.epoch} epochs')

    def _train_epoch(self, bar, after_batch, first):
        """Trains on every batch; then validates, and adds an entry to the history.

        ``first``: in the first epoch of a run, what would be noticed late is looked for.
        """
        start = time.time()
        bar.reset()
        self._waiting = {}
        self.stats_manager.init()
        step, gradients, several = self.step, torch.enable_grad(), _world_size() > 1
        if self.precision != 'float32':  # no cache of cast weights, as a step can update twice
            step = torch.autocast(_device_of(self.net).type, getattr(torch, self.precision),
                                  cache_enabled=False)(step)
        with self._one_pass(self.train_loader, self.epoch + 1):
            for number, batch in enumerate(self._batches(self.train_loader), start=1):
                self.batch = number
                with gradients:
                    loss, x, y, d = step(batch)
                loss = float(loss)
                if not math.isfinite(loss):
                    raise self._not_finite(f'the loss is {loss}', batch)

                for part in _from_all((loss, x, y, d)) if several else [(loss, x, y, d)]:
                    self.stats_manager.accumulate(*part)
                if first and number == 1:
                    self._try_summary()
                if after_batch is not None:
                    after_batch(self, loss)
                    self._remember()
                if not bar.disable:
                    bar.set_postfix_str(f'loss {loss:.4g}', refresh=False)
                    bar.update()

            for optimizer, batches in self._waiting.items():
                if batches > 0:  # at the end, too few for a step
                    self._take_step(optimizer, batches)

        if not all(p.isfinite().all() for p in self.net.parameters()):  # by the last step
            raise self._not_finite('weights are not finite', batch)
        if first:
            self._check_that_it_trains()
        if several:  # the batch-norm statistics of the first process count
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        self.batch = 0

        entry = _storable(self.stats_manager.summarize())
        if self.perform_validation_during_training:
            entry = (entry, _storable(self.evaluate()))
        entry = _from_all(entry)[0]
        self._check_best_by(entry)
        self.history.append(entry)
        self._step_scheduler(entry)
        past = [*self._seconds, *[math.nan] * self.epoch][:self.epoch - 1]
        self._seconds = [*past, time.time() - start]
        self._forget_what_changes()

    def step(self, batch):
        """What is done with one batch, in training and in evaluation: **the method to override**.

        ``batch`` is what the loader gives, on the network's device. Return the loss (one value),
        and the x, y, d that `StatsManager.accumulate` takes. Call ``self.update(loss)`` where the
        weights are to change; it does nothing in evaluation. For instance, with two optimizers::

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
        """One step of ``optimizer`` (default: the experiment's) down the gradient of ``loss``,
        averaged over the processes of torchrun, and over ``batches_per_step`` calls. In evaluation
        it does nothing."""
        trains = self.net.training if self._pass is None else self._pass != EVALUATION
        if not trains:
            return
        optimizer = optimizer or self.optimizer
        batches = self._waiting.get(optimizer, 0)
        if batches == 0:
            optimizer.zero_grad()
        loss = loss if self._scaler is None else self._scaler.scale(loss)
        loss.backward()
        if batches + 1 < self.batches_per_step:
            self._waiting[optimizer] = batches + 1
        else:
            self._take_step(optimizer, batches + 1)

    def _take_step(self, optimizer, batches):
        """Steps down the mean of the gradients of so many batches."""
        self._waiting[optimizer] = 0
        if batches > 1 or _world_size() > 1:
            _average_gradients(optimizer, batches)
        if self._scaler is not None and self.grad_clip is not None:
            self._scaler.unscale_(optimizer)
        if self.grad_clip is not None:
            nn.utils.clip_grad_norm_(_parameters(optimizer), self.grad_clip)
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def stop(self):
        """Ends the run after the present epoch: ``if exp.epoch - exp.best[0] > 9: exp.stop()``."""
        self._stopped = True

    # --- what stands around the loop -------------------------------------------------------------

    def _begin(self):
        """A run starts from a whole state, and remembers it."""
        if self._finished is not None:  # another run was interrupted even on its way back
            self.load_state_dict(self._finished)
        self.batch, self._pass, self._stopped = 0, None, False
        if self.seed is None:  # of a subclass that did not call __init__
            self.seed = _new_seed()
        _say(f'Start/Continue training from epoch {self.epoch}')
        self._note(self._attributes())
        self._finished = self._copied_state()

    def _prepare(self):
        """Before the first epoch of a run, once it is sure to come: what is wrong shows."""
        self._say_what_is_not_trained()
        if self.perform_validation_during_training:
            self._rehearse()
        self._save_epoch(checkpoint=False)
        if not (self._replaces or self._other):
            self.save()  # the weights may have changed since: another experiment can share them
        self._put_aside_stale_best()

    def _call(self, callbacks):
        """Calls them on one process; the others wait, and follow in what was changed."""
        if callbacks and _rank() == 0:
            with _in_mode(self._modules(), training=False):
                for callback in callbacks:
                    callback(self)
        if callbacks:
            self._follow_first()
            self._stopped = _from_all(self._stopped)[0]
        self._remember()

    def _remember(self):
        """What a callback has loaded is what an error goes back to from now on."""
        if self._finished is None:
            self._finished = self._copied_state()

    def _go_back(self, error):
        """Returns to the last epoch that was finished, and saves it if it is not on disk."""
        if self._finished is None:  # nothing has been done yet
            return
        self.batch = 0
        self.load_state_dict(self._finished)
        self._finished = None
        text = f'{type(error).__name__}: back to epoch {self.epoch}, the last one finished'
        try:
            self._save_epoch()
        except (OSError, RuntimeError) as failure:  # the next run tries again
            text += f', in memory only ({failure})'
        if isinstance(error, KeyboardInterrupt):
            text += '. Call run again to go on from there'
        _say(f'{text}.')
        if _world_size() > 1:
            dist.destroy_process_group()  # so that the others don't wait for this one for ever

    def _save_epoch(self, checkpoint=True):
        """Saves the last finished epoch, if it is not on disk. The best goes first: if a kill comes
        between the two, the epoch is done again, and both are written again."""
        if self.epoch == self._on_disk[0]:
            return
        if self.best_by is not None and self._best_epoch()[0] == self.epoch > 0:
            self.save(self.best_path)
        if checkpoint:
            self.save()

    def _progress_bar(self):
        """To be seen where somebody watches: a terminal or notebook, without CI, TQDM_DISABLE."""
        shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
        watched = (hasattr(shell, 'kernel') or sys.stderr.isatty()) and _rank() == 0
        quiet = not watched or bool(os.environ.get('CI') or os.environ.get('TQDM_DISABLE'))
        total = operator.length_hint(self.train_loader) or None
        return tqdm(total=total, leave=False, disable=quiet)

    @contextlib.contextmanager
    def _locked(self, num_epochs):
        """Keeps another process from training into the same folder, where there are such locks."""
        if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
            raise RuntimeError('processes have parted after an error: start the program again')
        if fcntl is None or _rank() > 0 or self.epoch >= num_epochs:
            yield
            return
        if not os.path.isfile(self.config_path):
            _write(self.config_path, f'{self!r}\n'.encode())
        with open(self.config_path, 'a') as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RuntimeError(f'{self.output_dir} is in use: another process trains there. '
                                   'Wait for it, stop it, or give another output_dir') from None
            except OSError:  # a file system without locks
                pass
            yield

    # --- what would be noticed late --------------------------------------------------------------

    def _say_once(self, text):
        if text not in self._said:
            self._said = self._said | {text}
            _say(text)

    def _say_what_is_not_trained(self):
        optimizers = [item for item in self._items().values() if hasattr(item, 'param_groups')]
        trained = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
        names = [name for name, p in nn.Module.named_parameters(self.net)
                 if p.requires_grad and id(p) not in trained]
        if names:
            self._say_once(f'In no optimizer, so that they will not be trained: {_some(names)}')
        saved = {id(getattr(item, 'optimizer', None)) for item in self._items().values()}
        for optimizer in optimizers:
            scheduled = hasattr(optimizer.step, '_wrapped_by_lr_sched')  # torch's mark
            if scheduled and id(optimizer) not in saved:
                self._say_once(f'A scheduler changes the rates of {type(optimizer).__name__}, but '
                               'is not in also_save: a resumed training starts it over')

    def _rehearse(self):
        """Evaluates a full batch, another, and the short last one: can the network take them, and
        the statistics? These are copies: it leaves no trace."""
        loader, data, size = self.val_loader, self.val_loader.dataset, self.val_loader.batch_size
        own = loader.worker_init_fn or type(self).evaluate is not Experiment.evaluate
        if own or not size or isinstance(data, td.IterableDataset):
            return
        short = 0 if loader.drop_last else len(data) % size
        full = min(2, len(data) // size)  # batches
        few = td.Subset(data, [*range(full * size), *range(len(data) - short, len(data))])
        loader = td.DataLoader(few, size, collate_fn=loader.collate_fn,
                               num_workers=loader.num_workers,
                               multiprocessing_context=loader.multiprocessing_context)
        stats = copy.copy(self.stats_manager)
        stats.init()
        with self._one_pass(loader):
            for number, batch in enumerate(self._batches(loader)):
                try:
                    loss, x, y, d = self.step(batch)
                except RuntimeError as error:
                    if not 0 < full == number:
                        raise
                    raise RuntimeError(f'the last batch of the evaluation has {short} samples, '
                                       f'others {size}: {error}. If the network can take no fewer, '
                                       'give drop_last_in_evaluation=True') from error
                stats.accumulate(float(loss), x, y, d)

    def _try_summary(self):
        """After one batch: refuses a summary that can't be kept, and a ``best_by`` not in it."""
        try:
            summary = copy.deepcopy(self.stats_manager).summarize()  # which can end a pass
        except Exception:  # it can't be copied, or one batch is too little for it
            return
        summary, validates = _storable(summary), self.perform_validation_during_training
        if not validates:
            self._check_best_by(summary)
        elif type(self).evaluate is Experiment.evaluate:  # another can have other statistics
            self._check_best_by((summary, summary))

    def _check_best_by(self, entry):
        names = self._row(entry)
        needed = self.best_by is not None or isinstance(self._scheduler, ReduceLROnPlateau)
        if needed and self._column() not in names:
            raise ValueError(f'best_by: there is no statistic {self.best_by or "loss"!r}, '
                             f'there is {", ".join(map(repr, names))}')

    def _check_that_it_trains(self):
        """After the first epoch of a run: `update` was called, or there is a reason why not."""
        if self._waiting:
            return
        before = self._finished
        modules = {name: item for name, item in self._items().items() if name in before
                   and isinstance(item, nn.Module) and not isinstance(item, AveragedModel)}
        pairs = [(before[name][key], parameter) for name, module in modules.items()
                 for key, parameter in nn.Module.named_parameters(module) if key in before[name]]
        if pairs and all(torch.equal(old, new) for old, new in pairs):
            raise RuntimeError(f'{type(self).__name__}.step never calls self.update(loss), and no '
                               'weight has changed: nothing is trained')
        ignored = []
        if self.grad_clip is not None:
            ignored.append('grad_clip')
        if self.batches_per_step > 1:
            ignored.append('batches_per_step')
        if self._scaler is not None:  # autocast alone needs no update
            ignored.append('precision')
        if ignored:
            raise RuntimeError(f'{type(self).__name__}.step takes steps by itself, which ignore '
                               f'{", ".join(ignored)}: call self.update(loss) instead')

    def _not_finite(self, what, batch):
        if all(tensor.isfinite().all() for tensor in _tensors(batch)):
            hint = 'the data of that batch is finite: a lower learning rate or grad_clip may help'
        else:
            hint = 'the batch itself holds values that are not finite: mend the data'
        return FloatingPointError(f'{what} in epoch {self.epoch + 1}, batch {self.batch}; {hint}')

    # --- evaluation ------------------------------------------------------------------------------

    def evaluate(self, data=None, net=None):
        """The summary over all of ``data`` (data set or `DataLoader`; default: the validation set),
        in evaluation mode; with ``net``, of that network in place of the experiment's, such as
        averaged weights. Random numbers drawn meanwhile follow from the seed alone, and leave those
        of the training and of the caller as they were. Under torchrun each process evaluates it
        all."""
        if net is not None:
            return Experiment.evaluate(self._with(net), data)
        loader = self.val_loader if data is None else self._loader(data)
        if loader is None:
            raise ValueError('there is nothing to evaluate: val_set is None; pass a data set')
        in_epoch = self._pass not in (None, EVALUATION)  # whose sums must not be lost
        stats = copy.copy(self.stats_manager) if in_epoch else self.stats_manager
        stats.init()
        with self._one_pass(loader):
            for batch in self._batches(loader):
                loss, x, y, d = self.step(batch)
                stats.accumulate(float(loss), x, y, d)
        return stats.summarize()

    def predict(self, data, targets=False, net=None):
        """The network's outputs (of several, the first) for all of ``data``, in order: a tensor
        (N, ...) on the CPU; with ``targets`` a pair of it and what was desired. ``data`` is a
        tensor of inputs (N, ...), a data set, or a `DataLoader`, whose data set is gone through in
        order. ``net`` is as in `evaluate`."""
        if net is not None:
            return Experiment.predict(self._with(net), data, targets)
        collate = getattr(data, 'collate_fn', self.collate_fn)
        if isinstance(data, torch.Tensor):
            collate = None
        data = data.dataset if isinstance(data, td.DataLoader) else data
        loader = td.DataLoader(data, self.batch_size, collate_fn=collate)
        outputs, desired = [], []
        with self._one_pass(loader):
            for batch in self._batches(loader):
                if isinstance(batch, torch.Tensor):
                    y, d = self.net(batch), None
                else:
                    _, _, y, d = self.step(batch)
                outputs.append((y[0] if isinstance(y, (tuple, list)) else y).cpu())
                if targets:
                    desired.append(d.cpu())
        return (torch.cat(outputs), torch.cat(desired)) if targets else torch.cat(outputs)

    def _with(self, net):
        """The same experiment with another network; this one is left alone."""
        other = copy.copy(self)
        other.net = net.module if isinstance(net, AveragedModel) else net
        return other

    def _modules(self):
        modules = [item for item in (self.also_save or {}).values() if isinstance(item, nn.Module)]
        return [self.net, *modules]

    @contextlib.contextmanager
    def _one_pass(self, loader, epoch=EVALUATION):
        """One pass over a loader, to train in that epoch or to evaluate. Random numbers drawn
        inside follow from (seed, epoch, rank), the order of the samples from (seed, epoch).
        Afterwards all is as before: modes, and the random numbers of who is outside."""
        training = epoch != EVALUATION
        order = mix_seeds(self.seed or 0, epoch)
        drawn = mix_seeds(self.seed or 0, epoch, _rank()) if training else order
        samplers = [getattr(loader, name, None) for name in ('sampler', 'batch_sampler')]
        owners = [loader, *samplers, getattr(samplers[1], 'sampler', None)]
        generators = {getattr(owner, 'generator', None) for owner in owners} - {None}
        modules, before = [self.net] if training else self._modules(), self._pass
        with torch.no_grad(), _in_mode(modules, training), _random_numbers(drawn, generators):
            for generator in generators:
                generator.manual_seed(order)
            for owner in owners:
                if hasattr(owner, 'set_epoch'):
                    owner.set_epoch(epoch)
            self._pass = epoch
            try:
                yield
            finally:
                self._pass = before

    def _loader(self, data, training=False):
        """The loader of a data set. In training each process has its share of every batch."""
        if isinstance(data, td.DataLoader):
            if training:
                self._say_what_is_ignored(data)
            return data
        name = 'train_set' if training else 'the data set to evaluate'
        drop_last = self.drop_last if training else self.drop_last_in_evaluation
        if not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
            raise TypeError(f'{name} must be a data set with a length, or in a DataLoader of your '
                            f'own, got {type(data).__name__}')
        size, processes = self.batch_size, _world_size() if training else 1
        if size % processes:
            raise ValueError('batch_size must be a multiple of the number of processes, '
                             f'{processes}, got {size}')
        if len(data) < (size if drop_last else 1):
            raise ValueError(f'{name} has {len(data)} samples, too few for one batch of {size}: '
                             'lower batch_size, or keep the last short batch')
        generator = torch.Generator().manual_seed(mix_seeds(self.seed or 0))
        return td.DataLoader(
            data, size // processes, num_workers=self.num_workers, collate_fn=self.collate_fn,
            sampler=_Share(data, generator=generator) if training else None, drop_last=drop_last,
            pin_memory=_device_of(self.net).type == 'cuda')

    def _say_what_is_ignored(self, loader):
        ignored = []
        if loader.batch_size not in (None, self.batch_size):
            ignored.append(f'its batches have {loader.batch_size} samples, and not '
                           f'batch_size={self.batch_size}')
        if isinstance(getattr(loader.batch_sampler, 'sampler', None), td.SequentialSampler):
            ignored.append('it is not shuffled')
        if loader.persistent_workers:
            ignored.append('what its persistent_workers draw, a resumed training does not repeat')
        if ignored:
            self._say_once(f'train_set is a DataLoader, used as it is: {"; ".join(ignored)}')

    def _batches(self, loader):
        """The batches of a loader, on the device of the network."""
        device, batch = _device_of(self.net), None
        options = {'non_blocking': True} if device.type == 'cuda' else {}

        def moved(part):
            return part.to(device, **options) if hasattr(part, 'to') else part

        with _interrupts_wait():
            batches = iter(loader)
        for batch in batches:
            yield batch if device.type == 'cpu' else _map(moved, batch)
        with _interrupts_wait():
            del batches
        if batch is None:
            raise ValueError('the data gave no batch: it is empty, or shorter than one batch')

    # --- history ---------------------------------------------------------------------------------

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.history)

    @property
    def seconds(self):
        """How long each epoch took, a list."""
        return list(self._seconds)

    @property
    def best(self):
        """(epoch, value) at which the statistic ``best_by`` (by default the loss) was best, the
        first epoch being 1; (0, nan) before it. Values that are NaN don't count."""
        return self._best_epoch()

    def table(self):
        """The history as a list of flat dicts, one an epoch: ``epoch``, the training statistics,
        the validation statistics with ``val_`` before their names, and ``seconds``; tensors as
        numbers and lists."""
        seconds = [*self._seconds, *[math.nan] * self.epoch]
        return [{'epoch': number, **self._row(entry), 'seconds': seconds[number - 1]}
                for number, entry in enumerate(self.history, start=1)]

    def _row(self, entry):
        """An entry, (training, validation) or training alone, as a flat dict."""
        if isinstance(entry, tuple) and len(entry) == 2:
            training, validation = entry
            if self.perform_validation_during_training or isinstance(validation, dict):
                validation = _flat(validation)
                names = {f'val_{name}': value for name, value in validation.items()}
                return _flat(training) | names
        return _flat(entry)

    def _column(self):
        """What the statistic that counts is called in a row."""
        name = self.best_by or 'loss'
        in_validation = self.perform_validation_during_training and not name.startswith('val_')
        return f'val_{name}' if in_validation else name

    def _score(self, entry):
        value = self._row(entry).get(self._column())
        return float(value) if isinstance(value, (int, float)) else math.nan

    def _best_epoch(self):
        scores = enumerate(map(self._score, self.history), start=1)
        scores = [(number, score) for number, score in scores if not math.isnan(score)]
        choose = max if self.best_mode == 'max' else min
        return choose(scores, key=lambda pair: pair[1], default=(0, math.nan))

    def _figures(self):
        """The last entry as a line."""
        row = self._row(self.history[-1])
        figures = [f'{name} {value:.4g}' for name, value in row.items()
                   if isinstance(value, (int, float))]
        return f'{", ".join(figures)} ({self._seconds[-1]:.2f} s)'

    def _step_scheduler(self, entry):
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(self._score(entry))
        elif self._scheduler is not None:
            self._scheduler.step()

    # --- checkpoints -----------------------------------------------------------------------------

    def _items(self):
        """What has a state of its own, by its name in the checkpoint."""
        items = {'Net': _unwrapped(self.net), 'Optimizer': self.optimizer}
        if self._scheduler is not None:
            items['Scheduler'] = self._scheduler
        if self._scaler is not None:
            items['Scaler'] = self._scaler
        return items | (self.also_save or {})

    def state_dict(self):
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        if self._settings is None:  # of a subclass that did not call __init__
            self._settings = _described(self.setting())
        states = {name: item.state_dict() for name, item in self._items().items()}
        return states | {'History': self.history, 'Seconds': list(self._seconds),
                         'Best': (self.best_by, self.best_mode), 'Setting': self._settings,
                         'Circumstances': dict(self._circumstances), 'Format': FORMAT}

    def load_state_dict(self, checkpoint):
        """Takes over a state that `state_dict` returned, or one of the original helper. ValueError:
        it doesn't fit what is here; everything is left as it was."""
        needed = {'Net', 'History', *(self.also_save or ())}
        if missing := sorted(needed - checkpoint.keys() - set(self.allow)):
            raise ValueError(f'the checkpoint has no {", ".join(missing)}; '
                             f'allow={tuple(missing)!r} begins with what is given')
        items = {name: item for name, item in self._items().items() if name in checkpoint}
        before = {name: copy.deepcopy(item.state_dict()) for name, item in items.items()}
        history = [_storable(entry) for entry in checkpoint['History']]
        try:
            for name, item in items.items():
                item.load_state_dict(copy.deepcopy(checkpoint[name]))
        except Exception as error:
            for key, item in items.items():
                item.load_state_dict(before[key])
            raise ValueError(f'{self.output_dir} holds another {name}: {error}. Give all groups of '
                             'an optimizer from the start, and freeze and thaw by requires_grad_ '
                             'and by rates') from error
        self.history = history
        self._seconds = list(checkpoint.get('Seconds', [math.nan] * len(history)))

    def save(self, path=None):
        """Writes a checkpoint (default: ``checkpoint.pth.tar``), all of it or nothing: of the
        present state, or in a run of the last finished epoch. Where ``config.txt``, for people, is
        missing, it is written too."""
        state = self._finished or self.state_dict()
        if _rank() == 0:
            if not os.path.isfile(self.config_path):
                _write(self.config_path, f'{self!r}\n'.encode())
            if path is None:
                self._keep_what_is_on_disk()
            for name in state if self.epoch < 2 else self.also_save or ():
                try:  # lest a training ends with what can't be read
                    _unpickled(io.BytesIO(_as_bytes(state[name])))
                except Exception as error:
                    raise RuntimeError(f'the state of {name} holds objects that could run code, '
                                       f'and could not be read back: {error}') from error
            _write(path or self.checkpoint_path, _as_bytes(state))
        if path is None:
            self._on_disk = self.epoch, _stamp(self.checkpoint_path)
            self._replaces, self._other = False, ()

    def load(self, path=None):
        """Goes back to a checkpoint (default: the last), history and all. RuntimeError: it can't be
        read; ValueError: it doesn't fit."""
        there, state = _stamp(self.checkpoint_path), self._read(path or self.checkpoint_path)
        before, self._finished = self._finished, state  # what an interrupt goes back to
        try:
            self.load_state_dict(state)
        except ValueError:  # it doesn't fit, and nothing was changed
            self._finished = before
            raise
        self._on_disk, self._finished = (self.epoch, there), None

    def load_best(self):
        """Takes the weights of the best epoch (see ``best_by``), those of modules in ``also_save``
        too. History and optimizers stay. RuntimeError: the file is of another epoch, as when
        ``best_by`` was given later."""
        state = self._read(self.best_path)
        epoch, best = len(state['History']), self._best_epoch()[0]
        if best != epoch <= self.epoch:
            raise RuntimeError(f'{self.best_path} is of epoch {epoch}, but the best one is {best}')
        for name, item in self._items().items():
            if isinstance(item, nn.Module) and name in state:
                item.load_state_dict(state[name])

    def _read(self, path):
        own_state = type(self).state_dict is not Experiment.state_dict
        return load_checkpoint(path, keys=set() if own_state else KEYS)

    def _copied_state(self):  # but for the entries of the history, which don't change
        state = self.state_dict()
        return copy.deepcopy(state, {id(self.history): list(self.history)})

    def _keep_what_is_on_disk(self):
        """What another experiment has trained in this folder meanwhile is not overwritten; of what
        `allow` replaces, a copy stays."""
        there = _stamp(self.checkpoint_path)
        if self._on_disk[1] is not None and there not in (None, self._on_disk[1]):
            epoch = len(self._read(self.checkpoint_path).get('History', ()))
            if epoch > self.epoch:
                raise RuntimeError(f'{self.checkpoint_path} is now of epoch {epoch}, trained by '
                                   f'another experiment; this one is at {self.epoch}: call load()')
        if self._replaces and there is not None:
            old = _free_name(self.checkpoint_path)
            shutil.copy2(self.checkpoint_path, old)
            _say(f'The checkpoint of the settings before is kept: {old}')

    def _put_aside_stale_best(self):
        """best.pth.tar is of another epoch than `best` if best_by was changed, or the history."""
        path = getattr(self, 'best_path', '')
        if _rank() == 0 and os.path.isfile(path):
            if len(self._read(path)['History']) != self._best_epoch()[0]:
                old = _free_name(path)
                os.replace(path, old)
                _say(f'{path} is not of the best epoch any more: it is now {old}')

    def _take_what_fits(self, stored, differing):
        """Takes over a checkpoint; of the settings that differ, what can be kept.

        A network keeps every weight that fits. An optimizer of the same class keeps its state, with
        the options that are given, unless weights are new. A schedule is as if it had been there
        from the first epoch. Anything else begins as it is given.
        """
        items, state, old = self._items(), dict(stored), stored.get('Setting', {})
        changed, new_weights = set(differing) & items.keys(), False
        for name in sorted(changed & state.keys()):
            if isinstance(items[name], nn.Module):
                state[name], other = self._fitting(name, items[name], state[name])
                changed.remove(name)
                new_weights = new_weights or other
        if new_weights:
            changed |= {name for name, item in items.items() if hasattr(item, 'param_groups')}
        if changed & {'Optimizer', 'Scheduler'}:
            changed |= {'Optimizer', 'Scheduler'} & items.keys()
        given = []
        for name in changed:
            groups = getattr(items[name], 'param_groups', [])
            given += [(name, number, dict(group)) for number, group in enumerate(groups)]
            kind = type(items[name]).__name__
            if new_weights or not groups or old.get(name, kind) != kind:
                state[name] = items[name].state_dict()
        self.load_state_dict(state)
        for name, number, options in given:
            items[name].param_groups[number].update(options)
        if changed & {'Optimizer', 'Scheduler'}:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # torch misses the steps of the optimizer
                for entry in self.history:
                    self._step_scheduler(entry)

    def _fitting(self, name, module, stored):
        """The stored weights that fit, beside those given; whether there are others."""
        own = module.state_dict()
        fitting = {key: value for key, value in stored.items()
                   if key in own and getattr(value, 'shape', 0) == getattr(own[key], 'shape', 0)}
        if not fitting:
            raise ValueError(f'{self.output_dir} holds another {name}, of which no weight fits')
        if new := [key for key in own if key not in fitting]:
            _say(f'{name}: no stored weights fit {_some(new)}; they and optimizers begin anew')
        if unused := [key for key in stored if key not in own]:
            _say(f'{name}: {_some(unused)} of the checkpoint are not used; optimizers begin anew')
        return own | fitting, bool(new or unused)

    # --- settings --------------------------------------------------------------------------------

    def setting(self):
        """The settings, by name, that a checkpoint must share with the experiment that loads it.
        Subclasses may add their own. Stored and compared are plain values and texts (`repr`)."""
        train_set, val_set = getattr(self, 'train_set', None), getattr(self, 'val_set', None)
        ready = isinstance(train_set, td.DataLoader)
        sizes = [operator.length_hint(data.dataset if isinstance(data, td.DataLoader) else data)
                 for data in (train_set, val_set)]
        return {**(self.also_save or {}), 'Net': self.net, 'TrainSet': train_set,
                'ValSet': val_set, 'Optimizer': self.optimizer, 'StatsManager': self.stats_manager,
                'BatchSize': train_set.batch_size if ready else self.batch_size,
                'TrainSetSize': sizes[0] or None, 'ValSetSize': sizes[1] or None,
                'PerformValidationDuringTraining': self.perform_validation_during_training,
                'Seed': self.seed, 'Precision': self.precision, 'Scheduler': self._scheduler,
                'GradClip': self.grad_clip, 'BatchesPerStep': self.batches_per_step,
                'DropLast': self.drop_last}

    def __repr__(self):
        return ''.join(f'{name}({_text(value)})\n' for name, value in self.setting().items())

    def _differing(self, stored):
        """The settings that differ from those of a checkpoint: name to lines for people."""
        old, given, differing = stored.get('Setting', {}), self._settings, {}
        if unknown := [name for name in self.allow if name not in given and name not in stored]:
            names = [key for key in given if ': ' not in key]
            raise ValueError(f'allow has {unknown}, but the settings are {", ".join(names)}')
        given = dict.fromkeys(stored.keys() & old.keys(), 'nothing') | given  # was in also_save
        other_torch = old.get('Torch') != str(torch.__version__)  # which prints layers differently
        validates = self.perform_validation_during_training
        validated = old.get('PerformValidationDuringTraining', True)
        for key in dict.fromkeys([*given, *old]):
            name, _, part = key.partition(': ')
            a, b = old.get(key, 'nothing'), given.get(key, 'nothing')
            unused = name.startswith('ValSet') and not (validates and validated)
            if a == b or unused or name == 'Torch' or name not in old or name not in given:
                continue
            if part and old[name] != given[name]:
                continue  # of another class, all parts differ
            if part and other_torch and (name == 'Net' or name in self.also_save or a == 'nothing'
                                         or b == 'nothing'):
                continue
            label = f'{name}: {part} ' if part else f'{name}: '
            differing.setdefault(name, []).append(f'{label}stored {a}, given {b}')
        return differing

    def _sources_and_samples(self):
        """What decides the numbers too, but is no setting: sources, and some samples."""
        stats, items = self.stats_manager, self._items().values()
        layers = {type(layer) for module in self._modules() for layer in module.modules()}
        sources = {'network': sorted(layers, key=lambda kind: kind.__qualname__),
                   'experiment': [type(self)],
                   'statistics': [type(stats), *getattr(stats, '_metrics', {}).values()],
                   'collate_fn': [self.collate_fn],
                   'schedule': [f for item in items for f in getattr(item, 'lr_lambdas', ())]}
        described = {f'source of {role}': _source(parts) for role, parts in sources.items()}
        loaders = {'train_set': self.train_loader}
        if self.perform_validation_during_training:
            loaders['val_set'] = self.val_loader
        for name, loader in loaders.items():
            if loader.num_workers > 0:
                continue  # a sample may open a file, which processes can't share
            figures = _fingerprint(loader.dataset)
            if _alike(figures, _fingerprint(loader.dataset)):
                described[f'samples of {name}'] = figures
            else:
                self._say_once(f'{name} draws random numbers from a generator of its own: a '
                               'resumed training does not repeat them, but those of torch')
        return described

    def _attributes(self):
        """The experiment's own public attributes that are numbers or texts."""
        known = {field.name for field in dataclasses.fields(Experiment)}
        known |= {'batch', 'checkpoint_path', 'best_path', 'config_path'}
        kinds = [kind for kind in type(self).__mro__ if kind not in Experiment.__mro__]
        return {f'attribute {name}': _plain(value)
                for owner in (*reversed(kinds), self) for name, value in vars(owner).items()
                if isinstance(value, (bool, int, float, str))
                and name not in known and not name.startswith('_')}

    def _forget_what_changes(self):
        """An attribute that changes in training is no circumstance of it."""
        now = self._attributes()
        self._circumstances = {name: value for name, value in self._circumstances.items()
                               if _alike(now.get(name, value), value)}

    def _note(self, given):
        """Adds to the circumstances of the training; one line says which are other than before."""
        known, self._circumstances = self._circumstances, self._circumstances | given
        other = [name for name in given if not _alike(known.get(name, given[name]), given[name])]
        if other and self.epoch > 0:
            self._other = (*self._other, *other)
            values = [f'{name} ({known[name]}, now {given[name]})' if name.startswith('attribute')
                      else name for name in other]
            _say(f'NOTE: {self.output_dir} was trained for {self.epoch} epochs by other '
                 f'{", ".join(values)}')

    # --- several processes -----------------------------------------------------------------------

    def _follow_first(self):
        """All take over the state of the first process, and what is frozen in it."""
        if _world_size() == 1:
            return
        items = self._items()
        parameters = [parameter for _, parameter in nn.Module.named_parameters(self.net)]
        state = {name: item.state_dict() for name, item in items.items()}
        trained = [p.requires_grad for p in parameters]
        state, trained = _from_all(None if _rank() else (state, trained))[0]
        for name, item in items.items():
            item.load_state_dict(state[name])
        for parameter, wanted in zip(parameters, trained):
            parameter.requires_grad_(wanted)


Experiment.__init__.__annotations__ = {}  # which help() would print in full
for _field in dataclasses.fields(Experiment):
    _default = '' if _field.default is dataclasses.MISSING else f' ({_field.default!r})'
    Experiment.__doc__ += textwrap.fill(
        f'{_field.name}{_default}: {_field.metadata["text"]}', 96,
        initial_indent='\n    ', subsequent_indent='        ', replace_whitespace=False)


# --- settings as texts ---------------------------------------------------------------------------

def _described(setting):
    """Settings as a flat dict of numbers and texts: ``name`` for a whole, ``name: part`` for its
    parts. They are described when they are given: rates change later, by schedule or by hand."""
    described = {'Torch': str(torch.__version__)}
    for name, value in setting.items():
        value = _unwrapped(value)
        parts = _parts(value)
        described[name] = _plain(value) if parts is None else type(value).__name__
        described |= {f'{name}: {part}': _plain(inner) for part, inner in (parts or {}).items()}
    return described


def _parts(value):
    """The parts of a setting that are compared one by one; None of what is compared as a whole."""
    if isinstance(value, nn.Module):
        return {name: f'{type(layer).__name__}({layer.extra_repr()})'
                for name, layer in value.named_modules() if name}
    if isinstance(value, td.DataLoader):
        return {'data': value.dataset, 'drop_last': value.drop_last}
    if hasattr(value, 'param_groups'):
        parts = {}
        for number, group in enumerate(value.param_groups):
            of_group = f' of group {number}' if number else ''
            group = group | {'lr': group.get('initial_lr', group.get('lr'))}  # not the schedule's
            parts |= {f'{option}{of_group}': group[option] for option in ('lr', *value.defaults)}
        return parts
    if not (hasattr(value, 'optimizer') and hasattr(value, 'state_dict')):
        return None
    # A scheduler: what stays as it is in training.
    state = value.state_dict()
    for number, inner in enumerate(state.get('_schedulers', ())):
        state |= {f'{number}: {key}': part for key, part in inner.items()}
    changing = {'last_epoch', 'best', 'num_bad_epochs', 'cooldown_counter', 'T_cur', 'T_i'}
    return {key: part for key, part in state.items()
            if not key.split(' ')[-1].startswith('_') and key.split(' ')[-1] not in changing}


def _plain(value):
    """A number as it is, anything else as a text that is the same in another process and folder."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (torch.Tensor, np.generic)) and value.ndim == 0:
        return value.item()
    text = value if isinstance(value, str) else _text(value)
    text = re.sub(r'<\S*?(\w+) object at 0x\w+>', r'<\1 object>', text)
    text = re.sub(r' at 0x\w+', '', text)
    folders = r'(?<![\w.])(?:[A-Za-z]:|\.{1,2}|~)?[\\/]+(?:[^\\/\s\'"(),]+[\\/]+)*'
    return ' '.join(re.sub(folders, '', text).split())


def _text(value):
    """An object as it describes itself; of samples in a list only how many they are."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return f'{type(value).__name__} of {len(value)}'
    if isinstance(value, (list, tuple, dict)) and (len(value) > 100 or _tensors(value)):
        return f'{type(value).__name__} of {len(value)}'
    return type(value).__name__ if hasattr(value, 'optimizer') else repr(value)


def _source(parts):
    """The source of functions, and of the methods of classes and their bases, but for torch's and
    this file's; '' where Python has none, as for a console."""
    members = [member for part in parts if isinstance(part, type)
               for base in part.__mro__ for member in vars(base).values()]
    members += [part for part in parts if not isinstance(part, type)]
    members = [getattr(member, '__func__', getattr(member, 'fget', member)) for member in members]
    own = [function for function in members if inspect.isfunction(function)
           and function.__module__.split('.')[0] not in ('torch', __name__)]
    with contextlib.suppress(Exception):  # there are many ways in which the file can be another one
        return '\n'.join(dict.fromkeys(map(inspect.getsource, own)))
    return ''


def _fingerprint(data):
    """Mean and spread of the parts of three samples: is the data still the same?"""
    figures, leaves = [], []
    with contextlib.suppress(Exception), _random_numbers(0, ()):  # errors show in training
        for index in sorted({0, len(data) // 2, len(data) - 1}):
            _map(leaves.append, copy.copy(data)[index])  # of a copy, which may open a file
        for leaf in leaves:
            if isinstance(leaf, (torch.Tensor, np.ndarray, np.number, int, float)):
                values = torch.as_tensor(leaf).double()
                figures += [values.mean().item(), values.std(correction=0).item()]
    return figures


def _alike(a, b):
    """Of fingerprints, whether they are as good as equal."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True)
    return a == b or (a != a and b != b)


# --- history: from summaries to rows -------------------------------------------------------------

def _storable(summary):
    """A summary as the history keeps it: tensors and arrays as tensors on the CPU, plain numbers
    and texts. TypeError: it holds something else, which could not be read back."""
    def kept(leaf):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            return torch.as_tensor(leaf).detach().cpu().clone().as_subclass(torch.Tensor)
        leaf = leaf.item() if isinstance(leaf, np.generic) else leaf
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise TypeError(f'summarize must return numbers, got a {type(leaf).__name__}')

    return _map(kept, summary._asdict() if hasattr(summary, '_asdict') else summary)


def _flat(summary):
    """A summary as a dict of plain numbers and lists; of an odd one, an empty dict."""
    if isinstance(summary, (int, float, torch.Tensor)) and torch.as_tensor(summary).ndim == 0:
        return {'loss': float(summary)}
    if not isinstance(summary, dict):
        return {}
    row = {}
    for name, value in summary.items():
        value = value.tolist() if isinstance(value, torch.Tensor) else value
        row[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return row


# --- networks, batches, random numbers -----------------------------------------------------------

def find_device(name='auto'):
    """The device of that name, or the best one of this machine: CUDA (under torchrun, this
    process's own), MPS or CPU. Raises ValueError if it is not here."""
    if name == 'auto' and torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    for kind in ('mps', 'cpu') if name == 'auto' else (name,):
        try:
            return torch.zeros(1, device=kind).device
        # RuntimeError is also that of a virtual machine whose MPS has no memory.
        except (RuntimeError, AssertionError, TypeError) as error:
            wrong = error
    raise ValueError(f"device must be 'cuda', 'mps', 'cpu' or 'auto', got {name!r}, and {name!r} "
                     "is not available here; use device='auto' for the best one that is") from wrong


def _device_of(net):
    tensors = itertools.chain(nn.Module.named_parameters(net), net.named_buffers())
    return next((tensor.device for _, tensor in tensors), torch.device('cpu'))


def _unwrapped(net):
    """The network inside of `torch.compile`: both write and read the same checkpoints."""
    return next(net.children()) if type(net).__name__ == 'OptimizedModule' else net


def _parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group['params']]


def _map(change, value):
    """``change`` applied to all that is in lists, tuples and dicts."""
    if isinstance(value, dict):
        return {key: _map(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, 'to'):  # as a PackedSequence has
        parts = [_map(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    return change(value)


def _tensors(batch):
    leaves = []
    _map(leaves.append, batch)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def mix_seeds(*numbers):
    """A 63-bit seed made of several numbers. (Zeros at the end don't count.)"""
    sequence = np.random.SeedSequence([int(number) % 2**64 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def _new_seed():
    """Drawn from torch's generator, which stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return _from_all(int(torch.randint(2**31, ())))[0]


@contextlib.contextmanager
def _random_numbers(seed, generators):
    """Inside, those of torch, numpy and random follow from the seed. Afterwards these, and the
    ``generators``, go on as if nothing had been drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    states = [(generator, generator.get_state()) for generator in generators]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # which for devices that are not here takes as long as a step
            torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            for generator, state in states:
                generator.set_state(state)


@contextlib.contextmanager
def _in_mode(modules, training):
    """In training or evaluation mode; afterwards each layer is in the mode that it had before."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        for module in modules:
            module.train(training)
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


# --- processes -----------------------------------------------------------------------------------

def _join_processes():
    """Where torchrun has started this process, it becomes one of its group."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(find_device())
        dist.init_process_group()
        # Its threads can crash the exit.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _world_size() > 1 else 0


def _from_all(value):
    """What each process has, in the order of their ranks, on the CPU."""
    if _world_size() == 1:
        return [value]
    values = [None] * _world_size()
    on_cpu = _map(lambda part: part.to('cpu') if hasattr(part, 'to') else part, value)
    dist.all_gather_object(values, on_cpu)
    return values


def _average_gradients(optimizer, batches):
    """The mean over the batches and the processes. Who has no gradient, as its batch did not use a
    layer, counts as zero. Where nobody has one, there stays none, and the optimizer leaves that
    layer alone."""
    parameters = [p for p in _parameters(optimizer) if p.requires_grad]
    of_all = _from_all([p.grad is not None for p in parameters])
    for parameter, *has_gradient in zip(parameters, *of_all):
        if not any(has_gradient):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if _world_size() > 1:
            dist.all_reduce(parameter.grad)
        parameter.grad /= batches * _world_size()


class _Share(td.RandomSampler):
    """Samples in random order, each at most once; of each batch, every process has its share."""

    def __iter__(self):
        processes = _world_size()
        return itertools.islice(super().__iter__(), _rank(), len(self) * processes, processes)

    def __len__(self):
        return len(self.data_source) // _world_size()


@contextlib.contextmanager
def _interrupts_wait():
    """Ctrl-C is answered afterwards, and by this process alone: workers that start inside inherit
    that it waits. Else a press in the middle of a fork is lost, or ends a worker."""
    pressed = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    except ValueError:  # not in the main thread, which alone gets interrupts
        yield
        return
    masked = hasattr(signal, 'pthread_sigmask')  # which workers that are not forked inherit
    if masked:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


# --- messages and files --------------------------------------------------------------------------

def _whole(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number, {least} or more, got {value!r}')
    return int(value)


def _some(names):
    return ', '.join(names[:5]) + (' ...' if len(names) > 5 else '')


def _say(text):
    if _rank() == 0:
        with tqdm.external_write_mode():  # above the progress bar
            print(text, flush=True)


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


def _as_bytes(state):
    """What `torch.save` writes. Into a file it would write on after an interrupt, and could abort
    the process."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:  # which torch can make of an interrupt
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    return buffer.getbuffer()


def _unpickled(file, device='cpu'):
    """What is in a file of `torch.save`. Numpy's numbers and arrays are needed by old histories."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    known = [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]
    for core in ('numpy.core', 'numpy._core'):
        known.append((scalar, f'{core}.multiarray.scalar'))
        known.append((array, f'{core}.multiarray._reconstruct'))
    with torch.serialization.safe_globals(known):
        return torch.load(file, map_location=device, weights_only=True)


def _stamp(path):
    """Which file it is, as each checkpoint is a new one; None if there is none."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino, os.stat(path).st_mtime_ns


def _free_name(path):
    """The name of a copy, path.old or path.old2 and so on, that is not there yet."""
    names = (f'{path}.old{number or ""}' for number in (0, *range(2, 10**6)))
    return next(name for name in names if not os.path.exists(name))


def load_checkpoint(path, device='cpu', keys=KEYS):
    """A checkpoint of `Experiment` as a dict: ``Net``, ``Optimizer``, ``History`` and more. Nothing
    in it is executed: it is read with ``weights_only``. RuntimeError says what is wrong with the
    file."""
    advice = 'Restore it from a copy, or move it away to start from scratch.'
    try:
        checkpoint = _unpickled(path, device)
    except FileNotFoundError:
        raise RuntimeError(f'there is no checkpoint {path}') from None
    except Exception as error:  # of a damaged pickle it can be any
        danger = 'GLOBAL' in str(error)
        what = 'holds objects that could run code' if danger else 'is damaged or no checkpoint'
        raise RuntimeError(f'{path} {what} and was not loaded. {advice} '
                           f'({type(error).__name__}: {error})') from error
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        found = type(checkpoint).__name__
        if isinstance(checkpoint, dict):
            found = sorted(map(str, checkpoint))
        raise RuntimeError(f'{path} is a file of another program: it has {found}, not '
                           f'{", ".join(sorted(keys))}. {advice}')
    if checkpoint.get('Format', 1) > FORMAT:
        raise RuntimeError(f'{path} was written by a newer nntools (format {checkpoint["Format"]}, '
                           f'this one reads up to {FORMAT}): get the newer nntools.py')
    return checkpoint
