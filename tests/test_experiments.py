"""Compare every experiment of probe.py with a naive version: whole passes, one sequence at a time, in float64.

    python -m pytest -q tests/test_experiments.py                 # about a minute of one core
    python -m pytest -q tests/test_experiments.py -k causal       # one of them
    python -m pytest -q tests/test_experiments.py -k golden       # scores that other programs computed

Each experiment has a section: its naive version, the comparison, and tests of special cases. The naive versions
follow the definitions (arXiv 2603.15389 and its released scripts). They share no code with probe.py. From model.py they
use only the weights: tests/helpers.py writes out the computation of a layer.
"""
from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import probe
from helpers import (GOLDEN, TINY, attention_by_hand, differences, ffn_by_hand, logits_by_hand, loss_by_hand,
                     make_model, make_tokens, negative_log_likelihood, rms_norm, streams_by_hand, values)
from model import GPT, Block, ModelConfig, UserError
from probe import EXPERIMENTS, affine_map, moments

V, T, B = TINY["vocab_size"], 9, 7                    # a tiny sample, with an odd number of sequences
EXPERTS = dict(n_experts=12, top_k=2, expert_hidden=8, shared_hidden=12)
MODELS = {
    "dense": dict(n_layer=5),
    "dense_peri": dict(n_layer=4, norm="peri"),
    "moe": dict(n_layer=4, **EXPERTS),
    "moe_lns": dict(n_layer=4, norm="lns", norm_topk_prob=True, **EXPERTS),
}
REMOVE = (1, 2, 3)
BELOW = 0.1                                           # the threshold of weight sparsity, by default

Layer = Callable[[Tensor], Tensor]                    # (1, T, d) -> (1, T, d)


# ---------------------------------------------------------------------------------------------------------------------
# the common part of all naive versions


class Truth:
    """A model, tokens (B, T), and one pass of each sequence through layers that are written out by hand.

    attention: used instead of `attention_by_hand` for a model with another kind of attention.
    seen (T, T): the keys that each query sees.
    """
    def __init__(self, model: GPT, tokens: Tensor, attention: Callable = attention_by_hand, seen: Tensor | None = None):
        self.model, self.tokens, self.attention = model, tokens, attention
        self.n, self.d, self.half = len(model.blocks), model.config.n_embd, len(tokens) // 2
        self.few = len(tokens) - self.half            # sequences for the Jacobian, by default
        self.dense = not model.config.n_experts
        length = tokens.size(1)
        self.seen = torch.ones(length, length, dtype=torch.bool).tril() if seen is None else seen
        self.layers = [functools.partial(self.layer, block) for block in model.blocks]
        self.h: list[list[Tensor]] = []               # h[i][l] (T, d): the stream of sequence i after l blocks
        self.attn: list[list[Tensor]] = []            # attn[i][l] (T, d): what attention of block l added
        self.ffn: list[list[Tensor]] = []             # ffn[i][l] (T, d): what the FFN added
        self.p: list[list[list[Tensor]]] = []         # p[i][l][head] (T, T): the attention weights
        self.chosen: list[list[list[list[int]]]] = []            # chosen[i][l][t]: the experts of token t
        for sequence in tokens:
            x = values(model.embed.weight)[sequence]
            h, attn, ffn, ps, chosen = [x], [], [], [], []
            for block in model.blocks:
                a, p = attention(block, x)
                f, best = ffn_by_hand(block, x + a)
                assert torch.allclose(x + a + f, block(x[None])[0], rtol=1e-10, atol=1e-10)
                x = x + a + f
                h.append(x)
                attn.append(a)
                ffn.append(f)
                ps.append(p)
                chosen.append(best)
            self.h.append(h)
            self.attn.append(attn)
            self.ffn.append(ffn)
            self.p.append(ps)
            self.chosen.append(chosen)

    @functools.cached_property
    def loss(self) -> float:
        return self.loss_with(self.layers)

    def layer(self, block: Block, x: Tensor) -> Tensor:
        x = x[0] + self.attention(block, x[0])[0]
        return (x + ffn_by_hand(block, x)[0])[None]

    def stream(self, l: int) -> list[Tensor]:
        """h_l of every sequence."""
        return [h[l] for h in self.h]

    @functools.cached_property
    def losses(self) -> list[float]:
        return self.losses_with(self.layers)

    def loss_with(self, layers: Sequence[Layer]) -> float:
        return loss_by_hand(self.model, self.tokens, layers)

    def losses_with(self, layers: Sequence[Layer]) -> list[float]:
        """The loss of each sequence."""
        return [loss_by_hand(self.model, sequence[None], layers) for sequence in self.tokens]

    def streams_with(self, layers: Sequence[Layer]) -> list[list[Tensor]]:
        return [streams_by_hand(self.model, sequence, layers) for sequence in self.tokens]


