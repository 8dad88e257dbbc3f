"""Makes submissions of a class, to grade: solutions, stubs, planted errors, and what goes wrong.

    python -m tests.submissions FOLDER 200
    time make grade SUBMISSIONS=FOLDER OUT=FOLDER.graded

Each has a comment of its own in every definition, so that no result of another serves for it.
"""
import sys
import zipfile
from pathlib import Path

from programs.grade import HERE, UTILITIES
from programs.release import cut, find_definitions, read_plan
from tests.planted_errors import PLANTED

ODD = {
    'no Python': 'def forward(:',
    'endless': 'while True:\n    pass\n',
    'malicious': 'import os\nos.system("true")\n',
    'empty': '',
}


def with_errors(source, rows):
    """The source with errors planted, as they stand in the table."""
    for _, name, _, old, new in rows:
        node, lines = find_definitions(source)[name], source.split('\n')
        text = '\n'.join(lines[node.lineno - 1:node.end_lineno])
        lines[node.lineno - 1:node.end_lineno] = text.replace(old, new).split('\n')
        source = '\n'.join(lines)
    return source


def signed(source, definitions, number):
    """The source with a comment in each definition."""
    lines, nodes = source.split('\n'), find_definitions(source)
    ends = sorted((nodes[one.name].end_lineno for one in definitions), reverse=True)
    for end in ends:
        indent = len(lines[end - 1]) - len(lines[end - 1].lstrip())
        lines[end - 1] += '  # ' if indent else ''
        lines[end - 1] += f'student {number}' if indent else ''
    return '\n'.join(lines)


def main(folder, count):
    reference, plan = (HERE / UTILITIES).read_text(encoding='utf-8'), read_plan()
    folder = Path(folder)
    folder.mkdir(parents=True)
    endless = with_errors(reference, [(5, 'DnCNN.forward', '', 'return x', 'while True: pass #')])
    kinds = [reference, cut(reference, plan.definitions), *ODD.values(), endless]
    for number in range(int(count)):
        if number < len(kinds):
            source = kinds[number]
        else:  # one to three errors, in different definitions
            rows = [PLANTED[(number * step) % len(PLANTED)] for step in (1, 7, 11)]
            rows = list({row[1]: row for row in rows[:number % 3 + 1]}.values())
            source = signed(with_errors(reference, rows), plan.definitions, number)
        with zipfile.ZipFile(folder / f'student{number:03}.zip', 'w') as archive:
            archive.writestr(UTILITIES, source)


if __name__ == '__main__':
    main(*sys.argv[1:])
