"""Time each probe beside a naive one: a whole pass per intervention, as in the authors' scripts.

    python tests/bench/probes.py out/gqa_deep/ckpt.pt --samples 16

The two are timed in turn in one process, and the best of five rounds counts.
"""
import argparse
import sys
from itertools import combinations
from pathlib import Path
from timeit import timeit
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Corpus, load_model, run  # noqa: E402
from model import GPT  # noqa: E402
from probe import causal_row, jacobian_sum, probe, streams_of, update_norms  # noqa: E402


def side_by_side(name: str, here: Callable[[], Any], naive: Callable[[], Any], rounds: int = 5) -> None:
    """Time a probe and its naive version in turn. Prints the best of the rounds and their ratio."""
    times = [(timeit(here, number=1), timeit(naive, number=1)) for _ in range(rounds)]
    ours, theirs = (min(column) for column in zip(*times))
    print(f"{name:15} here {ours:8.3f} s   naive {theirs:8.3f} s   {theirs / ours:.2f}x", flush=True)


def nll(model: GPT, x: Tensor, tokens: Tensor, layers: Any = ()) -> Tensor:
    """The sum of -log p over all predictions in nats, for the stream x (B, T, d) after the layers."""
    for layer in layers:
        x = layer(x)
    return F.cross_entropy(model.logits(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def naive_causal(model: GPT, tokens: Tensor) -> list[Tensor]:
    """Compute the causal numerators. Returns the summed loss in nats without each block."""
    blocks = list(model.blocks)
    h = streams_of(blocks, model.embed(tokens))
    losses = []
    for s in range(len(blocks)):
        g = streams_of([*blocks[:s], lambda x: x, *blocks[s + 1:]], model.embed(tokens))
        update_norms(h)
        causal_row(h, g, s)
        losses.append(nll(model, g[-1], tokens))
    return losses


@torch.no_grad()
def naive_permutation(model: GPT, tokens: Tensor) -> list[Tensor]:
    """The summed loss in nats with each pair of blocks swapped."""
    losses = []
    for i, j in combinations(range(len(model.blocks)), 2):
        blocks = list(model.blocks)
        blocks[i], blocks[j] = blocks[j], blocks[i]
        losses.append(nll(model, model.embed(tokens), tokens, blocks))
    return losses


@torch.no_grad()
def naive_usefulness(model: GPT, tokens: Tensor) -> list[tuple[float, float]]:
    """The summed loss in nats with each block replaced by its affine map.

    Each block has two losses. The first is over all tokens, with a map fitted to all tokens. The
    second is over the second half of the sequences, with a map fitted to the first half. The
    streams are computed again for every block.
    """
    blocks, d, half = list(model.blocks), model.config.n_embd, len(tokens) // 2
    losses = []
    for l in range(len(blocks)):
        x, y = streams_of(blocks, model.embed(tokens))[l:l + 2]
        of_block = []
        for fitted, judged in ((len(tokens), tokens), (half, tokens[half:])):
            X = F.pad(x[:fitted], (0, 1), value=1.0).flatten(0, 1).double()
            Y = y[:fitted].flatten(0, 1).double()
            W = torch.linalg.lstsq(X, Y).solution.to(x)                      # (d + 1, d), the last row is the bias
            replaced = [*blocks[:l], lambda x: x @ W[:d] + W[d], *blocks[l + 1:]]
            of_block.append(nll(model, model.embed(judged), judged, replaced))
        losses.append(tuple(of_block))
    return losses


@torch.no_grad()
def naive_jacobian(model: GPT, tokens: Tensor) -> list[Tensor]:
    """The Jacobian of each block, summed over tokens. The streams are computed again for every block."""
    blocks = list(model.blocks)
    return [jacobian_sum(block, streams_of(blocks, model.embed(tokens))[l]) for l, block in enumerate(blocks)]


NAIVE = {"causal,removal": naive_causal, "permutation": naive_permutation, "usefulness": naive_usefulness,
         "jacobian": naive_jacobian}


def bench(model: GPT, tokens: Tensor, rounds: int = 5) -> None:
    """Print a line for each probe."""
    print(f"{tuple(tokens.shape)} tokens, n_layer={len(model.blocks)}, n_embd={model.config.n_embd}, in turn")
    for names, naive in NAIVE.items():
        def here() -> None:
            probe(model, tokens, names.split(","), jacobian_samples=len(tokens))
        side_by_side(names, here, lambda: naive(model, tokens), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="sequences (default 16)")
    parser.add_argument("--length", type=int, help="tokens per sequence (default: block_size)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, saved = load_model(args.checkpoint)
    T = args.length or model.config.block_size
    corpus = Corpus(saved["settings"].get("data", "data/python"))
    tokens, _ = corpus.batch("val", range(min(args.samples, corpus.n_windows("val", T))), T)
    bench(model, tokens, args.rounds)


if __name__ == "__main__":
    run(main)
