"""What README.md and the pages in docs/ name is there, and the README's table has the scores."""
import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

import denoising_utils as du
import nntools as nt

HERE = Path(__file__).resolve().parents[1]
PAGES = ['README.md', *sorted(f'docs/{file.name}' for file in (HERE / 'docs').glob('*.md'))]


def read(page):
    return (HERE / page).read_text(encoding='utf-8')


def without_python(page):
    """The text of a page without its Python code, whose comments look like headings."""
    return re.sub(r'^```.*?^```', '', read(page), flags=re.MULTILINE | re.DOTALL)


def written_as_code(page):
    """The commands and names on a page: its indented lines, and what is in backticks."""
    text = without_python(page).replace('\\\n', '')  # a command that goes on in the next line
    found = re.findall(r'^ {4,}.*|`[^`]+`', text, flags=re.MULTILINE)
    return [' '.join(code.strip('`').split()) for code in found]


def headings(page):
    return re.findall(r'^#+ (.*)', without_python(page), flags=re.MULTILINE)


def anchor(heading):
    """What GitHub makes of a heading, for links to it."""
    return re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')


# --- the pages -----------------------------------------------------------------------------------

def test_there_are_the_pages():
    names = 'classroom', 'nntools', 'photographs', 'results', 'testing', 'trials'
    assert PAGES == ['README.md', *(f'docs/{name}.md' for name in names)]


def test_the_readme_is_short():
    assert len(read('README.md').splitlines()) <= 160


@pytest.mark.parametrize('page', PAGES)
def test_no_two_headings_have_the_same_anchor(page):
    names = [anchor(heading) for heading in headings(page)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)]+)\)', without_python(page)):
        if '://' in link:
            continue
        name, _, place = link.partition('#')
        target = HERE / page
        if name:
            target = (target.parent / name).resolve()
        assert target.exists(), link
        if place:
            places = [anchor(heading) for heading in headings(target.relative_to(HERE))]
            assert place in places, link


def test_each_page_is_linked_from_the_readme():
    links = re.findall(r'\]\((docs/\w+\.md)', read('README.md'))
    assert set(links) == set(PAGES[1:])


# --- what they name ------------------------------------------------------------------------------

MADE = ('config.txt', 'best.pth.tar', 'digits.py', 'train/', 'test/', 'images/', 'digits/',
        'experiments/')  # by who follows the pages, or in a folder of photographs


@pytest.mark.parametrize('page', PAGES)
def test_files_are_there(page):
    file = r'[\w./]+\.(?:py|ipynb|txt|toml|cfg|csv|yml|sha256|jpg|md)'
    folder = r'[\w./]+/'
    for code in written_as_code(page):
        if not re.fullmatch(f'{file}|{folder}', code):
            continue
        if code in MADE or code.startswith('experiments/'):
            continue
        assert (HERE / code).exists() or (HERE / 'checkpoints' / code).exists(), code


@pytest.mark.parametrize('page', PAGES)
def test_targets_of_make_are_there(page):
    makefile = read('Makefile')
    for code in written_as_code(page):
        call = re.match(r'(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z][a-z-]*)', code)
        if call:
            assert re.search(rf'^{call[1]}:', makefile, re.MULTILINE), code


@pytest.mark.parametrize('page', PAGES)
def test_tests_are_there(page):
    names = re.findall(r'\btest_\w+', ' '.join(written_as_code(page)))
    defined = ' '.join(file.read_text(encoding='utf-8') for file in (HERE / 'tests').glob('*.py'))
    for name in names:
        assert f'def {name}(' in defined or (HERE / 'tests' / f'{name}.py').is_file(), name


@pytest.mark.parametrize('page', PAGES)
def test_programs_and_their_options_are_there(page, capsys):
    for code in written_as_code(page):
        for name, words in re.findall(r'-m programs\.(\w+)(.*)', code):
            assert (HERE / 'programs' / f'{name}.py').is_file(), code

            # Some programs have commands, each with options of its own: `programs.results levels`.
            command = re.match(r' ([a-z]\w*)\b(?!\.)', words)
            words_before = [command[1]] if command else []
            with pytest.raises(SystemExit):
                importlib.import_module(f'programs.{name}').main([*words_before, '--help'])
            shown = capsys.readouterr().out
            for option in re.findall(r'--[\w-]+', words.partition('#')[0]):
                assert re.search(rf'{option}\b', shown), code


