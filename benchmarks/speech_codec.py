"""What each level of the speech codec adds: record the tables of docs/speech_codec.md, and its picture.

    python -m benchmarks.speech_codec              the synthetic clips, and the picture
    python -m benchmarks.speech_codec fsdd.npz     the Free Spoken Digit Dataset, laid out as that page says

A record is JSON lines: what was run where, then the figures of the first level, the first two, ...
"""

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.rows import environment
from examples.speech_codec.__main__ import main

RESULTS = Path(__file__).parent / "results" / "speech_codec"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "speech_codec.png"


def record(data: str | None) -> None:
    given = [] if data is None else ["--data", data]
    with TemporaryDirectory() as folder:
        measured = main([*given, "--out", folder])
        if data is None:
            shutil.copyfile(Path(folder) / "spectrograms.png", FIGURE)
    shown = " --data fsdd.npz" if given else ""
    about = {"command": f"python -m examples.speech_codec{shown}", "threads": torch.get_num_threads()} | environment()
    rows = [dict(zip(measured._fields, map(float, each), strict=True)) for each in zip(*measured, strict=True)]
    levels = [{"levels": number} | row for number, row in enumerate(rows, start=1)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("spoken_digits.jsonl" if given else "synthetic.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in (about, *levels)))


if __name__ == "__main__":
    record(*(sys.argv[1:] or [None]))
