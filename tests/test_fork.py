"""If the block in model.py is changed, every experiment and task measures the changed block.

    python -m pytest -q tests/test_fork.py

Two forks of Attention are compared with the same change written by hand. One has scaled values and a
window of keys. The other has an output gate, which is one more matrix. A third fork computes the same
as Attention without calling scaled_dot_product_attention. Smaller forks stand beside their tests.
"""
from __future__ import annotations

import functools
import math
import random
from typing import Any, Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model as M
import probe
from helpers import (attention_by_hand, checkpoint_of, heads_by_hand, make_model, make_tokens, rms_norm,
                     rotate_by_hand, values)
from model import Attention, UserError
from probe import EXPERIMENTS, loglikelihoods
from test_experiments import EXPERTS, NAIVE, REMOVE, T, Truth, assert_close, naive_loss

WINDOW, SCALE = 3, 1.7
MODELS = {"dense": dict(n_layer=3), "moe_peri": dict(n_layer=3, norm="peri", **EXPERTS)}


# ---------------------------------------------------------------------------------------------------------------------
# the forks, and the same changes by hand


class Windowed(Attention):
    """Values are scaled. A token attends to itself and to the WINDOW - 1 tokens before it."""
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, SCALE * v, attn_mask=window(x.size(1)), enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def windowed_by_hand(block: M.Block, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    a, n = block.attn, len(x)
    qs, ks, vs = heads_by_hand(a, rms_norm(x, block.attn_norm) * block.scale)
    mixed, probabilities = [], []
    for h in range(a.n_head):
        g = h // (a.n_head // a.n_kv_head)
        q, k = rotate_by_hand(qs[h], range(n), a.rope), rotate_by_hand(ks[g], range(n), a.rope)
        p = torch.zeros(n, n, dtype=torch.float64)
        rows = []
        for t in range(n):
            first = max(0, t - WINDOW + 1)
            p[t, first:t + 1] = (k[first:t + 1] @ q[t] / math.sqrt(a.head_dim)).softmax(-1)
            rows.append(sum(p[t, j] * SCALE * vs[g][j] for j in range(first, t + 1)))
        mixed.append(torch.stack(rows))
        probabilities.append(p)
    y = torch.cat(mixed, dim=-1) @ values(a.proj.weight).T
    return rms_norm(y, block.attn_out_norm), probabilities


def window(n: int) -> Tensor:
    """The keys that a query sees: (n, n)."""
    return torch.tensor([[0 <= t - j < WINDOW for j in range(n)] for t in range(n)])


class Gated(Attention):
    """The output of attention is multiplied by the sigmoid of a linear map of its input."""
    def __init__(self, config: M.ModelConfig, rope: M.RoPE):
        super().__init__(config, rope)
        self.out_gate = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_gate(x).sigmoid() * super().forward(x)


def gated_by_hand(block: M.Block, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    a, u = block.attn, rms_norm(x, block.attn_norm) * block.scale
    qs, ks, vs = heads_by_hand(a, u)
    mixed, probabilities = [], []
    for h in range(a.n_head):
        g = h // (a.n_head // a.n_kv_head)
        q, k = rotate_by_hand(qs[h], range(len(x)), a.rope), rotate_by_hand(ks[g], range(len(x)), a.rope)
        scores = torch.full((len(x), len(x)), -math.inf, dtype=torch.float64)
        for t in range(len(x)):
            scores[t, :t + 1] = k[:t + 1] @ q[t] / math.sqrt(a.head_dim)
        probabilities.append(scores.softmax(-1))
        mixed.append(probabilities[-1] @ vs[g])
    y = torch.cat(mixed, dim=-1) @ values(a.proj.weight).T
    gate = 1 / (1 + torch.exp(-u @ values(a.out_gate.weight).T))
    return rms_norm(gate * y, block.attn_out_norm), probabilities


class WrittenOut(Attention):
    """The same function as Attention, written with a softmax."""
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (y.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for y in (k, v))
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
        p = (q @ k.mT / math.sqrt(self.head_dim)).masked_fill(~mask, -math.inf).softmax(-1)
        return self.proj((p @ v).transpose(1, 2).flatten(2))


class Fork(NamedTuple):
    attention: type[Attention]
    by_hand: Callable
    seen: Callable[[int], Tensor]       # the keys that each query sees


FORKS = {"windowed": Fork(Windowed, windowed_by_hand, window),
         "gated": Fork(Gated, gated_by_hand, lambda n: torch.ones(n, n, dtype=torch.bool).tril())}
every_fork = pytest.mark.parametrize("fork", FORKS)
every_model = pytest.mark.parametrize("kind", MODELS)


def forked(fork: str | type[Attention], dtype: torch.dtype = torch.float64, **settings: Any) -> M.GPT:
    """A model with the attention of a fork."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(M, "Attention", FORKS[fork].attention if isinstance(fork, str) else fork)
        return make_model(dtype, **settings)


@functools.cache
def measured(fork: str, kind: str) -> tuple[dict[str, Any], Truth]:
    """The result of all experiments on a fork, and the Truth that naive versions use."""
    model, tokens = forked(fork, **MODELS[kind]), make_tokens(5, T)
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        m.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
        truth = Truth(model, tokens, FORKS[fork].by_hand, FORKS[fork].seen(T))
        return probe.probe(model, tokens, remove=REMOVE, sublayers=True), truth


# ---------------------------------------------------------------------------------------------------------------------
# the experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
@every_model
@every_fork
@torch.no_grad()
def test_every_experiment_measures_the_forked_block(fork, kind, name):
    got, truth = measured(fork, kind)
    assert_close(NAIVE[name](truth) | naive_loss(truth), got)


@every_model
@every_fork
def test_no_experiment_measures_the_original_block(fork, kind):
    """Shows that the test above can fail. Scores of weights are the same in both."""
    got, truth = measured(fork, kind)
    plain = probe.probe(make_model(**MODELS[kind]), truth.tokens, remove=REMOVE, sublayers=True)

    def matters(want: Any, got: Any) -> None:
        for key in want:
            if isinstance(want[key], dict):
                matters(want[key], got[key])
            elif key not in same:
                assert want[key] != got[key], key
    same = {"permutation_pairs", "permutation_standard_error", "loose_fit", "score", "top5_overlap",
            "3"}                                              # all 3 blocks removed: nothing is left
    matters({key: value for key, value in plain.items() if key not in ("sparsity", "seconds")}, got)
    if fork == "windowed":
        matters(plain["sparsity"]["attention"], got["sparsity"]["attention"])


def test_a_block_may_be_changed_after_the_model_is_built():
    model, (want, truth) = make_model(**MODELS["dense"]), measured("windowed", "dense")
    for block in model.blocks:
        block.attn.__class__ = Windowed
    got = probe.probe(model, truth.tokens, remove=REMOVE, sublayers=True)
    assert_close({key: want[key] for key in want if key != "seconds"}, got)
    plain = probe.probe(make_model(**MODELS["dense"]), truth.tokens, remove=REMOVE, sublayers=True)
    assert plain["variance"] != pytest.approx(got["variance"], rel=1e-3)


def test_attention_only_to_the_token_itself_has_no_entropy(monkeypatch):
    monkeypatch.setattr("test_fork.WINDOW", 1)
    model = forked("windowed", **MODELS["dense"])
    got = probe.probe(model, make_tokens(2, T), ["sparsity"])["sparsity"]
    assert got["attention"] == {"entropy": [0] * 3, "keys_for_90_percent": [1] * 3, "effective_keys": [1] * 3}
    assert got["interaction_density"] == [0.5] * 3                                        # 2 key heads, 4 query heads


def test_attention_is_compared_with_uniform_attention_to_the_visible_keys():
    """With zero queries, all visible keys have the same weight, so every score is 1."""
    model = forked("windowed", **MODELS["dense"])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:block.attn.n_head * block.attn.head_dim] = 0
    got = probe.probe(model, make_tokens(2, T), ["sparsity"])["sparsity"]["attention"]
    for row in (got["entropy"], got["effective_keys"], got["keys_for_90_percent"]):
        assert row == pytest.approx([1] * 3, abs=1e-6)


def test_scaled_values_scale_the_contribution_of_attention():
    model, tokens = make_model(**MODELS["dense"]), make_tokens(4, T)
    before = probe.probe(model, tokens, ["contribution"])["contribution"]
    heads = Attention.heads

    class Scaled(Attention):
        def heads(self, x):
            q, k, v = heads(self, x)
            return q, k, SCALE * v
    model.blocks[0].attn.__class__ = Scaled
    after = probe.probe(model, tokens, ["contribution"])["contribution"]
    assert after["attn_ratio"][0] == pytest.approx(SCALE * before["attn_ratio"][0], rel=1e-12)
    assert after["attn_cosine"][0] == pytest.approx(before["attn_cosine"][0], rel=1e-12)
    assert after["attn_ratio"][1] != pytest.approx(before["attn_ratio"][1], rel=1e-3)


def test_the_scores_of_weights_include_a_new_matrix():
    weights = measured("gated", "dense")[0]["sparsity"]["weights"]
    assert len(weights["attn.out_gate"]["hoyer"]) == 3


# ---------------------------------------------------------------------------------------------------------------------
# an attention without scaled_dot_product_attention: its probabilities are unknown


def test_all_but_the_sparsity_of_attention_is_measured_if_its_probabilities_are_unknown():
    model, tokens = forked(WrittenOut, **MODELS["dense"]), make_tokens(4, T)
    others = [name for name in EXPERIMENTS if name != "sparsity"]
    want, got = probe.probe(make_model(**MODELS["dense"]), tokens, others), probe.probe(model, tokens, others)
    del want["seconds"]
    assert_close(want, got)
    r = probe.probe(model, tokens, ["sparsity"])
    assert all(math.isnan(x) for row in r["sparsity"]["attention"].values() for x in row)
    assert any("scaled_dot_product_attention" in line for line in probe.summary(r))


# ---------------------------------------------------------------------------------------------------------------------
# tasks


def some_pairs() -> list[tuple[list[int], list[int]]]:
    """Pairs of context and continuation. Some pairs share a context, and some contexts are cut."""
    draw = random.Random(0)

    def some(n: int) -> list[int]:
        return [draw.randrange(29) for _ in range(n)]
    pairs = [(some(n), some(m)) for n in (1, 4, 9) for m in (1, 3)]
    for n in (1, 2, 5, 30):
        context = some(n)
        pairs += [([*context], some(m)) for m in (1, 4, 2, 6, 11)]
    return pairs


@torch.no_grad()
def by_hand(model: M.GPT, attention: Callable, context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context) with layers written by hand, and a pass for every token."""
    limit, total = model.config.block_size, 0.0
    whole = (context + continuation)[-limit - 1:]
    for j in range(max(1, len(whole) - len(continuation)), len(whole)):
        t = Truth(model, torch.tensor([whole[:j]]), attention)
        logits = rms_norm(t.h[0][-1][-1], model.norm) @ values(model.head.weight).T
        total += logits.log_softmax(-1)[whole[j]].item()
    return total


@every_model
@every_fork
def test_tasks_on_a_forked_block_score_as_if_computed_one_token_at_a_time(fork, kind, monkeypatch):
    model, pairs = forked(fork, **MODELS[kind]), some_pairs()
    want = [by_hand(model, FORKS[fork].by_hand, *pair) for pair in pairs]
    for tokens_at_once in (4096, 60):
        monkeypatch.setattr(probe, "TOKENS_AT_ONCE", tokens_at_once)
        assert [value for value, _ in loglikelihoods(model, pairs)] == pytest.approx(want, rel=1e-10, abs=1e-10)
    plain = [by_hand(make_model(**MODELS[kind]), attention_by_hand, *pair) for pair in pairs[-5:]]
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain, want[-5:]))                    # the last have long contexts


