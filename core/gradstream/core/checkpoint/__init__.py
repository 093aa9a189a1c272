"""Checkpoints: the manifest and the files it names."""
