"""probe.py against what can be worked out without it: whole forward passes in float64, one sequence at a time.

    python -m pytest -q tests/test_probe.py                    # about a minute on two cores, no download
    python -m pytest -q tests/test_probe.py -k "golden"        # the scores that others computed

The naive versions below follow the definitions (arXiv 2603.15389 and its released scripts) and share nothing with
probe.py but the model's blocks; what is measured inside a block, its attention, experts and norms, is written out too.
"""
import functools
import gc
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probe
from model import GPT, Block, ModelConfig, UserError, load_model, run, save_checkpoint
from probe import EXPERIMENTS, affine_map, cheapest_drops, moments, without_blocks
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
V, T, B = 29, 9, 7                                    # a tiny sample: an odd number of sequences
SHAPE = dict(vocab_size=V, block_size=T + 3, n_head=4, n_kv_head=2, n_embd=8, ffn_hidden=24, init_std=0.4)
EXPERTS = dict(n_experts=12, top_k=2, expert_hidden=8, shared_hidden=12)
MODELS = {
    "dense": dict(n_layer=5),
    "dense_peri": dict(n_layer=4, norm="peri"),
    "moe": dict(n_layer=4, **EXPERTS),
    "moe_lns": dict(n_layer=4, norm="lns", norm_topk_prob=True, **EXPERTS),
}
REMOVE = (1, 2, 3)


def make_model(dtype=torch.float64, seed=0, **settings):
    """A tiny model with large weights and uneven norm gains: every score is far from that of an identity."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**SHAPE, **settings})).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    with torch.no_grad():
        model.head.weight *= 1.5
    model.to(dtype)
    model.blocks[0].attn.rope.reset()                 # its tables to the full precision of dtype
    return model


@functools.cache
def own_tokens(name):
    """Tokens (B, T) that a model wrote itself: it predicts them well, so that its blocks matter to the loss."""
    model, generator = make_model(**MODELS[name]), torch.Generator().manual_seed(0)
    idx = torch.randint(V, (B, 1), generator=generator)
    with torch.no_grad():
        while idx.size(1) < T:
            p = model(idx)[0][:, -1].softmax(-1)
            idx = torch.cat((idx, torch.multinomial(p, 1, generator=generator)), dim=1)
    return idx


def make_tokens(b=B, t=T, seed=0, v=V):
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# the naive versions


def streams_by_hand(model, sequence, layers):
    """h_0 .. h_n of one sequence (T,), each (T, d); a layer is any function of (1, T, d)."""
    x = model.embed(sequence[None])
    streams = [x[0]]
    for layer in layers:
        x = layer(x)
        streams.append(x[0])
    return streams


def logits_by_hand(model, x):
    return rms_norm(x, model.norm) @ model.head.weight.T


def rms_norm(x, norm):
    if isinstance(norm, torch.nn.Identity):
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def negative_log_likelihood(model, x, sequence):
    p = logits_by_hand(model, x).softmax(-1)
    return -sum(math.log(p[t, sequence[t + 1]]) for t in range(len(sequence) - 1))


def loss_by_hand(model, tokens, layers):
    """Mean over the T - 1 predictions of every sequence."""
    total = sum(negative_log_likelihood(model, streams_by_hand(model, s, layers)[-1], s) for s in tokens)
    return total / (len(tokens) * (tokens.size(1) - 1))


def with_layer(blocks, l, layer):
    return [*blocks[:l], layer, *blocks[l + 1:]]


def identity(x):
    return x


def attention_by_hand(block, x):
    """What attention adds to x (T, d), and each head's probabilities, (T, T); RoPE as a product of complex numbers."""
    a, n = block.attn, len(x)
    heads, groups, half = a.n_head, a.n_kv_head, a.head_dim // 2
    u = rms_norm(x, block.attn_norm) * block.scale
    wq, wk, wv = a.qkv.weight.split((heads * a.head_dim, groups * a.head_dim, groups * a.head_dim))
    angles = torch.arange(n)[:, None] * a.rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)

    def rotate(z):
        z = torch.complex(z[:, :half], z[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), dim=-1)

    mixed, probabilities = [], []
    for h in range(heads):
        g = h // (heads // groups)
        rows = slice(h * a.head_dim, (h + 1) * a.head_dim)
        shared = slice(g * a.head_dim, (g + 1) * a.head_dim)
        q, k, v = rotate(u @ wq[rows].T), rotate(u @ wk[shared].T), u @ wv[shared].T
        p = torch.zeros(n, n, dtype=x.dtype)
        for t in range(n):
            p[t, :t + 1] = (q[t] @ k[:t + 1].T / math.sqrt(a.head_dim)).softmax(-1)
        mixed.append(p @ v)
        probabilities.append(p)
    y = torch.cat(mixed, dim=-1) @ a.proj.weight.T
    return rms_norm(y, block.attn_out_norm), probabilities


def ffn_by_hand(block, x):
    """What the FFN adds to x (T, d), and the experts that each token went to."""
    f, u = block.ffn, rms_norm(x, block.ffn_norm) * block.scale
    chosen = []
    if not hasattr(f, "router"):
        y = (F.silu(u @ f.gate.weight.T) * (u @ f.up.weight.T)) @ f.down.weight.T
    else:
        rows = []
        for token in u:
            p = (f.router.weight @ token).softmax(-1)
            best = sorted(range(len(p)), key=lambda e: -p[e])[:f.top_k]
            total = sum(p[e] for e in best) if f.norm_topk_prob else 1.0
            row = sum(p[e] / total * ((F.silu(token @ f.gate[e]) * (token @ f.up[e])) @ f.down[e]) for e in best)
            s = f.shared
            rows.append(row + s.down.weight @ (F.silu(s.gate.weight @ token) * (s.up.weight @ token)))
            chosen.append(best)
        y = torch.stack(rows)
    return rms_norm(y, block.ffn_out_norm), chosen


def mean_variance(xs):
    """Mean over tokens of the unbiased variance over features."""
    return np.concatenate([np.var(x.numpy(), axis=-1, ddof=1) for x in xs]).mean()


def mean_norm(xs):
    return np.concatenate([np.linalg.norm(x.numpy(), axis=-1) for x in xs]).mean()


def cosine(x, y):
    return sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y)) / len(x)


def affine_by_hand(xs, ys):
    """Least squares on [X 1], all tokens at once."""
    X = np.concatenate([np.concatenate((x.numpy(), np.ones((len(x), 1))), axis=1) for x in xs])
    solution = np.linalg.lstsq(X, np.concatenate([y.numpy() for y in ys]), rcond=None)[0]
    return torch.from_numpy(solution[:-1]), torch.from_numpy(solution[-1])


def usefulness_by_hand(model, fits, fitted_on, tokens, transposed=False):
    """fits: one (W, b) a layer."""
    blocks = list(model.blocks)
    whole = loss_by_hand(model, tokens, blocks)
    ratio = [loss_by_hand(model, tokens, with_layer(blocks, l, lambda x: x @ (W.T if transposed else W) + b)) / whole
             for l, (W, b) in enumerate(fits)]
    n, d = len(ratio), model.config.n_embd
    return {"ratio": ratio, "score": sum(r > 1.1 for r in ratio) / n, "mean_log_ratio": sum(map(math.log, ratio)) / n,
            "loose_fit": fitted_on < 10 * (d + 1)}


def jacobian_by_hand(layer, xs):
    """Statistics of d layer(x) / d x, summed over output positions, averaged over sequences and input positions."""
    J = torch.stack([torch.autograd.functional.jacobian(layer, x[None])[0, :, :, 0].sum(0).mean(1) for x in xs]).mean(0)
    J, d = J.numpy(), len(J)
    off = [J[a, b] for a in range(d) for b in range(d) if a != b]
    return {"deviation": math.sqrt(sum((J[a, b] - (a == b)) ** 2 for a in range(d) for b in range(d))) / d,
            "diagonal_mean": np.mean(np.diag(J)), "diagonal_std": np.std(np.diag(J), ddof=1),
            "off_diagonal": math.sqrt(sum(x * x for x in off) / len(off)), "spectral": np.linalg.svd(J)[1][0]}


