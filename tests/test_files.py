"""support/files.py and support/output.py: full disks, locales, numbers that JSON does not have.

The disk is made full by a limit on the size of files: a write that crosses it is cut in the middle and then refused."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, assert_refused, metrics, script
from tiny import config, flags

import pretrain
from support import files, pretrain_report, runs, trackers
from support.cli import key_twice, parse_config, run_script
from support.errors import ConfigError

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "", "PYTHONUNBUFFERED": ""}


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limited(size, *command, cwd, **options):
    """Run a script whose files may not grow beyond `size` bytes."""
    code = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1)); sys.argv.pop(0); "
    code += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / command[0]), *map(str, command[1:])]
    options = {"capture_output": True} | options
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, encoding="utf-8", timeout=240, check=False, **options)


def test_what_does_not_fit_is_not_begun(tmp_path):
    log, page = tmp_path / "log", tmp_path / "page.md"
    files.append_whole(log, "é\n" * 100)
    files.write_whole(page, "old\n")
    with files_up_to(350):
        files.append_whole(log, "12345\n")
        for write, path in ((files.append_whole, log), (files.write_whole, page)):
            with pytest.raises(OSError, match="File too large"):
                write(path, "x" * 400)
        files.append_whole(log, "again room\n")
    assert log.read_text(encoding="utf-8") == "é\n" * 100 + "12345\nagain room\n"
    assert page.read_text(encoding="utf-8") == "old\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        files.write_together({tmp_path / "folder": "new", page: "new"})
    with pytest.raises(IsADirectoryError, match="folder"):  # before it is written, as another file may be renamed first
        files.replacing(tmp_path / "folder").__enter__()
    (tmp_path / "folder").rmdir()
    assert page.read_text(encoding="utf-8") == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "page.md"]


def test_what_could_not_be_written_is_said_once(tmp_path, capsys):
    for path in ("a", "a", "b"):
        with files.may_fail(tmp_path / path):
            raise OSError(28, "No space left on device")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[0] for line in said] == [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(ConfigError, match="a cannot be written: No space left on device"), files.must_write("a"):
        raise OSError(28, "No space left on device")


def test_json_has_null_for_numbers_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    text = files.to_json({"a": nan, "b": [1.5, (inf, {"c": -inf})], "d": "NaN", "e": None})
    assert text == '{"a": null, "b": [1.5, [null, {"c": null}]], "d": "NaN", "e": null}'
    back = files.with_nan(json.loads(text))
    assert str(back) == "{'a': nan, 'b': [1.5, [nan, {'c': nan}]], 'd': 'NaN', 'e': nan}"


def test_a_surrogate_is_written_as_its_escape(tmp_path):
    files.write_whole(tmp_path / "a", "caf\udce9 й")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "caf\\udce9 й"


def test_a_disk_that_fills_up_during_a_run(here):
    """Nothing that is written is torn, each file is named once, and the run ends as ever."""
    words = flags(steps=170, save_every=40, eval_every=40, keep=2, dtype="fp32")
    process = limited(30_000, "pretrain.py", *words, cwd=here)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    run = here / "runs/pretrain"
    for name in ("metrics.jsonl", "tensorboard", "curves.png"):
        assert process.stdout.count(f"{name} could not be written") == 1
    assert not (run / "curves.png").exists()
    assert not list(here.rglob("*.tmp*"))
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    steps = list(metrics(run, "loss"))
    assert steps == list(range(1, len(steps) + 1))
    assert 100 < len(steps) < 170
    assert sorted(path.name for path in run.glob("step_*")) == ["step_0000160", "step_0000170"]
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in (run / "tensorboard").iterdir():  # the loader raises an error on a torn record
        assert len(list(EventFileLoader(str(path)).Load())) > 3


def test_a_checkpoint_that_could_be_written_after_all_is_news_when_it_next_cannot(here, monkeypatch):
    def unsharded(model, dist):  # in the middle of the run, which begins with a clean slate
        files.UNWRITTEN.add("runs/pretrain/last")
        return model

    monkeypatch.setattr(runs, "unsharded", unsharded)
    pretrain.main(config(steps=1))
    assert "runs/pretrain/last" not in files.UNWRITTEN


def test_a_disk_that_is_full_at_the_start(here):
    pretrain.main(config(steps=3, dtype="fp32"))
    runs.Run.close_log()  # another process is to take the directory
    run = here / "runs/pretrain"
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    words = flags(steps=4, dtype="fp32")
    assert_one_line_error(limited(10, "pretrain.py", *words, "--resume", "true", cwd=here), "cannot be written")
    assert before == {path: (run / path).read_bytes() for path in before}
    assert_one_line_error(limited(10, "pretrain.py", *words, cwd=here), "cannot be written: File too large")
    assert not run.exists()
    assert before == {path: (here / "runs/pretrain.1" / path).read_bytes() for path in before}
    process = limited(3000, "pretrain.py", *words, cwd=here)  # room for the log, but never for a checkpoint
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: runs/pretrain holds no checkpoint")
    assert not list(here.rglob("*.tmp*"))


def test_a_full_disk_under_the_output(here, tmp_path):
    """A run goes on without its output; a script that makes nothing else says so."""
    words = flags(steps=3, dtype="fp32")
    command = [sys.executable, ROOT / "pretrain.py", *map(str, words)]
    options = {"cwd": here, "encoding": "utf-8", "timeout": 240, "check": False}
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = subprocess.run(command, stdout=full, stderr=full, **options)
        assert process.returncode == 0
        assert set(metrics("runs/pretrain", "loss")) == {1, 2, 3}
        for name in ("ablate.py", "norms.py"):
            process = subprocess.run([sys.executable, ROOT / name], stdout=full, stderr=subprocess.PIPE, **options)
            assert_one_line_error(process, "the output cannot be written: No space left on device")


def test_a_reader_that_ends_early(here):
    """`| head` ends a list without a traceback; a run goes on when nobody reads what it prints."""
    for command, status in ((["ablate.py"], 141), (["norms.py"], 141), (["pretrain.py", *flags(steps=2)], 0)):
        command = [sys.executable, "-u", ROOT / command[0], *command[1:]]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(240) == status, said
        assert "Traceback" not in said
    assert set(metrics("runs/pretrain", "loss")) == {1, 2}


def test_event_files_that_a_full_disk_cuts(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = trackers.TensorBoard(tmp_path / "board", 0)
    board.numbers(1, {"loss": 1.0})
    board.writer.flush()
    size = board.file.stat().st_size
    with files_up_to(size + 20):
        for step in range(2, 6):
            board.numbers(step, {"loss": float(step)})
            board.write(lambda writer: writer.flush())  # another thread writes
    for step in range(6, 9):
        board.numbers(step, {"loss": float(step)})
    board.close()
    first, second = sorted((tmp_path / "board").iterdir(), key=lambda path: int(path.name.rpartition(".")[2]))
    assert first.stat().st_size == size  # whole records only
    accumulator = EventAccumulator(str(tmp_path / "board"))
    accumulator.Reload()
    assert [event.step for event in EventAccumulator(str(second)).Reload().Scalars("loss")][-3:] == [6, 7, 8]
    said = capsys.readouterr()
    assert said.out.count("could not be written") == 1
    assert "Traceback" not in said.err


def test_a_run_that_is_killed_leaves_the_events_of_its_last_save(here, monkeypatch):
    """Its steps are not written again when it is resumed. What the writer gets may wait for a flush, as where
    TensorFlow or a file system that cannot append writes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Killed(BaseException):
        pass

    def killed(self):
        raise Killed

    monkeypatch.delattr("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem.append")
    monkeypatch.setattr(runs.Run, "on_save", property(killed, lambda self, value: None), raising=False)
    with pytest.raises(Killed):
        pretrain.main(config(save_every=2))
    events = EventAccumulator(str(here / "runs/pretrain/tensorboard")).Reload()
    runs.Run.close_log()  # the writer's thread ends with this test
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_a_file_system_without_hard_links(here, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    pretrain.main(config(save_every=2, keep=2))
    assert sorted(path.name for path in (here / "runs/pretrain").glob("step*")) == ["step_0000004", "step_0000006"]
    assert (here / "runs/pretrain/step_0000006/trainer_state.pt").is_file()


def test_best_is_the_best_that_could_be_written(here, monkeypatch):
    """A checkpoint that the disk refused does not keep later ones from being saved."""
    losses, refused, save = iter([3.0, 1.0, 2.0]), [], runs.save

    def full(path, name, *rest):
        if name == "best" and len(refused) == 1:
            refused.append(False)
            return False
        refused.extend([True] * (name == "best"))
        return save(path, name, *rest)

    monkeypatch.setattr(runs, "save", full)
    monkeypatch.setattr(pretrain_report, "validate", lambda *_: (next(losses, 9.0), 1.0))
    pretrain.main(config(steps=3, eval_every=1))
    assert refused == [True, False, True]


@pytest.mark.parametrize("name", ["norms.py", "pretrain.py", "generate.py"])
def test_examples_and_help_in_a_locale_without_greek(name, monkeypatch, tmp_path):
    for key, value in ASCII.items():
        monkeypatch.setenv(key, value)
    for words in ([], ["--help"]) if name == "generate.py" else ([],) if name == "norms.py" else (["--demo"],):
        process = subprocess.run([sys.executable, ROOT / name, *words], cwd=tmp_path, capture_output=True, check=False)
        assert process.returncode == 0, process.stderr.decode()
        assert process.stdout.isascii()


def test_a_run_in_a_locale_without_cyrillic(scratch, monkeypatch):
    """It prints escapes; what it reads and writes is UTF-8."""
    text = "Съешь ещё этих мягких французских булок. " * 60
    (scratch / "text.txt").write_text(text, encoding="utf-8")
    (scratch / "settings.yaml").write_text("# привет\nname: short\nsteps: 2\n", encoding="utf-8")
    for key, value in ASCII.items():
        monkeypatch.setenv(key, value)
    process = script("pretrain.py", *flags(steps=9, eval_every=1), "--config", "settings.yaml", cwd=scratch)
    assert process.returncode == 0, process.stderr
    assert "\\u0435" in process.stdout
    assert "е" in (scratch / "runs/short/samples.md").read_text(encoding="utf-8")
    words = ("--checkpoint", "runs/short", "--max_new_tokens", "20", "--temperature", "1", "--prompt")
    process = script("generate.py", *words, " ", cwd=scratch)
    assert process.returncode == 0, process.stderr
    assert process.stdout.isascii()
    assert "\\u04" in process.stdout
    assert_one_line_error(script("generate.py", *words, "Съешь", cwd=scratch), "is not ascii text", "UTF-8 locale")


def test_arguments_that_are_no_text(here):
    """Bytes that no encoding explains may name a file, and nothing else; a $ in a file's name is no formula."""
    name = os.fsdecode(b"caf\xe9 $a$^$.txt")
    (here / "text.txt").rename(name)
    process = script("pretrain.py", *flags(data=name, steps=1), cwd=here)
    assert process.returncode == 0, process.stderr
    assert (here / "runs/pretrain/curves.png").is_file()
    assert_one_line_error(script("pretrain.py", "--data", name + "x", cwd=here), "\\udce9")
    (here / "bad.yaml").write_bytes(b"name: \xff\n")
    assert_one_line_error(script("pretrain.py", "--config", "bad.yaml", cwd=here), "bad.yaml is not UTF-8 text")


@pytest.mark.parametrize(
    ("text", "key"), [("steps: 5\nname: a\nsteps: 6\n", "steps"), ("model: {width: 16, width: 32}\n", "width")]
)
def test_a_setting_that_stands_twice(scratch, capsys, text, key):
    """YAML would take the last."""
    (scratch / "twice.yaml").write_text(text, encoding="utf-8")
    words = f"--config twice.yaml: the key '{key}' stands twice"
    assert_refused(capsys, lambda: parse_config(pretrain.Config, ["--config", "twice.yaml"]), words)
    for once in ("a: &m {b: 1}\nc: *m\n", "a: &m [*m]\n", "a: [", ""):  # an alias; one that holds itself; no YAML
        assert key_twice(once) is None


@pytest.mark.parametrize("name", ["pretrain.py", "encoder.py"])  # the encoder's has a default of its own
def test_a_group_of_settings_without_any(here, name):
    (here / "empty.yaml").write_text("steps: 5\nmodel:\n#  n_layer: 2\n", encoding="utf-8")
    process = script(name, "--config", "empty.yaml", cwd=here)
    assert_one_line_error(process, "model is empty in the --config file")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("folder", "Is a directory"), ("file/x", "Not a directory"), ("loop", "Too many levels"), ("n" * 300, "too long")],
)
def test_a_path_that_cannot_be_reached_is_one_line(scratch, monkeypatch, capsys, name, problem):
    (scratch / "folder").mkdir()
    (scratch / "file").touch()
    (scratch / "loop").symlink_to("loop")
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as left:
        run_script(lambda config: Path(name).read_bytes(), pretrain.Config)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith(f"error: {name}: ")
    assert problem in line


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO])
def test_no_permission_is_one_line_and_a_broken_disk_a_traceback(monkeypatch, capsys, code):
    def stage(config):
        raise OSError(code, os.strerror(code), "there/x")

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(OSError if code == errno.EIO else SystemExit):
        run_script(stage, pretrain.Config)
    line = "" if code == errno.EIO else f"error: there/x: {os.strerror(code)}\n"
    assert capsys.readouterr().err == line


def test_a_name_that_no_disk_can_hold(here):
    (here / "runs").mkdir()
    for resume in ("true", "false"):
        process = script("pretrain.py", "--name", "n" * 300, "--resume", resume, cwd=here)
        assert_one_line_error(process, "cannot be a run's directory; use at most 200 letters")
