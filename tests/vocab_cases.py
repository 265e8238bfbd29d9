"""The calls of `test_vocab_parallel`, of whole rows or of one rank's shard of them.

A case is a function of a `Share` that returns (what must be the same on every rank, what is this
rank's part of a tensor cut in dimension `dim`: name -> (part, dim)).
"""

import vocab_linear_cases
import vocab_logits_cases

CASES = {**vocab_logits_cases.CASES, **vocab_linear_cases.CASES}

# Cuts other than SIZES, with a rank of one entry and with a rank of none.
OTHER_SIZES = {2: ((1, 62), (0, 63)), 3: ((7, 1, 55), (31, 0, 32))}
