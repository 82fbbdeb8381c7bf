"""Rules of surgery suggested from names and shapes alone. Pure: nothing is read, nothing is applied by itself."""
