"""Timelines of workers, and their trace format."""
