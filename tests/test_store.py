"""Stores: whole or absent, read back as written, every altered byte found."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.data import files, store
from cde_jax.data.files import fingerprint, read_json, temporary_database, write_json
from cde_jax.data.store import Ragged, Store, StoreWriter

ROWS = [[1, 2, 3], [], [7], [4, 5]]


def write(directory, kind="numbers", **extra):
    with StoreWriter(directory, kind) as writer:
        writer.append("a", np.arange(6, dtype=">i4").reshape(3, 2))
        writer.append("a", np.full((1, 2), 9, np.int32))
        writer.append("none", np.zeros((0, 4), np.float16))
        writer.append_ragged("r", [np.array(row, np.uint16) for row in ROWS[:2]])
        writer.append_ragged("r", [np.array(row, np.uint16) for row in ROWS[2:]])
        writer.append_ragged("empty", [], np.int64)
        return writer.finish(extra)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_arrays_come_back_as_written_and_read_only(tmp_path):
    write(tmp_path / "s", note={"by": np.int64(3)})
    store = Store.open(tmp_path / "s", kind="numbers")
    np.testing.assert_array_equal(store.array("a"), [[0, 1], [2, 3], [4, 5], [9, 9]])
    assert store.array("a").dtype == np.int32
    assert store.array("none").shape == (0, 4)
    assert [store.ragged("r").row(i).tolist() for i in range(4)] == ROWS
    assert store.ragged("empty").count() == 0
    assert store.manifest["note"] == {"by": 3}
    for name in ("a", "none"):
        with pytest.raises(ValueError, match="read-only"):
            store.array(name)[...] = 1


def test_the_same_content_gives_the_same_bytes_and_fingerprint(tmp_path):
    first, second = write(tmp_path / "1"), write(tmp_path / "2")
    assert first.fingerprint == second.fingerprint
    names = sorted(os.listdir(tmp_path / "1"))
    assert names == sorted(os.listdir(tmp_path / "2"))
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


def test_every_flipped_byte_of_every_file_is_found(tmp_path):
    write(tmp_path / "s")
    for path in sorted((tmp_path / "s").glob("*.bin")):
        for position in range(path.stat().st_size):
            flip(path, position)
            with pytest.raises(ValueError, match=rf"{path.name}.*altered"):
                Store.open(tmp_path / "s")
            flip(path, position)
    Store.open(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"shape": [\n        4,', '"shape": [\n        3,'))
    with pytest.raises(ValueError, match=r"manifest\.json: expected digest"):
        Store.open(tmp_path / "s", verify=False)


def listed(folder) -> list[str]:
    """What is in a folder, without the records of what was verified."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".verified.json"))


def test_a_file_is_hashed_once_by_all_processes_until_it_changes(tmp_path, monkeypatch):
    write(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():  # as if written long ago
        os.utime(path, ns=(0, 10**18))
    hashed, digest = [], files.file_digest

    def opened() -> list[str]:
        """What another process that opens the store hashes."""
        monkeypatch.setattr(store, "_verified", {})
        monkeypatch.setattr(files, "file_digest", lambda path: hashed.append(path.name) or digest(path))
        hashed.clear()
        Store.open(tmp_path / "s")
        return list(hashed)

    assert len(opened()) == 6 and opened() == []
    os.utime(tmp_path / "s/a.bin", ns=(0, 10**18 + 1))
    assert opened() == ["a.bin"] and opened() == []
    content = (tmp_path / "s/a.bin").read_bytes()  # another file of the same size and time
    (tmp_path / "s/new").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(tmp_path / "s/new", ns=(0, 10**18 + 1))
    (tmp_path / "s/new").replace(tmp_path / "s/a.bin")
    with pytest.raises(ValueError, match=r"a\.bin: expected sha256"):
        opened()
    (tmp_path / "s/a.bin").write_bytes(content)
    (tmp_path / ".s.verified.json").write_text("[]")  # damaged, or deleted to have all hashed again
    assert len(opened()) == 6
    monkeypatch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    (tmp_path / ".s.verified.json").unlink()
    assert len(opened()) == len(opened()) == 6


def test_a_file_is_hashed_once_in_a_process_until_it_changes(tmp_path, monkeypatch):
    write(tmp_path / "s")
    hashed = []
    digest = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: hashed.append(path.name) or digest(path))
    for path in (tmp_path / "s").iterdir():  # as if written long ago
        os.utime(path, ns=(0, 10**18))
    for _ in range(3):
        Store.open(tmp_path / "s")
    assert sorted(hashed) == [
        "a.bin",
        "empty.offsets.bin",
        "empty.values.bin",
        "none.bin",
        "r.offsets.bin",
        "r.values.bin",
    ]
    flip(tmp_path / "s/a.bin", 3)
    with pytest.raises(ValueError, match=r"a\.bin: expected sha256"):
        Store.open(tmp_path / "s")
    flip(tmp_path / "s/a.bin", 3)
    Store.open(tmp_path / "s")
    assert hashed[6:] == ["a.bin", "a.bin"]
    now = time.time_ns()
    for _ in range(2):  # as if changed just now: another change may leave the same time, so the digest is not kept
        os.utime(tmp_path / "s/a.bin", ns=(now, now + 10**9))
        Store.open(tmp_path / "s")
    assert hashed[8:] == ["a.bin", "a.bin"]


