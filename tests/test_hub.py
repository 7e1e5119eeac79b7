"""Models of the Hugging Face hub: by id, in its cache, as others leave them; all of it offline.

    python -m pytest -q tests/test_hub.py              # a minute on one core; needs transformers
"""
from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from helpers import ROOT, assert_mistake, make_model, run_python, run_script, without
from test_interchange import make_checkpoint, make_folder, rewrite, safetensors, write_words_tokenizer

import data as D
from model import UserError

hub = pytest.importorskip("huggingface_hub", reason="ids go through huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_out(cache, repo, folder, revision="main"):
    """A folder as huggingface_hub keeps it: links in snapshots/COMMIT into blobs/, where other files lie as well."""
    home = cache / f"models--{repo.replace('/', '--')}"
    blobs, snapshot = home / "blobs", home / "snapshots" / COMMIT
    for new in (blobs, snapshot, home / "refs"):
        new.mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    (blobs / "config.json").write_text('{"eos_token_id": 9}')          # of nobody: it must not be read
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    D.get_tokenizer.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    """A folder that says what there is to say: weights, a tokenizer, its end of text."""
    theirs, path = make_folder("llama", tmp_path / "hf")
    return theirs, write_words_tokenizer(path, eos_token_id=2)


# ---- ids and snapshots -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["owner/tiny", "owner/tiny@main", f"owner/tiny@{COMMIT}"])
def test_an_id_is_the_snapshot_in_the_cache(name, cache, model):
    snapshot = lay_out(cache, "owner/tiny", model[1])
    want, got = D.load_checkpoint(model[1]), D.load_checkpoint(name)
    assert got["settings"] == want["settings"]
    assert all(torch.equal(w, want["model"][key]) for key, w in got["model"].items())
    assert got["tokenizer"] == str(snapshot / "tokenizer.json")
    assert D.get_tokenizer(got["tokenizer"]).eot_token == D.get_tokenizer(name).eot_token == 2


def test_another_revision_is_another_snapshot(cache, model):
    lay_out(cache, "owner/tiny", model[1], "v2")
    assert D.load_checkpoint("owner/tiny@v2")["step"] == 0
    with pytest.raises(UserError, match="no path owner/tiny,"):
        D.load_checkpoint("owner/tiny")


def test_a_path_goes_before_an_id(cache, model, tmp_path, monkeypatch):
    lay_out(cache, "owner/tiny", model[1])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model[1], "owner/tiny")
    assert D.load_checkpoint("owner/tiny")["tokenizer"] == str(tmp_path / "owner/tiny/tokenizer.json")


@pytest.mark.parametrize("name", ["owner/none", "owner/none@v2", "owner/none-1.7B"])
def test_an_id_that_is_not_in_the_cache_is_one_line_offline(name, cache):
    for call in (D.load_checkpoint, D.get_tokenizer):
        with pytest.raises(UserError, match=f"no path {name}, nor is it in the Hugging Face hub's cache") as error:
            call(name)
        assert "\n" not in str(error.value) and "go online" in str(error.value)


@pytest.mark.parametrize("name", ["out/ckpt.pt", "a/b/c", "nothing", "/a/b", "~/b", "hf/tokenizer.json"])
def test_what_does_not_look_like_an_id_does_not_ask_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="no checkpoint"):
        D.load_checkpoint(name)
    with pytest.raises(UserError, match="no tokenizer|is not there"):
        D.get_tokenizer(name)


