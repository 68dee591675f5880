"""Records of GPUs: what counts, what is ignored and why, and what one that ships must rest on."""

import json
import re
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from vqops import info
from vqops.dispatch import choice, library, records
from vqops.dispatch.records import Gpu
from vqops.dispatch.regimes import ANY, Call, Regime, regime_of

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
WITHOUT_ROWS = ("prepare", "ema_update_")
# The benchmark that shows an op, where it has none of its own name.
SHOWN_BY = {"prepare": "nearest", "search_statistics": "nearest", "quantize": "training step"}
H200 = Gpu("NVIDIA H200", "9.0")
KERNELS = {"triton": {"sources": "5eed", "version": "3.6.0"}, "compiled": {"sources": "c0de", "version": "13.0"}}
ROW = {"op": "nearest", "implementation": "triton", "D": [1, 64], "K": None, "N": [1000, None], "dtypes": ["float32"]}
RECORD = {"format": 1, "gpu": H200._asdict(), "kernels": KERNELS, "rows": [ROW]}


# What counts


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(record): an H200 whose user has it; what `vqops::nearest` would then look up."""
    device = torch.device("cuda", 0)
    properties = namedtuple("Properties", "name major minor")("NVIDIA H200", 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(records, "kernels_here", lambda: KERNELS)
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("VQOPS_GPU_RECORD", str(tmp_path / "own.json"))

    def own(record) -> choice.Table:
        if record is not None:
            (tmp_path / "own.json").write_text(record if isinstance(record, str) else json.dumps(record))
        choice.table.cache_clear()
        return choice.table(device)

    yield own
    choice.table.cache_clear()


def test_the_users_record_counts(machine):
    table = machine(RECORD)
    row = Regime("nearest", "triton", D=(1, 64), N=(1000, ANY[1]), dtypes=(torch.float32,))
    assert table.rows == (row,) and table.source.endswith("own.json") and table.ignored == ()


def test_it_is_read_once(machine, tmp_path):
    before = machine(RECORD)
    (tmp_path / "own.json").unlink()
    assert choice.table(torch.device("cuda", 0)) is before


def shipped(folder: Path, record: dict) -> None:
    folder.mkdir()
    (folder / "nvidia-h200-sm-9-0.json").write_text(json.dumps(record))


def test_one_that_ships_counts_where_the_user_has_none(machine, tmp_path):
    shipped(tmp_path / "shipped", {**RECORD, "rows": [{**ROW, "implementation": "compiled"}]})
    assert [row.implementation for row in machine(None).rows] == ["compiled"]
    assert [row.implementation for row in machine(RECORD).rows] == ["triton"]
    broken = machine("{")
    assert [row.implementation for row in broken.rows] == ["compiled"]
    assert "own.json: it cannot be read" in broken.ignored[0]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"format": 2}, "it is of format 2, this version of vqops reads 1"),
        ({"gpu": {"name": "NVIDIA L4", "capability": "8.9"}}, r"of NVIDIA L4 \(8.9\), this is NVIDIA H200 \(9.0\)"),
        ({"kernels": {"triton": {"sources": "5eed", "version": "3.9.0"}}}, "triton was .*3.9.0.*, here it is .*3.6.0"),
        ({"kernels": {"triton": {"sources": "01d", "version": "3.6.0"}}}, "triton was .*01d.*, here it is .*5eed"),
        ({"kernels": {}}, "it does not say with which kernels .'triton'. ran"),
        ({"rows": 7}, "it is not a record"),
        ({"rows": [{"op": "nearest"}]}, "it is not a record: .*an op and an implementation, got {'op': 'nearest'}"),
        ({"rows": ["nearest"]}, "an op and an implementation, got 'nearest'"),
        ({"rows": [ROW, {**ROW, "dtypes": ["float31"]}]}, "dtypes must be .*'float31'"),
        ({"rows": [{**ROW, "dtypes": "float32"}]}, "dtypes must be .*'float32'"),
        ({"rows": [{**ROW, "dtypes": []}]}, "dtypes must be a list"),
        ({"rows": [{**ROW, "D": 5}]}, "D must be null or two whole numbers, .*got 5"),
        ({"rows": [{**ROW, "K": [1]}]}, r"K must be null .*got \[1\]"),
        ({"rows": [{**ROW, "N": ["1", "64"]}]}, "N must be null"),
        ("not json", "it cannot be read"),
        ("[]", "it is not a record"),
        (None, "there is no such file"),
    ],
)
def test_what_is_ignored_and_why(machine, change, why):
    with pytest.warns(UserWarning, match=r"no record shows a kernel to be right and fast on NVIDIA H200 \(sm_90\)"):
        table = machine({**RECORD, **change} if isinstance(change, dict) else change)
    assert table.rows == () and table.source is None
    assert re.search(why, table.ignored[0]), table.ignored


def test_of_kernels_that_changed_the_rows_do_not_count(machine):
    rows = [{**ROW, "implementation": "compiled"}, ROW]
    table = machine({**RECORD, "rows": rows, "kernels": {**KERNELS, "compiled": {"sources": "0", "version": "13.0"}}})
    assert [row.implementation for row in table.rows] == ["triton"] and "compiled was" in table.ignored[0]


def test_the_warning_comes_once(machine):
    with pytest.warns(UserWarning, match="`vqops info` says more"):
        machine(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.table(torch.device("cuda", 0))


def test_where_a_users_record_is(monkeypatch):
    monkeypatch.delenv("VQOPS_GPU_RECORD", raising=False)
    own, ships = records.candidates(H200)
    assert own.name == ships.name == "nvidia-h200-sm-9-0.json"
    assert own.parent.name == "vqops" and ships.parent == records.SHIPPED


def test_the_kernels_of_this_installation_are_known():
    here = records.kernels_here()
    assert all(set(kernel) == {"sources", "version"} and all(kernel.values()) for kernel in here.values())
    assert ("compiled" in here) == library.is_compiled("nearest", "cuda")


def test_a_triton_of_another_name(monkeypatch):
    def missing(name):
        raise records.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(records.metadata, "version", missing)
    monkeypatch.setattr(records, "import_module", lambda _name: type("Module", (), {"__version__": "3.9.0"}))
    assert records.triton_version() == "3.9.0"


def test_what_is_said_of_a_gpu(machine):
    table = machine({**RECORD, "rows": [ROW, {**ROW, "op": "prepare", "N": None}]})
    report = info.of_gpu("NVIDIA H200 (sm_90)", table)
    assert "nearest  triton  1 to 64  any  1000 and more  float32" in report and "own.json" in report
    with pytest.warns(UserWarning):
        report = info.of_gpu("NVIDIA H200 (sm_90)", machine("{"))
    assert "every op takes \"pytorch\"" in report and "own.json: it cannot be read" in report
    assert [info.bounds(each) for each in (ANY, (5, ANY[1]), (0, 9), (3, 3))] == ["any", "5 and more", "0 to 9", "3"]


# What one that ships must rest on


def unproven(row: Regime, device: str, folder: Path) -> str | None:
    """Why a row may not stand in a record that ships, or None. `folder` has the run's results."""
    if row.op not in library.OPS or row.implementation not in choice.IMPLEMENTATIONS:
        return "no such op or implementation"
    if row.op in WITHOUT_ROWS and row.N != ANY:
        return f"{row.op} has no rows to count"
    if not folder.is_dir():
        return f"there is no {folder}"
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not any(line.get("stage") == "test" and line.get("outcome") == "passed" for line in lines):
        return "the tests have not passed there"
    shown = [line for line in lines if line.get("op") == SHOWN_BY.get(row.op, row.op) and line["device"] == device]
    shown = [line for line in shown if row.holds(measured(line)) and line["method"].startswith("vqops ")]
    ours = [line for line in shown if line["method"] == f"vqops {row.implementation}"]
    if not ours:
        return "nothing in the regime has been measured"
    for line in ours:
        if "failed" in line or line.get("wrong"):
            return f"it was wrong: {line}"
        rivals = (other["p50_ms"] for other in shown if key(other) == key(line) and "p50_ms" in other)
        if line["p50_ms"] > min(rivals):
            return f"it was not the fastest: {line}"
    return None


