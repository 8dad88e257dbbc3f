"""What students are given: stubs that say what to write, and no answers."""
import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import v4

import denoising_utils as du
from programs import release, release_notebook

HERE = Path(__file__).resolve().parents[1]
PLAN = release.read_plan()
STAGES = [stage.number for stage in PLAN.stages]
SOURCE = (HERE / 'denoising_utils.py').read_text(encoding='utf-8')


@pytest.fixture(scope='module', params=STAGES)
def stage(request):
    return PLAN.stage(request.param)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The folders of all stages, by number."""
    parent = tmp_path_factory.mktemp('released')
    for number in STAGES:
        release.release(number, parent / str(number))
    return {number: parent / str(number) for number in STAGES}


@pytest.fixture
def copy(folders, stage, tmp_path):
    """A folder of a stage, to be changed."""
    return shutil.copytree(folders[stage.number], tmp_path / 'copy')


@pytest.fixture(scope='module')
def solved():
    return nbformat.read(HERE / 'Assignment4.ipynb', as_version=4)


def run(folder, *words):
    """A program of Python in a folder: its exit status, and all that it says."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    return done.returncode, done.stdout + done.stderr


def on_one_line(text):
    return re.sub(r'\s+', ' ', text)


# --- the plan ------------------------------------------------------------------------------------

def test_points_make_a_hundred():
    by_hand = sum(part.points for part in PLAN.parts.values())
    assert by_hand + sum(one.points for one in PLAN.definitions) == 100


def test_stages_have_all_parts_once():
    parts = [part for stage in PLAN.stages for part in range(stage.parts[0], stage.parts[1] + 1)]
    assert parts == list(range(1, 24))


# --- stubs ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stubs(folders):
    """The utilities of the first stage, where all is to be written, as a module."""
    file = folders[1] / 'denoising_utils.py'
    spec = importlib.util.spec_from_file_location('stubs', file)
    module = importlib.util.module_from_spec(spec)
    sys.modules['stubs'] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules['stubs']


@pytest.mark.parametrize('definition', PLAN.definitions, ids=lambda one: one.name)
def test_a_stub_says_what_to_write(stubs, definition):
    *owner, name = definition.name.split('.')
    found = inspect.getattr_static(getattr(stubs, *owner) if owner else stubs, name)
    function = getattr(found, 'fget', None) or getattr(found, '__func__', found)
    arguments = [None for parameter in inspect.signature(function).parameters.values()
                 if parameter.default is parameter.empty]
    words = f'part {definition.part}: write {re.escape(definition.name)}$'
    with pytest.raises(NotImplementedError, match=words):
        function(*arguments)


def test_stubs_keep_their_signatures():
    theirs = release.find_definitions(release.cut(SOURCE, PLAN.definitions))
    ours = release.find_definitions(SOURCE)
    for definition in PLAN.definitions:
        stub, node = theirs[definition.name], ours[definition.name]
        assert ast.unparse(stub.args) == ast.unparse(node.args), definition.name
        assert [*map(ast.unparse, stub.decorator_list)] == [*map(ast.unparse, node.decorator_list)]


def test_the_rest_stays_as_it_is():
    """With the solution put back in place of the stubs, the file is that of the solution."""
    lines = release.cut(SOURCE, PLAN.definitions).splitlines(keepends=True)
    solution = SOURCE.splitlines(keepends=True)
    theirs, ours = release.find_definitions(''.join(lines)), release.find_definitions(SOURCE)
    for one in sorted(PLAN.definitions, key=lambda one: -theirs[one.name].lineno):
        stub, node = theirs[one.name], ours[one.name]
        lines[stub.lineno - 1:stub.end_lineno] = solution[node.lineno - 1:node.end_lineno]
    assert ''.join(lines) == SOURCE


def test_earlier_stages_are_solved(folders, stage):
    source = (folders[stage.number] / 'denoising_utils.py').read_text(encoding='utf-8')
    for definition in PLAN.definitions:
        stub = f'part {definition.part}: write {definition.name}' in source
        assert stub == stage.leaves_open(definition.part), definition.name


