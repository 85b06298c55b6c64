"""ConTEB's data form and protocol, and truncated BEIR, on sets made here."""

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_evaluate import ANIMALS, OTHERS, SHIPS, embedder

from cde_jax.data.files import read_json
from cde_jax.data.sources import beir
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation.baselines import bm25, candidates, rank_vectors, truncated
from cde_jax.evaluation.beir import rank
from cde_jax.evaluation.conteb import DOCUMENT, LATE, embed_chunks, late_chunks, rank_chunks, read
from cde_jax.evaluation.metrics import ndcg
from cde_jax.interop.write import save_pretrained
from cde_jax.stages.benchmark import evaluate

# Chunks out of order, a document's name with "_" in it; in two files.
CHUNKS = [
    {"chunk_id": "sea_a_1", "chunk": "it sings under deep water"}, {"chunk_id": "mat_0", "chunk": "a cat sat all day"},
    {"chunk_id": "sea_a_0", "chunk": "the grey whale"}, {"chunk_id": "mat_10", "chunk": "on a red mat"},
    {"chunk_id": "mat_2", "chunk": "it was old and grey"},
]  # fmt: skip
QUERIES = [{"query": "song of the whale", "chunk_id": "sea_a_1"}, {"query": "cat on the mat", "chunk_id": "mat_10"}]
ORDER = ["mat_0", "mat_2", "mat_10", "sea_a_0", "sea_a_1"]


