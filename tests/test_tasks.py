"""Multiple choice in probe.py: against a scorer of one token at a time in float64, and answers worked out on paper.

    python -m pytest -q tests/test_tasks.py                    # half a minute, offline
    python -m pytest -q tests/test_tasks.py -k "real"          # the tasks of ../shared/tasks, the gpt2 encoding
"""
from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
import torch

import probe
from data import Task, encode_pair, export, get_tokenizer, read_tasks, save_checkpoint
from helpers import ROOT, SHARED, TINY, assert_mistake, make_model, run_python, run_script
from model import GPT, ModelConfig
from probe import Row, batches_of_rows, loglikelihoods, make_row, pack, packed_streams

V, LIMIT = TINY["vocab_size"], 12
EXPERTS = dict(n_experts=8, top_k=2, expert_hidden=8)
MODELS = {
    "gqa": dict(n_layer=3),
    "moe": dict(n_layer=2, shared_hidden=12, **EXPERTS),
    "lns": dict(n_layer=3, norm="lns"),
    "moe_peri": dict(n_layer=3, norm="peri", norm_topk_prob=True, **EXPERTS),
    "qwen": dict(n_layer=2, qk_norm="head", qkv_bias=True, tie_embeddings=True),
}


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> GPT:
    return make_model(dtype, block_size=LIMIT, **MODELS[kind])


@pytest.fixture
def bench(monkeypatch):
    """tests/bench/tasks.py"""
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import tasks
    return tasks


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_context_and_its_continuations_make_the_row_that_is_drawn_in_the_docstring():
    """c0 c1 c2 | a0 a1 (a2) | b0 b1 b2 (b3): what is in brackets is only predicted."""
    c, a, b = [20, 21, 22], [1, 2, 3], [4, 5, 6, 7]
    assert make_row(c, [(8, a), (3, b)]) == Row(
        token=[20, 21, 22, 1, 2, 4, 5, 6],
        position=[0, 1, 2, 3, 4, 3, 4, 5],
        segment=[0, 0, 0, 1, 1, 2, 2, 2],
        asked=[(2, 1, 8), (3, 2, 8), (4, 3, 8),                      # the context's end predicts the first of each
               (2, 4, 3), (5, 5, 3), (6, 6, 3), (7, 7, 3)])


def test_continuations_of_one_token_or_none_add_nothing_to_a_row():
    assert make_row([20, 21], [(0, [1]), (1, []), (2, [3])]) == Row([20, 21], [0, 1], [0, 0], [(1, 1, 0), (1, 3, 2)])


@pytest.mark.parametrize("pair, context, continuation", [
    (([1, 2], [3, 4]), [1, 2], [3, 4]),                              # 4 tokens
    (([1, 2, 3], [4, 5, 6]), [1, 2, 3], [4, 5, 6]),                  # 6 tokens are 5 inputs: they just fit
    (([1, 2, 3, 4], [5, 6, 7]), [2, 3, 4], [5, 6, 7]),
    (([1, 2, 3, 4, 5, 6, 7, 8], [9]), [4, 5, 6, 7, 8], [9]),
    (([1], [2, 3, 4, 5, 6]), [1], [2, 3, 4, 5, 6]),
    (([1, 2], [3, 4, 5, 6, 7]), [2], [3, 4, 5, 6, 7]),
    (([1], [2, 3, 4, 5, 6, 7, 8]), [3], [4, 5, 6, 7, 8]),            # of a long continuation the end is asked about
    (([1, 2], []), [1, 2], []),
])
def test_a_pair_that_is_too_long_is_cut_on_the_left(pair, context, continuation):
    assert pack([pair], 5) == [make_row(context, [(0, continuation)])]


def test_pairs_with_one_context_share_a_row_wherever_they_are():
    one, other = [1, 2], [3]
    pairs = [(one, [4, 5]), (other, [6]), ([*one], [7]), (one, [8, 9, 10])]
    assert pack(pairs, 12) == [make_row(one, [(0, [4, 5]), (2, [7]), (3, [8, 9, 10])]), make_row(other, [(1, [6])])]


def test_contexts_that_are_the_same_after_they_were_cut_share_a_row_and_others_do_not():
    pairs = [([1, 2, 3, 4, 5], [6]), ([9, 2, 3, 4, 5], [7]), ([1, 2, 3, 4, 5], [6, 7])]
    assert pack(pairs, 4) == [make_row([2, 3, 4, 5], [(0, [6]), (1, [7])]), make_row([3, 4, 5], [(2, [6, 7])])]


def test_so_many_pairs_are_packed_together_and_no_more(monkeypatch):
    pairs = [([1, 2], [i]) for i in range(10)]
    monkeypatch.setattr(probe, "PACKED_TOGETHER", 4)
    parts = range(4), range(4, 8), range(8, 10)
    assert pack(pairs, 12) == [make_row([1, 2], [(i, [i]) for i in part]) for part in parts]
    monkeypatch.undo()
    assert [len(row.asked) for row in pack([([1, 2], [3])] * 150, 12)] == [64, 64, 22]


