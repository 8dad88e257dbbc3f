"""Grades what students have written in denoising_utils.py, by the hidden checks.

    python -m programs.grade SUBMISSIONS OUT              # a folder of ZIP files or folders
    python -m programs.grade SUBMISSIONS OUT --stage 2    # parts 13 to 18 alone

Each part is graded in the reference solution, in which only the definitions of that part are the
student's: a mistake costs once. OUT gets grades.csv, and for each student a page of feedback and
Gradescope's results.json. How it is safe, and how far: docs/classroom.md.
"""
import argparse
import ast
import contextlib
import csv
import dataclasses
import functools
import gc
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from programs import run
from programs.release import HERE, UTILITIES, find_definitions, read_plan
from programs.sandbox import outcome, run_checks
from programs.suspicion import suspicious

HIDDEN = HERE / 'programs' / 'classroom' / 'hidden'
LARGEST = 2 ** 20  # bytes of a file that is read
GIVEN = ('nntools.py', 'submit.py')  # other Python files of a student's folder


@dataclasses.dataclass(frozen=True)
class Check:
    """A hidden check: a function of the module to grade, and perhaps of an empty folder."""
    part: int
    points: int
    function: object

    @property
    def text(self):
        """What must hold, in words."""
        return ' '.join(self.function.__doc__.split())


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a check: the points, and what is to be said of it."""
    part: int
    points: int
    of: int
    text: str = ''  # empty if all is right


# --- what was handed in --------------------------------------------------------------------------

def student_of(path):
    return path.name if path.is_dir() else path.stem


def read_submission(path):
    """The text of a student's denoising_utils.py, in a folder or ZIP file, however deep in it.

    Raises ValueError if it is missing or can't be read. A single other Python file will do.
    """
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in path.rglob('*.py')}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        name = _pick(sizes)
        return _decoded(files[name].read_bytes(), name)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {one.filename: one.file_size for one in archive.infolist()}
            name = _pick(sizes)
            return _decoded(archive.read(name), name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
        raise ValueError(f'{path.name} is not a ZIP file that can be read ({error})') from None


def _pick(sizes):
    """The name of the file to grade: the least deep of that name, or the only other one."""
    names = [name for name in sizes if Path(name).name == UTILITIES and '__MACOSX' not in name]
    if not names:
        others = [name for name in sizes if name.endswith('.py') and '__MACOSX' not in name
                  and Path(name).name not in GIVEN and not Path(name).name.startswith('test')]
        if len(others) != 1:
            raise ValueError(f'there is no {UTILITIES}')
        names = others
    name = min(names, key=lambda name: (len(Path(name).parts), name))
    if sizes[name] > LARGEST:
        raise ValueError(f'{name} has {sizes[name]:,} bytes: more than {LARGEST:,} are not read')
    return name


def _decoded(content, name):
    try:
        text = content.decode('utf-8-sig').replace('\r\n', '\n')
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f'{name} is not a Python file that can be read ({error})') from None
    return text


# --- the module of a part ------------------------------------------------------------------------

def lines_of(source, node):
    """The text of a definition, decorators and all, not indented."""
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    lines = source.split('\n')[first - 1:node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    # Text that is less deep, as in a docstring, stays.
    return [line[indent:] if not line[:indent].strip() else line for line in lines]


@functools.cache
def _known(reference):
    """Of the reference: the qualified names of all that it defines, and its statements."""
    body = ast.parse(reference).body
    names = {name for node in body for name in _names(node)}
    for node in body:
        if isinstance(node, ast.ClassDef):
            names |= {f'{node.name}.{name}' for inner in node.body for name in _names(inner)}
    return names, {ast.dump(node) for node in body}


def _names(node):
    """What a statement gives a name: a function, a class, constants; of others nothing."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _text(source, node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return lines_of(source, node)
    return ast.unparse(node).split('\n')


