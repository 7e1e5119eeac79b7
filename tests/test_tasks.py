"""Tasks of lm-evaluation-harness, read from a local folder: no network."""
import json
import os
import subprocess
import sys

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
from helpers import ROOT, checkpoint_of, make_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import data  # noqa: E402
import probe  # noqa: E402

YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
QUESTIONS = [("The sky is", ["blue", "green as grass", "a"], 0), ("2 + 2 = ", ["4", "five"], 0),
             ("", ["an empty context", "b"], 1), ("naïve 学习", ["é", "ü and more", "x"], 2),
             ("A context that does not fit into the model's 48 positions " * 2, ["yes", "no"], 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one task of five questions, and the checkpoint of a tiny MoE of bytes."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as f:
        for question, choices, answer in QUESTIONS:
            print(json.dumps({"question": question, "choices": choices, "answer": answer}), file=f)
    (folder / "tiny.yaml").write_text(YAML.replace("FILE", str(folder / "questions.jsonl")))
    model = make_model(torch.float32, vocab_size=257, block_size=48, n_embd=16, n_experts=4,
                       expert_hidden=16, shared_hidden=8)
    torch.save(checkpoint_of(model), folder / "ckpt.pt")
    os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
    return folder


def answers(scorer, folder):
    """The log likelihood of each choice of each question, as the harness received it."""
    found = lm_eval.simple_evaluate(scorer, tasks=["tiny_choice"], log_samples=True,
                                    task_manager=TaskManager(include_path=str(folder),
                                                             include_defaults=False))
    samples = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    return [[float(resp[0]) for resp in sample["filtered_resps"]] for sample in samples]


@torch.no_grad()
def one_at_a_time(model):
    """The same log likelihoods: one pass per choice, summed over the bytes of the choice."""
    out = []
    for question, choices, _ in QUESTIONS:
        values = []
        for choice in choices:
            text = (question.rstrip() or "\0").encode()
            context = list(text) if question else [256]
            whole = list((question + " " + choice).encode()) if question else [256, *(" " + choice).encode()]
            asked = len(whole) - len(context)
            row = torch.tensor([whole[-model.context - 1:]])
            logp = model(row[:, :-1])[0].log_softmax(-1)[0]
            picked = logp.gather(1, row[0, 1:, None])[:, 0]
            values.append(picked[-asked:].sum().item())
        out.append(values)
    return out


def test_log_likelihoods_equal_those_of_one_pass_per_choice_and_of_the_harness(folder):
    model, saved = data.load_model(folder / "ckpt.pt")
    ours = answers(probe.make_scorer(model, "bytes", print), folder)
    naive = one_at_a_time(model)
    data.export(folder / "ckpt.pt", folder / "exported")
    from lm_eval.models.huggingface import HFLM
    theirs = answers(HFLM(pretrained=str(folder / "exported"), device="cpu", batch_size=1,
                          dtype="float32"), folder)
    exported, saved = data.load_model(folder / "exported")
    wrapped = answers(probe.make_scorer(exported, saved["tokenizer"], print), folder)
    for i in range(len(QUESTIONS)):
        assert ours[i] == pytest.approx(naive[i], abs=1e-4)
        assert ours[i] == pytest.approx(theirs[i], abs=1e-4)
        assert ours[i] == pytest.approx(wrapped[i], abs=1e-4)


def test_an_empty_context_becomes_the_bos_token_even_if_its_id_is_0(tmp_path):
    (tmp_path / "bytes").mkdir()
    data.write_tokenizer("bytes", tmp_path / "bytes")
    folder = (tmp_path / "bytes").rename(tmp_path / "bos")            # the first name is cached
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"bos_token": chr(256)}       # the byte 0
    file.write_text(json.dumps(config), encoding="utf-8")
    assert probe.make_scorer(None, str(folder), print).prefix_token_id == 0
    assert probe.make_scorer(None, "bytes", print).prefix_token_id == 256


def test_two_ranks_find_the_same_scores_as_one_process(folder, tmp_path):
    script = [str(ROOT / "probe.py"), str(folder / "ckpt.pt"), "--only=tasks", "--tasks=tiny_choice",
              f"--task_folder={folder}", "--device=cpu"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, command in {"one": script, "two": [*launch, *script]}.items():
        done = subprocess.run([sys.executable, *command, f"--out={tmp_path / name}"], text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "probe.json").read_text("utf-8"))["tasks"])
    assert found[0] == found[1]
    assert found[0]["tiny_choice"]["n"] == len(QUESTIONS)
    model, _ = data.load_model(folder / "ckpt.pt")
    right = [max(range(len(values)), key=values.__getitem__) == answer
             for values, (_, _, answer) in zip(one_at_a_time(model), QUESTIONS)]
    assert found[0]["tiny_choice"]["acc"] == pytest.approx(sum(right) / len(right))


def test_an_unknown_task_is_refused(folder, run_main):
    status, _, err = run_main(probe, folder / "ckpt.pt", "--only=tasks", "--tasks=tiny_choise",
                              f"--task_folder={folder}", f"--out={folder / 'out'}")
    assert status == 2 and "tiny_choise" in err
