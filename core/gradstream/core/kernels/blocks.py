"""Block sizes of the codecs, for the kernels and for the size arithmetic of plans."""

from __future__ import annotations

BLOCK = 256
"""Number of elements that share a scale in int8, int4 and sign."""


TOPK_CHUNK = 4096


TOPK_PART = 64
"""topk keeps one element of every 64, hence 64 of a whole chunk."""
