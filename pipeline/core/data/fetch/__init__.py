"""The usual data sets, from the Hugging Face hub or a local copy, into this project's files."""
