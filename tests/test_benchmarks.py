"""benchmarks/: every script can be opened, and the GPU's page is made on a CPU."""

import importlib.util
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def load(path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script puts the project first
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path, monkeypatch):
    assert load(path, monkeypatch).__doc__


def quick(gpu, out, monkeypatch, *sections):
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--quick", "--device", "cpu", "--out", str(out), "--sections", *sections]
    )
    gpu.main()
    return (out / "gpu.md").read_text(encoding="utf-8")


def test_the_gpu_page_on_a_cpu(tmp_path, monkeypatch):
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    sections = [title for title in gpu.SECTIONS if "TRL" not in title]  # that one trains TRL: half a minute
    page = quick(gpu, tmp_path, monkeypatch, *sections)
    assert "FAILED" not in page
    assert "WRONG" not in page
    assert "Not run" not in page
    assert all(f"## {title}" in page for title in sections)
    assert page.count("| right |") >= 25


def test_a_wrong_or_broken_check_is_on_the_page_and_in_the_exit_status(tmp_path, monkeypatch):
    def broken(bench):
        yield "before it breaks", 0.0, 0.0
        raise RuntimeError("no such kernel")

    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    monkeypatch.setattr(gpu, "CHECKS", (lambda bench: [("off", 0.2, 0.1), ("not a number", float("nan"), 0.1)], broken))
    with pytest.raises(SystemExit, match=r"^3 wrong or failed: off, not a number, broken$"):
        quick(gpu, tmp_path, monkeypatch, "Is it right?")
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert page.count("**WRONG**") == 2
    assert "**FAILED**: RuntimeError: no such kernel" in page


def test_a_section_that_fails_lets_the_others_go_on(tmp_path, monkeypatch):
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    monkeypatch.setattr(gpu, "SECTIONS", {"One": lambda bench: 1 / 0, "Two": lambda bench: ["all is well"]})
    with pytest.raises(SystemExit, match=r"^1 wrong or failed: One$"):
        quick(gpu, tmp_path, monkeypatch, "One", "Two")
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "**FAILED**: ZeroDivisionError" in page
    assert "all is well" in page
