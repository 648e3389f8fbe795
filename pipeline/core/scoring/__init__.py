"""Scores of answers, evidence and whole files of predictions, as the data sets define them."""
