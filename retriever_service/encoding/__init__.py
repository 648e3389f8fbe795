"""From texts to vectors: encoders, and corpora encoded once, on many processes."""
