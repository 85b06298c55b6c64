# ruff: noqa
"""A biencoder, 40 steps, and its vectors of the evaluation sets as vec_NAME.npz; SWEEP as at 132f590.

    python benchmarks/context_trials.py --sweep=SWEEP --plan=random-isolated-N --seed=N --name=VN     (N: 0, 1, 2)
    python benchmarks/context_statistics.py SWEEP 'PAIRS' 0 1 2

A trial: its question is answered in docs/what-we-tried.md, and the next commit removes it.
"""

import argparse, json, os, sys, time

p = argparse.ArgumentParser()
p.add_argument("--plan", default="isolated-0")
p.add_argument("--whiten", default="")  # "", domain, batch
p.add_argument("--residual", type=float, default=0.0)
p.add_argument("--lexical", type=int, default=0)
p.add_argument("--steps", type=int, default=40)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--J", type=int, default=64)
p.add_argument("--stop", type=int, default=0)
p.add_argument("--name", required=True)
p.add_argument("--head", type=int, default=0)
p.add_argument("--drop", type=float, default=0.0)
p.add_argument("--lr", type=float, default=1e-4)
p.add_argument("--qmean", type=int, default=0)
p.add_argument("--strength", type=float, default=16.0)
p.add_argument("--fixed", type=int, default=0)
p.add_argument("--lexlr", type=float, default=1e-3)
p.add_argument("--lexmode", default="cat")
p.add_argument("--sweep", required=True)
a = p.parse_args()
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cde_jax, jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from pathlib import Path
from cde_jax.config import from_config_dict, with_changes
from cde_jax.data.files import read_json
from cde_jax.stages import assemble
from cde_jax.stages.workdir import load_prepared
from cde_jax.training.step import embed_plan_batches, encode_chunks, _at, make_optimizer
from cde_jax.training.losses import info_nce, normalise
from cde_jax.retrieval.embedder import Embedder
from cde_jax.data.sources import beir
from cde_jax.adapters.whitening import whitening, pseudo_queries

