"""Lineage: which runs and files the weights of a run came from, and what came from it.

``graph`` holds the values and what follows from them, pure; ``reading`` looks into folders. Manifests and records of
provenance are all that is read: no tensor, and no torch.
"""
