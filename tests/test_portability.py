"""Other versions, other systems: what is promised to people whose machine is not this one."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import v4

import denoising_utils as du
import nntools as nt

HERE = Path(__file__).resolve().parents[1]


def python(*words, **environment):
    """Runs this Python in a process of its own, in the checkout. Returns what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=HERE, env=os.environ | environment,
                          capture_output=True, text=True, encoding='utf-8', timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- versions -------------------------------------------------------------------------------------

def test_the_lowest_versions_are_the_same_everywhere():
    """``make test-lowest`` tests those of requirements.txt."""
    text = (HERE / 'requirements.txt').read_text(encoding='utf-8')
    requirements = dict(re.findall(r'^([\w-]+)>=([\d.]+)', text, re.MULTILINE))
    project = (HERE / 'pyproject.toml').read_text(encoding='utf-8')
    listed = re.search(r'^dependencies = (.*)$', project, re.MULTILINE)[1]
    dependencies = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    assert set(dependencies) == {'torch', 'numpy', 'tqdm'}
    assert dependencies.items() <= requirements.items()
    for package in ('torch', 'numpy'):
        assert re.search(rf'{package} \(?{re.escape(requirements[package])} or newer', nt.__doc__)


LIVE_FIGURE = """
import matplotlib.pyplot as plt
import torch
import denoising_utils as du
import nntools as nt
data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8, 3, 16, 16))
net = du.DnCNN(0, C=2)
adam = torch.optim.Adam(net.parameters())
exp = nt.Experiment(net, data, data, adam, du.DenoisingStatsManager(), batch_size=4)
fig, axes = plt.subplots(2, 2)
exp.run(2, plot=lambda exp: du.plot(exp, fig, axes, data[0][0], visu_rate=1))
"""


def test_the_live_figure_is_a_picture(tmp_path, monkeypatch):
    """Old versions of matplotlib show the text <Figure size ...>: to nbval that is the same."""
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
    monkeypatch.setenv('PYTHONPATH', str(HERE))
    notebook = v4.new_notebook(cells=[v4.new_code_cell(LIVE_FIGURE)])
    NotebookClient(notebook, timeout=200, kernel_name='python3',
                   resources={'metadata': {'path': tmp_path}}).execute()
    nbformat.validate(notebook)
    data = [output.get('data', {}) for output in notebook.cells[0].outputs]
    figures = [kinds for kinds in data if kinds.get('text/plain', '').startswith('<Figure')]
    assert len(figures) == 1 and len(figures[0].get('image/png', '')) > 10_000, data


# --- systems --------------------------------------------------------------------------------------

def test_all_tests_are_collected_as_on_windows():
    said = python('-m', 'pytest', '-p', 'tests.as_on_windows', '-q', '--collect-only', 'tests')
    for file in sorted(HERE.glob('tests/test_*.py')):
        assert file.name == 'test_browser.py' or f'{file.name}::' in said, said


def test_some_tests_run_as_on_windows():
    files = ['tests/test_processes.py', 'tests/test_interrupts.py', 'tests/test_photographs.py']
    said = python('-m', 'pytest', '-p', 'tests.as_on_windows', '-rs', *files,
                  '-k', 'killed or memory or network or download')
    assert 'Windows' in said and re.search(r'\d\d passed, \d+ skipped', said), said


SPAWNED = """
import sys
import torch
import denoising_utils as du
import nntools as nt

if __name__ == '__main__':
    torch.multiprocessing.set_start_method('spawn')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    photographs, output_dir, workers = sys.argv[1:]
    net = du.DnCNN(0, C=2)
    train_set = du.NoisyBSDSDataset(photographs, 'train', 32)
    test_set = du.NoisyBSDSDataset(photographs, 'test', 32)
    adam = torch.optim.Adam(net.parameters())
    exp = nt.Experiment(net, train_set, test_set, adam, du.DenoisingStatsManager(), output_dir,
                        batch_size=2, num_workers=int(workers))
    before = exp.evaluate()
    exp.run(1)
    print(before, exp.epoch)
"""


def test_workers_that_are_spawned(tmp_path):
    """As on Windows and macOS: they get the data set pickled, and import the program anew."""
    photographs = du.sample_photographs(tmp_path / 'photographs')
    program = tmp_path / 'program.py'
    program.write_text(SPAWNED)
    alone, with_workers = (
        python(program, photographs, tmp_path / workers, workers, PYTHONPATH=str(HERE))
        for workers in '01')
    assert alone.splitlines()[-1] == with_workers.splitlines()[-1]
    assert alone.splitlines()[-1].endswith(' 1')


def test_a_checkpoint_that_another_program_has_open(tmp_path, monkeypatch):
    """On Windows such a file can't be replaced: nothing is lost, and the next attempt works."""
    net = torch.nn.Linear(2, 2)
    net.criterion = torch.nn.functional.mse_loss
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    folder = tmp_path / 'exp'
    exp = nt.Experiment(net, data, data, sgd, nt.StatsManager(), folder, batch_size=2)
    exp.run(1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def replace(source, target):
        raise PermissionError(13, 'Access is denied', str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', replace)
        with pytest.raises(OSError, match='checkpoint.pth.tar.*Access is denied'):
            exp.run(3)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    exp.run(3)
    assert nt.load_checkpoint(exp.checkpoint_path)['History'] == exp.history and exp.epoch == 3
