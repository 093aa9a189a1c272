"""Data sets: the manifest, which samples a slot takes, sources and their rows."""
