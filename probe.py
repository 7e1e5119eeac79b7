"""Which layers does a model use? Every layer-effectiveness experiment of the paper, in one command.

    python probe.py out/gqa_deep/ckpt.pt                             # tables, figures, probe.json
    python probe.py out/dense/ckpt.pt out/moe/ckpt.pt                # side by side
    python probe.py HuggingFaceTB/SmolLM2-135M --only causal         # from the hub, or a folder
    python probe.py ckpt.pt --data text.txt --samples 400            # other text, more of it
    python probe.py ckpt.pt --remove 1,2,4 --sublayers               # also 2, 4 blocks; sublayers
    python probe.py ckpt.pt --drop 3,7 --save pruned.pt              # the model without two blocks
    python probe.py ckpt.pt --tasks arc_easy,hellaswag               # also accuracy on tasks
    python probe.py ckpt.pt --sample "def "                          # let the model write
    python probe.py ckpt.pt --export my_model                        # write a Hugging Face folder
    torchrun --nproc-per-node=8 probe.py ckpt.pt                     # divide the work among 8 GPUs

Blocks are numbered from 0: block l turns the stream h_l into h_{l+1}. h_0 is the output of the
embedding, and h_n is the stream before the final norm. Every intervention starts from the streams
of one forward pass, and nothing in the model is changed.
"""
from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from pydoc_data.topics import topics as PYTHON_TOPICS     # English text that comes with Python
from typing import Any, Callable, Collection, Iterable, Iterator, NamedTuple, Sequence

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")     # torch reads this when it is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from data import (Corpus, HFModel, Parser, check_empty, check_finite, choose_device,
                  copy_tokenizer, decode, documents, encode, export, get_tokenizer, load_model,
                  need, prune_hf, run, same_tokenizer, save_checkpoint, write_json)
from model import (GPT, Detail, UserError, check, generate, logits_at_once, token_variance, wide)

TOKENS_AT_ONCE = 2048       # in a micro-batch on a CPU: a block's activations fit into the cache
KEPT_IN_MEMORY = 2**30      # bytes of streams; for a larger sample they are computed again
USEFUL = 1.1                # useful: the block's affine map multiplies the loss by more than this
BELOW = 0.1                 # a weight is near zero if its size is below this times init_std
FITTING = 0.5               # cost of fitting a block's affine map, in evaluations of the block

Model = Any                             # GPT, or HFModel of data.py
Layer = Callable[[Tensor], Tensor]      # a block or a replacement for one: (B, T, d) -> (B, T, d)
Map = tuple[Tensor, Tensor]             # W (d, d) and b (d,) of y = x W + b
ALL = slice(None)                       # all sequences of a micro-batch
Sums = dict[str, Any]                   # tensors and numbers, added over micro-batches and ranks
Result = dict[str, Any]                 # the contents of probe.json

# ---- what an experiment gets: one micro-batch ----------------------------------------------------
@dataclass
class Options:
    """Options of a measurement, named as on the command line."""
    remove: Sequence[int] = (1,)        # lengths of the contiguous runs of blocks to remove
    sublayers: bool = False             # also remove each attention and each FFN alone
    pairs: int = 0                      # swap this many random pairs of blocks; 0: all pairs
    jacobian_samples: int = 0           # sequences for the Jacobian; 0: half of the sample
    seed: int = 0                       # for the random pairs

@dataclass
class Progress:
    """A line on stderr that says what is measured now and how long the rest will take.

    Work is counted in evaluations of one block on one sequence.
    """
    shown: bool = False
    experiment: str = ""
    work: float = 0.0           # of the whole measurement
    done: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    printed: float = -math.inf

    def say(self, step: str) -> None:
        """Print the line, at most five times a second on a terminal, else every half minute."""
        now, live = time.perf_counter(), sys.stderr.isatty()
        elapsed = now - self.begun
        if not self.shown or elapsed < 3 or now - self.printed < (0.2 if live else 30):
            return
        self.printed = now
        line = f"{self.experiment}, {step}, {duration(elapsed)}"
        if self.done:
            left = elapsed * max(self.work - self.done, 0) / self.done
            line += f", about {duration(left)} left"
        if live:
            width = shutil.get_terminal_size().columns - 1
            line = line[:width].ljust(width)
        print(line, end="\r" if live else "\n", file=sys.stderr, flush=True)

def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

class Maps(NamedTuple):
    """The least-squares affine map of each block, see `Fit`."""
    whole: list[Map]            # fitted on all sequences
    half: list[Map]             # fitted on the first half of the sequences
    to_recorded: Map | None     # of the last block, fitted to the last stream of `recorded`

