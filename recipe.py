"""The paper's experiments, run and put beside its numbers; and its rule of thumb for your model.

    python recipe.py run depth --seeds 2                 # train and probe a family; resumable
    python recipe.py run ladder --scale paper --dry-run  # what would run at the paper's size
    python recipe.py report                              # tables and figures of what is on disk
    python recipe.py advise --n_layer 32 --params 1.2e9 --tokens 10e9 --out advised.py
    python recipe.py diagnose out/gqa_deep               # does it use its depth? what would help?

A member of a family is a file of configs/laptop/ or configs/paper/, perhaps with a setting changed,
as in "gqa_16,norm=lns". Members with equal settings are one run. Settings of train.py at the end of
`run` change all members.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import torch

from data import Parser, load_checkpoint, run
from model import UserError, check
from probe import EXPERIMENTS, USEFUL, remarks, score_names, score_table, scores
from train import PEAK, TrainConfig, bare, load_settings, peak_flops, plan, vocabulary

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
# from which the member's config starts.
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
               "ladder_t8192": "+ T {T}",
               "ladder_decay_0_3": "+ decay {decay}",
               "ladder_decay_0_6": "+ decay {decay}",
               "ladder_decay_1": "+ decay {decay}",
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
for cure, its_knobs in CURES.items():
    for change in ("", ",norm=lns", ",norm=peri"):
        FAMILIES["norms"][cure + change] = its_knobs

def arguments(member: str, scale: str) -> list[str]:
    """What train.py is told about a member: its config, and the settings changed after a comma."""
    name, *changes = member.split(",")
    return [str(ROOT / "configs" / scale / f"{name}.py"), *(f"--{change}" for change in changes)]

def config(member: str, scale: str) -> TrainConfig:
    """The settings of a member; out_dir, which is none of its own, is the same for all."""
    return load_settings([*arguments(member, scale), "--out_dir=any"])[0]

def label(family: str, member: str, scale: str) -> str:
    """What makes a member: its knob, and what the value stands for, as in "L 16 (paper: 32)"."""
    here = knobs(config(member, scale))
    paper = knobs(config(member, "paper"))
    shown = {}
    for knob, value in here.items():
        shown[knob] = value if value == paper[knob] else f"{value} (paper: {paper[knob]})"
    return FAMILIES[family][member].format(**shown)

def is_sweep(family: str) -> bool:
    """Does it turn a single knob, so that a line may join its members?"""
    return len(set(FAMILIES[family].values())) == 1

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
MEASURED = ",".join(name for name in EXPERIMENTS if EXPERIMENTS[name].scores)      # by default

class Job(NamedTuple):
    """A run of one member with one seed, and its folder."""
    member: str
    seed: int
    out: Path

Work = dict[Job, dict[str, list[str]]]        # of each job the commands it still needs, by stage

def run_family(args: Any) -> None:
    """Train and probe what is not on disk yet; a run that fails does not stop the others."""
    families = list(FAMILIES) if args.family == "all" else [args.family]
    work = {job: commands(job, args) for job in jobs_of(families, args)}
    if args.dry_run:
        print_costs(work, args)
        return
    failed = [str(job.out) for job in run_all(work, args)]
    report(args.out, args.scale, families)
    check(not failed, f"{len(failed)} of {len(work)} runs failed: {', '.join(failed)}; "
          "the same command tries again")

def jobs_of(families: Sequence[str], args: Any) -> list[Job]:
    """A job for each member and seed; members with equal settings share one."""
    folder = folders(args.out, args.scale)
    jobs: dict[Path, Job] = {}
    for seed in range(args.seeds):
        for family in families:
            for member in FAMILIES[family]:
                out = folder[member] / f"seed_{seed}"
                jobs.setdefault(out, Job(member, seed, out))
    return list(jobs.values())

def training(job: Job, args: Any) -> list[str]:
    """What train.py is told of a job."""
    of_member = arguments(job.member, args.scale)
    return [*of_member, *args.settings, f"--seed={job.seed}", f"--out_dir={job.out}"]

def commands(job: Job, args: Any) -> dict[str, list[str]]:
    """The commands that a job still needs, by stage: train, probe."""
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

    wanted = args.only.split(",")
    experiments = [name for name in wanted if name not in probed.get("experiments", [])]
    tasks = probed.get("tasks", [])
    if set(args.tasks) <= set(tasks):
        tasks = []                               # nothing new
    else:
        tasks = list(dict.fromkeys([*tasks, *args.tasks]))     # probe.py scores all or none
    if experiments or tasks:
        todo["probe"] = probe_command(job, args, c.block_size, experiments, tasks)
    return todo

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

def print_costs(work: Work, args: Any) -> None:
    """A line per job, what it is and what its training takes; and the hours of all."""
    if args.scale == "paper":
        machine = "8 H100 at 40% MFU"
        rate = 8 * PEAK["H100"] * 0.4                                     # FLOP/s
    else:
        machine = "this machine"
        rate = peak_flops(torch.device("cpu"), torch.float32) / 3         # measured: about a third
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
             "save_interval", "keep_checkpoints"}
LOG_COLUMNS = ["val loss", "peak var."]      # of a table, from log.jsonl; the others are probe.py's

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

class Outcome(NamedTuple):
    """What a run came to."""
    scores: dict[str, float]                 # by column of a table
    curve: list[tuple[int, float]]           # see `variance_curve`

Runs = dict[str, list[Outcome]]              # of each member, what its seeds came to

def outcome(out: Path) -> Outcome | None:
    """What the run in a folder came to; None where it is not finished."""
    try:
        log = read_log(out)
        curve = variance_curve(log)
        losses = [line["val_loss"] for line in log if "val_loss" in line]
        found = {"val loss": losses[-1] if losses else math.nan,
                 "peak var.": max((variance for _, variance in curve), default=math.nan)}
        return Outcome(found | scores(read_probe(out / "ckpt.pt", out)), curve)
    except DAMAGED:
        return None

def strangers(c: TrainConfig, folder: Path) -> Iterator[str]:
    """A line for every run in a member's folder that has other settings than the member's, c."""
    for ckpt in sorted(folder.glob("seed_*/ckpt.pt")):
        names = differing(c, read_checkpoint(ckpt.parent).get("settings", {}))
        if names:
            yield (f"{ckpt.parent} is a run with other settings than its config's: "
                   f"{', '.join(names)}")

# ---- tables and figures --------------------------------------------------------------------------
def report(out: str | Path, scale: str, families: Sequence[str]) -> None:
    """Write and print the table and the figure of each family that has a finished run."""
    folder = folders(out, scale)
    found = [report_family(family, Path(out, scale), scale, folder) for family in families]
    check(any(found), f"no finished run in {out}/{scale}: "
          f"python recipe.py run depth --scale {scale}")

def report_family(family: str, out: Path, scale: str, folder: dict[str, Path]) -> bool:
    """Write FAMILY.md and FAMILY.png into `out` and print the table, if a run is finished: is one?

    folder: where the runs of each member are.
    """
    runs: Runs = {}
    missing = []
    for member in FAMILIES[family]:
        outcomes = [outcome(place) for place in sorted(folder[member].glob("seed_*"))]
        finished = [found for found in outcomes if found is not None]
        if finished:
            runs[member] = finished
        else:
            missing.append(member)
    if not runs:
        return False

    text = table(family, runs, scale)
    path = out / f"{family}.md"
    path.write_text(text + "\n")
    drawn = draw(family, runs, scale, path.with_suffix(".png"))
    print(f"\n{family}: {path}, {drawn}\n\n{text}")
    if missing:
        print(f"not finished: {', '.join(missing)}")
    for member in runs:
        for remark in strangers(config(member, scale), folder[member]):
            print(remark)
    sys.stdout.flush()
    return True

def table(family: str, runs: Runs, scale: str) -> str:
    """Markdown, a row per member: what was measured, and at the right what the paper reports."""
    columns = {"": [f"`{member}` {label(family, member, scale)}" for member in runs],
               "seeds": [str(len(seeds)) for seeds in runs.values()]}
    for name in [*LOG_COLUMNS, *score_names()]:
        if name != "loss":                   # of probe.py's few tokens; "val loss" says more
            columns[name] = [cell(mean, deviation) for mean, deviation in zip(*spread(runs, name))]
    for name in PAPER_COLUMNS:
        reported = [PAPER[family][member].get(name) for member in runs]
        columns[f"paper: {name}"] = ["" if x is None else f"{x:g}" for x in reported]

    filled = {name.replace("|", "\\|"): cells for name, cells in columns.items() if any(cells)}
    rows = [list(filled), ["---"] * len(filled), *zip(*filled.values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

def spread(runs: Runs, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Each member's mean and standard deviation over its seeds; nan where there is none."""
    means, deviations = [], []
    for seeds in runs.values():
        values = [seed.scores[column] for seed in seeds if column in seed.scores]
        means.append(statistics.mean(values) if values else math.nan)
        deviations.append(statistics.stdev(values) if len(values) > 1 else math.nan)
    return np.array(means), np.array(deviations)

