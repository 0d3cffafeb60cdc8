"""Run a program whose Triton kernels are interpreted on the CPU: python tests/interpreter.py PROGRAM [ARG...]

The interpreter makes the type of every value anew, which takes two fifths of its time; here one of a name and
shape is made once. What is computed stays Triton's.
"""

import math
import os
import runpy
import sys
from functools import cache

os.environ["TRITON_INTERPRET"] = "1"  # read at import

import triton.language.core as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def keep_types() -> None:
    fill, made = tl.block_type.__init__, {}

    def block_type(cls, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            made[key] = object.__new__(cls)
            fill(made[key], element_ty, shape)
        return made[key]

    tl.block_type.__new__ = block_type
    tl.block_type.__init__ = lambda *args: None


def keep_shapes() -> None:
    @cache
    def kept(*shape):
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def fill(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = kept(*(type.shape.values if type.is_block() else ()))

    tl.tensor.__init__ = fill


def keep_dtypes() -> None:
    find, found = interpreter._get_np_dtype, {}

    def np_dtype(of):
        if of.name not in found:
            found[of.name] = find(of)
        return found[of.name]

    interpreter._get_np_dtype = np_dtype


def pass_over_equal_shapes() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_where_needed(self, lhs, rhs):
        types = lhs.type, rhs.type
        if all(of.is_block() for of in types) and types[0].shape.values == types[1].shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_where_needed


if __name__ == "__main__":
    for each in (keep_types, keep_shapes, keep_dtypes, pass_over_equal_shapes):
        each()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
