"""Models: inventory, stages, adapters, gradients, and whether one can be trained."""
