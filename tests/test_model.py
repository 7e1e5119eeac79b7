"""model.py compared with the second implementation in tests/helpers.py: loops, in float64.

    python -m pytest -q tests/test_model.py
"""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    array,
    attention_by_hand,
    ffn_by_hand,
    make_model,
    make_tokens,
    model_by_hand,
    moe_by_hand,
    rotate_by_hand,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as M
from model import GPT, ModelConfig, MoE, RoPE, UserError

DENSE = dict(vocab_size=61, block_size=12, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_hidden=40, init_std=0.16)
SPARSE = dict(DENSE, n_experts=5, top_k=2, expert_hidden=16)


def tokens(settings: dict, B: int = 2, T: int = 12, seed: int = 1) -> torch.Tensor:
    return make_tokens(B, T, settings["vocab_size"], seed)


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True))


# ---------------------------------------------------------------------------------------------------------------------
# attention and RoPE


ATTENTION = [dict(n_kv_head=1), dict(n_kv_head=2), dict(n_kv_head=4), dict(norm="peri"), dict(norm="lns", n_kv_head=1)]


def a_block(**variant) -> tuple[M.Block, torch.Tensor]:
    """The last block of a model, and a stream x (2, 9, d)."""
    block = make_model(**(DENSE | variant)).blocks[-1]
    return block, torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", ATTENTION, ids=str)
def test_attention_equals_a_loop_over_heads_queries_and_complex_rotations(variant):
    block, x = a_block(**variant)
    got = array(block.attn_output(x))
    for b in range(2):
        np.testing.assert_allclose(got[b], array(attention_by_hand(block, x[b])[0]), atol=1e-12)


def test_rope_turns_each_token_by_its_position():
    rope = RoPE(ModelConfig(**DENSE)).double()
    rope.reset()
    z = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    got = rope(z)
    for b in range(2):
        for head in range(3):
            torch.testing.assert_close(got[b, :, head], rotate_by_hand(z[b, :, head], range(7), rope), rtol=1e-12,
                                       atol=1e-12)


