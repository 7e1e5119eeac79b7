"""Everything on disk: corpora, tokenizers, checkpoints, and models of transformers.

    python data.py python                            # the sources of torch and Python, in bytes
    python data.py my_texts/ --tokenizer bytes       # .txt .md .py .jsonl, also packed as .gz
    python data.py my_rows.parquet --field story     # other formats, through `datasets`
    python data.py fineweb-edu --max_tokens 10.5e9   # the paper's corpus, or OWNER/NAME[:CONFIG]

A prepared corpus is a folder: meta.json, train_00000.bin, ..., val_00000.bin, ... The same command
continues an interrupted preparation. Batches are a pure function of (seed, step), so a run can
resume exactly where it stopped.
"""
from __future__ import annotations

import argparse
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
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
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model import GPT, Detail, ModelConfig, UserError, check, wide

EOT = "<|endoftext|>"
TEXTS = (".txt", ".md", ".py", ".jsonl")     # read here, also as .gz; `datasets` reads the rest
TEXT_FIELDS = ("text", "content")            # the fields that may hold the text of a row
SHORT_NAMES = {"fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-100BT"}
DOCUMENT_CHARS = 1 << 16     # a longer text file is cut, so that both splits get a part of it
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; an interruption costs at most this much work
BATCH_DOCUMENTS = 256        # encoded at a time, by several threads
# Two tokenizers count as the same if they have the same vocabulary and encode this text alike.
SAMPLE = "def f(x):\n\treturn x ** 2  # It's 1234.5, naïve  学习 🙂\n\n" + EOT

# ---- reading: a prepared corpus ------------------------------------------------------------------
class Corpus:
    """A prepared corpus. Its tokens stay on disk until `read` or `batch` asks for some of them.

    Each split is one long sequence of tokens, stored as several files: the shards.
    """
    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.expanduser(folder))
        header = self.folder / "meta.json"
        check(header.is_file(), f"no prepared corpus at {folder}: "
                                f"make one with `python data.py NAME --out {folder}`")
        self.meta = json.loads(header.read_text(encoding="utf-8"))
        self.tokenizer = tokenizer_beside(header, self.meta["tokenizer"])
        self.vocab_size = self.meta["vocab_size"]
        self.arrays: dict[str, list[np.ndarray]] = {"train": [], "val": []}   # a memmap per shard
        self.starts: dict[str, np.ndarray] = {}          # first token of each shard, and the end
        dtype = np.dtype(self.meta["dtype"])
        for split, arrays in self.arrays.items():
            lengths = [0]
            for shard in self.meta[split]["shards"]:
                path, n = self.folder / shard["file"], shard["tokens"]
                check(path.is_file() and path.stat().st_size == n * dtype.itemsize,
                      f"{path} does not have the {n:,} tokens that meta.json records: "
                      f"delete {folder} and prepare the corpus again")
                arrays.append(np.memmap(path, dtype=dtype, mode="r"))
                lengths.append(n)
            self.starts[split] = np.cumsum(lengths)

    def n_tokens(self, split: str) -> int:
        return int(self.starts[split][-1])

    def n_windows(self, split: str, T: int) -> int:
        """The number of windows of T inputs and T targets whose inputs do not overlap."""
        n = (self.n_tokens(split) - 1) // T
        check(n > 0, f"{self.folder}: the {split} split has {self.n_tokens(split)} tokens, "
                     f"too few for block_size={T}: shorten block_size, add text or raise "
                     "--val_fraction")
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
        """Inputs and targets, each (B, T), of the given windows. Window i starts at token i T."""
        rows = [self.read(split, int(i) * T, T + 1) for i in windows]
        tokens = torch.from_numpy(np.stack(rows))             # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n), different in every epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)

def train_windows(seed: int, step: int, per_step: int, n_windows: int) -> np.ndarray:
    """The windows in the batch of a step, over all ranks: (per_step,). Steps count from 0.

    Every epoch has each window once.
    """
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
    """What a corpus is made from, see `find_source`."""
    name: str                    # python, a path, or the id of a data set
    files: list[Path]            # in reading order; empty: `datasets` reads the source
    size: int                    # bytes of all files; 0 for a data set on the hub
    skipped: dict[str, int]      # number of files and rows skipped, by reason
    field: str | None            # the field with the text of a row; None: one of TEXT_FIELDS

def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", a path, or a data set."""
    return read_source(find_source(source))

