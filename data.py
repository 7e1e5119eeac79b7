"""The data: text in, memory-mapped token shards out, and batches that are a pure function of (seed, step).

    python data.py python                              # the sources of torch and of Python itself, as bytes, offline
    python data.py my_texts/ --tokenizer gpt2          # .txt .md .py .jsonl .jsonl.gz .parquet, a file or a folder
    python data.py fineweb-edu --max_tokens 10e9       # the paper's corpus, streamed (needs: pip install datasets)
    python data.py data/python --verify                # read it all again and compare the checksums

A prepared corpus is a folder: meta.json and the token files train_00000.bin, ..., val_00000.bin, ... it lists.
"""
from __future__ import annotations

import difflib
import functools
import gzip
import itertools
import json
import os
import shutil
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import Parser, UserError, check, need, run

EOT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENT_CHARS = 1 << 16     # a longer .txt, .md or .py file becomes several documents: one big file can be split too
SHARD_TOKENS = 1 << 25       # 64 MB in uint16; what an interrupted preparation has to do again at the most
BATCH_CHARS = 1 << 22        # text handed to the encoder's threads at a time


@functools.lru_cache(maxsize=None)
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding by name, a tokenizer.json or its folder by path, or "bytes": 256 bytes and EOT, offline."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens={EOT: 256})
    known = tiktoken.list_encoding_names()
    if name not in known and Path(name).exists():
        return folder_tokenizer(Path(name))
    if name not in known:
        close = difflib.get_close_matches(name, known + ["bytes"], n=1)
        raise UserError(f"no tokenizer {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
                        + f" There are: bytes, {', '.join(known)}")
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

    def encode(text: str, **_: Any) -> list[int]:
        return inner.encode(text, add_special_tokens=False).ids
    return SimpleNamespace(
        name=str(file), n_vocab=max(inner.get_vocab().values()) + 1, eot_token=int(eos), encode_ordinary=encode,
        start=inner.encode("").ids,                            # what every text begins with: Llama's BOS
        encode_to_numpy=lambda text, **_: np.array(encode(text), dtype=np.int64),
        decode=lambda ids: inner.decode(ids, skip_special_tokens=False))


