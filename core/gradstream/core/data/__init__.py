"""Data sets: the manifest, the sampler, sources and their rows."""
