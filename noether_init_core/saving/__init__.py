"""The only writer: content of sets, the commit, retention and clean-up, flat names, files of weights, probes."""
