"""
Fast-Slow Training (FST, arXiv 2605.12484) in one process: a language model learns a task through two channels at once.

  fast weights   a population of K prompts (instruction, lessons, worked examples), evolved by reflection on the text of
                 the rollouts and of their grading                                              -> reflect.py
  slow weights   the parameters theta, moved by the reward alone                                 -> below

One cycle: look ahead at the next T batches of problems; evolve the K prompts on them, theta frozen; then T optimizer steps,
prompts frozen. In a step every problem gets a group of G rollouts, G / K under each prompt phi, and

    A_i  = (r_i - mean(r)) / (std(r) + eps)                     over the whole group, across prompts
    L    = E[ - sg(min(rho_t, cap)) * A_i * log pi_theta(y_t | x, phi_i, y_<t) ],   rho_t = pi_theta / mu         (CISPO)
         + E[ beta / 2 * (log pi_theta - log pi_base)^2 ]         with the gradient of beta * KL(pi_theta || pi_base), token by token

over the groups whose rewards differ; the second term under one of the prompts, drawn for each step. sg: no gradient; mu: the policy
that sampled, whose log-probs the sampler recorded; pi_base: the model before training; beta: --kl.
So the prompt takes up quickly what is specific to the task, and the parameters need to move less.

    python fst.py                       SmolLM2-135M learns word problems, on whatever this machine has
    python fst.py --task gsm8k          GSM8K
    python fst.py --check               says what would run, and what it takes, and why each default is what it is
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
import timeit
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import reflect
from model import KEPT_KEYS, Refused, load, out_of_memory, reading, refuse, replace_file, return_freed_memory, save
from rollout import LEAST_TEMPERATURE, TASKS, Context, Sampler, ask, divergence, examine, get_task, prefix_runs, read_context, score

# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration: one flag per field


REFUSALS = 5              # the run ends after so many updates in a row that are not finite
LEAST_MICRO_BATCH = 64    # tokens
MOST_MICRO_BATCH = 16384  # tokens; more is no faster
QUESTION = 128            # tokens of a question, for planning: at least so many
SLOW, EVALUATE, EVOLVE, REFLECT = 1, 2, 3, 4      # in the seeds of the sampler: each purpose has random numbers of its own
RESUME_FLAGS = {"micro_batch", "slots", "memory", "out"}  # may change when a run is resumed: results change by rounding at most
EVAL_FLAGS = {"task", "level", "data", "seed_prompt", "max_new_tokens", "device", "slots", "micro_batch", "memory", "eval_problems",
              "eval_samples"}                             # settings of a run that --eval may override
MOST = 1_000_000          # of any number that names no limit of its own: a configuration may come from a stranger
STATE = "state/state.safetensors"                         # in a run's folder
METHODS = ("fst", "rl", "gepa", "distill", "rl+gepa", "gepa+rl")
LOSSES = {"cispo": (0.0, None), "grpo": (0.8, 1.2), "dapo": (0.8, 1.28), "dr_grpo": (0.8, 1.2)}       # clip range; None: --cap


def setting(default, meaning, source="ours", choices=None, zero=False, most=MOST):
    """A field that is a flag: a text, one of `choices` if given; or a number above 0 (zero: or 0 itself) and at most `most`."""
    about = {"help": meaning, "source": source, "choices": choices, "zero": zero, "most": most}
    return dataclasses.field(default=default, metadata=about)


@dataclass
class Config:
    # what is learnt, by whom
    task: str = setting("arithmetic", f"one of {', '.join(TASKS)}, with its argument (jsonl:FILE); or several, a,b,c, in turn")
    level: int = setting(1, "difficulty of a generated task")
    method: str = setting("fst", f"one of {', '.join(METHODS)}", "paper: fst", choices=METHODS)
    model: str = setting("auto", "a Hub id, a Hugging Face directory, a .gguf file, or smollm2-135m")
    why_model: str = ""                                   # no flag: why this model, for the record
    seed_prompt: str = setting("", "to start from, a text or a file: a system prompt, or JSON with examples; empty: the task's own (of "
                                   "several, prompts evolve from the first one's)")
    data: str = setting("", "folder of the task's data; empty: $FST_DATA, the cache, a download")
    seed: int = setting(0, "of everything random", zero=True, most=math.inf)
    device: str = setting("auto", "cpu, cuda, cuda:1; auto: cuda where there is one")
    dtype: str = setting("auto", "float32 or bfloat16, of all but the master weights; auto: on a CPU the faster, else bfloat16",
                         choices=("auto", "float32", "bfloat16"))
    # the cycle
    steps: int = setting(None, "slow steps, for each task", "paper: not known; ours by device and task")
    cycle: int = setting(6, "T: slow steps in a cycle", "paper")
    batch: int = setting(None, "problems in a slow step", "paper: 32; on a CPU 8")
    group: int = setting(None, "G: rollouts of a problem", "paper: not known; ours 16, on a CPU 12")
    prompts: int = setting(None, "K: prompts in the population", "paper: 4; on a CPU 2")
    # sampling
    max_new_tokens: int = setting(None, "limit of an answer", "paper: not known; ours by device and task")
    temperature: float = setting(1.0, "of the rollouts of both channels; no truncation, so that the loss knows the sampling policy")
    slots: int = setting(None, "rows decoded at once", "ours by device")
    # slow weights
    loss: str = setting("cispo", f"one of {', '.join(LOSSES)}", "paper", choices=LOSSES)
    cap: float = setting(4.0, "CISPO's cap on the importance weight", "paper", most=math.inf)
    lr: float = setting(4e-5, "AdamW's learning rate at its highest; it falls linearly towards 0 over a task's steps",
                        "paper: not known; SmolLM2 learns well at it, larger models want less", most=1)
    clip: float = setting(1.0, "largest norm of the gradient", "usual", most=math.inf)
    warmup: int = setting(None, "updates of linear warm-up", "paper: 10; ours at most a quarter of the steps", zero=True)
    kl: float = setting(0.001, "coefficient of the KL to the base model", "paper; how it enters the loss is ours", zero=True)
    micro_batch: int = setting(None, "tokens in one forward and backward pass; auto (0): as many, and as many slots, as fit",
                               "ours: auto; 1280 where arithmetic trains on a CPU", zero=True)
    memory: float = setting(None, "GB of memory that auto may fill", "ours: nine tenths of what is free on the card, 8 on a CPU",
                            most=math.inf)
    # fast weights
    passes: float = setting(5.0, "budget of a fast phase, in rollouts per problem of the cycle: at 5 up to 3 measure the old prompts, "
                                 "the others search for new ones", "paper: 960 over 192")
    prompt_tokens: int = setting(None, "longest context that is proposed", "ours by device, task and method")
    reflection_tokens: int = setting(None, "limit of what the reflector writes", "ours by device")
    reflector: str = setting("self", "who rewrites: self, the current weights; base, the frozen starting weights; or another model's name",
                             "paper: another frozen model")
    # evaluation and files
    eval_every: int = setting(None, "slow steps between evaluations; 0: only at the start, at a task's end and, with gepa and the two "
                                    "orders, around fast phases", "ours: the cycle's length", zero=True)
    eval_problems: int = setting(None, "problems in an evaluation; of the test problems twice as many", "ours by device")
    eval_samples: int = setting(None, "sampled answers per problem beside the greedy one", "paper: mean@4; on a CPU 1")
    save_every: int = setting(None, "slow steps between saved states", "ours: the cycle's length")
    out: str = setting("", "the run's folder; empty: runs/TASK-METHOD-SEED")


FLAGS = [field for field in dataclasses.fields(Config) if field.metadata]

# What the fields above that are None become on each kind of device, where no flag says it.
ON_CPU = dict(steps=24, batch=8, group=12, prompts=2, max_new_tokens=128, slots=128, micro_batch=0, prompt_tokens=1024,
              reflection_tokens=96, eval_problems=64, eval_samples=1, memory=8.0)
ON_CUDA = dict(steps=200, batch=32, group=16, prompts=4, max_new_tokens=256, slots=512, micro_batch=0, prompt_tokens=2048,
               reflection_tokens=1024, eval_problems=256, eval_samples=4)


def task_names(text):
    """a,b,c -> its tasks. A comma that no task's name follows belongs to an argument: jsonl:a,b.jsonl is one task."""
    return re.split(f",(?=(?:{'|'.join(TASKS)})(?:[:,]|$))", text)


def flag(name):
    return f"--{name.replace('_', '-')}"


