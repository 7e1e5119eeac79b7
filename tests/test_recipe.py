"""recipe.py against the paper's own numbers, hand arithmetic and runs whose outcome is written by hand.

    python -m pytest -q tests/test_recipe.py                   # half a minute on two cores
"""
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipe
from model import UserError
from recipe import advise, diagnose, families, folders, measured, report
from train import bare, load_settings

ROOT = Path(__file__).resolve().parent.parent
SCALES = ("laptop", "paper")


def settings(member, scale):
    return load_settings([*recipe.arguments(member, scale), "--out_dir=any"])[0]


def cli(*args, cwd):
    command = [sys.executable, ROOT / "recipe.py", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def invent(tmp_path):
    """invent(member, seed, ...) writes the files of a finished run of two blocks, with these numbers in them."""
    def write(member, seed=0, useful=0.5, variance=7.0, val_loss=1.25, **more):
        out = folders(tmp_path / "out", "laptop")[member] / f"seed_{seed}"
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (
            {"step": 10, "variance": [0.1, 2.0, 90.0]}, {"step": 15}, {"step": 20, "variance": [0.1, 3.0, variance]},
            {"step": 20, "val_loss": val_loss})))
        (out / "probe.json").write_text(json.dumps({
            "loss": 1.0, "variance": [0.1, 3.0, variance], "causal_mean": 0.25, "causal": [[0.0, 0.25], [0.0, 0.0]],
            "permutation": [[0.0, 0.75], [0.75, 0.0]], "permutation_mean": 0.75,
            "usefulness": {"score": useful, "mean_log_ratio": 0.125, "ratio": [1.2, 1.05], "loose_fit": False},
            "permutation_pairs": 1, "released": {
                "causal": [[0.0, 0.375], [0.0, 0.0]],
                "usefulness": {"score": 1.0, "mean_log_ratio": 0.5, "loose_fit": False}},
            "block_influence": [0.5, 0.01], "removal": {"1": [1.5, 1.02]},
            "jacobian": {"deviation": [0.5, 0.25]}, **more}))
        return out
    return write


# ---- the families ----------------------------------------------------------------------------------------------------
def test_the_ladder_climbs_by_the_points_of_the_abstract():
    ladder = families()["ladder"]
    assert ladder["ladder_moe"]["accuracy"] - ladder["ladder_32"]["accuracy"] == pytest.approx(4.6)


def test_every_reported_usefulness_is_a_share_of_the_blocks_of_its_model():
    for family in ("depth", "weight_decay", "context", "gqa", "moe", "ladder"):
        for member, reported in families()[family].items():
            share = reported["useful"] * settings(member, "paper").n_layer
            assert abs(share - round(share)) <= 0.0051 * settings(member, "paper").n_layer + 1e-9, member


def test_reported_numbers_are_those_of_the_facts():
    facts = ROOT.parent / "shared/paper/facts.md"
    if not facts.exists():
        pytest.skip("the paper's facts do not lie beside this checkout")
    rows = [[cell.strip(" *|") for cell in line.split("|")[1:-1]] for line in facts.read_text().splitlines()]
    depth = {int(row[0]): [float(x) for x in row[1:]] for row in rows
             if len(row) == 4 and row[0] in ("12", "16", "24", "32") and "~" not in row[3]}
    for L, values in depth.items():
        reported = families()["depth"][f"depth_{L}"]
        assert [reported["causal"], reported["permuted"], reported["useful"]] == values
    sweeps = [row for row in rows if len(row) == 7]
    for row in sweeps:
        for prefix, (knob, ppl, useful) in (("weight_decay", row[:3]), ("context", row[4:])):
            if ppl.replace(".", "").isdigit():
                member = f"{prefix}_{float(knob):g}".replace(".", "_")
                reported = families()[prefix][member]
                assert (reported["ppl"], reported["useful"]) == (float(ppl), float(useful)), member
    assert len(depth) == 4 and len(sweeps) > 6
    names = {"1 (MHA)": "gqa_1", "4": "gqa_4", "16": "gqa_16", "Dense 400M": "dense_400m", "Dense 1B": "dense_1b",
             "MoE 2B / 400M active": "moe_400m", "MoE 7B / 1B active": "moe_1b"}
    found = {names[row[0]]: row[1:] for row in rows if len(row) == 4 and row[0] in names}
    assert len(found) == 7
    for member, (ppl, useful, variance) in found.items():
        reported = families()["gqa" if "gqa" in member else "moe"][member]
        assert (reported["ppl"], reported["useful"]) == (float(ppl), float(useful)), member
        assert reported.get("variance") == (float(variance.strip("~")) if variance else None), member
    for step, (_, accuracy, useful) in zip(families()["ladder"].values(), [
            row for row in rows if len(row) == 3 and row[1].replace(".", "").isdigit()][-9:]):
        assert (step["accuracy"], step["useful"]) == (float(accuracy), float(useful))


