"""report.html in a real headless browser: Debian's chromium, driven by playwright. It is no part of `make test`, since
a bare machine has no browser and pip brings none:

    apt-get install -y chromium && .venv/bin/pip install "playwright>=1.50,<2"
    .venv/bin/python -m pytest -q tests/bench/test_report_in_browser.py
    .venv/bin/python tests/bench/test_report_in_browser.py runs/demo/report.html docs/report.png    # a screenshot

Without them it fails, rather than being skipped.
"""
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

GROUP = "details.group"


@contextmanager
def opened(path, width=1200, height=900):
    """(page, all that the browser complained of, all that it asked the network for)."""
    chromium = shutil.which("chromium")
    assert chromium, "no chromium here: apt-get install -y chromium"
    with sync_playwright() as playwright:
        # no sandbox: it does not start for root, and containers are root
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, complaints, requests = browser.new_page(viewport={"width": width, "height": height}), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(Path(path).resolve().as_uri())
        yield page, complaints, [url for url in requests if not url.startswith(("file:", "data:"))]
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from eval import main
    from test_report import HOSTILE, made_up_run

    folder = made_up_run(tmp_path_factory.mktemp("runs") / "hostile", answer=HOSTILE, prompts=2)
    main(["report", str(folder)])
    return folder


def test_filters_unfolds_and_has_nothing_to_complain_of(run):
    groups = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    with opened(run / "report.html") as (page, complaints, requests):
        def expect(kind, low=-2.0, high=11.0):
            wanted = 0
            for group in groups:
                inside = [low <= reward <= high for reward in group["rewards"]]
                wanted += group["kind"] in (kind or group["kind"]) and any(inside)
            assert page.locator(f"{GROUP}:visible").count() == wanted
            assert page.locator("output").inner_text() == f"{wanted} of {len(groups)} prompts shown"
            return wanted

        expect("")
        page.select_option("[name=kind]", "reasoning")
        assert 0 < expect("reasoning") < len(groups)
        page.fill("[name=from]", "1")
        assert 0 < expect("reasoning", low=1) < sum(group["kind"] == "reasoning" for group in groups)
        first = page.locator(f"{GROUP}:visible").first
        assert not first.locator("pre").first.is_visible()
        first.locator("summary.row").click()
        assert first.locator("pre").first.is_visible()
        rewards = [float(row.get_attribute("data-reward")) for row in first.locator("tr[data-reward]").all()]
        assert first.locator("tr.outside").count() == rewards.count(0)
        page.fill("[name=from]", "")
        page.fill("[name=to]", "-1")
        page.select_option("[name=kind]", "preference")
        expect("preference", high=-1)
        page.fill("[name=to]", "")
        page.select_option("[name=kind]", "instruction")
        expect("instruction")
        last = page.locator(f"{GROUP}:visible").last
        last.locator("summary.row").click()
        last.get_by_text("judge prompt, as the model read it").click()
        assert "Score each response" in last.locator("pre").last.inner_text()
        assert "<script>document.title" in last.inner_text()  # the hostile answer, as text
        assert page.title() == "hostile: report"
        for picture in page.locator("img").all():
            assert picture.evaluate("image => image.naturalWidth") > 500
        assert complaints == [] and requests == []


def test_twenty_thousand_trajectories_open_and_filter_within_a_minute(tmp_path):
    from eval import main
    from test_report import made_up_run, records_of, write_lines

    folder = made_up_run(tmp_path / "long", steps=3, warmup=0)
    records = records_of(folder)
    write_lines(folder / "rollouts.jsonl",
                (record | {"step": step} for step in range(20_000 // 36) for record in records))
    main(["report", str(folder)])
    with opened(folder / "report.html") as (page, complaints, _):
        seconds = page.evaluate("performance.getEntriesByType('navigation')[0].duration / 1000")
        filtering = page.evaluate("(() => { const start = performance.now(); filter(); document.body.offsetHeight; "
                                  "return (performance.now() - start) / 1000 })()")
        print(f"{(folder / 'report.html').stat().st_size / 1e6:.1f} MB, {page.locator(GROUP).count()} groups: "
              f"opens in {seconds:.2f} s, filters in {filtering:.3f} s")
        assert seconds < 60 and filtering < 60 and complaints == []


def screenshot(path, out):
    """The figures that expose a constant judge, and trajectories with one unfolded."""
    with opened(path, 1200, 1280) as (page, complaints, requests):
        page.select_option("[name=kind]", "instruction")
        page.locator(f"{GROUP}:visible").first.locator("summary.row").click()
        page.evaluate("document.querySelectorAll('h2')[1].scrollIntoView()")
        page.screenshot(path=out)
        print(f"{out}: {Path(out).stat().st_size} bytes; complaints: {complaints}; network: {requests}")


if __name__ == "__main__":
    screenshot(*sys.argv[1:])
