"""All that lies on disk: corpora, tokenizers, checkpoints, and models of transformers.

    python data.py python                         # the sources of torch and Python, in bytes
    python data.py my_texts/ --tokenizer gpt2     # .txt .md .py .jsonl .jsonl.gz: a file or folder
    python data.py my_rows/ --field story         # .csv .json .json.gz .jsonl.zst .parquet .arrow
    python data.py fineweb-edu --max_tokens 10.5e9  # the paper's, streamed
    python data.py data/python --verify           # read it all again and compare the checksums

.parquet, .arrow and fineweb-edu need: pip install datasets. .zst needs pyarrow, which it brings.
A prepared corpus is a folder: meta.json and the token files that it lists, train_00000.bin, ...,
val_00000.bin, ... The same command goes on where it was interrupted, as long as the source is the
same; --again prepares anew. Batches are a pure function of (seed, step), so that a run can go on
exactly where it was.
"""
from __future__ import annotations

import argparse
import bz2
import contextlib
import csv
import errno
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model import GPT, Detail, ModelConfig, UserError, check

EOT = "<|endoftext|>"
TEXTS = (".txt", ".md", ".py")                               # these files are read as they are,
ROWS = (".jsonl", ".json", ".csv")                           # these row by row, also packed,
LOADERS = {".parquet": "parquet", ".arrow": "arrow"}         # and these by the package datasets
FINEWEB = "HuggingFaceFW/fineweb-edu"
TEXT_FIELDS = ("text", "content")        # where the text of a row is looked for without --field
LISTED_FILES = 1000          # of so many files meta.json lists sizes and times, of more a digest
RULES = 2                    # of reading and splitting: by others the same files are another corpus
DOCUMENT_CHARS = 1 << 16     # a longer text file becomes several documents: one is enough to split
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; an interrupted preparation has to do so much again
BATCH_DOCUMENTS = 256        # handed to the encoder's threads at a time
KINDS = {"bytes": (257, 256, "uint16"), "gpt2": (50257, 50256, "uint16")}   # vocabulary, EOT, dtype
# Two tokenizers with one vocabulary that encode this alike are taken for the same.
SAMPLE = "def f(x):\n\treturn x ** 2  # It's 1234.5, naïve  学习 🙂\n\n" + EOT

# ---- reading: a prepared corpus ------------------------------------------------------------------
class Corpus:
    """A prepared corpus. Tokens stay on disk; windows of T + 1 tokens are read as they are asked
    for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.expanduser(folder))
        header = self.folder / "meta.json"
        check(os.path.isfile(header), f"no prepared corpus at {folder}: "
                                      f"make one with `python data.py NAME --out {folder}`")
        self.arrays: dict[str, list[np.ndarray]] = {}        # of each split, a memory map per shard
        self.starts: dict[str, np.ndarray] = {}              # and where each begins, and the end
        try:
            self.meta = json.loads(header.read_text())
            self.tokenizer = tokenizer_beside(header, str(self.meta["tokenizer"]))
            self.vocab_size = int(self.meta["vocab_size"])
            kind = self.vocab_size, self.meta["eot"], self.meta["dtype"]
            check(kind == KINDS.get(self.tokenizer, kind),
                  f"{header}: vocab_size={kind[0]}, eot={kind[1]} and dtype={kind[2]} are not "
                  f"those of {self.tokenizer}: prepare the corpus again")
            for split in ("train", "val"):
                self.open_split(split, np.dtype(self.meta["dtype"]))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{header} is damaged ({e}): prepare the corpus again") from e
        except OSError as e:
            raise UserError(f"cannot read {e.filename} ({e.strerror})") from e

    def open_split(self, split: str, dtype: np.dtype) -> None:
        """Map the shards of a split, which must be as long as meta.json says."""
        self.arrays[split] = []
        lengths = [0]
        for shard in self.meta[split]["shards"]:
            path, n = self.folder / shard["file"], shard["tokens"]
            check(os.path.isfile(path) and os.path.getsize(path) == n * dtype.itemsize,
                  f"{path} is not the file of {n:,} tokens that meta.json says: "
                  "prepare the corpus again")
            self.arrays[split].append(np.memmap(path, dtype=dtype, mode="r"))
            lengths.append(n)
        self.starts[split] = np.cumsum(lengths)

    def n_tokens(self, split: str) -> int:
        return int(self.starts[split][-1])

    def n_windows(self, split: str, T: int) -> int:
        """How many windows of T inputs and T targets do not overlap in their inputs."""
        n = (self.n_tokens(split) - 1) // T
        check(n > 0, f"{self.folder}: the {split} split has {self.n_tokens(split)} tokens, "
                     f"too few for block_size={T}")
        return n

    def read(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from position `start` of the split, across shards, as int64."""
        starts = self.starts[split]
        first, last = np.searchsorted(starts, (start, start + n - 1), side="right") - 1
        parts = []
        for i in range(first, last + 1):
            begin = max(start - starts[i], 0)
            parts.append(self.arrays[split][i][begin:start + n - starts[i]])
        return np.concatenate(parts).astype(np.int64)

    def batch(self, split: str, windows: Iterable[int], T: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T), of the given windows; window i starts at token i T."""
        rows = np.stack([self.read(split, int(i) * T, T + 1) for i in windows])
        check(bool(rows.max() < self.vocab_size),
              f"{self.folder}: token {rows.max()} in the {split} split, but vocab_size="
              f"{self.vocab_size} in meta.json: prepare the corpus again")
        tokens = torch.from_numpy(rows)                       # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def verify(self) -> None:
        """Read every shard and compare its checksum."""
        for split, arrays in self.arrays.items():
            for shard, array in zip(self.meta[split]["shards"], arrays):
                file = self.folder / shard["file"]
                check(zlib.crc32(array) == shard["crc32"],
                      f"{file} is damaged (checksum): prepare the corpus again")

@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n), another one in every epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)

def train_windows(seed: int, step: int, per_step: int, n_windows: int) -> np.ndarray:
    """The windows of the global batch of a step, (per_step,), each once per epoch: a pure function
    of its arguments."""
    windows = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, i = divmod(place, n_windows)
        windows.append(epoch_order(seed, epoch, n_windows)[i])
    return np.array(windows)

def eval_windows(count: int, n_windows: int) -> np.ndarray:
    """`count` windows spread evenly over a split, always the same."""
    return np.arange(min(count, n_windows)) * n_windows // min(count, n_windows)

# ---- sources: which files, and the documents in them ---------------------------------------------
class Source(NamedTuple):
    """What a corpus is made of, as `find_source` found it."""
    name: str                    # python, fineweb-edu or an absolute path: A, A/ and ~/A are one
    files: Sequence[Path]        # in the order in which they are read
    state: Any                   # of each file its size and time, of a data set its revision
    unread: dict[str, int]       # how many files are left out, by suffix or reason
    fields: Sequence[str]        # the first of these that a row has is its text
    encoding: str | None         # of text that does not show its own

def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", "fineweb-edu", a file or a
    folder."""
    return read_source(find_source(source))

def find_source(name: str, field: str | None = None, encoding: str | None = None,
                out: Path | None = None) -> Source:
    """Which files a source has; a field or an encoding that none of them has a use for is refused.

    out: the folder that the corpus is written to, which is no part of its source.
    """
    fields = TEXT_FIELDS if field is None else (field,)
    unread: dict[str, int] = Counter()
    check(encoding is None or name not in ("python", "fineweb-edu"),
          f"--encoding {encoding}: {name} is in UTF-8")
    if name == "fineweb-edu":
        return Source(name, (), revision(FINEWEB), unread, fields, None)
    if name == "python":
        files = python_files(unread)
    else:
        name = os.path.abspath(os.path.expanduser(name))
        files = files_to_read(name, out, unread, fields, encoding)
    suffixes = sorted({suffix(path) for path in files})
    check(field is None or not all(kind in TEXTS for kind in suffixes),
          f"--field {field}: {name} has only {' '.join(suffixes)} files, which have no fields")
    check(encoding is None or not all(kind in (".parquet", ".arrow") for kind in suffixes),
          f"--encoding {encoding}: {name} has only {' '.join(suffixes)} files, which need none")
    return Source(name, files, state_of(files), unread, fields, encoding)

