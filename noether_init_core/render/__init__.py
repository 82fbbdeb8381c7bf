"""How plans and reports are shown: folded lines, the terminal. Data in, text out; nothing here reads or decides."""
