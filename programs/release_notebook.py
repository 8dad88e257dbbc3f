"""The student's notebook and the instructor's sheet, made from the solved notebook by its tags.

``given`` stays. ``answer`` goes; in its place there may be a note, and at the end of the part a
cell to write in. ``solution`` is code that students write; in its place there is a comment that
says what. ``expected``, beside one of these, keeps the picture of what comes out. ``cover`` is
what stands before part 1; students get another one.
"""
import re
from string import Template

from nbformat import v4

TAGS = ('given', 'answer', 'solution')
NUMBER = re.compile(r'## (\d+)\. (.*)')
TO_WRITE = '*Write here.*'


# --- the solved notebook -------------------------------------------------------------------------
def parts_of(notebook):
    """The cells of each part, a dict of its number to a list: a heading, then cells with tags.
    What follows the last part is left out. Raises ValueError where a tag is missing."""
    parts, part = {}, None
    for cell in notebook.cells:
        tags = cell.metadata.get('tags', [])
        if 'cover' in tags:
            continue
        if cell.cell_type == 'markdown' and cell.source.startswith('## '):
            number = NUMBER.match(cell.source)
            if number is None:  # the summary
                break
            part = parts[int(number[1])] = [cell]
            continue
        if len(set(TAGS) & set(tags)) != 1:
            raise ValueError(f'a cell must have one of the tags {", ".join(TAGS)}, and this one '
                             f'has {tags}: {cell.source[:60]!r}')
        part.append(cell)
    return parts


def has_tag(cell, tag):
    return tag in cell.metadata.get('tags', [])


def title(cells):
    """The title of a part, as in its heading."""
    return NUMBER.match(cells[0].source)[2]


def paragraphs(cells, answers):
    """The paragraphs of a heading: those that answer, or all the others."""
    found = cells[0].source.split('\n\n')
    return [text for text in found if text.startswith('**Answer.**') == answers]


# --- the student's notebook ----------------------------------------------------------------------
def student_notebook(notebook, plan, stage, classroom):
    """The notebook of a stage. ``classroom`` is the folder of the templates and public checks."""
    parts = {number: cells for number, cells in parts_of(notebook).items() if stage.has(number)}
    cells = [cover(parts, stage, classroom)]
    for number, part in parts.items():
        if stage.leaves_open(number):
            cells += unsolved(part, number, plan, classroom)
        else:
            cells += solved(part)
    new = v4.new_notebook(cells=cells, metadata=notebook.metadata)
    for k, cell in enumerate(new.cells):
        cell.id = f'cell-{k + 1:03}'
    return new


def words(stage):
    """What stands for ``$stage``, ``$first`` and ``$last`` in a template."""
    first, last = stage.parts
    return {'stage': stage.number, 'first': first, 'last': last}


def cover(parts, stage, classroom):
    """What stands before part 1, with a table of contents."""
    lines = []
    for number, cells in parts.items():
        anchor = f'{number}. {title(cells)}'
        solved_one = '' if stage.leaves_open(number) else ' (solved)'
        lines.append(f'* [{anchor}](<#{anchor.replace(" ", "-")}>){solved_one}')
    template = Template((classroom / 'cover.md').read_text(encoding='utf-8'))
    return v4.new_markdown_cell(template.substitute(words(stage), contents='\n'.join(lines)))


def solved(part):
    """The cells of a part of an earlier stage: its code, but not the answers in words."""
    heading = v4.new_markdown_cell('\n\n'.join(paragraphs(part, answers=False)))
    return [heading, *(as_given(cell) for cell in part[1:] if not has_tag(cell, 'answer'))]


def as_given(cell):
    """A cell without outputs, tags, and what is for the checks of the solved notebook."""
    source = re.sub(r'^# NBVAL_.*\n', '', cell.source, flags=re.MULTILINE)
    if cell.cell_type == 'code':
        return v4.new_code_cell(source)
    return v4.new_markdown_cell(source)


