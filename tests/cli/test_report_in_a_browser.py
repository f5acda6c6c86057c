"""A page of `longscan report` in a real browser without a window, where one is installed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longscan.cli import main

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Sends commands of the DevTools protocol over the browser's pipe; gives what it answers."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", "about:blank"]
    # The protocol is spoken over the descriptors 3 and 4.
    shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", shell, "browser", *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    numbers = itertools.count(1)
    waiting = b""

    def ask(method: str, session: str = "", **parameters: Any) -> Any:
        nonlocal waiting
        number = next(numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(ours_out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in waiting:
                read = os.read(ours_in, 1 << 16)
                assert read, "the browser is gone"
                waiting += read
            answer, _, waiting = waiting.partition(b"\0")
            found = json.loads(answer)
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    yield ask
    os.close(ours_out)
    os.close(ours_in)
    process.kill()
    process.wait()


def test_a_page_as_it_is_seen(browser: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    paths = [ROOT / "results" / name for name in ("text", "induction_heads", "delay")]
    assert main(["report", *map(str, paths), "--output", str(page), "--experiments", str(ROOT / "experiments")]) == 0
    target = browser("Target.createTarget", url=page.as_uri())["targetId"]
    session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def evaluate(expression: str) -> Any:
        return browser("Runtime.evaluate", session, expression=expression, returnByValue=True)["result"].get("value")

    ends = time.monotonic() + 20
    while evaluate("document.readyState") != "complete" and time.monotonic() < ends:
        time.sleep(0.05)
    for width in (1280, 400):
        browser(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        # Wide tables scroll by themselves.
        assert evaluate("document.documentElement.scrollWidth") <= width
        images = evaluate(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        assert len(images) > 3
        assert all(complete and natural > 300 and 0 < shown <= width for complete, natural, shown in images)
    headings = evaluate("[...document.querySelectorAll('h2')].map(h => h.getBoundingClientRect().height)")
    assert len(headings) > 4
    assert all(height > 0 for height in headings)
    # Every entry of the contents leads somewhere.
    links = "[...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.getAttribute('href')))"
    assert set(evaluate(links)) == {True}
    # Nothing was asked of the network.
    assert evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
