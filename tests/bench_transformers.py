"""A training step of ours beside one of the `transformers` Llama of the same shape, in turn, same optimizer and data.

    pip install transformers && python tests/bench_transformers.py

Prints tokens/s of both, eager and compiled, and their ratio: above 1 is ours ahead. Best of ten rounds.
"""
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT  # noqa: E402
from train import TrainConfig, gradients, make_optimizer  # noqa: E402


def main() -> None:
    for n_embd, n_layer in ((64, 16), (256, 8)):
        c = TrainConfig(vocab_size=320, n_embd=n_embd, n_layer=n_layer, block_size=128, tokens_per_step=2048)
        idx = torch.randint(c.vocab_size, (c.tokens_per_step // c.block_size, c.block_size + 1))
        x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        for way in ("eager", "compiled"):
            ours, theirs = GPT(c), LlamaForCausalLM(LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=n_embd, intermediate_size=c.ffn_hidden, num_hidden_layers=n_layer,
                num_attention_heads=c.n_head, max_position_embeddings=c.block_size, use_cache=False))
            count = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
            if count[0] != count[1]:
                raise SystemExit(f"not the same shape: {count} parameters")
            run_ours, run_theirs = (torch.compile(m, dynamic=False) if way == "compiled" else m for m in (ours, theirs))

            def theirs_backward() -> None:
                # it shifts the labels itself: T - 1 targets where ours has T, the same matrix products
                run_theirs(input_ids=x, labels=x).loss.backward()

            def step(model, optimizer, backward) -> float:
                begun = time.perf_counter()
                backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
                return time.perf_counter() - begun

            pairs = [(ours, make_optimizer(ours, c), lambda: gradients(run_ours, [(x, y)], c, torch.float32, stats=False)),
                     (theirs, make_optimizer(theirs, c), theirs_backward)]
            for pair in pairs * 2:
                step(*pair)
            a, b = (min(times) for times in zip(*[[step(*pair) for pair in pairs] for _ in range(10)]))
            print(f"n_embd={n_embd} n_layer={n_layer} {way}: ours {c.tokens_per_step / a:,.0f} tokens/s, "
                  f"transformers {c.tokens_per_step / b:,.0f}, ratio {b / a:.2f}", flush=True)


if __name__ == "__main__":
    main()
