"""
One whole GRPO step (sample, grade, log-probs, backward, AdamW) of ours and of TRL's GRPOTrainer, each in a process of its own: same
weights, task, group, limit of an answer and number of optimizer steps, no KL term, both training in micro-batches. Prints seconds, peak memory
(the card's on CUDA) and, for ours, the share of the machine's limit that sampling and training reach; appends a row each to
results/bench_step.jsonl.

    FST_DATA=... python bench/step.py                     8 x 8 x 128 on gsm8k, 8 x 16 x 40 on arithmetic, 8 x 12 x 32 under 300 tokens
    FST_DATA=... python bench/step.py --growth            how our cost of training a sample depends on its prompt's length
"""
import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import fst
from model import load, save
from operators import passing_run
from rollout import Context, get_task
from sampler import distinct_tokens, finish, least_seconds, limits, prompts_of, record, system_text

# task, problems, group, new tokens, tokens of the prompt: 0 for the seed prompt's, else about as many as FST's worked examples take
JOBS = {"gsm8k": ("gsm8k", 8, 8, 128, 0), "arithmetic": ("arithmetic", 8, 16, 40, 0), "context": ("arithmetic", 8, 12, 32, 300)}


def peak_gb():
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def ours(task, problems, group, limit, long, steps):
    seed_prompt = system_text(load("smollm2-135m")[1], get_task(task), long)
    with passing_run(task=task, seed_prompt=seed_prompt, method="rl", model="smollm2-135m", batch=problems, group=group, max_new_tokens=limit,
                     micro_batch="auto" if torch.cuda.is_available() else 2048, kl=0, steps=steps + 1) as run:
        reinforce, last = run.reinforce, []
        # every group trains, whatever the rewards: the first half of it is called right
        def all_groups(rollouts, rewards):
            last[:] = rollouts
            return reinforce(rollouts, (torch.arange(group) < group // 2).float().expand(problems, -1))

        run.reinforce, done = all_groups, []
        for step in range(steps + 1):
            start = time.perf_counter()
            row = run.slow(0, step)
            done.append((time.perf_counter() - start, row, last[:]))
        seconds, row, last = min(done[1:], key=lambda step: step[0])                     # the first warms up
        peak, reach = peak_gb(), limits(run.model)                                       # the limits' measurement takes memory itself
        prompts, tokens = [r.prompt for r in last], sum(len(r.tokens) for r in last)
        layers, head = sum(p.numel() for p in run.model.layers.parameters()), run.model.output_weight().numel()
        least = {"sample": least_seconds(run.model, reach, prompts, tokens, run.sampler.slots)[0],
                 # forward and backward: 6 FLOP for each weight and token, the head's for the answers only
                 "train": 6 * (layers * (distinct_tokens(prompts) + tokens) + head * tokens) / reach[0]}
        parts = {f"{name}_seconds": row[f"{name}_seconds"] for name in least}
        shares = {f"{name}_share_of_limit": least[name] / row[f"{name}_seconds"] for name in least}
        return {"seconds": seconds, "peak_gb": peak, **parts, **shares, "length": row["length"], "flops": reach[0], "bytes_per_second": reach[1]}


def trl(task, problems, group, limit, long, steps):
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    folder = tempfile.mkdtemp()
    model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
    save(folder, model, tokenizer)
    chosen = get_task(task)
    context = Context(system_text(tokenizer, chosen, long))
    prompts = [{"prompt": context.messages(p.question)} for p in chosen.problems("train")[:problems * (steps + 1)]]
    seconds, lengths = [], []

    def reward(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(i % group < group // 2) for i in range(len(completions))]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    # a batch is sampled as a whole and, on a CPU, trained on group by group: all of it at once wants more than 24 GB
    cuda = torch.cuda.is_available()
    options = GRPOConfig(output_dir=folder + "/out", per_device_train_batch_size=group * problems if cuda else group,
                         gradient_accumulation_steps=1 if cuda else problems,
                         num_generations=group, max_completion_length=limit,
                         max_steps=steps + 1, learning_rate=1e-6, beta=0.0, temperature=1.0, top_p=1.0, top_k=0, bf16=True, report_to=[], save_strategy="no",
                         use_cpu=not cuda, logging_steps=1000, gradient_checkpointing=False, disable_tqdm=True)
    trainer = GRPOTrainer(folder, reward_funcs=reward, args=options, train_dataset=Dataset.from_list(prompts), callbacks=[Clock()])
    trainer.train()
    return {"seconds": min(seconds[1:]), "peak_gb": peak_gb(), "length": sum(lengths) / len(lengths)}


def grow(samples, long, micro_batch, new=64):
    """Seconds of a forward and backward pass over so many samples of one prompt: rows in results/bench_step_growth.jsonl."""
    model, tokenizer = load("smollm2-135m", "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    [prompt] = prompts_of(tokenizer, get_task("gsm8k"), 1, 1, long)
    rows, seconds = [(prompt, torch.arange(100 + i, 100 + i + new).tolist()) for i in range(samples)], []
    for _ in range(2):
        start = time.perf_counter()
        for batch in fst.micro_batches(rows, micro_batch):
            fst.score(model, [rows[i] for i in batch])[0].sum().backward()
        finish(model.embedding.device)
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    print(f"{samples:4d} samples of {new} tokens, prompt of {len(prompt):4d}: {min(seconds):6.2f} s, {1e3 * min(seconds) / samples:6.1f} ms a sample", flush=True)
    record("bench_step_growth.jsonl", samples=samples, prompt=len(prompt), new_tokens=new, micro_batch=micro_batch, seconds=min(seconds))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--job", action="append", choices=list(JOBS))
    parser.add_argument("--systems", default="ours,trl")
    parser.add_argument("--large-pages", action="store_true", help="PyTorch's large blocks in large pages for TRL too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        system, job = options.child
        print(json.dumps({"ours": ours, "trl": trl}[system](*JOBS[job], options.steps)))
        return
    if options.growth:
        for samples, long in itertools.product((8, 32, 128), (0, 500, 1000, 2000)):
            grow(samples, long, 4096)
        return
    for job in options.job or JOBS:
        task, problems, group, limit, long = JOBS[job]
        for system in options.systems.split(","):
            # large pages are a trick of ours, which model.py would otherwise play for TRL too; --large-pages lets it
            environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(system == "ours" or options.large_pages))}
            out = subprocess.run([sys.executable, __file__, "--steps", str(options.steps), "--child", system, job], capture_output=True, text=True,
                                 env=environment)
            if out.returncode:
                print(f"{job:12} {system:6} failed with status {out.returncode}: {' '.join(out.stderr.strip().splitlines()[-1:])}")
                continue
            row = json.loads(out.stdout.strip().splitlines()[-1])
            print(f"{job:12} {problems} x {group} x {limit:4d}  {system:6} {row['seconds']:7.2f} s a step  {row['peak_gb']:5.1f} GB  mean length {row['length']:.0f}"
                  + "".join(f"  {name} {row[f'{name}_seconds']:.2f} s, {row[f'{name}_share_of_limit']:.0%} of the limit"
                            for name in ("sample", "train") if f"{name}_seconds" in row), flush=True)
            record("bench_step.jsonl", task=task, problems=problems, group=group, new_tokens=limit, prompt_tokens=long, system=system,
                   steps=options.steps, large_pages=environment["THP_MEM_ALLOC_ENABLE"] == "1", **row)


if __name__ == "__main__":
    main()
