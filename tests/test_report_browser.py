"""The report in a real headless browser: images, tables and plots are there and have a size."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from test_report import results  # noqa: F401

from mmrstraj_jax import evaluate

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
PROBE = """<script>
const boxes = (tag) => [...document.getElementsByTagName(tag)].map((x) => {
  const box = x.getBoundingClientRect();
  return [Math.round(box.width), Math.round(box.height), x.complete === undefined ? 1 : x.naturalWidth];
});
document.title = JSON.stringify({img: boxes("img"), table: boxes("table"), wide: document.body.scrollWidth});
</script>"""


def _browse(tmp_path, *options):
    # fmt: off
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--window-size=1200,2400", f"--user-data-dir={tmp_path / 'profile'}", *options]
    # fmt: on
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_renders(results, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    evaluate.main(["report", *[f"M{i}={folder}" for i, folder in enumerate(results)], "--out", str(out)])
    page = out / "report.html"
    probed = tmp_path / "probed.html"
    page_text = page.read_text(encoding="utf-8")
    probed.write_text(page_text.replace("</html>", f"{PROBE}</html>"), encoding="utf-8")
    title = re.search("<title>(.*?)</title>", _browse(tmp_path, "--dump-dom", probed.as_uri()))
    seen = json.loads(title[1])
    assert len(seen["img"]) >= 3 and all(min(image) >= 40 for image in seen["img"])  # plots and panels
    assert len(seen["table"]) >= 5 and all(width > 200 and height > 40 for width, height, _ in seen["table"])
    assert seen["wide"] <= 1200  # nothing runs out of the window

    shot = tmp_path / "shot.png"
    _browse(tmp_path, f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2400, 1200) and 0.01 < (pixels < 128).mean() < 0.5  # written on, and not black
