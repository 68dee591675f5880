"""From times to the rows of a record: who wins, and for which calls."""

import pytest
import torch

from vqops.check import timing
from vqops.check.timing import DECIDES, MARGIN, SHAPES, by_rows, calls, fastest, measure, rows_of
from vqops.dispatch.choice import call_of, choose
from vqops.dispatch.regimes import regime_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "milliseconds, taken",
    [
        ({"pytorch": [3.0], "compiled": [1.0], "triton": [2.0]}, "compiled"),
        ({"pytorch": [3.0], "compiled": [2.0], "triton": [1.0]}, "triton"),
        ({"pytorch": [1.0], "compiled": [1.0 / MARGIN], "triton": [1.0]}, "pytorch"),  # not by the margin
        ({"pytorch": [1.0], "compiled": [0.9], "triton": [0.89]}, "compiled"),  # nor is this one
        ({"pytorch": [1.0, 9.0, 1.0], "triton": [2.0, 2.0, 0.1]}, "pytorch"),  # medians
        ({"pytorch": [1.0]}, "pytorch"),
        ({"compiled": [1.0], "triton": [0.99]}, "compiled"),  # where "pytorch" was wrong
        ({"triton": [1.0]}, "triton"),
        ({}, None),
    ],
)
def test_a_win_needs_a_margin(milliseconds, taken):
    assert fastest(milliseconds) == taken


@pytest.mark.parametrize(
    "taken, spans",
    [
        ([(1024, "triton")], [([32, None], "triton")]),
        ([(1 << 20, "triton"), (1024, "pytorch")], [([32, 32768], "pytorch"), ([32769, None], "triton")]),
        ([(1, "a"), (100, "a"), (10000, "a")], [([0, None], "a")]),
        ([(1, "a"), (100, "b"), (10000, None)], [([0, 10], "a"), ([11, 1000], "b"), ([1001, None], None)]),
    ],
)
def test_rows_are_cut_between_what_was_measured(taken, spans):
    assert by_rows(taken) == spans


def measured(**winners) -> list[dict]:
    """One that takes a third of the time, by shape."""
    found = []
    for name, shape in SHAPES.items():
        wins = winners.get(name.replace(" ", ""), winners.get("others", "pytorch"))
        times = {each: [1.0 if each == wins else 3.0] * 5 for each in ("pytorch", "compiled", "triton")}
        found.append({"name": name, **shape._asdict(), "milliseconds": dict.fromkeys(DECIDES, times)})
    return found


def taken_by(rows: list[dict], op: str, N: int, D: int, K: int, dtype=torch.float32) -> str:
    x, codebook = torch.empty(1, N, D, dtype=dtype, device="meta"), torch.empty(1, K, D, device="meta")
    arguments = {"codebook": codebook} if op == "prepare" else {"x": x, "codebook": codebook}
    if op == "ema_update_":
        arguments = {"embed_avg": codebook}
    return choose(map(regime_of, rows), op, call_of(arguments), lambda name: True)


def test_one_that_wins_everywhere_has_a_row_an_op_and_depth():
    rows = rows_of(measured(others="compiled"))
    depths = [[4, 22], [23, 90], [91, 181], [182, 362], [363, 1024]]
    least = [[4096, None], [32, None], [32768, None], [128, None], [1024, None]]
    for op in (op for ops in DECIDES.values() for op in ops):
        of = [row for row in rows if row["op"] == op]
        assert [row["D"] for row in of] == depths
        assert [row["N"] for row in of] == ([None] * 5 if op in timing.WITHOUT_ROWS else least)
    assert rows_of(measured()) == []


