"""The house has its rules: who imports whom, and how long a file may be."""
import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import v4

import denoising_utils as du

HERE = Path(__file__).resolve().parents[1]
NOTEBOOK = HERE / 'Assignment4.ipynb'
OURS = {'nntools', 'denoising_utils', 'programs', 'tests'}
MODULES = [HERE / 'nntools.py', HERE / 'denoising_utils.py']
PROGRAMS = sorted(HERE.glob('programs/*.py'))
TESTS = sorted(HERE.glob('tests/*.py'))


def tree(file):
    return ast.parse(file.read_text(encoding='utf-8'), str(file))


def imported(parsed):
    """The names of ours that the code imports, also inside of functions."""
    names = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'a relative import in line {node.lineno}'
            names.append(node.module)
    return {name.split('.')[0] for name in names} & OURS


def code_of_the_notebook():
    """Its code cells as one program, without the lines that only a notebook understands."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = '\n'.join(cell.source for cell in cells if cell.cell_type == 'code')
    return re.sub(r'^[%!].*', '', code, flags=re.MULTILINE)


# --- who imports whom -----------------------------------------------------------------------------

def test_nntools_imports_nothing_of_ours():
    assert imported(tree(HERE / 'nntools.py')) == set()


def test_denoising_utils_imports_only_nntools():
    assert imported(tree(HERE / 'denoising_utils.py')) == {'nntools'}


def test_the_notebook_imports_only_the_two_modules():
    assert imported(ast.parse(code_of_the_notebook())) == {'nntools', 'denoising_utils'}


def test_only_programs_and_tests_import_programs():
    """And programs don't import tests. There are no other files that could."""
    assert set(HERE.glob('*.py')) == set(MODULES)
    for file in PROGRAMS:
        assert 'tests' not in imported(tree(file)), file


# --- sizes and names ------------------------------------------------------------------------------

def test_no_file_is_too_long():
    limits = {HERE / 'README.md': 160, HERE / 'denoising_utils.py': 900,
              HERE / 'nntools.py': 1580}
    limits |= dict.fromkeys(PROGRAMS, 400) | dict.fromkeys(TESTS, 500)
    lengths = {file: len(file.read_text(encoding='utf-8').splitlines()) for file in limits}
    assert {file.name: lengths[file] for file in limits if lengths[file] > limits[file]} == {}


def test_no_test_changes_the_path():
    """``pythonpath`` in pyproject.toml makes the checkout importable."""
    found = []
    for file in TESTS:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == 'sys.path':
                found.append(f'{file.name}:{node.lineno}')
    assert found == []


def test_names_of_tests_are_short():
    found = []
    for file in TESTS:
        for node in ast.walk(tree(file)):
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith('test_')
            if is_test and len(node.name) >= 60:
                found.append(f'{file.name}:{node.lineno} {node.name}')
    assert found == []


# --- programs -------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    file.stem for file in PROGRAMS if '\ndef main(' in file.read_text(encoding='utf-8')])
def test_each_program_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f'programs.{name}').main(['--help'])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f'usage: python -m programs.{name} '), said


def test_the_old_commands_name_the_new_ones():
    words = [sys.executable, '-m', 'denoising_utils', 'train', '--net', 'dncnn']
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=300)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2 and 'python -m programs.train' in line


@pytest.mark.parametrize('command, program', [
    ('fetch', 'fetch'), ('train', 'train'), ('denoise', 'denoise'), ('example', 'picture'),
    ('evaluate', 'results evaluate'), ('levels', 'results levels'), ('bm3d', 'results bm3d'),
    ('ablation', 'results ablation')])
def test_each_old_command_has_a_new_one(command, program, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['denoising_utils', command])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / 'denoising_utils.py'), run_name='__main__')
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f'python -m programs.{program}')
    assert (HERE / 'programs' / f'{program.split()[0]}.py').is_file()


# --- a folder with the notebook -------------------------------------------------------------------

def first_parts(count):
    """The notebook up to the heading of the part after these."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    following = re.compile(rf'^#+ {count + 1}\. ', re.MULTILINE)
    ends = [k for k, cell in enumerate(notebook.cells)
            if cell.cell_type == 'markdown' and following.search(cell.source)]
    notebook.cells = notebook.cells[:ends[0]]
    return notebook


def test_the_notebook_runs_in_a_folder_of_its_own(tmp_path, monkeypatch, request):
    """With the two modules and checkpoints/ beside it, as on Colab or in a student's download."""
    folder = tmp_path / 'alone'
    folder.mkdir()
    for file in [NOTEBOOK, *MODULES]:
        shutil.copy(file, folder)
    shutil.copytree(HERE / 'checkpoints', folder / 'checkpoints')
    monkeypatch.setenv('BSDS300', str(photographs_or_others(request, tmp_path)))
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
    monkeypatch.delenv('PYTHONPATH', raising=False)

    notebook = first_parts(3)
    notebook.cells.append(v4.new_code_cell('print([nt.__file__, du.__file__])'))
    NotebookClient(notebook, timeout=300, kernel_name='python3',
                   resources={'metadata': {'path': folder}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert len(code) > 5 and all(cell.execution_count for cell in code)
    found = ast.literal_eval(code[-1].outputs[0].text)
    assert [Path(file).parent.resolve() for file in found] == 2 * [folder.resolve()]


def photographs_or_others(request, tmp_path):
    """The folder of BSDS300, or, where it is not at hand, one of the photographs that stand in."""
    try:
        return request.getfixturevalue('photographs')
    except pytest.skip.Exception:
        return du.sample_photographs(tmp_path / 'photographs')
