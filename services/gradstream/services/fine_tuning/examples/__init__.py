"""Turns a task's data from rows of files into packed rows of token ids."""
