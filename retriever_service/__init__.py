"""Dense retrieval as a library: corpus, encoder, index, search. No Ray, no language model."""
