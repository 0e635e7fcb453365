"""Settings of Sphinx; build with ``sphinx-build -W docs docs/build``."""

import odeopt

project, author, version = "odeopt", "the authors of odeopt", odeopt.__version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["build"]

html_theme = "furo"
html_title = f"odeopt {version}"
html_copy_source = False
html_static_path, html_css_files = ["static"], ["wide.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what a class does like its base is documented there
autodoc_typehints = "none"  # the signatures show them
napoleon_use_ivar = True  # attributes of tuples and dataclasses are documented once


def list_references(app, what, name, obj, options, lines):
    """Make a list of the references of a docstring, which has them line by line."""
    if "References:" in lines:
        start = lines.index("References:") + 1
        for i, line in enumerate(lines[start:], start):
            if line and not line.startswith(" "):
                break
            if line and not line.startswith("     "):
                lines[i] = f"    - {line.strip()}"


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which the docstring of the class explains."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Take part in the reading of docstrings, before their sections are understood."""
    app.connect("autodoc-process-docstring", list_references, priority=100)
    app.connect("autodoc-skip-member", skip_fields)
