"""
Real runs of every method, killed with SIGKILL over and over and resumed by the same command until they finish, must end with the
bytes of the run that was never killed: weights, prompts, every journal but for its clock. Half of the kills come at a random
time; the others at a chosen instant (before or after the n-th rename, fsync, unlink, ..., or with a file or row half written),
so that moments too short to be hit by chance are hit too. Prints and appends to results/bench_kill.jsonl one row per method.

    python bench/kill.py                   20 kills of each method, a tiny random model
    python bench/kill.py --kills 200       more of them
"""
import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # a bench of the CPU, whatever else is here

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
import matplotlib.pyplot                                                  # noqa: F401: warmed up for the children
import model
import reflect
import rollout
from sampler import record
from test_fst import TINY, parity, what_counts, write_checkpoint, write_parities

RUNS = {**{method: (method, 1) for method in fst.METHODS}, "fst, two tasks in turn": ("fst", 2)}
PHASES = ("elsewhere", "starting", "restoring", "sampling", "reflection", "evaluation", "gradient", "optimizer step", "journal",
          "saving", "between rename and cleanup", "curves")
EVENTS = {"token": (rollout.Sampler, "decode"), "proposals": (reflect.Search, "propose"), "update": (fst.Learner, "update"),
          "refresh": (fst.Learner, "refresh"), "row": (fst.Run, "journal"), "save": (fst.Run, "save"), "file": (fst, "replace_file"), "weights": (model, "replace_file"),
          "fsync": (os, "fsync"), "rename": (os, "replace"), "cleanup": (Path, "unlink"), "cut": (os, "truncate")}
# Memory that the parent and its children share: the phase that the child is in, and how often each event has begun.
SHARED = np.frombuffer(mmap.mmap(-1, 8 * (1 + len(EVENTS))), dtype=np.int64)
truncate = os.truncate


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name, around):
    function = getattr(owner, name)
    setattr(owner, name, lambda *a, **more: around(function, *a, **more))


def watch(owner, name, phase):
    """While owner.name runs, the parent sees `phase`, a name or a function of the arguments."""
    def around(function, *a, **more):
        before, SHARED[0] = SHARED[0], PHASES.index(phase if isinstance(phase, str) else phase(*a))
        try:
            return function(*a, **more)
        finally:
            SHARED[0] = before
    wrap(owner, name, around)


def watch_all():
    watch(fst, "open_run", "starting")
    watch(fst.Run, "__init__", "starting")
    watch(fst.Run, "restore", "restoring")
    watch(fst.Run, "evaluate", "evaluation")
    watch(fst.Run, "descend", "gradient")
    watch(fst.Run, "save", "saving")
    watch(fst.Run, "journal", "journal")
    watch(fst.Learner, "update", "optimizer step")
    watch(fst, "plot", "curves")
    labels = {"sample": "sampling", "evolve": "sampling", "reflect": "reflection"}
    watch(reflect, "evolve", "reflection")                                # all of it but its rollouts
    watch(rollout.Sampler, "generate", lambda *a: labels.get(a[5], "evaluation"))       # a[5]: what its bar is called

    def renamed(function, *a):
        function(*a)
        SHARED[0] = PHASES.index("between rename and cleanup")
    wrap(os, "replace", renamed)

    def cleaned(function, *a, **more):
        function(*a, **more)
        if SHARED[0] == PHASES.index("between rename and cleanup"):
            SHARED[0] = PHASES.index("saving")
    wrap(Path, "unlink", cleaned)


