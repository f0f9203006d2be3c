"""The report's page in a real browser: nothing wider than the screen, sliders, hovering, no error."""

import shutil
import warnings
from importlib.util import find_spec

import pytest
from run_folders import page_of

from trl_ext.report.numbers import report_numbers
from trl_ext.report.read_run import read_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
)


@pytest.fixture
def browser():
    if CHROMIUM is None or DRIVER is None or find_spec("selenium") is None:
        pytest.skip("chromium, chromedriver or selenium isn't here: the page isn't opened in a browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def set_width(browser, width):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width, browser, reported_run, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page_of(reported_run, folder=tmp_path)
    set_width(browser, width)
    browser.get((tmp_path / "page.html").as_uri())
    wait = WebDriverWait(browser, 30)
    wait.until(lambda b: b.execute_script("return document.body.dataset.drawn"))
    plots = browser.find_elements(By.CSS_SELECTOR, ".plot.js-plotly-plot")
    assert len(plots) > 12 and len(plots) == len(browser.find_elements(By.CSS_SELECTOR, ".plot"))
    # nothing is wider than the screen
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in plots:
        inner = browser.execute_script("return arguments[0].querySelector('svg.main-svg').clientWidth", plot)
        assert 0 < inner <= plot.size["width"] <= width

    heatmap = next(plot for plot in plots if plot.find_elements(By.CSS_SELECTOR, ".slider-container"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", heatmap)
    title = lambda: heatmap.find_element(By.CSS_SELECTOR, ".gtitle").text  # noqa: E731
    assert title().startswith("step 1:")
    ticks = heatmap.find_elements(By.CSS_SELECTOR, ".slider-rail-touch-rect")
    ActionChains(browser).move_to_element_with_offset(ticks[0], ticks[0].size["width"] // 2 - 4, 0).click().perform()
    wait.until(lambda b: title().startswith("step 6:"))

    shown = report_numbers(read_run(reported_run))["heatmaps"][-1]

    def hover(browser):
        """Over the cell at the top left, wherever it is by now: margins follow the labels."""
        area = heatmap.find_element(By.CSS_SELECTOR, ".nsewdrag")
        half = 0.5 / len(shown["prompts"]) - 0.5  # the middle of the cell
        corner = round(half * area.size["width"]), round(half * area.size["height"])
        ActionChains(browser).move_to_element(area).move_to_element_with_offset(area, *corner).perform()
        return heatmap.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext")

    wait.until(hover)
    hovered = "".join(heatmap.find_element(By.CSS_SELECTOR, ".hoverlayer").text.split())
    # the cell at the top left: its row's and its column's prompt are the first
    first = "".join(f"1. {shown['prompts'][0]}".split())
    assert hovered.count(first) == 2 and "cosine1.00" in hovered
    box = heatmap.find_element(By.CSS_SELECTOR, ".hoverlayer .hovertext").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    chosen = browser.find_element(By.CSS_SELECTOR, ".chosen-step")

    def shown_steps():
        rows = browser.find_elements(By.CSS_SELECTOR, ".of-step:not([hidden])")
        return [one.get_attribute("data-step") for one in rows]

    assert shown_steps() == ["6"]
    browser.execute_script("arguments[0].value = '2'; arguments[0].dispatchEvent(new Event('change'))", chosen)
    assert shown_steps() == ["2"]
    assert browser.execute_script("return document.documentElement.scrollHeight") < (5000 if width == 1280 else 12000)
    columns = {one.location["x"] for one in browser.find_elements(By.CSS_SELECTOR, "#learning .part")}
    assert len(columns) == (2 if width == 1280 else 1)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