def find_source(name: str, field: str | None = None) -> Source:
    """Find the files of a source, and count those that are skipped."""
    skipped: Counter[str] = Counter()
    if name == "python":
        roots = [Path(torch.__file__).parent, Path(os.__file__).parent]
        found = [(path, path.relative_to(root).parts) for root in roots
                 for path in sorted(root.rglob("*.py"))]
        found = [(path, parts) for path, parts in found if "site-packages" not in parts]
    else:
        path = Path(os.path.expanduser(name))
        is_id = name in SHORT_NAMES or re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", name)
        check(path.exists() or is_id,
              f"no file or folder {name}: NAME is python, a path, or a data set OWNER/NAME")
        name = os.path.abspath(path) if path.exists() else name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [(p, p.relative_to(path).parts) for p in inside if p.is_file()]
    ours = [(path, parts) for path, parts in found if kind_of_text(path) in TEXTS]
    if not ours:                 # `datasets` reads it
        return Source(name, [], sum(path.stat().st_size for path, _ in found), skipped, field)
    files = []
    for path, parts in found:
        if any(part.startswith(".") for part in parts):
            skipped["hidden"] += 1
        elif kind_of_text(path) not in TEXTS:
            skipped[path.suffix or "without a suffix"] += 1
        elif not is_utf8(path):
            skipped["not in UTF-8"] += 1
        else:
            files.append(path)
    check(len(files) > 0, f"nothing to read at {name}{say_skipped(skipped)}")
    return Source(name, files, sum(path.stat().st_size for path in files), skipped, field)

def say_skipped(skipped: dict[str, int]) -> str:
    """The end of a line: how many files and rows were skipped, and why."""
    counts = [f"{count} {reason}" for reason, count in sorted(skipped.items())]
    return f"; skipped: {', '.join(counts)}" if counts else ""

def kind_of_text(path: Path) -> str:
    """The suffix of a file name in lower case, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

def opened(path: Path) -> io.TextIOWrapper:
    """A text file, unpacked if its name ends in .gz. A byte-order mark is dropped."""
    open_any = gzip.open if path.name.lower().endswith(".gz") else open
    return open_any(path, "rt", encoding="utf-8-sig", newline="")

def is_utf8(path: Path) -> bool:
    """Whether a text file is in UTF-8. Raises UserError if it cannot be unpacked."""
    try:
        with opened(path) as f:
            while f.read(1 << 20):
                pass
        return True
    except UnicodeDecodeError:
        return False
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is damaged ({e}): replace it or remove it") from e

def read_source(source: Source) -> Iterator[str]:
    """The documents of a source."""
    if not source.files:
        yield from texts(load_rows(source.name), source, source.name)
    for path in source.files:
        if kind_of_text(path) == ".jsonl":
            with opened(path) as f:
                yield from texts(parse_lines(f, path), source, path)
        else:
            yield from read_text(path)

def read_text(path: Path) -> Iterator[str]:
    """The documents of a text file: one, or several if it is long.

    A long file is cut between lines, if possible where no token would cross the cut. A line that
    is longer than DOCUMENT_CHARS may itself be cut.
    """
    with opened(path) as f:
        text = ""
        while line := f.readline(DOCUMENT_CHARS):
            # If a line ends with a visible character and the next begins with a letter or digit,
            # no token of a tiktoken encoding has characters of both lines.
            clean = line[0].isalnum() and re.search(r"\S\r?\n\Z", text[-3:])
            if len(text) >= DOCUMENT_CHARS and (clean or len(text) >= 2 * DOCUMENT_CHARS):
                yield text
                text = ""
            text += line
        if text:
            yield text

def parse_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    """The values of lines of JSON."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{number} is not a line of JSON ({e})") from e

def load_rows(name: str) -> Iterator[dict[str, Any]]:
    """Stream the train split of a file, a folder, or OWNER/NAME[:CONFIG] on the hub."""
    datasets = need("datasets", f"reading {name}")
    path, options = Path(name), {}
    if path.is_file():
        loader = {".arrow": "arrow", ".csv": "csv", ".json": "json", ".parquet": "parquet"}
        check(path.suffix in loader,
              f"cannot read {name}: formats are {' '.join(TEXTS)} (also .gz) {' '.join(loader)}")
        name, options = loader[path.suffix], {"data_files": glob.escape(str(path))}
    elif not path.exists():
        name, _, config = SHORT_NAMES.get(name, name).partition(":")
        options = {"name": config or None}
    try:
        yield from datasets.load_dataset(name, split="train", streaming=True, **options)
    except Exception as e:       # raised by `datasets`, Arrow or the network
        where = path if path.exists() else name
        raise UserError(f"datasets cannot read {where} ({one_line(e)})") from e

def texts(rows: Iterable[Any], source: Source, where: str | Path) -> Iterator[str]:
    """The text of every row. A row whose text is null is skipped and counted."""
    for row in rows:
        there = row if isinstance(row, dict) else {}
        names = (source.field,) if source.field else TEXT_FIELDS
        name = next((name for name in names if name in there), None)
        check(name is not None,
              f"{where}: a row has no field {' or '.join(names)}; its fields are "
              f"{', '.join(there) or 'none'}: name one in `python data.py NAME --field FIELD`")
        text = there[name]
        if text is None:
            source.skipped["rows without text"] += 1
            continue
        check(isinstance(text, str), f"{where}: the field {name} holds {type(text).__name__}, "
                                     "not text: name another with --field")
        # JSON may hold half of a surrogate pair. UTF-8 cannot encode it: it becomes U+FFFD.
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

