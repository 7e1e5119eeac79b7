"""train.py in real processes on the CPU: several ranks, kills, signals, full disks, and out_dir.

    python -m pytest -q tests/test_scale.py                     # no download
"""
import json
import os
import platform
import random
import re
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
from helpers import ROOT, assert_mistake
from test_train import MOE, TINY, read_log, without_rates

import train
from data import load_checkpoint
from model import UserError
from train import TrainConfig

RUN = TINY | dict(max_steps=40, learning_rate=1e-2, save_interval=5, eval_interval=10, stats_interval=10, **MOE)
# For long runs that round differently: if a token uses all experts, rounding changes no choice.
ALL_EXPERTS = {"top_k": RUN["n_experts"]}
# A started script consists of these lines, a test's changes to train.py, and a call of main.
SCRIPT = f"""
import io, json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train
"""
SLOW = """
original = train.gradients
train.gradients = lambda *args, **kwargs: (time.sleep(0.02), original(*args, **kwargs))[1]
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


@pytest.fixture(scope="module")
def launch(tmp_path_factory, corpus):
    """launch(out, *arguments, ranks=, change=, torchrun=, **settings) starts a new process."""
    started, folder = [], tmp_path_factory.mktemp("scripts")

    def start(out, *args, ranks=1, change="", torchrun=(), script="train.run(train.main)", preexec_fn=None, env={},
              **kwargs):
        path = folder / f"train{len(started)}.py"
        path.write_text(SCRIPT + change + script)
        settings = RUN | {"data": str(corpus), "out_dir": str(out)} | kwargs
        command = [sys.executable, *(("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                                      *torchrun) if ranks > 1 else ())]
        command += [str(path), *args] + [f"--{k}={v}" for k, v in settings.items()] * ("train.main" in script)
        started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, cwd=folder,
                                        text=True, preexec_fn=preexec_fn,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()          # torchrun ends its workers, too
            process.communicate()


@pytest.fixture
def here(corpus, run_main):
    """here(out, *arguments, status=, **settings) runs train.py. Returns stdout and stderr."""
    def run(out, *args, status=0, **settings):
        told = RUN | {"data": corpus, "out_dir": out} | settings
        done = run_main(train, *args, *(f"--{name}={value}" for name, value in told.items()))
        assert done.status == status, done
        return done.out, done.err
    return run


def end(process, status=0):
    """Wait for a process and check its exit status. Returns its stdout and stderr."""
    out, err = process.communicate(timeout=300)      # two ranks on a busy core are slow
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def until(happened, process):
    """Wait until happened() is true. Fail if the process ends first."""
    while not happened():
        assert process.poll() is None, "it ended first: " + "\n".join(process.communicate())
        time.sleep(0.002)


def logged(out, n):
    """A function that says whether the run has logged n steps."""
    path = Path(out) / "log.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= n


def workers(process):
    """The process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    ranks = {}
    for pid in map(int, children):
        told = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text("utf-8").split("\0") if "=" in v)
        ranks[int(told["RANK"])] = pid
    return ranks


def flat(saved):
    """The weights and moments of a checkpoint in one dict."""
    moments = {f"{name} {k}": v for name, state in saved["optimizer"].items() for k, v in state.items()}
    return saved["model"] | moments


def assert_same_end(out, want, exact=True):
    """Two runs have the same log, weights and moments, bit for bit or up to rounding."""
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


KINDS = {
    "dense": dict(n_kv_head=1, norm="lns"),
    "moe": MOE | dict(shared_hidden=8, lb_loss_weight=0.1),
    "tied": dict(tie_embeddings=True, norm="peri", recompute=True),
}
SHORT = TINY | dict(max_steps=6, init_std=0.1, grad_clip=0.5, learning_rate=1e-3, eval_interval=2, stats_interval=3,
                    save_interval=3)
ENGINES = ("ddp", "fsdp")


def cut(out, to):
    """Copy the run `out` as if it had died before its last checkpoint."""
    to.mkdir()
    shutil.copy(out / "ckpt.1.pt", to / "ckpt.1.pt")
    shutil.copy(out / "log.jsonl", to / "log.jsonl")


