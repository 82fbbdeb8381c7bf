"""Inspect a file, a set, a run or an output root, and return the findings as values.

Only names, manifests and headers are read, and nothing is written. Torch is not imported.
"""
