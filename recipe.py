"""The paper's experiments at laptop or paper size, their statistics, and the recipe at your size.

    python recipe.py run depth --seeds 2                 # train, probe and record a family of runs
    python recipe.py run ladder --scale paper --dry-run  # list what would run and what it costs
    python recipe.py report                              # make all tables and figures
    python recipe.py advise --n_layer 32 --params 1.2e9 --tokens 10e9 --out advised.py

configs/families.txt lists the families. A finished run is one line of configs/SCALE/results.jsonl.
A run that is recorded there is not repeated, so the same command continues after a stop. `run` and
`report` also take settings of train.py (--name=value), after their other arguments. These settings
change every run, and the lines of changed runs go to OUT/SCALE/results.jsonl.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Parser, load_checkpoint, run
from model import check
from probe import BELOW, COLORS, EXPERIMENTS, STYLE, USEFUL, make_folder, rank_correlation, scores
from train import PEAK, TrainConfig, bare, load_settings, plan, vocabulary

ROOT = Path(__file__).parent

# ---- the families --------------------------------------------------------------------------------
class Member(NamedTuple):
    """A model of a family. Its name is a config and optional settings: "gqa_16,norm=lns"."""
    baseline: str               # the member that it is compared with
    seeds: range                # the seeds that enter the numbers of its family
    label: str                  # its name in tables at laptop size

def read_families() -> dict[str, dict[str, Member]]:
    """Read configs/families.txt: the members of each family, by name."""
    families: dict[str, dict[str, Member]] = {}
    for row in (ROOT / "configs/families.txt").read_text("utf-8").splitlines()[1:]:
        family, name, baseline, seeds, label = row.split(maxsplit=4)
        first, _, last = seeds.partition("-")
        member = Member(baseline, range(int(first), int(last or first) + 1), label)
        families.setdefault(family, {})[name] = member
    return families

def read_reported() -> dict[str, dict[str, dict[str, float]]]:
    """The paper's numbers by family, member and column, from configs/paper/reported.txt."""
    header, *rows = (ROOT / "configs/paper/reported.txt").read_text("utf-8").splitlines()
    columns = header.split()[2:]
    numbers = {family: {name: {} for name in members} for family, members in FAMILIES.items()}
    for row in rows:
        family, name, *cells = row.split()                     # "-" where the paper has no number
        numbers[family][name] = {column: float(x) for column, x in zip(columns, cells, strict=True)
                                 if x != "-"}
    return numbers

FAMILIES = read_families()
PAPER = read_reported()

def arguments(member: str, scale: str) -> list[str]:
    """The arguments of train.py for a member."""
    name, *changes = member.split(",")
    return [str(ROOT / "configs" / scale / f"{name}.py"), *(f"--{change}" for change in changes)]

@cache
def config(member: str, scale: str, settings: tuple[str, ...] = ()) -> TrainConfig:
    """The settings of a member, changed by `settings`. out_dir is the same for all members."""
    return load_settings([*arguments(member, scale), *settings, "--out_dir=any"])[0]

def config_of(member: str, args: Any) -> TrainConfig:
    """The settings of a member, changed by the settings on the command line."""
    return config(member, args.scale, tuple(args.settings))

def label(family: str, member: str, scale: str) -> str:
    """A member's name in tables, with the paper's value where it differs: "L 16 (paper: 32)"."""
    return FAMILIES[family][member].label if scale == "laptop" else member

# ---- running -------------------------------------------------------------------------------------
# MEASURED: the experiments after training. BRIEFLY: those at step 0 and at the common lengths.
MEASURED = [name for name in EXPERIMENTS if EXPERIMENTS[name].scores or name == "sparsity"]
BRIEFLY = ("variance", "causal", "permutation", "usefulness", "removal", "jacobian")
TOKENS = 8192               # each laptop model is probed on this many tokens
# The models of the family "context" are also probed at these lengths, so that all of them see the
# same tokens at the same positions.
COMMON_LENGTHS = {16: 512, 64: 128}              # tokens per sequence: sequences

class Job(NamedTuple):
    """A run of one member with one seed, and its folder."""
    member: str
    seed: int
    out: Path

def run_family(args: Any) -> None:
    """Train, probe and record every run that has no row. A failed run does not stop the others."""
    rows = read_rows(args.results)
    jobs = [job for job in jobs_of(args) if not is_recorded(job, rows, args)]
    if args.dry_run:
        print_costs(jobs, args)
        return
    pool = ThreadPoolExecutor(args.jobs)
    try:
        finished = list(pool.map(lambda job: run_job(job, args), jobs))
    finally:
        pool.shutdown(cancel_futures=True)               # after Ctrl-C no other run starts
    failed = [str(job.out) for job, fine in zip(jobs, finished) if not fine]
    check(not failed, f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; "
          "run the same command to try again")
    print(f"the requested runs of {args.family} are recorded in {args.results}; "
          "next: python recipe.py report, with the same --scale, --results and settings")

def jobs_of(args: Any) -> list[Job]:
    """A job for each member and seed, family by family. Members with equal settings share a job."""
    families = list(FAMILIES) if args.family == "all" else [args.family]
    names = dict.fromkeys(name for members in FAMILIES.values() for name in members)
    jobs: dict[Path, Job] = {}
    for family in families:
        for k in range(min(args.seeds, 5)):
            for name, member in FAMILIES[family].items():
                c = config_of(name, args)
                first = next(other for other in names if config_of(other, args) == c)
                for seed in member.seeds[k:k + 1]:
                    out = Path(args.out, args.scale, first, f"seed_{seed}")
                    jobs.setdefault(out, Job(name, seed, out))
    return list(jobs.values())

def is_recorded(job: Job, rows: Sequence[Row], args: Any) -> bool:
    """Is there a row of this run? With --here, only a row from this kind of processor counts."""
    c = config_of(job.member, args)
    return any(row["seed"] == job.seed and is_run_of(c, row["settings"])
               and (not args.here or row["processor"] == processor()) for row in rows)

def run_job(job: Job, args: Any) -> bool:
    """Train, probe and record one run. Returns False if it failed or was stopped. The output
    of the commands is in output.txt in the folder of the run."""
    environment = dict(os.environ)
    if args.jobs > 1:       # with more threads than cores in total, a run takes ten times as long
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))

    job.out.mkdir(parents=True, exist_ok=True)
    print(f"{job.out}: training and probing", flush=True)
    steps = config_of(job.member, args).max_steps
    with open(job.out / "output.txt", "a", encoding="utf-8") as output:
        def done(commands: list[list[str]]) -> bool:
            return all(subprocess.run(command, stdout=output, stderr=output, env=environment,
                                      check=False).returncode == 0 for command in commands)

        train, start = train_commands(job, args)
        # train.py also ends with status 0 when Ctrl-C or SIGTERM stops it, so compare the step.
        fine = (done([train]) and load_checkpoint(job.out / "ckpt.pt")["step"] >= steps
                and done([start, *probe_commands(job, args)]))
    if not fine:
        print(f"{job.out}: stopped or failed, see output.txt", flush=True)
        return False
    append_row(args.results, row_of(job, args))
    print(f"{job.out}: recorded in {args.results}", flush=True)
    return True

def train_commands(job: Job, args: Any) -> list[list[str]]:
    """The two commands that train. They use every GPU, and resume an unfinished run.

    The second command makes the model of step 0. It trains for one step, at a learning rate that is
    too small to change any weight."""
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"]
    command += [str(ROOT / "train.py"), *arguments(job.member, args.scale), *args.settings,
                f"--seed={job.seed}", "--resume"]
    start = [f"--out_dir={job.out / 'start'}", "--max_steps=1", "--learning_rate=1e-30"]
    return [[*command, f"--out_dir={job.out}"], [*command, *start]]

