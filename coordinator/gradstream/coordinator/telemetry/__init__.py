"""Workers' timelines, the times of steps by cause, a pipeline's bubble, and a job's metrics."""
