"""What ``noether-init new`` and ``example`` write: names, templates, and the one place that puts a package on disk.

Here live the rules for names (``naming``), and the files: the template and its rendering (``template/``), example
configs and loops (``loop/``) and the writing (``files``). Neither torch nor a kind is imported here; what is printed is
the command's.
"""
