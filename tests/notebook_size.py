"""Counts the words and the lines of code of the notebook.

    python -m tests.notebook_size [NOTEBOOK]

Words are those of Markdown cells, without formulas and blocks of code; lines are those of code
cells that are not blank.
"""
import re
import sys
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / 'Assignment4.ipynb'
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
LEFT_OUT = re.compile(r'^```.*?^```|\$\$.*?\$\$|\$[^$\n]*\$', re.MULTILINE | re.DOTALL)


def prose(notebook):
    text = '\n\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')
    return LEFT_OUT.sub('', text)


def words(text):
    return len(WORD.findall(text))


def lines_of_code(notebook):
    code = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
    return sum(bool(line.strip()) for source in code for line in source.split('\n'))


def part(text, number):
    """The text from one heading of a numbered part to the next heading of its level."""
    return re.search(rf'^## {number}\. .*?(?=^## )', text, re.MULTILINE | re.DOTALL)[0]


if __name__ == '__main__':
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    notebook = nbformat.read(file, as_version=4)
    text = prose(notebook)
    print(f'{words(text):,} words, {words(part(text, 22)):,} of them in part 22; '
          f'{lines_of_code(notebook)} lines of code; {file.stat().st_size / 1e6:.2f} MB')
