"""Compiled CPU kernels of the codecs."""
