"""Sets of a run on disk, read only: names, tags, manifests, which set a tag means, refusals, health, provenance.

Nothing here knows a model, and nothing here writes.
"""
