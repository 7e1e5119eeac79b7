"""Train a model of the paper, on a laptop or on several GPUs.

    python train.py configs/gqa_deep.py                        # two to five minutes on two cores
    torchrun --nproc-per-node=8 train.py configs/paper/moe_1b.py --parallel=fsdp --resume
    python train.py configs/paper/moe_1b.py --plan --gpus=8    # parameters, hours, memory; no GPU

A config is a Python file that assigns the settings below. `base = "other.py"` starts from another
config. The command line overrides all configs. A run writes these files into out_dir: log.jsonl
(one object per step), ckpt.pt, the checkpoint before it (ckpt.1.pt) and config.json (the settings
and the command). On several nodes, out_dir must be on a disk that all nodes share.

Ctrl-C or SIGTERM stops a run after the step in progress. The run saves a checkpoint and ends with
exit status 0, as a finished run does. --resume continues the run.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")     # torch reads this on import

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data import (Corpus, Parser, check_weights, choose_device, copy_tokenizer, eval_windows,
                  load_checkpoint, need, prepare, run, same_tokenizer, save_checkpoint,
                  train_windows, write_json)
from model import ABOVE_0, GPT, ModelConfig, UserError, check, setting

@dataclass
class TrainConfig(ModelConfig):
    """All settings of a run: those of the model, and these."""
    data: str = setting("data/python", "corpus made by data.py; data/python: made on first use")
    tokens_per_step: int = setting(2048, "tokens per optimizer step, over all ranks", 1)
    batch_size: int = setting(0, "sequences per forward pass of a rank; 0: the rank's whole share")
    eval_tokens: int = setting(65536, "tokens per validation, always the same ones")

    max_steps: int = setting(1000, "number of optimizer steps", 1)
    learning_rate: float = setting(3e-3, "peak learning rate", ABOVE_0)
    min_lr_ratio: float = setting(0.1, "the cosine ends at this fraction of the peak")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices; norms have none")
    beta1: float = setting(0.9, "decay rate of AdamW's first moment")
    beta2: float = setting(0.95, "decay rate of AdamW's second moment")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping")

    out_dir: str = setting("", "folder for the log and checkpoints; empty: out/NAME of the config")
    init_from: str = setting("", "checkpoint that gives the architecture and the initial weights")
    eval_interval: int = setting(200, "steps between validations; 0: never")
    stats_interval: int = setting(50, "steps between statistics of each layer; 0: never")
    save_interval: int = setting(500, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = setting(2, "number of checkpoints: ckpt.pt, ckpt.1.pt, ...", 1)
    wandb: str = setting("", "project of Weights & Biases to send the log to; empty: none")
    parallel: str = setting("ddp", "on several ranks: ddp copies the weights, fsdp shards them",
                            "ddp/fsdp")
    recompute: bool = setting(False, "recompute activations in the backward pass, to save memory")
    seed: int = setting(0, "seed of the initial weights and of the order of the data")
    device: str = setting("auto", "auto: a GPU if there is one, else the CPU; mps: Apple's GPU",
                          "auto/cpu/cuda/mps")
    dtype: str = setting("auto", "dtype of matrix products; auto: bfloat16 on cuda, else float32",
                         "auto/float32/bfloat16")
    compile: bool | None = setting(None, "use torch.compile; auto: only on cuda [auto/true/false]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(max(self.beta1, self.beta2) < 1,
              f"beta1={self.beta1} and beta2={self.beta2} must be below 1")

PYTHON_CORPUS = Path("data/python")              # prepared on first use, in bytes

# ---- the run -------------------------------------------------------------------------------------
def train(c: TrainConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train to max_steps and write out_dir.

    resume: continue from the newest checkpoint in out_dir, if there is one.
    overwrite: rename the files of an earlier run to *.old.
    """
    here = set_up(c)
    batch_shape(c, here.world)                   # refuses a batch that cannot be divided
    if c.wandb:
        need("wandb", "--wandb")
    corpus = open_corpus(c, here)
    c = replace(c, vocab_size=vocabulary(c, corpus))
    with only_writer(Path(c.out_dir), here):
        if not resume:
            check_free(Path(c.out_dir), overwrite)
        train_model(c, corpus, here, resume)
    if dist.is_initialized():
        dist.destroy_process_group()             # after DDP is deleted: gloo would wait for it

