"""Compare recipe.py with the paper's numbers, and with arithmetic by hand on invented rows.

    python -m pytest -q tests/test_recipe.py                   # about a minute
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SHARED, assert_mistake, run_script
from pages import TABLE, WITH_TABLES

import recipe
from data import load_checkpoint
from recipe import FAMILIES, PAPER, Estimate, Job, config, estimate, judge, label
from train import TrainConfig, bare, load_settings, vocabulary

SCALES = ("laptop", "paper")
REPORTED = ("depth", "weight_decay", "context", "gqa", "moe", "ladder")


# ---- the families, compared with the paper ---------------------------------------------------------------------------
def test_the_ladder_gains_the_points_that_the_abstract_states():
    ladder = PAPER["ladder"]
    assert ladder["ladder_moe"]["accuracy"] - ladder["ladder_32"]["accuracy"] == pytest.approx(4.6)


def test_every_reported_usefulness_is_a_share_of_the_blocks_of_its_model():
    for family in REPORTED:
        for member, reported in PAPER[family].items():
            layers = config(member, "paper").n_layer
            share = reported["useful"] * layers
            assert abs(share - round(share)) <= 0.0051 * layers + 1e-9, member


@pytest.fixture(scope="module")
def facts():
    """The rows of all tables in facts.md, a summary of the paper. A row is a list of cells."""
    path = SHARED / "paper/facts.md"
    if not path.exists():
        pytest.skip(f"no {path}")
    return [[cell.strip(" *|") for cell in line.split("|")[1:-1]] for line in path.read_text("utf-8").splitlines()]


def test_the_reported_depths_are_those_of_the_facts(facts):
    depth = {int(row[0]): [float(x) for x in row[1:]] for row in facts
             if len(row) == 4 and row[0] in ("12", "16", "24", "32") and "~" not in row[3]}
    assert len(depth) == 4
    for L, values in depth.items():
        reported = PAPER["depth"][f"depth_{L}"]
        assert [reported["causal"], reported["permuted"], reported["useful"]] == values


def test_the_reported_decays_and_contexts_are_those_of_the_facts(facts):
    checked = 0
    for row in (row for row in facts if len(row) == 7):
        for family, (knob, ppl, useful) in (("weight_decay", row[:3]), ("context", row[4:])):
            if ppl.replace(".", "").isdigit():
                reported = PAPER[family][f"{family}_{float(knob):g}".replace(".", "_")]
                assert (reported["ppl"], reported["useful"]) == (float(ppl), float(useful)), row
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
def test_members_of_a_reported_family_see_the_same_tokens(scale):
    for family in REPORTED:
        budgets = {(c.max_steps * c.tokens_per_step, c.tokens_per_step, c.data, c.learning_rate)
                   for c in (config(member, scale) for member in FAMILIES[family])}
        assert len(budgets) == 1, family


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pair", [("dense_1b", "moe_1b"), ("dense_400m", "moe_400m"), ("ladder_g2", "ladder_moe")])
def test_dense_and_moe_are_compared_at_equal_active_flops(scale, pair):
    dense, moe = (replace(config(member, scale), vocab_size=vocabulary(config(member, scale))) for member in pair)
    router = 3 * 2 * moe.n_layer * moe.n_embd * moe.n_experts
    assert bare(moe).flops_per_token() - router == bare(dense).flops_per_token()


def test_a_laptop_member_differs_from_its_base_as_in_the_paper():
    base = {scale: config("dense_1b", scale) for scale in SCALES}
    for member in (member for family in REPORTED for member in FAMILIES[family]):
        laptop, paper = (config(member, scale) for scale in SCALES)
        assert laptop.n_experts == paper.n_experts
        if paper.n_experts:
            assert laptop.top_k == paper.top_k
        assert laptop.n_layer / 8 == paper.n_layer / 16
        if member not in FAMILIES["depth"]:
            assert laptop.block_size / base["laptop"].block_size == paper.block_size / base["paper"].block_size
        assert laptop.weight_decay == pytest.approx(0.64 * paper.weight_decay)


def test_every_laptop_model_has_the_papers_init_std_in_units_of_1_over_sqrt_width():
    models = [config(member, "laptop") for family in REPORTED for member in FAMILIES[family]]
    models += [load_settings([str(path), "--out_dir=any"])[0] for path in (ROOT / "configs").glob("*.py")]
    for c in models:
        assert c.init_std * math.sqrt(c.n_embd) == pytest.approx(0.02 * math.sqrt(2048), rel=2e-3)


def test_rate_times_decay_times_steps_is_that_of_the_paper():
    for member in FAMILIES["weight_decay"]:
        laptop, paper = (config(member, scale) for scale in SCALES)
        assert laptop.learning_rate * laptop.weight_decay * laptop.max_steps == pytest.approx(
            paper.learning_rate * paper.weight_decay * paper.max_steps, rel=0.01)


def test_wide_models_keep_init_std_and_rate_in_units_of_their_width():
    narrow, wide = (config(member, "laptop") for member in FAMILIES["width"] if "16" in member)
    assert wide.n_embd == 2 * narrow.n_embd
    assert wide.init_std * math.sqrt(wide.n_embd) == pytest.approx(narrow.init_std * math.sqrt(narrow.n_embd), rel=2e-3)
    assert wide.learning_rate / wide.init_std == pytest.approx(narrow.learning_rate / narrow.init_std, rel=2e-3)


def test_members_with_equal_settings_are_one_run():
    args = SimpleNamespace(family="all", seeds=5, scale="laptop", settings=[], out="out")
    planned = {(str(config(name, "laptop")), seed) for members in FAMILIES.values()
               for name, member in members.items() for seed in member.seeds}
    jobs = recipe.jobs_of(args)
    assert len(jobs) == len(planned) == len({job.out for job in jobs})


def test_labels_give_the_value_here_and_in_the_paper():
    values = {"L": lambda c: c.n_layer, "T": lambda c: c.block_size, "d": lambda c: c.n_embd,
              "init": lambda c: c.init_std, "decay": lambda c: c.weight_decay, "norm": lambda c: c.norm,
              "G": lambda c: c.n_head // c.n_kv_head,
              "embedding": lambda c: c.embed_init_std, "top": lambda c: c.top_k,
              "init_std": lambda c: float(f"{c.learning_rate / c.init_std:.3g}")}
    checked = 0
    for family, members in FAMILIES.items():
        for name, member in members.items():
            here, paper = config(name, "laptop"), config(name, "paper")
            pattern = r"(\w+) ([\d.]+|pre|lns|peri)\b(?: \(paper: ([\d.]+)\))?"
            for knob, value, there in re.findall(pattern, member.label):
                if knob in values:
                    assert str(values[knob](here)) in (value, f"{value}.0"), (family, name)
                    assert not there or str(values[knob](paper)) in (there, f"{there}.0"), (family, name)
                    checked += 1
    assert checked > 60 and label("depth", "depth_32", "paper") == "depth_32"


def test_near_zero_weights_of_an_untrained_model_are_a_share_of_the_normal_distribution():
    """Norms and embeddings do not count."""
    c = config("depth_16", "laptop")
    drawn = c.init_std * torch.randn(1000, 400, generator=torch.Generator().manual_seed(0))
    weights = {"blocks.0.ffn.w_in.weight": drawn, "blocks.0.ffn_norm.weight": torch.zeros(400),
               "embedding.weight": torch.zeros(64, 400)}
    found = recipe.own_scores(c, [{"loss": 1.0}], {}, weights)["near zero"]
    assert found == pytest.approx(math.erf(0.1 / math.sqrt(2)), rel=0.03)


# ---- statistics ------------------------------------------------------------------------------------------------------
def t_tail(t, df):
    """P(T > t) for Student's t: the trapezoidal rule on the density, with t = tan(u)."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    u = np.linspace(math.atan(t), math.pi / 2 - 1e-9, 200_001)
    y = scale * (1 + np.tan(u) ** 2 / df) ** (-(df + 1) / 2) / np.cos(u) ** 2
    return float(((y[1:] + y[:-1]) / 2 * np.diff(u)).sum())


