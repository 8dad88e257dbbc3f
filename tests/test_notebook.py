"""The stored notebook's form, and proof that nbval notices what it should."""
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

HERE = Path(__file__).resolve().parent.parent
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
    """The headings as they are read: without the marks of emphasis and code, links as their text."""
    plain = [re.sub(r'[*`]', '', text) for _, text in HEADING.findall(prose(notebook))]
    return [re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text) for text in plain]


def texts(output):
    """All of an output that is text."""
    if output.output_type == 'stream':
        return output.text
    return '\n'.join(str(value) for kind, value in output.get('data', {}).items() if not kind.startswith('image/'))


def test_the_23_parts_have_their_headings_in_order(notebook):
    numbers = [int(match[1]) for match in map(re.compile(r'(\d+)\. ').match, headings(notebook)) if match]
    assert numbers == list(range(1, 24))


def test_links_of_the_table_of_contents_lead_to_headings(notebook):
    # JupyterLab and nbconvert make a heading's anchor of its text with '-' for each space. JupyterLab
    # compares it with the link as written (seen in 4.6): %28 for a bracket, or any letter that a browser
    # would encode, leads nowhere. So: plain ASCII, and [text](<#anchor>) where there are brackets.
    anchors = {text.replace(' ', '-') for text in headings(notebook)}
    links = re.findall(r'\]\((?:<#([^>]+)>|#([^\s)]+))\)', prose(notebook))
    links = {in_brackets or plain for in_brackets, plain in links}
    assert len(links) >= 23
    assert links <= anchors, f'no such heading: {sorted(links - anchors)}'
    assert all(link.isascii() and '%' not in link for link in links)


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
    spec = importlib.util.spec_from_file_location('run_notebook', HERE / 'tests' / 'run_notebook.py')
    run_notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_notebook)
    clean = nbformat.from_dict(notebook)
    run_notebook.without_volatile_metadata(clean)
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert clean == stored, 'run: make refresh'


def test_size():
    if not NOTEBOOK.is_file():
        pytest.skip(f'there is no {NOTEBOOK.name}')
    assert NOTEBOOK.stat().st_size < 3e6


def test_the_live_training_is_tagged(code):
    """What the browser test runs: the cells tagged live, and the one that trains."""
    training = [k for k, cell in enumerate(code) if 'live.run(' in cell.source]
    tagged = [k for k, cell in enumerate(code) if 'live' in cell.metadata.get('tags', [])]
    assert training and tagged and min(tagged) < training[0]
    # The run is to be repeatable alone: a figure made elsewhere would have no place to appear again.
    assert 'subplots' in code[training[0]].source


# --- nbval ---------------------------------------------------------------------------------------

NUMBER = "print('PSNR 29.43 dB')"
TIME = "print('Epoch 3/12: loss 0.025, PSNR 22.1 (0.79 s)', '1.5 s/image on cpu')"
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def small_notebook(*sources):
    """A notebook as a run would store it."""
    stored = {
        NUMBER: [v4.new_output('stream', text='PSNR 29.43 dB\n')],
        TIME: [v4.new_output('stream', text='Epoch 3/12: loss 0.025, PSNR 22.1 (0.79 s) 1.5 s/image on cpu\n')],
        FIGURE: [v4.new_output('display_data', {'text/plain': '<Figure size 640x480 with 1 Axes>',
                                                'image/png': 'iVBORw0KGgo='})]}
    return v4.new_notebook(cells=[v4.new_code_cell(source, outputs=stored[source], execution_count=k)
                                  for k, source in enumerate(sources, start=1)])


def edited(source, new_source=None, text=None, outputs=None):
    """That notebook after a change on purpose."""
    cell = (notebook := small_notebook(source)).cells[0]
    cell.source = new_source or source
    cell.outputs = cell.outputs if outputs is None else outputs
    if text:
        cell.outputs[0].text = text
    return notebook


