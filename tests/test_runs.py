"""What becomes of an out_dir: nothing in it is lost, one run writes to it, and it says how it came about.

    python -m pytest -q tests/test_runs.py                      # two minutes on two cores, no download
"""
import builtins
import errno
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_mistake
from test_scale import (RUN, SLOW, assert_same_end, end, errors, here, launch, logged, read_log, truncate,
                        until, without_rates, workers)

import train
from data import load_checkpoint
from model import UserError
from train import TrainConfig, load_settings

__all__ = ["here", "launch"]      # fixtures
SHORT = RUN | dict(max_steps=12, save_interval=4)
HANG = """
honest, calls = train.gradients, []
def hang(*args, **kwargs):
    calls.append(1)
    time.sleep(60 if len(calls) == 6 else 0)
    return honest(*args, **kwargs)
train.gradients = hang
"""


@pytest.fixture(scope="module")
def start(launch):
    """As test_scale's, with the settings of SHORT."""
    return lambda out, *args, **kwargs: launch(out, *args, **SHORT | kwargs)


@pytest.fixture
def start_here(here):
    """As test_scale's `here`, with the settings of SHORT."""
    return lambda out, *args, **kwargs: here(out, *args, **SHORT | kwargs)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """SHORT, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    end(start(out))
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of it as it was after step 8."""
    to = tmp_path / "out"
    shutil.copytree(whole, to)
    os.replace(to / "ckpt.1.pt", to / "ckpt.pt")
    return to


@pytest.fixture
def resume(corpus, capsys):
    """resume(out, **settings): go on in this process; returns what it says."""
    def run(out, **settings):
        capsys.readouterr()
        train.train(TrainConfig(**SHORT | {"data": str(corpus), "out_dir": str(out)} | settings), resume=True)
        return capsys.readouterr().out
    return run


