"""How probe.py measures: what experiments share, what that costs, what it leaves behind, and one from outside.

    python -m pytest -q tests/test_measurement.py

That the numbers are right is the matter of tests/test_experiments.py.
"""
from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter
from typing import Any, Callable, Generator

import pytest
import torch
from torch import Tensor

import probe
from helpers import (ROOT, Outcome, assert_mistake, checkpoint_of, differences, loss_by_hand, make_model,
                     make_tokens, run_python, run_script, streams_by_hand)
from model import Block
from probe import EXPERIMENTS, Experiment, cheapest_drops
from test_experiments import MODELS, T, mean_norm, own_tokens


# ---------------------------------------------------------------------------------------------------------------------
# what it costs: block evaluations


@pytest.fixture
def evaluations(monkeypatch):
    """evaluations(model, tokens, experiments, ...): how often each sequence goes through a block."""
    count, forward = [0], Block.forward

    def counted(self, x, *args, **kwargs):
        count[0] += len(x)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)

    def per_sequence(model, tokens, experiments, **settings):
        count[0] = 0
        probe.probe(model, tokens, experiments, **settings)
        return count[0] / len(tokens)
    return per_sequence


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_no_block_is_evaluated_that_another_probe_has_evaluated(n, evaluations, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(n_layer=n), make_tokens(6, T)
    later = n * (n - 1) // 2
    assert evaluations(model, tokens, ("variance", "lens", "contribution", "sparsity")) == n
    assert 0 < evaluations(model, tokens, ("causal",)) <= later + n
    assert 0 < evaluations(model, tokens, ("causal", "removal"), sublayers=False, remove=(1,)) <= later + n
    assert 0 < evaluations(model, tokens, ("permutation",)) <= (n**3 - n) / 3 + n
    three = ("causal", "removal", "permutation")
    assert evaluations(model, tokens, three, sublayers=False) <= (n**3 - n) / 3 + later + n
    # usefulness: a pass to fit, whose last third is the first of the pass to judge with all maps, and half of it again
    assert evaluations(model, tokens, ("usefulness",)) <= (2 - 1 / 3) * n + 1.5 * later


def test_the_released_scores_cost_no_more_than_their_usefulness_and_jacobian(evaluations):
    n, tokens = 6, make_tokens(4, T)
    model = make_model(n_layer=n)
    later = n * (n - 1) // 2
    before = evaluations(model, tokens, ("causal", "usefulness"), jacobian_samples=2)
    after = evaluations(model, tokens, ("causal", "usefulness", "released"), jacobian_samples=2)
    assert after - before <= later + (n + 1) / 2              # its affine maps; its Jacobians of half the sample
    alone = evaluations(model, tokens, ("causal", "released"), jacobian_samples=2)
    assert alone - evaluations(model, tokens, ("causal",)) <= n + later + (n + 1) / 2        # and a pass to fit


@pytest.mark.parametrize("remove, runs", [((1,), 15), ((2,), 10), ((2, 3), 16), ((1, 2, 3), 31), ((6,), 0), ((), 0)])
def test_removal_evaluates_what_is_behind_each_run_and_nothing_else(remove, runs, evaluations):
    """Without the run from s to s + r, of 6 blocks, 6 - s - r are left to evaluate."""
    got = evaluations(make_model(n_layer=6), make_tokens(4, T), ("removal",), remove=remove, sublayers=False)
    assert got == 6 + runs


def test_each_attention_and_each_ffn_alone_cost_the_blocks_behind_them(evaluations):
    got = evaluations(make_model(n_layer=6), make_tokens(4, T), ("removal",), remove=(), sublayers=True)
    assert got == 6 + 2 * 15


def test_the_cheapest_drops_take_no_more_block_evaluations_than_single_removals(monkeypatch):
    calls, forward = [0], Block.forward

    def counted(self, *args, **kwargs):
        calls[0] += 1
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Block, "forward", counted)
    cheapest_drops(make_model(n_layer=6), make_tokens(7, T), 2, lambda line: None)
    assert calls[0] <= (6 + 15) + (5 + 10)


