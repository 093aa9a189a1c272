"""Compiled CPU kernels: of the codecs, and of a decoder's layers."""
