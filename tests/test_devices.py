"""The scripts on the stand-in for a GPU in tests/stand_in.py.

    python -m pytest -q tests/test_devices.py
"""
from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import ROOT, checkpoint_of, make_model, run_python, run_script, without
from test_train import MOE, TINY, read_log, without_rates

import probe
import train
from data import Corpus
from train import TrainConfig

KIND = MOE | dict(n_kv_head=1, recompute=True, norm="peri", shared_hidden=8)


def on_device(cwd, script, *args, env=None):
    """Run a script on the stand-in. Returns its output and how often it waited."""
    status, out, err = run_script("tests/stand_in.py", script, *args, cwd=cwd, env=env)
    assert status == 0, err
    *printed, last = out.splitlines(keepends=True)
    return "".join(printed), int(re.fullmatch(r"waited (\d+) times: .*\n", last)[1])


def told(corpus, **given):
    return TINY | KIND | {"data": str(corpus), "stats_interval": 1, "eval_interval": 100} | given


# ---- the stand-in ------------------------------------------------------------------------------------------------
SEEN = {                                             # expression of x: error, or number of waits
    "x + torch.ones(3)": "aten::add mixes the device with the CPU",
    "x.double()": "float64 on a device that has none",
    "torch.zeros(3, dtype=torch.float64, device=x.device)": "float64 on a device that has none",
    "x[1].item()": 1, "float(x.sum())": 1, "x.cpu()": 1, "x.tolist()": 1, "torch.zeros(3).copy_(x)": 1, "x[x > 0]": 1,
    "x.nonzero()": 1, "bool((x > 0).all())": 1, "x.add_(1).mul(2).view(3, 1).sum()": 0, "x + torch.tensor(1.0)": 0,
    "x.copy_(torch.ones(3))": 0, "torch.ones(3).to(x.device)": 0}
TRY = """
import json, sys, torch, stand_in
seen = {}
for line in json.loads(sys.argv[1]):
    x = torch.ones(3, device="stand_in")
    stand_in.waits.clear()
    try:
        eval(line)
        seen[line] = stand_in.waits.total()
    except (RuntimeError, TypeError) as e:
        seen[line] = str(e)
print(json.dumps(seen))
"""


def test_the_stand_in_fails_and_waits_where_a_gpu_would():
    done = run_python("-c", TRY, json.dumps([*SEEN]), env={"PYTHONPATH": str(ROOT / "tests")})
    assert json.loads(done.out) == SEEN


# ---- train.py ----------------------------------------------------------------------------------------------------
def test_training_on_a_device_waits_once_per_step_and_equals_training_on_the_cpu(corpus, tmp_path):
    def waits(name, steps, *more):
        given = told(corpus, device="auto", compile="auto", out_dir=name, max_steps=steps)
        return on_device(tmp_path, "train.py", *(f"--{name}={value}" for name, value in given.items()), *more)[1]

    whole, first = waits("whole", 5), waits("parts", 2)
    assert whole - first == 5 - 2
    assert waits("parts", 5, "--resume") - first == 3 - 2             # 3 steps; loading the weights does not wait
    train.train(TrainConfig(**told(corpus, out_dir=str(tmp_path / "cpu"), max_steps=5)))
    log, parts, cpu = (without_rates(read_log(tmp_path / name)) for name in ("whole", "parts", "cpu"))
    del parts[1]["val_loss"]                              # every run ends with a validation
    assert parts == log
    for ours, theirs in zip(log, cpu, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.allclose(torch.tensor(ours[name]), torch.tensor(value), rtol=1e-4, atol=1e-6), name
    assert json.loads((tmp_path / "whole" / "config.json").read_text("utf-8"))["device"] == "stand_in:0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu(corpus):
    c = TrainConfig(**TINY | {"data": str(corpus)})
    cpu = train.Process(0, 1, torch.device("cpu"), torch.float32)
    gpu = cpu._replace(device=torch.device("cuda", 0))
    ours, theirs = (train.read_batches(Corpus(corpus), c, here, 0) for here in (gpu, cpu))
    for a, b in zip(ours, theirs, strict=True):
        assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(a, b))


# ---- probe.py ----------------------------------------------------------------------------------------------------
def assert_alike(ours, theirs, name=""):
    """Both have the same structure and, up to the precision of float32, the same numbers."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs.keys() - {"seconds", "device"}:
            assert_alike(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for i, (a, b) in enumerate(zip(ours, theirs)):
            assert_alike(a, b, f"{name}[{i}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5, nan_ok=True), name
    else:
        assert ours == theirs, name


def test_scores_and_samples_on_a_device_equal_those_on_the_cpu(
        corpus, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(TrainConfig(**told(corpus, out_dir="run", max_steps=20, learning_rate=1e-2)))
    measure = "run/ckpt.pt", "--samples=4", "--jacobian_samples=1"
    on_device(tmp_path, "probe.py", *measure, "--out=ours")
    assert run_main(probe, *measure, "--out=theirs", "--device=cpu").status == 0
    ours, theirs = (json.loads((tmp_path / name / "probe.json").read_text("utf-8")) for name in ("ours", "theirs"))
    assert ours["run"]["device"] == "stand_in" and "jacobian" in ours
    assert_alike(ours, theirs)

    write = "run/ckpt.pt", "--sample=abc de", "--new_tokens=9"
    assert on_device(tmp_path, "probe.py", *write)[0] == run_main(probe, *write, "--device=cpu").out


def test_measuring_waits_a_few_times_per_micro_batch_and_not_for_every_intervention(corpus, tmp_path):
    """Up to two waits per block are allowed: fits need float64, which the device lacks."""
    waits = {}
    no_figures = without("matplotlib", tmp_path)
    for n_layer in (2, 6):
        model = make_model(torch.float32, vocab_size=320, n_layer=n_layer)
        torch.save(checkpoint_of(model), tmp_path / "ckpt.pt")
        few, many = (on_device(tmp_path, "probe.py", "ckpt.pt", f"--data={corpus}", f"--samples={n}",
                               "--jacobian_samples=1", f"--out={n_layer}_{n}", env=no_figures)[1] for n in (10, 20))
        waits[n_layer] = (many - few) / 2                             # micro-batches, of 5 sequences of 12 tokens
    assert 0 < waits[2] < 30 and waits[6] - waits[2] <= 2 * 4    # 4 blocks more
