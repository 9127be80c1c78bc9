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
from published import MD5, Published

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from flows import figures, results, workspace
from flows import page as report_page
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
        "index.html", "accuracy.png", "pretraining.png", "lr_grid.png", "gallery_simmim.png", "recovery_simmim.png",
        "table.md", "family.md", "family.csv", "summary.json", "accuracy.csv",
        "ledger.csv", "recommended.yaml",
    }  # fmt: skip
    page = Page(Path(said["index"]).read_text())
    for words in (said["headline"], "+25.0 points", "d41d8cd98f00b204e9800998ecf8427e", "12,000 train", "mask_token"):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")
    numbers = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert numbers["downstream"]["simmim_ft"]["difference"] == pytest.approx(0.25)
    assert numbers["downstream"]["simmim_ft"]["device_hours_with_pretraining"] == pytest.approx(0.6)
    assert numbers["pretrain"]["simmim"]["hole_psnr"] == 17.9
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "accuracy.csv").read_text())))
    assert [(line["arm"], line["seed"], float(line["test_score"])) for line in lines][3:] == [
        ("simmim_ft", "0", 0.55), ("simmim_ft", "1", 0.58), ("simmim_ft", "2", 0.58),
    ]  # fmt: skip
    for name in ("accuracy.png", "pretraining.png", "lr_grid.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert image.width == 1300  # 6.5 in at 200 dots an inch


def test_the_page_needs_nothing_but_itself(published: Published, tmp_path: Path) -> None:
    text = Path(report_page.build(tmp_path / "report")["index"]).read_text()
    page = Page(text)
    assert len(page.sources) == 5
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
        "3 arms were compared with training the same encoder from scratch: 1 with a gain, 1 with a loss, 1 undecided. "
        "The largest gain: Pretraining on"
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
        "The chosen learning rate is the highest tried, and a wider grid may do better: scratch.",
        "simmim_ft: only 2 of its seeds are also its baseline's.",
    ):
        assert words in text
    assert said["absent"] == ["pretrain later"]
    assert "made by other code" in Page(Path(said["index"]).read_text()).text


