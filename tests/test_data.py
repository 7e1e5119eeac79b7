"""data.py: what goes in comes out, however it was sharded, interrupted or damaged on the way.

    python -m pytest -q tests/test_data.py
"""
from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PEAK, ROOT, assert_mistake, run_python, run_script

import data as D
from data import Corpus, prepare, train_windows
from model import UserError

TEXT = "naïve café — 東京 😀👩‍💻\r\n\n\ttabs   and spaces \x00\x7f\n<|endoftext|> is text here\n"


@pytest.fixture
def small_shards(monkeypatch):
    """Shards and batches so small that a few kilobytes of text make many of them."""
    monkeypatch.setattr(D, "SHARD_TOKENS", 500)
    monkeypatch.setattr(D, "BATCH_DOCUMENTS", 4)


def texts(n: int, seed: int = 0) -> list[str]:
    """n documents of 0 to 60 characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abc de\nfé😀", k=rng.randrange(61))) for _ in range(n)]


def source(documents: list):
    """A stand-in for data.documents."""
    return lambda name: iter(documents)


def split_of(number: int, val_fraction: float) -> str:
    """The first document is validation, the second training, and then a hash of the number decides."""
    lot = int(hashlib.sha256(str(number).encode()).hexdigest()[:16], 16) / 2**64
    return "val" if number == 0 or number > 1 and lot < val_fraction else "train"


def split_by_hand(documents: list[str], val_fraction: float) -> dict[str, list[int]]:
    """The token streams of both splits: UTF-8 and 256 after each document."""
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
    corpus.verify()
    return corpus


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def test_the_byte_tokenizer_is_utf8_and_one_end_of_text():
    enc = D.get_tokenizer("bytes")
    rng = random.Random(0)
    anything = "".join(chr(c) for c in rng.choices([*range(0xD800), *range(0xE000, 0x110000)], k=3000))
    for text in ("", "a", TEXT, " " * 1000, "\n\r\n" * 50, anything):
        assert enc.encode_ordinary(text) == list(text.encode())
        assert enc.encode_to_numpy(text, disallowed_special=()).tolist() == list(text.encode())
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert (enc.n_vocab, enc.eot_token) == (257, 256)


@pytest.mark.parametrize("name, said", [("cl100k", "did you mean 'cl100k_base'"), ("byte", "did you mean 'bytes'"),
                                        ("qqqq", "'qqqq'.*bytes, .*gpt2")])
def test_an_unknown_tokenizer_is_told_the_closest_name(name, said):
    with pytest.raises(UserError, match=said):
        D.get_tokenizer(name)


@pytest.mark.parametrize("error", ["OSError", "requests.ConnectionError", "ValueError"])
def test_a_tokenizer_that_cannot_be_downloaded_is_one_line_that_names_the_cache(error, monkeypatch):
    kind = {"OSError": OSError, "ValueError": ValueError}.get(error)
    kind = kind or pytest.importorskip("requests").ConnectionError

    def fail(name):
        raise kind("HTTPSConnectionPool: Max retries\nexceeded")
    monkeypatch.setattr(D.tiktoken, "get_encoding", fail)
    D.get_tokenizer.cache_clear()
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as e:
        D.get_tokenizer("gpt2")
    assert "\n" not in str(e.value) and "'gpt2'" in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# documents in


def write_sources(folder: Path) -> list[str]:
    """One file of each kind, and the documents they hold in the order of their names."""
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "sub").mkdir(parents=True)
    rows = [json.dumps({"id": i, "text": f"a{i} {TEXT}"}) + "\n" for i in range(3)]
    (folder / "a.jsonl").write_text("".join(rows) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": f"b{i} é\u2028"}, ensure_ascii=False) + "\n" for i in range(300))
    (folder / "c.md").write_bytes(f"# c\r\n{TEXT}".encode())
    pq.write_table(pa.table({"id": range(700), "text": [f"d{i} 東" for i in range(700)]}), folder / "d.parquet")
    (folder / "e.py").write_bytes(b"e = 1\n")
    (folder / "f.txt").write_bytes(b"")
    (folder / "ignored.rst").write_text("not read")
    (folder / "sub" / "g.txt").write_bytes("g \ufffd may stand in a text".encode())
    return [*(f"a{i} {TEXT}" for i in range(3)), *(f"b{i} é\u2028" for i in range(300)), f"# c\r\n{TEXT}",
            *(f"d{i} 東" for i in range(700)), "e = 1\n", "g \ufffd may stand in a text"]


def test_a_prepared_folder_holds_every_documents_bytes_and_an_end_each_in_order(tmp_path):
    documents = write_sources(tmp_path / "texts")
    folder = prepare(str(tmp_path / "texts"), tmp_path / "out", val_fraction=0.25)
    corpus = assert_holds(folder, split_by_hand(documents, 0.25))
    assert corpus.meta["documents"] == len(documents)
    assert (corpus.tokenizer, corpus.vocab_size) == ("bytes", 257)
    assert (corpus.meta["eot"], corpus.meta["dtype"]) == (256, "uint16")
    assert sorted(contents(folder)) == ["meta.json", "train_00000.bin", "val_00000.bin"], "and nothing else lies there"


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.md", "d.parquet", "e.py"])
def test_a_single_file_is_a_source_too(name, tmp_path):
    documents = write_sources(tmp_path / "texts")
    assert list(D.documents(str(tmp_path / "texts" / name))) == [t for t in documents if t.strip("# ")[0] == name[0]]


def test_a_corpus_in_gpt2_tokens_equals_tiktokens_own(gpt2, tmp_path, small_shards):
    documents = write_sources(tmp_path / "texts")
    corpus = Corpus(prepare(str(tmp_path / "texts"), tmp_path / "out", "gpt2", val_fraction=0.1))
    want: dict[str, list[int]] = {"train": [], "val": []}
    for i, text in enumerate(documents):
        want[split_of(i, 0.1)] += gpt2.encode_ordinary(text) + [50256]
    assert all(stream(corpus, split) == want[split] for split in want)
    both = stream(corpus, "train") + stream(corpus, "val")
    assert both.count(50256) == len(documents), "a text that spells <|endoftext|> does not end its document"
    assert "bigram_entropy" not in corpus.meta, "a table of 50257^2 would not fit"


@pytest.mark.parametrize("n_vocab, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_vocabulary_decides_the_width_of_a_stored_token(n_vocab, dtype, tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    enc = D.tiktoken.Encoding("wide", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={D.EOT: n_vocab - 1})
    monkeypatch.setattr(D, "get_tokenizer", lambda name: enc)
    corpus = Corpus(prepare("x", tmp_path / "out", docs=source(["ab", "cd"])))
    assert corpus.meta["dtype"] == dtype
    assert stream(corpus, "train") == [99, 100, n_vocab - 1], "the largest id survives"


def long_text() -> str:
    """Real English of several hundred pages: blank lines, indented listings, tables; and long runs of whitespace."""
    from pydoc_data.topics import topics
    runs = itertools.cycle(["\n", "\n\n\n\n", " \n" * 7, "\n" + " " * 30 + "\n\t\t\n", "\r\n\r\n", "   "])
    return "".join(text + run for text, run in zip(list(topics.values())[:40], runs))


def pieces(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "long.txt").write_bytes(text.encode())
    return list(D.read_text(tmp_path / "long.txt"))


def test_the_pieces_of_a_long_text_add_up_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "DOCUMENT_CHARS", 2000)
    text = long_text()
    cut = pieces(tmp_path, text)
    assert "".join(cut) == text
    assert len(cut) > 40 and max(map(len, cut)) <= 3 * 2000 and min(map(len, cut[:-1])) >= 2000
    # a file with no newline at all: here the cuts are where they must be
    line = "é" * 10_001
    cut = pieces(tmp_path, line)
    assert "".join(cut) == line and len(cut) >= 3 and max(map(len, cut)) <= 3 * 2000
    # a line that is longer than a document should be but not twice as long stays whole
    cut = pieces(tmp_path, ("word " * 500 + "end\n" + "and another line\n" * 20) * 5)
    assert len(cut) == 6 and all(piece.endswith("\n") for piece in cut)
    # Windows' line ends are no reason to wait for a place that never comes
    assert {len(piece) for piece in pieces(tmp_path, "one line\r\n" * 1000)} == {2000}
    assert pieces(tmp_path, "short\n") == ["short\n"] and pieces(tmp_path, "") == []


@pytest.mark.parametrize("chars", [1000, 2000, 5000])
def test_the_tokens_of_the_pieces_are_the_tokens_of_the_whole(chars, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "DOCUMENT_CHARS", chars)
    # a line that starts with a letter at least every few lines, so that no cut has to be forced
    text = "".join(line for line in long_text().splitlines(True) if line[0].isalnum() or line.isspace())
    cut = pieces(tmp_path, text)
    assert len(cut) > 10 and "".join(cut) == text
    together = [token for piece in cut for token in gpt2.encode_ordinary(piece)]
    assert together == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", b'{"text": "a"}\n{"txt": "a"}\n'), ("x.jsonl", b'{"text": "a"}\n{"text": '),
    ("x.jsonl", b'{"text": "a"}\n["text"]\n'), ("x.jsonl", b'{"text": "a"}\nnull\n'), ("x.jsonl", b"[" * 99999),
    ("x.jsonl", b'{"text": "a"}\n{"text": 5}\n'),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'), ("x.jsonl.gz", b"not gzip"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100)[:40]), ("x.parquet", b"not parquet" * 10)], ids=str)
def test_a_damaged_source_is_a_user_error_that_names_the_file(name, content, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_gzip_file_with_flipped_bits_is_a_user_error(tmp_path):
    rng = random.Random(0)
    lines = "".join(json.dumps({"text": "".join(rng.choices("abcdefgh", k=80))}) + "\n" for _ in range(2000))
    whole = gzip.compress(lines.encode())
    for place in (100, 5000, len(whole) // 2, len(whole) - 5):        # the header of the stream, its data, its checksum
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        damaged[place + 1] ^= 0x5A
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="x.jsonl.gz"):
            list(D.documents(str(tmp_path / "x.jsonl.gz")))


@pytest.mark.parametrize("spelt, read", [
    (r"b\ud83d", "b\ufffd"), (r"\ud83dx", "\ufffdx"), (r"b\ude00c", "b\ufffdc"), (r"\ude00\ud83d", "\ufffd\ufffd"),
    (r"\ud83d\ud83d\ude00", "\ufffd😀"), (r"\ud83d\ude00", "😀")], ids=ascii)
def test_half_of_a_surrogate_pair_becomes_a_replacement_character(spelt, read, tmp_path):
    """JSON can spell one though UTF-8 cannot: it must not end a preparation, nor take its neighbours along."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "SPELT"}\n{"text": "c"}\n'.replace("SPELT", spelt))
    assert list(D.documents(str(tmp_path / "x.jsonl"))) == ["a", read, "c"]
    folder = prepare(str(tmp_path / "x.jsonl"), tmp_path / "out", val_fraction=0.5)
    assert_holds(folder, split_by_hand(["a", read, "c"], 0.5))


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_null_among_the_texts_is_passed_over_and_does_not_end_the_corpus(kind, where, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "BATCH_DOCUMENTS", 2)
    values = [f"{i}" for i in range(6)]
    values[where] = None
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pytest.importorskip("datasets")
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": values}), path)
    else:
        with (gzip.open if kind == "jsonl.gz" else open)(path, "wt") as f:
            f.writelines(json.dumps({"text": v}) + "\n" for v in values)
    folder = prepare(str(path), tmp_path / "out", val_fraction=0.5)
    assert_holds(folder, split_by_hand([v for v in values if v is not None], 0.5))


