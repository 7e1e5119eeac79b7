"""train.py on several ranks, killed, stopped, out of space: real processes that really die, on the CPU.

    python -m pytest -q tests/test_scale.py                     # about four minutes on two cores, no download
"""
import json
import math
import os
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
from helpers import PEAK as PEAK_OF_A_PROCESS
from helpers import ROOT, run_python
from test_train import BENCH, MOE, TINY, flops_by_hand, read_log, without_rates

import train
from data import load_checkpoint
from model import UserError
from train import TrainConfig

RUN = TINY | dict(max_steps=40, learning_rate=1e-2, save_interval=5, eval_interval=10, stats_interval=10, **MOE)
# Where runs that round differently are compared over many steps: with all experts chosen, rounding tips no choice.
ALL_EXPERTS = {"top_k": RUN["n_experts"]}
PEAK = 1e6          # FLOP/s of a rank: so few that the MFU has many digits
# train.py on CPUs that have a known peak, after whatever a test wants changed
SCRIPT = f"""
import io, json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train
train.peak_of_all = lambda here: {PEAK} * here.world
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


@pytest.fixture(scope="module")
def launch(tmp_path_factory, corpus):
    """launch(out, *arguments, ranks=, change=, torchrun=, **settings) starts train.py; what still runs is ended."""
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
            process.terminate()          # torchrun ends its workers, then itself
            process.communicate()


@pytest.fixture
def here(corpus, run_main):
    """here(out, *arguments, status=, **settings) runs train.py in this process; returns its stdout and stderr."""
    def run(out, *args, status=0, **settings):
        told = RUN | {"data": corpus, "out_dir": out} | settings
        done = run_main(train, *args, *(f"--{name}={value}" for name, value in told.items()))
        assert done.status == status, done
        return done.out, done.err
    return run


def end(process, status=0):
    """Wait for a process and check its exit status; returns what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=300)      # a hang; two ranks on a busy core are slow
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
    todo = {kind: SHORT | settings | {"data": str(corpus)} for kind, settings in KINDS.items()}
    for kind, settings in todo.items():
        train.train(TrainConfig(**settings | {"out_dir": str(folder / f"{kind}-alone"), "recompute": False}))
    cut(folder / "moe-alone", folder / "alone-then-fsdp")
    runs = [(settings | {"out_dir": str(folder / f"{kind}-{engine}"), "parallel": engine}, False)
            for engine in ENGINES for kind, settings in todo.items()]
    runs.append((todo["moe"] | {"out_dir": str(folder / "alone-then-fsdp"), "parallel": "fsdp"}, True))
    script = """
train.dist.init_process_group("gloo")               # once for all of them: torchrun's store serves one group
leave = train.dist.destroy_process_group            # without which gloo's threads end the interpreter by an abort
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_, **__: None
for settings, resume in json.loads(sys.argv[1]):
    train.train(train.TrainConfig(**settings), resume)
leave()
"""
    said = end(launch(folder, json.dumps(runs), ranks=2, script=script))[0]
    assert said.count("2 x cpu") == said.count("trained in") == len(runs)        # two ranks, one of them talks
    (folder / "said.txt").write_text(said)
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


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mfu_of_two_ranks_is_measured_against_the_peak_of_both(engines, engine):
    out = engines / f"dense-{engine}"
    said = (engines / "said.txt").read_text().split(f"{out}: ")[1].split("trained in")[0]        # of this run
    shown = {int(step): float(percent) for step, percent in re.findall(r"step (\d+)/6 .* MFU (\d+)%", said)}
    assert shown.keys() == {2, 3, 4, 6}                              # validations, statistics, the end
    flops = flops_by_hand(d=16, L=2, T=32, kv=8, ffn=3 * 16 * 40)
    for record in read_log(out):
        if record["step"] in shown:
            mfu = flops * record["tokens_per_s"] / (2 * PEAK)
            assert shown[record["step"]] == pytest.approx(100 * mfu, abs=0.51) and mfu > 1