def probe_commands(job: Job, args: Any) -> list[list[str]]:
    """The commands that measure a run: after training, at step 0, and at the common lengths."""
    c = config_of(job.member, args)
    samples = max(2, TOKENS // c.block_size) if args.scale == "laptop" else 100
    brief = ",".join(name for name in BRIEFLY if name in args.only.split(","))

    def command(ckpt: Path, only: str, samples: int, length: int, out: Path) -> list[str]:
        return [sys.executable, str(ROOT / "probe.py"), str(ckpt), f"--only={only}", "--remove=1",
                f"--samples={samples}", f"--length={min(length, 512)}", f"--out={out}"]

    ckpt, start = job.out / "ckpt.pt", job.out / "start"
    trained = command(ckpt, args.only, samples, c.block_size, job.out)
    if args.tasks:
        trained.append(f"--tasks={args.tasks}")
    commands = [trained, command(start / "ckpt.pt", brief, samples, c.block_size, start)]
    if c in [config_of(name, args) for name in FAMILIES["context"]]:
        commands += [command(ckpt, brief, sequences, length, job.out / f"at_{length}")
                     for length, sequences in COMMON_LENGTHS.items() if length <= c.block_size]
    return commands

def print_costs(jobs: Sequence[Job], args: Any) -> None:
    """Print the size and training time of every run without a row, then the total.

    The laptop rate, 28 GFLOP/s, was measured on one core of an AMD EPYC at width 64."""
    at_paper = args.scale == "paper"
    machine = "8 H100 at 40% MFU" if at_paper else "one core"
    rate = 8 * PEAK["H100"] * 0.4 if at_paper else 28e9                   # FLOP/s
    total = 0.0
    for job in jobs:
        c = config_of(job.member, args)
        model = bare(replace(c, vocab_size=vocabulary(c)))
        tokens = c.max_steps * c.tokens_per_step
        hours = model.flops_per_token() * tokens / rate / 3600
        total += hours
        print(f"{job.out}: {model.count_parameters()['active']:,} active parameters, "
              f"{tokens:,} tokens, {hours:.2f} h")
    print(f"{len(jobs)} runs to do: {total:.1f} h of training on {machine}; probing takes another "
          "third of this time")

# ---- results.jsonl: a row per run ----------------------------------------------------------------
# A row is a dict with these keys:
#   member, seed, settings (all but NO_MATTER), corpus (its checksum), torch, python, processor
#   scores: scores by column; start: scores before the first step; at_16, at_64: scores at the
#   common lengths; curve: variance of the last stream during training, as (step, variance)
#   probe, probe_start: values of each block, after training and before the first step
Row = dict[str, Any]
# Settings that should change a result only by rounding, and the seed (it has its own key).
NO_MATTER = {"vocab_size", "out_dir", "seed", "device", "dtype", "compile", "parallel",
             "recompute", "save_interval", "keep_checkpoints", "wandb"}
DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}

def is_run_of(c: TrainConfig, settings: dict[str, Any]) -> bool:
    """Does a row with these settings record a run of c? A setting that is missing in an old row had
    its default value."""
    return all(settings.get(name, DEFAULTS[name]) == value for name, value in asdict(c).items()
               if name not in NO_MATTER)

def read_rows(path: Path) -> list[Row]:
    """Read the rows of a results.jsonl. A file that does not exist has no rows."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    for row in rows:
        row["scores"] |= course(row["curve"])
    return rows

def append_row(path: Path, row: Row) -> None:
    """Add a row in a single write, because other jobs append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        f.write((json.dumps(row) + "\n").encode())

def row_of(job: Job, args: Any) -> Row:
    """Make the row of a finished run. Numbers keep five digits, and nan becomes null."""
    c = config_of(job.member, args)
    text = (job.out / "log.jsonl").read_text("utf-8")
    log = [json.loads(line) for line in text.splitlines()]
    trained, start = read_probe(job.out), read_probe(job.out / "start")
    saved = load_checkpoint(job.out / "ckpt.pt")
    curve = [(line["step"], line["variance"][-1]) for line in log if "variance" in line]
    maps = {name: trained[name] for name in MAPS if name in trained}
    row = {"member": job.member, "seed": job.seed,
           "settings": {name: x for name, x in asdict(c).items() if name not in NO_MATTER},
           "corpus": saved.get("corpus"),
           "torch": torch.__version__, "python": platform.python_version(),
           "processor": processor(),
           "scores": own_scores(c, log, trained, saved["model"]) | scores(trained),
           "curve": curve, "probe": block_values(trained) | maps,
           "start": scores(start), "probe_start": block_values(start)}
    for length in COMMON_LENGTHS:
        if (job.out / f"at_{length}").is_dir():
            row[f"at_{length}"] = scores(read_probe(job.out / f"at_{length}"))
    return json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.5g}"),
                      parse_constant=lambda name: None)

def read_probe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "probe.json").read_text("utf-8"))

def block_values(r: dict[str, Any]) -> dict[str, list[float]]:
    """Select the values of each block that a row keeps from a probe.json."""
    found = {name: r[name] for name in ("variance", "attn_variance", "ffn_variance",
                                        "block_influence") if name in r}
    if "usefulness" in r:
        found["affine"] = r["usefulness"]["ratio"]
    if "jacobian" in r:
        found["deviation"] = r["jacobian"]["deviation"]
    if "removal" in r:
        found["removal"] = r["removal"]["1"]
    if "sparsity" in r:
        found["effective_keys"] = r["sparsity"]["attention"]["effective_keys"]
    return found

def course(curve: Sequence[Sequence[float]]) -> dict[str, float]:
    """The peak of the last stream's variance during training, the step of the peak as a share of
    all steps, and the final variance as a share of the peak."""
    if not curve:
        return {}
    step, peak = max(curve, key=lambda point: (point[1], point[0]))
    last_step, last = curve[-1]
    return {"peak var.": peak, "peak at": step / last_step,
            "left of it": last / peak if peak else math.nan}

def own_scores(c: TrainConfig, log: Sequence[dict[str, Any]], r: dict[str, Any],
               weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scores of a run that are not among probe.py's: its losses, and measures of its sparsity.

    active FFN: the share of the FFN's weights that a token uses. key heads: key/value heads per
    query head. eff. keys: the share of the visible keys that a query effectively attends to.
    density: eff. keys x key heads; the paper does not give its formula. near zero: the share of the
    blocks' weights whose size is below a tenth of init_std.
    """
    matrices = [w for name, w in weights.items() if name.startswith("blocks.") and w.dim() > 1]
    small = sum((w.abs() < BELOW * c.init_std).sum().item() for w in matrices)
    found = {"key heads": c.n_kv_head / c.n_head, "active FFN": 1.0,
             "near zero": small / sum(w.numel() for w in matrices)}
    if c.n_experts:
        used = c.top_k * c.expert_hidden + c.shared_hidden
        found["active FFN"] = used / (c.n_experts * c.expert_hidden + c.shared_hidden)
    found["train loss"] = statistics.mean(line["loss"] for line in log[-100:])
    validations = [line["val_loss"] for line in log if "val_loss" in line]
    if validations:
        found["val loss"] = validations[-1]
    if "sparsity" in r:
        found["eff. keys"] = statistics.mean(r["sparsity"]["attention"]["effective_keys"])
        found["density"] = found["eff. keys"] * found["key heads"]
    return found

@cache
def processor() -> str:
    """The name of this machine's GPU, or of its CPU if it has no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

Runs = dict[str, list[Row]]                  # the rows of each member, one per seed and processor

def runs_of(family: str, rows: Sequence[Row], args: Any) -> Runs:
    """The rows of each member of a family: the newest row of each seed and kind of processor."""
    found = {}
    for name, member in FAMILIES[family].items():
        c = config_of(name, args)
        newest = {(row["seed"], row["processor"]): row for row in rows
                  if row["seed"] in member.seeds and is_run_of(c, row["settings"])}
        if newest:
            found[name] = [newest[key] for key in sorted(newest)]
    return found

# ---- statistics ----------------------------------------------------------------------------------
# Quantiles of Student's t for 1, 2, ... 9 degrees of freedom: 97.5% for intervals, 80% for power.
T_975 = [12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216]
T_80 = [1.37638, 1.06066, 0.97847, 0.94096, 0.91954, 0.9057, 0.89603, 0.88889, 0.8834]

class Estimate(NamedTuple):
    """A mean over seeds with its 95% t interval."""
    mean: float
    half: float                 # half the width of the interval; nan with one seed
    n: int                      # seeds

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def has_spread(self) -> bool:
        """Do the seeds differ? False with one seed. If all seeds agree, the interval has no width,
        which proves no precision: usefulness with 8 blocks, for example, is a multiple of 1/8."""
        return self.half > 1e-9

    @property
    def decided(self) -> bool:
        """Does the interval exclude 0? False without spread."""
        return self.has_spread and abs(self.mean) > self.half

def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the values and its interval. With one value, half the interval is nan."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if n else math.nan, math.nan, n)
    half = T_975[min(n, 10) - 2] * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.mean(values), half, n)

