"""Measure: the comparison harness behind `benchmarks/`, this machine's limits, and the table made from a result file."""
