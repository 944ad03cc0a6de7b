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
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def step_and_lo(affine):
    """The two float32 of a word of eight bytes."""
    return (affine & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), (affine >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _nibble(word, SHIFT: tl.constexpr):
    """128 and four bits of a word."""
    return (((word >> SHIFT) & 15) + 128).to(tl.float32).to(tl.bfloat16)


@triton.jit
def of_word(word):
    """128 + code of a word's nibbles: low ones of bytes 0, 2, 1, 3, then high ones."""
    if INTERPRETED:
        return (
            _nibble(word, 0), _nibble(word, 16), _nibble(word, 8), _nibble(word, 24),
            _nibble(word, 4), _nibble(word, 20), _nibble(word, 12), _nibble(word, 28),
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, mask, base;
            mov.b32 mask, 0x000F000F; mov.b32 base, 0x43004300;
            lop3.b32 a, $8, mask, base, 0xEA;
            shr.u32 b, $8, 8; lop3.b32 b, b, mask, base, 0xEA;
            shr.u32 c, $8, 4; lop3.b32 c, c, mask, base, 0xEA;
            shr.u32 d, $8, 12; lop3.b32 d, d, mask, base, 0xEA;
            mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
            }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,r", [word],
            dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1,
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
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, a, b, c, d, e, f, g, h, mask, base;
            mov.b32 mask, 0x000F000F; mov.b32 base, 0x43004300;
            prmt.b32 x, $16, $17, 0x5410; prmt.b32 y, $16, $17, 0x7632;
            lop3.b32 a, x, mask, base, 0xEA;
            shr.u32 b, x, 4; lop3.b32 b, b, mask, base, 0xEA;
            shr.u32 c, x, 8; lop3.b32 c, c, mask, base, 0xEA;
            shr.u32 d, x, 12; lop3.b32 d, d, mask, base, 0xEA;
            lop3.b32 e, y, mask, base, 0xEA;
            shr.u32 f, y, 4; lop3.b32 f, f, mask, base, 0xEA;
            shr.u32 g, y, 8; lop3.b32 g, g, mask, base, 0xEA;
            shr.u32 h, y, 12; lop3.b32 h, h, mask, base, 0xEA;
            mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
            mov.b32 {$8, $9}, e; mov.b32 {$10, $11}, f; mov.b32 {$12, $13}, g; mov.b32 {$14, $15}, h;
            }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r", [first, second],
            dtype=(tl.bfloat16,) * 16, is_pure=True, pack=1,
        )  # fmt: skip
