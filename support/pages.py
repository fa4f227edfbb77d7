"""The chapters as a web site: `python -m support.pages` writes site/, to be opened at site/index.html.

Every page is made of the files themselves (support/sources.py): prose beside code, names and files as links, and for a
chapter what its demo() prints, the claims of results/claims.md that it bears on, and its results with their pictures.
Tests stand at what they call. `--out DIR` writes elsewhere; `--demos false` leaves out what the demos print, which
takes seconds for each chapter that has changed.

    pages(root, demo_of)    -> {path below site/: text or bytes}: the whole site; demo_of(source) is a demo's output
"""

import hashlib
import html
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from support.cli import run_script
from support.errors import ConfigError
from support.files import must_write, write_whole
from support.sources import Names, load, rows_of

try:
    import jinja2
    from markdown_it import MarkdownIt
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, Keyword, Name, Number, String
except ImportError as error:
    print(f"error: support.pages needs {error.name}: pip install -e '.[pages]'", file=sys.stderr)
    raise SystemExit(2) from None

HERE = Path(__file__).resolve().parent
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
CLASSES = {Comment: "c", String: "s", Number: "n", Keyword: "k", Name.Function: "d", Name.Class: "d", Name.Builtin: "b"}
MENTION = re.compile(r"\b((?:\w+/)?[\w-]+\.(?:py|md))\b|\b(?:arXiv:)?(\d{4}\.\d{5})\b")  # a file or a paper
CALL = re.compile(r"(?<![.\w])[a-zA-Z]\w+(?=\()")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.]*")
DISPLAY = re.compile(r'<pre class="display">(.*?)</pre>', re.S)
SIDE = 54  # characters: prose with a longer display line stands above its code, not beside it


# ---------------------------------------------------------------------------------------------------------------
# Text as HTML.