def train_model(c: TrainConfig, corpus: Corpus, here: Process, resume: bool) -> None:
    """Build the model, load a checkpoint if asked to, and take the steps."""
    raw, model = build(c, here)
    optimizer = make_optimizer(raw, c)
    done = 0
    if resume:
        done = restore(c, raw, optimizer, corpus, here)
        check(done <= c.max_steps, f"{c.out_dir} is at step {done} already, beyond "
                                   f"max_steps={c.max_steps}: raise it, or give another --out_dir")
    if resume and here.world > 1:
        steps = {"done": torch.tensor(float(done), device=here.device)}
        check(average_over_ranks(steps, here.world)["done"] == done,
              f"the ranks see different checkpoints: put {c.out_dir} on a disk that all share")
    if c.init_from and done == 0:
        start_from_checkpoint(c, raw, corpus.tokenizer)
    if here.rank == 0:
        open_out_dir(c, here, done)
        print(opening_line(c, raw, here, done), flush=True)
    if c.init_from and done == 0 and c.eval_interval:
        loss = evaluate(model, corpus, c, here)
        if here.rank == 0:
            print(f"{c.init_from}: val_loss {loss:.4f} before the first step", flush=True)
    stopped = take_steps(c, corpus, here, raw, model, optimizer, done)
    if here.rank == 0:
        print(closing_lines(c, corpus, stopped))

def take_steps(c: TrainConfig, corpus: Corpus, here: Process, raw: GPT, model: torch.nn.Module,
               optimizer: torch.optim.Optimizer, done: int) -> str:
    """The training loop. Steps are numbered from 1. `done` steps have been taken before.

    raw: the model that holds the weights. model: raw, possibly compiled or wrapped in DDP.
    Returns what stopped the loop before max_steps, or "".
    """
    with catch_signals() as caught, open_log(c, here, raw, done, caught) as log:
        batches = read_batches(corpus, c, here, done)
        for step in range(done + 1, c.max_steps + 1):
            begun = time.perf_counter()
            lr = learning_rate(step - 1, c)                      # counts from 0, as in read_batches
            for group in optimizer.param_groups:
                group["lr"] = lr
            means = gradients(model, batches, here.dtype, due(step, c.stats_interval, c))
            means["grad_norm"] = clip_gradients(raw, c.grad_clip)
            # A signal may reach only one rank. The average of its flag tells all ranks to stop
            # after the same step and to take part in saving.
            means["stop"] = torch.tensor(float(len(caught) > 0), device=here.device)
            batches = read_batches(corpus, c, here, step)        # the next, while a GPU computes
            means = average_over_ranks(means, here.world)        # waits for the GPU
            stop = means.pop("stop") > 0
            check_finite(step, means, c)
            optimizer.step()
            optimizer.zero_grad()

            rate = c.tokens_per_step / (time.perf_counter() - begun)
            record = {"step": step, "tokens": step * c.tokens_per_step, "lr": lr, **means,
                      "tokens_per_s": rate}
            if due(step, c.eval_interval, c):
                record["val_loss"] = evaluate(model, corpus, c, here)
            log(record)
            if stop or step == c.max_steps or due(step, c.save_interval, c):
                save(c, step, raw, optimizer, corpus, here)
            if stop:
                return f"{caught[0] if caught else 'a signal to another rank'} after step {step}"
    return ""

# ---- one step ------------------------------------------------------------------------------------
def due(step: int, interval: int, c: TrainConfig) -> bool:
    """True every `interval` steps and at the last step; never if interval is 0."""
    return interval > 0 and (step % interval == 0 or step == c.max_steps)

def read_batches(corpus: Corpus, c: TrainConfig, here: Process,
                 step: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches: inputs and targets, each (size, T). Steps count from 0."""
    per_step, size = batch_shape(c, here.world)
    n_windows = corpus.n_windows("train", c.block_size)
    windows = train_windows(c.seed, step, per_step, n_windows)
    mine = windows.reshape(-1, size)[here.rank::here.world]      # a row for each forward pass
    return [to_device(corpus.batch("train", ids, c.block_size), here.device) for ids in mine]

def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy a batch to the device. On CUDA the CPU does not wait for the copy."""
    x, y = batch
    if device.type == "cuda":
        return (x.pin_memory().to(device, non_blocking=True),
                y.pin_memory().to(device, non_blocking=True))
    return x.to(device), y.to(device)

def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio of the peak. Steps count from 0."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))           # from 1 to 0
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * cosine)

def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Matrices are decayed, norms are not, as in the released configs."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": c.weight_decay},
              {"params": norms, "weight_decay": 0.0}]
    betas = (c.beta1, c.beta2)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=betas, eps=1e-8, fused=True)