@pytest.fixture(scope="module")
def engines(launch, corpus, tmp_path_factory):
    """A folder of runs: each kind alone and under each engine, and runs resumed under another."""
    folder = tmp_path_factory.mktemp("engines")
    todo = {kind: SHORT | settings | {"data": str(corpus)} for kind, settings in KINDS.items()}
    for kind, settings in todo.items():
        train.train(TrainConfig(**settings | {"out_dir": str(folder / f"{kind}-alone"), "recompute": False}))
    cut(folder / "moe-alone", folder / "alone-then-fsdp")
    runs = [(settings | {"out_dir": str(folder / f"{kind}-{engine}"), "parallel": engine}, False)
            for engine in ENGINES for kind, settings in todo.items()]
    runs.append((todo["moe"] | {"out_dir": str(folder / "alone-then-fsdp"), "parallel": "fsdp"}, True))
    script = """
train.dist.init_process_group("gloo")               # once: torchrun's store serves only one group
leave = train.dist.destroy_process_group    # call it, else gloo's threads abort the exit
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_, **__: None
for settings, resume in json.loads(sys.argv[1]):
    train.train(train.TrainConfig(**settings), resume)
leave()
"""
    said = end(launch(folder, json.dumps(runs), ranks=2, script=script))[0]
    assert said.count("2 x cpu") == said.count("trained to step") == len(runs)        # only one of two ranks prints
    cut(folder / "moe-fsdp", folder / "fsdp-then-alone")
    cut(folder / "moe-fsdp", folder / "fsdp-then-ddp")
    train.train(TrainConfig(**todo["moe"] | {"out_dir": str(folder / "fsdp-then-alone")}), resume=True)
    end(launch(folder, json.dumps([(todo["moe"] | {"out_dir": str(folder / "fsdp-then-ddp")}, True)]), ranks=2,
               script=script))
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


COMPILED = {         # settings, backend, and the number of graphs at each of 5 steps and at the end
    "ddp": (MOE | {"parallel": "ddp"}, "aot_eager", [1, 1, 2, 2, 2, 2]),
    "fsdp": (MOE | {"parallel": "fsdp"}, "aot_eager", [1, 1, 2, 2, 2, 2]),    # shared by all blocks
    "fsdp-lns": ({"parallel": "fsdp", "norm": "lns", "n_layer": 9}, "eager", [9, 9, 18, 18, 18, 18]),    # one per block
}


@pytest.fixture(scope="module")
def compiled(launch, corpus, tmp_path_factory):
    """Run COMPILED on two ranks, eager and compiled. Returns the folder and the numbers of graphs."""
    folder = tmp_path_factory.mktemp("compiled")
    told = {name: SHORT | settings | {"data": str(corpus), "max_steps": 5, "stats_interval": 2}
            for name, (settings, *_) in COMPILED.items()}
    runs = [[name, COMPILED[name][1], settings | {"compile": compile, "out_dir": str(folder / f"{name}-{compile}")}]
            for name, settings in told.items() for compile in (False, True)]
    script = f"""
from torch._dynamo.utils import counters
compile, make = torch.compile, train.make_optimizer
torch.compile = lambda *args, **kwargs: compile(*args, **kwargs, backend=backend)
def make_and_watch(*args):
    optimizer = make(*args)
    optimizer.register_step_pre_hook(lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
    return optimizer
train.make_optimizer = make_and_watch
train.dist.init_process_group("gloo")
leave = train.dist.destroy_process_group
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_, **__: None
counted = {{}}
for name, backend, settings in json.loads(sys.argv[1]):
    graphs = []
    torch._dynamo.reset()
    counters.clear()
    train.train(train.TrainConfig(**settings))
    counted[name] = graphs + [counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())]
if os.environ["RANK"] == "1":
    open({str(folder / "counted.json")!r}, "w").write(json.dumps(counted))
leave()
"""
    end(launch(folder, json.dumps(runs), ranks=2, script=script))
    return folder, json.loads((folder / "counted.json").read_text("utf-8"))


@pytest.mark.parametrize("name", COMPILED)
def test_two_ranks_compile_once_without_graph_breaks_and_compute_the_same(compiled, name):
    folder, counted = compiled
    assert counted[name] == [*COMPILED[name][2], 0]
    assert_same_end(folder / f"{name}-True", folder / f"{name}-False", exact=False)