@pytest.mark.parametrize("name", ["nosuchpath", "an_empty_folder", "x.rst"])
def test_a_source_without_texts_is_a_user_error_that_names_it(name, tmp_path):
    (tmp_path / "an_empty_folder").mkdir()
    (tmp_path / "x.rst").write_text("text\n")
    with pytest.raises(UserError, match=name):
        prepare(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_training_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="train"):
        prepare("one", tmp_path / "out", docs=source(["only one document"]))
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, 1])
def test_a_validation_fraction_outside_its_range_is_refused(fraction, tmp_path):
    with pytest.raises(UserError, match="val_fraction"):
        prepare("x", tmp_path / "out", val_fraction=fraction, docs=source(texts(10)))


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb-Edu's way in, with a file in the place of the network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data set is rows.parquet and whose newest revision is `hub.sha`; and what was asked of it."""
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    load, it = datasets.load_dataset, SimpleNamespace(sha="abc", asked=[], path=tmp_path / "rows.parquet")

    def load_dataset(path, split, streaming, **options):
        it.asked.append((path, options))
        return load("parquet", data_files=str(it.path), split=split, streaming=streaming)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha=it.sha))
    return it


def write_parquet(path: Path, values: list[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"text": values, "score": range(len(values))}), path, row_group_size=7)
    return path


