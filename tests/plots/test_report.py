"""The page of a run or a study is one file that opens offline, has every picture and links to its sources.

The tests that open it in a browser need Chromium and its driver (Debian: chromium, chromium-driver).
"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import search_records, train_records, write_records

from genotypes import DARTS_V1, ENAS, random_genotype, to_json
from plots import animation
from plots.html import report
from plots.html.page import IN_THE_DARK
from plots.run_history import History
from plots.style import COLOURS
from visualize import main

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
EPOCHS = 50
ODD = '<img src=x onerror="alert(1)">'


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Writes a search of 50 epochs whose path and flags have special characters."""
    folder = tmp_path_factory.mktemp("runs & more") / "search #1"
    write_records(folder, search_records(EPOCHS))
    last = [record for record in search_records(EPOCHS) if record["kind"] == "epoch"][-1]
    write_json(folder / "config.json", {"flags": {"data": ODD, "epochs": EPOCHS, "seed": 3, "device": "cpu"}})
    write_json(folder / "result.json", {
        "kind": "search", "valid_ppl": last["valid_ppl"], "test_ppl": 81.5, "genotype": last["genotype"],
        "params": 4_810_000, "stopped_by": "epochs",
    })  # fmt: skip
    (folder / "log.txt").write_text("said\n")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "study"
    cells = {"first-1": DARTS_V1, "random-1": random_genotype(1), "random-2": random_genotype(2), ODD: ENAS}
    short = {"first-1": [91.5, 90.5], "random-1": [100.25, 99.75], "random-2": [9.5, 10.5], ODD: [95.0, 95.0]}
    events = []
    for cell, values in short.items():
        for seed, value in enumerate(values, start=1):
            events.append({"trial": f"select/{cell}/{seed}", "event": "done", "valid_ppl": value})
            result = {"valid_ppl": value, "test_ppl": None, "genotype": to_json(cells[cell])}
            if cell != ODD:
                write_json(folder / "select" / cell / str(seed) / "result.json", result)
    full = {"retrain/random-2/3": (70.5, to_json(cells["random-2"])), "retrain/first-1/3": (80.25, to_json(DARTS_V1)),
            "baseline/LSTM/1": (75.5, "LSTM")}  # fmt: skip
    for name, (value, genotype) in full.items():
        events.append({"trial": name, "event": "done", "valid_ppl": value})
        test = 69.25 if name == "retrain/random-2/3" else None
        write_json(folder / name / "result.json", {"valid_ppl": value, "test_ppl": test, "genotype": genotype})
        write_records(folder / name, train_records(6, last=value))
    write_json(folder / "study.json", {"flags": {}})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(folder / "leaderboard.json", {
        "cells": [], "chosen": {"cell": "random-2", "run": "retrain/random-2/3", "valid_ppl": 70.5, "test_ppl": 69.25,
                                "unknown": {"valid": 0.082, "test": 0.0604}},
        "methods": [{"method": "random", "n": 2, "mean": 55.0, "sd": 63.6, "best": 10.0},
                    {"method": "first", "n": 2, "mean": 91.0, "p": 0.0625, "minus_rival": [36.0, -1.0, 40.5]}],
        "cost": [{"stage": "select", "runs": 8, "core_hours": 1.25}],
    })  # fmt: skip
    return folder


