"""The training step: the same numbers as without chunks and on any number of devices, one reduction, flat memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_batches import B, G, J, chunk_shapes, in_layout, plain_batch, step_batch
from tiny_models import VOCABULARY, WIDTH, biencoder, contextual, contextual_config

from cde_jax.config import Train
from cde_jax.models import attention, cudnn
from cde_jax.models.contextual import ContextualEncoder
from cde_jax.training import sharding
from cde_jax.training.losses import info_nce
from cde_jax.training.step import embed_plan_batches, init_state, make_optimizer, make_train_step, stream

TRAIN = Train(temperature=0.1, sequence_dropout=0.3)
KEY = stream(0, "dropout")


def model(pattern: str = "isolated", **encoder):
    return biencoder(layers=1) if pattern == "biencoder" else contextual(pattern, encoder={"layers": 1} | encoder)


def build(mesh: tuple[int, int], optimizer, schedule, train: Train = TRAIN, made=None, batch=None):
    """State, and the step as the compiled program that it is."""
    mesh = sharding.make_mesh(mesh)
    graph, state = init_state(made or model(), optimizer)
    state, key = sharding.shard_state(mesh, state), sharding.replicate(mesh, KEY)
    step = make_train_step(graph, optimizer, schedule, train, mesh)
    compiled = step.lower(state, sharding.shard_batch(mesh, batch or step_batch(0)), key).compile()
    return state, compiled, lambda state, batch: compiled(state, sharding.shard_batch(mesh, batch), key)


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)  # a step eats its state


@pytest.fixture(scope="module")
def on_eight():
    return build((8, 1), *adam())


def adam(**changes):
    return make_optimizer(Train(**({"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1} | changes)), 10)


def sgd():
    """Parameters before less parameters after are the gradient."""
    return optax.sgd(1.0), lambda step: 1.0


def three_steps(built):
    state, _, run = built
    state, losses = copy(state), []
    for number in range(3):
        state, metrics = run(state, step_batch(number))
        losses.append(np.asarray(metrics["losses"]))
    return jax.device_get(state.params), np.stack(losses)


def largest_difference(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.fixture(scope="module")
def on_two_by_four():
    return build((2, 4), *adam())


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((2, 1), marks=pytest.mark.slow), (2, 4)])
def test_eight_devices_compute_what_other_meshes_compute(on_eight, mesh, request):
    expected, losses = three_steps(on_eight)
    other = request.getfixturevalue("on_two_by_four") if mesh == (2, 4) else build(mesh, *adam())
    params, other_losses = three_steps(other)
    np.testing.assert_allclose(other_losses, losses, atol=1e-5, rtol=1e-5)
    assert largest_difference(params, expected) <= 1e-5
    assert largest_difference(jax.device_get(on_eight[0].params), expected) > 1e-2  # the steps did something
    assert len({str(x) for x in losses}) == 3  # the batches are not all alike


# --- the numbers of a computation without chunks


def unchunked(made, train: Train, plain: dict):
    """Losses [G] and the gradient of their mean, each plan batch encoded as a whole, text by padded text."""
    graph, params = nnx.split(made, nnx.Param)
    count = len(plain["keep"])
    keys, plain = jax.random.split(jax.random.fold_in(KEY, 0), count), jax.tree.map(jnp.asarray, plain)

    def vectors(model, batch, key):
        context = None
        if hasattr(model, "prepare_context"):
            first_stage = model.embed_context(batch["context_ids"], batch["context_mask"])
            present = batch["context_mask"].any(axis=1) & ~jax.random.bernoulli(key, train.sequence_dropout, (J,))
            context = model.prepare_context(first_stage, present)
        return [model.embed(batch[f"{kind}_ids"], batch[f"{kind}_mask"], context) for kind in ("query", "document")]

    def loss(params):
        merged, losses = nnx.merge(graph, params), []
        queries, documents = jax.lax.map(lambda xs: vectors(merged, *xs), (plain, keys))
        for g in range(count):
            columns, keep = documents[g], plain["keep"][g]
            if train.share_negatives:  # its own documents, then those of all the others
                columns = jnp.concatenate([columns, *(documents[i] for i in range(count) if i != g)])
                keep = jnp.ones((B, len(columns)), bool).at[:, : keep.shape[1]].set(keep)
            losses.append(info_nce(queries[g], columns, keep, train.temperature)[0])
        return jnp.stack(losses).mean(), jnp.stack(losses)

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(params)
    return losses, jax.device_get(gradient)


@pytest.mark.parametrize(
    ("pattern", "lengths", "mesh", "count", "changes", "encoder"),
    [
        ("joint", 1, (2, 1), 8, {"document_chunk": 2}, {"remat": "full"}),
        ("biencoder", 3, (1, 1), 8, {}, {}),
        ("isolated", 2, (4, 2), 8, {"share_negatives": True, "document_chunk": 2}, {}),
        # devices share a plan batch: 8 of them, 4, or 4 with 3 plan batches in each of 2 groups
        pytest.param("isolated", 3, (2, 4), 1, {}, {"remat": "full"}, marks=pytest.mark.slow),
        ("biencoder", 2, (1, 8), 6, {"context_chunk": 2}, {}),
        pytest.param("joint", 1, (4, 2), 2, {}, {}, marks=pytest.mark.slow),
        pytest.param("isolated", 2, (8, 1), 6, {"share_negatives": True}, {"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_a_computation_without_chunks(
    pattern, lengths, mesh, count, changes, encoder
):
    train = Train(temperature=0.1, sequence_dropout=0.3, **changes)
    plain = plain_batch(0, count)
    members = sharding.devices_per_plan_batch(sharding.make_mesh(mesh), count)
    assert members == np.prod(mesh) // np.gcd(np.prod(mesh), count)
    batch = in_layout(plain, lengths, members)
    assert len(batch["texts"]["ids"]) == lengths
    if pattern == "biencoder":
        del batch["context"]
    state, compiled, run = build(mesh, *sgd(), train, model(pattern, **encoder), batch)
    before = jax.device_get(state.params)
    after, metrics = run(state, batch)
    got = jax.tree.map(lambda a, b: a - b, before, jax.device_get(after.params))
    assert_equal_to_unchunked(metrics["losses"], got, model(pattern), train, plain)
    assert not collectives(compiled.as_text())[0]


def assert_equal_to_unchunked(losses, gradient, made, train: Train, plain: dict):
    expected_losses, expected = unchunked(made, train, plain)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest_difference(gradient, expected) <= 1e-5 * size
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))  # so everything was compared


def test_losses_and_gradients_of_eight_devices_are_those_of_a_computation_without_chunks(on_eight):
    state, _, run = on_eight
    after, metrics = run(copy(state), step_batch(0))
    clipped = max(1.0, float(metrics["gradient_norm"]))  # by which the gradient was divided
    moment = jax.device_get(optax.tree.get(after.optimizer, "mu"))  # a tenth of it after the first step
    gradient = jax.tree.map(lambda x: x / (1 - 0.9) * clipped, moment)
    assert_equal_to_unchunked(metrics["losses"], gradient, model(), TRAIN, plain_batch(0))


# --- communication


COLLECTIVE = re.compile(r" = (.+?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def collectives(hlo: str) -> tuple[list[str], list[str]]:
    """Lines of collectives in the computations that a loop calls, directly or not, and in all others."""
    bodies, name = {}, ""
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    calls = {name: [c for line in lines for c in called(line)] for name, lines in bodies.items()}
    todo = [c for lines in bodies.values() for line in lines if " while(" in line for c in called(line)]
    in_loops: set[str] = set()
    while todo:
        if (one := todo.pop()) not in in_loops:
            in_loops.add(one)
            todo += calls[one]
    found = {True: [], False: []}
    for name, lines in bodies.items():
        found[name in in_loops] += [line for line in lines if COLLECTIVE.search(line)]
    return found[True], found[False]


def called(line: str) -> list[str]:
    """Names of the computations that an instruction runs: body=, condition=, calls=, to_apply=, branches."""
    line = re.sub(r"metadata=\{.*", "", line)
    named = re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    for several in re.findall(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}", line):
        named += re.findall(r"[\w.\-]+", several)
    return named


def reduced_shapes(line: str) -> list[tuple[int, ...]]:
    """Shapes of the arrays that one (combined) collective gives."""
    return [
        tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"f32\[([\d,]*)\]", COLLECTIVE.search(line)[1])
    ]


def test_a_collective_inside_a_loop_is_found():
    everywhere = jax.sharding.PartitionSpec("data")

    def looped(x):
        return jax.lax.map(lambda row: jax.lax.psum(jnp.sin(row), "data"), x)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    function = jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=everywhere, out_specs=everywhere))
    inside, outside = collectives(function.lower(jnp.ones((24, 4))).compile().as_text())
    assert len(inside) == 1 and not outside


def test_devices_talk_once_a_step_outside_of_every_loop(on_eight):
    state, compiled, _ = on_eight
    hlo = compiled.as_text()
    chunks = len(step_batch(0)["texts"]["ids"]) + len(step_batch(0)["context"]["ids"])
    assert hlo.count(" while(") >= 6  # chunks of several lengths, forward and backward
    assert hlo.count(" conditional(") >= 2 * chunks  # those without a text are skipped, forward and backward
    inside, outside = collectives(hlo)
    assert inside == []
    reduced = [shape for line in outside if "all-reduce" in line for shape in reduced_shapes(line)]
    assert reduced, "nothing is reduced across devices: this program cannot be the one of eight devices"
    # Every gradient is an operand of an all-reduce exactly once, beside the losses and scalars: the four metrics, and
    # the FLOPs of texts and of context documents.
    parameters = [leaf.shape for leaf in jax.tree.leaves(state.params)]
    assert sorted(shape for shape in reduced if shape) == sorted([*parameters, (G,)])
    assert len(reduced) - len(parameters) == 7
    gathered = [shape for line in outside if "all-gather" in line for shape in reduced_shapes(line)]
    assert gathered in ([(G,)], [])  # the losses, which XLA may also write as an all-reduce of [G]


def test_split_parameters_are_gathered_once_and_their_gradients_scattered_once(on_two_by_four):
    state, compiled, _ = on_two_by_four
    inside, outside = collectives(compiled.as_text())
    assert inside == []
    shapes = {
        kind: sorted(shape for line in outside if f" {kind}" in line for shape in reduced_shapes(line) if shape)
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    }
    leaves = jax.tree.leaves(state.params)
    split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    parts = {id(leaf): leaf.addressable_shards[0].data for leaf in leaves}
    assert all(4 * parts[id(leaf)].size == leaf.size for leaf in split) and len(split) > len(leaves) / 2
    assert shapes["all-gather"] == sorted([leaf.shape for leaf in split] + [(G,)])
    assert shapes["reduce-scatter"] == sorted(parts[id(leaf)].shape for leaf in split)
    assert shapes["all-reduce"] == sorted([parts[id(leaf)].shape for leaf in leaves] + [(G,)])
    assert not shapes["all-to-all"] and not shapes["collective-permute"]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert {leaf.sharding.spec for leaf in moments} == {leaf.sharding.spec for leaf in leaves}


def test_the_state_stays_split_and_takes_less_memory(on_two_by_four, on_eight):
    state, _, run = on_two_by_four
    after, _ = run(copy(state), step_batch(0))
    for before, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    split, whole = (built[1].memory_analysis().argument_size_in_bytes for built in (on_two_by_four, on_eight))
    assert split < 0.6 * whole  # what is left are the batch, and small parameters that are not split


# --- memory


def lowered(batch: dict, **train) -> jax.stages.Lowered:
    """The step on one device, from shapes alone."""
    config = contextual_config("isolated", encoder={"layers": 1, "width": 32, "mlp_width": 64})
    optimizer, schedule = sgd()
    graph, state = nnx.split(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(lambda: init_state(nnx.merge(graph, jax.tree.map(jnp.zeros_like, state)), optimizer)[1])
    step = make_train_step(graph, optimizer, schedule, Train(**train), sharding.make_mesh((1, 1)))
    return step.lower(state, batch, jax.eval_shape(lambda: KEY))


def temporary(batch: dict) -> int:
    """Bytes of temporary memory of the compiled step, whose chunks are computed again in the backward pass."""
    return lowered(batch, document_chunk=1).compile().memory_analysis().temp_size_in_bytes


LONG = 400  # tokens


def shapes(queries: int, chunk: int, lengths: int = 1) -> dict:
    """A batch of as many documents, `chunk` texts of LONG tokens and twice as many of half of it in a chunk."""
    sizes = [(queries // chunk, chunk, LONG), (max(1, queries // chunk // 2), 2 * chunk, LONG // 2)]
    texts = chunk_shapes(2 * queries, *sizes[:lengths])
    keep = jax.ShapeDtypeStruct((1, queries, queries), jnp.bool_)
    return {"texts": texts, "context": chunk_shapes(8, (1, 8, 16)), "keep": keep}


def test_memory_does_not_grow_with_the_batch():
    """Sixteen times the batch, the same chunks.

    What may grow: copies of ids and masks (2·B·L·5 bytes = 6.6 MB at B = 2048), vectors and their gradients
    (4·B·D·4 bytes = 1 MB), and the B × N scores (three float32 arrays, 50 MB). The texts are so long that a chunk's
    activations (89 MB) outweigh the scores, whose memory XLA reuses for them: so all of it is measured, nothing
    is subtracted, and what grows still stays within a tenth (measured: 89.5 and 90.0 MB; in one chunk 5.2 GB).
    """
    small, large = temporary(shapes(128, 64, lengths=2)), temporary(shapes(2048, 64, lengths=2))
    assert small > 1.5 * 3 * 2048**2 * 4, "the scores would hide what is measured: take longer texts"
    assert large <= 1.1 * small
    assert temporary(shapes(2048, 2048)) > 8 * small  # in one chunk everything is kept


def test_chunks_are_computed_again_where_a_size_is_given_or_they_would_keep_too_much():
    def flops(queries: int, **train) -> float:  # XLA counts the body of a loop once
        return lowered(shapes(queries, 64), **train).cost_analysis()["flops"]

    kept, recomputed = flops(128), flops(128, document_chunk=64)
    assert recomputed == flops(128, context_chunk=8) > 1.2 * kept
    assert flops(2**13) == flops(2**13, document_chunk=64)


# --- bfloat16


def through_the_context(dtype: str, chunks: int, texts: int = 256, length: int = 4):
    """Gradient, as one vector, of all that reaches the texts by their context alone, from texts in `chunks` chunks."""
    made = contextual("isolated", encoder={"layers": 1, "dtype": dtype, "attention": "xla"})
    graph, params = nnx.split(made, nnx.Param)
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, (texts + J, length)).astype(np.int32)
    pull = random.normal(0.5, 1, (texts, WIDTH)).astype(np.float32)

    def in_chunks(ids, count):
        ids = ids.reshape(1, count, -1, length)
        place = np.arange(ids.size // length, dtype=np.int32)[None]
        return {"ids": (ids,), "mask": (np.ones(ids.shape, bool),), "place": place}

    batch = {"texts": in_chunks(ids[:texts], chunks), "context": in_chunks(ids[texts:], 1)}
    batch["keep"] = np.ones((1, texts // 2, texts // 2), bool)

    def loss(params, batch):
        vectors = embed_plan_batches(nnx.merge(graph, params), batch, KEY[None], Train(sequence_dropout=0.0))
        return (jnp.concatenate(vectors, axis=1) * pull).sum()

    gradient = jax.jit(jax.grad(loss))(params, batch)["first_stage"]
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


def test_the_gradient_of_the_context_is_as_exact_from_many_chunks_as_from_one():
    """Keys and values of slots are in bfloat16; a sum over chunks in it would be off by some percent."""
    expected = through_the_context("float32", 1)
    whole, many = (np.linalg.norm(through_the_context("bfloat16", n) - expected) for n in (1, 256))
    assert 0 < many <= 1.2 * whole < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_the_step_of_a_gpu_lowers_to_cudnns_calls(mesh, monkeypatch):
    """To what XLA compiles for CUDA: forward, again in the backward pass of a chunk, and backward."""
    monkeypatch.setattr(attention, "select_kernel", lambda *_: "cudnn")
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    mesh = sharding.make_mesh(mesh)
    graph, state = init_state(model(dtype="bfloat16"), sgd()[0])
    step = make_train_step(graph, *sgd(), dataclasses.replace(TRAIN, document_chunk=1), mesh)
    given = sharding.shard_state(mesh, state), sharding.shard_batch(mesh, step_batch(0)), sharding.replicate(mesh, KEY)
    program = step.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (program.count(f"@__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward"))
    lengths, of_context = (len(step_batch(0)[name]["ids"]) for name in ("texts", "context"))
    assert backward == 2 * lengths + of_context + 1  # text and slots; the first stage; slots among themselves
    assert forward == 2 * backward - 1  # those last ones are in no chunk
    assert "xf16>" not in program


# --- optimiser and dropout


def test_the_learning_rate_warms_up_linearly_and_falls_linearly_to_zero():
    def rates(warmup: int, steps: int):
        _, schedule = make_optimizer(Train(learning_rate=0.8, warmup_steps=warmup), steps)
        return [float(schedule(step)) for step in range(steps + 1)]

    expected = [0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
    np.testing.assert_allclose(rates(4, 12), expected, atol=1e-6)
    for warmup, expected in ((0, [0.8, 0.4]), (1, [0.8, 0.8]), (9, [0.4, 0.8])):  # the shortest runs
        np.testing.assert_allclose(rates(warmup, 2)[:2], expected, atol=1e-6)


def test_weight_decay_touches_matrices_only():
    optimizer, _ = make_optimizer(Train(learning_rate=0.5, warmup_steps=0, weight_decay=0.1), 10)
    _, state = init_state(model(), optimizer)
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(optimizer.update)(nothing, state.optimizer, state.params)
    decayed = set()
    for path, value in nnx.to_flat_state(updates):
        before = dict(nnx.to_flat_state(state.params))[path][...]
        if jnp.any(value[...] != 0):
            decayed.add(path[-1])
            np.testing.assert_allclose(value[...], -0.05 * before, rtol=1e-5)
    names = {path[-1] for path, _ in nnx.to_flat_state(updates)}
    assert decayed == {"kernel", "embedding"}
    assert names - decayed == {"scale", "bias", "null", "slot_bias"}


def test_gradients_are_clipped_by_their_global_norm(on_eight):
    state, _, run = on_eight
    _, metrics = run(copy(state), step_batch(0))
    assert float(metrics["gradient_norm"]) > 1.0  # what is reported is the norm before clipping
    optimizer, _ = make_optimizer(Train(learning_rate=1.0, warmup_steps=0, clip_norm=0.5), 9)
    params = nnx.State({"kernel": nnx.Param(jnp.zeros(4))})
    for size in (3.0, 300.0):
        gradients = jax.tree.map(lambda x, size=size: x + size, params)
        state = optimizer.update(gradients, optimizer.init(params), params)[1]
        # Adam's moments after one step, however large the gradient was: (1 − b1) g and (1 − b2) g² of g = 0.5 / √4.
        np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"][...], (1 - 0.9) * 0.25, rtol=1e-5)
        np.testing.assert_allclose(optax.tree.get(state, "nu")["kernel"][...], (1 - 0.999) * 0.25**2, rtol=1e-4)


def test_dropout_is_decided_by_the_key_and_the_step(on_eight):
    state, compiled, run = on_eight
    losses = lambda s: np.asarray(run(s, step_batch(0))[1]["losses"])  # noqa: E731
    first = losses(copy(state))
    np.testing.assert_array_equal(first, losses(copy(state)))
    later = copy(state)._replace(step=sharding.replicate(sharding.make_mesh(), jnp.array(7, jnp.int32)))
    assert (first != losses(later)).any()
    mesh = sharding.make_mesh()
    batch, other = sharding.shard_batch(mesh, step_batch(0)), sharding.replicate(mesh, stream(1, "dropout"))
    assert (first != np.asarray(compiled(copy(state), batch, other)[1]["losses"])).any()


def test_streams_of_one_seed_are_apart():
    keys = {tuple(np.asarray(jax.random.key_data(stream(seed, name)))) for seed in (0, 1) for name in NAMES}
    assert len(keys) == 2 * len(NAMES)


NAMES = ("params", "context", "dropout", "data")


def test_dropping_the_whole_context_equals_no_context():
    plain = plain_batch(0)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:1]), in_layout(plain, lengths=1))

    @nnx.jit(static_argnums=2)
    def queries(model, batch, p):
        return embed_plan_batches(model, batch, KEY[None], Train(sequence_dropout=p))[0][0]

    dropped, read = queries(model(), batch, 1.0), queries(model(), batch, 0.0)
    nulls = jnp.broadcast_to(model().null[...], (J, WIDTH))
    none = model().embed(plain["query_ids"][0], plain["query_mask"][0], nulls)
    assert float(jnp.abs(dropped - none).max()) <= 1e-5
    assert float(jnp.abs(dropped - read).max()) > 1e-3


# --- devices


@pytest.mark.parametrize("shape", [(9, 1), (-1, 16), (-1, 3), (3, -1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match=r"train\.mesh is .* and there are 8 in 1 process.*-1 for the rest"):
        sharding.make_mesh(shape)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 1), (1, 1)), ((1, 3), (1, 3))],
)
def test_a_mesh_takes_the_rest_or_as_many_devices_as_it_says(shape, expected):
    assert sharding.make_mesh(shape).devices.shape == expected
