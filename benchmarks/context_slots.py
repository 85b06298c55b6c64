# ruff: noqa
"""What fills the context slots of a short training: nothing, a learned prefix, frozen MiniLM vectors of documents, their weighted token
embeddings, latent directions of the domain's words, or a trained first stage. Isolated attention. SWEEP as at 132f590.

    python benchmarks/context_slots.py --sweep SWEEP --plan random-isolated-0 --slots prompt --name P0 [--steps 40] [--layers 3] [--at 20 40]

A trial: its question is answered in docs/what-we-tried.md, and the next commit removes it.
"""

import argparse, json, os, sys, time

p = argparse.ArgumentParser()
p.add_argument("--sweep", required=True)
p.add_argument("--plan", default="isolated-0")
p.add_argument("--name", required=True)
p.add_argument("--slots", default="none")  # none, prompt, minilm, tokens, directions, trained
p.add_argument("--J", type=int, default=64)
p.add_argument("--steps", type=int, default=40)
p.add_argument("--at", type=int, nargs="+")
p.add_argument("--layers", type=int, default=3)
p.add_argument("--lr", type=float, default=1e-4)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--kinds", nargs="+", default=["right", "other", "general"])
p.add_argument("--film", action="store_true")
a = p.parse_args()
a.at = a.at or [a.steps]
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cde_jax, jax, jax.numpy as jnp, numpy as np, optax, dataclasses
from flax import nnx
from functools import lru_cache
from pathlib import Path
from sklearn.utils.extmath import randomized_svd
from scipy.sparse import csr_matrix
from cde_jax.config import from_config_dict, with_changes
from cde_jax.data.files import read_json
from cde_jax.data.sources import beir
from cde_jax.stages import assemble
from cde_jax.stages.workdir import load_prepared
from cde_jax.training.step import embed_plan_batches, encode_chunks, _at, make_optimizer
from cde_jax.training.losses import info_nce, normalise
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.context import Context
from cde_jax.adapters.adder import as_grades
from cde_jax.adapters.adder_training import ndcg
from cde_jax.adapters.whitening import whitening, pseudo_queries
from cde_jax.retrieval.index import search

SW = Path(a.sweep)
c = read_json(SW / "sweep.json")["runs"][a.plan]["config"]
own = a.slots == "trained"
config = from_config_dict(
    with_changes(
        c,
        {
            "model.kind": "contextual",
            "model.context_size": a.J,
            "batching.context_source": "domain",
            "train.text_lengths": 4,
            "train.steps": a.steps,
            "train.warmup_steps": max(a.steps // 10, 1),
            "train.learning_rate": a.lr,
            "model.layers": a.layers,
            "model.init.layers": a.layers,
            "model.first_stage_layers": a.layers if own else 1,
            "model.init.first_stage": c["model"]["init"]["first_stage"] if own else "",
            "model.soft_prompt": 8 if own else 0,
        },
    )
)
prep = load_prepared(config, SW / a.plan)
loader = assemble.make_loader(config, prep.plan, prep.pairs)
if not own:
    loader.context_size = 0
text_config = (
    config if a.slots != "none" else from_config_dict(with_changes(config.as_dict(), {"model.kind": "biencoder"}))
)
model = assemble.initial_model(text_config, prep.vocab_size)
graph, params = nnx.split(model, nnx.Param)
D = config.model.width
if a.slots not in ("none", "trained"):
    params = nnx.filter_state(params, lambda path, _: True)
E = np.asarray(params["encoder"]["word"]["embedding"][...])
mean_norm = float(np.linalg.norm(E, axis=1).mean())
Ec = E - E.mean(0)
V = prep.vocab_size
dom = np.asarray(prep.pairs.array("domain"))
docs = prep.pairs.ragged("document_tokens")
SPECIAL = 103
texts = prep.pairs.ragged("document_text")
rng0 = np.random.default_rng(9)
minilm = Embedder.from_pretrained(c["model"]["init"]["first_stage"], progress=False) if a.slots == "minilm" else None


def counts(rows_of):
    ind, ptr = [], [0]
    for r in rows_of:
        r = r[r > SPECIAL]
        ind.append(r)
        ptr.append(ptr[-1] + len(r))
    x = csr_matrix((np.ones(ptr[-1], np.float32), np.concatenate(ind), ptr), (len(ptr) - 1, V))
    x.sum_duplicates()
    return x


G = counts(docs.row(int(i)) for i in rng0.permutation(len(dom))[:5000])
gdf = np.asarray((G > 0).sum(0)).ravel() / G.shape[0]


def weighted(x):  # BM25-like weights under the corpus' own frequencies, smoothed by general text
    n = x.shape[0]
    df = np.asarray((x > 0).sum(0)).ravel() + 50 * gdf
    idf = np.log1p((n + 50 - df + 0.5) / (df + 0.5))
    y = x.copy()
    y.data = y.data * 2.2 / (y.data + 1.2)
    return y.multiply(idf).tocsr()


def features(tokens, strings):  # [m, D] of one corpus, not sampled yet
    if a.slots == "minilm":
        return minilm.encode_documents(strings)
    w = weighted(counts(tokens))
    if a.slots == "tokens":
        x = w @ Ec
    else:
        k = min(a.J, w.shape[0] - 1, V - 1)
        norm = np.sqrt(np.asarray(w.multiply(w).sum(1)).ravel())[:, None]
        _, s, vt = randomized_svd(csr_matrix(w.multiply(1 / np.maximum(norm, 1e-6))), k, random_state=0)
        vt *= np.where(vt.sum(1) < 0, -1, 1)[:, None]
        x = vt @ Ec  # each direction by its words
    return np.float32(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6))


