"""What lies below the actors: plain Python and torch, no Ray, no engine."""
