"""Corpora: documents in, shards on disk, windows of tokens out.

    python -m pytest -q tests/test_data.py
"""
from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_mistake, checkpoint_of, make_model

import data as D
import train
from data import Corpus, prepare, train_windows
from model import UserError

TEXT = "naïve café — 東京 😀👩‍💻\r\n\n\ttabs   and spaces \x00\x7f\n<|endoftext|> is text here\n"


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards and batches so small that a few kilobytes of text fill many."""
    monkeypatch.setattr(D, "SHARD_TOKENS", 500)
    monkeypatch.setattr(D, "BATCH_DOCUMENTS", 4)


def texts(n: int, seed: int = 0) -> list[str]:
    """n documents of 0 to 60 characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abc de\nfé😀", k=rng.randrange(61))) for _ in range(n)]


def write_rows(path: Path, documents: list) -> str:
    """Write a .jsonl file of these texts. Returns its name."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


def split_of(number: int, val_fraction: float) -> str:
    """Document 0 is for validation, document 1 for training. A hash decides for all others."""
    lot = int(hashlib.sha256(str(number).encode()).hexdigest()[:16], 16) / 2**64
    return "val" if number == 0 or number > 1 and lot < val_fraction else "train"


def split_by_hand(documents: list[str], val_fraction: float) -> dict[str, list[int]]:
    """The tokens of both splits: the UTF-8 bytes of each document, then 256."""
    streams: dict[str, list[int]] = {"train": [], "val": []}
    for i, text in enumerate(documents):
        streams[split_of(i, val_fraction)] += [*text.encode(), 256]
    return streams


def stream(corpus: Corpus, split: str) -> list[int]:
    return corpus.read(split, 0, corpus.n_tokens(split)).tolist()


def assert_holds(folder: Path, streams: dict[str, list[int]]) -> Corpus:
    corpus = Corpus(folder)
    for split in ("train", "val"):
        assert stream(corpus, split) == streams[split], split
    return corpus


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# documents in


def write_sources(folder: Path) -> list[str]:
    """Write files of each kind. Returns their documents, in the order of the file names."""
    (folder / "sub").mkdir(parents=True)
    rows = [json.dumps({"id": i, "text": f"a{i} {TEXT}"}) + "\n" for i in range(3)]
    (folder / "a.jsonl").write_text("".join(rows) + "\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": f"b{i} é\u2028"}, ensure_ascii=False) + "\n" for i in range(300))
    (folder / "c.md").write_bytes(f"# c\r\n{TEXT}".encode("utf-8-sig"))        # with a byte-order mark
    (folder / "e.PY").write_bytes(b"e = 1\n")
    (folder / "f.txt").write_bytes(b"")
    with gzip.open(folder / "g.txt.gz", "wb") as f:
        f.write("g packed é\n".encode())
    (folder / "sub" / "h.txt").write_bytes("h \ufffd may stand in a text".encode())
    (folder / "i.rst").write_text("another kind")
    (folder / "j.txt").write_bytes("not UTF-8: é".encode("latin-1"))
    (folder / ".k.txt").write_text("hidden")
    return [*(f"a{i} {TEXT}" for i in range(3)), *(f"b{i} é\u2028" for i in range(300)), f"# c\r\n{TEXT}",
            "e = 1\n", "g packed é\n", "h \ufffd may stand in a text"]


def test_a_corpus_has_every_document_with_its_end_and_says_what_was_skipped(
        tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = write_sources(tmp_path / "texts")
    done = run_main(D, "texts", "--tokenizer=bytes", "--val_fraction=0.25")
    assert done.status == 0 and done.out.endswith("; skipped: 1 .rst, 1 hidden, 1 not in UTF-8\n")
    corpus = assert_holds(tmp_path / "data/texts", split_by_hand(documents, 0.25))
    assert (corpus.meta["documents"], corpus.vocab_size, corpus.meta["eot"]) == (len(documents), 257, 256)
    assert [*D.documents(str(tmp_path / "texts" / "a.jsonl"))] == documents[:3]     # a file is a source, too


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow", "folder"])
def test_all_other_formats_are_read_through_datasets(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    documents = [f"d{i} 東" for i in range(700)]
    rows = datasets.Dataset.from_dict({"id": [*range(700)], "story": documents})
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    elif name == "a.arrow":
        rows.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    else:
        getattr(rows, f"to_{name[2:]}")(path)
    with pytest.raises(UserError, match="no field text or content.* id, story.*--field"):
        prepare(str(path), tmp_path / "out")
    assert_holds(prepare(str(path), tmp_path / "out", field="story"), split_by_hand(documents, 0.05))


def test_a_data_set_of_the_hub_is_streamed_by_its_name_and_its_configuration(tmp_path, monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"text": "abc"}] * 5)
    for name in ("fineweb-edu", "me/set", "me/set:2024.en"):
        assert [*D.documents(name)] == ["abc"] * 5
    assert [(*a, k["name"]) for a, k in asked] == [
        ("HuggingFaceFW/fineweb-edu", "sample-100BT"), ("me/set", None), ("me/set", "2024.en")]
    for missing in ("my_texts/", "nowhere/my/texts"):
        with pytest.raises(UserError, match="no file or folder"):
            [*D.documents(missing)]
    assert all(k["streaming"] and k["split"] == "train" for _, k in asked)

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="datasets cannot read me/set .*Couldn't reach the Hub"):
        prepare("me/set", tmp_path / "out")


@pytest.mark.parametrize("content, said", [
    ('{"text": 5}', "the field text holds int"), ('{"story": "a"}', "no field text or content; .*story.*--field"),
    ('{"text": "a', r"a\.jsonl:1 is not a line of JSON")])
def test_a_row_without_a_text_is_refused_and_the_file_is_named(content, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=said):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_null_is_skipped_and_counted_and_half_a_surrogate_pair_is_replaced(tmp_path):
    name = write_rows(tmp_path / "a.jsonl", ["a", None, "b \ud83d c", None, "d"])
    folder = prepare(name, tmp_path / "out", val_fraction=0.1)
    corpus = assert_holds(folder, split_by_hand(["a", "b \ufffd c", "d"], 0.1))
    assert corpus.meta["skipped"] == {"rows without text": 2}


def test_the_gpt2_tokens_of_a_corpus_equal_those_of_tiktoken(gpt2, tmp_path, small_shards):
    documents = [TEXT, "", "<|endoftext|>", *texts(60)]
    name = write_rows(tmp_path / "a.jsonl", documents)
    corpus = Corpus(prepare(name, tmp_path / "out", "gpt2", val_fraction=0.2))
    want = {"train": [], "val": []}
    for i, text in enumerate(documents):
        want[split_of(i, 0.2)] += [*gpt2.encode(text, disallowed_special=()), 50256]
    assert {split: stream(corpus, split) for split in want} == want and corpus.vocab_size == 50257


def long_text() -> str:
    """Real English text with blank lines, indented listings and tables, and long runs of whitespace."""
    from pydoc_data.topics import topics
    runs = itertools.cycle(["\n", "\n\n\n\n", " \n" * 7, "\n" + " " * 30 + "\n\t\t\n", "\r\n\r\n", "   "])
    return "".join(text + run for text, run in zip(list(topics.values())[:40], runs))


def pieces(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "long.txt").write_bytes(text.encode())
    return list(D.read_text(tmp_path / "long.txt"))


@pytest.mark.parametrize("chars", [1000, 2000, 5000])
def test_the_tokens_of_the_pieces_are_the_tokens_of_the_whole(chars, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "DOCUMENT_CHARS", chars)
    # Every few lines, a line starts with a letter or digit. So a clean cut is always possible.
    text = "".join(line for line in long_text().splitlines(True) if line[0].isalnum() or line.isspace())
    cut = pieces(tmp_path, text)
    assert len(cut) > 10 and "".join(cut) == text
    together = [token for piece in cut for token in gpt2.encode_ordinary(piece)]
    assert together == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("documents, settings, said", [
    (["", "", ""], {}, "documents are empty"), (["abc"], {}, r"too few documents .1."),
    (["a", ""], {}, "too few"),
    (["a" * 30, "b" * 30], {"max_tokens": 20}, "--max_tokens=20 is reached by the first document"),
    (["a", "b"], {"val_fraction": 0.6}, "val_fraction=0.6"), (["a", "b"], {"max_tokens": 0}, "max_tokens=0"),
])
def test_a_corpus_without_text_in_both_splits_is_refused_and_leaves_nothing(documents, settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        prepare(write_rows(tmp_path / "a.jsonl", documents), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit, kept", [(31, 2), (60, 2), (61, 3), (90, 3), (10_000, 20)])
def test_max_tokens_is_reached_by_the_fewest_whole_documents(limit, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "BATCH_DOCUMENTS", 4)
    name = write_rows(tmp_path / "a.jsonl", ["a" * 29] * 20)                     # 30 tokens each
    assert Corpus(prepare(name, tmp_path / "out", max_tokens=limit)).meta["documents"] == kept


@pytest.mark.parametrize("arguments, culprit", [
    (["nosuchpath"], "nosuchpath"), (["x.rst"], ".txt .md .py .jsonl"), (["latin"], "1 not in UTF-8"),
    (["half.txt.gz"], "half.txt.gz is damaged"),
    (["a.jsonl", "--tokenizer=bytes", "--out=a.jsonl"], "a.jsonl"), (["a.jsonl", "--fields=x"], "--fields"),
    ([], "NAME"),
])
def test_a_mistake_gives_one_line_and_status_2(arguments, culprit, tmp_path, monkeypatch, run_main):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", ["a", "b", "c"])
    (tmp_path / "x.rst").write_text("x")
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:-9])
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/a.txt").write_bytes(b"\xe9")
    assert_mistake(run_main(D, *arguments, "--tokenizer=bytes"), culprit)


# ---------------------------------------------------------------------------------------------------------------------
# interrupted, repeated, changed


class PowerCut(Exception):
    pass


def test_an_interrupted_and_continued_preparation_is_the_same(tmp_path, small_shards, monkeypatch):
    name = write_rows(tmp_path / "a.jsonl", texts(300))
    whole = contents(prepare(name, tmp_path / "whole", val_fraction=0.1))
    assert len(whole) > 10, "many shards"
    read, covered = D.read_source, 0
    for n in (0, 3, 50, 51, 140, 299):
        def cut(found, n=n):
            yield from itertools.islice(read(found), n)
            raise PowerCut()
        monkeypatch.setattr(D, "read_source", cut)
        with pytest.raises(PowerCut):
            prepare(name, tmp_path / "out", val_fraction=0.1)
        with pytest.raises(UserError, match="no prepared corpus"):
            Corpus(tmp_path / "out")                                 # an incomplete corpus has no meta.json
        progress = tmp_path / "out" / "progress.json"
        before, covered = covered, json.loads(progress.read_text("utf-8"))["documents"] if progress.exists() else 0
        assert before <= covered <= n
    assert covered > 200
    monkeypatch.setattr(D, "read_source", read)
    assert contents(prepare(name, tmp_path / "out", val_fraction=0.1)) == whole


def test_a_full_disk_leaves_a_folder_that_can_be_resumed(tmp_path, small_shards, monkeypatch):
    name = write_rows(tmp_path / "a.jsonl", texts(200))
    whole = contents(prepare(name, tmp_path / "whole"))
    replace, left = D.os.replace, 0

    def fails(a, b):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        replace(a, b)
    monkeypatch.setattr(D.os, "replace", fails)
    for left in (0, 1, 3, 8):                                        # this many renames succeed
        with pytest.raises(OSError):
            prepare(name, tmp_path / "out")
    monkeypatch.setattr(D.os, "replace", replace)
    assert contents(prepare(name, tmp_path / "out")) == whole


def test_a_finished_corpus_is_not_prepared_again_and_another_request_is_refused(tmp_path, gpt2):
    name = write_rows(tmp_path / "a.jsonl", texts(50))
    prepare(name, tmp_path / "out")
    before = contents(tmp_path / "out")
    prepare(name, tmp_path / "out")
    other = write_rows(tmp_path / "b.jsonl", texts(50))
    for source, settings, said in [(other, {}, "source"), (name, {"val_fraction": 0.2}, "=0.05, now 0.2"),
                                   (name, {"max_tokens": 1e6}, "max_tokens"),
                                   (name, {"tokenizer": "gpt2"}, "tokenizer"),
                                   (name, {"field": "text"}, "field")]:
        with pytest.raises(UserError, match=f"holds another corpus .*{said}.*choose another --out"):
            prepare(source, tmp_path / "out", **settings)
    write_rows(tmp_path / "a.jsonl", texts(51))
    with pytest.raises(UserError, match=r"bytes=\d+, now \d+"):
        prepare(name, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_checkpoint_with_rope_scaling_which_model_py_no_longer_has_is_refused(tmp_path):
    saved = checkpoint_of(make_model(torch.float32))                 # no weight shows the difference
    torch.save(saved | {"settings": saved["settings"] | {"rope_scaling": "llama3"}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt has rope_scaling"):
        D.load_checkpoint(tmp_path / "ckpt.pt")


def test_the_python_corpus_is_the_one_of_the_recorded_experiments():
    folder = Path(D.__file__).parent / "data/python"
    if not (folder / "meta.json").exists() or torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip("data/python is not prepared, or torch is not 2.13.0")
    assert train.checksum(Corpus(folder)) == 3102562760


# ---------------------------------------------------------------------------------------------------------------------
# tokens out


@pytest.fixture
def corpus(tmp_path, small_shards) -> Corpus:
    return Corpus(prepare(write_rows(tmp_path / "a.jsonl", texts(400)), tmp_path / "corpus", val_fraction=0.1))


def test_reading_across_shards_equals_slicing_the_whole(corpus):
    whole = split_by_hand(texts(400), 0.1)["train"]
    starts = corpus.starts["train"].tolist()
    assert len(starts) > 8 and corpus.n_tokens("train") == len(whole)
    rng = random.Random(0)
    spans = [(s + a, n) for s in starts[:-1] for a in (-1, 0, 1) for n in (1, 2, 500, 1700) if s + a >= 0]
    spans += [(rng.randrange(len(whole)), rng.randrange(1, 3000)) for _ in range(200)] + [(len(whole) - 1, 1)]
    for start, n in spans:
        n = min(n, len(whole) - start)
        got = corpus.read("train", start, n)
        assert got.dtype == np.int64 and got.tolist() == whole[start:start + n], (start, n)


def test_targets_are_the_inputs_shifted_by_one_and_windows_tile_the_split(corpus):
    whole = split_by_hand(texts(400), 0.1)["train"]
    T = 37
    n = corpus.n_windows("train", T)
    assert n == max(i + 1 for i in range(len(whole)) if i * T + T + 1 <= len(whole))       # the last that fits
    windows = [0, 5, 2, n - 1]
    x, y = corpus.batch("train", windows, T)
    assert x.shape == y.shape == (4, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    for row, i in enumerate(windows):
        assert x[row].tolist() == whole[i * T:i * T + T] and y[row].tolist() == whole[i * T + 1:i * T + T + 1]
    everything = corpus.batch("train", range(n), T)[0].flatten().tolist()
    assert everything == whole[:n * T], "each token is in exactly one window"


def test_a_split_that_is_too_short_for_the_context_is_refused(corpus):
    n = corpus.n_tokens("val")
    assert corpus.n_windows("val", n - 1) == 1
    with pytest.raises(UserError, match=f"val.*block_size={n}"):
        corpus.n_windows("val", n)


def test_every_epoch_has_each_window_once_in_a_new_order():
    n, per_step = 35, 8                      # 35 is not a multiple of 8: steps straddle epochs
    flat = np.concatenate([train_windows(1, step, per_step, n) for step in range(35)])
    epochs = flat.reshape(8, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8, "no two epochs have the same order"
    assert not any(epoch == sorted(epoch) for epoch in epochs.tolist())
    others = np.concatenate([train_windows(2, step, per_step, n) for step in range(35)])
    assert (flat != others).mean() > 0.5, "another seed, another order"


def test_a_step_larger_than_an_epoch_takes_every_window_before_it_repeats_one():
    windows = train_windows(0, 0, 23, 10).tolist()                   # two epochs of 10, and 3 windows more
    assert sorted(windows[:10]) == sorted(windows[10:20]) == list(range(10)) and len(set(windows[20:])) == 3


def test_the_windows_of_a_step_depend_on_the_arguments_alone():
    forward = [train_windows(7, step, 5, 13) for step in range(30)]
    D.epoch_order.cache_clear()
    for step in random.Random(0).sample(range(30), 30):              # in another order, as after --resume
        np.random.seed(step)                                         # the global generator has no effect
        again = train_windows(7, step, 5, 13)
        assert again.shape == (5,) and again.tolist() == forward[step].tolist()
        again[:] = -1                                                # the result is not the cached array


def test_the_global_batch_is_the_same_for_any_number_of_ranks(corpus):
    T, per_step, micro = 16, 24, 2
    n = corpus.n_windows("train", T)
    batches = []
    for world in (1, 2, 3, 4, 12):
        seen = []
        for rank in range(world):
            mine = train_windows(3, 41, per_step, n).reshape(-1, micro)[rank::world]
            seen += [(*x.tolist(), *y.tolist()) for w in mine for x, y in zip(*corpus.batch("train", w, T))]
        batches.append(sorted(seen))
    assert len(batches[0]) == per_step and all(batch == batches[0] for batch in batches)


def test_evaluation_windows_are_distinct_and_spread_over_the_whole_split():
    for count, n in ((1, 5), (4, 17), (5, 5), (9, 5), (50, 1000)):
        windows = D.eval_windows(count, n)
        assert len(set(windows.tolist())) == min(count, n) and windows[0] == 0 and windows[-1] < n
        gaps = np.diff([*windows, n])
        assert gaps.max() - gaps.min() <= 1, "evenly"


def brute_force_entropy(tokens: list[int]) -> float:
    """-sum_ab p(a, b) log p(b | a), by a double loop over the vocabulary."""
    pairs, entropy = list(itertools.pairwise(tokens)), 0.0
    for a in set(tokens):
        after = [y for x, y in pairs if x == a]
        for b in set(after):
            entropy -= after.count(b) / len(pairs) * math.log(after.count(b) / len(after))
    return entropy


def test_bigram_entropy_equals_a_double_loop(tmp_path):
    documents = texts(60)
    meta = Corpus(prepare(write_rows(tmp_path / "a.jsonl", documents), tmp_path / "out", val_fraction=0.1)).meta
    want = brute_force_entropy(split_by_hand(documents, 0.1)["train"])
    assert meta["bigram_entropy"] == pytest.approx(want, rel=1e-12) and 0.5 < want < 3


def test_bigram_entropy_of_simple_chains_is_known(tmp_path):
    """It is 0 for a cycle, and the entropy of one draw for independent draws.

    The tokens are counted in several pieces.
    """
    n = (1 << 22) + 70_000
    independent = np.random.default_rng(0).choice(3, n, p=[0.5, 0.25, 0.25])
    for tokens, want, tolerance in ((np.arange(n) % 3, 0.0, 1e-12), (independent, 1.5 * math.log(2), 2e-3)):
        tokens.astype(np.uint16).tofile(tmp_path / "t.bin")
        meta = {"vocab_size": 3, "dtype": "uint16", "train": {"shards": [{"file": "t.bin", "tokens": n}]}}
        assert D.bigram_entropy(tmp_path, meta) == pytest.approx(want, abs=tolerance)
    once = np.zeros(n, dtype=np.uint16)
    once[1 << 22] = 1                            # the only 1, where the first piece ends
    once.tofile(tmp_path / "t.bin")
    want = -(math.log((n - 3) / (n - 2)) * (n - 3) + math.log(1 / (n - 2))) / (n - 1)
    assert D.bigram_entropy(tmp_path, meta) == pytest.approx(want, rel=1e-6)


def test_a_missing_corpus_or_a_truncated_shard_is_refused_and_named(corpus, tmp_path):
    with pytest.raises(UserError, match=f"no prepared corpus at {tmp_path}.*python data.py"):
        Corpus(tmp_path)
    shard = corpus.folder / "train_00001.bin"
    for content in (shard.read_bytes()[:-2], b""):
        shard.write_bytes(content)
        with pytest.raises(UserError, match="train_00001.bin does not have the .* tokens"):
            Corpus(corpus.folder)


@pytest.mark.parametrize("fraction", [0.5, 0.4, 0.3, 0.1, 0.05, 0.001])
def test_validation_gets_the_fraction_of_documents_asked_for(fraction):
    n = 100_000
    chosen = [i for i in range(n) if D.is_validation(i, fraction)]
    sigma = (n * fraction * (1 - fraction)) ** 0.5
    assert abs(len(chosen) - n * fraction) < 4 * sigma
    for period in (2, 3, 5, 20):                             # alternating sources get equal shares
        for turn in range(period):
            mine = [i for i in chosen if i % period == turn]
            assert abs(len(mine) - len(chosen) / period) < 4 * (len(chosen) / period) ** 0.5 + 1


def test_a_larger_fraction_includes_the_documents_of_a_smaller_one_and_two_documents_are_enough():
    small = {i for i in range(5000) if D.is_validation(i, 0.05)}
    assert small < {i for i in range(5000) if D.is_validation(i, 0.3)}
    for fraction in (1e-9, 0.001, 0.5):
        assert [D.is_validation(i, fraction) for i in range(2)] == [True, False]