# ---- writing: documents in, shards out -----------------------------------------------------------
def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = math.inf, field: str | None = None) -> Path:
    """Encode a source into token shards under `out`. After an interruption, call it again.

    Every document ends with EOT. `is_validation` assigns documents to splits. progress.json
    describes the shards so far. It is renamed to meta.json at the end, so that a folder with
    meta.json is complete.
    """
    check(0 < val_fraction <= 0.5,
          f"val_fraction={val_fraction} must be above 0 and at most 0.5")
    out, found = Path(os.path.expanduser(out)), find_source(source, field)
    enc = get_tokenizer(tokenizer)
    request = {"source": found.name, "files": len(found.files), "bytes": found.size,
               "tokenizer": tokenizer, "val_fraction": val_fraction, "max_tokens": str(max_tokens),
               "field": field}
    meta = prepared_so_far(out, request)
    if meta is None:
        dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token,
                "dtype": dtype, "request": request, "documents": 0,
                "train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
    if not (out / "meta.json").exists():
        docs = itertools.islice(read_source(found), meta["documents"], None)
        encode_documents(docs, out, meta, enc)
        if enc.n_vocab <= 4096:
            meta["bigram_entropy"] = bigram_entropy(out, meta)
        meta["tokenizer"] = copy_tokenizer(enc.name, out)     # so that the corpus can move
        meta["skipped"] = found.skipped
        write_json(out / "progress.json", meta)
        os.replace(out / "progress.json", out / "meta.json")
    return out

