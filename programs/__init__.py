"""What is run from a shell: ``python -m programs.NAME --help``, in the folder of this checkout."""
import os
import signal
import sys

try:
    import denoising_utils as du  # takes seconds, for torch
except KeyboardInterrupt:
    raise SystemExit(130) from None


def run(main):
    """Runs the ``main()`` of a program, which ends with a status that tells how.

    What is wrong with its input is said in a line, status 1. So is Ctrl-C, status 130.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before the start
        stream.reconfigure(errors='replace')  # σ, or a file's name, where the encoding lacks it
    # With an exception, which `with` and `finally` see, so that nothing is left behind.
    for name in ('SIGTERM', 'SIGHUP'):  # Windows has no SIGHUP, and nohup ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    du.keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt as stop:
        print('Stopped:', stop, file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f'{type(error).__name__}: {error}') from None


def say(line):
    """Prints a line at once. That it can't be printed is not a failure of what it tells of."""
    try:
        print(line, flush=True)
    except OSError as error:
        # Nobody reads on (`| head`), or the disk is full: what is still to come goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f'What is done can\'t be printed ({error}), but it is done', file=sys.stderr)
