# ruff: noqa
"""A table of token vectors, trained beside frozen MiniLM vectors under the term statistics of each batch's domain.

First `lexical_table_pairs.py 1300 MODEL 'PAIRS' SETS` in an empty folder, then in it
    python lexical_table.py --init=token --steps=300 --model=MODEL --evaluation=SETS --vectors=VECTORS

A trial: its question is answered in docs/what-we-tried.md, and the next commit removes it.
"""

import numpy as np, jax, jax.numpy as jnp, optax, json, sys, os, glob, csv, gzip, argparse, time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cde_jax.data.sources import beir

p = argparse.ArgumentParser()
p.add_argument("--init", default="token")
p.add_argument("--steps", type=int, default=400)
p.add_argument("--lr", type=float, default=1e-3)
p.add_argument("--batch", type=int, default=256)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--width", type=int, default=384)
p.add_argument("--stats", default="domain")
p.add_argument("--alpha", type=float, default=50)
p.add_argument("--every", type=int, default=200)
p.add_argument("--tau", type=float, default=0.05)
p.add_argument("--gate", default="scalar")
p.add_argument("--label", default="")
p.add_argument("--table", type=int, default=1)
p.add_argument("--g0", type=float, default=0.4)
p.add_argument("--evaluation", required=True)
p.add_argument("--vectors", required=True)
p.add_argument("--model", required=True)
a = p.parse_args()
V = 30522
K1, B = 1.2, 0.75
T = np.load("train_tok.npz")
VEC = np.load("train_vec.npz") if a.steps else None
dom = T["dom"]


def tf_of(ids):
    out = np.zeros(ids.shape, np.uint8)
    for s in range(0, len(ids), 2048):
        x = ids[s : s + 2048]
        out[s : s + 2048] = np.minimum((x[:, :, None] == x[:, None, :]).sum(-1), 255)
    return np.where(ids > 0, out, 1)


def cached(name, ids):
    f = f"tf_{name}.npy"
    if not os.path.exists(f):
        np.save(f, tf_of(ids))
    return np.load(f)


tq, td = cached("q", T["q"]), cached("d", T["d"])


def df_of(ids):
    c = np.zeros(V)
    for r in ids:
        u = np.unique(r)
        c[u] += 1
    c[0] = 0
    return c


glob_df = df_of(T["d"])
NG = len(T["d"])
mG = (T["d"] > 0).sum() / NG


def stat(df, n, total, alpha=a.alpha):
    f = df + alpha * glob_df / NG
    N = n + alpha
    idf = np.log1p((N - f + 0.5) / (f + 0.5))
    m = (total + alpha * mG) / N
    return np.float32(idf), np.float32(m)


GLOBAL = stat(np.zeros(V), 0, 0, 1000)
doms = np.unique(dom)
rows = {n: np.flatnonzero(dom == n) for n in doms}
STATS = {n: stat(df_of(T["d"][r]), len(r), (T["d"][r] > 0).sum()) for n, r in rows.items()}
sets = sorted(os.listdir(a.evaluation))
EV = {}
for s in sets:
    z = np.load(f"eval_{s}.npz")
    v = np.load(f"{a.vectors}/{s}.npz")
    ds = beir.read(a.evaluation + "/" + s)
    pos = {d: i for i, d in enumerate(ds.corpus)}
    rel = [{pos[d]: g for d, g in ds.qrels.get(q, {}).items() if d in pos} for q in ds.queries]
    q, d = z["q"], z["d"]
    EV[s] = dict(
        q=q,
        d=d,
        tq=cached(f"{s}_q", q),
        td=cached(f"{s}_d", d),
        qv=v["queries"],
        dv=v["documents"],
        rel=rel,
        stats=stat(df_of(d), len(d), (d > 0).sum()),
    )


def ndcg(scores, rel):
    out = []
    for sc, r in zip(scores, rel):
        if not any(g > 0 for g in r.values()):
            continue
        top = np.argpartition(-sc, 10)[:10]
        top = top[np.argsort(-sc[top])]
        g = np.array([r.get(int(t), 0) for t in top], float)
        ideal = np.sort([x for x in r.values()])[::-1][:10]
        disc = 1 / np.log2(np.arange(2, 12))
        out.append((g * disc).sum() / (ideal * disc[: len(ideal)]).sum())
    return np.array(out)


@jax.jit
def lex(P, ids, tf, idf, m, dense):
    n = (ids > 0).sum(1, keepdims=True).astype(jnp.float32)
    w = (K1 + 1) / (tf + K1 * (1 - B + B * n / m)) * jnp.sqrt(idf[ids]) * (ids > 0)
    x = jnp.einsum("bl,bld->bd", w * jnp.exp(P["u"][ids]), P["E"][ids])
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    if a.gate == "text":
        x = x * jnp.exp(dense @ P["gw"] + 0.0)[:, None]
    return x


def embed_all(P, ids, tf, st, dv):
    return np.concatenate(
        [np.asarray(lex(P, ids[i : i + 512], tf[i : i + 512], *st, dv[i : i + 512])) for i in range(0, len(ids), 512)]
    )


