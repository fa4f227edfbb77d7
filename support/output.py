"""What scripts print: in any locale, and to a full disk.

A locale such as en_US.ISO-8859-1 has no Greek or Cyrillic letters; what it lacks is printed as its escape, \\u03b1. If
the output goes to a file and the disk is full, or to a pipe and its reader ends, a training run goes on without that
output; other scripts, whose output is all that they make, end: with an error, and silently after `| head`.
"""

import contextlib
import errno
import io
import sys

from tqdm import tqdm

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUNNING = []  # not empty as soon as a run is under way: from then on such an error loses output and is not raised


class _Stream(io.FileIO):
    """Standard output or error, without buffer."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if not RUNNING or error.errno not in (*FULL_DISK, errno.EPIPE):
                raise
            return len(data)


def prepare_output():
    """Make standard output and error print everything, in any locale. A stream that is no text file (in a notebook)
    stays as it is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper:
            continue
        unbuffered = type(stream.buffer) is io.FileIO  # python -u, PYTHONUNBUFFERED
        if not unbuffered and type(getattr(stream.buffer, "raw", None)) is not io.FileIO:
            stream.reconfigure(errors="backslashreplace")
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        buffer = _Stream(stream.fileno(), "wb", closefd=False)
        buffer = buffer if unbuffered else io.BufferedWriter(buffer)
        options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **options))


def lose_output():
    """From here on a full disk or a closed pipe loses output and raises no error."""
    RUNNING.append(True)


def log_file(path):
    """A text file, open to be written, for what would be printed; a full disk is treated as that of the output."""
    return io.TextIOWrapper(io.BufferedWriter(_Stream(path, "wb")), encoding="utf-8", errors="backslashreplace")


def run_demo(demo):
    """The entry point of a chapter that is no script: its example worked by hand. It ends as `run_script` does. It has
    no settings: any flag but --demo and --help, which change nothing, is an error."""
    if given := [word for word in sys.argv[1:] if word not in ("--demo", "--help", "-h")]:
        print(f"error: {sys.argv[0]} works an example and has no settings: leave {given[0]} out", file=sys.stderr)
        sys.exit(2)
    prepare_output()
    try:
        demo()
        sys.stdout.flush()
    except BrokenPipeError:  # python norms.py | head
        lose_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        lose_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def batches(items, size, progress, dist):
    """Yield the items of a list, `size` at a time, under a bar of this name, which rank 0 alone draws; None: no bar."""
    hidden = progress is None or not dist.is_main
    for at in tqdm(range(0, len(items), size), desc=progress, leave=False, disable=hidden):
        yield items[at : at + size]