def test_tasks_do_not_need_the_probabilities_of_attention():
    pairs = some_pairs()
    want = loglikelihoods(make_model(**MODELS["dense"]), pairs)
    got = loglikelihoods(forked(WrittenOut, **MODELS["dense"]), pairs)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], rel=1e-10, abs=1e-10)
    assert [likeliest for _, likeliest in got] == [likeliest for _, likeliest in want]


# ---------------------------------------------------------------------------------------------------------------------
# other functions that depend on a new matrix


@every_model
def test_the_flops_count_the_matrix_of_the_gate(kind):
    plain, model = make_model(**MODELS[kind]), forked("gated", **MODELS[kind])
    n, d = 3, model.config.n_embd
    for length in (None, 5):
        more = model.flops_per_token(length, backward=False) - plain.flops_per_token(length, backward=False)
        assert more == 2 * n * d * d
        assert model.flops_per_token(length) - plain.flops_per_token(length) == 3 * more
    have, had = model.count_parameters(), plain.count_parameters()
    assert {key: have[key] - had[key] for key in have} == dict.fromkeys(have, n * d * d)


def test_the_gate_is_saved_and_loaded_and_stays_when_a_block_is_dropped(tmp_path, monkeypatch):
    model, tokens = forked("gated", torch.float32, **MODELS["dense"]), make_tokens(3, T)
    data.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(model))
    data.save_checkpoint(tmp_path / "pruned.pt", probe.without_blocks(checkpoint_of(model), [1]))
    with pytest.raises(UserError, match="the model has no blocks.0.attn.out_gate.weight"):
        data.load_model(tmp_path / "ckpt.pt")
    monkeypatch.setattr(M, "Attention", Gated)
    with torch.no_grad():
        assert torch.equal(data.load_model(tmp_path / "ckpt.pt")[0](tokens)[0], model(tokens)[0])
        x = model.blocks[2](model.blocks[0](model.embed(tokens)))
        want = model.head(model.norm(x))
        assert torch.allclose(data.load_model(tmp_path / "pruned.pt")[0](tokens)[0], want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# more forks


class Twice(Attention):
    """The mean of Attention and of attention only to the token itself."""
    def forward(self, x):
        q, k, v = self.heads(x)
        itself = torch.eye(x.size(1), dtype=torch.bool)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=itself, enable_gqa=True)
        return (super().forward(x) + self.proj(y.transpose(1, 2).flatten(2))) / 2


