"""
What worked examples are worth to a model whose weights stand still: how many there are, with their working or their answers alone, and
which of those drawn fill a token limit, in random order, the shortest first or those of the shortest answers first; with or without
lessons. In each condition `--draws` contexts of training problems with their reference solutions; under each the same held-out problems,
one sampled answer and one greedy, and the log-prob a token of their reference solutions. One row per condition goes to
results/bench_examples.jsonl.

    FST_DATA=... python bench/examples.py --task arithmetic gsm8k
"""
import argparse
import random
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from fst import score_all
from model import load
from reflect import answer_alone, fill, with_lessons
from rollout import Context, Example, Sampler, examine, get_task
from sampler import record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["arithmetic", "gsm8k"])
    parser.add_argument("--numbers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 24], help="of examples, without a limit on tokens")
    parser.add_argument("--limits", type=int, nargs="*", default=[320, 640, 1024], help="in tokens of a context")
    parser.add_argument("--orders", nargs="+", choices=["random", "shortest", "concise"], default=["random", "shortest"],
                        help="in which a limit is filled; concise: the shortest answers first, whatever the question's length")
    parser.add_argument("--drawn", type=int, nargs="*", default=[16, 48], help="examples of which those that fit are taken")
    parser.add_argument("--wordings", nargs="+", choices=["whole", "brief"], default=["whole"], help="brief: the answers alone")
    parser.add_argument("--lessons", nargs="*", default=[], help="lines that follow the seed prompt")
    parser.add_argument("--draws", type=int, default=8, help="contexts in a condition")
    parser.add_argument("--problems", type=int, default=96, help="held-out problems that each is asked")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="limit of an answer; of arithmetic 32")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = load(options.model, "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype))
    sampler, count = Sampler(model, tokenizer), lambda context: len(context.prompt(tokenizer))
    conditions = [(number, None, "random") for number in options.numbers]
    conditions += [(drawn, limit, order) for limit in options.limits for drawn in options.drawn for order in options.orders]
    conditions = [(*condition, wording) for condition in conditions for wording in options.wordings]
    for name in options.task:
        task = get_task(name)
        system = with_lessons(task.seed_prompt, options.lessons)
        problems = random.Random("examples").sample(task.problems("val"), options.problems)
        most = 32 if name == "arithmetic" else options.max_new_tokens
        room = model.config.context_length - most - max(len(tokenizer.encode(p.question)) for p in problems)
        for drawn, limit, order, wording in conditions:
            start, contexts = time.perf_counter(), []
            for draw in range(options.draws):             # the same draws in all orders and wordings
                rng = random.Random(f"{drawn} {draw}")
                examples = [Example(p.question, p.solution) for p in rng.sample(task.problems("train"), drawn)]
                if wording == "brief":
                    examples = list(map(answer_alone, examples))
                if order != "random":
                    examples.sort(key=lambda e: len(e.question) * (order == "shortest") + len(e.answer))
                kept = fill(system, examples, count, min(limit or room, room)).examples
                contexts.append(Context(system, tuple(rng.sample(kept, len(kept)))))
            asked = examine(sampler, task, contexts, problems, 1, most)               # [contexts][problems][greedy, sampled]
            rows = [(c.prompt(tokenizer, p.question), tokenizer.turn(p.solution)) for c in contexts for p in problems]
            means = torch.stack([logprobs.mean() for logprobs in score_all(model, rows, 1.0, 4096)]).view(len(contexts), -1).mean(-1)
            share = lambda flag, kind: [sum(flag(answers[kind]) for answers in context) / len(context) for context in asked]
            row = {"task": task.name, "model": options.model, "dtype": options.dtype, "drawn": drawn, "limit": limit, "order": order,
                   "wording": wording, "lessons": options.lessons, "examples": [len(c.examples) for c in contexts],
                   "prompt_tokens": [count(c) for c in contexts], "known_logprob": means.tolist(), "problems": len(problems),
                   "max_new_tokens": most, "seconds": time.perf_counter() - start}
            for key, flag in (("right", lambda r: r.reward), ("in_form", lambda r: r.in_form)):
                row |= {f"greedy_{key}": share(flag, 0), key: share(flag, 1)}
            mean = lambda key: sum(row[key]) / len(row[key])
            print(f"{task.name:12} {limit or 'no limit':>8}  {order:8} of {drawn:2d}, {wording}: {mean('examples'):4.1f} examples  right, greedy and sampled, "
                  f"{mean('greedy_right'):5.1%} {mean('right'):5.1%}  in form {mean('greedy_in_form'):5.1%} {mean('in_form'):5.1%}  "
                  f"log-prob {mean('known_logprob'):.3f}  {row['seconds']:.0f} s", flush=True)
            record("bench_examples.jsonl", **row)


if __name__ == "__main__":
    main()
