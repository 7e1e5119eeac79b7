"""The paper's experiments, run and put beside its numbers; and its recipe at your size.

    python recipe.py run depth --seeds 2                 # train, probe and record a family; resumable
    python recipe.py run ladder --scale paper --dry-run  # what would run at the paper's size
    python recipe.py report                              # every table and figure, from results.jsonl
    python recipe.py advise --n_layer 32 --params 1.2e9 --tokens 10e9 --out advised.py

A member of a family is a config of configs/laptop/ or configs/paper/, perhaps with settings changed,
as in "gqa_16,norm=lns". Members with equal settings are one run. A finished run is one line of
configs/SCALE/results.jsonl, and a run that has its line is not repeated. Settings of train.py at the
end of `run` or `report` change all members; the lines then go to OUT/SCALE/results.jsonl.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Corpus, Parser, load_checkpoint, run, save_checkpoint
from model import check
from probe import EXPERIMENTS, make_folder, rank_correlation, save_figure, scores
from train import PEAK, TrainConfig, bare, load_settings, plan, vocabulary

ROOT = Path(__file__).parent

# ---- the families --------------------------------------------------------------------------------
# The members of each family and what a table calls them. {L}, {T}, ... are settings, see `knobs`. A +
# is a knob turned on top of an earlier row; an "or" is another value of the row above.
FAMILIES = {
    "depth": {"depth_12": "L {L}", "depth_16": "L {L}", "depth_24": "L {L}", "depth_32": "L {L}"},
    "init": {"depth_16,init_std=0.02": "L {L}, init 0.02",
             "depth_16,init_std=0.057": "L {L}, init 0.057",
             "depth_16": "L {L}, init 0.113",
             "depth_16,embed_init_std=0.02": "L {L}, init 0.113, embedding 0.02",
             "depth_16,scaled_init=true": "L {L}, init 0.113, scaled",
             "depth_32,init_std=0.02": "L {L}, init 0.02",
             "depth_32,init_std=0.057": "L {L}, init 0.057",
             "depth_32": "L {L}, init 0.113",
             "depth_32,embed_init_std=0.02": "L {L}, init 0.113, embedding 0.02",
             "depth_32,scaled_init=true": "L {L}, init 0.113, scaled",
             "moe_1b": "64 experts, top 8",
             "moe_1b,n_experts=16,top_k=2,expert_hidden=128": "16 experts, top 2"},
    "weight_decay": {"weight_decay_0": "decay {decay}", "weight_decay_0_01": "decay {decay}",
                     "weight_decay_0_1": "decay {decay}", "weight_decay_1": "decay {decay}",
                     "weight_decay_3": "decay {decay}"},
    "gqa": {"gqa_1": "G {G}", "gqa_4": "G {G}", "gqa_16": "G {G}"},
    "moe": {"dense_400m": "d {d}", "moe_400m": "+ experts {experts}",
            "dense_1b": "d {d}", "moe_1b": "+ experts {experts}"},
    "ladder": {"ladder_16": "L {L}", "ladder_32": "L {L}",
               "ladder_t4096": "+ T {T}", "ladder_t8192": "or T {T}",
               "ladder_decay_0_3": "+ decay {decay}", "ladder_decay_0_6": "or decay {decay}",
               "ladder_decay_1": "or decay {decay}",
               "ladder_g2": "+ G {G}", "ladder_moe": "+ experts {experts}"},
    "context": {"context_256": "T {T}", "context_512": "T {T}", "context_1024": "T {T}",
                "context_2048": "T {T}", "context_4096": "T {T}", "context_8192": "T {T}"},
    "norms": {"dense_1b": "norm pre", "dense_1b,norm=lns": "norm lns",
              "dense_1b,norm=peri": "norm peri",
              "gqa_16": "norm pre, GQA", "gqa_16,norm=lns": "norm lns, GQA",
              "gqa_16,norm=peri": "norm peri, GQA",
              "moe_1b": "norm pre, MoE", "moe_1b,norm=lns": "norm lns, MoE",
              "moe_1b,norm=peri": "norm peri, MoE"},
    "width": {"depth_16": "L {L}, d {d}", "depth_32": "L {L}, d {d}"},
    "long": {"depth_16": "L {L}, {steps} steps", "depth_32": "L {L}, {steps} steps"},
    "rates": {},
}
for depth in ("depth_16", "depth_32"):
    # The same rate / init_std as at width 64: the two numbers that should carry over to any width.
    wide = f"{depth},n_embd=128,init_std=0.08,learning_rate=0.00212"
    FAMILIES["width"][wide] = "L {L}, d {d}"
    FAMILIES["long"][f"{depth},max_steps=8000"] = "L {L}, {steps} steps"
    for std in (0.02, 0.113):
        for rate in (5e-4, 1e-3, 3e-3, 9e-3):
            member = f"{depth},init_std={std},learning_rate={rate:g}"
            FAMILIES["rates"][member] = f"L {{L}}, init {std}, rate {rate:g}"

# Seed 0 is the pilot and enters no verdict. Seed 100 chose the learning rate and serves nothing else.
SEEDS = {"depth": (1, 2, 3, 4, 5), "init": (1, 2, 3), "weight_decay": (1, 2, 3, 4, 5),
         "gqa": (1, 2, 3, 4, 5), "moe": (1, 2, 3, 4, 5), "ladder": (1, 2, 3),
         "context": (1, 2, 3, 4, 5), "norms": (1, 2, 3), "width": (1, 2, 3), "long": (1, 2, 3),
         "rates": (100,)}
END_TO_END = ("ladder_32", "ladder_moe")         # the recipe against its baseline: five seeds

# The member that each member is compared with, seed by seed.
BASELINES = {"depth": "depth_16", "weight_decay": "weight_decay_0_1", "context": "context_2048",
             "gqa": "gqa_1", "moe": "dense_1b", "ladder": "ladder_32", "norms": "dense_1b",
             "init": "depth_16", "width": "depth_16", "long": "depth_16", "rates": ""}
OTHER_BASELINES = {
    ("moe", "moe_400m"): "dense_400m", ("moe", "dense_400m"): "dense_400m",
    ("ladder", "ladder_decay_0_3"): "ladder_t4096", ("ladder", "ladder_decay_0_6"): "ladder_t4096",
    ("ladder", "ladder_decay_1"): "ladder_t4096", ("ladder", "ladder_g2"): "ladder_decay_0_3",
    ("ladder", "ladder_moe"): "ladder_g2",
    ("init", "moe_1b"): "moe_1b", ("norms", "gqa_16"): "dense_1b", ("norms", "moe_1b"): "dense_1b"}
for member in FAMILIES["init"]:
    if member.startswith("depth_32"):
        OTHER_BASELINES["init", member] = "depth_32"
    if member.startswith("moe_1b"):
        OTHER_BASELINES["init", member] = "moe_1b"
for norm in ("lns", "peri"):                     # a cure on top of a norm: against that norm alone
    for cure in ("gqa_16", "moe_1b"):
        OTHER_BASELINES["norms", f"{cure},norm={norm}"] = f"dense_1b,norm={norm}"
for family in ("width", "long"):                 # deep against shallow, at that width or length
    shallow, deep = [member for member in FAMILIES[family] if "," in member]
    OTHER_BASELINES[family, deep] = shallow
    OTHER_BASELINES[family, shallow] = shallow

def baseline(family: str, member: str) -> str:
    """The member that this one is compared with."""
    return OTHER_BASELINES.get((family, member), BASELINES[family])

def seeds_of(family: str, member: str) -> tuple[int, ...]:
    """The seeds of a member that enter its family's numbers."""
    return SEEDS["depth"] if family == "ladder" and member in END_TO_END else SEEDS[family]

def arguments(member: str, scale: str) -> list[str]:
    """What train.py is told about a member: its config, and the settings behind a comma."""
    name, *changes = member.split(",")
    return [str(ROOT / "configs" / scale / f"{name}.py"), *(f"--{change}" for change in changes)]

@cache
def config(member: str, scale: str, settings: tuple[str, ...] = ()) -> TrainConfig:
    """The settings of a member, with these of the command line; out_dir is the same for all."""
    return load_settings([*arguments(member, scale), *settings, "--out_dir=any"])[0]

def knobs(c: TrainConfig) -> dict[str, str]:
    """What members of a family differ in, as a table shows it."""
    return {"L": f"{c.n_layer}",                       # blocks
            "T": f"{c.block_size}",                    # context
            "d": f"{c.n_embd}",                        # width
            "decay": f"{c.weight_decay:g}",
            "G": f"{c.n_head // c.n_kv_head}",         # query heads per key/value head
            "experts": f"{c.n_experts}, top {c.top_k}",
            "steps": f"{c.max_steps}"}

def label(family: str, member: str, scale: str) -> str:
    """What a table calls a member, and what its value stands for, as in "L 16 (paper: 32)"."""
    here, paper = knobs(config(member, scale)), knobs(config(member, "paper"))
    if family in ("width", "long"):                    # the paper has no such runs
        paper = here
    shown = {knob: value if value == paper[knob] else f"{value} (paper: {paper[knob]})"
             for knob, value in here.items()}
    return FAMILIES[family][member].format(**shown)