@pytest.mark.parametrize("scale", SCALES)
def test_members_of_a_family_see_the_same_tokens(scale):
    for family, members in families().items():
        if family == "norms" and scale == "paper":
            continue                     # its members are of several families, whose steps the paper sized differently
        budgets = {(c.max_steps * c.tokens_per_step, c.tokens_per_step, c.data, c.learning_rate)
                   for c in (settings(member, scale) for member in members)}
        assert len(budgets) == 1, family


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pair", [("dense_1b", "moe_1b"), ("dense_400m", "moe_400m"), ("ladder_g2", "ladder_moe")])
def test_dense_and_moe_are_compared_at_equal_active_flops(scale, pair):
    dense, moe = (settings(member, scale) for member in pair)
    dense.vocab_size = moe.vocab_size = dense.vocab_size or 320
    router = 3 * 2 * moe.n_layer * moe.n_embd * moe.n_experts
    assert bare(moe).flops_per_token() - router == bare(dense).flops_per_token()


def test_a_laptop_member_stands_to_its_base_as_the_papers_does():
    base = {scale: settings("dense_1b", scale) for scale in SCALES}
    for member in (member for members in families().values() for member in members):
        laptop, paper = (settings(member, scale) for scale in SCALES)
        assert laptop.norm == paper.norm and (laptop.n_experts > 0) == (paper.n_experts > 0)
        assert laptop.n_layer / 8 == paper.n_layer / 16
        if member.partition(",")[0] not in ("depth_12", "depth_16", "depth_24", "depth_32"):
            assert laptop.block_size / base["laptop"].block_size == paper.block_size / base["paper"].block_size
        assert laptop.weight_decay == pytest.approx(0.64 * paper.weight_decay)
        if paper.n_experts:
            assert laptop.top_k / laptop.n_experts == paper.top_k / paper.n_experts


def test_the_laptops_decay_does_what_the_papers_does():
    for member in families()["weight_decay"]:
        laptop, paper = (settings(member, scale) for scale in SCALES)
        assert laptop.learning_rate * laptop.weight_decay * laptop.max_steps == pytest.approx(
            paper.learning_rate * paper.weight_decay * paper.max_steps, rel=0.01)


@pytest.mark.parametrize("scale", SCALES)
def test_members_share_a_folder_exactly_if_their_settings_are_equal(scale):
    found = folders("out", scale)
    of = {member: settings(member, scale) for member in found}
    for a in found:
        for b in found:
            assert (found[a] == found[b]) == (of[a] == of[b]), (a, b)


# ---- running ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ran(corpus, tmp_path_factory):
    """A family run with real processes: its folder, the command and what it printed."""
    where = tmp_path_factory.mktemp("recipe")
    command = ["run", "gqa", "--jobs", "2", "--only", "variance,usefulness", "--n_layer=2", "--n_embd=16",
               "--max_steps=3", "--warmup_steps=1", "--block_size=32", "--tokens_per_step=256", "--eval_tokens=256",
               "--stats_interval=1", f"--data={corpus}"]
    return where, command, cli(*command, cwd=where)