def by_key(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def lens_by_hand(model, tokens, streams):
    out = {"kl": [], "loss": [], "top5_overlap": []}
    for l in range(len(model.blocks) + 1):
        kl, nll, overlap = [], [], []
        for sequence, h in zip(tokens, streams):
            own, q = (logits_by_hand(model, x).log_softmax(-1) for x in (h[-1], h[l]))
            nll.append(negative_log_likelihood(model, h[l], sequence))
            for t in range(len(sequence)):
                kl.append(sum(math.exp(a) * (a - b) for a, b in zip(own[t].tolist(), q[t].tolist())))
                top, other = (sorted(range(V), key=lambda v: -row[t, v])[:5] for row in (own, q))
                overlap.append(len(set(top) & set(other)) / 5)
        out["kl"].append(np.mean(kl))
        out["loss"].append(sum(nll) / (tokens.numel() - len(tokens)))
        out["top5_overlap"].append(np.mean(overlap))
    return out


def sparsity_by_hand(model, probabilities, chosen, below):
    """probabilities[l]: (T, T) of every head and sequence; chosen[l]: the experts of every token."""
    c, weights = model.config, {}
    for block in model.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                w = w.numpy().ravel()
                entry = weights.setdefault(name.removesuffix(".weight"), {"below": [], "hoyer": []})
                entry["below"].append(sum(abs(x) < below * c.init_std for x in w) / len(w))
                root = math.sqrt(len(w))
                entry["hoyer"].append((root - np.abs(w).sum() / math.sqrt((w * w).sum())) / (root - 1))
    attention = {"entropy": [], "keys_for_90_percent": [], "effective_keys": []}
    for ps in probabilities:
        rows = [p[t, :t + 1].tolist() for p in ps for t in range(1, len(p))]
        entropies = [-sum(x * math.log(x) for x in row if x > 0) for row in rows]
        attention["entropy"].append(np.mean([e / math.log(len(row)) for e, row in zip(entropies, rows)]))
        attention["effective_keys"].append(np.mean([math.exp(e) / len(row) for e, row in zip(entropies, rows)]))
        needed = []
        for row in rows:
            held, keys = 0.0, 0
            for x in sorted(row, reverse=True):
                held, keys = held + x, keys + 1
                if held >= 0.9:
                    break
            needed.append(keys / len(row))
        attention["keys_for_90_percent"].append(np.mean(needed))
    out = {"weights": weights, "below": below, "attention": attention,
           "interaction_density": [x * c.n_kv_head / c.n_head for x in attention["effective_keys"]]}
    if c.n_experts:
        E = c.n_experts
        loads = [[sum(e in best for best in tokens) / (len(tokens) * c.top_k) for e in range(E)] for tokens in chosen]
        out["experts"] = {"load": loads, "never_used": [load.count(0) / E for load in loads],
                          "entropy": [-sum(x * math.log(x) for x in load if x) / math.log(E) for load in loads]}
    return out


def released_by_hand(model, tokens, n_jacobian):
    """The authors' scripts emulated: W not transposed; in dense models h_n after the norm and g one place early."""
    blocks, n, dense = list(model.blocks), len(model.blocks), not model.config.n_experts

    def record(streams):
        return streams[:-1] + [rms_norm(streams[-1], model.norm)] if dense else streams

    h = [record(streams_by_hand(model, s, blocks)) for s in tokens]
    C = np.zeros((n, n))
    for s in range(n):
        g = [record(streams_by_hand(model, sequence, with_layer(blocks, s, identity))) for sequence in tokens]
        for l in range(s + 1, n - 1 if dense else n):
            early = l + dense
            changed = mean_norm([(a[l + 1] - a[l]) - (b[early + 1] - b[early]) for a, b in zip(h, g)])
            C[s, l] = changed / mean_norm([a[l + 1] - a[l] for a in h])
    fits = [affine_by_hand([a[l] for a in h], [a[l + 1] for a in h]) for l in range(n)]
    last = [lambda x: rms_norm(blocks[-1](x), model.norm)] if dense else [blocks[-1]]
    return {"causal": C.tolist(),
            "usefulness": usefulness_by_hand(model, fits, tokens.numel(), tokens, transposed=True),
            "variance": [mean_variance([a[l] for a in h]) for l in range(n + 1)],
            "jacobian": by_key([jacobian_by_hand(layer, [a[l] for a in h[:n_jacobian]])
                                for l, layer in enumerate(blocks[:-1] + last)])}


@torch.no_grad()
def scores_by_hand(model, tokens, n_jacobian, below=0.1):
    """All that probe.json holds."""
    blocks, n, half = list(model.blocks), len(model.blocks), len(tokens) // 2
    h = [streams_by_hand(model, s, blocks) for s in tokens]
    loss = loss_by_hand(model, tokens, blocks)
    out = {"loss": loss, "variance": [mean_variance([a[l] for a in h]) for l in range(n + 1)]}
    out["variance_growth"] = [y / x for x, y in zip(out["variance"], out["variance"][1:])]

    attn, ffn, probabilities, chosen = ([[] for _ in range(n)] for _ in range(4))
    for streams in h:
        for l, block in enumerate(blocks):
            added, p = attention_by_hand(block, streams[l])
            also, best = ffn_by_hand(block, streams[l] + added)
            assert torch.allclose(streams[l] + added + also, streams[l + 1], rtol=1e-10, atol=1e-10)    # as the block
            attn[l].append(added)
            ffn[l].append(also)
            probabilities[l] += p
            chosen[l] += best
    out["attn_variance"], out["ffn_variance"] = [list(map(mean_variance, x)) for x in (attn, ffn)]
    between = [[a[l] + f for a, f in zip(h, attn[l])] for l in range(n)]
    out["contribution"] = {}
    for name, added, to in (("attn", attn, [[a[l] for a in h] for l in range(n)]), ("ffn", ffn, between)):
        pairs = [list(zip(added[l], to[l])) for l in range(n)]
        out["contribution"][name + "_ratio"] = [
            np.mean([(f.norm(dim=-1) / x.norm(dim=-1)).mean().item() for f, x in row]) for row in pairs]
        out["contribution"][name + "_cosine"] = [np.mean([cosine(f, x) for f, x in row]) for row in pairs]

    C, P = np.zeros((n, n)), np.zeros((n, n))
    for s in range(n):
        g = [streams_by_hand(model, sequence, with_layer(blocks, s, identity)) for sequence in tokens]
        for l in range(s + 1, n):
            changed = mean_norm([(a[l + 1] - a[l]) - (b[l + 1] - b[l]) for a, b in zip(h, g)])
            C[s, l] = changed / mean_norm([a[l + 1] - a[l] for a in h])
            swapped = list(blocks)
            swapped[s], swapped[l] = swapped[l], swapped[s]
            P[s, l] = P[l, s] = abs(loss_by_hand(model, tokens, swapped) - loss) / loss
    pairs = n * (n - 1) // 2
    out |= {"causal": C.tolist(), "causal_mean": C.sum() / pairs, "permutation": P.tolist(),
            "permutation_mean": P.sum() / 2 / pairs, "permutation_pairs": pairs}

    fits = [affine_by_hand([a[l] for a in h], [a[l + 1] for a in h]) for l in range(n)]
    out["usefulness"] = usefulness_by_hand(model, fits, tokens.numel(), tokens)
    fits = [affine_by_hand([a[l] for a in h[:half]], [a[l + 1] for a in h[:half]]) for l in range(n)]
    out["usefulness_heldout"] = usefulness_by_hand(model, fits, half * tokens.size(1), tokens[half:])

    out["removal"] = {str(r): [loss_by_hand(model, tokens, blocks[:s] + blocks[s + r:]) for s in range(n - r + 1)]
                      for r in REMOVE}
    for name, other in (("attn", ffn_by_hand), ("ffn", attention_by_hand)):
        out["removal"][name] = [
            loss_by_hand(model, tokens, with_layer(blocks, l, lambda x: x + other(block, x[0])[0]))
            for l, block in enumerate(blocks)]
    out["block_influence"] = [1 - np.mean([cosine(a[l], a[l + 1]) for a in h]) for l in range(n)]
    few = h[:n_jacobian]
    out["jacobian"] = by_key([jacobian_by_hand(block, [a[l] for a in few]) for l, block in enumerate(blocks)])
    out["lens"] = lens_by_hand(model, tokens, h)
    out["sparsity"] = sparsity_by_hand(model, probabilities, chosen, below)
    out["released"] = released_by_hand(model, tokens, n_jacobian)
    return out


@functools.cache
def by_hand(name):
    """The model's settings, tokens and scores; the Jacobian of 4 of the 7 sequences, the default."""
    return scores_by_hand(make_model(**MODELS[name]), own_tokens(name), n_jacobian=4)


def differences(want, got, tolerance, floor, path=""):
    """Where `got` departs from `want` in a tree of dicts, lists and numbers; tolerance(path) is relative."""
    if isinstance(want, dict):
        return [d for k in want for d in (differences(want[k], got[k], tolerance, floor, f"{path}.{k}") if k in got
                                          else [f"{path}.{k} is missing"])]
    want, got = np.array(want, dtype=float), np.array(got, dtype=float)
    if want.shape != got.shape:
        return [f"{path}: {got.shape} instead of {want.shape}"]
    wrong = ~((np.abs(want - got) <= tolerance(path) * np.abs(want) + floor) | (np.isnan(want) & np.isnan(got)))
    return [f"{path}: {got[wrong]} instead of {want[wrong]}"] if wrong.any() else []


def same(want, got, relative=1e-12):
    return not differences(want, got, lambda path: relative, 1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# every probe is what its definition says


@pytest.mark.parametrize("name", MODELS)
def test_every_probe_equals_its_naive_version_in_float64(name, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T + 1)          # micro-batches of 2, 1 | 2, 2 sequences
    got = probe.probe(make_model(**MODELS[name]), own_tokens(name), remove=REMOVE)
    assert differences(by_hand(name), got, lambda path: 1e-6 if "usefulness" in path else 1e-8, 1e-12) == []
    assert set(got) == set(by_hand(name)) | {"seconds"}


@pytest.mark.parametrize("name", MODELS)
def test_every_probe_equals_its_naive_version_in_float32(name):
    got = probe.probe(make_model(torch.float32, **MODELS[name]), own_tokens(name), remove=REMOVE)
    assert differences(by_hand(name), got, lambda path: 1e-4, 1e-6) == []


def test_the_naive_scores_tell_layers_apart():
    """What the comparisons above are worth: no score is the same everywhere, and only some layers are useful."""
    def spread(x):
        x = np.array(x)
        return x.std() / np.abs(x).mean()

    for name in MODELS:
        want = by_hand(name)
        assert spread([want["causal"][s][l] for l in range(len(want["causal"])) for s in range(l)]) > 0.05
        for key in ("variance", "block_influence"):
            assert spread(want[key]) > 0.05
        for ratios in (want["usefulness"]["ratio"], want["released"]["usefulness"]["ratio"], *want["removal"].values()):
            assert spread(ratios) > 2e-3
        assert want["released"]["usefulness"]["ratio"] != pytest.approx(want["usefulness"]["ratio"], rel=1e-2)
        assert 0 < want["usefulness"]["score"] < 1
    assert max(by_hand("moe")["sparsity"]["experts"]["never_used"]) > 0
    assert any(min(by_hand(name)["released"]["usefulness"]["ratio"]) < 1.1 for name in MODELS)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_released_scores_differ_from_the_definitions_where_the_scripts_do(name):
    got = probe.probe(make_model(**MODELS[name]), own_tokens(name), ["variance", "causal", "jacobian", "released"])
    for key in ("variance", "causal", "jacobian"):
        assert same(got[key], got["released"][key], 1e-9) == (name == "moe")


@pytest.mark.parametrize("at_once", [1, 3 * T, 10**6])
def test_the_scores_do_not_depend_on_the_size_of_a_micro_batch(at_once, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", at_once)
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), remove=REMOVE)
    assert differences(by_hand("dense"), got, lambda path: 1e-6 if "usefulness" in path else 1e-8, 1e-12) == []


PROMISED = {"variance": {"variance", "attn_variance", "ffn_variance", "variance_growth"},
            "causal": {"causal", "causal_mean"},
            "permutation": {"permutation", "permutation_mean", "permutation_pairs"},
            "usefulness": {"usefulness", "usefulness_heldout"},
            "removal": {"removal", "block_influence"},
            **{name: {name} for name in ("released", "jacobian", "lens", "contribution", "sparsity")}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_alone_gives_its_own_keys_and_the_same_numbers_as_all_together(name):
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    got = probe.probe(model, tokens, [name], remove=REMOVE)
    assert set(got) == PROMISED[name] | {"loss", "seconds"}
    del got["seconds"]
    assert differences({key: by_hand("dense")[key] for key in got}, got, lambda path: 1e-6, 1e-12) == []


@pytest.mark.parametrize("samples", [1, 3, 7, 100])
def test_the_jacobian_is_of_the_first_sequences(samples, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(**MODELS["moe"]), make_tokens()
    got = probe.probe(model, tokens, ["jacobian"], jacobian_samples=samples)["jacobian"]
    few = tokens[:samples]
    with torch.no_grad():
        x = [streams_by_hand(model, s, model.blocks)[1] for s in few]
    want = jacobian_by_hand(model.blocks[1], x)
    assert {key: got[key][1] for key in want} == pytest.approx(want, rel=1e-8)


def test_only_the_removals_asked_for_are_made():
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    assert set(probe.probe(model, tokens, ["removal"], remove=(2,), sublayers=False)["removal"]) == {"2"}
    assert set(probe.probe(model, tokens, ["removal"], remove=(5, 1))["removal"]) == {"1", "5", "attn", "ffn"}


def test_removing_all_blocks_is_the_embedding_read_off():
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["removal", "lens"], remove=(5,))
    assert got["removal"]["5"] == pytest.approx([got["lens"]["loss"][0]], rel=1e-12)


def test_the_threshold_of_the_weight_sparsity_is_relative_to_the_initialisation():
    model = make_model(**MODELS["dense"])
    for below in (0.0, 0.7, 1e3):
        weights = probe.probe(model, make_tokens(), ["sparsity"], below=below)["sparsity"]["weights"]
        share = (model.blocks[2].attn.qkv.weight.abs() < below * SHAPE["init_std"]).double().mean().item()
        assert weights["attn.qkv"]["below"][2] == pytest.approx(share)
        assert (share == 0, share == 1) == (below == 0, below == 1e3)


def test_hoyer_is_0_for_equal_weights_and_1_for_a_single_one():
    model = make_model(**MODELS["dense"])
    with torch.no_grad():
        model.blocks[0].ffn.up.weight.fill_(-0.3)
        model.blocks[1].ffn.up.weight.zero_()[2, 3] = 5.0
    hoyer = probe.probe(model, make_tokens(), ["sparsity"])["sparsity"]["weights"]["ffn.up"]["hoyer"]
    assert hoyer[:2] == pytest.approx([0, 1], abs=1e-12)


def test_a_model_of_identity_blocks_scores_as_one_that_does_not_use_its_layers():
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


@pytest.mark.parametrize("V", [1, 3])
def test_a_vocabulary_below_5_is_enough_for_the_lens(V):
    got = probe.probe(make_model(**{**MODELS["dense"], "vocab_size": V}), make_tokens(v=V), ["lens"])["lens"]
    assert got["top5_overlap"] == pytest.approx([1.0] * 6)                    # the top V of V are always the same


@pytest.mark.parametrize("tokens, settings, word", [
    (make_tokens(1), {}, "1 sequences"),
    (make_tokens(4, 1), {}, "of 1 tokens"),
    (make_tokens(4, T + 4), {}, f"block_size={T + 3}"),
    (make_tokens() + V, {}, str(V)),
    (make_tokens() - V, {}, str(V)),
    (make_tokens(), {"experiments": ("causal", "magic")}, "magic"),
    (make_tokens(), {"remove": (0,)}, "--remove 0"),
    (make_tokens(), {"remove": (1, 6)}, "5 blocks"),
    (make_tokens(), {"jacobian_samples": 0}, "--jacobian_samples"),
    (make_tokens(), {"pairs": -1}, "--pairs"),
])
def test_a_wrong_argument_is_a_user_error(tokens, settings, word):
    with pytest.raises(UserError, match=word):
        probe.probe(make_model(**MODELS["dense"]), tokens, **settings)


def test_one_layer_is_enough():
    got = probe.probe(make_model(n_layer=1), make_tokens())
    assert got["causal"] == [[0.0]] and got["permutation"] == [[0.0]] and len(got["usefulness"]["ratio"]) == 1


@pytest.mark.parametrize("sequences, loose, heldout_loose", [(9, True, True), (10, False, True), (20, False, False)])
def test_a_fit_on_fewer_than_10_d_plus_10_tokens_is_called_loose(sequences, loose, heldout_loose):
    got = probe.probe(make_model(n_layer=2), make_tokens(sequences), ["usefulness"])     # 10 (d + 1) are 10 sequences
    assert got["usefulness"]["loose_fit"] is loose and got["usefulness_heldout"]["loose_fit"] is heldout_loose


def test_mean_log_ratio_is_the_mean_of_the_logs_and_not_the_log_of_the_mean():
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["usefulness", "released"])
    for scores in (got["usefulness"], got["usefulness_heldout"], got["released"]["usefulness"]):
        logs = [math.log(x) for x in scores["ratio"]]
        assert scores["mean_log_ratio"] == pytest.approx(sum(logs) / len(logs), rel=1e-12)
        assert scores["mean_log_ratio"] != pytest.approx(math.log(sum(scores["ratio"]) / len(logs)), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# the goldens: small trained models, scores by brute force and what the authors' scripts printed


def golden_model(folder):
    """A model in Hugging Face format, its tensors mapped by hand."""
    safetensors = pytest.importorskip("safetensors.torch")
    hf, theirs = json.loads((folder / "config.json").read_text()), safetensors.load_file(folder / "model.safetensors")
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
def test_the_golden_scores_are_met_in_float32(name):
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"no golden scores at {folder}")
    want = json.loads((folder / "scores.json").read_text())
    want.pop("about"), want["released"].pop("source")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    got = probe.probe(golden_model(folder), tokens, remove=(1, 2), jacobian_samples=4,
                      experiments=[e for e in EXPERIMENTS if e not in ("contribution", "sparsity")])
    assert differences(want, got, lambda path: 1e-3 if "usefulness" in path else 1e-4, 1e-7) == []


# ---------------------------------------------------------------------------------------------------------------------
# the pieces


def regression_cases():
    draw = np.random.default_rng(0)
    plain = draw.normal(size=(400, 6))
    duplicated = np.concatenate((plain, plain[:, :2]), axis=1)
    dependent = np.concatenate((plain, plain[:, :2] @ draw.normal(size=(2, 3))), axis=1)
    constant = np.concatenate((plain, np.full((400, 1), 0.1), np.zeros((400, 1)), np.full((400, 1), -3e5)), axis=1)
    close = np.concatenate((plain, plain[:, :1] + 1e-5 * draw.normal(size=(400, 1))), axis=1)
    scaled = plain * 10.0 ** np.array([-6, -3, 0, 2, 4, 6])
    far = plain + np.array([1e3, -1e3, 0, 500, 1e4, 1])
    everything = np.concatenate((scaled, scaled[:, [0, 5]], np.full((400, 1), 7.7)), axis=1)
    return {"plain": plain, "duplicate_columns": duplicated, "dependent_columns": dependent,
            "nearly_dependent_columns": close, "constant_columns": constant, "badly_scaled": scaled, "far_from_0": far,
            "far_from_0_and_duplicated": np.concatenate((far, far), axis=1), "all_at_once": everything,
            "fewer_tokens_than_features": plain[:4]}


@pytest.mark.parametrize("name", regression_cases())
def test_the_affine_map_predicts_as_least_squares_on_all_tokens_does(name):
    X, draw = regression_cases()[name], np.random.default_rng(1)
    d = X.shape[1]
    scale = np.where(X.std(0) > 1e-9, X.std(0), 1.0)
    Z = (X - X.mean(0)) / scale                                             # what suits least squares
    Y = 3 * np.tanh(Z @ draw.normal(size=(d, d))) + draw.normal(size=X.shape) + 5
    Z1 = np.concatenate((Z, np.ones((len(X), 1))), axis=1)
    solution = np.linalg.lstsq(Z1, Y, rcond=1e-10)[0]                       # the smallest, if there are many
    x, y = (torch.from_numpy(a).reshape(4, -1, d) for a in (X, Y))
    W, b = affine_map(sum(moments(x[i:i + 1], y[i:i + 1]) for i in range(4)))
    got, want = (x @ W + b).flatten(0, 1).numpy(), Z1 @ solution
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()
    if name != "nearly_dependent_columns":                                  # there W itself is ill-conditioned
        assert np.abs(scale[:, None] * W.numpy() - solution[:-1]).max() < 1e-6


def test_the_affine_map_recovers_an_affine_map():
    draw = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 50, 7), (7, 7), (7,)))
    got_W, got_b = affine_map(moments(x, x @ W + b))
    assert torch.allclose(got_W, W, rtol=1e-9, atol=1e-9) and torch.allclose(got_b, b, rtol=1e-9, atol=1e-9)


