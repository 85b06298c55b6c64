"""Texts of many lengths as chunks of a few: nothing is lost, little is padded, shapes do not change."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cde_jax.batching.layout import choose_layout, choose_lengths, count_lengths, split_by_length, to_chunks
from cde_jax.batching.loader import _sizes
from cde_jax.data.store import Ragged

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).map(np.array)
BATCHES = st.lists(SIZES, min_size=1, max_size=5)


def padded_tokens(sizes, lengths) -> int:
    return int(np.asarray(lengths)[np.searchsorted(lengths, sizes)].sum())


@given(SIZES, st.integers(1, 5))
def test_no_other_choice_of_lengths_pads_less(sizes, most):
    chosen = choose_lengths(np.bincount(sizes), most)
    longest = max(1, int(sizes.max()))
    assert list(chosen) == sorted(set(chosen)) and len(chosen) <= most
    assert chosen[-1] == longest and all(length % 8 == 0 for length in chosen[:-1])
    shorter = range(8, longest, 8)
    others = [(*some, longest) for count in range(most) for some in combinations(shorter, count)]
    assert padded_tokens(sizes, chosen) == min(padded_tokens(sizes, other) for other in others)


@given(BATCHES, st.integers(1, 5), st.integers(0, 100), st.integers(0, 30))
def test_every_text_is_in_one_chunk_that_it_fits_and_only_the_last_has_room_left(batches, most, positions, slots):
    layout = choose_layout(count_lengths(batches), most, positions, slots)
    most_of_any, fullest = np.zeros((2, len(layout.lengths)), int)
    for sizes in batches:
        chunks = list(split_by_length(sizes, layout.lengths, layout.texts))
        assert sorted(row for _, rows in chunks for row in rows.tolist()) == list(range(len(sizes)))
        for k, rows in chunks:
            fullest[k] = max(fullest[k], len(rows))
            assert sizes[rows].max() <= layout.lengths[k]
            assert k == 0 or sizes[rows].max() > layout.lengths[k - 1]
        assert all(layout.chunks)
        assert all(len(rows) == layout.texts[k] for k, rows in chunks[:-1])
        most_of_any = np.maximum(most_of_any, np.bincount([k for k, _ in chunks], minlength=len(most_of_any)))
    assert layout.chunks == tuple(most_of_any) and layout.texts == tuple(fullest)
    if positions:  # a chunk has room for so many, or for the most that any batch puts in one
        limits = [max(1, positions // (length + slots)) for length in layout.lengths]
        assert all(texts <= limit for texts, limit in zip(layout.texts, limits, strict=True))
        several = zip(layout.texts, limits, layout.chunks, strict=True)
        assert all(texts == limit for texts, limit, chunks in several if chunks > 1)


@given(BATCHES, st.integers(2, 5), st.integers(1, 100), st.integers(0, 9), st.sampled_from([1, 2, 3, 8]))
def test_texts_are_found_again_at_their_places(batches, most, tokens, wider, devices):
    texts = max(map(len, batches))
    sizes = np.stack([np.pad(one, (0, texts - len(one))) for one in batches])  # [G, m]
    width = max(1, sizes.max()) + wider
    random = np.random.default_rng(0)
    mask = np.arange(width) < sizes[..., None]
    ids = np.where(mask, random.integers(1, 99, mask.shape), 0).astype(np.int32)
    layout = choose_layout(count_lengths([sizes]), most, tokens)
    parts = [to_chunks(ids[g], mask[g], layout, devices) for g in range(len(ids))]
    held = {
        "ids": [np.stack(x) for x in zip(*(part["ids"] for part in parts), strict=True)],
        "mask": [np.stack(x) for x in zip(*(part["mask"] for part in parts), strict=True)],
        "place": np.stack([part["place"] for part in parts]),
    }
    lengths_of_rows = []
    for k, (length, rows, chunks) in enumerate(zip(*layout, strict=True)):
        chunks = -(-chunks // devices) * devices
        assert held["ids"][k].shape == held["mask"][k].shape == (len(batches), chunks, rows, length)
        assert (held["ids"][k].dtype, held["mask"][k].dtype) == (np.int32, bool)
        lengths_of_rows += [(k, c, r) for c in range(chunks) for r in range(rows)]
    for g in range(len(batches)):
        for m in range(texts):
            k, c, r = lengths_of_rows[held["place"][g, m]]
            found = held["ids"][k][g, c, r][held["mask"][k][g, c, r]]
            assert found.tolist() == ids[g, m][mask[g, m]].tolist()
        assert len(set(held["place"][g].tolist())) == texts
    assert sum(int(m.sum()) for m in held["mask"]) == int(mask.sum())
    for used in (m.any(axis=(2, 3)).reshape(len(batches), devices, -1).sum(axis=2) for m in held["mask"]):
        assert (used.max(axis=1) - used.min(axis=1) <= 1).all()  # devices have about as many chunks of every length


def test_real_looking_lengths_are_padded_by_less_than_fifteen_percent():
    def batches():
        """256 queries and documents, log-normal around 12 and 90 tokens, the documents of a batch somewhat alike."""
        random = np.random.default_rng(1)
        for _ in range(40):
            queries = random.lognormal(np.log(12), 0.4, 256)
            documents = random.lognormal(np.log(random.uniform(60, 120)), 0.5, 256)
            yield np.clip(np.concatenate([queries, documents]), 3, 128).astype(int)

    layout = choose_layout(count_lengths(batches()), 8)
    tokens = sum(int(sizes.sum()) for sizes in batches())
    computed = sum(
        layout.lengths[k] * layout.texts[k]
        for b in batches()
        for k, _ in split_by_length(b, layout.lengths, layout.texts)
    )
    assert 1 - tokens / computed <= 0.15
    plain = 1 - tokens / (40 * 256 * 2 * 128)
    assert plain > 0.4
    room = np.dot(layout.chunks, np.multiply(layout.texts, layout.lengths))
    assert room * 40 < 3 * computed  # what the arrays can hold is not much more than what batches need


@pytest.mark.parametrize(("tokens", "texts"), [(100, (12, 6)), (4, (1, 1))])
def test_a_chunk_holds_as_many_texts_as_fit_its_tokens(tokens, texts):
    batches = [np.repeat([3, 8, 16], 15)]
    assert choose_layout(count_lengths(batches), 2, tokens).texts == texts


def test_a_chunk_counts_the_slots_that_joint_attention_runs_with_every_text():
    """The paper's large setting: 64 texts of 512 tokens beside 512 documents and 8 learned tokens."""
    counted, slots = count_lengths([np.repeat([16, 512], 5000)]), 520
    layout = choose_layout(counted, 2, 64 * (512 + slots), slots)
    assert layout.lengths == (16, 512) and layout.texts == (123, 64)
    positions = np.multiply(layout.texts, np.add(layout.lengths, slots))
    assert positions.max() <= 64 * (512 + slots)
    assert choose_layout(counted, 2, 64 * 512).texts == (2048, 64)  # isolated: slots are keys only


@pytest.mark.parametrize(("texts", "tokens"), [(20, 80), (280, 746), (1000, 1024), (10_000, 5000)])
def test_left_alone_a_chunk_is_a_share_of_a_plan_batch_neither_tiny_nor_most_of_it(texts, tokens):
    (length,), (held,), _ = choose_layout(count_lengths([np.full(texts, 16)] * 3), 1)
    assert (length, held) == (16, tokens // 16)


def test_a_chunk_is_smaller_where_many_lengths_each_leave_half_of_one_empty():
    batches = [np.repeat([16, 32, 48, 64], 100)] * 3
    assert choose_layout(count_lengths(batches), 1).texts == (1024 // 64,)
    assert choose_layout(count_lengths(batches), 4).texts == (41, 20, 13, 10)  # 16,000 / (6 · 4) = 666 positions


def test_the_first_text_has_its_length_and_a_missing_one_has_none():
    tokens = Ragged(np.arange(9, dtype=np.uint16), np.array([0, 5, 9]))
    np.testing.assert_array_equal(_sizes(tokens, np.array([0, -1, 1])), [5, 0, 4])
