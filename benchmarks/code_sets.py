"""Retrieval sets from natural language to code: the first sentences of docstrings against the functions they describe.

    python benchmarks/code_sets.py OUT PACKAGE …

Writes OUT/PACKAGE in BEIR form for each installed package. A document is a function's signature and body without the
docstring; functions that are shorter than three lines, and sentences that several functions share, are left out.
"""

import ast
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LINES, WORDS = 3, 4  # of a function's code and of a sentence, at least


def main() -> None:
    """Write every set."""
    out, *packages = sys.argv[1:]
    for package in packages:
        pairs = list(read(Path(importlib.util.find_spec(package).origin).parent))
        sentences, codes = (Counter(side) for side in zip(*pairs, strict=True))
        pairs = [pair for pair in pairs if sentences[pair[0]] == 1 and codes[pair[1]] == 1]
        folder = Path(out) / package
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for file, side in (("queries", 0), ("corpus", 1)):
            rows = [json.dumps({"_id": f"{file[0]}{i}", "text": pair[side]}) for i, pair in enumerate(pairs)]
            (folder / f"{file}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        qrels = ["query-id\tcorpus-id\tscore", *(f"q{i}\tc{i}\t1" for i in range(len(pairs)))]
        (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n", encoding="utf-8")
        print(f"{folder}: {len(pairs)} functions")


def read(folder: Path) -> Iterator[tuple[str, str]]:
    """(sentence, code) of the documented functions of a package, in the order of its files."""
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                continue
            sentence = " ".join(docstring.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            node.body, node.decorator_list = node.body[1:] or [ast.Pass()], []
            code = ast.unparse(node)
            if code.count("\n") + 1 >= LINES and len(sentence.split()) >= WORDS:
                yield sentence, code


if __name__ == "__main__":
    main()
