"""Update the tables and figures of the pages from configs/laptop/results.jsonl.

    python tests/pages.py

In a page, two comments enclose each table of recipe.py's report (<!-- depth.md --> and <!-- end -->) and each figure
(<!-- depth.png --> and <!-- end -->). Figures are kept in assets/. test_readme.py checks that the tables in the pages
are up to date.
"""
import re
import shutil
import sys
import tempfile
from pathlib import Path

tests = Path(__file__).resolve().parent
sys.path[:0] = [str(tests), str(tests.parent)]
from helpers import ROOT, run_python  # noqa: E402

WITH_TABLES = [ROOT / "README.md", *(ROOT / f"configs/laptop/{name}.md" for name in ("README", "verdicts", "controls"))]
TABLE = re.compile(r"(<!-- (\w+\.(?:md|png)) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, report: Path) -> str:
    """Insert the tables in the folder `report`, and the figures in assets/, into the text of a page."""
    def content(name: str) -> str:
        if name.endswith(".png"):
            return f"![{name}](../../assets/{name})\n" if (ROOT / "assets" / name).exists() else "No figure yet.\n"
        return (report / name).read_text("utf-8") if (report / name).exists() else "No runs yet.\n"

    return TABLE.sub(lambda found: found[1] + content(found[2]) + found[3], page)


def write_report(out: Path, env: dict[str, str] | None = None) -> Path:
    """Run `recipe.py report`. Returns the folder of the tables."""
    done = run_python(ROOT / "recipe.py", "report", "--out", out, env=env)
    assert done.status == 0, done.err
    return out / "laptop"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        report = write_report(Path(out))
        for page in WITH_TABLES:
            text = page.read_text("utf-8")
            for figure in re.findall(r"\w+\.png", text):
                if (report / figure).exists():
                    shutil.copy(report / figure, ROOT / "assets" / figure)
            page.write_text(filled(text, report), "utf-8")
