"""What earlier checks have found: `vqops check --show` and `--report`."""

import json
import time
from pathlib import Path

from vqops import info
from vqops.check import record
from vqops.check.command import SECONDS, chosen, facts_here
from vqops.check.runner import Runner
from vqops.dispatch import choice, records
from vqops.dispatch.records import Gpu


def known() -> list[tuple[dict, Path]]:
    """The GPUs of this machine, each kind once, with its record, whether there is one or not. Raises CannotCheck."""
    gpus = chosen("cuda", facts_here(Runner(time.monotonic() + SECONDS))["gpus"])
    return [(gpu, records.candidates(Gpu(gpu["name"], gpu["capability"]))[0]) for gpu in gpus]


def stored(path: Path) -> dict | None:
    """The content of a record, of any kernels; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if {"cases", "times", "products"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def show() -> str:
    """What each kind of GPU here takes, and what its last check found."""
    parts = []
    for gpu, path in known():
        of = Gpu(gpu["name"], gpu["capability"])
        parts.append(info.of_gpu(of.name, choice.recorded(of)))
        if content := stored(path):
            parts.append(f"checked {content.get('date')}\n{record.described(content)}")
    return "\n\n".join(parts) or "There is no CUDA device here."


def report() -> str:
    """For an issue: the installation, and what the last check of each kind of GPU found."""
    parts = [info.report()]
    for gpu, path in known():
        content = stored(path)
        parts.append(json.dumps(content) if content else f"{gpu['name']}: not checked yet, run `vqops check`")
        if content:
            parts.insert(-1, record.described(content))
    return "```\n" + "\n\n".join(parts) + "\n```"