def state_of(files: Sequence[Path]) -> dict[str, str] | str:
    """What shows that files have changed: the size and the time of each, or a digest of many."""
    state = {}
    for path in files:
        about = path.stat()
        state[str(path)] = f"{about.st_size} bytes, {about.st_mtime_ns} ns"
    if len(state) <= LISTED_FILES:
        return state
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()

def revision(dataset: str) -> str:
    """The newest commit of a data set on the Hugging Face hub."""
    hub = need("huggingface_hub", f"reading {dataset}")
    try:
        return hub.dataset_info(dataset).sha
    except Exception as e:                                    # its own errors and the network's
        raise ConnectionError(f"no answer about {dataset}: {type(e).__name__}") from e

def python_files(unread: dict[str, int]) -> list[Path]:
    """The sources of torch and Python, but for a few of its tests that are not UTF-8 on purpose."""
    files = []
    for root in (Path(torch.__file__).parent, Path(os.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            if "site-packages" in path.relative_to(root).parts:
                continue
            try:
                path.read_bytes().decode()
                files.append(path)
            except UnicodeDecodeError:
                unread["not in UTF-8"] += 1
    return files

def files_to_read(name: str, out: Path | None, unread: dict[str, int], fields: Sequence[str],
                  encoding: str | None) -> list[Path]:
    """The one file, or those in and under a folder that are read; the others are counted."""
    check(os.path.exists(name), f"no file or folder {name}: NAME is python, fineweb-edu or a path")
    check(out is None or os.path.realpath(out) != os.path.realpath(name),
          f"{name} would be written into itself: choose another folder with --out")
    found = [Path(name)] if os.path.isfile(name) else walk(name, out, unread)
    files, without_text = [], []
    for path in found:
        reason = why_unread(path)
        if reason:
            unread[reason] += 1
        elif suffix(path) == ".json" and not has_text(path, fields, encoding):
            without_text.append(path)
        else:
            files.append(path)
    if not files:
        files = without_text             # reading them says what fields they have
    elif without_text:                   # they tell of the data that they lie beside
        unread[f".json without {' or '.join(fields)}"] = len(without_text)
    check(len(files) > 0, f"nothing to read at {name}{say_unread(unread)}. What is read ends in "
                          f"{' '.join(TEXTS + ROWS + tuple(LOADERS))}; {' '.join(ROWS)} also "
                          f"packed as {' '.join(PACKED)}")
    return files

def walk(folder: str, out: Path | None, unread: dict[str, int]) -> list[Path]:
    """All files in and under a folder that are not hidden, in the order of their names. Links are
    followed; no folder is entered twice, nor the one that is written to."""
    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror}): "
                        "get permission, or take it away") from error
    files: list[Path] = []
    entered = set() if out is None else {os.path.realpath(out)}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(where)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        for name in folders + names:
            if name.startswith("."):
                unread["hidden"] += 1
        # sorted: which of two links to a folder is entered must not depend on the disk's order
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(files)

def suffix(path: Path) -> str:
    """Of a file's name in lower case, with the one that says how it is packed: .txt, .json.gz."""
    found = re.search(r"\.[^.]+(\.(gz|zst|xz|bz2))?\Z", path.name.lower())
    return found[0] if found else "without a suffix"

def why_unread(path: Path) -> str:
    """Why a file is not read, as far as its name tells; "" if it is."""
    kind = suffix(path)
    if not path.is_file():
        return "broken links or pipes"
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    if kind not in TEXTS + tuple(LOADERS) and kind.removesuffix(packing) not in ROWS:
        return kind
    needed = {".zst": ["pyarrow"], ".parquet": ["datasets"], ".arrow": ["datasets"]}
    missing = [package for package in needed.get(path.suffix.lower(), ())
               if importlib.util.find_spec(package) is None]
    return f"{kind} (needs: pip install {' '.join(missing)})" if missing else ""

def say_unread(unread: dict[str, int]) -> str:
    """How many files are left out, for the end of a line."""
    kinds = [f"{count} {kind}" for kind, count in sorted(unread.items())]
    return f"; not read: {', '.join(kinds)}" if kinds else ""

def has_text(path: Path, fields: Sequence[str], encoding: str | None) -> bool:
    """Whether the first row of a file has one of the fields."""
    try:
        _, row = next(read_rows(path, encoding), (0, None))
    except UserError:
        return False
    return isinstance(row, dict) and any(field in row for field in fields)

def read_source(source: Source) -> Iterator[str]:
    """The documents of a source."""
    if source.name == "fineweb-edu":
        rows = load_rows(FINEWEB, FINEWEB, name="sample-100BT", revision=source.state)
        yield from texts(enumerate(rows, 1), source.fields, FINEWEB)
    # what the first file of a kind has wrong is refused now, and not after hours
    for path in {suffix(path): path for path in reversed(source.files)}.values():
        next(read_file(path, source.fields, source.encoding), None)
    for path in source.files:
        yield from read_file(path, source.fields, source.encoding)

def read_file(path: Path, fields: Sequence[str], encoding: str | None) -> Iterator[str]:
    """The documents of a file."""
    if suffix(path) in TEXTS:
        yield from read_text(path, encoding)
    else:
        yield from texts(read_rows(path, encoding), fields, path)

def encoding_of(start: bytes, asked: str | None, path: Path) -> str:
    """That which a BOM shows, else what is asked for, else UTF-8; UserError if a text begins with
    zeros, as UTF-16 does, and nothing is asked for."""
    shown = json.detect_encoding(start)                       # UTF-8 if they show none
    if shown in ("utf-8-sig", "utf-16", "utf-32"):            # there is a BOM
        return shown
    check(asked is not None or shown == "utf-8",
          f"{path} begins with zeros, as {shown} does without a byte-order mark: say what it is "
          f"in `python data.py NAME --encoding {shown}`, or --encoding utf-8")
    return asked or shown

def open_zst(path: Path, mode: str) -> Any:
    """A .zst file, by pyarrow: the package zstandard takes half of one for the whole."""
    return need("pyarrow", f"reading {path}").input_stream(str(path), compression="zstd")

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}

@contextlib.contextmanager
def opened(path: Path, encoding: str | None) -> Iterator[io.TextIOWrapper]:
    """A text file, or the one that is packed in it. What is not in its encoding is refused, as is
    what cannot be unpacked."""
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            raw = io.BufferedReader(file)
            encoding = encoding_of(raw.peek(4)[:4], encoding, path)
            try:
                yield io.TextIOWrapper(raw, encoding, newline="")
            except UnicodeError as e:
                said = str(e)
                if isinstance(e, UnicodeDecodeError):
                    said = e.reason
                    if raw.seekable():                        # e.object ends where raw is read to
                        said = f"byte {raw.tell() - len(e.object) + e.start}, {said}"
                raise UserError(f"{path} is not {encoding} ({said}): convert it, or say what it "
                                "is in `python data.py NAME --encoding ENCODING`") from e
    except Exception as e:                          # every way to pack has errors of its own
        if isinstance(e, (UserError, MemoryError)) or getattr(e, "errno", None):
            raise
        raise UserError(f"{path} is damaged ({e}): get it again, or take it away") from e

