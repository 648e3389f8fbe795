"""Behind HTTP or an actor: batches, cache, life of a server, routes. The engine itself knows nothing of it."""
