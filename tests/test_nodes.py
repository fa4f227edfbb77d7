"""support/nodes.py and support/launch.py: torchrun on two nodes, which are two network namespaces of this machine; what
the processes tell each other before the first step, in threads."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_metrics, assert_same_weights, flags_of, metrics
from tiny import MODEL, TEXT, config, flags
from torch import distributed

import grpo
import pretrain
from data import load_problems
from support import cli, devices, launch, nodes, runs
from support.errors import ConfigError
from tokenizer_bpe import BPETokenizer, CharTokenizer
from transformer import Transformer, TransformerConfig

# ------------------------------------------------------------------------------------------------ two nodes


@dataclass
class Net:
    """Two network namespaces, joined by a cable: node 0 and node 1, who share the file system."""

    names: list
    cables: list
    addresses = ("10.77.0.1", "10.77.0.2")
    port = 29500

    def start(self, node, command, cwd, **env):
        """A command on a node; its output goes to node0.txt or node1.txt, after what is there."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cables[node]} | env
        with open(Path(cwd) / f"node{node}.txt", "a", encoding="utf-8") as out:
            command = ["ip", "netns", "exec", self.names[node], *map(str, command)]
            return subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out)

    def torchrun(self, node, cwd, script, *words, restarts=0, **env):
        """One process on this node, of two in all."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
        launcher += ["--node_rank", node, "--master_addr", self.addresses[0], "--master_port", self.port]
        return self.start(node, [*launcher, "--max-restarts", restarts, script, *words], cwd, **env)


@pytest.fixture(scope="module")
def net():
    names, cables = ([f"{kind}{os.getpid()}n{i}" for i in range(2)] for kind in ("ata", "v"))
    lines = [f"netns add {name}" for name in names]
    lines.append(f"link add {cables[0]} netns {names[0]} type veth peer name {cables[1]} netns {names[1]}")
    for name, cable, address in zip(names, cables, Net.addresses, strict=True):
        lines += [f"-n {name} addr add {address}/24 dev {cable}"]
        lines += [f"-n {name} link set {device} up" for device in (cable, "lo")]
    try:
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)
        yield Net(names, cables)
    except FileNotFoundError:
        pytest.skip("no network namespaces: there is no program ip (iproute2)")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: ip {line}: {error.stderr.strip()}")
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def output(node, folder="."):
    return (Path(folder) / f"node{node}.txt").read_text(encoding="utf-8")


def errors(node, folder="."):
    """The lines of a script's own errors on a node; no traceback of the script is among the rest."""
    lines = output(node, folder).splitlines()
    assert not [line for line in lines if line.startswith("[rank") or "support/" in line], lines
    return [line for line in lines if line.startswith("error: ")]


def end(*processes, seconds=240):
    """Wait for all -> their exit statuses."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def family(pid):
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [pid, *(member for child in children for member in family(int(child)))]


def kill_node_1(processes, run):
    """SIGKILL to all of node 1, a step or more after last/ was written."""

    def logged():
        return len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())

    def until(condition):
        while not condition():
            assert [process.poll() for process in processes] == [None, None], output(0)[-2000:]
            time.sleep(0.002)

    until((run / "last/trainer_state.pt").exists)
    done = logged()
    until(lambda: logged() > done)
    for pid in family(processes[1].pid):
        os.kill(pid, signal.SIGKILL)
    processes[1].wait()


def both(net, here, script, words, name, **options):
    return [net.torchrun(node, here, ROOT / script, *words, "--name", name, **options) for node in range(2)]


def test_pretraining_on_two_nodes_and_a_node_that_is_killed(net, here):
    """Two nodes train as one process does. One that is killed and started again by the same command ends as well, bit
    for bit, and nothing is done twice."""
    long = dict(steps=48, save_every=16, eval_every=24, dtype="fp32")  # each save draws a picture
    words = flags(**long)
    assert end(*both(net, here, "pretrain.py", words, "two")) == [0, 0], output(0) + output(1)
    processes = both(net, here, "pretrain.py", words, "killed", restarts=1)
    kill_node_1(processes, here / "runs/killed")
    processes[1] = net.torchrun(1, here, ROOT / "pretrain.py", *words, "--name", "killed", restarts=1)
    assert end(*processes) == [0, 0], output(0) + output(1)
    assert [line for line in errors(0) if "another process ended" in line] == errors(0) != []
    assert_same_weights("runs/two/last", "runs/killed/last")
    assert_same_metrics("runs/two", "runs/killed", ["loss"])
    assert not (here / "runs/killed.1").exists()  # resumed, not begun again

    pretrain.main(config(name="one", **long))
    assert_same_metrics("runs/one", "runs/two", ("loss", "grad_norm", "valid_loss"), rel=1e-4)
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-4, rtol=1e-4)


SLOW_REWARD = """
import time