def gradients(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype,
              stats: bool) -> dict[str, Tensor]:
    """Accumulate the gradients of the micro-batches of a step.

    Returns the mean loss and, with `stats`, the mean of each statistic.
    """
    means: dict[str, Tensor] = {}
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1
        wait = isinstance(model, DDP) and not last     # DDP exchanges gradients once per step
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast(x.device, dtype):
                if stats:
                    _, loss, seen = model(x, y, stats=True, return_logits=False)
                else:
                    _, loss = model(x, y, return_logits=False)
                    seen = {}
            (loss / len(batches)).backward()
        for name, value in {"loss": loss.detach(), **seen}.items():
            means[name] = means.get(name, 0) + value / len(batches)
    return means

def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products are computed in dtype. Weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

def clip_gradients(model: GPT, limit: float) -> Tensor:
    """Scale the gradient to a norm of at most `limit`; 0: no limit. Returns the old norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

def average_over_ranks(values: dict[str, Tensor], world: int) -> dict[str, Any]:
    """The mean of every value over the ranks, as Python floats and lists.

    All values are exchanged at once, so that the CPU waits for the device only once per step.
    """
    flat = torch.cat([v.flatten() for v in values.values()])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    parts = flat.cpu().split([v.numel() for v in values.values()])
    return {name: part.view(v.shape).tolist() for (name, v), part in zip(values.items(), parts)}

def check_finite(step: int, means: dict[str, Any], c: TrainConfig) -> None:
    """Raise UserError unless loss and gradient are finite. All ranks decide alike."""
    loss, norm = means["loss"], means["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        good = newest_checkpoint(Path(c.out_dir))
        remedy = f"and use --resume; {good} is the last checkpoint" if good else \
                 "and start over; no checkpoint is saved yet"
        raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: "
                        f"lower learning_rate={c.learning_rate} {remedy}")

@torch.no_grad()
def evaluate(model: torch.nn.Module, corpus: Corpus, c: TrainConfig, here: Process) -> float:
    """Mean loss over eval_tokens of the validation split, in nats per token."""
    _, size = batch_shape(c, here.world)
    count = max(1, c.eval_tokens // c.block_size)
    windows = eval_windows(count, corpus.n_windows("val", c.block_size))
    batches = [windows[i:i + size] for i in range(0, len(windows), size)]
    mine = batches[here.rank::here.world]
    sums = [torch.zeros((), device=here.device)]
    model.eval()
    for i in range(math.ceil(len(batches) / here.world)):
        padding = i >= len(mine)        # FSDP needs the same number of passes on every rank
        ids = batches[0] if padding else mine[i]
        x, y = to_device(corpus.batch("val", ids, c.block_size), here.device)
        with autocast(here.device, here.dtype):
            _, loss = model(x, y, return_logits=False)
        if not padding:
            sums.append(loss * len(ids))
    model.train()
    mean = average_over_ranks({"loss": torch.stack(sums).sum()}, here.world)["loss"]
    return mean * here.world / len(windows)

# ---- before the first step -----------------------------------------------------------------------
class Process(NamedTuple):
    """The rank of this process, and how it computes."""
    rank: int                   # its number, from 0
    world: int                  # how many processes there are
    device: torch.device
    dtype: torch.dtype          # of matrix products

def set_up(c: TrainConfig) -> Process:
    """Choose the device, and join the process group if torchrun started several processes."""
    device = choose_device(c.device)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type != "cpu":
        gpus = torch.accelerator.device_count()
        if world == 1 and gpus > 1:
            print(f"using 1 of {gpus} GPUs: --nproc-per-node=gpu of torchrun uses all of them")
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # torchrun keeps its store when it restarts the processes. A prefix for each restart hides
        # the addresses that earlier processes left in the store.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if c.dtype != "auto":
        dtype = getattr(torch, c.dtype)
    else:       # On some CPUs bfloat16 is 100 times slower than float32.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Process(rank, world, device, dtype)

@contextlib.contextmanager
def catch_signals() -> Iterator[list[str]]:
    """A context in which Ctrl-C and SIGTERM only add their names to the list it yields."""
    caught: list[str] = []

    def catch(number: int, _: Any) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # a second Ctrl-C ends the process at once

    before = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def batch_shape(c: TrainConfig, world: int) -> tuple[int, int]:
    """The number of sequences per step over all ranks, and per forward pass of one rank."""
    per_step = c.tokens_per_step // c.block_size
    size = c.batch_size or max(1, per_step // world)
    whole_windows = per_step > 0 and per_step * c.block_size == c.tokens_per_step
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    check(whole_windows and per_step % (size * world) == 0,
          f"tokens_per_step={c.tokens_per_step} is not a multiple of block_size={c.block_size} x "
          f"batch_size={size} x {ranks}: change one of them")
    return per_step, size

def open_corpus(c: TrainConfig, here: Process) -> Corpus:
    """Open c.data, or prepare PYTHON_CORPUS. Raises UserError if the corpus does not fit c."""
    missing = not Path(c.data, "meta.json").exists()
    if missing and Path(c.data) == PYTHON_CORPUS and here.rank == 0:
        prepare("python", c.data)
    if here.world > 1:
        dist.barrier()                           # the other ranks wait for rank 0
    corpus = Corpus(c.data)
    check(vocabulary(c, corpus) >= corpus.vocab_size,
          f"vocab_size={c.vocab_size}, but {c.data} needs {corpus.vocab_size}")
    corpus.n_windows("train", c.block_size)      # refuses a split that is too short
    if c.eval_interval:
        corpus.n_windows("val", c.block_size)
    return corpus

def vocabulary(c: TrainConfig, corpus: Corpus | None = None) -> int:
    """vocab_size, or if that is 0 the vocabulary of the corpus, rounded up to a multiple of 64.

    Without a corpus the vocabulary is a guess: bytes for PYTHON_CORPUS, else GPT-2's.
    """
    if c.vocab_size:
        return c.vocab_size
    if corpus is not None:
        tokens = corpus.vocab_size
    elif Path(c.data) == PYTHON_CORPUS:
        tokens = 257
    else:
        tokens = 50257
    return 64 * math.ceil(tokens / 64)

def build(c: TrainConfig, here: Process) -> tuple[GPT, torch.nn.Module]:
    """Return raw, a model with initial weights, and the model to call in training.

    DDP, and torch.compile on one rank, wrap raw. FSDP2, and torch.compile on several ranks, change
    raw in place. Without a wrapper, the two are the same object.
    """
    sharded = here.world > 1 and c.parallel == "fsdp"
    raw = bare(c)                                # on meta: it may be too large for one GPU
    raw.recompute = c.recompute
    compiled = here.device.type == "cuda" if c.compile is None else c.compile
    if compiled and here.world > 1:
        compile_blocks(raw)
    if sharded:
        shard(raw, here)
    raw.to_empty(device=here.device)
    torch.manual_seed(c.seed)
    raw.init_weights(put)
    if here.world == 1:
        return raw, torch.compile(raw, dynamic=False) if compiled else raw
    if sharded:
        return raw, raw
    ids = [here.device.index] if here.device.type == "cuda" else None
    model = DDP(raw, device_ids=ids, gradient_as_bucket_view=True)
    model.broadcast_buffers = False              # RoPE's tables are the same on all ranks
    return raw, model

def bare(c: ModelConfig) -> GPT:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return GPT(c)

def compile_blocks(model: GPT) -> None:
    """Compile each block alone. Between blocks, DDP sends gradients and FSDP2 fetches weights.

    torch.compile of a whole DDP model makes one graph for each 25 MB of gradients: 66 graphs for
    configs/paper/dense_1b.py. Blocks share one graph, which compiles in less than half the time.
    """
    torch._dynamo.config.optimize_ddp = False
    # With norm="lns" every block has its own scale, and so its own graph.
    torch._dynamo.config.recompile_limit = 4 * len(model.blocks) + 8
    for block in model.blocks:
        block.compile(dynamic=False)

def shard(model: GPT, here: Process) -> None:
    """Shard the model in place with FSDP2: every rank holds a part of every weight.

    A block gathers its weights in here.dtype when it is called, and frees them afterwards. The
    stream and all other weights stay in float32.
    """
    mesh = init_device_mesh(here.device.type, (here.world,))    # default: a GPU if there is one
    policy = MixedPrecisionPolicy(param_dtype=here.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

def put(p: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter. Under FSDP2 this rank takes only its shard."""
    if isinstance(p, DTensor):
        values = distribute_tensor(values.to(p.device), p.device_mesh, p.placements,
                                   src_data_rank=None)
    p.copy_(values)

