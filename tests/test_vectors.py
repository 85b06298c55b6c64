"""Vectors of a pairs store: checked, batched by length, and byte-equal however often the writing was killed."""

import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny_pairs import bag_of_words, tiny_pairs

from cde_jax.batching import vectors as vectors_module
from cde_jax.batching.vectors import Texts, texts_fingerprint, vectors_fingerprint, write_vectors
from cde_jax.data.store import Store, StoreWriter

TESTS = str(Path(__file__).parent)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def padded_words(texts):
    """Vectors that, as a padded model's, depend on the texts of the same call and their order."""
    together = np.array([[sum(map(len, texts[: i + 1])) / 1e3] for i in range(len(texts))], np.float32)
    return np.hstack([bag_of_words(texts), together])


def failing(encode, *, after):
    """`encode` that raises behind so many calls."""
    calls = iter(range(after))

    def failing_encode(texts):
        if next(calls, None) is None:
            raise RuntimeError("the lights went out")
        return encode(texts)

    return failing_encode


def noting(encode, calls):
    """`encode` that notes the texts of each call."""
    return lambda texts: (calls.append(texts), encode(texts))[1]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """36 queries and 42 documents, in blocks of 5."""
    monkeypatch.setattr(vectors_module, "BLOCK", 5)
    return tiny_pairs(tmp_path / "pairs")


def write(folder, pairs, encode=padded_words, *, name="words", settings=None):
    return write_vectors(folder, pairs, encode, name=name, settings=settings or {})


# What is written.


def test_rows_are_encoded_in_blocks_the_longest_first_and_come_back_in_place(tmp_path, pairs):
    calls = []
    store = write(tmp_path / "v", pairs, noting(bag_of_words, calls))
    blocks = calls[2:]  # behind a look at the width of each side
    for array, text in (("queries", "query_text"), ("documents", "document_text")):
        texts = list(Texts(pairs.ragged(text)))
        np.testing.assert_array_equal(store.array(array), bag_of_words(texts).astype(np.float16))
        for start in range(0, len(texts), 5):
            block = blocks.pop(0)
            assert sorted(block) == sorted(texts[start : start + 5])
            lengths = [len(text.encode()) for text in block]
            assert lengths == sorted(lengths, reverse=True)
    assert not blocks
    assert len(store.array("queries")) == 36 and len(store.array("documents")) == 42


def test_the_manifest_says_what_the_vectors_are_of(tmp_path, pairs):
    store = write(tmp_path / "v", pairs, bag_of_words, settings={"width": 13})
    assert store.manifest["texts"] == texts_fingerprint(pairs) and store.manifest["surrogate"] == "words"
    assert store.manifest["width"] == 13 and store.manifest["settings"] == {"width": 13}
    assert store.fingerprint == vectors_fingerprint(pairs, "words", {"width": 13})
    Store.open(tmp_path / "v", kind="vectors")  # with the digests


def test_the_fingerprint_covers_texts_model_and_settings_and_nothing_else(tmp_path):
    def fingerprint(queries, documents, name="words", settings=(), domain=0, tokens=1):
        with StoreWriter(tmp_path / "p", "pairs") as writer:
            for side, texts in (("query", queries), ("document", documents)):
                writer.append_ragged(f"{side}_text", [np.frombuffer(text.encode(), np.uint8) for text in texts])
                writer.append_ragged(f"{side}_tokens", [np.zeros(tokens, np.uint16)] * len(texts))
            writer.append("domain", np.full(len(queries), domain, np.int32))
            return vectors_fingerprint(writer.finish({}), name, dict(settings))

    moved = [fingerprint(["a"], ["b"], name=f"x:{folder}", settings={"files": {"f": "1"}}) for folder in ("old", "new")]
    other = fingerprint(["a"], ["b"], name="x:old", settings={"files": {"f": "2"}})
    assert moved[0] == moved[1] != other
    same = fingerprint(["a", "bc"], ["d", "e"])
    assert same == fingerprint(["a", "bc"], ["d", "e"], domain=1, tokens=7)
    others = [
        fingerprint(["a", "bd"], ["d", "e"]),
        fingerprint(["a", "bc"], ["d", "f"]),
        fingerprint(["ab", "c"], ["d", "e"]),  # the same letters
        fingerprint(["bc", "a"], ["d", "e"]),
        fingerprint(["d", "e"], ["a", "bc"]),
        fingerprint(["a", "bc"], ["d", "e"], name="letters"),
        fingerprint(["a", "bc"], ["d", "e"], settings={"width": 3}),
    ]
    assert len({same, *others}) == 8