# ---------------------------------------------------------------------------------------------------------------------
# killed, stopped, resumed


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The out_dir of RUN without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_here(out, corpus)
    return out


def run_here(out, corpus, resume=False, **settings):
    """Train with the settings RUN in this process."""
    train.train(TrainConfig(**RUN | {"data": str(corpus), "out_dir": str(out)} | settings), resume)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_that_is_killed_and_resumed_twice_is_bit_identical_to_an_uninterrupted_run(
        launch, here, whole, tmp_path):
    out = tmp_path / "out"
    for step in sorted(random.Random(1).sample(range(1, 39), 2)):
        process = launch(out, "--resume", change=SLOW)
        until(logged(out, step), process)
        kill(process)
        assert len(read_log(out)) < 40
        with open(out / "log.jsonl", "a") as f:
            f.write('{"step": 39, "tok')                        # as if killed while it wrote a line
    assert ", from step " in here(out, "--resume")[0]
    assert_same_end(out, whole)


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_keeps_the_earlier_ones(launch, here, whole, tmp_path):
    out = tmp_path / "out"
    for n in (1, 2):
        process = launch(out, "--resume", change=SLOW + HALF)
        for _ in range(n):                                           # wait for the nth checkpoint
            until((out / "ckpt.pt.tmp").exists, process)
            if _ < n - 1:
                until(lambda: not (out / "ckpt.pt.tmp").exists(), process)
        kill(process)
        assert (out / "ckpt.pt.tmp").exists()
    assert load_checkpoint(out / "ckpt.pt")["step"] < 40
    here(out, "--resume")
    assert_same_end(out, whole)
    assert {path.name for path in out.iterdir()} == {"log.jsonl", "log.jsonl.old", "ckpt.pt", "ckpt.1.pt", "lock",
                                                     "config.json", "config.json.old"}


def test_resume_starts_afresh_without_a_checkpoint_and_leaves_a_finished_run_unchanged(
        here, whole, tmp_path):
    out = tmp_path / "out"
    said, _ = here(out, "--resume")
    assert said.splitlines()[0] == f"nothing to resume in {out}: starting afresh"
    assert_same_end(out, whole)
    before = {path: path.read_bytes() for path in out.iterdir()}
    said, _ = here(out, "--resume")
    assert "trained to step 40" in said
    after = {path: path.read_bytes() for path in out.iterdir()}
    assert before.pop(out / "config.json") and after.pop(out / "config.json")    # has the command
    assert after == before


def test_a_run_stopped_by_a_signal_exits_with_status_0_and_continues_bit_for_bit(
        launch, here, whole, tmp_path):
    out = tmp_path / "out"
    process = launch(out, change=SLOW, save_interval=0)
    until(logged(out, 3), process)
    process.send_signal(signal.SIGINT)
    said, err = end(process)
    step = read_log(out)[-1]["step"]
    assert said.splitlines()[-1] == (f"stopped by SIGINT after step {step}; {out / 'ckpt.pt'} is saved: "
                                     "--resume continues from there")
    assert err == "" and step < 40 and load_checkpoint(out / "ckpt.pt")["step"] == step
    here(out, "--resume")
    assert_same_end(out, whole)


def test_sigterm_to_one_rank_stops_all_ranks_after_a_checkpoint(launch, here, corpus, tmp_path):
    out, want = tmp_path / "out", tmp_path / "want"
    process = launch(out, ranks=2, change=SLOW, save_interval=0, parallel="fsdp", **ALL_EXPERTS)
    until(logged(out, 3), process)
    os.kill(workers(process)[1], signal.SIGTERM)
    said, _ = end(process)
    step = read_log(out)[-1]["step"]
    assert step < 40 and load_checkpoint(out / "ckpt.pt")["step"] == step
    assert re.match(f"stopped by .* after step {step}; ", said.splitlines()[-1])
    here(out, "--resume", **ALL_EXPERTS)
    run_here(want, corpus, **ALL_EXPERTS)
    assert_same_end(out, want, exact=False)


