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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SHARED, assert_mistake, run_python, run_script

import recipe
from model import UserError
from recipe import FAMILIES, PAPER, Job, config, diagnose, folders, label, read_rows, report, row_of
from train import bare, load_settings, vocabulary

SCALES = ("laptop", "paper")
MEMBERS = list(dict.fromkeys(member for members in FAMILIES.values() for member in members))


def arguments(**changes):
    """What `recipe.py run` reads from its command line; results.jsonl is in the folder `out`."""
    args = dict(family="gqa", scale="laptop", seeds=1, jobs=1, tasks=[], only="variance", settings=[], dry_run=False,
                out="out") | changes
    return SimpleNamespace(**dict(results=Path(args["out"], "results.jsonl")) | args)


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
    monkeypatch.setattr(recipe, "product_rate", lambda: 3e8)
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
                        f"parameters, {tokens:,} tokens, {flops:.2g} FLOPs, {hours:.2f} h; to do: train, probe, record")
        assert hours > 1                                            # so that its digits say something
    assert last.startswith(f"{total:.1f} h of training on {machine}, one run at a time")


@pytest.mark.parametrize("todo, said", [({}, "nothing"), ({"probe": []}, "probe")])
def test_what_is_trained_costs_no_more_hours(todo, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "commands", lambda job, args, row: todo)
    recipe.run_family(arguments(scale="paper", dry_run=True, out=str(tmp_path)))
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
    rows = table_rows(text)
    assert rows["config"] == ["`gqa_1`", "`gqa_4`", "`gqa_16`"]
    for k, member in enumerate(("gqa_1", "gqa_4", "gqa_16")):
        run_dir = folders(out.parent, "laptop")[member] / "seed_0"
        saved = torch.load(run_dir / "ckpt.pt", weights_only=True)
        assert saved["step"] == 3
        heads[member] = saved["settings"]["n_kv_head"]
        r = json.loads((run_dir / "probe.json").read_text())
        log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        found = {"val loss": log[-1]["val_loss"], "last var.": r["variance"][-1], "useful": r["usefulness"]["score"]}
        for name, value in found.items():
            assert float(rows[name][k]) == pytest.approx(value, abs=6e-4)
    assert heads == {"gqa_1": 4, "gqa_4": 2, "gqa_16": 1}


def test_what_is_finished_is_not_run_again(ran, again):
    where = ran[0]
    before = {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}
    said = again()
    assert ": train" not in said and ": probe" not in said
    assert before == {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}


@pytest.mark.parametrize("more, nothing, probe, both", [
    ([], 3, 0, 0),
    (["--results", "elsewhere.jsonl"], 0, 0, 0),                     # all is there, but in another file
    (["--only", "variance,usefulness,removal"], 0, 3, 0),
    (["--save_interval=1", "--compile=false"], 3, 0, 0),             # how it is computed, not what
    (["--learning_rate=1e-4"], 0, 0, 3),
    (["--seeds", "2"], 3, 0, 3),
])
def test_a_dry_run_says_what_is_to_do(again, more, nothing, probe, both):
    said = again("--dry-run", *more)
    todo = [line.partition("to do: ")[2] for line in said.splitlines() if "to do" in line]
    record = 3 - nothing - probe if not both else 0
    assert sorted(todo) == (["nothing"] * nothing + ["probe, record"] * probe + ["record"] * record
                            + ["train, probe, record"] * both)
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
    assert recipe.commands(job, arguments(only="variance,lens", settings=settings)) == {"record": []}
    (out / "probe.json").write_text(json.dumps(r))
    assert "--only=variance,lens" in recipe.commands(job, arguments(only="variance,lens", settings=settings))["probe"]
    os.utime(out / "ckpt.pt")                              # trained on since: what was probed is of the past
    with pytest.raises(ValueError, match="older than the checkpoint"):
        row_of(job, config("gqa_4", "laptop"))
    assert "probe" in recipe.commands(job, args)
    os.utime(out / "probe.json")
    row = row_of(job, config("gqa_4", "laptop"))
    assert row["scores"]["last var."] == pytest.approx(before["variance"][-1], rel=1e-5)
    assert row["experiments"] == ["variance", "usefulness", "lens"]


def test_a_run_is_recorded_beside_the_runs_if_its_settings_are_ones_own(ran):
    where, settings, done = ran
    path = where / "out/recipe/laptop/results.jsonl"
    rows, damaged = read_rows(path)
    assert sorted(row["member"] for row in rows) == ["gqa_1", "gqa_16", "gqa_4"] and not damaged
    for row in rows:
        assert row["settings"]["max_steps"] == 3 and "out_dir" not in row["settings"] and row["seed"] == 0
        run_dir = folders(where / "out/recipe", "laptop")[row["member"]] / "seed_0"
        r = json.loads((run_dir / "probe.json").read_text())
        assert row["probe"]["usefulness"]["ratio"] == pytest.approx(r["usefulness"]["ratio"], rel=1e-5)
        assert row["probe"]["variance"] == pytest.approx(r["variance"], rel=1e-5)
        assert row["torch"] == torch.__version__ and row["processor"] and row["corpus"]
    assert done.out.count(f"recorded in {path.relative_to(where)}") == 3


def test_a_machine_that_has_the_rows_alone_has_nothing_to_do(ran, run_main, tmp_path, monkeypatch):
    where, settings, done = ran
    (tmp_path / "rows.jsonl").write_text((where / "out/recipe/laptop/results.jsonl").read_text() + '{"member": "gq')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe.subprocess, "Popen", None)
    said = run_main(recipe, *COMMAND, *settings, "--results", "rows.jsonl")
    assert said.status == 0 and (where / "out/recipe/laptop/gqa.md").read_text() in said.out
    assert "rows.jsonl: line 4 is damaged" in said.out and not list(tmp_path.rglob("*.pt"))


