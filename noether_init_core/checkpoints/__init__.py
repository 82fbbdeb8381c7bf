"""Files: the naming grammar, the one seam for file operations, readers, the manifest, the store and the writer.

Nothing here knows of models, rules or kinds, and nothing here changes a model.
"""
