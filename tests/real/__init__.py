"""Files that the libraries themselves write, in an environment of their own: ``make test-real``."""
