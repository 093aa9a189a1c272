"""Pretrained models: read as bases, and written for others."""