def test_runs_on_two_packs_of_the_same_images_do_not_compare(published: Published, tmp_path: Path) -> None:
    published.rows(["simmim"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    published.pretrained("simmim", data={"name": "scenes", "md5": MD5, "pack": "0" * 32})
    said = report_page.build(tmp_path / "report")
    assert "scenes: runs are of 2 packs of it, by different rows of data.yaml, and do not compare." in said["caveats"]


def test_much_that_is_not_published_is_counted_and_not_listed(published: Published, tmp_path: Path) -> None:
    later = [f"later{index}" for index in range(9)]
    tuned = {f"{row}_ft": {**SEEDS, "init": row} for row in ("simmim", *later)}
    published.rows(["simmim", *later], {"scratch": SEEDS}, tuned, fitted={"clusters": {}})
    said = report_page.build(tmp_path / "report")
    assert said["caveats"] == [
        "Not published, and so not in this report: 1 of 1 fit_target rows, 10 of 11 pretrain rows, "
        "9 of 11 downstream rows."
    ]
    text = Page(Path(said["index"]).read_text()).text
    assert f"Not run: {', '.join(later)}, clusters." in text
    assert text.count("later3") == 1


def test_many_runs_by_other_code_are_counted_too(published: Published, tmp_path: Path) -> None:
    rows = [f"row{index}" for index in range(8)]
    published.rows(rows, {"scratch": SEEDS}, {})
    for row in rows:
        published.pretrained(row, code="0" * 32)
    said = report_page.build(tmp_path / "report")
    assert (
        "Made by other code than the code that lies here now: 8 of 9, such as pretrain row0, pretrain row1, "
        "pretrain row2." in said["caveats"]
    )


def test_an_encoder_of_its_own_without_a_baseline_is_not_compared(published: Published, tmp_path: Path) -> None:
    wider = {"encoder": {"name": "vit", "patch_px": 4, "width": 96, "depth": 2, "heads": 3}}
    tuned = {"simmim_ft": {**SEEDS, "init": "simmim"}, "wider_ft": {**SEEDS, "init": "wider"}}
    published.rows({"simmim": {}, "wider": wider}, {"scratch": SEEDS}, tuned)
    published.pretrained("wider")
    published.judged("wider_ft", "wider", {0: 0.9, 1: 0.9, 2: 0.9})
    said = report_page.build(tmp_path / "report")
    assert "from 32.0 % to 57.0 %" in said["headline"]
    assert "Not compared, as no baseline has their encoder, task, data and labels: wider_ft." in said["caveats"]
    assert "no baseline with this encoder" in (tmp_path / "report" / "table.md").read_text()


def family_of(published: Published, tmp_path: Path) -> tuple[dict[str, dict[str, str]], Page]:
    """A family of three methods, one of them with a tokenizer, on two budgets of labels; its table and page."""
    more = {"seeds": [0, 1, 2], "labels": 2000}
    pretrain = {
        "simmim_vit": {},
        "mae": {
            "mask": {"name": "random", "ratio": 0.75, "unit_px": 4},
            "fill": "drop",
            "head": {"name": "transformer_decoder", "width": 48, "depth": 1, "heads": 3},
            "target": {"name": "pixels", "normalise": "patch"},
            "loss": "l2",
        },
        "hog": {"target": {"name": "hog", "cell_px": 4}, "loss": {"name": "l2", "scope": "all"}},
    }
    tuned = {
        "simmim_1000": {**SEEDS, "init": "simmim_vit"},
        "simmim_2000": {**more, "init": "simmim_vit"},
        "clusters_1000": {**SEEDS, "init": "clusters"},
    }
    published.rows(pretrain, {"scratch": SEEDS, "scratch_2000": more}, tuned, fitted={"clusters": {}})
    published.tokenizer(hours=0.25)
    published.pretrained("simmim_vit", hours=0.5)
    published.pretrained("mae", hours=0.25)
    published.pretrained("hog", hours=0.6, without=("hole_psnr",))
    published.pretrained("clusters", hours=0.5, parents=["targets/colours"])
    published.judged("scratch_2000", "scratch", {0: 0.4, 1: 0.42, 2: 0.44}, labels=2000)
    published.judged("simmim_1000", "simmim_vit", {0: 0.55, 1: 0.58, 2: 0.58})
    published.judged("simmim_2000", "simmim_vit", {0: 0.41, 1: 0.41, 2: 0.445}, labels=2000)
    published.judged("clusters_1000", "clusters", {0: 0.35, 1: 0.36, 2: 0.39}, hours=0.1)
    said = report_page.build(tmp_path / "report")
    top, _, *lines = [line for line in (tmp_path / "report/family.md").read_text().splitlines() if line[:1] == "|"]
    head = [cell.strip() for cell in top.strip("|").split("|")]
    table = [dict(zip(head, [cell.strip() for cell in line.strip("|").split("|")], strict=True)) for line in lines]
    return {line["row"]: line for line in table}, Page(Path(said["index"]).read_text())


def test_the_family_stands_side_by_side(published: Published, tmp_path: Path) -> None:
    table, _ = family_of(published, tmp_path)
    assert list(table) == ["simmim_vit", "mae", "hog", "clusters", "scratch, scratch_2000"]
    words = "mask x fill x encoder x head x target x loss"
    assert table["simmim_vit"][words] == "random (0.6) x mask_token x vit (48, 2) x linear x pixels x l1"
    assert table["mae"][words] == ("random (0.75) x drop x vit (48, 2) x transformer_decoder x pixels (patch) x l2")
    assert table["hog"][words].endswith("hog x l2 (all)")
    assert table["clusters"][words].endswith("clusters (colours) x cross_entropy")
    assert table["scratch, scratch_2000"][words] == "from scratch: vit (48, 2)"
    first = table["simmim_vit"]
    assert (first["hidden, %"], first["AvgDist, px"], first["PSNR, dB"]) == ("59", "2.35", "17.9")
    assert first["parameters, encoder / all"] == "2.6 M / 2.7 M"
    assert first["wall time"] == "15 min 00 s"
    assert table["hog"]["PSNR, dB"] == "-"


def test_accuracies_of_the_family_come_with_their_verdicts(published: Published, tmp_path: Path) -> None:
    table, page = family_of(published, tmp_path)
    few, many = (f"test accuracy, % [95 %], {labels} labels" for labels in ("1,000", "2,000"))
    assert table["simmim_vit"][few] == "57.0 [52.7, 61.3]; +25.0 points [22.5, 27.5]"
    assert table["simmim_vit"][many].endswith("; no difference (+0.2 points [-2.4, 2.8])")
    assert table["mae"][few] == table["clusters"][many] == "-"
    assert table["scratch, scratch_2000"][few] == "32.0 [27.0, 37.0]"
    assert table["scratch, scratch_2000"][many] == "42.0 [37.0, 47.0]"
    for words in ("57.0 [52.7, 61.3]", "no difference (+0.2 points", "scratch, scratch_2000", few):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_tokenizer_counts_in_the_cost_of_what_is_pretrained_on_it(published: Published, tmp_path: Path) -> None:
    table, page = family_of(published, tmp_path)
    costs = {row: (line["device-hours"], line["cost relative to simmim_vit"]) for row, line in table.items()}
    assert costs == {
        "simmim_vit": ("0.500", "1.00"),
        "mae": ("0.250", "0.50"),
        "hog": ("0.600", "1.20"),
        "clusters": ("0.750, of which the tokenizer colours 0.250", "1.50"),
        "scratch, scratch_2000": ("-", "-"),
    }
    numbers = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert numbers["pretrain"]["clusters"]["device_hours_with_tokenizer"] == pytest.approx(0.75)
    assert numbers["downstream"]["clusters_1000"]["device_hours_with_pretraining"] == pytest.approx(0.85)
    assert numbers["targets"]["colours"]["perplexity"] == 6.2
    for words in ("Tokenizers", "palette (codes 8)", "27.5", "fit_target colours"):
        assert words in page.text
    # Three figures, two pictures of each of four methods, one of the tokenizer.
    assert len(page.sources) == 3 + 4 * 2 + 1


def test_the_numbers_of_the_family_are_there_as_csv(published: Published, tmp_path: Path) -> None:
    family_of(published, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "family.csv").read_text())))
    assert [line["arm"] for line in lines] == [
        "simmim_1000", "simmim_2000", "", "", "clusters_1000", "scratch", "scratch_2000"
    ]  # fmt: skip
    first, fitted = lines[0], lines[4]
    assert float(first["test_score"]) == pytest.approx(0.57)
    assert float(first["difference"]) == pytest.approx(0.25)
    assert (first["mask"], first["fill"], first["labels"]) == ("random (0.6)", "mask_token", "1000")
    assert float(fitted["device_hours"]) == pytest.approx(0.75)
    assert float(fitted["tokenizer_device_hours"]) == pytest.approx(0.25)
    assert lines[-1]["fill"] == lines[-1]["device_hours"] == ""