def cell(mean: float, deviation: float) -> str:
    """Mean ± deviation, as "0.583 ± 0.118"; what is nan is left out."""
    digits = 3 if abs(mean) < 10 else 1
    return " ± ".join(f"{x:.{digits}f}" for x in (mean, deviation) if not math.isnan(x))

def draw(family: str, runs: Runs, scale: str, path: Path) -> str:
    """Save the figure of a family; says where it is, or what it takes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no figure: pip install matplotlib"
    figure(family, runs, scale).savefig(path, dpi=110)
    return str(path)

def figure(family: str, runs: Runs, scale: str) -> Any:
    """A matplotlib Figure: left the variance over training, right scores over the loss."""
    from matplotlib.figure import Figure
    labels = [label(family, member, scale).replace(" (paper", "\n(paper") for member in runs]
    width = max(15, 5 + len(runs))                    # so that labels have room
    fig = Figure(figsize=(width, 5), layout="constrained")
    fig.suptitle(f"{family}, {scale} scale")
    left, right = fig.subplots(1, 2)
    draw_variance(left, runs, labels)
    draw_bars(right, runs)
    right.set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize=8)
    marks = right.twinx()
    draw_scores(marks, family, runs)
    fig.legend(*left.get_legend_handles_labels(), loc="outside left upper", fontsize=8)
    fig.legend(*marks.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig

def draw_variance(ax: Any, runs: Runs, labels: Sequence[str]) -> None:
    """The last layer's variance by step, a colour per member; its further seeds are pale."""
    from matplotlib import colormaps
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    for color, text, seeds in zip(colors, labels, runs.values()):
        for k, seed in enumerate(seeds):
            steps = [step for step, _ in seed.curve]
            variances = [variance for _, variance in seed.curve]
            if k == 0:
                ax.plot(steps, variances, color=color, label=text)
            else:
                ax.plot(steps, variances, color=color, alpha=0.35)
    ax.set(title="Variance over training", xlabel="step", ylabel="variance of the last layer",
           yscale="log")

