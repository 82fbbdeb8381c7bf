"""Faults put in on purpose: damaged bytes, killed and failing saves, crashes of the whole machine, hostile headers.

The tests here are quick. ``campaign`` holds what they share with the large one, which ``make faults`` runs.
"""