def own_text(source, definitions, reference):
    """What of a student's file is graded: a dict of qualified name to lines.

    They are the ``definitions`` of a part, what the reference doesn't have in their classes, and
    under '' what it doesn't have outside of classes, imports too.
    """
    tree, mine = ast.parse(source), find_definitions(source)
    own = {name: lines_of(source, mine[name]) for name in definitions if name in mine}
    known, given = _known(reference)
    classes = {name.rpartition('.')[0] for name in definitions}
    rest = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for inner in node.body:
                for name in _names(inner):
                    if f'{node.name}.{name}' not in known:
                        own[f'{node.name}.{name}'] = _text(source, inner)
        is_own = _names(node) and known.isdisjoint(_names(node))
        is_import = isinstance(node, (ast.Import, ast.ImportFrom)) and ast.dump(node) not in given
        if is_own or is_import:
            rest += _text(source, node)
    return own | {'': rest}


def with_own(reference, definitions, own):
    """The reference with a student's text in the place of its ``definitions``."""
    nodes, lines = find_definitions(reference), reference.split('\n')
    added = set()  # classes that have the student's own methods already
    for name in sorted(definitions, key=lambda name: -nodes[name].lineno):
        node = nodes[name]
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        new = list(own.get(name, _missing(name)))
        holder = name.rpartition('.')[0]
        if holder and holder not in added:
            added.add(holder)
            for other, text in own.items():
                if other and other not in definitions and other.rpartition('.')[0] == holder:
                    new += ['', *text]
        indent = ' ' * node.col_offset
        lines[first - 1:node.end_lineno] = [indent + line if line else line for line in new]
    return '\n'.join([*lines, '', *own['']]) + '\n'


def _missing(name):
    short = name.rpartition('.')[2]
    return [f'def {short}(*args, **options):',
            f"    raise NotImplementedError('there is no {name}')"]


# --- grading -------------------------------------------------------------------------------------

def read_checks(parts):
    """The hidden checks of the ``parts``, in order."""
    checks = []
    for file in sorted(HIDDEN.glob('test_hidden_*.py')):
        module = importlib.import_module(f'programs.classroom.hidden.{file.stem}')
        part = module.pytestmark.args[0]
        for name, function in vars(module).items():
            if name.startswith('test_') and part in parts:
                points = [mark.args[0] for mark in function.pytestmark if mark.name == 'points']
                checks.append(Check(part, points[0], function))
    return checks


def grade(source, checks, definitions, reference, cache):
    """The `Result` of each check for a student's file."""
    results = []
    for part in dict.fromkeys(check.part for check in checks):
        of_part = [check for check in checks if check.part == part]
        names = [one.name for one in definitions if one.part == part]
        own = own_text(source, names, reference)
        key = part, json.dumps(own)
        if key not in cache:
            cache[key] = _grade_part(of_part, names, own, reference)
        results += cache[key]
    return results


def _grade_part(checks, names, own, reference):
    why = suspicious('\n\n'.join('\n'.join(lines) for lines in own.values()))
    if why:
        text = f'Set aside, to be looked at by hand: {why}'
        return [Result(check.part, 0, check.points, text) for check in checks]
    module = with_own(reference, names, own)
    said = run_checks(module, [check.function for check in checks])
    results = []
    for check, wrong in zip(checks, said):
        text, points = '', check.points
        if wrong is not None:
            points = 0
            text = f'Should be so: {check.text}' + (f' ({wrong})' if wrong else '')
        results.append(Result(check.part, points, check.points, text))
    return results


# --- what comes out ------------------------------------------------------------------------------

def write_results(folder, student, results):
    """A student's page of feedback, and Gradescope's results.json."""
    got, of = sum(one.points for one in results), sum(one.of for one in results)
    page = [f'# {student}: {got} of {of} points', '']
    tests = []
    for part in dict.fromkeys(one.part for one in results):
        of_part = [one for one in results if one.part == part]
        points, most = sum(one.points for one in of_part), sum(one.of for one in of_part)
        words = list(dict.fromkeys(one.text for one in of_part if one.text)) or ['All is right.']
        page += [f'## Part {part}: {points} of {most}', '', *(f'- {text}' for text in words), '']
        tests.append({'name': f'Part {part}', 'score': points, 'max_score': most,
                      'output': '\n'.join(words)})
    (folder / student).mkdir(parents=True)
    (folder / student / 'feedback.md').write_text('\n'.join(page), encoding='utf-8')
    results_json = {'score': got, 'tests': tests}
    (folder / student / 'results.json').write_text(json.dumps(results_json, indent=1))


