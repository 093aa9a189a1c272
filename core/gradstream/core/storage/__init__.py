"""Files on any file system, private files, locks, allowed paths, and threads for storage that may hang."""
