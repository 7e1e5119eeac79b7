"""The paper's experiments and its rule of thumb: run, put beside the paper's numbers, and applied to a model of yours.

    python recipe.py run depth --seeds 2                  # train and probe every member of a family; resumable
    python recipe.py run ladder --scale paper --dry-run   # what would run at the paper's size, what it costs
    python recipe.py report                               # tables and figures from what is on disk
    python recipe.py advise --n_layer 32 --params 1.2e9 --tokens 10e9 --out advised.py    # the paper's settings for it
    python recipe.py diagnose out/gqa_deep                # does this run use its depth, and what would help?

A member of a family is a file of configs/laptop/ or configs/paper/, perhaps with a setting changed ("gqa_16,norm=lns").
Members with equal settings are one run. Settings of train.py at the end of `run` change all members.
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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import torch

from model import Parser, UserError, check, load_checkpoint, run
from probe import EXPERIMENTS, SCORES, USEFUL, remarks, score_table, scores
from train import PEAK, TrainConfig, bare, load_settings, peak_flops, plan

ROOT = Path(__file__).parent
PAPER = (ROOT / "configs/paper/reported.txt").read_text().splitlines()     # a row per family and member, - is unknown
# Not in the paper: does each cure still help on top of LayerNorm Scaling or Peri-LN?
CURES = "dense_1b weight_decay_0 context_4096 gqa_16 moe_1b".split()
MEASURED = "variance,causal,permutation,usefulness,released,removal,jacobian"
# Settings that change how a run is computed and not what it is; the seed is in the folder's name.
NO_MATTER = "vocab_size out_dir seed device dtype compile parallel recompute save_interval keep_checkpoints".split()
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)      # what reading a result can raise
RUNNING: set[subprocess.Popen] = set()
# What each setting of the recipe rests on: the paper's ladder, downstream accuracy and usefulness.
LADDER = {"block_size": "T = 4096: accuracy 39.5 -> 40.0, usefulness 0.53 -> 0.59; with 8192 39.5 and 0.53",
          "weight_decay": "0.3: accuracy 40.0 -> 41.4, usefulness 0.59 -> 0.63; 0.6 gives 41.0, 1.0 gives 38.5. What "
                          "counts is rate x decay x steps; the ladder's rate 4e-4 and 4,768 steps are our guess",
          "n_kv_head": "G = 2: accuracy 41.4 -> 42.1, usefulness 0.63 -> 0.66",
          "n_experts": "64 experts, top 8: accuracy 42.1 -> 44.1, usefulness 0.66 -> 0.75"}
IDLE = 0.02      # a block whose output has a cosine above 0.98 with its input is near the identity: our choice
Runs = dict[str, list[dict[str, Any]]]      # of each member, what its seeds came to

def families() -> dict[str, dict[str, dict[str, float]]]:
    """The members of each family in order, and what the paper reports of each, by column."""
    out: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for family, member, *values in map(str.split, PAPER[1:]):
        out[family][member] = {column: float(x) for column, x in zip(PAPER[0].split()[2:], values) if x != "-"}
    out["norms"] = {cure + norm: {} for cure in CURES for norm in ("", ",norm=lns", ",norm=peri")}
    return dict(out)

# ---- running ---------------------------------------------------------------------------------------------------------
def arguments(member: str, scale: str) -> list[str]:
    """What train.py is told about a member."""
    name, *changes = member.split(",")
    return [str(ROOT / "configs" / scale / f"{name}.py"), *(f"--{change}" for change in changes)]

def config(member: str, scale: str) -> TrainConfig:
    return load_settings([*arguments(member, scale), "--out_dir=any"])[0]

def folders(out: str, scale: str) -> dict[str, Path]:
    """Where each member's runs are: in the folder of the first member with the same settings."""
    first: dict[str, Path] = {}
    return {member: first.setdefault(str(config(member, scale)), Path(out, scale, member))
            for members in families().values() for member in members}

