"""The `gradstream` command. Only what `--help` needs is imported; a command's module comes with its first use."""

from gradstream.coordinator.cli.app import main

__all__ = ["main"]
