"""Training losses, one file per family. Each maps log-probabilities of target tokens to a share of the loss."""
