"""P-Tuning v1: virtual tokens anywhere in the input."""
