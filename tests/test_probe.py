"""The command line of probe.py: what it reads, prints and writes, and the dropping of blocks.

Other files test the numbers (test_experiments.py), how they are measured (test_measurement.py), tables, summary and
figures (test_shown.py), tasks (test_tasks.py), --sample (test_sample.py) and models of transformers
(test_transformers.py).
"""
from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probe
import train
from data import load_model, save_checkpoint
from helpers import ROOT, assert_mistake, checkpoint_of, make_model, make_tokens, run_script
from probe import EXPERIMENTS, without_blocks
from test_experiments import EXPERTS, T

CLI = dict(vocab_size=264, block_size=16, n_layer=4, n_head=2, n_kv_head=1)

# ---- dropping blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, norm, drop", [
    ("dense", "pre", [0]), ("dense", "lns", [1, 3]), ("dense", "peri", [0, 1, 2, 4]), ("moe", "lns", [0, 2])], ids=str)
def test_a_checkpoint_without_blocks_computes_what_the_model_without_them_does(kind, norm, drop, tmp_path):
    model = make_model(torch.float32, n_layer=5, norm=norm, **(EXPERTS if kind == "moe" else {}))
    save_checkpoint(tmp_path / "pruned.pt", without_blocks(checkpoint_of(model), drop))
    pruned, again = load_model(tmp_path / "pruned.pt")
    with torch.no_grad():
        x = model.embed(make_tokens(7, T))
        for l, block in enumerate(model.blocks):
            x = x if l in drop else block(x)
        want, got = model.logits(x), pruned(make_tokens(7, T))[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert pruned.config.n_layer == 5 - len(drop) and again["kept"] == [l for l in range(5) if l not in drop]


@pytest.mark.parametrize("norm", ["pre", "lns"])
def test_dropping_twice_is_dropping_both(norm):
    saved = checkpoint_of(make_model(torch.float32, n_layer=6, norm=norm))
    twice, once = without_blocks(without_blocks(saved, [1, 4]), [0, 2]), without_blocks(saved, [0, 1, 3, 4])
    assert twice["kept"] == once["kept"] == [2, 5] and twice["settings"] == once["settings"]
    assert all(torch.allclose(w, once["model"][name], rtol=1e-6) for name, w in twice["model"].items())


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(corpus, tmp_path, monkeypatch):
    """A folder with two checkpoints: dense/ckpt.pt and moe/ckpt.pt."""
    for name, settings in (("dense", {}), ("moe", EXPERTS)):
        saved = checkpoint_of(make_model(torch.float32, **CLI | settings))
        saved["settings"]["data"] = str(corpus)
        save_checkpoint(tmp_path / name / "ckpt.pt", saved)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace, run_main, monkeypatch):
    """cli(*args): run probe.py in the workplace, without figures, which would take most of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return functools.partial(run_main, probe)


def result(path: str | Path) -> Any:
    """The contents of probe.json in a folder. NaN in it is an error, since it is not JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(Path(path, "probe.json").read_text("utf-8"), parse_constant=refuse)


def validation_windows(corpus: Path, length: int) -> torch.Tensor:
    """All validation windows, read from the shards without data.py."""
    meta = json.loads((corpus / "meta.json").read_text("utf-8"))
    flat = np.concatenate([np.fromfile(corpus / s["file"], dtype=meta["dtype"]) for s in meta["val"]["shards"]])
    windows = (len(flat) - 1) // length
    return torch.from_numpy(flat[:windows * length].reshape(windows, length).astype(np.int64))


@torch.no_grad()
def whole_loss(path: str, tokens: torch.Tensor) -> float:
    logits = load_model(path)[0].double()(tokens)[0]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def measured_in(r: Any) -> list[str]:
    return [name for name in EXPERIMENTS if name in r]


def test_all_experiments_are_measured_by_default(cli, corpus):
    status, out, err = cli("moe/ckpt.pt", "--samples", 9)
    assert status == 0 and all(", about " in line for line in err.splitlines())    # progress, if it takes long
    r = result("moe")
    ran = r["run"]
    assert measured_in(r) == list(EXPERIMENTS) and (ran["samples"], ran["length"]) == (9, 16)
    assert ran["remove"] == [1] and ran["sublayers"] is False and set(r["removal"]) == {"1"}
    assert ran["settings"]["n_layer"] == 4 and ran["tokens"] == f"{corpus} (validation)"
    assert len(r["causal"]) == len(r["permutation"]) == 4                          # the matrices are there
    assert probe.block_table(r) in out and probe.score_table({"moe": r}) in out
    for line in probe.summary(r, "moe/ckpt.pt"):
        assert " ".join(line.split()) in " ".join(out.split())


