"""
What figures.py draws from and writes beside the figures: a group's rows, and its table.md with {base, trained weights} x {seed, evolved
prompt}, when each method reaches RL's best, the sigmoid's asymptotes, entropy and reward of the slow steps, the prompts' story, and what
each operator's proposals came to, and, of tasks in turn, what became of the earlier ones. Then side_by_side.md, a row per method of those
groups that differ in one thing; bench_gepa.md from bench_gepa.jsonl, and bench_operators.md from bench_operators.jsonl.
"""
import itertools
import json
import math
import re
from collections import Counter, defaultdict

import numpy as np

METHODS = ["fst", "rl", "gepa", "rl+gepa", "gepa+rl", "distill"]          # come first, in this order
CELLS = {"base weights, seed prompt": "base_seed_", "base weights, evolved prompt": "base_", "trained weights, seed prompt": "seed_",
         "trained weights, evolved prompt": ""}
FAMILIES = {"ablate": "arithmetic-handwritten", "plasticity": None}       # groups NAME-*, and what they are to be compared with
POINTS = 5                # evaluations after the start, at least, for a sigmoid of three parameters


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs_of(group):
    """A group's folder -> {method: {seed: rows}}; each row has the `clock`, the seconds of all phases up to it."""
    runs = {}
    for path in sorted([*group.glob("metrics.jsonl"), *group.glob("*/metrics.jsonl")]):
        rows, clock, name = read(path), 0.0, re.fullmatch(r"(.+)-(\d+)", path.parent.name)
        for row in rows:
            clock += {"fast": row.get("seconds", 0), "step": row.get("sample_seconds", 0) + row.get("train_seconds", 0)}.get(row["kind"], 0)
            row["clock"] = clock
        config = path.parent / "config.json"
        resolved = json.loads(config.read_text(encoding="utf-8"))["resolved"] if config.exists() else {}
        method, seed = name.groups() if name and path.parent != group else (resolved.get("method", group.name), resolved.get("seed", 0))
        for row in evals(rows):
            if method == "rl":                            # whose own prompt is the seed prompt
                row["seed_kl_base"] = row["kl_base"]
            elif "seed_kl_base" not in row:               # of a run from before the answers under the two prompts were told apart
                row.pop("kl_base", None)
        runs.setdefault(method, {})[int(seed)] = rows
    return dict(sorted(runs.items(), key=lambda item: (METHODS.index(item[0]) if item[0] in METHODS else 99, item[0])))


def evals(rows, split="val"):
    return [row for row in rows if row["kind"] == "eval" and row["split"] == split]


def in_step(seeds):
    """Each seed's rows -> the same of those seeds that got furthest, at the steps that all of these have: the mean of fewer and fewer seeds
    would jump where a run was cut short."""
    last = max(rows[-1]["step"] for rows in seeds)
    whole = [rows for rows in seeds if rows[-1]["step"] == last]
    steps = set.intersection(*({row["step"] for row in rows} for rows in whole))
    return [[row for row in rows if row["step"] in steps] for rows in whole]


# ---------------------------------------------------------------------------------------------------------------------
# The sigmoid


def fit(C, R, R0):
    """R - R0 = (A - R0) / (1 + (Cmid / C)^B), least squares; C, R [points], C > 0 -> A, Cmid, B. A, in which it is linear, is solved
    for; log Cmid and B are searched on a grid that closes in on the best."""
    low, high = np.array([math.log(C.min() / 4), 0.3]), np.array([math.log(C.max() * 4), 8.0])
    start, end = low, high
    for _ in range(6):
        logs, B = (grid.ravel() for grid in np.meshgrid(*np.linspace(start, end, 41).T))               # [grid]
        s = 1 / (1 + np.exp(np.clip(B[:, None] * (logs[:, None] - np.log(C)), -60, 60)))               # [grid, points]
        gain = np.clip((s * (R - R0)).sum(1) / (s * s).sum(1), -R0, 1 - R0)                            # A - R0, so that 0 <= A <= 1
        best = ((gain[:, None] * s - (R - R0)) ** 2).sum(1).argmin()
        width = (end - start) / 10
        start, end = (np.clip(np.array([logs[best], B[best]]) + side * width, low, high) for side in (-1, 1))
    return R0 + gain[best], math.exp(logs[best]), B[best]