def detectable(e: Estimate) -> float:
    """The effect that the same number of seeds, with the same spread, detects with about 80% power.
    It is the standard error times the sum of the two t quantiles. nan without spread."""
    if not e.has_spread:
        return math.nan
    k = min(e.n, 10) - 2
    return e.half / T_975[k] * (T_975[k] + T_80[k])

def p_value(e: Estimate) -> float:
    """The p value of a two-sided t test of a mean against 0.

    With t = sqrt(nu) tan(u), Student's density is proportional to cos(u)^(nu - 1). The tail is
    summed at the midpoints of 10,000 intervals of u.
    """
    if not e.has_spread:
        return math.nan
    nu = e.n - 1
    t = abs(e.mean) / (e.half / T_975[min(e.n, 10) - 2])
    start = math.atan(t / math.sqrt(nu))
    width = (math.pi / 2 - start) / 10_000
    u = start + width * (np.arange(10_000) + 0.5)
    whole = math.sqrt(math.pi) * math.gamma(nu / 2) / math.gamma((nu + 1) / 2)
    return float(2 * width * (np.cos(u) ** (nu - 1)).sum() / whole)

LOGARITHMS = {"last var.", "rel.var.", "peak var."}    # these scores are compared by logarithms

def value(row: Row, score: str, part: str = "scores") -> float:
    """A score of a row, or the logarithm of a variance. It is nan if it was not measured."""
    x = row.get(part, {}).get(score)
    if x is None or score in LOGARITHMS and x <= 0:
        return math.nan
    return math.log(x) if score in LOGARITHMS else x

def by_seed(rows: Sequence[Row], score: str, part: str = "scores") -> dict[int, float]:
    """A score by seed. If a seed has rows from several kinds of processor, use the first."""
    found = {row["seed"]: value(row, score, part) for row in reversed(rows)}
    return {seed: x for seed, x in sorted(found.items()) if not math.isnan(x)}

def over_seeds(rows: Sequence[Row], score: str, part: str = "scores") -> Estimate:
    """The mean of a score over seeds."""
    return estimate(list(by_seed(rows, score, part).values()))

def paired(rows: Sequence[Row], base: Sequence[Row], score: str) -> dict[int, float]:
    """For each seed, a score minus the score of the base on the same kind of processor."""
    of_base = {(row["seed"], row["processor"]): value(row, score) for row in base}
    found = {}
    for row in reversed(rows):
        difference = value(row, score) - of_base.get((row["seed"], row["processor"]), math.nan)
        if not math.isnan(difference):
            found[row["seed"]] = difference
    return dict(sorted(found.items()))

# ---- the claims, and the rule that judges them ---------------------------------------------------
# For each score, the column of the paper's numbers that gives its direction. "useful layers" is
# usefulness x L. The paper does not report the scores in INFERRED, so they have a direction but no
# size.
PAPERS = {"last var.": "variance", "ln Vn/V1": "variance",
          "useful": "useful", "log ratio": "useful", "ratio late": "useful", "ratio 1+": "useful",
          "trend use": "useful", "ratio sum": "useful layers",
          "causal": "causal", "causal 1+": "causal",
          "permuted": "permuted", "perm. 1+": "permuted",
          "val loss": "ppl", "accuracy": "accuracy"}
INFERRED = {"ln Vn/V1", "ratio late", "trend use", "ratio 1+", "ratio sum", "causal 1+",
            "perm. 1+"}
KNOB = ("last var.", "ln Vn/V1", "useful", "log ratio", "ratio late", "trend use", "val loss")
COMPARED = {
    "depth": ("last var.", "useful", "log ratio", "ratio 1+", "ratio sum", "causal", "causal 1+",
              "permuted", "perm. 1+", "val loss"),
    "weight_decay": KNOB, "context": KNOB, "gqa": KNOB, "moe": KNOB,
    "ladder": ("last var.", "log ratio", "useful", "val loss", "accuracy"),
    "norms": KNOB, "init": KNOB, "width": KNOB, "long": KNOB}
# What the paper claims about blocks 1 to n - 1 of a single model, by score. A trend is the rank
# correlation of a block's index with its log affine ratio, its influence or its |J-I|/d.
PREMISES = {"trend use": "(a) later blocks are used less: trend of the log affine ratio < 0",
            "trend infl": "(b) later blocks turn the stream less: trend of the influence < 0",
            "trend J-I": "(c) later blocks are closer to the identity: trend of |J-I|/d < 0",
            "ln Vn/V1": "(d) variance accumulates after block 0: ln(Var h_n / Var h_1) > ln n"}
TRENDS = ("trend use", "trend infl", "trend J-I")

# The table in the README: at most eight claims, each with the comparison or premise that tests it.
HEADLINES = [
    ("Later blocks are used less (rank correlation within 16 layers)", "depth", "depth_32",
     "trend use"),
    ("Deeper: the last variance grows", "depth", "depth_32", "last var."),
    ("Deeper: a smaller share of blocks is useful", "depth", "depth_32", "useful"),
    ("No weight decay: more variance", "weight_decay", "weight_decay_0", "last var."),
    ("Short context: more variance", "context", "context_256", "last var."),
    ("GQA: more useful blocks", "gqa", "gqa_16", "useful"),
    ("MoE: more useful blocks", "moe", "moe_1b", "useful"),
    ("The whole recipe: more useful blocks", "ladder", "ladder_moe", "useful")]

class Comparison(NamedTuple):
    """A member against its baseline in one score."""
    family: str
    member: str
    base: str
    score: str
    effect: Estimate            # of the paired differences
    paper: float                # the paper's difference; nan if it is not known
    direction: int              # sign of the paper's difference; 2 if it is not known
    size: Estimate | None       # our (effect / depth effect) / the paper's
    verdict: str                # "" if the direction is not known

VERDICTS = ["reproduced", "reproduced, smaller", "contradicted", "no effect of the paper's size",
            "inconclusive"]

def judge(effect: Estimate, direction: int, size: Estimate | None) -> str:
    """The verdict on a comparison or premise.

    reproduced: the whole interval is on the paper's side of 0
    reproduced, smaller: in addition, the size is known and its interval is below 1
    contradicted: the whole interval is on the other side of 0
    no effect of the paper's size: the interval contains 0, and that of the size is below 1
    inconclusive: everything else, also where a score changed by the same amount in every seed
    no direction: the paper's two numbers are equal
    """
    if direction not in (1, -1):
        return "no direction" if direction == 0 else ""
    if not effect.has_spread:
        return "inconclusive"
    smaller = size is not None and size.high < 1
    if effect.decided:
        if (effect.mean > 0) != (direction > 0):
            return "contradicted"
        return "reproduced, smaller" if smaller else "reproduced"
    return "no effect of the paper's size" if smaller else "inconclusive"

def compare(found: dict[str, Runs], family: str, member: str, score: str,
            base: str = "") -> Comparison | None:
    """Compare a member with its baseline, or with `base`. None if there is nothing to compare."""
    runs = found.get(family, {})
    base = base or FAMILIES[family][member].baseline
    differences = paired(runs.get(member, []), runs.get(base, []), score)
    if member == base or not differences:
        return None
    effect = estimate(list(differences.values()))
    paper, direction = paper_difference(family, member, base, score)
    size = relative_size(found, family, member, base, score, differences, paper)
    return Comparison(family, member, base, score, effect, paper, direction, size,
                      judge(effect, direction, size))

