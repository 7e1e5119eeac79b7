"""Tokenizers of model folders: their tokens are those of AutoTokenizer, and they stay with what was trained on them.

    python -m pytest -q tests/test_tokenizers.py       # a minute on one core, offline; needs transformers
"""
from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_mistake, checkpoint_of, make_model, run_script
from test_interchange import VARIANTS, make_checkpoint, make_folder, rewrite

import data as D
from model import UserError

tokenizers = pytest.importorskip("tokenizers", reason="a folder's tokenizer needs it")
transformers = pytest.importorskip("transformers", reason="AutoTokenizer is the independent truth here")

WORDS = ["[unk]", "<s>", "</s>", "a", "b", "cat", "<", "s", ">", "/", "x", "|"]


def write_tokenizer(folder, template=None, files=None, config=None, padding=False):
    """A tokenizer.json of single characters and a few words, whose <s> and </s> are special, and other files beside."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[unk]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()])
    inner.add_special_tokens(["<s>", "</s>"])
    if template:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            template, special_tokens=[("<s>", 1), ("</s>", 2)])
    if padding:
        inner.enable_padding(length=8, pad_id=0, pad_token="[unk]")
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2} | (config or {})))
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def tokenizer_of(folder):
    D.get_tokenizer.cache_clear()
    return D.get_tokenizer(str(folder))


# ---- every token of AutoTokenizer --------------------------------------------------------------------------------
def added(content, special=False, **flags):
    return {"content": content, "special": special, "normalized": not special, "single_word": False, "lstrip": False,
            "rstrip": False} | flags


FILES = {                                                       # beside tokenizer.json
    "nothing": {},
    "names": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[unk]"}},
    "a name that is no token yet": {"tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<pad>"}},
    "names beside habits": {"tokenizer_config.json": {
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False, "sep_token": None}},
    "a name of another kind": {"tokenizer_config.json": {"eos_token": "</s>", "image_token": "<image>"}},
    "names that are dicts": {"tokenizer_config.json": {"eos_token": added("</s>", True) | {"__type": "AddedToken"}}},
    "a list": {"tokenizer_config.json": {"eos_token": "</s>", "additional_special_tokens": ["<|x|>", "<|y|>"]}},
    "a list of transformers 5": {"tokenizer_config.json": {"extra_special_tokens": ["<|x|>"], "eos_token": "</s>"}},
    "a dict": {"tokenizer_config.json": {"extra_special_tokens": {"boi_token": "<|x|>"}, "eos_token": "</s>"}},
    "a dict and a list": {"tokenizer_config.json": {
        "extra_special_tokens": {"boi_token": "<|x|>"}, "additional_special_tokens": ["<|y|>"], "eos_token": "</s>"}},
    "names that are dicts and strip": {"tokenizer_config.json": {
        "pad_token": added("<|x|>", True, lstrip=True, rstrip=True, __type="AddedToken"),
        "mask_token": added("<|y|>", True, lstrip=True, __type="AddedToken"), "eos_token": "</s>"}},
    "a list of dicts that strip": {"tokenizer_config.json": {
        "additional_special_tokens": [added("<|x|>", True, rstrip=True, __type="AddedToken"), "<|y|>"],
        "eos_token": "</s>"}},
    "added_tokens_decoder": {"tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {
        "1": added("<s>", True), "2": added("</s>", True), "13": added("<|y|>", True), "12": added("x b")}}},
    "added_tokens_decoder that strips": {"tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {
        "1": added("<s>", True), "2": added("</s>", True, lstrip=True), "12": added("<|x|>", True, rstrip=True)}}},
    "added_tokens_decoder and the older files": {
        "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {"12": added("x b")}},
        "special_tokens_map.json": {"pad_token": "<pad>"}, "added_tokens.json": {"<|y|>": 13}},
    "added_tokens.json": {"added_tokens.json": {"x b": 13, "<|x|>": 12}},
    "the older files": {
        "added_tokens.json": {"x b": 13, "<pad>": 12},
        "special_tokens_map.json": {"pad_token": "<pad>", "bos_token": added("<s>"), "eos_token": "</s>"}},
}
TEXTS = ["", "a b cat", "x b cat x b", "<s>a</s> b", "a <|x|> b", "a<|x|>b <|y|>", "a <|y|> b", "<pad> a <image>",
         "a </s> b", "x  b", "[unk] a", "<|im_start|>a"]


@pytest.mark.parametrize("kind", FILES)
def test_the_tokens_are_those_of_autotokenizer(kind, tmp_path):
    """Tasks see special tokens as AutoTokenizer does; documents spell them, but for those that are not special."""
    folder = write_tokenizer(tmp_path / "hf", files=FILES[kind])
    enc, auto = tokenizer_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert enc.n_vocab == len(auto) == max(auto.get_vocab().values()) + 1 and enc.inner.get_vocab() == auto.get_vocab()
    for text in TEXTS:
        assert enc.encode(text) == auto(text, add_special_tokens=False)["input_ids"], text
    spelt = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in TEXTS:
        assert enc.encode_ordinary(text) == spelt(text, add_special_tokens=False)["input_ids"], text
    for role in ("bos_token", "eos_token"):
        assert getattr(auto, f"{role}_id") in (None, enc.prefix, enc.eot_token)


def test_documents_spell_special_tokens_also_after_a_task_was_read(tmp_path):
    enc = tokenizer_of(write_tokenizer(tmp_path / "hf"))
    assert enc.encode_ordinary("a</s>b") == [3, 6, 9, 7, 8, 4]
    assert enc.encode("a</s>b") == [3, 2, 4]
    assert enc.encode_ordinary("a</s>b") == [3, 6, 9, 7, 8, 4]


def test_padding_and_truncation_that_a_folder_stores_are_off(tmp_path):
    enc = tokenizer_of(write_tokenizer(tmp_path / "hf", "<s> $A", padding=True))
    assert enc.encode_ordinary("a cat") == enc.encode("a cat") == enc.encode_to_numpy("a cat").tolist() == [3, 5]
    assert enc.start == [1] and D.encode_pair(enc, "a", " cat") == ([1, 3], [5])


@pytest.mark.parametrize("template, start", [
    (None, []), ("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("</s> <s> $A </s> </s>", [2, 1])])
def test_what_a_template_puts_at_the_end_does_not_stand_before_a_context(template, start, tmp_path):
    enc = tokenizer_of(write_tokenizer(tmp_path / "hf", template))
    assert enc.start == start and D.encode_pair(enc, "a b", " cat") == ([*start, 3, 4], [5])


@pytest.mark.parametrize("names, prefix", [
    ({"bos_token": "<s>", "eos_token": "</s>"}, 1), ({"eos_token": "</s>"}, 2), ({"eos_token": "b"}, 4),
    ({"bos_token": None, "eos_token": "</s>"}, 2), ({}, 2)], ids=str)
@pytest.mark.parametrize("template", [None, "<s> $A"])
def test_an_empty_context_is_the_bos_if_there_is_one_else_the_tokenizers_eos(names, prefix, template, tmp_path):
    """As prefix_token_id of lm-evaluation-harness; config.json's end, of a chat, is not asked."""
    folder = write_tokenizer(tmp_path / "hf", template, {"tokenizer_config.json": names})
    auto, enc = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(folder)
    theirs = auto.bos_token_id if auto.bos_token_id is not None else auto.eos_token_id
    if theirs is None and template:                     # the harness has nothing; here it is what begins texts
        prefix = 1
    assert prefix == (theirs if names else prefix)
    assert D.encode_pair(enc, "", "a cat") == ([prefix], [3, 5])
    assert D.encode_pair(enc, "", "") == ([prefix], [])
    spelt = enc.decode([prefix])
    assert D.encode_pair(enc, "", f"{spelt} a") == ([prefix], [3])              # not twice
    assert D.encode_pair(enc, f"{spelt} a", " cat") == ([prefix, 3], [5])


