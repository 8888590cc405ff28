"""Reads the machine code of sm90_dual_wgrad.cu: does the compiler keep the promises of wgmma?

    nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c csrc/cuda/sm90_dual_wgrad.cu
    python tests/csrc/check_sm90_sass.py CUOBJDUMP sm90_dual_wgrad.o

or on the library; Triton's wheel has a cuobjdump, and tests/cuda/test_machine_code.py calls this.

In the main loop of every kernel: four products, only the last with a barrier (else they are
serialised), both operands in shared memory; their sums touched by nothing else until the last wait
after it. Where u was stored (128 bits at once), the fence that products need before the barrier
that tells of it. No local memory anywhere. Warpgroups exchange registers twice, copies walk
patches.
"""

import re
import subprocess
import sys


def kernels(cuobjdump: str, binary: str) -> dict[str, list[str]]:
    """The instructions of each kernel of namespace sm90, without addresses and encodings;
    `target:` for branches."""
    command = [cuobjdump, "--dump-sass", "--gpu-architecture", "sm_90a", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for part in text.split("Function : ")[1:]:
        if "4sm90" not in part.split()[0]:
            continue
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", part, re.M)
        places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        code = found[part.split()[0]] = []
        for _, instruction in lines:
            branch = re.match(r"(.*BRA\S*) .*?0x([0-9a-f]+)", instruction)
            target = places.get(int(branch[2], 16), -1) if branch else -1
            code.append(f"{branch[1]} target:{target}" if branch else instruction)
    return found


def registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def main_loop(code: list[str], products: list[int]) -> tuple[int, int]:
    for i in range(products[-1], len(code)):
        match = re.search(r"target:(\d+)", code[i])
        if match and int(match[1]) < products[0]:
            return int(match[1]), i
    raise ValueError("no loop around the products")


def check(code: list[str]) -> str:
    products = [i for i, line in enumerate(code) if "HGMMA" in line]
    first, last = main_loop(code, products)
    assert len(products) == 4 and first < products[0], "four products, all in the loop"
    assert ["gsb0" in code[i] for i in products] == [False, False, False, True], "serialised"
    sums = set()
    for i in products:
        numbers = registers(code[i])
        assert len(numbers) == 1, f"an operand in registers: {code[i]}"
        width = int(re.search(r"HGMMA\.64x(\d+)x16", code[i])[1])
        sums |= set(range(min(numbers), min(numbers) + width // 2))
    assert len(sums) == width // 2, f"{len(sums)} registers of sums"
    for i in range(first, last + 1):
        assert i in products or not registers(code[i]) & sums, f"a sum is touched: {code[i]}"
    end = next(i for i in range(last, len(code)) if "DEPBAR.LE gsb0, 0x0" in code[i])
    for line in code[last + 1 : end]:
        assert not registers(line) & sums, f"a sum is touched after the loop: {line}"
    stored = [i for i, line in enumerate(code) if "STS.128" in line]
    if stored:  # a linear competition leaves y as it is
        told = next(i for i in range(stored[-1], len(code)) if "SYNCS.ARRIVE" in code[i])
        between = code[stored[-1] : told]
        assert any("FENCE.VIEW.ASYNC" in line for line in between), "products may read y for u"
    assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code), "local memory"
    assert any("UTMALDG.4D.IM2COL" in line for line in code), "no im2col"
    assert sum("USETMAXREG" in line for line in code) == 2, "registers do not change hands"
    return f"{last + 1 - first} instructions in the loop"


def main() -> int:
    found = kernels(*sys.argv[1:3])
    for name, code in sorted(found.items()):
        print(name, check(code))
    return not found


if __name__ == "__main__":
    sys.exit(main())
