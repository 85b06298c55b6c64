"""Tasks by other processes and by Ray: the bytes are those of one process, and what is there is not made again."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from test_prepare_killed import artefacts
from test_resume import wait_for
from test_stages import go
from tiny_pairs import PLAN, tiny_pairs, tiny_vectors
from tiny_run import SIZES, texts, write_data, write_lines

from cde_jax.batching import build, tasks
from cde_jax.batching.plan import BatchPlan, compressed, decompressed
from cde_jax.config import Batching
from cde_jax.data import parts
from cde_jax.data.pairs import InputLog
from cde_jax.data.sources import jsonl
from cde_jax.data.store import StoreWriter
from cde_jax.stages import prepare
from cde_jax.stages.engines import check_engine

ROOT = Path(__file__).resolve().parents[1]


def in_order(function, todo):
    """A `map_tasks` that is not `map`: shards are written, by this process."""
    return map(function, todo)


def plan_of(directory, stores, map_tasks, **changes):
    settings = Batching(**PLAN | changes)
    return build.build_plan(directory, *stores, settings, seed=1, map_tasks=map_tasks)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    pairs = tiny_pairs(folder / "pairs")
    return pairs, tiny_vectors(folder / "vectors", pairs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs in three files, with duplicates between them and hard negatives in one, and what one process makes."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    (folder / "pairs.jsonl").unlink()
    rows = [
        {"query": query, "document": document, "domain": domain}
        for domain in SIZES
        for query, document in texts(domain, 60, seed=0)
    ]
    rows[5]["negatives"] = [rows[9]["document"], rows[5]["document"], rows[8]["document"]]
    for name, some in (("a", rows[:110]), ("b", rows[90:200]), ("c", rows[180:])):
        (folder / "pairs").mkdir(exist_ok=True)
        write_lines(folder / f"pairs/{name}.jsonl", some)
    go(folder, folder / "whole", "prepare", data__paths=(f"{folder}/pairs",))
    return folder


@pytest.fixture
def divided(monkeypatch):
    """Local work of any size is divided."""
    monkeypatch.setattr(prepare, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(prepare, "PARALLEL_PAIRS", 0)


@pytest.mark.parametrize("mined", [0, 5])
@pytest.mark.parametrize("method", ["clustered", "random"])
def test_a_plan_from_shards_has_the_bytes_of_one_from_memory(stores, tmp_path, method, mined):
    options = {"method": method, "mine_first": min(1, mined), "mine_last": mined, "domain_weights": ("domain1=0",)}
    plan_of(tmp_path / "memory", stores, map, **options)
    plan_of(tmp_path / "shards", stores, in_order, **options)
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "shards")
    assert not (tmp_path / ".shards.shards").exists()


def test_a_plan_that_was_interrupted_goes_on_with_the_tasks_that_are_missing(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SCORES", 1)  # a task for each batch
    expected = plan_of(tmp_path / "whole", stores, in_order)
    made, compute = [], tasks._finish_batches

    def count(inputs, task):
        if len(made) == 4:
            raise OSError("the machine stops")
        made.append(task.step)
        return compute(inputs, task)

    monkeypatch.setattr(tasks, "_finish_batches", count)
    with pytest.raises(OSError, match="the machine stops"):
        plan_of(tmp_path / "plan", stores, in_order)
    monkeypatch.setattr(tasks, "_cluster", lambda *_: pytest.fail("clustered again"))
    monkeypatch.setattr(tasks, "_finish_batches", lambda i, t: made.append(t.step) or compute(i, t))
    plan_of(tmp_path / "plan", stores, in_order)
    assert sorted(made) == list(range(len(expected)))
    assert bytes_of(tmp_path / "plan") == bytes_of(tmp_path / "whole")


def test_pairs_vectors_and_plan_of_parts_are_byte_for_byte_those_of_one_stream(data, tmp_path, divided, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", 16)
    monkeypatch.setattr(parts, "BLOCKS", 2)
    monkeypatch.setattr(parts, "KEYS", 50)
    monkeypatch.setattr(prepare, "open_engine", lambda *_, **__: nullcontext(in_order))
    go(data, tmp_path / "work", "prepare", data__paths=(f"{data}/pairs",))
    assert artefacts(tmp_path / "work") == artefacts(data / "whole")


def test_parts_that_are_read_and_tokenized_are_not_made_again(data, tmp_path, monkeypatch):
    source, log = jsonl.parts(f"{data}/pairs", InputLog()), []
    first = parts.read_parts(tmp_path, source, "identity", in_order)
    times = [(path / "manifest.json").stat().st_mtime_ns for path in first]
    shutil.rmtree(first[1])
    monkeypatch.setattr(jsonl, "json_lines", lambda file, read=jsonl.json_lines: log.append(file.name) or read(file))
    again = parts.read_parts(tmp_path, source, "identity", in_order)
    assert log == ["b.jsonl"]
    assert [(path / "manifest.json").stat().st_mtime_ns == old for path, old in zip(again, times, strict=True)] == [
        *(True, False, True)
    ]


def test_local_processes_make_the_same_bytes_and_errors_come_as_they_are(data, tmp_path, divided):
    go(data, tmp_path / "work", "prepare", data__paths=(f"{data}/pairs",))
    assert artefacts(tmp_path / "work") == artefacts(data / "whole")
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: expected the key 'document'"):
        go(data, tmp_path / "bad", "prepare", data__paths=(str(tmp_path / "bad.jsonl"),))


def test_small_work_starts_no_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr("cde_jax.stages.engines._pool", lambda _: pytest.fail("a pool was started"))
    go(data, tmp_path / "work", "prepare", data__paths=(f"{data}/pairs",))


def test_an_unknown_engine_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(ValueError, match="expected local or ray, got 'spark'"):
        go(data, tmp_path / "work", "prepare", engine="spark")
    assert not (tmp_path / "work").exists()


def test_ray_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'cde_jax\[ray\]'"):
        check_engine("ray")


def test_masks_are_as_they_were_and_never_larger_than_their_bits():
    random = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5):
        keep = random.random((64, 130)) >= share
        bits = np.packbits(keep, axis=-1)
        mask = compressed(keep)
        np.testing.assert_array_equal(decompressed(mask, bits.size), bits.reshape(-1))
        assert len(mask) <= bits.size and (share == 0.5 or len(mask) < bits.size / 2)


def test_a_plan_with_uncompressed_masks_of_an_earlier_version_is_read(stores, tmp_path):
    plan = plan_of(tmp_path / "plan", stores, map)
    with StoreWriter(tmp_path / "old", "plan") as writer:
        for name in ("rows", "hard_negatives", "groups", "clusters"):
            writer.append(name, getattr(plan, name))
        writer.append("keep_bits", np.stack([np.packbits(plan.keep(step), axis=-1) for step in range(len(plan))]))
        writer.finish({key: value for key, value in plan.manifest.items() if key != "arrays"})
    old = BatchPlan.load(tmp_path / "old")
    assert old.fingerprint == plan.fingerprint
    for step in range(len(plan)):
        np.testing.assert_array_equal(old.keep(step), plan.keep(step))


RUN = """
import sys
from pathlib import Path
from tiny_run import get_config
from cde_jax.stages import prepare, run

