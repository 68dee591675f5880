"""The page about semantic IDs, and its example."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_about_it():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/semantic_ids.md").read_text(), re.DOTALL)
    found = {}
    exec(block, found)
    assert [found[name].shape for name in ("ids", "new")] == [(5000, 4), (10, 3)]
    assert found["even"].indices[:, 0].bincount().max() <= 157
    assert found["large"].indices.shape == (5000, 3)


def test_the_example(capsys):
    spec = importlib.util.spec_from_file_location("semantic_ids", ROOT / "examples/semantic_ids.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--items", "400", "--sizes", "8", "4"])
    lines = capsys.readouterr().out.splitlines()
    shown = (ROOT / "docs/semantic_ids.md").read_text()
    assert lines[3] in shown  # the head of the table
    plain, balanced = lines.index("plain: 360 items, sizes [8, 4]"), lines.index("balanced: 360 items, sizes [8, 4]")
    for start in (plain, balanced):
        rows = [line.split() for line in lines[start + 2 : start + 4]]
        assert [row[:4] for row in rows] == [["1", "8", "of", "8"], ["2", "4", "of", "4"]]
        first, second = (float(row[-1].rstrip("%")) for row in rows)
        assert second > first > 20  # 10 % by chance
    assert [line.split()[4] for line in lines[balanced + 2 : balanced + 4]] == ["45", "90"]

