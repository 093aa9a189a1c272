"""What nodes and steps tell of themselves."""
