"""Machine code as `cuobjdump -sass` prints it."""

import re


def inner_loops(sass: str, skipped: bool = True) -> list[list[str]]:
    """The instructions of each loop that holds no other loop; unless `skipped`, without those that
    a branch within the loop jumps over."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]*);", sass)
    code = {int(address, 16): instruction for address, instruction in found}
    loops, jumps = [], []
    for at, instruction in code.items():
        if branch := re.match(r"BRA\b.*?(0x[0-9a-f]+)", instruction):
            to = int(branch[1], 16)
            (loops if to < at else jumps).append((min(at, to), max(at, to)))
    inner = [a for a in loops if not any(a != b and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    return [body(code, loop, [] if skipped else jumps) for loop in inner]


def body(code: dict[int, str], loop: tuple[int, int], jumps: list[tuple[int, int]]) -> list[str]:
    begin, end = loop
    within = [(at, to) for at, to in jumps if begin <= at and to <= end]
    return [
        instruction
        for at, instruction in code.items()
        if begin <= at <= end and not any(jump < at < to for jump, to in within)
    ]