# ---- checkpoints ---------------------------------------------------------------------------------
# A checkpoint holds whole tensors by name, so that one rank, DDP and FSDP2 write the same file.
# Saving gathers the tensors in the CPU memory of rank 0. Loading gives every rank its part.
WHOLE = StateDictOptions(full_state_dict=True)
ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)

def save(c: TrainConfig, step: int, model: GPT, optimizer: torch.optim.Optimizer, corpus: Corpus,
         here: Process) -> None:
    """Write out_dir/ckpt.pt. All ranks must call it. Raises UserError if a weight is not finite."""
    weights = get_model_state_dict(model, options=ON_CPU)
    moments = {}                                 # AdamW has none before the first step
    if optimizer.state:
        moments = get_optimizer_state_dict(model, optimizer, options=ON_CPU).get("state", {})
    if here.rank > 0:
        return
    check(all(w.isfinite().all() for w in weights.values()),
          f"step {step}: some weights are not finite: lower learning_rate={c.learning_rate}; "
          "this step is not saved")
    out = Path(c.out_dir)
    save_checkpoint(out / "ckpt.pt", {
        "settings": asdict(c), "step": step, "tokenizer": copy_tokenizer(corpus.tokenizer, out),
        "corpus": checksum(corpus), "model": weights, "optimizer": moments}, c.keep_checkpoints)

