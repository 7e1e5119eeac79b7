"""Checkpoints: data.py reads what it saved. It refuses any other file and names the file.

    python -m pytest -q tests/test_checkpoints.py
"""
from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_of, make_model, make_tokens

import data as D
from model import UserError

DENSE = dict(vocab_size=61, block_size=12, n_layer=3, n_embd=32, ffn_hidden=40)


@pytest.mark.parametrize("extra", [dict(), dict(tie_embeddings=True), dict(n_experts=5, expert_hidden=16, norm="peri")],
                         ids=["untied", "tied", "moe"])
def test_a_model_loaded_from_its_checkpoint_is_the_same(extra, tmp_path):
    model, idx = make_model(torch.float32, **DENSE | extra), make_tokens(2, 12, 61)
    saved = checkpoint_of(model, step=7)
    saved["settings"] |= {"learning_rate": 1e-3, "batch_tokens": 4096}       # settings of train.py are ignored
    torch.save(saved, tmp_path / "ckpt.pt")
    again, checkpoint = D.load_model(tmp_path / "ckpt.pt")
    assert torch.equal(model(idx)[0], again(idx)[0])
    assert checkpoint["step"] == 7 and not again.training and again.config == model.config
    assert (again.head.weight is again.embed.weight) == bool(extra.get("tie_embeddings"))
    again(idx, idx)[1].backward()                                            # probe.py takes gradients
    assert all(p.grad is not None for p in again.parameters())


def test_a_checkpoint_appears_by_rename_and_a_failed_save_leaves_the_old_one_intact(tmp_path, monkeypatch):
    path = tmp_path / "new" / "ckpt.pt"
    D.save_checkpoint(path, whole() | {"step": 1})
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"] and D.load_checkpoint(path)["step"] == 1

    def full_disk(saved, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left.*intact"):
        D.save_checkpoint(path, whole() | {"step": 2})
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"] and D.load_checkpoint(path)["step"] == 1


def test_the_number_of_checkpoints_asked_for_is_kept(tmp_path):
    for step in range(1, 6):
        D.save_checkpoint(tmp_path / "ckpt.pt", {"step": step}, keep=3)
        want = {name: step - k for k, name in enumerate(("ckpt.pt", "ckpt.1.pt", "ckpt.2.pt")) if step > k}
        assert {p.name: torch.load(p)["step"] for p in tmp_path.iterdir()} == want


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def whole() -> dict:
    return checkpoint_of(make_model(torch.float32, **DENSE))


def with_weight(**changes) -> dict:
    saved = whole()
    return saved | {"model": saved["model"] | {name.replace("__", "."): w for name, w in changes.items()}}


REFUSED = {                                          # the contents of the file, and the message
    "list": (lambda: [1, 2, 3], "lacks one of model, settings, tokenizer"),
    "no settings": (lambda: {"model": {}, "tokenizer": "bytes"}, "lacks one of model, settings, tokenizer"),
    "no weights": (lambda: whole() | {"model": {}}, "weights and settings disagree: .* is missing"),
    "impossible": (lambda: whole() | {"settings": whole()["settings"] | {"n_head": 3}}, "n_head=3"),
    "other shape": (lambda: with_weight(embed__weight=torch.zeros(2, 2)), r"embed.weight is \(2, 2\), not \(61, 32\)"),
    "one weight more": (lambda: with_weight(extra__weight=torch.zeros(3)), "the model has no extra.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_a_checkpoint_is_refused_with_the_reason(name, tmp_path):
    content, message = REFUSED[name]
    torch.save(content(), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"ckpt.pt.*{message}") as error:
        D.load_model(tmp_path / "ckpt.pt")
    assert "\n" not in str(error.value)


def test_missing_truncated_and_text_files_are_refused_and_named(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="no checkpoint .*ckpt.pt"):
        D.load_model(path)
    torch.save(whole(), path)
    content = path.read_bytes()
    for damaged in (*(content[:n] for n in (0, 1, 1000, len(content) // 2, len(content) - 1)),
                    b"not a checkpoint\n" * 9):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="ckpt.pt is damaged or not a checkpoint"):
            D.load_model(path)


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    torch.save(whole(), path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="cannot open .*ckpt.pt .Permission denied.") as error:
        D.load_checkpoint(path)
    assert "damaged" not in str(error.value)


def test_a_checkpoint_on_a_path_that_torch_cannot_map_is_read(tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/\xff.pt")                         # not UTF-8
    try:
        with open(path, "wb") as f:
            torch.save(whole(), f)
    except OSError:
        pytest.skip("this disk does not allow such names")
    assert D.load_checkpoint(path)["settings"]["n_layer"] == 3


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
    assert victim.exists(), "pickle runs the code, so the test above can fail"