def resolve(config):
    """Fills in what depends on the device and the task, and refuses what makes no sense."""
    c = dataclasses.replace(config)
    names = task_names(c.task)
    for name in names:
        refuse(name.partition(":")[0] not in TASKS, f"unknown task {name!r}: known are {', '.join(TASKS)}")
    for field in FLAGS:
        value, known = getattr(c, field.name), field.metadata["choices"] or ()
        refuse(known and value not in known, f"unknown {flag(field.name)} {value!r}: known are {', '.join(known)}")
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if c.device == "auto":
        c.device = "cuda" if cards else "cpu"
    refuse(c.device not in ("cpu", *cards) and not (cards and c.device == "cuda"),
           f"no device {c.device!r} here: PyTorch finds {', '.join(['cpu', *cards])}")
    cpu = c.device == "cpu"
    defaults = (ON_CPU if cpu else ON_CUDA) | {"eval_every": c.cycle, "save_every": c.cycle}
    if not cpu:
        torch.cuda.set_device(torch.device(c.device).index or 0)      # a graph is recorded on the current device
        free, total = torch.cuda.mem_get_info(c.device)
        ours = torch.cuda.memory_reserved(c.device)                   # where this process has run something before
        torch.cuda.set_per_process_memory_fraction(0.95 * (free + ours) / total)      # the rest is for cuBLAS and the graphs
        defaults["memory"] = 0.9e-9 * (free + ours - torch.cuda.memory_allocated(c.device))
    if set(names) == {"arithmetic"}:                      # learnt in few steps, with short answers
        defaults["steps"] = 9 if cpu else 48
        if c.level == 1:
            defaults["max_new_tokens"] = 32
        if cpu and c.method != "gepa":                    # every training step runs all contexts: keep them short
            defaults |= {"prompt_tokens": 320, "micro_batch": 1280 if c.memory is None else 0}
    for field, value in defaults.items():
        if getattr(c, field) is None:
            setattr(c, field, value)
    c.warmup = min(10, c.steps // 4) if c.warmup is None else c.warmup
    if c.model == "auto":
        c.model, c.why_model = choose_model(c)
    c.why_model = c.why_model or "as asked"
    c.out = c.out or f"runs/{c.task.translate(str.maketrans(':/,', '--+'))}-{c.method}-{c.seed}"
    refuse(os.path.exists(c.out) and not os.path.isdir(c.out), f"--out {c.out} is no folder")
    refuse_nonsense(c)
    if c.dtype == "auto":                                 # last, as measuring takes a moment
        c.dtype = max(cpu_speed(), key=cpu_speed().get) if cpu else "bfloat16"
    return c


def refuse_nonsense(c):
    """The limits of each number, and what goes together."""
    for field in [field for field in FLAGS if field.type is not str]:
        value, zero, most = getattr(c, field.name), field.metadata["zero"], field.metadata["most"]
        refuse(not (value > 0 or value == 0 and zero), f"{flag(field.name)} must {'not be negative' if zero else 'be above 0'}, and is {value}")
        refuse(value > most, f"{flag(field.name)} must be at most {most:,}")
    for one, other in (("batch", "group"), ("eval_problems", "eval_samples")):
        refuse(getattr(c, one) * getattr(c, other) > MOST, f"{flag(one)} times {flag(other)} must be at most {MOST:,}")
    refuse(c.temperature < LEAST_TEMPERATURE, f"--temperature must be at least {LEAST_TEMPERATURE}")
    refuse(c.method not in ("rl", "gepa") and c.group % c.prompts,
           f"each of the {c.prompts} prompts gets an equal share of a group: "
           f"--group {c.group} must be a multiple of --prompts {c.prompts}")
    refuse(c.method not in ("gepa", "distill") and c.group < 2,
           "--group 1 leaves a rollout nothing to be compared with, and every advantage 0: it must be at least 2")
    refuse(c.method != "rl" and c.passes < 1,
           f"--passes {c.passes} does not even measure one prompt on the cycle's problems: it must be at least 1")


def count_weights(model):
    return sum(p.numel() for p in model.parameters())


def plan(c, m, weights, question=0, prompt=0, reflector=0):
    """What a run takes -> (bytes by purpose, tokens of a micro-batch, slots). A given micro-batch is taken as it is, and the slots with
    it; under auto both are as many as fit into c.memory. m: the model's configuration; weights, reflector: numbers of weights, of the
    model and of a separate reflector; question, prompt: tokens of the longest question and, for plain RL, of the seed prompt."""
    w, V, H, layers = 4 if c.dtype == "float32" else 2, m.vocab_size, m.hidden_size, m.num_layers     # w: bytes of a weight
    question = max(question, QUESTION)
    q, kv, answer = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, question + c.max_new_tokens
    K, context = (1, prompt) if c.method == "rl" else (c.prompts, c.prompt_tokens)
    trains = c.method != "gepa"                           # else the model is its own base, and only scores
    s = 4 if m.qkv_bias else w                            # bytes of a query's, a key's and a score's number
    cached = (s + w) * layers * kv                        # keys and values of a token
    scores = 4 * s * m.num_heads * min(m.context_length, context + answer)     # of a token over all that it sees, a layer at a time
    always = w * (weights + reflector) + trains * (w + 12) * weights     # the model, reflector and base; fp32 masters and two moments
    # sampling: oneDNN's copy of bf16 weights on a CPU; the contexts' keys and values; and for each row its keys and values, its
    # logits with two copies in fp32, and its question's scores in the prefill
    packed = w * max(weights, reflector) if c.device == "cpu" and w == 2 else 0
    contexts = cached * K * context
    row = cached * answer + (w + 8) * V + scores * question
    # training: gradients, those of the head and the embedding, and 128 rows of logits in fp32; and for each token what autograd
    # keeps, in each layer 4 vectors of the hidden size, 3 of the queries' and the keys' and 2 of the MLP's, on a CPU also scores, and
    # one more of the queries' and the keys'; its logits and one layer's scores, in `gepa`, too
    gradients = trains * (4 * weights + V * (2 * w * H + 12 * 128))
    kept = w * (4 * H + 3 * (q + kv) + 2 * m.intermediate_size) + (s - w) * (q + kv)
    if c.device == "cpu":
        kept += s * m.num_heads * min(KEPT_KEYS, context + answer) + w * (q + 2 * kv)
    token = trains * layers * kept + w * V + scores
    micro_batch, slots, room = c.micro_batch, c.slots, c.memory * 1e9 - always
    if not micro_batch:
        micro_batch = int(min(max((room - gradients) / token, LEAST_MICRO_BATCH), MOST_MICRO_BATCH))
        slots = int(min(max((room - packed - contexts) / row, 1), slots))
    sampling, training = always + packed + contexts + slots * row, always + gradients + micro_batch * token
    peak = max(sampling, training)
    if not c.micro_batch and peak > c.memory * 1e9:
        say(f"note: this takes at least {peak / 1e9:.1f} GB, more than the {c.memory:.1f} GB of --memory, and will be slow: "
            f"--slots {slots}, --micro-batch {micro_batch}")
    return {"always": always, "sampling": sampling, "training": training, "in all": peak}, micro_batch, slots


def choose_model(c):
    """--model auto, and why: SmolLM2-135M, but for gsm8k on CUDA Qwen2.5-0.5B, where it can be had."""
    if c.task == "gsm8k" and c.device != "cpu":
        from huggingface_hub import model_info, try_to_load_from_cache
        name = "Qwen/Qwen2.5-0.5B-Instruct"
        if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
            return name, "gsm8k on CUDA, and it is in the Hub's cache"
        try:
            model_info(name, timeout=5)
            return name, "gsm8k on CUDA with the Hub in reach"
        except Exception as error:      # whatever keeps the Hub out of reach, the smaller model needs none of it
            return "smollm2-135m", f"the Hub is out of reach ({type(error).__name__}): the package index has this one"
    return "smollm2-135m", "needs only the package index, and a CPU can train it"


@functools.cache
def cpu_speed():
    """FLOP/s of this CPU in each dtype, on matrices of a small transformer; measured once."""
    speed = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((1024, 512), (512, 1024)))
        speed[dtype] = 2 * 1024 * 512 * 1024 / min(timeit.repeat(lambda: a @ b, number=1, repeat=5))
    return speed


# ---------------------------------------------------------------------------------------------------------------------
# 2. The loss of the slow weights


def advantages(rewards):
    """rewards [problems, group] -> (r - mean) / (std + eps) within each group (GRPO, arXiv 2402.03300), std of the population;
    exactly 0 in a group whose rewards are all equal."""
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return scaled.masked_fill(flat, 0.0)                                                      # [problems, group]


