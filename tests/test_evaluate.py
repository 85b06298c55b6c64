import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.batching.surrogate import lsa
from cde_jax.data.files import read_json, write_json
from cde_jax.data.sources import beir
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import beir as evaluation
from cde_jax.evaluation.baselines import bm25, evaluate_baselines, rank_vectors
from cde_jax.evaluation.beir import rank, read_tokens, write_tokens
from cde_jax.evaluation.metrics import Scores, mean_over_sets, ndcg, ndcg_per_query, score_rankings, table
from cde_jax.evaluation.validation import validate
from cde_jax.interop.read import TextSettings
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.retrieval.embedder import Embedder

ANIMALS = EvaluationSet(
    "animals",
    {"q1": "grey whale song", "q2": "cat on the mat", "q3": "zebra"},
    {
        "a": "the song of a grey whale under water",
        "b": "a cat sat on its mat all day",
        "c": "old ships sail over deep water",
        "d": "grey paint for old ships",
    },
    {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}},
)
SHIPS = EvaluationSet(
    "ships", {"1": "old ships"}, {f"s{i}": f"ships of year {i} sail" for i in range(8)}, {"1": {"s3": 1}}
)


def test_ndcg_of_a_known_ranking():
    qrels = {"q": {"a": 3, "b": 1, "c": 0, "e": 2}}
    run = {"q": {"b": 0.9, "x": 0.8, "a": 0.7, "c": 0.6}}  # e is not found
    gained = 1 / math.log2(2) + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(run, qrels) == pytest.approx(gained / ideal)


def test_ndcg_looks_at_the_first_k_only():
    run = {"q": {f"x{i}": 100.0 - i for i in range(10)} | {"a": 1.0}}
    assert ndcg(run, {"q": {"a": 1}}, k=10) == 0.0
    assert ndcg(run, {"q": {"a": 1}}, k=11) == pytest.approx(1 / math.log2(12))


def test_queries_without_a_ranking_score_zero_and_those_without_a_relevant_document_do_not_count():
    qrels = {"not run": {"a": 1}, "q": {"a": 1}, "empty": {"a": 1}, "nothing relevant": {"a": 0}}
    run = {"q": {"a": 1.0}, "empty": {}, "without qrels": {"b": 1.0}}
    scores = ndcg_per_query(run, qrels)
    assert list(scores.items()) == [("not run", 0.0), ("q", 1.0), ("empty", 0.0)]
    assert ndcg(run, qrels) == pytest.approx(1 / 3)


def test_qrels_without_a_relevant_document_are_an_error():
    with pytest.raises(ValueError, match="none of the 1 queries"):
        ndcg({"q": {"a": 1.0}}, {"q": {"a": 0}})


def test_bm25_finds_words_and_ranks_nothing_by_chance():
    # q1 and q2 are found first; no document has the word of q3, so that one is not found at all.
    run = bm25(ANIMALS)
    assert [list(run[query]) for query in ANIMALS.queries] == [["a", "d"], ["b"], []]
    assert list(bm25(ANIMALS, k=1)["q1"]) == ["a"]


def test_bm25_follows_its_formula():
    """Two documents hold the word, one twice: Lucene's BM25 with k1 = 1.2 and b = 0.75 decides the order."""
    for filler, first in ((1, "twice"), (40, "once")):  # more words: the long document loses
        corpus = {"twice": "whale whale" + " word" * filler, "once": "whale song", "none": "ships sail"}
        one = EvaluationSet("s", {"q": "whale"}, corpus, {"q": {first: 1}})
        mean = sum(len(text.split()) for text in corpus.values()) / 3
        score = {
            name: tf / (tf + 1.2 * (0.25 + 0.75 * len(corpus[name].split()) / mean))
            for name, tf in (("twice", 2), ("once", 1))
        }
        assert max(score, key=score.get) == first
        assert next(iter(bm25(one)["q"])) == first


