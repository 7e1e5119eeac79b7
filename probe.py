"""Which layers does a model use? Every layer-effectiveness experiment of the paper, in one command.

    python probe.py out/gqa_deep/ckpt.pt                              # a table, probe.json and figures
    python probe.py out/dense/ckpt.pt out/moe/ckpt.pt --out compare   # side by side
    python probe.py HuggingFaceTB/SmolLM2-135M --only causal,lens     # of the hub, or a folder
    python probe.py SmolLM2-135M --data text.txt                      # on any text
    python probe.py ckpt.pt --figures                                 # draw them again
    python probe.py ckpt.pt --drop 3,7 --save pruned.pt               # the same model without two blocks
    python probe.py ckpt.pt --tasks arc_easy,hellaswag                # also its accuracy on tasks
    python probe.py ckpt.pt --sample "def "                           # let it write
    python probe.py ckpt.pt --export my_model                         # as a Hugging Face folder
    torchrun --nproc-per-node=8 probe.py ckpt.pt                      # on 8 GPUs: each takes its share

Blocks count from 0: block l turns the stream h_l into h_{l+1}; h_0 is the embedding's output, h_n is
before the final norm. A micro-batch goes through the model once; every intervention starts from the
streams of that pass. Nothing in the model is changed or hooked: blocks are functions, recombined here.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import math
import os
import re
import sys
import textwrap
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from pydoc_data.topics import topics as PYTHON_TOPICS     # English that is wherever Python is
from typing import Any, Callable, Generator, Iterable, Iterator, NamedTuple, Sequence

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")     # torch reads it when it is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data import (Corpus, HFModel, Parser, check_finite, choose_device, copy_tokenizer,
                  decode, documents, encode, export, get_tokenizer, load_model, need, prune_hf, run,
                  same_tokenizer, save_checkpoint, write_json)
from model import (GPT, Block, Detail, UserError, check, cross_entropy, generate,
                   token_variance, wide)

TOKENS_AT_ONCE = 2048       # a micro-batch on a CPU: measured, what a block makes of it fits the cache
USEFUL = 1.1                # a layer is useful when its affine map multiplies the loss by more (paper)

Layer = Callable[[Tensor], Tensor]      # a block, or what stands in for one: (B, T, d) -> (B, T, d)
Map = tuple[Tensor, Tensor]             # W (d, d) and b (d,) of y = x W + b
Result = dict[str, Any]                 # what probe.json holds

# ---- what an experiment is, and what it sees -----------------------------------------------------
# An experiment is a generator. It asks for what it needs, adds up over micro-batches, divides, and
# returns its part of probe.json, in which one key is its name:
#     p = yield                     the next micro-batch, a Pass; None: there are no more
#     J = yield "jacobian", l       the Jacobian of block l, summed over the sample so far
#     g = yield "without", s        the streams without block s; the list is emptied at the next question
# What several ask for is made once and handed to all of them. So ask in this order: jacobian before
# without, l upwards.
# What it adds up over micro-batches is made by run.sums and added to in place. For torchrun's ranks
# take turns at the sequences: before the None these sums, and the Jacobians, become those of all ranks.

class Pass(NamedTuple):
    """A micro-batch and its one run through the model, from whose streams every intervention starts."""
    idx: Tensor                 # (B, T)
    h: list[Tensor]             # the streams h_0 .. h_n, each (B, T, d)
    details: list[Detail]       # what attention and FFN of each block added
    loss: float                 # -log p summed over the predictions, in nats
    heldout: bool               # is it of the half on which the held-out maps are judged?
    few: int                    # its first so many sequences are in the Jacobian's sample
    number: int                 # which micro-batch it is, from 0
    attention: list[Tensor]     # of each block `attention_sums`, (3,), if an experiment watches it

@dataclass
class Run:
    """A measurement: what all its experiments share."""
    model: GPT
    blocks: list[Block]
    tokens: Tensor              # (B, T)
    remove: Sequence[int]       # lengths of contiguous runs of blocks to remove
    sublayers: bool             # remove each attention and FFN alone as well?
    pairs: int                  # sampled pairs of blocks to swap; 0: all
    jacobian_samples: int       # sequences
    below: float                # weights below this x init_std count as sparse
    seed: int                   # of the sampled pairs
    progress: Callable[[str], None]
    # Each block's best affine map, fitted on all tokens and on the first half of the sequences, and the
    # last block's to the stream as `released` has it: what `passes` fits if an experiment wants it.
    maps: list[Map] = field(default_factory=list)
    half_maps: list[Map] = field(default_factory=list)
    recorded_map: Map | None = None
    # Each block's Jacobian, summed so far: (d, d); and what is in it, by micro-batch and block
    jacobians: dict[int, Tensor] = field(default_factory=dict)
    counted: set[tuple[int, int]] = field(default_factory=set)
    # Where the measurement is, and how long its stages took
    where: str = ""
    micro_batch: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    totals: list[Tensor] = field(default_factory=list)       # what `sums` has handed out

    def __post_init__(self) -> None:
        self.n, self.d = len(self.blocks), self.model.config.n_embd
        B, T = self.tokens.shape
        self.half = B // 2
        self.positions = B * T                                # a stream has so many tokens in all
        self.predictions = B * (T - 1)                        # and so many losses
        self.dense = not self.model.config.n_experts
        # This rank's sequences, and how many of them are of the first half and in the Jacobian's sample.
        # A rank without any takes the first, to ask and answer like the others, and counts it as nothing.
        rank, ranks = place_among_ranks()
        self.counts = rank < B
        self.mine = self.tokens[rank::ranks] if self.counts else self.tokens[:1]
        self.my_half = len(range(rank, self.half, ranks))
        self.my_jacobian_samples = len(range(rank, self.jacobian_samples, ranks))

    def sums(self, *shape: int) -> Tensor:
        """Zeros to add to in place, micro-batch by micro-batch: float64 on the CPU."""
        self.totals.append(torch.zeros(shape, dtype=torch.float64))
        return self.totals[-1]

    def make_whole(self, sums: Iterable[Tensor]) -> None:
        """Make of this rank's sums those of all ranks, in place."""
        for x in sums:
            if not self.counts:
                x.zero_()
            add_over_ranks(x)

    def tick(self) -> None:
        """Say where the measurement is; what takes long calls it now and then."""
        self.progress(f"{self.where}, {self.micro_batch}")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of what is done inside to `name`; a GPU's, where its results are waited
        for."""
        self.where = name
        self.tick()
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

def place_among_ranks() -> tuple[int, int]:
    """Which of torchrun's processes this is, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def add_over_ranks(x: Tensor) -> None:
    """Add to x, on the CPU, what the other ranks have of it."""
    if place_among_ranks()[1] > 1:
        dist.all_reduce(x)

Questions = Generator[Any, Any, dict[str, Any]]

class Experiment(NamedTuple):
    """One experiment in one place: how it is measured, and how its part of a result is shown."""
    measure: Callable[[Run], Questions]
    # Columns in the table of blocks: a name, the value of each block (None: not measured), its meaning.
    columns: Sequence[tuple[str, Callable[[Result], Sequence[float] | None], str]] = ()
    # Numbers for the whole model, by the name of their column.
    scores: dict[str, Callable[[Result], float]] = {}
    # The panel that shows one or several results, by label.
    figure: Callable[[dict[str, Result]], Panel] | None = None
    # Does it use the affine maps? They take another round through the tokens.
    fits: bool = False
    # Does it use p.attention? It takes T x T numbers per head.
    watches: bool = False

EXPERIMENTS: dict[str, Experiment] = {}

# Sums over the tokens of one micro-batch stay on its device: asking a GPU for each number would keep
# it waiting. `exact` takes them to the CPU together, where `Run.sums` adds them up in float64.

def exact(x: Tensor | list[Tensor]) -> Tensor:
    """A tensor, or several of one shape stacked, in float64 on the CPU: once per micro-batch and sum,
    not per intervention."""
    if isinstance(x, list):                       # with --device_map on several devices
        x = torch.stack([y.to(x[0].device) for y in x]) if x else torch.zeros(0)
    return x.cpu().double()

def finest(device: torch.device) -> torch.dtype:
    """float64, on a device that has it: Apple's GPUs have not."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32

def nll(model: GPT, x: Tensor, idx: Tensor, layers: Sequence[Layer] = ()) -> Tensor:
    """Sum over the B (T - 1) predictions of -log p in nats, (), when the stream x (B, T, d) goes on
    through the layers."""
    for layer in layers:
        x = layer(x)
    targets = idx[:, 1:]
    mean = cross_entropy(model.head, model.norm(x[:, :-1]), targets)
    return mean.to(finest(x.device)) * targets.numel()

def streams_of(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """The stream x (B, T, d) and what it becomes after each of the layers."""
    return list(accumulate(layers, lambda x, layer: layer(x), initial=x))

def perplexity_ratios(r: Result, losses: Sequence[float]) -> list[float]:
    """By how much the perplexity grows where the loss is one of these."""
    return [math.exp(min(loss - r["loss"], 700)) for loss in losses]

# ---- variance ------------------------------------------------------------------------------------
def variance(run: Run) -> Questions:
    """How large is the stream after the embedding and every block, and what do attention and FFN
    add?  (paper, probe 1)

    The mean over tokens of the unbiased variance over the d features.
    """
    streams, attn, ffn = run.sums(run.n + 1), run.sums(run.n), run.sums(run.n)
    while p := (yield):
        tokens = p.idx.numel()
        streams += exact([token_variance(x) for x in p.h]) * tokens
        attn += exact([token_variance(did.attn) for did in p.details]) * tokens
        ffn += exact([token_variance(did.ffn) for did in p.details]) * tokens
    of_streams = (streams / run.positions).tolist()
    growth = [after / before if before else math.nan for before, after in pairwise(of_streams)]
    return {"variance": of_streams, "attn_variance": attn / run.positions,
            "ffn_variance": ffn / run.positions, "variance_growth": growth}

def added_variances(r: Result) -> dict[str, Sequence[float]]:
    """The variance of the stream after each block, and of what joined it there."""
    lines = {"stream": r["variance"][1:], "attention adds": r.get("attn_variance"),
             "FFN adds": r.get("ffn_variance")}
    return {name: values for name, values in lines.items() if values is not None}

EXPERIMENTS["variance"] = Experiment(
    variance,
    columns=[("variance", lambda r: r["variance"][1:], "of the stream after the block"),
             ("growth", lambda r: r["variance_growth"], "of the variance in the block")],
    scores={"last var.": lambda r: r["variance"][-1]},
    figure=lambda results: curves(
        results, added_variances, "Variance of the stream after each block",
        "block (not shown: the embedding's output h_0)", "variance", scale="log"))

# ---- causal score --------------------------------------------------------------------------------
def causal(run: Run) -> Questions:
    """Skip block s; how much does the update of every later block l change?  (paper, probe 2)

    C[s, l] = sum |(h_{l+1} - h_l) - (g_{l+1} - g_l)| / sum |h_{l+1} - h_l| over tokens, g without
    block s: a ratio of means, not a mean of ratios. How the paper aggregates is not known;
    causal_mean is the mean over all s < l.
    """
    changed, update = run.sums(run.n, run.n), run.sums(run.n)
    while p := (yield):
        update += exact(update_norms(p.h))
        rows = []
        for s in range(run.n):
            g = yield "without", s
            rows.append(causal_row(p.h, g, s))
        changed += exact(rows)
    C = changed / update.clamp_min(1e-300)
    return {"causal": C, "causal_mean": C.sum() / max(1, run.n * (run.n - 1) // 2)}

def update_norms(streams: Sequence[Tensor]) -> list[Tensor]:
    """Norm of each step from one stream to the next, summed over tokens: n tensors ()."""
    steps = [wide(y - x) for x, y in pairwise(streams)]
    return [torch.linalg.vector_norm(step, dim=-1).sum() for step in steps]

def causal_row(h: list[Tensor], g: list[Tensor], s: int) -> Tensor:
    """The numerators of C[s, l] for the blocks l, 0 up to s: (n,). h, g: the streams with and
    without block s."""
    missing = [x - y for x, y in zip(h[s + 1:], g[s + 1:])]      # whose steps are the updates' changes
    row = wide(h[0].new_zeros(len(h) - 1))
    for l, norm in enumerate(update_norms(missing), s + 1):
        row[l] = norm
    return row

def later_means(C: Sequence[Sequence[float]]) -> list[float]:
    """The mean of C[s, l] over the later blocks l, of each s; nan for the last."""
    return [float(np.mean(row[s + 1:] or math.nan)) for s, row in enumerate(C)]

EXPERIMENTS["causal"] = Experiment(
    causal,
    columns=[("causal", lambda r: later_means(r["causal"]), "later updates without it")],
    scores={"causal": lambda r: r["causal_mean"]},
    figure=lambda results: heat(
        results, lambda r: r["causal"], "Causal score: how block l's update changes without block s",
        "later block l", "skipped block s", "change / update", empty=np.tri))

# ---- permutation score ---------------------------------------------------------------------------
def permutation(run: Run) -> Questions:
    """Swap blocks i and j; by what share of itself does the loss change?  (paper, probe 3)"""
    every_pair = list(combinations(range(run.n), 2))
    drawn = np.random.default_rng(run.seed).permutation(len(every_pair))[:run.pairs or None]
    chosen = [every_pair[k] for k in drawn]
    loss, swapped_losses = run.sums(), run.sums(len(chosen))
    while p := (yield):
        loss += p.loss
        losses = []
        for i, j in chosen:
            run.tick()
            losses.append(nll(run.model, p.h[i], p.idx, swapped(run.blocks, i, j)[i:]))
        swapped_losses += exact(losses)
    change = (swapped_losses / loss - 1).abs()
    P = torch.full((run.n, run.n), math.nan, dtype=torch.float64)        # nan: not sampled
    P.fill_diagonal_(0.0)
    for (i, j), x in zip(chosen, change):
        P[i, j] = P[j, i] = x
    out = {"permutation": P, "permutation_mean": change.sum() / max(1, len(chosen)),
           "permutation_pairs": len(chosen)}
    if 1 < len(chosen) < len(every_pair):
        out["permutation_standard_error"] = change.std() / math.sqrt(len(chosen))
    return out

def swapped(blocks: Sequence[Layer], i: int, j: int) -> list[Layer]:
    """Blocks i < j have changed places."""
    return [*blocks[:i], blocks[j], *blocks[i + 1:j], blocks[i], *blocks[j + 1:]]

def swap_means(P: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each block's swaps with the others, as far as they were sampled."""
    of_blocks = []
    for l, row in enumerate(P):
        others = [x for j, x in enumerate(row) if j != l and not math.isnan(x)]
        of_blocks.append(float(np.mean(others or math.nan)))
    return of_blocks