def read_text(path: Path, encoding: str | None = None) -> Iterator[str]:
    """A text file as one document, or several if it is long: cut where no token is lost, if such a
    place comes."""
    with opened(path, encoding) as f:
        text = ""
        while line := f.readline(DOCUMENT_CHARS):
            # every tiktoken encoding starts a new piece where a letter follows a newline that
            # follows no whitespace
            clean = line[0].isalnum() and re.search(r"\S\r?\n\Z", text[-3:])
            if len(text) >= DOCUMENT_CHARS and (clean or len(text) >= 2 * DOCUMENT_CHARS):
                yield text
                text = ""
            text += line
        if text:
            yield text

def read_rows(path: Path, encoding: str | None) -> Iterator[tuple[int, Any]]:
    """The numbered rows of a file."""
    kind = suffix(path)
    if kind in LOADERS:
        # parquet's own batch_size is 0 where there are no rows
        options = {"batch_size": 1000} if kind == ".parquet" else {}
        yield from enumerate(load_rows(LOADERS[kind], path, data_files=glob.escape(str(path)),
                                       **options), 1)
        return
    with opened(path, encoding) as f:
        if kind.startswith(".csv"):
            yield from parse_csv(f, path)
        elif kind.startswith(".jsonl"):
            yield from parse_lines(f, path)
        else:
            yield from parse_json(f, path)

def parse_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The numbered rows of lines of CSV, whose first one names the fields."""
    csv.field_size_limit(1 << 30)                             # a text may be long
    rows = csv.reader(lines, strict=True)
    names = next(rows, [])
    for row in filter(None, rows):                            # but for lines without anything
        check(len(row) == len(names), f"{path}:{rows.line_num} has {len(row)} fields, the first "
                                      f"line names {len(names)}: quote or mend it")
        yield rows.line_num, dict(zip(names, row))

def parse_json(f: io.TextIOBase, path: Path) -> Iterator[tuple[int, Any]]:
    """The numbered rows of a file of JSON: one in each line, as Dolma has it, or one array."""
    first = next((line for line in f if line.strip()), "")
    if first.rstrip().endswith("}") and first.lstrip().startswith("{"):
        yield from parse_lines(itertools.chain([first], f), path)
    elif first:
        try:
            rows = json.loads(first + f.read())
        except (json.JSONDecodeError, RecursionError) as e:
            raise UserError(f"{path} is neither an array of JSON nor a row in each line ({e}): "
                            "get it again, or take it away") from e
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)

def parse_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """The numbered values of lines of JSON."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number} is no line of JSON ({e})") from e
        yield number, row

def load_rows(loader: str, where: str | Path, **options: Any) -> Iterator[Any]:
    """The rows of a data set's train split, streamed: nothing but the current ones is held."""
    datasets = need("datasets", f"reading {where}")
    is_file = "data_files" in options
    if is_file:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)      # errors are told once, below
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False    # nor is a server told of every file
    try:
        yield from datasets.load_dataset(loader, split="train", streaming=True, **options)
    except Exception as e:                                  # its own errors, Arrow's, the network's
        said = f"could not read {where} ({type(e).__name__}: {str(e)[:80]!r})"
        check(not is_file, f"{said}: get it again, or take it away")
        raise ConnectionError(said) from e                   # what was read before it stays

def texts(rows: Iterable[tuple[int, Any]], fields: Sequence[str],
          where: str | Path) -> Iterator[str]:
    """The text of every numbered row, which is the first of these fields that it has; a null is
    passed over."""
    for number, row in rows:
        there = row if isinstance(row, dict) else {}
        name = next((field for field in fields if field in there), None)
        if name is None:
            raise UserError(f"{where}:{number} has no field {' or '.join(fields)}, but "
                            f"{', '.join(there) or 'none'}: name one in `python data.py "
                            "NAME --field FIELD`")
        text = row[name]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{where}:{number}: the field {name} holds {type(text).__name__}, no "
                            "text: name another in `python data.py NAME --field FIELD`")
        # JSON may hold half of a surrogate pair, which has no UTF-8: U+FFFD instead
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

# ---- writing: documents in, shards out -----------------------------------------------------------
def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = float("inf"), field: str | None = None, encoding: str | None = None,
            again: bool = False, docs: Callable[[str], Iterator[str]] | None = None) -> Path:
    """Encode a source into token shards under `out`; called again after an interruption it goes on
    where it was.

    Every document ends with EOT; which ones are validation, `is_validation` says. progress.json
    says what the shards cover so far; in the end it is renamed to meta.json: a folder that has that
    is complete. again: put the corpus in the place of another, or of what its source was before.
    docs: yields the documents, in place of the source's own files.
    """
    check(0 < val_fraction <= 0.5 and max_tokens > 0,
          f"val_fraction={val_fraction} must be above 0 and at most 0.5, "
          f"max_tokens={max_tokens} above 0")
    check_encoding(encoding)
    out, enc = Path(os.path.expanduser(out)), get_tokenizer(tokenizer)
    try:
        if docs is None:
            found = find_source(source, field, encoding, out)
            todo = read_source(found)
        else:
            found = Source(source, (), None, {}, TEXT_FIELDS, encoding)
            todo = docs(source)
        request = {"source": found.name, "tokenizer": known_as(enc.name),
                   "val_fraction": val_fraction,
                   "max_tokens": str(max_tokens), "field": field, "encoding": encoding,
                   "rules": RULES, "state": found.state}
        if again:
            discard(out)
        meta = prepared_so_far(out, request)
        if meta is None:
            dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
            meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token,
                    "dtype": dtype, "request": request, "unread": found.unread, "documents": 0,
                    "train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
        if not (out / "meta.json").exists():
            finish(todo, out, meta, enc)
    except OSError as e:
        if e.errno in UNUSABLE:                  # it never will be: see `run`
            raise
        raise UserError(f"preparing {out} failed ({e}): "
                        "with that mended the same command resumes it") from e
    return out

def check_encoding(name: str | None) -> None:
    try:
        "a".encode("utf-8" if name is None else name)
    except (LookupError, ValueError) as e:
        raise UserError(f"--encoding {name}: {e}; utf-16, cp1252 and gb18030 are some") from e

