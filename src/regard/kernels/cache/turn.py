"""Block-diagonal Hadamard rotations of tiles in registers."""

import triton
import triton.language as tl


@triton.jit
def rotated(x, ROWS: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr):
    """`x [ROWS, D]` times the block-diagonal Hadamard matrix of order `2^TURN`: one butterfly for every bit."""
    if TURN > 0:
        for _ in tl.static_range(TURN):
            a, b = x.reshape(ROWS * (D >> TURN), 1 << (TURN - 1), 2).split()
            # The bit that is done goes to the front; after all of them the order is what it was.
            x = tl.join(a + b, a - b).permute(0, 2, 1).reshape(ROWS, D)
        x *= 2.0 ** (-TURN / 2)
    return x
