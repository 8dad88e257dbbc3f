"""A rehearsal of Windows: a plugin of pytest that takes away what Python lacks there.

    python -m pytest -p tests.as_on_windows tests
"""
import multiprocessing
import os
import signal
import sys

MODULES = ['fcntl', 'grp', 'pty', 'pwd', 'readline', 'resource', 'syslog', 'termios', 'tty']
OF_OS = [
    'chown', 'fork', 'forkpty', 'getegid', 'geteuid', 'getgid', 'getpgid', 'getsid', 'killpg',
    'mkfifo', 'nice', 'sched_getaffinity', 'setegid', 'seteuid', 'setgid', 'setpgid', 'setsid',
    'setuid', 'statvfs', 'sysconf', 'uname', 'wait', 'wait3', 'wait4']
OF_SIGNAL = [
    'SIGALRM', 'SIGHUP', 'SIGKILL', 'SIGQUIT', 'SIGSTOP', 'SIGUSR1', 'SIGUSR2', 'alarm', 'pause',
    'setitimer']


def pytest_configure():
    # The libraries come first: on Windows they go other ways.
    import matplotlib.pyplot  # noqa: F401
    import pooch  # noqa: F401
    import skimage.data  # noqa: F401
    import torchvision  # noqa: F401

    multiprocessing.set_start_method('spawn')  # workers start as they do there
    for module in MODULES:
        sys.modules[module] = None  # an import of it raises ModuleNotFoundError
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