def token_loss(kind, logprobs, behaviour_logprobs, advantages, cap=4.0):
    """Loss of each token of a rollout, all arguments of one shape, [tokens]; behaviour_logprobs are the sampler's."""
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}: known are {', '.join(LOSSES)}")
    ratio, (low, high) = (logprobs - behaviour_logprobs).exp(), LOSSES[kind]                  # rho = pi_theta / mu
    clipped = ratio.clamp(low, high or cap)
    if kind == "cispo":      # -sg(min(rho, cap)) A log pi: the gradient of log pi, weighted (arXiv 2506.13585, 2605.12484)
        return -clipped.detach() * advantages * logprobs
    # -min(rho A, clip(rho) A) (GRPO, arXiv 2402.03300; DAPO, more room above, 2503.14476; Dr. GRPO, other A and norm, 2503.20783)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def token_weights(kind, lengths, limit):
    """What each token's loss counts for. lengths: per group that carries signal, its rows' lengths in tokens -> per group, one
    weight per row. The divisors are counted over the whole batch, before any micro-batch: the split does not change the loss."""
    rows = sum(map(len, lengths))
    if kind == "grpo":       # mean over a row's tokens, then over rows
        return [[1 / (rows * n) for n in group] for group in lengths]
    if kind == "dapo":       # mean over all tokens
        return [[1 / sum(map(sum, lengths))] * len(group) for group in lengths]
    if kind == "dr_grpo":    # sum over tokens by a constant: length does not count
        return [[1 / (rows * limit)] * len(group) for group in lengths]
    return [[1 / (len(lengths) * sum(group))] * len(group) for group in lengths]    # mean over a group's tokens, then over groups


# ---------------------------------------------------------------------------------------------------------------------
# 3. The slow weights' optimizer, and log-probs in micro-batches