def comparisons(found: dict[str, Runs]) -> list[Comparison]:
    """Every comparison of COMPARED whose runs exist, and the whole recipe against its start."""
    cases = [(family, member, score, "") for family in COMPARED for member in FAMILIES[family]
             for score in COMPARED[family]]
    cases += [("ladder", "ladder_moe", score, "ladder_32") for score in COMPARED["ladder"]]
    compared = [compare(found, *case) for case in cases]
    return [c for c in compared if c is not None]

def paper_difference(family: str, member: str, base: str, score: str) -> tuple[float, int]:
    """The paper's number for a member minus its number for the base, and the difference's sign.

    The difference is in our units: logarithms of variances, and losses instead of perplexities. A
    variance of "about 0" gives a sign but no difference.
    """
    column = PAPERS.get(score, "")
    counted = column == "useful layers"
    numbers = [PAPER[family][name].get("useful" if counted else column) for name in (base, member)]
    if None in numbers:
        return math.nan, 2
    before, after = numbers
    if counted:
        before *= config(base, "paper").n_layer
        after *= config(member, "paper").n_layer
    direction = (after > before) - (after < before)
    if column in ("variance", "ppl"):
        if min(before, after) <= 0:
            return math.nan, direction
        return math.log(after / before), direction
    return after - before, direction

def relative_size(found: dict[str, Runs], family: str, member: str, base: str, score: str,
                  differences: dict[int, float], paper: float) -> Estimate | None:
    """The size of an effect: our (effect / depth effect) / the paper's. Jackknife over seeds.

    The depth effect is depth_32 minus depth_16. For the loss, the size is our relative difference
    divided by the paper's. None if the paper's difference is not known, is "about 0" or rounds
    to less than one layer; if the interval of our depth effect contains 0; and if the ratio has no
    spread, as for the depth effect itself.
    """
    if score in INFERRED or math.isnan(paper) or paper == 0 or len(differences) < 2:
        return None
    if score == "val loss":
        losses = by_seed(found[family][base], score)
        e = estimate([x / losses[seed] for seed, x in differences.items()])
        of_paper = paper / math.log(PAPER[family][base]["ppl"])
        return Estimate(e.mean / of_paper, abs(e.half / of_paper), e.n)
    if PAPERS[score] == "useful":
        blocks = min(config(name, "paper").n_layer for name in (base, member))
        if round(abs(paper) * blocks) < 1:
            return None
    runs = found.get("depth", {})
    depth = paired(runs.get("depth_32", []), runs.get("depth_16", []), score)
    paper_depth, _ = paper_difference("depth", "depth_32", "depth_16", score)
    if math.isnan(paper_depth) or len(depth) < 2:
        return None
    if not estimate(list(depth.values())).decided:
        return None
    return jackknife(differences, depth, paper / paper_depth)

def jackknife(above: dict[int, float], below: dict[int, float], unit: float) -> Estimate | None:
    """mean(above) / mean(below) / unit over the seeds that both have, with its 95% interval. None
    where leaving out a seed never changes the ratio: an interval without width means nothing."""
    seeds = [seed for seed in above if seed in below]
    if len(seeds) < 2:
        return None

    def ratio(some: Sequence[int]) -> float:
        return sum(above[s] for s in some) / sum(below[s] for s in some) / unit

    without_one = [ratio([s for s in seeds if s != left_out]) for left_out in seeds]
    n = len(seeds)
    error = (n - 1) / math.sqrt(n) * statistics.stdev(without_one)
    if error < 1e-9:
        return None
    return Estimate(ratio(seeds), T_975[min(n, 10) - 2] * error, n)

def holm(compared: Sequence[Comparison]) -> list[Comparison]:
    """The decided comparisons that Holm's correction keeps, over all comparisons with a direction.
    The correction limits the probability of one or more false verdicts to 5%."""
    tests = sorted((p_value(c.effect), k) for k, c in enumerate(compared)
                   if c.direction in (1, -1) and c.effect.has_spread)
    kept = []
    for number, (p, k) in enumerate(tests):
        if p > 0.05 / (len(tests) - number):
            break
        kept.append(compared[k])
    return kept

def premise(runs: Runs, member: str, score: str) -> tuple[dict[int, float], Estimate, str] | None:
    """The value of a premise in each seed, its mean, and the verdict on the mean."""
    values = by_seed(runs.get(member, []), score)
    if not values:
        return None
    e = estimate(list(values.values()))
    if score == "ln Vn/V1":                      # ln n: every block adds the same variance
        null = math.log(layers(runs[member]))
        return values, e, judge(Estimate(e.mean - null, e.half, e.n), 1, None)
    return values, e, judge(e, -1, None)

def layers(rows: Sequence[Row]) -> int:
    return rows[0]["settings"]["n_layer"]

# ---- the mechanism -------------------------------------------------------------------------------
# Rank correlations over configurations, with the sign that the paper expects: a small density (much
# sparsity) goes with a small variance, and a small variance with much use. A correlation shows no
# cause, because the settings in which configurations differ may change both scores.
SPREAD = ("last var.", "ln Vn/V1")
SIGNS = {"density": 1, "eff. keys": 1, "key heads": 1, "active FFN": 1, "near zero": -1}
QUESTIONS = {(x, y): sign for x, sign in SIGNS.items() for y in SPREAD}
QUESTIONS |= {(x, y): -1 for x in SPREAD for y in ("log ratio", "ratio late")}
TURNED = ("depth", "weight_decay", "context", "gqa", "moe", "ladder")

def configurations(found: dict[str, Runs]) -> Runs:
    """The configurations of the families that change one of the paper's settings, each once. The
    controls and the rates are left out, because they change other settings."""
    together: Runs = {}
    for family in TURNED:
        for name, rows in found.get(family, {}).items():
            settings = [other[0]["settings"] for other in together.values()]
            if rows[0]["settings"] not in settings:
                together[name] = rows
    return together

def correlation(group: Runs, x: str, y: str) -> tuple[float, float, float, int] | None:
    """The rank correlation of two scores over configurations, its 95% interval, and the number of
    configurations. A score is the mean over seeds. None if the correlation is not defined, or with
    fewer than eight configurations: if few points are monotone, every bootstrap sample of them is
    monotone too, and the interval has no width."""
    pairs = [(over_seeds(rows, x).mean, over_seeds(rows, y).mean) for rows in group.values()]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    rho = rank_correlation(*zip(*pairs)) if len(pairs) >= 8 else math.nan
    return None if math.isnan(rho) else (rho, *bootstrap(*zip(*pairs)), len(pairs))

def bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of a rank correlation, from 10,000 draws with replacement. A draw
    in which a score has a single value shows no correlation: it counts as 0."""
    chosen = np.random.default_rng(0).integers(len(x), size=(10_000, len(x)))
    ranks = []
    for values in (x, y):
        z = np.array(values)[chosen]                              # (draws, configurations)
        below = (z[:, :, None] > z[:, None, :]).sum(-1)           # equal values share a mean rank
        equal = (z[:, :, None] == z[:, None, :]).sum(-1)
        rank = below + equal / 2
        ranks.append(rank - rank.mean(-1, keepdims=True))
    a, b = ranks
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    low, high = np.quantile((a * b).sum(-1) / np.maximum(norms, 1e-9), [0.025, 0.975])
    return float(low), float(high)

# ---- the report ----------------------------------------------------------------------------------
def report(args: Any) -> None:
    """Write every table and figure to OUT/SCALE, from results.jsonl. Print the main tables."""
    rows = read_rows(args.results)
    found = {family: runs_of(family, rows, args) for family in FAMILIES}
    found = {family: runs for family, runs in found.items()
             if has_begun(family, runs, found["depth"])}
    check(found, f"no runs to compare in {args.results}: start with "
                 f"python recipe.py run depth --scale {args.scale}")
    used = [row for runs in found.values() for seeds in runs.values() for row in seeds]
    corpora = {row["corpus"] for row in used}
    check(len(corpora) == 1, f"{args.results}: its runs saw {len(corpora)} different corpora. "
                             "data/python changes with the versions of Python and torch")
    out = Path(args.out, args.scale)
    make_folder(out, "--out")
    compared = comparisons(found)
    written = tables(found, compared, args.scale)
    for name, text in written.items():
        (out / f"{name}.md").write_text(text + "\n", "utf-8")
    print(written["headlines"], written["verdicts"], written["mechanism"], sep="\n\n")
    print(f"\ntables in {out}: {', '.join(written)}")
    print(draw_all(found, compared, args.scale, out))

def has_begun(family: str, runs: Runs, depth: Runs) -> bool:
    """Does a family have runs to compare, beyond those that it shares with the depth family?"""
    shared = [rows[0]["settings"] for rows in depth.values()]
    has_own = any(rows[0]["settings"] not in shared for rows in runs.values())
    return len(runs) > 1 and (family == "depth" or has_own)

# The columns of the tables of scores. A family that is not in SHOWN has those of KNOB.
SHOWN = {"init": ("last var.", "ln Vn/V1", "log ratio", *TRENDS, "val loss"),
         "width": ("last var.", "ln Vn/V1", "log ratio", *TRENDS, "val loss"),
         "long": ("last var.", "ln Vn/V1", "useful", "log ratio", "trend use", "trend J-I",
                  "val loss"),
         "ladder": ("last var.", "ln Vn/V1", "useful", "log ratio", "ratio late", "val loss"),
         "context": ("last var.", "ln Vn/V1", "useful", "log ratio", "trend use", "eff. keys",
                     "val loss"),
         "rates": ("last var.", "ln Vn/V1", "useful", *TRENDS, "val loss")}
AT_LENGTH = ("loss", "last var.", "ln Vn/V1", "useful", "log ratio", "ratio late", "trend use")

def tables(found: dict[str, Runs], compared: Sequence[Comparison], scale: str) -> dict[str, str]:
    """Every table, by the name of its file."""
    depth = found.get("depth", {})
    written = {"headlines": headlines(found), "verdicts": verdict_counts(found, compared),
               "mechanism": mechanism(found)}
    for family, runs in found.items():
        named = {f"{label(family, name, scale)} ({len(by_seed(rows, 'loss'))})": rows
                 for name, rows in runs.items()}
        written[family] = score_table("member (seeds)", named, SHOWN.get(family, KNOB))
        of_family = [c for c in compared if c.family == family]
        make = comparison_table if any(PAPER[family].values()) else difference_table
        if family in COMPARED:
            written[f"{family}_verdicts"] = make(of_family, scale)
    for score in PREMISES:
        name = score.replace(" ", "_").replace("/", "").replace("-", "")
        written[f"premise_{name}"] = premises(depth, scale, score)
    if depth:
        named = {label("depth", name, scale): rows for name, rows in depth.items()}
        steps = [compare(found, "depth", name, score, base) for base, name in pairwise(depth)
                 for score in KNOB]
        written |= {"depth_steps": difference_table([c for c in steps if c], scale),
                    "course": course_table(depth, scale),
                    "released": score_table("depth", named, RELEASED),
                    "processors": processors(depth)}
    for length in COMMON_LENGTHS if "context" in found else ():
        named = {label("context", name, scale): rows for name, rows in found["context"].items()}
        written[f"context_{length}"] = score_table(f"first {length} tokens", named, AT_LENGTH,
                                                   f"at_{length}")
    return written

def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)

def short(x: float, sign: str = "") -> str:
    """A number with three digits, or "-" for nan."""
    if math.isnan(x):
        return "-"
    x = x if abs(x) > 1e-12 else 0.0                   # neither "-0" nor a rounding error
    return f"{x:{sign},.0f}" if abs(x) >= 100 else f"{x:{sign}.3g}"

def with_interval(e: Estimate, score: str = "", sign: str = "") -> str:
    """Format as "0.12 (0.1 to 0.14)", or "0.12" without spread. Undo the logarithm of LOGARITHMS:
    "times 2 (1.9 to 2.1)"."""
    numbers = [e.mean, e.low, e.high]
    factor = "times " if score in LOGARITHMS and sign else ""
    if score in LOGARITHMS:
        numbers, sign = [math.exp(x) for x in numbers], ""
    mean, low, high = (short(x, sign) for x in numbers)
    return f"{factor}{mean} ({low} to {high})" if e.has_spread else f"{factor}{mean}"

def mean_of(e: Estimate, score: str) -> str:
    """Format as "0.12 ± 0.02" (half the width of the interval), a variance as `with_interval`."""
    if score in LOGARITHMS or math.isnan(e.mean):
        return with_interval(e, score)
    mean = f"{e.mean:.3f}" if score.endswith("loss") else short(e.mean)
    return mean if math.isnan(e.half) else f"{mean} ± {e.half:.2g}"

def score_table(first: str, named: Runs, shown: Sequence[str], part: str = "scores") -> str:
    """A row per name: the mean of each score over seeds, with its interval."""
    rows = [[name, *(mean_of(over_seeds(seeds, score, part), score) for score in shown)]
            for name, seeds in named.items()]
    return table([first, *shown], rows)

def headlines(found: dict[str, Runs]) -> str:
    """The table of the README: at most eight claims, with our number and the paper's."""
    rows = []
    for claim, family, member, score in HEADLINES:
        if score == "trend use":
            judged = premise(found.get(family, {}), member, score)
            if judged:
                rows.append([claim, judged[2], with_interval(judged[1]), "below 0"])
            continue
        c = compare(found, family, member, score, "ladder_32" if family == "ladder" else "")
        if c:
            rows.append([claim, c.verdict, with_interval(c.effect, score, "+"), paper_cell(c)])
    return table(["claim", "verdict", "here (95% interval)", "paper"], rows)

def verdict_counts(found: dict[str, Runs], compared: Sequence[Comparison]) -> str:
    """For each family of the paper, the number of recorded runs and of comparisons per verdict.
    Then the verdicts that Holm's correction keeps, counted by family."""
    rows = []
    for family, members in FAMILIES.items():
        if not any(PAPER[family].values()):
            continue
        planned = sum(len(member.seeds) for member in members.values())
        done = sum(len({row["seed"] for row in seeds}) for seeds in found.get(family, {}).values())
        verdicts = [c.verdict for c in compared if c.family == family]
        rows.append([family, f"{done} of {planned}",
                     *(str(verdicts.count(kind)) for kind in VERDICTS)])
    judged = [c for c in compared if c.direction in (1, -1)]
    decided, kept = sum(c.effect.decided for c in judged), holm(compared)
    kept_of = Counter(c.family for c in kept)
    listed = ", ".join(f"{count} of {family}" for family, count in kept_of.items())
    against = [sum(c.verdict == "contradicted" for c in some) for some in (kept, judged)]
    return (table(["family", "runs", *VERDICTS], rows) + f"\n\nOf {len(judged)} comparisons, "
            f"{decided} have an interval that excludes 0. Holm's correction keeps {len(kept)} of "
            f"these ({listed or 'none'}), and {against[0]} of the {against[1]} contradicted ones.")

def versus(c: Comparison, scale: str) -> str:
    return f"{label(c.family, c.member, scale)} vs {label(c.family, c.base, scale)}"

def paper_cell(c: Comparison) -> str:
    """The paper's difference, in our units, as a cell of a table."""
    if c.score in INFERRED or c.direction == 2:
        return {1: "more", -1: "less", 0: "equal", 2: "-"}[c.direction]
    if math.isnan(c.paper):
        return "to about 0"
    if c.score in LOGARITHMS:
        return f"times {short(math.exp(c.paper))}"
    return short(c.paper, "+")

def comparison_table(compared: Sequence[Comparison], scale: str) -> str:
    """A row per comparison: our effect, the paper's effect, the size, the detectable effect and the
    verdict. The name of a pair of members stands only in its first row."""
    rows, last = [], ""
    for c in compared:
        name, least = versus(c, scale), short(detectable(c.effect))
        if c.score in LOGARITHMS and least != "-":
            least = f"times {short(math.exp(detectable(c.effect)))}"
        rows.append(["" if name == last else name, c.score, with_interval(c.effect, c.score, "+"),
                     paper_cell(c), with_interval(c.size) if c.size else "-", least,
                     c.verdict or "-"])
        last = name
    return table(["comparison", "score", "here (95% interval)", "paper", "size (paper's = 1)",
                  "detects (80%)", "verdict"], rows)

