"""The paper's experiments, run and put beside its numbers; and its rule of thumb for your model.

    python recipe.py run depth --seeds 2                 # train and probe a family; resumable
    python recipe.py run ladder --scale paper --dry-run  # what would run at the paper's size
    python recipe.py report                              # tables and figures of results.jsonl
    python recipe.py advise --n_layer 32 --params 1.2e9 --tokens 10e9 --out advised.py
    python recipe.py diagnose out/gqa_deep               # does it use its depth? what would help?
    python recipe.py plot out/gqa_deep out/dense         # the course of their training

A member of a family is a file of configs/laptop/ or configs/paper/, perhaps with a setting changed,
as in "gqa_16,norm=lns". Members with equal settings are one run. Settings of train.py at the end of
`run` or `report` change all members.

What a run came to is a line of configs/SCALE/results.jsonl, which git keeps: a run whose line is
there is done, also on a machine that has none of its files. With settings of your own the lines go
to OUT/SCALE/results.jsonl instead; --results FILE is another file.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import platform
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch

from data import Parser, load_checkpoint, run
from model import UserError, check
from probe import (EXPERIMENTS, USEFUL, home_of, make_folder, remarks, save_figure, score_names,
                   score_table, scores)
from train import PEAK, TrainConfig, bare, load_settings, plan, vocabulary

ROOT = Path(__file__).parent

# ---- the families --------------------------------------------------------------------------------
def knobs(c: TrainConfig) -> dict[str, str]:
    """What members of a family differ in, as a table shows it."""
    return {"L": f"{c.n_layer}",                       # blocks
            "T": f"{c.block_size}",                    # context
            "d": f"{c.n_embd}",                        # width
            "decay": f"{c.weight_decay:g}",
            "G": f"{c.n_head // c.n_kv_head}",         # query heads per key/value head
            "experts": f"{c.n_experts}, top {c.top_k}",
            "norm": c.norm}

# The members of each family in the paper's order, and the knob that makes a member what it is; its
# value comes from the config, see `label`. A + is a knob turned on top of an earlier row, the one
# from which the member's config starts; an "or" is another value of the row above.
FAMILIES = {
    "depth": {"depth_12": "L {L}",
              "depth_16": "L {L}",
              "depth_24": "L {L}",
              "depth_32": "L {L}"},
    "weight_decay": {"weight_decay_0": "decay {decay}",
                     "weight_decay_0_01": "decay {decay}",
                     "weight_decay_0_1": "decay {decay}",
                     "weight_decay_1": "decay {decay}",
                     "weight_decay_3": "decay {decay}"},
    "context": {"context_256": "T {T}",
                "context_512": "T {T}",
                "context_1024": "T {T}",
                "context_2048": "T {T}",
                "context_4096": "T {T}",
                "context_8192": "T {T}"},
    "gqa": {"gqa_1": "G {G}",
            "gqa_4": "G {G}",
            "gqa_16": "G {G}"},
    "moe": {"dense_400m": "d {d}",
            "moe_400m": "+ experts {experts}",
            "dense_1b": "d {d}",
            "moe_1b": "+ experts {experts}"},
    "ladder": {"ladder_16": "L {L}",
               "ladder_32": "L {L}",
               "ladder_t4096": "+ T {T}",
               "ladder_t8192": "or T {T}",
               "ladder_decay_0_3": "+ decay {decay}",
               "ladder_decay_0_6": "or decay {decay}",
               "ladder_decay_1": "or decay {decay}",
               "ladder_g2": "+ G {G}",
               "ladder_moe": "+ experts {experts}"},
    "norms": {},
}
# Not in the paper: does each cure still help on top of LayerNorm Scaling or Peri-LN?
CURES = {"dense_1b": "norm {norm}",
         "weight_decay_0": "norm {norm}, decay {decay}",
         "context_4096": "norm {norm}, T {T}",
         "gqa_16": "norm {norm}, G {G}",
         "moe_1b": "norm {norm}, experts {experts}"}
# What the members are compared with, seed by seed: the baseline of their family, or another member.
BASELINES = {"depth": "depth_16", "weight_decay": "weight_decay_0_1", "context": "context_2048",
             "gqa": "gqa_1", "moe": "dense_1b", "ladder": "ladder_32", "norms": "dense_1b"}
OTHER_BASELINES = {"moe_400m": "dense_400m", "dense_400m": "dense_400m",      # with none
                   "ladder_decay_0_3": "ladder_t4096", "ladder_decay_0_6": "ladder_t4096",
                   "ladder_decay_1": "ladder_t4096", "ladder_g2": "ladder_decay_0_3",
                   "ladder_moe": "ladder_g2"}
for cure, its_knobs in CURES.items():
    for change in ("", ",norm=lns", ",norm=peri"):
        FAMILIES["norms"][cure + change] = its_knobs
        if change and cure != "dense_1b":
            OTHER_BASELINES[cure + change] = "dense_1b" + change

def arguments(member: str, scale: str) -> list[str]:
    """What train.py is told about a member: its config, and the settings changed after a comma."""
    name, *changes = member.split(",")
    return [str(ROOT / "configs" / scale / f"{name}.py"), *(f"--{change}" for change in changes)]

def config(member: str, scale: str, settings: Sequence[str] = ()) -> TrainConfig:
    """The settings of a member, with these of the command line; out_dir is the same for all."""
    return load_settings([*arguments(member, scale), *settings, "--out_dir=any"])[0]

@cache
def label(family: str, member: str, scale: str) -> str:
    """What makes a member: its knob, and what the value stands for, as in "L 16 (paper: 32)"."""
    here = knobs(config(member, scale))
    paper = knobs(config(member, "paper"))
    shown = {}
    for knob, value in here.items():
        shown[knob] = value if value == paper[knob] else f"{value} (paper: {paper[knob]})"
    return FAMILIES[family][member].format(**shown)

def folders(out: str | Path, scale: str) -> dict[str, Path]:
    """Where each member's runs are: in the folder of the first member with the same settings."""
    of_settings: dict[str, Path] = {}
    of_member = {}
    for members in FAMILIES.values():
        for member in members:
            settings = str(config(member, scale))
            of_member[member] = of_settings.setdefault(settings, Path(out, scale, member))
    return of_member

Numbers = dict[str, dict[str, dict[str, float]]]        # by family, member and column

def read_reported() -> tuple[list[str], Numbers]:
    """configs/paper/reported.txt: its columns of numbers, and what it says; - is not known."""
    header, *rows = (ROOT / "configs/paper/reported.txt").read_text().splitlines()
    columns = header.split()[2:]
    numbers: Numbers = {}
    for family, members in FAMILIES.items():
        numbers[family] = {member: {} for member in members}
    for row in rows:
        family, member, *cells = row.split()
        for column, x in zip(columns, cells, strict=True):
            if x != "-":
                numbers[family][member][column] = float(x)
    return columns, numbers

PAPER_COLUMNS, PAPER = read_reported()

# ---- running -------------------------------------------------------------------------------------
# By default: all that has a score, and how sparse the model is.
MEASURED = ",".join(name for name in EXPERIMENTS
                    if EXPERIMENTS[name].scores or name == "sparsity")
# Of `run all`, to save time: they have 17 members that are in no other family.
MOST_SEEDS = {"ladder": 3, "norms": 3}

class Job(NamedTuple):
    """A run of one member with one seed, and its folder."""
    member: str
    seed: int
    out: Path

Work = dict[Job, dict[str, list[str]]]        # of each job the commands it still needs, by stage

def run_family(args: Any) -> None:
    """Train, probe and record what is not yet; a run that fails does not stop the others."""
    families = list(FAMILIES) if args.family == "all" else [args.family]
    rows, _ = read_rows(args.results)
    work = {}
    for job in jobs_of(families, args):
        c = load_settings(training(job, args))[0]
        work[job] = commands(job, args, find_row(rows, c, job.seed))
    if args.dry_run:
        print_costs(work, args)
        return
    failed = [str(job.out) for job in run_all(work, args)]
    report(args, families)
    check(not failed, f"{len(failed)} of {len(work)} runs failed: {', '.join(failed)}; "
          "the same command tries again")