def test_a_name_that_is_not_there_is_named():
    wrong = dataclasses.replace(PLAN.definitions[0], name='DnCNN.backward')
    with pytest.raises(ValueError, match='DnCNN.backward'):
        release.cut(SOURCE, [wrong])


def test_a_text_that_is_not_there_is_named():
    for source in ('', 'old old'):
        with pytest.raises(ValueError, match='has it [02] times: .old'):
            release.replaced(source, [release.Replacement('file.py', 'old', 'new')])


# --- the notebook --------------------------------------------------------------------------------

def test_each_cell_between_two_headings_has_a_tag(solved):
    parts = release_notebook.parts_of(solved)
    assert list(parts) == list(range(1, 24))
    for tags in ([], ['live'], ['given', 'answer']):
        damaged = nbformat.from_dict(solved)
        damaged.cells[8].metadata = {'tags': tags}
        with pytest.raises(ValueError, match='a cell must have one of the tags'):
            release_notebook.parts_of(damaged)


def test_a_notebook_has_its_parts_and_no_outputs(folders, stage):
    notebook = nbformat.read(folders[stage.number] / 'Assignment4.ipynb', as_version=4)
    nbformat.validate(notebook)
    headings = re.findall(r'^## (\d+)\.', '\n'.join(cell.source for cell in notebook.cells), re.M)
    assert [int(number) for number in headings] == list(range(1, stage.parts[1] + 1))
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == 'code':
            assert cell.outputs == [] and cell.execution_count is None


def test_open_parts_have_places_to_write(folders, stage):
    notebook = nbformat.read(folders[stage.number] / 'Assignment4.ipynb', as_version=4)
    text = '\n'.join(cell.source for cell in notebook.cells)
    first, last = stage.parts
    assert text.count('**Your prediction:** *Write here.*') == last - first + 1
    answers = [int(part) for part in re.findall(r'\*\*Your answer\*\* \(part (\d+)', text)]
    assert answers == [part for part in PLAN.parts if first <= part <= last]


