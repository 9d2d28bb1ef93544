"""
Which data sets of reasoning-gym (pip install reasoning-gym) a model can begin to learn: under the seed prompt it solves next to none
of the held-out problems, under answers to random training problems, as earlier turns, some. One row per set goes to
results/bench_screen.jsonl; sets that cannot be made within --patience, have long questions, or no room for four examples are passed over.

    python bench/screen.py
"""
import argparse
import random
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from fewshot import few_shot
from model import load, refuse
from rollout import Context, Sampler, examine, get_task
from sampler import record


def too_slow(*_):
    raise TimeoutError("too slow to make")


def screen(name, sampler, options):
    """Accuracy and form on the held-out problems under the seed prompt and under random examples, as one row; ValueError where that is not to
    be had."""
    tokenizer = sampler.tokenizer
    signal.alarm(options.patience)
    task = get_task(f"rg:{name}")
    signal.alarm(0)
    problems = random.Random("screen").sample(task.problems("val"), options.problems)
    question = sum(len(tokenizer.encode(p.question)) for p in problems) / len(problems)
    refuse(question > options.question, f"questions of {question:.0f} tokens")
    few = few_shot(task, tokenizer, 0, 16, options.prompt_tokens, brief=True)
    refuse(len(few.examples) < 4, f"{len(few.examples)} examples fit {options.prompt_tokens} tokens")
    row = {"set": name, "question_tokens": question, "examples": len(few.examples)}
    for context, answers in zip(("seed", "few_shot"), examine(sampler, task, [Context(task.seed_prompt), few], problems, 1, options.max_new_tokens)):
        for key, flag in (("right", lambda r: r.reward), ("in_form", lambda r: r.in_form)):
            for i, kind in enumerate(("greedy", "sampled")):
                row[f"{context}_{kind}_{key}"] = sum(flag(a[i]) for a in answers) / len(answers)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="all where none is given")
    parser.add_argument("--problems", type=int, default=32, help="held-out problems")
    parser.add_argument("--question", type=int, default=100, help="most tokens of a question, on average")
    parser.add_argument("--prompt-tokens", type=int, default=320, help="limit of the few-shot prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="limit of an answer")
    parser.add_argument("--patience", type=int, default=20, help="seconds that a set may take to be made")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    from reasoning_gym.factory import DATASETS
    model, tokenizer = load(options.model, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    sampler = Sampler(model, tokenizer)
    signal.signal(signal.SIGALRM, too_slow)
    for name in options.sets or sorted(DATASETS):
        try:
            row = screen(name, sampler, options)
        except Exception as error:                        # whatever ails a set, the others are still to be looked at
            print(f"{name:26} passed over: {' '.join(str(error).split())[:90]}", flush=True)
            continue
        finally:
            signal.alarm(0)
        print(f"{name:26} {row['question_tokens']:4.0f} tokens, {row['examples']} examples; right, greedy and sampled: seed prompt "
              f"{row['seed_greedy_right']:4.0%} {row['seed_sampled_right']:4.0%}, few-shot {row['few_shot_greedy_right']:4.0%} {row['few_shot_sampled_right']:4.0%}", flush=True)
        record("bench_screen.jsonl", problems=options.problems, prompt_tokens=options.prompt_tokens, max_new_tokens=options.max_new_tokens,
               model=options.model, **row)


if __name__ == "__main__":
    main()