def draw_bars(ax: Any, runs: Runs) -> None:
    """A bar per member: the accuracy if all were scored on tasks, else the validation loss."""
    column, meaning = "val loss", "validation loss, nats a token"
    if all("accuracy" in seed.scores for seeds in runs.values() for seed in seeds):
        column, meaning = "accuracy", "accuracy"
    means, deviations = spread(runs, column)
    ax.bar(range(len(runs)), means, yerr=deviations, color="gainsboro", ecolor="gray", capsize=3)
    means, deviations = np.nan_to_num(means), np.nan_to_num(deviations)
    low, high = (means - deviations).min(), (means + deviations).max()
    ax.set(title="After training", ylabel=f"bars, cut below: {meaning}",
           ylim=(low * 0.95, high * 1.02 + 1e-9))

def draw_scores(ax: Any, family: str, runs: Runs) -> None:
    """A mark per member and score, with its deviation over seeds; hollow ones are the paper's."""
    places = range(len(runs))
    linestyle = "-" if is_sweep(family) else ""
    for column, mark in {"useful": "o", "rel.useful": "x", "causal": "s", "permuted": "^"}.items():
        means, deviations = spread(runs, column)
        line, *_ = ax.errorbar(places, means, deviations, marker=mark, linestyle=linestyle,
                               capsize=3, label=column.replace("rel.", "released: "))
        reported = [PAPER[family][member].get(column, math.nan) for member in runs]
        if not np.isnan(reported).all():
            ax.plot(places, reported, mark, color=line.get_color(), fillstyle="none", markersize=9,
                    label=f"{column}, paper")
    ax.set(ylabel="score", ylim=(0, None))

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
    if ckpt.name == "ckpt.pt":
        home = ckpt.parent
    elif ckpt.is_dir():                      # a Hugging Face folder
        home = ckpt
    else:
        home = ckpt.with_suffix("")
    settings = load_checkpoint(ckpt)["settings"]
    try:
        result = read_probe(ckpt, home)
        found = symptoms(result, read_log(home), ckpt)
        return "\n".join([f"{path}: {found[0]}", *found[1:], *remedies(result, settings)])
    except DAMAGED as e:
        raise UserError(
            f"{home}: probe.json is missing, old or in part, or it or log.jsonl is damaged ({e}): "
            f"python probe.py {ckpt}; a damaged log.jsonl must go") from e

