"""The operator against what a user would call instead: checked first, then timed."""
