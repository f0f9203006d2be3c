"""The report's page in a real browser: nothing wider than the screen, sliders, hovering, no error."""

import shutil
import warnings
from importlib.util import find_spec
from itertools import pairwise

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


@pytest.fixture(params=[1280, 390])
def opened(request, browser, reported_run, tmp_path):
    """(browser, width) with the page of a run of six steps, drawn; no error is in its console at the end."""
    from selenium.webdriver.support.ui import WebDriverWait

    page_of(reported_run, folder=tmp_path)
    screen = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get((tmp_path / "page.html").as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.body.dataset.drawn"))
    yield browser, request.param
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def found(place, selector):
    return place.find_elements("css selector", selector)


def test_the_page_fits_the_screen(opened):
    browser, width = opened
    plots = found(browser, ".plot.js-plotly-plot")
    assert len(plots) > 12 and len(plots) == len(found(browser, ".plot"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in plots:
        inner = browser.execute_script("return arguments[0].querySelector('svg.main-svg').clientWidth", plot)
        assert 0 < inner <= plot.size["width"] <= width
    assert browser.execute_script("return document.documentElement.scrollHeight") < (5000 if width == 1280 else 12000)
    columns = {one.location["x"] for one in found(browser, "#answers .part")}
    assert len(columns) > 1 if width == 1280 else len(columns) == 1


def test_the_first_screen_has_the_answers(opened):
    """Sentence, chart, what got in the way and the next experiment, without scrolling on 1280 x 800; none overlaps."""
    browser, width = opened
    parts = [*found(browser, ".learned"), found(browser, ".screen .plot")[0], *found(browser, ".screen h2")]
    assert [one.text for one in parts[2:]] == ["What got in the way", "The next experiment"]
    screen = found(browser, ".screen")[0].rect
    if width == 1280:
        assert screen["y"] + screen["height"] <= 800
        assert parts[1].size["height"] >= 300
    items = found(browser, ".screen li")
    boxes = sorted((one.rect["y"], one.rect["y"] + one.rect["height"]) for one in items)
    assert all(end <= start + 1 for (_, end), (start, _) in pairwise(boxes))
    assert not found(browser, "#theory-folded[open]")


def test_the_heatmap_s_slider_and_the_texts_on_hover(opened, reported_run):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    browser, width = opened
    wait = WebDriverWait(browser, 30)
    heatmap = next(plot for plot in found(browser, ".plot.js-plotly-plot") if found(plot, ".slider-container"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", heatmap)
    assert found(heatmap, ".gtitle")[0].text.startswith("step 1:")
    tick = found(heatmap, ".slider-rail-touch-rect")[0]
    ActionChains(browser).move_to_element_with_offset(tick, tick.size["width"] // 2 - 4, 0).click().perform()
    wait.until(lambda _: found(heatmap, ".gtitle")[0].text.startswith("step 6:"))
    prompts = report_numbers(read_run(reported_run)).heatmaps[-1].prompts

    def hover(_):
        """Over the cell at the top left, wherever it is by now: margins follow the labels."""
        area = found(heatmap, ".nsewdrag")[0]
        half = 0.5 / len(prompts) - 0.5  # the middle of the cell
        corner = round(half * area.size["width"]), round(half * area.size["height"])
        ActionChains(browser).move_to_element(area).move_to_element_with_offset(area, *corner).perform()
        return found(heatmap, ".hoverlayer .hovertext")

    wait.until(hover)
    hovered = "".join(found(heatmap, ".hoverlayer")[0].text.split())
    # its row's and its column's prompt are the first
    assert hovered.count("".join(f"1. {prompts[0]}".split())) == 2 and "cosine1.00" in hovered
    box = found(heatmap, ".hoverlayer .hovertext")[0].rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_answers_of_the_chosen_step_are_shown(opened):
    browser, _ = opened

    def shown_steps():
        return [one.get_attribute("data-step") for one in found(browser, ".of-step:not([hidden])")]

    assert shown_steps() == ["6"]
    choose = "arguments[0].value = '2'; arguments[0].dispatchEvent(new Event('change'))"
    browser.execute_script(choose, *found(browser, ".chosen-step"))
    assert shown_steps() == ["2"]