def letters(texts, problems, ended):
    time.sleep(0.05)  # so that the node is killed while there is something to do
    return [float("e" in text) for text in texts]
"""


def test_grpo_on_two_nodes_of_which_one_is_killed(net, here, monkeypatch):
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the reward's folder is added to it
    problems = [p for split in ("train", "valid", "test") for p in load_problems("word", split, 30)]
    lines = (json.dumps({"question": p.question, "answer": p.solution}) + "\n" for p in problems)
    (here / "p.jsonl").write_text("".join(lines), encoding="utf-8")
    (here / "own.py").write_text(SLOW_REWARD, encoding="utf-8")
    tokenizer = BPETokenizer.train([p.question + p.solution for p in problems], 400)
    torch.manual_seed(0)
    start = Transformer(TransformerConfig(tokenizer.vocab_size, **MODEL | {"context": 200}))
    start.save_pretrained("start")
    tokenizer.save_pretrained("start")
    settings = dict(init="start", data="p.jsonl", reward="own:letters", correct_weight=0.0, format_weight=0.0, beta=0.1)
    settings |= dict(steps=10, prompts=4, rollouts=4, max_new_tokens=6, micro_batch=16, lr=1e-4, optimizer="adamw")
    settings |= dict(eval_every=10, eval_problems=3, test_problems=4, pass_problems=2, pass_samples=2, save_every=3)
    settings |= dict(device="cpu", dtype="fp32")
    words = flags_of(settings)
    processes = both(net, here, "grpo.py", words, "killed", restarts=1)
    kill_node_1(processes, here / "runs/killed")
    processes[1] = net.torchrun(1, here, ROOT / "grpo.py", *words, "--name", "killed", restarts=1)
    assert end(*processes) == [0, 0], output(0) + output(1)
    assert not (here / "runs/killed.1").exists()
    assert "pass@2" in output(0)

    grpo.main(grpo.Config(name="one", **settings))
    names = ("reward", "grad_norm", "kl", "length", "valid_reward", "entropy", "loss")
    assert_same_metrics("runs/one", "runs/killed", names, rel=1e-3, abs=1e-6)
    assert min(metrics("runs/one", "grad_norm").values()) > 0
    assert_same_weights("runs/one/last", "runs/killed/last", atol=1e-4, rtol=1e-3)


def test_nodes_that_differ_are_refused_before_the_first_step(net, here):
    """Node 1 has another learning rate, text, start, torch and script, and runs/ is shared: one line, on each node."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train([TEXT])
    for folder in (here, here / "other"):
        (folder / "start").mkdir(parents=True)
        Transformer(TransformerConfig(tokenizer.vocab_size, **MODEL)).save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
        (folder / "text.txt").write_text(TEXT + folder.name, encoding="utf-8")
        script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nimport pretrain\n"
        script += "torch.__version__ = '1.0'\n" if folder != here else ""
        script += "pretrain.run_script(pretrain.main, pretrain.Config)\n"
        (folder / "script.py").write_text(script, encoding="utf-8")
    (here / "runs").mkdir()
    (here / "other/runs").symlink_to(here / "runs")
    words = flags(init="start")
    processes = [net.torchrun(0, here, "script.py", *words)]
    processes += [net.torchrun(1, here / "other", "script.py", *words, "--lr", "0.25")]
    assert end(*processes) == [1, 1]
    assert errors(0) == errors(1, "other") != []
    (line,) = errors(0)
    host = socket.gethostname()
    assert f"--lr: 0.004 on process 0 ({host}), 0.25 on process 1 ({host})" in line
    for word in ("torch: ", "this code: content ", "the files of --data text.txt: ", "the files of --init start: "):
        assert word in line
    assert line.count(" on process 1") == 5  # nothing else differs
    assert "exitcode  : 2" in output(0)
    assert not list((here / "runs").iterdir())


def test_a_node_that_stops_alone_says_why_to_both(net, here):
    """Only node 0 has a data set that cannot be downloaded."""
    (here / "full/tinystories").mkdir(parents=True)
    for split in ("train", "valid"):
        (here / f"full/tinystories/{split}.txt").write_text(TEXT, encoding="utf-8")
    words = flags(data="tinystories")
    folders = ("full", "empty")
    processes = [net.torchrun(i, here, ROOT / "pretrain.py", *words, ALIGN_DATA=folders[i]) for i in range(2)]
    assert end(*processes) == [1, 1]
    (line,) = errors(1)
    assert "tinystories: no empty/tinystories" in line
    assert errors(0) == [f"error: process 1 on {socket.gethostname()} stopped: {line.removeprefix('error: ')}"]


