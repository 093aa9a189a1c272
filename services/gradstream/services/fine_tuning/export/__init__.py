"""What came of a fine-tuning, as files for others."""
