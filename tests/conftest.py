"""Every implementation of the ops, and fresh memory that shows when it is read before it is written.

VQOPS_TEST_THREADS=2 and VQOPS_TEST_ROUNDING=other (other_rounding.py) run the tests as another machine would.
"""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported

import vqops

REQUIRED = {name for name in os.environ.get("VQOPS_REQUIRE", "").split(",") if name}  # "cuda,triton": never skip these
torch.set_num_threads(int(os.environ.get("VQOPS_TEST_THREADS", "1")))  # for inputs this small one is the fastest
if os.environ.get("VQOPS_TEST_ROUNDING") == "other":
    import other_rounding  # noqa: F401
INTERPRETED = ("triton", "cpu")
IMPLEMENTATIONS = [
    pytest.param((name, device), id=f"{name}-{device}", marks=[pytest.mark.slow] * ((name, device) == INTERPRETED))
    for device in ("cpu", "cuda")
    for name in ("reference", "compiled", "triton")
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n`: tests of a file that has fixtures of its own stay together, the others go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if has_module_fixture(config.rootpath / file) else nodeid

    return ByFixture(config, log) if config.option.dist == "load" else None  # what `-n` means without `--dist`


@functools.cache
def has_module_fixture(file) -> bool:
    return 'scope="module"' in file.read_text()


def pytest_collection_modifyitems(items):
    """What compiles for minutes comes first, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.path.stem != "test_triton_compile")


class Implementation:
    """The ops as one implementation runs them, on its device."""

    def __init__(self, name: str, device: str):
        self.name, self.device = name, torch.device(device)

    def __getattr__(self, op):
        def call(*args, **options):
            moved = [self.put(a) for a in args]
            options = {key: self.put(value) for key, value in options.items()}
            return getattr(vqops, op)(*moved, **options, implementation=self.name)

        return call

    def put(self, value):
        return value.to(self.device) if isinstance(value, torch.Tensor) else value


def missing(name: str, device: str) -> str | None:
    """Why this process can't run the implementation, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name not in vqops.implementations()["nearest"][device]:
        return "Triton is not installed, or not in its interpreter" if (name, device) == INTERPRETED else "not built"
    return None


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> Implementation:
    return available(*request.param)


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def kernel(request) -> Implementation:
    """All but the reference on the CPU, which the others are compared with."""
    return available(*request.param)


def available(name: str, device: str) -> Implementation:
    reason = missing(name, device)
    if reason and device == ("cuda" if "cuda" in REQUIRED else "cpu") and name in {"compiled", *REQUIRED}:
        pytest.fail(f"VQOPS_REQUIRE: {name} on {device}: {reason}")
    if reason:
        pytest.skip(reason)
    return Implementation(name, device)


@pytest.fixture(scope="session")
def emulated(pytestconfig, tmp_path_factory):
    """The library of cuda_blocks.py, in pytest's cache: compiled once for all processes and runs of the tests."""
    from cuda_blocks import build

    cache = getattr(pytestconfig, "cache", None)  # None with `-p no:cacheprovider`
    return build(cache.mkdir("cuda_blocks") if cache else tmp_path_factory.mktemp("cuda_blocks"))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Deterministic mode fills every uninitialised tensor with NaN or the largest integer."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
