"""Holds state and devices: every Ray actor, and nothing but actors."""
