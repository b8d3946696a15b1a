"""A browser as tests have it: Chromium without a window, driven through selenium, and what a page
of ours has to be: without errors, by itself, as wide as its screen, readable in the dark.
"""

import base64
import contextlib
import json
import shutil
import sys
import tempfile
import urllib.parse

from tests import support

sys.path.insert(0, str(support.TOOLS))

import environment  # noqa: E402

PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}  # program: package
MISSING = environment.missing_packages(PROGRAMS)
SECONDS = 120  # that a page or a script may take on a busy machine
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root would have to do without anyway
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--lang=en",
)
SCHEMES = ("http", "https", "ws", "wss", "ftp")
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3 Contrast (Minimum), level AA
# Every text that is to be seen, as [text, its contrast with what lies behind it]; by WCAG's
# "relative luminance" and "contrast ratio". Colours are taken to be opaque or wholly transparent.
CONTRASTS = """
function parse(colour) { return colour.match(/[\\d.]+/g).map(Number); }
function luminance(rgb) {
    const [r, g, b] = rgb.map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function backdrop(element) {
    for (; element; element = element.parentElement) {
        const [r, g, b, alpha = 1] = parse(getComputedStyle(element).backgroundColor);
        if (alpha > 0) return [r, g, b];
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
}
const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
    const style = getComputedStyle(element);
    const front = element instanceof SVGElement ? style.fill : style.color;
    const [one, two] = [parse(front).slice(0, 3), backdrop(element)].map(luminance);
    texts.push([text, (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05)]);
}
return texts;
"""


@contextlib.contextmanager
def open_browser():
    """A Chromium of its own with an empty profile, as selenium's driver; it ends with the block."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options, service)
        try:
            driver.set_page_load_timeout(SECONDS)
            driver.set_script_timeout(SECONDS)
            yield driver
        finally:
            driver.quit()


def wait_for(driver, condition, seconds=SECONDS):
    """What condition(driver) gives once it is true; elements that are not there yet are waited
    for. Raises selenium's TimeoutException.
    """
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(driver, seconds, 0.1, [WebDriverException])
    return wait.until(condition)


def resize(driver, width, height=800, is_phone=False):
    """Have a screen of so many CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(driver, **features):
    """What the user prefers, as media features: prefer(driver, color_scheme="dark")."""
    names = {f"prefers-{name.replace('_', '-')}": value for name, value in features.items()}
    known = [{"name": name, "value": value} for name, value in names.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": known})


def overflow(driver, width=360):
    """CSS pixels by which the page is wider than a phone's screen of that width."""
    resize(driver, width, is_phone=True)
    return driver.execute_script("return document.documentElement.scrollWidth") - width


def contrasts(driver):
    """{text: contrast ratio} of all texts that are shown, the least where one is there twice."""
    found = {}
    for text, ratio in driver.execute_script(CONTRASTS):
        found[text] = min(ratio, found.get(text, ratio))
    return found


def complaints(driver):
    """What the console said since it was last asked, errors and warnings, as lines."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requested(driver):
    """The hosts (scheme://host:port) that anything was asked of since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = (event["params"].get("request", {}).get("url", "") for event in events)
    parts = map(urllib.parse.urlsplit, urls)
    return {f"{part.scheme}://{part.netloc}" for part in parts if part.scheme in SCHEMES}


def screenshot(driver, path):
    """The whole page as a PNG file, however tall."""
    options = {"format": "png", "captureBeyondViewport": True}
    image = driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    with open(path, "wb") as file:
        file.write(base64.b64decode(image))
