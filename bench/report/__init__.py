"""Renders recorded results into the pages, where no number is typed: `python -m bench.report`."""