@pytest.mark.parametrize("n", range(2, 11))
def test_quantiles_intervals_and_p_values_are_those_of_students_t(n):
    assert t_tail(recipe.T_975[n - 2], n - 1) == pytest.approx(0.025, abs=1e-6)
    assert t_tail(recipe.T_80[n - 2], n - 1) == pytest.approx(0.2, abs=2e-6)
    values = [0.3 + (k % 3) + 0.1 * k for k in range(n)]
    e, error = estimate(values), np.std(values, ddof=1) / math.sqrt(n)
    assert e.mean == pytest.approx(np.mean(values)) and e.half == pytest.approx(recipe.T_975[n - 2] * error)
    assert recipe.p_value(e) == pytest.approx(2 * t_tail(e.mean / error, n - 1), rel=1e-3)


@pytest.mark.parametrize("seeds, t, p", [(2, 63.657, 0.01), (3, 9.925, 0.01), (3, 31.599, 0.001), (4, 5.841, 0.01),
                                         (5, 4.604, 0.01), (5, 8.610, 0.001), (10, 3.250, 0.01)])
def test_p_values_are_those_of_the_printed_tables(seeds, t, p):
    """Two-sided quantiles of Student's t from a textbook."""
    assert recipe.p_value(Estimate(t, recipe.T_975[seeds - 2], seeds)) == pytest.approx(p, rel=2e-3)


