"""The shape legend of the whole library. Every docstring uses these letters and no others.

| letter | meaning |
|---|---|
| `B`   | batch rows |
| `H`   | query heads |
| `Hk`  | key/value heads; `Hk` divides `H`, query head `h` reads key head `h // (H // Hk)` |
| `T`   | queries of this call |
| `S`   | keys held |
| `D`   | head dimension of queries and keys |
| `Dv`  | head dimension of values |
| `L`   | layers |

Attention tensors are `[B, H, T, D]`, log-sum-exps `[B, H, T]` in float32 (float64 for float64 inputs).

An *arrival* counts every token of a row from 0, padding included; it is the same number in all
rows of a batch. A *position* counts real tokens only: `position = arrival - left padding`, negative
for padding. Patterns speak of positions, stores of arrivals.
"""

from torch import Tensor

from regard.core.errors import RegardError


def group_size(q: Tensor, k: Tensor) -> int:
    """Query heads per key head, `H // Hk`, for `q [B, H, T, D]` and `k [B, Hk, S, D]`.

    Raises:
        RegardError: `Hk` does not divide `H`.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    if heads % key_heads:
        raise RegardError(f"{key_heads} key heads do not divide {heads} query heads")
    return heads // key_heads


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size` (1 or more).

    Triton has one too, which takes 4.5 microseconds on the host: too long where a decoded token needs several.
    """
    return 1 << (size - 1).bit_length()
