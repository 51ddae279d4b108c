"""Whole training steps: StochCA against whatever a user would run instead, checked first, then timed."""