@pytest.mark.parametrize('page', PAGES)
def test_options_without_a_command_are_there(page):
    places = [*(HERE / 'programs').glob('*.py'), HERE / 'Makefile']
    text = ' '.join(file.read_text(encoding='utf-8') for file in places)
    of_recipes = {field.name.replace('_', '-') for field in dataclasses.fields(du.Recipe)}
    for code in written_as_code(page):
        if not code.startswith('--'):
            continue
        for option in re.findall(r'--[\w-]+', code):
            name = option.removeprefix('--').removeprefix('no-')
            assert name in of_recipes or re.search(rf"{option}[' ]", text), code


def test_options_of_nntools_are_there():
    options = {field.name for field in dataclasses.fields(nt.Experiment)}
    for method in (nt.Experiment.run, nt.Experiment.evaluate, nt.Experiment.predict):
        options |= set(inspect.signature(method).parameters)
    page = 'docs/nntools.md'
    for name in re.findall(r'`([a-z_]+)=', without_python(page)):
        assert name in options, name
    for name in written_as_code(page):
        if name.startswith('exp.'):
            assert re.match(r'exp\.(\w+)', name)[1] in {*options, *dir(nt.Experiment), 'history'}


def said(node):
    """The text of a string or f-string, with ... where there is a value in it."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(said, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else '...'


def test_nntools_says_what_the_page_quotes():
    page = without_python('docs/nntools.md')
    section = re.search(r'^### What it says\n(.*?)^##', page, flags=re.MULTILINE | re.DOTALL)[1]
    quoted = re.findall(r'^- `([^`]*)`', section, flags=re.MULTILINE)
    assert len(quoted) >= 5
    strings = [said(node) for node in ast.walk(ast.parse(read('nntools.py')))
               if isinstance(node, (ast.Constant, ast.JoinedStr))]
    for line in quoted:
        assert any(' '.join(line.split()) in text for text in strings), line


def test_each_part_of_nntools_is_in_its_list():
    listed, *parts = re.split('^## ', without_python('docs/nntools.md'), flags=re.MULTILINE)
    for part in parts:
        heading = part.partition('\n')[0]
        assert f'(#{anchor(heading)})' in listed, heading


# --- the table of the three networks ------------------------------------------------------------

def rows_of_networks():
    """The rows of the README's table: a dict of network to its other cells."""
    rows = re.findall(r'^\| (\w+)\(6\) \|(.*)\|$', read('README.md'), flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split('|')] for name, cells in rows}


def test_the_table_has_the_stored_scores():
    scores = du.read_scores(HERE / 'checkpoints' / 'scores.csv', 'test')
    rows = rows_of_networks()
    assert list(rows) == ['DnCNN', 'UDnCNN', 'DUDnCNN']
    for name, cells in rows.items():
        values = scores[name.lower()]  # (trainings, photographs)
        assert values.shape == (3, 100)
        error = values.mean(axis=0).std(ddof=1) / 100 ** 0.5
        assert cells[2] == f'{values.mean():.2f} ± {error:.2f}'


def test_the_table_describes_the_networks():
    for name, cells in rows_of_networks().items():
        net = du.make_network(name.lower())
        assert cells[:2] == [f'{du.count_parameters(net):,}', str(net.receptive_field)]


def test_dudncnn_is_ahead_on_every_photograph():
    assert 'DUDnCNN is ahead of the other two on every' in ' '.join(read('README.md').split())
    scores = du.read_scores(HERE / 'checkpoints' / 'scores.csv', 'test')
    for other in ('dncnn', 'udncnn'):
        assert (scores['dudncnn'].min(axis=0) > scores[other].max(axis=0)).all()
