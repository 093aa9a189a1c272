"""Parts that all nodes share: the session with the coordinator, health, the probe, the process."""
