"""What `mkdocs.yml` needs beside the pages of this folder: the README, a page for each module, and links to these."""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the README as first page, images of notebooks, and a page for each module with public names."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for image in sorted((ROOT / "notebooks" / "images").glob("*.png")):
        files.append(File.generated(config, image.relative_to(ROOT).as_posix(), abs_src_path=str(image)))
    rows = []
    for path in sorted((ROOT / "boltznce").rglob("*.py")):
        said = _first_line(path)
        if said:
            name, page = _name(path.relative_to(ROOT)), _page(path.relative_to(ROOT))
            files.append(File.generated(config, page, content=f"# `{name}`\n\n::: {name}\n"))
            rows.append(f"| [`{name}`]({posixpath.relpath(page, 'modules')}) | {said} |")
    text = "\n".join(["# Modules", "", "| | |", "| --- | --- |", *rows, ""])
    files.append(File.generated(config, "modules/index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository: to their page here, or where there is none the words without a link."""
    source = "README.md" if page.file.src_uri == "index.md" else f"docs/{page.file.src_uri}"
    if page.file.src_uri.startswith("modules/"):
        return markdown

    def rewritten(match: re.Match, mark: str = "") -> str:
        words, (target, _, anchor) = match[1], match[2].partition("#")
        if "://" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = _page(Path(path)) if path.endswith(".py") else path.removeprefix("docs/")
        if files.get_file_from_path(there) is None:
            return f"{mark}{words}"
        link = posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{words}]({link}{'#' * bool(anchor)}{anchor})"

    return IMAGE.sub(lambda match: rewritten(match, "!"), LINK.sub(rewritten, markdown))


def _first_line(path: Path) -> str:
    """Of a module's docstring, if it says in `__all__` what it has for others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = any(isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__" for node in tree.body)
    return (ast.get_docstring(tree) or "").split("\n")[0].replace("|", "\\|") if public else ""


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _page(path: Path) -> str:
    return f"modules/{_name(path).replace('.', '/')}.md"
