"""Makes what students are given from the solved assignment, and the sheet for who marks it.

    python -m programs.release 1 FOLDER       # a stage: 1, 2 or 3
    python -m programs.release sheet FILE     # what is graded by hand

The file ``release.toml`` beside this one says what is cut out; the page ``docs/classroom.md`` how.
"""
import argparse
import ast
import csv
import dataclasses
import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

import nbformat

from programs import release_notebook, run

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest and JupyterLab bring tomli
    import tomli as tomllib

HERE = Path(__file__).resolve().parents[1]
PLAN = HERE / 'programs' / 'release.toml'
CLASSROOM = HERE / 'programs' / 'classroom'
NOTEBOOK = 'Assignment4.ipynb'
UTILITIES = 'denoising_utils.py'


# --- the plan ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Stage:
    """What is handed out at a time: the parts from the first to the last."""
    number: int
    parts: tuple[int, int]
    networks: list[str] = dataclasses.field(default_factory=list)  # whose weights are given
    scores: list[str] = dataclasses.field(default_factory=list)  # the networks in scores.csv

    def leaves_open(self, part):
        """Whether a part isn't solved in what is handed out: it is of this stage, or a later.
        None, of what holds for all parts, is always open."""
        return part is None or part >= self.parts[0]

    def has(self, part):
        """Whether a part is in what is handed out, solved or not."""
        return part <= self.parts[1]


@dataclasses.dataclass(frozen=True)
class Definition:
    """What students write: a function or a method of ``denoising_utils.py``, by qualified name."""
    name: str
    part: int
    points: int
    docstring: str | None = None  # in place of one that tells the answer


@dataclasses.dataclass(frozen=True)
class Part:
    """What is graded by hand in a part of the notebook."""
    number: int
    points: int = 0
    task: str = ''  # the comment in the empty cell where students write code
    note: str = ''  # a text in place of the answer
    wrong: list[str] = dataclasses.field(default_factory=list)  # typical mistakes


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A text in a file that stands there once, and what replaces it until a part is solved."""
    file: str
    old: str
    new: str
    part: int | None = None  # None: always


@dataclasses.dataclass(frozen=True)
class Leak:
    """What must not stand in a folder while a part isn't solved."""
    phrases: list[str]
    part: int | None = None  # None: never


@dataclasses.dataclass(frozen=True)
class Plan:
    """The file ``release.toml``."""
    requirements: list[str]
    stages: list[Stage]
    definitions: list[Definition]
    parts: dict[int, Part]
    replacements: list[Replacement]
    leaks: list[Leak]

    def stage(self, number):
        """The stage of a number. Raises ValueError if there is none."""
        for stage in self.stages:
            if stage.number == number:
                return stage
        numbers = ', '.join(str(stage.number) for stage in self.stages)
        raise ValueError(f'there is no stage {number}: it must be one of {numbers}')

    def part(self, number):
        """What is graded by hand in a part, perhaps nothing."""
        return self.parts.get(number, Part(number))

    def replacements_in(self, file, stage):
        """What is replaced in a file while parts of the stage, and later ones, are open."""
        return [one for one in self.replacements
                if one.file == file and stage.leaves_open(one.part)]


def read_plan(file=PLAN):
    """The plan in ``file``: a `Plan`."""
    with open(file, 'rb') as stream:
        plan = tomllib.load(stream)
    parts = [Part(**row) for row in plan['part']]
    return Plan(
        requirements=plan['requirements'],
        stages=[Stage(**row | {'parts': tuple(row['parts'])}) for row in plan['stage']],
        definitions=[Definition(**row) for row in plan['definition']],
        parts={part.number: part for part in parts},
        replacements=[Replacement(**row) for row in plan['replacement']],
        leaks=[Leak(**row) for row in plan['leak']])