ENDS = {                                                        # eos_token_id of config.json: what it is then
    "a list": ([4, 2], 4), "an empty list": ([], 2), "minus one": (-1, 2), "a list with minus one": ([-1, 5], 5),
    "beyond the tokenizer": (12, 2), "far beyond": ([10**9, 5], 5),
    "text": ("</s>", 2), "null": (None, 2), "true": (True, 2), "zero": (0, 0)}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("named", [True, False])
def test_an_end_of_text_that_is_no_token_is_none(kind, named, tmp_path):
    value, meant = ENDS[kind]
    folder = write_tokenizer(tmp_path / "hf", config={"eos_token_id": value},
                             files={"tokenizer_config.json": {"eos_token": "</s>"}} if named else {})
    if named or meant != 2 or isinstance(value, list) and 2 in value:
        assert tokenizer_of(folder).eot_token == meant
    else:
        with pytest.raises(UserError, match="no config.json there has an eos_token_id"):
            tokenizer_of(folder)


def test_a_folder_with_another_kind_of_tokenizer_says_how_to_convert_it(tmp_path):
    """The command is one that works: tried on vocab.json and merges.txt."""
    letters = {chr(i): i for i in range(97, 123)} | {"<|endoftext|>": 26}
    for name, text in (("vocab.json", json.dumps(letters)), ("merges.txt", "#version: 0.2\n"),
                       ("config.json", '{"model_type": "gpt2", "eos_token_id": 26}')):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="has vocab.json and no tokenizer.json: .*--tokenizer") as error:
        tokenizer_of(tmp_path)
    exec(str(error.value).partition('python -c "')[2].partition('"')[0], {})
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_of(tmp_path).encode_ordinary("abc cab") == auto("abc cab")["input_ids"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="has tokenizer.model, vocab.json and no tokenizer.json"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("names, prefix", [
    ({"tokenizer_class": "LlamaTokenizer"}, 1), ({"tokenizer_class": "LlamaTokenizerFast"}, 1),
    ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, 2), ({"tokenizer_class": "Qwen2Tokenizer"}, 12),
    ({"tokenizer_class": "LlamaTokenizer", "bos_token": "b"}, 4), ({"tokenizer_class": "GPT2TokenizerFast"}, 12),
    ({"tokenizer_class": "GPTNeoXTokenizer"}, 12), ({"tokenizer_class": "PreTrainedTokenizerFast"}, 2)], ids=str)
