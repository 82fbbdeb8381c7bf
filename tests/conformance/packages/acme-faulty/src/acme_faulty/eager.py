"""A module that does something when it is imported."""

import os

from acme_good import FolderInitializer

os.environ.setdefault("ACME_CACHE", "somewhere")


class WorksAtImport(FolderInitializer):
    """Sets an environment variable for everybody."""

    contract = 1
