"""Makes an index: the plan, the build, and the tuning of its search."""