def test_a_bos_that_the_folder_does_not_name_is_the_default_of_its_tokenizers_class(names, prefix, tmp_path):
    names |= {"added_tokens_decoder": {"12": added("<|endoftext|>", True)}}
    if names["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):      # have no BOS
        names |= {"eos_token": "</s>" if prefix == 2 else "<|endoftext|>"}
    folder = write_tokenizer(tmp_path / "hf", files={"tokenizer_config.json": names})
    auto, enc = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(folder)
    assert prefix == (auto.eos_token_id if auto.bos_token_id is None else auto.bos_token_id)
    assert D.encode_pair(enc, "", "a") == ([prefix], [3])


@pytest.mark.parametrize("bytes_are_letters", [True, False])
@pytest.mark.parametrize("family", D.FAMILIES)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast"])
def test_the_bos_of_a_class_counts_where_autotokenizer_takes_the_class_at_its_word(kind, family, bytes_are_letters,
                                                                                   tmp_path):
    """Not for every family, and not where it finds that the folder holds another tokenizer than it says."""
    level = tokenizers.pre_tokenizers.ByteLevel
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(special + sorted(level.alphabet()))},
                                                       [], unk_token="<unk>"))
    inner.pre_tokenizer = level(add_prefix_space=False) if bytes_are_letters else tokenizers.pre_tokenizers.Metaspace()
    inner.add_special_tokens(special)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "eos_token_id": 2}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "</s>"}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_of(tmp_path).prefix == (auto.eos_token_id if auto.bos_token_id is None else auto.bos_token_id)
    copy = tmp_path / "out" / D.copy_tokenizer(str(tmp_path), tmp_path / "out")
    assert tokenizer_of(copy).bos == auto.bos_token_id
    make_checkpoint(tmp_path / "ckpt.pt", str(copy))
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").bos_token_id == auto.bos_token_id


