"""train.py compared with independent computations: by hand, in float64, with plain loops.

    python -m pytest -q tests/test_train.py                    # no download
"""
import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_mistake

import train
from data import eval_windows, load_checkpoint, load_model, train_windows
from model import GPT, ModelConfig, UserError
from train import TrainConfig, load_settings

VOCAB = 320         # the 257 tokens of "bytes", rounded up to a multiple of 64
TINY = dict(block_size=32, n_layer=2, n_head=2, n_embd=16, ffn_hidden=40, tokens_per_step=256, batch_size=2,
            max_steps=3, warmup_steps=2, eval_interval=0, eval_tokens=320, stats_interval=0, save_interval=0,
            device="cpu", compile=False)
MOE = dict(n_experts=4, top_k=2, expert_hidden=16)
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAPER = {path.stem: path for path in (ROOT / "configs" / "paper").glob("*.py")}


@pytest.fixture
def begin(corpus, tmp_path):
    """begin(**settings) trains a tiny model. Returns its out_dir."""
    def run(**kwargs):
        c = TrainConfig(**(TINY | {"data": str(corpus), "out_dir": str(tmp_path / "out")} | kwargs))
        train.train(c, overwrite=True)                   # some tests run it twice
        return Path(c.out_dir)
    return run


@pytest.fixture(scope="module", params=["dense", "moe"])
def trained(request, corpus, tmp_path_factory):
    """A run of 30 steps: (out_dir, settings, log)."""
    out = tmp_path_factory.mktemp(request.param)
    told = TINY | dict(data=str(corpus), out_dir=str(out), max_steps=30, learning_rate=2e-2, batch_size=4, seed=5,
                       eval_interval=10, eval_tokens=448, stats_interval=7) | (MOE if request.param == "moe" else {})
    train.train(TrainConfig(**told))
    return out, told, read_log(out)


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text("utf-8").splitlines()]


def without_rates(log):
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in log]


def model_of(c):
    """The model that a run with these settings starts from."""
    given = {f.name: getattr(c, f.name) for f in fields(ModelConfig)}
    model = GPT(ModelConfig(**given | {"vocab_size": VOCAB}))
    torch.manual_seed(c.seed)
    model.init_weights()
    return model


def tokens_of(folder, split):
    """The tokens of a split, read without data.py. The tiny corpus has one file per split."""
    (path,) = Path(folder).glob(f"{split}_*.bin")
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))


def windows_of(tokens, ids, T):
    """Inputs and targets (B, T): window i starts at token i T."""
    rows = torch.stack([tokens[i * T:i * T + T + 1] for i in ids])
    return rows[:, :-1], rows[:, 1:]


def global_batch(c, step):
    tokens, T = tokens_of(c.data, "train"), c.block_size
    return windows_of(tokens, train_windows(c.seed, step, c.tokens_per_step // T, (len(tokens) - 1) // T), T)


def plain_loss(model, x, y):
    """Cross-entropy from the logits, without the model's own loss."""
    return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())


def auxiliary_losses(model, x):
    """Load-balancing loss and z-loss of a MoE, averaged over layers, computed from the router's weights."""
    stream, balance, z = model.embed(x), [], []
    for block in model.blocks:
        seen = block.ffn_norm(stream + block.attn_output(stream)).flatten(0, 1)
        logits = seen @ block.ffn.router.weight.T
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.topk(block.ffn.top_k).indices, 1.0)
        share = chosen.sum(0) / chosen.sum()
        balance.append(probs.size(1) * (share * probs.mean(0)).sum())
        z.append(logits.exp().sum(-1).log().pow(2).mean())
        stream = block(stream)
    return sum(balance) / len(balance), sum(z) / len(z)


