"""Who may write a file or a folder: locks that the kernel lets go of when a process ends, however."""

import contextlib
import fcntl
import os
from pathlib import Path

from support.errors import ConfigError


@contextlib.contextmanager
def alone(path: Path):
    """Hold a file or folder: whoever else wants to hold it waits. A process that dies lets go."""
    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


HELD = {}  # {run directory: a descriptor that holds its lock, from open_run to Log.close}


def hold(path):
    """Lock a run directory; the kernel unlocks it when the process ends, however. ConfigError if another has it."""
    let_go(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{path} is being written by another process; give this run another --name") from None
    except OSError:  # a file system without locks
        pass
    HELD[path] = descriptor


def let_go(path):
    if path in HELD:
        os.close(HELD.pop(path))
