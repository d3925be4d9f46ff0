"""The documentation site: ``sphinx-build -W --keep-going docs build/docs``."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from typing import Any

project = "ramp_fast"
author = "the authors of ramp_fast"
version = release = installed("ramp-fast")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes = False  # quotes are those of Python
html_theme = "furo"
html_title = f"ramp_fast {release}"
html_static_path: list[str] = []

# Signatures show types; numpydoc sections say what they mean.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Data": "Data", "Model": "Model", "Method": "Method"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# A reference that leads nowhere is a warning. Types are another matter: those of other libraries have no page here, and
# numpydoc describes many in words.
nitpicky = True
nitpick_ignore_regex = [(r"py:(class|obj|exc)", r"(?!ramp_fast\.).*")]

# Where the pages' links to other files of the repository lead: GitHub Actions says it. Elsewhere they are text.
_repository = os.environ.get("GITHUB_REPOSITORY")
_source = f"{os.environ.get('GITHUB_SERVER_URL')}/{_repository}/blob/{os.environ.get('GITHUB_REF_NAME')}"


def _link_repository(app: Any, page: str, source: list[str]) -> None:
    target = rf"[\1]({_source}/\2)" if _repository else r"\1"
    source[0] = re.sub(r"\[([^]]*)\]\(\.\./([^)]*)\)", target, source[0])


def _in_a_signature(app: Any, domain: Any, node: Any) -> bool | None:
    """Be silent about types of annotations, which may be private; a role in a docstring names what it wants found."""
    return True if "refwarn" not in node else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("warn-missing-reference", _in_a_signature)
    app.connect("source-read", _link_repository)