MASK = """
    x . . . . . . .
    x x . . . . . .
    x x x . . . . .
    x x x x . . . .
    x x x x x . . .
    x x x . . x . .
    x x x . . x x .
    x x x . . x x x
"""


def test_a_token_of_a_row_stands_and_sees_as_it_would_alone():
    seen = []

    def block(x, position, mask):
        seen.append((x, position, mask))
        return x + 1
    model = argparse.Namespace(embed=lambda idx: idx, blocks=[block, block])
    rows = [make_row([20, 21, 22], [(0, [1, 2, 3]), (1, [4, 5, 6, 7])]), make_row([9], [(2, [8, 7, 6])])]
    x = packed_streams(model, rows, torch.device("cpu"))
    (tokens, position, mask), second = seen
    assert tokens.tolist()[0] == rows[0].token and tokens.tolist()[1][:3] == [9, 8, 7]
    assert position.tolist()[0] == [0, 1, 2, 3, 4, 3, 4, 5] and position.tolist()[1][:3] == [0, 1, 2]
    want = [[c == "x" for c in line.split()] for line in MASK.split("\n") if line.strip()]
    assert mask.shape == (2, 1, 8, 8) and mask[0, 0].tolist() == want
    assert mask[1, 0, :3].tolist() == [[True] * (i + 1) + [False] * (7 - i) for i in range(3)]
    assert mask[1, 0].diagonal().all()                               # padding sees something: no softmax of nothing
    assert (second[1] is position or torch.equal(second[1], position)) and torch.equal(second[2], mask)
    assert torch.equal(second[0], tokens + 1) and torch.equal(x, tokens + 2)