@pytest.mark.parametrize("zeros", [16, 15])
def test_vectors_of_zeros_are_warned_of_and_refused_where_there_are_no_others(tmp_path, monkeypatch, caplog, zeros):
    monkeypatch.setattr(vectors_module, "BLOCK", 16)
    pairs = tiny_pairs(tmp_path / "pairs")
    empty = set(Texts(pairs.ragged("query_text"))[:zeros])

    def encode(texts):
        return np.array([[0.0 if text in empty else 1.0] for text in texts], np.float32)

    if zeros == 16:
        with pytest.raises(ValueError, match="queries 0 to 15: expected vectors, got only zeros"):
            write(tmp_path / "v", pairs, encode)
    else:
        write(tmp_path / "v", pairs, encode)
        assert "queries 0 to 15: 15 vectors are zeros" in caplog.text


def test_queries_and_documents_may_have_functions_of_their_own(tmp_path, pairs):
    store = write(tmp_path / "v", pairs, (bag_of_words, lambda texts: -bag_of_words(texts)))
    assert (store.array("queries") >= 0).all() and (store.array("documents") <= 0).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, t: np.where([["query 7 " in x] for x in t], np.nan, v), r"queries 5 to 9: 1 vec.*first: row 7\)"),
        (lambda v, t: v * 1e6, "float16 range"),
        (lambda v, t: v[: max(1, len(v) - 1)], r"queries 0 to 4: expected vectors of shape \[5, 13\], got \[4, 13\]"),
        (lambda v, t: v[0], r"expected vectors of shape \[1, width\], got \[13\]"),
    ],
)
def test_broken_vectors_are_refused_with_their_row(tmp_path, pairs, spoil, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "v", pairs, lambda texts: spoil(bag_of_words(texts), texts))
    assert not (tmp_path / "v").exists()


def test_models_of_two_widths_are_refused_before_anything_is_written(tmp_path, pairs):
    with pytest.raises(ValueError, match=r"documents .*expected vectors of shape \[1, 13\], got \[1, 4\]"):
        write(tmp_path / "v", pairs, (bag_of_words, lambda texts: bag_of_words(texts)[:, :4]))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.usefixtures("usual_gc")
def test_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_module, "BLOCK", 64)
    peaks = []
    for size in (200, 1600):
        pairs = tiny_pairs(tmp_path / f"pairs{size}", (size,))
        tracemalloc.start()
        write(tmp_path / f"v{size}", pairs, lambda texts: np.ones((len(texts), 512), np.float32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]  # the larger one's vectors have 3.3 MB


# What an error or a kill leaves.


def test_an_error_keeps_what_is_encoded_and_the_next_run_goes_on(tmp_path, pairs, capsys, monkeypatch):
    monkeypatch.setattr(vectors_module, "BAR_AFTER", 0)
    whole = write(tmp_path / "whole", pairs)
    with pytest.raises(RuntimeError):
        write(tmp_path / "v", pairs, failing(padded_words, after=2 + 10))
    assert not (tmp_path / "v").exists()
    calls = []
    capsys.readouterr()
    write(tmp_path / "v", pairs, noting(padded_words, calls))
    assert sum(map(len, calls[2:])) == 78 - 46  # all queries and two blocks of documents are there
    assert "46/78" in capsys.readouterr().err  # where the bar starts
    assert bytes_of(tmp_path / "v") == bytes_of(whole.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "v", "whole"]


@pytest.mark.parametrize("change", [{"settings": {"width": 3}}, {"name": "other"}, {"encode": bag_of_words}, "pairs"])
def test_blocks_of_other_inputs_or_settings_are_discarded_with_a_warning(tmp_path, pairs, change, caplog):
    with pytest.raises(RuntimeError):
        write(tmp_path / "v", pairs, failing(padded_words, after=2 + 10))
    left = tmp_path / ".v.blocks"
    assert len(list(left.iterdir())) == 10
    if change == "pairs":
        pairs = tiny_pairs(tmp_path / "others", seed=1)
    changed = change if isinstance(change, dict) else {}
    store = write(tmp_path / "v", pairs, **changed)
    assert caplog.text.count("is discarded: of other inputs or settings") == 10
    assert bytes_of(store.directory) == bytes_of(write(tmp_path / "fresh", pairs, **changed).directory)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or altered"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "expected sha256"),
        (lambda file: file.unlink(), "it is missing"),
    ],
)
def test_a_broken_block_is_encoded_again(tmp_path, pairs, damage, reason, caplog):
    with pytest.raises(RuntimeError):
        write(tmp_path / "v", pairs, failing(padded_words, after=2 + 10))
    damage(tmp_path / ".v.blocks" / "documents-5" / "vectors.bin")
    calls = []
    store = write(tmp_path / "v", pairs, noting(padded_words, calls))
    assert "a block is discarded" in caplog.text and reason in caplog.text
    assert sum(map(len, calls[2:])) == 78 - 46 + 5
    assert bytes_of(store.directory) == bytes_of(write(tmp_path / "fresh", pairs).directory)