class Learner:
    """AdamW on fp32 master weights. The model's own weights, in the dtype it computes in, are a rounded copy that every update
    refreshes in place: at a learning rate of 1e-6 an update is smaller than bf16 can add to most weights."""

    def __init__(self, model, lr, warmup):
        self.model, self.lr, self.warmup, self.decay, self.updates = model, lr, warmup, 1.0, 0
        self.weights = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        for name, p in self.weights.items():
            p.register_post_accumulate_grad_hook(functools.partial(self.collect, self.masters[name]))

    def collect(self, master, p):
        """Gradients of micro-batches add up in fp32."""
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def clip(self, most):
        """Scales the gradient down to a norm of `most` if it is larger: where few groups carry signal it is large, but no better.
        Returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.masters.values(), most).item()

    def discard(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)            # what a backward pass left that did not get to its end
        for state in self.optimizer.state.values():
            if len(state) < 3:                            # step and both moments: memory ran out while the first update made them
                state.clear()

    def rate(self):
        return self.lr * self.decay * min(1.0, (self.updates + 1) / max(self.warmup, 1))

    @torch.no_grad()
    def update(self):
        """One step of AdamW. It allocates (the moments, the first time) before any weight changes: out of memory ruins nothing."""
        self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.step()
        self.updates += 1
        self.discard()
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        for name, p in self.weights.items():
            p.copy_(self.masters[name])

    def finite(self):
        return torch.stack([m.sum() for m in self.masters.values()]).isfinite().all().item()      # a sum keeps NaN and Inf

    def tensors(self):
        """Everything that an update depends on, for the saved state."""
        moments = {f"{key}.{name}": value for name, m in self.masters.items() for key, value in self.optimizer.state[m].items()}
        return {f"master.{name}": m for name, m in self.masters.items()} | moments

    def restore(self, read, updates):
        """read(name) -> tensor, for the names that `tensors` gave: moments only after a first update."""
        self.updates = updates
        for name, m in self.masters.items():
            m.copy_(read(f"master.{name}"))
            if updates:
                self.optimizer.state[m] = {key: read(f"{key}.{name}").to(m.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        self.refresh()


def micro_batches(rows, limit):
    """Indices of rows (prompt, tokens) in batches of about `limit` tokens. Rows under one context stay together while they fit,
    so that its tokens are run once; where they do not, they are split evenly."""
    under = defaultdict(list)                             # prompt -> its rows, short ones first
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][1])):
        under[tuple(rows[i][0])].append(i)
    prompts, batches, room = sorted(under), [], 0         # room: tokens that the last batch may still take
    for start, stop, prefix in prefix_runs(prompts):
        costs = []                                        # (row, tokens that it adds to a batch)
        for prompt in prompts[start:stop]:
            first, *others = under[prompt]                # the first also brings what the prompt does not share
            costs.append((first, len(prompt) - prefix + len(rows[first][1])))
            costs += [(i, len(rows[i][1])) for i in others]
        total, done = sum(cost for _, cost in costs), 0
        if prefix + total <= room:                        # they all fit the last batch
            batches[-1] += [i for i, _ in costs]
            room -= prefix + total
            continue
        # New batches, evenly filled. Under a context nearly as long as the limit, or longer, rows still get a quarter of it.
        new = [[] for _ in range(math.ceil(total / max(limit - prefix, limit // 4, 1)))]
        for i, cost in costs:
            new[done * len(new) // total].append(i)
            done += cost
        batches += new
        room = limit - prefix - total // len(new)
    return [batch for batch in batches if batch]


@torch.no_grad()
def in_micro_batches(function, rows, limit):
    """Runs function(rows) -> [their tokens], values token by token and row after row, on one micro-batch after another, without
    gradient. Gives the values back row by row: a list of [tokens], in the order of `rows`."""
    out = [None] * len(rows)
    for batch in micro_batches(rows, limit):
        values = function([rows[i] for i in batch])
        for i, part in zip(batch, values.split([len(rows[i][1]) for i in batch])):
            out[i] = part
    return out


def score_all(model, rows, temperature, limit):
    """The log-probs of score(), [tokens] per row."""
    return in_micro_batches(lambda part: score(model, part, temperature)[0], rows, limit)


def drift(model, base, rollouts, limit):
    """KL(model || base) on the model's own rollouts, each under its own prompt: mean over their tokens, nats. Exact over the
    vocabulary at every token: `kl_k3` of few answers is mostly noise, as one unlikely token outweighs all others."""
    if model is base:
        return 0.0
    rows = [(r.prompt, r.tokens) for r in rollouts]
    return torch.cat(in_micro_batches(lambda part: divergence(model, base, part), rows, limit)).mean().item()


def kl_k3(logprobs, other):
    """KL(pi || other) from samples of pi, per token: exp(d) - 1 - d, d = log other - log pi. Never negative, 0 only where they
    agree (Schulman, joschu.net/blog/kl-approx.html). For measuring only: its gradient is not that of the KL."""
    d = (other - logprobs).double()                       # in fp32 the difference of sampler and trainer, 1e-7, would be lost
    return d.expm1() - d


# ---------------------------------------------------------------------------------------------------------------------
# 4. A run: its schedule, its two kinds of phase, its folder


def schedule(config):
    """The run as a list of (phase, task's index, number): ("fast", i, cycle) or ("slow", i, step).

    Every method draws the same problems in the same order, and those with both channels spend the same budget on each."""
    phases = []
    for i in range(len(task_names(config.task))):
        slow = [("slow", i, step) for step in range(config.steps)]
        fast = [("fast", i, cycle) for cycle in range(math.ceil(config.steps / config.cycle))]
        in_turn = []                                      # fst and distill: each fast phase before the steps of its cycle
        for cycle, phase in enumerate(fast):
            in_turn += [phase, *(slow[step] for step in steps_of(config, cycle))]
        phases += {"rl": slow, "gepa": fast, "rl+gepa": slow + fast, "gepa+rl": fast + slow}.get(config.method, in_turn)
    return phases


def steps_of(config, cycle):
    """The slow steps of a cycle; the last one may have fewer."""
    return range(cycle * config.cycle, min((cycle + 1) * config.cycle, config.steps))


def tasks_of(c, trained=False):
    """The configuration's tasks, in turn. Refused are two files of one name and, unless the run is only evaluated (`trained`), a task
    with fewer training problems than one batch."""
    tasks = [get_task(name, c.level, c.data, c.seed_prompt or None) for name in task_names(c.task)]
    refuse(len({task.name for task in tasks}) < len(set(task_names(c.task))),
           f"two of the tasks {c.task} have one name: rename a file")
    for task in tasks:
        refuse(not trained and c.batch > len(task.problems("train")),
               f"--batch {c.batch} is more than {task.name} has training problems")
    return tasks


def room_for_prompts(c, tasks, tokenizer, context):
    """Tokens of (the longest question, the longest prompt): in plain RL the seed prompt, else --prompt-tokens, or less where the model's
    context leaves less beside question and answer. Refused is a model whose context is too short for the seed prompt."""
    problems = [problem for task in tasks for split in task.splits.values() for problem in split]
    question = max(len(tokenizer.encode(problem.question)) for problem in problems)
    longest = max(len(task.seed_context.prompt(tokenizer)) for task in tasks)
    refuse(longest + question + c.max_new_tokens > context,
           f"a seed prompt of {longest} tokens, a question of {question} and an answer of {c.max_new_tokens} "
           f"(--max-new-tokens) do not fit the model's context of {context}")
    if c.method == "rl":
        return question, longest
    refuse(longest > c.prompt_tokens,
           f"a seed prompt of {longest} tokens leaves none of --prompt-tokens {c.prompt_tokens} to evolve it in")
    if longest > c.prompt_tokens / 2:
        say(f"note: the seed prompt takes {longest} of --prompt-tokens {c.prompt_tokens}, which leaves little room for examples")
    return question, min(c.prompt_tokens, context - c.max_new_tokens - question)


def refuse_mute(name, tokenizer):
    """Refused is a model that cannot be asked, or cannot end its answer."""
    with reading(name):
        Context("").prompt(tokenizer)
        refuse(tokenizer.turn_end is None, "it names no token that ends an answer: its tokenizer needs an eos_token")


def load_inputs(c):
    """What a run begins with, or its refusal -> (tasks, model, tokenizer, tokens of the longest question, of the longest prompt, another
    model and its tokenizer to write the rewrites, or None)."""
    place = c.device, getattr(torch, c.dtype)
    tasks, (model, tokenizer), other = tasks_of(c), load(c.model, *place), None
    refuse_mute(c.model, tokenizer)
    question, prompt = room_for_prompts(c, tasks, tokenizer, model.config.context_length)
    if c.method != "rl":
        if c.reflector not in ("self", "base"):
            other = load(c.reflector, *place)
            refuse_mute(c.reflector, other[1])
        context = (other or [model])[0].config.context_length
        refuse(c.reflection_tokens >= context,
               f"--reflection-tokens {c.reflection_tokens} leaves nothing of the reflector's context of {context} to reflect on")
    return tasks, model, tokenizer, question, prompt, other


class Run:
    """All that a run holds between two phases. `save` and `restore` take it to its folder and back, to the bit."""
    JOURNALS = ("metrics.jsonl", "prompts.jsonl", "rollouts.jsonl")
    PLAIN = ("done", "spent", "refused", "finished")      # plain values in the saved state

    def __init__(self, config, trained=None):
        """trained: a checkpoint to evaluate; then nothing is learnt."""
        c = self.config = config
        self.folder, self.state_file = Path(c.out), Path(c.out, STATE)
        self.phases = schedule(c)
        if trained:
            self.tasks, self.learner, self.prompt_tokens, question = tasks_of(c, trained), None, 0, 0
            place = c.device, getattr(torch, c.dtype)
            (self.base, self.tokenizer), (self.model, _) = load(c.model, *place), load(str(trained), *place)
            c, more = dataclasses.replace(c, method="gepa"), count_weights(self.model)      # to plan for: two models that only score
        else:
            self.tasks, self.model, self.tokenizer, question, self.prompt_tokens, other = load_inputs(c)
            trains = c.method != "gepa"
            self.base = copy.deepcopy(self.model).requires_grad_(False) if trains else self.model
            self.learner = Learner(self.model, c.lr, c.warmup) if trains else None
            self.reflector = other or (self.base if c.reflector == "base" else self.model, self.tokenizer)
            more = count_weights(other[0]) if other else 0
            # A resumed run must find these unchanged.
            models = {f"the model {c.model}": self.model} | ({f"the reflector {c.reflector}": other[0]} if other else {})
            self.origin = {f"the data of {c.task}": digest(repr([task.splits for task in self.tasks]))}
            self.origin |= {what: digest("", sorted(model.named_parameters())) for what, model in models.items()}
        _, self.micro_batch, slots = plan(c, self.model.config, count_weights(self.model), question, self.prompt_tokens, more)
        self.sampler = Sampler(self.model, self.tokenizer, slots)
        self.done = 0                                     # phases behind us
        self.spent = {"slow_rollouts": 0, "fast_rollouts": 0, "slow_tokens": 0, "fast_tokens": 0}
        self.refused = 0                                  # updates in a row that were not finite
        self.finished = False                             # the test problems have been read
        self.population = reflect.Population([self.tasks[0].seed_context])
        self.stop = False

    def count_tokens(self, context):
        return len(context.prompt(self.tokenizer))         # around an empty question

    # -- phases ----------------------------------------------------------------------------------------------------

    def batch(self, task, step):
        """The problems of a task's slow step, a function of (seed, task, step): epochs of the training problems, shuffled; what
        does not fill a last batch is left out of that epoch."""
        problems, size = self.tasks[task].problems("train"), self.config.batch
        epoch, index = divmod(step, len(problems) // size)
        shuffled = random.Random(f"{self.config.seed} {task} {epoch}").sample(problems, len(problems))
        return shuffled[index * size:(index + 1) * size]

    def contexts(self, task):
        """What the slow phase asks under: the K prompts as they are, whatever task evolved them; in plain RL the seed prompt."""
        return [self.tasks[task].seed_context] if self.config.method == "rl" else self.population.contexts

    def slow(self, task, step):
        """One batch, one update: rollouts under every prompt, advantages over the group, the loss, AdamW."""
        c, start = self.config, time.perf_counter()

        # 1. Sample and grade.
        contexts, problems = self.contexts(task), self.batch(task, step)
        shared = [context for context in contexts for _ in range(c.group // len(contexts))]      # [group]: G / K samples under each
        student = self.tasks[task].seed_context           # all that distill's student is given
        jobs = [(student if c.method == "distill" else context, problem) for problem in problems for context in shared]
        rollouts = ask(self.sampler, self.tasks[task], jobs, c.max_new_tokens, c.temperature, (c.seed, task, SLOW, step), "sample")
        self.population.record(rollouts, self.learner.updates)
        return_freed_memory()                             # training wants blocks of other sizes
        sampled = time.perf_counter()

        # 2. Train.
        self.learner.decay = 1 - step / c.steps           # at a constant rate the entropy collapses, then accuracy
        rewards = torch.tensor([r.reward for r in rollouts]).view(len(problems), c.group)
        if c.method == "distill":
            row = self.within_memory(lambda: self.distill(rollouts, shared * len(problems)))
        else:
            row = self.within_memory(lambda: self.reinforce(rollouts, rewards))

        # 3. Log. `shown`: of each group one answer, under the prompts in turn.
        share = c.group // len(contexts)
        places = [(i, i % len(contexts) * share) for i in range(len(problems))]
        shown = [(shared[j], rollouts[i * c.group + j]) for i, j in places]
        tokens = sum(len(r.tokens) for r in rollouts)
        self.spent["slow_rollouts"] += len(rollouts)
        self.spent["slow_tokens"] += tokens
        head = {"task": self.tasks[task].name, "step": self.steps_done() + 1}
        ids = {x.context: x.id for x in self.population.candidates}
        self.journal("rollouts.jsonl", *[{**head, "problem": r.problem.id, "prompt": ids.get(context), "question": r.problem.question,
                                          "text": r.text, "reward": r.reward, "feedback": r.feedback, "stopped": r.stopped}
                                         for context, r in shown])
        return {"kind": "step", **head, "reward": rewards.mean().item(),
                "flat": (rewards == rewards[:, :1]).all(1).float().mean().item(),
                "finished": sum(r.stopped for r in rollouts) / len(rollouts), "length": tokens / len(rollouts),
                **row, **self.spent,
                "sample_seconds": sampled - start, "train_seconds": time.perf_counter() - sampled,
                "tokens_per_second": tokens / max(sampled - start, 1e-9)}

    def reinforce(self, rollouts, rewards):
        """The update of every method but distill. rewards [problems, group], of the rollouts in their order."""
        c, scaled = self.config, advantages(rewards)
        signal = scaled.any(1)                                                    # [problems]; flat groups are dropped
        if c.loss == "dr_grpo":
            scaled = rewards - rewards.mean(1, keepdim=True)
        rollouts = [r for r, kept in zip(rollouts, signal.repeat_interleave(c.group).tolist()) if kept]
        scaled, lengths = scaled[signal].flatten().tolist(), [len(r.tokens) for r in rollouts]
        groups = [lengths[i:i + c.group] for i in range(0, len(lengths), c.group)]
        weights = [w for group in token_weights(c.loss, groups, c.max_new_tokens) for w in group]
        # The KL penalty is taken under one of the K prompts, drawn anew for each step, and counted K times: on average the same,
        # and the base model has one context to read, not K.
        K = len(self.population.contexts)
        drawn = random.Random(f"{c.seed} {self.steps_done()}").randrange(K)
        share = c.group // K                                                      # rollouts of a group under each prompt
        judged = [i for i in range(len(rollouts)) if c.kl and i % c.group // share == drawn]
        rows = [(rollouts[i].prompt, rollouts[i].tokens) for i in judged]
        reference = dict(zip(judged, score_all(self.base, rows, c.temperature, self.micro_batch)))

        def loss(logprobs, behaviour, i):                 # of rollout i, summed over its tokens
            out = token_loss(c.loss, logprobs, behaviour, torch.full_like(behaviour, scaled[i]), c.cap)
            if i in reference:
                # The gradient of a token's KL(pi || base), its prefix given, is E[(log pi - log base) grad log pi], that of half the
                # squared difference; k3's is another. That a token also changes what follows is left out (arXiv 2506.09477).
                out = out + c.kl * K * (logprobs - reference[i]) ** 2 / 2
            return weights[i] * out.sum()

        return self.descend(rollouts, loss, reference)

    def distill(self, rollouts, teachers):
        """Distils the prompted policy (the teacher, held still for this step) into the unprompted one (the student), on the student's
        own rollouts. A token's loss is (log pi - log teacher)^2 / 2, whose gradient is that of KL(pi || teacher): see `reinforce`."""
        c = self.config
        prompted = [(teacher.without(r.problem).prompt(self.tokenizer, r.problem.question), r.tokens)
                    for teacher, r in zip(teachers, rollouts)]
        reference = dict(enumerate(score_all(self.model, prompted, c.temperature, self.micro_batch)))
        total = sum(len(r.tokens) for r in rollouts)
        return self.descend(rollouts, lambda logprobs, _, i: ((logprobs - reference[i]) ** 2).sum() / 2 / total, reference)

    def descend(self, rollouts, loss, reference):
        """Sums the gradient of `loss` over all rollouts, micro-batch by micro-batch, and takes one step; without a rollout nothing
        moves, not even Adam's moments. loss(log-probs, the sampler's log-probs, i) is that of rollout i; reference: i -> its
        log-probs under the base model or distill's teacher, for the log. What is logged is of these rollouts: without flat groups."""
        if not rollouts:
            return {"trained_rows": 0, "updates": self.learner.updates}
        c, sums = self.config, dict.fromkeys(("loss", "entropy", "kl_sampler", "capped", "kl_reference"), 0.0)
        rows, lengths = [(r.prompt, r.tokens) for r in rollouts], [len(r.tokens) for r in rollouts]
        for batch in micro_batches(rows, self.micro_batch):
            logprobs, entropies = score(self.model, [rows[i] for i in batch], c.temperature)
            behaviour = torch.tensor([x for i in batch for x in rollouts[i].logprobs]).to(logprobs.device, non_blocking=True)
            sizes = [lengths[i] for i in batch]
            parts = logprobs.split(sizes)                                     # [tokens] of each rollout
            total = sum(map(loss, parts, behaviour.split(sizes), batch))
            total.backward()
            logprobs = logprobs.detach()
            sums["loss"] += total.detach().double()                           # not .item(): that would wait for the device
            sums["entropy"] += entropies.sum().double()
            sums["kl_sampler"] += kl_k3(behaviour, logprobs).sum()            # sampled from mu: KL(mu || pi)
            ratio, (low, high) = (logprobs - behaviour).exp(), LOSSES[c.loss]
            sums["capped"] += ((ratio < low) | (ratio > (high or c.cap))).sum()
            for part, i in zip(parts, batch):
                if i in reference:
                    sums["kl_reference"] += kl_k3(part.detach(), reference[i]).sum()
        row = {"loss": float(sums["loss"])}
        row |= {key: float(sums[key]) / sum(lengths) for key in ("entropy", "kl_sampler", "capped")}
        if reference:
            row["kl_reference"] = float(sums["kl_reference"]) / sum(lengths[i] for i in reference)
        row |= {"gradient_norm": self.learner.clip(c.clip), "lr": self.learner.rate()}
        row = self.update(row)
        return {"trained_rows": len(rollouts), "updates": self.learner.updates, **row}

    def update(self, row):
        """One step of AdamW; where the loss or the gradient is not finite none, which is better than weights of NaN. row: what is logged
        of this update, given back as it then is."""
        bad = [key.replace("_", " ") for key in ("loss", "gradient_norm") if not math.isfinite(row[key])]
        if bad:
            self.learner.discard()
            self.refused += 1
            row = {key: value for key, value in row.items() if math.isfinite(value)}
            row |= {"refused": f"the {bad[0]} is not finite", "refusals": self.refused}
            say(f"{row['refused']}: update refused ({self.refused} in a row)")
            return row
        self.learner.update()
        self.refused = 0
        if not self.learner.finite():                     # after a finite gradient only a damaged machine or file can cause this
            raise FloatingPointError(f"the weights are not finite after update {self.learner.updates}: "
                                     "the last good state is on disk, and the same command resumes from it")
        return row

    def within_memory(self, train):
        """train(); where memory does not suffice, once more from its start with micro-batches of half the tokens: the split does not
        change the loss, and nothing has moved before the update."""
        while True:
            try:
                return train()
            except RuntimeError as error:
                if not out_of_memory(error) or self.micro_batch < 2 * LEAST_MICRO_BATCH:
                    raise
            self.learner.discard()                        # not in the handler above, where the failed pass still holds its memory
            self.micro_batch //= 2
            torch.cuda.empty_cache()
            say(f"out of memory: repeating this step, and going on, with micro-batches of {self.micro_batch} tokens")

    def fast(self, task, cycle):
        """Evolves the population on the problems of the cycle's T batches, the weights held still."""
        c, start = self.config, time.perf_counter()
        anchors = [problem for step in steps_of(c, cycle) for problem in self.batch(task, step)]
        # A sampler of its own: its chats are the longest prompts of all, and when they run out of memory the answers keep their slots.
        reflector = Sampler(*self.reflector, self.sampler.slots)

        def ask_all(jobs, seed):
            rollouts = ask(self.sampler, self.tasks[task], jobs, c.max_new_tokens, c.temperature,
                           (c.seed, task, EVOLVE, cycle, seed), "evolve")
            self.spent["fast_tokens"] += sum(len(r.tokens) for r in rollouts)
            return rollouts

        def write(chats, seed):
            room = reflector.model.config.context_length - c.reflection_tokens
            prompts = [reflector.tokenizer.chat(chat)[-room:] for chat in chats]          # too long a chat loses its beginning
            replies = reflector.generate(prompts, c.reflection_tokens, 1.0, (c.seed, task, REFLECT, cycle, seed), "reflect")
            self.spent["fast_tokens"] += sum(len(reply.tokens) for reply in replies)
            return [(reflector.tokenizer.decode(reply.answer), reply.stopped) for reply in replies]

        def likelihood(answers):
            rows = [(context.prompt(self.tokenizer, p.question), self.tokenizer.turn(text)) for context, p, text in answers]
            return [logprobs.mean().item() for logprobs in score_all(self.model, rows, 1.0, self.micro_batch)]

        updates = self.learner.updates if self.learner else 0
        everyone, spent = reflect.evolve(
            self.population, anchors, ask_all, write, likelihood, self.count_tokens, budget=int(c.passes * len(anchors)),
            keep=c.prompts, step=updates, seed=f"{c.seed} {task} {cycle}", prompt_tokens=self.prompt_tokens)
        self.spent["fast_rollouts"] += spent
        kept, best = self.population.candidates, self.population.candidates[0].mean(updates)
        self.journal("prompts.jsonl", *[{"task": self.tasks[task].name, "cycle": cycle, "kept": x in kept, **x.to_json()}
                                        for x in everyone])
        return {"kind": "fast", "task": self.tasks[task].name, "cycle": cycle, "weights": updates, "candidates": len(everyone),
                "accepted": sum(x.verdict == "accepted" for x in everyone), "rollouts_used": spent,
                **({} if best is None else {"best": best}), "kept": [x.id for x in kept],
                "prompt_tokens": [self.count_tokens(x.context) for x in kept], **self.spent, "seconds": time.perf_counter() - start}

    # -- measuring -------------------------------------------------------------------------------------------------

    def steps_done(self):
        """Slow steps behind us; where there are none (gepa), the steps whose problems the fast phases have seen."""
        behind = self.phases[:self.done]
        if self.config.method == "gepa":
            return sum(len(steps_of(self.config, cycle)) for _, _, cycle in behind)
        return sum(kind == "slow" for kind, _, _ in behind)

    def held_out(self, task, split, count):
        """The problems of an evaluation: the same for every method and seed."""
        problems = self.tasks[task].problems(split)
        return random.Random(f"{split} evaluation").sample(problems, min(count, len(problems)))

    def evaluate(self, task, split, count):
        """Accuracy with the best prompt and with the seed prompt, greedy and sampled at temperature 1, and under each prompt the
        drift from the base weights. Wilson's intervals take a problem as one observation, however many answers to it were sampled:
        they are rather too wide than too narrow."""
        c, start, problems = self.config, time.perf_counter(), self.held_out(task, split, count)
        contexts = {"": self.contexts(task)[0], "seed_": self.tasks[task].seed_context}
        row = {"kind": "eval", "task": self.tasks[task].name, "split": split, "n": len(problems), "samples": c.eval_samples,
               "max_new_tokens": c.max_new_tokens, "step": self.steps_done(), **self.spent,
               "rollouts": self.spent["slow_rollouts"] + self.spent["fast_rollouts"]}
        distinct, answers = list(dict.fromkeys(contexts.values())), {}
        models = {"base_": self.base, "": self.model} if split == "test" else {"": self.model}
        for prefix, model in models.items():
            if model not in answers:                      # in gepa the trained weights are the base
                sampler = self.sampler if model is self.model else Sampler(model, self.tokenizer, self.sampler.slots)
                answers[model] = dict(zip(distinct, examine(sampler, self.tasks[task], distinct, problems, c.eval_samples,
                                                            c.max_new_tokens, (c.seed, task, EVALUATE), "evaluate")))
            for name, context in contexts.items():
                rewards = np.array([[r.reward for r in rollouts] for rollouts in answers[model][context]])  # [problems, answers]
                for key, values in (("greedy", rewards[:, 0]), ("mean", rewards[:, 1:].mean(1))):      # [problems]
                    row |= {f"{prefix}{name}{key}": values.mean(),
                            f"{prefix}{name}{key}_interval": wilson(values.sum(), len(problems))}
        kl_base = {}
        for context, rollouts in answers[self.model].items():
            sampled = [answer for _, answer, *_ in rollouts[::2]]         # the first sampled answer to every second problem
            kl_base[context] = drift(self.model, self.base, sampled, self.micro_batch)
        row |= {f"{name}kl_base": kl_base[context] for name, context in contexts.items()}
        row["seconds"] = time.perf_counter() - start
        return row

    # -- the folder ------------------------------------------------------------------------------------------------

    def log(self, row):
        self.journal("metrics.jsonl", row)
        say(describe(row))

    def journal(self, name, *rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self):
        """The checkpoint for others, then the state for ourselves: one file, renamed into place when it is whole. The journals'
        lengths are part of it, so that what was written after it can be cut off."""
        save(self.folder / "checkpoint", self.model, self.tokenizer)
        write_text(self.folder / "checkpoint" / "prompts.json", json.dumps(self.population.to_json(), indent=1))
        journals = {}
        for name in self.JOURNALS:
            with open(self.folder / name, "ab+") as file:
                os.fsync(file.fileno())
            content = (self.folder / name).read_bytes()
            journals[name] = len(content), hashlib.sha256(content).hexdigest()
        tensors = self.learner.tensors() if self.learner else {}
        state = {"config": dataclasses.asdict(self.config), "origin": self.origin, "population": self.population.to_json(),
                 "updates": self.learner.updates if self.learner else 0, "journals": journals,
                 "micro_batch": self.micro_batch,         # smaller than planned once memory ran out
                 **{name: getattr(self, name) for name in self.PLAIN}}
        self.state_file.parent.mkdir(exist_ok=True)
        text = json.dumps(state)
        about = {"run": text, "sha256": digest(text, sorted(tensors.items()))}
        replace_file(self.state_file, lambda temporary: save_file(tensors, temporary, about))

    def restore(self):
        # 1. The state, whole.
        with (reading(f"{self.state_file} is damaged: put a good copy there, or start anew with --overwrite"),
              safe_open(self.state_file, "pt") as file):
            text, tensors = file.metadata()["run"], ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            refuse(file.metadata()["sha256"] != digest(text, tensors), "its checksum is wrong")
            state = json.loads(text)
            config, origin, updates, micro_batch = (state[name] for name in ("config", "origin", "updates", "micro_batch"))
            journals, plain = {name: state["journals"][name] for name in self.JOURNALS}, {name: state[name] for name in self.PLAIN}
            population = reflect.Population.from_json(state["population"])

        # 2. What it was saved with must not have changed.
        changed = [self.folder / name for name, (length, sha256) in journals.items()
                   if hashlib.sha256((self.folder / name).read_bytes()[:length]).hexdigest() != sha256]
        kept = lambda settings: {name: value for name, value in settings.items() if name not in RESUME_FLAGS}
        if kept(vars(Config()) | config) != kept(vars(self.config)):               # a setting younger than the run had its default
            changed.append(self.folder / "config.json")
        else:                                             # of the same task and model
            changed += [what for what, before in origin.items() if self.origin[what] != before]
        if changed:
            raise Refused(f"{changed[-1]} was changed since the state was saved: undo that, or start anew with --overwrite")

        # 3. Go on from it.
        if self.learner:
            with reading(self.state_file), safe_open(self.state_file, "pt") as file:
                self.learner.restore(file.get_tensor, updates)
        vars(self).update(plain, population=population)
        if all(config[name] == getattr(self.config, name) for name in ("micro_batch", "memory")):      # else these are new
            self.micro_batch = micro_batch
        for name, (length, _) in journals.items():
            os.truncate(self.folder / name, length)

    def go(self):
        """Phase after phase until the schedule's end, or until asked to stop: True if it got there."""
        c = self.config
        if self.state_file.exists():
            self.restore()
            behind = f"going on after {self.done} of {len(self.phases)} phases"
            say(f"this run is complete: {self.folder} (--overwrite runs it anew)" if self.finished else behind)
        else:
            for name in self.JOURNALS:                    # of a run that was stopped before its first save
                (self.folder / name).write_text("")
            self.log(self.evaluate(0, "val", c.eval_problems))
            self.save()
        with tqdm(total=len(self.phases), initial=self.done, desc="run", unit="phase", smoothing=0.1) as bar:
            while self.done < len(self.phases) and not self.stop:
                kind, task, number = self.phases[self.done]
                row = (self.slow if kind == "slow" else self.fast)(task, number)
                self.done += 1
                bar.update()
                self.log(row)
                if self.refused >= REFUSALS:
                    raise FloatingPointError(f"{self.refused} updates in a row were refused (the last: {row['refused']}); "
                                             "the last good state is on disk: start anew with a lower --lr")
                self.after(kind, task)
                return_freed_memory()
        if self.stop:
            self.save()
            return False
        return self.finished or self.finish()

    def after(self, kind, task):
        """Evaluation and saving, where they are due. A task's last phase always evaluates that task and all earlier ones."""
        c, steps = self.config, self.steps_done()
        following = self.phases[self.done] if self.done < len(self.phases) else ("", None, 0)
        ends = following[1] != task
        outside = "fast" in (kind, following[0]) and c.method in ("gepa", "rl+gepa", "gepa+rl")
        if ends or outside or kind == "slow" and c.eval_every and steps % c.eval_every == 0:
            for each in range(task + 1) if ends else [task]:              # the earlier ones: are they forgotten?
                self.log(self.evaluate(each, "val", c.eval_problems))
        if ends or outside or steps % c.save_every == 0:
            self.save()

    def finish(self):
        """The test problems, read once: {base, trained weights} x {seed, evolved prompt}; and the curves. False if asked to stop before the last task."""
        for task in range(len(self.tasks)):
            if self.stop:                                 # the rows so far are cut off when the run goes on
                return False
            row = self.evaluate(task, "test", 2 * self.config.eval_problems)
            self.log(row)
            say(table(row))
        plot([self.folder], self.folder / "curves.png")
        self.finished = True
        self.save()
        return True

    def interrupt(self, *_):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        say("will save and stop after this phase; Ctrl-C again stops at once and keeps what was last saved")


def say(text):
    """To the terminal, above the progress bars, without control characters that a model may have written."""
    tqdm.write(reflect.printable(text))


def wilson(successes, n):
    """95% interval of a proportion (Wilson, JASA 22, 1927)."""
    z, p = 1.96, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)]      # rounding leaves it by 1e-17


