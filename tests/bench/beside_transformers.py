"""Compare our training step with that of transformers' Llama: same shape, optimizer and data.

    pip install transformers
    python tests/bench/beside_transformers.py                               # the shapes in SHAPES
    python tests/bench/beside_transformers.py --n_embd=512 --n_layer=4      # another shape

Takes the settings of train.py. Runs on a CPU, eager and compiled. --compile=true (or false) runs
only one of these. Prints tokens/s of both models and their ratio. If the ratio is above 1, ours is
faster. The two models are timed in turn, and the best of ten rounds counts.
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import run
from model import GPT, check
from train import TrainConfig, clip_gradients, gradients, load_settings, make_optimizer, vocabulary

SHAPES = (["--n_embd=64", "--n_layer=16"], ["--n_embd=256", "--n_layer=8"],
          ["--n_embd=64", "--n_layer=4", "--vocab_size=50304"],
          ["--n_embd=256", "--n_layer=4", "--vocab_size=50304"])


def llama(c: TrainConfig) -> LlamaForCausalLM:
    """A Llama of the same shape."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size, use_cache=False))


def time_in_turn(c: TrainConfig, compiled: bool) -> tuple[float, float]:
    """Seconds per step of our model and of theirs."""
    idx = torch.randint(c.vocab_size, (c.tokens_per_step // c.block_size, c.block_size + 1))
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    ours, theirs = GPT(c), llama(c)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    check(counts[0] == counts[1], f"not the same shape: {counts} parameters")
    our_forward, their_forward = ours, theirs
    if compiled:
        our_forward = torch.compile(ours, dynamic=False)
        their_forward = torch.compile(theirs, dynamic=False)
    our_optimizer, their_optimizer = make_optimizer(ours, c), make_optimizer(theirs, c)

    def our_step() -> None:
        gradients(our_forward, [(x, y)], torch.float32, stats=False)
        clip_gradients(ours, c.grad_clip)
        our_optimizer.step()
        our_optimizer.zero_grad()

    def their_step() -> None:
        # Llama shifts the labels itself: T - 1 targets instead of T, but equal matrix products.
        their_forward(input_ids=x, labels=x).loss.backward()
        clip_gradients(theirs, c.grad_clip)
        their_optimizer.step()
        their_optimizer.zero_grad()

    for _ in range(2):                                     # to compile and allocate
        our_step()
        their_step()
    rounds = [(seconds(our_step), seconds(their_step)) for _ in range(10)]
    return min(ours for ours, _ in rounds), min(theirs for _, theirs in rounds)


def seconds(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def compare(c: TrainConfig, compiled: bool) -> None:
    """Print a line with tokens/s of both models and their ratio."""
    ours, theirs = time_in_turn(c, compiled)
    way = "compiled" if compiled else "eager"
    print(f"n_embd={c.n_embd} n_layer={c.n_layer} {way}: ours {c.tokens_per_step / ours:,.0f} tokens/s, "
          f"transformers {c.tokens_per_step / theirs:,.0f}, ratio {theirs / ours:.2f}", flush=True)


def main() -> None:
    shapes = [sys.argv[1:]] if len(sys.argv) > 1 else SHAPES
    for settings in shapes:
        c, _ = load_settings(settings)
        c.vocab_size = vocabulary(c)
        for compiled in (False, True):
            if c.compile in (None, compiled):
                compare(c, compiled)


if __name__ == "__main__":
    run(main)
