"""Pictures of jobs: losses over steps, and the passes of a pipeline. `style.py` is what all pictures share."""
