"""The scripts are modules in the repository's root, not a package: tests import them from there."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
