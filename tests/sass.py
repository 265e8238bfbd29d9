"""Machine code as `cuobjdump -sass` prints it."""

import re


def inner_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that holds no other loop."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]*);", sass)
    code = {int(address, 16): instruction for address, instruction in found}
    loops = []
    for end, instruction in code.items():
        branch = re.match(r"BRA\b.*?(0x[0-9a-f]+)", instruction)
        if branch and (begin := int(branch[1], 16)) < end:
            loops.append((begin, end))
    inner = [a for a in loops if not any(a != b and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    return [[i for at, i in code.items() if begin <= at <= end] for begin, end in inner]
