"""Runs a notebook top to bottom in a fresh kernel of this Python, and stores the result.

    python -m programs.run_notebook Assignment4.ipynb              # the result is in experiments/
    python -m programs.run_notebook Assignment4.ipynb --in-place   # renews the stored outputs
"""
import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from PIL import Image

from programs import run


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.run_notebook', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebook', type=Path)
    parser.add_argument('--in-place', action='store_true', help='renew the stored outputs')
    parser.add_argument('--output', type=Path, default=Path('experiments'),
                        help='folder of the result (default: experiments)')
    args = parser.parse_args(words)

    notebook = nbformat.read(args.notebook, as_version=4)
    error = execute(notebook, args.notebook)
    without_volatile_metadata(notebook)
    without_transparency(notebook)
    if args.in_place and not error:
        write(args.notebook, nbformat.writes(notebook) + '\n')
        print('Its stored outputs are renewed. To see what changed: nbdiff', args.notebook)
        return
    store(notebook, args.output, args.notebook)
    if error:
        sys.exit(str(error))


def execute(notebook, path):
    """Runs all cells in the notebook's folder. Returns the error that stopped it, or None."""
    os.environ.setdefault('JUPYTER_PREFER_ENV_PATH', '1')  # this Python's kernel, not a user's
    cells = [k for k, cell in enumerate(notebook.cells) if cell.cell_type == 'code']
    retrains = os.environ.get('RETRAIN', '0') not in ('', '0')
    end = '' if sys.stdout.isatty() else '\n'
    start = time.time()

    def report(cell, cell_index, **_):
        seconds = time.time() - start
        number = cells.index(cell_index) + 1
        print(f'\rcell {number} of {len(cells)}, {seconds:.0f} s', end=end, flush=True)

    client = NotebookClient(
        notebook, timeout=None if retrains else 900, kernel_name='python3', record_timing=False,
        on_cell_execute=report, resources={'metadata': {'path': str(path.resolve().parent)}})
    error = None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = failure
    how = 'stopped at an error' if error else 'is done'
    print(f'\n{path} {how} after {time.time() - start:.0f} s')
    return error


def without_volatile_metadata(notebook):
    """Takes out what differs on another machine or another day though the outputs do not."""
    notebook.metadata = {
        'kernelspec': {'display_name': 'Python 3 (ipykernel)', 'language': 'python',
                       'name': 'python3'},
        'language_info': {'name': 'python'}}
    for cell in notebook.cells:
        kept = {name: cell.metadata[name] for name in ('tags', 'jupyter') if name in cell.metadata}
        cell.metadata = kept


def without_transparency(notebook):
    """Takes the channel of transparency out of the figures, where it says nothing: a tenth less."""
    for cell in notebook.cells:
        for output in cell.get('outputs', []):
            if 'image/png' not in output.get('data', {}):
                continue
            figure = io.BytesIO()
            stored = Image.open(io.BytesIO(base64.b64decode(output.data['image/png'])))
            stored.convert('RGB').save(figure, 'PNG', optimize=True)
            output.data['image/png'] = base64.b64encode(figure.getvalue()).decode()


def store(notebook, folder, path):
    """Writes the notebook and an HTML page of it into the folder, and says how to see them."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / path.name
    page = result.with_suffix('.html')
    write(result, nbformat.writes(notebook) + '\n')
    html, _ = HTMLExporter().from_notebook_node(notebook, {'metadata': {'name': path.stem}})
    write(page, html)
    print(f'The result, to look at:    {page} (any browser), {result}\n'
          f'To work in JupyterLab:     make lab\n'
          f'           without make:   {sys.executable} -m jupyter lab {path}')


def write(path, text):
    """All of the text, or nothing: an interrupt leaves the old file whole."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text, encoding='utf-8', newline='\n')
    os.replace(temporary, path)


if __name__ == '__main__':
    run(main)