@dataclass
class Pass:
    """One micro-batch, and what experiments share: its streams h, the loss, the streams without(s),
    the Jacobians and the affine maps."""
    model: Model
    idx: Tensor                 # (B, T) token ids
    h: list[Tensor]             # the streams h_0 .. h_n, each (B, T, d)
    details: list[Detail]       # what attention and FFN of each block added to the stream
    number: Tensor              # (B,) the numbers of these sequences in the sample, ascending
    total: int                  # sequences in the sample
    options: Options
    progress: Progress
    maps: Maps | None = None    # fitted on the whole sample
    micro_batch: str = ""       # its number among the micro-batches, for the progress line
    is_small: bool = False      # do all streams of the sample fit into memory?
    cache: dict[Any, Any] = field(default_factory=dict)

    @torch.no_grad()
    def losses(self, x: Tensor, layers: Sequence[Layer] = (), rows: slice = ALL) -> Tensor:
        """Send the stream x (B, T, d) through these layers and the head. Returns -log p in nats,
        summed over the T - 1 predictions of each sequence, (B,). rows: the sequences of idx
        that x holds.
        """
        idx = self.idx[rows]
        for layer in layers:
            x = layer(x)
        self.progress.done += (len(layers) + head_cost(self.model)) * len(idx)
        targets = F.pad(idx[:, 1:], (0, 1), value=-100)                       # -100: no loss here
        at_once = max(1, logits_at_once(x.device) // (idx.size(1) * self.model.vocab_size))
        sums = []
        for some_x, some_targets in zip(x.split(at_once), targets.split(at_once)):
            logits = wide(self.model.logits(some_x)).flatten(0, 1)            # (b T, vocab_size)
            nats = F.cross_entropy(logits, some_targets.flatten(), reduction="none")
            sums.append(nats.view(some_targets.shape).sum(1, dtype=finest(x.device)))
        return torch.cat(sums)

    @cached_property
    def loss(self) -> Tensor:
        """The losses of the unchanged model, (B,)."""
        return self.losses(self.h[-1])

    @torch.no_grad()
    def without(self, s: int) -> list[Tensor]:
        """The streams h_0 .. h_n in the model without block s. Up to h_s they are unchanged.

        The cache holds all of them, or only the last one if the sample is large."""
        g = self.cache.get(("without", s), [])
        if len(g) < len(self.h):
            g = self.h[:s + 1] + streams_of(self.model.blocks[s + 1:], self.h[s])
            self.progress.done += (len(g) - s - 2) * len(self.idx)
            self.cache["without", s] = g if self.is_small else g[-1:]
        return g

    def end_without(self, s: int) -> Tensor:
        """The last stream without block s, (B, T, d). Cached even if the sample is large."""
        return (self.cache.get(("without", s)) or self.without(s))[-1]

    def jacobian(self, l: int) -> Tensor:
        """The Jacobian of block l, see `jacobian_of`. Computed once."""
        if ("jacobian", l) not in self.cache:
            self.cache["jacobian", l] = self.jacobian_of(self.model.blocks[l], l)
        return self.cache["jacobian", l]

    def jacobian_of(self, layer: Layer, l: int) -> Tensor:
        """`jacobian_sum` of a layer at h_l over the sequences in the Jacobian's sample, (d, d)."""
        x = self.h[l][:self.before(self.few)]
        self.progress.done += 2 * x.size(-1) * len(x)
        return jacobian_sum(layer, x) if len(x) else torch.zeros(x.size(-1), x.size(-1)).double()

    def before(self, number: int) -> int:
        """How many sequences of this micro-batch have a smaller number. They come first."""
        return int((self.number < number).sum())

    @property
    def few(self) -> int:
        """The size of the Jacobian's sample, which is the first `few` sequences."""
        return min(self.options.jacobian_samples or self.total - self.total // 2, self.total)

    def place(self, x: Tensor) -> Tensor:
        """Put the values (..., B) of these sequences at their places among zeros, (..., total). The
        sum of such tensors over micro-batches and ranks holds the values of all sequences."""
        out = torch.zeros(*x.shape[:-1], self.total, dtype=torch.float64)
        out[..., self.number] = to_cpu_float64(x)
        return out

    def watch(self, items: Sequence[Any], what: str = "block") -> Iterator[Any]:
        """Iterate over the items and report progress."""
        for k, item in enumerate(items, 1):
            self.progress.say(f"{what} {k} of {len(items)}{self.micro_batch}")
            yield item

@torch.no_grad()
def forward(model: Model, idx: Tensor, number: Tensor | None = None, total: int = 0,
            options: Options | None = None, progress: Progress | None = None) -> Pass:
    """Run the model once on idx (B, T) and keep its streams. By default idx is the whole sample."""
    h, details = [model.embed(idx)], []
    for block in model.blocks:
        x, did = block(h[-1], detail=True)
        h.append(x)
        details.append(did)
    p = Pass(model, idx, h, details, torch.arange(len(idx)) if number is None else number,
             total or len(idx), options or Options(), progress or Progress())
    p.progress.done += len(details) * len(idx)
    return p

def streams_of(layers: Iterable[Layer], x: Tensor) -> list[Tensor]:
    """The stream x (B, T, d), and the stream after each of the layers."""
    return list(accumulate(layers, lambda x, layer: layer(x), initial=x))

def head_cost(model: Model) -> float:
    """The cost of the logits, in evaluations of a block. The head has d x vocab_size weights, and
    a block has about 12 d^2."""
    return model.vocab_size / (12 * model.d)

def to_cpu_float64(x: Any) -> Tensor:
    """x in float64 on the CPU. The move comes first, since Apple's GPUs have no float64."""
    return torch.as_tensor(x).detach().cpu().double()

def finest(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which do not have it."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32

# ---- an experiment -------------------------------------------------------------------------------
class Column(NamedTuple):
    """A column in the table of blocks, or a line in a figure."""
    name: str
    values: Callable[[Result], Sequence[float] | None]          # one per block; None: not measured
    meaning: str = ""                                           # for the table
    errors: Callable[[Result], Sequence[float]] | None = None   # their standard errors

class Experiment(NamedTuple):
    """Two functions that measure, and how the result is shown."""
    sums: Callable[[Model, Pass], Sums]                 # of one micro-batch
    score: Callable[[Model, Sums], Result]              # of the sums over all micro-batches
    columns: Sequence[Column] = ()                      # values for each block
    scores: dict[str, Callable[[Result], float]] = {}   # values for the whole model, by column
    figure: Callable[[Any, dict[str, Result]], None] | None = None     # draws into a subfigure
    work: Callable[[int, Options], Sequence[float]] = lambda n, options: (0, 0, 0)  # see `work_of`
    fits: bool = False                                  # does it use p.maps? Then stage 2 or later
    stage: int = 0                                      # slow experiments run later, see `probe`

EXPERIMENTS: dict[str, Experiment] = {}

def ratio_error(changed: Tensor, loss: Tensor) -> Tensor:
    """Standard error of changed.sum(-1) / loss.sum(), where changed (..., N) and loss (N,) are the
    losses of N sequences. Pairing them removes most of the variation between sequences."""
    ratio = changed.sum(-1, keepdim=True) / loss.sum()
    return standard_error(changed - ratio * loss) / loss.mean()

def standard_error(x: Tensor) -> Tensor:
    """Standard error of the mean of x (..., N) over its last dimension; nan if N < 2."""
    N = x.size(-1)
    return x.std(-1) / N ** 0.5 if N > 1 else x.new_full(x.shape[:-1], math.nan)

def above_diagonal(a: Any, first: int = 0) -> np.ndarray:
    """The entries a[i, j] of a matrix with first <= i < j."""
    a = np.asarray(a, dtype=float)[first:, first:]
    return a[np.triu_indices(len(a), 1)]

def mean(values: Any) -> float:
    """The mean of the values that were measured (not nan); nan if there are none."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan

def trend(values: Sequence[float]) -> float:
    """Does a value grow or fall with depth? The rank correlation with the block's index over blocks
    1 to n - 1. Block 0 is left out: it reads the embedding and is unlike the others."""
    return rank_correlation(range(len(values) - 1), values[1:])

def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation. Equal values share the mean of their ranks; nan if x or y is
    constant."""
    ranks = []
    for values in (x, y):
        _, which, count = np.unique(values, return_inverse=True, return_counts=True)
        if len(count) < 2:
            return math.nan
        ranks.append((np.cumsum(count) - (count - 1) / 2)[which])
    return float(np.corrcoef(*ranks)[0, 1])

def number(x: float | None) -> float:
    """A number of probe.json, where null stands for nan."""
    return math.nan if x is None else float(x)

# ---- variance ------------------------------------------------------------------------------------
def variance(model: Model, p: Pass) -> Sums:
    """How large is the variance of each stream, and of what attention and FFN add to it?  (paper,
    probe 1)

    It is the unbiased variance over the d features, averaged over tokens.
    """
    tokens = p.idx.numel()
    sums = {"stream": to_cpu_float64(torch.stack([token_variance(x) for x in p.h])) * tokens,
            "tokens": tokens}
    if p.details[0].attn is not None:
        for name in ("attn", "ffn"):
            added = [token_variance(getattr(did, name)) for did in p.details]
            sums[name] = to_cpu_float64(torch.stack(added)) * tokens
    return sums

def variance_score(model: Model, totals: Sums) -> Result:
    stream = (totals["stream"] / totals["tokens"]).tolist()
    growth = [after / before if before else math.nan for before, after in pairwise(stream)]
    found = {"variance": stream, "variance_growth": growth}
    for name in ("attn", "ffn"):
        if name in totals:
            found[f"{name}_variance"] = totals[name] / totals["tokens"]
    return found

EXPERIMENTS["variance"] = Experiment(
    variance, variance_score,
    columns=[Column("variance", lambda r: r["variance"][1:], "of the stream after the block"),
             Column("growth", lambda r: r["variance_growth"], "variance after / before the block")],
    scores={"last var.": lambda r: r["variance"][-1],
            "ln Vn/V1": lambda r: math.log(r["variance"][-1] / r["variance"][1])},
    figure=lambda fig, results: lines(
        fig, results, [Column("stream", lambda r: r["variance"][1:]),
                       Column("attention adds", lambda r: r.get("attn_variance")),
                       Column("FFN adds", lambda r: r.get("ffn_variance"))],
        "Variance of the stream after each block", "variance", scale="log"))

# ---- causal score --------------------------------------------------------------------------------
def causal(model: Model, p: Pass) -> Sums:
    """Skip block s; how much does the update of every later block l change?  (paper, probe 2)

    C[s, l] = sum |(h_{l+1} - h_l) - (g_{l+1} - g_l)| / sum |h_{l+1} - h_l|, where g are the streams
    without block s. Both sums run over tokens: a ratio of means, not a mean of ratios.
    """
    rows = [causal_row(p.h, p.without(s), s) for s in p.watch(range(len(model.blocks)))]
    return {"changed": torch.stack(rows), "update": torch.stack(update_norms(p.h))}

def causal_score(model: Model, totals: Sums) -> Result:
    """The paper does not say how it averages C. causal_mean is the mean over all s < l."""
    C = totals["changed"] / totals["update"].clamp_min(1e-300)
    return {"causal": C, "causal_mean": mean(above_diagonal(C))}

def update_norms(streams: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each step from one stream to the next, summed over tokens: n tensors ()."""
    steps = (wide(y) - wide(x) for x, y in pairwise(streams))
    return [torch.linalg.vector_norm(step, dim=-1).sum() for step in steps]

def causal_row(h: list[Tensor], g: list[Tensor], s: int) -> Tensor:
    """The numerators of C[s, l] for all blocks l, (n,); 0 for l <= s. g: the streams without s."""
    # The step of h - g from l to l + 1 is the change of block l's update.
    missing = [wide(x) - wide(y) for x, y in zip(h[s + 1:], g[s + 1:])]
    row = wide(h[0].new_zeros(len(h) - 1))
    for l, norm in enumerate(update_norms(missing), s + 1):
        row[l] = norm
    return row

EXPERIMENTS["causal"] = Experiment(
    causal, causal_score,
    columns=[Column("causal", lambda r: [mean(row[s + 1:]) for s, row in enumerate(r["causal"])],
                    "change of the later updates without the block")],
    scores={"causal": lambda r: number(r["causal_mean"]),
            "causal 1+": lambda r: mean(above_diagonal(r["causal"], first=1))},
    figure=lambda fig, results: matrices(
        fig, results, "causal", "Causal score: change of l's update without s", "later block l",
        "skipped block s", "change / update", blank=np.tri),
    work=lambda n, options: (n * (n - 1) / 2, 0, 0),
    stage=1)

# ---- permutation score ---------------------------------------------------------------------------
def permutation(model: Model, p: Pass) -> Sums:
    """Swap blocks i and j; by what fraction does the loss change?  (paper, probe 3)"""
    n, blocks = len(model.blocks), list(model.blocks)
    pairs = list(combinations(range(n), 2))
    drawn = np.random.default_rng(p.options.seed).permutation(len(pairs))[:p.options.pairs or None]
    losses = torch.zeros(n, n, p.total, dtype=torch.float64)      # stays 0 if a pair is not sampled
    found = {}
    for i, j in p.watch([pairs[k] for k in drawn], "pair"):
        from_i = [blocks[j], *blocks[i + 1:j], blocks[i], *blocks[j + 1:]]
        found[i, j] = p.losses(p.h[i], from_i)
    if found:               # placed together: a GPU is waited for once, not for every pair
        i, j = torch.tensor(list(found)).T
        losses[i, j] = losses[j, i] = p.place(torch.stack(list(found.values())))
    return {"swapped": losses, "loss": p.place(p.loss)}

def permutation_score(model: Model, totals: Sums) -> Result:
    """The matrix P[i, j], nan where a pair was not sampled, and its mean over the sampled pairs."""
    losses, loss = totals["swapped"], totals["loss"]
    sampled = losses.sum(-1) > 0
    P = (losses.sum(-1) / loss.sum() - 1).abs().where(sampled, math.nan).fill_diagonal_(0)
    error = ratio_error(losses, loss).where(sampled, math.nan).fill_diagonal_(0)
    change = torch.from_numpy(above_diagonal(P))
    n_pairs = len(change)
    change = change[~change.isnan()]
    of_mean = standard_error(change) if len(change) < n_pairs else math.nan
    return {"permutation": P, "permutation_stderr": error, "permutation_mean": mean(change),
            "permutation_pairs": len(change), "permutation_standard_error": of_mean}

def swap_means(P: Sequence[Sequence[float]]) -> list[float]:
    """The mean over each block's sampled swaps with other blocks."""
    return [mean([x for j, x in enumerate(row) if j != l]) for l, row in enumerate(P)]

EXPERIMENTS["permutation"] = Experiment(
    permutation, permutation_score,
    columns=[Column("permuted", lambda r: swap_means(r["permutation"]),
                    "relative change of the loss, mean over the block's swaps",
                    lambda r: swap_means(r["permutation_stderr"]))],
    scores={"permuted": lambda r: number(r["permutation_mean"]),
            "perm. 1+": lambda r: mean(above_diagonal(r["permutation"], first=1))},
    figure=lambda fig, results: matrices(
        fig, results, "permutation", "Permutation score: blocks i and j swapped", "block j",
        "block i", "change of the loss / loss", blank=np.eye, errors="permutation_stderr"),
    # From the first block of a pair to the last block there are about 2 n / 3 blocks on average.
    work=lambda n, o: [(o.pairs or n * (n - 1) // 2) * x for x in (2 * n / 3, 1, 0)],
    stage=4)

# ---- usefulness ----------------------------------------------------------------------------------
def usefulness(model: Model, p: Pass) -> Sums:
    """Replace a block by its best affine map: is the loss more than 1.1 times as large?  (paper,
    probe 4)

    As in the paper, the maps are fitted and judged on all tokens. For "heldout", they are fitted on
    the first half of the sequences and judged on the second half.
    """
    maps = p.maps or fit_maps(model, p)
    later = slice(p.before(p.total // 2), None)                # the second half of the sample
    sums = {"mapped": p.place(losses_with_maps(model, p, maps.whole)),
            "loss": p.place(p.loss), "tokens": p.idx.numel()}
    sums["heldout"] = torch.zeros_like(sums["mapped"])
    if len(p.number[later]):
        losses = losses_with_maps(model, p, maps.half, later)
        sums["heldout"][:, p.number[later]] = to_cpu_float64(losses)
    return sums

def usefulness_score(model: Model, totals: Sums) -> Result:
    loss, tokens, half = totals["loss"], float(totals["tokens"]), len(totals["loss"]) // 2
    return {"usefulness": map_scores(model, totals["mapped"], loss, tokens),
            "usefulness_heldout": map_scores(model, totals["heldout"][:, half:], loss[half:],
                                             tokens * half / len(loss))}

def losses_with_maps(model: Model, p: Pass, maps: Sequence[Map], rows: slice = ALL) -> Tensor:
    """The losses of the sequences `rows` with each block replaced by its map, (n, sequences)."""
    losses = []
    for l in p.watch(range(len(maps))):
        W, b = maps[l]
        losses.append(p.losses(p.h[l][rows] @ W + b, model.blocks[l + 1:], rows))
    return torch.stack(losses)

def map_scores(model: Model, mapped: Tensor, loss: Tensor, tokens: float) -> Result:
    """Scores of maps that were fitted to this many tokens. mapped (n, N): the losses of the N
    sequences with each map. loss (N,): the losses of the unchanged model."""
    ratio = mapped.sum(-1) / loss.sum()
    return {"ratio": ratio, "ratio_stderr": ratio_error(mapped, loss),
            "score": (ratio > USEFUL).double().mean(), "mean_log_ratio": ratio.log().mean(),
            "loose_fit": tokens < 10 * (model.d + 1)}

class Fit:
    """The sums that the affine maps need, added over micro-batches: see `moments`.

    They need float64 and are on the CPU: 17.5 GB for d = 4096 and 32 blocks.
    """
    def __init__(self, model: Model) -> None:
        self.model, n, d = model, len(model.blocks), model.d
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.first_half, self.second_half = zeros(2, n, d + 1, 2 * d + 1)
        self.to_recorded = zeros(d + 1, 2 * d + 1)
        self.has_norm = getattr(model, "norm", None) is not None

    def add(self, p: Pass) -> None:
        """Add a micro-batch. The two halves of the sample have sums of their own."""
        p.progress.experiment = "affine maps"
        check(p.total > 1, "affine maps take at least two sequences: one for each half")
        first = p.before(p.total // 2)
        halves = (self.first_half, slice(first)), (self.second_half, slice(first, None))
        for l in p.watch(range(len(p.h) - 1)):
            for sums, rows in halves:
                if len(p.number[rows]):          # an empty half would still wait for a GPU
                    sums[l] += moments(p.h[l][rows], p.h[l + 1][rows])
        if self.has_norm:
            self.to_recorded += moments(p.h[-2], recorded(self.model, p.h)[-1])
        p.progress.done += FITTING * (len(p.h) - 1) * len(p.idx)

    def solve(self, like: Tensor) -> Maps:
        """The least-squares maps, with the device and the precision of the stream `like`."""
        for sums in (*self.first_half, *self.second_half, self.to_recorded):
            add_over_ranks(sums)

        def maps(sums: Iterable[Tensor]) -> list[Map]:
            on_cpu = finest(like.device) != torch.float64
            found = [affine_map(x if on_cpu else x.to(like.device)) for x in sums]
            return [(W.to(like), b.to(like)) for W, b in found]
        return Maps(maps(a + b for a, b in zip(self.first_half, self.second_half)),
                    maps(self.first_half), maps([self.to_recorded])[0] if self.has_norm else None)

@torch.no_grad()
def fit_maps(model: Model, p: Pass) -> Maps:
    """The affine maps for a sample of one micro-batch."""
    fit = Fit(model)
    fit.add(p)
    return fit.solve(p.h[0])

def moments(x: Tensor, y: Tensor) -> Tensor:
    """What the regression of y on (x, 1) needs, summed over tokens: (x, 1)^T (x, 1) and (x, 1)^T y,
    together (d + 1, 2 d + 1), in float64 on the CPU."""
    if finest(x.device) != torch.float64:
        x, y = x.cpu(), y.cpu()
    x = F.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)           # (B T, d + 1): 1 for the bias
    return torch.cat((x.T @ x, x.T @ y.flatten(0, 1).double()), dim=1).cpu()

def affine_map(moments: Tensor) -> Map:
    """The least-squares W (d, d) and b (d,) of y = x W + b from summed `moments`.

    Features are centred and scaled to unit variance first, since badly scaled ones cost accuracy.
    Directions whose variance is only rounding are left out.
    """
    d = len(moments) - 1
    mean = moments / moments[d, d]
    mean_x, mean_y = mean[d, :d], mean[d, d + 1:]
    xx, xy = mean[:d, :d], mean[:d, d + 1:]
    cov_xx = xx - torch.outer(mean_x, mean_x)
    cov_xy = xy - torch.outer(mean_x, mean_y)
    live = cov_xx.diagonal() > 1e-13 * xx.diagonal()                 # otherwise constant
    scale = torch.where(live, cov_xx.diagonal().clamp_min(1e-300).rsqrt(), 0.0)
    inverse = torch.linalg.pinv(scale[:, None] * cov_xx * scale, rtol=d * 1e-15, hermitian=True)
    W = scale[:, None] * (inverse @ (scale[:, None] * cov_xy))
    return W, mean_y - mean_x @ W

def log_ratios(r: Result) -> list[float]:
    """ln(loss with the block's best affine map instead / loss), for each block."""
    return np.log(r["usefulness"]["ratio"]).tolist()

MAP_COLUMNS = [Column("affine", lambda r: r["usefulness"]["ratio"],
                      "loss with its best affine map instead / loss",
                      lambda r: r["usefulness"]["ratio_stderr"]),
               Column("unseen", lambda r: r["usefulness_heldout"]["ratio"],
                      "the same, fitted on other sequences",
                      lambda r: r["usefulness_heldout"]["ratio_stderr"])]

EXPERIMENTS["usefulness"] = Experiment(
    usefulness, usefulness_score, columns=MAP_COLUMNS,
    scores={"useful": lambda r: r["usefulness"]["score"],
            "log ratio": lambda r: r["usefulness"]["mean_log_ratio"],
            "heldout": lambda r: r["usefulness_heldout"]["mean_log_ratio"],
            "useful 1+": lambda r: mean(np.array(r["usefulness"]["ratio"][1:]) > USEFUL),
            "ratio 1+": lambda r: mean(log_ratios(r)[1:]),
            "ratio late": lambda r: mean(log_ratios(r)[len(log_ratios(r)) // 2:]),
            "ratio sum": lambda r: sum(log_ratios(r)),
            "trend use": lambda r: trend(log_ratios(r))},
    figure=lambda fig, results: lines(
        fig, results, MAP_COLUMNS, "Usefulness: an affine map in place of a block",
        "growth of the loss", scale="growth", threshold=USEFUL),
    # The maps of the whole sample run on all sequences, those of one half on the other half.
    work=lambda n, options: (0.75 * n * (n - 1), 1.5 * n, 0),
    fits=True)

# ---- the scores as the released scripts compute them ---------------------------------------------
def released(model: Model, p: Pass) -> Sums:
    """The authors' scripts depart from the definitions in three ways, marked 1, 2 and 3 below.

    1. Every model: the least-squares W of y = x W + b is copied into a Linear.weight without
    transposing it, so that x W^T + b is computed. 2. Dense models: the last stream is recorded
    after the final norm. 3. Dense models: a skipped block leaves no stream in the record, so that
    all later streams are read one place early.
    """
    blocks, last = list(model.blocks), len(model.blocks) - 1
    maps = p.maps or fit_maps(model, p)
    h = recorded(model, p.h)                                                      # 2
    rows, losses = [], []
    for s in p.watch(range(len(blocks))):
        g = recorded(model, p.without(s))                                         # 2
        if is_dense(model):
            del g[s + 1]                     # 3. The last block has no entry: C[s, last] = 0
        rows.append(causal_row(h, g, s))
        W, b = maps.to_recorded if s == last else maps.whole[s]                   # 2
        losses.append(p.losses(p.h[s] @ W.T + b, blocks[s + 1:]))                 # 1
    J = [p.jacobian(l) for l in p.watch(range(len(blocks)))]
    if is_dense(model):
        J[last] = p.jacobian_of(lambda x: model.norm(blocks[last](x)), last)      # 2
    tokens = p.idx.numel()
    return {"changed": torch.stack(rows), "update": torch.stack(update_norms(h)),
            "mapped": p.place(torch.stack(losses)), "loss": p.place(p.loss),
            "variance": to_cpu_float64(torch.stack([token_variance(x) for x in h])) * tokens,
            "tokens": tokens, "jacobian": torch.stack(J), "positions": sampled_positions(p)}

def released_score(model: Model, totals: Sums) -> Result:
    tokens = float(totals["tokens"])
    return {"released": {
        "causal": totals["changed"] / totals["update"].clamp_min(1e-300),
        "usefulness": map_scores(model, totals["mapped"], totals["loss"], tokens),
        "variance": totals["variance"] / tokens,
        "jacobian": jacobian_scores(totals["jacobian"] / totals["positions"])}}

def recorded(model: Model, streams: list[Tensor]) -> list[Tensor]:
    """The streams as the scripts record them: in dense models the last one is after the norm."""
    return [*streams[:-1], model.norm(streams[-1]) if is_dense(model) else streams[-1]]

def is_dense(model: Model) -> bool:
    return getattr(model, "dense", not model.n_experts)

EXPERIMENTS["released"] = Experiment(
    released, released_score,
    columns=[Column("released", lambda r: r["released"]["usefulness"]["ratio"],
                    "`affine` as the released scripts compute it",
                    lambda r: r["released"]["usefulness"]["ratio_stderr"])],
    scores={"rel.var.": lambda r: r["released"]["variance"][-1],
            "rel.useful": lambda r: r["released"]["usefulness"]["score"],
            "rel.ratio": lambda r: r["released"]["usefulness"]["mean_log_ratio"],
            "rel.causal": lambda r: mean(above_diagonal(r["released"]["causal"]))},
    work=lambda n, options: (n * (n - 1), n, n),
    fits=True, stage=3)

# ---- removal -------------------------------------------------------------------------------------
def removal(model: Model, p: Pass) -> Sums:
    """The loss without each block or run of blocks; on request without each attention or FFN.

    Also block influence: 1 - cosine of a block's input and output, averaged over tokens (ShortGPT,
    arXiv 2403.03853).
    """
    n, blocks = len(model.blocks), model.blocks
    cosines = [F.cosine_similarity(wide(x), wide(y), dim=-1) for x, y in pairwise(p.h)]
    sums = {"influence": torch.stack([(1 - cosine).sum() for cosine in cosines]),
            "tokens": p.idx.numel(), "predictions": p.idx[:, 1:].numel(), "loss": p.place(p.loss)}
    found = {}
    for length in sorted(set(p.options.remove)):
        if length == 1:
            found["1"] = [p.losses(p.end_without(s)) for s in p.watch(range(n))]
        else:
            found[str(length)] = [p.losses(p.h[s], blocks[s + length:])
                                  for s in p.watch(range(n - length + 1), f"run of {length},")]
    if p.options.sublayers:
        found["attn"] = [p.losses(blocks[l].without_attn(p.h[l]), blocks[l + 1:])
                         for l in p.watch(range(n), "attention")]
        found["ffn"] = [p.losses(blocks[l].without_ffn(p.h[l]), blocks[l + 1:])
                        for l in p.watch(range(n), "FFN")]
    return sums | {f"without {what}": p.place(torch.stack(x)) for what, x in found.items()}

def removal_score(model: Model, totals: Sums) -> Result:
    """removal: the mean loss after each removal. removal_stderr: the standard error of the growth
    of the loss.

    removal_halves: `chosen_by` is the growth on every other sequence, by which the cheapest removal
    is chosen. `price` is the growth on the rest, an unbiased price of that choice.
    """
    per_sequence = totals["predictions"] / len(totals["loss"])         # predictions
    out: Result = {"removal": {}, "removal_stderr": {}, "removal_halves": {},
                   "block_influence": totals["influence"] / totals["tokens"]}
    for key, losses in totals.items():
        if key.startswith("without "):
            what = key.removeprefix("without ")
            growth = (losses - totals["loss"]) / per_sequence             # (n, N)
            out["removal"][what] = losses.mean(-1) / per_sequence
            out["removal_stderr"][what] = standard_error(growth)
            out["removal_halves"][what] = {
                "chosen_by": growth[:, ::2].mean(-1), "price": growth[:, 1::2].mean(-1),
                "price_stderr": standard_error(growth[:, 1::2])}
    return out

def perplexity_ratios(r: Result, what: str) -> np.ndarray | None:
    """Perplexity without each block (or run, attention, FFN) / perplexity, (n,). A run of 2 cannot
    begin at the last block: nan there."""
    return np.exp(of_blocks(r, "removal", what) - r["loss"]) if what in r["removal"] else None

def perplexity_errors(r: Result, what: str) -> np.ndarray:
    """The standard errors of `perplexity_ratios`."""
    return perplexity_ratios(r, what) * of_blocks(r, "removal_stderr", what)

def of_blocks(r: Result, key: str, what: str) -> np.ndarray:
    """The values of a removal, (n,); nan for blocks where no run begins."""
    values = np.array(r[key][what], dtype=float)
    return np.pad(values, (0, len(r["block_influence"]) - len(values)), constant_values=math.nan)

def removal_columns(results: dict[str, Result]) -> list[Column]:
    """A line for each kind of removal."""
    names = {"1": "one block", "attn": "its attention", "ffn": "its FFN"}
    return [Column(names.get(what, f"run of {what}"), partial(perplexity_ratios, what=what),
                   errors=partial(perplexity_errors, what=what))
            for what in dict.fromkeys(what for r in results.values() for what in r["removal"])]

def removal_work(n: int, options: Options) -> tuple[float, float, float]:
    runs = [n - length + 1 for length in set(options.remove)] + [n, n] * options.sublayers
    return sum(m * (m - 1) / 2 for m in runs), sum(runs), 0

EXPERIMENTS["removal"] = Experiment(
    removal, removal_score,
    columns=[Column("removed", lambda r: perplexity_ratios(r, "1"),
                    "perplexity without the block / perplexity",
                    lambda r: perplexity_errors(r, "1")),
             Column("influence", lambda r: r["block_influence"], "1 - cosine of input and output")],
    scores={"influence": lambda r: mean(r["block_influence"]),
            "infl. sum": lambda r: sum(r["block_influence"]),
            "trend infl": lambda r: trend(r["block_influence"])},
    figure=lambda fig, results: lines(
        fig, results, removal_columns(results), "Removal of a block, cheapest first",
        "growth of the perplexity", scale="growth", sort=True),
    work=removal_work, stage=1)

# ---- Jacobian ------------------------------------------------------------------------------------
def jacobian(model: Model, p: Pass) -> Sums:
    """How far is a block's mean Jacobian from the identity?  (paper, probe 5)

    J_l = d h_{l+1} / d h_l. It is summed over output positions and averaged over sequences and
    input positions.
    """
    J = [p.jacobian(l) for l in p.watch(range(len(model.blocks)))]
    return {"jacobian": torch.stack(J), "positions": sampled_positions(p)}

def jacobian_score(model: Model, totals: Sums) -> Result:
    return {"jacobian": jacobian_scores(totals["jacobian"] / totals["positions"])}

def sampled_positions(p: Pass) -> int:
    """The number of tokens that are in the Jacobian's sample."""
    return p.before(p.few) * p.idx.size(1)

def jacobian_sum(f: Layer, x: Tensor) -> Tensor:
    """J[a, b], (d, d): d f_a / d x_b, summed over sequences, input positions and output positions;
    x (B, T, d)."""
    rows = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = wide(f(x)).sum((0, 1))                                        # (d,)
        for y_a in y:                    # batching these backward passes is not faster (measured)
            gradient, = torch.autograd.grad(y_a, x, retain_graph=True)
            rows.append(gradient.sum((0, 1), dtype=finest(x.device)))
    return to_cpu_float64(torch.stack(rows))

def jacobian_scores(J: Tensor) -> dict[str, Tensor]:
    """Scores of the mean Jacobians J (n, d, d), each (n,)."""
    d, norm = J.size(-1), torch.linalg.matrix_norm
    diagonal = J.diagonal(dim1=-2, dim2=-1)                               # (n, d)
    return {"deviation": norm(J - torch.eye(d)) / d,
            "diagonal_mean": diagonal.mean(-1),
            "diagonal_std": diagonal.std(-1),
            "spectral": norm(J, 2),
            "off_diagonal": norm(J - diagonal.diag_embed()) / math.sqrt(d * d - d)}

EXPERIMENTS["jacobian"] = Experiment(
    jacobian, jacobian_score,
    columns=[Column("|J-I|/d", lambda r: r["jacobian"]["deviation"],
                    "distance of its mean Jacobian from the identity")],
    scores={"|J-I|/d": lambda r: mean(r["jacobian"]["deviation"]),
            "trend J-I": lambda r: trend(r["jacobian"]["deviation"])},
    figure=lambda fig, results: lines(
        fig, results, [Column("", lambda r: r["jacobian"]["deviation"])],
        "Distance of the mean Jacobian J from the identity", r"$\|J - I\|_F\,/\,d$", scale="log"),
    work=lambda n, options: (0, 0, n),
    stage=3)

# ---- lens and contribution -----------------------------------------------------------------------
def lens(model: Model, p: Pass) -> Sums:
    """Read the prediction off every stream, as if the model ended there.  (arXiv 2505.13898)"""
    p.progress.done += len(p.h) * head_cost(model) * len(p.idx)
    return {"lens": lens_sums(model, p.h, p.idx), "tokens": p.idx.numel(),
            "predictions": p.idx[:, 1:].numel()}

def lens_score(model: Model, totals: Sums) -> Result:
    kl, loss, overlap = totals["lens"].T
    return {"lens": {"kl": kl / totals["tokens"], "loss": loss / totals["predictions"],
                     "top5_overlap": overlap / totals["tokens"]}}

@torch.no_grad()
def lens_sums(model: Model, streams: list[Tensor], idx: Tensor) -> Tensor:
    """(n + 1, 3), summed over tokens: KL(the model's output || the stream's), the stream's -log p,
    and the share of the model's 5 likeliest tokens among the stream's 5 likeliest."""
    sums = torch.zeros(len(streams), 3, dtype=finest(idx.device), device=idx.device)
    k = min(5, model.vocab_size)
    for i, targets in enumerate(idx[:, 1:, None]):       # one sequence at a time: logits are large
        own = log_p(model, streams[-1][i])
        top = own.topk(k).indices                                        # (T, k)
        for l, stream in enumerate(streams):
            q = log_p(model, stream[i])
            shared = (top[:, :, None] == q.topk(k).indices[:, None]).sum()
            loss = -q[:-1].gather(1, targets).sum()
            kl = own.exp().mul_(q.neg_().add_(own)).sum()                # p (ln p - ln q), in place
            sums[l] += torch.stack([kl, loss, shared.to(kl.dtype) / k])
    return sums

def log_p(model: Model, x: Tensor) -> Tensor:
    """The model's log-probabilities (T, vocab_size) for a last stream (T, d)."""
    return wide(model.logits(x[None]))[0].log_softmax(-1)

EXPERIMENTS["lens"] = Experiment(
    lens, lens_score,
    columns=[Column("lens KL", lambda r: r["lens"]["kl"][1:],
                    "KL from the model's output to the head's output after the block")],
    figure=lambda fig, results: lines(
        fig, results, [Column("", lambda r: r["lens"]["kl"][1:])],
        "Lens: the head's output after each block", "KL divergence (nats)"),
    work=lambda n, options: (0, n + 1, 0))

def contribution(model: Model, p: Pass) -> Sums:
    """How large is what attention and FFN add, and does it point where the stream points?  (after
    arXiv 2505.13898)"""
    sums = [contribution_sums(x, did) for x, did in zip(p.h, p.details)]
    return {"contribution": torch.stack(sums), "tokens": p.idx.numel()}

def contribution_score(model: Model, totals: Sums) -> Result:
    names = ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")
    return {"contribution": dict(zip(names, (totals["contribution"] / totals["tokens"]).T))}

def contribution_sums(x: Tensor, did: Detail) -> Tensor:
    """Compare what attention and FFN of a block add, f, with the stream x that f is added to:
    |f| / |x| for attention and FFN, then the cosine of f and x for both; (4,), token sums."""
    before_ffn = wide(x + did.attn)
    x, attn, ffn = wide(x), wide(did.attn), wide(did.ffn)
    return torch.stack([(attn.norm(dim=-1) / x.norm(dim=-1)).sum(),
                        (ffn.norm(dim=-1) / before_ffn.norm(dim=-1)).sum(),
                        F.cosine_similarity(x, attn, dim=-1).sum(),
                        F.cosine_similarity(before_ffn, ffn, dim=-1).sum()])

EXPERIMENTS["contribution"] = Experiment(
    contribution, contribution_score,
    columns=[Column("attn/x", lambda r: r["contribution"]["attn_ratio"],
                    "size of attention's output / size of the stream"),
             Column("ffn/x", lambda r: r["contribution"]["ffn_ratio"], "the same for the FFN")])

# ---- sparsity ------------------------------------------------------------------------------------
def sparsity(model: Model, p: Pass) -> Sums:
    """How sparse are weights, attention and experts?

    interaction_density is n_kv_head / n_head times effective_keys, the share of the visible keys
    that a query effectively attends to. This is our choice: the paper's formula is not known.
    """
    attention = []
    for l in p.watch(range(len(model.blocks))):
        with torch.no_grad(), SeenAttention() as seen:
            model.blocks[l](p.h[l])
        p.progress.done += len(p.idx)
        attention.append(attention_sums(seen.calls).to(p.idx.device))
    sums = {"attention": torch.stack(attention), "tokens": p.idx.numel(),
            "predictions": p.idx[:, 1:].numel()}
    if p.details[0].router is not None:
        load = torch.stack([did.router.load for did in p.details])        # (n, n_experts)
        sums["load"] = to_cpu_float64(load) * p.idx.numel()
    return sums

def sparsity_score(model: Model, totals: Sums) -> Result:
    entropy, mass90, effective = (totals["attention"] / totals["predictions"]).T
    out = {"weights": weight_sparsity(model), "below": BELOW,
           "attention": {"entropy": entropy, "keys_for_90_percent": mass90,
                         "effective_keys": effective},
           "interaction_density": effective * model.n_kv_head / (model.n_head or math.nan)}
    if "load" in totals:
        load = totals["load"] / totals["tokens"]
        out["experts"] = {"load": load, "never_used": (load == 0).double().mean(-1),
                          "entropy": torch.special.entr(load).sum(-1) / math.log(load.size(-1))}
    return {"sparsity": out}

@torch.no_grad()
def weight_sparsity(model: Model) -> dict[str, dict[str, list[float]]]:
    """For each kind of matrix, in every block: the share of weights smaller than BELOW x
    init_std (nan if init_std is not known), and the Hoyer measure: 0 if all weights are equal in
    size, 1 if only one is not zero."""
    kinds: dict[str, Any] = {}
    for block in model.blocks:
        for name, w in block.named_parameters():
            if w.dim() > 1:
                kind = kinds.setdefault(name.removesuffix(".weight"), {"below": [], "hoyer": []})
                w = w.to(finest(w.device)).abs()
                near_zero = (w < BELOW * (model.init_std or math.nan)).to(w.dtype).mean()
                total, norm, below = torch.stack([w.sum(), w.norm(), near_zero]).tolist()
                root, ratio = math.sqrt(w.numel()), total / max(norm, 1e-300)    # from 1 to root
                kind["below"].append(below if model.init_std else math.nan)
                kind["hoyer"].append((root - ratio) / (root - 1))
    return kinds

class SeenAttention(TorchFunctionMode):
    """Inside this context, records the arguments of each call of scaled_dot_product_attention, so
    that the statistics describe the attention that the block really computes."""
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

def attention_weights(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
                      ) -> Tensor:
    """The weights of scaled_dot_product_attention, (B, n_head, T, keys): its output if the values
    are the identity."""
    identity = torch.eye(key.size(-2), device=key.device, dtype=key.dtype)
    return F.scaled_dot_product_attention(
        query, key, identity.expand(*value.shape[:2], -1, -1), *args, **kwargs)

def attention_sums(calls: Sequence[tuple[tuple, dict]]) -> Tensor:
    """How sparse is the attention of a block that makes these calls? Three values, summed over
    tokens and averaged over the heads of all calls.

    1. Entropy / entropy of uniform attention to the visible keys. 2. The share of the visible keys
    that holds 90% of the weight. 3. exp(entropy) / visible keys. The first position sees one key
    and is left out. nan without calls: then the attention is computed in another way.
    """
    if not calls:
        return torch.full((3,), math.nan)
    sums = []
    for call in calls:
        (query, *args), kwargs = tree_map(
            lambda x: wide(x) if torch.is_tensor(x) and x.is_floating_point() else x, call)
        p = attention_weights(query, *args, **kwargs)[:, :, 1:]           # (B, n_head, T - 1, keys)
        uniform = attention_weights(0 * query, *args, **kwargs)[:, :, 1:]
        keys = 1 / uniform.amax(-1)                                       # how many are visible
        entropy = torch.special.entr(p).sum(-1)                           # (B, n_head, T - 1)
        needed = (p.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
        relative = entropy / keys.log().clamp_min(1e-30)                  # 0 if one key is visible
        values = (relative, needed / keys, entropy.exp() / keys)
        sums.append(torch.stack([value.mean(1).sum() for value in values]))
    return torch.stack(sums).to(finest(sums[0].device)).sum(0) / len(calls)

EXPERIMENTS["sparsity"] = Experiment(
    sparsity, sparsity_score,
    columns=[Column("attn.H", lambda r: r["sparsity"]["attention"]["entropy"],
                    "entropy of its attention / entropy of uniform attention")],
    work=lambda n, options: (n, 0, 0))

# ---- the whole measurement -----------------------------------------------------------------------
# The mean loss is measured every time.
LOSS = Experiment(
    lambda model, p: {"loss": p.place(p.loss), "predictions": p.idx[:, 1:].numel()},
    lambda model, totals: {"loss": totals["loss"].sum() / totals["predictions"]})

@torch.no_grad()
def probe(model: Model, tokens: Tensor, experiments: Sequence[str] | None = None, *,
          progress: Progress | None = None, into: Result | None = None, **options: Any) -> Result:
    """Measure every block of a model on tokens (B, T); returns the contents of probe.json.

    experiments: names, by default all that this model allows. options: those of `Options`. into: a
    dict that is filled as experiments are completed. In a process group, all ranks call this
    function with the same arguments and get the same result.

    Experiments run in stages, cheap ones first. A stage is complete before the next one begins.
    """
    o, progress = Options(**options), progress or Progress()
    check_tokens(model, tokens)
    if hasattr(model, "capture"):                   # HFModel: what its layers need for this length
        model.capture(tokens.size(1))
    names = measurable(model) if experiments is None else experiments
    check_request(model, names, o)
    chosen = {"loss": LOSS} | {name: EXPERIMENTS[name] for name in names}
    progress.work = work_of(model, tokens, chosen.values(), o)
    n, d = len(model.blocks), model.d
    is_small = 2 * n * (n + 7) * d * tokens.numel() < KEPT_IN_MEMORY        # bytes of all streams
    kept = list(passes(model, tokens, o, progress, is_small)) if is_small else None
    stages: dict[tuple[int, str], dict[str, Experiment]] = {}
    for name, e in chosen.items():
        # The maps are fitted during the first stage. If the streams are kept, each experiment is a
        # stage. Otherwise every stage computes the streams again, so a stage has more experiments.
        least = 2 if e.fits else 0 if is_small else 1
        stages.setdefault((max(e.stage, least), name if is_small else ""), {})[name] = e
    fit = Fit(model) if any(e.fits for e in chosen.values()) else None
    result, maps = {} if into is None else into, None
    result["seconds"] = {}
    for _, some in sorted(stages.items(), key=lambda item: item[0][0]):
        run_stage(model, some, kept or passes(model, tokens, o, progress), maps, fit, result)
        if fit:
            maps, fit = fit.solve(model.embed(tokens[:1])), None
    return result

def run_stage(model: Model, experiments: dict[str, Experiment], passes: Iterable[Pass],
              maps: Maps | None, fit: Fit | None, result: Result) -> None:
    """Add up the sums of these experiments, and those of `fit`, over all micro-batches. Then
    add the sums over all ranks and put the scores into the result."""
    totals: dict[str, Sums] = {name: {} for name in experiments}
    seconds = dict.fromkeys(experiments, 0.0)
    for p in passes:
        p.maps = maps
        for name, experiment in experiments.items():
            p.progress.experiment, begun = name, time.perf_counter()
            for key, x in experiment.sums(model, p).items():
                totals[name][key] = totals[name].get(key, 0) + to_cpu_float64(x)
            seconds[name] += time.perf_counter() - begun
        if fit:
            fit.add(p)
    for name, experiment in experiments.items():
        for x in totals[name].values():
            add_over_ranks(x)
        found = to_json(experiment.score(model, totals[name]))
        check(name in found, f"the score of {name} returns no entry {name!r}: tables look for it")
        result |= found
        result["seconds"][name] = seconds[name]

def passes(model: Model, tokens: Tensor, options: Options, progress: Progress,
           is_small: bool = False) -> Iterator[Pass]:
    """One pass for each micro-batch of this rank."""
    at_once = TOKENS_AT_ONCE
    if tokens.device.type != "cpu":             # a narrow model does not fill an H200 (measured)
        at_once *= max(2, 512 // model.d)
    rank, ranks = place_among_ranks()                                        # ranks take turns
    at_once = max(1, at_once // tokens.size(1))                              # sequences
    numbers = torch.arange(rank, len(tokens), ranks).split(at_once)
    for k, (idx, number) in enumerate(zip(tokens[rank::ranks].split(at_once), numbers), 1):
        p = forward(model, idx, number, len(tokens), options, progress)
        p.micro_batch, p.is_small = f", micro-batch {k} of {len(numbers)}", is_small
        yield p

def work_of(model: Model, tokens: Tensor, experiments: Collection[Experiment],
            options: Options) -> float:
    """The work of a rank, in evaluations of a block on a sequence. An experiment's `work` gives its
    numbers of block evaluations, of losses and of Jacobians for a sequence. A Jacobian takes d
    backward passes, which cost two evaluations each."""
    n = len(model.blocks)
    works = [experiment.work(n, options) for experiment in experiments]
    blocks, losses, jacobians = map(sum, zip(*works))
    few = min(1, (options.jacobian_samples or len(tokens) / 2) / len(tokens))
    maps = FITTING * n if any(experiment.fits for experiment in experiments) else 0
    each = n + blocks + maps + losses * head_cost(model) + 2 * model.d * jacobians * few
    return each * len(tokens) / place_among_ranks()[1]

def place_among_ranks() -> tuple[int, int]:
    """The number of this process among torchrun's processes, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def add_over_ranks(x: Tensor) -> None:
    """Add the other ranks' tensors to x, which is on the CPU."""
    if place_among_ranks()[1] > 1:
        dist.all_reduce(x)

def measurable(model: Model) -> list[str]:
    """The experiments that this model allows: some need a final norm, or separate sublayers."""
    left_out = {"released": getattr(model, "norm", None) is None,
                "contribution": not getattr(model, "splits", True)}
    return [name for name in EXPERIMENTS if not left_out.get(name)]

def check_tokens(model: Model, tokens: Tensor) -> None:
    """Raise UserError for sequences that cannot be measured."""
    (B, T), least = tokens.shape, max(2, place_among_ranks()[1])
    check(B >= least, f"{B} sequences: at least {least} are needed (--samples, or more text)")
    check(2 <= T <= model.context,
          f"sequences of {T} tokens: this model takes 2 to {model.context} (--length)")
    low, high = tokens.min().item(), tokens.max().item()
    check(0 <= low and high < model.vocab_size,
          f"tokens {low} to {high}: this model has tokens 0 to {model.vocab_size - 1}")

def check_request(model: Model, names: Sequence[str], o: Options) -> None:
    """Raise UserError for what cannot be measured, or would be measured wrongly."""
    n = len(model.blocks)
    for name in names:
        check(name in measurable(model),
              f"--only {name}: this model allows {','.join(measurable(model))}")
    check("removal" not in names or all(0 < length <= n for length in o.remove),
          f"--remove {','.join(map(str, o.remove))}: the model has {n} blocks")
    check(not o.sublayers or getattr(model, "splits", True),
          "--sublayers: attention and FFN of this model cannot be told apart")
    check(min(o.pairs, o.jacobian_samples) >= 0,
          "--pairs and --jacobian_samples must not be negative")

def to_json(x: Any) -> Any:
    """Tensors and arrays as numbers and lists, also inside dicts and lists."""
    return tree_map(lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else leaf, x)

# ---- tables --------------------------------------------------------------------------------------
TABLE_WIDTH = 110           # characters

def measured(r: Result) -> list[Experiment]:
    """The experiments whose results are in r."""
    return [experiment for name, experiment in EXPERIMENTS.items() if name in r]

def cells(column: Column, r: Result) -> list[str]:
    """The values of a column as text, with standard errors where there are some."""
    values = column.values(r)
    errors = column.errors(r) if column.errors else [None] * len(values)
    return [shown(number(value)) + ("" if math.isnan(number(error)) else f" +-{error:.1g}")
            for value, error in zip(values, errors)]

def shown(x: float) -> str:
    """x to four digits, or to as many as distinguish it from the threshold of usefulness."""
    if math.isnan(x):
        return "-"
    for digits in range(4, 18):
        text = f"{x:.{digits}g}"
        if float(text) != USEFUL or x == USEFUL:
            break
    return text

def side_by_side(first: list[str], columns: Iterable[list[str]]) -> str:
    """Columns of text beside the first one, in as many tables as the width requires."""
    tables: list[list[str]] = []
    for texts in columns:
        width = max(9, *map(len, texts)) + 1
        if not tables or len(tables[-1][0]) + width > TABLE_WIDTH:
            tables.append(first)
        tables[-1] = [f"{row}{text:>{width}}" for row, text in zip(tables[-1], texts, strict=True)]
    return "\n\n".join("\n".join(rows) for rows in tables)

def block_table(r: Result) -> str:
    """One line per block, then the meanings of the columns."""
    columns = [column for experiment in measured(r) for column in experiment.columns
               if column.values(r) is not None]
    texts = [[column.name, *cells(column, r)] for column in columns]
    first = ["block", *(f"{l:5d}" for l in range(max(map(len, texts), default=1) - 1))]
    meanings = "; ".join(f"{column.name}: {column.meaning}" for column in columns)
    return f"{side_by_side(first, texts)}\n{textwrap.fill(meanings, TABLE_WIDTH)}"

def scores(r: Result) -> dict[str, float]:
    """The values for the whole model in a result, by column, always in the same order."""
    found = {"loss": r["loss"]} if "loss" in r else {}
    for experiment in measured(r):
        found |= {name: float(score(r)) for name, score in experiment.scores.items()}
    if "average" in r.get("tasks", {}):
        found["accuracy"] = r["tasks"]["average"]["acc"]
    return found

def decimal(x: float) -> str:
    """x to four decimals, or in scientific notation where these would hide a small value."""
    if math.isnan(x):
        return "-"
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.001 else f"{x:.2e}"

def score_table(results: dict[str, Result]) -> str:
    """One line per model, with the columns that were measured for all of them."""
    rows = [scores(r) for r in results.values()]
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    width = max(map(len, results))
    texts = [[f"{name:>10}", *(decimal(row[name]) for row in rows)] for name in columns]
    return side_by_side([f"{label:{width}}" for label in ("", *results)], texts)

# ---- the closing summary -------------------------------------------------------------------------
CHEAP = 1.1                 # removing a block is cheap if it multiplies the perplexity by less
ENOUGH = 16                 # sequences; with fewer, a standard error is itself too uncertain
LADDER = ("in the paper's ladder of 32 layers it is 0.53 for the dense baseline, then 0.59 with "
          "context 4096, 0.63 with weight decay 0.3, 0.66 with GQA (G = 2) and 0.75 with MoE")

def summary(r: Result, path: str = "CKPT") -> list[str]:
    """What the measurement says about the model, one string per statement. A difference counts if
    it exceeds two standard errors."""
    said = []
    enough = r.get("run", {}).get("samples", 0) >= ENOUGH
    if "usefulness" in r:
        said += useful_blocks(r["usefulness"], enough)
    for what, losses in r.get("removal", {}).items():
        if what.isdigit() and len(losses) > 1:
            said.append(cheapest(r, int(what), path, enough))
    if len(r.get("variance", [])) > 2:
        first, last = r["variance"][1], r["variance"][-1]
        said.append(f"The variance of the stream is {first:.3g} after the first block and "
                    f"{last:.3g} after the last, {last / max(first, 1e-38):.3g} times as much.")
    if "sparsity" in r:
        entropy = r["sparsity"]["attention"]["entropy"]
        unseen = [l for l, x in enumerate(entropy) if math.isnan(number(x))]
        if unseen:
            said.append(f"The sparsity of attention is not measured in {named(unseen)}: torch's "
                        "scaled_dot_product_attention is not called there.")
    if number(r.get("permutation_standard_error")) > 0:
        said.append(f"The permutation score {r['permutation_mean']:.4g} is the mean over "
                    f"{r['permutation_pairs']} sampled pairs, with a standard error of "
                    f"{r['permutation_standard_error']:.2g}.")
    return said

def useful_blocks(u: Result, enough: bool) -> list[str]:
    """Which blocks are useful, which are uncertain, and their share beside the paper's values."""
    n = len(u["ratio"])
    above = [ratio - USEFUL for ratio in u["ratio"]]
    certain = [enough and abs(x) > 2 * number(e) for x, e in zip(above, u["ratio_stderr"])]
    useful = [l for l in range(n) if certain[l] and above[l] > 0]
    uncertain = [l for l in range(n) if not certain[l]]
    if u["loose_fit"]:
        return ["The affine maps were fitted to fewer than 10 (d + 1) tokens, which is too few. "
                "More --samples would tell which blocks are useful."]
    if len(uncertain) == n:
        return ["It is not certain which blocks are useful: more --samples would tell."]
    said = (f"Useful (the best affine map in the block's place multiplies the loss by more than "
            f"{USEFUL}): {named(useful)}.")
    share = f"{len(useful) / n:.2f}"
    if uncertain:
        said += f" Not certain for {named(uncertain)}: more --samples would tell."
        share = f"between {share} and {(len(useful) + len(uncertain)) / n:.2f}"
    return [said, f"The share of useful blocks is {share}; {LADDER}."]

def cheapest(r: Result, length: int, path: str, enough: bool) -> str:
    """Which block or run of blocks could go, and at what price.

    It is chosen on every other sequence. Its price is measured on the rest, since on the sequences
    that chose it the price is too low.
    """
    halves = r["removal_halves"][str(length)]
    s = int(np.argmin(halves["chosen_by"]))
    growth, error = halves["price"][s], number(halves["price_stderr"][s])
    blocks = list(range(s, s + length))
    price = shown(math.exp(growth))
    if not math.isnan(error):
        price += f" +- {math.exp(growth) * error:.1g}"
    said = (f"{named(blocks)}, for {price} times the perplexity (chosen and measured on different "
            "sequences)")
    if not enough or not abs(growth - math.log(CHEAP)) > 2 * error:
        return f"Cheapest to remove: {said}. Too uncertain to act on: more --samples would tell."
    if growth > math.log(CHEAP):
        return f"Cheapest to remove, but not cheap: {said}."
    return f"Could go: {said}:\npython probe.py {path} --drop {','.join(map(str, blocks))}"

def named(blocks: Sequence[int]) -> str:
    """As "blocks 0, 1 and 10", or "no block"."""
    if not blocks:
        return "no block"
    *others, last = map(str, blocks)
    return f"blocks {', '.join(others)} and {last}" if others else f"block {last}"

# ---- figures -------------------------------------------------------------------------------------
# A panel is drawn into a subfigure: alone in a file of its own, or on the page.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe, Ito
STYLES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
         "lines.markersize": 3, "lines.linewidth": 1.2, "legend.frameon": False,
         "legend.fontsize": 7, "legend.handlelength": 3}

def lines(fig: Any, results: dict[str, Result], columns: Sequence[Column], title: str, ylabel: str,
          scale: str = "linear", threshold: float | None = None, sort: bool = False) -> None:
    """Lines over the blocks: one for each column. With several models, there is one line per
    model, for the first column that all models have.

    scale: linear, log, or growth, which shows ratios as growth in percent. A bar is two standard
    errors long on each side. threshold: draws a line there. sort: the blocks are in the order of
    the first column's values.
    """
    ax, growth = fig.subplots(), scale == "growth"
    if growth:
        growth_axis(ax)
    columns = [column for column in columns
               if all(column.values(r) is not None for r in results.values())]
    for k, r in enumerate(results.values()):
        order = np.argsort(columns[0].values(r)) if sort else slice(None)
        for i, column in enumerate(columns if len(results) == 1 else columns[:1]):
            y = np.array(column.values(r), dtype=float)[order]
            bars = 2 * np.array(column.errors(r), dtype=float)[order] if column.errors else 0 * y
            if growth:
                y, bars = 100 * (y - 1), 100 * bars
            ax.errorbar(range(len(y)), y, bars, marker="o", elinewidth=0.8,
                        linestyle=STYLES[i % len(STYLES)],
                        color=COLORS[(k + i) % len(COLORS)],              # k or i is 0
                        label=column.name if len(results) == 1 else "")
    ax.set(xlabel="block", ylabel=f"{ylabel}, ± 2 s.e." if columns[0].errors else ylabel)
    ax.locator_params("x", integer=True)
    if sort and len(results) > 1:
        ax.set_xlabel("rank of the block, cheapest first")
    elif sort:
        ax.set_xticks(range(len(order)), order, fontsize=min(8, 150 / len(order)))
    if threshold:
        ax.axhline(100 * (threshold - 1), color="black", linestyle="--", linewidth=0.8,
                   label=f"useful above {100 * (threshold - 1):.0f}%")
    if growth:
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set_ylim(bottom=max(-100, ax.get_ylim()[0]))      # long error bars go below -100%
    elif scale == "log":
        ax.set_yscale("log")
    finish(fig, ax, title)

def growth_axis(ax: Any) -> None:
    """Make the y axis one of percent: linear up to 1%, then logarithmic."""
    from matplotlib.ticker import SymmetricalLogLocator
    ax.set_yscale("symlog", linthresh=1, linscale=0.5)
    ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 3)))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:+,.0f}%" if y else "0%")

def finish(fig: Any, ax: Any, title: str) -> None:
    """Add the title, and a legend unless its only entry would be a line."""
    fig.suptitle(textwrap.fill(title, 52), weight="bold", fontsize=9)
    handles, names = ax.get_legend_handles_labels()
    if len(names) > 1 or names and ax.images:
        fig.legend(handles, names, loc="outside lower center", ncols=3)

def matrices(fig: Any, results: dict[str, Result], key: str, title: str, xlabel: str, ylabel: str,
             unit: str, blank: Callable[[int], np.ndarray], errors: str = "") -> None:
    """A heat map per model, all on one logarithmic scale of at most three decades.

    key, errors: the matrix and its standard errors in a result. blank: np.eye or np.tri, 1 where
    there is nothing to show. Gray pairs were not sampled. A white dot marks a value below two
    standard errors.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator
    maps = [np.array(r[key], dtype=float) for r in results.values()]
    maps = [np.where(blank(len(a)), math.nan, a) for a in maps]
    high = max(np.nanmax(a, initial=0) for a in maps) or 1.0
    lowest = min(np.nanmin(a, initial=high) for a in maps)
    low = min(max(lowest, high / 1000), high / 2)
    axes = fig.subplots(1, len(maps), squeeze=False)[0]
    for ax, a, (label, r) in zip(axes, maps, results.items()):
        ax.imshow(np.where(blank(len(a)), 1.0, 0.85), cmap="gray", vmin=0, vmax=1, aspect="auto")
        image = ax.imshow(np.maximum(a, low), norm=LogNorm(low, high), aspect="auto")
        if errors:
            y, x = np.nonzero(a < 2 * np.array(r[errors], dtype=float))
            ax.plot(x, y, "o", color="white", markeredgecolor="black", markeredgewidth=0.2,
                    markersize=min(3, 45 / len(a)),
                    label="below two standard errors" if len(x) else "")
        ax.set(xlabel=xlabel, ylabel=ylabel, title=label[:30] if len(maps) > 1 else "")
        ax.locator_params("both", integer=True)
    finish(fig, axes[0], title)
    bar = fig.colorbar(image, ax=list(axes), label=unit, format="%g",
                       ticks=LogLocator(subs=(1, 2, 5)),
                       extend="min" if lowest < low else "neither")
    bar.minorticks_off()

def training(fig: Any, results: dict[str, Result]) -> None:
    """Loss and last variance over training, from the log.jsonl of the only run."""
    (r,), (upper, lower) = results.values(), fig.subplots(2, sharex=True)
    for i, (ax, key) in enumerate([(upper, "loss"), (upper, "val_loss"), (lower, "variance")]):
        found = [(line["step"], np.ravel(line[key])[-1]) for line in r["log"] if key in line]
        ax.plot(*np.array(found).reshape(-1, 2).T, color=COLORS[i], linewidth=0.8, label=key,
                marker="o" if len(found) < 100 else "")
    upper.set(ylabel="nats per token")
    lower.set(xlabel="step", ylabel="last variance")
    finish(fig, upper, "Loss and variance over training")

def page(results: dict[str, Result], names: Sequence[str]) -> Any:
    """A figure with the panels of these experiments. The page of one run also has curves over
    training."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    panels = [EXPERIMENTS[name].figure for name in names]
    if len(names) > 1 and len(results) == 1 and [*results.values()][0].get("log"):
        panels.append(training)
    across = min(len(panels), 3 if len(results) == 1 else 2)
    down, width = math.ceil(len(panels) / across), 2.6 + 1.6 * len(results)             # inches
    fig = Figure((width * across, 2.9 * down + 0.15 * len(results) + 0.3), layout="constrained")
    headings = [f"{label}: loss {r['loss']:.4f}" for label, r in results.items()]
    if len(results) > 1:
        handles = [Line2D([], [], color=COLORS[k % len(COLORS)]) for k in range(len(results))]
        fig.legend(handles, headings, loc="outside upper center", fontsize=8)
    else:
        fig.suptitle(headings[0], fontsize=8)
    for cell, panel in zip(fig.subfigures(down, across, squeeze=False).flat, panels):
        panel(cell, results)
    return fig

def draw(results: dict[str, Result], out: Path) -> str:
    """Draw the panels that all results have, on one page and as single files. Earlier figures
    are deleted. Returns a line that says where the figures are."""
    for name in (*EXPERIMENTS, "probe"):
        (out / f"{name}.png").unlink(missing_ok=True)
    try:
        import matplotlib
    except ImportError:
        return "no figures without matplotlib: pip install matplotlib"
    names = [name for name, experiment in EXPERIMENTS.items()
             if experiment.figure and all(name in r for r in results.values())]
    if not names:
        return ""
    with matplotlib.rc_context(STYLE):
        for name in names:
            page(results, [name]).savefig(out / f"{name}.png", dpi=150)
        page(results, names).savefig(out / "probe.png", dpi=150)
    return f"figures in {out}, on one page in {out / 'probe.png'}"

# ---- dropping blocks -----------------------------------------------------------------------------
class Part:
    """A model with only some of its blocks."""
    def __init__(self, model: Model, blocks: Sequence[Layer]) -> None:
        self.model, self.blocks = model, blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

def cheapest_drops(model: Model, tokens: Tensor, count: int, verbose: bool = False) -> list[int]:
    """Choose `count` blocks, one after the other. Each is the cheapest to remove from the model
    that no longer has the blocks chosen before."""
    kept, gone = list(range(len(model.blocks))), []
    while len(gone) < count:
        part = Part(model, [model.blocks[l] for l in kept])
        r = probe(part, tokens, ["removal"], progress=Progress(verbose))
        which = int(np.argmin(r["removal"]["1"]))
        gone.append(kept.pop(which))
        if verbose:
            print(f"without block {gone[-1]}: loss {r['removal']['1'][which]:.4f}", flush=True)
    return gone

def without_blocks(saved: dict[str, Any], drop: Sequence[int]) -> dict[str, Any]:
    """A checkpoint of train.py without the blocks `drop` and the optimizer, for --init_from."""
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
            scaled = name.endswith(("attn_norm.weight", "ffn_norm.weight"))
            if settings.get("norm") == "lns" and scaled:     # lns divides by sqrt(l + 1)
                factor = math.sqrt((new + 1) / (l + 1))
            weights[name.replace(f".{l}.", f".{new}.", 1)] = w * factor
    numbers = saved.get("kept", range(n_layer))              # before any block was dropped
    return {"model": weights, "settings": {**settings, "n_layer": len(kept)},
            "step": saved.get("step", 0), "tokenizer": saved["tokenizer"],
            "kept": [numbers[l] for l in kept]}

# A short run at a tenth of train.py's peak learning rate. A higher rate does more harm (measured).
HEALING = "--learning_rate=3e-4 --warmup_steps=20 --max_steps=200"

def drop_blocks(args: Any, path: Path, model: Model, saved: dict[str, Any]) -> None:
    """--drop: choose the blocks, save the model without them, say what it costs."""
    check(not args.save or len(args.checkpoints) == 1, "--save: give one model, not several")
    n, auto = len(model.blocks), args.drop.startswith("auto:")
    drop = integers(args.drop.removeprefix("auto:"), "--drop")
    check((len(drop) == 1 and 0 < drop[0] < n) if auto else
          (set(drop) <= set(range(n)) and len(set(drop)) < n),
          f"--drop {args.drop}: {path} has blocks 0 to {n - 1}, and one must stay")
    default = home_of(path) / "pruned.pt"
    if isinstance(model, HFModel):
        default = Path("out", f"{path.name}_pruned")
    target = Path(args.save or default)
    check(target.resolve() != path.resolve(), f"--save {target} is the model itself")
    if isinstance(model, HFModel):
        check_empty(target)
    else:
        check(not target.exists(), f"{target} exists: give another --save")
    target.parent.mkdir(parents=True, exist_ok=True)
    tokens, _ = read_tokens(args, model, saved)
    if auto:        # the sequences that chose the blocks would show too low a price
        drop = cheapest_drops(model, tokens[::2], drop[0], verbose=True)
        tokens = tokens[1::2]
    whole = probe(model, tokens, [])["loss"]
    heal = "any trainer of Hugging Face models can train it further"
    if isinstance(model, HFModel):
        prune_hf(model, drop, target, saved["tokenizer"], args.device_map)
    else:
        saved["tokenizer"] = copy_tokenizer(saved["tokenizer"], target.parent)
        save_checkpoint(target, without_blocks(saved, drop))
        heal = (f"train it further:  python train.py --init_from={target} --out_dir=out/healed "
                f"--data={saved['settings'].get('data', 'CORPUS')} {HEALING}")
    smaller, _ = load_model(target, tokens.device, getattr(torch, args.dtype), args.device_map)
    pruned = probe(smaller, tokens, [])["loss"]
    print(f"{target}: {path} without {named(sorted(set(drop)))}; loss "
          f"{whole:.4f} -> {pruned:.4f}, perplexity x{math.exp(pruned - whole):.3f}\n{heal}")

# ---- downstream tasks, by lm-evaluation-harness --------------------------------------------------
def run_tasks(model: GPT | HFModel, tokenizer: str, names: Sequence[str], folder: str | None,
              progress: Callable[[str], None]) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness and print its table. Returns the scores of each task:
    {task: {"acc": .., "acc_stderr": .., "n": questions}, ..}.

    folder: a folder with further tasks, one YAML file each. "average" is the mean over tasks of
    acc_norm, or of acc where a task has no acc_norm.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)            # reads thousands of files: 10 s
    unknown = sorted(set(names) - set(manager.all_tasks))
    check(not unknown, f"--tasks: no task {', '.join(unknown)}: `lm_eval ls tasks` lists all, "
                       "--task_folder DIR adds others")
    found = simple_evaluate(make_scorer(model, tokenizer, progress), tasks=list(names),
                            task_manager=manager, log_samples=False)
    if found is None:                                         # on all ranks but the first
        return {}
    print("", make_table(found), sep="\n")
    out: dict[str, Any] = {}
    for name, metrics in found["results"].items():
        out[name] = {key.split(",")[0]: value for key, value in metrics.items()
                     if isinstance(value, float)}
        if name in found["n-samples"]:
            out[name]["n"] = found["n-samples"][name]["effective"]
    primary = [r.get("acc_norm", r["acc"]) for r in out.values() if "n" in r and "acc" in r]
    if primary:
        out["average"] = {"acc": sum(primary) / len(primary)}
    return out

def make_scorer(model: GPT | HFModel, tokenizer: str, progress: Callable[[str], None]) -> Any:
    """A model for lm-evaluation-harness. It calls the model's own forward pass."""
    from lm_eval.api.model import TemplateLM
    enc = get_tokenizer(tokenizer)
    end = enc.eot_token

    class Scorer(TemplateLM):
        eot_token_id = end
        bos = getattr(enc, "bos", None)
        prefix_token_id = end if bos is None else bos          # stands for an empty context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                       **kwargs: Any) -> list[int]:
            ids = encode(tokenizer, string)
            return ids if add_special_tokens is False else [*getattr(enc, "start", []), *ids]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [tuple(pair) for _, *pair in requests], progress)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise UserError("--tasks: one task generates text or scores whole documents: give only "
                            "tasks that compare given answers")

        loglikelihood_rolling = generate_until
    return Scorer()

@torch.no_grad()
def loglikelihoods(model: GPT | HFModel, pairs: Sequence[tuple[list[int], list[int]]],
                   progress: Callable[[str], None] = lambda line: None) -> list[tuple[float, bool]]:
    """For each pair of token lists (context, continuation): log p(continuation | context) in nats,
    and whether every token of the continuation is the likeliest.

    A pair that exceeds the model's context is cut on the left. A batch holds pairs of similar
    length, padded on the right. No token sees the ones after it, so the padding needs no mask.
    Ranks take turns at the batches.
    """
    rows = [(context + continuation)[-model.context - 1:] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    device = next(iter(model.parameters())).device
    at_once = TOKENS_AT_ONCE // 2 if device.type == "cpu" else 2 * TOKENS_AT_ONCE
    rank, ranks = place_among_ranks()
    out = torch.zeros(len(rows), 2, dtype=torch.float64)       # log p, count of misses
    start = number = 0
    while start < len(order):
        longest = len(rows[order[start]]) - 1                  # the last token is only predicted
        batch = order[start:start + max(1, at_once // longest)]
        start, number = start + len(batch), number + 1
        if number % ranks != rank:
            continue
        progress(f"{len(order) - start} of {len(order)} requests to go")
        idx = torch.tensor([rows[i][:-1] + [0] * (longest + 1 - len(rows[i])) for i in batch])
        asked = [(b, place - 1, rows[i][place], i) for b, i in enumerate(batch)
                 for place in range(max(1, len(rows[i]) - len(pairs[i][1])), len(rows[i]))]
        b, place, token, request = torch.tensor(asked).T
        logits = wide(logits_at(model, idx.to(device), b.to(device), place.to(device)))   # (N, V)
        nats = -F.cross_entropy(logits, token.to(device), reduction="none")
        missed = logits.argmax(-1) != token.to(device)
        out.index_add_(0, request, to_cpu_float64(torch.stack((nats, missed.to(nats)), dim=1)))
    add_over_ranks(out)
    return [(value, wrong == 0) for value, wrong in out.tolist()]

def logits_at(model: GPT | HFModel, idx: Tensor, b: Tensor, place: Tensor) -> Tensor:
    """The logits (N, V) at N places (b, place) of the sequences idx (B, T)."""
    if isinstance(model, HFModel):
        return model.inner(idx, use_cache=False).logits[b, place]
    x = streams_of(model.blocks, model.embed(idx))[-1]
    return model.logits(x[b, place][None])[0]

# ---- the command line ----------------------------------------------------------------------------
def read_tokens(args: Any, model: Model, saved: dict[str, Any]) -> tuple[Tensor, str]:
    """The sequences to measure on, (B, T) int64, and where they come from."""
    device = next(iter(model.parameters())).device
    if args.tokens:
        check(Path(args.tokens).is_file(), f"--tokens {args.tokens}: there is no such file")
        array = np.load(args.tokens, allow_pickle=False)
        check(array.ndim == 2 and array.dtype.kind in "iu",
              f"--tokens {args.tokens}: an array of integers of shape (B, T) is needed")
        return torch.from_numpy(array.astype(np.int64)).to(device), args.tokens
    T = args.length or min(512, model.context)
    check(2 <= T <= model.context, f"--length {T}: this model takes 2 to {model.context} tokens")
    source, tokenizer = args.data or saved["settings"].get("data"), saved["tokenizer"]
    if source and not Path(source).is_file():
        corpus = Corpus(source)
        check(same_tokenizer(corpus.tokenizer, tokenizer),
              f"{source} has {corpus.tokenizer!r} tokens, the model has {tokenizer!r}: "
              "give another --data")
        n, read = corpus.n_windows("val", T), lambda i: corpus.read("val", i * T, T)
        origin = f"{source} (validation)"
    else:                                      # texts, each followed by an end-of-text token
        texts, end = PYTHON_TOPICS.values(), get_tokenizer(tokenizer).eot_token
        ids = [i for text in (documents(source) if source else texts)
               for i in (*encode(tokenizer, text), end)]
        n, read = max(len(ids) - 1, 0) // T, lambda i: ids[i * T:(i + 1) * T]
        origin = source or "Python's documentation (for other text: --data)"
    chosen = np.random.default_rng(args.seed).permutation(n)[:max(args.samples, 0)]
    rows = [read(i) for i in np.sort(chosen).tolist()]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, T)).to(device), origin

def integers(text: str, flag: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as e:
        raise UserError(f"{flag} {text}: numbers such as 1,2,4 are expected") from e

def sample(args: Any, model: Model, saved: dict[str, Any]) -> None:
    """--sample: print a prompt and how the model continues it."""
    enc, device = get_tokenizer(saved["tokenizer"]), next(iter(model.parameters())).device
    prompt = torch.tensor([encode(saved["tokenizer"], args.sample) or [enc.eot_token]])   # (1, T)
    if isinstance(model, HFModel):
        torch.manual_seed(args.seed)
        padding = list(range(enc.n_vocab, model.vocab_size)) or None
        how = {"temperature": args.temperature, "top_k": args.top_k} if args.temperature else {}
        text = model.inner.generate(prompt.to(device), max_new_tokens=args.new_tokens,
                                    do_sample=bool(how), suppress_tokens=padding, **how)
    else:
        text = generate(model, prompt.to(device), args.new_tokens, args.temperature,
                        args.top_k or enc.n_vocab, enc.n_vocab,
                        torch.Generator(device).manual_seed(args.seed))
    print(decode(saved["tokenizer"], text[0].tolist()))

def measure(args: Any, path: Path, model: Model, saved: dict[str, Any], label: str,
            out: Path) -> Result:
    """Measure one model, write probe.json and figures, print tables and summary.

    All ranks measure; the first one writes and prints. After Ctrl-C or an error such as a lack of
    memory, the experiments that are complete are still written.
    """
    make_folder(out, "--out")
    before = read_result(out)                            # fails now, not after the measurement
    result: Result = {"run": {
        "checkpoint": str(path), "weights": checksum(model), "dtype": args.dtype,
        "device": args.device, "settings": saved["settings"]}}
    is_first, failed = place_among_ranks()[0] == 0, None
    try:
        if args.only != "tasks":
            measure_blocks(args, model, saved, result, Progress(is_first))
        if args.tasks:
            names, progress = args.tasks.split(","), Progress(is_first, "tasks")
            result["tasks"] = run_tasks(model, saved["tokenizer"], names, args.task_folder,
                                        progress.say)
    except (KeyboardInterrupt, Exception) as e:
        failed = e
    if is_first and ("loss" in result or "tasks" in result):
        show(path, model, label, result, write_result(out, result, before), out)
        if failed:
            names = args.only.split(",") if args.only else measurable(model)
            names += ["tasks"] if args.tasks and "tasks" not in names else []
            print("Not measured:", ", ".join(name for name in names if name not in result))
    if failed:
        raise failed
    return result

def measure_blocks(args: Any, model: Model, saved: dict[str, Any], result: Result,
                   progress: Progress) -> None:
    """Run the experiments. Put their results and the options into `result`."""
    tokens, origin = read_tokens(args, model, saved)
    options = {"remove": integers(args.remove, "--remove"), "sublayers": args.sublayers,
               "pairs": args.pairs, "jacobian_samples": args.jacobian_samples, "seed": args.seed}
    result["run"] |= options | {
        "tokens": origin, "samples": len(tokens), "length": tokens.size(1),
        "checksum": zlib.crc32(tokens.cpu().numpy().tobytes())}
    names = [name for name in args.only.split(",") if name not in ("", "tasks")]
    probe(model, tokens, names or None, **options, into=result, progress=progress)

def show(path: Path, model: Model, label: str, result: Result, whole: Result, out: Path) -> None:
    """Print the tables of this measurement, draw what probe.json holds, print the summary."""
    if "loss" in result:
        ran = result["run"]
        print(f"\n{path} on {ran['samples']} x {ran['length']} tokens of {ran['tokens']}")
        print(block_table(result), end="\n\n")
    print(score_table({label: result}), *getattr(model, "notes", []), sep="\n")
    figures = draw({label: whole | {"log": read_log(path)}}, out)
    print("", f"{out / 'probe.json'} written", figures, sep="\n")
    for line in summary(result, str(path)):
        sentence, *command = line.split("\n")
        print(textwrap.fill(sentence, TABLE_WIDTH, subsequent_indent="  "), *command, sep="\n    ")

def checksum(model: Model) -> int:
    """One number for the weights of a model."""
    found = 0
    for name, w in sorted(model.named_parameters()):
        values = w.detach().cpu().contiguous().view(torch.uint8).numpy()
        found = zlib.crc32(values, zlib.crc32(name.encode(), found))
    return found

def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl beside a checkpoint of train.py, without an incomplete last line."""
    file = path.parent / "log.jsonl"
    if path.name != "ckpt.pt" or not file.exists():
        return []
    found = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in found if line.endswith("\n")]

def read_result(out: Path) -> Result | None:
    """The contents of probe.json in a folder, if there is one."""
    file = out / "probe.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

# Options of single experiments. probe.json keeps them as long as the experiment's results.
USED_BY = {"removal": ("remove", "sublayers"), "permutation": ("pairs", "seed"),
           "jacobian": ("jacobian_samples",)}
# Entries of probe.json that are dicts with a part for each option or experiment.
IN_PARTS = ("removal", "removal_stderr", "removal_halves", "seconds", "run")

def write_result(out: Path, result: Result, before: Result | None) -> Result:
    """Write probe.json and return its contents. before: what it held.

    If the file holds results of the same weights and dtype on the same tokens, they are kept.
    Otherwise the file becomes probe.json.old.
    """
    file = out / "probe.json"
    whole = json.loads(json.dumps(result), parse_constant=lambda constant: None)    # null for nan
    if before:
        old, new = before["run"], whole["run"]
        if all(old[key] == new[key] for key in ("weights", "dtype", "checksum", "samples", "length")
               if key in old and key in new):
            for name, keys in USED_BY.items():
                whole["run"] |= {key: old[key] for key in keys if name not in whole and key in old}
            parts = {key: before[key] | whole[key] for key in IN_PARTS
                     if key in before and key in whole}
            whole = before | whole | parts
        else:
            os.replace(file, f"{file}.old")
            print(f"{file} was measured with other weights, dtype or tokens: now {file.name}.old")
    write_json(file, whole)
    return whole

def draw_again(path: Path, label: str, out: Path) -> Result:
    """--figures: draw what is in probe.json."""
    need("matplotlib", "--figures")
    r = read_result(out)
    check(r is not None, f"no {out / 'probe.json'}: measure with `python probe.py {path}`")
    r["log"] = read_log(path)
    print(draw({label: r}, out))
    return r

def compare(args: Any, results: dict[str, Result]) -> None:
    """The scores of several models side by side, and their figures."""
    out = Path(args.out or home_of(args.checkpoints[0]).parent / "comparison")
    make_folder(out, "--out")
    print("", score_table(results), "", f"comparison: {draw(results, out)}", sep="\n")
    runs = [r["run"] for r in results.values()]
    if len({(ran.get("checksum"), ran.get("length")) for ran in runs}) > 1:
        print("These models were measured on different tokens. Their losses cannot be compared.")

def make_folder(out: Path, flag: str) -> None:
    """Make a folder for results. Before the work begins, find out whether it can be written to."""
    out.mkdir(parents=True, exist_ok=True)
    check(os.access(out, os.W_OK), f"cannot write to {out}: choose another {flag}")

def home_of(path: Path) -> Path:
    """The folder of a model's results: beside ckpt.pt, X/ for X.pt, out/NAME for Hugging Face. If
    out/NAME is the model itself, its results are in out/NAME_probe."""
    if path.is_file():
        return path.parent if path.name == "ckpt.pt" else path.with_suffix("")
    home = Path("out", path.resolve().name)
    return home if home.resolve() != path.resolve() else Path(f"{home}_probe")

def place_of_results(args: Any, path: Path, taken: dict[str, Result]) -> tuple[str, Path]:
    """The label of a model among the others, and the folder of its results."""
    home = home_of(path)
    name = (home if path.is_file() else path).resolve().name
    label = str(path).replace("/", "_") if name in taken else name
    if not args.out:
        return label, home
    return label, Path(args.out, label) if len(args.checkpoints) > 1 else Path(args.out)

def read_arguments() -> Any:
    parser = Parser(prog="probe.py", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="MODEL",
        help="a checkpoint of train.py, a Hugging Face folder, or a hub id OWNER/NAME[@REVISION]")
    add("--only", default="", metavar="NAMES",
        help="experiments, separated by commas (default: all that the model allows): "
             f"{', '.join(EXPERIMENTS)}; or tasks, to run --tasks alone")
    add("--data", help="a prepared corpus, whose validation split is used, or a text file "
                       "(default: the run's corpus, or else Python's documentation)")
    add("--samples", type=int, default=100, help="number of sequences (default 100)")
    add("--length", type=int, help="tokens per sequence (default: the context, at most 512)")
    add("--tokens", metavar="FILE.npy", help="token ids (B, T), integers, instead of --data")
    add("--seed", type=int, default=0, help="for sequences, pairs and --sample (default 0)")
    add("--remove", default="1", metavar="LENGTHS",
        help="lengths of the runs of blocks to remove, such as 1,2,4 (default 1)")
    add("--sublayers", action="store_true", help="also remove each attention and each FFN alone")
    add("--pairs", type=int, default=0, help="random pairs of blocks to swap (default: all)")
    add("--jacobian_samples", type=int, default=0, metavar="N",
        help="number of sequences for the Jacobian (default: half of --samples)")
    add("--tasks", help="tasks of lm-evaluation-harness, such as arc_easy,hellaswag")
    add("--task_folder", help="folder with more tasks as YAML files, which may run Python code")
    add("--tokenizer", help="instead of the model's own: bytes, a tiktoken encoding such as gpt2, "
                            "a Hugging Face folder or hub id")
    add("--out", help="folder for the results (default: the folder of ckpt.pt, X/ for X.pt, "
                      "out/NAME for Hugging Face); several models get a folder each inside it")
    add("--drop", metavar="BLOCKS",
        help="save the model without these blocks, such as 3,7, or without the N cheapest: auto:N")
    add("--save", metavar="PATH",
        help="where --drop saves the model (default: pruned.pt in the folder of the results, "
             "out/NAME_pruned for Hugging Face)")
    add("--sample", metavar="TEXT", help="print how the model continues this text")
    add("--new_tokens", type=int, default=200, metavar="N",
        help="tokens for --sample to write (default 200)")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="for --sample (default 0.8); 0: always the likeliest token")
    add("--top_k", type=int, default=50, metavar="K",
        help="--sample chooses among the K likeliest tokens (default 50); 0: among all")
    add("--export", metavar="DIR", help="write the checkpoint as a Hugging Face folder")
    add("--figures", action="store_true", help="draw the figures again, from probe.json")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="device to compute on (default: a GPU if there is one)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float64"),
        help="precision of weights and streams (default float32, without TF32)")
    add("--device_map", choices=["auto"], help="spread a Hugging Face model over all GPUs")
    args = parser.parse_args()
    if args.tasks:
        need("lm_eval", "--tasks")
    check(args.tasks or "tasks" not in args.only.split(","), "--only tasks needs --tasks")
    return args

def join_ranks(device: torch.device) -> torch.device:
    """Join torchrun's other processes, if there are any; returns the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    # gloo even for GPUs, since sums are added on the CPU. A rank may wait for the slowest one.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)
    return device

def main() -> None:
    args = read_arguments()
    if args.export:
        return export(args.checkpoints[0], args.export, args.tokenizer)
    alone = args.drop is not None or args.sample is not None
    check(not alone or os.environ.get("WORLD_SIZE", "1") == "1",
          "--drop and --sample take one process: start them with python, not torchrun")
    device = join_ranks(choose_device(args.device))
    args.device = device.type
    results: dict[str, Result] = {}
    for path in args.checkpoints:
        label, out = place_of_results(args, path, results)
        if args.figures:
            results[label] = draw_again(path, label, out)
            continue
        model, saved = load_model(path, device, getattr(torch, args.dtype), args.device_map)
        check_finite(model, path)
        saved["tokenizer"] = args.tokenizer or saved["tokenizer"]
        if args.sample is not None:
            sample(args, model, saved)
        elif args.drop is not None:
            drop_blocks(args, path, model, saved)
        else:
            results[label] = measure(args, path, model, saved, label, out)
    rank, ranks = place_among_ranks()
    if len(results) > 1 and rank == 0:
        compare(args, results)
    if ranks > 1:
        dist.barrier()                            # no rank leaves while another one still needs it

if __name__ == "__main__":
    run(main)