def test_a_detectable_effect_is_detected_in_four_of_five_experiments():
    """`detectable` is an approximation, so the detected share of simulated experiments is only about 80%."""
    n, draws = 5, np.random.default_rng(0).standard_normal((20_000, 5))
    effect = recipe.detectable(Estimate(0, recipe.T_975[n - 2] / math.sqrt(n), n))     # if sigma is 1
    t = (draws.mean(1) + effect) / (draws.std(1, ddof=1) / math.sqrt(n))
    assert 0.75 < (t > recipe.T_975[n - 2]).mean() < 0.85


@pytest.mark.parametrize("effect, direction, size, said", [
    (Estimate(0.2, 0.1, 5), 1, None, "reproduced"), (Estimate(-0.2, 0.1, 5), -1, None, "reproduced"),
    (Estimate(0.2, 0.1, 5), 1, Estimate(0.5, 0.2, 5), "reproduced, smaller"),
    (Estimate(0.2, 0.1, 5), 1, Estimate(0.9, 0.2, 5), "reproduced"),
    (Estimate(0.2, 0.1, 5), -1, Estimate(-0.5, 0.2, 5), "contradicted"),
    (Estimate(0.1, 0.2, 5), 1, Estimate(0.3, 0.6, 5), "no effect of the paper's size"),
    (Estimate(0.1, 0.2, 5), 1, Estimate(0.3, 0.8, 5), "inconclusive"), (Estimate(0.1, 0.2, 5), 1, None, "inconclusive"),
    (Estimate(0.2, math.nan, 1), 1, None, "inconclusive"), (Estimate(0.25, 0.0, 5), 1, None, "inconclusive"),
    (Estimate(0.25, 0.0, 5), 1, Estimate(0.5, 0.2, 5), "inconclusive"),        # the same amount in every seed
    (Estimate(0.2, 0.1, 5), 0, None, "no direction"), (Estimate(0.2, 0.1, 5), 2, None, "")])
def test_a_verdict_follows_from_interval_direction_and_size(effect, direction, size, said):
    assert judge(effect, direction, size) == said


def row(member, seed, processor="x", start=(), probe=(), **scores):
    """A row of results.jsonl with these scores."""
    return {"member": member, "seed": seed, "settings": {k: v for k, v in asdict(config(member, "laptop")).items()
                                                         if k not in recipe.NO_MATTER},
            "corpus": 1, "processor": processor, "scores": scores, "start": dict(start), "curve": [],
            "probe": dict(probe)}


