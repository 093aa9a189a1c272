"""Exports of fine-tunings' results as files for other programs."""
