"""support/pages.py: every link leads somewhere, and the pages hold the files' own prose and code, all of it."""

import re
import runpy
import sys
from html.parser import HTMLParser
from posixpath import dirname, join, normpath

import pytest
from conftest import ROOT
from test_floor_plan import CHAPTERS

pytest.importorskip("markdown_it")
from support.errors import ConfigError
from support.pages import as_markdown, demo_output, main, pages
from support.sources import load, rows_of


class Reader(HTMLParser):
    """A page's ids and URLs, its text, and apart the text of its code; what is left open."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loaded, self.open, self.text, self.code = [], [], [], [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "iframe", "style")
        assert not any(key.startswith("on") for key in attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.loaded += [attributes[key] for key in ("src", "href") if key in attributes and tag != "a"]
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append((tag, attributes.get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += f"{data} "
        if ("pre", "code") in self.open:
            self.code += data

    def handle_comment(self, data):
        raise AssertionError(f"text was taken for a comment: {data}")


@pytest.fixture(scope="module")
def site():
    return pages(ROOT, lambda source: f"<b> & what {source.name} prints" if source.name == "norms" else "")


@pytest.fixture(scope="module")
def sources():
    return load(ROOT)


@pytest.fixture(scope="module")
def read(site):
    return {path: Reader(page) for path, page in site.items() if path.endswith(".html")}


def test_every_link_leads_to_a_page_of_the_site_and_a_place_on_it(site, read):
    for path, page in read.items():
        assert not page.open, path
        assert len(page.ids) == len(set(page.ids)), path
        for url in page.links + page.loaded:
            if url.startswith("https://") and url not in page.loaded:
                continue  # a paper; nothing is loaded from there
            file, _, place = url.partition("#")
            target = normpath(join(dirname(path), file)) if file else path
            assert target in site, f"{path}: {url}"
            assert not place or place in read[target].ids, f"{path}: {url}"


def test_no_page_loads_anything_from_elsewhere(site, read):
    """And none runs anything: `Reader` refuses scripts."""
    loaded = {url for page in read.values() for url in page.loaded}
    assert all(url.endswith((".css", ".png")) and not re.match(r"\w+:|//", url) for url in loaded)
    assert not re.search(r"@import|url\(", site["pages.css"])


def words(text):
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("name", [*CHAPTERS, "support.pages", "tests.test_pages"])
def test_a_page_holds_all_of_its_file_code_as_code_and_prose_as_prose(name, site, read, sources):
    source = sources[name]
    page = read[source.href]
    rows = rows_of(source)
    shown = [line for row in rows for line in row.code]
    assert shown == sorted(set(shown))
    code = [source.lines[line - 1] for line in shown]
    assert "".join(page.code.split()) == "".join("".join(code).split())
    prose = [source.doc, *(text for row in rows for text in row.prose)]
    rest = [line for i, line in enumerate(source.lines, 1) if i not in shown]
    # every word of the lines that are no code is once in the prose, and each text is on the page, in order
    assert sorted(words("\n".join(prose))) == sorted(
        words(re.sub(r'\br"""', "", "\n".join(rest)).replace("\\\\", "\\"))
    )
    text = " ".join(words(page.text))
    assert not [part for part in prose if " ".join(words(part)) not in text]


def links_of(page, pattern):
    """{text: URLs} of the links of a page that are in a part of it."""
    part = re.search(pattern, page, re.S)[0]
    return {re.sub("<.*?>", "", text): url for url, text in re.findall(r'<a href="(.*?)">(.*?)</a>', part, re.S)}


def row(name):
    return rf'<div class="row[^>]*id="{re.escape(name)}">.*?(?=<div class="row[^>]*id=|<section|</main)'


def test_names_link_to_where_they_are_defined(site):
    loss = links_of(site["grpo.html"], row("grpo_loss"))
    assert loss["masked_mean"] == "transformer.html#masked_mean"
    assert loss["SURROGATES"] == "grpo.html#SURROGATES"
    assert loss["kl_estimate"] == "evaluate.html#kl_estimate"
    imports = site["grpo.html"].partition('id="accuracy_reward"')[0]
    assert links_of(imports, "from</span>.*")["extract_answer"] == "support/answers.html#extract_answer"
    assert links_of(site["grpo.html"], row("advantages_of"))["gdpo.py"] == "gdpo.html"
    assert links_of(site["tests/test_grpo.html"], "<main.*")["grpo_loss"] == "../grpo.html#grpo_loss"


def test_a_name_that_a_function_binds_itself_is_not_linked(tmp_path):
    """`generate` the argument is not generate() the function; in the default and the decorator it is."""
    (tmp_path / "README.md").write_text("| `one.py` | |\n| `two.py` | |\n| `three.py` | |\n", encoding="utf-8")
    (tmp_path / "one.py").write_text('"""One."""\n\n\ndef f():\n    pass\n', encoding="utf-8")
    body = 'def hides(g, x="α", y=g):\n    return g\n\n\ndef uses():\n    return g("α"), g\n'
    text = f'"""Two."""\n\nfrom one import f as g\n\n\n{body}'
    (tmp_path / "two.py").write_text(text, encoding="utf-8")
    (tmp_path / "three.py").write_text('"""Three."""\n\nfrom two import g\n', encoding="utf-8")
    site = pages(tmp_path, lambda source: "")
    page = site["two.html"]
    assert len(re.findall('href="one.html#f"', re.search(row("hides"), page, re.S)[0])) == 1
    assert len(re.findall('href="one.html#f"', re.search(row("uses"), page, re.S)[0])) == 2
    assert '<a href="one.html#f">g</a>' in site["three.html"]  # where it is defined, not where it is imported from


