"""nntools: checkpoints that are damaged, foreign or dangerous."""

import os
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nntools as nt
from tests.helpers import Net, content, cosine, end, make, same


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/executed',)

    exp = make(tmp_path / 'a')
    state = exp.state_dict() | {'Extra': Evil()}
    torch.save(state, exp.checkpoint_path)
    saved = content(tmp_path / 'a')
    with pytest.raises(
        RuntimeError, match='holds objects that could run code and was not loaded.*Restore'
    ):
        make(tmp_path / 'a')
    assert not (tmp_path / 'executed').exists() and content(tmp_path / 'a') == saved
    torch.load(exp.checkpoint_path, weights_only=False)  # the test would notice
    assert (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda p, s: p.write_bytes(s[:len(s) // 2]), 'is damaged or no checkpoint'),
        (lambda p, s: p.write_bytes(s[:-1]), 'is damaged or no checkpoint'),
        (lambda p, s: p.write_bytes(b''), 'is damaged or no checkpoint'),
        (lambda p, s: p.write_bytes(os.urandom(500)), 'is damaged or no checkpoint'),
        (lambda p, s: p.write_text('hello'), 'is damaged or no checkpoint'),
        (lambda p, s: torch.save({'model': 1}, p),
         r"file of another program: it has \['model'\], not History, Net"),
        (lambda p, s: torch.save([1], p), 'file of another program: it has list'),
        (lambda p, s: torch.save(torch.load(p) | {'Format': 99}, p),
         'newer nntools .format 99, this one reads up to 3'),
    ],
    ids=['half', 'last byte', 'empty', 'noise', 'text', 'foreign', 'list', 'newer'],
)
def test_an_unusable_checkpoint_is_never_a_fresh_start(tmp_path, damage, message):
    exp = make(tmp_path)
    exp.run(1)
    path = tmp_path / 'checkpoint.pth.tar'
    damage(path, path.read_bytes())
    saved = content(tmp_path)
    for again in (lambda: make(tmp_path), exp.load):
        with pytest.raises(RuntimeError, match=message) as error:
            again()
        assert str(path) in str(error.value)
    assert content(tmp_path) == saved


@settings(max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_are_mistaken_for_a_checkpoint(tmp_path_factory, noise, pickled):
    path = tmp_path_factory.mktemp('noise') / 'checkpoint.pth.tar'
    path.write_bytes(b'\x80\x02' * pickled + noise)
    with pytest.raises(RuntimeError, match='Restore it from a copy, or move it away'):
        nt.load_checkpoint(str(path), 'cpu')


def test_states_that_could_not_be_read_back_are_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {'object': textwrap.TextWrapper()}

        def load_state_dict(self, state):
            pass

    with pytest.raises(RuntimeError, match='(?s)holds objects that could run code.*TextWrapper'):
        make(tmp_path, also_save={'odd': Odd()})


def test_a_start_killed_at_once_leaves_no_settings(tmp_path):
    tmp_path.joinpath('config.txt').write_text('BatchSize(77)\n')
    make(tmp_path).run(1)
    assert make(tmp_path).epoch == 1


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


@pytest.mark.parametrize(
    'spoil',
    [
        lambda state: state.pop('History'),
        lambda state: state.pop('Net'),
        lambda state: state.pop('also'),
        lambda state: state.update(also={'values': torch.zeros(4)}),
        lambda state: state.update(also={}),
        lambda state: state.update(Net=Net(width=6).state_dict()),
        lambda state: state['Net'].pop('norm.running_mean'),
        lambda state: state.update(Optimizer=torch.optim.Adam(Net().out.parameters()).state_dict()),
        lambda state: state.update(Optimizer={}),
        lambda state: state.update(Scheduler={}),
        lambda state: state.update(History=5),
    ],
    ids=[
        'no history', 'no net', 'nothing of also_save', 'other also_save', 'empty also_save',
        'other net', 'a buffer is missing', 'other optimizer', 'no groups', 'odd scheduler',
        'odd history'],
)
def test_load_state_dict_changes_nothing_when_it_raises(tmp_path, spoil):
    def build(name):
        return make(
            tmp_path / name, scheduler=cosine(5),
            also_save={'also': Stubborn(), 'second': Stubborn()})

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


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))
    exp = make('~/exp')
    exp.run(1)
    assert (tmp_path / 'home' / 'exp' / 'checkpoint.pth.tar').exists()
    assert not (tmp_path / '~').exists()
    assert Path(exp.checkpoint_path).is_absolute()