@cache
def folders(out: str, scale: str, settings: tuple[str, ...] = ()) -> dict[str, Path]:
    """The folder of each member's runs: that of the first member with the same settings."""
    of_settings: dict[str, Path] = {}
    of_member = {}
    for members in FAMILIES.values():
        for member in members:
            of_all = str(config(member, scale, settings))
            of_member[member] = of_settings.setdefault(of_all, Path(out, scale, member))
    return of_member

Numbers = dict[str, dict[str, dict[str, float]]]        # by family, member and column

def read_reported() -> Numbers:
    """What the paper reports: configs/paper/reported.txt, where - is not known."""
    header, *rows = (ROOT / "configs/paper/reported.txt").read_text("utf-8").splitlines()
    columns = header.split()[2:]
    numbers: Numbers = {family: {member: {} for member in members}
                        for family, members in FAMILIES.items()}
    for row in rows:
        family, member, *cells = row.split()
        found = {column: float(x) for column, x in zip(columns, cells, strict=True) if x != "-"}
        numbers[family][member] = found
    return numbers

PAPER = read_reported()

# ---- running -------------------------------------------------------------------------------------
# What is measured of a trained model; and before the first step and at common lengths.
MEASURED = ",".join(name for name in EXPERIMENTS if EXPERIMENTS[name].scores or name == "sparsity")
BRIEFLY = ("variance", "causal", "permutation", "usefulness", "removal", "jacobian")
TOKENS = 8192               # that a laptop model is probed on, whatever its context
# A model is also probed at these lengths, where all contexts see the same tokens at the same places.
COMMON_LENGTHS = {16: 512, 64: 128}              # tokens per sequence: sequences

class Job(NamedTuple):
    """A run of one member with one seed, and its folder."""
    member: str
    seed: int
    out: Path

def run_family(args: Any) -> None:
    """Train, probe and record what has no row yet; a run that fails does not stop the others."""
    families = list(FAMILIES) if args.family == "all" else [args.family]
    rows = read_rows(args.results)
    jobs = [job for job in jobs_of(families, args) if not recorded(job, rows, args)]
    if args.dry_run:
        print_costs(jobs, args)
        return
    failed = [str(job.out) for job in run_all(jobs, args)]
    check(not failed, f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; "
          "the same command tries again")
    print(f"all runs of {args.family} are recorded in {args.results}: python recipe.py report")

def jobs_of(families: Sequence[str], args: Any) -> list[Job]:
    """A job for each member and seed, family by family; members with equal settings share one."""
    folder = folders(args.out, args.scale, tuple(args.settings))
    jobs: dict[Path, Job] = {}
    for family in families:
        for k in range(min(args.seeds, 5)):
            for member in FAMILIES[family]:
                for seed in seeds_of(family, member)[k:k + 1]:
                    out = folder[member] / f"seed_{seed}"
                    jobs.setdefault(out, Job(member, seed, out))
    return list(jobs.values())

def recorded(job: Job, rows: Sequence[Row], args: Any) -> bool:
    """Is there a row of this run? With --here only one from this kind of processor counts."""
    c = config(job.member, args.scale, tuple(args.settings))
    return any(row["seed"] == job.seed and not differing(c, row["settings"])
               and (not args.here or row["processor"] == processor()) for row in rows)

def training(job: Job, args: Any) -> list[str]:
    """What train.py is told of a job."""
    return [*arguments(job.member, args.scale), *args.settings,
            f"--seed={job.seed}", f"--out_dir={job.out}"]

def train_command(job: Job, args: Any) -> list[str]:
    """The command that trains, on every GPU if there are several; it resumes what was begun."""
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"]
    return [*command, str(ROOT / "train.py"), *training(job, args), "--resume"]

def probe_commands(job: Job, args: Any) -> list[list[str]]:
    """The commands that measure a run: trained, at step 0, and at the common lengths."""
    T = config(job.member, args.scale, tuple(args.settings)).block_size
    samples = max(2, TOKENS // T) if args.scale == "laptop" else 100

    def command(ckpt: Path, only: str, samples: int, T: int, out: Path) -> list[str]:
        return [sys.executable, str(ROOT / "probe.py"), str(ckpt), f"--only={only}", "--remove=1",
                "--no-sublayers", f"--samples={samples}", f"--length={min(T, 512)}", f"--out={out}"]

    ckpt = job.out / "ckpt.pt"
    trained = command(ckpt, args.only, samples, T, job.out)
    if args.tasks:
        trained[3] += ",tasks"
        trained.append(f"--tasks={args.tasks}")
    brief = ",".join(name for name in BRIEFLY if name in args.only.split(","))
    commands = [trained, command(job.out / "start/ckpt.pt", brief, samples, T, job.out / "start")]
    for length, number in COMMON_LENGTHS.items():
        if in_context_family(job, args) and length <= T:
            commands.append(command(ckpt, brief, number, length, job.out / f"at_{length}"))
    return commands

def in_context_family(job: Job, args: Any) -> bool:
    """Is this run a member of the context family, perhaps under another name?"""
    folder = folders(args.out, args.scale, tuple(args.settings))
    return job.out.parent in {folder[member] for member in FAMILIES["context"]}

START = threading.Lock()                         # torch has one generator for all threads

def save_start(job: Job, args: Any) -> None:
    """Save the model as it is before the first step: the weights that train.py starts from."""
    c = load_settings(training(job, args))[0]
    c = replace(c, vocab_size=vocabulary(c, Corpus(c.data)))
    with START:
        torch.manual_seed(c.seed)
        model = bare(c).to_empty(device="cpu")
        model.init_weights()
    tokenizer = load_checkpoint(job.out / "ckpt.pt")["tokenizer"]
    (job.out / "start").mkdir(exist_ok=True)
    start = {"settings": asdict(c), "step": 0, "tokenizer": tokenizer, "model": model.state_dict()}
    save_checkpoint(job.out / "start/ckpt.pt", start)

def run_all(jobs: Sequence[Job], args: Any) -> list[Job]:
    """Run the jobs, args.jobs at a time; returns those that failed."""
    running: set[subprocess.Popen] = set()
    environment = dict(os.environ)
    if args.jobs > 1:       # with more threads than cores in all, each run takes ten times as long
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def call(job: Job, command: list[str]) -> bool:
        with open(job.out / "output.txt", "a", encoding="utf-8") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            running.add(process)
            status = process.wait()
            running.discard(process)
        return status == 0

    def run_job(job: Job) -> bool:
        job.out.mkdir(parents=True, exist_ok=True)
        print(f"{job.out}: training", flush=True)
        c = config(job.member, args.scale, tuple(args.settings))
        # A train.py that was stopped by SIGTERM ends with status 0 and is not done.
        if not call(job, train_command(job, args)) or trained_steps(job) < c.max_steps:
            print(f"{job.out}: stopped or failed, see output.txt in it", flush=True)
            return False
        save_start(job, args)
        print(f"{job.out}: probing", flush=True)
        if not all([call(job, command) for command in probe_commands(job, args)]):
            print(f"{job.out}: probing failed, see output.txt in it", flush=True)
            return False
        append_row(args.results, row_of(job, args))
        print(f"{job.out}: recorded in {args.results}", flush=True)
        return True

    def stop(*_: Any) -> None:
        """As Ctrl-C, which reaches the children by itself: train.py saves and stops."""
        for process in running:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(run_job, jobs))
    return [job for job, fine in zip(jobs, finished) if not fine]

def trained_steps(job: Job) -> int:
    """The step of a run's checkpoint."""
    return load_checkpoint(job.out / "ckpt.pt")["step"]

def print_costs(jobs: Sequence[Job], args: Any) -> None:
    """A line per job that has no row, what it is and what its training takes; and the hours of all.

    On a laptop the rate is 28 GFLOP/s, what a core of an AMD EPYC gave models of this width."""
    at_paper = args.scale == "paper"
    rate = 8 * PEAK["H100"] * 0.4 if at_paper else 28e9                   # FLOP/s
    total = 0.0
    for job in jobs:
        c = load_settings(training(job, args))[0]
        model = bare(replace(c, vocab_size=vocabulary(c)))
        tokens = c.max_steps * c.tokens_per_step
        hours = model.flops_per_token() * tokens / rate / 3600
        total += hours
        print(f"{job.out}: {model.count_parameters()['active']:,} active parameters, {tokens:,} "
              f"tokens, {hours:.2f} h")
    machine = "8 H100 at 40% MFU" if at_paper else "one core"
    print(f"{len(jobs)} runs without a row, {total:.1f} h of training on {machine}; "
          "probing takes a third as long")

# ---- results.jsonl: what is kept of every run ----------------------------------------------------
# A row is a dict: member, seed, settings (those that matter), corpus (its checksum), torch, python,
# processor; scores (by column), start (those before the first step), at_16 and at_64 (at the common
# lengths), curve (the last layer's variance over training) and probe (values of each block).
Row = dict[str, Any]
CURVE_POINTS = 40
# Settings that change how a run is computed and not what it is; the seed has a place of its own.
NO_MATTER = {"vocab_size", "out_dir", "seed", "device", "dtype", "compile", "parallel", "recompute",
             "save_interval", "keep_checkpoints", "wandb"}
DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}
# What a row keeps of probe.json: values of each block, and the two maps of the trained model.
OF_BLOCKS = ("variance", "attn_variance", "ffn_variance", "block_influence")
MAPS = ("causal", "permutation")

def differing(c: TrainConfig, settings: dict[str, Any]) -> list[str]:
    """The settings in which a run that was trained with `settings` is another one than c. A setting
    that an old row lacks had its default."""
    return [name for name, value in asdict(c).items()
            if name not in NO_MATTER and settings.get(name, DEFAULTS[name]) != value]

def read_rows(path: Path) -> list[Row]:
    """The rows in a results.jsonl, if there is one."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    for row in rows:
        row["scores"] |= course(row["curve"])
    return rows

def append_row(path: Path, row: Row) -> None:
    """Add a row, in one piece: other jobs append too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        f.write((json.dumps(row) + "\n").encode())

def row_of(job: Job, args: Any) -> Row:
    """What is kept of a finished run."""
    c = load_settings(training(job, args))[0]
    text = (job.out / "log.jsonl").read_text("utf-8")
    log = [json.loads(line) for line in text.splitlines()]
    r = read_probe(job.out)
    curve = [(line["step"], line["variance"][-1]) for line in log if "variance" in line]
    thinned = sorted({round(k) for k in np.linspace(0, len(curve) - 1, CURVE_POINTS)})
    row = {"member": job.member, "seed": job.seed,
           "settings": {name: x for name, x in asdict(c).items() if name not in NO_MATTER},
           "corpus": load_checkpoint(job.out / "ckpt.pt").get("corpus"),
           "torch": torch.__version__, "python": platform.python_version(), "processor": processor(),
           "scores": own_scores(c, log, r) | scores(r),
           "curve": [curve[k] for k in thinned] if curve else [],
           "probe": of_blocks(r) | {name: r[name] for name in MAPS if name in r}}
    start = read_probe(job.out / "start")
    row |= {"start": scores(start), "probe_start": of_blocks(start)}
    for length in COMMON_LENGTHS:
        if (job.out / f"at_{length}").is_dir():
            row[f"at_{length}"] = scores(read_probe(job.out / f"at_{length}"))
    return compact(row)

def read_probe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "probe.json").read_text("utf-8"))

def of_blocks(r: dict[str, Any]) -> dict[str, list[float]]:
    """The values of each block in a probe.json."""
    found = {name: r[name] for name in OF_BLOCKS if name in r}
    if "usefulness" in r:
        found["affine"] = r["usefulness"]["ratio"]
    if "jacobian" in r:
        found["deviation"] = r["jacobian"]["deviation"]
    if "removal" in r:
        found["removal"] = r["removal"]["1"]
    if "sparsity" in r:
        found["effective_keys"] = r["sparsity"]["attention"]["effective_keys"]
    return found

