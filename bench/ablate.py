"""
fst.py with one thing changed that is no flag of it: an ablation. All flags are fst.py's.

  per-prompt      advantages within each prompt's rollouts, not over the whole group: what one prompt solves more often than another
                  no longer counts
  random-reward   the slow channel's rewards change places with each other at random (the logged reward and share of flat groups are of the
                  true ones); the fast channel's are the task's
  no-reuse        the rollouts of a slow step are never scores of the prompts
  no-solutions    of each problem only the answer is known: no feedback shows its working
  sft             supervised fine-tuning: a slow step raises the likelihood of its problems' reference solutions instead of the reward;
                  rollouts are sampled for the log alone
  self-taught     the same on what the rollouts themselves wrote where that led to the right answer, with the answer in its form below
                  it (`own_working` in reflect.py): STaR (arXiv 2203.14465) without its hints; a step without such a text moves nothing.
                  Of each problem only the answer is known

    python bench/ablate.py per-prompt --task arithmetic --seed 1
"""
import dataclasses
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fst
from reflect import own_working


def per_prompt(run):
    if run.config.loss == "dr_grpo":
        raise ValueError("per-prompt changes nothing of --loss dr_grpo, which does not use these advantages")
    over_group = fst.advantages

    def over_prompt(rewards):                             # [problems, group]; a prompt's rollouts of a problem are neighbours
        return over_group(rewards.reshape(-1, rewards.shape[1] // len(run.contexts(0)))).view_as(rewards)

    fst.advantages = over_prompt


def random_reward(run):
    reinforce = run.reinforce

    def with_coins(rollouts, rewards):
        order = random.Random(f"coins {run.config.seed} {run.steps_done()}").sample(range(rewards.numel()), rewards.numel())
        return reinforce(rollouts, rewards.flatten()[order].view_as(rewards))

    run.reinforce = with_coins


def no_reuse(run):
    run.population.record = lambda rollouts, step: None


def no_solutions(run):
    for task in run.tasks:
        task.splits = {split: [dataclasses.replace(p, solution=f"#### {p.answer}") for p in problems] for split, problems in task.splits.items()}


def sft(run, answer=lambda rollout: rollout.problem.solution):
    def supervised(rollouts, rewards):
        texts = {(r.problem, r.context, text): r for r in rollouts if (text := answer(r)) is not None}    # each once
        taught = [dataclasses.replace(r, tokens=run.tokenizer.turn(text)) for (*_, text), r in texts.items()]
        now = fst.score_all(run.model, [(r.prompt, r.tokens) for r in taught], 1.0, run.micro_batch)
        taught = [dataclasses.replace(r, logprobs=logprobs.tolist()) for r, logprobs in zip(taught, now)]
        total = sum(len(r.tokens) for r in taught)
        return run.descend(taught, lambda logprobs, _, i: -logprobs.sum() / total, {})

    run.reinforce = supervised


def self_taught(run):
    no_solutions(run)
    sft(run, own_working)


CHANGES = {"per-prompt": per_prompt, "random-reward": random_reward, "no-reuse": no_reuse, "no-solutions": no_solutions, "sft": sft,
           "self-taught": self_taught}


class Changed(fst.Run):
    changed = False

    def batch(self, task, step):
        if not self.changed:                              # at the first phase of this process: what was saved is read by then
            self.changed = True
            if self.config.method in ("gepa", "distill") and change not in ("no-reuse", "no-solutions"):
                raise ValueError(f"--method {self.config.method} does not use what {change} changes")
            CHANGES[change](self)
        return super().batch(task, step)


if __name__ == "__main__":
    change = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if change not in CHANGES:
        sys.exit(f"usage: ablate.py {{{','.join(CHANGES)}}} and fst.py's flags")
    fst.Run = Changed
    sys.exit(fst.main())
