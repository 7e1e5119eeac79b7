"""Everything that lies on disk: corpora, tokenizers, checkpoints, Hugging Face folders.

    python data.py python                          # the sources of torch and Python, in bytes
    python data.py my_texts/ --tokenizer bytes     # .txt .md .py .jsonl, also .gz: a file or folder
    python data.py my_rows.parquet --field story   # other formats are read by the package datasets
    python data.py fineweb-edu --max_tokens 10.5e9 # the paper's corpus; so is any OWNER/NAME[:CONFIG]

A prepared corpus is a folder: meta.json, train_00000.bin, ..., val_00000.bin, ... The same command
continues an interrupted preparation. Batches are a pure function of (seed, step), so that a run can
resume exactly where it was.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import errno
import fnmatch
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
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from model import GPT, ModelConfig, UserError, check

EOT = "<|endoftext|>"
TEXTS = (".txt", ".md", ".py", ".jsonl")     # read here, also packed as .gz; all else by `datasets`
TEXT_FIELDS = ("text", "content")            # where the text of a row is looked for without --field
SHORT_NAMES = {"fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-100BT"}
DOCUMENT_CHARS = 1 << 16     # a longer text file becomes several documents: one is enough to split
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; an interrupted preparation repeats at most so much
BATCH_DOCUMENTS = 256        # handed to the encoder's threads at a time
CLASS_BOS = {"LlamaTokenizer": "<s>", "GPT2Tokenizer": EOT, "GPTNeoXTokenizer": EOT}   # transformers'
ADDED_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized")
METRICS = ("acc", "acc_per_char", "acc_per_token")      # of tasks: the likeliest choice, or per ...

# ---- reading: a prepared corpus ------------------------------------------------------------------
class Corpus:
    """A prepared corpus. Its tokens stay on disk; a batch reads windows of T + 1 tokens."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.expanduser(folder))
        header = self.folder / "meta.json"
        check(header.is_file(), f"no prepared corpus at {folder}: "
                                f"make one with `python data.py NAME --out {folder}`")
        self.meta = json.loads(header.read_text(encoding="utf-8"))
        self.tokenizer = tokenizer_beside(header, self.meta["tokenizer"])
        self.vocab_size = self.meta["vocab_size"]
        self.arrays: dict[str, list[np.ndarray]] = {"train": [], "val": []}   # a memmap per shard
        self.starts: dict[str, np.ndarray] = {}          # where each shard begins, and the end
        dtype = np.dtype(self.meta["dtype"])
        for split, arrays in self.arrays.items():
            lengths = [0]
            for shard in self.meta[split]["shards"]:
                path, n = self.folder / shard["file"], shard["tokens"]
                check(path.is_file() and path.stat().st_size == n * dtype.itemsize,
                      f"{path} is not the file of {n:,} tokens that meta.json says: "
                      "prepare the corpus again")
                arrays.append(np.memmap(path, dtype=dtype, mode="r"))
                lengths.append(n)
            self.starts[split] = np.cumsum(lengths)

    def n_tokens(self, split: str) -> int:
        return int(self.starts[split][-1])

    def n_windows(self, split: str, T: int) -> int:
        """The number of windows of T inputs and T targets whose inputs do not overlap."""
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
        """Inputs and targets, each (B, T), of the given windows. Window i starts at token i T."""
        rows = [self.read(split, int(i) * T, T + 1) for i in windows]
        tokens = torch.from_numpy(np.stack(rows))             # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n), another one in every epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)

def train_windows(seed: int, step: int, per_step: int, n_windows: int) -> np.ndarray:
    """The windows of the global batch of a step, (per_step,). Each window comes once per epoch."""
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
    name: str                    # python, a path, or the id of a data set
    files: list[Path]            # in the order in which they are read; empty: `datasets` reads it
    size: int                    # bytes in all its files; 0 for a data set on the hub
    skipped: dict[str, int]      # what is left out and why, counted; grows while rows are read
    field: str | None            # where the text of a row is; None: the first of TEXT_FIELDS

def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", a path, or a data set."""
    return read_source(find_source(source))

def find_source(name: str, field: str | None = None) -> Source:
    """The files of a source. Files of other kinds and files that are not UTF-8 are counted."""
    skipped: Counter[str] = Counter()
    if name == "python":
        roots = [Path(torch.__file__).parent, Path(os.__file__).parent]
        found = [(path, path.relative_to(root).parts) for root in roots
                 for path in sorted(root.rglob("*.py"))]
        found = [(path, parts) for path, parts in found if "site-packages" not in parts]
    else:
        path = Path(os.path.expanduser(name))
        check(path.exists() or name in SHORT_NAMES or "/" in name,
              f"no file or folder {name}: NAME is python, a path, or a data set OWNER/NAME")
        name = os.path.abspath(path) if path.exists() else name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [(p, p.relative_to(path).parts) for p in inside if p.is_file()]
    ours = [(path, parts) for path, parts in found if kind_of_text(path) in TEXTS]
    if not ours:                 # `datasets` reads all of it
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
    """What is left out and why, for the end of a line."""
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
    """Whether all of a text file is UTF-8. UserError if it cannot be unpacked."""
    try:
        with opened(path) as f:
            while f.read(1 << 20):
                pass
        return True
    except UnicodeDecodeError:
        return False
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is damaged ({e}): get it again, or take it away") from e

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
    """A text file as one document. A long file is cut where no token is lost, if it can be."""
    with opened(path) as f:
        text = ""
        while line := f.readline(DOCUMENT_CHARS):
            # Every tiktoken encoding starts a new piece where a letter follows a newline that
            # follows no whitespace.
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
                raise UserError(f"{path}:{number} is no line of JSON ({e})") from e

