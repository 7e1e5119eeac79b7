"""Train a model of the paper, on a laptop or on every GPU there is.

    torchrun train.py configs/gqa_deep.py                              # five minutes on two cores, no download
    torchrun --nproc-per-node=2 train.py configs/moe.py --seed=1       # two ranks; any setting can be overridden
    python train.py configs/dense.py configs/wide.py --max_steps=200   # configs apply in order, then the command line
    python train.py --init_from=pruned.pt --out_dir=out/healed         # go on from other weights
    python train.py configs/dense.py --bench                           # how fast is a step? one line of JSON

A config is a Python file of assignments to the settings below; `base = "other.py"` in it starts from a neighbour.
Writes out_dir/log.jsonl (one object per step) and out_dir/ckpt.pt. Every setting, with its default:
"""
from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import runpy
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data import Corpus, eval_windows, prepare, train_windows
from model import (GPT, ModelConfig, Parser, UserError, check, load_checkpoint, load_weights, run, save_checkpoint,
                   setting)


@dataclass
class TrainConfig(ModelConfig):
    """Every setting of a run: the model's and these. The defaults of the optimizer are the paper's."""
    data: str = setting("data/python", "prepared corpus, see data.py; data/python is prepared on first use")
    out_dir: str = setting("", "where log.jsonl and ckpt.pt go; empty: out/NAME of the config")
    init_from: str = setting("", "checkpoint whose architecture and weights to start from")
    max_steps: int = setting(1000, "optimizer steps")
    tokens_per_step: int = setting(2048, "tokens in the global batch of a step, whatever block_size is")
    batch_size: int = setting(0, "sequences per forward pass and rank; 0: the rank's whole share at once")
    learning_rate: float = setting(3e-3, "peak learning rate")
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
    seed: int = setting(0, "of the weights and of the order of the data")
    device: str = setting("auto", "auto | cpu | cuda; auto: every GPU there is, else the CPU")
    dtype: str = setting("auto", "auto | float32 | bfloat16 (autocast, master weights float32); auto: bfloat16 on GPU")
    compile: bool | None = setting(None, "true | false | auto: torch.compile; auto: on GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens_per_step", "max_steps", "learning_rate"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("batch_size", "warmup_steps", "weight_decay", "grad_clip", "eval_interval", "eval_tokens",
                     "stats_interval", "save_interval", "min_lr_ratio", "seed"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and below 1")
        check(self.device in ("auto", "cpu", "cuda"), f"device={self.device!r} is none of auto, cpu, cuda")
        check(self.dtype in ("auto", "float32", "bfloat16"), f"dtype={self.dtype!r} is none of auto, float32, bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# settings: defaults < config files < command line


def typed(name: str, value: Any, where: str) -> Any:
    """The value of a setting in the setting's type, from Python or from the command line, or a UserError."""
    kinds = typing.get_type_hints(TrainConfig)
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        raise UserError(f"{where}: no setting {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
                        + " All of them: python train.py --help")
    kind, word = kinds[name], str(value).lower()
    if kind is str and isinstance(value, str):
        return value
    if kind == bool | None and word in ("auto", "none"):
        return None
    if kind in (bool, bool | None) and word in ("true", "false"):
        return word == "true"
    if kind in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = float(value)
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return int(value) if isinstance(value, int) or word.lstrip("+-").isdigit() else int(number)
    raise UserError(f"{where}: {name}={value!r} is no {'bool' if kind == bool | None else kind.__name__}")


def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """The settings that a config file assigns, on top of those of its `base`. Names that begin with _ are its own."""
    neighbours = sorted(str(p) for p in path.parent.glob("*.py"))
    check(path.is_file(), f"no config {path}; there are: {' '.join(neighbours) or 'none in that folder'}")
    try:
        values = {k: v for k, v in runpy.run_path(str(path)).items() if not k.startswith("_")}
    except (Exception, SystemExit) as e:      # whatever the file raises is a mistake in the file
        raise UserError(f"{path}: {type(e).__name__}: {e}") from e
    base = values.pop("base", "")
    check(isinstance(base, str) and depth < 10, f"{path}: base={base!r} must name another config, and not in a circle")
    inherited = read_config(path.parent / base, depth + 1) if base else {}
    return inherited | {k: typed(k, v, str(path)) for k, v in values.items()}


def load_settings(argv: list[str]) -> tuple[TrainConfig, bool]:
    """The settings of a command line, and whether --bench was asked for."""
    parser = Parser(prog="train.py", description=__doc__, usage="train.py [CONFIG.py ...] [--setting=value ...]")
    parser.add_argument("configs", nargs="*", metavar="CONFIG.py", help="files of settings, applied in order")
    parser.add_argument("--bench", action="store_true", help="time a step instead of training; needs no data")
    for f in fields(TrainConfig):
        default = "auto" if f.default is None else repr(f.default) if f.default == "" else f.default
        parser.add_argument(f"--{f.name}", default=None, metavar=str(default), help=f.metadata["help"])
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        typed(unknown[0].lstrip("-").split("=")[0], None, "command line")    # names the closest, if it is one
        raise UserError(f"command line: {unknown[0]}: settings are given as --name=value")
    values: dict[str, Any] = {}
    for path in args.configs:
        values |= read_config(Path(path))
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("configs", "bench")}
    values |= {k: typed(k, v, "command line") for k, v in given.items()}
    values["out_dir"] = values.get("out_dir") or "out/" + (Path(args.configs[-1]).stem if args.configs else "run")
    if values.get("init_from"):
        saved = load_checkpoint(values["init_from"])["settings"]
        for name in {f.name for f in fields(ModelConfig)} & saved.keys():
            free = name in ("block_size", "lb_loss_weight", "z_loss_weight")
            check(free or values.get(name, saved[name]) == saved[name],
                  f"{name}={values.get(name)}, but {values['init_from']} has {name}={saved[name]}: leave it out")
            values.setdefault(name, saved[name])
    return TrainConfig(**values), args.bench


# ---------------------------------------------------------------------------------------------------------------------
# one step


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
    flat = torch.cat([v.flatten().float() for v in values.values()])
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
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for ids in [windows[i:i + size] for i in range(0, len(windows), size)][rank::world]:
        x, y = (t.to(device) for t in corpus.batch("val", ids, c.block_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = model(x, y, return_logits=False)
        total += torch.tensor([loss.item() * len(ids), len(ids)], dtype=torch.float64)
    model.train()
    total = total.to(device)
    if world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------------------------------------------------------------
# the run


def train(c: TrainConfig) -> None:
    """Train to max_steps; see the module's docstring for what is written."""
    rank, world, device, dtype = set_up(c)
    per_step, size = batch_shape(c, world)
    corpus, out = open_corpus(c.data, rank, world), Path(c.out_dir)
    c.vocab_size = c.vocab_size or -(-corpus.vocab_size // 64) * 64
    check(c.vocab_size >= corpus.vocab_size, f"vocab_size={c.vocab_size}, but {c.data} needs {corpus.vocab_size}")
    n_windows = corpus.n_windows("train", c.block_size)

    torch.manual_seed(c.seed)
    raw = GPT(c)
    if c.init_from:
        saved = load_checkpoint(c.init_from)
        check(saved["tokenizer"] == corpus.tokenizer,
              f"{c.init_from} was trained on {saved['tokenizer']!r} tokens and {c.data} has {corpus.tokenizer!r}")
        load_weights(raw, saved, c.init_from)
    raw.to(device)
    optimizer = make_optimizer(raw, c)
    wants_compile = c.compile if c.compile is not None else device.type == "cuda"
    compiled = torch.compile(raw, dynamic=False) if wants_compile else raw
    model = DDP(compiled, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else compiled

    def load(step: int) -> list[tuple[Tensor, Tensor]]:
        ids = train_windows(c.seed, step, per_step, n_windows)
        mine = range(rank * size, per_step, world * size)
        return [corpus.batch("train", ids[i:i + size], c.block_size) for i in mine]

    peak = peak_flops(device, dtype) * world
    if rank == 0:
        open_out_dir(out)
        n = raw.count_parameters()
        print(f"{out}: {n['total'] / 1e6:.2f}M parameters ({n['active'] / 1e6:.2f}M active), {c.n_layer} layers, "
              f"{c.max_steps * c.tokens_per_step / 1e6:.1f}M tokens of {c.data}, {world} x {device.type}, {dtype}")
    loader = ThreadPoolExecutor(1)                       # the next step's batches are read while this step computes
    upcoming = loader.submit(load, 0)
    started, record = time.time(), {}
    for step in range(1, c.max_steps + 1):
        begun = time.time()
        batches = [(x.to(device), y.to(device)) for x, y in upcoming.result()]
        if step < c.max_steps:
            upcoming = loader.submit(load, step)
        lr = learning_rate(step - 1, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = gradients(model, batches, c, dtype, stats=due(step, c.stats_interval, c))
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
        record = {"step": step, "tokens": step * c.tokens_per_step, "lr": lr, **average_over_ranks(sums, world)}
        check(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]),
              f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}: lower learning_rate="
              f"{c.learning_rate}; no checkpoint was written of this step")
        optimizer.step()
        optimizer.zero_grad()

        rate = record["tokens_per_s"] = c.tokens_per_step / (time.time() - begun)
        if due(step, c.eval_interval, c):
            record["val_loss"] = evaluate(compiled, corpus, c, size, rank, world, device, dtype)
        if rank == 0:
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            left = (time.time() - started) / step * (c.max_steps - step)
            show(record, c, raw.flops_per_token() * rate / peak, left)
            if step == c.max_steps or due(step, c.save_interval, c):
                save_checkpoint(out / "ckpt.pt", {"model": raw.state_dict(), "optimizer": optimizer.state_dict(),
                                                  "settings": asdict(c), "step": step, "tokenizer": corpus.tokenizer})
    loader.shutdown()
    if rank == 0:
        summary(record, corpus, out, time.time() - started)
    if dist.is_initialized():
        dist.destroy_process_group()


def due(step: int, interval: int, c: TrainConfig) -> bool:
    """Every `interval` steps and at the end; an interval of 0 is off."""
    return interval > 0 and (step % interval == 0 or step == c.max_steps)


def set_up(c: TrainConfig) -> tuple[int, int, torch.device, torch.dtype]:
    """Join the process group if torchrun made one; returns rank, world size, device and compute dtype."""
    cuda = c.device != "cpu" and torch.cuda.is_available()
    check(cuda or c.device != "cuda", "device=cuda, but torch sees no GPU: use --device=cpu")
    world, gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.device_count()
    if cuda and world == 1 and gpus > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        # A bare `torchrun train.py` starts one process: start over with one per GPU (CUDA_VISIBLE_DEVICES picks fewer).
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={gpus}", *sys.argv])
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return int(os.environ.get("RANK", 0)), world, device, compute_dtype(c, device)


def compute_dtype(c: TrainConfig, device: torch.device) -> torch.dtype:
    """bfloat16 by default on a GPU; float32 on a CPU, where bfloat16 is anything from faster to 100 times slower."""
    return getattr(torch, c.dtype if c.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def open_corpus(folder: str, rank: int, world: int) -> Corpus:
    """The prepared corpus; data/python is prepared here, by rank 0, if it is not there yet."""
    if Path(folder) == Path("data/python") and not (Path(folder) / "meta.json").exists():
        if rank == 0:
            prepare("python", folder)
        if world > 1:
            dist.barrier()
    return Corpus(folder)


def batch_shape(c: TrainConfig, world: int) -> tuple[int, int]:
    """Sequences per step over all ranks, and sequences per forward pass of one rank."""
    per_step = c.tokens_per_step // c.block_size
    size = c.batch_size or max(1, per_step // world)
    check(per_step * c.block_size == c.tokens_per_step and per_step > 0 and per_step % (size * world) == 0,
          f"tokens_per_step={c.tokens_per_step} is no multiple of block_size={c.block_size} x batch_size={size} x "
          f"{world} rank{'s' * (world > 1)}: change one of them")
    return per_step, size


def open_out_dir(out: Path) -> None:
    """Make out_dir; an earlier run's log and checkpoint there are kept as *.old."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "ckpt.pt"):
            if (out / name).exists():
                os.replace(out / name, out / (name + ".old"))
                print(f"{out / name} of an earlier run is now {name}.old")
        (out / "log.jsonl").touch()
    except OSError as e:
        raise UserError(f"cannot write to out_dir={out} ({e.strerror or e}): choose another --out_dir") from e


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def numbers(values: list[float]) -> str:
    return " ".join(f"{v:.2g}" for v in values)


def show(record: dict[str, Any], c: TrainConfig, mfu: float, left: float) -> None:
    """One live line on a terminal; lines that stay for validations and statistics."""
    line = (f"step {record['step']}/{c.max_steps}  loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"MFU {mfu:.0%}  {left / 60:.1f} min left")
    live = sys.stdout.isatty()
    if "val_loss" in record or "variance" in record:
        line += f"  val_loss {record['val_loss']:.4f}" if "val_loss" in record else ""
        print("\r" * live + line.ljust(100))
        if "variance" in record:
            print(f"  variance of h_0 .. h_{c.n_layer}: {numbers(record['variance'])}", flush=True)
    elif live:
        print("\r" + line.ljust(100), end="", flush=True)


def summary(record: dict[str, Any], corpus: Corpus, out: Path, seconds: float) -> None:
    """What the run came to, layer by layer, and what to do next."""
    if "variance" in record:
        v, a, f, loads = (record.get(k) for k in ("variance", "attn_variance", "ffn_variance", "expert_load"))
        print("\nblock  variance   growth  attention       FFN" + "  busiest, idlest expert; 1 is fair" * bool(loads))
        print(f"embed  {v[0]:8.4f}")
        for l in range(len(a)):
            load = f"  {max(loads[l]) * len(loads[l]):.2f} {min(loads[l]) * len(loads[l]):.2f}" if loads else ""
            print(f"{l:5d}  {v[l + 1]:8.4f}  x{v[l + 1] / v[l]:6.2f}  {a[l]:9.4f}  {f[l]:8.4f}{load}")
    entropy = corpus.meta.get("bigram_entropy")
    print(f"\ntrained in {seconds / 60:.1f} min; loss {record['loss']:.4f}"
          + (f", validation loss {record['val_loss']:.4f} nats per token" if "val_loss" in record else "")
          + (f"; the corpus's bigram entropy is {entropy:.4f}" if entropy else ""))
    print(f"which layers does it use?  python probe.py {out / 'ckpt.pt'}")


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "4090": 165e12}    # dense bfloat16, data sheet


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to measure MFU against: the data sheet's for the GPUs above, else a matrix product's, measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in PEAK.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    return gemm_rate(device, dtype, 8192 if device.type == "cuda" else 1024)


def gemm_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n x n matrix product, best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def timed(f: Callable[[], Any], device: torch.device) -> float:
    """Seconds that f takes."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - begun


KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_scaled_dot_product",
           "aten::_flash_attention", "aten::_efficient_attention")


def bench(c: TrainConfig) -> dict[str, Any]:
    """Time whole training steps on random tokens: tokens/s, FLOP/s, a GEMM's FLOP/s, and kernel_share.

    kernel_share is the share of a step's time inside its own matrix products and attention kernels (self time by
    torch.profiler); it drifts less with a shared machine than rates do. Eager and compiled in turn, unless `compile`
    says which.
    """
    _, world, device, dtype = set_up(c)
    check(world == 1, "--bench runs on one rank: python train.py CONFIG.py --bench")
    c.vocab_size = c.vocab_size or 320                              # the byte tokenizer's 257, rounded up
    per_step, size = batch_shape(c, world)
    idx = torch.randint(c.vocab_size, (per_step, c.block_size + 1), device=device)
    batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in idx.split(size)]
    ways = ["eager", "compiled"] if c.compile is None else ["compiled" if c.compile else "eager"]
    steps = {}
    for way in ways:
        torch.manual_seed(c.seed)
        raw = GPT(c).to(device)
        steps[way] = bench_step(raw, torch.compile(raw, dynamic=False) if way == "compiled" else raw, batches, c, dtype)
        steps[way](), steps[way]()                                  # compile, allocate
    rounds = [{way: (timed(step, device), kernel_share(step, device)) for way, step in steps.items()} for _ in range(8)]
    shape = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "block_size", "tokens_per_step")
    out: dict[str, Any] = {name: getattr(c, name) for name in shape}
    out["gemm_flops_per_s"] = round(gemm_rate(device, dtype, 1024))
    for way in ways:
        rate = c.tokens_per_step / min(r[way][0] for r in rounds)
        shares = sorted(r[way][1] for r in rounds)
        out[way] = {"tokens_per_s": round(rate), "flops_per_s": round(raw.flops_per_token() * rate),
                    "kernel_share": round(shares[len(shares) // 2], 3)}
    return out


def bench_step(raw: GPT, model: torch.nn.Module, batches: list, c: TrainConfig, dtype: torch.dtype) -> Callable:
    """A closure that does one whole step, as `train` does."""
    optimizer = make_optimizer(raw, c)

    def step() -> None:
        gradients(model, batches, c, dtype, stats=False)
        torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    return step


def kernel_share(step: Callable[[], None], device: torch.device) -> float:
    """Share of the time of a step that is spent inside KERNELS."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profile:
        seconds = timed(step, device)
    inside = sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in profile.key_averages()
                 if e.key.startswith(KERNELS))
    return inside / 1e6 / seconds


def main() -> None:
    c, wants_bench = load_settings(sys.argv[1:])
    if wants_bench:
        print(json.dumps(bench(c)))
    else:
        train(c)


if __name__ == "__main__":
    run(main)