def test_truncated_missing_and_foreign_stores_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"found no manifest\.json"):
        Store.open(tmp_path / "s")
    write(tmp_path / "s")
    with pytest.raises(ValueError, match="expected kind 'pairs', got 'numbers'"):
        Store.open(tmp_path / "s", kind="pairs")
    with pytest.raises(ValueError, match="no array 'b'; it has a,"):
        Store.open(tmp_path / "s").array("b")
    path = tmp_path / "s" / "a.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.bin: expected 32 bytes, got 31: truncated"):
        Store.open(tmp_path / "s", verify=False)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.bin: the manifest names this file, it is missing"):
        Store.open(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(ValueError, match="truncated or altered"):
        Store.open(tmp_path / "s")
    manifest.write_text('{"kind": "numbers"}')
    with pytest.raises(ValueError, match=r"json: expected the keys .*'format'.* got none of the name 'format'"):
        Store.open(tmp_path / "s")
    manifest.write_text('{"kind": "numbers", "format": 0, "arrays": {}, "manifest_sha256": ""}')
    with pytest.raises(ValueError, match="expected store format 1, got 0"):
        Store.open(tmp_path / "s")


def test_appends_that_disagree_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"dtype <i4 and trailing shape \[2\], got <i8 and \[2\]"):  # noqa: SIM117
        with StoreWriter(tmp_path / "s", "numbers") as writer:
            writer.append("a", np.zeros((1, 2), np.int32))
            writer.append("a", np.zeros((1, 2), np.int64))
    with StoreWriter(tmp_path / "s", "numbers") as writer:
        with pytest.raises(ValueError, match="file name"):
            writer.append("../a", np.zeros(1))
        with pytest.raises(ValueError, match="give dtype="):
            writer.append_ragged("a", [])
        with pytest.raises(ValueError, match=r"\['kind'\] are the store's own"):
            writer.finish({"kind": "other"})
    assert os.listdir(tmp_path) == []


