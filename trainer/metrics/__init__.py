"""What is written down about a run, and the only reader and writer of it."""
