"""Which layers does a model use? Every layer-effectiveness experiment of the paper, from one command.

    python probe.py out/gqa_deep/ckpt.pt                                # all of it: a table, probe.json and figures
    python probe.py out/dense/ckpt.pt out/moe/ckpt.pt --out compare     # side by side
    python probe.py ckpt.pt --only causal,removal --samples 20          # some of it
    python probe.py ckpt.pt --drop 3,7 --save pruned.pt                 # the same model without two blocks
    python probe.py ckpt.pt --bench                                     # how much faster than the naive way?

h_0 is the embedding's output and h_l the output of block l, before the final norm. Lists and block numbers count from 0, so
`variance[l]` is of h_l and block l turns h_l into h_{l+1}. A micro-batch goes through the model once; every intervention
starts from the streams of that pass. Nothing in the model is changed or hooked: blocks are functions, recombined here.
"""
from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, write_json
from model import GPT, Block, Detail, MoE, ModelConfig, Parser, UserError, check, cross_entropy, load_model, run, token_variance

EXPERIMENTS = ("variance", "causal", "permutation", "usefulness", "released", "removal", "jacobian", "lens", "contribution",
               "sparsity")
USEFUL = 1.1                # a layer is useful when its affine map multiplies the loss by more than this (paper)
TOKENS_AT_ONCE = 4096       # a micro-batch: its streams fit a CPU's cache and any GPU


# ---------------------------------------------------------------------------------------------------------------------
# the pieces: each returns sums over one micro-batch, which the caller adds up before dividing


def streams_of(model: GPT, idx: Tensor, blocks: Sequence[Block] | None = None) -> tuple[list[Tensor], list[Detail]]:
    """The streams h_0 .. h_n of idx (B, T), each (B, T, d), and what each block did: the one pass that all probes share."""
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


def token_norms(x: Tensor) -> Tensor:
    """(B, T, d) -> (B, T) in float32 or better."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def skipped(blocks: Sequence[Block], streams: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """For every block s: s and the streams g_0 .. g_n of the run in which s is the identity, n (n - 1) / 2 blocks in all."""
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
    """The least-squares W (d, d) and b (d,) of y = x W + b from summed `moments`; the smallest W where it is not unique.

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
        y = f(x).sum((0, 1), dtype=torch.promote_types(x.dtype, torch.float32))              # (d,)
        rows = [torch.autograd.grad(y[a], x, retain_graph=True)[0].sum((0, 1), dtype=torch.float64) for a in range(len(y))]
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

    KL(the model's output || the stream's), negative log-likelihood, share of the model's top 5 among the stream's top 5.
    """
    sums = torch.zeros(len(streams), 3, dtype=torch.float64)
    for i, idx_i in enumerate(idx):                                          # one sequence's logits at a time
        wide = torch.promote_types(streams[0].dtype, torch.float32)
        outputs = [model.head(model.norm(x[i])).to(wide).log_softmax(-1) for x in (streams[-1], *streams)]      # (T, V) each
        own, top = outputs[0], outputs[0].topk(5).indices
        for l, q in enumerate(outputs[1:]):
            overlap = (top[:, :, None] == q.topk(5).indices[:, None]).any(-1).double().mean(-1)
            sums[l, 0] += (own.exp() * (own - q)).sum().item()
            sums[l, 1] -= q[:-1].gather(1, idx_i[1:, None]).sum().item()
            sums[l, 2] += overlap.sum().item()
    return sums


def contribution_sums(streams: list[Tensor], details: list[Detail]) -> Tensor:
    """Each sublayer's output against the stream it is added to, ||f|| / ||x|| and cosine: (n, 4), summed over tokens."""
    rows = []
    for x, detail in zip(streams, details):
        pairs = (x, detail.attn), (x + detail.attn, detail.ffn)
        rows.append([(token_norms(f) / token_norms(x)).sum() for x, f in pairs]
                    + [F.cosine_similarity(x.float(), f.float(), dim=-1).sum() for x, f in pairs])
    return torch.tensor(rows, dtype=torch.float64)


