"""The notebooks run from the first cell to the last on a CPU, are committed without outputs, and name no host."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLABS = Path(__file__).resolve().parents[1] / "colabs"
QUICKEST, SECONDS = "clusters_and_batches", 120
FILES = sorted(COLABS.glob("*.ipynb"))


def notebook(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def test_there_are_the_four_of_the_documentation():
    names = ["adapt_your_vectors", "clusters_and_batches", "inspect_embeddings", "train_tiny"]
    assert [file.stem for file in FILES] == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_stored_without_outputs_and_ends_with_what_to_try_next(file):
    content = notebook(file)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 'find_spec("cde_jax") is None' in code[0].source and "%pip install" in code[0].source
    assert not re.search(r"index-url|https?://\w", "".join(cell.source for cell in code))
    assert content.cells[-1].source.startswith("## Next")
    for cell in code:
        assert cell.source.count("plt.show()") == 0 or ("title=" in cell.source and "xlabel=" in cell.source)


@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] if f.stem != QUICKEST else []) for f in FILES]
)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(COLABS.parent))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, compiled as users have it
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    NotebookClient(notebook(file), timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
