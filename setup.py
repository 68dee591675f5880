"""Builds `vqops._C`, and is the build backend of pyproject.toml: the build uses the torch that will run it.

Build isolation hides the environment that vqops is installed into. Here its torch is found again, so that nothing is
downloaded when it is there. VQOPS_CUDA=0 leaves CUDA out, VQOPS_CUDA=1 makes it an error if it has to be left out.
CUDA is compiled for the GPUs that the driver shows, and for all of ARCHITECTURES where it shows none; VQOPS_CUDA_ARCHS
is `all`, or names some of them. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST any GPUs, CXX the compiler, MAX_JOBS
the number of files that ninja compiles at a time.
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired, check_output

NEEDED = {"setuptools": (77,), "torch": (2, 10)}
ARCHITECTURES = ("80", "90a", "100", "120")  # nvcc's `all-major` and `native` have no 90a: no wgmma
ASK_DRIVER = """
from ctypes import CDLL, byref, c_int
driver, value = CDLL("libcuda.so.1"), c_int()
def ask(function, *arguments):
    if error := getattr(driver, function)(byref(value), *arguments):
        raise SystemExit(f"{function} gives error {error}")
    return value.value
if error := driver.cuInit(0):
    raise SystemExit(error != 100 and f"cuInit gives error {error}")  # 100: there is no GPU
for number in range(ask("cuDeviceGetCount")):
    device = ask("cuDeviceGet", number)
    print(ask("cuDeviceGetAttribute", 75, device), ask("cuDeviceGetAttribute", 76, device))  # major, minor
"""


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def missing(*packages):
    found = {p: next((numbers(d.version) for d in metadata.distributions(name=p)), ()) for p in packages}
    return [f"{p}>={'.'.join(map(str, NEEDED[p]))}" for p in packages if found[p] < NEEDED[p]]


def environments():
    """The Pythons that vqops may be installed for: this one, and the maker of a venv that is for this build only."""
    config = Path(sys.prefix, "pyvenv.cfg").resolve()
    temporary = config.is_file() and config.is_relative_to(Path(tempfile.gettempdir()).resolve())
    return [sys.executable, *re.findall("^command = (.*?) -m venv ", config.read_text() if temporary else "", re.M)]


def expose_torch():
    """Append the path of the environment that vqops is installed into, unless torch is in sight already."""
    unhidden = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    for python in environments():
        if missing("torch"):
            path = check_output([python, "-c", "import sys; print(*sys.path[1:], sep='\\n')"], env=unhidden, text=True)
            sys.path += [folder for folder in path.splitlines() if folder not in sys.path]


def expose_ninja():
    """Whether there is ninja. Beside the Python of an environment that is not activated it is put on PATH."""
    for python in environments():
        folder = str(Path(python).parent)
        if not shutil.which("ninja") and shutil.which("ninja", path=folder):
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), folder])
    return bool(shutil.which("ninja"))


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


def visible_gpus(question=ASK_DRIVER, seconds=30):
    """Compute capabilities, or why there are none. Not asked of torch, which may be built without CUDA."""
    asked = Popen([sys.executable, "-I", "-c", question], stdout=PIPE, stderr=PIPE, text=True)  # a driver can crash
    try:
        printed, complaint = asked.communicate(timeout=seconds)
    except TimeoutExpired:
        asked.kill()  # and not waited for: what hangs in a driver may not end
        return [], f"the driver gave no answer in {seconds} s"
    if asked.returncode:
        return [], (complaint.splitlines() or [f"the driver ended the process with {asked.returncode}"])[-1]
    return sorted({tuple(map(int, line.split())) for line in printed.splitlines()}), "the driver has none"


def known_architectures(nvcc):
    known = check_output([nvcc, "--list-gpu-arch"], text=True).split()
    return [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known]


def choose_architectures(request, gpus, known):
    """Those of `known` to compile for, maybe none, and why. `request` is VQOPS_CUDA_ARCHS, `gpus` as visible_gpus()."""
    capabilities, why_none = gpus
    if request == "all":
        return known, "VQOPS_CUDA_ARCHS=all"
    if named := request.replace(",", " ").split():
        if set(named) - set(known):
            raise SystemExit(f"vqops: VQOPS_CUDA_ARCHS={request}, but it must be all, empty or of: {' '.join(known)}")
        return [a for a in known if a in named], f"VQOPS_CUDA_ARCHS={request}"
    if not capabilities:
        return known, f"no GPU is visible: {why_none}"
    served = {gpu: serving(gpu, known) for gpu in capabilities}
    chosen = [a for a in known if a in served.values()]
    old = ", ".join(f"{major}.{minor}" for (major, minor), by in served.items() if not by)
    too_old = [f"compute capability {old} is too old, the kernels need 8.0"] * bool(old)
    return chosen, "; ".join(["for the GPUs here"] * bool(chosen) + too_old)


def serving(gpu, known):
    """The newest of `known` whose code runs on a GPU, beyond its major version as PTX, or None; 90a's on 9.0 alone."""
    number = 10 * gpu[0] + gpu[1]
    return next((a for a in reversed(known) if (a.isdigit() and int(a) <= number) or a == f"{number}a"), None)


