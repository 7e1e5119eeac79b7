"""Time whole training steps on random tokens, several variants in turn. Prints one line of JSON.

    python tests/bench/step.py --n_embd=256 --n_layer=8                         # eager, compiled
    python tests/bench/step.py --n_embd=256 --n_layer=8 --compile=false --families
    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 tests/bench/step.py --n_embd=256 --batch_size=4

Takes the configs and settings of train.py and needs no data. The variants are eager and compiled,
or only one of these with --compile. With --families the variants are a dense model, GQA, experts
with equal active FLOPs, and four times the context. Under torchrun they are rank 0 alone, DDP and
FSDP2. The output has for each variant:

    tokens_per_s, flops_per_s      the best of six rounds
    speed            relative to the first variant
    kernel_share     share of a step's time in KERNELS, the median of five steps. On a busy machine
                     it varies less than the rates
"""
import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from data import run
from train import Process, TrainConfig

KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_flash_attention",
           "aten::_efficient_attention", "aten::_scaled_dot_product")
SHAPE = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "block_size", "tokens_per_step")


def timed(f: Callable[[], Any], device: torch.device) -> float:
    """Seconds that f takes, on all ranks."""
    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    begun = now()
    f()
    return now() - begun


def gemm_rate(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    """FLOP/s of an n x n matrix product, best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def ways_to_go(c: TrainConfig, world: int, families: bool) -> dict[str, TrainConfig]:
    """The variants to compare: name and settings."""
    if world > 1:
        return {"alone": c, "ddp": replace(c, parallel="ddp"), "fsdp": replace(c, parallel="fsdp")}
    if families:
        dense = replace(c, n_experts=0, n_kv_head=c.n_head)
        gqa = replace(dense, n_kv_head=1)
        moe = replace(dense, n_experts=16, top_k=2, expert_hidden=c.ffn_hidden // 2)
        long = replace(dense, block_size=4 * c.block_size, batch_size=math.ceil(c.batch_size / 4))
        return {"dense": dense, "gqa": gqa, "moe": moe, "long": long}
    ways = {"eager": replace(c, compile=False), "compiled": replace(c, compile=True)}
    if c.compile is None:
        return ways
    name = "compiled" if c.compile else "eager"
    return {name: ways[name]}


def make_step(c: TrainConfig, here: Process) -> Callable[[], None]:
    """A function that takes one whole training step."""
    per_step, size = train.batch_shape(c, here.world)
    idx = torch.randint(c.vocab_size, (per_step // here.world, c.block_size), device=here.device)
    batches = [(x, x) for x in idx.split(size)]
    raw, model = train.build(c, here)
    optimizer = train.make_optimizer(raw, c)

    def step() -> None:
        train.gradients(model, batches, here.dtype, stats=False)
        train.clip_gradients(raw, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return step


def kernel_share(step: Callable[[], None], device: torch.device) -> float:
    """The share of a step's time in KERNELS."""
    with torch.profiler.profile() as profile:              # the CPU, and the GPU if there is one
        seconds = timed(step, device)
    kernels = [event for event in profile.key_averages() if event.key.startswith(KERNELS)]
    if device.type == "cuda":
        inside = sum(event.self_device_time_total for event in kernels)
    else:
        inside = sum(event.self_cpu_time_total for event in kernels)
    return inside / 1e6 / seconds                          # from microseconds


def bench(c: TrainConfig, here: Process, families: bool) -> dict[str, Any]:
    """The shape, the machine, and the results of each variant."""
    c = replace(c, vocab_size=train.vocabulary(c))
    ways = ways_to_go(c, here.world, families)
    steps = {}
    for name, way in ways.items():
        if name != "alone":
            steps[name] = make_step(way, here)
        elif here.rank == 0:
            steps[name] = make_step(way, here._replace(world=1))
        else:
            steps[name] = lambda: None                     # the other ranks wait
    seconds = {name: math.inf for name in ways}
    for _ in range(6):                                     # the first round compiles and allocates
        for name, step in steps.items():
            seconds[name] = min(seconds[name], timed(step, here.device))

    out = {name: getattr(c, name) for name in SHAPE}
    out |= {"ranks": here.world, "threads": torch.get_num_threads(),
            "gemm_flops_per_s": round(gemm_rate(here.device, here.dtype))}
    first = next(iter(seconds.values()))
    for name, way in ways.items():
        rate = c.tokens_per_step / seconds[name]
        shares = [kernel_share(steps[name], here.device) for _ in range(5)]
        out[name] = {"tokens_per_s": round(rate), "speed": round(first / seconds[name], 3),
                     "flops_per_s": round(train.bare(way).flops_per_token() * rate),
                     "kernel_share": round(median(shares), 3)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="step.py [CONFIG.py ...] [--setting=value ...] [--families]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true", help="compare dense, GQA, MoE, long context")
    args, settings = parser.parse_known_args()
    c, _ = train.load_settings(settings)
    here = train.set_up(c)
    measured = bench(c, here, args.families)
    if here.rank == 0:
        print(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