def adamw_by_hand(p, g, m, v, t, lr, decay, betas):
    """Step t (from 1) of AdamW, arXiv 1711.05101, in float64: returns p, m, v."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0]**t), v / (1 - betas[1]**t)
    return p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v


def spy_on_steps(monkeypatch, look):
    """Call look(optimizer) before every optimizer step. Returns the list of its results."""
    seen, make = [], train.make_optimizer

    def make_and_watch(*args):
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(look(optimizer)))
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", make_and_watch)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# settings


def write(path, text):
    path.write_text(text)
    return str(path)


def test_config_files_override_defaults_in_order_and_the_command_line_overrides_both(tmp_path):
    a = write(tmp_path / "a.py", "n_layer = 3\nn_embd = 32\nmax_steps = 7")
    b = write(tmp_path / "b.py", "n_embd = 64\nmax_steps = 8")
    c, args = load_settings([a, b, "--max_steps=9"])
    assert (c.n_layer, c.n_embd, c.max_steps, args.plan) == (3, 64, 9, False)
    assert c.block_size == 128                                       # set nowhere: the default
    c, _ = load_settings(["--max_steps=9", b, a])
    assert (c.n_embd, c.max_steps) == (32, 9)                        # a later file overrides; options override files


def test_a_config_starts_from_its_base_in_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "family").mkdir()
    write(tmp_path / "family" / "root.py", "n_layer = 3\nn_embd = 32\nmax_steps = 5")
    write(tmp_path / "family" / "child.py", "base = 'root.py'\nn_embd = 64")
    leaf = write(tmp_path / "family" / "leaf.py", "max_steps = 6\nbase = 'child.py'")
    monkeypatch.chdir("/")                                           # not in the working directory
    c, _ = load_settings([leaf])
    assert (c.n_layer, c.n_embd, c.max_steps, c.out_dir) == (3, 64, 6, "out/leaf")


def test_the_default_out_dir_is_named_after_the_last_config(tmp_path):
    a, b = write(tmp_path / "a.py", ""), write(tmp_path / "b.py", "")
    assert load_settings([a, b])[0].out_dir == "out/b"
    assert load_settings([a, b, "--out_dir=elsewhere"])[0].out_dir == "elsewhere"


@pytest.mark.parametrize("name, text, python, want", [
    ("max_steps", "1e6", "1e6", 1_000_000), ("learning_rate", "1", "1", 1.0), ("tie_embeddings", "true", "True", True),
    ("compile", "auto", "None", None), ("compile", "false", "False", False), ("data", "7", "'7'", "7"),
])
def test_a_value_takes_the_type_of_its_setting(tmp_path, name, text, python, want):
    for argument in (f"--{name}={text}", write(tmp_path / "c.py", f"{name} = {python}")):
        got = getattr(load_settings([argument])[0], name)
        assert got == want and type(got) is type(want)


@pytest.mark.parametrize("name, text, python", [
    ("n_layer", "2.5", "2.5"), ("n_layer", "many", "True"), ("n_layer", "1e400", "[3]"),
    ("learning_rate", "nan", "None"), ("learning_rate", "fast", "'fast'"), ("tie_embeddings", "1", "1"),
    ("compile", "maybe", "'maybe'"),
])
def test_a_value_of_the_wrong_type_is_refused_and_named(tmp_path, name, text, python):
    with pytest.raises(UserError, match=f"command line: {name}="):
        load_settings([f"--{name}={text}"])
    with pytest.raises(UserError, match=f"c.py: {name}="):
        load_settings([write(tmp_path / "c.py", f"{name} = {python}")])


def test_an_unknown_setting_is_refused_with_the_closest_name(tmp_path):
    for argument in ("--learning_rat=1", "-learning_rat=1", write(tmp_path / "c.py", "learning_rat = 1")):
        with pytest.raises(UserError, match="no setting 'learning_rat', did you mean 'learning_rate'"):
            load_settings([argument])
    with pytest.raises(UserError, match="-seed=2: settings are given as --name=value"):
        load_settings(["-seed=2"])                                   # argparse alone would ignore it


@pytest.mark.parametrize("name, value", [
    ("max_steps", 0), ("learning_rate", 0.0), ("learning_rate", -1.0), ("tokens_per_step", 0), ("grad_clip", -1.0),
    ("batch_size", -1), ("beta2", 1.0), ("beta1", -0.1), ("device", "tpu"), ("device", "cuda:0"), ("dtype", "float16"),
    ("n_head", 3), ("norm", "post"),
])
def test_a_value_out_of_range_is_refused_and_named(name, value):
    with pytest.raises(UserError, match=f"^{name}={value!r}|{name}={value} |{name}={value}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("text", ["raise ValueError('no')", "n_layer = [", "n_layer = 1 / 0", "max_steps == 3",
                                  "import sys; sys.exit(3)", "base = 'nowhere.py'", "base = 3", "n_layer: 3"])
def test_a_mistake_in_a_config_gives_one_line_that_names_the_file(tmp_path, text):
    with pytest.raises(UserError, match=r"(broken|nowhere)\.py") as refused:
        load_settings([write(tmp_path / "broken.py", text)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [
    "import math\nmax_steps = int(math.sqrt(49))", "from math import sqrt\nmax_steps = int(sqrt(49))",
    "def steps():\n    return 7\nmax_steps = steps()", "_seven = 7\nmax_steps: int = _seven",
], ids=lambda text: text.split("\n")[0])
def test_a_config_may_compute_its_settings(tmp_path, text):
    assert load_settings([write(tmp_path / "c.py", text)])[0].max_steps == 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_repository_loads_and_its_model_builds(path):
    c, _ = load_settings([str(path)])
    for node in ast.parse(path.read_text("utf-8")).body:                    # the file's assignments, without running it
        if isinstance(node, ast.Assign) and node.targets[0].id != "base":
            assert getattr(c, node.targets[0].id) == ast.literal_eval(node.value)
    assert c.tokens_per_step % c.block_size == 0 and c.out_dir == f"out/{path.stem}"
    c.vocab_size = c.vocab_size or VOCAB
    with torch.device("meta"):
        model = GPT(c)
    idx = torch.empty(1, c.block_size, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert model.head(model.norm(model.embed(idx))).shape == (1, c.block_size, c.vocab_size)
    assert len(model.blocks) == c.n_layer


@pytest.mark.parametrize("names, differ", [     # the paper's families: members, differences
    ([f"depth_{L}" for L in (12, 16, 24, 32)], {"n_layer": [12, 16, 24, 32]}),
    (["weight_decay_" + d for d in ("0", "0_01", "0_1", "1", "3")], {"weight_decay": [0, 0.01, 0.1, 1, 3]}),
    ([f"context_{T}" for T in (256, 512, 1024, 2048, 4096, 8192)], {"block_size": [256, 512, 1024, 2048, 4096, 8192]}),
    (["gqa_1", "gqa_4", "gqa_16"], {"n_kv_head": [16, 4, 1]}),
    (["dense_1b", "moe_1b"], {"n_experts": [0, 64]}), (["dense_400m", "moe_400m"], {"n_experts": [0, 32]}),
    (["ladder_32", "ladder_t4096", "ladder_decay_0_3", "ladder_g2", "ladder_moe"],
     {"block_size": [2048, 4096, 4096, 4096, 4096], "weight_decay": [0.1, 0.1, 0.3, 0.3, 0.3],
      "n_kv_head": [16, 16, 16, 8, 8], "n_experts": [0, 0, 0, 0, 64]}),
    (["ladder_t4096", "ladder_t8192"], {"block_size": [4096, 8192]}),
    (["ladder_decay_0_3", "ladder_decay_0_6", "ladder_decay_1"], {"weight_decay": [0.3, 0.6, 1]})],
    ids=lambda x: x[0] if isinstance(x, list) else "")
def test_the_configs_of_a_family_differ_only_as_the_paper_says_and_see_10b_tokens(names, differ):
    members = [vars(load_settings([str(PAPER[name])])[0]) for name in names]
    free = {"out_dir", "batch_size", "parallel"}
    if "n_experts" in differ:
        free |= {"top_k", "expert_hidden", "shared_hidden"}
    for name in members[0].keys() - differ.keys() - free:
        assert len({m[name] for m in members}) == 1, name
    for name, values in differ.items():
        assert [m[name] for m in members] == values
    for m in members:
        assert m["max_steps"] * m["tokens_per_step"] == pytest.approx(10e9, rel=1e-3)
        assert (m["init_std"], m["beta1"], m["beta2"]) == (0.02, 0.9, 0.95)
        assert (m["warmup_steps"], m["grad_clip"]) == (1000, 1.0)


@pytest.mark.parametrize("name, total, active", [("dense_1b", 1.28e9, 1.28e9), ("moe_1b", 6.92e9, 1.28e9),
                                                 ("moe_400m", 2e9, 0.4e9), ("dense_400m", 0.4e9, 0.4e9),
                                                 ("ladder_32", 1.24e9, 1.24e9), ("ladder_moe", 7.9e9, 1.2e9)])
def test_the_papers_models_have_the_papers_sizes(name, total, active):
    c, _ = load_settings([str(PAPER[name])])
    n = train.bare(c).count_parameters()
    assert n["total"] == pytest.approx(total, rel=0.02) and n["active"] == pytest.approx(active, rel=0.02)


MISTAKES = {     # name -> (arguments, what the line must name)
    "unknown setting": (["--n_layers=3"], "'n_layer'"),
    "tokens_per_step": (["--block_size=32", "--tokens_per_step=100", "--data=CORPUS"], "tokens_per_step=100"),
    "missing corpus": (["--data=nowhere"], "data.py"),
    "missing checkpoint": (["--init_from=nowhere.pt"], "nowhere.pt"),
    "a name too long": ([f"--data={'x' * 300}"], "File name too long"),
    "both switches": (["--resume", "--overwrite"], "not allowed with argument --resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_on_stderr_and_status_2(
        mistake, corpus, run_main, tmp_path, monkeypatch):
    args, named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)                                      # empty
    assert_mistake(run_main(train, "--device=cpu", *(arg.replace("CORPUS", str(corpus)) for arg in args)), named)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# one step


def test_the_learning_rate_warms_up_linearly_then_falls_by_a_cosine_to_its_share_of_the_peak():
    c = TrainConfig(learning_rate=2.0, warmup_steps=4, max_steps=104, min_lr_ratio=0.1)
    assert [train.learning_rate(step, c) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert train.learning_rate(4, c) == pytest.approx(2.0)                               # the cosine starts at its top
    assert train.learning_rate(4 + 25, c) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))   # cos 45
    assert train.learning_rate(4 + 50, c) == pytest.approx(1.1)                          # midway between 2.0 and 0.2
    assert train.learning_rate(104, c) == pytest.approx(0.2)
    falling = [train.learning_rate(step, c) for step in range(4, 105)]
    assert falling == sorted(falling, reverse=True)
    c = TrainConfig(learning_rate=2.0, warmup_steps=0, max_steps=1)
    assert train.learning_rate(0, c) == 2.0                          # no warm-up, no division by zero


@pytest.mark.parametrize("kind", [{}, MOE | {"shared_hidden": 8}, {"norm": "peri"}, {"tie_embeddings": True}],
                         ids=["dense", "moe", "peri", "tied"])
def test_every_matrix_is_decayed_and_no_norm_is(kind):
    c = TrainConfig(**TINY | kind | {"weight_decay": 0.3})
    model = model_of(c)
    decay = {}
    for group in train.make_optimizer(model, c).param_groups:
        for p in group["params"]:
            assert id(p) not in decay                                # in one group only
            decay[id(p)] = group["weight_decay"]
    for name, p in model.named_parameters():
        assert decay.pop(id(p)) == (0.0 if "norm" in name else 0.3), name
    assert not decay


def test_steps_of_the_optimizer_equal_adamw_written_by_hand_in_float64():
    c = TrainConfig(**TINY | {"learning_rate": 0.01, "weight_decay": 0.3})
    model = model_of(c)
    optimizer = train.make_optimizer(model, c)
    state = {name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()}
    for t in (1, 2, 3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) * 10.0 ** torch.randint(-9, 1, p.shape)         # some as small as eps
            state[name] = adamw_by_hand(state[name][0], p.grad.double(), *state[name][1:], t, 0.01,
                                        0.0 if "norm" in name else 0.3, (0.9, 0.95))
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), state[name][0], atol=3e-7, rtol=3e-7, msg=lambda m: f"{name}: {m}")


@pytest.fixture
def eight_windows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (8, 32), generator=generator) for _ in range(2)]


def test_the_gradient_of_a_moe_with_auxiliary_losses_is_the_mean_over_micro_batches(eight_windows):
    # The load-balancing loss is defined per micro-batch, so the whole batch has another gradient.
    c = TrainConfig(**TINY | MOE | {"lb_loss_weight": 0.5, "z_loss_weight": 0.3, "init_std": 0.3})
    model, (x, y) = model_of(c).double(), eight_windows
    parameters = list(model.parameters())

    def wanted(x, y):
        balance, z = auxiliary_losses(model, x)
        return torch.autograd.grad(plain_loss(model, x, y) + 0.5 * balance + 0.3 * z, parameters)
    parts = [wanted(*xy) for xy in zip(x.split(2), y.split(2))]
    train.gradients(model, list(zip(x.split(2), y.split(2))), torch.float32, stats=False)
    for p, *gs in zip(parameters, *parts):
        torch.testing.assert_close(p.grad, sum(gs) / 4, rtol=1e-8, atol=1e-12)
    router = model.blocks[0].ffn.router.weight
    whole = wanted(x, y)[[p is router for p in parameters].index(True)]
    assert (whole - router.grad).abs().max() > 1e-3 * router.grad.abs().max()     # another one


# ---------------------------------------------------------------------------------------------------------------------
# the run


def test_the_log_has_one_object_per_step_with_the_promised_keys(trained):
    _, told, log = trained
    always = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
    statistics = {"variance", "attn_variance", "ffn_variance"}
    statistics |= {"lb_loss", "z_loss", "expert_load"} if "n_experts" in told else set()
    assert [record["step"] for record in log] == list(range(1, 31))
    for record in log:
        step = record["step"]
        assert record.keys() == (always | ({"val_loss"} if step in (10, 20, 30) else set())      # 30: the end
                                 | (statistics if step in (7, 14, 21, 28, 30) else set()))
        assert record["tokens"] == 256 * step and record["tokens_per_s"] > 0 and record["grad_norm"] > 0
        assert record["lr"] == pytest.approx(2e-2 * step / 2 if step <= 2 else
                                             2e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 28))))
        if step in (7, 30):
            assert [len(record[name]) for name in ("variance", "attn_variance", "ffn_variance")] == [3, 2, 2]
            for layer in record.get("expert_load", []):
                assert len(layer) == 4 and sum(layer) == pytest.approx(1) and min(layer) >= 0


def test_the_loss_starts_at_the_loss_of_a_uniform_guess_and_falls_clearly(trained):
    _, _, log = trained
    assert log[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert all(record["loss"] < log[0]["loss"] - 2.5 for record in log[-5:])
    assert log[-1]["val_loss"] < log[9]["val_loss"] < log[0]["loss"] - 1


def test_the_reloaded_checkpoint_gives_the_logged_validation_loss(trained):
    out, told, log = trained
    model, saved = load_model(out / "ckpt.pt")
    assert saved["step"] == 30 and saved["tokenizer"] == "bytes" and saved["settings"]["seed"] == 5
    tokens = tokens_of(told["data"], "val")
    losses = []
    for i in eval_windows(448 // 32, (len(tokens) - 1) // 32):       # single windows; train.py used four at a time
        with torch.no_grad():
            losses.append(plain_loss(model, *windows_of(tokens, [i], 32)).item())
    assert len(losses) == 14                                         # not a multiple of four
    assert sum(losses) / 14 == pytest.approx(log[-1]["val_loss"], rel=1e-5)


def test_intervals_of_zero_turn_off_but_the_last_step_writes_a_checkpoint(begin):
    out = begin(max_steps=3, eval_interval=0, stats_interval=0, save_interval=0)
    always = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert [record.keys() for record in read_log(out)] == [always] * 3
    assert load_checkpoint(out / "ckpt.pt")["step"] == 3
    files = {path.name for path in out.iterdir()}                                # no half-written leftovers
    assert files == {"log.jsonl", "ckpt.pt", "config.json", "lock"}


@pytest.mark.parametrize("kind", [{}, {"n_kv_head": 1, "norm": "peri", "tie_embeddings": True, "grad_clip": 0.0}],
                         ids=["dense", "gqa_peri_tied_unclipped"])
def test_training_equals_a_plain_loop_written_by_hand_in_float64(begin, corpus, kind):
    told = TINY | dict(max_steps=4, learning_rate=1e-2, weight_decay=0.2, grad_clip=0.5, init_std=0.1, seed=3) | kind
    out = begin(**told)
    c = TrainConfig(**told | {"data": str(corpus)})
    model = model_of(c).double()
    state = {name: (0.0, 0.0) for name, _ in model.named_parameters()}
    for step, record in enumerate(read_log(out)):
        loss = plain_loss(model, *global_batch(c, step))             # 8 windows at once; train.py used two
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        shrink = min(1.0, 0.5 / norm) if c.grad_clip else 1.0
        lr = 1e-2 * ((step + 1) / 2 if step < 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 2) / 2)))
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)  # before it is clipped
        assert record["lr"] == pytest.approx(lr)
        assert c.grad_clip == 0 or norm > 0.5                        # otherwise nothing is clipped
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), grads):
                new, *state[name] = adamw_by_hand(p, g * shrink, *state[name], step + 1, lr,
                                                  0.0 if "norm" in name else 0.2, (0.9, 0.95))
                p.copy_(new)
    saved = load_checkpoint(out / "ckpt.pt")["model"]
    for name, p in model.named_parameters():
        # Adam divides by the size of the gradient. Where that is near 0, float32 rounding shows.
        assert (saved[name] - p).abs().mean() < 1e-6 and (saved[name] - p).abs().max() < 1e-3, name


def test_the_logged_statistics_are_those_of_the_weights_before_the_step(begin, corpus):
    told = TINY | dict(max_steps=1, stats_interval=5, init_std=0.2, learning_rate=1.0, seed=2)
    record, = read_log(begin(**told))
    c = TrainConfig(**told | {"data": str(corpus)})
    model, (x, _) = model_of(c).double(), global_batch(c, 0)

    def variance(x):                                                 # over features, unbiased; mean over tokens
        return np.var(x.detach().numpy(), axis=-1, ddof=1).mean()
    stream = model.embed(x)
    h, attn, ffn = [variance(stream)], [], []
    for block in model.blocks:
        a = block.attn(block.attn_norm(stream))
        f = block.ffn(block.ffn_norm(stream + a))
        stream = stream + a + f
        h, attn, ffn = h + [variance(stream)], attn + [variance(a)], ffn + [variance(f)]
    np.testing.assert_allclose(record["variance"], h, rtol=1e-5)
    np.testing.assert_allclose(record["attn_variance"], attn, rtol=1e-5)
    np.testing.assert_allclose(record["ffn_variance"], ffn, rtol=1e-5)


def test_the_logged_router_statistics_are_the_means_over_micro_batches(begin, corpus):
    told = TINY | MOE | dict(max_steps=1, stats_interval=1, init_std=0.3)
    record, = read_log(begin(**told))
    c = TrainConfig(**told | {"data": str(corpus)})
    model, (x, _) = model_of(c).double(), global_batch(c, 0)
    balance, z = zip(*[auxiliary_losses(model, part) for part in x.split(2)])
    assert record["lb_loss"] == pytest.approx(sum(balance).item() / 4, rel=1e-5)
    assert record["z_loss"] == pytest.approx(sum(z).item() / 4, rel=1e-5)
    stream, first = model.embed(x), model.blocks[0]
    logits = first.ffn_norm(stream + first.attn_output(stream)).flatten(0, 1) @ first.ffn.router.weight.T
    load = np.bincount(logits.topk(2).indices.flatten(), minlength=4) / (256 * 2)
    np.testing.assert_allclose(record["expert_load"][0], load, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(begin):
    exact, = read_log(begin(max_steps=1, dtype="float32", init_std=0.2))
    out = begin(max_steps=1, dtype="bfloat16", init_std=0.2)
    rough, = read_log(out)
    assert rough["loss"] != exact["loss"] and rough["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert {w.dtype for w in load_checkpoint(out / "ckpt.pt")["model"].values()} == {torch.float32}


def test_only_the_same_seed_gives_the_same_log_and_weights(begin, tmp_path):
    told = dict(max_steps=4, eval_interval=2, stats_interval=2, **MOE)
    a, b, c = (begin(**told, seed=seed, out_dir=str(tmp_path / name)) for name, seed in [("a", 1), ("b", 1), ("c", 2)])
    assert without_rates(read_log(a)) == without_rates(read_log(b))
    weights = [load_checkpoint(out / "ckpt.pt")["model"] for out in (a, b, c)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_log(a)[0]["loss"] != read_log(c)[0]["loss"]
    assert not torch.equal(weights[0]["embed.weight"], weights[2]["embed.weight"])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_diverging_run_stops_and_names_the_step_and_the_last_checkpoint(
        begin, tmp_path, monkeypatch, bad):
    original, calls = train.gradients, []

    def diverge(model, *args, **kwargs):
        means = original(model, *args, **kwargs)
        calls.append(1)
        if len(calls) in (4, 5):                                     # step 4 of the first run, step 1 of the second
            if bad == "loss":
                means["loss"] = means["loss"] * math.inf
            else:
                next(model.parameters()).grad[0, 0] = math.nan
        return means
    monkeypatch.setattr(train, "gradients", diverge)
    ckpt = tmp_path / "out" / "ckpt.pt"
    with pytest.raises(UserError, match=f"step 4: .*learning_rate.*{ckpt}"):
        begin(max_steps=9, save_interval=2)
    saved = load_checkpoint(ckpt)
    assert saved["step"] == 2 and all(w.isfinite().all() for w in saved["model"].values())
    assert len(read_log(tmp_path / "out")) == 3
    with pytest.raises(UserError, match="step 1: .*no checkpoint is saved yet"):
        begin(max_steps=9, out_dir=str(tmp_path / "other"))


def test_weights_that_are_not_finite_are_not_saved(begin, tmp_path):
    with pytest.raises(UserError, match="not finite: lower learning_rate"):
        begin(learning_rate=3e38, warmup_steps=0, max_steps=1)
    assert not list((tmp_path / "out").glob("ckpt*"))


def test_the_newest_checkpoints_are_kept(begin):
    out = begin(max_steps=11, save_interval=2, keep_checkpoints=3)
    steps = {path.name: load_checkpoint(path)["step"] for path in out.glob("ckpt*")}
    assert steps == {"ckpt.pt": 11, "ckpt.1.pt": 10, "ckpt.2.pt": 8}


def test_a_run_saves_and_resumes_before_the_first_step(begin, corpus, tmp_path):
    told = TINY | {"data": str(corpus), "out_dir": str(tmp_path / "zero"), "vocab_size": VOCAB}
    c, here = TrainConfig(**told), train.Process(0, 1, torch.device("cpu"), torch.float32)
    model, _ = train.build(c, here)
    (tmp_path / "zero").mkdir()
    train.save(c, 0, model, train.make_optimizer(model, c), train.Corpus(corpus), here)
    train.train(c, resume=True)
    assert without_rates(read_log(tmp_path / "zero")) == without_rates(read_log(begin()))


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_an_out_dir_that_cannot_be_made_gives_one_clear_line(corpus, run_main, tmp_path, place):
    (tmp_path / "taken").write_text("a file, no folder")
    done = run_main(train, "--device=cpu", f"--data={corpus}", f"--out_dir={tmp_path / place}")
    assert_mistake(done, str(tmp_path / "taken"))


def test_progress_lines_fit_into_the_terminal_and_few_of_them_stay(begin, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    begin(max_steps=100, stats_interval=5, n_layer=1)
    said = capsys.readouterr().out
    shown = [part for part in re.split("[\r\n]", said) if part.startswith("step ")]
    assert len(shown) == 100 and max(map(len, shown)) < 40
    assert sum(line.startswith("\rstep") for line in said.split("\n")) <= 11


def test_a_run_saves_and_stops_when_its_output_pipe_is_closed(corpus, tmp_path):
    """As in `train.py ... | head -1`."""
    told = TINY | {"data": str(corpus), "out_dir": str(tmp_path), "max_steps": 10_000, "eval_interval": 1}
    command = [sys.executable, str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in told.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("writes to")
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 0 < step < 100 and read_log(tmp_path)[-1]["step"] == step


# ---------------------------------------------------------------------------------------------------------------------
# devices and ranks, without a second process


@pytest.mark.parametrize("batch_size, ranks, shape", [(2, 1, (6, 2)), (2, 3, (6, 2)), (1, 2, (6, 1)), (0, 2, (6, 3)),
                                                      (0, 6, (6, 1))])       # 0: the rank's whole share at once
def test_a_step_is_divided_among_ranks_and_passes(batch_size, ranks, shape):
    c = TrainConfig(**TINY | {"tokens_per_step": 6 * 32, "batch_size": batch_size})
    assert train.batch_shape(c, ranks) == shape


@pytest.mark.parametrize("tokens, batch_size, ranks, named", [
    (192, 2, 2, "tokens_per_step=192 .*block_size=32 x batch_size=2 x 2 ranks"), (192, 0, 4, "batch_size=1 x 4 ranks"),
    (192, 4, 1, "batch_size=4 x 1 rank:"), (200, 0, 1, "tokens_per_step=200"), (16, 0, 1, "tokens_per_step=16"),
])
def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(tokens, batch_size, ranks, named):
    c = TrainConfig(**TINY | {"tokens_per_step": tokens, "batch_size": batch_size})
    with pytest.raises(UserError, match=named):
        train.batch_shape(c, ranks)


def see(monkeypatch, kind, count):
    """Make torch report `count` devices of this kind, which cannot compute."""
    seen = torch.device(kind) if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: seen)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.mark.parametrize("kind, count, dtype", [("cuda", 8, torch.bfloat16), ("mps", 1, torch.float32)])
def test_one_process_uses_one_gpu_and_says_how_to_use_all(monkeypatch, capsys, kind, count, dtype):
    precision = torch.get_float32_matmul_precision()
    see(monkeypatch, kind, count)
    assert train.set_up(TrainConfig()) == (0, 1, torch.device(kind, 0), dtype)
    said = capsys.readouterr().out
    assert ("using 1 of 8 GPUs: --nproc-per-node=gpu" in said) == (count == 8)
    assert train.set_up(TrainConfig(device="cpu")) == (0, 1, torch.device("cpu"), torch.float32)
    torch.set_float32_matmul_precision(precision)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    see(monkeypatch, "", 0)
    with pytest.raises(UserError, match="--device=cuda.*--device=cpu"):
        train.set_up(TrainConfig(device="cuda"))


@pytest.mark.parametrize("card, tera", [
    ("NVIDIA A10", 125), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA L40", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_the_peak_of_a_card_is_that_of_its_data_sheet(card, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    cuda = torch.device("cuda", 0)
    assert train.peak_flops(cuda, torch.bfloat16) == (tera * 1e12 if tera else None)
    assert train.peak_flops(cuda, torch.float32) is None


# ---------------------------------------------------------------------------------------------------------------------
# init_from


def test_init_from_takes_the_architecture_and_the_weights_of_a_checkpoint(trained, tmp_path):
    out, told, log = trained
    c, _ = load_settings([f"--init_from={out / 'ckpt.pt'}", f"--data={told['data']}", f"--out_dir={tmp_path}",
                          "--block_size=16", "--tokens_per_step=256", "--max_steps=1", "--eval_interval=0", "--seed=9",
                          "--device=cpu"])
    saved = load_checkpoint(out / "ckpt.pt")["settings"]
    for f in fields(ModelConfig):                                  # no weight depends on block_size
        assert getattr(c, f.name) == (16 if f.name == "block_size" else saved[f.name])
    assert c.learning_rate == 3e-3                    # the default, not the 2e-2 of the checkpoint
    train.train(c)
    record, = read_log(tmp_path)
    model, _ = load_model(out / "ckpt.pt")
    with torch.no_grad():
        want = plain_loss(model, *global_batch(c, 0)).item()
    assert record["loss"] == pytest.approx(want, rel=1e-5) and want < log[0]["loss"] - 2


@pytest.mark.parametrize("name, value", [("n_layer", 3), ("n_embd", 32), ("rope_theta", 500.0), ("norm", "lns")])
def test_a_setting_that_contradicts_the_checkpoint_is_refused_and_named(begin, name, value):
    path = begin(max_steps=1) / "ckpt.pt"
    with pytest.raises(UserError, match=f"{name}={value}"):
        load_settings([f"--init_from={path}", f"--{name}={value}"])
    assert load_settings([f"--init_from={path}", "--n_layer=2"])[0].n_layer == 2         # the same value is accepted


def test_a_checkpoint_of_another_tokenizer_is_refused(begin, tmp_path):
    saved = torch.load(begin(max_steps=1) / "ckpt.pt", weights_only=True)
    torch.save(saved | {"tokenizer": "gpt2"}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="gpt2.*bytes"):
        begin(init_from=str(tmp_path / "other.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# plans and speed


def flops_by_hand(d, L, T, kv, ffn):
    """FLOPs per token in training.

    kv: width of all keys; ffn: the number of FFN weights in a layer that a token uses. The forward
    pass takes 2 FLOPs per weight and 4 T d per layer for attention. The backward pass takes twice
    as many. The embedding is a look-up.
    """
    weights = L * (2 * d * d + 2 * d * kv + ffn) + VOCAB * d
    return 3 * (2 * weights + L * 4 * T * d)


@pytest.mark.parametrize("kind, flops", [
    ({}, flops_by_hand(d=16, L=2, T=32, kv=16, ffn=3 * 16 * 40)),
    ({"n_kv_head": 1, "tie_embeddings": True, "recompute": True},
     flops_by_hand(d=16, L=2, T=32, kv=8, ffn=3 * 16 * 40)),
    (MOE, flops_by_hand(d=16, L=2, T=32, kv=16, ffn=2 * 3 * 16 * 16 + 4 * 16)),      # 2 experts of 4, and the router
], ids=["dense", "gqa_tied_recompute", "moe"])
def test_the_mfu_is_the_flops_of_a_token_times_the_rate_over_the_peak(begin, monkeypatch, capsys, kind, flops):
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 1e6)     # for a large MFU
    log = read_log(begin(max_steps=3, eval_interval=1, **kind))
    said = [float(percent) for percent in re.findall(r"MFU (\d+)%", capsys.readouterr().out)]
    assert said == [pytest.approx(100 * flops * record["tokens_per_s"] / 1e6, abs=0.51) for record in log]
    assert len(said) == 3 and min(said) > 1000 and log[0]["mfu"] > 10


@pytest.mark.parametrize("settings, corpus_tokens, want", [
    ({}, None, 320), ({"data": "./data/python"}, None, 320), ({"data": "data/fineweb-edu"}, None, 50304),
    ({"vocab_size": 29}, None, 29), ({"vocab_size": 29}, 1000, 29), ({}, 64, 64), ({}, 65, 128),
])
def test_the_vocabulary_is_given_or_read_from_the_corpus_or_guessed_from_its_name(settings, corpus_tokens, want):
    corpus = corpus_tokens and SimpleNamespace(vocab_size=corpus_tokens)
    assert train.vocabulary(TrainConfig(**settings), corpus) == want


def test_a_plan_counts_by_formula_and_allocates_nothing(capsys):
    d, L, E, h, V, T = 2048, 16, 64, 1024, 50304, 4096               # counted by hand
    c, args = load_settings([f"--n_embd={d}", "--n_head=16", f"--n_layer={L}", f"--n_experts={E}", "--top_k=8",
                             f"--expert_hidden={h}", f"--block_size={T}", "--batch_size=4", "--tokens_per_step=2097152",
                             "--max_steps=4768", "--data=any", "--plan"])
    said = train.plan(c, args.gpus, args.mfu)                        # the weights would be 27.7 GB
    expert, rest = 3 * d * h, L * (4 * d * d + E * d) + 2 * V * d
    norms = (2 * L + 1) * d
    total = L * E * expert + rest + norms
    assert f"{total:,} total, {L * 8 * expert + rest + norms:,} active" in said
    flops = 3 * (2 * (L * 8 * expert + rest - V * d) + 4 * T * d * L)
    assert f"{flops:,.0f} per token" in said and "9,999,220,736 in 4,768 steps" in said
    assert f"{flops * 4768 * 2097152 / (8 * 989e12 * 0.4) / 3600:,.1f} on 8 H100" in said
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in said.splitlines() if "dp  " in line}
    for name, ranks in (("ddp", 1), ("fsdp", 8)):
        assert rows[name] == pytest.approx([k * total / ranks / 1e9 for k in (4, 4, 8, 16)], abs=0.01)


BENCH = dict(n_layer=2, n_head=2, n_embd=32, ffn_hidden=64, block_size=32, tokens_per_step=256, compile="false")


def test_the_benches_run(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"--{name}={value}" for name, value in BENCH.items()]
    from bench import step
    done = run_main(step, "--device=cpu", *settings, "--families")
    result = json.loads(done.out)
    assert [name for name, value in result.items() if isinstance(value, dict)] == ["dense", "gqa", "moe", "long"]
    assert all(result[name]["tokens_per_s"] > 0 and 0 < result[name]["kernel_share"] < 1 for name in ("dense", "moe"))
    pytest.importorskip("transformers")
    from bench import beside_transformers
    done = run_main(beside_transformers, *settings)
    assert re.search(r"eager: ours [\d,]+ tokens/s, transformers [\d,]+, ratio [\d.]+\n", done.out), done.err


def compiled_graphs():
    from torch._dynamo.utils import counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_dynamo():
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_steps_statistics_and_validations_are_each_compiled_once_into_one_graph(
        begin, monkeypatch, fresh_dynamo):
    compile = torch.compile
    # aot_eager captures the same graphs but does not generate code, which would take a minute.
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile(*args, **kwargs, backend="aot_eager"))
    graphs = spy_on_steps(monkeypatch, lambda _: compiled_graphs())
    begin(**TINY | MOE | dict(max_steps=6, stats_interval=2, eval_interval=2, compile=True))
    assert graphs == [1, 2, 3, 3, 3, 3] and compiled_graphs() == 3   # step 1, step 2 with statistics, its validation


@pytest.mark.skipif(not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
                    reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_moe_gives_the_output_and_the_gradients_of_an_eager_moe(fresh_dynamo):
    """It needs the custom operations: torch.compile rejects F.grouped_mm in float32."""
    moe = model_of(TrainConfig(**TINY | MOE | {"init_std": 0.3})).blocks[0].ffn
    x = torch.randn(2, 32, 16)
    parts = []
    for f in (moe, torch.compile(moe, dynamic=False)):
        y, router = f(x)
        loss = y.square().sum() + router.lb_loss + router.z_loss
        parts.append([y, *torch.autograd.grad(loss, [*moe.parameters()])])
    assert compiled_graphs() == 1
    for eager, compiled in zip(*parts, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


class FakeRun:
    """A run that records what it receives. Like a run of wandb, it is a context manager."""
    def __init__(self, told):
        self.told, self.sent, self.ended = told, [], False
        self.id = told["id"] or "made_up"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True

    def log(self, numbers, step):
        assert not self.ended
        self.sent.append((step, numbers))


@pytest.fixture
def runs(monkeypatch):
    """The list of runs that wandb.init starts. A fake module stands in for wandb."""
    begun, fake = [], ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})

    def init(**told):
        begun.append(FakeRun(told))
        return begun[-1]
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


def test_wandb_receives_the_numbers_of_the_log_and_a_resumed_run_continues(runs, begin, corpus):
    told = TINY | {"data": str(corpus), "wandb": "depth", "eval_interval": 2, "stats_interval": 2}
    out = begin(**told | {"max_steps": 2})
    train.train(TrainConfig(**told | {"out_dir": str(out), "max_steps": 4}), resume=True)
    assert [(run.told["id"], run.told["project"], run.ended) for run in runs] == [
        (None, "depth", True), ("made_up", "depth", True)]
    first = TrainConfig(**told | {"out_dir": str(out), "max_steps": 2, "vocab_size": VOCAB})
    assert runs[0].told["config"] == asdict(first)
    sent = [item for run in runs for item in run.sent]
    for (step, given), record in zip(sent, read_log(out), strict=True):
        alone = {name: x for name, x in record.items() if isinstance(x, (int, float))}
        assert step == record["step"] and alone.items() <= given.items()
        assert [given.get(f"variance/{l}") for l in range(3)] == record.get("variance", [None] * 3)


def test_a_missing_wandb_is_reported_in_one_line_before_the_run_starts(monkeypatch, corpus, run_main, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = run_main(train, f"--data={corpus}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--wandb=depth")
    assert_mistake(done, "pip install wandb")
    assert not (tmp_path / "out").exists()
