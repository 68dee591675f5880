"""The examples are not installed: the tests find them in the folder above, which a source distribution leaves out."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if (ROOT / "examples").is_dir() else ["test_*.py"]
sys.path.append(str(ROOT))  # last, so that an installed vqops stays the one that is tested
