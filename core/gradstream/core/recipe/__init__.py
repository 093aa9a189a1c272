"""Recipes: what a person writes, its defaults, and how it is read."""
