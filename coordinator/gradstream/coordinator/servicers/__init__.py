"""What others call, and what they see: decode, check, call, encode."""
