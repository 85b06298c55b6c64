# ruff: noqa
"""A learned transformation of frozen vectors that reads the corpus: conditioning, attention, distillation from whitening.

    python benchmarks/frozen_context.py --train PAIRS.npz --vectors VECTORS --evaluation SETS --out OUT.jsonl [--steps 1000] [--seeds 0 1 2]

PAIRS.npz: frozen unit vectors `q`, `d` [n, D] and `dom` [n]. A step takes 128 pairs of one training domain and 256 other documents of it as
context. Every eighth domain is held out of training; the learning rate is chosen there. A trial: its question is answered in
docs/what-we-tried.md, and the next commit removes it.
"""

import argparse, json, os, sys, time
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cde_jax, jax, jax.numpy as jnp, numpy as np, optax
import evaluation_sets
from cde_jax.adapters.adder import as_grades
from cde_jax.adapters.adder_training import ndcg
from cde_jax.adapters.whitening import whitening
from cde_jax.evaluation.compare import bootstrap
from cde_jax.retrieval.index import search

p = argparse.ArgumentParser()
p.add_argument("--train", required=True)
p.add_argument("--vectors", required=True)
p.add_argument("--evaluation", required=True, nargs="+")
p.add_argument("--out", required=True)
p.add_argument("--steps", type=int, default=1000)
p.add_argument("--seeds", type=int, nargs="+", default=[0])
p.add_argument("--variants", nargs="+")
p.add_argument("--rates", type=float, nargs="+", default=[1e-3])
p.add_argument("--tau", type=float, default=0.05)
p.add_argument("--batch", type=int, default=128)
p.add_argument("--J", type=int, default=256)
a = p.parse_args()
z = np.load(a.train)
Q, D_, dom = z["q"], z["d"], z["dom"]
W = Q.shape[1]
unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
names = np.unique(dom)
rows = {n: np.flatnonzero(dom == n) for n in names}
big = [n for n in names if len(rows[n]) >= 100]
dev = big[::8]
train = [n for n in big if n not in dev]


def stats(c):
    m = c.mean(0)
    l, u = np.linalg.eigh(np.cov((c - m).T) + 1e-9 * np.eye(W))
    l, u = l[::-1], u[:, ::-1]
    return dict(c=c, m=m, sd=c.std(0), l=np.float32(l.copy()), u=np.float32(u.copy()))


def lin(key, n, m, scale=None):
    return dict(w=jax.random.normal(key, (n, m)) * (1 / np.sqrt(n) if scale is None else scale), b=jnp.zeros(m))


ap = lambda l, x: x @ l["w"] + l["b"]
K = 64


def init(kind, key):
    k = jax.random.split(key, 12)
    P = {}
    if "lin" in kind:
        P["lin"] = {s: lin(k[0], W, W, 0.0) for s in "qd"}
    if "film" in kind:
        P["film"] = {s: dict(a=lin(k[1], 2 * W, 256), o=lin(k[2], 256, 2 * W, 0.0)) for s in "qd"}
    if "spec" in kind:
        P["spec"] = {s: dict(a=lin(k[3], 3, 32), o=lin(k[4], 32, 1, 0.0), share=jnp.float32(0.0)) for s in "qd"}
    if "att" in kind:
        P["att"] = {
            s: [
                dict(
                    q=lin(k[5 + i], W, W),
                    k=lin(k[6 + i], W, W),
                    v=lin(k[7 + i], W, W),
                    o=lin(k[8 + i], W, W, 0.0),
                    f=lin(k[9 + i], W, 2 * W),
                    g=lin(k[10 + i], 2 * W, W, 0.0),
                    null=jnp.zeros(W),
                )
                for i in (0, 1)
            ]
            for s in "qd"
        }
    return P


def ln(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-8)


