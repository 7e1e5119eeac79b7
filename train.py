"""Train a model of the paper, on a laptop or on every GPU there is.

    torchrun train.py configs/gqa_deep.py                   # two to five minutes on two cores
    torchrun --nproc-per-node=8 train.py configs/paper/moe_1b.py --parallel=fsdp --resume
    python train.py configs/paper/moe_1b.py --plan --gpus=8      # parameters, memory, hours; no GPU

A config is a Python file of assignments to the settings below; `base = "other.py"` in it starts
from a neighbour. The command line overrides it. Writes out_dir/log.jsonl (one object per step) and
out_dir/ckpt.pt, the one before as ckpt.1.pt; config.json says what was run, lock keeps a second run
out. Ctrl-C, SIGTERM and SIGHUP save and stop. Several nodes need an out_dir that all of them see.
Every setting, with its default:
"""
from __future__ import annotations

import ast
import contextlib
import decimal
import difflib
import errno
import json
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")     # torch reads it when it is imported

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data import (Corpus, Parser, check_weights, choose_device, copy_tokenizer, eval_windows,
                  load_checkpoint, need, prepare, run, same_tokenizer, save_checkpoint, train_windows,
                  write_json)
from model import GPT, ModelConfig, UserError, check, logits_at_once, setting

@dataclass
class TrainConfig(ModelConfig):
    """Every setting of a run: the model's and these. The optimizer's defaults are the paper's."""
    data: str = setting("data/python", "prepared corpus, see data.py; data/python is prepared on first use")
    out_dir: str = setting("", "where log.jsonl and ckpt.pt go; empty: out/NAME of the config")
    wandb: str = setting("", "project of Weights & Biases that log.jsonl is sent to as well; empty: none")
    init_from: str = setting("", "checkpoint whose architecture and weights to start from")
    max_steps: int = setting(1000, "optimizer steps", 1)
    tokens_per_step: int = setting(2048, "tokens in the global batch of a step, whatever block_size is", 1)
    batch_size: int = setting(0, "sequences per forward pass and rank; 0: the rank's whole share at once")
    learning_rate: float = setting(3e-3, "peak learning rate", 1e-38)
    min_lr_ratio: float = setting(0.1, "the cosine ends at this share of the peak")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "decoupled decay of every matrix, embeddings included; none on norms")
    beta1: float = setting(0.9, "AdamW's first moment")
    beta2: float = setting(0.95, "AdamW's second moment")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping")
    eval_interval: int = setting(200, "steps between validations; 0: never")
    eval_tokens: int = setting(65536, "validation tokens, the same ones every time")
    stats_interval: int = setting(50, "steps between per-layer statistics; 0: never")
    save_interval: int = setting(500, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = setting(2, "how many of the newest stay: ckpt.pt, ckpt.1.pt, ...; at most 10", 1)
    parallel: str = setting("ddp", "with several ranks; fsdp: FSDP2, weights, gradients, optimizer sharded", "ddp/fsdp")
    recompute: bool = setting(False, "recompute a block's activations in the backward pass: less memory, more FLOPs")
    seed: int = setting(0, "of the weights and of the order of the data")
    device: str = setting("auto", "auto: every GPU there is, else the CPU; mps: Apple's", "auto/cpu/cuda/mps")
    dtype: str = setting("auto", "float32 is TF32 on cuda; auto: bfloat16 (autocast) on cuda", "auto/float32/bfloat16")
    compile: bool | None = setting(None, "torch.compile: true | false | auto: on cuda, and for long CPU runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(max(self.beta1, self.beta2) < 1,
              f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        check(self.keep_checkpoints <= 10,
              f"keep_checkpoints={self.keep_checkpoints} must be at most 10")

# FLOPs of a run from which on torch.compile pays on a CPU. Measured for configs/gqa_deep.py on two
# cores: a step takes 0.156 s instead of 0.198 s, its three graphs 131 s at first and 45 s from
# inductor's cache, so it pays from 3,100 steps on (4.7e13), and from the cache 1,100.
COMPILING_PAYS = 5e13
PYTHON_CORPUS = Path("data/python")      # is prepared on first use, as bytes

# ---- the run -------------------------------------------------------------------------------------
def train(c: TrainConfig, resume: bool = False, overwrite: bool = False,
          configs: Sequence[str] = ()) -> None:
    """Train to max_steps; see the module's docstring for what is written.

    overwrite: an earlier run in out_dir is put aside. configs: the files that c was read from.
    """
    here = set_up(c)
    batch_shape(c, here.world)                   # refuses now what does not divide
    check_compiler(c, here)
    if c.wandb:
        need("wandb", "--wandb")
    if here.rank == 0:
        prepare_python_corpus(c)
    resume = agree_to_resume(resume, here)       # the others wait here while rank 0 prepares
    corpus = open_corpus(c)
    c = replace(c, vocab_size=vocabulary(c, corpus))
    out = Path(c.out_dir)
    with only_writer(out, here):
        if here.rank == 0 and not resume:
            check_free(out, overwrite)
        take_steps(c, corpus, here, resume, overwrite, configs)
    if dist.is_initialized():
        dist.destroy_process_group()

def take_steps(c: TrainConfig, corpus: Corpus, here: Process, resume: bool, overwrite: bool,
               configs: Sequence[str]) -> None:
    """All of `train` that computes, in an out_dir that is this run's own."""
    per_step, size = batch_shape(c, here.world)
    raw, model = build(c, here)
    optimizer = make_optimizer(raw, c)
    done = 0                                     # steps that an earlier run has taken
    if resume:
        done = restore(c, raw, optimizer, corpus, here)
    if c.init_from and done == 0:
        start_from_checkpoint(c, raw, corpus.tokenizer)
        if here.world > 1:
            dist.barrier()                       # rank 0 may put it aside now: all have read it

    out = Path(c.out_dir)
    ckpt = out / "ckpt.pt"
    flops = raw.flops_per_token()
    peak = peak_of_all(here)
    tokenizer = corpus.tokenizer
    if here.rank == 0:
        open_out_dir(out, done, overwrite and not resume, describe(c, here, configs))
        tokenizer = copy_tokenizer(tokenizer, out)       # so that the checkpoint stands alone
        print(opening_line(c, raw, here, done), flush=True)
    if c.init_from and done == 0 and c.eval_interval:
        loss = evaluate(model, corpus, c, size, here)
        if here.rank == 0:
            print(f"before the first step: val_loss {loss:.4f}, of {c.init_from}", flush=True)
    started = time.perf_counter()
    waited = 0.0                                 # seconds for batches
    saving_took = 0.0                            # and for checkpoints
    stopped_by = ""                              # the name of a signal
    with (wandb_run(c, done, here) as sent, catch_signals() as caught,
          ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as saver):
        # While a step computes, the next one's batches are read and the last checkpoint is written.
        read = partial(read_batches, corpus, c, per_step, size, here)
        upcoming = loader.submit(read, done)
        saving = saver.submit(lambda: None)      # nothing yet
        for step in range(done + 1, c.max_steps + 1):
            begun = time.perf_counter()
            batches = [to_device(batch, here.device) for batch in upcoming.result()]
            upcoming = loader.submit(read, step)
            waited += time.perf_counter() - begun

            lr = learning_rate(step - 1, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            stats = due(step, c.stats_interval, c.max_steps)
            means = gradients(model, batches, here.dtype, stats)
            means["grad_norm"] = clip_gradients(raw, c.grad_clip)
            means["signals"] = torch.tensor([float(s in caught) for s in SIGNALS],
                                            device=here.device)
            means = average_over_ranks(means, here.world)
            counts = means.pop("signals")                # one rank's signal stops them all
            stopped_by = next((s.name for s, n in zip(SIGNALS, counts) if n > 0), "")
            record = {"step": step, "tokens": step * c.tokens_per_step, "lr": lr, **means}
            check_finite(record, c)
            optimizer.step()
            optimizer.zero_grad()

            record["tokens_per_s"] = c.tokens_per_step / seconds_since(begun)
            if due(step, c.eval_interval, c.max_steps):
                record["val_loss"] = evaluate(model, corpus, c, size, here)
            if here.rank == 0:
                mfu = flops * record["tokens_per_s"] / peak if peak else None
                left = seconds_since(started) / (step - done) * (c.max_steps - step)
                report(record, out, c, mfu, left)
                if sent:
                    sent.log(dict(numbers("", record)), step=step)

            begun = time.perf_counter()
            last = stopped_by != "" or step == c.max_steps
            if last or due(step, c.save_interval, c.max_steps):
                saving.result()                          # raises the error of a full disk
                saved = snapshot(c, step, tokenizer, raw, optimizer, here.rank)
                saved["corpus"] = checksum(corpus)
                if here.rank == 0:
                    saving = saver.submit(save_checkpoint, ckpt, saved, c.keep_checkpoints)
                del saved                                # once written, its memory is free again
            if last or saving.done():
                saving.result()
            saving_took += time.perf_counter() - begun
            if stopped_by:
                break
    if here.rank == 0:
        if stopped_by:
            print(f"stopped by {stopped_by} after step {step}; {ckpt} is saved; this goes on from "
                  f"there:  {resuming_command()}")
        elif done >= c.max_steps:
            print(f"{out} has all its steps already: --max_steps=... to go on")
        else:
            print(closing_lines(ckpt, corpus, seconds_since(started), waited, saving_took))

# ---- one step ------------------------------------------------------------------------------------
def due(step: int, interval: int, max_steps: int) -> bool:
    """Is it time for what comes every `interval` steps (0: never) and at the end?"""
    return interval > 0 and (step % interval == 0 or step == max_steps)

def seconds_since(begun: float) -> float:
    """Of time.perf_counter, which never runs backwards; above 0, so that one may divide by it."""
    return max(time.perf_counter() - begun, 1e-9)

def read_batches(corpus: Corpus, c: TrainConfig, per_step: int, size: int, here: Process,
                 step: int) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches of a step: inputs and targets, each (size, T); step counts from 0."""
    n_windows = corpus.n_windows("train", c.block_size)
    passes = train_windows(c.seed, step, per_step, n_windows).reshape(-1, size)     # of all ranks
    mine = passes[here.rank::here.world]
    return [pinned(corpus.batch("train", ids, c.block_size), here.device) for ids in mine]

def pinned(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch in memory from which CUDA copies by itself, if that is where it goes."""
    x, y = batch
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else batch

def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch on the device.

    On CUDA the CPU goes on while the copy waits for the step before; it must be `pinned`. Elsewhere
    such a copy can read memory that is freed: https://github.com/pytorch/pytorch/issues/189690.
    """
    x, y = (t.to(device, non_blocking=device.type == "cuda") for t in batch)
    return x, y

def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio of the peak; step counts from 0."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))           # from 1 to 0
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * cosine)

def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on every matrix and none on norms (facts of the released configs)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": c.weight_decay},
              {"params": norms, "weight_decay": 0.0}]
    betas = (c.beta1, c.beta2)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=betas, eps=1e-8, fused=True)

def gradients(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype,
              stats: bool) -> dict[str, Tensor]:
    """Accumulate the gradients of one step's micro-batches.

    Returns their mean loss and, if asked, the means of the statistics.
    """
    means: dict[str, Tensor] = {}
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1
        exchange_later = isinstance(model, DDP) and not last    # once per step
        with model.no_sync() if exchange_later else contextlib.nullcontext():
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
    """Matrix products in bfloat16, if that is the dtype, of weights that stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

def clip_gradients(model: GPT, limit: float) -> Tensor:
    """Shorten the gradient to the limit, 0 being none; returns the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return whole(norm)

def average_over_ranks(values: dict[str, Tensor], world: int) -> dict[str, Any]:
    """The mean of every value over the ranks, as Python floats and lists.

    One exchange and one synchronisation, however many values there are.
    """
    flat = torch.cat([v.flatten() for v in values.values()])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    parts = flat.cpu().split([v.numel() for v in values.values()])
    return {name: part.view(v.shape).tolist() for (name, v), part in zip(values.items(), parts)}

def check_finite(record: dict[str, Any], c: TrainConfig) -> None:
    """UserError unless the loss and the gradient of a step are finite; all ranks see the same."""
    loss = record["loss"]
    norm = record["grad_norm"]
    check(math.isfinite(loss) and math.isfinite(norm),
          f"step {record['step']}: loss {loss}, gradient norm {norm}: "
          f"lower learning_rate={c.learning_rate} (from ckpt.1.pt, if ckpt.pt came too late); "
          "nothing of this step was saved")

@torch.no_grad()
def evaluate(model: torch.nn.Module, corpus: Corpus, c: TrainConfig, size: int,
             here: Process) -> float:
    """Mean loss over eval_tokens of the validation split in nats per token, `size` windows a pass."""
    count = max(1, c.eval_tokens // c.block_size)
    windows = eval_windows(count, corpus.n_windows("val", c.block_size))
    batches = [windows[i:i + size] for i in range(0, len(windows), size)]
    mine = batches[here.rank::here.world]
    sums = [torch.zeros((), device=here.device)]        # of a pass each; added up pairwise
    model.eval()
    for i in range(math.ceil(len(batches) / here.world)):
        counts = i < len(mine)      # else a pass of no account: FSDP needs as many from every rank
        ids = mine[i] if counts else batches[0]
        batch = pinned(corpus.batch("val", ids, c.block_size), here.device)
        x, y = to_device(batch, here.device)
        with autocast(here.device, here.dtype):
            _, loss = model(x, y, return_logits=False)
        if counts:
            sums.append(loss * len(ids))
    model.train()
    total = torch.stack(sums).sum()
    mean = average_over_ranks({"loss": total}, here.world)["loss"]
    return mean * here.world / len(windows)

# ---- before the first step -----------------------------------------------------------------------
class Process(NamedTuple):
    """Where this process computes."""
    rank: int                   # which of the processes it is, from 0
    world: int                  # how many there are
    device: torch.device
    dtype: torch.dtype          # of the matrix products

def set_up(c: TrainConfig) -> Process:
    """Join the process group if torchrun made one."""
    device = choose_device(c.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    bare_torchrun = world == 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if device.type != "cpu":
        gpus = torch.accelerator.device_count()
        if bare_torchrun and gpus > 1:
            start_over_on_every_gpu(gpus)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check(ranks <= gpus, f"{ranks} ranks on a machine where torch sees {gpus} x {device.type}: "
                             f"--nproc-per-node={gpus}, or --device=cpu")
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        join_group(dist.get_default_backend_for_device(device), world)
    if c.dtype != "auto":
        dtype = getattr(torch, c.dtype)
    else:       # On a CPU bfloat16 is anything from faster to 100 times slower. Apple's GPUs can
                # have it too, but nobody has measured there what it gains or loses.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Process(int(os.environ.get("RANK", "0")), world, device, dtype)

def start_over_on_every_gpu(gpus: int) -> None:
    """Replace the one process of a bare `torchrun train.py` by one per GPU that is visible."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={gpus}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])

def join_group(backend: str, world: int) -> None:
    """Find the other ranks, in a part of torchrun's store that no earlier start of theirs has used.

    torchrun keeps its store over restarts: they would find their predecessors' addresses.
    """
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)

def restarts() -> int:
    """How often torchrun has started the processes of this node again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

def agree_to_resume(asked: bool, here: Process) -> bool:
    """Does the run go on where it was? If one rank is to, all do: torchrun counts by the node."""
    wish = torch.tensor(float(asked or restarts() > 0), device=here.device)
    return average_over_ranks({"resume": wish}, here.world)["resume"] > 0

# What saves and stops; Windows has no SIGHUP.
SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if name in signal.Signals.__members__]

@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Inside, SIGNALS do not end the process: they appear in the list. A second Ctrl-C does, of which
    torchrun makes a SIGTERM."""
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            for second in (signal.SIGINT, signal.SIGTERM):
                signal.signal(second, signal.SIG_DFL)    # the system's: no wait for a step's end

    before = {s: signal.getsignal(s) for s in SIGNALS}
    for s, handler in before.items():
        if handler != signal.SIG_IGN:            # nohup has a run go on when its terminal closes
            signal.signal(s, catch)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def batch_shape(c: TrainConfig, world: int) -> tuple[int, int]:
    """Sequences per step over all ranks, and sequences per forward pass of one rank."""
    per_step = c.tokens_per_step // c.block_size
    size = c.batch_size or max(1, per_step // world)
    whole_windows = per_step > 0 and per_step * c.block_size == c.tokens_per_step
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    check(whole_windows and per_step % (size * world) == 0,
          f"tokens_per_step={c.tokens_per_step} is no multiple of block_size={c.block_size} x "
          f"batch_size={size} x {ranks}: change one of them")
    return per_step, size

def check_compiler(c: TrainConfig, here: Process) -> None:
    """UserError if torch.compile is asked for on a CPU and would find no C++ compiler."""
    install = {"darwin": "xcode-select --install",
               "win32": "install the Build Tools for Visual Studio"}
    remedy = install.get(sys.platform, "install g++, for example with: apt install build-essential")
    check(not c.compile or here.device.type != "cpu" or compiler_found(),
          f"compile=True needs a C++ compiler, and there is no working {cpp_compiler()}: {remedy}; "
          "or leave --compile out")

def cpp_compiler() -> str:
    """The C++ compiler that torch.compile would call on a CPU."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", usual)

def compiler_found() -> bool:
    path = shutil.which(cpp_compiler())
    return path is not None and tells_its_version(path)

def tells_its_version(compiler: str) -> bool:
    """Does it work at all? Of Windows' cl there is no such question."""
    if sys.platform == "win32":
        return True
    return subprocess.run([compiler, "--version"], capture_output=True).returncode == 0

def prepare_python_corpus(c: TrainConfig) -> None:
    """Prepare the one corpus that needs no download, if the run is on it and it is not there yet."""
    missing = not Path(c.data, "meta.json").exists()
    if missing and Path(c.data) == PYTHON_CORPUS:
        prepare("python", c.data)

def open_corpus(c: TrainConfig) -> Corpus:
    """The corpus, if it suits the settings: a split too short shows now, and not after hours."""
    corpus = Corpus(c.data)
    check(vocabulary(c, corpus) >= corpus.vocab_size,
          f"vocab_size={c.vocab_size}, but {c.data} needs {corpus.vocab_size}")
    corpus.n_windows("train", c.block_size)
    if c.eval_interval:
        corpus.n_windows("val", c.block_size)
    return corpus

def vocabulary(c: TrainConfig, corpus: Corpus | None = None) -> int:
    """vocab_size, or where that is 0 the tokens of the corpus, rounded up to a multiple of 64.

    Without the corpus itself they are guessed from its name: bytes for PYTHON_CORPUS, else GPT-2's.
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
    """The model with its first weights, and the same one as a step calls it.

    The second is compiled, if asked, and parallel, if there are several ranks.
    """
    sharded = here.world > 1 and c.parallel == "fsdp"
    raw = bare(c)                                # what fits no single GPU is never whole on one
    raw.recompute = c.recompute
    compiled = c.compile
    if compiled is None:
        compiled = worth_compiling(c, raw, here)
        if compiled and here.device.type == "cpu":
            print("compiling: about two minutes, once for models of this shape "
                  "(--compile=false: none)", flush=True)
    if compiled and here.world > 1:              # alone, the whole model is one graph: see below
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
    model.broadcast_buffers = False              # in a pass: the only buffers are RoPE's tables
    return raw, model

def bare(c: ModelConfig) -> GPT:
    """The model without storage."""
    with torch.device("meta"):
        return GPT(c)

def worth_compiling(c: TrainConfig, model: GPT, here: Process) -> bool:
    """compile=auto: will the whole run be faster, with the time that compiling takes?"""
    if here.device.type != "cpu":
        return here.device.type == "cuda"
    flops = model.flops_per_token() * c.tokens_per_step * c.max_steps
    return here.world == 1 and flops > COMPILING_PAYS and compiler_found()

def compile_blocks(model: GPT) -> None:
    """torch.compile, a block at a time: one graph serves them all, and between two of them the
    ranks exchange gradients (DDP) or fetch weights (FSDP2).

    Of a whole model DDP makes a graph for each 25 MB of gradients: of configs/paper/dense_1b.py 66,
    where this makes one, in less than half the time.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 4 * len(model.blocks) + 8    # lns: each block is a graph
    for block in model.blocks:
        block.compile(dynamic=False)

def shard(model: GPT, here: Process) -> None:
    """FSDP2: each rank holds a part of every weight, and a block's are whole while it computes.

    Blocks compute in here.dtype. Embedding, norm and head stay float32, as the stream does.
    """
    mesh = init_device_mesh(here.device.type, (here.world,))    # else it would take the GPUs it sees
    policy = MixedPrecisionPolicy(param_dtype=here.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

# ---- checkpoints ---------------------------------------------------------------------------------
def start_from_checkpoint(c: TrainConfig, model: GPT, tokenizer: str) -> None:
    """The weights of init_from, which must have been trained on the same tokens."""
    saved = load_checkpoint(c.init_from)
    check(same_tokenizer(saved["tokenizer"], tokenizer),
          f"{c.init_from} was trained on {saved['tokenizer']!r} tokens "
          f"and {c.data} has {tokenizer!r}")
    load_weights(model, saved, c.init_from)

@torch.no_grad()
def restore(c: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, corpus: Corpus,
            here: Process) -> int:
    """Weights and optimizer from out_dir's newest whole checkpoint; returns its step, 0 without."""
    found = [newest_checkpoint(Path(c.out_dir)) if here.rank == 0 else None]
    if here.world > 1:
        dist.broadcast_object_list(found)
    path = found[0]
    if path is None:
        return 0
    saved = load_checkpoint(path)
    check("optimizer" in saved and "step" in saved,
          f"{path} holds no optimizer to resume with: use --init_from={path}")
    check_resumable(c, corpus, saved, path, here.rank)
    load_weights(model, saved, path)
    for name, p in model.named_parameters():
        state = {}
        for key, value in saved["optimizer"][name].items():
            if value.dim() > 0:
                state[key] = put(torch.zeros_like(p), value)
            else:                                # how many steps AdamW has taken
                state[key] = value.to(p.device, copy=True)
        optimizer.state[p] = state
    return saved["step"]

def check_resumable(c: TrainConfig, corpus: Corpus, saved: dict[str, Any], path: Path,
                    rank: int) -> None:
    """Say which settings are others than before; UserError for those that must not change."""
    tokenizer = corpus.tokenizer
    check(same_tokenizer(tokenizer, saved["tokenizer"]),
          f"{path} was trained on tokens of {saved['tokenizer']!r}, but {c.data} has {tokenizer!r}: "
          "give another --data, or another --out_dir")
    theirs = saved["settings"]
    ours = checksum(corpus)
    moved = os.path.realpath(theirs.get("data", "")) != os.path.realpath(c.data)     # is said below
    check(moved or saved.get("corpus", ours) == ours,    # older checkpoints have none
          f"{c.data} has changed since {path} was trained on it (checksums of its meta.json): "
          "put the old corpus back, or start over in another --out_dir")
    fixed = {f.name for f in fields(ModelConfig)} | {"seed", "tokens_per_step"}
    for name, value in asdict(c).items():
        if name not in theirs or theirs[name] == value:
            continue
        check(name not in fixed,
              f"{name}={value}, but {path} was trained with {name}={theirs[name]}: "
              "give it, or another --out_dir")
        if rank == 0:
            print(f"resuming with {name}={value} instead of {theirs[name]}")

def checksum(corpus: Corpus) -> int:
    """One number for those of all shards, as meta.json has them."""
    shards = [shard.get("crc32") for split in ("train", "val")
              for shard in corpus.meta[split]["shards"]]
    return zlib.crc32(json.dumps(shards).encode())

def load_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """Put a checkpoint's weights into a model, sharded or not; UserError where they do not fit."""
    check_weights(model, saved, path)
    for name, p in model.state_dict().items():
        put(p, saved["model"][name])

def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, None without one; damaged ones are named and passed over.

    UserError where one cannot be read: it may well be whole.
    """
    names = [out / "ckpt.pt", *sorted(out.glob("ckpt.[0-9].pt"))]
    found = [path for path in names if path.exists()]
    for i, path in enumerate(found):
        if is_whole(path):
            for damaged in found[:i]:            # out of the way: the next save moves them all down
                os.replace(damaged, f"{damaged}.damaged")
            return path
        print(f"{path} is damaged: trying the one before", flush=True)
    check(not found, f"{out}: every checkpoint is damaged; "
          "move them away, or start over without --resume")
    print(f"nothing to resume in {out}: starting afresh")
    return None

def is_whole(path: Path) -> bool:
    """Does a checkpoint hold what was written? It is a zip file with checksums."""
    try:
        # First, since where the disk fails, torch's memory map would end the process.
        with zipfile.ZipFile(path) as archive:
            sound = archive.testzip() is None
        load_checkpoint(path)
        return sound
    except Exception as e:                       # a flipped bit can make a zip file fail in any way
        cause = e if isinstance(e, OSError) else e.__context__       # zipfile hides some
        # EINVAL is damage: it was followed to a place before the file's beginning.
        unreadable = isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL)
        check(not unreadable, f"cannot read {path} ({cause}): mend that and --resume again; "
                              "nothing was changed")
        return False

def snapshot(c: TrainConfig, step: int, tokenizer: str, model: GPT,
             optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
    """What is saved, in rank 0's host memory; all ranks must ask. UserError on a weight not finite.

    Weights and AdamW's moments are whole and by name: the same whatever engine ran them.
    """
    def copy(t: Tensor) -> Tensor | None:
        t = whole(t.detach())
        return t.to("cpu", copy=True) if rank == 0 else None

    # The weights first: afterwards FSDP2's parameters are sharded again. Tied ones are one copy.
    weights, copies = {}, {}
    for name, p in model.state_dict(keep_vars=True).items():
        if id(p) not in copies:
            copies[id(p)] = copy(p)
        weights[name] = copies[id(p)]
    moments = {}
    for name, p in model.named_parameters():
        moments[name] = {key: copy(value) for key, value in optimizer.state[p].items()}
    if rank == 0:
        check(all(w.isfinite().all() for w in weights.values()),
              f"step {step}: weights that are not finite: lower learning_rate={c.learning_rate}; "
              "nothing of this step was saved")
    return {"settings": asdict(c), "step": step, "tokenizer": tokenizer,
            "model": weights, "optimizer": moments}

def whole(t: Tensor) -> Tensor:
    """The tensor of which t is this rank's shard under FSDP; all ranks must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t

def put(p: Tensor, values: Tensor) -> Tensor:
    """Copy a whole tensor into p, which may be this rank's shard of one (FSDP2); returns p."""
    if isinstance(p, DTensor):
        values = distribute_tensor(values.to(p.device), p.device_mesh, p.placements,
                                   src_data_rank=None)
    return p.copy_(values)

# ---- out_dir, and what is shown ------------------------------------------------------------------
@contextlib.contextmanager
def only_writer(out: Path, here: Process) -> Iterator[None]:
    """Inside, no other run writes to out_dir: rank 0 holds a lock, which ends with its process."""
    if here.rank > 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
    except OSError as e:
        raise UserError(f"cannot write to out_dir={out} ({e}): choose another --out_dir") from e
    with file:
        take_lock(file, out)
        try:
            yield
        finally:
            file.truncate(0)

def take_lock(file: IO[str], out: Path) -> None:
    """Lock the file and write into it who has it; UserError if another run does."""
    if fcntl is None:
        print(f"no file locks on this system: nothing keeps a second run out of {out}")
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        holder = file.read().strip() or "another run"
        raise UserError(f"{holder} writes to {out}: wait for it, stop it, "
                        "or give another --out_dir") from e
    except OSError as e:
        print(f"no file locks on its disk ({e}): nothing keeps a second run out of {out}")
        return
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}")
    file.flush()

def check_free(out: Path, overwrite: bool) -> None:
    """UserError if a fresh start would be on top of an earlier run."""
    check(overwrite or not any(out.glob("ckpt*.pt")),
          f"{out} holds a checkpoint: --resume goes on from it, another --out_dir leaves it alone, "
          "--overwrite puts it aside as *.old, in place of any *.old there")

def open_out_dir(out: Path, done: int, overwrite: bool, config: dict[str, Any]) -> None:
    """Write config.json; the log stays up to step `done`. At 0, an earlier run becomes *.old."""
    try:
        if done > 0:
            go_on_with_log(out / "log.jsonl", done)
        else:
            for path in (*out.glob("log.jsonl"), *out.glob("config.json"),
                         *sorted(out.glob("ckpt*.pt"))):
                old = put_aside(path, "old", overwrite)
                print(f"{path} of an earlier run is now {old.name}")
        write_json(out / "config.json", config)
    except BrokenPipeError:                      # of what is printed here: see data.run
        raise
    except OSError as e:
        raise UserError(f"cannot write to out_dir={out} or read its log.jsonl ({e}): "
                        "choose another --out_dir") from e

def put_aside(path: Path, ending: str, overwrite: bool = False) -> Path:
    """Rename to path.ending, or path.ending2, ... if that is there and must stay."""
    aside = Path(f"{path}.{ending}")
    n = 1
    while aside.exists() and not overwrite:
        n += 1
        aside = Path(f"{path}.{ending}{n}")
    os.replace(path, aside)
    return aside

def describe(c: TrainConfig, here: Process, configs: Sequence[str]) -> dict[str, Any]:
    """What a colleague needs to repeat the run."""
    device = str(here.device)
    if here.device.type == "cuda":
        device = torch.cuda.get_device_name(here.device)
    return {"settings": asdict(c), "command": [sys.executable, *sys.argv], "folder": os.getcwd(),
            "configs": [os.path.relpath(path) for path in configs],      # from that folder
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit(),
            "host": platform.node(), "device": device, "world_size": here.world}

def commit() -> str | None:
    """The git commit of this file, with -dirty if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True,
                              text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

def check_same_config(out: Path, configs: Sequence[str]) -> None:
    """UserError if the out_dir that a config's name leads to is a run of its namesake elsewhere.

    A folder that was moved as a whole, configs and a relative out_dir in it, is the same still.
    """
    try:
        told = json.loads((out / "config.json").read_text())
        theirs = str(told["configs"][-1]) if told["configs"] else "no config"
        whole = os.path.normpath(os.path.join(told["folder"], theirs))
    except (OSError, ValueError, LookupError, TypeError):
        return                                   # an older run has none
    ours = os.path.relpath(configs[-1]) if configs else "no config"
    same = whole == os.path.abspath(ours) or (theirs == ours and not out.is_absolute())
    check(same, f"{out} is a run of {whole}, not of {ours}: give another --out_dir "
                f"(--out_dir={out} takes it all the same)")

def resuming_command() -> str:
    """What goes on with this run. Of several nodes, each needs its own rendezvous options."""
    command = [Path(sys.executable).name]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // ranks
        where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "--rdzv-endpoint=..."]
        command = ["torchrun", *where, f"--nproc-per-node={ranks}"]
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    return shlex.join([*command, *words, "--resume"])

def go_on_with_log(path: Path, done: int) -> None:
    """Keep a log up to step `done`; without one, or with one that is damaged, begin anew."""
    wrong = "is not there"
    if path.exists():
        try:
            wrong = "" if path.stat().st_size > 0 else "is empty"
            last = cut_log(path, done)
            if not wrong and last != done:
                print(f"{path} ends at step {last}: the steps up to {done} are missing in it")
        except (ValueError, LookupError, TypeError):
            wrong = f"is damaged, and now {put_aside(path, 'damaged').name}"
    if wrong:
        print(f"{path} {wrong}: a new one begins after step {done}")

def cut_log(path: Path, done: int) -> int:
    """Drop the lines of steps after `done`, and a last one that was cut off as it was written;
    returns the last step that stays."""
    length = last = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and json.loads(line)["step"] <= done:
            length += len(line)
            last = json.loads(line)["step"]
    os.truncate(path, length)
    return last

def opening_line(c: TrainConfig, model: GPT, here: Process, done: int) -> str:
    n = model.count_parameters()
    line = (f"writes to {c.out_dir}: {n['total'] / 1e6:.2f}M parameters "
            f"({n['active'] / 1e6:.2f}M active), {c.n_layer} layers, "
            f"{c.max_steps * c.tokens_per_step / 1e6:.1f}M tokens of {c.data}, "
            f"{here.world} x {here.device.type}, {here.dtype}")
    if done > 0:
        line += f", from step {done}"
    return line

def report(record: dict[str, Any], out: Path, c: TrainConfig, mfu: float | None,
           left: float) -> None:
    """A line of log.jsonl, and one to be seen: mfu is a share, None on a CPU; left are seconds.

    Lines with a validation or statistics stay, and the last one; others only show on a terminal.
    """
    try:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {out / 'log.jsonl'} ({e.strerror}): "
                        "mend that and --resume") from e
    line = (f"step {record['step']}/{c.max_steps}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  ")
    if mfu is not None:
        line += f"MFU {mfu:.0%}  "
    line += f"{left / 60:.1f} min left"
    if "val_loss" in record:
        line += f"  val_loss {record['val_loss']:.4f}"
    stays = "val_loss" in record or "variance" in record or record["step"] == c.max_steps
    line = line.ljust(100)                       # over what is left of the line before
    if sys.stdout.isatty():
        print("\r" + line, end="\n" if stays else "", flush=True)
    elif stays:
        print(line, flush=True)
    if "variance" in record:
        variances = " ".join(f"{v:.2g}" for v in record["variance"])
        print(f"  variance of h_0 .. h_{c.n_layer}: {variances}", flush=True)

def wandb_run(c: TrainConfig, done: int, here: Process) -> Any:
    """The run of Weights & Biases that records are sent to, which ends with the context; None in a
    context if there is none. What is resumed goes on in the run of out_dir/wandb_id."""
    if not c.wandb or here.rank > 0:
        return contextlib.nullcontext()
    wandb, file = need("wandb", "--wandb"), Path(c.out_dir, "wandb_id")
    earlier = file.read_text() if done > 0 and file.exists() else None
    try:
        sent = wandb.init(project=c.wandb, name=c.out_dir, dir=c.out_dir, config=asdict(c),
                          id=earlier, resume="allow")
    except wandb.Error as e:
        first_line = str(e).partition("\n")[0]
        raise UserError(f"--wandb={c.wandb}: {first_line} (`wandb login` logs in, with "
                        "WANDB_MODE=offline nothing leaves this machine)") from e
    file.write_text(sent.id)
    return sent

def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a record, each by its own name: of a list name/0, name/1, ..."""
    if isinstance(value, (dict, list)):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(f"{name}/{key}" if name else str(key), x)
    else:
        yield name, value

def closing_lines(ckpt: Path, corpus: Corpus, seconds: float, waited: float,
                  saving_took: float) -> str:
    line = (f"trained in {seconds / 60:.1f} min, of which {waited / seconds:.2%} waiting for data "
            f"and {saving_took / seconds:.2%} for checkpoints")
    entropy = corpus.meta.get("bigram_entropy")
    if entropy:
        line += f"; the corpus's bigram entropy is {entropy:.4f} nats per token"
    return f"{line}\nwhich layers does it use?  python probe.py {ckpt}"

# ---- how fast it could be ------------------------------------------------------------------------
# FLOP/s of dense bfloat16 products that are summed in float32, from the makers' data sheets; of two
# names that are in a card's the first counts
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
        "B200": 2250e12, "A100": 312e12, "A10": 125e12, "L4": 121e12, "L40S": 362e12,
        "RTX A6000": 155e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12,
        "MI300X": 1307e12}
OTHER_CARD = re.compile(r"\b(Laptop|Ti|SUPER|D|NVL|MIG)\b")       # after a name: not that card, or a part

def peak_of_all(here: Process) -> float | None:
    """FLOP/s of all ranks to measure MFU against; None on a CPU: what else runs there changes it."""
    if here.device.type == "cpu":
        return None
    return peak_flops(here.device, here.dtype) * here.world

def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to measure MFU against: the data sheet's, if it is above, else a matrix product's."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(device)
        for name, peak in PEAK.items():
            found = re.search(rf"\b{name}\b", card)
            if found and not OTHER_CARD.search(card, found.end()):
                return peak
    return gemm_rate(device, dtype, 1024 if device.type == "cpu" else 8192)

def gemm_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n x n matrix product, best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(10))

def timed(f: Callable[[], Any], device: torch.device) -> float:
    """Seconds that f takes, on all ranks."""
    def now() -> float:
        torch.get_device_module(device).synchronize()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    begun = now()
    f()
    return now() - begun

# ---- what a run would take: --plan ---------------------------------------------------------------
def plan(c: TrainConfig, gpus: int, mfu: float) -> str:
    """Parameters, FLOPs, tokens, hours, memory of a GPU under DDP and FSDP2; allocates nothing."""
    check(gpus > 0 and 0 < mfu <= 1,
          f"--gpus={gpus} must be positive and --mfu={mfu} above 0 and at most 1")
    c = replace(c, vocab_size=vocabulary(c))
    model = bare(c)
    _, size = batch_shape(c, gpus)
    n = model.count_parameters()
    parts = ", ".join(f"{part} {count:,}" for part, count in parameters_by_part(model).items())
    tokens = c.max_steps * c.tokens_per_step
    flops = model.flops_per_token()
    peak = PEAK["H100"]
    hours = flops * tokens / (gpus * peak * mfu) / 3600
    header = "".join(f"{name:>10}" for name in (*Memory._fields, "total"))
    lines = [
        f"parameters   {n['total']:,} total, {n['active']:,} active for a token",
        f"             {parts}",
        f"FLOPs        {flops:,.0f} per token of training at T={c.block_size}",
        f"tokens       {tokens:,} in {c.max_steps:,} steps of {c.tokens_per_step:,}",
        f"hours        {hours:,.1f} on {gpus} H100 at {mfu:.0%} of their {peak / 1e12:.0f} TFLOP/s",
        "",
        (f"GB per GPU of {gpus}, {size} sequences of {c.block_size} per pass, "
         "eager (torch.compile needs less)"),
        f"{'':22}{header}"]
    for parallel in ("ddp", "fsdp"):
        for recompute in (False, True):
            needed = memory(replace(c, parallel=parallel, recompute=recompute), gpus, size)
            name = f"{parallel}, recompute" if recompute else parallel
            numbers = "".join(f"{bytes / 1e9:10.2f}" for bytes in (*needed, sum(needed)))
            verdict = "fits 80 GB" if sum(needed) < 80e9 else "does not fit 80 GB"
            lines.append(f"{name:22}{numbers}  {verdict}")
    lines += ["", f"host memory  {12 * n['total'] / 1e9:,.1f} GB of rank 0 while it saves a checkpoint: "
                  "weights and AdamW's two moments"]
    return "\n".join(lines)

def parameters_by_part(model: GPT) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        kinds = ("norm", "embed", "head", "attn", "router", "ffn")
        part = next(kind for kind in kinds if kind in name)     # the first: attn_norm is a norm
        parts[part] = parts.get(part, 0) + p.numel()
    return parts

class Memory(NamedTuple):
    """Bytes on one GPU."""
    weights: int
    gradients: int
    optimizer: int      # AdamW's two moments
    passing: int        # at most what comes and goes in a pass

def memory(c: TrainConfig, gpus: int, size: int) -> Memory:
    """What training takes with `size` sequences per pass."""
    bf16 = c.dtype != "float32"
    sharded = c.parallel == "fsdp" and gpus > 1
    model = bare(c)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())

    of_two_blocks = pass_memory(replace(c, n_layer=2), size, sharded)
    of_three = pass_memory(replace(c, n_layer=3), size, sharded)
    each_further = of_three - of_two_blocks
    passing = of_two_blocks + (c.n_layer - 2) * each_further
    if sharded:
        # FSDP2 has whole at a time: two blocks' weights (the next is fetched ahead) and one's
        # gradients, both as computed and in float32 for the reduction, and the weights and
        # gradients of embedding and head.
        number = 2 if bf16 else 4                # bytes
        passing += block * (2 * number + number + 4)
        passing += (total - c.n_layer * block) * (4 + 4)
    share = gpus if sharded else 1
    return Memory(4 * total // share, 4 * total // share, 8 * total // share, passing)

def pass_memory(c: TrainConfig, size: int, sharded: bool) -> int:
    """Bytes that come and go in a pass, which really runs, on tensors that have no storage."""
    # torch's private parts: where a new version has moved them, only plans fail.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    dtype = torch.float32 if c.dtype == "float32" else torch.bfloat16
    with FakeTensorMode():
        model = GPT(c)
        model.recompute = c.recompute
        planned = torch.device("cpu" if c.device == "cpu" else "cuda")
        model.logits_at_once = logits_at_once(planned)
        idx = torch.zeros(size, c.block_size).long()
        if sharded and dtype == torch.bfloat16:
            for p in model.blocks.parameters():  # as FSDP2 gathers them: autocast makes no copies
                p.data = p.data.bfloat16()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        tracker = MemTracker()
        tracker.track_external(model, idx)
        with tracker:
            gradients(model, [(idx, idx)], dtype, stats=False)
        peak = tracker.get_tracker_snapshot("peak")[idx.device]["Total"]
        rest = tracker.get_tracker_snapshot("current")[idx.device]["Total"]
    return peak - rest

# ---- settings: defaults < config files < command line --------------------------------------------
def load_settings(argv: list[str]) -> tuple[TrainConfig, Any]:
    """The settings of a command line, and its switches: resume, overwrite, plan, gpus, mfu."""
    args, unknown = make_parser().parse_known_intermixed_args(argv)
    args.configs = [os.path.expanduser(path) for path in args.configs]
    if unknown:
        kind_of(unknown[0].lstrip("-").split("=")[0], "command line")
        raise UserError(f"command line: {unknown[0]}: settings are given as --name=value")
    given = [name for name in ("plan", "resume", "overwrite") if getattr(args, name)]
    check(len(given) < 2, " and ".join(f"--{name}" for name in given) + ": one at a time")
    for name, usual in (("gpus", 8), ("mfu", 0.4)):
        check(args.plan or getattr(args, name) is None, f"--{name} goes with --plan")
        if getattr(args, name) is None:
            setattr(args, name, usual)
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
    if args.out_dir is None and not args.plan:
        check_same_config(Path(values["out_dir"]), args.configs)
    if values.get("init_from"):
        add_architecture(values, values["init_from"])
    return TrainConfig(**values), args

def make_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__,
                    usage="train.py [CONFIG.py ...] [--setting=value ...]")
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG.py", help="files of settings, applied in order")
    add("--resume", action="store_true",
        help="go on from out_dir's newest whole checkpoint, if any")
    add("--overwrite", action="store_true",
        help="start over where out_dir holds a checkpoint; its files become *.old")
    add("--plan", action="store_true", help="print parameters, FLOPs, memory and hours, and stop")
    add("--gpus", type=int, help="of --plan (default 8)")
    add("--mfu", type=float, help="of --plan: share of the peak FLOP/s (default 0.4)")
    for f in fields(TrainConfig):
        default = {None: "auto", "": "''"}.get(f.default, str(f.default))
        meaning, allowed = f.metadata["help"], f.metadata["allowed"]
        if isinstance(allowed, str):
            meaning += f" [{allowed}]"
        add(f"--{f.name}", metavar=default, help=meaning)
    return parser

