"""nntools: Ctrl-C in a training with worker processes is an interrupt, and no failure of them."""

import json
import subprocess
import sys

from tests.helpers import CHECKOUT, forks


@forks
def test_ctrl_c_ends_as_an_interrupt(tmp_path):
    """Real signals to whole groups of processes, at random moments."""
    program = [sys.executable, '-m', 'tests.interrupted_workers', str(tmp_path), '12']
    done = subprocess.run(program, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 12
    for ending, said in results:
        assert ending == 'interrupted', said
        assert 'KeyboardInterrupt: back to epoch' in said, said
        assert 'Finish training' in said, said
        assert 'exited unexpectedly' not in said, said
