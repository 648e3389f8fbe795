"""Experiments: many runs that differ in named settings, under several seeds, and what comes of them together."""
