"""The worker: stage execution, the gradient stream, data and the training loop."""
