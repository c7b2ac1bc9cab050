"""Configuration of Sphinx. `make docs` builds the pages; a warning is an error there."""

import dynquant

project = "dynquant"
author = "The dynquant developers"
copyright = f"2026, {author}"
release = version = dynquant.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

# The docstrings name types with their shapes and dtypes; the annotations would say it again, and less.
autodoc_typehints = "none"
autosummary_generate = True
# PyTorch is large, and its builds differ from system to system: the docstrings do without.
autodoc_mock_imports = ["torch", "transformers", "safetensors"]
default_role = "py:obj"
numpydoc_class_members_toctree = False
numpydoc_show_inherited_class_members = False

toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = f"dynquant {release}"
html_static_path = ["_static"]
html_css_files = ["dynquant.css"]
html_theme_options = {
    "logo": {"text": "dynquant"},
    "header_links_before_dropdown": 5,
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
# Pages that have no pages below them.
html_sidebars = {
    name: []
    for name in (
        "index",
        "getting_started",
        "accuracy",
        "performance",
        "c_and_cython",
        "limits",
        "design",
        "changelog",
    )
}
html_show_sourcelink = False