def test_bm25_of_a_corpus_without_words_ranks_nothing():
    assert bm25(EvaluationSet("s", {"q": "whale"}, {"a": "?", "b": "!"}, {"q": {"a": 1}})) == {}


def test_vectors_are_ranked_by_cosine():
    vectors = {
        **dict(zip(ANIMALS.corpus.values(), 7.0 * np.eye(4), strict=True)),
        **dict(zip(ANIMALS.queries.values(), np.eye(4)[[0, 1, 3]] + 0.1, strict=True)),
    }
    # q3 points at d; its relevant c and the other two share the next score
    run = rank_vectors(ANIMALS, lambda texts: np.stack([vectors[text] for text in texts]))
    tied = 1 / math.log2(3)  # equal scores: by document id, greatest first
    assert ndcg_per_query(run, ANIMALS.qrels) == pytest.approx({"q1": 1, "q2": 1, "q3": tied})
    assert max(run["q1"].values()) == pytest.approx(1.1 / np.hypot(1.1, np.sqrt(3) * 0.1))


def test_lsa_is_a_vectors_baseline_and_a_text_of_unknown_words_harms_nothing():
    encode = lsa(list(ANIMALS.queries.values()), list(ANIMALS.corpus.values()), width=3, seed=0).encode
    results = evaluate_baselines([ANIMALS, SHIPS], {"LSA": encode}).means
    assert list(results["animals"]) == ["BM25", "LSA"]
    assert results["animals"]["LSA"] > 0.6
    assert results["animals"]["BM25"] == pytest.approx(2 / 3) != results["ships"]["BM25"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*ANIMALS.corpus.values(), *ANIMALS.queries.values()], 100)


def embedder(kind, tokenizer, **changes):
    encoder = EncoderConfig(vocab_size=100, width=32, layers=2, heads=2, mlp_width=48)

    def make():
        if kind == "biencoder":
            return Biencoder(BiencoderConfig(encoder), rngs=nnx.Rngs(0))
        first = BiencoderConfig(encoder, head=True)
        config = ContextualConfig(first, encoder, context_size=4, context_attention=kind, **changes)
        return ContextualEncoder(config, rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    model = nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), state))
    return Embedder(model, tokenizer, TextSettings("", "", 16, 16), "unused", progress=False)


def evaluate(model, sets, others, seed, k=10):
    return score_rankings(rank(model, sets, others, seed, k), sets, k)


OTHERS = ["deep water", "a day of rain", "paint", "old song", "the cat"]


@pytest.mark.parametrize("kind", ["joint", "isolated"])
def test_a_contextual_model_is_scored_under_each_kind_of_context(kind, tokenizer):
    one = embedder(kind, tokenizer)
    results = evaluate(one, [ANIMALS, SHIPS], OTHERS, seed=3).means
    kinds = ["same corpus", "random training documents", "none"]
    written = ["same corpus", "same corpus, whitened", "same corpus, statistics", *kinds[1:]]
    assert {name: list(row) for name, row in results.items()} == {"animals": written, "ships": written}
    contexts = (one.embed_context(list(SHIPS.corpus.values()), 3), one.embed_context(OTHERS, 3), None)
    for kind_of_context, context in zip(kinds, contexts, strict=True):
        scores = one.encode_queries(["old ships"], context) @ one.encode_documents(SHIPS.corpus.values(), context).T
        run = {"1": dict(zip(SHIPS.corpus, scores[0].astype(float), strict=True))}
        assert results["ships"][kind_of_context] == pytest.approx(ndcg(run, SHIPS.qrels))
    assert results == evaluate(one, [ANIMALS, SHIPS], OTHERS, seed=3).means
    assert validate(one, [SHIPS], 3, 10, batch_size=8, temperature=0.02)["score"] == results["ships"]["same corpus"]


