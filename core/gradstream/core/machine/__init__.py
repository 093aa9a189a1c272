"""The machine that a process runs on: cores, memory, disk, and how fast its device is."""
