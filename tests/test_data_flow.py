"""Fetching, guarding and adding data, in real git and DVC repositories."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from format_trees import ade_tree, cifar_tree, coco_tree, csv_tree, inaturalist_tree, save_image, voc_tree
from PIL import Image
from torchvision.datasets import CIFAR10

pytest.importorskip("dvc")

from flows import data, pins, workspace
from flows.cli import main
from flows.workspace import UserError
from mim_core.data.pack import Source
from mim_core.data.sources import SOURCES

COMMENTED = """# Datasets.
data:
  # The embedded one.
  scenes:
    source: {name: scenes, size_px: [32, 32], train: 12000}  # composed
"""
STAGE = "stages:\n  look:\n    cmd: python -c 1\n    deps: [data/scenes]\n"


def call(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout


def dvc(*arguments: str, folder: Path | None = None) -> str:
    return call(sys.executable, "-m", "dvc", *arguments, folder=folder)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{name}_NAME", "Test")
            patch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
        for name in ("HOME", "XDG_CONFIG_HOME", "DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR"):
            patch.setenv(name, home)
        patch.setenv("DVC_NO_ANALYTICS", "1")
        for name in ("UNMASK_HOME", "DVC_EXP_BASELINE_REV"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def template(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the embedded dataset's files, added by DVC itself and committed."""
    folder = tmp_path_factory.mktemp("template")
    call("git", "init", "-q", "-b", "main", folder=folder)
    dvc("init", "-q", folder=folder)
    (folder / "params").mkdir()
    (folder / "params" / "data.yaml").write_text(COMMENTED)
    (folder / "dvc.yaml").write_text(STAGE)
    (folder / ".gitignore").write_text("/data\n/report\n/.unmask\n")
    (folder / "data" / "scenes").mkdir(parents=True)
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.submodule_search_locations
    for name, part in data.EMBEDDED.items():
        origin = Path(found.submodule_search_locations[0], "datasets", part, name)
        shutil.copyfile(origin, folder / "data" / "scenes" / name)
    dvc("add", "data", folder=folder)
    call("git", "add", "-A", folder=folder)
    call("git", "commit", "-qm", "start", folder=folder)
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    workspace.root.cache_clear()
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the repository with its data and DVC's cache."""
    shutil.copytree(template, tmp_path / "project", symlinks=True)
    yield enter(tmp_path / "project", monkeypatch)
    workspace.root.cache_clear()


@pytest.fixture
def clone(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh clone: no data, no cache."""
    call("git", "clone", "-q", str(template), str(tmp_path / "clone"))
    yield enter(tmp_path / "clone", monkeypatch)
    workspace.root.cache_clear()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of three images, and files that are no good."""
    folder = tmp_path / "photos"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index + len(label) * ord(label[0])).integers(0, 256, (70, 90, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.jpg")
    (folder / "cat" / "text.png").write_text("no image")
    (folder / "dog" / "cut.jpg").write_bytes((folder / "dog" / "0.jpg").read_bytes()[:900])
    (folder / "dog" / "nothing.jpg").touch()
    return folder


def state(folder: Path) -> dict[str, object]:
    """Everything that adding may touch."""
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    files += [folder / "data.dvc", folder / "params" / "data.yaml", folder / ".gitignore"]
    found: dict[str, object] = {str(path): path.read_bytes() for path in files}
    found["index"] = call("git", "ls-files", "--stage", folder=folder)
    found["left"] = sorted(path.name for path in (folder / ".unmask").glob("add-*"))
    return found


def quiet(_: str) -> None:
    pass


# The pin


def test_md5_equals_dvc(project: Path) -> None:
    odd = project / "data" / "odd"
    for name in (".hidden", ".gitignore", "a-b", "a/c", "a.z", "sub/\u00e9 1.png", "left.tmp", ".git/x"):
        (odd / name).parent.mkdir(parents=True, exist_ok=True)
        (odd / name).write_text(name)
    (odd / "link").symlink_to("a-b")
    (project / ".dvcignore").write_text("# names\n*.tmp\n")
    dvc("add", "data")
    assert pins.folder_md5(pins.listing()) == yaml.safe_load((project / "data.dvc").read_text())["outs"][0]["md5"]
    call("git", "add", "data.dvc")
    assert pins.pinned_listing() == pins.listing()
    assert "odd/left.tmp" not in pins.listing()
    assert set(data.guard()) == {"odd", "scenes"}


def test_repro_cannot_smuggle_in_changed_bytes(project: Path) -> None:
    """`dvc repro` rewrites data.dvc; the guard still holds to git's."""
    (project / "data" / "scenes" / "china.jpg").write_bytes(b"changed")
    before = (project / "data.dvc").read_bytes()
    dvc("repro", "-q")
    assert (project / "data.dvc").read_bytes() != before
    with pytest.raises(UserError, match=r"changed: scenes/china.jpg"):
        data.guard()
    data.restore(quiet)
    assert (project / "data.dvc").read_bytes() == before
    dvc("repro", "-q")
    locked = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["look"]["deps"][0]["md5"]
    assert data.guard() == {"scenes": locked}


def test_guard_names_differences(project: Path) -> None:
    assert list(data.guard()) == ["scenes"]
    (project / "data" / "scenes" / "flower.jpg").unlink()
    (project / "data" / "new.txt").write_text("new")
    with pytest.raises(UserError, match=r"added: new.txt; missing: scenes/flower.jpg") as caught:
        data.guard()
    pinned = yaml.safe_load((project / "data.dvc").read_text())["outs"][0]["md5"]
    for expected in (pinned, pins.folder_md5(pins.listing()), "unmask data restore", "unmask data add"):
        assert expected in str(caught.value)


def test_guard_sees_a_change_with_size_and_time_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "SETTLED_NS", 0)
    data.guard()
    file = project / "data" / "scenes" / "china.jpg"
    content, status = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"changed: scenes/china.jpg"):
        data.guard()


