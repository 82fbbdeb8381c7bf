"""Comparing: two checkpoints side by side, by keys, shapes and how far each tensor moved.

``compare`` says which files a path means and puts things together, ``drift`` makes numbers of two tensors piece by
piece.
"""
