"""
The fast weights: a population of K prompts, evolved by reflection while the slow weights stand still.

A prompt is a Context: a system text (an instruction, then lessons, one line "- ..." each) and worked examples. `evolve`
takes the K prompts of the last cycle and the problems of the next one, the anchors, and spends a budget of rollouts:

  1. measure   The carried prompts are asked again: the weights moved, and scores of other weights never count.
  2. rounds    Parents are drawn from the Pareto frontier and answer 3 problems, those they failed first. Operators propose children
               of them. A child is accepted if it beats its parent strictly on the same minibatch; or, where neither solves any of
               it, if known solutions are likelier under the child, or, where the parent solves next to nothing, two more answers are
               in the form asked for. The most promising of the accepted are scored on all anchors, without which a prompt cannot win.
  3. keep      Of the prompts that cannot be told from the best, the one under which known solutions are likeliest (where nothing is
               right, weighed with the form of the answers); then those that add most to what the kept ones solve.

The operators: `rewrite`, the model reads the prompt and rollouts with feedback and writes a better prompt; `lesson`, a general
sentence of the grader's feedback; `example`, other worked examples, from solutions that the feedback gave away or that the model
found (of data without solutions, from what the model wrote where that led to the right answer); `brief`, examples without their
working; `merge`, two prompts' lessons and examples. Which of them gets to propose is drawn by their success so far.

After GEPA (arXiv 2507.19457). What differs, as a small model rewrites badly and rewards are 0 or 1: the other operators, many
children a round, estimates instead of raw scores, and, where no rollout is right, the likelihood of known solutions and the form
of the answers.
"""
import math
import random
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from model import Refused, refuse
from rollout import NUMBER, Context, Example, extract_answer, same_answer

OPERATORS = ("rewrite", "lesson", "example", "brief", "merge")
MINIBATCH = 3             # problems that a child is compared with its parent on (GEPA's)
PROBES = 16               # at most: anchors with a known solution, whose log-prob under a prompt says more than few rewards of 0

# ---------------------------------------------------------------------------------------------------------------------
# The population


@dataclass(eq=False)
class Candidate:
    """A prompt that was proposed, where it came from and how it did."""
    id: int
    context: Context
    parents: tuple[int, ...] = ()
    operator: str = "seed"
    verdict: str = "carried"                              # carried; accepted or failed at the gate; rejected: no prompt, never asked
    reason: str = ""
    changes: list[str] = field(default_factory=list)      # lines added to and removed from the first parent
    scores: dict[int, dict[str, float]] = field(default_factory=dict)     # weight step -> problem id -> the first answer's reward
    formed: dict[int, dict[str, bool]] = field(default_factory=dict)      # likewise, whether that answer is in the form asked for

    def record(self, rollout, step):
        """Only the first answer counts: a parent is asked again, but just what it failed. Later ones could only raise its mean."""
        self.scores.setdefault(step, {}).setdefault(rollout.problem.id, rollout.reward)
        self.formed.setdefault(step, {}).setdefault(rollout.problem.id, rollout.in_form)

    def mean(self, step):
        """Mean reward over the problems asked at these weights; None where nothing was."""
        return average(self.scores[step].values()) if self.scores.get(step) else None

    def scorers(self, problems):
        """The problems that may score this prompt: not those that are among its examples."""
        return [p for p in problems if self.context.without(p) == self.context]

    def to_json(self):
        return {"id": self.id, "parents": list(self.parents), "operator": self.operator,
                "verdict": self.verdict, "reason": self.reason, "system": self.context.system,
                "examples": [vars(e) for e in self.context.examples], "changes": self.changes,
                "means": {step: self.mean(step) for step in self.scores}, "scores": self.scores, "formed": self.formed}

    @staticmethod
    def from_json(row):
        cells = [{int(step): answers for step, answers in row.get(name, {}).items()} for name in ("scores", "formed")]
        return Candidate(row["id"], Context.from_json(row), tuple(row["parents"]), row["operator"], row["verdict"], row["reason"],
                         row["changes"], *cells)


