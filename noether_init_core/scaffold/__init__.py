"""What ``ninit new`` and ``example`` write: names, templates, and the one place that puts a package on disk.

Here live the rules for names and the writing (``package``), the template of a package (``template/``), example configs
and loops (``loop/``). Neither torch nor a kind is imported here; what is printed is the command's.
"""
