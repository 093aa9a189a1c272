"""How kernels are compiled: by numba, once a machine, without the interpreter's lock; and the types that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic

F32 = npt.NDArray[np.float32]


I32 = npt.NDArray[np.int32]


U8 = npt.NDArray[np.uint8]


U16 = npt.NDArray[np.uint16]


F = TypeVar("F", bound=Callable[..., Any])


INFINITY_BITS = 0x7F800000


MAGNITUDE_BITS = 0x7FFFFFFF


def kernel(function: F) -> F:
    """Compile without the interpreter's lock, without fast-math, and keep the result on disk."""
    return cast(F, njit(nogil=True, cache=True, fastmath=False, error_model="numpy", boundscheck=False)(function))


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a kernel's `carray` wants it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate
