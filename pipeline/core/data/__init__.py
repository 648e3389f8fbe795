"""Questions, corpora, cold-start trajectories and the generated encyclopedia."""