@pytest.mark.parametrize("spoil", ["[]", '{"added_tokens_decoder": {"x": 1}}', '{"bos_token": "<s>", "add', "7"])
def test_damaged_files_beside_a_tokenizer_are_one_line(spoil, tmp_path):
    folder = write_tokenizer(tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text(spoil)
    with pytest.raises(UserError, match="missing or damaged") as error:
        tokenizer_of(folder)
    assert "\n" not in str(error.value)


# ---- known by content, kept with the checkpoint ----------------------------------------------------------------------
def test_tokenizers_are_the_same_by_what_is_in_them(tmp_path, gpt2):
    one = write_tokenizer(tmp_path / "one", files=FILES["names"])
    same = shutil.copytree(one, tmp_path / "same")
    other_end = write_tokenizer(tmp_path / "end", files=FILES["names"], config={"eos_token_id": 5})
    more = write_tokenizer(tmp_path / "more", files=FILES["a list"])
    names = [str(folder) for folder in (one, same, other_end, more)] + ["bytes", "gpt2"]
    for a in names:
        for b in names:
            assert D.same_tokenizer(a, b) == (a == b or {a, b} == {str(one), str(same)})
    assert D.same_tokenizer(str(one), str(same / "tokenizer.json"))
    with pytest.raises(UserError, match="gone/tokenizer.json is not there"):
        D.same_tokenizer(str(one), str(tmp_path / "gone/tokenizer.json"))


def test_a_copy_in_the_checkpoints_folder_goes_with_it(tmp_path):
    source = write_tokenizer(tmp_path / "hf", "<s> $A", FILES["added_tokens_decoder"],
                             config={"bos_token_id": 1, "eos_token_id": [2, 4]})
    want = tokenizer_of(source)
    out = tmp_path / "out"
    name = D.copy_tokenizer(str(source), out)
    assert name == D.copy_tokenizer(str(source / "tokenizer.json"), out)           # again: the same
    D.save_checkpoint(out / "ckpt.pt", checkpoint_of(make_model(), tokenizer=name))
    shutil.rmtree(source)
    out.rename(tmp_path / "moved")
    found = D.load_checkpoint(tmp_path / "moved/ckpt.pt")["tokenizer"]
    got = tokenizer_of(found)
    assert Path(found).is_absolute() and D.same_tokenizer(found, name if os.path.exists(name) else found)
    assert (got.eot_token, got.start, got.prefix, got.n_vocab) == (2, [1], want.prefix, want.n_vocab)
    assert got.inner.to_str() == want.inner.to_str()
    assert D.copy_tokenizer("bytes", out) == "bytes" and D.copy_tokenizer("cl100k_base", out) == "cl100k_base"


def test_copies_of_several_tokenizers_lie_side_by_side(tmp_path):
    one = write_tokenizer(tmp_path / "one")
    other = write_tokenizer(tmp_path / "other", config={"eos_token_id": 5})
    names = [D.copy_tokenizer(str(folder), tmp_path / "out") for folder in (one, other, one)]
    assert names[0] == names[2] != names[1] and len(list((tmp_path / "out").iterdir())) == 2
    D.get_tokenizer.cache_clear()
    assert [D.get_tokenizer(str(tmp_path / "out" / name)).eot_token for name in names[:2]] == [2, 5]
    again = D.copy_tokenizer(str(tmp_path / "out" / names[0]), tmp_path / "out")         # from where it is already
    assert again == names[0] and D.get_tokenizer(str(tmp_path / "out" / again)).eot_token == 2


def test_a_tokenizer_that_is_gone_keeps_its_name_and_who_needs_it_is_told(tmp_path, run_main):
    import probe
    source = write_tokenizer(tmp_path / "hf")
    name = str(source / "tokenizer.json")
    shutil.rmtree(source)
    assert D.copy_tokenizer(name, tmp_path / "out") == name and not list((tmp_path / "out").iterdir())
    D.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(make_model(), tokenizer=name))
    assert_mistake(run_main(probe, tmp_path / "ckpt.pt", "--sample", "a"), f"{name} is not there", "--tokenizer")
    (tmp_path / "empty").mkdir()                                # a model's folder that never had one
    name = str(tmp_path / "empty/tokenizer.json")
    assert D.copy_tokenizer(name, tmp_path / "out") == name


