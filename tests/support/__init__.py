"""Helpers shared by tests: a real cluster of processes, small real data, tiny models."""