def test_the_sequences_are_windows_of_the_validation_split(cli, corpus):
    windows = validation_windows(corpus, 12)
    assert cli("dense/ckpt.pt", "--only", "variance", "--length", 12, "--samples", 10**6).status == 0
    r = result("dense")
    assert (r["run"]["samples"], r["run"]["length"]) == (len(windows), 12)
    assert r["loss"] == pytest.approx(whole_loss("dense/ckpt.pt", windows), rel=1e-5)


def test_the_sequences_can_be_windows_of_a_text_or_tokens_from_a_file(cli, workplace):
    text = "The quick brown fox jumps over the lazy dog. é " * 5
    (workplace / "fox.txt").write_text(text, encoding="utf-8")
    ids = [*text.encode(), 256]
    windows = torch.tensor([ids[i:i + 12] for i in range(0, len(ids) - 12, 12)])
    np.save("mine.npy", make_tokens(5, 11, 250).numpy().astype(np.uint16))
    for flags, tokens in (["--data", "fox.txt", "--length", 12], windows), (["--tokens", "mine.npy"],
                                                                            make_tokens(5, 11, 250)):
        assert cli("dense/ckpt.pt", "--only", "variance", "--out", flags[0][2:], *flags).status == 0
        r = result(flags[0][2:])
        assert r["run"]["tokens"] == flags[1] and r["run"]["samples"] == len(tokens)
        assert r["loss"] == pytest.approx(whole_loss("dense/ckpt.pt", tokens), rel=1e-5)


@pytest.mark.parametrize("flags, only, changed", [
    (["--pairs", 2], "permutation", lambda r: r["permutation_pairs"] == 2 and r["permutation"][0].count(None) > 0),
    (["--jacobian_samples", 1], "jacobian", lambda r: True),
    (["--remove", "1,3", "--sublayers"], "removal", lambda r: set(r["removal"]) == {"1", "3", "attn", "ffn"}),
    (["--dtype", "float64"], "variance", lambda r: r["run"]["dtype"] == "float64"),
    (["--seed", 1], "variance", lambda r: True)], ids=str)
def test_each_option_changes_the_measurement(flags, only, changed, cli):
    for more in ([], flags):
        assert cli("dense/ckpt.pt", "--only", only, "--samples", 6, "--out", f"x{len(more)}", *more).status == 0
    before, after = result("x0"), result(f"x{len(flags)}")
    assert before[only] != after[only] and changed(after)


def test_two_checkpoints_are_compared(workplace, run_main):
    pytest.importorskip("matplotlib")
    status, out, err = run_main(probe, "dense/ckpt.pt", "moe/ckpt.pt", "--samples", 5, "--only", "variance,causal",
                                "--out", "both")
    assert (status, err) == (0, "")
    results = {kind: result(f"both/{kind}") for kind in ("dense", "moe")}
    assert probe.score_table(results) in out
    for name in ("variance", "causal", "probe"):
        for folder in ("both", "both/dense", "both/moe"):
            assert Path(folder, f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workplace.glob("dense/*.png"))
    again = run_main(probe, "dense/ckpt.pt", "moe/ckpt.pt", "--samples", 4, "--only", "variance", "--out", "both")
    assert again.status == 0
    assert {path.stem for path in workplace.glob("both/*.png")} == {"variance", "probe"}


def test_checkpoints_in_one_folder_have_separate_results(cli):
    assert cli("dense/ckpt.pt", "--drop", "1", "--samples", 4)[::2] == (0, "")
    assert cli("dense/pruned.pt", "--drop", "0", "--samples", 4)[::2] == (0, "")
    for path, home, n in (("ckpt.pt", "dense", 4), ("pruned.pt", "dense/pruned", 3),
                          ("pruned/pruned.pt", "dense/pruned/pruned", 2)):
        assert cli(f"dense/{path}", "--only", "variance", "--samples", 4).status == 0
        assert len(result(home)["variance"]) == n + 1


