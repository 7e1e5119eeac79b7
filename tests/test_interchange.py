"""Hugging Face folders in and out, against transformers: the same tokens must give the same logits.

    python -m pytest -q tests/test_interchange.py              # two minutes on one core, offline; needs transformers
    python -m pytest -q tests/test_interchange.py -k golden    # the trained models that others scored

Configs are small and off their defaults wherever that could be overlooked; weights, gains and biases are random.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, PEAK, ROOT, assert_mistake, checkpoint_of, differences, run_python, run_script

import data as D
import model as M
import probe
import train
from model import GPT, ModelConfig, UserError, setting

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="transformers is the independent truth here")
safetensors = pytest.importorskip("safetensors.torch", reason="model folders are safetensors")

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
BASE = dict(vocab_size=70, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3, initializer_range=0.3)
MOE = dict(num_experts=6, num_experts_per_tok=3)
QWEN_MOE = dict(MOE, moe_intermediate_size=16)
CASES = {                                                       # model_type, and what differs from BASE
    "llama": ("llama", dict(rope_theta=500.0)),
    "llama_tied": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama_3": ("llama", dict(rope_theta=50000.0, rope_scaling=LLAMA3, head_dim=16)),
    "llama_wide_heads": ("llama", dict(head_dim=12)),
    "mistral": ("mistral", dict(head_dim=12, sliding_window=None, num_key_value_heads=1)),
    "mistral_window": ("mistral", dict(sliding_window=20)),
    "qwen2": ("qwen2", dict(rope_theta=1000.0)),
    "qwen2_tied_window": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=24,
                                        max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=12)),
    "qwen3_tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True, rope_scaling=LLAMA3)),
    "mixtral": ("mixtral", dict(num_local_experts=6, num_experts_per_tok=3, sliding_window=None)),
    "mixtral_wide_heads": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=1, head_dim=16)),
    "qwen2_moe": ("qwen2_moe", dict(QWEN_MOE, shared_expert_intermediate_size=20, norm_topk_prob=False)),
    "qwen2_moe_normed": ("qwen2_moe", dict(QWEN_MOE, shared_expert_intermediate_size=8, norm_topk_prob=True,
                                           tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", dict(QWEN_MOE, head_dim=16, norm_topk_prob=True)),
    "olmoe": ("olmoe", dict(MOE, norm_topk_prob=False)),
    "olmoe_normed": ("olmoe", dict(MOE, norm_topk_prob=True, num_key_value_heads=4)),
}


def hf_model(case):
    """A transformers model with random gains, biases and gates."""
    family, changes = CASES[case]
    config = transformers.AutoConfig.for_model(family, **BASE | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.uniform_(p, -0.5, 1.5) if p.dim() == 1 else p.normal_(std=0.3)
    return model


def make_folder(case, path, **kwargs):
    model = hf_model(case)
    model.save_pretrained(path, **kwargs)
    return model, path


def rewrite(path, change, name="config.json"):
    """Change a JSON file of a folder in place; a value of ... deletes the key."""
    file = path / name
    values = json.loads(file.read_text())
    for key, value in change.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def as_transformers_4(path):
    """config.json as transformers 4 writes it."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.57.6"
    (path / "config.json").write_text(json.dumps(config))


def tokens_for(c, rows=3):
    return torch.randint(c.vocab_size, (rows, c.block_size), generator=torch.Generator().manual_seed(1))


def logits_differ_by(ours, theirs):
    """The largest difference of the logits over whole contexts, in which neither model may be near constant."""
    idx = tokens_for(ours.config)
    with torch.no_grad():
        a, b = ours(idx)[0], theirs(idx).logits
    assert b.std() > 0.3 and (b[:, 1:] - b[:, :-1]).std() > 0.3
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# in


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case, version, tmp_path, capsys):
    theirs, path = make_folder(case, tmp_path / "hf")
    if version == 4:
        as_transformers_4(path)
    ours, saved = D.load_model(path)
    window = CASES[case][1].get("sliding_window") or 64
    assert ours.config.block_size == window, "longer sequences would meet the sliding window"
    assert ("its sliding_window" in capsys.readouterr().err) == (window < 64)
    assert logits_differ_by(ours, theirs) < 1e-4
    assert saved["step"] == 0 and saved["settings"] == asdict(ours.config)


