"""
How well a few answers measure the KL of trained weights to the base: the mean over the tokens of k3 (Schulman), of the sampled tokens
alone, against the sum over the whole vocabulary at each of them, which fst.py reports. One sampled answer to each of 128 validation
problems under the run's best prompt, cut into parts of equal size: a good estimate is the same in each. A row for each run, estimate
and size goes to results/bench_drift.jsonl.

    python bench/drift.py runs/compare/star-drift/*-?
"""
import argparse
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
from rollout import Sampler, ask, divergence
from sampler import record


def estimates(run, rollouts, limit=1280):
    """Per rollout, [tokens] each: k3 of its tokens, and the exact KL where they were sampled."""
    rows = [(r.prompt, r.tokens) for r in rollouts]
    scored = (fst.score_all(model, rows, 1.0, limit) for model in (run.model, run.base))
    exact = fst.in_micro_batches(lambda part: divergence(run.model, run.base, part), rows, limit)
    return {"k3": [fst.kl_k3(*pair) for pair in zip(*scored)], "exact": exact}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of one task")
    parser.add_argument("--problems", type=int, default=128)
    options = parser.parse_args()
    for folder in options.runs:
        run, name = fst.open_folder(folder), "/".join(folder.resolve().parts[-2:])
        task, context = run.tasks[0], run.contexts(0)[0]
        problems = random.Random("drift").sample(task.problems("val"), options.problems)
        rollouts = ask(Sampler(run.model, run.tokenizer), task, [(context, p) for p in problems], run.config.max_new_tokens)
        for estimate, parts in estimates(run, rollouts).items():
            for size in (16, 32, options.problems):
                means = [torch.cat(parts[i:i + size]).mean().item() for i in range(0, len(parts), size)]
                print(f"{name:24} {estimate:6} {size:4d} answers: {min(means):.4f} to {max(means):.4f}", flush=True)
                record("bench_drift.jsonl", run=name, estimate=estimate, answers=size, means=means)


if __name__ == "__main__":
    main()