def test_fineweb_edu_is_streamed_into_a_corpus_that_stops_at_a_documents_end(hub, tmp_path, small_shards):
    documents = [f"document {i}: {TEXT}" for i in range(60)]
    write_parquet(hub.path, documents)
    lengths = np.cumsum([len(text.encode()) + 1 for text in documents])
    limit = int(lengths[30]) + 5                                     # in the middle of document 31, which is the last
    folder = prepare("fineweb-edu", tmp_path / "out", val_fraction=0.1, max_tokens=limit)
    assert hub.asked == [("HuggingFaceFW/fineweb-edu", {"name": "sample-100BT", "revision": "abc"})]
    corpus = assert_holds(folder, split_by_hand(documents[:32], 0.1))
    assert limit <= corpus.n_tokens("train") + corpus.n_tokens("val") == lengths[31]


@pytest.mark.parametrize("limit, kept", [(31, 2), (60, 2), (61, 3), (90, 3), (10_000, 20)])
def test_max_tokens_is_reached_by_the_fewest_whole_documents(limit, kept, tmp_path, monkeypatch):
    documents = ["x" * 29] * 20                                      # 30 tokens each with the end
    for batch in (1, 2, 400):
        monkeypatch.setattr(D, "BATCH_DOCUMENTS", batch)
        folder = prepare("x", tmp_path / f"{batch}", val_fraction=0.5, max_tokens=limit, docs=source(documents))
        assert Corpus(folder).meta["documents"] == kept


