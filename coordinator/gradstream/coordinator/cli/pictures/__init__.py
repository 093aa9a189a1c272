"""Pictures of jobs: losses over steps, and the passes of a pipeline. `style.py` has their common style."""
