"""Data sets that are made by code: arrays from a seed, compiled, the same on any machine and any number of threads."""