def architecture_flags(chosen):
    """Machine code, and PTX for GPUs to come, which 90a's is not."""
    lasting = [a for a in chosen if a.isdigit()][-1:]
    pairs = [(a, f"sm_{a}") for a in chosen] + [(a, f"compute_{a}") for a in lasting]
    return [f"-gencode=arch=compute_{a},code={code}" for a, code in pairs]


def gpu_flags(nvcc):
    """nvcc's flags for the GPUs to compile for, none where the kernels run on none of those here, and why."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return import_module("torch.utils.cpp_extension")._get_cuda_arch_flags(), "TORCH_CUDA_ARCH_LIST"
    request, known = os.environ.get("VQOPS_CUDA_ARCHS", ""), known_architectures(nvcc)
    chosen, why = choose_architectures(request, visible_gpus(), known)
    return architecture_flags(chosen), why


def hash_of_cuda():
    """Of what the kernels for GPUs are compiled from: records of their runs are for this alone."""
    files = sorted([*Path("csrc").glob("*.h"), *Path("csrc/cuda").rglob("*.*")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


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
    gencode, reason = ([], why) if why else gpu_flags(f"{folder}/bin/nvcc")
    if (not gencode and request == "1") or request not in ("", "0", "1"):
        raise SystemExit(f"vqops: VQOPS_CUDA={request}, but {reason if request == '1' else 'it must be 0, 1 or empty'}")
    relative = f"-fmacro-prefix-map={Path(__file__).parent.resolve()}/="  # the files that messages of checks name
    cxx_flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wno-psabi", relative]
    nvcc_flags = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fvisibility=hidden", f"-Xcompiler={relative}"]
    cuda, sources, link = f"left out: {reason}", "", {}
    if gencode:
        cpp_extension.CUDA_HOME = folder  # None in a torch without CUDA
        cpp_extension._check_cuda_version = lambda *_: None  # the stable ABI has no CUDA in it: versions may differ
        architectures = " ".join(flag.rpartition("=")[2] for flag in gencode)
        nvcc_flags += [*gencode, f"-DVQOPS_WGMMA={int('90a' in architectures)}"]
        cuda, sources = f"{toolkit[0]}.{toolkit[1]} for {architectures}", hash_of_cuda()
        link = {
            "libraries": ["cudart_static", "rt", "pthread", "dl"],
            "library_dirs": [f"{folder}/lib64"],
            # libtorch leads to the symbol of the current stream, which is weak: a linker would drop the library.
            "extra_link_args": ["-Wl,--no-as-needed", "-ltorch"],
        }
    why_these = f" ({reason})" if gencode else ""
    print(f"vqops: building for torch {torch.__version__} in {torch.__path__[0]}; CUDA {cuda}{why_these}")
    if not expose_ninja():
        print("vqops: ninja is not found, so files are compiled one after another")
    module = cpp_extension.CppExtension(
        "vqops._C",
        cpp + cu if gencode else cpp,
        depends=files,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={
            "cxx": [*cxx_flags, f'-DVQOPS_CUDA_BUILD="{cuda}"', f'-DVQOPS_CUDA_SOURCES="{sources}"'],
            "nvcc": nvcc_flags,
        },
        **link,
    )
    forced = {"build_ext": {"force": True}}  # what is there may be of other variables; ninja knows its commands
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}, "options": forced}


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
        needed = missing("setuptools", "torch")
        return needed if expose_ninja() or not missing("torch") else [*needed, "ninja"]  # downloads only beside torch

    get_requires_for_build_editable = get_requires_for_build_wheel
