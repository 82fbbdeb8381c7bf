"""A probe: a batch, and what a model makes of it, so that a loaded model can be held to what the saved one computed.

``isolated_run`` runs a model without a trace; ``outputs`` keeps what came out and compares;
``probe`` puts both together. Nothing here reads or writes files.
"""
