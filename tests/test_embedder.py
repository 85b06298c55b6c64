import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cde_jax.adapters.adder import Adapter
from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.adapters.whitening import whitening
from cde_jax.config import AdapterSettings
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.read import TextSettings
from cde_jax.interop.reference_model import ReferenceBiencoderConfig
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.retrieval import embedder as embedder_file
from cde_jax.retrieval import encode
from cde_jax.retrieval.embedder import Context, Embedder
from cde_jax.retrieval.encode import as_texts, batches, padded_lengths

TEXT = "the cat sat on a mat while seven grey whales sang deep songs of cold water and old ships"
WORDS = TEXT.split(" ")
SETTINGS = TextSettings(query_prefix="query: ", document_prefix="document: ", query_length=16, document_length=24)
J = 6


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT, "query: document:"], 120)


def texts(n, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(n)]


CORPUS = texts(20)
FEW = ["the cat sat", "cold old water"]  # of few different lengths: each is compiled in the text-by-text reference


def build_model(kind, seed=0, **changes):
    encoder = EncoderConfig(vocab_size=120, width=32, layers=2, heads=2, mlp_width=48, **changes.pop("encoder", {}))
    first = BiencoderConfig(encoder, head=True)
    if "tokens_per_document" in changes:
        first = ReferenceBiencoderConfig(encoder, head=True, tokens_per_document=changes.pop("tokens_per_document"))
    if kind == "biencoder":
        return fill(lambda: Biencoder(BiencoderConfig(encoder), rngs=nnx.Rngs(0)), seed)
    changes = {"context_size": J, "soft_prompt": 2} | changes
    first = first if changes["context_size"] else None
    config = ContextualConfig(first_stage=first, second_stage=encoder, context_attention=kind, **changes)
    return fill(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0)), seed)


