"""
Our prompt evolution and that of the `gepa` package (arXiv 2507.19457), with all else equal: one frozen model behind our sampler is
the task model and the reflector of both; the same anchors, seed prompt, grader, feedback (with the reference solution), limit of
the reflector's reply, and budget of task rollouts. The package runs with its own defaults: its reflection prompt, minibatches of 3,
all anchors as its validation set, the system text as the one component. It ends the iteration that it is in when the budget
runs out, so it may spend a little more; ours never does. The best prompt of each is then asked held-out problems that neither saw.
One row per (task, system, seed) goes to results/bench_gepa.jsonl.

    pip install gepa; FST_DATA=... python bench/gepa_peer.py --seed 0 1 2
"""
import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
from operators import passing_run
from rollout import Context, Generated, ask, examine
from sampler import record

COMPONENT = "system_prompt"


class Adapter:
    """gepa's GEPAAdapter over our `ask`. A candidate is {COMPONENT: system text}, a batch a list of problems."""
    propose_new_texts = None                              # the package's own proposer

    def __init__(self, run):
        self.run, self.calls, self.rollouts, self.tokens = run, 0, 0, 0

    def batch_evaluate(self, items):
        """[(candidate, problems)] -> an EvaluationBatch each; all rollouts in one batch, sampled at the training temperature."""
        from gepa import EvaluationBatch
        c = self.run.config
        jobs = [(Context(candidate[COMPONENT]), problem) for candidate, problems in items for problem in problems]
        self.calls += 1                                   # every call draws anew
        rollouts = ask(self.run.sampler, self.run.tasks[0], jobs, c.max_new_tokens, c.temperature, (c.seed, 0, 5, self.calls))
        self.rollouts += len(rollouts)
        self.tokens += sum(len(r.tokens) for r in rollouts)
        rest, out = iter(rollouts), []
        for _, problems in items:
            mine = [next(rest) for _ in problems]
            out.append(EvaluationBatch(outputs=[r.text for r in mine], scores=[r.reward for r in mine], trajectories=mine))
        return out

    def evaluate(self, batch, candidate, capture_traces=False):
        return self.batch_evaluate([(candidate, batch)])[0]

    def make_reflective_dataset(self, candidate, eval_batch, components_to_update):
        rows = [{"Inputs": r.problem.question, "Generated Outputs": r.text, "Feedback": r.feedback} for r in eval_batch.trajectories]
        return {name: rows for name in components_to_update}

    def reflect(self, prompt):
        """gepa's reflection_lm: text -> text, at temperature 1; a prompt too long for the model loses its beginning, as ours does."""
        c, tokenizer = self.run.config, self.run.tokenizer
        self.calls += 1
        ids = tokenizer.chat([{"role": "user", "content": prompt}])[-(self.run.model.config.context_length - c.reflection_tokens):]
        reply, = self.run.sampler.generate([ids], c.reflection_tokens, 1.0, (c.seed, 0, 6, self.calls))
        self.tokens += len(reply.tokens)
        return tokenizer.decode(reply.answer)

    def log(self, message):
        """gepa's logger: silent."""


def with_ours(run):
    """All the run's fast phases: the best prompt, and what it took."""
    rows = [run.fast(0, cycle) for cycle in range(run.config.steps)]
    return run.population.contexts[0], {"rollouts": run.spent["fast_rollouts"], "tokens": run.spent["fast_tokens"],
                                        "accepted": sum(row["accepted"] for row in rows), "anchors_best": rows[-1]["best"]}


