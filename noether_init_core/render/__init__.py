"""How values are shown: folded lines, terminal, notebook. Takes data, returns text; reads no file."""