def prepared_so_far(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What meta.json, or progress.json of an interrupted preparation, says; None if there is
    neither."""
    for file in (out / "meta.json", out / "progress.json"):
        if not file.exists():
            continue
        try:
            meta = json.loads(file.read_text())
            other = difference(meta["request"], request)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{file} is not of a corpus, or damaged: choose another --out, or "
                            "`data.py --again` removes it and starts over") from e
        check(not other, f"{out} holds a corpus {other}: choose another --out, or `data.py "
                         "--again` puts the new one in its place")
        return meta
    return None

def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, how what was asked for before is not what is asked for now; "" if it is."""
    if before.get("rules") != now["rules"]:
        return "that another version of data.py prepared, by other rules"
    others = [f"{key}={before[key]}" for key in now if key != "state" and before[key] != now[key]]
    if others:
        return f"prepared with other settings ({', '.join(others)})"
    old, new = before["state"], now["state"]
    if old == new:
        return ""
    said = f"of what {now['source']} was before it changed"
    if isinstance(old, dict) and isinstance(new, dict):       # else a digest of many, or a revision
        changes = {"new": new.keys() - old.keys(), "gone": old.keys() - new.keys(),
                   "other": {path for path in old.keys() & new.keys() if old[path] != new[path]}}
        for how, paths in changes.items():
            if paths:
                said += f", {len(paths)} {how} ({min(paths)})"
    return said

def discard(out: Path) -> None:
    """Remove a corpus, finished or not, and its folder if nothing else is in it."""
    for name in ("meta.json", "progress.json", "progress.json.tmp"):
        (out / name).unlink(missing_ok=True)
    for split in ("train", "val"):
        for shard in out.glob(f"{split}_[0-9][0-9][0-9][0-9][0-9].bin"):
            shard.unlink()
    for tokenizer in out.glob("tokenizer_*/"):
        shutil.rmtree(tokenizer)
    with contextlib.suppress(OSError):
        out.rmdir()

def finish(docs: Iterator[str], out: Path, meta: dict[str, Any], enc: Any) -> None:
    """Encode the documents that meta does not cover yet and write the header. What is refused
    leaves nothing that a later call would go on from."""
    request = meta["request"]
    try:
        encode_documents(itertools.islice(docs, meta["documents"], None), out, meta, enc,
                         request["val_fraction"], float(request["max_tokens"]))
        for split in ("train", "val"):
            check(meta[split]["tokens"] > 0,
                  f"{request['source']}: {meta['documents']} documents leave the {split} split "
                  f"empty, it takes two{say_unread(meta['unread'])}")
    except UserError:
        discard(out)
        raise
    if enc.n_vocab <= 4096:
        meta["bigram_entropy"] = bigram_entropy(out, meta)
    meta["tokenizer"] = copy_tokenizer(enc.name, out)         # so that the corpus stands alone
    write_json(out / "progress.json", meta)
    os.replace(out / "progress.json", out / "meta.json")

def is_validation(number: int, val_fraction: float) -> bool:
    """Whether a document of this number, from 0, is for validation: by a hash of it, so that
    sources that take turns are in both splits. Two documents are always enough for both."""
    if number < 2:
        return number == 0
    digest = hashlib.sha256(str(number).encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64

def encode_documents(docs: Iterator[str], out: Path, meta: dict[str, Any], enc: Any,
                     val_fraction: float, max_tokens: float) -> None:
    """Write documents as shards until there are no more, or max_tokens are reached; meta says what
    is written."""
    pool = ThreadPoolExecutor(os.cpu_count())                # threads help: it releases the GIL
    buffers: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    written = total = meta["train"]["tokens"] + meta["val"]["tokens"]
    done = False
    while not done:
        batch = list(itertools.islice(docs, BATCH_DOCUMENTS))
        for ids in pool.map(enc.encode_ordinary, batch):
            if total >= max_tokens:
                break
            split = "val" if is_validation(meta["documents"], val_fraction) else "train"
            buffers[split].append(np.append(ids, enc.eot_token).astype(meta["dtype"]))
            meta["documents"] += 1
            total += len(ids) + 1
        done = total >= max_tokens or not batch
        if done or total - written >= SHARD_TOKENS:
            write_shards(out, meta, buffers)
            written = total
        if done or sys.stderr.isatty():
            print(f"\r{out}: {meta['documents']:,} documents, {total / 1e6:,.1f}M tokens",
                  end="\n" if done else "", file=sys.stderr, flush=True)

def write_shards(out: Path, meta: dict[str, Any], buffers: dict[str, list[np.ndarray]]) -> None:
    """Empty the buffers into a new file for each split, then say in progress.json that they are
    there."""
    out.mkdir(parents=True, exist_ok=True)
    for split, parts in buffers.items():
        if not parts:
            continue
        tokens = np.concatenate(parts)
        shards = meta[split]["shards"]
        path = out / f"{split}_{len(shards):05d}.bin"
        with open(path, "wb") as f:
            tokens.tofile(f)
            os.fsync(f.fileno())
        shards.append({"file": path.name, "tokens": len(tokens), "crc32": zlib.crc32(tokens)})
        meta[split]["tokens"] += len(tokens)
        parts.clear()
    write_json(out / "progress.json", meta)

def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file by rename: a reader sees the old one or the new one. UserError where the
    disk is full."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_text(json.dumps(value, indent=1))
    except OSError as e:
        if e.filename:                           # it cannot be opened: see `run`
            raise
        tmp.unlink()
        raise UserError(f"cannot write {path} ({e.strerror}): free some space or choose another "
                        "folder; what was there is intact") from e
    os.replace(tmp, path)

def bigram_entropy(folder: Path, meta: dict) -> float:
    """Entropy of a token given the one before it, over the training split, in nats: a model must
    get well under it."""
    V = meta["vocab_size"]
    pairs = np.zeros((V, V), dtype=np.int64)
    for shard in meta["train"]["shards"]:
        tokens = np.memmap(folder / shard["file"], dtype=meta["dtype"], mode="r")
        for start in range(0, len(tokens) - 1, 1 << 22):
            piece = tokens[start:start + (1 << 22) + 1].astype(np.int64)
            pairs += np.bincount(piece[:-1] * V + piece[1:], minlength=V * V).reshape(V, V)
    joint = torch.from_numpy(pairs / pairs.sum())
    entropy_of_pairs = torch.special.entr(joint).sum()
    entropy_of_firsts = torch.special.entr(joint.sum(1)).sum()
    return float(entropy_of_pairs - entropy_of_firsts)

# ---- tokenizers ----------------------------------------------------------------------------------
def encode(tokenizer: str, text: str) -> list[int]:
    """The token ids of a text. A special token that the text spells stays text."""
    return get_tokenizer(tokenizer).encode_ordinary(text)

def decode(tokenizer: str, ids: Sequence[int]) -> str:
    """The text of token ids."""
    return get_tokenizer(tokenizer).decode(list(ids))

def encodings() -> list[str]:
    """The names of the tokenizers that have no files."""
    return ["bytes", *tiktoken.list_encoding_names()]

@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding | HFTokenizer:
    """A tokenizer, with n_vocab and eot_token.

    name: "bytes" (256 bytes and an end of text, offline), a tiktoken encoding such as gpt2, or
    whatever transformers' AutoTokenizer reads: a folder, or an id on the Hugging Face hub.
    """
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name not in encodings():
        return HFTokenizer(name)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:       # no network, or a damaged cache
        raise UserError(f"tiktoken could not fetch {name!r} ({type(e).__name__}): go online once, "
                        "or use --tokenizer bytes") from e

class HFTokenizer:
    """A tokenizer of transformers, with what is used here of tiktoken.Encoding."""

    def __init__(self, name: str):
        path = Path(name)
        check(path.exists() or "/" in name,
              f"no tokenizer {name!r}: give bytes, one of tiktoken's "
              f"({', '.join(encodings()[1:])}), a folder, or OWNER/NAME of the Hugging Face hub")
        transformers = need("transformers", f"the tokenizer {name}")
        if path.name == "tokenizer.json":                     # AutoTokenizer takes the folder
            path = path.parent
        where, options = hub_name(path)
        try:
            self.inner = transformers.AutoTokenizer.from_pretrained(where, **options)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UserError(f"AutoTokenizer cannot read {name} ({one_line(e)})") from e
        self.name = name
        self.vocab = self.inner.get_vocab()
        self.n_vocab = max(self.vocab.values(), default=-1) + 1
        self.eot_token = self.inner.eos_token_id
        bare = self.encode_ordinary("a")
        check(self.eot_token is not None and len(bare) > 0,
              f"the tokenizer {name} is incomplete: it has no end-of-text token or no vocabulary")
        self.bos = self.inner.bos_token_id
        # What it puts in front of a text, such as Llama's BOS. Only tasks begin with that.
        whole = self.inner("a")["input_ids"]
        self.start = whole[:whole.index(bare[0])]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False, split_special_tokens=True,
                          verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, clean_up_tokenization_spaces=False)

def hub_name(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The arguments of from_pretrained for a folder, or for OWNER/NAME@REVISION on the hub."""
    name, _, revision = Path(path).as_posix().partition("@")
    if Path(path).exists() or not revision:
        return str(path), {"trust_remote_code": False}
    return name, {"trust_remote_code": False, "revision": revision}

def one_line(e: Exception) -> str:
    """The beginning of what an exception says."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"

def known_as(name: str) -> str:
    """A name that two tokenizers share if they give the same ids, wherever their files are."""
    if name in encodings():
        return name
    if Path(name).name.startswith("tokenizer_"):              # a copy: needs no transformers
        return Path(name).name
    return fingerprint(name)

def fingerprint(name: str) -> str:
    """A checksum of the ids that a tokenizer of transformers gives."""
    tokenizer = get_tokenizer(name)
    content = sorted(tokenizer.vocab.items()), tokenizer.eot_token, encode(name, SAMPLE)
    return f"tokenizer_{zlib.crc32(repr(content).encode()):08x}"

def same_tokenizer(one: str, other: str) -> bool:
    """Do two names mean the same tokens?"""
    return one == other or known_as(one) == known_as(other)

def copy_tokenizer(name: str, folder: Path) -> str:
    """Save a tokenizer of transformers in `folder`, for a checkpoint or a corpus that lies there.

    Returns the name to store, which `tokenizer_beside` turns back into a path wherever the folder
    has moved. A tokenizer without files keeps its name.
    """
    own = known_as(name)
    if name in encodings() or (folder / own).exists():
        return own
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        new = Path(tmp, own)
        if Path(name).name == own:
            shutil.copytree(name, new)
        else:
            get_tokenizer(name).inner.save_pretrained(new)
            check(fingerprint(str(new)) == own,
                  f"the tokenizer {name} gives other ids when it is saved and loaded again: "
                  "name another with --tokenizer")
        os.replace(new, folder / own)
    return own

def tokenizer_beside(file: str | Path, name: str) -> str:
    """The tokenizer that a checkpoint or a corpus names: the copy beside it, if it has one."""
    own = Path(file).parent / name
    return str(own.absolute()) if name.startswith("tokenizer_") and own.exists() else name

# ---- checkpoints ---------------------------------------------------------------------------------
def save_checkpoint(path: Path, saved: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint that appears by rename, so that nobody reads half of one. The keep - 1
    before it stay as ckpt.1.pt, the one before, ckpt.2.pt, ...; should the machine stop between two
    renames, none is lost."""
    tmp = path.with_name(path.name + ".tmp")
    names = [path, *(path.with_suffix(f".{k}.pt") for k in range(1, keep))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
        free = next((k for k, name in enumerate(names) if not name.exists()), keep - 1)
        for k in range(free, 0, -1):                     # those beyond a gap stay where they are
            os.replace(names[k - 1], names[k])
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                 # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise UserError(f"cannot write {path} ({e!r:.90}): free some space or choose another place; "
                        "what was there is intact") from e

def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ... Nothing in it is executed.
    UserError if it is not sound."""
    check(Path(path).is_file(), f"no checkpoint {path}: "
                                "make one with `python train.py CONFIG.py`, or correct the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                               # damaged bytes make torch raise almost anything
        unreadable = isinstance(e, OSError) and e.errno not in (None, errno.EINVAL)
        check(not unreadable, f"cannot read {path} ({e}): mend that, it may well be whole")
        raise UserError(f"{path} is damaged or no checkpoint ({e!r:.90}): use another copy") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    sound = isinstance(saved, dict) and all(isinstance(saved.get(key), kinds[key]) for key in kinds)
    check(sound, f"{path} lacks {', '.join(kinds)}: it is not a checkpoint of train.py")
    for f in fields(ModelConfig):
        value = saved["settings"].get(f.name, f.default)
        kind = (int, float) if isinstance(f.default, float) else type(f.default)
        check(isinstance(value, kind), f"{path}: {f.name}={value!r} is no {f.type}")
    check_removed(saved["settings"], path)
    saved["tokenizer"] = tokenizer_beside(path, saved["tokenizer"])
    return saved

def check_removed(settings: dict[str, Any], path: str | Path) -> None:
    """UserError where an older checkpoint has a setting that model.py no longer has."""
    implied = {"qkv_bias": False, "qk_norm": "", "rope_scaling": "", "shared_gate": False}
    if settings.get("n_embd") and settings.get("n_head"):
        implied["head_dim"] = settings["n_embd"] / settings["n_head"]
    for name, value in implied.items():
        had = settings.get(name) or value
        check(had == value, f"{path}: {name}={had!r} is of a converted model, and model.py has no "
                            "such setting any more: probe the original with transformers")

def check_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """UserError where a checkpoint's weights are not those that the model has places for."""
    have = {name: tuple(w.shape) for name, w in saved["model"].items() if isinstance(w, Tensor)}
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(saved["model"].keys() | want.keys()):
        check(name in want, f"{path}: weights and settings disagree: the model has no {name}")
        check(name in have, f"{path}: weights and settings disagree: {name} is missing")
        check(have[name] == want[name],
              f"{path}: weights and settings disagree: {name} is {have[name]}, not {want[name]}")

def check_finite(model: GPT | HFModel, path: str | Path) -> None:
    """UserError if a weight is nan or infinite."""
    check(all(p.isfinite().all() for p in model.parameters() if not p.is_meta),
          f"{path} is damaged, it has weights that are nan or infinite: use another copy")

def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32, device_map: str | None = None,
               ) -> tuple[GPT | HFModel, dict[str, Any]]:
    """The model in eval mode, and the checkpoint's dict with at least "settings" and "tokenizer".

    path: a checkpoint of train.py, a folder that transformers reads, or an id on the Hugging Face
    hub. device_map: see `load_hf`.
    """
    own = Path(path, "ckpt.pt")
    check(not own.is_file(), f"{path} is the folder of a run: give {own}")
    if not Path(path).is_file() and Path(path).suffix != ".pt":
        return load_hf(path, device, dtype, device_map)
    check(device_map is None, "--device_map is for models of transformers: "
                              f"make one with `python probe.py {path} --export FOLDER`")
    saved = load_checkpoint(path)
    known = {f.name for f in fields(ModelConfig)}
    settings = {name: value for name, value in saved["settings"].items() if name in known}
    try:
        with torch.device("meta"):
            model = GPT(ModelConfig(**settings))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    check_weights(model, saved, path)
    model.load_state_dict(saved["model"], assign=True)        # no copy
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.blocks[0].attn.rope.to_empty(device="cpu").reset()
    return model.to(device, dtype).eval(), saved

# ---- models of transformers ----------------------------------------------------------------------
def first(output: Any) -> Any:
    """The tensor of what a module returns: some return it alone, some in front of others."""
    return output[0] if isinstance(output, tuple) else output

def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors, relative to the largest value of the second."""
    return float((a - b).abs_().max() / b.abs().max())

def tolerance(dtype: torch.dtype) -> float:
    """What rounding may come to in `relative_difference` of logits."""
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4

class HFLayer:
    """A decoder layer of transformers as a function of the stream, (B, T, d) -> (B, T, d).

    The stream comes back on the device that it came from, wherever the layer's weights are.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.parameters, self.named_parameters = module.parameters, module.named_parameters
        self.args: tuple = ()                     # what the model passes beside the stream:
        self.kwargs: dict[str, Any] = {}          # masks and rotary tables, see HFModel.capture
        self.returns_tuple = False
        # The submodules whose outputs are added to the stream; None where there are no such two.
        self.attn: nn.Module | None = None
        self.ffn: nn.Module | None = None
        self.scaled = False                       # is an output multiplied before it is added?

    def run(self, x: Tensor, hooks: dict[nn.Module, Callable] | None = None) -> Tensor:
        """The layer with forward hooks on some of its submodules."""
        handles = [module.register_forward_hook(hook) for module, hook in (hooks or {}).items()]
        try:
            return first(self.module(x, *self.args, **self.kwargs)).to(x.device)
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, x: Tensor, detail: bool = False) -> Tensor | tuple[Tensor, Detail]:
        if not detail:
            return self.run(x)
        if self.attn is None:
            return self.run(x), Detail(None, None, None)
        if self.scaled:
            x_attn = self.without_ffn(x)
            y = self.run(x)
            return y, Detail(x_attn - x, y - x_attn, None)
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # a copy: Falcon adds to the output in place
            seen[module] = first(output).to(x.device, copy=True).view_as(x)
        y = self.run(x, {self.attn: keep, self.ffn: keep})
        return y, Detail(seen[self.attn], seen[self.ffn], None)

    def without_attn(self, x: Tensor) -> Tensor:
        """The stream after the layer with attention's output zero, (B, T, d)."""
        return self.run(x, {self.attn: zeros})

    def without_ffn(self, x: Tensor) -> Tensor:
        """The stream after the layer with the FFN's output zero, (B, T, d)."""
        return self.run(x, {self.ffn: zeros})

    @torch.no_grad()
    def find_sublayers(self, x: Tensor) -> None:
        """Set attn, ffn and scaled from a run on the stream x.

        They are the first and the last submodule with weights that is not a norm. Where a norm
        takes exactly that output, the norm's output is what reaches the stream. With both at zero
        the layer must be the identity; else nothing is set.
        """
        parts: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(module, nn.Dropout):           # Phi calls one module for both sublayers
                return
            given = (*args, *kwargs.values())
            for i, (_, out) in enumerate(parts):
                if any(value is out for value in given):
                    parts[i] = module, first(output)
                    return
            is_norm = "norm" in type(module).__name__.lower()
            if not is_norm and any(True for _ in module.parameters()):
                parts.append((module, first(output)))
        children = list(self.module.children())
        handles = [child.register_forward_hook(note, with_kwargs=True) for child in children]
        self.run(x)
        for handle in handles:
            handle.remove()
        self.attn = self.ffn = None
        attn, ffn = (parts[0][0], parts[-1][0]) if parts else (None, None)
        if attn is ffn or not torch.equal(self.run(x, {attn: zeros, ffn: zeros}), x):
            return
        self.attn, self.ffn, self.scaled = attn, ffn, False
        y, did = self(x, detail=True)
        added = (did.attn + did.ffn).float()
        error = (y.float() - x.float() - added).norm()
        rounding = 4 * torch.finfo(x.dtype).eps * y.float().norm()
        self.scaled = bool(error > 1e-3 * added.norm() + rounding)

def zeros(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that replaces what a module returns by zeros."""
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)

class Embedded(Exception):
    """Ends a forward pass where the first layer would begin; its argument is the stream h_0."""

class HFModel:
    """A decoder of transformers with the interface of GPT: embed, blocks, logits.

    Nothing is converted. A block is the model's own layer, called with the arguments that the
    model passed to it in one run. So call `capture(T)` first, and again when T changes.
    """

    def __init__(self, inner: Any, name: str):
        self.inner, self.name = inner.eval(), name
        self.parameters, self.named_parameters = inner.parameters, inner.named_parameters
        config = inner.config.get_text_config()
        n = config.num_hidden_layers
        layers = next((m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == n),
                      None)
        check(layers is not None, f"{name}: found no list of its {n} layers")
        self.layers = layers
        self.blocks = [HFLayer(layer) for layer in layers]
        self.d, self.vocab_size = config.hidden_size, config.vocab_size
        self.context = getattr(config, "max_position_embeddings", None) or 2048
        self.n_head = getattr(config, "num_attention_heads", None) or 0
        one_key_head = getattr(config, "multi_query", False)       # in some forms of Falcon
        self.n_kv_head = (getattr(config, "num_key_value_heads", None)
                          or (0 if one_key_head else self.n_head))
        self.n_experts, self.init_std = 0, getattr(config, "initializer_range", None)
        self.dense = not any("experts" in key and isinstance(value, int) and value > 1
                             for key, value in config.to_dict().items())
        self.norm: nn.Module | None = None        # the final one
        self.splits = False                       # can attention and FFN be told apart?
        self.notes: list[str] = []                # what to know about the measurement, a line each

    @property
    def device(self) -> torch.device:
        """Where token ids go, and where the stream is between blocks."""
        return self.inner.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.inner.get_input_embeddings().weight.dtype

    def embed(self, idx: Tensor) -> Tensor:
        """The stream that the first layer gets, (B, T) -> (B, T, d)."""
        def stop(layer: nn.Module, args: Any, kwargs: Any) -> None:
            raise Embedded(args[0] if args else kwargs["hidden_states"])
        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.inner(idx, use_cache=False)
        except Embedded as e:
            return e.args[0].to(idx.device)
        finally:
            handle.remove()
        raise RuntimeError(f"{self.name} did not call its first layer")

    def logits(self, x: Tensor) -> Tensor:
        """What the model makes of the last stream x, (B, T, d) -> (B, T, vocab_size)."""
        out = (x,) if self.blocks[0].returns_tuple else x
        idx = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        every = range(len(self.blocks))
        return self.with_layers(idx, dict.fromkeys(every, lambda *args, **kwargs: out))

    def with_layers(self, idx: Tensor, forwards: dict[int, Callable]) -> Tensor:
        """The model's own logits with other functions in place of some layers' `forward`."""
        before = {l: self.layers[l].__dict__.get("forward") for l in forwards}   # accelerate's
        try:
            for l, forward in forwards.items():
                self.layers[l].forward = forward
            return self.inner(idx, use_cache=False).logits.to(idx.device)
        finally:
            for l, forward in before.items():
                del self.layers[l].forward
                if forward is not None:
                    self.layers[l].forward = forward

    @torch.no_grad()
    def capture(self, T: int) -> None:
        """Keep what the model passes to its layers for T tokens, and compare the chain of the
        blocks with the model.

        The run has one sequence, so that masks and tables broadcast over any batch.
        """
        def keep(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal last
            block = next(block for block in self.blocks if block.module is layer)
            block.args = args[1:]
            block.kwargs = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
            block.returns_tuple = isinstance(output, tuple)
            last = first(output)

        def find_norm(module: nn.Module, args: Any) -> None:
            if args and args[0] is last and "norm" in type(module).__name__.lower():
                self.norm = module
        last = None
        inside = {m for layer in self.layers for m in layer.modules()}
        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in self.layers]
        handles += [m.register_forward_pre_hook(find_norm) for m in self.inner.modules()
                    if m not in inside]
        draw = torch.Generator().manual_seed(0)
        idx = torch.randint(self.vocab_size, (3, T), generator=draw).to(self.device)
        try:
            self.inner(idx[:1], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        try:
            self.compare(idx[1:])
            self.find_sublayers(idx[1:2])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
            raise UserError(f"{self.name}: its layers cannot be run one by one ({one_line(e)})"
                            ) from e

    def compare(self, idx: Tensor) -> None:
        """UserError unless the chain of blocks gives the model's logits, and the chain without one
        block those of the model in which that layer does nothing."""
        def nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self.blocks[skipped].returns_tuple else hidden_states
        skipped = len(self.blocks) // 2
        others = [block for l, block in enumerate(self.blocks) if l != skipped]
        for blocks, changed in ((self.blocks, {}), (others, {skipped: nothing})):
            x = self.embed(idx)
            for block in blocks:
                x = block(x)
            self.check_equal(self.logits(x), self.with_layers(idx, changed))

    def check_equal(self, ours: Tensor, theirs: Tensor) -> None:
        """UserError where logits differ by more than rounding."""
        difference = relative_difference(ours, theirs)
        check(difference <= tolerance(self.dtype),
              f"{self.name}: its layers cannot be run one by one: the logits of the chain of "
              f"layers differ from the model's by {difference:.1e} of the largest logit")

    def find_sublayers(self, idx: Tensor) -> None:
        """Find attention and FFN in each layer, and say in `notes` what is left out or unusual."""
        x = self.embed(idx)
        for block in self.blocks:
            block.find_sublayers(x)
            x = block(x)
        self.splits = all(block.attn is not None for block in self.blocks)
        scaled = self.splits and any(block.scaled for block in self.blocks)
        for block in self.blocks:
            block.scaled = scaled
        given = [[a for a in tree_leaves((block.args, block.kwargs)) if isinstance(a, Tensor)]
                 for block in self.blocks]
        own = any(a is not b for tensors in given for a, b in zip(tensors, given[0]))
        said = {"its layers have no two sublayers that are added to the stream: what attention "
                "and FFN add, and removing one of them, is left out": not self.splits,
                "what attention and FFN add is read by subtracting streams": scaled,
                "its layers differ in masks or rotary tables: a block that changes places keeps "
                "its own": own}
        self.notes = [f"{self.name}: {line}" for line, holds in said.items() if holds]

def load_hf(name: str | Path, device: str | torch.device, dtype: torch.dtype,
            device_map: str | None = None) -> tuple[HFModel, dict[str, Any]]:
    """A model of transformers from a folder or from the Hugging Face hub, OWNER/NAME[@REVISION].

    device_map: "auto" shares out the layers among all GPUs (accelerate).
    """
    transformers = need("transformers", f"{name}, which is no checkpoint of train.py,")
    if Path(name).is_dir():                                   # nothing is downloaded
        transformers.utils.logging.disable_progress_bar()
    if device_map:
        need("accelerate", "--device_map")
    where, options = hub_name(name)
    try:
        inner, found = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, device_map=device_map, use_safetensors=True,
            output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"cannot load {name} as a model of transformers ({one_line(e)})") from e
    lacks = [*found["missing_keys"], *found["mismatched_keys"]]
    check(not lacks, f"{name} is incomplete: it lacks {', '.join(map(str, sorted(lacks)[:3]))}")
    model = HFModel(inner if device_map else inner.to(device), str(name))
    own = getattr(inner.config, "tokenizer", None)            # what `export` writes of an encoding
    settings = {"n_layer": len(model.blocks), "n_head": model.n_head, "n_kv_head": model.n_kv_head,
                "n_embd": model.d, "vocab_size": model.vocab_size, "block_size": model.context,
                "family": inner.config.model_type}
    return model, {"model": inner.state_dict(), "settings": settings, "step": 0,
                   "tokenizer": own if own in encodings() else str(name)}

@torch.no_grad()
def prune_hf(model: HFModel, drop: Sequence[int], folder: str | Path, tokenizer: str,
             device_map: str | None = None) -> None:
    """Write a model of transformers without some layers as a folder, tokenizer included.

    The folder is loaded again and its logits are compared with those of the chain of the kept
    layers before it appears under its name. The model itself is of no use afterwards.
    """
    config, n, out = model.inner.config.get_text_config(), len(model.blocks), Path(folder)
    check(not out.exists() or out.is_dir() and not any(out.iterdir()),
          f"{out} is not empty: choose another folder")
    kept = [l for l in range(n) if l not in drop]
    # Longer than its window, so that a layer that would get another kind of mask is noticed.
    window = max(getattr(config, name, None) or 0 for name in ("sliding_window",
                                                               "attention_chunk_size"))
    T = min(model.context, max(128, window + 64))
    model.capture(T)
    draw = torch.Generator().manual_seed(1)
    idx = torch.randint(model.vocab_size, (1, T), generator=draw).to(model.device)
    x = model.embed(idx)
    for l in kept:
        x = model.blocks[l](x)
    want = model.logits(x)

    for l in sorted(drop, reverse=True):
        del model.layers[l]
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == n:       # of each layer
            setattr(config, key, [value[l] for l in kept])
    config.num_hidden_layers = len(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        new = Path(tmp, out.name)
        model.inner.save_pretrained(new)
        write_tokenizer(tokenizer, new)
        without = f"{model.name} without layers {','.join(map(str, sorted(drop)))}"
        try:
            smaller, _ = load_hf(new, model.device, model.dtype, device_map)
        except UserError as e:          # such as: every second layer is a MoE
            raise UserError(f"{without} cannot be loaded again, drop others: {e}") from e
        difference = relative_difference(smaller.inner(idx, use_cache=False).logits, want)
        check(difference <= tolerance(model.dtype),
              f"{without} computes something else when it is loaded again: the logits differ by "
              f"{difference:.1e} of the largest. Nothing is written")
        os.replace(new, out)

# ---- export --------------------------------------------------------------------------------------
def export(path: str | Path, folder: str | Path, tokenizer: str | None = None) -> None:
    """Write a checkpoint of ours as a folder of transformers: Llama if dense, else Qwen2-MoE.

    The folder is loaded again and its logits are compared with the checkpoint's before it appears
    under its name. tokenizer: a name, by default the checkpoint's.
    """
    transformers = need("transformers", "--export")
    transformers.utils.logging.disable_progress_bar()
    out = Path(folder)
    check(not out.exists() or out.is_dir() and not any(out.iterdir()),
          f"{out} is not empty: choose another folder")
    check(Path(path).is_file(), f"--export {path}: it takes a checkpoint of train.py")
    model, saved = load_model(path)
    tokenizer = tokenizer or saved["tokenizer"]
    config = hf_config(transformers, model.config, tokenizer)
    with torch.device("meta"):
        inner = transformers.AutoModelForCausalLM.from_config(config)
    fused = any("gate_up_proj" in name for name in inner.state_dict())
    try:
        inner.load_state_dict(hf_weights(model, fused), strict=True, assign=True)
    except (RuntimeError, KeyError) as e:                     # a fork's weights, or Peri-LN's
        raise UserError(f"{path}: {type(inner).__name__} of transformers has other weights "
                        f"({one_line(e)}). The model stays in its own checkpoint") from e
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        new = Path(tmp, out.name)
        inner.save_pretrained(new)
        write_tokenizer(tokenizer, new)
        check_export(model, new, path)
        os.replace(new, out)
    print(f"{out}: {path} as {type(inner).__name__} in float32")

def hf_config(transformers: Any, c: ModelConfig, tokenizer: str) -> Any:
    """The configuration of the family that has the settings c."""
    shared = dict(
        vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        intermediate_size=c.ffn_hidden, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        initializer_range=c.init_std, tie_word_embeddings=c.tie_embeddings)
    end = get_tokenizer(tokenizer).eot_token
    shared |= {"bos_token_id": end, "eos_token_id": end}
    if tokenizer in encodings():
        shared["tokenizer"] = tokenizer                       # for `load_hf`
    if not c.n_experts:
        return transformers.LlamaConfig(**shared)
    return transformers.Qwen2MoeConfig(
        **shared, qkv_bias=False, num_experts=c.n_experts, num_experts_per_tok=c.top_k,
        moe_intermediate_size=c.expert_hidden, norm_topk_prob=c.norm_topk_prob,
        shared_expert_intermediate_size=c.shared_hidden or 1)

HF_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn.proj": "self_attn.o_proj", "ffn.router": "mlp.gate",
            **{f"ffn.{w}": f"mlp.{w}_proj" for w in ("gate", "up", "down")},
            **{f"ffn.shared.{w}": f"mlp.shared_expert.{w}_proj" for w in ("gate", "up", "down")}}

def hf_weights(model: GPT, fused: bool) -> dict[str, Tensor]:
    """The weights under their names in Llama and Qwen2-MoE. A weight without one keeps its own.

    fused: the experts of a layer are stored as two tensors, as in transformers 5.
    """
    c, out = model.config, {}
    for name, w in model.state_dict().items():
        prefix, rest = "", name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix = f"model.layers.{layer}."
            if rest in ("attn_norm.weight", "ffn_norm.weight"):
                w = w * model.blocks[int(layer)].scale        # LayerNorm Scaling
        if rest == "attn.qkv.weight":
            width = c.n_embd // c.n_head
            parts = w.split([c.n_head * width, c.n_kv_head * width, c.n_kv_head * width])
            for x, part in zip("qkv", parts):
                out[f"{prefix}self_attn.{x}_proj.weight"] = part.clone()
        elif rest in ("ffn.gate", "ffn.up", "ffn.down"):      # of all experts, (E, in, out)
            out[f"{prefix}mlp.experts.{rest[4:]}_proj"] = w.mT.contiguous()
        else:
            module = rest.removesuffix(".weight")
            out[f"{prefix}{HF_NAMES.get(module, module)}.weight"] = w
    if c.n_experts:
        for layer in range(c.n_layer):
            add_qwen2_moe(out, f"model.layers.{layer}.mlp.", c, fused)
    return out

def add_qwen2_moe(weights: dict[str, Tensor], mlp: str, c: ModelConfig, fused: bool) -> None:
    """Put the experts of a layer into the form of Qwen2-MoE.

    That family multiplies the shared expert by a sigmoid gate. A gate of zeros halves it, so the
    shared expert is doubled. A model without a shared expert gets one of width 1 and zero weights.
    """
    shared, d = f"{mlp}shared_expert.", c.n_embd
    weights[f"{mlp}shared_expert_gate.weight"] = torch.zeros(1, d)
    if c.shared_hidden:
        weights[f"{shared}down_proj.weight"] = 2 * weights[f"{shared}down_proj.weight"]
    else:
        for w, shape in {"gate": (1, d), "up": (1, d), "down": (d, 1)}.items():
            weights[f"{shared}{w}_proj.weight"] = torch.zeros(shape)
    gate, up, down = (weights.pop(f"{mlp}experts.{w}_proj") for w in ("gate", "up", "down"))
    if fused:
        weights[f"{mlp}experts.gate_up_proj"] = torch.cat((gate, up), dim=1)  # (E, 2 hidden, d)
        weights[f"{mlp}experts.down_proj"] = down                             # (E, d, hidden)
        return
    for e in range(c.n_experts):
        for w, matrices in {"gate": gate, "up": up, "down": down}.items():
            weights[f"{mlp}experts.{e}.{w}_proj.weight"] = matrices[e].clone()

@torch.no_grad()
def check_export(model: GPT, folder: Path, path: str | Path) -> None:
    """UserError unless the folder gives the model's logits for a full context of random tokens."""
    theirs, _ = load_hf(folder, "cpu", torch.float32)
    draw = torch.Generator().manual_seed(0)
    idx = torch.randint(model.vocab_size, (1, model.context), generator=draw)
    difference = relative_difference(theirs.inner(idx, use_cache=False).logits, model(idx)[0])
    check(difference <= tolerance(torch.float32),
          f"{path}: {type(theirs.inner).__name__} of transformers computes something else: the "
          f"logits differ by {difference:.1e} of the largest. The model stays in its checkpoint")

def write_tokenizer(name: str, folder: Path) -> None:
    """Write a tokenizer into the folder of a model, so that AutoTokenizer gives the same ids."""
    if name in ("bytes", "gpt2"):
        bpe = byte_level_bpe(get_tokenizer(name), splits_words=name == "gpt2")
        write_json(folder / "tokenizer.json", bpe)
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT,
                    "eos_token": EOT, "clean_up_tokenization_spaces": False})
    elif name in encodings():
        return print(f"tokenizer {name} not written: transformers has no form of it")
    else:
        get_tokenizer(name).inner.save_pretrained(folder)
    check(encode(str(folder), SAMPLE) == encode(name, SAMPLE),
          f"AutoTokenizer does not give the ids of {name} in a folder of this family: "
          "name another with --tokenizer")

def byte_level_bpe(enc: tiktoken.Encoding, splits_words: bool) -> dict[str, Any]:
    """The tokenizer.json of an encoding whose tokens are bytes and merges of two tokens.

    splits_words: GPT-2's way of cutting text into words first.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in printable}          # GPT-2 writes each byte as a letter
    others = [byte for byte in range(256) if byte not in letter]
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    ids = {}
    for i in range(enc.eot_token):
        ids["".join(letter[byte] for byte in enc.decode_single_token_bytes(i))] = i
    merges = []
    for token in ids:
        for k in range(1, len(token)):
            if token[:k] in ids and token[k:] in ids:
                merges.append((token[:k], token[k:]))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": splits_words}
    end = {"id": enc.eot_token, "content": EOT, "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}
    return {"version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": ids, "merges": merges}}

# ---- the command line, and what all scripts share of it ------------------------------------------
def need(package: str, purpose: str) -> Any:
    """Import an optional package, which comes back as its top level, or say how to get it."""
    try:
        return __import__(package)
    except ImportError as e:
        raise UserError(f"{purpose} needs {package}: pip install {package.split('.')[0]}") from e

def choose_device(asked: str) -> torch.device:
    """Where to compute; auto: the accelerator that torch sees, else the CPU. UserError for one that
    it does not see."""
    seen = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    check(asked in ("auto", "cpu", seen.type),
          f"--device={asked}: torch sees none here, use --device={seen.type}")
    return torch.device("cpu") if asked == "cpu" else seen

# What the system says of a path that the user gave: it may not be used, or cannot be one.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR)
FULL = (errno.ENOSPC, errno.EFBIG)       # and this of a disk, when it is written to

def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError, an unusable path or a full disk is one line on stderr and
    exit status 2, Ctrl-C is status 130."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()          # here, where it is noticed that nobody reads on
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)               # what rank 0 says as well is said once: torchrun stops us meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:                      # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # nor at exit
        sys.exit(141)
    except OSError as e:
        if e.errno in FULL:
            mistake = f"cannot write ({e.strerror}): free some space or choose another folder"
        elif e.filename and e.errno in UNUSABLE:
            mistake = f"cannot use {e.filename} ({e.strerror}): give another path, or mend that"
        else:
            raise
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)

class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors and whose abbreviations are off."""
    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python {self.prog} --help`")

def main() -> None:
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="python, fineweb-edu, or a file or folder")
    parser.add_argument("--tokenizer", help="bytes, a tiktoken encoding, a model's folder "
                                            "(default for python: bytes; else: gpt2)")
    parser.add_argument("--out", help="where to put it (default: data/NAME)")
    parser.add_argument("--val_fraction", type=float,
                        help="share of documents (default: 0.05; fineweb-edu: 0.001)")
    parser.add_argument("--max_tokens", type=float, default=float("inf"),
                        help="stop after so many, for example 10.5e9")
    parser.add_argument("--field", help="where the text of a row is (default: text, or content)")
    parser.add_argument("--encoding", help="of text without a byte-order mark (default: utf-8)")
    parser.add_argument("--again", action="store_true", help="prepare anew what is at --out")
    parser.add_argument("--verify", action="store_true",
                        help="NAME is a prepared folder: compare its checksums")
    args = parser.parse_args()
    if args.verify:
        others = [f"--{name}" for name, value in vars(args).items()
                  if name not in ("name", "verify") and value != parser.get_default(name)]
        check(not others, f"--verify only reads: {', '.join(others)} would not be used")
        Corpus(args.name).verify()
        return print(f"{args.name}: every checksum matches")
    stem = Path(os.path.abspath(os.path.expanduser(args.name))).name.lstrip(".").split(".")[0]
    tokenizer = args.tokenizer or ("bytes" if args.name == "python" else "gpt2")
    val_fraction = args.val_fraction
    if val_fraction is None:
        val_fraction = 0.001 if args.name == "fineweb-edu" else 0.05
    out = prepare(args.name, args.out or Path("data", stem), tokenizer, val_fraction,
                  args.max_tokens, args.field, args.encoding, args.again)
    meta = Corpus(out).meta
    line = (f"{out}: {meta['documents']:,} documents, {meta['train']['tokens']:,} training and "
            f"{meta['val']['tokens']:,} validation tokens of {meta['tokenizer']}")
    if "bigram_entropy" in meta:
        line += f"; bigram entropy {meta['bigram_entropy']:.3f} nats"
    print(line + say_unread(meta["unread"]))

if __name__ == "__main__":
    run(main)