def write_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """Write a tokenizer so that AutoTokenizer gives the same ids; returns what config.json has to say of it."""
    if Path(name).suffix == ".json":            # of another folder
        for file in [*Path(name).parent.glob("*token*.json"), *Path(name).parent.glob("generation_config.json")]:
            shutil.copy(file, folder)
        return {}
    enc = get_tokenizer(name)
    if name in ("bytes", "gpt2"):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]          # GPT-2 writes each byte as a letter
        other = [b for b in range(256) if b not in printable]
        letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(other)}
        ids = {"".join(letter[b] for b in enc.decode_single_token_bytes(i)): i for i in range(enc.eot_token)}
        merges = [(x[:k], x[k:]) for x in ids for k in range(1, len(x)) if x[:k] in ids and x[k:] in ids]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "gpt2"}
        end = {"id": enc.eot_token, "content": EOT, "special": True}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
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
        self.folder = Path(folder)
        header = self.folder / "meta.json"
        check(header.is_file(), f"no prepared corpus at {folder}: make one with `python data.py NAME --out {folder}`")
        try:
            self.meta = json.loads(header.read_text())
            self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            dtype = np.dtype(self.meta["dtype"])
            self.shards = {split: self.meta[split]["shards"] for split in ("train", "val")}
            check(isinstance(self.tokenizer, str) and isinstance(self.vocab_size, int)
                  and all(isinstance(s["file"], str) and isinstance(s["tokens"], int)
                          for shards in self.shards.values() for s in shards),
                  f"{header} is damaged: prepare the corpus again")
            check(self.tokenizer != "bytes" or self.vocab_size == get_tokenizer("bytes").n_vocab,
                  f"{header}: vocab_size={self.vocab_size} is not that of bytes: prepare the corpus again")
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{header} is damaged ({e}): prepare the corpus again") from e
        self.arrays: dict[str, list[np.ndarray]] = {}
        for split, shards in self.shards.items():
            for shard in shards:
                path, want = self.folder / shard["file"], shard["tokens"] * dtype.itemsize
                have = path.stat().st_size if path.is_file() else 0
                check(have == want, f"{path} has {have:,} bytes, meta.json says {want:,}: prepare the corpus again")
            self.arrays[split] = [np.memmap(self.folder / s["file"], dtype=dtype, mode="r") for s in shards]
        self.starts = {split: np.cumsum([0] + [s["tokens"] for s in shards]) for split, shards in self.shards.items()}

    def n_tokens(self, split: str) -> int:
        return int(self.starts[split][-1])

    def n_windows(self, split: str, T: int) -> int:
        """How many windows of T inputs and T targets do not overlap in their inputs."""
        n = (self.n_tokens(split) - 1) // T
        check(n > 0, f"{self.folder}: the {split} split has {self.n_tokens(split)} tokens, too few for block_size={T}")
        return n

    def read(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from position `start` of the split, across shards, as int64."""
        starts, parts = self.starts[split], []
        shard = int(np.searchsorted(starts, start, side="right")) - 1
        while n > 0:
            offset = start - int(starts[shard])
            part = self.arrays[split][shard][offset:offset + n]
            parts.append(part)
            start, n, shard = start + len(part), n - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def batch(self, split: str, windows: Iterable[int], T: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T), of the given windows; window i starts at token i T."""
        rows = torch.from_numpy(np.stack([self.read(split, int(i) * T, T + 1) for i in windows]))
        check(bool(rows.max() < self.vocab_size), f"{self.folder}: token {rows.max()} in the {split} split, but "
              f"vocab_size={self.vocab_size} in meta.json: prepare the corpus again")
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def verify(self) -> None:
        """Read every shard and compare its checksum."""
        for split, shards in self.shards.items():
            for shard, array in zip(shards, self.arrays[split]):
                check(zlib.crc32(array) == shard["crc32"],
                      f"{self.folder / shard['file']} is damaged (checksum): prepare the corpus again")


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n), another one in every epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def train_windows(seed: int, step: int, per_step: int, n_windows: int) -> np.ndarray:
    """The windows of the global batch of a step, (per_step,): a pure function of its arguments.

    Every window comes once per epoch. Rank r of W takes the micro-batches r, r + W, ... of it, so that the global batch
    is the same for any number of ranks, and a resumed run goes on where it was.
    """
    place = np.arange(step * per_step, (step + 1) * per_step)
    return np.array([epoch_order(seed, int(p) // n_windows, n_windows)[int(p) % n_windows] for p in place])


def eval_windows(count: int, n_windows: int) -> np.ndarray:
    """`count` windows spread evenly over a split, always the same."""
    count = min(count, n_windows)
    return np.arange(count) * n_windows // count


# ---- writing: documents in, shards out -------------------------------------------------------------------------------
def documents(source: str) -> Iterator[str]:
    """The documents of a source, always in the same order: "python", "fineweb-edu", a file or a folder."""
    if source == "python":
        for root in (Path(torch.__file__).parent, Path(sysconfig.get_paths()["stdlib"])):
            for path in sorted(root.rglob("*.py")):
                if "site-packages" not in path.relative_to(root).parts:
                    yield from read_text(path)
    elif source == "fineweb-edu":
        yield from stream_dataset("HuggingFaceFW/fineweb-edu", name="sample-100BT")
    else:
        root = Path(source)
        check(root.exists(), f"no file or folder {source}; NAME is python, fineweb-edu or a path")
        found = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        paths = [root] if root.is_file() else found
        check(len(paths) > 0, f"no {' '.join(SUFFIXES)} files in {source}")
        for path in paths:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from read_jsonl(path)
            elif path.suffix == ".parquet":
                yield from stream_dataset("parquet", data_files=str(path))
            else:
                check(path.name.endswith(SUFFIXES), f"{path} is none of {' '.join(SUFFIXES)}")
                yield from read_text(path)


def read_text(path: Path) -> Iterator[str]:
    """A text file as one document, or several if it is long.

    Cuts lie between a line that ends in a letter or the like and one that starts with a letter or digit: there every
    tiktoken encoding starts a new piece anyway, so no token is lost. Where no such place comes, it is cut all the same.
    """
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
        lines: list[str] = []
        size = 0
        while line := f.readline(DOCUMENT_CHARS):
            clean = line[0].isalnum() and lines and lines[-1][-1] == "\n" and lines[-1][-2:-1].strip()
            if size >= DOCUMENT_CHARS and (clean or size >= 2 * DOCUMENT_CHARS):
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            yield "".join(lines)


def text_in(row: dict[str, Any]) -> list[str]:
    """The "text" of a row, as a list that is empty where it is null; TypeError or KeyError where there is none."""
    if row["text"] is not None and not isinstance(row["text"], str):
        raise TypeError(f"\"text\" is a {type(row['text']).__name__}")
    return [row["text"]] if row["text"] is not None else []


def read_jsonl(path: Path) -> Iterator[str]:
    """The "text" of every line of a .jsonl or .jsonl.gz file."""
    number = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield from text_in(json.loads(line))
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}, near line {number}: no JSON object with a \"text\" ({e})") from e


def stream_dataset(path: str, **kwargs: Any) -> Iterator[str]:
    """The "text" of a Hugging Face data set's train split, streamed: nothing but the current rows is held."""
    where = kwargs.get("data_files", path)
    datasets = need("datasets", f"reading {where}")
    try:
        for row in datasets.load_dataset(path, split="train", streaming=True, **kwargs):
            yield from text_in(row)
    except Exception as e:      # its own errors, Arrow's and the network's
        raise UserError(f"could not read {where} ({type(e).__name__}: {str(e)[:80]!r}): with that mended the same "
                        "command goes on") from e


def prepare(source: str, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.05,
            max_tokens: float = float("inf"), docs: Callable[[str], Iterator[str]] = documents) -> Path:
    """Encode a source into token shards under `out`; called again after an interruption it goes on where it was.

    Every document ends with EOT; every 1/val_fraction-th one, the first included, is validation. Shards appear by
    rename, progress.json says what they cover, and meta.json is written last: a folder that has it is complete.
    """
    out, enc = Path(out), get_tokenizer(tokenizer)
    tokenizer = tokenizer if not Path(tokenizer).exists() else enc.name                   # a folder's full path
    request = {"source": source, "tokenizer": tokenizer, "val_fraction": val_fraction, "max_tokens": str(max_tokens)}
    if (out / "meta.json").exists():
        check(Corpus(out).meta["request"] == request,
              f"{out} holds a corpus prepared with other settings: choose another --out, or delete it")
        return out
    check(0 < val_fraction <= 0.5, f"val_fraction={val_fraction} must be above 0 and at most 0.5")
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32)
    done = {"request": request, "documents": 0, **{split: {"tokens": 0, "shards": []} for split in ("train", "val")}}
    progress = out / "progress.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if progress.exists():
            try:
                before = json.loads(progress.read_text())
                same = before["request"] == request and {"documents", "train", "val"} <= before.keys()
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{progress} is damaged: delete {out} and start over") from e
            check(same, f"{out} was begun with other settings: delete it or change --out")
            done = before
        rest = itertools.islice(docs(source), done["documents"], None)
        encode_into(out, done, rest, enc, dtype, val_fraction, max_tokens)
        for split in ("train", "val"):
            check(done[split]["tokens"] > 0, f"{source}: {done['documents']} documents leave the {split} split empty")
        meta = {"tokenizer": tokenizer, "vocab_size": enc.n_vocab, "eot": enc.eot_token, "dtype": dtype.name, **done}
        if enc.n_vocab <= 4096:
            meta["bigram_entropy"] = bigram_entropy(out, meta)
        write_json(out / "meta.json", meta)
        progress.unlink()
    except OSError as e:
        raise UserError(f"preparing {out} failed ({e}): with that mended the same command resumes it") from e
    return out