def with_layer(layers: Sequence[Layer], l: int, layer: Layer) -> list[Layer]:
    return [*layers[:l], layer, *layers[l + 1:]]


def identity(x: Tensor) -> Tensor:
    return x


@functools.cache
def own_tokens(kind: str) -> Tensor:
    """Tokens (B, T) sampled from the model. The model predicts them well, so its blocks matter to the loss."""
    model, generator = make_model(**MODELS[kind]), torch.Generator().manual_seed(0)
    idx = torch.randint(V, (B, 1), generator=generator)
    with torch.no_grad():
        while idx.size(1) < T:
            p = model(idx)[0][:, -1].softmax(-1)
            idx = torch.cat((idx, torch.multinomial(p, 1, generator=generator)), dim=1)
    return idx


@functools.cache
def truth(kind: str) -> Truth:
    with torch.no_grad():
        return Truth(make_model(**MODELS[kind]), own_tokens(kind))


@functools.cache
@torch.no_grad()
def worked_out(naive: Callable[[Truth], dict[str, Any]], kind: str) -> dict[str, Any]:
    """The result of a naive version for a model."""
    return naive(truth(kind))


@functools.cache
def measured(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The result of probe.py for all experiments together, in micro-batches of at most 2 sequences."""
    with mock.patch.object(probe, "TOKENS_AT_ONCE", 2 * T + 1):
        return probe.probe(make_model(dtype, **MODELS[kind]), own_tokens(kind), remove=REMOVE, sublayers=True)


def assert_close(want: Any, got: Any, dtype: torch.dtype = torch.float64) -> None:
    """Assert that `got`, from probe.py, equals `want`, from a naive version, up to the precision of dtype."""
    if dtype == torch.float32:
        assert differences(want, got, lambda path: 1e-4, 1e-6) == []
    else:
        assert differences(want, got, lambda path: 1e-6 if "usefulness" in path else 1e-8, 1e-12) == []


def same(want: Any, got: Any, relative: float = 1e-12) -> bool:
    return not differences(want, got, lambda path: relative, 1e-14)


def every_model_in_both_precisions(test: Callable) -> Callable:
    precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    return pytest.mark.parametrize("kind", MODELS)(precisions(test))


# means over the tokens of all sequences


def mean_variance(xs: Sequence[Tensor]) -> float:
    """The mean of the unbiased variance over features."""
    return np.concatenate([np.var(x.numpy(), axis=-1, ddof=1) for x in xs]).mean()


def mean_norm(xs: Sequence[Tensor]) -> float:
    return np.concatenate([np.linalg.norm(x.numpy(), axis=-1) for x in xs]).mean()


def mean_cosine(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return np.mean([float(a @ b / (a.norm() * b.norm())) for x, y in zip(xs, ys) for a, b in zip(x, y)])


def mean_ratio(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return np.mean([float(a.norm() / b.norm()) for x, y in zip(xs, ys) for a, b in zip(x, y)])


# ---------------------------------------------------------------------------------------------------------------------
# loss: part of every result


def naive_loss(t: Truth) -> dict[str, Any]:
    return {"loss": t.loss}


@every_model_in_both_precisions
def test_the_loss_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_loss, kind), measured(kind, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# variance


def naive_variance(t: Truth) -> dict[str, Any]:
    variance = [mean_variance(t.stream(l)) for l in range(t.n + 1)]
    return {"variance": variance, "variance_growth": [after / before for before, after in zip(variance, variance[1:])],
            "attn_variance": [mean_variance([attn[l] for attn in t.attn]) for l in range(t.n)],
            "ffn_variance": [mean_variance([ffn[l] for ffn in t.ffn]) for l in range(t.n)]}


@every_model_in_both_precisions
def test_the_variance_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_variance, kind), measured(kind, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# causal score


def naive_causal(t: Truth) -> dict[str, Any]:
    C = np.zeros((t.n, t.n))
    for s in range(t.n):
        g = t.streams_with(with_layer(t.layers, s, identity))
        for l in range(s + 1, t.n):
            changed = [(a[l + 1] - a[l]) - (b[l + 1] - b[l]) for a, b in zip(t.h, g)]
            C[s, l] = mean_norm(changed) / mean_norm([a[l + 1] - a[l] for a in t.h])
    return {"causal": C.tolist(), "causal_mean": C.sum() / (t.n * (t.n - 1) // 2)}


@every_model_in_both_precisions
def test_the_causal_score_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_causal, kind), measured(kind, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# permutation score


def naive_permutation(t: Truth) -> dict[str, Any]:
    P, error, n_pairs = np.zeros((t.n, t.n)), np.zeros((t.n, t.n)), t.n * (t.n - 1) // 2
    for i in range(t.n):
        for j in range(i + 1, t.n):
            losses = t.losses_with(with_layers_swapped(t.layers, i, j))
            P[i, j] = P[j, i] = abs(sum(losses) - sum(t.losses)) / sum(t.losses)
            error[i, j] = error[j, i] = error_of_ratio(losses, t.losses)
    return {"permutation": P.tolist(), "permutation_stderr": error.tolist(), "permutation_pairs": n_pairs,
            "permutation_mean": P.sum() / 2 / n_pairs, "permutation_standard_error": math.nan}


def error_of_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard error of sum(a) / sum(b): the standard error of mean(a - ratio * b), over the mean of b."""
    ratio = sum(a) / sum(b)
    return error_of_mean([x - ratio * y for x, y in zip(a, b)]) / (sum(b) / len(b))


def error_of_mean(x: Sequence[float]) -> float:
    mean = sum(x) / len(x)
    return math.sqrt(sum((y - mean) ** 2 for y in x) / (len(x) - 1) / len(x))


def with_layers_swapped(layers: Sequence[Layer], i: int, j: int) -> list[Layer]:
    return with_layer(with_layer(layers, i, layers[j]), j, layers[i])


@every_model_in_both_precisions
def test_the_permutation_score_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_permutation, kind), measured(kind, dtype), dtype)