def test_a_pruned_model_keeps_its_tokenizer_wherever_it_goes(tmp_path, run_main, monkeypatch):
    import probe
    _, path = make_folder("llama", tmp_path / "hf")
    write_tokenizer(path, config=json.loads((path / "config.json").read_text()) | {"eos_token_id": 5})
    (tmp_path / "out").mkdir()
    outcome = run_main(probe, path, "--drop", 1, "--samples", 2, "--length", 8, "--save", tmp_path / "out/pruned.pt")
    assert outcome.status == 0, outcome.err
    shutil.rmtree(path)
    (tmp_path / "out").rename(tmp_path / "moved")
    D.get_tokenizer.cache_clear()
    assert tokenizer_of(D.load_checkpoint(tmp_path / "moved/pruned.pt")["tokenizer"]).eot_token == 5
    D.export(tmp_path / "moved/pruned.pt", tmp_path / "again")
    assert tokenizer_of(tmp_path / "again").eot_token == 5


def test_a_checkpoint_that_names_a_tokenizer_elsewhere_finds_it_there(tmp_path):
    source = write_tokenizer(tmp_path / "hf")
    for name in (str(source / "tokenizer.json"), "bytes", "gpt2"):
        D.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(make_model(), tokenizer=name))
        assert D.load_checkpoint(tmp_path / "ckpt.pt")["tokenizer"] == name


# ---- export ------------------------------------------------------------------------------------------------------
def test_an_export_has_all_that_came_in(tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}
    write_tokenizer(path, "<s> $A", FILES["added_tokens_decoder"],
                    config=json.loads((path / "config.json").read_text()) | ids)
    contents = {"chat_template.jinja": "{{ messages }}", "generation_config.json": json.dumps(ids | {"top_p": 0.9}),
                "special_tokens_map.json": "{}", "added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "#",
                "tokenizer.model": "x", "tokenizer.model.v3": "x", "qwen.tiktoken": "x", "tokenization_mine.py": "",
                "additional_chat_templates/tools.jinja": "{{ tools }}"}
    (path / "additional_chat_templates").mkdir()
    for name, text in contents.items():
        (path / name).write_text(text)
    (path / "README.md").write_text("of the model, not of the tokenizer")
    D.export(path, tmp_path / "out")
    for name, text in contents.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out/README.md").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in ids} == ids
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}