def test_known_files_are_not_read_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "SETTLED_NS", 0)
    data.guard()
    memory = project / ".unmask" / "md5.json"
    kept = json.loads(memory.read_text())
    kept[str(project / "data")]["scenes/china.jpg"][-1] = "remembered"
    memory.write_text(json.dumps(kept))
    assert pins.listing()["scenes/china.jpg"] == "remembered"
    memory.write_text("[broken")
    assert list(data.guard()) == ["scenes"]


def test_guard_refuses_what_dvc_does_not_see(project: Path, tmp_path: Path) -> None:
    (project / "data" / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match="is a link to a folder"):
        data.guard()
    (project / "data" / "linked").unlink()
    (project / "data" / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="gone"):
        data.guard()
    shutil.rmtree(project / "data")
    with pytest.raises(UserError, match="unmask data restore"):
        data.guard()


def test_an_experiment_is_held_to_its_commit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = call("git", "rev-parse", "HEAD").strip()
    (project / "data" / "new.txt").write_text("new")
    dvc("add", "data")
    call("git", "add", "data.dvc")
    data.guard()
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", head)
    with pytest.raises(UserError, match="the commit that this experiment starts from"):
        data.guard()


@pytest.mark.slow
def test_dvc_names_an_experiments_commit(project: Path) -> None:
    """An experiment stages data.dvc as `dvc repro` has rewritten it, both in place and in a copy of the repository."""
    see = "import os, pathlib; pathlib.Path('seen').write_text(os.environ['DVC_EXP_BASELINE_REV'])"
    (project / "dvc.yaml").write_text(f'stages:\n  look:\n    cmd: {sys.executable} -c "{see}"\n    outs: [seen]\n')
    call("git", "commit", "-qam", "look")
    dvc("exp", "run", "--quiet")
    assert (project / "seen").read_text() == call("git", "rev-parse", "HEAD").strip()


def test_unreadable_pin(project: Path) -> None:
    (project / "data.dvc").write_text("outs: []\n")
    call("git", "add", "data.dvc")
    with pytest.raises(UserError, match=r"git checkout HEAD -- data\.dvc"):
        data.guard()


# Restoring


def test_restore_on_a_fresh_clone(clone: Path) -> None:
    pinned, said = (clone / "data.dvc").read_bytes(), list[str]()
    data.restore(said.append)
    assert (clone / "data.dvc").read_bytes() == pinned
    assert {path.name for path in (clone / "data" / "scenes").iterdir()} == set(data.EMBEDDED)
    dvc("status", "-q", "data.dvc")
    assert not call("git", "status", "--porcelain", "--untracked-files=no")
    assert list(data.guard()) == ["scenes"]
    (clone / ".dvc" / "config.local").write_text("[nonsense]\nx = 1\n")  # with it any call of DVC fails
    said.clear()
    data.restore(said.append)
    assert said == ["data: complete, and as data.dvc has it"]


def test_restore_leaves_changed_files_alone(project: Path) -> None:
    mine = project / "data" / "scenes" / "china.jpg"
    mine.write_bytes(b"mine")
    (project / "data" / "scenes" / "flower.jpg").unlink()
    with pytest.raises(UserError, match=r"changed: scenes/china.jpg\).*Use `--force`"):
        data.restore(quiet)
    assert mine.read_bytes() == b"mine"
    assert (project / "data" / "scenes" / "flower.jpg").is_file()