def write_text(path, text):
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def digest(text, tensors=()):
    """sha256 of a text and of tensors, an iterable of (name, tensor): a saved state is read one tensor at a time."""
    out = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return out.hexdigest()


def table(row):
    cell = lambda key: f"{row[key + 'greedy']:6.1%} / {row[key + 'mean']:6.1%}"
    interval = lambda key: "{:.1%} to {:.1%}".format(*row[f"{key}_interval"])
    return (f"{row['task']}, {row['n']} {row['split']} problems: accuracy greedy / sampled at temperature 1\n"
            f"                     seed prompt        evolved prompt\n"
            f"  base weights       {cell('base_seed_')}    {cell('base_')}\n"
            f"  trained weights    {cell('seed_')}    {cell('')}\n"
            f"  95% intervals of the last two: {interval('greedy')}, {interval('mean')}")


def describe(row):
    value = lambda key: row.get(key, math.nan)            # a refused update lacks some
    if row["kind"] == "step":
        reference = f"KL reference {row['kl_reference']:.4f}  " if "kl_reference" in row else ""
        learnt = f"entropy {value('entropy'):.2f}  {reference}|grad| {value('gradient_norm'):.2f}  lr {value('lr'):.1e}"
        return (f"step {row['step']:5d}  reward {row['reward']:.3f}  flat {row['flat']:.0%}  finished {row['finished']:.0%}  "
                f"length {row['length']:.0f}  {learnt if row['trained_rows'] else 'no signal: nothing moves'}  "
                f"{row['tokens_per_second']:.0f} tok/s  {row['sample_seconds']:.0f}+{row['train_seconds']:.0f} s")
    if row["kind"] == "eval":
        return (f"eval  step {row['step']:4d}  {row['task']} {row['split']}, {row['n']} problems: "
                f"best prompt {row['greedy']:.1%} greedy, {row['mean']:.1%} sampled; "
                f"seed prompt {row['seed_greedy']:.1%}, {row['seed_mean']:.1%}; "
                f"KL to base {row['kl_base']:.4f}  ({row['seconds']:.0f} s)")
    best = f"best prompt's mean reward {row['best']:.3f}, " if "best" in row else ""
    return (f"fast {row['cycle']:5d}  {row['candidates']} candidates, {row['accepted']} accepted, {row['rollouts_used']} rollouts; "
            f"{best}kept {row['kept']}  {row['seconds']:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Curves


def read_text(path):
    """A run folder may be a stranger's: what is no regular file is not opened, as a pipe would never end."""
    refuse(not os.path.isfile(path), "it is not a file" if os.path.exists(path) else "there is no such file")
    return Path(path).read_text(encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in read_text(path).split("\n") if line]


GAINS = {"base_seed_mean": "neither", "seed_mean": "weights alone", "base_mean": "prompt alone", "mean": "both"}     # the 2x2


def read_points(folder):
    """What `plot` draws of a run: rows of evaluations on val (a list for each task), of evaluations on test, of slow steps."""
    path = Path(folder) / "metrics.jsonl"
    with reading(path):
        evals, tests, steps = defaultdict(list), [], []
        for row in read_rows(path):
            numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
            if row["kind"] == "step":
                steps.append(numbers)
            elif row["kind"] == "eval":
                (tests if row["split"] == "test" else evals[row["task"]]).append(numbers)
        return list(evals.values()), tests, steps


def plot(folders, path):
    """Accuracy against slow steps, all rollouts and drift; reward and entropy; who gained what: one colour per run."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 8), layout="constrained")
    by_step, by_rollouts, by_drift, reward, entropy, gains = axes.flat
    width = 0.8 / len(folders)

    def line(axis, rows, x, y, *style, **more):           # through the rows that have both
        rows = [row for row in rows if x in row and y in row]
        axis.plot([row[x] for row in rows], [row[y] for row in rows], *style, **more)

    for i, folder in enumerate(folders):
        evals, tests, steps = read_points(folder)
        colour, name = f"C{i % 10}", Path(folder).resolve().name.replace("$", r"\$").lstrip("_")      # with "_" it would be hidden
        for prefix, style, alpha, label in (("", "o-", 1, name), ("seed_", "o:", 0.5, f"{name}, seed prompt")):
            for axis, x in ((by_step, "step"), (by_rollouts, "rollouts"), (by_drift, f"{prefix}kl_base")):
                for n, rows in enumerate(evals):          # one label for all tasks
                    line(axis, rows, x, f"{prefix}mean", style, color=colour, alpha=alpha, label=None if n else label)
        line(reward, steps, "step", "reward", color=colour)
        line(entropy, steps, "step", "entropy", color=colour)
        for row in tests:                                 # one per task
            places = [k + (i + 0.5) * width - 0.4 for k in range(len(GAINS))]
            gains.bar(places, [row.get(key, math.nan) for key in GAINS], width, color=colour, alpha=1 / len(tests))
    accuracy = "validation accuracy, sampled"
    for axis, x, y in ((by_step, "slow steps", accuracy), (by_rollouts, "rollouts of both channels", accuracy),
                       (by_drift, "KL to the base model, nats a token", accuracy),
                       (reward, "slow steps", "reward of the training rollouts"), (entropy, "slow steps", "entropy, nats a token"),
                       (gains, "who gained what", "test accuracy, sampled")):
        axis.set(xlabel=x, ylabel=y, ylim=None if axis is entropy else (0, 1))
        axis.grid(alpha=0.3)
    gains.set_xticks(range(len(GAINS)), GAINS.values())
    if by_step.lines:
        by_step.legend(fontsize=8)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command line


def read_seed_prompt(value):
    """--seed-prompt, a text or a file's name, as the run keeps it: a text as it is, JSON reduced to its Context."""
    text = value
    if os.path.isfile(value):
        with reading(f"--seed-prompt {value}"):
            text = read_text(value).removeprefix("\ufeff").strip()
            refuse(value.endswith(".json") and not isinstance(json.loads(text or "{}"), dict), "not a JSON object")
        if not text:
            raise Refused(f"--seed-prompt {value} is an empty file")
    elif re.fullmatch(r"\S*/\S*|.*\.(txt|md|json)", value):
        raise Refused(f"--seed-prompt {value} looks like a file, and there is none")
    context = read_context(text)
    return text if context == Context(text) else json.dumps(dataclasses.asdict(context))


def tokens_or_auto(text):
    return 0 if text == "auto" else int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message} (--help lists the flags)")