def difference_table(compared: Sequence[Comparison], scale: str) -> str:
    """A row per pair of members and a column per score. Without the paper's numbers."""
    effects: dict[str, dict[str, str]] = {}
    for c in compared:
        cell = with_interval(c.effect, c.score, "+")
        effects.setdefault(versus(c, scale), {})[c.score] = cell
    return table(["comparison", *KNOB], [[name, *(cells.get(score, "-") for score in KNOB)]
                                         for name, cells in effects.items()])

def premises(depth: Runs, scale: str, score: str) -> str:
    """A row per depth: the value of each seed, their mean, step 0, what training adds, the effect
    that the seeds detect, and the verdict."""
    rows = []
    for name, seeds in depth.items():
        judged = premise(depth, name, score)
        if judged is None:
            continue
        values, e, verdict = judged
        start = by_seed(seeds, score, "start")
        added = [x - start[seed] for seed, x in values.items() if seed in start]
        first = label("depth", name, scale)
        if score == "ln Vn/V1":
            first += f", ln n = {math.log(layers(seeds)):.2f}"
        rows.append([first, " ".join(short(x) for x in values.values()), with_interval(e),
                     short(statistics.mean(start.values())),
                     with_interval(estimate(added), "", "+"), short(detectable(e)), verdict])
    return table([PREMISES[score], "each seed", "mean (95%)", "step 0", "training adds",
                  "detects (80%)", "verdict"], rows)

def course_table(depth: Runs, scale: str) -> str:
    """The variance of the last stream during training, here and in the paper: its peak, the time of
    the peak, and the share of the peak that is left at the end."""
    rows = []
    for name, seeds in depth.items():
        paper = PAPER["depth"][name]
        ours = [mean_of(over_seeds(seeds, score), score)
                for score in ("peak var.", "peak at", "left of it")]
        rows.append([label("depth", name, scale), *ours, f"{paper['peak']:,.0f}", "0.13",
                     short(paper["variance"] / paper["peak"])])
    return table(["depth", "peak", "at share of steps", "left at the end", "paper: peak", "at",
                  "left"], rows)

# Each score as the paper defines it, followed by the score as the released scripts compute it.
RELEASED = ("causal", "rel.causal", "useful", "rel.useful", "last var.", "rel.var.")

def mechanism(found: dict[str, Runs]) -> str:
    """Rank correlations over all configurations, and over those with 8 layers of width 64. For each
    of the two groups, a list of the correlations that support the paper, and of the others."""
    together = configurations(found)
    alike = {name: rows for name, rows in together.items()
             if layers(rows) == 8 and rows[0]["settings"]["n_embd"] == 64}
    groups = {"all configurations": together, "8 layers, width 64": alike}
    rows = []
    sides: dict[tuple[str, int], list[str]] = {}
    for (x, y), sign in QUESTIONS.items():
        cells = [f"{x} with {y}", "above 0" if sign > 0 else "below 0"]
        for name, group in groups.items():
            measured = correlation(group, x, y)
            if measured is None:
                cells.append("-")
                continue
            rho, low, high, n = measured
            cells.append(f"{rho:+.2f} ({low:+.2f} to {high:+.2f}; {n})")
            sides.setdefault((name, sign * ((low > 0) - (high < 0))), []).append(cells[0])
        rows.append(cells)
    written = [table(["rank correlation", "paper", *(f"{name} (95%; number)" for name in groups)],
                     rows)]
    for name in dict.fromkeys(name for name, _ in sides):
        of = {side: ", ".join(sides.get((name, side), ["none"])) for side in (1, -1)}
        written.append(f"{name[0].upper()}{name[1:]}. With the paper's sign: {of[1]}; with the "
                       f"opposite sign: {of[-1]}; the others are undecided.")
    return "\n\n".join(written)

def processors(depth: Runs) -> str:
    """The runs that were computed on several kinds of processor, one row for each kind."""
    repeated = {f"{name} seed {row['seed']}, {row['processor']}": [row]
                for name, rows in depth.items() for row in rows
                if sum(other["seed"] == row["seed"] for other in rows) > 1}
    if not repeated:
        return "No run of the depth family was repeated on another kind of processor."
    return score_table("run", repeated, ("last var.", "ln Vn/V1", "log ratio", "val loss"))

# ---- figures -------------------------------------------------------------------------------------
# For each score, the title of its panel and the label of its axis.
NAMES = {"last var.": ("Variance at the end", "variance of the last stream"),
         "ln Vn/V1": ("Growth of the variance", "ln(Var h_n / Var h_1)"),
         "useful": ("Useful blocks", "share of all blocks"),
         "log ratio": ("Use of a block", "mean log affine ratio"),
         "val loss": ("Loss", "validation loss (nats per byte)"),
         "density": ("Density", "density: eff. keys x key heads"),
         "trend use": ("Use over depth", "trend of the log affine ratio"),
         "trend infl": ("Influence over depth", "trend of the influence"),
         "trend J-I": ("Distance from I over depth", "trend of |J - I| / d")}
TITLES = {"weight_decay": "Weight decay", "context": "Context length T",
          "gqa": "Grouped queries: G query heads share a key/value head",
          "moe": "Mixture of experts at equal active FLOPs", "ladder": "The recipe, step by step",
          "norms": "GQA and MoE with other norms", "init": "Initialisation: its scale and its form",
          "width": "The effect of depth at two widths",
          "long": "The effect of depth after 2,000 and after 8,000 steps"}
NORM = r"$\|J-I\|_F\,/\,d$"

def draw_all(found: dict[str, Runs], compared: Sequence[Comparison], scale: str, out: Path) -> str:
    """Draw every figure whose runs exist, as PNG. Returns a line to print."""
    try:
        import matplotlib
    except ImportError:
        return "no figures: pip install matplotlib"
    # ladder_16 repeats the depth effect. Its row would hide the others by its scale.
    of_family = {family: [c for c in compared if c.family == family and c.member != "ladder_16"]
                 for family in TITLES}
    with matplotlib.rc_context(STYLE):
        figures = {family: draw_family(family, some, scale)
                   for family, some in of_family.items() if some}
        if "depth" in found:
            rows = [row for seeds in found["depth"].values() for row in seeds]
            kept = set.intersection(*(set(row["probe"]) for row in rows))
            figures |= {name: draw(found["depth"]) for name, (draw, needed) in OF_DEPTH.items()
                        if needed <= kept}
            figures["mechanism"] = draw_mechanism(found)
        if "rates" in found:
            figures["rates"] = draw_rates(found["rates"])
        for name, fig in figures.items():
            fig.savefig(out / f"{name}.png", dpi=150)
    return f"figures in {out}: {', '.join(figures)}"

def panels(across: int, height: float, title: str, down: int = 1,
           **shared: Any) -> tuple[Any, list[Any]]:
    """A figure 9 inches wide, and its axes, row by row."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, down * height + 0.4), layout="constrained")
    axes = list(fig.subplots(down, across, squeeze=False, **shared).flat)
    fig.suptitle(title, fontsize=11)
    return fig, axes

def log_scale(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers: 30, not 3 x 10^1. Call it after plotting."""
    from matplotlib.ticker import LogLocator, MaxNLocator
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    if high / low < 3:
        axis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")