def prepared_so_far(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The content of meta.json, else of progress.json, else None.

    Raises UserError if the shards were made from another source, tokenizer or option.
    """
    for file in (out / "meta.json", out / "progress.json"):
        if file.exists():
            meta = json.loads(file.read_text(encoding="utf-8"))
            before = meta["request"]
            changed = [f"{key}={before.get(key)}, now {value}" for key, value in request.items()
                       if before.get(key) != value]
            check(not changed, f"{out} holds another corpus ({'; '.join(changed)}): "
                               "choose another --out, or delete the folder")
            return meta
    return None

def is_validation(number: int, val_fraction: float) -> bool:
    """Whether the document with this number (from 0) is for validation.

    A hash of the number decides. Taking every n-th document instead could miss one of two
    alternating sources. The first document is for validation and the second for training, so that
    two documents are enough.
    """
    if number < 2:
        return number == 0
    digest = hashlib.sha256(str(number).encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64

def encode_documents(docs: Iterator[str], out: Path, meta: dict[str, Any], enc: Any) -> None:
    """Write documents as shards until max_tokens is reached or none is left. Updates `meta`."""
    request = meta["request"]
    max_tokens = float(request["max_tokens"])
    pool = ThreadPoolExecutor(os.cpu_count())                # encoding releases the GIL
    buffers: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    written = total = meta["train"]["tokens"] + meta["val"]["tokens"]
    done = False
    while not done:
        batch = list(itertools.islice(docs, BATCH_DOCUMENTS))
        for ids in pool.map(enc.encode_ordinary, batch):
            if total >= max_tokens:
                break
            split = "val" if is_validation(meta["documents"], request["val_fraction"]) else "train"
            buffers[split].append(np.array([*ids, enc.eot_token], dtype=meta["dtype"]))
            meta[split]["tokens"] += len(ids) + 1
            meta["documents"] += 1
            total += len(ids) + 1
        done = total >= max_tokens or not batch
        if done:
            check_splits(meta, total >= max_tokens)
        if done or total - written >= SHARD_TOKENS:
            write_shards(out, meta, buffers)
            written = total
        if done or sys.stderr.isatty():
            print(f"\r{out}: {meta['documents']:,} documents, {total / 1e6:,.1f}M tokens",
                  end="\n" if done else "", file=sys.stderr, flush=True)

def check_splits(meta: dict[str, Any], full: bool) -> None:
    """Raise UserError if a split has no text. full: whether max_tokens is reached."""
    request, n = meta["request"], meta["documents"]
    train, val = meta["train"]["tokens"], meta["val"]["tokens"]
    check(train > 0 or not full,
          f"--max_tokens={request['max_tokens']} is reached by the first document, which is for "
          "validation: raise --max_tokens")
    check(train + val > n, f"{request['source']}: all its documents are empty")
    check(train > 1 and val > 1,
          f"{request['source']}: too few documents ({n}): training and validation each need "
          "one with text")

def write_shards(out: Path, meta: dict[str, Any], buffers: dict[str, list[np.ndarray]]) -> None:
    """Move each buffer into a new file. Record the files in progress.json."""
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
        parts.clear()
    write_json(out / "progress.json", meta)

def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file by rename, so that no reader sees a part of it."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(tmp, path)

def bigram_entropy(folder: Path, meta: dict[str, Any]) -> float:
    """Entropy in nats of a token given the one before it, in the training split.

    A model with a lower loss uses more than the previous token.
    """
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
    """The token ids of a text. Special tokens that the text spells out are plain text."""
    return get_tokenizer(tokenizer).encode_ordinary(text)

def decode(tokenizer: str, ids: Sequence[int]) -> str:
    """The text of token ids."""
    return get_tokenizer(tokenizer).decode(list(ids))

def encodings() -> list[str]:
    """The tokenizers that are known by name alone: "bytes" and those of tiktoken."""
    return ["bytes", *tiktoken.list_encoding_names()]

@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding | HFTokenizer:
    """A tokenizer with n_vocab and eot_token.

    name: "bytes" (256 bytes and an end of text), an encoding of tiktoken such as gpt2, or what
    AutoTokenizer of transformers reads: a folder, or an id on the Hugging Face hub.
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
    """A tokenizer of transformers with the methods of tiktoken.Encoding that are used here."""

    def __init__(self, name: str):
        path = Path(name)
        check(path.exists() or "/" in name,
              f"no tokenizer {name!r}: give bytes, one of tiktoken's "
              f"({', '.join(encodings()[1:])}), a folder, or OWNER/NAME of the Hugging Face hub")
        transformers = need("transformers", f"the tokenizer {name}")
        if path.name == "tokenizer.json":                     # AutoTokenizer wants the folder
            path = path.parent
        where, options = hub_name(path)
        try:
            self.inner = transformers.AutoTokenizer.from_pretrained(where, **options)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UserError(f"AutoTokenizer cannot read {name} ({one_line(e)}): "
                            "name another tokenizer with --tokenizer") from e
        self.name = name
        self.vocab = self.inner.get_vocab()
        self.n_vocab = max(self.vocab.values(), default=-1) + 1
        self.eot_token = self.inner.eos_token_id
        bare = self.encode_ordinary("a")
        # Where files are missing, AutoTokenizer may return a tokenizer of special tokens alone.
        check(self.eot_token is not None and bare not in ([], [self.inner.unk_token_id]),
              f"the tokenizer {name} has no end-of-text token or no vocabulary: "
              "name another with --tokenizer")
        self.bos = self.inner.bos_token_id
        # The tokens that __call__ puts before a text, such as Llama's BOS. Only --tasks uses them.
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
    """The type and the beginning of the message of an exception, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"

def known_as(name: str) -> str:
    """A name by which tokenizers are compared: that of an encoding, or else a fingerprint."""
    if name in encodings():
        return name
    if Path(name).name.startswith("tokenizer_"):              # a copy is named by its fingerprint
        return Path(name).name
    return fingerprint(name)

def fingerprint(name: str) -> str:
    """A name made from a checksum of a tokenizer's vocabulary, eot_token and ids of SAMPLE."""
    tokenizer = get_tokenizer(name)
    content = sorted(tokenizer.vocab.items()), tokenizer.eot_token, encode(name, SAMPLE)
    return f"tokenizer_{zlib.crc32(repr(content).encode()):08x}"

def same_tokenizer(one: str, other: str) -> bool:
    """Whether two tokenizers count as the same, see `known_as`."""
    return one == other or known_as(one) == known_as(other)

def copy_tokenizer(name: str, folder: Path) -> str:
    """Save a tokenizer of transformers in the folder of a checkpoint or corpus.

    Returns the name to store in the checkpoint or corpus. `tokenizer_beside` finds the copy by
    this name, even after the folder has moved. "bytes" and tiktoken's encodings are not copied.
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
    """The tokenizer that a file names: the path of the copy beside the file, if there is one."""
    own = Path(file).parent / name
    return str(own.absolute()) if name.startswith("tokenizer_") and own.exists() else name

# ---- checkpoints ---------------------------------------------------------------------------------
def save_checkpoint(path: Path, saved: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint to a temporary file, then rename it. So no reader sees a part of it.

    The last keep - 1 earlier checkpoints are renamed to ckpt.1.pt (the newest), ckpt.2.pt, ...
    """
    tmp = path.with_name(path.name + ".tmp")
    names = [path, *(path.with_suffix(f".{k}.pt") for k in range(1, keep))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:         # torch raises RuntimeError when the disk is full
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({one_line(e)}): free some space or choose another "
                        "folder; earlier checkpoints are intact") from e
    for newer, older in reversed([*zip(names, names[1:])]):
        if newer.exists():
            os.replace(newer, older)
    os.replace(tmp, path)

def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ...

    No code in it is executed. Raises UserError if the file is not a checkpoint.
    """
    check(Path(path).is_file(), f"no checkpoint {path}: "
                                "make one with `python train.py CONFIG.py`, or correct the path")
    try:
        file = open(path, "rb")
    except OSError as e:
        raise UserError(f"cannot open {path} ({e.strerror})") from e
    with file:
        try:
            saved = read_checkpoint(path, file)
        except Exception as e:                   # torch may raise anything for damaged bytes
            before = Path(path).with_suffix(".1.pt")     # see save_checkpoint
            copy = f"another copy, such as {before}" if before.is_file() else "another copy"
            raise UserError(f"{path} is damaged or not a checkpoint ({type(e).__name__}): "
                            f"use {copy}") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    sound = isinstance(saved, dict) and all(isinstance(saved.get(k), kinds[k]) for k in kinds)
    check(sound, f"{path} lacks one of {', '.join(kinds)}: it is not a checkpoint of train.py")
    # An earlier model.py had rope_scaling. It has no weight, so check_weights cannot notice it.
    check(not saved["settings"].get("rope_scaling"),
          f"{path} has rope_scaling, which model.py no longer has: "
          "give the original model to probe.py")
    saved["tokenizer"] = tokenizer_beside(path, saved["tokenizer"])
    return saved

def read_checkpoint(path: str | Path, file: BinaryIO) -> Any:
    """torch.load. The file is mapped into memory if possible: unused tensors are not read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                            # for example, the disk does not support mapping
        return torch.load(file, map_location="cpu", weights_only=True)

def check_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """Raise UserError unless the checkpoint has the model's weights, by name and shape."""
    have = {name: tuple(w.shape) for name, w in saved["model"].items() if isinstance(w, Tensor)}
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(saved["model"].keys() | want.keys()):
        check(name in want, f"{path}: weights and settings disagree: the model has no {name}")
        check(name in have, f"{path}: weights and settings disagree: {name} is missing")
        check(have[name] == want[name],
              f"{path}: weights and settings disagree: {name} is {have[name]}, not {want[name]}")

def check_finite(model: GPT | HFModel, path: str | Path) -> None:
    """Raise UserError if a weight is nan or infinite."""
    check(all(p.isfinite().all() for p in model.parameters() if not p.is_meta),
          f"{path} is damaged: some weights are nan or infinite; use another copy")

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
    """The main tensor of a module's output. In some modules it is the first item of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output

def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of a and b, divided by the largest absolute value of b."""
    return float((a - b).abs_().max() / b.abs().max())

def tolerance(dtype: torch.dtype) -> float:
    """The largest `relative_difference` of logits that counts as rounding."""
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4

class HFLayer:
    """A decoder layer of transformers as a function of the stream, (B, T, d) -> (B, T, d).

    The result is on the device of the argument, wherever the weights of the layer are.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.parameters, self.named_parameters = module.parameters, module.named_parameters
        # Arguments besides the stream, such as masks and rotary tables. HFModel.capture sets them.
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        # The number of items after the stream in the output. None: the output is not a tuple.
        self.n_behind: int | None = None
        # The submodules whose outputs are added to the stream. None if there are not two.
        self.attn: nn.Module | None = None
        self.ffn: nn.Module | None = None
        self.scaled = False                       # whether outputs are scaled before being added

    def returned(self, x: Tensor) -> Tensor | tuple:
        """The stream x in the form of the module's output: alone, or first in a tuple."""
        return x if self.n_behind is None else (x, *[None] * self.n_behind)

    def run(self, x: Tensor, hooks: dict[nn.Module, Callable] | None = None) -> Tensor:
        """Run the layer with forward hooks on some of its submodules."""
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
            return y, Detail(wide(x_attn) - wide(x), wide(y) - wide(x_attn), None)
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # copied, because Falcon adds to the output in place
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
        """Run the layer on the stream x, and set attn, ffn and scaled.

        attn and ffn are the first and the last submodule that has weights and is not a norm. A
        submodule that takes the output of attn or ffn, such as a norm, is used in its place,
        because its output is added to the stream. Both are None unless the layer becomes the
        identity when both outputs are set to zero.
        """
        parts: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(module, nn.Dropout):           # Phi has one for both sublayers
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
    """A forward hook that replaces the main tensor of the output with zeros."""
    nothing = torch.zeros_like(first(output))
    return nothing if isinstance(output, Tensor) else (nothing, *output[1:])

class Embedded(Exception):
    """Ends a forward pass before the first layer. The argument is the stream h_0."""

class HFModel:
    """A decoder of transformers with the interface of GPT: embed, blocks, logits.

    Nothing is converted. A block is a layer of the model, called with the arguments that the model
    passes to it for T tokens. `capture(T)` records these arguments. Call `capture` before the
    blocks, and again when T changes.
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
        self.norm: nn.Module | None = None        # the final norm
        self.splits = False                       # whether every layer has attn and ffn
        self.notes: list[str] = []                # remarks for a reader of the scores

    @property
    def device(self) -> torch.device:
        """The device of token ids, and of the stream between blocks."""
        return self.inner.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.inner.get_input_embeddings().weight.dtype

    def embed(self, idx: Tensor) -> Tensor:
        """The input of the first layer, (B, T) -> (B, T, d)."""
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
        """The logits for the last stream x, (B, T, d) -> (B, T, vocab_size).

        The whole model runs, but every layer returns x. So the final norm, and any other step
        after the layers, is that of the model.
        """
        out = self.blocks[-1].returned(x)
        idx = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        every = range(len(self.blocks))
        return self.with_layers(idx, dict.fromkeys(every, lambda *args, **kwargs: out))

    def with_layers(self, idx: Tensor, forwards: dict[int, Callable]) -> Tensor:
        """The logits of the whole model with `forward` of some layers replaced."""
        before = {l: self.layers[l].__dict__.get("forward") for l in forwards}   # set by accelerate
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
        """Record what the model passes to its layers for T tokens, and find attention and FFN.

        Raises UserError unless the chain of blocks computes the same as the model. The recorded
        run has one sequence, so that masks and tables broadcast over any batch.
        """
        def keep(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal last
            block = next(block for block in self.blocks if block.module is layer)
            block.args = args[1:]
            block.kwargs = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
            alone = isinstance(output, Tensor)
            block.n_behind = None if alone else len(output) - 1
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
            self.check_causal(idx[1:])
            self.find_sublayers(idx[1:2])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
            raise UserError(f"{self.name}: its layers cannot be run one by one ({one_line(e)})"
                            ) from e

    def compare(self, idx: Tensor) -> None:
        """Raise UserError unless the chain of blocks computes the logits of the model.

        The chain is compared a second time without the middle block. In the model, the middle
        layer then returns its input.
        """
        def nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.blocks[skipped].returned(hidden_states)
        skipped = len(self.blocks) // 2
        others = [block for l, block in enumerate(self.blocks) if l != skipped]
        for blocks, changed in ((self.blocks, {}), (others, {skipped: nothing})):
            x = self.embed(idx)
            for block in blocks:
                x = block(x)
            difference = relative_difference(self.logits(x), self.with_layers(idx, changed))
            check(difference <= tolerance(self.dtype),
                  f"{self.name}: its layers cannot be run one by one: the logits of the chain of "
                  f"layers differ from the model's by {difference:.1e} of the largest logit")

    def check_causal(self, idx: Tensor) -> None:
        """Raise UserError if logits depend on later tokens, as in an encoder. idx: (2, T)."""
        half = idx.size(1) // 2
        other = torch.cat((idx[:, :half], idx.flip(0)[:, half:]), dim=1)      # other later tokens
        a, b = (self.with_layers(ids, {})[:, :half] for ids in (other, idx))
        # the median over tokens: rounding may send a few of them to another expert
        difference = float((a - b).abs_().amax(-1).median() / b.abs().max())
        check(difference <= tolerance(self.dtype),
              f"{self.name} is not a decoder: if later tokens change, its logits differ by "
              f"{difference:.1e} of the largest logit")

    def find_sublayers(self, idx: Tensor) -> None:
        """Find attention and FFN in each layer. Describe what is left out or unusual in `notes`."""
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
        said = {"its layers do not add two sublayers to the stream: the contributions of attention "
                "and FFN, and the removal of one of them, are left out": not self.splits,
                "the contributions of attention and FFN are found by subtracting streams": scaled,
                "its layers differ in masks or rotary tables: a block that changes places keeps "
                "its own masks and tables": own,
                "the load of each expert is left out": not self.dense}
        self.notes = [f"{self.name}: {line}" for line, holds in said.items() if holds]

def load_hf(name: str | Path, device: str | torch.device, dtype: torch.dtype,
            device_map: str | None = None) -> tuple[HFModel, dict[str, Any]]:
    """A model of transformers from a folder or from the Hugging Face hub, OWNER/NAME[@REVISION].

    device_map: "auto" spreads the layers over all GPUs (accelerate).
    """
    transformers = need("transformers", f"{name}, which is not a checkpoint of train.py,")
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
        raise UserError(f"cannot load {name} as a model of transformers ({one_line(e)}). Without "
                        "a network, give a folder or a model that is in the hub's cache") from e
    lacks = [*found["missing_keys"], *found["mismatched_keys"]]
    check(not lacks, f"{name} is incomplete: it lacks {', '.join(map(str, sorted(lacks)[:3]))}")
    model = HFModel(inner if device_map else inner.to(device), str(name))
    own = getattr(inner.config, "tokenizer", None)            # written by `hf_config`
    settings = {"n_layer": len(model.blocks), "n_head": model.n_head, "n_kv_head": model.n_kv_head,
                "n_embd": model.d, "vocab_size": model.vocab_size, "block_size": model.context,
                "family": inner.config.model_type}
    return model, {"model": inner.state_dict(), "settings": settings, "step": 0,
                   "tokenizer": own if own in encodings() else str(name)}

@torch.no_grad()
def prune_hf(model: HFModel, drop: Sequence[int], folder: str | Path, tokenizer: str,
             device_map: str | None = None) -> None:
    """Write a model of transformers without some layers, and its tokenizer, to a folder.

    A config does not say which of its lists have an item for each layer. So every list with as many
    items as there are layers is cut, except lists of token ids. A wrong cut is refused: the model
    is saved under a temporary name and loaded again, and the folder gets its name only if the
    logits equal those of the chain of the kept layers. The layers are also removed from `model`.
    """
    config, n, out = model.inner.config.get_text_config(), len(model.blocks), Path(folder)
    check_empty(out)
    kept = [l for l in range(n) if l not in drop]
    # T exceeds a sliding window, so that the comparison notices a layer with another mask.
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
        if isinstance(value, list) and len(value) == n and not key.endswith("token_id"):
            setattr(config, key, [value[l] for l in kept])
    config.num_hidden_layers = len(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        new = Path(tmp, out.name)
        model.inner.save_pretrained(new)
        write_tokenizer(tokenizer, new)
        without = f"{model.name} after --drop {','.join(map(str, sorted(drop)))}"
        try:
            smaller, _ = load_hf(new, model.device, model.dtype, device_map)
        except UserError as e:          # for example, every second layer is a MoE
            raise UserError(f"{without} cannot be loaded again: drop other layers ({e})") from e
        difference = relative_difference(smaller.inner(idx, use_cache=False).logits, want)
        check(difference <= tolerance(model.dtype),
              f"{without} computes something else when it is loaded again: the logits differ by "
              f"{difference:.1e} of the largest. Nothing is written")
        os.replace(new, out)

def check_empty(folder: Path) -> None:
    """Raise UserError if a folder to be written has something in it."""
    check(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
          f"{folder} is not empty: choose another folder")

# ---- export --------------------------------------------------------------------------------------
def export(path: str | Path, folder: str | Path, tokenizer: str | None = None) -> None:
    """Write a checkpoint of train.py as a folder of transformers: Llama if dense, else Qwen2-MoE.

    The folder first has a temporary name. It is loaded again, and gets its own name only if its
    logits equal those of the checkpoint.
    tokenizer: a name, by default the checkpoint's.
    """
    transformers = need("transformers", "--export")
    transformers.utils.logging.disable_progress_bar()
    out = Path(folder)
    check_empty(out)
    check(Path(path).is_file(), f"--export needs a checkpoint of train.py, not {path}")
    model, saved = load_model(path)
    tokenizer = tokenizer or saved["tokenizer"]
    config = hf_config(transformers, model.config, tokenizer)
    with torch.device("meta"):
        inner = transformers.AutoModelForCausalLM.from_config(config)
    try:
        inner.load_state_dict(hf_weights(model), strict=True, assign=True)
    except (RuntimeError, KeyError) as e:                     # a fork's weights, or Peri-LN's
        raise UserError(f"{path}: {type(inner).__name__} of transformers has other weights "
                        f"({one_line(e)}). Nothing is written") from e
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        new = Path(tmp, out.name)
        inner.save_pretrained(new)
        write_tokenizer(tokenizer, new)
        check_export(model, new, path)
        os.replace(new, out)
    print(f"{out}: {path} as {type(inner).__name__} in float32")

def hf_config(transformers: Any, c: ModelConfig, tokenizer: str) -> Any:
    """The config of the Llama or Qwen2-MoE that equals a model with the settings c."""
    shared = dict(
        vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        intermediate_size=c.ffn_hidden, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        initializer_range=c.init_std, tie_word_embeddings=c.tie_embeddings)
    end = get_tokenizer(tokenizer).eot_token
    shared |= {"bos_token_id": end, "eos_token_id": end}
    if tokenizer in encodings():
        shared["tokenizer"] = tokenizer                       # read by `load_hf`
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

def hf_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under their names in Llama and Qwen2-MoE. Unknown weights keep their names."""
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
        elif rest in ("ffn.gate", "ffn.up", "ffn.down"):      # all experts, (E, in, out)
            out[f"{prefix}mlp.experts.{rest[4:]}_proj"] = w.mT.contiguous()
        else:
            module = rest.removesuffix(".weight")
            out[f"{prefix}{HF_NAMES.get(module, module)}.weight"] = w
    if c.n_experts:
        for layer in range(c.n_layer):
            add_qwen2_moe(out, f"model.layers.{layer}.mlp.", c)
    return out

def add_qwen2_moe(weights: dict[str, Tensor], mlp: str, c: ModelConfig) -> None:
    """Give the experts of a layer the form of Qwen2-MoE, as in transformers 5.

    Qwen2-MoE multiplies its shared expert by a sigmoid gate. The weights of the gate are set to
    zero, so that the gate is 1/2, and the shared expert is doubled. A model without a shared
    expert gets one of width 1 with zero weights.
    """
    shared, d = f"{mlp}shared_expert.", c.n_embd
    weights[f"{mlp}shared_expert_gate.weight"] = torch.zeros(1, d)
    if c.shared_hidden:
        weights[f"{shared}down_proj.weight"] = 2 * weights[f"{shared}down_proj.weight"]
    else:
        for w, shape in {"gate": (1, d), "up": (1, d), "down": (d, 1)}.items():
            weights[f"{shared}{w}_proj.weight"] = torch.zeros(shape)
    gate, up = (weights.pop(f"{mlp}experts.{w}_proj") for w in ("gate", "up"))
    weights[f"{mlp}experts.gate_up_proj"] = torch.cat((gate, up), dim=1)      # (E, 2 hidden, d)

@torch.no_grad()
def check_export(model: GPT, folder: Path, path: str | Path) -> None:
    """Raise UserError unless the folder gives the model's logits for random tokens."""
    theirs, _ = load_hf(folder, "cpu", torch.float32)
    draw = torch.Generator().manual_seed(0)
    idx = torch.randint(model.vocab_size, (1, model.context), generator=draw)
    difference = relative_difference(theirs.inner(idx, use_cache=False).logits, model(idx)[0])
    check(difference <= tolerance(torch.float32),
          f"{path}: {type(theirs.inner).__name__} of transformers computes something else: the "
          f"logits differ by {difference:.1e} of the largest. Nothing is written")

def write_tokenizer(name: str, folder: Path) -> None:
    """Write a tokenizer into the folder of a model, so that AutoTokenizer gives the same ids."""
    if name in ("bytes", "gpt2"):
        bpe = byte_level_bpe(get_tokenizer(name), splits_words=name == "gpt2")
        write_json(folder / "tokenizer.json", bpe)
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT,
                    "eos_token": EOT, "clean_up_tokenization_spaces": False})
    elif name in encodings():
        return print(f"tokenizer {name} not written: transformers has no equivalent")
    else:
        get_tokenizer(name).inner.save_pretrained(folder)
    check(encode(str(folder), SAMPLE) == encode(name, SAMPLE),
          f"the tokenizer {name} gives other ids when it is saved with a model and loaded again: "
          "name another with --tokenizer")