SW = Path(a.sweep)
cfgd = read_json(SW / "sweep.json")["runs"][a.plan]["config"]
config = from_config_dict(
    with_changes(
        cfgd,
        {
            "model.kind": "contextual",
            "model.context_size": a.J,
            "batching.context_source": "domain",
            "train.text_lengths": 4,
            "train.steps": a.steps,
            "train.warmup_steps": max(a.steps // 10, 1),
            "train.learning_rate": a.lr,
        },
    )
)
prep = load_prepared(config, SW / a.plan)
loader = assemble.make_loader(config, prep.plan, prep.pairs)
if a.whiten != "domain":
    loader.context_size = 0
bconfig = from_config_dict(with_changes(config.as_dict(), {"model.kind": "biencoder", "model.head": bool(a.head)}))
model = assemble.initial_model(bconfig, prep.vocab_size)
graph, params = nnx.split(model, nnx.Param)
V = prep.vocab_size
D = config.model.width


def inv_sqrt(A, n=10):
    c = jnp.trace(A) / A.shape[0] * 0 + jnp.linalg.norm(A, ord=jnp.inf)
    I = jnp.eye(len(A))
    Y, Z = A / c, I
    for _ in range(n):
        T = (3 * I - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / jnp.sqrt(c)


def fit_w(x, w):  # x list of [n,D] each centred by own mean
    c = jnp.concatenate([y - y.mean(0) for y in x])
    C = c.T @ c
    return inv_sqrt(jnp.eye(C.shape[0]) + jnp.exp(w["s"]) * C / jnp.trace(C))


# ---- lexical
rngs = np.random.default_rng(a.seed)
W = a.lexical
docs = prep.pairs.ragged("document_tokens")
wts = {"share": jnp.float32(np.log(3.0)), "s": jnp.log(a.strength)}
lexp = {}
if W:
    E0 = np.asarray(params["encoder"]["word"]["embedding"][...])
    E0 = E0 - E0.mean(0)
    U, S, Vt = np.linalg.svd(E0, full_matrices=False)
    Ew = E0 @ Vt.T / (S / np.sqrt(len(U)))
    Ew /= np.linalg.norm(Ew, axis=1, keepdims=True) + 1e-9
    R = rngs.standard_normal((V, W)).astype(np.float32) / np.sqrt(W)
    mix = R if W != 384 else 0.6 * Ew + 0.8 * R
    lexp = {"E": jnp.asarray(mix, jnp.float32), "g": jnp.float32(np.log(0.5))}
K1, B_ = 1.2, 0.75
SPECIAL = 103


def df_of(rows_iter):
    df = np.zeros(V, np.float64)
    n = 0
    total = 0
    for r in rows_iter:
        u = np.unique(r)
        df[u] += 1
        n += 1
        total += len(r)
    df[: SPECIAL + 1] = n
    return df, n, total


dom = np.asarray(prep.pairs.array("domain"))
N = len(dom)
if W:
    sample = rngs.permutation(N)[:20000]
    G = df_of(docs.row(int(i)) for i in sample)
    cache = {}


def idf_from(df, n, total, alpha=50.0):
    f = df + alpha * G[0] / G[1]
    nn = n + alpha
    idf = np.log1p((nn - f + 0.5) / (f + 0.5))
    idf[: SPECIAL + 1] = 0
    return np.float32(idf), np.float32((total + alpha * G[2] / G[1]) / nn)


def domain_idf(row):
    k = int(dom[row])
    if k not in cache:
        r = np.flatnonzero(dom == k)
        r = np.random.default_rng(k).permutation(r)[:1000]
        cache[k] = idf_from(*df_of(docs.row(int(i)) for i in r))
    return cache[k]


def lex(lp, ids, mask, st):
    idf, m = st
    ok = mask & (ids > SPECIAL)
    tf = (ids[:, :, None] == ids[:, None, :]).sum(-1)
    n = ok.sum(1, keepdims=True)
    w = (K1 + 1) / (tf + K1 * (1 - B_ + B_ * n / m)) * jnp.sqrt(idf[ids]) * ok
    return normalise(jnp.einsum("bl,bld->bd", w, lp["E"][ids]))


def lex_batch(lp, texts, st, B):
    rows = tuple(
        lex(lp, i.reshape(-1, i.shape[-1]), k.reshape(-1, k.shape[-1]), st)[None, None]
        for i, k in zip(texts["ids"], texts["mask"])
    )
    v = _at(rows, texts["place"])
    return v[:, :B], v[:, B:]


from cde_jax import CorpusStatistics, HybridVectors

dtext, qtext = prep.pairs.ragged("document_text"), prep.pairs.ragged("query_text")
stats_cache = {}


def domain_stats(row):
    k = int(dom[row])
    if k not in stats_cache:
        r = np.flatnonzero(dom == k)
        r = np.random.default_rng(k).permutation(r)[:1000]
        stats_cache[k] = CorpusStatistics.fit([dtext.text(int(i)) for i in r]) if len(r) >= 100 else None
    return stats_cache[k] or stats_cache.setdefault(
        -1, CorpusStatistics.fit([dtext.text(int(i)) for i in np.random.default_rng(9).permutation(N)[:5000]])
    )


def lex_scores(st, q, d):
    qw = st.query_weights(q)
    dw = st.document_weights(d)
    mass = np.asarray(qw.multiply(qw).sum(1)).ravel()
    return np.float32((qw @ dw.T).toarray() / np.maximum(mass, 1e-6)[:, None])


train = config.train
opt, _ = make_optimizer(bconfig.train, a.steps)
sch = lambda lr: optax.linear_schedule(lr, 0, a.steps)
wopt, lopt = optax.adam(sch(0.0 if a.fixed else 2e-2)), optax.adam(sch(a.lexlr))
state = (opt.init(params), wopt.init(wts), lopt.init(lexp))


def loss_fn(tr, batch, st, key):
    params, w, lp = tr
    model = nnx.merge(graph, params)
    q, d = embed_plan_batches(
        model, {k: v for k, v in batch.items() if k != "context"}, jax.random.split(key, 1), bconfig.train
    )
    q, d = normalise(q), normalise(d)
    if a.whiten:
        share = jax.nn.sigmoid(w["share"])
        if a.whiten == "domain":
            held = batch["context"]
            rows = jax.lax.map(lambda ch: encode_chunks(model.embed, *ch), (held["ids"], held["mask"]))
            c = normalise(_at(rows, held["place"])[0])
            present = _at(tuple(m.any(-1) for m in held["mask"]), held["place"])[0]
            xs = [c]
            mq = md = c.mean(0)
            if a.qmean:
                xs = [q[0], c]
                mq = q[0].mean(0)
        else:
            xs = [q[0], d[0]]
            mq, md = q[0].mean(0), d[0].mean(0)
        if a.stop:
            xs, mq, md = jax.lax.stop_gradient((xs, mq, md))
        M = fit_w(xs, w)
        on = jnp.where(jax.random.bernoulli(key, a.drop), 0.0, 1.0)
        M = on * M + (1 - on) * jnp.eye(D)
        q, d = (q - on * share * mq) @ M, (d - on * share * md) @ M
        q, d = normalise(q), normalise(d)
    if W:
        ql, dl = lex_batch(lp, batch["texts"], st, q.shape[1])
        g = jnp.exp(lp["g"])
        q, d = jnp.concatenate([q, g * ql], -1), jnp.concatenate([d, g * dl], -1)
    if a.residual:
        cos = normalise(q[0]) @ normalise(d[0]).T + a.residual * batch["lexical"]
        own = jnp.eye(len(q[0]), dtype=bool)
        keep = batch["keep"][0] | own
        logits = jnp.where(keep, cos / train.temperature, -jnp.inf)
        pos = jnp.diagonal(logits)
        return jnp.mean(jax.nn.logsumexp(logits, 1) - pos), {"accuracy": jnp.mean(pos >= logits.max(1))}
    l, m = info_nce(q[0], d[0], batch["keep"][0], train.temperature)
    return l, m


@jax.jit
def step(tr, state, batch, st, key):
    (l, m), g = jax.value_and_grad(loss_fn, has_aux=True)(tr, batch, st, key)
    u0, s0 = opt.update(g[0], state[0], tr[0])
    u1, s1 = wopt.update(g[1], state[1], tr[1])
    u2, s2 = lopt.update(g[2], state[2], tr[2])
    return tuple(optax.apply_updates(x, y) for x, y in zip(tr, (u0, u1, u2))), (s0, s1, s2), l, m


tr = (params, wts, lexp)
t = time.time()
L = []
for i in range(a.steps):
    b = loader.batch(i)
    place = int(b.pop("plan_batch")[0])
    st = domain_idf(prep.plan.rows[place][0]) if W else 0
    if a.residual:
        r = prep.plan.rows[place]
        b["lexical"] = lex_scores(domain_stats(r[0]), [qtext.text(int(i)) for i in r], [dtext.text(int(i)) for i in r])
    tr, state, l, m = step(tr, state, b, st, jax.random.fold_in(jax.random.key(a.seed), i))
    L.append(float(l))
    if i % 10 == 9 or i == 0:
        print(
            i + 1,
            "loss",
            round(np.mean(L[-10:]), 3),
            "acc",
            round(float(m["accuracy"]), 3),
            {k: round(float(v), 3) for k, v in tr[1].items()},
            {k: round(float(v), 3) for k, v in tr[2].items() if v.ndim == 0},
            round(time.time() - t),
            "s",
            flush=True,
        )
# ---- evaluate
params, w, lp = tr
model = nnx.merge(graph, params)
emb = Embedder(model, prep.tokenizer, assemble.text_settings(bconfig), progress=False)
unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def ndcg(scores, rel):
    out = []
    for sc, r in zip(scores, rel):
        top = np.argsort(-sc)[:10]
        g = np.array([r.get(int(x), 0) for x in top], float)
        ideal = np.sort(list(r.values()))[::-1][:10]
        disc = 1 / np.log2(np.arange(2, 12))
        out.append((g * disc).sum() / (ideal * disc[: len(ideal)]).sum())
    return np.array(out)


sets = sorted(os.listdir(SW / "evaluation"))
X = {}
tok = prep.tokenizer


def tokens(texts, L):
    out = np.zeros((len(texts), L), np.int32)
    mk = np.zeros((len(texts), L), bool)
    for i, x in enumerate(tok.encode(texts, L) if hasattr(tok, "encode") else tok(texts, L)):
        out[i, : len(x)] = x
        mk[i, : len(x)] = True
    return out, mk


for s in sets:
    ds = beir.read(SW / "evaluation" / s)
    c = list(ds.corpus.values())
    pos = {d: i for i, d in enumerate(ds.corpus)}
    qs = list(ds.queries.values())
    pq = pseudo_queries(c)
    rel = [{pos[d]: g for d, g in ds.qrels[q].items() if d in pos} for q in ds.queries]
    x = dict(q=emb.encode_queries(qs), d=emb.encode_documents(c), p=emb.encode_queries(pq), rel=rel)
    x["sample"] = np.random.default_rng(0).permutation(len(c))[:512]
    if W:
        x["tok"] = {k: tokens(v, n) for k, v, n in (("q", qs, 32), ("d", c, 64))}
        full, _ = tokens(c, 64)
        x["idf"] = idf_from(*df_of(r[r > 0] for r in full))
    x["qs"], x["c"], x["st"] = qs, c, CorpusStatistics.fit(c)
    X[s] = x
jl = jax.jit(lex)


def lexical(s, k, st):
    ids, mk = X[s]["tok"][k]
    return np.concatenate([np.asarray(jl(lp, ids[i : i + 512], mk[i : i + 512], st)) for i in range(0, len(ids), 512)])


share = float(jax.nn.sigmoid(w["share"]))


def inner(s):
    x = X[s]
    c = x["d"][x["sample"]]
    if a.whiten == "domain" and not a.qmean:
        xs, mq, md = [c], c.mean(0), c.mean(0)
    else:
        xs, mq, md = [x["p"], c], x["p"].mean(0), c.mean(0)
    return np.asarray(fit_w([jnp.asarray(y) for y in xs], w)), share * mq, share * md


hand = {s: whitening(X[s]["p"], X[s]["d"][X[s]["sample"]]) for s in sets}
hybrid = {}
for s in sets:
    x = X[s]
    w_ = hand[s]
    hybrid[s] = HybridVectors.fit(x["st"], w_.transform_documents(x["d"]), x["c"], w_.transform_queries(x["p"]))
inn = {s: inner(s) for s in sets} if a.whiten else {}
train_docs = [docs.row(int(i)) for i in np.random.default_rng(5).permutation(N)[:512]]
res = {}
null = idf_from(np.zeros(V), 0, 0, 1000.0) if W else None
g = float(np.exp(lp["g"])) if W else 0
for k, s in enumerate(sets):
    x = X[s]
    o = sets[(k + 3) % len(sets)]
    dense = {
        "raw": (x["q"], x["d"]),
        "hand": (hand[s].transform_queries(x["q"]), hand[s].transform_documents(x["d"])),
        "hand-other": (hand[o].transform_queries(x["q"]), hand[o].transform_documents(x["d"])),
    }
    if a.whiten:
        for n, (M, mq, md) in (("in", inn[s]), ("in-other", inn[o])):
            dense[n] = (unit((x["q"] - mq) @ M), unit((x["d"] - md) @ M))
    for hn, h in (("right", s), ("other", o)):
        w_ = hand[h]
        q, d = w_.transform_queries(x["q"]), w_.transform_documents(x["d"])
        H = hybrid[h]
        dense["hybrid-" + hn] = (H.transform_queries(q, x["qs"]), H.transform_documents(d, x["c"]))
    sl = lex_scores(x["st"], x["qs"], x["c"])
    res[s, "bm25"] = ndcg(sl, x["rel"])
    for wt in (0.1, 0.2, 0.3, 0.5):
        res[s, f"exact{wt}"] = ndcg(x["q"] @ x["d"].T + wt * sl, x["rel"])
    for n, (q, d) in dense.items():
        res[s, n] = ndcg(q @ d.T, x["rel"])
    if W:
        L = {
            n: (lexical(s, "q", st), lexical(s, "d", st))
            for n, st in (("right", x["idf"]), ("other", X[o]["idf"]), ("train", null))
        }
        res[s, "lex"] = ndcg(L["right"][0] @ L["right"][1].T, x["rel"])
        for n in dense:
            for ln, (ql, dl) in L.items():
                if n in ("raw", "in", "in-other", "hand", "hand-other"):
                    res[s, f"{n}+lex-{ln}"] = ndcg(dense[n][0] @ dense[n][1].T + g * g * ql @ dl.T, x["rel"])
kinds = list(dict.fromkeys(k for _, k in res))
print(
    json.dumps(
        {
            "name": a.name,
            "steps": a.steps,
            **{k: round(100 * float(np.mean([res[s, k].mean() for s in sets])), 2) for k in kinds},
        }
    ),
    flush=True,
)
np.savez(f"vec_{a.name}.npz", **{f"{s}|{k}": X[s][k] for s in sets for k in "qdp"})
np.savez(f"res_{a.name}.npz", **{f"{s}|{k}": v for (s, k), v in res.items()})