@lru_cache(None)
def of_domain(k):
    r = np.random.default_rng(k).permutation(np.flatnonzero(dom == k))[:400]
    return features([docs.row(int(i)) for i in r], [texts.text(int(i)) for i in r])


def draw(f, rng):
    r = np.arange(len(f)) if a.slots == "directions" else rng.permutation(len(f))
    r = np.resize(r, a.J) if len(r) else r
    return f[r[: a.J]]


learned = {}
k1 = jax.random.key(a.seed)
if a.slots == "prompt":
    learned = {"prompt": jnp.asarray(E[np.random.default_rng(a.seed).integers(1000, 5000, a.J)])}
if a.slots in ("minilm", "tokens", "directions"):
    learned = {"proj": jnp.eye(D), "bias": jnp.zeros(D)}
if a.film:
    learned |= {"fa": jax.random.normal(k1, (D, 128)) / D**0.5, "fo": jnp.zeros((128, 2 * D))}


def slots_of(learned, f):
    return learned["prompt"] if a.slots == "prompt" else mean_norm * (f @ learned["proj"]) + learned["bias"]


def film(learned, f, x):
    if not a.film:
        return x
    g, b = jnp.split(jax.nn.gelu(4 * f.mean(0) @ learned["fa"]) @ learned["fo"], 2, -1)
    return x * (1 + g) + b * jnp.linalg.norm(x, axis=-1, keepdims=True)


opt, _ = make_optimizer(config.train, a.steps)
lopt = optax.adam(optax.linear_schedule(1e-3, 0, a.steps))
state = (opt.init(params), lopt.init(learned))


def encode_batch(model, learned, batch, f, key):
    if a.slots in ("none", "trained"):
        return embed_plan_batches(model, batch, jax.random.split(key, 1), config.train)
    cache = model.prepare_context(slots_of(learned, f))
    t = batch["texts"]
    rows = tuple(
        jax.lax.map(lambda ch: encode_chunks(lambda i, m: model.embed(i, m, cache), *ch, False), (t["ids"], t["mask"]))
    )
    v = _at(rows, t["place"])
    n = batch["keep"].shape[1]
    return v[:, :n], v[:, n:]


def loss_fn(tr, batch, f, key):
    q, d = encode_batch(nnx.merge(graph, tr[0]), tr[1], batch, f, key)
    if a.film:
        q, d = film(tr[1], f, q[0])[None], film(tr[1], f, d[0])[None]
    return info_nce(q[0], d[0], batch["keep"][0], config.train.temperature)


