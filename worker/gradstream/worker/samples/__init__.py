"""The samples of the slots that a worker computes."""
