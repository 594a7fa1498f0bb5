"""What MkDocs needs beyond its configuration: pages that lie outside of ``docs/``, and their links.

Contributors read Markdown in the repository, where READMEs lie beside what they describe; the site
shows the same files. So nothing is written twice, and a link is right in both places. Loaded by
``mkdocs.yml``; it keeps no state.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/README.md")
OUTSIDE_FOLDERS = ("examples", "charts/vram-operator", "deploy", "tests/cluster")
_AREA = "repository"
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
)
_CODE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the Markdown files that lie outside of ``docs/``."""
    for path in outside_pages():
        files.append(File.generated(config, f"{_AREA}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link of a page to where its target is on the site; see `moved`."""
    del config
    source = repository_path(page.file.src_uri)
    present = {file.src_uri for file in files}

    def replaced(match: re.Match[str]) -> str:
        text, anchor = match["text"], match["anchor"] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        uri = moved(target, present)
        if uri is None:
            return text if target in text else f"{text} (`{target}`)"
        place = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))
        return f"{match['image']}[{text}]({place}{anchor})"

    kept, end = [], 0
    for code in _CODE.finditer(markdown):
        kept += [_LINK.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*kept, _LINK.sub(replaced, markdown[end:])])


def outside_pages() -> list[str]:
    """Return the paths, from the repository's root, of pages that lie outside of ``docs/``."""
    found = [path for folder in OUTSIDE_FOLDERS for path in (ROOT / folder).rglob("*.md")]
    return [*OUTSIDE, *sorted(str(path.relative_to(ROOT)) for path in found)]


def repository_path(uri: str) -> str:
    """Return where the source of a page lies in the repository."""
    area, _, rest = uri.partition("/")
    return rest if area == _AREA else f"docs/{uri}"


def moved(target: str, present: set[str]) -> str | None:
    """Return the page of the site that shows a path of the repository; None where there is none.

    A folder is shown by its README. What has no page keeps its place in the text, without a link.
    """
    for path in (target, f"{target}/README.md"):
        uri = path.removeprefix("docs/") if path.startswith("docs/") else f"{_AREA}/{path}"
        if uri in present:
            return uri
    return None
