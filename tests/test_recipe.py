"""recipe.py against the paper's own numbers, hand arithmetic and runs whose outcome is written by hand.

    python -m pytest -q tests/test_recipe.py                   # about a minute
"""
import json
import math
import os
import re
import runpy
import statistics
import string
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SHARED, assert_mistake, run_python, run_script

import recipe
from model import UserError
from recipe import FAMILIES, PAPER, Job, config, diagnose, folders, label, outcome, report
from train import bare, load_settings, vocabulary

SCALES = ("laptop", "paper")
SWEEPS = ("depth", "weight_decay", "context", "gqa")
MEMBERS = list(dict.fromkeys(member for members in FAMILIES.values() for member in members))


def arguments(**changes):
    """What `recipe.py run` reads from its command line."""
    return SimpleNamespace(**dict(family="gqa", scale="laptop", seeds=1, jobs=1, tasks=[], only="variance",
                                  settings=[], dry_run=False, out="out") | changes)


# ---- the families ----------------------------------------------------------------------------------------------------
def test_the_ladder_climbs_by_the_points_of_the_abstract():
    ladder = PAPER["ladder"]
    assert ladder["ladder_moe"]["accuracy"] - ladder["ladder_32"]["accuracy"] == pytest.approx(4.6)


def test_the_reported_rows_are_the_members_of_the_families_in_order():
    rows = [line.split()[:2] for line in (ROOT / "configs/paper/reported.txt").read_text().splitlines()[1:]]
    assert rows == [[family, member] for family, members in FAMILIES.items() if family != "norms"
                    for member in members]


def test_every_reported_usefulness_is_a_share_of_the_blocks_of_its_model():
    for family in (family for family in FAMILIES if family != "norms"):
        for member, reported in PAPER[family].items():
            share = reported["useful"] * config(member, "paper").n_layer
            assert abs(share - round(share)) <= 0.0051 * config(member, "paper").n_layer + 1e-9, member