class Population:
    """The kept prompts, best first, and what the next call of `evolve` has to know; JSON and back loses nothing."""

    def __init__(self, contexts):
        self.candidates = [Candidate(i, context) for i, context in enumerate(contexts)]
        self.proposed = len(self.candidates)                            # ids given out so far
        self.operators = {name: [0.0, 0.0] for name in OPERATORS}       # successes, failures
        self.solutions = {}                                             # of the last anchors: see `Search.record`

    @property
    def contexts(self):
        return [candidate.context for candidate in self.candidates]

    def record(self, rollouts, step):
        """Rollouts of the slow phase also score the prompts, on problems not asked yet, while the weights are those of the fast
        phase (until the first update); the next search uses them if the weights are still the same. A rollout that was asked
        without one of its prompt's examples does not count."""
        for c in set(self.candidates):
            for r in rollouts:
                if r.context == c.context and step in c.scores:
                    c.record(r, step)

    def to_json(self):
        solutions = {p: {source: vars(example) for source, example in known.items()} for p, known in self.solutions.items()}
        return {"candidates": [c.to_json() for c in self.candidates], "proposed": self.proposed, "operators": self.operators,
                "solutions": solutions}

    @staticmethod
    def from_json(row):
        population = Population([])
        once = {c["id"]: Candidate.from_json(c) for c in row["candidates"]}     # a prompt may be there twice
        population.candidates = [once[c["id"]] for c in row["candidates"]]
        population.proposed, population.operators = row["proposed"], population.operators | row["operators"]
        population.solutions = {p: {source: Example.from_json(e) for source, e in known.items()}
                                for p, known in row.get("solutions", {}).items()}
        return population


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def average(rewards):
    return sum(rewards) / len(rewards)


def best_scores(scores):
    """The best score of each problem, 0 where no candidate was measured on it; scores as below."""
    return [max((s for s in column if s is not None), default=0) for column in zip(*scores)]


def pareto_frontier(scores):
    """scores [candidates][problems], None where not measured -> indices of the candidates on the frontier, ascending.

    On it is a candidate that attains the best score of at least one problem (in a tie, all do) and is not dominated. b dominates
    a if it was measured wherever a was, is nowhere worse there, and somewhere better. Equal rows do not dominate each other."""
    refuse(len(lengths := {len(row) for row in scores}) > 1,
           f"the candidates' scores are of different lengths: {sorted(lengths)} problems")
    best = best_scores(scores)

    def dominates(b, a):
        pairs = [(x, y) for x, y in zip(b, a) if y is not None]
        return all(x is not None and x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [i for i, row in enumerate(scores) if any(s == top for s, top in zip(row, best))
            and not any(dominates(other, row) for other in scores)]


def parent_weights(scores):
    """scores as above -> a weight per candidate: on how many solved problems it is (co-)best, 0 off the frontier. The candidate of
    best mean weighs at least as much as any other: with 0/1 scores a specialist's lucky problems could outnumber its own."""
    frontier, best = set(pareto_frontier(scores)), best_scores(scores)
    weights = [sum(s == top for s, top in zip(row, best) if top > 0) if i in frontier else 0 for i, row in enumerate(scores)]
    means = [average([s for s in row if s is not None] or [-1]) for row in scores]        # not measured: below all others
    weights[means.index(max(means))] = max([1, *weights])
    return weights


def cover(estimates, ranks, lengths, keep):
    """Indices of up to `keep` candidates: the one of highest rank, then one by one whoever raises the sum over problems of the best
    estimate among the kept the most; ties go to the higher rank, then to the shorter prompt.
    estimates [candidates][problems], ranks (any values that compare) and lengths [candidates]."""
    rest = sorted(range(len(estimates)), key=lambda i: (ranks[i], -lengths[i]), reverse=True)
    chosen = [rest.pop(0)]
    while rest and len(chosen) < keep:
        best = [max(column) for column in zip(*(estimates[i] for i in chosen))]               # [problems]
        gain = lambda i: round(sum(max(e - b, 0) for e, b in zip(estimates[i], best)), 9)
        chosen.append(max(rest, key=gain))                # in a tie the first, which `rest` has in order
        rest.remove(chosen[-1])
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Text: what a proposed prompt may say


def printable(text):
    """Without control characters other than line ends: it may reach a terminal."""
    return "".join(c for c in text.replace("\t", " ") if c == "\n" or c.isprintable())


MARKUP = re.compile(r"<\|.*?\|>|</?think>")               # a prompt that held it would end its own turn


def parse_rewrite(reply, stopped=True):
    """The reflector's reply -> the text of its last closed fence outside its thoughts; ValueError says why there is none."""
    refuse(not stopped, "cut off at the limit")
    answer = printable(reply).rpartition("</think>")[2]   # a template may open the thoughts itself: only their end is sure
    refuse("<think>" in answer, "its thoughts do not end")
    parts = answer.split("```")
    refuse(len(parts) < 3, "no closed fence")
    refuse(len(parts) % 2 == 0, "its last fence is not closed")
    text = re.sub(r"^\w*\n", "", parts[-2]).strip()       # the fence's first line may name a language
    refuse(not text, "empty")
    refuse(MARKUP.search(text), "holds the chat template's own markup")
    return text


def leaks(text, problems):
    """What `text` gives away of these problems: set of (problem id, "question" | "solution" | "answer").

    A question or a line of a solution counts when six of its words in a row stand in the text (all, where it has only three to
    five), an answer when it stands there as a word of its own; a number that only numbers a line, "2. ", does not. Answers of a
    single letter are passed over: every text holds them."""
    word = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\w+"
    words = lambda s: [w.replace(",", "") for w in re.findall(word, re.sub(r"(?m)^ *[0-9]+[.)] ", "", s.casefold()))]
    joined, found = f" {' '.join(words(text))} ", set()
    for problem in problems:
        for kind, lines in (("question", [problem.question]), ("solution", problem.solution.splitlines())):
            for line in map(words, lines):
                size = min(6, len(line))
                if size >= 3 and any(f" {' '.join(line[i:i + size])} " in joined for i in range(len(line) - size + 1)):
                    found.add((problem.id, kind))
        answer = " ".join(words(problem.answer))
        if (len(answer) > 1 or answer.isdigit()) and f" {answer} " in joined:
            found.add((problem.id, "answer"))
    return found


def general_sentences(feedback, answers):
    """feedback: problem id -> what the grader said of wrong answers to it, less the solution; answers: problem id -> the right one. The
    sentences that it said, word for word, of problems with different answers: those speak of the task, the others of one problem or
    one choice, as "the right answer is C." does; what holds a digit may speak of one, too."""
    said = defaultdict(set)                               # sentence -> the right answers to the problems that it was said of
    for id, texts in feedback.items():
        for sentence in re.split(r"(?<=[.!?])\s+|\n", "\n".join(texts)):
            said[sentence.strip()].add(answers[id])
    whole = lambda s: s.endswith((".", "!")) and len(s.split()) > 3
    return sorted(s for s, right in said.items() if len(right) > 1 and whole(s) and not re.search(r"\d", s))


def lessons_of(system):
    """A system text -> (instruction, lessons): the lessons are the lines "- ..." at its end."""
    cut = re.search(r"(?:(?:^|\n)- [^\n]*)*\Z", system).start()
    return system[:cut], [line[2:] for line in system[cut:].split("\n") if line]


def with_lessons(instruction, lessons):
    lines = [f"- {lesson}" for lesson in lessons]
    return "\n".join([instruction, *lines] if instruction else lines)


def answer_alone(example):
    """The example without its working: its answer as the grader reads it. As it is where none is marked."""
    answer = extract_answer(example.answer)
    return example if answer is None else replace(example, answer=f"#### {answer}")


def own_working(rollout):
    """What the model wrote on its way to the right answer, up to the first sentence that ends in it, and below it the answer in the form
    asked for, which it may have lacked; None where there is nothing of the kind. For problems whose working nobody gave: after STaR
    (arXiv 2203.14465), which trains on such texts. That the steps are right is not sure."""
    answer, text = rollout.problem.answer, printable(rollout.text)
    if MARKUP.search(text) or extract_answer(text) and rollout.reward < 1:
        return None
    if rollout.reward == 1:
        return text.strip() if rollout.stopped and text.strip() != f"#### {answer}" else None
    for sentence in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|\n|$)", text, re.S):
        words, whole = sentence.group().split(), rollout.stopped or sentence.end() < len(text)
        ends = [*NUMBER.findall(sentence.group())[-1:], " ".join(words[-len(answer.split()):])]
        if whole and len(words) > 3 and any(same_answer(answer, end) for end in ends):
            return f"{text[:sentence.end()].strip()}\n#### {answer}"
    return None


