"""Where bytes lie: file handles, operations on folders, files that were fetched. Nothing here knows a format."""
