"""python -m benchmarks.gpu prepare                       beforehand: a binary and packages to bring along
python -m benchmarks.gpu rehearse --out rows            the whole plan on a CPU, with small inputs
python -m benchmarks.gpu all --out rows                 on the GPU machine: nine minutes at most, each part with a limit
python -m benchmarks.gpu all --out rows --parts triton_suite,check,bench,processor --seconds 240   a second call
python -m benchmarks.gpu publish rows                   for each call: rows, record and pages of the documentation

`all` needs no network and no compiler, if what `prepare` made came along: benchmarks/gpu/carried/ and
vqops/_C.cpython-312-*.so, both ignored by git. Every row is in --out/first_run.jsonl as soon as there is one, and the
output of the longer parts beside it. A tree without its .git is told its commit by VQOPS_COMMIT and VQOPS_COMMITTED.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu import prepare

SECONDS = 540.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("--python", default="python3.12", help="of the GPU machine's version")
    making.add_argument("--torch", default="2.13.0", help="to build with: the binary runs in 2.10 and newer")
    making.add_argument("--architecture", default="9.0a")
    making.add_argument("--index-url", help="where torch is; https://download.pytorch.org/whl/cpu has what is enough")
    for name in ("all", "rehearse"):
        running = commands.add_parser(name)
        running.add_argument("--out", type=Path, required=True, help="folder of the rows and logs")
        running.add_argument("--parts", help="names by commas, in the order of the plan")
        running.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    publishing = commands.add_parser("publish")
    publishing.add_argument("rows", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        prepare.bring(options.python, options.torch, options.architecture, options.index_url)
        return 0
    if options.command == "publish":
        from benchmarks.gpu.publish import publish

        publish(options.rows)
        return 0
    began = prepare.CLOCK()
    # Child processes take what came along, too; and nothing of vqops can be imported before it is built.
    path = [str(prepare.ROOT), str(prepare.PACKAGES), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.path.insert(0, str(prepare.PACKAGES))
    built = prepare.ensure_built() if options.command == "all" else {}
    from benchmarks.gpu import plan

    return plan.run(options.out, options.parts, began + options.seconds, options.command == "rehearse", built)


if __name__ == "__main__":
    sys.exit(main())
