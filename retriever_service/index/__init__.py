"""Built indexes: dense, words and their updates, as files."""