def test_the_bench_of_a_step_compares_two_ranks_with_one(tmp_path):
    settings = [f"--{name}={value}" for name, value in BENCH.items()]
    done = run_python("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", ROOT / "tests/bench/step.py",
                      "--compile=false", "--device=cpu", *settings, cwd=tmp_path)
    assert done.status == 0, done.err
    line, = (line for line in done.out.splitlines() if line.startswith("{"))     # one of the ranks talks; and gloo
    result = json.loads(line)
    ways = {name: value for name, value in result.items() if isinstance(value, dict)}
    assert result["ranks"] == 2 and [*ways] == ["alone", "ddp", "fsdp"]
    for measured in ways.values():
        assert measured["tokens_per_s"] > 0 and 0 < measured["kernel_share"] < 1
        assert measured["speed"] == pytest.approx(measured["tokens_per_s"] / ways["alone"]["tokens_per_s"],
                                                  abs=1e-3, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """RUN, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_here(out, corpus)
    return out


@pytest.fixture(scope="module")
def whole_of_all_experts(corpus, tmp_path_factory):
    """RUN with ALL_EXPERTS, uninterrupted."""
    out = tmp_path_factory.mktemp("whole_of_all_experts") / "out"
    run_here(out, corpus, **ALL_EXPERTS)
    return out


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_killed_at_several_steps_and_resumed_ends_bit_for_bit_as_one_that_was_not(launch, whole, tmp_path):
    out, said = tmp_path / "out", []
    for step in sorted(random.Random(1).sample(range(1, 39), 3)):
        process = launch(out, "--resume", change=SLOW)
        until(logged(out, step), process)
        kill(process)
        assert len(read_log(out)) < 40
        with open(out / "log.jsonl", "a") as f:
            f.write('{"step": 39, "tok')                             # as if it had been killed while it wrote a line
    said, _ = end(launch(out, "--resume"))
    assert ", from step " in said
    assert_same_end(out, whole)


def test_a_run_killed_while_it_writes_its_checkpoints_loses_none_of_those_before(launch, here, whole, tmp_path):
    out = tmp_path / "out"
    for n in (1, 2, 2):
        process = launch(out, "--resume", change=SLOW + HALF)
        for _ in range(n):                                           # the nth checkpoint from here
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


def test_with_nothing_to_resume_a_run_starts_afresh_and_says_so_and_one_that_is_done_changes_nothing(
        here, whole, tmp_path):
    out = tmp_path / "out"
    said, _ = here(out, "--resume")
    assert said.splitlines()[0] == f"nothing to resume in {out}: starting afresh"
    assert_same_end(out, whole)
    before = {path: path.read_bytes() for path in out.iterdir()}
    said, _ = here(out, "--resume")
    assert f"{out} has all its steps already" in said
    after = {path: path.read_bytes() for path in out.iterdir()}
    assert before.pop(out / "config.json") and after.pop(out / "config.json")    # says how it was started
    assert after == before


def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on_by_itself(launch, whole_of_all_experts, tmp_path):
    out = tmp_path / "out"
    late = 'time.sleep(1.0 if os.environ["RANK"] == "1" else 0)\n'      # rank 0 looks for it where its predecessor was
    process = launch(out, ranks=2, change=late + SLOW, torchrun=["--max-restarts=1"], **ALL_EXPERTS)
    until(logged(out, 12), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    said, _ = end(process)
    assert ", from step 10" in said or ", from step 5" in said       # the second may not have been written yet
    assert_same_end(out, whole_of_all_experts, exact=False)


def test_sigterm_saves_and_the_run_goes_on_from_there(launch, whole, tmp_path):
    out = tmp_path / "out"
    process = launch(out, change=SLOW, save_interval=0)
    until(logged(out, 7), process)
    process.send_signal(signal.SIGTERM)
    said, err = end(process)
    step = read_log(out)[-1]["step"]
    assert 7 <= step < 40 and load_checkpoint(out / "ckpt.pt")["step"] == step
    assert said.splitlines()[-1].startswith(f"stopped by SIGTERM after step {step}; ") and err == ""
    end(launch(out, "--resume"))
    assert_same_end(out, whole)


@pytest.mark.parametrize("whom", ["a rank", "torchrun"])
def test_sigterm_to_a_rank_or_to_torchrun_stops_and_saves_all(launch, here, whole_of_all_experts, tmp_path, whom):
    out = tmp_path / "out"
    process = launch(out, ranks=2, change=SLOW, save_interval=0, parallel="fsdp", **ALL_EXPERTS)
    until(logged(out, 3), process)
    os.kill(workers(process)[1] if whom == "a rank" else process.pid, signal.SIGTERM)
    said, err = process.communicate(timeout=60)
    step = read_log(out)[-1]["step"]
    assert step < 40 and load_checkpoint(out / "ckpt.pt")["step"] == step
    assert said.splitlines()[-1].startswith(f"stopped by SIGTERM after step {step}; ") and not errors(err)
    if whom == "a rank":
        assert process.returncode == 0, err
    else:
        assert "SIGTERM" in err                                      # torchrun reports its own signal
    here(out, "--resume", **ALL_EXPERTS)
    assert_same_end(out, whole_of_all_experts, exact=False)


# ---------------------------------------------------------------------------------------------------------------------
# damage


def run_here(out, corpus, resume=False, **settings):
    """The same in this process, for what needs no other."""
    train.train(TrainConfig(**RUN | {"data": str(corpus), "out_dir": str(out)} | settings), resume)


@pytest.mark.parametrize("keep", [1, 3])
def test_exactly_the_newest_checkpoints_are_kept(corpus, tmp_path, keep):
    run_here(tmp_path, corpus, max_steps=11, save_interval=2, keep_checkpoints=keep)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.glob("ckpt*")}
    assert steps == dict(list({"ckpt.pt": 11, "ckpt.1.pt": 10, "ckpt.2.pt": 8}.items())[:keep])


@pytest.fixture(scope="module")
def short(corpus, tmp_path_factory):
    """A run of 6 steps that keeps those of step 2, 4 and 6."""
    out = tmp_path_factory.mktemp("short")
    run_here(out, corpus, max_steps=6, save_interval=2, keep_checkpoints=3)
    return out


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_weight(path):
    damaged = bytearray(path.read_bytes())
    weight = load_checkpoint(path)["model"]["blocks.1.ffn.gate"].numpy().tobytes()
    damaged[damaged.index(weight) + 5] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("damage", [truncate, flip_a_weight, lambda path: path.write_bytes(b""), Path.unlink],
                         ids=["truncated", "flipped", "empty", "between_two_renames"])
def test_the_checkpoint_before_a_damaged_one_is_used(short, corpus, tmp_path, capsys, damage):
    out = tmp_path / "out"
    shutil.copytree(short, out)
    damage(out / "ckpt.pt")
    run_here(out, corpus, resume=True, max_steps=6, save_interval=2, keep_checkpoints=3)
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == (damage is not Path.unlink) and all(str(out / "ckpt.pt") in line for line in said)
    assert_same_end(out, short)
    kept = {path.name: load_checkpoint(path)["step"] for path in out.glob("ckpt*.pt")}
    assert kept == {"ckpt.pt": 6, "ckpt.1.pt": 4, "ckpt.2.pt": 2}
    assert len(list(out.glob("*.damaged"))) == len(said)                # none of the three kept is the damaged one


@pytest.mark.parametrize("name, value", [("tokenizer", "gpt2"), ("eot", 12), ("dtype", "int16"), ("vocab_size", 300)])
def test_a_corpus_whose_header_disagrees_with_its_tokenizer_is_refused(corpus, here, tmp_path, name, value):
    shutil.copytree(corpus, tmp_path / "corpus")
    meta = json.loads((tmp_path / "corpus/meta.json").read_text())
    (tmp_path / "corpus/meta.json").write_text(json.dumps(meta | {name: value}))
    _, err = here(tmp_path / "out", data=tmp_path / "corpus", status=2)
    assert len(err.splitlines()) == 1 and "meta.json" in err and str(value) in err


def test_a_run_does_not_resume_on_the_tokens_of_another_tokenizer(short, corpus, here, tmp_path):
    shutil.copytree(short, tmp_path / "out")
    shutil.copytree(corpus, tmp_path / "corpus")
    meta = json.loads((tmp_path / "corpus/meta.json").read_text())
    (tmp_path / "corpus/meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    _, err = here(tmp_path / "out", "--resume", max_steps=8, data=tmp_path / "corpus", status=2)
    assert len(err.splitlines()) == 1 and "'another'" in err and "'bytes'" in err


def test_weights_that_are_not_finite_are_not_saved(here, tmp_path):
    out = tmp_path / "out"
    _, err = here(out, learning_rate=3e38, warmup_steps=0, max_steps=1, status=2)
    assert len(err.splitlines()) == 1 and "not finite" in err and "lower learning_rate" in err
    assert not list(out.glob("ckpt*"))


def test_where_every_checkpoint_is_damaged_a_run_is_refused_and_nothing_is_touched(short, here, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(short, out)
    for path in out.glob("ckpt*.pt"):
        truncate(path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    said, err = here(out, "--resume", status=2)
    assert said.count("is damaged") == 3
    assert len(err.splitlines()) == 1 and err.startswith(f"error: {out}: every checkpoint is damaged")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_bit_flipped_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(short, tmp_path):
    path = tmp_path / "ckpt.pt"
    good, want = (short / "ckpt.pt").read_bytes(), flat(load_checkpoint(short / "ckpt.pt"))
    draw = random.Random(0)
    directory = len(good) - 2000                                     # holds names, flags, sizes and checksums
    places = draw.choices(range(len(good)), k=60) + draw.choices(range(directory, len(good)), k=250)
    noticed = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = train.newest_checkpoint(tmp_path)
        except UserError:
            noticed += 1
        else:
            assert all(torch.equal(v, want[k]) for k, v in flat(load_checkpoint(found)).items())
    assert noticed > 150


@pytest.mark.parametrize("name, value", [("n_head", 4), ("seed", 1), ("tokens_per_step", 512), ("norm", "lns")])
def test_resuming_with_another_model_or_other_data_is_refused_by_name(short, corpus, tmp_path, name, value):
    shutil.copytree(short, tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}={value!r}, but .* {name}=|{name}={value}, but .* {name}="):
        run_here(tmp_path / "out", corpus, resume=True, max_steps=8, **{name: value})
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 6 and len(read_log(tmp_path / "out")) == 6


def test_resuming_with_another_learning_rate_says_so_and_goes_on(short, corpus, tmp_path, capsys):
    shutil.copytree(short, tmp_path / "out")
    run_here(tmp_path / "out", corpus, resume=True, max_steps=8, learning_rate=2e-2, keep_checkpoints=3)
    said = capsys.readouterr().out
    assert "resuming with learning_rate=0.02 instead of 0.01" in said and "max_steps=8 instead of 6" in said
    log = read_log(tmp_path / "out")
    assert [r["step"] for r in log] == list(range(1, 9)) and log[-1]["lr"] == pytest.approx(
        2e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 6))))                   # of the schedule to step 8


# ---------------------------------------------------------------------------------------------------------------------
# failures: one line on stderr, status 2 (torchrun's own is 1), no hang, the last good checkpoint as it was


def at_most(n):
    """Files of at most n bytes: to the program, as if the disk were full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_too_full_for_a_checkpoint_is_one_line(launch, short, tmp_path, ranks):
    out = tmp_path / "out"
    shutil.copytree(short, out)
    before = {path: path.read_bytes() for path in out.glob("ckpt*")}
    process = launch(out, "--resume", ranks=ranks, preexec_fn=at_most(100_000))
    _, err = end(process, status=2 if ranks == 1 else 1)
    line, = errors(err)
    assert f"cannot write {out / 'ckpt.pt'}" in line and "intact" in line and (ranks == 2 or err == line + "\n")
    assert {path: path.read_bytes() for path in out.glob("ckpt*")} == before      # the half-written file is gone


def test_a_disk_too_full_for_the_log_is_one_line_and_leaves_whole_lines(launch, tmp_path):
    _, err = end(launch(tmp_path / "out", save_interval=0, preexec_fn=at_most(5_000)), status=2)
    line, = err.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path / 'out' / 'log.jsonl'}")


