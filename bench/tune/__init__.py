"""Tuning: rows for the tables of tiles and of winners, timed on this GPU. Nothing runs it but its command."""
