"""The code that a run's figures depend on: the files that its stage imports, and those that they import.

code_used(["grpo"])      {"grpo.py": 12 hex digits, "support/rollouts.py": …}
files_that_differ(a, b)  the names of the files that two of them do not share

Of a file only its statements count: a new comment, docstring or line break changes nothing. What draws and prints is
not told from what computes, so a new colour in support/plots.py is a difference; the name of the file says which it is.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def code_used(modules):
    """{file: digest} of these modules of the repository, and of all that they import."""
    found, todo = {}, [file for module in modules if (file := _file_of(module))]
    while todo:
        file = todo.pop()
        if file not in found:
            found[file], imported = _read(file)
            todo += imported
    return dict(sorted(found.items()))


def files_that_differ(saved, now):
    """Those that have other digests, or that one of the two lacks."""
    return sorted(file for file in saved.keys() | now.keys() if saved.get(file) != now.get(file))


def _file_of(module):
    """The file of a module, its name from the root of the repository; None of a package that is not ours."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return str(path.relative_to(ROOT)) if path.is_file() else None


@cache
def _read(file):
    """-> the digest of its statements, and the files of the repository that it imports, inside functions too."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(body := getattr(node, "body", None), list):  # a lambda's body is an expression
            node.body = [statement for statement in body if not _is_text(statement)]
    digest = hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:12]
    return digest, [file for name in names if (file := _file_of(name))]


def _plain(node):
    """The same for every version of Python: ast.dump shows empty fields in some, and fields that others lack."""
    if isinstance(node, ast.AST):
        filled = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, filled
    return [_plain(part) for part in node] if isinstance(node, list) else repr(node)


def _is_text(statement):
    """Whether it is a text that nothing uses: a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)
