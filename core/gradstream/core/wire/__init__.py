"""The data plane's messages and calls."""
