"""The model: a Llama-style Pre-RMSNorm transformer in which every knob of the paper is a flag.

    python model.py sample out/gqa_deep/ckpt.pt --prompt "def "    # a checkpoint of train.py writes some text
    python model.py export out/gqa_deep/ckpt.pt my_model           # a Hugging Face folder for transformers, vLLM, ...

Checkpoints may also be Hugging Face folders (config.json, *.safetensors) of the FAMILIES below.
Paper: "When Does Sparsity Mitigate the Curse of Depth in LLMs", arXiv 2603.15389. norm="pre" is the paper's; "lns" and
"peri" are the cures that others proposed for the same illness.
A block takes the residual stream (B, T, n_embd) and returns it, so blocks can be skipped, swapped and replaced by hand.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
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

def setting(default: Any, meaning: str, allowed: float | str = 0) -> Any:
    """A dataclass field that explains itself in --help; allowed: the least number, or the words, as in "pre/lns"."""
    return field(default=default, metadata={"help": meaning, "allowed": allowed})

@dataclass
class ModelConfig:
    """The architecture. A 0 that stands for "derive it" is replaced by the derived value on construction."""
    vocab_size: int = setting(0, "tokens in the vocabulary; 0: the corpus's, rounded up to a multiple of 64")
    block_size: int = setting(128, "context length T in tokens", 1)
    n_layer: int = setting(8, "blocks L", 1)
    n_head: int = setting(4, "query heads", 1)
    n_kv_head: int = setting(0, "key/value heads, a divisor of n_head; 0: n_head (no GQA)")
    n_embd: int = setting(128, "width d of the residual stream", 1)
    ffn_hidden: int = setting(0, "hidden width of the dense SwiGLU; 0: 4 n_embd, as the paper's dense models")
    n_experts: int = setting(0, "experts per MoE layer; 0: dense")
    top_k: int = setting(2, "experts per token", 1)
    expert_hidden: int = setting(0, "hidden width of an expert; 0: ffn_hidden / top_k, the FLOPs of the dense layer")
    shared_hidden: int = setting(0, "hidden width of an always-on shared expert; 0: none")
    norm_topk_prob: bool = setting(False, "rescale the chosen experts' weights to sum to 1")
    lb_loss_weight: float = setting(0.01, "weight of the load-balancing loss (backward pass only)")
    z_loss_weight: float = setting(0.001, "weight of the router z-loss (backward pass only)")
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", 1)
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm", 1e-38)
    init_std: float = setting(0.02, "standard deviation of every matrix at initialisation, whatever its depth")
    tie_embeddings: bool = setting(False, "one matrix for the embedding and the head")
    head_dim: int = setting(0, "width of a head; 0: n_embd / n_head")
    qkv_bias: bool = setting(False, "biases on queries, keys and values, as Qwen2 has them")
    qk_norm: str = setting("", "RMSNorm of queries and keys: of each head (Qwen3), of all (OLMoE)", "/head/full")
    rope_scaling: str = setting("", "Llama 3's longer wavelengths, llama3:FACTOR,LOW,HIGH,CONTEXT; empty: none")
    shared_gate: bool = setting(False, "weigh the shared expert by a sigmoid gate, as Qwen2-MoE")
    norm: str = setting("pre", "lns: LayerNorm Scaling, arXiv 2502.05795; peri: Peri-LN, 2502.02732", "pre/lns/peri")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if isinstance(allowed, str):
                check(value in allowed.split("/"), f"{f.name}={value!r} is none of {allowed}")
            elif isinstance(value, (int, float)):
                check(value >= allowed, f"{f.name}={value} must be at least {allowed}")
        check(self.head_dim or self.n_embd % self.n_head == 0,
              f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_hidden = self.ffn_hidden or 4 * self.n_embd
        check(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for RoPE: change n_head={self.n_head}")
        check(self.n_head % self.n_kv_head == 0, f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        check(re.fullmatch(r"(llama3:\d+(\.\d+)?(,\d+(\.\d+)?){3})?", self.rope_scaling) is not None,
              f"rope_scaling={self.rope_scaling!r} is not like llama3:8,1,4,8192")
        check(not self.shared_gate or self.n_experts and self.shared_hidden,
              "shared_gate=True gates a shared expert, and there is none: set n_experts and shared_hidden")
        if self.n_experts:
            check(self.top_k <= self.n_experts, f"top_k={self.top_k} must be 1 to n_experts={self.n_experts}")
            self.expert_hidden = self.expert_hidden or self.ffn_hidden // self.top_k
            for name, width in (("n_embd", self.n_embd), ("expert_hidden", self.expert_hidden)):    # for grouped_mm
                check(width > 0 and width % 8 == 0, f"{name}={width} must be a multiple of 8 in a MoE")

def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)

def need(package: str, purpose: str) -> Any:
    """Import an optional package, which comes back as its top level, or say how to get it."""
    try:
        return __import__(package)
    except ImportError as e:
        raise UserError(f"{purpose} needs {package}: pip install {package.split('.')[0]}") from e

def wide(x: Tensor) -> Tensor:
    """x in float32 or better: no loss or statistic is taken in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

