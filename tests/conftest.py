"""The scripts are modules in the repository's root, not a package: tests import them from there."""
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

torch.set_num_threads(1)      # a second one only gets in the way of matrices this small, tenfold on a busy machine


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of 40 documents of words, about 20,000 byte tokens: something a tiny model learns quickly."""
    texts, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(20)]
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(" ".join(draw.choices(words, k=110)) + "\n")
    return data.prepare(str(texts), tmp_path_factory.mktemp("corpus") / "words", "bytes", val_fraction=0.1)
