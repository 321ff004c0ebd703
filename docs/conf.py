"""The book: `sphinx-build docs _book` makes pages of the notebooks as they are stored; nothing is executed."""

import json
import re
import shutil
from pathlib import Path

root, pages = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent / "pages"
shown = ["nbs/[0-9]*.ipynb", "nbs/runs/*.ipynb", "nbs/studies/*.ipynb", "CONTRIBUTING.md", "LOG.md", "README.md"]
shown += ["CITATION.cff", "LICENSE", "papermill_runs/*/report.md", "papermill_runs/*/*.png", "figures/*.png"]
shutil.rmtree(pages, ignore_errors=True)  # a copy, because Sphinx takes pages from below one folder only
for file in (f for pattern in shown for f in root.glob(pattern) if f.parent.name != "local"):
    copy = pages / file.relative_to(root)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix != ".ipynb":
        shutil.copy(file, copy)
        continue
    notebook = json.loads(file.read_text())
    for cell in notebook["cells"]:  # without nbdev's directives
        cell["source"] = re.sub(r"(?m)^#\| .*\n?", "", "".join(cell["source"]))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"].strip()]
    copy.write_text(json.dumps(notebook))

project, author, language = "moe_routing", "The moe_routing authors", "en"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
exclude_patterns = ["readme.md"]
nb_execution_mode, nb_render_markdown_format, nb_ipywidgets_js, nb_merge_streams = "off", "myst", {}, True
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath"], 3
# Stored code is shown as it is, also where the lexer does not know a line; a page may have several titles.
suppress_warnings = ["misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type"]
html_theme, html_title, html_copy_source, html_show_sourcelink = "furo", "moe_routing", False, False
html_show_search_summary = False  # it would fetch the pages found, which a browser refuses for files