def jobs_of(families: Sequence[str], args: Any) -> list[Job]:
    """A job for each member and seed, all of seed 0 first; those with equal settings share one."""
    folder = folders(args.out, args.scale)
    jobs: dict[Path, Job] = {}
    for seed in range(args.seeds):
        for family in families:
            if len(families) > 1 and seed >= MOST_SEEDS.get(family, args.seeds):
                continue
            for member in FAMILIES[family]:
                out = folder[member] / f"seed_{seed}"
                jobs.setdefault(out, Job(member, seed, out))
    return list(jobs.values())

def training(job: Job, args: Any) -> list[str]:
    """What train.py is told of a job."""
    of_member = arguments(job.member, args.scale)
    return [*of_member, *args.settings, f"--seed={job.seed}", f"--out_dir={job.out}"]

def commands(job: Job, args: Any, row: Row | None = None) -> dict[str, list[str]]:
    """The commands that a job still needs, by stage: train, probe, record, the last of which is
    none. row: what is recorded of it."""
    wanted, recorded = args.only.split(","), row or {"experiments": [], "tasks": []}
    if row and set(wanted) <= set(row["experiments"]) and set(args.tasks) <= set(row["tasks"]):
        return {}
    c = load_settings(training(job, args))[0]
    saved = read_checkpoint(job.out)
    another = bool(differing(c, saved.get("settings", {})))        # train.py puts that aside
    todo, probed = {}, {}
    if another or saved.get("step") != c.max_steps:
        todo["train"] = train_command(job, args, resume=not another)
    else:
        with contextlib.suppress(*DAMAGED):
            told = read_probe(job.out / "ckpt.pt", job.out)["run"]
            if "weights" in told:                # else it is too old for probe.py to add to
                probed = told

    # A row is written whole; probe.json keeps what it holds.
    wanted = union(recorded["experiments"], wanted)
    experiments = [name for name in wanted if name not in probed.get("experiments", [])]
    tasks = union(probed.get("tasks", []), union(recorded["tasks"], args.tasks))
    if tasks == probed.get("tasks", []):
        tasks = []                               # nothing new; else probe.py scores all of them
    if experiments or tasks:
        todo["probe"] = probe_command(job, args, c.block_size, experiments, tasks)
    return todo | {"record": []}

def union(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Those of a, and those of b that are not in a, in order."""
    return list(dict.fromkeys([*a, *b]))

def train_command(job: Job, args: Any, resume: bool) -> list[str]:
    """The command that trains: on every GPU, if there are several."""
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"]
    command += [str(ROOT / "train.py"), *training(job, args)]
    command.append("--resume" if resume else "--overwrite")
    return command

def probe_command(job: Job, args: Any, T: int, experiments: Sequence[str],
                  tasks: Sequence[str]) -> list[str]:
    """The command that measures a trained model of context T."""
    samples = 100
    if args.scale == "laptop":
        samples = max(2, 8192 // T)         # 8,192 tokens whatever T is: 64 sequences of 128
    command = [sys.executable, str(ROOT / "probe.py"), str(job.out / "ckpt.pt")]
    if experiments:                         # tasks alone take no samples
        command.append(f"--samples={samples}")
    command.append("--only=" + ",".join([*experiments, "tasks"] if tasks else experiments))
    if tasks:
        command += ["--tasks", *tasks]
    return command

def product_rate(n: int = 1024) -> float:
    """FLOP/s of an n x n matrix product on this CPU, best of ten."""
    a = torch.randn(n, n)
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2 * n**3 / min(seconds)

def print_costs(work: Work, args: Any) -> None:
    """A line per job, what it is and what its training takes; and the hours of all."""
    if args.scale == "paper":
        machine = "8 H100 at 40% MFU"
        rate = 8 * PEAK["H100"] * 0.4                                     # FLOP/s
    else:
        machine = "this machine"
        rate = product_rate() / 3                                         # measured: about a third
    total = 0.0
    for job, todo in work.items():
        c = load_settings(training(job, args))[0]
        model = bare(replace(c, vocab_size=vocabulary(c)))
        active = model.count_parameters()["active"]
        tokens = c.max_steps * c.tokens_per_step
        flops = model.flops_per_token() * tokens
        hours = flops / rate / 3600 if "train" in todo else 0.0
        total += hours
        print(f"{job.out}: {active:,} active parameters, {tokens:,} tokens, {flops:.2g} FLOPs, "
              f"{hours:.2f} h; to do: {', '.join(todo) or 'nothing'}")
    print(f"{total:.1f} h of training on {machine}, one run at a time; "
          "probing takes a quarter as long, tasks come on top")

def run_all(work: Work, args: Any) -> list[Job]:
    """Run the jobs, args.jobs at a time; returns those that failed."""
    running: set[subprocess.Popen] = set()
    environment = dict(os.environ)
    if args.jobs > 1:       # with more threads than cores in all, each run takes ten times as long
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def run_job(job: Job) -> bool:
        """Run a job's commands; did it come to its end?"""
        for stage, command in work[job].items():
            if stage == "record":
                return record(job, args)
            job.out.mkdir(parents=True, exist_ok=True)
            print(f"{job.out}: {stage}", flush=True)
            with open(job.out / f"{stage}.txt", "w") as said:
                process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
                running.add(process)
                status = process.wait()
                running.discard(process)
            # A train.py that was stopped by SIGTERM ends with status 0, and is not done.
            if status != 0 or stage in commands(job, args):
                print(f"{job.out}: {stage} failed or was stopped, see {said.name}", flush=True)
                return False
        return True

    def stop(*_: Any) -> None:
        """As Ctrl-C, which reaches them by itself: train.py saves and stops, no run begins."""
        for process in running:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(run_job, work))
    return [job for job, fine in zip(work, finished) if not fine]

# ---- what is on disk of a run --------------------------------------------------------------------
# What reading a result can raise: it is not there, cut, or not what it should be.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
# Settings that change how a run is computed and not what it is; the seed is in the folder's name.
NO_MATTER = {"vocab_size", "out_dir", "seed", "device", "dtype", "compile", "parallel", "recompute",
             "save_interval", "keep_checkpoints", "wandb"}
def differing(c: TrainConfig, settings: dict[str, Any]) -> list[str]:
    """The settings in which a run that was trained with `settings` is another one than c."""
    return [name for name, value in asdict(c).items()
            if settings.get(name, value) != value and name not in NO_MATTER]

def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder; {} where there is none, or a damaged one: train.py sees to it."""
    try:
        return load_checkpoint(folder / "ckpt.pt")
    except UserError:
        return {}

def read_probe(ckpt: Path, folder: Path) -> dict[str, Any]:
    """The probe.json in a folder; one of DAMAGED is raised also if it is older than ckpt."""
    path = folder / "probe.json"
    if ckpt.is_file() and path.stat().st_mtime < ckpt.stat().st_mtime:
        raise ValueError("it is older than the checkpoint")
    return json.loads(path.read_text())

def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, if there is one; the last is cut if the machine stopped."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]

def variance_curve(log: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """From the lines of a log: steps, and the variance of the last layer then."""
    return [(line["step"], line["variance"][-1]) for line in log if "variance" in line]

# ---- results.jsonl: what is kept of every run ----------------------------------------------------
# A row is a dict: member, seed, settings (those that matter), corpus (its checksum), torch, python
# and processor, experiments and tasks, scores (by column of a table), curve (see `variance_curve`,
# thinned) and probe (what probe.json says of blocks).
Row = dict[str, Any]
CURVE_POINTS = 40
# Columns of a table that are not probe.py's: see `own_scores`.
OWN_COLUMNS = ["train loss", "val loss", "peak var.", "peak at", "left of it", "growth",
               "near zero", "eff. keys", "key heads", "active FFN", "density"]

def default_results(args: Any) -> Path:
    """Where rows are; those of settings of one's own stay out of what git keeps."""
    for member in folders(args.out, args.scale):
        if differing(config(member, args.scale), asdict(config(member, args.scale, args.settings))):
            return Path(args.out, args.scale, "results.jsonl")
    return ROOT / "configs" / args.scale / "results.jsonl"

