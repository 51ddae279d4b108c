"""Measures the package against what a user would pick instead."""
