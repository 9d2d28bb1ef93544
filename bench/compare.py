"""
Methods side by side over several seeds, each run a process of its own, one after another or a few at a time. What is not known here
is a flag of fst.py, the same for all runs. A run works in runs/compare/NAME/METHOD-SEED, its output beside it in METHOD-SEED.log; when
it is finished its config.json, metrics.jsonl and prompts.jsonl (of generated tasks: prompts may quote other people's data) are copied
to results/NAME/METHOD-SEED, with made.json: command, commit, date, machine. The same command given again resumes what was cut and passes over what is finished. NAME is the task's
unless --name gives another.

    python bench/compare.py arithmetic --methods fst rl gepa --seeds 0 1 2 --steps 24 --eval-every 2
"""
import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from rollout import TASKS, Generated
from sampler import provenance

GENERATED = {name for name, task in TASKS.items() if issubclass(task, Generated)}
running, stopping = set(), threading.Event()


def one(name, method, seed, task, flags, change, environment):
    """One run to its end -> fst.py's exit status, or None where it was not started."""
    if stopping.is_set():
        return None
    label, start = f"{name}/{method}-{seed}", time.perf_counter()
    folder = Path("runs/compare", name, f"{method}-{seed}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    program = [ROOT / "bench" / "ablate.py", change] if change else [ROOT / "fst.py"]
    command = [sys.executable, *map(str, program), "--task", task, "--method", method, "--seed", str(seed), "--out", str(folder), *flags]
    with open(folder.parent / f"{folder.name}.log", "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
        running.add(process)
        print(f"{label}: started, see {log.name}", flush=True)
        status = process.wait()
        running.discard(process)
    if status == 0:
        kept = ROOT / "results" / name / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        files = "config.json", "metrics.jsonl", *["prompts.jsonl"] * (set(task.split(",")) <= GENERATED)
        if not all((kept / file).exists() and filecmp.cmp(folder / file, kept / file, shallow=False) for file in files):
            for file in files:                            # of what is here already the command that made it stays
                shutil.copyfile(folder / file, kept / file)
            (kept / "made.json").write_text(json.dumps(provenance(environment.get("OMP_NUM_THREADS"))) + "\n")
    what = "finished" if status == 0 else f"ended with status {status}, not copied"
    print(f"{label}: {what} after {time.perf_counter() - start:.0f} s", flush=True)
    return status


def stop(number, _):
    """Ctrl-C or a termination: no new run is started, and those at work save after their phase; Ctrl-C twice stops them at once."""
    stopping.set()
    for process in list(running):
        if number == signal.SIGTERM:                      # Ctrl-C reaches them by itself
            process.send_signal(signal.SIGINT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("task")
    parser.add_argument("--methods", nargs="+", default=["fst", "rl", "gepa"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", help="of the folder of results; the task's where not given")
    parser.add_argument("--change", help="one of bench/ablate.py's; the folder's name ends in it")
    parser.add_argument("--threads", type=int, help="CPU threads of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options, flags = parser.parse_known_args()
    for flag in flags:
        if flag.split("=")[0] in ("--task", "--method", "--seed", "--out", "--overwrite"):
            parser.error(f"{flag} is this command's own to give")
    if sys.argv[1] != options.task:
        parser.error("the task comes first")
    name = options.name or options.task.translate(str.maketrans(":/,", "--+"))
    if options.change and not name.endswith(f"-{options.change}"):            # else runs with and without it would resume each other
        name += f"-{options.change}"
    environment = os.environ | ({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(options.jobs) as pool:        # seed by seed, so that all methods have their first seed early
        runs = [pool.submit(one, name, method, seed, options.task, flags, options.change, environment) for seed in options.seeds for method in options.methods]
        statuses = [run.result() for run in runs]
    print(f"{statuses.count(0)} of {len(statuses)} runs are finished")
    return 0 if set(statuses) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
