import pytest
from cuda_blocks import build


@pytest.fixture(scope="session")
def emulated(pytestconfig, tmp_path_factory):
    """The library of cuda_blocks.py, in pytest's cache: compiled once for all processes and runs of the tests."""
    cache = getattr(pytestconfig, "cache", None)  # None with `-p no:cacheprovider`
    return build(cache.mkdir("cuda_blocks") if cache else tmp_path_factory.mktemp("cuda_blocks"))
