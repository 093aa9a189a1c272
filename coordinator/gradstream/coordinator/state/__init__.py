"""What the coordinator remembers across a restart, and those who watch it grow."""
