"""data.py: what a source is, which of its files are read and how, and what is said of the others.

    python -m pytest -q tests/test_sources.py
"""
from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import os
import random
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_mistake, checkpoint_of, make_model, run_script

import data as D
from data import Corpus, prepare
from model import UserError

WORDS = "naïve café 東京 😀"
ROWS = [f"row {i} {WORDS}" for i in range(4)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(source: Path, **options) -> list[str]:
    return list(D.read_source(D.find_source(str(source), **options)))


def tables():
    pytest.importorskip("datasets")
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# every kind of file


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A file of rows, of the kind that its name says."""
    pa, pq = tables()
    kind = path.name.lower().partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        write_csv(path, rows)
    elif kind == "csv.gz":
        write_csv(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "jsonl": bytes}
        if kind.endswith("zst"):
            pack["zst"] = pytest.importorskip("zstandard").compress
        path.write_bytes(pack[kind.rpartition(".")[2]](lines(rows)))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.csv", "a.csv.gz", "a.json",
                                  "a.json.gz", "a.jsonl.xz", "a.json.bz2", "a.jsonl.zst", "A.JSONL", "A.JSON.GZ",
                                  "A.PARQUET", "A.CSV", "a[1]*?.parquet", "a[1]*?.json"])
@pytest.mark.parametrize("field", ["text", "content", "story"])
def test_every_kind_of_rows_gives_its_texts_in_order(name, field, tmp_path):
    path = write_rows(tmp_path / name, [{"id": i, field: text} for i, text in enumerate(ROWS)])
    assert read(path, field="story" if field == "story" else None) == ROWS
    assert read(tmp_path, field="story" if field == "story" else None) == ROWS, "and in a folder as well"


def test_the_field_text_goes_before_content(tmp_path):
    write(tmp_path / "a.jsonl", lines([{"content": "c", "text": "t"}, {"content": "only"}]))
    assert read(tmp_path) == ["t", "only"]
    assert read(tmp_path, field="content") == ["c", "only"]


def test_dolmas_rows_whose_other_fields_change_from_line_to_line_are_read(tmp_path):
    """Beyond the first 10 MB, from which a schema would be inferred."""
    tables()
    rows = [{"id": i, "text": f"{i}" + "x" * 900, "metadata": {"a": i} if i < 12000 else {"b": [i]},
             **({"new": 1} if i > 12500 else {})} for i in range(13000)]
    for name in ("a.json.gz", "b.json"):
        write(tmp_path / name, gzip.compress(lines(rows), 1) if name.endswith("gz") else lines(rows))
        assert read(tmp_path / name) == [row["text"] for row in rows]


@pytest.mark.parametrize("value", ["007", "1.50", "NA", "null", "nan", "", "True", "2020-01-01", "a,\nb\r\n\"c\""])
def test_what_looks_like_a_number_or_nothing_in_a_csv_is_its_text(value, tmp_path):
    tables()
    write_csv(tmp_path / "a.csv", [{"n": 1, "text": value}, {"n": 2, "text": value}])
    assert read(tmp_path) == [value, value]


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.xz"])
def test_half_a_surrogate_pair_in_packed_json_is_a_replacement_character(name, tmp_path):
    tables()
    write(tmp_path / name, (gzip.compress if name.endswith("gz") else lzma.compress)(b'{"text": "a\\ud83d"}\n'))
    assert read(tmp_path) == ["a\ufffd"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.jsonl", "a.json", "a.json.gz"])
def test_a_missing_field_is_told_with_those_that_are_there(name, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / name, [{"id": 1, "body": "b"}, {"id": 2, "body": "c"}])
    for field in ([], ["--field", "story"]):
        outcome = run_main(D, path, "--tokenizer", "bytes", *field)
        assert_mistake(outcome, name, "id, body", "--field", *(field or ["text", "content"])[-1:])
        assert "run it again" not in outcome.err and "resumes" not in outcome.err
    status, out, err = run_main(D, path, "--tokenizer", "bytes", "--field", "body")
    assert status == 0 and "2 documents" in out, err


def test_what_probe_cannot_be_told_it_says_how_to_prepare(tmp_path, run_main):
    import probe
    D.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(make_model(torch.float32, vocab_size=320)))
    write(tmp_path / "a.jsonl", lines([{"story": "once"}])), write(tmp_path / "b.txt", b"caf\xe9")
    for name, option in (("a.jsonl", "--field FIELD"), ("b.txt", "--encoding ENCODING")):
        outcome = run_main(probe, tmp_path / "ckpt.pt", "--data", tmp_path / name)
        assert_mistake(outcome, name, f"in `python data.py NAME {option}`")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("value, kind", [([1, 2], "list"), ({"a": 1}, "dict"), (5, "int"), (b"x", "bytes")])
def test_a_column_that_is_no_text_is_named_with_what_it_holds(name, value, kind, tmp_path):
    if kind == "bytes" and ".json" in name:
        pytest.skip("JSON has none")
    write_rows(tmp_path / name, [{"text": value}, {"text": value}])
    with pytest.raises(UserError, match=f"{name}:1: the field text holds {kind}.*--field"):
        read(tmp_path)


def test_a_part_without_rows_is_nothing(tmp_path):
    pa, pq = tables()
    for i, schema in enumerate(({"text": pa.string()}, {"text": pa.string(), "x": pa.int64()})):
        pq.write_table(pa.table({name: pa.array([], kind) for name, kind in schema.items()}), tmp_path / f"{i}.parquet")
    write_rows(tmp_path / "2.parquet", [{"text": "a"}, {"text": "b"}])
    write(tmp_path / "3.json.gz", gzip.compress(b"")), write(tmp_path / "4.jsonl", b""), write(tmp_path / "5.txt", b"")
    write(tmp_path / "6.csv", b"text,n\n")
    assert read(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name, content", [("a.parquet", b""), ("a.csv", b'text\n"a'), ("a.json", b'{"text": '),
                                           ("a.json.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:30]),
                                           ("a.json.gz", b"no gzip"), ("a.jsonl.xz", b"no xz"), ("a.arrow", b"none")])
def test_a_damaged_file_is_one_line_and_never_to_be_tried_again(name, content, tmp_path, run_main):
    tables()
    path = write(tmp_path / name, content)
    outcome = run_main(D, path, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert_mistake(outcome, name)
    assert "resumes" not in outcome.err and "run it again" not in outcome.err


def test_a_file_on_disk_is_read_without_a_word_to_any_server(tmp_path, monkeypatch):
    tables()
    import socket
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **options: pytest.fail(f"asked {host}"))
    for name in ("a.parquet", "b.csv", "c.json", "d.json.gz"):
        write_rows(tmp_path / name, [{"text": name}])
    assert read(tmp_path) == ["a.parquet", "b.csv", "c.json", "d.json.gz"]


def test_the_package_datasets_adds_no_lines_of_its_own(tmp_path):
    """In a process of its own, since its handler keeps the stderr that it began with."""
    tables()
    assert_mistake(run_script("data.py", write(tmp_path / "a.parquet", b""), "--tokenizer", "bytes"), "a.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# encodings


ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-32": b"", "utf-16-be": b"\xfe\xff",
             "utf-32-be": b"\0\0\xfe\xff"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_with_a_byte_order_mark_is_read_as_what_it_is(encoding, tmp_path):
    text = f"first {WORDS}\r\n\ttab \ufffd\n" * 3000
    write(tmp_path / "a.txt", ENCODINGS[encoding] + text.encode(encoding))
    write(tmp_path / "b.jsonl", ENCODINGS[encoding] + (json.dumps({"text": "b " + WORDS}) + "\n").encode(encoding))
    rows = ENCODINGS[encoding] + (json.dumps({"text": "c " + WORDS}, ensure_ascii=False) + "\n").encode(encoding)
    write(tmp_path / "c.jsonl.gz", gzip.compress(rows))
    got = read(tmp_path)
    assert got[-2:] == ["b " + WORDS, "c " + WORDS]
    assert "".join(got[:-2]) == text, "the mark is no token"
    if encoding != "utf-8":
        assert read(tmp_path, encoding="cp1252") == got, "and goes before what is asked for"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_csv_or_json_with_a_byte_order_mark_is_read_too(encoding, tmp_path):
    tables()
    write(tmp_path / "a.csv", f"text,n\n{WORDS},1\n".encode(encoding))
    write(tmp_path / "b.json", (json.dumps({"text": "b"}) + "\n").encode(encoding))
    assert read(tmp_path) == [WORDS, "b"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_zeros_at_the_start_are_not_guessed_at(encoding, tmp_path):
    path = write(tmp_path / "a.txt", "English text\n".encode(encoding))
    with pytest.raises(UserError, match=f"a.txt begins with zeros, as {encoding} .*--encoding utf-8"):
        read(path)
    assert read(path, encoding=encoding) == ["English text\n"]
    for text in ("\0abc", "a\0bc"):
        assert read(write(path, text), encoding="utf-8") == [text]
    assert read(write(path, "abcd\0")) == ["abcd\0"]


def pack(name: str, content: bytes) -> bytes:
    if name.endswith("zst"):
        tables()
        return pytest.importorskip("zstandard").compress(content)
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)(content)


@pytest.mark.parametrize("asked", ["utf-16", "cp1252"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["lines.jsonl", "lines.json", "array.json", "indented.json", "a.csv"])
def test_packed_or_not_a_file_of_rows_is_in_the_encoding_that_it_shows_or_that_is_asked_for(kind, packed, asked,
                                                                                            tmp_path):
    rows = [{"text": "naïve é"}, {"text": "2020-01-01", "more": [1]}, {"text": "007", "more": {"a": 1}}]
    content = {"lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
               "array.json": json.dumps(rows, ensure_ascii=False), "a.csv": "text,n\nnaïve é,1\n2020-01-01,2\n007,\n",
               "indented.json": json.dumps(rows, indent=1, ensure_ascii=False)}
    path = tmp_path / (kind + packed)
    write(path, pack(path.name, content.get(kind, content["lines.jsonl"]).encode(asked)))
    assert read(path, encoding=None if asked == "utf-16" else asked) == ["naïve é", "2020-01-01", "007"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.csv.gz", "a.csv.zst"])
def test_half_of_a_packed_file_is_damaged_and_two_packed_files_in_a_row_are_one(name, tmp_path):
    line, draw = '{"text": "%s"}\n' if "json" in name else "%s\n", random.Random(0)
    parts = ["".join(line % "".join(draw.choices("abcdefgh ", k=99)) for _ in range(2000)).encode() for _ in range(2)]
    parts[0] = (b"" if "json" in name else b"text\n") + parts[0]
    packed = [pack(name, part) for part in parts]
    assert len(read(write(tmp_path / name, packed[0] + packed[1]))) == 4000
    for whole in (packed[0], packed[0] + packed[1]):
        with pytest.raises(UserError, match=f"{name} is damaged .*: get it again"):
            read(write(tmp_path / name, whole[:-2000]))


@pytest.mark.parametrize("table, said", [("id,text\n1,a,b\n", ":2 has 3 fields, the first line names 2"),
                                         ("id,text\n1,a\n\n2\n", ":4 has 1 fields"), ('text\n"a', "is damaged")])
def test_a_row_of_a_csv_that_does_not_fit_its_first_line_is_refused_by_number(table, said, tmp_path):
    with pytest.raises(UserError, match=f"a.csv{'' if said[0] == ':' else ' '}{said}"):
        read(write(tmp_path / "a.csv", table))


def test_long_texts_and_files_of_nothing_are_read(tmp_path):
    for name in ("a.csv", "b.json", "c.jsonl", "d.csv.gz", "e.json.bz2", "f.jsonl.xz"):
        write(tmp_path / name, pack(name, b""))
    write(tmp_path / "long.csv", "text,n\n" + "x" * 300_000 + ",1\n")
    assert read(tmp_path) == ["x" * 300_000]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "koi8-r", "gb18030", "shift_jis", "utf-16-le"])
def test_an_encoding_that_is_asked_for_is_used(encoding, tmp_path):
    text = {"koi8-r": "привет\n", "gb18030": "东京\n", "shift_jis": "東京\n"}.get(encoding, "naïve\n") * 10000
    write(tmp_path / "a.txt", text.encode(encoding))
    write(tmp_path / "b.jsonl", (json.dumps({"text": text[:5]}, ensure_ascii=False) + "\n").encode(encoding))
    got = read(tmp_path, encoding=encoding)
    assert "".join(got[:-1]) == text and got[-1] == text[:5]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.csv.gz", "a.json.bz2"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_a_byte_that_is_not_of_the_encoding_is_refused_with_its_place(name, encoding, tmp_path):
    rng = random.Random(0)
    wrong = {"utf-8": b"\xff", "utf-8-sig": b"\xff", "utf-16": b"\x00\xdc", "gb18030": b"\xff"}[encoding]
    after = "\nmore\n".encode(encoding.replace("utf-16", "utf-16-le").removesuffix("-sig"))
    for place in (2, 2700, 2730, 2731, 4095, 8191, 8192, 8193, *(rng.randrange(30000) for _ in range(8))):
        before = ('{"text": "東京"}\n' * (place // 13 + 1))[:place].encode(encoding)
        path = write(tmp_path / name, before + wrong + after)
        write(path, pack(name, before + wrong + after))
        with pytest.raises(UserError, match=f"{name} is not .*byte {len(before)}, .*--encoding"):
            with D.opened(path, encoding if encoding == "gb18030" else None) as f:
                for _ in f:
                    pass


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.jsonl", "a.csv", "a.json"])
def test_text_that_is_not_utf_8_is_refused_and_leaves_nothing(name, tmp_path, run_main):
    if name.endswith(("csv", "json")):
        tables()
    start = {"a.jsonl": b'{"text": "', "a.json": b'{"text": "', "a.csv": b"text,n\nx,1\n"}.get(name, b"x\n")
    end = {"a.jsonl": b'"}\n', "a.json": b'"}\n', "a.csv": b",2\n"}.get(name, b"\n")
    write(tmp_path / "in" / name, start + "caf".encode() + b"\xe9" + end)
    outcome = run_main(D, tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert_mistake(outcome, name, f"byte {len(start) + 3}", "--encoding")
    assert not (tmp_path / "out").exists()
    assert "".join(read(tmp_path / "in", encoding="cp1252")).replace("x", "").strip() == "café"


@pytest.mark.parametrize("name", ["latin1x", "rot13", "hex", "", "utf-8\0"])
def test_an_encoding_that_is_none_is_refused(name, tmp_path):
    write(tmp_path / "a.txt", "a")
    with pytest.raises(UserError, match="--encoding"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", encoding=name)


@pytest.mark.parametrize("name, options, said", [
    ("a.txt", {"field": "text"}, "--field text: .* has only .txt files"),
    ("a.parquet", {"encoding": "cp1252"}, "--encoding cp1252: .* has only .parquet files"),
    ("python", {"field": "text"}, "--field text: python has only .py"),
    ("python", {"encoding": "utf-8"}, "--encoding utf-8: python"),
    ("fineweb-edu", {"encoding": "utf-8"}, "--encoding utf-8: fineweb-edu")], ids=str)
def test_what_is_given_and_would_not_be_used_is_refused(name, options, said, tmp_path, monkeypatch, tree):
    source = name
    if "." in name:
        source = str(write(tmp_path / name, "a") if name == "a.txt" else write_rows(tmp_path / name, [{"text": "a"}]))
    with pytest.raises(UserError, match=said):
        prepare(source, tmp_path / "out", **options)


def test_verify_refuses_what_it_would_not_use(run_main, tmp_path):
    assert_mistake(run_main(D, tmp_path, "--verify", "--field", "a", "--again"), "--field, --again")


# ---------------------------------------------------------------------------------------------------------------------
# the sources of torch and Python


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small torch and a small Python in the place of the real ones."""
    for name, module in (("torch", torch), ("python", os)):
        write(tmp_path / name / "__init__.py", f"{name} = 1\n")
        write(tmp_path / name / "sub" / "a.py", f"# {name} {WORDS}\n")
        monkeypatch.setattr(module, "__file__", str(tmp_path / name / "__init__.py"))
    write(tmp_path / "python" / "site-packages" / "b.py", "not Python's own\n")
    write(tmp_path / "python" / "bom.py", b"\xef\xbb\xbfbom = 1\n")
    return tmp_path


def test_the_few_sources_that_are_not_utf_8_are_left_out_and_counted(tree, run_main):
    write(tree / "python" / "test" / "koi8.py", "# -*- coding: koi8-r -*- привет\n".encode("koi8-r"))
    want = ["torch = 1\n", f"# torch {WORDS}\n", "python = 1\n", "bom = 1\n", f"# python {WORDS}\n"]
    assert list(D.documents("python")) == want
    status, out, err = run_main(D, "python", "--out", tree / "out")
    assert status == 0 and "5 documents" in out and out.rstrip().endswith("not read: 1 not in UTF-8"), err


def test_a_change_in_the_sources_shows_in_a_digest(tree, monkeypatch):
    monkeypatch.setattr(D, "LISTED_FILES", 3)
    prepare("python", tree / "out")
    assert len(Corpus(tree / "out").meta["request"]["state"]) == 64
    prepare("python", tree / "out")
    write(tree / "python" / "new.py", "new = 1\n")
    with pytest.raises(UserError, match="what python was before it changed.*--again"):
        prepare("python", tree / "out")


# ---------------------------------------------------------------------------------------------------------------------
# which files


def test_what_is_not_read_is_counted_by_suffix_in_the_closing_line(tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.TXT", "c.Md", "sub/d.PY"):
        write(tmp_path / "in" / name, name)
    for name in ("e.rst", "f.RST", "README", "g.tar.gz", ".hidden.txt", ".git/h.txt", "sub/.ipynb_checkpoints/d.py"):
        write(tmp_path / "in" / name, "not read")
    os.symlink("nowhere", tmp_path / "in" / "i.txt")
    assert sorted(read(tmp_path / "in")) == ["a.txt", "b.TXT", "c.Md", "sub/d.PY"]
    for _ in range(2):                                       # and when nothing is left to do
        status, out, err = run_main(D, "in", "--tokenizer", "bytes")
        assert status == 0 and "4 documents" in out, err
        assert out.rstrip().endswith("; not read: 2 .rst, 1 .tar.gz, 1 broken links or pipes, 3 hidden, "
                                     "1 without a suffix")


def test_without_the_package_its_files_are_counted_and_told_how_to_read(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write(tmp_path / "in" / "a.txt", "a"), write(tmp_path / "in" / "b.txt", "b")
    for name in ("d.parquet", "f.jsonl.zst"):
        write(tmp_path / "in" / name, "unread")
    status, out, err = run_main(D, tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert status == 0 and "2 documents" in out, err
    for kind in (".parquet (needs: pip install datasets)", ".jsonl.zst (needs: pip install pyarrow)"):
        assert f"1 {kind}" in out
    assert_mistake(run_main(D, tmp_path / "in" / "d.parquet", "--tokenizer", "bytes", "--out", tmp_path / "o"),
                   "d.parquet", "pip install datasets")


def test_a_json_that_tells_of_the_data_beside_it_is_left_out_and_counted(tmp_path, run_main):
    tables()
    import datasets
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "in"))
    write(tmp_path / "in" / "config.json", '{\n "no": "rows"\n}\n'), write(tmp_path / "in" / "x.json", "// no JSON")
    assert sorted(p.name for p in (tmp_path / "in").iterdir())[1:] == [
        "data-00000-of-00001.arrow", "dataset_info.json", "state.json", "x.json"]
    status, out, err = run_main(D, tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert status == 0 and "3 documents" in out and "not read: 4 .json without text or content" in out, err
    write(tmp_path / "only" / "config.json", '{\n "no": "rows"\n}\n')
    outcome = run_main(D, tmp_path / "only", "--tokenizer", "bytes", "--out", tmp_path / "o")
    assert_mistake(outcome, "config.json", "but no")


def test_a_linked_folder_is_followed_once_and_a_loop_ends(tmp_path):
    for name in ("in/b.txt", "in/deep/a.txt", "elsewhere/c.txt"):
        write(tmp_path / name, name)
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "far")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "far_again")
    os.symlink(tmp_path / "in", tmp_path / "in" / "deep" / "loop")
    assert read(tmp_path / "in") == ["in/b.txt", "in/deep/a.txt", "elsewhere/c.txt"]


def test_what_is_prepared_inside_of_its_source_is_no_part_of_it(tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        write(tmp_path / f"{i}.txt", f"text {i}")
    for more in ([], [], ["--again"]):
        status, out, err = run_main(D, ".", "--out", "prepared", "--tokenizer", "bytes", *more)
        assert status == 0 and "5 documents" in out and "not read" not in out, err
    assert_mistake(run_main(D, "../" + tmp_path.name, "--out", ".", "--tokenizer", "bytes"), "itself", "--out")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")], ids=str)
def test_a_folder_that_cannot_be_read_is_one_line_that_names_it(error, tmp_path, run_main, monkeypatch):
    write(tmp_path / "in" / "a.txt", "a"), write(tmp_path / "in" / "closed" / "b.txt", "b")
    scandir = os.scandir

    def fails(path):
        if Path(path).name == "closed":
            error.filename = str(path)
            raise error
        return scandir(path)
    monkeypatch.setattr(os, "scandir", fails)
    assert_mistake(run_main(D, tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out"), "in/closed",
                   error.strerror)


@pytest.mark.parametrize("arguments", [["x" * 300], ["a.txt", "--out", "y" * 300], ["a.txt", "--out", "b.txt/c"],
                                       ["z" * 300, "--verify"], ["~nobody/x"]], ids=lambda a: a[-1][:9])
def test_a_name_that_cannot_be_is_one_line(arguments, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    assert_mistake(run_main(D, *arguments, *([] if "--verify" in arguments else ["--tokenizer", "bytes"])))


# ---------------------------------------------------------------------------------------------------------------------
# a source that changes


@pytest.fixture
def folder(tmp_path):
    for name in ("a.txt", "b.txt", "c/d.txt"):
        write(tmp_path / "in" / name, f"this is {name}\n")
    prepare(str(tmp_path / "in"), tmp_path / "out")
    return tmp_path / "in"


CHANGES = {
    "added": (lambda f: write(f / "c" / "e.txt", "new"), "1 new .*e.txt"),
    "removed": (lambda f: (f / "b.txt").unlink(), "1 gone .*b.txt"),
    "edited": (lambda f: write(f / "b.txt", "another text"), "1 other .*b.txt"),
    "edited in place to the same length": (lambda f: write(f / "b.txt", "THIS IS b.txt\n"), "1 other .*b.txt"),
    "renamed, which is reordered": (lambda f: (f / "a.txt").rename(f / "z.txt"), "1 new .*z.txt.*1 gone .*a.txt"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_source_that_has_changed_is_told_and_not_called_the_same(how, finished, folder, monkeypatch):
    out = folder.parent / "out"
    if not finished:
        (out / "meta.json").rename(out / "progress.json")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    time.sleep(0.01)                                         # so that a time of the file's last change is another
    change, said = CHANGES[how]
    change(folder)
    with pytest.raises(UserError, match=f"{folder} was before it changed, {said}.*--again"):
        prepare(str(folder), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    prepare(str(folder), out, again=True)
    corpus, files = Corpus(out), sorted(folder.rglob("*.txt"))
    assert corpus.n_tokens("train") + corpus.n_tokens("val") == sum(p.stat().st_size + 1 for p in files)
    corpus.verify()
    prepare(str(folder), out)                                # and from here on it is the same again


def test_however_it_is_spelt_it_is_the_same_source(folder, monkeypatch):
    out = folder.parent / "out"
    before = (out / "meta.json").stat().st_mtime_ns
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("in", "in/", "./in", "../" + folder.parent.name + "/in", str(folder) + "/", "~/in"):
        prepare(name, out)
        prepare(name, "~/out")
    assert (out / "meta.json").stat().st_mtime_ns == before
    assert not (folder.parent / "~").exists()
    assert Corpus("~/out").n_tokens("train") > 0


def test_another_source_for_the_same_folder_is_refused_by_name(folder, tmp_path):
    write(tmp_path / "more" / "in" / "a.txt", "a")
    with pytest.raises(UserError, match=f"source={folder}.*--again"):
        prepare(str(tmp_path / "more" / "in"), tmp_path / "out")


@pytest.mark.parametrize("options", [{"field": "text"}, {"encoding": "cp1252"}], ids=str)
def test_another_field_or_encoding_is_another_corpus(options, tmp_path):
    write(tmp_path / "a.jsonl", lines([{"text": t} for t in ROWS]))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out")
    with pytest.raises(UserError, match="other settings .*None.*--again"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["meta.json", "progress.json"])
def test_a_corpus_of_before_these_rules_is_readable_but_not_gone_on_with(name, folder):
    out = folder.parent / "out"
    meta = json.loads((out / "meta.json").read_text())
    meta["request"] = {"source": str(folder), "tokenizer": "bytes", "val_fraction": 0.05, "max_tokens": "inf"}
    del meta["unread"]
    (out / "meta.json").unlink()
    (out / name).write_text(json.dumps(meta))
    if name == "meta.json":
        Corpus(out).verify()
    with pytest.raises(UserError, match="another version.*--again"):
        prepare(str(folder), out)


def test_again_leaves_alone_what_is_not_the_corpus(folder):
    out = folder.parent / "out"
    mine = [write(out / name, "mine") for name in ("notes.txt", "train.bin", "train_1.bin", "other_00000.bin")]
    write(out / "train_00007.bin", "of an older corpus")
    prepare(str(folder), out, again=True)
    assert {p.name for p in out.iterdir()} == {p.name for p in mine} | {"meta.json", "train_00000.bin", "val_00000.bin"}


# ---------------------------------------------------------------------------------------------------------------------
# refused for good


def test_what_is_refused_late_leaves_nothing_that_a_later_call_would_go_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "SHARD_TOKENS", 500)
    monkeypatch.setattr(D, "BATCH_DOCUMENTS", 4)
    path = write(tmp_path / "a.jsonl", lines([{"text": t} for t in ROWS * 100]) + b"no JSON\n")
    written, write_shards = [], D.write_shards
    monkeypatch.setattr(D, "write_shards", lambda *args: (written.append(1), write_shards(*args)))
    with pytest.raises(UserError, match="a.jsonl:401 is no line of JSON"):
        prepare(str(path), tmp_path / "out")
    assert len(written) > 5 and not (tmp_path / "out").exists()
    path.write_bytes(lines([{"text": t} for t in ROWS * 100]))
    assert Corpus(prepare(str(path), tmp_path / "out")).meta["documents"] == 400


def test_a_corpus_too_small_can_be_tried_again_with_more(tmp_path):
    path = write(tmp_path / "a.jsonl", lines([{"text": "one"}]))
    with pytest.raises(UserError, match="1 documents leave the train split empty, it takes two"):
        prepare(str(path), tmp_path / "out")
    path.write_bytes(lines([{"text": "one"}, {"text": "two"}]))
    assert Corpus(prepare(str(path), tmp_path / "out")).meta["documents"] == 2


def test_the_first_file_of_every_kind_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    tables()
    for i in range(3):
        write(tmp_path / f"a{i}.txt", "text")
    write_rows(tmp_path / "z.csv", [{"name": "a"}])
    monkeypatch.setattr(D, "encode_documents", lambda docs, *args: next(docs) and pytest.fail("too late"))
    with pytest.raises(UserError, match="z.csv"):
        prepare(str(tmp_path), tmp_path.parent / "out")


# ---------------------------------------------------------------------------------------------------------------------
# the split


@pytest.mark.parametrize("fraction", [0.5, 0.4, 0.3, 0.1, 0.05, 0.001])
def test_the_share_of_validation_is_the_one_asked_for(fraction):
    n = 100_000
    chosen = [i for i in range(n) if D.is_validation(i, fraction)]
    sigma = (n * fraction * (1 - fraction)) ** 0.5
    assert abs(len(chosen) - n * fraction) < 4 * sigma
    for period in (2, 3, 5, 20):                             # sources that take turns are in it alike
        for turn in range(period):
            mine = [i for i in chosen if i % period == turn]
            assert abs(len(mine) - len(chosen) / period) < 4 * (len(chosen) / period) ** 0.5 + 1


def test_a_larger_share_has_all_documents_of_a_smaller_one_and_two_are_enough():
    small = {i for i in range(5000) if D.is_validation(i, 0.05)}
    assert small < {i for i in range(5000) if D.is_validation(i, 0.3)}
    for fraction in (1e-9, 0.001, 0.5):
        assert [D.is_validation(i, fraction) for i in range(2)] == [True, False]


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_a_corpus_of_few_documents_has_both_splits(n, fraction, tmp_path):
    for i in range(n):
        write(tmp_path / "in" / f"{i}.txt", f"{i}")
    corpus = Corpus(prepare(str(tmp_path / "in"), tmp_path / "out", val_fraction=fraction))
    assert corpus.n_tokens("train") and corpus.n_tokens("val")
    assert corpus.n_tokens("train") + corpus.n_tokens("val") == 2 * n


def test_a_document_is_in_the_same_split_however_many_follow(tmp_path):
    write(tmp_path / "a.jsonl", lines([{"text": f"{i}"} for i in range(500)]))
    whole = Corpus(prepare(str(tmp_path / "a.jsonl"), tmp_path / "whole", val_fraction=0.2))
    part = Corpus(prepare(str(tmp_path / "a.jsonl"), tmp_path / "part", val_fraction=0.2, max_tokens=500))
    for split in ("train", "val"):
        n = part.n_tokens(split)
        assert n and whole.read(split, 0, n).tolist() == part.read(split, 0, n).tolist()
