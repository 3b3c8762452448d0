"""A page in headless Chromium: what it logs, its headings, and what is wider than the window."""

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# In a frame, since a window of its own is at least 500 pixels wide.
PROBE = """<!doctype html><style>body { margin: 0 } iframe { border: 0 }</style>
<iframe width="WIDTH" height="900" srcdoc="PAGE"></iframe><pre id="found"></pre><script>
onload = () => setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument, width = page.documentElement.clientWidth;
  const inside = (node) => !node.closest("thead, svg") && getComputedStyle(node).position !== "absolute";
  const nodes = [...page.querySelectorAll("body *")].filter(inside);
  document.querySelector("#found").textContent = JSON.stringify({
    width, scroll: page.documentElement.scrollWidth,
    headings: [...page.querySelectorAll("h1, h2, h3")].map((node) => `${node.tagName} ${node.textContent}`),
    wide: nodes.filter((node) => node.getBoundingClientRect().right > width + 1)
      .map((node) => `${node.tagName} ${node.textContent.slice(0, 60)}`),
    empty: [...page.querySelectorAll("section")].filter((node) => node.getBoundingClientRect().height < 40).length,
  });
}, 500);
</script>"""


def run(address: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page, dry of updates and requests of the browser's own; its log is on standard error."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder / 'user'}"]
    command += ["--virtual-time-budget=6000", "--enable-logging=stderr", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def logged(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote to the console, errors above all."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def seen(text: str, folder: Path, *, width: int) -> dict[str, Any]:
    """What a page of this markup is like in a window of `width` pixels; nothing may be logged."""
    probe = folder / f"probe-{width}.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", escape(text, quote=True)), encoding="utf-8")
    done = run(probe.as_uri(), folder, "--hide-scrollbars", f"--window-size={max(width, 600)},1000", "--dump-dom")
    assert logged(done) == []
    return json.loads(unescape(done.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
