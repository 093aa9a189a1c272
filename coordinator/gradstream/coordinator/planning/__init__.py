"""Plans: pure functions from what is asked and offered to a plan with its reasons."""
