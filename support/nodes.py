"""The processes of one launch, on one node or several, meet before they compute: each can reach the others, and all are
the same in what they train with.

    store = meet(connect(), rank, world, facts)     before the process group is made; ConfigError on every process
    tell_others(problem)                            before a process ends: the others need not wait for it
    why_it_broke(error)                             a line about an exchange that another process did not finish
    launch_id()                                     the same for all attempts of one launch of torchrun

torchrun has one key-value store for all processes of a launch, and keeps it when it starts them again after one has
died. The store then still holds what the dead wrote, and the nodes do not count attempts alike: a node that joins anew
starts at 0. So process 0 draws a token for each attempt and gives it to those that are alive:

    process r     hello/r = {id, host, facts}, id drawn at its start
    process 0     reads hello/r, writes welcome/id = token
    process r     reads welcome/id, which only one that lives can have written after hello/r; writes token/came/r = id
    process 0     when all have come: compares their facts, writes token/verdict = null, or what is wrong
    all           raise ConfigError(verdict), or use the store with the token as prefix
"""

import contextlib
import json
import os
import re
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path

from torch import distributed

from support.errors import ConfigError
from support.files import as_bytes, to_json

REACH = timedelta(seconds=30)  # to connect to the store, which is there before the processes, or starts with them
MESH = timedelta(seconds=20)  # to connect to each other; gloo tries for up to five times as long
ARRIVE = timedelta(minutes=10)  # for the last process to come: a node that died may be started again by hand
LEAVE = timedelta(minutes=1)  # for a process that has a problem to say so
WAIT = timedelta(hours=2)  # in an exchange: rank 0 may train a tokenizer and tokenise a long text meanwhile

MEETING = {"began": False, "store": None, "launch": None}  # of this process


def launched():
    """(rank, world) that torchrun gave this process; (0, 1) without it. ConfigError on a rank that is not in the world:
    it would train, and print and save nothing."""
    rank, world = whole_from("RANK", 0), whole_from("WORLD_SIZE", 1)
    if rank >= world:
        where = f"the environment has RANK={rank} and WORLD_SIZE={world}"
        raise ConfigError(f"{where}: start this with torchrun, or unset both")
    return rank, world


def whole_from(name, default):
    """A whole number from an environment variable; default: where it is not set, or empty. ConfigError on another
    text."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text!r}, which is no number: start this with torchrun")
    return int(text)


def several_nodes():
    """Whether some processes of this launch run elsewhere."""
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world) != world


def first_on_node():
    """Whether this is the process that prints for its node. So is each whose LOCAL_RANK is no number."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return rank == "0" or not rank.isdecimal()


def launch_id():
    """An id of this launch: of its store, if torchrun keeps that between attempts; else torchrun's --rdzv_id, or the id
    of the process that started this one."""
    rendezvous_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return MEETING["launch"] or (str(os.getppid()) if rendezvous_id == "none" else rendezvous_id)


def one_store():
    """On process 0: whether all attempts of this launch have one store, so that no other launch has its `launch_id`."""
    return MEETING["launch"] is not None


def connect():
    """The store of this launch. ConfigError within a minute if it cannot be reached."""
    MEETING["began"] = True
    rank, world = launched()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (host and port):
        raise ConfigError(f"WORLD_SIZE is {world}, but MASTER_ADDR or MASTER_PORT is not set: start this with torchrun")
    hosts_it = rank == 0 and not torchrun_keeps_the_store()
    problem = None if hosts_it else cannot_reach(host, whole_from("MASTER_PORT", 0))
    try:
        if not problem:
            return next(distributed.rendezvous("env://", timeout=REACH))[0]
    except (distributed.DistError, ValueError) as error:  # ValueError: of the variables of the environment
        problem = first_line(error)
    if hosts_it:
        raise ConfigError(f"not all of the {world} processes came to {host}:{port} in {REACH.seconds} s ({problem})")
    raise ConfigError(
        f"process {rank} on {socket.gethostname()} cannot reach process 0 at {host}:{port} ({problem}): start that "
        "node, open its ports, or give torchrun an address of it that the others know (--master_addr; --local_addr)"
    )


