"""Questions, corpora, warm-up trajectories and the generated encyclopedia."""