def test_only_json_weights_and_files_of_the_tokenizer_are_asked_for(monkeypatch, model):
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **kwargs: asked.update(kwargs, repo=repo) or model[1])
    D.load_checkpoint("owner/tiny@v2")
    assert (asked["repo"], asked["revision"]) == ("owner/tiny", "v2")
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
             "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
             "vocab.txt", "chat_template.jinja", "tekken.json", "tokenizer.model.v3", "qwen.tiktoken",
             "tokenization_mine.py", "additional_chat_templates/rag.jinja"]
    others = ["README.md", "pytorch_model.bin", "original/params.json", "onnx/model.onnx", "model.gguf",
              "consolidated.safetensors", "modeling.py", "rust_model.ot", "original/tokenizer.model",
              "onnx/config.json", "adapters/adapter_model.safetensors"]
    kept = hub.utils.filter_repo_objects(files + others, allow_patterns=asked["allow_patterns"],
                                         ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files


def test_without_the_package_an_id_is_one_line(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; sys.modules['huggingface_hub'] = None; " \
           "data.run(lambda: data.load_model('owner/tiny'))"
    assert_mistake(run_python("-c", code, cwd=tmp_path), "owner/tiny", "pip install huggingface_hub")


def test_the_scripts_take_ids_without_a_network(tmp_path, model):
    """Results go to ./NAME, a pruned model beside that; nothing is written into the cache."""
    lay_out(tmp_path / "cache", "owner/tiny-1.5B", model[1])
    env = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    env |= without("matplotlib", tmp_path)
    before = sorted(tmp_path.glob("cache/**/*"))

    def run(script, *args):
        status, out, err = run_script(script, *args, cwd=tmp_path, env=env)
        assert status == 0, err
        return out
    measure = ("--samples", 2, "--length", 16, "--only", "variance")
    assert "Python's documentation" in run("probe.py", "owner/tiny-1.5B", *measure)
    found = json.loads((tmp_path / "tiny-1.5B/probe.json").read_text())["run"]
    assert found["checkpoint"] == "owner/tiny-1.5B" and "--data" in found["tokens"]
    assert run("probe.py", "owner/tiny-1.5B", "--sample", "cat a", "--new_tokens", 2).startswith("cat a")
    run("probe.py", "owner/tiny-1.5B", "--export", "out")
    assert D.get_tokenizer(str(tmp_path / "out")).eot_token == 2
    assert "tiny-1.5B_pruned.pt: " in run("probe.py", "owner/tiny-1.5B", "--drop", 1, *measure[:4])
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text("a b cat " * 60)
    run("data.py", "texts", "--tokenizer", "owner/tiny-1.5B", "--out", "words", "--val_fraction", 0.2)
    run("train.py", "--init_from=owner/tiny-1.5B", "--data=words", "--out_dir=healed", "--max_steps=1",
        "--block_size=16", "--tokens_per_step=32", "--device=cpu")
    assert sorted(tmp_path.glob("cache/**/*")) == before
    missing = run_script("probe.py", "owner/none", "--sample", "a", cwd=tmp_path, env=env)
    assert_mistake(missing, "owner/none")


@pytest.mark.parametrize("by_id", [True, False])
def test_results_of_a_snapshot_lie_here_and_are_found_again(by_id, cache, model, tmp_path, run_main, monkeypatch):
    import probe
    import recipe
    snapshot = lay_out(cache, "owner/tiny-1.5B", model[1])
    monkeypatch.chdir(tmp_path)
    before = sorted(cache.glob("**/*"))
    name = "owner/tiny-1.5B" if by_id else snapshot
    assert_mistake(run_main(recipe, "diagnose", name), "not probed yet")
    outcome = run_main(probe, name, "--samples", 2, "--length", 8)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "tiny-1.5B/probe.json").is_file() and sorted(cache.glob("**/*")) == before
    outcome = run_main(recipe, "diagnose", name)
    assert outcome.status == 0 and "blocks are useful" in outcome.out, outcome.err


def test_results_of_two_models_of_the_hub_lie_apart(cache, model, tmp_path, run_main, monkeypatch):
    import probe
    lay_out(cache, "owner/tiny", model[1])
    monkeypatch.chdir(tmp_path)
    outcome = run_main(probe, "owner/tiny", "owner/tiny@main", "--samples", 2, "--length", 8, "--only", "variance")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "tiny/probe.json").is_file() and (tmp_path / "tiny@main/probe.json").is_file()
    assert (tmp_path / "comparison").is_dir()


# ---- a folder alone is enough ----------------------------------------------------------------------------------------
def test_a_folder_is_probed_on_a_text_that_is_always_there(model, run_main, monkeypatch, tmp_path):
    import probe
    monkeypatch.chdir(tmp_path)
    seen = {}

    def note(model, tokens, *args, **kwargs):
        seen["tokens"] = tokens
        return {"loss": 1.0}
    monkeypatch.setattr(probe, "probe", note)
    outcome = run_main(probe, "hf", "--only", "variance", "--length", 32)
    assert outcome.status == 0 and "Python's documentation" in outcome.out, outcome.err
    from pydoc_data.topics import topics
    enc = D.get_tokenizer("hf")
    text = [token for topic in topics.values() for token in [*enc.encode_ordinary(topic), 2]]
    rows = {tuple(text[i:i + 32]) for i in range(0, len(text), 32)}
    assert seen["tokens"].shape == (100, 32) and {tuple(row) for row in seen["tokens"].tolist()} <= rows


def test_the_text_suffices_for_a_hundred_sequences_whatever_the_tokenizer(gpt2):
    from pydoc_data.topics import topics
    assert sum(len(gpt2.encode_ordinary(topic)) for topic in topics.values()) > 100 * 512


def test_a_checkpoint_still_takes_the_corpus_of_its_run(tmp_path, run_main):
    import probe
    D.save_checkpoint(tmp_path / "ckpt.pt", {"model": make_model().state_dict(), "tokenizer": "bytes",
                                            "settings": vars(make_model().config) | {"data": "data/gone"}})
    assert_mistake(run_main(probe, tmp_path / "ckpt.pt"), "data/gone")


