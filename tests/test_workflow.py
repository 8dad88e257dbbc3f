"""GitHub's workflow is valid, keeps to what is safe, and runs what docs/testing.md says."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
WORKFLOW = HERE / '.github' / 'workflows' / 'test.yml'
TEXT = WORKFLOW.read_text(encoding='utf-8')


@pytest.mark.parametrize('schema', [
    'vendor.github-workflows', 'custom.github-workflows-require-timeout'])
def test_the_workflow_is_valid(schema):
    command = [sys.executable, '-m', 'check_jsonschema', '--builtin-schema', schema, WORKFLOW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_keeps_to_what_is_safe():
    assert re.findall(r'^ *permissions:\n(.*)', TEXT, re.MULTILINE) == ['  contents: read']
    assert 'secrets' not in TEXT and 'pull_request_target' not in TEXT
    actions = re.findall(r'uses: (.*)', TEXT)
    known = re.compile(r'actions/[\w/-]+@(v\d+|[0-9a-f]{40})')
    assert actions and all(known.fullmatch(action) for action in actions)


def test_commands_for_windows_are_those_of_the_docs():
    docs = (HERE / 'docs' / 'testing.md').read_text(encoding='utf-8')
    commands = re.findall(r'run: (\.venv\\Scripts\\.*)', TEXT)
    assert len(commands) == 5
    for command in commands:
        assert f'    {command.replace("--nbval-lax", "--nbval")}\n' in docs, command


def test_its_targets_of_make_are_there():
    makefile = (HERE / 'Makefile').read_text(encoding='utf-8')
    targets = re.findall(r'target: ([\w-]+)', TEXT) + re.findall(r'make ([\w-]+)\n', TEXT)
    assert len(targets) > 4
    for target in targets:
        assert re.search(f'^{target}:', makefile, re.MULTILINE), target


def test_it_calls_the_program_that_fetches_the_photographs():
    assert '.venv/bin/python -m programs.fetch' in TEXT
    assert (HERE / 'programs' / 'fetch.py').is_file()