def test_a_node_that_cannot_reach_the_store_says_so(net, here):
    """Nobody has the address. In a test a second is enough, in a run a minute."""
    assert timedelta(minutes=1) > nodes.REACH
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport pretrain\nfrom support import nodes\n"
    script += "nodes.REACH = nodes.timedelta(seconds=1)\npretrain.run_script(pretrain.main, pretrain.Config)\n"
    (here / "script.py").write_text(script, encoding="utf-8")
    env = dict(RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="10.77.0.9", MASTER_PORT="29600")
    assert end(net.start(1, [sys.executable, "script.py", *flags()], here, **env), seconds=60) == [2]
    (line,) = output(1).splitlines()
    assert line.startswith(f"error: process 1 on {socket.gethostname()} cannot reach process 0 at 10.77.0.9:29600 (")
    assert not (here / "runs").exists()


def test_processes_that_meet_and_do_not_reach_each_other_say_so(net, here):
    """Without torchrun; gloo is told to use each node's own loopback."""
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport pretrain\nfrom support import devices\n"
    script += "devices.MESH = devices.MESH / 40\npretrain.run_script(pretrain.main, pretrain.Config)\n"
    (here / "script.py").write_text(script, encoding="utf-8")
    env = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR=net.addresses[0], MASTER_PORT="29700")
    env["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "script.py", *flags()]
    assert end(*(net.start(i, command, here, RANK=str(i), **env) for i in range(2)), seconds=60) == [2, 2]
    for node in range(2):
        (line,) = errors(node)
        assert "the processes do not reach each other (" in line
        assert "GLOO_SOCKET_IFNAME=NAME" in line


# ------------------------------------------------------------------------------------------------ the meeting


@pytest.fixture(autouse=True)
def unmet(monkeypatch):
    monkeypatch.setattr(nodes, "MEETING", {"began": False, "store": None, "launch": None})
    monkeypatch.setattr(nodes, "ARRIVE", timedelta(seconds=20))  # so that a failure shows soon


def meeting(store, *processes):
    """Each process in a thread, {the arguments of meet}, or None: it never comes -> its store, or the error."""
    ends = [None] * len(processes)

    def come(rank):
        try:
            ends[rank] = nodes.meet(store, rank, len(processes), **processes[rank])
        except ConfigError as error:
            ends[rank] = str(error)

    threads = [threading.Thread(target=come, args=(i,)) for i, options in enumerate(processes) if options is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_who_has_a_problem_stops_all(rank):
    ends = meeting(distributed.HashStore(), *({"problem": "no GPU" if i == rank else None} for i in range(3)))
    assert ends == [f"process {rank} on {socket.gethostname()} stopped: no GPU"] * 3


def test_what_one_process_alone_has_is_named():
    facts = {"--lr": "1.0", "--data": "x", "this code": "a" * 32, "the files of --data x": "b" * 32}
    other = facts | {"--lr": "2.0", "this code": "c" * 32}
    alike = facts | {"the files of --data x": None}  # on node 0 another process has looked
    ends = meeting(distributed.HashStore(), *({"facts": f} for f in (facts, alike, other)))
    assert len(set(ends)) == 1
    host = socket.gethostname()
    lr = f"--lr: 1.0 on process 0 ({host}), 2.0 on process 2 ({host})"
    code = f"this code: content aaaaaaaa on process 0 ({host}), content cccccccc on process 2 ({host})"
    assert ends[0] == f"the processes differ, and would train apart: {lr}; {code}"
    many = [{"facts": {f"--{i}": rank for i in range(9)}} for rank in range(2)]
    assert meeting(distributed.HashStore(), *many)[1].endswith("; and 3 more")


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    folders = [tmp_path / name / "runs" for name in ("here", "there")]
    folders[1].mkdir(parents=True)
    ends = meeting(distributed.HashStore(), *({"folder": folder} for folder in folders))
    assert "runs/ of process 1" in ends[0]
    assert "in one directory that they share" in ends[0]
    assert ends[0] == ends[1]
    assert not isinstance(meeting(distributed.HashStore(), *[{"folder": folders[0]}] * 2)[1], str)
    assert not list(folders[0].iterdir())  # no mark is left


def test_a_folder_that_process_0_cannot_write_is_told_to_all(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "_there_soon", lambda path: False)
    (tmp_path / "runs").touch()  # a file
    ends = meeting(distributed.HashStore(), *[{"folder": tmp_path / "runs"}] * 2)
    problem = f"{tmp_path / 'runs'} cannot be written: File exists"
    assert ends == [f"process 0 on {socket.gethostname()} stopped: {problem}"] * 2


def test_each_attempt_is_among_those_that_live(monkeypatch):
    """The store is that of the attempt before, with the hello of a process that died before it was answered."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store, launches = distributed.HashStore(), []
    for attempt in range(2):
        store.set("hello/1", json.dumps(nodes.card({"of": "the dead"})))
        one, other = meeting(store, {"facts": {"of": attempt}}, {"facts": {"of": attempt}})
        assert not one.check(["key"])
        one.set("key", "value")
        assert other.get("key") == b"value"
        launches.append(nodes.launch_id())
    assert launches[0] == launches[1] != str(os.getppid())
    assert nodes.one_store()


@pytest.mark.parametrize("problem", [None, "no GPU"])
@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_nobody_waits_for_ever(monkeypatch, rank, missing, problem):
    """Nor as long as for others, with a problem of one's own to tell."""
    monkeypatch.setattr(nodes, "LEAVE" if problem else "ARRIVE", timedelta(seconds=0.3))
    began = time.monotonic()
    words = f"process {missing} did not come within 0.005 minutes; process {rank} waited"
    if problem and rank == 0:
        words = f"process 0 on {socket.gethostname()} stopped: no GPU"
    with pytest.raises(ConfigError, match=words):
        nodes.meet(distributed.HashStore(), rank, 2, problem=problem)
    assert time.monotonic() - began < 15


def test_a_problem_of_process_0_is_told_though_another_process_is_late(monkeypatch):
    monkeypatch.setattr(nodes, "LEAVE", timedelta(seconds=0.5))
    store, told = distributed.HashStore(), f"process 0 on {socket.gethostname()} stopped: no GPU"
    assert meeting(store, {"problem": "no GPU"}, {}, None)[:2] == [told, told]


def test_an_error_of_the_user_on_one_process_reaches_the_others(monkeypatch, capsys):
    """A problem is an exception where run_script tells of it."""
    store = distributed.HashStore()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(nodes, "connect", lambda: store)
    other = threading.Thread(target=cli.fail, args=(ConfigError("--steps is 0"),))
    other.start()
    with pytest.raises(ConfigError, match=f"process 1 on {socket.gethostname()} stopped: --steps is 0"):
        nodes.meet(store, 0, 2)
    other.join(30)
    assert capsys.readouterr().err == ""  # one line per node, and process 0 has it


def test_a_file_that_one_node_cannot_read_is_told_to_the_others(monkeypatch):
    """It is read when the store is reached, and the others wait already."""

    def unreadable(device):
        raise PermissionError(13, "Permission denied", "text.txt")

    store, ends = distributed.HashStore(), []
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "connect", lambda: store)
    other = threading.Thread(target=lambda: ends.extend(meeting(store, {}, None)))
    other.start()
    with pytest.raises(ConfigError, match=r"process 1 on .* stopped: .*text\.txt"):
        devices.setup("cpu", unreadable)
    other.join(30)
    assert "text.txt" in ends[0]


def test_what_ended_first_stays_the_reason(monkeypatch):
    """The next process ends because of it, and would only repeat it. A problem may name a file of odd bytes."""
    nodes.MEETING["store"], broken = distributed.HashStore(), RuntimeError("Connection closed by peer")
    monkeypatch.setenv("WORLD_SIZE", "3")
    first = f"process 0 on {socket.gethostname()} stopped: no caf\\udce9"
    for rank, problem in enumerate(["no caf\udce9", first]):
        monkeypatch.setenv("RANK", str(rank))
        nodes.tell_others(problem)
        assert nodes.why_it_broke(broken) == first


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"WORLD_SIZE": "0"}])
def test_a_rank_that_is_not_in_the_world(monkeypatch, variables):
    """It would train, and print and save nothing."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"the environment has RANK=\d and WORLD_SIZE=\d: start this with torchrun"):
        devices.setup("cpu")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_number_of_the_environment_that_is_none(monkeypatch, name):
    monkeypatch.setattr(nodes, "REACH", timedelta(seconds=0.2))
    good = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for variable, value in (good | {name: "abc"}).items():
        monkeypatch.setenv(variable, value)
    nodes.tell_others("no GPU")  # raises nothing
    with pytest.raises(ConfigError, match=f"the environment has {name}='abc', which is no number"):
        nodes.connect() if name == "MASTER_PORT" else devices.setup("cpu")
    assert nodes.first_on_node()  # prints the line
    monkeypatch.setenv(name, "")
    assert nodes.whole_from(name, 7) == 7
    assert nodes.first_on_node()


@pytest.mark.parametrize(
    ("rank", "host", "words"),
    [
        (0, "127.0.0.1", "not all of the 2 processes came to 127.0.0.1:"),  # which it hosts itself
        (1, "127.0.0.1", "cannot reach process 0 at .*Connection refused"),
        (1, "no.such.host", "cannot reach process 0 at .*[Nn]ame "),  # as each C library has it
        (1, "", "start this with torchrun"),
    ],
)
def test_why_a_store_is_not_reached(monkeypatch, rank, host, words):
    monkeypatch.setattr(nodes, "REACH", timedelta(seconds=1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR=host, MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=words):
        nodes.connect()


def test_a_launch_knows_its_own_runs(here, monkeypatch):
    """With one store for all attempts no restart is counted: a node that joins anew starts at 0."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    nodes.MEETING["launch"] = "this launch"
    pretrain.main(config(steps=2, save_every=1))
    dist = devices.Dist(0, 1, torch.device("cpu"))
    assert not runs.restarted(config(), dist)  # this process itself has made it
    monkeypatch.setattr(runs, "OPENED", set())
    assert runs.restarted(config(), dist)
    nodes.MEETING["launch"] = "another"
    assert not runs.restarted(config(), dist)


