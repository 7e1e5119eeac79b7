"""What probe.py shows of a measurement: every column of its tables, and what its figures really draw.

    python -m pytest -q tests/test_shown.py

The numbers shown are compared with the naive versions of tests/test_experiments.py, not with probe.json.
"""
from __future__ import annotations

import json
import math
from typing import Any, Sequence

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, make_model, make_tokens

import probe
from probe import EXPERIMENTS
from test_experiments import MODELS, REMOVE, measured, naive_scores

pytestmark = pytest.mark.filterwarnings("error")          # of matplotlib: nothing that is drawn should need excuses
DEPTH = {kind: settings["n_layer"] for kind, settings in MODELS.items()}


def mean_or_nan(xs: Sequence[float]) -> float:
    return sum(xs) / len(xs) if xs else math.nan


def upper(C: Sequence[Sequence[float]]) -> list[float]:
    """What is above the diagonal."""
    return [C[s][l] for s in range(len(C)) for l in range(s + 1, len(C))]


def growths(r: dict[str, Any], losses: Sequence[float]) -> list[float]:
    """Of the perplexity."""
    return [math.exp(x) / math.exp(r["loss"]) for x in losses]


# ---------------------------------------------------------------------------------------------------------------------
# the table of blocks


def columns_by_hand(kind: str) -> dict[str, list[float]]:
    """The columns in order, each with the value of every block."""
    r, n = naive_scores(kind), DEPTH[kind]
    C, P = r["causal"], r["permutation"]
    return {
        "variance": r["variance"][1:],
        "growth": [r["variance"][l + 1] / r["variance"][l] for l in range(n)],
        "causal": [mean_or_nan([C[s][l] for l in range(s + 1, n)]) for s in range(n)],
        "permuted": [mean_or_nan([P[i][j] for j in range(n) if j != i]) for i in range(n)],
        "affine": r["usefulness"]["ratio"],
        "unseen": r["usefulness_heldout"]["ratio"],
        "released": r["released"]["usefulness"]["ratio"],
        "removed": growths(r, r["removal"]["1"]),
        "influence": r["block_influence"],
        "|J-I|/d": r["jacobian"]["deviation"],
        "lens KL": r["lens"]["kl"][1:],
        "attn/x": r["contribution"]["attn_ratio"],
        "ffn/x": r["contribution"]["ffn_ratio"],
        "attn.H": r["sparsity"]["attention"]["entropy"],
    }


BY_EXPERIMENT = {"variance": ["variance", "growth"], "causal": ["causal"], "permutation": ["permuted"],
                 "usefulness": ["affine", "unseen"], "released": ["released"], "removal": ["removed", "influence"],
                 "jacobian": ["|J-I|/d"], "lens": ["lens KL"], "contribution": ["attn/x", "ffn/x"],
                 "sparsity": ["attn.H"]}


def cells(line: str, first: int, width: int) -> list[str]:
    """The first column of a line, and the others, which all have one width."""
    return [line[:first].strip(), *(line[i:i + width].strip() for i in range(first, len(line), width))]


def tables_of_blocks(text: str, n: int) -> list[dict[str, list[str]]]:
    """The columns of each table, top down."""
    lines, tables = text.splitlines(), []
    for start in [i for i, line in enumerate(lines) if line.startswith("block ")]:
        header, *rows = [cells(line, 5, 10) for line in lines[start:start + n + 1]]
        block, *columns = zip(header, *rows)
        assert block == ("block", *map(str, range(n)))
        tables.append({name: list(column) for name, *column in columns})
    return tables


def assert_shown(want: dict[str, list[float]], text: str, n: int) -> None:
    """The columns of the tables of blocks, and four digits of every number in them; what is no number is a dash."""
    shown = [column for table in tables_of_blocks(text, n) for column in table.items()]
    assert [name for name, _ in shown] == list(want)
    for name, column in shown:
        values = [math.nan if cell == "-" else float(cell) for cell in column]
        assert "nan" not in column and values == pytest.approx(want[name], rel=5.1e-4, abs=1e-14, nan_ok=True), name


@pytest.mark.parametrize("kind", MODELS)
def test_every_column_of_the_table_of_blocks_is_what_the_naive_scores_come_to(kind):
    want = columns_by_hand(kind)
    assert_shown(want, probe.block_table(measured(kind), DEPTH[kind]), DEPTH[kind])
    assert len({str(np.round(values, 3)) for values in want.values()}) == len(want) == 14    # no two are alike