def legend_below(fig: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, each label once."""
    marks = {name: mark for ax in axes for mark, name in zip(*ax.get_legend_handles_labels())}
    fig.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=7)

def block_means(rows: Sequence[Row], name: str) -> np.ndarray:
    """The mean over seeds of the values of each block; for variances, the geometric mean."""
    of_seeds = np.array([row["probe"][name] for row in rows], dtype=float)[:, -layers(rows):]
    return np.exp(np.log(of_seeds).mean(0)) if "variance" in name else of_seeds.mean(0)

def block_lines(ax: Any, runs: Runs, name: str, first: int = 0, relative: bool = False) -> None:
    """Draw a line per depth, from block `first` on. relative: the x axis is the share of blocks."""
    for color, rows in zip(COLORS, runs.values()):
        n = layers(rows)
        x = np.arange(1, n + 1) / n if relative else np.arange(n)
        ax.plot(x[first:], block_means(rows, name)[first:], color=color, marker="o", markersize=3,
                label=f"{n} layers")
    ax.set_xlabel("depth (share of the blocks passed)" if relative else "block")

def draw_depth(runs: Runs) -> Any:
    """The curse of depth in three panels: variance and |J - I| over relative depth, and use over
    the number of layers, with a ring per seed."""
    fig, axes = panels(3, 2.9, "The curse of depth: variance, distance from the identity, use")
    block_lines(axes[0], runs, "variance", relative=True)
    axes[0].set(title="The stream's variance grows", ylabel="variance after the block")
    log_scale(axes[0].yaxis)
    block_lines(axes[1], runs, "deviation", first=1, relative=True)
    axes[1].set(title="How far is a block from the identity?", ymargin=0.2,
                ylabel=f"{NORM}, block 0 left out")
    axes[1].set_ylim(bottom=0)
    depths = [layers(rows) for rows in runs.values()]
    twin = axes[2].twinx()
    twin.spines["right"].set_visible(True)
    for ax, score, color in ((axes[2], "log ratio", COLORS[5]), (twin, "useful", COLORS[6])):
        values = [list(by_seed(rows, score).values()) for rows in runs.values()]
        ax.plot(depths, [statistics.mean(x) for x in values], color=color)
        for n, of_seeds in zip(depths, values):
            ax.plot([n] * len(of_seeds), of_seeds, "o", color=color, fillstyle="none",
                    markersize=4)
        ax.tick_params(axis="y", colors=color)
        ax.set_ylim(bottom=0)
    axes[2].set_ylabel("mean log affine ratio", color=COLORS[5])
    twin.set_ylabel("share of useful blocks", color=COLORS[6])
    axes[2].set(title="How much is a block used?", xlabel="layers", xticks=depths)
    legend_below(fig, axes[:1])
    return fig

def draw_blocks(runs: Runs) -> Any:
    """The values of each block, in four panels: what attention and FFN add, |J - I|, and use."""
    shown = {"attn_variance": ("What attention adds", "variance", 0),
             "ffn_variance": ("What the FFN adds", "variance", 0),
             "deviation": ("Distance from the identity, block 0 left out", NORM, 1),
             "affine": ("Use: an affine map in the block's place", "loss with the map / loss", 0)}
    fig, axes = panels(2, 2.5, "Block by block, for each depth", down=2)
    for ax, (name, (title, unit, first)) in zip(axes, shown.items()):
        block_lines(ax, runs, name, first)
        ax.set(title=title, ylabel=unit)
        if "variance" in name:
            log_scale(ax.yaxis)
    axes[3].axhline(USEFUL, color="gray", linewidth=1, linestyle=":",
                    label=f"useful above {USEFUL}")
    axes[2].set_ylim(bottom=0)
    legend_below(fig, axes)
    return fig

MAPS = {"causal": "Causal score: how much does the later block's update change if the earlier one "
                  "is skipped?",
        "permutation": "Permutation score: how much does the loss change if the two blocks swap "
                       "places?"}

def draw_maps(runs: Runs, name: str) -> Any:
    """A heat map per depth, the mean over seeds."""
    from matplotlib.colors import LogNorm
    maps = [np.mean([np.array(row["probe"][name], dtype=float) for row in rows], axis=0)
            for rows in runs.values()]
    maps = [np.where(np.triu(x, 1) > 0, x, np.nan) for x in maps]
    norm = LogNorm(min(np.nanmin(x) for x in maps), max(np.nanmax(x) for x in maps))
    fig, axes = panels(len(maps), 2.1, MAPS[name])
    for ax, x, rows in zip(axes, maps, runs.values()):
        image = ax.imshow(x, norm=norm)
        ax.set(title=f"{layers(rows)} layers", xlabel="later block", ylabel="earlier block")
        ax.locator_params(integer=True, nbins=5)
    bar = fig.colorbar(image, ax=axes, label="score", shrink=0.8)
    log_scale(bar.ax.yaxis)
    return fig

# The figures of the depth family, and the values of each block that they need.
OF_DEPTH = {"depth": (draw_depth, {"variance", "deviation", "affine"}),
            "depth_blocks": (draw_blocks, {"attn_variance", "ffn_variance", "deviation", "affine"}),
            **{f"depth_{name}": (partial(draw_maps, name=name), {name}) for name in MAPS}}

# The label of each score's axis in the figure of a family.
EFFECTS = {"last var.": "ln(variance / the baseline's)", "ln Vn/V1": "difference of the growths",
           "useful": "difference of the shares", "trend use": "difference of the trends",
           "log ratio": "difference of the log ratios",
           "val loss": "ln(perplexity / the baseline's)"}
# Scores whose largest effect would hide the other intervals on a linear axis. The paper's largest
# decay, for example, multiplies the perplexity by 50.
WIDE = {"weight_decay": "val loss", "context": "last var.", "ladder": "last var."}

def draw_family(family: str, compared: Sequence[Comparison], scale: str) -> Any:
    """A row per comparison: our effect with its interval, and a diamond for the paper's effect."""
    shown = ["last var.", "useful", "log ratio", "val loss"]
    if family == "init":                 # it changes the last variance directly
        shown = ["ln Vn/V1", "trend use", "log ratio", "val loss"]
    shown = [score for score in shown if score in COMPARED[family]]
    names = list(dict.fromkeys(versus(c, scale) for c in compared))
    fig, axes = panels(len(shown), 1.1 + 0.4 * len(names), TITLES[family], sharey=True)
    axes[0].set_yticks(range(len(names)), [name.replace(" vs ", "\nvs ") for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for ax, score in zip(axes, shown):
        for c in compared:
            if c.score != score:
                continue
            place = names.index(versus(c, scale))
            if c.effect.has_spread:
                ax.errorbar(c.effect.mean, place, xerr=c.effect.half, fmt="o", color=COLORS[0],
                            label="here, 95% interval (it may be within the dot)")
            else:
                ax.plot(c.effect.mean, place, "o", color=COLORS[0], fillstyle="none",
                        label="here, one seed or equal seeds")
            if score != "log ratio" and not math.isnan(c.paper):
                ax.plot(c.paper, place + 0.25, "D", color=COLORS[1], fillstyle="none",
                        label="the paper")
        ax.axvline(0, color="black", linewidth=0.5)
        ax.set(title=NAMES[score][0], xlabel=EFFECTS[score])
        ax.locator_params(axis="x", nbins=4)
        if score == WIDE.get(family):
            ax.set_xscale("symlog", linthresh=0.1)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_xlabel(f"{EFFECTS[score]},\nlogarithmic beyond 0.1")
    legend_below(fig, axes)
    return fig

def draw_rates(runs: Runs) -> Any:
    """When is there a curse? Three trends and the loss, over learning rate / init_std."""
    fig, axes = panels(4, 2.8, "Do later blocks do less? Yes if a trend is below 0")
    lines: dict[tuple[int, float], list[Row]] = {}
    for rows in runs.values():
        c = rows[0]["settings"]
        lines.setdefault((c["n_layer"], c["init_std"]), []).append(rows[0])
    colors = dict(zip(sorted({std for _, std in lines}), COLORS))
    dashes = dict(zip(sorted({n for n, _ in lines}), ("--", "-")))
    for ax, score in zip(axes, (*TRENDS, "val loss")):
        for (n, std), rows in sorted(lines.items()):
            points = sorted((row["settings"]["learning_rate"] / std, value(row, score))
                            for row in rows)
            ax.plot(*zip(*points), color=colors[std], linestyle=dashes[n], marker="o",
                    markersize=4, label=f"{n} layers, init_std {std}")
        ax.axvline(0.02, color="gray", linestyle=":", linewidth=1, label="the paper's 0.02")
        if score in TRENDS:
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set_ylim(-1.05, 1.05)
        ax.set(title=NAMES[score][0], ylabel=NAMES[score][1], xlabel="learning rate / init_std")
        log_scale(ax.xaxis)
    legend_below(fig, axes)
    return fig

def draw_mechanism(found: dict[str, Runs]) -> Any:
    """A dot per configuration, coloured by family."""
    pairs = (("density", "last var."), ("density", "ln Vn/V1"), ("last var.", "log ratio"),
             ("ln Vn/V1", "log ratio"))
    fig, axes = panels(4, 2.8, "Density and variance, variance and use: a dot per configuration")
    together = configurations(found)
    for ax, (x, y) in zip(axes, pairs):
        for member, rows in together.items():
            family = next(family for family in TURNED if member in FAMILIES[family])
            means = [over_seeds(rows, score).mean for score in (x, y)]
            means = [math.exp(m) if score in LOGARITHMS else m for score, m in zip((x, y), means)]
            ax.plot(*means, "o", color=COLORS[TURNED.index(family)], markersize=4,
                    label=family.replace("_", " "))
        ax.set(xlabel=NAMES[x][1], ylabel=NAMES[y][1])
        for score, axis in ((x, ax.xaxis), (y, ax.yaxis)):
            if score in LOGARITHMS:
                log_scale(axis)
    legend_below(fig, axes)
    return fig

# ---- the recipe at another size ------------------------------------------------------------------
def advise(args: Any) -> None:
    """Print the recipe at another size, the evidence for it, and the cost of a run. Write a config
    if --out is given."""
    check(not args.out or not Path(args.out).exists(),
          f"--out {args.out} exists: choose another name")
    c = advised(args.n_layer, args.params, args.tokens, args.gpus)
    values = {f.name: getattr(c, f.name) for f in fields(c) if getattr(c, f.name) != f.default}
    lines = [*sources(), *(f"{name} = {x!r}" for name, x in values.items())]
    print(*lines, "", sep="\n", flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", "utf-8")
        print(f"# torchrun --nproc-per-node={args.gpus} train.py {args.out}\n", flush=True)
    print(textwrap.indent(plan(c, args.gpus, 0.4), "# "))

def advised(n_layer: int, params: float, tokens: float, gpus: int) -> TrainConfig:
    """The recipe with n_layer blocks and about `params` active parameters, for `tokens` tokens.

    The effect of weight decay depends on rate x decay x steps. The rate is the same, so decay x
    steps is kept at its value in the ladder. So is init_std x sqrt(width), although the paper has
    init_std 0.02 at every width.
    """
    ladder = config("ladder_moe", "paper")
    n_embd = advised_width(ladder, n_layer, params)
    n_head = max(2, 2 * round(n_embd * ladder.n_head / ladder.n_embd / 2))    # even, because G = 2
    step = math.lcm(8, 2 * n_head)      # RoPE: even head size; grouped_mm: multiple of 8
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
        init_std=float(f"{ladder.init_std * math.sqrt(ladder.n_embd / n_embd):.3g}"),
        warmup_steps=min(ladder.warmup_steps, max_steps // 4),
        weight_decay=float(f"{weight_decay:.3g}"), out_dir="")

def advised_width(ladder: TrainConfig, n_layer: int, params: float) -> int:
    """The width at which n_layer of the ladder's blocks have about `params` active parameters.

    All widths, including the experts', are proportional to n_embd. The number of parameters is
    therefore a n_embd^2 + b n_embd, a quadratic equation for n_embd.
    """
    a = n_layer * (3 + 3 * ladder.top_k)                          # attention with G = 2, experts
    b = 2 * ladder.vocab_size + n_layer * (ladder.n_experts + 2)  # embedding, head, routers, norms
    width = (math.sqrt(b * b + 4 * a * params) - b) / (2 * a)
    return max(32, 32 * round(width / 32))

def sources() -> list[str]:
    """Comments for an advised config: the paper's gain and our verdict for each step."""
    args = argparse.Namespace(scale="laptop", settings=[])
    rows = read_rows(ROOT / "configs/laptop/results.jsonl")
    found = {family: runs_of(family, rows, args) for family in ("depth", "ladder")}
    lines = ["# The paper's models have 12 to 32 blocks, are 768 to 2,048 wide, and saw 10 billion",
             "# tokens. Anything else is extrapolated. weight_decay x max_steps and",
             "# init_std x sqrt(n_embd) are those of configs/paper/ladder_moe.py."]
    for name, member in FAMILIES["ladder"].items():
        old, new = PAPER["ladder"][member.baseline], PAPER["ladder"][name]
        if name in ("ladder_16", "ladder_32"):
            continue
        lines.append(f"# {name} after {member.baseline}, paper: accuracy {old['accuracy']} to "
                     f"{new['accuracy']}, usefulness {old['useful']} to {new['useful']}")
        judged = [compare(found, "ladder", name, score) for score in ("useful", "log ratio")]
        lines += [f"#   laptop, {c.score}: {with_interval(c.effect, c.score, '+')}, {c.verdict}"
                  for c in judged if c] or ["#   laptop: no runs yet"]
    return lines

# ---- the command line ----------------------------------------------------------------------------
def read_arguments() -> Any:
    """Read the command line. args.settings: settings of train.py that follow `run` or `report`."""
    parser = Parser(prog="recipe.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    on_disk = argparse.ArgumentParser(add_help=False)
    on_disk.add_argument("--scale", choices=("laptop", "paper"), default="laptop",
                         help="size of the models (default %(default)s)")
    on_disk.add_argument("--out", default="out/recipe", metavar="DIR",
                         help="folder of runs, tables and figures (default %(default)s)")
    on_disk.add_argument("--results", metavar="FILE", type=Path,
                         help="file of the rows (default configs/SCALE/results.jsonl; with your "
                              "own settings OUT/SCALE/results.jsonl)")

    add = commands.add_parser("run", help="train, probe and record a family",
                              parents=[on_disk]).add_argument
    add("family", choices=[*FAMILIES, "all"], metavar="FAMILY",
        help=f"{', '.join(FAMILIES)} or all")
    add("--seeds", type=int, default=1, metavar="N",
        help="run the first N seeds of each family (default 1)")
    add("--jobs", type=int, default=1, metavar="N",
        help="do N runs at a time, which share the cores (default 1)")
    add("--tasks", default="", help="tasks of lm-evaluation-harness to score, as in probe.py")
    add("--only", default=",".join(MEASURED), metavar="NAMES",
        help="experiments of probe.py (default: sparsity and all that have a score)")
    add("--here", action="store_true",
        help="repeat the runs that were recorded on another kind of processor")
    add("--dry-run", action="store_true", help="list the runs to do and their cost")

    commands.add_parser("report", help="make the tables and figures from results.jsonl",
                        parents=[on_disk])

    add = commands.add_parser("advise", help="print the recipe at another size").add_argument
    add("--n_layer", type=int, required=True, help="number of blocks")
    add("--params", type=float, required=True,
        help="parameters active per token, embeddings included")
    add("--tokens", type=float, required=True, help="training tokens")
    add("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    add("--out", metavar="FILE", help="config file to write")

    args, args.settings = parser.parse_known_args()
    if args.command == "advise":
        check(not args.settings, f"unknown argument {args.settings[:1]}; see --help")
        return args
    for word in args.settings:
        name = word.removeprefix("--").partition("=")[0]
        check("=" in word and name in DEFAULTS and name not in ("seed", "out_dir"),
              f"{word}: neither an option of `recipe.py {args.command}` nor a setting of train.py "
              "(--name=value) that it leaves to you")
    if args.results is None:
        own = f"configs/{args.scale}/results.jsonl"
        args.results = Path(args.out, args.scale, "results.jsonl") if args.settings else ROOT / own
    return args

def main() -> None:
    args = read_arguments()
    {"run": run_family, "report": report, "advise": advise}[args.command](args)

if __name__ == "__main__":
    run(main)
