"""Locks on files and folders. The kernel holds them and releases them when a process ends, for whatever reason. On a
file system without locks (some network file systems) everything goes on without them.

with file_lock(path): ...   wait for the lock: a file or a start that several processes want is made only once
lock_run(run_dir)           lock a directory, or ConfigError: two runs must not write into one
unlock_run(run_dir)         release it; the end of the process releases it too
"""

import contextlib
import fcntl
import os
from pathlib import Path

from support.errors import ConfigError


@contextlib.contextmanager
def file_lock(path: Path):
    """Hold the lock of an existing file or folder; other processes that want it wait."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


LOCKED = {}  # {run directory: the descriptor that holds its lock}


def lock_run(path, advice="give this run another --name"):
    """Lock a directory. ConfigError if another process has locked it."""
    unlock_run(path)
    taken = f"{path} is being written by another process; {advice}"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(taken) from None
    except OSError:  # a file system without locks
        pass
    if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):  # another process has moved it
        os.close(descriptor)
        raise ConfigError(taken)
    LOCKED[path] = descriptor


def unlock_run(path):
    """Unlock a run directory if this process has locked it."""
    if path in LOCKED:
        os.close(LOCKED.pop(path))
