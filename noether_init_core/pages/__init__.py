"""Pages: a plan, a report, a comparison or a lineage as one HTML file that needs nothing else.

What stands on a page comes from the JSON of its value, which is embedded in it; scripts and styles are in ``assets``.
"""
