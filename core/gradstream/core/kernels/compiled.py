"""The compilation of kernels by numba, once on each machine, and the types that kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic

F32 = npt.NDArray[np.float32]


I8 = npt.NDArray[np.int8]


I32 = npt.NDArray[np.int32]


U8 = npt.NDArray[np.uint8]


U16 = npt.NDArray[np.uint16]


U32 = npt.NDArray[np.uint32]


F = TypeVar("F", bound=Callable[..., Any])


INFINITY_BITS = 0x7F800000


MAGNITUDE_BITS = 0x7FFFFFFF


def kernel(function: F) -> F:
    """Compile a function to run without the interpreter lock and without fast-math; cache the result on disk."""
    return cast(F, njit(nogil=True, cache=True, fastmath=False, error_model="numpy", boundscheck=False)(function))


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer for numba's `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate
