"""Read the sets of a run on disk: names, tags, manifests, selection of a set by tag, refusals, health, provenance.

Nothing here knows a model, and nothing here writes.
"""