def load_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of the train split of whatever `datasets` reads, streamed: a file, a folder, or
    OWNER/NAME[:CONFIG] on the hub."""
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
    except Exception as e:       # its own errors, Arrow's, the network's; earlier shards stay
        said = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"datasets cannot read {path if path.exists() else name} ({said})") from e

def texts(rows: Iterable[Any], source: Source, where: str | Path) -> Iterator[str]:
    """The text of every row. A row whose text is null is skipped and counted."""
    for row in rows:
        there = row if isinstance(row, dict) else {}
        names = (source.field,) if source.field else TEXT_FIELDS
        name = next((name for name in names if name in there), None)
        check(name is not None,
              f"{where} has no field {' or '.join(names)} in a row, but "
              f"{', '.join(there) or 'none'}: name one in `python data.py NAME --field FIELD`")
        text = there[name]
        if text is None:
            source.skipped["rows without text"] += 1
            continue
        check(isinstance(text, str), f"{where}: the field {name} holds {type(text).__name__}, "
                                     "no text: name another with --field")
        # JSON may hold half of a surrogate pair, which has no UTF-8: U+FFFD instead
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

# ---- writing: documents in, shards out -----------------------------------------------------------
def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = math.inf, field: str | None = None) -> Path:
    """Encode a source into token shards under `out`. After an interruption, call it again.

    Every document ends with EOT; `is_validation` says which ones are validation. progress.json says
    what the shards cover so far. At the end it is renamed to meta.json: a folder with meta.json is
    complete.
    """
    check(0 < val_fraction <= 0.5 and max_tokens > 0,
          f"val_fraction={val_fraction} must be above 0 and at most 0.5, "
          f"max_tokens={max_tokens} above 0")
    out, enc = Path(os.path.expanduser(out)), get_tokenizer(tokenizer)
    found = find_source(source, field)
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
    """What meta.json, or progress.json of an interrupted preparation, says; None without both."""
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

    A hash of the number decides, so that sources that take turns are in both splits. The first is
    for validation and the second for training: two documents are enough.
    """
    if number < 2:
        return number == 0
    digest = hashlib.sha256(str(number).encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64

def encode_documents(docs: Iterator[str], out: Path, meta: dict[str, Any], enc: Any) -> None:
    """Write documents as shards until there are no more, or max_tokens are reached. `meta` says
    what is written."""
    request = meta["request"]
    max_tokens = float(request["max_tokens"])
    pool = ThreadPoolExecutor(os.cpu_count())                # threads help: it releases the GIL
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
    """UserError if a split has no text. full: max_tokens ended the corpus."""
    request, n = meta["request"], meta["documents"]
    train, val = meta["train"]["tokens"], meta["val"]["tokens"]
    check(train > 0 or not full,
          f"--max_tokens={request['max_tokens']} ends with the first document, which is for "
          "validation: raise it")
    check(train + val > n or n == 0, f"{request['source']}: its {n} documents are all empty")
    check(train > 1 and val > 1,
          f"{request['source']}: {n} documents are too few, both splits need some text")

def write_shards(out: Path, meta: dict[str, Any], buffers: dict[str, list[np.ndarray]]) -> None:
    """Empty the buffers into a new file for each split, then record the files in progress.json."""
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
    """Replace a JSON file by rename: a reader sees the old one or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(tmp, path)

def bigram_entropy(folder: Path, meta: dict[str, Any]) -> float:
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
# What belongs to a tokenizer in a folder of a model, besides the ids in its config.json.
TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "tokenizer.model.*",
                   "*.tiktoken", "tokenization_*.py", "tekken.json", "chat_template*",
                   "additional_chat_templates/*", "generation_config.json")

@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of a name: "bytes", which is 256 bytes and EOT, offline; a tiktoken encoding;
    or a tokenizer.json, its folder or the id of its model on the Hugging Face hub."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    known = encodings()
    if name not in known:
        path = on_disk(name)
        if path.exists() or path.name == "tokenizer.json" and path.parent.is_dir():
            return folder_tokenizer(path)
        check(path.name == name, f"the tokenizer {name} is not there: "
                                 "put it back, or name another with --tokenizer")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    check(name in known, f"no tokenizer {name!r}{hint}; there are: {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:      # requests' errors are OSErrors; a damaged cache is a ValueError
        raise UserError(f"tiktoken could not fetch {name!r} ({type(e).__name__}): go online once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes") from e

def encodings() -> list[str]:
    """The names of the tokenizers that are not somebody's files."""
    return ["bytes", *tiktoken.list_encoding_names()]

def folder_tokenizer(path: Path) -> FolderTokenizer:
    """A tokenizer.json of Hugging Face, or that of a folder, with the tokens of AutoTokenizer.

    It is taken as it is written; some classes of transformers put in a normalizer of their own.
    """
    tokenizers = need("tokenizers", f"reading {path}")
    # not resolved: in the hub's cache the file is a link, and its neighbours are the link's
    file = (path / "tokenizer.json" if path.is_dir() else path).absolute()
    folder = file.parent
    slow = [f.name for kind in ("*.model", "vocab.*", "tekken.json") for f in folder.glob(kind)]
    check(file.is_file() or not slow,
          f"{folder} has {', '.join(slow)} and no tokenizer.json: make it with python -c \"from "
          f"transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained("
          f"'{folder}')\", or name another with --tokenizer")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
        names = add_tokens(inner, tokenizers, folder)
        end, n_vocab = names.get("eos_token"), max(inner.get_vocab().values()) + 1
        for other in ("generation_config.json", "config.json"):           # the last has the say
            ids = read_json(folder / other).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]     # the first, where there are several
            end = next((i for i in ids if type(i) is int and 0 <= i < n_vocab), end)
        inner.encode_special_tokens = True    # spelt: a document that has <|endoftext|> goes on
        inner.no_truncation()
        inner.no_padding()
        enc = FolderTokenizer(str(file), inner, end, names)
    except Exception as e:                                    # all that tokenizers raises
        raise UserError(f"{file} is missing or damaged ({e}): get it again, or name another with "
                        "--tokenizer") from e
    check(end is not None,
          f"{folder}: no config.json there has an eos_token_id, which ends documents, that is one "
          f"of the {enc.n_vocab} tokens")
    return enc

