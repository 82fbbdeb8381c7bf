"""Comparing: two checkpoints side by side, by keys, shapes and how far each tensor moved.

``sides`` says which files a path means, ``drift`` makes numbers of two tensors piece by piece, ``values`` holds what
was found, ``compare`` puts them together.
"""
