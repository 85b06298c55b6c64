"""The import contracts (ARCHITECTURE.md): what each package may import, and what an import may load."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cde_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# These go with an export, and are never imported by us.
SHIPPED = ("interop/torch_module.py", "interop/adapter_module.py")


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imports(file: Path, *, at_module_level: bool) -> set[str]:
    """Full names that a file imports: all, or those that importing it runs (not inside functions)."""
    found, todo = set(), [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        if not (at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)
    return found


def tops(file: Path, *, at_module_level: bool) -> set[str]:
    return {name.split(".")[0] for name in imports(file, at_module_level=at_module_level)}


def importers(library: str) -> set[str]:
    """Files that import a library anywhere."""
    return {name_of(f) for f in FILES if library in tops(f, at_module_level=False) and name_of(f) not in SHIPPED}


def test_the_import_contracts_hold():
    # In a process of its own: import-linter's command turns off every logger of the one it runs in.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("package", ["data", "batching"])
def test_data_and_batching_need_no_device_library(package):
    for file in (PACKAGE / package).rglob("*.py"):
        assert not tops(file, at_module_level=True) & {"jax", "jaxlib", "flax", "optax", "torch"}, file


BARE = {"jax", "flax", "optax", "numpy", "jaxtyping", "cde_jax"}


@pytest.mark.parametrize(
    "file",
    [
        *sorted((PACKAGE / "models").glob("*.py")),
        *(PACKAGE / f"training/{n}.py" for n in ("accounting", "losses", "sharding", "step")),
    ],
)
def test_models_and_steps_run_on_a_bare_image(file):
    foreign = tops(file, at_module_level=False) - set(sys.stdlib_module_names) - BARE
    assert not foreign
    ours = {name for name in imports(file, at_module_level=False) if name.startswith("cde_jax.")}
    allowed = (
        "cde_jax.config",
        "cde_jax.models",
        "cde_jax.training.losses",
        "cde_jax.training.sharding",
        "cde_jax.training",
    )
    assert all(name.startswith(allowed) for name in ours), ours


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("faiss", {"batching/negatives.py"}),
        ("tensorflow_datasets", {"data/sources/tfds_pairs.py"}),
        ("datasets", {"data/sources/huggingface.py"}),
        ("pyarrow", {"data/parts.py", "data/sources/huggingface.py", "evaluation/results.py", "retrieval/vectors.py"}),
        ("matplotlib", {"stages/report.py", "stages/adapt.py", "evaluation/plots.py"}),
        ("orbax", {"training/checkpoint.py"}),
        ("mteb", {"evaluation/mteb.py"}),
        ("absl", {"main.py", "export.py", "adapt.py", "config.py"}),
        ("ml_collections", {"main.py", "config.py"}),
        ("pytrec_eval", {"evaluation/metrics.py"}),
        ("tensorboardX", {"training/loop.py"}),
        ("wandb", {"training/tracking.py"}),
        ("grain", {"batching/loader.py"}),
    ],
)
def test_a_library_has_one_owner(library, owners):
    assert importers(library) <= owners
    assert importers(library), f"nobody imports {library}: is this contract still needed?"


def test_only_sharding_spells_partition_specs():
    users = {
        name_of(file)
        for file in FILES
        if any(
            isinstance(node, (ast.Name, ast.Attribute, ast.alias)) and "PartitionSpec" in names(node)
            for node in ast.walk(ast.parse(file.read_text()))
        )
    }
    assert users == {"training/sharding.py"}


def names(node) -> set:
    return {getattr(node, field, None) for field in ("id", "attr", "name", "asname")}


def test_torch_is_imported_inside_functions_of_its_owners_only():
    for library in ("torch", "sentence_transformers"):
        inside = importers(library)
        assert all(name.startswith("interop/") or name == "batching/surrogate.py" for name in inside), inside
        for file in FILES:
            if name_of(file) not in SHIPPED:
                assert library not in tops(file, at_module_level=True), file
    assert all("torch" in tops(PACKAGE / name, at_module_level=True) for name in SHIPPED)
    imported = {name for file in FILES for name in imports(file, at_module_level=False)}
    assert not any(Path(name).stem in module for name in SHIPPED for module in imported)


def test_nothing_imports_the_commands_and_the_package_never_imports_configs():
    for file in FILES:
        imported = imports(file, at_module_level=False)
        assert not any(name.split(".")[0] == "configs" for name in imported), file
        assert not imported & {
            "cde_jax.main",
            "cde_jax.adapt",
            "cde_jax.encode",
            "cde_jax.export",
            "cde_jax.evaluate",
            "cde_jax.figures",
        }, file


def test_there_is_no_drawer_for_everything():
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_commands_have_no_logic():
    for name in ("main.py", "adapt.py", "encode.py", "export.py", "evaluate.py", "figures.py"):
        if (PACKAGE / name).exists():
            assert len((PACKAGE / name).read_text().splitlines()) <= 80


def loaded_by(modules: list[str]) -> set[str]:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


def modules(package: str) -> list[str]:
    files = (PACKAGE / package).rglob("*.py")
    return [
        ".".join(["cde_jax", *f.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__") for f in files
    ]


def test_importing_the_package_data_and_batching_loads_no_device_library():
    loaded = loaded_by(["cde_jax", *modules("data"), *modules("batching")])
    assert "cde_jax" in loaded
    assert not loaded & {"jax", "faiss", "flax", "scipy", "sklearn", "torch", "transformers"}


def test_importing_the_stages_loads_no_torch():
    loaded = loaded_by(modules("stages"))
    assert "jax" in loaded and not loaded & {"torch", "sentence_transformers", "transformers"}


def test_faiss_is_a_choice_of_extra():
    """faiss-cpu and faiss-gpu overwrite each other's files, so that core requires neither and no extra both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "faiss" not in (ROOT / "requirements.txt").read_text()
    extras = {name: " ".join(extra) for name, extra in project["optional-dependencies"].items()}
    assert {name for name, extra in extras.items() if "faiss-cpu" in extra} == {"cpu", "tpu"}
    assert {name for name, extra in extras.items() if "faiss-gpu" in extra} == {"cuda"}
