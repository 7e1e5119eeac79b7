"""All that lies on disk: corpora, tokenizers, checkpoints, Hugging Face folders and files of tasks.

    python data.py python                           # the sources of torch and Python, as bytes, offline
    python data.py my_texts/ --tokenizer gpt2       # .txt .md .py .jsonl .jsonl.gz .parquet, or a folder
    python data.py fineweb-edu --max_tokens 10e9    # the paper's, streamed (needs: pip install datasets)
    python data.py data/python --verify             # read it all again and compare the checksums

A prepared corpus is a folder: meta.json and the token files that it lists, train_00000.bin, ...,
val_00000.bin, ... Batches are a pure function of (seed, step), so that a run can go on exactly where
it was.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import gzip
import itertools
import json
import os
import re
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import GPT, ModelConfig, UserError, check

EOT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENT_CHARS = 1 << 16     # a longer text file becomes several documents: so one big file has a split
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; an interrupted preparation has to do so much again
BATCH_DOCUMENTS = 256        # handed to the encoder's threads at a time
KINDS = {"bytes": (257, 256, "uint16"), "gpt2": (50257, 50256, "uint16")}      # vocabulary, EOT, dtype
METRICS = ("acc", "acc_per_char", "acc_per_token")      # of tasks: the likeliest choice, or per ...

# ---- reading: a prepared corpus ------------------------------------------------------------------
class Corpus:
    """A prepared corpus. Tokens stay on disk; windows of T + 1 tokens are read as they are asked
    for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        header = self.folder / "meta.json"
        check(header.is_file(), f"no prepared corpus at {folder}: "
                                f"make one with `python data.py NAME --out {folder}`")
        self.arrays: dict[str, list[np.ndarray]] = {}         # of each split, a memory map per shard
        self.starts: dict[str, np.ndarray] = {}               # and where each begins, and the end
        try:
            self.meta = json.loads(header.read_text())
            self.tokenizer = str(self.meta["tokenizer"])
            self.vocab_size = int(self.meta["vocab_size"])
            kind = self.vocab_size, self.meta["eot"], self.meta["dtype"]
            check(kind == KINDS.get(self.tokenizer, kind),
                  f"{header}: vocab_size={kind[0]}, eot={kind[1]} and dtype={kind[2]} are not those of "
                  f"{self.tokenizer}: prepare the corpus again")
            for split in ("train", "val"):
                self.open_split(split, np.dtype(self.meta["dtype"]))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{header} is damaged ({e}): prepare the corpus again") from e

    def open_split(self, split: str, dtype: np.dtype) -> None:
        """Map the shards of a split, which must be as long as meta.json says."""
        self.arrays[split] = []
        lengths = [0]
        for shard in self.meta[split]["shards"]:
            path, n = self.folder / shard["file"], shard["tokens"]
            check(path.is_file() and path.stat().st_size == n * dtype.itemsize,
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
                check(zlib.crc32(array) == shard["crc32"],
                      f"{self.folder / shard['file']} is damaged (checksum): prepare the corpus again")

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

# ---- writing: documents in, shards out -----------------------------------------------------------
def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", "fineweb-edu", a file or a
    folder."""
    if source == "python":
        for root in (Path(torch.__file__).parent, Path(os.__file__).parent):
            for path in sorted(root.rglob("*.py")):
                if "site-packages" not in path.relative_to(root).parts:
                    yield from read_text(path)
    elif source == "fineweb-edu":
        yield from stream_dataset("HuggingFaceFW/fineweb-edu", name="sample-100BT")
    else:
        files = (p for p in (Path(source), *Path(source).rglob("*")) if p.is_file())
        paths = sorted(p for p in files if p.name.endswith(SUFFIXES))
        check(len(paths) > 0, f"no {' '.join(SUFFIXES)} file at {source}; "
                              "NAME is python, fineweb-edu or a path")
        for path in paths:
            if path.suffix == ".parquet":
                yield from stream_dataset("parquet", data_files=str(path))
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from read_jsonl(path)
            else:
                yield from read_text(path)

def read_text(path: Path) -> Iterator[str]:
    """A text file as one document, or several if it is long: cut where no token is lost, if such a
    place comes."""
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
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

def read_jsonl(path: Path) -> Iterator[str]:
    """The "text" of every line of a .jsonl or .jsonl.gz file."""
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                text = json.loads(line)["text"]
                if text is not None:
                    # JSON may hold half of a surrogate pair, which has no UTF-8: U+FFFD instead
                    yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}, near line {number}: no JSON object with a \"text\" ({e})") from e

def stream_dataset(path: str, **kwargs: Any) -> Iterator[str]:
    """The "text" of a Hugging Face data set's train split, streamed: nothing but the current rows
    is held."""
    where = kwargs.get("data_files", path)
    datasets = need("datasets", f"reading {where}")
    try:
        rows = datasets.load_dataset(path, split="train", streaming=True, **kwargs)
        for row in rows:
            if row["text"] is not None:
                yield "" + row["text"]                        # a TypeError where it is no string
    except Exception as e:      # its own errors, Arrow's and the network's
        raise UserError(f"could not read {where} ({type(e).__name__}: {str(e)[:80]!r}): "
                        "run it again to go on") from e

def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = float("inf"), docs: Callable[[str], Iterator[str]] = documents) -> Path:
    """Encode a source into token shards under `out`; called again after an interruption it goes on
    where it was.

    Every document ends with EOT; every 1/val_fraction-th one, the first included, is validation.
    progress.json says what the shards cover so far; in the end it is renamed to meta.json: a folder
    that has that is complete.
    """
    check(0 < val_fraction <= 0.5 and max_tokens > 0,
          f"val_fraction={val_fraction} must be above 0 and at most 0.5, max_tokens={max_tokens} above 0")
    out, enc = Path(out), get_tokenizer(tokenizer)
    request = {"source": source, "tokenizer": enc.name, "val_fraction": val_fraction,
               "max_tokens": str(max_tokens)}
    meta = prepared_so_far(out, request)
    if meta is None:
        dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token, "dtype": dtype,
                "request": request, "documents": 0,
                "train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
    if (out / "meta.json").exists():
        return out
    try:
        rest = itertools.islice(docs(source), meta["documents"], None)
        encode_documents(rest, out, meta, enc, round(1 / val_fraction), max_tokens)
        for split in ("train", "val"):
            check(meta[split]["tokens"] > 0,
                  f"{source}: {meta['documents']} documents leave the {split} split empty")
        if enc.n_vocab <= 4096:
            meta["bigram_entropy"] = bigram_entropy(out, meta)
        write_json(out / "progress.json", meta)
        os.replace(out / "progress.json", out / "meta.json")
    except OSError as e:
        raise UserError(f"preparing {out} failed ({e}): with that mended the same command resumes it") from e
    return out

def prepared_so_far(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What meta.json, or progress.json of an interrupted preparation, says; None if there is
    neither."""
    for file in (out / "meta.json", out / "progress.json"):
        if not file.exists():
            continue
        try:
            meta = json.loads(file.read_text())
            same = meta["request"] == request
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file} is damaged: delete {out} and start over") from e
        check(same, f"{out} holds a corpus prepared with other settings: "
                    "choose another --out, or delete it")
        return meta
    return None

