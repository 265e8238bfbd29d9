"""Pages that stand at the root of the repository are pages here too: their links, and pictures.

README.md, DESIGN.md, CONTRIBUTING.md and CHANGELOG.md are included by a page each, and pictures of
benchmarks/results come with them, so that nothing is written or kept twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = ("rl_study.png", "evaluate.png")
INCLUDED = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, *, config: Any) -> Files:
    for name in PICTURES:
        source = str(ROOT / "benchmarks/results" / name)
        files.append(File.generated(config, f"images/{name}", abs_src_path=source))
    source = str(ROOT / "LICENSE")
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The README's links, from the root of the repository to this folder."""
    if page.file.src_uri != "index.md":
        return markdown
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/", "](", text).replace("](LICENSE)", "](LICENSE.txt)")
    for name in INCLUDED:
        text = text.replace(f"]({name})", f"]({name.lower()})")
    return text