@pytest.fixture(scope="module")
def facts():
    """The rows of the tables in the paper's facts, each a list of cells."""
    path = SHARED / "paper/facts.md"
    if not path.exists():
        pytest.skip("the paper's facts do not lie beside this checkout")
    return [[cell.strip(" *|") for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()]


def test_the_reported_depths_are_those_of_the_facts(facts):
    depth = {int(row[0]): [float(x) for x in row[1:]] for row in facts
             if len(row) == 4 and row[0] in ("12", "16", "24", "32") and "~" not in row[3]}
    assert len(depth) == 4
    for L, values in depth.items():
        reported = PAPER["depth"][f"depth_{L}"]
        assert [reported["causal"], reported["permuted"], reported["useful"]] == values


def test_the_reported_decays_and_contexts_are_those_of_the_facts(facts):
    sweeps = [row for row in facts if len(row) == 7]
    assert len(sweeps) > 6
    checked = 0
    for row in sweeps:
        for family, (knob, ppl, useful) in (("weight_decay", row[:3]), ("context", row[4:])):
            if ppl.replace(".", "").isdigit():
                member = f"{family}_{float(knob):g}".replace(".", "_")
                reported = PAPER[family][member]
                assert (reported["ppl"], reported["useful"]) == (float(ppl), float(useful)), member
                checked += 1
    assert checked == len(PAPER["weight_decay"]) + len(PAPER["context"])


def test_the_reported_groups_and_experts_are_those_of_the_facts(facts):
    names = {"1 (MHA)": "gqa_1", "4": "gqa_4", "16": "gqa_16", "Dense 400M": "dense_400m", "Dense 1B": "dense_1b",
             "MoE 2B / 400M active": "moe_400m", "MoE 7B / 1B active": "moe_1b"}
    found = {names[row[0]]: row[1:] for row in facts if len(row) == 4 and row[0] in names}
    assert len(found) == 7
    for member, (ppl, useful, variance) in found.items():
        reported = PAPER["gqa" if "gqa" in member else "moe"][member]
        assert (reported["ppl"], reported["useful"]) == (float(ppl), float(useful)), member
        assert reported.get("variance") == (float(variance.strip("~")) if variance else None), member


def test_the_reported_ladder_is_that_of_the_facts(facts):
    steps = [row for row in facts if len(row) == 3 and row[1].replace(".", "").isdigit()][-9:]
    for reported, (_, accuracy, useful) in zip(PAPER["ladder"].values(), steps, strict=True):
        assert (reported["accuracy"], reported["useful"]) == (float(accuracy), float(useful))


@pytest.mark.parametrize("scale", SCALES)
def test_members_of_a_family_see_the_same_tokens(scale):
    for family, members in FAMILIES.items():
        if family == "norms" and scale == "paper":
            continue                     # its members are of several families, whose steps the paper sized differently
        budgets = {(c.max_steps * c.tokens_per_step, c.tokens_per_step, c.data, c.learning_rate)
                   for c in (config(member, scale) for member in members)}
        assert len(budgets) == 1, family


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pair", [("dense_1b", "moe_1b"), ("dense_400m", "moe_400m"), ("ladder_g2", "ladder_moe")])
def test_dense_and_moe_are_compared_at_equal_active_flops(scale, pair):
    dense, moe = (config(member, scale) for member in pair)
    dense.vocab_size = moe.vocab_size = vocabulary(dense)
    router = 3 * 2 * moe.n_layer * moe.n_embd * moe.n_experts
    assert bare(moe).flops_per_token() - router == bare(dense).flops_per_token()


def test_a_laptop_member_stands_to_its_base_as_the_papers_does():
    base = {scale: config("dense_1b", scale) for scale in SCALES}
    for member in MEMBERS:
        laptop, paper = (config(member, scale) for scale in SCALES)
        assert laptop.norm == paper.norm and (laptop.n_experts > 0) == (paper.n_experts > 0)
        assert laptop.n_layer / 8 == paper.n_layer / 16
        if member.partition(",")[0] not in FAMILIES["depth"]:
            assert laptop.block_size / base["laptop"].block_size == paper.block_size / base["paper"].block_size
        assert laptop.weight_decay == pytest.approx(0.64 * paper.weight_decay)
        if paper.n_experts:
            assert laptop.top_k / laptop.n_experts == paper.top_k / paper.n_experts


def test_the_laptops_decay_does_what_the_papers_does():
    for member in FAMILIES["weight_decay"]:
        laptop, paper = (config(member, scale) for scale in SCALES)
        assert laptop.learning_rate * laptop.weight_decay * laptop.max_steps == pytest.approx(
            paper.learning_rate * paper.weight_decay * paper.max_steps, rel=0.01)


@pytest.mark.parametrize("scale", SCALES)
def test_members_share_a_folder_exactly_if_their_settings_are_equal(scale):
    found = folders("out", scale)
    of = {member: config(member, scale) for member in found}
    assert list(found) == MEMBERS
    for a in found:
        for b in found:
            assert (found[a] == found[b]) == (of[a] == of[b]), (a, b)


# ---- what a row is, and what it stands for ---------------------------------------------------------------------------
@pytest.mark.parametrize("family, member, laptop, paper", [
    ("depth", "depth_12", "L 6 (paper: 12)", "L 12"),
    ("depth", "depth_32", "L 16 (paper: 32)", "L 32"),
    ("weight_decay", "weight_decay_0", "decay 0", "decay 0"),
    ("weight_decay", "weight_decay_0_01", "decay 0.0064 (paper: 0.01)", "decay 0.01"),
    ("context", "context_2048", "T 128 (paper: 2048)", "T 2048"),
    ("gqa", "gqa_1", "G 1", "G 1"),
    ("gqa", "gqa_16", "G 4 (paper: 16)", "G 16"),
    ("moe", "dense_400m", "d 32 (paper: 768)", "d 768"),
    ("moe", "moe_400m", "+ experts 16, top 2 (paper: 32, top 4)", "+ experts 32, top 4"),
    ("moe", "moe_1b", "+ experts 16, top 2 (paper: 64, top 8)", "+ experts 64, top 8"),
    ("ladder", "ladder_32", "L 16 (paper: 32)", "L 32"),
    ("ladder", "ladder_t4096", "+ T 256 (paper: 4096)", "+ T 4096"),
    ("ladder", "ladder_decay_0_3", "+ decay 0.192 (paper: 0.3)", "+ decay 0.3"),
    ("ladder", "ladder_g2", "+ G 2", "+ G 2"),
    ("ladder", "ladder_moe", "+ experts 16, top 2 (paper: 64, top 8)", "+ experts 64, top 8"),
    ("norms", "dense_1b", "norm pre", "norm pre"),
    ("norms", "gqa_16,norm=lns", "norm lns, G 4 (paper: 16)", "norm lns, G 16"),
])
def test_a_row_is_called_by_its_knob_here_and_in_the_paper(family, member, laptop, paper):
    assert (label(family, member, "laptop"), label(family, member, "paper")) == (laptop, paper)


def knobs_named(family, member):
    return {knob for _, knob, _, _ in string.Formatter().parse(FAMILIES[family][member]) if knob}


@pytest.mark.parametrize("scale", SCALES)
def test_a_label_names_exactly_the_knobs_that_the_config_turns(scale):
    """What a member's config changes of its base, where that is a member as well; the norm is always named."""
    compared = 0
    for family, members in FAMILIES.items():
        for member in members:
            path = recipe.arguments(member, scale)[0]
            base = Path(runpy.run_path(path)["base"]).stem
            if base not in MEMBERS:
                continue
            theirs, ours = recipe.knobs(config(base, scale)), recipe.knobs(config(member, scale))
            turned = {knob for knob in ours if ours[knob] != theirs[knob]}
            if turned:                                  # else it is the base by another name, as gqa_1 is of dense_1b
                named = knobs_named(family, member)
                assert named - {"norm"} == turned - {"norm"} and named >= turned, member
                compared += 1
    assert compared > 25


def test_only_the_sweeps_turn_a_single_knob():
    assert [family for family in FAMILIES if recipe.is_sweep(family)] == list(SWEEPS)


def comment_of(path):
    """The comment that opens a config."""
    lines = path.read_text().splitlines()
    return " ".join(line for k, line in enumerate(lines) if all(x.startswith("#") for x in lines[:k + 1]))


def numbers(text):
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_every_config_says_what_it_is():
    configs = sorted((ROOT / "configs").rglob("*.py"))
    assert len(configs) > 60 and all(comment_of(path) for path in configs)


def test_every_laptop_config_says_what_it_stands_for():
    compared = 0
    for family, members in FAMILIES.items():
        for member in (member for member in members if "," not in member):
            said = numbers(comment_of(ROOT / f"configs/laptop/{member}.py"))
            laptop, paper = (recipe.knobs(config(member, scale)) for scale in SCALES)
            for knob in knobs_named(family, member):
                if laptop[knob] != paper[knob]:
                    assert numbers(laptop[knob]) | numbers(paper[knob]) <= said, (member, knob)
                    compared += 1
    assert compared > 25


# ---- what a run costs ------------------------------------------------------------------------------------------------
def block_matrices(c):
    """Parameters of the matrices that a token meets in a block."""
    d, heads, width = c.n_embd, c.n_head, c.head_dim
    attention = d * (heads + 2 * c.n_kv_head) * width + heads * width * d
    if not c.n_experts:
        return attention + 3 * d * c.ffn_hidden
    return attention + d * c.n_experts + c.top_k * 3 * d * c.expert_hidden + 3 * d * c.shared_hidden


def active_parameters(c, vocab):
    norms = (2 * c.n_layer + 1) * c.n_embd
    return c.n_layer * block_matrices(c) + 2 * vocab * c.n_embd + norms


def training_flops(c, vocab, tokens):
    matrices = c.n_layer * block_matrices(c) + vocab * c.n_embd                    # the embedding is a look-up
    attention = 4 * c.block_size * c.n_head * c.head_dim * c.n_layer
    return 3 * (2 * matrices + attention) * tokens


@pytest.mark.parametrize("scale, vocab, rate, machine", [
    ("paper", 50304, 8 * 989e12 * 0.4, "8 H100 at 40% MFU"), ("laptop", 320, 3e8 / 3, "this machine")])
@pytest.mark.parametrize("family", ["depth", "moe", "ladder"])
def test_a_dry_run_prints_what_each_run_takes_and_the_hours_of_all(family, scale, vocab, rate, machine, tmp_path,
                                                                   monkeypatch, capsys):
    def peak(device, dtype):
        assert device == torch.device("cpu") and dtype == torch.float32
        return 3e8
    monkeypatch.setattr(recipe, "peak_flops", peak)
    recipe.run_family(arguments(family=family, scale=scale, dry_run=True, out=str(tmp_path)))
    *lines, last = capsys.readouterr().out.splitlines()
    total = 0.0
    for line, member in zip(lines, FAMILIES[family], strict=True):
        c = config(member, scale)
        tokens = c.max_steps * c.tokens_per_step
        flops = training_flops(c, vocab, tokens)
        hours = flops / rate / 3600
        total += hours
        assert line == (f"{folders(tmp_path, scale)[member]}/seed_0: {active_parameters(c, vocab):,} active "
                        f"parameters, {tokens:,} tokens, {flops:.2g} FLOPs, {hours:.2f} h; to do: train, probe")
        assert hours > 1                                            # so that its digits say something
    assert last.startswith(f"{total:.1f} h of training on {machine}, one run at a time")


@pytest.mark.parametrize("todo, said", [({}, "nothing"), ({"probe": []}, "probe")])
def test_what_is_trained_costs_no_more_hours(todo, said, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "commands", lambda job, args: todo)
    recipe.run_family(arguments(scale="paper", dry_run=True))
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.endswith(f" FLOPs, 0.00 h; to do: {said}") for line in lines)
    assert last.startswith("0.0 h of training")


