"""The lesson's commands and code, as they stand in assets/lesson.md. What it trains is trained for two steps."""
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from helpers import ROOT, run_python, without

import probe
import train
from data import load_model
from model import GPT

LESSON = (ROOT / "assets/lesson.md").read_text("utf-8")
STREAM, CHECK, *SOLUTIONS = re.findall(r"```python\n(.*?)```", LESSON, re.DOTALL)
TINY = ["--n_layer=3", "--n_embd=16", "--n_head=2", "--block_size=16", "--tokens_per_step=64", "--max_steps=2",
        "--eval_tokens=160", "--device=cpu", "--compile=false"]


def commands(script):
    """The arguments of every command of the page that starts this script."""
    lines = re.findall(rf"^    python {script} (.*)$", LESSON, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_stream_by_hand_has_the_variances_of_the_experiment(capsys):
    assert len([line for line in STREAM.splitlines() if line]) == 10
    names = {}
    exec(STREAM, names)
    printed = capsys.readouterr().out.splitlines()
    torch.manual_seed(0)
    model = GPT(names["model"].config)                       # the same weights and tokens again
    p = probe.forward(model, torch.randint(256, names["x"].shape[:2]))
    streams = probe.probe(model, p.idx, ["variance"])["variance"][1:]
    added = [(y - x).double().var(-1).mean().item() for x, y in zip(p.h, p.h[1:])]
    for l, line in enumerate(printed):
        number, stream, _, more = line.split()
        assert int(number) == l
        assert (float(stream), float(more)) == pytest.approx((streams[l], added[l]), rel=0.005)
    assert len(printed) == 16 and {line for line in printed if f"    {line}\n" in LESSON} >= {printed[0], printed[15]}


def test_every_command_of_the_lesson_runs(tmp_path, corpus, run_main, monkeypatch):
    """In a folder of their own: what a command needs was made by one before it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)     # no figures
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    trained = commands("train.py")
    assert len(trained) == 7
    for args in trained:
        assert train.load_settings(args)[0].max_steps == 300
        done = run_main(train, *args, *TINY, f"--data={corpus}")
        assert done.status == 0, (args, done.err)
    measured = commands("probe.py")
    assert len(measured) >= 5
    for args in measured:
        monkeypatch.setattr(sys, "argv", ["probe.py", *args])
        asked = probe.read_arguments()
        assert set(asked.only.split(",")) <= {*probe.EXPERIMENTS, "first_token"}
        if all(path.exists() for path in asked.checkpoints) and "first_token" not in asked.only:
            done = run_main(probe, *args)
            assert done.status == 0, (args, done.err)
    assert probe.score_names()          # TODO columns
