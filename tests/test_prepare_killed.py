"""`prepare`, killed at any moment and started again with the same command, ends with the same bytes."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_resume import finish, start, wait_for
from tiny_run import texts, write_data, write_lines

PAIRS = 1500  # of each of three domains: enough that every part takes long enough to be killed in


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Pairs, and the artefacts of a `prepare` that nobody disturbs."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    rows = [
        {"query": f"{query} {i}", "document": f"{document} {i}", "domain": domain}
        for domain in ("sea", "sky", "sand")
        for i, (query, document) in enumerate(texts(domain, PAIRS, seed=0))
    ]
    write_lines(folder / "pairs.jsonl", rows)
    finish(start(folder, folder / "whole", "prepare"))
    return folder, artefacts(folder / "whole")


def artefacts(workdir: Path) -> dict[str, bytes]:
    """Every file that `prepare` is to leave, and nothing else."""
    files = [p for folder in ("store", "plan") for p in (workdir / folder).rglob("*")] + [*workdir.glob("report.*")]
    files = [p for p in files if not p.name.endswith(".verified.json")]  # times of files
    return {str(p.relative_to(workdir)): p.read_bytes() for p in sorted(files) if p.is_file()}


@pytest.mark.slow
def test_killed_while_pairs_vectors_and_plan_are_written(data, tmp_path):
    folder, expected = data
    workdir = tmp_path / "work"
    for half_written in ("store/.pairs.*", "store/.vectors.*", ".plan.*"):
        process = start(folder, workdir, "prepare")
        wait_for(lambda pattern=half_written: list(workdir.glob(pattern)), process)
        process.kill()
        finish(process, -signal.SIGKILL)
        assert list(workdir.glob(half_written)), "killed too late to show anything"
        assert not (workdir / half_written.split(".")[0] / half_written.split(".")[1]).exists()
    finish(start(folder, workdir, "prepare"))
    assert artefacts(workdir) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_three_times_at_random_moments(data, tmp_path, seed):
    folder, expected = data
    chance = random.Random(seed)
    for _ in range(3):
        process = start(folder, tmp_path / "work", "prepare")
        time.sleep(chance.uniform(1.0, 8.0))
        process.kill()
        process.communicate()
    finish(start(folder, tmp_path / "work", "prepare"))
    assert artefacts(tmp_path / "work") == expected
    shutil.rmtree(tmp_path / "work")
