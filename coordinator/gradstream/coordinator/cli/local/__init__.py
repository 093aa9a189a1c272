"""A cluster and its processes on this machine."""