def sigmoid(seeds, task):
    """The fit to all seeds' validation accuracy, sampled, against rollouts, as text; interval of A: 95% of 200 bootstraps, over seeds
    where there are three or more, else over points."""
    every = [[(row["rollouts"], row["mean"]) for row in evals(rows) if row["task"] == task] for rows in seeds.values()]
    curves = [line for line in ([(C, R) for C, R in curve if C > 0] for curve in every) if line]
    starts = [R for curve in every for C, R in curve if C == 0]
    if not starts:
        return "not fitted: no evaluation at the start"
    if max(map(len, curves), default=0) < POINTS:
        return f"not fitted: {max(map(len, curves), default=0)} evaluations after the start, {POINTS} are needed"
    R0, rng, draws = float(np.mean(starts)), np.random.default_rng(0), []
    C, R = np.array(sum(curves, [])).T
    A, middle, B = fit(C, R, R0)
    if ((R0 + (A - R0) / (1 + (middle / C) ** B) - R) ** 2).sum() > R.var() * len(R) / 2:
        return "not fitted: the curve explains less than half of the variance"
    if middle > C.max() / 2:
        return f"not fitted: no levelling off yet, half of the gain would come only after {middle:.0f} rollouts"
    parts = curves if len(curves) > 2 else [[point] for curve in curves for point in curve]
    for _ in range(200):
        sample = sum((parts[i] for i in rng.integers(len(parts), size=len(parts))), [])
        draws.append(fit(*np.array(sample).T, R0)[0])
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"A = {A:.2f} ({low:.2f} to {high:.2f}, over {'seeds' if len(curves) > 2 else 'points'}), half way at {middle:.0f} rollouts, B = {B:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def spread(values, form, weights=None):
    """Mean (lowest..highest) of the seeds."""
    return f"{form(np.average(values, weights=weights))}" + (f" ({form(min(values))}..{form(max(values))})" if len(values) > 1 else "")


def percent(value):
    return f"{100 * value:.1f}%"


def which_channel(runs, task):
    """The 2x2 on the test problems, a row per method and way of decoding."""
    lines = [f"| method | decoding | seeds | {' | '.join(CELLS)} |", "|" + "---|" * (3 + len(CELLS))]
    missing, sizes = [], set()
    for method, seeds in runs.items():
        tests = {seed: row for seed, rows in seeds.items() for row in evals(rows, "test") if row["task"] == task}
        missing += [f"{method}-{seed}" for seed in seeds if seed not in tests]
        sizes |= {(row["n"], row["samples"]) for row in tests.values()}
        for key in ("greedy", "mean") if tests else ():
            cells = [spread([row[prefix + key] for row in tests.values()], percent) for prefix in CELLS.values()]
            lines.append(f"| {method} | {'greedy' if key == 'greedy' else 'sampled'} | {len(tests)} | {' | '.join(cells)} |")
    about = " and ".join(f"{n} problems, {samples} samples each" for n, samples in sorted(sizes))
    lines = [f"Test problems ({about}): mean (lowest..highest) over seeds.", "", *lines] if sizes else []
    return [*lines, *([""] * bool(lines) + [f"Without a row on the test problems: {', '.join(missing)}."] if missing else [])]


