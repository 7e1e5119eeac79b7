"""`probe.py CKPT --sample PROMPT`: a checkpoint's model writes on. What `generate` draws: tests/test_model.py.

    python -m pytest -q tests/test_sample.py
"""
from __future__ import annotations

import pytest
import torch
from helpers import ROOT, assert_mistake, checkpoint_of, make_model, run_python, run_script

import probe
from data import get_tokenizer, load_model
from model import generate

BYTES = dict(vocab_size=320, n_layer=2)                          # the 257 ids of "bytes" and some padding


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, **BYTES)), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_sampling_prints_the_prompt_and_the_same_text_for_the_same_seed(checkpoint, run_main):
    texts = []
    for seed in (1, 1, 2):
        status, out, err = run_main(probe, checkpoint, "--sample", "def ", "--new_tokens", 30, "--seed", seed)
        assert status == 0, err
        texts.append(out)
    assert texts[0].startswith("def ") and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", ["def ", "é 東", ""])
def test_sampling_prints_what_generate_draws_after_the_prompt_or_after_an_end_of_text(prompt, checkpoint, run_main):
    model, enc = load_model(checkpoint)[0], get_tokenizer("bytes")
    idx = torch.tensor([[*prompt.encode()] or [256]])
    drawn = generate(model, idx, 20, 0.6, 7, 257, torch.Generator().manual_seed(3))
    status, out, err = run_main(probe, checkpoint, "--sample", prompt, "--new_tokens", 20, "--temperature", 0.6,
                                "--top_k", 7, "--seed", 3)
    assert status == 0, err
    assert out == enc.decode(drawn[0].tolist()) + "\n"
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["ckpt.pt"], "and it writes no file"


@pytest.mark.parametrize("script", ["train", "probe"])
def test_what_apples_gpus_lack_falls_back_to_the_cpu(script):
    """torch reads the variable when it is imported, so it has to be there before."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
class Watch:
    def find_spec(self, name, *args):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
sys.meta_path.insert(0, Watch())
import {script}"""
    for said, given in (("1", {}), ("0", {"PYTORCH_ENABLE_MPS_FALLBACK": "0"})):
        assert run_python("-c", code, env=given).out.split() == [said]


def test_sampling_from_a_missing_checkpoint_exits_with_2_and_one_line(tmp_path):
    outcome = run_script("probe.py", "missing.pt", "--sample", "", cwd=tmp_path)
    assert_mistake(outcome, "missing.pt")
    assert outcome.out == ""


@pytest.mark.parametrize("arguments", [["--new_tokens", "-1"], ["--temperature", "-0.5"], ["--top_k", "0"],
                                       ["--new_tok", "3"], ["--new_tokens", "many"]], ids=str)
@pytest.mark.parametrize("path", ["x.pt", "ckpt.pt"])
def test_bad_arguments_are_one_line_and_status_2(path, arguments, checkpoint, run_main, monkeypatch):
    """Before anything is read: also of a checkpoint that is not there."""
    monkeypatch.chdir(checkpoint.parent)
    assert_mistake(run_main(probe, path, "--sample", "def ", *arguments), arguments[0])


def test_a_checkpoint_without_a_tokenizer_is_one_line_and_status_2(checkpoint, run_main):
    saved = torch.load(checkpoint)
    del saved["tokenizer"]
    torch.save(saved, checkpoint)
    assert_mistake(run_main(probe, checkpoint, "--sample", ""), "tokenizer")


def test_a_prompt_with_tokens_that_the_model_does_not_have_is_one_line_and_status_2(tmp_path, run_main):
    torch.save(checkpoint_of(make_model(torch.float32, **BYTES | dict(vocab_size=90))), tmp_path / "ckpt.pt")
    assert_mistake(run_main(probe, tmp_path / "ckpt.pt", "--sample", "def "), "vocab_size=90")