def add_tokens(inner: Any, tokenizers: Any, folder: Path) -> dict[str, int]:
    """Add the tokens that AutoTokenizer finds beside a tokenizer.json; returns the ids of those
    that have a role, such as bos_token."""
    said = read_json(folder / "tokenizer_config.json")
    old = {}
    if "added_tokens_decoder" not in said:                    # as transformers before 4.34 wrote it
        said |= read_json(folder / "special_tokens_map.json")
        old = read_json(folder / "added_tokens.json")
    roles, special = {}, []
    for role, token in said.items():
        names_one = isinstance(token, str) or isinstance(token, dict) and "content" in token
        if role.endswith("_token") and names_one:             # add_bos_token is true or false
            special.append(as_token(tokenizers, token))
            roles[role] = special[-1].content
    for name in ("extra_special_tokens", "additional_special_tokens"):
        more = said.get(name) or []
        for token in more.values() if isinstance(more, dict) else more:
            special.append(as_token(tokenizers, token))

    listed = {int(i): token for i, token in said.get("added_tokens_decoder", {}).items()}
    for token, i in old.items():
        is_special = any(token == other.content for other in special)
        listed[i] = {"content": token, "special": is_special, "normalized": not is_special}
    inner.add_tokens([tokenizers.AddedToken(**listed[i]) for i in sorted(listed)])
    there = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens([token for token in special if token.content not in there])
    default = class_bos(inner, said, read_json(folder / "config.json").get("model_type"))
    if "bos_token" not in said and inner.token_to_id(default) is not None:
        roles["bos_token"] = default
    return {role: inner.token_to_id(token) for role, token in roles.items()}

def as_token(tokenizers: Any, said: str | dict[str, Any]) -> Any:
    """An AddedToken of its text, or of a dict that says as well which blanks beside it it takes."""
    flags = said if isinstance(said, dict) else {"content": said, "normalized": False}
    return tokenizers.AddedToken(**{key: flags[key] for key in flags if key in ADDED_TOKEN})

def class_bos(inner: Any, said: dict[str, Any], family: str | None) -> str:
    """The BOS that AutoTokenizer takes of a tokenizer_class where none is named; "" if none.

    It does not take the class at its word in some families, nor Llama 2's where the tokens are of
    bytes.
    """
    kind = str(said.get("tokenizer_class")).removesuffix("Fast")
    of_bytes = "ByteLevel" in repr(inner.pre_tokenizer)
    if family in ("mistral", "mixtral", "qwen2") or kind == "LlamaTokenizer" and of_bytes:
        return ""
    return CLASS_BOS.get(kind, "")

def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file says, nothing if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

class FolderTokenizer:
    """A tokenizer of the tokenizers package, with what is used here of tiktoken.Encoding."""

    def __init__(self, name: str, inner: Any, eot_token: int, names: dict[str, int]):
        self.name, self.inner, self.eot_token = name, inner, eot_token
        self.bos, self.eos = names.get("bos_token"), names.get("eos_token")
        self.n_vocab = max(inner.get_vocab().values()) + 1
        encoded = inner.encode("a")
        whose = encoded.sequence_ids                           # None: it is of the template
        self.start = encoded.ids[:whose.index(0)] if 0 in whose else []   # such as Llama's BOS
        # what an empty context consists of: the first of these that there is
        said = (i for i in (self.bos, self.eos, *self.start, eot_token) if i is not None)
        self.prefix = next(said, None)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, allowed_special: Any = "all") -> list[int]:
        """As encode_ordinary, but a special token that the text spells is that token."""
        self.inner.encode_special_tokens = False
        ids = self.encode_ordinary(text)
        self.inner.encode_special_tokens = True
        return ids

    def encode_to_numpy(self, text: str, disallowed_special: Any = ()) -> np.ndarray:
        return np.array(self.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

def same_tokenizer(one: str, other: str) -> bool:
    """Do two names mean the same tokens? Files are known by what is in them, not by their place."""
    if one == other:
        return True
    if {one, other} & {*encodings()}:
        return False
    a, b = get_tokenizer(one), get_tokenizer(other)
    return (a.inner.to_str(), a.eot_token) == (b.inner.to_str(), b.eot_token)

def copy_tokenizer(name: str, folder: Path) -> str:
    """Copy the files of a tokenizer into `folder`, for a checkpoint or a corpus that lies there.

    Returns the name by which that is to know it, and of which `tokenizer_beside` makes a path
    wherever the folder is then. A tokenizer without files keeps its name, as does one that is gone:
    who needs it will be told.
    """
    if name in encodings():
        return name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            new = Path(tmp, "tokenizer")
            new.mkdir()
            write_json(new / "config.json", write_tokenizer(name, new))
            content = (new / "tokenizer.json").read_bytes() + (new / "config.json").read_bytes()
            own = folder / f"tokenizer_{zlib.crc32(content):08x}"   # others may lie there, too
            if not own.exists():
                os.replace(new, own)
    except (OSError, UserError):
        return name
    return f"{own.name}/tokenizer.json"

def known_as(name: str) -> str:
    """A name for what is in a tokenizer, the same wherever its files lie."""
    with tempfile.TemporaryDirectory() as tmp:
        return copy_tokenizer(name, Path(tmp))

def tokenizer_beside(file: str | Path, name: str) -> str:
    """The tokenizer that a checkpoint or a corpus names: a copy beside it, if it has one."""
    own = Path(file).parent / name
    return str(own.absolute()) if own.is_file() else name

def write_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """Write a tokenizer so that AutoTokenizer gives the same ids; returns what config.json has to
    say of it."""
    if name not in encodings():                               # files of another folder
        path = on_disk(name)
        source = path if path.is_dir() else path.parent
        check(source.is_dir(), f"the tokenizer {name} is not there: "
                               "put it back, or name another with --tokenizer")
        for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
        if path.is_file():                                    # whatever it is called
            (folder / "tokenizer.json").write_bytes(path.read_bytes())
        said = read_json(source / "config.json")
        ids = {}
        for key, value in said.items():
            each = value if isinstance(value, list) else [value]
            is_id = key.endswith("_token_id") and all(i is None or type(i) is int for i in each)
            if is_id or key == "model_type":                  # see `class_bos`
                ids[key] = value
        if ids.get("eos_token_id") is None:
            with contextlib.suppress(UserError):              # there may be no end, or no tokenizer
                ids["eos_token_id"] = get_tokenizer(name).eot_token
        return ids
    enc = get_tokenizer(name)
    if name in ("bytes", "gpt2"):
        write_json(folder / "tokenizer.json", byte_level_bpe(enc, splits_words=name == "gpt2"))
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT})
    return {"tokenizer": name, "bos_token_id": enc.eot_token, "eos_token_id": enc.eot_token,
            "pad_token_id": None}

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

