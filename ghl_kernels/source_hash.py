"""The hash of the kernel sources: a compiled library and a committed result carry it.

setup.py runs this file by its path, so it imports nothing of the package.
"""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE.parent / "csrc"


def source_hash() -> str | None:
    """Hash of every file of csrc in the order of their names; None without the sources."""
    if not SOURCES.is_dir():
        return None
    return hash_of(SOURCES, sorted(p for p in SOURCES.rglob("*") if p.is_file()))


def gpu_source_hash() -> str:
    """Hash of what a GPU runs: csrc, if it is here, and all of this package.

    Not of the tables of tiles, which a measurement writes.
    """
    paths = list(PACKAGE.rglob("*.py"))
    if SOURCES.is_dir():
        paths += (p for p in SOURCES.rglob("*") if p.is_file())
    return hash_of(PACKAGE.parent, sorted(paths))


def hash_of(root: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