def test_a_data_set_of_another_revision_is_another_corpus(hub, tmp_path):
    write_parquet(hub.path, ["a", "b", "c"])
    prepare("fineweb-edu", tmp_path / "out")
    prepare("fineweb-edu", tmp_path / "out")
    hub.sha = "def"
    with pytest.raises(UserError, match="fineweb-edu was before it changed.*--again"):
        prepare("fineweb-edu", tmp_path / "out")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach\nthe Hub"), ValueError("no such config")], ids=str)
def test_a_hub_that_cannot_be_reached_is_one_line_and_what_was_read_before_stays(error, hub, tmp_path, monkeypatch,
                                                                                 small_shards):
    documents = texts(300)
    write_parquet(hub.path, documents)
    load = D.load_rows

    def breaks(*args, **options):
        yield from itertools.islice(load(*args, **options), 200)
        with monkeypatch.context() as m:
            m.setattr(sys.modules["datasets"], "load_dataset", lambda *args, **options: (_ for _ in ()).throw(error))
            yield from load(*args, **options)
    with monkeypatch.context() as m:
        m.setattr(D, "load_rows", breaks)
        with pytest.raises(UserError, match="HuggingFaceFW/fineweb-edu.*resumes") as e:
            prepare("fineweb-edu", tmp_path / "out", val_fraction=0.1)
    assert "\n" not in str(e.value)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["documents"] > 100
    assert_holds(prepare("fineweb-edu", tmp_path / "out", val_fraction=0.1), split_by_hand(documents, 0.1))


