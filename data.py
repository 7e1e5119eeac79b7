"""The data: text in, memory-mapped token shards out, and batches that are a pure function of (seed, step).

    python data.py python                              # the sources of torch and of Python itself, as bytes, offline
    python data.py my_texts/ --tokenizer gpt2          # .txt .md .py .jsonl .jsonl.gz .parquet, a file or a folder
    python data.py fineweb-edu --max_tokens 10e9       # the paper's corpus, streamed (needs: pip install datasets)
    python data.py data/python --verify                # read it all again and compare the checksums

A prepared corpus is a folder: meta.json and the token files train_00000.bin, ..., val_00000.bin, ... it lists.
"""
from __future__ import annotations

import contextlib
import difflib
import functools
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import tiktoken
import torch

from model import Parser, UserError, check, need, run

EOT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENT_CHARS = 1 << 16     # a longer .txt, .md or .py file becomes several documents: one big file can be split too
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; what an interrupted preparation has to do again at the most
KINDS = {"bytes": (257, 256, "uint16"), "gpt2": (50257, 50256, "uint16")}      # vocabulary, EOT and dtype of a corpus
BATCH_DOCUMENTS = 256        # handed to the encoder's threads at a time

@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding by name, a tokenizer.json or its folder by path, or "bytes": 256 bytes and EOT, offline."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known and Path(name).exists():
        return folder_tokenizer(Path(name))
    hint = "".join(f" (did you mean {close!r}?)" for close in difflib.get_close_matches(name, known, n=1))
    check(name in known, f"no tokenizer {name!r}{hint}; there are: {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:      # requests' errors are OSErrors; a damaged cache is a ValueError
        raise UserError(f"tiktoken could not fetch {name!r} ({type(e).__name__}): go online once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes") from e

def folder_tokenizer(path: Path) -> SimpleNamespace:
    """A tokenizer.json of Hugging Face, or that of a folder, with what is used here of tiktoken.Encoding."""
    tokenizers = need("tokenizers", f"reading {path}")
    file, said = (path / "tokenizer.json" if path.is_dir() else path).resolve(), {}
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
        for other in ("tokenizer_config.json", "generation_config.json", "config.json"):         # the last has the say
            if (file.parent / other).is_file():
                said |= {k: v for k, v in json.loads((file.parent / other).read_text()).items() if v is not None}
    except Exception as e:                      # all that tokenizers raises
        raise UserError(f"{file} is missing or damaged ({e}): get it again") from e
    inner.encode_special_tokens = True          # as text: a document that spells <|endoftext|> does not end there
    inner.no_truncation()
    token = said.get("eos_token", "")
    token = inner.token_to_id(token["content"] if isinstance(token, dict) else token)
    eos = np.atleast_1d(said.get("eos_token_id", token))[0]                        # the first, where there are several
    check(eos is not None, f"{file.parent}: no config.json there has an eos_token_id, which ends documents")
    encode = functools.partial(inner.encode, add_special_tokens=False)
    return SimpleNamespace(
        name=str(file), n_vocab=max(inner.get_vocab().values()) + 1, eot_token=int(eos),
        start=inner.encode("").ids,                            # what every text begins with: Llama's BOS
        encode_ordinary=lambda text: encode(text).ids, decode=lambda ids: inner.decode(ids, skip_special_tokens=False),
        encode_to_numpy=lambda text, **_: np.array(encode(text).ids, dtype=np.int64))

def write_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """Write a tokenizer so that AutoTokenizer gives the same ids; returns what config.json has to say of it."""
    if Path(name).suffix == ".json":            # of another folder
        for file in [*Path(name).parent.glob("*token*.json"), *Path(name).parent.glob("generation_config.json")]:
            (folder / file.name).write_bytes(file.read_bytes())
        with contextlib.suppress(UserError):    # there may be none, or one without an end of text
            return {"eos_token_id": get_tokenizer(name).eot_token}
        return {}
    enc = get_tokenizer(name)
    if name in ("bytes", "gpt2"):
        letter = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}     # as GPT-2 writes bytes
        letter |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)}
        ids = {"".join(letter[b] for b in enc.decode_single_token_bytes(i)): i for i in range(enc.eot_token)}
        merges = [(x[:k], x[k:]) for x in ids for k in range(1, len(x)) if x[:k] in ids and x[k:] in ids]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "gpt2"}
        end = {"id": enc.eot_token, "content": EOT, "special": True, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False}
        write_json(folder / "tokenizer.json", {
            "version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": ids, "merges": merges}})
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT})
    else:
        print(f"{folder}: tokenizer {name} not written, it has no Hugging Face form here")
    return {"tokenizer": name, "eos_token_id": enc.eot_token}

