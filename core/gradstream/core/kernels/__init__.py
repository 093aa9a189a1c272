"""CPU kernels of the codecs, compiled by numba."""