def encode_documents(docs: Iterator[str], out: Path, meta: dict[str, Any], enc: Any, every: int,
                     max_tokens: float) -> None:
    """Write documents as shards until there are no more, or max_tokens are reached; meta says what
    is written.

    Document number 0, `every`, 2 `every`, ... of the corpus is validation.
    """
    encode = functools.partial(enc.encode_to_numpy, disallowed_special=())  # releases the GIL: threads help
    pool = ThreadPoolExecutor(os.cpu_count())
    buffers: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    written = total = meta["train"]["tokens"] + meta["val"]["tokens"]
    done = False
    while not done:
        batch = list(itertools.islice(docs, BATCH_DOCUMENTS))
        for ids in pool.map(encode, batch):
            if total >= max_tokens:
                break
            split = "val" if meta["documents"] % every == 0 else "train"
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
    """Replace a JSON file by rename: a reader sees the old one or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1))
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
@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding by name, a tokenizer.json or its folder by path, or "bytes": 256 bytes
    and EOT, offline."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known and Path(name).exists():
        return folder_tokenizer(Path(name))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    check(name in known, f"no tokenizer {name!r}{hint}; there are: {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:      # requests' errors are OSErrors; a damaged cache is a ValueError
        raise UserError(f"tiktoken could not fetch {name!r} ({type(e).__name__}): go online once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes") from e

def folder_tokenizer(path: Path) -> FolderTokenizer:
    """A tokenizer.json of Hugging Face, or that of a folder."""
    tokenizers = need("tokenizers", f"reading {path}")
    file = (path / "tokenizer.json" if path.is_dir() else path).resolve()
    said: dict[str, Any] = {}                                 # about special tokens, the last has the say
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
        for other in ("tokenizer_config.json", "generation_config.json", "config.json"):
            if (file.parent / other).is_file():
                values = json.loads((file.parent / other).read_text())
                said |= {name: value for name, value in values.items() if value is not None}
    except Exception as e:                                    # all that tokenizers raises
        raise UserError(f"{file} is missing or damaged ({e}): get it again") from e
    inner.encode_special_tokens = True      # as text: a document that spells <|endoftext|> goes on
    inner.no_truncation()
    token = said.get("eos_token", "")
    token = inner.token_to_id(token["content"] if isinstance(token, dict) else token)
    eos = np.atleast_1d(said.get("eos_token_id", token))[0]   # the first, where there are several
    check(eos is not None,
          f"{file.parent}: no config.json there has an eos_token_id, which ends documents")
    return FolderTokenizer(str(file), inner, int(eos))

class FolderTokenizer:
    """A tokenizer of the tokenizers package, with what is used here of tiktoken.Encoding."""

    def __init__(self, name: str, inner: Any, eot_token: int):
        self.name, self.inner, self.eot_token = name, inner, eot_token
        self.n_vocab = max(inner.get_vocab().values()) + 1
        self.start = inner.encode("").ids                     # what every text begins with: Llama's BOS

    def encode_ordinary(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text: str, disallowed_special: Any = ()) -> np.ndarray:
        return np.array(self.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

def write_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """Write a tokenizer so that AutoTokenizer gives the same ids; returns what config.json has to
    say of it."""
    if Path(name).suffix == ".json":                          # of another folder
        source = Path(name).parent
        for file in (*source.glob("*token*.json"), *source.glob("generation_config.json")):
            (folder / file.name).write_bytes(file.read_bytes())
        with contextlib.suppress(UserError):                  # there may be none, or one without an end
            return {"eos_token_id": get_tokenizer(name).eot_token}
        return {}
    enc = get_tokenizer(name)
    if name in ("bytes", "gpt2"):
        write_json(folder / "tokenizer.json", byte_level_bpe(enc, splits_words=name == "gpt2"))
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT})
    else:
        print(f"{folder}: tokenizer {name} not written, it has no Hugging Face form here")
    return {"tokenizer": name, "eos_token_id": enc.eot_token}

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

def load_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The dict that train.py saved: model, optimizer, settings, step, ...; of a Hugging Face folder
    a part of that, the model in `dtype`. Nothing in it is executed, and what is not used is not
    read. UserError if it is not sound."""
    if (Path(path) / "config.json").is_file():
        return load_hf(Path(path), dtype)
    check(Path(path).is_file(), f"no checkpoint {path}: "
                                "make one with `python train.py CONFIG.py`, or correct the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                               # damaged bytes make torch raise almost anything
        raise UserError(f"{path} is damaged or no checkpoint ({e!r:.90}): use another copy") from e
    kinds = {"model": dict, "settings": dict, "tokenizer": str}
    sound = isinstance(saved, dict) and all(isinstance(saved.get(key), kinds[key]) for key in kinds)
    check(sound, f"{path} lacks {', '.join(kinds)}: it is not a checkpoint of train.py")
    for f in fields(ModelConfig):
        value = saved["settings"].get(f.name, f.default)
        kind = (int, float) if isinstance(f.default, float) else type(f.default)
        check(isinstance(value, kind), f"{path}: {f.name}={value!r} is no {f.type}")
    return saved

def check_weights(model: GPT, saved: dict[str, Any], path: str | Path) -> None:
    """UserError where a checkpoint's weights are not those that the model has places for."""
    have = {name: tuple(w.shape) for name, w in saved["model"].items() if isinstance(w, Tensor)}
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(saved["model"].keys() | want.keys()):
        check(name in want, f"{path}: weights and settings disagree: the model has no {name}")
        check(name in have, f"{path}: weights and settings disagree: {name} is missing")
        check(have[name] == want[name],
              f"{path}: weights and settings disagree: {name} is {have[name]}, not {want[name]}")

def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint or Hugging Face folder in eval mode, and the checkpoint itself."""
    saved = load_checkpoint(path, dtype)
    known = {f.name for f in fields(ModelConfig)}
    settings = {name: value for name, value in saved["settings"].items() if name in known}
    config = ModelConfig(**settings)
    with torch.device("meta"):
        model = GPT(config)
    check_weights(model, saved, path)
    model.load_state_dict(saved["model"], assign=True)                # takes the tensors themselves: no copy
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.blocks[0].attn.rope.to_empty(device="cpu").reset()
    return model.to(device, dtype).eval(), saved

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
        "mlp_only_layers": [], "partial_rotary_factor": 1, "use_mrope": False}
HARMLESS = """model_type architectures dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id
    pad_token_id unk_token_id tokenizer attention_dropout router_jitter_noise router_aux_loss_coef output_router_logits
    pretraining_tp max_window_layers layer_types sliding_window use_sliding_window rope_scaling rope_parameters
    rope_type type is_llama_config rope_interleaved transformers.js_config""".split()
TOP_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}  # ours: theirs
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",  # in a block
         "attn.proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
         "ffn.router": "mlp.gate", "ffn.shared_gate": "mlp.shared_expert_gate"}
for matrix in ("gate", "up", "down"):
    NAMES[f"ffn.{matrix}"] = f"mlp.{matrix}_proj"
    NAMES[f"ffn.shared.{matrix}"] = f"mlp.shared_expert.{matrix}_proj"

MIXTRAL_NAMES = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

def hf_config(hf: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json of transformers 4 (rope_theta, rope_scaling) or 5
    (rope_parameters) means; UserError names what the model lacks, and any field that is not known
    to leave the function alone."""
    hf = hf | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})  # its fields as the others
    family = hf.get("model_type")
    check(family in FAMILIES, f"{path}: model_type={family!r} is none of {', '.join(FAMILIES)}")
    rope = hf.get("rope_type") or hf.get("type") or "default"
    check(rope in ("default", "llama3"),
          f"{path}: rope_type={rope} is not supported, only default and llama3 are")
    if family == "mistral":
        hf = {"sliding_window": 4096} | hf                                # its default is not null
    hf = {name: value for name, value in hf.items() if value is not None}
    known = {*FIELDS, *MOE_FIELDS, *ONLY, *HARMLESS}
    if rope == "llama3":
        known.update(LLAMA3_FIELDS)
    for name, value in hf.items():
        check(value == ONLY.get(name, value),
              f"{path}: {name}={value!r} is not supported, only {ONLY.get(name)!r} is")
        check(name in known or name.startswith("_"),
              f"{path}: {name}={value!r} is unknown and may change what the model computes: "
              "if not, delete it there")
    for name in ("num_attention_heads", "max_position_embeddings"):       # no tensor's shape tells these
        check(name in hf, f"{path} lacks {name}")

    values = dict(FAMILIES[family])
    for theirs, ours in (FIELDS | MOE_FIELDS).items():
        if theirs in hf:
            values[ours] = hf[theirs]
    if "n_experts" in values:
        values.setdefault("expert_hidden", hf.get("intermediate_size"))
    if rope == "llama3":
        values["rope_scaling"] = "llama3:" + ",".join(str(hf[name]) for name in LLAMA3_FIELDS)
    values["block_size"] = context_length(hf, family, path)
    return ModelConfig(**values)

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
        if rest in ("ffn.gate", "ffn.up", "ffn.down"):                 # of all experts, (E, in, out)
            for e, expert in enumerate(w):
                views[f"{prefix}mlp.experts.{e}.{kind}_proj.weight"] = expert.T
        elif module == "attn.qkv":
            for x, part in zip("qkv", w.split(widths)):
                views[f"{prefix}self_attn.{x}_proj.{kind}"] = part
        elif name == "head.weight" and c.tie_embeddings:
            continue
        elif module in names:
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
        for name, (file, key) in stored.items():
            read_tensor(safetensors, file, key, views[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} is damaged or incomplete ({type(e).__name__}: {e}): get it again") from e
    if c.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return {"model": weights, "settings": asdict(c), "step": 0,
            "tokenizer": hf.get("tokenizer", str((folder / "tokenizer.json").resolve()))}

def stored_tensors(folder: Path, safetensors: Any) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a folder is, its file and its name there, by the name that most families
    give it."""
    stored = {}
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    else:
        names = json.loads(index.read_text())["weight_map"].values()
    for file in sorted({folder / name for name in names}):
        with safetensors.safe_open(file, "pt") as f:
            for key in f.keys():
                if key.endswith("rotary_emb.inv_freq"):                  # of old files: config.json says as much
                    continue
                name = key
                for mixtral, others in MIXTRAL_NAMES.items():
                    name = name.replace(mixtral, others)
                stored[name] = file, key
    return stored

def read_tensor(safetensors: Any, file: Path, key: str, place: Tensor) -> None:
    """Read a stored tensor into its place, some rows at a time: no second copy of it is ever in
    memory."""
    rows = max(1, 2**22 // place[0].numel())
    for start in range(0, len(place), rows):
        with safetensors.safe_open(file, "pt") as f:         # anew: what was read stays mapped until it is shut
            part = f.get_slice(key)
            shape, kind = part.get_shape(), part.get_dtype()
            check(shape == list(place.shape) and kind in ("F64", "F32", "F16", "BF16"),
                  f"{file}: {key} is {kind} {shape}, config.json says {list(place.shape)}")
            place[start:start + rows].copy_(part[start:start + rows])

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
    norms = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
    return fixed | {"qk_norm": (norms.get(family, ""),)}

# What config.json says at any value, and what acts in training alone. A setting that is neither here
# nor in `holds` is refused: one that a fork adds, until somebody says what it is for transformers.
EXPRESSED = {*FIELDS.values(), *MOE_FIELDS.values(), "rope_scaling", "shared_gate", "lb_loss_weight",
             "z_loss_weight"}

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
            write_json(new / "config.json", hf | write_tokenizer(tokenizer or saved["tokenizer"], new))
            os.replace(new, out)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"cannot write {out} ({e}): free some space or choose another folder") from e
    print(f"{out}: {path} as {hf['architectures'][0]} in float32")

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

def read_task(folder: Path, enc: Any) -> Task:
    """One task: requests.jsonl.gz and config.json of its folder."""
    try:
        requests = []
        with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
            for row in map(json.loads, f):
                if row["doc_id"] < 1_000_000:                        # beyond: no question
                    about = {key: row[key] for key in ("doc_id", "idx", "label")}
                    requests.append({**row["request"], **about})
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
    the context has alone, since tokens may merge over the boundary. A context begins with the BOS
    of a tokenizer that has the habit.
    """
    before = enc.encode_ordinary(context.rstrip())
    whole = enc.encode_ordinary(context + continuation)
    start = [*getattr(enc, "start", ()), *before]
    return start or [enc.eot_token], whole[len(before):]

# ---- the command line, and what all scripts share of it ------------------------------------------
def need(package: str, purpose: str) -> Any:
    """Import an optional package, which comes back as its top level, or say how to get it."""
    try:
        return __import__(package)
    except ImportError as e:
        raise UserError(f"{purpose} needs {package}: pip install {package.split('.')[0]}") from e

def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError is one line on stderr and exit status 2, Ctrl-C is status
    130."""
    try:
        main()
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)               # what rank 0 says as well is said once: torchrun stops us meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
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
    parser.add_argument("name", metavar="NAME", help="python, fineweb-edu, or a file or folder of texts")
    parser.add_argument("--tokenizer", help="bytes, a tiktoken encoding, a model's folder (python: bytes; else: gpt2)")
    parser.add_argument("--out", help="where to put it (default: data/NAME)")
    parser.add_argument("--val_fraction", type=float, help="share of documents (default: 0.05; fineweb-edu: 0.001)")
    parser.add_argument("--max_tokens", type=float, default=float("inf"), help="stop after so many, for example 10e9")
    parser.add_argument("--verify", action="store_true", help="NAME is a prepared folder: compare its checksums")
    args = parser.parse_args()
    if args.verify:
        Corpus(args.name).verify()
        return print(f"{args.name}: every checksum matches")
    stem = Path(os.path.abspath(args.name)).name.lstrip(".").split(".")[0]
    tokenizer = args.tokenizer or ("bytes" if args.name == "python" else "gpt2")
    val_fraction = args.val_fraction
    if val_fraction is None:
        val_fraction = 0.001 if args.name == "fineweb-edu" else 0.05
    out = prepare(args.name, args.out or Path("data", stem), tokenizer, val_fraction, args.max_tokens)
    meta = Corpus(out).meta
    line = (f"{out}: {meta['documents']:,} documents, {meta['train']['tokens']:,} training and "
            f"{meta['val']['tokens']:,} validation tokens of {meta['tokenizer']}")
    if "bigram_entropy" in meta:
        line += f"; bigram entropy {meta['bigram_entropy']:.3f} nats"
    print(line)

if __name__ == "__main__":
    run(main)