def unsolved(part, number, plan, classroom):
    """The cells of a part that students are to solve: the question, places to predict and to
    answer, and what is given between them."""
    by_hand = plan.part(number)
    yield v4.new_markdown_cell('\n\n'.join(paragraphs(part, answers=False)))
    yield v4.new_markdown_cell(f'**Your prediction:** {TO_WRITE}')
    definitions = [one for one in plan.definitions if one.part == number]
    if definitions:
        yield check(definitions, classroom / 'tests' / f'test_part_{number:02}.py')

    answer, solution = first(part, 'answer'), first(part, 'solution')
    for cell in part[1:]:
        if has_tag(cell, 'given'):
            yield as_given(cell)
        if cell is answer and by_hand.note:
            yield v4.new_markdown_cell(by_hand.note.strip())
        if cell is solution:
            lines = by_hand.task.strip().splitlines()
            yield v4.new_code_cell(''.join(f'# {line}\n' for line in lines))
        if has_tag(cell, 'expected'):
            yield expected(cell)

    if by_hand.points:
        yield v4.new_markdown_cell(
            f'**Your answer** (part {number}, points: {by_hand.points}): {TO_WRITE}')


def first(part, tag):
    """The first cell of a part with this tag, or None."""
    return next((cell for cell in part if has_tag(cell, tag)), None)


def check(definitions, test):
    """The cell that says what is to be written in the utilities, and runs its public checks."""
    lines = ['# To write in denoising_utils.py (in brackets: the points):']
    for one in definitions:
        lines.append(f'#   {one.name} ({one.points})' if one.points else f'#   {one.name}')
    if test.is_file():
        lines += ['# Then run this cell.', 'import sys', '',
                  f'!{{sys.executable}} -m pytest -q tests/{test.name}']
    return v4.new_code_cell('\n'.join(lines))


def expected(cell):
    """What comes out of a cell when all is right: its pictures, or else what it prints."""
    pictures = [output for output in cell.outputs if 'image/png' in output.get('data', {})]
    lines, attachments = ['**Expected:**'], {}
    for k, output in enumerate(pictures, 1):
        name = f'expected-{k}.png'
        alt = output.metadata.get('image/png', {}).get('alt', 'a picture')
        lines.append(f'![{re.sub(r"[][]", "", alt)}](attachment:{name})')
        attachments[name] = {'image/png': output.data['image/png']}
    if not pictures:
        printed = ''.join(output.text for output in cell.outputs if output.output_type == 'stream')
        lines.append(f'```\n{printed.rstrip()}\n```')
    new = v4.new_markdown_cell('\n\n'.join(lines))
    if attachments:
        new.attachments = attachments
    return new


# --- the instructor's sheet ----------------------------------------------------------------------
def sheet(notebook, plan):
    """What is graded by hand, as Markdown: question, full answer, typical mistakes, points."""
    by_hand = sum(part.points for part in plan.parts.values())
    by_tests = sum(one.points for one in plan.definitions)
    texts = ['# What is graded by hand',
             f'{by_hand} points. With the {by_tests} that tests give, that is '
             f'{by_hand + by_tests}. Full answers are those of the solved notebook, which says '
             'more than is asked for; numbers are those of BSDS300, trained at full length.']
    for number, cells in parts_of(notebook).items():
        if number in plan.parts:
            texts.append(of_one_part(cells, plan.parts[number]))
    return '\n\n'.join(texts) + '\n'


def of_one_part(cells, part):
    """A section of the sheet."""
    question = paragraphs(cells, answers=False)[1:]
    texts = [f'## {part.number}. {title(cells)} ({part.points})', *question, '**A full answer**']
    texts += paragraphs(cells, answers=True) or [
        cell.source for cell in cells[1:]
        if has_tag(cell, 'answer') and cell.cell_type == 'markdown']
    texts += [f'```python\n{as_given(cell).source}\n```'
              for cell in cells[1:] if has_tag(cell, 'solution')]
    texts.append('**Typical mistakes**\n\n' + '\n'.join(f'* {line}' for line in part.wrong))
    return '\n\n'.join(texts).replace('**Answer.** ', '')