def test_a_hub_that_does_not_answer_at_all_is_one_line(hub, tmp_path, monkeypatch):
    def fail(name):
        raise RuntimeError("offline\nmode")
    monkeypatch.setattr(sys.modules["huggingface_hub"], "dataset_info", fail)
    with pytest.raises(UserError, match="HuggingFaceFW/fineweb-edu") as e:
        prepare("fineweb-edu", tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# interruption, resumption, memory


class PowerCut(Exception):
    pass


def cut_after(n: int, documents: list[str], error: BaseException):
    def docs(name):
        yield from documents[:n]
        raise error
    return docs


def test_an_interrupted_preparation_goes_on_to_the_very_same_files(tmp_path, small_shards):
    documents = texts(300)
    whole = contents(prepare("x", tmp_path / "whole", val_fraction=0.1, docs=source(documents)))
    assert len(whole) > 10, "many shards"
    covered = 0
    for n in (0, 3, 50, 51, 140, 299):
        with pytest.raises(PowerCut):
            prepare("x", tmp_path / "out", val_fraction=0.1, docs=cut_after(n, documents, PowerCut()))
        assert not (tmp_path / "out" / "meta.json").exists(), "an unfinished corpus has no header"
        with pytest.raises(UserError, match="no prepared corpus"):
            Corpus(tmp_path / "out")
        progress = tmp_path / "out" / "progress.json"
        before, covered = covered, json.loads(progress.read_text())["documents"] if progress.exists() else 0
        assert before <= covered <= n
        documents[:covered] = ["changed, and nobody notices"] * covered          # what is done is not read again
    assert covered > 200
    assert contents(prepare("x", tmp_path / "out", val_fraction=0.1, docs=source(documents))) == whole


def test_interrupting_the_writing_of_a_shard_or_a_header_leaves_a_resumable_folder(tmp_path, small_shards, monkeypatch):
    documents = texts(200)
    whole = contents(prepare("x", tmp_path / "whole", val_fraction=0.1, docs=source(documents)))
    replace, left = os.replace, 0

    def fails(a, b):
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device")
        left -= 1
        replace(a, b)
    monkeypatch.setattr(D.os, "replace", fails)
    for renames in (0, 1, 3, 4, 8):                    # so many happen, and the next does not
        left = renames
        with pytest.raises(UserError, match="No space left.*resumes"):
            prepare("x", tmp_path / "out", val_fraction=0.1, docs=source(documents))
    monkeypatch.setattr(D.os, "replace", replace)
    assert contents(prepare("x", tmp_path / "out", val_fraction=0.1, docs=source(documents))) == whole


def test_a_network_error_in_the_stream_is_a_user_error_and_the_next_call_resumes(tmp_path, small_shards):
    documents = texts(100)
    with pytest.raises(UserError, match="resumes"):
        prepare("x", tmp_path / "out", docs=cut_after(70, documents, ConnectionError("reset by peer")))
    assert_holds(prepare("x", tmp_path / "out", docs=source(documents)), split_by_hand(documents, 0.05))


def test_a_finished_corpus_is_not_prepared_again(tmp_path):
    prepare("x", tmp_path / "out", docs=source(texts(50)))
    before = contents(tmp_path / "out")
    prepare("x", tmp_path / "out", docs=cut_after(0, [], PowerCut()))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", [dict(source="y"), dict(val_fraction=0.2), dict(max_tokens=1e6),
                                   dict(tokenizer="gpt2")], ids=str)
def test_other_settings_for_the_same_folder_are_refused(other, finished, tmp_path, small_shards, request):
    if "tokenizer" in other:
        request.getfixturevalue("gpt2")
    settings = dict(source="x", out=tmp_path / "out")
    if finished:
        prepare(**settings, docs=source(texts(100)))
    else:
        with pytest.raises(PowerCut):
            prepare(**settings, docs=cut_after(90, texts(100), PowerCut()))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="other settings"):
        prepare(**(settings | other), docs=source(texts(100)))
    assert contents(tmp_path / "out") == before


def test_a_damaged_progress_file_is_a_user_error_that_names_its_place(tmp_path, small_shards):
    with pytest.raises(PowerCut):
        prepare("x", tmp_path / "out", docs=cut_after(90, texts(100), PowerCut()))
    progress = tmp_path / "out" / "progress.json"
    for damage in (progress.read_text()[:20], "", "[]", "{}"):
        progress.write_text(damage)
        with pytest.raises(UserError, match=str(tmp_path / "out")):
            prepare("x", tmp_path / "out", docs=source(texts(100)))


