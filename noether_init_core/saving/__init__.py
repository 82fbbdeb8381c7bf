"""The only writer of sets: their content, the commit, retention and clean-up."""
