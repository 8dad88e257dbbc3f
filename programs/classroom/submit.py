"""Makes submission.zip, to hand in, and says what is not done yet: python submit.py"""
import ast
import json
import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAST_PART = 23  # of this stage
NOTEBOOK = HERE / 'Assignment4.ipynb'
UTILITIES = HERE / 'denoising_utils.py'
STUB = re.compile(r"NotImplementedError\('part (\d+): write ([\w.]+)'\)")


def stubs():
    """What is still to be written in the utilities: a list of lines. Exits if it isn't Python."""
    try:
        source = read(UTILITIES)
        ast.parse(source, UTILITIES.name)
    except (SyntaxError, ValueError) as error:  # the latter of what isn't a text
        sys.exit(f'{UTILITIES.name} is not Python: {error}. Correct it, then try again.')
    found = [(int(part), name) for part, name in STUB.findall(source)]
    return [f'part {part}: {name} is not written'
            for part, name in sorted(found) if part <= LAST_PART]


def empty_answers():
    """The parts without an answer in the notebook: a list of lines. Exits if it isn't one."""
    try:
        cells = json.loads(read(NOTEBOOK))['cells']
        sources = [''.join(cell['source']) for cell in cells]
    except (ValueError, KeyError, TypeError):
        sys.exit(f'{NOTEBOOK.name} is not a notebook: save it again in JupyterLab.')
    empty = [re.match(r'\*\*Your answer\*\* \(part (\d+), .*\*Write here\.\*$', source)
             for source in sources]
    return [f'part {match[1]}: there is no answer in the notebook' for match in empty if match]


def read(file):
    if not file.is_file():
        sys.exit(f'{file.name} is missing: it must be in {HERE}, under this name.')
    return file.read_text(encoding='utf-8')


def main():
    missing = stubs() + empty_answers()
    target = HERE / 'submission.zip'
    with zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in (NOTEBOOK, UTILITIES):
            archive.write(file, file.name)
    for line in missing:
        print(line)
    print(f'{target.name} is written, with {NOTEBOOK.name} and {UTILITIES.name}.',
          f'Not done yet: {len(missing)}, see above.' if missing else 'Nothing is missing.')


if __name__ == '__main__':
    main()