# ---- checkpoints ---------------------------------------------------------------------------------
def save_checkpoint(path: Path, saved: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint that appears by rename, so that nobody reads half of one.

    The keep - 1 checkpoints before it stay as ckpt.1.pt (the one before), ckpt.2.pt, ...
    """
    tmp = path.with_name(path.name + ".tmp")
    names = [path, *(path.with_suffix(f".{k}.pt") for k in range(1, keep))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:         # torch reports a full disk as a RuntimeError
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e!r:.90}): free some space or choose another place; "
                        "what was there is intact") from e
    for newer, older in reversed([*zip(names, names[1:])]):
        if newer.exists():
            os.replace(newer, older)
    os.replace(tmp, path)

def load_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ... Nothing in it is executed.
    UserError if the file is no checkpoint."""
    place = on_disk(path)
    if place.is_dir():
        check_whole(place, path)
        return load_hf(place, dtype)
    check(place.is_file(), f"no checkpoint {path}: "
                           "make one with `python train.py CONFIG.py`, or correct the path")
    try:
        file = open(path, "rb")
    except OSError as e:
        raise UserError(f"cannot open {path} ({e.strerror})") from e
    with file:
        try:
            saved = read_checkpoint(path, file)
        except Exception as e:                   # damaged bytes make torch raise almost anything
            raise UserError(f"{path} is damaged or no checkpoint ({e!r:.90}): use another copy") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    sound = isinstance(saved, dict) and all(isinstance(saved.get(key), kinds[key]) for key in kinds)
    check(sound, f"{path} lacks {', '.join(kinds)}: it is not a checkpoint of train.py")
    saved["tokenizer"] = tokenizer_beside(path, saved["tokenizer"])
    return saved

def read_checkpoint(path: str | Path, file: BinaryIO) -> Any:
    """torch.load, mapped into memory where possible: what is not used is not read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                            # such as a path or a disk that cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)

def check_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """UserError where a checkpoint's weights are not those that the model has places for."""
    have = {name: tuple(w.shape) for name, w in saved["model"].items() if isinstance(w, Tensor)}
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(saved["model"].keys() | want.keys()):
        check(name in want, f"{path}: weights and settings disagree: the model has no {name}")
        check(name in have, f"{path}: weights and settings disagree: {name} is missing")
        check(have[name] == want[name],
              f"{path}: weights and settings disagree: {name} is {have[name]}, not {want[name]}")

def check_finite(model: GPT, path: str | Path) -> None:
    """UserError if a weight is nan or infinite."""
    check(all(p.isfinite().all() for p in model.parameters()),
          f"{path} is damaged, it has weights that are nan or infinite: use another copy")

def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32,
               spread: Sequence[str | torch.device] = ()) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint or Hugging Face folder in eval mode, and the checkpoint itself.

    spread: devices to share out the blocks among; the rest, and the stream, are on `device`.
    """
    saved = load_checkpoint(path, dtype)
    known = {f.name for f in fields(ModelConfig)}
    settings = {name: value for name, value in saved["settings"].items() if name in known}
    try:
        with torch.device("meta"):
            model = GPT(ModelConfig(**settings))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    check_weights(model, saved, path)
    model.load_state_dict(saved["model"], assign=True)                # takes the tensors themselves: no copy
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.blocks[0].attn.rope.to_empty(device="cpu").reset()
    model.to(dtype=dtype).eval()
    if spread:
        spread_blocks(model, device, spread)
    else:
        model.to(device)
    return model, saved

def spread_blocks(model: GPT, home: str | torch.device,
                  devices: Sequence[str | torch.device]) -> None:
    """Move the first blocks to the first device and so on, each once; all else is at home, where the
    stream is between blocks.

    A block computes in attn_output and ffn_output: these fetch what they are given, and bring back
    what they return.
    """
    ropes = {device: copy.deepcopy(model.blocks[0].attn.rope).to(device) for device in devices}
    for l, block in enumerate(model.blocks):
        device = devices[l * len(devices) // len(model.blocks)]
        block.attn.rope = ropes[device]
        block.to(device)
        block.attn_output = computed_on(device, home, block.attn_output)
        block.ffn_output = computed_on(device, home, block.ffn_output)
    for module in (model.embed, model.norm, model.head):
        module.to(home)

def computed_on(device: str | torch.device, home: str | torch.device,
                f: Callable[..., Any]) -> Callable[..., Any]:
    """f, whose weights are on the device, for tensors at home."""
    def there_and_back(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.to(home), f(*args, **kwargs))
    return there_and_back

# ---- Hugging Face folders, in and out ------------------------------------------------------------
FAMILIES: dict[str, dict[str, Any]] = {       # model_type: what it implies where config.json is silent
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"},
    "mixtral": {"rope_theta": 1e6, "norm_eps": 1e-5, "norm_topk_prob": True},
    "olmoe": {"qk_norm": "full", "norm_eps": 1e-5, "top_k": 8},
    "qwen2_moe": {"qkv_bias": True, "shared_gate": True, "top_k": 4}, "qwen3_moe": {"qk_norm": "head", "top_k": 8}}
FIELDS = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
          "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "head_dim": "head_dim",
          "hidden_size": "n_embd", "intermediate_size": "ffn_hidden", "rms_norm_eps": "norm_eps",
          "initializer_range": "init_std", "tie_word_embeddings": "tie_embeddings", "rope_theta": "rope_theta"}
MOE_FIELDS = {"num_experts": "n_experts", "num_local_experts": "n_experts", "num_experts_per_tok": "top_k",
              "moe_intermediate_size": "expert_hidden", "shared_expert_intermediate_size": "shared_hidden",
              "norm_topk_prob": "norm_topk_prob", "qkv_bias": "qkv_bias"}
LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "partial_rotary_factor": 1, "use_mrope": False, "is_causal": True,
        "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
HARMLESS = """
    _* model_type model_name name_or_path architectures auto_map *_version unsloth_* transformers.*
    dtype torch_dtype use_bfloat16 torchscript use_cache pretraining_tp chunk_size_feed_forward
    attn_implementation experts_implementation is_decoder is_llama_config tie_encoder_decoder
    cross_attention_hidden_size
    return_dict* output_attentions output_hidden_states output_scores output_logits
    output_router_logits tie_last_hidden_states
    *dropout gradient_checkpointing router_jitter_noise router_aux_loss_coef tf_legacy_loss
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer tokenizer_class prefix *_token_id *_token_ids max_sequence_length model_max_length
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
    num_return_sequences num_beam_groups temperature top_k top_p top_h min_p typical_p
    *_penalty *_cutoff
    *no_repeat_ngram_size bad_words_ids remove_invalid_values *suppress_tokens num_assistant_tokens*
    assistant_* target_lookbehind
    max_window_layers layer_types sliding_window use_sliding_window
    rope_scaling rope_parameters rope_type type rope_interleaved original_max_position_embeddings
    """.split()       # patterns: what it is, how it is run, trained, labelled, spelt, generates
TOP_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}  # ours: theirs
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",  # in a block
         "attn.proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
         "ffn.router": "mlp.gate", "ffn.shared_gate": "mlp.shared_expert_gate"}
for matrix in ("gate", "up", "down"):
    NAMES[f"ffn.{matrix}"] = f"mlp.{matrix}_proj"
    NAMES[f"ffn.shared.{matrix}"] = f"mlp.shared_expert.{matrix}_proj"

GIVEN_BY = {"attn.qkv.bias": "qkv_bias", "attn.q_norm.": "qk_norm", "attn.k_norm.": "qk_norm",
            "ffn.router.": "n_experts", "ffn.shared.": "shared_hidden",
            "ffn.shared_gate.": "shared_gate"}         # a weight, and the setting that it belongs to
MIXTRAL_NAMES = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

def hf_config(hf: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json of transformers 4 (rope_theta, rope_scaling) or 5
    (rope_parameters) means; UserError names what the model lacks, and any field that is not known
    to leave the function alone."""
    context = hf.get("original_max_position_embeddings")
    hf = hf | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})  # its fields as the others
    family = hf.get("model_type")
    check(family in FAMILIES, f"{path}: model_type={family!r} is none of {', '.join(FAMILIES)}")
    if family == "mistral":
        hf = {"sliding_window": 4096} | hf                                # its default is not null
    hf = {name: value for name, value in hf.items() if value is not None}
    rope = hf.get("rope_type") or hf.get("type") or "default"
    check_fields(hf, rope, path)
    for name in ("num_attention_heads", "max_position_embeddings"):       # no tensor's shape tells these
        check(name in hf, f"{path} lacks {name}")

    values = dict(FAMILIES[family])
    for theirs, ours in (FIELDS | MOE_FIELDS).items():
        if theirs in hf:
            values[ours] = hf[theirs]
    if "n_experts" in values:
        values.setdefault("expert_hidden", hf.get("intermediate_size"))
    if rope == "llama3":
        hf.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        if context is not None:                           # beside, it goes before that of the rope
            hf["original_max_position_embeddings"] = context
        values["rope_scaling"] = "llama3:" + ",".join(str(hf[name]) for name in LLAMA3_FIELDS)
    values["block_size"] = context_length(hf, family, path)
    try:
        return ModelConfig(**values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e

def check_fields(hf: dict[str, Any], rope: str, path: Path) -> None:
    """UserError that names all fields of a config.json that the model lacks or that are not known
    to leave the function alone."""
    known = [*FIELDS, *MOE_FIELDS, *HARMLESS]
    if rope == "llama3":
        known += LLAMA3_FIELDS
    wrong, unknown = [], []
    layered = [name for name in hf if name.endswith("_attention") and isinstance(hf[name], dict)]
    if layered:
        wrong.append(f"rope_parameters per layer type, such as {layered[0]}")
    if rope not in ("default", "llama3"):
        wrong.append(f"rope_type={rope} (only default and llama3 are)")
    for name, value in hf.items():
        shown = f"{name}={value!r:.60}"
        if name in ONLY:
            if value != ONLY[name]:
                wrong.append(f"{shown} (only {ONLY[name]!r} is)")
        elif name == "quantization_config":
            wrong.append(f"{name} (dequantise the weights: in transformers model.dequantize(), "
                         "then save_pretrained)")
        elif name in layered:
            continue
        elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in known):
            unknown.append(shown)
    said = []
    if wrong:
        said.append(f"not supported: {', '.join(wrong)}")
    if unknown:
        said.append(f"unknown, and may change what the model computes: {', '.join(unknown)} "
                    "(delete there those that do not)")
    check(not said, f"{path}: {'; '.join(said)}")