@pytest.mark.parametrize("kind", MODELS)
def test_the_tables_of_blocks_fit_120_columns_and_part_no_experiment(kind):
    text = probe.block_table(measured(kind), DEPTH[kind])
    tables = tables_of_blocks(text, DEPTH[kind])
    assert max(map(len, text.splitlines())) <= 120 and [len(table) for table in tables] == [10, 4]
    for columns in BY_EXPERIMENT.values():
        assert any(set(columns) <= set(table) for table in tables)
    below = text.split("\n\n")                                       # each says what its own columns mean
    assert all(f"{name}: " in below[k] for k, table in enumerate(tables) for name in table)


def test_a_column_says_one_thing_in_the_table_of_blocks_and_in_that_of_scores():
    """A score of a column's name is of the column's quantity: the held-out ratios and the mean of their logarithms are
    of two names."""
    columns = {name for experiment in EXPERIMENTS.values() for name, _, _ in experiment.columns}
    assert columns & set(probe.score_names()) == {"causal", "permuted", "influence", "|J-I|/d"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_alone_brings_its_own_columns(name):
    r = {key: value for key, value in measured("dense").items() if key in of_experiment(name)}
    want = {column: values for column, values in columns_by_hand("dense").items() if column in BY_EXPERIMENT[name]}
    table = probe.block_table(r, 5)
    assert_shown(want, table, 5)
    if name == "causal":                                             # there is nothing after the last block
        assert tables_of_blocks(table, 5)[0]["causal"][-1] == "-"
    meanings = " ".join(table.splitlines()[6:])
    assert all(f"{column}: " in meanings for column in want) and meanings.count(": ") == len(want)


def of_experiment(name: str) -> set[str]:
    """What a measurement of this experiment alone holds."""
    also = {"variance": {"variance_growth"}, "causal": {"causal_mean"}, "removal": {"block_influence"},
            "usefulness": {"usefulness_heldout"}, "permutation": {"permutation_mean"}}
    return {"loss", name} | also.get(name, set())


def test_the_mean_of_swaps_is_over_those_that_were_sampled():
    nan = math.nan
    P = [[0.0, 0.2, nan, nan], [0.2, 0.0, 0.4, nan], [nan, 0.4, 0.0, nan], [nan, nan, nan, 0.0]]
    assert_shown({"permuted": [0.2, 0.3, 0.4, nan]}, probe.block_table({"loss": 1.0, "permutation": P}, 4), 4)


@pytest.mark.parametrize("losses, columns", [({"2": [1.0, 2.0]}, ["influence"]), ({"attn": [1.0] * 3}, ["influence"]),
                                             ({"1": [1.0] * 3, "2": [1.0, 2.0]}, ["removed", "influence"])], ids=str)
def test_there_is_no_column_of_removals_that_were_not_made(losses, columns):
    r = {"loss": 1.0, "removal": losses, "block_influence": [0.1] * 3}
    assert cells(probe.block_table(r, 3).splitlines()[0], 5, 10)[1:] == columns


def test_there_is_no_table_of_nothing():
    assert probe.block_table({"loss": 1.0}, 4) == ""


def test_numbers_in_the_table_of_blocks_never_run_together():
    r = {"loss": 1.0, "removal": {"1": [1.2345678] * 2}, "block_influence": [-1.2345e-08, -1.2345e-100]}
    for line in probe.block_table(r, 2).splitlines()[1:3]:
        assert len(line.split()) == 3, line


# ---------------------------------------------------------------------------------------------------------------------
# the table of scores, of one model and of several side by side


def later(matrix):
    """The matrix without its first row and column."""
    return [row[1:] for row in matrix[1:]]


def naive_trend(values) -> float:
    """Spearman's correlation with the place, of all but the first: Pearson's of ranks by counting."""
    x = list(values)[1:]
    ranks = [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]
    if len(set(ranks)) < 2:
        return math.nan
    return float(np.corrcoef(range(len(x)), ranks)[0, 1])


def scores_by_hand(kind: str) -> dict[str, float]:
    """The columns in order."""
    r, n = naive_scores(kind), DEPTH[kind]
    logs = [math.log(ratio) for ratio in r["usefulness"]["ratio"]]
    return {
        "loss": r["loss"],
        "last var.": r["variance"][n],
        "ln Vn/V1": math.log(r["variance"][n] / r["variance"][1]),
        "causal": mean_or_nan(upper(r["causal"])),
        "causal 1+": mean_or_nan(upper(later(r["causal"]))),
        "permuted": mean_or_nan(upper(r["permutation"])),
        "perm. 1+": mean_or_nan(upper(later(r["permutation"]))),
        "useful": sum(ratio > 1.1 for ratio in r["usefulness"]["ratio"]) / n,
        "log ratio": mean_or_nan([math.log(ratio) for ratio in r["usefulness"]["ratio"]]),
        "heldout": mean_or_nan([math.log(ratio) for ratio in r["usefulness_heldout"]["ratio"]]),
        "useful 1+": mean_or_nan([float(ratio > 1.1) for ratio in r["usefulness"]["ratio"][1:]]),
        "ratio 1+": mean_or_nan(logs[1:]),
        "ratio late": mean_or_nan(logs[n // 2:]),
        "ratio sum": sum(logs),
        "trend use": naive_trend(logs),
        "rel.var.": r["released"]["variance"][n],
        "rel.useful": sum(ratio > 1.1 for ratio in r["released"]["usefulness"]["ratio"]) / n,
        "rel.ratio": mean_or_nan([math.log(ratio) for ratio in r["released"]["usefulness"]["ratio"]]),
        "rel.causal": mean_or_nan(upper(r["released"]["causal"])),
        "influence": mean_or_nan(r["block_influence"]),
        "infl. sum": sum(r["block_influence"]),
        "trend infl": naive_trend(r["block_influence"]),
        "|J-I|/d": mean_or_nan(r["jacobian"]["deviation"]),
        "trend J-I": naive_trend(r["jacobian"]["deviation"]),
    }


def assert_scores(want: dict[str, dict[str, float]], table: str) -> None:
    """The columns of a table of scores, a line per label, and four decimals of every number."""
    width = max(map(len, want))
    assert all(len(line) <= 120 for line in table.splitlines())
    parts = [[cells(line, width, 11) for line in part.splitlines()] for part in table.split("\n\n")]
    joined = [[lines[0][0], *(cell for line in lines for cell in line[1:])] for lines in zip(*parts, strict=True)]
    header, *rows = joined
    assert header == ["", *next(iter(want.values()))]
    assert [row[0] for row in rows] == list(want)
    for row, scores in zip(rows, want.values(), strict=True):
        assert [float(x) for x in row[1:]] == pytest.approx(list(scores.values()), abs=5.1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", MODELS)
def test_every_score_of_a_model_is_what_the_naive_scores_come_to(kind):
    want = scores_by_hand(kind)
    assert probe.scores(measured(kind)) == pytest.approx(want, rel=1e-6, nan_ok=True)
    assert list(probe.scores(measured(kind))) == list(want) == probe.score_names()[:-1]
    assert_scores({kind: want}, probe.score_table({kind: measured(kind)}))


def test_several_models_are_laid_side_by_side():
    table = probe.score_table({kind: measured(kind) for kind in MODELS})
    assert_scores({kind: scores_by_hand(kind) for kind in MODELS}, table)


def test_the_comparison_is_of_what_was_measured_of_all_models():
    only_variance = {key: measured("moe")[key] for key in ("loss", "variance")}
    of_tasks = {"tasks": {"average": {"primary": 0.625}}}
    table = probe.score_table({"dense": measured("dense") | of_tasks, "a moe": only_variance | of_tasks})
    want = {}
    for label, kind in (("dense", "dense"), ("a moe", "moe")):
        scores = scores_by_hand(kind)
        want[label] = {"loss": scores["loss"], "last var.": scores["last var."], "accuracy": 0.625}
    assert_scores(want, table)


def test_the_scores_are_the_same_from_a_probe_json_that_was_written_and_read():
    """As recipe.py takes them; nan is null there."""
    text = json.dumps(measured("dense"))
    again = json.loads(text, parse_constant=lambda constant: None)
    assert probe.scores(again) == pytest.approx(scores_by_hand("dense"), rel=1e-6)


def test_of_a_single_layer_there_is_a_score_but_no_mean_over_pairs():
    r = {"loss": 2.0, "causal": [[0.0]], "causal_mean": 0.0, "released": {
        "causal": [[0.0]], "variance": [1.0, 2.0], "usefulness": {"ratio": [1.5], "score": 1.0, "mean_log_ratio": 0.4}}}
    scores = probe.scores(r)
    assert scores["causal"] == 0 and math.isnan(scores["rel.causal"]) and scores["rel.var."] == 2.0
    assert "nan" in probe.score_table({"one": r})


def test_numbers_in_the_table_of_scores_never_run_together():
    """A stream's variance of a million is real: massive activations."""
    line = probe.score_table({"x": {"loss": 3.1234, "variance": [1.0, 1234567.8901]}}).splitlines()[1]
    assert line.split() == ["x", "3.1234", "1234567.8901"]


# ---------------------------------------------------------------------------------------------------------------------
# remarks


def test_the_cheapest_runs_are_those_of_least_loss():
    r = naive_scores("dense")
    lines = [line for line in probe.remarks(measured("dense"), "dir/ckpt.pt") if line.startswith("cheapest")]
    assert len(lines) == len(REMOVE)
    for length, line in zip(REMOVE, lines):
        losses = r["removal"][str(length)]
        s = losses.index(min(losses))
        blocks = ",".join(str(l) for l in range(s, s + length))
        assert line.startswith(f"cheapest run of {length}: blocks {blocks}, ")
        assert f"x{min(growths(r, losses)):.3f} " in line and f"probe.py dir/ckpt.pt --drop {blocks} --save" in line


def test_no_command_is_proposed_that_drops_all_blocks():
    """--drop refuses it."""
    r = {"loss": 1.0, "removal": {"1": [1.0, 2.0], "2": [5.0], "attn": [1.0, 1.0]}}
    lines = list(probe.remarks(r, "ckpt.pt"))
    assert sum("--drop" in line for line in lines) == 1 and "--drop 0 " in lines[0]


def test_a_loose_fit_and_sampled_pairs_are_remarked():
    r = {"loss": 1.0, "usefulness": {"loose_fit": False}, "usefulness_heldout": {"loose_fit": True},
         "permutation_mean": 0.25, "permutation_standard_error": 0.031, "permutation_pairs": 7}
    pairs, loose = probe.remarks(r, "ckpt.pt")
    assert pairs == "permutation score 0.2500 +- 0.0310, the mean over 7 sampled pairs"
    assert loose.startswith("usefulness_heldout comes from a loose fit")
    assert list(probe.remarks({"loss": 1.0}, "ckpt.pt")) == []


# ---------------------------------------------------------------------------------------------------------------------
# the verdict


def losing(factors: Sequence[float]) -> list[float]:
    """The losses at which a perplexity of e is multiplied by these."""
    return [1.0 + math.log(factor) for factor in factors]


@pytest.mark.parametrize("result, want", [
    ({"removal": {"1": losing([3.5, 1.25, 1.004, 9.0, 1.5, 1.02])}},
     "Most is done by blocks 3, 0 and 4: losing one of them multiplies the perplexity by 9, 3.5 and 1.5. "
     "Block 2 could go, for 1.004 times the perplexity."),
    ({"removal": {"1": losing([3.0, 1.2, 1.05]), "2": losing([4.0, 1.4])}},
     "Most is done by block 0: losing it multiplies the perplexity by 3. "
     "Block 2 could go, for 1.05 times the perplexity."),
    ({"removal": {"1": losing([3.0, 1.03, 1.01, 1.5, 2.0]), "2": losing([5, 1.05, 3, 6]), "4": losing([9.0, 1.08])}},
     "Most is done by blocks 0 and 4: losing one of them multiplies the perplexity by 3 and 2. "
     "Block 2 could go, for 1.01 times the perplexity; blocks 1 to 4 together for 1.08 times."),
    ({"removal": {"1": losing([3.0, 1.2])}},
     "Most is done by block 0: losing it multiplies the perplexity by 3. "
     "None could go cheaply: block 1 costs least, 1.2 times the perplexity."),
    ({"usefulness": {"ratio": losing([3.0, 1.05])}},                          # of a loss of 1: the losses themselves
     "Most is done by block 0: an affine map instead of it multiplies the perplexity by 3. "
     "Block 1 could be an affine map, for 1.05 times the perplexity."),
    ({"removal": {"2": losing([1.0, 2.0]), "attn": losing([1.0, 2.0, 3.0])}}, ""),
    ({"removal": {"1": losing([3.0])}}, ""), ({"variance": [1.0, 2.0, 3.0]}, ""),
], ids=["blocks", "a dear run", "a cheap run", "all dear", "maps", "runs of two only", "one block", "nothing"])
def test_the_verdict_names_the_blocks_that_do_most_and_what_could_go(result, want):
    assert probe.verdict({"loss": 1.0} | result) == want


def test_the_verdict_on_a_real_measurement_is_that_of_the_naive_losses():
    r = naive_scores("dense")
    ratios = growths(r, r["removal"]["1"])
    said = probe.verdict(measured("dense"))
    assert f" block{'s' if len(ratios) > 3 else ''} {int(np.argmax(ratios))}" in said and f"{max(ratios):.3g}" in said
    assert f"lock {int(np.argmin(ratios))} co" in said and f"{min(ratios):.3g}" in said


# ---------------------------------------------------------------------------------------------------------------------
# figures


TWO = {"dense": "dense", "a moe": "moe"}                  # label: kind; of 5 and 4 layers
ONE_OR_TWO = pytest.mark.parametrize("labels", [{"dense": "dense"}, TWO], ids=["one", "two"])
PAGE = ["variance", "usefulness", "removal", "lens", "causal", "permutation"]


def page(results: dict[str, Any], names: Sequence[str]) -> Any:
    pytest.importorskip("matplotlib")
    return probe.picture(results, names)


def figure(name: str, labels: dict[str, str]) -> Any:
    return page({label: measured(kind) for label, kind in labels.items()}, [name])


def panels(fig: Any) -> list[Any]:
    """The parts of a page that hold one panel each."""
    return [place for strip in fig.subfigs for place in strip.subfigs]


def panel(fig: Any) -> Any:
    place, = panels(fig)
    return place


def legend(place: Any) -> list[str]:
    assert not any(ax.get_legend() for ax in place.axes)
    return [text.get_text() for of_panel in place.legends for text in of_panel.get_texts()]


def heading(fig: Any) -> list[str]:
    """What is above all panels, line by line."""
    lines = [text.get_text() for of_page in fig.legends for text in of_page.get_texts()]
    assert bool(lines) != bool(fig.get_suptitle())
    return lines or fig.get_suptitle().splitlines()


def look(artist: Any) -> tuple[str, str, str]:
    """How a line is told from others."""
    return artist.get_color(), artist.get_linestyle(), artist.get_markerfacecolor()


def assert_not_on_the_frame(ax: Any, ys: Sequence[float]) -> None:
    """Nor outside of it: at least a fiftieth of the height away."""
    low, high = ax.transData.transform([(0, y) for y in ax.get_ylim()])[:, 1]
    places = ax.transData.transform([(0, y) for y in ys])[:, 1]
    assert (places > low + 0.02 * (high - low)).all() and (places < high - 0.02 * (high - low)).all()


def curves_by_hand(name: str, kind: str) -> dict[str, list[float]]:
    """The lines of a figure, by what they are called among several of one model, a value per block."""
    r = naive_scores(kind)
    if name == "removal":
        return {f"run of {length}": [100 * (x - 1) for x in growths(r, r["removal"][str(length)])] for length in REMOVE}
    if name == "variance":
        return {"stream": r["variance"][1:], "attention adds": r["attn_variance"], "FFN adds": r["ffn_variance"]}
    return {"": {"lens": r["lens"]["kl"][1:], "jacobian": r["jacobian"]["deviation"]}[name]}


AFTER = "block (not shown: the embedding's output h_0)"
CURVES = {"variance": ("Variance of the stream after each block", AFTER, "variance", "log"),
          "removal": ("How much the perplexity grows without a block or a run of blocks", "block, of a run the first",
                      "growth of the perplexity", "symlog"),
          "jacobian": ("How far each block's mean Jacobian J is from the identity", "block",
                       r"$\|J - I\|_F\,/\,d$", "log"),
          "lens": ("Lens: how far what the head reads after each block is from the model's output", AFTER,
                   "KL divergence (nats)", "linear")}


@ONE_OR_TWO
@pytest.mark.parametrize("name", CURVES)
def test_curves_are_drawn_of_all_results(name, labels):
    place = panel(figure(name, labels))
    ax, = place.axes
    assert (place.get_suptitle(), ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == CURVES[name]
    want = [(label, line, y) for label, kind in labels.items() for line, y in curves_by_hand(name, kind).items()]
    lines = ax.lines[:len(want)]
    assert [list(line.get_ydata()) for line in ax.lines[len(want):]] == [[0, 0]] * (name == "removal")    # 0%
    colors, styles = {}, {}
    for line, (label, called, y) in zip(lines, want):
        assert line.get_xdata().tolist() == list(range(len(y)))
        assert line.get_ydata() == pytest.approx(y, rel=1e-6, abs=1e-5)
        colors.setdefault(label if len(labels) > 1 else called, set()).add(line.get_color())
        styles.setdefault(called, set()).add(line.get_linestyle())
    for looks in (colors, styles):                                   # the color is the model's, the style the line's
        assert all(len(of_one) == 1 for of_one in looks.values()) and len(set.union(*looks.values())) == len(looks)
    assert legend(place) == (list(styles) if len(styles) > 1 else [])
    if len(labels) > 1:                                              # the heading tells the colors
        samples = place.figure.figure.legends[0].legend_handles
        told = {text.split(":")[0]: {line.get_color()} for text, line in zip(heading(place.figure.figure), samples)}
        assert told == colors
    assert_not_on_the_frame(ax, [y for line in lines for y in line.get_ydata()])


@pytest.mark.parametrize("n", [3, 16, 100])
@pytest.mark.parametrize("name", ["variance", "usefulness", "removal", "jacobian", "lens"])
def test_ticks_are_at_blocks(name, n):
    """Of 100 blocks none is number 100, and of 3 none is number 1.5."""
    r = {"loss": 1.0, "variance": [1.0 + l for l in range(n + 1)], "lens": {"kl": [0.1] * (n + 1)},
         "usefulness": {"ratio": [1.01] * n, "score": 0.0, "mean_log_ratio": 0.01},
         "usefulness_heldout": {"ratio": [1.01] * n, "mean_log_ratio": 0.01},
         "removal": {"1": [2.0] * n}, "block_influence": [0.1] * n, "jacobian": {"deviation": [0.1] * n}}
    ax, = panel(page({"x": r}, [name])).axes
    low, high = ax.get_xlim()
    ticks = [x for x in ax.get_xticks() if low <= x <= high]
    assert len(ticks) >= 3 and all(x in range(n) for x in ticks)


def test_what_attention_and_ffn_add_is_in_no_legend_where_it_was_not_measured():
    place = panel(page({"x": {"variance": [0.1, 1.0, 2.0]}}, ["variance"]))
    assert len(place.axes[0].lines) == 1 and legend(place) == []


def test_a_perplexity_that_explodes_is_drawn_at_the_rim_and_growth_is_in_plain_percent():
    r = {"loss": 1.0, "removal": {"1": [2.0, 3000.0, 30.0, 1.0 + math.log(0.95)]}, "block_influence": [0.1]}
    ax = panel(page({"x": r}, ["removal"])).axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([100 * (math.e - 1), 1e11, 1e11, -5.0])
    assert [ax.yaxis.get_major_formatter()(x) for x in (-10, 0, 1, 1000)] == ["-10%", "0%", "+1%", "+1,000%"]


def points_of(ax: Any) -> list[Any]:
    """The points of a lollipop figure in order; not the arrows, nor the lines across."""
    return [line for line in ax.lines if line.get_marker() == "o"]


@ONE_OR_TWO
def test_usefulness_is_drawn_in_sample_and_held_out_as_points_on_stems_that_begin_at_1(labels):
    place = panel(figure("usefulness", labels))
    ax, = place.axes
    assert place.get_suptitle() == "Loss with an affine map in place of a block"
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("block", "loss with the map / loss", "linear")
    assert not ax.containers and not ax.patches                              # no bars
    want = [(k, naive_scores(kind)[key]["ratio"])
            for k, kind in enumerate(labels.values()) for key in ("usefulness", "usefulness_heldout")]
    points = points_of(ax)
    assert len(points) == len(want) == len(ax.collections)
    for line, stems, (k, ratio) in zip(points, ax.collections, want):
        x = [l + (k - (len(labels) - 1) / 2) * 0.7 / len(labels) for l in range(len(ratio))]    # in the midst: l
        ends = np.array([segment for segment in stems.get_segments()])
        assert ends[:, 0] == pytest.approx(np.stack([x, np.ones(len(x))], 1))
        rim = ends[:, 1, 1].max()
        below = [l for l in range(len(ratio)) if ratio[l] <= rim * (1 + 1e-4)]
        assert ends[below, 1] == pytest.approx(np.stack([np.array(x)[below], np.array(ratio)[below]], 1), rel=1e-4)
        assert set(line.get_xdata()) <= set(ends[:, 1, 0])
    assert len({look(line) for line in points}) == len(points)               # no two alike
    assert legend(place) == ["in-sample", "held out"]
    assert [1.1, 1.1] in [list(line.get_ydata()) for line in ax.lines]
    assert "useful\nabove 1.1" in [text.get_text() for text in ax.texts]


def usefulness_of(ratio: Sequence[float]) -> dict[str, Any]:
    scores = {"ratio": list(ratio), "score": 0.0, "mean_log_ratio": 0.0}
    return {"loss": 1.0, "usefulness": scores, "usefulness_heldout": scores}


def test_a_ratio_far_above_the_others_is_an_arrow_with_its_value():
    ratio = [7.25] + [1.02] * 14 + [1.2]
    ax, = panel(page({"x": usefulness_of(ratio)}, ["usefulness"])).axes
    assert ax.get_ylim()[1] < 2 and {"7.25"} == {text.get_text() for text in ax.texts} - {"useful\nabove 1.1"}
    for points, arrows in zip(points_of(ax), [line for line in ax.lines if line.get_marker() == "^"], strict=True):
        assert list(points.get_xdata()) == list(range(1, 16)) and list(arrows.get_xdata()) == [0]
        assert list(points.get_ydata()) == ratio[1:] and 1.2 < arrows.get_ydata()[0] < ax.get_ylim()[1]


@pytest.mark.parametrize("ratio", [[1.01] * 6, [0.97, 1.0, 1.02], [1.5, 1.4, 1.3], [1.1]], ids=str)
def test_the_line_of_usefulness_does_not_lie_on_the_frame(ratio):
    ax, = panel(page({"x": usefulness_of(ratio)}, ["usefulness"])).axes
    assert_not_on_the_frame(ax, [1.0, 1.1, *ratio])


HEAT = {"causal": ("Causal score: how block l's update changes without block s", "later block l", "skipped block s",
                   "change / update (log scale)"),
        "permutation": ("Permutation score: how the loss changes when blocks i and j are swapped", "block j", "block i",
                        "change of the loss / loss (log scale)")}


@ONE_OR_TWO
@pytest.mark.parametrize("name", HEAT)
def test_heat_maps_are_drawn_side_by_side_on_one_scale(name, labels):
    place = panel(figure(name, labels))
    *axes, bar = place.axes
    assert len(axes) == len(labels) and legend(place) == [] and place.get_suptitle() == HEAT[name][0]
    want = [np.array(naive_scores(kind)[name]) for kind in labels.values()]
    for ax, a, label in zip(axes, want, labels):
        image, = ax.images
        shown = image.get_array()
        assert (ax.get_xlabel(), ax.get_ylabel()) == HEAT[name][1:3]
        assert ax.get_title() == (label if len(labels) > 1 else "")
        assert image.origin == "upper" and shown.shape == a.shape             # row s is row s, column l column l
        blank = np.ma.getmaskarray(shown) | np.isnan(np.ma.getdata(shown))
        assert (blank == (a == 0)).all() and a.diagonal().sum() == 0          # nothing is drawn where nothing is
        low, high = image.norm.vmin, image.norm.vmax
        assert shown[~blank].data == pytest.approx(np.maximum(a[~blank], low), rel=1e-7)
        largest = max(map(np.max, want))
        assert high == pytest.approx(largest) and low >= high / 1001
        assert image.norm(math.sqrt(low * high)) == pytest.approx(0.5)        # logarithmic
        assert not ax.collections                                             # and nothing is hatched
    assert bar.get_ylabel() == HEAT[name][3] and bar.get_ylim() == pytest.approx((low, high))


def test_pairs_that_were_not_sampled_are_hatched_and_the_diagonal_is_not():
    nan = math.nan
    P = [[0.0, 0.5, nan], [0.5, 0.0, 0.25], [nan, 0.25, 0.0]]
    for r in ({"permutation": P, "permutation_mean": 0.4},
              json.loads(json.dumps({"permutation": P, "permutation_mean": 0.4}), parse_constant=lambda _: None)):
        ax = panel(page({"x": r}, ["permutation"])).axes[0]
        image, = ax.images
        shown = image.get_array()
        blank = np.ma.getmaskarray(shown) | np.isnan(np.ma.getdata(shown))
        assert (~blank).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
        assert image.norm.vmax == 0.5
        hatched, = ax.collections
        centers = {tuple(path.get_extents().get_points().mean(0)) for path in hatched.get_paths()}
        assert hatched.get_hatch() and centers == {(2, 0), (0, 2)} and "hatched: not sampled" in ax.get_xlabel()


def test_a_swap_that_changes_nothing_is_drawn():
    P = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.25], [0.5, 0.25, 0.0]]
    image, = panel(page({"x": {"permutation": P, "permutation_mean": 0.2}}, ["permutation"])).axes[0].images
    assert image.get_array()[0, 1] == image.norm.vmin == pytest.approx(0.0005)


@pytest.mark.parametrize("name", ["causal", "permutation"])
def test_a_model_of_one_layer_has_a_figure_too(name, tmp_path):
    r = {"loss": 1.0, "causal": [[0.0]], "permutation": [[0.0]], "causal_mean": 0.0, "permutation_mean": 0.0}
    page({"one": r}, [name]).savefig(tmp_path / "x.png")


@ONE_OR_TWO
def test_one_page_shows_which_layers_are_used(labels):
    """The panels of the single figures, each with what it has there, and none with a second axis."""
    fig = page({label: measured(kind) for label, kind in labels.items()}, PAGE)
    titles = {place.get_suptitle().replace("\n", " "): place for place in panels(fig)}
    order = sorted(PAGE, key=lambda name: len(labels) > 1 and name in HEAT)     # maps of several take rows of their own
    assert list(titles) == [panel(figure(name, labels)).get_suptitle() for name in order]
    assert [len(strip.subfigs) for strip in fig.subfigs] == ([2, 2, 2] if len(labels) == 1 else [2, 2, 1, 1])
    for name, place in zip(order, titles.values()):
        alone = panel(figure(name, labels))
        assert legend(place) == legend(alone)
        assert [(len(ax.lines), len(ax.images), ax.get_ylabel()) for ax in place.axes] == [
            (len(ax.lines), len(ax.images), ax.get_ylabel()) for ax in alone.axes]
        assert len(place.axes) == (len(labels) + 1 if name in HEAT else 1)      # a color bar, and no second axis


def test_the_heading_tells_model_tokens_loss_and_scores():
    settings = {"n_layer": 5, "n_embd": 64, "n_head": 4, "n_kv_head": 1, "n_experts": 8, "top_k": 2, "norm": "lns"}
    ran = {"settings": settings, "samples": 7, "length": 16, "tokens": "my.txt"}
    tasks = {"tasks": {"average": {"primary": 0.342, "chance": 0.333}}}
    r = measured("dense") | {"run": ran} | tasks
    s = {name: f"{score:.4g}" for name, score in scores_by_hand("dense").items()}

    def said(results, names):
        return " ".join(heading(page(results, names))).replace("\n", " ")
    size = "5 layers 64 wide, GQA 4:1, 8 experts, top 2, norm lns"
    assert said({"deep": r}, PAGE) == (
        f"deep: {size}, loss {s['loss']}, causal {s['causal']}, permutation {s['permuted']}, usefulness {s['useful']}, "
        "accuracy 0.342 (chance 0.333) on 7 x 16 tokens of my.txt")
    assert said({"deep": r}, ["causal"]) == (
        f"deep: {size}, loss {s['loss']}, causal {s['causal']} on 7 x 16 tokens of my.txt")
    plain = settings | {"n_kv_head": 4, "n_experts": 0, "norm": "pre"}
    both = said({"deep": r, "plain": r | {"run": ran | {"settings": plain}}}, ["causal"])
    assert both.endswith(f" plain: 5 layers 64 wide, loss {s['loss']}, causal {s['causal']} on 7 x 16 tokens of my.txt")
    assert said({"x": measured("dense")}, ["causal"]) == f"x: loss {s['loss']}, causal {s['causal']}"


def test_no_line_of_a_heading_or_title_is_wider_than_its_place():
    """Whatever models are called; at 9 points a page takes some 120 characters."""
    labels = {"a_model_with_quite_a_long_name" + "_" * i: measured("dense") for i in range(4)}
    fig = page(labels, PAGE)
    assert max(len(line) for text in heading(fig) for line in text.splitlines()) <= 112
    for strip in fig.subfigs:
        for place in strip.subfigs:
            assert max(map(len, place.get_suptitle().splitlines())) <= 92 / len(strip.subfigs)


def test_the_page_has_what_was_measured_earlier_as_well(run_main, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS["dense"])), "ckpt.pt")
    np.save("mine.npy", make_tokens(4, 8).numpy())
    honest, pages = probe.picture, []
    monkeypatch.setattr(probe, "picture", lambda results, names: pages.append(names) or honest(results, names))
    for name in ("lens", "variance"):
        assert run_main(probe, "ckpt.pt", "--only", name, "--tokens", "mine.npy").status == 0
    assert pages == [["lens"], ["lens"], ["variance"], ["lens"], ["variance", "lens"]]


WITH_FIGURE = {*CURVES, *HEAT, "usefulness"}


def test_every_experiment_has_a_figure_but_three():
    assert {name for name, experiment in EXPERIMENTS.items() if experiment.figure} == WITH_FIGURE
    assert set(EXPERIMENTS) - WITH_FIGURE == {"released", "contribution", "sparsity"}


@pytest.mark.parametrize("results, names", [
    ({"dense": {"loss", "variance", "causal", "causal_mean"}}, {"variance", "causal", "probe"}),
    ({"dense": {"loss", "variance", "causal", "causal_mean"}, "moe": {"loss", "variance", "lens"}},
     {"variance", "probe"}),
    ({"dense": {"loss", "jacobian"}}, {"jacobian"}),
    ({"dense": {"loss"}}, set()),
    ({"dense": None, "moe": None}, WITH_FIGURE | {"probe"}),
], ids=["one", "two", "none of the page's", "none", "all"])
def test_what_all_results_have_is_drawn_into_the_folder(results, names, tmp_path):
    pytest.importorskip("matplotlib")
    of_kinds = {kind: {key: value for key, value in measured(kind).items() if keys is None or key in keys}
                for kind, keys in results.items()}
    said = f"figures in {tmp_path}" if names else ""
    if "probe" in names:
        said += f", on one page in {tmp_path / 'probe.png'}"
    assert probe.draw(of_kinds, tmp_path) == said
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "svg")}
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert path.stat().st_size > 5000 and (content.startswith(b"\x89PNG") or b"<svg" in content[:1000])
    if "probe" in names:
        width, _ = np.frombuffer((tmp_path / "probe.png").read_bytes()[16:24], dtype=">u4")
        assert width == 1200                                                     # 8 inches at 150 dots each
