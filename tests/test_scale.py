"""train.py on several ranks, killed, stopped, out of space: real processes that really die, on the CPU.

    python -m pytest -q tests/test_scale.py                     # about three minutes on two cores, no download
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import Corpus
from model import UserError, load_checkpoint
from test_train import MOE, TINY, read_log, without_rates
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
RUN = TINY | dict(max_steps=40, learning_rate=1e-2, save_interval=5, eval_interval=10, stats_interval=10, **MOE)
# train.py, spared the second that measuring the peak FLOP/s takes, after whatever a test wants changed
SCRIPT = f"""
import io, json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train
train.gemm_rate = lambda *_: 1e11
"""
SLOW = """
honest = train.gradients
train.gradients = lambda *args, **kwargs: (time.sleep(0.02), honest(*args, **kwargs))[1]
"""
HALF = """
save = torch.save
def slowly(saved, f):
    whole = io.BytesIO()
    save(saved, whole)
    half = len(whole.getvalue()) // 2
    f.write(whole.getvalue()[:half])
    f.flush()
    time.sleep(0.2)
    f.write(whole.getvalue()[half:])
torch.save = slowly
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(train, "gemm_rate", lambda *_: 1e11)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, corpus):
    """launch(out, *arguments, ranks=, change=, torchrun=, **settings) starts train.py; what still runs is ended."""
    started, folder = [], tmp_path_factory.mktemp("scripts")

    def start(out, *args, ranks=1, change="", torchrun=(), script="train.run(train.main)", preexec_fn=None, **kwargs):
        path = folder / f"train{len(started)}.py"
        path.write_text(SCRIPT + change + script)
        settings = RUN | {"data": str(corpus), "out_dir": str(out)} | kwargs
        command = [sys.executable, *(("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                                      *torchrun) if ranks > 1 else ())]
        command += [str(path), *args] + [f"--{k}={v}" for k, v in settings.items()] * ("train.main" in script)
        started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=preexec_fn))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()          # torchrun ends its workers, then itself
            process.communicate()


def end(process, status=0):
    """Wait for a process and check its exit status; returns what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def until(happened, process):
    """Wait for something that a process does."""
    while not happened():
        assert process.poll() is None, "it ended first: " + "\n".join(process.communicate())
        time.sleep(0.002)


def logged(out, n):
    """A function: has the run logged n steps?"""
    path = Path(out) / "log.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= n


def workers(process):
    """The process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, children):
        told = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        ranks[int(told["RANK"])] = pid
    return ranks


def flat(saved):
    """Weights and moments of a checkpoint by one name each."""
    moments = {f"{name} {k}": v for name, state in saved["optimizer"].items() for k, v in state.items()}
    return saved["model"] | moments


def assert_same_end(out, want, exact=True):
    """The same log, weights and moments, bit for bit or to float tolerance."""
    a, b = without_rates(read_log(out)), without_rates(read_log(want))
    assert [r["step"] for r in a] == [r["step"] for r in b]
    one, two = load_checkpoint(out / "ckpt.pt"), load_checkpoint(want / "ckpt.pt")
    assert one["step"] == two["step"] and one.keys() == two.keys()
    one, two = flat(one), flat(two)
    assert [(k, v.shape, v.dtype) for k, v in one.items()] == [(k, v.shape, v.dtype) for k, v in two.items()]
    if exact:
        assert a == b
        assert all(torch.equal(one[name], two[name]) for name in one)
        return
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=2e-5, atol=1e-7, err_msg=f"step {x['step']}: {name}")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# one run, several engines


# 8 windows a step in micro-batches of 2; 5 validation batches, which do not divide among 2 ranks; clipping is active.
KINDS = {
    "dense": dict(n_kv_head=1, norm="lns"),
    "moe": MOE | dict(shared_hidden=8, lb_loss_weight=0.1),
    "tied": dict(tie_embeddings=True, norm="peri", recompute=True),
}
SHORT = TINY | dict(max_steps=6, init_std=0.1, grad_clip=0.5, learning_rate=1e-3, eval_interval=2, stats_interval=3,
                    save_interval=3)
ENGINES = ("ddp", "fsdp")


def cut(out, to):
    """What a run that died between its last two checkpoints leaves behind."""
    to.mkdir()
    shutil.copy(out / "ckpt.1.pt", to / "ckpt.1.pt")
    shutil.copy(out / "log.jsonl", to / "log.jsonl")


@pytest.fixture(scope="module")
def engines(launch, corpus, tmp_path_factory):
    """The folder with a run of every kind in 1 process and under each engine, and with runs resumed under another."""
    folder = tmp_path_factory.mktemp("engines")
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "gemm_rate", lambda *_: 1e11)
    todo = {kind: SHORT | settings | {"data": str(corpus)} for kind, settings in KINDS.items()}
    for kind, settings in todo.items():
        train.train(TrainConfig(**settings | {"out_dir": str(folder / f"{kind}-alone"), "recompute": False}))
    cut(folder / "moe-alone", folder / "alone-then-fsdp")
    runs = [(settings | {"out_dir": str(folder / f"{kind}-{engine}"), "parallel": engine}, False)
            for engine in ENGINES for kind, settings in todo.items()]
    runs.append((todo["moe"] | {"out_dir": str(folder / "alone-then-fsdp"), "parallel": "fsdp"}, True))
    script = """
train.dist.init_process_group("gloo")               # once for all of them: torchrun's store serves one group
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_: None
for settings, resume in json.loads(sys.argv[1]):
    train.train(train.TrainConfig(**settings), resume)
"""
    said = end(launch(folder, json.dumps(runs), ranks=2, script=script))[0]
    assert said.count("2 x cpu") == said.count("trained in") == len(runs)        # two ranks, one of them talks
    cut(folder / "moe-fsdp", folder / "fsdp-then-alone")
    cut(folder / "moe-fsdp", folder / "fsdp-then-ddp")
    train.train(TrainConfig(**todo["moe"] | {"out_dir": str(folder / "fsdp-then-alone")}), resume=True)
    end(launch(folder, json.dumps([(todo["moe"] | {"out_dir": str(folder / "fsdp-then-ddp")}, True)]), ranks=2,
               script=script))
    patch.undo()
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_statistics_weights_and_moments_of_one(engines, kind, engine):
    one = read_log(engines / f"{kind}-alone")
    assert all(r["grad_norm"] > 0.5 for r in one[1:]) and "val_loss" in one[1] and "variance" in one[2]
    assert_same_end(engines / f"{kind}-{engine}", engines / f"{kind}-alone", exact=False)


@pytest.mark.parametrize("resumed", ["alone-then-fsdp", "fsdp-then-alone", "fsdp-then-ddp"])
def test_a_checkpoint_of_one_engine_resumes_under_another(engines, resumed):
    assert_same_end(engines / resumed, engines / "moe-alone", exact=False)
