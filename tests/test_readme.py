"""Run the examples of the README as a reader would paste them.

Also check what the README and the other pages say about the files: links, names, columns, times.
"""
import ast
import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_mistake, run_python, without
from pages import TABLE, WITH_TABLES, filled, write_report

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *ROOT.glob("configs/*/README.md"), *ROOT.glob("assets/*.md"),
         ROOT / "tests/bench/README.md"]
TINY = ["--n_layer=3", "--n_embd=16", "--n_head=2", "--block_size=16", "--tokens_per_step=64", "--max_steps=4",
        "--eval_tokens=160", "--device=cpu", "--compile=false"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def apply_changes(diff, text):
    """Apply a diff: in each piece, replace the old lines (" ", "-") by the new lines (" ", "+").

    A line " # in ..." begins a piece. The old lines must occur exactly once in the text.
    """
    for piece in re.split(r"^ # in .*\n", diff, flags=re.MULTILINE)[1:]:
        lines = piece.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] in " -")
        after = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"these lines do not occur exactly once in the file:\n{before}"
        text = text.replace(before, after)
    return text


@pytest.fixture
def fork(tmp_path):
    """A copy of the five files that a test may change."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def in_fork(fork, *args, env=None):
    done = run_python(*args, cwd=fork, env=env)
    assert done.status == 0, done.err
    return done.out


def table(out, first):
    """The rows, as dicts, of the last table whose header begins with the word `first`."""
    lines = out.splitlines()
    start = max(i for i, line in enumerate(lines) if line.split()[:1] == [first])
    header = lines[start].split()
    rows = []
    for line in lines[start + 1:]:
        cells = line.split()
        if len(cells) != len(header):
            break
        rows.append(dict(zip(header, cells)))
    return rows


def test_the_example_norm_is_trained_probed_and_dropped_and_refused_by_export(fork, corpus):
    no_figures = without("matplotlib", fork)
    diff, = code_blocks("diff")
    (fork / "model.py").write_text(apply_changes(diff, (fork / "model.py").read_text("utf-8")))
    for norm in ("pre", "ffn_post"):
        in_fork(fork, "train.py", *TINY, f"--data={corpus}", f"--norm={norm}", f"--out_dir=out/{norm}")
    out = in_fork(fork, "probe.py", "out/pre/ckpt.pt", "out/ffn_post/ckpt.pt", "--samples", 4, "--out", "compare",
                  env=no_figures)
    results = {norm: json.loads((fork / "compare" / norm / "probe.json").read_text("utf-8"))
               for norm in ("pre", "ffn_post")}
    assert "ffn_post" in out and results["pre"]["loss"] != results["ffn_post"]["loss"]

    saved = torch.load(fork / "out/ffn_post/ckpt.pt", weights_only=True)
    gains = [name for name in saved["model"] if "out_norm" in name]
    assert gains == [f"blocks.{l}.ffn_out_norm.weight" for l in range(3)]          # after the FFN, not after attention
    assert all((saved["model"][name] != 1).any() for name in gains)                # they have been trained
    added = {norm: r["ffn_variance"][0] for norm, r in results.items()}            # almost 0 without the norm
    assert 100 * added["pre"] < added["ffn_post"] < 1

    in_fork(fork, "probe.py", "out/ffn_post/ckpt.pt", "--drop", 1, "--samples", 4, env=no_figures)
    dropped = torch.load(fork / "out/ffn_post/pruned.pt", weights_only=True)
    assert torch.equal(dropped["model"]["blocks.1.ffn_out_norm.weight"], saved["model"][gains[2]])
    assert_mistake(run_python("probe.py", "out/ffn_post/ckpt.pt", "--export", "hf", cwd=fork), "ffn_out_norm")
    assert not (fork / "hf").exists()


def test_the_example_experiment_is_in_the_result_the_table_and_the_comparison(fork, corpus):
    example, = code_blocks("python")
    text = (fork / "probe.py").read_text("utf-8")
    place = "# ---- the whole measurement"
    assert text.count(place) == 1
    (fork / "probe.py").write_text(text.replace(place, example + "\n" + place), "utf-8")
    assert len([line for line in example.splitlines() if line]) <= 12
    for seed in (0, 1):
        in_fork(fork, "train.py", *TINY, f"--data={corpus}", f"--seed={seed}", f"--out_dir=out/seed_{seed}")
    out = in_fork(fork, "probe.py", "out/seed_0/ckpt.pt", "out/seed_1/ckpt.pt", "--samples", 4, "--out", "compare",
                  "--only", "variance,likeness", env=without("matplotlib", fork))
    result = json.loads((fork / "compare/seed_1/probe.json").read_text("utf-8"))
    likeness = np.array(result["likeness"])
    assert likeness.shape == (3,) and likeness.std() > 0
    assert [float(row["likeness"]) for row in table(out, "block")] == pytest.approx(likeness, rel=1e-3)
    comparison = [line.split() for line in out.splitlines() if line.startswith("seed_1 ")][-1]
    assert float(comparison[-1]) == pytest.approx(likeness.mean(), abs=1e-4)
    # an independent computation: one sequence at a time, with loops
    truth = run_python("-c", LIKENESS_BY_HAND, fork / "out/seed_1/ckpt.pt", corpus, cwd=fork)
    assert truth.status == 0, truth.err
    assert likeness == pytest.approx(np.array(json.loads(truth.out)), rel=1e-5)


LIKENESS_BY_HAND = """
import json, sys
import numpy as np, torch
from data import Corpus, load_model
model, _ = load_model(sys.argv[1])
corpus = Corpus(sys.argv[2])
windows = np.sort(np.random.default_rng(0).permutation(corpus.n_windows("val", 16))[:4])
idx, _ = corpus.batch("val", windows, 16)
cosines = [[] for _ in model.blocks]
with torch.no_grad():
    for sequence in idx:
        x = model.embed(sequence[None])
        for l, block in enumerate(model.blocks):
            x = block(x)
            rows = x[0].double()
            cosines[l] += [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(rows[:-1], rows[1:])]
