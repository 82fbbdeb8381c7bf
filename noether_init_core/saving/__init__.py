"""The only writer of sets: content, commit, retention, clean-up, flat names, files of weights, probes."""
