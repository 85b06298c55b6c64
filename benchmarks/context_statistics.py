# ruff: noqa
"""Vectors of context_trials.py under whitening and statistics of the right corpus, another one and general text."""

import sys, os

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np, json, gzip, glob
from cde_jax.data.sources import beir
from cde_jax import CorpusStatistics, HybridVectors, pseudo_queries
from cde_jax.adapters.whitening import whitening
from cde_jax.adapters.adder import as_grades
from cde_jax.adapters.adder_training import ndcg
from cde_jax.evaluation.compare import bootstrap
from cde_jax.retrieval.index import search

seeds = [int(x) for x in sys.argv[3:]]
rng = np.random.default_rng(0)
train = []
for f in sorted(glob.glob(sys.argv[2])):
    t = list(dict.fromkeys(json.loads(l)["document"] for l in gzip.open(f, "rt")))
    train += [t[i] for i in rng.permutation(len(t))[:2000]]
G = CorpusStatistics.fit(train)
small = CorpusStatistics(
    300, round(300 * G.terms / G.documents), np.ceil(G.frequencies * (300 / G.documents)).astype(np.uint32)
)
SW = sys.argv[1] + "/evaluation"
sets = sorted(os.listdir(SW))
D = {}
for s in sets:
    ds = beir.read(f"{SW}/{s}")
    c = list(ds.corpus.values())
    rows = {d: i for i, d in enumerate(ds.corpus)}
    qs = list(ds.queries.values())
    g = as_grades(
        dict(enumerate({rows[d]: x for d, x in ds.qrels[q].items() if d in rows} for q in ds.queries)), len(qs), len(c)
    )
    D[s] = (c, qs, g, CorpusStatistics.fit(c), np.random.default_rng(0).permutation(len(c))[:512])
R = {}
for seed in seeds:
    z = np.load(f"vec_V{seed}.npz")
    W = {s: whitening(z[f"{s}|p"], z[f"{s}|d"][D[s][4]]) for s in sets}
    for k, s in enumerate(sets):
        o = sets[(k + 5) % 10]
        c, qs, g, st, _ = D[s]
        q, d, p = (z[f"{s}|{x}"] for x in "qdp")
        keep = list(g)
        sc = lambda a, b: 100 * ndcg(search(np.ascontiguousarray(a[keep]), b, 10).indices, list(g.values()))[:, -1]

        def hyb(w, stat, texts):
            f = (lambda x: w.transform_queries(x), lambda x: w.transform_documents(x)) if w else (lambda x: x,) * 2
            h = HybridVectors.fit(stat, f[1](d), c, f[0](p), corpus=texts)
            return sc(h.transform_queries(f[0](q), qs), h.transform_documents(f[1](d), c))

        oc, ost = D[o][0], D[o][3].merge(small)
        r = {
            "raw": sc(q, d),
            "white": sc(W[s].transform_queries(q), W[s].transform_documents(d)),
            "white other": sc(W[o].transform_queries(q), W[o].transform_documents(d)),
            "lexical right": hyb(None, st, c),
            "lexical other": hyb(None, ost, oc),
            "lexical general": hyb(None, G, train),
            "all right": hyb(W[s], st, c),
            "all other": hyb(W[o], ost, oc),
        }
        for n, x in r.items():
            R.setdefault(n, {}).setdefault(s, []).append(x)
    print(seed, {n: round(float(np.mean([v[-1].mean() for v in R[n].values()])), 2) for n in R}, flush=True)


def diff(a, b):
    dd = [np.stack(R[a][s]) - np.stack(R[b][s]) for s in sets]
    print(
        a,
        "-",
        b,
        [round(x, 1) for x in bootstrap(dd)],
        "sets>=2:",
        sum(x.mean() >= 2 for x in dd),
        {s: round(float(x.mean()), 1) for s, x in zip(sets, dd)},
        flush=True,
    )


for a, b in (
    ("white", "raw"),
    ("white", "white other"),
    ("lexical right", "raw"),
    ("lexical right", "lexical other"),
    ("lexical right", "lexical general"),
    ("lexical general", "raw"),
    ("all right", "raw"),
    ("all right", "all other"),
):
    diff(a, b)
json.dump(
    {n: {s: round(float(np.mean(v)), 2) for s, v in x.items()} for n, x in R.items()},
    open("context_statistics.json", "w"),
)
