"""How the Triton kernels turn words of 4-bit or 8-bit codes into 16-bit weights: assembly, and a twin in plain Triton.

The arithmetic is that of w4a16_layout: a masked code is the number q * 2^-24 (bfloat16: 2^-133), and

    symmetric      fma(code, scale, -8 * scale)     -128 * scale for 8-bit codes
    zero points    (code - zero) * scale            the difference is exact

so that each weight is rounded once. Nibbles 0 and 2 of a word are masked where the unit is 2^-24, nibbles 1 and 3 where
it is 2^-20: their scale is a sixteenth, their zero point lies four bits higher. The two bytes of a word of 8-bit codes
are both moved to where the unit is 2^-24. Knows nothing about tiles.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def assembly(bfloat16: bool, pair: int, zeros: bool, bits: int = 4) -> str:
    """A 32-bit register (two words) to two registers of two weights, of codes 2 pair and 2 pair + 1.

    $2 words, $3, $4 scales, $5, $6 the other terms. With fma alone: before sm_90 bfloat16 has nothing else.
    """
    kind, one = ("bf16x2", "0x3f803f80") if bfloat16 else ("f16x2", "0x3c003c00")
    lines = ["{", ".reg .b32 w, n<2>, one, none;"]
    if bits == 4:
        lines.append(f"shr.u32 w, $2, {8 * pair};" if pair else "mov.b32 w, $2;")
        lines += ["and.b32 n0, w, 0x000f000f;", "and.b32 n1, w, 0x00f000f0;"]
    else:
        lines += ["and.b32 n0, $2, 0x00ff00ff;", "prmt.b32 n1, $2, 0, 0x4341;"]
    if zeros:
        lines += [f"mov.b32 one, {one};", "mov.b32 none, 0x80008000;"]
    for i in range(2):
        if zeros:
            lines.append(f"fma.rn.{kind} n{i}, n{i}, one, ${5 + i};")
            lines.append(f"fma.rn.{kind} ${i}, n{i}, ${3 + i}, none;")
        else:
            lines.append(f"fma.rn.{kind} ${i}, n{i}, ${3 + i}, ${5 + i};")
    return "\n".join([*lines, "}"])


@triton.jit
def unpack(words, pair: tl.constexpr, s0, s1, t0, t1, ZEROS: tl.constexpr):
    """Nibbles 2 pair and 2 pair + 1 of each word as weights.

    words: int16 of any shape whose neighbours lie in one register. s0, s1, t0, t1: like words, from `scale_terms`.
    """
    if s0.dtype == tl.bfloat16:
        a = tl.inline_asm_elementwise(assembly(True, pair, ZEROS), "=r,=r,r,r,r,r,r", [words, s0, s1, t0, t1],
                                      dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)  # fmt: skip
    else:
        a = tl.inline_asm_elementwise(assembly(False, pair, ZEROS), "=r,=r,r,r,r,r,r", [words, s0, s1, t0, t1],
                                      dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    return a


@triton.jit
def minus_half(scale, BITS: tl.constexpr):
    """-8 or -128 times scale as a weight has it: -2^-21 or -2^-17 of what is stored, in bfloat16 -2^-130 or -2^-126.

    There on the bits: ptxas (12.8 to 13.0) takes a bfloat16 product with so small a constant for one with zero. What
    would be subnormal is zero: such a scale is 2^-120 of the largest one.
    """
    SHIFT: tl.constexpr = 130 if BITS == 4 else 126
    if scale.dtype == tl.bfloat16:
        bits = scale.to(tl.int16, bitcast=True)
        product = tl.where((bits & 0x7FFF) > (SHIFT << 7), (bits - (SHIFT << 7)) ^ -0x8000, 0).to(tl.int16)
        term = product.to(tl.bfloat16, bitcast=True)
    else:
        term = scale * -(2.0**-21 if BITS == 4 else 2.0**-17)
    return term


@triton.jit
def scale_terms(scale, zero, ZEROS: tl.constexpr):
    """scale, and the other three operands of `unpack`: scale / 16, and -8 * scale or the two forms of a zero point."""
    s1 = scale * 0.0625
    if ZEROS:
        t0 = zero.to(scale.dtype, bitcast=True)
        t1 = ((zero << 4) | -32768).to(tl.int16).to(scale.dtype, bitcast=True)
    else:
        t0 = minus_half(scale, 4)
        t1 = t0
    return scale, s1, t0, t1


@triton.jit
def unpack_plain(words, n: tl.constexpr, scale, zero, ZEROS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Code `n` of each word as a weight in `D`, without assembly: the same value, rounded once as well."""
    LARGEST: tl.constexpr = (1 << BITS) - 1
    code = ((words.to(tl.int32) >> (BITS * n)) & LARGEST).to(tl.float32)
    if ZEROS:
        code -= (zero.to(tl.int32) & LARGEST).to(tl.float32)
    else:
        code -= 1 << (BITS - 1)
    unit = scale.to(tl.float32) * 2.0**-24
    if scale.dtype == tl.bfloat16:
        unit *= 2.0**-109  # 2^-133 in two steps, since float32 itself has it only as a subnormal number
    return (code * unit).to(D)