def as_markdown(text):
    """A docstring or a comment as Markdown. What is indented by 4 is a display, set as it stands, and so is a table; no
    line of prose begins with what Markdown takes for a heading, a quotation or a number."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", text):
        inner = paragraph.split("\n")
        table = len(inner) > 1 and 2 * len(re.findall(r"^\S.* {3}", paragraph, re.M)) > len(inner)
        bullets = paragraph.startswith("* ")
        display = False
        for line in inner:
            before, display = display, table or (line.startswith("    ") and not bullets)
            if display:
                lines += [""] * (not before and bool(lines) and lines[-1] != "") + ["    " * table + line]
            else:
                line = re.sub(r"^(\s*)([-+>#=])", r"\1\\\2", line)
                lines.append(re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", line))
        lines.append("")
    return "\n".join(lines)


@cache
def css_class(kind):
    return next((css for known, css in CLASSES.items() if kind in known), "")


def code_lines(source, names, to):
    """The lines of a file as HTML, highlighted, each name a link to its definition. Links to constants end here, those
    to functions at their row. to(url) -> a link from this page."""
    lines, line, column, link_end = [""], 1, 0, None
    anchors = {(at, name) for name, at in source.constants.items()}
    for _, kind, value in PythonLexer().get_tokens_unprocessed(source.text):
        for i, text in enumerate(value.split("\n")):
            if i:
                line, column = line + 1, 0
                lines.append("")
            piece, css = html.escape(text), css_class(kind)
            if css and text.strip():
                piece = f'<span class="{css}">{piece}</span>'
            if (line, text) in anchors:
                piece = f'<span id="{text}">{piece}</span>'
                anchors.remove((line, text))
            elif text and (line, column) in names:
                target, name, width = names[line, column]
                piece, link_end = f'<a href="{to(target.url(name))}">{piece}', column + width
            column += len(text)
            if link_end is not None and column >= link_end:  # a.b is three tokens and one link
                piece, link_end = f"{piece}</a>", None
            lines[-1] += piece
    return lines


class Page:
    """What a page at `href` below site/ needs: links from there, and Markdown whose files, papers and names are links.
    source: whose names its prose speaks of."""

    def __init__(self, href, sources, results, source=None):
        self.href, self.sources, self.source = href, sources, source
        self.files = {}
        for known in sources.values():
            self.files.setdefault(PurePosixPath(known.path).name, known.href)  # a chapter goes first
            self.files[known.path] = known.href
        self.files |= {f"results/{result.name}.md": result.href for result in results}

    def to(self, url):
        if re.match("https?:", url):
            return url
        path, mark, name = url.partition("#")
        return os.path.relpath(path, os.path.dirname(self.href) or ".").replace(os.sep, "/") + mark + name

    def name(self, text):
        """A name in HTML -> the same, linked to its definition."""
        dotted = html.unescape(text).removesuffix("()")
        head, _, rest = dotted.partition(".")
        target = self.source and self.source.resolve(dotted)
        if not target and rest and head in self.sources:
            target = self.sources[head].resolve(rest)
        return f'<a href="{self.to(target[0].url(target[1]))}">{text}</a>' if target else text

    def mention(self, match):
        file, paper = match.groups()
        url = self.files.get(file) if file else f"https://arxiv.org/abs/{paper}"
        return f'<a href="{self.to(url)}">{match[0]}</a>' if url and url != self.href else match[0]

    def linked(self, body):
        """HTML -> the same with links at what its text names. What is a link already stays."""
        pieces, inside = [], []
        for piece in re.split(r"(<[^>]+>)", body):
            tag = re.match(r"</?(a|code|pre)\b", piece)
            if tag and piece.startswith("</"):
                inside.remove(tag[1])
            elif tag:
                inside.append(tag[1])
            elif not piece.startswith("<") and "a" not in inside:
                parts = re.split(r"(<a .*?</a>)", MENTION.sub(self.mention, piece))
                if "pre" in inside:
                    parts[::2] = [CALL.sub(lambda match: self.name(match[0]), part) for part in parts[::2]]
                elif "code" not in inside:
                    parts[::2] = [FLAG.sub(r'<span class="flag">\g<0></span>', part) for part in parts[::2]]
                elif len(parts) == 1:
                    parts = [self.name(piece)]
                piece = "".join(parts)
            pieces.append(piece)
        return "".join(pieces).replace("<pre><code>", '<pre class="display"><code>')

    def prose(self, text):
        return self.linked(MARKDOWN.render(as_markdown(text))) if text.strip() else ""

    def markdown(self, text):
        """Markdown of results/, whose links begin there."""
        body = re.sub(r"(<table>.*?</table>)", r'<div class="table">\1</div>', MARKDOWN.render(text), flags=re.S)
        local = r'href="([\w-]+)\.md"'
        return self.linked(re.sub(local, lambda match: f'href="{self.to(f"results/{match[1]}.html")}"', body))


# ---------------------------------------------------------------------------------------------------------------
# What belongs to a chapter.


class Result:
    """A page of results/: title, Markdown, pictures [(alternative text, file)]."""

    def __init__(self, name, text):
        self.name, self.text, self.href = name, text, f"results/{name}.html"
        self.title = text.partition("\n")[0].removeprefix("# ")
        self.pictures = re.findall(r"!\[(.*?)\]\((\S+?)\)", text)

    def belongs_to(self, chapter):
        by_name = self.name == chapter.name or self.name.startswith(f"{chapter.name}_")
        by_command = re.search(rf"`python {re.escape(chapter.path)}\b", self.text[:1000])
        return by_name or by_command or f"results/{self.name}.md" in chapter.text


def claims_of(sources, of_papers):
    """The table of results/claims.md -> [(source, name, claim, paper, what is seen here)], the last three Markdown: of
    a row the chapter that it names, and the file where its formula stands, if that is another. ConfigError if there is
    no such formula."""
    claims, chapters = [], [source for source in sources.values() if "/" not in source.path]
    table = of_papers.partition("# What the papers claim")[2]
    for claim, paper, code, seen in re.findall(r"^\| (.+?) \| (.+?) \| `(.+?)` \| (.+?) \|$", table, re.M):
        module = next((name for name in sorted(sources, key=len, reverse=True) if code.startswith(f"{name}.")), None)
        if module:
            named, rest = sources[module], code.removeprefix(f"{module}.")
            target = (named, "") if rest == "py" else named.resolve(rest)
        else:  # without its file
            named = next((chapter for chapter in chapters if code in chapter.defined), None)
            target = named and (named, code)
        if not target:
            raise ConfigError(f"results/claims.md: {code} is not defined")
        places = [target] if target[0] is named else [target, (named, "")]
        claims += [(*place, claim, paper, seen) for place in places]
    return claims


def tests_of(sources):
    """-> {(source, name): {test file: [tests that call it]}}, and {(source, name): the nearest that calls it and has
    tests} of what no test calls by itself, as a loss in a table."""
    tests, users = {}, {}
    for source in sources.values():
        for owner, target in dict.fromkeys(source.used):
            if owner.startswith("test_") and source.name.startswith("tests."):
                tests.setdefault(target, {}).setdefault(source, []).append(owner)
            elif owner and (source, owner) != target:
                users.setdefault(target, []).append((source, owner))
    through = {}
    for target in users.keys() - tests.keys():
        reached = [target]
        for user in reached:  # grows: breadth first
            if user in tests and user[1] in user[0].functions:
                through[target] = user
                break
            reached += [next_user for next_user in users.get(user, ()) if next_user not in reached]
    return tests, through


def demo_output(source, root, cache):
    """What a chapter's demo() prints, kept in a file of `cache` until a source that it reads changes."""
    if "demo" not in source.defined:
        return ""
    reads = {source.name: source}
    for name in (waiting := [source.name]):  # grows
        new = {read.name: read for read, _ in reads[name].imported.values() if read.name not in reads}
        reads |= new
        waiting += new
    text = "\0".join(reads[name].text for name in sorted(reads))
    key = hashlib.sha256(f"{text}\0{version('torch')}\0{sys.version}".encode()).hexdigest()[:16]
    kept = cache / f"{source.name}-{key}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    print(f"running the demo of {source.path}", flush=True)
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import {source.name}; {source.name}.demo()"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip() or "no message").split("\n")[-1]
        raise ConfigError(f"demo() of {source.path} ended with status {done.returncode}: {last}")
    with must_write(kept):
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"{source.name}-*.txt"):
            old.unlink()
        write_whole(kept, done.stdout)
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------
# The site.