def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """The settings that a config file assigns, on top of those of its `base`.

    What it imports or defines to compute them, and names that begin with _, are its own.
    """
    if not path.is_file():
        there = " ".join(sorted(str(config) for config in path.parent.glob("*.py")))
        raise UserError(f"no config {path}; there are: {there}")
    check(path.suffix == ".py", f"{path}: a config is a Python file, NAME.py, of assignments "
                                "such as n_layer = 16")
    try:
        check_assignments(path)
        assigned = runpy.run_path(str(path))
    except UserError:
        raise
    except (Exception, SystemExit) as e:         # whatever the file raises is a mistake in the file
        first_line = str(e).partition("\n")[0]
        raise UserError(f"{path}: {type(e).__name__}: {first_line}") from e
    values = {name: value for name, value in assigned.items() if not is_own(name, value)}
    base = values.pop("base", "")
    check(isinstance(base, str) and depth < 10,
          f"{path}: base={base!r} must name another config, and not in a circle")
    place = path.parent / os.path.expanduser(base)
    inherited = read_config(place, depth + 1) if base else {}
    return inherited | {name: typed(name, value, str(path)) for name, value in values.items()}

def check_assignments(path: Path) -> None:
    """UserError for what Python takes in a config and what assigns nothing: `name: value` and
    `name == value`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            raise UserError(f"{path}, line {node.lineno}: `{ast.unparse(node)}` assigns nothing: "
                            "write one =")
        if isinstance(node, ast.AnnAssign) and node.value is None:
            name, value = ast.unparse(node.target), ast.unparse(node.annotation)
            raise UserError(f"{path}, line {node.lineno}: `{name}: {value}` assigns nothing: "
                            f"write {name} = {value}")

def is_own(name: str, value: Any) -> bool:
    """Is a name in a config no setting, but a tool to compute them: a module, a function, a _name?"""
    of_future = type(value).__module__ == "__future__"
    tool = callable(value) or isinstance(value, ModuleType) or of_future
    meant = {"base", *(f.name for f in fields(TrainConfig))}
    return name.startswith("_") or (tool and name not in meant)

def kind_of(name: str, where: str) -> str:
    """The type of a setting, as TrainConfig says it. UserError, with the closest name, if none."""
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else "."
        if where != "command line":
            hint += (f" A name of the file's own begins with _, as _{name}, "
                     f"or `import {name} as _{name}`.")
        raise UserError(f"{where}: no setting {name!r}{hint} All of them: python train.py --help")
    return kinds[name]

def typed(name: str, value: Any, where: str) -> Any:
    """The value of a setting in the setting's type, be it from Python or from the command line."""
    kind = kind_of(name, where)
    word = str(value).lower()
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "bool | None" and word in ("auto", "none"):
        return None
    if kind.startswith("bool") and word in ("true", "false"):
        return word == "true"
    if kind in ("int", "float") and not isinstance(value, bool):
        with contextlib.suppress(ArithmeticError, ValueError):
            number = decimal.Decimal(word)       # exact, where a float would round a large integer
            if kind == "float" and math.isfinite(float(number)):
                return float(number)
            if kind == "int" and abs(number) < 2**63 and number == int(number):
                return int(number)
    raise UserError(f"{where}: {name}={value!r} is no {kind.split()[0]}")

