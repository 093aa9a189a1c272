"""A job's life: what is compared with what should be, decided, stored and told."""
