"""Compare two checkpoints by keys, shapes and the difference of each tensor.

``compare`` finds the files and collects the results; ``drift`` compares two tensors piece by piece.
"""
