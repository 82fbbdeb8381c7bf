"""A probe: a batch, and what a model makes of it, so that a loaded model can be held to what the saved one computed.

``outputs`` keeps what came out and compares; ``probe`` runs a model without a trace. Nothing here reads or writes
files.
"""