def test_the_affine_map_of_constant_features_is_the_mean():
    y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    W, b = affine_map(moments(torch.full((2, 30, 4), 0.3), y))
    assert torch.equal(W, torch.zeros_like(W)) and torch.allclose(b, y.double().mean((0, 1)))


def test_a_swap_that_lowers_the_loss_counts_as_much_as_one_that_raises_it():
    model, tokens = make_model(**MODELS["dense"]), make_tokens()              # random: some swaps lower the loss
    P, blocks = probe.probe(model, tokens, ["permutation"])["permutation"], list(model.blocks)
    with torch.no_grad():
        loss = loss_by_hand(model, tokens, blocks)
        change = {}
        for i in range(5):
            for j in range(i + 1, 5):
                swapped = with_layer(with_layer(blocks, i, blocks[j]), j, blocks[i])
                change[i, j] = loss_by_hand(model, tokens, swapped) / loss - 1
    assert min(change.values()) < 0 < max(change.values())
    assert [P[i][j] for i, j in change] == pytest.approx([abs(x) for x in change.values()], rel=1e-8)


def test_sampled_pairs_are_a_reproducible_part_of_all_pairs():
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    full = np.array(by_hand("dense")["permutation"])
    seen = []
    for seed in (0, 0, 1, 2):
        got = probe.probe(model, tokens, ["permutation"], pairs=4, seed=seed)
        P = np.array(got["permutation"])
        known = ~np.isnan(P)
        assert known.sum() == 5 + 2 * 4 and known.diagonal().all() and (known == known.T).all()
        assert P[known] == pytest.approx(full[known], rel=1e-8)
        values = [P[i, j] for i in range(5) for j in range(i + 1, 5) if known[i, j]]
        mean = sum(values) / 4
        spread = math.sqrt(sum((x - mean) ** 2 for x in values) / 3)
        assert got["permutation_pairs"] == 4 and got["permutation_mean"] == pytest.approx(mean, rel=1e-12)
        assert got["permutation_standard_error"] == pytest.approx(spread / 2, rel=1e-12)
        seen.append(known.tobytes())
    assert seen[0] == seen[1] and len(set(seen)) > 1


