"""The output of probe.py: the columns of its tables, the closing summary, its figures.

The printed numbers are compared with the naive versions of tests/test_experiments.py.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import probe
from helpers import make_model, make_tokens
from probe import EXPERIMENTS
from test_experiments import MODELS, measured, naive_scores

# ---- tables ----------------------------------------------------------------------------------------------------------


def mean_or_nan(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def upper(matrix) -> list[float]:
    return [row[l] for s, row in enumerate(matrix) for l in range(s + 1, len(row))]


def later(matrix):
    """The matrix without its first row and column."""
    return [row[1:] for row in matrix[1:]]


def naive_trend(values) -> float:
    """Spearman's correlation of the values with their index, without the first value. It is Pearson's correlation of
    the ranks, and the ranks are found by counting."""
    x = list(values)[1:]
    ranks = [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]
    return float(np.corrcoef(range(len(x)), ranks)[0, 1])


def scores_by_hand(kind: str) -> dict[str, float]:
    """The columns of the table of models, in order."""
    r, n = naive_scores(kind), MODELS[kind]["n_layer"]
    logs = [math.log(ratio) for ratio in r["usefulness"]["ratio"]]
    released = r["released"]
    return {
        "loss": r["loss"], "last var.": r["variance"][n], "ln Vn/V1": math.log(r["variance"][n] / r["variance"][1]),
        "causal": mean_or_nan(upper(r["causal"])), "causal 1+": mean_or_nan(upper(later(r["causal"]))),
        "permuted": mean_or_nan(upper(r["permutation"])), "perm. 1+": mean_or_nan(upper(later(r["permutation"]))),
        "useful": sum(ratio > 1.1 for ratio in r["usefulness"]["ratio"]) / n, "log ratio": mean_or_nan(logs),
        "heldout": mean_or_nan([math.log(ratio) for ratio in r["usefulness_heldout"]["ratio"]]),
        "useful 1+": mean_or_nan([float(ratio > 1.1) for ratio in r["usefulness"]["ratio"][1:]]),
        "ratio 1+": mean_or_nan(logs[1:]), "ratio late": mean_or_nan(logs[n // 2:]), "ratio sum": sum(logs),
        "trend use": naive_trend(logs), "rel.var.": released["variance"][n],
        "rel.useful": sum(ratio > 1.1 for ratio in released["usefulness"]["ratio"]) / n,
        "rel.ratio": mean_or_nan([math.log(ratio) for ratio in released["usefulness"]["ratio"]]),
        "rel.causal": mean_or_nan(upper(released["causal"])), "influence": mean_or_nan(r["block_influence"]),
        "infl. sum": sum(r["block_influence"]), "trend infl": naive_trend(r["block_influence"]),
        "|J-I|/d": mean_or_nan(r["jacobian"]["deviation"]), "trend J-I": naive_trend(r["jacobian"]["deviation"])}


@pytest.mark.parametrize("kind", ["dense", "moe_lns"])
def test_every_score_of_a_model_follows_from_the_naive_scores(kind):
    want, got = scores_by_hand(kind), probe.scores(measured(kind))
    assert got == pytest.approx(want, rel=1e-6, nan_ok=True)
    assert list(got) == list(want)


def test_equal_values_share_a_rank_in_the_trend():
    for values in ([9, 3, 1, 2], [0, 1, 1, 2, 5], [7, 2, 2, 1, 1, 1]):
        assert probe.trend(values) == pytest.approx(naive_trend(values), abs=1e-12)
    assert math.isnan(probe.trend([1, 2, 2])) and math.isnan(probe.trend([1]))


def test_the_table_of_blocks_shows_values_and_standard_errors():
    want, table = naive_scores("dense"), probe.block_table(measured("dense"))
    ratios, errors = want["usefulness"]["ratio"], want["usefulness"]["ratio_stderr"]
    prices = [math.exp(loss - want["loss"]) for loss in want["removal"]["1"]]
    price_errors = [price * error for price, error in zip(prices, want["removal_stderr"]["1"])]
    for l in range(5):
        row = "".join(line[5:] for line in table.splitlines() if line[:5] == f"{l:5d}")
        for value, error in ((ratios[l], errors[l]), (prices[l], price_errors[l])):
            assert f" {value:.4g} +-{error:.1g}" in row
        assert f" {want['block_influence'][l]:.4g}" in row
    assert max(map(len, table.splitlines())) <= 120
    for experiment in EXPERIMENTS.values():
        for column in experiment.columns:
            assert f"{column.name}: {column.meaning}"[:20].split()[0] in table


def test_a_ratio_near_the_threshold_is_not_rounded_to_the_threshold():
    assert [probe.shown(x) for x in (1.1, 1.09996, 1.1000004, 1.2345678, 0.5)] == [
        "1.1", "1.09996", "1.1000004", "1.235", "0.5"]


def test_a_small_score_keeps_its_digits():
    table = probe.score_table({"x": {"variance": [1e-4, 2e-4, 5.48e-4], "loss": 3.1041}})
    assert table.split()[-3:] == ["3.1041", "5.48e-04", f"{math.log(2.74):.4f}"]


# ---- the closing summary ---------------------------------------------------------------------------------------------


def result_of(losses: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """A result for N sequences. losses (n, N): the losses without each block; whole (N,): those of the model."""
    totals = {"without 1": torch.tensor(losses), "loss": torch.tensor(whole), "predictions": torch.tensor(len(whole)),
              "influence": torch.full((len(losses),), 0.5), "tokens": torch.tensor(1.0)}
    r = probe.to_json(probe.removal_score(None, totals))
    return r | {"loss": whole.mean(), "run": {"samples": len(whole)}}


def test_noise_does_not_make_a_block_cheap():
    """Removing any block raises the perplexity by 13%, and the losses are noisy. "Could go" must be as rare as a test
    at two standard errors promises."""
    named = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        whole = draw.normal(3, 0.3, 16)
        said = " ".join(probe.summary(result_of(whole + 0.12 + draw.normal(0, 0.3, (6, 16)), whole)))
        named += "Could go" in said
    assert named <= 4


def test_two_sequences_are_too_few_to_name_a_block():
    draw = np.random.default_rng(0)
    whole = draw.normal(3, 0.3, 2)
    said = " ".join(probe.summary(result_of(whole + draw.normal(0, 0.01, (6, 2)), whole)))
    assert "--drop" not in said and "nan" not in said
    assert "more --samples would tell" in said


def test_the_price_of_the_cheapest_block_comes_from_the_sequences_that_did_not_choose_it():
    draw = np.random.default_rng(0)
    whole = draw.normal(3, 0.3, 40)
    growth = np.array([0.5, 0.02, 0.03, 0.2])[:, None] + draw.normal(0, 0.01, (4, 40))
    chosen = int(np.argmin(growth[:, ::2].mean(1)))
    price = math.exp(growth[chosen, 1::2].mean())
    said = " ".join(probe.summary(result_of(whole + growth, whole), "x.pt"))
    assert f"Could go: block {chosen}, for {price:.4g} +-" in said
    assert f"\npython probe.py x.pt --drop {chosen}" in said


def test_only_certain_blocks_are_named_useful_and_the_share_is_a_range():
    u = {"ratio": [1.5, 1.12, 1.0, 1.2], "ratio_stderr": [0.1, 0.02, 0.01, 0.01], "loose_fit": False}
    said = " ".join(probe.useful_blocks(u, True))
    assert "more than 1.1): blocks 0 and 3." in said and "Not certain for block 1:" in said
    assert "between 0.50 and 0.75" in said
    few = " ".join(probe.useful_blocks(u, False))
    assert "not certain which blocks" in few and "Useful" not in few and "share" not in few


def test_maps_that_fit_too_few_tokens_decide_nothing():
    u = {"ratio": [1.5, 1.0], "ratio_stderr": [0.01, 0.0], "loose_fit": True}
    said = " ".join(probe.useful_blocks(u, True))
    assert "fewer than 10 (d + 1) tokens" in said and "Useful" not in said


# ---- figures ---------------------------------------------------------------------------------------------------------


def axes_of(results: dict[str, Any], *names: str) -> list[Any]:
    pytest.importorskip("matplotlib")
    return probe.page(results, names).axes


@pytest.mark.parametrize("kinds", [["dense"], ["dense", "moe"]], ids=str)
def test_every_panel_is_on_the_page_and_shows_the_measured_values(kinds):
    log = [{"step": s, "loss": 5.0 - s, "val_loss": 4.0, "variance": [0.1, float(s)]} for s in (1, 2)]
    results = {kind: measured(kind) | {"log": log} for kind in kinds}
    names = [name for name, experiment in EXPERIMENTS.items() if experiment.figure]
    page = axes_of(results, *names)
    drawn = [np.asarray(line.get_ydata()).tolist() for ax in page for line in ax.lines]
    for r in results.values():
        assert r["variance"][1:] in drawn and r["lens"]["kl"][1:] in drawn
        growth = [100 * (ratio - 1) for ratio in r["usefulness"]["ratio"]]
        assert any(len(y) == len(growth) and np.allclose(y, growth) for y in drawn)
    assert drawn.count([1.0, 2.0]) == (len(kinds) == 1)                             # the training curve of a single run
    assert sum(len(ax.images) == 2 for ax in page) == 2 * len(kinds)                # a heat map and its blank part


def test_the_panel_of_several_models_has_one_line_for_each():
    """Also if one model was measured with more kinds of removal than another."""
    r = measured("dense")
    without_blocks = r | {"removal": {what: r["removal"][what] for what in ("2", "attn")}}
    ax = next(ax for ax in axes_of({"fewer": without_blocks, "more": r}, "removal") if ax.lines)
    pairs = sorted(100 * (math.exp(loss - r["loss"]) - 1) for loss in r["removal"]["2"])
    lines = [np.asarray(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 5]
    assert len(lines) == 2 and all(np.allclose(y[:4], pairs) and np.isnan(y[4]) for y in lines)


def test_blocks_are_sorted_by_the_price_of_removal():
    r = measured("dense")
    ax = next(ax for ax in axes_of({"x": r}, "removal") if ax.lines)
    growth = [math.exp(loss - r["loss"]) - 1 for loss in r["removal"]["1"]]
    order = np.argsort(growth).tolist()
    assert [int(label.get_text()) for label in ax.get_xticklabels()] == order
    assert np.asarray(ax.lines[0].get_ydata()).tolist() == pytest.approx([100 * growth[l] for l in order])
    segments = ax.collections[0].get_segments()                                     # bars: +- 2 standard errors
    lengths = [float(y1 - y0) for (_, y0), (_, y1) in segments]
    want = [4 * 100 * math.exp(r["removal"]["1"][l] - r["loss"]) * r["removal_stderr"]["1"][l] for l in order]
    assert lengths == pytest.approx(want)


def test_a_model_of_one_layer_shows_no_mean_over_pairs(tmp_path):
    pytest.importorskip("matplotlib")
    r = probe.probe(make_model(n_layer=1), make_tokens(20, 9))
    header, row = probe.score_table({"x": r}).splitlines()[:2]
    shown = dict(zip([name.strip() for name in (header[i:i + 11] for i in range(1, len(header), 11))], row.split()[1:]))
    assert shown["causal"] == shown["permuted"] == shown["perm. 1+"] == "-" and shown["useful"] != "-"
    texts = [probe.score_table({"x": r}), probe.block_table(r), *probe.summary(r)]
    assert not any("nan" in text for text in texts)
    assert "probe.png" in probe.draw({"x": r}, tmp_path)
