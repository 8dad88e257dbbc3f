"""Proof that nbval notices in a notebook what it should, and nothing else."""
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

HERE = Path(__file__).resolve().parents[1]

NUMBER = "print('PSNR 29.43 dB')"
TIME = "print('Epoch 3/12: loss 0.025, PSNR 22.1 (0.79 s)', '1.5 s/image on cpu')"
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"

FIGURE_STORED = {'text/plain': '<Figure size 640x480 with 1 Axes>', 'image/png': 'iVBORw0KGgo='}
STORED = {
    NUMBER: v4.new_output('stream', text='PSNR 29.43 dB\n'),
    TIME: v4.new_output(
        'stream', text='Epoch 3/12: loss 0.025, PSNR 22.1 (0.79 s) 1.5 s/image on cpu\n'),
    FIGURE: v4.new_output('display_data', FIGURE_STORED)}


def small_notebook(*sources):
    """A notebook as a run would store it."""
    cells = []
    for number, source in enumerate(sources, start=1):
        output = nbformat.from_dict(STORED[source])
        cells.append(v4.new_code_cell(source, outputs=[output], execution_count=number))
    return v4.new_notebook(cells=cells)


def edited(source, new_source=None, text=None, outputs=None):
    """A notebook of one cell after a change on purpose."""
    notebook = small_notebook(source)
    (cell,) = notebook.cells
    if new_source is not None:
        cell.source = new_source
    if outputs is not None:
        cell.outputs = outputs
    if text is not None:
        cell.outputs[0].text = text
    return notebook


def nbval(folder, notebooks, option='--nbval'):
    """Runs nbval as the Makefile does. Returns {name of the notebook: whether it passed}."""
    files = []
    for name, notebook in notebooks.items():
        files.append(folder / f'{name}.ipynb')
        nbformat.write(notebook, files[-1])
    report = folder / 'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', '-c', HERE / 'pyproject.toml',
               f'--rootdir={folder}', option, f'--junitxml={report}', *files]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
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
        'changed_epoch': edited(
            TIME, text='Epoch 4/12: loss 0.025, PSNR 22.1 (0.79 s) 1.5 s/image on cpu\n'),
        'figure_gone': edited(FIGURE, new_source='pass'),
        'figure_not_stored': edited(FIGURE, outputs=[]),
        'exception': edited(NUMBER, new_source=NUMBER + '\n1 / 0')})
    assert passed == {
        'unchanged': True, 'changed_time': True, 'changed_number': False, 'changed_epoch': False,
        'figure_gone': False, 'figure_not_stored': False, 'exception': False}


def test_nbval_lax_compares_marked_cells_and_runs_all(tmp_path):
    mark = '# NBVAL_CHECK_OUTPUT\n'
    passed = nbval(tmp_path, {
        'other_number': edited(NUMBER, text='PSNR 29.44 dB\n'),
        'marked_number': edited(NUMBER, new_source=mark + NUMBER, text='PSNR 29.44 dB\n'),
        'exception': edited(NUMBER, new_source=NUMBER + '\n1 / 0')}, '--nbval-lax')
    assert passed == {'other_number': True, 'marked_number': False, 'exception': False}


def sanitized(text):
    rules = (HERE / 'tests' / 'nbval_sanitize.cfg').read_text(encoding='utf-8')
    pairs = re.findall(r'^regex: (.*)$\n^replace: (.*)$', rules, flags=re.MULTILINE)
    assert len(pairs) == rules.count('\nregex:')
    for regex, replacement in pairs:
        text = re.sub(regex, replacement, text)
    return text


@pytest.mark.parametrize('a, b', [
    ('Python 3.11.7, torch 2.14.1+cu130', 'Python 3.10.2, torch 2.4.0'),
    ('12.3 s/image,  120 ms', ' 0.25 s/image, 9 ms'),
    ('took  1:05 min', 'took 12 min'),
    ('device: cpu', 'device: cuda:1'),
    ('<style>td { }</style><pre><span class="k">def</span> f', '<style>\np { }</style><pre>def f'),
    ('the suspect is 3.6 dB behind DnCNN(6)', 'the suspect is 3.5 dB behind DnCNN(6)'),
    ('in /tmp/x1/images', 'in /home/me/BSDS300'),
    ('in /tmp/x1/images', 'in D:\\Users\\me\\BSDS300'),
    ('Epoch 3/12: loss 0.02517, val_PSNR 23.12 (0.79 s)',
     'Epoch 3/12: loss 0.1, val_PSNR 22 (10.00 s)')])
def test_what_the_sanitize_file_lets_differ(a, b):
    assert sanitized(a) == sanitized(b)


@pytest.mark.parametrize('a, b', [
    ('PSNR 29.43 dB', 'PSNR 29.44 dB'),
    ('SSIM 0.81', 'SSIM 0.82'),
    ('225,859 parameters', '225,858 parameters'),
    ('Epoch 3/12: loss 1', 'Epoch 4/12: loss 1'),
    ('33 x 33 pixels', '32 x 33 pixels'),
    ('sigma 30', 'sigma 3'),
    ('Start/Continue training from epoch 0', 'Start/Continue training from epoch 3'),
    ('DnCNN   29.43   0.12 s', 'DnCNN   29.53   0.12 s'),
    ('64 samples', '65 samples')])
def test_what_it_does_not_let_differ(a, b):
    assert sanitized(a) != sanitized(b)
