"""What lies elsewhere in the repository becomes part of the site: results, recipes, notebooks with their outputs, and
the help texts of configurations where a page says `<!-- options: MODULE CLASS -->`.

A page links to it as it is seen in the repository (`../benchmarks/…`), so that its links work there too.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llm_distill.options import default_of

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks", "recipes", "notebooks", "CHANGELOG", "CONTRIBUTING")
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/**/*.png", "recipes/**/*.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_as_markdown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ lose the step out of it; those to a notebook lead to its page."""
    if page.file.generated_by is None:
        markdown = re.sub(rf"(\]\((?:\.\./)*)\.\./(?=({'|'.join(OUTSIDE)})\b)", r"\1", markdown)
    markdown = re.sub(r"\]\(([\w.-]+-from-[\w.-]+)\)", r"](\1/README.md)", markdown)
    markdown = re.sub(r"<!-- options: (\S+) (\S+) -->", lambda match: options_table(*match.groups()), markdown)
    return re.sub(r"(\]\([\w./]+)\.ipynb\)", r"\1.md)", markdown)


def options_table(module: str, name: str) -> str:
    """The fields of a configuration that are not inherited: name, default and help text."""
    config = getattr(importlib.import_module(module), name)
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in fields(config):
        if option.name in config.__annotations__:
            meaning = option.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{option.name}` | `{default_of(option)}` | {meaning} |")
    return "\n".join(lines)


def notebook_as_markdown(path: Path) -> str:
    """Its text, code and outputs (plain text, HTML tables and plots)."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                image = data["image/png"].replace("\n", "")
                parts.append(f'<img alt="the plot of the cell above" src="data:image/png;base64,{image}">')
            elif "text/html" in data:
                lines = (line for line in data["text/html"].splitlines() if line.strip())
                parts.append("\n".join(["<div>", *lines, "</div>"]))  # outside of it an indented line would be code
            else:
                parts.append(f"```text\n{output.get('text') or data['text/plain']}\n```")
    return "\n\n".join(parts)
