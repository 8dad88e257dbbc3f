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

import nntools as nt

HERE = Path(__file__).resolve().parent.parent
WORKFLOW = HERE / '.github' / 'workflows' / 'test.yml'


def python(*words, **environment):
    """Runs this Python in a process of its own, in the checkout. Returns what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=HERE, env=os.environ | environment, capture_output=True,
                          text=True, encoding='utf-8', timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- versions -------------------------------------------------------------------------------------

def test_the_lowest_versions_are_the_same_everywhere():
    """``make test-lowest`` tests those of requirements.txt."""
    requirements = dict(re.findall(r'^([\w-]+)>=([\d.]+)', (HERE / 'requirements.txt').read_text(), re.MULTILINE))
    project = (HERE / 'pyproject.toml').read_text(encoding='utf-8')
    dependencies = re.findall(r'"([\w-]+)>=([\d.]+)"', re.search(r'^dependencies = (.*)$', project, re.MULTILINE)[1])
    assert len(dependencies) > 4 and dict(dependencies).items() <= requirements.items()
    for package in ('torch', 'numpy'):
        assert re.search(rf'{package} \(?{re.escape(requirements[package])} or newer', nt.__doc__)


LIVE_FIGURE = """
import matplotlib.pyplot as plt
import torch
import denoising_utils as du
import nntools as nt
data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8, 3, 16, 16))
net = du.DnCNN(0, C=2)
exp = nt.Experiment(net, data, data, torch.optim.Adam(net.parameters()), du.DenoisingStatsManager(), batch_size=4)
fig, axes = plt.subplots(2, 2)
exp.run(2, plot=lambda exp: du.plot(exp, fig, axes, data[0][0], visu_rate=1))
"""


def test_the_live_figure_is_a_picture(tmp_path, monkeypatch):
    """nbval takes the text <Figure size ...>, which old versions of matplotlib show instead, for the same."""
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
    monkeypatch.setenv('PYTHONPATH', str(HERE))
    notebook = v4.new_notebook(cells=[v4.new_code_cell(LIVE_FIGURE)])
    NotebookClient(notebook, timeout=200, kernel_name='python3', resources={'metadata': {'path': tmp_path}}).execute()
    nbformat.validate(notebook)
    data = [output.get('data', {}) for output in notebook.cells[0].outputs]
    figures = [kinds for kinds in data if kinds.get('text/plain', '').startswith('<Figure')]
    assert len(figures) == 1 and len(figures[0].get('image/png', '')) > 10_000, data


# --- systems --------------------------------------------------------------------------------------

def test_all_tests_can_be_collected_and_some_run_without_what_only_posix_has():
    listed = python('-m', 'pytest', '-p', 'tests.as_on_windows', '-q', '--collect-only', 'tests')
    for file in sorted(HERE.glob('tests/test_*.py')):
        assert file.name == 'test_browser.py' or f'{file.name}::' in listed, listed
    said = python('-m', 'pytest', '-p', 'tests.as_on_windows', '-rs', 'tests/test_nntools_resume.py',
                  'tests/test_denoising.py', '-k', 'killed or memory or network or download')
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
    train_set, test_set = (du.NoisyBSDSDataset(photographs, mode, 32) for mode in ('train', 'test'))
    exp = nt.Experiment(net, train_set, test_set, torch.optim.Adam(net.parameters()), du.DenoisingStatsManager(),
                        output_dir, batch_size=2, num_workers=int(workers))
    before = exp.evaluate()
    exp.run(1)
    print(before, exp.epoch)
"""


def test_workers_that_are_spawned(tmp_path):
    """As on Windows and macOS: they get the data set pickled, and import the program anew."""
    from denoising_utils import sample_photographs
    photographs = sample_photographs(tmp_path / 'photographs')
    (tmp_path / 'program.py').write_text(SPAWNED)
    alone, with_workers = (
        python(tmp_path / 'program.py', photographs, tmp_path / workers, workers, PYTHONPATH=str(HERE)).splitlines()[-1]
        for workers in '01')
    assert alone == with_workers and alone.endswith(' 1')


def test_a_checkpoint_that_another_program_has_open(tmp_path, monkeypatch):
    """On Windows such a file can't be replaced: nothing is lost, and the next attempt works."""
    net = torch.nn.Linear(2, 2)
    net.criterion = torch.nn.functional.mse_loss
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 2))
    exp = nt.Experiment(net, data, data, torch.optim.SGD(net.parameters(), lr=0.1), nt.StatsManager(),
                        tmp_path / 'exp', batch_size=2)
    exp.run(1)
    before = {file.name: file.read_bytes() for file in (tmp_path / 'exp').iterdir()}

    def replace(source, target):
        raise PermissionError(13, 'Access is denied', str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', replace)
        with pytest.raises(OSError, match='checkpoint.pth.tar.*Access is denied'):
            exp.run(3)
    assert {file.name: file.read_bytes() for file in (tmp_path / 'exp').iterdir()} == before
    exp.run(3)
    assert nt.load_checkpoint(exp.checkpoint_path)['History'] == exp.history and exp.epoch == 3


# --- GitHub ---------------------------------------------------------------------------------------

def test_the_workflow_is_valid():
    python('-m', 'check_jsonschema', '--builtin-schema', 'vendor.github-workflows', str(WORKFLOW))
    python('-m', 'check_jsonschema', '--builtin-schema', 'custom.github-workflows-require-timeout', str(WORKFLOW))


def test_the_workflow_keeps_to_what_is_safe_and_runs_what_the_readme_says():
    text = WORKFLOW.read_text(encoding='utf-8')
    assert re.findall(r'^ *permissions:\n(.*)', text, re.MULTILINE) == ['  contents: read']
    assert 'secrets' not in text and 'pull_request_target' not in text
    actions = re.findall(r'uses: (.*)', text)
    assert actions and all(re.fullmatch(r'actions/[\w/-]+@(v\d+|[0-9a-f]{40})', action) for action in actions)
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    commands = re.findall(r'run: (\.venv\\Scripts\\.*)', text)
    assert len(commands) == 5 and [c for c in commands if c.replace('--nbval-lax', '--nbval') not in readme] == []
    targets = re.findall(r'target: ([\w-]+)', text)
    makefile = (HERE / 'Makefile').read_text(encoding='utf-8')
    assert targets and all(re.search(f'^{target}:', makefile, re.MULTILINE) for target in targets)
