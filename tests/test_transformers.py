"""Models of transformers: HFModel, pruning, export. Weights are tiny and random. No network.

HFModel is compared with the forward pass of the model itself. Hooks record its streams, or make a
layer return its input.
"""
import contextlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from helpers import GOLDEN, ROOT, checkpoint_of, make_model, make_tokens, run_python  # noqa: E402

import data  # noqa: E402
from model import UserError  # noqa: E402

B, T, V = 3, 20, 96
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Further settings, and the names of attention and FFN in a layer.
FAMILIES = {
    "llama": (dict(), "self_attn", "mlp"),
    "gpt2": (dict(), "attn", "mlp"),
    "gemma2": (dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8), "self_attn", "mlp"),   # norms after both
    "gpt_neox": (dict(), "attention", "mlp"),                                                      # in parallel
    "phi": (dict(), "self_attn", "mlp"),                                                 # one dropout for both
    "granite": (dict(residual_multiplier=0.22), "self_attn", "mlp"),                     # scaled outputs
    "qwen2_moe": (dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                       shared_expert_intermediate_size=16), "self_attn", "mlp"),
    "mamba": (dict(state_size=4), None, None),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family, dtype=torch.float32, **settings):
    """A tiny model with large weights, and token ids (B, T)."""
    torch.manual_seed(0)
    more = FAMILIES[family][0] if family in FAMILIES else {}
    config = transformers.AutoConfig.for_model(family, **SMALL | more | settings)
    inner = transformers.AutoModelForCausalLM.from_config(config)
    for p in inner.parameters():
        torch.nn.init.normal_(p, std=0.25) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return inner.to(dtype).eval(), make_tokens(B, T, V)


def layers_of(inner):
    n = inner.config.num_hidden_layers
    return next(m for m in inner.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)