def test_differences_are_paired_by_seed_and_processor():
    base = [row("gqa_1", 1, useful=0.5), row("gqa_1", 2, useful=0.25), row("gqa_1", 1, "y", useful=0.0)]
    rows = [row("gqa_4", 1, useful=0.75), row("gqa_4", 2, "y", useful=1.0), row("gqa_4", 3, useful=1.0)]
    assert recipe.paired(rows, base, "useful") == {1: 0.25}                # seed 2: another processor; seed 3: no base
    of_variance = recipe.paired([row("gqa_4", 1, **{"last var.": 8.0})], [row("gqa_1", 1, **{"last var.": 2.0})],
                                "last var.")
    assert of_variance == {1: pytest.approx(math.log(4))}


def family_rows(member, values, score):
    return [row(member, seed, **{score: x}) for seed, x in enumerate(values, 1)]


def found_with(score, gqa_4, gqa_1, deep, shallow):
    """Rows of the families depth and gqa. Each list has the score of every seed."""
    return {"depth": {"depth_16": family_rows("depth_16", shallow, score),
                      "depth_32": family_rows("depth_32", deep, score)},
            "gqa": {"gqa_1": family_rows("gqa_1", gqa_1, score), "gqa_4": family_rows("gqa_4", gqa_4, score)}}


def test_the_size_is_the_effect_over_the_depth_effect_relative_to_the_papers():
    shallow, deep = [10.0, 11, 12, 10], [21.0, 24, 20, 22]
    gqa_4 = [8.0, 9.5, 10, 7]
    c = recipe.compare(found_with("last var.", gqa_4, shallow, deep, shallow), "gqa", "gqa_4", "last var.")
    ours, depth = np.log(np.divide(gqa_4, shallow)), np.log(np.divide(deep, shallow))
    papers = math.log(125 / 220) / math.log(1200 / 600)
    assert c.size.mean == pytest.approx(ours.mean() / depth.mean() / papers)
    left_out = [np.delete(ours, k).mean() / np.delete(depth, k).mean() / papers for k in range(4)]
    error = math.sqrt(3 / 4 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert c.size.half == pytest.approx(recipe.T_975[2] * error)
    assert c.direction == -1 and c.paper == pytest.approx(math.log(125 / 220)) and c.verdict == "reproduced, smaller"


def test_no_size_is_given_where_it_would_be_meaningless():
    steps = [0.2, 0.21, 0.19]
    plain = found_with("useful", [0.5, 0.6, 0.7], [0.4, 0.5, 0.5], [0.1, 0.11, 0.1], [0.5, 0.5, 0.45])
    assert recipe.compare(plain, "gqa", "gqa_4", "useful").size is not None            # 0.06 of 16 layers is one layer
    undecided = found_with("useful", [0.5, 0.6, 0.7], [0.4, 0.5, 0.5], [0.1, 0.9, 0.1], [0.5, 0.5, 0.45])
    assert recipe.compare(undecided, "gqa", "gqa_4", "useful").size is None            # our depth effect may be 0
    inferred = found_with("ratio late", steps, [0.1, 0.1, 0.12], [0.01, 0.02, 0.01], [0.1, 0.1, 0.12])
    assert recipe.compare(inferred, "gqa", "gqa_4", "ratio late").size is None         # the paper reports no such score
    about_0 = {"weight_decay": {"weight_decay_0_1": family_rows("weight_decay_0_1", [9.0, 10, 11], "last var."),
                                "weight_decay_1": family_rows("weight_decay_1", [1.0, 1.1, 1.2], "last var.")},
               "depth": found_with("last var.", [1.0], [1.0], [22.0, 23, 21], [9.0, 10, 11])["depth"]}
    c = recipe.compare(about_0, "weight_decay", "weight_decay_1", "last var.")
    assert c.size is None and c.direction == -1 and c.verdict == "reproduced"
    itself = recipe.compare(plain, "depth", "depth_32", "useful")
    assert itself.size is None and itself.verdict == "reproduced"
    depth = plain["depth"]                                                             # the same runs by other names
    again = plain | {"ladder": {"ladder_16": depth["depth_16"], "ladder_32": depth["depth_32"]}}
    c = recipe.compare(again, "ladder", "ladder_16", "useful")
    assert c.size is None and c.verdict == "reproduced"
    unmoved = found_with("useful", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.1, 0.11, 0.1], [0.5, 0.5, 0.45])
    c = recipe.compare(unmoved, "gqa", "gqa_4", "useful")
    assert c.size is None and math.isnan(recipe.detectable(c.effect)) and c.verdict == "inconclusive"


