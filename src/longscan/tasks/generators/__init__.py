"""Data sets that are made by code: arrays from a seed, by compiled code; the number of threads changes nothing."""
