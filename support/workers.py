"""Long runs in processes of their own, several at a time, which Ctrl-C and SIGTERM stop: for ablate.py."""

import contextlib
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed

STATE = {"running": False, "stopped": False}  # of a worker process


def stop(number, frame):
    """SIGINT in a worker process: a run stops at once. A process waiting for work may hold the pool's lock: it is only
    marked, and refuses the next run (the pool queues one run more than it has processes)."""
    STATE["stopped"] = True
    if STATE["running"]:
        raise KeyboardInterrupt


def listen():
    """What a worker process does first."""
    signal.signal(signal.SIGINT, stop)


def guarded(call, *arguments):
    """A run in a worker process: call(*arguments), unless the process has been stopped."""
    usual = signal.getsignal(signal.SIGINT)
    try:
        STATE["running"] = True
        if STATE["stopped"]:
            raise KeyboardInterrupt
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit):
        STATE["stopped"] = True
        raise
    finally:
        STATE["running"] = False
        signal.signal(signal.SIGINT, usual)  # a run's own handlers leave Python's


def pass_on(number, _):
    """SIGTERM as Ctrl-C to the runs: a terminal sends Ctrl-C to all processes, but SIGTERM reaches this one alone."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    raise KeyboardInterrupt


def threads_each(jobs):
    """The threads of one of so many runs at a time, which share the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, cores // jobs)


def run_all(call, todo, jobs, bar):
    """todo: {key: arguments} -> {key: error} of the runs call(*arguments) that failed. Ctrl-C stops the runs, which
    save. bar: tqdm's, of the runs."""
    failed = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, pass_on)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=listen) as pool:
        try:
            runs = {pool.submit(guarded, call, *arguments): key for key, arguments in todo.items()}
            for job in as_completed(runs):
                try:
                    job.result()
                except (Exception, SystemExit) as error:
                    failed[runs[job]] = error
                bar.update()
        except KeyboardInterrupt:  # the runs got it too and have stopped; those in the queue do not start
            pool.shutdown(cancel_futures=True)
            bar.close()
            print("stopped; the same command makes the runs that are missing")
            raise SystemExit(130) from None
    return failed