def encode_into(out: Path, done: dict, docs: Iterator[str], enc: tiktoken.Encoding, dtype: np.dtype,
                val_fraction: float, max_tokens: float) -> None:
    """The loop of `prepare`: encode on all cores, write a shard of each split whenever SHARD_TOKENS are together."""
    end = np.array([enc.eot_token], dtype=dtype)
    every = round(1 / val_fraction)
    buffers: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    buffered, started, first = 0, time.time(), done["train"]["tokens"] + done["val"]["tokens"]

    def encode(text: str) -> np.ndarray:
        try:
            return enc.encode_to_numpy(text, disallowed_special=())    # releases the GIL
        except UnicodeEncodeError:                                     # half of a surrogate pair, which JSON can spell
            return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        full = False
        while not full:
            batch, chars = [], 0
            while chars < BATCH_CHARS and (text := next(docs, None)) is not None:
                batch.append(text)
                chars += len(text)
            for tokens in pool.map(encode, batch):
                if full := done["train"]["tokens"] + done["val"]["tokens"] + buffered >= max_tokens:
                    break
                buffers["val" if done["documents"] % every == 0 else "train"] += [tokens.astype(dtype), end]
                done["documents"] += 1
                buffered += len(tokens) + 1
            full = full or not batch
            if buffered >= SHARD_TOKENS or full:
                for split, parts in buffers.items():
                    if parts:
                        shard = write_shard(out, split, len(done[split]["shards"]), np.concatenate(parts))
                        done[split]["shards"].append(shard)
                        done[split]["tokens"] += shard["tokens"]
                        parts.clear()
                buffered = 0
                write_json(out / "progress.json", done)
            total = done["train"]["tokens"] + done["val"]["tokens"] + buffered
            line = f"{out}: {done['documents']:,} documents, {total / 1e6:,.1f}M tokens"
            rate = (total - first) / max(time.time() - started, 1e-9) / 1e6
            if sys.stderr.isatty() or full:
                print(f"\r{line}, {rate:.1f}M tokens/s ", end="\n" if full else "", file=sys.stderr, flush=True)


