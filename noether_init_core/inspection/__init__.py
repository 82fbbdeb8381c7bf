"""What is in a file, a set, a run or an output root, and which runs lie below a folder: findings, as values.

Names, manifests and headers are all that is read, and nothing is created. Torch is not needed.
"""
