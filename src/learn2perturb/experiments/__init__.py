"""Experiments: tables of papers, computed on trained networks, beside the numbers that were published."""
