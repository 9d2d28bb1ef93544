"""
What training on one task did to others: accuracy of runs' base and trained weights on tasks that they never saw, or have left, under
worked examples that nobody evolved, the same for all, or under given prompts; and how far the trained weights moved there, as KL to the
base on their own answers. Intervals are Wilson's over problems. One row per (run, task) goes to results/bench_forgetting.jsonl, and one
per task for the base.

    python bench/forgetting.py runs/compare/arithmetic/*-0
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
from model import load
from rollout import Context, Example, Sampler, examine, get_task, read_context
from sampler import record


def measure(model, base, tokenizer, task, prompt, options):
    draw = random.Random(f"forgetting {task.name}")
    shown = draw.sample(task.problems("train"), options.examples)
    context = Context(task.seed_prompt, tuple(Example(p.question, p.solution) for p in shown))
    context = read_context(prompt.read_text(encoding="utf-8")) if prompt else context
    problems = draw.sample(task.problems("val"), options.problems)
    answers, = examine(Sampler(model, tokenizer), task, [context], problems, 1, options.max_new_tokens)
    right = [sum(r[i].reward for r in answers) for i in (0, 1)]
    return {"greedy": right[0] / len(problems), "greedy_interval": fst.wilson(right[0], len(problems)),
            "sampled": right[1] / len(problems), "sampled_interval": fst.wilson(right[1], len(problems)),
            "kl_base": fst.drift(model, base, [r for _, r in answers[::2]], 1280)}         # a sampled answer to every second problem


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of one model")
    parser.add_argument("--tasks", nargs="+", default=["star", "codeio"])
    parser.add_argument("--prompts", nargs="+", type=Path, help="files as of --seed-prompt, one for each of the tasks, instead of drawn examples")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    prompts = options.prompts or [None] * len(options.tasks)
    if len(prompts) != len(options.tasks):
        parser.error("--prompts takes a file for each of the tasks")
    config = json.loads((options.runs[0] / "config.json").read_text(encoding="utf-8"))["resolved"]
    device, dtype = config["device"], getattr(torch, config["dtype"])
    base, tokenizer = load(config["model"], device, dtype)
    for run in [None, *options.runs]:
        model = load(str(run / "checkpoint"), device, dtype)[0] if run else base
        name = "/".join(run.resolve().parts[-2:]) if run else "base"
        for task, prompt in zip(map(get_task, options.tasks), prompts):
            row = measure(model, base, tokenizer, task, prompt, options)
            print(f"{name:36} {task.name:8} greedy {row['greedy']:6.1%}  sampled {row['sampled']:6.1%}  KL to base {row['kl_base']:.4f}", flush=True)
            shown = {"prompt": prompt.name} if prompt else {"examples": options.examples}
            record("bench_forgetting.jsonl", run=name, task=task.name, problems=options.problems, **shown, **row)


if __name__ == "__main__":
    main()
