"""Make plans: pure functions from a recipe and the nodes' offers to a plan with its reasons."""