def test_the_mean_of_all_pairs_is_within_a_few_standard_errors_of_that_of_a_sample():
    model, tokens = make_model(**MODELS["dense"]), make_tokens(3)
    full = probe.probe(model, tokens, ["permutation"])
    got = [probe.probe(model, tokens, ["permutation"], pairs=6, seed=seed) for seed in range(40)]
    means, truth = [g["permutation_mean"] for g in got], full["permutation_mean"]
    assert sum(abs(mean - truth) < 3 * g["permutation_standard_error"] for mean, g in zip(means, got)) >= 38
    assert np.mean(means) == pytest.approx(truth, rel=0.1)                                                   # no bias
    assert "permutation_standard_error" not in full


@pytest.mark.parametrize("pairs", [0, 10, 99])
def test_as_many_pairs_as_there_are_is_all_of_them(pairs):
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["permutation"], pairs=pairs)
    assert "permutation_standard_error" not in got and got["permutation_pairs"] == 10
    assert same(by_hand("dense")["permutation"], got["permutation"], 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# what it costs, and what it leaves behind


@pytest.fixture
def evaluations(monkeypatch):
    """Counts how often a sequence goes through a block."""
    count, forward = [0], Block.forward

    def counted(self, x, *args, **kwargs):
        count[0] += len(x)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)

    def per_sequence(model, tokens, experiments, **settings):
        count[0] = 0
        probe.probe(model, tokens, experiments, **settings)
        return count[0] / len(tokens)
    return per_sequence


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_no_block_is_evaluated_that_another_probe_has_evaluated(n, evaluations, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(n_layer=n), make_tokens(6)
    later = n * (n - 1) // 2
    assert evaluations(model, tokens, ("variance", "lens", "contribution", "sparsity")) == n
    assert 0 < evaluations(model, tokens, ("causal",)) <= later + n
    assert 0 < evaluations(model, tokens, ("causal", "removal"), sublayers=False, remove=(1,)) <= later + n
    assert 0 < evaluations(model, tokens, ("permutation",)) <= (n**3 - n) / 3 + n
    three = ("causal", "removal", "permutation")
    assert evaluations(model, tokens, three, sublayers=False) <= (n**3 - n) / 3 + later + n
    # usefulness: a pass to fit, whose last third is the first of the pass to judge with all maps, and half of it again
    assert evaluations(model, tokens, ("usefulness",)) <= (2 - 1 / 3) * n + 1.5 * later


def test_the_released_scores_cost_no_more_than_their_usefulness_and_jacobian(evaluations):
    n, tokens = 6, make_tokens(4)
    model = make_model(n_layer=n)
    later = n * (n - 1) // 2
    before = evaluations(model, tokens, ("causal", "usefulness"), jacobian_samples=2)
    after = evaluations(model, tokens, ("causal", "usefulness", "released"), jacobian_samples=2)
    assert after - before <= later + (n + 1) / 2              # its affine maps; its Jacobians of half the sample
    alone = evaluations(model, tokens, ("causal", "released"), jacobian_samples=2)
    assert alone - evaluations(model, tokens, ("causal",)) <= n + later + (n + 1) / 2        # and a pass to fit


def test_memory_does_not_grow_with_the_number_of_sequences(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * 128)
    model = make_model(n_layer=3, block_size=128)

    def tensor_bytes():
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def peak(sequences):
        tokens, experiments = make_tokens(sequences, 128), ("variance", "causal", "usefulness", "released", "lens")
        before, seen = tensor_bytes(), []

        def watch(line):
            if line.startswith(("usefulness: fit", "lens")):
                seen.append(tensor_bytes() - before)
        probe.probe(model, tokens, experiments, jacobian_samples=1, progress=watch)
        assert len(seen) == sequences
        return max(seen)

    assert 0 < peak(16) <= peak(4) + 16384         # the streams of two sequences take 64 KiB


def state(model):
    """All that a probe could leave behind in a model."""
    modules = [(name, m.training, sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if k.endswith("hooks")})
               for name, m in model.named_modules()]
    tensors = [(name, id(x), x.requires_grad, x.grad, x.dtype, x.detach().numpy().tobytes())
               for name, x in (*model.named_parameters(), *model.named_buffers())]
    return modules, tensors, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def unusual_model():
    model = make_model(torch.float32, **MODELS["moe"]).train()
    model.blocks[1].eval()
    model.blocks[2].attn.qkv.weight.requires_grad_(False)
    return model


