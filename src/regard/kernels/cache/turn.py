"""Block-diagonal Hadamard rotations of tiles in registers."""

import triton
import triton.language as tl

from regard.kernels.cache.codes import dot


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


@triton.jit
def turned(x, COLUMNS: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr):
    """`rotated` of bfloat16 vectors, one product for four bits: channel `16 h + i` of vector c lies at `[i, h, c]`.

    One warp rotates eight vectors with an eighth of the instructions: channels that butterflies join lie in different
    threads for the lowest bits alone, and these the product sums.
    """
    HIGH: tl.constexpr = D // 16
    if TURN > 0:
        LOW: tl.constexpr = min(TURN, 4)
        LEFT: tl.constexpr = TURN - LOW
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        odd = i & j & ((1 << LOW) - 1)
        odd ^= odd >> 2
        odd ^= odd >> 1
        signs = tl.where((i >> LOW) == (j >> LOW), 1 - 2 * (odd & 1), 0).to(tl.float32).to(tl.bfloat16)
        x = dot(signs, x.reshape(16, HIGH * COLUMNS)).reshape(16, HIGH, COLUMNS)
        for _ in tl.static_range(LEFT):
            a, b = x.reshape(16, HIGH >> LEFT, 1 << (LEFT - 1), 2, COLUMNS).permute(0, 1, 2, 4, 3).split()
            x = tl.join(a + b, a - b).permute(0, 1, 4, 2, 3).reshape(16, HIGH, COLUMNS)
        x *= 2.0 ** (-TURN / 2)
    return x