def test_rows_of_other_settings_are_named_below_the_tables(ran, run_main, monkeypatch):
    monkeypatch.chdir(ran[0])
    results = ["--results", "out/recipe/laptop/results.jsonl"]
    said = run_main(recipe, "report", *results)
    assert_mistake((said.status, "", said.err), "no finished run")
    line, = said.out.splitlines()
    assert line.startswith("out/recipe/laptop/results.jsonl: left out") and line.count("gqa_4 seed 0 (") == 1
    assert "max_steps" in line and "out_dir" not in line and "seed," not in line
    said = run_main(recipe, "report", *results, *ran[1])
    assert said.status == 0 and "left out" not in said.out and "`gqa_4`" in said.out


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
            "variance": [1.0, 2.0], "run": {"experiments": ["variance"], "weights": 1}}))
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
    rows, _ = read_rows(args.results)
    assert [row["member"] for row in rows] == [f"context_{T}" for T in (256, 2048, 4096, 8192)]
    assert left("context_256") == {"record": []}                          # no row was given it
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


# ---- results.jsonl ---------------------------------------------------------------------------------------------------
@pytest.fixture
def invent(tmp_path):
    """invent(member, seed, ...) writes the files of a finished run of two blocks, with these numbers in them."""
    def write(member, seed=0, useful=0.5, variance=7.0, val_loss=1.25, accuracy=None, **more):
        out = folders(tmp_path / "out", "laptop")[member] / f"seed_{seed}"
        out.mkdir(parents=True)
        log = [{"step": 10, "loss": 3.0, "variance": [0.1, 2.0, 90.0]},
               {"step": 15, "loss": 2.0},
               {"step": 20, "loss": 1.0, "variance": [0.1, 3.0, variance]},
               {"step": 20, "val_loss": val_loss}]
        (out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
        result = {
            "run": {"experiments": ["usefulness"]}, "seconds": {"usefulness": 3.0},
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


@pytest.fixture
def record(invent, tmp_path):
    """record(member, seed, ...) invents a run and records it; returns its row."""
    def write(member, seed=0, **numbers):
        args = arguments(out=str(tmp_path / "out"))
        assert recipe.record(Job(member, seed, invent(member, seed, **numbers)), args)
        return read_rows(args.results)[0][-1]
    return write


def test_a_row_says_what_the_files_of_its_run_say(record):
    row = record("gqa_4", 3, variance=7.5)
    assert (row["member"], row["seed"], row["settings"]["n_kv_head"]) == ("gqa_4", 3, 2)
    assert row["curve"] == [[10, 90.0], [20, 7.5]]
    found = row["scores"]
    assert found["last var."] == 7.5 and found["val loss"] == 1.25 and found["train loss"] == 2.0
    assert found["peak var."] == 90.0 and found["key heads"] == 0.5 and found["active FFN"] == 1.0
    assert found["growth"] == pytest.approx(math.log(7.5 / 3.0) / 7, rel=1e-5)             # the config has 8 blocks
    assert found["|J-I|/d"] == 0.375 and found["influence"] == pytest.approx(0.255)
    assert found["rel.causal"] == 0.375 and found["rel.useful"] == 1.0
    assert row["probe"]["usefulness"]["ratio"] == [1.2, 1.05] and row["probe"]["variance"] == [0.1, 3.0, 7.5]
    assert "causal" not in row["probe"] and "causal" not in row["probe"]["released"]        # n x n numbers
    assert "seconds" not in row["probe"]


def test_how_sparse_a_model_is_stands_in_its_row(record):
    """Counted weight by weight, in a model of one expert weight near zero in two and nothing else."""
    c = config("moe_1b", "laptop")
    model = bare(replace(c, vocab_size=4))
    kinds = {name.removesuffix(".weight"): w for name, w in model.blocks[0].named_parameters() if w.dim() > 1}
    shares = {name: {"below": [0.5 * ("ffn" in name and "router" not in name)] * c.n_layer} for name in kinds}
    sizes = {name: w.numel() for name, w in kinds.items()}
    near = sum(sizes[name] * shares[name]["below"][0] for name in kinds)
    found = record("moe_1b", sparsity={
        "weights": shares, "attention": {"effective_keys": [0.25, 0.75]}, "interaction_density": [0.1, 0.3]})["scores"]
    assert 0.4 < near / sum(sizes.values()) < 0.5
    assert found["near zero"] == pytest.approx(near / sum(sizes.values()), rel=1e-5)
    assert found["eff. keys"] == 0.5 and found["density"] == pytest.approx(0.2) and found["active FFN"] == 0.125


def test_forty_points_of_a_curve_are_kept_its_first_and_last_too(invent):
    out = invent("gqa_4")
    log = [{"step": k, "variance": [1.0, k / 7]} for k in range(1, 2001)]
    (out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    curve = row_of(Job("gqa_4", 0, out), config("gqa_4", "laptop"))["curve"]
    steps = [step for step, _ in curve]
    assert len(curve) == 40 and steps[0] == 1 and steps[-1] == 2000 and max(np.diff(steps)) < 53
    assert curve == [[k, float(f"{k / 7:.6g}")] for k in steps]


def test_two_hundred_rows_are_below_two_megabytes(record, tmp_path):
    """16 blocks of all that is measured by default, with numbers of all digits."""
    n = 16
    numbers = [math.pi ** k for k in range(n)]
    jacobian = dict.fromkeys(("deviation", "diagonal_mean", "diagonal_std", "spectral", "off_diagonal"), numbers)
    use = {"ratio": numbers, "score": 1 / 3, "mean_log_ratio": 1 / 7, "loose_fit": False}
    kinds = {name.removesuffix(".weight"): {"below": numbers, "hoyer": numbers} for name, w in
             bare(replace(config("ladder_g2", "laptop"), vocab_size=4)).blocks[0].named_parameters() if w.dim() > 1}
    record("ladder_g2", variance_growth=numbers, attn_variance=numbers, ffn_variance=numbers, usefulness=use,
           usefulness_heldout=use, jacobian=jacobian, block_influence=numbers,
           released={"usefulness": use, "variance": numbers, "jacobian": jacobian, "causal": [numbers] * n},
           removal=dict.fromkeys(("1", "2", "4", "8", "attn", "ffn"), numbers),
           sparsity={"weights": kinds, "interaction_density": numbers, "below": 0.1, "attention": dict.fromkeys(
               ("entropy", "keys_for_90_percent", "effective_keys"), numbers)})
    line = (tmp_path / "out/results.jsonl").read_text()
    assert 200 * len(line) < 2.6e6 and line.count("\n") == 1     # most runs have 8 blocks


def test_the_newest_row_of_a_run_counts_and_one_of_other_settings_does_not(record, tmp_path):
    first = record("gqa_4", 0, useful=0.25)
    path = tmp_path / "out/results.jsonl"
    again = first | {"scores": first["scores"] | {"useful": 0.75}}
    other = first | {"settings": first["settings"] | {"max_steps": 7}}
    with open(path, "a") as f:
        f.write(json.dumps(again) + "\n" + json.dumps(other) + "\n")
    rows, damaged = read_rows(path)
    c = config("gqa_4", "laptop")
    assert not damaged and recipe.find_row(rows, c, 0) == again and recipe.find_row(rows, c, 1) is None
    assert recipe.find_row(rows, replace(c, max_steps=7), 0) == other
    assert recipe.runs_of("gqa", rows, arguments())["gqa_4"] == [again]


def test_a_row_goes_to_a_line_of_its_own_after_one_that_was_cut(record, tmp_path):
    path = tmp_path / "out/results.jsonl"
    path.parent.mkdir()
    path.write_text('{"member": "gqa_')
    row = record("gqa_4")
    record("gqa_16")
    rows, damaged = read_rows(path)
    assert damaged == [1] and rows[0] == row and [row["member"] for row in rows] == ["gqa_4", "gqa_16"]


def test_rows_that_are_recorded_at_the_same_time_do_not_mix(tmp_path, monkeypatch):
    """Long ones, so that a buffer would be written in pieces."""
    def long_row(job, c):
        text = chr(ord("a") + job.seed) * 300_000
        return {"member": job.member, "seed": job.seed, "settings": {"x": 1}, "experiments": [text], "scores": {"y": 2}}
    monkeypatch.setattr(recipe, "row_of", long_row)
    args = arguments(out=str(tmp_path / "out"))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: recipe.record(Job("gqa_4", seed, tmp_path), args), range(24)))
    rows, damaged = read_rows(args.results)
    assert not damaged and sorted(row["seed"] for row in rows) == list(range(24))
    assert all(set(row["experiments"][0]) == {chr(ord("a") + row["seed"])} for row in rows)


def test_what_cannot_be_recorded_is_said_and_is_not_done(invent, tmp_path, capsys):
    out = invent("gqa_4")
    (out / "probe.json").write_text("{")
    args = arguments(out=str(tmp_path / "out"))
    assert not recipe.record(Job("gqa_4", 0, out), args) and "cannot be recorded" in capsys.readouterr().out
    assert not args.results.exists()


def test_a_row_says_what_is_still_to_be_measured(record, tmp_path):
    row, args = record("gqa_4"), arguments(out=str(tmp_path / "out"), only="usefulness")
    job = Job("gqa_4", 0, tmp_path / "a new machine")
    assert recipe.commands(job, args, row) == {}
    args.only = "usefulness,lens"
    todo = recipe.commands(job, args, row)
    assert list(todo) == ["train", "probe", "record"] and "--only=usefulness,lens" in todo["probe"]
    args.only = "lens"                                     # the new row must not know less than the old one
    assert "--only=usefulness,lens" in recipe.commands(job, args, row)["probe"]
    args.only, args.tasks = "usefulness", ["copa"]
    assert recipe.commands(job, args, row)["probe"][-3:] == ["--only=usefulness,tasks", "--tasks", "copa"]


@pytest.mark.parametrize("given, place", [
    ([], "configs/laptop"), (["--save_interval=7", "--device=cpu"], "configs/laptop"),
    (["--max_steps=2000"], "configs/laptop"),                                             # what it is anyway
    (["--max_steps=20"], "out/laptop"), (["--top_k", "4"], "out/laptop")])
def test_rows_of_settings_of_ones_own_stay_out_of_what_git_keeps(given, place):
    path = recipe.default_results(arguments(settings=given))
    assert path == (ROOT / place if "configs" in place else Path(place)) / "results.jsonl"


def test_a_seed_of_everything_comes_before_the_next_and_the_long_families_have_three():
    jobs = recipe.jobs_of(list(FAMILIES), arguments(seeds=5))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    folder = folders("out", "laptop")
    short = {folder[member] for family in list(FAMILIES)[:5] for member in FAMILIES[family]}
    long = {folder[member] for family in ("ladder", "norms") for member in FAMILIES[family]} - short
    assert len(short) == 18 and len(long) == 17
    assert sorted((job.out.parent, job.seed) for job in jobs) == sorted(
        (place, seed) for places, seeds in ((short, 5), (long, 3)) for place in places for seed in range(seeds))
    assert {job.seed for job in recipe.jobs_of(["ladder"], arguments(seeds=5))} == set(range(5))


# ---- tables ----------------------------------------------------------------------------------------------------------
def test_the_table_holds_means_and_deviations_over_seeds_beside_the_papers_numbers(record, tmp_path, capsys):
    for seed, useful in enumerate((0.5, 0.75, 0.25)):
        record("gqa_4", seed, useful=useful, variance=3.0 + seed)
    record("gqa_1", 0, useful=1.0)
    report(arguments(out=str(tmp_path / "out")), ["gqa"])
    text = (tmp_path / "out/laptop/gqa.md").read_text()
    said = capsys.readouterr().out
    assert text in said and "not finished: gqa_16\n" in said
    rows = table_rows(text)
    assert rows.pop("") == ["G 1", "G 2 (paper: 4)"] and {len(row) for row in rows.values()} == {2}
    assert rows["config"] == ["`gqa_1`", "`gqa_4`"]
    assert rows["seeds"] == ["1", "3"] and rows["paper: ppl"] == ["14.52", "14.5"]
    assert (rows["paper: useful"][1], rows["paper: variance"][1]) == ("0.87", "125")
    assert rows["useful"] == ["1.000", f"0.500 ± {statistics.stdev([0.5, 0.75, 0.25]):.3f}"]
    assert rows["last var."][1] == "4.000 ± 1.000" and rows["peak var."][1] == "90.0 ± 0.0"
    assert rows["peak at"][1] == "0.500 ± 0.000" and rows["left of it"][1] == f"{4 / 90:.3f} ± {1 / 90:.3f}"
    assert rows["rel.causal"][1] == "0.375 ± 0.000" and rows["rel.useful"][1] == "1.000 ± 0.000"
    assert rows["val loss"][1] == "1.250 ± 0.000" and not {"accuracy", "loss", "paper: accuracy"} & set(rows)


def table_rows(text):
    """Of a Markdown table: the cells behind the first one, by that; the header's too."""
    lines = text.replace("\\|", "!").strip().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells.pop(1) == ["---"] * len(cells[0])
    return {first: rest for first, *rest in cells}


def test_runs_on_different_corpora_are_named(record, tmp_path, capsys):
    row = record("gqa_4")
    args = arguments(out=str(tmp_path / "out"))
    report(args, ["gqa"])
    assert "different corpora" not in capsys.readouterr().out
    with open(args.results, "a") as f:
        f.write(json.dumps(row | {"seed": 1, "corpus": 77}) + "\n")
    report(args, ["gqa"])
    assert "its runs saw 2 different corpora" in capsys.readouterr().out


def test_a_log_that_ends_within_a_line_or_is_gone_costs_no_result(invent):
    out = invent("gqa_4", variance=7.5)
    job, c = Job("gqa_4", 0, out), config("gqa_4", "laptop")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 21, "varian')
    assert row_of(job, c)["curve"] == [[10, 90.0], [20, 7.5]] and "peaked at 90" in diagnose(checkpoint(out))
    (out / "log.jsonl").unlink()
    row = row_of(job, c)
    assert row["scores"]["last var."] == 7.5 and "val loss" not in row["scores"] and row["curve"] == []


# ---- statistics ------------------------------------------------------------------------------------------------------
def t_density(x, df):
    """Student's t, as it is defined."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    return scale * (1 + x * x / df) ** (-(df + 1) / 2)


@pytest.mark.parametrize("n", range(2, 11))
def test_a_fortieth_of_students_t_lies_above_the_quantile(n):
    q = recipe.T_QUANTILES[n - 2]
    x = np.linspace(0, q, 200_001)
    y = t_density(x, n - 1)
    within = (y[1:] + y[:-1]).sum() / 2 * (x[1] - x[0])
    assert within == pytest.approx(0.475, abs=2e-5)
    mean, half = recipe.interval([float(k) for k in range(n)])
    assert mean == (n - 1) / 2 and half == pytest.approx(q * math.sqrt(n * (n + 1) / 12 / n))


def test_the_interval_of_many_is_not_too_narrow_and_of_one_there_is_none():
    values = [1.0, 2.0] * 10
    assert recipe.interval(values)[1] > 2.093 * statistics.stdev(values) / math.sqrt(20)          # t for n = 20
    assert recipe.interval([3.0])[0] == 3.0 and math.isnan(recipe.interval([3.0])[1])


@pytest.mark.parametrize("mean, half, before, after, said", [
    (0.2, 0.1, 0.75, 0.81, "reproduced"), (-0.2, 0.1, 0.75, 0.63, "reproduced"),
    (0.2, 0.1, 0.75, 0.63, "contradicted"), (-0.2, 0.1, 0.75, 0.81, "contradicted"),
    (0.1, 0.2, 0.75, 0.81, "undecided"), (-0.1, 0.2, 0.75, 0.81, "undecided"),
    (0.2, 0.1, 0.75, 0.75, "no direction"),
    (0.2, math.nan, 0.75, 0.81, "no interval"), (0.25, 1e-17, 0.75, 0.81, "no interval")])
def test_a_verdict_follows_from_the_interval_and_the_papers_direction(mean, half, before, after, said):
    assert recipe.verdict(mean, half, before, after) == said


@pytest.mark.parametrize("family", FAMILIES)
def test_a_member_is_compared_with_one_of_its_family_that_has_less_turned(family):
    for member in FAMILIES[family]:
        base = recipe.baseline(family, member)
        assert base in FAMILIES[family]
        here, there = (recipe.knobs(config(name, "paper")) for name in (member, base))
        turned = {knob for knob in here if here[knob] != there[knob]}
        assert len(turned) == (0 if member in (base, "dense_400m", *SAME) else 1) or family in ("moe", "ladder"), member
        if family == "ladder" and member not in ("ladder_16", "ladder_32"):
            path = recipe.arguments(member, "paper")[0]
            assert base == Path(runpy.run_path(path)["base"]).stem                        # what its config starts from


SAME = {"depth_16", "weight_decay_0_1", "context_2048", "gqa_1"}


def test_differences_are_paired_by_seed(record, tmp_path):
    """Seeds differ by more than members do: only pairs see that, and seed 9 has no partner."""
    for seed in (0, 1, 2):
        for member, more in (("gqa_1", 0), ("gqa_4", 0.0625 + seed / 1024)):
            use = {"score": 0.5, "mean_log_ratio": seed + more, "ratio": [1.2, 1.0], "loose_fit": False}
            record(member, seed, usefulness=use, variance=3.0 * math.exp(seed - more))
    record("gqa_4", 9, usefulness={"score": 0.5, "mean_log_ratio": 50.0, "ratio": [1, 1], "loose_fit": False})
    rows, _ = read_rows(tmp_path / "out/results.jsonl")
    runs = recipe.runs_of("gqa", rows, arguments())
    values = [0.0625 + seed / 1024 for seed in range(3)]
    assert recipe.paired(runs["gqa_4"], runs["gqa_1"], "log ratio") == pytest.approx(values, rel=1e-4)
    rows = table_rows(recipe.differences("gqa", runs, "laptop"))
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert rows[""] == ["G 2 (paper: 4) vs G 1"]
    assert rows["log ratio"] == [f"{values[1]:+.3f} ± {half:.3f} (n = 3) reproduced"]
    assert rows["useful"] == ["+0.000 (n = 3) no interval"]
    assert rows["ln last var."] == [f"{-values[1]:+.3f} ± {half:.3f} (n = 3) reproduced"]
    assert rows["causal"] == ["+0.000 (n = 3)"]                # of which the paper says nothing here


def test_a_claim_counts_the_verdicts_on_its_comparisons(record, tmp_path):
    """From 16 on the variance grows with depth as the paper's does, from 12 to 16 not; the released one otherwise."""
    noise = (1.0, 1.01, 0.99)

    def variances(defined, released):
        as_released = {"variance": [0.1, 3.0, released], "causal": [[0.0, 0.375], [0.0, 0.0]],
                       "usefulness": {"score": 1.0, "mean_log_ratio": 0.5, "loose_fit": False}}
        return {"variance": defined, "released": as_released}

    for seed in (0, 1, 2):
        for member, variance in (("depth_12", 5.0), ("depth_24", 6.0), ("depth_32", 8.0)):
            record(member, seed, **variances(variance * (1 + seed / 1024), released=2.0))
        record("depth_16", seed, **variances(4.0 * noise[seed], released=3.0 * noise[seed]))
    record("weight_decay_0", 0)
    rows, _ = read_rows(tmp_path / "out/results.jsonl")
    found = {family: recipe.runs_of(family, rows, arguments()) for family in ("depth", "weight_decay")}
    made = table_rows(recipe.claims(found))
    assert made.pop("the paper says") == ["verdict here", "first comparison"]
    assert list(made) == [claim.says for claim in recipe.CLAIMS]
    here, example = made["[depth]: the last variance grows"]
    assert here == "reproduced 2, contradicted 1 of 3"
    released = table_rows(recipe.claims_as_released(found))
    assert released["[depth]: the last variance grows"] == ["last var.", here, "reproduced 1, contradicted 2 of 3"]
    assert "[GQA] lowers perplexity a little" in made and "[GQA] lowers perplexity a little" not in released
    logs = [math.log(8 * (1 + seed / 1024) / 4 / noise[seed]) for seed in (0, 1, 2)]
    mean, half = statistics.mean(logs), 4.303 * statistics.stdev(logs) / math.sqrt(3)
    assert example == (f"`depth_32`: last var. times {math.exp(mean):.3g} "
                       f"({math.exp(mean - half):.3g} to {math.exp(mean + half):.3g})")
    assert made["[decay] lowers the variance"][0] == "undecided 1 of 1"          # a single seed
    assert made["[GQA] lowers the variance"] == ["not measured", ""]


@pytest.mark.parametrize("claim", recipe.CLAIMS, ids=lambda claim: claim.says)
def test_the_paper_has_numbers_for_every_comparison_of_a_claim(claim):
    for member in claim.members:
        numbers = (recipe.PAPER[claim.family][name] for name in (member, recipe.baseline(claim.family, member)))
        assert all(recipe.COMPARED[claim.column] in of_member for of_member in numbers)


def ranks_by_hand(values):
    places = {x: [k for k, y in enumerate(sorted(values), 1) if y == x] for x in values}
    return [statistics.mean(places[x]) for x in values]


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_pearsons_of_the_ranks(ties):
    rng = np.random.default_rng(3)
    x = rng.normal(size=30)
    y = x ** 3 + rng.normal(size=30)
    if ties:
        x, y = np.round(x), np.round(y)
    assert list(recipe.ranks(x)) == ranks_by_hand(list(x))
    truth = statistics.correlation(list(x), list(y), method="ranked") if sys.version_info >= (3, 12) else \
        np.corrcoef(ranks_by_hand(list(x)), ranks_by_hand(list(y)))[0, 1]
    assert recipe.spearman(x, y) == pytest.approx(truth) and recipe.spearman(np.exp(x), y) == pytest.approx(truth)
    assert recipe.spearman(x, -x) == pytest.approx(-1) and math.isnan(recipe.spearman(x, np.ones(30)))


def test_the_bootstrap_is_as_wide_as_theory_says_and_the_same_every_time():
    rng = np.random.default_rng(5)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    low, high = recipe.bootstrap(x, y)
    rho = recipe.spearman(x, y)
    width = math.tanh(math.atanh(rho) + 1.96 / math.sqrt(397)) - math.tanh(math.atanh(rho) - 1.96 / math.sqrt(397))
    assert low < rho < high and (high - low) == pytest.approx(1.06 * width, rel=0.15)         # Fisher's z, ranks
    assert recipe.bootstrap(x, y) == (low, high)


def test_the_mechanism_counts_every_run_once_and_leaves_out_what_does_not_vary(record, tmp_path):
    for seed in range(2):
        record("depth_16", seed, variance=7.0 + seed)                  # is the baseline of five families
        record("gqa_4", seed, variance=5.0 + seed)
        record("gqa_16", seed, variance=3.5 + seed / 8)
        record("depth_32", seed)                                           # has another depth
        record("weight_decay_0", seed)                                     # and this another decay
    rows, _ = read_rows(tmp_path / "out/results.jsonl")
    found = {family: recipe.runs_of(family, rows, arguments()) for family in ("depth", "gqa", "weight_decay")}
    rows = table_rows(recipe.mechanism(found, "laptop"))
    asked = rows.pop("")
    one = "norm pre, L 8, decay 0.064"
    assert list(rows) == ["all", "norm pre", "norm pre, L 8", one, "gqa"]     # within depth no measure of two varies
    assert asked == [f"{x} → {y}" for x, y in recipe.QUESTIONS]
    keys = {group: dict(zip(asked, cells))["key heads → growth"] for group, cells in rows.items()}
    assert keys["all"] == keys["norm pre"] and keys["all"].endswith("; 10)")
    assert keys["norm pre, L 8"].endswith("; 8)")
    assert keys["gqa"] == keys[one] and keys["gqa"].endswith("; 6)")
    share, growth = [1, 1, .5, .5, .25, .25], [math.log(v / 3) for v in (7, 8, 5, 6, 3.5, 3.625)]
    truth = np.corrcoef(ranks_by_hand(share), ranks_by_hand(growth))[0, 1]
    assert keys["gqa"].startswith(f"{truth:.2f} (")
    assert rows["all"][asked.index("active FFN → growth")] == rows["all"][asked.index("near zero → growth")] == ""


def test_the_depths_are_put_beside_the_paper_as_defined_and_as_released(record, tmp_path):
    record("depth_12", useful=0.875)
    record("depth_32", useful=0.25)
    rows, _ = read_rows(tmp_path / "out/results.jsonl")
    text = recipe.definitions(recipe.runs_of("depth", rows, arguments()), "laptop")
    rows = table_rows(text)
    assert rows.pop("") == ["L 6 (paper: 12)", "L 16 (paper: 32)", "mean distance"]
    assert rows.pop("paper: useful") == ["1", "0.562", ""] and rows.pop("paper: causal") == ["0.355", "0.259", ""]
    assert {name: row[0] for name, row in rows.items()} == {"useful": "0.875", "rel.useful": "1.000",
                                                            "causal": "0.250", "rel.causal": "0.375"}
    distances = (0.125 + 0.312) / 2, (0 + 0.438) / 2, (0.105 + 0.009) / 2, (0.02 + 0.116) / 2
    assert [float(row[2]) for row in rows.values()] == pytest.approx(distances, abs=6e-4)


# ---- figures ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def drawn(record, tmp_path):
    """drawn(draw, family, runs) records runs, the arguments of `invent` for each, and draws their family."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")

    def call(draw, family, runs):
        for member, seed, numbers in runs:
            record(member, seed, **numbers)
        rows, _ = read_rows(tmp_path / "out/results.jsonl")
        return draw(family, recipe.runs_of(family, rows, arguments()), "laptop")
    return call


DEPTH = [("depth_12", 0, dict(useful=0.5, variance=4.0, val_loss=1.5)),
         ("depth_12", 1, dict(useful=1.0, variance=6.0, val_loss=1.75)),
         ("depth_32", 0, dict(useful=0.25, variance=8.0, val_loss=1.0))]
DEPTH_LABELS = ["L 6 (paper: 12)", "L 16 (paper: 32)"]


def by_marker(ax, marker, **properties):
    """The (x, y) of all marks of a kind in a panel."""
    return [(float(x), float(y)) for line in ax.get_lines() if line.get_marker() == marker
            and all(getattr(line, f"get_{name}")() == value for name, value in properties.items())
            for x, y in zip(*line.get_data())]


def ends_of_bars(ax):
    """Where the error bars of a panel begin and end."""
    return [bars.get_segments()[0][:, 0].tolist() for container in ax.containers for bars in container.lines[2]]


def test_the_figure_has_a_panel_per_score_with_seeds_means_intervals_and_the_papers(drawn):
    fig = drawn(recipe.draw_scores, "depth", DEPTH)
    shown = {ax.get_title(): ax for ax in fig.axes if ax.get_visible()}
    assert list(shown) == ["log ratio", "usefulness", "usefulness as released", "causal score", "causal as released",
                           "permutation score", "last variance", "validation loss"]
    assert not any(ax.patches for ax in fig.axes)                                       # no bars
    boxes = [tuple(np.round(ax.get_position().bounds, 3)) for ax in shown.values()]
    assert len(set(boxes)) == len(boxes)                                                # no second axis in any panel
    useful = shown["usefulness"]
    assert by_marker(useful, "o", fillstyle="none") == [(0.5, 0.2), (1.0, 0.2), (0.25, 1.2)]
    assert by_marker(useful, "o", fillstyle="full") == [(0.75, 0.0)]                    # a single seed has no interval
    assert by_marker(useful, "D") == [(1.0, -0.2), (0.562, 0.8)]
    half = 12.706 * statistics.stdev([0.5, 1.0]) / math.sqrt(2)
    assert ends_of_bars(useful) == [pytest.approx([0.75 - half, 0.75 + half])]
    mean, half = math.log(24) / 2, 12.706 * statistics.stdev([math.log(4), math.log(6)]) / math.sqrt(2)
    assert ends_of_bars(shown["last variance"]) == [pytest.approx([math.exp(mean - half), math.exp(mean + half)])]
    assert by_marker(shown["last variance"], "o", fillstyle="full") == [(pytest.approx(math.sqrt(24)), 0.0)]
    assert by_marker(shown["causal as released"], "D") == by_marker(shown["causal score"], "D")
    assert fig.get_suptitle() == "depth: L layers; laptop scale, seeds: 1 to 2"
    assert by_marker(shown["validation loss"], "D") == [] and shown["last variance"].get_xscale() == "log"
    assert by_marker(shown["last variance"], "D") == [(400.0, -0.2), (1200.0, 0.8)]
    assert [x.get_text().replace("\n", " ") for x in fig.axes[0].get_yticklabels()] == DEPTH_LABELS
    low, high = fig.axes[0].get_ylim()
    assert low > high                                                                   # the first member is on top


def test_a_paper_variance_of_about_0_is_marked_at_the_end_of_the_log_axis(drawn):
    fig = drawn(recipe.draw_scores, "weight_decay", [("weight_decay_1", 0, {}), ("weight_decay_0", 0, {})])
    ax, = (ax for ax in fig.axes if ax.get_title() == "last variance")
    assert by_marker(ax, "<") == [(ax.get_xlim()[0], 0.8)] and by_marker(ax, "D") == [(320.0, -0.2)]
    assert ax.get_xlim()[0] < 7.0                                                       # left of what was measured
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a seed", "the paper's", "the paper's, about 0"]


def test_accuracy_has_a_panel_where_there_is_one_and_norms_have_no_paper(drawn):
    fig = drawn(recipe.draw_scores, "ladder", [("ladder_32", 0, dict(accuracy=0.25))])
    accuracy, = (ax for ax in fig.axes if ax.get_title() == "accuracy")
    assert by_marker(accuracy, "o", fillstyle="none") == [(0.25, 0.2)]
    fig = drawn(recipe.draw_scores, "norms", [("gqa_16,norm=peri", 0, {})])
    assert not any(by_marker(ax, "D") for ax in fig.axes)


def test_every_line_of_the_variance_over_training_is_named_where_it_ends(drawn):
    fig = drawn(recipe.draw_variance, "depth", DEPTH)
    ax, = fig.axes
    thin = [list(zip(*line.get_data())) for line in ax.get_lines() if line.get_linewidth() < 1]
    thick = [list(zip(*line.get_data())) for line in ax.get_lines() if line.get_linewidth() > 1]
    assert thin == [[(10, 90.0), (20, 4.0)], [(10, 90.0), (20, 6.0)], [(10, 90.0), (20, 8.0)]]
    assert thick == [[(10, pytest.approx(90)), (20, pytest.approx(math.sqrt(24)))],
                     [(10, pytest.approx(90)), (20, pytest.approx(8))]]
    assert not fig.legends and ax.get_legend() is None and ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.texts] == DEPTH_LABELS
    assert [text.xy for text in ax.texts] == [(20, pytest.approx(math.sqrt(24))), (20, pytest.approx(8))]


def test_names_of_lines_that_end_together_do_not_cover_each_other(drawn):
    fig = drawn(recipe.draw_variance, "depth", [(member, 0, dict(variance=variance)) for member, variance in (
        ("depth_12", 5.0), ("depth_16", 5.0), ("depth_24", 5.001), ("depth_32", 4.999))])
    fig.draw_without_rendering()
    text_alone = pytest.importorskip("matplotlib.text").Text.get_window_extent          # without the line to it
    boxes = sorted(text_alone(text).extents.tolist()[1::2] for text in fig.axes[0].texts)
    assert len(boxes) == 4 and all(top <= bottom for (_, top), (bottom, _) in zip(boxes, boxes[1:]))


def test_each_norm_has_a_panel_of_its_own(drawn):
    fig = drawn(recipe.draw_variance, "norms", [(f"{cure},norm={norm}", 0, {}) for cure in ("gqa_16", "moe_1b")
                                                for norm in ("lns", "peri")])
    assert [[text.get_text().split(",")[0] for text in ax.texts] for ax in fig.axes] == [["norm lns"] * 2,
                                                                                       ["norm peri"] * 2]


def test_everything_is_reported_from_results_alone(record, tmp_path, run_main, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    found = folders(tmp_path / "out", "laptop")
    for k, member in enumerate({folder: member for member, folder in found.items()}.values()):
        record(member, variance=5.0 + k)
    (tmp_path / "out/results.jsonl").rename(tmp_path / "results.jsonl")
    monkeypatch.chdir(tmp_path)
    said = run_main(recipe, "report", "--results=results.jsonl", "--out=elsewhere")
    assert said.status == 0, said
    for family in FAMILIES:
        for name in (family, f"{family}_differences"):
            assert (tmp_path / f"elsewhere/laptop/{name}.md").read_text().strip() in said.out
    for name in (*FAMILIES, *(f"{family}_variance" for family in FAMILIES), "mechanism"):
        path = tmp_path / f"elsewhere/laptop/{name}.png"
        assert path.stat().st_size > 10_000 and path.read_bytes().startswith(b"\x89PNG") and str(path.name) in said.out
        assert "<svg" in path.with_suffix(".svg").read_text()[:500]
    for name in ("depth_definitions", "mechanism", "claims", "claims_as_released"):
        assert (tmp_path / f"elsewhere/laptop/{name}.md").read_text().strip() in said.out
    fig = recipe.draw_mechanism({family: recipe.runs_of(family, read_rows(Path("results.jsonl"))[0], arguments())
                                 for family in FAMILIES})
    for ax in (ax for ax in fig.axes if ax.get_visible()):
        marks = sum(len(line.get_xdata()) for line in ax.get_lines())
        assert marks in (0, len(set(found.values())))                                   # each run once; 0: not measured


def test_without_matplotlib_there_is_a_table_and_the_remedy(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record("gqa_4")
    report(arguments(out=str(tmp_path / "out")), ["gqa"])
    assert "no figure: pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "out/laptop/gqa.md").exists() and not (tmp_path / "out/laptop/gqa.png").exists()


# ---- the course of a run ---------------------------------------------------------------------------------------------
def test_the_course_of_runs_is_drawn_from_their_logs(tmp_path, run_main):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    logs = {}
    for name, steps in (("a", 4), ("b", 6)):
        logs[name] = [{"step": k, "loss": 3.0 / k, "lr": 0.1 * k, "grad_norm": 2.0 * k} for k in range(1, steps + 1)]
        logs[name][-1] |= {"val_loss": 0.5, "variance": [1.0, 7.0 * steps]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs[name]))
    fig = recipe.draw_course(logs)
    shown = {ax.get_title(): [list(zip(*line.get_data())) for line in ax.get_lines()] for ax in fig.axes}
    assert shown["training loss"] == [[(line["step"], line["loss"]) for line in log] for log in logs.values()]
    assert shown["learning rate"][0] == [(k, 0.1 * k) for k in range(1, 5)]
    assert shown["validation loss"] == [[(4, 0.5)], [(6, 0.5)]] and shown["gradient norm"][1][5] == (6, 12.0)
    assert shown["variance of the last layer"] == [[(4, 28.0)], [(6, 42.0)]]
    said = run_main(recipe, "plot", tmp_path / "a", tmp_path / "b/log.jsonl")
    assert said.status == 0 and (tmp_path / "a/training.png").read_bytes().startswith(b"\x89PNG")
    assert run_main(recipe, "plot", tmp_path / "b", "--out", tmp_path / "c.png").status == 0
    assert (tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "{\n", "[1]\n", '{"loss": 1}\n'])
def test_a_log_that_cannot_be_drawn_is_one_line(text, tmp_path, run_main):
    (tmp_path / "log.jsonl").write_text(text)
    assert_mistake(run_main(recipe, "plot", tmp_path), "log.jsonl is damaged or empty")


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
    (dict(n_layer=200, params=1e8), ["n_layer", "n_embd", "active"]),
    (dict(n_layer=12, params=4e8, tokens=2e7, gpus=128), ["tokens", "block_size"])])
def test_advice_says_where_it_extrapolates(asked, names, advise):
    _, said = advise(**asked)
    assert [line.split()[1] for line in said.splitlines() if "EXTRAPOLATES" in line] == names
    assert "were asked for" not in said


@pytest.mark.parametrize("asked", [dict(n_layer=200, params=1e5), dict(n_layer=8, params=1e6),
                                   dict(n_layer=16, params=8e6)])
def test_where_experts_would_be_as_narrow_as_a_head_there_is_no_advice(asked, advise, tmp_path):
    with pytest.raises(UserError, match="below the range: with .* 64 experts of width .* configs/laptop/"):
        advise(**asked)
    assert not (tmp_path / "advised.py").exists()


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
    c = dict(n_layer=2, n_embd=1024, n_head=4, n_kv_head=4, n_experts=0, block_size=128, weight_decay=0.1,
             learning_rate=4e-4, max_steps=4768) | changes
    torch.save({"model": {}, "settings": c, "step": 20, "tokenizer": "bytes"}, out / "ckpt.pt")
    os.utime(out / "ckpt.pt", (0, 0))                                                        # probed later
    return out


def test_a_diagnosis_says_what_the_run_and_its_probe_hold(invent):
    out = checkpoint(invent("gqa_4", variance=9.0))
    said = diagnose(out)
    assert said == diagnose(out / "ckpt.pt").replace(f"{out}/ckpt.pt: 1 of", f"{out}: 1 of")
    assert "1 of 2 blocks are useful: 0\n" in said and "x3.0 from the first block to the last, 3 to 9" in said
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
    assert first.startswith(f"next in the paper's ladder: {knobs[0]} ") and recipe.LADDER[knobs[0]] in first
    assert re.findall("[a-z]+_[a-z_]+", then) == knobs[1:] and (len(knobs) > 1 or then == "then: nothing")


@pytest.mark.parametrize("width, T, decay, experts", [(64, 256, 0.192, 16), (1024, 4096, 0.3, 64)])
def test_the_next_step_is_as_far_as_it_is_in_models_of_this_size(invent, width, T, decay, experts):
    ladder = config("ladder_moe", "laptop" if width == 64 else "paper")
    out = checkpoint(invent("gqa_4"), n_embd=width, learning_rate=2 * ladder.learning_rate,
                     max_steps=ladder.max_steps)
    *_, first, then = diagnose(out).splitlines()
    assert first.startswith(f"next in the paper's ladder: block_size {T:.3g}, here 128; in the paper T = 4096: ")
    goal = f"weight_decay {decay / 2:.3g}, " if decay / 2 > 0.1 / 0.95 else ""      # at twice the learning rate
    assert then == f"then: {goal}n_kv_head 2, n_experts {experts}"


def test_no_more_decay_is_advised_than_the_papers_ladder_has(invent):
    *_, first, _ = diagnose(checkpoint(invent("gqa_4", variance=31.0), max_steps=20)).splitlines()
    assert first.startswith("next in the paper's ladder: weight_decay 1, here 0.1;")


def test_a_model_of_others_is_told_what_the_ladder_has(invent):
    """No learning rate, no steps, no decay is known of it; of five heads only one key head can be shared."""
    out = invent("gqa_4")
    c = dict(n_layer=2, n_embd=640, n_head=5, n_kv_head=5, n_experts=0, block_size=8192)
    torch.save({"model": {}, "settings": c, "step": 20, "tokenizer": "bytes"}, out / "ckpt.pt")
    os.utime(out / "ckpt.pt", (0, 0))
    *_, first, then = diagnose(out).splitlines()
    assert "ladder: weight_decay 0.3, here None" in first and then == "then: n_kv_head 1, n_experts 64"


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


def test_a_run_that_is_not_probed_is_told_how(invent):
    out = checkpoint(invent("gqa_4"))
    (out / "probe.json").unlink()
    with pytest.raises(UserError, match=f"not probed yet: python probe.py {out}/ckpt.pt"):
        diagnose(out)


def test_a_run_that_is_probed_in_part_is_told_what_is_missing_and_on_which_tokens(invent):
    out = checkpoint(invent("gqa_4"))
    r = json.loads((out / "probe.json").read_text())
    r["run"] = {"samples": 8, "length": 32}
    del r["usefulness"], r["usefulness_heldout"]
    (out / "probe.json").write_text(json.dumps(r))
    command = f"python probe.py {out}/ckpt.pt --only .*usefulness.* --samples 8 --length 32$"
    with pytest.raises(UserError, match=f"usefulness.* not measured yet: {command}"):
        diagnose(out)


def test_a_tilde_is_the_home_folder(run_main, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    seen = []
    monkeypatch.setattr(recipe, "plot", seen.append)
    assert run_main(recipe, "plot", "~/a", "b", "--out=~/c.png").status == 0
    assert ([str(path) for path in seen[0].paths], str(seen[0].out)) == (["/home/me/a", "b"], "/home/me/c.png")


@pytest.mark.parametrize("file, text", [
    ("probe.json", "{"), ("probe.json", '{"loss": 1}'), ("log.jsonl", "{\n"),
    ("log.jsonl", '{"variance": [1.0]}\n')])
def test_a_run_without_a_whole_probe_names_the_command(invent, file, text):
    out = checkpoint(invent("gqa_4"))
    (out / file).write_text(text)
    with pytest.raises(UserError, match=f"python probe.py {out}/ckpt.pt"):
        diagnose(out)


# ---- mistakes --------------------------------------------------------------------------------------------------------
MISTAKES = {
    "nothing to report": (["report", "--results=none.jsonl"], "no finished run in none.jsonl"),
    "misspelt setting": (["report", "--sedes=2"], "--sedes"),
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
    "no log": (["plot", "nowhere"], "nowhere has no log.jsonl"),
}


@pytest.mark.parametrize("args, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(args, said, run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_mistake(run_main(recipe, *args), said)


def test_a_mistake_on_a_real_command_line_is_one_line_and_status_2(tmp_path):
    assert_mistake(run_script("recipe.py", "diagnose", "nowhere", cwd=tmp_path), "nowhere")
