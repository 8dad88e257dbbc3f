"""A small training helper for PyTorch: networks, statistics and resumable experiments.

Copy this one file beside your assignment. It needs Python 3.10, torch 2.6, numpy 1.26 and tqdm, or newer
ones of each. A complete use::

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
import io
import math
import operator
import os
import random
import re
import sys
import time
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.data as td
from torch import nn
from tqdm.auto import tqdm

__all__ = ['NeuralNetwork', 'StatsManager', 'Experiment', 'find_device', 'load_checkpoint', 'mix_seeds']

FORMAT = 2  # of checkpoints; those of the original helper carry no number and are read as well
KEYS = {'Net', 'Optimizer', 'History'}  # of every checkpoint


class NeuralNetwork(nn.Module, ABC):
    """A module with a loss. Subclasses define ``forward`` and ``criterion``.

    `parameters()` and `named_parameters()` show only what requires a gradient, so that an
    optimizer built from them leaves frozen layers alone. `state_dict()` holds everything.
    """

    @property
    def device(self):
        """The `torch.device` of the first parameter or buffer (the CPU if there is none)."""
        return _device_of(self)

    def named_parameters(self, *args, **kwargs):
        """As in `torch.nn.Module`, without the parameters that are frozen."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    @abstractmethod
    def forward(self, x):
        """The prediction for a batch ``x``."""

    @abstractmethod
    def criterion(self, y, d):
        """The loss of the prediction ``y`` when ``d`` was desired: a tensor with one element."""


class StatsManager:
    """The statistics of one pass over a data set; this one has the mean loss per sample.

    To measure more, extend three methods: ``init`` sets sums to zero, ``accumulate`` adds a batch to
    them, ``summarize`` turns them into a dict of numbers. Under torchrun the sums (numbers, tensors,
    arrays, or lists) are added up over the processes before ``summarize`` is called.

    Attributes: ``running_loss``, the sum of the mean losses of the batches; ``number_update``, how
    many batches; ``total_loss`` and ``number_samples``, the same counted in samples: what a mean
    should rest on, as the last batch may be shorter.
    """
    number_samples = 0  # stays 0 in a subclass of 2019 that counts only batches, by itself

    def __init__(self):
        self.init()

    def __repr__(self):
        return type(self).__name__

    def init(self):
        """Starts a new pass."""
        self.running_loss = self.total_loss = 0.0
        self.number_update = self.number_samples = 0

    def accumulate(self, loss, x=None, y=None, d=None):
        """Adds a batch: ``loss`` is its mean loss (a float), ``x`` the input (N, ...), ``y`` the
        prediction, ``d`` what was desired. Called without gradients."""
        if self.number_update == 0:
            self.total_loss, self.number_samples = 0.0, 0  # a subclass may not call this class's init
        first = next(_tensors(x), x)  # x can be a list or a dict
        samples = len(first) if getattr(first, 'ndim', 0) else 1
        self.running_loss += loss
        self.number_update += 1
        self.total_loss += loss * samples
        self.number_samples += samples

    def summarize(self):
        """The mean loss per sample (a float). Subclasses return a dict, with a key ``'loss'``."""
        if not self.number_samples:
            return self.running_loss / self.number_update
        return self.total_loss / self.number_samples


