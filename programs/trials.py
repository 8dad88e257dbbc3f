"""How the recipe was chosen: the tables of docs/trials.md, from checkpoints/trials.csv.

`python -m programs.results trials` prints them.
"""
import dataclasses
from pathlib import Path

import denoising_utils as du
from programs.tables import as_cell, read_rows, table

CHECKPOINTS = du.HERE / 'checkpoints'

# The tables that show rows as they are: heading of a column, and its name in trials.csv.
SCORED = {'network': 'network', 'what was changed': 'change', 'seed': 'seed',
          'held out (dB)': 'held_out', 'machine': 'machine', 'date': 'date'}
TRAINED = {'network': 'network', 'what was changed': 'change', 'seed': 'seed',
           'minutes': 'minutes', 'machine': 'machine', 'date': 'date'}
SECTIONS = {'short': SCORED, 'start': SCORED, 'long': SCORED, 'half width': SCORED,
            'committed': TRAINED, 'blind': TRAINED, 'photo': SCORED | TRAINED}


def trial_tables():
    """The tables: a dict of the section's name to lines."""
    trials = read_rows(CHECKPOINTS / 'trials.csv')
    tables = {'recipe': recipe_table(), 'repeats': repeats_table(trials)}
    for section, columns in SECTIONS.items():
        rows = [[row[column] for column in columns.values()]
                for row in trials if row['section'] == section]
        tables[section] = table([*columns], rows)
    tables['blind by level'] = stages_table()
    return tables


def recipe_table():
    """The settings of a training, and those of the committed networks."""
    rows = [[f'`{field.name}`', f'`{field.default}`', field.metadata['help']]
            for field in dataclasses.fields(du.Recipe)]
    return table(['setting', 'value', 'what it is'], rows)


def repeats_table(trials):
    """The trials that were repeated by the same command, and both their scores."""
    rows = []
    for again in trials:
        if again['section'] != 'repeats':
            continue
        (first,) = [row for row in trials
                    if row['command'] == again['command'] and row['section'] != 'repeats']
        difference = float(again['held_out']) - float(first['held_out'])
        rows.append([first['change'], first['held_out'], again['held_out'], f'{difference:+.3f}'])
    return table(['DnCNN', 'first (dB)', 'again (dB)', 'difference'], rows)


def stages_table():
    """The PSNR of the blind network on the test photographs, after both stages of its training."""
    rows = []
    for stage, file in (('first', 'blind_first_stage.csv'), ('second', 'levels.csv')):
        values = du.by_level(CHECKPOINTS / file)['dudncnn_blind']
        rows.append([f'after the {stage} stage', *map(as_cell, values)])
    return table(['test photographs, PSNR (dB)', *(f'σ = {sigma}' for sigma in du.LEVELS)], rows)


def between_markers(section, lines):
    """A table as the page has it."""
    return '\n'.join([f'<!-- trials: {section} -->', '', *lines, '', '<!-- end -->'])


def write_trials(page):
    """Renews the tables in the page. Raises ValueError if the markers of one are missing."""
    text = Path(page).read_text(encoding='utf-8')
    for section, lines in trial_tables().items():
        before, start, rest = text.partition(f'<!-- trials: {section} -->')
        _, end, after = rest.partition('<!-- end -->')
        if not start or not end:
            raise ValueError(f'{page} has no line <!-- trials: {section} -->, or no end after it')
        text = before + between_markers(section, lines) + after
    Path(page).write_text(text, encoding='utf-8')
