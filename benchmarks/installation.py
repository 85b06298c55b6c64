"""What an environment weighs: megabytes of each distribution and who needs it; seconds until each command is imported.

    python benchmarks/installation.py [--rounds 3]

Run it with the Python of the environment. "megabytes" are of the files that a distribution lists, without bytecode,
which appears as modules are imported; "alone" is what would go with it: itself and what nothing else needs.
"""

import argparse
import re
import statistics
import subprocess
import sys
from importlib.metadata import Distribution, distributions

from harness import emit, take_turns
from packaging.requirements import Requirement

COMMANDS = ("adapt", "encode", "evaluate", "export", "figures", "main")
# The commands read their flags first, and then import what runs: `stages.run` and so on.
MODULES = ("cde_jax", "cde_jax.Embedder", "cde_jax.stages.run", *(f"cde_jax.{name}" for name in COMMANDS))


def main() -> None:
    """A line for each distribution, the largest first, one for all of them, then a line for each import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    installed = {canonical(d.metadata["Name"]): d for d in distributions()}
    sizes = {name: megabytes(distribution) for name, distribution in installed.items()}
    needs = {name: requirements(distribution) & installed.keys() for name, distribution in installed.items()}
    for name in sorted(sizes, key=sizes.get, reverse=True):
        needed_by = sorted(other for other, required in needs.items() if name in required)
        alone = sum(sizes[other] for other in only_for(name, needs))
        line = {"benchmark": "installation", "distribution": name, "megabytes": round(sizes[name], 1)}
        emit(line | {"alone": round(alone, 1), "needed_by": needed_by})
    emit({"benchmark": "installation", "distributions": len(sizes), "megabytes": round(sum(sizes.values()), 1)})
    seconds = take_turns(
        {"python": lambda: start("pass")} | {m: lambda m=m: start(statement(m)) for m in MODULES}, rounds
    )
    for module, of_module in seconds.items():
        emit({"benchmark": "installation", "import": module, "seconds": round(statistics.median(of_module), 2)}, "jax")


def canonical(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def megabytes(distribution: Distribution) -> float:
    """Of the files that the distribution lists, without bytecode."""
    paths = [distribution.locate_file(file) for file in distribution.files or () if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def requirements(distribution: Distribution) -> set[str]:
    """What it needs here, extras left out."""
    parsed = map(Requirement, distribution.requires or ())
    return {canonical(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def only_for(name: str, needs: dict[str, set[str]]) -> set[str]:
    """The distribution, and of what it needs, directly or not, all that nothing outside of these needs.

    What nobody needs was asked for by name; it stays.
    """
    removed, last = {name}, {name}
    while last := {
        other
        for other in set().union(*(needs[of] for of in last)) - removed
        if all(user in removed for user, required in needs.items() if other in required)
    }:
        removed |= last
    return removed


def statement(module: str) -> str:
    """What imports it; a name in capitals is one that `cde_jax` imports at its first use."""
    package, _, name = module.rpartition(".")
    return f"from {package} import {name}" if name[:1].isupper() else f"import {module}"


def start(code: str) -> None:
    """Run code in a new process."""
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