def symptoms(result: dict[str, Any], log: Sequence[dict[str, Any]], ckpt: Path) -> list[str]:
    """How a model uses its depth, a line each."""
    ratios = OF_BLOCKS["affine"](result)
    lines = [f"{sum(ratio > USEFUL for ratio in ratios)} of {len(ratios)} blocks are useful",
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
    knobs = [name for name in LADDER if not taken(name, settings)]
    if not knobs:
        return ["next: every step of the recipe is taken"]
    variance = OF_BLOCKS["variance"](result)
    if "weight_decay" in knobs and variance[-1] >= 10 * variance[0]:
        knobs.remove("weight_decay")         # it acts on the variance itself: before all others
        knobs.insert(0, "weight_decay")
    first, *others = knobs
    return [f"next in the paper's ladder: {first}, here {settings.get(first)}; {LADDER[first]}",
            f"then: {', '.join(others) or 'nothing'}"]

def taken(name: str, settings: dict[str, Any]) -> bool:
    """Has a run with these settings gone the step of the ladder that turns the setting `name`?"""
    ladder = config("ladder_moe", "paper")
    if name == "block_size":
        return settings["block_size"] >= ladder.block_size
    if name == "weight_decay":               # what counts is rate x decay x steps
        names = ("learning_rate", "weight_decay", "max_steps")
        decayed = math.prod(settings.get(name, 0) for name in names)
        return decayed > 0.95 * math.prod(getattr(ladder, name) for name in names)
    if name == "n_kv_head":
        return settings["n_kv_head"] < settings["n_head"]
    return settings["n_experts"] > 0

# ---- the command line ----------------------------------------------------------------------------
def read_arguments() -> Any:
    """The command line; `settings` are those of train.py behind `run`."""
    parser = Parser(prog="recipe.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    on_disk = argparse.ArgumentParser(add_help=False)
    on_disk.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    on_disk.add_argument("--out", default="out/recipe",
                         help="where the runs are (default %(default)s)")

    add = commands.add_parser("run", help="train, probe and report a family",
                              parents=[on_disk]).add_argument
    add("family", choices=[*FAMILIES, "all"])
    add("--seeds", type=int, default=1, metavar="N", help="of every member, 0 to N - 1 (default 1)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--tasks", nargs="+", default=[], metavar="DIR",
        help="folders of OLMES tasks to score, see probe.py")
    add("--only", default=MEASURED, help="experiments of probe.py (default %(default)s)")
    add("--dry-run", action="store_true", help="print the runs, their cost and time")

    commands.add_parser("report", help="tables and figures from what is on disk", parents=[on_disk])

    add = commands.add_parser("advise", help="the paper's settings for your model").add_argument
    add("--n_layer", type=int, required=True, help="blocks")
    add("--params", type=float, required=True, help="active for a token, embeddings included")
    add("--tokens", type=float, required=True, help="to train on")
    add("--gpus", type=int, default=8, help="to train with (default 8)")
    add("--out", help="config file to write")

    add = commands.add_parser("diagnose", help="does a run use its depth?").add_argument
    add("paths", nargs="+", type=Path, help="folders of runs, or checkpoints")

    args, args.settings = parser.parse_known_args()
    if args.command == "run":
        check_run(args)
    else:
        check(not args.settings, f"unknown argument {args.settings[:1]}; see --help")
    return args

def check_run(args: Any) -> None:
    """UserError for what `run` cannot do."""
    check(args.seeds > 0 and args.jobs > 0, "--seeds and --jobs must be positive")
    names = {f.name for f in fields(TrainConfig)} - {"seed", "out_dir"}
    for k, given in enumerate(args.settings):
        is_value = k > 0 and not given.startswith("-")            # of --name before it
        name = given.lstrip("-").split("=")[0]
        is_setting = given.startswith("-") and name in names
        check(is_value or is_setting,
              f"{given}: after `run FAMILY` come what `recipe.py run --help` lists, --seeds and "
              "--out too, and other settings of train.py")
    check(set(args.only.split(",")) <= set(EXPERIMENTS),
          f"--only {args.only!r}: there are {','.join(EXPERIMENTS)}")
    check(all(Path(task).is_dir() for task in args.tasks),
          f"--tasks {' '.join(args.tasks)}: not all are folders")

def main() -> None:
    args = read_arguments()
    if args.command == "run":
        run_family(args)
    elif args.command == "report":
        report(args.out, args.scale, list(FAMILIES))
    elif args.command == "advise":
        advise(args)
    else:
        print("\n\n".join(diagnose(path) for path in args.paths))

if __name__ == "__main__":
    run(main)
