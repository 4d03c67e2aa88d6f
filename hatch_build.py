"""Metadata of a distribution that depend on where the repository is published.

A package index shows the README away from the repository, where relative links and pictures lead nowhere. With the
address of the repository in `REPOSITORY_URL`, they are made absolute, and the project's links are added; without it
all stays as it is.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


ADDRESS = "REPOSITORY_URL"
PAPER = "https://arxiv.org/abs/2306.02231"
RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


class PublishedMetadata(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        address = os.environ.get(ADDRESS, "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, address, tag)}
        metadata["urls"] = {"Paper": PAPER}
        if address:
            metadata["urls"] |= {
                "Repository": address,
                "Documentation": f"{address}/blob/{tag}/docs/index.md",
                "Issues": f"{address}/issues",
                "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
            }


def with_absolute_links(text: str, address: str, tag: str) -> str:
    """The README with links and pictures of the repository at `tag`; as it is without an address."""
    if not address:
        return text

    def absolute(match: re.Match[str]) -> str:
        picture, shown, target = match.groups()
        return f"{picture}{shown}({address}/{'raw' if picture else 'blob'}/{tag}/{target})"

    parts = re.split(r"^(```.*?^```)$", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [RELATIVE_LINK.sub(absolute, part) for part in parts[::2]]  # the others are code
    return "".join(parts)
