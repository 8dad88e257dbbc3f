"""Runs a notebook top to bottom in a fresh kernel of this Python, and stores the result.

    python tests/run_notebook.py Assignment4.ipynb              # experiments/Assignment4.{ipynb,html}
    python tests/run_notebook.py Assignment4.ipynb --in-place   # renews the stored outputs
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebook', type=Path)
    parser.add_argument('--in-place', action='store_true', help='renew the stored outputs')
    parser.add_argument('--output', type=Path, default=Path('experiments'), help='folder of the result')
    args = parser.parse_args()

    os.environ.setdefault('JUPYTER_PREFER_ENV_PATH', '1')  # this Python's kernel, not one of the user's
    notebook = nbformat.read(args.notebook, as_version=4)
    cells = [k for k, cell in enumerate(notebook.cells) if cell.cell_type == 'code']
    start = time.time()

    def report(cell, cell_index, **_):
        print(f'\rcell {cells.index(cell_index) + 1} of {len(cells)}, {time.time() - start:.0f} s',
              end='' if sys.stdout.isatty() else '\n', flush=True)

    retrains = os.environ.get('RETRAIN', '0') not in ('', '0')
    client = NotebookClient(
        notebook, timeout=None if retrains else 900, kernel_name='python3', record_timing=False,
        on_cell_execute=report, resources={'metadata': {'path': str(args.notebook.resolve().parent)}})
    error = None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = failure
    print(f'\n{args.notebook} {"stopped at an error" if error else "is done"} after {time.time() - start:.0f} s')
    without_volatile_metadata(notebook)
    for output in [output for cell in notebook.cells for output in cell.get('outputs', [])]:
        if 'image/png' in output.get('data', {}):
            output.data['image/png'] = without_transparency(output.data['image/png'])

    if args.in_place and not error:
        write(args.notebook, nbformat.writes(notebook) + '\n')
        print(f'Its stored outputs are renewed. To see what changed: nbdiff {args.notebook}')
        return
    result = args.output / args.notebook.name
    args.output.mkdir(parents=True, exist_ok=True)
    write(result, nbformat.writes(notebook) + '\n')
    page, _ = HTMLExporter().from_notebook_node(notebook, {'metadata': {'name': args.notebook.stem}})
    write(result.with_suffix('.html'), page)
    print(f'The result, to look at:    {result.with_suffix(".html")} (any browser), {result}\n'
          f'To work in JupyterLab:     make lab\n'
          f'           without make:   {sys.executable} -m jupyter lab {args.notebook}')
    if error:
        sys.exit(str(error))


def without_volatile_metadata(notebook):
    """Takes out what another machine or another day would change without a change of the outputs."""
    notebook.metadata = {
        'kernelspec': {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'},
        'language_info': {'name': 'python'}}
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name in ('tags', 'jupyter')}


def without_transparency(png):
    """A figure (PNG in base64) without its channel of transparency, which says nothing here: a tenth smaller."""
    figure = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').save(figure, 'PNG', optimize=True)
    return base64.b64encode(figure.getvalue()).decode()


def write(path, text):
    """All of the text, or nothing: an interrupt leaves the old file whole."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text, encoding='utf-8', newline='\n')
    os.replace(temporary, path)


if __name__ == '__main__':
    main()