def restore(c: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, corpus: Corpus,
            here: Process) -> int:
    """Load weights and moments from the newest checkpoint in out_dir. Returns its step, or 0."""
    path = newest_checkpoint(Path(c.out_dir))
    if path is None:
        if here.rank == 0:
            print(f"nothing to resume in {c.out_dir}: starting afresh")
        return 0
    saved = load_checkpoint(path)
    check("optimizer" in saved and "step" in saved,
          f"{path} holds no optimizer, so it cannot be resumed: use --init_from={path}")
    check_resumable(c, corpus, saved, path, here.rank)
    load_weights(model, saved, path)
    if saved["optimizer"]:
        names = {p: name for name, p in model.named_parameters()}
        # The decay comes from the current settings. A checkpoint has no groups.
        groups = [group | {"params": [names[p] for p in group["params"]]}
                  for group in optimizer.param_groups]
        state = {"state": saved["optimizer"], "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    return saved["step"]

def load_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """Load a checkpoint's weights, sharded or not. Raises UserError if they do not fit."""
    check_weights(model, saved, path)
    set_model_state_dict(model, saved["model"], options=WHOLE)

def check_resumable(c: TrainConfig, corpus: Corpus, saved: dict[str, Any], path: Path,
                    rank: int) -> None:
    """Print changed settings. Raises UserError if a setting that must not change has changed."""
    theirs = saved["settings"]
    check(same_tokenizer(corpus.tokenizer, saved["tokenizer"]),
          f"{path} was trained on tokens of {saved['tokenizer']!r}, but {c.data} has "
          f"{corpus.tokenizer!r}: give another --data, or another --out_dir")
    moved = theirs.get("data") != c.data         # another path, which is printed below
    check(moved or saved.get("corpus", checksum(corpus)) == checksum(corpus),
          f"{c.data} has changed since {path} was trained on it: put the old corpus back, "
          "or start over in another --out_dir")
    fixed = {f.name for f in fields(ModelConfig)} | {"seed", "tokens_per_step"}
    for name, value in asdict(c).items():
        if name not in theirs or theirs[name] == value:
            continue
        check(name not in fixed,
              f"{name}={value}, but {path} was trained with {name}={theirs[name]}: "
              "give that value, or another --out_dir")
        if rank == 0:
            print(f"resuming with {name}={value} instead of {theirs[name]}")

def checksum(corpus: Corpus) -> int:
    """One checksum of the checksums of all shards in meta.json."""
    shards = [shard.get("crc32") for split in ("train", "val")
              for shard in corpus.meta[split]["shards"]]
    return zlib.crc32(json.dumps(shards).encode())

def start_from_checkpoint(c: TrainConfig, model: GPT, tokenizer: str) -> None:
    """Load the weights of init_from. Its tokenizer must be that of the corpus."""
    saved = load_checkpoint(c.init_from)
    check(same_tokenizer(saved["tokenizer"], tokenizer),
          f"{c.init_from} was trained on tokens of {saved['tokenizer']!r}, but {c.data} has "
          f"{tokenizer!r}: give another --data")
    load_weights(model, saved, c.init_from)

def newest_checkpoint(out: Path) -> Path | None:
    """ckpt.pt, else ckpt.1.pt, else None. A crash between two renames may leave no ckpt.pt."""
    names = [out / "ckpt.pt", out / "ckpt.1.pt"]
    return next((path for path in names if path.exists()), None)

# ---- out_dir, the log and the terminal -----------------------------------------------------------
@contextlib.contextmanager
def only_writer(out: Path, here: Process) -> Iterator[None]:
    """A context in which rank 0 locks out_dir. The lock also ends when the process dies."""
    if here.rank > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another run writes to {out}: wait for it, stop it, or give another "
                            "--out_dir") from e
        except OSError as e:                     # some network disks have no locks
            print(f"{out} cannot be locked ({e}): do not start a second run there")
        yield