def test_sampled_pairs_are_a_reproducible_subset_of_all_pairs():
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    full = np.array(worked_out(naive_permutation, "dense")["permutation"])
    seen = []
    for seed in (0, 0, 1, 2):
        got = probe.probe(model, tokens, ["permutation"], pairs=4, seed=seed)
        P = np.array(got["permutation"])
        known = ~np.isnan(P)
        assert known.sum() == 5 + 2 * 4 and known.diagonal().all() and (known == known.T).all()
        assert P[known] == pytest.approx(full[known], rel=1e-8)
        sampled = [P[i, j] for i in range(5) for j in range(i + 1, 5) if known[i, j]]
        mean = sum(sampled) / 4
        spread = math.sqrt(sum((x - mean) ** 2 for x in sampled) / 3)
        assert got["permutation_pairs"] == 4 and got["permutation_mean"] == pytest.approx(mean, rel=1e-12)
        assert got["permutation_standard_error"] == pytest.approx(spread / 2, rel=1e-9)
        seen.append(known.tobytes())
    assert seen[0] == seen[1] and len(set(seen)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# usefulness


def naive_usefulness(t: Truth) -> dict[str, Any]:
    second_half = t.tokens[t.half:]
    first_half_fits = [fit(t, l, t.half) for l in range(t.n)]
    return {"usefulness": scores_of_maps(t, [fit(t, l, len(t.tokens)) for l in range(t.n)], t.tokens, t.tokens.numel()),
            "usefulness_heldout": scores_of_maps(t, first_half_fits, second_half, t.half * t.tokens.size(1))}


def fit(t: Truth, l: int, sequences: int, recorded: Layer = identity) -> tuple[Tensor, Tensor]:
    """Least squares from [h_l, 1] to h_{l+1}, on all tokens of the first `sequences` sequences together."""
    X = np.concatenate([np.concatenate((h[l].numpy(), np.ones((len(h[l]), 1))), axis=1) for h in t.h[:sequences]])
    Y = np.concatenate([recorded(h[l + 1]).numpy() for h in t.h[:sequences]])
    solution = np.linalg.lstsq(X, Y, rcond=None)[0]
    return torch.from_numpy(solution[:-1]), torch.from_numpy(solution[-1])


def scores_of_maps(t: Truth, maps: Sequence[tuple[Tensor, Tensor]], tokens: Tensor, fitted_on: int) -> dict[str, Any]:
    """The scores on these tokens. Each layer in turn is replaced by its map."""
    def losses(layers: Sequence[Layer]) -> list[float]:
        return [loss_by_hand(t.model, sequence[None], layers) for sequence in tokens]

    whole, ratio, error = losses(t.layers), [], []
    for l, (W, b) in enumerate(maps):
        mapped = losses(with_layer(t.layers, l, lambda x: x @ W + b))
        ratio.append(sum(mapped) / sum(whole))
        error.append(error_of_ratio(mapped, whole))
    return {"ratio": ratio, "ratio_stderr": error, "score": sum(r > 1.1 for r in ratio) / t.n,
            "mean_log_ratio": sum(map(math.log, ratio)) / t.n, "loose_fit": fitted_on < 10 * (t.d + 1)}


@every_model_in_both_precisions
def test_the_usefulness_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_usefulness, kind), measured(kind, dtype), dtype)