def test_kinds_of_context_that_cannot_be_had_are_left_out(tokenizer):
    biencoder = embedder("biencoder", tokenizer)
    found = evaluate(biencoder, [SHIPS], OTHERS, seed=0).means["ships"]
    assert list(found) == ["none", "same corpus, whitened", "same corpus, statistics"]
    assert validate(biencoder, [SHIPS], 0, 10, batch_size=8, temperature=0.02)["score"] == found["none"]
    without_null = embedder("joint", tokenizer, null_embedding=False)
    assert list(rank(without_null, [SHIPS], [], seed=0)["ships"]) == [
        "same corpus",
        "same corpus, whitened",
        "same corpus, statistics",
    ]


@pytest.mark.parametrize("kind", ["biencoder", "isolated"])
def test_the_whitened_kind_is_what_users_get_from_a_corpus_alone(kind, tokenizer, monkeypatch):
    one, seeds = embedder(kind, tokenizer), []
    dataset = dataclasses.replace(ANIMALS, corpus={name: f"1 x_1 {text}" for name, text in ANIMALS.corpus.items()})
    corpus = list(dataset.corpus.values())
    context = one.embed_context(corpus, 3, queries=pseudo_queries(corpus, 3))
    assert np.abs(context.whitening.query_mean - context.whitening.document_mean).max() > 2e-3
    scores = one.encode_queries(dataset.queries.values(), context) @ one.encode_documents(corpus, context).T
    monkeypatch.setattr(evaluation, "pseudo_queries", lambda *args: seeds.append(args[1]) or pseudo_queries(*args))
    run = rank(one, [dataset], [], seed=3)["animals"]["same corpus, whitened"]
    assert seeds == [3]
    for query, row in zip(dataset.queries, scores, strict=True):
        assert run[query] == pytest.approx(dict(zip(dataset.corpus, row.tolist(), strict=True)), abs=1e-5)


def test_two_sets_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="more than once: ships"):
        evaluate_baselines([SHIPS, SHIPS])


def test_a_token_set_has_prefixes_lengths_and_pseudo_queries_of_the_seed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pseudo_queries", lambda corpus, seed: [f"{text} water" for text in corpus[:seed]])
    write_tokens(ANIMALS, tmp_path / "set", tokenizer, TextSettings("song ", "paint ", 5, 8), seed=2)
    dataset, corpus = read_tokens(tmp_path / "set"), list(ANIMALS.corpus.values())
    for tokens, texts, length in (
        (dataset.queries.values(), ["song " + text for text in ANIMALS.queries.values()], 5),
        (dataset.corpus.values(), ["paint " + text for text in corpus], 8),
        (dataset.pseudo_queries, [f"song {text} water" for text in corpus[:2]], 5),
    ):
        assert [ids.tolist() for ids in tokens] == [ids.tolist() for ids in tokenizer.encode(texts, length)]
    assert list(dataset.queries) == list(ANIMALS.queries) and list(dataset.corpus) == list(ANIMALS.corpus)
    assert dataset.qrels == ANIMALS.qrels and dataset.texts == ANIMALS


def test_token_ids_are_scored_as_the_texts_are_without_a_tokenizer(tokenizer, tmp_path):
    texts = embedder("isolated", tokenizer)
    tokens = Embedder(texts.model, None, texts.settings, progress=False)
    write_tokens(ANIMALS, tmp_path / "animals", tokenizer, texts.settings, seed=3)
    dataset = read_tokens(tmp_path / "animals")
    assert (dataset.name, dataset.qrels) == (ANIMALS.name, ANIMALS.qrels)
    expected = rank(texts, [ANIMALS], OTHERS, seed=3)
    rankings = rank(tokens, [dataset], tokenizer.encode(OTHERS, 16), seed=3)
    assert rankings.keys() == expected.keys() and rankings["animals"].keys() == expected["animals"].keys()
    # The lexical part uses token embeddings, for which it needs the tokenizer.
    lexical = rank(texts, [dataset], [], seed=3, kinds=["same corpus, statistics"])["animals"]
    assert lexical.keys() < expected["animals"].keys()
    runs = rankings["animals"] | lexical
    for kind, run in expected["animals"].items():
        for query, documents in run.items():
            assert runs[kind][query] == pytest.approx(documents, abs=1e-5), kind
    with pytest.raises(ValueError, match="expected token ids, got texts: this embedder has no tokenizer"):
        tokens.encode_queries(["a text"])


