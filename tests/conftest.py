"""The fixtures that tests share. The scripts are modules in the root folder, not a package."""
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("helpers")
from helpers import SHARED, Outcome  # noqa: E402

import data  # noqa: E402
from model import UserError  # noqa: E402

# `pytest &` in a script ignores SIGINT, and `nohup pytest` ignores SIGHUP. Child processes would
# inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)      # matrices are small: two threads can take ten times as long


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of 40 documents, about 20,000 bytes, which a tiny model learns quickly."""
    texts, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(20)]
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(" ".join(draw.choices(words, k=110)) + "\n")
    return data.prepare(str(texts), tmp_path_factory.mktemp("corpus") / "words", "bytes", val_fraction=0.1)


@pytest.fixture
def gpt2(monkeypatch):
    """The gpt2 encoding, from a cache on disk: TIKTOKEN_CACHE_DIR, or the one beside the repository."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not (SHARED / "tiktoken_cache").is_dir():
            pytest.skip("gpt2 needs a download: set TIKTOKEN_CACHE_DIR to a folder that holds it")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    data.get_tokenizer.cache_clear()
    try:
        return data.get_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(str(e))


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(module, *args) runs a script's main in this process, which saves seconds."""
    def call(module, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, args)])
        with pytest.raises(SystemExit) as e:
            data.run(module.main)
        return Outcome(e.value.code, *capsys.readouterr())
    return call