def compact(x: Any) -> Any:
    """Numbers to five digits, also inside of dicts and lists; JSON has null for nan."""
    if isinstance(x, dict):
        return {key: compact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [compact(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x

def course(curve: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the last layer's variance over training: its peak, the share of the steps at which it is
    reached, and the share of it that is left at the end."""
    if not curve:
        return {}
    step, peak = max(curve, key=lambda point: (point[1], point[0]))
    last_step, last = curve[-1]
    return {"peak var.": peak, "peak at": step / last_step,
            "left of it": last / peak if peak else math.nan}

def own_scores(c: TrainConfig, log: Sequence[dict[str, Any]],
               r: dict[str, Any]) -> dict[str, float]:
    """Scores beside probe.py's: the losses, and how sparse the run is.

    near zero: the share of the blocks' weights below a tenth of init_std. eff. keys: the share of
    the visible keys that a query effectively attends to. key heads: those per query head. density:
    eff. keys x key heads; ours, for the paper's formula is not known. active FFN: the share of the
    FFN's weights that a token meets.
    """
    found = {"key heads": c.n_kv_head / c.n_head, "active FFN": 1.0}
    if c.n_experts:
        met = c.top_k * c.expert_hidden + c.shared_hidden
        found["active FFN"] = met / (c.n_experts * c.expert_hidden + c.shared_hidden)
    found["train loss"] = statistics.mean(line["loss"] for line in log[-100:])
    validations = [line["val_loss"] for line in log if "val_loss" in line]
    if validations:
        found["val loss"] = validations[-1]
    if "sparsity" in r:
        found["near zero"] = near_zero(c, r["sparsity"]["weights"])
        found["eff. keys"] = statistics.mean(r["sparsity"]["attention"]["effective_keys"])
        found["density"] = found["eff. keys"] * found["key heads"]
    return found

def near_zero(c: TrainConfig, shares: dict[str, dict[str, list[float]]]) -> float:
    """The share of the weights of all blocks that are near zero, from the shares by kind."""
    count = total = 0.0
    model = bare(replace(c, vocab_size=vocabulary(c)))
    for name, w in model.blocks[0].named_parameters():
        if w.dim() > 1:
            below = shares[name.removesuffix(".weight")]["below"]
            count += w.numel() * sum(below)
            total += w.numel() * len(below)
    return count / total

@cache
def processor() -> str:
    """The name of what a run is computed on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

Runs = dict[str, list[Row]]                  # of each member, the rows of its seeds

def runs_of(family: str, rows: Sequence[Row], args: Any) -> Runs:
    """The members of a family that have rows: of each seed and kind of processor the newest."""
    found = {}
    for member in FAMILIES[family]:
        c = config(member, args.scale, tuple(args.settings))
        seeds = seeds_of(family, member)
        newest = {(row["seed"], row["processor"]): row for row in rows
                  if row["seed"] in seeds and not differing(c, row["settings"])}
        if newest:
            found[member] = [newest[key] for key in sorted(newest)]
    return found

# ---- statistics ----------------------------------------------------------------------------------
# Quantiles of Student's t for 1, 2, ... 9 degrees of freedom: 97.5% for intervals, 80% for power.
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
T_80 = [1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883]

class Estimate(NamedTuple):
    """A mean over seeds with its 95% t interval."""
    mean: float
    half: float                 # of the interval's width; nan with one seed
    n: int                      # seeds

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def decided(self) -> bool:
        """Does the interval leave 0 out? There is none with one seed, nor where all seeds moved by
        the same step, as the usefulness of 8 blocks may, which moves in steps of 1/8."""
        return self.half > 1e-9 and abs(self.mean) > self.half

def estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    if n < 2:
        return Estimate(values[0], math.nan, n)
    half = T_975[min(n, 10) - 2] * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.mean(values), half, n)

def detectable(e: Estimate) -> float:
    """The effect that so many seeds with such a spread detect with 80% power: the sum of the two t
    quantiles times the standard error."""
    if e.n < 2:
        return math.nan
    at = min(e.n, 10) - 2
    return e.half / T_975[at] * (T_975[at] + T_80[at])

def p_value(e: Estimate) -> float:
    """Of the two-sided t test against 0: 1 - A(t | nu), 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    if not e.half > 1e-9:
        return math.nan
    nu = e.n - 1
    t = abs(e.mean) / (e.half / T_975[min(e.n, 10) - 2])
    angle = math.atan(t / math.sqrt(nu))
    term, total = 1.0, 1.0
    if nu % 2 == 0:
        for k in range(2, nu - 1, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            total += term
        return 1 - math.sin(angle) * total
    total = term = math.cos(angle) if nu > 1 else 0.0
    for k in range(3, nu - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 1 - 2 / math.pi * (angle + math.sin(angle) * total)

LOGARITHMS = {"last var.", "rel.var.", "peak var."}    # their differences are those of logarithms

def value(row: Row, score: str, part: str = "scores") -> float:
    """A score of a row, of a variance the logarithm; nan where it was not measured."""
    x = row.get(part, {}).get(score)
    if x is None or score in LOGARITHMS and x <= 0:
        return math.nan
    return math.log(x) if score in LOGARITHMS else x

def by_seed(rows: Sequence[Row], score: str, part: str = "scores") -> dict[int, float]:
    """A score by seed; of several kinds of processor the first."""
    found = {row["seed"]: value(row, score, part) for row in reversed(rows)}
    return {seed: x for seed, x in sorted(found.items()) if not math.isnan(x)}

def paired(rows: Sequence[Row], base: Sequence[Row], score: str,
           part: str = "scores") -> dict[int, float]:
    """By seed, how much larger a score is than the base's on the same kind of processor."""
    of_base = {(row["seed"], row["processor"]): value(row, score, part) for row in base}
    found = {}
    for row in reversed(rows):
        key = row["seed"], row["processor"]
        difference = value(row, score, part) - of_base.get(key, math.nan)
        if not math.isnan(difference):
            found[row["seed"]] = difference
    return dict(sorted(found.items()))

# ---- the claims, and the rule that judges them ---------------------------------------------------
# The paper's number that says where a score should go; the paper reports none for those in INFERRED,
# so they have a direction and no size. "useful layers" is usefulness x L.
PAPERS = {"last var.": "variance", "ln Vn/V1": "variance", "useful": "useful", "log ratio": "useful",
          "ratio late": "useful", "trend use": "useful", "ratio 1+": "useful",
          "ratio sum": "useful layers", "causal": "causal", "causal 1+": "causal",
          "permuted": "permuted", "perm. 1+": "permuted", "val loss": "ppl", "accuracy": "accuracy"}
INFERRED = {"ln Vn/V1", "ratio late", "trend use", "ratio 1+", "ratio sum", "causal 1+", "perm. 1+"}
KNOB = ("last var.", "ln Vn/V1", "useful", "log ratio", "ratio late", "trend use", "val loss")
COMPARED = {
    "depth": ("last var.", "useful", "log ratio", "ratio 1+", "ratio sum", "causal", "causal 1+",
              "permuted", "perm. 1+", "val loss"),
    "weight_decay": KNOB, "context": KNOB, "gqa": KNOB, "moe": KNOB,
    "ladder": ("log ratio", "useful", "val loss", "accuracy"),
    "norms": KNOB, "init": KNOB, "width": KNOB, "long": KNOB}
# Within one model: what the paper's picture says of its blocks 1 to n - 1, by score.
# A trend is the rank correlation of a block's index with its log affine ratio, influence or |J-I|/d.
PREMISES = {"trend use": "(a) later blocks are used less: trend of the log affine ratio < 0",
            "trend infl": "(b) later blocks turn the stream less: trend of the influence < 0",
            "trend J-I": "(c) later blocks are closer to the identity: trend of |J-I|/d < 0",
            "ln Vn/V1": "(d) variance accumulates after block 0: ln(Var h_n / Var h_1) > ln n"}

class Comparison(NamedTuple):
    """A member against its baseline in one score."""
    family: str
    member: str
    base: str
    score: str
    effect: Estimate            # of the paired differences
    paper: float                # the paper's difference; nan where it is not known
    direction: int              # of the paper's difference: 1, -1, 0; 2 where it is not known
    size: Estimate | None       # (effect / depth effect) of ours over that of the paper
    verdict: str                # "" where the direction is not known

def paper_difference(family: str, member: str, base: str, score: str) -> tuple[float, int]:
    """How much larger the paper's number is than the base's, in our units, and its direction.

    Variances are compared by logarithms, perplexities as losses. A variance of "about 0" has a
    direction and no difference.
    """
    column = PAPERS.get(score, "")
    counted = column == "useful layers"
    numbers = [PAPER[family][name].get("useful" if counted else column) for name in (base, member)]
    if None in numbers:
        return math.nan, 2
    before, after = numbers
    if counted:
        before, after = (x * config(name, "paper").n_layer
                         for x, name in zip(numbers, (base, member)))
    direction = (after > before) - (after < before)
    if column in ("variance", "ppl"):
        if min(before, after) <= 0:
            return math.nan, direction
        return math.log(after / before), direction
    return after - before, direction

def compare(found: dict[str, Runs], family: str, member: str, score: str,
            base: str = "") -> Comparison | None:
    """A member against its baseline; None where nothing can be compared."""
    runs = found.get(family, {})
    base = base or baseline(family, member)
    differences = paired(runs.get(member, []), runs.get(base, []), score)
    if member == base or not differences:
        return None
    effect = estimate(list(differences.values()))
    paper, direction = paper_difference(family, member, base, score)
    size = relative_size(found, family, member, base, score, differences, paper)
    return Comparison(family, member, base, score, effect, paper, direction, size,
                      judge(effect, direction, size))

def judge(effect: Estimate, direction: int, size: Estimate | None) -> str:
    """The rule. *reproduced*: the whole interval lies on the paper's side of 0; "smaller" where the
    size is known and its interval lies below 1. *contradicted*: on the other side. *no effect of
    the paper's size*: the interval contains 0, and that of the size lies below 1. *inconclusive*:
    it contains 0, and may contain an effect of the paper's size."""
    if direction not in (1, -1):
        return "no direction" if direction == 0 else ""
    smaller = size is not None and size.high < 1
    if effect.decided:
        if (effect.mean > 0) != (direction > 0):
            return "contradicted"
        return "reproduced, smaller" if smaller else "reproduced"
    return "no effect of the paper's size" if smaller else "inconclusive"

def relative_size(found: dict[str, Runs], family: str, member: str, base: str, score: str,
                  differences: dict[int, float], paper: float) -> Estimate | None:
    """(Effect / depth effect) of ours over that of the paper, by a jackknife over seeds; the depth
    effect is depth_32 minus depth_16. Of the loss it is the relative difference over the paper's.

    None: the paper's difference is not known, is "about 0" or less than one layer; our own depth
    effect is undecided; or the effect is the depth effect itself.
    """
    if score in INFERRED or math.isnan(paper) or paper == 0 or len(differences) < 2:
        return None
    if score == "val loss":
        losses = by_seed(found[family][base], score)
        relative = [x / losses[seed] for seed, x in differences.items()]
        before = math.log(PAPER[family][base]["ppl"])
        e = estimate(relative)
        return Estimate(e.mean * before / paper, abs(e.half * before / paper), e.n)
    if PAPERS[score] == "useful":
        layers = min(config(name, "paper").n_layer for name in (base, member))
        if round(abs(paper) * layers) < 1:
            return None
    runs = found.get("depth", {})
    depth = paired(runs.get("depth_32", []), runs.get("depth_16", []), score)
    paper_depth, _ = paper_difference("depth", "depth_32", "depth_16", score)
    is_depth_effect = (family, member, base) == ("depth", "depth_32", "depth_16")
    if is_depth_effect or math.isnan(paper_depth) or len(depth) < 2:
        return None
    if not estimate(list(depth.values())).decided:
        return None
    return jackknife(differences, depth, paper / paper_depth)

def jackknife(above: dict[int, float], below: dict[int, float], unit: float) -> Estimate | None:
    """mean(above) / mean(below) / unit over the seeds that both have, with its 95% interval."""
    seeds = [seed for seed in above if seed in below]
    if len(seeds) < 2:
        return None

    def ratio(some: Sequence[int]) -> float:
        return sum(above[s] for s in some) / sum(below[s] for s in some) / unit

    without_one = [ratio([s for s in seeds if s != left_out]) for left_out in seeds]
    n = len(seeds)
    error = (n - 1) / math.sqrt(n) * statistics.stdev(without_one)
    return Estimate(ratio(seeds), T_975[min(n, 10) - 2] * error, n)

def comparisons(found: dict[str, Runs]) -> list[Comparison]:
    """Every comparison of COMPARED that has its runs, and the recipe end to end."""
    cases = [(family, member, score, "") for family in COMPARED for member in FAMILIES[family]
             for score in COMPARED[family]]
    cases += [("ladder", "ladder_moe", score, "ladder_32") for score in COMPARED["ladder"]]
    compared = [compare(found, *case) for case in cases]
    return [c for c in compared if c is not None]

def holm(compared: Sequence[Comparison]) -> int:
    """How many of the decided verdicts remain when Holm's correction holds the chance of a single
    false one among all comparisons with a direction at 5%."""
    tests = sorted(p for c in compared if c.verdict and c.direction in (1, -1)
                   if not math.isnan(p := p_value(c.effect)))
    for k, p in enumerate(tests):
        if p > 0.05 / (len(tests) - k):
            return k
    return len(tests)

def premise(runs: Runs, member: str, score: str) -> tuple[dict[int, float], Estimate, str] | None:
    """Of a premise: the value of each seed, its mean, and the verdict on the mean."""
    values = by_seed(runs.get(member, []), score)
    if not values:
        return None
    e = estimate(list(values.values()))
    if score == "ln Vn/V1":                      # more than if each block adds the same variance
        null = math.log(runs[member][0]["settings"]["n_layer"])
        return values, e, judge(Estimate(e.mean - null, e.half, e.n), 1, None)
    return values, e, judge(e, -1, None)

# What a reader sees first: eight comparisons, each with the premise or number that it tests.
HEADLINES = [
    ("Later blocks are used less (rank correlation within 16 layers)", "depth", "depth_32", "trend use"),
    ("Deeper: the last variance grows", "depth", "depth_32", "last var."),
    ("Deeper: a smaller share of blocks is useful", "depth", "depth_32", "useful"),
    ("No weight decay: more variance", "weight_decay", "weight_decay_0", "last var."),
    ("Short context: more variance", "context", "context_256", "last var."),
    ("GQA: more useful blocks", "gqa", "gqa_16", "useful"),
    ("MoE: more useful blocks", "moe", "moe_1b", "useful"),
    ("The whole recipe: more useful blocks", "ladder", "ladder_moe", "useful")]

# ---- the mechanism -------------------------------------------------------------------------------
SPARSITY = ("density", "eff. keys", "key heads", "active FFN", "near zero")
SPREAD = ("last var.", "ln Vn/V1")
USE = ("log ratio", "ratio late")
QUESTIONS = [*((x, y) for x in SPARSITY for y in SPREAD), *((x, y) for x in SPREAD for y in USE)]

def means(rows: Sequence[Row], score: str) -> float:
    """The mean over seeds; nan where the score was not measured."""
    values = by_seed(rows, score)
    return statistics.mean(values.values()) if values else math.nan

def bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the rank correlation, from 1,000 draws of as many configurations."""
    x, y = np.array(x), np.array(y)
    chosen = np.random.default_rng(0).integers(len(x), size=(1000, len(x)))
    drawn = [rank_correlation(x[k], y[k]) for k in chosen]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return low, high

def configurations(found: dict[str, Runs]) -> Runs:
    """The configurations of the families that turn a knob, each once. The controls (init, rates) and
    the other norms are left out: they change more than the paper's knobs."""
    together: Runs = {}
    for family in ("depth", "weight_decay", "context", "gqa", "moe", "ladder"):
        for member, rows in found.get(family, {}).items():
            settings = [other[0]["settings"] for other in together.values()]
            if rows[0]["settings"] not in settings:
                together[member] = rows
    return together

# ---- the report ----------------------------------------------------------------------------------
def report(args: Any) -> None:
    """Write every table and figure of results.jsonl into OUT/SCALE, and print the tables."""
    rows = read_rows(args.results)
    found = {family: runs_of(family, rows, args) for family in FAMILIES}
    found = {family: runs for family, runs in found.items() if has_begun(family, runs)}
    check(found, f"no finished run in {args.results}: "
                 f"python recipe.py run depth --scale {args.scale}")
    used = {id(row): row for runs in found.values() for seeds in runs.values() for row in seeds}
    corpora = {row["corpus"] for row in used.values()}
    check(len(corpora) == 1, f"{args.results}: its runs saw {len(corpora)} different corpora: "
                             "data/python is Python's own source and changes with its version")
    out = Path(args.out, args.scale)
    make_folder(out, "--out")
    print(f"{len(used)} of {len(rows)} rows of {args.results} belong to a family")
    for name, text in tables(found, args.scale).items():
        (out / f"{name}.md").write_text(text + "\n", "utf-8")
        print(f"\n{out / name}.md\n\n{text}", flush=True)
    print(f"\n{draw_all(found, args.scale, out)}")

def has_begun(family: str, runs: Runs) -> bool:
    """Has a family runs to compare, beyond those that it shares with the depth family?"""
    return len(runs) > 1 and (family == "depth" or not runs.keys() <= FAMILIES["depth"].keys())

def tables(found: dict[str, Runs], scale: str) -> dict[str, str]:
    """Every table of the pages, by the name of its file."""
    compared = comparisons(found)
    written = {"headlines": headlines(found), "verdicts": verdict_counts(compared),
               "progress": progress(found)}
    for score in PREMISES:
        name = score.replace(" ", "_").replace("/", "").replace("-", "")
        written[f"premise_{name}"] = premises(found, scale, score)
    for family, runs in found.items():
        if family == "rates":
            written["rates"] = rates(runs)
            continue
        written[family] = values_table(family, runs, scale)
        written[f"{family}_verdicts"] = comparison_table(
            [c for c in compared if c.family == family], scale)
    if "depth" in found:
        written["depth_steps"] = depth_steps(found, scale)
        written["course"] = course_table(found["depth"], scale)
        written["released"] = released_table(found["depth"], scale)
    if "context" in found:
        written["context_common"] = common_lengths(found["context"], scale)
    written["mechanism"] = mechanism(found)
    written["processors"] = processors(found)
    return written

def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)

def short(x: float, sign: str = "") -> str:
    """Three digits, and - for nan."""
    if math.isnan(x):
        return "-"
    return f"{x:{sign},.0f}" if abs(x) >= 100 else f"{x:{sign}.3g}"

def with_interval(e: Estimate, score: str = "", sign: str = "") -> str:
    """As "0.12 (0.1 to 0.14)"; logarithms as the factor that they stand for."""
    numbers = [e.mean, e.low, e.high]
    factor = "times " if score in LOGARITHMS and sign else ""
    if score in LOGARITHMS:
        numbers, sign = [math.exp(x) for x in numbers], ""
    mean, low, high = (short(x, sign) for x in numbers)
    return f"{factor}{mean}" if math.isnan(e.half) else f"{factor}{mean} ({low} to {high})"

def paper_cell(c: Comparison) -> str:
    """The paper's difference in the units of ours."""
    if c.score in INFERRED or c.direction == 2:
        return {1: "more", -1: "less", 0: "equal", 2: "-"}[c.direction]
    if math.isnan(c.paper):
        return "to about 0"
    if c.score in LOGARITHMS:
        return f"times {short(math.exp(c.paper))}"
    return short(c.paper, "+")

def headlines(found: dict[str, Runs]) -> str:
    """The table of the README: eight claims, ours beside the paper's."""
    rows = []
    for says, family, member, score in HEADLINES:
        if score == "trend use":
            judged = premise(found.get(family, {}), member, score)
            if judged:
                rows.append([says, judged[2], f"{with_interval(judged[1])}", "below 0"])
            continue
        c = compare(found, family, member, score, "ladder_32" if family == "ladder" else "")
        if c:
            rows.append([says, c.verdict, with_interval(c.effect, score, "+"), paper_cell(c)])
    return markdown(["claim", "verdict", "here (95% interval)", "paper"], rows)

def progress(found: dict[str, Runs]) -> str:
    """How many of the planned runs are recorded."""
    rows = []
    for family, members in FAMILIES.items():
        planned = sum(len(seeds_of(family, member)) for member in members)
        runs = found.get(family, {})
        done = sum(len({row["seed"] for row in rows_of_member}) for rows_of_member in runs.values())
        rows.append([family, f"{done} of {planned}"])
    return markdown(["family", "runs recorded"], rows)

def verdict_counts(compared: Sequence[Comparison]) -> str:
    """How the comparisons of each family came out, and how many verdicts Holm's correction keeps."""
    judged = [c for c in compared if c.direction in (1, -1)]
    kinds = ["reproduced", "reproduced, smaller", "contradicted", "no effect of the paper's size",
             "inconclusive"]
    rows = []
    for family in dict.fromkeys(c.family for c in judged):
        verdicts = [c.verdict for c in judged if c.family == family]
        rows.append([family, *(str(verdicts.count(kind)) for kind in kinds)])
    decided = sum(c.effect.decided for c in judged)
    return (markdown(["family", *kinds], rows) + f"\n\nHolm's correction over all {len(judged)} "
            f"comparisons keeps {holm(compared)} of the {decided} decided ones.")

def values_table(family: str, runs: Runs, scale: str) -> str:
    """A row per member: the mean of each score over seeds with its interval."""
    scores_shown = KNOB
    if family == "init":
        scores_shown = ("last var.", "ln Vn/V1", "log ratio", *list(PREMISES)[:3], "val loss")
    rows = []
    for member, seeds in runs.items():
        cells = []
        for score in scores_shown:
            values = list(by_seed(seeds, score).values())
            cells.append(with_interval(estimate(values), score) if values else "-")
        rows.append([f"{label(family, member, scale)} ({len(by_seed(seeds, 'loss'))})", *cells])
    return markdown(["member (seeds)", *scores_shown], rows)

def comparison_table(compared: Sequence[Comparison], scale: str) -> str:
    """A row per comparison: ours, the paper's, their sizes, what could be detected, the verdict."""
    rows = []
    for c in compared:
        size = with_interval(c.size) if c.size else "-"
        detects = detectable(c.effect)
        if c.score in LOGARITHMS and not math.isnan(detects):
            detects_text = f"times {short(math.exp(detects))}"
        else:
            detects_text = short(detects)
        rows.append([f"{label(c.family, c.member, scale)} vs {label(c.family, c.base, scale)}",
                     c.score, with_interval(c.effect, c.score, "+"), paper_cell(c), size,
                     detects_text, c.verdict or "-"])
    return markdown(["comparison", "score", "here (95% interval)", "paper", "size (paper's = 1)",
                     "detects (80%)", "verdict"], rows)

def premises(found: dict[str, Runs], scale: str, score: str) -> str:
    """A row per depth: the value of each seed, their mean, step 0, and what training adds."""
    rows = []
    for member, seeds in found.get("depth", {}).items():
        judged = premise(found["depth"], member, score)
        if judged is None:
            continue
        values, e, verdict = judged
        start = by_seed(seeds, score, "start")
        added = [x - start[seed] for seed, x in values.items() if seed in start]
        rows.append([label("depth", member, scale), " ".join(short(x) for x in values.values()),
                     with_interval(e), short(statistics.mean(start.values())),
                     with_interval(estimate(added), "", "+"), verdict])
        if score == "ln Vn/V1":
            rows[-1][0] += f", ln n = {math.log(seeds[0]['settings']['n_layer']):.2f}"
    return markdown([PREMISES[score], "each seed", "mean (95%)", "step 0", "training adds",
                     "verdict"], rows)

def depth_steps(found: dict[str, Runs], scale: str) -> str:
    """What each step in depth still gains in validation loss."""
    rows = []
    members = [member for member in FAMILIES["depth"] if member in found["depth"]]
    for base, member in zip(members, members[1:]):
        c = compare(found, "depth", member, "val loss", base)
        if c:
            rows.append([f"{label('depth', base, scale)} to {label('depth', member, scale)}",
                         with_interval(c.effect, "", "+")])
    return markdown(["step", "validation loss (95%)"], rows)

def course_table(runs: Runs, scale: str) -> str:
    """The last layer's variance over training: its peak, when, what is left; and the paper's."""
    rows = []
    for member, seeds in runs.items():
        of = {name: estimate(list(by_seed(seeds, name).values()))
              for name in ("peak var.", "peak at", "left of it")}
        paper = PAPER["depth"][member]
        rows.append([label("depth", member, scale), with_interval(of["peak var."], "peak var."),
                     with_interval(of["peak at"]), with_interval(of["left of it"]),
                     f"{paper['peak']:,.0f}", "0.13", short(paper["variance"] / paper["peak"])])
    return markdown(["depth", "peak", "at share of steps", "left at the end", "paper: peak", "at",
                     "left"], rows)

def released_table(runs: Runs, scale: str) -> str:
    """The scores as the released scripts compute them, by depth, beside the defined ones."""
    columns = ("causal", "rel.causal", "useful", "rel.useful", "last var.", "rel.var.")
    rows = [[label("depth", member, scale),
             *(with_interval(estimate(list(by_seed(seeds, name).values())), name)
               for name in columns)] for member, seeds in runs.items()]
    return markdown(["depth", *columns], rows)

def common_lengths(runs: Runs, scale: str) -> str:
    """The contexts, each probed on the same tokens at the same places."""
    rows = []
    for length in COMMON_LENGTHS:
        for member, seeds in runs.items():
            cells = []
            for score in ("loss", "last var.", "ln Vn/V1", "useful", "log ratio", "influence"):
                values = list(by_seed(seeds, score, f"at_{length}").values())
                cells.append(with_interval(estimate(values), score) if values else "-")
            if cells[0] != "-":
                rows.append([f"{label('context', member, scale)}, first {length} tokens", *cells])
    return markdown(["trained with", "loss", "last var.", "ln Vn/V1", "useful", "log ratio",
                     "influence"], rows)

def rates(runs: Runs) -> str:
    """The runs that chose the learning rate: one seed, used for nothing else."""
    rows = []
    for rows_of_member in runs.values():
        row = rows_of_member[0]
        c, s, variance = row["settings"], row["scores"], row["probe"]["variance"]
        rows.append([f"{c['n_layer']} layers, init {c['init_std']}",
                     f"{c['learning_rate'] / c['init_std']:.3g} ({c['learning_rate']:g})",
                     f"{s['val loss']:.3f}", f"{short(variance[1])}, {short(variance[-1])}",
                     f"{s['ln Vn/V1']:.2f}", f"{s['useful']:.2f}",
                     ", ".join(f"{s[name]:+.2f}" for name in list(PREMISES)[:3])])
    return markdown(["model", "rate / init_std (rate)", "val loss", "Var h_1, Var h_n", "ln Vn/V1",
                     "useful", "trends: use, influence, J - I"], rows)

def mechanism(found: dict[str, Runs]) -> str:
    """Rank correlations over configurations, each the mean over its seeds, of all and at one depth."""
    together = configurations(found)
    shallow = {member: rows for member, rows in together.items()
               if rows[0]["settings"]["n_layer"] == 8 and rows[0]["settings"]["n_embd"] == 64}
    table = []
    for x, y in QUESTIONS:
        cells = [f"{x} with {y}"]
        for group in (together, shallow):
            pairs = [(means(rows, x), means(rows, y)) for rows in group.values()]
            pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
            rho = rank_correlation(*zip(*pairs)) if len(pairs) > 3 else math.nan
            if math.isnan(rho):
                cells.append("-")
                continue
            low, high = bootstrap(*zip(*pairs))
            cells.append(f"{rho:+.2f} ({low:+.2f} to {high:+.2f}; {len(pairs)})")
        table.append(cells)
    return markdown(["rank correlation", "all configurations (95%; number)", "8 layers, width 64"],
                    table)

def processors(found: dict[str, Runs]) -> str:
    """Runs of one member and seed that were computed on several kinds of processor."""
    rows = []
    for member, seeds in found.get("depth", {}).items():
        by_kind: dict[int, list[Row]] = {}
        for row in seeds:
            by_kind.setdefault(row["seed"], []).append(row)
        for seed, same in by_kind.items():
            for row in same[1:]:
                cells = [f"{short(row['scores'][name])} vs {short(same[0]['scores'][name])}"
                         for name in ("last var.", "ln Vn/V1", "log ratio", "val loss")]
                rows.append([f"{member} seed {seed}: {row['processor']} vs {same[0]['processor']}",
                             *cells])
    return markdown(["run", "last var.", "ln Vn/V1", "log ratio", "val loss"], rows)

# ---- figures -------------------------------------------------------------------------------------
# Told apart by all eyes (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NAMES = {"last var.": "variance of the last layer", "ln Vn/V1": "ln(Var h_n / Var h_1)",
         "useful": "share of useful blocks", "log ratio": "mean log affine ratio",
         "val loss": "validation loss (nats)", "density": "keys attended to x key heads",
         "trend use": "trend of the log ratio", "trend infl": "trend of the influence",
         "trend J-I": "trend of |J - I|"}
TITLES = {"weight_decay": "Weight decay", "context": "Context length T",
          "gqa": "Grouped queries: G per key/value head",
          "moe": "Mixture of experts at equal active FLOPs", "ladder": "The recipe, step by step",
          "norms": "The cures under other norms", "init": "Initialisation",
          "width": "Width at the same rate / init_std", "long": "Four times the steps"}

SHOWN_BY_PERPLEXITY = ("weight_decay", "context", "gqa", "moe")

def draw_all(found: dict[str, Runs], scale: str, out: Path) -> str:
    """Every figure that has its runs, as PNG and SVG; says where they are, or what is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no figures: pip install matplotlib"
    figures = {family: lambda family=family: draw_family(family, found[family], scale)
               for family in TITLES if family in found}
    if "depth" in found:
        depth = found["depth"]
        figures |= {"depth": lambda: draw_depth(depth),
                    "depth_blocks": lambda: draw_blocks(depth),
                    "depth_causal": lambda: draw_maps(depth, "causal", "Causal score C[s, l]"),
                    "depth_permutation": lambda: draw_maps(depth, "permutation",
                                                           "Permutation score P[i, j]"),
                    "depth_course": lambda: draw_course(depth)}
        figures["mechanism"] = lambda: draw_mechanism(configurations(found), found)
    if "rates" in found:
        figures["rates"] = lambda: draw_rates(found["rates"])
    if found.keys() & set(SHOWN_BY_PERPLEXITY):
        figures["perplexity"] = lambda: draw_perplexity(found, scale)
    for name, make in figures.items():
        save_figure(make(), out / name)
    return f"figures in {out}: {', '.join(figures)}"

def panels(across: int, height: float, title: str, down: int = 1, **shared: Any) -> tuple[Any, Any]:
    """A figure 9 inches wide, and its axes in a row or a grid."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, down * height + 0.4), layout="constrained")
    axes = list(fig.subplots(down, across, squeeze=False, **shared).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    fig.suptitle(title, fontsize=11)
    return fig, axes

def mean_lines(rows: Sequence[Row], name: str) -> np.ndarray:
    """The values of each block, as a mean over seeds; of a variance the geometric mean."""
    of_seeds = np.array([row["probe"][name] for row in rows], dtype=float)
    return np.exp(np.log(of_seeds).mean(0)) if "variance" in name else of_seeds.mean(0)

def draw_depth(runs: Runs) -> Any:
    """The curse in three panels: variance and |J - I| over relative depth; use by depth, a ring per
    seed."""
    fig, axes = panels(3, 2.9, "The curse of depth, measured here")
    for color, (member, rows) in zip(COLORS, runs.items()):
        n = rows[0]["settings"]["n_layer"]
        place = np.arange(1, n + 1) / n
        axes[0].plot(place, mean_lines(rows, "variance")[1:], color=color, label=f"{n} layers")
        axes[1].plot(place[1:], mean_lines(rows, "deviation")[1:], color=color)
    axes[0].set(yscale="log", title="The stream's variance grows", xlabel="depth (share of blocks)",
                ylabel="variance after the block")
    axes[1].set(title="Later blocks are closer to the identity", ylabel=r"$\|J-I\|_F\,/\,d$",
                xlabel="depth (share of blocks), block 0 left out", ylim=(0, None))
    axes[0].legend(fontsize=8, frameon=False)
    layers = [rows[0]["settings"]["n_layer"] for rows in runs.values()]
    twin = axes[2].twinx()
    twin.spines["top"].set_visible(False)
    for ax, score, color in ((axes[2], "log ratio", COLORS[0]), (twin, "useful", COLORS[1])):
        values = [list(by_seed(rows, score).values()) for rows in runs.values()]
        ax.plot(layers, [statistics.mean(x) for x in values], color=color)
        for n, of_seeds in zip(layers, values):
            ax.plot([n] * len(of_seeds), of_seeds, "o", color=color, fillstyle="none", markersize=4)
        ax.set_ylabel(NAMES[score], color=color, fontsize=9)
        ax.tick_params(axis="y", colors=color, labelsize=8)
        ax.set_ylim(bottom=0)
    axes[2].set(title="Deeper models use each block less", xlabel="layers", xticks=layers)
    for ax in axes:
        ax.title.set_fontsize(9)
    return fig

def draw_blocks(runs: Runs) -> Any:
    """Values of each block by depth: what attention and FFN add, |J - I| and the affine map."""
    shown = {"attn_variance": "Variance that attention adds",
             "ffn_variance": "Variance that the FFN adds", "deviation": r"$\|J-I\|_F\,/\,d$",
             "affine": "Loss with an affine map / loss"}
    fig, axes = panels(2, 2.6, "Block by block, for four depths", down=2)
    for ax, (name, title) in zip(axes, shown.items()):
        for color, rows in zip(COLORS, runs.values()):
            ax.plot(mean_lines(rows, name), color=color, marker="o", markersize=3,
                    label=f"{rows[0]['settings']['n_layer']} layers")
        ax.set_title(title, fontsize=9)
        ax.set(xlabel="block", yscale="linear" if name == "affine" else "log")
        if name != "affine":
            ax.yaxis.set_minor_formatter("")
    axes[0].legend(fontsize=8, frameon=False)
    return fig

def draw_maps(runs: Runs, name: str, title: str) -> Any:
    """One heat map per depth, the mean over seeds."""
    from matplotlib.colors import LogNorm
    maps = [np.mean([np.array(row["probe"][name], dtype=float) for row in rows], axis=0)
            for rows in runs.values()]
    high = max(x.max() for x in maps)
    fig, axes = panels(len(maps), 2.4, title)
    for ax, x, rows in zip(axes, maps, runs.values()):
        shown = np.where(np.triu(x, 1) > 0, x, np.nan)
        image = ax.imshow(shown, norm=LogNorm(high / 300, high))
        ax.set_title(f"{rows[0]['settings']['n_layer']} layers", fontsize=9)
        ax.set(xlabel="later block", ylabel="earlier block")
        ax.locator_params(integer=True, nbins=5)
    fig.colorbar(image, ax=axes, format="%g", shrink=0.8)
    return fig

def draw_course(runs: Runs) -> Any:
    """The last layer's variance over training: the geometric mean over seeds, and each seed."""
    fig, (ax,) = panels(1, 3.2, "The last layer's variance over training")
    for color, rows in zip(COLORS, runs.values()):
        curves = np.array([row["curve"] for row in rows], dtype=float)           # (seeds, points, 2)
        steps = curves[0, :, 0]
        for curve in curves:
            ax.plot(steps, curve[:, 1], color=color, linewidth=0.6, alpha=0.4)
        ax.plot(steps, np.exp(np.log(curves[:, :, 1]).mean(0)), color=color,
                label=f"{rows[0]['settings']['n_layer']} layers")
    ax.set(xlabel="step", ylabel="variance", yscale="log")
    ax.legend(fontsize=8, frameon=False)
    return fig

def draw_family(family: str, runs: Runs, scale: str) -> Any:
    """A row per member: each seed a ring, the mean with its interval, the paper's a diamond."""
    shown = ("last var.", "useful", "log ratio", "val loss")
    fig, axes = panels(len(shown), 0.8 + 0.3 * len(runs), TITLES[family], sharey=True)
    names = [label(family, member, scale).replace(" (paper", "\n(paper") for member in runs]
    axes[0].set_yticks(range(len(runs)), names, fontsize=7)
    axes[0].set_ylim(len(runs) - 0.5, -0.5)
    for ax, score in zip(axes, shown):
        for place, (member, rows) in enumerate(runs.items()):
            values = list(by_seed(rows, score).values())
            e = estimate(values)
            ends = np.array([e.mean, e.low, e.high]) if e.n > 1 else np.full(3, e.mean)
            if score in LOGARITHMS:
                values, ends = np.exp(values), np.exp(ends)
            ax.plot(values, [place + 0.22] * len(values), "o", color="gray", fillstyle="none",
                    markersize=3, label="a seed")
            ax.errorbar(ends[0], place, xerr=[[ends[0] - ends[1]], [ends[2] - ends[0]]], fmt="o",
                        color=COLORS[0], markersize=5, capsize=2, label="mean, 95% interval")
            paper = PAPER[family][member].get("useful") if score == "useful" else None
            if paper is not None:
                ax.plot(paper, place - 0.22, "D", color=COLORS[1], fillstyle="none", markersize=5,
                        label="the paper's")
        ax.set_title(NAMES[score], fontsize=8)
        ax.set_xscale("log" if score in LOGARITHMS else "linear")
        ax.grid(axis="x", alpha=0.3)
    marks = dict(zip(*reversed(axes[1].get_legend_handles_labels())))
    fig.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=3, fontsize=8,
               frameon=False)
    return fig

def draw_rates(runs: Runs) -> Any:
    """When is there a curse? Trends over the later blocks and loss, over rate / init_std."""
    fig, axes = panels(4, 2.8, "Do later blocks do less? It depends on learning rate / init_std")
    lines: dict[tuple[int, float], list[Row]] = {}
    for rows in runs.values():
        c = rows[0]["settings"]
        lines.setdefault((c["n_layer"], c["init_std"]), []).append(rows[0])
    for ax, score in zip(axes, ("trend use", "trend infl", "trend J-I", "val loss")):
        for color, ((n, std), rows) in zip(COLORS, sorted(lines.items())):
            points = sorted((row["settings"]["learning_rate"] / std, row["scores"][score])
                            for row in rows)
            ax.plot(*zip(*points), color=color, marker="o", markersize=4,
                    label=f"{n} layers, init_std {std}")
        if score != "val loss":
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set_ylim(-1.05, 1.05)
        ax.axvline(0.02, color="gray", linestyle=":", linewidth=1)
        ax.set(xscale="log", xlabel="learning rate / init_std")
        ax.set_title(NAMES[score], fontsize=9)
    axes[0].annotate("the paper", (0.02, -1.0), fontsize=7, color="gray", ha="right")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
               fontsize=8, frameon=False)
    return fig