@pytest.mark.parametrize("at_once", [1, 50, 1024, 10**6])
def test_batches_hold_every_row_once_the_longest_first_and_not_too_many_tokens(at_once):
    draw = random.Random(0)
    rows = [make_row([i] * draw.randint(1, 70), [(i, [1])]) for i in range(200)]
    batches = list(batches_of_rows(rows, at_once))
    assert sorted(row.token[0] for batch in batches for row in batch) == list(range(200))
    lengths = [len(row.token) for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        longest = len(batch[0].token)
        assert len(batch) * longest <= max(at_once, 256, longest)
        assert len(batch) * longest <= 256 or len(batch[-1].token) > 0.8 * longest                # little is padding


# ---- log-likelihoods -------------------------------------------------------------------------------------------------
@torch.no_grad()
def one_token_at_a_time(model, context, continuation):
    """log p(continuation | context) by a whole pass per token that sees its last LIMIT inputs and no more than those.

    Tokens that are cut off are not predicted either: of a request, the last LIMIT + 1 tokens are what counts.
    """
    whole, total = (context + continuation)[-LIMIT - 1:], 0.0
    for j in range(max(1, len(whole) - len(continuation)), len(whole)):
        total += model(torch.tensor([whole[:j]]))[0][0, -1].log_softmax(-1)[whole[j]].item()
    return total


def make_pairs(seed=0):
    """Requests of all kinds in a random order; the token lists of one context are equal, not the same object."""
    draw = random.Random(seed)

    def some(n):
        return [draw.randrange(V) for _ in range(n)]
    pairs = [(some(n), some(m)) for n in (1, 2, 5, 9) for m in (1, 2, 6)]                    # contexts of their own
    for n in (1, 3, 6):
        context = some(n)
        pairs += [([*context], some(m)) for m in (1, 1, 4, 2, 7, 0)]                         # shared ones
    context = some(4)
    pairs += [(context[:2], context[2:] + [5]), (context, [5]), (context, [5, 5]), (context, [5])]   # prefixes, twins
    long = some(30)
    pairs += [([*long], some(m)) for m in (1, 3, 3, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 9)]         # cut on the left
    pairs += [(some(10), some(3)), (some(11), some(3))]                     # 13 tokens just fit, 14 do not
    pairs += [([*long[-3:]], some(LIMIT + 4)), (some(1), [])]
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_loglikelihoods_equal_those_of_one_token_at_a_time(kind, dtype, tolerance, monkeypatch, bench):
    pairs, exact = make_pairs(), model_of(kind)
    want = [one_token_at_a_time(exact, *pair) for pair in pairs]
    model = model_of(kind, dtype)
    for tokens_at_once, at_once in ((4096, 2**26), (60, 7 * V), (1, 1)):         # one batch, some, a row each
        monkeypatch.setattr(probe, "TOKENS_AT_ONCE", tokens_at_once)
        monkeypatch.setattr(probe, "logits_at_once", lambda device: at_once)
        got, cut = loglikelihoods(model, pairs)
        assert got == pytest.approx(want, abs=tolerance, rel=tolerance)
        assert cut == sum(len(a) + len(b) > LIMIT + 1 for a, b in pairs) == 10
    naive = bench.naive_loglikelihoods(model, [pair for pair in pairs if pair[1]])
    assert naive == pytest.approx([x for x, pair in zip(want, pairs) if pair[1]], abs=tolerance, rel=tolerance)


def test_the_model_of_these_tests_does_not_give_every_request_the_same_score():
    want = [one_token_at_a_time(model_of("gqa"), *pair) for pair in make_pairs()]
    assert len({round(x, 6) for x in want if x}) > 30 and min(want) < -20


def test_empty_continuations_alone_have_probability_one(bench):
    model = model_of("gqa")
    assert loglikelihoods(model, [([1, 2], []), ([3], [])]) == ([0.0, 0.0], 0)
    assert bench.naive_loglikelihoods(model, [([1, 2], [])]) == [0.0]


def test_many_requests_with_one_context_do_not_make_one_endless_row(monkeypatch):
    model, lengths = model_of("gqa"), []
    pairs = [([1, 2, 3], [i % V, (7 * i) % V]) for i in range(300)]
    embed = model.embed.forward
    monkeypatch.setattr(model.embed, "forward", lambda idx: lengths.append(idx.size(1)) or embed(idx))
    got, _ = loglikelihoods(model, pairs)
    assert max(lengths) < 100
    monkeypatch.undo()
    assert got == pytest.approx([one_token_at_a_time(model, *pair) for pair in pairs], abs=1e-10)


def test_a_shared_context_is_run_once(monkeypatch):
    model, tokens = model_of("gqa"), []
    embed = model.embed.forward
    monkeypatch.setattr(model.embed, "forward", lambda idx: tokens.append(idx.numel()) or embed(idx))
    loglikelihoods(model, [([1, 2, 3, 4, 5, 6, 7, 8], [i]) for i in range(6)])
    assert sum(tokens) == 8


# ---- context and continuation ----------------------------------------------------------------------------------------
def harness_pair(encode, prefix, context, continuation):
    """lm-evaluation-harness 0.4.13, api/model.py: loglikelihood and _encode_pair of a causal model, line by line."""
    if context == "":
        return [prefix], encode(continuation)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = encode(context + continuation)
    context_enc = encode(context)
    return context_enc, whole_enc[len(context_enc):]


TEXTS = [("Question: why?\nAnswer:", " because"), ("The answer is", ""), ("The answer is ", "blue"), ("x  ", "  y"),
         ("", " alone"), ("", "alone"), ("a\n", "\nb"), ("a \t\n", "b"), ("Answer: un", "happy"), ("hel", "lo"),
         ("The cat", "s"), ("don", "'t"), ("caf\u00e9", "s"), ("\U0001f600", " ok"), ("hel", "lo world"),
         ("na\u00efve\u00a0", "\u00e9t\u00e9"), ("<|endoftext|>", "<|endoftext|>"), ("x" * 100, "x" * 40),
         ("12", "345"), ("a\u3000", "b")]


@pytest.mark.parametrize("context, continuation", TEXTS)
def test_bytes_are_split_as_the_harness_splits_them(context, continuation):
    enc = get_tokenizer("bytes")
    got = encode_pair(enc, context, continuation)
    encode = functools.partial(enc.encode, allowed_special="all")
    assert got == harness_pair(encode, enc.eot_token, context, continuation)
    stem = context.rstrip()
    assert enc.decode(got[1]) == context[len(stem):] + continuation
    assert enc.decode(got[0]) == (stem or "<|endoftext|>")


@pytest.mark.parametrize("context, continuation", TEXTS)
def test_real_gpt2_tokens_are_split_as_the_harness_splits_them(context, continuation, gpt2):
    encode = functools.partial(gpt2.encode, allowed_special="all")
    want = harness_pair(encode, gpt2.eot_token, context, continuation)
    assert encode_pair(gpt2, context, continuation) == want


def test_real_gpt2_tokens_that_merge_over_the_boundary_belong_to_the_continuation_or_vanish(gpt2):
    answer = [33706, 25]                                                                            # "Answer", ":"
    assert encode_pair(gpt2, "Answer:", " yes") == encode_pair(gpt2, "Answer: ", "yes") == (answer, [3763])
    assert encode_pair(gpt2, "Answer: ", " yes") == (answer, [220, 3763])
    assert encode_pair(gpt2, "hel", "lo world") == ([2978], [995])                                  # "hello" is a token
    assert encode_pair(gpt2, "hel", "lo") == ([2978], [])
    assert encode_pair(gpt2, "Answer: un", "happy") == ([*answer, 555], [])                         # so is " unhappy"
    assert encode_pair(gpt2, " \n", "a") == ([50256], gpt2.encode_ordinary(" \na"))


def test_a_context_without_text_is_the_end_of_a_document_and_keeps_its_blanks():
    enc = get_tokenizer("bytes")
    assert encode_pair(enc, "", " a") == ([256], [32, 97])
    assert encode_pair(enc, " ", "a") == ([256], [32, 97])


def test_a_tokenizer_that_begins_texts_with_a_token_begins_contexts_with_it(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="a folder's tokenizer needs it")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[bos]": 0, "[eos]": 1, "a": 2, "b": 3, "?": 4}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[eos]"}')
    for folder, start in (("plain", []), ("bos", [0])):
        if start:
            inner.post_processor = tokenizers.processors.TemplateProcessing("[bos] $A", special_tokens=[("[bos]", 0)])
        (tmp_path / folder).mkdir()
        inner.save(str(tmp_path / folder / "tokenizer.json"))
        (tmp_path / folder / "config.json").write_text('{"eos_token_id": 1}')
        enc = get_tokenizer(str(tmp_path / folder))
        assert enc.encode_ordinary("a b") == [2, 3]                                 # in a corpus: no [bos]
        for context, continuation in (("a b", " b"), ("a ", "b a")):                # the harness encodes with [bos]
            want = harness_pair(lambda text: inner.encode(text).ids, 0, context, continuation)
            assert encode_pair(enc, context, continuation) == want
            assert want[0][:1] == (start or [2])
        assert encode_pair(enc, "", "b") == (start or [1], [3])


