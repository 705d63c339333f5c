"""Drive the chat page in headless Chromium, as a reader does: drop a file, ask, watch the answer and the meter.

Not part of the test suite: it needs a Chromium (Debian: apt-get install chromium) and `pip install playwright`.

    python tests/browser/check_page.py --screenshot docs/chat.png
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

DOCUMENT_CHARACTERS = 9000
DROP = """(text) => {
  const dropped = new DataTransfer();
  dropped.items.add(new File([text], "thursday.txt", { type: "text/plain" }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
}"""
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const turns = document.querySelectorAll(".turn.model span");
    window.seen.push([turns[turns.length - 1]?.textContent ?? "", document.getElementById("read").textContent]);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--screenshot", type=Path)
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("no Chromium found; name one by --chromium")
    command = [sys.executable, "-m", "hga", "serve", "--port", "0", "--budget", "256"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = next(line.split()[-1] for line in server.stderr if "listening" in line)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            faults: list[str] = []
            page = browser.new_page(viewport={"width": 900, "height": 720})
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            requests: list[str] = []
            page.on("request", lambda request: requests.append(request.url))
            drop_and_ask(page, url, options.screenshot)
            by_keyboard(page)
            on_a_phone_in_the_dark(page)
            assert all(request.startswith(url) for request in requests), requests
            assert not faults, faults
            browser.close()
        print("the page works")
    finally:
        server.terminate()
        server.communicate(timeout=30)


def drop_and_ask(page: Page, url: str, screenshot: Path | None) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("smollm2-135m")
    page.evaluate(WATCH)
    text = (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")[:DOCUMENT_CHARACTERS]
    page.evaluate(DROP, text)
    expect(page.locator("#reading")).to_be_visible()
    expect(page.locator("#talk")).to_contain_text("thursday.txt is read", timeout=180_000)
    progress = list(dict.fromkeys(read for _, read in page.evaluate("window.seen") if read))
    assert len(progress) > 3, progress
    page.evaluate("window.seen = []")
    page.fill("#question", "Who is Gregory, in one sentence?")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".turn.model")).to_have_count(2)
    expect(page.locator("#stop")).to_be_hidden(timeout=240_000)
    answer = page.locator(".turn.model span").last.text_content()
    texts = list(dict.fromkeys(shown for shown, _ in page.evaluate("window.seen") if shown))
    growing = [shown for shown in texts if answer and answer.startswith(shown)]
    assert len(growing) > 3, texts
    reading = [read for _, read in page.evaluate("window.seen") if "known already" in read]
    assert reading, "the document was read again"
    expect(page.locator("#meter")).to_be_visible()
    expect(page.locator("#keys")).to_contain_text("RAM")
    expect(page.locator("#attended")).to_contain_text("% of the context attended exactly")
    attended = float((page.locator("#attended").text_content() or "").split("%")[0])
    assert 0 < attended < 50, attended
    if screenshot is not None:
        page.screenshot(path=str(screenshot))


def by_keyboard(page: Page) -> None:
    page.keyboard.press("Escape")
    page.focus("#file")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "anew"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.type("Tell me a long story.")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.model span").last).to_have_text(re.compile(r"\S.{5}", re.DOTALL), timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator(".turn.fault")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_hidden()


def on_a_phone_in_the_dark(page: Page) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#question")).to_be_in_viewport()
    expect(page.locator("#send")).to_be_in_viewport()


if __name__ == "__main__":
    main()