def torchrun_keeps_the_store():
    """Whether the store outlives the processes: else process 0 has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def cannot_reach(host, port):
    """Why nothing answers there for 30 s, or None if something does. (torch's own wait for its store ends in a page of
    C++ frames.)"""
    end, problem = time.monotonic() + REACH.total_seconds(), "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=left).close()
            return None
        except OSError as error:
            problem = str(error.strerror or error)
            time.sleep(min(0.5, left))
    return f"{problem} for {REACH.seconds} s"


def meet(store, rank, world, facts=None, folder=None, problem=None):
    """Wait for the other processes and compare -> the store under a prefix of this attempt. ConfigError, the same on
    all, if one has another value of a fact, sees another `folder` than process 0, or has a problem.

    facts: {name: value}, JSON; a value of None is not compared.
    """
    own = card(facts, problem)
    try:
        token, verdict = (_receive if rank == 0 else _visit)(store, rank, world, own, folder)
    except distributed.DistError as error:
        raise ConfigError(f"the store of this launch broke while the processes met: {first_line(error)}") from None
    if verdict:
        raise ConfigError(verdict)
    store.set_timeout(WAIT)
    MEETING["store"] = distributed.PrefixStore(token, store)
    return MEETING["store"]


def card(facts=None, problem=None):
    """What a process says of itself."""
    problem = None if problem is None else str(problem)
    return {"id": uuid.uuid4().hex, "host": socket.gethostname(), "facts": facts or {}, "problem": problem}


def _visit(store, rank, world, card, folder):
    """What every process but 0 does -> (token, verdict)."""
    store.set(f"hello/{rank}", to_json(card))
    span = LEAVE if card["problem"] else ARRIVE
    if not _comes(store, f"welcome/{card['id']}", span):
        store.delete_key(f"hello/{rank}")
        raise ConfigError(f"process 0 did not come within {minutes(span)}; process {rank} waited for it")
    token = store.get(f"welcome/{card['id']}").decode()
    sees = folder is None or _there_soon(folder / f".meeting-{token}")
    store.set(f"{token}/came/{rank}", to_json({"id": card["id"], "sees": sees}))
    if not _comes(store, f"{token}/verdict", 2 * ARRIVE):
        raise ConfigError("process 0 came, and ended before all had come")
    return token, json.loads(store.get(f"{token}/verdict"))


def _receive(store, rank, world, card, folder):
    """What process 0 does -> (token, verdict)."""
    token, verdict, cards = card["id"], None, [card]
    if torchrun_keeps_the_store():
        MEETING["launch"] = store.compare_set("launch", "", token).decode()
    mark = None if folder is None else folder / f".meeting-{token}"
    try:
        if mark and not card["problem"]:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except OSError as error:  # told to the others, as any other problem
        card["problem"] = f"{error.filename} cannot be written: {error.strerror}"
    span = LEAVE if card["problem"] else ARRIVE
    end = time.monotonic() + span.total_seconds()
    try:
        for other in range(1, world):
            cards.append(_welcome(store, token, other, end, span))
        verdict = what_differs(cards, folder)
    except ConfigError as error:  # one did not come; what the others have to say comes first
        verdict = what_differs(cards, folder) or str(error)
    finally:
        if mark:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
    store.set(f"{token}/verdict", to_json(verdict))
    return token, verdict


def _welcome(store, token, other, end, span):
    """Wait for one process until `end`, `span` after process 0 came; give it the token -> its card, with "sees"."""
    hellos, came, late = {}, f"{token}/came/{other}", time.monotonic() + 10  # {id: card}
    while time.monotonic() < end:
        if store.check([f"hello/{other}"]):
            hello = json.loads(store.get(f"hello/{other}"))
            if hello["id"] not in hellos:  # perhaps of a dead process: then another one follows
                store.set(f"welcome/{hello['id']}", token)
                hellos[hello["id"]] = hello
        if store.check([came]):
            answer = json.loads(store.get(came))
            store.delete_key(f"hello/{other}")
            return hellos[answer["id"]] | answer
        if late and time.monotonic() > late:
            print(f"waiting for process {other}, up to {minutes(span)}", flush=True)
            late = None
        time.sleep(0.005)
    raise ConfigError(f"process {other} did not come within {minutes(span)}; process 0 waited for it")


def what_differs(cards, folder=None):
    """The cards of all processes, in rank order -> what is wrong, in one line, or None."""
    for rank, card in enumerate(cards):
        if card["problem"]:
            return f"process {rank} on {card['host']} stopped: {card['problem']}"
    for rank, card in enumerate(cards):
        if not card.get("sees", True):
            return (
                f"{folder}/ of process {rank} on {card['host']} is not the folder of process 0 on {cards[0]['host']}: "
                "start all nodes in one directory that they share"
            )
    differences = []
    for name in dict.fromkeys(name for card in cards for name in card["facts"]):
        values = [(rank, card["facts"].get(name)) for rank, card in enumerate(cards)]
        values = [(rank, value) for rank, value in values if value is not None]
        other = next(((rank, value) for rank, value in values if value != values[0][1]), None)
        if other:
            pair = [f"{shown(value)} on process {rank} ({cards[rank]['host']})" for rank, value in (values[0], other)]
            differences.append(f"{name}: {pair[0]}, {pair[1]}")
    if not differences:
        return None
    more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
    return f"the processes differ, and would train apart: {'; '.join(differences[:6])}{more}"


def shown(value):
    """A fact in a message: the first digits of a content are enough."""
    return f"content {value[:8]}" if re.fullmatch("[0-9a-f]{32}", str(value)) else value


def tell_others(problem):
    """Let the other processes know why this one ends. Does nothing if they know, or if there are none."""
    with contextlib.suppress(RuntimeError, ConfigError):
        rank, world = launched()
        if world == 1:
            return
        if MEETING["store"]:
            line = as_bytes(f"process {rank} on {socket.gethostname()} stopped: {problem}").decode()
            MEETING["store"].compare_set("ended", "", line)  # the first stays: the next ends because of it
        elif not MEETING["began"]:
            meet(connect(), rank, world, problem=problem)


# Of gloo and NCCL: a process of the group has ended, or cannot be reached any more.
BROKEN = r"closed by peer|reset by peer|Broken pipe|Timed out waiting|remote process exited|Gloo connect|NCCL error"


def why_it_broke(error):
    """A RuntimeError of an exchange between processes -> the line to print, that of the process that ended if it left
    one; None if it is another error."""
    if not (isinstance(error, distributed.DistError) or re.search(BROKEN, str(error))):
        return None
    with contextlib.suppress(RuntimeError):
        if MEETING["store"] and MEETING["store"].check(["ended"]):
            return MEETING["store"].get("ended").decode()
    return f"another process ended, or its connection did ({first_line(error)})"


def first_line(error):
    """The first line of an error of torch, without places in its source and without advice."""
    line = re.sub(r"\[\S+:\d+\] ", "", str(error).strip().partition("\n")[0])
    return line.partition(". This is typically")[0][:200]


def minutes(span):
    return f"{span.total_seconds() / 60:g} minutes"


def _comes(store, key, span):
    """Whether a key is in the store, or comes within the time."""
    try:
        store.wait([key], span)
        return True
    except distributed.DistStoreError:
        return False


def _there_soon(path):
    """Whether a file is there; a network file system may show it a little later."""
    for _ in range(30):
        if Path(path).exists():
            return True
        time.sleep(0.1)
    return False