class Page(HTMLParser):
    """Parses a page for what it loads, its links, its ids and its text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.words = [], [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a":
            self.links.append(given["href"])
        elif "src" in given or (tag in ("link", "image") and "href" in given):
            self.loads.append(given.get("src") or given["href"])
        if "id" in given:
            self.ids.append(given["id"])

    def handle_data(self, data):
        self.words.append(data.strip())


def test_run_page_is_one_file_with_every_picture(run):
    assert main(["report", str(run)]) == 0
    path = run / "report.html"
    page = Page(path)
    assert path.stat().st_size < 3e6
    assert page.loads == ["data:,"]  # The page loads nothing.
    outside = set(re.findall(r'(?:href|src)\s*=\s*"(\w+:[^"]*)"|url\((?!#)([^)]*)\)', page.text))
    assert outside == {("data:,", "")}
    assert {"cell", "formation", "curves", "genotype", "edges", "signal"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert (path.parent / unquote(link)).exists() or link.endswith("metrics.jsonl"), link
    assert {"metrics.jsonl", "result.json", "config.json", "log.txt"} == set(page.links)
    assert "81.50" in page.words and "4,810,000" in page.words and "50 of 50" in page.words
    assert "<img" not in page.text and "&lt;img" in page.text


def test_run_page_states_the_shares_of_unknown_words(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    write_json(tmp_path / "run" / "result.json", {**result, "unknown_share": {"valid": 0.25, "test": 0.0}})
    assert main(["report", str(tmp_path / "run")]) == 0
    words = Page(tmp_path / "run" / "report.html").words
    assert words[words.index("unknown words of valid, counted as <unk>") + 1] == "25.0%"
    assert not any(word.startswith("unknown words of test") for word in words)


def test_flags_with_invalid_unicode_are_replaced_and_escaped(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    write_records(tmp_path / "run", search_records(2, nodes=3))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"flags": {"data": "\ud800</script>", "epochs": 10**400}}))
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "?&lt;/script&gt;" in (tmp_path / "run" / "report.html").read_text()


def test_pictures_use_the_page_colours_except_for_primitives(run, tmp_path):
    report.write(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    inside = text[text.index("<svg") :]
    for colour in IN_THE_DARK:
        assert colour.lower() not in inside.lower()
    for colour in COLOURS.values():
        assert colour.lower() in inside.lower()


def test_page_outside_the_run_directory_links_to_its_files(run, tmp_path):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    for link in set(Page(tmp_path / "page.html").links):
        assert (tmp_path / unquote(link)).exists(), link


def test_study_page_has_each_cell_once_with_its_means(study):
    assert main(["report", str(study)]) == 0
    page = Page(study / "report.html")
    rows = re.findall(r'<tr data-cell="([^"]*)">(.*?)</tr>', page.text, re.DOTALL)
    values = {cell: re.findall(r'data-value="([^"]*)"', row) for cell, row in rows}
    assert list(values) == ["random-2", "LSTM", "first-1", ODD.replace("<", "&lt;").replace(">", "&gt;").replace(
        '"', "&#34;"), "random-1"]  # fmt: skip
    assert values["random-2"] == ["10.0", "70.5", "69.25"] and values["LSTM"] == ["", "75.5", ""]
    assert values["first-1"] == ["91.0", "80.25", ""] and values["random-1"] == ["100.0", "", ""]
    assert page.text.count("<template") == 3  # These are of the cells with a known genotype; LSTM is torch's own.
    for link in ("select/random-1", "retrain/random-2", "baseline/LSTM", "retrain/random-2/3"):
        assert link in page.links
    assert "<img" not in page.text
    assert {"0.0625", "36.00 (-1.00 to 40.50)"} <= set(page.words) and "1.25" in page.words
    for split, share in (("valid", "8.2%"), ("test", "6.0%")):
        assert page.words[page.words.index(f"unknown words of {split}, counted as <unk>") + 1] == share


def test_page_of_a_new_study_reports_no_leaderboard_yet(tmp_path):
    event = {"trial": "baseline/LSTM/1", "event": "started"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "No leaderboard yet" in (tmp_path / "report.html").read_text()


def test_study_page_reports_halved_and_failed_trials(tmp_path):
    events = [
        {"trial": "select/random-1/1", "event": "done", "valid_ppl": 90.0},
        {"trial": "select/random-2/1", "event": "halved", "valid_ppl": 120.0},
        {"trial": "select/random-3/1", "event": "failed", "reason": "out of memory"},
        {"trial": "select/random-1/2", "event": "failed", "reason": "a node was lost"},
        {"trial": "select/random-1/2", "event": "done", "valid_ppl": 92.0},
        {"trial": "select", "event": "stopped", "reason": "budget"},
        {"trial": "select/../../etc/1", "event": "done", "valid_ppl": 1.0},
        {"trial": "/etc/passwd/1", "event": "done", "valid_ppl": 1.0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(
        tmp_path / "leaderboard.json", {"chosen": {"run": "/etc/passwd"}, "cost": [{"stage": "/etc", "runs": 1}]}
    )
    assert main(["report", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert re.findall(r'<tr data-cell="([^"]*)">', page.text) == ["random-1", "random-2"]
    assert "91.00 ± 1.41" in page.words and "120.00 (halved)" in page.words
    notes = [word for word in page.words if "failed:" in word or "stopped early" in word]
    assert notes == ["select/random-3/1 failed: out of memory", "The stage select was stopped early: budget."]
    assert not any("etc" in link for link in page.links)


@pytest.mark.parametrize("summary", [
    "{", '{"cells": 3, "chosen": [], "methods": {}, "cost": [7, {"stage": ["x"], "runs": "many"}]}',
    '{"chosen": {"run": 3}, "methods": [{}], "proxies": [{"proxy": "a", "tau": [1, null, "x"]}]}',
])  # fmt: skip
def test_study_page_is_written_with_a_damaged_leaderboard(summary, study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    (tmp_path / "study" / "leaderboard.json").write_text(summary)
    assert main(["report", str(tmp_path / "study")]) == 0
    assert 'data-cell="random-2"' in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", '{"flags": 3}'), ("result.json", "{"),
                                            ("genotype.json", "[]")])  # fmt: skip
def test_run_page_is_written_with_damaged_files(name, text, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    write_records(tmp_path / "run", search_records(2, nodes=3))
    (tmp_path / "run" / name).write_text(text)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert {"cell", "curves", "edges"} <= set(Page(tmp_path / "run" / "report.html").ids)


def test_retraining_page_has_the_cell_and_its_curves(tmp_path):
    write_records(tmp_path, train_records(9, averaged=4))
    write_json(tmp_path / "config.json", {"flags": {"arch": str(DARTS_V1), "epochs": 9}})
    assert main(["report", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert {"cell", "training", "curves"} <= set(page.ids) and "formation" not in page.ids
    assert str(DARTS_V1) in page.words


def test_page_refreshes_only_while_watched_and_the_run_is_unfinished(run, tmp_path, monkeypatch, capsys):
    live = tmp_path / "live"
    shutil.copytree(run, live)
    write_records(live, search_records(2, nodes=3))
    (live / "result.json").rename(tmp_path / "result.json")
    again = '<meta http-equiv="refresh"'
    assert again not in report.write(live).read_text()
    seen = []

    def wait(seconds):
        seen.append((live / "report.html").read_text())
        assert seconds >= 5 and len(seen) < 3
        if len(seen) == 2:
            (tmp_path / "result.json").rename(live / "result.json")

    monkeypatch.setattr("visualize.time.sleep", wait)
    assert main(["report", str(live), "--watch"]) == 0
    assert [again in text for text in seen] == [True, True]
    assert again not in (live / "report.html").read_text()
    assert capsys.readouterr().out.count("wrote") == 3


def test_ctrl_c_ends_the_watch(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "live")
    write_records(tmp_path / "live", search_records(2, nodes=3))
    (tmp_path / "live" / "result.json").unlink()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("visualize.time.sleep", interrupt)
    assert main(["report", str(tmp_path / "live"), "--watch"]) == 0
    assert "refresh" not in (tmp_path / "live" / "report.html").read_text()


def test_watch_with_another_ending_exits_2_at_once(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "run"), "--watch", "--out", str(tmp_path / "page.txt")])
    assert end.value.code == 2 and "a page's name ends in .html" in capsys.readouterr().err


def test_watch_waits_for_a_first_record_but_not_for_a_directory(run, tmp_path, monkeypatch, capsys):
    live = tmp_path / "live"
    live.mkdir()

    def wait(seconds):
        assert not (live / "report.html").exists()
        write_records(live, search_records(1, nodes=2))
        shutil.copy(run / "result.json", live / "result.json")

    monkeypatch.setattr("visualize.time.sleep", wait)
    assert main(["report", str(live), "--watch"]) == 0
    assert "no metrics.jsonl with records" in capsys.readouterr().out
    assert (live / "report.html").exists()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "nowhere"), "--watch"])
    assert end.value.code == 2 and "no such directory" in capsys.readouterr().err


# --- Pages in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not BROWSER or not DRIVER:
        pytest.skip("no Chromium with its driver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def open_page(browser, folder):
    """Opens the page in a window of a laptop's width, with the light colour scheme."""
    if not Path(folder, "report.html").exists():
        main(["report", str(folder)])
    set_window(browser, 1000, "light")
    browser.get(Path(folder, "report.html").as_uri())
    return browser


