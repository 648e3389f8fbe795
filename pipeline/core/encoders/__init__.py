"""Training of sentence encoders: hard negatives, and sentence-transformers' own trainer."""
