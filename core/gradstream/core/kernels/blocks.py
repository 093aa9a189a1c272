"""Sizes of the blocks that codecs work in, for the kernels and for the arithmetic of plans."""

from __future__ import annotations

BLOCK = 256
"""Elements that share a scale: int8, int4, sign."""


TOPK_CHUNK = 4096


TOPK_PART = 64
"""topk keeps one element of every 64: 64 of a whole chunk."""
