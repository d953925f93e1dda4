"""Shape annotations are checked in every test: a wrong one fails."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("moescope", "beartype.beartype")