def set_window(browser, width, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def column(browser, n):
    script = "return [...document.querySelectorAll('#leaderboard tbody tr')].map(r => r.cells[arguments[0]].innerText)"
    return [text.strip() for text in browser.execute_script(script, n)]


def test_run_page_plays_its_formation_without_browser_errors(run, browser):
    page = open_page(browser, run)
    assert page.get_log("browser") == []
    # The visible opacity of a part is that of its stroke, or 0 without a stroke, times those of all elements around it.
    seen = """const opacities = {};
      for (const part of document.querySelectorAll('#formation svg g[id^="formation-"]')) {
        const path = part.querySelector('path'), name = part.id.slice('formation-'.length);
        if (!/^(arc|label)-.*[a-z]$/.test(name) || name.endsWith('-text') || !path) continue;
        let opacity = getComputedStyle(path).stroke === 'none' ? 0 : +getComputedStyle(path).strokeOpacity;
        for (let at = path; at; at = at.parentElement) opacity *= +getComputedStyle(at).opacity;
        if (opacity > 0) opacities[name] = Math.round(100 * opacity) / 100;
      }
      return opacities"""
    _, states = animation.frames(History(run))
    rounded = [{name: round(value, 2) for name, value in state.items()} for state in states]
    assert page.execute_script(seen) == rounded[-1]
    for moment in (len(states) // 3, 0):
        page.execute_script("""const slider = document.querySelector('#formation input');
          slider.value = arguments[0]; slider.dispatchEvent(new Event('input'))""", moment)  # fmt: skip
        assert page.execute_script(seen) == rounded[moment]
    page.refresh()  # --watch refreshes the page too, and the chosen moment must stay.
    assert page.execute_script(seen) == rounded[0]
    assert page.execute_script("return document.querySelector('#formation output').textContent") == "0.3 epochs"
    page.find_element("css selector", "#formation button").click()
    page.implicitly_wait(0)
    until = "return new Promise(done => setTimeout(() => done(document.querySelector('#formation input').value), 600))"
    assert int(page.execute_script(until)) >= 2
    assert page.get_log("browser") == []


def test_study_table_sorts_by_heading_and_shows_the_cell_of_a_row(study, browser):
    from selenium.webdriver import ActionChains

    page = open_page(browser, study)
    assert page.get_log("browser") == []
    headings = page.find_elements("css selector", "#leaderboard th button")
    headings[1].click()
    # The order is numeric, with missing values last.
    assert column(page, 0) == ["random-2", "first-1", ODD, "random-1", "LSTM"]
    headings[1].click()
    assert column(page, 0) == ["random-1", ODD, "first-1", "random-2", "LSTM"]
    headings[0].click()
    assert column(page, 0) == sorted(column(page, 0), key=str.lower)
    drawn = "return [...document.querySelectorAll('#cell-view svg [id]')].map(part => part.id)"
    for row in page.find_elements("css selector", "#leaderboard tbody tr"):
        row.find_element("css selector", "button").click()
        ids = page.execute_script(drawn)
        if row.get_attribute("data-cell") == "first-1":
            edges = {f"edge-{j}-{i}-{op}" for i, (op, j) in enumerate(DARTS_V1.recurrent, start=1)}
            assert edges <= {name.removeprefix("first_1-") for name in ids}
        elif row.get_attribute("data-cell") in ("LSTM", ODD):
            assert ids == []
    page.refresh()
    assert column(page, 0) == sorted(column(page, 0), key=str.lower)
    for row in page.find_elements("css selector", "#leaderboard tbody tr"):
        ActionChains(page).move_to_element(row).perform()
        shown = page.execute_script("return [...document.querySelectorAll('tr.shown')].map(row => row.dataset.cell)")
        assert shown == [row.get_attribute("data-cell")]  # The table has not moved under the pointer.
    assert page.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_has_contrast_in_both_colour_schemes(width, scheme, run, study, browser):
    for folder in (run, study):
        page = open_page(browser, folder)
        set_window(page, width, scheme)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        ink, paper = (
            sum(map(int, re.findall(r"\d+", page.execute_script(script))[:3])) / 3
            for script in (
                "return getComputedStyle(document.querySelector('svg [id$=\"node-0\"] path')).stroke",  # of a node
                "return getComputedStyle(document.querySelector('section')).backgroundColor",
            )
        )
        assert (ink < 90 and paper > 200) if scheme == "light" else (ink > 180 and paper < 60)
