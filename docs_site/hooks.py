"""What the documentation site adds to `docs/`: pages of the repository outside it, a page a command, and equations.

Links of the pages are those of the repository, where they lead from file to file. Here they are rewritten to lead from
page to page; what has no page leads to the repository where its address is known, and is plain text elsewhere.
"""

import json
import os
import posixpath
import re
import subprocess
import sys
from functools import cache
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
OUTSIDE = "repository"  # the folder of the site with the pages that lie outside `docs/`
COMMANDS = "reference/commands"
PAGES_OUTSIDE = (
    *("README.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("benchmarks/README.md", "parity/README.md", "reproduction/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/**/README.md")),
)
LINK_WITH_TEXT = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)$", flags=re.MULTILINE | re.DOTALL)
EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)
TAG = re.compile(r"\\tag\{([^}]*)\}")
# In one process of its own, which imports the libraries once.
PRINT_HELPS = """
import contextlib, io, json
from trl_apa.cli import COMMANDS, main
texts = {}
for name in COMMANDS:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([name, "--help"])
    texts[name] = printed.getvalue()
print(json.dumps(texts))
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The parts of the navigation that the files decide."""
    tables = sorted(path.name for path in (ROOT / "docs" / "results").glob("*.md"))
    filled = {
        "COMMANDS": [{name: f"{COMMANDS}/{name}.md"} for name in helps()],
        "RESULTS": [{Path(name).stem: f"results/{name}"} for name in tables],
    }
    for section in config.nav or []:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else []:
                for title, target in entry.items():
                    entry[title] = filled.get(target, target) if isinstance(target, str) else target
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages outside `docs/`, with their pictures, and the help of each command."""
    for name in PAGES_OUTSIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"{OUTSIDE}/{name}", content=text))
    for name, text in helps().items():
        page = f"# trl-apa {name}\n\n```text\n{text.rstrip()}\n```\n"
        files.append(File.generated(config, f"{COMMANDS}/{name}.md", content=page))
    return files


@cache
def helps() -> dict[str, str]:
    """Each command with what its `--help` prints, at a width that fits a page."""
    environment = {**os.environ, "COLUMNS": "110", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PRINT_HELPS]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    texts: dict[str, str] = json.loads(found.stdout)
    return texts


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository as links between pages of the site."""
    here = repository_path(page.file.src_uri)
    if here is None:
        return markdown
    pages = {file.src_uri for file in files}

    def place(target: str) -> tuple[str, str | None]:
        """The path in the repository, and the page or picture of the site that it is, as the page names it."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = site_path(path)
        return path, posixpath.relpath(uri, posixpath.dirname(page.file.src_uri)) if uri in pages else None

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        name, sign, fragment = target.partition("#")
        path, relative = place(name)
        if relative is not None:
            return f"[{text}]({relative}{sign}{fragment})"
        if not (ROOT / path).exists():
            return match[0]  # for the strict build to complain about
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    def picture(match: re.Match[str]) -> str:
        _, relative = place(match[2])
        return match[0] if relative is None else f"![{match[1]}]({relative})"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK_WITH_TEXT.sub(link, PICTURE.sub(picture, text)) for text in parts[::2]]  # the others are code
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations as MathML, which browsers draw without a script."""
    return EQUATION.sub(lambda match: equation(unescape(match[2]).strip()), html)


def equation(text: str) -> str:
    r"""MathML of `\(...\)`, in the line, or of `\[...\]`, in a line of its own; `\tag{2}` becomes a number below."""
    source, is_block = text[2:-2], text.startswith("\\[")
    numbers = TAG.findall(source)
    drawn = convert(TAG.sub("", source), display="block" if is_block else "inline")
    return drawn + "".join(f'<p style="text-align: right">({number})</p>' for number in numbers)


def repository_path(uri: str) -> str | None:
    """The path in the repository of a page of the site; None for a page that only the site has."""
    if uri.startswith(f"{OUTSIDE}/"):
        return uri.removeprefix(f"{OUTSIDE}/")
    return None if uri.startswith(f"{COMMANDS}/") else f"docs/{uri}"


def site_path(path: str) -> str:
    """Where the site has a file of the repository, if it has it."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"