def pages(root, demo_of):
    sources = load(root)
    names = {source: Names(source).places for source in sources.values()}
    chapters = [source for source in sources.values() if "/" not in source.path]
    files = sorted((root / "results").glob("*.md"))
    results = [Result(path.stem, path.read_text(encoding="utf-8")) for path in files]
    of_papers = next((result.text for result in results if result.name == "claims"), "")
    papers = "\n".join(re.findall(r"^\[.+?\]: \S+$", of_papers, re.M))
    claims = claims_of(sources, of_papers)
    tests, through = tests_of(sources)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        demos = dict(zip(chapters, pool.map(demo_of, chapters), strict=True))
    engine = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True)
    template = engine.get_template("pages.html")
    site = {"pages.css": (HERE / "pages.css").read_text(encoding="utf-8")}

    def put(page, title, **parts):
        site[page.href] = template.render(title=title, to=page.to, chapters=chapters, **parts)

    for source in sources.values():
        page = Page(source.href, sources, results, source)

        def cell(text, page=page):
            return page.markdown(f"{text}\n\n{papers}").strip().removeprefix("<p>").removesuffix("</p>")

        own_claims = [(name, *map(cell, cells)) for where, name, *cells in claims if where is source]
        rows = rows_of(source)
        code = code_lines(source, names[source], page.to)
        blocks = []
        for row in rows:
            text, target = "\n\n".join(row.prose), (source, row.name)
            part, _, rest = text.replace("\n", " ").partition(". ") if row.part else ("", "", text)
            prose = page.prose(rest)
            shown = html.unescape(re.sub("<.+?>", "", "\n".join(DISPLAY.findall(prose))))
            called = tests.get(target, {}) if row.name else {}
            block = {"name": row.name, "part": part.rstrip("."), "prose": prose, "tests": called}
            block |= {"wide": max(map(len, shown.split("\n"))) > SIDE, "through": through.get(target)}
            block |= {"claims": [claim for name, *claim in own_claims if name and name == row.name]}
            blocks.append(block | {"code": "\n".join(code[line - 1] for line in row.code)})
        cited = "".join(seen for where, *_, seen in claims if where is source)
        own_results = [r for r in results if source in chapters and (r.belongs_to(source) or f"({r.name}.md)" in cited)]
        parts = {"source": source, "lead": page.prose(source.doc.partition("\n\n")[2]), "blocks": blocks}
        put(page, source.path, **parts, demo=demos.get(source), claims=own_claims, results=own_results)
    for result in results:
        page = Page(result.href, sources, results)
        put(page, result.title, body=page.markdown(result.text))
        for _, file in result.pictures:
            if not (root / "results" / file).is_file():
                raise ConfigError(f"results/{result.name}.md shows {file}, which is not there")
            site[f"results/{file}"] = (root / "results" / file).read_bytes()
    put(Page("index.html", sources, results), "attention-to-alignment", sources=sources, results=results, index=True)
    return site


@dataclass
class Config:
    """Write the chapters as a web site."""

    out: str = "site"
    """Directory to write."""
    demos: bool = True
    """Show what each chapter's demo() prints, kept until a source changes; false: leave it out."""


def main(config):
    out, root = Path(config.out), HERE.parent
    site = pages(root, lambda source: demo_output(source, root, out / ".demos") if config.demos else "")
    with must_write(out):
        for path, content in site.items():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out / path, content)
    print(f"{len(site)} files; open {out / 'index.html'}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
