"""Workers' timelines, kept beside the job, and what a pipeline's say together."""
