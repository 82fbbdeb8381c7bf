"""What ``noether-init new`` and ``example`` write: names, templates, and the one place that puts a package on disk.

Here live the rules for names (``naming``), the template and its rendering (``render``, ``template/``), example configs
and loops (``example``, ``loop/``) and the writing
(``writing``). Neither torch nor a kind is imported here; what is printed is the command's.
"""