def read_rows(path: Path) -> tuple[list[Row], list[int]]:
    """The rows in a results.jsonl, if there is one; and the numbers of lines that are damaged, as
    one is that a machine was writing when it stopped."""
    rows, damaged = [], []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            whole = all(row[name] for name in ("member", "settings", "experiments", "scores"))
        except DAMAGED:
            whole = False
        if whole:
            row["scores"] |= course(row)
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged

def course(row: Row) -> dict[str, float]:
    """Scores of the last layer's variance over training: at which share of the steps it is
    largest, and the share of that which is left at the end."""
    if not row.get("curve"):
        return {}
    step, peak = max(row["curve"], key=lambda point: (point[1], point[0]))
    last_step, last = row["curve"][-1]
    return {"peak at": step / last_step, "left of it": last / peak if peak else math.nan}

def find_row(rows: Sequence[Row], c: TrainConfig, seed: int) -> Row | None:
    """The newest row of a run with these settings and this seed."""
    for row in reversed(rows):
        if row["seed"] == seed and not differing(c, row["settings"]):
            return row
    return None

def record(job: Job, args: Any) -> bool:
    """Append the row of a finished run; could it be done?"""
    path = args.results
    try:
        line = json.dumps(row_of(job, load_settings(training(job, args))[0])) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        # In one piece, since other jobs append too. A line that a crash has cut gets its end.
        with open(path, "ab", buffering=0) as f:
            cut = f.tell() > 0 and not path.read_bytes().endswith(b"\n")
            f.write(("\n" * cut + line).encode())
    except (UserError, *DAMAGED) as e:
        print(f"{job.out}: cannot be recorded in {path} ({e})", flush=True)
        return False
    print(f"{job.out}: recorded in {path}", flush=True)
    return True

def row_of(job: Job, c: TrainConfig) -> Row:
    """What is kept of a finished run."""
    log, r = read_log(job.out), read_probe(job.out / "ckpt.pt", job.out)
    of_blocks = {name: x for name, x in r.items() if name not in ("run", "seconds")}
    settings = {name: x for name, x in asdict(c).items() if name not in NO_MATTER}
    curve = variance_curve(log)
    thinned = sorted({round(k) for k in np.linspace(0, len(curve) - 1, CURVE_POINTS)})
    return compact({
        "member": job.member, "seed": job.seed, "settings": settings,
        "corpus": read_checkpoint(job.out).get("corpus"), "torch": torch.__version__,
        "python": platform.python_version(), "processor": processor(),
        "experiments": r["run"]["experiments"], "tasks": r["run"].get("tasks", []),
        "scores": own_scores(c, log, r) | scores(r),
        "curve": [curve[k] for k in thinned] if curve else [],
        "probe": without_matrices(of_blocks)})

def processor() -> str:
    """The name of what a run is computed on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

def own_scores(c: TrainConfig, log: Sequence[dict[str, Any]],
               r: dict[str, Any]) -> dict[str, float]:
    """Scores of a run beside probe.py's, by OWN_COLUMNS; what was not measured is left out.

    growth: of ln variance per block, from the stream after the first to the last.
    near zero: the share of a block's weights below the threshold of probe.py.
    eff. keys: the share of the visible keys that a query effectively attends to.
    key heads: distinct ones per query head. density: eff. keys x key heads.
    active FFN: the share of the FFN's weights that a token meets.
    """
    losses = [line["loss"] for line in log[-100:] if "loss" in line]
    validations = [line["val_loss"] for line in log if "val_loss" in line]
    found = {"key heads": c.n_kv_head / c.n_head, "active FFN": 1.0}
    if c.n_experts:
        met = c.top_k * c.expert_hidden + c.shared_hidden
        found["active FFN"] = met / (c.n_experts * c.expert_hidden + c.shared_hidden)
    if losses:
        found["train loss"] = statistics.mean(losses)                # of the last 100 steps
    if validations:
        found["val loss"] = validations[-1]
    if variance_curve(log):
        found["peak var."] = max(variance for _, variance in variance_curve(log))
    if "variance" in r:
        first, last = r["variance"][1], r["variance"][-1]
        if first and last and c.n_layer > 1:
            found["growth"] = math.log(last / first) / (c.n_layer - 1)
    if "sparsity" in r:
        found["near zero"] = near_zero(c, r)
        found["eff. keys"] = statistics.mean(r["sparsity"]["attention"]["effective_keys"])
        found["density"] = statistics.mean(r["sparsity"]["interaction_density"])
    return found

def near_zero(c: TrainConfig, r: dict[str, Any]) -> float:
    """The share of the weights of all blocks that are near zero, from the shares by kind."""
    count = total = 0.0
    model = bare(replace(c, vocab_size=vocabulary(c)))
    for name, w in model.blocks[0].named_parameters():
        if w.dim() > 1:
            shares = r["sparsity"]["weights"][name.removesuffix(".weight")]["below"]
            count += w.numel() * sum(shares)
            total += w.numel() * len(shares)
    return count / total

def without_matrices(x: Any) -> Any:
    """Nested dicts without the lists of lists in them: n x n numbers are most of a probe.json."""
    if not isinstance(x, dict):
        return x
    return {key: without_matrices(value) for key, value in x.items()
            if not (isinstance(value, list) and value and isinstance(value[0], list))}

def compact(x: Any) -> Any:
    """Numbers to six digits, also inside of dicts and lists; JSON has null for nan."""
    if isinstance(x, dict):
        return {key: compact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [compact(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x

Runs = dict[str, list[Row]]                  # of each member, the rows of its seeds

def runs_of(family: str, rows: Sequence[Row], args: Any) -> Runs:
    """The members of a family that have rows."""
    found = {}
    for member in FAMILIES[family]:
        c = config(member, args.scale, args.settings)
        newest = {row["seed"]: row for row in rows if not differing(c, row["settings"])}
        if newest:
            found[member] = [newest[seed] for seed in sorted(newest)]
    return found

def doubts(rows: Sequence[Row], damaged: Sequence[int], args: Any) -> Iterator[str]:
    """What is not as it should be in results.jsonl, a line each."""
    for number in damaged:
        yield f"line {number} is damaged and left out"
    members = {member: config(member, args.scale, args.settings)
               for member in folders(args.out, args.scale)}
    corpora, strange = set(), []
    for row in rows:
        if any(not differing(c, row["settings"]) for c in members.values()):
            corpora.add(row["corpus"])
        else:
            c = members.get(row["member"])
            names = ", ".join(differing(c, row["settings"])) if c else "no such member"
            strange.append(f"{row['member']} seed {row['seed']} ({names})")
    if strange:
        yield f"left out, being of other settings: {'; '.join(strange)}"
    if len(corpora) > 1:
        yield (f"its runs saw {len(corpora)} different corpora and are not comparable: data/python "
               "is Python's own source, another one with each version of Python")

# ---- tables --------------------------------------------------------------------------------------
def report(args: Any, families: Sequence[str]) -> None:
    """Write and print what is recorded of each family, see `report_family`; and of all families
    what becomes of the paper's claims, and of its mechanism."""
    rows, damaged = read_rows(args.results)
    found = {family: runs_of(family, rows, args) for family in families}
    found = {family: runs for family, runs in found.items() if runs}
    for line in doubts(rows, damaged, args):
        print(f"{args.results}: {line}")
    check(found, f"no finished run in {args.results}: "
          f"python recipe.py run depth --scale {args.scale}")
    out = Path(args.out, args.scale)
    make_folder(out, "--out")
    for family, runs in found.items():
        report_family(family, runs, args.scale, out)
    if len(families) < len(FAMILIES):
        return
    drawn = save(out / "mechanism", lambda: draw_mechanism(found))
    print(f"\nmechanism: {drawn}")
    write(out / "mechanism.md", f"{MECHANISM}\n\n{mechanism(found, args.scale)}")
    write(out / "claims_as_released.md", claims_as_released(found))
    write(out / "claims.md", claims(found))

def write(path: Path, text: str) -> None:
    """Write a table, and print it."""
    path.write_text(text + "\n")
    print(f"\n{path}\n\n{text}\n", flush=True)