@jax.jit
def step(tr, state, batch, f, key):
    (l, m), g = jax.value_and_grad(loss_fn, has_aux=True)(tr, batch, f, key)
    u0, s0 = opt.update(g[0], state[0], tr[0])
    u1, s1 = lopt.update(g[1], state[1], tr[1])
    return (optax.apply_updates(tr[0], u0), optax.apply_updates(tr[1], u1)), (s0, s1), l, m


sets = sorted(os.listdir(SW / "evaluation"))
X = {}
for s in sets:
    ds = beir.read(SW / "evaluation" / s)
    cc = list(ds.corpus.values())
    pos = {d: i for i, d in enumerate(ds.corpus)}
    qs = list(ds.queries.values())
    g = as_grades(
        dict(enumerate({pos[d]: x for d, x in ds.qrels[q].items() if d in pos} for q in ds.queries)), len(qs), len(cc)
    )
    X[s] = dict(
        q=qs,
        d=cc,
        p=pseudo_queries(cc),
        g=g,
        fit=np.random.default_rng(0).permutation(len(cc))[:512],
        tok=[np.asarray(t, np.int32) for t in prep.tokenizer.encode(cc, 64)],
    )


def general():
    r = rng0.permutation(len(dom))[:400]
    return [docs.row(int(i)) for i in r], [texts.text(int(i)) for i in r]


def evaluate(tr, n):
    params, learned = tr
    model = nnx.merge(graph, params)
    emb = Embedder(model, prep.tokenizer, assemble.text_settings(text_config), progress=False)
    res = {}
    kinds = a.kinds if a.slots not in ("none", "prompt") else ["right"]
    gen = general()
    for i, s in enumerate(sets):
        x = X[s]
        o = sets[(i + 5) % len(sets)]
        for kind in kinds:
            tk, st = {"right": (x["tok"], x["d"]), "other": (X[o]["tok"], X[o]["d"]), "general": gen}[kind]
            ctx = None
            f = None
            if own:
                ctx = emb.embed_context(st)
            elif a.slots == "prompt":
                ctx = Context(np.array(learned["prompt"]), 0, a.J, emb.weights, "")
            elif a.slots != "none":
                f = draw(features(tk, st), np.random.default_rng(1))
                ctx = Context(np.array(slots_of(learned, f)), 0, a.J, emb.weights, "")
            v = {k: (emb.encode_documents if k == "d" else emb.encode_queries)(x[k], ctx) for k in "qdp"}
            if a.film:
                v = {k: np.asarray(normalise(film(learned, f, y))) for k, y in v.items()}
            sc = lambda q, d: (
                100 * ndcg(search(np.ascontiguousarray(q[list(x["g"])]), d, 10).indices, list(x["g"].values()))[:, -1]
            )
            res[f"{s}|{kind}"] = sc(v["q"], v["d"])
            if kind == "right":
                w = whitening(v["p"], v["d"][x["fit"]])
                res[f"{s}|white"] = sc(w.transform_queries(v["q"]), w.transform_documents(v["d"]))
    np.savez(f"slots_{a.name}_{n}.npz", **res)
    ks = dict.fromkeys(k.split("|")[1] for k in res)
    print(
        json.dumps(
            {
                "name": a.name,
                "slots": a.slots,
                "plan": a.plan,
                "steps": n,
                **{k: round(float(np.mean([res[f"{s}|{k}"].mean() for s in sets])), 2) for k in ks},
            }
        ),
        flush=True,
    )


tr = (params, learned)
t = time.time()
L = []
rng = np.random.default_rng(a.seed)
for i in range(a.steps):
    b = loader.batch(i)
    place = int(b.pop("plan_batch")[0])
    f = None
    if a.slots in ("minilm", "tokens", "directions"):
        f = draw(of_domain(int(dom[prep.plan.rows[place][0]])), rng)
    tr, state, l, m = step(tr, state, b, f, jax.random.fold_in(k1, i))
    L.append(float(l))
    if i % 20 == 19 or i == 0:
        print(i + 1, "loss", round(np.mean(L[-10:]), 3), round(time.time() - t), "s", flush=True)
    if i + 1 in a.at:
        evaluate(tr, i + 1)