def test_a_store_is_replaced_whole_and_other_folders_are_not_touched(tmp_path):
    write(tmp_path / "s")
    with StoreWriter(tmp_path / "s", "numbers") as writer:
        writer.append("b", np.zeros(1))
        assert "a" in Store.open(tmp_path / "s").manifest["arrays"]
        writer.finish()
    assert sorted(os.listdir(tmp_path / "s")) == ["b.bin", "manifest.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="found something else"):
        write(tmp_path / "mine")
    assert listed(tmp_path) == ["mine", "s"]


def test_a_killed_writer_leaves_no_store_and_the_next_one_sweeps(tmp_path):
    code = """
        import os, signal, sys
        import numpy as np
        from cde_jax.data.store import StoreWriter
        with StoreWriter(sys.argv[1], "numbers") as writer:
            writer.append("a", np.zeros(1000))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(code, tmp_path / "s").returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left == ".s.tmp" and os.listdir(tmp_path / left) == ["a.bin"]
    with StoreWriter(tmp_path / "s", "numbers") as living:
        assert os.listdir(tmp_path / left) == []  # the dead writer's files are gone
        living.append("a", np.zeros(1))
        with pytest.raises(ValueError, match="s: another process is writing it; wait"):
            write(tmp_path / "s")
        living.finish()
    assert listed(tmp_path) == ["s"]
    assert list(Store.open(tmp_path / "s").manifest["arrays"]) == ["a"]


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_while_a_store_is_replaced_leaves_a_whole_one_or_none(tmp_path, renames):
    write(tmp_path / "s")
    code = """
        import os, signal, sys
        import numpy as np
        from cde_jax.data.store import StoreWriter
        left = int(sys.argv[2])
        def counted(rename):
            def renaming(*names):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                rename(*names)
            return renaming
        os.rename, os.replace = counted(os.rename), counted(os.replace)  # the manifest, old away, new in place
        with StoreWriter(sys.argv[1], "numbers") as writer:
            writer.append("new", np.zeros(1000))
            writer.finish()
    """
    done = run(code, tmp_path / "s", renames)
    assert done.returncode == (0 if renames == 3 else -signal.SIGKILL)
    if renames == 2:
        assert not (tmp_path / "s").exists()
    else:
        assert ("new" in Store.open(tmp_path / "s").manifest["arrays"]) == (renames == 3)
    write(tmp_path / "s")
    Store.open(tmp_path / "s")
    assert listed(tmp_path) == ["s"]


def test_a_store_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "s")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), StoreWriter(tmp_path / "s", "numbers") as writer:
        writer.append("b", np.zeros(1))
        writer.finish()
    assert "a" in Store.open(tmp_path / "s").manifest["arrays"] and listed(tmp_path) == ["s"]


def test_a_folder_that_another_writer_finishes_meanwhile_is_not_taken_over(tmp_path, monkeypatch):
    lock, others = fcntl.flock, iter([True])

    def late(descriptor, operation):
        if next(others, False):  # between opening and locking, the folder is renamed to its place
            os.rename(tmp_path / ".s.tmp", tmp_path / "s")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with StoreWriter(tmp_path / "s", "numbers") as writer:
        (tmp_path / "s" / "theirs").touch()
        writer.append("b", np.zeros(1))
        assert os.listdir(tmp_path / ".s.tmp") == ["b.bin"] and os.listdir(tmp_path / "s") == ["theirs"]


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_json(tmp_path / "x.json", {})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_says_so_and_loses_nothing(tmp_path):
    write(tmp_path / "s")
    write_json(tmp_path / "config.json", {"old": True})
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from cde_jax.data.files import write_json
        from cde_jax.data.store import StoreWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with StoreWriter(Path(sys.argv[1], "s"), "numbers") as writer:
                for _ in range(10):
                    writer.append("a", np.zeros(1000, np.int32))
        except OSError as error:
            print(error)
        try:
            write_json(Path(sys.argv[1], "config.json"), list(range(10_000)))
        except OSError as error:
            print(error)
    """
    first, second = run(code, tmp_path).stdout.splitlines()
    assert "free some space" in first and "s/a.bin" in first
    assert "free some space" in second and "config.json" in second
    assert sorted(os.listdir(tmp_path)) == ["config.json", "s"]
    Store.open(tmp_path / "s")
    assert read_json(tmp_path / "config.json") == {"old": True}


def test_a_temporary_database_is_on_the_disk_without_a_name(tmp_path):
    with temporary_database(tmp_path / "new") as execute:
        assert os.listdir(tmp_path / "new") == []
        execute("CREATE TABLE t (number)")
        execute("INSERT INTO t VALUES (7)")
        assert execute("SELECT * FROM t").fetchall() == [(7,)]
        files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert any(name.startswith(f"{tmp_path}/new/") for name in files)


def test_a_temporary_database_holds_64_mb_in_memory_and_a_full_disk_says_so(tmp_path):
    code = """
        import resource, sys
        from cde_jax.data.files import temporary_database
        def memory():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
        def fill(megabytes):
            before = memory()
            with temporary_database(sys.argv[1]) as execute:
                execute("CREATE TABLE t (bytes BLOB)")
                for _ in range(megabytes):
                    execute("INSERT INTO t VALUES (?)", [bytes(1 << 20)])
                print(memory() - before)
        fill(250)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            fill(100)
        except OSError as error:
            print(error)
    """
    done = run(code, tmp_path)
    megabytes, error = done.stdout.splitlines()
    assert 30 < int(megabytes) < 100
    assert "free some space" in error and str(tmp_path) in error
    assert os.listdir(tmp_path) == []


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=6),
    length=st.integers(0, 8),
    data=st.data(),
)
def test_padded_rows_hold_each_row_cut_to_length(rows, length, data):
    ragged = Ragged(
        np.array([value for row in rows for value in row], np.uint16),
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )
    chosen = data.draw(st.lists(st.integers(-1, len(rows) - 1), max_size=5))
    ids, mask = ragged.padded(np.array(chosen, np.int64), length)
    assert ids.shape == mask.shape == (len(chosen), length)
    for row, i in enumerate(chosen):
        expected = rows[i][:length] if i >= 0 else []
        assert ids[row, : len(expected)].tolist() == expected
        assert (ids[row, len(expected) :] == 0).all()
        assert mask[row].sum() == len(expected) and mask[row, : len(expected)].all()
    with pytest.raises(IndexError):
        ragged.padded(np.array([len(rows)]), length)