def fill(make, seed):
    """Weights far larger than the initial ones, so that attention is not uniform and context moves the vectors."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.2, leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def cached_model(kind):
    return build_model(kind)


@pytest.fixture(params=["joint", "isolated", "biencoder"])
def embedder(request, tokenizer):
    return build(request.param, tokenizer)


@pytest.fixture(params=["joint", "isolated"])
def contextual(request, tokenizer):
    return build(request.param, tokenizer)


def build(kind, tokenizer, model=None, settings=SETTINGS):
    return Embedder(model or cached_model(kind), tokenizer, settings, "unused", progress=False)


def context_of(embedder, corpus=CORPUS, seed=0):
    return embedder.embed_context(corpus, seed) if embedder.contextual else None


def one_by_one(embedder, model, prefix, length, documents, context):
    """The model called directly: one text at a time, without padding or buckets."""
    vectors = []
    embed = jax.jit(lambda ids, mask: model.embed(ids, mask, context))
    for ids in embedder.tokenizer.encode([prefix + text for text in documents], length):
        vector = np.asarray(embed(ids[None], np.ones((1, len(ids)), bool)))[0]
        vectors.append(vector / np.linalg.norm(vector))
    return np.stack(vectors)


def test_vectors_are_float32_unit_norm_and_in_the_order_of_the_texts(embedder):
    context = context_of(embedder)
    vectors = embedder.encode_documents(CORPUS, context)
    assert vectors.dtype == np.float32 and vectors.shape == (20, 32) == (20, embedder.width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    order = np.random.default_rng(1).permutation(20)
    shuffled = embedder.encode_documents([CORPUS[i] for i in order], context)
    np.testing.assert_allclose(shuffled, vectors[order], atol=1e-5)


def test_vectors_are_those_of_the_model_called_text_by_text(embedder):
    model, context = embedder.model, context_of(embedder)
    raw = None if context is None else jnp.asarray(context.vectors)
    queries = [FEW[0], TEXT]  # the second is cut
    expected = one_by_one(embedder, model, "query: ", 16, queries, raw)
    np.testing.assert_allclose(embedder.encode_queries(queries, context), expected, atol=1e-5)
    expected = one_by_one(embedder, model, "document: ", 24, [TEXT], raw)
    np.testing.assert_allclose(embedder.encode_documents([TEXT], context), expected, atol=1e-5)


def test_vectors_do_not_depend_on_batch_or_padded_length(embedder, monkeypatch):
    context = context_of(embedder)
    vectors = embedder.encode_documents(CORPUS, context)
    monkeypatch.setattr(encode, "SHORTEST", 64)  # every text padded to the document length
    monkeypatch.setitem(encode.TOKENS_PER_BATCH, "cpu", 1)  # and batches of the smallest size
    monkeypatch.setattr(encode, "BLOCK", 7)
    np.testing.assert_allclose(embedder.encode_documents(CORPUS, context), vectors, atol=1e-5)


def test_all_local_devices_give_the_vectors_of_one(embedder, tokenizer):
    one = Embedder(embedder.model, tokenizer, SETTINGS, progress=False, devices=jax.local_devices()[3:4])
    context = context_of(one)
    assert context_of(embedder) is None or np.abs(context.vectors - context_of(embedder).vectors).max() < 1e-6
    for count in (1, 20, 131):  # no multiple of 8 devices
        some = texts(count, seed=count)
        np.testing.assert_allclose(
            embedder.encode_documents(some, context), one.encode_documents(some, context), atol=1e-6
        )
    assert [len(x.sharding.device_set) for x in (one._state, embedder._state) for x in jax.tree.leaves(x)[:1]] == [1, 8]


def test_each_device_computes_its_rows_and_communicates_nothing(contextual):
    cache = contextual._cache(contextual.embed_context(CORPUS))
    ids = np.zeros((64, 16), np.int32)
    arguments = contextual._graph, contextual._mesh, contextual._state, cache, ids, ids == 0
    compiled = embedder_file._embed.lower(*arguments).compile()
    assert len(compiled.output_shardings.device_set) == 8
    assert compiled.output_shardings.shard_shape((64, 32)) == (8, 32)
    assert not re.findall("all-reduce|all-gather|collective|all-to-all", compiled.as_text())


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_a_stream_gives_the_same_vectors_in_order_and_reads_few_blocks_ahead(embedder, side, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 2)  # 16 texts on 8 devices
    read, some = [], texts(155)
    stream = embedder.encode_stream((read.append(text) or text for text in some), context_of(embedder), side=side)
    first = next(stream)
    assert len(first) == 16 and len(read) <= 5 * 16  # its own, two on the devices, one tokenized, one read
    whole = embedder.encode_queries if side == "queries" else embedder.encode_documents
    blocks = [first, *stream]
    assert [len(block) for block in blocks] == [16] * 9 + [11]
    np.testing.assert_array_equal(np.concatenate(blocks), whole(some, context_of(embedder)))


def test_a_stream_has_the_lexical_part_too(contextual, monkeypatch):
    context = contextual.embed_context(CORPUS, queries=ASKED, statistics=CorpusStatistics.fit(CORPUS))
    expected = contextual.encode_documents(CORPUS, context)
    monkeypatch.setattr(encode, "BLOCK", 1)
    vectors = np.concatenate(list(contextual.encode_stream(iter(CORPUS), context)))
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert [x.shape for x in contextual.encode_stream([], context)] == [(0, 64)]


def test_what_is_wrong_in_a_stream_is_an_error_where_it_stands(contextual, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 2)
    with pytest.raises(ValueError, match="documents: expected a list of texts, got a single one, 'one text'"):
        contextual.encode_stream("one text")
    with pytest.raises(ValueError, match="side: expected 'queries' or 'documents', got 'both'"):
        contextual.encode_stream(CORPUS, side="both")
    with pytest.raises(ValueError, match="documents from 16 on: expected a list of texts, got int as item 1: 7"):
        list(contextual.encode_stream(iter([*CORPUS[:17], 7])))


def test_batches_are_smaller_where_slots_are_in_every_sequence(embedder, monkeypatch):
    seen, full_batch = [], encode.full_batch
    monkeypatch.setattr(
        encode, "full_batch", lambda length, slots: seen.append(slots) or full_batch(length, slots=slots)
    )
    embedder.encode_queries(FEW, context_of(embedder))
    joint = embedder.contextual and embedder.config.context_attention == "joint"
    assert seen[-1] == (J + 2 if joint else 0)
    assert full_batch(16, slots=0) == 128 > full_batch(16, slots=J + 2) == 64 > full_batch(16, slots=4096) == 8


def test_the_order_of_the_context_does_not_matter(contextual):
    context = contextual.embed_context(CORPUS)
    turned = Context(context.vectors[::-1].copy(), 0, 20, context.weights, context.documents)
    vectors = contextual.encode_documents(CORPUS, context)
    np.testing.assert_allclose(contextual.encode_documents(CORPUS, turned), vectors, atol=1e-5)


def test_the_context_moves_the_vectors(contextual):
    here = contextual.encode_queries(CORPUS, contextual.embed_context(CORPUS))
    there = contextual.encode_queries(CORPUS, contextual.embed_context(texts(20, seed=9)))
    nowhere = contextual.encode_queries(CORPUS)
    for other in (there, nowhere):
        assert np.abs(here - other).max() > 1e-3


def test_a_context_samples_the_corpus_without_replacement_by_its_seed(contextual):
    first, again, other = (contextual.embed_context(CORPUS, seed) for seed in (0, 0, 1))
    assert first.vectors.shape == (J, 32) and first.corpus_size == 20
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert first.documents == again.documents != other.documents
    everything = contextual.embed_context(list(dict.fromkeys(CORPUS))[:J], seed=3).vectors
    assert len(np.unique(everything.round(4), axis=0)) == J  # each document once


def test_the_fingerprint_of_a_context_covers_all_sampled_documents_in_any_order(tokenizer):
    embedder, corpus = build("isolated", tokenizer), CORPUS[:J]
    fingerprint = embedder.embed_context(corpus).documents
    assert fingerprint == embedder.embed_context(corpus[::-1], seed=1).documents
    assert fingerprint != embedder.embed_context([corpus[0].swapcase(), *corpus[1:]]).documents
    assert fingerprint != embedder.embed_context(corpus, queries=ASKED).documents


def test_context_vectors_are_those_of_the_first_stage(contextual):
    corpus = [*FEW, *FEW, *FEW]
    context = contextual.embed_context(corpus)
    drawn = np.random.default_rng(0).choice(J, J, replace=False)
    embed = jax.jit(contextual.model.embed_context)
    for row, i in zip(context.vectors, drawn, strict=True):
        (ids,) = contextual.tokenizer.encode(["document: " + corpus[i]], 24)
        expected = embed(ids[None], np.ones((1, len(ids)), bool))[0]
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_a_corpus_smaller_than_the_context_leaves_null_slots(contextual):
    context = contextual.embed_context(CORPUS[:2])
    assert context.vectors.shape == (2, 32)
    model = contextual.model
    slots = jnp.concatenate([context.vectors, jnp.broadcast_to(model.null[...], (J - 2, 32))])
    expected = one_by_one(contextual, model, "query: ", 16, FEW, slots)
    np.testing.assert_allclose(contextual.encode_queries(FEW, context), expected, atol=1e-5)


def test_weights_without_null_embedding_need_a_whole_context(tokenizer):
    embedder = build("joint", tokenizer, build_model("joint", null_embedding=False))
    assert not embedder.works_without_context
    with pytest.raises(ValueError, match=r"6 context documents, got a corpus of 2"):
        embedder.embed_context(CORPUS[:2])
    assert len(embedder.embed_context(CORPUS[:J]).vectors) == J
    with pytest.raises(ValueError, match="no null embedding"):
        embedder.encode_queries(["a cat"])


def test_imported_models_may_give_several_slots_a_document(tokenizer):
    embedder = build("joint", tokenizer, build_model("joint", tokens_per_document=2))
    context = embedder.embed_context(CORPUS[:3])
    assert context.vectors.shape == (6, 32)
    (ids,) = embedder.tokenizer.encode(["document: " + CORPUS[2]], 24)
    at = list(np.random.default_rng(0).choice(3, 3, replace=False)).index(2)
    mask = np.arange(24) < len(ids)  # the reference's pieces are of the text padded to its full length
    expected = jax.jit(embedder.model.embed_context)(np.pad(ids, (0, 24 - len(ids)))[None], mask[None])
    np.testing.assert_allclose(context.vectors[2 * at : 2 * at + 2], expected, atol=2e-5)
    assert embedder.encode_queries(["a cat"], context).shape == (1, 32)


def test_a_biencoder_reads_no_context(tokenizer):
    embedder = build("biencoder", tokenizer)
    assert embedder.encode_queries(["a cat"]).shape == (1, 32) and embedder.works_without_context
    with pytest.raises(ValueError, match="a biencoder reads no context"):
        embedder.embed_context(CORPUS)
    context = build("joint", tokenizer).embed_context(CORPUS)
    with pytest.raises(ValueError, match="a biencoder reads no context"):
        embedder.encode_queries(["a cat"], context)


def test_no_texts_give_no_vectors_and_an_empty_corpus_is_an_error(contextual):
    assert contextual.encode_queries([], contextual.embed_context(CORPUS)).shape == (0, 32)
    with pytest.raises(ValueError, match="at least one text, got none among 0"):
        contextual.embed_context([])


def test_an_empty_text_is_a_text_of_special_tokens(tokenizer):
    settings = TextSettings(query_length=16, document_length=16)
    vectors = build("isolated", tokenizer, settings=settings).encode_queries(["", "a cat"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_a_text_without_any_token_is_an_error_that_gives_its_index(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bare = Tokenizer.train([TEXT, "query: document:"], 120)
    bare.backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    bare = Tokenizer(bare.backend, bare.specials)
    embedder = build("biencoder", bare, settings=TextSettings(query_length=16, document_length=16))
    with pytest.raises(ValueError, match=r"1 texts have no token at all \(first: index 1\)"):
        embedder.encode_queries(["a cat", "", "water"])


@pytest.mark.parametrize(
    "wrong",
    ["one text", b"bytes", {"id": "text"}, {"a", "b"}, 7, None, np.eye(2), [b"a"], ["a", 5], ["a", None], [["a"]]],
)
def test_anything_but_a_list_of_texts_is_an_error(wrong):
    with pytest.raises(ValueError, match="corpus: expected a list of texts, got"):
        as_texts(wrong, "corpus")


def test_lists_tuples_generators_and_arrays_of_strings_are_lists_of_texts():
    for good in (["a", "b"], ("a", "b"), (c for c in "ab"), np.array(["a", "b"]), {"x": "a", "y": "b"}.values()):
        assert as_texts(good, "texts") == ["a", "b"]


@pytest.mark.parametrize("wrong", [[np.ones(2, np.int32), "a"], [np.ones((2, 2), np.int32)], [np.ones(2, np.float32)]])
def test_token_ids_are_1d_integer_arrays(wrong):
    with pytest.raises(ValueError, match="queries: expected token ids as 1-d integer arrays, got"):
        as_texts(wrong, "queries")


@pytest.mark.parametrize("wrong", [np.arange(25), np.array([0, 120]), np.array([-1, 3])])
def test_token_ids_that_do_not_fit_the_model_are_an_error(wrong, tokenizer):
    with pytest.raises(
        ValueError, match=r"documents: expected at most 24 token ids of 0 to 119, got \d+ of -?\d+ to \d+"
    ):
        build("biencoder", tokenizer).encode_documents([np.array([2, 3]), wrong])


def test_texts_without_a_visible_character_are_logged(caplog):
    as_texts(["a", " \u200b\n", "", "\ufeff"], "corpus")
    assert caplog.messages == ["corpus: 3 texts have no visible character (first: index 1)"]


def test_a_single_string_is_an_error_and_not_a_list_of_letters(contextual):
    for call in (contextual.encode_queries, contextual.encode_documents, contextual.embed_context):
        with pytest.raises(ValueError, match="expected a list of texts, got a single one, 'one text'"):
            call("one text")


def test_token_ids_give_the_vectors_of_their_texts(contextual, tokenizer):
    def ids(texts):
        return tokenizer.encode(["document: " + text for text in texts], 24)

    context, again = contextual.embed_context(CORPUS, 1), contextual.embed_context(ids(CORPUS), 1)
    np.testing.assert_array_equal(context.vectors, again.vectors)
    vectors = contextual.encode_documents(ids(CORPUS[:5]), again)
    np.testing.assert_array_equal(vectors, contextual.encode_documents(CORPUS[:5], context))


def test_a_saved_context_gives_the_same_vectors(contextual, tmp_path):
    context = contextual.embed_context(CORPUS, seed=4)
    context.save(tmp_path / "ctx.safetensors")
    loaded = Context.load(tmp_path / "ctx.safetensors")
    assert (loaded.seed, loaded.corpus_size, loaded.weights, loaded.documents) == (
        4,
        20,
        context.weights,
        context.documents,
    )
    np.testing.assert_array_equal(contextual.encode_queries(CORPUS, loaded), contextual.encode_queries(CORPUS, context))
    assert [path.name for path in tmp_path.iterdir()] == ["ctx.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_context_carries_what_isolated_attention_reads_of_it(dtype, tokenizer, tmp_path, monkeypatch):
    embedder = build("isolated", tokenizer, build_model("isolated", encoder={"dtype": dtype}))
    context = embedder.embed_context(CORPUS[:2])  # null slots are in the cache too
    expected = embedder.encode_queries(FEW, context)
    context.save(tmp_path / "ctx.safetensors")
    loaded = Context.load(tmp_path / "ctx.safetensors")
    keys = loaded.cache.prefix.keys
    assert keys.dtype == jnp.dtype(dtype) and keys.shape == (2, 2, 16, J + 2)
    monkeypatch.setattr(embedder_file, "_prepare", None)  # nothing is computed again
    np.testing.assert_array_equal(embedder.encode_queries(FEW, loaded), expected)


def test_a_cache_from_another_compute_type_is_read_in_ours(tokenizer):
    low = build("isolated", tokenizer, build_model("isolated", encoder={"dtype": "bfloat16"}))
    high = build("isolated", tokenizer)
    context = low.embed_context(CORPUS)
    vectors = high.encode_queries(FEW, context)
    assert high._cache(context).prefix.keys.dtype == jnp.float32
    np.testing.assert_allclose(vectors, high.encode_queries(FEW, high.embed_context(CORPUS)), atol=2e-2)


def test_a_context_without_its_cache_reads_as_with_it(contextual):
    context = contextual.embed_context(CORPUS)
    assert (context.cache is not None) == (contextual.config.context_attention == "isolated")
    bare = dataclasses.replace(context, cache=None)
    np.testing.assert_allclose(
        contextual.encode_queries(CORPUS, bare), contextual.encode_queries(CORPUS, context), atol=1e-6
    )


def test_a_cache_of_another_context_is_an_error(tokenizer, tmp_path):
    embedder, path = build("isolated", tokenizer), tmp_path / "ctx.safetensors"
    embedder.embed_context(texts(20, seed=9)).save(path)
    other = load_file(path)
    embedder.embed_context(CORPUS).save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for name in ("keys", "values", "slots"):
        save_file(load_file(path) | {name: other[name]}, tmp_path / "mixed", metadata)
        with pytest.raises(ValueError, match="it was altered"):
            Context.load(tmp_path / "mixed")
    save_file(load_file(path), tmp_path / "mixed", metadata | {"weights": "others"})
    with pytest.raises(ValueError, match="altered"):
        Context.load(tmp_path / "mixed")


# --- whitening

ASKED = texts(9, seed=5, longest=8)


def test_a_context_with_queries_whitens_by_them_and_by_documents(embedder):
    context = embedder.embed_context(CORPUS, seed=3, queries=ASKED)
    plain = dataclasses.replace(context, whitening=None) if embedder.contextual else None
    queries, documents = embedder.encode_queries(ASKED, plain), embedder.encode_documents(CORPUS, plain)
    expected = whitening(queries, documents)  # fewer documents than a sample holds: all
    for found, wanted in zip(context.whitening, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(embedder.encode_queries(ASKED, context), expected.transform_queries(queries), atol=1e-5)
    np.testing.assert_allclose(
        embedder.encode_documents(CORPUS, context), expected.transform_documents(documents), atol=1e-5
    )
    if embedder.contextual:
        without = embedder.embed_context(CORPUS, seed=3)
        np.testing.assert_array_equal(without.vectors, context.vectors)
        assert without.whitening is None
        np.testing.assert_allclose(
            embedder.encode_queries(FEW, without), embedder.encode_queries(FEW, plain), atol=1e-6
        )


def test_no_more_documents_than_a_sample_make_the_whitening(tokenizer, monkeypatch):
    monkeypatch.setattr(embedder_file, "SAMPLE_SIZE", 7)
    embedder = build("biencoder", tokenizer)
    drawn = np.random.default_rng([3, embedder_file.WHITENING_STREAM]).choice(20, 7, replace=False)
    expected = embedder.encode_documents([CORPUS[i] for i in drawn]).mean(axis=0)
    np.testing.assert_allclose(embedder.embed_context(CORPUS, 3, ASKED).whitening.document_mean, expected, atol=1e-5)


def test_a_saved_context_keeps_its_whitening_and_an_altered_one_is_refused(embedder, tmp_path):
    context, path = embedder.embed_context(CORPUS, queries=ASKED), tmp_path / "ctx.safetensors"
    context.save(path)
    loaded = Context.load(path)
    for found, saved in zip(loaded.whitening, context.whitening, strict=True):
        np.testing.assert_array_equal(found, saved)
        assert not found.flags.writeable and not saved.flags.writeable
    np.testing.assert_array_equal(embedder.encode_queries(FEW, loaded), embedder.encode_queries(FEW, context))
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    other = {"whitening.query_mean": -context.whitening.query_mean}
    save_file(load_file(path) | other, tmp_path / "mixed", metadata)
    with pytest.raises(ValueError, match="altered"):
        Context.load(tmp_path / "mixed")


def test_what_cannot_be_whitened_is_an_error(embedder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="queries: expected at least one text, got none"):
        embedder.embed_context(CORPUS, queries=[])
    context = embedder.embed_context(CORPUS, queries=ASKED)
    with pytest.raises(ValueError, match=r"cannot tell queries from documents|a biencoder reads no context"):
        embedder.export_corpus(context, tmp_path / "baked", onnx=False)
    kind = embedder.config.context_attention if embedder.contextual else "biencoder"
    other = build(kind, tokenizer, build_model(kind, seed=1))
    with pytest.raises(ValueError, match="got one of other weights"):
        other.encode_queries(FEW, context)


def test_statistics_put_a_lexical_part_beside_the_vectors(embedder, tmp_path):
    statistics = CorpusStatistics.fit(CORPUS)
    context = embedder.embed_context(CORPUS, seed=3, queries=ASKED, statistics=statistics)
    dense = dataclasses.replace(context, hybrid=None)
    queries, documents = embedder.encode_queries(ASKED, context), embedder.encode_documents(CORPUS, context)
    assert queries.shape[1] == documents.shape[1] == 2 * embedder.width
    expected = context.hybrid.transform_documents(embedder.encode_documents(CORPUS, dense), CORPUS)
    np.testing.assert_array_equal(documents, expected)
    expected = context.hybrid.transform_queries(embedder.encode_queries(ASKED, dense), ASKED)
    np.testing.assert_array_equal(queries, expected)
    context.save(tmp_path / "context.safetensors")
    loaded = Context.load(tmp_path / "context.safetensors")
    np.testing.assert_array_equal(embedder.encode_queries(ASKED, loaded), queries)
    np.testing.assert_array_equal(embedder.encode_documents(CORPUS, loaded), documents)


def test_an_embedder_with_statistics_needs_no_queries(tokenizer):
    statistics = CorpusStatistics.fit(CORPUS)
    embedder = Embedder(cached_model("biencoder"), tokenizer, SETTINGS, progress=False, statistics=statistics)
    context = embedder.embed_context(CORPUS)
    assert context.whitening is None and context.hybrid.statistics is statistics
    same = build("biencoder", tokenizer).embed_context(CORPUS, statistics=statistics)
    np.testing.assert_array_equal(embedder.encode_queries(FEW, context), embedder.encode_queries(FEW, same))


def test_a_lexical_part_needs_texts_and_two_inputs(contextual, tokenizer, tmp_path):
    statistics = CorpusStatistics.fit(CORPUS)
    context = contextual.embed_context(CORPUS, statistics=statistics)
    ids = tokenizer.encode(FEW, 16)
    with pytest.raises(ValueError, match="queries: expected a list of texts, got ndarray"):
        contextual.encode_queries(ids, context)
    with pytest.raises(ValueError, match="corpus: expected a list of texts, got ndarray"):
        contextual.embed_context(tokenizer.encode(CORPUS, 24), statistics=statistics)
    with pytest.raises(ValueError, match=rf"one text a document, got 1 texts and {len(CORPUS)} documents"):
        contextual.embed_context(tokenizer.encode(CORPUS, 24), statistics=statistics, texts=CORPUS[:1])
    with pytest.raises(ValueError, match="cannot tell queries from documents"):
        contextual.export_corpus(context, tmp_path / "export", onnx=False)


def adapter_of(embedder, **fingerprints):
    """An adapter of random tables, as if fitted on vectors of the embedder."""
    random = np.random.default_rng(0)
    shapes = {"K": (4, embedder.width), "b": (4,), "V": (embedder.width, 4)}
    tables = {
        side: {k: random.normal(size=x).astype(np.float32) for k, x in shapes.items()} for side in ("query", "document")
    }
    fingerprints = {"weights": embedder.weights} | fingerprints
    return Adapter(embedder.width, AdapterSettings(form="softmax", sides="both"), tables, fingerprints=fingerprints)


def test_an_adapter_acts_after_the_whitening_and_before_the_lexical_part(embedder, tokenizer):
    statistics = CorpusStatistics.fit(CORPUS)
    plain = embedder.embed_context(CORPUS, seed=3, queries=ASKED)
    adapter = adapter_of(embedder, context=plain.documents)
    adapted = Embedder(embedder.model, tokenizer, SETTINGS, progress=False, adapter=adapter)
    expected = adapter.transform_queries(embedder.encode_queries(ASKED, plain))
    np.testing.assert_allclose(adapted.encode_queries(ASKED, plain), expected, atol=1e-6)
    context = adapted.embed_context(CORPUS, seed=3, queries=ASKED, statistics=statistics)
    np.testing.assert_allclose(context.whitening.matrix, plain.whitening.matrix, atol=1e-6)
    documents = adapter.transform_documents(embedder.encode_documents(CORPUS, plain))
    expected = context.hybrid.transform_documents(documents, CORPUS)
    np.testing.assert_allclose(adapted.encode_documents(CORPUS, context), expected, atol=1e-5)
    spread = (adapter.transform_queries(embedder.encode_queries(ASKED, plain)) @ documents.T).std()
    assert context.hybrid.dense_spread == pytest.approx(spread, rel=1e-4)


def test_an_adapter_of_other_weights_or_another_context_is_refused(contextual, tokenizer, tmp_path):
    context = contextual.embed_context(CORPUS)
    build_with = functools.partial(Embedder, contextual.model, tokenizer, SETTINGS, progress=False)
    with pytest.raises(ValueError, match="fitted on vectors with the weights 'other', these have"):
        build_with(adapter=adapter_of(contextual, weights="other"))
    with pytest.raises(ValueError, match=r"fitted on vectors with the context None, these have '\w+'; fit it on"):
        build_with(adapter=adapter_of(contextual)).encode_queries(FEW, context)
    with pytest.raises(ValueError, match=r"fitted on vectors with the context '\w+', these have None"):
        build_with(adapter=adapter_of(contextual, context=context.documents)).encode_queries(FEW)
    with pytest.raises(ValueError, match="cannot tell queries from documents"):
        build_with(adapter=adapter_of(contextual)).export_corpus(None, tmp_path / "export", onnx=False)


def test_term_vectors_are_mean_token_embeddings(embedder, tokenizer):
    table = np.asarray(embedder.model.encoder.word.embedding[...])
    ids = [row[1:-1] for row in tokenizer.encode(["cat", "whalesong"], 16)]  # without [CLS] and [SEP]
    assert len(ids[1]) > 1
    np.testing.assert_allclose(
        embedder.term_vectors(["cat", "whalesong"]), [table[row].mean(axis=0) for row in ids], rtol=1e-6
    )


def test_a_context_of_other_weights_is_an_error_that_names_both(contextual, tokenizer):
    kind = contextual.config.context_attention
    other = build(kind, tokenizer, build_model(kind, seed=1))
    context = other.embed_context(CORPUS)
    with pytest.raises(ValueError, match=f"{contextual.weights}.*{other.weights}"):
        contextual.encode_queries(CORPUS, context)


def test_broken_context_files_are_named(contextual, tmp_path):
    path = tmp_path / "ctx.safetensors"
    with pytest.raises(ValueError, match="there is none"):
        Context.load(path)
    contextual.embed_context(CORPUS).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"ctx\.safetensors: not safetensors, truncated or altered"):
        Context.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="was altered"):
        Context.load(path)
    path.write_bytes(content)
    save_file(load_file(path), path, {"format": "pt"})
    with pytest.raises(ValueError, match="got 'pt'"):
        Context.load(path)


def test_the_fingerprint_follows_any_weight_and_nothing_else(tokenizer):
    model = build_model("isolated")
    before = build("isolated", tokenizer, model).weights
    assert before == build("isolated", tokenizer, build_model("isolated")).weights
    model.null[...] = model.null[...].at[3].add(1e-3)
    assert before != build("isolated", tokenizer, model).weights


def test_parameters_and_context_are_arguments_and_compile_nothing_new(contextual, tokenizer):
    contextual.encode_documents(CORPUS, contextual.embed_context(CORPUS))
    kind = contextual.config.context_attention
    compiled = embedder_file._embed._cache_size(), embedder_file._first_stage._cache_size()
    other = build(kind, tokenizer, build_model(kind, seed=2))
    first = other.encode_documents(CORPUS, other.embed_context(CORPUS, seed=1))
    second = other.encode_documents(CORPUS, other.embed_context(CORPUS[:3]))
    assert np.abs(first - second).max() > 1e-4
    assert compiled == (embedder_file._embed._cache_size(), embedder_file._first_stage._cache_size())


def test_a_context_is_prepared_once_and_forgotten_with_it(contextual):
    context = contextual.embed_context(CORPUS)
    contextual.encode_queries(["a cat"], context)
    prepared = contextual._cache(context)
    contextual.encode_documents(CORPUS, context)
    assert contextual._cache(context) is prepared and len(contextual._caches) == 1
    del context
    assert len(contextual._caches) == 0


def test_a_model_spread_over_devices_gives_the_same_vectors(tokenizer):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graph, state = nnx.split(cached_model("isolated"))
    spread = build("isolated", tokenizer, nnx.merge(graph, jax.device_put(state, everywhere)))
    alone = build("isolated", tokenizer)
    assert spread.weights == alone.weights
    np.testing.assert_array_equal(spread.encode_queries(CORPUS), alone.encode_queries(CORPUS))


def test_broken_weights_are_an_error(tokenizer):
    model = build_model("biencoder")
    model.encoder.word.embedding[...] = model.encoder.word.embedding[...] * np.nan
    with pytest.raises(ValueError, match=r"queries: .*NaN or infinity in 2 of 2 rows"):
        build("biencoder", tokenizer, model).encode_queries(["a cat", "water"])


def test_a_tokenizer_larger_than_the_model_is_an_error():
    large = Tokenizer.train([*texts(30), "query: document: xylophone zebra quartz"], 140)
    assert large.vocab_size > 120
    with pytest.raises(
        ValueError, match=f"tokenizer has ids up to {large.vocab_size - 1}, the model's .* have 120 rows"
    ):
        build("biencoder", large)
    encoder = EncoderConfig(vocab_size=large.vocab_size, width=32, layers=2, heads=2, mlp_width=48)
    build("biencoder", large, fill(lambda: Biencoder(BiencoderConfig(encoder), rngs=nnx.Rngs(0)), 0))


def test_more_tokens_than_learned_positions_is_an_error(tokenizer):
    model = build_model("biencoder", encoder={"positions": "learned", "max_positions": 23})
    for lengths in (SETTINGS, TextSettings(query_length=24, document_length=16)):
        with pytest.raises(ValueError, match=r"texts of 24 tokens .* has 23"):
            build("biencoder", tokenizer, model, lengths)
    build("biencoder", tokenizer, build_model("biencoder", encoder={"positions": "learned", "max_positions": 24}))


def test_a_bar_shows_on_long_work_only(tokenizer, monkeypatch, capsys):
    embedder = Embedder(cached_model("biencoder"), tokenizer, SETTINGS, "unused")
    embedder.encode_queries(CORPUS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(encode, "PROGRESS_DELAY", 0)
    embedder.encode_queries(CORPUS)
    assert "queries" in capsys.readouterr().err


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=200),
    full=st.sampled_from([8, 16, 64]),
    token_flops=st.sampled_from([0.0, 1e9, 1e12]),
)
def test_every_text_is_in_one_batch_that_holds_it(sizes, full, token_flops):
    sizes, lengths = np.array(sizes, np.int64), padded_lengths(40)
    seen, shapes = [], set()
    for rows, size, length in batches(sizes, lengths, lambda length: full, 1, token_flops):
        assert 0 < len(rows) <= size and sizes[rows].max() <= length
        seen += rows.tolist()
        shapes.add((size, length))
    assert sorted(seen) == list(range(len(sizes)))
    assert len(shapes) <= 2 * len(lengths) + 3 * (len(lengths) - 1)  # three lengths between two are in full batches


CPU_BATCHES = [(1, [1]), (12, [8] + [1] * 4), (13, [8, 8]), (32, [8] * 4), (33, [64]), (97, [64, 64]), (64, [64])]


@pytest.mark.parametrize(("texts", "sizes"), CPU_BATCHES)
def test_a_rest_of_at_most_half_a_batch_goes_in_small_batches(texts, sizes):
    assert [size for _, size, _ in batches(np.full(texts, 5), (16,), lambda length: 64)] == sizes


def test_an_accelerator_takes_one_query_in_a_batch_of_eight(monkeypatch):
    monkeypatch.setattr(encode.jax, "default_backend", lambda: "gpu")
    assert [size for _, size, _ in batches(np.full(12, 5), (16,), lambda length: 64)] == [8, 8]


def test_a_length_between_two_is_taken_where_it_saves_what_its_program_costs(monkeypatch):
    def shapes(sizes, token_flops=1.0):
        result = batches(np.array(sizes), (16, 32), lambda length: 4, 1, token_flops)
        return [(len(rows), size, length) for rows, size, length in result]

    monkeypatch.setitem(encode.PROGRAM_FLOPS, "cpu", 96)  # as many as eight texts padded by 12 tokens
    assert shapes([18] * 8) == [(4, 4, 20)] * 2
    assert shapes([18] * 7) == [(4, 4, 32), (3, 4, 32)]
    assert shapes([18] * 8, 0.9) == [(4, 4, 32)] * 2
    assert shapes([20] * 10 + [21] * 2) == [(4, 4, 20)] * 2 + [(4, 4, 32)]  # the rest goes on to the next length
    assert shapes([9] * 32) == [(4, 4, 16)] * 8  # nothing is shorter than the first


def test_only_encoders_that_take_longer_than_their_compilation_have_more_lengths(tokenizer, monkeypatch):
    lengths = []
    monkeypatch.setattr(encode, "padded", lambda tokens, size, length, pad: lengths.append(length) or 1 / 0)
    for flops in (encode.PROGRAM_FLOPS["cpu"], 1.0):
        monkeypatch.setitem(encode.PROGRAM_FLOPS, "cpu", flops)
        with pytest.raises(ZeroDivisionError):
            build("biencoder", tokenizer).encode_documents([np.full(17, 5)] * 600)  # 64 for each of 8 devices
    assert lengths == [24, 18]


def test_padded_lengths_end_with_the_longest_allowed():
    assert padded_lengths(512) == (16, 32, 64, 128, 256, 512)
    assert padded_lengths(48) == (16, 32, 48)
    assert padded_lengths(9) == (9,)


@pytest.mark.parametrize("kind", ["joint", "isolated", "biencoder"])
def test_an_exported_embedder_loads_with_the_same_vectors_and_context(kind, tokenizer, tmp_path):
    pytest.importorskip("cde_jax.interop.write")
    tokenizer.save(tmp_path / "tokenizer")
    embedder = Embedder(cached_model(kind), tokenizer, SETTINGS, tmp_path / "tokenizer", progress=False)
    context = context_of(embedder)
    embedder.save_pretrained(tmp_path / "export", card="# A tiny model")
    loaded = Embedder.from_pretrained(tmp_path / "export", progress=False)
    assert loaded.settings == SETTINGS and loaded.weights == embedder.weights
    np.testing.assert_allclose(
        loaded.encode_documents(CORPUS, context), embedder.encode_documents(CORPUS, context), atol=1e-5
    )
    assert (tmp_path / "export" / "README.md").read_text().endswith("# A tiny model")