def apply(P, x, C, s):
    if "film" in P:
        h = jax.nn.gelu(ap(P["film"][s]["a"], jnp.concatenate([C["m"], C["sd"]]) * 10))
        g, b = jnp.split(ap(P["film"][s]["o"], h), 2)
        x = x * (1 + g) + b
    if "spec" in P:
        f = P["spec"][s]
        l = C["l"][:K]
        feats = jnp.stack(
            [
                jnp.log(l / C["l"].sum() * W + 1e-6),
                jnp.log(jnp.arange(1, K + 1.0)),
                jnp.full(K, jnp.linalg.norm(C["m"])),
            ],
            -1,
        )
        g = ap(f["o"], jax.nn.gelu(ap(f["a"], feats)))[:, 0]
        x = x - f["share"] * C["m"]
        x = x + ((x @ C["u"][:, :K]) * g) @ C["u"][:, :K].T
    if "att" in P:
        H = 6
        for L in P["att"][s]:
            c = ln(jnp.concatenate([L["null"][None], C["c"]]))
            q, k_, v = (ap(L[n], y).reshape(*y.shape[:-1], H, W // H) for n, y in (("q", ln(x)), ("k", c), ("v", c)))
            w = jax.nn.softmax(jnp.einsum("bhd,jhd->bhj", q, k_) / np.sqrt(W // H), -1)
            x = x + ap(L["o"], jnp.einsum("bhj,jhd->bhd", w, v).reshape(x.shape[0], W))
            x = x + ap(L["g"], jax.nn.gelu(ap(L["f"], ln(x))))
    if "lin" in P:
        x = x + ap(P["lin"][s], x)
    return unit(x)


def wmat(C):  # whitening of the context documents alone, strength 16, as a map
    c = C["c"]
    m = c.mean(0)
    S = jnp.cov((c - m).T)
    l, u = jnp.linalg.eigh(jnp.eye(W) + 16 * S / jnp.trace(S))
    return m, (u / jnp.sqrt(l)) @ u.T


def fit(kind, seed, rate, steps, goal="contrast", P=None):
    rng = np.random.default_rng([seed, 7])
    P = init(kind, jax.random.key(seed)) if P is None else P
    opt = optax.adam(optax.cosine_decay_schedule(rate, steps))
    st = opt.init(P)

    def loss(P, q, d, C, wq, wd):
        x, y = apply(P, q, C, "q"), apply(P, d, C, "d")
        if goal == "distill":
            return 2 - jnp.sum(x * wq, -1).mean() - jnp.sum(y * wd, -1).mean()
        s = x @ y.T / a.tau
        dup = (d @ d.T > 0.999) & ~jnp.eye(len(d), dtype=bool)
        s = jnp.where(dup, -jnp.inf, s)
        return (jax.nn.logsumexp(s, 1) - jnp.diagonal(s)).mean()

    @jax.jit
    def step(P, st, *b):
        l, g = jax.value_and_grad(loss)(P, *b)
        u, st = opt.update(g, st)
        return optax.apply_updates(P, u), st, l

    L = []
    for i in range(steps):
        n = train[rng.integers(len(train))]
        r = rng.permutation(rows[n])
        B = min(a.batch, len(r) // 2)
        r, c = r[:64] if B < a.batch else r[: a.batch], r[a.batch if B >= a.batch else 64 :][: a.J]
        if len(r) < 50:
            continue
        cc = D_[c]
        cc = cc[np.arange(a.J) % len(cc)]  # fixed shape
        q, d = Q[r], D_[r]
        key = (n, i % 4)
        if key not in cache:
            cache[key] = stats(cc), None
        if cache[key][1] is None:
            m, M = wmat(cache[key][0])
            cache[key] = (cache[key][0], (np.asarray(m), np.asarray(M)))
        C, (m, M) = cache[key]
        wq, wd = unit((q - Q[rows[n]].mean(0)) @ M), unit((d - m) @ M)
        if "white" in kind:
            q, d, C = np.asarray(wq), np.asarray(wd), C
        P, st, l = step(P, st, q, d, C, wq, wd)
        L.append(float(l))
    return P, np.mean(L[-100:])


cache = {}


def cases(kind, P, q, d, pq, C, asks):  # vectors of queries and documents under context C
    if "white" in kind:
        m, M = wmat(C)
        q, d, pq = (np.asarray(unit((x - y) @ M)) for x, y in ((q, pq.mean(0)), (d, m), (pq, pq.mean(0))))
    f = jax.jit(apply, static_argnums=3)
    go = lambda x, s: np.concatenate(
        [
            np.asarray(
                f(
                    P,
                    np.concatenate([x[i : i + 2048], np.zeros((max(0, 2048 - len(x[i : i + 2048])), W), np.float32)]),
                    C,
                    s,
                )
            )[: len(x[i : i + 2048])]
            for i in range(0, len(x), 2048)
        ]
    )
    return go(q, "q"), go(d, "d"), go(pq, "q")


E = {}
for ds in evaluation_sets.read(a.evaluation, 0, 0):
    v = np.load(f"{a.vectors}/{ds.name}.npz")
    pos = {d: i for i, d in enumerate(ds.corpus)}
    g = as_grades(
        dict(enumerate({pos[d]: x for d, x in ds.qrels[q].items() if d in pos} for q in ds.queries)),
        len(ds.queries),
        len(ds.corpus),
    )
    r = np.random.default_rng(0).permutation(len(ds.corpus))
    E[ds.name] = dict(
        q=v["queries"], d=v["documents"], pq=v["pseudo_queries"], g=g, C=stats(v["documents"][r[: a.J]]), fit=r[:512]
    )
sets = sorted(E)
general = stats(D_[np.random.default_rng(3).permutation(len(D_))[: a.J]])
score = lambda q, d, g: 100 * ndcg(search(np.ascontiguousarray(q[list(g)]), d, 10).indices, list(g.values()))[:, -1]


def devscore(kind, P):
    out = []
    for n in dev:
        r = rows[n]
        c = np.random.default_rng(1).permutation(r)[: a.J]
        cc = D_[c][np.arange(a.J) % len(c)]
        q, d, _ = cases(kind, P, Q[r], D_[r], Q[r], stats(cc), None)
        s = q @ d.T
        s[(D_[r] @ D_[r].T > 0.999) & ~np.eye(len(r), dtype=bool)] = -9
        rank = (s > np.diagonal(s)[:, None]).sum(1)
        out.append(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean() * 100)
    return float(np.mean(out))


def evaluate(kind, P):
    R = {}
    for i, s in enumerate(sets):
        e = E[s]
        o = E[sets[(i + 5) % len(sets)]]
        for name, C, pq in (("right", e["C"], e["pq"]), ("other", o["C"], o["pq"]), ("general", general, Q[:512])):
            q, d, p_ = cases(kind, P, e["q"], e["d"], pq, C, None)
            R[name, s] = score(q, d, e["g"])
            if name == "right":
                q, d, p_ = cases(kind, P, e["q"], e["d"], e["pq"], C, None)
                w = whitening(p_, d[e["fit"]])
                R["right, whitened after", s] = score(w.transform_queries(q), w.transform_documents(d), e["g"])
    return R


VAR = a.variants or [
    "",
    "white",
    "lin",
    "white lin",
    "film lin",
    "spec",
    "spec lin",
    "att",
    "att lin",
    "film lin distill",
    "att lin distill",
]
base = None
out = open(a.out, "a")
for v in VAR:
    kind = v.replace(" distill", "").replace(" alone", "")
    res = []
    chosen = None
    t = time.time()
    for seed in a.seeds if kind not in ("", "white") else a.seeds[:1]:
        if kind in ("", "white"):
            P, l = {}, 0.0
        else:

            def make(rate):
                P0 = fit(kind, seed, 1e-3, a.steps, "distill")[0] if "distill" in v else None
                return (P0, 0.0) if "alone" in v else fit(kind, seed, rate, a.steps, P=P0)

            if chosen is None:
                tried = [(devscore(kind, (x := make(r))[0]), r, x) for r in a.rates]
                best = max(tried, key=lambda x: x[0])
                chosen = best[1]
                P, l = best[2]
                print(v, [(round(x[0], 2), x[1]) for x in tried], flush=True)
            else:
                P, l = make(chosen)
        R = evaluate(kind, P)
        R["dev"] = devscore(kind, P)
        res.append(R)
    names_ = ("right", "other", "general", "right, whitened after")
    if v == "":
        base = res[0]
    per = {n: {s: np.stack([r[n, s] for r in res]) for s in sets} for n in names_}
    line = dict(
        variant=v or "as it is",
        rate=chosen,
        seeds=len(res),
        dev=round(np.mean([r["dev"] for r in res]), 2),
        **{n: round(float(np.mean([per[n][s].mean() for s in sets])), 2) for n in names_},
    )
    b = lambda A, B: [round(float(x), 2) for x in bootstrap([A[s] - B[s] for s in sets])]
    bb = {s: np.stack([base["right", s]] * len(res)) for s in sets}
    line["gain"] = b(per["right"], bb)
    line["right - other"] = b(per["right"], per["other"])
    line["sets >= 2"] = int(sum((per["right"][s] - per["other"][s]).mean() >= 2 for s in sets))
    line["seconds"] = round(time.time() - t)
    print(json.dumps(line), flush=True)
    out.write(json.dumps(line) + "\n")
    out.flush()