def byte_level_bpe(enc: tiktoken.Encoding, splits_words: bool) -> dict[str, Any]:
    """The tokenizer.json of an encoding of tiktoken. splits_words: cut text into words first."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    letter = bytes_to_unicode()                               # GPT-2 writes each byte as a letter
    ids = {}
    for i in range(enc.eot_token):
        ids["".join(letter[byte] for byte in enc.decode_single_token_bytes(i))] = i
    merges = []                                               # in the order of the ids
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

# ---- the command line, and functions that all scripts share --------------------------------------
def need(package: str, purpose: str) -> Any:
    """Import an optional package and return it. A UserError says how to install it."""
    try:
        return __import__(package)
    except ImportError as e:
        raise UserError(f"{purpose} needs {package}: pip install {package}") from e

def choose_device(asked: str) -> torch.device:
    """The device to compute on. auto: the accelerator that torch sees, else the CPU."""
    seen = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    check(asked in ("auto", "cpu", seen.type),
          f"--device={asked}: torch sees no such device; use --device={seen.type}")
    return torch.device("cpu") if asked == "cpu" else seen

def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main and exit.

    A UserError, an unusable path or a full disk prints one line to stderr and exits with status 2.
    Ctrl-C exits with status 130.
    """
    os.environ["MPLBACKEND"] = "Agg"             # figures are files: no display is needed
    for stream in (sys.stdout, sys.stderr):      # print ? for characters the terminal lacks
        stream.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()                   # raises BrokenPipeError here, not at exit
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)                       # rank 0 reports it, then torchrun stops the rest
        stop(str(e))
    except BrokenPipeError:                      # the reader has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for the flush at exit
        sys.exit(141)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EFBIG):            # a full disk
            stop(f"cannot write ({e.strerror}): free some space or choose another folder")
        if e.filename is None:
            raise
        stop(f"cannot use {e.filename} ({e.strerror}): give another path")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)

