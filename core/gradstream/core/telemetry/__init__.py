"""Timelines: what a worker did and when, and the trace formats of it."""
