"""Makes what students are given from the solved assignment.

    python -m programs.release 1 FOLDER       # a stage: 1, 2 or 3
    python -m programs.release sheet FILE     # for who marks what is graded by hand
"""
import ast
import dataclasses
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest and JupyterLab bring tomli
    import tomli as tomllib

HERE = Path(__file__).resolve().parents[1]
PLAN = HERE / 'programs' / 'release.toml'


# --- the plan ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Definition:
    """What students write: a function or a method of ``denoising_utils.py``, by qualified name."""
    name: str
    part: int
    points: int
    docstring: str | None = None  # in place of one that tells the answer


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is handed out at a time: the parts from the first to the last."""
    number: int
    parts: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The file ``release.toml``."""
    stages: list[Stage]
    definitions: list[Definition]

    def stage(self, number):
        """The stage of a number. Raises ValueError if there is none."""
        for stage in self.stages:
            if stage.number == number:
                return stage
        numbers = ', '.join(str(stage.number) for stage in self.stages)
        raise ValueError(f'there is no stage {number}: it must be one of {numbers}')


def read_plan(file=PLAN):
    """The plan in ``file``: a `Plan`."""
    with open(file, 'rb') as stream:
        plan = tomllib.load(stream)
    return Plan(
        stages=[Stage(row['number'], tuple(row['parts'])) for row in plan['stage']],
        definitions=[Definition(**row) for row in plan['definition']])


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