def test_an_out_dir_that_two_ranks_cannot_write_is_one_line(launch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    _, err = end(launch(tmp_path / "taken" / "out", ranks=2), status=1)
    assert len(errors(err)) == 1 and str(tmp_path / "taken" / "out") in errors(err)[0]


def test_a_loss_that_is_not_finite_on_two_ranks_is_one_line(launch, short, tmp_path):
    shutil.copytree(short, tmp_path / "out")
    # 0.01 was its rate; the loss of one rank alone overflows
    change = "honest = train.gradients\n" \
             "def overflow(*args, **kwargs):\n" \
             "    sums = honest(*args, **kwargs)\n" \
             "    sums['loss'] *= float('inf') if os.environ['RANK'] == '1' else 1\n" \
             "    return sums\n" \
             "train.gradients = overflow\n"
    _, err = end(launch(tmp_path / "out", "--resume", ranks=2, change=change), status=1)
    line, = errors(err)
    assert "step 7: loss inf" in line and "learning_rate" in line
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 6


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_dies_ends_the_run_with_a_line_of_the_other(launch, tmp_path, engine, rank):
    out = tmp_path / "out"
    process = launch(out, ranks=2, change=SLOW, parallel=engine, eval_interval=3)
    until(logged(out, 7), process)
    os.kill(workers(process)[rank], signal.SIGKILL)
    _, err = end(process, status=1)
    line, = errors(err)
    assert f"rank {1 - rank} lost another rank" in line and "--resume" in line
    assert "Traceback" not in err.split(line)[0]
    assert train.newest_checkpoint(out) is not None and load_checkpoint(out / "ckpt.pt")["step"] < 40


def damaged_copy(corpus, to, what):
    shutil.copytree(corpus, to)
    shard = to / "train_00000.bin"
    if what == "missing":
        shard.unlink()
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif what == "beyond":
        ids = np.fromfile(shard, dtype=np.uint16)
        ids[1000:] = 257
        ids.tofile(shard)
    else:
        meta = json.loads((to / "meta.json").read_text())
        (to / "meta.json").write_text(json.dumps(meta | {"vocab_size": 300}))
    return to


@pytest.mark.parametrize("what, ranks, named", [
    ("missing", 1, "train_00000.bin"), ("truncated", 2, "train_00000.bin"), ("beyond", 2, "257"),
    ("header", 1, "meta.json")])
def test_a_damaged_corpus_is_one_line(launch, corpus, tmp_path, what, ranks, named):
    process = launch(tmp_path / "out", ranks=ranks, data=damaged_copy(corpus, tmp_path / "data", what))
    _, err = end(process, status=2 if ranks == 1 else 1)
    line, = errors(err)
    assert named in line and str(tmp_path / "data") in line and (ranks == 2 or err == line + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# compiled


# name -> settings, the compiler's backend (without code generation, which would take most of a minute), and how many
# graphs there are after steps 1 and 2 (the first with statistics), after the validation that follows, after later steps
COMPILED = {
    "ddp": (MOE | {"parallel": "ddp"}, "aot_eager", [1, 1, 2, 2, 2, 2]),
    "fsdp": (MOE | {"parallel": "fsdp"}, "aot_eager", [1, 1, 2, 2, 2, 2]),       # a block at a time, all blocks alike
    "fsdp-lns": ({"parallel": "fsdp", "norm": "lns", "n_layer": 9}, "eager", [9, 9, 18, 18, 18, 18]),      # no two
}


@pytest.fixture(scope="module")
def compiled(launch, corpus, tmp_path_factory):
    """Runs of COMPILED, eager and compiled, by two ranks; of the compiled ones how many graphs there were when."""
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
    return folder, json.loads((folder / "counted.json").read_text())


@pytest.mark.parametrize("name", COMPILED)
def test_two_ranks_compile_once_without_graph_breaks_and_compute_the_same(compiled, name):
    folder, counted = compiled
    assert counted[name] == [*COMPILED[name][2], 0]
    assert_same_end(folder / f"{name}-True", folder / f"{name}-False", exact=False)


# ---------------------------------------------------------------------------------------------------------------------
# planned


BIG = TINY | dict(vocab_size=2048, block_size=512, n_layer=4, n_head=8, n_embd=384, ffn_hidden=1536,
                  batch_size=1, dtype="float32")
PLANS = {
    "dense": BIG,
    "dense, recompute": BIG | {"recompute": True},
    "moe": BIG | dict(n_experts=4, top_k=2),
    "moe, recompute": BIG | dict(n_experts=4, top_k=2, recompute=True),
}
FSDP_PLANS = ("dense", "moe, recompute")


@pytest.fixture(scope="module")
def peaks(launch, tmp_path_factory):
    """Peak bytes of resident memory that two steps of PLANS take, for (name, ranks)."""
    # A process's own peak is in VmHWM, and writing 5 to clear_refs lets it begin anew.
    script = """
def measure(settings):
    c = train.TrainConfig(**settings)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    raw, model = train.build(c, here)
    optimizer = train.make_optimizer(raw, c)
    for x in (idx[:, :8], idx):                                      # the first step makes the moments
        train.gradients(model, [(x, x), (x, x)], here.dtype, stats=False)
        optimizer.step()
        optimizer.zero_grad()
    return 1024 * (kilobytes("VmHWM") - before)

def kilobytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

import gc
plans = json.loads(sys.argv[1])
here = train.set_up(train.TrainConfig(device="cpu"))
idx = torch.randint(2048, (1, 512))
measure(plans["dense"] | {"n_layer": 1})                             # what is allocated once
peaks = {name: measure(settings) for name, settings in plans.items()}
if here.rank == 0:
    print(json.dumps(peaks))
if here.world > 1:
    train.dist.destroy_process_group()
"""
    # freed memory goes back to the system at once, or it would hide in later peaks
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for ranks, parallel, names in ((1, "ddp", PLANS), (2, "fsdp", FSDP_PLANS)):
        plans = {name: PLANS[name] | {"parallel": parallel, "tokens_per_step": 1024 * ranks}       # two micro-batches
                 for name in names}
        said, _ = end(launch(tmp_path_factory.mktemp("peaks"), json.dumps(plans), ranks=ranks, script=script, env=env))
        found |= {(name, ranks): (bytes, TrainConfig(**plans[name])) for name, bytes in json.loads(said).items()}
    return found


@pytest.mark.parametrize("name, ranks", [*((name, 1) for name in PLANS), *((name, 2) for name in FSDP_PLANS)])
def test_a_plan_says_the_peak_memory_of_a_run_within_15_percent(peaks, name, ranks):
    measured, c = peaks[name, ranks]
    _, size = train.batch_shape(c, ranks)
    assert measured > 100e6 and sum(train.memory(c, ranks, size)) == pytest.approx(measured, rel=0.15)


PAPER_MOE = ["--n_embd=2048", "--n_head=16", "--n_layer=16", "--n_experts=64", "--top_k=8", "--expert_hidden=1024",
             "--block_size=4096", "--batch_size=4", "--tokens_per_step=2097152", "--max_steps=4768"]


def test_a_plan_of_a_byte_model_counts_the_vocabulary_that_training_gives_it():
    c = train.load_settings([str(ROOT / "configs/dense.py")])[0]
    d, L, V = c.n_embd, c.n_layer, 320
    said = train.plan(c, 1, 0.4).splitlines()[0]
    assert f" {2 * V * d + L * (16 * d * d + 2 * d) + d:,} total" in said


@pytest.mark.parametrize("batch_size, gpus, size", [(0, 1, 8), (0, 4, 2), (1, 4, 1)])
def test_a_plan_is_of_as_many_sequences_as_a_rank_has_in_a_pass(batch_size, gpus, size):
    c = TrainConfig(**TINY | {"batch_size": batch_size})             # 8 sequences a step
    header = train.plan(c, gpus, 0.4).splitlines()[6]
    assert header.startswith(f"GB per GPU of {gpus}, {size} sequences of 32 per pass")


def test_planning_a_model_of_seven_billion_parameters_allocates_nothing(tmp_path):
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train\n{PEAK_OF_A_PROCESS}\n"
              "before = peak(); train.main(); print(peak() - before)")
    done = run_python("-c", script, *PAPER_MOE, "--plan", "--gpus=8", "--data=any", cwd=tmp_path)
    assert done.status == 0, done.err
    *lines, grown = done.out.splitlines()
    assert int(grown) < 2e8 and list(tmp_path.iterdir()) == []       # the weights alone would be 27.7 GB
    d, L, E, h, V = 2048, 16, 64, 1024, 50304                        # counted by hand; norms are noise
    expert, rest = 3 * d * h, L * (4 * d * d + E * d) + 2 * V * d
    norms = (2 * L + 1) * d
    assert round((L * E * expert + rest) / 1e9, 2) == 6.92 and round((L * 8 * expert + rest) / 1e9, 2) == 1.28
    assert f"{L * E * expert + rest + norms:,} total, {L * 8 * expert + rest + norms:,} active" in lines[0]
    flops = 3 * (2 * (L * 8 * expert + rest - V * d) + 4 * 4096 * d * L)
    text = "\n".join(lines)
    assert f"{flops:,.0f} per token" in text and "9,999,220,736 in 4,768 steps" in text
    hours = flops * 4768 * 2097152 / (8 * 989e12 * 0.4) / 3600
    assert f"{hours:,.1f} on 8 H100" in text
    rows = {line[:22].strip(): line for line in lines if line.endswith("80 GB")}
    P = (L * E * expert + rest + norms) / 1e9
    assert rows.keys() == {"ddp", "ddp, recompute", "fsdp", "fsdp, recompute"}
    for name, row in rows.items():
        weights, gradients, moments, passing, total = map(float, row[22:].split()[:5])
        share = 1 if "ddp" in name else 8
        assert (weights, gradients, moments) == pytest.approx((4 * P / share, 4 * P / share, 8 * P / share), abs=0.006)
        assert total == pytest.approx(weights + gradients + moments + passing, abs=0.03)
        assert ("does not fit" in row) == (total >= 80)
    assert "does not fit" in rows["ddp"] and "does not fit" not in rows["fsdp, recompute"]
