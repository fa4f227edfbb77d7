"""benchmarks/: every script can be opened, and the GPU's page is made on a CPU."""

import importlib.util
import json
import sys
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

from generate import prefill
from support.runs import Run
from transformer import Transformer, TransformerConfig

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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["Qwen3", "window and sinks"])  # the second does not fit the fast step
def test_what_a_decoded_token_reads(monkeypatch, rows, layout):
    """Against the cache that generate.py makes."""
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    model = Transformer(TransformerConfig(**gpu.SMALL | gpu.LAYOUTS[layout])).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        store = prefill(model, [[1, 2, 3]], rows, 5, static=False)[1].cache.store  # 8 slots
    assert store.dtype == (torch.bfloat16 if layout == "Qwen3" else torch.float32)
    assert gpu.bytes_read(model, rows, 8) == 2 * sum(p.numel() for p in model.parameters()) + store.nbytes


def test_the_memory_of_the_losses_is_theirs_alone(monkeypatch):
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    alive, seen = weakref.WeakSet(), []

    def living(*args):
        alive.add(model := Transformer(*args))
        return model

    def peak_gb(bench, call):
        call()
        seen.append(len(alive))

    monkeypatch.setattr(gpu, "Transformer", living)
    monkeypatch.setattr(gpu.Bench, "peak_gb", peak_gb)
    list(gpu.memory(gpu.Bench(SimpleNamespace(device="cpu", quick=True))))
    assert seen == [1, 1, 0, 0]  # AdamW, Muon; full logits, in chunks


def test_the_kinds_of_operations(monkeypatch):
    kind_of = load(ROOT / "benchmarks/profile_steps.py", monkeypatch).kind_of
    names = {"aten::_log_softmax": "loss", "aten::_log_softmax_backward_data": "loss", "aten::_softmax": "attention"}
    names |= {"aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::bmm": "products"}
    assert {name: kind_of(SimpleNamespace(name=name, cpu_parent=None)) for name in names} == names


def test_our_speed_is_from_step_to_step(tmp_path, monkeypatch):
    script = load(ROOT / "benchmarks/pretrain_vs_nanogpt.py", monkeypatch)

    def run(scratch, flags):  # each step 2 s, the last one, with its validation, 60 s
        with SummaryWriter(scratch / "runs/speed/tensorboard") as writer:
            for step in range(1, 10):
                writer.add_scalar("loss", 1.0, step, walltime=1000 + 2 * step + 58 * (step == 9))
        lines = [{"config": {}}, *({"step": step, "tokens_per_second": 1e6} for step in range(1, 10))]
        (scratch / "runs/speed/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    monkeypatch.setattr(script, "our_run", run)
    assert script.our_speed(tmp_path, False, "fp32", 9) == 64 * 12 / 2


def test_importing_a_peer_is_not_timed(tmp_path, monkeypatch, capsys):
    script = load(ROOT / "benchmarks/tokenizer.py", monkeypatch)
    monkeypatch.setitem(sys.modules, "clock", clock := SimpleNamespace(now=0.0))
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    (tmp_path / "minbpe.py").write_text("import clock\nclock.now += 5\nRegexTokenizer = None\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def train_minbpe(file, vocab_size):
        from minbpe import RegexTokenizer  # noqa: F401

        clock.now += 1
        return merges

    def merges():  # nor is reading them back
        clock.now += 7
        return []

    monkeypatch.setattr(script, "train_minbpe", train_minbpe)
    script.train("minbpe", "a file", 300)
    assert json.loads(capsys.readouterr().out)["seconds"] == 1


def test_a_profile_is_of_the_stage_and_not_of_the_start_that_it_makes(monkeypatch, capsys):
    script = load(ROOT / "benchmarks/profile_steps.py", monkeypatch)
    done = []

    def main(config):
        for name, steps in (("start/word-seed0-sft", 9), (config.name, 99)):
            for step in Run.steps(SimpleNamespace(config=SimpleNamespace(name=name)), steps):
                done.append((name, step))
                torch.ones(8, 8) @ torch.ones(8, 8)

    @dataclass
    class Config:
        name: str
        steps: int
        eval_every: int
        save_every: int
        dtype: str

    monkeypatch.setattr(Run, "steps", lambda run, total=None: iter(range(total)))
    monkeypatch.setattr(script, "import_module", lambda stage: SimpleNamespace(Config=Config, main=main))
    script.profile("stage", "fp32", steps=2, threads=torch.get_num_threads())
    assert [name for name, _ in done] == ["start/word-seed0-sft"] * 9 + ["profile-stage"] * 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stage"] == "stage"


def test_a_comparison_with_trl_needs_a_start(monkeypatch):
    script = load(ROOT / "benchmarks/preferences_end_to_end.py", monkeypatch)
    config = script.dpo.Config(pairs="offline", nll=0.0, optimizer="adamw")
    with pytest.raises(script.ConfigError, match="needs a start: --init"):
        script.check_comparable(config)


def test_dpo_and_trl_have_the_same_losses_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    script = load(ROOT / "benchmarks/preferences_end_to_end.py", monkeypatch)
    monkeypatch.chdir(tmp_path)
    script.main((None, tmp_path))  # ends with an error if they differ
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    start, ours, trl = (line.split("|")[1:-1] for line in page.splitlines() if line[:5] in ("| sta", "| our", "| TRL"))
    assert ours[1:5] == trl[1:5]  # accuracy and its interval, likelier, margin, held-out loss
    assert ours[1] != start[1]
    config, losses = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8")).values()
    assert losses["ours"][-1] < 0.95 * losses["ours"][0]
    config = script.dpo.Config(init="start", **script.QUICK)
    _, tokenizer, _ = script.open_checkpoint("start")
    rows = script.read_pairs(config, tokenizer, 192)["train"]
    for wrong in (replace(config, beta=0.101), replace(config, lr=1.01e-3)):  # off by 1 %
        _, others, _ = script.train_trl(wrong, rows, tokenizer)
        apart = [abs(a - b) / a for a, b in zip(losses["ours"], others, strict=True)]
        assert max(apart[: script.CHECKED]) > 3 * script.TOLERANCE
