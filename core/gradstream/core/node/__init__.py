"""What every node does: its session with the coordinator, its health, its probe."""
