"""Training losses, one file per family. Each maps what a model computed of a packed row to a share of the loss."""