print(json.dumps([sum(row) / len(row) for row in cosines]))
"""


def test_the_readme_stays_short():
    assert len(README.splitlines()) < 220 and len(README.encode()) <= 14_000


def test_the_tables_of_the_pages_are_what_the_recorded_runs_say(tmp_path):
    report = write_report(tmp_path, without("matplotlib", tmp_path))
    for page in WITH_TABLES:
        text = page.read_text("utf-8")
        assert TABLE.search(text) and filled(text, report) == text, f"{page} is out of date: run python tests/pages.py"


def without_code(text):
    return re.sub(r"```.*?```|^    .*?$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    text = without_code(page.read_text("utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    targets = [inline or reference for inline, reference in targets]
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_cell_of_a_table_is_too_wide_to_read(page):
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
    assert [cell for cell in cells if len(cell) > 120] == []


def test_the_names_that_the_readme_mentions_are_in_the_files_it_mentions():
    places = re.findall(r"`(\w+)` in\s`(\w+\.py)`", README)
    assert len(places) >= 8
    for name, file in places:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        named = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                named |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        assert name in named, f"{name} is not in {file}"


def test_every_experiment_and_every_column_of_the_tables_is_explained():
    from probe import EXPERIMENTS
    section = (ROOT / "assets/scores.md").read_text("utf-8")
    explained = set(re.findall(r"`([^`]+)`", section.replace("\\|", "|")))
    for name, experiment in EXPERIMENTS.items():
        columns = {column.name for column in experiment.columns} | set(experiment.scores)
        missing = {column for column in columns if not column.startswith("rel.")} - explained
        assert name in explained and not missing, (name, missing)


def test_the_time_of_the_first_run_is_the_same_in_all_places():
    said = {}
    for file in ("README.md", "train.py", "configs/gqa_deep.py"):
        said[file] = set(re.findall(r"[\w.]+ to [\w.]+ minutes on two cores", (ROOT / file).read_text("utf-8")))
    assert len(set.union(*said.values())) == 1 and all(said.values()), said


def test_the_pages_of_configs_name_every_config():
    page = (ROOT / "configs/paper/README.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    for scale in ("paper", "laptop"):
        configs = {file.stem for file in (ROOT / "configs" / scale).glob("*.py")} - {"base"}
        assert configs and configs <= named