def draw_perplexity(found: dict[str, Runs], scale: str) -> Any:
    """ln(perplexity / the baseline's) of ours beside the paper's, a row per comparison."""
    compared = [c for c in comparisons(found) if c.score == "val loss" and not math.isnan(c.paper)
                and c.family in SHOWN_BY_PERPLEXITY]
    fig, (ax,) = panels(1, 0.6 + 0.24 * len(compared), "Perplexity: ours beside the paper's")
    for place, c in enumerate(compared):
        ax.errorbar(c.effect.mean, place, xerr=np.nan_to_num(c.effect.half), fmt="o", color=COLORS[0],
                    markersize=4, capsize=2, label="here, 95% interval")
        ax.plot(c.paper, place, "D", color=COLORS[1], fillstyle="none", label="the paper")
    ax.set_yticks(range(len(compared)), [f"{label(c.family, c.member, scale)}" for c in compared],
                  fontsize=7)
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set(xlabel="ln(perplexity / perplexity of the baseline); linear up to 0.1, then logarithmic",
           ylim=(len(compared) - 0.5, -0.5))
    marks = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(marks.values(), marks.keys(), fontsize=8, frameon=False)
    return fig

def draw_mechanism(together: Runs, found: dict[str, Runs]) -> Any:
    """A dot per configuration, colored by family."""
    pairs = (("density", "last var."), ("density", "ln Vn/V1"), ("last var.", "log ratio"),
             ("ln Vn/V1", "log ratio"))
    fig, axes = panels(4, 2.8, "Density, variance and use: a dot per configuration")
    families = [family for family in found if family != "init"]
    for ax, (x, y) in zip(axes, pairs):
        for member, rows in together.items():
            home = next(family for family in families if member in FAMILIES[family])
            color = COLORS[families.index(home) % len(COLORS)]
            values = [math.exp(v) if name in LOGARITHMS else v
                      for name in (x, y) for v in [means(rows, name)]]
            ax.plot(*values, "o", color=color, markersize=4, label=home)
        ax.set_xlabel(NAMES[x], fontsize=8)
        ax.set_ylabel(NAMES[y], fontsize=8)
        ax.set(xscale="log" if x in LOGARITHMS else "linear",
               yscale="log" if y in LOGARITHMS else "linear")
    marks = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    fig.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=7, fontsize=8,
               frameon=False)
    return fig