@pytest.mark.parametrize("value", ["</s>", True, ["</s>"]])
def test_an_id_that_is_none_is_not_exported(value, tmp_path):
    _, path = make_folder("llama", tmp_path / "hf")
    config = json.loads((path / "config.json").read_text())
    config |= {"eos_token_id": value, "pad_token_id": 0, "bos_token_id": None}
    write_tokenizer(path, files={"tokenizer_config.json": {"eos_token": "</s>"}}, config=config)
    D.export(path, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert (said["eos_token_id"], said["pad_token_id"]) == (2, 0)
    assert said["bos_token_id"] is None, "else it would be that of the family's own vocabulary"


def test_the_tokenizer_is_not_lost_silently(tmp_path, capsys):
    source = write_tokenizer(tmp_path / "hf")
    make_checkpoint(tmp_path / "ckpt.pt", str(source / "tokenizer.json"))
    source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="hf/tokenizer.json is not there: put it back, or .*--tokenizer"):
        D.export(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    D.export(tmp_path / "ckpt.pt", tmp_path / "out", str(tmp_path / "moved"))
    assert tokenizer_of(tmp_path / "out").eot_token == 2


def test_a_model_that_came_without_a_tokenizer_is_exported_with_a_line(tmp_path, capsys):
    theirs, path = make_folder("llama", tmp_path / "hf")
    D.export(path, tmp_path / "out")
    assert f"out: tokenizer {path / 'tokenizer.json'} not written" in capsys.readouterr().out
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_a_tokenizers_file_may_have_any_name(tmp_path):
    source = write_tokenizer(tmp_path / "hf")
    (source / "tokenizer.json").rename(source / "mine.json")
    make_checkpoint(tmp_path / "ckpt.pt")
    D.export(tmp_path / "ckpt.pt", tmp_path / "out", str(source / "mine.json"))
    assert tokenizer_of(tmp_path / "out").encode_ordinary("a cat") == [3, 5]


def strings(n=1000):
    """All sorts of text, among them combining marks and digits: what other normalising or splitting would change."""
    draw = random.Random(0)
    points = [*range(32, 127)] * 3 + [*range(0xA0, 0x250), *range(0x300, 0x370), *range(0x3B0, 0x400)]
    points += [*range(0x4E00, 0x4F00), *range(0x1F600, 0x1F650), 9, 10, 13, 0x200D, 0x3000, 0xFB01]
    out = ["e\u0301 12", "12 345", "", " ", "I'M don't", "\n\n x"]
    while len(out) < n:
        out.append("".join(chr(draw.choice(points)) + " " * draw.choice([0, 0, 0, 1, 3]) for _ in range(30)))
    return out


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("variant", ["dense", "biases", "head_norm", "moe", "moe_full_norm", "moe_head_norm"])
def test_autotokenizer_has_our_ids_in_every_family(variant, name, trust, tmp_path, request):
    """transformers 5 gives a folder of model_type qwen2 the normalizer and splitting of Qwen2, whatever it holds."""
    if name == "gpt2":
        request.getfixturevalue("gpt2")
    settings, family = VARIANTS[variant]
    make_checkpoint(tmp_path / "ckpt.pt", name, **settings)
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [f"{family}ForCausalLM"]
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=trust)
    enc = D.get_tokenizer(name)
    for text in strings():
        assert auto(text)["input_ids"] == enc.encode_ordinary(text), text
    assert auto.eos_token_id == enc.eot_token


@pytest.mark.parametrize("variant", ["dense", "biases", "moe", "moe_full_norm"])
def test_a_folders_tokenizer_is_taken_as_it_is_written_in_every_family(variant, tmp_path):
    source = write_tokenizer(tmp_path / "words", "<s> $A", FILES["added_tokens.json"])
    make_checkpoint(tmp_path / "ckpt.pt", str(source), **VARIANTS[variant][0])
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    want, got = tokenizer_of(source), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert got(text)["input_ids"] == [1, *want.encode(text)]


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """A folder with a tokenizer of bytes and merges that splits as GPT-2, and whose <s> begins texts."""
    from pydoc_data.topics import topics
    level = tokenizers.pre_tokenizers.ByteLevel
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(list(topics.values())[:15], tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", "<|endoftext|>"], initial_alphabet=level.alphabet(),
        show_progress=False))
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("merges")
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return folder


def test_a_token_keeps_the_blanks_that_belong_to_it(merges, tmp_path):
    """Those of its own dict, whether it has a role or stands in a list."""
    source = shutil.copytree(merges, tmp_path / "source")
    token = {"__type": "AddedToken"}
    (source / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": added("<unk>", True) | token,
        "pad_token": added("<|p|>", True, lstrip=True, rstrip=True) | token,
        "mask_token": added("<|m|>", True, single_word=True) | token,
        "additional_special_tokens": ["<|a|>", added("<|b|>", True, rstrip=True) | token]}))
    enc, auto = tokenizer_of(source), transformers.AutoTokenizer.from_pretrained(source)
    for name in ("<|p|>", "<|m|>", "<|a|>", "<|b|>"):
        for text in (f"x {name} y", f"x{name}y", f"x  {name}  y", f" {name}", f"{name} "):
            assert enc.encode(text) == auto(text, add_special_tokens=False)["input_ids"], text


