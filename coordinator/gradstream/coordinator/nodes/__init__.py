"""Live and silent nodes: membership, sessions, benches, and checks of shared storage."""
