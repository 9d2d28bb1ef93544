"""
What the model is asked, how it answers, and how the answer is graded.

  Task      problems in three splits that share none; `grade` gives a reward and says what was wrong
  Sampler   draws answers, a token at a time for all rows, each from a uniform drawn ahead. Rows admitted together are a Block, which
            holds their keys and values, those of a shared prefix once
  ask       (context, problem) pairs -> graded Rollouts
  score     the log-probs of given answers, with gradient: what the sampler computed, all tokens at once; `divergence`, how far two
            models are apart on them
"""
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Layout, Refused, TokenLogprobs, aligned, attention, cache_folder, out_of_memory, reading, refuse, replace_file


@dataclass(frozen=True)
class Problem:
    id: str                 # stable across processes and versions: "arithmetic-1/train/17"
    question: str
    answer: str
    solution: str = ""      # reference steps, where they are known, and a line "#### answer"


@dataclass(frozen=True)
class Grade:
    reward: float           # from 0 to 1; the tasks here give 0 or 1
    feedback: str           # first line: what was wrong; below it, unless right, the reference solution


@dataclass(frozen=True)
class Example:
    question: str
    answer: str

    @staticmethod
    def from_json(row):
        return Example(**{key: text for key, text in row.items() if key != "problem_id"})      # which prompts of older runs have


@dataclass(frozen=True)
class Context:
    """A fast weight phi: a system text and worked examples, which stand before the question as earlier turns."""
    system: str
    examples: tuple[Example, ...] = ()

    def messages(self, question):
        # The system turn is there even when empty: without one, the templates of Qwen2.5 and SmolLM2 put in their
        # own default. The question is given bare: the format asked for is what phi has to learn from feedback.
        turns = [("system", self.system)]
        for example in self.examples:
            turns += [("user", example.question), ("assistant", example.answer)]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]

    def prompt(self, tokenizer, question=""):
        """Token ids of the chat up to where the answer begins."""
        return tuple(tokenizer.chat(self.messages(question)))

    def without(self, problem):
        """This context less the examples made of that problem, which its question tells."""
        return Context(self.system, tuple(e for e in self.examples if e.question != problem.question))

    @staticmethod
    def from_json(row):
        """{"system": ..., "examples": [{"question": ..., "answer": ...}, ...]} -> Context. The system text may stand alone. What the row
        holds beside both is passed over; what an example does, or what is no text, raises."""
        refuse("examples" not in row and len(row) > 1, "it has no 'examples'")      # but perhaps 'example'
        context = Context(row["system"], tuple(map(Example.from_json, row.get("examples", ()))))
        if not all(isinstance(text, str) for text in (context.system, *(t for e in context.examples for t in vars(e).values()))):
            raise Refused("not a text")
        return context


