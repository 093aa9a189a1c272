"""The `gradstream` command. `--help` imports little; a command's module is imported when the command is used."""

from gradstream.coordinator.cli.app import main

__all__ = ["main"]
