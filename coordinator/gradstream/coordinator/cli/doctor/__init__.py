"""`gradstream doctor`: facts, conclusions, and the command."""