def count_event(name, at=None, when=""):
    """Counts the event; kills this process at its `at`-th time, before it, after it, or, of a file or row, with half of it written."""
    index = 1 + list(EVENTS).index(name)

    def around(function, *a, **more):
        SHARED[index] += 1
        now = SHARED[index] == at
        if now and when == "before":
            die()
        if now and when == "half" and name in ("file", "weights"):
            path, write = a
            function(path, lambda temporary: (write(temporary), truncate(temporary, temporary.stat().st_size // 2), die()))
        out = function(*a, **more)
        if now and when == "half":
            path = a[0].folder / a[1]
            truncate(path, path.stat().st_size - 7)
        if now:
            die()
        return out
    wrap(*EVENTS[name], around)


def attempt(arguments, log, seconds=None, event=None):
    """One start of the command in a forked child: its exit status, or None and the phase where it was killed. seconds: kill it then;
    event: (name, n, when)."""
    SHARED[:] = 0
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        rollout.extract_answer = parity
        for name in EVENTS:
            if name == "fsync":                                           # the system calls that follow count outside of the phases
                watch_all()
            count_event(name, *event[1:] if event and event[0] == name else ())
        os._exit(fst.main(arguments))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), PHASES[SHARED[0]]


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def differences(folder, whole):
    """What is not as in the run that was never killed: no text, if all is well."""
    found = [f"files {sorted(files_of(folder) ^ files_of(whole))}"] if files_of(folder) != files_of(whole) else []
    names = ("metrics.jsonl but for its clock", "prompts.jsonl", "rollouts.jsonl", "checkpoint/model.safetensors", "checkpoint/prompts.json")
    return ", ".join(found + [name for name, a, b in zip(names, what_counts(folder), what_counts(whole)) if a != b])


def torture(folder, name, kills, seed):
    method, tasks = RUNS[name]
    task = ",".join(f"jsonl:{folder / f'data-{i}.jsonl'}" for i in range(tasks))
    command = ["--task", task, "--method", method, "--model", str(folder / "model"), *TINY, "--save-every", "1", "--out"]
    log, rng, start = folder / "log", random.Random(f"{seed} {name}"), time.perf_counter()
    whole = folder / f"{name}-whole"
    code, _ = attempt([*command, str(whole)], log)
    needed = time.perf_counter() - start
    assert code == 0, log.read_text()
    counts = {event: int(n) for event, n in zip(EVENTS, SHARED[1:])}
    row = {"method": method, "tasks": tasks, "kills": 0, "runs": 0, "lost": 0, "phases": Counter(), "instants": Counter()}
    while row["kills"] < kills:
        out, code, history = folder / f"{name}-{row['runs']}", None, []
        while code is None:
            event = seconds = None                                        # after 12 kills a run has been through enough
            if len(history) < 12 and rng.random() < 1 / 2:
                seconds = rng.uniform(0, needed)
            elif len(history) < 12:
                which = rng.choice([event for event, n in counts.items() if n] + ["cut"])     # a run never killed cuts nothing off
                when = rng.choice(["before", "after"] + ["half"] * (which in ("file", "weights", "row")))
                event = which, rng.randint(1, max(3, counts[which] // 2)), when
            code, phase = attempt([*command, str(out)], log, seconds, event)
            if code is None:
                history.append((event or seconds, phase))
                row["kills"] += 1
                row["phases"][phase] += 1
                row["instants"]["random time" if event is None else f"{event[2]} {event[0]}"] += 1
        row["runs"] += 1
        problem = f"exit status {code}" if code else differences(out, whole)
        if problem:
            row["lost"] += 1
            print(f"LOST: {out}: {problem}; killed at {history}\n{log.read_text()[-2000:]}")
    return {**row, "seconds_whole": needed, "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--method", action="append", choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)                                              # no thread is there to be lost in a fork
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if os.fork() == 0:                                                # in a child, as training a tokenizer starts threads
            write_checkpoint(folder / "model", "qwen3")
            os._exit(0)
        os.wait()
        for i in range(2):
            write_parities(folder / f"data-{i}.jsonl", i)
        for name in options.method or RUNS:
            row = torture(folder, name, options.kills, options.seed)
            lost += row["lost"]
            print(f"{name:22} {row['kills']:4d} kills in {row['runs']} runs, lost {row['lost']}  ({row['seconds']:.0f} s)  "
                  + ", ".join(f"{phase} {n}" for phase, n in row["phases"].most_common()), flush=True)
            record("bench_kill.jsonl", seed=options.seed, **row)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
