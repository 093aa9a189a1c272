"""Who is there and who is silent: membership, sessions, benches, and what nodes share."""
