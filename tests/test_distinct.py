"""First occurrences and distinct texts through the disk: the plain definition's answer, in memory that stays flat."""

import os
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.data import distinct
from cde_jax.data.distinct import DistinctTexts, combine_keys, first_occurrence, number_by_appearance, on_disk
from cde_jax.data.texts import text_key

KEYS = st.lists(st.integers(0, 12) | st.sampled_from([2**64 - 1, 2**63, 2**40]), max_size=60)


@settings(deadline=None)
@given(keys=KEYS, bucket=st.sampled_from([1, 2, 7, 64]))
def test_rows_find_the_first_with_their_key(tmp_path_factory, keys, bucket):
    folder = tmp_path_factory.mktemp("keys")
    array = np.array(keys, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_BUCKET", bucket)
        first, numbers = first_occurrence(array, folder), number_by_appearance(array, folder)
    assert first.tolist() == [keys.index(key) for key in keys]
    different = list(dict.fromkeys(keys))
    assert numbers.tolist() == [different.index(key) for key in keys]
    assert os.listdir(folder) == []


def test_memory_does_not_grow_with_the_rows_nor_with_one_key_in_most_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(distinct, "_BUCKET", 1 << 12)

    def peak(rows, repeated):
        keys = np.random.default_rng(0).integers(0, 2**63, 1 << 12).astype(np.uint64)

        def block(i):
            combined = combine_keys(keys, np.full(len(keys), 0 if repeated else i, np.uint64))
            return combined if not repeated else np.where(keys % np.uint64(8) == 0, combined, keys[0])

        stored = on_disk(map(block, range(rows >> 12)), tmp_path, np.uint64)
        tracemalloc.start()
        numbers = number_by_appearance(stored, tmp_path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, len(np.unique(numbers))

    small, large = peak(1 << 15, False), peak(1 << 18, False)
    assert (small[1], large[1]) == (1 << 15, 1 << 18)
    assert large[0] < 1.5 * small[0]
    small, large = peak(1 << 15, True), peak(1 << 18, True)
    assert large[1] < 1 << 10 and large[0] < 1.5 * small[0]


def test_numbers_on_disk_are_read_only_and_stay_after_their_file_is_closed(tmp_path):
    assert on_disk([], tmp_path / "made", np.int64).tolist() == []
    array = on_disk([np.arange(3), np.arange(2, dtype=np.int32).reshape(1, 2)], tmp_path / "made", np.int64)
    assert os.listdir(tmp_path / "made") == []
    assert array.tolist() == [0, 1, 2, 0, 1]
    for numbers in (array, first_occurrence(array.astype(np.uint64), tmp_path)):
        with pytest.raises(ValueError, match="read-only"):
            numbers[0] = 1


def test_two_keys_combine_into_one_that_differs_where_one_of_them_does():
    left, right = np.meshgrid(*[np.arange(300, dtype=np.uint64)] * 2)
    assert len(np.unique(combine_keys(left.ravel(), right.ravel()))) == 300 * 300


ROWS = st.lists(
    st.lists(st.tuples(st.sampled_from(["", "p: "]), st.sampled_from(["a", "A.", "b", "c", "d e"])), max_size=4)
)


@settings(deadline=None)
@given(rows=ROWS, bucket=st.sampled_from([1, 5, 1000]), part=st.integers(1, 5))
def test_texts_are_kept_once_by_group_and_rows_point_to_them(tmp_path_factory, rows, bucket, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_BUCKET", bucket)
        patch.setattr(distinct, "_BLOCK", part)
        with DistinctTexts(tmp_path_factory.mktemp("texts")) as texts:
            for start in range(0, len(rows), part):
                texts.add(rows[start : start + part])
            read = [(row.tolist(), new) for row, new in texts.rows()]
    expected = {}
    for group, text in (entry for row in rows for entry in row):
        expected.setdefault((group, text_key(text)), (group, text))
    assert [entry for _, new in read for entry in new] == list(expected.values())
    places = {key: i for i, key in enumerate(expected)}
    assert [row for row, _ in read] == [
        list(dict.fromkeys(places[group, text_key(text)] for group, text in row)) for row in rows
    ]


@pytest.mark.parametrize(
    "call",
    [
        "number_by_appearance(keys, folder)",
        "on_disk([np.arange(6000)], folder, np.int64)",
        "texts.add([[('', 'x' * 50_000)]])",
    ],
)
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, call):
    code = f"""
        import resource, sys
        import numpy as np
        from cde_jax.data.distinct import DistinctTexts, number_by_appearance, on_disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        keys, folder = np.arange(6000, dtype=np.uint64), sys.argv[1]
        try:
            with DistinctTexts(folder) as texts:
                {call}
        except OSError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert "free some space" in done.stdout and str(tmp_path) in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []
