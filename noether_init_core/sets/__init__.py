"""Sets of a run on disk, read only: names, tags, manifests, which set a tag means, and whether it is sound.

Nothing here knows a model, a kind or a rule, and nothing here writes.
"""
