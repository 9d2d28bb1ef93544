"""
What each operator of the prompt evolution yields, and what ranking its drafts by likelihood is worth. A real fast phase evolves K prompts
on one batch of problems; the search of the next batch, with the model's own callables, then proposes children of two parents, the seed
prompt and the best evolved one, by one operator at a time. Its drafts are not selected: every
child, whatever its likelihood and without a gate, is asked the same held-out problems, one sampled answer each, and so is its parent,
four times. Worked examples, the operator with most choice, get more children, which are also asked their anchors: the reward there is
the likelihood's rival, at a rollout a problem. From these any best of n is computed afterwards (results/tables.py, `proposals`).
One row per (task, seed, parent, operator) goes to results/bench_operators.jsonl.

    FST_DATA=... python bench/operators.py --task arithmetic
"""
import argparse
import contextlib
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
import reflect
from rollout import Generated, ask
from sampler import record

PARENT = "parent"         # the rows of the parents themselves, whose children are repetitions of them
REPEATS = 4               # of a parent's answers: how much its accuracy varies shows what a child's may be by chance
QUOTES = 6                # raw rewrites kept in a row


@contextlib.contextmanager
def passing_run(**flags):
    """A Run in a folder that goes with it; where no flag says otherwise of the fast channel alone, in cycles of one slow step, whose
    batch is all anchors. flags: fst.py's, None where its own default is meant."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"method": "gepa", "cycle": 1, "out": folder} | {key: value for key, value in flags.items() if value is not None}
        config, *_ = fst.parse([f"{fst.flag(key)}={value}" for key, value in flags.items()])
        resolved, lock = fst.open_run(config, False)
        with lock:
            yield fst.Run(resolved)


def search_of(run, cycle):
    """The Search that Run.fast begins in this cycle, with exactly the callables and settings that it gives to `evolve`, but for the
    budget; the seed prompt and the kept ones are carried, and measured on all anchors."""
    population = reflect.Population(list(dict.fromkeys([run.tasks[0].seed_context, *run.population.contexts])))
    with mock.patch.object(reflect, "evolve", return_value=([], 0)) as evolve:
        run.fast(0, cycle)
    (_, *arguments), settings = evolve.call_args
    del settings["keep"]
    search = reflect.Search(population, *arguments, **settings | {"budget": 10 ** 6})
    search.measure_carried()
    return search


def propose(search, operator, parent, count, width=4):
    """`count` proposals by one operator, as a round makes them, `width` for each fresh minibatch of the parent -> children, and why the
    others are none, and what was written."""
    search.population.operators = {name: [1.0, 1.0] for name in reflect.OPERATORS}        # none has a first chance left
    search.draw_operator = lambda *_: operator
    known, children = len(search.candidates), []
    for start in range(0, count, width):
        traces = {parent: search.spend([(parent, p) for p in search.minibatch(parent)])}
        children += [child for child, _ in search.propose([parent], traces, min(width, count - start))]
    rejected = [c for c in search.candidates[known:] if c.verdict == "rejected"]
    why = Counter(re.sub(r": \d+ tokens.*", "", c.reason) for c in rejected)
    why["nothing new, or too long"] = count - len(children) - len(rejected)
    return children, dict(+why), [(c.context.system, c.reason or "a prompt") for c in children + rejected]


def held_out(run, contexts, problems, seed):
    """One sampled answer to each problem under each context -> per context, whether it was right and whether in the asked form, a digit
    per problem."""
    jobs = [(context, problem) for context in contexts for problem in problems]
    answers = iter(ask(run.sampler, run.tasks[0], jobs, run.config.max_new_tokens, 1.0, (run.config.seed, 0, 7, seed)))
    rows = [[next(answers) for _ in problems] for _ in contexts]
    digits = lambda flag: ["".join(str(int(flag(r))) for r in row) for row in rows]
    return {"right": digits(lambda r: r.reward), "in_form": digits(lambda r: r.in_form)}


def study(run, seed, options):
    run.fast(0, 0)
    search, task = search_of(run, 1), run.tasks[0]
    if len(search.candidates) < 2:
        raise SystemExit(f"{task.name}, seed {seed}: the first fast phase kept the seed prompt alone; try more --passes")
    problems = random.Random("operators").sample(task.problems("val"), options.problems)
    parents = dict(zip(("seed", "evolved"), search.candidates))
    for number, (name, operator) in enumerate((name, operator) for name in parents for operator in (PARENT, *reflect.OPERATORS)):
        start, parent, anchors, why, replies = time.perf_counter(), parents[name], [], {}, []
        tried = {PARENT: REPEATS, "example": options.drafts}.get(operator, options.children)
        children = [parent] * tried
        if operator != PARENT:
            children, why, replies = propose(search, operator, parent, tried)
        if operator == "example" and options.rival:       # a child is not asked the problems of its own examples
            search.measure(children, search.anchors[:options.rival])
            anchors = [round(child.mean(search.step), 4) for child in children]
        row = held_out(run, [child.context for child in children], problems, number)
        share = lambda key: "".join(row[key]).count("1") / max(1, len(problems) * len(children))
        print(f"{task.name:12} seed {seed}  {name:8} {operator:8} {len(children):3d} of {tried:3d}  right {share('right'):6.1%}  "
              f"in form {share('in_form'):6.1%}  {time.perf_counter() - start:5.0f} s  {why}", flush=True)
        record("bench_operators.jsonl", task=task.name, seed=seed, parent=name, operator=operator, model=run.config.model,
               dtype=run.config.dtype, anchors=len(search.anchors), probes=len(search.probes), problems=len(problems),
               max_new_tokens=run.config.max_new_tokens, tried=tried, why=why, **row, anchor_reward=anchors,
               likelihood=[round(reflect.average(search.probe_logprobs[child.context]), 4) for child in children],
               prompt_tokens=[search.count_tokens(child.context) for child in children], examples=[len(child.context.examples) for child in children],
               seconds=time.perf_counter() - start,       # of a task with data of its own nothing is quoted: a reply may hold it
               replies=replies[:QUOTES] if operator == "rewrite" and isinstance(task, Generated) else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["arithmetic", "gsm8k"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--anchors", type=int, default=48, help="problems of the search")
    parser.add_argument("--passes", type=float, default=5.0, help="rollouts of the fast phase that finds the evolved parent, in passes over as many")
    parser.add_argument("--children", type=int, default=12, help="proposals of an operator under a parent")
    parser.add_argument("--drafts", type=int, default=32, help="of worked examples")
    parser.add_argument("--rival", type=int, default=48, help="anchors that each draft of worked examples is asked; 0: none")
    parser.add_argument("--problems", type=int, default=64, help="held-out problems that each child is asked")
    parser.add_argument("--prompt-tokens", type=int, help="longest prompt; arithmetic: 320, as in a whole run")
    parser.add_argument("--max-new-tokens", type=int, help="limit of an answer; by task")
    options = parser.parse_args()
    for task in options.task:
        for seed in options.seed:
            length = options.prompt_tokens or (320 if task == "arithmetic" else None)
            with passing_run(task=task, seed=seed, model=options.model, batch=options.anchors, steps=2, passes=options.passes,
                             prompt_tokens=length, max_new_tokens=options.max_new_tokens) as run:
                study(run, seed, options)


if __name__ == "__main__":
    main()
