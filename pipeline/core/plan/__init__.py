"""What a run will need, computed before it starts: memory, disk, tokens, time. Plain arithmetic; nothing is loaded."""
