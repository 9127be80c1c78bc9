"""Files that others made: code in them is not run, sizes in them are not believed, names in them lead nowhere else."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from core_pieces import ENCODER, FILES, PRETRAIN, python, write_rows
from safetensors.torch import save, save_file

from mim_core import checkpoint
from mim_core.encoders import ENCODERS
from mim_core.jobs import pretrain
from mim_core.jobs.downstream import begin
from mim_core.jobs.pretrain import load_tokenizer
from mim_core.params import ROW_NAME, EncoderOf, load
from mim_core.published import read_state
from mim_core.spec import SpecError, build, check


def faults(folder: Path) -> list[str]:
    with pytest.raises(SpecError) as error:
        load(folder)
    return str(error.value).splitlines()


class Payload:
    """A pickle of it makes a file where it is read by a careless reader."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def live(made: Path) -> Payload:
    """A payload of which it is seen first that it works."""
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.is_dir()
    made.rmdir()
    return Payload(made)


@pytest.mark.parametrize("place", ["optimiser", "average", "whole"])
def test_a_checkpoint_with_code_in_it_is_refused_though_its_sums_are_right(tmp_path: Path, place: str) -> None:
    payload = live(tmp_path / "made")
    good = {"optimiser": {}, "average": None}
    held = payload if place == "whole" else {"model": {**good, place: {"state": payload}}}
    checkpoint.save(tmp_path, 3, {"w": torch.ones(2)}, {"model": good}, {"seconds": 1.0})
    folder = tmp_path / "step_000000003"
    torch.save(held, folder / "optimisers.pt")
    (folder / checkpoint.SUMS).write_bytes(b"".join(checkpoint._sum(folder / name) for name in checkpoint.FILES))
    assert checkpoint.damage(folder) == ""
    with pytest.raises(ValueError, match=r"optimisers\.pt: refused, and nothing of it was run: .* delete .* run again"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_pickle_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    """Everything of our own that is read as safetensors: a renamed pickle stays a pickle."""
    file = tmp_path / "tokenizer.safetensors"
    torch.save({"w": live(tmp_path / "made")}, file)
    for read in (checkpoint.read_weights, read_state, lambda path: load_tokenizer(path, 3)):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            read(file)
    assert not (tmp_path / "made").exists()


def framed(header: bytes, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def said(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": framed(b""),
    "a header longer than the file": framed(b"{}", length=1000),
    "a header of 2 ** 63 bytes": framed(b"{}", length=2**63),
    "a header of 2 ** 64 - 1 bytes": framed(b"{}", length=2**64 - 1),
    "a header of 150 MB": framed(b"{}" + b" " * 150_000_000),
    "nonsense": framed(b"{nonsense"),
    "not UTF-8": framed(b'{"\xff": 1}'),
    "a list": framed(b"[1, 2]"),
    "nested 100,000 deep": framed(b"[" * 100_000),
    "offsets beyond the file": framed(said(w=tensor(data_offsets=[0, 1_000_000], shape=[250_000]))),
    "offsets of 2 ** 60": framed(said(w=tensor(data_offsets=[0, 2**60], shape=[2**58]))),
    "a shape that overflows": framed(said(w=tensor(shape=[2**62, 2**62, 2**62]))),
    "a shape of another size": framed(said(w=tensor(shape=[2**30]))),
    "a negative shape": framed(said(w=tensor(shape=[-2]))),
    "offsets that run backwards": framed(said(w=tensor(data_offsets=[8, 0]))),
    "negative offsets": framed(said(w=tensor(data_offsets=[-8, 0]))),
    "tensors that overlap": framed(said(w=tensor(), v=tensor(data_offsets=[4, 12]))),
    "tensors on the same bytes": framed(said(w=tensor(), v=tensor())),
    "a hole": framed(said(w=tensor(), v=tensor(data_offsets=[12, 20])), b"\0" * 20),
    "bytes that belong to none": framed(said(w=tensor()), b"\0" * 64),
    "an unknown type": framed(said(w=tensor(dtype="OBJECT"))),
    "a tensor that is a number": framed(said(w=7)),
    "metadata that is no text": framed(said(__metadata__={"unmask": {"encoder": 1}}, w=tensor()), b"\0" * 8),
    "what we say is no JSON": save({"w": torch.ones(2)}, {"unmask": "{"}),
    "what we say is a list": save({"w": torch.ones(2)}, {"unmask": "[1]"}),
    "what we say is deep": save({"w": torch.ones(2)}, {"unmask": "[" * 100_000}),
}
OURS = {"what we say is no JSON", "what we say is a list", "what we say is deep"}
"""Of no concern to weights of others."""


@pytest.mark.parametrize("name", BROKEN)
def test_headers_of_weights_are_not_believed(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(BROKEN[name])
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (checkpoint.read_weights, *(() if name in OURS else (read_state,))):
        with pytest.raises(ValueError, match=r"a\.safetensors: not a readable safetensors file \(.+\); "):
            read(file)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    assert time.process_time() - begun < 30
    assert grown < 700, f"{grown:.0f} MiB"  # the file itself, read twice at most


SAYS: list[Any] = [
    {}, {"tokenizer": None}, {"tokenizer": "nothing"}, {"tokenizer": {"name": "os.system"}},
    {"tokenizer": {"name": "dvae_small", "codes": 2**40}}, {"tokenizer": {"name": "dvae_small", "width": 10**15}},
    {"tokenizer": {"name": "dvae_small", "blocks": 10**9}},
    {"tokenizer": {"name": "dvae_small", "codes": 2**100}}, {"tokenizer": {"name": "dvae_small", "codes": 10**9}},
]  # fmt: skip


@pytest.mark.parametrize("about", SAYS, ids=str)
def test_a_tokenizer_that_says_it_is_something_else_is_refused_before_it_takes_memory(
    tmp_path: Path, about: dict[str, Any]
) -> None:
    file = tmp_path / "tokenizer.safetensors"
    save_file({"w": torch.ones(2)}, file, {"unmask": json.dumps(about)})
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors"):
        load_tokenizer(file, 3)
    assert time.process_time() - begun < 10


def test_weights_that_stand_for_more_than_is_stored_are_refused(tmp_path: Path) -> None:
    """A number shown a million million times, and a record of zeros that is a thousand times as long as its file."""
    view, packed = tmp_path / "view.pth", tmp_path / "packed.pth"
    torch.save({"w": torch.ones(1).expand(2**40)}, view)
    with pytest.raises(ValueError, match=r"view\.pth: w of shape \[1099511627776\] is larger than what the file holds"):
        read_state(view)
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in plain.namelist():
            other.writestr(name, plain.read(name))
    assert packed.stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"packed\.pth: found .* compressed; torch\.save compresses nothing"):
        read_state(packed)


@pytest.mark.parametrize("changes", [
    {"encoder": {"name": "vit", "width": 10**9, "heads": 1}}, {"encoder": {"name": "vit", "depth": 10**9}},
    {"encoder": "swin"}, {"encoder": 3}, {"size": [10**9, 10**9]}, {"size": "x"}, {"size": None}, {"mean": 3},
    {"std": [None]}, {"channels": 10**9}, {"channels": "3"},
], ids=str)  # fmt: skip
def test_an_encoder_whose_header_lies_is_refused_before_it_takes_memory(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    file, piece = tmp_path / "encoder.safetensors", check(EncoderOf, {"encoder": ENCODER}, "row").encoder
    about = {"encoder": ENCODER, "size": [16, 16], "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    state = build(ENCODERS, piece, (16, 16), 3).state_dict()
    checkpoint.write_weights(file, state, about)
    assert begin(file).size == (16, 16)
    checkpoint.write_weights(file, state, {**about, **changes})
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        begin(file)


def bomb(depth: int) -> str:
    """A few lines that stand for 9 ** depth values."""
    lines = ["  l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "data:\n" + "\n".join(lines) + "\n"


def merges(depth: int) -> str:
    lines = ["  m0: &m0 {x: 1}"]
    for n in range(1, depth):
        lines.append(f"  m{n}: &m{n} {{{', '.join(f'k{i}: *m{n - 1}' for i in range(9))}}}")
    return "data:\n" + "\n".join(lines) + "\n"


YAML: dict[str, tuple[str | Callable[[Path], str], str]] = {
    "a call": (lambda made: f"data: !!python/object/apply:os.mkdir ['{made}']", "the tag 'tag:yaml.org,2002:python"),
    "an object": ("data: !!python/object:pathlib.Path {}", "asks for an object; rows hold text, numbers, lists and"),
    "a new object": (lambda made: f"data: {{a: !!python/object/new:os.mkdir ['{made}']}}", "asks for an object; rows"),
    "a name": ("data: {a: !!python/name:os.system ''}", "asks for an object; rows hold"),
    "a tag of its own": ("data: {a: !evil 3}", "the tag '!evil' asks for an object"),
    "an alias bomb": (bomb(9), "found more than 100,000 values, those that aliases repeat"),
    "a bomb of merges": (merges(9), "found more than 100,000 values"),
    "a list that holds itself": ("data: &a [*a]", "found more than 100,000 values"),
    "a mapping that merges itself": ("data: &a {<<: *a}", "found more than 100,000 values"),
    "depth": ("data: " + "[" * 1500, "nested too deeply"),
    "a number of 5000 digits": ("data: " + "9" * 5000, "not valid YAML"),
    "a date that is none": ("data: 2024-99-99", "not valid YAML"),
    "a truth that is none": ("data: {a: !!bool x}", "not valid YAML"),
    "a time that is none": ("data: {a: !!timestamp x}", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_rows_are_plain_values(tmp_path: Path, name: str) -> None:
    folder, made = write_rows(tmp_path), tmp_path / "made"
    text, message = YAML[name]
    (folder / "data.yaml").write_text(text if isinstance(text, str) else text(made))
    begun = time.process_time()
    (fault,) = faults(folder)
    assert fault.startswith("params/data.yaml: not valid YAML: ")
    assert message in fault
    assert len(fault) < 1000
    assert time.process_time() - begun < 20
    assert not made.exists()
    if "made" in (folder / "data.yaml").read_text():
        yaml.unsafe_load((folder / "data.yaml").read_text())
        assert made.exists(), "the payload is live"


NAMES = ["../x", "a/b", "", ".", "..", "/tmp/x", "a\\b", "a\0b", "a\nb", "a b", "A", "\u00e9", "x" * 101, "x" * 10_000,
         "<b>", "~", "*", "$HOME", "a;b", 7, None, True, 1.5]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[repr(name)[:20] for name in NAMES])
def test_names_of_rows_cannot_leave_their_folder(tmp_path: Path, name: Any) -> None:
    folder = write_rows(tmp_path)
    rows = {**FILES["pretrain.yaml"], "pretrain": {"one": PRETRAIN, name: PRETRAIN}}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(rows))
    fault = faults(folder)[-1]
    rule = "a row's name may hold lower-case letters, digits, '_' and '-' only, 100 at most; rename it"
    assert rule in fault or "special characters are not allowed" in fault
    assert len(fault) < 600
    assert fault.isprintable()


def test_the_longest_name_is_a_name(tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    rows = {**FILES["pretrain.yaml"], "pretrain": {"one": PRETRAIN, (ROW_NAME * 3)[:100]: PRETRAIN}}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(rows))
    assert len(load(folder).pretrain) == 2


COMMANDS = (["export", "@"], ["predict", "@", "x.png"], ["embed", "@", "x.png", "-o", "t"])


def test_commands_take_names_of_rows_only() -> None:
    """Names on the command line are looked up among the rows, and are never paths."""
    code = (
        "import sys, json\nfrom flows import cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as end: print(str(end).replace(chr(10), ' '))\n"
    )
    wrong = ["../x", "x" * 5000]
    words = [[name if one == "@" else one for one in command] for name in wrong for command in COMMANDS]
    out, errors = python("-c", code, json.dumps(words)).communicate(timeout=300)
    assert not errors, errors
    lines = out.splitlines()
    assert len(lines) == len(words)
    for line, given in zip(lines, words, strict=True):
        assert " is not one of [" in line, given


def test_a_run_does_not_read_a_checkpoint_that_holds_code(tmp_path: Path) -> None:
    """A whole job, on a folder that somebody else has written to."""
    from core_pieces import pretrain_row, tiny_pack

    pack, row = tiny_pack(tmp_path / "pack"), pretrain_row(optim={"lr": 1e-3, "batch": 16, "epochs": 1})
    pretrain(row, pack, tmp_path / "job", seed=0)
    (folder,) = (tmp_path / "job" / "checkpoints").iterdir()
    torch.save({"model": live(tmp_path / "made")}, folder / "optimisers.pt")
    (folder / checkpoint.SUMS).write_bytes(b"".join(checkpoint._sum(folder / name) for name in checkpoint.FILES))
    with pytest.raises(ValueError, match="nothing of it was run"):
        pretrain(row, pack, tmp_path / "job", seed=0)
    assert not (tmp_path / "made").exists()
