"""Codes as the tensor cores take them: a nibble put into the low bits of 128.0, two with one instruction."""

import triton
import triton.language as tl

# Triton's interpreter knows no assembly, and multiplies bfloat16 as if it were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """`a @ b`, accumulated in float32."""
    if INTERPRETED:  # noqa: SIM108, Triton compiles one branch
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def to_bfloat16(x):
    """Rounded to the nearest, as a GPU does and the interpreter does not."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        # Two with one instruction, where Triton takes one each on a slower unit.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def step_and_lo(affine):
    """The two float32 of a word of eight bytes."""
    return (affine & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), (affine >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


@triton.jit
def reciprocal(x):
    """1 / x of what is neither subnormal nor close to overflow, in one instruction where a division takes ten."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _nibble(word, SHIFT: tl.constexpr):
    """128 and four bits of a word."""
    return (((word >> SHIFT) & 15) + 128).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _half(word, SHIFT: tl.constexpr):
    """The bfloat16 in 16 bits of a word.

    Two halves that meet again are the word itself to the compiler; as outputs of 16 bits it moved most of them.
    """
    return (word >> SHIFT).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def of_word(word):
    """128 + code of a word's nibbles: low ones of bytes 0, 2, 1, 3, then high ones."""
    if INTERPRETED:
        return (
            _nibble(word, 0), _nibble(word, 16), _nibble(word, 8), _nibble(word, 24),
            _nibble(word, 4), _nibble(word, 20), _nibble(word, 12), _nibble(word, 28),
        )  # fmt: skip
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, z, mask, base;
            mov.b32 mask, 0x000F000F; mov.b32 base, 0x43004300;
            shr.u32 x, $4, 8; shr.u32 y, $4, 4; shr.u32 z, $4, 12;
            lop3.b32 $0, $4, mask, base, 0xEA; lop3.b32 $1, x, mask, base, 0xEA;
            lop3.b32 $2, y, mask, base, 0xEA; lop3.b32 $3, z, mask, base, 0xEA;
            }""",
            "=r,=r,=r,=r,r", [word],
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
        return (
            _half(a, 0), _half(a, 16), _half(b, 0), _half(b, 16), _half(c, 0), _half(c, 16), _half(d, 0), _half(d, 16),
        )  # fmt: skip


@triton.jit
def of_two(first, second):
    """128 + code of the nibbles of two words, side by side: of byte 0 low and high, byte 1, byte 2, byte 3."""
    if INTERPRETED:
        return (
            _nibble(first, 0), _nibble(second, 0), _nibble(first, 4), _nibble(second, 4),
            _nibble(first, 8), _nibble(second, 8), _nibble(first, 12), _nibble(second, 12),
            _nibble(first, 16), _nibble(second, 16), _nibble(first, 20), _nibble(second, 20),
            _nibble(first, 24), _nibble(second, 24), _nibble(first, 28), _nibble(second, 28),
        )  # fmt: skip
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, i, j, k, l, m, n, mask, base;
            mov.b32 mask, 0x000F000F; mov.b32 base, 0x43004300;
            prmt.b32 x, $8, $9, 0x5410; prmt.b32 y, $8, $9, 0x7632;
            shr.u32 i, x, 4; shr.u32 j, x, 8; shr.u32 k, x, 12;
            shr.u32 l, y, 4; shr.u32 m, y, 8; shr.u32 n, y, 12;
            lop3.b32 $0, x, mask, base, 0xEA; lop3.b32 $1, i, mask, base, 0xEA;
            lop3.b32 $2, j, mask, base, 0xEA; lop3.b32 $3, k, mask, base, 0xEA;
            lop3.b32 $4, y, mask, base, 0xEA; lop3.b32 $5, l, mask, base, 0xEA;
            lop3.b32 $6, m, mask, base, 0xEA; lop3.b32 $7, n, mask, base, 0xEA;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [first, second],
            dtype=(tl.int32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
        return (
            _half(a, 0), _half(a, 16), _half(b, 0), _half(b, 16), _half(c, 0), _half(c, 16), _half(d, 0), _half(d, 16),
            _half(e, 0), _half(e, 16), _half(f, 0), _half(f, 16), _half(g, 0), _half(g, 16), _half(h, 0), _half(h, 16),
        )  # fmt: skip