# --- code ----------------------------------------------------------------------------------------
def find_definitions(source):
    """The functions, and the classes with their methods: a dict of qualified name to ast node."""
    found = {}

    def collect(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                collect(node.body, f'{prefix}{node.name}.')

    collect(ast.parse(source).body, '')
    return found


def cut(source, definitions):
    """The source with a stub for each of the ``definitions``, and otherwise as it is. Raises
    ValueError if one of them isn't there."""
    nodes = find_definitions(source)
    missing = [definition.name for definition in definitions if definition.name not in nodes]
    if missing:
        raise ValueError(f'no such definition in the source: {", ".join(missing)}')
    lines = source.splitlines(keepends=True)
    # From the bottom up: the numbers of the lines above stay right.
    for definition in sorted(definitions, key=lambda one: -nodes[one.name].lineno):
        cut_one(lines, nodes[definition.name], definition)
    return ''.join(lines)


def cut_one(lines, node, definition):
    """Puts an error that says what to do in place of a body. A docstring stays, or is replaced."""
    first, end = node.body[0].lineno - 1, node.end_lineno
    new = []
    if definition.docstring:
        text = definition.docstring.strip()
        closing = '\n"""' if '\n' in text else '"""'
        new = f'"""{text}{closing}'.splitlines()
    elif ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    new.append(f"raise NotImplementedError('part {definition.part}: write {definition.name}')")
    indent = ' ' * node.body[0].col_offset
    lines[first:end] = [f'{indent}{line}'.rstrip() + '\n' for line in new]


def replaced(source, replacements):
    """The source with other texts. Raises ValueError where an old text isn't there exactly once."""
    for replacement in replacements:
        count = source.count(replacement.old)
        if count != 1:
            raise ValueError(
                f'{replacement.file} must have this text once, and has it {count} times: '
                f'{replacement.old!r}. Change it in {PLAN.name} too.')
        source = source.replace(replacement.old, replacement.new)
    return source


def student_utilities(plan, stage):
    """The text of ``denoising_utils.py`` with what a stage leaves to write."""
    source = (HERE / UTILITIES).read_text(encoding='utf-8')
    source = cut(source, [one for one in plan.definitions if stage.leaves_open(one.part)])
    return replaced(source, plan.replacements_in(UTILITIES, stage))


def student_notebook(plan, stage):
    """The notebook with what a stage leaves to write."""
    notebook = nbformat.read(HERE / NOTEBOOK, as_version=4)
    sources = '\0'.join(cell.source for cell in notebook.cells)
    sources = replaced(sources, plan.replacements_in(NOTEBOOK, stage)).split('\0')
    for cell, source in zip(notebook.cells, sources):
        cell.source = source
    return release_notebook.student_notebook(notebook, plan, stage, CLASSROOM)


# --- the folder ----------------------------------------------------------------------------------
def release(number, out):
    """Writes the folder ``out`` of a stage, all or nothing. Raises FileExistsError if it exists,
    and ValueError if the plan doesn't fit or an answer is left."""
    if out.exists():
        raise FileExistsError(f'{out} exists, and is never overwritten: name another folder')
    plan = read_plan()
    stage = plan.stage(number)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.release-') as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        fill(folder, plan, stage)
        leaks = find_leaks(folder, plan, stage)
        if leaks:
            raise ValueError('answers are left in the folder:\n' + '\n'.join(leaks))
        os.replace(folder, out)


def fill(folder, plan, stage):
    """Writes all files of a stage into an empty folder."""
    shutil.copy(HERE / 'nntools.py', folder)
    write(folder / UTILITIES, student_utilities(plan, stage))
    write(folder / 'requirements.txt', requirements(plan.requirements))
    copy_tests(folder / 'tests', stage)
    write(folder / NOTEBOOK, nbformat.writes(student_notebook(plan, stage)) + '\n')
    # Their templates.
    shutil.copy(CLASSROOM / 'Makefile', folder)
    submit = (CLASSROOM / 'submit.py').read_text(encoding='utf-8')
    write(folder / 'submit.py', submit.replace('LAST_PART = 23', f'LAST_PART = {stage.parts[1]}'))
    readme = Template((CLASSROOM / 'README.md').read_text(encoding='utf-8'))
    write(folder / 'README.md', readme.substitute(release_notebook.words(stage)))
    # What the notebook reads.
    checkpoints = folder / 'checkpoints'
    checkpoints.mkdir()
    shutil.copy(HERE / 'checkpoints' / 'BSDS300.sha256', checkpoints)
    write(checkpoints / 'scores.csv', scores(stage.scores))
    for network in stage.networks:
        shutil.copytree(HERE / 'checkpoints' / network, checkpoints / network)


def write(file, text):
    file.write_text(text, encoding='utf-8', newline='\n')


def requirements(names):
    """The lines of ``requirements.txt`` that begin with these packages."""
    lines = (HERE / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    by_name = {re.split('[>=<]', line)[0]: line.partition('#')[0].rstrip() for line in lines}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f'not in requirements.txt: {", ".join(missing)}. Change {PLAN.name}.')
    return '\n'.join(by_name[name] for name in names) + '\n'


def copy_tests(folder, stage):
    """Copies the public checks: what they have in common, and those of the stage's parts."""
    folder.mkdir()
    for file in sorted((CLASSROOM / 'tests').glob('*.py')):
        number = re.fullmatch(r'test_part_(\d+)\.py', file.name)
        if number is None or stage.has(int(number[1])):
            shutil.copy(file, folder)


def scores(networks):
    """The stored scores of some networks on the test photographs, as text (CSV)."""
    with open(HERE / 'checkpoints' / 'scores.csv', newline='', encoding='utf-8') as stream:
        header, *rows = csv.reader(stream)
    kept = [row for row in rows if row[0] in networks]
    return ''.join(','.join(row) + '\n' for row in [header, *kept])


# --- leaks ---------------------------------------------------------------------------------------
def find_leaks(folder, plan, stage):
    """The phrases of the plan that stand in the files of a folder: a list of lines."""
    found = []
    for file in sorted(folder.rglob('*')):
        if file.is_dir() or file.name == 'checkpoint.pth.tar':
            continue
        text = all_text(file)
        for leak in plan.leaks:
            if stage.leaves_open(leak.part):
                found += [f'{file.relative_to(folder)}: {phrase!r}'
                          for phrase in leak.phrases if phrase in text]
    return found


def all_text(file):
    """The text of a file; of a notebook that of its cells, without the pictures."""
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.ipynb':
        text = '\n\n'.join(cell['source'] for cell in nbformat.reads(text, as_version=4).cells)
    return text


# --- the sheet -----------------------------------------------------------------------------------
def write_sheet(file):
    """Writes the instructor's sheet. Raises FileExistsError if the file exists."""
    if file.exists():
        raise FileExistsError(f'{file} exists, and is never overwritten: name another file')
    notebook = nbformat.read(HERE / NOTEBOOK, as_version=4)
    write(file, release_notebook.sheet(notebook, read_plan()))


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.release', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', metavar='STAGE', help="a stage (1, 2 or 3), or 'sheet'")
    parser.add_argument('out', metavar='OUT', type=Path, help='what to write, new')
    args = parser.parse_args(words)
    if args.what == 'sheet':
        write_sheet(args.out)
    elif args.what.isdecimal():
        release(int(args.what), args.out)
    else:
        raise ValueError(f"STAGE must be the number of a stage or 'sheet', got {args.what!r}")
    print(f'{args.out} is written.')


if __name__ == '__main__':
    run(main)