# ---- running ---------------------------------------------------------------------------------------------------------
SMALL = ["--n_layer=2", "--n_embd=16", "--block_size=32", "--tokens_per_step=256"]
COMMAND = ["run", "gqa", "--jobs", "2", "--only", "variance,usefulness"]


@pytest.fixture(scope="module")
def ran(corpus, tmp_path_factory):
    """A family run with real processes: its folder, the settings behind COMMAND, and what came of it."""
    where = tmp_path_factory.mktemp("recipe")
    settings = [*SMALL, "--max_steps=3", "--warmup_steps=1", "--eval_tokens=256", "--stats_interval=1",
                f"--data={corpus}"]
    return where, settings, run_script("recipe.py", *COMMAND, *settings, cwd=where)


@pytest.fixture
def again(ran, run_main, monkeypatch):
    """again(...) is what the same command with more behind it prints the second time."""
    where, settings, _ = ran
    monkeypatch.chdir(where)

    def call(*more):
        done = run_main(recipe, *COMMAND, *settings, *more)
        assert done.status == 0, done
        return done.out
    return call


def test_a_family_is_trained_probed_and_tabulated(ran):
    where, _, done = ran
    assert done.status == 0, done
    out = where / "out/recipe/laptop"
    text = (out / "gqa.md").read_text()
    assert text in done.out
    heads = {}
    for member in ("gqa_1", "gqa_4", "gqa_16"):
        run_dir = folders(out.parent, "laptop")[member] / "seed_0"
        saved = torch.load(run_dir / "ckpt.pt", weights_only=True)
        assert saved["step"] == 3
        heads[member] = saved["settings"]["n_kv_head"]
        r = json.loads((run_dir / "probe.json").read_text())
        log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        row = next(line for line in text.splitlines() if f"`{member}`" in line)
        for value in (log[-1]["val_loss"], r["variance"][-1], r["usefulness"]["score"]):
            assert f" {value:.3f} " in row
    assert heads == {"gqa_1": 4, "gqa_4": 2, "gqa_16": 1}


def test_what_is_finished_is_not_run_again(ran, again):
    where = ran[0]
    before = {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}
    said = again()
    assert ": train" not in said and ": probe" not in said
    assert before == {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}


@pytest.mark.parametrize("more, nothing, probe, both", [
    ([], 3, 0, 0),
    (["--only", "variance,usefulness,removal"], 0, 3, 0),
    (["--save_interval=1", "--compile=false"], 3, 0, 0),             # how it is computed, not what
    (["--learning_rate=1e-4"], 0, 0, 3),
    (["--seeds", "2"], 3, 0, 3),
])
def test_a_dry_run_says_what_is_to_do(again, more, nothing, probe, both):
    said = again("--dry-run", *more)
    todo = [line.partition("to do: ")[2] for line in said.splitlines() if "to do" in line]
    assert sorted(todo) == ["nothing"] * nothing + ["probe"] * probe + ["train, probe"] * both
    if not both:
        assert said.splitlines()[-1].startswith("0.0 h of training")