EXPERIMENTS["permutation"] = Experiment(
    permutation,
    columns=[("permuted", lambda r: swap_means(r["permutation"]), "loss change of its swaps")],
    scores={"permuted": lambda r: r["permutation_mean"]},
    figure=lambda results: heat(
        results, lambda r: r["permutation"],
        "Permutation score: how the loss changes when blocks i and j are swapped",
        "block j", "block i", "change of the loss / loss", empty=np.eye))

# ---- usefulness ----------------------------------------------------------------------------------
def usefulness(run: Run) -> Questions:
    """Replace a block by its best affine map: is the loss more than 1.1 times as large?  (paper,
    probe 4)

    Fitted and judged on all tokens, as in the paper; held out: fitted on the first half, judged on
    the second.
    """
    loss, mapped = run.sums(), run.sums(run.n)
    heldout_loss, heldout_mapped = run.sums(), run.sums(run.n)
    while p := (yield):
        loss += p.loss
        mapped += losses_with_maps(run, p, run.maps)
        if p.heldout:
            heldout_loss += p.loss
            heldout_mapped += losses_with_maps(run, p, run.half_maps)
    half = run.half * run.tokens.size(1)                                  # in tokens
    heldout_ratio = heldout_mapped / heldout_loss
    return {"usefulness": usefulness_scores(mapped / loss, run.positions, run.d),
            "usefulness_heldout": usefulness_scores(heldout_ratio, half, run.d)}

def losses_with_maps(run: Run, p: Pass, maps: Sequence[Map]) -> Tensor:
    """-log p summed over the predictions with each block in turn replaced by its affine map: (n,)."""
    losses = []
    for l, (W, b) in enumerate(maps):
        run.tick()
        x = p.h[l]
        losses.append(nll(run.model, x @ W + b, p.idx, run.blocks[l + 1:]))
    return exact(losses)

def usefulness_scores(ratio: Tensor, fitted_on: int, d: int) -> dict[str, Any]:
    """What the loss ratios (n,) of maps that were fitted on so many tokens come to."""
    return {"ratio": ratio, "score": (ratio > USEFUL).double().mean(),
            "mean_log_ratio": ratio.log().mean(), "loose_fit": fitted_on < 10 * (d + 1)}

def moments(x: Tensor, y: Tensor) -> Tensor:
    """All that the regression of y on (x, 1) needs, summed over tokens: (d + 1, d + 1 + d), float64."""
    x = F.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)                # (B T, d + 1): 1 for the bias
    return torch.cat((x.T @ x, x.T @ y.flatten(0, 1).double()), dim=1)

def add_moments(sums: Sequence[Tensor], streams: Sequence[Tensor]) -> None:
    """Add the moments of each step from one stream to the next to its sum, on the CPU."""
    for total, (x, y) in zip(sums, pairwise(streams), strict=True):
        total += moments(x, y).cpu()

def affine_map(moments: Tensor) -> Map:
    """The least-squares W (d, d) and b (d,) of y = x W + b from summed `moments`.

    Features are centred and scaled to unit variance, so badly scaled ones cost no accuracy, and
    directions without variance beyond rounding are left out, so rank-deficient ones do no harm.
    """
    d = len(moments) - 1
    mean = moments / moments[d, d]
    mean_x, mean_y = mean[d, :d], mean[d, d + 1:]
    xx, xy = mean[:d, :d], mean[:d, d + 1:]
    cov_xx = xx - torch.outer(mean_x, mean_x)
    cov_xy = xy - torch.outer(mean_x, mean_y)
    live = cov_xx.diagonal() > 1e-13 * xx.diagonal()                      # else constant but for rounding
    scale = torch.where(live, cov_xx.diagonal().clamp_min(1e-300).rsqrt(), 0.0)
    inverse = torch.linalg.pinv(scale[:, None] * cov_xx * scale, rtol=d * 1e-15, hermitian=True)
    W = scale[:, None] * (inverse @ (scale[:, None] * cov_xy))
    return W, mean_y - mean_x @ W

def affine_ratios(r: Result) -> dict[str, Sequence[float]]:
    """The loss ratios with each block's affine map, by what it was fitted to."""
    found = {"in-sample": "usefulness", "held out": "usefulness_heldout"}
    return {name: r[key]["ratio"] for name, key in found.items() if key in r}

EXPERIMENTS["usefulness"] = Experiment(
    usefulness,
    columns=[("affine", lambda r: r["usefulness"]["ratio"],
              "loss ratio with its best affine map instead"),
             ("unseen", lambda r: r["usefulness_heldout"]["ratio"],
              "the same, fitted on other sequences")],
    scores={"useful": lambda r: r["usefulness"]["score"],
            "log ratio": lambda r: r["usefulness"]["mean_log_ratio"],
            "heldout": lambda r: r["usefulness_heldout"]["mean_log_ratio"]},
    figure=lambda results: lollipops(
        results, affine_ratios, "Loss with an affine map in place of a block",
        "block", "loss with the map / loss", line=USEFUL, line_label=f"useful\nabove {USEFUL}"),
    fits=True)

# ---- the scores as the released scripts compute them ---------------------------------------------
def released(run: Run) -> Questions:
    """What the authors' scripts compute. They depart from the definitions in three ways, marked 1,
    2 and 3 below.

    1. Every model: the least-squares W of y = x W + b is copied into a Linear.weight untransposed,
    so x W^T + b runs. 2. Dense models: the last stream is recorded after the final norm, for the
    variance and the Jacobian as well. 3. Dense models: a skipped block leaves no stream in the
    record, so that the later g are read one place early.
    """
    n, last = run.n, run.n - 1
    loss, mapped, update = run.sums(), run.sums(n), run.sums(n)
    changed, variances = run.sums(n, n), run.sums(n + 1)
    J, J_recorded = {}, run.sums(run.d, run.d)
    while p := (yield):
        h = recorded(run, p.h)                                                    # 2
        loss += p.loss
        update += exact(update_norms(h))
        variances += exact([token_variance(x) for x in h]) * p.idx.numel()
        for l in range(n):
            J[l] = yield "jacobian", l
        if run.dense and p.few:
            def last_block(x: Tensor) -> Tensor:
                return run.model.norm(run.blocks[last](x))                        # 2
            J_recorded += exact(jacobian_sum(last_block, p.h[last][:p.few]))
        rows, losses = [], []
        for s in range(n):
            g = recorded(run, (yield "without", s))                               # 2
            if run.dense:
                del g[s + 1]                   # 3; the last block has none: C[s, last] = 0
            rows.append(causal_row(h, g, s))
            g.clear()                          # a list of its own: its streams must not outlive the question
            W, b = run.recorded_map if s == last else run.maps[s]                 # 2
            x = h[s]
            x = x @ W.T + b                                                       # 1
            losses.append(nll(run.model, x, p.idx, run.blocks[s + 1:]))
        changed += exact(rows)
        mapped += exact(losses)
        h.clear()                              # nor these the micro-batch
    if run.dense:
        J[last] = J_recorded
    return {"released": {"causal": changed / update.clamp_min(1e-300),
                         "usefulness": usefulness_scores(mapped / loss, run.positions, run.d),
                         "variance": variances / run.positions,
                         "jacobian": jacobian_scores(run, J)}}

def recorded(run: Run, streams: list[Tensor]) -> list[Tensor]:
    """The streams as the scripts record them: in dense models the last one is normed."""
    return [*streams[:-1], run.model.norm(streams[-1]) if run.dense else streams[-1]]

EXPERIMENTS["released"] = Experiment(
    released,
    columns=[("released", lambda r: r["released"]["usefulness"]["ratio"],
              "loss ratio as the released scripts do it")],
    scores={"rel.var.": lambda r: r["released"]["variance"][-1],
            "rel.useful": lambda r: r["released"]["usefulness"]["score"],
            "rel.ratio": lambda r: r["released"]["usefulness"]["mean_log_ratio"],
            "rel.causal": lambda r: mean_above_diagonal(r["released"]["causal"])},
    fits=True)

def mean_above_diagonal(C: Sequence[Sequence[float]]) -> float:
    """The mean of C[s, l] over all s < l; nan if there are none."""
    pairs = [row[l] for s, row in enumerate(C) for l in range(s + 1, len(row))]
    return float(np.mean(pairs or math.nan))