# ---- reading: a prepared corpus --------------------------------------------------------------------------------------
class Corpus:
    """A prepared corpus. Tokens stay on disk; windows of T + 1 tokens are read as they are asked for."""

    def __init__(self, folder: str | Path):
        self.folder, header = Path(folder), Path(folder) / "meta.json"
        check(header.is_file(), f"no prepared corpus at {folder}: make one with `python data.py NAME --out {folder}`")
        self.arrays, self.starts = {}, {}
        try:
            self.meta = json.loads(header.read_text())
            self.tokenizer, self.vocab_size = str(self.meta["tokenizer"]), int(self.meta["vocab_size"])
            kind = self.vocab_size, self.meta["eot"], self.meta["dtype"]
            check(kind == KINDS.get(self.tokenizer, kind), f"{header}: vocab_size={kind[0]}, eot={kind[1]} and "
                  f"dtype={kind[2]} are not those of {self.tokenizer}: prepare the corpus again")
            dtype = np.dtype(kind[2])
            for split in ("train", "val"):
                files = [(self.folder / shard["file"], shard["tokens"]) for shard in self.meta[split]["shards"]]
                for path, n in files:
                    check(path.is_file() and path.stat().st_size == n * dtype.itemsize,
                          f"{path} is not the file of {n:,} tokens that meta.json says: prepare the corpus again")
                self.arrays[split] = [np.memmap(path, dtype=dtype, mode="r") for path, _ in files]
                self.starts[split] = np.cumsum([0] + [n for _, n in files])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{header} is damaged ({e}): prepare the corpus again") from e

    def n_tokens(self, split: str) -> int:
        return int(self.starts[split][-1])

    def n_windows(self, split: str, T: int) -> int:
        """How many windows of T inputs and T targets do not overlap in their inputs."""
        n = (self.n_tokens(split) - 1) // T
        check(n > 0, f"{self.folder}: the {split} split has {self.n_tokens(split)} tokens, too few for block_size={T}")
        return n

    def read(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from position `start` of the split, across shards, as int64."""
        starts = self.starts[split]
        first, last = np.searchsorted(starts, (start, start + n - 1), side="right") - 1
        parts = [self.arrays[split][i][max(start - starts[i], 0):start + n - starts[i]] for i in range(first, last + 1)]
        return np.concatenate(parts).astype(np.int64)

    def batch(self, split: str, windows: Iterable[int], T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (B, T), of the given windows; window i starts at token i T."""
        rows = torch.from_numpy(np.stack([self.read(split, int(i) * T, T + 1) for i in windows]))
        check(bool(rows.max() < self.vocab_size), f"{self.folder}: token {rows.max()} in the {split} split, but "
              f"vocab_size={self.vocab_size} in meta.json: prepare the corpus again")
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

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
    """The windows of the global batch of a step, (per_step,), each once per epoch: a pure function of its arguments."""
    place = np.arange(step * per_step, (step + 1) * per_step)
    return np.array([epoch_order(seed, int(p) // n_windows, n_windows)[int(p) % n_windows] for p in place])

def eval_windows(count: int, n_windows: int) -> np.ndarray:
    """`count` windows spread evenly over a split, always the same."""
    return np.arange(min(count, n_windows)) * n_windows // min(count, n_windows)

# ---- writing: documents in, shards out -------------------------------------------------------------------------------
def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", "fineweb-edu", a file or a folder."""
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
        check(len(paths) > 0, f"no {' '.join(SUFFIXES)} file at {source}; NAME is python, fineweb-edu or a path")
        for path in paths:
            if path.suffix == ".parquet":
                yield from stream_dataset("parquet", data_files=str(path))
            else:
                yield from (read_jsonl if path.name.endswith((".jsonl", ".jsonl.gz")) else read_text)(path)

def read_text(path: Path) -> Iterator[str]:
    """A text file as one document, or several if it is long: cut where no token is lost, if such a place comes."""
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
        text = ""
        while line := f.readline(DOCUMENT_CHARS):
            # every tiktoken encoding starts a new piece where a letter follows a newline that follows no whitespace
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
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip() and (text := json.loads(line)["text"]) is not None:  # half a surrogate pair: U+FFFD
                    yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}, near line {number}: no JSON object with a \"text\" ({e})") from e

def stream_dataset(path: str, **kwargs: Any) -> Iterator[str]:
    """The "text" of a Hugging Face data set's train split, streamed: nothing but the current rows is held."""
    where = kwargs.get("data_files", path)
    datasets = need("datasets", f"reading {where}")
    try:
        rows = datasets.load_dataset(path, split="train", streaming=True, **kwargs)
        yield from ("" + row["text"] for row in rows if row["text"] is not None)     # a TypeError where it is no string
    except Exception as e:      # its own errors, Arrow's and the network's
        raise UserError(f"could not read {where} ({type(e).__name__}: {str(e)[:80]!r}): run it again to go on") from e

def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = float("inf"), docs: Callable[[str], Iterator[str]] = documents) -> Path:
    """Encode a source into token shards under `out`; called again after an interruption it goes on where it was.

    Every document ends with EOT; every 1/val_fraction-th one, the first included, is validation. progress.json says
    what the shards cover so far; in the end it is renamed to meta.json: a folder that has that is complete.
    """
    check(0 < val_fraction <= 0.5 and max_tokens > 0,
          f"val_fraction={val_fraction} must be above 0 and at most 0.5, max_tokens={max_tokens} above 0")
    out, enc = Path(out), get_tokenizer(tokenizer)
    request = {"source": source, "tokenizer": enc.name, "val_fraction": val_fraction, "max_tokens": str(max_tokens)}
    meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token,
            "dtype": "uint16" if enc.n_vocab <= 1 << 16 else "uint32", "request": request, "documents": 0,
            "train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
    header, progress = out / "meta.json", out / "progress.json"
    before = header if header.exists() else progress
    try:
        if before.exists():
            meta = json.loads(before.read_text())
            check(meta["request"] == request,
                  f"{out} holds a corpus prepared with other settings: choose another --out, or delete it")
        if before == header:
            return out
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{before} is damaged: delete {out} and start over") from e
    buffers: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    total, full = meta["train"]["tokens"] + meta["val"]["tokens"], False
    encode = functools.partial(enc.encode_to_numpy, disallowed_special=())                            # releases the GIL
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        rest = itertools.islice(docs(source), meta["documents"], None)
        while not full:
            batch = list(itertools.islice(rest, BATCH_DOCUMENTS))
            for ids in pool.map(encode, batch):
                if total < max_tokens:
                    split = "val" if meta["documents"] % round(1 / val_fraction) == 0 else "train"
                    buffers[split].append(np.append(ids, enc.eot_token).astype(meta["dtype"]))
                    meta["documents"] += 1
                    total += len(ids) + 1
            full = total >= max_tokens or not batch
            if full or total - meta["train"]["tokens"] - meta["val"]["tokens"] >= SHARD_TOKENS:
                write_shards(out, meta, buffers)
            if full or sys.stderr.isatty():
                print(f"\r{out}: {meta['documents']:,} documents, {total / 1e6:,.1f}M tokens",
                      end="\n" * full, file=sys.stderr, flush=True)
        for split in ("train", "val"):
            check(meta[split]["tokens"] > 0, f"{source}: {meta['documents']} documents leave the {split} split empty")
        if enc.n_vocab <= 4096:
            meta["bigram_entropy"] = bigram_entropy(out, meta)
        write_json(progress, meta)
        os.replace(progress, header)
    except OSError as e:
        raise UserError(f"preparing {out} failed ({e}): with that mended the same command resumes it") from e
    return out

def write_shards(out: Path, meta: dict[str, Any], buffers: dict[str, list[np.ndarray]]) -> None:
    """Empty the buffers into a new file for each split, then say in progress.json that they are there."""
    out.mkdir(parents=True, exist_ok=True)
    for split, parts in buffers.items():
        if parts:
            tokens, path = np.concatenate(parts), out / f"{split}_{len(meta[split]['shards']):05d}.bin"
            with open(path, "wb") as f:
                tokens.tofile(f)
                os.fsync(f.fileno())
            meta[split]["shards"].append({"file": path.name, "tokens": len(tokens), "crc32": zlib.crc32(tokens)})
            meta[split]["tokens"] += len(tokens)
            parts.clear()
    write_json(out / "progress.json", meta)

def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file by rename: a reader sees the old one or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1))
    os.replace(tmp, path)

