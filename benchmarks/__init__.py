"""Measurements: each row is data in JSON lines, checked for correctness before it is timed."""
