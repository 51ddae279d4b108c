"""Kernels that are not used: each asks one question, and `bench/LOG.md` has the answer."""
