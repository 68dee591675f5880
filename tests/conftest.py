"""Every implementation of the ops, and fresh memory that shows when it is read before it is written."""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported

import processor  # noqa: F401  before anything is computed
from implementations import IMPLEMENTATIONS, Implementation, available


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n`: tests of a file that has fixtures of its own stay together, the others go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if has_module_fixture(config.rootpath / file) else nodeid

    if config.option.dist != "load":  # what `-n` means without `--dist`
        return None
    config.option.loadscopereorder = False  # largest files first: then MINUTES would not be
    return ByFixture(config, log)


@functools.cache
def has_module_fixture(file) -> bool:
    return 'scope="module"' in file.read_text()


MINUTES = ("build/test_cuda_build.py", "triton/test_compile.py", "test_kernels.py::test_under_sanitizers")


def pytest_collection_modifyitems(items):
    """Tests that compile for minutes come first, so that no process is left with it at the end."""
    items.sort(key=lambda item: not any(test in item.nodeid for test in MINUTES))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> Implementation:
    return available(*request.param)


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def kernel(request) -> Implementation:
    """All but the reference on the CPU, which the others are compared with."""
    return available(*request.param)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Deterministic mode fills every uninitialised tensor with NaN or the largest integer."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