def bigram_entropy(folder: Path, meta: dict) -> float:
    """Entropy of a token given the one before it, over the training split, in nats: a model must get well under it."""
    V = meta["vocab_size"]
    pairs = np.zeros((V, V), dtype=np.int64)
    for shard in meta["train"]["shards"]:
        tokens = np.memmap(folder / shard["file"], dtype=meta["dtype"], mode="r")
        for start in range(0, len(tokens) - 1, 1 << 22):
            piece = tokens[start:start + (1 << 22) + 1].astype(np.int64)
            pairs += np.bincount(piece[:-1] * V + piece[1:], minlength=V * V).reshape(V, V)
    joint = torch.from_numpy(pairs / pairs.sum())
    return float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())       # H(pair) - H(first)

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
    out = prepare(args.name, args.out or Path("data", Path(os.path.abspath(args.name)).name.lstrip(".").split(".")[0]),
                  args.tokenizer or ("bytes" if args.name == "python" else "gpt2"),
                  (0.001 if args.name == "fineweb-edu" else 0.05) if args.val_fraction is None else args.val_fraction,
                  args.max_tokens)
    meta = Corpus(out).meta
    print(f"{out}: {meta['documents']:,} documents, {meta['train']['tokens']:,} training and "
          f"{meta['val']['tokens']:,} validation tokens of {meta['tokenizer']}"
          + (f"; bigram entropy {meta['bigram_entropy']:.3f} nats" if "bigram_entropy" in meta else ""))

if __name__ == "__main__":
    run(main)