def read_context(text):
    """What a seed prompt says: a system text, or JSON, {"system": ..., "examples": [{"question": ..., "answer": ...}, ...]} or a run's
    checkpoint/prompts.json, of which the best prompt is taken. ValueError for other JSON objects."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return Context(text)
    if not isinstance(row, dict):
        return Context(text)
    with reading('a seed prompt in JSON must be {"system": ..., "examples": [{"question": ..., "answer": ...}, ...]}'):
        return Context.from_json(row["candidates"][0] if "candidates" in row else row)


def extract_answer(text):
    """The rest of the line after the last `####`, stripped; None where there is none or it is empty."""
    _, mark, tail = text.rpartition("####")
    return tail.splitlines()[0].strip() or None if mark and tail else None


NUMBER = re.compile(r"(?:[-−–]\s?(?:\\?[$€£])?)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
                    r"(?:[eE][-+]?\d{1,8}(?!\w))?")       # 1,000 or 1000.5 or -.5 or -$3 or 1e3


def plain(text):
    """Without spaces, quotes, markup and a final full stop."""
    return re.sub(r"[\s*`'\"]", "", text).rstrip(".")


def parse_number(text):
    """The one number that `text` states, as an exact Decimal, units and % passed over ("50%" is 50, as in GSM8K);
    None for no number, several ("12 or 13"), or something left to compute ("3 + 4", "1/2", "5²"). "12 = 12" is one."""
    if re.search(r"\d\s?[²³¹⁰-⁹¼-¾⅐-⅞]|[√¼-¾⅐-⅞]\s?\d", text):       # but 12 m² is 12
        return None
    sides = [NUMBER.findall(side) for side in text.split("=")]
    exact = lambda number: Decimal(re.sub(r"[,\s\\$€£]", "", number).translate({ord("−"): "-", ord("–"): "-"}))
    values = {exact(number) for side in sides for number in side}
    return values.pop() if len(values) == 1 and max(map(len, sides)) == 1 else None


def same_answer(reference, given, fold_case=True):
    """Equal as exact numbers where the reference is just a number, else as text without spaces, quotes, markup."""
    if NUMBER.fullmatch(reference.strip(" $€£%").rstrip(".")):
        return parse_number(given) == parse_number(reference)
    reference, given = plain(reference), plain(given)
    if len(reference) == 1:
        given = given.strip("()[]") or given              # the letter of a choice
    return reference == given or fold_case and reference.casefold() == given.casefold()


class Task:
    """Problems in three splits that share no question, and their grader. A task has a `name`, and `rows(argument, level, data)` gives
    {"train", "val", "test": [(question, answer, or also its solution)]}."""
    takes = ""                                      # what follows the name, such as ":FILE"
    levels = 1                                      # the highest --level
    asked = "the answer and nothing else"           # what is to follow "####", for the feedback
    fold_case = True                                # whether A is as good as a there
    seed_prompt = "You are a helpful assistant."

    def __init__(self, argument="", level=1, data=None):
        refuse(level not in range(1, self.levels + 1), f"task {self.name} has no level {level}: its highest is {self.levels}")
        self.name += f":{Path(argument).stem if os.path.isfile(argument) else argument}" * bool(argument)
        label = self.name + (f"-{level}" if self.levels > 1 else "")
        rows, questions = self.rows(argument, level, data), set()
        self.splits = {"test": [], "val": [], "train": []}      # a question that is in several stays in the first of these
        for split, problems in self.splits.items():
            for i, (question, answer, *more) in enumerate(rows.get(split, [])):
                words, answer, solution = " ".join(question.split()), str(answer), more[0] or "" if more else ""
                given = extract_answer(solution)
                if given is None or not same_answer(answer, given):       # steps alone, or nothing: the answer in its form ends it
                    solution = f"{solution}\n#### {answer}".lstrip()
                if words not in questions:
                    problems.append(Problem(f"{label}/{split}/{i}", question, answer, solution))
                questions.add(words)
        if not all(self.splits.values()):
            sizes = ", ".join(f"{split} {len(problems)}" for split, problems in self.splits.items())
            raise Refused(f"task {label} needs problems in each of its three splits, and has {sizes} (a line can name its 'split')")
        if repeated := sum(map(len, rows.values())) - len(questions):
            print(f"task {label}: dropped {repeated} repeated questions", file=sys.stderr)

    @property
    def seed_context(self):
        return read_context(self.seed_prompt)

    def problems(self, split):
        return self.splits[split]

    def correct(self, problem, given):
        return same_answer(problem.answer, given, self.fold_case)

    def explain(self, problem, given):
        """What was wrong. The quoted part cannot end a sentence, or a lesson could be made of it."""
        shown = re.sub(r"(?<=[.!?]) ", "", " ".join(given.split()))[:80]
        return f"The answer '{shown}' is wrong: the right answer is {problem.answer}."

    def grade(self, problem, text, stopped=True):
        """Reward 1 if the text after the last `####` is right. stopped=False: it was cut off at the length limit."""
        given, reward = extract_answer(text), 0.0
        if given is None:
            feedback = f"The response lacks a final answer: it must end in a line '#### ' followed by {self.asked}."
        elif self.correct(problem, given):
            reward, feedback = 1.0, f"Correct: the answer is {problem.answer}."
        else:       # without control characters: it may end up in a prompt or on a terminal
            feedback = self.explain(problem, "".join(c if c.isprintable() else "\ufffd" for c in given))
        if not stopped:
            feedback += " The response was cut off at the length limit: write less and stop after the #### line."
        if not reward and problem.solution:
            feedback += f"\nA reference solution:\n{problem.solution}"
        return Grade(reward, feedback)


class Generated(Task):
    """Problems from one random stream, a function of name and level: `make(rng, level)` gives question, answer and a list of steps."""

    def rows(self, argument, level, data):
        rng, drawn = random.Random(f"{self.name}-{level}"), {}
        for _ in range(100_000):
            question, answer, steps = self.make(rng, level)
            refuse(isinstance(steps, str), f"task {self.name} gives steps that are one text: they must be a list of lines")
            drawn[question] = question, answer, "\n".join(steps)
            if len(drawn) == 512 + 256 + 4096:
                break
        else:
            raise Refused(f"task {self.name} makes {len(drawn)} different questions, and needs 4864")
        rows = rng.sample(list(drawn.values()), len(drawn))     # shuffled: wordings with few problems are drawn early
        return {"test": rows[:512], "val": rows[512:768], "train": rows[768:]}


NAMES = "Mia Tom Ava Ben Zoe Sam Lily Max Ruth Leo Nina Omar Ella Jack Rosa Ivan Anna Paul Kate Hugo".split()
THINGS = "books stamps marbles stickers shells cards balloons beads apples cookies oranges plums pears".split()
STORIES = [     # things; where they are, unless they are a person's; wordings of a product; of a gain; of a loss
    (THINGS, "", ["{name} has {c} boxes with {d} {things} in each", "{name} has {c} bags of {d} {things}",
                  "{name} buys {c} packs of {d} {things}", "{friend} gives {name} {d} {things} a day for {c} days"],
     ["{name} buys {n}", "{name} finds {n}", "{name} gets {n} from {friend}", "{friend} gives {name} {n}"],
     ["{name} gives {n} to {friend}", "{name} loses {n}", "{name} sells {n}"]),
    (["dollars"], "", ["{name} works for {c} hours and earns {d} dollars an hour",
                       "{name} saves {d} dollars a week for {c} weeks"],
     ["{name} earns {n}", "{name} gets {n} from {friend}"], ["{name} spends {n}", "{name} loses {n}"]),
    (["points"], "", ["{name} plays {c} rounds of a game and wins {d} points in each"],
     ["{name} wins {n}", "{name} scores {n}"], ["{name} loses {n}"]),
    (["birds"], "on the roof", ["{c} groups of {d} birds sit on the roof"], ["{n} land"], ["{n} fly away"]),
    (["people"], "on the bus", ["The bus has {c} rows with {d} people in each"], ["{n} get on"], ["{n} get off"]),
    (["children"], "in the park", ["{c} groups of {d} children play in the park"],
     ["{n} come", "{n} join them"], ["{n} go home", "{n} leave"]),
    (["roses"], "in the garden", ["The garden has {c} rows of {d} roses"], ["{name} plants {n}"], ["{name} picks {n}"])]


class Arithmetic(Generated):
    """Word problems of `level` steps: the first a sum or product of two numbers from 2 to 9, or a difference within ten; each
    later one adds or takes away up to 20."""
    name, levels, asked = "arithmetic", 8, "the number and nothing else"

    def make(self, rng, level):
        things, where, products, gains, losses = rng.choice(STORIES)
        things, (name, friend) = rng.choice(things), rng.sample(NAMES, 2)
        c, d, steps = rng.randint(2, 9), rng.randint(2, 9), []
        gain, change, total = rng.random() < 1 / 2, rng.randint(2, 9), rng.randint(2, 9)
        if not gain:                                    # within ten: across it the smallest models cannot subtract at all
            total = rng.randint(4, 10)
            change = rng.randint(2, total - 2)
        words = {"name": name, "friend": friend, "things": things, "c": c, "d": d}
        opening = f"There are {{n}} {things} {where}" if where else f"{name} has {{n}} {things}"
        question = f"How many {things} " + (f"are {where} now?" if where else f"does {name} have now?")
        if rng.random() < 1 / 3:
            opening, total, steps = rng.choice(products), c * d, [f"{c} * {d} = {c * d}"]
            question = question.replace(" now", "") if level == 1 else question
        text = opening.format(n=total, **words)
        while len(steps) < level:
            if steps:
                gain = total < 3 or total <= 38 and rng.random() < 1 / 2
                change = rng.randint(2, min(20, 40 - total if gain else total - 1))     # always a plural; some are left
            n = ("{} more {}" if gain else "{} {}") if steps else ("{} more" if gain else "{} of them")
            event = rng.choice(gains if gain else losses).format(n=n.format(change, things), **words)
            if not steps and text.startswith(name) and event.startswith(name) and rng.random() < 1 / 2:
                text += f" and{event.removeprefix(name)}"
            else:
                text += f". {rng.choice(['Then', 'Later,', 'After that,'])} {event}"
            before, total = total, total + (change if gain else -change)
            steps.append(f"{before} {'+' if gain else '-'} {change} = {total}")
        return f"{text}. {question}", str(total), steps


class Star(Generated):
    """Find the path from the centre of a star-shaped graph to the end of one of its arms (arXiv 2510.03971)."""
    shapes = ((2, 1), (2, 2), (3, 2), (3, 3), (5, 5), (10, 5))      # of level 1, 2, ...: (arms, edges in each arm)
    name, levels, asked = "star", len(shapes), "the nodes of the path in order, separated by commas"

    def make(self, rng, level):
        arms, length = self.shapes[level - 1]
        start, *nodes = map(str, rng.sample(range(1, 100), arms * length + 1))
        paths = [[start, *nodes[i:i + length]] for i in range(0, len(nodes), length)]
        edges = [f"{a}-{b}" for path in paths for a, b in zip(path, path[1:])]
        rng.shuffle(edges)
        goal, answer = paths[0][-1], ",".join(paths[0])
        return (f"A graph has these edges: {', '.join(edges)}. Which path leads from {start} to {goal}?", answer,
                [f"Backwards from {goal}: {', '.join(reversed(paths[0]))}."])

    def correct(self, problem, given):
        return re.findall(r"\d+", given) == problem.answer.split(",")   # "4 -> 17 -> 9" and "[4, 17, 9]" are 4,17,9

    def explain(self, problem, given):
        path, told = ([*nodes, "the end"] for nodes in (problem.answer.split(","), re.findall(r"\d+", given)))
        right = len(os.path.commonprefix([path, told]))                 # so many nodes are right
        here = path[right - 1] if right else "the start"
        return f"The first wrong edge is from {here} to {told[right][:80]}: the right one is {here} to {path[right]}."


class CodeIO(Generated):
    """Say what a Python function returns: at level 1 one of five simple functions, at level n one of n - 1 lines. Only our own
    templates are run, never a model's text."""
    name, levels, asked, fold_case = "codeio", 6, "the returned value and nothing else", False
    simple = {int: ["{x} + {k}", "max({x}, {k}{k})"], list: ["max({x})", "min({x})", "{x}[1]"]}
    operations = {  # on x, by its type; no result is too short for any operation that may follow
        int: ["{x} + {k}", "{x} - {k}", "{x} * {k}", "{x} // {k}", "{x} % {k}", "abs({x} - {k})", "max({x}, {k}{k})",
              "{x} // 2 if {x} % 2 == 0 else {x} + {k}", "[{x}, {x} + {k}, {x} - {k}]"],
        str: ["{x}[::-1]", "{x} + {v!r}", "{x}[:3]", "{x}[-2:]", "{x}.replace({v!r}, {w!r})", "{x}.count({v!r})",
              "{x}.upper()", "len({x})", "{x} * 2", "''.join(sorted({x}))"],
        list: ["sorted({x})", "{x}[::-1]", "sum({x})", "max({x})", "min({x})", "{x}[1]", "{x} + [{k}]",
               "[n + {k} for n in {x}]", "[n * {k} for n in {x}]", "sum(n for n in {x} if n > {k})"]}

    def make(self, rng, level):
        operations, last = self.simple if level == 1 else self.operations, max(level - 1, 1)
        values = {int: rng.randint(2, 60), list: [rng.randint(1, 20) for _ in range(rng.randint(3, 5))],
                  str: "".join(rng.choice("bdkmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))}
        value = values[rng.choice([*operations])]
        call, lines, steps = f"f({value!r})", [], []
        for line in range(1, last + 1):
            blanks = dict(zip("vw", rng.sample("aeiou", 2)), k=rng.randint(2, 9))
            operation = rng.choice(operations[type(value)])
            lines.append(("return " if line == last else "x = ") + operation.format(x="x", **blanks))
            written = operation.format(x=repr(value), **blanks)
            value = eval(written, {})                   # a template from above, filled in with values from above
            steps.append(f"{written} = {value!r}")
        return "\n    ".join(["def f(x):", *lines]) + f"\n\nWhat does {call} return?", repr(value), steps


def parse_row(line):
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_int=Decimal, parse_float=Decimal)
    except json.JSONDecodeError as error:
        raise Refused(f"not a JSON object on a line of its own: {error}") from error
    refuse(not isinstance(row, dict), "not a JSON object")
    texts = ["" if row.get(key) is None else row[key] for key in ("question", "answer", "solution", "split")]
    texts[1] = str(texts[1]) if isinstance(texts[1], Decimal) else texts[1]
    refuse(not all(isinstance(text, str) for text in texts),
           "'question', 'answer', 'solution' and 'split' must be texts ('answer' may be a number)")
    "".join(texts).encode()                 # half a surrogate pair fails here, not later in the tokenizer
    question, answer, solution, split = map(str.strip, texts)
    if "####" in answer:                    # steps and answer in one, as in GSM8K; its <<sums>> are left out
        solution, answer = solution or re.sub(r"<<.*?>>", "", answer), extract_answer(answer) or ""
    answer = " ".join(answer.split())
    refuse(not plain(question) or not plain(answer),
           f"'question' or 'answer' is missing or empty, of {', '.join(row) or 'nothing'}")
    refuse(split not in ("", "train", "val", "test"), f"'split' must be train, val or test, not {split!r:.40}")
    return question, answer, solution, split


def read_jsonl(path):
    """Rows (question, answer, solution, split) of a JSON Lines file; ValueError names a line that is broken."""
    rows = []
    for count, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            rows += [parse_row(line)] if line.strip() else []
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise Refused(f"{path}, line {count}: {error}") from error
    return rows


class JSONL(Task):
    """Lines that name no split are shared out 80/10/10 by a hash of the question: a new line never moves another. Where that leaves a
    split of a small file empty, it gets the training line of least hash."""
    name, takes = "jsonl", ":FILE"

    def rows(self, argument, level, data):
        if not os.path.isfile(argument):        # a pipe or a device may never end
            raise FileNotFoundError(f"{argument} is not a file")
        number = lambda row: int(hashlib.sha256(" ".join(row[0].split()).encode()).hexdigest(), 16)
        rows, lines = {"train": [], "val": [], "test": []}, read_jsonl(argument)
        for *row, split in lines:
            rows[split or {0: "test", 1: "val"}.get(number(row) % 10, "train")].append(row)
        for split in ("test", "val"):
            if not rows[split] and rows["train"] and not any(named for *_, named in lines):
                rows["train"].sort(key=number)
                rows[split].append(rows["train"].pop(0))
        return rows


class GSM8K(Task):
    """Grade-school word problems (arXiv 2110.14168). val: the last 256 problems of train.jsonl."""
    name, asked = "gsm8k", Arithmetic.asked
    url = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
    sha256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
              "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}

    def rows(self, argument, level, data):
        folder = self.folder(data)
        train, test = ([row[:3] for row in read_jsonl(folder / file)] for file in self.sha256)
        cut = len(train) - min(256, len(train) // 4)
        return {"train": train[:cut], "val": train[cut:], "test": test}

    def folder(self, data):
        """Where the two files are: --data, else $FST_DATA, else the cache, into which they may be downloaded."""
        cache = cache_folder() / "gsm8k"
        home = Path(data or os.environ.get("FST_DATA") or cache.parent)
        for folder in [home / "gsm8k", home, *[cache] * (not data)]:
            if all((folder / file).is_file() for file in self.sha256):
                return folder
        try:
            if data:
                raise OSError(f"it is not in {data}")
            for file, digest in self.sha256.items():
                with urllib.request.urlopen(self.url + file, timeout=30) as reply:
                    content = reply.read()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise OSError(f"the sha256 of {file} is not that of the published file")
                cache.mkdir(parents=True, exist_ok=True)
                replace_file(cache / file, lambda path: path.write_bytes(content))
        except (OSError, http.client.HTTPException) as error:
            raise FileNotFoundError(f"GSM8K was not found ({error}): give the folder of train.jsonl and test.jsonl "
                                    "with --data, put them into $FST_DATA/gsm8k, or go online to github.com; "
                                    "--task arithmetic needs no data") from error
        return cache


class ReasoningGym(Task):
    """Any reasoning-gym data set with answers of one line: reward 1 where its own score is 1, no partial credit."""
    name, takes = "rg", ":NAME"

    def rows(self, argument, level, data):
        try:
            import reasoning_gym
        except ImportError as error:
            raise Refused("task rg:NAME needs a package: pip install reasoning-gym") from error
        with reading(f"rg:{argument}"):
            self.source = reasoning_gym.create_dataset(argument, seed=0, size=1600)
        refuse(re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(type(self.source))),
               f"rg:{argument} is refused: it runs text as Python code, a model's answer perhaps")
        self.entries = {entry["question"]: entry for entry in self.source
                        if isinstance(entry["answer"], str) and "\n" not in entry["answer"]}
        rows, n = [(question, entry["answer"]) for question, entry in self.entries.items()], len(self.entries) // 8
        return {"test": rows[:2 * n], "val": rows[2 * n:3 * n], "train": rows[3 * n:]}

    def correct(self, problem, given):
        try:
            return self.source.score_answer(given, self.entries[problem.question]) >= 1
        except Exception:               # some of its graders raise on an answer that they cannot read
            return False


TASKS = {task.name: task for task in (Arithmetic, GSM8K, JSONL, Star, CodeIO, ReasoningGym)}


def get_task(name, level=1, data=None, seed_prompt=None):
    """The task `name`: a key of TASKS, with its argument where it takes one. data: the folder of gsm8k's files."""
    kind, _, argument = name.partition(":")
    refuse(kind not in TASKS or bool(argument) != bool(TASKS[kind].takes),
           f"unknown task {name!r}: known are " + ", ".join(k + t.takes for k, t in TASKS.items()))
    task = TASKS[kind](argument, level, data)
    task.seed_prompt = task.seed_prompt if seed_prompt is None else seed_prompt
    return task


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


LEAST_TEMPERATURE = 1e-4  # but 0: below, logits leave the range of fp32


@dataclass(frozen=True)
class Completion:
    tokens: list[int]         # as sampled, the stop token included
    logprobs: list[float]     # of each token, nats, at the sampling temperature (at 1 where that is 0)
    stopped: bool             # ended by a stop token; False: cut off at the limit

    @property
    def answer(self):
        """The tokens without the stop token: what is decoded."""
        return self.tokens[:-1] if self.stopped else self.tokens


def pick(logits, uniform, temperature, greedy=None):
    """One token per row by inverting the cumulative distribution at `uniform` in [0, 1), or the most likely one where `greedy`.
    logits [rows, vocab], uniform and greedy [rows] -> tokens [rows], log-probs [rows].

    The vocabulary is cut into chunks: first find the chunk, then the token in it, so that no cumulative sum runs over it all."""
    size = math.gcd(logits.shape[1], 512)
    p = (logits if temperature == 1 else logits.float() / temperature).softmax(-1, dtype=torch.float32)
    p = p.view(len(p), -1, size)                                                              # [rows, chunks, size]
    edges = p.sum(-1).cumsum(-1)                                                              # [rows, chunks]
    target = uniform[:, None] * edges[:, -1:]
    chunk = (edges <= target).sum(-1, keepdim=True)
    if greedy is not None:
        chunk = torch.where(greedy[:, None], p.amax(-1).argmax(-1, keepdim=True), chunk)
    chosen = p[torch.arange(len(p), device=p.device), chunk[:, 0]]                            # [rows, size]
    weights = chosen.cumsum(-1)
    # rounding may put the target at or past the chunk's end: stay on the last token that has any weight, and in the chunk
    target = target - F.pad(edges, (1, 0)).gather(1, chunk)
    target = torch.minimum(target, torch.nextafter(weights[:, -1:], torch.zeros_like(target)))
    inside = (weights <= target).sum(-1, keepdim=True).clamp(max=size - 1)
    if greedy is not None:
        inside = torch.where(greedy[:, None], chosen.argmax(-1, keepdim=True), inside)
    probability = chosen.gather(1, inside) / edges[:, -1:]                                    # the sum misses 1 by up to 1e-5
    return (chunk * size + inside)[:, 0], probability[:, 0].clamp(min=torch.finfo(torch.float32).tiny).log()


def prefix_runs(prompts):
    """Cuts sorted prompts into runs that keep one copy of their common prefix, so that the fewest tokens are kept in all:
    list of (start, stop, prefix length). Every prompt keeps at least its last token to itself; of a run of one the prefix is all
    but that."""
    lengths = [0, *itertools.accumulate(map(len, prompts))]
    common = [len(os.path.commonprefix(pair)) for pair in itertools.pairwise(prompts)]
    best = [(0, 0, 0)]                                # for the first n prompts: tokens kept, start of the last run, its prefix
    for stop in range(1, len(prompts) + 1):
        prefix, options = len(prompts[stop - 1]) - 1, []
        for start in reversed(range(stop)):
            if start < stop - 1:
                prefix = min(prefix, common[start], len(prompts[start]) - 1)
            kept = best[start][0] + lengths[stop] - lengths[start] - (stop - start - 1) * prefix
            options.append((kept, start, prefix))
        best.append(min(options))
    runs, stop = [], len(prompts)
    while stop:
        _, start, prefix = best[stop]
        runs.append((start, stop, prefix))
        stop = start
    return runs[::-1]


def prefix_segments(prompts):
    """Prompts, tuples of ids -> segments for a Layout in which equal prompts and common prefixes stand once, and for each prompt the
    index of its last segment."""
    prompts, segments, last = sorted(set(prompts)), [], {}
    for start, stop, prefix in prefix_runs(prompts):
        parent = None
        if stop - start > 1 and prefix:
            parent = len(segments)
            segments.append((prompts[start][:prefix], None))
        for prompt in prompts[start:stop]:
            last[prompt] = len(segments)
            segments.append((prompt if parent is None else prompt[prefix:], parent))
    return segments, last


class Block:
    """Rows that were admitted together, with their keys and values: P prefixes, up to S rows under each. The columns of a row:

        shared, one copy for all rows of a prefix  |  the row's own
        prefix [far]                               |  rest of its prompt [near], moved to the right  |  new tokens  |  room for more

    The rest of the prompt stands at the right so that all rows write their next token in the same column. A column without a token
    has -inf in the mask."""

    def __init__(self, runs, paths, cache):
        """runs: list of (rows, the length of the prefix that they share); paths: row -> where its prompt's tokens lie in the
        prefill's `cache`, a list of (k, v) [tokens, kv_heads, head_dim] per layer."""
        rows, device = [row for run, _ in runs for row in run], cache[0][0].device
        P, S = len(runs), max(len(run) for run, _ in runs)
        far = aligned(max(prefix for _, prefix in runs), device)
        near = aligned(max(len(paths[row]) - prefix for run, prefix in runs for row in run), device)
        shared = torch.full((P, far), -1)                                                     # where in the prefill; -1: no token
        own = torch.full((P, S, near), -1)
        for p, (run, prefix) in enumerate(runs):
            shared[p, :prefix] = torch.tensor(paths[run[0]][:prefix])
            for s, row in enumerate(run):
                rest = paths[row][prefix:]
                own[p, s, near - len(rest):] = torch.tensor(rest)
        shared, own = shared.to(device), own.to(device)
        unseen = lambda x: cache[0][0].new_zeros(x.shape).masked_fill_(x < 0, -torch.inf)
        self.mask, shared_mask = unseen(own)[:, None, :, None], unseen(shared)[:, None]       # [P, 1, S, 1, near], [P, 1, far]
        shared, own = shared.clamp(min=0), own.clamp(min=0)
        self.shared = [(k[shared].transpose(1, 2).contiguous(), v[shared].transpose(1, 2).contiguous(), shared_mask)
                       for k, v in cache] if far else [None] * len(cache)
        self.own = [[x[own].permute(0, 3, 1, 2, 4) for x in layer] for layer in cache]        # [P, kv_heads, S, near, head_dim]
        self.row = torch.tensor(rows, device=device)                                          # [live]
        self.slot = torch.tensor([p * S + s for p, (run, _) in enumerate(runs) for s in range(len(run))], device=device)     # [live]
        self.prompt = torch.tensor([len(paths[row]) for row in rows], device=device)          # [live], in tokens
        self.new = torch.zeros(1, dtype=torch.long, device=device)      # tokens sampled so far, where a CUDA graph can count them
        self.count, self.near = 0, near                                 # count: the same number, known without asking the device
        self.first = rows[0]                                            # names the block: no other one of this call has that row

    def keep(self, alive):
        """Rows where alive [live] is False leave the linear layers now, and the cache when it next grows."""
        self.row, self.slot, self.prompt = self.row[alive], self.slot[alive], self.prompt[alive]

    def full(self):
        return self.near + self.count - 1 == self.mask.shape[-1]          # the last token sampled has no keys and values yet

    def grow(self, room):
        """Lays the cache out anew: without the finished rows, with room for that many more tokens."""
        P, _, S, _, _ = self.mask.shape
        prefix, counts = (self.slot // S).unique_consecutive(return_counts=True)              # those that still have rows
        width = int(counts.max())
        p = torch.arange(len(prefix), device=prefix.device).repeat_interleave(counts)
        s = torch.arange(len(self.slot), device=p.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        source = torch.zeros(len(prefix), width, dtype=torch.long, device=p.device)           # [P, S] -> slot; vacant: slot 0
        source[p, s] = self.slot
        if len(prefix) < P:
            self.shared = [part and tuple(x[prefix] for x in part) for part in self.shared]
        move = lambda x, value: F.pad(x[source // S, :, source % S].transpose(1, 2), (0, 0, 0, room), value=value)
        for layer in self.own:                            # one after another: the old and the new of only one are held at a time
            layer[:] = [move(x, 0.0) for x in layer]
        self.mask = move(self.mask.transpose(-1, -2), -torch.inf).transpose(-1, -2)
        self.slot = p * width + s

    def begin(self):
        """Before one new token per live row: its column in the cache, which all may see from now on."""
        S, column = self.mask.shape[2], self.near + self.new - 1                              # column [1]
        self.place = self.slot // S, slice(None), self.slot % S, column
        self.mask.index_fill_(-1, column, 0)

    def attend(self, index, q, k, v):
        """One new token per live row: q [live, heads, head_dim], k and v [live, kv_heads, head_dim]."""
        P, _, S, _, _ = self.mask.shape
        for cache, x in zip(self.own[index], (k, v)):
            cache[self.place] = x
        vacant = len(self.slot) < P * S
        padded = q.new_zeros(P * S, *q.shape[1:]).index_copy_(0, self.slot, q) if vacant else q
        out = attention(padded.view(P, S, 1, *q.shape[1:]), *self.own[index], self.mask, self.shared[index]).view(P * S, -1)
        return out.index_select(0, self.slot) if vacant else out                              # [live, heads * head_dim]


class Sampler:
    """Draws completions from the model, many rows at a time.

    slots: rows decoded together; waiting ones are admitted once half of the slots are free, or enough for all that wait."""

    def __init__(self, model, tokenizer, slots=128):
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        # On a CPU, where each row costs, a finished row is dropped at once. On a GPU asking which are finished waits for the device,
        # and a smaller batch is another graph: it is asked seldom, and some rows leave only when the cache grows.
        self.cuda = model.embedding.device.type == "cuda"
        self.room = 128 if self.cuda else 16                                                  # tokens that the cache grows by
        # Tokens from one asking to the next; divides `room`: on a GPU rows leave where an asking falls on a full cache.
        self.check_every = 16 if self.cuda else 1

    def generate(self, prompts, max_new_tokens=256, temperature=1.0, seed=0, progress=None, greedy=None):
        """prompts: token ids, or texts -> a Completion each, in their order. Repeat a prompt to draw several samples of it.
        greedy: for each prompt, whether to take the most likely token every time; None: for none, or at temperature 0 for all.
        progress: a label for a progress bar, or None.

        A row's randomness is a function of (seed, its prompt, how many equal prompts stand before it), one uniform per token,
        drawn ahead: who else is in the batch changes a row by the arithmetic's rounding at most."""
        refuse(isinstance(prompts, str), "prompts must be a list of prompts, and are one text")
        prompts = [tuple(self.tokenizer.encode(p) if isinstance(p, str) else map(int, p)) for p in prompts]      # int: of tensors, too
        context = self.model.config.context_length
        for prompt in prompts:
            refuse(not 0 < len(prompt) < context, f"a prompt of {len(prompt)} tokens does not fit the model's context of {context}")
        refuse(max_new_tokens < 1 or temperature != 0 and not temperature >= LEAST_TEMPERATURE,
               f"cannot sample {max_new_tokens} tokens at temperature {temperature}")
        greedy = [temperature == 0 or most_likely for most_likely in greedy or [False] * len(prompts)]
        slots = min(self.slots, len(prompts))
        while prompts:
            try:
                return self.draw(prompts, slots, max_new_tokens, temperature or 1.0, seed, progress, greedy)
            except RuntimeError as error:
                if not out_of_memory(error) or slots < 2:
                    raise
            slots //= 2                                   # not in the handler above, where the failed pass still holds its memory
            self.slots = slots
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: sampling these again, and going on, with {slots} slots")
        return []

    @torch.no_grad()
    def draw(self, prompts, slots, max_new_tokens, temperature, seed, progress, greedy):
        """What `generate` gives, its arguments checked, `slots` rows at once."""
        context, device = self.model.config.context_length, self.model.embedding.device
        self.limit = torch.tensor([min(max_new_tokens, context - len(p)) for p in prompts], device=device)
        self.uniform = torch.from_numpy(uniforms(prompts, max_new_tokens, seed)).to(device)   # [rows, max new tokens]
        self.tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
        self.end = torch.zeros(len(prompts), dtype=torch.long, device=device)                 # 0 while a row is alive
        self.stop = torch.tensor(self.tokenizer.stop_ids, device=device)
        self.temperature = temperature
        self.greedy = torch.tensor(greedy, device=device) if any(greedy) else None
        self.shapes = self.graph = None                                                       # of `decode` on CUDA

        training = self.model.training
        self.model.eval()
        waiting = sorted(range(len(prompts)), key=lambda row: prompts[row])      # neighbours share prefixes
        blocks = []
        bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False, unit="row")
        try:
            with bar, self.model.packing(), torch.cuda.device_of(self.model.embedding):       # a graph is recorded on the current card
                while waiting or blocks:
                    free = slots - sum(len(block.row) for block in blocks)
                    if waiting and free >= min(len(waiting), slots / 2):
                        self.graph = None                 # of the blocks before, and with it the memory that it computes in
                        blocks += self.admit(waiting[:free], prompts)
                        waiting = waiting[free:]
                    else:
                        self.decode(blocks)
                    for block in blocks:
                        if (block.count - 1) % self.check_every == 0 or block.count == max_new_tokens:
                            alive = self.end[block.row] == 0
                            left = int(alive.sum())                                           # waits for the device, once
                            if left == 0 or left < len(alive) and (not self.cuda or block.full()):
                                bar.update(len(alive) - left)
                                block.keep(alive)
                    blocks = [block for block in blocks if len(block.row)]
        finally:
            self.model.train(training)
            self.graph = None

        return [Completion(t[:n], l[:n], t[n - 1] in self.tokenizer.stop_ids)
                for t, l, n in zip(self.tokens.tolist(), self.logprobs.tolist(), self.end.tolist())]

    def admit(self, rows, prompts):
        """Prefills the rows' distinct prompts, common prefixes once, and samples the rows' first token."""
        segments, last = prefix_segments(prompts[row] for row in rows)
        layout, cache = Layout(segments, self.model.embedding.device), []

        def attend(index, q, k, v):
            cache.append((k.contiguous(), v.contiguous()))        # the views would keep all of the layer's q, k and v
            return layout.attend(index, q, k, v)

        hidden = self.model.hidden(layout.tokens, layout.positions, attend)
        # A block is a rectangle, prefixes times rows under each. With runs of one row and of a hundred most of it would be vacant:
        # it holds runs of similar size.
        classes, paths = defaultdict(list), {row: layout.paths[last[prompts[row]]] for row in rows}
        for first, stop, prefix in prefix_runs([prompts[row] for row in rows]):
            prefix = prefix if stop - first > 1 else 0                                        # a lone row shares nothing
            classes[(stop - first).bit_length()].append((rows[first:stop], prefix))
        blocks = [Block(runs, paths, cache) for runs in classes.values()]
        for block, runs in zip(blocks, classes.values()):
            self.advance(block, hidden[[paths[row][-1] for run, _ in runs for row in run]])
            block.count += 1
        return blocks

    def decode(self, blocks):
        """One more token for every live row.

        On CUDA the step is captured as a graph and replayed until the shapes of rows and cache change: its kernels, more than a
        thousand, then cost one launch. The first step of a shape runs as it is: libraries cannot set themselves up in a capture."""
        for block in blocks:
            if block.full():
                self.graph = None                         # of the old layout, and with it the memory that it computes in
                block.grow(aligned(min(self.room, self.tokens.shape[1] - block.count), block.mask.device))
        shapes = [(block.first, len(block.row), block.mask.shape) for block in blocks]
        if not self.cuda or shapes != self.shapes:
            self.shapes, self.graph = shapes, None
            self.step(blocks)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):        # records, and computes nothing
                    self.step(blocks)
            self.graph.replay()
        for block in blocks:
            block.count += 1

    def step(self, blocks):
        """What `decode` computes: the same operations on the same tensors for every token of a layout. Nothing here waits for the
        device, takes its shape from a tensor's values, or replaces a tensor that the next token reads."""
        for block in blocks:
            block.begin()
        parts = [len(block.row) for block in blocks]

        def attend(index, q, k, v):
            return torch.cat([block.attend(index, *x) for block, *x in zip(blocks, q.split(parts), k.split(parts), v.split(parts))])

        tokens = torch.cat([self.tokens[block.row, block.new - 1] for block in blocks])
        positions = torch.cat([block.prompt + block.new - 1 for block in blocks])
        hidden = self.model.hidden(tokens, positions, attend)
        for block, h in zip(blocks, hidden.split(parts)):
            self.advance(block, h)

    def advance(self, block, hidden):
        """Samples each live row's next token from its last hidden state [live, hidden]."""
        row, new = block.row, block.new
        logits = self.model.linear(hidden, self.model.output_weight())                        # [live, vocab]
        token, logprob = pick(logits, self.uniform[row, new], self.temperature, None if self.greedy is None else self.greedy[row])
        self.tokens[row, new], self.logprobs[row, new] = token, logprob
        done = (token[:, None] == self.stop).any(-1) | (new + 1 >= self.limit[row])
        self.end[row] = torch.where(done & (self.end[row] == 0), new + 1, self.end[row])
        block.new += 1


def uniforms(prompts, count, seed):
    """One uniform in [0, 1) per prompt and new token, [prompts, count] fp32; seed: an integer or a tuple of them."""
    text, seen, out = functools.cache(repr), Counter(), np.empty((len(prompts), count), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        key = hashlib.sha256(f"({seed!r}, {text(prompt)}, {seen[prompt]})".encode()).digest()
        seen[prompt] += 1
        out[row] = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little"))).random(count, dtype=np.float32)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


@dataclass(frozen=True)
class Rollout:
    problem: Problem
    context: Context          # the one it was sampled under, and is trained under
    prompt: tuple[int, ...]   # token ids of the context and the question
    tokens: list[int]         # token ids of the answer, as sampled: never encoded again
    logprobs: list[float]     # the behaviour policy's, one per token
    text: str
    stopped: bool
    reward: float
    feedback: str

    @property
    def in_form(self):
        """Whether it came to an end and names an answer in the way asked for."""
        return self.stopped and extract_answer(self.text) is not None


def ask(sampler, task, jobs, max_new_tokens, temperature=1.0, seed=0, progress=None, greedy=None):
    """Puts each (context, problem) to the model, all in one batch, and grades the answers: a Rollout each, in order. A problem
    that stands among its context's worked examples is asked without that example: its answer is not to be copied."""
    jobs = [(context.without(problem), problem) for context, problem in jobs]
    prompts = {(context, p): context.prompt(sampler.tokenizer, p.question) for context, p in dict.fromkeys(jobs)}
    completions = sampler.generate([prompts[job] for job in jobs], max_new_tokens, temperature, seed, progress, greedy)
    rollouts = []
    for (context, problem), completion in zip(jobs, completions):
        text = sampler.tokenizer.decode(completion.answer)
        grade = task.grade(problem, text, completion.stopped)
        if not 0 <= grade.reward <= 1:
            raise Refused(f"task {task.name} gave a reward of {grade.reward}: it must be from 0 to 1")
        rollouts.append(Rollout(problem, context, prompts[context, problem], completion.tokens, completion.logprobs, text,
                                completion.stopped, float(grade.reward), grade.feedback))
    return rollouts


def examine(sampler, task, contexts, problems, samples, max_new_tokens, seed=0, progress=None):
    """Under each context every problem once greedy, then `samples` times at temperature 1, all in one batch:
    Rollouts [contexts][problems][1 + samples]."""
    rows = 1 + samples
    jobs = [(context, problem) for context in contexts for problem in problems for _ in range(rows)]
    rollouts = iter(ask(sampler, task, jobs, max_new_tokens, 1.0, seed, progress, [i % rows == 0 for i in range(len(jobs))]))
    return [[[next(rollouts) for _ in range(rows)] for _ in problems] for _ in contexts]


def answer_states(model, rows):
    """rows: list of (prompt, tokens) ids -> the last hidden states that predict all rows' tokens, one row after another, [tokens,
    hidden], and these tokens. The prompts' common prefixes are run once: the same forward as the sampler's, all tokens known."""
    segments, last = prefix_segments(tuple(prompt) for prompt, _ in rows)
    ends = [last[tuple(prompt)] for prompt, _ in rows]             # the segment in which a row's last predictor lies
    for row, (_, tokens) in enumerate(rows):
        if len(tokens) > 1:                                        # a completion's last token predicts nothing
            segments.append((tokens[:-1], ends[row]))
            ends[row] = len(segments) - 1
    device = model.embedding.device
    layout = Layout(segments, device)
    # a row's path from its prompt's last token on: whose hidden states predict the completion
    predictors = torch.tensor([i for (prompt, _), end in zip(rows, ends) for i in layout.paths[end][len(prompt) - 1:]], device=device)
    targets = torch.tensor([token for _, tokens in rows for token in tokens], device=device)
    return model.hidden(layout.tokens, layout.positions, layout.attend)[predictors], targets


def score(model, rows, temperature=1.0):
    """rows as above -> log-probs and entropies [all rows' tokens], with gradient where it is on."""
    hidden, targets = answer_states(model, rows)
    return TokenLogprobs.apply(hidden, model.output_weight(), targets, temperature)


@torch.no_grad()
def divergence(model, other, rows):
    """rows as above -> KL(model || other) of the token after each prefix of the answers, exact over the vocabulary:
    sum_v p(v) (log p(v) - log q(v)), [all rows' tokens], nats."""
    (states, _), (other_states, _), parts = answer_states(model, rows), answer_states(other, rows), []
    for h, other_h in zip(states.split(64), other_states.split(64)):      # the logits of so many tokens exist at a time
        log_p = F.linear(h, model.output_weight()).float().log_softmax(-1)                    # [64, vocab]
        log_q = F.linear(other_h, other.output_weight()).float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)