def test_the_sparsity_of_several_attentions_in_a_block_is_their_mean(monkeypatch):
    plain = probe.probe(make_model(n_layer=1), make_tokens(4, T), ["sparsity"])["sparsity"]["attention"]
    monkeypatch.setattr(M, "Attention", Twice)
    both = probe.probe(make_model(n_layer=1), make_tokens(4, T), ["sparsity"])["sparsity"]["attention"]
    assert both["entropy"] == pytest.approx([plain["entropy"][0] / 2])
    assert both["effective_keys"] == pytest.approx([(plain["effective_keys"][0] + 1) / 2])


def test_a_tensor_of_three_dimensions_outside_the_ffn_is_not_counted_as_experts(monkeypatch):
    class Extra(Attention):
        def __init__(self, config, rope):
            super().__init__(config, rope)
            self.table = nn.Parameter(torch.zeros(2, 8, 16))
    before = make_model(n_layer=2, **EXPERTS).count_parameters()
    monkeypatch.setattr(M, "Attention", Extra)
    after = make_model(n_layer=2, **EXPERTS).count_parameters()
    assert {name: after[name] - before[name] for name in after} == {name: 2 * 256 for name in after}


@pytest.mark.parametrize("fork", [Windowed, Gated])
def test_a_fork_that_transformers_has_no_class_for_is_not_exported(fork, tmp_path, monkeypatch):
    """The weights of the gate have no place in Llama, and the logits of the window differ."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(M, "Attention", fork)
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS["dense"])), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        data.export(tmp_path / "ckpt.pt", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