def test_restore_never_writes_over_a_file(clone: Path) -> None:
    mine = clone / "data" / "scenes" / "china.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="nothing runs on other bytes"):
        data.restore(quiet)
    assert mine.read_bytes() == b"mine"


def test_restore_pulls_from_a_remote(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "data" / "own").mkdir()
    (project / "data" / "own" / "x.txt").write_text("not in scikit-learn")
    dvc("add", "data")
    dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    dvc("push", "data.dvc")
    call("git", "commit", "-qam", "own data")
    call("git", "clone", "-q", str(project), str(tmp_path / "second"))
    enter(tmp_path / "second", monkeypatch)
    data.restore(quiet)
    assert (tmp_path / "second" / "data" / "own" / "x.txt").read_text() == "not in scikit-learn"
    assert set(data.guard()) == {"own", "scenes"}


def test_restore_takes_from_the_cache(project: Path) -> None:
    shutil.rmtree(project / "data")
    (project / "data.dvc").unlink()
    data.restore(quiet)
    assert list(data.guard()) == ["scenes"]


# Adding


def test_add_images_with_classes(project: Path, photos: Path) -> None:
    said = list[str]()
    result = data.add(photos, "pets", None, said.append)
    assert (result["images"], result["classes"], result["unlabelled"]) == (6, ["cat", "dog"], 0)
    assert {entry["file"] for entry in result["quarantined"]} == {"cat/text.png", "dog/cut.jpg", "dog/nothing.jpg"}
    assert result["size"] == (64, 64)
    assert result["md5"] == data.guard()["pets"]
    copied = {path.relative_to(project / "data" / "pets") for path in (project / "data" / "pets").rglob("*.jpg")}
    assert copied == {Path(label, f"{index}.jpg") for label in ("cat", "dog") for index in range(3)}
    rows = (project / "params" / "data.yaml").read_text()
    expected = "  pets:\n    source: {name: folder, size_px: [64, 64], validation: 0.1, test: 0.1}\n"
    assert rows == COMMENTED + expected
    staged = call("git", "diff", "--cached", "--name-only").split()
    assert staged == ["data.dvc", "params/data.yaml"]
    assert not call("git", "diff", "--name-only")
    assert (project / "report" / "quarantine" / "pets.csv").read_text().count("\n") == 4
    assert "dvc repro pretrain@" in said[-1]
    assert not list((project / ".unmask").glob("add-*"))


def test_replace_a_changed_dataset(project: Path, photos: Path) -> None:
    data.add(photos / "cat", "cats", (24, 40), quiet)
    assert "size_px: [24, 40]" in (project / "params" / "data.yaml").read_text()
    (project / "data" / "cats" / "0.jpg").write_bytes(b"broken")
    rows = project / "params" / "data.yaml"
    rows.write_text(rows.read_text().replace("size_px: [24, 40]", "size_px: 24"))
    with pytest.raises(UserError, match="--replace"):
        data.add(photos / "dog", "cats", None, quiet)
    result = data.add(photos / "dog", "cats", None, quiet, replace=True)
    assert (result["classes"], result["unlabelled"], result["size"]) == ([], 3, (24, 24))
    assert "size_px: 24," in rows.read_text()
    data.add(photos / "dog", "cats", (16, 24), quiet, replace=True)
    assert yaml.safe_load(rows.read_text())["data"]["cats"]["source"]["size_px"] == [16, 24]
    (project / "data" / "scenes" / "china.jpg").write_bytes(b"broken")
    before = state(project)
    with pytest.raises(UserError, match=r"changed: scenes/china.jpg"):
        data.add(photos / "dog", "cats", None, quiet, replace=True)
    assert state(project) == before


@pytest.mark.parametrize("name", ["../x", "", "A", "a b", "a/b", "x" * 101])
def test_bad_names(project: Path, photos: Path, name: str) -> None:
    before = state(project)
    with pytest.raises(UserError, match="--name: found"):
        data.add(photos, name, None, quiet)
    assert state(project) == before


