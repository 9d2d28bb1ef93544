"""
A few-shot prompt without any search, for --seed-prompt: the reference solutions of 16 training problems drawn at random, as many as
fit. What the fast channel has to beat, for it reads the same solutions.

    python bench/fewshot.py arithmetic --seed 0 > fewshot.json
    python fst.py --method rl --seed-prompt fewshot.json
"""
import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from model import load
from reflect import answer_alone, fill
from rollout import Example, get_task


def few_shot(task, tokenizer, seed, drawn, limit, brief):
    """The Context of as many of `drawn` reference solutions as fit `limit` tokens; brief: their answers alone."""
    problems = random.Random(f"few-shot {seed}").sample(task.problems("train"), drawn)
    examples = [Example(p.question, p.solution) for p in problems]
    examples = [answer_alone(e) for e in examples] if brief else examples
    return fill(task.seed_prompt, examples, lambda context: len(context.prompt(tokenizer)), limit)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--level", type=int, default=1, help="of the task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn", type=int, default=16, help="solutions")
    parser.add_argument("--prompt-tokens", type=int, default=320, help="limit of the prompt")
    parser.add_argument("--brief", action="store_true", help="the answers alone, without their working")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer counts")
    options = parser.parse_args()
    task, (_, tokenizer) = get_task(options.task, options.level), load(options.model)
    context = few_shot(task, tokenizer, options.seed, options.drawn, options.prompt_tokens, options.brief)
    print(json.dumps(dataclasses.asdict(context), indent=1))


if __name__ == "__main__":
    main()
