"""Services: the parameter server (and, with their issues, fine-tuning and the dashboard)."""