def test_bad_folders_and_sizes(project: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.png").write_text("no image")
    before = state(project)
    for source, said in {
        tmp_path / "missing": "does not exist",
        photos / "cat" / "0.jpg": "is a file",
        tmp_path / "empty": "the folder is empty",
        tmp_path / "texts": r"found no readable image, 1 refused \(listed in report/quarantine/pets.csv\)",
        project / "data" / "scenes": "lies in data/ itself",
    }.items():
        with pytest.raises(UserError, match=said):
            data.add(source, "pets", None, quiet)
    with pytest.raises(UserError, match="--size: found 0 x 32"):
        data.add(photos, "pets", (0, 32), quiet)
    with pytest.raises(UserError, match="a dataset of the source 'scenes'"):
        data.add(photos, "scenes", None, quiet, replace=True)
    (project / "data" / "stray.txt").write_text("stray")
    with pytest.raises(UserError, match=r"added: stray\.txt"):
        data.add(photos, "pets", None, quiet)
    (project / "data" / "stray.txt").unlink()
    assert state(project) == before


def test_failure_of_dvc_is_undone(project: Path, photos: Path) -> None:
    shutil.rmtree(project / ".dvc" / "cache")
    (project / ".dvc" / "cache").write_text("no folder")
    before = state(project)
    with pytest.raises(UserError, match="all is put back"):
        data.add(photos, "pets", None, quiet)
    assert state(project) == before


def test_failure_of_git_is_undone(project: Path, photos: Path) -> None:
    (project / ".git" / "index.lock").touch()
    before = state(project)
    with pytest.raises(UserError, match="git could not stage"):
        data.add(photos, "pets", None, quiet)
    assert state(project) == before


def test_failure_to_write_is_undone(project: Path, photos: Path) -> None:
    """Even where DVC itself has staged data.dvc by then."""
    dvc("config", "core.autostage", "true")
    (project / "params" / f".data.yaml.{os.getpid()}.part").mkdir()
    before = state(project)
    with pytest.raises(UserError, match=r"data/pets: .*so all is put back"):
        data.add(photos, "pets", None, quiet)
    assert state(project) == before


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs a second user")
def test_no_write_permission(project: Path, photos: Path) -> None:
    """The superuser may write anywhere, so where the test runs as that it becomes another one."""
    superuser = os.geteuid() == 0
    closed = [folder for folder in project.parents if folder.stat().st_mode & 5 != 5] if superuser else []
    modes = {folder: folder.stat().st_mode for folder in (project, *closed)}
    for folder in closed:
        folder.chmod(0o755)
    project.chmod(0o555)
    if superuser:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="project: cannot be written to"):
            data.add(photos, "pets", None, quiet)
    finally:
        if superuser:
            os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


# Adding datasets in published forms


TREES = {"coco": coco_tree, "voc": voc_tree, "ade20k": ade_tree, "inaturalist": inaturalist_tree, "csv": csv_tree}
MASKS = {"annotations", "SegmentationClass", "SegmentationObject"}


@pytest.mark.parametrize("form", TREES)
def test_forms_are_recognised_and_come_in_whole(project: Path, tmp_path: Path, form: str) -> None:
    """The copy is read as the original was: annotations come along, and what no annotation names stays behind."""
    root = TREES[form](tmp_path / "outer" / "inner")
    if form != "ade20k":  # there a folder is the list of its images
        save_image(root / "JPEGImages" / "more.jpg", 99)
    original = build_source(form, root)
    broken = next(path for path in original.files if path.suffix in (".jpg", ".png") and not MASKS & set(path.parts))
    broken.write_bytes(broken.read_bytes()[:200])
    said = list[str]()
    result = data.add(tmp_path / "outer", "mine", None, said.append)
    assert said[0].startswith(f"{tmp_path / 'outer'}: taken as --format {form}: ")
    assert result["form"] == form
    assert result["images"] == sum(original.counts.values()) - 1
    assert [entry["file"] for entry in result["quarantined"]] == [broken.relative_to(root).as_posix()]
    assert result["size"] == ((32, 32) if form == "csv" else (224, 224))
    row = yaml.safe_load((project / "params" / "data.yaml").read_text())["data"]["mine"]["source"]
    assert row == {"name": form, "size_px": list(result["size"]), "validation": 0.1, "test": 0.1}
    copied = build_source(form, project / "data" / "mine")
    assert copied.counts == build_source(form, root).counts
    assert copied.quarantined == result["quarantined"]
    files = {path.relative_to(project / "data" / "mine") for path in (project / "data" / "mine").rglob("*.*")}
    assert {path.relative_to(root) for path in original.files} == files
    assert data.guard()["mine"] == result["md5"]


def build_source(form: str, root: Path) -> Source:
    source: Source = SOURCES[form](root)
    return source


