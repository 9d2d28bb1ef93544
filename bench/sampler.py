"""
Useful tokens a second of our sampler and of what one would use instead: transformers `generate`, and vLLM where it is
installed. Same weights, same prompts, temperature 1 without truncation, log-probs of the sampled tokens kept (transformers would
keep all logits instead, and is spared that). Tokens after a row's end do not count. Prints a table with the share of the machine's
limit that is reached, that limit being measured first, and appends one row per measurement to results/bench_sampler.jsonl.

    FST_DATA=... python bench/sampler.py                  the four jobs, on a card a fifth of 256 rows
    FST_DATA=... python bench/sampler.py --growth         how our cost grows with rows, prompt and new tokens
"""
import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fst import ON_CPU, ON_CUDA
from model import load, save
from rollout import Context, Sampler, get_task, prefix_segments

JOBS = {"8 problems x 8 samples x 128 tokens": (8, 8, 128, 0), "64 x 8 x 128": (64, 8, 128, 0), "1 x 1 x 128": (1, 1, 128, 0),
        "1,500-token prompt, 1 x 64 x 64": (1, 64, 64, 1500), "8 x 32 x 128": (8, 32, 128, 0)}


def machine(threads=None):
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return f"{model}, {threads or torch.get_num_threads()} threads"


def provenance(threads=None):
    """Where a row comes from; threads: those of a process that this one started."""
    git = lambda *command: subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        commit += "-changed" * bool(commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode)
    except OSError:                                       # there is no git
        commit = ""
    return {"machine": machine(threads), "torch": torch.__version__, "date": str(datetime.date.today()), "commit": commit,
            "command": shlex.join(["python", *sys.argv])}


def record(file, **row):
    row |= provenance()
    with open(ROOT / "results" / file, "a") as out:
        out.write(json.dumps(row) + "\n")


def system_text(tokenizer, task, long):
    """The task's seed prompt, filled with questions until a chat has about `long` tokens."""
    system, questions = task.seed_prompt, [p.question for p in task.problems("train")]
    while long and len(Context(system).prompt(tokenizer, questions[0])) < long:
        system += "\nA question of an earlier day was: " + questions[-1 - len(system) % 1000]
    return system


def prompts_of(tokenizer, task, problems, samples, long):
    """`problems` chat prompts, each `samples` times."""
    context = Context(system_text(tokenizer, task, long))
    return [context.prompt(tokenizer, p.question) for p in task.problems("train")[:problems] for _ in range(samples)]


def ours(model, tokenizer, prompts, limit, seed, slots):
    return sum(len(c.tokens) for c in Sampler(model, tokenizer, slots).generate(prompts, limit, 1.0, seed))


def with_transformers(theirs, tokenizer, prompts, limit, seed):
    torch.manual_seed(seed)
    width, device = max(map(len, prompts)), theirs.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    more = {"cache_implementation": "static"} if device.type == "cuda" else {}       # with which generate compiles its decoding
    out = theirs.generate(ids, attention_mask=mask, **more, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit,
                          eos_token_id=list(tokenizer.stop_ids), pad_token_id=0, return_dict_in_generate=True, output_logits=False, output_scores=False)
    return useful(out.sequences[:, width:].tolist(), tokenizer.stop_ids)


def with_vllm(engine, tokenizer, prompts, limit, _):
    from vllm import SamplingParams
    parameters = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=limit, logprobs=0, stop_token_ids=list(tokenizer.stop_ids))   # its CPU build fails with a seed
    out = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], [parameters] * len(prompts), use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in out)


def useful(rows, stop_ids):
    return sum(next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row)) for row in rows)


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def limits(model):
    """Measured here and now: FLOP/s of the model's widest products over 2,048 rows, bytes/s at which memory is read. On a card over
    16,384 rows, and each 20 times: else the clock would measure the launches."""
    weight, device = model.embedding, model.embedding.device
    rows, size, times = (16384, 2 ** 30, 20) if device.type == "cuda" else (2048, 2 ** 27, 1)
    x = torch.randn(rows, model.config.hidden_size, device=device, dtype=weight.dtype)
    memory = torch.ones(size, device=device)

    def best(work):
        seconds = []
        for _ in range(4):                                # the first warms up
            start = time.perf_counter()
            for _ in range(times):
                work()
            finish(device)
            seconds.append((time.perf_counter() - start) / times)
        return min(seconds[1:])

    with model.packing():
        products = best(lambda: [model.linear(x, layer.gate_up) for layer in model.layers])
    rate = 2 * len(x) * sum(layer.gate_up.numel() for layer in model.layers) / products
    bandwidth = memory.numel() * memory.element_size() / best(lambda: memory.sum())
    print(f"limits: {rate / 1e12:.3f} TFLOP/s in matrix products, {bandwidth / 1e9:.1f} GB/s from memory", flush=True)
    return rate, bandwidth


def distinct_tokens(prompts):
    """With every common prefix run once."""
    return sum(len(tokens) for tokens, _ in prefix_segments(map(tuple, prompts))[0])


