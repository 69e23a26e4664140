"""What groups cost and what they are good for: `python -m benchmarks.groups`."""
