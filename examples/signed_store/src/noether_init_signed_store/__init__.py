"""The kind ``signed_store``: weights from a private HTTP server, used only if their publisher has signed them.

What whoever writes such a kind must think of, and where it is done here:

* **Who is trusted?** One Ed25519 key, named in the config. Not the server, not the network, not the cache folder: each
  may hand out anything. So the signature is checked at every start, also offline, where it costs nothing.
* **What is signed?** Name, size and SHA-256 of the file (``statement.py``). With the name, because a genuine statement
  about another file would pass otherwise. A name means one file for ever; a new version gets a new name. That is also
  what makes an old statement harmless: there is none that was ever about other bytes.
* **In which order?** Signature, then digest, then opening. No byte of the file is interpreted before it is known whose
  it is. The digest goes into ``Source`` as well: the core compares it on the very handle that it then reads from, so
  that a file that is exchanged in between is not loaded. It does so with ``verify: full``, hence nothing else is taken.
* **Several processes?** ``ArtifactCache`` has one of them fetch while the others wait, and no kill leaves half a file.
* **A server that misbehaves?** Time limits, a limit of bytes known before the first one is read, no redirect to another
  scheme, the token sent to nobody but the server that the config names (``fetching.py``).
* **Secrets?** The config holds the *name* of an environment variable, so that the token is in no file, dump, pickle or
  report. It is read when it is needed, so that a start from the cache needs none.
* **Errors?** Each derives from ``InitError``, says what was asked and the next step, and is raised before the model has
  changed: ``locate`` is called while the stack checks.
"""

from noether_init_signed_store.initializer import SignedStoreConfig, SignedStoreInitializer
from noether_init_signed_store.statement import SignatureError, Statement

__all__ = ["SignatureError", "SignedStoreConfig", "SignedStoreInitializer", "Statement"]