def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError if out_dir holds a checkpoint and --overwrite is not given."""
    check(overwrite or newest_checkpoint(out) is None,
          f"{out} holds a checkpoint: continue the run with --resume, give another --out_dir, or "
          "rename its files to *.old with --overwrite")

def open_out_dir(c: TrainConfig, here: Process, done: int) -> None:
    """Write config.json. Cut the log after step `done`, or rename the files of an earlier run."""
    out = Path(c.out_dir)
    if done > 0:
        cut_log(out / "log.jsonl", done)
    else:
        for path in (*out.glob("log.jsonl"), *out.glob("config.json"), *out.glob("ckpt*.pt")):
            os.replace(path, f"{path}.old")
            print(f"{path} of an earlier run is now {path.name}.old")
    device = torch.cuda.get_device_name() if here.device.type == "cuda" else str(here.device)
    write_json(out / "config.json", {
        "settings": asdict(c), "command": [sys.executable, *sys.argv], "folder": os.getcwd(),
        "python": platform.python_version(), "torch": torch.__version__, "commit": commit(),
        "host": platform.node(), "device": device, "world_size": here.world})

def cut_log(path: Path, done: int) -> None:
    """Drop the lines of steps after `done`, and an incomplete last line."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        os.truncate(path, sum(len(line) for line in kept))       # a crash here loses no kept line

