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
from support.devices import TRAITS
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
@pytest.mark.parametrize("bf16", [True, False])  # CPUs with AMX and GPUs; CPUs without
def test_what_a_decoded_token_reads(monkeypatch, rows, layout, bf16):
    """Against the cache that generate.py makes."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], bf16_cache=bf16))
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    model = Transformer(TransformerConfig(**gpu.SMALL | gpu.LAYOUTS[layout])).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        store = prefill(model, [[1, 2, 3]], rows, 5, static=False)[1].cache.store  # 8 slots
    assert store.dtype == (torch.bfloat16 if bf16 and layout == "Qwen3" else torch.float32)
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
    largest = 2**30 if sys.platform == "darwin" else 2**20  # bytes, KiB
    monkeypatch.setattr(script.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=largest))
    script.profile("stage", "fp32", steps=2, threads=torch.get_num_threads())
    assert [name for name, _ in done] == ["start/word-seed0-sft"] * 9 + ["profile-stage"] * 5
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["stage"], record["peak"]) == ("stage", 2**30 / 1e9)


def test_a_check_that_fails_without_words_does_not_hide_the_others(tmp_path, monkeypatch):
    def wordless(bench):
        raise AssertionError

    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    monkeypatch.setattr(gpu, "CHECKS", (wordless, lambda bench: [("fine", 0.0, 0.1)]))
    with pytest.raises(SystemExit, match=r"^1 wrong or failed: wordless$"):
        quick(gpu, tmp_path, monkeypatch, "Is it right?")
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "**FAILED**: AssertionError" in page
    assert page.count("| right |") == 1


def test_a_section_without_time_is_on_the_page(tmp_path, monkeypatch):
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    with pytest.raises(SystemExit, match=r"^1 wrong or failed: GRPO$"):
        quick(gpu, tmp_path, monkeypatch, "GRPO", "--minutes", "0")
    assert "## GRPO\n\nNot run: the time was up." in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_script_that_was_killed_says_its_status(monkeypatch):
    gpu = load(ROOT / "benchmarks/gpu.py", monkeypatch)
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(RuntimeError, match=r"^grpo.py: exit status -9$"):
        gpu.Bench(SimpleNamespace(device="cpu", quick=True)).script("grpo.py", cwd=".")


def test_trl_is_compared_on_the_device_of_the_page(monkeypatch):
    gpu, called = load(ROOT / "benchmarks/gpu.py", monkeypatch), []
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.Bench, "script", lambda bench, *args, cwd: called.append(args) or "")
    list(gpu.grpo_step(gpu.Bench(SimpleNamespace(device="cpu", quick=True))))
    assert called[0][-2:] == ("--device", "cpu")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("attention", ["--tokens", "199"], "200 or more"),
        ("busy", ["--steps", "5"], "6 or more"),
        ("large_pages", ["--steps", "5"], "6 or more"),
        ("generate", ["--new_tokens", "225"], "context of 256"),  # after 32 of the prompt
    ],
)
def test_a_size_that_cannot_be_measured_is_refused(monkeypatch, capsys, name, flags, message):
    script = load(ROOT / f"benchmarks/{name}.py", monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main()
    assert message in capsys.readouterr().err


def test_nanogpt_is_not_compared_without_the_text(tmp_path, monkeypatch, capsys):
    script = load(ROOT / "benchmarks/pretrain_vs_nanogpt.py", monkeypatch)
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pretrain_vs_nanogpt.py", "--nanogpt", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main()
    assert "set ALIGN_DATA" in capsys.readouterr().err


def test_the_tokenizers_take_turns_on_a_mac_too(tmp_path, monkeypatch, capsys):
    script = load(ROOT / "benchmarks/tokenizer.py", monkeypatch)
    monkeypatch.delattr(script.os, "sched_getaffinity", raising=False)
    for name in ("training", "encoding"):
        monkeypatch.setattr(script, name, lambda *args: None)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare/input.txt").write_text("a text", encoding="utf-8")
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tokenizer.py"])
    script.main()
    assert f"{script.os.cpu_count()} cores" in capsys.readouterr().out


def test_the_default_of_busy_is_not_the_callers(monkeypatch):
    script, seen = load(ROOT / "benchmarks/busy.py", monkeypatch), []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")

    def run(command, cwd, env, **kwargs):
        seen.append(env)
        (ROOT / cwd / "runs/pretrain").mkdir(parents=True)  # cwd is absolute
        lines = [json.dumps({"tokens_per_second": 4096}) for _ in range(8)]
        (ROOT / cwd / "runs/pretrain/metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.step_seconds({"OMP_NUM_THREADS": "1"}, 8, "fp32") == 1
    assert seen[0]["OMP_NUM_THREADS"] == "1"
    assert not seen[0].keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


def test_neither_heap_comes_first_in_every_pair(monkeypatch, capsys):
    script, calls = load(ROOT / "benchmarks/large_pages.py", monkeypatch), []
    monkeypatch.setattr(script, "run", lambda stage, flags, without: calls.append(without) or (2 - without, 100))
    monkeypatch.setattr(sys, "argv", ["large_pages.py", "--stages", "sft", "--pairs", "2"])
    script.main()
    assert calls == [True, False, False, True]
    assert "| sft | 2.00, 2.00 | 100, 100 |" in capsys.readouterr().out


def test_no_copy_of_the_inputs_is_subtracted(monkeypatch):
    script = load(ROOT / "benchmarks/loss_memory.py", monkeypatch)
    made, alive, randn = [], [], torch.randn

    def noted(*args, **kwargs):
        tensor = randn(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "randn", noted)
    monkeypatch.setattr(script, "peak", lambda: alive.append([tensor() is not None for tensor in made]) or 0)
    for name, size in (("VOCABULARY", 20), ("CONTEXT", 4), ("WIDTH", 8)):
        monkeypatch.setattr(script, name, size)
    script.measure("plain", 2)
    assert alive[0] == [True, True]  # all that was made is still there: activations, output matrix


def test_a_floor_has_the_output_matrix_for_answers_alone(monkeypatch):
    shape = dict(context=16, n_layer=1, n_head=2, n_kv_head=2, width=16)
    small, large = (Transformer(TransformerConfig(vocabulary, **shape)) for vocabulary in (64, 164))
    more = 100 * 16  # weights of the output matrix
    script, rows = load(ROOT / "benchmarks/preference_vs_trl.py", monkeypatch), [[(5, 0), (3, 5), (4, 5)]]
    assert script.work(large, rows, 7) - script.work(small, rows, 7) == 6 * more * 7
    assert script.work(large, rows, 0) == script.work(small, rows, 0)  # a reward model
    script = load(ROOT / "benchmarks/grpo_vs_trl.py", monkeypatch)
    for by_rows in (False, True):
        a, b = (script.work(model, [[1] * 5, [1] * 9], False, by_rows)["generation"] for model in (small, large))
        assert b - a == 2 * more * 2 * script.R * script.NEW


def test_a_golden_run_that_is_missing_is_a_difference(tmp_path, monkeypatch, capsys):
    golden, run = load(ROOT / "benchmarks/golden.py", monkeypatch), {"steps": [], "weights": {}}
    for name, runs in (("old", ("sft", "grpo")), ("new", ("sft",)), ("none", ())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "golden.json").write_text(json.dumps(dict.fromkeys(runs, run)), encoding="utf-8")
    old, new, none = (tmp_path / name for name in ("old", "new", "none"))
    assert golden.compare(old, old, "")
    assert golden.compare(old, new, "sft")
    assert golden.compare(new, old, "")  # a new run has nothing to be compared with
    capsys.readouterr()
    assert not golden.compare(old, new, "")
    assert "runs that NEW lacks: grpo" in capsys.readouterr().out
    assert not golden.compare(none, none, "")


@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"resume": True}, {"dtype": "fp16"}])
def test_a_comparison_with_trl_refuses_what_trl_is_not_given(tmp_path, monkeypatch, changes):
    script = load(ROOT / "benchmarks/preferences_end_to_end.py", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "open_checkpoint", lambda init: (None, None, None))
    plain = dict(pairs="offline", nll=0.0, optimizer="adamw", init="start", device="cpu")
    with pytest.raises(script.ConfigError, match=f"--{next(iter(changes))}"):
        script.open_start(script.dpo.Config(**plain, **changes), tmp_path / "out")


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