def test_preparing_a_file_of_60_megabytes_takes_far_less_memory_than_that(tmp_path):
    """In a process of its own, since a peak cannot be measured twice; the peak before is that of importing torch."""
    with open(tmp_path / "big.txt", "w") as f:
        f.writelines(f"line {i:02} of a large file, which is to be read piece by piece\n" * (1_000_000 // 60)
                     for i in range(60))
    program = (PEAK + "import sys, data\n"
               "data.SHARD_TOKENS, data.BATCH_DOCUMENTS = 1 << 18, 4\n"
               "before = peak()\n"
               "data.prepare(sys.argv[1], sys.argv[2])\n"
               "print(peak() - before)\n")
    done = run_python("-c", program, tmp_path / "big.txt", tmp_path / "out", cwd=ROOT)
    assert done.status == 0, done.err
    assert (tmp_path / "big.txt").stat().st_size > 58e6
    assert Corpus(tmp_path / "out").n_tokens("train") > 55e6
    assert int(done.out) < 30e6


# ---------------------------------------------------------------------------------------------------------------------
# tokens out


@pytest.fixture
def corpus(tmp_path, small_shards) -> Corpus:
    return Corpus(prepare("x", tmp_path / "corpus", val_fraction=0.1, docs=source(texts(400))))


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
    assert everything == whole[:n * T], "no token between the windows is lost or read twice"


def test_a_split_that_is_too_short_for_the_context_is_refused(corpus):
    n = corpus.n_tokens("val")
    assert corpus.n_windows("val", n - 1) == 1
    with pytest.raises(UserError, match=f"val.*block_size={n}"):
        corpus.n_windows("val", n)


def test_every_window_comes_once_per_epoch_in_another_order_each_time():
    n, per_step = 35, 8                      # 35 is no multiple of 8: steps straddle epochs
    flat = np.concatenate([train_windows(1, step, per_step, n) for step in range(35)])
    epochs = flat.reshape(8, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8, "no two epochs have the same order"
    assert not any(epoch == sorted(epoch) for epoch in epochs.tolist())
    others = np.concatenate([train_windows(2, step, per_step, n) for step in range(35)])
    assert (flat != others).mean() > 0.5, "another seed, another order"


def test_a_step_larger_than_an_epoch_takes_each_window_once_before_any_comes_again():
    windows = train_windows(0, 0, 23, 10).tolist()
    assert sorted(windows[:10]) == sorted(windows[10:20]) == list(range(10)) and len(set(windows[20:])) == 3


def test_windows_of_a_step_depend_on_nothing_but_the_arguments():
    forward = [train_windows(7, step, 5, 13) for step in range(30)]
    D.epoch_order.cache_clear()
    for step in random.Random(0).sample(range(30), 30):             # in any order, as after a resumption
        np.random.seed(step)                                         # and whatever the global generators do
        again = train_windows(7, step, 5, 13)
        assert again.shape == (5,) and again.tolist() == forward[step].tolist()
        again[:] = -1                                                # a caller's array is not the cache's


def test_the_global_batch_is_the_same_for_any_number_of_ranks(corpus):
    T, per_step, micro = 16, 24, 2
    n = corpus.n_windows("train", T)
    batches = []
    for world in (1, 2, 3, 4, 12):
        seen = []
        for rank in range(world):                                    # each works out its own share
            mine = train_windows(3, 41, per_step, n).reshape(-1, micro)[rank::world]
            seen += [(*x.tolist(), *y.tolist()) for w in mine for x, y in zip(*corpus.batch("train", w, T))]
        batches.append(sorted(seen))
    assert len(batches[0]) == per_step and all(batch == batches[0] for batch in batches)


def test_a_step_has_as_many_tokens_at_any_context_length(corpus):
    for T in (8, 16, 64, 128):
        windows = train_windows(0, 2, 512 // T, corpus.n_windows("train", T))
        assert corpus.batch("train", windows, T)[0].numel() == 512


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
    meta = Corpus(prepare("x", tmp_path / "out", val_fraction=0.1, docs=source(documents))).meta
    want = brute_force_entropy(split_by_hand(documents, 0.1)["train"])
    assert meta["bigram_entropy"] == pytest.approx(want, rel=1e-12) and 0.5 < want < 3


def test_bigram_entropy_of_simple_chains_is_known(tmp_path):
    """A cycle is certain: 0. Independent draws: that of the draws. Long enough to be counted in several pieces."""
    n = (1 << 22) + 70_000
    independent = np.random.default_rng(0).choice(3, n, p=[0.5, 0.25, 0.25])
    for tokens, want, tolerance in ((np.arange(n) % 3, 0.0, 1e-12), (independent, 1.5 * math.log(2), 2e-3)):
        tokens.astype(np.uint16).tofile(tmp_path / "t.bin")
        meta = {"vocab_size": 3, "dtype": "uint16", "train": {"shards": [{"file": "t.bin", "tokens": n}]}}
        assert D.bigram_entropy(tmp_path, meta) == pytest.approx(want, abs=tolerance)
    once = np.zeros(n, dtype=np.uint16)
    once[1 << 22] = 1                                                # the only 1 sits where the first piece ends
    once.tofile(tmp_path / "t.bin")
    want = -(math.log((n - 3) / (n - 2)) * (n - 3) + math.log(1 / (n - 2))) / (n - 1)
    assert D.bigram_entropy(tmp_path, meta) == pytest.approx(want, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# damage, and the command line


def test_a_missing_corpus_is_a_user_error_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match="nothing_here.*data.py"):
        Corpus(tmp_path / "nothing_here")


def header(**changes) -> str:
    whole = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "train": {"shards": []}, "val": {"shards": []}}
    return json.dumps(whole | changes)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}", header(dtype="float99"), header(train={})])
def test_a_damaged_header_is_a_user_error(text, corpus):
    (corpus.folder / "meta.json").write_text(text)
    with pytest.raises(UserError, match="meta.json"):
        Corpus(corpus.folder)


def test_a_header_cut_short_anywhere_is_a_user_error(corpus):
    whole = (corpus.folder / "meta.json").read_text()
    for n in range(0, len(whole) - 1, 97):
        (corpus.folder / "meta.json").write_text(whole[:n])
        with pytest.raises(UserError, match="meta.json"):
            Corpus(corpus.folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b + b"\0\0",
                                    None], ids=["short", "half", "empty", "long", "missing"])