@pytest.mark.parametrize("drop, priced_on", [("1,2", slice(None)), ("auto:2", slice(1, None, 2))])
def test_drop_writes_a_checkpoint_that_train_takes(cli, corpus, drop, priced_on):
    """auto chooses blocks on every other sequence. Their price is then measured on the rest."""
    status, out, err = cli("dense/ckpt.pt", "--drop", drop, "--save", "pruned.pt", "--samples", 10**6)
    assert (status, err) == (0, "")
    windows = validation_windows(corpus, 16)[priced_on]
    whole, less = whole_loss("dense/ckpt.pt", windows), whole_loss("pruned.pt", windows)
    assert f"loss {whole:.4f} -> {less:.4f}" in out and f"x{math.exp(less - whole):.3f}" in out
    command = out.split("train it further:  ")[1].split()
    c, _ = train.load_settings(command[2:])
    assert command[:2] == ["python", "train.py"] and (c.init_from, c.data) == ("pruned.pt", str(corpus))


def test_results_are_never_written_into_the_folder_of_a_hugging_face_model(workplace, monkeypatch):
    for name in ("out/pruned", "elsewhere"):
        model = workplace / name
        model.mkdir(parents=True)
        monkeypatch.chdir(workplace)
        homes = [probe.home_of(Path(name)), probe.home_of(model)]
        assert all(model.resolve() not in (home.resolve(), *home.resolve().parents) for home in homes)
        monkeypatch.chdir(model)
        assert probe.home_of(Path(".")).resolve().name == model.name


# ---- probe.json ------------------------------------------------------------------------------------------------------


def test_later_measurements_of_the_same_weights_and_tokens_are_added_to_probe_json(cli, workplace):
    def numbers(r):
        return {key: x for key, x in r.items() if key not in ("run", "seconds")}
    take = functools.partial(cli, "dense/ckpt.pt", "--samples", 6)
    assert take("--only", "variance,removal", "--out", "at_once").status == 0
    for only in ("removal", "variance", "variance"):
        assert take("--only", only).status == 0
    assert numbers(result("dense")) == numbers(result("at_once"))
    assert measured_in(result("dense")) == ["variance", "removal"]
    assert not list(workplace.glob("dense/*.old"))
    assert take("--only", "permutation", "--pairs", 2).status == take("--only", "variance").status == 0
    assert result("dense")["run"]["pairs"] == result("dense")["permutation_pairs"] == 2
    assert take("--only", "removal", "--remove", "2,3").status == take("--only", "removal").status == 0
    assert list(result("dense")["removal"]) == list(result("dense")["removal_stderr"]) == ["1", "2", "3"]


@pytest.mark.parametrize("flags", [["--seed", 1], ["--length", 8], ["--dtype", "float64"], []], ids=str)
def test_other_weights_or_tokens_replace_probe_json_and_the_old_file_is_kept(flags, cli, workplace):
    assert cli("dense/ckpt.pt", "--only", "removal", "--samples", 6).status == 0
    before = result("dense")
    if not flags:                                                            # trained again
        save_checkpoint(workplace / "dense/ckpt.pt", checkpoint_of(make_model(torch.float32, seed=1, **CLI)))
    assert cli("dense/ckpt.pt", "--only", "variance", "--samples", 6, *flags).status == 0
    assert measured_in(result("dense")) == ["variance"]
    assert json.loads((workplace / "dense/probe.json.old").read_text("utf-8")) == before


def test_the_same_tokens_in_sequences_of_another_length_are_other_sequences(cli):
    for shape, only in ((4, 12), "removal"), ((8, 6), "variance"):
        np.save("mine.npy", make_tokens(4, 12, 250).numpy().reshape(shape))
        assert cli("dense/ckpt.pt", "--tokens", "mine.npy", "--only", only).status == 0
    assert measured_in(result("dense")) == ["variance"]


def test_the_figures_of_other_weights_are_deleted_with_their_probe_json(workplace, run_main):
    pytest.importorskip("matplotlib")

    def panels():
        return {path.stem for path in workplace.glob("dense/*.png")}
    assert run_main(probe, "dense/ckpt.pt", "--samples", 4, "--only", "lens").status == 0
    assert run_main(probe, "dense/ckpt.pt", "--samples", 4, "--only", "variance").status == 0
    assert panels() == {"lens", "variance", "probe"}
    save_checkpoint(workplace / "dense/ckpt.pt", checkpoint_of(make_model(torch.float32, seed=1, **CLI)))
    assert run_main(probe, "dense/ckpt.pt", "--samples", 4, "--only", "variance").status == 0
    assert panels() == {"variance", "probe"}