def test_the_size_of_a_loss_is_its_relative_difference_over_the_papers():
    found = found_with("val loss", [1.40, 1.43], [1.42, 1.44], [1.3, 1.3], [1.4, 1.4])
    c = recipe.compare(found, "gqa", "gqa_4", "val loss")
    papers = (math.log(14.50) - math.log(14.52)) / math.log(14.52)
    assert c.size.mean == pytest.approx((-0.02 / 1.42 - 0.01 / 1.44) / 2 / papers)


def test_the_total_of_useful_layers_grows_in_the_paper():
    difference, direction = recipe.paper_difference("depth", "depth_32", "depth_16", "ratio sum")
    assert direction == 1 and difference == pytest.approx(0.562 * 32 - 0.813 * 16)


def test_variance_accumulates_only_if_it_grows_by_more_than_equal_steps():
    """If every block adds the same variance, Var h_l is l times Var h_1, so ln(Var h_n / Var h_1) is ln n."""
    runs = {"depth_16": family_rows("depth_16", [math.log(8) + x for x in (0.2, 0.25, 0.3)], "ln Vn/V1")}
    assert recipe.premise(runs, "depth_16", "ln Vn/V1")[2] == "reproduced"
    runs = {"depth_16": family_rows("depth_16", [math.log(8) - x for x in (0.2, 0.25, 0.3)], "ln Vn/V1")}
    assert recipe.premise(runs, "depth_16", "ln Vn/V1")[2] == "contradicted"
    runs = {"depth_16": family_rows("depth_16", [-0.9, -0.8, -0.7], "trend use")}
    assert recipe.premise(runs, "depth_16", "trend use")[2] == "reproduced"


def test_holms_correction_agrees_with_its_definition():
    effects = [Estimate(x, 0.1, 5) for x in (0.9, 0.4, 0.15, 0.12, 0.02)]
    compared = [recipe.Comparison("gqa", "gqa_4", "gqa_1", "useful", e, 0.06, 1, None, judge(e, 1, None))
                for e in effects]
    p = sorted(2 * t_tail(e.mean / (e.half / recipe.T_975[3]), 4) for e in effects)
    kept = next((k for k, x in enumerate(p) if x > 0.05 / (len(p) - k)), len(p))
    assert recipe.holm(compared) == compared[:kept] and 0 < kept < sum(e.decided for e in effects)


def test_the_bootstrap_equals_one_rank_correlation_per_draw():
    x, y = np.random.default_rng(3).integers(0, 6, (2, 12)).astype(float)     # with equal values
    draws = np.random.default_rng(0).integers(12, size=(10_000, 12))
    naive = [recipe.rank_correlation(x[k], y[k]) for k in draws]
    assert recipe.bootstrap(x, y) == pytest.approx(np.quantile(naive, [0.025, 0.975]))


def test_one_configuration_with_another_value_shows_no_correlation():
    """Without it, a draw has a constant score. To leave these draws out would leave those that agree with it."""
    low, high = recipe.bootstrap([1.0] * 13 + [0.0], [*range(1, 14), 0])
    assert low == 0 < high


def test_a_few_configurations_give_no_correlation():
    """Four configurations in falling order give a bootstrap of -1 to -1, but chance does so once in 24 times."""
    names = [name for family in ("depth", "weight_decay", "context") for name in FAMILIES[family]]
    rows = {name: [row(name, 1, density=k, useful=-k * k)] for k, name in enumerate(names)}
    assert recipe.correlation(dict(list(rows.items())[:7]), "density", "useful") is None
    assert recipe.correlation(rows, "density", "useful") == pytest.approx((-1, -1, -1, len(names)))


