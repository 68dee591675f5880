"""The flags of `vqops check`, which needs nothing that vqops[train] brings."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from vqops.check.command import SECONDS, CannotCheck, check
from vqops.check.known import report, show

ABOUT = """Test every implementation of the ops on the GPUs of this machine, each in processes of its own, time them
side by side, and write down which one each op should take there. Vqops reads that record by itself."""


def run(flags: Sequence[str]) -> int:
    """0 where all was right or there was nothing to check, 1 where something was wrong, 2 where it could not check."""
    parser = ArgumentParser(prog="vqops check", description=ABOUT)
    parser.add_argument("--device", default="cuda", help="cuda: every kind of GPU; cuda:1: that one; cpu: a rehearsal")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each GPU; default: %(default).0f")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="what is known already, and nothing else")
    instead.add_argument("--report", action="store_true", help="what to paste into an issue, from the last check")
    options = parser.parse_args(flags)
    try:
        if options.show or options.report:
            print(show() if options.show else report())
            return 0
        return 0 if check(options.device, options.seconds) else 1
    except CannotCheck as reason:
        print(f"vqops check: {reason}", file=sys.stderr)
        return 2