def test_a_formula_shows_its_tests_and_its_claim_and_a_chapter_its_results(site):
    norm = links_of(site["norms.html"], row("rms_norm_gradient"))
    assert any(url.startswith("tests/test_norms.html#test_") for url in norm.values())
    assert links_of(site["grpo.html"], row("clip_surrogate"))["grpo_loss"] == "grpo.html#grpo_loss"  # only in a table
    place = re.search(row("place"), site["norms.html"], re.S)[0]
    assert "post-norm needs a warm-up" in place
    assert links_of(place, ".*")["norm-placement"] == "results/norm-placement.html"
    masked = "mask the tokens on which sampler and trainer disagree"
    assert masked in re.search(row("sampler_weights"), site["support/off_policy.html"], re.S)[0]
    assert "a ratio of the whole sequence is the better one" in site["grpo.html"]  # the table is in support/family.py
    assert "a ratio of the whole sequence is the better one" in site["support/family.html"]
    end = site["norms.html"].partition('<h2 id="the-results">')[2]
    assert 'src="results/norm-kind.png"' in end
    assert 'src="results/kv-heads.png"' in site["attention.html"]  # a claim's, not named in the file
    assert site["results/norm-kind.png"].startswith(b"\x89PNG")


def test_what_the_demo_prints_stands_there_as_text(site):
    assert "<code>&lt;b&gt; &amp; what norms prints</code>" in site["norms.html"]
    assert "demo-output" not in site["moe.html"]


def test_the_index_is_the_reading_order_with_a_sentence_each(site):
    items = re.findall(r'<li><a href="(\w+)\.html">\1\.py</a> (\S.*?)</li>', site["index.html"])
    assert [name for name, _ in items] == CHAPTERS
    assert dict(items)["transformer"] == "The decoder: token ids in, a distribution over the next token out."
    first, middle, last = site["norms.html"], site["positional.html"], site[f"{CHAPTERS[-1]}.html"]
    assert 'rel="prev"' not in first
    assert 'rel="next"' not in last
    assert '<a rel="prev" href="norms.html">' in middle
    assert '<a rel="next" href="attention.html">' in middle


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("where:\n    y = x\n\n    z <- y\nso.", ["<pre><code>y = x\n\nz &lt;- y\n</code></pre>", "<p>so.</p>"]),
        ("a\n+ b\n1. c\n# d\n> e", ["<p>a\n+ b\n1. c\n# d\n&gt; e</p>"]),
        ("x    one\ny    two", ["<pre><code>x    one\ny    two\n</code></pre>"]),
        ("* a\n  b\n* c <i>", ["<li>a\nb</li>", "<li>c &lt;i&gt;</li>"]),
    ],
)
def test_prose_is_set_as_it_is_written(text, lines):
    from support.pages import MARKDOWN

    page = MARKDOWN.render(as_markdown(text))
    assert all(line in page for line in lines), page


def small(tmp_path, body):
    """A repository of one chapter that prints, and the files that it imports, one through the other."""
    (tmp_path / "support").mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("| `one.py` | |\n", encoding="utf-8")
    (tmp_path / "support/two.py").write_text("from support.three import f\n", encoding="utf-8")
    (tmp_path / "support/three.py").write_text(body, encoding="utf-8")
    text = '"""One."""\n\nfrom support.two import f\n\n\ndef demo():\n    print("λ", f())\n'
    (tmp_path / "one.py").write_text(text, encoding="utf-8")
    return load(tmp_path)["one"]


def test_a_demo_runs_again_only_if_a_source_changes(tmp_path, capsys):
    body = "def f():\n    return 1\n"
    assert demo_output(small(tmp_path, body), tmp_path, tmp_path / "kept") == "λ 1\n"
    assert "one.py" in capsys.readouterr().out
    assert demo_output(small(tmp_path, body), tmp_path, tmp_path / "kept") == "λ 1\n"
    assert not capsys.readouterr().out
    assert demo_output(small(tmp_path, body.replace("1", "22")), tmp_path, tmp_path / "kept") == "λ 22\n"
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_what_goes_wrong_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    from support import pages as module

    source = small(tmp_path, "def f():\n    raise ValueError('no number')\n")
    with pytest.raises(ConfigError, match=r"^demo\(\) of one.py ended with status 1: ValueError: no number$"):
        demo_output(source, tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ConfigError, match=r"results/claims.md: one.g is not defined"):
        module.claims_of({"one": source}, "# What the papers claim\n| a | b | `one.f` | c |\n| a | b | `one.g` | c |\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/one.md").write_text("# One\n\n![one](one.png)\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"results/one.md shows one.png, which is not there"):
        module.pages(tmp_path, lambda source: "")
    monkeypatch.setattr(module, "HERE", tmp_path / "empty/support")
    with pytest.raises(ConfigError, match=r"README\.md cannot be read"):
        main(module.Config(out=str(tmp_path / "site")))
    (tmp_path / "one.py").write_text("def\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"one.py, line 1, is no Python"):
        load(tmp_path)
    assert not (tmp_path / "site").exists()


def test_a_library_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "support.pages")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("support.pages", run_name="support.pages")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: support.pages needs jinja2: pip install -e '.[pages]'\n"


def test_the_site_is_written(tmp_path, monkeypatch, capsys):
    from support import pages as module

    monkeypatch.setattr(module, "pages", lambda root, demo_of: {"a/b.html": "text", "c.png": b"\x89"})
    main(module.Config(out=str(tmp_path / "site"), demos=False))
    assert (tmp_path / "site/a/b.html").read_text(encoding="utf-8") == "text"
    assert (tmp_path / "site/c.png").read_bytes() == b"\x89"
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        main(module.Config(out=str(tmp_path / "file")))
