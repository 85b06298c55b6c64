"""The training step: the same numbers on any number of devices, one reduction, memory that does not grow with B."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import VOCABULARY, WIDTH, contextual, contextual_config

from cde_jax.models.contextual import ContextualEncoder
from cde_jax.training import sharding
from cde_jax.training.losses import info_nce
from cde_jax.training.step import StepConfig, embed_plan_batch, init_state, make_optimizer, make_train_step, stream

G, B, HARD, SLOTS = 8, 4, 1, 3
CHUNKED = StepConfig(temperature=0.1, sequence_dropout=0.3, query_chunk=2, document_chunk=2, context_chunk=2)
KEY = stream(0, "dropout")


def step_batch(step: int, count: int = G) -> dict[str, np.ndarray]:
    """The arrays of `batching.loader`, made of random tokens."""
    random, batch = np.random.default_rng([step, 5]), {}
    for name, rows, length in (("query", B, 3), ("document", B * (1 + HARD), 4), ("context", SLOTS, 4)):
        batch[f"{name}_ids"] = random.integers(1, VOCABULARY, (count, rows, length)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(length) < random.integers(1, length + 1, (count, rows, 1))
    batch["context_mask"][:, -1] = False  # a corpus smaller than its context
    batch["keep"] = random.random((count, B, B * (1 + HARD))) < 0.8
    return batch


def model():
    return contextual("isolated", encoder={"layers": 1})


def build(devices: int, optimizer, schedule, config: StepConfig):
    """State, and the step as the compiled program that it is."""
    mesh = sharding.make_mesh(devices)
    graph, state = init_state(model(), optimizer)
    state, key = sharding.replicate(mesh, state), sharding.replicate(mesh, KEY)
    step = make_train_step(graph, optimizer, schedule, config, mesh)
    compiled = step.lower(state, sharding.shard_batch(mesh, step_batch(0)), key).compile()
    return state, compiled, lambda state, batch: compiled(state, sharding.shard_batch(mesh, batch), key)


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)  # a step eats its state


@pytest.fixture(scope="module")
def on_eight():
    return build(8, *adam(), CHUNKED)


def adam():
    return make_optimizer(learning_rate=1e-2, warmup_steps=2, steps=10, weight_decay=0.1, clip_norm=1.0)


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


@pytest.mark.parametrize("devices", [1, 2])
def test_eight_devices_compute_what_fewer_compute(on_eight, devices):
    expected, losses = three_steps(on_eight)
    params, other_losses = three_steps(build(devices, *adam(), CHUNKED))
    np.testing.assert_allclose(other_losses, losses, atol=1e-5, rtol=1e-5)
    assert largest_difference(params, expected) <= 1e-5
    assert largest_difference(jax.device_get(on_eight[0].params), expected) > 1e-2  # the steps did something


def plain_gradient(config: StepConfig):
    """Gradient of the mean loss where a plan batch sees its own documents, then one by one those of all the others."""
    graph, params = nnx.split(model(), nnx.Param)
    keys, batch = jax.random.split(jax.random.fold_in(KEY, 0), G), jax.tree.map(jnp.asarray, step_batch(0))

    def loss(params):
        merged, losses = nnx.merge(graph, params), []
        queries, documents = jax.lax.map(lambda xs: embed_plan_batch(merged, *xs, config), (batch, keys))
        for g in range(G):
            columns = jnp.concatenate([documents[g], *(documents[i] for i in range(G) if i != g)])
            keep = jnp.ones((B, len(columns)), bool).at[:, : documents.shape[1]].set(batch["keep"][g])
            losses.append(info_nce(queries[g], columns, keep, config.temperature)[0])
        return jnp.stack(losses).mean(), jnp.stack(losses)

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_shared_negatives_are_the_documents_of_all_plan_batches_of_all_devices():
    config = StepConfig(temperature=0.1, sequence_dropout=0.3, share_negatives=True)
    state, compiled, run = build(8, *sgd(), config)
    before = jax.device_get(state.params)
    after, metrics = run(state, step_batch(0))
    gradient, losses = plain_gradient(config)
    np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-5)
    got = jax.tree.map(lambda a, b: a - b, before, jax.device_get(after.params))
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    assert largest_difference(got, jax.device_get(gradient)) <= 1e-5 * size
    assert not collectives(compiled.as_text())[0]


# --- communication


CO16ECTIVE = re.compile(r" = (.+?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


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
        found[name in in_loops] += [line for line in lines if CO16ECTIVE.search(line)]
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
        tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"f32\[([\d,]*)\]", CO16ECTIVE.search(line)[1])
    ]


def test_a_collective_inside_a_loop_is_found():
    mesh = sharding.make_mesh(8)

    def looped(x):
        return jax.lax.map(lambda row: sharding.mean_over_devices(jnp.sin(row)), x)

    function = jax.jit(sharding.on_each_device(mesh, looped, split=1))
    inside, outside = collectives(function.lower(jnp.ones((24, 4))).compile().as_text())
    assert len(inside) == 1 and not outside


def test_devices_talk_once_a_step_outside_of_every_loop(on_eight):
    state, compiled, _ = on_eight
    hlo = compiled.as_text()
    assert hlo.count(" while(") >= 6  # three kinds of texts in chunks, forward and backward
    inside, outside = collectives(hlo)
    assert inside == []
    reduced = [shape for line in outside if "all-reduce" in line for shape in reduced_shapes(line)]
    assert reduced, "nothing is reduced across devices: this program cannot be the one of eight devices"
    # Every gradient is an operand of an all-reduce exactly once, beside scalars: the four metrics, and the FLOPs of
    # texts and of context documents.
    parameters = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    assert sorted(shape for shape in reduced if shape) == parameters
    assert len(reduced) - len(parameters) == 6
    gathered = [shape for line in outside if "all-gather" in line for shape in reduced_shapes(line)]
    assert gathered in ([(G,)], [])  # the losses, which XLA may also write as an all-reduce of [G]


# --- memory


def temporary(batch: dict, chunk: int) -> int:
    """Bytes of temporary memory of the compiled step on one device, from shapes alone."""
    config = contextual_config("isolated", encoder={"layers": 1, "width": 32, "mlp_width": 64})
    optimizer, schedule = sgd()
    graph, state = nnx.split(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(lambda: init_state(nnx.merge(graph, jax.tree.map(jnp.zeros_like, state)), optimizer)[1])
    step = make_train_step(
        graph, optimizer, schedule, StepConfig(query_chunk=chunk, document_chunk=chunk), sharding.make_mesh(1)
    )
    return step.lower(state, batch, jax.eval_shape(lambda: KEY)).compile().memory_analysis().temp_size_in_bytes


def of_shapes(name: str, *shape: int) -> dict:
    return {
        f"{name}ids": jax.ShapeDtypeStruct((1, *shape), jnp.int32),
        f"{name}mask": jax.ShapeDtypeStruct((1, *shape), jnp.bool_),
    }


def plain_shapes(size: int) -> dict:
    batch = of_shapes("query_", size, LONG) | of_shapes("document_", size, LONG) | of_shapes("context_", 8, 16)
    return batch | {"keep": jax.ShapeDtypeStruct((1, size, size), jnp.bool_)}


def chunk_shapes(size: int) -> dict:
    """Queries and documents in chunks of 64 · LONG tokens, of two lengths."""
    both = [of_shapes("", size // 64, 64, LONG), of_shapes("", size // 128, 128, LONG // 2)]
    texts = {name: tuple(one[name] for one in both) for name in ("ids", "mask")}
    batch = of_shapes("context_", 8, 16) | {"keep": jax.ShapeDtypeStruct((1, size, size), jnp.bool_)}
    return batch | {"texts": texts | {"place": jax.ShapeDtypeStruct((1, 2 * size), jnp.int32)}}


LONG = 400  # tokens


@pytest.mark.parametrize("shapes", [plain_shapes, chunk_shapes])
def test_memory_does_not_grow_with_the_batch_when_it_is_encoded_in_chunks(shapes):
    """Sixteen times the batch, the same chunks.

    What may grow: copies of ids and masks (2·B·L·5 bytes = 6.6 MB at B = 2048), vectors and their gradients
    (4·B·D·4 bytes = 1 MB), and the B × N scores (three float32 arrays, 50 MB). The texts are so long that a chunk's
    activations (89 MB) outweigh the scores, whose memory XLA reuses for them: so all of it is measured, nothing
    is subtracted, and what grows still stays within a tenth (measured: 89.5 and 90.0 MB; without chunks 5.2 GB).
    """
    small, large = temporary(shapes(128), 64), temporary(shapes(2048), 64)
    assert small > 1.5 * 3 * 2048**2 * 4, "the scores would hide what is measured: take longer texts"
    assert large <= 1.1 * small
    if shapes is plain_shapes:
        assert temporary(plain_shapes(2048), 0) > 8 * small  # without chunks everything is kept


# --- optimiser and dropout


def test_the_learning_rate_warms_up_linearly_and_falls_linearly_to_zero():
    _, schedule = make_optimizer(learning_rate=0.8, warmup_steps=4, steps=12, weight_decay=0.0, clip_norm=1.0)
    rates = [float(schedule(step)) for step in range(13)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0], atol=1e-6)
    for warmup, expected in ((0, [0.8, 0.4]), (1, [0.8, 0.8]), (9, [0.4, 0.8])):  # the shortest runs
        _, schedule = make_optimizer(learning_rate=0.8, warmup_steps=warmup, steps=2, weight_decay=0.0, clip_norm=1.0)
        np.testing.assert_allclose([float(schedule(step)) for step in range(2)], expected, atol=1e-6)


def test_weight_decay_touches_matrices_only():
    optimizer, _ = make_optimizer(learning_rate=0.5, warmup_steps=0, steps=10, weight_decay=0.1, clip_norm=1.0)
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
    optimizer, _ = make_optimizer(learning_rate=1.0, warmup_steps=0, steps=9, weight_decay=0.0, clip_norm=0.5)
    params = nnx.State({"kernel": nnx.Param(jnp.zeros(4))})
    for size in (3.0, 300.0):
        gradients = jax.tree.map(lambda x, size=size: x + size, params)
        state = optimizer.update(gradients, optimizer.init(params), params)[1]
        # The first moment after one step: (1 − b1) · 0.5 / √4, however large the gradient was.
        np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"][...], 0.1 * 0.25, rtol=1e-5)


def test_dropout_is_decided_by_the_key_and_the_step(on_eight):
    state, compiled, run = on_eight
    losses = lambda s: np.asarray(run(s, step_batch(0))[1]["losses"])  # noqa: E731
    first = losses(copy(state))
    np.testing.assert_array_equal(first, losses(copy(state)))
    later = copy(state)._replace(step=sharding.replicate(sharding.make_mesh(8), jnp.array(7, jnp.int32)))
    assert (first != losses(later)).any()
    mesh = sharding.make_mesh(8)
    batch, other = sharding.shard_batch(mesh, step_batch(0)), sharding.replicate(mesh, stream(1, "dropout"))
    assert (first != np.asarray(compiled(copy(state), batch, other)[1]["losses"])).any()


def test_streams_of_one_seed_are_apart():
    keys = {tuple(np.asarray(jax.random.key_data(stream(seed, name)))) for seed in (0, 1) for name in NAMES}
    assert len(keys) == 2 * len(NAMES)


NAMES = ("params", "context", "dropout", "data")


def test_dropping_the_whole_context_equals_no_context():
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), step_batch(0))

    @nnx.jit(static_argnums=2)
    def queries(model, batch, p):
        return embed_plan_batch(model, batch, KEY, StepConfig(sequence_dropout=p))[0]

    dropped, read = queries(model(), batch, 1.0), queries(model(), batch, 0.0)
    none = model().embed(batch["query_ids"], batch["query_mask"], jnp.broadcast_to(model().null[...], (SLOTS, WIDTH)))
    assert float(jnp.abs(dropped - none).max()) <= 1e-5
    assert float(jnp.abs(dropped - read).max()) > 1e-3


# --- the first stage's rate


def one_step(rate: float):
    """Parameters before and after a step of AdamW with weight decay."""
    about = {"warmup_steps": 0, "steps": 10, "weight_decay": 0.1, "clip_norm": 1e9, "first_stage_rate": rate}
    optimizer = make_optimizer(learning_rate=1e-2, **about)
    graph, state = init_state(model(), optimizer[0])
    before = jax.device_get(state.params)
    config = StepConfig(temperature=0.1, sequence_dropout=0.0, first_stage_rate=rate)
    mesh, batch = sharding.make_mesh(1), step_batch(0, 2)
    state, key = sharding.replicate(mesh, (state, KEY))
    step = make_train_step(graph, *optimizer, config, mesh)
    state, metrics = step(state, sharding.shard_batch(mesh, batch), key)
    assert np.isfinite(metrics["loss"])
    flat = [dict(nnx.to_flat_state(params)) for params in (before, jax.device_get(state.params))]
    return [{path: leaf[...] for path, leaf in params.items()} for params in flat]


def test_a_frozen_first_stage_keeps_every_byte_and_the_rest_is_trained():
    before, after = one_step(0.0)
    assert {path[0] for path in before} > {"first_stage", "encoder", "null"}
    for path, value in before.items():
        assert (value.tobytes() == after[path].tobytes()) == (path[0] == "first_stage"), path


def test_a_first_stage_at_a_tenth_moves_a_tenth_and_the_rest_as_before():
    (before, whole), (_, tenth) = one_step(1.0), one_step(0.1)
    for path, value in before.items():
        rate = 0.1 if path[0] == "first_stage" else 1.0
        assert np.abs(whole[path] - value).max() > 1e-4, path
        np.testing.assert_allclose(tenth[path] - value, rate * (whole[path] - value), atol=2e-7, err_msg=str(path))


# --- devices


def test_more_devices_than_there_are_or_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match=r"train\.devices asks for 9, there are 8"):
        sharding.make_mesh(9)
    assert [sharding.make_mesh(count).size for count in (0, 1, 8)] == [8, 1, 8]
    with pytest.raises(ValueError, match=r"batches_per_step is 12.*8 devices.*multiple of 8"):
        sharding.check_divides(sharding.make_mesh(8), 12)
    sharding.check_divides(sharding.make_mesh(8), 16)
