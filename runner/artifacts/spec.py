"""What a stored tensor is, in the words of safetensors. No torch."""

from typing import TypedDict

MOST_BYTES = 8 * 2**30


class Spec(TypedDict):
    """What a tensor is: its dtype as safetensors spells it, and its shape."""

    dtype: str
    shape: list[int]


# Each dtype as torch calls it.
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