def add_architecture(values: dict[str, Any], path: str) -> None:
    """Complete the settings by a checkpoint's architecture; UserError where they contradict it."""
    saved = load_checkpoint(path)["settings"]
    free = ("block_size", "lb_loss_weight", "z_loss_weight")    # no part of what weights compute
    for f in fields(ModelConfig):
        if f.name not in saved:
            continue
        theirs = saved[f.name]
        ours = values.setdefault(f.name, theirs)
        check(f.name in free or ours == theirs,
              f"{f.name}={ours}, but {path} has {f.name}={theirs}: leave it out")

def main() -> None:
    c, args = load_settings(sys.argv[1:])
    if args.plan:
        print(plan(c, args.gpus, args.mfu))
        return
    try:
        train(c, args.resume, args.overwrite, args.configs)
    except Exception as e:
        # A rank that is gone shows as a closed connection in whatever the others did.
        lost = isinstance(e, dist.DistError) or "gloo/transport" in str(e)
        if not dist.is_initialized() or not (lost or isinstance(e, UserError)):
            raise
        message = str(e)
        if lost:
            message = (f"rank {dist.get_rank()} lost another rank; "
                       "--resume goes on from the last checkpoint")
        first_to_fail = dist.group.WORLD.get_group_store().add("failed", 1) == 1
        if first_to_fail:                        # it speaks for all
            print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)

if __name__ == "__main__":
    run(main)