def least_seconds(model, limits, prompts, tokens, slots):
    """What these completions of `tokens` tokens in all take at the limit, and what reading from memory alone takes. Prefill: 2 FLOP for
    each weight of the layers and distinct token. Decoding: 2 FLOP for each weight and token, or reading at each step the weights,
    the prompts' cache and the rows' own, whichever takes longer."""
    rate, bandwidth = limits
    layers, head, c = sum(p.numel() for p in model.layers.parameters()), model.output_weight().numel(), model.config
    width = model.embedding.element_size()
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * width                            # bytes a token
    rows, distinct = min(len(prompts), slots), distinct_tokens(prompts)
    moved = tokens / rows * ((layers + head) * width + distinct * rows / len(prompts) * cache) + tokens * tokens / len(prompts) / 2 * cache
    return 2 * layers * distinct / rate + max(2 * (layers + head) * tokens / rate, moved / bandwidth), moved / bandwidth


def measure(function, repeats, device):
    """function(seed) -> tokens, run once to warm up and `repeats` times: (tokens a second, tokens) of the fastest; of the warm-up where
    there are no repeats."""
    rates = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        tokens = function(seed)
        finish(device)
        rates.append((tokens / (time.perf_counter() - start), tokens))
    return max(rates[1:] or rates)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="after a warm-up; 0: the warm-up counts, for jobs of minutes")
    parser.add_argument("--slots", type=int, help="rows of ours decoded at once; default: fst.py's")
    parser.add_argument("--job", action="append", choices=list(JOBS))
    parser.add_argument("--peers", default="transformers,vllm", help="which peers to run beside ours, where they are installed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.slots = options.slots or (ON_CUDA if device.type == "cuda" else ON_CPU)["slots"]
    jobs = options.job or [name for name in JOBS if device.type == "cuda" or name != "8 x 32 x 128"]
    model, tokenizer = load(options.model, device, torch.bfloat16)
    model.requires_grad_(False)
    task, reach = get_task("gsm8k"), limits(model)
    if options.growth:
        for rows in (1, 8, 32, 64, 128, 256, 512):
            grow(model, tokenizer, task, options, reach, rows=rows)
        for long in (64, 256, 512, 1024, 2048):
            grow(model, tokenizer, task, options, reach, long=long)
        for limit in (32, 64, 128, 256, 512):
            grow(model, tokenizer, task, options, reach, limit=limit)
        return
    import tempfile
    folder = tempfile.mkdtemp()
    save(folder, model, tokenizer)

    def transformers_():
        import transformers
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
        return lambda prompts, limit, seed: with_transformers(theirs, tokenizer, prompts, limit, seed)

    def vllm_():
        from vllm import LLM
        half = {"gpu_memory_utilization": 0.5} if device.type == "cpu" else {}       # of memory, which others use, too
        engine = LLM(folder, dtype="bfloat16", max_model_len=2560, enable_prefix_caching=True, **half)
        return lambda prompts, limit, seed: with_vllm(engine, tokenizer, prompts, limit, seed)

    # One system after another, vLLM last: its worker takes half of a core even while it waits.
    systems = {"ours": lambda: lambda prompts, limit, seed: ours(model, tokenizer, prompts, limit, seed, options.slots),
               "transformers": transformers_, "vllm": vllm_}
    for system, start in systems.items():
        if system != "ours" and system not in options.peers.split(","):
            continue
        function = None                                   # and with it the weights of the system before
        torch.cuda.empty_cache()
        try:
            function = start()
        except ImportError as error:
            print(f"{system}: not measured ({error})")
            continue
        for name in jobs:
            problems, samples, limit, long = JOBS[name]
            prompts = prompts_of(tokenizer, task, problems, samples, long)
            if device.type == "cuda":
                torch._dynamo.reset()                     # else a second job's shapes would be compiled as dynamic ones
                torch.cuda.reset_peak_memory_stats()
            rate, tokens = measure(lambda seed: function(prompts, limit, seed), options.repeats, device)
            slots = options.slots if system == "ours" else len(prompts)
            share, of_memory = (least * rate / tokens for least in least_seconds(model, reach, prompts, tokens, slots))
            print(f"{name:36} {system:14} {rate:8.0f} tok/s  ({tokens} tokens), {share:4.0%} of the limit, {of_memory:4.0%} of the memory bandwidth", flush=True)
            record("bench_sampler.jsonl", job=name, system=system, tokens_per_second=rate, tokens=tokens, share_of_limit=share, share_of_bandwidth=of_memory,
                   slots=slots, **({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" and system != "vllm" else {}),
                   flops=reach[0], bytes_per_second=reach[1], model=options.model, dtype="bfloat16", repeats=options.repeats)


def grow(model, tokenizer, task, options, reach, rows=64, long=0, limit=64):
    """Rows that never stop, so that the work is what the numbers say."""
    prompts = prompts_of(tokenizer, task, 1, rows, long)
    endless = type("Endless", (), {"stop_ids": (-1,)})
    rate, tokens = measure(lambda seed: ours(model, endless, prompts, limit, seed, rows), options.repeats, model.embedding.device)
    share, of_memory = (least * rate / tokens for least in least_seconds(model, reach, prompts, tokens, rows))
    print(f"rows {rows:4d}  prompt {len(prompts[0]):5d}  new tokens {limit:4d}: {rate:7.0f} tok/s, {tokens / rate:7.2f} s, "
          f"{share:4.0%} of the limit, {of_memory:4.0%} of the memory bandwidth", flush=True)
    record("bench_growth.jsonl", rows=rows, prompt=len(prompts[0]), new_tokens=limit, tokens_per_second=rate, seconds=tokens / rate,
           share_of_limit=share, share_of_bandwidth=of_memory, flops=reach[0], bytes_per_second=reach[1], model=options.model)


if __name__ == "__main__":
    main()