def test_the_tests_would_see_a_forgotten_field(tmp_path):
    """Each of these fields, changed in config.json alone, moves the logits by more than the tolerance."""
    for case, change in (("llama", {"rms_norm_eps": 1e-4}), ("llama", {"rope_parameters": {"rope_theta": 510.0}}),
                         ("llama_3", {"rope_parameters": LLAMA3 | {"rope_theta": 50000.0, "factor": 9.0}}),
                         ("llama_3", {"rope_parameters": LLAMA3 | {"rope_theta": 50000.0, "low_freq_factor": 1.2}}),
                         ("qwen2_moe", {"norm_topk_prob": True}), ("qwen2_moe", {"num_experts_per_tok": 2})):
        theirs, path = make_folder(case, tmp_path / "hf")
        rewrite(path, change)
        assert logits_differ_by(D.load_model(path)[0], theirs) > 1e-3, change


def test_fields_that_config_json_leaves_out_take_the_defaults_of_transformers(tmp_path):
    for case, keys in (("llama_tied", ("num_key_value_heads", "rope_parameters", "hidden_act", "head_dim")),
                       ("mixtral", ("rms_norm_eps", "rope_parameters", "head_dim", "sliding_window")),
                       ("olmoe_normed", ("rms_norm_eps", "num_key_value_heads", "norm_topk_prob")),
                       ("qwen2_moe", ("qkv_bias", "norm_topk_prob", "rms_norm_eps")),
                       ("mistral_window", ("sliding_window", "tie_word_embeddings", "rms_norm_eps"))):
        _, path = make_folder(case, tmp_path / case)
        rewrite(path, {key: ... for key in keys})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        assert logits_differ_by(D.load_model(path)[0], theirs) < 1e-4, case


