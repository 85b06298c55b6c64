"""Mutation testing by cosmic-ray: are small changes to the code noticed by its tests?

python tests/mutate.py [--packages data batching training models] [--sample 40] [--seed 0] [--tests N]

Draws `--sample` mutations of each package with a seed (one at each place of the code; all with --sample 0), applies
each to a copy of the working tree and runs the tests of the mutated module: those files that name it, or else all that
name its package, at most `--tests` of them (what others would notice counts as survived). Prints a line per survivor
with its diff, and counts by package as JSON lines. Mutations of type annotations and of texts are left
out: they change no behaviour.
"""

import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import WorkItem

ROOT = Path(__file__).resolve().parents[1]
# Type unions, parameters of no behaviour, and operators that need arguments.
EXCLUDED = re.compile(r"core/(ReplaceBinaryOperator_BitOr_|RemoveDecorator|VariableInserter|VariableReplacer)")
TIMEOUT = 300  # seconds a mutation


def main() -> None:
    """Copy the tree, mutate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", default=["data", "batching", "training", "models"])
    parser.add_argument("--sample", type=int, default=40, help="mutations of each package; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=8, help="test files of a module at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes((ROOT / name).read_bytes())
        os.chdir(tree)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"  # shared by the runs
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        for package in args.packages:
            print(json.dumps(test_package(package, args.sample, args.seed, args.tests)), flush=True)


def test_package(package: str, sample: int, seed: int, tests: int) -> dict:
    """Mutate a package; returns counts. The unmutated code must pass its tests first."""
    items = draw(sorted(Path("cde_jax", package).rglob("*.py")), sample, seed)
    by_module: dict[str, list[WorkItem]] = defaultdict(list)
    for item in items:
        by_module[str(item.mutations[0].module_path)].append(item)
    tried = survived = timeouts = 0
    for module, mutations in by_module.items():
        command = shlex.join([sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", *tests_of(module)[:tests]])
        subprocess.run(shlex.split(command), check=True, capture_output=True)
        for item in mutations:
            result = mutate_and_test(item.mutations, command, TIMEOUT)
            tried += 1
            timeouts += result.output == "timeout"  # counts as noticed: an endless loop, or a slow machine
            if not result.is_killed:
                survived += 1
                mutation = item.mutations[0]
                changed = [line for line in result.diff.splitlines() if re.match(r"[-+](?![-+])", line)]
                print(f"survived {module}:{mutation.start_pos[0]}", *changed, sep="\n    ", flush=True)
    return {"package": package, "mutations": tried, "survived": survived, "timeouts": timeouts}


def draw(modules: list[Path], sample: int, seed: int) -> list[WorkItem]:
    """One mutation, drawn by the seed, at each place of the code that has any; of those a sample."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/session.sqlite") as db:
        init(modules, db, {})
        found = list(db.work_items)
    places: dict[tuple, list[WorkItem]] = defaultdict(list)
    for item in found:
        mutation = item.mutations[0]
        if not EXCLUDED.match(mutation.operator_name):
            places[str(mutation.module_path), mutation.start_pos, mutation.end_pos].append(item)
    generator = random.Random(seed)
    key = lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence)  # noqa: E731
    chosen = [generator.choice(sorted(places[place], key=key)) for place in sorted(places)]
    if not sample:
        return chosen
    drawn = set(generator.sample(range(len(chosen)), min(sample, len(chosen))))
    return [item for number, item in enumerate(chosen) if number in drawn]


def tests_of(module: str) -> list[str]:
    """Test files that import the module, or else its package: those named after it or naming it most often first."""
    name = module.removesuffix(".py").replace("/", ".")
    tests = {file: file.read_text() for file in sorted(Path("tests").glob("test_*.py"))}
    package, _, last = name.rpartition(".")
    imported = re.compile(rf"\b{re.escape(name)}\b|from {re.escape(package)} import [^\n]*\b{last}\b")
    exact = [file for file, text in tests.items() if imported.search(text)]
    files = exact or [file for file, text in tests.items() if package in text]
    return [str(file) for file in sorted(files, key=lambda file: (last not in file.stem, -tests[file].count(last)))]


if __name__ == "__main__":
    main()