@contextlib.contextmanager
def doing_nothing(layer):
    """A context in which the layer returns its input."""
    def same(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x
    handle = layer.register_forward_hook(same, with_kwargs=True)
    yield
    handle.remove()


@torch.no_grad()
def streams_and_logits(inner, idx):
    """h_0 .. h_n and the logits of a forward pass of the model."""
    h = []

    def before(module, args, kwargs):
        h.append(args[0] if args else kwargs["hidden_states"])
    layers = layers_of(inner)
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(
        lambda module, args, output: h.append(output[0] if isinstance(output, tuple) else output)))
    logits = inner(idx, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return h, logits


@torch.no_grad()
def chain(model, idx, without=()):
    """h_0 .. h_n and the logits, computed by HFModel without some blocks."""
    h = [model.embed(idx)]
    for l, block in enumerate(model.blocks):
        h.append(h[-1] if l in without else block(h[-1]))
    return h, model.logits(h[-1])


def scores(h, skipped, idx):
    """Four scores of the streams h. skipped: streams and logits without each block."""
    h = [x.double() for x in h]
    n = len(h) - 1
    update = [h[l + 1] - h[l] for l in range(n)]
    causal, removal = [], []
    for s, (g, logits) in enumerate(skipped):
        g = [x.double() for x in g]
        causal += [float((update[l] - (g[l + 1] - g[l])).norm(dim=-1).sum() / update[l].norm(dim=-1).sum())
                   for l in range(s + 1, n)]
        removal.append(float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), idx[:, 1:].flatten())))
    return {"variance": [float(x.var(-1).mean()) for x in h], "causal": causal, "removal": removal,
            "influence": [float(1 - F.cosine_similarity(h[l], h[l + 1], dim=-1).mean()) for l in range(n)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_scores_are_those_of_a_naive_loop_over_the_models_own_layers(family, dtype):
    inner, idx = build(family, dtype)
    h, _ = streams_and_logits(inner, idx)
    skipped = []
    for layer in layers_of(inner):
        with doing_nothing(layer):
            skipped.append(streams_and_logits(inner, idx))
    want = scores(h, skipped, idx)
    model = data.HFModel(inner, family)
    model.capture(T)
    got = scores(chain(model, idx)[0], [chain(model, idx, [s]) for s in range(4)], idx)
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-5 if dtype == torch.float32 else 2e-2), name


@every_family
@torch.no_grad()
def test_a_layer_without_attention_or_ffn_equals_the_layer_with_its_weights_set_to_zero(family):
    """The model is built again for each sublayer, because the test overwrites weights."""
    names = FAMILIES[family][1:]
    inner, idx = build(family)
    model = data.HFModel(inner, family)
    model.capture(T)
    assert model.splits == (names[0] is not None)
    assert any("each expert" in note for note in model.notes) == (family == "qwen2_moe")
    if not model.splits:
        assert "left out" in model.notes[0]
        return
    assert any("subtracting" in note for note in model.notes) == (family == "granite")
    h, _ = streams_and_logits(inner, idx)
    for l, block in enumerate(model.blocks):
        y, did = block(h[l], detail=True)
        torch.testing.assert_close(did.attn, block.without_ffn(h[l]) - h[l], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(did.ffn, y - h[l] - did.attn, rtol=1e-4, atol=1e-4)
        got = [block.without_attn(h[l]), block.without_ffn(h[l])]
        for name, without in zip(names, got):
            zeroed = data.HFModel(build(family)[0], family)
            zeroed.capture(T)
            for p in getattr(zeroed.layers[l], name).parameters():
                p.zero_()
            torch.testing.assert_close(without, zeroed.blocks[l](h[l]), rtol=1e-5, atol=1e-5)


def test_the_final_norm_is_found():
    inner, idx = build("gpt2")
    model = data.HFModel(inner, "gpt2")
    model.capture(T)
    assert model.norm is inner.transformer.ln_f


def test_masks_are_captured_again_for_another_length():
    inner, idx = build("gemma2")
    model = data.HFModel(inner, "gemma2")
    for length in (4, T):
        model.capture(length)
        torch.testing.assert_close(chain(model, idx[:, :length])[1], streams_and_logits(inner, idx[:, :length])[1])
    assert any("keeps its own" in note for note in model.notes)          # every other layer has a window


def test_a_model_whose_layers_depend_on_more_than_the_stream_is_refused_with_the_difference():
    inner, _ = build("llama")
    inner.model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(inner, "seen", (args or [kwargs["input_ids"]])[0]), with_kwargs=True)
    inner.model.layers[2].register_forward_hook(
        lambda module, args, output: output * (1 + (inner.seen[0, 0] % 7)) if torch.is_tensor(output) else
        (output[0] * (1 + (inner.seen[0, 0] % 7)),))
    with pytest.raises(UserError, match="mine: its layers cannot be run one by one: .* differ .* by [0-9.e+-]+ of"):
        data.HFModel(inner, "mine").capture(T)


def test_a_layer_may_return_more_than_the_stream():
    inner, idx = build("rwkv", attention_hidden_size=32, context_length=64)             # it returns a state, too
    model = data.HFModel(inner, "rwkv")
    model.capture(T)
    torch.testing.assert_close(chain(model, idx)[1], streams_and_logits(inner, idx)[1])


def test_a_model_that_sees_later_tokens_is_refused_with_the_difference():
    inner, _ = build("bert")
    with pytest.raises(UserError, match="mine is not a decoder: .* differ by [0-9.e+-]+ of"):
        data.HFModel(inner, "mine").capture(T)


def test_a_model_whose_tables_depend_on_the_batch_is_refused():
    inner, _ = build("bloom", n_head=4, n_layer=4)
    with pytest.raises(UserError, match="bloom: its layers cannot be run one by one"):
        data.HFModel(inner, "bloom").capture(T)


# ---------------------------------------------------------------------------------------------------------------------
# folders


@every_family
def test_a_pruned_folder_computes_the_same_as_the_model_without_the_layers(family, tmp_path):
    inner, idx = build(family)
    layers = layers_of(inner)
    with doing_nothing(layers[0]), doing_nothing(layers[2]):
        want = streams_and_logits(inner, idx)[1]
    data.prune_hf(data.HFModel(inner, family), [0, 2], tmp_path / "pruned", "bytes")
    model, saved = data.load_model(tmp_path / "pruned")
    assert len(model.blocks) == 2 and data.encode(saved["tokenizer"], "é") == [195, 169]
    model.capture(T)
    torch.testing.assert_close(chain(model, idx)[1], want, rtol=1e-5, atol=1e-5)


def test_layers_that_cannot_change_places_are_not_pruned_and_nothing_is_left(tmp_path):
    inner, _ = build("qwen2_moe", mlp_only_layers=[1])                    # layer 1 becomes layer 0
    with pytest.raises(UserError, match="after --drop 0 cannot be loaded again"):
        data.prune_hf(data.HFModel(inner, "mixed"), [0], tmp_path / "pruned", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_depends_on_its_number_is_noticed_by_the_logits(tmp_path):
    inner, _ = build("gpt2", scale_attn_by_inverse_layer_idx=True)        # layer 1 becomes layer 0
    with pytest.raises(UserError, match="after --drop 0 computes something else"):
        data.prune_hf(data.HFModel(inner, "numbered"), [0], tmp_path / "pruned", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_a_list_with_as_many_items_as_layers_by_chance_is_not_cut_silently(tmp_path):
    inner, _ = build("llama", eos_token_id=[2, 3, 4, 5])                  # no logit depends on it
    data.prune_hf(data.HFModel(inner, "ends"), [0], tmp_path / "pruned", "bytes")
    assert json.loads((tmp_path / "pruned/config.json").read_text("utf-8"))["eos_token_id"] == [2, 3, 4, 5]
    inner, _ = build("qwen2_moe", mlp_only_layers=[0, 1, 2, 3])    # numbers of layers
    with pytest.raises(UserError, match="cannot be loaded again"):
        data.prune_hf(data.HFModel(inner, "dense"), [0], tmp_path / "other", "bytes")


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    inner, _ = build("llama")
    inner.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text("utf-8"))
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match="incomplete: it lacks model.layers.4"):
        data.load_model(tmp_path / "hf")


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty as a model of transformers") as e:
        data.load_model(tmp_path / "empty")
    assert "\n" not in str(e.value)
    (tmp_path / "empty/ckpt.pt").touch()
    with pytest.raises(UserError, match="give .*ckpt.pt"):
        data.load_model(tmp_path / "empty")


EXPORTED = {"dense": dict(), "lns": dict(norm="lns"), "tied": dict(tie_embeddings=True, rope_theta=5e4, norm_eps=1e-4),
            "moe": dict(n_experts=4, top_k=2, expert_hidden=16),
            "shared": dict(n_experts=4, top_k=3, expert_hidden=16, shared_hidden=24, norm_topk_prob=True, norm="lns")}


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_an_exported_checkpoint_computes_the_same(case, tmp_path):
    ours = make_model(torch.float32, vocab_size=257, block_size=40, n_embd=32, **EXPORTED[case])
    torch.save(checkpoint_of(ours), tmp_path / "ckpt.pt")
    data.export(tmp_path / "ckpt.pt", tmp_path / "moved/hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moved/hf")
    idx = make_tokens(2, 40, 257)
    want = ours(idx)[0]
    assert (theirs(idx).logits - want).abs().max() < 1e-4 * want.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moved/hf")
    assert tokenizer("aé")["input_ids"] == [97, 195, 169] and tokenizer.eos_token_id == 256
    again, saved = data.load_model(tmp_path / "moved/hf")
    again.capture(T)
    assert saved["tokenizer"] == "bytes" and (again.d, again.n_kv_head) == (32, 2)


def test_a_model_that_transformers_has_no_class_for_is_not_exported(tmp_path):
    torch.save(checkpoint_of(make_model(torch.float32, vocab_size=257, norm="peri")), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="attn_out_norm"):
        data.export(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

TEXT = "def f(x):\n\treturn x  # naïve 学习 <|endoftext|> 🙂\n\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer of transformers that is equal to "bytes"."""
    (tmp_path / "tok").mkdir()
    data.write_tokenizer("bytes", tmp_path / "tok")
    return tmp_path / "tok"


def test_a_special_token_that_is_spelled_out_in_a_text_is_plain_text(folder):
    for name in ("bytes", str(folder)):
        ids = data.encode(name, TEXT)
        assert ids == list(TEXT.encode()) and data.decode(name, ids) == TEXT
        assert (data.get_tokenizer(name).n_vocab, data.get_tokenizer(name).eot_token) == (257, 256)


def test_gpt2_written_for_transformers_gives_the_ids_of_tiktoken(gpt2, tmp_path):
    data.write_tokenizer("gpt2", tmp_path)
    assert data.encode(str(tmp_path), TEXT) == data.encode("gpt2", TEXT) == gpt2.encode_ordinary(TEXT)
    assert data.get_tokenizer(str(tmp_path)).n_vocab == 50257


def test_a_copied_tokenizer_moves_with_its_checkpoint_and_keeps_its_name(folder, tmp_path):
    (tmp_path / "run").mkdir()
    name = data.copy_tokenizer(str(folder), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(folder)
    copy = data.tokenizer_beside(tmp_path / "moved/ckpt.pt", name)
    assert data.encode(copy, TEXT) == list(TEXT.encode())
    assert data.fingerprint(copy) == data.known_as(copy) == name and not data.same_tokenizer(copy, "bytes")
    assert data.copy_tokenizer(copy, tmp_path / "second") == name
    assert data.encode(str(tmp_path / "second" / name), TEXT) == list(TEXT.encode())
    assert data.copy_tokenizer("gpt2", tmp_path) == "gpt2"


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(family, tmp_path):
    build(family)[0].config.save_pretrained(tmp_path)                 # for Gemma, AutoTokenizer makes an empty one
    with pytest.raises(UserError, match="--tokenizer"):
        data.get_tokenizer(str(tmp_path))


def test_an_unknown_tokenizer_is_refused_and_named():
    for name in ("gtp2", "/no/such/folder"):
        with pytest.raises(UserError, match=name):
            data.get_tokenizer(name)


def test_a_model_in_the_cache_of_the_hub_is_read_offline_at_a_revision(tmp_path):
    cache = tmp_path / "models--nobody--tiny"
    build("llama")[0].save_pretrained(cache / "snapshots/0123")
    data.write_tokenizer("bytes", cache / "snapshots/0123")
    (cache / "refs").mkdir()
    (cache / "refs/step7").write_text("0123")
    code = ("import data; model, saved = data.load_model('nobody/tiny@step7'); "
            "print(len(model.blocks), data.encode(saved['tokenizer'], 'ab'))")
    done = run_python("-c", code, cwd=ROOT, env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.out == "4 [97, 98]\n", done.err


def test_the_golden_folders_are_read():
    for name in ("llama_mha", "qwen2_moe"):
        model, _ = data.load_model(GOLDEN / name)
        model.capture(16)
        assert model.splits and model.dense == (name == "llama_mha")
