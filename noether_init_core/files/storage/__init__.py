"""Storage: file handles, operations on folders, a cache of fetched files. Nothing here knows a format."""
