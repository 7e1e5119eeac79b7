"""Train a model of the paper, on a laptop or on every GPU there is.

    torchrun train.py configs/gqa_deep.py                              # five minutes on two cores, no download
    torchrun --nproc-per-node=8 train.py configs/paper/moe_1b.py --parallel=fsdp --resume      # goes on where it was
    python train.py configs/paper/moe_1b.py --plan --gpus=8            # parameters, memory, hours; allocates nothing
    python train.py configs/dense.py --bench                           # how fast is a step? one line of JSON

A config is a Python file of assignments to the settings below; `base = "other.py"` in it starts from a neighbour. The
command line overrides it. Writes out_dir/log.jsonl (one object per step) and out_dir/ckpt.pt, the one before as
ckpt.1.pt; SIGTERM saves and stops. Several nodes need an out_dir that all of them see. Every setting, with its default:
"""
from __future__ import annotations

import contextlib
import decimal
import difflib
import json
import math
import os
import runpy
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data import Corpus, eval_windows, prepare, train_windows
from model import (GPT, ModelConfig, Parser, UserError, check, load_checkpoint, load_weights, put, run,
                   save_checkpoint, setting)

@dataclass
class TrainConfig(ModelConfig):
    """Every setting of a run: the model's and these. The defaults of the optimizer are the paper's."""
    data: str = setting("data/python", "prepared corpus, see data.py; data/python is prepared on first use")
    out_dir: str = setting("", "where log.jsonl and ckpt.pt go; empty: out/NAME of the config")
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
    device: str = setting("auto", "auto: every GPU there is, else the CPU", "auto/cpu/cuda")
    dtype: str = setting("auto", "bfloat16 is autocast, weights float32; auto: that on a GPU", "auto/float32/bfloat16")
    compile: bool | None = setting(None, "true | false | auto: torch.compile; auto: on GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(max(self.beta1, self.beta2) < 1, f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        check(self.keep_checkpoints <= 10, f"keep_checkpoints={self.keep_checkpoints} must be at most 10")

# ---- settings: defaults < config files < command line ----------------------------------------------------------------
def typed(name: str, value: Any, where: str) -> Any:
    """The value of a setting in the setting's type, from Python or from the command line, or a UserError."""
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        raise UserError(f"{where}: no setting {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
                        + " All of them: python train.py --help")
    kind, word = kinds[name], str(value).lower()
    if kind == "str" and isinstance(value, str):
        return value
    words = {"true": True, "false": False} | ({"auto": None, "none": None} if kind == "bool | None" else {})
    if kind.startswith("bool") and word in words:
        return words[word]
    if kind in ("int", "float") and not isinstance(value, bool):
        with contextlib.suppress(ArithmeticError, ValueError):
            number = decimal.Decimal(word)                          # exact, where a float would round a large integer
            if kind == "float" and math.isfinite(float(number)):
                return float(number)
            if kind == "int" and abs(number) < 2**63 and number == int(number):
                return int(number)
    raise UserError(f"{where}: {name}={value!r} is no {kind.split()[0]}")

def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """The settings that a config file assigns, on top of those of its `base`. Names that begin with _ are its own."""
    check(path.is_file(), f"no config {path}; there are: {' '.join(sorted(map(str, path.parent.glob('*.py'))))}")
    try:
        values = {k: v for k, v in runpy.run_path(str(path)).items() if k[0] != "_" and not isinstance(v, type(sys))}
    except (Exception, SystemExit) as e:      # whatever the file raises is a mistake in the file
        raise UserError(f"{path}: {type(e).__name__}: {str(e).partition(chr(10))[0]}") from e
    base = values.pop("base", "")
    check(isinstance(base, str) and depth < 10, f"{path}: base={base!r} must name another config, and not in a circle")
    inherited = read_config(path.parent / base, depth + 1) if base else {}
    return inherited | {k: typed(k, v, str(path)) for k, v in values.items()}

def load_settings(argv: list[str]) -> tuple[TrainConfig, Any]:
    """The settings of a command line, and its switches: resume, plan, gpus, mfu, bench, families."""
    parser = Parser(prog="train.py", description=__doc__, usage="train.py [CONFIG.py ...] [--setting=value ...]")
    parser.add_argument("configs", nargs="*", metavar="CONFIG.py", help="files of settings, applied in order")
    parser.add_argument("--resume", action="store_true", help="go on from out_dir's newest whole checkpoint, if any")
    parser.add_argument("--plan", action="store_true", help="print parameters, FLOPs, memory and hours, and stop")
    parser.add_argument("--gpus", type=int, default=8, help="of --plan (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="of --plan: share of the peak FLOP/s (default 0.4)")
    parser.add_argument("--bench", action="store_true", help="time a step instead of training; needs no data")
    parser.add_argument("--families", action="store_true", help="of --bench: also its GQA, MoE and long context kin")
    for f in fields(TrainConfig):
        default = {None: "auto", "": "''"}.get(f.default, str(f.default))
        words = f" [{f.metadata['allowed']}]" * isinstance(f.metadata["allowed"], str)
        parser.add_argument(f"--{f.name}", metavar=default, help=f.metadata["help"] + words)
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        typed(unknown[0].lstrip("-").split("=")[0], None, "command line")    # names the closest, if it is one
        raise UserError(f"command line: {unknown[0]}: settings are given as --name=value")
    values: dict[str, Any] = {}
    for path in args.configs:
        values |= read_config(Path(path))
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    values |= {k: typed(k, v, "command line") for k, v in given.items() if v is not None}
    values["out_dir"] = values.get("out_dir") or "out/" + (Path(args.configs[-1]).stem if args.configs else "run")
    if values.get("init_from"):
        saved = load_checkpoint(values["init_from"])["settings"]
        for name in {f.name for f in fields(ModelConfig)} & saved.keys():
            free = name in ("block_size", "lb_loss_weight", "z_loss_weight")
            check(free or values.get(name, saved[name]) == saved[name],
                  f"{name}={values.get(name)}, but {values['init_from']} has {name}={saved[name]}: leave it out")
            values.setdefault(name, saved[name])
    return TrainConfig(**values), args

# ---- one step --------------------------------------------------------------------------------------------------------
def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio of the peak; step counts from 0."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on every matrix and none on norms (facts of the released configs; eps 1e-8)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)

def gradients(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], c: TrainConfig, dtype: torch.dtype,
              stats: bool) -> dict[str, Tensor]:
    """Accumulate the gradients of one step's micro-batches; returns the mean loss and, if asked, the statistics."""
    sums: dict[str, Tensor] = {}
    for i, (x, y) in enumerate(batches):
        wait = isinstance(model, DDP) and i < len(batches) - 1              # exchange gradients once per step
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                _, loss, *rest = model(x, y, stats=stats, return_logits=False)
            (loss / len(batches)).backward()
        for name, value in {"loss": loss.detach(), **(rest[0] if stats else {})}.items():
            sums[name] = sums.get(name, 0) + value / len(batches)
    return sums

def average_over_ranks(values: dict[str, Tensor], world: int) -> dict[str, Any]:
    """The mean of every value over the ranks, as Python floats and lists: one exchange, one synchronisation."""
    flat = torch.cat([v.flatten().double() for v in values.values()])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    parts = flat.cpu().split([v.numel() for v in values.values()])
    return {k: part.view(v.shape).tolist() for (k, v), part in zip(values.items(), parts)}

@torch.no_grad()
def evaluate(model: torch.nn.Module, corpus: Corpus, c: TrainConfig, size: int, rank: int, world: int,
             device: torch.device, dtype: torch.dtype) -> float:
    """Mean loss over eval_tokens of the validation split, in batches of `size`, in nats per token."""
    windows = eval_windows(max(1, c.eval_tokens // c.block_size), corpus.n_windows("val", c.block_size))
    batches = [windows[i:i + size] for i in range(0, len(windows), size)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for i in range(rank, -(-len(batches) // world) * world, world):                 # every rank equally often, since
        ids = batches[i % len(batches)]                                             # FSDP's passes are collective
        x, y = (t.to(device) for t in corpus.batch("val", ids, c.block_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = model(x, y, return_logits=False)
        total += loss.double() * len(ids) * (i < len(batches))
    model.train()
    return average_over_ranks({"loss": total}, world)["loss"] * world / len(windows)

# ---- the run ---------------------------------------------------------------------------------------------------------
def train(c: TrainConfig, resume: bool = False) -> None:
    """Train to max_steps; see the module's docstring for what is written."""
    rank, world, device, dtype = set_up(c)
    per_step, size = batch_shape(c, world)
    if rank == 0 and Path(c.data) == Path("data/python") and not Path(c.data, "meta.json").exists():
        prepare("python", c.data)
    # torchrun counts the restarts of each node by itself: all resume if one does; none goes on before rank 0 is here.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = average_over_ranks({"resume": torch.tensor(float(resume), device=device)}, world)["resume"] > 0
    corpus, out = Corpus(c.data), Path(c.out_dir)
    c.vocab_size = c.vocab_size or -(-corpus.vocab_size // 64) * 64
    check(c.vocab_size >= corpus.vocab_size, f"vocab_size={c.vocab_size}, but {c.data} needs {corpus.vocab_size}")
    n_windows = corpus.n_windows("train", c.block_size)
    if c.eval_interval:
        corpus.n_windows("val", c.block_size)               # a split that is too short shows now, not after hours

    raw, model = build(c, world, device, dtype)
    optimizer = make_optimizer(raw, c)
    first = restore(c, raw, optimizer, corpus.tokenizer, rank, world) if resume else 0
    if c.init_from and not first:
        saved = load_checkpoint(c.init_from)
        check(saved["tokenizer"] == corpus.tokenizer,
              f"{c.init_from} was trained on {saved['tokenizer']!r} tokens and {c.data} has {corpus.tokenizer!r}")
        load_weights(raw, saved, c.init_from)
        del saved                                            # it is the model once more

    def load(step: int) -> list[tuple[Tensor, Tensor]]:
        mine = train_windows(c.seed, step, per_step, n_windows).reshape(-1, size)[rank::world]
        return [corpus.batch("train", windows, c.block_size) for windows in mine]

    def due(interval: int) -> bool:                          # and at the end; 0 is never
        return interval > 0 and (step % interval == 0 or step == c.max_steps)

    peak, flops = peak_flops(device, dtype) * world, raw.flops_per_token()
    if rank == 0:
        open_out_dir(out, first)
        n = raw.count_parameters()
        print(f"{out}: {n['total'] / 1e6:.2f}M parameters ({n['active'] / 1e6:.2f}M active), {c.n_layer} layers, "
              f"{c.max_steps * c.tokens_per_step / 1e6:.1f}M tokens of {c.data}, {world} x {device.type}, {dtype}"
              + f", from step {first}" * (first > 0))
    started, waited, saving_took, stop, stopping, record = time.time(), 0.0, 0.0, [], False, {}
    with contextlib.ExitStack() as at_exit, ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as saver:
        handler = signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
        at_exit.callback(signal.signal, signal.SIGTERM, handler)
        upcoming = loader.submit(load, first)            # the next step's batches are read while this step computes
        saving = saver.submit(lambda: None)              # and the last checkpoint is written
        for step in range(first + 1, c.max_steps + 1):
            begun = time.time()
            batches = [(x.to(device), y.to(device)) for x, y in upcoming.result()]
            upcoming = loader.submit(load, step)
            waited += time.time() - begun
            lr = learning_rate(step - 1, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = gradients(model, batches, c, dtype, stats=due(c.stats_interval))
            sums["grad_norm"] = whole(torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf))
            sums["stop"] = torch.tensor(float(len(stop)), device=device)          # one rank's SIGTERM stops them all
            record = {"step": step, "tokens": step * c.tokens_per_step, "lr": lr, **average_over_ranks(sums, world)}
            check(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]),
                  f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}: lower learning_rate="
                  f"{c.learning_rate} (from ckpt.1.pt, if ckpt.pt came too late); nothing of this step was saved")
            stopping = record.pop("stop") > 0
            optimizer.step()
            optimizer.zero_grad()

            record["tokens_per_s"] = c.tokens_per_step / (time.time() - begun)
            if due(c.eval_interval):
                record["val_loss"] = evaluate(model, corpus, c, size, rank, world, device, dtype)
            if rank == 0:
                left = (time.time() - started) / (step - first) * (c.max_steps - step)
                report(record, out, c, flops * record["tokens_per_s"] / peak, left)
            begun, last = time.time(), stopping or step == c.max_steps
            if last or due(c.save_interval):
                saving.result()                          # raises the error of a full disk
                saved = {"settings": asdict(c), "step": step, "tokenizer": corpus.tokenizer,
                         **snapshot(raw, optimizer, rank)}
                if rank == 0:
                    check(all(w.isfinite().all() for w in saved["model"].values()), f"step {step}: weights that are not"
                          f" finite: lower learning_rate={c.learning_rate}; nothing of this step was saved")
                    saving = saver.submit(save_checkpoint, out / "ckpt.pt", saved, c.keep_checkpoints)
            if last or saving.done():
                saving.result()
            saving_took += time.time() - begun
            if stopping:
                break
    if rank == 0 and stopping:
        print(f"stopped by SIGTERM after step {step}; {out / 'ckpt.pt'} is saved, --resume goes on from there")
    elif rank == 0 and not record:
        print(f"{out} has all its steps already: --max_steps=... to go on")
    elif rank == 0:
        seconds, entropy = time.time() - started, corpus.meta.get("bigram_entropy")
        print(f"trained in {seconds / 60:.1f} min, of which {waited / seconds:.2%} waiting for data and "
              f"{saving_took / seconds:.2%} for checkpoints"
              + (f"; the corpus's bigram entropy is {entropy:.4f} nats per token" if entropy else ""))
        print(f"which layers does it use?  python probe.py {out / 'ckpt.pt'}")
    if dist.is_initialized():
        dist.destroy_process_group()

def build(c: TrainConfig, world: int, device: torch.device, dtype: torch.dtype) -> tuple[GPT, torch.nn.Module]:
    """The model with its first weights, and the same one as a step calls it: compiled, and parallel if world > 1."""
    compiled = c.compile if c.compile is not None else device.type == "cuda"
    sharded = world > 1 and c.parallel == "fsdp"
    raw = bare(c)                                        # what fits no single GPU is never whole on one
    raw.recompute = c.recompute
    if sharded:
        torch._dynamo.config.recompile_limit = 4 * c.n_layer + 8     # under LayerNorm Scaling each block is a graph
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in raw.blocks:
            if compiled:
                block.compile(dynamic=False)             # FSDP2's own work stays outside of the graphs
            fully_shard(block, mp_policy=policy)
        fully_shard(raw)                                 # embedding, norm and head stay float32, as the stream does
    raw.to_empty(device=device)
    torch.manual_seed(c.seed)
    raw.init_weights()
    model = torch.compile(raw, dynamic=False) if compiled and not sharded else raw
    if world > 1 and not sharded:
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                    forward_sync_buffers=False)          # the only buffers are RoPE's tables
    return raw, model

def bare(c: ModelConfig) -> GPT:
    """The model without storage."""
    with torch.device("meta"):
        return GPT(c)

def whole(t: Tensor) -> Tensor:
    """The tensor of which t is this rank's shard under FSDP; all ranks must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t

def snapshot(raw: GPT, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, dict[str, Any]]:
    """Weights and AdamW's moments by name, whole, in rank 0's host memory: the same whatever engine ran them."""
    def copy(t: Tensor) -> Tensor | None:
        t = whole(t.detach())
        return t.to("cpu", copy=True) if rank == 0 else None
    weights = {name: copy(p) for name, p in raw.state_dict().items()}      # first: FSDP2 shards the parameters again
    moments = {name: {k: copy(v) for k, v in optimizer.state[p].items()} for name, p in raw.named_parameters()}
    return {"model": weights, "optimizer": moments}

def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, None if it has none; damaged ones are named and passed over."""
    found = [path for path in (out / "ckpt.pt", *sorted(out.glob("ckpt.[0-9].pt"))) if path.exists()]
    for i, path in enumerate(found):
        if is_whole(path):
            for damaged in found[:i]:                    # else the next save would put it in the place of a whole one
                os.replace(damaged, f"{damaged}.damaged")
            return path
        print(f"{path} is damaged: trying the one before", flush=True)
    check(not found, f"{out}: every checkpoint is damaged; move them away, or start over without --resume")
    print(f"nothing to resume in {out}: starting afresh")
    return None

def is_whole(path: Path) -> bool:
    """Can a checkpoint be read to its end? It is a zip file with checksums."""
    try:
        load_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:                                    # a flipped bit can make a zip file fail in any way
        return False

@torch.no_grad()
def restore(c: TrainConfig, raw: GPT, optimizer: torch.optim.Optimizer, tokenizer: str, rank: int, world: int) -> int:
    """Weights and optimizer from out_dir's newest whole checkpoint; returns its step, 0 where there is none."""
    found = [newest_checkpoint(Path(c.out_dir)) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        return 0
    path, saved = found[0], load_checkpoint(found[0])
    check("optimizer" in saved and "step" in saved, f"{path} holds no optimizer to resume with: use --init_from={path}")
    fixed = {f.name for f in fields(ModelConfig)} | {"seed", "tokens_per_step", "tokenizer"}
    for name, value in (asdict(c) | {"tokenizer": tokenizer}).items():
        theirs = (saved["settings"] | {"tokenizer": saved["tokenizer"]}).get(name, value)
        check(value == theirs or name not in fixed,
              f"{name}={value}, but {path} was trained with {name}={theirs}: give it, or another --out_dir")
        if value != theirs and rank == 0:
            print(f"resuming with {name}={value} instead of {theirs}")
    load_weights(raw, saved, path)
    for name, p in raw.named_parameters():
        optimizer.state[p] = {k: put(torch.zeros_like(p), v) if v.dim() else v.to(p.device, copy=True)
                              for k, v in saved["optimizer"][name].items()}
    return saved["step"]

def set_up(c: TrainConfig) -> tuple[int, int, torch.device, torch.dtype]:
    """Join the process group if torchrun made one; returns rank, world size, device and compute dtype."""
    cuda = c.device != "cpu" and torch.cuda.is_available()
    check(cuda or c.device != "cuda", "device=cuda, but torch sees no GPU: use --device=cpu")
    world, gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.device_count()
    if cuda and world == 1 and gpus > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        # A bare `torchrun train.py` starts one process: start over with one per GPU (CUDA_VISIBLE_DEVICES picks fewer).
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={gpus}", *sys.argv])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        store, rank, _ = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts, in which the ranks must not find their predecessors' addresses.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    # On a CPU bfloat16 is anything from faster to 100 times slower.
    dtype = getattr(torch, c.dtype if c.dtype != "auto" else "bfloat16" if cuda else "float32")
    return int(os.environ.get("RANK", 0)), world, device, dtype

def batch_shape(c: TrainConfig, world: int) -> tuple[int, int]:
    """Sequences per step over all ranks, and sequences per forward pass of one rank."""
    per_step = c.tokens_per_step // c.block_size
    size = c.batch_size or max(1, per_step // world)
    check(per_step * c.block_size == c.tokens_per_step and per_step > 0 and per_step % (size * world) == 0,
          f"tokens_per_step={c.tokens_per_step} is no multiple of block_size={c.block_size} x batch_size={size} x "
          f"{world} rank{'s' * (world > 1)}: change one of them")
    return per_step, size

def open_out_dir(out: Path, first: int) -> None:
    """Make out_dir. A run that resumes keeps its log up to step `first`; else an earlier run's files become *.old."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if first:
            lines = (out / "log.jsonl").read_bytes().splitlines(True)
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= first]
            os.truncate(out / "log.jsonl", sum(map(len, kept)))
        else:
            for path in (*out.glob("log.jsonl"), *sorted(out.glob("ckpt*.pt"))):
                os.replace(path, f"{path}.old")
                print(f"{path} of an earlier run is now {path.name}.old")
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"cannot write to out_dir={out} or read its log.jsonl ({e}): choose another --out_dir") from e

# ---- what is shown ---------------------------------------------------------------------------------------------------
def report(record: dict[str, Any], out: Path, c: TrainConfig, mfu: float, left: float) -> None:
    """A line of log.jsonl; one live line on a terminal, and lines that stay for validations, statistics and the end."""
    try:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {out / 'log.jsonl'} ({e.strerror}): mend that and --resume") from e
    live = sys.stdout.isatty()
    stays = "val_loss" in record or "variance" in record or record["step"] == c.max_steps
    line = (f"step {record['step']}/{c.max_steps}  loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"MFU {mfu:.0%}  {left / 60:.1f} min left")
    line += f"  val_loss {record['val_loss']:.4f}" if "val_loss" in record else ""
    if live or stays:
        print("\r" * live + line.ljust(100), end="\n" * stays, flush=True)
    if "variance" in record:
        print(f"  variance of h_0 .. h_{c.n_layer}:", *(f"{v:.2g}" for v in record["variance"]), flush=True)

# ---- how fast it is --------------------------------------------------------------------------------------------------
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "4090": 165e12}    # dense bfloat16, data sheet
KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_scaled_dot_product",
           "aten::_flash_attention", "aten::_efficient_attention")

def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to measure MFU against: the data sheet's for the GPUs above, else a matrix product's, measured."""
    for name, peak in PEAK.items():
        if device.type == "cuda" and dtype == torch.bfloat16 and name in torch.cuda.get_device_name(device):
            return peak
    return gemm_rate(device, dtype, 8192 if device.type == "cuda" else 1024)

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

def bench(c: TrainConfig, families: bool) -> None:
    """Print a line of JSON: the speed of whole training steps on random tokens, several ways in turn.

    One rank: eager and compiled, unless `compile` says which; `families`: the model made dense, with GQA, with experts
    of equal active FLOPs and with four times the context. Under torchrun: rank 0 alone, DDP and FSDP2. kernel_share, of
    a step's time inside its KERNELS, drifts less with a shared machine than rates do; speed is relative to the first.
    """
    rank, world, device, dtype = set_up(c)
    c.vocab_size = c.vocab_size or 320                              # the byte tokenizer's 257, rounded up
    if world > 1:
        ways = {"alone": c, "ddp": replace(c, parallel="ddp"), "fsdp": replace(c, parallel="fsdp")}
    elif families:
        dense = replace(c, n_experts=0, n_kv_head=c.n_head)
        ways = {"dense": dense, "gqa": replace(dense, n_kv_head=1),
                "moe": replace(dense, n_experts=16, top_k=2, expert_hidden=c.ffn_hidden // 2),
                "long": replace(dense, block_size=4 * c.block_size, batch_size=-(-c.batch_size // 4))}
    else:
        kinds = [False, True] if c.compile is None else [c.compile]
        ways = {"compiled" if kind else "eager": replace(c, compile=kind) for kind in kinds}
    steps = {way: bench_step(way_c, rank, 1 if way == "alone" else world, device, dtype) for way, way_c in ways.items()}
    rounds = [[timed(step, device) for step in steps.values()] for _ in range(6)]        # the first compiles, allocates
    shape = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "block_size", "tokens_per_step")
    out = {name: getattr(c, name) for name in shape} | {"ranks": world, "threads": torch.get_num_threads()}
    out["gemm_flops_per_s"], best = round(gemm_rate(device, dtype, 1024)), [min(times) for times in zip(*rounds)]
    for way, seconds in zip(ways, best):
        rate = c.tokens_per_step / seconds
        out[way] = {"tokens_per_s": round(rate), "speed": round(best[0] / seconds, 3),
                    "flops_per_s": round(bare(ways[way]).flops_per_token() * rate),
                    "kernel_share": round(median(kernel_share(steps[way], device) for _ in range(5)), 3)}
    if rank == 0:
        print(json.dumps(out))

def bench_step(c: TrainConfig, rank: int, world: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A closure that does one whole step, as `train` does; ranks beyond `world` do nothing."""
    if rank >= world:
        return lambda: None
    per_step, size = batch_shape(c, world)
    idx = torch.randint(c.vocab_size, (per_step // world, c.block_size), device=device)
    batches = [(x, x) for x in idx.split(size)]
    raw, model = build(c, world, device, dtype)
    optimizer = make_optimizer(raw, c)

    def step() -> None:
        gradients(model, batches, c, dtype, stats=False)
        torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    return step

def kernel_share(step: Callable[[], None], device: torch.device) -> float:
    """Share of the time of a step that is spent inside KERNELS."""
    with torch.profiler.profile() as profile:                       # of the CPU, and of the GPU if there is one
        seconds = timed(step, device)
    inside = [getattr(e, f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
              for e in profile.key_averages() if e.key.startswith(KERNELS)]
    return sum(inside) / 1e6 / seconds

# ---- what a run would take -------------------------------------------------------------------------------------------
def plan(c: TrainConfig, gpus: int, mfu: float) -> str:
    """Parameters, FLOPs, tokens, hours, and the memory of a GPU under DDP and FSDP2. Nothing is allocated."""
    check(gpus > 0 and 0 < mfu <= 1, f"--gpus={gpus} must be positive and --mfu={mfu} above 0 and at most 1")
    c.vocab_size = c.vocab_size or (320 if Path(c.data) == Path("data/python") else 50304)       # bytes, GPT-2
    model, (_, size) = bare(c), batch_shape(c, gpus)
    n, tokens, flops = model.count_parameters(), c.max_steps * c.tokens_per_step, model.flops_per_token()
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = next(part for part in ("norm", "embed", "head", "attn", "router", "ffn") if part in name)
        parts[part] = parts.get(part, 0) + p.numel()
    hours = flops * tokens / (gpus * PEAK["H100"] * mfu) / 3600
    lines = [f"parameters   {n['total']:,} total, {n['active']:,} active for a token",
             "             " + ", ".join(f"{part} {count:,}" for part, count in parts.items()),
             f"FLOPs        {flops:,.0f} per token of training at T={c.block_size}",
             f"tokens       {tokens:,} in {c.max_steps:,} steps of {c.tokens_per_step:,}",
             f"hours        {hours:,.1f} on {gpus} H100 at {mfu:.0%} of their {PEAK['H100'] / 1e12:.0f} TFLOP/s",
             f"\nGB per GPU of {gpus}, {size} sequences of {c.block_size} per pass, eager (torch.compile needs less)",
             f"{'':22}{'weights':>10}{'gradients':>10}{'optimizer':>10}{'passing':>10}{'total':>10}"]
    for parallel in ("ddp", "fsdp"):
        for recompute in (False, True):
            bytes = memory(replace(c, parallel=parallel, recompute=recompute), gpus)
            row = "".join(f"{n / 1e9:10.2f}" for n in (*bytes, sum(bytes)))
            row += "  fits 80 GB" if sum(bytes) < 80e9 else "  does not fit 80 GB"
            lines.append(f"{parallel + ', recompute' * recompute:22}{row}")
    return "\n".join(lines)

def memory(c: TrainConfig, gpus: int) -> tuple[int, int, int, int]:
    """Bytes on one GPU: weights, gradients, AdamW's moments, and at most what comes and goes in a pass."""
    sharded, bf16, (_, size) = c.parallel == "fsdp" and gpus > 1, c.dtype != "float32", batch_shape(c, gpus)

    def passing(n_layer: int) -> int:
        """What a pass needs: it really runs, on tensors that have no storage."""
        with FakeTensorMode():
            model, idx, tracker = GPT(replace(c, n_layer=n_layer)), torch.zeros(size, c.block_size).long(), MemTracker()
            model.recompute = c.recompute
            if sharded and bf16:
                for p in model.blocks.parameters():      # as FSDP2 gathers them: autocast makes no copies
                    p.data = p.data.bfloat16()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            tracker.track_external(model, idx)
            with tracker:
                gradients(model, [(idx, idx)], c, torch.bfloat16 if bf16 else torch.float32, stats=False)
            rest, peak = (tracker.get_tracker_snapshot(when)[idx.device]["Total"] for when in ("current", "peak"))
        return peak - rest

    two, three = passing(2), passing(3)                  # every further block adds as much
    most, model = two + (c.n_layer - 2) * (three - two), bare(c)
    P, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[0]))
    if sharded:
        # FSDP2 has whole at a time: two blocks' weights (the next is fetched ahead) and one's gradients, both as
        # computed and in float32 for the reduction, and the weights and gradients of embedding and head.
        most += block * (3 * (2 if bf16 else 4) + 4) + (P - c.n_layer * block) * 8
    share = gpus if sharded else 1
    return 4 * P // share, 4 * P // share, 8 * P // share, most

def main() -> None:
    c, args = load_settings(sys.argv[1:])
    if args.plan:
        return print(plan(c, args.gpus, args.mfu))
    try:
        if args.bench:
            bench(c, args.families)
        else:
            train(c, args.resume)
    except Exception as e:
        # The first rank to fail speaks for all; one that is gone shows as a closed connection in whatever we did.
        lost = isinstance(e, dist.DistError) or "gloo/transport" in str(e)
        if not dist.is_initialized() or not (lost or isinstance(e, UserError)):
            raise
        if dist.group.WORLD.get_group_store().add("failed", 1) == 1:
            print("error:", f"rank {dist.get_rank()} lost another rank; --resume goes on from the last checkpoint"
                  if lost else e, file=sys.stderr, flush=True)
        sys.exit(2)

if __name__ == "__main__":
    run(main)