if __name__ == "__main__":
    prepare.PARALLEL_BYTES = prepare.PARALLEL_PAIRS = 0
    config = get_config(sys.argv[1])
    config.data.paths = (f"{sys.argv[1]}/pairs",)
    list(run.run(config, Path(sys.argv[2]), "prepare"))
"""


@pytest.mark.slow
def test_killed_with_its_processes_it_goes_on_with_the_shards_that_are_missing(data, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command, work = [sys.executable, tmp_path / "run.py", data, tmp_path / "work"], tmp_path / "work"
    for shard in ("store/.pairs.shards/read-0", "store/.vectors.blocks/documents-0", ".plan.shards/clusters-0"):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda path=work / shard: path.exists(), process)
            process.kill()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "discarded" not in done.stderr, done.stderr[-3000:]
    assert artefacts(work) == artefacts(data / "whole")


ON_RAY = """
import os, signal, sys
from pathlib import Path
import numpy as np, ray
from tiny_run import get_config
from cde_jax.data import shards
from cde_jax.stages import engines, run


def square(task):
    folder, number = task
    if number == 7 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shards.make(folder / str(number), "digest", lambda: {"square": np.array([number**2])})


data, folder = map(Path, sys.argv[1:])
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
with engines.open_engine("ray") as map_tasks:
    made = list(map_tasks(square, [(folder, number) for number in range(20)]))
assert [int(shards.read(path)["square"][0]) for path in made] == [number**2 for number in range(20)]
assert (folder / "killed").exists()
config = get_config(data)
config.data.paths = (f"{data}/pairs",)
list(run.run(config, folder / "work", "prepare", engine="ray"))
"""


@pytest.mark.slow
def test_ray_makes_the_plan_of_one_process_although_a_worker_is_killed(data, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, tmp_path / "on_ray.py", data, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert artefacts(tmp_path / "work") == artefacts(data / "whole")