# ---- removal -------------------------------------------------------------------------------------
def removal(run: Run) -> Questions:
    """The loss without each block, each contiguous run of blocks, each attention and each FFN; and
    block influence.

    Block influence is 1 - cosine of a block's input and output, mean over tokens (ShortGPT, arXiv
    2403.03853).
    """
    losses = {str(length): run.sums(run.n - length + 1) for length in sorted(set(run.remove))}
    if run.sublayers:
        losses |= {"attn": run.sums(run.n), "ffn": run.sums(run.n)}
    influence = run.sums(run.n)
    while p := (yield):
        cosines = [F.cosine_similarity(wide(x), wide(y), dim=-1) for x, y in pairwise(p.h)]
        influence += exact([(1 - cosine).sum() for cosine in cosines])
        found = {what: [] for what in losses}
        for s in range(run.n):
            if 1 in run.remove:
                g = yield "without", s
                found["1"].append(nll(run.model, g[run.n], p.idx))
        for length in set(run.remove) - {1}:
            for s in range(run.n - length + 1):
                run.tick()
                found[str(length)].append(nll(run.model, p.h[s], p.idx, run.blocks[s + length:]))
        if run.sublayers:
            for only_ffn, only_attn in sublayers_alone(run, p):
                found["attn"].append(only_ffn)
                found["ffn"].append(only_attn)
        for what in losses:
            losses[what] += exact(found[what])
    return {"removal": {what: total / run.predictions for what, total in losses.items()},
            "block_influence": influence / run.positions}

def sublayers_alone(run: Run, p: Pass) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each block -log p summed over the predictions without its attention, and without its FFN."""
    for l, (block, x, did) in enumerate(zip(run.blocks, p.h, p.details)):
        run.tick()
        rest = run.blocks[l + 1:]
        yield (nll(run.model, x + block.ffn_output(x)[0], p.idx, rest),
               nll(run.model, x + did.attn, p.idx, rest))

def removed_runs(r: Result) -> dict[str, list[float]]:
    """The perplexity ratios without each run of blocks, by the run's length."""
    return {f"run of {length}": perplexity_ratios(r, losses)
            for length, losses in r["removal"].items() if length.isdigit()}

EXPERIMENTS["removal"] = Experiment(
    removal,
    columns=[("removed", lambda r: removed_runs(r).get("run of 1"), "perplexity ratio without it"),
             ("influence", lambda r: r["block_influence"], "1 - cosine of its input and output")],
    scores={"influence": lambda r: float(np.mean(r["block_influence"]))},
    figure=lambda results: curves(
        results, removed_runs, "How much the perplexity grows without a block or a run of blocks",
        "block, of a run the first", "growth of the perplexity", scale="percent"))

# ---- Jacobian ------------------------------------------------------------------------------------
def jacobian(run: Run) -> Questions:
    """How far is a block's mean Jacobian from the identity?  (paper, probe 5)

    J_l = d h_{l+1} / d h_l, summed over output positions, averaged over sequences and input
    positions.
    """
    J = {}
    while (yield):
        for l in range(run.n):
            J[l] = yield "jacobian", l
    return {"jacobian": jacobian_scores(run, J)}

def jacobian_sum(f: Layer, x: Tensor) -> Tensor:
    """J[a, b]: sum over sequences, input positions of d f_a / d x_b, f_a summed over output
    positions; x (B, T, d)."""
    rows = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = wide(f(x)).sum((0, 1))                                        # (d,)
        for y_a in y:       # a backward pass each: batching them gains nothing, they are bound by FLOPs
            gradient, = torch.autograd.grad(y_a, x, retain_graph=True)
            rows.append(gradient.sum((0, 1), dtype=finest(x.device)))
    return torch.stack(rows)

def jacobian_scores(run: Run, sums: dict[int, Tensor]) -> dict[str, list[float]]:
    """The scores of the blocks' Jacobians (d, d), by block, which were summed over the sample's
    sequences and positions."""
    positions = min(run.jacobian_samples, len(run.tokens)) * run.tokens.size(1)
    scores: dict[str, list[float]] = defaultdict(list)
    norm = torch.linalg.matrix_norm
    for l in range(run.n):
        J = sums[l] / positions
        d, diagonal = len(J), J.diagonal()
        off_diagonal = J - diagonal.diag()
        scores["deviation"].append(norm(J - torch.eye(d)).item() / d)
        scores["diagonal_mean"].append(diagonal.mean().item())
        scores["diagonal_std"].append(diagonal.std().item())
        scores["spectral"].append(norm(J, 2).item())
        scores["off_diagonal"].append(norm(off_diagonal).item() / math.sqrt(d * d - d))
    return dict(scores)

EXPERIMENTS["jacobian"] = Experiment(
    jacobian,
    columns=[("|J-I|/d", lambda r: r["jacobian"]["deviation"],
              "its Jacobian's distance from the identity")],
    scores={"|J-I|/d": lambda r: float(np.mean(r["jacobian"]["deviation"]))},
    figure=lambda results: curves(
        results, lambda r: {"": r["jacobian"]["deviation"]},
        "How far each block's mean Jacobian J is from the identity", "block",
        r"$\|J - I\|_F\,/\,d$", scale="log"))

# ---- what the streams say, and what blocks add ---------------------------------------------------
def lens(run: Run) -> Questions:
    """Read the answer off every stream, as if the model ended there.  (after arXiv 2505.13898)"""
    sums = run.sums(run.n + 1, 3)
    while p := (yield):
        sums += exact(lens_sums(run.model, p.h, p.idx))
    kl, loss, overlap = sums.T
    return {"lens": {"kl": kl / run.positions, "loss": loss / run.predictions,
                     "top5_overlap": overlap / run.positions}}

def lens_sums(model: GPT, streams: list[Tensor], idx: Tensor) -> Tensor:
    """(n + 1, 3), summed over tokens: KL(the model's output || the stream's), the stream's negative
    log-likelihood, and the share of the model's 5 likeliest tokens that are among the stream's 5
    likeliest. With a large vocabulary logits are large: of one sequence, three times."""
    def log_p(x: Tensor) -> Tensor:
        return wide(model.head(model.norm(x))).log_softmax(-1)           # (T, V)

    sums = torch.zeros(len(streams), 3, dtype=finest(idx.device), device=idx.device)
    for i, targets in enumerate(idx[:, 1:, None]):
        own = log_p(streams[-1][i])
        top = own.topk(min(5, own.size(-1))).indices
        for l, stream in enumerate(streams):
            sums[l] += lens_of(own, top, log_p(stream[i]), targets)
    return sums