@pytest.mark.parametrize("sequences, loose, heldout_loose", [(9, True, True), (10, False, True), (20, False, False)])
def test_a_fit_on_fewer_than_10_d_plus_10_tokens_is_called_loose(sequences, loose, heldout_loose):
    got = probe.probe(make_model(n_layer=2), make_tokens(sequences, T), ["usefulness"])     # 10 (d + 1): 10 sequences
    assert got["usefulness"]["loose_fit"] is loose and got["usefulness_heldout"]["loose_fit"] is heldout_loose


# the affine map


def regression_cases() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    plain = draw.normal(size=(400, 6))
    scaled = plain * 10.0 ** np.array([-6, -3, 0, 2, 4, 6])
    far = plain + np.array([1e3, -1e3, 0, 500, 1e4, 1])
    dependent = np.concatenate((plain, plain[:, :2] @ draw.normal(size=(2, 3))), axis=1)
    everything = np.concatenate((scaled, scaled[:, [0, 5]], np.full((400, 1), 7.7)), axis=1)
    return {"plain": plain, "dependent_columns": dependent, "far_from_0": far, "all_at_once": everything,
            "fewer_tokens_than_features": plain[:4]}


@pytest.mark.parametrize("name", regression_cases())
def test_the_affine_map_predicts_as_least_squares_on_all_tokens_does(name):
    X, draw = regression_cases()[name], np.random.default_rng(1)
    d = X.shape[1]
    scale = np.where(X.std(0) > 1e-9, X.std(0), 1.0)
    Z = (X - X.mean(0)) / scale                                             # well conditioned
    Y = 3 * np.tanh(Z @ draw.normal(size=(d, d))) + draw.normal(size=X.shape) + 5
    Z1 = np.concatenate((Z, np.ones((len(X), 1))), axis=1)
    solution = np.linalg.lstsq(Z1, Y, rcond=1e-10)[0]                       # the smallest solution if there are many
    x, y = (torch.from_numpy(a).reshape(4, -1, d) for a in (X, Y))
    W, b = affine_map(sum(moments(x[i:i + 1], y[i:i + 1]) for i in range(4)))
    got, want = (x @ W + b).flatten(0, 1).numpy(), Z1 @ solution
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()
    assert np.abs(scale[:, None] * W.numpy() - solution[:-1]).max() < 1e-6


