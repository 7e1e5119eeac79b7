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


def scores_by_hand(kind: str) -> dict[str, float]:
    """The columns in order."""
    r, n = naive_scores(kind), DEPTH[kind]
    return {
        "loss": r["loss"],
        "last var.": r["variance"][n],
        "causal": mean_or_nan(upper(r["causal"])),
        "permuted": mean_or_nan(upper(r["permutation"])),
        "useful": sum(ratio > 1.1 for ratio in r["usefulness"]["ratio"]) / n,
        "log ratio": mean_or_nan([math.log(ratio) for ratio in r["usefulness"]["ratio"]]),
        "heldout": mean_or_nan([math.log(ratio) for ratio in r["usefulness_heldout"]["ratio"]]),
        "rel.var.": r["released"]["variance"][n],
        "rel.useful": sum(ratio > 1.1 for ratio in r["released"]["usefulness"]["ratio"]) / n,
        "rel.ratio": mean_or_nan([math.log(ratio) for ratio in r["released"]["usefulness"]["ratio"]]),
        "rel.causal": mean_or_nan(upper(r["released"]["causal"])),
        "influence": mean_or_nan(r["block_influence"]),
        "|J-I|/d": mean_or_nan(r["jacobian"]["deviation"]),
    }


def assert_scores(want: dict[str, dict[str, float]], table: str) -> None:
    """The columns of a table of scores, a line per label, and four decimals of every number."""
    width = max(map(len, want))
    header, *rows = [cells(line, width, 11) for line in table.splitlines()]
    assert header == ["", *next(iter(want.values()))]
    assert [row[0] for row in rows] == list(want)
    for row, scores in zip(rows, want.values(), strict=True):
        assert [float(x) for x in row[1:]] == pytest.approx(list(scores.values()), abs=5.1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_every_score_of_a_model_is_what_the_naive_scores_come_to(kind):
    want = scores_by_hand(kind)
    assert probe.scores(measured(kind)) == pytest.approx(want, rel=1e-6)
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


def figure(name: str, labels: dict[str, str]) -> Any:
    pytest.importorskip("matplotlib")
    return EXPERIMENTS[name].figure({label: measured(kind) for label, kind in labels.items()})


def legend(fig: Any) -> list[str]:
    assert not any(ax.get_legend() for ax in fig.axes)
    return [text.get_text() for of_figure in fig.legends for text in of_figure.get_texts()]


def curves_by_hand(name: str, kind: str) -> dict[str, list[float]]:
    """The lines of a figure, by what they are called among several of one model."""
    r = naive_scores(kind)
    if name == "removal":
        return {f"run of {length}": growths(r, r["removal"][str(length)]) for length in REMOVE}
    return {"": {"variance": r["variance"], "lens": r["lens"]["kl"], "jacobian": r["jacobian"]["deviation"]}[name]}


PASSED = "blocks passed (0: embedding)"
CURVES = {"variance": ("Variance of the residual stream", PASSED, "variance", "log"),
          "removal": ("Perplexity without a run of blocks", "first removed block", "perplexity ratio", "log"),
          "jacobian": ("Distance of the Jacobian from the identity", "block", r"$\|J - I\|_F\,/\,d$", "linear"),
          "lens": ("What each stream already says", PASSED, "KL to the model's output (nats)", "linear")}


@ONE_OR_TWO
@pytest.mark.parametrize("name", CURVES)
def test_curves_are_drawn_of_all_results(name, labels):
    fig = figure(name, labels)
    ax, = fig.axes
    assert (fig.get_suptitle(), ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == CURVES[name]
    want = [(label, line, y) for label, kind in labels.items() for line, y in curves_by_hand(name, kind).items()]
    assert len(ax.lines) == len(want)
    entries = []
    for line, (label, called, y) in zip(ax.lines, want):
        assert line.get_xdata().tolist() == list(range(len(y)))
        assert line.get_ydata() == pytest.approx(y, rel=1e-6, abs=1e-12)
        entries.append(", ".join(filter(None, [label, called])) if len(labels) > 1 else called)
    assert legend(fig) == (entries if len(entries) > 1 else [])
    assert not fig.axes[0].get_title()


def test_a_perplexity_that_explodes_is_drawn_at_the_rim():
    pytest.importorskip("matplotlib")
    r = {"loss": 1.0, "removal": {"1": [2.0, 3000.0, 30.0]}, "block_influence": []}
    fig = EXPERIMENTS["removal"].figure({"x": r})
    assert fig.axes[0].lines[0].get_ydata() == pytest.approx([math.exp(1), 1e9, 1e9])


@ONE_OR_TWO
def test_usefulness_is_drawn_as_bars_that_begin_at_1_beside_each_other(labels):
    fig = figure("usefulness", labels)
    ax, = fig.axes
    assert fig.get_suptitle() == "Loss with a block replaced by its best affine map"
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("block", "loss ratio", "linear")
    width = 0.8 / len(labels)
    assert len(ax.containers) == len(labels)
    for k, (bars, (label, kind)) in enumerate(zip(ax.containers, labels.items())):
        ratio = naive_scores(kind)["usefulness"]["ratio"]
        assert bars.get_label() == label
        assert [bar.get_y() for bar in bars] == [1] * len(ratio)
        assert [bar.get_height() for bar in bars] == pytest.approx([x - 1 for x in ratio], rel=1e-4)
        assert [bar.get_width() for bar in bars] == pytest.approx([width] * len(ratio))
        lefts = [l - 0.4 + k * width for l in range(len(ratio))]             # together they are centred on l
        assert [bar.get_x() for bar in bars] == pytest.approx(lefts)
    line, = ax.lines
    assert list(line.get_ydata()) == [1.1, 1.1]
    assert sorted(legend(fig)) == sorted([*labels, "useful above 1.1"])


HEAT = {"causal": ("Causal score C[s, l]", "later block l", "skipped block s"),
        "permutation": ("Relative change of the loss by a swap", "block j", "block i")}


@ONE_OR_TWO
@pytest.mark.parametrize("name", HEAT)
def test_heat_maps_are_drawn_side_by_side_on_one_scale(name, labels):
    fig = figure(name, labels)
    *axes, bar = fig.axes
    assert len(axes) == len(labels) and legend(fig) == [] and fig.get_suptitle() == HEAT[name][0]
    want = [np.array(naive_scores(kind)[name]) for kind in labels.values()]
    for ax, a, label in zip(axes, want, labels):
        image, = ax.images
        shown = image.get_array()
        assert (ax.get_xlabel(), ax.get_ylabel()) == HEAT[name][1:]
        assert ax.get_title() == (label if len(labels) > 1 else "")
        assert image.origin == "upper" and shown.shape == a.shape             # row s is row s, column l column l
        blank = np.ma.getmaskarray(shown) | np.isnan(np.ma.getdata(shown))
        assert (blank == (a == 0)).all() and a.diagonal().sum() == 0          # nothing is drawn where nothing is
        assert shown[~blank].data == pytest.approx(a[~blank], rel=1e-7)
        assert (image.norm.vmin, image.norm.vmax) == pytest.approx((0, max(map(np.max, want))))
    assert bar.get_ylim() == pytest.approx((0, max(map(np.max, want))))


def test_pairs_that_were_not_sampled_are_blank_and_do_not_set_the_scale():
    pytest.importorskip("matplotlib")
    nan = math.nan
    P = [[0.0, 0.5, nan], [0.5, 0.0, 0.25], [nan, 0.25, 0.0]]
    fig = EXPERIMENTS["permutation"].figure({"x": {"permutation": P}})
    shown = fig.axes[0].images[0].get_array()
    blank = np.ma.getmaskarray(shown) | np.isnan(np.ma.getdata(shown))
    assert (~blank).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert fig.axes[0].images[0].norm.vmax == 0.5


@pytest.mark.parametrize("name", ["causal", "permutation"])
def test_a_model_of_one_layer_has_a_figure_too(name, tmp_path):
    pytest.importorskip("matplotlib")
    r = {"loss": 1.0, "causal": [[0.0]], "permutation": [[0.0]], "causal_mean": 0.0, "permutation_mean": 0.0}
    EXPERIMENTS[name].figure({"one": r}).savefig(tmp_path / "x.png")


WITH_FIGURE = {*CURVES, *HEAT, "usefulness"}


def test_every_experiment_has_a_figure_but_three():
    assert {name for name, experiment in EXPERIMENTS.items() if experiment.figure} == WITH_FIGURE
    assert set(EXPERIMENTS) - WITH_FIGURE == {"released", "contribution", "sparsity"}


@pytest.mark.parametrize("results, names", [
    ({"dense": {"loss", "variance", "causal"}}, {"variance", "causal"}),
    ({"dense": {"loss", "variance", "causal"}, "moe": {"loss", "variance", "lens"}}, {"variance"}),
    ({"dense": {"loss"}}, set()),
    ({"dense": None, "moe": None}, WITH_FIGURE),
], ids=["one", "two", "none", "all"])
def test_what_all_results_have_is_drawn_into_the_folder(results, names, tmp_path):
    pytest.importorskip("matplotlib")
    of_kinds = {kind: {key: value for key, value in measured(kind).items() if keys is None or key in keys}
                for kind, keys in results.items()}
    assert probe.draw(of_kinds, tmp_path) == (f"figures in {tmp_path}" if names else "")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
