"""The stored notebook's form."""
import re
from pathlib import Path

import nbformat
import pytest

from programs import run_notebook
from tests import notebook_size

HERE = Path(__file__).resolve().parents[1]
NOTEBOOK = HERE / 'Assignment4.ipynb'
HEADING = re.compile(r'^(#{1,6}) +(.+?) *#*$', re.MULTILINE)


@pytest.fixture(scope='module')
def notebook():
    if not NOTEBOOK.is_file():
        pytest.skip(f'there is no {NOTEBOOK.name}')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture(scope='module')
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.fixture(scope='module')
def outputs(code):
    return [output for cell in code for output in cell.outputs]


def prose(notebook):
    text = '\n\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')
    return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


def headings(notebook):
    """The headings as they are read: without marks of emphasis and code, links as their text."""
    plain = [re.sub(r'[*`]', '', text) for _, text in HEADING.findall(prose(notebook))]
    return [re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text) for text in plain]


def texts(output):
    """All of an output that is text."""
    if output.output_type == 'stream':
        return output.text
    data = output.get('data', {})
    return '\n'.join(str(data[kind]) for kind in data if not kind.startswith('image/'))


def test_the_23_parts_have_their_headings_in_order(notebook):
    numbers = [re.match(r'(\d+)\. ', heading) for heading in headings(notebook)]
    assert [int(number[1]) for number in numbers if number] == list(range(1, 24))


def test_links_of_the_table_of_contents_lead_to_headings(notebook):
    # JupyterLab and nbconvert make a heading's anchor of its text with '-' for each space.
    # JupyterLab compares it with the link as written (seen in 4.6): %28 for a bracket, or any
    # letter that a browser would encode, leads nowhere. So: plain ASCII, and [text](<#anchor>)
    # where there are brackets.
    anchors = {text.replace(' ', '-') for text in headings(notebook)}
    links = re.findall(r'\]\((?:<#([^>]+)>|#([^\s)]+))\)', prose(notebook))
    links = {angled or plain for angled, plain in links}
    assert len(links) >= 23
    assert links <= anchors, f'no such heading: {sorted(links - anchors)}'
    assert all(link.isascii() and '%' not in link for link in links)


def test_it_stays_short(notebook):
    """As `python -m tests.notebook_size` counts."""
    text = notebook_size.prose(notebook)
    assert notebook_size.words(text) <= 5000
    assert notebook_size.words(notebook_size.part(text, 22)) <= 900
    assert notebook_size.lines_of_code(notebook) <= 650


def test_every_part_begins_with_a_question_and_a_prediction(notebook):
    text = notebook_size.prose(notebook)
    for number in range(1, 24):
        part = notebook_size.part(text, number)
        assert '\n> ' in part and '*Before you run it:*' in part, number


def test_every_figure_has_an_alternative_text(code):
    """But for the live one, which is the same display all the time."""
    still = [cell for cell in code if 'live' not in cell.metadata.get('tags', [])]
    for output in [output for cell in still for output in cell.outputs]:
        if 'image/png' in output.get('data', {}):
            assert len(output.metadata['image/png']['alt']) > 10


def test_anchors_are_unambiguous(notebook):
    found = headings(notebook)
    assert len(set(found)) == len(found)


def test_stored_outputs_come_from_one_run_from_top_to_bottom(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_stored_outputs_are_those_of_bsds300(outputs):
    stored = '\n'.join(map(texts, outputs))
    assert 'BSDS300: 200 to train and 100 to test, all checksums right' in stored
    assert 'NOT BSDS300' not in stored


def test_no_error_and_no_warning_is_stored(outputs):
    assert [output for output in outputs if output.output_type == 'error'] == []
    assert [output.text for output in outputs if output.get('name') == 'stderr'] == []
    assert [texts(output) for output in outputs if 'Warning:' in texts(output)] == []


def test_no_absolute_path_is_stored(outputs):
    place = re.compile(r'/(root|home|work|tmp|Users|mnt|private)/|\b[A-Z]:\\')
    assert [texts(output) for output in outputs if place.search(texts(output))] == []


def test_figures_are_png_and_nothing_needs_a_widget(outputs):
    kinds = {kind for output in outputs for kind in output.get('data', {})}
    assert 'image/png' in kinds
    assert kinds <= {'image/png', 'text/plain', 'text/html', 'text/markdown', 'text/latex'}


def test_nothing_volatile_is_stored(notebook):
    clean = nbformat.from_dict(notebook)
    run_notebook.without_volatile_metadata(clean)
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert clean == stored, 'run: make refresh'


def test_size():
    if not NOTEBOOK.is_file():
        pytest.skip(f'there is no {NOTEBOOK.name}')
    assert NOTEBOOK.stat().st_size < 2.5e6


def test_the_live_training_is_tagged(code):
    """What the browser test runs: the cells tagged live, and the one that trains."""
    training = [k for k, cell in enumerate(code) if 'live.run(' in cell.source]
    tagged = [k for k, cell in enumerate(code) if 'live' in cell.metadata.get('tags', [])]
    assert training and tagged and min(tagged) < training[0]
    # The run is to be repeatable alone: a figure made elsewhere would have no place to appear in.
    assert 'subplots' in code[training[0]].source
