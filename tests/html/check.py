"""Opens the report of `vqrae-cli eval` in Chromium and looks at what a reader would see: rows, pictures, sorting, the console.

    cargo build --release -p vqrae-cli
    python tests/html/check.py [--install] [--screenshot PREFIX]

Python alone and a Chromium; `--install` gets Debian's where there is none. Fails if the page has not a row an image in the order
of eval.json, a picture does not load, a click on a heading does not sort, something is written to the console, or the page
wants anything but itself. `--screenshot` writes PREFIX-light.png and PREFIX-dark.png.
"""
import argparse
import base64
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/vqrae-cli"
NAMES = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,1800"]

# What the page is asked once it stands: it clicks every heading twice and writes down the columns each time.
QUESTION = """<script>
addEventListener("load", () => {
  const heads = [...document.querySelectorAll("th")];
  const rows = () => [...document.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  const seen = { first: rows(), sorted: heads.map((head, column) => [0, 1].map(() => {
    head.firstElementChild.click();
    return { by: head.getAttribute("aria-sort"), column: rows().map((row) => row[column]) };
  })) };
  seen.columns = heads.map((head) => head.textContent);
  seen.pictures = [...document.images].map((image) => image.naturalWidth);
  seen.plots = [...document.querySelectorAll(".plots svg")].map((svg) => svg.querySelectorAll(".bar").length);
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
  document.querySelector("#seen").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
});
</script></body>"""


def browser(install):
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found and install:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=True)
        found = shutil.which("chromium")
    if not found:
        raise SystemExit("no Chromium here; pass --install, or install one")
    return found


def visit(chromium, page, *flags):
    with tempfile.TemporaryDirectory() as profile:
        words = [chromium, *FLAGS, "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, page.as_uri()]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)


def look(chromium, page, folder):
    asked = folder / "asked.html"
    asked.write_text(page.replace("</body>", QUESTION))
    run = visit(chromium, asked, "--dump-dom")
    said = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert not said, f"the console is not empty: {said}"
    answer = re.search(r'<pre id="seen">([^<]+)</pre>', run.stdout)
    assert answer, "the page did not come to its end"
    return json.loads(base64.b64decode(answer[1]))


def check(seen, figures):
    images, measured = figures["per_image"], list(figures["metrics"])
    assert [row[0] for row in seen["first"]] == [image["path"] for image in images], "rows differ from eval.json, the worst first"
    assert len(seen["columns"]) == 1 + len(measured), seen["columns"]
    assert seen["pictures"] and all(width > 0 for width in seen["pictures"]), "a picture does not load"
    assert len(seen["pictures"]) == 3 * (min(len(images), 24) + min(len(images), 12)), len(seen["pictures"])
    assert len(seen["plots"]) == len(measured) and all(seen["plots"]), "a histogram is empty"
    assert seen["overflow"] <= 0, f"the page is {seen['overflow']} pixels too wide"
    for number, clicks in enumerate(seen["sorted"]):
        assert {click["by"] for click in clicks} == {"ascending", "descending"}
        for click in clicks:
            column = click["column"] if number == 0 else [float(x) for x in click["column"] if x != "–"]
            expected = sorted(column, reverse=click["by"] == "descending")
            assert column == expected, f"{seen['columns'][number]}, {click['by']}: {column}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--photos", type=pathlib.Path, default=ROOT / "examples/photos")
    parser.add_argument("--screenshot")
    a = parser.parse_args()
    chromium = browser(a.install)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        subprocess.run([PROGRAM, "eval", a.photos, "-o", folder / "eval"], check=True, capture_output=True)
        page = (folder / "eval/report.html").read_text()
        outside = re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\([^)]*\)|@import', page)
        assert not outside, f"the page wants more than itself: {outside[:3]}"
        figures = json.loads((folder / "eval/eval.json").read_text())
        check(look(chromium, page, folder), figures)
        if a.screenshot:
            for scheme, flag in [("light", "1"), ("dark", "0")]:
                shot = pathlib.Path(f"{a.screenshot}-{scheme}.png").resolve()
                visit(chromium, folder / "eval/report.html", f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={flag}")
        print(f"{len(figures['per_image'])} rows, {len(page):,} bytes: as they should be")


if __name__ == "__main__":
    main()
