"""Instructed retrieval as a benchmark: tasks, who searches, and what comes of it."""
