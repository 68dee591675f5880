"""Builds `vqops._C`, and is the build backend of pyproject.toml: the build uses the torch that will run it.

Build isolation hides the environment that vqops is installed into. Here its torch is found again, so that nothing is
downloaded when it is there. VQOPS_CUDA=0 leaves CUDA out, VQOPS_CUDA=1 makes it an error if it has to be left out;
CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs, CXX the compiler.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from subprocess import check_output

NEEDED = {"setuptools": (77,), "torch": (2, 10)}
ARCHITECTURES = ("80", "90a", "100", "120")  # nvcc's `all-major` and `native` have no 90a: no wgmma


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def missing(*packages):
    found = {p: next((numbers(d.version) for d in metadata.distributions(name=p)), ()) for p in packages}
    return [f"{p}>={'.'.join(map(str, NEEDED[p]))}" for p in packages if found[p] < NEEDED[p]]


def expose_torch():
    """Append the path of the environment that vqops is installed into, unless torch is in sight already."""
    pythons, config = [sys.executable], Path(sys.prefix, "pyvenv.cfg").resolve()
    if config.is_file() and config.is_relative_to(Path(tempfile.gettempdir()).resolve()):  # a venv for this build only
        pythons += re.findall("^command = (.*?) -m venv ", config.read_text(), re.M)  # made by that environment
    unhidden = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    for python in pythons:
        if missing("torch"):
            path = check_output([python, "-c", "import sys; print(*sys.path[1:], sep='\\n')"], env=unhidden, text=True)
            sys.path += [folder for folder in path.splitlines() if folder not in sys.path]


def find_toolkit():
    """Folder and version of the CUDA toolkit, or two None. The nvcc on PATH can be a wrapper outside of it."""
    named, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), Path(shutil.which("nvcc") or "")
    for folder in [named] if named else [nvcc.parent.parent, nvcc.resolve().parent.parent, "/usr/local/cuda"]:
        if Path(folder, "bin/nvcc").is_file() and Path(folder, "include/cuda_runtime.h").is_file():
            printed = check_output([f"{folder}/bin/nvcc", "--version"], text=True)
            return str(folder), numbers(printed.partition("release")[2])
    return None, None


def why_no_cuda(request, sources, torch_cuda, toolkit):
    """The reason to leave CUDA out, or None. `request` is VQOPS_CUDA; versions are tuples, empty or None for none."""
    if request == "0":
        return "VQOPS_CUDA=0"
    if not sources:
        return "there are no CUDA kernels yet"
    if not torch_cuda and not request:
        return "torch is built without CUDA"
    if not toolkit:
        return "no CUDA toolkit is found; CUDA_HOME can name one"
    if not 12 <= toolkit[0] <= (torch_cuda or toolkit)[0]:  # a driver for torch's CUDA runs what is older, too
        return f"toolkit {toolkit[0]}.{toolkit[1]} is older than 12.0, or its major version newer than torch's CUDA"
    return None


def architecture_flags(nvcc):
    """Machine code for those of ARCHITECTURES that nvcc knows, and PTX for GPUs to come, which 90a's is not."""
    known = check_output([nvcc, "--list-gpu-arch"], text=True).split()
    chosen = [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known]
    lasting = [a for a in chosen if not a.endswith("a")][-1:]
    pairs = [(a, f"sm_{a}") for a in chosen] + [(a, f"compute_{a}") for a in lasting]
    return [f"-gencode=arch=compute_{a},code={code}" for a, code in pairs]


def extension():
    """The arguments of setup() that build `vqops._C`. Prints what is built, and why."""
    if not shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):
        raise SystemExit(
            "vqops: there is no C++ compiler. Install one (Debian, Ubuntu: `apt install g++`; Fedora: "
            "`dnf install gcc-c++`; macOS: `xcode-select --install`), or name yours in the variable CXX."
        )
    import torch
    from torch.utils import cpp_extension

    files = sorted(map(str, Path("csrc").rglob("*.*")))
    cpp, cu = ([file for file in files if file.endswith(suffix)] for suffix in (".cpp", ".cu"))
    request, (folder, toolkit) = os.environ.get("VQOPS_CUDA", ""), find_toolkit() if cu else (None, None)
    why = why_no_cuda(request, cu, numbers(torch.version.cuda or ""), toolkit)
    if (why and request == "1") or request not in ("", "0", "1"):
        raise SystemExit(f"vqops: VQOPS_CUDA={request}, but {why if request == '1' else 'it must be 0, 1 or empty'}")
    cxx_flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
    nvcc_flags = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
    cuda, link = f"left out: {why}", {}
    if not why:
        cpp_extension.CUDA_HOME = folder  # None in a torch without CUDA
        cpp_extension._check_cuda_version = lambda *_: None  # the stable ABI has no CUDA in it: versions may differ
        named = os.environ.get("TORCH_CUDA_ARCH_LIST")  # torch makes flags of it if none of ours has "arch" in it
        nvcc_flags += [] if named else architecture_flags(f"{folder}/bin/nvcc")
        architectures = named or " ".join(re.findall(r",code=(\w+)", " ".join(nvcc_flags)))
        nvcc_flags += [f"-DVQOPS_WGMMA={int('90a' in architectures.replace('.', ''))}"]
        cuda = f"{toolkit[0]}.{toolkit[1]} for {architectures}"
        link = {"libraries": ["cudart_static", "rt", "pthread", "dl"], "library_dirs": [f"{folder}/lib64"]}
    print(f"vqops: building for torch {torch.__version__} in {torch.__path__[0]}; CUDA {cuda}")
    module = cpp_extension.CppExtension(
        "vqops._C",
        cpp if why else cpp + cu,
        depends=files,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={"cxx": [*cxx_flags, f'-DVQOPS_CUDA_BUILD="{cuda}"'], "nvcc": nvcc_flags},
        **link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def hook(name):
    return lambda *args, **kwargs: getattr(import_module("setuptools.build_meta"), name)(*args, **kwargs)


expose_torch()
if __name__ == "__main__":  # run by setuptools; a source distribution needs no torch
    import_module("setuptools").setup(**({} if "sdist" in sys.argv else extension()))
else:  # imported by pip, build or uv, maybe before there is a setuptools
    build_sdist, build_wheel, build_editable = hook("build_sdist"), hook("build_wheel"), hook("build_editable")
    prepare_metadata_for_build_wheel = hook("prepare_metadata_for_build_wheel")
    prepare_metadata_for_build_editable = hook("prepare_metadata_for_build_editable")

    def get_requires_for_build_sdist(config_settings=None):
        return missing("setuptools")

    def get_requires_for_build_wheel(config_settings=None):
        return missing("setuptools", "torch")

    get_requires_for_build_editable = get_requires_for_build_wheel
