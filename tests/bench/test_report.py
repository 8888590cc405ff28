"""Where a measurement says that it comes from."""

from __future__ import annotations

import pytest

from ghl.bench import report


def test_the_commit_is_what_a_copy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose git may be another commit's."""
    monkeypatch.setenv("GHL_COMMIT", "a1b2")
    assert report.commit() == ("a1b2", None)
    monkeypatch.delenv("GHL_COMMIT")
    monkeypatch.setattr(report, "command", lambda *words: None)
    assert report.commit() == ("unknown", None)
