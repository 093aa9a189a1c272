"""The machine that a process runs on: cores, memory, disk, and the speed of its device."""
