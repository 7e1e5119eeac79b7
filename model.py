"""The model: a Llama-style Pre-RMSNorm transformer in which every knob of the paper is a flag.

    python model.py sample out/gqa_deep/ckpt.pt --prompt "def "    # a checkpoint of train.py writes some text

Paper: "When Does Sparsity Mitigate the Curse of Depth in LLMs", arXiv 2603.15389.
  GQA      n_kv_head < n_head: G = n_head / n_kv_head query heads share one key/value head
  MoE      n_experts > 0: each token goes to top_k of the experts, no token is ever dropped
  norm     "pre" is the paper's; "lns" and "peri" are the cures that others proposed for the same illness
A block takes the residual stream (B, T, n_embd) and returns it, so blocks can be skipped, swapped and replaced by hand.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26      # the loss holds at most this many logits at a time: 256 MB in float32


class UserError(Exception):
    """A mistake of the user's: the message names the culprit and the remedy; `run` prints it without a traceback."""


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field that explains itself in --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class ModelConfig:
    """The architecture. A 0 that stands for "derive it" is replaced by the derived value on construction."""
    vocab_size: int = setting(0, "tokens in the vocabulary; 0: the corpus's, rounded up to a multiple of 64")
    block_size: int = setting(128, "context length T in tokens")
    n_layer: int = setting(8, "blocks L")
    n_head: int = setting(4, "query heads")
    n_kv_head: int = setting(0, "key/value heads, a divisor of n_head; 0: n_head (no GQA)")
    n_embd: int = setting(128, "width d of the residual stream")
    ffn_hidden: int = setting(0, "hidden width of the dense SwiGLU; 0: 4 n_embd, as the paper's dense models")
    n_experts: int = setting(0, "experts per MoE layer; 0: dense")
    top_k: int = setting(2, "experts per token")
    expert_hidden: int = setting(0, "hidden width of one expert; 0: ffn_hidden / top_k, the FLOPs of the dense layer")
    shared_hidden: int = setting(0, "hidden width of an always-on shared expert; 0: none")
    norm_topk_prob: bool = setting(False, "rescale the chosen experts' weights to sum to 1")
    lb_loss_weight: float = setting(0.01, "weight of the load-balancing loss (backward pass only)")
    z_loss_weight: float = setting(0.001, "weight of the router z-loss (backward pass only)")
    rope_theta: float = setting(10000.0, "base of the rotary position embedding")
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm")
    init_std: float = setting(0.02, "standard deviation of every matrix at initialisation, whatever its depth")
    tie_embeddings: bool = setting(False, "one matrix for the embedding and the head")
    norm: str = setting("pre", "pre | lns (LayerNorm Scaling, arXiv 2502.05795) | peri (Peri-LN, arXiv 2502.02732)")

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_hidden = self.ffn_hidden or 4 * self.n_embd
        if self.n_experts and self.top_k > 0:
            self.expert_hidden = self.expert_hidden or self.ffn_hidden // self.top_k
        for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_hidden", "norm_eps", "rope_theta"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("vocab_size", "n_experts", "shared_hidden", "lb_loss_weight", "z_loss_weight", "init_std"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        check(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        check(self.n_embd // self.n_head % 2 == 0,
              f"n_embd/n_head={self.n_embd // self.n_head} is odd, but RoPE rotates pairs: change n_head={self.n_head}")
        check(self.n_head % self.n_kv_head == 0, f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        check(self.norm in ("pre", "lns", "peri"), f"norm={self.norm!r} is none of pre, lns, peri")
        if self.n_experts:
            check(0 < self.top_k <= self.n_experts, f"top_k={self.top_k} must be 1 to n_experts={self.n_experts}")
            for name in ("n_embd", "expert_hidden"):   # grouped_mm wants rows of a multiple of 16 bytes
                check(getattr(self, name) % 8 == 0 and getattr(self, name) > 0,
                      f"{name}={getattr(self, name)} must be a multiple of 8 in a MoE")


def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------------------------------
# the blocks


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain takes the stream's dtype: under FSDP2's mixed precision it comes in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RoPE(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), the half-split layout of Llama: pairs are (i, i + head_dim / 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.half, self.T, self.theta = config.n_embd // config.n_head // 2, config.block_size, config.rope_theta
        self.register_buffer("cos", torch.empty(self.T, 1, 2 * self.half), persistent=False)
        self.register_buffer("sin", torch.empty(self.T, 1, 2 * self.half), persistent=False)

    def reset(self) -> None:
        """Fill the tables: apart from __init__, since that may run on the meta device."""
        freq = self.theta ** (-torch.arange(self.half, dtype=torch.float64) / self.half)
        angle = torch.outer(torch.arange(self.T, dtype=torch.float64), freq)[:, None]          # (T, 1, head_dim / 2)
        self.cos.copy_(torch.cat((angle.cos(), angle.cos()), dim=-1))
        self.sin.copy_(torch.cat((-angle.sin(), angle.sin()), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, T, heads, head_dim) by their position in the sequence."""
        cos, sin = self.cos[:x.size(1)], self.sin[:x.size(1)]                          # (T, 1, head_dim)
        return x * cos + x.roll(self.half, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention; n_kv_head < n_head makes it grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, rope: RoPE):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.rope = rope                                       # one table, shared by all blocks

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim), q and k rotated."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        q, k = self.rope(qk).split((self.n_head, self.n_kv_head), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head < self.n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, d))


class SwiGLU(nn.Module):
    """The dense FFN: (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(n_embd, hidden, bias=False)
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@torch.library.custom_op("depth::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x (M, K) times w[e] (E, K, N): (M, N).

    A custom op since torch.compile refuses F.grouped_mm in float32; as an opaque op it costs no graph break. float64,
    which F.grouped_mm lacks, takes the plain loop: that is for tests.
    """
    if x.dtype == torch.float64:
        return torch.cat([rows @ w[e] for e, rows in enumerate(x.tensor_split(ends[:-1].cpu().long()))])
    return F.grouped_mm(x, w, offs=ends)


@torch.library.custom_op("depth::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x^T y over the rows of each expert, the weight gradient of grouped_mm: x (M, K), y (M, N) -> (E, K, N)."""
    if x.dtype == torch.float64:
        splits = ends[:-1].cpu().long()
        return torch.stack([a.T @ b for a, b in zip(x.tensor_split(splits), y.tensor_split(splits))])
    return F.grouped_mm(x.t(), y, offs=ends)


@grouped_mm.register_fake
def _(x, w, ends):
    return x.new_empty(x.size(0), w.size(2))


@grouped_outer.register_fake
def _(x, y, ends):
    return x.new_empty(ends.size(0), x.size(1), y.size(1))


def _grouped_mm_backward(ctx, grad):
    x, w, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, w.transpose(1, 2), ends), grouped_outer(x, grad, ends), None


grouped_mm.register_autograd(_grouped_mm_backward,
                             setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Router(NamedTuple):
    """What the router of one MoE layer did with a micro-batch."""
    lb_loss: Tensor     # (), 1 when perfectly balanced
    z_loss: Tensor      # ()
    load: Tensor        # (n_experts,), share of the token-to-expert assignments, sums to 1


class MoE(nn.Module):
    """Dropless mixture of SwiGLU experts: softmax router, then top-k (as Switch, ST-MoE, OLMoE)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, d, h = config.n_experts, config.n_embd, config.expert_hidden
        self.top_k, self.norm_topk_prob = config.top_k, config.norm_topk_prob
        self.router = nn.Linear(d, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, d, h))
        self.up = nn.Parameter(torch.empty(E, d, h))
        self.down = nn.Parameter(torch.empty(E, h, d))
        self.shared = SwiGLU(d, config.shared_hidden) if config.shared_hidden else None

    def forward(self, x: Tensor) -> tuple[Tensor, Router]:
        shape, E = x.shape, self.router.out_features
        x = x.reshape(-1, shape[-1])                                                  # (N, d)
        logits = self.router(x).float() if x.dtype != torch.float64 else self.router(x)
        probs = logits.softmax(-1)                                                    # (N, E)
        weight, expert = probs.topk(self.top_k)                                       # (N, k)
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)

        order = expert.flatten().argsort(stable=True)                                 # (N k,) slots sorted by expert
        count = F.one_hot(expert, E).sum((0, 1))                                      # (E,)
        ends = count.cumsum(0).to(torch.int32)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        rows = x.to(dtype).index_select(0, order // self.top_k)                       # (N k, d)
        gate, up, down = (w.to(dtype) for w in (self.gate, self.up, self.down))
        hidden = F.silu(grouped_mm(rows, gate, ends)) * grouped_mm(rows, up, ends)    # (N k, h)
        rows = grouped_mm(hidden, down, ends)                                         # (N k, d)
        y = rows.index_select(0, order.argsort()).view(-1, self.top_k, shape[-1])     # back in the tokens' order
        y = (y * weight.unsqueeze(-1).to(dtype)).sum(1)                               # (N, d)
        if self.shared is not None:
            y = y + self.shared(x)

        load = count / expert.numel()
        lb_loss = E * (load * probs.mean(0)).sum()              # eq. 4 of Switch, arXiv 2101.03961; gradient by probs
        z_loss = logits.logsumexp(-1).square().mean()           # eq. 5 of ST-MoE, arXiv 2202.08906
        return y.view(shape), Router(lb_loss, z_loss, load)


class Detail(NamedTuple):
    """What a block did on the way."""
    attn: Tensor                # (B, T, d), what attention added to the stream
    ffn: Tensor                 # (B, T, d), what the FFN added
    router: Router | None       # of a MoE layer


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). `layer` counts from 1, as in the paper."""

    def __init__(self, config: ModelConfig, layer: int, rope: RoPE):
        super().__init__()
        def norm():
            return RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn = Attention(config, rope)
        self.ffn = MoE(config) if config.n_experts else SwiGLU(config.n_embd, config.ffn_hidden)
        self.scale = layer ** -0.5 if config.norm == "lns" else 1.0        # LayerNorm Scaling
        peri = config.norm == "peri"                                       # Peri-LN: a norm after each sublayer as well
        self.attn_out_norm, self.ffn_out_norm = (norm(), norm()) if peri else (nn.Identity(), nn.Identity())

    def scaled(self, x: Tensor) -> Tensor:
        """A norm's output as the sublayer gets it."""
        return x if self.scale == 1.0 else x * self.scale

    def attn_output(self, x: Tensor) -> Tensor:
        """What attention adds to the stream x, (B, T, d)."""
        return self.attn_out_norm(self.attn(self.scaled(self.attn_norm(x))))

    def ffn_output(self, x: Tensor) -> tuple[Tensor, Router | None]:
        """What the FFN adds to the stream x (B, T, d), and what the router did if it is a MoE."""
        y = self.ffn(self.scaled(self.ffn_norm(x)))
        y, router = y if isinstance(self.ffn, MoE) else (y, None)
        return self.ffn_out_norm(y), router

    def forward(self, x: Tensor, detail: bool = False) -> Tensor | tuple[Tensor, Detail]:
        """The stream after the block, (B, T, d); with `detail` also what was added on the way."""
        attn = self.attn_output(x)
        x = x + attn
        ffn, router = self.ffn_output(x)
        x = x + ffn
        return (x, Detail(attn, ffn, router)) if detail else x


# ---------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """embed -> blocks -> norm -> head, all public: a probe recombines them without hooks.

    stream = model.embed(idx)                      # (B, T, d), h_0 of the paper
    for block in model.blocks:
        stream = block(stream)                     # h_1 .. h_L
    logits = model.head(model.norm(stream))        # (B, T, vocab_size)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check(config.vocab_size > 0, "vocab_size=0: the model needs the size of its vocabulary")
        self.config, self.recompute = config, False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        rope = RoPE(config)
        self.blocks = nn.ModuleList(Block(config, layer, rope) for layer in range(1, config.n_layer + 1))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix ~ N(0, init_std), every norm 1; no depth-scaled residual init: the paper's regime.

        On the meta device this does nothing; call it again after `to_empty`. Drawn on the CPU one whole matrix at a
        time: the same weights on every device, and on any number of ranks that hold shards of them.
        """
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight          # again, since `to_empty` makes two of one
        for p in self.parameters():
            if not p.is_meta:
                put(p, torch.empty(p.shape).normal_(std=self.config.init_std) if p.dim() > 1 else torch.ones(p.shape))
        self.blocks[0].attn.rope.reset()

    def forward(self, idx: Tensor, targets: Tensor | None = None, stats: bool = False, return_logits: bool = True):
        """Logits (B, T, vocab_size) and the mean cross-entropy in nats per target (None without targets).

        The loss's value is the cross-entropy alone; its gradient includes the MoE's auxiliary losses.
        return_logits=False: the logits come back as None and never exist as a whole.
        stats=True: a third result, the dict of `statistics`.
        """
        check(idx.size(1) <= self.config.block_size, f"{idx.size(1)} tokens exceed block_size={self.config.block_size}")
        x = self.embed(idx)                                                           # (B, T, d)
        streams, details = [x], []
        for block in self.blocks:
            if self.recompute and self.training:
                x, detail = checkpoint(block, x, True, use_reentrant=False, preserve_rng_state=False)
            else:
                x, detail = block(x, detail=True)
            if stats:
                streams.append(x)
                details.append(detail)
            elif detail.router is not None:
                details.append(detail)
        x = self.norm(x)
        loss = None
        if targets is not None:
            loss = cross_entropy(self.head, x, targets)
            if self.config.n_experts:
                aux = (self.config.lb_loss_weight * mean([d.router.lb_loss for d in details])
                       + self.config.z_loss_weight * mean([d.router.z_loss for d in details]))
                loss = loss + (aux - aux.detach())                                    # adds 0, and aux's gradient
        logits = self.head(x) if return_logits or targets is None else None
        return (logits, loss, statistics(streams, details)) if stats else (logits, loss)

    def count_parameters(self) -> dict[str, int]:
        """total; active: without the experts a token does not visit; non_embedding: active without embed and head."""
        total = sum(p.numel() for p in self.parameters())
        c = self.config
        idle = sum((c.n_experts - c.top_k) * p.numel() // c.n_experts for p in self.parameters() if p.dim() == 3)
        tables = self.embed.weight.numel() * (1 if c.tie_embeddings else 2)
        return {"total": total, "active": total - idle, "non_embedding": total - idle - tables}

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs of a training step per token at context T (default block_size); a forward pass is a third of it.

        Forward: 2 per active matrix parameter (the head counts, the embedding is a look-up), and 4 T d per layer for
        q k^T and the weighted sum of values over all T keys, the causal half not subtracted (appendix B of PaLM).
        """
        c = self.config
        gains = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        matrices = self.count_parameters()["non_embedding"] - gains + self.head.weight.numel()
        forward = 2 * matrices + 4 * (T or c.block_size) * c.n_embd * c.n_layer
        return (3 if backward else 1) * forward


def mean(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).mean(0)


def cross_entropy(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of head(x) in nats, x (B, T, d), a chunk of logits at a time.

    Each chunk's logits are recomputed in the backward pass, so what is held is one chunk and not B T vocab_size floats.
    """
    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        logits = head(x)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")

    rows = max(1, LOGITS_AT_ONCE // head.out_features)
    xs, ts = x.flatten(0, 1).split(rows), targets.flatten().split(rows)
    if len(xs) == 1:
        return chunk_loss(xs[0], ts[0]) / targets.numel()
    return sum(checkpoint(chunk_loss, x, t, use_reentrant=False) for x, t in zip(xs, ts)) / targets.numel()


def token_variance(x: Tensor) -> Tensor:
    """Mean over tokens of the unbiased variance over features, x (B, T, d) -> ().  (paper, probe 1)"""
    return x.float().var(-1).mean() if x.dtype != torch.float64 else x.var(-1).mean()


@torch.no_grad()
def statistics(streams: list[Tensor], details: list[Detail]) -> dict[str, Tensor]:
    """Per-layer statistics of one micro-batch from the streams h_0 .. h_L and what the blocks did.

    variance (L+1,), the embedding first; attn_variance (L,), ffn_variance (L,); of a MoE also lb_loss (), z_loss () and
    expert_load (L, n_experts).
    """
    out = {"variance": torch.stack([token_variance(x) for x in streams]),
           "attn_variance": torch.stack([token_variance(d.attn) for d in details]),
           "ffn_variance": torch.stack([token_variance(d.ffn) for d in details])}
    if details[0].router is not None:
        out |= {"lb_loss": mean([d.router.lb_loss for d in details]),
                "z_loss": mean([d.router.z_loss for d in details]),
                "expert_load": torch.stack([d.router.load for d in details])}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, sampling, and the command line that the scripts share


def put(p: Tensor, whole: Tensor) -> Tensor:
    """Copy a whole tensor into p, which may be this rank's shard of one (FSDP2); returns p."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return p.copy_(whole)


def save_checkpoint(path: Path, saved: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint that appears by rename, so that nobody reads half of one. The keep - 1 before it stay.

    They are ckpt.1.pt, the one before, ckpt.2.pt, ...; should the machine stop between two renames, none is lost.
    """
    tmp, names = path.with_name(path.name + ".tmp"), [path, *(path.with_suffix(f".{k}.pt") for k in range(1, keep))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
        for newer, older in reversed(list(zip(names, names[1:]))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:      # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0][:80]}): free some space or choose another "
                        "place; what was there is intact") from e


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ... ; tensors only, nothing is executed.

    Raises UserError if the file is missing, truncated or not a checkpoint. Memory-mapped: what is not used is not read.
    """
    check(Path(path).is_file(), f"no checkpoint {path}: make one with `python train.py CONFIG.py`, or correct the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} is damaged or no checkpoint ({str(e).splitlines()[0][:80]}): use another copy") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    check(isinstance(saved, dict) and all(isinstance(saved.get(key), kind) for key, kind in kinds.items()),
          f"{path} lacks {', '.join(kinds)}: it is not a checkpoint of train.py")
    return saved


def load_weights(model: GPT, saved: dict[str, Any], path: str | Path, assign: bool = False) -> None:
    """Put a checkpoint's weights into a model; UserError where they do not fit. assign: take the tensors themselves."""
    own, theirs = model.state_dict(), saved["model"]
    wrong = [name for name in own.keys() | theirs.keys()
             if getattr(own.get(name), "shape", None) != getattr(theirs.get(name), "shape", 0)]
    check(not wrong, f"{path}: weights and settings disagree, for example about {min(wrong, default='')}")
    if assign:
        model.load_state_dict(theirs, assign=True)
    else:
        for name, p in own.items():
            put(p, theirs[name])


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint in eval mode and the checkpoint itself."""
    saved = load_checkpoint(path)
    names = {f.name for f in fields(ModelConfig)}
    config = ModelConfig(**{k: v for k, v in saved["settings"].items() if k in names})
    with torch.device("meta"):
        model = GPT(config)
    load_weights(model, saved, path, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    rope = model.blocks[0].attn.rope
    rope.to_empty(device="cpu").reset()
    return model.to(device).eval(), saved


@torch.no_grad()
def generate(model: GPT, idx: Tensor, n: int, temperature: float = 0.8, top_k: int = 50, n_vocab: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue idx (B, T) by n sampled tokens: (B, T + n). No key/value cache: every token costs a whole pass.

    temperature 0 takes the likeliest token. Ids from n_vocab on, the padding of the embedding, are never drawn.
    """
    for _ in range(n):
        x = model.embed(idx[:, -model.config.block_size:])
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.norm(x[:, -1]))[:, :n_vocab].float()                # (B, n_vocab)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            kept, ids = logits.topk(min(top_k, logits.size(-1)))
            choice = torch.multinomial((kept / temperature).softmax(-1), 1, generator=generator)
            token = ids.gather(-1, choice)
        idx = torch.cat((idx, token), dim=1)
    return idx


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError is one line on stderr and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)               # what rank 0 says as well is said once: torchrun stops us meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors and whose abbreviations are off."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python {self.prog} --help`")


def main() -> None:
    parser = Parser(prog="model.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    sample = commands.add_parser("sample", help="continue a prompt")
    sample.add_argument("checkpoint")
    sample.add_argument("--prompt", default="", help="the text to continue; default: the start of a document")
    sample.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    sample.add_argument("--top_k", type=int, default=50, help="draw among the likeliest k (default 50)")
    sample.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check(args.tokens >= 0 and args.temperature >= 0 and args.top_k > 0,
          "--tokens and --temperature must not be negative, --top_k must be positive")

    from data import get_tokenizer
    model, saved = load_model(args.checkpoint)
    enc = get_tokenizer(saved["tokenizer"])
    idx = torch.tensor([enc.encode_ordinary(args.prompt) or [enc.eot_token]])
    generator = torch.Generator().manual_seed(args.seed)
    idx = generate(model, idx, args.tokens, args.temperature, args.top_k, enc.n_vocab, generator)
    print(enc.decode(idx[0].tolist()))


if __name__ == "__main__":
    import model                # the module that data.py imports too, so that its UserError is ours
    model.run(model.main)