def commit() -> str | None:
    """The git commit, with -dirty if files were changed since. None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None

def opening_line(c: TrainConfig, model: GPT, here: Process, done: int) -> str:
    n = model.count_parameters()
    line = (f"writes to {c.out_dir}: {n['total'] / 1e6:.2f}M parameters "
            f"({n['active'] / 1e6:.2f}M active), {c.n_layer} layers, "
            f"{c.max_steps * c.tokens_per_step / 1e6:.1f}M tokens of {c.data}, "
            f"{here.world} x {here.device.type}, {here.dtype}")
    return f"{line}, from step {done}" if done > 0 else line

def closing_lines(c: TrainConfig, corpus: Corpus, stopped: str) -> str:
    ckpt = Path(c.out_dir, "ckpt.pt")
    if stopped:
        return f"stopped by {stopped}; {ckpt} is saved: --resume continues from there"
    line = f"trained to step {c.max_steps}"
    if "bigram_entropy" in corpus.meta:
        entropy = corpus.meta["bigram_entropy"]
        line += f"; the corpus's bigram entropy is {entropy:.4f} nats per token"
    return f"{line}\nwhich layers does it use?  python probe.py {ckpt}"

@contextlib.contextmanager
def open_log(c: TrainConfig, here: Process, model: GPT, done: int,
             caught: list[str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context with log(record), which writes to log.jsonl, terminal and wandb on rank 0."""
    if here.rank > 0:
        yield lambda record: None
        return
    flops = model.flops_per_token()
    peak = (peak_flops(here.device, here.dtype) or 0) * here.world

    def log(record: dict[str, Any]) -> None:
        if peak:
            record["mfu"] = flops * record["tokens_per_s"] / peak
        with open(Path(c.out_dir, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        if tracker:
            tracker.log(dict(numbers("", record)), step=record["step"])
        try:
            show(record, c)
        except BrokenPipeError:                  # the reader has ended, as in `| head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            caught.append("a closed output pipe")                # save and stop, as for a signal

    with wandb_run(c, done) as tracker:
        yield log

def show(record: dict[str, Any], c: TrainConfig) -> None:
    """Print a progress line, cut to the terminal's width.

    Ten lines per run and those with a validation stay. On a terminal, the next line overwrites any
    other line. Without a terminal, other lines are not printed.
    """
    step, rate = record["step"], record["tokens_per_s"]
    left = (c.max_steps - step) * c.tokens_per_step / rate / 60
    line = f"step {step}/{c.max_steps}  loss {record['loss']:.4f}"
    if "val_loss" in record:
        line += f"  val_loss {record['val_loss']:.4f}"
    line += f"  {rate:,.0f} tokens/s"
    if "mfu" in record:
        line += f"  MFU {record['mfu']:.0%}"
    line += f"  {left:.1f} min left"
    if "variance" in record:
        line += f"  variance {record['variance'][0]:.2g} to {record['variance'][-1]:.2g}"
    stays = "val_loss" in record or due(step, math.ceil(c.max_steps / 10), c)
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line[:width].ljust(width), end="\n" if stays else "", flush=True)
    elif stays:
        print(line, flush=True)
    if step == c.max_steps and "variance" in record:
        print(f"variance of the streams h_0 .. h_{c.n_layer}:",
              " ".join(f"{v:.3g}" for v in record["variance"]), flush=True)

def wandb_run(c: TrainConfig, done: int) -> Any:
    """A context with the run of Weights & Biases, or with None if c.wandb is empty.

    A resumed run continues the run whose id is in out_dir/wandb_id.
    """
    if not c.wandb:
        return contextlib.nullcontext()
    wandb, file = need("wandb", "--wandb"), Path(c.out_dir, "wandb_id")
    earlier = file.read_text("utf-8") if done > 0 and file.exists() else None
    tracker = wandb.init(project=c.wandb, name=c.out_dir, dir=c.out_dir, config=asdict(c),
                         id=earlier, resume="allow")
    file.write_text(tracker.id, "utf-8")
    return tracker

def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Flatten a record into named numbers. The items of a list are name/0, name/1, ..."""
    if isinstance(value, (dict, list)):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(f"{name}/{key}" if name else str(key), x)
    else:
        yield name, value

# ---- the peak of a GPU, and --plan ---------------------------------------------------------------
# FLOP/s of dense bfloat16 matrix products with float32 accumulation, from the makers' data sheets.
# The first entry that is part of the card's name applies.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
        "B200": 2250e12, "A100": 312e12, "A10": 125e12, "L4": 121e12, "L40S": 362e12,
        "RTX A6000": 155e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12,
        "MI300X": 1307e12}
OTHER_CARD = re.compile(r"\b(Laptop|Ti|SUPER|D|NVL|MIG)\b")    # a variant, or a part of the card

def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's peak FLOP/s, for MFU. None unless dtype is bfloat16 and PEAK has the card."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(device)
        for name, peak in PEAK.items():
            found = re.search(rf"\b{name}\b", card)
            if found and not OTHER_CARD.search(card, found.end()):
                return peak
    return None

def plan(c: TrainConfig, gpus: int, mfu: float) -> str:
    """The output of --plan: parameters, FLOPs, hours, memory per GPU. Allocates no model."""
    c = replace(c, vocab_size=vocabulary(c))
    batch_shape(c, gpus)                         # refuses a batch that cannot be divided
    model = bare(c)
    n = model.count_parameters()
    tokens = c.max_steps * c.tokens_per_step
    flops = model.flops_per_token()
    peak = PEAK["H100"]
    hours = flops * tokens / (gpus * peak * mfu) / 3600
    lines = [
        f"parameters   {n['total']:,} total, {n['active']:,} active for a token",
        f"FLOPs        {flops:,.0f} per token of training at T={c.block_size}",
        f"tokens       {tokens:,} in {c.max_steps:,} steps of {c.tokens_per_step:,}",
        f"hours        {hours:,.1f} on {gpus} H100 at {mfu:.0%} of their {peak / 1e12:.0f} TFLOP/s",
        f"GB per GPU   {'weights':>10}{'gradients':>10}{'AdamW':>10}{'total':>10}"
        "  without activations"]
    for parallel, ranks in (("ddp", 1), ("fsdp", gpus)):
        weights = 4 * n["total"] / ranks / 1e9    # float32, like gradients and both moments
        columns = (weights, weights, 2 * weights, 4 * weights)
        lines.append(f"  {parallel:11}" + "".join(f"{gb:10.2f}" for gb in columns))
    lines.append(f"host memory  {12 * n['total'] / 1e9:,.1f} GB on rank 0 while it saves")
    return "\n".join(lines)

# ---- settings: defaults < config files < command line --------------------------------------------
def load_settings(argv: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The settings of a command line, and its options: resume, overwrite, plan, gpus, mfu."""
    args, unknown = make_parser().parse_known_intermixed_args(argv)
    if unknown:
        kind_of(unknown[0].lstrip("-").split("=")[0], "command line")
        raise UserError(f"command line: {unknown[0]}: settings are given as --name=value")
    values: dict[str, Any] = {}
    for path in args.configs:
        values |= read_config(Path(path))
    for f in fields(TrainConfig):
        given = getattr(args, f.name)
        if given is not None:
            values[f.name] = typed(f.name, given, "command line")
    for name in ("data", "out_dir", "init_from"):
        if name in values:
            values[name] = os.path.expanduser(values[name])
    if not values.get("out_dir"):
        name = Path(args.configs[-1]).stem if args.configs else "run"
        values["out_dir"] = f"out/{name}"
    if values.get("init_from"):
        add_architecture(values, values["init_from"])
    return TrainConfig(**values), args

def make_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__,
                    usage="train.py [CONFIG.py ...] [--setting=value ...]")
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG.py", help="files of settings, applied in order")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true",
                       help="continue from the newest checkpoint in out_dir")
    start.add_argument("--overwrite", action="store_true",
                       help="rename an earlier run's files and start anew")
    add("--plan", action="store_true", help="only print parameters, FLOPs, hours and memory")
    add("--gpus", type=int, default=8, help="number of GPUs for --plan (default 8)")
    add("--mfu", type=float, default=0.4,
        help="fraction of the peak FLOP/s for --plan (default 0.4)")
    group = parser.add_argument_group("model")
    starts = {"data": "data", "max_steps": "optimizer", "out_dir": "run"}     # first of each group
    for f in fields(TrainConfig):
        if f.name in starts:
            group = parser.add_argument_group(starts[f.name])
        default = {None: "auto", "": "''"}.get(f.default, str(f.default))
        meaning, allowed = f.metadata["help"], f.metadata["allowed"]
        if isinstance(allowed, str):
            meaning += f" [{allowed}]"
        group.add_argument(f"--{f.name}", metavar=default, help=meaning)
    return parser

