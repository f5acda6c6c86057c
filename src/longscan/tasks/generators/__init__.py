"""Data sets that are made by code: arrays from a seed, compiled, the same on every machine and any number of threads."""
