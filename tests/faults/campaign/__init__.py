"""The fault campaign: the same faults in large numbers, beside baselines, counted into a table and a picture.

``python -m faults.campaign`` with ``tests`` on the path runs it; ``--help`` says the rest.
"""