def write_shard(out: Path, split: str, index: int, tokens: np.ndarray) -> dict[str, Any]:
    """Write one token file, visible only once it is whole; returns its entry for the header."""
    name = f"{split}_{index:05d}.bin"
    with open(out / (name + ".tmp"), "wb") as f:
        tokens.tofile(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(out / (name + ".tmp"), out / name)
    return {"file": name, "tokens": len(tokens), "crc32": zlib.crc32(tokens)}


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
    joint = pairs / pairs.sum()
    given = joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)
    return float(-(joint[joint > 0] * np.log(given[joint > 0])).sum())


def main() -> None:
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="python, fineweb-edu, or a file or folder of texts")
    parser.add_argument("--tokenizer", help="bytes, any tiktoken encoding or a model's folder "
                                            "(default: bytes for python, else gpt2)")
    parser.add_argument("--out", help="where to put it (default: data/NAME)")
    parser.add_argument("--val_fraction", type=float, help="share of documents (default: 0.05; fineweb-edu: 0.001)")
    parser.add_argument("--max_tokens", type=float, default=float("inf"), help="stop after so many, for example 10e9")
    parser.add_argument("--verify", action="store_true", help="NAME is a prepared folder: compare its checksums")
    args = parser.parse_args()
    check(args.max_tokens > 0, f"--max_tokens {args.max_tokens} must be positive")
    if args.verify:
        Corpus(args.name).verify()
        return print(f"{args.name}: every checksum matches")
    out = prepare(args.name, args.out or Path("data") / Path(args.name).name.split(".")[0],
                  args.tokenizer or ("bytes" if args.name == "python" else "gpt2"),
                  (0.001 if args.name == "fineweb-edu" else 0.05) if args.val_fraction is None else args.val_fraction,
                  args.max_tokens)
    meta = Corpus(out).meta
    print(f"{out}: {meta['documents']:,} documents, {meta['train']['tokens']:,} training and "
          f"{meta['val']['tokens']:,} validation tokens of {meta['tokenizer']}"
          + (f"; bigram entropy {meta['bigram_entropy']:.3f} nats" if "bigram_entropy" in meta else ""))


if __name__ == "__main__":
    run(main)