def read_config(path: Path) -> dict[str, Any]:
    """The settings that a config file assigns, on top of those of its `base`.

    Modules, functions, and names that begin with _ are not settings.
    """
    check(path.is_file() and path.suffix == ".py",
          f"no config {path}: {path.absolute()} is not a Python file. Give a file of assignments "
          "such as n_layer = 16, or a setting such as --n_layer=16")
    try:
        assigned = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:         # whatever went wrong in the file
        first_line = str(e).partition("\n")[0]
        raise UserError(f"{path}: {type(e).__name__}: {first_line}") from e
    for name in assigned.get("__annotations__", {}):
        check(name in assigned, f"{path}: `{name}: ...` assigns nothing: write {name} = ...")
    values = {name: value for name, value in assigned.items()
              if not (name.startswith("_") or callable(value) or isinstance(value, ModuleType))}
    base = values.pop("base", "")
    check(isinstance(base, str),
          f"{path}: base={base!r} must be the name of another config, such as 'dense.py'")
    inherited = read_config(path.parent / base) if base else {}
    return inherited | {name: typed(name, value, str(path)) for name, value in values.items()}

def kind_of(name: str, where: str) -> str:
    """The type of a setting, as written in TrainConfig. Raises UserError for an unknown name."""
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{where}: no setting {name!r}{hint} (python train.py --help lists them)")
    return kinds[name]

def typed(name: str, value: Any, where: str) -> Any:
    """A value from a config or the command line, in the type of its setting."""
    kind = kind_of(name, where)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("bool"):
        word = str(value).lower()
        if word in ("true", "false"):
            return word == "true"
        if word in ("auto", "none") and kind == "bool | None":
            return None
    if kind in ("int", "float") and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            if math.isfinite(number) and (kind == "float" or number.is_integer()):
                return number if kind == "float" else int(number)
    wanted = {"int": "a whole number", "float": "a number", "str": "text"}
    raise UserError(f"{where}: {name}={value!r} must be {wanted.get(kind, 'true or false')}")

def add_architecture(values: dict[str, Any], path: str) -> None:
    """Add a checkpoint's architecture to the settings. Raises UserError if the two disagree."""
    saved = load_checkpoint(path)["settings"]
    free = ("block_size", "lb_loss_weight", "z_loss_weight")    # no weight depends on them
    for f in fields(ModelConfig):
        if f.name in saved:
            ours = values.setdefault(f.name, saved[f.name])
            check(f.name in free or ours == saved[f.name],
                  f"{f.name}={ours}, but {path} has {f.name}={saved[f.name]}: leave it out")

def main() -> None:
    c, args = load_settings(sys.argv[1:])
    if args.plan:
        print(plan(c, args.gpus, args.mfu))
    else:
        train(c, args.resume, args.overwrite)

if __name__ == "__main__":
    run(main)
