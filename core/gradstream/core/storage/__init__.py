"""Files: on any file system, private, small, shared; where paths may lead; threads for storage that may hang."""