def lens_of(own: Tensor, top: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """The three of `lens_sums` for a stream that is read as q; q is overwritten."""
    k = top.size(-1)
    loss = -q[:-1].gather(1, targets).sum()
    shared = (top[:, :, None] == q.topk(k).indices[:, None]).sum()
    kl = own.exp().mul_(q.neg_().add_(own)).sum()                        # of p (ln p - ln q)
    return torch.stack([kl, loss, shared.to(kl.dtype) / k])

EXPERIMENTS["lens"] = Experiment(
    lens,
    columns=[("lens KL", lambda r: r["lens"]["kl"][1:],
              "from the model's output to the one read after it")],
    figure=lambda results: curves(
        results, lambda r: {"": r["lens"]["kl"][1:]},
        "Lens: how far what the head reads after each block is from the model's output",
        "block (not shown: the embedding's output h_0)", "KL divergence (nats)"))

def contribution(run: Run) -> Questions:
    """How large is what attention and FFN add, and does it point where the stream points?  (after
    arXiv 2505.13898)"""
    sums = run.sums(run.n, 4)
    while p := (yield):
        sums += exact([contribution_sums(x, did) for x, did in zip(p.h, p.details)])
    names = ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")
    return {"contribution": dict(zip(names, (sums / run.positions).T))}

def contribution_sums(x: Tensor, did: Detail) -> Tensor:
    """A block's attention and FFN output f against the stream x it joins: ||f|| / ||x||, cosines;
    (4,), over tokens."""
    before_ffn = wide(x + did.attn)
    x, attn, ffn = wide(x), wide(did.attn), wide(did.ffn)
    return torch.stack([(attn.norm(dim=-1) / x.norm(dim=-1)).sum(),
                        (ffn.norm(dim=-1) / before_ffn.norm(dim=-1)).sum(),
                        F.cosine_similarity(x, attn, dim=-1).sum(),
                        F.cosine_similarity(before_ffn, ffn, dim=-1).sum()])

EXPERIMENTS["contribution"] = Experiment(
    contribution,
    columns=[("attn/x", lambda r: r["contribution"]["attn_ratio"],
              "attention's output over the stream"),
             ("ffn/x", lambda r: r["contribution"]["ffn_ratio"], "FFN's output over the stream")])

# ---- sparsity ------------------------------------------------------------------------------------
def sparsity(run: Run) -> Questions:
    """How sparse are weights, attention and experts?

    weights, per kind of matrix and layer: share of |w| < below x init_std, and the Hoyer measure (0
    dense, 1 one-hot). interaction_density is ours, for want of the paper's formula: the distinct
    key heads per query head, n_kv_head / n_head, times the share of the visible keys that a query
    effectively attends to (perplexity / visible keys).
    """
    c = run.model.config
    attention, load = run.sums(run.n, 3), run.sums(run.n, c.n_experts)
    while p := (yield):
        attention += exact(p.attention)
        if c.n_experts:
            load += exact([did.router.load for did in p.details]) * p.idx.numel()
    entropy, mass90, effective = (attention / run.predictions).T
    out = {"weights": weight_sparsity(run), "below": run.below,
           "attention": {"entropy": entropy, "keys_for_90_percent": mass90,
                         "effective_keys": effective},
           "interaction_density": effective * (c.n_kv_head / c.n_head)}
    if c.n_experts:
        load = load / run.positions
        out["experts"] = {"load": load, "never_used": (load == 0).double().mean(-1),
                          "entropy": torch.special.entr(load).sum(-1) / math.log(max(c.n_experts, 2))}
    return {"sparsity": out}

def weight_sparsity(run: Run) -> dict[str, dict[str, list[float]]]:
    """Of each kind of matrix: in every block the share of weights near zero, and the Hoyer measure."""
    weights: dict[str, Any] = defaultdict(lambda: {"below": [], "hoyer": []})
    for block in run.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                kind = weights[name.removesuffix(".weight")]
                w = w.to(finest(w.device)).abs()
                near_zero = (w < run.below * run.model.config.init_std).to(w.dtype)
                total, norm, below = exact([w.sum(), w.norm(), near_zero.mean()]).tolist()
                root, ratio = math.sqrt(w.numel()), total / max(norm, 1e-300)    # from 1 to root
                kind["below"].append(below)
                kind["hoyer"].append((root - ratio) / (root - 1))
    return dict(weights)

class SeenAttention(TorchFunctionMode):
    """Inside of this context, keeps what is given to scaled_dot_product_attention, call by call: the
    statistics are of the attention that the block really does, whatever a fork does before it."""
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

def attention_probabilities(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """What scaled_dot_product_attention, whose arguments these are, weighs the values by, and which
    keys are visible: for one sequence after the other, each (n_head, T, keys)."""
    for b in range(len(query)):
        q, k = wide(query[b]), wide(key[b])                               # (heads, T, head_dim)
        scores = q @ k.repeat_interleave(len(q) // len(k), dim=0).mT * (scale or q.size(-1) ** -0.5)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if is_causal:
            visible = visible.tril()
        if attn_mask is not None:
            mask = attn_mask.expand(len(query), *scores.shape)[b]
            if mask.dtype == torch.bool:
                visible = mask
            else:
                scores, visible = scores + mask, mask > -math.inf
        yield scores.masked_fill(~visible, -math.inf).softmax(-1), visible

def attention_sums(calls: Sequence[tuple[tuple, dict]]) -> Tensor:
    """How sparse is a block's attention, of which these are the calls? (3,), summed over tokens, a
    mean over the heads of all calls.

    Entropy relative to uniform over the visible keys; share of the visible keys that hold 90% of the
    mass; perplexity of the attention as a share of the visible keys. The first position sees one key
    only and is left out.
    """
    check(len(calls) > 0,
          "sparsity: this attention does not go through torch's scaled_dot_product_attention, so its "
          "probabilities are not seen: leave sparsity out of --only")
    sums = []
    for args, kwargs in calls:
        for p, visible in attention_probabilities(*args, **kwargs):      # one sequence at a time
            p = p[:, 1:]                                                  # (n_head, T - 1, keys)
            keys = visible[:, 1:].sum(-1).to(p.dtype)                     # (n_head, T - 1)
            entropy = torch.special.entr(p).sum(-1)                       # (n_head, T - 1)
            needed = (p.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
            relative = entropy / keys.log().clamp_min(1e-30)              # of one key: 0
            values = (relative, needed / keys, entropy.exp() / keys)
            sums.append(torch.stack([value.mean(0).sum() for value in values]))
    return torch.stack(sums).to(finest(sums[0].device)).sum(0) / len(calls)

EXPERIMENTS["sparsity"] = Experiment(
    sparsity,
    columns=[("attn.H", lambda r: r["sparsity"]["attention"]["entropy"],
              "entropy of its attention / uniform")],
    watches=True)

# ---- the whole measurement -----------------------------------------------------------------------
@torch.no_grad()
def probe(model: GPT, tokens: Tensor, experiments: Sequence[str] | None = None, *,
          blocks: Sequence[Block] | None = None, remove: Sequence[int] = (1,), sublayers: bool = True,
          pairs: int = 0, jacobian_samples: int | None = None, below: float = 0.1, seed: int = 0,
          progress: Callable[[str], None] = lambda line: None) -> Result:
    """Measure every layer of a model on tokens (B, T); returns what probe.json holds (see README).

    experiments: names, by default all. blocks: those to measure as a model of their own, by default
    all. jacobian_samples: sequences for the Jacobian, by default half of them. The rest: see `Run`.
    A UserError calls an argument by its flag on the command line. In a process group all ranks call
    it alike, and each returns the whole result.
    """
    names = list(EXPERIMENTS if experiments is None else experiments)
    if blocks is None:
        blocks = model.blocks
    if jacobian_samples is None:
        jacobian_samples = len(tokens) - len(tokens) // 2
    run = Run(model, list(blocks), tokens, remove, sublayers, pairs, jacobian_samples, below, seed,
              progress)
    check_run(run, names)
    running = {name: EXPERIMENTS[name].measure(run) for name in names}
    for experiment in running.values():
        next(experiment)                           # up to where it waits for a micro-batch
    fit = any(EXPERIMENTS[name].fits for name in names)
    watch = any(EXPERIMENTS[name].watches for name in names)
    loss = run.sums()
    for p in passes(run, fit, watch):
        loss += p.loss
        asked = {}                                 # of each experiment its question; None: it is done
        for name, experiment in running.items():
            with run.stage(name):
                asked[name] = ask(name, experiment, p)
        while pending := [question for question in asked.values() if question is not None]:
            what, l = min(pending, key=in_order)
            with run.stage(what):
                answer = SHARED[what](run, p, l)
            for name in [name for name, question in asked.items() if question == (what, l)]:
                with run.stage(name):
                    asked[name] = ask(name, running[name], answer)
            if what == "without":
                answer.clear()                     # experiments may keep the list, not its streams
        p.h.clear()
        p.details.clear()
    run.make_whole(run.totals)
    result = {"loss": plain(loss / run.predictions)}
    for name, experiment in running.items():
        part = plain(result_of(name, experiment))
        taken = part.keys() & {"seconds", *result}
        if taken:
            raise RuntimeError(f"{name} returns {', '.join(taken)}, which is there already")
        result |= part
    result["seconds"] = dict(run.seconds)
    return result

def check_run(run: Run, names: Sequence[str]) -> None:
    """UserError for what cannot be measured."""
    (B, T), limit, V = run.tokens.shape, run.model.config.block_size, run.model.config.vocab_size
    check(B >= 2 and 2 <= T <= limit,
          f"{B} sequences of {T} tokens: 2 or more of 2 to block_size={limit} are needed")
    low, high = run.tokens.min().item(), run.tokens.max().item()
    check(0 <= low and high < V, f"tokens {low} to {high}: the model has {V}, counted from 0")
    for name in names:
        check(name in EXPERIMENTS,
              f"--only {name}: no such experiment; there are {','.join(EXPERIMENTS)}")
    lengths = ",".join(map(str, run.remove))
    check(all(0 < length <= run.n for length in run.remove),
          f"--remove {lengths}: the model has {run.n} blocks")
    check(run.jacobian_samples > 0, "--jacobian_samples must be positive")
    check(min(run.pairs, run.below, run.seed) >= 0, "--pairs, --below and --seed must not be negative")

def passes(run: Run, fit: bool, watch: bool) -> Iterator[Pass]:
    """The micro-batches of this rank in order, each with its streams.

    fit: first fit the affine maps, which need all tokens before their first use. That round goes
    backwards, so that it ends with the pass that the second one begins with.
    watch: with the statistics of the blocks' attention.
    """
    B, T = run.mine.shape
    at_once = TOKENS_AT_ONCE
    if run.tokens.device.type != "cpu":            # measured on an H200: a narrow model does not fill it
        at_once *= max(2, 512 // run.d)
    cuts = {*range(0, B, max(1, at_once // T)), B}
    if fit:
        cuts.add(run.my_half)                      # so that no micro-batch is in both halves
    bounds = list(pairwise(sorted(cuts)))
    first = fit_maps(run, bounds, watch) if fit else None
    for number, (start, end) in enumerate(bounds):
        run.micro_batch = f"micro-batch {number + 1}/{len(bounds)}"
        idx = run.mine[start:end]
        with run.stage("streams"):
            if first is None:
                h, details, attention = forward(run, idx, watch)
            else:
                h, details, attention = first
                first = None
            loss = nll(run.model, h[run.n], idx).item()
        few = min(max(run.my_jacobian_samples - start, 0), len(idx))
        yield Pass(idx, h, details, loss, start >= run.my_half, few, number, attention)

Forward = tuple[list[Tensor], list[Detail], list[Tensor]]

def forward(run: Run, idx: Tensor, watch: bool) -> Forward:
    """The streams h_0 .. h_n of idx (B, T), each (B, T, d), what each block did on the way and, to
    watch it, the statistics of its attention."""
    streams, details, attention = [run.model.embed(idx)], [], []
    for block in run.blocks:
        with SeenAttention() if watch else contextlib.nullcontext() as seen:
            x, did = block(streams[-1], detail=True)
        streams.append(x)
        details.append(did)
        if watch:
            attention.append(attention_sums(seen.calls))
    return streams, details, attention

def fit_maps(run: Run, bounds: Sequence[tuple[int, int]], watch: bool) -> Forward:
    """Fit the affine maps of the run, the last micro-batch first; returns the first one's pass.

    The sums lie on the CPU, 2 n + 1 of them: 17.5 GB for d = 4096 and n = 32. Least squares need
    float64: where the device has none, the CPU multiplies as well.
    """
    weight = run.model.embed.weight
    device = weight.device if finest(weight.device) == torch.float64 else torch.device("cpu")
    nothing = torch.zeros(run.d + 1, 2 * run.d + 1, dtype=torch.float64)
    first_half = [nothing.clone() for _ in range(run.n)]
    second_half = [nothing.clone() for _ in range(run.n)]
    to_recorded = nothing.clone()

    def solved(summed: Tensor) -> Map:
        W, b = affine_map(summed.to(device))
        return W.to(weight.dtype).to(weight.device), b.to(weight.dtype).to(weight.device)

    for number, (start, end) in reversed(list(enumerate(bounds))):
        run.micro_batch = f"micro-batch {number + 1}/{len(bounds)}"
        with run.stage("affine maps"):
            h = details = attention = None         # of the one before: not both at once
            h, details, attention = forward(run, run.mine[start:end], watch and number == 0)
            half = second_half if start >= run.my_half else first_half
            add_moments(half, [x.to(device) for x in h])
            add_moments([to_recorded], [x.to(device) for x in recorded(run, h)[-2:]])
    run.make_whole([*first_half, *second_half, to_recorded])
    run.half_maps = [solved(first) for first in first_half]
    run.maps = [solved(first + second) for first, second in zip(first_half, second_half)]
    run.recorded_map = solved(to_recorded)
    return h, details, attention

def without(run: Run, p: Pass, s: int) -> list[Tensor]:
    """The streams of a micro-batch in the model without block s: up to h_s they are the same."""
    return p.h[:s + 1] + streams_of(run.blocks[s + 1:], p.h[s])

def jacobian_so_far(run: Run, p: Pass, l: int) -> Tensor:
    """The Jacobian of block l, summed over the sample up to this micro-batch: (d, d), kept once for
    all who ask."""
    if l not in run.jacobians:
        run.jacobians[l] = run.sums(run.d, run.d)
    if p.few and (p.number, l) not in run.counted:           # asked for twice, it still counts once
        run.counted.add((p.number, l))
        run.jacobians[l] += exact(jacobian_sum(run.blocks[l], p.h[l][:p.few]))
    return run.jacobians[l]

SHARED = {"jacobian": jacobian_so_far, "without": without}       # in the order in which to ask

def in_order(question: tuple[str, int]) -> tuple[int, int]:
    """A question's place among others."""
    what, l = question
    return list(SHARED).index(what), l

def ask(name: str, experiment: Questions, answer: Any) -> tuple[str, int] | None:
    """Give an experiment an answer, and take its next question."""
    try:
        question = experiment.send(answer)
    except StopIteration as e:
        raise RuntimeError(f"{name} ended at a micro-batch: its loop must end at None") from e
    if question is not None and question[0] not in SHARED:
        raise RuntimeError(f"{name} asks for {question}: there are {', '.join(SHARED)}")
    return question

def result_of(name: str, experiment: Questions) -> dict[str, Any]:
    """Tell an experiment that there are no more micro-batches, and take what it returns."""
    try:
        experiment.send(None)
    except StopIteration as end:
        if isinstance(end.value, dict) and name in end.value:
            return end.value
        raise RuntimeError(f"{name} must return a dict that has {name!r} among its keys") from None
    raise RuntimeError(f"{name} asks on after the last micro-batch: its loop must end at None")

def plain(x: Any) -> Any:
    """Tensors as numbers and lists, also inside of dicts and lists."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, (Tensor, np.ndarray, np.generic)) else x

# ---- dropping blocks -----------------------------------------------------------------------------
def cheapest_drops(model: GPT, tokens: Tensor, count: int,
                   progress: Callable[[str], None]) -> list[int]:
    """`count` blocks, each the one whose removal costs least after the ones before; in the order in
    which they go."""
    kept, gone = list(range(len(model.blocks))), []
    for number in range(1, count + 1):
        def say(line: str) -> None:
            progress(f"choosing block {number} of {count} to drop: {line}")
        blocks = [model.blocks[l] for l in kept]
        r = probe(model, tokens, ["removal"], blocks=blocks, sublayers=False, progress=say)
        gone.append(kept.pop(int(np.argmin(r["removal"]["1"]))))
    return gone

def without_blocks(saved: dict[str, Any], drop: Sequence[int]) -> dict[str, Any]:
    """The checkpoint `saved` without the blocks `drop`, weights only: train.py --init_from and
    probe.py take it."""
    settings = saved["settings"]
    n_layer = settings["n_layer"]
    kept = [l for l in range(n_layer) if l not in drop]
    weights = {name: w.clone() for name, w in saved["model"].items()
               if not name.startswith("blocks.")}
    for new, l in enumerate(kept):
        for name, w in saved["model"].items():
            if not name.startswith(f"blocks.{l}."):
                continue
            factor = 1.0
            scaled = name.endswith((".attn_norm.weight", ".ffn_norm.weight"))
            if settings.get("norm") == "lns" and scaled:     # by the root of the block's number, which changes
                factor = math.sqrt((new + 1) / (l + 1))
            weights[name.replace(f".{l}.", f".{new}.", 1)] = w * factor
    numbers = saved.get("kept", range(n_layer))              # of the blocks, before the first one went
    return {"model": weights, "settings": {**settings, "n_layer": len(kept)},
            "step": saved.get("step", 0), "tokenizer": saved["tokenizer"],
            "kept": [numbers[l] for l in kept]}

# ---- downstream tasks, by lm-evaluation-harness --------------------------------------------------
def run_tasks(model: GPT | HFModel, tokenizer: str, names: Sequence[str], folder: str | None,
              progress: Callable[[str], None]) -> dict[str, Any]:
    """Scores by lm-evaluation-harness: {task: {"acc": .., "acc_stderr": .., "n": questions}, ..}.

    folder: a folder with further tasks, one YAML file each. "average" is the mean over tasks of
    acc_norm, or of acc where a task has no acc_norm.
    """
    need("lm_eval", "--tasks")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)            # reads thousands of files: 10 s
    unknown = sorted(set(names) - set(manager.all_tasks))
    check(not unknown, f"--tasks: there is no {', '.join(unknown)}: `lm_eval ls tasks` lists those "
                       "that there are, --task_folder DIR adds others")
    found = simple_evaluate(make_scorer(model, tokenizer, progress), tasks=list(names),
                            task_manager=manager, log_samples=False)
    if found is None:                                         # it tells the first rank alone
        return {}
    out: dict[str, Any] = {}
    for name, metrics in found["results"].items():
        out[name] = {key.split(",")[0]: value for key, value in metrics.items()
                     if isinstance(value, float)}
        if name in found["n-samples"]:
            out[name]["n"] = found["n-samples"][name]["effective"]
    primary = [(r.get("acc_norm", r.get("acc")), r.get("acc_norm_stderr", r.get("acc_stderr", 0.0)))
               for r in out.values() if "n" in r and "acc" in r]
    if primary:
        values, errors = zip(*primary)
        out["average"] = {"acc": sum(values) / len(values),
                          "acc_stderr": math.hypot(*errors) / len(errors)}
    return out

def make_scorer(model: GPT | HFModel, tokenizer: str, progress: Callable[[str], None]) -> Any:
    """A model of lm-evaluation-harness that scores our forward pass, and so also a fork's."""
    from lm_eval.api.model import TemplateLM
    enc = get_tokenizer(tokenizer)
    end = enc.eot_token

    class Scorer(TemplateLM):
        eot_token_id = end
        prefix_token_id = getattr(enc, "bos", None) or end     # what an empty context consists of

        def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                       **kwargs: Any) -> list[int]:
            ids = encode(tokenizer, string)
            return ids if add_special_tokens is False else [*getattr(enc, "start", []), *ids]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [tuple(pair) for _, *pair in requests], progress)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise UserError("--tasks: one of them lets the model write, or scores whole documents; "
                            "here are only tasks that compare given answers")

        loglikelihood_rolling = generate_until
    return Scorer()

@torch.no_grad()
def loglikelihoods(model: GPT | HFModel, pairs: Sequence[tuple[list[int], list[int]]],
                   progress: Callable[[str], None] = lambda line: None) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats for each pair of token lists, and whether every token of
    the continuation is the most likely one.

    A pair that exceeds the model's context is cut on the left. Batches hold pairs of similar length,
    padded on the right. No token sees the ones after it, so the padding needs no mask. Ranks take
    turns at the batches.
    """
    rows = [(context + continuation)[-model.context - 1:] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    device = next(iter(model.parameters())).device
    at_once = TOKENS_AT_ONCE // 2 if device.type == "cpu" else 2 * TOKENS_AT_ONCE
    rank, ranks = place_among_ranks()
    out = torch.zeros(len(rows), 2, dtype=torch.float64)       # log p, tokens that are not likeliest
    start = number = 0
    while start < len(order):
        longest = len(rows[order[start]]) - 1                  # the last token is only predicted
        batch = order[start:start + max(1, at_once // longest)]
        start, number = start + len(batch), number + 1
        if number % ranks != rank:
            continue
        progress(f"tasks, {len(order) - start} of {len(order)} requests to go")
        idx = torch.tensor([rows[i][:-1] + [0] * (longest + 1 - len(rows[i])) for i in batch])
        asked = [(b, place - 1, rows[i][place], i) for b, i in enumerate(batch)
                 for place in range(max(1, len(rows[i]) - len(pairs[i][1])), len(rows[i]))]
        b, place, token, request = torch.tensor(asked).T
        logits = wide(logits_at(model, idx.to(device), b.to(device), place.to(device)))   # (N, V)
        nats = -F.cross_entropy(logits, token.to(device), reduction="none")
        missed = logits.argmax(-1) != token.to(device)
        out.index_add_(0, request, torch.stack((nats.double(), missed.double()), dim=1).cpu())
    add_over_ranks(out)
    return [(value, wrong == 0) for value, wrong in out.tolist()]

def logits_at(model: GPT | HFModel, idx: Tensor, b: Tensor, place: Tensor) -> Tensor:
    """The logits (N, V) at N places (b, place) of the sequences idx (B, T)."""
    if isinstance(model, HFModel):
        return model.inner(idx, use_cache=False).logits[b, place]
    x = model.embed(idx)
    for block in model.blocks:
        x = block(x)
    return model.logits(x[b, place][None])[0]

# ---- what is shown -------------------------------------------------------------------------------
def measured(r: Result) -> list[Experiment]:
    """The experiments of which a result has a part."""
    return [experiment for name, experiment in EXPERIMENTS.items() if name in r]

Columns = list[tuple[str, Sequence[float], str]]     # of each: name, value of each block, meaning
COLUMNS_AT_ONCE = 10                                 # of 10 characters each: 105 a line

def block_table(r: Result, n: int) -> str:
    """One line per block, in as many tables as keep them short, and what their columns mean.

    The columns of one experiment are in one table.
    """
    tables: list[Columns] = [[]]
    for experiment in measured(r):
        found = [(name, values_of(r), meaning) for name, values_of, meaning in experiment.columns]
        columns = [column for column in found if column[1] is not None]
        if len(tables[-1]) + len(columns) > COLUMNS_AT_ONCE:
            tables.append([])
        tables[-1] += columns
    return "\n\n".join(lay_out(columns, n) for columns in tables if columns)

def lay_out(columns: Columns, n: int) -> str:
    """One table of n blocks, its columns' meanings below."""
    header, rows = "block", [f"{l:5d}" for l in range(n)]
    for name, values, _ in columns:
        header += f"{name:>10}"
        cells = ["-" if math.isnan(value) else f"{value:.4g}" for value in values]
        rows = [row + f" {cell:>9}" for row, cell in zip(rows, cells, strict=True)]
    meanings = "; ".join(f"{name}: {meaning}" for name, _, meaning in columns)
    return "\n".join([header, *rows, *textwrap.wrap(meanings, 120)])

def score_names() -> list[str]:
    """The columns of `scores`, in order."""
    names = ["loss"]
    for experiment in EXPERIMENTS.values():
        names += experiment.scores
    return [*names, "accuracy"]

def scores(r: Result) -> dict[str, float]:
    """The numbers for the whole model in a result, by column."""
    found = {"loss": r["loss"]} if "loss" in r else {}
    for experiment in measured(r):
        found |= {name: float(score(r)) for name, score in experiment.scores.items()}
    if "average" in r.get("tasks", {}):
        found["accuracy"] = r["tasks"]["average"]["acc"]
    return found

def score_table(results: dict[str, Result]) -> str:
    """One line per checkpoint, of what was measured of all of them."""
    rows = {label: scores(r) for label, r in results.items()}
    width = max(map(len, results))
    columns = [name for name in score_names() if all(name in row for row in rows.values())]
    tables = []
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        some = columns[start:start + COLUMNS_AT_ONCE]
        lines = [" " * width + "".join(f"{name:>11}" for name in some)]
        for label, row in rows.items():
            lines.append(f"{label:{width}}" + "".join(f" {row[name]:10.4f}" for name in some))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)

def remarks(r: Result, path: str) -> Iterator[str]:
    """What to know beside the scores of a model, a line each."""
    if "permutation_standard_error" in r:
        mean, error = r["permutation_mean"], r["permutation_standard_error"]
        yield (f"permutation score {mean:.4f} +- {error:.4f}, "
               f"the mean over {r['permutation_pairs']} sampled pairs")
    for key in ("usefulness", "usefulness_heldout"):
        if key in r and r[key]["loose_fit"]:
            yield (f"{key} comes from a loose fit, to fewer than 10 (d + 1) tokens: "
                   "give more --samples")
    for length, losses in r.get("removal", {}).items():
        if length.isdigit() and len(losses) > 1:                   # of one run only: all blocks
            s = int(np.argmin(losses))
            ratio = min(perplexity_ratios(r, losses))
            blocks = ",".join(map(str, range(s, s + int(length))))
            yield (f"cheapest run of {length}: blocks {blocks}, perplexity x{ratio:.3f}   "
                   f"python probe.py {path} --drop {blocks} --save pruned.pt")

CHEAP = 1.1                 # what multiplies the perplexity by less is called cheap

def verdict(r: Result) -> str:
    """Two sentences: which blocks do most; which could go, and what that costs.

    By the perplexity without each block, else with its affine map instead; empty where neither was
    measured, or there is one block.
    """
    if "1" in r.get("removal", {}):
        losses, change, could = r["removal"]["1"], "losing", "go"
    elif "usefulness" in r:
        losses = [r["loss"] * ratio for ratio in r["usefulness"]["ratio"]]
        change, could = "an affine map instead of", "be an affine map"
    else:
        return ""
    n, ratios = len(losses), perplexity_ratios(r, losses)
    if n < 2:
        return ""
    *_, least = ranked = sorted(range(n), key=lambda l: -ratios[l])
    most = ranked[:max(1, min(3, n // 2))]
    blocks, one = ("blocks", "one of them") if len(most) > 1 else ("block", "it")
    costs = listed([f"{ratios[l]:.4g}" for l in most])
    first = (f"Most is done by {blocks} {listed(most)}: {change} {one} multiplies the perplexity "
             f"by {costs}.")
    if ratios[least] < CHEAP:
        second = f"Block {least} could {could}, for {ratios[least]:.4g} times the perplexity"
    else:
        second = (f"None could {could} cheaply: block {least} costs least, "
                  f"{ratios[least]:.4g} times the perplexity")
    return f"{first} {second}{longest_cheap_run(r)}."

def longest_cheap_run(r: Result) -> str:
    """The longest of the runs of several blocks that were removed and is cheap, and its cost."""
    for length in sorted((int(key) for key in r.get("removal", {}) if key.isdigit()), reverse=True):
        ratios = perplexity_ratios(r, r["removal"][str(length)])
        s = int(np.argmin(ratios))
        if 1 < length and len(ratios) > 1 and ratios[s] < CHEAP:
            return f"; blocks {s} to {s + length - 1} together for {ratios[s]:.4g} times"
    return ""

def listed(things: Sequence[Any]) -> str:
    """a, b and c."""
    *others, last = map(str, things)
    return f"{', '.join(others)} and {last}" if others else last

def task_table(tasks: dict[str, dict[str, Any]]) -> str:
    """A line per task: its metrics with standard errors, and how many questions it has."""
    width = max(map(len, tasks))
    lines = []
    for name, r in tasks.items():
        cells = [f"{metric} {value:.3f} +- {r.get(f'{metric}_stderr', math.nan):.3f}"
                 for metric, value in r.items() if metric != "n" and not metric.endswith("_stderr")]
        if "n" in r:
            cells.append(f"{r['n']} questions")
        lines.append(f"{name:{width}}  {'   '.join(cells)}")
    return "\n".join(lines)

def say_without_figures() -> None:
    """Say before the work that there will be no figures, if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no figures without matplotlib: pip install matplotlib", file=sys.stderr, flush=True)

# A panel is drawn by one function, onto axes that it is given: `picture` puts one on a page, or many.
class Panel(NamedTuple):
    """A drawing that has no place yet."""
    title: str
    draw: Callable[[list[Any]], None]       # onto so many axes
    count: int = 1

PAGE = ("variance", "usefulness", "removal", "lens", "causal", "permutation")    # of probe.png
HEADLINES = {"loss", "causal", "permuted", "useful", "accuracy"}                  # its scores
IN_FULL = {"permuted": "permutation", "useful": "usefulness", "log ratio": "mean log ratio",
           "heldout": "held out", "last var.": "last variance", "influence": "mean block influence"}
# Told apart by all eyes (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = [{"linestyle": style} for style in ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))]
POINTS = [{"linestyle": "", "marker": "o", "markersize": 4, "markerfacecolor": face}
          for face in (None, "white")]
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.2}

def draw(results: dict[str, Result], out: Path) -> str:
    """The figure of each experiment that all results have, and probe.png with those of PAGE, as PNG
    and SVG in the folder `out`. Says where they are; empty where there are none."""
    try:
        import matplotlib
    except ImportError:
        return ""
    names = [name for name, experiment in EXPERIMENTS.items()
             if experiment.figure and all(name in r for r in results.values())]
    pictures = {name: [name] for name in names}
    of_page = [name for name in PAGE if name in names]
    if of_page:
        pictures["probe"] = of_page
    with matplotlib.rc_context(STYLE):
        for file, shown in pictures.items():
            save_figure(picture(results, shown), out / file)
    on_a_page = f", on one page in {out / 'probe.png'}" if of_page else ""
    return f"figures in {out}{on_a_page}" if names else ""

def save_figure(fig: Any, path: Path) -> None:
    """Save a figure of matplotlib as path.png and path.svg."""
    fig.savefig(f"{path}.png", dpi=150)
    fig.set_layout_engine("none")       # its parts have their places: half of the time is finding them
    fig.savefig(f"{path}.svg", dpi=150)

def picture(results: dict[str, Result], names: Sequence[str]) -> Any:
    """The panels of these experiments under one heading, in a figure that is 8 inches wide: two in
    a row, one that has several axes in a row of its own."""
    from matplotlib.figure import Figure
    panels = [EXPERIMENTS[name].figure(results) for name in names]
    single = [panel for panel in panels if panel.count == 1]
    rows = [single[i:i + 2] for i in range(0, len(single), 2)]
    rows += [[panel] for panel in panels if panel.count > 1]
    heights = [2.9 * math.ceil(row[0].count / 3) for row in rows]
    heading = heading_of(results, names)
    room = 0.16 * sum(line.count("\n") + 1 for line in heading) + 0.6
    fig = Figure(figsize=(8, sum(heights) + room), layout="constrained")
    if len(results) > 1 and single:              # then the colors tell the results
        colors = [*in_turn(COLORS, len(results)), "none"]
        fig.legend(handles=line_samples(heading, [{"color": color} for color in colors]),
                   loc="outside upper center")
    else:
        fig.suptitle("\n".join(heading), fontsize=9)
    strips = fig.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, row in zip(strips, rows):
        for place, panel in zip(strip.subfigures(1, len(row), squeeze=False)[0], row):
            place.suptitle(textwrap.fill(panel.title, 92 // len(row)), weight="bold", fontsize=9)
            across = min(panel.count, 3)
            axes = list(place.subplots(math.ceil(panel.count / 3), across, squeeze=False).flat)
            for ax in axes[panel.count:]:
                ax.set_visible(False)
            panel.draw(axes[:panel.count])
    return fig

def in_turn(things: Sequence[Any], count: int) -> list[Any]:
    """So many of the things, from the first again after the last."""
    return [things[i % len(things)] for i in range(count)]

def line_samples(labels: Sequence[str], looks: Sequence[dict[str, Any]]) -> list[Any]:
    """Entries of a legend."""
    from matplotlib.lines import Line2D
    return [Line2D([], [], label=label, **look) for label, look in zip(labels, looks)]

def heading_of(results: dict[str, Result], names: Sequence[str]) -> list[str]:
    """What was measured and what it comes to, a line per result, and on what. Of one experiment all
    its scores, of several the HEADLINES."""
    columns = {"loss", *EXPERIMENTS[names[0]].scores} if len(names) == 1 else HEADLINES
    lines, tokens = [], []
    for label, r in results.items():
        ran, said = r.get("run", {}), []
        if "settings" in ran:
            said = settings_of(ran["settings"])
        if "tokens" in ran:
            tokens.append(f"{ran['samples']} x {ran['length']} tokens of {ran['tokens']}")
        found = {column: value for column, value in scores(r).items() if column in columns}
        said += [f"{IN_FULL.get(column, column)} {value:.4g}" for column, value in found.items()]
        lines.append(f"{label}: {', '.join(said)}")
    if tokens:
        lines.append(f"on {listed(dict.fromkeys(tokens))}")
    return [textwrap.fill(line, 112) for line in lines]

def settings_of(c: dict[str, Any]) -> list[str]:
    """A model's size, and what makes it another than the plain dense one."""
    said = [f"{c['n_layer']} layers {c['n_embd']} wide"]
    if c["n_kv_head"] != c["n_head"]:
        said.append(f"GQA {c['n_head']}:{c['n_kv_head']}")
    if c["n_experts"]:
        said.append(f"{c['n_experts']} experts, top {c['top_k']}")
    if c["norm"] != "pre":
        said.append(f"norm {c['norm']}")
    return said

Named = Callable[[Result], dict[str, Sequence[float]]]      # a value per block, by name

def curves(results: dict[str, Result], lines_of: Named, title: str, xlabel: str, ylabel: str,
           scale: str = "linear") -> Panel:
    """The lines of all results.

    scale: linear; log; percent, where values are ratios and their growth is drawn, up to 1% linear
    and beyond that logarithmic.
    """
    def onto(axes: list[Any]) -> None:
        ax = axes[0]
        for values, color, look in in_looks(ax, results, lines_of, LINES):
            shown = np.minimum(values, 1e9)
            if scale == "percent":
                shown = 100 * (shown - 1)
            ax.plot(shown, color=color, marker="o", markersize=3, **look)
        ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if scale == "log" else "linear")
        if scale == "percent":
            shown = np.concatenate([line.get_ydata() for line in ax.lines])
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set_yscale("symlog", linthresh=1)         # which shows as much below 0 as above
            ax.set_ylim(2 * min(np.nanmin(shown), 0) - 0.3, 2 * max(np.nanmax(shown), 0) + 0.3)
            ax.yaxis.set_major_formatter(lambda x, _: f"{x:+,.0f}%" if x else "0%")
    return Panel(title, onto)

def in_looks(ax: Any, results: dict[str, Result], values_of: Named,
             looks: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, str, dict[str, Any]]]:
    """The values of each result and name, with the color and the look to draw them in. The look tells
    the name, the color the result (see the heading) or, where there is one, again the name."""
    found = [values_of(r) for r in results.values()]
    names = list(dict.fromkeys(name for values in found for name in values))
    several = len(results) > 1
    colors = in_turn(COLORS, max(len(found), len(names)))
    if len(names) > 1:                           # below the axes: curves may be anywhere above
        own = [{"color": "gray" if several else color} for color in colors]
        samples = line_samples(names, [a | b for a, b in zip(in_turn(looks, len(names)), own)])
        ax.figure.legend(handles=samples, loc="outside lower center", ncols=3, columnspacing=1.2)
    # Ticks at whole blocks only, and none where there is no block
    ax.set_xlim(-0.5, max(len(x) for values in found for x in values.values()) - 0.5)
    ax.locator_params("x", integer=True)
    for k, values in enumerate(found):
        for name, x in values.items():
            i = names.index(name)
            yield np.array(x, dtype=float), colors[k if several else i], looks[i % len(looks)]

def lollipops(results: dict[str, Result], ratios_of: Named, title: str, xlabel: str, ylabel: str,
              line: float, line_label: str) -> Panel:
    """Ratios of all results as points on stems that begin at 1, and a line to compare them with. A
    few that are far above the others are arrows at the rim, with their values."""
    def onto(axes: list[Any]) -> None:
        ax, shift = axes[0], 0.7 / len(results)
        drawn = list(in_looks(ax, results, ratios_of, POINTS))
        rim = rim_of(np.concatenate([ratios for ratios, _, _ in drawn]), line)
        above: Counter[int] = Counter()          # how many texts there are above each block
        for number, (ratios, color, look) in enumerate(drawn):
            result = number * len(results) // len(drawn)
            x = np.arange(len(ratios)) + shift * (result - (len(results) - 1) / 2)
            over, shown = ratios > rim, np.minimum(ratios, rim)
            ax.vlines(x, 1, shown, color=color, linewidth=1, zorder=1)
            ax.plot(x[~over], shown[~over], color=color, **look)
            ax.plot(x[over], shown[over], color=color, **look | {"marker": "^"})
            for l in np.flatnonzero(over):
                ax.annotate(f"{ratios[l]:.3g}", (x[l], rim), color=color, fontsize=7,
                            xytext=(0, 5 + 8 * above[l]), textcoords="offset points")
                above[l] += 1
        ax.axhline(1, color="black", linewidth=0.5)
        ax.axhline(line, color="black", linestyle="--", linewidth=1)
        ax.annotate(line_label, (1, line), xycoords=("axes fraction", "data"), fontsize=8,
                    va="center", xytext=(3, 0), textcoords="offset points")
        ax.margins(y=0.1)                        # so that neither line lies on the frame
        ax.set(xlabel=xlabel, ylabel=ylabel)
    return Panel(title, onto)

def rim_of(ratios: np.ndarray, line: float) -> float:
    """Where to end an axis of ratios: most of them and the line are below, what is far above would
    flatten them."""
    usual = float(np.nanquantile(ratios, 0.85))
    return 1 + 3 * max(usual - 1, line - 1)

def heat(results: dict[str, Result], matrix_of: Callable[[Result], Sequence[Sequence[float]]],
         title: str, xlabel: str, ylabel: str, unit: str,
         empty: Callable[[int], np.ndarray]) -> Panel:
    """A heat map per result, all on one scale, which is logarithmic and at most three decades long.

    empty: what is 1 where an (n, n) matrix has nothing to show, np.eye or np.tri. Elsewhere nan is
    what was not sampled, and hatched.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    def onto(axes: list[Any]) -> None:
        maps = {label: np.array(matrix_of(r), dtype=float) for label, r in results.items()}
        blank = {label: empty(len(a)).astype(bool) for label, a in maps.items()}
        values = np.concatenate([a[~blank[label]] for label, a in maps.items()])
        high = np.nanmax(values, initial=0) or 1.0
        lowest = np.nanmin(values, initial=high)
        low = min(max(lowest, high / 1000), high / 2)
        for ax, (label, a) in zip(axes, maps.items()):
            shown = np.where(blank[label], np.nan, np.maximum(a, low))
            image = ax.imshow(shown, norm=LogNorm(low, high), aspect="auto")
            ax.set(xlabel=xlabel, ylabel=ylabel, title=textwrap.fill(label, 26) if len(maps) > 1 else "")
            ax.locator_params("both", integer=True)
            hatch(ax, np.isnan(a) & ~blank[label])
        axes[0].figure.colorbar(image, ax=axes, label=f"{unit} (log scale)", format="%g",
                                ticks=LogLocator(subs=(1, 2, 5)),
                                extend="min" if lowest < low else "neither")
    return Panel(title, onto, len(results))

def hatch(ax: Any, missing: np.ndarray) -> None:
    """Mark the pairs (n, n) of a heat map that were not sampled."""
    from matplotlib.colors import ListedColormap
    if missing.any():
        edges = np.arange(len(missing) + 1) - 0.5
        ax.pcolor(edges, edges, np.ma.array(missing, mask=~missing), hatch="////",
                  cmap=ListedColormap(["0.9"]), edgecolor="0.6", linewidth=0)
        ax.set_xlabel(f"{ax.get_xlabel()} (hatched: not sampled)")

# ---- the command line ----------------------------------------------------------------------------
# What the command does, and what it makes use of then: whatever else is given is refused.
USES = {"measure": "only data samples length tokens seed pairs remove jacobian_samples below tasks task_folder out "
                   "device dtype tokenizer device_map",
        "drop": "save data samples length tokens seed device dtype tokenizer device_map",
        "sample": "new_tokens temperature top_k seed device dtype tokenizer device_map",
        "export": "tokenizer",
        "figures": "out"}

def read_tokens(args: Any, model: GPT, saved: dict[str, Any]) -> tuple[Tensor, str]:
    """The sequences to probe on, (B, T) int64, and where they are from."""
    device, limit = model.embed.weight.device, model.config.block_size
    if args.tokens:
        return torch.from_numpy(read_array(args.tokens)).to(device), args.tokens
    T = args.length or min(512, limit)
    check(2 <= T <= limit, f"--length {T}: must be 2 to the model's block_size={limit}")
    source, tokenizer = args.data or saved["settings"].get("data"), saved["tokenizer"]
    if source is None:
        n, read = text_windows(PYTHON_TOPICS.values(), tokenizer, T)
        origin = "Python's documentation (another text: --data)"
    elif Path(source).is_file():
        n, read = text_windows(documents(source), tokenizer, T)
        origin = source
    else:
        n, read = corpus_windows(source, tokenizer, T)
        origin = f"{source} (validation)"
    chosen = np.random.default_rng(args.seed).permutation(n)[:max(args.samples, 0)]
    rows = [read(i) for i in np.sort(chosen).tolist()]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, T)).to(device), origin

def read_array(file: str) -> np.ndarray:
    """The token ids (B, T) of a .npy file, int64."""
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"--tokens {file}: no readable .npy file ({e})") from e
    check(isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "iu",
          f"--tokens {file}: it must hold one array of integers of shape (B, T)")
    return array.astype(np.int64)

Windows = tuple[int, Callable[[int], np.ndarray]]      # how many, and the T tokens of each by number

def text_windows(texts: Iterable[str], tokenizer: str, T: int) -> Windows:
    """The windows of texts, one after the other with an end of text between them."""
    ids, end = [], get_tokenizer(tokenizer).eot_token
    for text in texts:
        ids += [*encode(tokenizer, text), end]
    tokens = np.array(ids)
    return max(len(ids) - 1, 0) // T, lambda i: tokens[i * T:(i + 1) * T]

def corpus_windows(folder: str, tokenizer: str, T: int) -> Windows:
    """The windows of the validation split of a prepared corpus."""
    corpus = Corpus(folder)
    check(same_tokenizer(corpus.tokenizer, tokenizer),
          f"{folder} has {corpus.tokenizer!r} tokens, the model knows {tokenizer!r}: "
          "give another --data")
    return corpus.n_windows("val", T), lambda i: corpus.read("val", i * T, T)

def make_progress() -> Callable[[str], None]:
    """A line on stderr for what takes longer than a few seconds: live on a terminal, else every
    half minute; of several ranks the first one's. After the first micro-batch it says how long all
    of them take: rather less than that, see `Pass.few`."""
    if place_among_ranks()[0] > 0:
        return lambda line: None
    begun, last = time.perf_counter(), -math.inf
    live = sys.stderr.isatty()
    first, in_all = begun, ""                      # first: when the first micro-batch began

    def progress(line: str) -> None:
        nonlocal last, first, in_all
        now = time.perf_counter()
        due = now - begun > 3 and now - last > (0.2 if live else 30)
        begins = re.fullmatch(r"streams, micro-batch (\d+)/(\d+)", line)
        if begins and begins[1] == "1":            # what is fitted was before
            first = now
        elif begins and begins[1] == "2":
            seconds = first - begun + (now - first) * int(begins[2])
            if seconds > 10:
                in_all = f", about {seconds / 60:.1f} min in all"
                due = True
        if due:
            last = now
            line = f"{line}, {now - begun:.0f} s{in_all}"
            print(line.ljust(80), end="\r" if live else "\n", file=sys.stderr, flush=True)
    return progress

def integers(text: str, flag: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as e:
        raise UserError(f"{flag} {text}: numbers such as 1,2,4 are expected") from e

def sample(args: Any, model: GPT, saved: dict[str, Any]) -> None:
    """--sample: print a prompt and how the model goes on."""
    enc = get_tokenizer(saved["tokenizer"])
    prompt = torch.tensor([encode(saved["tokenizer"], args.sample) or [enc.eot_token]])   # (1, T)
    check(prompt.max() < model.config.vocab_size,
          f"--sample has tokens beyond vocab_size={model.config.vocab_size}: "
          f"{saved['tokenizer']!r} is not the tokenizer of this model")
    device = model.embed.weight.device
    text = generate(model, prompt.to(device), args.new_tokens, args.temperature, args.top_k,
                    enc.n_vocab, torch.Generator(device).manual_seed(args.seed))
    print(decode(saved["tokenizer"], text[0].tolist()))

# A short run at a tenth of train.py's peak learning rate, which would unlearn more than was lost:
# measured, see README.
HEALING = "--learning_rate=3e-4 --warmup_steps=20 --max_steps=200"

def drop_blocks(args: Any, path: Path, model: GPT, saved: dict[str, Any]) -> None:
    """--drop: choose the blocks, say what it costs, save the rest."""
    n, auto = len(model.blocks), args.drop.startswith("auto:")
    drop = integers(args.drop.removeprefix("auto:"), "--drop")
    if auto:
        possible = len(drop) == 1 and 0 < drop[0] < n
    else:
        possible = set(drop) <= set(range(n)) and len(set(drop)) < n
    check(possible, f"--drop {args.drop}: {path} has blocks 0 to {n - 1}; "
                    "at least one must go and one must stay")
    stem = place_of(path).name.removesuffix(".pt")
    beside = "pruned.pt" if stem == "ckpt" else f"{stem}_pruned.pt"
    if isinstance(model, HFModel):
        beside = f"{stem}_pruned"                  # a folder
    target = Path(args.save or place_of(path).with_name(beside))
    check(target.resolve() != path.resolve(),
          f"--save {target} is the checkpoint itself: choose another name")
    make_folder(target.parent, "--save")
    tokens, _ = read_tokens(args, model, saved)
    drop = cheapest_drops(model, tokens, drop[0], make_progress()) if auto else sorted(set(drop))
    whole = probe(model, tokens, [])["loss"]
    heal = "any trainer of Hugging Face models can heal it"
    if isinstance(model, HFModel):
        prune_hf(model, drop, target, saved["tokenizer"], args.device_map)
    else:
        saved["tokenizer"] = copy_tokenizer(saved["tokenizer"], target.parent)
        save_checkpoint(target, without_blocks(saved, drop))
        heal = (f"train it on:  python train.py --init_from={target} --out_dir=out/healed "
                f"--data={saved['settings'].get('data', 'CORPUS')} {HEALING}")
    smaller, _ = load_model(target, tokens.device, getattr(torch, args.dtype), args.device_map)
    pruned = probe(smaller, tokens, [])["loss"]
    print(f"{target}: {path} without blocks {','.join(map(str, drop))}; "
          f"loss {whole:.4f} -> {pruned:.4f}, perplexity x{math.exp(pruned - whole):.3f}\n{heal}")

def measure(args: Any, path: Path, model: GPT, saved: dict[str, Any], label: str,
            out: Path) -> Result:
    """Probe one checkpoint and score its tasks, write probe.json and the figures, print the tables.

    Of several ranks all measure, and the first one writes and prints.
    """
    first = place_among_ranks()[0] == 0
    make_folder(out, "--out")
    only = [name for name in args.only.split(",") if name != "tasks"]
    tasks = args.tasks.split(",") if args.tasks else []
    ran = {"checkpoint": str(path), "weights": checksum(model, saved), "experiments": only,
           "dtype": args.dtype, "device": model.embed.weight.device.type,
           "settings": vars(model.config)}
    if tasks:
        ran["tasks"] = tasks
    if only:
        tokens, origin = read_tokens(args, model, saved)
        lengths = powers_below(len(model.blocks))
        if args.remove:
            lengths = integers(args.remove, "--remove")
        options = {"remove": lengths, "pairs": args.pairs, "below": args.below,
                   "jacobian_samples": args.jacobian_samples}
        ran |= {"tokens": origin, "samples": len(tokens), "length": tokens.size(1), "seed": args.seed,
                "checksum": zlib.crc32(tokens.cpu().numpy().tobytes())}
        ran |= {name: value for name, value in options.items() if EXPERIMENTS_OF[name] & set(only)}
    earlier = read_earlier(out / "probe.json", ran)

    result: Result = {"run": ran}
    if only:
        progress = make_progress()
        result |= probe(model, tokens, only, seed=args.seed, progress=progress, **options)
        if first:
            print(f"\n{path} on {len(tokens)} x {tokens.size(1)} tokens of {origin}")
            print(block_table(result, len(model.blocks)), "", score_table({label: result}), sep="\n")
            for line in remarks(result, str(path)):
                print(line)
    if tasks:
        result["tasks"] = run_tasks(model, saved["tokenizer"], tasks, args.task_folder,
                                    make_progress())
        if first:
            print(f"\n{path} on tasks", task_table(result["tasks"]), sep="\n")
    if not first:
        return result
    whole = write_result(out / "probe.json", earlier, result)
    drawn = draw({label: whole}, out)
    for line in filter(None, [f"{out / 'probe.json'} written", drawn, verdict(result)]):
        print(line)
    return result

def checksum(model: GPT, saved: dict[str, Any]) -> int:
    """One number for a model: its settings, and its weights as the checkpoint has them."""
    found = zlib.crc32(json.dumps(vars(model.config)).encode())
    for name, w in sorted(saved["model"].items()):
        values = w.detach().contiguous().view(torch.uint8).numpy()
        found = zlib.crc32(values, zlib.crc32(name.encode(), found))
    return found

def read_earlier(file: Path, ran: dict[str, Any]) -> Result:
    """What probe.json holds of the same weights, to which this run's results are added; {} if that
    is nothing. UserError where it was measured otherwise, since one `run` describes all of it."""
    if not file.exists():
        return {}
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        earlier = json.loads(file.read_text())
        told = dict(earlier["run"])
    if told.get("weights") != ran["weights"]:
        why = "damaged or too old"
        if "weights" in told:
            why = "of other weights: the model has changed"
        if place_among_ranks()[0] == 0:
            print(f"{file} is {why}; it becomes {file.name}.old")
        return {}
    ours, theirs = set(ran["experiments"]), set(told["experiments"])
    names = ["dtype", "device"]
    if ours and theirs and told["checksum"] != ran["checksum"]:
        names += ["tokens", "samples", "length", "seed", "checksum"]       # that of the tokens
    names += [name for name, its in EXPERIMENTS_OF.items() if its & ours & theirs]
    differing = [f"{name} {told[name]}, not {ran[name]}" for name in names
                 if told[name] != ran[name]]
    check(not differing, f"{file} was measured with {'; '.join(differing)}: measure as it was, or "
                         "give --out DIR to write elsewhere")
    if "tasks" in ran:
        left_out = [path for path in told.get("tasks", []) if path not in ran["tasks"]]
        check(not left_out, f"{file} holds the tasks of {' '.join(left_out)}: give --tasks those "
                            "as well, or --out DIR to write elsewhere")
    return earlier

def write_result(file: Path, earlier: Result, result: Result) -> Result:
    """Write probe.json: the result on top of the earlier one; a file that is no part of it is put
    aside. Returns what is in it now."""
    strict = json.loads(json.dumps(result), parse_constant=lambda nan: None)      # null for nan
    whole = earlier | strict
    if earlier:
        if "loss" in earlier:
            whole["loss"] = earlier["loss"]              # the two differ by rounding at most
        for part in ("run", "seconds"):
            if part in earlier and part in strict:
                whole[part] = earlier[part] | strict[part]
        experiments = [*earlier["run"]["experiments"], *strict["run"]["experiments"]]
        whole["run"]["experiments"] = list(dict.fromkeys(experiments))            # each once
    elif file.exists():
        os.replace(file, f"{file}.old")
    write_json(file, whole)
    return whole

def draw_again(args: Any) -> None:
    """--figures: draw what lies in probe.json."""
    need("matplotlib", "--figures")
    results: dict[str, Result] = {}
    for path in args.checkpoints:
        label, out = place_of_results(args, path, taken=results)
        try:
            results[label] = dict(json.loads((out / "probe.json").read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"no readable {out / 'probe.json'} to draw: measure with "
                            f"`python probe.py {path}`") from e
        if path.is_file() and path.stat().st_mtime > (out / "probe.json").stat().st_mtime:
            print(f"{out / 'probe.json'} is older than {path}: of the weights before, perhaps")
        print(draw({label: results[label]}, out) or f"{out / 'probe.json'} has nothing to draw")
    if len(results) > 1:
        compare(args, results)

def compare(args: Any, results: dict[str, Result]) -> None:
    """Lay the results of several checkpoints side by side: their scores, and their figures."""
    out = Path(args.out or place_of(args.checkpoints[0]).parent / "comparison")
    make_folder(out, "--out")
    print("", score_table(results), sep="\n")
    drawn = draw(results, out)
    if drawn:
        print(f"of the comparison: {drawn}")

def powers_below(n: int) -> list[int]:
    """1, 2, 4, ... below n, and 1 in any case: the lengths of runs that are removed unless others
    are asked for."""
    return [1] + [2**k for k in range(1, n) if 2**k < n]

def make_folder(out: Path, flag: str) -> None:
    """Make a folder for results, and find out before the work whether it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check(os.access(out, os.W_OK), f"cannot write to {out}: choose another {flag}")
    except OSError as e:
        raise UserError(f"cannot make {out} ({e.strerror or e}): choose another {flag}") from e

# What an option of a measurement is for: given without that, it is refused.
EXPERIMENTS_OF = {"pairs": {"permutation"}, "remove": {"removal"}, "below": {"sparsity"},
                  "jacobian_samples": {"jacobian", "released"}}

def check_used(args: Any, given: set[str]) -> None:
    """UserError for an option that is given beside others with which it has no effect."""
    if args.tokens:
        for name in ("data", "samples", "length"):
            check(name not in given, f"--{name} has no effect beside --tokens, which is taken whole")
    only = set(args.only.split(","))
    for name, experiments in EXPERIMENTS_OF.items():
        check(name not in given or only & experiments,
              f"--{name} is for {' and '.join(sorted(experiments))}, which --only leaves out")
    for name in ("data", "samples", "length", "tokens", "seed"):
        check(name not in given or only != {"tasks"}, f"--{name} has no effect on --only tasks")

def read_arguments() -> tuple[Any, str]:
    """The command line, and which of USES it asks for."""
    parser = Parser(prog="probe.py", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="ckpt.pt")
    add("--only", default=",".join(EXPERIMENTS),
        help="experiments, or tasks for --tasks alone; usefulness and released fit affine maps, which "
             "takes each process 32 n_layer n_embd^2 bytes of the CPU's memory (default: %(default)s)")
    add("--data", help="prepared corpus, its validation split is used, or a text (default: the run's; "
                       "of a model without one Python's documentation)")
    add("--samples", type=int, default=100, help="sequences (default 100, as the paper)")
    add("--length", type=int, default=0, help="tokens per sequence (default 512, at most block_size)")
    add("--tokens", metavar="FILE.npy", help="integer tokens (B, T) instead of a corpus")
    add("--seed", type=int, default=0, help="of the choice of sequences and pairs, and of --sample")
    add("--pairs", type=int, default=0, help="permute a sample of so many pairs (default: all)")
    add("--remove", default="", help="lengths of runs to remove (default: 1,2,4,... below n_layer)")
    add("--jacobian_samples", type=int, help="sequences for the Jacobian (default: half of them)")
    add("--below", type=float, default=0.1, help="|w| under this x init_std is sparse (default 0.1)")
    add("--tasks", help="tasks of lm-evaluation-harness (pip install lm_eval), such as arc_easy,hellaswag")
    add("--task_folder", metavar="DIR", help="more tasks, as YAML files; these may run Python code")
    add("--tokenizer", help="of a checkpoint that brings none: gpt2, ..., a tokenizer.json, a hub id")
    add("--out", help="folder for the results, one in it for each of several (default: beside ckpt.pt; "
                      "of X.pt X/)")
    add("--drop", help="blocks such as 3,7, or auto:N for the N cheapest: save a model without them")
    add("--save", help="target of --drop (default: beside ckpt.pt pruned.pt, NAME.pt NAME_pruned.pt)")
    add("--sample", metavar="TEXT", help="print how the model goes on; '' is the start of a document")
    add("--new_tokens", type=int, default=200, help="of --sample: how many (default 200)")
    add("--temperature", type=float, default=0.8, help="of --sample; 0: always the likeliest (default 0.8)")
    add("--top_k", type=int, default=50, help="of --sample: draw among the likeliest k (default 50)")
    add("--export", metavar="DIR", help="write a Hugging Face folder")
    add("--figures", action="store_true", default=None,
        help="draw the figures again, from probe.json")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float64"),
        help="of the weights and the stream; float32 on a GPU is float32, not TF32 (default: %(default)s)")
    add("--device_map", choices=["auto"], help="share out a Hugging Face model among all GPUs")
    args = parser.parse_args()
    expand_home(args)
    unset = object()                              # once more, to tell what is given from defaults
    given = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    asked = [name for name in ("drop", "sample", "export", "figures") if getattr(args, name) is not None]
    check(len(asked) <= 1, f"--{' and --'.join(asked)}: one at a time")
    does = asked[0] if asked else "measure"
    for name in vars(args):
        used = name in (does, "checkpoints", *USES[does].split())
        if not used and getattr(given, name) is not unset:
            owners = [other for other in USES if name in (other, *USES[other].split())]
            wanted = " or ".join("measuring" if other == "measure" else f"--{other}" for other in owners)
            raise UserError(f"--{name} goes with {wanted}, and that is not asked for here")
    check_used(args, {name for name, value in vars(given).items() if value is not unset})
    check(args.new_tokens >= 0 and args.temperature >= 0 and args.top_k > 0,
          "--new_tokens and --temperature must not be negative, --top_k must be positive")
    check(args.seed >= 0, "--seed must not be negative")
    return args, does

def expand_home(args: Any) -> None:
    """Put the home folder for a ~ in every path: a shell leaves it in --name=~/path."""
    args.checkpoints = [Path(os.path.expanduser(path)) for path in args.checkpoints]
    for name in ("data", "tokens", "out", "save", "export", "tokenizer", "task_folder"):
        value = getattr(args, name)
        setattr(args, name, value and os.path.expanduser(value))

def join_ranks(device: torch.device, does: str) -> torch.device:
    """Find torchrun's other processes, if there are any; returns the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    check(does == "measure", f"--{does} takes one process: start it with python, not torchrun")
    if device.type != "cpu":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        check(local < gpus, f"torchrun starts more processes than there are GPUs: "
                            f"use --nproc-per-node={gpus}, or --device=cpu")
        device = torch.device(device.type, local)
        torch.accelerator.set_device_index(local)
    # gloo on GPUs too, for the sums are added on the CPU; who is done may wait long for the slowest
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)
    return device

def place_of(path: Path) -> Path:
    """Where a checkpoint is; of a model on the Hugging Face hub, owner/name or in its cache, its
    name here."""
    cached = re.search(r"/models--(?:.+?--)?([^/]+)/snapshots/[^/]+\Z", path.absolute().as_posix())
    if cached:
        return Path(cached[1])
    return path if path.exists() else Path("_".join(path.parts[1:]))

def home_of(path: Path) -> Path:
    """The folder of a checkpoint's results, unless --out says another."""
    if path.is_file():
        return path.parent if path.name == "ckpt.pt" else path.with_suffix("")
    return place_of(path)

def place_of_results(args: Any, path: Path, taken: dict[str, Result]) -> tuple[str, Path]:
    """What a checkpoint is called among the others, and the folder of its results."""
    home = home_of(path)
    name = home.resolve().name
    label = str(path).replace("/", "_") if name in taken else name
    if not args.out:
        return label, home
    return label, Path(args.out, label) if len(args.checkpoints) > 1 else Path(args.out)

def main() -> None:
    args, does = read_arguments()
    device = choose_device(args.device)
    check(device.type != "mps" or args.dtype != "float64",
          "--dtype=float64: Apple's GPUs have none, use --device=cpu")
    device = join_ranks(device, does)
    several = len(args.checkpoints) > 1
    check(args.tasks or "tasks" not in args.only.split(","), "--only tasks needs --tasks NAMES")
    check(not (several and args.save), "--save goes with one checkpoint")
    check(not (several and args.export), "--export goes with one checkpoint")
    if does == "export":
        return export(args.checkpoints[0], args.export, args.tokenizer)
    if does == "figures":
        return draw_again(args)
    if does == "measure" and args.only != "tasks" and place_among_ranks()[0] == 0:
        say_without_figures()

    results: dict[str, Result] = {}
    for path in args.checkpoints:
        model, saved = load_model(path, device, getattr(torch, args.dtype), args.device_map)
        check_finite(model, path)
        saved["tokenizer"] = args.tokenizer or saved["tokenizer"]
        if does == "sample":
            sample(args, model, saved)
        elif does == "drop":
            drop_blocks(args, path, model, saved)
        else:
            label, out = place_of_results(args, path, taken=results)
            results[label] = measure(args, path, model, saved, label, out)
    if len(results) > 1 and place_among_ranks()[0] == 0:
        compare(args, results)
    if place_among_ranks()[1] > 1:
        dist.barrier()                            # none leaves while another is still talking to it

if __name__ == "__main__":
    run(main)
