"""The measuring itself in probe.py: cost, single experiments, pruning, several ranks, precision.

    python -m pytest -q tests/test_measurement.py
"""
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probe
from helpers import (ROOT, Outcome, checkpoint_of, differences, loss_by_hand, make_model, make_tokens, run_python,
                     run_script)
from model import Block, UserError
from probe import EXPERIMENTS, Column, Experiment, cheapest_drops, forward
from test_experiments import MODELS, REMOVE, T, assert_close, measured, own_tokens

# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluations(monkeypatch):
    """evaluations(n, experiments, ...): block evaluations per sequence for a model of n blocks."""
    count, block_forward = [0], Block.forward

    def counted(self, x, *args, **kwargs):
        count[0] += len(x)
        return block_forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)

    def per_sequence(n, experiments=None, **options):
        count[0] = 0
        probe.probe(make_model(n_layer=n), make_tokens(6, T), experiments, **options)
        return count[0] / 6
    return per_sequence


@pytest.mark.parametrize("n", [1, 2, 8])
def test_an_intervention_evaluates_only_later_blocks_and_shares_the_rest(n, evaluations):
    later = n * (n - 1) / 2
    assert evaluations(n, ["variance", "lens", "contribution"]) == n
    assert evaluations(n, ["causal", "removal"]) == n + later
    assert evaluations(n, ["permutation"]) == pytest.approx(n + (n**3 - n) / 3)
    assert evaluations(n, ["usefulness"]) == n + 1.5 * later
    assert evaluations(n, ["jacobian"]) == 1.5 * n                                 # on half of the sequences


def test_removing_several_blocks_or_a_sublayer_evaluates_only_later_blocks(evaluations):
    assert evaluations(6, ["removal"], remove=(1, 2, 3)) == 6 + 15 + 10 + 6
    assert evaluations(6, ["removal"], remove=(), sublayers=True) == 6 + 2 * 15


def test_an_option_without_effect_is_ignored(evaluations):
    assert evaluations(2, ["variance"], remove=(99,)) == 2


def test_a_score_without_an_entry_of_its_name_is_refused(monkeypatch):
    """The tables look for this entry. Without it they would be empty in silence."""
    mine = Experiment(lambda model, p: {"x": 1.0}, lambda model, totals: {"other": 1.0})
    monkeypatch.setitem(EXPERIMENTS, "mine", mine)
    with pytest.raises(UserError, match="mine"):
        probe.probe(make_model(), make_tokens(2, T), ["mine"])


def test_a_sample_too_large_for_memory_costs_a_pass_per_stage_and_gives_the_same_numbers(evaluations, monkeypatch):
    few = ["variance", "causal", "usefulness", "removal"]
    small, small_few = evaluations(12), evaluations(12, few)
    monkeypatch.setattr(probe, "KEPT_IN_MEMORY", 0)
    assert evaluations(12) <= 1.13 * small                 # with more than 12 blocks, the ratio is smaller
    assert evaluations(12, few) == small_few + 12
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), remove=REMOVE, sublayers=True)
    want = {key: x for key, x in measured("dense").items() if key != "seconds"}
    assert_close(want, got)


def test_the_estimated_work_is_close_to_the_work_done():
    progress = probe.Progress()
    probe.probe(make_model(n_layer=8), make_tokens(6, T), progress=progress, remove=(1, 2), sublayers=True)
    assert 0.8 < progress.done / progress.work < 1.05


def test_measuring_leaves_the_model_unchanged():
    model = make_model(**MODELS["moe"])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    probe.probe(model, make_tokens(4, T), sublayers=True)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ---- one experiment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_works_alone_in_a_notebook(name):
    model, tokens = make_model(**MODELS["moe"]), own_tokens("moe")
    p = forward(model, tokens, options=probe.Options(remove=REMOVE, sublayers=True))
    got = probe.to_json(EXPERIMENTS[name].score(model, EXPERIMENTS[name].sums(model, p)))
    assert differences(got, measured("moe"), lambda path: 1e-9, 1e-12) == []
    assert name in got


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_on_one_sequence_equals_that_on_two_copies(name):
    """Standard errors are not defined for one sequence, and affine maps need two halves."""
    model, one = make_model(**MODELS["moe"]), own_tokens("moe")[:1]
    p = forward(model, one, options=probe.Options(jacobian_samples=1))
    if EXPERIMENTS[name].fits:
        with pytest.raises(UserError, match="two sequences"):
            EXPERIMENTS[name].sums(model, p)
        return
    got = probe.to_json(EXPERIMENTS[name].score(model, EXPERIMENTS[name].sums(model, p)))
    want = probe.probe(model, one.repeat(2, 1), [name])
    got = {key: x for key, x in got.items() if not key.endswith(("stderr", "halves"))}
    assert got and differences(got, {key: want[key] for key in got}, lambda path: 1e-9, 1e-12) == []


def shrinking(model, p):
    """The norm of the last stream without each block, and the trace of the Jacobian of each block."""
    norms = [p.without(s)[-1].norm(dim=-1).sum() for s in range(len(model.blocks))]
    return {"norms": torch.stack(norms), "whole": p.h[-1].norm(dim=-1).sum(),
            "traces": torch.stack([p.jacobian(l).trace() for l in range(len(model.blocks))])}