def test_two_writers_of_one_store_do_not_meet(tmp_path, pairs):
    with StoreWriter(tmp_path / "v", "vectors") as writer:
        writer.append("queries", np.zeros((2, 3)))
        with pytest.raises(ValueError, match="another process is writing it"):
            write(tmp_path / "v", pairs)
        writer.finish({"fingerprint": "first"})
    assert Store.open(tmp_path / "v").fingerprint == "first"
    write(tmp_path / "v", pairs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "v"]


def run(code, *arguments):
    code = f"import sys\nsys.path.insert(0, {TESTS!r})\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


# write(folder, kill_at): a child writes the vectors and kills itself before (where it writes: in the middle of) the
# call number `kill_at` that changes the disk; False if it was killed.
KILLED = """
import os, random, resource, signal
from pathlib import Path
from test_vectors import padded_words
from tiny_pairs import tiny_pairs
from cde_jax.batching import vectors as vectors_module
from cde_jax.data import files, store

def dying(function):
    def counted(*arguments):
        global left
        left -= 1
        if left == 0:
            if function is whole_write:
                function(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted

whole_write, left = files.write_all, 0
files.write_all = dying(files.write_all)
for name in ("fsync", "replace", "rename", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))

def write(folder, kill_at=0):
    global left
    child = os.fork()
    if child == 0:
        left = kill_at
        vectors_module.write_vectors(folder, pairs, padded_words, name="words", settings={})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

folder = Path(sys.argv[1])
vectors_module.BLOCK = int(sys.argv[2])
pairs = store.Store.open(folder / "pairs")
"""


def test_a_kill_at_any_call_that_changes_the_disk_is_made_good(tmp_path, pairs):
    more = """
at = 1
while not write(folder / f"v{at}", at):
    assert not (folder / f"v{at}").exists() or store.Store.open(folder / f"v{at}")
    assert write(folder / f"v{at}")
    at += 1
print(at)
"""
    done = run(KILLED + more, tmp_path, 30)
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    assert calls > 4 * 6  # two blocks of queries and two of documents
    whole = bytes_of(tmp_path / f"v{calls}")
    assert all(bytes_of(tmp_path / f"v{at}") == whole for at in range(1, calls))
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} <= {".pairs.verified.json"}


def test_many_kills_one_after_another_lose_one_block_each(tmp_path, pairs, monkeypatch):
    more = """
random = random.Random(0)
print(next(n for n in range(20) if write(folder / "v", random.randrange(20, 60))))
"""
    done = run(KILLED + more, tmp_path, 9)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    monkeypatch.setattr(vectors_module, "BLOCK", 9)
    assert bytes_of(tmp_path / "v") == bytes_of(write(tmp_path / "whole", pairs).directory)


# Directories that cannot be written.


@pytest.mark.parametrize(("limit", "file", "encoded"), [(200, "vectors.bin", 78), (1000, "v/queries.bin", 0)])
def test_a_full_disk_says_so_and_the_next_run_goes_on(tmp_path, pairs, monkeypatch, limit, file, encoded):
    more = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    vectors_module.write_vectors(folder / "v", pairs, padded_words, name="words", settings=dict())
except OSError as error:
    print(error)
"""
    said = run(KILLED + more, tmp_path, 9).stdout
    assert "free some space" in said and file in said
    monkeypatch.setattr(vectors_module, "BLOCK", 9)
    calls = []
    store = write(tmp_path / "v", pairs, noting(padded_words, calls))
    assert sum(map(len, calls[2:])) == encoded
    assert bytes_of(store.directory) == bytes_of(write(tmp_path / "whole", pairs).directory)


def test_a_read_only_directory_says_so():
    # Root may write anywhere, so the process becomes another user, who cannot enter pytest's own folders.
    code = """
        import os, tempfile
        from cde_jax.data.files import write_json
        from cde_jax.data.store import StoreWriter
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o555)
            if os.getuid() == 0:
                os.seteuid(65534)
            for attempt in (
                lambda: StoreWriter(folder + "/v", "vectors").__enter__(),
                lambda: StoreWriter(folder + "/deep/v", "vectors").__enter__(),
                lambda: write_json(folder + "/config.json", {}),
            ):
                try:
                    attempt()
                except PermissionError as error:
                    print(error)
            os.seteuid(os.getuid())
            os.chmod(folder, 0o755)
    """
    done = run(code)
    assert done.stderr == ""
    assert done.stdout.count("may not write there; choose another directory") == 3