def test_another_experiment_does_not_lose_those_that_are_there(ran):
    where, settings, _ = ran
    out = folders(where / "out/recipe", "laptop")["gqa_4"] / "seed_0"
    before = json.loads((out / "probe.json").read_text())
    job, args = Job("gqa_4", 0, out), arguments(only="lens", settings=settings)
    probe = recipe.commands(job, args)["probe"]
    assert "--only=lens" in probe                          # and measures nothing twice
    assert run_python(*probe[1:], cwd=where).status == 0
    after = json.loads((out / "probe.json").read_text())
    assert after["lens"] and after["run"]["experiments"] == ["variance", "usefulness", "lens"]
    for name in ("variance", "usefulness", "loss"):
        assert after[name] == before[name]
    r = json.loads((out / "probe.json").read_text())
    del r["run"]["weights"]                                # probe.py would put such a file aside
    assert recipe.commands(job, arguments(only="variance,lens", settings=settings)) == {}
    (out / "probe.json").write_text(json.dumps(r))
    assert "--only=variance,lens" in recipe.commands(job, arguments(only="variance,lens", settings=settings))["probe"]
    os.utime(out / "ckpt.pt")                              # trained on since: what was probed is of the past
    assert outcome(out) is None and "probe" in recipe.commands(job, args)
    os.utime(out / "probe.json")
    assert outcome(out).scores["last var."] == pytest.approx(before["variance"][-1])


def test_a_run_of_other_settings_is_named_below_the_table(ran, run_main, monkeypatch):
    monkeypatch.chdir(ran[0])
    said = run_main(recipe, "report")
    assert said.status == 0
    lines = [line for line in said.out.splitlines() if "other settings" in line and "gqa_4" in line]
    assert len(lines) == 1 and lines[0].startswith("out/recipe/laptop/gqa_4/seed_0") and "max_steps" in lines[0]
    assert "out_dir" not in lines[0] and "seed:" not in lines[0]


def test_a_terminated_family_ends_its_run_and_begins_no_other(corpus, tmp_path):
    command = [sys.executable, ROOT / "recipe.py", "run", "gqa", *SMALL, f"--data={corpus}", "--eval_interval=0",
               "--max_steps=1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = tmp_path / "out/recipe/laptop/depth_16/seed_0"
    for _ in range(600):
        if (out / "log.jsonl").exists():
            break
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "depth_16/seed_0: train failed or was stopped" in said, said
    assert "stopped by SIGTERM" in (out / "train.txt").read_text() and (out / "ckpt.pt").exists()
    assert not (tmp_path / "out/recipe/laptop/gqa_4").exists()


class Ended:
    """A process that is over."""
    def __init__(self, status):
        self.status = status

    def wait(self):
        return self.status


def run_by_hand(command, stdout, **_):
    """In place of subprocess.Popen: what train.py and probe.py would write, but context_512 fails, context_1024 ends
    a step early with status 0, as after a SIGTERM."""
    out = Path(stdout.name).parent
    if "context_512" in str(out):
        return Ended(2)
    if "probe.py" in command[1]:
        (out / "probe.json").write_text(json.dumps({
            "usefulness": {"score": 0.5, "mean_log_ratio": 0.25}, "usefulness_heldout": {"mean_log_ratio": 0.25},
            "variance": [1.0], "run": {"experiments": ["variance"], "weights": 1}}))
        (out / "log.jsonl").write_text(json.dumps({"step": 1, "variance": [1.0], "val_loss": 2.0}) + "\n")
    else:
        c = load_settings([x for x in command[2:] if x not in ("--resume", "--overwrite")])[0]
        step = c.max_steps - ("context_1024" in str(out))
        torch.save({"model": {}, "settings": asdict(c), "step": step, "tokenizer": "bytes"}, out / "ckpt.pt")
    return Ended(0)


def test_a_failed_run_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipe.subprocess, "Popen", run_by_hand)
    args = arguments(family="context", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="2 of 6 runs failed: .*context_512/seed_0, .*context_1024/seed_0"):
        recipe.run_family(args)
    said = capsys.readouterr().out
    for failed in ("context_512", "context_1024"):
        assert f"{failed}/seed_0: train failed" in said and f"{failed}/seed_0: probe" not in said
        assert f"{failed}`" not in said
    assert all(f"context_{T}`" in said for T in (256, 2048, 4096, 8192))
    assert "not finished: context_512, context_1024\n" in said

    def left(member):
        return recipe.commands(Job(member, 0, tmp_path / f"out/laptop/{member}/seed_0"), args)
    half = left("context_1024")
    assert half["train"][-1] == "--resume" and "probe" in half            # goes on from where it was
    assert left("context_256") == {}
    args.settings = [*args.settings, "--weight_decay=0.3"]
    assert left("context_1024")["train"][-1] == "--overwrite"             # another run: the first is put aside


@pytest.mark.parametrize("T", [256, 2048, 8192])
def test_the_probe_takes_the_same_tokens_whatever_the_context(T, tmp_path):
    todo = recipe.commands(Job(f"context_{T}", 3, tmp_path), arguments(tasks=["copa"]))
    samples = next(x for x in todo["probe"] if x.startswith("--samples="))
    assert int(samples.split("=")[1]) * config(f"context_{T}", "laptop").block_size == 8192
    assert "--seed=3" in todo["train"]
    assert todo["probe"][-3:] == ["--only=variance,tasks", "--tasks", "copa"]