def test_text_rows_come_back_as_text(tmp_path):
    with StoreWriter(tmp_path / "s", "text") as writer:
        writer.append_ragged("t", [np.frombuffer(text.encode(), np.uint8) for text in ("ä ≤ 1", "", "b")])
        ragged = writer.finish().ragged("t")
    assert [ragged.text(i) for i in range(ragged.count())] == ["ä ≤ 1", "", "b"]
    with pytest.raises(IndexError):
        ragged.text(3)


def test_fingerprints_ignore_form_but_not_content():
    assert fingerprint({"a": (1, 2), "b": np.float64(0.5)}) == fingerprint({"b": 0.5, "a": [np.int32(1), 2]})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_json_files_hold_finite_numbers_and_broken_ones_are_named(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": np.arange(2), "p": tmp_path})
    assert read_json(path) == {"a": [0, 1], "p": str(tmp_path)}
    with pytest.raises(ValueError, match=r"x\.json.*finite"):
        write_json(path, {"a": float("nan")})
    assert read_json(path)["a"] == [0, 1]
    assert os.listdir(path.parent) == ["x.json"]
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json: not readable as JSON"):
        read_json(path)
    with pytest.raises(ValueError, match="there is none"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("content", "expected", "message"),
    [
        ("[1]", {"keys": ("a", "b")}, r"expected a JSON object, got list: \[1\]"),
        ('{"a": 1}', {"keys": ("a", "b")}, r"expected the keys \['a', 'b'\], got none of the name 'b'; it was altered"),
        ("3", {"kind": list}, "expected a JSON array, got int: 3"),
        ("[" * 10**5, {}, "not readable as JSON .*recursion"),
        ("1" * 5000, {}, "not readable as JSON .*digits"),
        ("\udcff", {}, "not readable as JSON .*utf-8"),
        (None, {}, "not readable as JSON .*directory"),
    ],
)
def test_json_files_that_hold_something_else_are_named(tmp_path, content, expected, message):
    path = tmp_path / "x.json"
    path.mkdir() if content is None else path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"x\.json: {message}"):
        read_json(path, **expected)


def test_json_of_the_expected_form_is_read(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1, "b": []})
    assert read_json(tmp_path / "x.json", dict) == read_json(tmp_path / "x.json", keys=("b", "a")) == {"a": 1, "b": []}