def test_a_run_resumes_when_torchrun_restarts_a_killed_rank(launch, corpus, tmp_path):
    out, want = tmp_path / "out", tmp_path / "want"
    process = launch(out, "--resume", ranks=2, change=SLOW, torchrun=["--max-restarts=1"], **ALL_EXPERTS)
    until(logged(out, 12), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    said, _ = end(process)
    assert ", from step 10" in said
    run_here(want, corpus, **ALL_EXPERTS)
    assert_same_end(out, want, exact=False)


# ---------------------------------------------------------------------------------------------------------------------
# an out_dir belongs to one run, and no file in it is lost silently


def files(out):
    """The files in out_dir, except the lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}


@pytest.fixture(scope="module")
def six_steps(corpus, tmp_path_factory):
    """A run of 6 steps that keeps the checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("six_steps") / "out"
    run_here(out, corpus, max_steps=6, save_interval=2)
    return out


@pytest.fixture
def short(six_steps, tmp_path):
    """A copy of six_steps that a test may change."""
    shutil.copytree(six_steps, tmp_path / "short")
    return tmp_path / "short"


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.1.pt"])
def test_a_fresh_start_beside_a_checkpoint_is_refused_and_changes_no_file(here, short, name):
    os.replace(short / "ckpt.pt", short / name)
    before = files(short)
    said, err = here(short, status=2)
    assert_mistake((2, said, err), str(short), "--resume", "another --out_dir", "--overwrite")
    assert files(short) == before


def test_overwrite_renames_an_earlier_run(here, short):
    before = files(short)
    here(short, "--overwrite", seed=1, max_steps=1)
    kept = files(short)
    assert {name: kept[f"{name}.old"] for name in before} == before
    assert load_checkpoint(short / "ckpt.pt")["settings"]["seed"] == 1


def test_a_second_run_in_an_out_dir_is_refused_until_the_first_has_died(launch, here, tmp_path):
    out = tmp_path / "out"
    first = launch(out, change=SLOW, max_steps=10_000)
    until(logged(out, 6), first)
    for switch in ("--resume", "--overwrite"):
        said, err = here(out, switch, status=2)
        assert_mistake((2, said, err), "another run writes to", str(out), "--out_dir")
    assert first.poll() is None and not list(out.glob("*.old"))
    kill(first)
    here(out, "--resume")


def test_signal_handlers_are_restored_after_a_run_even_if_it_failed(short, corpus):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(UserError, match="seed=1"):
        run_here(short, corpus, resume=True, seed=1)
    run_here(short, corpus, resume=True, max_steps=7)                # the failed run has released its lock
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_without_ckpt_pt_a_run_resumes_from_the_earlier_checkpoint(short, six_steps, corpus):
    (short / "ckpt.pt").unlink()                                     # the machine stopped between two renames
    run_here(short, corpus, resume=True, max_steps=6, save_interval=2)
    assert_same_end(short, six_steps)


def test_a_damaged_checkpoint_gives_one_line_that_names_the_earlier_checkpoint(short, here):
    (short / "ckpt.pt").write_bytes((short / "ckpt.pt").read_bytes()[:-1000])
    before = files(short)
    said, err = here(short, "--resume", status=2)
    assert_mistake((2, said, err), f"{short / 'ckpt.pt'} is damaged", str(short / "ckpt.1.pt"))
    assert files(short) == before
    (short / "ckpt.1.pt").unlink()
    assert "ckpt.1.pt" not in here(short, "--resume", status=2)[1]


def test_a_run_beyond_max_steps_is_refused_and_changes_no_file(short, here):
    before = files(short)
    said, err = here(short, "--resume", max_steps=4, status=2)
    assert_mistake((2, said, err), "step 6", "max_steps=4")
    assert files(short) == before


@pytest.mark.parametrize("name, value", [("n_head", 4), ("seed", 1), ("tokens_per_step", 512), ("norm", "lns")])
def test_resuming_with_another_model_or_other_data_is_refused_and_named(short, corpus, name, value):
    with pytest.raises(UserError, match=f"{name}={value}, but .* {name}="):
        run_here(short, corpus, resume=True, max_steps=8, **{name: value})
    assert load_checkpoint(short / "ckpt.pt")["step"] == 6 and len(read_log(short)) == 6


def test_resuming_with_another_learning_rate_or_decay_uses_and_prints_it(
        short, corpus, capsys, monkeypatch):
    decays, make = [], train.make_optimizer

    def make_and_watch(*args):
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda o, *_: decays.append([g["weight_decay"] for g in o.param_groups]))
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", make_and_watch)
    run_here(short, corpus, resume=True, max_steps=8, learning_rate=2e-2, weight_decay=0.7)
    said = capsys.readouterr().out
    assert "resuming with learning_rate=0.02 instead of 0.01" in said and "max_steps=8 instead of 6" in said
    log = read_log(short)
    assert [r["step"] for r in log] == list(range(1, 9)) and decays[-1] == [0.7, 0.0]
    assert log[-1]["lr"] == pytest.approx(2e-2 * (0.1 + 0.45 * (1 + np.cos(np.pi * 5 / 6))))     # the new schedule