# ---- folders that others leave ---------------------------------------------------------------------------------------
def refusal(path, call=D.load_checkpoint):
    with pytest.raises(UserError) as error:
        call(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_weights_of_another_kind_are_named_and_the_command_that_converts_them(model):
    path = model[1]
    (path / "model.safetensors").unlink()
    assert "no model.safetensors: get it again" in refusal(path)
    torch.save(model[0].state_dict(), path / "pytorch_model.bin")
    said = refusal(path)
    assert "its weights in pytorch_model.bin: convert" in said
    command = said.partition('python -c "')[2].rstrip('"')
    done = run_python("-c", command)
    assert done.status == 0, done.err
    assert torch.equal(D.load_model(path)[0].embed.weight, model[0].get_input_embeddings().weight)


@pytest.mark.parametrize("file, said", [
    ("consolidated.safetensors", "has its weights in consolidated.safetensors, which transformers cannot read: get"),
    ("tf_model.h5", "has its weights in tf_model.h5, which transformers cannot read: get model.safetensors"),
    ("x-q4.gguf", "has its weights in x-q4.gguf: convert")])
def test_weights_that_transformers_reads_in_another_way_or_not_at_all_say_so(file, said, model):
    path = model[1]
    (path / "model.safetensors").rename(path / file)
    assert said in refusal(path) and ("gguf_file='x-q4.gguf'" in refusal(path)) == (file == "x-q4.gguf")
    shutil.copy(path / file, path / "model.safetensors")
    if file.startswith("cons"):
        assert D.load_checkpoint(path)["step"] == 0                # beside the others it does not matter


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_by_name_beside_a_model_and_alone(file, whole, model):
    path = model[1]
    if not whole:
        for part in ("config.json", "model.safetensors"):
            (path / part).unlink()
    (path / file).write_bytes(b"{}")
    said = refusal(path)
    assert file in said and "merge" in said


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path):
    assert "no config.json" in refusal(tmp_path)
    make_checkpoint(tmp_path / "ckpt.pt")
    assert "holds ckpt.pt: give that" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")                    # which a run's folder has, too
    assert "holds ckpt.pt: give that" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(name, model):
    path = model[1]
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert f"names {name}, which is not in its folder" in refusal(path)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("fused", ["both", "gate_up_proj", "down_proj"])
def test_experts_in_one_tensor_are_the_same_function(case, fused, tmp_path):
    """As transformers 5 holds them: experts.gate_up_proj (E, 2 h, d), gate first, and experts.down_proj (E, d, h)."""
    theirs, path = make_folder(case, tmp_path / "hf")
    want = D.load_checkpoint(path)
    tensors = safetensors.load_file(path / "model.safetensors")
    held = {name: w.contiguous() for name, w in theirs.state_dict().items() if ".mlp.experts." in name}
    assert any(name.endswith("gate_up_proj") for name in held)
    for name, w in held.items():
        kind = name.rpartition(".")[2]
        if fused not in ("both", kind):
            continue
        parts = ("gate_proj", "up_proj", "w1", "w3") if kind == "gate_up_proj" else ("down_proj", "w2")
        layer = f"layers.{name.split('.')[2]}."
        for key in [key for key in tensors if layer in key and "experts." in key and key.split(".")[-2] in parts
                    and "shared" not in key]:
            del tensors[key]
        tensors[name] = w
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    got = D.load_checkpoint(path)
    assert got["settings"] == want["settings"]
    assert all(torch.equal(w, want["model"][name]) for name, w in got["model"].items())
    rewrite(path, {"num_local_experts": 5, "num_experts": 5})
    assert "has no use for model.layers.0.mlp.experts.5" in refusal(path)


def test_fused_experts_of_another_width_are_refused(tmp_path):
    theirs, path = make_folder("qwen3_moe", tmp_path / "hf")
    safetensors.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, path / "model.safetensors")
    assert D.load_checkpoint(path)["step"] == 0
    rewrite(path, {"moe_intermediate_size": 8})
    with pytest.raises(UserError, match=r"experts.(gate_up|down)_proj is F32 \[.*16.*\], config.json says \[.*8.*\]"):
        D.load_checkpoint(path)


# ---- sampling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_one_line_whatever_is_asked(value, model, tmp_path, run_main):
    import probe
    path = model[1]
    tensors = safetensors.load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for asked in (("--sample", "cat"), ("--only", "variance"), ("--drop", "1"), ("--export", tmp_path / "out")):
        assert_mistake(run_main(probe, path, *asked), "hf", "nan or infinite")
    assert not os.path.exists(tmp_path / "hf_pruned.pt") and not (tmp_path / "out").exists()


def test_activations_that_overflow_are_one_line(model, run_main):
    import probe
    path = model[1]
    tensors = safetensors.load_file(path / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert_mistake(run_main(probe, path, "--sample", "cat"), "logits are nan or infinite")