def files(out):
    """What lies in out_dir, but for the lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}


# ---------------------------------------------------------------------------------------------------------------------
# a fresh start


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.1.pt"])
def test_a_fresh_start_where_a_checkpoint_lies_is_refused_and_touches_nothing(start_here, out, name):
    os.replace(out / "ckpt.pt", out / name)
    before = files(out)
    said, err = start_here(out, status=2)
    assert_mistake((2, said, err), str(out), "--resume", "another --out_dir", "--overwrite")
    assert files(out) == before


def test_two_ranks_refuse_a_fresh_start_in_one_line(start, out):
    before = files(out)
    _, err = end(start(out, ranks=2), status=1)
    line, = errors(err)
    assert "--overwrite" in line and files(out) == before


def test_overwrite_puts_an_earlier_run_aside_in_place_of_the_one_before_it(start_here, out):
    before = files(out)
    start_here(out, "--overwrite", seed=1)
    kept = files(out)
    assert {name: kept[f"{name}.old"] for name in before} == before
    assert load_checkpoint(out / "ckpt.pt")["settings"]["seed"] == 1
    start_here(out, "--overwrite", seed=2)
    assert {name: files(out)[f"{name}.old"] for name in before} == {name: kept[name] for name in before}
    assert load_checkpoint(out / "ckpt.pt")["settings"]["seed"] == 2


def test_a_log_without_a_checkpoint_is_put_aside_and_what_was_put_aside_before_stays(start_here, tmp_path):
    for name in ("log.jsonl", "log.jsonl.old", "log.jsonl.old2"):
        (tmp_path / name).write_text(name)
    said, _ = start_here(tmp_path, max_steps=1)
    assert f"{tmp_path / 'log.jsonl'} of an earlier run is now log.jsonl.old3" in said
    assert [(tmp_path / f"log.jsonl.{old}").read_text() for old in ("old", "old2", "old3")] == [
        "log.jsonl.old", "log.jsonl.old2", "log.jsonl"]
    assert len(read_log(tmp_path)) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_checkpoint_that_a_run_starts_from_is_not_lost_to_it(start, out, ranks):
    before = files(out)
    told = [f"--init_from={out / 'ckpt.pt'}"]
    _, err = end(start(out, *told, ranks=ranks), status=2 if ranks == 1 else 1)
    assert "--overwrite" in errors(err)[0] and files(out) == before
    # rank 1 reads it late: rank 0 has to wait before it puts it aside
    late = "read = train.start_from_checkpoint\ndef late(*args):\n" \
           "    time.sleep(float(os.environ.get('RANK', 0)))\n    read(*args)\ntrain.start_from_checkpoint = late\n"
    end(start(out, *told, "--overwrite", ranks=ranks, change=late, max_steps=1))
    assert files(out)["ckpt.pt.old"] == before["ckpt.pt"]
    first = read_log(out)[0]["loss"]
    assert first < json.loads(before["log.jsonl"].splitlines()[0])["loss"] - 0.1     # from its weights


@pytest.mark.parametrize("switches", [("--resume", "--overwrite"), ("--plan", "--overwrite")])
def test_switches_that_contradict_each_other_are_refused(switches):
    with pytest.raises(UserError, match=" and ".join(switches)):
        load_settings([*switches])


@pytest.mark.parametrize("switches", [(), ("--overwrite",)])
def test_a_restart_by_torchrun_resumes_however_the_run_was_started(start_here, whole, out, monkeypatch, switches):
    (out / "log.jsonl.old").write_text("of an earlier run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    said, _ = start_here(out, *switches)
    assert ", from step 8" in said and (out / "log.jsonl.old").read_text() == "of an earlier run"
    assert_same_end(out, whole)


# ---------------------------------------------------------------------------------------------------------------------
# one writer


@pytest.mark.parametrize("switch", ["--resume", "--overwrite"])
def test_a_second_run_in_an_out_dir_is_refused_by_the_name_of_the_first_until_that_has_died(
        start, start_here, whole, tmp_path, switch):
    out = tmp_path / "out"
    first = start(out, change=SLOW, max_steps=10_000)
    until(logged(out, 6), first)
    for _ in range(2):                                               # a refused one does not take the name away
        said, err = start_here(out, switch, status=2)
        assert_mistake((2, said, err), f"pid {first.pid} on {platform.node()}", str(out), "--out_dir")
    assert first.poll() is None and not list(out.glob("*.old"))
    first.kill()
    first.communicate()
    start_here(out, switch)
    if switch == "--overwrite":
        assert_same_end(out, whole)
    assert (out / "lock").read_text() == ""


def test_orphans_of_a_killed_torchrun_keep_a_second_run_out_as_long_as_they_live(start, start_here, tmp_path):
    out = tmp_path / "out"
    first = start(out, ranks=2, change=SLOW, max_steps=10_000)
    until(logged(out, 5), first)
    ranks = workers(first)
    first.kill()
    try:
        n = len(read_log(out))
        deadline = time.time() + 60
        while not logged(out, n + 5)() and time.time() < deadline:
            time.sleep(0.05)
        assert logged(out, n + 5)()                                  # they do live on
        _, err = start_here(out, "--resume", status=2)
        assert f"pid {ranks[0]} on " in err
    finally:
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
    first.communicate()
    start_here(out, "--resume")


@pytest.mark.parametrize("fcntl", [None, "no locks on this disk"])
def test_without_file_locks_a_run_goes_on_and_says_so_once(out, resume, monkeypatch, fcntl):
    def refuse(*_):
        raise OSError(errno.ENOLCK, fcntl)
    monkeypatch.setattr(train, "fcntl", fcntl and SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0))
    assert resume(out).count(f"nothing keeps a second run out of {out}") == 1
    assert load_checkpoint(out / "ckpt.pt")["step"] == 12


def test_a_run_that_failed_in_this_process_gives_its_lock_back(out, resume):
    with pytest.raises(UserError, match="seed=1") as held:           # its traceback holds every frame
        resume(out, seed=1)
    assert ", from step 8" in resume(out) and held


# ---------------------------------------------------------------------------------------------------------------------
# signals


def last_line(said):
    """Of what a stopped run says: the part before the command that goes on, and that command."""
    return said.splitlines()[-1].split(" is saved; this goes on from there:  ")


def follow(command):
    """Run the command as it is, in another folder."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, shell=True, cwd="/", env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_the_command_it_names_goes_on_bit_for_bit(start, whole, tmp_path, name):
    out = tmp_path / "with a blank" / "out"
    process = start(out, change=SLOW, save_interval=0)
    until(logged(out, 3), process)
    process.send_signal(signal.Signals[name])
    said, err = end(process)
    step = read_log(out)[-1]["step"]
    stopped, command = last_line(said)
    assert stopped == f"stopped by {name} after step {step}; {out / 'ckpt.pt'}" and err == "" and step < 12
    assert load_checkpoint(out / "ckpt.pt")["step"] == step
    assert f", from step {step}" in follow(command).stdout
    assert_same_end(out, whole)