def test_a_shard_that_is_not_as_long_as_the_header_says_is_refused_by_name(damage, corpus):
    path = corpus.folder / "train_00003.bin"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match="train_00003.bin"):
        Corpus(corpus.folder)


def test_verification_finds_a_single_flipped_bit(corpus):
    corpus.verify()
    for name in ("train_00002.bin", "val_00000.bin"):
        path = corpus.folder / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            Corpus(corpus.folder).verify()
        path.write_bytes(whole)
    Corpus(corpus.folder).verify()


def test_the_commands_of_the_docstring_prepare_and_verify(tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for i in range(30):
        (tmp_path / "my_texts" / f"{i:02}.txt").write_text(f"text {i}\n")
    status, out, err = run_main(D, "my_texts/", "--tokenizer", "bytes")
    assert status == 0 and "30 documents" in out, err
    assert_holds(tmp_path / "data" / "my_texts", split_by_hand([f"text {i}\n" for i in range(30)], 0.05))
    status, out, err = run_main(D, "data/my_texts", "--verify")
    assert status == 0 and "matches" in out, err
    with open("data/my_texts/train_00000.bin", "r+b") as f:
        f.write(b"\xff")
    assert_mistake(run_main(D, "data/my_texts", "--verify"), "train_00000.bin")


@pytest.mark.parametrize("arguments, culprit", [
    (["--verify", "nowhere"], "nowhere"), (["x.txt", "--tokenizer", "byts"], "'bytes'"), ([], "NAME"),
    (["x.txt", "--max_tokens", "many"], "--max_tokens"), (["x.txt", "--max", "5"], "--max"),
    (["x.txt", "--tokenizer", "bytes", "--val_fraction", "0.9"], "val_fraction")], ids=str)
def test_bad_arguments_are_one_line_and_status_2(arguments, culprit, tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("text\n")
    assert_mistake(run_main(D, *arguments), culprit)


def test_a_mistyped_name_exits_with_2_and_one_line(tmp_path):
    outcome = run_script("data.py", "nosuchpath", "--tokenizer", "bytes", cwd=tmp_path)
    assert_mistake(outcome, "nosuchpath")
    assert outcome.out == ""