def test_a_family_is_trained_probed_and_tabulated(ran):
    where, _, done = ran
    assert done.returncode == 0, done.stdout + done.stderr
    out = where / "out/recipe/laptop"
    text = (out / "gqa.md").read_text()
    assert text in done.stdout
    for member in ("gqa_1", "gqa_4", "gqa_16"):
        run_dir = folders(out.parent, "laptop")[member] / "seed_0"
        assert torch.load(run_dir / "ckpt.pt", weights_only=True)["step"] == 3
        r = json.loads((run_dir / "probe.json").read_text())
        log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        row = next(line for line in text.splitlines() if f"`{member}`" in line)
        for value in (log[-1]["val_loss"], r["variance"][-1], r["usefulness"]["score"]):
            assert f" {value:.3f} " in row
    heads = {member: torch.load(folders(out.parent, "laptop")[member] / "seed_0/ckpt.pt", weights_only=True)["settings"]
             ["n_kv_head"] for member in families()["gqa"]}
    assert heads == {"gqa_1": 4, "gqa_4": 2, "gqa_16": 1}


def test_what_is_finished_is_not_run_again_and_what_changed_is(ran):
    where, command, _ = ran
    before = {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}
    plan = cli(*command, "--dry-run", cwd=where)
    assert plan.returncode == 0 and plan.stdout.count("to do: nothing") == 3 and "0.0 h" in plan.stdout
    again = cli(*command, cwd=where)
    assert again.returncode == 0 and ": train" not in again.stdout and ": probe" not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in where.rglob("*.pt")}
    more = cli(*command, "--only", "variance,usefulness,removal", "--dry-run", cwd=where)
    assert more.stdout.count("to do: probe") == 3
    saved = cli(*command, "--save_interval=1", "--compile=false", "--dry-run", cwd=where)
    assert saved.stdout.count("to do: nothing") == 3
    other = cli(*command, "--learning_rate=1e-4", "--dry-run", cwd=where)
    assert other.stdout.count("to do: train, probe") == 3
    seeds = cli(*command, "--seeds", "2", "--dry-run", cwd=where)
    assert seeds.stdout.count("to do: nothing") == 3 and seeds.stdout.count("to do: train, probe") == 3


def test_another_experiment_does_not_lose_those_that_are_there(ran):
    where, command, _ = ran
    out = folders(where / "out/recipe", "laptop")["gqa_4"] / "seed_0"
    before = json.loads((out / "probe.json").read_text())
    args = type("Args", (), dict(scale="laptop", tasks=[], only="lens", settings=command[6:]))
    probe = recipe.commands("gqa_4", 0, out, args)[1]["probe"]
    assert subprocess.run(probe, cwd=where, capture_output=True).returncode == 0
    after = json.loads((out / "probe.json").read_text())
    assert after["lens"] and after["run"]["experiments"] == ["variance", "usefulness", "lens"]
    assert {k: after[k] for k in ("variance", "usefulness", "loss")} == {k: before[k] for k in (
        "variance", "usefulness", "loss")}
    os.utime(out / "ckpt.pt")                              # trained on since: what was probed is of the past
    assert measured(out) == {} and "probe" in recipe.commands("gqa_4", 0, out, args)[1]
    os.utime(out / "probe.json")
    assert measured(out)["last var."] == pytest.approx(before["variance"][-1])


def test_a_run_of_other_settings_is_named_below_the_table(ran):
    where, _, _ = ran
    said = cli("report", cwd=where)
    assert said.returncode == 0
    lines = [line for line in said.stdout.splitlines() if "other settings" in line and "gqa_4" in line]
    assert len(lines) == 1 and lines[0].startswith("out/recipe/laptop/gqa_4/seed_0") and "max_steps" in lines[0]
    assert "out_dir" not in lines[0] and "seed:" not in lines[0]


def test_a_terminated_family_ends_its_run_and_begins_no_other(corpus, tmp_path):
    command = [sys.executable, ROOT / "recipe.py", "run", "gqa", "--n_layer=2", "--n_embd=16", "--block_size=32",
               "--tokens_per_step=256", f"--data={corpus}", "--eval_interval=0", "--max_steps=1000000"]
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