# ---- accuracies: a model that gives every byte the same probability everywhere, a power of 1/2 -----------------------
BITS = {"a": 1, "b": 2, " ": 3, "c": 4, "\u00e9": 10}                      # e acute: two bytes of 5 bits each
BYTE_BITS = {97: 1, 98: 2, 32: 3, 99: 4, 0xC3: 5, 0xA9: 5}


def unigram_model(path, **settings):
    """A checkpoint with p(byte) = 2^-BYTE_BITS, whatever came before: blocks that add nothing, a stream of ones."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=8, **{"block_size": 64, **settings})
    model = GPT(config)
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].ffn.down.weight.zero_()
        model.head.weight.fill_(-100.0 / 8)
        for byte, bits in BYTE_BITS.items():
            model.head.weight[byte] = -bits * math.log(2) / 8
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"model": model.state_dict(), "settings": asdict(config), "tokenizer": "bytes"})
    return path


def write_task(folder, questions, primary="acc_raw", first=0, raw=None, **changed):
    """A task as OLMES writes it; questions: (context, choices, label); raw: all lines; changed: in every line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for doc, (context, choices, label) in enumerate(questions, first):
        for offset, context in ((0, context), (1_000_000, "Answer:")):                      # the second: no question
            for idx, choice in enumerate(choices):
                row = {"request_type": "loglikelihood", "doc": {"query": context}, "doc_id": doc + offset, "idx": idx,
                       "request": {"context": context, "continuation": choice}, "task_name": "t", "label": label}
                lines.append(json.dumps(row | changed))
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(lines) if raw is None else raw)
    (folder / "config.json").write_text(json.dumps({"task_name": "t", "task_config": {"primary_metric": primary}}))
    return folder


PLAIN_AND_TOKEN = [" a", " bb"]             # 4 and 7 bits; 4 and 3.5 a character; 2 and 2.33 a token
PLAIN_ONLY = [" \u00e9", " cccc"]           # 13 and 19 bits; 13 and 4.75 a character; 4.33 and 3.8 a token
TWINS = [" ab", " ab"]                      # a tie is the first one's
QUESTIONS = [("x", PLAIN_AND_TOKEN, 0), ("y", PLAIN_ONLY, 1), ("z", TWINS, 1), ("w", TWINS, 0),
             ("v", PLAIN_AND_TOKEN, 1), ("x", PLAIN_AND_TOKEN, 1)]
RIGHT = {"acc": [1, 0, 0, 1, 0, 0], "acc_per_char": [0, 1, 0, 1, 1, 1], "acc_per_token": [1, 1, 0, 1, 0, 0]}


@pytest.fixture
def cli(run_main):
    """cli(*args): probe.py, its exit status, stdout, stderr."""
    return functools.partial(run_main, probe)


def scores(cli, checkpoint, *tasks, out=None):
    """The "tasks" of the probe.json that `--only tasks` writes."""
    out = out or checkpoint.parent / "out"
    (out / "probe.json").unlink(missing_ok=True)                             # of other tasks
    status, said, err = cli(checkpoint, "--only", "tasks", "--out", out, "--tasks", *tasks)
    assert status == 0, err
    return json.loads((out / "probe.json").read_text())["tasks"]


def standard_error(right):
    return statistics.stdev(right) / math.sqrt(len(right))


def test_accuracies_and_standard_errors_are_those_worked_out_on_paper(tmp_path, cli):
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), write_task(tmp_path / "t", QUESTIONS, "acc_per_char"))["t"]
    for metric, right in RIGHT.items():
        assert got[metric] == pytest.approx(sum(right) / 6), metric
        assert got[f"{metric}_stderr"] == pytest.approx(standard_error(right)), metric
    assert got["n"] == 6 and got["truncated"] == 0
    assert got["primary_metric"] == "acc_per_char" and got["primary"] == pytest.approx(4 / 6)
    assert got["primary_stderr"] == got["acc_per_char_stderr"]
    assert len({got[metric] for metric in RIGHT}) == 3                       # the three tell each other apart