def stop(mistake: str) -> NoReturn:
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    sys.exit(2)

class Parser(argparse.ArgumentParser):
    """argparse that raises UserError and accepts no abbreviated options."""
    def __init__(self, **kwargs: Any):
        style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(allow_abbrev=False, formatter_class=style, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python {self.prog} --help`")

def main() -> None:
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="python, a file, a folder, fineweb-edu, or "
                                                     "OWNER/NAME[:CONFIG] on the hub")
    parser.add_argument("--tokenizer", help="bytes, an encoding of tiktoken, or a model of "
                                            "transformers (default: gpt2; for python: bytes)")
    parser.add_argument("--out", help="folder of the corpus (default: data/NAME)")
    parser.add_argument("--val_fraction", type=float,
                        help="fraction of the documents that are for validation "
                             "(default: 0.05; fineweb-edu: 0.001)")
    parser.add_argument("--max_tokens", type=float, default=math.inf,
                        help="stop after this many tokens, for example 10.5e9")
    parser.add_argument("--field", help="the field of a row that holds its text "
                                        "(default: text, else content)")
    args = parser.parse_args()
    stem = Path(os.path.abspath(os.path.expanduser(args.name))).name.lstrip(".").split(".")[0]
    tokenizer = args.tokenizer or ("bytes" if args.name == "python" else "gpt2")
    val_fraction = args.val_fraction
    if val_fraction is None:
        val_fraction = 0.001 if args.name == "fineweb-edu" else 0.05
    out = prepare(args.name, args.out or Path("data", stem.partition(":")[0]), tokenizer,
                  val_fraction, args.max_tokens, args.field)
    meta = Corpus(out).meta
    line = (f"{out}: {meta['documents']:,} documents, {meta['train']['tokens']:,} training and "
            f"{meta['val']['tokens']:,} validation tokens of {meta['tokenizer']}")
    if "bigram_entropy" in meta:
        line += f"; bigram entropy {meta['bigram_entropy']:.3f} nats"
    print(line + say_skipped(meta.get("skipped", {})))

if __name__ == "__main__":
    run(main)