def measured(line: dict) -> Call:
    return Call(line["D"], line["K"], line["N"], (getattr(torch, line["dtype"]),))


def key(line: dict) -> list:
    return [line.get(name) for name in ("N", "D", "K", "dtype", "indices", "gradient")]


def test_every_row_that_ships_rests_on_a_committed_run():
    for file in records.SHIPPED.glob("*.json"):
        record = json.loads(file.read_text())
        folder, device = RESULTS / record["results"], record["gpu"]["name"]
        assert [(row, why) for row in record["rows"] if (why := unproven(regime_of(row), device, folder))] == []


def lines_of(**changes) -> list[dict]:
    bench = {"op": "nearest", "N": 1 << 20, "D": 64, "K": 512, "dtype": "float32", "wrong": 0, "device": H200.name}
    return [
        {"stage": "test", "outcome": "passed"},
        bench | {"method": "ceiling: gemm", "p50_ms": 0.1},
        bench | {"method": "vqops triton", "p50_ms": 1.0} | changes,
        bench | {"method": "vqops compiled", "p50_ms": 2.0},
        bench | {"method": "cdist + argmin", "p50_ms": 0.5},
    ]


@pytest.mark.parametrize(
    "row, lines, why",
    [
        ({}, lines_of(), None),
        ({"D": (64, 64), "N": (1 << 20, 1 << 20)}, lines_of(), None),
        ({}, None, "there is no"),
        ({}, lines_of()[1:], "the tests have not passed"),
        ({"K": (1024, 4096)}, lines_of(), "nothing in the regime"),
        ({"dtypes": (torch.bfloat16,)}, lines_of(), "nothing in the regime"),
        ({}, lines_of(device="NVIDIA A100-SXM4-80GB"), "nothing in the regime"),
        ({}, lines_of(wrong=1), "it was wrong"),
        ({}, lines_of(failed="out of memory"), "it was wrong"),
        ({}, lines_of(p50_ms=2.5), "it was not the fastest"),
        ({"op": "nearset"}, lines_of(), "no such op"),
        ({"op": "prepare"}, lines_of(), None),
        ({"op": "prepare", "N": (1, 5)}, lines_of(), "has no rows"),
    ],
)
def test_what_a_row_must_rest_on(tmp_path, row, lines, why):
    if lines is not None:
        (tmp_path / "gpu").mkdir()
        (tmp_path / "gpu/kernels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = unproven(Regime(**{"op": "nearest", "implementation": "triton"} | row), H200.name, tmp_path / "gpu")
    assert found is None if why is None else why in found


