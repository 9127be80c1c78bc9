"""The report: one page that needs nothing else, and says what the numbers say."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from published import Published

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from flows import page as report_page
from flows import workspace
from flows.workspace import UserError

SEEDS = {"seeds": [0, 1, 2], "labels": 1000}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    """One comparison with an effect: differences of 25, 26 and 24 points."""
    monkeypatch.delenv("UNMASK_HOME", raising=False)
    made = Published(tmp_path / "work")
    monkeypatch.chdir(made.root)
    workspace.root.cache_clear()
    made.rows(["simmim"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    made.pack()
    made.pretrained("simmim")
    made.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.34})
    made.judged("simmim_ft", "simmim", {0: 0.55, 1: 0.58, 2: 0.58})
    yield made
    workspace.root.cache_clear()


class Page(HTMLParser):
    """The tags, addresses and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "src":
                self.sources.append(value or "")
            if key == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_says_what_was_found_and_all_files_are_there(published: Published, tmp_path: Path) -> None:
    said = report_page.build(tmp_path / "report")
    assert said["headline"] == (
        "Pretraining on 12,000 unlabelled images (simmim) raised test accuracy at 1,000 labels from 32.0 % to 57.0 %: "
        "+25.0 points, 95 % interval [22.5, 27.5], 3 seeds."
    )
    assert said["caveats"] == []
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html", "accuracy.png", "pretraining.png", "lr_grid.png", "gallery_simmim.png",
        "table.md", "summary.json", "accuracy.csv",
    }  # fmt: skip
    page = Page(Path(said["index"]).read_text())
    for words in (said["headline"], "+25.0 points", "d41d8cd98f00b204e9800998ecf8427e", "12,000 train", "mask_token"):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")
    numbers = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert numbers["downstream"]["simmim_ft"]["difference"] == pytest.approx(0.25)
    assert numbers["downstream"]["simmim_ft"]["device_hours_with_pretraining"] == pytest.approx(0.6)
    assert numbers["pretrain"]["simmim"]["hole_psnr"] == 17.9
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "accuracy.csv").read_text())))
    assert [(line["arm"], line["seed"], float(line["test_accuracy"])) for line in lines][3:] == [
        ("simmim_ft", "0", 0.55), ("simmim_ft", "1", 0.58), ("simmim_ft", "2", 0.58),
    ]  # fmt: skip
    for name in ("accuracy.png", "pretraining.png", "lr_grid.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert image.width == 1300  # 6.5 in at 200 dots an inch


def test_the_page_needs_nothing_but_itself(published: Published, tmp_path: Path) -> None:
    text = Path(report_page.build(tmp_path / "report")["index"]).read_text()
    page = Page(text)
    assert len(page.sources) == 4
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).verify()
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_run_ids_are_named_and_linked_where_a_server_is_known(published: Published, tmp_path: Path) -> None:
    links = {"mlflow_url": "http://127.0.0.1:5000/", "prefect_url": None}
    page = Page(Path(report_page.build(tmp_path / "report", links)["index"]).read_text())
    manifest = json.loads((published.root / "runs/downstream/simmim_ft/manifest.json").read_text())
    assert f"http://127.0.0.1:5000/#/runs/{manifest['mlflow_run_id']}" in page.links
    assert all(link.startswith("http://127.0.0.1:5000/#/runs/") for link in page.links)
    assert manifest["mlflow_run_id"] in page.text
    assert manifest["prefect_flow_run_id"] in page.text
    hostile = Page(
        Path(report_page.build(tmp_path / "report", {"mlflow_url": "javascript:alert(1)//"})["index"]).read_text()
    )
    assert hostile.links == []


def test_names_and_reasons_are_escaped(published: Published, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    published.pack(quarantined=[{"file": f"{bad}.jpg", "reason": f'not "an" image {bad}'}])
    published.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.34}, compute={"device": bad, "precision": bad})
    page = Page(Path(report_page.build(tmp_path / "report")["index"]).read_text())
    assert "script" not in page.tags
    assert page.text.count(bad) >= 3


