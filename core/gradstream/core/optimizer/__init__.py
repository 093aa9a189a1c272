"""Update rules of the weights, for the servers and for the inner steps of workers."""