# ---------------------------------------------------------------------------------------------------------------------
# what experiments ask for is made once


@pytest.fixture
def questions(monkeypatch):
    """questions[what, l]: how often what several experiments may share was made, summed over micro-batches."""
    made = Counter()

    def counted(what, make):
        def call(run, p, l):
            made[what, l] += 1
            return make(run, p, l)
        return call
    for what, make in dict(probe.SHARED).items():
        monkeypatch.setitem(probe.SHARED, what, counted(what, make))
    return made


def of_every_block(what: str, times: int, n: int = 5) -> dict[tuple[str, int], int]:
    return {(what, l): times for l in range(n)}


@pytest.mark.parametrize("experiments, wanted", [
    (["causal"], ["without"]), (["removal"], ["without"]), (["jacobian"], ["jacobian"]),
    (["released"], ["jacobian", "without"]), (["causal", "removal"], ["without"]),
    (["removal", "causal", "released", "jacobian"], ["jacobian", "without"]),
    (["jacobian", "released", "causal", "removal"], ["jacobian", "without"]),
    (list(EXPERIMENTS), ["jacobian", "without"]),
    (["variance", "permutation", "usefulness", "lens", "contribution", "sparsity"], []),
], ids=lambda names: "+".join(names))
def test_what_several_experiments_ask_for_is_made_once_per_micro_batch(experiments, wanted, questions, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)                  # 3 micro-batches; 4 with a cut in the middle
    probe.probe(make_model(**MODELS["dense"]), make_tokens(6, T), experiments)
    micro_batches = 4 if {"usefulness", "released"} & set(experiments) else 3
    want: dict[tuple[str, int], int] = {}
    for what in wanted:
        want |= of_every_block(what, micro_batches)
    assert questions == want


def test_removal_without_length_1_asks_for_no_single_removal(questions):
    model, tokens = make_model(**MODELS["dense"]), make_tokens(4, T)
    probe.probe(model, tokens, ["removal"], remove=(2, 3))
    assert questions == {}
    probe.probe(model, tokens, ["removal"], remove=(2, 1))
    assert questions == of_every_block("without", 1)


def asks_in_this_order(order: str) -> Callable[[probe.Run], Generator]:
    """An experiment that keeps what it is told of the Jacobians and of the streams without each block."""
    def measure(run):
        J, lasts = {}, {}
        while (yield):
            for what in order.split():
                for l in range(run.n):
                    answer = yield what, l
                    if what == "jacobian":
                        J[l] = answer.tolist()
                    else:
                        lasts[l] = lasts.get(l, 0.0) + answer[run.n].sum().item()
        return {order: {"J": list(J.values()), "lasts": list(lasts.values())}}
    return measure


def by_order(monkeypatch, *orders: str) -> dict[str, Any]:
    for order in orders:
        monkeypatch.setitem(EXPERIMENTS, order, Experiment(asks_in_this_order(order)))
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), [*orders, "jacobian", "causal"])
    return {name: got[name] for name in [*orders, "jacobian", "causal"]}