def test_without_the_usual_row_the_cheapest_is_the_unit_of_cost(published: Published, tmp_path: Path) -> None:
    published.rows(["long", "quick"], {}, {})
    published.pretrained("long", hours=0.6)
    published.pretrained("quick", hours=0.2)
    shutil.rmtree(published.root / "runs" / "downstream")
    report_page.build(tmp_path / "report")
    text = (tmp_path / "report" / "family.md").read_text()
    assert "cost relative to quick" in text
    assert "| 3.00 |" in text


def test_a_large_family_is_drawn_with_a_colour_a_row_and_room_for_each(published: Published, tmp_path: Path) -> None:
    methods = [f"method_{index}" for index in range(9)]
    more = {"seeds": [0, 1, 2], "labels": 2000}
    tuned = {f"{row}_1000": {**SEEDS, "init": row} for row in methods}
    tuned |= {f"{row}_2000": {**more, "init": row} for row in methods[:2]}
    published.rows(methods, {"scratch": SEEDS, "scratch_2000": more}, tuned)
    published.judged("scratch_2000", "scratch", {0: 0.3, 1: 0.32, 2: 0.34}, labels=2000)
    for row in methods:
        published.pretrained(row)
    for row, one in tuned.items():
        published.judged(row, str(one["init"]), {0: 0.5, 1: 0.52, 2: 0.54}, labels=int(str(one["labels"])))
    # A layout that does not fit is a warning, and so a failure here.
    said = report_page.build(tmp_path / "report")
    assert said["headline"].startswith(
        "11 arms were compared with training the same encoder from scratch: 11 with a gain"
    )
    drawn = figures.looks(results.read().arms, figures.colours(methods))
    assert len({drawn[f"{row}_1000"].colour for row in methods}) == 9
    assert len({(look.colour, look.marker) for look in drawn.values()}) == len(drawn)
    with Image.open(tmp_path / "report" / "accuracy.png") as image:
        # 13 arms in two groups; lines of 8 point type need 0.2 in and more.
        assert image.height / 200 / 13 > 0.3


def test_pretraining_alone_makes_a_report_and_nothing_makes_none(published: Published, tmp_path: Path) -> None:
    shutil.rmtree(published.root / "runs" / "downstream")
    said = report_page.build(tmp_path / "report")
    assert said["headline"] == "No downstream result is published: nothing can be said about encoders yet."
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
    for name in ("gallery_gone.png", "recovery_gone.png", "tokenizer_gone.png"):
        (tmp_path / "report" / name).write_bytes(b"")
    report_page.build(tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