def report_family(family: str, runs: Runs, scale: str, out: Path) -> None:
    """Write the tables and figures of a family into `out`, and print the tables."""
    drawn = save(out / family, lambda: draw_scores(family, runs, scale))
    curves = save(out / f"{family}_variance", lambda: draw_variance(family, runs, scale))
    print(f"\n{family}: {drawn}, {curves}")
    write(out / f"{family}.md", table(family, runs, scale))
    write(out / f"{family}_differences.md", differences(family, runs, scale))
    if family == "depth":
        write(out / "depth_definitions.md", definitions(runs, scale))
    missing = [member for member in FAMILIES[family] if member not in runs]
    if missing:
        print(f"not finished: {', '.join(missing)}")
    sys.stdout.flush()

def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without the rows that have nothing behind their name."""
    filled = [row for row in rows if any(row[1:])]
    lines = []
    for cells in [header, ["---"] * len(header), *filled]:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)

def table(family: str, runs: Runs, scale: str) -> str:
    """A column per member, a row per score: what was measured, and what the paper reports."""
    header = ["", *(label(family, member, scale) for member in runs)]
    rows = [["config", *(f"`{member}`" for member in runs)],
            ["seeds", *(str(len(seeds)) for seeds in runs.values())]]
    for name in [*OWN_COLUMNS, *score_names()]:
        if name != "loss":                   # of probe.py's few tokens; "val loss" says more
            rows.append([name, *(cell(values_of(seeds, name)) for seeds in runs.values())])
    for name in PAPER_COLUMNS:
        rows.append([f"paper: {name}", *(reported(family, member, name) for member in runs)])
    return markdown(header, rows)

def values_of(seeds: Sequence[Row], column: str) -> list[float]:
    """A score of the seeds that have it."""
    found = [row["scores"].get(column) for row in seeds]
    return [x for x in found if x is not None]

def cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as "0.583 ± 0.118", as far as there are any."""
    if not values:
        return ""
    size = abs(statistics.mean(values))
    digits = 1 if size >= 10 else 3 if size >= 0.01 else 5
    shown = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{x:.{digits}f}" for x in shown)

def reported(family: str, member: str, column: str) -> str:
    """What the paper reports of a member, as text."""
    x = PAPER[family][member].get(column)
    return "" if x is None else f"{x:g}"

def definitions(runs: Runs, scale: str) -> str:
    """Which scores are the paper's like: as defined, or as the released scripts compute them?"""
    header = ["", *(label("depth", member, scale) for member in runs), "mean distance"]
    rows = []
    for papers, ours in {"useful": ("useful", "rel.useful"),
                         "causal": ("causal", "rel.causal")}.items():
        theirs = [PAPER["depth"][member][papers] for member in runs]
        for column in ours:
            means = [statistics.mean(values_of(seeds, column) or [math.nan])
                     for seeds in runs.values()]
            distance = np.abs(np.subtract(means, theirs)).mean()
            if not math.isnan(distance):         # measured of all
                rows.append([column, *(f"{x:.3f}" for x in [*means, distance])])
        rows.append([f"paper: {papers}", *(f"{x:g}" for x in theirs), ""])
    return markdown(header, rows)

# ---- statistics ----------------------------------------------------------------------------------
# 97.5% quantiles of Student's t for n = 2 ... 10; above that the last is taken, which is wider.
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
# The scores that are compared, the one that is not quantised first, and the paper's number that
# says in which direction they are expected to go.
COMPARED = {"log ratio": "useful", "useful": "useful", "heldout": "useful", "rel.ratio": "useful",
            "rel.useful": "useful", "causal": "causal", "rel.causal": "causal",
            "permuted": "permuted", "last var.": "variance", "rel.var.": "variance",
            "val loss": "ppl", "accuracy": "accuracy"}
LOGARITHMS = ("last var.", "rel.var.")

def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% t interval; nan for a single value."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = T_QUANTILES[min(n, 10) - 2]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)

def paired(seeds: Sequence[Row], base: Sequence[Row], column: str) -> list[float]:
    """By how much a score is larger than the base's, of every seed that both have."""
    of_base = {row["seed"]: row["scores"].get(column) for row in base}
    pairs = [(row["scores"].get(column), of_base.get(row["seed"])) for row in seeds]
    if column in LOGARITHMS:
        return [math.log(x / y) for x, y in pairs if x and y]
    return [x - y for x, y in pairs if x is not None and y is not None]

def verdict(mean: float, half: float, before: float, after: float) -> str:
    """Does an interval of differences lie on the side to which the paper's number goes?"""
    if before == after:
        return "no direction"                # in the paper's two numbers
    if not has_interval(half):
        return "no interval"
    if abs(mean) <= half:
        return "undecided"
    return "reproduced" if (mean > 0) == (after > before) else "contradicted"

def has_interval(half: float) -> bool:
    """Not with one seed, nor where a score moved by the same step in every seed."""
    return half > 1e-6                           # of nan too this is false

class Difference(NamedTuple):
    """By how much a score of a member is larger than its baseline's."""
    mean: float
    half: float                 # of the width of the 95% interval; nan with a single seed
    n: int                      # seeds
    verdict: str                # "" where the paper does not report both

def baseline(family: str, member: str) -> str:
    """The member that this one is compared with."""
    return OTHER_BASELINES.get(member, BASELINES[family])

def difference(family: str, member: str, runs: Runs, column: str) -> Difference | None:
    """The paired difference of a member from its baseline; None where nothing can be compared."""
    base = baseline(family, member)
    values = paired(runs.get(member, []), runs.get(base, []), column)
    if member == base or not values:
        return None
    mean, half = interval(values)
    papers = COMPARED[column]
    before, after = PAPER[family][base].get(papers), PAPER[family][member].get(papers)
    known = before is not None and after is not None
    return Difference(mean, half, len(values),
                      verdict(mean, half, before, after) if known else "")

def differences(family: str, runs: Runs, scale: str) -> str:
    """A column per comparison, a row per score: the paired difference, and what it says."""
    header, members = [""], []
    for member in runs:
        base = baseline(family, member)
        if base in runs and base != member:
            members.append(member)
            header.append(f"{label(family, member, scale)} vs {label(family, base, scale)}")
    rows = []
    for column in COMPARED:
        found = [difference(family, member, runs, column) for member in members]
        name = f"ln {column}" if column in LOGARITHMS else column
        rows.append([name, *(difference_cell(d) for d in found)])
    return markdown(header, rows) if members else "no member has its baseline yet"

def difference_cell(d: Difference | None) -> str:
    """As "+0.021 ± 0.008 (n = 5) reproduced", as far as it is known."""
    if d is None:
        return ""
    half = f" ± {d.half:.3f}" if has_interval(d.half) else ""
    return f"{d.mean:+.3f}{half} (n = {d.n}) {d.verdict}".rstrip()

class Claim(NamedTuple):
    """Something that the paper says, and the comparisons with their baselines that test it."""
    says: str
    family: str
    column: str
    members: tuple[str, ...]    # the first is the example

DECAYS = ("weight_decay_0", "weight_decay_0_01", "weight_decay_1", "weight_decay_3")
CONTEXTS = ("context_256", "context_512", "context_1024", "context_4096", "context_8192")
STEPS = ("ladder_moe", "ladder_g2", "ladder_decay_0_3", "ladder_t4096")         # which it keeps
CLAIMS = [
    Claim("[depth]: the last variance grows", "depth", "last var.",
          ("depth_32", "depth_24", "depth_12")),
    Claim("[depth]: blocks are used less", "depth", "log ratio",
          ("depth_32", "depth_24", "depth_12")),
    Claim("[depth]: the causal score falls", "depth", "causal",
          ("depth_32", "depth_24", "depth_12")),
    Claim("[decay] lowers the variance", "weight_decay", "last var.", DECAYS),
    Claim("[decay] of 0.1 is best for usefulness", "weight_decay", "log ratio", DECAYS),
    Claim("[decay] of 0.1 is best for perplexity", "weight_decay", "val loss", DECAYS),
    Claim("[context]: longer lowers the variance", "context", "last var.", CONTEXTS),
    Claim("[context] of 2048 to 4096 is best for usefulness", "context", "log ratio", CONTEXTS),
    Claim("[context] of 2048 is best for perplexity", "context", "val loss", CONTEXTS),
    Claim("[GQA] lowers the variance", "gqa", "last var.", ("gqa_4", "gqa_16")),
    Claim("[GQA] raises usefulness", "gqa", "log ratio", ("gqa_4", "gqa_16")),
    Claim("[GQA] lowers perplexity a little", "gqa", "val loss", ("gqa_4", "gqa_16")),
    Claim("[MoE] lowers the variance", "moe", "last var.", ("moe_1b",)),
    Claim("[MoE] raises usefulness", "moe", "log ratio", ("moe_1b", "moe_400m")),
    Claim("[MoE] lowers perplexity at equal active FLOPs", "moe", "val loss",
          ("moe_1b", "moe_400m")),
    Claim("[recipe]: each step raises usefulness", "ladder", "log ratio", STEPS),
    Claim("[recipe]: each step raises accuracy", "ladder", "accuracy", STEPS)]
