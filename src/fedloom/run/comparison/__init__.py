"""Comparisons: what is run, in how many processes, and what it comes to."""
