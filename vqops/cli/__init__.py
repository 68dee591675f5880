"""The `vqops` command: flags to options to one function call."""

import sys
import warnings
from collections.abc import Sequence

COMMANDS = {
    "train": "train a VQ-VAE-2 on your images, or on photographs that come along",
    "reconstruct": "pass images through the codes of a trained model",
    "extract": "write the codes of images, for the priors to learn",
    "train-prior": "train a transformer on the codes of one level",
    "sample": "draw images from the priors",
    "complete": "draw the lower half of images",
    "evaluate": "measure a model: error, use of the codes, likelihood, classification accuracy score",
    "compare": "train autoencoder, VAE, discrete VAE and VQ-VAE on the same images, side by side",
    "check": "test and time the kernels on the GPUs of this machine, once, so that the ops take them",
    "info": "what was built, and which implementation each op takes on this machine",
}
EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "PIL", "skimage", "tomli")  # what vqops[train] brings
USAGE = "usage: vqops COMMAND ...\n\n" + "".join(f"  {name:<13}{about}\n" for name, about in COMMANDS.items())
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes; 2, too, where there is too little memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    What the user got wrong, a file that cannot be reached, and too little memory are a line and code 2.
    """
    command, *flags = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE + "\n`vqops COMMAND --help` lists its flags.")
        return 0
    if command not in COMMANDS:
        return refuse(f"vqops: there is no command {command!r}, only {', '.join(COMMANDS)}")
    try:
        return WITHOUT_EXTRA[command](flags) if command in WITHOUT_EXTRA else run(command, flags)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        return refuse(f"vqops {command} needs {package}: pip install 'vqops[train]'")
    except KeyboardInterrupt:
        return INTERRUPTED


def run_info(flags: list[str]) -> int:
    from vqops.info import main as info

    info()
    return 0


def run_check(flags: list[str]) -> int:
    from vqops.cli.checking import run

    return run(flags)


WITHOUT_EXTRA = {"info": run_info, "check": run_check}


def run(command: str, flags: list[str]) -> int:
    from vqops import vqvae2
    from vqops.cli.memory import out_of_memory
    from vqops.cli.parsing import flag, parsed
    from vqops.vqvae2.training.interruption import exit_code

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of large images and broken EXIF, with nothing to be done
    options = None
    exit_code()  # forgets what ended a training before, in this process
    try:
        options = parsed(command, flags)
        getattr(vqvae2, command.replace("-", "_"))(options)
    except (vqvae2.InputError, MemoryError, RuntimeError, OSError) as error:
        named = isinstance(error, vqvae2.InputError)  # a file may be unreadable for want of memory
        line = out_of_memory(error.__cause__ if named else error, command, options)
        if not line and not named and not getattr(error, "filename", None):
            raise
        line = line or (error.text(flag) if named else f"{error.filename}: {error.strerror}")
        return refuse(f"vqops {command}: {line}")
    return exit_code()


def refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return BAD_INPUT
