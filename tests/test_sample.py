"""`probe.py CKPT --sample PROMPT`. tests/test_model.py tests `generate` itself."""
from __future__ import annotations

import pytest
import torch

import probe
from data import get_tokenizer, load_model
from helpers import ROOT, checkpoint_of, make_model, run_python, run_script
from model import generate

BYTES = dict(vocab_size=320, n_layer=2)                          # the tokenizer "bytes" has only 257 ids


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, **BYTES)), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("prompt", ["def ", "é 東", ""])
def test_sampling_prints_the_prompt_and_the_tokens_of_generate(prompt, checkpoint, run_main):
    model, enc = load_model(checkpoint)[0], get_tokenizer("bytes")
    idx = torch.tensor([[*prompt.encode()] or [256]])                     # an empty prompt becomes an end of text
    drawn = generate(model, idx, 20, 0.6, 7, 257, torch.Generator().manual_seed(3))
    status, out, err = run_main(probe, checkpoint, "--sample", prompt, "--new_tokens", 20, "--temperature", 0.6,
                                "--top_k", 7, "--seed", 3)
    assert status == 0, err
    assert out == enc.decode(drawn[0].tolist()) + "\n"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["ckpt.pt"], "a file was written"


def test_a_character_that_the_terminal_cannot_print_is_replaced(checkpoint):
    outcome = run_script("probe.py", checkpoint, "--sample", "é東", "--new_tokens", 0,
                         env={"PYTHONIOENCODING": "ascii"})
    assert (outcome.status, outcome.out) == (0, "??\n")


def test_operations_that_apple_gpus_lack_run_on_the_cpu():
    """torch reads PYTORCH_ENABLE_MPS_FALLBACK when it is imported, so probe.py must set the variable earlier."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
class Watch:
    def find_spec(self, name, *args):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
sys.meta_path.insert(0, Watch())
import probe"""
    for said, given in (("1", {}), ("0", {"PYTORCH_ENABLE_MPS_FALLBACK": "0"})):
        assert run_python("-c", code, env=given).out.split() == [said]