def test_a_failed_run_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def run_one(command, stdout, **_):
        out = Path(stdout.name).parent
        if "context_512" in str(out):
            return Ended(2)
        if "probe.py" in command[1]:
            (out / "probe.json").write_text(json.dumps({
                "usefulness": {"score": 0.5}, "variance": [1.0], "run": {"experiments": ["variance"]}}))
            (out / "log.jsonl").write_text(json.dumps({"step": 1, "variance": [1.0], "val_loss": 2.0}) + "\n")
        else:
            c = load_settings([x for x in command[2:] if x != "--resume"])[0]
            done = c.max_steps - ("context_1024" in str(out))          # as after a SIGTERM: status 0, but not the end
            torch.save({"model": {}, "settings": asdict(c), "step": done, "tokenizer": "bytes"}, out / "ckpt.pt")
        return Ended(0)

    class Ended(subprocess.CompletedProcess):
        def __init__(self, status):
            super().__init__([], status)

        def wait(self):
            return self.returncode

        def __hash__(self):
            return id(self)

    monkeypatch.setattr(recipe.subprocess, "Popen", run_one)
    args = type("Args", (), dict(family="context", scale="laptop", seeds=1, jobs=1, tasks=[], only="variance",
                                 settings=[], dry_run=False, out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="2 of 6 runs failed: .*context_512/seed_0, .*context_1024/seed_0"):
        recipe.run_family(args)
    said = capsys.readouterr().out
    for failed in ("context_512", "context_1024"):
        assert f"{failed}/seed_0: train failed" in said and f"{failed}/seed_0: probe" not in said
        assert f"{failed}`" not in said
    assert all(f"context_{T}`" in said for T in (256, 2048, 4096, 8192)) and "not finished: context_512" in said
    half = recipe.commands("context_1024", 0, tmp_path / "out/laptop/context_1024/seed_0", args)[1]
    assert half["train"][-1] == "--resume" and "probe" in half            # goes on from where it was
    done = recipe.commands("context_256", 0, tmp_path / "out/laptop/context_256/seed_0", args)[1]
    assert done == {}


def test_the_probe_takes_the_same_tokens_whatever_the_context(tmp_path):
    args = type("Args", (), dict(scale="laptop", tasks=["copa"], only="variance", settings=[]))
    for T in (256, 2048, 8192):
        c, todo = recipe.commands(f"context_{T}", 3, tmp_path, args)
        samples = int(next(x for x in todo["probe"] if x.startswith("--samples=")).split("=")[1])
        assert samples * c.block_size == 8192 and c.seed == 3 and todo["probe"][-3:] == [
            "--only=variance,tasks", "--tasks", "copa"]


# ---- tables ----------------------------------------------------------------------------------------------------------
def test_the_table_holds_means_and_deviations_over_seeds_beside_the_papers_numbers(invent, tmp_path, capsys):
    for seed, useful in enumerate((0.5, 0.75, 0.25)):
        invent("gqa_4", seed, useful, variance=3.0 + seed)
    invent("gqa_1", 0, 1.0)
    report(tmp_path / "out", "laptop", ["gqa"])
    text = (tmp_path / "out/laptop/gqa.md").read_text()
    assert text in capsys.readouterr().out
    head, *rows = [[cell.strip() for cell in line.replace("\\|", "!").split("|")[1:-1]] for line in text.splitlines()]
    assert {len(row) for row in rows} == {len(head)} and rows.pop(0) == ["---"] * len(head)
    one, four = (dict(zip(head, row)) for row in rows)
    assert (one[""], one["seeds"], one["useful"], one["paper: ppl"]) == ("`gqa_1`", "1", "1.000", "14.52")
    assert (four["seeds"], four["paper: useful"], four["paper: variance"]) == ("3", "0.87", "125")
    assert four["useful"] == f"0.500 ± {statistics.stdev([0.5, 0.75, 0.25]):.3f}"
    assert four["last var."] == "4.000 ± 1.000"
    assert four["rel.causal"] == "0.375 ± 0.000" and four["rel.useful"] == "1.000 ± 0.000"
    assert four["val loss"] == "1.250 ± 0.000" and "accuracy" not in head


def test_a_broken_or_unfinished_run_is_left_out(invent, tmp_path):
    (invent("gqa_4") / "probe.json").write_text("{")
    (invent("gqa_16") / "probe.json").unlink()
    assert measured(folders(tmp_path / "out", "laptop")["gqa_4"] / "seed_0") == {}
    with pytest.raises(UserError, match="no finished run"):
        report(tmp_path / "out", "laptop", ["gqa"])


def test_a_log_that_ends_within_a_line_or_is_gone_costs_no_result(invent):
    out = invent("gqa_4", variance=7.5)
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 21, "varian')
    assert measured(out)["curve"] == [(10, 90.0), (20, 7.5)] and "peaked at 90" in diagnose(checkpoint(out))
    (out / "log.jsonl").unlink()
    assert measured(out)["last var."] == 7.5 and math.isnan(measured(out)["val loss"])


def test_what_is_measured_of_a_run_is_what_its_files_say(invent):
    found = measured(invent("gqa_4", variance=7.5))
    assert found["curve"] == [(10, 90.0), (20, 7.5)] and found["last var."] == 7.5 and found["val loss"] == 1.25
    assert found["peak var."] == 90.0
    assert found["|J-I|/d"] == 0.375 and found["influence"] == pytest.approx(0.255)


def test_the_reasons_are_the_steps_of_the_reported_ladder():
    ladder = families()["ladder"]
    for knob, before, after in (("block_size", "ladder_32", "ladder_t4096"), ("weight_decay", "ladder_t4096",
                                "ladder_decay_0_3"), ("n_kv_head", "ladder_decay_0_3", "ladder_g2"),
                                ("n_experts", "ladder_g2", "ladder_moe")):
        for column, digits in (("accuracy", 1), ("useful", 2)):
            assert f"{ladder[before][column]:.{digits}f} -> {ladder[after][column]:.{digits}f}" in recipe.LADDER[knob]


def test_every_family_has_a_figure(invent, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    made = {}
    for family, members in families().items():
        for member in members:
            if folders(tmp_path / "out", "laptop")[member] not in made:
                made[folders(tmp_path / "out", "laptop")[member]] = invent(member)
    report(tmp_path / "out", "laptop", [*families()])
    for family in families():
        assert (tmp_path / f"out/laptop/{family}.png").stat().st_size > 10_000


# ---- the rule of thumb -----------------------------------------------------------------------------------------------
def advice(tmp_path, monkeypatch, capsys, **asked):
    monkeypatch.setattr(recipe, "plan", lambda c, gpus, mfu: f"plan of {gpus}")          # tested in test_scale.py
    args = dict(n_layer=32, params=1.2e9, tokens=1e10, gpus=8, out=str(tmp_path / "advised.py")) | asked
    advise(type("Args", (), args))
    return load_settings([str(tmp_path / "advised.py")])[0], capsys.readouterr().out


def test_advice_at_the_papers_size_is_the_papers_recipe(tmp_path, monkeypatch, capsys):
    c, said = advice(tmp_path, monkeypatch, capsys)
    theirs = settings("ladder_moe", "paper")
    for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "top_k", "expert_hidden", "block_size",
                 "weight_decay", "tokens_per_step", "max_steps", "learning_rate", "warmup_steps"):
        assert getattr(c, name) == getattr(theirs, name), name
    assert "EXTRAPOLATES" not in said and "plan of 8" in said


@pytest.mark.parametrize("asked", [dict(n_layer=12, params=4e8), dict(n_layer=64, params=7e9, tokens=1e11, gpus=64),
                                   dict(n_layer=16, params=2e7, tokens=2e8, gpus=1)])
def test_advice_meets_the_size_and_the_tokens_that_were_asked_for(asked, tmp_path, monkeypatch, capsys):
    c, _ = advice(tmp_path, monkeypatch, capsys, **asked)
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
def test_advice_says_where_it_extrapolates(asked, names, tmp_path, monkeypatch, capsys):
    _, said = advice(tmp_path, monkeypatch, capsys, **asked)
    assert [line.split()[1] for line in said.splitlines() if "EXTRAPOLATES" in line] == names
    assert ("1e+05 were asked for" in said) == (asked.get("params") == 1e5)


def test_advice_keeps_the_context_of_the_recipe_on_many_gpus(tmp_path, monkeypatch, capsys):
    c, said = advice(tmp_path, monkeypatch, capsys, gpus=1024)
    assert (c.block_size, c.tokens_per_step, c.max_steps) == (4096, 2**22, 2384) and "EXTRAPOLATES" not in said


def test_an_advised_config_stands_alone(tmp_path, monkeypatch, capsys):
    advice(tmp_path, monkeypatch, capsys)
    assert "base" not in (tmp_path / "advised.py").read_text().replace("baseline", "")
    with pytest.raises(UserError, match="advised.py exists"):
        advice(tmp_path, monkeypatch, capsys)


def checkpoint(out, **changes):
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
    assert "peaked at 90, step 10" in said and "near the identity (influence below 0.02): 1" in said
    assert f"cheapest run of 1: blocks 1, perplexity x{math.exp(0.02):.3f}" in said and "--drop 1" in said


@pytest.mark.parametrize("changes, variance, knob", [
    ({}, 9.0, "block_size"), ({}, 31.0, "weight_decay"), ({"block_size": 4096}, 9.0, "weight_decay"),
    ({"block_size": 4096, "weight_decay": 0.3}, 9.0, "n_kv_head"),
    ({"block_size": 4096, "weight_decay": 0.192, "learning_rate": 3e-3, "max_steps": 2000}, 31.0, "n_kv_head"),
    ({"block_size": 4096, "weight_decay": 0.3, "n_kv_head": 2}, 9.0, "n_experts")])
def test_the_next_knob_is_the_first_step_of_the_ladder_not_taken(invent, changes, variance, knob):
    said = diagnose(checkpoint(invent("gqa_4", variance=variance), **changes)).splitlines()
    said = next(line for line in said if line.startswith("next"))
    assert said.startswith(f"next in the paper's ladder: {knob}, here ")


def test_a_stream_without_variance_is_diagnosed(invent):
    out = checkpoint(invent("gqa_4"))
    r = json.loads((out / "probe.json").read_text())
    (out / "probe.json").write_text(json.dumps(r | {"variance": [0.0, 0.0, 0.0]}))
    assert "variance x0.0" in diagnose(out)


def test_a_run_that_uses_its_depth_is_left_alone(invent):
    assert diagnose(checkpoint(invent("gqa_4", useful=1.0))).endswith("next: its depth is used")


@pytest.mark.parametrize("args, said", [
    (["report"], "no finished run in out/recipe/laptop"), (["run", "width"], "width"),
    (["run", "gqa", "--sedes=2"], "seed"),
    (["diagnose", "nowhere"], "nowhere"), (["run", "gqa", "--only", "width"], "width"),
    (["run", "gqa", "--tasks", "nowhere"], "nowhere"),
    (["advise", "--n_layer=2", "--params=inf", "--tokens=1e9"], "--params"),
    (["advise", "--n_layer=32", "--params=1e9"], "--tokens"),
    (["advise", "--n_layer=0", "--params=1e9", "--tokens=1e9"], "--n_layer"), (["report", "--jobs=2"], "--jobs"),
    (["advise", "--n_layer=2", "--params=1e40", "--tokens=1e9"], "--params"),
    (["advise", "--n_layer=2", "--params=1e8", "--tokens=1e6", "--gpus=11"], "--gpus"),
    (["run", "gqa", "--plan"], "--plan"), (["run", "gqa", "--seed=3"], "--seeds"), (["run", "gqa", "depth"], "depth"),
    (["run", "gqa", "--seeds=0"], "--seeds")])
def test_a_mistake_is_one_line_and_status_2(args, said, tmp_path):
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_a_run_without_a_probe_names_the_command(invent):
    out = checkpoint(invent("gqa_4"))
    (out / "probe.json").unlink()
    with pytest.raises(UserError, match=f"python probe.py {out}/ckpt.pt"):
        diagnose(out)
