"""A class graded: points by part, whatever students hand in."""
import csv
import json
import os
import zipfile
from pathlib import Path

import pytest

from programs import grade
from programs.release import cut, find_definitions, read_plan
from programs.sandbox import run_checks
from programs.suspicion import suspicious
from tests.planted_errors import PLANTED

pytestmark = [
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, which Windows does not'),
    pytest.mark.xdist_group('grading')]  # one process, which grades what is the same once

REFERENCE = (grade.HERE / grade.UTILITIES).read_text(encoding='utf-8')
PLAN = read_plan()
NAMES = [one.name for one in PLAN.definitions]
CACHE = {}


@pytest.fixture(scope='module')
def checks():
    return grade.read_checks(range(1, 24))


def points_of(source, checks):
    """The points of a file by part."""
    by_part = {}
    for one in grade.grade(source, checks, PLAN.definitions, REFERENCE, CACHE):
        by_part[one.part] = by_part.get(one.part, 0) + one.points
    return by_part


FULL = {}
for _one in PLAN.definitions:
    FULL[_one.part] = FULL.get(_one.part, 0) + _one.points


def changed(name, old, new, source=REFERENCE):
    """The source with a text replaced in one definition, where it must stand once."""
    node, lines = find_definitions(source)[name], source.split('\n')
    text = '\n'.join(lines[node.lineno - 1:node.end_lineno])
    assert text.count(old) == 1, f'{old!r} stands {text.count(old)} times in {name}'
    lines[node.lineno - 1:node.end_lineno] = text.replace(old, new).split('\n')
    return '\n'.join(lines)


def test_points_of_checks_and_definitions_agree(checks):
    by_part = {}
    for check in checks:
        by_part[check.part] = by_part.get(check.part, 0) + check.points
    assert by_part == FULL


def test_the_solution_gets_all_and_stubs_nothing(checks):
    assert points_of(REFERENCE, checks) == FULL
    assert set(points_of(cut(REFERENCE, PLAN.definitions), checks).values()) == {0}
    assert set(points_of('', checks).values()) == {0}


@pytest.mark.parametrize('part, name, what, old, new', PLANTED, ids=[row[2] for row in PLANTED])
def test_a_planted_error_costs_in_its_own_part(checks, part, name, what, old, new):
    points = points_of(changed(name, old, new), checks)
    assert points.pop(part) < FULL[part], what
    assert points == {other: most for other, most in FULL.items() if other != part}


def test_own_helpers_count(checks):
    """Functions, constants, an import and a method that the reference doesn't have."""
    source = changed('DnCNN.forward', 'return x + self.conv[-1](self.features(x))',
                     'return _sum(x, self._noise(x)) * ONE * self.ONE')
    source = source.replace('    def forward(self, x):\n        return _sum', '''\
    ONE = 1

    def _noise(self, x):
        return self.conv[-1](self.features(x))

    def forward(self, x):
        return _sum''', 1)
    source += '\n\nimport operator\n\nONE = 1\n\n\ndef _sum(a, b):\n    return operator.add(a, b)\n'
    assert points_of(source, checks) == FULL


# --- malice --------------------------------------------------------------------------------------

MALICE = {
    'reads the hidden checks': 'open("/tests").read()',
    'imports what it needs for it': 'import os; os.listdir("/")',
    'by another way': '().__class__.__base__.__subclasses__()',
    'ends the program': 'import sys; sys.exit(0)',
    'changes what compares': 'torch.equal = torch.allclose = lambda *args, **options: True',
    'loads what runs code': 'torch.load("x", weights_only=False)',
    'evaluates text': 'eval("1")',
}


@pytest.mark.parametrize('code', MALICE.values(), ids=MALICE)
def test_what_no_solution_needs_is_set_aside(checks, code):
    source = changed('DnCNN.forward', 'return x', f'{code}\n        return x')
    results = grade.grade(source, checks, PLAN.definitions, REFERENCE, CACHE)
    texts = {one.text for one in results if one.part == 5}
    assert len(texts) == 1 and texts.pop().startswith('Set aside, to be looked at by hand: it ')
    points = points_of(source, checks)
    assert points.pop(5) == 0 and sum(points.values()) == sum(FULL.values()) - FULL[5]


def test_nothing_in_the_solution_is_suspicious():
    for part in FULL:
        names = [one.name for one in PLAN.definitions if one.part == part]
        own = grade.own_text(REFERENCE, names, REFERENCE)
        assert suspicious('\n\n'.join('\n'.join(lines) for lines in own.values())) == ''


def holds(du):
    """A check that the code below doesn't get to."""
    assert du.value() == 1


ESCAPES = {
    'writes outside': f'open({str(Path.home() / "points")!r}, "w")',
    'moves a file outside': f'import os; open("a", "w"); os.rename("a", {str(Path.home())!r})',
    'reads the checks': f'open({__file__!r}).read()',
    'kills its parent': 'import os; os.kill(os.getppid(), 9)',
    'starts a process': 'import subprocess; subprocess.run(["true"])',
    'forks': 'import os; os.fork()',
    'has a network': 'import socket; socket.socket()',
    'finds the secret': 'import gc; gc.get_objects()',
}


