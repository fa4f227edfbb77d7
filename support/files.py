"""Writing files: a full disk, a kill or a crash leaves no half of one, and does not end a run that is under way.

    write_whole(path, text)                     the whole file, or the one before it; write_together: several
    append_whole(path, text)                    all of the text at the end of the file, or none of it
    with replacing(path) as temporary: ...      the same for a file that a library writes
    with must_write(path): ...                  an OSError of the block is a ConfigError: when a run begins, and where
                                                the file is all that a script makes
    with may_fail(path): ...                    an OSError of the block is one printed line: while a run goes on
    to_json(x)                                  JSON has no NaN and no infinity: they become null
    read_json(path)                             the content of a JSON file

Text is UTF-8, whatever the locale. A lone surrogate, which UTF-8 cannot hold, becomes its escape, such as \\ud800.
"""

import contextlib
import errno
import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from support.errors import ConfigError

UNWRITTEN = set()  # the paths that may_fail has printed a line about


def write_whole(path, content):
    """Write text or bytes: first under a temporary name, which is then renamed. OSError if it cannot be written; the
    file that was there before is kept."""
    write_together({path: content})


def write_together(contents):
    """{path: text or bytes}: write all of these files, or none of them if one does not fit or cannot be made. Each is
    whole, but a kill between two renames leaves some new and some old."""
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(replacing(path)).write_bytes(as_bytes(content))


def append_whole(path, text):
    """Append text to a file, which is made if there is none. OSError if not all of it could be written; the file is
    then cut back to what it was."""
    with open(path, "ab", buffering=0) as file:
        size, rest = file.seek(0, os.SEEK_END), as_bytes(text)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(size)
            raise


@contextlib.contextmanager
def replacing(path):
    """The temporary path of a file, with the same ending. It is renamed to `path` after the block, and removed if the
    block raises an error."""
    path = Path(path)
    if path.is_dir():  # renaming would fail, after that of other files
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}{path.suffix}")  # processes must not write into the same
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def must_write(path):
    """An OSError of the block becomes a ConfigError of one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason(error)}") from None


@contextlib.contextmanager
def may_fail(path):
    """An OSError of the block is printed as one line, once for each path, and the program goes on."""
    try:
        yield
    except OSError as error:
        say_unwritten(path, reason(error))


def say_unwritten(path, why, then="the run goes on without it"):
    """Print that a file could not be written; once for each path."""
    say_once(path, f"{path} could not be written ({why}); {then}")


def say_once(path, line):
    """Print a line above the progress bar, unless one about this path was printed before."""
    if str(path) not in UNWRITTEN:
        UNWRITTEN.add(str(path))
        tqdm.write(line)


def reason(error):
    """An error in a few words, one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return f"{text}: is the disk full?" if type(error) is OSError and error.errno is None else text  # numpy's


def to_json(x, **options):
    """json.dumps with null for numbers that are not finite, at any depth."""
    return json.dumps(finite(x), allow_nan=False, **options)


def read_json(path):
    """The content of a JSON file. OSError if it cannot be read, ValueError if it is no JSON or too deeply nested."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many brackets within brackets") from None


def finite(x):
    """Nested dicts and lists -> the same with None for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def with_nan(x):
    """What `to_json` wrote of nested dicts and lists of numbers -> the same with NaN for null."""
    if isinstance(x, dict):
        return {key: with_nan(value) for key, value in x.items()}
    if isinstance(x, list):
        return [with_nan(value) for value in x]
    return math.nan if x is None else x


def as_bytes(content):
    """Text as UTF-8; bytes as they are."""
    return content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
