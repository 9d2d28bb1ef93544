"""
Draws every figure of this folder anew from its rows, and writes its tables; numpy and matplotlib, no model and no network.

    python results/figures.py                             (or another folder of the same layout)

A group is one comparison, results/GROUP/METHOD-SEED/metrics.jsonl, or a single run, results/GROUP/metrics.jsonl. It gets curves.png and
table.md; groups that differ in one thing come side by side in side_by_side.md, README's lines in overview.png. bench_growth.jsonl gets
growth.png, bench_gepa.jsonl bench_gepa.md, bench_operators.jsonl bench_operators.md. Accuracies are shares of problems, 0 to 1; entropy
and KL are in nats a token; seconds are those of the two kinds of phase, without the evaluations'.
"""
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from tables import METHODS, evals, in_step, peers, proposals, read, runs_of, side_by_side, table


# ---------------------------------------------------------------------------------------------------------------------
# Curves

OVERVIEW = {    # what the data give -> lines of README's figure: (group, method, colour and style, label)
    "arithmetic, reference solutions given": [
        ("arithmetic", "fst", "C0-", "fst"), ("arithmetic", "rl", "C1-", "rl"),
        ("arithmetic-fewshot", "fst", "C0--", "fst, six random solutions in its seed prompt"),
        ("arithmetic-fewshot", "rl", "C1--", "rl, six random solutions in its prompt")],
    "arithmetic, only answers given": [
        ("arithmetic-no-solutions", "fst", "C0-", "fst"), ("arithmetic-36-no-solutions", "fst", "C0--", "fst, 36 smaller steps"),
        ("arithmetic-form-no-solutions", "rl", "C1-", "rl, a prompt that asks for the form"),
        ("arithmetic-fewshot-no-solutions", "rl", "C1--", "rl, seven or eight random answers in its prompt"),
        ("arithmetic-36-self-taught", "rl", "C2-", "fine-tuned on its own right answers, 36 smaller steps"),
        ("arithmetic-turns", "rl", "C1:", "rl, two worked examples written by hand")]}


def overview(results):
    """results/overview.png: sampled accuracy against rollouts, mean of the seeds, and between the lowest and the highest of them."""
    figure, axes = pyplot.subplots(1, len(OVERVIEW), figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (title, lines) in zip(axes, OVERVIEW.items()):
        for group, method, style, label in lines:
            if seeds := runs_of(results / group).get(method):
                whole = np.array([[(row["rollouts"], row["mean"]) for row in rows] for rows in in_step([*map(evals, seeds.values())])])
                (x, y), accuracies = whole.mean(0).T, whole[:, :, 1]                                   # [seeds, points]
                axis.plot(x, y, style, marker="o", markersize=4, label=label)
                axis.fill_between(x, accuracies.min(0), accuracies.max(0), color=style[:2], alpha=0.12)
        axis.set(title=title, xlabel="rollouts of both channels", ylim=(0, 1))
        axis.legend(fontsize=8, loc="upper left")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on validation problems, sampled")
    figure.savefig(results / "overview.png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def curves(group, runs):
    """results/GROUP/curves.png: single seeds thin, their mean thick, one colour per method, one style per task."""
    tasks = list(dict.fromkeys(row["task"] for seeds in runs.values() for rows in seeds.values() for row in rows))
    xs = {"step": "slow steps", "rollouts": "rollouts of both channels", "clock": "seconds of both channels", "kl_base": "KL to the base, nats a token"}
    ys = {"mean": "accuracy, sampled", "greedy": "accuracy, greedy"}
    panels = [(evals, x, y, xs[x], ys[y]) for y in ys for x in xs]
    panels += [(evals, "step", "seed_mean", xs["step"], "accuracy under the seed prompt, sampled")]
    panels += [(lambda rows: [row for row in rows if row["kind"] == "step"], "step", y, xs["step"], label) for y, label in
               (("reward", "reward of the training rollouts"), ("entropy", "entropy, nats a token"), ("length", "tokens of an answer"))]
    figure, axes = pyplot.subplots(3, 4, figsize=(19, 12), layout="constrained")
    for axis, (pick, x, y, xlabel, ylabel) in zip(axes.flat, panels):
        for (i, (method, seeds)), (k, task) in itertools.product(enumerate(runs.items()), enumerate(tasks)):
            colour = f"C{METHODS.index(method)}" if method in METHODS else f"C{len(METHODS) + i % 4}"
            found = [here for rows in seeds.values() if (here := [row for row in pick(rows) if x in row and row["task"] == task])]
            line = lambda rows: [(row[x], row.get(y, math.nan)) for row in rows]
            for rows in found:
                axis.plot(*zip(*line(rows)), color=colour, alpha=0.35, linewidth=0.8)
            if found:
                whole = np.array(list(map(line, in_step(found))))                                      # [seeds, points, (x, y)]
                mean, full = whole.mean(0), len(whole)
                axis.plot(*mean.T, "o" * (pick is evals) + ("-", "--", ":")[k % 3], color=colour, markersize=4,
                          label=method + f" on {task}" * (len(tasks) > 1) + f", mean of {full} of {len(found)} seeds")
        axis.set(xlabel=xlabel, ylabel=ylabel, **({"ylim": (0, 1)} if ylabel.startswith(("accuracy", "reward")) else {}))
        axis.grid(alpha=0.3)
    if axes[0, 0].lines:
        axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{group.name}: validation problems")
    figure.savefig(group / "curves.png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def growth(path):
    """Seconds of the sampler against rows, prompt and new tokens, the other two held at what most rows have."""
    rows, figure, axes = read(path), *pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    names = {"rows": "rows", "prompt": "tokens of the prompt", "new_tokens": "new tokens"}
    most = {name: max(values := [row[name] for row in rows], key=values.count) for name in names}
    for axis, name in zip(axes, names):
        for machine in dict.fromkeys(row["machine"] for row in rows):
            points = {row[name]: row["seconds"] for row in rows if row["machine"] == machine and all(row[k] == most[k] for k in names if k != name)}
            axis.loglog(sorted(points), [points[x] for x in sorted(points)], "o-", label=machine)      # the latest of equal rows
        held = ", ".join(f"{most[k]} {names[k]}" for k in names if k != name)
        axis.set(xlabel=names[name], ylabel="seconds", title=held)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(path.parent / "growth.png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def main():
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    for group in sorted(path for path in results.iterdir() if path.is_dir()):
        if runs := runs_of(group):
            curves(group, runs)
            table(group, runs)
            print(f"{group.name}: " + ", ".join(f"{method} {len(seeds)}" for method, seeds in runs.items()))
    side_by_side(results)
    if all((results / group).is_dir() for lines in OVERVIEW.values() for group, *_ in lines):
        overview(results)
        print("overview")
    if (results / "bench_growth.jsonl").exists():
        growth(results / "bench_growth.jsonl")
        print("growth")
    if (results / "bench_gepa.jsonl").exists():
        peers(results / "bench_gepa.jsonl")
        print("bench_gepa")
    if (results / "bench_operators.jsonl").exists():
        proposals(results / "bench_operators.jsonl")
        print("bench_operators")


if __name__ == "__main__":
    main()
