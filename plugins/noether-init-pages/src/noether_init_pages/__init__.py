"""Pages: a plan, a report, a comparison or a lineage of noether-init as one HTML file that needs nothing else.

What stands on a page comes from the JSON of its value, which is embedded in it; scripts and styles are in ``assets``.
"""

from noether_init_pages.page import SaysItself, html_page

__all__ = ["SaysItself", "html_page"]
