"""The notebook of the VQ-VAE-2 runs from its first cell to its last, as it is."""

from pathlib import Path

import pytest

pytest.importorskip("safetensors")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "vqvae2.ipynb"
LINES = 40


def test_it_is_short():
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert sum(bool(line.strip()) for source in cells for line in source.splitlines()) <= LINES


@pytest.mark.slow
def test_it_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises what a cell raises
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert len(list((tmp_path / "samples").glob("*.png"))) == 48 + 1
