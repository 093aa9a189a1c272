"""Pretrained models: bases, their files and tokenizers, and exports that other tools load."""