def test_ctrl_c_of_torchrun_saves_and_names_a_torchrun_that_goes_on(start, tmp_path):
    out = tmp_path / "out"
    process = start(out, "--overwrite", ranks=2, change=SLOW, max_steps=60)
    until(logged(out, 3), process)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=100)
    stopped, command = last_line(said)
    assert stopped.startswith("stopped by SIGINT after step ") and not errors(err)
    assert command.startswith("torchrun --standalone --nproc-per-node=2 ") and "--overwrite" not in command
    assert command.count("--resume") == 1 and ", from step " in follow(command).stdout
    assert load_checkpoint(out / "ckpt.pt")["step"] == 60


def test_a_second_ctrl_c_stops_at_once(start, tmp_path):
    out = tmp_path / "out"
    process = start(out, change=HANG)
    until(logged(out, 5), process)
    time.sleep(0.5)                                                  # it hangs in step 6
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert load_checkpoint(out / "ckpt.pt")["step"] == 4


def test_a_run_under_nohup_does_not_stop_when_its_terminal_closes(start, whole, tmp_path):
    out = tmp_path / "out"
    process = start(out, change=SLOW, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until(logged(out, 3), process)
    process.send_signal(signal.SIGHUP)
    end(process)
    assert_same_end(out, whole)


def test_after_a_run_signals_mean_what_they_did_before(out, resume):
    before = [signal.getsignal(s) for s in train.SIGNALS]
    resume(out)
    assert [signal.getsignal(s) for s in train.SIGNALS] == before and len(before) == 3


# ---------------------------------------------------------------------------------------------------------------------
# a log or a checkpoint that is missing, damaged, out of reach


DAMAGE = {
    "zeros": lambda log: log[:200] + bytes(100) + log[200:],
    "no text": lambda log: b"\xff\xfe\n" + log,
    "no step": lambda log: b"{}\n" + log,
    "a list": lambda log: b"[1]\n" + log,
    "a word": lambda log: log.replace(b'"step": 2', b'"step": "two"'),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "empty"])
def test_without_its_log_or_with_a_damaged_one_a_run_goes_on_and_says_so(whole, out, resume, damage):
    log = out / "log.jsonl"
    broken = DAMAGE.get(damage, lambda _: b"")(log.read_bytes())
    log.write_bytes(broken)
    if damage == "missing":
        log.unlink()
    said, = [line for line in resume(out).splitlines() if "log.jsonl" in line]
    assert str(log) in said and "a new one begins after step 8" in said
    assert without_rates(read_log(out)) == without_rates(read_log(whole))[8:]
    if damage in DAMAGE:
        assert (out / "log.jsonl.damaged").read_bytes() == broken and "log.jsonl.damaged" in said
    else:
        assert not (out / "log.jsonl.damaged").exists()
        assert ("is not there" if damage == "missing" else f"is {damage}") in said


