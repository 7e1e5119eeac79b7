"""Which layers does a model use? Every layer-effectiveness experiment of the paper, from one command.

    python probe.py out/gqa_deep/ckpt.pt                                # all of it: a table, probe.json and figures
    python probe.py out/dense/ckpt.pt out/moe/ckpt.pt --out compare     # side by side
    python probe.py ckpt.pt --only causal,removal --samples 20          # some of it
    python probe.py ckpt.pt --drop 3,7 --save pruned.pt                 # the same model without two blocks
    python probe.py ckpt.pt --bench                                     # how much faster than the naive way?

Block numbers and lists count from 0: block l turns the stream h_l into h_{l+1}, h_0 is the embedding's output, and the
last stream is taken before the final norm. A micro-batch goes through the model once; every intervention starts from
the streams of that pass. Nothing in the model is changed or hooked: blocks are functions, recombined here.
"""
from __future__ import annotations

import contextlib
import math
import os
import sys
import textwrap
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, documents, get_tokenizer, write_json
from model import (GPT, Block, Detail, Parser, UserError, check, cross_entropy, load_model, run, save_checkpoint,
                   token_variance)

EXPERIMENTS = ("variance", "causal", "permutation", "usefulness", "released", "removal", "jacobian", "lens",
               "contribution", "sparsity")
USEFUL = 1.1                # a layer is useful when its affine map multiplies the loss by more than this (paper)
TOKENS_AT_ONCE = 4096       # a micro-batch: its streams fit a CPU's cache and any GPU


# ---------------------------------------------------------------------------------------------------------------------
# the pieces: each returns sums over one micro-batch, which the caller adds up before dividing


def streams_of(model: GPT, idx: Tensor, blocks: Sequence[Block] | None = None) -> tuple[list[Tensor], list[Detail]]:
    """The streams h_0 .. h_n of idx (B, T), each (B, T, d), and what each block did: the pass that all probes share."""
    streams, details = [model.embed(idx)], []
    for block in model.blocks if blocks is None else blocks:
        x, detail = block(streams[-1], detail=True)
        streams.append(x)
        details.append(detail)
    return streams, details


def after(blocks: Sequence[Block], x: Tensor) -> Tensor:
    """The stream x (B, T, d) after the blocks."""
    for block in blocks:
        x = block(x)
    return x


def nll(model: GPT, x: Tensor, idx: Tensor) -> float:
    """Sum over the B (T - 1) predictions of -log p, of the last stream x (B, T, d); in nats."""
    targets = idx[:, 1:]
    return cross_entropy(model.head, model.norm(x[:, :-1]), targets).item() * targets.numel()


def wide(x: Tensor) -> Tensor:
    """x in float32 or better: statistics are not taken in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_norms(x: Tensor) -> Tensor:
    """(B, T, d) -> (B, T)."""
    return torch.linalg.vector_norm(wide(x), dim=-1)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarity of each token's features, (B, T, d) -> (B, T)."""
    return F.cosine_similarity(wide(x), wide(y), dim=-1)


def skipped(blocks: Sequence[Block], streams: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """For every block s: s and the streams g_0 .. g_n of the run that skips it; n (n - 1) / 2 evaluations in all."""
    for s in range(len(blocks)):
        g = streams[:s + 1] + [streams[s]]
        for block in blocks[s + 1:]:
            g.append(block(g[-1]))
        yield s, g


def causal_row(streams: list[Tensor], g: list[Tensor], s: int) -> Tensor:
    """Skip block s; how much does the update of every later block l change?  (paper, probe 2)

    Returns the numerator and denominator of C[s, l], (2, n): the score is a ratio of means over tokens, not a mean of
    ratios, so micro-batches are added before the division.
    """
    n = len(streams) - 1
    row = torch.zeros(2, n, dtype=torch.float64)
    for l in range(s + 1, n):
        update = streams[l + 1] - streams[l]
        row[0, l] = token_norms(update - (g[l + 1] - g[l])).sum()
        row[1, l] = token_norms(update).sum()
    return row


def swapped(blocks: Sequence[Block], streams: list[Tensor], i: int, j: int) -> Tensor:
    """The last stream of the run in which blocks i < j have changed places.  (paper, probe 3)"""
    return after([blocks[j], *blocks[i + 1:j], blocks[i], *blocks[j + 1:]], streams[i])


def with_one(x: Tensor) -> Tensor:
    """Tokens as float64 rows with a 1 appended for the bias: (B, T, d) -> (B T, d + 1)."""
    return F.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)


def moments(x: Tensor, y: Tensor) -> Tensor:
    """All that the regression of y on (x, 1) needs, summed over tokens: (d + 1, d + 1 + d), float64."""
    x = with_one(x)
    return torch.cat((x.T @ x, x.T @ y.flatten(0, 1).double()), dim=1)