RELEASED = {"log ratio": "rel.ratio", "causal": "rel.causal", "last var.": "rel.var."}

def claims(found: dict[str, Runs]) -> str:
    """A row per claim: the verdicts on its comparisons, and one of the differences."""
    rows = []
    for claim in CLAIMS:
        runs = found.get(claim.family, {})
        rows.append([claim.says, verdicts(claim, runs, claim.column), example(claim, runs)])
    return markdown(["the paper says", "verdict here", "first comparison"], rows)

def claims_as_released(found: dict[str, Runs]) -> str:
    """The verdicts on the claims of whose score the released scripts compute another one."""
    rows = []
    for claim in CLAIMS:
        runs = found.get(claim.family, {})
        if claim.column in RELEASED:
            rows.append([claim.says, claim.column, verdicts(claim, runs, claim.column),
                         verdicts(claim, runs, RELEASED[claim.column])])
    return markdown(["the paper says", "score", "as defined", "as released"], rows)

def verdicts(claim: Claim, runs: Runs, column: str) -> str:
    """How many comparisons of a claim came out which way, as "reproduced 2, undecided 1 of 3"."""
    compared = [difference(claim.family, member, runs, column) for member in claim.members]
    words = [d.verdict.replace("no interval", "undecided") for d in compared if d]
    words = [word for word in words if word not in ("", "no direction")]
    said = [f"{word} {words.count(word)}" for word in ("reproduced", "contradicted", "undecided")
            if word in words]
    return f"{', '.join(said)} of {len(words)}" if words else "not measured"

def example(claim: Claim, runs: Runs) -> str:
    """The difference in the first comparison of a claim, with its interval."""
    member = claim.members[0]
    d = difference(claim.family, member, runs, claim.column)
    if d is None:
        return ""
    numbers = [d.mean, d.mean - d.half, d.mean + d.half]
    if claim.column in LOGARITHMS:           # a factor says more than a logarithm
        mean, low, high = (f"{math.exp(x):.3g}" for x in numbers)
        mean = f"times {mean}"
    else:
        mean, low, high = (f"{x:+.3g}" for x in numbers)
    between = "one seed" if math.isnan(d.half) else f"{low} to {high}"
    return f"`{member}`: {claim.column} {mean} ({between})"

def ranks(x: Sequence[float]) -> np.ndarray:
    """The place of each number among all, from 1; equal ones share the mean of their places."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[which]

def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The rank correlation; nan where x or y does not vary."""
    a, b = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    scale = math.sqrt((a @ a) * (b @ b))
    return a @ b / scale if scale else math.nan

def bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the rank correlation, from 1,000 draws of as many runs, with repeats."""
    x, y, draw = np.array(x), np.array(y), np.random.default_rng(0)
    chosen = draw.integers(len(x), size=(1000, len(x)))
    low, high = np.nanquantile([spearman(x[k], y[k]) for k in chosen], [0.025, 0.975])
    return low, high

# ---- the mechanism: does sparsity damp the variance, and does that keep blocks useful? -----------
QUESTIONS = [("near zero", "growth"), ("eff. keys", "growth"), ("key heads", "growth"),
             ("active FFN", "growth"), ("density", "growth"), ("growth", "log ratio"),
             ("growth", "useful"), ("growth", "val loss"), ("last var.", "log ratio")]
MECHANISM = """\
Rank correlations over runs, with 95% bootstrap intervals and the number of runs; a family is left
out where one of the two does not vary. growth: of ln variance per block. The paper's claim is that
each measure of density (eff. keys, key heads, active FFN, density) goes with more growth, near zero
with less; and growth with a lower log ratio and usefulness, and a higher loss.

"all" counts a run that is in several families once. A deep model grows less per block and uses each
block less, so rows that mix depths mix this in. Two rows do not: one has the runs of the baseline's
norm and depth, one those of its decay as well.

What is mechanical: the norm before each attention and FFN takes away the stream's scale, so what a
block adds is as large as its weights make it. Decay shrinks all weights: more of them fall below
the fixed threshold of near zero, and blocks add less. That decay makes weights near zero and the
last variance small is therefore arithmetic, and no evidence that sparsity did it. Nor is any
correlation here: members differ in a knob, which may move both measures. Runs of one member are
near copies and the bootstrap draws runs, so the intervals are too narrow for other members."""

Points = list[tuple[float, float]]

def points(runs: Runs, x: str, y: str) -> Points:
    """Two scores of each run that has both."""
    scores = [row["scores"] for seeds in runs.values() for row in seeds]
    pairs = [(score.get(x), score.get(y)) for score in scores]
    return [(a, b) for a, b in pairs if a is not None and b is not None]

def different_runs(found: dict[str, Runs]) -> Runs:
    """The runs of all families, each once, under the first member that has it."""
    together: Runs = {}
    for runs in found.values():
        for member, seeds in runs.items():
            if seeds not in together.values():
                together[member] = seeds
    return together

def mechanism(found: dict[str, Runs], scale: str) -> str:
    """A column per question, a row per group of runs: the rank correlation of the two measures.

    The groups are all runs, those of each norm, of the baseline's norm and depth, of its decay as
    well, and each family.
    """
    together = different_runs(found)
    groups = {"all": together}
    for norm in ("pre", "lns", "peri"):
        groups[f"norm {norm}"] = {member: seeds for member, seeds in together.items()
                                  if config(member, scale).norm == norm}
    base = config("depth_16", scale)
    deep = f"norm pre, L {base.n_layer}"
    groups[deep] = {member: seeds for member, seeds in groups["norm pre"].items()
                    if config(member, scale).n_layer == base.n_layer}
    groups[f"{deep}, decay {base.weight_decay:g}"] = {
        member: seeds for member, seeds in groups[deep].items()
        if config(member, scale).weight_decay == base.weight_decay}
    groups |= found
    header = ["", *(f"{x} → {y}" for x, y in QUESTIONS)]
    rows = [[name, *(correlation(points(runs, x, y)) for x, y in QUESTIONS)]
            for name, runs in groups.items()]
    return markdown(header, rows)

def correlation(pairs: Points) -> str:
    """Spearman's, with its interval and number of runs; "" where it means nothing."""
    if len(pairs) < 4:
        return ""
    x, y = zip(*pairs)
    rho = spearman(x, y)
    if math.isnan(rho):
        return ""
    low, high = bootstrap(x, y)
    return f"{rho:.2f} ({low:.2f} to {high:.2f}; {len(pairs)})"

# ---- figures -------------------------------------------------------------------------------------
BLUE, ORANGE = "#0072B2", "#D55E00"          # told apart by all eyes (Okabe and Ito)
FAMILY_MARKS = {"depth": ("o", "#0072B2"), "weight_decay": ("s", "#D55E00"),
                "context": ("^", "#009E73"), "gqa": ("D", "#CC79A7"), "moe": ("P", "#E69F00"),
                "ladder": ("v", "#56B4E9"), "norms": ("X", "#000000"), "in several": ("o", "#999999")}