def test_a_family_begins_with_a_run_of_its_own():
    """ladder_16 and ladder_32 are depth_16 and depth_32 by other names."""
    depth = {"depth_16": [row("depth_16", 1)], "depth_32": [row("depth_32", 1)]}
    ladder = {"ladder_16": [row("ladder_16", 1)], "ladder_32": [row("ladder_32", 1)]}
    assert recipe.has_begun("depth", depth, depth) and not recipe.has_begun("ladder", ladder, depth)
    assert recipe.has_begun("ladder", ladder | {"ladder_g2": [row("ladder_g2", 1)]}, depth)


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_setting_that_is_missing_in_an_old_row_had_its_default():
    old = recipe.read_rows(ROOT / "configs/laptop/results_init_0_02.jsonl")
    args = SimpleNamespace(scale="laptop", settings=[], here=False)
    assert len(old) > 100 and all("scaled_init" not in row["settings"] for row in old)
    for member in FAMILIES["depth"]:
        assert not any(recipe.is_recorded(Job(member, seed, Path()), old, args) for seed in range(5))
    control = SimpleNamespace(scale="laptop", settings=["--init_std=0.02"], here=False)
    assert all(recipe.is_recorded(Job(member, seed, Path()), old, control) for member in FAMILIES["depth"]
               for seed in range(5))
    elsewhere = SimpleNamespace(scale="laptop", settings=["--init_std=0.02"], here=True)
    assert not recipe.is_recorded(Job("depth_16", 0, Path()), [row | {"processor": "other"} for row in old], elsewhere)


def test_only_the_seeds_of_a_family_count():
    rows = [row("depth_16", seed, useful=0.5) for seed in (0, 1, 2, 100)]
    args = SimpleNamespace(scale="laptop", settings=[])
    assert [r["seed"] for r in recipe.runs_of("depth", rows, args)["depth_16"]] == [1, 2]
    rates = recipe.runs_of("rates", rows, args)
    assert [r["seed"] for r in rates["depth_16,init_std=0.113,learning_rate=0.003"]] == [100]
    again = [*rows, row("depth_16", 1, useful=0.75)]
    assert recipe.runs_of("depth", again, args)["depth_16"][0]["scores"]["useful"] == 0.75       # the newest row


def test_the_course_of_a_variance_is_read_off_its_curve():
    assert recipe.course([[50, 1.0], [100, 8.0], [150, 4.0], [200, 2.0]]) == {
        "peak var.": 8.0, "peak at": 0.5, "left of it": 0.25}


# ---- a family from its first run to its report -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run a family of tiny models. All members have the same settings, so there is a single run."""
    out = tmp_path_factory.mktemp("recipe")
    told = ["run", "context", "--out", out, "--n_layer=2", "--max_steps=4", "--eval_tokens=1024", "--warmup_steps=1",
            "--block_size=32", "--only=variance,removal,jacobian"]
    return out, told, run_script("recipe.py", *told, cwd=ROOT)


def test_a_family_is_trained_probed_and_recorded_and_not_run_again(ran):
    out, told, first = ran
    assert first.status == 0, first.err
    rows = recipe.read_rows(out / "laptop/results.jsonl")
    assert len(rows) == 1 and rows[0]["seed"] == 1 and rows[0]["settings"]["n_layer"] == 2
    assert rows[0]["scores"]["last var."] == pytest.approx(rows[0]["probe"]["variance"][-1], rel=1e-4)
    assert rows[0]["start"]["ln Vn/V1"] == pytest.approx(
        math.log(rows[0]["probe_start"]["variance"][-1] / rows[0]["probe_start"]["variance"][1]), rel=1e-3)
    assert "at_16" in rows[0] and "at_64" not in rows[0]                              # its context is 32
    again = run_script("recipe.py", *told, cwd=ROOT)
    assert again.status == 0 and "training" not in again.out