def test_given_cells_fail_only_where_something_is_to_write(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders[1], tmp_path / 'copy')
    monkeypatch.setenv('BSDS300', str(du.sample_photographs(tmp_path / 'photographs')))
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
    notebook = nbformat.read(folder / 'Assignment4.ipynb', as_version=4)
    for cell in notebook.cells:  # the checks have a test of their own
        cell.source = cell.source.replace('!{sys', '# !{sys')
    NotebookClient(notebook, timeout=300, kernel_name='python3', allow_errors=True,
                   resources={'metadata': {'path': folder}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    errors = [output for cell in code for output in cell.outputs if output.output_type == 'error']
    assert {error.ename for error in errors} == {'NotImplementedError', 'NameError'}
    assert len(code) - len(errors) >= 12


# --- leaks ---------------------------------------------------------------------------------------

def test_a_folder_has_what_it_should_and_no_more(folders, stage):
    folder = folders[stage.number]
    names = {str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file()}
    tests = {name for name in names if name.startswith('tests/')}
    weights = {f'checkpoints/{network}/{file}' for network in stage.networks
               for file in ('checkpoint.pth.tar', 'config.txt')}
    assert names - tests == weights | {
        'Assignment4.ipynb', 'denoising_utils.py', 'nntools.py', 'requirements.txt', 'README.md',
        'Makefile', 'submit.py', 'checkpoints/BSDS300.sha256', 'checkpoints/scores.csv'}
    parts = [int(number) for number in re.findall(r'test_part_(\d+)', ' '.join(tests))]
    assert all(stage.has(part) for part in parts)


def test_no_weights_answer(stage):
    """Those of a network are given when the part that trains it is over."""
    trained_in = {'dncnn': 10, 'dncnn_14': 14, 'udncnn': 16, 'dudncnn': 21}
    for network in stage.networks + stage.scores:
        assert not stage.leaves_open(trained_in.get(network, 0)), network


def test_no_sentence_of_an_answer_is_left(folders, stage, solved):
    """But for those that the plan gives as a note."""
    texts = [release.all_text(file) for file in folders[stage.number].rglob('*')
             if file.suffix in ('.py', '.md', '.ipynb', '.txt')]
    given = on_one_line('\n'.join(texts))
    notes = on_one_line('\n'.join(part.note for part in PLAN.parts.values()))
    for number, cells in release_notebook.parts_of(solved).items():
        if not stage.leaves_open(number):
            continue
        answers = release_notebook.paragraphs(cells, answers=True)
        answers += [cell.source for cell in cells[1:] if cell.cell_type == 'markdown'
                    and release_notebook.has_tag(cell, 'answer')]
        sentences = re.split(r'(?<=[.:?])\s|\n', '\n'.join(answers))
        long = [on_one_line(sentence) for sentence in sentences if len(sentence) > 30]
        assert long
        assert [one for one in long if one in given and one not in notes] == [], number


def test_no_line_of_a_solution_is_left(folders):
    """In the first stage, where all is open."""
    given = (folders[1] / 'denoising_utils.py').read_text(encoding='utf-8').splitlines()
    lines = SOURCE.splitlines()
    nodes = release.find_definitions(SOURCE)
    for definition in PLAN.definitions:
        node = nodes[definition.name]
        has_docstring = ast.get_docstring(node) is not None
        start = node.body[has_docstring].lineno - 1
        left = set(lines[start:node.end_lineno]) & set(given)
        assert [line for line in left if len(line.strip()) > 20] == [], definition.name


def test_a_leak_is_found(copy, stage):
    assert release.find_leaks(copy, PLAN, stage) == []
    (copy / 'README.md').write_text('The dilations are 1, 2, 4, 4, 2, 1.', encoding='utf-8')
    notebook = nbformat.read(copy / 'Assignment4.ipynb', as_version=4)
    notebook.cells.append(v4.new_markdown_cell("**Answer.** It has 'max_unpool2d'."))
    nbformat.write(notebook, copy / 'Assignment4.ipynb')
    found = release.find_leaks(copy, PLAN, stage)
    assert "README.md: '1, 2, 4, 4, 2, 1'" in found
    assert "Assignment4.ipynb: '**Answer.**'" in found
    assert ("Assignment4.ipynb: 'max_unpool2d'" in found) == stage.leaves_open(15)


# --- commands ------------------------------------------------------------------------------------

def test_nothing_is_overwritten(tmp_path):
    file = tmp_path / 'mine'
    file.write_text('work of a day', encoding='utf-8')
    for what in ('1', 'sheet'):
        with pytest.raises(FileExistsError, match='mine exists, and is never overwritten'):
            release.main([what, str(file)])
    assert file.read_text(encoding='utf-8') == 'work of a day'


@pytest.mark.parametrize('what, words', [('4', 'one of 1, 2, 3'), ('all', "got 'all'")])
def test_another_stage_is_refused(tmp_path, what, words):
    with pytest.raises(ValueError, match=words):
        release.main([what, str(tmp_path / 'out')])
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_has_each_part_that_is_graded_by_hand(tmp_path, capsys):
    release.main(['sheet', str(tmp_path / 'sheet.md')])
    assert 'sheet.md is written' in capsys.readouterr().out
    sheet = (tmp_path / 'sheet.md').read_text(encoding='utf-8')
    sections = re.split(r'^## ', sheet, flags=re.MULTILINE)[1:]
    assert [int(section.split('.')[0]) for section in sections] == list(PLAN.parts)
    for section, part in zip(sections, PLAN.parts.values()):
        assert section.splitlines()[0].endswith(f'({part.points})')
        question, answer = section.split('**A full answer**')
        assert '\n> ' in question and '**Answer.**' not in section
        assert all(f'* {line}' in answer for line in part.wrong) and part.wrong


# --- a student's folder --------------------------------------------------------------------------

def test_the_readme_is_of_its_stage(folders, stage):
    readme = (folders[stage.number] / 'README.md').read_text(encoding='utf-8')
    first, last = stage.parts
    assert f'the parts {first} to {last} of' in readme and '$' not in readme
    for name in re.findall(r'tests/test_part_\d+\.py', readme):
        assert (folders[stage.number] / name).is_file(), name
    assert len(readme.splitlines()) <= 90  # two pages


@pytest.mark.skipif(not shutil.which('make'), reason='no make here')
def test_make_knows_the_commands_of_the_readme(copy):
    readme = (copy / 'README.md').read_text(encoding='utf-8')
    targets = re.findall(r'^ +make (\w+)', readme, flags=re.MULTILINE)
    assert targets == ['test', 'submit']
    # `make test` runs this, and would have this make say which folder it enters.
    of_make = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')
    alone = {name: value for name, value in os.environ.items() if name not in of_make}
    for target in targets:
        words = ['make', '--dry-run', target, 'PYTHON=snake']
        done = subprocess.run(words, cwd=copy, env=alone, capture_output=True, text=True,
                              timeout=60)
        assert done.stdout.startswith('snake '), done.stderr


def test_submit_says_what_is_missing(copy, stage):
    code, said = run(copy, 'submit.py')
    first, last = stage.parts
    stubs = {one.name for one in PLAN.definitions if first <= one.part <= last}
    assert code == 0, said
    assert set(re.findall(r'part \d+: (\S+) is not written', said)) == stubs
    answers = [int(part) for part in re.findall(r'part (\d+): there is no answer', said)]
    assert answers == [part for part in PLAN.parts if first <= part <= last]
    with zipfile.ZipFile(copy / 'submission.zip') as archive:
        assert sorted(archive.namelist()) == ['Assignment4.ipynb', 'denoising_utils.py']


def test_submit_is_content_with_a_solution(copy):
    shutil.copy(HERE / 'denoising_utils.py', copy)
    notebook = nbformat.read(copy / 'Assignment4.ipynb', as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('*Write here.*', 'Because 2 + 2 = 4.')
    nbformat.write(notebook, copy / 'Assignment4.ipynb')
    code, said = run(copy, 'submit.py')
    assert code == 0 and said.endswith('Nothing is missing.\n') and len(said.splitlines()) == 1


@pytest.mark.parametrize('name, text, words', [
    ('Assignment4.ipynb', None, 'Assignment4.ipynb is missing'),
    ('denoising_utils.py', None, 'denoising_utils.py is missing'),
    ('Assignment4.ipynb', 'print(1)', 'is not a notebook'),
    ('denoising_utils.py', 'def f(:\n', r'not Python: .*utils\.py, line 1\)'),
    ('denoising_utils.py', 'x = "\0"', 'not Python: ')])
def test_submit_refuses(folders, tmp_path, name, text, words):
    folder = shutil.copytree(folders[1], tmp_path / 'copy')
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, encoding='utf-8')
    code, said = run(folder, 'submit.py')
    assert code == 1 and re.search(words, said), said
    assert not (folder / 'submission.zip').exists()


def test_a_stage_has_the_checks_of_its_parts(tmp_path, monkeypatch):
    classroom = shutil.copytree(release.CLASSROOM, tmp_path / 'classroom')
    (classroom / 'tests').mkdir(exist_ok=True)
    for name in ('conftest.py', 'test_part_05.py', 'test_part_15.py'):
        (classroom / 'tests' / name).write_text('', encoding='utf-8')
    monkeypatch.setattr(release, 'CLASSROOM', classroom)
    release.release(1, tmp_path / 'out')
    names = [file.name for file in (tmp_path / 'out' / 'tests').iterdir()]
    assert {'conftest.py', 'test_part_05.py'} <= set(names) and 'test_part_15.py' not in names
    notebook = release.all_text(tmp_path / 'out' / 'Assignment4.ipynb')
    assert '!{sys.executable} -m pytest -q tests/test_part_05.py' in notebook


@pytest.mark.skipif(not [*release.CLASSROOM.glob('tests/test_part_*.py')],
                    reason='no public checks yet')
def test_public_checks_tell_stubs_from_a_solution(copy, stage):
    code, said = run(copy, '-m', 'pytest', '-q', 'tests')
    assert code == 1, said
    assert f'part {stage.parts[0]}: write' in said or f'part {stage.parts[0] + 1}: write' in said
    shutil.copy(HERE / 'denoising_utils.py', copy)
    code, said = run(copy, '-m', 'pytest', '-q', 'tests')
    assert code == 0, said
