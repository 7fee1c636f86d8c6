"""report.html: what is in it, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from cgs_jax.analysis import plots, report
from cgs_jax.data import cache, completion
from cgs_jax.scoring import summaries
from layouts import nnunet_folder

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_report_holds_everything(trained):
    workdir, printed = trained
    assert str(workdir / "report.html") in printed
    text = (workdir / "report.html").read_text()
    outside = re.findall(r"https?://[^\"' ]+|(?:src|href)=\"(?!data:)[^\"]*", text)
    assert not outside
    data, summary = data_of(text), json.loads((workdir / "summary.json").read_text())
    for split in ("test", "test_literature", "val", "val_literature"):
        assert data["summary"][split] == summary[split]
        assert data["summary"][split]["cases"].keys() == summary[split]["cases"].keys()
    assert data["config"] == json.loads((workdir / "config.json").read_text())
    assert data["curves"].startswith("data:image/svg+xml;base64,")
    assert {shown["case"] for shown in data["shown"]} == {"Patient_06", "Patient_07"}
    assert set(data["shares"]) == {"dice", "jaccard", "missed"} < set(data["heads"])
    dice = [shown["dice"] for shown in data["shown"]]
    assert dice == sorted(dice)
    assert float(data["facts"]["training and validation"].split()[0]) > 0
    assert "cores" in data["facts"]["hardware"]


def test_slices_of_a_case():
    truth = np.zeros((60, 40, 600), np.uint8)
    truth[5:50, 5:10, 5:10] = 1
    truth[30, 5:30, 5:30] = 2
    shown = plots.Shown(
        "</script><b>", 50.0, "stored", np.uint16(truth) + 1, truth, np.roll(truth, 3, 0)
    )
    slices = report.slices(shown)
    numbers = slices["numbers"]
    assert (numbers[0], numbers[-1], len(numbers)) == (5, 52, report.SLICES)
    assert abs(numbers[slices["start"]] - 30) <= 1
    assert len(slices["pictures"]) == report.SLICES
    image, overlay, prediction, error = plots.panels(shown, 5)
    assert image.shape == (40, 600, 3)
    assert (overlay != image).any(-1).sum() == 25
    assert (prediction == image).all()  # it begins three slices later
    np.testing.assert_array_equal((error != image).any(-1), truth[5] == 1)  # missed
    too_much = plots.panels(shown._replace(truth=shown.label, label=truth), 5)[3]
    for picture, name in ((error, "missed"), (too_much, "too much")):
        colour = picture[truth[5] == 1].mean(0) - 0.45 * image[truth[5] == 1].mean(0)
        expected = 0.55 * 255 * np.array(to_rgb(plots.ERRORS[name]))
        np.testing.assert_allclose(colour, expected, atol=1.5)
    turned = plots.panels(shown._replace(slicing="axial"), 5)[1]
    np.testing.assert_array_equal(turned, overlay[::-1, ::-1])


@pytest.mark.parametrize(("aspect", "size"), [(1, (40, 10)), (4, (40, 40)), (0.25, (160, 10))])
def test_pixels_that_are_no_squares(aspect, size):
    """Pictures of the report are as wide and high as the body, and leave no pixel out."""
    full = np.ones((1, 10, 10), np.uint8)
    shown = plots.Shown("a", 1.0, "stored", full, full, full, aspect)
    (picture,) = report.slices(shown)["pictures"]
    found = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert found.size == size
    axes, *_ = plots.overlays([shown], ["organ"]).axes
    assert axes.get_aspect() == aspect


def test_shown_cases_know_the_aspect_of_their_pixels(tmp_path, monkeypatch):
    config, _ = nnunet_folder(tmp_path)
    completion.complete(config.data)
    prepared = cache.prepare(config)
    case = prepared.splits.val[0]
    label = prepared.volume(case).label
    monkeypatch.setattr(summaries, "segmented", lambda *_: [(case, (label,))])
    read, predictor = prepared.volume, SimpleNamespace(scoring=None)
    for spacing, aspect in (((1.0, 6.0, 1.5), 4), (None, 1)):
        monkeypatch.setattr(prepared, "volume", lambda c, s=spacing: read(c)._replace(spacing=s))
        (shown,) = plots.show(predictor, prepared, [(case, 100.0)])
        assert shown.aspect == aspect
        np.testing.assert_array_equal(shown.truth, shown.label)


def test_curves_show_what_a_run_has():
    """Organs, and what CGS over another method adds; nothing of what no line has."""
    one = {"step": 10, "loss": 2.0, "sup": 1.0, "cgs/unsup": 0.5}
    lines = [one, one | {"step": 20, "loss": 1.0}, {"step": 20, "val/a": 50.0, "val/dice": 50.0}]
    loss, dice = plots.curves(lines, ["a", "b"]).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert drawn == {
        "total": [[10, 2], [20, 1]],
        "supervised": [[10, 1], [20, 1]],
        "of CGS over it (unweighted)": [[10, 0.5], [20, 0.5]],
    }
    assert [line.get_label() for line in dice.lines] == ["a", "mean"]
    assert plots.curves([], ["a"]) is None


def test_pictures_show_the_body():
    """The least rows and columns that hold all that is seen in any picture, and 3 pixels more."""
    pictures = np.zeros((2, 100, 60, 3), np.uint8)
    assert pictures[:, *plots.body(pictures)].shape == pictures.shape
    pictures[0, 40:50, 1:20] = 90
    pictures[1, 70, 30, 2] = 255
    pictures[1, 90] = 5  # noise in the air
    assert plots.body(pictures) == (slice(37, 74), slice(0, 34))


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_report_in_a_browser(trained, tmp_path):
    """No errors; the slider changes the picture and the heading sorts."""
    use = """<script>
      const slider = document.querySelector("input[type=range]");
      const picture = document.querySelector("img.strip"), before = picture.src;
      slider.value = slider.value === "0" ? 1 : 0;
      slider.dispatchEvent(new Event("input"));
      const column = "#cases td:nth-child(3)";
      const cells = () => [...document.querySelectorAll(column)].map(c => +c.innerText);
      const heading = document.querySelectorAll("#cases th")[2];
      const up = heading.click() || cells(), down = heading.click() || cells();
      const moved = picture.src !== before;
      document.body.innerText = "RESULT " + JSON.stringify({ moved, up, down });
    </script>"""
    page = tmp_path / "report.html"
    page.write_text((trained[0] / "report.html").read_text().replace("</body>", use + "</body>"))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    line += ["--virtual-time-budget=5000", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*line, page.as_uri()], capture_output=True, text=True, timeout=120)
    result = json.loads(re.search(r"RESULT (\{.*\})", done.stdout)[1])
    assert result["moved"]
    assert len(result["up"]) == 8
    assert result["up"] == sorted(result["up"])
    assert result["down"] == sorted(result["down"], reverse=True)
    assert "CONSOLE" not in done.stderr