def test_what_is_compared_between_nodes(here, monkeypatch):
    (here / "start").mkdir()
    (here / "start/model.safetensors").write_bytes(b"1")
    (here / "tinystories").mkdir()
    (here / "tinystories/train.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setenv("ALIGN_DATA", str(here))
    settings = config(init="start", tokenizer="nowhere/at/all")
    before = launch.facts_of(settings, torch.device("cpu"))
    assert before["--model.width"] == "16"
    assert before["torch"] == torch.__version__
    assert before["--dtype auto"] == "fp32"
    assert before["the files of --tokenizer nowhere/at/all"] == "nothing there"
    for path, name in (("text.txt", "--data text.txt"), ("start/model.safetensors", "--init start")):
        (here / path).write_bytes(b"2" * 100)
        after = launch.facts_of(settings, torch.device("cpu"))
        assert {key for key in after if after[key] != before[key]} == {f"the files of {name}"}
        before = after
    assert launch.content_of_value("word")  # a task
    assert launch.content_of_value("bpe") is None  # just a word
    assert launch.content_of_value("tinystories") is None  # half of it is still to come
    (here / "tinystories/valid.txt").write_text(TEXT, encoding="utf-8")
    assert launch.content_of_value("tinystories")
    monkeypatch.setenv("LOCAL_RANK", "1")  # sees the files of rank 0
    assert not [key for key in launch.facts_of(settings, torch.device("cpu")) if "files" in key]


def test_a_setting_that_is_a_dict_on_one_node_alone_is_named(here):
    scaled = TransformerConfig(**MODEL, rope_scaling={"rope_type": "linear", "factor": 2.0})
    facts = [launch.facts_of(settings, torch.device("cpu")) for settings in (config(), config(model=scaled))]
    problem = nodes.what_differs([nodes.card(of_node) for of_node in facts])
    assert "--model.rope_scaling: null on process 0" in str(problem)
    assert '"factor": 2.0' in problem


def test_ranks_compare_what_they_have_read(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda into, own: into.__setitem__(slice(2), [own, other]))
    other = nodes.card({"the weights of start": "a" * 32})
    dist = devices.Dist(0, 2, torch.device("cpu"))
    dist.same({"the weights of start": "a" * 32})
    with pytest.raises(ConfigError, match=r"differ.*: the weights of start: content bbbbbbbb on process 0"):
        dist.same({"the weights of start": "b" * 32})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[/x/pair.cc:5] Read error [10.7.0.2]:6: Connection reset by peer. This is typically"),
            "reset by",
        ),
        (distributed.DistBackendError("NCCL error in: x.cpp:3"), "NCCL error"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_which_errors_are_those_of_another_process(error, line):
    assert line in nodes.why_it_broke(error) if line else nodes.why_it_broke(error) is None
    assert "typically" not in str(nodes.why_it_broke(error))
    nodes.MEETING["store"] = distributed.HashStore()
    nodes.MEETING["store"].set("ended", "process 1 on b stopped: no file")
    assert nodes.why_it_broke(error) == ("process 1 on b stopped: no file" if line else None)


def test_an_exchange_may_take_longer_than_to_connect():
    devices.join_group("gloo", distributed.HashStore())  # a group of one
    try:
        assert distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout == nodes.WAIT
    finally:
        distributed.destroy_process_group()
    assert timedelta(hours=1) < nodes.WAIT