def test_what_was_measured_is_what_is_taken():
    rows = rows_of(measured(**{"1024x64x512": "pytorch", "131072x8x16384": "triton", "others": "compiled"}))
    for name, shape in SHAPES.items():
        wins = {"1024 x 64 x 512": "pytorch", "131072 x 8 x 16384": "triton"}.get(name, "compiled")
        for op in ("nearest", "quantize", "search_statistics", "nearest_topk", "code_sums", "quantize_backward"):
            assert taken_by(rows, op, *shape) == wins, (name, op)
    assert taken_by(rows, "prepare", 1, 64, 512) == taken_by(rows, "ema_update_", 1, 64, 512) == "compiled"
    assert taken_by(rows, "nearest", 5000, 12, 77, torch.bfloat16) == "triton"  # nearer to 8 than to 64
    assert taken_by(rows, "nearest", 4000, 8, 77) == taken_by(rows, "nearest", 31, 64, 77) == "pytorch"  # far fewer
    assert taken_by(rows, "nearest", 100, 64, 77) == "pytorch" and taken_by(rows, "nearest", 9999, 64, 77) == "compiled"
    assert taken_by(rows, "nearest", 5000, 3, 16) == taken_by(rows, "nearest", 5000, 1025, 16) == "pytorch"
    assert taken_by(rows, "nearest", 5000, 64, 512, torch.float64) == "pytorch"


@pytest.mark.parametrize("how", [{"left_out": "no room"}, {"failed": "by signal 11"}, {"wrong": {"indices": {}}}])
def test_of_a_shape_that_was_not_timed_or_is_doubtful_nothing_is_named(how):
    found = [row | how if row["N"] >= 1 << 17 else row for row in measured(others="triton")]
    for row in found:
        if "wrong" not in how and row["N"] >= 1 << 17:
            del row["milliseconds"]
    rows = rows_of(found)
    for name, shape in SHAPES.items():
        assert taken_by(rows, "nearest", *shape) == ("triton" if shape.N < 1 << 17 else "pytorch"), name
    assert taken_by(rows, "prepare", 1, 8, 512) == taken_by(rows, "ema_update_", 1, 64, 512) == "pytorch"
    assert rows_of([{"name": "1024 x 64 x 512", "failed": "x"}]) == []


def test_every_timed_op_has_a_call():
    assert set(calls(timing.Shape(4, 3, 2), CPU)) == set(DECIDES)


def test_what_is_measured():
    found = measure("1024 x 64 x 512", {op: ["pytorch", "compiled"] for op in DECIDES}, CPU, small=True)
    assert found["N"] == found["K"] == 100 and found["D"] == 64
    for times in found["milliseconds"].values():
        assert set(times) == {"pytorch", "compiled"} and all(time > 0 for rounds in times.values() for time in rounds)
    only = measure("1024 x 64 x 512", {"code_sums": ["compiled"], "quantize": []}, CPU, small=True)["milliseconds"]
    assert only["quantize"] == {} and set(only["code_sums"]) == {"compiled"}


@pytest.mark.parametrize("fault", ["wrong", "raised"])
def test_one_that_is_wrong_or_raises_at_a_timed_shape(monkeypatch, fault):
    right = calls

    def broken(shape, device):
        found = right(shape, device)
        compiled = found["nearest_topk"]

        def wrong():
            if fault == "raised":
                raise MemoryError("no room")
            indices, distances = compiled("compiled")()
            return indices + 1, distances

        return {**found, "nearest_topk": lambda name: wrong if name == "compiled" else compiled(name)}

    monkeypatch.setattr(timing, "calls", broken)
    found = measure("1024 x 64 x 512", {op: ["pytorch", "compiled"] for op in DECIDES}, CPU, small=True)
    if fault == "raised":
        assert found["raised"] == {"nearest_topk, compiled": "MemoryError: no room"} and found["wrong"] == {}
        assert set(found["milliseconds"]["nearest_topk"]) == {"pytorch"}
    else:
        differing = {"differ": 800, "from those of": "pytorch"}
        assert found["wrong"] == {"indices of nearest_topk, compiled": differing} and found["raised"] == {}


def test_what_has_no_room_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    found = measure("1048576 x 128 x 1024", {}, torch.device("cuda", 0), small=False)
    assert found == {"left_out": "it needs 6144 MB, 1024 are free"}
