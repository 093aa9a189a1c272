"""What tests share: a real cluster of processes, small real data, tiny models."""