def content(context):
    """What makes a prompt the same as another: its texts, in whatever order its examples stand."""
    return context.system, frozenset(context.examples)


def fill(system, examples, count_tokens, limit):
    """The context of those examples, in the order given, that still fit the limit of tokens when their turn comes."""
    context = Context(system)
    for example in examples:
        longer = Context(system, (*context.examples, example))
        if count_tokens(longer) <= limit:
            context = longer
    return context


def readable(context):
    """The context as lines, for diffs and for people."""
    lines = context.system.split("\n")
    for example in context.examples:
        lines += [f"Q: {' '.join(example.question.split())}", f"A: {' | '.join(example.answer.splitlines())}"]
    return lines


def reflection(context, rollouts):
    """The chat that asks for a better instruction."""
    quote = lambda text, limit=1000: MARKUP.sub(" ", printable(text)).replace("```", "'''").strip()[:limit]
    case = lambda r: f"Question: {quote(r.problem.question)}\nResponse: {quote(r.text)}\nFeedback: {quote(r.feedback)}\n\n"
    return [{"role": "system", "content": "You improve the instructions that a language model is given."},
            {"role": "user", "content": f"The current instruction:\n```\n{quote(context.system, None)}\n```\n\n"
             f"How the model did with it:\n\n{''.join(map(case, rollouts))}"
             "Write a better instruction. Edit the current one in place: keep what works, and add what the feedback teaches that "
             "holds for every question of this kind. Do not quote any question, number or answer from above. "
             "End with the whole new instruction between ``` and ```."}]


