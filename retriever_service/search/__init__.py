"""Answers queries from an opened index: search, fusion of two rankings, re-ranking."""
