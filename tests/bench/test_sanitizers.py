"""What compute-sanitizer's logs mean, and whom they blame."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import sanitizers

HAZARD = """========= Error: Race reported between Write access at measure_kernel+0x32 in merge.py:62
=========     and {} access at measure_kernel+0x{} in merge.py:62 [9 hazards]
"""  # noqa: E501
FALSE = HAZARD.format("Write", 32)
IN_CUDA = """========= Error: Race reported between Read access at ghl::cuda::sm90::Row::load(char *, int)+0x5180 in sm90_competition.h:28
=========     and Write access at void ghl::cuda::sm90::Row::store<S<(int)4, T<int>>>(char *, int) const+0x71e0 in sm90_competition.h:36 [2016 hazards]
=========     and Write access at void ghl::cuda::sm90::Row::store<S<(int)4, T<int>>>(char *, int) const+0x7210 in sm90_competition.h:36 [2016 hazards]
"""  # noqa: E501
IN_ROW = "sm90::Row::load in sm90_competition.h:28, sm90::Row::store in sm90_competition.h:36"
MEMCHECK = """========= Invalid __global__ read of size 4 bytes
=========     at {}+0x160{}
"""
OTHERS = "errors, none in a kernel of ours"


@pytest.mark.parametrize(
    ("status", "log", "verdict", "bad"),
    [
        (0, "", "no errors", False),
        (9, 2 * FALSE, "hazards that the tool sees where none is, no others", False),
        (9, IN_CUDA, f"errors in {IN_ROW}", True),
        (9, FALSE + IN_CUDA + FALSE, f"errors in {IN_ROW}", True),
        (9, FALSE + IN_CUDA.replace("sm90_comp", "cutlass_comp"),
         f"{OTHERS}, {IN_ROW.replace('sm90_comp', 'cutlass_comp')}", False),
        (9, FALSE + HAZARD.format("Write", 48), "errors in measure_kernel in merge.py:62", True),
        (9, HAZARD.format("Read", 32), "errors in measure_kernel in merge.py:62", True),
        (9, FALSE.replace(".py", ".h"), "errors in measure_kernel in merge.h:62", True),
        (9, MEMCHECK.format("linear_wgrad_kernel", ""), "errors in linear_wgrad_kernel", True),
        (9, MEMCHECK.format("f(int)", " in any_dtype.h:7"), "errors in f in any_dtype.h:7", True),
        (9, MEMCHECK.format("f(int)", " in any.h:7"), f"{OTHERS}, f in any.h:7", False),
        (9, "".join(MEMCHECK.format(f"f{i}", " in params.h:7") for i in range(9)),
         f"errors in {', '.join(f'f{i} in params.h:7' for i in range(6))}", True),
        (9, "Invalid read at cutlass_kernel", OTHERS, False),
        (1, "", "the program ended with 1", True),
        (1, FALSE, "the program ended with 1", True),
        (1, "Device not supported", "the tool does not support this machine", False),
        (9, FALSE + "Race at dual_wgrad_kernel<...>", "errors in dual_wgrad_kernel", True),
    ],
)  # fmt: skip
def test_a_sanitizer_is_judged_by_whom_it_blames(
    status: int, log: str, verdict: str, bad: bool
) -> None:
    said, blamed = sanitizers.judge(status, log)
    assert (said, blamed) == (verdict, bad)


def test_every_sanitizer_is_run_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/bash\n[[ "$2" = racecheck ]] || exit 0\n'
        'echo "Race reported in merge_kernel? no: measure_kernel" > "$6"; exit 9\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sanitizers, "tool", lambda: str(program))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    assert sanitizers.main() == 1
    told = capsys.readouterr().out
    assert "memcheck: no errors" in told
    assert "racecheck: errors in measure_kernel" in told
    assert "initcheck: no errors" in told
