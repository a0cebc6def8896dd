"""Take the pictures of the demo that README and docs show: `python -m tests.demo.screenshots`.

The page is that of `defense demo`, with the model that ships; the browser is the one of `tests/demo/test_browser.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).parents[2] / "demo" / "screenshots"


def opened(browser: Browser, address: str, width: int, height: int, scheme: str) -> Page:
    """Return the page as it opens, with one latent shown."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5)
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#answers [data-answer=robust]")
    page.wait_for_selector("#removed .latents tbody .link")
    page.wait_for_timeout(1000)
    return page


def take(address: str) -> None:
    """Write the three pictures."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened(browser, address, 1280, 900, "light").screenshot(path=FOLDER / "try.png")
        opened(browser, address, 390, 844, "light").screenshot(path=FOLDER / "narrow.png")
        page = opened(browser, address, 1280, 900, "dark")
        page.get_by_role("tab", name="Latents").click()
        page.locator("#tiles .tile:has(img)").first.click()
        page.wait_for_selector("#browser-card .card")
        slider = page.locator("#steer input[type=number]")
        slider.fill(slider.evaluate("input => input.max || '40'"))
        slider.press("Tab")
        page.wait_for_selector("#steered .verdict")
        page.wait_for_timeout(1000)
        page.screenshot(path=FOLDER / "latents.png")
        browser.close()


def main() -> None:
    """Serve the demo, take the pictures, and stop it."""
    command = [sys.executable, "-c", "from defense.cli import main; main()", "demo", "--port", "7899"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "http://" in line:
                    take("http://127.0.0.1:7899/")
                    break
            else:
                sys.exit("the demo did not start")
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