def parse(argv):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for field in FLAGS:
        kind = tokens_or_auto if field.name == "micro_batch" else field.type
        default = "see --check" if field.default is None else field.default
        text = f"{field.metadata['help']} [{default}]".replace("%", "%%")
        parser.add_argument(flag(field.name), type=kind, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--overwrite", action="store_true", help="delete what the run's folder holds and start anew")
    parser.add_argument("--check", action="store_true", help="say what would run, and what it takes, and stop")
    parser.add_argument("--eval", metavar="RUN", help="accuracy of {base, trained weights} x {seed, evolved prompt} on the test "
                        f"problems; takes {', '.join(map(flag, sorted(EVAL_FLAGS)))}")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs' curves side by side into curves.png of the first")
    parser.add_argument("--show-prompts", metavar="RUN", help="the family tree of a run's prompts")
    options = vars(parser.parse_args(argv))
    actions = {key: options.pop(key) for key in ("overwrite", "check", "eval", "plot", "show_prompts")}
    if "seed_prompt" in options:
        options["seed_prompt"] = read_seed_prompt(options["seed_prompt"])
    return Config(**options), actions, options


def stored_config(folder, changes={}):
    """The configuration of the run in `folder`: (as asked for, as resolved). `changes` apply to the second, which is then checked like
    flags, as the folder may be a stranger's. On another device --memory, on another task or level --max-new-tokens become the default
    there: 32 tokens, enough for arithmetic, would cut off any answer to gsm8k."""
    path = Path(folder) / "config.json"
    with reading(f"{path} with {', '.join(map(flag, changes))}" if changes else path):
        stored = json.loads(read_text(path))
        asked, resolved = Config(**stored["asked"]), Config(**stored["resolved"])
        for field in dataclasses.fields(Config):
            if type(getattr(resolved, field.name)) is not field.type:
                raise Refused(f"{field.name} is not of type {field.type.__name__}")
        new = {name for name, value in changes.items() if value != getattr(resolved, name)}
        anew = ["memory"] * ("device" in new) + ["max_new_tokens"] * bool(new & {"task", "level"})
        return asked, resolve(dataclasses.replace(resolved, **dict.fromkeys(anew) | changes))


def write_config(folder, asked, resolved):
    write_text(folder / "config.json", json.dumps({"asked": vars(asked), "resolved": vars(resolved)}, indent=1))


def open_run(config, overwrite):
    """The resolved configuration of a new run, or of the one that the same command began, and the lock on its folder. Refused where
    another process holds it, or it has another run's or other people's files."""
    import fcntl
    resolved = resolve(config)
    folder = Path(resolved.out)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. The lock.
    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)      # let go by the system when the process ends, however it ends
    except BlockingIOError as error:
        raise Refused(f"another process is at work in {folder}") from error

    # 2. What a killed process left half written goes.
    first, rows, state = folder / "config.json", folder / "metrics.jsonl", folder / STATE
    ours = first.is_file() and b'"asked"' in first.read_bytes()           # a run's first file; other programs have one of this name, too
    begun = ours and (state.exists() or rows.is_file() and rows.read_bytes().count(b"\n") > 1)      # one row is older than any state
    for pattern in (".config.json.[0-9]*", ".curves.png.[0-9]*", "checkpoint/.*.[0-9]*", "state/.*.[0-9]*", "checkpoint/.tmp??????",
                    "state/.tmp??????") * ours:
        for leftover in folder.glob(pattern):                 # was being written when a run was killed; .tmp: by safetensors
            leftover.unlink()

    # 3. The same command goes on.
    if ours and not overwrite:
        before, stored = stored_config(folder)
        changed = {key: value for key, value in vars(config).items() if value != vars(before)[key]}
        if changed.keys() <= RESUME_FLAGS:
            refuse(begun and not state.exists(), f"{state} is gone: put it back, or start anew with --overwrite")
            # one of the limits given anew may change another's default, as --memory does --micro-batch's
            anew = RESUME_FLAGS if changed.keys() - {"out"} else {"out"}
            resolved = dataclasses.replace(stored, **{name: getattr(resolved, name) for name in anew})
            if changed:
                write_config(folder, config, resolved)
            return resolved, lock
        if begun:                                             # else nothing would be lost
            other = ", ".join(f"{key} {vars(before)[key]!r}, now {value!r}" for key, value in changed.items())
            raise Refused(f"{folder} holds a run with other settings ({other}): give another --out, or add --overwrite")

    # 4. A new run: other people's files are refused, a run's own deleted, but only for a command that can replace them.
    known = {"lock", "config.json", "checkpoint", "state", "curves.png", *Run.JOURNALS} if ours else {"lock"}
    theirs = [p for p in folder.iterdir() if p.name not in known and not p.name.startswith(".config.json.") or p.is_symlink()]
    theirs += [p for p in (folder.glob("*/*") if ours else ()) if p.is_dir()]
    names = ", ".join(sorted(str(p.relative_to(folder)) for p in theirs)[:3])
    refuse(theirs, f"{folder} holds other files ({names}): give another --out")
    for name in (resolved.model, resolved.reflector):
        refuse(os.path.exists(name) and folder.resolve() in Path(name).resolve().parents,
               f"{name} would be deleted with all else that {folder} holds: give another --out")
    if begun:
        load_inputs(dataclasses.replace(resolved, device="cpu"))
    for pattern in ("state/*", "curves.png", *Run.JOURNALS, "checkpoint/*"):      # the last may be of another model, with other files
        for file in folder.glob(pattern):
            file.unlink()
    write_config(folder, config, resolved)
    return resolved, lock