def test_at_the_papers_size_the_probe_takes_the_papers_sample(tmp_path):
    todo = recipe.commands(Job("context_512", 0, tmp_path), arguments(scale="paper"))
    assert "--samples=100" in todo["probe"]


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_a_run_takes_every_gpu_there_is(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    command = recipe.commands(Job("gqa_4", 0, tmp_path), arguments())["train"]
    assert ("torch.distributed.run" in command and "--nproc-per-node=gpu" in command) == (gpus > 1)
    assert command[0] == sys.executable and str(ROOT / "train.py") in command


# ---- tables ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def invent(tmp_path):
    """invent(member, seed, ...) writes the files of a finished run of two blocks, with these numbers in them."""
    def write(member, seed=0, useful=0.5, variance=7.0, val_loss=1.25, accuracy=None, **more):
        out = folders(tmp_path / "out", "laptop")[member] / f"seed_{seed}"
        out.mkdir(parents=True)
        log = [{"step": 10, "variance": [0.1, 2.0, 90.0]},
               {"step": 15},
               {"step": 20, "variance": [0.1, 3.0, variance]},
               {"step": 20, "val_loss": val_loss}]
        (out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
        result = {
            "loss": 1.0, "variance": [0.1, 3.0, variance], "causal_mean": 0.25, "causal": [[0.0, 0.25], [0.0, 0.0]],
            "permutation": [[0.0, 0.75], [0.75, 0.0]], "permutation_mean": 0.75, "permutation_pairs": 1,
            "usefulness": {"score": useful, "mean_log_ratio": 0.125, "ratio": [1.2, 1.05], "loose_fit": False},
            "usefulness_heldout": {"mean_log_ratio": 0.25, "ratio": [1.3, 1.1], "loose_fit": False},
            "released": {"variance": [0.1, 3.0, 2.0], "causal": [[0.0, 0.375], [0.0, 0.0]],
                         "usefulness": {"score": 1.0, "mean_log_ratio": 0.5, "loose_fit": False}},
            "block_influence": [0.5, 0.01], "removal": {"1": [1.5, 1.02]}, "jacobian": {"deviation": [0.5, 0.25]}}
        if accuracy is not None:
            result["tasks"] = {"average": {"primary": accuracy}}
        (out / "probe.json").write_text(json.dumps(result | more))
        return out
    return write


def test_the_table_holds_means_and_deviations_over_seeds_beside_the_papers_numbers(invent, tmp_path, capsys):
    for seed, useful in enumerate((0.5, 0.75, 0.25)):
        invent("gqa_4", seed, useful, variance=3.0 + seed)
    invent("gqa_1", 0, 1.0)
    report(tmp_path / "out", "laptop", ["gqa"])
    text = (tmp_path / "out/laptop/gqa.md").read_text()
    said = capsys.readouterr().out
    assert text in said and "not finished: gqa_16\n" in said
    head, *rows = [[cell.strip() for cell in line.replace("\\|", "!").split("|")[1:-1]] for line in text.splitlines()]
    assert {len(row) for row in rows} == {len(head)} and rows.pop(0) == ["---"] * len(head)
    one, four = (dict(zip(head, row)) for row in rows)
    assert (one[""], one["seeds"], one["useful"], one["paper: ppl"]) == ("`gqa_1` G 1", "1", "1.000", "14.52")
    assert four[""] == "`gqa_4` G 2 (paper: 4)"
    assert (four["seeds"], four["paper: useful"], four["paper: variance"]) == ("3", "0.87", "125")
    assert four["useful"] == f"0.500 ± {statistics.stdev([0.5, 0.75, 0.25]):.3f}"
    assert four["last var."] == "4.000 ± 1.000" and four["peak var."] == "90.0 ± 0.0"
    assert four["rel.causal"] == "0.375 ± 0.000" and four["rel.useful"] == "1.000 ± 0.000"
    assert four["val loss"] == "1.250 ± 0.000" and "accuracy" not in head and "loss" not in head


def test_a_broken_or_unfinished_run_is_left_out(invent, tmp_path):
    (invent("gqa_4") / "probe.json").write_text("{")
    (invent("gqa_16") / "probe.json").unlink()
    assert outcome(folders(tmp_path / "out", "laptop")["gqa_4"] / "seed_0") is None
    with pytest.raises(UserError, match="no finished run"):
        report(tmp_path / "out", "laptop", ["gqa"])


def test_a_log_that_ends_within_a_line_or_is_gone_costs_no_result(invent):
    out = invent("gqa_4", variance=7.5)
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 21, "varian')
    assert outcome(out).curve == [(10, 90.0), (20, 7.5)] and "peaked at 90" in diagnose(checkpoint(out))
    (out / "log.jsonl").unlink()
    assert outcome(out).scores["last var."] == 7.5 and math.isnan(outcome(out).scores["val loss"])


def test_what_is_measured_of_a_run_is_what_its_files_say(invent):
    found = outcome(invent("gqa_4", variance=7.5))
    assert found.curve == [(10, 90.0), (20, 7.5)]
    assert found.scores["last var."] == 7.5 and found.scores["val loss"] == 1.25
    assert found.scores["peak var."] == 90.0
    assert found.scores["|J-I|/d"] == 0.375 and found.scores["influence"] == pytest.approx(0.255)


# ---- figures ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def drawn(invent, tmp_path):
    """drawn(family, runs) draws runs, the arguments of `invent` for each; returns the three axes of the figure."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")

    def draw(family, runs):
        found = {}
        for member, seed, numbers in runs:
            found.setdefault(member, []).append(outcome(invent(member, seed, **numbers)))
        figure = recipe.figure(family, found, "laptop")
        assert figure.get_suptitle() == f"{family}, laptop scale"
        left, right, marks = figure.axes
        return left, right, marks
    return draw


DEPTH = [("depth_12", 0, dict(useful=0.5, variance=4.0, val_loss=1.5)),
         ("depth_12", 1, dict(useful=1.0, variance=6.0, val_loss=1.75)),
         ("depth_32", 0, dict(useful=0.25, variance=8.0, val_loss=1.0))]
DEPTH_LABELS = ["L 6 (paper: 12)", "L 16 (paper: 32)"]


def one_line(labels):
    return [label.replace("\n", " ") for label in labels]


def ticks(ax):
    return one_line(label.get_text() for label in ax.get_xticklabels())


def errors(container):
    """The values, and the half lengths of the error bars, 0 where there is none."""
    data, _, (bars,) = container.lines
    halves = [np.ptp(segment[:, 1]) / 2 if len(segment) and not np.isnan(segment).any() else 0.0
              for segment in bars.get_segments()]
    return list(data.get_ydata()), halves


def test_the_figure_shows_every_seeds_variance_over_training(drawn):
    left, _, _ = drawn("depth", DEPTH)
    curves = left.get_lines()
    assert [list(zip(*line.get_data())) for line in curves] == [
        [(10, 90.0), (20, 4.0)], [(10, 90.0), (20, 6.0)], [(10, 90.0), (20, 8.0)]]
    assert [line.get_alpha() for line in curves] == [None, 0.35, None]              # further seeds are pale
    assert curves[0].get_color() is not curves[2].get_color()
    np.testing.assert_array_equal(curves[0].get_color(), curves[1].get_color())
    assert not np.array_equal(curves[0].get_color(), curves[2].get_color())
    assert left.get_yscale() == "log" and left.get_xlabel() == "step"
    assert one_line(left.get_legend_handles_labels()[1]) == DEPTH_LABELS


def test_the_figures_bars_are_the_mean_validation_losses(drawn):
    _, right, _ = drawn("depth", DEPTH)
    assert ticks(right) == DEPTH_LABELS
    bars = right.patches
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1])
    assert list(right.get_xticks()) == [0, 1]
    assert [bar.get_height() for bar in bars] == [1.625, 1.0]
    deviation = statistics.stdev([1.5, 1.75])
    (bar_errors,) = (container for container in right.containers if hasattr(container, "lines"))
    assert np.ptp(bar_errors.lines[2][0].get_segments()[0][:, 1]) / 2 == pytest.approx(deviation)
    assert right.get_ylim() == pytest.approx((0.95, (1.625 + deviation) * 1.02))
    assert "validation loss" in right.get_ylabel()


def test_the_figures_marks_are_mean_scores_and_the_hollow_ones_the_papers(drawn):
    _, _, marks = drawn("depth", DEPTH)
    filled = {container.get_label(): errors(container) for container in marks.containers}
    assert filled == {
        "useful": ([0.75, 0.25], [pytest.approx(statistics.stdev([0.5, 1.0])), 0.0]),
        "released: useful": ([1.0, 1.0], [0.0, 0.0]),
        "causal": ([0.25, 0.25], [0.0, 0.0]),
        "permuted": ([0.75, 0.75], [0.0, 0.0])}
    hollow = {line.get_label(): line for line in marks.get_lines() if line.get_fillstyle() == "none"}
    assert {name: list(line.get_ydata()) for name, line in hollow.items()} == {
        "useful, paper": [1.0, 0.562], "causal, paper": [0.355, 0.259], "permuted, paper": [0.985, 0.306]}
    colors = {container.get_label(): container.lines[0].get_color() for container in marks.containers}
    assert len(set(colors.values())) == 4
    for name, line in hollow.items():
        assert list(line.get_xdata()) == [0, 1] and line.get_linestyle() == "None"
        assert line.get_color() == colors[name.removesuffix(", paper")]
    assert sorted(marks.get_legend_handles_labels()[1]) == sorted([*filled, *hollow])
    assert marks.get_ylim()[0] == 0


@pytest.mark.parametrize("family, members, joined", [
    ("depth", ["depth_12", "depth_32"], True), ("ladder", ["ladder_32", "ladder_moe"], False)])
def test_a_line_joins_the_members_of_a_sweep_alone(drawn, family, members, joined):
    _, right, marks = drawn(family, [(member, 0, {}) for member in members])
    assert {container.lines[0].get_linestyle() for container in marks.containers} == {"-" if joined else "None"}
    assert ticks(right) == [label(family, member, "laptop") for member in members]


@pytest.mark.parametrize("second, heights, meaning", [
    (0.5, [0.25, 0.5], "accuracy"), (None, [1.25, 1.25], "validation loss")])
def test_the_bars_are_accuracies_if_all_runs_have_one(drawn, second, heights, meaning):
    _, right, marks = drawn("ladder", [("ladder_32", 0, dict(accuracy=0.25)),
                                       ("ladder_g2", 0, dict(accuracy=second))])
    assert [bar.get_height() for bar in right.patches] == heights and meaning in right.get_ylabel()
    hollow = {line.get_label(): list(line.get_ydata()) for line in marks.get_lines() if line.get_fillstyle() == "none"}
    assert hollow == {"useful, paper": [0.53, 0.66]}                # of causal and permuted the ladder says nothing


def test_what_the_paper_does_not_report_has_no_hollow_mark(drawn):
    _, right, marks = drawn("norms", [("dense_1b,norm=lns", 0, {}), ("gqa_16,norm=peri", 0, {})])
    assert not [line for line in marks.get_lines() if line.get_fillstyle() == "none"]
    assert ticks(right) == ["norm lns", "norm peri, G 4 (paper: 16)"]


def test_every_family_has_a_figure(invent, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    found = folders(tmp_path / "out", "laptop")
    for member in {folder: member for member, folder in found.items()}.values():
        invent(member)
    report(tmp_path / "out", "laptop", [*FAMILIES])
    said = capsys.readouterr().out
    for family in FAMILIES:
        path = tmp_path / f"out/laptop/{family}.png"
        assert path.stat().st_size > 10_000 and path.read_bytes().startswith(b"\x89PNG") and str(path) in said


def test_without_matplotlib_there_is_a_table_and_the_remedy(invent, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    invent("gqa_4")
    report(tmp_path / "out", "laptop", ["gqa"])
    assert "no figure: pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "out/laptop/gqa.md").exists() and not (tmp_path / "out/laptop/gqa.png").exists()


# ---- the rule of thumb: the recipe at another size -------------------------------------------------------------------
@pytest.fixture
def advise(tmp_path, monkeypatch, capsys):
    """advise(...) is the config that is written when this is asked for, and what is printed."""
    monkeypatch.setattr(recipe, "plan", lambda c, gpus, mfu: f"plan of {gpus}")          # tested in test_scale.py

    def ask(**asked):
        out = tmp_path / "advised.py"
        defaults = dict(n_layer=32, params=1.2e9, tokens=1e10, gpus=8, out=str(out))
        recipe.advise(SimpleNamespace(**defaults | asked))
        return load_settings([str(out)])[0], capsys.readouterr().out
    return ask


@pytest.mark.parametrize("knob, before, after, others", [
    ("block_size", "ladder_32", "ladder_t4096", ["ladder_t8192"]),
    ("weight_decay", "ladder_t4096", "ladder_decay_0_3", ["ladder_decay_0_6", "ladder_decay_1"]),
    ("n_kv_head", "ladder_decay_0_3", "ladder_g2", []),
    ("n_experts", "ladder_g2", "ladder_moe", [])])
def test_the_reasons_are_the_steps_of_the_reported_ladder(knob, before, after, others):
    ladder, reason = PAPER["ladder"], recipe.LADDER[knob]
    for column, digits in (("accuracy", 1), ("useful", 2)):
        assert f"{ladder[before][column]:.{digits}f} -> {ladder[after][column]:.{digits}f}" in reason
    for member in others:
        assert f"{ladder[member]['accuracy']:.1f}" in reason


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "weight_decay", "tokens"])
def test_what_the_paper_covers_is_what_its_configs_hold(name):
    def value(c):
        return c.max_steps * c.tokens_per_step if name == "tokens" else getattr(c, name)
    values = [value(config(member, "paper")) for member in MEMBERS]
    ladder, least, most = recipe.COVERED[name]
    assert (least, most) == (pytest.approx(min(values), rel=1e-3), pytest.approx(max(values), rel=1e-3))
    assert ladder == pytest.approx(value(config("ladder_moe", "paper")), rel=1e-3)


def test_advice_at_the_papers_size_is_the_papers_recipe(advise):
    c, said = advise()
    theirs = config("ladder_moe", "paper")
    for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "top_k", "expert_hidden", "block_size",
                 "weight_decay", "tokens_per_step", "max_steps", "learning_rate", "warmup_steps"):
        assert getattr(c, name) == getattr(theirs, name), name
    assert "EXTRAPOLATES" not in said and "plan of 8" in said
    assert "torchrun --nproc-per-node=8 train.py " in said


@pytest.mark.parametrize("asked", [dict(n_layer=12, params=4e8), dict(n_layer=64, params=7e9, tokens=1e11, gpus=64),
                                   dict(n_layer=16, params=2e7, tokens=2e8, gpus=1)])
def test_advice_meets_the_size_and_the_tokens_that_were_asked_for(asked, advise):
    c, _ = advise(**asked)
    widths = [d for d in (c.n_embd - 32, c.n_embd, c.n_embd + 32) if d]
    assert c.n_head == 2 * c.n_kv_head and abs(c.n_head * c.head_dim - c.n_embd) <= c.n_head
    assert 35 <= c.head_dim <= 105                                                    # the ladder's heads are 70 wide
    models = [bare(replace(c, n_embd=d, expert_hidden=d, n_head=2, n_kv_head=1,
                           head_dim=d // 2)).count_parameters()["active"] for d in widths]
    assert widths[np.abs(np.array(models) - asked["params"]).argmin()] == c.n_embd
    assert c.max_steps * c.tokens_per_step == pytest.approx(asked.get("tokens", 1e10), rel=0.02)
    assert c.tokens_per_step % (c.block_size * asked.get("gpus", 8)) == 0
    assert c.weight_decay * c.max_steps == pytest.approx(0.3 * 4768, rel=0.01)       # what decay does is the paper's


@pytest.mark.parametrize("asked, names", [
    (dict(n_layer=48), ["n_layer"]), (dict(params=7e9), ["n_embd", "active"]), (dict(tokens=1e11), ["tokens"]),
    (dict(n_layer=200, params=1e5), ["n_layer", "n_embd", "active"]),        # no width is so small: 9M are built
    (dict(n_layer=12, params=4e8, tokens=2e7, gpus=128), ["tokens", "block_size"])])
def test_advice_says_where_it_extrapolates(asked, names, advise):
    _, said = advise(**asked)
    assert [line.split()[1] for line in said.splitlines() if "EXTRAPOLATES" in line] == names
    assert ("1e+05 were asked for" in said) == (asked.get("params") == 1e5)


def test_advice_keeps_the_context_of_the_recipe_on_many_gpus(advise):
    c, said = advise(gpus=1024)
    assert (c.block_size, c.tokens_per_step, c.max_steps) == (4096, 2**22, 2384) and "EXTRAPOLATES" not in said


def test_an_advised_config_stands_alone(advise, tmp_path):
    advise()
    assert "base" not in (tmp_path / "advised.py").read_text().replace("baseline", "")
    with pytest.raises(UserError, match="advised.py exists"):
        advise()


# ---- the rule of thumb: what would help a run ------------------------------------------------------------------------
def checkpoint(out, **changes):
    """The checkpoint of an invented run, with its settings or these."""
    c = dict(n_layer=2, n_head=4, n_kv_head=4, n_experts=0, block_size=128, weight_decay=0.1, learning_rate=4e-4,
             max_steps=4768) | changes
    torch.save({"model": {}, "settings": c, "step": 20, "tokenizer": "bytes"}, out / "ckpt.pt")
    os.utime(out / "ckpt.pt", (0, 0))                                                        # probed later
    return out


def test_a_diagnosis_says_what_the_run_and_its_probe_hold(invent):
    out = checkpoint(invent("gqa_4", variance=9.0))
    said = diagnose(out)
    assert said == diagnose(out / "ckpt.pt").replace(f"{out}/ckpt.pt: 1 of", f"{out}: 1 of")
    assert "1 of 2 blocks are useful" in said and "x3.0 from the first block to the last, 3 to 9" in said
    assert "peaked at 90, step 10" in said and "near the identity (influence below 0.02): 1\n" in said
    assert f"cheapest run of 1: blocks 1, perplexity x{math.exp(0.02):.3f}" in said and "--drop 1" in said


def test_a_checkpoint_of_another_name_has_its_probe_in_a_folder_of_that_name(invent):
    out = checkpoint(invent("gqa_4"))
    (out / "final").mkdir()
    for name in ("probe.json", "log.jsonl"):
        (out / name).rename(out / "final" / name)
    (out / "ckpt.pt").rename(out / "final.pt")
    assert "1 of 2 blocks are useful" in diagnose(out / "final.pt")


DECAYED = {"block_size": 4096, "weight_decay": 0.3}


@pytest.mark.parametrize("changes, variance, knobs", [
    ({}, 9.0, ["block_size", "weight_decay", "n_kv_head", "n_experts"]),
    ({}, 29.0, ["block_size", "weight_decay", "n_kv_head", "n_experts"]),
    ({}, 31.0, ["weight_decay", "block_size", "n_kv_head", "n_experts"]),          # it grows more than tenfold
    ({"block_size": 4096}, 9.0, ["weight_decay", "n_kv_head", "n_experts"]),
    (DECAYED, 9.0, ["n_kv_head", "n_experts"]),
    ({"block_size": 4096, "weight_decay": 0.192, "learning_rate": 3e-3, "max_steps": 2000}, 31.0,
     ["n_kv_head", "n_experts"]),
    (DECAYED | {"n_kv_head": 2}, 9.0, ["n_experts"])])
def test_the_next_knob_is_the_first_step_of_the_ladder_not_taken(invent, changes, variance, knobs):
    *_, first, then = diagnose(checkpoint(invent("gqa_4", variance=variance), **changes)).splitlines()
    assert first.startswith(f"next in the paper's ladder: {knobs[0]}, here ") and recipe.LADDER[knobs[0]] in first
    assert then == f"then: {', '.join(knobs[1:]) or 'nothing'}"


def test_a_run_that_has_taken_every_step_is_told_so(invent):
    out = checkpoint(invent("gqa_4"), **DECAYED, n_kv_head=2, n_experts=8)
    assert diagnose(out).endswith("next: every step of the recipe is taken")


def test_a_stream_without_variance_is_diagnosed(invent):
    out = checkpoint(invent("gqa_4"))
    r = json.loads((out / "probe.json").read_text())
    (out / "probe.json").write_text(json.dumps(r | {"variance": [0.0, 0.0, 0.0]}))
    assert "variance x0.0" in diagnose(out)


@pytest.mark.parametrize("useful", [0.9, 1.0])
def test_a_run_that_uses_its_depth_is_left_alone(invent, useful):
    assert diagnose(checkpoint(invent("gqa_4", useful=useful))).endswith("next: its depth is used")


@pytest.mark.parametrize("file, text", [
    ("probe.json", None), ("probe.json", "{"), ("probe.json", '{"loss": 1}'), ("log.jsonl", "{\n"),
    ("log.jsonl", '{"variance": [1.0]}\n')])
def test_a_run_without_a_whole_probe_names_the_command(invent, file, text):
    out = checkpoint(invent("gqa_4"))
    if text is None:
        (out / file).unlink()
    else:
        (out / file).write_text(text)
    with pytest.raises(UserError, match=f"python probe.py {out}/ckpt.pt"):
        diagnose(out)


# ---- mistakes --------------------------------------------------------------------------------------------------------
MISTAKES = {
    "nothing to report": (["report"], "no finished run in out/recipe/laptop"),
    "unknown family": (["run", "width"], "width"),
    "misspelt flag": (["run", "gqa", "--sedes=2"], "seed"),
    "no such run": (["diagnose", "nowhere"], "nowhere"),
    "unknown experiment": (["run", "gqa", "--only", "width"], "width"),
    "no such task": (["run", "gqa", "--tasks", "nowhere"], "nowhere"),
    "infinite size": (["advise", "--n_layer=2", "--params=inf", "--tokens=1e9"], "--params"),
    "missing argument": (["advise", "--n_layer=32", "--params=1e9"], "--tokens"),
    "no layers": (["advise", "--n_layer=0", "--params=1e9", "--tokens=1e9"], "--n_layer"),
    "flag of another command": (["report", "--jobs=2"], "--jobs"),
    "absurd size": (["advise", "--n_layer=2", "--params=1e40", "--tokens=1e9"], "--params"),
    "more GPUs than tokens": (["advise", "--n_layer=2", "--params=1e8", "--tokens=1e6", "--gpus=11"], "--gpus"),
    "unwritable config": (["advise", "--n_layer=2", "--params=1e8", "--tokens=1e9", "--out=no/a.py"], "no/a.py"),
    "a switch of train.py": (["run", "gqa", "--plan"], "--plan"),
    "the seed": (["run", "gqa", "--seed=3"], "--seeds"),
    "two families": (["run", "gqa", "depth"], "depth"),
    "no seeds": (["run", "gqa", "--seeds=0"], "--seeds"),
}


@pytest.mark.parametrize("args, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(args, said, run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_mistake(run_main(recipe, *args), said)


def test_a_mistake_on_a_real_command_line_is_one_line_and_status_2(tmp_path):
    assert_mistake(run_script("recipe.py", "diagnose", "nowhere", cwd=tmp_path), "nowhere")