class Experiment:
    """Trains a network and keeps, in one folder, all that is needed to go on later.

    If ``output_dir`` already holds a checkpoint, it is loaded, after a check that it was made with
    the same settings. Otherwise a first one is written, at epoch 0. All arguments become attributes.

    Args:
        net: a `NeuralNetwork`, or any `torch.nn.Module` with a method ``criterion(y, d)``.
        train_set, val_set: data sets of pairs (x, d), or ready `DataLoader`s, used as they are.
            ``val_set`` may be None if nothing is to be evaluated.
        optimizer, stats_manager: a `torch.optim.Optimizer` of ``net``, a `StatsManager`.
        output_dir: the folder (default: ``experiment_`` and the time), shared by all machines.
        batch_size: samples of one optimizer step, over all processes.
        perform_validation_during_training: evaluate ``val_set`` after each epoch. The entries of
            `history` are then pairs (training summary, validation summary).
        seed: fixes batch order, dropout, noise ... of each epoch, whatever was drawn before: all
            that comes from the global generators of torch, numpy and random.
        device: ``'cuda'``, ``'mps'``, ``'cpu'``, or ``'auto'`` for the best one found, to move
            ``net`` there. By default it stays where it is.
        scheduler: of the learning rate, stepped after each epoch (`ReduceLROnPlateau` with the
            statistic ``best_by``). One for each batch: step it in `step`, and ``also_save`` it.
        grad_clip: upper bound on the norm of the gradient.
        precision: of training: ``'float32'``, ``'bfloat16'``, or ``'float16'`` (with loss scaling
            on CUDA). Evaluation is always done in the precision of the weights.
        num_workers, collate_fn, drop_last: of the loaders. ``drop_last`` concerns training;
            evaluation covers every sample unless ``drop_last_in_evaluation``.
        best_by, best_mode: a statistic, for instance ``'PSNR'``, and ``'min'`` or ``'max'``:
            ``best.pth.tar`` keeps the epoch where it was best (in validation if there is one).
        save_every: epochs between two checkpoints (the last epoch of a run is always saved).
        also_save: dict of name to what else the checkpoint should keep: a second optimizer,
            averaged weights, anything with ``state_dict`` and ``load_state_dict``.

    Raises:
        ValueError, TypeError: an argument makes no sense, or the settings conflict with those of
            the checkpoint that was found, which is left alone.
        RuntimeError: the checkpoint can't be read. OSError: the folder can't be written.
    """

    # Defaults for subclasses that make their own set-up without calling __init__.
    train_set = val_set = train_loader = val_loader = optimizer = stats_manager = None
    batch_size, num_workers, collate_fn, drop_last, drop_last_in_evaluation = 16, 0, None, True, False
    perform_validation_during_training, seed, precision, grad_clip = False, 0, 'float32', None
    scheduler, best_by, best_mode, save_every, also_save = None, None, 'min', 1, {}
    seconds, stopped, scaler = [], False, torch.amp.GradScaler(enabled=False)
    _distributed_net, _averaged, _unsaved = None, False, None

    def __init__(self, net, train_set, val_set, optimizer, stats_manager, output_dir=None,
                 batch_size=16, perform_validation_during_training=False, *, seed=0, device=None,
                 scheduler=None, grad_clip=None, precision='float32', num_workers=0,
                 collate_fn=None, drop_last=True, drop_last_in_evaluation=False, best_by=None,
                 best_mode='min', save_every=1, also_save=None):
        vars(self).update({name: value for name, value in locals().items() if name != 'self'})
        self.also_save, self.history, self.seconds = dict(also_save or {}), [], []
        self._check_arguments()
        self.seed, self.batch_size = int(seed), int(batch_size)
        _start_distributed()
        if device is not None:
            device = _device(device)
            net.to(device)
            if 'device' in vars(net):
                net.device = device
        self.device = _device_of(net)
        if precision == 'float16' and self.device.type == 'cuda':
            self.scaler = torch.amp.GradScaler('cuda')
        self.train_loader = self._loader(train_set, training=True)
        self.val_loader = None if val_set is None else self._loader(val_set)
        if _world_size() > 1:
            for tensor in net.state_dict().values():  # all start from the weights of rank 0
                dist.broadcast(tensor, 0)
            self._distributed_net = nn.parallel.DistributedDataParallel(
                net, device_ids=[self.device] if self.device.type == 'cuda' else None)

        self.output_dir = output_dir or f'experiment_{_from_rank_0(time.time())}'
        self.checkpoint_path = os.path.join(self.output_dir, 'checkpoint.pth.tar')
        self.best_path = os.path.join(self.output_dir, 'best.pth.tar')
        self.config_path = os.path.join(self.output_dir, 'config.txt')
        if _from_rank_0(os.path.isfile(self.checkpoint_path)):
            self._check_setting()
            self.load()
        else:
            self.save()
            if _rank() == 0:
                self._read(self.checkpoint_path)  # lest a training end with one that can't be read

    # --- training and evaluation -----------------------------------------------------------------

    def run(self, num_epochs, plot=None):
        """Trains until ``num_epochs`` epochs are done in all, those of earlier runs included.

        ``plot``, if given, is called with the experiment once before training and after every
        epoch: draw, log, or call `stop` there. The network is in evaluation mode meanwhile.

        On an interrupt or an error, the experiment falls back to the last epoch that was finished,
        and the exception goes on to the caller: a new call of ``run`` continues from there. A loss
        that is NaN or infinite raises FloatingPointError, which names epoch and batch.
        """
        _expect_count('num_epochs', num_epochs, 0)
        _say(f'Start/Continue training from epoch {self.epoch}')
        self.stopped, self._unsaved = False, None
        if self.epoch < num_epochs:
            self.save()  # the weights may have changed since: another experiment can share them
        try:
            with tqdm(total=operator.length_hint(self.train_loader) or None, leave=False,
                      disable=not _interactive()) as bar:
                self.net.eval()
                if plot is not None:
                    plot(self)
                while self.epoch < num_epochs and not self.stopped:
                    start = time.time()
                    bar.set_description(f'Epoch {self.epoch + 1}/{num_epochs}', refresh=False)
                    summary = _plain(self._train_epoch(bar))
                    if self.perform_validation_during_training:
                        summary = (summary, _plain(self.evaluate()))
                    self.history.append(summary)
                    if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                        self.scheduler.step(self._scores()[-1])
                    elif self.scheduler is not None:
                        self.scheduler.step()
                    self.seconds = self.seconds + [time.time() - start]
                    self._keep(last=self.epoch == num_epochs)
                    _say(f'Epoch {self.epoch}/{num_epochs}: {self._line()} ({self.seconds[-1]:.2f} s)')
                    if plot is not None:
                        plot(self)
                if self._unsaved:
                    self.save()
        except BaseException as error:
            self._fall_back(error)
            raise
        _say(f'Finish training for {self.epoch} epochs')

    def _train_epoch(self, bar):
        """One pass over the training set, shown in the progress bar. Returns its summary."""
        bar.reset()
        self.net.train()
        self.stats_manager.init()
        with _randomness(self.seed, self.epoch + 1, self.train_loader):
            for number, batch in enumerate(self._batches(self.train_loader), start=1):
                loss, x, y, d = self.step(batch)
                loss = _number(loss)
                if not math.isfinite(loss):
                    raise self._not_finite(f'the loss is {loss}', number, batch)
                with torch.no_grad():
                    self.stats_manager.accumulate(loss, x, y, d)
                if not bar.disable:
                    bar.set_postfix_str(f'loss {loss:.4g}', refresh=False)
                    bar.update()
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):  # of the last update
            raise self._not_finite('weights are not finite', number, batch)
        self.net.eval()
        if _world_size() > 1:  # each process has its own batch-norm statistics: rank 0's count
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        return self._summarize()

    def step(self, batch):
        """What is done with one batch, in training and in evaluation: **the method to override**.

        ``batch`` is what the loader gives, on the network's device. Return the loss (one value),
        and the x, y, d that `StatsManager.accumulate` takes. Call the network as ``self.model(x)``,
        and call ``self.update(loss)`` where the weights are to change; it does nothing in
        evaluation. For instance, with two networks in ``self.net``, and two optimizers::

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
        with self.autocast():
            y = self.model(x)
            loss = self.net.criterion(y, d)
        self.update(loss)
        return loss, x, y, d

    def update(self, loss, optimizer=None):
        """One step of ``optimizer`` (default: the experiment's) down the gradient of ``loss``."""
        if not self.net.training:
            return
        optimizer = optimizer or self.optimizer
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self._distributed_net is not None and not self._averaged:
            for p in _parameters(optimizer):  # `loss` was not computed through `model`
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= _world_size()
        self._averaged = False
        if self.grad_clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(_parameters(optimizer), self.grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def model(self, *args, **kwargs):
        """Calls the network, as `step` should: under torchrun, training, gradients are then averaged
        over the processes while they are computed (otherwise `update` does so afterwards)."""
        if self._distributed_net is None or not self.net.training:
            return self.net(*args, **kwargs)
        self._averaged = True
        return self._distributed_net(*args, **kwargs)

    def autocast(self):
        """Context in which the forward pass is done in the chosen ``precision`` of training."""
        if self.precision == 'float32' or not self.net.training:
            return contextlib.nullcontext()
        return torch.autocast(_device_of(self.net).type, dtype=getattr(torch, self.precision))

    def evaluate(self, data=None):
        """The summary over all of ``data`` (data set or `DataLoader`; default: the validation set),
        with the network in evaluation mode. Random numbers drawn meanwhile follow from the seed alone,
        and leave those of the training and of the caller as they were."""
        loader = self.val_loader if data is None else self._loader(data)
        _expect(loader is not None, 'there is nothing to evaluate: val_set is None; pass a data set')
        self.stats_manager.init()
        with self._evaluating(loader):
            for batch in self._batches(loader):
                loss, x, y, d = self.step(batch)
                self.stats_manager.accumulate(_number(loss), x, y, d)
        return self._summarize()

    def predict(self, data):
        """The network's outputs for all of ``data``, in order: a tensor (N, ...) on the CPU. ``data``
        is a tensor of inputs (N, ...), a data set or a `DataLoader`; of pairs (x, d), x is taken.
        Under torchrun each process computes them all."""
        loader = data if isinstance(data, td.DataLoader) else td.DataLoader(
            data, self.batch_size, collate_fn=self.collate_fn)
        with self._evaluating(loader):
            return torch.cat([self.net(batch[0] if isinstance(batch, (list, tuple)) else batch).cpu()
                              for batch in self._batches(loader)])

    def stop(self):
        """Ends the run after the present epoch. To be called by the ``plot`` callback; for instance
        to stop early: ``if exp.epoch - exp.best[0] >= 10: exp.stop()``."""
        self.stopped = True

    # --- history ---------------------------------------------------------------------------------

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.history)

    @property
    def best(self):
        """(epoch, value) at which the statistic ``best_by`` (by default the loss) was best, the
        first epoch being 1; (0, nan) before it. Values that are NaN don't count."""
        scores = [(k, score) for k, score in enumerate(self._scores(), start=1) if not math.isnan(score)]
        better = max if self.best_mode == 'max' else min
        return better(scores, key=operator.itemgetter(1), default=(0, math.nan))

    def table(self):
        """The history as a list of flat dicts, one an epoch: ``epoch``, the training statistics,
        the validation statistics with ``val_`` before their names, and ``seconds``."""
        rows = []
        for k, entry in enumerate(self.history, start=1):
            pair = entry if self.perform_validation_during_training else (entry, {})
            train, val = [part if isinstance(part, dict) else {'loss': part} for part in pair]
            rows.append({'epoch': k, **train, **{f'val_{name}': value for name, value in val.items()}})
            if k <= len(self.seconds):
                rows[-1]['seconds'] = self.seconds[k - 1]
        return rows

    def to_csv(self, path):
        """Writes `table` to a CSV file."""
        text, rows = io.StringIO(), self.table()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        _write(path, lambda file: file.write(text.getvalue().encode()))

    def to_dataframe(self):
        """`table` as a pandas DataFrame, indexed by epoch. Raises ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError('to_dataframe needs pandas: pip install pandas, or use table()') from error
        return pandas.DataFrame(self.table() or {'epoch': []}).set_index('epoch')

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self):
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {'Net': self.net.state_dict(), 'Optimizer': self.optimizer.state_dict(),
                'History': self.history, 'Format': FORMAT, 'Seconds': self.seconds,
                **{name: item.state_dict() for name, item in self._also().items()}}

    def load_state_dict(self, checkpoint):
        """Takes over a state that `state_dict` returned, or one of the original helper. Raises
        ValueError, before anything is changed, if it doesn't fit network or optimizer."""
        differences = _differences(checkpoint['Net'], self.net.state_dict())
        _expect(not differences, '\n'.join(['the checkpoint is that of another network:', *differences]))
        missing = sorted(set(self.also_save) - set(checkpoint))
        _expect(not missing, f'the checkpoint has no {", ".join(missing)}, which is in also_save')
        self.optimizer.load_state_dict(checkpoint['Optimizer'])
        self.net.load_state_dict(checkpoint['Net'])
        self.history = _plain(checkpoint['History'])
        self.seconds = list(checkpoint.get('Seconds', [math.nan] * self.epoch))
        for name, item in self._also().items():
            if name in checkpoint:
                item.load_state_dict(checkpoint[name])

    def save(self, path=None):
        """Writes a checkpoint (default: ``checkpoint.pth.tar``), and beside the first one
        ``config.txt``. The file that was there stays whole until the new one is complete."""
        if _rank() == 0:
            if not (os.path.isfile(self.checkpoint_path) and os.path.isfile(self.config_path)):
                _write(self.config_path, lambda file: file.write(f'{self}\n'.encode()))
            state = self.state_dict()
            _write(path or self.checkpoint_path, lambda file: torch.save(state, file))
        if _world_size() > 1:
            dist.barrier()

    def load(self, path=None):
        """Goes back to a checkpoint (default: the last; ``exp.load(exp.best_path)``: the best).
        Raises RuntimeError if the file can't be read, and says why and what to do."""
        self.load_state_dict(self._read(path or self.checkpoint_path))

    def setting(self):
        """The settings, by name, that a checkpoint must share with the experiment that loads it.
        Subclasses may add their own; what is compared is the text of each value."""
        setting = {'Net': self.net, 'TrainSet': self.train_set, 'ValSet': self.val_set,
                   'Optimizer': self.optimizer, 'StatsManager': self.stats_manager,
                   'BatchSize': self.batch_size,
                   'PerformValidationDuringTraining': self.perform_validation_during_training}
        for name, data in (('TrainSetSize', self.train_set), ('ValSetSize', self.val_set)):
            if operator.length_hint(data):
                setting[name] = len(data)
        return setting | {'Seed': self.seed, 'Precision': self.precision,
                          'GradClip': self.grad_clip and float(self.grad_clip),
                          'Scheduler': self.scheduler and type(self.scheduler).__name__}

    def __repr__(self):
        return ''.join(f'{name}({value})\n' for name, value in self.setting().items())

    # --- helpers of the above --------------------------------------------------------------------

    def _read(self, path):
        return load_checkpoint(path, _device_of(self.net), KEYS & self.state_dict().keys())

    def _loader(self, data, training=False):
        """The loader of a data set. Each process gets its share: of every batch in training,
        of the batches in evaluation, so that no sample counts twice."""
        if isinstance(data, td.DataLoader):
            return data
        name = 'train_set' if training else 'the data set to evaluate'
        _expect(hasattr(data, '__len__') and hasattr(data, '__getitem__'),
                f'{name} must be a data set with a length (an iterable one goes in a DataLoader of '
                f'your own), got {type(data).__name__}', TypeError)
        world, rank, size = _world_size(), _rank(), self.batch_size
        drop_last = self.drop_last if training else self.drop_last_in_evaluation
        _expect(not training or size % world == 0,
                f'batch_size must be a multiple of the number of processes, {world}, got {size}')
        _expect(len(data) >= (size if drop_last else 1),
                f'{name} has {len(data)} samples, too few for one batch of {size}: '
                'lower batch_size, or keep the last short batch')
        options = dict(num_workers=self.num_workers, collate_fn=self.collate_fn,
                       pin_memory=_device_of(self.net).type == 'cuda')
        if training:
            sampler = _Shuffle(data, world, rank, seed=mix_seeds(self.seed) % 2**31, drop_last=drop_last)
            return td.DataLoader(data, size // world, sampler=sampler, drop_last=drop_last, **options)
        batches = list(td.BatchSampler(range(len(data)), size, drop_last))
        return td.DataLoader(data, batch_sampler=batches[rank::world], **options)

    def _batches(self, loader):
        """The batches of a loader, on the network's device."""
        device, batch = _device_of(self.net), None
        for batch in loader:  # which gives them on the CPU
            yield batch if device.type == 'cpu' else _to(batch, device)
        _expect(batch is not None or _world_size() > 1,
                'the data gave no batch: it is empty, or shorter than one batch that may not be short')

    @contextlib.contextmanager
    def _evaluating(self, loader):
        was_training = self.net.training
        self.net.eval()
        try:
            with torch.no_grad(), _randomness(self.seed, 0, loader):
                yield
        finally:
            self.net.train(was_training)

    def _summarize(self):
        """The summary of the pass, over all processes: what `init` sets to zero is added up."""
        if _world_size() > 1:
            stats, fresh = vars(self.stats_manager), copy.deepcopy(self.stats_manager)
            fresh.init()
            shares = [None] * _world_size()
            dist.all_gather_object(shares, _to({name: stats[name] for name in vars(fresh)}, 'cpu'))
            for name, zero in vars(fresh).items():
                parts = [share[name] for share in shares]
                if isinstance(zero, list):
                    stats[name] = zero + sum((part[len(zero):] for part in parts), [])
                elif hasattr(zero, '__add__') and not isinstance(zero, (bool, str, tuple)):
                    total = sum(parts) - (len(parts) - 1) * _to(zero, 'cpu')
                    stats[name] = _to(total, getattr(zero, 'device', 'cpu'))
        return self.stats_manager.summarize()

    def _keep(self, last):
        """Saves the epoch just done. The best goes first: if a kill comes between the two, the
        epoch is done again, and both are written again."""
        if self.best_by is not None and self.best[0] == self.epoch:
            self.save(self.best_path)
        saved = last or self.epoch % self.save_every == 0
        if saved:
            self.save()
        self._unsaved = None if saved else copy.deepcopy(self.state_dict())

    def _fall_back(self, error):
        """Returns to the last epoch that was finished."""
        if self._unsaved:
            self.load_state_dict(self._unsaved)
        elif os.path.isfile(self.checkpoint_path):
            self.load()
        self.net.eval()
        _say(f'{type(error).__name__}: back to epoch {self.epoch}, the last one finished. '
             'Call run again to go on from there.')

    def _scores(self):
        """The statistic ``best_by`` of each epoch, in validation if there is one."""
        rows, name = self.table(), self.best_by or 'loss'
        column = f'val_{name}' if self.perform_validation_during_training else name
        _expect(all(column in row for row in rows), f'there is no statistic {name!r}: the stats manager '
                f'returned {self.history[-1:]}; set best_by to one that it returns')
        return [float(row[column]) for row in rows]

    def _line(self):
        """The last entry of the history as text."""
        return ', '.join(f'{name} {value:.4g}' for name, value in self.table()[-1].items()
                         if name not in ('epoch', 'seconds') and isinstance(value, (int, float)))

    def _not_finite(self, what, number, batch):
        hint = ('the data of that batch is finite: a lower learning rate or grad_clip may help'
                if all(torch.isfinite(tensor).all() for tensor in _tensors(batch)) else
                'the batch itself holds values that are not finite: mend the data')
        return FloatingPointError(f'{what} in epoch {self.epoch + 1}, batch {number}; {hint}')

    def _also(self):
        """What the checkpoint keeps beside network and optimizer."""
        more = {'Scheduler': self.scheduler} if self.scheduler is not None else {}
        more |= {'Scaler': self.scaler} if self.scaler.is_enabled() else {}
        return more | self.also_save

    def _check_setting(self):
        """Raises ValueError if the settings differ in meaning from those that are stored. What only
        one side knows (from another version of this file) is not compared."""
        checkpoint = self._read(self.checkpoint_path)
        conflicts = _differences(checkpoint['Net'], self.net.state_dict()) if 'Net' in checkpoint else []
        stored, given = {}, _split_setting(f'{self}\n')
        if os.path.isfile(self.config_path):
            with open(self.config_path, encoding='utf-8', errors='replace') as file:
                stored = _split_setting(file.read())
        if 'BatchSize' not in stored:
            _say(f'{self.config_path} can not be read: only the parameters of the network are compared')
        conflicts += [f'  {name}: stored {stored[name]}, given {given[name]}' for name in given
                      if name in stored and not _same_setting(stored[name], given[name])]
        _expect(not conflicts, '\n'.join([
            f'{self.output_dir} holds a checkpoint made with other settings:', *conflicts,
            'Use the stored settings to go on, or another output_dir to start anew.']))

    def _check_arguments(self):
        """Raises TypeError or ValueError for what can't work, before anything is made or written."""
        net, optimizer, stats = self.net, self.optimizer, self.stats_manager
        kind = type(net).__name__
        _expect(isinstance(net, nn.Module), f'net must be a torch.nn.Module, got {kind}', TypeError)
        _expect(hasattr(net, 'criterion') or type(self).step is not Experiment.step,
                f'net must have a method criterion(y, d), its loss: {kind} has none', TypeError)
        _expect(_has(optimizer, 'step', 'zero_grad', 'param_groups'),
                f'optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__} (the order '
                'is net, train_set, val_set, optimizer, stats_manager)', TypeError)
        _expect(_has(stats, 'init', 'accumulate', 'summarize'),
                f'stats_manager must be a StatsManager, got {stats!r}', TypeError)
        own = {id(p) for _, p in nn.Module.named_parameters(net)}
        _expect(any(id(p) in own for p in _parameters(optimizer)),
                'optimizer holds no parameter of net: build it from net.parameters()')
        _expect(getattr(self.scheduler, 'optimizer', optimizer) is optimizer,
                'scheduler belongs to another optimizer: build it from the one given here')
        for name, least in (('batch_size', 1), ('num_workers', 0), ('save_every', 1), ('seed', 0)):
            _expect_count(name, getattr(self, name), least)
        clip = self.grad_clip
        _expect(clip is None or isinstance(clip, (int, float)) and clip > 0,
                f'grad_clip must be a number, more than 0, got {clip!r}')
        for name, value, words in (('precision', self.precision, ('float32', 'bfloat16', 'float16')),
                                   ('best_mode', self.best_mode, ('min', 'max'))):
            _expect(value in words, f'{name} must be one of {words}, got {value!r}')
        _expect(self.val_set is not None or not self.perform_validation_during_training,
                'perform_validation_during_training needs a val_set, got None')
        for name, item in self.also_save.items():
            _expect(_has(item, 'state_dict', 'load_state_dict'),
                    f'also_save[{name!r}] has no state_dict: got {type(item).__name__}', TypeError)
            _expect(name not in KEYS | {'Format', 'Seconds', 'Scheduler', 'Scaler'},
                    f'also_save[{name!r}] needs another name: the checkpoint has that one already')


# --- checks --------------------------------------------------------------------------------------

def _expect(condition, message, error=ValueError):
    if not condition:
        raise error(message)


def _expect_count(name, value, least):
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    _expect(whole and value >= least, f'{name} must be a whole number, {least} or more, got {value!r}')


def _has(item, *names):
    return not isinstance(item, type) and all(hasattr(item, name) for name in names)


# --- device, random numbers, processes -----------------------------------------------------------

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
    _expect(device.type not in here or here[device.type](),
            f"device {name!r} is not available here; use device='auto' for the best one that is")
    return device


def _device_of(net):
    """Where a network is: where it says, else where its first parameter or buffer is."""
    if not isinstance(net, NeuralNetwork) and getattr(net, 'device', None) is not None:
        return torch.device(net.device)
    for tensor in (t for f in (nn.Module.named_parameters, nn.Module.named_buffers) for _, t in f(net)):
        return tensor.device
    return torch.device('cpu')


def _tensors(batch):
    """The tensors in a batch of lists, tuples and dicts, one after the other."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, dict)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)


def _parameters(optimizer):
    """The parameters of all groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group['params']]


def _number(loss):
    """A loss as a float."""
    return loss.item() if isinstance(loss, torch.Tensor) else float(loss)


def _to(batch, device):
    """A batch (tensors in lists, tuples, dicts) moved to a device; anything else stays."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=batch.device.type == 'cpu')  # the way back must wait
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, '_fields') else type(batch)(moved)
    return batch.to(device) if hasattr(batch, 'to') else batch


class _Shuffle(td.DistributedSampler):
    """Its order is a function of (seed, epoch); who iterates without `set_epoch` gets new ones, too."""

    def __iter__(self):
        order = super().__iter__()
        self.epoch += 1
        return order


def mix_seeds(*numbers):
    """A 63-bit seed made of several numbers, unlike that of any other combination."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0]) >> 1


@contextlib.contextmanager
def _randomness(seed, epoch, loader):
    """All random numbers drawn inside follow from (seed, epoch); those outside are unaffected."""
    seed = mix_seeds(seed, epoch, _rank())
    batch_sampler = getattr(loader, 'batch_sampler', None)
    samplers = getattr(loader, 'sampler', None), getattr(batch_sampler, 'sampler', None)
    owners = [loader, batch_sampler, *samplers]
    for owner in owners:
        if epoch > 0 and hasattr(owner, 'set_epoch'):
            owner.set_epoch(epoch - 1)
    if getattr(loader, 'persistent_workers', False):
        loader._iterator = None  # workers that persist would go on with the numbers of the last epoch
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator in {getattr(owner, 'generator', None) for owner in owners} - {None}:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _start_distributed():
    """Joins the processes that torchrun started, once."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(find_device())
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _world_size() > 1 else 0


def _from_rank_0(value):
    """The value that rank 0 has: all processes must decide alike."""
    values = [value]
    if _world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _interactive():
    """Whether somebody is watching: a terminal or a notebook, and neither CI nor TQDM_DISABLE."""
    if os.environ.get('CI') or os.environ.get('TQDM_DISABLE') or _rank() > 0:
        return False
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    return hasattr(shell, 'kernel') or sys.stderr.isatty()


def _say(text):
    if _rank() == 0:
        with tqdm.external_write_mode():  # above the progress bar
            print(text, flush=True)


# --- history and settings ------------------------------------------------------------------------

def _plain(value):
    """Statistics as plain Python: numbers from tensors and numpy, lists from arrays."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'summarize must return numbers, got a {type(value).__name__}')


def _split_setting(text):
    """``config.txt`` as a dict of name to text: of objects without memory address and module, of
    networks only the class (torch prints layers anew; their parameters are compared apart)."""
    text = re.sub(r'<\S*?(\w+) object at 0x\w+>', r'<\1 object>', text)
    pieces = re.split(r'^(\w+)\(', re.sub(r' at 0x\w+', '', text), flags=re.MULTILINE)[1:]
    setting = {name: value.strip()[:-1].strip() for name, value in zip(pieces[::2], pieces[1::2])}
    return {name: re.sub(r'^(\w+)\(\n  \(.*', r'\1', value, flags=re.DOTALL)
            for name, value in setting.items()}


def _same_setting(stored, given):
    """Whether two texts mean the same, in what both know: torch adds options with each version."""
    stored, given = _meaning(stored), _meaning(given)
    return len(stored) == len(given) and all(
        a[key] == b[key] for a, b in zip(stored, given) for key in a.keys() & b.keys())


def _meaning(text):
    """The words of a setting; of an optimizer its class, then its initial hyperparameters by group."""
    head, *groups = text.split('Parameter Group')
    meaning = [{'words': head.replace('(', ' ').split() if groups else text.split()}]
    for group in groups:
        options = {}
        for name, word in re.findall(r'^\s+(\w+): (.*?)\s*$', group, flags=re.MULTILINE):
            with contextlib.suppress(ValueError, SyntaxError):
                word = ast.literal_eval(word)  # 0 is 0.0
            options[name] = word
        options['lr'] = options.pop('initial_lr', options.get('lr'))  # a scheduler changes the other
        meaning.append(options)
    return meaning


def _differences(stored, given):
    """In which parameters two networks differ: a line for each of the first ten."""
    a, b = ({name: tuple(value.shape) for name, value in state.items()
             if not name.endswith('num_batches_tracked')} for state in (stored, given))
    return [f'  {name}: stored {a.get(name, "nothing")}, given {b.get(name, "nothing")}'
            for name in a | b if a.get(name) != b.get(name)][:10]


# --- files ---------------------------------------------------------------------------------------

def _write(path, write):
    """Calls ``write(file)`` and puts the result at ``path`` at once: all of it, or nothing."""
    temporary = f'{path}.tmp'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f'could not write {path} ({error}); what was saved before is untouched. '
                      'Check that the disk has room and the folder is writable.') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_checkpoint(path, device='cpu', keys=KEYS):
    """A checkpoint from disk. Nothing in it is executed: it is read with ``weights_only``."""
    advice = 'Restore it from a copy, or move it away to start from scratch.'
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RuntimeError(f'there is no checkpoint {path}') from None
    except Exception as error:  # of a damaged pickle it can be any
        code = 'GLOBAL' in str(error)
        what = 'holds objects that could run code' if code else 'is damaged or no checkpoint'
        why = str(error).split('WeightsUnpickler error: ')[-1].split('. Please')[0][:200]
        raise RuntimeError(f'{path} {what} and was not loaded ({why or type(error).__name__}). '
                           f'{advice}') from error
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    _expect(isinstance(checkpoint, dict) and keys <= checkpoint.keys(),
            f'{path} is a file of another program: it has {found}, not {", ".join(sorted(keys))}. '
            f'{advice}', RuntimeError)
    number = checkpoint.get('Format', 1)
    _expect(number <= FORMAT, f'{path} was written by a newer nntools (format {number}, this one reads '
            f'up to {FORMAT}): get the newer nntools.py', RuntimeError)
    return checkpoint


def _numpy_scalars():
    """What the unpickler needs for numpy's numbers and arrays, which old histories have."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')
            for function, name in ((scalar, 'scalar'), (array, '_reconstruct'))] + [
        (codecs.encode, '_codecs.encode'), np.dtype, np.ndarray,
        *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]