def check(config):
    """What a run would be: every setting with where its default comes from, and the rollouts, memory and time it may take."""
    c = resolve(config)
    _, model, _, question, prompt, other = load_inputs(dataclasses.replace(c, device="cpu"))
    for field in FLAGS:
        value, source = getattr(c, field.name), field.metadata["source"]
        print(f"{field.name:18} {value!s:28} {'as asked' if getattr(config, field.name) != field.default else source}")
    print(f"{'why this model':18} {c.why_model}")
    weights, m = count_weights(model), model.config
    phases = schedule(c)
    steps = sum(kind == "slow" for kind, _, _ in phases)
    slow = steps * c.batch * c.group
    fast = sum(int(c.passes * c.batch * len(steps_of(c, i))) for kind, _, i in phases if kind == "fast")
    parts, micro_batch, slots = plan(c, m, weights, question, prompt, count_weights(other[0]) if other else 0)
    print(f"\n{slow} slow rollouts, at most {fast} fast ones, and the evaluations', of at most {c.max_new_tokens} tokens each")
    print(f"micro-batches of {micro_batch:,} tokens, {slots} slots; memory in GB, without the libraries' own:")
    print("  " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()))
    if c.device == "cpu":
        rate = cpu_speed()[c.dtype]
        # in tokens of a forward pass: an answer is sampled at half the rate, training costs four passes, two of them backward; a
        # fast phase samples few rows at a time, and drafts a context for every eighth rollout, whose probes the model reads
        K, context = (1, prompt) if c.method == "rl" else (c.prompts, c.prompt_tokens)
        work = 5 * steps * K * (context + c.batch * QUESTION) + 6 * slow * c.max_new_tokens
        work += fast * (QUESTION + 4 * c.max_new_tokens + (c.prompt_tokens + reflect.PROBES * (QUESTION + c.max_new_tokens)) // 8)
        asked = 2 * c.eval_problems * (4 * len(task_names(c.task)) + math.ceil(steps / (c.eval_every or c.steps)) + 1)
        work += asked * (QUESTION + 2 * c.max_new_tokens * (1 + c.eval_samples))
        minutes = 2 * weights * work / rate / 60
        print(f"time: about {minutes:.0f} minutes in {c.dtype}, {rate / 1e9:.0f} GFLOP/s here, if all answers reach their limit")
    else:
        print("time: not estimated for CUDA")


def open_folder(folder, changes={}):
    """A run to evaluate, finished or not: its weights and prompts, its configuration with `changes`. Its folder is only read."""
    _, c = stored_config(folder, changes)
    path = Path(folder) / "checkpoint" / "prompts.json"
    with reading(path):
        population = reflect.Population.from_json(json.loads(read_text(path)))
        refuse(not population.candidates, "it holds no prompt")
    run = Run(c, Path(folder) / "checkpoint")
    run.population = population
    refuse(run.model.config.vocab_size != run.base.config.vocab_size,
           f"{folder}: its checkpoint's vocabulary is not that of {c.model}")
    return run


def complain(text):
    """One line, without control characters that a file or a model may have put into it."""
    print("fst.py:", " ".join(reflect.printable(str(text)).split()), file=sys.stderr)
    return 2


def main(argv=None):
    """Exit status: 0 done, 2 bad input or a failure that is named, 130 interrupted: after saving, unless Ctrl-C came twice."""
    handlers = {}
    try:
        config, actions, given = parse(argv)              # given: the flags; one that repeats a default counts, too
        for action in ("eval", "plot", "show_prompts"):
            unused = given.keys() - (EVAL_FLAGS if action == "eval" else set())
            unused |= {name for name in actions if actions[name] and name != action}
            refuse(actions[action] is not None and unused, f"{', '.join(map(flag, sorted(unused)))} does not go with {flag(action)}")
        if actions["plot"]:
            plot(actions["plot"], Path(actions["plot"][0]) / "curves.png")
            print(f"drawn: {Path(actions['plot'][0]) / 'curves.png'}")
        elif actions["eval"] is not None:                 # "" is no reason to train
            run = open_folder(actions["eval"], given)
            for task in range(len(run.tasks)):            # the 2x2
                say(table(run.evaluate(task, "test", 2 * run.config.eval_problems)))
        elif actions["show_prompts"] is not None:
            path = Path(actions["show_prompts"]) / "prompts.jsonl"
            with reading(path):
                text = reflect.show(read_rows(path))
            print(text or "this run has proposed no prompts so far")
        elif actions["check"]:
            check(config)
        else:
            resolved, lock = open_run(config, actions["overwrite"])
            with lock:
                run = Run(resolved)
                handlers = {number: signal.signal(number, run.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
                say(f"{resolved.method} of {resolved.model} ({resolved.why_model}) on {resolved.task}, "
                    f"{resolved.device} {resolved.dtype}: {resolved.out}")
                return 0 if run.go() else 130
    except (Refused, OSError, FloatingPointError) as error:
        return complain(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return complain("out of memory: try a smaller --micro-batch, --slots or --memory, with which a run goes on from what it saved "
                        f"({str(error).strip().partition(chr(10))[0]})")
    except KeyboardInterrupt:
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