def to_rl_best(runs, task):
    """When each method's mean over seeds, and its single seeds, first reach the best validation accuracy of RL's mean; then the sigmoid."""
    lines, target, means, every = [], None, {}, {}
    for method, seeds in runs.items():
        found = [here for rows in seeds.values() if (here := [row for row in evals(rows) if row["task"] == task])]
        points = lambda rows: [(row["step"], row["rollouts"], row["mean"], *(row.get(key, math.nan) for key in ("kl_base", "seed_kl_base"))) for row in rows]
        every[method] = list(map(points, found))
        if found:
            curves = np.array(list(map(points, in_step(found))))                                       # [seeds, points, values]
            means[method], full = curves.mean(0), len(curves)
            if method == "rl" and means[method][:, 2].any():
                target = means[method][:, 2].max()
                lines = [f"RL's best: {target:.1%} sampled, the highest point of its mean on validation problems (seeds: {full}). When others "
                         "reach it: of their mean over seeds (of the single seeds that reach it, first..last).", ""]
    lines += ["| method | best, sampled | slow steps to RL's best | rollouts to RL's best | KL to the base there under the own prompt, nats a token "
              "| under the seed prompt | seeds that reach it | sigmoid |", "|" + "---|" * 8]
    for method, curves in every.items():
        if not curves:
            lines.append(f"| {method} | no evaluation | | | | | | |")
            continue
        best, reached = spread([max(point[2] for point in curve) for curve in curves], "{:.1%}".format), ""
        when = ["no RL above 0 here", "", "", ""]
        if target is not None:
            first = lambda curve: next(((step, C, *KL) for step, C, R, *KL in curve if R >= target), None)
            of_mean, of_seeds = first(means[method]), [found for found in map(first, curves) if found]
            when = ["not logged" if of_mean and math.isnan(of_mean[i]) else (form(of_mean[i]) if of_mean else "not reached")
                    + (f" ({form(min(f[i] for f in of_seeds))}..{form(max(f[i] for f in of_seeds))})" if of_seeds else "")
                    for i, form in enumerate(["{:.0f}".format, "{:.0f}".format, "{:.4f}".format, "{:.4f}".format])]
            reached = f"{len(of_seeds)} of {len(curves)}"
        lines.append(f"| {method} | {best} | {' | '.join(when)} | {reached} | {sigmoid(runs[method], task)} |")
    return lines


