"""Checkpoints, as data.py writes and reads them: what is saved comes back, what is no checkpoint is refused by name.

    python -m pytest -q tests/test_checkpoints.py
"""
from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, checkpoint_of, make_model, make_tokens

import data as D
from model import UserError

DENSE = dict(vocab_size=61, block_size=12, n_layer=3, n_embd=32, ffn_hidden=40)


@pytest.mark.parametrize("extra", [dict(), dict(tie_embeddings=True), dict(n_experts=5, expert_hidden=16, norm="peri")],
                         ids=["untied", "tied", "moe"])
def test_a_model_comes_back_from_its_checkpoint(extra, tmp_path):
    model, idx = make_model(torch.float32, **DENSE | extra), make_tokens(2, 12, 61)
    saved = checkpoint_of(model, step=7)
    saved["settings"] |= {"learning_rate": 1e-3, "batch_tokens": 4096}       # of train.py: not the model's business
    torch.save(saved, tmp_path / "ckpt.pt")
    again, checkpoint = D.load_model(tmp_path / "ckpt.pt")
    assert torch.equal(model(idx)[0], again(idx)[0])
    assert checkpoint["step"] == 7 and not again.training
    assert again.config == model.config
    assert (again.head.weight is again.embed.weight) == bool(extra.get("tie_embeddings"))
    again(idx, idx)[1].backward()                                            # a probe may want gradients
    assert all(p.grad is not None for p in again.parameters())


def test_a_checkpoint_appears_by_rename_and_a_failed_one_leaves_the_old_intact(tmp_path, monkeypatch):
    model = make_model(torch.float32, **DENSE)
    path = tmp_path / "new" / "ckpt.pt"
    D.save_checkpoint(path, checkpoint_of(model, step=1))
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"] and D.load_checkpoint(path)["step"] == 1

    def full_disk(saved, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        D.save_checkpoint(path, checkpoint_of(model, step=2))
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"] and D.load_checkpoint(path)["step"] == 1


def test_the_checkpoints_before_the_last_stay_as_many_as_asked_for(tmp_path):
    for step in range(1, 6):
        D.save_checkpoint(tmp_path / "ckpt.pt", {"step": step}, keep=3)
        want = {name: step - k for k, name in enumerate(("ckpt.pt", "ckpt.1.pt", "ckpt.2.pt")) if step > k}
        assert {p.name: torch.load(p)["step"] for p in tmp_path.iterdir()} == want


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def whole() -> dict:
    return checkpoint_of(make_model(torch.float32, **DENSE))


def with_settings(**changes) -> dict:
    saved = whole()
    return saved | {"settings": saved["settings"] | changes}


def with_weights(**changes) -> dict:
    saved = whole()
    return saved | {"model": saved["model"] | {name.replace("__", "."): w for name, w in changes.items()}}


NOT_ALL = "lacks model, settings, tokenizer"
MISFIT = "weights and settings disagree"
REFUSED = {                                          # what the file holds, and what is said of it
    "list": (lambda: [1, 2, 3], NOT_ALL),
    "no settings": (lambda: {"model": {}, "tokenizer": "bytes"}, NOT_ALL),
    "no model": (lambda: {"settings": {}, "tokenizer": "bytes"}, NOT_ALL),
    "no tokenizer": (lambda: {name: value for name, value in whole().items() if name != "tokenizer"}, NOT_ALL),
    "model no dict": (lambda: whole() | {"model": 3}, NOT_ALL),
    "settings no dict": (lambda: whole() | {"settings": 3}, NOT_ALL),
    "tokenizer no name": (lambda: whole() | {"tokenizer": 3}, NOT_ALL),
    "no weights": (lambda: whole() | {"model": {}}, f"{MISFIT}: blocks.0.attn.proj.weight is missing"),
    "no vocabulary": (lambda: whole() | {"settings": {}}, "vocab_size=0"),
    "text for a number": (lambda: with_settings(n_head="4"), "n_head='4' is no int"),
    "number for a text": (lambda: with_settings(norm=3), "norm=3 is no str"),
    "fraction of a layer": (lambda: with_settings(n_layer=2.5), "n_layer=2.5 is no int"),
    "impossible": (lambda: with_settings(n_head=3), "n_embd=32 is not a multiple of n_head=3"),
    "no such norm": (lambda: with_settings(norm="post"), "norm='post' is none of pre/lns/peri"),
    "other width": (lambda: with_settings(n_embd=64),
                    rf"{MISFIT}: blocks.0.attn.proj.weight is \(32, 32\), not \(64, 64\)"),
    "other shape": (lambda: with_weights(embed__weight=torch.zeros(2, 2)),
                    rf"{MISFIT}: embed.weight is \(2, 2\), not \(61, 32\)"),
    "no tensor": (lambda: with_weights(norm__weight=[1.0] * 32), f"{MISFIT}: norm.weight is missing"),
    "one weight more": (lambda: with_weights(extra__weight=torch.zeros(3)),
                        f"{MISFIT}: the model has no extra.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_checkpoint_is_refused_with_the_reason(name, tmp_path):
    content, message = REFUSED[name]
    torch.save(content(), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message) as error:
        D.load_model(tmp_path / "ckpt.pt")
    assert "\n" not in str(error.value)
    assert "ckpt.pt" in str(error.value)


def test_a_missing_checkpoint_is_a_user_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="missing.pt"):
        D.load_model(tmp_path / "missing.pt")


def test_a_truncated_checkpoint_is_a_user_error_wherever_it_ends(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(whole(), path)
    content = path.read_bytes()
    for size in (0, 1, 10, 1000, len(content) // 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="ckpt.pt"):
            D.load_model(path)


def test_text_that_is_no_checkpoint_is_a_user_error(tmp_path):
    (tmp_path / "ckpt.pt").write_text("not a checkpoint\n" * 100)
    with pytest.raises(UserError, match="ckpt.pt"):
        D.load_model(tmp_path / "ckpt.pt")


class RunsCode:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path):
    path, victim = tmp_path / "ckpt.pt", tmp_path / "victim"
    torch.save(whole() | {"model": RunsCode(victim)}, path)
    with pytest.raises(UserError, match="ckpt.pt"):
        D.load_model(path)
    path.write_bytes(pickle.dumps(RunsCode(victim)))
    with pytest.raises(UserError, match="ckpt.pt"):
        D.load_model(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(RunsCode(victim)))
    assert victim.exists(), "the code would have run: the test can fail"


# ---------------------------------------------------------------------------------------------------------------------
# older checkpoints


def test_a_checkpoint_written_when_there_were_more_settings_still_computes_the_same():
    """It stores qkv_bias, qk_norm, rope_scaling, shared_gate and head_dim, at what the model has without them."""
    saved = torch.load(GOLDEN / "older_checkpoint.pt", weights_only=True)
    assert {"qkv_bias", "qk_norm", "rope_scaling", "shared_gate", "head_dim"} <= saved["settings"].keys()
    model, _ = D.load_model(GOLDEN / "older_checkpoint.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(saved["idx"])[0][:, -1], saved["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, value", [("qkv_bias", True), ("qk_norm", "head"), ("head_dim", 12),
                                         ("rope_scaling", "llama3:8,1,4,64"), ("shared_gate", True)])
def test_a_checkpoint_that_sets_what_model_py_no_longer_has_is_refused_by_name(name, value, tmp_path):
    saved = torch.load(GOLDEN / "older_checkpoint.pt", weights_only=True)
    saved["settings"][name] = value
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"{name}={value!r}"):
        D.load_model(tmp_path / "ckpt.pt")
