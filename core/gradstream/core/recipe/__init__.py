"""Recipes: their sections, defaults and files, and how they are read and validated."""
