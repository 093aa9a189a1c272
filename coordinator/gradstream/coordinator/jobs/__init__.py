"""The life of a job: reconcile its actual state with the desired one, decide, store, and send to the nodes."""