MEANINGS = {"near zero": "share of weights near zero", "eff. keys": "share of keys attended to",
            "key heads": "key heads per query head", "active FFN": "active share of the FFN",
            "density": "keys attended to x key heads", "growth": "growth of ln variance per block",
            "last var.": "variance of the last layer",
            "useful": "usefulness", "val loss": "validation loss"}
# What a family turns, and what the letters of its labels are.
TITLES = {"depth": "L layers", "weight_decay": "weight decay", "context": "contexts of T tokens",
          "gqa": "G query heads on each key/value head",
          "moe": "experts at equal active FLOPs; d: width", "ladder": "the recipe, step by step",
          "norms": "each cure under three norms"}
# The panels of a family's figure: a score, its title, and the paper's number of the same kind.
PANELS = {"log ratio": ("log ratio", ""), "useful": ("usefulness", "useful"),
          "rel.useful": ("usefulness as released", "useful"), "causal": ("causal score", "causal"),
          "rel.causal": ("causal as released", "causal"),
          "permuted": ("permutation score", "permuted"), "last var.": ("last variance", "variance"),
          "val loss": ("validation loss", ""), "accuracy": ("accuracy", "")}

def save(path: Path, make: Callable[[], Any]) -> str:
    """Save the figure that is made as path.png and path.svg; says where, or what it takes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no figure: pip install matplotlib"
    figure = make()
    try:
        save_figure(figure, path)
    except OSError as e:
        raise UserError(f"cannot write {path}.png ({e.strerror}): choose another --out") from e
    return f"{path}.png and .svg"

def panels(count: int, across: int, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure 8 inches wide and its axes, `across` in a row, each row `height` inches high."""
    from matplotlib.figure import Figure
    rows = math.ceil(count / across)
    fig = Figure(figsize=(8, rows * height + 0.5), layout="constrained")
    axes = list(fig.subplots(rows, across, squeeze=False, **shared).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    for ax in axes[count:]:
        ax.set_visible(False)
    return fig, axes[:count]

def title_of(family: str, runs: Runs, scale: str) -> str:
    """As "depth: L layers; laptop scale, 3 to 5 seeds"."""
    counts = sorted({len(seeds) for seeds in runs.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    return f"{family}: {TITLES[family]}; {scale} scale, seeds: {seeds}"

def draw_scores(family: str, runs: Runs, scale: str) -> Any:
    """A panel per score, a row per member: each seed, the mean with its interval, the paper's."""
    columns = [name for name in PANELS
               if any(values_of(seeds, name) for seeds in runs.values())]
    fig, axes = panels(len(columns), 4, 0.8 + 0.36 * len(runs), sharey=True)
    fig.suptitle(title_of(family, runs, scale), fontsize=10)
    labels = [label(family, member, scale).replace(" (paper", "\n(paper") for member in runs]
    axes[0].set_yticks(range(len(runs)), labels)
    axes[0].set_ylim(len(runs) - 0.5, -0.5)                      # the first member on top
    for ax, column in zip(axes, columns):
        title, papers = PANELS[column]
        draw_score(ax, runs, column, [PAPER[family][member].get(papers) for member in runs])
        ax.set_title(title, fontsize=9)
    marks = {}
    for ax in axes:
        marks |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    fig.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=3, fontsize=8,
               frameon=False)
    return fig

def draw_score(ax: Any, runs: Runs, column: str, papers: Sequence[float | None]) -> None:
    """One panel of `draw_scores`. The variance has a log axis, and the mean of its logarithms."""
    is_log = column == "last var."
    for place, seeds in enumerate(runs.values()):
        values = [x for x in values_of(seeds, column) if x > 0 or not is_log]
        ax.plot(values, [place + 0.2] * len(values), "o", color="gray", fillstyle="none",
                markersize=3.5, label="a seed")
        if len(values) > 1:
            mean, low, high = ends_of_interval(values, is_log)
            ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=BLUE,
                        markersize=5, capsize=2.5, label="mean, 95% interval")
    known = [(x, place - 0.2) for place, x in enumerate(papers) if x is not None]
    if is_log:
        values = [x for seeds in runs.values() for x in values_of(seeds, column)]
        decades = np.log10([x for x in [*values, *(x for x, _ in known)] if x > 0])
        left = 10 ** np.floor(decades.min() - 0.2)
        ax.set(xscale="log", xlim=(left, 10 ** np.ceil(decades.max() + 0.2)))
        ax.xaxis.set_minor_formatter("")
        zeros = [place for x, place in known if x == 0]
        known = [(x, place) for x, place in known if x > 0]
        if zeros:
            ax.plot([left] * len(zeros), zeros, "<", color=ORANGE, fillstyle="none", markersize=6,
                    clip_on=False, label="the paper's, about 0")
    else:
        ax.locator_params("x", nbins=4)
        if "useful" in column:
            ax.set_xlim(-0.05, 1.05)
    if known:
        ax.plot(*zip(*known), "D", color=ORANGE, fillstyle="none", markersize=5,
                label="the paper's")
    ax.grid(axis="x", alpha=0.3)

def ends_of_interval(values: Sequence[float], is_log: bool) -> tuple[float, float, float]:
    """The mean of at least two values and both ends of its interval, of their logarithms if so."""
    if is_log:
        mean, half = interval([math.log(x) for x in values])
        return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
    mean, half = interval(values)
    return mean, mean - half, mean + half

def draw_variance(family: str, runs: Runs, scale: str) -> Any:
    """The last layer's variance by step, a panel per norm: the geometric mean over seeds, and each
    seed thin."""
    from matplotlib import colormaps
    norms: dict[str, list[str]] = {}
    for member in runs:
        norms.setdefault(config(member, scale).norm, []).append(member)
    fig, axes = panels(len(norms), 1, 4.5 if len(norms) == 1 else 2.6, sharey=True)
    fig.suptitle(f"{title_of(family, runs, scale)}\nvariance of the last layer over training",
                 fontsize=10)
    for ax, members in zip(axes, norms.values()):
        colors = colormaps["viridis"](np.linspace(0, 0.75, len(members)))
        ends = {}
        for color, member in zip(colors, members):
            end = draw_curves(ax, [row["curve"] for row in runs[member]], color)
            if end:
                ends[label(family, member, scale)] = (end, color)
        ax.set(xlabel="step", ylabel="variance", yscale="log")
        label_ends(ax, ends)
    return fig

def draw_curves(ax: Any, curves: Sequence[Any], color: Any) -> tuple[float, float] | None:
    """The curves of one member's seeds and their geometric mean; returns where that ends."""
    steps = max(([step for step, _ in curve] for curve in curves), key=len)
    same = [curve for curve in curves if [step for step, _ in curve] == steps]
    if not steps:
        return None
    variances = np.array(same)[:, :, 1]                          # (seeds, steps)
    means = np.exp(np.log(np.maximum(variances, 1e-38)).mean(0))
    for variance in variances:
        ax.plot(steps, variance, color=color, linewidth=0.7, alpha=0.4)
    ax.plot(steps, means, color=color, linewidth=2)
    return steps[-1], means[-1]

def label_ends(ax: Any, ends: dict[str, tuple[tuple[float, float], Any]]) -> None:
    """Write each name at the right, joined to where its line ends, none over another."""
    ax.figure.draw_without_rendering()                           # puts the axes in their place
    heights = {name: ax.transAxes.inverted().transform(ax.transData.transform(end))[1]
               for name, (end, _) in ends.items()}
    apart, free = 0.2 / ax.get_position().height / ax.figure.get_figheight(), -math.inf
    for name in sorted(heights, key=heights.get):                # from below, each above the last
        heights[name] = free = max(heights[name], free + apart)
    too_high = max(0, free - 1)
    for name, (end, color) in ends.items():
        ax.annotate(name, end, (1.04, heights[name] - too_high), color=color, fontsize=8,
                    textcoords="axes fraction", verticalalignment="center",
                    arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5,
                                "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0})

def draw_mechanism(found: dict[str, Runs]) -> Any:
    """A panel per question, a mark per run, by family; what is in several families is gray."""
    groups: dict[str, Runs] = {}
    together = different_runs(found)
    for member, seeds in together.items():
        families = [family for family, runs in found.items() if seeds in runs.values()]
        name = families[0] if len(families) == 1 else "in several"
        groups.setdefault(name, {})[member] = seeds
    fig, axes = panels(len(QUESTIONS), 3, 2.4)
    fig.suptitle("Over all runs: rank correlation (95% interval; runs)", fontsize=10)
    for ax, (x, y) in zip(axes, QUESTIONS):
        ax.set_title(correlation(points(together, x, y)), fontsize=8)
        ax.set_xlabel(MEANINGS.get(x, x), fontsize=8)
        ax.set_ylabel(MEANINGS.get(y, y), fontsize=8)
        if x == "last var.":
            ax.set_xscale("log")
            ax.locator_params("y", nbins=4)
        else:
            ax.locator_params(nbins=4)
        for name, runs in groups.items():
            mark, color = FAMILY_MARKS[name]
            pairs = np.array(points(runs, x, y)).reshape(-1, 2)
            ax.plot(*pairs.T, mark, color=color, markersize=4, alpha=0.7, label=name)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
               ncols=len(groups), fontsize=8, frameon=False)
    return fig

# ---- the course of a run -------------------------------------------------------------------------
COURSE = {"loss": "training loss", "val_loss": "validation loss", "lr": "learning rate",
          "grad_norm": "gradient norm", "variance": "variance of the last layer"}

def plot(args: Any) -> None:
    """Draw what log.jsonl says of one or several runs."""
    logs = {}
    for path in args.paths:
        home = path.parent if path.name == "log.jsonl" else path
        check((home / "log.jsonl").is_file(), f"{home} has no log.jsonl: give folders of runs")
        try:
            log = read_log(home)
            whole = len(log) > 0 and all(line["step"] > 0 for line in log)
        except DAMAGED:
            whole = False
        check(whole, f"{home}/log.jsonl is damaged or empty: leave {home} out")
        logs[str(home)] = log
    target = args.out or Path(next(iter(logs)), "training.png")
    check(target.suffix == ".png", f"--out {target}: must end in .png; an .svg comes beside it")
    print(save(target.with_suffix(""), lambda: draw_course(logs)))

def draw_course(logs: dict[str, list[dict[str, Any]]]) -> Any:
    """A panel per quantity, a line per run."""
    fig, axes = panels(len(COURSE), 2, 2.4)
    for ax, (key, title) in zip(axes, COURSE.items()):
        for name, log in logs.items():
            lines = [(line["step"], line[key]) for line in log if key in line]
            if key == "variance":
                lines = variance_curve(log)
            if lines:
                ax.plot(*zip(*lines), linewidth=1, marker="o" if len(lines) < 50 else "",
                        markersize=3, label=name)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.locator_params("x", integer=True)
        if key == "variance":
            ax.set_yscale("log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
               fontsize=8, frameon=False)
    return fig

# ---- the rule of thumb: the paper's recipe at another size ---------------------------------------
# What each setting of the recipe rests on: the paper's ladder, downstream accuracy and usefulness.
LADDER = {
    "block_size": "T = 4096: accuracy 39.5 -> 40.0, usefulness 0.53 -> 0.59; "
                  "with 8192 39.5 and 0.53",
    "weight_decay": "0.3: accuracy 40.0 -> 41.4, usefulness 0.59 -> 0.63; "
                    "0.6 gives 41.0, 1.0 gives 38.5. What counts is rate x decay x steps; "
                    "the ladder's rate 4e-4 and 4,768 steps are our guess",
    "n_kv_head": "G = 2: accuracy 41.4 -> 42.1, usefulness 0.63 -> 0.66",
    "n_experts": "64 experts, top 8: accuracy 42.1 -> 44.1, usefulness 0.66 -> 0.75"}

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
    least = config("ladder_moe", "laptop").expert_hidden
    check(c.expert_hidden >= least,
          f"--params {args.params:g}: below the range: with {args.n_layer} blocks it leaves "
          f"{c.n_experts} experts of width {c.expert_hidden}, and configs/laptop/, which has the "
          f"paper's knobs in small models, has {least}")
    lines = [*reasons(c), *distances(c, args.params, args.tokens), *assignments(c)]
    print(*lines, "", sep="\n", flush=True)
    if args.out:
        try:
            Path(args.out).write_text("\n".join(lines) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {args.out} ({e.strerror}): choose another --out") from e
        print(f"torchrun --nproc-per-node={args.gpus} train.py {args.out}\n", flush=True)
    print(plan(c, args.gpus, 0.4))

def advised(n_layer: int, params: float, tokens: float, gpus: int) -> TrainConfig:
    """The recipe with n_layer blocks, about `params` active parameters, trained on `tokens` tokens.

    What weight decay does goes with rate x decay x steps, so decay x steps is the ladder's.
    """
    ladder = config("ladder_moe", "paper")
    n_embd = advised_width(ladder, n_layer, params)
    n_head = 2 * max(1, round(n_embd / ladder.head_dim / 2))      # even, as wide as the ladder's
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
        head_dim=2 * round(n_embd / n_head / 2), ffn_hidden=0, expert_hidden=n_embd, block_size=T,
        batch_size=1, tokens_per_step=tokens_per_step, max_steps=max_steps,
        warmup_steps=min(ladder.warmup_steps, max_steps // 4),
        weight_decay=float(f"{weight_decay:.3g}"), out_dir="")

def advised_width(ladder: TrainConfig, n_layer: int, params: float) -> int:
    """The multiple of 32 at which n_layer of the ladder's blocks have about `params` parameters.

    Active ones. All widths go with n_embd, the experts' too, so there are a n_embd^2 + b n_embd.
    """
    a = n_layer * (3 + 3 * ladder.top_k)                          # attention with G = 2, experts
    b = 2 * ladder.vocab_size + n_layer * (ladder.n_experts + 2)  # embedding, head, routers, norms
    width = (math.sqrt(b * b + 4 * a * params) - b) / (2 * a)
    return max(32, 32 * round(width / 32))

def reasons(c: TrainConfig) -> list[str]:
    """Comments on an advised config: what each step of the recipe rests on."""
    return [f"# {name} = {getattr(c, name)}: in the paper {why}" for name, why in LADDER.items()]

def distances(c: TrainConfig, params: float, tokens: float) -> Iterator[str]:
    """Comments on an advised config: how far it is from the paper's runs and what was asked."""
    active = bare(c).count_parameters()["active"]
    here = {"n_layer": c.n_layer, "n_embd": c.n_embd, "active parameters": active, "tokens": tokens,
            "block_size": c.block_size, "weight_decay": c.weight_decay}
    for name, value in here.items():
        ladder, least, most = COVERED[name]
        line = f"# {name} {value:.4g} is {value / ladder:.3g} times the ladder's"
        if not 0.95 * least <= value <= 1.05 * most:
            line += f": EXTRAPOLATES, the paper has {least:.4g} to {most:.4g}"
        yield line
    if not 0.9 < active / params < 1.1:
        yield (f"# {params:.4g} were asked for: with {c.vocab_size} tokens in the vocabulary and "
               f"{c.n_experts} experts a layer no width comes nearer")

def assignments(c: TrainConfig) -> list[str]:
    """The lines of a config file: every setting that is not the default."""
    values = {f.name: getattr(c, f.name) for f in fields(c) if getattr(c, f.name) != f.default}
    return [f"{name} = {value!r}" for name, value in values.items()]

# ---- the rule of thumb: what would help a run ----------------------------------------------------
IDLE = 0.02      # a block with a cosine above 0.98 between its input and its output: our choice
# What probe.py's table says of each block in a result, by column.
OF_BLOCKS = {name: values for experiment in EXPERIMENTS.values()
             for name, values, _ in experiment.columns}

def diagnose(path: Path) -> str:
    """Does a run use its depth, what could go, what next? From settings, log.jsonl, probe.json."""
    ckpt = path / "ckpt.pt" if (path / "ckpt.pt").exists() else path
    home = home_of(ckpt)
    settings = load_checkpoint(ckpt)["settings"]
    check((home / "probe.json").exists(), f"{path} is not probed yet: python probe.py {ckpt}")
    try:
        result = read_probe(ckpt, home)
        absent = [name for name in ("variance", "usefulness", "removal") if name not in result]
        same_tokens = [f"--{name} {result['run'][name]}" for name in ("samples", "length")
                       if name in result["run"]]
        check(not absent, f"{home}: {', '.join(absent)} not measured yet: python probe.py {ckpt} "
                          f"--only {','.join(absent)} {' '.join(same_tokens)}")
        found = symptoms(result, read_log(home), ckpt)
        return "\n".join([f"{path}: {found[0]}", *found[1:], *remedies(result, settings)])
    except DAMAGED as e:
        raise UserError(
            f"{home}: probe.json is old or in part, or it or log.jsonl is damaged ({e}): "
            f"python probe.py {ckpt}; a damaged log.jsonl must go") from e

def symptoms(result: dict[str, Any], log: Sequence[dict[str, Any]], ckpt: Path) -> list[str]:
    """How a model uses its depth, a line each."""
    ratios = OF_BLOCKS["affine"](result)
    useful = [str(l) for l, ratio in enumerate(ratios) if ratio > USEFUL]
    lines = [f"{len(useful)} of {len(ratios)} blocks are useful: {', '.join(useful) or 'none'}",
             score_table({"": result}), *remarks(result, str(ckpt))]

    variance = OF_BLOCKS["variance"](result)
    first, last = variance[0], variance[-1]
    line = (f"variance x{last / max(first, 1e-38):.1f} from the first block to the last, "
            f"{first:.3g} to {last:.3g}")
    curve = variance_curve(log)
    if curve:
        step, peak = max(curve, key=lambda point: (point[1], point[0]))
        line += f"; over training the last peaked at {peak:.3g}, step {step}"
    lines.append(line)

    idle = [str(l) for l, x in enumerate(OF_BLOCKS["influence"](result)) if x < IDLE]
    lines.append(f"near the identity (influence below {IDLE}): {', '.join(idle) or 'no block'}")
    return lines

def remedies(result: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The steps of the paper's ladder that a run has not taken, in the order to try them in."""
    if scores(result)["useful"] >= 0.9:
        return ["next: its depth is used"]
    goals = {name: goal for name in LADDER if (goal := goal_of(name, settings)) is not None}
    if not goals:
        return ["next: every step of the recipe is taken"]
    knobs = list(goals)
    variance = OF_BLOCKS["variance"](result)
    if "weight_decay" in knobs and variance[-1] >= 10 * variance[0]:
        knobs.remove("weight_decay")         # it acts on the variance itself: before all others
        knobs.insert(0, "weight_decay")
    first, *others = knobs
    return [f"next in the paper's ladder: {first} {goals[first]:.3g}, here {settings.get(first)}; "
            f"in the paper {LADDER[first]}",
            f"then: {', '.join(f'{name} {goals[name]:.3g}' for name in others) or 'nothing'}"]

def goal_of(name: str, settings: dict[str, Any]) -> float | None:
    """Where the ladder's step that turns the setting `name` leads a run; None: it has taken it.

    The ladder is that of configs/laptop/ or configs/paper/, whichever is nearer in width.
    """
    def distance(scale: str) -> float:
        return abs(math.log(config("ladder_moe", scale).n_embd / settings["n_embd"]))
    ladder = config("ladder_moe", min(("laptop", "paper"), key=distance))
    if name == "n_kv_head":                  # G = 2, or the next that divides the heads
        fewer = [n for n in range(1, settings["n_head"]) if settings["n_head"] % n == 0]
        return fewer[-1] if settings["n_kv_head"] == settings["n_head"] and fewer else None
    if name == "n_experts":
        return None if settings["n_experts"] else ladder.n_experts
    if name == "block_size":
        return None if settings["block_size"] >= ladder.block_size else ladder.block_size
    goal = ladder.weight_decay
    if settings.get("learning_rate") and settings.get("max_steps"):
        # What counts is rate x decay x steps.
        decayed = ladder.learning_rate * ladder.weight_decay * ladder.max_steps
        most = config("ladder_decay_1", "paper").weight_decay     # of a short run it would be huge
        goal = min(most, decayed / settings["learning_rate"] / settings["max_steps"])
    return None if settings.get("weight_decay", 0) > 0.95 * goal else goal

# ---- the command line ----------------------------------------------------------------------------
def read_arguments() -> Any:
    """The command line; `settings` are those of train.py behind `run`."""
    parser = Parser(prog="recipe.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    on_disk = argparse.ArgumentParser(add_help=False)
    on_disk.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    on_disk.add_argument("--out", default="out/recipe",
                         help="where runs, tables and figures are (default %(default)s)")
    on_disk.add_argument("--results", metavar="FILE", type=Path,
                         help="a line per finished run (default configs/SCALE/results.jsonl; with "
                              "settings of your own OUT/SCALE/results.jsonl)")

    add = commands.add_parser("run", help="train, probe and report a family",
                              parents=[on_disk]).add_argument
    add("family", choices=[*FAMILIES, "all"])
    add("--seeds", type=int, default=1, metavar="N",
        help="of every member, 0 to N - 1 (default 1); `all` takes 3 at most of ladder and norms")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--tasks", nargs="+", default=[], metavar="DIR",
        help="folders of OLMES tasks to score, see probe.py")
    add("--only", default=MEASURED, help="experiments of probe.py (default %(default)s)")
    add("--dry-run", action="store_true", help="print the runs, their cost and time")

    commands.add_parser("report", help="tables and figures from results.jsonl", parents=[on_disk])

    add = commands.add_parser("advise", help="the paper's settings for your model").add_argument
    add("--n_layer", type=int, required=True, help="blocks")
    add("--params", type=float, required=True, help="active for a token, embeddings included")
    add("--tokens", type=float, required=True, help="to train on")
    add("--gpus", type=int, default=8, help="to train with (default 8)")
    add("--out", help="config file to write")

    add = commands.add_parser("diagnose", help="does a run use its depth?").add_argument
    add("paths", nargs="+", type=Path, help="folders of runs, or checkpoints")

    add = commands.add_parser("plot", help="the course of one or several runs").add_argument
    add("paths", nargs="+", type=Path, help="folders of runs, or their log.jsonl")
    add("--out", type=Path, help="figure to write (default training.png in the first folder)")

    home = os.path.expanduser("~")               # a shell leaves it in --name=~/path
    words = [re.sub(r"^(--\w+=)?~(?=/|$)", lambda m: (m[1] or "") + home, word)
             for word in sys.argv[1:]]
    args, args.settings = parser.parse_known_args(words)
    if args.command == "run":
        check_run(args)
    if args.command in ("run", "report"):
        check_settings(args)
        args.results = args.results or default_results(args)
    else:
        check(not args.settings, f"unknown argument {args.settings[:1]}; see --help")
    return args

def check_run(args: Any) -> None:
    """UserError for what `run` cannot do."""
    check(args.seeds > 0 and args.jobs > 0, "--seeds and --jobs must be positive")
    check(set(args.only.split(",")) <= set(EXPERIMENTS),
          f"--only {args.only!r}: there are {','.join(EXPERIMENTS)}")
    check(all(Path(task).is_dir() for task in args.tasks),
          f"--tasks {' '.join(args.tasks)}: not all are folders")

def check_settings(args: Any) -> None:
    """UserError for what is neither a flag nor a setting of train.py."""
    names = {f.name for f in fields(TrainConfig)} - {"seed", "out_dir"}
    for k, given in enumerate(args.settings):
        is_value = k > 0 and not given.startswith("-")            # of --name before it
        name = given.lstrip("-").split("=")[0]
        is_setting = given.startswith("-") and name in names
        check(is_value or is_setting,
              f"{given}: `{args.command}` takes what `recipe.py {args.command} --help` lists, as "
              "--seeds and --out, and other settings of train.py")

def main() -> None:
    args = read_arguments()
    if args.command == "run":
        run_family(args)
    elif args.command == "report":
        report(args, list(FAMILIES))
    elif args.command == "advise":
        advise(args)
    elif args.command == "plot":
        plot(args)
    else:
        for k, path in enumerate(args.paths):
            print("\n" * (k > 0) + diagnose(path), flush=True)

if __name__ == "__main__":
    run(main)
