"""Files of tasks, and how their texts become tokens: as in lm-evaluation-harness, with transformers' tokenizers.

    python -m pytest -q tests/test_task_files.py       # half a minute on one core, offline
"""
from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch
from helpers import assert_mistake, checkpoint_of, make_model
from test_tokenizers import FILES, write_tokenizer

import data as D
import probe
from model import UserError

transformers = pytest.importorskip("transformers", reason="AutoTokenizer is what lm-evaluation-harness encodes with")


def row(doc_id, idx, label=0, context="a b", continuation=" cat", **more):
    return {"doc_id": doc_id, "idx": idx, "label": label,
            "request": {"context": context, "continuation": continuation}, **more}


def write_task(folder, rows, primary="acc"):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(map(json.dumps, rows)))
    (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": primary}}))
    return folder


# ---- tokens of contexts ------------------------------------------------------------------------------------------
def harness_pair(auto, context, continuation):
    """lm-evaluation-harness 0.4.13: loglikelihood of api/model.py, tok_encode of models/huggingface.py."""
    prefix = auto.eos_token_id if auto.bos_token_id is None else auto.bos_token_id

    def tok_encode(text, **kwargs):
        if not kwargs and text.startswith(auto.decode(prefix)):
            kwargs = {"add_special_tokens": False}
        return auto.encode(text, **kwargs)
    if context == "":
        rest = tok_encode(continuation, add_special_tokens=False)
        return ([prefix], rest) if prefix != rest[0] else (rest[:1], rest[1:])
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    context_enc = tok_encode(context)
    return context_enc, tok_encode(context + continuation)[len(context_enc):]


PAIRS = [("a b", " cat"), ("a b ", "cat"), ("", "a"), ("", "<s> a"), ("", "</s>"), ("<s> a", " b"), ("<s>a", "<s>b"),
         ("</s> a", " b"), ("a </s> b", " cat</s>"), ("<|x|>a <|y|> b", " x"), ("a", " x b"), ("<|im_start|>a", " b"),
         ("x", " <pad>"), ("a\n", "b"), ("</s>", "</s>")]


@pytest.mark.parametrize("template", [None, "<s> $A"])
@pytest.mark.parametrize("kind", ["names", "a list", "added_tokens_decoder", "the older files",
                                  "a name that is no token yet", "added_tokens_decoder that strips"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_folders_tokenizer_splits_as_the_harness_does(kind, template, padding, tmp_path):
    D.get_tokenizer.cache_clear()
    folder = write_tokenizer(tmp_path / "hf", template, FILES[kind], padding=padding)
    enc, auto = D.get_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    for pair in PAIRS:
        assert D.encode_pair(enc, *pair) == harness_pair(auto, *pair), pair


def test_the_encodings_take_special_tokens_for_tokens_too(gpt2):
    for enc in (D.get_tokenizer("bytes"), gpt2):
        end, a, b = enc.eot_token, enc.encode_ordinary("a"), enc.encode_ordinary(" b")
        assert D.encode_pair(enc, f"a{D.EOT}a", f" b{D.EOT}") == ([*a, end, *a], [*b, end])
        assert D.encode_pair(enc, "", f"{D.EOT}a") == ([end], a)
        assert enc.encode_ordinary(D.EOT) != [end]                       # in a document it is text


def test_blanks_alone_begin_with_what_an_empty_context_is(tmp_path):
    D.get_tokenizer.cache_clear()
    for template, start in ((None, [2]), ("<s> $A", [1])):
        folder = write_tokenizer(tmp_path / f"hf{start}", template, {"tokenizer_config.json": {"eos_token": "</s>"}})
        assert D.encode_pair(D.get_tokenizer(str(folder)), "  ", "cat") == (start, [5])


# ---- questions ---------------------------------------------------------------------------------------------------
WRONG = {                                                       # rows, what is said
    "a request that is there twice": ([row(3, 0), row(3, 1), row(3, 1)], "doc_id=3, idx=1 twice"),
    "the whole file twice": ([row(3, 0), row(3, 1)] * 2, "doc_id=3, idx=0 twice"),
    "two answers": ([row(3, 0), row(3, 1), row(3, 2, 1), row(3, 3, 1)], "two questions with doc_id=3"),
    "two documents": ([row(3, 0, doc={"q": "x"}), row(3, 1, doc={"q": "x"}), row(3, 2, doc={"q": "y"})],
                      "two questions with doc_id=3"),
    "two ids": ([row(3, 0, native_id="x"), row(3, 1, native_id="x"), row(3, 2, native_id="y", context="b")],
                "two questions with doc_id=3"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_count_as_another_question_is_refused_by_name(kind, tmp_path):
    rows, said = WRONG[kind]
    task = write_task(tmp_path / "mine", [row(1, 0), row(1, 1), *rows])
    with pytest.raises(UserError, match=f"mine has {said}: number them anew") as error:
        D.read_tasks([str(task)], "bytes", 257)
    assert "\n" not in str(error.value)


def test_requests_that_are_no_questions_may_be_there_twice(tmp_path):
    others = [row(1_000_003, 0), row(1_000_003, 0, 1)]
    task = write_task(tmp_path / "mine", [row(3, 0), row(3, 1), *others])
    assert len(D.read_tasks([str(task)], "bytes", 257)["mine"].requests) == 2


def test_choices_of_one_question_may_stand_apart_and_differ_in_their_contexts(tmp_path):
    task = write_task(tmp_path / "mine", [row(3, 0, context="x"), row(4, 0), row(4, 1), row(3, 1, context="y")])
    assert len(D.read_tasks([str(task)], "bytes", 257)["mine"].requests) == 4


# ---- equal choices -----------------------------------------------------------------------------------------------
def choices_of(label, n=7, **changed):
    """n choices with one text, in a place each; among them longer ones, so that rows are uneven."""
    rows = [row(label, i, label, continuation=" the same") for i in range(n)]
    return rows + [row(label, n + k, label, continuation=" of" * 9 * k) for k in (1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_choices_the_first_wins(dtype, tmp_path):
    """Rounding differs from place to place in a row and from batch to batch; exact arithmetic would not."""
    model = make_model(dtype, vocab_size=257, block_size=64, n_layer=3, n_embd=32)
    rows = [r for label in range(7) for r in choices_of(label)]
    task = write_task(tmp_path / "mine", rows)
    tasks = D.read_tasks([str(task)], "bytes", 257)
    values, _ = probe.loglikelihoods(model, tasks["mine"].pairs)
    same = {value for value, r in zip(values, rows) if r["request"]["continuation"] == " the same"}
    assert len(same) == 1
    found = probe.run_tasks(model, tasks, lambda line: None)["mine"]
    assert found["acc"] == pytest.approx(1 / 7) and found["n"] == 7             # of the first choice alone it is right


def test_choices_that_are_equal_once_they_were_cut_tie_as_well(tmp_path):
    model = make_model(torch.float32, vocab_size=257, block_size=16, n_layer=2)
    rows = [row(d, i, d, context=f"{i}" + "x" * 40, continuation=" same") for d in range(4) for i in range(4)]
    rows += [row(9, i, context="y" * 30, continuation=" other" * i + "z") for i in range(3)]
    tasks = D.read_tasks([str(write_task(tmp_path / "mine", rows))], "bytes", 257)
    values, cut = probe.loglikelihoods(model, tasks["mine"].pairs)
    assert len(set(values[:16])) == 1 and cut == len(rows)
    alone = [probe.loglikelihoods(model, [pair])[0][0] for pair in tasks["mine"].pairs]
    assert values == pytest.approx(alone, abs=1e-4)


def test_a_continuation_counts_by_its_own_length_where_the_whole_is_the_same():
    """([1, 2], [3]) and ([1], [2, 3]) are the same tokens, and not the same question."""
    model = make_model(vocab_size=29, n_layer=2)
    pairs = [([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], [])]
    values, _ = probe.loglikelihoods(model, pairs)
    with torch.no_grad():
        p = model(torch.tensor([[1, 2, 3]]))[0][0].log_softmax(-1)
    assert values == pytest.approx([p[1, 3].item(), (p[0, 2] + p[1, 3]).item(), 0.0], abs=1e-10)


# ---- from the command line ---------------------------------------------------------------------------------------
def test_a_folder_and_tasks_need_no_text_of_the_users(tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    D.get_tokenizer.cache_clear()
    model = make_model(torch.float32, vocab_size=64, block_size=32, n_layer=2)
    write_tokenizer(tmp_path / "words")
    name = D.copy_tokenizer("words", tmp_path / "run")
    shutil.rmtree(tmp_path / "words")
    D.save_checkpoint(tmp_path / "run/ckpt.pt", checkpoint_of(model, tokenizer=name))
    write_task(tmp_path / "mine", [row(1, 0), row(1, 1, continuation=" b")])
    outcome = run_main(probe, "run/ckpt.pt", "--tasks", "mine", "--only", "variance,tasks", "--samples", 2)
    assert outcome.status == 0 and "Python's documentation" in outcome.out, outcome.err
    found = json.loads((tmp_path / "run/probe.json").read_text())
    assert found["tasks"]["mine"]["n"] == 1 and len(found["variance"]) == 3
    shutil.rmtree((tmp_path / "run" / name).parent)
    D.get_tokenizer.cache_clear()
    assert_mistake(run_main(probe, "run/ckpt.pt", "--tasks", "mine"), "tokenizer", "--tokenizer")
