# ruff: noqa
"""Frozen vectors of some training pairs for frozen_context.py: at most 600 of a domain and 1,300 of a file.

    python benchmarks/frozen_pairs.py MODEL OUT.npz PAIRS.jsonl.gz …

A trial: the next commit removes it.
"""

import dataclasses, gzip, json, os, sys
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cde_jax.retrieval.embedder import Embedder

model, out, files = sys.argv[1], sys.argv[2], sorted(sys.argv[3:])
rng, Q, D, dom = np.random.default_rng(0), [], [], []
for f in files:
    by = {}
    for r in (json.loads(l) for l in gzip.open(f, "rt")):
        by.setdefault(r["domain"], []).append(r)
    names, got = list(by), 0
    rng.shuffle(names)
    names.sort(key=lambda n: len(by[n]) < 100)  # large ones first, random within
    for n in names:
        if got >= 1300:
            break
        p = [by[n][i] for i in rng.permutation(len(by[n]))[:600]][: 1300 - got]
        got += len(p)
        Q += [r["query"] for r in p]
        D += [r["document"] for r in p]
        dom += [n if len(p) >= 100 else os.path.basename(f)[:-9]] * len(p)
e = Embedder.from_pretrained(model)
e.settings = dataclasses.replace(e.settings, query_length=64, document_length=128)
np.savez(out, q=e.encode_queries(Q), d=e.encode_documents(D), dom=np.array(dom))