def evaluate(P, name, report=None):
    g = float(np.exp(P["g"]))
    res = {}
    for k, s in enumerate(sets):
        e = EV[s]
        dense = e["qv"] @ e["dv"].T
        other = EV[sets[(k + 3) % 10]]["stats"]
        kinds = {"right": e["stats"], "other": other, "train": GLOBAL}
        for kind, st in kinds.items():
            sc = dense + g * embed_all(P, e["q"], e["tq"], st, e["qv"]) @ embed_all(P, e["d"], e["td"], st, e["dv"]).T
            res[s, kind] = 100 * ndcg(sc, e["rel"]).mean()
            if kind == "right":
                l = (sc - dense) / g
                res[s, "lex"] = 100 * ndcg(l, e["rel"]).mean()
                for w in (0.2, 0.5, 1.0):
                    res[s, f"w{w}"] = 100 * ndcg(dense + w * l, e["rel"]).mean()
        res[s, "dense"] = 100 * ndcg(dense, e["rel"]).mean()
    cols = ["dense", "right", "other", "train", "lex", "w0.2", "w0.5", "w1.0"]
    line = {c: round(float(np.mean([res[s, c] for s in sets])), 2) for c in cols}
    gap = [res[s, "right"] - res[s, "other"] for s in sets]
    print(
        json.dumps(
            {
                "at": name,
                "g": round(g, 3),
                **line,
                "gap>2": int(sum(x >= 2 for x in gap)),
                "gap": round(float(np.mean(gap)), 2),
            }
        ),
        flush=True,
    )
    if report:
        print(
            json.dumps(
                {"sets": {s: [round(float(res[s, c]), 1) for c in ("dense", "right", "other", "train")] for s in sets}}
            ),
            flush=True,
        )


rng = np.random.default_rng(a.seed)
W = a.width
from safetensors.numpy import load_file

wt = load_file(a.model + "/model.safetensors")
E0 = [v for k, v in wt.items() if "word_embeddings" in k][0].astype(np.float32)
R = rng.standard_normal((V, W)).astype(np.float32) / np.sqrt(W)
E0 = E0 - E0.mean(0)
U, S, Vt = np.linalg.svd(E0[glob_df > 0], full_matrices=False)
Ew = E0 @ Vt.T / (S / np.sqrt(len(U)))  # whitened
Ew /= np.linalg.norm(Ew, axis=1, keepdims=True) + 1e-9
if a.init == "token":
    E = Ew[:, :W] if W <= 384 else np.concatenate([Ew, R[:, : W - 384]], 1) / np.sqrt(2)
elif a.init == "random":
    E = R
elif a.init == "half":
    E = (
        np.concatenate([Ew * 0.6, R[:, : W - 384] * 0.8], 1)
        if W > 384
        else (0.6 * Ew @ (rng.standard_normal((384, W)) / np.sqrt(W)).astype(np.float32) + 0.8 * R)
    )
P = {"E": jnp.asarray(E), "u": jnp.zeros(V), "g": jnp.log(a.g0), "t": jnp.log(a.tau), "gw": jnp.zeros(384)}
print(json.dumps({"label": a.label, **vars(a)}))
evaluate(P, 0, a.steps == 0)
if not a.steps:
    sys.exit()


def loss(P, bt, st):
    q, tfq, qv, d, tfd, dv, keep = bt
    s = (qv @ dv.T + jnp.exp(P["g"]) * lex(P, q, tfq, *st, qv) @ lex(P, d, tfd, *st, dv).T) / jnp.exp(P["t"])
    s = jnp.where(keep, s, -1e9)
    return (jax.nn.logsumexp(s, 1) - jnp.diag(s)).mean()


sched = optax.linear_schedule(a.lr, 0, a.steps)
tx = optax.multi_transform(
    {"E": optax.adam(sched), "s": optax.adam(lambda c: sched(c) * 3), "z": optax.set_to_zero()},
    {"E": "E" if a.table else "z", "u": "s", "g": "s", "t": "s", "gw": "s" if a.gate == "text" else "z"},
)
st = tx.init(P)


@jax.jit
def step(P, st, bt, stats):
    l, gr = jax.value_and_grad(loss)(P, bt, stats)
    up, st = tx.update(gr, st, P)
    return optax.apply_updates(P, up), st, l


weights = np.array([len(rows[n]) ** 0.7 for n in doms])
weights /= weights.sum()
losses = []
t = time.time()
for i in range(a.steps):
    n = doms[rng.choice(len(doms), p=weights)]
    r = rows[n]
    pick = rng.permutation(r)[: a.batch]
    if len(pick) < a.batch:
        pick = np.concatenate([pick, rng.permutation(len(dom))[: a.batch - len(pick)]])
    q, d = T["q"][pick], T["d"][pick]
    hq = np.array([hash(x.tobytes()) for x in q])
    hd = np.array([hash(x.tobytes()) for x in d])
    keep = ~((hq[:, None] == hq[None]) | (hd[:, None] == hd[None]))
    keep |= np.eye(len(pick), dtype=bool)
    s = STATS[n] if a.stats == "domain" else GLOBAL
    P, st, l = step(P, st, (q, tq[pick], VEC["q"][pick], d, td[pick], VEC["d"][pick], keep), s)
    losses.append(float(l))
    if (i + 1) % a.every == 0:
        print(
            i + 1, "loss", np.mean(losses[-100:]), "tau", float(np.exp(P["t"])), round(time.time() - t), "s", flush=True
        )
        evaluate(P, i + 1, i + 1 == a.steps)
if a.label:
    np.savez(f"P_{a.label}.npz", **{k: np.asarray(v) for k, v in P.items()})
