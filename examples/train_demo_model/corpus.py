"""Collects the text that a Python installation carries, by kind, for `train.py`.

Everything is part of CPython's standard library (PSF licence). A file is held out when
a hash of its name says so, so the split is the same everywhere and no held-out file is
ever trained on.
"""

import argparse
import ast
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

HELD_OUT_PERCENT = 4
KINDS = ("library code", "test code", "docstrings", "language reference", "tables")


def documents(stdlib: Path):
    """Yield (kind, name, text) for every document of the installation."""
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if name.startswith(("site-packages/", "lib2to3/tests/data")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name == "pydoc_data/topics.py":
            for topic, prose in ast.literal_eval(text[text.index("{") :]).items():
                yield "language reference", f"{name}:{topic}", prose
        elif name.startswith("encodings/"):
            yield "tables", name, text
        elif name.startswith("test/"):
            yield "test code", name, text
        else:
            yield "library code", name, text
            yield "docstrings", name, "\n\n".join(_docstrings(text))


def _docstrings(text: str) -> list[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds))
    return [docstring for docstring in found if docstring]


def is_held_out(name: str) -> bool:
    """Whether a document is never trained on; by its name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="archive to write (.npz)")
    parser.add_argument(
        "--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"])
    )
    arguments = parser.parse_args()
    train = {kind: [] for kind in KINDS}
    held_out = {kind: [] for kind in KINDS}
    for kind, name, text in documents(arguments.stdlib):
        # The docstrings of a held-out file are held out with it: same name, same hash.
        (held_out if is_held_out(name) else train)[kind].append(text)
    arrays = {}
    for part, texts in (("train", train), ("held_out", held_out)):
        for kind, parts in texts.items():
            data = "\n".join(parts).encode()
            arrays[f"{part}/{kind}"] = np.frombuffer(data, np.uint8)
            print(f"{part:9} {kind:19} {len(parts):5} documents {len(data):10,} bytes")
    np.savez_compressed(arguments.out, **arrays)


if __name__ == "__main__":
    main()