# ---- the recipe at another size ------------------------------------------------------------------
# What each setting of the recipe rests on: the paper's ladder, downstream accuracy and usefulness.
LADDER = {
    "block_size": ("ladder_t4096", "T = 4096: accuracy 39.5 -> 40.0, usefulness 0.53 -> 0.59; "
                                   "with 8192 39.5 and 0.53"),
    "weight_decay": ("ladder_decay_0_3", "0.3: accuracy 40.0 -> 41.4, usefulness 0.59 -> 0.63; 0.6 "
                     "gives 41.0, 1.0 gives 38.5. What counts is rate x decay x steps; the ladder's "
                     "rate 4e-4 and 4,768 steps are our guess"),
    "n_kv_head": ("ladder_g2", "G = 2: accuracy 41.4 -> 42.1, usefulness 0.63 -> 0.66"),
    "n_experts": ("ladder_moe", "64 experts, top 8: accuracy 42.1 -> 44.1, usefulness 0.66 -> 0.75")}

class Covered(NamedTuple):
    """What the paper tried of a quantity."""
    ladder: float               # in its recipe
    least: float                # in any of its runs
    most: float

COVERED = {"n_layer": Covered(32, 12, 32),
           "n_embd": Covered(1120, 768, 2048),
           "active parameters": Covered(1.2e9, 4e8, 1.3e9),
           "tokens": Covered(1e10, 1e10, 1e10),
           "block_size": Covered(4096, 256, 8192),
           "weight_decay": Covered(0.3, 0, 3)}