# ---- the blocks ------------------------------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the stream: FSDP2's mixed precision gives it in bfloat16, the stream is float32."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

class RoPE(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), the half-split layout of Llama: pairs are (i, i + head_dim / 2)."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.half, self.theta = config.head_dim // 2, config.rope_theta
        self.scaling = [float(x) for x in config.rope_scaling.removeprefix("llama3:").split(",") if x]
        self.register_buffer("table", torch.empty(config.block_size, 1, 2 * config.head_dim), persistent=False)

    def reset(self) -> None:
        """Fill the table of cosines and sines: apart from __init__, since that may run on the meta device."""
        freq = self.theta ** (-torch.arange(self.half, dtype=torch.float64) / self.half)
        if self.scaling:       # wavelengths that did not fit into the original context grow, with a ramp in between
            factor, low, high, context = self.scaling
            kept = ((context * freq / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
            freq = freq * (kept + (1 - kept) / factor)
        angle = torch.outer(torch.arange(len(self.table), dtype=torch.float64), freq)[:, None]    # (T, 1, head_dim / 2)
        self.table.copy_(torch.cat((angle.cos(), angle.cos(), -angle.sin(), angle.sin()), dim=-1))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Rotate queries or keys (B, T, heads, head_dim) by their place in the sequence, or by position (B, T)."""
        table = self.table[:x.size(1)] if position is None else self.table[position]
        cos, sin = table.chunk(2, dim=-1)                                              # (T, 1, head_dim)
        return x * cos + x.roll(self.half, dims=-1) * sin

class Attention(nn.Module):
    """Causal self-attention; n_kv_head < n_head makes it grouped-query attention (arXiv 2305.13245)."""
    def __init__(self, config: ModelConfig, rope: RoPE):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        normed = (self.n_head, self.n_kv_head) if config.qk_norm == "full" else (1, 1)         # heads at a time
        norms = [RMSNorm(heads * self.head_dim, config.norm_eps) for heads in normed]
        self.q_norm, self.k_norm = norms if config.qk_norm else (None, None)
        self.rope = rope                                       # one table, shared by all blocks

    def heads(self, x: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim), q and k rotated."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            parts = zip((self.q_norm, self.k_norm), qk.split((self.n_head, self.n_kv_head), dim=2))
            qk = torch.cat([norm(y.reshape(B, T, -1, *norm.normalized_shape)).view_as(y) for norm, y in parts], dim=2)
        q, k = self.rope(qk, position).split((self.n_head, self.n_kv_head), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head < self.n_head)
        return self.proj(y.transpose(1, 2).flatten(2))

class SwiGLU(nn.Module):
    """The dense FFN: (silu(x W_gate) * x W_up) W_down."""
    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(n_embd, hidden, bias=False)
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

@torch.library.custom_op("depth::grouped_mm", mutates_args=())   # torch.compile refuses F.grouped_mm in float32
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Expert e's slots, ends[e-1] to ends[e] of M, times its matrix: x (M, K), w (E, K, N) -> (M, N). The gradient of w
    is the product over the slots of each expert: x (K, M), w (M, N) -> (E, K, N)."""
    if x.dtype != torch.float64:                                      # which F.grouped_mm lacks, and tests want
        return F.grouped_mm(x, w, offs=ends)
    inner = ends[:-1].cpu().long()
    if w.dim() == 3:
        return torch.cat([rows @ w[e] for e, rows in enumerate(x.tensor_split(inner))])
    return torch.stack([a @ b for a, b in zip(x.tensor_split(inner, dim=1), w.tensor_split(inner))])

def backward(ctx, grad):
    (x, w, ends), grad = ctx.saved_tensors, grad.contiguous()
    return grouped_mm(grad, w.mT, ends), grouped_mm(x.T, grad, ends), None

grouped_mm.register_fake(
    lambda x, w, ends: x.new_empty((len(x), w.size(2)) if w.dim() == 3 else (len(ends), len(x), w.size(1))))
grouped_mm.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

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
        self.shared_gate = nn.Linear(d, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Router]:
        shape, E = x.shape, self.router.out_features
        x = x.reshape(-1, shape[-1])                                                  # (N, d)
        logits = wide(self.router(x))
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
            y = y + (self.shared(x) if self.shared_gate is None else self.shared_gate(x).sigmoid() * self.shared(x))

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
        norm = partial(RMSNorm, config.n_embd, config.norm_eps)
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn = Attention(config, rope)
        self.ffn = MoE(config) if config.n_experts else SwiGLU(config.n_embd, config.ffn_hidden)
        self.scale = layer ** -0.5 if config.norm == "lns" else 1.0        # LayerNorm Scaling
        out_norm = norm if config.norm == "peri" else nn.Identity          # Peri-LN: a norm after each sublayer as well
        self.attn_out_norm, self.ffn_out_norm = out_norm(), out_norm()

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

# ---- the model -------------------------------------------------------------------------------------------------------
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
        """Every matrix ~ N(0, init_std), every norm 1, every bias 0; no depth-scaled residual init: the paper's regime.

        Drawn on the CPU one whole matrix at a time: the same on every device and however many ranks hold its shards.
        On the meta device this does nothing; call it again after `to_empty`.
        """
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight          # again, since `to_empty` makes two of one
        for name, p in self.named_parameters():
            if not p.is_meta:
                new = torch.empty(p.shape)
                put(p, new.normal_(std=self.config.init_std) if p.dim() > 1 else new.fill_(0 if "bias" in name else 1))
        self.blocks[0].attn.rope.reset()

    def forward(self, idx: Tensor, targets: Tensor | None = None, stats: bool = False, return_logits: bool = True):
        """Logits (B, T, vocab_size) and the mean cross-entropy in nats per target (None without targets).

        The loss's value is the cross-entropy alone; its gradient includes the MoE's auxiliary losses. stats=True adds
        the dict of `statistics`. return_logits=False: they come back as None and never exist as a whole.
        """
        c = self.config
        check(idx.size(1) <= c.block_size, f"{idx.size(1)} tokens exceed block_size={c.block_size}")
        x = self.embed(idx)                                                           # (B, T, d)
        variances, routers = [token_variance(x)] if stats else [], []
        for block in self.blocks:
            if self.recompute and self.training:
                x, detail = checkpoint(block, x, True, use_reentrant=False, preserve_rng_state=False)
            else:
                x, detail = block(x, detail=True)
            routers.append(detail.router)
            if stats:
                variances += map(token_variance, (detail.attn, detail.ffn, x))
        x, loss = self.norm(x), None
        router = Router(*map(torch.stack, zip(*routers))) if c.n_experts else None    # of all: (L,), (L,), (L, E)
        if targets is not None:
            loss = cross_entropy(self.head, x, targets)
            if router:
                aux = c.lb_loss_weight * router.lb_loss.mean() + c.z_loss_weight * router.z_loss.mean()
                loss = loss + (aux - aux.detach())                                    # adds 0, and aux's gradient
        logits = self.head(x) if return_logits or targets is None else None
        return (logits, loss, statistics(variances, router)) if stats else (logits, loss)

    def count_parameters(self) -> dict[str, int]:
        """total; active: without the experts a token does not visit; non_embedding: active without embed and head."""
        total = sum(p.numel() for p in self.parameters())
        c = self.config
        idle = sum((c.n_experts - c.top_k) * p.numel() // c.n_experts for p in self.parameters() if p.dim() == 3)
        tables = self.embed.weight.numel() * (1 if c.tie_embeddings else 2)
        return {"total": total, "active": total - idle, "non_embedding": total - idle - tables}

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs of a training step per token at context T (default block_size); a forward pass is a third of it.

        2 per active matrix parameter (the head counts, the embedding is a look-up) and, for q k^T and the sum of values
        over all T keys, 4 T (n_head head_dim) per layer, the causal half not subtracted (appendix B of PaLM).
        """
        c = self.config
        gains = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        matrices = self.count_parameters()["non_embedding"] - gains + self.head.weight.numel()
        forward = 2 * matrices + 4 * (T or c.block_size) * c.n_head * c.head_dim * c.n_layer
        return (3 if backward else 1) * forward

def cross_entropy(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of head(x) in nats, x (B, T, d), a chunk of logits at a time, recomputed in the backward."""
    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(wide(head(x)), targets, reduction="sum")

    rows = max(1, LOGITS_AT_ONCE // head.out_features)
    xs, ts = x.flatten(0, 1).split(rows), targets.flatten().split(rows)
    loss = partial(checkpoint, chunk_loss, use_reentrant=False) if len(xs) > 1 else chunk_loss
    return sum(map(loss, xs, ts)) / targets.numel()

@torch.no_grad()
def token_variance(x: Tensor) -> Tensor:
    """Mean over tokens of the unbiased variance over features, x (B, T, d) -> ().  (paper, probe 1)"""
    return wide(x).var(-1).mean()

@torch.no_grad()
def statistics(variances: list[Tensor], router: Router | None) -> dict[str, Tensor]:
    """Statistics of one micro-batch, from the token variances of h_0, attn_1, ffn_1, h_1, attn_2, ... and the routers.

    variance (L+1,), attn_variance (L,), ffn_variance (L,); of a MoE also lb_loss (), z_loss (), expert_load (L, E).
    """
    variance = torch.stack(variances)
    out = {"variance": variance[::3], "attn_variance": variance[1::3], "ffn_variance": variance[2::3]}
    if router:
        out |= {"lb_loss": router.lb_loss.mean(), "z_loss": router.z_loss.mean(), "expert_load": router.load}
    return out

# ---- checkpoints, sampling, and the command line that the scripts share ----------------------------------------------
def put(p: Tensor, whole: Tensor) -> Tensor:
    """Copy a whole tensor into p, which may be this rank's shard of one (FSDP2); returns p."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return p.copy_(whole)

def save_checkpoint(path: Path, saved: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint that appears by rename, so that nobody reads half of one. The keep - 1 before it stay as
    ckpt.1.pt, the one before, ckpt.2.pt, ...; should the machine stop between two renames, none is lost."""
    tmp, names = path.with_name(path.name + ".tmp"), [path, *(path.with_suffix(f".{k}.pt") for k in range(1, keep))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
        free = next((k for k, name in enumerate(names) if not name.exists()), keep - 1)
        for k in range(free, 0, -1):                     # those beyond a gap stay where they are
            os.replace(names[k - 1], names[k])
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:      # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise UserError(f"cannot write {path} ({e!r:.90}): free some space or choose another place; "
                        "what was there is intact") from e

def load_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ...; of a Hugging Face folder a part of that,
    the model in `dtype`. Nothing in it is executed, and what is not used is not read. UserError if it is not sound."""
    if (Path(path) / "config.json").is_file():
        return load_hf(Path(path), dtype)
    check(Path(path).is_file(), f"no checkpoint {path}: make one with `python train.py CONFIG.py`, or correct the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                    # damaged bytes make torch raise almost anything
        raise UserError(f"{path} is damaged or no checkpoint ({e!r:.90}): use another copy") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    check(isinstance(saved, dict) and all(isinstance(saved.get(key), kind) for key, kind in kinds.items()),
          f"{path} lacks {', '.join(kinds)}: it is not a checkpoint of train.py")
    for f in fields(ModelConfig):
        value, kind = saved["settings"].get(f.name, f.default), type(f.default)
        check(isinstance(value, (int, float) if kind is float else kind), f"{path}: {f.name}={value!r} is no {f.type}")
    return saved

def load_weights(model: GPT, saved: dict[str, Any], path: str | Path, assign: bool = False) -> None:
    """Put a checkpoint's weights into a model; UserError where they do not fit. assign: take the tensors themselves."""
    own, theirs = model.state_dict(), saved["model"]
    for name in sorted(own.keys() | theirs.keys()):
        want, have = (tuple(getattr(w.get(name), "shape", ())) for w in (own, theirs))
        check(want == have and name in own, f"{path}: weights and settings disagree: {name} is {have}, not {want}")
    if assign:
        model.load_state_dict(theirs, assign=True)
    else:
        for name, p in own.items():
            put(p, theirs[name])

def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint or Hugging Face folder in eval mode, and the checkpoint itself."""
    saved, names = load_checkpoint(path, dtype), {f.name for f in fields(ModelConfig)}
    config = ModelConfig(**{name: value for name, value in saved["settings"].items() if name in names})
    with torch.device("meta"):
        model = GPT(config)
    load_weights(model, saved, path, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.blocks[0].attn.rope.to_empty(device="cpu").reset()
    return model.to(device, dtype).eval(), saved

# ---- Hugging Face folders, in and out --------------------------------------------------------------------------------
FAMILIES: dict[str, dict[str, Any]] = {       # model_type: what it implies where config.json is silent
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"},
    "mixtral": {"rope_theta": 1e6, "norm_eps": 1e-5, "norm_topk_prob": True},
    "olmoe": {"qk_norm": "full", "norm_eps": 1e-5, "top_k": 8},
    "qwen2_moe": {"qkv_bias": True, "shared_gate": True, "top_k": 4}, "qwen3_moe": {"qk_norm": "head", "top_k": 8}}
FIELDS = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
          "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "head_dim": "head_dim",
          "hidden_size": "n_embd", "intermediate_size": "ffn_hidden", "rms_norm_eps": "norm_eps",
          "initializer_range": "init_std", "tie_word_embeddings": "tie_embeddings", "rope_theta": "rope_theta"}
MOE_FIELDS = {"num_experts": "n_experts", "num_local_experts": "n_experts", "num_experts_per_tok": "top_k",
              "moe_intermediate_size": "expert_hidden", "shared_expert_intermediate_size": "shared_hidden",
              "norm_topk_prob": "norm_topk_prob", "qkv_bias": "qkv_bias"}
LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "partial_rotary_factor": 1, "use_mrope": False}
HARMLESS = """model_type architectures dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id
    pad_token_id unk_token_id tokenizer attention_dropout router_jitter_noise router_aux_loss_coef output_router_logits
    pretraining_tp max_window_layers layer_types sliding_window use_sliding_window rope_scaling rope_parameters
    rope_type type is_llama_config rope_interleaved transformers.js_config""".split()
NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",       # ours: theirs; below, of a block
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
         "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "ffn.router": "mlp.gate",
         "ffn.shared_gate": "mlp.shared_expert_gate"}
NAMES |= {f"ffn.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
NAMES |= {f"ffn.shared.{x}": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")}

def hf_config(hf: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) means;
    UserError names what the model lacks, and any field that is not known to leave the function alone."""
    hf = hf | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})              # its fields as the others
    family, rope = hf.get("model_type"), hf.get("rope_type") or hf.get("type") or "default"
    check(family in FAMILIES, f"{path}: model_type={family!r} is none of {', '.join(FAMILIES)}")
    check(rope in ("default", "llama3"), f"{path}: rope_type={rope} is not supported, only default and llama3 are")
    hf = {"sliding_window": 4096 if family == "mistral" else None} | hf                # its default is not null
    hf = {name: value for name, value in hf.items() if value is not None}
    known = {*FIELDS, *MOE_FIELDS, *ONLY, *HARMLESS, *(LLAMA3_FIELDS if rope == "llama3" else ())}
    for name, value in hf.items():
        check(value == ONLY.get(name, value), f"{path}: {name}={value!r} is not supported, only {ONLY.get(name)!r} is")
        check(name in known or name[0] == "_",
              f"{path}: {name}={value!r} is unknown and may change what the model computes: if not, delete it there")
    for name in ("num_attention_heads", "max_position_embeddings"):                   # no tensor's shape tells these
        check(name in hf, f"{path} lacks {name}")
    values = FAMILIES[family] | {ours: hf[name] for name, ours in (FIELDS | MOE_FIELDS).items() if name in hf}
    if "n_experts" in values:
        values.setdefault("expert_hidden", hf.get("intermediate_size"))
    if rope == "llama3":
        values["rope_scaling"] = "llama3:" + ",".join(str(hf[name]) for name in LLAMA3_FIELDS)

    kinds, window = set(hf.get("layer_types", [])), hf.get("sliding_window") or values["block_size"]
    check(kinds <= {"full_attention", "sliding_attention"}, f"{path}: layer_types={sorted(kinds)} is not supported")
    slides = "sliding_attention" in kinds or hf.get("use_sliding_window", "qwen" not in family)
    if slides and window < values["block_size"]:                               # so short a sequence meets no window
        print(f"{path}: block_size={window}, its sliding_window, not {values['block_size']}", file=sys.stderr)
        values["block_size"] = window
    return ModelConfig(**values)

def hf_views(c: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names and in the shapes of transformers: views, to be read into or to be written out."""
    views, widths = {}, [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for name, w in weights.items():
        _, l, name = name.split(".", 2) if name.startswith("blocks.") else ("", "", name)
        layer, (name, _, kind) = f"model.layers.{l}." if l else "", name.rpartition(".")
        if w.dim() == 3:
            views |= {f"{layer}mlp.experts.{e}.{kind}_proj.weight": expert.T for e, expert in enumerate(w)}
        elif name == "attn.qkv":
            views |= {f"{layer}self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", w.split(widths))}
        elif not (name == "head" and c.tie_embeddings):
            views[f"{layer}{NAMES[name]}.{kind}"] = w
    return views

def load_hf(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A Hugging Face folder as `load_checkpoint` gives it: every tensor has its place and every place its tensor."""
    safetensors, stored = need("safetensors", f"reading {folder}"), {}
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        hf = json.loads((folder / "config.json").read_text())
        names = [single.name] if single.is_file() else json.loads(index.read_text())["weight_map"].values()
        for file in sorted({folder / name for name in names}):
            with safetensors.safe_open(file, "pt") as f:
                for key in f.keys():                                     # Mixtral has names of its own for the same
                    if key.endswith("rotary_emb.inv_freq"):              # of old files: config.json says as much
                        continue
                    name = key.replace("block_sparse_moe", "mlp").replace(".w1.", ".gate_proj.")
                    stored[name.replace(".w2.", ".down_proj.").replace(".w3.", ".up_proj.")] = file, key
        c = hf_config(hf, folder / "config.json")
        c.tie_embeddings &= "lm_head.weight" not in stored               # a stored head counts, as in transformers 5
        with torch.device("meta"):
            weights = {name: torch.empty(w.shape, dtype=dtype, device="cpu") for name, w in GPT(c).state_dict().items()}
        views = hf_views(c, weights)
        for names, what in ((views.keys() - stored.keys(), "lacks"), (stored.keys() - views.keys(), "has no use for")):
            check(not names, f"{folder}: what config.json describes {what} {', '.join(sorted(names)[:3])}")
        for name, (file, key) in stored.items():
            view, rows = views[name], max(1, 2**22 // views[name][0].numel())
            for start in range(0, len(view), rows):
                with safetensors.safe_open(file, "pt") as f:         # anew: what was read stays mapped until it is shut
                    part = f.get_slice(key)
                    shape, kind = part.get_shape(), part.get_dtype()
                    check(shape == list(view.shape) and kind in ("F64", "F32", "F16", "BF16"),
                          f"{file}: {key} is {kind} {shape}, config.json says {list(view.shape)}")
                    view[start:start + rows].copy_(part[start:start + rows])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} is damaged or incomplete ({type(e).__name__}: {e}): get it again") from e
    if c.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return {"model": weights, "settings": asdict(c), "step": 0,
            "tokenizer": hf.get("tokenizer", str((folder / "tokenizer.json").resolve()))}

@torch.no_grad()
def export(path: str | Path, folder: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder that AutoModelForCausalLM loads; it appears by rename."""
    from data import write_json, write_tokenizer
    safetensors, out = need("safetensors.torch", "export"), Path(folder)
    model, saved = load_model(path)
    c, w = model.config, model.state_dict()
    families = {(False, ""): "qwen2" if c.qkv_bias else "llama", (False, "head"): "qwen3",
                (True, ""): "qwen2_moe", (True, "head"): "qwen3_moe", (True, "full"): "olmoe"}
    family = families.get((c.n_experts > 0, c.qk_norm), "")
    check(c.norm != "peri" and family and not (c.qk_norm and (c.qkv_bias or c.n_experts and c.shared_hidden)),
          f"{path}: no Hugging Face family has norm={c.norm}, n_experts={c.n_experts}, qk_norm={c.qk_norm!r}, "
          f"qkv_bias={c.qkv_bias} and shared_hidden={c.shared_hidden} at once")
    if family == "qwen2_moe":              # it has biases and weighs a shared expert by a sigmoid: a gate of zeros
        if not c.shared_gate:              # halves that, and where there is none it consists of zeros
            w |= {name: 2 * p for name, p in w.items() if name.endswith("shared.down.weight")}
        c = replace(c, qkv_bias=True, shared_gate=True, shared_hidden=c.shared_hidden or 1)
        with torch.device("meta"):
            places = GPT(c).state_dict()
        w |= {name: torch.zeros(place.shape) for name, place in places.items() if name not in w}
    w |= {f"blocks.{l}.{name}.weight": block.get_submodule(name).weight * block.scale
          for l, block in enumerate(model.blocks) for name in ("attn_norm", "ffn_norm")}        # LayerNorm Scaling
    hf = {theirs: getattr(c, ours) for theirs, ours in (FIELDS | (MOE_FIELDS if c.n_experts else {})).items()}
    hf |= {"model_type": family, "architectures": [family.title().replace("_", "") + "ForCausalLM"],
           "torch_dtype": "float32", "hidden_act": "silu",
           "intermediate_size": c.expert_hidden if family == "olmoe" else c.ffn_hidden}
    if c.rope_scaling:
        *factors, context = model.blocks[0].attn.rope.scaling
        hf["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(LLAMA3_FIELDS, (*factors, int(context))))
    try:
        check(not out.exists() or not any(out.iterdir()), f"{out} is not empty: choose another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
            new = Path(tmp) / out.name
            new.mkdir()
            views = {name: view.contiguous() for name, view in hf_views(c, w).items()}
            safetensors.torch.save_file(views, new / "model.safetensors", metadata={"format": "pt"})
            write_json(new / "config.json", hf | write_tokenizer(saved["tokenizer"], new))
            os.replace(new, out)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"cannot write {out} ({e}): free some space or choose another folder") from e
    print(f"{out}: {path} as {hf['architectures'][0]} in float32")

@torch.no_grad()
def generate(model: GPT, idx: Tensor, n: int, temperature: float = 0.8, top_k: int = 50, n_vocab: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue idx (B, T) by n tokens: (B, T + n), at temperature 0 the likeliest, never an id from n_vocab on, the
    padding of the embedding. There is no key/value cache: every token costs a whole pass."""
    for _ in range(n):
        x = model.embed(idx[:, -model.config.block_size:])
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.norm(x[:, -1]))[:, :n_vocab].float()                # (B, n_vocab)
        kept, ids = logits.topk(min(top_k, logits.size(-1)))
        chance = ((kept - kept[:, :1]) / max(temperature, 1e-9)).softmax(-1)          # 1e-9: the likeliest takes all
        idx = torch.cat((idx, ids.gather(-1, torch.multinomial(chance, 1, generator=generator))), dim=1)
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
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="continue a prompt")
    sample.add_argument("checkpoint")
    sample.add_argument("--prompt", default="", help="the text to continue; default: the start of a document")
    sample.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    sample.add_argument("--top_k", type=int, default=50, help="draw among the likeliest k (default 50)")
    sample.add_argument("--seed", type=int, default=0)
    to_hf = commands.add_parser("export", help="write a Hugging Face folder")
    to_hf.add_argument("checkpoint")
    to_hf.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    if args.command == "export":
        return export(args.checkpoint, args.folder)
    check(args.tokens >= 0 and args.temperature >= 0 and args.top_k > 0,
          "--tokens and --temperature must not be negative, --top_k must be positive")

    from data import get_tokenizer
    model, saved = load_model(args.checkpoint)
    enc = get_tokenizer(saved["tokenizer"])
    idx = torch.tensor([enc.encode_ordinary(args.prompt) or [enc.eot_token]])
    check(idx.max() < model.config.vocab_size, f"--prompt has tokens beyond vocab_size={model.config.vocab_size}")
    random = torch.Generator().manual_seed(args.seed)
    idx = generate(model, idx, args.tokens, args.temperature, args.top_k, enc.n_vocab, random)
    print(enc.decode(idx[0].tolist()))

if __name__ == "__main__":
    import model                # the module that data.py imports too, so that its UserError is ours
    model.run(model.main)