def thirds(steps):
    """The first third of them and the last, a step each at least."""
    size = max(1, len(steps) // 3)
    return steps[:size], steps[-size:]


def slow_phase(runs, task):
    """What the slow steps looked like, in the first and the last third of them; a step without signal has neither entropy nor KL."""
    lines = []
    for method, seeds in runs.items():
        steps = [[row for row in rows if row["kind"] == "step" and row["task"] == task] for rows in seeds.values()]
        sides = [side for rows in steps for side in thirds(rows)]                                         # first, last; first, last; ...
        if any(steps):
            means = [[np.mean(known) for third in sides[side::2] if (known := [row[key] for row in third if key in row])]
                     for key in ("entropy", "kl_reference", "reward", "flat") for side in (0, 1)]
            lines.append(f"| {method} | {' | '.join(spread(values, '{:.3g}'.format) if values else 'none' for values in means)} |")
    head = ("| method | entropy, nats a token: first third of the steps | last third | KL to the base of the training rollouts, nats a token "
            "| last third | reward | last third | flat groups | last third |")
    return ["", head, "|" + "---|" * 9, *lines] if lines else []


def story(runs, task):
    """Fast phase by fast phase: how long the kept prompts are, and how the seed prompt itself does with the weights of that moment."""
    lines = []
    for method, seeds in runs.items():
        at = defaultdict(list)                            # slow step -> (tokens of the kept prompts, best, the seed prompt's accuracy)
        for rows in seeds.values():
            seed_prompt, now = {row["step"]: row["seed_greedy"] for row in evals(rows) if row["task"] == task}, 0
            for row in rows:
                now = row.get("step", now)
                if row["kind"] == "fast" and row["task"] == task:
                    at[now].append((np.mean(row["prompt_tokens"]), row.get("best", math.nan), seed_prompt.get(now)))
        for step, cells in sorted(at.items()):
            tokens, best, seed_prompt = zip(*cells)
            known = [value for value in seed_prompt if value is not None]
            lines.append(f"| {method} | {step} | {len(cells)} | {spread(tokens, '{:.0f}'.format)} | {spread(best, '{:.1%}'.format)} "
                         f"| {spread(known, '{:.1%}'.format) if known else 'not evaluated there'} |")
    head = "| method | slow steps before | fast phases | tokens of a kept prompt, mean | the best's mean on the anchors | seed prompt, greedy |"
    return ["", head, "|" + "---|" * 6, *lines] if lines else []


def operators(group):
    """What the operators' proposals came to, over all runs of the group whose prompts are here."""
    found = [row for path in sorted(group.rglob("prompts.jsonl")) for row in read(path) if row["operator"] != "seed" and row["verdict"] != "carried"]
    ends = {"cannot be a prompt": lambda row: row["verdict"] == "rejected", "not past the gate": lambda row: row["verdict"] == "failed",
            "accepted": lambda row: row["verdict"] == "accepted", "kept": lambda row: "; kept as" in row["reason"],
            "best": lambda row: "; kept as number 1" in row["reason"]}
    lines = [f"| {name} | {len(mine)} | {' | '.join(str(sum(map(end, mine))) for end in ends.values())} |"
             for name in dict.fromkeys(row["operator"] for row in found) for mine in [[row for row in found if row["operator"] == name]]]
    why = Counter(re.sub(r"\d+ tokens.*", "", row["reason"]) for row in found if row["verdict"] == "rejected").most_common()
    return ["", "## Proposals", "", f"| operator | proposed | {' | '.join(ends)} |", "|" + "---|" * (2 + len(ends)), *lines,
            *["", "Why not a prompt: " + ", ".join(f"{reason.strip(' :')} {count}" for reason, count in why) + "."][:2 * bool(why)]] if found else []


def in_turn(runs, tasks):
    """Tasks in turn: accuracy on each at the end of each stage, under the best prompt of that moment and, the weights' own, under the seed
    prompt, and which share it is of the task's best at any evaluation. A stage ends with the evaluations that follow its last phase."""
    lines = ["", "## In turn", "", "Validation problems at the end of each task's stage, greedy / sampled: mean (lowest..highest) over seeds; in brackets the sampled share "
             "of the task's best.", "", f"| method | prompt | seeds | after | {' | '.join(tasks)} |", "|" + "---|" * (4 + len(tasks))]
    for method, seeds in runs.items():
        for prefix, (stage, name) in itertools.product(("", "seed_"), enumerate(tasks)):
            cells = []
            for task in tasks[:stage + 1]:
                found = []
                for rows in seeds.values():
                    phases = [i for i, row in enumerate(rows) if row["kind"] != "eval" and row["task"] == name]
                    after = itertools.takewhile(lambda row: row["kind"] == "eval" and row["split"] == "val", rows[phases[-1] + 1:] if phases else [])
                    best = max((row[f"{prefix}mean"] for row in evals(rows) if row["task"] == task), default=0)
                    found += [(row[f"{prefix}greedy"], row[f"{prefix}mean"], best) for row in after if row["task"] == task]
                greedy, sampled, best = zip(*found) if found else ((), (), ())
                shares = [a / b for a, b in zip(sampled, best) if b]
                share = f" [{spread(shares, '{:.0%}'.format)}]" if shares else ""
                cells.append(f"{spread(greedy, percent)} / {spread(sampled, percent)}{share}" if found else "none")
            lines.append(f"| {method} | {'seed' if prefix else 'best'} | {len(seeds)} | {name} | {' | '.join(cells + ['not yet'] * (len(tasks) - len(cells)))} |")
    return lines


def side_by_side(results):
    """Groups of one task that differ in one thing -> side_by_side.md: sampled accuracy on validation problems by slow step (of several
    evaluations at a step the last), then the test problems."""
    lines = ["# Side by side", "", "Written by `python results/figures.py` from the rows of the groups named here: mean (lowest..highest) over seeds."]
    for family, other in FAMILIES.items():
        groups = sorted(results.glob(f"{family}-*"))
        methods = {method for group in groups for method in runs_of(group)}
        if groups and other:
            groups.insert(0, results / other)
        if groups:
            lines += ["", f"## {family}", "", "| group | task | method | seeds | validation, sampled, by slow step | test, greedy | test, sampled | trained weights, seed prompt, "
                      "test, greedy | entropy, last third of the steps | reward, last third |", "|" + "---|" * 10]
        for group, method, seeds in [(group, *run) for group in groups for run in runs_of(group).items()]:
            if method in methods:
                by_step, tests, last = defaultdict(list), [], defaultdict(list)
                for rows in seeds.values():
                    for step, mean in {row["step"]: row["mean"] for row in evals(rows)}.items():
                        by_step[step].append(mean)
                    tests += evals(rows, "test")
                    steps = [row for row in rows if row["kind"] == "step"]
                    for key in ("entropy", "reward"):
                        last[key].append(np.mean([row[key] for row in thirds(steps)[1] if key in row] or [math.nan]))
                curve = ", ".join(f"{step}: {np.mean(values):.1%}" for step, values in sorted(by_step.items()))
                ends = [spread([row[key] for row in tests], percent) if tests else "none" for key in ("greedy", "mean", "seed_greedy")]
                tasks = " ".join(dict.fromkeys(row["task"] for rows in seeds.values() for row in evals(rows)))
                lines.append(f"| {group.name} | {tasks} | {method} | {len(seeds)} | {curve} | {' | '.join(ends)} | {spread(last['entropy'], '{:.2f}'.format)} | "
                             f"{spread(last['reward'], '{:.2f}'.format)} |")
    (results / "side_by_side.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(group, runs):
    tasks = list(dict.fromkeys(row["task"] for seeds in runs.values() for rows in seeds.values() for row in rows))
    lines = [f"# {group.name}", "", "Written by `python results/figures.py` from the rows of this folder."]
    for task in tasks:
        lines += ["", f"## {task}", "", *which_channel(runs, task), "", *to_rl_best(runs, task), *slow_phase(runs, task), *story(runs, task)]
    lines += (in_turn(runs, tasks) if len(tasks) > 1 else []) + operators(group)
    (group / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def peers(path):
    """bench_gepa.jsonl -> bench_gepa.md: the latest row of each task, split, limit of an answer, system and seed; a system's seeds side by side."""
    latest = {(row["task"], row.get("split", "val"), row["max_new_tokens"], row["system"], row["seed"]): row for row in read(path)}
    groups, keys = defaultdict(list), ("greedy", "sampled", "greedy_format", "sampled_format")
    for key, row in sorted(latest.items()):
        groups[key[:4]].append(row)
    lines = [f"# {path.stem}", "", f"Written by `python results/figures.py` from `{path.name}`: held-out accuracy, and share of answers in the asked form, with the best "
             "prompt of each system. Mean (lowest..highest) over seeds; greedy with the 95% interval (Wilson's) over problems: the "
             "seeds' answers to one problem count as one observation, which errs on the wide side.", "",
             "| task, split, limit of an answer | system | seeds | rollouts | greedy | 95% | sampled | in form, greedy | in form, sampled | tokens of the prompt |", "|" + "---|" * 10]
    for (task, split, limit, system), rows in groups.items():
        asked = [row["problems"] for row in rows]
        cells, n = {key: spread([row[key] for row in rows], percent, asked) for key in keys}, max(asked)     # every seed is asked the same
        low, high = wilson(np.average([row["greedy"] for row in rows], weights=asked) * n, n)
        lines.append(f"| {task}, {split}, {limit} | {system} | {len(rows)} | {spread([row['rollouts'] for row in rows], '{:.0f}'.format)} | {cells['greedy']} | {low:.1%} to {high:.1%} | "
                     f"{cells['sampled']} | {cells['greedy_format']} | {cells['sampled_format']} | {spread([row['prompt_tokens'] for row in rows], '{:.0f}'.format)} |")
    whole = {key: rows for key, rows in groups.items() if all("right" in row for row in rows) and len({row["problems"] for row in rows}) == 1}
    for *group, system in whole:
        if system != "ours" and (ours := whole.get((*group, "ours"))):
            solved = [np.mean([list(map(int, row["right"])) for row in rows], axis=0) for rows in (ours, whole[(*group, system)])]      # [problems]
            gain = solved[0] - solved[1]
            low, high = np.percentile(np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1), [2.5, 97.5])
            lines += ["", f"{', '.join(map(str, group))}: greedy, ours less {system}, of {len(gain)} problems: {gain.mean():.1%} "
                          f"(95% of bootstraps over problems, these prompts given: {low:.1%} to {high:.1%})."]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spearman(x, y):
    """Correlation of the ranks of x and y [n], equal values at the mean of their ranks; nan where all of one are equal."""
    ranks = [np.array([(np.less(v, one).sum() + np.less_equal(v, one).sum()) / 2 for one in v]) for v in (x, y)]      # [n], from 1/2
    a, b = (r - r.mean() for r in ranks)
    scale = math.sqrt((a @ a) * (b @ b))
    return a @ b / scale if scale else math.nan


def best_of(n, key, value):
    """Expected value of whichever of n of them, drawn without replacement, has the highest key; of equal ones any. key, value [drafts].

    In descending order of key the i-th (from 0) of N is the best of those drawn with probability C(N - 1 - i, n - 1) / C(N, n)."""
    key, value, N = np.asarray(key), np.asarray(value, float), len(key)
    fair = np.array([value[key == k].mean() for k in key])[np.argsort(-key, kind="stable")]              # [drafts]
    return sum(math.comb(N - 1 - i, n - 1) * v for i, v in enumerate(fair)) / math.comb(N, n)


def proposals(path):
    """bench_operators.jsonl -> bench_operators.md: of the latest row of each task, seed, parent and operator, what the children came to, and what
    ranking the drafts of worked examples is worth; seeds side by side."""
    latest = {(row["task"], row["parent"], row["operator"], row["seed"]): row for row in read(path)}
    number = "{:.2f}".format
    shares = lambda row, key, part=slice(None): np.array([text[part].count("1") / len(text[part]) for text in row[key]])          # [children]
    cell = lambda values, form: spread(known, form) if (known := [value for value in values if not math.isnan(value)]) else ""
    groups, yields, ranking, why = defaultdict(list), [], [], defaultdict(Counter)
    for (task, parent, operator, seed), row in latest.items():
        groups[task, parent, operator].append((row, latest[task, parent, "parent", seed]))
        why[operator].update(row["why"])
    for (task, parent, operator), rows in groups.items():
        tried, asked = sum(row["tried"] for row, _ in rows), sum(len(row["right"]) for row, _ in rows)
        cells = []
        for key in ("right", "in_form"):
            values = [(shares(row, key), shares(base, key).mean()) for row, base in rows if row[key]]
            every = [share for children, _ in values for share in children]
            better = sum((children > base).sum() for children, base in values)
            cells += [cell(every, percent), f"{better / len(every):.0%}" if every and operator != "parent" else ""]
        yields.append(f"| {task} | {parent} | {operator} | {len(rows)} | {tried} | {(tried - asked) / tried:.0%} | {' | '.join(cells)} |")
        for key in ("right", "in_form") if operator == "example" else ():
            known = [row for row, _ in rows if len(row[key]) >= 8]
            if not known:
                continue
            halves = [spearman(shares(row, key, slice(0, None, 2)), shares(row, key, slice(1, None, 2))) for row in known]
            cells = [f"{np.mean([len(row[key]) for row in known]):.0f}", cell(halves, number), cell([shares(row, key).mean() for row in known], percent)]
            for by in ("likelihood", "anchor_reward", "examples"):
                ranked = [row for row in known if row[by]]
                cells += [cell([spearman(row[by], shares(row, key)) for row in ranked], number)]
                cells += [cell([best_of(n, row[by], shares(row, key)) for row in ranked], percent) for n in (3, 8)]
            ranking.append(f"| {task} | {parent} | {'right' if key == 'right' else 'in form'} | {' | '.join(cells)} |")
    said = [f"- {operator}: " + ", ".join(f"{reason} {count}" for reason, count in counts.most_common()) + "." for operator, counts in why.items() if counts]
    quotes = [f"- {reason}: `{' '.join(text.replace('`', chr(39)).split())[:300]}`" for row in latest.values() for text, reason in row["replies"][:3]]
    head = ("| task | parent | operator | seeds | proposals | no new prompt | right, sampled | better than the parent | in form, sampled | better than the parent |",
            "| task | parent | share | drafts | two halves | random draft | likelihood | best of 3 | of 8 | anchors' reward | best of 3 | of 8 "
            "| number of examples | best of 3 | of 8 |")
    lines = [f"# {path.stem}", "", f"Written by `python results/figures.py` from `{path.name}`: held-out problems, one sampled answer to each. Mean (lowest..highest) "
             "over children, of all seeds; nothing has selected them. A parent's are its own repetitions: what chance alone does.", "", head[0], "|" + "---|" * 10, *yields,
             "", "Why no new prompt:", "", *said, "", "## What ranking the drafts of worked examples is worth", "",
             "Rank correlations (Spearman) with the held-out share: of one half of the problems with the other, where near 0 the drafts differ by chance alone; then of "
             "each ranking, each with the expected share of the first by it among 3 and among 8 random drafts. Mean (lowest..highest) over seeds.",
             "", head[1], "|" + "---|" * 15, *ranking]
    lines += ["", "## What the model writes when asked for a better prompt", "", *quotes] * bool(quotes)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def wilson(successes, n):
    """95% interval of a proportion (Wilson, JASA 22, 1927)."""
    z, p = 1.96, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