def advise(args: Any) -> None:
    """Print the recipe at another size: why, how far off, what it takes; write a config."""
    check(0 < args.n_layer <= 1000 and 1e5 <= args.params <= 1e13 and 1e6 <= args.tokens <= 1e16,
          "--n_layer must be 1 to 1000, --params 1e5 to 1e13, --tokens 1e6 to 1e16")
    check(0 < args.gpus <= args.tokens / 1e5,
          f"--gpus {args.gpus}: 1 or more, with 1e5 or more of the --tokens each")
    check(not args.out or not Path(args.out).exists(),
          f"--out {args.out} exists: choose another name")
    c = advised(args.n_layer, args.params, args.tokens, args.gpus)
    least = config("ladder_moe", "laptop").n_embd
    check(c.n_embd >= least, f"--params {args.params:g}: below the range: with {args.n_layer} blocks "
                             f"it leaves a width of {c.n_embd}; configs/laptop/ has {least}")
    lines = [*reasons(c), *distances(c, args.params, args.tokens), *assignments(c)]
    print(*lines, "", sep="\n", flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", "utf-8")
        print(f"torchrun --nproc-per-node={args.gpus} train.py {args.out}\n", flush=True)
    print(plan(c, args.gpus, 0.4))

def advised(n_layer: int, params: float, tokens: float, gpus: int) -> TrainConfig:
    """The recipe with n_layer blocks, about `params` active parameters, trained on `tokens` tokens.

    What weight decay does goes with rate x decay x steps, so decay x steps is the ladder's.
    """
    ladder = config("ladder_moe", "paper")
    head_dim = ladder.n_embd // ladder.n_head
    n_embd = advised_width(ladder, n_layer, params)
    n_head = max(2, 2 * round(n_embd / head_dim / 2))             # even, so that G = 2 divides it
    step = math.lcm(8, 2 * n_head)                # RoPE takes even heads, grouped_mm multiples of 8
    n_embd = step * max(1, round(n_embd / step))
    T = ladder.block_size
    while T > 128 and T * gpus * 1000 > tokens:                   # at least 1,000 steps
        T //= 2
    at_once = T * gpus                                            # a sequence on each GPU
    wanted = min(ladder.tokens_per_step, tokens / ladder.max_steps)
    tokens_per_step = at_once * max(1, round(wanted / at_once))
    max_steps = max(1, round(tokens / tokens_per_step))
    weight_decay = ladder.weight_decay * ladder.max_steps / max_steps
    return replace(
        ladder, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_head // 2,
        ffn_hidden=0, expert_hidden=n_embd, block_size=T, batch_size=1,
        tokens_per_step=tokens_per_step, max_steps=max_steps,
        init_std=float(f"{0.02 * math.sqrt(2048 / n_embd):.3g}"),
        warmup_steps=min(ladder.warmup_steps, max_steps // 4),
        weight_decay=float(f"{weight_decay:.3g}"), out_dir="")

def advised_width(ladder: TrainConfig, n_layer: int, params: float) -> int:
    """The width at which n_layer of the ladder's blocks have about `params` active parameters.

    All widths go with n_embd, the experts' too, so there are a n_embd^2 + b n_embd.
    """
    a = n_layer * (3 + 3 * ladder.top_k)                          # attention with G = 2, experts
    b = 2 * ladder.vocab_size + n_layer * (ladder.n_experts + 2)  # embedding, head, routers, norms
    width = (math.sqrt(b * b + 4 * a * params) - b) / (2 * a)
    return max(32, 32 * round(width / 32))

def reasons(c: TrainConfig) -> list[str]:
    """Comments on an advised config: what each step rests on in the paper, and what it did here."""
    args = argparse.Namespace(scale="laptop", settings=[])
    rows = read_rows(ROOT / "configs/laptop/results.jsonl")
    found = {family: runs_of(family, rows, args) for family in ("depth", "ladder")}
    lines = []
    for name, (member, why) in LADDER.items():
        lines.append(f"# {name} = {getattr(c, name)}: in the paper {why}")
        judged = compare(found, "ladder", member, "log ratio")
        if judged:
            lines.append(f"#     on a laptop: log ratio {with_interval(judged.effect, '', '+')}, "
                         f"{judged.verdict}")
    return lines

def distances(c: TrainConfig, params: float, tokens: float) -> Iterator[str]:
    """Comments on an advised config: how far it is from the paper's runs and what was asked."""
    active = bare(c).count_parameters()["active"]
    here = {"n_layer": c.n_layer, "n_embd": c.n_embd, "active parameters": active, "tokens": tokens,
            "block_size": c.block_size, "weight_decay": c.weight_decay}
    for name, x in here.items():
        ladder, least, most = COVERED[name]
        line = f"# {name} {x:.4g} is {x / ladder:.3g} times the ladder's"
        if not 0.95 * least <= x <= 1.05 * most:
            line += f": EXTRAPOLATES, the paper has {least:.4g} to {most:.4g}"
        yield line
    if not 0.9 < active / params < 1.1:
        yield (f"# {params:.4g} were asked for: with {c.vocab_size} tokens in the vocabulary and "
               f"{c.n_experts} experts a layer no width comes nearer")

def assignments(c: TrainConfig) -> list[str]:
    """The lines of a config file: every setting that is not the default."""
    values = {f.name: getattr(c, f.name) for f in fields(c) if getattr(c, f.name) != f.default}
    return [f"{name} = {x!r}" for name, x in values.items()]

# ---- the command line ----------------------------------------------------------------------------
def read_arguments() -> Any:
    """The command line; `settings` are those of train.py behind `run` or `report`."""
    parser = Parser(prog="recipe.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    on_disk = argparse.ArgumentParser(add_help=False)
    on_disk.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    on_disk.add_argument("--out", default="out/recipe",
                         help="where runs, tables and figures are (default %(default)s)")
    on_disk.add_argument("--results", metavar="FILE", type=Path,
                         help="a line per finished run (default configs/SCALE/results.jsonl; with "
                              "settings of your own OUT/SCALE/results.jsonl)")

    add = commands.add_parser("run", help="train, probe and record a family",
                              parents=[on_disk]).add_argument
    add("family", choices=[*FAMILIES, "all"])
    add("--seeds", type=int, default=1, metavar="N", help="the first N of its seeds (default 1)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--tasks", default="", help="tasks of lm-evaluation-harness to score, see probe.py")
    add("--only", default=MEASURED, help="experiments of probe.py (default %(default)s)")
    add("--here", action="store_true", help="count only rows from this kind of processor as done")
    add("--dry-run", action="store_true", help="print the runs, their cost and time")

    commands.add_parser("report", help="tables and figures from results.jsonl", parents=[on_disk])

    add = commands.add_parser("advise", help="the paper's settings for your model").add_argument
    add("--n_layer", type=int, required=True, help="blocks")
    add("--params", type=float, required=True, help="active for a token, embeddings included")
    add("--tokens", type=float, required=True, help="to train on")
    add("--gpus", type=int, default=8, help="to train with (default 8)")
    add("--out", help="config file to write")

    args, args.settings = parser.parse_known_args()
    if args.command == "advise":
        check(not args.settings, f"unknown argument {args.settings[:1]}; see --help")
        return args
    for word in args.settings:
        name = word.removeprefix("--").partition("=")[0]
        check("=" in word and name in DEFAULTS and name not in ("seed", "out_dir"),
              f"{word}: not an option of `recipe.py {args.command}`, nor a setting of train.py as "
              "--name=value")
    if args.results is None:
        own = f"configs/{args.scale}/results.jsonl"
        args.results = Path(args.out, args.scale, "results.jsonl") if args.settings else ROOT / own
    return args

def main() -> None:
    args = read_arguments()
    {"run": run_family, "report": report, "advise": advise}[args.command](args)

if __name__ == "__main__":
    run(main)