def test_an_export_names_the_end_that_the_folders_class_gave(merges, tmp_path):
    source = shutil.copytree(merges, tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (source / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": 3}')
    make_checkpoint(tmp_path / "ckpt.pt", str(source), qkv_bias=True)
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    for folder in (source, tmp_path / "hf"):
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == 3


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer",
                                  "GPTNeoXTokenizerFast", "TokenizersBackend", None])
@pytest.mark.parametrize("variant", ["dense", "biases", "head_norm"])
def test_autotokenizer_has_our_ids_whatever_class_the_folder_named(variant, kind, merges, tmp_path):
    """Of a class with a name transformers 5 would put in the splitting, or lose tokens, in silence."""
    source = shutil.copytree(merges, tmp_path / "source")
    names = {"bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": kind} if kind else {})
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    make_checkpoint(tmp_path / "ckpt.pt", str(source), **VARIANTS[variant][0])
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    auto, enc = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), tokenizer_of(source)
    for text in strings():
        assert auto(text)["input_ids"] == [1, *enc.encode(text)], text
        assert auto.decode(enc.encode(text)) == text
    assert (auto.bos_token_id, auto.eos_token_id) == (1, 2)


def test_an_export_of_bytes_begins_and_ends_with_its_own_token(tmp_path):
    """Where config.json is silent, transformers takes the ids of the family's own vocabulary."""
    make_checkpoint(tmp_path / "ckpt.pt", n_experts=6, top_k=2, expert_hidden=16, qk_norm="full")
    D.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, None)


def test_a_folder_whose_tokenizer_is_missing_is_one_line_for_who_needs_it(tmp_path, run_main):
    import probe
    _, path = make_folder("llama", tmp_path / "hf")
    assert_mistake(run_main(probe, path, "--sample", "a"), "tokenizer.json is missing", "--tokenizer")
    (path / "tokenizer.model").write_bytes(b"")
    assert_mistake(run_main(probe, path, "--sample", "a"), "tokenizer.model and no tokenizer.json", "--tokenizer")
    (path / "tokenizer.model").unlink()
    rewrite(path, {"tokenizer": "some company's"})
    assert_mistake(run_main(probe, path, "--sample", "a"), "tokenizer.json is missing", "--tokenizer")


def test_a_run_does_not_need_the_folder_that_its_tokenizer_came_from(tmp_path):
    """The corpus and the checkpoint keep a copy: --resume, --init_from, --sample and --export go on without it."""
    folder = write_tokenizer(tmp_path / "model", config={"eos_token_id": 2})
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(random.Random(i).choices("ab", k=200)))

    def script(*args):
        done = run_script(*args, cwd=tmp_path)
        assert done.status == 0, done.err
        return done.out
    script("data.py", "texts", "--tokenizer", "model", "--out", "words", "--val_fraction", 0.5)
    settings = ["--data=words", "--n_layer=1", "--n_embd=8", "--n_head=1", "--block_size=8", "--tokens_per_step=16",
                "--eval_tokens=16", "--device=cpu", "--compile=false"]
    script("train.py", *settings, "--out_dir=run", "--max_steps=2")
    ids = D.get_tokenizer(str(folder)).encode_ordinary("a b b")
    shutil.rmtree(folder)
    script("train.py", *settings, "--out_dir=run", "--max_steps=3", "--resume")
    script("train.py", "--init_from=run/ckpt.pt", "--data=words", "--out_dir=on", "--max_steps=1",
           "--tokens_per_step=16", "--eval_tokens=16", "--device=cpu", "--compile=false")
    assert script("probe.py", "run/ckpt.pt", "--sample", "a b", "--new_tokens", 2).startswith("a b")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere/run")
    script("probe.py", "elsewhere/run/ckpt.pt", "--export", "hf")
    assert D.get_tokenizer(str(tmp_path / "hf")).encode_ordinary("a b b") == ids