def affine_map(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares W (d, d) and b (d,) of y = x W + b from summed `moments`.

    Features are centred and scaled to unit variance, so badly scaled ones cost no accuracy, and directions without
    variance beyond rounding are left out, so rank-deficient ones do no harm.
    """
    d = moments.size(0) - 1
    count = moments[d, d]
    mean_x, mean_y = moments[d, :d] / count, moments[d, d + 1:] / count
    cov_xx = moments[:d, :d] / count - torch.outer(mean_x, mean_x)
    cov_xy = moments[:d, d + 1:] / count - torch.outer(mean_x, mean_y)
    second = moments[:d, :d].diagonal() / count
    live = cov_xx.diagonal() > 1e-13 * second                              # else constant up to float64's rounding
    scale = torch.where(live, cov_xx.diagonal().clamp_min(1e-300).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * cov_xx * scale)
    inverse = torch.where(values > values.max() * d * 1e-15, 1 / values.clamp_min(1e-300), 0.0)
    W = scale[:, None] * (vectors * inverse) @ (vectors.T @ (scale[:, None] * cov_xy))
    return W, mean_y - mean_x @ W


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """J[a, b] = sum over sequences and input positions of d f_a / d x_b, f_a summed over output positions; x (B, T, d).

    One backward pass per output feature. Batching them gains next to nothing: they are bound by FLOPs.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = wide(f(x)).sum((0, 1))                                                           # (d,)
        rows = [torch.autograd.grad(y_a, x, retain_graph=True)[0].sum((0, 1), dtype=torch.float64) for y_a in y]
    return torch.stack(rows)


def jacobian_scores(J: Tensor) -> dict[str, float]:
    """How far is a block's mean Jacobian J (d, d) from the identity?  (paper, probe 5)"""
    d, diagonal = len(J), J.diagonal()
    return {"deviation": (J - torch.eye(d).to(J)).norm().item() / d,
            "diagonal_mean": diagonal.mean().item(), "diagonal_std": diagonal.std().item(),
            "off_diagonal": (J - diagonal.diag()).norm().item() / math.sqrt(d * d - d),
            "spectral": torch.linalg.matrix_norm(J, 2).item()}


def lens_sums(model: GPT, streams: list[Tensor], idx: Tensor) -> Tensor:
    """Read the answer off every stream: (n + 1, 3), summed over tokens. After arXiv 2505.13898.

    KL(the model's output || the stream's), negative log-likelihood, share of the model's top 5 in the stream's top 5.
    """
    sums = torch.zeros(len(streams), 3, dtype=torch.float64)
    for i, idx_i in enumerate(idx):                                          # one sequence's logits at a time
        outputs = [wide(model.head(model.norm(x[i]))).log_softmax(-1) for x in (streams[-1], *streams)]   # (T, V) each
        own, top = outputs[0], outputs[0].topk(5).indices
        for l, q in enumerate(outputs[1:]):
            overlap = (top[:, :, None] == q.topk(5).indices[:, None]).any(-1).double().mean(-1)
            sums[l, 0] += (own.exp() * (own - q)).sum().item()
            sums[l, 1] -= q[:-1].gather(1, idx_i[1:, None]).sum().item()
            sums[l, 2] += overlap.sum().item()
    return sums


def contribution_sums(streams: list[Tensor], details: list[Detail]) -> Tensor:
    """Each sublayer's output f against the stream x it joins: ||f|| / ||x|| and cosine; (n, 4), summed over tokens."""
    rows = []
    for x, detail in zip(streams, details):
        pairs = (x, detail.attn), (x + detail.attn, detail.ffn)
        rows.append([(token_norms(f) / token_norms(x)).sum() for x, f in pairs]
                    + [cosines(x, f).sum() for x, f in pairs])
    return torch.tensor(rows, dtype=torch.float64)


def attention_sums(block: Block, x: Tensor) -> Tensor:
    """How sparse is the attention of a block at stream x (B, T, d)? (3,), summed over tokens, a mean over heads.

    Entropy relative to uniform over the visible keys; share of the visible keys that hold 90% of the mass; perplexity
    of the attention as a share of the visible keys. The first position sees one key only and is left out.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for sequence in x.split(1):                                              # T x T per head: one sequence at a time
        q, k, _ = block.attn.heads(block.scaled(block.attn_norm(sequence)))
        T, G = q.size(2), q.size(1) // k.size(1)
        scores = wide(q) @ wide(k).repeat_interleave(G, dim=1).mT / math.sqrt(q.size(-1))        # (1, n_head, T, T)
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)[0, :, 1:]                          # (n_head, T - 1, T)
        visible = torch.arange(2, T + 1, dtype=p.dtype, device=x.device)
        entropy = torch.special.entr(p).sum(-1)                                                  # (n_head, T - 1)
        needed = (p.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
        for i, value in enumerate((entropy / visible.log(), needed / visible, entropy.exp() / visible)):
            sums[i] += value.mean(0).sum().item()
    return sums


def weight_sparsity(model: GPT, below: float) -> dict[str, dict[str, list[float]]]:
    """Per kind of matrix and layer: the share of |w| < below x init_std, and the Hoyer measure (0 dense, 1 one-hot)."""
    out: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"below": [], "hoyer": []})
    for block in model.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                w, root, kind = w.detach().double().abs(), math.sqrt(w.numel()), out[name.removesuffix(".weight")]
                kind["below"].append((w < below * model.config.init_std).double().mean().item())
                kind["hoyer"].append((root - (w.sum() / w.norm().clamp_min(1e-300)).item()) / (root - 1))
    return dict(out)


# ---------------------------------------------------------------------------------------------------------------------
# `released`: what the authors' scripts compute, with the three confirmed departures from the definitions
#
# 1. Every model: the least-squares W of y = x W + b is copied into a Linear.weight without transposing, so that
#    x W^T + b is evaluated: `maps["released"]` in `probe`.
# 2. Dense models: the last stream is recorded after the final norm: `recorded`.
# 3. Dense models: a skipped block leaves no stream in the record, so later g are one place early: `released_row`.


def recorded(model: GPT, streams: list[Tensor]) -> list[Tensor]:
    """The streams as the scripts record them."""
    return streams[:-1] + [model.norm(streams[-1])] if model.config.n_experts == 0 else streams


def released_row(model: GPT, streams: list[Tensor], g: list[Tensor], s: int) -> Tensor:
    """`causal_row` as the scripts compute it: after block s each g_l is really g_{l+1}, and the last column stays 0."""
    h, g = recorded(model, streams), recorded(model, g)
    if model.config.n_experts:
        return causal_row(h, g, s)
    row = causal_row(h, g[:s + 1] + g[s + 2:] + g[-1:], s)
    row[0, -1] = 0
    return row


# ---------------------------------------------------------------------------------------------------------------------
# the whole measurement


@torch.no_grad()
def probe(model: GPT, tokens: Tensor, experiments: Sequence[str] = EXPERIMENTS, *, remove: Sequence[int] = (1,),
          sublayers: bool = True, pairs: int = 0, jacobian_samples: int | None = None, below: float = 0.1,
          seed: int = 0, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every layer of a model on tokens (B, T); returns what probe.json holds (see README).

    remove: lengths of contiguous runs to remove; sublayers: also each attention and FFN alone. pairs: so many sampled
    pairs for the permutation score, 0 for all. jacobian_samples: sequences for the Jacobian, by default half of them.
    below: the threshold of the weight sparsity.
    """
    blocks, n, (B, T), want = list(model.blocks), len(model.blocks), tokens.shape, set(experiments)
    half, size, dense = B // 2, max(1, TOKENS_AT_ONCE // T), not model.config.n_experts
    n_jacobian = B - half if jacobian_samples is None else min(jacobian_samples, B)
    starts = [*range(0, half, size), *range(half, B, size)]                    # a micro-batch lies within one half
    chunks = [(a, tokens[a:min(a + size, half if a < half else B)]) for a in starts]
    every_pair = [(i, j) for i in range(n) for j in range(i + 1, n)]
    chosen = [every_pair[k] for k in np.random.default_rng(seed).permutation(len(every_pair))[:pairs or None]]
    sums: dict[str, Any] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)

    def add(name: str, value: Any) -> None:
        sums[name] = sums[name] + torch.as_tensor(value, dtype=torch.float64, device="cpu")

    @contextlib.contextmanager
    def stage(name: str, k: int) -> Iterator[None]:
        progress(f"{name}, micro-batch {k + 1}/{len(chunks)}")
        begun = time.perf_counter()
        yield
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds[name] += time.perf_counter() - begun

    # An affine map needs all tokens before its first evaluation: a pass of its own.
    maps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if want & {"usefulness", "released"}:
        fits: list[Any] = [0.0] * (n + 1)
        for k, (a, idx) in enumerate(chunks):
            with stage("usefulness: fit", k):
                if a == half:
                    maps["heldout"] = [affine_map(m) for m in fits[:n]]
                streams = streams_of(model, idx)[0]
                fits = [m + moments(x, y) for m, x, y in zip(fits, streams, streams[1:])] + fits[n:]
                if "released" in want and dense:
                    fits[n] = fits[n] + moments(streams[n - 1], recorded(model, streams)[n])
        maps["usefulness"] = [affine_map(m) for m in fits[:n]]
        if "released" in want:
            last = affine_map(fits[n]) if dense else maps["usefulness"][-1]
            maps["released"] = [(W.T, b) for W, b in (*maps["usefulness"][:-1], last)]

    for k, (a, idx) in enumerate(chunks):
        def losses(cases: Iterable[tuple[int, Tensor]]) -> list[float]:
            """Sum of -log p for each (l, x): the stream x goes into block l."""
            return [nll(model, after(blocks[l:], x), idx) for l, x in cases]

        with stage("streams", k):
            streams, details = streams_of(model, idx)
            loss = nll(model, streams[n], idx)
            add("loss", loss)
            add("loss heldout", loss if a >= half else 0.0)
        if want & {"variance", "released"}:
            with stage("variance", k):
                attn, ffn, _ = zip(*details)
                for name, xs in (("variance", streams), ("released variance", recorded(model, streams)),
                                 ("attn_variance", attn), ("ffn_variance", ffn)):
                    add(name, [token_variance(x).item() * idx.numel() for x in xs])
        if want & {"causal", "released", "removal"}:
            with stage("causal and single removal", k):
                removed = []
                for s, g in skipped(blocks, streams):
                    if want & {"causal", "released"}:
                        add(f"causal {s}", causal_row(streams, g, s))
                    if "released" in want:
                        add(f"released causal {s}", released_row(model, streams, g, s))
                    if "removal" in want:
                        removed.append(nll(model, g[n], idx))
                if removed:
                    add("removal 1", removed)
        if "removal" in want:
            with stage("removal of runs and sublayers", k):
                for r in sorted(set(remove) - {1}):
                    add(f"removal {r}", losses((s + r, streams[s]) for s in range(n - r + 1)))
                if sublayers:
                    no_attn = (x + block.ffn_output(x)[0] for x, block in zip(streams, blocks))
                    no_ffn = (x + detail.attn for x, detail in zip(streams, details))
                    add("removal attn", losses(enumerate(no_attn, start=1)))
                    add("removal ffn", losses(enumerate(no_ffn, start=1)))
                add("block_influence", [(1 - cosines(x, y)).sum().item() for x, y in zip(streams, streams[1:])])
        if "permutation" in want:
            for i, j in chosen:
                with stage("permutation", k):
                    add(f"swap {i} {j}", nll(model, swapped(blocks, streams, i, j), idx))
        for name, fitted in maps.items():
            if (name == "released" or "usefulness" in want) and (name != "heldout" or a >= half):
                with stage("usefulness", k):
                    images = (x @ W.to(x) + b.to(x) for x, (W, b) in zip(streams, fitted))
                    add(name, losses(enumerate(images, start=1)))
        if want & {"jacobian", "released"} and a < n_jacobian:
            for l in range(n):
                with stage("jacobian", k):
                    add(f"jacobian {l}", jacobian(blocks[l], streams[l][:n_jacobian - a]))
            if "released" in want and dense:
                with stage("jacobian", k):
                    add(f"jacobian {n}", jacobian(lambda x: model.norm(blocks[-1](x)), streams[n - 1][:n_jacobian - a]))
        if "lens" in want:
            with stage("lens", k):
                add("lens", lens_sums(model, streams, idx))
        if "contribution" in want:
            with stage("contribution", k):
                add("contribution", contribution_sums(streams, details))
        if "sparsity" in want:
            with stage("sparsity", k):
                add("attention", torch.stack([attention_sums(block, x) for block, x in zip(blocks, streams)]))
                if not dense:
                    add("load", torch.stack([d.router.load for d in details]) * idx.numel())

    # sums -> scores
    predictions, positions = B * (T - 1), B * T
    loss = (sums["loss"] / predictions).item()
    out: dict[str, Any] = {"loss": loss}

    def causal(name: str) -> Tensor:
        changed, total = torch.stack([sums[f"{name} {s}"] for s in range(n)], dim=1)               # (n, n) each
        return torch.where(total > 0, changed / total.clamp_min(1e-300), 0.0)

    def usefulness(name: str, whole: Tensor, fitted_on: int) -> dict[str, Any]:
        ratio = sums[name] / whole
        return {"ratio": ratio.tolist(), "score": (ratio > USEFUL).double().mean().item(),
                "mean_log_ratio": ratio.log().mean().item(), "loose_fit": fitted_on < 10 * (model.config.n_embd + 1)}

    def jacobians(blocks: list[int]) -> dict[str, list[float]]:
        scores = [jacobian_scores(sums[f"jacobian {l}"] / (n_jacobian * T)) for l in blocks]
        return {key: [s[key] for s in scores] for key in scores[0]}

    if "variance" in want:
        out |= {name: (sums[name] / positions).tolist() for name in ("variance", "attn_variance", "ffn_variance")}
        out["variance_growth"] = [y / x if x else math.nan for x, y in zip(out["variance"], out["variance"][1:])]
    if "causal" in want:
        C = causal("causal")
        out |= {"causal": C.tolist(), "causal_mean": C.sum().item() / max(1, len(every_pair))}
    if "permutation" in want:
        P = torch.full((n, n), math.nan, dtype=torch.float64).fill_diagonal_(0.0)                  # nan: not sampled
        for i, j in chosen:
            P[i, j] = P[j, i] = abs(sums[f"swap {i} {j}"] / predictions - loss) / loss
        values = np.array([P[i, j] for i, j in chosen] or [0.0])
        out |= {"permutation": P.tolist(), "permutation_mean": float(values.mean()), "permutation_pairs": len(chosen)}
        if 1 < len(chosen) < len(every_pair):
            out["permutation_standard_error"] = float(values.std(ddof=1) / math.sqrt(len(chosen)))
    if "usefulness" in want:
        out["usefulness"] = usefulness("usefulness", sums["loss"], positions)
        out["usefulness_heldout"] = usefulness("heldout", sums["loss heldout"], half * T)
    if "removal" in want:
        out["removal"] = {key.split()[1]: (value / predictions).tolist() for key, value in sums.items()
                          if key.startswith("removal ") and (key != "removal 1" or 1 in remove)}
        out["block_influence"] = (sums["block_influence"] / positions).tolist()
    if "jacobian" in want:
        out["jacobian"] = jacobians(list(range(n)))
    if "lens" in want:
        kl, lens_loss, overlap = (sums["lens"] / torch.tensor([positions, predictions, positions])).T.tolist()
        out["lens"] = {"kl": kl, "loss": lens_loss, "top5_overlap": overlap}
    if "contribution" in want:
        names = ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")
        out["contribution"] = dict(zip(names, (sums["contribution"] / positions).T.tolist()))
    if "sparsity" in want:
        out["sparsity"] = sparsity_scores(model, sums["attention"] / (B * (T - 1)), sums["load"] / positions, below)
    if "released" in want:
        out["released"] = {"causal": causal("released causal").tolist(),
                           "usefulness": usefulness("released", sums["loss"], positions),
                           "variance": (sums["released variance"] / positions).tolist(),
                           "jacobian": jacobians([*range(n - 1), n if dense else n - 1])}
    out["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return out


def sparsity_scores(model: GPT, attention: Tensor, load: Tensor | float, below: float) -> dict[str, Any]:
    """The measures of `sparsity` from the means of `attention_sums` (n, 3) and a MoE's expert loads (n, n_experts).

    interaction_density is ours, for want of the paper's formula: the distinct key heads per query head, n_kv_head /
    n_head, times the share of the visible keys that a query effectively attends to (perplexity / visible keys).
    """
    c = model.config
    entropy, mass90, effective = attention.T.tolist()
    out = {"weights": weight_sparsity(model, below), "below": below,
           "attention": {"entropy": entropy, "keys_for_90_percent": mass90, "effective_keys": effective},
           "interaction_density": [share * c.n_kv_head / c.n_head for share in effective]}
    if c.n_experts:
        out["experts"] = {"load": load.tolist(), "never_used": (load == 0).double().mean(-1).tolist(),
                          "entropy": (torch.special.entr(load).sum(-1) / math.log(max(c.n_experts, 2))).tolist()}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# dropping blocks


@torch.no_grad()
def cheapest_drops(model: GPT, tokens: Tensor, count: int, progress: Callable[[str], None]) -> list[int]:
    """`count` blocks, each the one whose removal costs least after the ones before; in the order in which they go."""
    kept, gone = list(range(len(model.blocks))), []
    chunks = tokens.split(max(1, TOKENS_AT_ONCE // tokens.size(1)))
    for _ in range(count):
        losses = np.zeros(len(kept))
        for k, idx in enumerate(chunks):
            progress(f"choosing block {len(gone) + 1} of {count} to drop, micro-batch {k + 1}/{len(chunks)}")
            blocks = [model.blocks[l] for l in kept]
            streams, _ = streams_of(model, idx, blocks)
            losses += [nll(model, g[-1], idx) for _, g in skipped(blocks, streams)]
        gone.append(kept.pop(int(losses.argmin())))
    return gone


def without_blocks(saved: dict[str, Any], drop: Sequence[int]) -> dict[str, Any]:
    """The checkpoint `saved` without the blocks `drop`, weights only: train.py --init_from and probe.py take it.

    LayerNorm Scaling divides by the root of a block's number, which changes: the norms' gains make up for it.
    """
    settings, weights = dict(saved["settings"]), {}
    kept = [l for l in range(settings["n_layer"]) if l not in drop]
    for name, w in saved["model"].items():
        if name.startswith("blocks."):
            _, l, rest = name.split(".", 2)
            if int(l) not in kept:
                continue
            new = kept.index(int(l))
            if settings["norm"] == "lns" and rest in ("attn_norm.weight", "ffn_norm.weight"):
                w = w * math.sqrt((new + 1) / (int(l) + 1))
            name = f"blocks.{new}.{rest}"
        weights[name] = w.clone()
    settings["n_layer"] = len(kept)
    return {"model": weights, "settings": settings, "step": saved.get("step", 0), "tokenizer": saved["tokenizer"],
            "kept": [saved.get("kept", list(range(saved["settings"]["n_layer"])))[l] for l in kept]}


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def perplexity_ratio(r: dict[str, Any], loss: float) -> float:
    return math.exp(min(loss - r["loss"], 700))


# Columns of the table of blocks: where the numbers of one block come from, and what they mean.
COLUMNS: dict[str, tuple[str, Callable[[dict, int], float], str]] = {
    "variance": ("variance", lambda r, l: r["variance"][l + 1], "of the stream after the block"),
    "growth": ("variance", lambda r, l: r["variance_growth"][l], "of the variance in the block"),
    "causal": ("causal", lambda r, l: float(np.mean(r["causal"][l][l + 1:] or math.nan)), "later updates without it"),
    "permuted": ("permutation", lambda r, l: mean_of_others(r["permutation"][l], l), "loss change of its swaps"),
    "affine": ("usefulness", lambda r, l: r["usefulness"]["ratio"][l], "loss ratio with its best affine map instead"),
    "heldout": ("usefulness", lambda r, l: r["usefulness_heldout"]["ratio"][l], "the same, fitted on other sequences"),
    "released": ("released", lambda r, l: r["released"]["usefulness"]["ratio"][l], "the same by the released scripts"),
    "removed": ("block_influence", lambda r, l: perplexity_ratio(r, r["removal"].get("1", [math.nan] * (l + 1))[l]),
                "perplexity ratio without it"),
    "influence": ("block_influence", lambda r, l: r["block_influence"][l], "1 - cosine of its input and output"),
    "|J-I|/d": ("jacobian", lambda r, l: r["jacobian"]["deviation"][l], "its Jacobian's distance from the identity"),
    "lens KL": ("lens", lambda r, l: r["lens"]["kl"][l + 1], "from the model's output to the one read after it"),
    "attn/x": ("contribution", lambda r, l: r["contribution"]["attn_ratio"][l], "attention's output over the stream"),
    "ffn/x": ("contribution", lambda r, l: r["contribution"]["ffn_ratio"][l], "FFN's output over the stream"),
    "attn.H": ("sparsity", lambda r, l: r["sparsity"]["attention"]["entropy"][l], "entropy of its attention / uniform"),
}

# Columns of the table of checkpoints.
SCORES: dict[str, tuple[str, Callable[[dict], float]]] = {
    "loss": ("loss", lambda r: r["loss"]),
    "last var.": ("variance", lambda r: r["variance"][-1]),
    "causal": ("causal", lambda r: r["causal_mean"]),
    "permuted": ("permutation", lambda r: r["permutation_mean"]),
    "useful": ("usefulness", lambda r: r["usefulness"]["score"]),
    "log ratio": ("usefulness", lambda r: r["usefulness"]["mean_log_ratio"]),
    "heldout": ("usefulness", lambda r: r["usefulness_heldout"]["score"]),
    "released": ("released", lambda r: r["released"]["usefulness"]["score"]),
    "influence": ("block_influence", lambda r: float(np.mean(r["block_influence"]))),
    "|J-I|/d": ("jacobian", lambda r: float(np.mean(r["jacobian"]["deviation"]))),
}


def mean_of_others(row: list[float], l: int) -> float:
    others = [x for k, x in enumerate(row) if k != l and not math.isnan(x)]
    return float(np.mean(others)) if others else math.nan


def block_table(r: dict[str, Any], n: int) -> str:
    """One line per block, and what its columns mean."""
    columns = {name: get for name, (key, get, _) in COLUMNS.items() if key in r}
    lines = ["block" + "".join(f"{name:>10}" for name in columns)] * bool(columns)
    lines += [f"{l:5d}" + "".join(f"{get(r, l):10.4g}" for get in columns.values()) for l in range(n) if columns]
    legend = "; ".join(f"{name}: {COLUMNS[name][2]}" for name in columns)
    return "\n".join(lines + textwrap.wrap(legend, 120))


def score_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per checkpoint."""
    columns = {name: get for name, (key, get) in SCORES.items() if all(key in r for r in results.values())}
    width = max(map(len, results))
    lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
    return "\n".join(lines + [f"{label:{width}}" + "".join(f"{get(r):11.4f}" for get in columns.values())
                              for label, r in results.items()])


def summary(r: dict[str, Any], path: str) -> Iterator[str]:
    """The scores of a model, a line each."""
    yield f"loss {r['loss']:.4f} nats per prediction"
    if "causal" in r:
        yield f"causal score {r['causal_mean']:.4f}, the mean over s < l"
    if "permutation" in r:
        error = f" +- {r['permutation_standard_error']:.4f}" if "permutation_standard_error" in r else ""
        yield f"permutation score {r['permutation_mean']:.4f}{error}, the mean over {r['permutation_pairs']} pairs"
    for score, how in ((r.get("usefulness"), "as defined"), (r.get("usefulness_heldout"), "as defined, held out"),
                       (r.get("released", {}).get("usefulness"), "as the released scripts compute it")):
        if score:
            yield (f"usefulness {score['score']:.3f} {how}; mean log ratio {score['mean_log_ratio']:.4f}"
                   + "; loose fit, fewer than 10 (d + 1) tokens: give more --samples" * score["loose_fit"])
    for length, losses in r.get("removal", {}).items():
        if length.isdigit():
            s = int(np.argmin(losses))
            run = ",".join(str(s + k) for k in range(int(length)))
            yield (f"cheapest run of {length}: blocks {run}, perplexity x{perplexity_ratio(r, losses[s]):.3f}   "
                   f"python probe.py {path} --drop {run} --save pruned.pt")


def figures(results: dict[str, dict[str, Any]], out: Path) -> str:
    """One PNG per experiment: curves of several checkpoints in one plot, heat maps side by side. Says what it did."""
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no figures: pip install matplotlib"
    rs, several = list(results.values()), len(results) > 1

    def finish(fig: Any, axes: Any, name: str, **labels: Any) -> None:
        for ax in np.atleast_1d(axes):
            ax.set(**labels)
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        fig.savefig(out / f"{name}.png", dpi=130)
        plt.close(fig)

    def curves(name: str, lines: dict[str, list[float]], **labels: Any) -> None:
        fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
        for label, ys in lines.items():
            ax.plot(ys, marker="o", markersize=3.5, label=label)
        if len(lines) > 1:
            ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
        finish(fig, ax, name, **labels)

    passed = "blocks passed (0: embedding)"
    for name, key, get, labels in (
            ("variance", "variance", lambda r: r["variance"],
             dict(title="Variance of the residual stream", xlabel=passed, ylabel="variance", yscale="log")),
            ("jacobian", "jacobian", lambda r: r["jacobian"]["deviation"],
             dict(title="Distance of the Jacobian from the identity", xlabel="block", ylabel=r"$\|J - I\|_F\,/\,d$")),
            ("lens", "lens", lambda r: r["lens"]["kl"],
             dict(title="What each stream already says", xlabel=passed, ylabel="KL to the model's output (nats)"))):
        if all(key in r for r in rs):
            curves(name, {label: get(r) for label, r in results.items()}, **labels)
    if all("removal" in r for r in rs):
        lines = {f"{label}, " * several + f"run of {n}": [min(perplexity_ratio(r, x), 1e9) for x in losses]
                 for label, r in results.items() for n, losses in r["removal"].items() if n.isdigit()}
        curves("removal", lines, title="Perplexity without a run of blocks", xlabel="first removed block",
               ylabel="perplexity ratio", yscale="log")
    if all("usefulness" in r for r in rs):
        most, width = max(len(r["usefulness"]["ratio"]) for r in rs), 0.8 / len(rs)
        fig, ax = plt.subplots(figsize=(max(6, 0.2 * most * len(rs)), 3.8), layout="constrained")
        for k, (label, r) in enumerate(results.items()):
            ratio = np.array(r["usefulness"]["ratio"])
            ax.bar(np.arange(len(ratio)) + (k - (len(rs) - 1) / 2) * width, ratio - 1, width, bottom=1, label=label)
        ax.axhline(USEFUL, color="black", linestyle="--", linewidth=1, label=f"useful above {USEFUL}")
        fig.legend(fontsize=8, loc="outside lower center", ncols=4)             # below: bars may be anywhere above
        finish(fig, ax, "usefulness", title="Loss with a block replaced by its best affine map", xlabel="block",
               ylabel="loss ratio")
    for name, title, xlabel, ylabel in (("causal", "Causal score C[s, l]", "later block l", "skipped block s"),
                                        ("permutation", "Relative change of the loss by a swap", "block j", "block i")):
        if all(name in r and len(r[name]) > 1 for r in rs):
            matrices = [np.array(r[name], dtype=float) for r in rs]
            for m in matrices:
                m[np.tril_indices(len(m)) if name == "causal" else np.diag_indices(len(m))] = np.nan
            fig, axes = plt.subplots(1, len(rs), figsize=(4.6 * len(rs), 4), layout="constrained", squeeze=False)
            norm = matplotlib.colors.PowerNorm(0.5, 0, max(np.nanmax(m, initial=1e-9) for m in matrices))
            for ax, label, m in zip(axes[0], results, matrices):
                image = ax.imshow(m, norm=norm)
                ax.set_title(label if several else title)
                ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            fig.suptitle(title if several else None)
            fig.colorbar(image, ax=axes[0].tolist(), shrink=0.85)
            finish(fig, axes[0], name, xlabel=xlabel, ylabel=ylabel)
    return f"figures in {out}"


# ---------------------------------------------------------------------------------------------------------------------
# how fast: each probe against the naive way, which the authors' scripts go


@torch.no_grad()
def bench(model: GPT, tokens: Tensor, rounds: int = 5) -> None:
    """Time each probe and its naive version in turn; naive: every intervention is a whole pass from the embedding."""
    blocks, n, d, half = list(model.blocks), len(model.blocks), model.config.n_embd, len(tokens) // 2

    def whole(changed: Sequence[Callable[[Tensor], Tensor]], idx: Tensor = tokens) -> list[Tensor]:
        streams = [model.embed(idx)]
        for block in changed:
            streams.append(block(streams[-1]))
        return streams

    def naive_causal() -> None:
        h = whole(blocks)
        for s in range(n):
            g = whole([*blocks[:s], lambda x: x, *blocks[s + 1:]])
            causal_row(h, g, s)
            nll(model, g[n], tokens)

    def naive_permutation() -> None:
        for i in range(n):
            for j in range(i + 1, n):
                nll(model, whole([*blocks[:i], blocks[j], *blocks[i + 1:j], blocks[i], *blocks[j + 1:]])[n], tokens)

    def naive_usefulness() -> None:
        for l in range(n):
            x, y = whole(blocks)[l:l + 2]                    # inputs and outputs of layer l: a pass of its own
            for fitted, judged in ((tokens, tokens), (tokens[:half], tokens[half:])):
                rows = len(fitted)
                fit = torch.linalg.lstsq(with_one(x[:rows]), y[:rows].flatten(0, 1).double()).solution.to(x.dtype)
                nll(model, whole([*blocks[:l], lambda x: x @ fit[:d] + fit[d], *blocks[l + 1:]], judged)[n], judged)

    def naive_jacobian() -> None:
        for l in range(n):
            jacobian(blocks[l], whole(blocks)[l])

    print(f"{tuple(tokens.shape)} tokens, n_layer={n}, n_embd={d}, best of {rounds}, in turn")
    for name, naive in (("causal,removal", naive_causal), ("permutation", naive_permutation),
                        ("usefulness", naive_usefulness), ("jacobian", naive_jacobian)):
        def here() -> None:
            probe(model, tokens, name.split(","), sublayers=False, jacobian_samples=len(tokens))
        ours, theirs = (min(times) for times in zip(*[(timed(here), timed(naive)) for _ in range(rounds)]))
        print(f"{name:15} here {ours:8.3f} s   naive {theirs:8.3f} s   {theirs / ours:.2f}x", flush=True)


def timed(f: Callable[[], None]) -> float:
    begun = time.perf_counter()
    f()
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def read_tokens(args: Any, model: GPT, saved: dict[str, Any]) -> tuple[Tensor, str]:
    """The sequences to probe on, (B, T) int64, and where they are from."""
    limit, V = model.config.block_size, model.config.vocab_size
    if args.tokens:
        origin = args.tokens
        try:
            array = np.load(args.tokens, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"--tokens {args.tokens}: no readable .npy file ({e})") from e
        check(isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "iu",
              f"--tokens {args.tokens}: it must hold one array of integers of shape (B, T)")
    else:
        folder = args.data or saved["settings"].get("data", "data/python")
        T = args.length or min(512, limit)
        check(2 <= T <= limit, f"--length {T}: must be 2 to the model's block_size={limit}")
        if Path(folder).is_file():
            enc, origin = get_tokenizer(saved["tokenizer"]), folder
            ids = np.array([i for text in documents(folder) for i in (*enc.encode_ordinary(text), enc.eot_token)])
            n, read = (len(ids) - 1) // T, lambda start: ids[start:start + T]
        else:
            corpus, origin = Corpus(folder), f"{folder} (validation)"
            check(corpus.tokenizer == saved["tokenizer"], f"{folder} has {corpus.tokenizer!r} tokens, the model knows "
                  f"{saved['tokenizer']!r}: give another --data")
            n, read = corpus.n_windows("val", T), lambda start: corpus.read("val", start, T)
        picked = np.random.default_rng(args.seed).permutation(n)[:max(args.samples, 0)]
        array = np.array([read(int(i) * T) for i in np.sort(picked)]).reshape(-1, T)
    B, T = array.shape
    check(B >= 2 and 2 <= T <= limit, f"{B} sequences of {T} tokens: 2 or more of 2 to block_size={limit} are needed")
    check(0 <= array.min() and array.max() < V, f"{origin}: token {array.max()} is not one of the model's {V}")
    return torch.from_numpy(array.astype(np.int64)), origin


def make_progress() -> Callable[[str], None]:
    """A line on stderr for what takes longer than a few seconds: live on a terminal, else every half minute."""
    begun, last, live = time.time(), [0.0], sys.stderr.isatty()

    def progress(line: str) -> None:
        now = time.time()
        if now - begun > 3 and now - last[0] > (0.2 if live else 30):
            last[0] = now
            line = "\r" * live + f"{line}, {now - begun:.0f} s".ljust(80)
            print(line, end="" if live else "\n", file=sys.stderr, flush=True)
    return progress


def integers(text: str, flag: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as e:
        raise UserError(f"{flag} {text}: numbers such as 1,2,4 are expected") from e


@torch.no_grad()
def drop_blocks(args: Any, path: str, model: GPT, saved: dict[str, Any], tokens: Tensor) -> None:
    """--drop: choose the blocks, say what it costs, save the rest."""
    n, auto = len(model.blocks), args.drop.startswith("auto:")
    drop = integers(args.drop.removeprefix("auto:"), "--drop")
    check(len(drop) == 1 and 0 < drop[0] < n if auto else set(drop) <= set(range(n)) and len(set(drop)) < n,
          f"--drop {args.drop}: {path} has blocks 0 to {n - 1}; at least one must go and one must stay")
    drop = cheapest_drops(model, tokens, drop[0], make_progress()) if auto else sorted(set(drop))
    target = Path(args.save or Path(path).parent / "pruned.pt")
    check(target.resolve() != Path(path).resolve(), f"--save {target} is the checkpoint itself: choose another name")
    chunks, predictions = tokens.split(max(1, TOKENS_AT_ONCE // tokens.size(1))), tokens.numel() - len(tokens)
    rest = [block for l, block in enumerate(model.blocks) if l not in drop]
    whole, pruned = (sum(nll(model, after(blocks, model.embed(idx)), idx) for idx in chunks) / predictions
                     for blocks in (model.blocks, rest))
    save_checkpoint(target, without_blocks(saved, drop))
    print(f"{target}: {path} without blocks {','.join(map(str, drop))}; loss {whole:.4f} -> {pruned:.4f}, "
          f"perplexity x{math.exp(pruned - whole):.3f}\n"
          f"train it on:  python train.py --init_from={target} --out_dir=out/pruned "
          f"--data={saved['settings'].get('data', 'data/python')}")


def measure(args: Any, path: str, model: GPT, tokens: Tensor, origin: str, label: str, out: Path) -> dict[str, Any]:
    """Probe one checkpoint, write probe.json and the figures, print the tables."""
    n, only = len(model.blocks), args.only.split(",")
    remove = integers(args.remove, "--remove") if args.remove else [2**k for k in range(n) if 2**k < max(n, 2)]
    check(all(0 < r <= n for r in remove), f"--remove {args.remove}: {path} has {n} blocks")
    result = probe(model, tokens, only, remove=remove, pairs=args.pairs, jacobian_samples=args.jacobian_samples,
                   below=args.below, seed=args.seed, progress=make_progress())
    result["run"] = {"checkpoint": path, "tokens": origin, "samples": len(tokens),
                     "length": tokens.size(1), "seed": args.seed, "experiments": only, "dtype": args.dtype,
                     "device": tokens.device.type, "settings": asdict(model.config)}
    try:
        write_json(out / "probe.json", finite(result))
        drawn = figures({label: result}, out)
    except OSError as e:
        raise UserError(f"cannot write to {out} ({e.strerror or e}): choose another --out") from e
    print(f"\n{path} on {len(tokens)} x {tokens.size(1)} tokens of {origin}", block_table(result, n), "",
          *summary(result, path), f"{out / 'probe.json'} written, {drawn}", sep="\n")
    return result


def finite(x: Any) -> Any:
    """nan and infinity, which JSON has not, as null."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, list):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def main() -> None:
    parser = Parser(prog="probe.py", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="ckpt.pt")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments (default: %(default)s)")
    parser.add_argument("--data", help="prepared corpus, its validation split is used, or a text (default: the run's)")
    parser.add_argument("--samples", type=int, default=100, help="sequences (default 100, as the paper)")
    parser.add_argument("--length", type=int, default=0, help="tokens per sequence (default 512, at most block_size)")
    parser.add_argument("--tokens", metavar="FILE.npy", help="integer tokens (B, T) instead of a corpus")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sequences and pairs")
    parser.add_argument("--pairs", type=int, default=0, help="permute a sample of so many pairs (default: all)")
    parser.add_argument("--remove", default="", help="lengths of runs to remove (default: 1,2,4,... below n_layer)")
    parser.add_argument("--jacobian_samples", type=int, help="sequences for the Jacobian (default: half of them)")
    parser.add_argument("--below", type=float, default=0.1, help="|w| under this x init_std is sparse (default 0.1)")
    parser.add_argument("--drop", help="blocks such as 3,7, or auto:N for the N cheapest: save a model without them")
    parser.add_argument("--save", help="where --drop writes (default: pruned.pt beside the checkpoint)")
    parser.add_argument("--out", help="folder for probe.json and the figures (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--bench", action="store_true", help="time each probe against the naive way")
    args = parser.parse_args()
    for name in args.only.split(","):
        check(name in EXPERIMENTS, f"--only {name}: no such experiment; there are {','.join(EXPERIMENTS)}")
    check(args.jacobian_samples is None or args.jacobian_samples > 0, "--jacobian_samples must be positive")
    check(args.pairs >= 0 and args.below >= 0 and args.seed >= 0,
          "--pairs, --below and --seed must not be negative")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    check(args.device in ("auto", device), "--device cuda: torch sees no GPU here, use --device cpu")

    check(not args.save or (args.drop and len(args.checkpoints) == 1), "--save goes with --drop and one checkpoint")

    results: dict[str, dict[str, Any]] = {}
    several = len(args.checkpoints) > 1
    same_folder = len({Path(path).resolve().parent for path in args.checkpoints}) < len(args.checkpoints)
    for path in args.checkpoints:
        model, saved = load_model(path, device, getattr(torch, args.dtype))
        tokens, origin = read_tokens(args, model, saved)
        tokens = tokens.to(device)
        if args.drop:
            drop_blocks(args, path, model, saved, tokens)
        elif args.bench:
            bench(model, tokens)
        else:
            label = Path(path).resolve().parent.name if Path(path).name == "ckpt.pt" else Path(path).stem
            label = path.replace("/", "_") if label in results else label
            home = Path(args.out or Path(path).parent)
            out = home / label if several and (args.out or same_folder) else home
            make_folder(out)
            results[label] = measure(args, path, model, tokens, origin, label, out)
    if len(results) > 1:
        out = Path(args.out or Path(args.checkpoints[0]).parent / "comparison")
        make_folder(out)
        print("", score_table(results), f"of the comparison: {figures(results, out)}", sep="\n")


def make_folder(out: Path) -> None:
    """Make a folder for results, and find out before the work whether it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check(os.access(out, os.W_OK), f"cannot write to {out}: choose another --out")
    except OSError as e:
        raise UserError(f"cannot make {out} ({e.strerror or e}): choose another --out") from e


if __name__ == "__main__":
    run(main)