def test_ctrl_c_ends_the_run_without_measuring_it_or_starting_another(tmp_path):
    """train.py saves and ends with status 0. What is left must not be probed or recorded as a finished run."""
    told = ["run", "weight_decay", f"--out={tmp_path}", f"--results={tmp_path / 'rows.jsonl'}", "--n_layer=1",
            "--max_steps=100000", "--eval_tokens=1024", "--block_size=32"]
    process = subprocess.Popen([sys.executable, str(ROOT / "recipe.py"), *told], cwd=ROOT, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not [*tmp_path.glob("laptop/*/seed_1/log.jsonl")]:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "stopped" in out
    assert len([*tmp_path.glob("laptop/*")]) == 1 and not (tmp_path / "rows.jsonl").exists()
    assert not [*tmp_path.glob("laptop/*/seed_1/start")]


def test_step_0_has_the_weights_of_init_weights(ran):
    """The checkpoint of step 0 comes from one step at a learning rate that changes no weight."""
    start = next((ran[0] / "laptop").glob("*/seed_1/start/ckpt.pt"))
    saved = load_checkpoint(start)
    torch.manual_seed(1)
    model = bare(TrainConfig(**saved["settings"])).to_empty(device="cpu")
    model.init_weights()
    assert all(torch.equal(w, saved["model"][name]) for name, w in model.state_dict().items())


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Make a report from invented rows of every member and seed."""
    rng, rows = np.random.default_rng(0), {}
    for family, members in FAMILIES.items():
        for member in members:
            c = config(member, "laptop")
            n = c.n_layer
            blocks = {name: rng.uniform(0.1, 2, n + (name == "variance")).tolist()
                      for name in ("variance", "attn_variance", "ffn_variance", "affine", "deviation")}
            for seed in FAMILIES[family][member].seeds:
                scores = dict(zip([*recipe.PAPERS, "loss", "trend infl", "trend J-I", "rel.var.", "rel.useful",
                                   "rel.causal", "influence", "density", "eff. keys", "near zero"],
                                  rng.uniform(0.1, 2, 30).tolist()))
                scores |= {"key heads": c.n_kv_head / c.n_head, "active FFN": 1.0}
                maps = {name: rng.uniform(0, 1, (n, n)).tolist() for name in recipe.MAPS}
                new = row(member, seed, start=scores, probe=blocks | maps, **scores)
                new |= {"curve": [[k, float(x)] for k, x in enumerate(rng.uniform(1, 2, 9), 1)],
                        "at_16": scores, "at_64": scores}
                rows.setdefault((str(c), seed), new)
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows.values())), "utf-8")
    done = run_script("recipe.py", "report", "--results", folder / "rows.jsonl", "--out", folder, cwd=ROOT)
    assert done.status == 0, done.err
    return folder / "laptop", list(rows.values())


def test_no_table_of_the_report_is_wider_than_eight_columns(reported):
    tables = [path.read_text("utf-8") for path in reported[0].glob("*.md")]
    assert len(tables) > 25
    for text in tables:
        assert all(line.replace("\\|", "").count("|") <= 9 for line in text.splitlines())


def test_a_comparison_in_the_report_is_the_paired_t_interval_of_its_rows(reported):
    folder, rows = reported
    useful = {(r["member"], r["seed"]): r["scores"]["useful"] for r in rows}
    differences = [useful["gqa_16", seed] - useful["depth_16", seed] for seed in range(1, 6)]
    mean, half = np.mean(differences), 2.77645 * np.std(differences, ddof=1) / math.sqrt(5)
    of_16 = (folder / "gqa_verdicts.md").read_text("utf-8").partition("| G 4")[2]
    line = next(line for line in of_16.splitlines() if "| useful |" in line)
    shown = [float(x) for x in re.findall(r"[-+]\d[\d.e-]*", line.split("|")[3])]
    assert shown == pytest.approx([mean, mean - half, mean + half], rel=6e-3)


def test_equal_seeds_are_shown_without_an_interval():
    assert recipe.with_interval(estimate([0.5, 0.5, 0.5])) == recipe.with_interval(estimate([0.5])) == "0.5"
    assert recipe.with_interval(estimate([0.0, 0.5, 1.0])) == "0.5 (-0.742 to 1.74)"        # 4.30265 x 0.5 / sqrt(3)


def test_runs_without_the_affine_maps_get_every_other_figure(reported, tmp_path):
    folder, rows = reported
    for r in rows:
        probe = {name: values for name, values in r["probe"].items() if name not in ("affine", "permutation")}
        scores = {name: x for name, x in r["scores"].items() if recipe.PAPERS.get(name) != "useful"}
        recipe.append_row(tmp_path / "rows.jsonl", r | {"probe": probe, "scores": scores})
    done = run_script("recipe.py", "report", "--results", tmp_path / "rows.jsonl", "--out", tmp_path, cwd=ROOT)
    assert done.status == 0, done.err
    missing = {path.name for path in folder.glob("*.png")} - {path.name for path in tmp_path.glob("laptop/*.png")}
    assert missing == {"depth.png", "depth_blocks.png", "depth_permutation.png"}


def test_the_pages_show_every_table_and_figure_of_the_report(reported):
    pages = "".join(page.read_text("utf-8") for page in WITH_TABLES)
    made = {path.name for kind in ("md", "png") for path in reported[0].glob(f"*.{kind}")}
    assert made == {name for _, name, _ in TABLE.findall(pages)}


# ---- the recipe at another size --------------------------------------------------------------------------------------
def test_the_advice_at_the_papers_size_is_the_papers_recipe():
    c, theirs = recipe.advised(32, 1.2e9, 1e10, 8), config("ladder_moe", "paper")
    for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "n_experts", "top_k", "expert_hidden", "block_size",
                 "weight_decay", "tokens_per_step", "max_steps", "learning_rate", "warmup_steps", "init_std"):
        assert getattr(c, name) == getattr(theirs, name), name


@pytest.mark.parametrize("n_layer, params, tokens, gpus", [(12, 4e8, 1e10, 8), (64, 7e9, 1e11, 64), (16, 2e7, 2e8, 1)])
def test_the_advice_has_the_requested_size_and_tokens(n_layer, params, tokens, gpus):
    c = recipe.advised(n_layer, params, tokens, gpus)
    assert c.n_head == 2 * c.n_kv_head and c.n_embd % c.n_head == 0 and c.expert_hidden == c.n_embd
    assert bare(c).count_parameters()["active"] == pytest.approx(params, rel=0.1)
    assert c.max_steps * c.tokens_per_step == pytest.approx(tokens, rel=0.02)
    assert c.tokens_per_step % (c.block_size * gpus) == 0
    assert c.weight_decay * c.max_steps == pytest.approx(0.3 * 4768, rel=0.01)       # as in the paper
    assert c.init_std * math.sqrt(c.n_embd) == pytest.approx(0.02 * math.sqrt(1120), rel=0.01)


def test_the_advice_states_the_range_of_the_papers_models():
    models = [config(name, "paper") for family in REPORTED for name in FAMILIES[family]]
    said = recipe.sources()[0]
    depths, widths = ({getattr(c, name) for c in models} for name in ("n_layer", "n_embd"))
    assert [int(x.replace(",", "")) for x in re.findall(r"[\d,]+\b", said)] == [
        min(depths), max(depths), min(widths), max(widths), 10]
    assert {round(c.max_steps * c.tokens_per_step / 1e10, 2) for c in models} == {1.0}


def test_an_advised_config_stands_alone(tmp_path):
    told = ["advise", "--n_layer=32", "--params=1.2e9", "--tokens=1e10", "--out", tmp_path / "advised.py"]
    done = run_script("recipe.py", *told, cwd=ROOT)
    assert done.status == 0 and "torchrun --nproc-per-node=8 train.py " in done.out, done.err
    c = load_settings([str(tmp_path / "advised.py"), "--out_dir="])[0]
    assert replace(c, out_dir="") == recipe.advised(32, 1.2e9, 1e10, 8)
    assert_mistake(run_script("recipe.py", *told, cwd=ROOT), "advised.py exists")


@pytest.mark.parametrize("args, said", [
    (["report", "--results=none.jsonl"], "no runs to compare in none.jsonl"), (["report", "--sedes=2"], "--sedes"),
    (["run", "nowhere"], "nowhere"), (["advise", "--n_layer=32", "--params=1e9"], "--tokens")])
def test_a_mistake_is_one_line_and_status_2(args, said, tmp_path):
    assert_mistake(run_script("recipe.py", *args, cwd=tmp_path), said)
