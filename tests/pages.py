"""Bring the tables and figures of the pages up to configs/laptop/results.jsonl.

    python tests/pages.py

A page has a table of recipe.py's report between two comments, <!-- depth.md --> and <!-- end -->, and its figures
lie in assets/. test_readme.py says when a table is no longer what the rows say.
"""
import re
import shutil
import sys
import tempfile
from pathlib import Path

tests = Path(__file__).resolve().parent
sys.path[:0] = [str(tests), str(tests.parent)]
from helpers import ROOT, run_python  # noqa: E402

WITH_TABLES = [ROOT / "README.md", ROOT / "configs/laptop/README.md", ROOT / "configs/laptop/verdicts.md"]
TABLE = re.compile(r"(<!-- (\w+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, report: Path) -> str:
    """The page with the tables that are in the folder of a report; a family without runs has none."""
    def table(name: str) -> str:
        path = report / name
        return path.read_text("utf-8") if path.exists() else "Not run yet.\n"

    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def write_report(out: Path, env: dict[str, str] | None = None) -> Path:
    """Make recipe.py's report; returns its folder."""
    done = run_python(ROOT / "recipe.py", "report", "--out", out, env=env)
    assert done.status == 0, done.err
    return out / "laptop"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        report = write_report(Path(out))
        for page in WITH_TABLES:
            page.write_text(filled(page.read_text("utf-8"), report), "utf-8")
        for page in WITH_TABLES:
            for figure in re.findall(r"assets/(\w+\.png)", page.read_text("utf-8")):
                if (report / figure).exists():
                    shutil.copy(report / figure, ROOT / "assets" / figure)