def test_a_corpus_that_changed_is_refused_and_a_copy_elsewhere_is_accepted(
        short, here, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "words")
    here(short, "--resume", data=tmp_path / "words", max_steps=7)
    meta = json.loads((tmp_path / "words/meta.json").read_text("utf-8"))
    meta["val"]["shards"][0]["crc32"] += 1                           # as if a text had changed
    (tmp_path / "words/meta.json").write_text(json.dumps(meta))
    said, err = here(short, "--resume", data=tmp_path / "words", max_steps=8, status=2)
    assert_mistake((2, said, err), str(tmp_path / "words"), "has changed", str(short / "ckpt.pt"))
    (tmp_path / "words/meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    said, err = here(short, "--resume", data=tmp_path / "words", max_steps=8, status=2)
    assert_mistake((2, said, err), "'gpt2'", "'bytes'")


def test_config_json_has_all_that_is_needed_to_repeat_a_run(launch, tmp_path):
    config, out = tmp_path / "ü.py", tmp_path / "öut"                # names that the C locale cannot decode
    config.write_text("n_layer = 1\n")
    process = launch(out, str(config), max_steps=2, n_layer=3,
                     env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    end(process)
    said = json.loads((out / "config.json").read_text(encoding="utf-8"))
    saved = load_checkpoint(out / "ckpt.pt")["settings"]
    assert said["settings"] == saved and saved["n_layer"] == 3 and saved["vocab_size"] == 320
    assert [*map(os.fsencode, said["command"])] == [*map(os.fsencode, process.args)]
    assert (said["torch"], said["python"], said["host"]) == (torch.__version__, platform.python_version(),
                                                             platform.node())
    assert (said["device"], said["world_size"]) == ("cpu", 1) and (said["commit"] is None or len(said["commit"]) >= 40)


# ---------------------------------------------------------------------------------------------------------------------
# a failure prints one line to stderr and keeps the last checkpoint. The status is 2, but torchrun's is 1


def at_most(n):
    """Limit files to n bytes, which acts like a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def test_a_disk_too_full_for_a_checkpoint_gives_one_line(launch, short):
    before = {path: path.read_bytes() for path in short.glob("ckpt*")}
    _, err = end(launch(short, "--resume", preexec_fn=at_most(100_000)), status=2)
    line, = err.splitlines()
    assert line.startswith(f"error: cannot write {short / 'ckpt.pt'}") and "intact" in line
    assert {path: path.read_bytes() for path in short.glob("ckpt*")} == before    # the half-written file is gone


def test_a_disk_too_full_for_the_log_gives_one_line(launch, tmp_path):
    _, err = end(launch(tmp_path / "out", save_interval=0, preexec_fn=at_most(5_000)), status=2)
    line, = err.splitlines()
    assert line.startswith("error: cannot write (File too large)")


def test_a_loss_that_is_not_finite_on_two_ranks_gives_one_line(launch, short):
    # the loss of one rank alone overflows
    change = "original = train.gradients\n" \
             "def overflow(*args, **kwargs):\n" \
             "    means = original(*args, **kwargs)\n" \
             "    means['loss'] *= float('inf') if os.environ['RANK'] == '1' else 1\n" \
             "    return means\n" \
             "train.gradients = overflow\n"
    _, err = end(launch(short, "--resume", ranks=2, change=change), status=1)
    line, = errors(err)
    assert "step 7: loss inf" in line and "learning_rate" in line and str(short / "ckpt.pt") in line
    assert load_checkpoint(short / "ckpt.pt")["step"] == 6