def test_a_null_is_no_gain_and_a_loss_is_a_loss(published: Published, tmp_path: Path) -> None:
    published.judged("simmim_ft", "simmim", {0: 0.31, 1: 0.31, 2: 0.345})
    assert (
        "made no difference to test accuracy at 1,000 labels that 3 seeds can show"
        in report_page.build(tmp_path / "report")["headline"]
    )
    published.judged("simmim_ft", "simmim", {0: 0.20, 1: 0.22, 2: 0.235})
    said = report_page.build(tmp_path / "report")["headline"]
    assert "lowered test accuracy at 1,000 labels from 32.0 % to 21.8 %: -10.2 points" in said


def test_one_seed_makes_no_claim(published: Published, tmp_path: Path) -> None:
    published.judged("scratch", "scratch", {0: 0.30})
    published.judged("simmim_ft", "simmim", {0: 0.55})
    said = report_page.build(tmp_path / "report")
    assert said["headline"].endswith("from 30.0 % to 55.0 %: +25.0 points with one seed, so no interval and no claim.")
    assert "One seed only, so no interval is given: scratch, simmim_ft." in said["caveats"]
    assert "half_width" not in json.dumps(said["summary"])
    assert not re.search(r"\bnan\b", Page(Path(said["index"]).read_text()).text, re.IGNORECASE)


def test_several_arms_are_counted_with_their_losses(published: Published, tmp_path: Path) -> None:
    tuned = {
        "up": {**SEEDS, "init": "simmim"},
        "same": {**SEEDS, "init": "simmim"},
        "down": {**SEEDS, "init": "simmim"},
    }
    published.rows(["simmim"], {"scratch": SEEDS}, tuned)
    published.judged("up", "simmim", {0: 0.55, 1: 0.58, 2: 0.58})
    published.judged("same", "simmim", {0: 0.31, 1: 0.31, 2: 0.345})
    published.judged("down", "simmim", {0: 0.20, 1: 0.22, 2: 0.235})
    said = report_page.build(tmp_path / "report")
    assert said["headline"].startswith(
        "3 arms were compared with training from scratch: 1 with a gain, 1 with a loss, 1 undecided. Pretraining on"
    )
    assert any("none is corrected for their number" in caveat for caveat in said["caveats"])


def test_what_a_reader_has_to_know_is_said(published: Published, tmp_path: Path) -> None:
    published.rows(["simmim", "later"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    published.pretrained("simmim", code="0" * 32, data={"name": "scenes", "md5": "f" * 32})
    published.judged("scratch", "scratch", {0: 0.3, 1: 0.3}, lr=2.0e-3, git={"commit": None, "dirty": True})
    said = report_page.build(tmp_path / "report")
    text = " ".join(said["caveats"])
    for words in (
        "Not published, and so not in this report: pretrain later.",
        "Made by other code than the code that lies here now: pretrain simmim.",
        "Made with uncommitted changes to code or rows: downstream scratch.",
        "scenes: runs and pack are of 2 versions of it",
        "scratch: the chosen learning rate, 0.002, is the highest tried",
        "simmim_ft: only 2 of its seeds are also its baseline's.",
    ):
        assert words in text
    assert said["absent"] == ["pretrain later"]
    assert "made by other code" in Page(Path(said["index"]).read_text()).text


def test_pretraining_alone_makes_a_report_and_nothing_makes_none(published: Published, tmp_path: Path) -> None:
    shutil.rmtree(published.root / "runs" / "downstream")
    said = report_page.build(tmp_path / "report")
    assert said["headline"] == "No downstream result is published: nothing can be said about accuracy yet."
    assert (tmp_path / "report" / "accuracy.png").exists()
    shutil.rmtree(published.root / "runs")
    with pytest.raises(UserError, match="nothing is published"):
        report_page.build(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_fault_in_an_input_leaves_the_old_report_whole(published: Published, tmp_path: Path) -> None:
    report_page.build(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    (published.root / "runs/downstream/simmim_ft/results.json").write_text("{")
    with pytest.raises(UserError):
        report_page.build(tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_equal_results_make_equal_bytes_and_old_galleries_go(published: Published, tmp_path: Path) -> None:
    report_page.build(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    (tmp_path / "report" / "gallery_gone.png").write_bytes(b"")
    report_page.build(tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
