"""The documentation as a site: sphinx-build -W --keep-going docs build/site"""

from importlib.metadata import version as version_of

project = "stagerun"
author = "the authors of stagerun"
version = release = version_of("stagerun")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4

# In the order of the sources, and under each field of a dataclass the line that says what it is.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
add_module_names = False

html_theme = "furo"
html_title = "stagerun"
html_show_copyright = False
# One parameter a line where a signature is wide.
maximum_signature_line_length = 80