@pytest.mark.parametrize("written, meant", [("acc_raw", "acc"), ("acc", "acc"), ("acc_per_token", "acc_per_token")])
def test_the_primary_metric_is_the_one_that_the_task_names(written, meant, tmp_path, cli):
    task = write_task(tmp_path / "t", QUESTIONS, written)
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), task)
    assert got["t"]["primary_metric"] == meant
    assert got["t"]["primary"] == got["average"]["primary"] == pytest.approx(sum(RIGHT[meant]) / 6)


def test_the_average_is_over_tasks_whatever_their_size(tmp_path, cli):
    write_task(tmp_path / "all" / "one", QUESTIONS, "acc_per_char")
    write_task(tmp_path / "all" / "two", QUESTIONS[:2])
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), tmp_path / "all")
    assert list(got) == ["one", "two", "average"]
    for metric, right in RIGHT.items():
        assert got["average"][metric] == pytest.approx((sum(right) / 6 + sum(right[:2]) / 2) / 2)
        both = math.hypot(standard_error(right), standard_error(right[:2])) / 2
        assert got["average"][f"{metric}_stderr"] == pytest.approx(both)
    assert got["average"]["primary"] == pytest.approx((4 / 6 + 1 / 2) / 2)


def test_a_single_question_has_no_spread(tmp_path, cli):
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), write_task(tmp_path / "t", QUESTIONS[:1]))["t"]
    assert (got["acc"], got["acc_stderr"], got["n"]) == (1, 0, 1)


def test_questions_may_be_numbered_anyhow_and_those_beyond_a_million_are_left_out(tmp_path, cli):
    """Where the unconditional requests counted, they would be questions of their own."""
    checkpoint = unigram_model(tmp_path / "ckpt.pt")
    got = scores(cli, checkpoint, write_task(tmp_path / "t", QUESTIONS, first=999_990))["t"]
    assert got["n"] == 6 and got["acc"] == pytest.approx(2 / 6)
    got = scores(cli, checkpoint, write_task(tmp_path / "t", QUESTIONS, first=999_998))["t"]
    assert got["n"] == 2 and got["acc"] == pytest.approx(1 / 2)


def test_blanks_that_end_a_context_count_as_tokens_and_not_as_characters(tmp_path, cli):
    """After "x " a choice "a" is " a": 4 bits in 2 tokens, 1 character. "bb": 7 bits, 3 tokens, 2 characters."""
    task = write_task(tmp_path / "t", [("x ", ["a", "bb"], 1)])
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), task)["t"]
    assert (got["acc"], got["acc_per_char"], got["acc_per_token"]) == (0, 1, 0)


def test_contexts_that_are_cut_are_counted(tmp_path, cli):
    task = write_task(tmp_path / "t", [("x" * 62, [" a", " aa", " aaa"], 0), ("x" * 90, [" a", " b"], 0)])
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), task)["t"]
    assert got["truncated"] == 2                    # one choice of 62 + 4 tokens, two of 90 + 2; 65 fit
    assert got["acc"] == 1
    task = write_task(tmp_path / "t", [("x" * 62, [" a", " aa"], 0), ("x" * 90, [" a", " b"], 0)])
    assert scores(cli, unigram_model(tmp_path / "ckpt.pt"), task)["t"]["truncated"] == 1