def test_the_affine_map_of_constant_features_is_the_mean():
    y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    W, b = affine_map(moments(torch.full((2, 30, 4), 0.3), y))
    assert torch.equal(W, torch.zeros_like(W)) and torch.allclose(b, y.double().mean((0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# the scores by the released scripts


def naive_released(t: Truth) -> dict[str, Any]:
    """Emulates the authors' scripts. They do not transpose W where they should. In dense models, they record h_n after
    the final norm. Their record of g has no entry for the skipped block, so later streams are read one place early."""
    def normed(x: Tensor) -> Tensor:
        return rms_norm(x, t.model.norm) if t.dense else x

    def record(streams: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        return [[*xs[:-1], normed(xs[-1])] for xs in streams]

    h = record(t.h)
    C = np.zeros((t.n, t.n))
    for s in range(t.n):
        g = record(t.streams_with(with_layer(t.layers, s, identity)))
        for l in range(s + 1, t.n - 1 if t.dense else t.n):
            early = l + t.dense
            changed = mean_norm([(a[l + 1] - a[l]) - (b[early + 1] - b[early]) for a, b in zip(h, g)])
            C[s, l] = changed / mean_norm([a[l + 1] - a[l] for a in h])
    everything, last = len(t.tokens), t.n - 1
    maps = [fit(t, l, everything) for l in range(last)] + [fit(t, last, everything, normed)]
    transposed = [(W.T, b) for W, b in maps]
    layers = [*t.layers[:-1], lambda x: normed(t.layers[-1](x))]
    return {"released": {
        "causal": C.tolist(), "usefulness": scores_of_maps(t, transposed, t.tokens, t.tokens.numel()),
        "variance": [mean_variance([a[l] for a in h]) for l in range(t.n + 1)],
        "jacobian": statistics([mean_jacobian(layer, t.stream(l)[:t.few]) for l, layer in enumerate(layers)])}}


@every_model_in_both_precisions
def test_the_released_scores_equal_their_naive_version(kind, dtype):
    assert_close(worked_out(naive_released, kind), measured(kind, dtype), dtype)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_released_scores_differ_from_the_definitions_where_the_scripts_do(kind):
    got = probe.probe(make_model(**MODELS[kind]), own_tokens(kind), ["variance", "causal", "jacobian", "released"])
    for key in ("variance", "causal", "jacobian"):
        assert same(got[key], got["released"][key], 1e-9) == (kind == "moe")


# ---------------------------------------------------------------------------------------------------------------------
# removal


def naive_removal(t: Truth) -> dict[str, Any]:
    blocks = list(enumerate(t.model.blocks))
    only_ffn = [lambda x, block=block: x + ffn_by_hand(block, x[0])[0] for _, block in blocks]
    only_attn = [lambda x, block=block: x + t.attention(block, x[0])[0] for _, block in blocks]
    layers = {str(r): [t.layers[:s] + t.layers[s + r:] for s in range(t.n - r + 1)] for r in REMOVE}
    layers["attn"] = [with_layer(t.layers, l, only_ffn[l]) for l, _ in blocks]
    layers["ffn"] = [with_layer(t.layers, l, only_attn[l]) for l, _ in blocks]
    out: dict[str, Any] = {"removal": {}, "removal_stderr": {}, "removal_halves": {}}
    for what, changed in layers.items():
        losses = [t.losses_with(its_layers) for its_layers in changed]
        growth = [[a - b for a, b in zip(row, t.losses)] for row in losses]
        out["removal"][what] = [np.mean(row) for row in losses]
        out["removal_stderr"][what] = [error_of_mean(row) for row in growth]
        out["removal_halves"][what] = {"chosen_by": [np.mean(row[::2]) for row in growth],
                                       "price": [np.mean(row[1::2]) for row in growth],
                                       "price_stderr": [error_of_mean(row[1::2]) for row in growth]}
    return out | {"block_influence": [1 - mean_cosine(t.stream(l), t.stream(l + 1)) for l, _ in blocks]}


@every_model_in_both_precisions
def test_the_removals_equal_their_naive_version(kind, dtype):
    assert_close(worked_out(naive_removal, kind), measured(kind, dtype), dtype)


def test_removing_all_blocks_leaves_the_embedding():
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["removal", "lens"], remove=(5,))
    assert got["removal"]["5"] == pytest.approx([got["lens"]["loss"][0]], rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Jacobian


def naive_jacobian(t: Truth) -> dict[str, Any]:
    return {"jacobian": statistics([mean_jacobian(layer, t.stream(l)[:t.few]) for l, layer in enumerate(t.layers)])}


def mean_jacobian(layer: Layer, xs: Sequence[Tensor]) -> np.ndarray:
    """The Jacobian (d, d) of the layer's output, summed over positions, averaged over sequences and input positions."""
    def output(x: Tensor) -> Tensor:
        return layer(x)[0].sum(0)                                                                         # (d,)

    Js = [torch.autograd.functional.jacobian(output, x[None])[:, 0] for x in xs]                          # (d, T, d)
    return torch.stack([J.mean(1) for J in Js]).mean(0).numpy()


def statistics(Js: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Statistics of the mean Jacobians, one per layer."""
    out = {key: [] for key in ("deviation", "diagonal_mean", "diagonal_std", "off_diagonal", "spectral")}
    for J in Js:
        d = len(J)
        off = [J[a, b] for a in range(d) for b in range(d) if a != b]
        from_identity = [(J[a, b] - (a == b)) ** 2 for a in range(d) for b in range(d)]
        out["deviation"].append(math.sqrt(sum(from_identity)) / d)
        out["diagonal_mean"].append(np.mean(np.diag(J)))
        out["diagonal_std"].append(np.std(np.diag(J), ddof=1))
        out["off_diagonal"].append(math.sqrt(sum(x * x for x in off) / len(off)))
        out["spectral"].append(np.linalg.svd(J)[1][0])
    return out


@every_model_in_both_precisions
def test_the_jacobian_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_jacobian, kind), measured(kind, dtype), dtype)


@pytest.mark.parametrize("samples", [1, 3, 7, 100])
def test_the_jacobian_is_measured_on_the_first_sequences(samples, monkeypatch):
    """The expected value comes from the full Jacobian: every output position by every input position."""
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(**MODELS["moe"]), make_tokens(B, T)
    got = probe.probe(model, tokens, ["jacobian"], jacobian_samples=samples)["jacobian"]
    with torch.no_grad():
        xs = [streams_by_hand(model, sequence, model.blocks)[1] for sequence in tokens[:samples]]
    full = [torch.autograd.functional.jacobian(model.blocks[1], x[None])[0, :, :, 0] for x in xs]         # (T, d, T, d)
    J = torch.stack([J.sum(0).mean(1) for J in full]).mean(0).numpy()
    want = {key: row[0] for key, row in statistics([J]).items()}
    assert {key: got[key][1] for key in want} == pytest.approx(want, rel=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# lens


def naive_lens(t: Truth) -> dict[str, Any]:
    out = {"kl": [], "loss": [], "top5_overlap": []}
    for l in range(t.n + 1):
        kl, nll, overlap = [], [], []
        for sequence, h in zip(t.tokens, t.h):
            own, q = (logits_by_hand(t.model, x).log_softmax(-1) for x in (h[-1], h[l]))
            nll.append(negative_log_likelihood(t.model, h[l], sequence))
            for position in range(len(sequence)):
                a, b = own[position].tolist(), q[position].tolist()
                kl.append(sum(math.exp(x) * (x - y) for x, y in zip(a, b)))
                top, other = (sorted(range(len(a)), key=lambda v: -row[v])[:5] for row in (a, b))
                overlap.append(len(set(top) & set(other)) / 5)
        out["kl"].append(np.mean(kl))
        out["loss"].append(sum(nll) / (t.tokens.numel() - len(t.tokens)))
        out["top5_overlap"].append(np.mean(overlap))
    return {"lens": out}


@every_model_in_both_precisions
def test_the_lens_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_lens, kind), measured(kind, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# contribution


def naive_contribution(t: Truth) -> dict[str, Any]:
    out = {key: [] for key in ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")}
    for l in range(t.n):
        attn, ffn = [attn[l] for attn in t.attn], [ffn[l] for ffn in t.ffn]
        x = t.stream(l)
        between = [a + b for a, b in zip(x, attn)]                            # the stream that the FFN adds to
        out["attn_ratio"].append(mean_ratio(attn, x))
        out["ffn_ratio"].append(mean_ratio(ffn, between))
        out["attn_cosine"].append(mean_cosine(attn, x))
        out["ffn_cosine"].append(mean_cosine(ffn, between))
    return {"contribution": out}


@every_model_in_both_precisions
def test_the_contribution_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_contribution, kind), measured(kind, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# sparsity


def naive_sparsity(t: Truth) -> dict[str, Any]:
    c, of_layers = t.model.config, [sparsity_of_attention(t, l) for l in range(t.n)]
    attention = {key: [row[key] for row in of_layers] for key in of_layers[0]}
    out = {"weights": sparsity_of_weights(t), "below": BELOW, "attention": attention,
           "interaction_density": [x * c.n_kv_head / c.n_head for x in attention["effective_keys"]]}
    if c.n_experts:
        loads = [load_of_experts(t, l) for l in range(t.n)]
        out["experts"] = {"load": loads, "never_used": [load.count(0) / c.n_experts for load in loads],
                          "entropy": [entropy(load) / math.log(c.n_experts) for load in loads]}
    return {"sparsity": out}


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def sparsity_of_weights(t: Truth) -> dict[str, dict[str, list[float]]]:
    weights: dict[str, dict[str, list[float]]] = {}
    for block in t.model.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                w = values(w).numpy().ravel()
                entry = weights.setdefault(name.removesuffix(".weight"), {"below": [], "hoyer": []})
                entry["below"].append(sum(abs(x) < BELOW * t.model.config.init_std for x in w) / len(w))
                root = math.sqrt(len(w))
                entry["hoyer"].append((root - np.abs(w).sum() / math.sqrt((w * w).sum())) / (root - 1))
    return weights


def sparsity_of_attention(t: Truth, l: int) -> dict[str, float]:
    """Means over all heads and all queries except the first of each sequence."""
    rows = [p[query, t.seen[query]].tolist() for of_layers in t.p for p in of_layers[l] for query in range(1, len(p))]
    needed = []
    for row in rows:
        held, keys = 0.0, 0
        for x in sorted(row, reverse=True):
            held, keys = held + x, keys + 1
            if held >= 0.9:
                break
        needed.append(keys / len(row))
    relative = [entropy(row) / math.log(len(row)) if len(row) > 1 else 0.0 for row in rows]
    return {"entropy": np.mean(relative), "keys_for_90_percent": np.mean(needed),
            "effective_keys": np.mean([math.exp(entropy(row)) / len(row) for row in rows])}


def load_of_experts(t: Truth, l: int) -> list[float]:
    tokens = [best for of_layers in t.chosen for best in of_layers[l]]
    return [sum(e in best for best in tokens) / (len(tokens) * t.model.config.top_k)
            for e in range(t.model.config.n_experts)]


@every_model_in_both_precisions
def test_the_sparsity_equals_its_naive_version(kind, dtype):
    assert_close(worked_out(naive_sparsity, kind), measured(kind, dtype), dtype)


def test_hoyer_is_0_for_equal_weights_and_1_for_a_single_nonzero_weight():
    model = make_model(**MODELS["dense"])
    with torch.no_grad():
        model.blocks[0].ffn.up.weight.fill_(-0.3)
        model.blocks[1].ffn.up.weight.zero_()[2, 3] = 5.0
    hoyer = probe.probe(model, make_tokens(B, T), ["sparsity"])["sparsity"]["weights"]["ffn.up"]["hoyer"]
    assert hoyer[:2] == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("settings", [{"is_causal": True}, {"scale": 0.3}, {"mask": True}, {"keys": 8}], ids=str)
def test_attention_weights_are_the_softmax_of_scaled_products(settings):
    heads, key_heads, T, D = 4, 2, 6, 4
    draw, keys = torch.Generator().manual_seed(0), settings.get("keys", T)
    query = torch.randn(2, heads, T, D, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, key_heads, keys, D, generator=draw, dtype=torch.float64)
    given = {name: x for name, x in settings.items() if name in ("is_causal", "scale")}
    visible = torch.ones(T, keys, dtype=torch.bool)
    if settings.get("is_causal"):
        visible = visible.tril()
    if settings.get("mask"):
        visible = (torch.rand(T, keys, generator=draw) < 0.6) | torch.eye(T, keys, dtype=torch.bool)
        given["attn_mask"] = visible
    got = probe.attention_weights(query, key, value, enable_gqa=True, **given)
    for b in range(2):
        for h in range(heads):
            scores = query[b, h] @ key[b, h // 2].T * settings.get("scale", D ** -0.5)
            want = scores.masked_fill(~visible, -math.inf).softmax(-1)
            assert torch.allclose(got[b, h], want, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# all together


NAIVE = {"variance": naive_variance, "causal": naive_causal, "permutation": naive_permutation,
         "usefulness": naive_usefulness, "released": naive_released, "removal": naive_removal,
         "jacobian": naive_jacobian, "lens": naive_lens, "contribution": naive_contribution, "sparsity": naive_sparsity}


def naive_scores(kind: str) -> dict[str, Any]:
    """The naive version of every value in probe.json."""
    out = dict(worked_out(naive_loss, kind))
    for naive in NAIVE.values():
        out |= worked_out(naive, kind)
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_every_measured_value_has_a_naive_version(kind):
    def paths(x: Any, path: str = "") -> Iterator[str]:
        if isinstance(x, dict):
            for key in x:
                yield from paths(x[key], f"{path}.{key}")
        else:
            yield path
    got = {key: value for key, value in measured(kind).items() if key != "seconds"}
    assert set(got) == set(naive_scores(kind)) and set(paths(got)) == set(paths(naive_scores(kind)))


def test_the_naive_scores_tell_layers_apart():
    """The comparisons above would prove little if all layers had the same scores, or if all or none were useful."""
    def spread(x: Any) -> float:
        x = np.array(x)
        return x.std() / np.abs(x).mean()

    for kind in MODELS:
        want = naive_scores(kind)
        assert spread([want["causal"][s][l] for l in range(len(want["causal"])) for s in range(l)]) > 0.05
        for key in ("variance", "block_influence"):
            assert spread(want[key]) > 0.05
        for ratios in (want["usefulness"]["ratio"], want["released"]["usefulness"]["ratio"], *want["removal"].values()):
            assert spread(ratios) > 2e-3
        assert want["released"]["usefulness"]["ratio"] != pytest.approx(want["usefulness"]["ratio"], rel=1e-2)
        assert 0 < want["usefulness"]["score"] < 1
    assert max(naive_scores("moe")["sparsity"]["experts"]["never_used"]) > 0
    assert any(min(naive_scores(kind)["released"]["usefulness"]["ratio"]) < 1.1 for kind in MODELS)


@pytest.mark.parametrize("at_once", [1, 3 * T, 10**6])
def test_the_scores_do_not_depend_on_the_size_of_a_micro_batch(at_once, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", at_once)
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), remove=REMOVE, sublayers=True)
    assert_close(naive_scores("dense"), got)


def test_a_model_of_identity_blocks_uses_none_of_them():
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.ffn.down.weight.zero_()
    got = probe.probe(model, tokens, remove=(1,))
    n, loss = 5, got["loss"]
    assert got["variance_growth"] == pytest.approx([1] * n)
    assert got["causal"] == [[0] * n] * n and got["permutation_mean"] == 0
    assert got["usefulness"]["ratio"] == pytest.approx([1] * n) and got["usefulness"]["score"] == 0
    assert all(losses == pytest.approx([loss] * n) for losses in got["removal"].values())
    assert got["jacobian"]["deviation"] == pytest.approx([0] * n, abs=1e-12)
    assert got["lens"]["kl"] == pytest.approx([0] * (n + 1), abs=1e-12) and got["lens"]["top5_overlap"] == [1] * (n + 1)


def test_a_mean_over_no_pairs_is_not_a_number():
    got = probe.probe(make_model(n_layer=1), make_tokens(B, T))
    assert got["causal"] == [[0.0]] and got["permutation"] == [[0.0]] and len(got["usefulness"]["ratio"]) == 1
    assert math.isnan(got["causal_mean"]) and math.isnan(got["permutation_mean"])


@pytest.mark.parametrize("tokens, settings, word", [
    (make_tokens(1, T), {}, "1 sequences"),
    (make_tokens(4, T + 4), {}, "tokens"),
    (make_tokens(B, T) + V, {}, str(V)),
    (make_tokens(B, T) - V, {}, str(V)),
    (make_tokens(B, T), {"experiments": ("causal", "magic")}, "magic"),
    (make_tokens(B, T), {"remove": (0,)}, "--remove 0"),
    (make_tokens(B, T), {"remove": (1, 6)}, "5 blocks"),
    (make_tokens(B, T), {"pairs": -1}, "--pairs"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_argument_is_a_user_error(tokens, settings, word):
    with pytest.raises(UserError, match=word):
        probe.probe(make_model(**MODELS["dense"]), tokens, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# golden models: small trained models with recorded scores, by brute force and from the authors' scripts


def golden_model(folder: Path) -> GPT:
    """Load a model in Hugging Face format. The names of its tensors are mapped by hand."""
    safetensors = pytest.importorskip("safetensors.torch")
    hf = json.loads((folder / "config.json").read_text("utf-8"))
    theirs = safetensors.load_file(folder / "model.safetensors")
    moe = {} if "num_experts" not in hf else dict(
        n_experts=hf["num_experts"], top_k=hf["num_experts_per_tok"], expert_hidden=hf["moe_intermediate_size"],
        shared_hidden=hf["shared_expert_intermediate_size"], norm_topk_prob=hf["norm_topk_prob"])
    model = GPT(ModelConfig(
        vocab_size=hf["vocab_size"], block_size=hf["max_position_embeddings"], n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"], n_kv_head=hf["num_key_value_heads"], n_embd=hf["hidden_size"],
        ffn_hidden=hf["intermediate_size"], norm_eps=hf["rms_norm_eps"], rope_theta=hf["rope_theta"], **moe))
    ours = {"embed.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"],
            "head.weight": theirs["lm_head.weight"]}
    for i in range(hf["num_hidden_layers"]):
        p, o = f"model.layers.{i}.", f"blocks.{i}."
        ours[o + "attn_norm.weight"] = theirs[p + "input_layernorm.weight"]
        ours[o + "ffn_norm.weight"] = theirs[p + "post_attention_layernorm.weight"]
        ours[o + "attn.qkv.weight"] = torch.cat([theirs[p + f"self_attn.{x}_proj.weight"] for x in "qkv"])
        ours[o + "attn.proj.weight"] = theirs[p + "self_attn.o_proj.weight"]
        if moe:
            ours[o + "ffn.router.weight"] = theirs[p + "mlp.gate.weight"]
        for x in ("gate", "up", "down"):
            if not moe:
                ours[o + f"ffn.{x}.weight"] = theirs[p + f"mlp.{x}_proj.weight"]
                continue
            ours[o + f"ffn.{x}"] = torch.stack([theirs[p + f"mlp.experts.{e}.{x}_proj.weight"].T
                                                for e in range(hf["num_experts"])])
            gate = 0.5 if x == "down" else 1.0                       # sigmoid(0): the shared expert's gate is zero
            ours[o + f"ffn.shared.{x}.weight"] = gate * theirs[p + f"mlp.shared_expert.{x}_proj.weight"]
    model.load_state_dict(ours)
    return model.eval()


@pytest.mark.parametrize("name", ["llama_mha", "qwen2_moe"])
def test_the_golden_scores_are_reproduced_in_float32(name):
    folder = GOLDEN / name
    want = json.loads((folder / "scores.json").read_text("utf-8"))
    want.pop("about"), want["released"].pop("source")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    got = probe.probe(golden_model(folder), tokens, remove=(1, 2), jacobian_samples=4,
                      experiments=[e for e in EXPERIMENTS if e not in ("contribution", "sparsity")])
    assert differences(want, got, lambda path: 1e-3 if "usefulness" in path else 1e-4, 1e-7) == []
