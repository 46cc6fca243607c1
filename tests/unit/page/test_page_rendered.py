"""What a browser makes of a page: its text, with and without the script, at two widths."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qmp_memlistener.page import comparison_page
from tests.support.host import patience
from tests.unit.page.page_support import comparison, page_of, write_recording

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="chromium is not here: apt-get install --no-install-recommends chromium",
)


def rendered(page: Path, home: Path, width: int, *options: str) -> str:
    """The document after its script ran, as HTML."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-extensions", "--disable-component-update",
            f"--user-data-dir={home / 'profile'}", f"--window-size={width},900",
            "--virtual-time-budget=1000", *options, "--dump-dom", page.as_uri(),
        ],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=patience(60),
        check=True,
    )  # fmt: skip
    return done.stdout.decode()


def test_the_script_draws_and_names_stay_text(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of(write_recording(tmp_path / "r.jsonl")))
    dom = rendered(page, tmp_path, 400)
    assert "<title>guest &lt;/script&gt;" in dom  # a name that ran would have changed it
    assert re.search(r'<div id="live">', dom)  # no longer hidden
    assert re.search(r'<div id="static" hidden', dom)
    assert ">Nothing is chosen.</p>" in dom
    (canvas,) = re.findall(r"<canvas [^>]*>", dom)
    width, height = (int(re.findall(rf'{side}="(\d+)"', canvas)[0]) for side in ("width", "height"))
    assert 300 < width < 500
    assert height > 200


PLAYED = """<script>
const canvas = document.getElementById("time"), heard = [];
const box = canvas.getBoundingClientRect();
const hear = () => heard.push(document.getElementById("about").textContent);
for (const key of ["ArrowDown", "ArrowDown", "+", "ArrowRight", "-", "Home"]) {
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: key }));
  hear();
}
const pointer = { clientX: box.left + box.width / 2, clientY: box.top + 60 };
canvas.dispatchEvent(new PointerEvent("pointermove", pointer));
heard.push("hover: " + document.getElementById("hover").textContent);
document.title = heard.join(" | ");
</script></body>"""


@pytest.mark.full
def test_keys_and_the_pointer_say_what_is_drawn(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = page_of(write_recording(tmp_path / "r.jsonl"))
    # the policy would not let it run, as it should
    open_page, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert found == 1
    page.write_text(open_page.replace("</body>", PLAYED))
    dom = rendered(page, tmp_path, 1280)
    title = re.findall(r"<title>(.*?)</title>", dom)[0]
    assert "hole 0xa0000+0x20000" in title.split(" | ")[0]
    assert "30 ms; between 0.010000 s and 0.040000 s" in title.split(" | ")[0]
    assert "slot 3: 0x0+0x1000, until the end" in title.split(" | ")[1]
    assert title.split(" | ")[2:6] == title.split(" | ")[1:2] * 4  # what is chosen stays
    assert "hover: hole 0xa0000+0x20000" in title


@pytest.mark.full
def test_a_script_of_somebody_else_does_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = page_of(write_recording(tmp_path / "r.jsonl"))
    page.write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"))
    assert "<title>guest &lt;/script&gt;" in rendered(page, tmp_path, 1280)


@pytest.mark.full
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_is_drawn(tmp_path: Path, width: int, scheme: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(comparison_page(comparison(), "plug virtio-net-pci n0"))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom = rendered(page, tmp_path, width, *dark)
    assert "pause lost more than direct: vCPU pause, by 2.00 ms a round." in dom
    assert ">Nothing is chosen.</p>" in dom
