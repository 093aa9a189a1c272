"""The output of commands: tables, numbers, progress."""
