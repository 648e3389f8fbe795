"""Decides: the algorithm, its records, its configuration and the command line."""