def write(folder, chunks=CHUNKS, queries=QUERIES):
    for name, rows in (("documents", chunks), ("queries", queries)):
        (folder / name).mkdir(parents=True)
        for number, part in enumerate((rows[:2], rows[2:])):
            if part:
                parquet.write_table(pyarrow.Table.from_pylist(part), folder / name / f"test-{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*ANIMALS.corpus.values(), *(row["chunk"] for row in CHUNKS)], 100)


def test_chunks_are_read_by_document_and_in_order(tmp_path):
    dataset = read(write(tmp_path / "small"))
    assert (dataset.name, list(dataset.corpus)) == ("small", ORDER)
    assert dataset.queries == {"q0": "song of the whale", "q1": "cat on the mat"}
    assert dataset.qrels == {"q0": {"sea_a_1": 1}, "q1": {"mat_10": 1}}
    several = [{"query": "x", "chunk_ids": ["mat_0", "mat_2"]}]
    assert read(write(tmp_path / "several", queries=several)).qrels == {"q0": {"mat_0": 1, "mat_2": 1}}
    (tmp_path / "small/queries/train-0.parquet").write_bytes(b"not read: another split")
    assert read(tmp_path / "small") == dataset


@pytest.mark.parametrize(
    ("chunks", "queries", "message"),
    [
        ([{"chunk_id": "a", "chunk": "x"}], QUERIES, "expected each chunk_id once, as DOCUMENT_NUMBER, got 'a'"),
        ([*CHUNKS, CHUNKS[0]], QUERIES, "each chunk_id once.*'sea_a_1'"),
        (CHUNKS, [{"query": "x", "chunk_id": "mat_1"}], "query 0 names the chunk 'mat_1', which is in no document"),
        ([{"id": "a_1", "text": "x"}], QUERIES, r"expected the columns \['chunk_id', 'chunk'\]"),
        ([], QUERIES, "expected Parquet files in documents/, found none; copy .* `hf download"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(tmp_path, chunks, queries, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "x", chunks, queries))


@pytest.mark.parametrize("kind", ["joint", "isolated"])
def test_chunks_are_scored_with_their_document_and_with_the_corpus_as_context(kind, tokenizer, tmp_path):
    one, dataset = embedder(kind, tokenizer), read(write(tmp_path / "small"))
    runs = rank_chunks(one, dataset, OTHERS, 3, 100, ["same corpus", "none", DOCUMENT, LATE])
    assert list(runs) == ["same corpus", "none", DOCUMENT, LATE]
    plain = rank(one, [dataset], OTHERS, 3, 100)["small"]
    assert runs["same corpus"] == plain["same corpus"] and runs["none"] == plain["none"]
    documents = [[dataset.corpus[name] for name in names] for names in (ORDER[:3], ORDER[3:])]
    vectors = np.concatenate([one.encode_documents(d, one.embed_context(d, 3)) for d in documents])
    np.testing.assert_array_equal(np.concatenate(embed_chunks(one, documents, 3)), vectors)
    queries = one.encode_queries(dataset.queries.values(), one.embed_context(list(dataset.corpus.values()), 3))
    for query, row in zip(dataset.queries, queries @ vectors.T, strict=True):
        assert runs[DOCUMENT][query] == pytest.approx(dict(zip(ORDER, row.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize("kind", ["joint", "isolated", "biencoder"])
def test_late_chunks_are_means_of_their_tokens_in_their_document(kind, tokenizer):
    one, documents = embedder(kind, tokenizer), [["a cat", "on its mat"], ["old ships"], ["grey"] * 2]
    vectors, model, backend = late_chunks(one, documents), one.model, tokenizer.backend
    pieces = [backend.encode(text, add_special_tokens=False).ids for text in documents[0]]
    first, last = backend.encode("").ids
    ids = jnp.array([[first, *pieces[0], *pieces[1], last]])
    mask = jnp.ones(ids.shape, bool)
    if kind == "biencoder":
        hidden = model.encoder(ids, mask)
    else:
        hidden = model.hidden(ids, mask, model.prepare_context(None))[:, -ids.shape[1] :]
    middle = 1 + len(pieces[0])
    means = jnp.stack([hidden[0, 1:middle].mean(axis=0), hidden[0, middle:-1].mean(axis=0)])
    expected = np.asarray(model.output(means))
    np.testing.assert_allclose(vectors[:2], expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-5)
    alone = late_chunks(one, [["a cat"], ["on its mat"], ["old ships"]])
    assert np.abs(alone[:2] - vectors[:2]).max() > 1e-3  # neighbours count
    np.testing.assert_allclose(alone[2], vectors[2], atol=1e-5)  # other documents do not


def test_a_long_document_is_cut_into_windows_of_whole_chunks(tokenizer):
    one = embedder("biencoder", tokenizer)  # 16 tokens, with [CLS] and [SEP]
    chunk = "old ships sail over deep water"
    size = len(tokenizer.backend.encode(chunk, add_special_tokens=False).ids)
    assert 14 / 3 < size <= 14
    count = 14 // size
    vectors = late_chunks(one, [[chunk] * (count + 1)])
    np.testing.assert_allclose(vectors[-1], late_chunks(one, [[chunk]])[0], atol=1e-5)
    np.testing.assert_allclose(vectors[:count], late_chunks(one, [[chunk] * count]), atol=1e-5)
    assert late_chunks(one, [["cat " * 100]]).shape == (1, 32)


def test_the_command_scores_conteb_sets_and_truncated_beir(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    one = embedder("isolated", tokenizer)
    save_pretrained(one.model, tmp_path / "model", tokenizer=tmp_path / "tokenizer", settings=one.settings)
    for dataset in (ANIMALS, SHIPS):
        beir.write(dataset, tmp_path / dataset.name)
    options = {"kinds": ["corpus", "document", "late", "none"], "first_model": "bm25", "candidates": 2}
    options |= {"data": [str(tmp_path / "animals")], "conteb": [str(write(tmp_path / "small"))]}
    run = lambda: list(evaluate(str(tmp_path / "model"), tmp_path / "out", **options))  # noqa: E731
    text, tasks = run(), read_json(tmp_path / "out/results.json")["tasks"]
    assert list(tasks["small"]) == ["corpus", "none", "document", "late"] and list(tasks["animals"]) == [
        "corpus",
        "none",
    ]
    stored = read_json(tmp_path / "out/candidates/animals.json")
    assert stored["run"] == bm25(ANIMALS, 2) and list(stored["run"]["q1"]) == ["a", "d"]
    smaller = truncated(ANIMALS, stored["run"])
    assert set(smaller.corpus) == {"a", "b", "d"}
    scores = rank(one, [smaller], [], 0, kinds=["none"])["animals"]["none"]
    again = {q: {d: scores[q][d] for d in documents} for q, documents in stored["run"].items()}
    assert tasks["animals"]["none"]["ndcg@10"]["mean"] == pytest.approx(ndcg(again, ANIMALS.qrels))
    assert run() == text
    with pytest.raises(ValueError, match="another model, data or random corpus"):
        options["candidates"] = 1
        run()


def test_candidates_come_from_the_first_model_of_choice_and_are_kept(tmp_path, monkeypatch):
    from cde_jax.batching.surrogate import lsa
    from cde_jax.evaluation import baselines

    file = tmp_path / "c.json"
    encode = lsa(list(ANIMALS.queries.values()), list(ANIMALS.corpus.values()), width=256, seed=0).encode
    found = candidates(ANIMALS, "lsa", 2, file)
    assert found == rank_vectors(ANIMALS, encode, 2) and all(len(documents) == 2 for documents in found.values())
    monkeypatch.setattr(baselines, "lsa", None)
    assert candidates(ANIMALS, "lsa", 2, file) == found
    monkeypatch.setattr(baselines, "sentence_transformer", lambda name: [encode, encode])
    assert candidates(ANIMALS, "some-name", 2, file).keys() == found.keys()
    assert read_json(file)["first_model"] == "some-name"


def test_a_first_model_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no-such-model"):
        candidates(ANIMALS, str(tmp_path / "no-such-model"), 2, tmp_path / "c.json")
