"""Run the commands and the code of assets/lesson.md. Models are tiny and trained for two steps."""
import json
import re
import shlex
import shutil
import statistics
import sys

import pytest
import torch
from helpers import ROOT, run_python

import probe
import train
from model import GPT, ModelConfig

LESSON = (ROOT / "assets/lesson.md").read_text("utf-8")
STREAM, CHECK, *SOLUTIONS = re.findall(r"```python\n(.*?)```", LESSON, re.DOTALL)
TINY = ["--n_layer=3", "--n_embd=16", "--n_head=2", "--block_size=16", "--tokens_per_step=64", "--max_steps=2",
        "--eval_tokens=160", "--device=cpu", "--compile=false"]
OWN = ("first_token", "largest")         # the experiments that students write


def commands(script):
    """The arguments of every command of the lesson that runs this script."""
    lines = re.findall(rf"^    python {script} (.*)$", LESSON, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def code_lines(block):
    return [line for line in block.splitlines() if line]


def test_the_stream_by_hand_has_the_variances_of_the_experiment(capsys):
    assert len(code_lines(STREAM)) == 10
    names = {}
    exec(STREAM, names)
    printed = capsys.readouterr().out.splitlines()
    torch.manual_seed(0)                                     # the same weights and tokens again
    model = GPT(names["model"].config)
    p = probe.forward(model, torch.randint(256, names["x"].shape[:2]))
    want = probe.probe(model, p.idx, ["variance"])["variance"][1:]
    for l, line in enumerate(printed):
        number, stream, _, added = line.split()
        update = (p.h[l + 1] - p.h[l]).double().var(-1).mean().item()
        assert int(number) == l
        assert (float(stream), float(added)) == pytest.approx((want[l], update), rel=0.006)    # three digits
    shown = [line for line in printed if f"    {line}\n" in LESSON]
    assert len(printed) == 16 and {printed[0], printed[15]} <= set(shown)


def test_every_command_of_the_lesson_runs(tmp_path, corpus, run_main, monkeypatch):
    """The folder is empty at first, so a command can only use files that an earlier command has made."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)     # no figures
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    trained, measured = commands("train.py"), commands("probe.py")
    assert len(trained) == 7 and len(measured) >= 7
    for args in trained:
        assert train.load_settings(args)[0].max_steps == 300
        done = run_main(train, *args, *TINY, f"--data={corpus}")
        assert done.status == 0, (args, done.err)
    ran = []
    for args in measured:
        monkeypatch.setattr(sys, "argv", ["probe.py", *args])
        asked = probe.read_arguments()
        assert set(asked.only.split(",")) <= {*probe.EXPERIMENTS, *OWN}
        if str(asked.checkpoints[0]).startswith("out/") and not asked.only.endswith(OWN):
            done = run_main(probe, *args)
            assert done.status == 0, (args, done.err)
            ran += asked.checkpoints
    assert {path.parent.name for path in ran} >= {"base", "rate", "small", "gqa"}


def test_the_students_experiments_are_what_loops_compute(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    text, place = (tmp_path / "probe.py").read_text("utf-8"), "# ---- the whole measurement"
    assert text.count(place) == 1 and place in LESSON
    assert len(SOLUTIONS) == 2 and max(len(code_lines(block)) for block in SOLUTIONS) <= 12
    (tmp_path / "probe.py").write_text(text.replace(place, "\n".join([*SOLUTIONS, place])), "utf-8")
    done = run_python("-c", CHECK + CHECK.replace(*OWN) + MEASURE, cwd=tmp_path)
    assert done.status == 0, done.err
    first, largest, result, *table = done.out.splitlines()
    assert f"    {first}\n" in LESSON and largest == "{'largest': tensor([0.6250])}" and "is 0.625." in LESSON
    assert "1st token" in table[0] and "largest" in table[0]
    result = json.loads(result)

    torch.manual_seed(0)
    model = GPT(ModelConfig(**SMALL))
    x = model.embed(torch.randint(29, (5, 12))).detach()
    for l, block in enumerate(model.blocks):
        x = block(x).detach()
        tokens = [[[float(feature) for feature in token] for token in sequence] for sequence in x]
        variances = [[statistics.variance(token) for token in sequence] for sequence in tokens]
        share = sum(sequence[0] for sequence in variances) / sum(map(sum, variances))
        assert result["first_token"][l] == pytest.approx(share, rel=1e-5)
        shares = [max(f * f for f in token) / sum(f * f for f in token) for sequence in tokens for token in sequence]
        assert result["largest"][l] == pytest.approx(sum(shares) / len(shares), rel=1e-5)


SMALL = dict(vocab_size=29, block_size=12, n_layer=3, n_embd=16, n_head=2, init_std=0.4)
MEASURE = f"""
import json
from model import GPT, ModelConfig
from probe import block_table, probe
torch.manual_seed(0)
model = GPT(ModelConfig(**{SMALL}))
result = probe(model, torch.randint(29, (5, 12)), {OWN})
print(json.dumps(result))
print(block_table(result))
"""


def test_the_columns_and_the_recorded_rows_of_the_lesson_exist():
    columns = [column.name for experiment in probe.EXPERIMENTS.values() for column in experiment.columns]
    scores = [name for experiment in probe.EXPERIMENTS.values() for name in experiment.scores]
    known = set(" ".join(["block 1st token", *columns, "loss", *scores]).split())
    headers = re.findall(r"^    (block .*| +loss .*)$", LESSON, re.MULTILINE)
    assert len(headers) >= 5
    for header in headers:
        assert set(header.split()) - {"..."} <= known, header
    rows = re.findall(r"^\| L \d+, .*$", LESSON, re.MULTILINE)
    recorded = (ROOT / "configs/laptop/controls.md").read_text("utf-8")
    assert len(rows) == 3 and all(row in recorded for row in rows)