def test_chance_is_right_once_in_as_many_choices_as_a_question_has(tmp_path, cli):
    four, two = ("x", [" a", " b", " c", " d"], 0), ("x", [" a", " b"], 0)
    write_task(tmp_path / "all" / "mixed", [four, two, two])
    write_task(tmp_path / "all" / "pairs", [two])
    got = scores(cli, unigram_model(tmp_path / "ckpt.pt"), tmp_path / "all")
    assert got["mixed"]["chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3) and got["pairs"]["chance"] == 1 / 2
    assert got["average"]["chance"] == pytest.approx((got["mixed"]["chance"] + 1 / 2) / 2)


def test_choices_count_under_their_own_contexts(tmp_path, cli):
    """As winogrande has it: the contexts differ, the continuation is one."""
    rows = [{"doc_id": 0, "idx": i, "label": 1, "request": {"context": context, "continuation": " a"}}
            for i, context in enumerate("xy")]
    task = write_task(tmp_path / "t", [], raw="\n".join(map(json.dumps, rows)))
    checkpoint = unigram_model(tmp_path / "ckpt.pt")
    (_, _, pairs), = read_tasks([task], "bytes", 257).values()
    assert pairs == [([120], [32, 97]), ([121], [32, 97])]
    assert scores(cli, checkpoint, task)["t"]["acc"] == 0                                            # a tie again


# ---- the command line ------------------------------------------------------------------------------------------------
def test_tasks_alone_need_no_corpus_and_print_a_table(tmp_path, cli):
    checkpoint, task = unigram_model(tmp_path / "run" / "ckpt.pt"), write_task(tmp_path / "mine", QUESTIONS)
    status, out, _ = cli(checkpoint, "--only", "tasks", "--tasks", task)
    assert status == 0 and not list((tmp_path / "run").glob("*.png")) and "figures" not in out
    head, mine, average = map(str.split, out.strip().splitlines()[-4:-1])
    assert head[:5] == ["acc", "acc_per_char", "acc_per_token", "chance", "questions"]
    assert mine == ["mine", *"0.333 +- 0.211* 0.667 +- 0.211 0.500 +- 0.224 0.500 6 0".split()]
    assert average[-3:] == ["0.333", "+-", "0.211*"]
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert set(found) == {"tasks", "run"} and found["run"]["tasks"] == [str(task)] and found["run"]["experiments"] == []


@pytest.mark.filterwarnings("ignore:Data has no positive values")            # in a figure: the stream is constant
def test_tasks_and_experiments_that_are_measured_later_join_those_in_probe_json(tmp_path, cli):
    checkpoint, one = unigram_model(tmp_path / "run" / "ckpt.pt"), write_task(tmp_path / "one", QUESTIONS)
    two, tokens = write_task(tmp_path / "two", QUESTIONS[:2]), tmp_path / "tokens.npy"
    probe.np.save(tokens, probe.np.full((2, 8), 97))
    calls = [["tasks", "--tasks", one], ["variance", "--tokens", tokens], ["tasks", "--tasks", one, two],
             ["lens", "--tokens", tokens]]
    held = []
    for only, *args in calls:
        assert cli(checkpoint, "--only", only, *args).status == 0
        found = json.loads((tmp_path / "run" / "probe.json").read_text())
        held.append(({*found} & {"variance", "lens"}, {*found["tasks"]}))
    assert held == [(set(), {"one", "average"}), ({"variance"}, {"one", "average"}),
                    ({"variance"}, {"one", "two", "average"}), ({"variance", "lens"}, {"one", "two", "average"})]
    assert found["run"]["experiments"] == ["variance", "lens"] and found["run"]["tasks"] == [str(one), str(two)]
    assert_mistake(cli(checkpoint, "--only", "tasks", "--tasks", two), str(one), "--out DIR")    # it would lose one
    assert json.loads((tmp_path / "run" / "probe.json").read_text()) == found


@pytest.mark.filterwarnings("ignore:Data has no positive values")            # in a figure: the stream is constant
def test_tasks_join_the_experiments_in_one_probe_json(tmp_path, cli):
    checkpoint, task = unigram_model(tmp_path / "run" / "ckpt.pt"), write_task(tmp_path / "t", QUESTIONS)
    tokens = tmp_path / "tokens.npy"
    probe.np.save(tokens, probe.np.full((2, 8), 97))
    for only in ("variance", "variance,tasks"):
        status, out, err = cli(checkpoint, "--only", only, "--tokens", tokens, "--tasks", task)
        found = json.loads((tmp_path / "run" / "probe.json").read_text())
        assert status == 0 and "variance" in found and found["tasks"]["t"]["n"] == 6, err
        assert found["run"]["experiments"] == ["variance"]


def test_several_checkpoints_are_compared_by_their_accuracy(tmp_path, cli):
    checkpoints = [unigram_model(tmp_path / name / "ckpt.pt") for name in ("one", "two")]
    task = write_task(tmp_path / "t", QUESTIONS)
    status, out, err = cli(*checkpoints, "--only", "tasks", "--tasks", task, "--out", tmp_path / "both")
    assert status == 0, err
    lines = out[out.index("accuracy"):].splitlines()
    assert [line.split() for line in lines[1:3]] == [["one", "0.3333"], ["two", "0.3333"]]
    assert (tmp_path / "both" / "one" / "probe.json").is_file()


def test_names_are_those_of_the_folders_however_they_are_given(tmp_path, cli, monkeypatch):
    checkpoint = unigram_model(tmp_path / "ckpt.pt")
    one = write_task(tmp_path / "all" / "deep" / "one", QUESTIONS)
    two = write_task(tmp_path / "all" / "two", QUESTIONS)

    def names(*tasks):
        return list(scores(cli, checkpoint, *tasks))[:-1]
    assert names(tmp_path / "all") == names(f"{tmp_path}/all/") == ["deep/one", "two"]
    assert names(one) == names(f"{one}/") == ["one"]
    assert names(two, one) == ["two", "deep/one"]
    monkeypatch.chdir(tmp_path / "all")
    assert names(".") == names("./") == ["deep/one", "two"]
    assert names("deep", "two") == names("deep/", "./two") == ["deep/one", "two"]
    monkeypatch.chdir(one)
    assert names(".") == ["one"]
    assert names("..") == ["one"] and names("../..") == ["deep/one", "two"]
    monkeypatch.chdir(tmp_path / "all" / "two")
    (two / "sub").mkdir()
    monkeypatch.chdir(two / "sub")
    assert names("..") == ["two"]


def test_tasks_of_one_name_in_two_folders_go_by_both(tmp_path, cli):
    folders = [write_task(tmp_path / "tasks" / name / "rc_0shot", QUESTIONS) for name in ("copa", "sciq")]
    found = scores(cli, unigram_model(tmp_path / "ckpt.pt"), *folders)
    assert list(found) == ["copa/rc_0shot", "sciq/rc_0shot", "average"]


def test_a_task_given_twice_is_refused_and_so_is_one_named_as_the_average_is(tmp_path, cli):
    checkpoint = unigram_model(tmp_path / "ckpt.pt")
    copa, average = (write_task(tmp_path / name, QUESTIONS) for name in ("a/copa", "average"))
    for tasks in ([copa, copa], [copa, copa.parent], [average]):
        outcome = cli(checkpoint, "--only", "tasks", "--tasks", *tasks)
        assert_mistake(outcome)
        assert "'copa'" in outcome.err or "'average'" in outcome.err
    assert not (tmp_path / "probe.json").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    "cut off": lambda t: truncated(t / "requests.jsonl.gz"),
    "not gzip": lambda t: (t / "requests.jsonl.gz").write_text("{}\n"),
    "flipped bits": lambda t: (t / "requests.jsonl.gz").write_bytes(
        (t / "requests.jsonl.gz").read_bytes()[:40] + b"\xff" * 30 + (t / "requests.jsonl.gz").read_bytes()[70:]),
    "empty": lambda t: write_task(t, QUESTIONS, raw=""),
    "not json": lambda t: write_task(t, QUESTIONS, raw="hello\nthere\n"),
    "not utf-8": lambda t: (t / "requests.jsonl.gz").write_bytes(gzip.compress(b'{"a": "\xff"}\n')),
    "lists": lambda t: write_task(t, QUESTIONS, raw="[1, 2]\n"),
    "another format": lambda t: write_task(t, QUESTIONS, raw='{"text": "a document"}\n'),
    "a request that is text": lambda t: write_task(t, QUESTIONS, request="Question"),
    "no continuation": lambda t: write_task(t, QUESTIONS, request={"context": "x"}),
    "no context": lambda t: write_task(t, QUESTIONS, request={"continuation": "x"}),
    "a context that is a list": lambda t: write_task(t, QUESTIONS, request={"context": ["x"], "continuation": "y"}),
    "a continuation that is null": lambda t: write_task(t, QUESTIONS, request={"context": "x", "continuation": None}),
    "a doc_id that is text": lambda t: write_task(t, QUESTIONS, doc_id="one"),
    "only unconditional requests": lambda t: write_task(t, QUESTIONS, first=1_000_000),
    "a label that no choice has": lambda t: write_task(t, QUESTIONS, label=7),
    "a label that is text": lambda t: write_task(t, QUESTIONS, label="0"),
    "a question without its right choice": lambda t: write_task(t, [*QUESTIONS, ("x", PLAIN_ONLY, 2)]),
    "a choice that is empty": lambda t: write_task(t, [*QUESTIONS, ("x", ["", " a"], 1)]),
    "no config": lambda t: (t / "config.json").unlink(),
    "a config of something else": lambda t: (t / "config.json").write_text('{"task_config": []}'),
    "a config that is no json": lambda t: (t / "config.json").write_text("primary_metric: acc"),
    "no primary metric": lambda t: (t / "config.json").write_text('{"task_config": {}}'),
    "a primary metric that is null": lambda t: write_task(t, QUESTIONS, None),
    "a primary metric that is a list": lambda t: write_task(t, QUESTIONS, ["acc"]),
    "a metric that is unknown": lambda t: write_task(t, QUESTIONS, "exact_match"),
    "nothing": lambda t: (t / "requests.jsonl.gz").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_foreign_files_are_one_line_and_status_2(kind, tmp_path, cli):
    checkpoint, task = unigram_model(tmp_path / "ckpt.pt"), write_task(tmp_path / "broken", QUESTIONS)
    DAMAGE[kind](task)
    fine = write_task(tmp_path / "fine", QUESTIONS)
    outcome = cli(checkpoint, "--only", "tasks", "--tasks", fine, task)
    assert_mistake(outcome, "error: --tasks", "broken")
    assert outcome.out == "" and outcome.err.startswith("error: --tasks") and "Traceback" not in outcome.err
    assert not (tmp_path / "probe.json").exists()


def test_what_is_wrong_with_the_tasks_is_said_before_the_experiments_run(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda *args, **kwargs: pytest.fail("the experiments ran"))
    tokens = tmp_path / "tokens.npy"
    probe.np.save(tokens, probe.np.full((2, 8), 97))
    assert_mistake(cli(unigram_model(tmp_path / "ckpt.pt"), "--tokens", tokens, "--tasks", tmp_path / "none"), "none")


def test_only_tasks_without_tasks_is_a_mistake(tmp_path, cli):
    for only in ("tasks", "causal,tasks"):
        assert_mistake(cli(unigram_model(tmp_path / "ckpt.pt"), "--only", only), "--tasks")


def test_the_script_itself_exits_with_status_2_and_one_line(tmp_path):
    done = run_script("probe.py", unigram_model(tmp_path / "ckpt.pt"), "--only", "tasks", "--tasks", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: --tasks {tmp_path}: no requests.jsonl.gz there\n"


def test_a_tokenizer_may_be_named_and_must_be_the_models_own(tmp_path, cli, gpt2):
    checkpoint, task = unigram_model(tmp_path / "ckpt.pt"), write_task(tmp_path / "t", QUESTIONS)
    arguments = ("--only", "tasks", "--tasks", task, "--out", tmp_path / "out")
    saved = torch.load(checkpoint, weights_only=True)
    save_checkpoint(tmp_path / "other.pt", saved | {"tokenizer": "no such encoding"})
    assert_mistake(cli(tmp_path / "other.pt", *arguments), "no such encoding")
    assert cli(tmp_path / "other.pt", *arguments, "--tokenizer", "bytes")[0] == 0
    found = json.loads((tmp_path / "out" / "probe.json").read_text())["tasks"]["t"]
    assert found["acc_per_char"] == pytest.approx(4 / 6)
    assert_mistake(cli(checkpoint, *arguments, "--tokenizer", "gpt2"), "gpt2", "vocab_size=257")


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(tmp_path, cli):
    pytest.importorskip("safetensors", reason="model folders are safetensors")
    export(unigram_model(tmp_path / "ckpt.pt"), tmp_path / "folder")
    for file in (tmp_path / "folder").glob("tokenizer*"):
        file.unlink()
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tokenizer"}))
    arguments = (tmp_path / "folder", "--only", "tasks", "--tasks", write_task(tmp_path / "t", QUESTIONS))
    assert_mistake(cli(*arguments), "token")
    assert cli(*arguments, "--tokenizer", "bytes")[0] == 0
    found = json.loads((tmp_path / "folder" / "probe.json").read_text())["tasks"]["t"]
    assert found["acc_per_char"] == pytest.approx(4 / 6)


def test_the_bench_of_tasks_times_both_ways(tmp_path):
    task = write_task(tmp_path / "t", QUESTIONS)
    done = run_python(ROOT / "tests/bench/tasks.py", unigram_model(tmp_path / "ckpt.pt"), task, "--rounds", 1)
    assert done.status == 0 and "naive" in done.out and done.out.split()[0] == "t", done.err
    assert done.err == "" and not (tmp_path / "probe.json").exists()


# ---- the real ones ---------------------------------------------------------------------------------------------------
REAL = {"arc_easy": (570, "acc"), "copa": (100, "acc"), "openbookqa": (500, "acc_per_char"), "sciq": (1000, "acc")}


def test_the_real_tasks_are_read_whole():
    if not (SHARED / "tasks").is_dir():
        pytest.skip(f"no tasks in {SHARED / 'tasks'}")
    tasks = read_tasks([str(SHARED / "tasks")], "bytes", 257)
    for name, task in tasks.items():
        assert (len({request["doc_id"] for request in task.requests}), task.primary) == REAL[name]
    assert set(tasks) == set(REAL)
    for task in tasks.values():
        for request, (context, continuation) in zip(task.requests, task.pairs, strict=True):
            assert bytes(context).decode() == request["context"]
            assert bytes(continuation).decode() == request["continuation"]


def test_the_real_copa_is_scored_as_one_token_at_a_time_scores_it(gpt2):
    if not (SHARED / "tasks" / "copa").is_dir():
        pytest.skip(f"no tasks in {SHARED / 'tasks'}")
    model = make_model(vocab_size=gpt2.n_vocab, block_size=LIMIT, n_layer=1)
    rows, _, pairs = read_tasks([str(SHARED / "tasks" / "copa")], "gpt2", gpt2.n_vocab)["copa"]
    few = {"copa": Task(rows[:20], "acc", pairs[:20])}
    want = [one_token_at_a_time(model, *pair) for pair in pairs[:20]]
    assert loglikelihoods(model, pairs[:20])[0] == pytest.approx(want, abs=1e-9)
    right = [(want[i] >= want[i + 1]) == (rows[i]["label"] == 0) for i in range(0, 20, 2)]
    got = probe.run_tasks(model, few, lambda line: None)["copa"]
    assert (got["n"], got["acc"]) == (10, sum(right) / 10)
    assert got["acc_stderr"] == pytest.approx(standard_error(list(map(int, right))))
