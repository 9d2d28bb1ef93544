"""
What must not grow and what may round. 300 slow steps of Fast-Slow Training of a tiny random model, a fast phase
before every sixth: memory, seconds of a step, sizes of the files, mismatch between sampler and trainer. Then, of
SmolLM2-135M in fp32 and bf16: that mismatch, and what another number of threads, other slots or other neighbours change
in sampled rows. Prints and appends to results/bench_long.jsonl one row per measurement.

    python bench/long.py                   both parts
    python bench/long.py --steps 0         the second alone;  --problems 0: the first alone
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # a bench of the CPU, whatever else is here

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
import rollout
from model import load
from rollout import Context, Sampler, get_task
from sampler import record
from test_fst import TINY, parity, write_checkpoint, write_parities


def resident():
    """MB of this process's memory that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def sizes(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def long_run(folder, steps, cycle):
    """Runs it: per step its CPU seconds and the memory behind it, per cycle the files' sizes; and the steps' rows."""
    write_checkpoint(folder / "model", "qwen3")
    config, *_ = fst.parse([
        "--task", f"jsonl:{write_parities(folder / 'data.jsonl')}", "--model", str(folder / "model"), "--out", str(folder / "run"), *TINY,
        *f"--steps {steps} --cycle {cycle} --lr 1e-4 --passes 2 --eval-every 0 --prompt-tokens 120".split()])
    run, seconds, memory, files = fst.Run(fst.open_run(config, False)[0]), [], [], []
    slow, after, grade = run.slow, run.after, rollout.extract_answer

    def timed(*a):
        start = time.process_time()
        row = slow(*a)
        seconds.append(time.process_time() - start)
        memory.append(resident())
        return row

    def counted(kind, task):
        after(kind, task)
        if kind == "slow" and run.steps_done() % cycle == 0:
            files.append(sizes(run.folder))

    run.slow, run.after = timed, counted
    rollout.extract_answer = parity
    try:
        run.go()
    finally:
        rollout.extract_answer = grade
    return seconds, memory, files, [row for row in fst.read_rows(run.folder / "metrics.jsonl") if row["kind"] == "step"]


def first_and_last(values):
    """Medians of the first and of the last third, without the first tenth, which allocates everything anew."""
    values = values[len(values) // 10:]
    third = len(values) // 3
    return float(np.median(values[:third])), float(np.median(values[-third:]))


def growth(folder, steps):
    cycle = 6
    seconds, memory, files, rows = long_run(folder, steps, cycle)
    journals = {name: (files[-1][name] - files[0][name]) / (len(files) - 1) for name in fst.Run.JOURNALS}
    fixed = {name: (files[0][name], files[-1][name])
             for name in ("state/state.safetensors", "checkpoint/model.safetensors", "checkpoint/prompts.json")}
    mismatch = [row["kl_sampler"] for row in rows if "kl_sampler" in row]
    cycles = memory[cycle - 1::cycle]
    row = {"kind": "long run", "steps": steps, "fast_phases": len(files), "seed": 0,
           "step_cpu_seconds": first_and_last(seconds), "memory_mb": first_and_last(memory),
           "memory_mb_after_first_cycle": cycles[0], "memory_mb_at_the_end": memory[-1], "memory_mb_by_cycle": cycles,
           "journal_bytes_per_cycle": journals, "file_bytes_first_and_last": fixed,
           "kl_sampler": first_and_last(mismatch), "kl_sampler_largest": max(mismatch)}
    print(json.dumps(row, indent=1), flush=True)
    record("bench_long.jsonl", **row)


def apart(others, rows):
    """Rows of other tokens, and the largest difference of log-probs in those of the same."""
    same = [(a, b) for a, b in zip(rows, others) if a.tokens == b.tokens]
    return {"rows": len(rows), "changed": len(rows) - len(same),
            "largest_difference": max((abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs)), default=0)}


def rounding(name, dtype, problems, limit=24):
    """Sampled once at one thread, 64 slots, all rows; trained on; sampled again otherwise."""
    torch.set_num_threads(1)
    model, tokenizer = load(name, dtype=dtype)
    model.requires_grad_(False)
    task = get_task("arithmetic")
    prompts = [Context(task.seed_prompt).prompt(tokenizer, p.question)
               for p in task.problems("train")[:problems] for _ in range(4)]
    draw = lambda prompts, slots=64: Sampler(model, tokenizer, slots).generate(prompts, limit, 1.0, 0)
    about = {"model": name, "dtype": str(dtype).removeprefix("torch."), "seed": 0}
    rows = draw(prompts)
    logprobs = torch.cat(fst.score_all(model, [(p, r.tokens) for p, r in zip(prompts, rows)], 1.0, 1024))
    recorded = torch.tensor([x for r in rows for x in r.logprobs])
    difference = logprobs.double() - recorded.double()
    out = [{"kind": "mismatch", **about, "tokens": len(difference), "mean": difference.mean().item(),
            "mean_absolute": difference.abs().mean().item(), "largest": difference.abs().max().item(),
            "kl": fst.kl_k3(recorded, logprobs).mean().item()}]
    half = [i for i in range(len(prompts)) if i // 4 % 2]                 # all four samples of every second problem
    changes = {"8 slots": (draw(prompts, 8), rows),
               "half of the neighbours": (draw([prompts[i] for i in half]), [rows[i] for i in half])}
    torch.set_num_threads(2)
    changes["2 threads"] = draw(prompts), rows
    torch.set_num_threads(1)
    out += [{"kind": "determinism", **about, "change": change, "new_tokens": limit, **apart(*pair)}
            for change, pair in changes.items()]
    for row in out:
        print(json.dumps(row), flush=True)
        record("bench_long.jsonl", **row)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--problems", type=int, default=32, help="of the second part, four rows each")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            growth(Path(folder), options.steps)
    if options.problems:
        for dtype in (torch.float32, torch.bfloat16):
            rounding(options.model, dtype, options.problems)


if __name__ == "__main__":
    main()
