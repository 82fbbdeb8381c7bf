"""How values are shown: folded lines, terminal, notebook. Data in, text out; nothing here reads or decides."""
