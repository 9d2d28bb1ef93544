"""
How well a few answers measure the KL of trained weights to the base: the mean over the tokens of k3 (Schulman), of the sampled tokens
alone, against the sum over the whole vocabulary at each of them, which fst.py reports. One sampled answer to each of 128 validation
problems under the run's best prompt, cut into parts of equal size: a good estimate is the same in each. A row for each run, estimate
and size goes to results/bench_drift.jsonl.

    python bench/drift.py runs/compare/star-drift/*-?
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst                                                                # noqa: E402
from model import load                                                    # noqa: E402
from reflect import Population                                            # noqa: E402
from rollout import Context, Sampler, ask, divergence, get_task          # noqa: E402
from sampler import record                                                # noqa: E402


@torch.no_grad()
def estimates(model, base, rollouts, limit=1280):
    """Per rollout, [tokens] each: k3 of its tokens, and the exact KL where they were sampled."""
    rows = [(r.prompt, r.tokens) for r in rollouts]
    exact = [None] * len(rows)
    for batch in fst.micro_batches(rows, limit):
        parts = divergence(model, base, [rows[i] for i in batch]).split([len(rows[i][1]) for i in batch])
        for i, part in zip(batch, parts):
            exact[i] = part
    scored = (fst.score_all(m, rows, 1.0, limit) for m in (model, base))
    return {"k3": [fst.kl_k3(*pair) for pair in zip(*scored)], "exact": exact}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of one task")
    parser.add_argument("--problems", type=int, default=128)
    options = parser.parse_args()
    for run in options.runs:
        _, c = fst.stored_config(run)
        model, tokenizer = load(str(run / "checkpoint"), c.device, getattr(torch, c.dtype))
        base, _ = load(c.model, c.device, getattr(torch, c.dtype))
        task = get_task(c.task, c.level, c.data or None, c.seed_prompt or None)
        population = Population.from_json(json.loads((run / "checkpoint" / "prompts.json").read_text(encoding="utf-8")))
        context = Context(task.seed_prompt) if c.method == "rl" else population.contexts[0]
        problems = random.Random("drift").sample(task.problems("val"), options.problems)
        rollouts = ask(Sampler(model, tokenizer), task, [(context, p) for p in problems], c.max_new_tokens)
        for name, parts in estimates(model, base, rollouts).items():
            for size in (16, 32, options.problems):
                means = [torch.cat(parts[i:i + size]).mean().item() for i in range(0, len(parts), size)]
                print(f"{'/'.join(run.resolve().parts[-2:]):24} {name:6} {size:4d} answers: {min(means):.4f} to {max(means):.4f}", flush=True)
                record("bench_drift.jsonl", run="/".join(run.resolve().parts[-2:]), estimate=name, answers=size, means=means)


if __name__ == "__main__":
    main()