def attention_sums(block: Block, x: Tensor) -> Tensor:
    """How sparse is the attention of a block at stream x (B, T, d)? (3,), summed over tokens, a mean over heads.

    Entropy relative to uniform over the visible keys; share of the visible keys that hold 90% of the mass; perplexity of
    the attention as a share of the visible keys. The first position sees one key only and is left out.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for sequence in x.split(1):                                              # T x T per head: one sequence at a time
        q, k, _ = block.attn.heads(block.attn_norm(sequence) * block.scale)
        T, G = q.size(2), q.size(1) // k.size(1)
        scores = q.float() @ k.float().repeat_interleave(G, dim=1).mT / math.sqrt(q.size(-1))        # (1, n_head, T, T)
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)[0, :, 1:]                              # (n_head, T - 1, T)
        visible = torch.arange(2, T + 1, device=x.device)
        entropy = torch.special.entr(p).sum(-1)                                                      # (n_head, T - 1)
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
                w, root = w.detach().double().abs(), math.sqrt(w.numel())
                out[name.removesuffix(".weight")]["below"].append((w < below * model.config.init_std).double().mean().item())
                out[name.removesuffix(".weight")]["hoyer"].append((root - (w.sum() / w.norm().clamp_min(1e-300)).item()) / (root - 1))
    return dict(out)


def replaced_nll(model: GPT, streams: list[Tensor], l: int, W: Tensor, b: Tensor, idx: Tensor) -> float:
    """Sum of -log p with block l replaced by x W + b.  (paper, probe 4)"""
    x = streams[l] @ W.to(streams[l]) + b.to(streams[l])
    return nll(model, after(model.blocks[l + 1:], x), idx)


# ---------------------------------------------------------------------------------------------------------------------
# `released`: what the authors' scripts compute, with the three confirmed departures from the definitions
#
# 1. Every model: the least-squares W of y = x W + b is copied into a Linear.weight without transposing, so that
#    x W^T + b is evaluated: see `fit` in `probe`, which transposes.
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
def probe(model: GPT, tokens: Tensor, experiments: Sequence[str] = EXPERIMENTS, *, remove: Sequence[int] = (1,), pairs: int = 0,
          jacobian_samples: int | None = None, below: float = 0.1, seed: int = 0,
          progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every layer of a model on tokens (B, T); returns what probe.json holds (see README).

    remove: lengths of contiguous runs to remove. pairs: so many sampled pairs for the permutation score, 0 for all.
    jacobian_samples: sequences for the Jacobian, half of them by default. below: threshold of the weight sparsity.
    """
    blocks, n, (B, T) = list(model.blocks), len(model.blocks), tokens.shape
    want, half, size = set(experiments), B // 2, max(1, TOKENS_AT_ONCE // T)
    n_jacobian = B - B // 2 if jacobian_samples is None else min(jacobian_samples, B)
    starts = [*range(0, half, size), *range(half, B, size)]                    # a micro-batch lies within one half
    chunks = [(a, tokens[a:min(a + size, half if a < half else B)]) for a in starts]
    every_pair = [(i, j) for i in range(n) for j in range(i + 1, n)]
    some = np.random.default_rng(seed).permutation(len(every_pair))[:pairs or None]
    chosen = [every_pair[k] for k in sorted(some)]
    sums: dict[str, Any] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds[name] += time.perf_counter() - begun

    # The affine maps need all tokens before the first evaluation: a pass of their own, whose streams nothing else waits for.
    maps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if want & {"usefulness", "released"}:
        with clock("usefulness"):
            total: list[Any] = [0.0] * (n + 1)
            for k, (a, idx) in enumerate(chunks):
                progress(f"fitting affine maps {k + 1}/{len(chunks)}")
                if a == half:
                    maps["heldout"] = [affine_map(m) for m in total[:n]]       # what the first half alone says
                streams, _ = streams_of(model, idx)
                for l in range(n):
                    total[l] = total[l] + moments(streams[l], streams[l + 1])
                if "released" in want:
                    total[n] = total[n] + moments(streams[n - 1], recorded(model, streams)[n])
            maps["usefulness"] = [affine_map(m) for m in total[:n]]
            if "released" in want:
                fit = maps["usefulness"][:-1] + [affine_map(total[n])]
                maps["released"] = [(W.T, b) for W, b in fit]

    for k, (a, idx) in enumerate(chunks):
        at = f"micro-batch {k + 1}/{len(chunks)}"
        with clock("streams"):
            streams, details = streams_of(model, idx)
            loss = nll(model, streams[n], idx)
            sums["loss"] += loss
            sums["heldout_loss"] += loss * (a >= half)

        if want & {"variance", "released"}:
            with clock("variance"):
                sums["variance"] += torch.stack([token_variance(x) for x in (*streams, recorded(model, streams)[n])]).double() * idx.numel()
                sums["attn_variance"] += torch.stack([token_variance(d.attn) for d in details]).double() * idx.numel()
                sums["ffn_variance"] += torch.stack([token_variance(d.ffn) for d in details]).double() * idx.numel()

        if want & {"causal", "released", "removal"}:
            progress(f"skipping blocks, {at}")
            with clock("causal and single removal"):
                for s, g in skipped(blocks, streams):
                    here = torch.arange(n)[:, None] == s
                    sums["causal"] += here * causal_row(streams, g, s)[:, None]                  # (2, n, n)
                    if "released" in want:
                        sums["released_causal"] += here * released_row(model, streams, g, s)[:, None]
                    if "removal" in want:
                        sums["removal 1"] += (torch.arange(n) == s) * nll(model, g[n], idx)

        if "removal" in want:
            progress(f"removing runs and sublayers, {at}")
            with clock("removal"):
                for r in remove:
                    if r > 1:
                        sums[f"removal {r}"] += torch.tensor([nll(model, after(blocks[s + r:], streams[s]), idx)
                                                              for s in range(n - r + 1)], dtype=torch.float64)
                no_attn = [x + block.ffn_output(x)[0] for block, x in zip(blocks, streams)]
                no_ffn = [x + detail.attn for detail, x in zip(details, streams)]
                for name, xs in (("attn", no_attn), ("ffn", no_ffn)):
                    sums[f"removal {name}"] += torch.tensor([nll(model, after(blocks[l + 1:], x), idx) for l, x in enumerate(xs)],
                                                            dtype=torch.float64)
                sums["block_influence"] += torch.stack([(1 - F.cosine_similarity(x.float() if x.dtype != torch.float64 else x, y.to(
                    torch.promote_types(y.dtype, torch.float32)), dim=-1)).sum() for x, y in zip(streams, streams[1:])]).double()

        if "permutation" in want:
            with clock("permutation"):
                losses = torch.zeros(n, n, dtype=torch.float64)
                for i, j in chosen:
                    progress(f"swapping blocks {i} and {j}, {at}")
                    losses[i, j] = losses[j, i] = nll(model, swapped(blocks, streams, i, j), idx)
                sums["permutation"] += losses

        for name, fitted in maps.items():
            if (name == "released" or "usefulness" in want) and (name != "heldout" or a >= half):
                progress(f"replacing blocks by affine maps, {at}")
                with clock("usefulness"):
                    sums[name] += torch.tensor([replaced_nll(model, streams, l, *fitted[l], idx) for l in range(n)],
                                               dtype=torch.float64)

        if want & {"jacobian", "released"} and a < n_jacobian:
            with clock("jacobian"):
                xs = [x[:n_jacobian - a] for x in streams]
                for l in range(n):
                    progress(f"Jacobian of block {l}, {at}")
                    sums[f"jacobian {l}"] += jacobian(blocks[l], xs[l])
                if "released" in want and not model.config.n_experts:
                    sums["jacobian released"] += jacobian(lambda x: model.norm(blocks[-1](x)), xs[n - 1])

        if "lens" in want:
            progress(f"reading every stream, {at}")
            with clock("lens"):
                sums["lens"] += lens_sums(model, streams, idx)
        if "contribution" in want:
            with clock("contribution"):
                sums["contribution"] += contribution_sums(streams, details)
        if "sparsity" in want:
            progress(f"attention sparsity, {at}")
            with clock("sparsity"):
                sums["attention"] += torch.stack([attention_sums(block, x) for block, x in zip(blocks, streams)])
                if details[0].router is not None:
                    sums["load"] += torch.stack([d.router.load for d in details]).double().cpu() * idx.numel()

    # sums -> scores
    predictions, loss = B * (T - 1), sums["loss"] / (B * (T - 1))
    out: dict[str, Any] = {"loss": loss}

    def usefulness(name: str, reference: float) -> dict[str, Any]:
        ratio = sums[name] / reference
        return {"ratio": ratio.tolist(), "score": (ratio > USEFUL).double().mean().item(), "mean_log_ratio": ratio.log().mean().item()}

    def causal(name: str) -> list[list[float]]:
        changed, total = sums[name]
        return torch.where(total > 0, changed / total.clamp_min(1e-300), 0.0).tolist()

    if "variance" in want:
        variance = (sums["variance"] / (B * T)).tolist()[:n + 1]
        out |= {"variance": variance, "attn_variance": (sums["attn_variance"] / (B * T)).tolist(),
                "ffn_variance": (sums["ffn_variance"] / (B * T)).tolist(),
                "variance_growth": [b / a if a else math.nan for a, b in zip(variance, variance[1:])]}
    if "causal" in want:
        out["causal"] = causal("causal")
        later = [c for s, row in enumerate(out["causal"]) for c in row[s + 1:]]
        out["causal_mean"] = float(np.mean(later)) if later else 0.0
    if "permutation" in want:
        score = (sums["permutation"] / predictions - loss).abs() / loss
        kept = torch.zeros(n, n, dtype=torch.bool)
        for i, j in chosen:
            kept[i, j] = kept[j, i] = True
        values = np.array([score[i, j].item() for i, j in chosen])
        out["permutation"] = torch.where(kept, score, torch.eye(n).log().abs() * 0 if pairs else 0.0).tolist()
        out["permutation_mean"] = float(values.mean()) if len(values) else 0.0
        if pairs:
            out["permutation_pairs"] = len(values)
            out["permutation_standard_error"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    if "usefulness" in want:
        out["usefulness"] = usefulness("usefulness", sums["loss"])
        out["usefulness_heldout"] = usefulness("heldout", sums["heldout_loss"])
        out["usefulness"]["loose_fit"] = B * T < 10 * (model.config.n_embd + 1)
        out["usefulness_heldout"]["loose_fit"] = half * T < 10 * (model.config.n_embd + 1)
    if "removal" in want:
        out["removal"] = {key.split()[1]: (v / predictions).tolist() for key, v in sums.items() if key.startswith("removal ")}
        out["block_influence"] = (sums["block_influence"] / (B * T)).tolist()
    jacobians = [jacobian_scores(sums[f"jacobian {l}"] / (n_jacobian * T)) for l in range(n) if want & {"jacobian", "released"}]
    if "jacobian" in want:
        out["jacobian"] = {key: [scores[key] for scores in jacobians] for key in jacobians[0]}
    if "released" in want:
        if not model.config.n_experts:
            jacobians[-1] = jacobian_scores(sums["jacobian released"] / (n_jacobian * T))
        variance = (sums["variance"] / (B * T)).tolist()
        out["released"] = {"causal": causal("released_causal"), "usefulness": usefulness("released", sums["loss"]),
                           "variance": variance[:n] + variance[n + 1:],
                           "jacobian": {key: [scores[key] for scores in jacobians] for key in jacobians[0]}}
    if "lens" in want:
        kl, lens_loss, overlap = (sums["lens"] / torch.tensor([B * T, predictions, B * T])).T.tolist()
        out["lens"] = {"kl": kl, "loss": lens_loss, "top5_overlap": overlap}
    if "contribution" in want:
        out["contribution"] = dict(zip(("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine"),
                                       (sums["contribution"] / (B * T)).T.tolist()))
    if "sparsity" in want:
        out["sparsity"] = sparsity_scores(model, sums, B, T, below)
    out["seconds"] = {key: round(value, 3) for key, value in seconds.items()}
    return out


def sparsity_scores(model: GPT, sums: dict[str, Any], B: int, T: int, below: float) -> dict[str, Any]:
    """The measures of `sparsity`: weights, attention, and what GQA and MoE add to it.

    interaction_density is ours, for want of the paper's formula: the distinct key heads per query head, n_kv_head / n_head,
    times the share of the visible keys that a query effectively attends to (perplexity / visible keys).
    """
    c = model.config
    entropy, mass90, effective = (sums["attention"] / (B * (T - 1))).T.tolist()
    out = {"weights": weight_sparsity(model, below), "below": below,
           "attention": {"entropy": entropy, "keys_for_90_percent": mass90, "effective_keys": effective},
           "interaction_density": [share * c.n_kv_head / c.n_head for share in effective]}
    if c.n_experts:
        load = sums["load"] / (B * T)                                                         # (n, n_experts)
        out["experts"] = {"load": load.tolist(),
                          "entropy": (torch.special.entr(load).sum(-1) / math.log(max(c.n_experts, 2))).tolist(),
                          "never_used": (load == 0).double().mean(-1).tolist()}
    return out
