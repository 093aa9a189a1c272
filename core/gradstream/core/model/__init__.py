"""Models: inventory, initial weights, stages, adapters, weight gradients, and checks before training."""
