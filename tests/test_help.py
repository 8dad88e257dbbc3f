"""nntools: help(nt.Experiment) describes each option, and fits a terminal."""

import dataclasses
import inspect
import pydoc
import re

import nntools as nt

FIELDS = {field.name: field for field in dataclasses.fields(nt.Experiment)}


def described():
    """The options in the docstring: name to (default, description), in their order there."""
    found, name = {}, None
    for line in inspect.getdoc(nt.Experiment).splitlines():
        option = re.match(r'(\w+)(?: \((.*?)\))?: (.+)', line)
        if option and option[1] in FIELDS:
            name, default, text = option.groups()
            found[name] = default, text
        elif name and re.match(r' +\S', line):
            default, text = found[name]
            found[name] = default, f'{text} {line.strip()}'
        else:
            name = None
    return found


def test_each_option_is_described():
    assert list(described()) == list(FIELDS)
    for name, (_, text) in described().items():
        assert len(text) > 10, name


def test_the_defaults_that_are_told_are_the_defaults():
    told = {name: default for name, (default, _) in described().items()}
    for name, field in FIELDS.items():
        if field.default is dataclasses.MISSING:
            assert told[name] is None, name
        else:
            assert told[name] == repr(field.default), name


def test_the_help_fits_a_terminal():
    lines = pydoc.plain(pydoc.render_doc(nt.Experiment)).splitlines()
    # Python writes a signature as one line.
    own = [line for line in lines if not re.match(r'[\s|]*(Experiment|__init__)\(', line)]
    assert len(own) > 100 and max(map(len, own)) <= 100, max(own, key=len)


def test_each_public_method_is_described():
    for kind in (nt.StatsManager, nt.Experiment):
        for name, member in vars(kind).items():
            public = inspect.isfunction(member) or isinstance(member, property)
            if public and not name.startswith('_'):
                assert inspect.getdoc(member), name
