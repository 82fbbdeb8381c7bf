"""Suggests rules of surgery from names and shapes alone. Pure: reads no file, and applies no rule."""
