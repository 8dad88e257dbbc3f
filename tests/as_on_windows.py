"""A plugin of pytest that takes away what Python lacks on Windows, and starts workers as there: a rehearsal.

    python -m pytest -p tests.as_on_windows tests
"""
import multiprocessing
import os
import signal
import sys

MODULES = ('fcntl', 'grp', 'pty', 'pwd', 'readline', 'resource', 'syslog', 'termios', 'tty')
FUNCTIONS = {
    os: ('chown', 'fork', 'forkpty', 'getegid', 'geteuid', 'getgid', 'getpgid', 'getsid', 'killpg', 'mkfifo',
         'nice', 'sched_getaffinity', 'setegid', 'seteuid', 'setgid', 'setpgid', 'setsid', 'setuid', 'statvfs',
         'sysconf', 'uname', 'wait', 'wait3', 'wait4'),
    signal: ('SIGALRM', 'SIGHUP', 'SIGKILL', 'SIGQUIT', 'SIGSTOP', 'SIGUSR1', 'SIGUSR2', 'alarm', 'pause', 'setitimer')}


def pytest_configure():
    import matplotlib.pyplot  # noqa: F401  (the libraries come first: on Windows they go other ways)
    import skimage.data  # noqa: F401
    import torchvision  # noqa: F401

    multiprocessing.set_start_method('spawn')
    for module in MODULES:
        sys.modules[module] = None  # an import of it raises ModuleNotFoundError
    for module, names in FUNCTIONS.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
