"""The documentation site, as a browser shows it: every page loads, draws its pictures, and reports no error.

`make test-docs` builds the site first. Chromium and its driver have to be installed.
"""

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest


pytestmark = pytest.mark.site
ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    assert chromium and driver, "install Chromium and its driver: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def pages():
    """Every page, by its path in the site."""
    return sorted(str(path.relative_to(SITE)) for path in SITE.rglob("index.html"))


def test_every_page_loads_with_its_pictures_and_without_an_error(browser, address):
    found = pages()
    assert len(found) > 60 and "index.html" in found
    problems = []
    for page in found:
        browser.get(f"{address}/{page}")
        broken = browser.execute_script(
            "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"
        )
        problems += [f"{page}: {source} does not load" for source in broken]
        problems += [
            f"{page}: {entry['message']}" for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
        ]
        if not browser.title or not browser.find_elements("css selector", "article h1"):
            problems.append(f"{page} has no heading")
        left = [element.text for element in browser.find_elements("css selector", ".arithmatex")]
        problems += [f"{page}: the equation {text!r} is not drawn" for text in left]
    assert not problems, "\n".join(problems)


def test_the_front_page_answers_in_one_screen(browser, address):
    browser.get(f"{address}/index.html")
    text = browser.find_element("tag name", "article").text
    for word in ("make demo", "make test", "PPOTrainer", "-from trl import", "+from trl_apa import"):
        assert word in text
    bottom = browser.execute_script("return document.querySelector('article table').getBoundingClientRect().bottom")
    assert bottom < 900
    assert browser.find_elements("css selector", "article img")


def test_the_search_finds_an_option(browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/index.html?q=whiten_advantages")
    result = WebDriverWait(browser, 20).until(
        lambda page: page.find_elements("css selector", ".md-search-result__item a")
    )
    assert any("options" in link.get_attribute("href") for link in result)


def test_the_reference_shows_signatures_and_the_help_of_every_command(browser, address):
    from trl_apa.cli import COMMANDS

    browser.get(f"{address}/reference/mathematics/index.html")
    text = browser.find_element("tag name", "article").text
    assert "masked_whiten" in text and "advantages_BR" in text
    for name in COMMANDS:
        browser.get(f"{address}/reference/commands/{name}/index.html")
        assert f"usage: trl-apa {name}" in browser.find_element("tag name", "article").text


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import docs_site.hooks

    yield docs_site.hooks
    sys.modules.pop("docs_site.hooks")


@pytest.mark.parametrize(
    ("here", "written", "shown"),
    [
        ("algorithm.md", "[a](design.md#data-flow)", "[a](design.md#data-flow)"),
        ("algorithm.md", "[a](../examples/hh/README.md)", "[a](repository/examples/hh/README.md)"),
        ("repository/README.md", "[a](docs/design.md)", "[a](../design.md)"),
        ("repository/README.md", "![p](docs/assets/demo.png)", "![p](../assets/demo.png)"),
        ("repository/examples/hh/README.md", "[a](../../docs/results.md#x)", "[a](../../../results.md#x)"),
        ("algorithm.md", "[code](../trl_apa/cli.py) and [b](https://x.org)", "code and [b](https://x.org)"),
        ("algorithm.md", "[gone](../trl_apa/no.py)", "[gone](../trl_apa/no.py)"),
        ("algorithm.md", "```\n[a](../trl_apa/cli.py)\n```", "```\n[a](../trl_apa/cli.py)\n```"),
        ("reference/commands/demo.md", "[a](../x.md)", "[a](../x.md)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(hooks, here, written, shown):
    names = ["algorithm.md", "design.md", "results.md", "assets/demo.png", "repository/README.md"]
    files = [SimpleNamespace(src_uri=name) for name in [*names, "repository/examples/hh/README.md"]]
    page = SimpleNamespace(file=SimpleNamespace(src_uri=here))
    assert hooks.on_page_markdown(written, page, SimpleNamespace(repo_url=""), files) == shown


def test_code_leads_to_the_repository_where_its_address_is_known(hooks):
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="a.md")), SimpleNamespace(repo_url="https://h/o/r/")
    found = hooks.on_page_markdown("[code](../trl_apa/cli.py)", page, config, [])
    assert found == "[code](https://h/o/r/blob/main/trl_apa/cli.py)"


def test_an_equation_becomes_mathml_with_its_number(hooks):
    found = hooks.on_page_content('<p><span class="arithmatex">\\(a &lt; \\pi_\\theta\\)</span></p>', None, None, None)
    assert (
        found.startswith("<p><math") and 'display="inline"' in found and "&lt;" in found.replace("&#x0003C;", "&lt;")
    )
    block = hooks.equation("\\[x^2 \\tag{9}\\]")
    assert 'display="block"' in block and "(9)" in block and "tag" not in block
