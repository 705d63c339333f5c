"""Encoding of float32 numbers: by bits, so that every card and the interpreter round alike, to nearest, ties to even.

Steps of coded keys alone are found by their logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops import coding

_PER_OCTAVE, _UNIT = tl.constexpr(coding.STEPS_PER_OCTAVE), tl.constexpr(coding.UNIT_STEP)


@triton.jit
def round_bfloat16(x):
    """The nearest bfloat16 number to each finite float32, still as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_e4m3(x):
    """The float8_e4m3fn code, uint8, of each float32 in [-448, 448]; the same as torch's conversion."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Normal numbers: keep 3 of 23 fraction bits, and move the exponent's bias from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes are multiples of 2**-9, which is the spacing of float32 at 2**14.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_step(step):
    """As `hga.ops.coding.encode_steps`: the byte of each step, still as float32."""
    return tl.minimum(tl.maximum(tl.floor(tl.log2(step) * _PER_OCTAVE + (_UNIT + 0.5)), 0.0), 255.0)
