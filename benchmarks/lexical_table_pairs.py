# ruff: noqa
"""Tokens and MiniLM vectors of some pairs of each file, for lexical_table.py."""

"""tokens + dense vectors of a subset of the training pairs; tokens of eval sets"""
import gzip, json, glob, os, sys, time
import numpy as np
import cde_jax
from cde_jax.retrieval.embedder import Embedder
from tokenizers import Tokenizer
import dataclasses

D = sys.argv[2]
tok = Tokenizer.from_file(D + "/tokenizer.json")
tok.no_truncation()
tok.no_padding()


def toks(texts, L=128):
    out = np.zeros((len(texts), L), np.int32)
    for s in range(0, len(texts), 4096):
        for i, e in enumerate(tok.encode_batch(texts[s : s + 4096], add_special_tokens=False)):
            ids = e.ids[: L - 2]
            out[s + i, : len(ids)] = ids
    return out


rng = np.random.default_rng(0)
Q, Dd, dom = [], [], []
for f in sorted(glob.glob(sys.argv[3])):
    rows = [json.loads(l) for l in gzip.open(f, "rt")]
    # whole domains first: group, take up to 400 of a domain, 2200 of a file
    by = {}
    for r in rows:
        by.setdefault(r["domain"], []).append(r)
    names = list(by)
    rng.shuffle(names)
    names.sort(key=lambda n: len(by[n]) < 100)  # large ones first, random within
    got = 0
    cap = int(sys.argv[1])
    for n in names:
        if got >= cap:
            break
        p = [by[n][i] for i in rng.permutation(len(by[n]))[:600]]
        p = p[: cap - got]
        got += len(p)
        Q += [r["query"] for r in p]
        Dd += [r["document"] for r in p]
        base = os.path.basename(f)[:-9]
        dom += [n if len(p) >= 100 else base] * len(p)
    print(f, got, flush=True)
q = toks(Q, 64)
d = toks(Dd, 128)
np.savez("train_tok.npz", q=q, d=d, dom=np.array(dom))
for s in sorted(os.listdir(sys.argv[4])):
    from cde_jax.data.sources import beir

    ds = beir.read(sys.argv[4] + "/" + s) if hasattr(beir, "read") else None
    np.savez(f"eval_{s}.npz", q=toks(list(ds.queries.values())), d=toks(list(ds.corpus.values())))
e = Embedder.from_pretrained(D, progress=False)
e.settings = dataclasses.replace(e.settings, query_length=64, document_length=128)
t = time.time()
qv = e.encode_queries(Q)
print("queries", time.time() - t, flush=True)
dv = e.encode_documents(Dd)
print("docs", len(Dd), time.time() - t, flush=True)
np.savez("train_vec.npz", q=qv, d=dv)
