"""The Python files of this repository, parsed to be shown: definitions, where each name comes from, prose and code.

    load(root)                -> {name: Source}; names as in `import`, a test's as tests.test_grpo
    source.resolve(dotted)    -> (source, name) where a name is defined, through imports; None if it is not from here
    Names(source).places      -> where in a file such names stand
    rows_of(source)           -> the module docstring, and rows: prose beside lines of code

Prose is a docstring, that of a field too, or a comment with lines of its own; a comment after code stays code.
"""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath

from support.errors import ConfigError
from support.files import reason

FOLDERS = ("support", "tests", "benchmarks")
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Source:
    """A Python file. everything: {name: Source}. functions, constants: {name or Class.method: its line}, functions with
    the classes; defined: both. imported: {name here: (source, name there or "")}. used, by Names: (the definition that
    uses it, (source, name)) of each name."""

    name: str
    path: str
    text: str
    everything: dict = field(repr=False)
    functions: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)
    imported: dict = field(default_factory=dict)
    used: list = field(default_factory=list)

    def __post_init__(self):
        self.tree = ast.parse(self.text)
        self.lines = self.text.split("\n")
        self.href = str(PurePosixPath(self.path).with_suffix(".html"))
        self.doc = inspect.cleandoc(ast.get_docstring(self.tree) or "")
        self.summary = " ".join(self.doc.split("\n\n")[0].split())
        for node in self.tree.body:
            if isinstance(node, DEFS):
                self.functions[node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                methods = [method for method in node.body if isinstance(method, DEFS)]
                self.functions |= {f"{node.name}.{method.name}": method.lineno for method in methods}
            self.constants |= dict.fromkeys(assigned(node), node.lineno)
        self.defined = self.functions | self.constants

    def module(self, name):
        """The file that `import name` reads here, or None; tests import each other without a folder."""
        return self.everything.get(name) or self.everything.get(f"{self.name.rpartition('.')[0]}.{name}")

    def find_imports(self):
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    origin = getattr(node, "module", None)
                    whole, part = self.module(f"{origin}.{alias.name}" if origin else alias.name), self.module(origin)
                    if whole or part:
                        self.imported[alias.asname or alias.name] = (whole or part, "" if whole else alias.name)

    def resolve(self, dotted):
        if dotted in self.defined:
            return self, dotted
        head, _, rest = dotted.partition(".")
        if head not in self.imported:
            return None
        source, name = self.imported[head]
        there = ".".join(filter(None, (name, rest)))
        return source.resolve(there) if there else (source, "")

    def url(self, name=""):
        return f"{self.href}#{name}" if name else self.href


def assigned(node):
    """The names that an assignment sets."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [n for t in targets if isinstance(node, ast.Assign | ast.AnnAssign) for n in ast.walk(t)]
    return [name.id for name in names if isinstance(getattr(name, "ctx", None), ast.Store) and hasattr(name, "id")]


def load(root):
    """Chapters first, in the order of README's table. ConfigError on a file that cannot be read."""
    sources = {}
    try:
        readme = (root / "README.md").read_text(encoding="utf-8")
        paths = [f"{name}.py" for name in re.findall(r"^\| `(\w+)\.py` \|", readme, re.M)]
        for folder in FOLDERS:
            paths += [path.relative_to(root).as_posix() for path in sorted((root / folder).glob("[!_]*.py"))]
        for path in paths:
            name = path.removesuffix(".py").replace("/", ".")
            sources[name] = Source(name, path, (root / path).read_text(encoding="utf-8"), sources)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({reason(error)}); this needs a whole clone") from None
    except SyntaxError as error:
        raise ConfigError(f"{root / path}, line {error.lineno}, is no Python: {error.msg}") from None
    for source in sources.values():
        source.find_imports()
    return sources


class Names(ast.NodeVisitor):
    """places: {(line, column): (source, name, width)} of each name that this project defines. Fills source.used."""

    def __init__(self, source):
        self.source, self.places, self.hidden, self.owner, self.cls = source, {}, set(), "", ""
        for node in source.tree.body:
            names = assigned(node) or [getattr(getattr(node, "target", None), "id", "")]  # NAME |= …
            self.owner = node.name if isinstance(node, DEFS) else names[0]
            self.cls = node.name if isinstance(node, ast.ClassDef) else ""
            self.visit(node)

    def note(self, line, end, name, target):
        """The name ends at a byte offset; inside f-strings Python 3.11 gives wrong ones, which are left out."""
        text = self.source.lines[line - 1].encode()[:end].decode(errors="replace")
        if target and text.endswith(name):
            self.places[line, len(text) - len(name)] = (*target, len(name))
            self.source.used.append((self.owner, target))

    def visit_Import(self, node):
        for alias in node.names:
            target = self.source.resolve(alias.asname or alias.name)
            self.note(alias.lineno, alias.col_offset + len(alias.name), alias.name, target)

    def visit_ImportFrom(self, node):
        if module := self.source.module(node.module):
            self.note(node.lineno, node.col_offset + len(f"from {node.module}"), node.module, (module, ""))
        self.visit_Import(node)

    def visit_FunctionDef(self, node):
        """What a function binds hides the module's names in its body, not in its decorators and defaults."""
        inside = list(ast.walk(node))
        bound = {n.arg for n in inside if isinstance(n, ast.arg)}
        bound |= {n.id for n in inside if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {n.name for n in inside if isinstance(n, DEFS) and n is not node}
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        outer, self.hidden = self.hidden, self.hidden | bound
        for child in node.body:
            self.visit(child)
        self.hidden = outer

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id not in self.hidden:
            self.note(node.end_lineno, node.end_col_offset, node.id, self.source.resolve(node.id))

    def visit_Attribute(self, node):
        self.visit(node.value)
        head, _, rest = ast.unparse(node).partition(".")
        if head == "self":
            head = self.cls
        elif head in self.hidden:
            return
        self.note(node.end_lineno, node.end_col_offset, node.attr, self.source.resolve(f"{head}.{rest}"))


@dataclass
class Row:
    """prose: texts. code: numbers of lines. name: what it defines. part: a line of dashes, where a part begins."""

    prose: list = field(default_factory=list)
    code: list = field(default_factory=list)
    name: str = ""
    part: bool = False


def docstring_of(body, first=0):
    """The statement that is a docstring, or None."""
    node = body[first] if len(body) > first else None
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return node if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def rows_of(source):
    """A row begins at a definition and after it, at a comment with lines of its own, at a field with a docstring."""
    starts, prose_lines, comment_ends = {}, set(), {}

    def begin(line):
        return starts.setdefault(line, Row())

    def take(doc, line):
        begin(line).prose.append(inspect.cleandoc(doc.value.value))
        prose_lines.update(range(doc.lineno, doc.end_lineno + 1))

    def first_line(node):
        return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])

    def walk(body, prefix="", in_function=False):
        apart = False  # what stands before has a row of its own
        for i, node in enumerate(body):
            if apart:
                begin(first_line(node))
            apart = False
            if isinstance(node, DEFS):
                doc = docstring_of(node.body)
                apart = doc or not in_function
                if apart:
                    begin(first_line(node)).name = prefix + node.name
                if doc:
                    take(doc, first_line(node))
                walk(node.body[1:] if doc else node.body, f"{prefix}{node.name}.", isinstance(node, ast.FunctionDef))
            elif i and (apart := docstring_of(body, i)):
                take(node, body[i - 1].lineno)

    module_doc = docstring_of(source.tree.body)
    if module_doc:
        prose_lines.update(range(module_doc.lineno, module_doc.end_lineno + 1))
    begin(1)
    walk(source.tree.body[1:] if module_doc else source.tree.body)
    for first, last, text in comments_of(source.text):
        row = begin(first)
        row.part = text.startswith("----")
        row.prose.append(re.sub(r"^-{4,}|-{4,}$", "", text).strip())
        prose_lines.update(range(first, last + 1))
        comment_ends[first] = last
        if row.part:
            begin(last + 1)
    rows, above = [], []
    for line, end in pairwise([*sorted(starts), len(source.lines) + 1]):
        row = starts[line]
        row.prose, above = above + row.prose, []
        full = [i for i in range(line, end) if i not in prose_lines and source.lines[i - 1].strip()]
        # blank lines between its code, but for one after a docstring
        row.code = [i for i in range(*(full[0], full[-1] + 1) if full else (0,)) if i not in prose_lines]
        row.code = [i for i in row.code if source.lines[i - 1].strip() or i - 1 not in prose_lines]
        if not full and not row.part and comment_ends.get(line, 0) + 1 == end:
            above = row.prose  # a comment directly above a definition
        elif full or row.prose:
            rows.append(row)
    return rows


def comments_of(text):
    """(first line, last line, text) of each block of comments that have lines of their own."""
    blocks, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line, column = token.start
        if token.type == tokenize.COMMENT and not token.line[:column].strip():
            words = re.sub("^#+ ?", "", token.string)
            if before == (line - 1, column):
                first, _, earlier = blocks.pop()
                blocks.append((first, line, f"{earlier}\n{words}"))
            else:
                blocks.append((line, line, words))
            before = line, column
    return blocks
