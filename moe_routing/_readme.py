"""README.md is made from nbs/index.ipynb: markdown cells as they stand, code cells as code with their text output."""

import json
import re
from pathlib import Path


def readme(index: Path) -> str:
    "The text of README.md that a notebook makes. Cells marked `#| hide` are left out, of those marked `#| echo: false` only the output is shown; links are made to work from the top level."
    parts = ["<!-- Made from nbs/index.ipynb by `make readme`: edit that notebook, not this file. -->"]
    for cell in json.loads(Path(index).read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(\.\./", "](", source))
            continue
        if source.startswith("#| hide"):
            continue
        shown = (
            ""
            if source.startswith("#| echo: false")
            else "\n".join(line for line in source.split("\n") if not line.startswith("#|")).strip()
        )
        if shown:
            parts.append(f"```python\n{shown}\n```")
        for output in cell["outputs"]:
            markdown = output.get("data", {}).get("text/markdown")
            text = output.get("text") or output.get("data", {}).get("text/plain")
            if markdown:
                parts.append(re.sub(r"\]\(\.\./", "](", "".join(markdown)).strip())
            elif text:
                parts.append("```\n" + "".join(text).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def write_readme(root: Path) -> Path:
    "Write README.md of a repository."
    path = root / "README.md"
    path.write_text(readme(root / "nbs" / "index.ipynb"))
    return path
