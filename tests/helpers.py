"""Shared by the tests: paths, scripts run as a user runs them, a tiny model.

The second half implements the model again, with loops in float64. model.py and probe.py are
compared with it.
"""
from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT, Attention, Block, ModelConfig, MoE, RoPE, SwiGLU

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"               # trained models, with scores by other programs
SHARED = ROOT.parent / "shared"                  # beside the repository, if it exists: tasks, a tiktoken cache
TINY = dict(vocab_size=29, block_size=12, n_head=4, n_kv_head=2, n_embd=8, ffn_hidden=24, init_std=0.4)


# ---------------------------------------------------------------------------------------------------------------------
# scripts


class Outcome(NamedTuple):
    """Exit status and output of a script; see `run_script` and the fixture `run_main`."""
    status: int
    out: str
    err: str


def run_python(*args: Any, cwd: str | Path | None = None, env: dict[str, str] | None = None) -> Outcome:
    """Run python with these arguments on one thread, in the folder cwd (default: the current one)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_script(name: str, *args: Any, cwd: str | Path | None = None, env: dict[str, str] | None = None) -> Outcome:
    """Run a script of ours, such as probe.py, as a user does. The fixture `run_main` does it without a new process."""
    return run_python(ROOT / name, *args, cwd=cwd, env=env)


def without(package: str, folder: Path) -> dict[str, str]:
    """An environment in which this package cannot be imported. It uses a file in `folder`."""
    (folder / "without").mkdir()
    (folder / f"without/{package}.py").write_text(f"raise ImportError('no {package}')\n")
    return {"PYTHONPATH": str(folder / "without")}


PEAK = """
def peak():         # peak memory of this process in bytes; ru_maxrss starts at its parent's peak
    try:
        return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                       # macOS: in bytes
"""


def assert_mistake(outcome: tuple[int, str, str], *words: str) -> None:
    """The outcome of a user's mistake: status 2, and one line on stderr that contains these words."""
    status, out, err = outcome
    assert status == 2, (status, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in out
    for word in words:
        assert word in err


# ---------------------------------------------------------------------------------------------------------------------
# a tiny model


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> GPT:
    """A tiny model with large weights and uneven gains.

    With weights of the usual size, 0.02, every softmax is flat and every block is near the
    identity. That would hide mistakes.
    """
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**TINY | settings)).eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    with torch.no_grad():
        model.head.weight *= 1.5
    model.to(dtype)
    model.blocks[0].attn.rope.reset()                 # computes its table again, in dtype
    return model


def make_tokens(rows: int, length: int, vocab_size: int = TINY["vocab_size"], seed: int = 0) -> Tensor:
    """Random ids, (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def checkpoint_of(model: GPT, **more: Any) -> dict[str, Any]:
    """A checkpoint of train.py for a model of bytes, without the entries that only training needs.

    more: entries to add or replace."""
    return {"model": model.state_dict(), "settings": asdict(model.config), "step": 3, "tokenizer": "bytes", **more}


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def differences(want: Any, got: Any, tolerance: Callable[[str], float], floor: float, path: str = "") -> list[str]:
    """The places where two trees of dicts, lists and numbers differ. tolerance(path) is relative.

    Entries that only `got` has are ignored. nan equals nan.
    """
    if isinstance(want, dict):
        found = []
        for key in want:
            if key in got:
                found += differences(want[key], got[key], tolerance, floor, f"{path}.{key}")
            else:
                found.append(f"{path}.{key} is missing")
        return found
    want, got = np.array(want, dtype=float), np.array(got, dtype=float)
    if want.shape != got.shape:
        return [f"{path}: {got.shape} instead of {want.shape}"]
    close = np.abs(want - got) <= tolerance(path) * np.abs(want) + floor
    wrong = ~(close | (np.isnan(want) & np.isnan(got)))
    return [f"{path}: {got[wrong]} instead of {want[wrong]}"] if wrong.any() else []


# ---------------------------------------------------------------------------------------------------------------------
# the model again, for one sequence, with loops in float64. These functions read weights and numbers
# from the model's modules. `assert_as_configured` compares the numbers with the settings.


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * gain over the last dimension."""
    if isinstance(norm, nn.Identity):
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * values(norm.weight)


