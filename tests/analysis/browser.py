"""A page as a headless browser shows it."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)  # fmt: skip

# Shows the page in a frame of some width, waits until its images are there, and writes down what it finds.
HARNESS = """<!doctype html><link rel="icon" href="data:,"><pre id="found"></pre>
<iframe id="frame" style="width:{width}px;height:900px;border:0"></iframe>
<script>
const frame = document.getElementById("frame");
frame.onload = async () => {{
  const page = frame.contentDocument;
  const images = [...page.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title,
    images: images.map(image => ({{alt: image.alt, width: image.naturalWidth, shown: image.clientWidth}})),
    tables: [...page.querySelectorAll("table")].map(table => ({{
      caption: table.caption.textContent,
      rows: [...table.rows].map(row => [...row.cells].map(cell => cell.textContent)),
    }})),
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
}};
frame.src = "page.html";
</script>"""


def browser() -> str | None:
    """A Chromium: that of the variable CHROME, or the first on the path."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class _Server(http.server.BaseHTTPRequestHandler):
    def __init__(self, pages: dict[str, bytes], asked: list[str], *args: Any) -> None:
        self.pages, self.asked = pages, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if self.path in self.pages else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.pages.get(self.path, b""))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def shown(page: Path, profile: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of a page: see the script above; and what it says, and asks the server for.

    Args:
        page: The file.
        profile: A new folder for the browser.
        width: Of the window of the page, in pixels.
        dark: The reader prefers dark pages.
    """
    pages = {"/": HARNESS.format(width=width).encode(), "/page.html": page.read_bytes()}
    asked: list[str] = []
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Server, pages, asked)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        executable = browser()
        assert executable is not None
        result = subprocess.run(
            [
                executable, *FLAGS, scheme, f"--user-data-dir={profile}", "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        server.shutdown()
        thread.join()
    written = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert written is not None, result.stdout[:2000]
    assert written[1], result.stderr[-2000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(written[1])), "console": console, "asked": asked}