def differing(c: TrainConfig, settings: dict[str, Any]) -> list[str]:
    """The settings in which a run that was trained with `settings` is another one than c."""
    return [name for name, value in asdict(c).items() if settings.get(name, value) != value and name not in NO_MATTER]

def read_probe(ckpt: Path, folder: Path) -> dict[str, Any]:
    """The probe.json in a folder; one of DAMAGED where it is not there, not whole or older than the checkpoint."""
    path = folder / "probe.json"
    if ckpt.is_file() and path.stat().st_mtime < ckpt.stat().st_mtime:
        raise ValueError("it is older than the checkpoint")
    return json.loads(path.read_text())

def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, none where there is none; the last may be cut, if a machine stopped then."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]

def commands(member: str, seed: int, out: Path, args: Any) -> tuple[TrainConfig, dict[str, list[str]]]:
    """The settings of a run, and the commands that it still needs, by stage: train, probe."""
    given = [*arguments(member, args.scale), *args.settings, f"--seed={seed}", f"--out_dir={out}"]
    c, todo, saved, ran = load_settings(given)[0], {}, {}, {}
    with contextlib.suppress(UserError):                    # none there, or a damaged one: train.py deals with either
        saved = load_checkpoint(out / "ckpt.pt")
    other = differing(c, saved.get("settings", {}))
    if other or saved.get("step") != c.max_steps:
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"] * (torch.cuda.device_count() > 1)
        resume = [] if other else ["--resume"]              # else train.py puts aside what is there
        todo["train"] = [sys.executable, *many, str(ROOT / "train.py"), *given, *resume]
    else:
        with contextlib.suppress(*DAMAGED):
            ran = read_probe(out / "ckpt.pt", out)["run"]
    done, tasks = [*ran.get("experiments", ())], [*ran.get("tasks", ())]
    if not {*args.only.split(","), *args.tasks} <= {*done, *tasks}:       # all of it anew: probe.json is written whole
        only, tasks = ([*dict.fromkeys((*a, *b))] for a, b in ((done, args.only.split(",")), (tasks, args.tasks)))
        # At laptop size 8,192 tokens whatever the context is: 64 sequences of 128.
        samples = 100 if args.scale == "paper" else max(2, 8192 // c.block_size)
        todo["probe"] = [sys.executable, str(ROOT / "probe.py"), str(out / "ckpt.pt"), f"--samples={samples}",
                         f"--only={','.join(only)}" + ",tasks" * bool(tasks), *(["--tasks", *tasks] if tasks else [])]
    return c, todo

def cost(out: Path, c: TrainConfig, todo: dict[str, list[str]], rate: float) -> float:
    """Print what a run takes at `rate` FLOP/s; returns its hours of training."""
    model, tokens = bare(replace(c, vocab_size=c.vocab_size or 320)), c.max_steps * c.tokens_per_step
    flops = model.flops_per_token() * tokens
    hours = flops / rate / 3600 if "train" in todo else 0.0
    print(f"{out}: {model.count_parameters()['active']:,} active parameters, {tokens:,} tokens, {flops:.2g} FLOPs, "
          f"{hours:.2f} h; to do: {', '.join(todo) or 'nothing'}")
    return hours

def run_family(args: Any) -> None:
    """Train and probe what is not on disk yet; a run that fails does not stop the others."""
    folder, chosen = folders(args.out, args.scale), [*families()] if args.family == "all" else [args.family]
    members = [member for family in chosen for member in families()[family]]
    places = {folder[m] / f"seed_{seed}": (m, seed) for seed in range(args.seeds) for m in members}
    runs = {out: commands(*run, out, args) for out, run in places.items()}
    if args.dry_run:
        # At laptop size a CPU reaches about a third of its matrix product's rate.
        rate = 8 * PEAK["H100"] * 0.4 if args.scale == "paper" else peak_flops(torch.device("cpu"), torch.float32) / 3
        hours = sum(cost(out, *of_run, rate) for out, of_run in runs.items())
        return print(f"{hours:.1f} h of training on {'8 H100 at 40% MFU' if args.scale == 'paper' else 'this machine'},"
                     " one run at a time; probing takes a quarter as long, tasks come on top")
    # Runs side by side must not ask for more threads than there are cores: that slows them all tenfold.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if args.jobs > 1 else {}

    def one(out: Path) -> bool:
        for stage, command in runs[out][1].items():
            out.mkdir(parents=True, exist_ok=True)
            print(f"{out}: {stage}", flush=True)
            with open(out / f"{stage}.txt", "w") as said:
                process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | threads)
                RUNNING.add(process)
                failed = process.wait()
                RUNNING.discard(process)
            if failed or stage in commands(*places[out], out, args)[1]:     # train.py that gets a SIGTERM ends with 0
                print(f"{out}: {stage} failed or was stopped, see {said.name}", flush=True)
                return False
        return True

    def stop(*_: Any) -> None:
        """As Ctrl-C, which reaches them by itself: train.py saves and stops, and no other run begins."""
        for process in RUNNING:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [str(out) for out, fine in zip(runs, pool.map(one, runs)) if not fine]
    report(args.out, args.scale, chosen)
    check(not failed, f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command tries again")

# ---- tables and figures ----------------------------------------------------------------------------------------------
def measured(out: Path) -> dict[str, Any]:
    """What a run came to, by column, and its last layer's variance by step; {} where it is not finished."""
    try:
        log = read_log(out)
        losses = [x["val_loss"] for x in log if "val_loss" in x] or [math.nan]
        curve = [(x["step"], x["variance"][-1]) for x in log if "variance" in x]
        peak = max((variance for _, variance in curve), default=math.nan)
        return {"val loss": losses[-1], "peak var.": peak, **scores(read_probe(out / "ckpt.pt", out)), "curve": curve}
    except DAMAGED:
        return {}

def spread(runs: Runs, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Each member's mean and standard deviation over its seeds; nan where there is none."""
    values = [[r[column] for r in seeds if column in r] for seeds in runs.values()]
    return (np.array([statistics.mean(x) if x else math.nan for x in values]),
            np.array([statistics.stdev(x) if len(x) > 1 else math.nan for x in values]))

def table(runs: Runs, paper: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per member, what was measured (± standard deviation over seeds) and what the paper reports."""
    def cell(x: float, deviation: float) -> str:
        return " ± ".join(f"{y:.{3 if abs(x) < 10 else 1}f}" for y in (x, deviation) if not math.isnan(y))

    columns = {"": [f"`{member}`" for member in runs], "seeds": [str(len(seeds)) for seeds in runs.values()]}
    columns |= {name: list(map(cell, *spread(runs, name))) for name in ("val loss", "peak var.", *SCORES)
                if name != "loss"}
    for name in PAPER[0].split()[2:]:
        columns[f"paper: {name}"] = [f"{paper[m][name]:g}" if name in paper[m] else "" for m in runs]
    columns = {name.replace("|", "\\|"): cells for name, cells in columns.items() if any(cells)}
    rows = [columns, ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

def figure(runs: Runs, paper: dict[str, dict[str, float]], path: Path) -> str:
    """Left the last layer's variance over training; right the scores, the paper's hollow, over accuracy or loss."""
    try:
        from matplotlib import colormaps, figure
    except ImportError:
        return "no figure: pip install matplotlib"
    fig, places = figure.Figure(figsize=(15, 5), layout="constrained"), np.arange(len(runs))
    left, bars = fig.subplots(1, 2)
    for color, (member, seeds) in zip(colormaps["viridis"](np.linspace(0, 0.9, len(runs))), runs.items()):
        for k, r in enumerate(seeds):
            left.plot(*zip(*r["curve"]), color=color, alpha=0.35 if k else 1, label=None if k else member)
    left.set(xlabel="step", ylabel="variance of the last layer", yscale="log", title="Variance over training")
    scored = all("accuracy" in r for seeds in runs.values() for r in seeds)
    means, deviations = spread(runs, "accuracy" if scored else "val loss")
    bars.bar(places, means, yerr=deviations, color="gainsboro", ecolor="gray", capsize=3)
    low, high = (np.nan_to_num(means) + sign * np.nan_to_num(deviations) for sign in (-1, 1))
    bars.set(ylabel=f"bars, cut below: {'accuracy' if scored else 'validation loss, nats a token'}",
             title="After training", ylim=(low.min() * 0.95, high.max() * 1.02 + 1e-9))
    bars.set_xticks(places, runs, rotation=35, ha="right", fontsize=8)
    marks, joined = bars.twinx(), "-" if path.stem in ("depth", "weight_decay", "context", "gqa") else ""
    for column, mark in {"useful": "o", "rel.useful": "x", "causal": "s", "permuted": "^"}.items():
        means, deviations = spread(runs, column)
        label = column.replace("rel.", "released: ")
        line = marks.errorbar(places, means, deviations, marker=mark, linestyle=joined, capsize=3, label=label)[0]
        theirs = [paper[member].get(column, math.nan) for member in runs]
        if not np.isnan(theirs).all():
            marks.plot(places, theirs, mark, color=line.get_color(), fillstyle="none", ms=9, label=f"{column}, paper")
    marks.set(ylabel="score", ylim=(0, None))
    fig.legend(*left.get_legend_handles_labels(), loc="outside left upper", fontsize=8)
    fig.legend(*marks.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=110)
    return str(path)

def strangers(c: TrainConfig, folder: Path) -> Iterator[str]:
    """A line for every run in a member's folder that has other settings than the member's, c."""
    for ckpt in sorted(folder.glob("seed_*/ckpt.pt")):
        with contextlib.suppress(UserError):
            if names := differing(c, load_checkpoint(ckpt)["settings"]):
                yield f"\n{ckpt.parent} is a run with other settings than its config's: {', '.join(names)}"

def report(out: str, scale: str, chosen: Sequence[str]) -> None:
    """Write FAMILY.md and FAMILY.png for each chosen family that has a finished run, and print the tables."""
    folder, found = folders(out, scale), False
    for family, paper in ((name, families()[name]) for name in chosen):
        runs = {m: [r for seed in sorted(folder[m].glob("seed_*")) if (r := measured(seed))] for m in paper}
        missing, runs = [m for m in runs if not runs[m]], {member: seeds for member, seeds in runs.items() if seeds}
        if runs:
            path, text, found = Path(out, scale, f"{family}.md"), table(runs, paper), True
            path.write_text(text + "\n")
            print(f"\n{family}: {path}, {figure(runs, paper, path.with_suffix('.png'))}\n\n{text}"
                  + f"\nnot finished: {', '.join(missing)}" * bool(missing)
                  + "".join(remark for m in runs for remark in strangers(config(m, scale), folder[m])), flush=True)
    check(found, f"no finished run in {out}/{scale}: python recipe.py run depth --scale {scale}")

# ---- the rule of thumb -----------------------------------------------------------------------------------------------
def advise(args: Any) -> None:
    """Print the paper's recipe at another size: why each knob, where it extrapolates, what it takes; write a config.

    --params counts what is active for a token, embeddings included. The recipe's experts are as wide as the stream, so
    the width solves a quadratic. What weight decay does goes with decay x steps, so that product is the ladder's.
    """
    check(0 < args.n_layer <= 1000 and 1e5 <= args.params <= 1e13 and 1e6 <= args.tokens <= 1e16,
          "--n_layer must be 1 to 1000, --params 1e5 to 1e13, --tokens 1e6 to 1e16")
    check(0 < args.gpus <= args.tokens / 1e5, f"--gpus {args.gpus}: 1 or more, with 1e5 or more of the --tokens each")
    check(not args.out or not Path(args.out).exists(), f"--out {args.out} exists: choose another name")
    c = config("ladder_moe", "paper")
    T = c.block_size
    a = args.n_layer * (3 + 3 * c.top_k)                                  # times d^2: attention with G = 2, experts
    b = 2 * c.vocab_size + args.n_layer * (c.n_experts + 2)               # times d: embedding, head, routers, norms
    n_embd = max(32, 32 * round((math.sqrt(b * b + 4 * a * args.params) - b) / (2 * a) / 32))
    n_head = 2 * max(1, round(n_embd / c.head_dim / 2))                   # even, about as wide as the ladder's
    while T > 128 and T * args.gpus * 1000 > args.tokens:                 # at least 1,000 steps, else shorter contexts
        T //= 2
    per_step = T * args.gpus * max(1, round(min(c.tokens_per_step, args.tokens / c.max_steps) / (T * args.gpus)))
    steps = max(1, round(args.tokens / per_step))
    new = replace(c, n_layer=args.n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_head // 2,
                  head_dim=2 * round(n_embd / n_head / 2), ffn_hidden=0, expert_hidden=n_embd, block_size=T,
                  batch_size=1, tokens_per_step=per_step, max_steps=steps, warmup_steps=min(c.warmup_steps, steps // 4),
                  weight_decay=float(f"{c.weight_decay * c.max_steps / steps:.3g}"), out_dir="")
    params = bare(new).count_parameters()["active"]
    lines = [f"# {name} = {getattr(new, name)}: in the paper {why}" for name, why in LADDER.items()]
    for name, here, ladder, low, high in (
            ("n_layer", args.n_layer, 32, 12, 32), ("n_embd", n_embd, 1120, 768, 2048),
            ("active parameters", params, 1.2e9, 4e8, 1.3e9), ("tokens", args.tokens, 1e10, 1e10, 1e10),
            ("block_size", T, 4096, 256, 8192), ("weight_decay", new.weight_decay, 0.3, 0, 3)):
        said = "" if 0.95 * low <= here <= 1.05 * high else f": EXTRAPOLATES, the paper has {low:.4g} to {high:.4g}"
        lines.append(f"# {name} {here:.4g} is {here / ladder:.3g} times the ladder's" + said)
    if not 0.9 < params / args.params < 1.1:
        lines.append(f"# {args.params:.4g} were asked for: with {c.vocab_size} tokens in the vocabulary and "
                     f"{c.n_experts} experts a layer no width comes nearer")
    lines += [f"{f.name} = {getattr(new, f.name)!r}" for f in fields(new) if getattr(new, f.name) != f.default]
    print(*lines, "", sep="\n", flush=True)
    if args.out:
        try:
            Path(args.out).write_text("\n".join(lines) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {args.out} ({e.strerror}): choose another --out") from e
        print(f"torchrun --nproc-per-node={args.gpus} train.py {args.out}\n", flush=True)
    print(plan(new, args.gpus, 0.4))

def diagnose(path: Path) -> str:
    """Does a run use its depth, what could go, what next? From its checkpoint's settings, log.jsonl and probe.json."""
    ckpt = path / "ckpt.pt" if (path / "ckpt.pt").exists() else path
    home = ckpt.parent if ckpt.name == "ckpt.pt" else ckpt if ckpt.is_dir() else ckpt.with_suffix("")
    c = load_checkpoint(ckpt)["settings"]
    try:
        r, log = read_probe(ckpt, home), read_log(home)
        v, ratio, score = r["variance"], r["usefulness"]["ratio"], r["usefulness"]["score"]
        idle = ", ".join(str(l) for l, x in enumerate(r["block_influence"]) if x < IDLE)
        last = [(x["variance"][-1], x["step"]) for x in log if "variance" in x]
        lines = [f"{path}: {sum(x > USEFUL for x in ratio)} of {len(ratio)} blocks are useful",
                 score_table({"": r}), *remarks(r, str(ckpt)),
                 f"variance x{v[-1] / max(v[1], 1e-38):.1f} from the first block to the last, {v[1]:.3g} to {v[-1]:.3g}"
                 + (f"; over training the last peaked at {max(last)[0]:.3g}, step {max(last)[1]}" if last else ""),
                 f"near the identity (influence below {IDLE}): {idle or 'no block'}"]
    except DAMAGED as e:
        raise UserError(f"{home}: probe.json is missing, old or in part, or it or log.jsonl is damaged ({e}): "
                        f"python probe.py {ckpt}; a damaged log.jsonl must go") from e
    decayed = c.get("learning_rate", 0) * c.get("weight_decay", 0) * c.get("max_steps", 0)
    taken = {"weight_decay": decayed > 0.95 * 4e-4 * 0.3 * 4768, "block_size": c["block_size"] >= 4096,
             "n_kv_head": c["n_kv_head"] < c["n_head"], "n_experts": c["n_experts"] > 0}
    # Decay is what acts on the variance itself: it comes first where that grows tenfold. Else the ladder's order.
    order = sorted(LADDER, key=lambda name: name != "weight_decay" or v[-1] < 10 * v[1])
    knobs = [name for name in order if not taken[name]]
    if score >= 0.9 or not knobs:
        lines.append("next: its depth is used" if score >= 0.9 else "next: every step of the recipe is taken")
    else:
        lines += [f"next in the paper's ladder: {knobs[0]}, here {c.get(knobs[0])}; {LADDER[knobs[0]]}",
                  f"then: {', '.join(knobs[1:]) or 'nothing'}"]
    return "\n".join(lines)

def main() -> None:
    parser = Parser(prog="recipe.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    on_disk = argparse.ArgumentParser(add_help=False)
    on_disk.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    on_disk.add_argument("--out", default="out/recipe", help="where the runs are (default %(default)s)")
    add = commands.add_parser("run", help="train, probe and report a family", parents=[on_disk]).add_argument
    add("family", choices=[*families(), "all"])
    add("--seeds", type=int, default=1, metavar="N", help="of every member, 0 to N - 1 (default 1)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--tasks", nargs="+", default=[], metavar="DIR", help="folders of OLMES tasks to score, see probe.py")
    add("--only", default=MEASURED, help="experiments of probe.py (default %(default)s)")
    add("--dry-run", action="store_true", help="print the runs, their cost and time")
    commands.add_parser("report", help="tables and figures from what is on disk", parents=[on_disk])
    add = commands.add_parser("advise", help="the paper's settings for a model of yours").add_argument
    for name, meaning in ("n_layer", "blocks"), ("params", "active for a token"), ("tokens", "to train on"):
        add(f"--{name}", type=int if name == "n_layer" else float, required=True, help=meaning)
    add("--gpus", type=int, default=8)
    add("--out", help="config file to write")
    commands.add_parser("diagnose", help="does a run use its depth?").add_argument("paths", nargs="+", type=Path)
    args, args.settings = parser.parse_known_args()
    check(args.command == "run" or not args.settings, f"unknown argument {args.settings[:1]}; see --help")
    if args.command == "run":
        check(args.seeds > 0 and args.jobs > 0, "--seeds and --jobs must be positive")
        names = {f.name for f in fields(TrainConfig)} - {"seed", "out_dir"}
        for given in [*args.settings[:1], *(x for x in args.settings if x[0] == "-")]:
            check(given[0] == "-" and given.lstrip("-").split("=")[0] in names, f"{given}: after `run FAMILY` "
                  "come what `recipe.py run --help` lists, --seeds and --out too, and other settings of train.py")
        check({*args.only.split(",")} <= {*EXPERIMENTS}, f"--only {args.only!r}: there are {','.join(EXPERIMENTS)}")
        check(all(Path(task).is_dir() for task in args.tasks), f"--tasks {' '.join(args.tasks)}: not all are folders")
    {"run": run_family, "report": lambda args: report(args.out, args.scale, [*families()]), "advise": advise,
     "diagnose": lambda args: print("\n\n".join(map(diagnose, args.paths)))}[args.command](args)

if __name__ == "__main__":
    run(main)