@pytest.mark.parametrize("stays", [0, 3])
def test_a_log_that_ends_early_goes_on_and_its_hole_is_named(out, resume, stays):
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:stays]) + lines[stays][:9])
    assert f"{log} ends at step {stays}: the steps up to 8 are missing in it" in resume(out)
    assert [line["step"] for line in read_log(out)] == [*range(1, stays + 1), 9, 10, 11, 12]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_after_a_ctrl_c_another_one_is_the_systems_also_as_torchrun_hands_it_on(second):
    with train.catch_signals() as caught:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(second) != signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(second) == signal.SIG_DFL and caught == [signal.SIGHUP, signal.SIGINT]
    assert signal.getsignal(second) != signal.SIG_DFL or second == signal.SIGTERM


def test_a_reader_that_goes_away_is_no_traceback():
    """As `train.py ... | head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/dense.py"), "--plan"]
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert process.communicate()[1] == "" and process.returncode == 141


def test_a_checkpoint_that_was_copied_alone_goes_on(start_here, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "ckpt.1.pt", out / "ckpt.pt")
    said, _ = start_here(out, "--resume")
    assert "log.jsonl is not there: a new one begins after step 8" in said
    assert torch.equal(*(load_checkpoint(x / "ckpt.pt")["model"]["embed.weight"] for x in (out, whole)))


class FailingDisk(io.FileIO):
    def readinto(self, buffer):
        raise OSError(errno.EIO, "Input/output error")

    def read(self, n=-1):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("failure", ["Permission denied", "Input/output error"])
@pytest.mark.parametrize("newer", ["none", "damaged"])
def test_a_checkpoint_that_cannot_be_read_is_named_and_nothing_is_passed_over(whole, tmp_path, resume, monkeypatch,
                                                                            failure, newer):
    out, ordinary = tmp_path / "out", builtins.open
    shutil.copytree(whole, out)
    unreadable = out / ("ckpt.pt" if newer == "none" else "ckpt.1.pt")
    if newer == "damaged":
        truncate(out / "ckpt.pt")
        shutil.copy(whole / "ckpt.1.pt", out / "ckpt.2.pt")
    before = files(out)

    def fail(file, *args, **kwargs):
        if str(file) != str(unreadable):
            return ordinary(file, *args, **kwargs)
        if failure == "Permission denied":
            raise PermissionError(errno.EACCES, failure, str(file))
        return FailingDisk(file)
    monkeypatch.setattr(builtins, "open", fail)
    monkeypatch.setattr(io, "open", fail)                            # zipfile's
    with pytest.raises(UserError, match=failure) as refused:
        resume(out)
    monkeypatch.undo()
    line = str(refused.value)
    assert f"cannot read {unreadable}" in line and "damaged" not in line and "\n" not in line
    assert files(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# what was run


def test_config_json_says_all_that_repeats_a_run(start, start_here, tmp_path):
    config, out = tmp_path / "a.py", tmp_path / "out"
    config.write_text("n_layer = 1\n")
    process = start(out, str(config), ranks=2, max_steps=2, n_layer=3)
    end(process)
    said = json.loads((out / "config.json").read_text())
    saved = load_checkpoint(out / "ckpt.pt")["settings"]
    assert said["settings"] == saved and saved["n_layer"] == 3 and saved["vocab_size"] > 0
    assert (Path(said["folder"]) / said["configs"][0]).resolve() == config.resolve() and len(said["configs"]) == 1
    assert said["command"][1:] == process.args[process.args.index("--standalone") + 1:]
    assert (said["torch"], said["python"], said["host"]) == (torch.__version__, platform.python_version(),
                                                             platform.node())
    assert (said["device"], said["world_size"]) == ("cpu", 2)
    start_here(out, "--resume", str(config), max_steps=3, n_layer=3)     # every start writes it
    said = json.loads((out / "config.json").read_text())
    assert said["settings"]["max_steps"] == 3 and said["world_size"] == 1 and "--resume" in said["command"]


def test_the_commit_is_that_of_the_code_and_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*args):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *names, *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train.commit() is None                                    # no repository
    (tmp_path / "train.py").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    git("tag", "-a", "v1", "-m", "v1")
    head = git("rev-parse", "HEAD").strip()
    assert train.commit() == head
    (tmp_path / "train.py").write_text("b")
    assert train.commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert train.commit() is None                                    # no git


def test_configs_of_one_name_do_not_share_an_out_dir_unless_told_to(corpus, tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in SHORT.items()))
    go = [f"--data={corpus}"]
    assert run_main(train, "a/small.py", *go, "--max_steps=1").status == 0
    assert_mistake(run_main(train, "a/small.py", *go), "out/small", "--overwrite")
    for switch in ([], ["--overwrite"]):
        assert_mistake(run_main(train, "b/small.py", *go, *switch), "a/small.py", "b/small.py", "--out_dir=out/small")
    assert_mistake(run_main(train, "b/small.py", *go, "--resume"), "a/small.py", "b/small.py", "--out_dir=out/small")
    assert_mistake(run_main(train, *go, "--resume", "a/../b/small.py"), "a/small.py", "b/small.py")
    for k, args in enumerate([["a/small.py"], ["./a/small.py"], [tmp_path / "a/small.py"], ["b/small.py", "a/small.py"],
                              ["b/small.py", "--out_dir=out/small"]], 2):
        done = run_main(train, *args, *go, f"--max_steps={k}", "--resume")
        assert done.status == 0 and f", from step {k - 1}" in done.out, done.err
    Path("out/small/config.json").unlink()                           # as of an older run
    assert run_main(train, "a/small.py", *go, "--max_steps=7", "--resume").status == 0
    shutil.move(tmp_path, tmp_path.with_name("moved"))               # the whole project
    monkeypatch.chdir(tmp_path.with_name("moved"))
    assert run_main(train, "a/small.py", *go, "--max_steps=8", "--resume").status == 0


def test_an_absolute_out_dir_is_of_one_config_wherever_it_is_started_from(corpus, tmp_path, monkeypatch, run_main):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        settings = SHORT | {"out_dir": str(tmp_path / "out"), "data": str(corpus), "max_steps": 1}
        (tmp_path / folder / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in settings.items()))
    monkeypatch.chdir(tmp_path / "a")
    assert run_main(train, "small.py").status == 0
    monkeypatch.chdir(tmp_path / "b")
    assert_mistake(run_main(train, "small.py", "--resume"), str(tmp_path / "a/small.py"))
    monkeypatch.chdir(tmp_path)
    assert run_main(train, "a/small.py", "--resume", "--max_steps=2").status == 0


# ---------------------------------------------------------------------------------------------------------------------
# the corpus


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corpus_that_changed_under_its_path_is_refused(start_here, out, corpus, tmp_path, split):
    words = tmp_path / "words"
    shutil.copytree(corpus, words)
    start_here(out, "--resume", data=words, max_steps=9)             # a copy elsewhere is the same corpus
    meta = json.loads((words / "meta.json").read_text())
    before = files(out)
    shard = words / meta[split]["shards"][0]["file"]
    tokens = bytearray(shard.read_bytes())
    tokens[0] ^= 1                                                   # as if one letter of a text had changed
    shard.write_bytes(tokens)
    meta[split]["shards"][0]["crc32"] = zlib.crc32(tokens)
    (words / "meta.json").write_text(json.dumps(meta))
    for spelling in (words, words / ".." / "words"):
        said, err = start_here(out, "--resume", data=spelling, status=2)
        assert_mistake((2, said, err), str(spelling), "has changed", str(out / "ckpt.pt"))
        assert files(out) == before


def test_a_checkpoint_from_before_there_were_checksums_goes_on(whole, out, resume):
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    assert isinstance(saved.pop("corpus"), int)
    torch.save(saved, out / "ckpt.pt")
    assert ", from step 8" in resume(out)
    assert_same_end(out, whole)