@pytest.mark.parametrize('code', ESCAPES.values(), ids=ESCAPES)
def test_the_process_refuses(code):
    (wrong,) = run_checks(f'def value():\n    {code}\n    return 1', [holds])
    assert wrong.startswith('PermissionError')


@pytest.mark.parametrize('code, words', [
    ('import os; os._exit(0)', 'it ended the program'),
    ('import os\n    os.closerange(0, 3)\n    for number in range(3, 30):\n        try:\n'
     '            os.write(number, b"null\\nnull\\n")\n        except OSError:\n'
     '            pass\n    return 2', 'it ended the program'),
    ('print("null"); return 2', ''),
    ('return bytes(10 ** 12)', 'MemoryError'),
    ('open("large", "wb").write(bytes(10 ** 8)); return 2', 'OSError'),
    ('raise KeyboardInterrupt', 'KeyboardInterrupt'),
    ('import sys; sys.exit()', 'SystemExit')])
def test_points_are_not_to_be_had_by(code, words):
    first, second = run_checks(f'def value():\n    {code}', [holds, holds])
    assert first is not None and first.startswith(words)
    assert second is not None


def test_an_endless_loop_stops_nobody(monkeypatch):
    monkeypatch.setattr('programs.sandbox.SECONDS', 1)
    forever = 'def value():\n    while True:\n        try:\n            value()\n' \
              '        except BaseException:\n            pass'
    said = run_checks(forever, [holds, holds])
    assert said == ['it took more than 1 seconds'] * 2
    assert run_checks('def value():\n    return 1', [holds]) == [None]


# --- a class -------------------------------------------------------------------------------------

def test_a_class(tmp_path, capsys):
    """Files of all sorts: each gets its points, and none keeps the others from theirs."""
    class_folder = tmp_path / 'class'
    class_folder.mkdir()

    def hand_in(student, files):
        with zipfile.ZipFile(class_folder / f'{student}.zip', 'w') as archive:
            for name, text in files.items():
                archive.writestr(name, text)

    hand_in('ann', {'work/denoising_utils.py': REFERENCE, 'work/nntools.py': 'broken('})
    hand_in('bob', {'my_solution.py': REFERENCE, 'submit.py': ''})
    hand_in('cat', {'notes.txt': 'sorry'})
    hand_in('dan', {'denoising_utils.py': 'def f(:'})
    hand_in('eve', {'denoising_utils.py': b'\xff\xfe\x00'})
    (class_folder / 'fay.zip').write_bytes(b'no ZIP file')
    (class_folder / 'ida').mkdir()
    (class_folder / 'ida' / 'denoising_utils.py').symlink_to('nowhere')
    (class_folder / 'gil').mkdir()
    (class_folder / 'gil' / 'denoising_utils.py').write_text(
        changed('DnCNN.receptive_field', '+ 5', '+ 3'))
    hand_in('hal', {'denoising_utils.py': changed('UDnCNN.join', 'return', 'eval("1")\n        '
                                                  'return')})

    grade.main([str(class_folder), str(tmp_path / 'out'), '--stage', '2'])
    said = capsys.readouterr().out
    with open(tmp_path / 'out' / 'grades.csv', newline='') as stream:
        rows = [*csv.DictReader(stream)]
    total = {}
    for row in rows:
        total[row['student']] = total.get(row['student'], 0) + int(row['points'])
    of = FULL[13] + FULL[15] + FULL[17]
    assert total == {'ann': of, 'bob': of, 'cat': 0, 'dan': 0, 'eve': 0, 'fay': 0,
                     'ida': 0, 'gil': of - FULL[13], 'hal': of - FULL[15]}
    notes = {row['student']: row['note'] for row in rows if row['note']}
    assert notes['cat'] == 'there is no denoising_utils.py'
    assert 'not a Python file' in notes['dan'] and 'not a ZIP file' in notes['fay']
    assert 'hal' in said and 'cat' in said and 'ann' not in said.split('by hand')[1]

    page = (tmp_path / 'out' / 'gil' / 'feedback.md').read_text()
    assert page.startswith(f'# gil: {of - FULL[13]} of {of} points')
    assert 'receptive field of DnCNN' in page and 'assert' not in page and '2D' not in page
    told = json.loads((tmp_path / 'out' / 'gil' / 'results.json').read_text())
    assert told['score'] == of - FULL[13] and [test['score'] for test in told['tests']][0] == 0

    with pytest.raises(ValueError, match='out exists already'):
        grade.main([str(class_folder), str(tmp_path / 'out')])
    (class_folder / 'ann').mkdir()
    with pytest.raises(ValueError, match='same name: ann'):
        grade.main([str(class_folder), str(tmp_path / 'new')])
    with pytest.raises(ValueError, match='no ZIP files'):
        grade.main([str(tmp_path / 'out' / 'gil'), str(tmp_path / 'new')])