SHRINKING = Experiment(
    shrinking, lambda model, totals: {"shrinking": totals["norms"] / totals["whole"], "traces": totals["traces"]},
    columns=[Column("shrinks", lambda r: r["shrinking"], "last stream without it")],
    scores={"mean": lambda r: np.mean(r["shrinking"])})


def test_an_experiment_from_another_file_runs_among_the_others(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    monkeypatch.setitem(EXPERIMENTS, "shrinking", SHRINKING)
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    got = probe.probe(model, tokens)
    traces = [mean * model.d * 4 * T for mean in got["jacobian"]["diagonal_mean"]]                # on 4 sequences
    assert got["traces"] == pytest.approx(traces, rel=1e-9)
    for s in range(5):
        def last(blocks):
            x = model.embed(tokens)
            for block in blocks:
                x = block(x)
            return x.norm(dim=-1).sum().item()
        blocks = list(model.blocks)
        with torch.no_grad():
            assert got["shrinking"][s] == pytest.approx(last(blocks[:s] + blocks[s + 1:]) / last(blocks), rel=1e-9)
    assert "shrinks" in probe.block_table(got) and probe.scores(got)["mean"] == np.mean(got["shrinking"])


# ---- dropping blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe_lns"])
def test_the_cheapest_drops_are_those_of_a_greedy_search_by_brute_force(kind):
    model, tokens = make_model(**MODELS[kind]), own_tokens(kind)
    kept, gone = list(range(len(model.blocks))), []
    for _ in range(3):
        with torch.no_grad():
            losses = {l: loss_by_hand(model, tokens, [model.blocks[k] for k in kept if k != l]) for l in kept}
        gone.append(min(losses, key=losses.get))
        kept.remove(gone[-1])
    assert cheapest_drops(model, tokens, 3) == gone


# ---- several ranks: real processes -----------------------------------------------------------------------------------
OF_RANKS = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, torch.distributed as dist
import probe
from helpers import make_model, make_tokens
from test_experiments import MODELS, T
torch.set_num_threads(1)
dist.init_process_group("gloo")
probe.TOKENS_AT_ONCE = 2 * T
found = {{}}
for kind in ("dense", "moe"):
    model = make_model(**MODELS[kind])
    found[kind] = probe.probe(model, make_tokens(7, T), remove=(1, 2), sublayers=True, jacobian_samples=3)
if dist.get_rank() == dist.get_world_size() - 1:          # every rank has the whole result
    json.dump(found, open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(ranks: int, *args: Any, cwd: Any) -> Outcome:
    return run_python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *args, cwd=cwd)


def test_two_ranks_share_the_work_and_find_the_same_numbers(tmp_path, monkeypatch):
    """There are 7 sequences, so the two halves and the sample of the Jacobian are unevenly spread over the ranks."""
    (tmp_path / "script.py").write_text(OF_RANKS)
    done = torchrun(2, "script.py", "found.json", cwd=tmp_path)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    for kind in ("dense", "moe"):
        want = probe.probe(make_model(**MODELS[kind]), make_tokens(7, T), remove=(1, 2), sublayers=True,
                           jacobian_samples=3)
        del want["seconds"]
        assert differences(want, found[kind], lambda path: 1e-8, 1e-10) == []


def test_torchrun_prints_and_writes_the_output_of_one_process_once(tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS["dense"])), tmp_path / "dense.pt")
    np.save(tmp_path / "mine.npy", make_tokens(5, T).numpy())
    arguments = ["dense.pt", "--tokens=mine.npy", "--device=cpu", "--dtype=float64", "--only=variance,removal"]
    alone = run_script("probe.py", *arguments, "--out", "alone", cwd=tmp_path)
    several = torchrun(2, ROOT / "probe.py", *arguments, "--out", "several", cwd=tmp_path)
    assert alone.status == several.status == 0, several.err
    assert several.out.replace("several", "alone") == alone.out
    want, got = (json.loads((tmp_path / out / "probe.json").read_text("utf-8")) for out in ("alone", "several"))
    del want["seconds"]
    assert got.pop("run") == want.pop("run")
    assert differences(want, got, lambda path: 1e-8, 1e-10) == []
    few = torchrun(2, ROOT / "probe.py", "dense.pt", "--sample", "a", "--device", "cpu", cwd=tmp_path)
    assert "take one process" in few.err and few.status == 1


def test_more_ranks_than_sequences_are_refused(monkeypatch):
    """All other ranks would wait forever for a rank that has no sequences."""
    monkeypatch.setattr(probe, "place_among_ranks", lambda: (0, 6))
    with pytest.raises(UserError, match="at least 6"):
        probe.probe(make_model(**MODELS["dense"]), make_tokens(5, T))


# ---- precision -------------------------------------------------------------------------------------------------------


def test_losses_do_not_depend_on_the_number_of_logits_computed_at_once(monkeypatch):
    model, tokens = make_model(**MODELS["moe"]), own_tokens("moe")
    with torch.no_grad():
        logits = model(tokens)[0]
    want = [F.cross_entropy(logits[b, :-1], tokens[b, 1:], reduction="sum").item() for b in range(len(tokens))]
    for at_once in (1, 3 * T * model.vocab_size, 2**23):
        monkeypatch.setattr(probe, "logits_at_once", lambda device: at_once)
        assert forward(model, tokens).loss.tolist() == pytest.approx(want, rel=1e-12)
