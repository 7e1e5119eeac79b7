"""--wandb=PROJECT: what is sent to Weights & Biases is what log.jsonl holds.

    python -m pytest -q tests/test_wandb.py
"""
from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_mistake, run_python

import train
from train import Process, TrainConfig

TINY = dict(block_size=32, n_layer=2, n_head=2, n_embd=16, ffn_hidden=40, tokens_per_step=256, batch_size=2,
            max_steps=4, warmup_steps=2, eval_interval=2, eval_tokens=320, stats_interval=2, save_interval=2,
            device="cpu", compile=False, wandb="depth")


class FakeRun:
    """Keeps what it is told; a context, as the real one is."""
    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.sent, self.ended = told, [], False
        self.id = told["id"] or "made_up"

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended = True

    def log(self, numbers: dict[str, float], step: int) -> None:
        assert not self.ended
        self.sent.append((step, numbers))


@pytest.fixture
def runs(monkeypatch):
    """The runs that are begun, with a module of our own in the place of wandb."""
    begun, fake = [], ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})

    def init(**told):
        begun.append(FakeRun(told))
        return begun[-1]
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


@pytest.fixture
def settings(corpus, tmp_path):
    return TINY | {"data": str(corpus), "out_dir": str(tmp_path / "out")}


def log_of(settings):
    with open(f"{settings['out_dir']}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def test_the_records_of_the_log_are_sent_number_by_number_with_all_settings(runs, settings):
    train.train(TrainConfig(**settings))
    run, = runs
    assert run.told["project"] == "depth" and run.told["name"] == run.told["dir"] == settings["out_dir"]
    assert run.told["config"] == asdict(TrainConfig(**settings)) | {"vocab_size": 320} and run.ended
    log = log_of(settings)
    assert [step for step, _ in run.sent] == [record["step"] for record in log] == [1, 2, 3, 4]
    for (_, sent), record in zip(run.sent, log):
        alone = {name: x for name, x in record.items() if isinstance(x, (int, float))}
        assert alone.items() <= sent.items() and all(isinstance(x, (int, float)) for x in sent.values())
        if "variance" in record:
            assert [sent[f"variance/{l}"] for l in range(3)] == record["variance"]
    assert "val_loss" in run.sent[1][1] and "variance/0" in run.sent[1][1]


def test_a_resumed_run_goes_on_where_it_was_and_a_fresh_one_does_not(runs, settings):
    train.train(TrainConfig(**settings | {"max_steps": 2}))
    train.train(TrainConfig(**settings), resume=True)
    train.train(TrainConfig(**settings), overwrite=True)
    assert [(run.told["id"], run.told["resume"]) for run in runs] == [
        (None, "allow"), ("made_up", "allow"), (None, "allow")]
    assert [[step for step, _ in run.sent] for run in runs] == [[1, 2], [3, 4], [1, 2, 3, 4]]


def test_it_is_no_setting_that_changes_a_run(runs, settings):
    """One goes on with another project, or without."""
    train.train(TrainConfig(**settings | {"max_steps": 2}))
    train.train(TrainConfig(**settings | {"wandb": ""}), resume=True)
    assert len(runs) == 1 and len(log_of(settings)) == 4
    import recipe
    assert recipe.differing(TrainConfig(**settings), asdict(TrainConfig(**settings | {"wandb": "other"}))) == []


def test_one_rank_sends(runs, settings):
    here = Process(1, 2, torch.device("cpu"), torch.float32)
    with train.wandb_run(TrainConfig(**settings), 0, here) as sent:
        assert sent is None and not runs


def test_without_the_package_it_is_one_line_before_the_work(monkeypatch, settings, run_main, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = run_main(train, *(f"--{name}={value}" for name, value in settings.items()))
    assert_mistake(done, "pip install wandb")
    assert not (tmp_path / "out").exists()


def test_what_it_refuses_is_one_line(runs, monkeypatch, settings, run_main):
    wandb = sys.modules["wandb"]

    def init(**_):
        raise wandb.Error("api_key not configured")
    monkeypatch.setattr(wandb, "init", init)
    done = run_main(train, *(f"--{name}={value}" for name, value in settings.items()))
    assert_mistake(done, "--wandb=depth", "api_key not configured", "wandb login", "WANDB_MODE=offline")


def test_the_real_package_keeps_the_records_offline(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_py = [train.__file__, *(f"--{name}={value}" for name, value in settings.items())]
    for more in (["--max_steps=2"], ["--resume"]):
        assert run_python(*train_py, *more).status == 0
    files = sorted((tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"))
    assert [path.stem for path in files] == [f"run-{(tmp_path / 'out/wandb_id').read_text()}"] * 2    # it went on
    kept = [path.read_bytes() for path in files]                     # binary, but for the values, which are JSON
    log = log_of(settings)
    for k, record in enumerate(log):
        there = [json.dumps(record["loss"]).encode() in content for content in kept]
        assert there == [k < 2, k >= 2]
    assert len(log) == 4 and b"variance/2" in kept[1]