def test_the_product_of_a_rotated_query_and_key_depends_only_on_their_distance():
    rope = RoPE(ModelConfig(**dict(DENSE, block_size=40))).double()
    rope.reset()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    gram = array(rope(q.expand(1, 40, 1, 8))[0, :, 0] @ rope(k.expand(1, 40, 1, 8))[0, :, 0].T)   # (m, n)
    for distance in range(-39, 40):
        diagonal = gram.diagonal(distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-12)
    assert np.unique(np.round(gram[0], 6)).size == 40, "each distance has its own product"
    assert gram[0, 0] == pytest.approx(float((q * k).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# the mixture of experts


MOE_VARIANTS = [dict(), dict(norm_topk_prob=True), dict(shared_hidden=24), dict(norm_topk_prob=True, shared_hidden=24),
                dict(top_k=1), dict(top_k=5)]


def moe_with_an_idle_expert(dtype: torch.dtype, **variant) -> tuple[MoE, ModelConfig, torch.Tensor]:
    """A MoE and inputs x (2, 9, d). No token chooses expert 2, unless top_k is the number of experts."""
    model = make_model(dtype, **(SPARSE | variant))
    moe, x = model.blocks[0].ffn, torch.randn(2, 9, 32)
    with torch.no_grad():
        x[..., 0] = 3.0
        moe.router.weight.mul_(3)         # no ties, which float32 and float64 might break differently
        moe.router.weight[2, 0] = -20.0
    return moe, model.config, x.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("variant", MOE_VARIANTS, ids=str)
def test_moe_equals_a_loop_over_tokens_and_experts(variant, dtype, tolerance):
    moe, config, x = moe_with_an_idle_expert(dtype, **variant)
    y, router = moe(x)
    want = moe_by_hand(moe, x.double().reshape(18, 32))[0]
    np.testing.assert_allclose(array(y).reshape(18, 32), array(want), atol=tolerance, rtol=tolerance)
    assert float(router.load[2]) == pytest.approx(0.2 if config.top_k == 5 else 0.0)
    assert y.dtype == dtype


def test_moe_under_bfloat16_autocast_stays_near_the_float64_loop():
    moe, _, x = moe_with_an_idle_expert(torch.float32)
    want = array(moe_by_hand(moe, x.double().reshape(18, 32))[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = array(moe(x)[0]).reshape(18, 32)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < 0.02, "bfloat16 has 8 significant bits"


def test_an_expert_without_tokens_gets_a_zero_gradient_and_float32_agrees_with_float64():
    results = []
    for dtype in (torch.float32, torch.float64):
        moe, config, x = moe_with_an_idle_expert(dtype)
        x.requires_grad_(True)
        y, router = moe(x)
        loss = (y * torch.arange(32).to(dtype)).sum() + router.lb_loss + router.z_loss
        results.append(torch.autograd.grad(loss, [x, *moe.parameters()]))
        assert all(not g[2].any() for g in results[-1] if g.dim() == 3 and len(g) == config.n_experts)
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def grouped(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (10, 8), w (3, 8, 16), the gradient of their product (10, 16), and ends.

    The second of the three experts has no row.
    """
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(shape, dtype=dtype, generator=generator) for shape in ((10, 8), (3, 8, 16), (10, 16)))
    return x, w, grad, torch.tensor([4, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_grouped_matrix_product_and_its_gradient_are_well_formed_custom_ops(dtype):
    """opcheck tests the schema, the fake tensors for torch.compile, and the autograd formula."""
    x, w, grad, ends = grouped(dtype)
    torch.library.opcheck(torch.ops.depth.grouped_mm_weight.default, (x, grad, ends))
    torch.library.opcheck(torch.ops.depth.grouped_mm.default, (x.requires_grad_(), w.requires_grad_(), ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_grouped_matrix_product_and_its_gradient_equal_a_loop_over_rows(dtype):
    x, w, grad, ends = grouped(dtype)
    product, of_w = torch.zeros(10, 16, dtype=dtype), torch.zeros(3, 8, 16, dtype=dtype)
    for row in range(10):
        e = 0 if row < 4 else 2
        product[row] = x[row] @ w[e]
        of_w[e] += torch.outer(x[row], grad[row])
    torch.testing.assert_close(torch.ops.depth.grouped_mm(x, w, ends), product)
    torch.testing.assert_close(torch.ops.depth.grouped_mm_weight(x, grad, ends), of_w)


def router_of(logits: list[list[float]], top_k: int) -> M.Router:
    """The statistics of a MoE for tokens with these router logits (N, E)."""
    E = len(logits[0])
    moe = MoE(ModelConfig(vocab_size=8, n_embd=8, n_head=1, n_experts=E, top_k=top_k, expert_hidden=8)).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.zero_()
        moe.router.weight.copy_(torch.eye(E, 8))                 # the first E features are the logits
    x = torch.zeros(1, len(logits), 8, dtype=torch.float64)
    x[0, :, :E] = torch.tensor(logits, dtype=torch.float64)
    with torch.no_grad():
        return moe(x)[1]


def test_router_losses_equal_those_computed_on_paper():
    ascending = [math.log(p) for p in (1, 2, 3, 4)]              # softmax 0.1 0.2 0.3 0.4, log-sum-exp ln 10
    router = router_of([ascending, ascending], top_k=2)          # experts 2 and 3 take half of the slots each
    assert router.load.tolist() == [0, 0, 0.5, 0.5]
    assert float(router.lb_loss) == pytest.approx(4 * (0.5 * 0.3 + 0.5 * 0.4))
    assert float(router.z_loss) == pytest.approx(math.log(10) ** 2)
    router = router_of([ascending, [math.log(p) for p in (4, 8, 4, 4)]], top_k=1)    # softmax 0.2 0.4 0.2 0.2, ln 20
    assert router.load.tolist() == [0, 0.5, 0, 0.5]
    assert float(router.lb_loss) == pytest.approx(4 * (0.5 * (0.2 + 0.4) / 2 + 0.5 * (0.4 + 0.2) / 2))
    assert float(router.z_loss) == pytest.approx((math.log(10) ** 2 + math.log(20) ** 2) / 2)


def test_load_balancing_loss_is_1_when_balanced_and_the_number_of_experts_when_collapsed():
    balanced = [[3.0 * (e in (t, (t + 1) % 4)) for e in range(4)] for t in range(4)]       # each expert chosen twice
    router = router_of(balanced, top_k=2)
    assert router.load.tolist() == [0.25] * 4 and float(router.lb_loss) == pytest.approx(1)
    assert float(router_of([[50.0, 0, 0, 0]] * 6, top_k=1).lb_loss) == pytest.approx(4)


# ---------------------------------------------------------------------------------------------------------------------
# the whole model: values, causality, gradients


def mean_variance(layers: list[list[torch.Tensor]]) -> list[float]:
    """For each layer, the mean over tokens of the unbiased variance over features. layers: [sequence][layer]."""
    return [np.mean([array(x).var(-1, ddof=1) for x in of_one]) for of_one in zip(*layers)]


@pytest.mark.parametrize("norm", ["pre", "lns", "peri"])
@pytest.mark.parametrize("settings", [DENSE, SPARSE], ids=["dense", "moe"])
def test_logits_loss_and_statistics_equal_a_model_written_by_hand(settings, norm):
    """"lns" multiplies the output of each norm by 1/sqrt(layer). "peri" adds a norm after each sublayer."""
    settings = dict(settings, norm=norm)
    model, idx = make_model(**settings), tokens(settings)
    targets = tokens(settings, seed=2)
    logits, loss, stats = model(idx, targets, stats=True)
    want = [model_by_hand(model, row) for row in idx]
    for b in range(2):
        np.testing.assert_allclose(array(logits[b]), array(want[b].logits), atol=1e-10)
    p = [w.logits.softmax(-1) for w in want]
    assert loss.item() == pytest.approx(np.mean([-math.log(p[b][t, targets[b, t]]) for b in range(2)
                                                 for t in range(12)]))
    np.testing.assert_allclose(array(stats["variance"]), mean_variance([w.streams for w in want]), rtol=1e-9)
    np.testing.assert_allclose(array(stats["attn_variance"]), mean_variance([w.attn for w in want]), rtol=1e-9)
    np.testing.assert_allclose(array(stats["ffn_variance"]), mean_variance([w.ffn for w in want]), rtol=1e-9)
    assert len(stats["variance"]) == 4 and len(stats["ffn_variance"]) == 3


@pytest.mark.parametrize("settings", [DENSE, SPARSE], ids=["dense", "moe"])
def test_a_block_and_its_details_equal_those_computed_by_hand(settings):
    model, x = make_model(**settings), torch.randn(1, 12, 32, dtype=torch.float64)
    block = model.blocks[1]
    after, detail = block(x, detail=True)
    attn = attention_by_hand(block, x[0])[0]
    ffn, chosen = ffn_by_hand(block, x[0] + attn)
    for got, want in ((detail.attn, attn), (detail.ffn, ffn), (after, x[0] + attn + ffn)):
        np.testing.assert_allclose(array(got)[0], array(want), atol=1e-11)
    assert torch.equal(after, block(x)) and (detail.router is None) == (not chosen)
    if chosen:
        slots = [e for best in chosen for e in best]
        assert detail.router.load.tolist() == pytest.approx([slots.count(e) / len(slots) for e in range(5)])


def test_the_norm_variants_differ():
    """If both implementations ignored `norm`, the test above would still pass."""
    idx = tokens(DENSE)
    logits = [make_model(**dict(DENSE, norm=norm))(idx)[0] for norm in ("pre", "lns", "peri")]
    assert min((a - b).abs().max() for a, b in [logits[:2], logits[1:], logits[::2]]) > 0.1


def test_dense_gqa_equals_the_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    model, c = make_model(torch.float32, **DENSE), ModelConfig(**DENSE)
    theirs = LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rope_theta=c.rope_theta, tie_word_embeddings=False)).eval()
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight}
    kv = c.n_kv_head * c.n_embd // c.n_head
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv.weight.split((c.n_embd, kv, kv))
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.proj.weight, "mlp.gate_proj": block.ffn.gate.weight,
            "mlp.up_proj": block.ffn.up.weight, "mlp.down_proj": block.ffn.down.weight,
            "input_layernorm": block.attn_norm.weight, "post_attention_layernorm": block.ffn_norm.weight}.items()}
    theirs.load_state_dict(weights)
    idx = tokens(DENSE)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_streams_recombined_from_the_public_parts_give_the_models_logits():
    for settings in (DENSE, SPARSE):
        model, idx = make_model(**settings), tokens(settings)
        stream = model.embed(idx)
        for block in model.blocks:
            stream = block(stream)
        assert torch.equal(model.head(model.norm(stream)), model(idx)[0])


@pytest.mark.parametrize("t", [0, 5, 11])
def test_changing_a_token_leaves_earlier_logits_bit_identical(t):
    model, idx = make_model(torch.float32, **DENSE), tokens(DENSE)
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all(), "all later positions change"


@pytest.mark.parametrize("t", [0, 5, 11])
def test_changing_a_token_leaves_earlier_logits_of_a_moe_equal_up_to_rounding(t):
    """If an expert gets another number of rows, another kernel may be selected."""
    model, idx = make_model(torch.float32, **SPARSE), tokens(SPARSE)
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-5, atol=1e-5)
    assert ((before[:, t:] - after[:, t:]).abs().amax(-1) > 1e-4).all()


SMALL = dict(vocab_size=11, block_size=6, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, ffn_hidden=12, init_std=0.16)


@pytest.mark.parametrize("extra", [
    dict(), dict(norm="lns"), dict(norm="peri"), dict(tie_embeddings=True),
    dict(n_experts=4, expert_hidden=8, shared_hidden=8, lb_loss_weight=0.0, z_loss_weight=0.0),
    dict(n_experts=4, expert_hidden=8, norm_topk_prob=True, lb_loss_weight=0.0, z_loss_weight=0.0)], ids=str)
def test_gradient_of_every_parameter_equals_finite_differences(extra):
    """Each parameter moves along a random direction, as in the fast mode of gradcheck.

    The auxiliary losses are off, because they change the gradient of the loss but not its value.
    The next test covers them.
    """
    settings, step = SMALL | extra, 3e-6
    model, idx, targets = make_model(**settings), tokens(settings, T=6), tokens(settings, T=6, seed=2)
    for model.logits_at_once in (0, 50):                                     # 50: in chunks
        gradient = gradients(model, model(idx, targets)[1])
        for (name, p), g in zip(model.named_parameters(), gradient):
            direction, losses = torch.randn_like(p), []
            for side in (1, -1):
                moved = {name: p.detach() + side * step * direction}
                losses.append(torch.func.functional_call(model, moved, (idx, targets))[1].item())
            slope = (losses[0] - losses[1]) / (2 * step)
            assert (g * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8), name


def test_gradient_of_an_auxiliary_loss_equals_finite_differences():
    moe = make_model(**SPARSE).blocks[0].ffn
    x = torch.randn(1, 7, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe(x)[1].lb_loss, x, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda x: moe(x)[1].z_loss, x)


def test_loss_is_the_cross_entropy_and_its_gradient_includes_the_auxiliary_losses():
    model = make_model(**SPARSE, lb_loss_weight=0.7, z_loss_weight=0.03)
    idx, targets = tokens(SPARSE), tokens(SPARSE, seed=2)
    logits, loss = model(idx, targets)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)

    lb, z, x = 0.0, 0.0, model.embed(idx)                        # the auxiliary losses again, with loops
    for block in model.blocks:
        x = x + block.attn_output(x)
        scores = (block.ffn_norm(x) @ block.ffn.router.weight.T).flatten(0, 1)
        slots = [e for row in scores.tolist() for e in sorted(range(5), key=lambda e: -row[e])[:2]]
        share = scores.exp() / scores.exp().sum(1, keepdim=True)
        lb = lb + sum(5 * slots.count(e) / len(slots) * share[:, e].mean() for e in range(5)) / 3
        z = z + (scores.exp().sum(1).log() ** 2).mean() / 3
        x = x + block.ffn_output(x)[0]
    want = gradients(model, plain + 0.7 * lb + 0.03 * z)
    without = gradients(model, F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()))
    for got, a, b in zip(gradients(model, loss), want, without):
        torch.testing.assert_close(got, a, rtol=1e-6, atol=1e-8)
    router = [name for name, _ in model.named_parameters()].index("blocks.0.ffn.router.weight")
    assert (want[router] - without[router]).abs().max() > 1e-3, "the auxiliary losses have an effect here"


class Names(TorchDispatchMode):
    """Records the names of all operations."""
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_go_to_experts_and_back_without_atomic_sums(dtype):
    """On a GPU the order of atomic additions varies. A gathered gradient is the same in every run."""
    moe = make_model(torch.float32, **SPARSE).blocks[0].ffn
    x = torch.randn(2, 7, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, _ = moe(x)
    with Names() as seen:
        y.sum().backward()
    assert "index_select" in seen.names
    assert not seen.names & {"index_add", "index_add_", "index_put", "scatter_add"}
    assert ("_grouped_mm" in seen.names) == (dtype == torch.bfloat16), "in bfloat16 inductor must see it"


def test_a_gathered_gradient_is_that_of_indexing():
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(10)
    place = order.argsort()
    assert torch.autograd.gradcheck(lambda x: M.Gather.apply(x, order // 2, place), x)
    y, want = M.Gather.apply(x, order // 2, place), x[order // 2]
    assert torch.equal(y, want)
    weight = torch.randn(10, 3, dtype=torch.float64)
    got, true = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, want))
    torch.testing.assert_close(got, true, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# the loss in chunks


@pytest.mark.parametrize("at_once", [1, 100, 61 * 7, 61 * 23, 61 * 24])
@pytest.mark.parametrize("settings", [DENSE, SPARSE, dict(DENSE, tie_embeddings=True)], ids=["dense", "moe", "tied"])
def test_cross_entropy_in_chunks_equals_plain_cross_entropy(settings, at_once):
    model = make_model(**settings, lb_loss_weight=0.0, z_loss_weight=0.0)
    idx, targets = tokens(settings), tokens(settings, seed=2)
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    model.logits_at_once = at_once
    logits, loss = model(idx, targets, return_logits=False)
    assert logits is None
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    with torch.no_grad():
        assert model(idx, targets, return_logits=False)[1].item() == pytest.approx(plain.item(), abs=1e-12)
    for got, want in zip(gradients(model, loss), gradients(model, plain)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """Records the size of the largest output of any operation, forward and backward."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_complete_logits_never_exist_when_the_loss_runs_in_chunks():
    settings = dict(DENSE, vocab_size=200, n_embd=8, n_head=2)    # 24 * 200 logits, a head of 8 * 200
    model, idx = make_model(torch.float32, **settings), tokens(settings)
    with Largest() as seen:
        model(idx, idx)[1].backward()
    assert seen.numel == 24 * 200, "without chunks, the recorder sees all logits"
    model.logits_at_once = 5 * 200
    with Largest() as seen:
        model(idx, idx, return_logits=False)[1].backward()
    assert seen.numel == 8 * 200, "the head's gradient, which is larger than a chunk of 5 rows"


def test_no_logits_are_kept_for_the_backward_pass():
    settings = dict(DENSE, vocab_size=200)
    model, idx, kept = make_model(torch.float32, **settings), tokens(settings), []

    def logits_kept(loss_of) -> bool:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            loss_of()
        return any(shape[-1:] == (200,) for shape in kept)
    assert logits_kept(lambda: F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())), "the recorder sees them"
    assert not logits_kept(lambda: model(idx, idx, return_logits=False)) and kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_under_autocast_is_as_near_to_float64_as_the_plain_loss(dtype):
    """It may be nearer: the gradient of the head is summed in float32, not in bfloat16."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 200, bias=False)
    x, targets = torch.randn(2, 40, 32), torch.randint(200, (2, 40))

    def slopes(loss_of, autocast: bool):
        x_, W = x.clone().requires_grad_(), head.weight.detach().clone().requires_grad_()
        if not autocast:
            x_, W = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast and dtype == torch.bfloat16):
            loss = loss_of(x_, W)
        return loss, *torch.autograd.grad(loss, (x_, W))

    def plain(x, W):
        return F.cross_entropy(M.wide(x @ W.T).flatten(0, 1), targets.flatten())

    def ours(x, W):
        return M.CrossEntropy.apply(x.flatten(0, 1), W, targets.flatten(), 7) / targets.numel()

    truth = slopes(plain, autocast=False)
    for got, usual, want in zip(slopes(ours, True), slopes(plain, True), truth):
        error, usual_error = (got - want).abs().max(), (usual - want).abs().max()
        assert error <= 1.2 * usual_error + 1e-7


@pytest.mark.parametrize("head", [torch.nn.Linear(32, 61), torch.nn.Sequential(torch.nn.Linear(32, 61, bias=False))])
def test_a_head_that_is_more_than_a_matrix_is_refused(head):
    model, idx = make_model(torch.float32, **DENSE), tokens(DENSE)
    model.head = head
    with pytest.raises(UserError, match="one matrix"):
        model(idx, idx)


def test_without_targets_the_logits_are_returned_even_if_return_logits_is_false():
    model, idx = make_model(**DENSE), tokens(DENSE)
    logits, loss = model(idx, return_logits=False)
    assert loss is None and logits.shape == (2, 12, 61)


# ---------------------------------------------------------------------------------------------------------------------
# counting, initialising, compiling


def count_on_meta(**settings) -> dict[str, int]:
    with torch.device("meta"):
        return GPT(ModelConfig(**settings)).count_parameters()


def test_parameters_of_the_papers_dense_1b_model_are_counted():
    count = count_on_meta(vocab_size=50304, n_embd=2048, n_head=16, n_layer=16, ffn_hidden=8192)
    V, d, L, h = 50304, 2048, 16, 8192
    assert count["total"] == count["active"] == 2 * V * d + L * (4 * d * d + 3 * d * h + 2 * d) + d
    assert count["non_embedding"] == L * (4 * d * d + 3 * d * h + 2 * d) + d
    assert count["total"] == pytest.approx(1.28e9, abs=0.005e9)                # the paper says 1.28B


def test_parameters_of_the_papers_moe_2b_model_with_a_shared_expert_are_counted():
    count = count_on_meta(vocab_size=50304, n_embd=768, n_head=12, n_layer=16, n_experts=32, top_k=4,
                          expert_hidden=1536, shared_hidden=1536)
    V, d, L, E, h = 50304, 768, 16, 32, 1536
    for name, experts in (("total", E), ("active", 4)):
        assert count[name] == 2 * V * d + L * (4 * d * d + d * E + (experts + 1) * 3 * d * h + 2 * d) + d


def test_tied_embeddings_are_counted_once():
    untied, tied = count_on_meta(**DENSE), count_on_meta(**DENSE, tie_embeddings=True)
    assert untied["total"] - tied["total"] == untied["active"] - tied["active"] == 61 * 32
    assert untied["non_embedding"] == tied["non_embedding"]


@pytest.mark.parametrize("extra", [dict(n_kv_head=4), dict(n_kv_head=2), dict(n_kv_head=1, norm="peri"),
                                   dict(tie_embeddings=True), dict(n_experts=5, expert_hidden=16),
                                   dict(n_experts=4, top_k=3, expert_hidden=8, shared_hidden=8)], ids=str)
def test_flops_equal_those_that_pytorch_counts_in_a_run(extra):
    """PyTorch counts neither fused attention on a CPU nor our custom operations.

    So the test uses the math backend and tells PyTorch the FLOPs of the operations.
    """
    def product(a: tuple, b: tuple, ends: tuple, out_shape: tuple | None = None, **_) -> int:
        return 2 * a[0] * a[1] * b[-1]             # x (M, K), w (E, K, N) or grad (M, N)

    settings = DENSE | extra
    model, idx = make_model(torch.float32, **settings), tokens(settings, T=8)
    def added(_: tuple, a: tuple, b: tuple, **__) -> int:
        return 2 * a[0] * a[1] * b[1]

    told = {torch.ops.depth.grouped_mm: product, torch.ops.depth.grouped_mm_weight: product,
            torch.ops.aten.addmm_: added}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=told) as forward:
        loss = model(idx, idx, return_logits=False)[1]           # with logits the head would run twice
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=told) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    gradients = 2 * 2 * idx.numel() * settings["n_embd"] * settings["vocab_size"]      # in the loss's forward pass
    only_forward = forward.get_total_flops() - gradients
    assert model.flops_per_token(8, backward=False) * idx.numel() == pytest.approx(only_forward, rel=0.01)
    assert model.flops_per_token(8) * idx.numel() == pytest.approx(both, rel=0.01)
    assert model.flops_per_token() == model.flops_per_token(12), "the default is a full context"


def test_the_flops_of_a_model_include_those_that_each_attention_reports(monkeypatch):
    """An attention with fewer keys needs to override only flops_per_token."""
    model = make_model(**DENSE)
    before = model.flops_per_token(12, backward=False)
    monkeypatch.setattr(model.blocks[1].attn, "flops_per_token", lambda T: 1000.0 * T)
    assert model.flops_per_token(12, backward=False) == before - model.blocks[0].attn.flops_per_token(12) + 12_000
    assert model.flops_per_token(12) == 3 * model.flops_per_token(12, backward=False)


@pytest.mark.parametrize("settings", [DENSE, dict(SPARSE, shared_hidden=16, norm="peri")], ids=["dense", "moe"])
def test_matrices_start_with_std_0_02_at_every_depth_and_norms_start_at_1(settings):
    torch.manual_seed(0)
    settings = {name: value for name, value in settings.items() if name != "init_std"}
    model = GPT(ModelConfig(**dict(settings, n_layer=12)))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            n = p.numel()         # five standard errors of a standard deviation and of a mean
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n)), name
            assert abs(p.mean().item()) < 5 * 0.02 / math.sqrt(n), name
    # over a whole block, a factor of 1/sqrt(2 L) or 1/sqrt(layer) would be tens of standard errors
    for block in model.blocks:
        matrices = torch.cat([p.flatten() for p in block.parameters() if p.dim() > 1])
        assert matrices.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * matrices.numel()))


def test_a_model_made_on_the_meta_device_is_the_same_after_init_weights():
    direct = GPT(ModelConfig(**SPARSE))
    torch.manual_seed(3)
    direct.init_weights()
    with torch.device("meta"):
        deferred = GPT(ModelConfig(**SPARSE))
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.init_weights()
    idx = tokens(SPARSE)
    assert torch.equal(direct(idx)[0], deferred(idx)[0])


def test_compiling_into_one_graph_changes_neither_loss_nor_gradients():
    """fullgraph=True raises on a graph break. The backend aot_eager is fast, because it generates no code."""
    settings = dict(SPARSE, shared_hidden=16)                    # the shared expert is a dense FFN
    model, idx, targets = make_model(torch.float32, **settings), tokens(settings), tokens(settings, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        loss = forward(idx, targets, return_logits=False)[1]
        results.append((loss, gradients(model, loss)))
    (want, want_grads), (got, got_grads) = results
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(got_grads, want_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# the configuration


@pytest.mark.parametrize("bad, name", [
    (dict(n_head=3), "n_head=3"), (dict(n_head=0), "n_head=0"), (dict(n_kv_head=3), "n_kv_head=3"),
    (dict(n_kv_head=8), "n_kv_head=8"), (dict(n_embd=12), "n_head=4"), (dict(norm="post"), "norm='post'"),
    (dict(norm_eps=0.0), "norm_eps=0.0"), (dict(n_experts=2, top_k=3, expert_hidden=8), "top_k=3"),
    (dict(n_experts=2, top_k=0), "top_k=0"), (dict(n_experts=4, expert_hidden=12), "expert_hidden=12"),
    (dict(n_experts=4, n_embd=36, n_head=2), "n_embd=36"), (dict(init_std=-0.1), "init_std=-0.1")], ids=str)
def test_impossible_shapes_are_refused_and_the_setting_is_named(bad, name):
    with pytest.raises(UserError, match=name):
        ModelConfig(**(DENSE | dict(n_kv_head=0) | bad))


def test_zeros_in_the_configuration_stand_for_derived_values():
    c = ModelConfig(vocab_size=10, n_embd=64, n_head=4)
    assert (c.n_kv_head, c.ffn_hidden, c.expert_hidden) == (4, 256, 0)
    c = ModelConfig(vocab_size=10, n_embd=64, n_head=4, n_experts=8, top_k=2)
    assert c.expert_hidden == 128, "two experts of half the width cost as much as a dense FFN"


def test_a_model_without_a_vocabulary_and_a_context_that_is_too_long_are_refused():
    with pytest.raises(UserError, match="vocab_size"):
        GPT(ModelConfig())
    with pytest.raises(UserError, match="block_size=12"):
        make_model(**DENSE)(torch.zeros(1, 13, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# sampling


def test_generation_at_temperature_0_takes_the_likeliest_token_even_beyond_the_block_size():
    model, idx = make_model(torch.float32, **DENSE), tokens(DENSE, T=4)
    want = idx
    for _ in range(20):
        logits = model(want[:, -12:])[0][:, -1, :50]
        want = torch.cat((want, logits.argmax(1, keepdim=True)), 1)
    got = M.generate(model, idx, 20, temperature=0, n_vocab=50)
    assert got.shape == (2, 24) and torch.equal(got, want)


def test_generation_never_draws_the_padding_of_the_vocabulary():
    model = make_model(torch.float32, **DENSE)
    idx = tokens(dict(vocab_size=40), B=8, T=3)
    for temperature in (0.0, 5.0):
        drawn = M.generate(model, idx, 30, temperature, n_vocab=40)
        assert int(drawn.max()) < 40
    assert int(M.generate(model, idx, 30, 5.0).max()) >= 40, "without n_vocab it draws padding"


def test_generation_repeats_itself_with_the_same_seed_but_not_with_another():
    model, idx = make_model(torch.float32, **DENSE), tokens(DENSE, T=4)
    texts = [M.generate(model, idx, 20, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_generation_draws_with_the_frequencies_of_the_tempered_softmax_over_the_likeliest():
    model, idx = make_model(torch.float32, **DENSE), tokens(DENSE, B=1, T=4).expand(8000, 4)
    logits = array(model(idx[:1])[0])[0, -1]
    text = M.generate(model, idx, 1, temperature=0.5, top_k=6, generator=torch.Generator().manual_seed(0))
    drawn, likeliest = text[:, -1].numpy(), np.argsort(-logits)[:6]
    p = np.exp(logits[likeliest] / 0.5) / np.exp(logits[likeliest] / 0.5).sum()
    seen = np.array([(drawn == token).sum() for token in likeliest])
    assert seen.sum() == 8000, "only the likeliest six are drawn"
    chi2 = ((seen - 8000 * p) ** 2 / (8000 * p)).sum()
    assert chi2 < 25.7, "the 0.9999 quantile of chi-square with 5 degrees of freedom"
    assert p.max() / p.min() > 2, "the six are not equally likely"
