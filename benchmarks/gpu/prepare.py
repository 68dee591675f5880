"""What a GPU machine should not do on the clock: the binary, built here for its Python and GPU, and packages."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = Path(__file__).parent / "carried"
PACKAGES = CARRIED / "packages"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
BUILD_SECONDS = 300.0
CLOCK = time.monotonic
VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"


def bring(python: str, torch: str, architecture: str, index_url: str | None = None) -> None:
    """Builds vqops/_C for that Python in an environment of its own, and fetches the packages of requirements.txt.

    Raises subprocess.CalledProcessError with the command that failed, after its output.
    """
    interpreter = find(python)
    version = said(interpreter, VERSION)
    shutil.rmtree(CARRIED, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run(interpreter, "-m", "venv", folder)
        inside = str(Path(folder) / "bin/python")
        run(inside, "-m", "pip", "install", "-q", f"torch=={torch}", *(["--index-url", index_url] if index_url else []))
        run(inside, "-m", "pip", "install", "-q", "setuptools>=77,<82", "ninja", "wheel", "numpy")
        building = {"VQOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
        run(inside, "setup.py", "-q", "build_ext", "--inplace", **building)
        pure = ("--no-deps", "--only-binary=:all:", "--python-version", version, "--target", str(PACKAGES))
        run(inside, "-m", "pip", "install", "-q", *pure, "-r", str(REQUIREMENTS))
        print(said(inside, "from vqops import _C; print(_C.__file__, _C.cuda, sep='\\n')"))
    print(f"{PACKAGES.relative_to(ROOT)}: {', '.join(sorted(path.name for path in PACKAGES.glob('*.dist-info')))}")


def find(python: str) -> str:
    """On the PATH, or where pyenv keeps its versions, whose command on the PATH may name one that is not chosen."""
    version = python.removeprefix("python")
    kept = sorted((Path.home() / ".pyenv/versions").glob("*/bin/python"), reverse=True)
    kept = [str(path) for path in kept if path.parts[-3].startswith(f"{version}.")]
    for found in filter(None, [shutil.which(python), *kept]):
        if subprocess.run([found, "-c", VERSION], capture_output=True).returncode == 0:
            return found
    raise SystemExit(f"prepare: --python: there is no {python} here; the GPU machine then builds on the clock")


def run(*command: str, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment})


def said(python: str, code: str) -> str:
    path = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    return done.stdout.strip()


def ensure_built() -> dict:
    """On the GPU machine: the binary that came along, or one built here. A row that says which."""
    began, wanted = CLOCK(), architecture_here()
    row = {"part": "build", "architecture": wanted, "outcome": "passed", "why": "the kernels came along"}
    if has_kernels(wanted):
        return row
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    building = {**os.environ, "VQOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=building, timeout=BUILD_SECONDS)
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, status = f"not built in {BUILD_SECONDS:.0f} s", None
    outcome = "passed" if status == 0 and has_kernels(wanted) else "failed"
    said = [line[:300] for line in output.splitlines() if line.strip()][-5:]
    return {**row, "outcome": outcome, "why": "built here", "seconds": round(CLOCK() - began, 1), "last_lines": said}


def architecture_here() -> str:
    """Of the first GPU, asked in a process that ends with its context."""
    code = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"
    try:
        found = said(sys.executable, code)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"there is no CUDA device here ({error.stderr.strip().splitlines()[-1]})") from None
    return "9.0a" if found == "9.0" else found  # wgmma


def has_kernels(architecture: str) -> bool:
    try:
        built = said(sys.executable, "from vqops import _C; print(_C.cuda)")
        return f"sm_{architecture.replace('.', '')}" in built.split()
    except subprocess.CalledProcessError:
        return False