# ---------------------------------------------------------------------------------------------------------------------
# Evolution


def evolve(population, anchors, ask, write, likelihood, count_tokens, *, budget, keep, step, seed, prompt_tokens=1024):
    """Evolves `population` in place on `anchors`, with at most `budget` rollouts. Returns every candidate that was looked at,
    carried ones first, and the number of rollouts spent. The population then holds exactly `keep` prompts, best first; one is
    repeated only where there are no others at least half as good.

    ask([(Context, Problem)], seed) -> [Rollout]                        all in one batch
    write([messages], seed) -> [(text, stopped)]                        the reflector
    likelihood([(Context, Problem, text)]) -> [mean log-prob a token]   or likelihood is None
    count_tokens(Context) -> tokens;  step: optimizer steps that the weights have taken."""
    search = Search(population, anchors, ask, write, likelihood, count_tokens, budget, step, seed, prompt_tokens)
    search.measure_carried()
    while search.round():
        pass
    search.finish(keep)
    return search.candidates, search.spent


class Search:
    """One call of `evolve`."""

    def __init__(self, population, anchors, ask, write, likelihood, count_tokens, budget, step, seed, prompt_tokens):
        refuse(not anchors, "there are no anchor problems to evolve prompts on")
        self.population, self.ask, self.write, self.likelihood, self.count_tokens = population, ask, write, likelihood, count_tokens
        self.budget, self.step, self.prompt_tokens, self.spent, self.calls = budget, step, prompt_tokens, 0, 0
        self.rng = random.Random(f"{seed} {step}")
        self.anchors = list({p.id: p for p in anchors}.values())
        self.rng.shuffle(self.anchors)                                  # so that the first n are a random sample
        self.width = max(4, min(16, len(self.anchors) // 6))            # children asked a round
        self.candidates = list(dict.fromkeys(population.candidates))
        self.seen = {content(c.context) for c in self.candidates}
        self.contenders = list(self.candidates)                         # carried, or accepted and scored on all anchors
        self.waiting = []                                               # accepted, not yet scored on all
        self.probes, self.probe_logprobs = [], {}                       # (problem, known solution); context -> log-prob of each
        self.partner = {}                                               # merged context -> id of its second parent
        self.sentences = []                                             # of the feedback, general enough to be lessons
        self.feedback = defaultdict(list)                               # by problem id, as are `solutions`
        self.bare = {p.id for p in self.anchors if p.solution in ("", f"#### {p.answer}")}             # nobody gave their working
        # Of problems that come again what is known stays known: with their scores kept, too, they may not be asked again.
        self.solutions = defaultdict(dict, {p.id: population.solutions[p.id] for p in self.anchors if p.id in population.solutions})
        answers = Counter(p.answer for p in self.anchors)               # a word that answers several problems gives none of them away
        self.labels = {(p.id, "answer") for p in self.anchors if answers[p.answer] > 1 and not re.search(r"\d", p.answer)}
        ids = {p.id for p in self.anchors}
        for c in self.candidates:                                       # scores of other weights or problems do not count
            now = lambda cells: {step: {p: cell for p, cell in cells.get(step, {}).items() if p in ids}}
            c.scores, c.formed = now(c.scores), now(c.formed)
            c.verdict, c.reason = "carried", ""
        for record in population.operators.values():                    # older weights' experience fades
            record[:] = [n / 2 for n in record]

    # -- rollouts and what they tell -------------------------------------------------------------------------------

    def spend(self, jobs):
        """jobs: list of (candidate, problem), as many of them as the budget allows -> their rollouts."""
        jobs = jobs[:self.budget - self.spent]
        self.spent, self.calls = self.spent + len(jobs), self.calls + 1
        rollouts = self.ask([(c.context, p) for c, p in jobs], self.calls) if jobs else []
        for (candidate, _), rollout in zip(jobs, rollouts):
            self.record(candidate, rollout)
        return rollouts

    def record(self, candidate, rollout):
        """Takes note of an answer: its score; of a wrong one the feedback, and as "reference" the solution that it quotes; of a right one
        its text, as "own". Of a problem whose working nobody gave, "reference" is what the model wrote on its way to the right answer."""
        problem = rollout.problem
        assert candidate.scorers([problem]), "a prompt is never scored on its own example"
        candidate.record(rollout, self.step)
        if rollout.reward < 1:
            told = rollout.feedback
            if problem.solution and problem.solution in told:
                self.solutions[problem.id].setdefault("reference", Example(problem.question, problem.solution))
                told = told.replace(problem.solution, "")
            self.feedback[problem.id].append(told)
        elif rollout.stopped and not MARKUP.search(text := printable(rollout.text)):
            self.solutions[problem.id]["own"] = Example(problem.question, text.strip())
        if problem.id in self.bare and (text := own_working(rollout)):
            self.solutions[problem.id]["reference"] = Example(problem.question, text)

    def unasked(self, candidate, problems):
        return [p for p in candidate.scorers(problems) if p.id not in candidate.scores[self.step]]

    def measure(self, candidates, problems):
        self.spend([(c, p) for c in candidates for p in self.unasked(c, problems)])

    def measure_carried(self):
        """A lone carried prompt is measured on all anchors. Several share two fifths of the budget equally, and the best of them is
        then measured on all anchors; the others only at the end, if some budget is left. Then the probes are chosen."""
        share = self.budget if len(self.candidates) == 1 else 2 * self.budget // (5 * len(self.candidates))
        self.measure(self.candidates, self.anchors[:max(1, share)])
        self.measure([max(self.candidates, key=self.estimate)], self.anchors)
        worked = self.worked()
        known = [p for p in self.anchors if p.id in worked and all(c.scorers([p]) for c in self.candidates)]
        known = known[:min(PROBES, len(self.anchors) // 4, len(known) // 3)] if self.likelihood else []
        self.probes = [(p, self.solution(p.id).answer) for p in known]
        self.score_probes([c.context for c in self.candidates])

    def estimate(self, candidate):
        """A candidate's mean, drawn towards the mean of all as if by 4 more problems: a lucky 3 of 3 is not certainty."""
        rewards, everyone = candidate.scores[self.step].values(), [r for c in self.contenders for r in c.scores[self.step].values()]
        return (sum(rewards) + 4 * average(everyone or [0.0])) / (len(rewards) + 4)

    def form(self, candidate):
        """The share of its answers in the form asked for, drawn towards one half as if by 4 more: that all of 48 are is partly luck."""
        formed = candidate.formed[self.step].values()
        return (sum(formed) + 2) / (len(formed) + 4)

    def form_and_likelihood(self, candidate):
        """What ranks prompts under which nothing is right: not a probability, but the log of a share in form plus a log-prob a token.
        A right answer takes both. Form alone prefers examples without working, under which solutions are unlikely; likelihood alone
        prefers few examples on GSM8K, under which half of the answers lose the form."""
        return math.log(self.form(candidate)) + self.known_logprob(candidate)

    def margin(self, share):
        """Two standard errors of a share, as if it were of all anchors."""
        return 2 * math.sqrt(share * (1 - share) / len(self.anchors))

    def unsolved(self, mean):
        """Whether so low a mean reward cannot be told from 0, which is within the margin."""
        return mean <= self.margin(mean)

    def known_logprob(self, candidate):
        """How likely known solutions are under it: the log-prob a token, mean over probes."""
        return average(self.probe_logprobs[candidate.context] or [0.0])

    # -- a round ---------------------------------------------------------------------------------------------------

    def round(self):
        """Parents, proposals, gate, scoring; False once the budget does not suffice, or no parent may be asked any anchor."""
        parents, left = self.draw_parents(), self.budget - self.spent
        # what is left must pay for the parents' minibatches, the children's, and one child on all anchors
        width = min(self.width, (left - len(self.anchors)) // MINIBATCH - len(parents))
        if width < len(parents):
            return False

        # 1. The parents answer their minibatches.
        minibatches = {parent: self.minibatch(parent) for parent in parents}
        rollouts = iter(self.spend([(parent, p) for parent in parents for p in minibatches[parent]]))
        traces = {parent: [next(rollouts) for _ in minibatches[parent]] for parent in parents}
        if not any(traces.values()):
            return False                                  # every anchor is among the parents' own examples
        count = lambda rollouts: (sum(r.reward for r in rollouts), sum(r.in_form for r in rollouts))
        before = {parent: count(traces[parent]) for parent in parents}
        parents = [parent for parent in parents if before[parent][0] < len(traces[parent])]   # a perfect one cannot be beaten

        # 2. Proposals, and the gate.
        children = self.propose(parents, traces, width) if parents else []
        rollouts = iter(self.spend([(child, p) for child, parent in children for p in minibatches[parent]]))
        for child, parent in children:
            (right, formed), (parent_right, parent_formed) = count([next(rollouts) for _ in minibatches[parent]]), before[parent]
            child.reason = (f"{right:.3g} of {len(minibatches[parent])} right, {formed} in form, where its parent got {parent_right:.3g} "
                            f"and {parent_formed}")
            # Strictly better than the parent on the same problems. Where neither solves any of them, which tells nothing, it suffices
            # that known solutions are likelier, or, if the parent solves next to nothing else, that two more answers are in form.
            better, blank = right > parent_right, right == parent_right == 0
            tidier = formed >= parent_formed + 2 and self.unsolved(parent.mean(self.step))
            if better or blank and (tidier or self.likelier(child.context, parent.context)):
                child.verdict = "accepted"
                self.waiting.append(child)

        # 3. The most promising of the accepted are scored on all anchors: as many as half of what is left pays for, one at least. Where
        #    none of them seems to solve anything, form decides more, of which three answers say little: first four for each place
        #    answer a quarter of the anchors, for up to the other half.
        places = (self.budget - self.spent) // (2 * len(self.anchors))
        first = lambda n: sorted(self.waiting, key=self.promise, reverse=True)[:n]
        if all(self.unsolved(self.estimate(c)) for c in self.waiting):
            self.measure(first(4 * places), self.anchors[:len(self.anchors) // 4])
        best = first(max(1, places))
        self.measure(best, self.anchors)
        self.contenders += best
        self.waiting = [c for c in self.waiting if c not in best]
        for child, _ in children:
            self.population.operators[child.operator][child.verdict != "accepted"] += 1       # [successes, failures]
        return True

    def minibatch(self, parent):
        """Problems that the parent failed, then unasked ones, then solved ones: failures teach most."""
        problems = parent.scorers(self.anchors)
        self.rng.shuffle(problems)
        return sorted(problems, key=lambda p: parent.scores[self.step].get(p.id, 0.5))[:MINIBATCH]

    def promise(self, candidate):
        """A key to sort by: the estimate, then the likelihood of known solutions; where the estimate cannot be told from 0, that with
        the form."""
        estimate = self.estimate(candidate)
        return (0.0, self.form_and_likelihood(candidate)) if self.unsolved(estimate) else (estimate, self.known_logprob(candidate))

    def draw_parents(self):
        pool = sorted(self.contenders, key=self.promise, reverse=True)                        # of equal means the first is favoured
        weights = parent_weights([[c.scores[self.step].get(p.id) for p in self.anchors] for c in pool])
        return list(dict.fromkeys(self.rng.choices(pool, weights, k=min(3, self.width // 4))))

    # -- proposals -------------------------------------------------------------------------------------------------

    def propose(self, parents, traces, width):
        """Up to `width` children to be asked: list of (candidate, parent). traces: the rollouts of each parent's minibatch."""
        sentences = map(printable, general_sentences(self.feedback, {p.id: p.answer for p in self.anchors}))
        self.sentences = [s for s in sentences if not leaks(s, self.anchors) and not MARKUP.search(s)]
        able = [name for name in OPERATORS if name != "merge" or len(self.contenders) > 1]          # a merge takes two prompts
        names = [name for name in able if not any(self.population.operators[name])]                   # each has a first chance
        names = [*names, *(self.draw_operator(able) for _ in range(width - len(names)))][:width]
        orders = Counter((name, self.rng.choice(parents)) for name in names)       # (operator, parent) -> number of children

        asked = [parent for name, parent in orders.elements() if name == "rewrite"]
        replies = self.write([reflection(parent.context, traces[parent]) for parent in asked], self.calls) if asked else []
        written = [(self.rewrite(parent, *reply), parent) for parent, reply in zip(asked, replies)]
        children = [(child, parent) for child, parent in written if child.verdict != "rejected"]
        self.score_probes([child.context for child, _ in children])
        for _ in range(len(written) - len(children)):     # the place of a rejected one goes to another operator
            orders[self.draw_operator([name for name in able if name != "rewrite"]), self.rng.choice(parents)] += 1
        for (name, parent), n in orders.items():
            if name != "rewrite":
                scoring = {r.problem.question for r in traces[parent]}
                children += [(child, parent) for child in self.offspring(name, parent, scoring, n)]
        return children

    def draw_operator(self, operators):
        """Thompson sampling: the operator whose success rate, drawn from its Beta posterior, is the highest."""
        return max(operators, key=lambda name: self.rng.betavariate(*(1 + n for n in self.population.operators[name])))

    def add(self, context, parent, operator, verdict="failed", reason=""):
        """A new candidate. "failed" stays its verdict unless it passes the gate."""
        old, new = readable(parent.context), readable(context)
        gone, come = set(old) - set(new), set(new) - set(old)           # as sets: the order of examples is drawn anew
        changes = [f"- {line}" for line in old if line in gone] + [f"+ {line}" for line in new if line in come]
        parents = (parent.id, self.partner[context]) if operator == "merge" else (parent.id,)
        child = Candidate(self.population.proposed, context, parents, operator, verdict, reason, changes,
                          {self.step: {}}, {self.step: {}})
        self.population.proposed += 1
        self.candidates.append(child)
        if verdict != "rejected":                         # a reply that was no prompt does not forbid a prompt of the same text
            self.seen.add(content(context))
        return child

    def rewrite(self, parent, reply, stopped):
        """What the reflector wrote, as a candidate: rejected, with the reason, where it cannot be a prompt."""
        try:
            system = parse_rewrite(reply, stopped)
            context = Context(system, parent.context.examples)
            refuse(system.split() == parent.context.system.split(), "unchanged")
            refuse(content(context) in self.seen, "proposed before")
            refuse((size := self.count_tokens(context)) > self.prompt_tokens, f"too long: {size} tokens with its examples")
            refuse(found := leaks(system, self.anchors) - leaks(parent.context.system, self.anchors) - self.labels,
                   f"copies the {', '.join(sorted({kind for _, kind in found}))} of an anchor problem")
        except Refused as error:
            self.population.operators["rewrite"][1] += 1
            return self.add(Context(printable(reply)[:2000], parent.context.examples), parent, "rewrite", "rejected", str(error))
        return self.add(context, parent, "rewrite")

    def offspring(self, name, parent, scoring, count):
        """Up to `count` children of the parent by the operator `name`, the method of that name: (the parent's context, the
        questions that will score the child) -> the child's context. To draft more, and ask those under which known solutions are
        likeliest, did not pay: it ranks them by their number of examples (bench/operators.py)."""
        operator = getattr(self, name)
        contexts = [operator(parent.context, scoring) for _ in range(count)]
        new = {content(x): x for x in contexts if content(x) not in self.seen and self.count_tokens(x) <= self.prompt_tokens}
        self.score_probes(new.values())
        self.population.operators[name][1] += count - len(new)                        # nothing new to propose is no success
        return [self.add(context, parent, name) for context in new.values()]

    def score_probes(self, contexts):
        """Notes how likely the model finds each probe's known solution under each context: the mean log-prob of its tokens. Not
        the probability, in which one easy probe outweighs all others: with GSM8K's long solutions no example would make a
        visible difference. No prompt contains a probe. A solution has its working, which brief examples make unlikely."""
        jobs = [(context, problem, answer) for context in contexts for problem, answer in self.probes]
        logprobs = iter(self.likelihood(jobs) if jobs else [])
        for context in contexts:
            self.probe_logprobs[context] = [next(logprobs) for _ in self.probes]

    def likelier(self, child, parent):
        """Whether the known solutions are likelier under the child: by two standard errors of the mean difference over probes."""
        gains = [a - b for a, b in zip(self.probe_logprobs[child], self.probe_logprobs[parent])]
        return len(gains) > 1 and average(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))

    def solution(self, problem_id, own=False):
        """A known good answer as an example: the "reference", or the model's "own"; where there is only one of them, that."""
        known = self.solutions[problem_id]
        return known.get("own" if own else "reference") or next(iter(known.values()))        # else whichever there is

    def worked(self):
        """The problems of known solution, less those whose working nobody gave or found; all, where that is so of all."""
        alone = lambda i: i in self.bare and self.solution(i) == answer_alone(self.solution(i))
        return [i for i in self.solutions if not alone(i)] or list(self.solutions)

    def lesson(self, context, scoring):
        """One lesson more, or, once in a while, one less."""
        instruction, lessons = lessons_of(context.system)
        new = [s for s in self.sentences if s not in context.system]
        if lessons and (not new or self.rng.random() < 1 / 4):
            lessons.remove(self.rng.choice(lessons))
        elif new:
            lessons.append(self.rng.choice(new))
        return fill(with_lessons(instruction, lessons), context.examples, self.count_tokens, self.prompt_tokens)

    def example(self, context, scoring):
        """Other worked examples, with their working where it is known, as many as fit: for a small model their number counts more
        than which they are (bench/examples.py)."""
        ids = {self.solution(i).question: i for i in self.solutions}
        restored = lambda e: self.solution(ids[e.question]) if e == answer_alone(e) and e.question in ids else e
        return self.fit(context.system, list(map(restored, self.draw_examples(context, scoring, self.worked()))))

    def brief(self, context, scoring):
        """Like `example`, without their working. Whether this helps is for the task and the model to say (bench/examples.py)."""
        return self.fit(context.system, list(map(answer_alone, self.draw_examples(context, scoring, self.solutions))))

    def draw_examples(self, context, scoring, problem_ids):
        """Some of the old examples, or none, joined by new ones: none of a problem that is about to score the prompt, or whose
        likelihood does."""
        old = list(context.examples)
        stay = self.rng.sample(old, self.rng.choice([len(old), max(0, len(old) - 1), len(old) // 2, 0]))
        excluded = scoring | {e.question for e in old} | {p.question for p, _ in self.probes}
        pool = [problem_id for problem_id in problem_ids if self.solution(problem_id).question not in excluded]
        counts = [2, 8, len(pool), len(pool)] + [0] * (len(stay) < len(old))      # often all, of which `fit` takes what has room
        added = self.rng.sample(pool, min(len(pool), self.rng.choice(counts)))
        return stay + [self.solution(problem_id, self.rng.random() < 1 / 4) for problem_id in added]

    def merge(self, context, scoring):
        """With another prompt's lessons and examples too."""
        others = [c for c in self.contenders if c.context != context]
        other = self.rng.choice(others or self.contenders)              # with itself alone there is nothing new to propose
        (instruction, lessons), (_, more) = lessons_of(context.system), lessons_of(other.context.system)
        lessons += [lesson for lesson in more if lesson not in lessons]
        excluded = scoring | {e.question for e in context.examples}
        new = [e for e in other.context.examples if e.question not in excluded]
        if not new and with_lessons(instruction, lessons) == context.system:
            return context
        merged = self.fit(with_lessons(instruction, lessons), [*context.examples, *new])
        self.partner[merged] = other.id
        return merged

    def fit(self, system, examples):
        """As many as fit, in random order. Not the shortest first, though more would fit: short questions are alike
        (bench/examples.py compares the two)."""
        return fill(system, self.rng.sample(examples, len(examples)), self.count_tokens, self.prompt_tokens)

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self, keep):
        """Spends what is left on the most promising of those not yet known in full, and keeps the best that cover the frontier."""
        able = self.contenders + self.waiting             # accepted or carried; the others only fill empty places
        self.measure(sorted(able, key=self.promise, reverse=True), self.anchors)
        mean = {c: self.estimate(c) for c in self.candidates if c.scores[self.step] or c in self.contenders}
        complete = [c for c in able if not self.unasked(c, self.anchors)]

        # 1. Tied with the best are those within two standard errors of it: a lucky 2 of 48 is no better than 0 of 48. Of them the one
        #    under which known solutions are likeliest leads: likelihood tells few worked examples from many, which so few rewards
        #    cannot. Where 0 is level, too, `form_and_likelihood` decides. Only a candidate measured on all anchors can lead.
        top = max(map(mean.get, complete), default=0.0)
        tied = {c for c in complete if mean[c] >= top - self.margin(top)}
        likely = self.form_and_likelihood if self.unsolved(top) else self.known_logprob
        rank = lambda c: (c in tied, likely(c) if c in tied else 0, mean[c])

        # 2. A prompt less than half as good as the best would waste the rollouts that it gets: a better one takes its place, even a
        #    second time. Among the others `cover` goes by estimates: a single 0 or 1, drawn towards the candidate's mean as if by
        #    two more problems.
        half = max(mean[c] for c in able) / 2
        good = [c for c in mean if c in tied or mean[c] >= half]
        pool = [c for c in good if c in able]
        estimates = [[(c.scores[self.step].get(p.id, mean[c]) + 2 * mean[c]) / 3 for p in self.anchors] for c in pool]
        lengths = [self.count_tokens(c.context) for c in pool]
        kept = [pool[i] for i in cover(estimates, [rank(c) for c in pool], lengths, keep)]

        # 3. If those are fewer than `keep`: the best of the others that were asked, then repeats.
        kept += [c for c in sorted(good, key=mean.get, reverse=True) if c not in kept][:keep - len(kept)]
        kept += [kept[i % len(kept)] for i in range(keep - len(kept))]
        self.population.candidates, self.population.solutions = kept, dict(self.solutions)
        for c in self.candidates:
            if c.verdict != "rejected":
                problems = len(c.scores[self.step])
                place = f"kept as number {kept.index(c) + 1}" if c in kept else "not kept"
                told = (f"mean {c.mean(self.step):.2f} on {problems} problems, {sum(c.formed[self.step].values())} in form" if problems
                        else "asked no problem")
                c.reason = "; ".join(filter(None, [c.reason, told, place]))


# ---------------------------------------------------------------------------------------------------------------------
# The story of a run


def show(rows):
    """Rows of prompts.jsonl (Candidate.to_json) -> the family tree as text, each prompt with its last verdict, its mean at each
    weight step, and what it changed in its parent."""
    latest, means, children = {}, defaultdict(dict), defaultdict(list)
    for row in rows:
        latest[row["id"]] = row
        means[row["id"]].update(row["means"])
    for row in latest.values():
        children[next((i for i in row["parents"] if i in latest), None)].append(row)
    lines, todo = [], [(row, 0) for row in reversed(children.pop(None, []))]
    while todo:
        row, depth = todo.pop()
        indent = "    " * min(depth, 20)
        scores = "".join(f"; {mean:.2f} at step {step}" for step, mean in means[row["id"]].items() if mean is not None)
        second = f" with #{row['parents'][1]}" if len(row["parents"]) > 1 else ""
        lines.append(f"{indent}#{row['id']} {row['operator']}{second}: {row['verdict']} ({row['reason']}){scores}")
        text = row["changes"] if row["parents"] else readable(Context.from_json(row))
        lines += [f"{indent}    {line}" for line in text]
        todo += [(child, depth + 1) for child in reversed(children.pop(row["id"], []))]
    return printable("\n".join(lines))