def test_rankings_are_scored_later_from_their_file(tokenizer, tmp_path):
    model = embedder("biencoder", tokenizer)
    write_json(tmp_path / "rankings.json", rank(model, [ANIMALS, SHIPS], [], seed=0, k=3))
    rankings = read_json(tmp_path / "rankings.json")
    assert all(len(documents) == 3 for documents in rankings["ships"]["none"].values())
    assert score_rankings(rankings, [SHIPS, ANIMALS], k=3) == evaluate(model, [ANIMALS, SHIPS], [], seed=0, k=3)


def test_each_kind_of_context_is_sampled_by_the_seed_and_ranked_to_the_cutoff(tokenizer, monkeypatch):
    model, seeds, kinds = embedder("isolated", tokenizer), [], []
    embed_context = model.embed_context
    monkeypatch.setattr(
        model, "embed_context", lambda *args, **more: seeds.append(args[1]) or embed_context(*args, **more)
    )

    def search(queries, documents, k):
        kinds.append((len(queries), len(documents), k))
        return evaluation_search(queries, documents, k)

    evaluation_search = evaluation.search
    monkeypatch.setattr(evaluation, "search", search)
    evaluate(model, [ANIMALS], OTHERS, seed=7, k=2)
    assert seeds == [7, 7] and kinds == [(3, 4, 2)] * 5


SCORES = Scores(10, {
    "animals": {"none": {"a": 0.25, "b": 0.75}, "BM25": {"a": 1.0, "b": 1 / 3}},
    "ships": {"none": {"c": 0.25}},
})  # fmt: skip


def test_scores_have_means_over_queries_and_over_the_sets_that_a_kind_is_complete_on(tmp_path):
    assert SCORES.means == {"animals": {"none": 0.5, "BM25": pytest.approx(2 / 3)}, "ships": {"none": 0.25}}
    assert mean_over_sets(SCORES.means) == {"none": 0.375}
    write_json(tmp_path / "per_query.json", SCORES.to_json())
    assert Scores.from_json(read_json(tmp_path / "per_query.json")) == SCORES


def test_scores_merge_set_by_set_at_one_cutoff():
    merged = Scores(10, {"animals": {"none": {"a": 0.5}}}).merged(
        Scores(10, {"ships": {"x": {"c": 1.0}}, "animals": {}})
    )
    assert merged.per_query == {"animals": {"none": {"a": 0.5}}, "ships": {"x": {"c": 1.0}}}
    assert list(Scores(10, {"s": {"a": {}}}).merged(Scores(10, {"s": {"b": {}}})).per_query["s"]) == ["a", "b"]
    with pytest.raises(ValueError, match="one cutoff, got NDCG@10 and NDCG@5"):
        SCORES.merged(Scores(5, {}))


def test_a_table_has_a_row_a_set_and_a_column_a_kind():
    assert table(SCORES.means | {"[b]x": {"none": 1.0}}, "NDCG@5").splitlines() == [
        "| NDCG@5  |  none |  BM25 |",
        "|---------|-------|-------|",
        "| animals | 0.500 | 0.667 |",
        "| ships   | 0.250 |     – |",
        "| [b]x    | 1.000 |     – |",
        "| mean    | 0.583 |     – |",
    ]


@pytest.mark.parametrize(("name", "expected"), [("cranfield", 0.360), ("medline", 0.672), ("cosqa", 0.295)])
def test_bm25_gives_the_published_figures_of_real_sets(name, expected):
    dataset = beir.read(shared(f"data/eval/{name}"))
    assert ndcg(bm25(dataset), dataset.qrels) == pytest.approx(expected, abs=0.005)
