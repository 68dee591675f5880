"""A child process of the check: `python -m vqops.check.child TASK`, with the task as JSON.

It writes a line of JSON for each name that it begins, and one for what came out; whatever else is printed is not of the
check. A fault on a GPU can leave the whole process useless: it ends there, and another goes on.
"""

import json
import os
import sys
import threading

FACTS = "the machine"  # a name beside those of cases and shapes
MARK = "vqops check: "  # begins the lines that are of the check


def say(row: dict) -> None:
    print(MARK + json.dumps(row), flush=True)


def heard(line: str) -> dict | None:
    return json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None


def end_with_parent() -> None:
    """Whoever started this process keeps its input open: without them nobody would end one that hangs."""
    while os.read(0, 1024):  # not by sys.stdin, whose lock Python wants at its own end
        pass
    os._exit(1)


def main(task: dict) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    if task.get("small"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    from vqops.check import cases, machine, timing

    if task.get("device", "").startswith("cuda"):
        torch.cuda.set_device(task["device"])  # a graph is captured on the current one
    for name in task["names"]:
        say({"begins": name})
        try:
            if name == FACTS:
                found = machine.facts()
            elif name in timing.SHAPES:
                found = timing.measure(name, task["implementations"], torch.device(task["device"]), task["small"])
            else:
                found = cases.judge(name, task["implementation"], torch.device(task["device"]), task["small"])
        except Exception as error:
            say({"name": name, "failed": f"{type(error).__name__}: {error}"[:1000]})
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises where the GPU is lost to this process
            continue
        say({"name": name, **found})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
