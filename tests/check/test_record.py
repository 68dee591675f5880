"""The record of a check: what it says, that it is read as it was meant, and that writing it loses nothing."""

import json
import threading

import pytest
import torch

from vqops.check import record
from vqops.check.cases import CASES
from vqops.check.timing import DECIDES, SHAPES
from vqops.dispatch import records
from vqops.dispatch.records import Gpu

H200 = Gpu("NVIDIA H200", "9.0")
KERNELS = {"triton": {"sources": "5eed", "version": "3.6.0"}, "compiled": {"sources": "c0de", "version": "13.0"}}
WRONG = {"wrong": {"indices, first": {"differ": 3, "of": 50}}}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(records, "kernels_here", lambda: KERNELS)


def results(**others) -> dict[str, list[dict]]:
    """All right, but `others`, by implementation and name."""
    found = {}
    for implementation in ("pytorch", "compiled", "triton"):
        changed = others.get(implementation, {})
        found[implementation] = [{"name": name, "wrong": {}, **changed.get(name, {})} for name in CASES]
    return found


def times(wins="compiled") -> list[dict]:
    by = {name: [1.0 if name == wins else 2.0] * 3 for name in ("pytorch", "compiled", "triton")}
    return [{"name": n, **shape._asdict(), "milliseconds": dict.fromkeys(DECIDES, by)} for n, shape in SHAPES.items()]


def test_it_is_read_as_it_was_meant(tmp_path):
    made = record.made(H200, {"date": "2026-01-01"}, results(), times())
    record.write(made, tmp_path / "deep" / "own.json")
    found = records.read(tmp_path / "deep" / "own.json", H200)
    assert {row.op for row in found.rows} == {op for ops in DECIDES.values() for op in ops} and found.ignored == []
    assert {row.implementation for row in found.rows} == {"compiled"}
    assert made["cases"]["triton"] == {"right": len(CASES), "of": len(CASES), "others": []}


def test_what_was_wrong_speaks_against_its_family_alone():
    failed = {"quantize_backward rotation cosine float32 atomic": {"failed": "x"}}
    sums, search = {"code_sums float32 atomic": WRONG}, {"nearest duplicates": WRONG}
    found = record.families(results(pytorch=sums, compiled=search, triton=failed))
    assert found == {
        "quantize": ["pytorch", "triton"],
        "nearest_topk": ["pytorch", "triton"],
        "sample": ["pytorch", "compiled", "triton"],
        "code_sums": ["compiled", "triton"],
        "quantize_backward": ["pytorch", "compiled"],
        "ema_update_": ["pytorch", "compiled", "triton"],
    }


def test_products_beyond_their_bound_speak_against_the_search():
    probe = next(name for name in CASES if name.startswith("products"))
    assert "triton" not in record.families(results(triton={probe: WRONG}))["quantize"]


def test_a_record_without_rows_says_that_it_was_looked_at(tmp_path):
    record.write(record.made(H200, {}, results(), times("pytorch")), tmp_path / "own.json")
    assert records.read(tmp_path / "own.json", H200) == records.Record((), [])


def test_without_rows_and_of_other_kernels_it_does_not_count(tmp_path, monkeypatch):
    record.write(record.made(H200, {}, results(), times("pytorch")), tmp_path / "own.json")
    monkeypatch.setattr(records, "kernels_here", lambda: {**KERNELS, "triton": {"sources": "0", "version": "3.6.0"}})
    with pytest.raises(records.Ignored, match="triton was"):
        records.read(tmp_path / "own.json", H200)


def test_writers_do_not_meet(tmp_path):
    """Whoever comes last has the file, whole; no temporary one stays."""
    path = tmp_path / "own.json"
    made = [{"writer": i, "much": "x" * 200_000} for i in range(8)]
    threads = [threading.Thread(target=record.write, args=(each, path)) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) in made and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "own.json"
    path.write_text("{}")
    with pytest.raises(TypeError):
        record.write({"tensor": torch.zeros(1)}, path)
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


def test_what_is_said_of_a_check():
    probe = next(name for name in CASES if name.startswith("products"))
    dead = {name: {"failed": "3 processes before it ended"} for name in list(CASES)[-5:]}
    others = {"triton": {"nearest heads": WRONG, probe: {"share_of_bound": 0.25}}, "compiled": dead}
    first, second, third, fourth, *_ = told = times()
    first.pop("milliseconds"), second.pop("milliseconds")
    first["left_out"], second["failed"] = "no room", "a\nb\nc\nlast"
    third["raised"], fourth["wrong"] = {"code_sums, pytorch": "OutOfMemoryError: x"}, {"indices": {"differ": 3}}
    lines = record.described(record.made(H200, {}, results(**others), told)).splitlines()
    assert f"pytorch: {len(CASES)} of {len(CASES)} cases right" in lines
    assert f"triton: {len(CASES) - 1} of {len(CASES)} cases right; tensor cores: at most 0.25 of the error that the " \
        "proof allows for" in lines
    assert "  nearest heads: indices, first: differ 3, of 50" in lines
    assert f"  {list(CASES)[-5]} and 4 more: 3 processes before it ended" in lines  # one reason, one line
    assert f"quantize {third['name']} 2.000 1.000 * 2.000" in [" ".join(line.split()) for line in lines]
    assert f"{third['name']}, code_sums, pytorch: OutOfMemoryError: x" in lines
    assert f"{fourth['name']}, so that nothing is named there: indices: differ 3" in lines
    assert f"{first['name']} is not timed: no room" in lines
    assert lines[-3:] == [f"{second['name']} is not timed: b", "    c", "    last"]