def test_the_model_is_left_exactly_as_it_was():
    model, tokens = unusual_model(), make_tokens()
    before, same_tokens = state(model), tokens.clone()
    probe.probe(model, tokens)
    cheapest_drops(model, tokens, 2, lambda line: None)
    probe.bench(model, tokens[:2], rounds=1)
    assert state(model) == before and torch.equal(tokens, same_tokens)


def test_the_model_is_left_exactly_as_it_was_by_an_interruption_at_any_stage(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 4 * T)
    model, tokens = unusual_model(), make_tokens()
    lines = []
    probe.probe(model, tokens, progress=lines.append)
    stages = {line.split(",")[0] for line in lines}
    assert len(stages) >= 9
    before = state(model)
    for stage in stages:
        def interrupt(line):
            if line.startswith(stage + ", micro-batch 2"):
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            probe.probe(model, tokens, progress=interrupt, jacobian_samples=5)
        assert state(model) == before, stage


@pytest.mark.parametrize("piece", ["forward", "streams_of", "nll", "affine_map", "causal_row", "swapped", "released",
                                   "jacobian", "lens_sums", "contribution_sums", "attention_sums"])
def test_the_model_is_left_exactly_as_it_was_by_a_failure_in_any_piece(piece, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 4 * T)
    model, tokens = unusual_model(), make_tokens()
    before, original, calls = state(model), getattr(probe, piece), []

    def fail_the_second_time(*args, **kwargs):
        calls.append(piece)
        result = original(*args, **kwargs)
        if len(calls) == 2:
            raise RuntimeError("halfway")
        return result

    monkeypatch.setattr(probe, piece, fail_the_second_time)
    with pytest.raises(RuntimeError, match="halfway"):
        probe.probe(model, tokens)
    assert state(model) == before


def test_a_failure_inside_a_backward_pass_leaves_the_model_as_it_was(monkeypatch):
    model, tokens = unusual_model(), make_tokens()
    before = state(model)

    def fail(*args, **kwargs):
        raise MemoryError
    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(MemoryError):
        probe.probe(model, tokens)
    assert state(model) == before


# ---------------------------------------------------------------------------------------------------------------------
# dropping blocks


def checkpoint_of(model, **settings):
    c = TrainConfig(**{**asdict(model.config), "out_dir": "out/tiny", **settings})
    return {"model": model.state_dict(), "settings": asdict(c), "step": 3, "tokenizer": "bytes"}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("norm", ["pre", "lns", "peri"])