def values(p: Tensor) -> Tensor:
    """A parameter in float64, detached from its graph."""
    return p.detach().double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def frequencies_by_hand(rope: RoPE) -> list[float]:
    """How far each pair of features turns from one position to the next, in radians: theta^(-2 i / head_dim)."""
    return [rope.theta ** (-i / rope.half) for i in range(rope.half)]


def rotate_by_hand(z: Tensor, position: Sequence[int], rope: RoPE) -> Tensor:
    """RoPE on z (T, head_dim): (i, i + half) is a complex number, multiplied by exp(1j t freq)."""
    angle = torch.tensor(frequencies_by_hand(rope), dtype=torch.float64) * torch.as_tensor(position)[:, None]
    z = torch.complex(z[:, :rope.half], z[:, rope.half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def heads_by_hand(a: Attention, u: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """q of each query head, k and v of each key/value head: (T, head_dim), unrotated; u (T, d)."""
    D, n_q, n_kv = a.head_dim, a.n_head, a.n_kv_head
    qkv = u @ values(a.qkv.weight).T
    q, k, v = qkv[:, :n_q * D], qkv[:, n_q * D:(n_q + n_kv) * D], qkv[:, (n_q + n_kv) * D:]
    qs = [q[:, h * D:(h + 1) * D] for h in range(n_q)]
    ks = [k[:, h * D:(h + 1) * D] for h in range(n_kv)]
    vs = [v[:, h * D:(h + 1) * D] for h in range(n_kv)]
    return qs, ks, vs


def attention_by_hand(block: Block, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What attention adds to the stream x (T, d), and each head's probabilities, (T, T)."""
    a, T = block.attn, len(x)
    position = range(T)
    qs, ks, vs = heads_by_hand(a, rms_norm(x, block.attn_norm) * block.scale)
    mixed, probabilities = [], []
    for h in range(a.n_head):
        g = h // (a.n_head // a.n_kv_head)                 # the key/value head of query head h
        q, k = rotate_by_hand(qs[h], position, a.rope), rotate_by_hand(ks[g], position, a.rope)
        p = torch.zeros(T, T, dtype=torch.float64)
        for t in range(T):
            seen = torch.arange(T) <= t
            p[t, seen] = (k[seen] @ q[t] / math.sqrt(a.head_dim)).softmax(-1)
        mixed.append(p @ vs[g])
        probabilities.append(p)
    y = torch.cat(mixed, dim=-1) @ values(a.proj.weight).T
    return rms_norm(y, block.attn_out_norm), probabilities


def swiglu_by_hand(f: SwiGLU, u: Tensor) -> Tensor:
    return (silu(u @ values(f.gate.weight).T) * (u @ values(f.up.weight).T)) @ values(f.down.weight).T


def moe_by_hand(f: MoE, u: Tensor) -> tuple[Tensor, list[list[int]]]:
    """The output for u (T, d), and each token's experts, the likeliest first."""
    gate, up, down = values(f.gate), values(f.up), values(f.down)
    rows, chosen = [], []
    for token in u:
        p = (values(f.router.weight) @ token).softmax(-1)
        best = sorted(range(len(p)), key=lambda e: -p[e])[:f.top_k]
        total = sum(p[e] for e in best) if f.norm_topk_prob else 1.0
        y = sum(p[e] / total * ((silu(token @ gate[e]) * (token @ up[e])) @ down[e]) for e in best)
        if f.shared is not None:
            y = y + swiglu_by_hand(f.shared, token)
        rows.append(y)
        chosen.append(best)
    return torch.stack(rows), chosen


def ffn_by_hand(block: Block, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What the FFN adds to the stream x (T, d), and each token's experts: [] if it is dense."""
    u, chosen = rms_norm(x, block.ffn_norm) * block.scale, []
    if isinstance(block.ffn, MoE):
        y, chosen = moe_by_hand(block.ffn, u)
    else:
        y = swiglu_by_hand(block.ffn, u)
    return rms_norm(y, block.ffn_out_norm), chosen


def streams_by_hand(model: GPT, sequence: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """h_0 .. h_n of one sequence (T,), each (T, d); a layer is any function of (1, T, d)."""
    x = model.embed.weight.detach()[sequence][None]
    streams = [x[0]]
    for layer in layers:
        x = layer(x)
        streams.append(x[0])
    return streams


def logits_by_hand(model: GPT, x: Tensor) -> Tensor:
    """The logits (T, vocab_size) of a stream (T, d)."""
    return rms_norm(x, model.norm) @ values(model.head.weight).T


def negative_log_likelihood(model: GPT, x: Tensor, sequence: Tensor) -> float:
    """The sum of -log p in nats over the T - 1 next tokens, for the last stream x (T, d)."""
    p = logits_by_hand(model, x).softmax(-1)
    return -sum(math.log(p[t, sequence[t + 1]]) for t in range(len(sequence) - 1))


def loss_by_hand(model: GPT, tokens: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> float:
    """The mean of -log p in nats over the T - 1 predictions of every sequence; tokens (B, T)."""
    total = sum(negative_log_likelihood(model, streams_by_hand(model, s, layers)[-1], s) for s in tokens)
    return total / (len(tokens) * (tokens.size(1) - 1))


class ByHand(NamedTuple):
    """The results of a forward pass."""
    logits: Tensor              # (T, vocab_size)
    streams: list[Tensor]       # h_0 .. h_L, each (T, d)
    attn: list[Tensor]          # what attention added in each block, (T, d)
    ffn: list[Tensor]           # what the FFN added


def model_by_hand(model: GPT, sequence: Tensor) -> ByHand:
    """The whole model on one sequence (T,)."""
    assert_as_configured(model)
    x = values(model.embed.weight)[sequence]
    out = ByHand(logits_by_hand(model, x), [x], [], [])
    for block in model.blocks:
        out.attn.append(attention_by_hand(block, x)[0])
        x = x + out.attn[-1]
        out.ffn.append(ffn_by_hand(block, x)[0])
        x = x + out.ffn[-1]
        out.streams.append(x)
    return out._replace(logits=logits_by_hand(model, x))


def assert_as_configured(model: GPT) -> None:
    """Check that the numbers that the functions above read from modules equal the settings."""
    c = model.config
    assert len(model.blocks) == c.n_layer
    assert {m.eps for m in model.modules() if isinstance(m, nn.RMSNorm)} == {c.norm_eps}
    for layer, block in enumerate(model.blocks, 1):
        a, f = block.attn, block.ffn
        assert math.isclose(block.scale, 1 / math.sqrt(layer) if c.norm == "lns" else 1, rel_tol=1e-15)
        for norm in (block.attn_out_norm, block.ffn_out_norm):
            assert isinstance(norm, nn.RMSNorm if c.norm == "peri" else nn.Identity)
        assert (a.n_head, a.n_kv_head, a.head_dim) == (c.n_head, c.n_kv_head, c.n_embd / c.n_head)
        assert a.qkv.bias is None and a.proj.bias is None
        assert (a.rope.half, a.rope.theta) == (a.head_dim / 2, c.rope_theta)
        assert isinstance(f, MoE if c.n_experts else SwiGLU)
        if c.n_experts:
            assert (len(f.gate), f.top_k, f.norm_topk_prob) == (c.n_experts, c.top_k, c.norm_topk_prob)
            assert (f.shared is not None) == (c.shared_hidden > 0)
