"""Locks on files and folders. The kernel holds them, and lets go when a process ends, however it ends.

with alone(path): ...      wait until nobody else has it: a file or a start that several processes want to make, once
hold(run_dir)              have it from now on, or ConfigError: two runs must not write one directory
let_go(run_dir)            until here, or until the process ends
"""

import contextlib
import fcntl
import os
from pathlib import Path

from support.errors import ConfigError


@contextlib.contextmanager
def alone(path: Path):
    """Have a file or folder that is there; whoever else wants it waits."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


HELD = {}  # {run directory: a descriptor that holds its lock}


def hold(path):
    """Lock a run directory. ConfigError if another process has it."""
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
    """Unlock a run directory, if this process holds it."""
    if path in HELD:
        os.close(HELD.pop(path))