def test_two_experiments_that_ask_in_the_same_order_share_every_answer(questions, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    order = "jacobian without"
    got = by_order(monkeypatch, order, f"{order} ")
    assert got[order] == got[f"{order} "]
    assert questions == of_every_block("jacobian", 4) | of_every_block("without", 4)


@pytest.mark.parametrize("order", ["without jacobian", "jacobian jacobian", "without without jacobian without"])
def test_another_order_costs_more_and_changes_no_number(order, monkeypatch):
    """An experiment that does not know the best order is slow; it must not spoil the others."""
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    want = by_order(monkeypatch, "jacobian without")
    got = by_order(monkeypatch, order)
    assert got[order]["J"] == want["jacobian without"]["J"]
    assert got["causal"] == want["causal"]
    assert got["jacobian"] == want["jacobian"]


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_memory_does_not_grow_with_the_number_of_sequences(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * 128)
    model = make_model(n_layer=3, block_size=128)

    def tensor_bytes():
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def peak(sequences):
        tokens, experiments = make_tokens(sequences, 128), ("variance", "causal", "usefulness", "released", "lens")
        before, seen = tensor_bytes(), []

        def watch(line):
            if line.startswith(("affine maps", "lens")):
                seen.append(tensor_bytes() - before)
        probe.probe(model, tokens, experiments, jacobian_samples=1, progress=watch)
        assert len(seen) == sequences
        return max(seen)

    assert 0 < peak(16) <= peak(4) + 16384         # the streams of two sequences take 64 KiB


class Alive:
    """Weak references to tensors, by what they belong to."""
    def __init__(self) -> None:
        self.refs: list[tuple[Any, weakref.ref]] = []

    def add(self, owner: Any, *tensors: Tensor) -> None:
        self.refs += [(owner, weakref.ref(x)) for x in tensors]

    def owners(self) -> set[Any]:
        return {owner for owner, ref in self.refs if ref() is not None}


ROUNDS = {"one round": ["variance", "causal", "permutation", "removal", "jacobian", "lens", "contribution", "sparsity"],
          "two rounds": list(EXPERIMENTS), **{name: [name] for name in EXPERIMENTS}}


@pytest.mark.parametrize("name", ROUNDS)
def test_no_streams_of_a_micro_batch_outlive_it(name, monkeypatch):
    """Whenever progress is told, at the begin of every stage: the streams of one pass at the most are there."""
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    alive, forward, number, too_many = Alive(), probe.forward, [0], set()

    def watched(run, idx, watch):
        number[0] += 1
        h, details, attention = forward(run, idx, watch)
        alive.add(number[0], *h, *(x for did in details for x in (did.attn, did.ffn)))
        return h, details, attention
    monkeypatch.setattr(probe, "forward", watched)

    def watch(line):
        if len(alive.owners()) > 1:
            too_many.add(line)
    probe.probe(make_model(**MODELS["dense"]), make_tokens(8, T), ROUNDS[name], progress=watch)
    assert number[0] >= 4 and alive.owners() == set()
    assert not too_many


@pytest.mark.parametrize("name", ROUNDS)
def test_no_streams_of_the_micro_batch_before_are_there_when_the_next_one_begins(name, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    alive, forward, number, left_over = Alive(), probe.forward, [0], set()

    def watched(run, idx, watch):
        if alive.owners():
            left_over.add(f"{run.where}, {run.micro_batch}")
        number[0] += 1
        h, details, attention = forward(run, idx, watch)
        alive.add(number[0], *h, *(x for did in details for x in (did.attn, did.ffn)))
        return h, details, attention
    monkeypatch.setattr(probe, "forward", watched)
    probe.probe(make_model(**MODELS["dense"]), make_tokens(8, T), ROUNDS[name])
    assert not left_over


@pytest.mark.parametrize("experiments", [["causal"], ["removal"], ["released"], ["removal", "causal"],
                                         list(EXPERIMENTS)], ids="+".join)
def test_the_streams_without_a_block_are_gone_when_the_next_are_made(experiments, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    alive, without, left_over = Alive(), probe.SHARED["without"], set()

    def watched(run, p, s):
        left_over.update(alive.owners())
        g = without(run, p, s)
        alive.add(s, *g[s + 2:])                   # those before are the micro-batch's own: g_{s+1} is h_s
        return g
    monkeypatch.setitem(probe.SHARED, "without", watched)
    probe.probe(make_model(**MODELS["dense"]), make_tokens(6, T), experiments)
    micro_batches = 4 if "released" in experiments else 3                    # for the fit there is a cut in the middle
    assert len(alive.refs) == micro_batches * 10 and alive.owners() == set()
    assert not left_over


# ---------------------------------------------------------------------------------------------------------------------
# what it leaves behind: nothing


def state(model):
    """All that a probe could leave behind in a model."""
    modules = [(name, m.training, sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if k.endswith("hooks")})
               for name, m in model.named_modules()]
    tensors = [(name, id(x), x.requires_grad, x.grad, x.dtype, x.detach().numpy().tobytes())
               for name, x in (*model.named_parameters(), *model.named_buffers())]
    return modules, tensors, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def unusual_model():
    model = make_model(torch.float32, **MODELS["moe"]).train()
    model.blocks[1].eval()
    model.blocks[2].attn.qkv.weight.requires_grad_(False)
    return model


def test_the_model_is_left_exactly_as_it_was(monkeypatch):
    model, tokens = unusual_model(), make_tokens(7, T)
    before, same_tokens = state(model), tokens.clone()
    probe.probe(model, tokens)
    cheapest_drops(model, tokens, 2, lambda line: None)
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import probes
    probes.bench(model, tokens[:2], rounds=1)
    assert state(model) == before and torch.equal(tokens, same_tokens)


def test_the_model_is_left_exactly_as_it_was_by_an_interruption_at_any_stage(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 4 * T)
    model, tokens = unusual_model(), make_tokens(7, T)
    lines = []
    probe.probe(model, tokens, progress=lines.append)
    stages = {line.split(",")[0] for line in lines}
    assert stages == {"affine maps", "streams", "jacobian", "without", *EXPERIMENTS}
    before = state(model)
    for stage in stages:
        def interrupt(line):
            if line.startswith(stage + ", micro-batch 2"):
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            probe.probe(model, tokens, progress=interrupt, jacobian_samples=5)
        assert state(model) == before, stage


@pytest.mark.parametrize("piece", ["forward", "streams_of", "nll", "affine_map", "causal_row", "swapped", "recorded",
                                   "jacobian_sum", "lens_sums", "contribution_sums", "attention_sums"])
def test_the_model_is_left_exactly_as_it_was_by_a_failure_in_any_piece(piece, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 4 * T)
    model, tokens = unusual_model(), make_tokens(7, T)
    before, original, calls = state(model), getattr(probe, piece), []

    def fail_the_second_time(*args, **kwargs):
        calls.append(piece)
        result = original(*args, **kwargs)
        if len(calls) == 2:
            raise RuntimeError("halfway")
        return result

    monkeypatch.setattr(probe, piece, fail_the_second_time)
    with pytest.raises(RuntimeError, match="halfway"):
        probe.probe(model, tokens)
    assert state(model) == before


def test_a_failure_inside_a_backward_pass_leaves_the_model_as_it_was(monkeypatch):
    model, tokens = unusual_model(), make_tokens(7, T)
    before = state(model)

    def fail(*args, **kwargs):
        raise MemoryError
    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(MemoryError):
        probe.probe(model, tokens)
    assert state(model) == before


def test_the_seconds_are_those_of_the_stages():
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["causal", "usefulness", "jacobian"])
    assert set(got["seconds"]) == {"affine maps", "streams", "jacobian", "without", "causal", "usefulness"}
    assert all(seconds > 0 for seconds in got["seconds"].values())
    assert set(probe.probe(make_model(), make_tokens(2, T), [])["seconds"]) == {"streams"}


# ---------------------------------------------------------------------------------------------------------------------
# an experiment from outside


def shrinking(run):
    """How much smaller is the last stream without a block? And the Jacobian's trace, to ask for both."""
    whole, norms, J = run.sums(), run.sums(run.n), [None] * run.n
    while p := (yield):
        whole += p.h[run.n].norm(dim=-1).sum().item()
        for l in range(run.n):
            J[l] = yield "jacobian", l
        for s in range(run.n):
            g = yield "without", s
            norms[s] += g[run.n].norm(dim=-1).sum().item()
    return {"shrinking": norms / whole, "traces": [J_l.trace() for J_l in J], "whole": whole / run.positions}


SHRINKING = Experiment(
    shrinking,
    columns=[("shrinks", lambda r: r["shrinking"], "last stream without it"),
             ("never", lambda r: None, "not measured")],
    scores={"whole": lambda r: r["whole"]},
    figure=lambda results: probe.curves(results, lambda r: {"": r["shrinking"]}, "Shrinking", "block", "ratio"))


def shrinking_by_hand(model, tokens):
    blocks = list(model.blocks)

    def last_norm(layers):
        return mean_norm([streams_by_hand(model, sequence, layers)[-1] for sequence in tokens])
    with torch.no_grad():
        return [last_norm(blocks[:s] + blocks[s + 1:]) / last_norm(blocks) for s in range(len(blocks))]


def test_an_experiment_from_outside_runs_among_the_others(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    monkeypatch.setitem(EXPERIMENTS, "shrinking", SHRINKING)
    model, tokens = make_model(**MODELS["dense"]), own_tokens("dense")
    got = probe.probe(model, tokens)
    assert got["shrinking"] == pytest.approx(shrinking_by_hand(model, tokens), rel=1e-10)
    traces = [mean * model.config.n_embd * 4 * T for mean in got["jacobian"]["diagonal_mean"]]        # of 4 sequences
    assert got["traces"] == pytest.approx(traces, rel=1e-10)
    monkeypatch.undo()
    want = probe.probe(model, tokens)
    del want["seconds"]
    assert differences(want, got, lambda path: 1e-9, 1e-12) == []            # and the others are as they were


def test_an_experiment_from_outside_is_in_every_table_file_and_figure(monkeypatch, tmp_path, run_main):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(EXPERIMENTS, "shrinking", SHRINKING)
    monkeypatch.chdir(tmp_path)
    tokens, want = make_tokens(4, 8), {}
    probe.np.save("mine.npy", tokens.numpy())
    for kind in ("dense", "moe"):
        (tmp_path / kind).mkdir()
        torch.save(checkpoint_of(make_model(torch.float32, **MODELS[kind])), f"{kind}/ckpt.pt")
        want[kind] = shrinking_by_hand(make_model(**MODELS[kind]), tokens)
    status, out, err = run_main(probe, "dense/ckpt.pt", "moe/ckpt.pt", "--only", "shrinking,variance", "--tokens",
                                "mine.npy", "--out", "both")
    assert (status, err) == (0, "")
    for kind in want:
        got = json.loads((tmp_path / "both" / kind / "probe.json").read_text())
        assert got["shrinking"] == pytest.approx(want[kind], rel=1e-5) and len(got["traces"]) == len(want[kind])
        assert (tmp_path / "both" / kind / "shrinking.png").read_bytes().startswith(b"\x89PNG")
        table = out[out.index(f"{kind}/ckpt.pt on"):].splitlines()
        assert table[1].split() == ["block", "variance", "growth", "shrinks"]
        assert [float(line.split()[3]) for line in table[2:2 + len(want[kind])]] == pytest.approx(want[kind], rel=1e-3)
        assert "shrinks: last stream without it" in out and "not measured" not in out
    assert (tmp_path / "both" / "shrinking.png").is_file()
    comparison = [line.split() for line in out.splitlines()[-4:-1]]
    assert comparison[0][-1] == "whole" and [row[0] for row in comparison[1:]] == ["dense", "moe"]
    # by default, too
    assert run_main(probe, "dense/ckpt.pt", "--tokens", "mine.npy").status == 0
    assert "shrinking" in json.loads((tmp_path / "dense" / "probe.json").read_text())


def test_an_experiment_that_needs_the_affine_maps_says_so_and_gets_them(monkeypatch):
    def symmetry(run):
        while (yield):
            pass
        return {"symmetry": [(W - W.T).norm() / W.norm() for W, b in run.maps]}
    monkeypatch.setitem(EXPERIMENTS, "symmetry", Experiment(symmetry, fits=True))
    got = probe.probe(make_model(**MODELS["dense"]), own_tokens("dense"), ["symmetry"])
    assert len(got["symmetry"]) == 5 and all(0 < x < math.sqrt(2) for x in got["symmetry"])


def asks_on(run):
    loss = 0.0
    while True:
        p = yield
        loss += p.loss if p else 0.0


def asks_for_a_stream_at_the_end(run):
    while (yield):
        pass
    yield "without", 0
    return {"wrong": 1.0}


def ends_early(run):
    yield
    return {"wrong": 1.0}


def asks_for_what_there_is_not(run):
    while (yield):
        yield "gradient", 0
    return {"wrong": 1.0}


def returns_nothing(run):
    while (yield):
        pass


def returns_another_part(run):
    while (yield):
        pass
    return {"right": 1.0}


@pytest.mark.parametrize("measure, words", [
    (asks_on, "None"), (asks_for_a_stream_at_the_end, "None"), (ends_early, "None"),
    (asks_for_what_there_is_not, "gradient"), (returns_nothing, "return"), (returns_another_part, "return")],
    ids=lambda x: getattr(x, "__name__", ""))
def test_an_experiment_that_breaks_the_rules_is_named_with_the_rule(measure, words, monkeypatch):
    """No bare StopIteration or KeyError, and no result without its part: the mistake is in the experiment."""
    monkeypatch.setitem(EXPERIMENTS, "wrong", Experiment(measure))
    with pytest.raises(RuntimeError, match=words) as error:
        probe.probe(make_model(**MODELS["dense"]), make_tokens(2, T), ["variance", "wrong"])
    assert "wrong" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# dropping: the greedy search


@pytest.mark.parametrize("kind", ["dense", "moe_lns"])
def test_the_cheapest_drops_are_those_of_a_greedy_search_by_brute_force(kind, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    model, tokens = make_model(**MODELS[kind]), own_tokens(kind)
    kept, gone = list(range(len(model.blocks))), []
    for _ in range(3):
        with torch.no_grad():
            losses = {l: loss_by_hand(model, tokens, [model.blocks[k] for k in kept if k != l]) for l in kept}
        gone.append(min(losses, key=losses.get))
        kept.remove(gone[-1])
    assert cheapest_drops(model, tokens, 3, lambda line: None) == gone


def test_the_search_says_which_block_it_is_at():
    lines = []
    cheapest_drops(make_model(n_layer=3), make_tokens(2, T), 2, lines.append)
    for number in (1, 2):
        assert any(line.startswith(f"choosing block {number} of 2 to drop: ") for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# several ranks: real processes

OF_RANKS = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, torch.distributed as dist
import probe
from helpers import make_model, make_tokens
from test_experiments import MODELS, T
from test_measurement import OF_PAIRS, SHRINKING
torch.set_num_threads(1)
dist.init_process_group("gloo")
probe.EXPERIMENTS["shrinking"] = SHRINKING
probe.TOKENS_AT_ONCE = 2 * T
found = {{}}
for kind in ("dense", "moe"):
    model = make_model(**MODELS[kind])
    for sequences in (2, 7):
        tokens = make_tokens(sequences, T)
        found[f"{{kind}} {{sequences}}"] = probe.probe(model, tokens, remove=(1, 2), jacobian_samples=3)
    found[f"{{kind}} pairs"] = {{"nats": probe.loglikelihoods(model, OF_PAIRS)[0]}}
if dist.get_rank() == dist.get_world_size() - 1:          # all ranks have it all
    json.dump(found, open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
"""
OF_PAIRS = [([k % 5] * (1 + k % 3), [k % 7 + 1] * (1 + k % 4)) for k in range(40)]


def torchrun(ranks: int, *args: Any, cwd: Any) -> Outcome:
    return run_python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *args, cwd=cwd)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work_and_find_the_same_numbers(ranks, tmp_path, monkeypatch):
    """Of 2 sequences a third rank has none; of 7 the halves and the Jacobian's sample fall unevenly on all."""
    (tmp_path / "script.py").write_text(OF_RANKS)
    done = torchrun(ranks, "script.py", "found.json", cwd=tmp_path)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    monkeypatch.setitem(EXPERIMENTS, "shrinking", SHRINKING)
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 2 * T)
    for kind in ("dense", "moe"):
        model = make_model(**MODELS[kind])
        for sequences in (2, 7):
            want = probe.probe(model, make_tokens(sequences, T), remove=(1, 2), jacobian_samples=3)
            del want["seconds"]
            assert differences(want, found[f"{kind} {sequences}"], lambda path: 1e-8, 1e-10) == []
        nats, _ = probe.loglikelihoods(model, OF_PAIRS)
        assert found[f"{kind} pairs"]["nats"] == pytest.approx(nats, rel=1e-10)


def test_torchrun_probe_prints_and_writes_once_what_one_process_does(tmp_path):
    for kind in ("dense", "moe"):
        torch.save(checkpoint_of(make_model(torch.float32, **MODELS[kind])), tmp_path / f"{kind}.pt")
    probe.np.save(tmp_path / "mine.npy", make_tokens(5, T).numpy())
    arguments = ["dense.pt", "moe.pt", "--tokens", "mine.npy", "--device", "cpu", "--dtype", "float64",
                 "--only", "variance,removal"]
    alone = run_script("probe.py", *arguments, "--out", "alone", cwd=tmp_path)
    several = torchrun(2, ROOT / "probe.py", *arguments, "--out", "several", cwd=tmp_path)
    assert alone.status == several.status == 0, several.err
    assert several.out.replace("several", "alone") == alone.out
    for name in ("dense", "moe"):
        want, got = (json.loads((tmp_path / out / name / "probe.json").read_text()) for out in ("alone", "several"))
        del want["seconds"]
        assert got.pop("run") == want.pop("run")
        assert differences(want, got, lambda path: 1e-8, 1e-10) == []
    assert len(list(tmp_path.glob("**/probe.json"))) == 4


def test_ranks_say_a_mistake_in_one_line(tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS["dense"])), tmp_path / "ckpt.pt")
    for mistake, words in ((["--sample", "a"], "--sample takes one process"), (["--length", "99"], "--length 99")):
        done = torchrun(2, ROOT / "probe.py", "ckpt.pt", *mistake, "--device", "cpu", cwd=tmp_path)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0] and done.status == 1


# ---------------------------------------------------------------------------------------------------------------------
# blocks spread over devices

# Half of the blocks on a device that fails where it meets the CPU: see stand_in.py.
SPREAD = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import data, model, probe, stand_in
from helpers import make_tokens
from test_experiments import T
from test_measurement import OF_PAIRS
torch.set_num_threads(1)
found = {{}}
for name, spread in (("whole", ()), ("spread", ("cpu", stand_in.DEVICE))):
    gpt, _ = data.load_model(sys.argv[1], "cpu", torch.float32, spread)
    text = model.generate(gpt, make_tokens(2, 5), 6, temperature=0)
    found[name] = {{"places": [block.ffn_norm.weight.device.type for block in gpt.blocks],
                   "probe": probe.probe(gpt, make_tokens(4, T), remove=(1, 2)),
                   "nats": probe.loglikelihoods(gpt, OF_PAIRS)[0], "text": text.tolist()}}
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_model_whose_blocks_are_spread_over_devices_computes_the_same(kind, tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS[kind])), tmp_path / "ckpt.pt")
    (tmp_path / "script.py").write_text(SPREAD)
    done = run_python("script.py", "ckpt.pt", cwd=tmp_path)
    assert done.status == 0, done.err
    whole, spread = json.loads(done.out).values()
    n = len(whole["places"])
    assert whole.pop("places") == ["cpu"] * n
    assert spread.pop("places") == ["cpu"] * math.ceil(n / 2) + ["stand_in"] * (n // 2)
    del whole["probe"]["seconds"]
    assert differences(whole, spread, lambda path: 1e-5, 1e-7) == []


@pytest.mark.parametrize("what", [[], ["--sample", "a"]])
def test_to_spread_over_one_device_is_refused(what, tmp_path, run_main):
    torch.save(checkpoint_of(make_model(torch.float32, **MODELS["dense"])), tmp_path / "ckpt.pt")
    outcome = run_main(probe, tmp_path / "ckpt.pt", "--spread", "--device", "cpu", *what)
    assert_mistake(outcome, "--spread takes two GPUs or more")
