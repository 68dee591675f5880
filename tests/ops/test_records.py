"""Records of GPUs: what counts, what is ignored and why, and what one that ships must rest on."""

import json
import re
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from vqops import info
from vqops.check import timing
from vqops.check.cases import CASES
from vqops.check.record import families
from vqops.dispatch import choice, library, records
from vqops.dispatch.records import Gpu
from vqops.dispatch.regimes import ANY, Call, Regime, regime_of

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
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

SUITES = {"compiled": "suite", "triton": "triton_suite"}  # parts of the run that must have passed
TIMED_AS = {each: op for op, ops in timing.DECIDES.items() for each in ops}
HALVES_AND_FLOAT = {"float32", "float16", "bfloat16"}  # timed in the first, right in all


def unproven(row: Regime, record: dict, folder: Path) -> str | None:
    """Why a row may not stand in a record that ships, or None. `folder` has the run's results."""
    if row.op not in TIMED_AS or row.implementation not in SUITES:
        return "no such op or kernel"
    if row.op in timing.WITHOUT_ROWS and row.N != ANY:
        return f"{row.op} has no rows to count"
    if not {str(dtype).removeprefix("torch.") for dtype in row.dtypes} <= HALVES_AND_FLOAT:
        return "a dtype that is not timed"
    if not (folder / "first_run.jsonl").exists():
        return f"there is no run in {folder}"
    lines = map(json.loads, (folder / "first_run.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["device"] == record["gpu"]["name"] and "left" not in line]
    suite = [line["outcome"] for line in lines if line["part"] == SUITES[row.implementation]]
    if suite[-1:] != ["passed"]:
        return "the tests have not passed there"
    if row.implementation not in families(results_of(record))[TIMED_AS[row.op]]:
        return "it was wrong in a case"
    inside = [line for line in record["times"] if "milliseconds" in line and row.holds(measured(line))]
    if not inside:
        return "nothing in the regime has been measured"
    largest = max(inside, key=lambda line: line["N"])
    for line in [largest] if row.op in timing.WITHOUT_ROWS else inside:
        if timing.fastest(line["milliseconds"][TIMED_AS[row.op]]) != row.implementation:
            return f"it did not win: {line}"
    return None


def results_of(record: dict) -> dict[str, list[dict]]:
    """Rows of the cases, of which a record keeps those that were not right."""
    found = {}
    for implementation, cases in record["cases"].items():
        others = {row["name"]: row for row in cases["others"]}
        found[implementation] = [others.get(name, {"name": name, "wrong": {}}) for name in CASES]
    return found


def measured(line: dict) -> Call:
    return Call(line["D"], line["K"], line["N"], (torch.float32,))


def test_every_row_that_ships_rests_on_a_committed_run():
    for file in records.SHIPPED.glob("*.json"):
        record = json.loads(file.read_text())
        folder = RESULTS / record["results"]
        assert [(row, why) for row in record["rows"] if (why := unproven(regime_of(row), record, folder))] == []


def shipping(**changes) -> dict:
    times = {"pytorch": [2.0], "compiled": [1.9], "triton": [1.0]}
    line = {"name": "x", "N": 1 << 20, "D": 64, "K": 512, "milliseconds": dict.fromkeys(timing.DECIDES, times)}
    cases = {name: {"right": 9, "of": 9, "others": []} for name in times}
    return {**RECORD, "cases": cases, "times": [line], **changes}


def slower(**times) -> dict:
    line = shipping()["times"][0]
    return {"times": [{**line, "milliseconds": dict.fromkeys(timing.DECIDES, times)}]}


WRONG = {"triton": {"right": 8, "of": 9, "others": [{"name": "nearest heads", "wrong": {"indices": {}}}]}}
PASSED = {"part": "triton_suite", "outcome": "passed", "device": H200.name}


@pytest.mark.parametrize(
    "row, record, run, why",
    [
        ({}, {}, [PASSED], None),
        ({"D": (64, 64), "N": (1 << 20, 1 << 20)}, {}, [PASSED], None),
        ({"op": "quantize"}, {}, [PASSED], None),
        ({"op": "prepare"}, {}, [PASSED], None),
        ({"op": "prepare", "N": (1, 5)}, {}, [PASSED], "has no rows"),
        ({"op": "nearset"}, {}, [PASSED], "no such op"),
        ({"implementation": "reference"}, {}, [PASSED], "no such op or kernel"),
        ({}, {}, None, "there is no run"),
        ({}, {}, [], "the tests have not passed"),
        ({}, {}, [{**PASSED, "part": "suite"}], "the tests have not passed"),
        ({}, {}, [PASSED, {**PASSED, "outcome": "failed"}], "the tests have not passed"),
        ({}, {}, [{**PASSED, "left": 9}], "the tests have not passed"),  # of the part as a whole
        ({}, {}, [{**PASSED, "device": "NVIDIA A100-SXM4-80GB"}], "the tests have not passed"),
        ({"K": (1024, 4096)}, {}, [PASSED], "nothing in the regime"),
        ({"dtypes": (torch.bfloat16,)}, {}, [PASSED], "nothing in the regime"),
        ({"dtypes": (torch.float64,)}, {}, [PASSED], "not timed"),
        ({}, {"cases": {**shipping()["cases"], **WRONG}}, [PASSED], "it was wrong"),
        ({"op": "code_sums"}, {"cases": {**shipping()["cases"], **WRONG}}, [PASSED], None),
        ({}, slower(pytorch=[1.04], triton=[1.0]), [PASSED], "it did not win"),
        ({}, slower(pytorch=[3.0], compiled=[1.0], triton=[2.0]), [PASSED], "it did not win"),
    ],
)
def test_what_a_row_must_rest_on(tmp_path, row, record, run, why):
    if run is not None:
        (tmp_path / "first_run.jsonl").write_text("\n".join(map(json.dumps, run)))
    given = Regime(**{"op": "nearest", "implementation": "triton"} | row)
    found = unproven(given, shipping(**record), tmp_path)
    assert found is None if why is None else why in found
