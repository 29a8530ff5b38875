"""Takes the files of artifacts/ that pages show or link to into the site, at the place that the link names.

Pages link to them as they lie in the repository (`../artifacts/...`), where MkDocs does not look: it knows docs/ alone.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+)(artifacts/[^)#\s]+)")


def linked(text):
    return {path for _, path in LINK.findall(text)}


def on_files(files, config):
    wanted = set().union(*(linked(page.content_string) for page in files.documentation_pages()))
    for name in sorted(wanted):
        if name.endswith(".md"):  # what such a page shows lies beside it
            shown = re.findall(r"\]\(([^)#:\s]+)", (ROOT / name).read_text(encoding="utf-8"))
            wanted |= {f"{Path(name).parent.as_posix()}/{path}" for path in shown}
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Within the site, artifacts/ lies one folder less far away."""
    return LINK.sub(lambda found: f"]({found[1].removeprefix('../')}{found[2]}", markdown)