def context_length(hf: dict[str, Any], family: str, path: Path) -> int:
    """The block_size of a config.json: no longer than its sliding window, so that no sequence ever
    meets that."""
    T = hf["max_position_embeddings"]
    kinds = set(hf.get("layer_types", []))
    check(kinds <= {"full_attention", "sliding_attention"},
          f"{path}: layer_types={sorted(kinds)} is not supported")
    slides = "sliding_attention" in kinds or hf.get("use_sliding_window", "qwen" not in family)
    window = hf.get("sliding_window") or T
    if slides and window < T:
        print(f"{path}: block_size={window}, its sliding_window, not {T}", file=sys.stderr)
        return window
    return T

def hf_views(c: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names and in the shapes of transformers: views, to be read into or to
    be written out.

    UserError names the weights that Hugging Face has no name for.
    """
    widths = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    views: dict[str, Tensor] = {}
    nameless = []
    for name, w in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix, names = f"model.layers.{layer}.", NAMES
        else:
            prefix, rest, names = "", name, TOP_NAMES
        module, _, kind = rest.rpartition(".")                         # such as attn.proj, weight
        needed = [setting for start, setting in GIVEN_BY.items() if rest.startswith(start)]
        if not all(getattr(c, setting) for setting in needed):         # a fork has it without the setting
            nameless.append(name)
        elif rest in ("ffn.gate", "ffn.up", "ffn.down"):                 # of all experts, (E, in, out)
            for e, expert in enumerate(w):
                views[f"{prefix}mlp.experts.{e}.{kind}_proj.weight"] = expert.T
        elif module == "attn.qkv" and kind in ("weight", "bias"):
            for x, part in zip("qkv", w.split(widths)):
                views[f"{prefix}self_attn.{x}_proj.{kind}"] = part
        elif name == "head.weight" and c.tie_embeddings:
            continue
        elif module in names and kind == "weight":
            views[f"{prefix}{names[module]}.{kind}"] = w
        else:
            nameless.append(name)
    check(not nameless, f"there is no Hugging Face name for {', '.join(nameless[:3])}: such a model "
          "stays in its own checkpoint, unless NAMES in data.py gives it one")
    return views

def load_hf(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A Hugging Face folder as `load_checkpoint` gives it: every tensor has its place and every
    place its tensor."""
    safetensors = need("safetensors", f"reading {folder}")
    try:
        hf = json.loads((folder / "config.json").read_text())
        stored = stored_tensors(folder, safetensors)
        c = hf_config(hf, folder / "config.json")
        c.tie_embeddings &= "lm_head.weight" not in stored               # a stored head counts, as in transformers 5
        with torch.device("meta"):
            places = GPT(c).state_dict()
        weights = {name: torch.empty(w.shape, dtype=dtype, device="cpu") for name, w in places.items()}
        views = hf_views(c, weights)
        lacks = sorted(views.keys() - stored.keys())[:3]
        check(not lacks, f"{folder}: what config.json describes lacks {', '.join(lacks)}")
        useless = sorted(stored.keys() - views.keys())[:3]
        check(not useless,
              f"{folder}: what config.json describes has no use for {', '.join(useless)}")
        for name, source in stored.items():
            read_tensor(safetensors, source, views[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} is damaged or incomplete ({type(e).__name__}: {e}): get it again") from e
    if c.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    own = hf.get("tokenizer")                                 # what export writes of an encoding
    if own not in encodings():
        own = str((folder / "tokenizer.json").absolute())
    return {"model": weights, "settings": asdict(c), "step": 0, "tokenizer": own}

def on_disk(name: str | Path) -> Path:
    """A path as it is; owner/name[@revision], if it is no path, as the folder of that model in the
    cache of the Hugging Face hub, into which it is fetched if need be."""
    path, spelt = Path(name), re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(.+))?", str(name))
    if path.exists() or path.suffix in (".pt", ".json") or not spelt:
        return path
    hub = need("huggingface_hub", f"{name}, which is no path here,")
    wanted = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(hub.snapshot_download(
            spelt[1], revision=spelt[2], allow_patterns=wanted,
            ignore_patterns=["consolidated*", *(f"*/{pattern}" for pattern in wanted)]))
    except Exception as e:                                    # its own and those of the network
        raise UserError(f"no path {name}, nor is it in the Hugging Face hub's cache or to be had "
                        f"from there ({type(e).__name__}): correct it, go online once, or log in "
                        "with `hf auth login`") from e

def check_whole(folder: Path, name: str | Path) -> None:
    """UserError unless a folder holds one whole model in safetensors; it says how to get there.

    name: what the user calls the folder, its path or its id on the hub.
    """
    def found(pattern: str) -> str:
        return ", ".join(sorted(file.name for file in folder.glob(pattern)))

    adapter, checkpoints = found("adapter_*"), found("*.pt")
    check(not adapter,
          f"{name} has an adapter, {adapter}, which nothing here applies: merge it into its model "
          "first (peft: model.merge_and_unload(), then save_pretrained)")
    check(not checkpoints or found("*.safetensors") != "",
          f"{name} is no model, but holds {checkpoints}: give that")
    if found("model*.safetensors*"):
        check((folder / "config.json").is_file(),
              f"{name} has no config.json, it is no model: correct the path")
        return
    gguf, old = found("*.gguf"), found("pytorch_model*.bin")
    foreign = found("consolidated*") or found("tf_model*")
    check((folder / "config.json").is_file() or gguf != "",
          f"{name} has no config.json, it is no model: correct the path")
    check(gguf + old != "" or not foreign,
          f"{name} has its weights in {foreign}, which transformers cannot read: get "
          "model.safetensors, or all that model.safetensors.index.json names, as well")
    has = "no model.safetensors: get it again, or "
    if gguf or old:
        has = f"its weights in {gguf or old}: "
    which = f", gguf_file='{gguf.split(', ')[0]}'" if gguf else ""
    target = name if folder == Path(name) else "converted"
    raise UserError(f"{name} has {has}convert its weights with python -c \"from transformers "
                    f"import AutoModelForCausalLM as M; M.from_pretrained('{name}'{which})"
                    f".save_pretrained('{target}')\"")

class Stored(NamedTuple):
    """Where a tensor is stored: in a file under a key, there maybe as rows of one expert."""
    file: Path
    key: str
    expert: int | None = None
    row: int = 0                         # the first
    shape: list[int] | None = None       # None: all that is there

def stored_tensors(folder: Path, safetensors: Any) -> dict[str, Stored]:
    """Where each tensor of a folder is, by the name that most families give it."""
    stored = {}
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = {single.name}
    else:
        names = {*json.loads(index.read_text())["weight_map"].values()}
    for name in names:
        check(Path(name).name == name,
              f"{index} names {name}, which is not in its folder: get it again")
    for file in sorted(folder / name for name in names):
        with safetensors.safe_open(file, "pt") as f:
            for key in f.keys():
                if key.endswith("rotary_emb.inv_freq"):                  # of old files: config.json says as much
                    continue
                name = key
                for mixtral, others in MIXTRAL_NAMES.items():
                    name = name.replace(mixtral, others)
                if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                    stored |= experts_of(name, Stored(file, key), f.get_slice(key).get_shape())
                else:
                    stored[name] = Stored(file, key)
    return stored

def experts_of(name: str, source: Stored, shape: list[int]) -> dict[str, Stored]:
    """The matrices of all experts, which some write as one tensor (E, rows, columns): as
    transformers 5 has them in memory, gate above up."""
    prefix, _, kind = name.rpartition(".")
    matrices = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    E, rows, columns = shape
    rows //= len(matrices)
    parts = {}
    for e in range(E):
        for k, matrix in enumerate(matrices):
            part = source._replace(expert=e, row=k * rows, shape=[rows, columns])
            parts[f"{prefix}.{e}.{matrix}.weight"] = part
    return parts

def read_tensor(safetensors: Any, source: Stored, place: Tensor) -> None:
    """Read a stored tensor into its place, some rows at a time: no second copy of it is ever in
    memory."""
    rows = max(1, 2**22 // place[0].numel())
    for start in range(0, len(place), rows):
        # opened anew: what was read stays mapped until it is shut
        with safetensors.safe_open(source.file, "pt") as f:
            whole = f.get_slice(source.key)
            shape, kind = source.shape or whole.get_shape(), whole.get_dtype()
            check(shape == list(place.shape) and kind in ("F64", "F32", "F16", "BF16"),
                  f"{source.file}: {source.key} is {kind} {shape}, "
                  f"config.json says {list(place.shape)}")
            part = place[start:start + rows]
            first = source.row + start
            if source.expert is None:
                part.copy_(whole[first:first + len(part)])
            else:
                part.copy_(whole[source.expert, first:first + len(part)])

def holds(family: str, c: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """The values that a family of transformers can have, of the settings that its config.json has
    no name for."""
    fixed = {"norm": ("pre", "lns")}                                     # LayerNorm Scaling goes into the gains
    if family in ("llama", "qwen2", "qwen3"):
        fixed |= {"n_experts": (0,)}
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe"):
        fixed |= {"qkv_bias": (False,)}
    if family == "qwen2":
        fixed |= {"qkv_bias": (True,)}
    if family in ("qwen3_moe", "olmoe"):
        fixed |= {"shared_hidden": (0,), "shared_gate": (False,)}
    if family == "olmoe":
        fixed |= {"head_dim": (c.n_embd / c.n_head,)}
    if not c.rope_scaling.startswith("llama3:"):
        fixed |= {"rope_scaling": ("",)}
    norms = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
    return fixed | {"qk_norm": (norms.get(family, ""),)}

# What config.json says at any value, and what acts in training alone. A setting that is neither here
# nor in `holds` is refused: one that a fork adds, until somebody says what it is for transformers.
EXPRESSED = {*FIELDS.values(), *MOE_FIELDS.values(), "rope_scaling", "shared_gate", "lb_loss_weight",
             "z_loss_weight", "embed_init_std", "scaled_init"}

def export_family(c: ModelConfig, path: str | Path) -> str:
    """The family of transformers that has all settings of c; UserError names those that the nearest
    one cannot have."""
    families = ("qwen2_moe", "qwen3_moe", "olmoe") if c.n_experts else ("llama", "qwen2", "qwen3")
    misfits: dict[str, list[str]] = {family: [] for family in families}
    for family in families:
        fixed = holds(family, c)
        for f in fields(c):
            value = getattr(c, f.name)
            fits = value in fixed[f.name] if f.name in fixed else f.name in EXPRESSED
            if not fits:
                misfits[family].append(f"{f.name}={value!r}")
        if not misfits[family]:
            return family
    fewest = min(map(len, misfits.values()))
    nearest = [f"{family} cannot have {', '.join(wrong)}" for family, wrong in misfits.items()
               if len(wrong) == fewest]
    raise UserError(f"{path}: no Hugging Face family can be what it is: {'; '.join(nearest)}")

def as_family(model: GPT, family: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Settings and weights of the same function, in the form that the family has."""
    c, weights = replace(model.config, norm="pre"), model.state_dict()
    for layer, block in enumerate(model.blocks):
        for norm in ("attn_norm", "ffn_norm"):
            weights[f"blocks.{layer}.{norm}.weight"] = block.get_submodule(norm).weight * block.scale
    if family == "qwen2_moe":
        # It has biases, and weighs a shared expert by a sigmoid. A gate of zeros halves, so the
        # expert is doubled; where there is no expert, it consists of zeros.
        for name in weights:
            if name.endswith("shared.down.weight") and not c.shared_gate:
                weights[name] = 2 * weights[name]
        c = replace(c, qkv_bias=True, shared_gate=True, shared_hidden=c.shared_hidden or 1)
        with torch.device("meta"):
            places = GPT(c).state_dict()
        for name, place in places.items():
            weights.setdefault(name, torch.zeros(place.shape))
    return c, weights

@torch.no_grad()
def export(path: str | Path, folder: str | Path, tokenizer: str | None = None) -> None:
    """Write a checkpoint as a Hugging Face folder that AutoModelForCausalLM loads; it appears by
    rename.

    tokenizer: its name or path, by default the checkpoint's own.
    """
    safetensors = need("safetensors.torch", "export")
    model, saved = load_model(path)
    family = export_family(model.config, path)
    check_finite(model, path)
    hf_views(model.config, model.state_dict())               # refuses weights that have no name
    c, weights = as_family(model, family)
    views = {name: view.contiguous() for name, view in hf_views(c, weights).items()}
    named = FIELDS | MOE_FIELDS if c.n_experts else FIELDS
    hf = {theirs: getattr(c, ours) for theirs, ours in named.items()}
    hf |= {"model_type": family, "architectures": [family.title().replace("_", "") + "ForCausalLM"],
           "torch_dtype": "float32", "hidden_act": "silu"}
    if family == "olmoe":
        hf["intermediate_size"] = c.expert_hidden
    if c.rope_scaling:
        *factors, context = model.blocks[0].attn.rope.scaling
        hf["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(LLAMA3_FIELDS, (*factors, int(context))))
    out = Path(folder)
    try:
        check(not out.exists() or not any(out.iterdir()), f"{out} is not empty: choose another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
            new = Path(tmp) / out.name
            new.mkdir()
            safetensors.torch.save_file(views, new / "model.safetensors", metadata={"format": "pt"})
            tokenizer = tokenizer or saved["tokenizer"]
            write_json(new / "config.json", write_tokenizer(tokenizer, new) | hf)
            keep_as_written(new, family, tokenizer)
            if not any(new.glob("*token*")):
                print(f"{out}: tokenizer {tokenizer} not written, "
                      "there is no Hugging Face form of it")
            os.replace(new, out)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"cannot write {out} ({e}): free some space or choose another folder") from e
    print(f"{out}: {path} as {hf['architectures'][0]} in float32")

AS_WRITTEN = '''"""transformers 5 keeps the words and merges of qwen2 folders but cuts texts as Qwen2
does, unless tokenizer_config.json has an auto_map: then it takes tokenizer.json as written."""
from transformers import PreTrainedTokenizerFast


class AsWritten(PreTrainedTokenizerFast):
    pass
'''

def keep_as_written(folder: Path, family: str, name: str) -> None:
    """Have AutoTokenizer read tokenizer.json as it is, and not as the family's own would be; name:
    of the tokenizer that was copied."""
    if not (folder / "tokenizer.json").is_file():
        return
    said = read_json(folder / "tokenizer_config.json")
    # a class with a name of its own may cut texts in its own way, or put its template in
    wanted = said | {"tokenizer_class": "PreTrainedTokenizerFast"}
    with contextlib.suppress(UserError):                      # there may be no end
        enc = get_tokenizer(name)
        if isinstance(enc, FolderTokenizer):                  # the class may have given its own
            wanted.setdefault("eos_token", enc.inner.id_to_token(
                enc.eot_token if enc.eos is None else enc.eos))
            if enc.bos is not None:
                wanted.setdefault("bos_token", enc.inner.id_to_token(enc.bos))
    if family == "qwen2":
        # the entry is enough; the class is asked for where remote code is trusted
        name = "tokenization_as_written.AsWritten"
        wanted["auto_map"] = {"AutoTokenizer": [name, name]}
        (folder / "tokenization_as_written.py").write_text(AS_WRITTEN)
    if wanted != said:
        write_json(folder / "tokenizer_config.json", wanted)

# ---- tasks: multiple choice, as OLMES writes it --------------------------------------------------
class Task(NamedTuple):
    """Multiple-choice questions. A request is one choice of one question."""
    requests: list[dict[str, Any]]       # context, continuation, doc_id, idx and label, the idx of the right choice
    primary: str                         # which of METRICS its authors report
    pairs: list[tuple[list[int], list[int]]]       # of each request the tokens of its context and its continuation

def read_tasks(paths: Sequence[str], tokenizer: str, vocab_size: int) -> dict[str, Task]:
    """The tasks in OLMES's format in and under the folders, by what each one's path does not share
    with the rest."""
    enc, tasks, folders = get_tokenizer(tokenizer), {}, []
    for path in paths:
        found = sorted(file.parent.resolve() for file in Path(path).rglob("requests.jsonl.gz"))
        check(len(found) > 0, f"--tasks {path}: no requests.jsonl.gz there")
        folders += found
    root = os.path.commonpath([folder.parent for folder in folders])
    for folder in folders:
        name = folder.relative_to(root).as_posix()
        check(name not in ("average", *tasks),
              f"--tasks: {folder} would be another {name!r}: rename it, give it once")
        tasks[name] = read_task(folder, enc)
        highest = max(max(context + continuation) for context, continuation in tasks[name].pairs)
        check(highest < vocab_size,
              f"--tokenizer {tokenizer} has tokens beyond vocab_size={vocab_size}: name another")
    return tasks

def read_requests(folder: Path) -> list[dict[str, Any]]:
    """The requests of a task, each there once; those of one doc_id are about one question."""
    requests, questions, seen = [], {}, set()
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
        for row in map(json.loads, f):
            doc_id = row["doc_id"]
            if doc_id >= 1_000_000:                                  # no question
                continue
            idx, label = row["idx"], row["label"]
            question = label, row.get("doc"), row.get("native_id")
            check(questions.setdefault(doc_id, question) == question,
                  f"--tasks: {folder} has two questions with doc_id={doc_id}: number them anew")
            check((doc_id, idx) not in seen,
                  f"--tasks: {folder} has doc_id={doc_id}, idx={idx} twice: number them anew")
            seen.add((doc_id, idx))
            requests.append({**row["request"], "doc_id": doc_id, "idx": idx, "label": label})
    return requests

def read_task(folder: Path, enc: Any) -> Task:
    """One task: requests.jsonl.gz and config.json of its folder."""
    try:
        requests = read_requests(folder)
        config = json.loads((folder / "config.json").read_text())
        primary = config["task_config"]["primary_metric"].removesuffix("_raw")
        pairs = [encode_pair(enc, r["context"], r["continuation"]) for r in requests]
        asked = {request["doc_id"] for request in requests}
        answered = {request["doc_id"] for request in requests if request["idx"] == request["label"]}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as e:
        raise UserError(f"--tasks: {folder} holds no multiple choice as OLMES writes it ({e})") from e
    check(primary in METRICS,
          f"--tasks: {folder} has primary_metric={primary}, not {', '.join(METRICS)}")
    check(len(asked) > 0, f"--tasks: {folder} has no questions")
    check(asked == answered,
          f"--tasks: {folder} has a question whose label is the idx of none of its choices")
    check(all(continuation for _, continuation in pairs),
          f"--tasks: {folder} has a choice without a token of its own")
    return Task(requests, primary, pairs)

def encode_pair(enc: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, as lm-evaluation-harness splits them.

    Blanks at the end of the context go to the continuation, which is what follows as many tokens as
    the context has alone, since tokens may merge over the boundary. Special tokens that they spell
    are tokens. A context begins with the BOS of a tokenizer that has the habit; an empty one is the
    BOS of any that defines one, else the end of a document.
    """
    before = enc.encode(context.rstrip(), allowed_special="all")
    whole = enc.encode(context + continuation, allowed_special="all")
    prefix = getattr(enc, "prefix", enc.eot_token)
    if context == "" or before[:1] == [prefix]:
        start = []
    else:
        start = getattr(enc, "start", [])
    if context == "" and whole[:1] == [prefix]:               # spelt out
        return whole[:1], whole[1:]
    return [*start, *before] or [prefix], whole[len(before):]

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

# What the system says of a path that cannot be used, and of a full disk.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)
FULL = (errno.ENOSPC, errno.EFBIG)

def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main. A UserError, an unusable path or a full disk is one line on stderr and
    exit status 2; Ctrl-C is status 130."""
    for stream in (sys.stdout, sys.stderr):      # a terminal that lacks a character shows a ?
        stream.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()                   # raises here if nobody reads on
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)                       # rank 0 says it first, and torchrun stops the others
        stop(str(e))
    except BrokenPipeError:                      # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # or exit would raise again
        sys.exit(141)
    except OSError as e:
        if e.errno in FULL:
            stop(f"cannot write ({e.strerror}): free some space or choose another folder")
        if e.filename and e.errno in UNUSABLE:
            stop(f"cannot use {e.filename} ({e.strerror}): give another path, or mend that")
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)

def stop(mistake: str) -> NoReturn:
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    sys.exit(2)

class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors and whose abbreviations are off."""
    def __init__(self, **kwargs: Any):
        style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(allow_abbrev=False, formatter_class=style, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python {self.prog} --help`")

def main() -> None:
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("name", metavar="NAME",
                        help="python, a file, a folder, fineweb-edu, or OWNER/NAME[:CONFIG] on the hub")
    parser.add_argument("--tokenizer", help="bytes, a tiktoken encoding, a model's folder "
                                            "(default for python: bytes; else: gpt2)")
    parser.add_argument("--out", help="where to put it (default: data/NAME)")
    parser.add_argument("--val_fraction", type=float,
                        help="share of documents (default: 0.05; fineweb-edu: 0.001)")
    parser.add_argument("--max_tokens", type=float, default=math.inf,
                        help="stop after so many, for example 10.5e9")
    parser.add_argument("--field", help="where the text of a row is (default: text, or content)")
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