@pytest.mark.parametrize("drop", [[0], [1, 3], [4], [0, 1, 2, 4]])
def test_a_checkpoint_without_blocks_computes_what_the_model_without_them_does(kind, norm, drop, tmp_path):
    model = make_model(torch.float32, n_layer=5, norm=norm, **(EXPERTS if kind == "moe" else {}))
    saved = checkpoint_of(model)
    before = {name: w.clone() for name, w in saved["model"].items()}
    save_checkpoint(tmp_path / "pruned.pt", without_blocks(saved, drop))
    pruned, again = load_model(tmp_path / "pruned.pt")
    with torch.no_grad():
        x = model.embed(make_tokens())
        for l, block in enumerate(model.blocks):
            x = x if l in drop else block(x)
        want = model.head(model.norm(x))
        got = pruned(make_tokens())[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert pruned.config.n_layer == 5 - len(drop) and again["kept"] == [l for l in range(5) if l not in drop]
    assert saved["settings"]["n_layer"] == 5 and all(torch.equal(w, before[name]) for name, w in saved["model"].items())


@pytest.mark.parametrize("norm", ["pre", "lns"])
def test_dropping_twice_is_dropping_both(norm):
    saved = checkpoint_of(make_model(torch.float32, n_layer=6, norm=norm))
    twice, once = without_blocks(without_blocks(saved, [1, 4]), [0, 2]), without_blocks(saved, [0, 1, 3, 4])
    assert twice["kept"] == once["kept"] == [2, 5] and twice["settings"] == once["settings"]
    assert twice["model"].keys() == once["model"].keys()
    assert all(torch.allclose(w, once["model"][name], rtol=1e-6) for name, w in twice["model"].items())


@pytest.mark.parametrize("name", ["dense", "moe_lns"])
def test_the_cheapest_drops_are_those_of_a_greedy_search_by_brute_force(name, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(**MODELS[name]), own_tokens(name)
    kept, gone = list(range(len(model.blocks))), []
    for _ in range(3):
        with torch.no_grad():
            losses = {l: loss_by_hand(model, tokens, [model.blocks[k] for k in kept if k != l]) for l in kept}
        gone.append(min(losses, key=losses.get))
        kept.remove(gone[-1])
    assert cheapest_drops(model, tokens, 3, lambda line: None) == gone


def test_the_cheapest_drops_take_no_more_block_evaluations_than_single_removals(monkeypatch):
    calls, forward = [0], Block.forward

    def counted(self, *args, **kwargs):
        calls[0] += 1
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Block, "forward", counted)
    cheapest_drops(make_model(n_layer=6), make_tokens(), 2, lambda line: None)
    assert calls[0] <= (6 + 15) + (5 + 10)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


CLI = dict(vocab_size=264, block_size=16, n_layer=4, n_head=2, n_kv_head=1, n_embd=8, ffn_hidden=24, init_std=0.4)


@pytest.fixture
def workplace(corpus, tmp_path, monkeypatch):
    """A folder with a checkpoint of a dense model, dense/ckpt.pt, and one of a MoE, moe/ckpt.pt."""
    for name, settings in (("dense", {}), ("moe", EXPERTS)):
        model = make_model(torch.float32, **{**CLI, **settings})
        save_checkpoint(tmp_path / name / "ckpt.pt", checkpoint_of(model, data=str(corpus)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace, monkeypatch, capsys):
    """Runs probe.py in this process: exit status, stdout, stderr."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            run(probe.main)
        return e.value.code, *capsys.readouterr()
    return call


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Figures take most of the time of a tiny probe."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def script(name, *args):
    """Runs a script as a user does, in the working directory."""
    return subprocess.run([sys.executable, str(ROOT / name), *args], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def validation_windows(corpus, length):
    """The inputs of all validation windows, read from the files themselves."""
    meta = json.loads((corpus / "meta.json").read_text())
    flat = np.concatenate([np.fromfile(corpus / s["file"], dtype=meta["dtype"]) for s in meta["val"]["shards"]])
    windows = (len(flat) - 1) // length
    return flat[:windows * length].reshape(windows, length).astype(np.int64)


@torch.no_grad()
def whole_loss(model, tokens):
    return F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def shape(x):
    return [len(x)] + shape(x[0]) if isinstance(x, list) else []


def has_shapes(result, shapes):
    return {key: [shape(result[key][k]) for k in want] if isinstance(want, dict) else shape(result[key])
            for key, want in shapes.items()} == {
        key: list(want.values()) if isinstance(want, dict) else want for key, want in shapes.items()}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_probe_json_holds_every_promised_key(kind, cli, workplace, corpus):
    pytest.importorskip("matplotlib")
    code, out, err = cli(f"{kind}/ckpt.pt", "--samples", 7)
    assert (code, err) == (0, "")
    r = strict_json(workplace / kind / "probe.json")
    n, one = 4, [4]
    statistics = dict.fromkeys(("deviation", "diagonal_mean", "diagonal_std", "off_diagonal", "spectral"), one)
    useful = {"ratio": one, "score": [], "mean_log_ratio": []}
    assert has_shapes(r, {
        "loss": [], "variance": [n + 1], "attn_variance": one, "ffn_variance": one, "variance_growth": one,
        "causal": [n, n], "causal_mean": [], "permutation": [n, n], "permutation_mean": [],
        "usefulness": useful, "usefulness_heldout": useful, "block_influence": one, "jacobian": statistics,
        "removal": {"1": [n], "2": [n - 1], "attn": one, "ffn": one},
        "lens": dict.fromkeys(("kl", "loss", "top5_overlap"), [n + 1]),
        "contribution": dict.fromkeys(("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine"), one)})
    assert has_shapes(r["released"], {"causal": [n, n], "usefulness": useful, "variance": [n + 1],
                                      "jacobian": statistics})
    assert has_shapes(r["sparsity"], {
        "attention": dict.fromkeys(("entropy", "keys_for_90_percent"), one), "interaction_density": one,
        **({"experts": {"load": [n, 12], "entropy": one, "never_used": one}} if kind == "moe" else {})})
    assert all(shape(x) == one for w in r["sparsity"]["weights"].values() for x in w.values())
    assert all(x >= 0 for x in r["seconds"].values())
    assert {k: v for k, v in r["run"].items() if k != "settings"} == {
        "checkpoint": f"{kind}/ckpt.pt", "tokens": f"{corpus} (validation)", "samples": 7, "length": 16, "seed": 0,
        "experiments": list(EXPERIMENTS), "dtype": "float32", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    assert r["run"]["settings"]["n_layer"] == 4 and r["run"]["settings"]["n_experts"] == (12 if kind == "moe" else 0)
    for name in ("variance", "causal", "permutation", "usefulness", "jacobian", "removal", "lens"):
        assert (workplace / kind / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name

    cheapest = int(np.argmin(r["removal"]["2"]))
    drop = f"{cheapest},{cheapest + 1}"
    ratio = math.exp(r["removal"]["2"][cheapest] - r["loss"])
    line = next(line for line in out.splitlines() if line.startswith("cheapest run of 2:"))
    assert f"blocks {drop}," in line and f"x{ratio:.3f}" in line
    assert f"python probe.py {kind}/ckpt.pt --drop {drop} --save" in line
    assert "loose fit" in out and str(workplace) not in err
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()]
    header = next(line.split() for line in out.splitlines() if line.startswith("block "))
    assert [int(row[0]) for row in rows] == list(range(n))
    assert [float(row[header.index("affine")]) for row in rows] == pytest.approx(r["usefulness"]["ratio"], rel=1e-3)
    assert [float(row[header.index("variance")]) for row in rows] == pytest.approx(r["variance"][1:], rel=1e-3)


def test_the_sequences_are_windows_of_the_validation_split(cli, workplace, corpus, no_matplotlib):
    windows = validation_windows(corpus, 12)
    assert cli("dense/ckpt.pt", "--only", "variance", "--length", 12, "--samples", 10**6)[0] == 0
    r = strict_json(workplace / "dense/probe.json")
    model = load_model("dense/ckpt.pt")[0].double()
    assert (r["run"]["samples"], r["run"]["length"]) == (len(windows), 12)
    assert r["loss"] == pytest.approx(whole_loss(model, torch.from_numpy(windows)), rel=1e-5)


def test_the_seed_chooses_the_sequences(cli, workplace, no_matplotlib):
    losses = []
    for seed in (0, 0, 1):
        cli("dense/ckpt.pt", "--only", "variance", "--samples", 5, "--seed", seed)
        losses.append(strict_json(workplace / "dense/probe.json")["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_tokens_from_a_file_are_probed_as_they_are(cli, workplace, no_matplotlib):
    tokens = make_tokens(5, 11, v=250)
    np.save("mine.npy", tokens.numpy().astype(np.uint16))
    code, out, err = cli("dense/ckpt.pt", "--only", "causal,lens", "--tokens", "mine.npy", "--out", "elsewhere/deep")
    assert (code, err) == (0, "") and not (workplace / "dense/probe.json").exists()
    got = strict_json(workplace / "elsewhere/deep/probe.json")
    assert set(got) == {"loss", "seconds", "run", "lens", "causal", "causal_mean"}
    assert got["run"]["tokens"] == "mine.npy" and got["run"]["experiments"] == ["causal", "lens"]
    model = load_model("dense/ckpt.pt")[0].double()
    with torch.no_grad():
        assert got["loss"] == pytest.approx(loss_by_hand(model, tokens, model.blocks), rel=1e-5)
        assert got["lens"]["loss"][0] == pytest.approx(loss_by_hand(model, tokens, []), rel=1e-5)


def test_two_checkpoints_are_laid_side_by_side(cli, workplace):
    pytest.importorskip("matplotlib")
    code, out, err = cli("dense/ckpt.pt", "moe/ckpt.pt", "--samples", 5, "--only", "variance,causal,usefulness",
                         "--out", "both")
    assert (code, err) == (0, "")
    results = {kind: strict_json(workplace / "both" / kind / "probe.json") for kind in ("dense", "moe")}
    header = [line for line in out.splitlines() if "loss" in line.split()[:1]][-1].split()
    for kind, r in results.items():
        row = [line.split() for line in out.splitlines() if line.startswith(kind + " ")][-1]
        got = dict(zip(["loss", "last", "causal", "useful"], map(float, row[1:5])))
        want = {"loss": r["loss"], "last": r["variance"][-1], "causal": r["causal_mean"],
                "useful": r["usefulness"]["score"]}
        assert got == pytest.approx(want, abs=1e-4)
    assert header[0] == "loss"
    for name in ("variance", "causal", "usefulness"):
        assert all((workplace / "both" / sub / f"{name}.png").stat().st_size > 5000 for sub in ("", "dense", "moe"))
    assert not list(workplace.glob("dense/*.png"))


def test_sampled_pairs_are_null_in_probe_json(cli, workplace):
    pytest.importorskip("matplotlib")
    code, out, err = cli("dense/ckpt.pt", "--only", "permutation", "--pairs", 3, "--samples", 4)
    r = strict_json(workplace / "dense/probe.json")
    assert (code, err) == (0, "") and sum(x is None for row in r["permutation"] for x in row) == 6
    assert f"permutation score {r['permutation_mean']:.4f} +- {r['permutation_standard_error']:.4f}" in out


def test_a_missing_matplotlib_is_one_line_and_no_crash(cli, workplace, no_matplotlib):
    code, out, err = cli("dense/ckpt.pt", "--only", "variance", "--samples", 4)
    assert (code, err) == (0, "") and out.count("pip install matplotlib") == 1
    assert (workplace / "dense/probe.json").exists() and not list(workplace.glob("dense/*.png"))


def test_one_layer_can_be_probed_from_the_command_line(cli, workplace):
    save_checkpoint(workplace / "one.pt", checkpoint_of(make_model(torch.float32, **{**CLI, "n_layer": 1})))
    np.save("mine.npy", make_tokens(4, 8).numpy())
    code, _, err = cli("one.pt", "--tokens", "mine.npy")
    assert (code, err) == (0, "")
    assert strict_json(workplace / "one/probe.json")["removal"].keys() == {"1", "attn", "ffn"}


def test_a_bfloat16_checkpoint_is_probed_in_float32(cli, workplace, no_matplotlib):
    _, saved = load_model("dense/ckpt.pt")
    saved = {**saved, "model": {k: w.bfloat16() for k, w in saved["model"].items()}}
    save_checkpoint(workplace / "half/ckpt.pt", saved)
    save_checkpoint(workplace / "upcast/ckpt.pt", {**saved, "model": {k: w.float() for k, w in saved["model"].items()}})
    results = {}
    for name, *dtype in (("half",), ("upcast",), ("half", "--dtype", "bfloat16")):
        assert cli(f"{name}/ckpt.pt", "--only", "variance,causal,usefulness", "--samples", 6, *dtype)[::2] == (0, "")
        results[" ".join((name, *dtype))] = strict_json(workplace / name / "probe.json")
    got, want, rough = results.values()
    assert got["run"]["dtype"] == "float32" and rough["run"]["dtype"] == "bfloat16"
    for key in ("loss", "variance", "causal", "usefulness"):
        assert got[key] == want[key]
    assert rough["loss"] != got["loss"] and rough["loss"] == pytest.approx(got["loss"], rel=0.02)


def test_drop_writes_a_checkpoint_that_probe_and_train_take(cli, workplace, corpus, no_matplotlib):
    code, out, err = cli("dense/ckpt.pt", "--drop", "1,2", "--save", "pruned.pt", "--samples", 10**6)
    assert (code, err) == (0, "")
    windows = torch.from_numpy(validation_windows(corpus, 16))
    model, pruned = load_model("dense/ckpt.pt")[0], load_model("pruned.pt")[0]
    whole, less = whole_loss(model, windows), whole_loss(pruned, windows)
    assert f"loss {whole:.4f} -> {less:.4f}" in out and f"x{math.exp(less - whole):.3f}" in out

    assert cli("pruned.pt", "--only", "variance", "--samples", 10**6)[::2] == (0, "")
    assert strict_json(workplace / "pruned/probe.json")["loss"] == pytest.approx(less, rel=1e-5)

    done = script("train.py", "--init_from=pruned.pt", "--max_steps=2", "--out_dir=healed", f"--data={corpus}",
                  "--tokens_per_step=64", "--eval_tokens=320", "--device=cpu", "--compile=false")
    assert done.returncode == 0, done.stderr
    healed = load_model("healed/ckpt.pt")[1]
    first = json.loads((workplace / "healed/log.jsonl").read_text().splitlines()[0])
    assert healed["settings"]["n_layer"] == 2 and first["loss"] == pytest.approx(less, rel=0.3)


def test_checkpoints_of_one_folder_do_not_overwrite_each_other_s_results(cli, workplace, no_matplotlib):
    """Neither one after the other nor at once, neither probe.json nor what --drop writes."""
    assert cli("dense/ckpt.pt", "--drop", "1", "--samples", 4)[::2] == (0, "")
    assert cli("dense/pruned.pt", "--drop", "0", "--samples", 4)[::2] == (0, "")
    layers = {"dense/ckpt.pt": 4, "dense/pruned.pt": 3, "dense/pruned_pruned.pt": 2}
    homes = ["dense", "dense/pruned", "dense/pruned_pruned"]
    assert {path: len(load_model(path)[0].blocks) for path in layers} == layers
    for calls in ([[path] for path in layers], [list(layers)]):
        for call in calls:
            assert cli(*call, "--only", "variance", "--samples", 4)[::2] == (0, "")
        results = [strict_json(workplace / home / "probe.json") for home in homes]
        assert [len(r["variance"]) - 1 for r in results] == list(layers.values())
        assert [r["run"]["checkpoint"] for r in results] == list(layers)
        for home in homes:
            (workplace / home / "probe.json").unlink()
    assert cli(*layers, "--drop", "0", "--samples", 4)[::2] == (0, "")
    made = {"dense/pruned.pt": 3, "dense/pruned_pruned.pt": 2, "dense/pruned_pruned_pruned.pt": 1}
    assert {path: len(load_model(path)[0].blocks) for path in made} == made


def test_blocks_are_dropped_from_a_checkpoint_whose_settings_lack_the_norm(cli, workplace):
    _, saved = load_model("dense/ckpt.pt")
    settings = {key: value for key, value in saved["settings"].items() if key != "norm"}
    save_checkpoint(workplace / "old.pt", {**saved, "settings": settings})
    assert cli("old.pt", "--drop", "2", "--samples", 4)[::2] == (0, "")
    assert len(load_model("old_pruned.pt")[0].blocks) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [[], ["--only", "usefulness"], ["--drop", "1"], ["--bench"]])
def test_weights_that_are_not_finite_are_one_line_on_stderr(value, flags, cli, workplace):
    _, saved = load_model("dense/ckpt.pt")
    weights = {name: w.clone() for name, w in saved["model"].items()}
    weights["blocks.1.attn.proj.weight"][0, 0] = value
    save_checkpoint(workplace / "damaged.pt", {**saved, "model": weights})
    check_error(cli("damaged.pt", *flags), "damaged.pt")
    assert not list(workplace.glob("**/probe.json")) + list(workplace.glob("**/*pruned.pt"))


def test_drop_auto_takes_the_cheapest(cli, workplace, corpus):
    model = load_model("moe/ckpt.pt")[0].double()
    windows = torch.from_numpy(validation_windows(corpus, 16))[:30]
    np.save("mine.npy", windows.numpy())
    kept = list(range(4))
    with torch.no_grad():
        for _ in range(2):
            losses = {l: loss_by_hand(model, windows, [model.blocks[k] for k in kept if k != l]) for l in kept}
            kept.remove(min(losses, key=losses.get))
    code, out, err = cli("moe/ckpt.pt", "--drop", "auto:2", "--tokens", "mine.npy")
    pruned, saved = load_model("moe/pruned.pt")
    assert (code, err) == (0, "") and saved["kept"] == kept and len(pruned.blocks) == 2
    gone = out.split("without blocks ")[1].split(";")[0]
    assert {int(l) for l in gone.split(",")} == set(range(4)) - set(kept)


def test_bench_prints_four_ratios(cli, workplace):
    code, out, err = cli("dense/ckpt.pt", "--bench", "--samples", 4, "--length", 8)
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:]}
    assert (code, err) == (0, "") and list(lines) == ["causal,removal", "permutation", "usefulness", "jacobian"]
    assert all(ratio.endswith("x") and float(ratio[:-1]) > 0 for ratio in lines.values())
    assert not (workplace / "dense/probe.json").exists()


def test_the_naive_routes_of_bench_judge_the_losses_that_the_probes_judge(monkeypatch):
    """A route that left something out would be worth nothing to compare with."""
    want, tokens, half = by_hand("dense"), own_tokens("dense"), B // 2
    model, seen, original, routes = make_model(**MODELS["dense"]), [], probe.nll, []
    monkeypatch.setattr(probe, "nll", lambda *args: seen.append(original(*args)) or seen[-1])
    monkeypatch.setattr(probe, "timeit", lambda f, number: (seen.clear(), f(), routes.append(list(seen))) and 1.0)
    probe.bench(model, tokens, rounds=1)
    causal, permutation, usefulness, jacobian = [np.array(route) for route in routes[1::2]]
    whole = want["loss"] * B * (T - 1)
    with torch.no_grad():
        heldout = loss_by_hand(model, tokens[half:], model.blocks) * (B - half) * (T - 1)
    assert causal / whole * want["loss"] == pytest.approx(want["removal"]["1"])
    assert abs(permutation / whole - 1) == pytest.approx(np.array(want["permutation"])[np.triu_indices(5, 1)])
    assert usefulness[0::2] / whole == pytest.approx(want["usefulness"]["ratio"])
    assert usefulness[1::2] / heldout == pytest.approx(want["usefulness_heldout"]["ratio"])
    assert len(jacobian) == 0


BAD_TOKENS = {"float": np.ones((4, 8)), "flat": np.arange(8), "cube": np.zeros((2, 2, 4), int),
              "beyond": np.full((4, 8), 264), "negative": np.full((4, 8), -1), "single": np.zeros((1, 8), int),
              "long": np.zeros((4, 17), int), "short": np.zeros((4, 1), int), "empty": np.zeros((0, 8), int),
              "strings": np.full((4, 8), "a"), "pickled": np.full((4, 8), None)}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_wrong_tokens_are_one_line_on_stderr(name, cli):
    np.save("mine.npy", BAD_TOKENS[name])
    check_error(cli("dense/ckpt.pt", "--tokens", "mine.npy"))


def check_error(outcome, *words):
    code, out, err = outcome
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("args, word", [
    (["nowhere/ckpt.pt"], "nowhere/ckpt.pt"),
    (["truncated.pt"], "truncated.pt"),
    (["text.pt"], "text.pt"),
    (["foreign.pt"], "foreign.pt"),
    (["dense/ckpt.pt", "--only", "causal,magic"], "magic"),
    (["dense/ckpt.pt", "--only", ""], "--only"),
    (["dense/ckpt.pt", "--length", "17"], "block_size=16"),
    (["dense/ckpt.pt", "--length", "1"], "--length 1"),
    (["dense/ckpt.pt", "--length", "-3"], "--length -3"),
    (["dense/ckpt.pt", "--samples", "1"], "1 sequence"),
    (["dense/ckpt.pt", "--samples", "0"], "0 sequences"),
    (["dense/ckpt.pt", "--samples", "many"], "--samples"),
    (["dense/ckpt.pt", "--tokens", "nowhere.npy"], "nowhere.npy"),
    (["dense/ckpt.pt", "--tokens", "text.pt"], "text.pt"),
    (["dense/ckpt.pt", "--data", "nowhere"], "nowhere"),
    (["dense/ckpt.pt", "--data", "other"], "gpt2"),
    (["dense/ckpt.pt", "--frobnicate"], "--frobnicate"),
    (["dense/ckpt.pt", "--samp", "4"], "--samp"),
    (["dense/ckpt.pt", "--drop", "99"], "0 to 3"),
    (["dense/ckpt.pt", "--drop", "x"], "--drop x"),
    (["dense/ckpt.pt", "--drop=-1"], "0 to 3"),
    (["dense/ckpt.pt", "--drop", "0,1,2,3"], "one must stay"),
    (["dense/ckpt.pt", "--drop", "auto:4"], "auto:4"),
    (["dense/ckpt.pt", "--drop", "auto:0"], "auto:0"),
    (["dense/ckpt.pt", "--drop", "1", "--save", "dense/ckpt.pt"], "is the checkpoint itself"),
    (["dense/ckpt.pt", "--remove", "0"], "--remove 0"),
    (["dense/ckpt.pt", "--remove", "1,5"], "--remove 1,5"),
    (["dense/ckpt.pt", "--remove", "one"], "--remove one"),
    (["dense/ckpt.pt", "--pairs", "-1"], "--pairs"),
    (["dense/ckpt.pt", "--jacobian_samples", "0"], "--jacobian_samples"),
    (["dense/ckpt.pt", "--jacobian_samples", "-1"], "--jacobian_samples"),
    (["dense/ckpt.pt", "--out", "text.pt"], "text.pt"),
    ([], "ckpt.pt"),
])
def test_a_mistake_of_the_user_is_one_line_on_stderr(args, word, cli, workplace, corpus):
    whole = (workplace / "dense/ckpt.pt").read_bytes()
    (workplace / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (workplace / "text.pt").write_text("not a checkpoint\n")
    torch.save({"weights": torch.zeros(3)}, workplace / "foreign.pt")
    (workplace / "other").mkdir()
    for path in corpus.iterdir():
        (workplace / "other" / path.name).write_bytes(path.read_bytes())
    meta = json.loads((corpus / "meta.json").read_text())
    (workplace / "other/meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    check_error(cli(*args), word)
    assert (workplace / "dense/ckpt.pt").read_bytes() == whole and not list(workplace.glob("**/probe.json"))


def test_a_model_that_is_smaller_than_the_corpus_vocabulary_is_a_mistake_of_the_user(cli, workplace, corpus):
    model = make_model(torch.float32, **{**CLI, "vocab_size": 90})
    save_checkpoint(workplace / "small.pt", checkpoint_of(model, data=str(corpus)))
    check_error(cli("small.pt"), "90")


def test_the_script_itself_ends_with_status_2_and_one_line(workplace):
    done = script("probe.py", "nowhere.pt")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "nowhere.pt" in done.stderr


def test_the_script_itself_runs_from_another_folder(workplace):
    np.save("mine.npy", make_tokens(4, 8).numpy())
    done = script("probe.py", "dense/ckpt.pt", "--only=causal", "--tokens=mine.npy", "--device=cpu", "--out=here")
    assert (done.returncode, done.stderr) == (0, "") and "causal" in strict_json(workplace / "here/probe.json")