def nbval(folder, notebooks, option='--nbval'):
    """Runs nbval as the Makefile does. Returns {name of the notebook: whether it passed}."""
    for name, notebook in notebooks.items():
        nbformat.write(notebook, folder / f'{name}.ipynb')
    report = folder / 'report.xml'
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-c', HERE / 'pyproject.toml',
         f'--rootdir={folder}', option, f'--junitxml={report}', *(folder / f'{name}.ipynb' for name in notebooks)],
        cwd=HERE, capture_output=True, text=True, timeout=300)
    assert report.is_file(), done.stdout + done.stderr
    passed = {}
    for case in ET.parse(report).iter('testcase'):
        name = case.get('classname').removesuffix('.ipynb')
        failed = any(child.tag in ('failure', 'error') for child in case)
        passed[name] = passed.get(name, True) and not failed
    return passed


def test_nbval_bites(tmp_path):
    passed = nbval(tmp_path, {
        'unchanged': small_notebook(NUMBER, TIME, FIGURE),
        'changed_time': edited(
            TIME, text='Epoch 3/12: loss 0.026, PSNR 22.4 (11.30 s) 0.25 s/image on cuda:0\n'),
        'changed_number': edited(NUMBER, text='PSNR 29.44 dB\n'),
        'changed_epoch': edited(TIME, text='Epoch 4/12: loss 0.025, PSNR 22.1 (0.79 s) 1.5 s/image on cpu\n'),
        'figure_gone': edited(FIGURE, new_source='pass'),
        'figure_not_stored': edited(FIGURE, outputs=[]),
        'exception': edited(NUMBER, new_source=NUMBER + '\n1 / 0')})
    assert passed == {'unchanged': True, 'changed_time': True, 'changed_number': False, 'changed_epoch': False,
                      'figure_gone': False, 'figure_not_stored': False, 'exception': False}


def test_nbval_lax_compares_what_is_marked_and_runs_everything(tmp_path):
    mark = '# NBVAL_CHECK_OUTPUT\n'
    passed = nbval(tmp_path, {
        'other_number': edited(NUMBER, text='PSNR 29.44 dB\n'),
        'marked_number': edited(NUMBER, new_source=mark + NUMBER, text='PSNR 29.44 dB\n'),
        'exception': edited(NUMBER, new_source=NUMBER + '\n1 / 0')}, '--nbval-lax')
    assert passed == {'other_number': True, 'marked_number': False, 'exception': False}


@pytest.mark.parametrize('a, b', [
    ('Python 3.11.7, torch 2.14.1+cu130', 'Python 3.10.2, torch 2.4.0'),
    ('12.3 s/image,  120 ms', ' 0.25 s/image, 9 ms'),
    ('took  1:05 min', 'took 12 min'),
    ('device: cpu', 'device: cuda:1'),
    ('in /tmp/x1/images', 'in /home/me/BSDS300'),
    ('in /tmp/x1/images', 'in D:\\Users\\me\\BSDS300'),
    ('Epoch 3/12: loss 0.02517, val_PSNR 23.12 (0.79 s)', 'Epoch 3/12: loss 0.1, val_PSNR 22 (10.00 s)')])
def test_what_the_sanitize_file_lets_differ(a, b):
    assert sanitized(a) == sanitized(b)


@pytest.mark.parametrize('a, b', [
    ('PSNR 29.43 dB', 'PSNR 29.44 dB'), ('SSIM 0.81', 'SSIM 0.82'), ('225,859 parameters', '225,858 parameters'),
    ('Epoch 3/12: loss 1', 'Epoch 4/12: loss 1'), ('33 x 33 pixels', '32 x 33 pixels'), ('sigma 30', 'sigma 3'),
    ('Start/Continue training from epoch 0', 'Start/Continue training from epoch 3'),
    ('DnCNN   29.43   0.12 s', 'DnCNN   29.53   0.12 s'), ('64 samples', '65 samples')])
def test_what_it_does_not_let_differ(a, b):
    assert sanitized(a) != sanitized(b)


def sanitized(text):
    rules = (HERE / 'tests' / 'nbval_sanitize.cfg').read_text(encoding='utf-8')
    pairs = re.findall(r'^regex: (.*)$\n^replace: (.*)$', rules, flags=re.MULTILINE)
    assert len(pairs) == rules.count('\nregex:')
    for regex, replacement in pairs:
        text = re.sub(regex, replacement, text)
    return text
