"""probe.py from the command line: what it reads, prints and writes, and how it refuses. And the dropping of blocks.

    python -m pytest -q tests/test_probe.py

Elsewhere: the numbers (test_experiments.py), how they are measured (test_measurement.py), tables and figures
(test_shown.py), tasks (test_tasks.py), --sample (test_sample.py), --export (test_interchange.py).
"""
from __future__ import annotations

import errno
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probe
import train
from data import load_model, save_checkpoint
from helpers import ROOT, assert_mistake, checkpoint_of, loss_by_hand, make_model, make_tokens, run_python, run_script
from probe import EXPERIMENTS, without_blocks
from test_experiments import (EXPERTS, T, mean_jacobian, measured, own_tokens, statistics, truth)

CLI = dict(vocab_size=264, block_size=16, n_layer=4, n_head=2, n_kv_head=1)


# ---------------------------------------------------------------------------------------------------------------------
# dropping blocks


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("norm", ["pre", "lns", "peri"])
@pytest.mark.parametrize("drop", [[0], [1, 3], [4], [0, 1, 2, 4]], ids=str)
def test_a_checkpoint_without_blocks_computes_what_the_model_without_them_does(kind, norm, drop, tmp_path):
    model = make_model(torch.float32, n_layer=5, norm=norm, **(EXPERTS if kind == "moe" else {}))
    saved = checkpoint_of(model)
    before = {name: w.clone() for name, w in saved["model"].items()}
    save_checkpoint(tmp_path / "pruned.pt", without_blocks(saved, drop))
    pruned, again = load_model(tmp_path / "pruned.pt")
    with torch.no_grad():
        x = model.embed(make_tokens(7, T))
        for l, block in enumerate(model.blocks):
            x = x if l in drop else block(x)
        want = model.head(model.norm(x))
        got = pruned(make_tokens(7, T))[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert pruned.config.n_layer == 5 - len(drop) and again["kept"] == [l for l in range(5) if l not in drop]
    assert saved["settings"]["n_layer"] == 5 and all(torch.equal(w, before[name]) for name, w in saved["model"].items())


@pytest.mark.parametrize("norm", ["pre", "lns"])
def test_dropping_twice_is_dropping_both(norm):
    saved = checkpoint_of(make_model(torch.float32, n_layer=6, norm=norm))
    twice, once = without_blocks(without_blocks(saved, [1, 4]), [0, 2]), without_blocks(saved, [0, 1, 3, 4])
    assert twice["kept"] == once["kept"] == [2, 5] and twice["settings"] == once["settings"]
    assert twice["model"].keys() == once["model"].keys()
    assert all(torch.allclose(w, once["model"][name], rtol=1e-6) for name, w in twice["model"].items())


# ---------------------------------------------------------------------------------------------------------------------
# the command line: what the tests of it share


def trained(model, corpus: Path | None = None) -> dict[str, Any]:
    """As train.py saves it, which also notes the data."""
    saved = checkpoint_of(model)
    if corpus:
        saved["settings"]["data"] = str(corpus)
    return saved


@pytest.fixture
def workplace(corpus, tmp_path, monkeypatch):
    """A folder with a checkpoint of a dense model, dense/ckpt.pt, and one of a MoE, moe/ckpt.pt."""
    for name, settings in (("dense", {}), ("moe", EXPERTS)):
        model = make_model(torch.float32, **CLI | settings)
        save_checkpoint(tmp_path / name / "ckpt.pt", trained(model, corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace, run_main):
    """cli(*args): probe.py in the workplace: exit status, stdout, stderr."""
    return functools.partial(run_main, probe)


NO_FIGURES = "no figures without matplotlib: pip install matplotlib\n"


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Figures take most of the time of a tiny probe."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def strict_json(path: Path) -> Any:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def validation_windows(corpus: Path, length: int) -> np.ndarray:
    """The inputs of all validation windows, read from the files themselves."""
    meta = json.loads((corpus / "meta.json").read_text())
    flat = np.concatenate([np.fromfile(corpus / s["file"], dtype=meta["dtype"]) for s in meta["val"]["shards"]])
    windows = (len(flat) - 1) // length
    return flat[:windows * length].reshape(windows, length).astype(np.int64)


@torch.no_grad()
def whole_loss(model, tokens) -> float:
    return F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def shape(x: Any) -> list[int]:
    return [len(x)] + shape(x[0]) if isinstance(x, list) else []


def shapes_of(result: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The shapes of those entries of a result that `like` has."""
    return {key: shapes_of(result[key], want) if isinstance(want, dict) else shape(result[key])
            for key, want in like.items()}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_probe_json_holds_every_promised_key(kind, cli, workplace, corpus):
    pytest.importorskip("matplotlib")
    code, out, err = cli(f"{kind}/ckpt.pt", "--samples", 7)
    assert code == 0 and all(", micro-batch " in line for line in err.splitlines())    # progress, where it takes long
    r = strict_json(workplace / kind / "probe.json")
    n, one = 4, [4]
    of_jacobian = dict.fromkeys(("deviation", "diagonal_mean", "diagonal_std", "off_diagonal", "spectral"), one)
    useful = {"ratio": one, "score": [], "mean_log_ratio": []}
    of_attention = dict.fromkeys(("entropy", "keys_for_90_percent", "effective_keys"), one)
    of_experts = {"load": [n, 12], "entropy": one, "never_used": one}
    want = {
        "loss": [], "variance": [n + 1], "attn_variance": one, "ffn_variance": one, "variance_growth": one,
        "causal": [n, n], "causal_mean": [], "permutation": [n, n], "permutation_mean": [], "permutation_pairs": [],
        "usefulness": useful, "usefulness_heldout": useful, "block_influence": one, "jacobian": of_jacobian,
        "released": {"causal": [n, n], "usefulness": useful, "variance": [n + 1], "jacobian": of_jacobian},
        "removal": {"1": [n], "2": [n - 1], "attn": one, "ffn": one},
        "lens": dict.fromkeys(("kl", "loss", "top5_overlap"), [n + 1]),
        "contribution": dict.fromkeys(("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine"), one),
        "sparsity": {"attention": of_attention, "interaction_density": one, "below": []}
                    | ({"experts": of_experts} if kind == "moe" else {})}
    assert shapes_of(r, want) == want and set(r) == {*want, "seconds", "run"}
    assert all(shape(x) == one for w in r["sparsity"]["weights"].values() for x in w.values())
    assert set(r["removal"]) == set(want["removal"]) and ("experts" in r["sparsity"]) == (kind == "moe")
    assert all(x >= 0 for x in r["seconds"].values())
    assert all(isinstance(r["run"].pop(name), int) for name in ("weights", "checksum"))
    assert {k: v for k, v in r["run"].items() if k != "settings"} == {
        "remove": [1, 2], "pairs": 0, "below": 0.1, "jacobian_samples": None,
        "checkpoint": f"{kind}/ckpt.pt", "tokens": f"{corpus} (validation)", "samples": 7, "length": 16, "seed": 0,
        "experiments": list(EXPERIMENTS), "dtype": "float32", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    assert r["run"]["settings"]["n_layer"] == 4 and r["run"]["settings"]["n_experts"] == (12 if kind == "moe" else 0)
    for name in ("variance", "causal", "permutation", "usefulness", "jacobian", "removal", "lens"):
        assert (workplace / kind / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name

    cheapest = int(np.argmin(r["removal"]["2"]))
    drop = f"{cheapest},{cheapest + 1}"
    ratio = math.exp(r["removal"]["2"][cheapest] - r["loss"])
    line = next(line for line in out.splitlines() if line.startswith("cheapest run of 2:"))
    assert f"blocks {drop}," in line and f"x{ratio:.3f}" in line
    assert f"python probe.py {kind}/ckpt.pt --drop {drop} --save" in line
    assert "loose fit" in out and str(workplace) not in err
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()][:n]
    header = next(line.split() for line in out.splitlines() if line.startswith("block "))
    assert [int(row[0]) for row in rows] == list(range(n))
    assert [float(row[header.index("affine")]) for row in rows] == pytest.approx(r["usefulness"]["ratio"], rel=1e-3)
    assert [float(row[header.index("variance")]) for row in rows] == pytest.approx(r["variance"][1:], rel=1e-3)


def test_the_tables_that_are_printed_are_those_of_the_result(cli, workplace, corpus, no_matplotlib):
    code, out, err = cli("dense/ckpt.pt", "--samples", 5)
    assert (code, err) == (0, NO_FIGURES)
    r = strict_json(workplace / "dense/probe.json")
    assert probe.block_table(r, 4) in out and probe.score_table({"dense": r}) in out
    assert out.splitlines()[1] == f"dense/ckpt.pt on 5 x 16 tokens of {corpus} (validation)"
    assert out.splitlines()[-2:] == ["dense/probe.json written", probe.verdict(r)] and probe.verdict(r)


@pytest.mark.parametrize("n, lengths", [(1, {"1"}), (2, {"1"}), (3, {"1", "2"}), (4, {"1", "2"}), (5, {"1", "2", "4"})])
def test_runs_of_1_2_4_blocks_and_so_on_are_removed_unless_others_are_asked_for(n, lengths, cli, workplace,
                                                                                no_matplotlib):
    save_checkpoint(workplace / "x.pt", checkpoint_of(make_model(torch.float32, **CLI | {"n_layer": n})))
    np.save("mine.npy", make_tokens(2, 8).numpy())
    for flags, want in ([], lengths), (["--remove", n], {str(n)}):
        assert cli("x.pt", "--only", "removal", "--tokens", "mine.npy", "--out", f"x{len(flags)}", *flags).status == 0
        assert set(strict_json(workplace / f"x{len(flags)}/probe.json")["removal"]) == want | {"attn", "ffn"}


def test_the_sequences_are_windows_of_the_validation_split(cli, workplace, corpus, no_matplotlib):
    windows = validation_windows(corpus, 12)
    assert cli("dense/ckpt.pt", "--only", "variance", "--length", 12, "--samples", 10**6)[0] == 0
    r = strict_json(workplace / "dense/probe.json")
    model = load_model("dense/ckpt.pt")[0].double()
    assert (r["run"]["samples"], r["run"]["length"]) == (len(windows), 12)
    assert r["loss"] == pytest.approx(whole_loss(model, torch.from_numpy(windows)), rel=1e-5)


def test_the_sequences_may_be_windows_of_a_text(cli, workplace, no_matplotlib):
    text = "The quick brown fox jumps over the lazy dog. " * 5
    (workplace / "fox.txt").write_text(text)
    assert cli("dense/ckpt.pt", "--only", "variance", "--length", 12, "--data", "fox.txt").status == 0
    ids = [*text.encode(), 256]
    windows = torch.tensor([ids[i:i + 12] for i in range(0, len(ids) - 12, 12)])
    r = strict_json(workplace / "dense/probe.json")
    assert (r["run"]["samples"], r["run"]["length"], r["run"]["tokens"]) == (len(windows), 12, "fox.txt")
    assert r["loss"] == pytest.approx(whole_loss(load_model("dense/ckpt.pt")[0].double(), windows), rel=1e-5)


def test_the_seed_chooses_the_sequences(cli, workplace, no_matplotlib):
    losses = []
    for seed in (0, 0, 1):
        cli("dense/ckpt.pt", "--only", "variance", "--samples", 5, "--seed", seed, "--out", f"seed{seed}")
        losses.append(strict_json(workplace / f"seed{seed}/probe.json")["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_tokens_from_a_file_are_probed_as_they_are(cli, workplace, no_matplotlib):
    tokens = make_tokens(5, 11, 250)
    np.save("mine.npy", tokens.numpy().astype(np.uint16))
    code, out, err = cli("dense/ckpt.pt", "--only", "causal,lens", "--tokens", "mine.npy", "--out", "elsewhere/deep")
    assert (code, err) == (0, NO_FIGURES) and not (workplace / "dense/probe.json").exists()
    got = strict_json(workplace / "elsewhere/deep/probe.json")
    assert set(got) == {"loss", "seconds", "run", "lens", "causal", "causal_mean"}
    assert got["run"]["tokens"] == "mine.npy" and got["run"]["experiments"] == ["causal", "lens"]
    model = load_model("dense/ckpt.pt")[0].double()
    with torch.no_grad():
        assert got["loss"] == pytest.approx(loss_by_hand(model, tokens, model.blocks), rel=1e-5)
        assert got["lens"]["loss"][0] == pytest.approx(loss_by_hand(model, tokens, []), rel=1e-5)


@pytest.mark.parametrize("flags, experiment, changed", [
    (["--pairs", 2], "permutation", lambda r: r["permutation_pairs"] == 2),
    (["--jacobian_samples", 1], "jacobian", lambda r: True),
    (["--below", 1e9], "sparsity", lambda r: r["sparsity"]["below"] == 1e9),
    (["--remove", "3"], "removal", lambda r: "3" in r["removal"]),
    (["--dtype", "float64"], "variance", lambda r: r["run"]["dtype"] == "float64"),
], ids=str)
def test_the_options_of_a_measurement_arrive_there(flags, experiment, changed, cli, workplace, no_matplotlib):
    results = []
    for more in ([], flags):
        assert cli("dense/ckpt.pt", "--only", experiment, "--samples", 6, "--out", f"x{len(more)}", *more).status == 0
        results.append(strict_json(workplace / f"x{len(more)}/probe.json"))
    assert results[0][experiment] != results[1][experiment] and changed(results[1])


def test_two_checkpoints_are_laid_side_by_side(cli, workplace):
    pytest.importorskip("matplotlib")
    code, out, err = cli("dense/ckpt.pt", "moe/ckpt.pt", "--samples", 5, "--only", "variance,causal,usefulness",
                         "--out", "both")
    assert (code, err) == (0, "")
    results = {kind: strict_json(workplace / "both" / kind / "probe.json") for kind in ("dense", "moe")}
    header = [line for line in out.splitlines() if "loss" in line.split()[:1]][-1].split()
    for kind, r in results.items():
        row = [line.split() for line in out.splitlines() if line.startswith(kind + " ")][-1]
        got = dict(zip(["loss", "last", "causal", "useful"], map(float, row[1:5])))
        want = {"loss": r["loss"], "last": r["variance"][-1], "causal": r["causal_mean"],
                "useful": r["usefulness"]["score"]}
        assert got == pytest.approx(want, abs=1e-4)
    assert header[0] == "loss" and probe.score_table(results) in out
    for name in ("variance", "causal", "usefulness"):
        assert all((workplace / "both" / sub / f"{name}.png").stat().st_size > 5000 for sub in ("", "dense", "moe"))
    assert not list(workplace.glob("dense/*.png"))


def test_sampled_pairs_are_null_in_probe_json(cli, workplace):
    pytest.importorskip("matplotlib")
    code, out, err = cli("dense/ckpt.pt", "--only", "permutation", "--pairs", 3, "--samples", 4)
    r = strict_json(workplace / "dense/probe.json")
    assert (code, err) == (0, "") and sum(x is None for row in r["permutation"] for x in row) == 6
    assert f"permutation score {r['permutation_mean']:.4f} +- {r['permutation_standard_error']:.4f}" in out


def test_a_missing_matplotlib_is_one_line_and_no_crash(cli, workplace, no_matplotlib):
    code, out, err = cli("dense/ckpt.pt", "--only", "variance", "--samples", 4)
    assert (code, err) == (0, NO_FIGURES) and "figures" not in out
    assert (workplace / "dense/probe.json").exists() and not list(workplace.glob("dense/*.png"))


def test_one_layer_can_be_probed_from_the_command_line(cli, workplace):
    save_checkpoint(workplace / "one.pt", checkpoint_of(make_model(torch.float32, **CLI | {"n_layer": 1})))
    np.save("mine.npy", make_tokens(4, 8).numpy())
    code, _, err = cli("one.pt", "--tokens", "mine.npy")
    assert (code, err) == (0, "")
    assert strict_json(workplace / "one/probe.json")["removal"].keys() == {"1", "attn", "ffn"}


def test_a_bfloat16_checkpoint_is_probed_in_float32(cli, workplace, no_matplotlib):
    _, saved = load_model("dense/ckpt.pt")
    saved = {**saved, "model": {k: w.bfloat16() for k, w in saved["model"].items()}}
    save_checkpoint(workplace / "half/ckpt.pt", saved)
    save_checkpoint(workplace / "upcast/ckpt.pt", {**saved, "model": {k: w.float() for k, w in saved["model"].items()}})
    results = {}
    for name, *dtype in (("half",), ("upcast",), ("half", "--dtype", "bfloat16")):
        place = name + "".join(dtype)
        assert cli(f"{name}/ckpt.pt", "--only", "variance,causal,usefulness", "--samples", 6, "--out", place,
                   *dtype)[::2] == (0, NO_FIGURES)
        results[place] = strict_json(workplace / place / "probe.json")
    got, want, rough = results.values()
    assert got["run"]["dtype"] == "float32" and rough["run"]["dtype"] == "bfloat16"
    for key in ("loss", "variance", "causal", "usefulness"):
        assert got[key] == want[key]
    assert rough["loss"] != got["loss"] and rough["loss"] == pytest.approx(got["loss"], rel=0.02)


def test_a_disk_too_full_for_the_result_is_one_line_and_leaves_the_old_one(cli, workplace, no_matplotlib):
    resource = pytest.importorskip("resource")
    assert cli("dense/ckpt.pt", "--only", "variance", "--samples", 4)[0] == 0
    before = (workplace / "dense/probe.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        status, out, err = cli("dense/ckpt.pt", "--only", "causal", "--samples", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_mistake((status, out, err.removeprefix(NO_FIGURES)), "cannot write dense/probe.json", "free some space")
    assert "causal" in out                                                   # the measured numbers are not lost
    assert (workplace / "dense/probe.json").read_bytes() == before
    assert not list(workplace.glob("dense/*.tmp"))


def test_a_disk_too_full_for_the_figures_is_one_line(cli, workplace):
    figure = pytest.importorskip("matplotlib.figure")

    def full(self, file, **_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(figure.Figure, "savefig", full):
        outcome = cli("dense/ckpt.pt", "--only", "variance", "--samples", 4)
    assert_mistake(outcome, "cannot write (No space left on device)", "free some space")
    assert (workplace / "dense/probe.json").exists()


def test_checkpoints_of_one_folder_do_not_overwrite_each_other_s_results(cli, workplace, no_matplotlib):
    """Neither one after the other nor at once, neither probe.json nor what --drop writes."""
    assert cli("dense/ckpt.pt", "--drop", "1", "--samples", 4)[::2] == (0, "")
    assert cli("dense/pruned.pt", "--drop", "0", "--samples", 4)[::2] == (0, "")
    layers = {"dense/ckpt.pt": 4, "dense/pruned.pt": 3, "dense/pruned_pruned.pt": 2}
    homes = ["dense", "dense/pruned", "dense/pruned_pruned"]
    assert {path: len(load_model(path)[0].blocks) for path in layers} == layers
    for calls in ([[path] for path in layers], [list(layers)]):
        for call in calls:
            assert cli(*call, "--only", "variance", "--samples", 4)[::2] == (0, NO_FIGURES)
        results = [strict_json(workplace / home / "probe.json") for home in homes]
        assert [len(r["variance"]) - 1 for r in results] == list(layers.values())
        assert [r["run"]["checkpoint"] for r in results] == list(layers)
        for home in homes:
            (workplace / home / "probe.json").unlink()
    assert cli(*layers, "--drop", "0", "--samples", 4)[::2] == (0, "")
    made = {"dense/pruned.pt": 3, "dense/pruned_pruned.pt": 2, "dense/pruned_pruned_pruned.pt": 1}
    assert {path: len(load_model(path)[0].blocks) for path in made} == made


def test_checkpoints_of_one_name_in_two_folders_are_told_apart(cli, workplace, no_matplotlib):
    save_checkpoint(workplace / "b/dense/ckpt.pt", load_model("moe/ckpt.pt")[1])
    code, out, err = cli("dense/ckpt.pt", "b/dense/ckpt.pt", "--only", "variance", "--samples", 4, "--out", "both")
    assert (code, err) == (0, NO_FIGURES)
    losses = {}
    for label, path in (("dense", "dense/ckpt.pt"), ("b_dense_ckpt.pt", "b/dense/ckpt.pt")):
        r = strict_json(workplace / "both" / label / "probe.json")
        assert r["run"]["checkpoint"] == path
        losses[label] = r["loss"]
    assert len(set(losses.values())) == 2
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [[k, f"{x:.4f}"] for k, x in losses.items()]


def test_progress_is_told_after_some_seconds_and_then_every_half_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    progress = probe.make_progress()
    for seconds in (1, 1.5, 2, 1, 10, 18, 3, 31):
        now[0] += seconds
        progress(f"stage {now[0]:.1f}")
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["stage 1004.5, 4 s", "stage 1036.5, 36 s", "stage 1067.5, 68 s"]


# ---------------------------------------------------------------------------------------------------------------------
# probe.json, measured bit by bit


def probed(workplace) -> dict[str, Any]:
    return strict_json(workplace / "dense/probe.json")


def without_run(r: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in r.items() if key not in ("run", "seconds")}


def test_what_is_measured_later_joins_what_probe_json_holds(cli, workplace, no_matplotlib):
    take = functools.partial(cli, "dense/ckpt.pt", "--samples", 6)
    assert take("--only", "variance,removal", "--out", "at_once").status == 0
    at_once = strict_json(workplace / "at_once/probe.json")
    for only in ("removal", "variance"):
        assert take("--only", only).status == 0
    r = probed(workplace)
    assert without_run(r) == without_run(at_once) and set(r["seconds"]) == set(at_once["seconds"])
    assert r["run"] == at_once["run"] | {"experiments": ["removal", "variance"]}
    removal = r["seconds"]["removal"]
    assert take("--only", "variance").status == 0                    # once more: nothing is lost, nothing there twice
    assert without_run(probed(workplace)) == without_run(r) and probed(workplace)["run"] == r["run"]
    assert probed(workplace)["seconds"]["removal"] == removal
    assert not list(workplace.glob("dense/*.old"))


OTHERWISE = {"--samples": (5, "samples 6, not 5"), "--length": (8, "length 16, not 8"), "--seed": (1, "seed 0, not 1"),
             "--data": ("fox.txt", "not fox.txt"), "--dtype": ("float64", "dtype float32, not float64"),
             "--remove": (1, "remove [1, 2], not [1]"), "--tokens": ("mine.npy", "not mine.npy")}


@pytest.mark.parametrize("flag", OTHERWISE)
def test_what_was_measured_otherwise_is_refused_before_the_work_and_stays(flag, cli, workplace, monkeypatch,
                                                                         no_matplotlib):
    (workplace / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    np.save("mine.npy", make_tokens(5, 11, 250).numpy())
    samples = [] if flag == "--tokens" else ["--samples", 6]
    assert cli("dense/ckpt.pt", "--only", "removal", "--samples", 6).status == 0
    before = (workplace / "dense/probe.json").read_bytes()
    value, said = OTHERWISE[flag]
    args = [*samples, "--only", "removal,lens" if flag == "--remove" else "lens", flag, value]
    with monkeypatch.context() as patch:
        patch.setattr(probe, "probe", lambda *args, **kwargs: pytest.fail("it was measured"))
        status, out, err = cli("dense/ckpt.pt", *args)
    assert_mistake((status, out, err.removeprefix(NO_FIGURES)), "dense/probe.json", said, "--out DIR")
    assert (workplace / "dense/probe.json").read_bytes() == before
    assert cli("dense/ckpt.pt", *args, "--out", "elsewhere").status == 0


def test_other_tokens_under_the_same_name_are_refused(cli, workplace, no_matplotlib):
    for seed in (0, 1):
        np.save("mine.npy", make_tokens(5, 11, 250, seed).numpy())
        status, out, err = cli("dense/ckpt.pt", "--only", "variance", "--tokens", "mine.npy")
    assert_mistake((status, out, err.removeprefix(NO_FIGURES)), "checksum", "--out DIR")


@pytest.mark.parametrize("stale", ["retrained", "cut", "a list", "of an earlier version", "another context"])
def test_a_stale_probe_json_is_replaced_and_put_aside(stale, cli, workplace, no_matplotlib):
    take = functools.partial(cli, "dense/ckpt.pt", "--only", "variance")
    assert take("--samples", 6).status == 0
    file, (_, saved) = workplace / "dense/probe.json", load_model("dense/ckpt.pt")
    if stale == "retrained":
        weights = {name: w.clone() for name, w in saved["model"].items()}
        weights["blocks.1.attn.proj.weight"][0, 0] += 1e-3
        save_checkpoint(workplace / "dense/ckpt.pt", saved | {"model": weights})
    elif stale == "another context":
        save_checkpoint(workplace / "dense/ckpt.pt", saved | {"settings": saved["settings"] | {"rope_theta": 500.0}})
    else:
        r = probed(workplace)
        del r["run"]["weights"]
        file.write_text({"cut": "{", "a list": "[1]"}.get(stale, json.dumps(r)))
    before = file.read_bytes()
    status, out, _ = take("--samples", 5)
    assert status == 0 and out.count("dense/probe.json is ") == 1 and "it becomes probe.json.old" in out
    assert (workplace / "dense/probe.json.old").read_bytes() == before and probed(workplace)["run"]["samples"] == 5


def test_a_checkpoint_that_was_only_saved_again_keeps_its_measurements(cli, workplace, no_matplotlib):
    assert cli("dense/ckpt.pt", "--only", "variance", "--samples", 6).status == 0
    save_checkpoint(workplace / "dense/ckpt.pt", load_model("dense/ckpt.pt")[1])
    assert cli("dense/ckpt.pt", "--only", "lens", "--samples", 6).status == 0
    assert probed(workplace)["run"]["experiments"] == ["variance", "lens"]


@pytest.mark.parametrize("names", [["dense"], ["dense", "moe"]], ids=["one", "two"])
def test_figures_are_drawn_again_without_the_model(names, cli, workplace, monkeypatch):
    pytest.importorskip("matplotlib")
    checkpoints = [f"{name}/ckpt.pt" for name in names]
    assert cli(*checkpoints, "--samples", 4, "--only", "permutation,usefulness,lens", "--pairs", 3).status == 0
    drawn = {path: path.read_bytes() for path in workplace.glob("**/*.png")}
    assert len(drawn) == 4 * (1 if len(names) == 1 else 3)           # the page with them, and the comparison's
    for path in (*drawn, *checkpoints):
        (workplace / path).unlink()
    for name in names:
        (workplace / name / "ckpt.pt").write_text("no model")
    monkeypatch.setattr(probe, "probe", lambda *args, **kwargs: pytest.fail("it was measured"))
    status, out, err = cli(*checkpoints, "--figures")
    assert (status, err) == (0, "") and f"figures in {names[0]}" in out
    assert {path: path.read_bytes() for path in workplace.glob("**/*.png")} == drawn


def test_figures_of_nothing_are_a_mistake_of_the_user(cli, workplace, no_matplotlib, monkeypatch):
    assert_mistake(cli("dense/ckpt.pt", "--figures"), "pip install matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", sys)              # anything
    assert_mistake(cli("dense/ckpt.pt", "--figures"), "dense/probe.json", "python probe.py dense/ckpt.pt")


def test_after_the_first_micro_batch_it_is_said_how_long_all_take(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    progress = probe.make_progress()
    for seconds, line in [(1, "affine maps, micro-batch 5/5"), (20, "streams, micro-batch 1/5"),
                          (1, "causal, micro-batch 1/5"), (19, "streams, micro-batch 2/5"),
                          (31, "streams, micro-batch 3/5")]:
        now[0] += seconds
        progress(line)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["streams, micro-batch 1/5, 21 s", "streams, micro-batch 2/5, 41 s, about 2.0 min in all",
                     "streams, micro-batch 3/5, 72 s, about 2.0 min in all"]      # 21 s and 5 times 20 s


@pytest.mark.parametrize("only, sequences", [("causal", [2, 2, 2, 1]), ("usefulness", [2, 1, 1, 2, 1]),
                                             ("causal", [7])])
def test_the_estimate_sees_the_lines_of_a_real_measurement(only, sequences, cli, workplace, monkeypatch, no_matplotlib):
    """A clock on which a micro-batch takes a minute for each of its sequences."""
    now = [0.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", (7 if len(sequences) == 1 else 2) * 16)
    honest = probe.Pass

    def slow(idx, *args):
        now[0] += 60.0 * len(idx)
        return honest(idx, *args)
    monkeypatch.setattr(probe, "Pass", slow)
    status, _, err = cli("dense/ckpt.pt", "--only", only, "--samples", 7)
    n, first = len(sequences), sequences[0]
    assert status == 0
    if n > 1:
        assert f"streams, micro-batch 2/{n}, {60 * first} s, about {first * n:.1f} min in all" in err
    else:
        assert "in all" not in err


def test_a_tilde_is_the_home_folder_in_every_path(run_main, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.setattr(sys, "argv", ["probe.py", "~/a.pt", "b.pt", "--data=~/d", "--out=~/o", "--tokenizer=~/t",
                                      "--tasks", "~/x", "y"])
    args, _ = probe.read_arguments()
    assert list(map(str, args.checkpoints)) == ["/home/me/a.pt", "b.pt"] and args.tasks == ["/home/me/x", "y"]
    assert (args.data, args.out, args.tokenizer) == ("/home/me/d", "/home/me/o", "/home/me/t")
    for name, more in (("tokens", []), ("save", ["--drop=1"]), ("export", [])):
        monkeypatch.setattr(sys, "argv", ["probe.py", "a.pt", f"--{name}=~/f", *more])
        assert getattr(probe.read_arguments()[0], name) == "/home/me/f"


LONG = "x" * 300     # more than a file's name can have


@pytest.mark.parametrize("args", [[f"{LONG}.pt"], ["dense/ckpt.pt", "--out", LONG], ["dense/ckpt.pt", "--data", LONG],
                                  ["dense/ckpt.pt", "--drop", "1", "--save", f"{LONG}/x.pt"],
                                  ["dense/ckpt.pt", "--drop", "1", "--save", f"{LONG}.pt"],
                                  ["dense/ckpt.pt", "--tokens", LONG], ["dense/ckpt.pt", "--tasks", LONG],
                                  ["dense/ckpt.pt", "--export", LONG], [LONG, "--figures"]],
                         ids=lambda args: " ".join(args).replace(LONG, "long"))
def test_a_name_that_is_too_long_is_one_line_before_the_work(args, cli, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(probe, "probe", lambda *args, **kwargs: pytest.fail("it was measured"))
    assert_mistake(cli(*args), LONG)


def test_a_folder_without_permission_is_one_line_before_the_work(cli, workplace, monkeypatch):
    (workplace / "a file").write_text("where a folder is wanted")
    monkeypatch.setattr(probe, "probe", lambda *args, **kwargs: pytest.fail("it was measured"))
    for flags in (["--out", "a file/x"], ["--drop", "1", "--save", "a file/x/y.pt"]):
        assert_mistake(cli("dense/ckpt.pt", *flags), "a file/x", flags[-2])

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(os, "stat", refuse)
    assert_mistake(cli("dense/ckpt.pt"), "dense/ckpt.pt", "Permission denied")


# ---------------------------------------------------------------------------------------------------------------------
# --drop


def test_drop_writes_a_checkpoint_that_probe_and_train_take(cli, workplace, corpus, no_matplotlib):
    code, out, err = cli("dense/ckpt.pt", "--drop", "1,2", "--save", "pruned.pt", "--samples", 10**6)
    assert (code, err) == (0, "")
    windows = torch.from_numpy(validation_windows(corpus, 16))
    model, pruned = load_model("dense/ckpt.pt")[0], load_model("pruned.pt")[0]
    whole, less = whole_loss(model, windows), whole_loss(pruned, windows)
    assert f"loss {whole:.4f} -> {less:.4f}" in out and f"x{math.exp(less - whole):.3f}" in out

    assert cli("pruned.pt", "--only", "variance", "--samples", 10**6)[::2] == (0, NO_FIGURES)
    assert strict_json(workplace / "pruned/probe.json")["loss"] == pytest.approx(less, rel=1e-5)

    command = out.split("train it on:  ")[1].split()
    c, _ = train.load_settings(command[2:])
    assert command[:2] == ["python", "train.py"] and (c.init_from, c.data) == ("pruned.pt", str(corpus))
    assert c.learning_rate < train.TrainConfig.learning_rate / 5 and c.warmup_steps < c.max_steps / 5

    done = run_script("train.py", "--init_from=pruned.pt", "--max_steps=2", "--out_dir=healed", f"--data={corpus}",
                      "--tokens_per_step=64", "--eval_tokens=320", "--device=cpu", "--compile=false")
    assert done.status == 0, done.err
    healed = load_model("healed/ckpt.pt")[1]
    first = json.loads((workplace / "healed/log.jsonl").read_text().splitlines()[0])
    assert healed["settings"]["n_layer"] == 2 and first["loss"] == pytest.approx(less, rel=0.3)


def test_blocks_are_dropped_from_a_checkpoint_whose_settings_lack_the_norm(cli, workplace):
    _, saved = load_model("dense/ckpt.pt")
    settings = {key: value for key, value in saved["settings"].items() if key != "norm"}
    save_checkpoint(workplace / "old.pt", {**saved, "settings": settings})
    assert cli("old.pt", "--drop", "2", "--samples", 4)[::2] == (0, "")
    assert len(load_model("old_pruned.pt")[0].blocks) == 3


def test_drop_auto_takes_the_cheapest(cli, workplace, corpus):
    model = load_model("moe/ckpt.pt")[0].double()
    windows = torch.from_numpy(validation_windows(corpus, 16))[:30]
    np.save("mine.npy", windows.numpy())
    kept = list(range(4))
    with torch.no_grad():
        for _ in range(2):
            losses = {l: loss_by_hand(model, windows, [model.blocks[k] for k in kept if k != l]) for l in kept}
            kept.remove(min(losses, key=losses.get))
    code, out, err = cli("moe/ckpt.pt", "--drop", "auto:2", "--tokens", "mine.npy")
    pruned, saved = load_model("moe/pruned.pt")
    assert (code, err) == (0, "") and saved["kept"] == kept and len(pruned.blocks) == 2
    gone = out.split("without blocks ")[1].split(";")[0]
    assert {int(l) for l in gone.split(",")} == set(range(4)) - set(kept)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


BAD_TOKENS = {"float": np.ones((4, 8)), "flat": np.arange(8), "cube": np.zeros((2, 2, 4), int),
              "beyond": np.full((4, 8), 264), "negative": np.full((4, 8), -1), "single": np.zeros((1, 8), int),
              "long": np.zeros((4, 17), int), "short": np.zeros((4, 1), int), "empty": np.zeros((0, 8), int),
              "without columns": np.zeros((4, 0), int),
              "strings": np.full((4, 8), "a"), "pickled": np.full((4, 8), None)}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_wrong_tokens_are_one_line_on_stderr(name, cli):
    np.save("mine.npy", BAD_TOKENS[name])
    assert_mistake(cli("dense/ckpt.pt", "--tokens", "mine.npy"))


MISTAKES = [
    (["nowhere/ckpt.pt"], "nowhere/ckpt.pt"),
    (["truncated.pt"], "truncated.pt"),
    (["text.pt"], "text.pt"),
    (["foreign.pt"], "foreign.pt"),
    (["dense/ckpt.pt", "--only", "causal,magic"], "magic"),
    (["dense/ckpt.pt", "--only", ""], "--only"),
    (["dense/ckpt.pt", "--only", "causal,"], "--only"),
    (["dense/ckpt.pt", "--length", "17"], "block_size=16"),
    (["dense/ckpt.pt", "--length", "1"], "--length 1"),
    (["dense/ckpt.pt", "--length", "-3"], "--length -3"),
    (["dense/ckpt.pt", "--samples", "1"], "1 sequence"),
    (["dense/ckpt.pt", "--samples", "0"], "0 sequences"),
    (["dense/ckpt.pt", "--samples", "-2"], "0 sequences"),
    (["dense/ckpt.pt", "--samples", "many"], "--samples"),
    (["dense/ckpt.pt", "--tokens", "nowhere.npy"], "nowhere.npy"),
    (["dense/ckpt.pt", "--tokens", "text.pt"], "text.pt"),
    (["dense/ckpt.pt", "--data", "nowhere"], "nowhere"),
    (["dense/ckpt.pt", "--data", "other"], "gpt2"),
    (["dense/ckpt.pt", "--data", "short.txt"], "sequences"),
    (["dense/ckpt.pt", "--data", "empty.txt"], "0 sequences"),
    (["dense/ckpt.pt", "--frobnicate"], "--frobnicate"),
    (["dense/ckpt.pt", "--samp", "4"], "--samp"),
    (["dense/ckpt.pt", "--drop", "99"], "0 to 3"),
    (["dense/ckpt.pt", "--drop", "x"], "--drop x"),
    (["dense/ckpt.pt", "--drop", ""], "--drop"),
    (["dense/ckpt.pt", "--drop", "auto:"], "--drop"),
    (["dense/ckpt.pt", "--drop=-1"], "0 to 3"),
    (["dense/ckpt.pt", "--drop", "0,1,2,3"], "one must stay"),
    (["dense/ckpt.pt", "--drop", "auto:4"], "auto:4"),
    (["dense/ckpt.pt", "--drop", "auto:0"], "auto:0"),
    (["dense/ckpt.pt", "--drop", "auto:1,2"], "auto:1,2"),
    (["dense/ckpt.pt", "--drop", "1", "--save", "dense/ckpt.pt"], "is the checkpoint itself"),
    (["dense/ckpt.pt", "--drop", "1", "--save", "dense/../dense/ckpt.pt"], "is the checkpoint itself"),
    (["dense/ckpt.pt", "moe/ckpt.pt", "--drop", "1", "--save", "x.pt"], "--save"),
    (["dense/ckpt.pt", "moe/ckpt.pt", "--export", "x"], "--export"),
    (["dense/ckpt.pt", "--remove", "0"], "--remove 0"),
    (["dense/ckpt.pt", "--remove", "1,5"], "--remove 1,5"),
    (["dense/ckpt.pt", "--remove", "one"], "--remove one"),
    (["dense/ckpt.pt", "--pairs", "-1"], "--pairs"),
    (["dense/ckpt.pt", "--seed", "-1"], "seed"),
    (["dense/ckpt.pt", "--below", "-1"], "--below"),
    (["dense/ckpt.pt", "--jacobian_samples", "0"], "--jacobian_samples"),
    (["dense/ckpt.pt", "--jacobian_samples", "-1"], "--jacobian_samples"),
    (["dense/ckpt.pt", "--dtype", "float16"], "--dtype"),
    (["dense/ckpt.pt", "--out", "text.pt"], "text.pt"),
    ([], "ckpt.pt"),
]


@pytest.mark.parametrize("args, word", MISTAKES, ids=[" ".join(args) or "nothing" for args, _ in MISTAKES])
def test_a_mistake_of_the_user_is_one_line_on_stderr(args, word, cli, workplace, corpus):
    whole = (workplace / "dense/ckpt.pt").read_bytes()
    (workplace / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (workplace / "text.pt").write_text("not a checkpoint\n")
    (workplace / "short.txt").write_text("a short one")
    (workplace / "empty.txt").write_text("")
    torch.save({"weights": torch.zeros(3)}, workplace / "foreign.pt")
    (workplace / "other").mkdir()
    for path in corpus.iterdir():
        (workplace / "other" / path.name).write_bytes(path.read_bytes())
    meta = json.loads((corpus / "meta.json").read_text())
    (workplace / "other/meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    assert_mistake(cli(*args), word)
    assert (workplace / "dense/ckpt.pt").read_bytes() == whole and not list(workplace.glob("**/probe.json"))
    assert not list(workplace.glob("**/*pruned.pt"))


# an option that the command makes no use of

COMMANDS = {"measure": [], "drop": ["--drop", "1"], "sample": ["--sample", "def "], "export": ["--export", "hf"],
            "figures": ["--figures"]}
VALUES = {"only": "variance", "data": "fox.txt", "samples": "5", "length": "8", "tokens": "mine.npy", "seed": "3",
          "pairs": "2", "remove": "2", "jacobian_samples": "1", "below": "0.2", "tasks": "copa", "out": "here",
          "save": "smaller.pt", "new_tokens": "3", "temperature": "0.5", "top_k": "3", "device": "cpu",
          "dtype": "float64", "tokenizer": "bytes", "spread": "True"}
SWITCHES = {"spread"}               # they are given without a value
OF_A_SAMPLE_OF_TEXT = {"data", "samples", "length", "tokens", "seed"}
TAKES = {"measure": OF_A_SAMPLE_OF_TEXT | {"only", "pairs", "remove", "jacobian_samples", "below", "tasks", "out",
                                           "device", "dtype", "tokenizer", "spread"},
         "drop": OF_A_SAMPLE_OF_TEXT | {"save", "device", "dtype", "tokenizer"},
         "sample": {"new_tokens", "temperature", "top_k", "seed", "device", "dtype", "tokenizer", "spread"},
         "export": {"tokenizer"}, "figures": {"out"}}


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_the_command_makes_no_use_of_is_refused(command, option, run_main, monkeypatch):
    args = ["ckpt.pt", *COMMANDS[command], f"--{option}", *([] if option in SWITCHES else [VALUES[option]])]
    if option in TAKES[command]:
        monkeypatch.setattr(sys, "argv", ["probe.py", *args])
        read, does = probe.read_arguments()
        assert does == command and str(getattr(read, option)).strip("[]'") == VALUES[option]
        return
    outcome = run_main(probe, *args)
    takers = [other for other, taken in TAKES.items() if option in taken]
    assert_mistake(outcome, f"--{option} goes with ", *(f"--{other}" for other in takers if other != "measure"))
    assert ("measuring" in outcome.err) == ("measure" in takers)


DEFAULTS = {"samples": "100", "seed": "0", "pairs": "0", "below": "0.1", "new_tokens": "200", "temperature": "0.8",
            "top_k": "50", "device": "auto", "dtype": "float32", "only": ",".join(EXPERIMENTS)}


@pytest.mark.parametrize("command, option", [(c, o) for c in COMMANDS for o in DEFAULTS if o not in TAKES[c]])
def test_such_an_option_is_refused_at_its_default_value_too(command, option, run_main):
    assert_mistake(run_main(probe, "ckpt.pt", *COMMANDS[command], f"--{option}", DEFAULTS[option]), f"--{option}")


IDLE = {"--tokens mine.npy --data other": "--data", "--tokens mine.npy --samples 100": "--samples",
        "--tokens mine.npy --length 8": "--length", "--only variance --pairs 5": "--pairs",
        "--only variance,causal --remove 1": "--remove", "--only jacobian --below 0.1": "--below",
        "--only causal --jacobian_samples 2": "--jacobian_samples", "--only tasks --tasks t --samples 9": "--samples",
        "--only tasks --tasks t --seed 0": "--seed", "--only tasks --tasks t --data other": "--data"}


@pytest.mark.parametrize("args", IDLE)
def test_an_option_without_effect_beside_the_others_is_refused(args, run_main):
    assert_mistake(run_main(probe, "ckpt.pt", *args.split()), IDLE[args])


@pytest.mark.parametrize("args", ["--only permutation --pairs 5", "--only released --jacobian_samples 2",
                                  "--only tasks,lens --tasks t --samples 9", "--tokens mine.npy --seed 3"])
def test_an_option_that_has_an_effect_is_taken(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["probe.py", "ckpt.pt", *args.split()])
    assert probe.read_arguments()[1] == "measure"


@pytest.mark.parametrize("commands", [("drop", "sample"), ("drop", "export"), ("sample", "export"),
                                      ("drop", "sample", "export")], ids="+".join)
def test_one_command_at_a_time(commands, run_main):
    args = [arg for command in commands for arg in COMMANDS[command]]
    assert_mistake(run_main(probe, "ckpt.pt", *args), *(f"--{command}" for command in commands))


def test_every_option_is_in_these_tables(run_main):
    lines = run_main(probe, "--help").out.split("options:")[1].splitlines()
    options = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert options == {*VALUES, *COMMANDS} - {"measure"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [[], ["--only", "usefulness"], ["--drop", "1"], ["--sample", "def "]], ids=str)
def test_weights_that_are_not_finite_are_one_line_on_stderr(value, flags, cli, workplace):
    _, saved = load_model("dense/ckpt.pt")
    weights = {name: w.clone() for name, w in saved["model"].items()}
    weights["blocks.1.attn.proj.weight"][0, 0] = value
    save_checkpoint(workplace / "damaged.pt", {**saved, "model": weights})
    outcome = cli("damaged.pt", *flags)
    assert_mistake(outcome, "damaged.pt")
    assert "Traceback" not in outcome.err
    assert not list(workplace.glob("**/probe.json")) + list(workplace.glob("**/*pruned.pt"))


def test_a_model_that_is_smaller_than_the_corpus_vocabulary_is_a_mistake_of_the_user(cli, workplace, corpus):
    model = make_model(torch.float32, **CLI | {"vocab_size": 90})
    save_checkpoint(workplace / "small.pt", trained(model, corpus))
    assert_mistake(cli("small.pt"), "90")


def test_the_script_itself_ends_with_status_2_and_one_line(workplace):
    done = run_script("probe.py", "nowhere.pt")
    assert_mistake(done, "nowhere.pt")
    assert done.out == ""


def test_the_script_itself_runs_from_another_folder(workplace):
    np.save("mine.npy", make_tokens(4, 8).numpy())
    done = run_script("probe.py", "dense/ckpt.pt", "--only=causal", "--tokens=mine.npy", "--device=cpu", "--out=here")
    assert (done.status, done.err) == (0, "") and "causal" in strict_json(workplace / "here/probe.json")


# ---------------------------------------------------------------------------------------------------------------------
# the bench of the probes, tests/bench/probes.py


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import probes
    return probes


NAMES = ["causal,removal", "permutation", "usefulness", "jacobian"]


def test_the_bench_prints_four_ratios(workplace):
    done = run_python(ROOT / "tests/bench/probes.py", "dense/ckpt.pt", "--samples", 4, "--length", 8, "--rounds", 1)
    lines = {line.split()[0]: line.split()[-1] for line in done.out.splitlines()[1:]}
    assert (done.status, done.err) == (0, "") and list(lines) == NAMES
    assert all(ratio.endswith("x") and float(ratio[:-1]) > 0 for ratio in lines.values())
    assert not (workplace / "dense/probe.json").exists()


def test_the_naive_routes_of_the_bench_judge_the_losses_that_the_probes_judge(probes, monkeypatch):
    """A route that left something out would be worth nothing to compare with."""
    t, want = truth("dense"), measured("dense")
    model, tokens, half = t.model, t.tokens, t.half
    found, judged = {}, []
    nll = probes.nll
    monkeypatch.setattr(probes, "nll", lambda *args: judged.append(nll(*args)) or judged[-1])

    def run_both(name, here, naive, rounds):
        here()                                            # nothing to compare here: it is `probe.probe`
        judged.clear()
        found[name] = naive(), np.array(judged)
    monkeypatch.setattr(probes, "side_by_side", run_both)
    probes.bench(model, tokens, rounds=1)
    assert list(found) == NAMES
    (said, causal), (_, permutation), (_, usefulness), (Js, of_jacobian) = found.values()
    whole = want["loss"] * tokens[:, 1:].numel()
    with torch.no_grad():
        heldout = loss_by_hand(model, tokens[half:], model.blocks) * tokens[half:, 1:].numel()
    assert causal / whole * want["loss"] == pytest.approx(want["removal"]["1"]) and said == causal.tolist()
    assert abs(permutation / whole - 1) == pytest.approx(np.array(want["permutation"])[np.triu_indices(5, 1)])
    assert usefulness[0::2] / whole == pytest.approx(want["usefulness"]["ratio"])
    assert usefulness[1::2] / heldout == pytest.approx(want["usefulness_heldout"]["ratio"])
    assert len(of_jacobian) == 0
    full = statistics([mean_jacobian(layer, t.stream(l)) for l, layer in enumerate(model.blocks)])
    assert statistics([J.numpy() / tokens.numel() for J in Js])["spectral"] == pytest.approx(full["spectral"])
    assert own_tokens("dense") is tokens