def grade_all(submissions, folder, checks, definitions):
    """Grades some submissions, one after the other. Returns rows (student, part, points, of, note).
    """
    reference = (HERE / UTILITIES).read_text(encoding='utf-8')
    rows, cache = [], {}
    for path in submissions:
        student, note = student_of(path), ''
        try:
            results = grade(read_submission(path), checks, definitions, reference, cache)
        except (ValueError, OSError) as error:  # such as of a link that leads nowhere
            note = str(error)
            results = [Result(check.part, 0, check.points, note) for check in checks]
        write_results(folder, student, results)
        for part in dict.fromkeys(check.part for check in checks):
            of_part = [one for one in results if one.part == part]
            aside = [one.text for one in of_part if one.text.startswith('Set aside')]
            rows.append([student, part, sum(one.points for one in of_part),
                         sum(one.of for one in of_part), note or ''.join(aside[:1])])
    return rows


def warm_up(checks):
    """Runs the checks on the solution: what they import and cache, the forks then have."""
    import denoising_utils

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        for number, check in enumerate(checks):
            outcome(check.function, denoising_utils, folder, number)
    gc.freeze()  # the forks needn't go through all that is there by now


def side_by_side(submissions, folder, checks, definitions, workers):
    """`grade_all`, of shares in processes of their own."""
    files = []
    for number in range(workers):
        files.append(folder / f'rows{number}.json')
        if os.fork() == 0:
            status = 1
            try:
                share = submissions[number::workers]
                files[number].write_text(json.dumps(
                    grade_all(share, folder, checks, definitions)))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
    statuses = [os.wait()[1] for _ in files]
    if any(statuses):
        raise RuntimeError('grading has failed, see above; nothing was written')
    rows = [row for file in files for row in json.loads(file.read_text())]
    for file in files:
        file.unlink()
    return sorted(rows)


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.grade', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('submissions', type=Path, help='folder with a ZIP file or a folder for each student')
    add('out', type=Path, help='folder for the results; it must not exist')
    add('--stage', type=int, help='grade the parts of a stage only (default: all)')
    add('--workers', type=int, default=2, help='students at a time (default: %(default)s)')
    args = parser.parse_args(words)
    if not args.submissions.is_dir():
        raise ValueError(f'{args.submissions} is not a folder with what was handed in')
    if args.out.exists():
        raise ValueError(f'{args.out} exists already: name another folder')
    plan = read_plan()
    parts = range(1, 24)
    if args.stage is not None:
        first, last = plan.stage(args.stage).parts
        parts = range(first, last + 1)
    submissions = [path for path in sorted(args.submissions.iterdir())
                   if path.is_dir() or path.suffix == '.zip']
    if not submissions:
        raise ValueError(f'{args.submissions} has no ZIP files and no folders')
    students = [student_of(path) for path in submissions]
    if twice := {student for student in students if students.count(student) > 1}:
        raise ValueError(f'a ZIP file and a folder have the same name: {", ".join(twice)}')

    # All or nothing: the folder appears when all are graded.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.out.parent, prefix='.grading-'))
    try:
        checks = read_checks(parts)
        warm_up(checks)
        rows = side_by_side(submissions, folder, checks, plan.definitions, args.workers)
        with open(folder / 'grades.csv', 'w', newline='', encoding='utf-8') as stream:
            csv.writer(stream).writerows([['student', 'part', 'points', 'of', 'note'], *rows])
        folder.rename(args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    aside = {row[0] for row in rows if row[4]}
    print(f'{len(submissions)} graded: {args.out}/grades.csv')
    if aside:
        print(f'To be looked at by hand, with the reason in grades.csv: {", ".join(sorted(aside))}')


if __name__ == '__main__':
    run(main)