def with_gepa(run):
    """gepa.optimize over the anchors of all cycles, with the budget of all cycles."""
    import gepa
    c, adapter, seed_context = run.config, Adapter(run), run.tasks[0].seed_context
    if seed_context.examples:
        raise ValueError("the package evolves a system text: give a --seed-prompt without examples")
    anchors = [problem for step in range(c.steps) for problem in run.batch(0, step)]
    result = gepa.optimize({COMPONENT: seed_context.system}, anchors, adapter=adapter, reflection_lm=adapter.reflect,
                           max_metric_calls=int(c.passes * c.batch) * c.steps, seed=c.seed, logger=adapter)
    assert adapter.rollouts == result.total_metric_calls, "both must count the same rollouts"
    return Context(result.best_candidate[COMPONENT]), {
        "rollouts": adapter.rollouts, "tokens": adapter.tokens, "accepted": result.num_candidates - 1,
        "anchors_best": max(result.val_aggregate_scores), "gepa": version("gepa")}


SYSTEMS = {"ours": with_ours, "gepa": with_gepa, "seed": lambda run: (run.tasks[0].seed_context, {"rollouts": 0})}


def held_out(run, context, split, count):
    """Accuracy, and share of answers in the asked format, on `count` problems of the split, the same for every system and seed.
    Intervals are Wilson's over problems; the sampled answers to one count as one observation, which errs on the wide side."""
    c, out = run.config, {}
    problems = run.held_out(0, split, count)
    answers, = examine(run.sampler, run.tasks[0], [context], problems, c.eval_samples, c.max_new_tokens, (c.seed, 0, fst.EVALUATE))
    for name, rollouts in (("greedy", [row[0] for row in answers]), ("sampled", [r for row in answers for r in row[1:]])):
        formatted = [r.in_form for r in rollouts]
        for key, values in ((name, [r.reward for r in rollouts]), (f"{name}_format", formatted)):
            out[key] = sum(values) / len(values)
            out[f"{key}_interval"] = fst.wilson(out[key] * len(problems), len(problems))
    right = "".join(f"{row[0].reward:.0f}" for row in answers)              # of the greedy answers, a digit per problem
    return {"problems": len(problems), "samples": c.eval_samples, **out, "right": right}


def measure(task, name, seed, options):
    with passing_run(task=task, seed=seed, model=options.model, batch=options.anchors, steps=options.cycles,
                     passes=options.rollouts / options.anchors, eval_samples=options.eval_samples,
                     max_new_tokens=options.max_new_tokens, seed_prompt=options.seed_prompt) as run:
        start = time.perf_counter()
        context, spent = SYSTEMS[name](run)
        seconds = time.perf_counter() - start
        row = held_out(run, context, options.split, options.eval_problems)
    resolved = run.config
    print(f"{task:12} seed {seed}  {name:5} {spent['rollouts']:5d} rollouts {seconds:6.0f} s   greedy {row['greedy']:6.1%}  "
          f"sampled {row['sampled']:6.1%}  format {row['greedy_format']:6.1%} / {row['sampled_format']:6.1%}", flush=True)
    record("bench_gepa.jsonl", task=task, system=name, seed=seed, model=resolved.model, dtype=resolved.dtype, anchors=options.anchors,
           cycles=options.cycles, split=options.split, budget=int(resolved.passes * resolved.batch) * resolved.steps, max_new_tokens=resolved.max_new_tokens,
           reflection_tokens=resolved.reflection_tokens, seconds=seconds, **spent, **row,
           prompt=context.system if isinstance(run.tasks[0], Generated) else "not kept: it may quote the data",
           prompt_tokens=run.count_tokens(context), examples=len(context.examples))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["arithmetic", "gsm8k"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed-prompt", default="", help="a text or a file; empty: the task's own")
    parser.add_argument("--cycles", type=int, default=1, help="fast phases of ours; the package gets all their anchors and rollouts at once")
    parser.add_argument("--anchors", type=int, default=48, help="problems in a cycle")
    parser.add_argument("--rollouts", type=int, default=240, help="budget of a cycle, in task rollouts")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="where the held-out problems are from")
    parser.add_argument("--eval-problems", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, help="limit of an answer; by task")
    options = parser.parse_args()
    for task in options.task:
        for seed in options.seed:
            for name in options.systems:
                measure(task, name, seed, options)


if __name__ == "__main__":
    main()
