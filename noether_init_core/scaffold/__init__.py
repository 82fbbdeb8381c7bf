"""The files that ``ninit new`` and ``ninit example`` write: names, templates, and the writing of a new folder.

``package`` holds the rules for names and the writing, ``template/`` the template of a package, ``loop/`` the example
configs and loops. Nothing here imports torch or a kind, and nothing is printed: the commands print.
"""
