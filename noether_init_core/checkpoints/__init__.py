"""Files: the naming grammar, the one seam for file operations, readers, the manifest, the store and the writer.

Only the writer knows of models. Nothing here knows of rules or kinds, and nothing here changes a model.
"""
