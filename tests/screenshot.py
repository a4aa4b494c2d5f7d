"""Renews the picture of the leaderboard page: python -m tests.screenshot outputs/leaderboard.html docs/leaderboard.png

Needs chromium, chromedriver and selenium, as the tests of the page do.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.report.test_page import FLAGS

WIDTH, MOST = 1500, 400_000  # pixels; bytes


def main(page: Path, picture: Path) -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, "--hide-scrollbars", f"--window-size={WIDTH},1000", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(page.resolve().as_uri())
            height = browser.execute_script("return document.documentElement.scrollHeight")
            browser.set_window_size(WIDTH, height + 150)  # the window's own frame
            picture.parent.mkdir(parents=True, exist_ok=True)
            browser.save_screenshot(str(picture))
        finally:
            browser.quit()
    if (size := picture.stat().st_size) > MOST:
        raise SystemExit(f"{picture} has {size} bytes, more than {MOST}: show fewer rows")
    print(f"{picture}: {size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
