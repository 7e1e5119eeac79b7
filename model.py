"""The model: a Llama-style Pre-RMSNorm transformer with a flag for every choice of the paper.

    model = GPT(ModelConfig(vocab_size=320, n_layer=16, n_kv_head=1))
    logits, loss = model(idx, targets)                             # idx, targets (B, T)

This file holds only the network: settings, blocks, model, loss, sampling.
"The paper" is "When Does Sparsity Mitigate the Curse of Depth in LLMs", arXiv 2603.15389. It uses
norm="pre". The norms "lns" and "peri" are other authors' remedies for the curse of depth.
Each block maps a stream (B, T, n_embd) to a stream of the same shape. So a caller can skip, swap
or replace blocks.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

class UserError(Exception):
    """A user's mistake. The message names the culprit and the remedy; no traceback is shown."""

ABOVE_0 = 1e-38             # the minimum of a setting that must be above 0

def setting(default: Any, meaning: str, allowed: float | str = 0) -> Any:
    """A dataclass field with a help text. allowed: a minimum, or words such as "pre/lns"."""
    return field(default=default, metadata={"help": meaning, "allowed": allowed})

@dataclass
class ModelConfig:
    """The architecture. The constructor replaces 0 in n_kv_head, ffn_hidden and expert_hidden."""
    vocab_size: int = setting(0, "size of the vocabulary; 0: the corpus's, rounded up to a "
                                 "multiple of 64")
    block_size: int = setting(128, "context length T in tokens", 1)
    n_layer: int = setting(8, "number of blocks L", 1)
    n_head: int = setting(4, "number of query heads", 1)
    n_kv_head: int = setting(0, "number of key/value heads, a divisor of n_head; 0: n_head")
    n_embd: int = setting(128, "width d of the residual stream", 1)
    ffn_hidden: int = setting(0, "hidden width of the dense SwiGLU; 0: 4 n_embd, as in the paper")
    n_experts: int = setting(0, "number of experts in each MoE layer; 0: a dense FFN")
    top_k: int = setting(2, "number of experts that each token uses", 1)
    expert_hidden: int = setting(0, "hidden width of an expert; 0: ffn_hidden / top_k")
    shared_hidden: int = setting(0, "hidden width of the shared expert, which every token uses; "
                                    "0: no shared expert")
    norm_topk_prob: bool = setting(False, "rescale the weights of a token's experts to sum to 1")
    lb_loss_weight: float = setting(0.01, "weight of the load-balancing loss in the gradient")
    z_loss_weight: float = setting(0.001, "weight of the router's z-loss in the gradient")
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", 1)
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm", ABOVE_0)
    init_std: float = setting(0.02, "standard deviation of every matrix at initialisation")
    embed_init_std: float = setting(0.0, "standard deviation of the embedding at initialisation; "
                                         "0: init_std")
    scaled_init: bool = setting(False, "as in GPT-2, divide init_std by sqrt(2 n_layer) in the "
                                       "matrices that write to the stream")
    tie_embeddings: bool = setting(False, "the embedding and the head share one matrix")
    norm: str = setting("pre", "lns: LayerNorm Scaling, arXiv 2502.05795; peri: Peri-LN, "
                               "2502.02732", "pre/lns/peri")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_allowed(f.name, getattr(self, f.name), f.metadata["allowed"])
        check(self.n_embd % self.n_head == 0,
              f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_hidden = self.ffn_hidden or 4 * self.n_embd
        check(self.head_dim % 2 == 0,
              f"n_embd / n_head = {self.head_dim} must be even: change n_head={self.n_head}")
        check(self.n_head % self.n_kv_head == 0,
              f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.n_experts:
            check(self.top_k <= self.n_experts,
                  f"top_k={self.top_k} must be at most n_experts={self.n_experts}")
            self.expert_hidden = self.expert_hidden or self.ffn_hidden // self.top_k
            for name in ("n_embd", "expert_hidden"):                      # F.grouped_mm needs this
                width = getattr(self, name)
                check(width > 0 and width % 8 == 0,
                      f"{name}={width} must be a multiple of 8 in a MoE")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.n_embd // self.n_head

def check_allowed(name: str, value: Any, allowed: float | str) -> None:
    """Raise UserError unless a setting is an allowed word, or at least its minimum."""
    if isinstance(allowed, str):
        check(value in allowed.split("/"), f"{name}={value!r} must be one of {allowed}")
    elif isinstance(value, (int, float)):
        minimum = "above 0" if allowed == ABOVE_0 else f"at least {allowed}"
        check(value >= allowed, f"{name}={value} must be {minimum}")

def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)

def wide(x: Tensor) -> Tensor:
    """x in at least float32, the precision of losses and statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if autocast is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype

# ---- the blocks ----------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input. FSDP2 may pass the weight in bfloat16."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

class RoPE(nn.Module):
    """Rotary position embedding, arXiv 2104.09864. Pairs are (i, i + head_dim / 2), as in Llama."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.half = config.head_dim // 2
        self.theta = config.rope_theta
        table = torch.empty(config.block_size, 1, 2 * config.head_dim)
        self.register_buffer("table", table, persistent=False)

    def reset(self) -> None:
        """Fill the table of cosines and sines. __init__ does not: it may run on the meta device."""
        freq = self.theta ** (-torch.arange(self.half, dtype=torch.float64) / self.half)
        position = torch.arange(len(self.table), dtype=torch.float64)
        angle = torch.outer(position, freq)[:, None]                      # (T, 1, head_dim / 2)
        self.table.copy_(torch.cat((angle.cos(), angle.cos(), -angle.sin(), angle.sin()), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, T, heads, head_dim) by their position."""
        cos, sin = self.table[:x.size(1)].chunk(2, dim=-1)                # (T, 1, head_dim)
        return x * cos + x.roll(self.half, dims=-1) * sin

class Attention(nn.Module):
    """Causal self-attention. Grouped-query attention (arXiv 2305.13245) if n_kv_head < n_head."""
    def __init__(self, config: ModelConfig, rope: RoPE):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim        # queries, keys, values
        self.qkv = nn.Linear(config.n_embd, width, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.rope = rope                                       # one table, shared by all blocks

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim); q and k are rotated."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        q, k = self.rope(qk).split((self.n_head, self.n_kv_head), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd) -> (B, T, n_embd)."""
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=self.n_kv_head < self.n_head)
        return self.proj(y.transpose(1, 2).flatten(2))

    def flops_per_token(self, T: int) -> float:
        """FLOPs of q k^T and of the weighted sum of values, for a query that attends to T keys.

        Override this if a query attends to fewer keys. The projections are counted elsewhere.
        """
        return 4 * T * self.n_head * self.head_dim

class SwiGLU(nn.Module):
    """The dense FFN: (silu(x W_gate) * x W_up) W_down."""
    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(n_embd, hidden, bias=False)
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

# Custom operations, because F.grouped_mm lacks float64 and torch.compile rejects it in float32.
@torch.library.custom_op("depth::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix: x (M, K), w (E, K, N) -> (M, N).

    Rows are sorted by expert. The rows of expert e end before row ends[e]; ends is (E,) int32.
    """
    if x.dtype == torch.float64:
        rows_of = x.tensor_split(ends[:-1].cpu().long())
        return torch.cat([rows @ w_e for rows, w_e in zip(rows_of, w)])
    return F.grouped_mm(x, w, offs=ends)

@torch.library.custom_op("depth::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """The gradient of `grouped_mm` w.r.t. w: x (M, K), grad of the product (M, N) -> (E, K, N)."""
    if x.dtype == torch.float64:
        inner = ends[:-1].cpu().long()
        pairs = zip(x.tensor_split(inner), grad.tensor_split(inner))
        return torch.stack([rows.T @ grad_rows for rows, grad_rows in pairs])
    return F.grouped_mm(x.T, grad, offs=ends)

@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), w.size(2))

@grouped_mm_weight.register_fake
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.size(1), grad.size(1))

def grouped_mm_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)

def grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, w, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, w.mT, ends), grouped_mm_weight(x, grad, ends), None

grouped_mm.register_autograd(grouped_mm_backward, setup_context=grouped_mm_setup)

def expert_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """F.grouped_mm in bfloat16, else `grouped_mm`. The first is faster, and inductor fuses it."""
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, w, offs=ends)
    return grouped_mm(x, w, ends)

class Gather(torch.autograd.Function):
    """x[source], where source selects each row of x (N, d) n times.

    Row place[i n + j] of the result is copy j of row i. The backward pass uses `place` to
    gather. The gradient of plain indexing adds rows with atomics, which is slow on a GPU and not
    deterministic.
    """
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        place, = ctx.saved_tensors
        N, d = ctx.shape
        return grad.index_select(0, place).view(N, -1, d).sum(1), None, None

class Router(NamedTuple):
    """Statistics of a MoE layer's router over a micro-batch."""
    lb_loss: Tensor     # (), 1 when perfectly balanced
    z_loss: Tensor      # ()
    load: Tensor        # (n_experts,), each expert's share of the assignments, sums to 1

class MoE(nn.Module):
    """Mixture of SwiGLU experts: softmax, then top-k, as in OLMoE. No token is dropped."""
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
        x = x.reshape(-1, shape[-1])                                      # (N, d)
        logits = wide(self.router(x))
        probs = logits.softmax(-1)                                        # (N, E)
        weight, expert = probs.topk(self.top_k)                           # (N, k)
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)

        order = expert.flatten().argsort(stable=True)                     # (N k,), slots by expert
        count = F.one_hot(expert, E).sum((0, 1))                          # (E,)
        ends = count.cumsum(0).to(torch.int32)
        place = order.argsort()                                           # (N k,), its inverse
        dtype = product_dtype(x)
        rows = Gather.apply(x.to(dtype), order // self.top_k, place)      # (N k, d)
        gate, up, down = (w.to(dtype) for w in (self.gate, self.up, self.down))
        hidden = F.silu(expert_mm(rows, gate, ends)) * expert_mm(rows, up, ends)    # (N k, h)
        rows = expert_mm(hidden, down, ends)                              # (N k, d)
        y = Gather.apply(rows, place, order)                              # back in token order
        y = y.view(-1, self.top_k, shape[-1])                             # (N, k, d)
        y = (y * weight.unsqueeze(-1).to(dtype)).sum(1)                   # (N, d)
        if self.shared is not None:
            y = y + self.shared(x)

        load = count.to(probs.dtype) / expert.numel()        # int / int would give float32
        lb_loss = E * (load * probs.mean(0)).sum()           # eq. 4 of Switch, arXiv 2101.03961
        z_loss = logits.logsumexp(-1).square().mean()        # eq. 5 of ST-MoE, arXiv 2202.08906
        return y.view(shape), Router(lb_loss, z_loss, load)

class Detail(NamedTuple):
    """What a block added to the stream. None: unknown, as in some layers of transformers."""
    attn: Tensor | None         # (B, T, d), from attention
    ffn: Tensor | None          # (B, T, d), from the FFN
    router: Router | None       # None if the FFN is dense

class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). `layer` counts from 1, as in the paper.

    To change what attention or the FFN adds, override attn_output or ffn_output. Then probe.py can
    still remove either sublayer.
    """
    def __init__(self, config: ModelConfig, layer: int, rope: RoPE):
        super().__init__()
        norm = partial(RMSNorm, config.n_embd, config.norm_eps)
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn = Attention(config, rope)
        self.ffn = MoE(config) if config.n_experts else SwiGLU(config.n_embd, config.ffn_hidden)
        self.scale = layer ** -0.5 if config.norm == "lns" else 1.0       # LayerNorm Scaling
        self.attn_out_norm, self.ffn_out_norm = nn.Identity(), nn.Identity()
        if config.norm == "peri":                                         # Peri-LN
            self.attn_out_norm, self.ffn_out_norm = norm(), norm()

    def scaled(self, x: Tensor) -> Tensor:
        """Apply LayerNorm Scaling to the output of a norm."""
        return x if self.scale == 1.0 else x * self.scale

    def attn_output(self, x: Tensor) -> Tensor:
        """What attention adds to the stream x, (B, T, d)."""
        return self.attn_out_norm(self.attn(self.scaled(self.attn_norm(x))))

    def ffn_output(self, x: Tensor) -> tuple[Tensor, Router | None]:
        """What the FFN adds to the stream x (B, T, d), and the statistics of a MoE's router."""
        x = self.scaled(self.ffn_norm(x))
        if isinstance(self.ffn, MoE):
            y, router = self.ffn(x)
        else:
            y, router = self.ffn(x), None
        return self.ffn_out_norm(y), router

    def without_attn(self, x: Tensor) -> Tensor:
        """The stream after the block with attention's output zero, (B, T, d)."""
        return x + self.ffn_output(x)[0]

    def without_ffn(self, x: Tensor) -> Tensor:
        """The stream after the block with the FFN's output zero, (B, T, d)."""
        return x + self.attn_output(x)

    def forward(self, x: Tensor, detail: bool = False) -> Tensor | tuple[Tensor, Detail]:
        """The stream after the block, (B, T, d); with `detail`, also what each sublayer added."""
        attn = self.attn_output(x)
        x = x + attn
        ffn, router = self.ffn_output(x)
        x = x + ffn
        return (x, Detail(attn, ffn, router)) if detail else x

# ---- the model -----------------------------------------------------------------------------------
class GPT(nn.Module):
    """embed -> blocks -> norm -> head. All four are public: probe.py recombines them.

    stream = model.embed(idx)                      # (B, T, d), h_0 of the paper
    for block in model.blocks:
        stream = block(stream)                     # h_1 .. h_L
    logits = model.head(model.norm(stream))        # (B, T, vocab_size)
    """
    def __init__(self, config: ModelConfig):
        super().__init__()
        check(config.vocab_size > 0, "vocab_size=0: the model needs the size of its vocabulary")
        self.config = config
        self.d, self.vocab_size, self.context = config.n_embd, config.vocab_size, config.block_size
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.n_experts, self.init_std = config.n_experts, config.init_std
        self.recompute = False          # recompute activations in the backward pass
        self.logits_at_once = 0         # logits in memory during the loss; 0: logits_at_once()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        rope = RoPE(config)
        layers = range(1, config.n_layer + 1)
        self.blocks = nn.ModuleList(Block(config, layer, rope) for layer in layers)
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Draw matrices from N(0, init_std^2) and set the weights of norms to 1, as in the paper.

        embed_init_std and scaled_init change the standard deviation. Whole matrices are drawn on
        the CPU, so that the values depend neither on the device nor on the number of ranks.
        put(parameter, values) copies the values. train.py passes a `put` for sharded parameters.
        Parameters on the meta device are skipped: call this again after `to_empty`.
        """
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight          # `to_empty` separates them
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            values = torch.empty(p.shape)
            if p.dim() > 1:
                values.normal_(std=self.init_std_of(name))
            else:
                values.fill_(1.0)
            put(p, values)
        self.blocks[0].attn.rope.reset()

    def init_std_of(self, name: str) -> float:
        """The standard deviation of a matrix at initialisation."""
        c = self.config
        if name == "embed.weight" and c.embed_init_std:
            return c.embed_init_std
        if c.scaled_init and name.endswith(("attn.proj.weight", ".down", ".down.weight")):
            return c.init_std / math.sqrt(2 * c.n_layer)
        return c.init_std

    def logits(self, x: Tensor) -> Tensor:
        """The logits (B, T, vocab_size) for the last stream x (B, T, d)."""
        return self.head(self.norm(x))

    def forward(self, idx: Tensor, targets: Tensor | None = None, stats: bool = False,
                return_logits: bool = True):
        """Return the logits (B, T, vocab_size) and the loss, the mean cross-entropy in nats.

        Without targets the loss is None. The auxiliary losses of a MoE change the gradient of the
        loss but not its value. stats=True also returns a dict of statistics. With targets
        and return_logits=False, the logits are None: the loss computes them in chunks.
        """
        c = self.config
        T = idx.size(1)
        check(T <= c.block_size, f"{T} tokens exceed block_size={c.block_size}")
        x = self.embed(idx)                                               # (B, T, d)
        variance, attn_variance, ffn_variance, routers = [], [], [], []
        if stats:
            variance.append(token_variance(x))
        for block in self.blocks:
            if self.recompute and self.training:
                x, did = checkpoint(block, x, detail=True, use_reentrant=False,
                                    preserve_rng_state=False)
            else:
                x, did = block(x, detail=True)
            routers.append(did.router)
            if stats:
                variance.append(token_variance(x))
                attn_variance.append(token_variance(did.attn))
                ffn_variance.append(token_variance(did.ffn))
        x = self.norm(x)

        router = None
        if c.n_experts:                                                   # (L,), (L,), (L, E)
            router = Router(torch.stack([r.lb_loss for r in routers]),
                            torch.stack([r.z_loss for r in routers]),
                            torch.stack([r.load for r in routers]))
        loss = None
        if targets is not None:
            loss = cross_entropy(self.head, x, targets, self.logits_at_once)
            if router:
                aux = c.lb_loss_weight * router.lb_loss.mean()
                aux = aux + c.z_loss_weight * router.z_loss.mean()
                loss = loss + (aux - aux.detach())                        # no change of value
        logits = self.head(x) if return_logits or targets is None else None
        if not stats:
            return logits, loss

        seen = {"variance": torch.stack(variance),                        # (L + 1,), of h_0 .. h_L
                "attn_variance": torch.stack(attn_variance),              # (L,)
                "ffn_variance": torch.stack(ffn_variance)}                # (L,)
        if router:
            seen |= {"lb_loss": router.lb_loss.mean(), "z_loss": router.z_loss.mean(),
                     "expert_load": router.load}
        return logits, loss, seen

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters: total, active, non_embedding.

        active leaves out the experts that a token does not use; non_embedding also leaves out the
        embedding and the head.
        """
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        active = total
        for block in self.blocks:
            if isinstance(block.ffn, MoE):
                experts = sum(w.numel() for w in (block.ffn.gate, block.ffn.up, block.ffn.down))
                active -= experts * (c.n_experts - c.top_k) // c.n_experts
        tables = self.embed.weight.numel()
        if not c.tie_embeddings:
            tables += self.head.weight.numel()
        return {"total": total, "active": active, "non_embedding": active - tables}

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs per token of a training step at context T, by default block_size.

        The forward pass takes 2 FLOPs per active weight of a matrix. Attention counts all T keys,
        as in appendix B of PaLM (arXiv 2204.02311): masked keys are not subtracted. The head
        counts; the embedding is a look-up. The backward pass takes twice as many FLOPs as the
        forward pass; backward=False leaves it out.
        """
        T = T or self.config.block_size
        vectors = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        matrices = self.count_parameters()["non_embedding"] - vectors + self.head.weight.numel()
        forward = 2 * matrices + sum(block.attn.flops_per_token(T) for block in self.blocks)
        return 3 * forward if backward else forward

def logits_at_once(device: torch.device) -> int:
    """The default number of logits in memory during the loss.

    CPU: 32 MB of float32. malloc gets every larger block anew from the operating system.
    GPU: 0.5 GB, so that matrix products are large. On an H200 with 16,384 tokens, a vocabulary of
    50,304 and d = 2,048, the loss takes 28, 25 and 24 ms with 2^26, 2^27 and 2^28 logits, and 24 ms
    with all logits at once.
    """
    return 2**23 if device.type == "cpu" else 2**27

class CrossEntropy(torch.autograd.Function):
    """The sum of -log p(target) in nats for logits x W^T; x (N, d), W (V, d), targets (N,).

    The forward pass takes `rows` tokens at a time. It also computes the gradients of x and W from
    softmax minus one-hot. So the backward pass needs no logits.
    """
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, targets: Tensor, rows: int) -> Tensor:
        dtype = product_dtype(x)
        grad_x, grad_W = torch.empty_like(x), torch.zeros_like(W)
        w = W.to(dtype)                                                   # (V, d)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for some_x, target, grad in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            some_x = some_x.to(dtype)                                     # (rows, d)
            log_p = (some_x @ w.T).log_softmax(-1, dtype=total.dtype)     # (rows, V)
            row = torch.arange(len(target), device=x.device)
            total = total - log_p[row, target].sum()
            slope = log_p.exp_()                       # in place: softmax, then minus one-hot
            slope[row, target] -= 1
            slope = slope.to(dtype)
            grad.copy_(slope @ w)
            if dtype == grad_W.dtype:
                grad_W.addmm_(slope.T, some_x)         # saves a pass over grad_W
            else:
                grad_W += slope.T @ some_x
        ctx.save_for_backward(grad_x, grad_W)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_W = ctx.saved_tensors
        return grad * grad_x, grad * grad_W, None, None

def cross_entropy(head: nn.Linear, x: Tensor, targets: Tensor, at_once: int = 0) -> Tensor:
    """Mean cross-entropy of head(x) in nats; x (B, T, d), targets (B, T) from 0 to V - 1.

    at_once: the number of logits in memory; 0: see the function `logits_at_once`.
    """
    check(type(head) is nn.Linear and head.bias is None,
          "the loss needs a head that is one matrix: adapt CrossEntropy in model.py to your head")
    rows = max(1, (at_once or logits_at_once(x.device)) // head.out_features)
    x = x.flatten(0, 1)
    targets = targets.flatten()
    if torch.is_grad_enabled():
        total = CrossEntropy.apply(x, head.weight, targets, rows)
    else:
        total = sum(F.cross_entropy(wide(head(x)), targets, reduction="sum")
                    for x, targets in zip(x.split(rows), targets.split(rows)))
    return total / targets.numel()

@torch.no_grad()
def token_variance(x: Tensor) -> Tensor:
    """Mean over tokens of the unbiased variance over features, x (B, T, d) -> ()."""
    return wide(x).var(-1).mean()

@torch.no_grad()
def generate(model: GPT, idx: Tensor, n: int, temperature: float = 0.8, top_k: int = 50,
             n_vocab: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Continue idx (B, T) by n tokens: (B, T + n).

    Each token is drawn from the top_k likeliest ones. Temperature 0 takes the likeliest one. Ids
    of n_vocab and above are padding and are never drawn. There is no key/value cache: every token
    costs a full pass.
    """
    for _ in range(n):
        x = model.embed(idx[:, -model.config.block_size:])
        for block in model.blocks:
            x = block(x)
        logits = model.logits(x[:, -1])[:, :n_vocab].float()              # (B, n_vocab)
        kept, ids = logits.topk(min(top_k, logits.size(-1)))
        chance = ((kept - kept[:, :1]) / max(temperature, 1e-9)).softmax(-1)
        drawn = torch.multinomial(chance, 1, generator=generator)         # (B, 1), into ids
        idx = torch.cat((idx, ids.gather(-1, drawn)), dim=1)
    return idx
