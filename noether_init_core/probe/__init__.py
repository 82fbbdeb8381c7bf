"""Probes: a batch and the outputs of a model, to compare a loaded model with the saved one.

``outputs`` records and compares outputs; ``probe`` runs a model and restores its state. Nothing here reads or writes
files.
"""
