"""What is run from a shell: ``python -m programs.NAME --help``, in the folder of this checkout."""
import sys

import denoising_utils as du


def run(main):
    """Runs the ``main()`` of a program. What is wrong with its input is said in a line, exit 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')  # σ, or a file's name, where the encoding lacks it
    du.keep_freed_memory()
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f'{type(error).__name__}: {error}') from None
