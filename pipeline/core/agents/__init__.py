"""Programs that a rollout worker runs."""
