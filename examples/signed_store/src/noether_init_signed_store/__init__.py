"""The kind ``signed_store``: weights from a private HTTP server, used only if their publisher has signed them.

What an author of such a kind must decide, and where this package does it:

* **Who is trusted?** One Ed25519 key, named in the config. Not the server, not the network, not the cache folder: each
  may hand out anything. So the signature is checked at every start, also offline, where it costs nothing.
* **What is signed?** Name, size and SHA-256 of the file (``statement.py``). With the name, because a genuine statement
  about another file would pass otherwise. A name stands for one file without end; a new version gets a new name. So an
  old statement is harmless: it was always about the same bytes.
* **In which order?** Signature, then digest, then opening. No byte of the file is interpreted before it is known whose
  it is. The digest goes into ``Source`` as well. The core compares it on the same handle that it reads from, so a file
  that is exchanged in between is not loaded. It does so with ``verify: full``, so no other value is accepted.
* **Several processes?** ``ArtifactCache`` has one of them fetch while the others wait, and no kill leaves half a file.
* **A server that misbehaves?** There are time limits, and a limit of bytes that is known before the first one is read.
  Redirects to another scheme are refused. Only the server in the config gets the token (``fetching.py``).
* **Secrets?** The config holds the *name* of an environment variable, so that the token is in no file, dump, pickle or
  report. It is read when it is needed, so that a start from the cache needs none.
* **Errors?** Each derives from ``InitError`` and names what was asked and the next step. It is raised before the model
  has changed: ``locate`` is called while the stack checks.
"""

from noether_init_signed_store.initializer import SignedStoreConfig, SignedStoreInitializer
from noether_init_signed_store.statement import SignatureError, Statement

__all__ = ["SignatureError", "SignedStoreConfig", "SignedStoreInitializer", "Statement"]
