"""The hash of the kernel sources: a compiled library and a committed result both carry it.

setup.py runs this file by its path, so it imports nothing of the package.
"""

import hashlib
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc"


def source_hash() -> str | None:
    """Hash of every file of csrc in the order of their names; None without the sources."""
    if not SOURCES.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
