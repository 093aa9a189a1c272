"""The messages and calls of the data plane."""
