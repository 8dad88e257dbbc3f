"""nntools: killed and interrupted processes, and two programs on one folder."""

import json
import subprocess
import sys
import time

import pytest

from tests.helpers import CHECKOUT, content, end, forks, make, same

PROGRAM = [sys.executable, '-m', 'tests.trainings']


def trainings(name, folder, count):
    """What the program says of so many kills, presses or starts, as a dict."""
    done = subprocess.run([*PROGRAM, name, str(folder), str(count)], cwd=CHECKOUT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@forks
def test_killed_processes_end_as_if_they_had_not_been(tmp_path):
    result = trainings('kills', tmp_path, 33)
    assert result['kills'] >= 33 and result['in writing'] >= 12 and result['trainings'] >= 4, result


@forks
def test_two_presses_of_ctrl_c_change_nothing(tmp_path):
    """Real signals in real processes, at 40 random moments, 3 to 90 ms apart.

    Some run on, some start anew.
    """
    result = trainings('presses', tmp_path, 40)
    assert result['double presses'] >= 40 and result['trainings'] >= 4, result


@forks
def test_a_folder_in_use(tmp_path):
    make(tmp_path)  # the folder is there
    child = subprocess.Popen([*PROGRAM, 'hold', str(tmp_path)], cwd=CHECKOUT)
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
def test_two_that_start_at_once(tmp_path):
    """Neither meets a damaged file; what is there afterwards is the training of one."""
    said = trainings('starts', tmp_path, 2)['said']
    # The last: it read the checkpoint of an epoch before the other one had finished, and found the
    # folder free again.
    ends = 'Finish training for 4', 'is in use', 'trained by another experiment'
    for text in said:
        assert any(words in text for words in ends), said
    exp, whole = make(tmp_path / 'shared'), make(tmp_path / 'whole')
    whole.run(4)
    assert exp.epoch == 4 and same(end(exp), end(whole))


WITHOUT_UNIX = '''
import importlib, os, sys

for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
del os.fork
folder, *modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
sys.modules['tests.helpers'].make(folder).run(1)
'''


def test_the_tests_import_without_the_modules_of_unix(tmp_path):
    files = sorted((CHECKOUT / 'tests').glob('test_*.py'))
    modules = [f'tests.{file.stem}' for file in files
               if 'tests.helpers' in file.read_text(encoding='utf-8')]
    assert len(modules) > 20
    done = subprocess.run([sys.executable, '-c', WITHOUT_UNIX, str(tmp_path), *modules],
                          cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