@pytest.mark.parametrize("kept_in_memory, complete, slow", [
    (2**30, "variance,usefulness", "permutation"), (0, "variance,usefulness", "permutation"),
    (2**30, "causal", "removal")])
def test_ctrl_c_keeps_what_is_complete(kept_in_memory, complete, slow, workplace):
    """Permutation has the last stage, whatever the size of the sample. In a small one, each experiment is a stage."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.modules["matplotlib"] = None
import data, probe
def waits(model, p):
    print("here", flush=True)
    time.sleep(60)
probe.KEPT_IN_MEMORY, probe.TOKENS_AT_ONCE = {kept_in_memory}, 1
probe.EXPERIMENTS["{slow}"] = probe.EXPERIMENTS["{slow}"]._replace(sums=waits)
sys.argv = ["probe.py", "dense/ckpt.pt", "--samples", "4", "--only", "{complete},{slow}", "--device=cpu"]
data.run(probe.main)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "here\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert measured_in(result("dense")) == complete.split(",") and "loss" in out
    assert out.endswith(f"Not measured: {slow}\n")


def test_figures_are_drawn_again_without_the_model_or_the_users_backend(workplace, run_main):
    pytest.importorskip("matplotlib")
    assert run_main(probe, "dense/ckpt.pt", "--samples", 4, "--only", "permutation,lens", "--pairs", 3).status == 0
    drawn = {path: path.read_bytes() for path in workplace.glob("dense/*.png")}
    assert {path.stem for path in drawn} == {"permutation", "lens", "probe"}
    for path in drawn:
        path.unlink()
    (workplace / "dense/ckpt.pt").write_text("no model")
    status, _, err = run_script("probe.py", "dense/ckpt.pt", "--figures", cwd=workplace, env={"MPLBACKEND": "unknown"})
    assert (status, err) == (0, "")
    assert {path: path.read_bytes() for path in workplace.glob("dense/*.png")} == drawn


def test_progress_names_experiment_block_and_time_left(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    progress = probe.Progress(shown=True, experiment="removal", work=100.0, begun=1000.0)
    for seconds, done, k in ((2, 10, 1), (118, 25, 12), (5, 26, 13), (300, 85, 30)):
        now[0] += seconds
        progress.done = done
        progress.say(f"block {k} of 30, micro-batch 1 of 1")
    assert [line.rstrip() for line in capsys.readouterr().err.splitlines()] == [
        "removal, block 12 of 30, micro-batch 1 of 1, 2 min, about 6 min left",
        "removal, block 30 of 30, micro-batch 1 of 1, 7 min, about 75 s left"]


def test_progress_is_never_wider_than_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(probe.sys.stderr, "isatty", lambda: True, raising=False)
    progress = probe.Progress(shown=True, experiment="permutation", work=100.0, done=1.0, begun=-1000.0)
    progress.say("pair 12 of 435, micro-batch 1 of 4")
    shown = capsys.readouterr().err
    assert shown.startswith("permutation, pair 12 of 435") and len(shown.rstrip("\r")) == 39


@pytest.mark.parametrize("args, word", [
    (["nowhere.pt"], "nowhere.pt"), (["dense/ckpt.pt", "--only", "magic"], "--only magic"),
    (["dense/ckpt.pt", "--length", 99], "--length 99"), (["dense/ckpt.pt", "--samples", 1], "--samples"),
    (["dense/ckpt.pt", "--remove", "x"], "--remove x"), (["dense/ckpt.pt", "--drop", "4"], "--drop 4"),
    (["dense/ckpt.pt", "--drop", "auto:4"], "--drop auto:4"), (["dense/ckpt.pt", "--figures"], "matplotlib"),
    (["dense/ckpt.pt", "--drop", "1", "--save", "dense/ckpt.pt"], "--save"),
    (["dense/ckpt.pt", "moe/ckpt.pt", "--drop", "1", "--save", "p.pt"], "--save"),
    (["dense/ckpt.pt", "--drop", ""], "--drop"), (["dense/ckpt.pt", "--tokens", "no.npy"], "no.npy"),
    (["dense/ckpt.pt", "--only", "tasks"], "--tasks"), (["dense/ckpt.pt", "--magic"], "--magic")], ids=str)
def test_a_mistake_is_one_line_and_status_2(args, word, cli):
    assert_mistake(cli(*args), word)