@pytest.mark.parametrize("case", ["llama_tied", "qwen2_moe", "mixtral"])
def test_a_sharded_folder_gives_the_same_weights_as_one_file(case, tmp_path):
    make_folder(case, tmp_path / "one")
    make_folder(case, tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (D.load_checkpoint(tmp_path / name)["model"] for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_counts_whatever_config_json_says_of_ties(equal, tmp_path):
    _, path = make_folder("llama_tied", tmp_path / "hf")
    tensors = safetensors.load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() * (1 if equal else -1.5)
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert logits_differ_by(D.load_model(path)[0], theirs) < 1e-4


def test_weights_stored_in_bfloat16_are_read_exactly_into_the_wanted_dtype(tmp_path):
    theirs, path = make_folder("llama_3", tmp_path / "hf")
    theirs.bfloat16().save_pretrained(path)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, saved = D.load_model(path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} == {w.dtype for w in saved["model"].values()}
        assert torch.equal(model.embed.weight, theirs.get_input_embeddings().weight.to(dtype))
    again = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert logits_differ_by(D.load_model(path)[0], again) < 1e-4


REFUSED = {
    "gpt_neox": ("llama", {"model_type": "gpt_neox"}, "model_type='gpt_neox'"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "attention_bias": ("llama", {"attention_bias": True}, "attention_bias=True"),
    "attention_bias_qwen3": ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    "mlp_bias": ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type=yarn"),
    "linear_in_transformers_4": ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
                                 "rope_type=linear"),
    "unknown_rope_number": ("llama", {"rope_parameters": {"rope_theta": 1e4, "attention_factor": 2}},
                            "attention_factor"),
    "partial_rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial_rotary_5": ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    "sparse_step": ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    "mlp_only": ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "linear_attention": ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    "unknown": ("llama", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
    "no_heads": ("llama", {"num_attention_heads": ...}, "lacks num_attention_heads"),
    "no_width": ("llama", {"hidden_size": ...}, r"is F32 \[70, 32\], config.json says \[70, 128\]"),
    "text_for_a_number": ("llama", {"hidden_size": "wide"}, "damaged or incomplete"),
    "too_many_layers": ("llama", {"num_hidden_layers": 4}, "lacks model.layers.3"),
    "too_few_layers": ("llama", {"num_hidden_layers": 2}, "has no use for model.layers.2"),
    "wrong_shape": ("llama", {"intermediate_size": 32}, r"down_proj.weight is F32 \[32, 24\], .* says \[32, 32\]"),
    "biases": ("llama", {"model_type": "qwen2"}, "lacks model.layers.0.self_attn.k_proj.bias"),
    "untied": ("llama_tied", {"tie_word_embeddings": False}, "lacks lm_head.weight"),
    "experts_not_of_8": ("olmoe", {"intermediate_size": 20}, "expert_hidden=20 must be a multiple of 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_lacks_is_refused_by_name(name, tmp_path):
    case, change, message = REFUSED[name]
    _, path = make_folder(case, tmp_path / "hf")
    rewrite(path, change)
    with pytest.raises(UserError, match=message) as error:
        D.load_checkpoint(path)
    assert "\n" not in str(error.value)


IDLE = {                                                        # fields that change nothing, by kind
    "null": {"quantization_config": None, "anything": None, "rope_scaling": None},
    "bookkeeping": {"_name_or_path": "x/y", "name_or_path": "x/y", "model_name": "x", "auto_map": {"AutoModel": "m.M"},
                    "unsloth_fixed": True, "unsloth_version": "2024.9", "transformers_version": "4.1",
                    "transformers.js_config": {}, "torch_dtype": "bfloat16", "pretraining_tp": 2, "use_cache": False},
    "training": {"gradient_checkpointing": True, "attention_dropout": 0.1, "resid_dropout": 0.1,
                 "router_aux_loss_coef": 1.0},
    "transformers 4": {                       # what its PretrainedConfig takes of every model
        "return_dict": False, "output_hidden_states": True, "output_attentions": True, "torchscript": True,
        "use_bfloat16": True, "tf_legacy_loss": True, "pruned_heads": {}, "tie_encoder_decoder": True,
        "chunk_size_feed_forward": 3, "is_encoder_decoder": False, "is_decoder": True, "add_cross_attention": False,
        "cross_attention_hidden_size": 8,
        "architectures": ["X"], "finetuning_task": "x", "id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 1,
        "task_specific_params": {"a": 1}, "problem_type": "regression", "tokenizer_class": "X", "prefix": "x",
        "bos_token_id": 3, "pad_token_id": -1, "eos_token_id": [1, 2], "sep_token_id": 4, "decoder_start_token_id": 5,
        "max_length": 20, "min_length": 2, "do_sample": True, "early_stopping": True, "num_beams": 2,
        "num_beam_groups": 2, "diversity_penalty": 1.0, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "typical_p": 0.9,
        "repetition_penalty": 1.2, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]],
        "encoder_no_repeat_ngram_size": 3, "num_return_sequences": 2, "output_scores": True,
        "return_dict_in_generate": True, "forced_bos_token_id": 1, "forced_eos_token_id": 1, "suppress_tokens": [1],
        "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 2], "begin_suppress_tokens": [1]},
    "transformers 5": dict.fromkeys({
        *transformers.GenerationConfig._get_default_generation_params(),
        *(f.name for f in fields(transformers.PretrainedConfig) if f.name != "is_encoder_decoder")}, 7),
}


@pytest.mark.parametrize("kind", IDLE)
def test_fields_that_change_nothing_are_let_pass(kind, tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    want = D.load_checkpoint(path)["settings"]
    rewrite(path, IDLE[kind])
    assert D.load_checkpoint(path)["settings"] == want


def test_all_that_is_refused_is_named_at_once_and_only_what_may_go_is_to_be_deleted(tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    rewrite(path, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}, "hidden_act": "gelu",
                   "logit_scale": 0.5, "quantization_config": {"bits": 4}, "embedding_multiplier": 12,
                   "notes": "x" * 1000})
    with pytest.raises(UserError) as error:
        D.load_checkpoint(path)
    said = str(error.value)
    unsupported, _, unknown = said.partition("; unknown")
    assert all(word in unsupported for word in ("rope_type=yarn", "hidden_act='gelu'", "dequantise"))
    assert all(word in unknown for word in ("logit_scale=0.5", "embedding_multiplier=12", "notes='xxx", "delete"))
    assert "delete" not in unsupported and "config.json" in unsupported and "\n" not in said and len(said) < 600


def test_rope_parameters_of_each_layer_type_are_named_as_such(tmp_path):
    _, path = make_folder("qwen3", tmp_path / "hf")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    rewrite(path, {"rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}})
    with pytest.raises(UserError, match="rope_parameters per layer type, such as full_attention") as error:
        D.load_checkpoint(path)
    assert "delete" not in str(error.value) and str(error.value).count("per layer") == 1


@pytest.mark.parametrize("where", ["nowhere", "beside"])
def test_the_original_context_of_llama_3_is_where_transformers_looks_for_it(where, tmp_path):
    """It is the block size if it is not given at all, and what stands beside the rope's fields goes before."""
    _, path = make_folder("llama_3", tmp_path / "hf")
    rope = LLAMA3 | {"rope_theta": 50000.0}
    if where == "nowhere":
        del rope["original_max_position_embeddings"]
        rewrite(path, {"rope_parameters": rope})
    else:
        rewrite(path, {"rope_parameters": rope, "original_max_position_embeddings": 32})
    ours, theirs = D.load_model(path)[0], transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert ours.config.rope_scaling.endswith("64" if where == "nowhere" else "32")
    assert logits_differ_by(ours, theirs) < 1e-4


def test_what_a_folder_may_not_be_here_names_the_folder(tmp_path):
    _, path = make_folder("olmoe", tmp_path / "hf")
    rewrite(path, {"intermediate_size": 20})
    with pytest.raises(UserError, match="config.json: expert_hidden=20"):
        D.load_checkpoint(path)


def test_the_rope_table_of_old_files_is_passed_over_and_integers_are_refused(tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    tensors = safetensors.load_file(path / "model.safetensors")
    want = D.load_checkpoint(path)["model"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(w, want[name]) for name, w in D.load_checkpoint(path)["model"].items())
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight is I8 \[32\]"):
        D.load_checkpoint(path)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-8])


def lose_a_shard(file):
    there, gone = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    file.rename(file.with_name(there))
    shards = {"lm_head.weight": gone, "model.norm.weight": there}
    file.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


DAMAGED = {                                                     # the file, and what happens to it
    "half a config": ("config.json", lambda file: file.write_text("{")),
    "truncated": ("model.safetensors", truncate),
    "no header": ("model.safetensors", lambda file: file.write_bytes(b"\xff" * 100)),
    "no shard": ("model.safetensors", lose_a_shard),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_line(name, tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    file, spoil = DAMAGED[name]
    spoil(path / file)
    with pytest.raises(UserError, match="damaged or incomplete") as error:
        D.load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


MEASURE = PEAK + """
import sys, torch, data, safetensors.torch
data.load_model(sys.argv[3])                                      # a tiny one: what torch loads on first use
before = peak()
gpt, _ = data.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((peak() - before) / sum(p.numel() * p.element_size() for p in gpt.parameters()))
"""


@pytest.mark.parametrize("stored, wanted, sharded", [("float32", "float32", False), ("bfloat16", "bfloat16", False),
                                                     ("bfloat16", "float32", True), ("float32", "bfloat16", True)])
def test_loading_takes_at_most_a_fifth_more_memory_than_the_model(stored, wanted, sharded, tmp_path):
    """What loading 70M weights adds to the peak of resident memory, mapped files included, of a warm process."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, stored))
    model.save_pretrained(tmp_path, max_shard_size="40MB" if sharded else "10GB")
    del model
    _, tiny = make_folder("mixtral", tmp_path / "tiny")
    status, out, err = run_python("-c", MEASURE, tmp_path, wanted, tiny, cwd=ROOT)
    assert status == 0, err
    assert 0.9 < float(out) < 1.2


def golden(name):
    """The tokens (B, T) of a golden model, and its scores."""
    want = json.loads((GOLDEN / name / "scores.json").read_text())
    want.pop("about"), want["released"].pop("source")
    return torch.from_numpy(np.load(GOLDEN / name / "tokens.npy").astype(np.int64)), want


@pytest.mark.parametrize("name", ["llama_mha", "qwen2_moe"])
def test_the_golden_loss_and_variances_are_met_by_the_model_of_the_folder(name):
    model, (tokens, want) = D.load_model(GOLDEN / name)[0], golden(name)
    with torch.no_grad():
        logits, _, stats = model(tokens, stats=True)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    got = {"loss": loss.item()} | {key: stats[key].tolist() for key in ("variance", "attn_variance", "ffn_variance")}
    assert differences({key: want[key] for key in got}, got, lambda path: 1e-4, 1e-7) == []


@pytest.mark.parametrize("name", ["llama_mha", "qwen2_moe"])
def test_the_golden_scores_are_met_through_the_folder(name):
    import probe
    tokens, want = golden(name)
    got = probe.probe(D.load_model(GOLDEN / name)[0], tokens, remove=(1, 2), jacobian_samples=4,
                      experiments=[e for e in probe.EXPERIMENTS if e not in ("contribution", "sparsity")])
    assert differences(want, got, lambda path: 1e-3 if "usefulness" in path else 1e-4, 1e-7) == []


# ---------------------------------------------------------------------------------------------------------------------
# out

SHAPE = dict(vocab_size=320, block_size=48, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_hidden=40, init_std=0.25,
             norm_eps=1e-3, rope_theta=700.0)
EXPERTS = dict(n_experts=6, top_k=2, expert_hidden=16)
VARIANTS = {                                                    # our settings, and the class that they come out as
    "dense": ({}, "Llama"), "mha": (dict(n_kv_head=4), "Llama"), "tied": (dict(tie_embeddings=True), "Llama"),
    "lns": (dict(norm="lns"), "Llama"), "llama3": (dict(rope_scaling="llama3:4,1,3,16", head_dim=12), "Llama"),
    "biases": (dict(qkv_bias=True), "Qwen2"), "biases_wide_heads": (dict(qkv_bias=True, head_dim=12), "Qwen2"),
    "head_norm": (dict(qk_norm="head", head_dim=12, norm="lns"), "Qwen3"),
    "moe": (EXPERTS, "Qwen2Moe"), "moe_normed": (dict(EXPERTS, norm_topk_prob=True, top_k=3), "Qwen2Moe"),
    "moe_shared": (dict(EXPERTS, shared_hidden=24), "Qwen2Moe"),
    "moe_shared_tied_lns": (dict(EXPERTS, shared_hidden=24, norm="lns", tie_embeddings=True), "Qwen2Moe"),
    "moe_gated_biases": (dict(EXPERTS, shared_hidden=24, shared_gate=True, qkv_bias=True), "Qwen2Moe"),
    "moe_wide_heads": (dict(EXPERTS, head_dim=12, rope_scaling="llama3:4,1,3,16"), "Qwen2Moe"),
    "moe_full_norm": (dict(EXPERTS, qk_norm="full"), "Olmoe"),
    "moe_head_norm": (dict(EXPERTS, qk_norm="head", head_dim=12, norm_topk_prob=True), "Qwen3Moe"),
}


def make_checkpoint(path, tokenizer="bytes", **settings):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | settings)).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, -0.5, 1.5)
    D.save_checkpoint(path, checkpoint_of(model, tokenizer=tokenizer))
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_has_the_logits_of_the_checkpoint_in_transformers_and_back_here(name, tmp_path):
    settings, family = VARIANTS[name]
    ours = make_checkpoint(tmp_path / "ckpt.pt", **settings)
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs).__name__ == family + "ForCausalLM" and not any(report.values())
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert logits_differ_by(ours, theirs) < 1e-4
    again, saved = D.load_model(tmp_path / "hf")
    idx = tokens_for(ours.config)
    assert (again(idx)[0] - ours(idx)[0]).abs().max() < 1e-4 and saved["tokenizer"] == "bytes"
    assert again.config.block_size == 48 and again.config.init_std == 0.25


NOT_EXPORTED = [                                                # our settings, and what is said of the nearest families
    (dict(norm="peri"), "llama cannot have norm='peri'"),
    (dict(norm="peri", qkv_bias=True), "qwen2 cannot have norm='peri'"),
    (dict(norm="peri", qk_norm="head"), "qwen3 cannot have norm='peri'"),
    (dict(EXPERTS, norm="peri"), "qwen2_moe cannot have norm='peri'"),
    (dict(qk_norm="full"), "llama cannot have qk_norm='full'"),
    (dict(qk_norm="head", qkv_bias=True), "qwen2 cannot have qk_norm='head'; qwen3 cannot have qkv_bias=True"),
    (dict(EXPERTS, qk_norm="head", qkv_bias=True),
     "qwen2_moe cannot have qk_norm='head'; qwen3_moe cannot have qkv_bias=True"),
    (dict(EXPERTS, qk_norm="full", head_dim=12), "olmoe cannot have head_dim=12"),
    (dict(EXPERTS, qk_norm="full", shared_hidden=8), "olmoe cannot have shared_hidden=8"),
    (dict(EXPERTS, qk_norm="head", shared_hidden=8), "qwen3_moe cannot have shared_hidden=8"),
    (dict(EXPERTS, qk_norm="full", shared_hidden=8, shared_gate=True), "qwen2_moe cannot have qk_norm='full'"),
]


@pytest.mark.parametrize("settings, said", NOT_EXPORTED, ids=str)
def test_what_no_family_holds_is_not_exported(settings, said, tmp_path):
    make_checkpoint(tmp_path / "ckpt.pt", **settings)
    with pytest.raises(UserError, match="no Hugging Face family can be what it is: ") as error:
        D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert said in str(error.value) and "\n" not in str(error.value) and "ckpt.pt" in str(error.value)
    assert not (tmp_path / "hf").exists()


# Forks: a setting or a weight that transformers never heard of is refused, until somebody says what it is there.


def test_every_setting_is_either_expressed_or_has_the_values_that_a_family_can_have():
    c = ModelConfig(**SHAPE)
    for family in ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe"):
        assert {f.name for f in fields(c)} <= D.EXPRESSED | D.holds(family, c).keys(), family


@dataclass
class Forked(ModelConfig):
    window: int = setting(0, "how far a query sees; 0: as far as the context")


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "moe"])
@pytest.mark.parametrize("window", [0, 16])
def test_a_setting_that_a_fork_adds_is_refused_by_name_whatever_its_value(window, experts, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"ckpt.pt: .*window={window}"):
        D.export_family(Forked(**SHAPE | experts, window=window), "ckpt.pt")
    monkeypatch.setattr(D, "ModelConfig", Forked)
    make_checkpoint(tmp_path / "ckpt.pt", **experts)
    saved = torch.load(tmp_path / "ckpt.pt")
    saved["settings"]["window"] = window
    D.save_checkpoint(tmp_path / "ckpt.pt", saved)
    assert D.load_model(tmp_path / "ckpt.pt")[0].config.window == window
    with pytest.raises(UserError, match=f"window={window}"):
        D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def linear(*shape):
    return torch.nn.Linear(*shape, bias=False)


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape))


MADE_UP = {                                                     # a weight, settings of its model, how it gets there
    "blocks.0.attn.gate.weight": ({}, lambda m: m.blocks[0].attn.register_module("gate", linear(32, 4))),
    "blocks.1.mixer.weight": ({}, lambda m: m.blocks[1].register_module("mixer", linear(32, 32))),
    "blocks.2.temperature": ({}, lambda m: m.blocks[2].register_parameter("temperature", parameter(1))),
    "memory.weight": ({}, lambda m: m.register_module("memory", torch.nn.Embedding(5, 32))),
    "blocks.0.attn.mix": ({}, lambda m: m.blocks[0].attn.register_parameter("mix", parameter(4, 8, 8))),
    "blocks.0.ffn.mix": (EXPERTS, lambda m: m.blocks[0].ffn.register_parameter("mix", parameter(6, 32, 16))),
    "blocks.1.attn_norm.bias": ({}, lambda m: m.blocks[1].attn_norm.register_parameter("bias", parameter(32))),
    "blocks.1.attn.proj.bias": ({}, lambda m: m.blocks[1].attn.proj.register_parameter("bias", parameter(32))),
    "blocks.1.attn.qkv.scale": ({}, lambda m: m.blocks[1].attn.qkv.register_parameter("scale", parameter(64))),
    "blocks.1.ffn.gate.bias": ({}, lambda m: m.blocks[1].ffn.gate.register_parameter("bias", parameter(40))),
    "blocks.0.ffn.router.bias": (EXPERTS, lambda m: m.blocks[0].ffn.router.register_parameter("bias", parameter(6))),
    "head.bias": ({}, lambda m: m.head.register_parameter("bias", parameter(320))),
    "blocks.1.attn.qkv.bias": ({}, lambda m: m.blocks[1].attn.qkv.register_parameter("bias", parameter(64))),
    "blocks.1.attn.q_norm.weight": ({}, lambda m: m.blocks[1].attn.register_module("q_norm", M.RMSNorm(8))),
    "blocks.0.ffn.router.weight": ({}, lambda m: m.blocks[0].ffn.register_module("router", linear(32, 6))),
    "blocks.0.ffn.shared.gate.weight": (EXPERTS, lambda m: setattr(m.blocks[0].ffn, "shared", M.SwiGLU(32, 8))),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_a_weight_that_a_fork_adds_is_refused_by_name(name, tmp_path, monkeypatch):
    settings, add = MADE_UP[name]

    class ForkedGPT(GPT):
        def __init__(self, config):
            super().__init__(config)
            add(self)
    model = ForkedGPT(ModelConfig(**SHAPE | settings))
    D.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(model))
    with pytest.raises(UserError, match=f"there is no Hugging Face name for {name}"):
        D.hf_views(model.config, model.state_dict())
    monkeypatch.setattr(D, "GPT", ForkedGPT)
    assert name in D.load_model(tmp_path / "ckpt.pt")[0].state_dict()
    with pytest.raises(UserError, match=f"there is no Hugging Face name for {name}"):
        D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_replaces_nothing_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "ckpt.pt")
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir(), empty.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full is not empty"):
        D.export(tmp_path / "ckpt.pt", full)
    with pytest.raises(UserError, match="is not a folder|not empty|cannot write"):
        D.export(tmp_path / "ckpt.pt", full / "notes.txt")

    def no_space(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(UserError, match="No space left"):
            D.export(tmp_path / "ckpt.pt", empty)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "empty", "full"]
    assert [p.name for p in full.iterdir()] == ["notes.txt"] and not any(empty.iterdir())
    D.export(tmp_path / "ckpt.pt", empty)
    assert (empty / "config.json").is_file()


@pytest.mark.parametrize("case", ["llama_3", "qwen2", "qwen3", "qwen2_moe", "mixtral", "olmoe", "qwen3_moe"])
def test_a_foreign_folder_can_be_exported_too(case, tmp_path):
    theirs, path = make_folder(case, tmp_path / "in")
    write_words_tokenizer(path)
    D.export(path, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    idx = torch.randint(70, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (theirs(idx).logits - again(idx).logits).abs().max() < 1e-4
    assert D.load_checkpoint(tmp_path / "out")["tokenizer"] == str((tmp_path / "out/tokenizer.json").resolve())


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def texts():
    """Text of many kinds: code, prose, scripts, emoji, runs of whitespace, digits, odd characters."""
    draw = random.Random(0)
    fixed = ["", " ", "Hello  world's <|endoftext|> it'll I'M don't", "\n\n\t \r\n x \u00a0\u3000y  ",
             "日本語 한국어 ไทย العربية", "👩‍👩‍👧 é e\u0301 ﬁ ½ ² Ⅷ", "3.14159 1234567890 ١٢٣",
             "def f(x):\n    return {'a': x ** 2}  # ok\n", "\x00\x07\ufeff\u2028"]
    points = [*range(32, 127), *range(0xA0, 0x250), *range(0x3B0, 0x400), *range(0x4E00, 0x4F00)]
    points += range(0x1F600, 0x1F650)
    mixed = ["".join(chr(draw.choice(points)) + " " * draw.choice([0, 0, 1, 3]) for _ in range(200)) for _ in range(20)]
    return fixed + mixed + [(ROOT / "model.py").read_text(), (ROOT / "README.md").read_text()]


def write_words_tokenizer(folder, **config):
    """A tokenizer of words, with a special token, truncation and a start token that must not get in the way."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "cat": 9}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.enable_truncation(3)
    words.save(str(folder / "tokenizer.json"))
    rewrite(folder, {"eos_token_id": None} | config)
    return folder


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_exported_tokenizer_gives_the_same_ids_and_texts(name, tmp_path, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2")
    make_checkpoint(tmp_path / "ckpt.pt", name, vocab_size=320 if name == "bytes" else 50304)
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    auto, enc = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), D.get_tokenizer(name)
    own = D.get_tokenizer(str(tmp_path / "hf"))
    for text in texts():
        ids = enc.encode_ordinary(text)
        assert own.encode_ordinary(text) == ids == own.encode_to_numpy(text, disallowed_special=()).tolist()
        assert own.decode(ids) == text == auto.decode(ids)
        if D.EOT not in text:                                    # transformers takes the spelt token for the real one
            assert auto(text)["input_ids"] == ids
    assert auto.eos_token_id == enc.eot_token == own.eot_token and own.n_vocab == enc.n_vocab


def test_a_tokenizer_without_a_hugging_face_form_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path / "ckpt.pt", "cl100k_base")
    enc = D.get_tokenizer("bytes")
    monkeypatch.setattr(D, "get_tokenizer", lambda name: enc)
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert "tokenizer cl100k_base not written" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    assert D.load_checkpoint(tmp_path / "hf")["tokenizer"] == "cl100k_base"


@pytest.mark.parametrize("name", ["words", "words/tokenizer.json"])
def test_an_export_may_be_given_another_tokenizer_a_folder_or_its_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/config.json").write_text("{}")
    write_words_tokenizer(tmp_path / "words", eos_token_id=2)
    D.export("ckpt.pt", "hf", name)
    assert D.load_checkpoint("hf")["tokenizer"] == str((tmp_path / "hf/tokenizer.json").resolve())
    assert D.get_tokenizer("hf").encode_ordinary("cat a") == [9, 3]
    assert json.loads(Path("hf/config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizer_of_a_folder_adds_and_cuts_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    enc = D.get_tokenizer(str(write_words_tokenizer(tmp_path, eos_token_id=2)))
    assert enc.encode_ordinary("cat a b cat</s>a cat") == [9, 3, 4, 0, 9] and enc.n_vocab == 10
    assert enc.decode([1, 9, 3, 2]).split() == ["<s>", "cat", "a", "</s>"]


@pytest.mark.parametrize("files, eot", [
    ({"config.json": {"eos_token_id": 9}}, 9), ({"config.json": {"eos_token_id": [2, 9]}}, 2),
    ({"tokenizer_config.json": {"eos_token": "</s>"}}, 2),
    ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}, "config.json": {"eos_token_id": None}}, 2),
    ({"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"eos_token_id": 9}}, 9),
    ({"generation_config.json": {"eos_token_id": [4, 9]}}, 4), ({}, None)], ids=str)
def test_the_end_of_text_is_what_the_folder_says(files, eot, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_words_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if eot is None:
        with pytest.raises(UserError, match="eos_token_id"):
            D.get_tokenizer(str(tmp_path / "tokenizer.json"))
    else:
        assert D.get_tokenizer(str(tmp_path / "tokenizer.json")).eot_token == eot


def test_a_folder_without_a_readable_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is missing or damaged"):
        D.get_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is missing or damaged"):
        D.get_tokenizer(str(tmp_path / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------------------------
# the scripts on a folder


@pytest.mark.parametrize("case", ["qwen3_tied", "qwen2_moe"])
def test_a_folder_is_probed_pruned_trained_on_and_sampled_from(case, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    theirs, path = make_folder(case, tmp_path / "hf")
    write_words_tokenizer(path, eos_token_id=2)
    (tmp_path / "words.txt").write_text(" ".join(random.Random(0).choices(["a", "b", "cat", "dog"], k=3000)))
    code, out, err = run_main(probe, "hf", "--data", "words.txt", "--samples", 4, "--length", 20, "--only",
                              "variance,removal", "--out", "result")
    assert code == 0, err
    result = json.loads((tmp_path / "result/probe.json").read_text())
    enc = D.get_tokenizer(str(path))
    ids = torch.tensor(enc.encode_ordinary((tmp_path / "words.txt").read_text()) + [2])
    picked = np.sort(np.random.default_rng(0).permutation((len(ids) - 1) // 20)[:4])
    idx = torch.stack([ids[i * 20:i * 20 + 20] for i in picked.tolist()])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(idx).logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)

    code, out, err = run_main(probe, "hf", "--data", "words.txt", "--samples", 4, "--length", 20, "--drop", 1,
                              "--save", "pruned.pt")
    assert code == 0, err
    pruned, saved = D.load_model(tmp_path / "pruned.pt")
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[0], theirs.model.layers[2]])
    theirs.config.num_hidden_layers = 2
    with torch.no_grad():
        assert (pruned(idx)[0] - theirs(idx, use_cache=False).logits).abs().max() < 1e-4

    code, out, err = run_main(D, "words.txt", "--tokenizer", "hf", "--out", "words", "--val_fraction", 0.5)
    assert code != 0 and "leave the train split empty" in err        # one document cannot be split in two
    shutil.rmtree(tmp_path / "words", ignore_errors=True)
    (tmp_path / "texts").mkdir()
    for i in range(6):
        shutil.copy(tmp_path / "words.txt", tmp_path / "texts" / f"{i}.txt")
    code, out, err = run_main(D, "texts", "--tokenizer", "hf/tokenizer.json", "--out", "words",
                              "--val_fraction", 0.5)
    assert code == 0, err
    code, out, err = run_main(train, "--init_from=hf", "--data=words", "--out_dir=healed", "--max_steps=2",
                              "--block_size=32", "--tokens_per_step=64", "--learning_rate=1e-9", "--device=cpu")
    assert code == 0, err
    healed, saved = D.load_model(tmp_path / "healed/ckpt.pt")
    original = D.load_model(path)[0]
    assert (healed(idx)[0] - original(idx)[0]).abs().max() < 1e-4 and saved["step"] == 2
    code, out, err = run_main(probe, "hf", "--sample", "cat a", "--new_tokens", 2)
    assert code == 0 and out.startswith("cat a"), err
    code, out, err = run_main(probe, "healed/ckpt.pt", "--export", "again")
    assert code == 0 and "again: healed/ckpt.pt as" in out and (tmp_path / "again/tokenizer.json").is_file(), err


@pytest.mark.parametrize("package, call", [("safetensors", "data.load_model('hf')"),
                                           ("tokenizers", "data.get_tokenizer('hf')")])
def test_a_missing_package_is_one_line(package, call, tmp_path):
    write_words_tokenizer(make_folder("llama", tmp_path / "hf")[1], eos_token_id=2)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; sys.modules[{package!r}] = None; " \
           f"data.run(lambda: {call})"
    assert_mistake(run_python("-c", code, cwd=tmp_path), f"pip install {package}")


def test_an_export_that_cannot_be_is_one_line(tmp_path):
    make_checkpoint(tmp_path / "ckpt.pt", norm="peri")
    assert_mistake(run_script("probe.py", "ckpt.pt", "--export", "hf", cwd=tmp_path), "ckpt.pt", "norm='peri'")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
