"""Tables of Markdown, and rows of CSV files."""
import csv
import math


def line(cells):
    """A row of a table."""
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def table(header, rows=()):
    """The lines of a table."""
    return [line(header), '|---' * len(header) + '|', *map(line, rows)]


def as_cell(value):
    """A number with two decimals; nothing for NaN."""
    return '' if math.isnan(value) else f'{value:.2f}'


def read_rows(file):
    """The rows of a CSV file, each a dict of the name of the column to text."""
    with open(file, newline='', encoding='utf-8') as stream:
        return [*csv.DictReader(stream)]