def test_cifar_comes_in(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "outer"
    for name, table in cifar_tree(root, CIFAR10, "labels", "label_names", 5).items():
        monkeypatch.setattr(CIFAR10, name, table)
    result = data.add(root, "small", None, quiet)
    assert (result["form"], result["images"], result["size"]) == ("cifar10", 60, (32, 32))
    assert "source: {name: cifar10, size_px: [32, 32], validation: 0.1}" in (project / "params/data.yaml").read_text()


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_archives_come_in(project: Path, photos: Path, tmp_path: Path, ending: str) -> None:
    kind = {"zip": "zip", "tar.gz": "gztar"}[ending]
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), kind, photos.parent, photos.name))
    assert archive.name == f"photos.{ending}"
    result = data.add(archive, "pets", (24, 24), quiet)
    assert (result["form"], result["images"], result["classes"]) == ("folder", 6, ["cat", "dog"])
    assert {entry["file"] for entry in result["quarantined"]} == {"cat/text.png", "dog/cut.jpg", "dog/nothing.jpg"}
    assert len(list((project / "data" / "pets").rglob("*.jpg"))) == 6
    assert not list((project / ".unmask").glob("add-*"))
    assert archive.is_file()


def test_what_an_archive_holds_in_vain_is_listed(project: Path, tmp_path: Path) -> None:
    root = coco_tree(tmp_path / "coco")
    with tarfile.open(tmp_path / "coco.tar", "w") as archive:
        archive.add(root, "wrap/coco")
        entry = tarfile.TarInfo("../../evil.png")
        archive.addfile(entry)
        entry = tarfile.TarInfo("wrap/coco/train2017/link.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    result = data.add(tmp_path / "coco.tar", "things", None, quiet)
    assert (result["form"], result["images"]) == ("coco", 5)
    expected = {"coco.tar: ../../evil.png", "coco.tar: wrap/coco/train2017/link.png"}
    assert {entry["file"] for entry in result["quarantined"]} == expected
    assert (project / "report" / "quarantine" / "things.csv").read_text().count("\n") == 3


def test_forms_that_are_not_clear_or_not_there(project: Path, photos: Path, tmp_path: Path) -> None:
    before = state(project)
    root = csv_tree(coco_tree(tmp_path / "both"))
    with pytest.raises(UserError, match=r"could be coco by annotations/.*; csv by labels.csv with a .*--format"):
        data.add(root, "mine", None, quiet)
    with pytest.raises(UserError, match=r"--format: 'cocco' is not one of .*; did you mean 'coco'\?"):
        data.add(root, "mine", None, quiet, form="cocco")
    with pytest.raises(UserError, match=r"both: \['JPEGImages', .* are not there; a VOC folder has them"):
        data.add(root, "mine", None, quiet, form="voc")
    (root / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(UserError, match=r"instances_val2017.json line 1 column 2: "):
        data.add(root, "mine", None, quiet, form="coco")
    (tmp_path / "bad.zip").write_text("none")
    with pytest.raises(UserError, match="the archive is damaged"):
        data.add(tmp_path / "bad.zip", "mine", None, quiet)
    assert state(project) == before
    assert data.add(root, "mine", None, quiet, form="csv")["images"] == 5
    with pytest.raises(UserError, match=r"'mine' is a dataset of the source 'csv', not 'folder'"):
        data.add(photos, "mine", None, quiet, replace=True)


def test_a_replaced_dataset_is_read_as_its_row_says(project: Path, tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "voc")
    data.add(root, "voc", (32, 48), quiet)
    path = project / "params" / "data.yaml"
    text = path.read_text()
    path.write_text(text.replace("test: 0.1}", "test: 0.1, lists: segmentation, fit: contain}"))
    (root / "SegmentationClass" / "2007_000001.png").unlink()
    said = list[str]()
    result = data.add(root, "voc", None, said.append, replace=True)
    assert result["size"] == (32, 48)
    assert [entry["file"] for entry in result["quarantined"]] == ["JPEGImages/2007_000001.jpg"]
    assert "with boxes, instances, presence, semantic" in said[-1]
    assert "lists: segmentation, fit: contain" in path.read_text()
    path.write_text(path.read_text().replace("fit: contain", "fit: fill"))
    with pytest.raises(UserError, match=r"^params/data.yaml: data.voc.source.fit: found 'fill'; must be 'cover'"):
        data.add(root, "voc", None, quiet, replace=True)


def test_add_by_the_command(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco_tree(tmp_path / "coco")
    with pytest.raises(SystemExit) as ended:
        main(["data", "add", str(root), "--name", "things", "--format", "coco", "--size", "64x48"])
    assert ended.value.code == 0
    assert "data/things: 5 images, 2 classes, with boxes, instances, 0 files refused; read as 64 x 48 px" in (
        capsys.readouterr().out
    )
