"""YAML that stays text: what scalars become, and what is refused with line and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from noether_init_core.config.base import YamlText
from noether_init_core.config.document import Document, read_yaml
from noether_init_core.errors import ConfigFileError


def _read(tmp_path: Path, text: str | bytes) -> Document:
    path = tmp_path / "init.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


@pytest.mark.parametrize(
    "text",
    ["off", "no", "true", "2026_02_19", "2026-02-19", "0o17", "1e3", "12:30:45", ".inf", "0x1F", "=", "1_000", "on"],
)
def test_an_unquoted_scalar_stays_the_text_that_was_written(tmp_path: Path, text: str) -> None:
    """No date, boolean, octal or base-60 number is made of it."""
    value = _read(tmp_path, f"key: {text}\n").value["key"]
    assert value == text
    assert type(value) is YamlText


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("'12'", "12", str),
        ('"null"', "null", str),
        ("'~'", "~", str),
        ("''", "", str),
        ("|\n  12\n", "12\n", str),
        ("null", None, type(None)),
        ("~", None, type(None)),
        ("", None, type(None)),
        ("NULL", None, type(None)),
        ("nul", "nul", YamlText),
    ],
)
def test_only_unquoted_null_is_none_and_quoted_scalars_are_plain_text(
    tmp_path: Path, text: str, value: Any, kind: type
) -> None:
    """Quotes say that a text is meant."""
    read = _read(tmp_path, f"key: {text}").value["key"]
    assert (read, type(read)) == (value, kind)


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    """Lines are counted from 1, in block and flow style."""
    document = _read(tmp_path, "# first\na:\n  - x: 1\n    y: {z: 2,\n        w: 3}\n  - 4\n")
    assert document.value == {"a": [{"x": "1", "y": {"z": "2", "w": "3"}}, "4"]}
    assert document.lines == {
        ("a",): 2,
        ("a", 0): 3,
        ("a", 0, "x"): 3,
        ("a", 0, "y"): 4,
        ("a", 0, "y", "z"): 4,
        ("a", 0, "y", "w"): 5,
        ("a", 1): 6,
    }


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    """A mapping's own keys win over merged ones, earlier sources over later ones."""
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  x: 9\nd: *a\ne: {<<: *a}\n'<<': kept\n"
    value = _read(tmp_path, text).value
    assert value["c"] == {"x": "9", "y": "2", "z": "4"}
    assert value["d"] == value["e"] == {"x": "1", "y": "2"}
    assert value["<<"] == "kept"


@pytest.mark.parametrize(
    ("text", "line", "key_path", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "b.c", "occurs twice, first in line 3"),
        ("a: 1\n'a': 2\n", 2, "a", "occurs twice, first in line 1"),
        ("a: [1\nb: 2\n", 2, "", "not valid YAML"),
        ("a: 1\n---\nb: 1\n", 2, "", "not valid YAML"),
        ("a: *unknown\n", 1, "", "undefined alias"),
        ("a: \t- x\n b", 1, "", "not valid YAML"),
        ("a: &a [*a]\n", 1, "a.0", "an alias contains itself"),
        ("a: &a {<<: *a}\n", 1, "a.<<", "contains itself"),
        ("a: {<<: 3}\n", 1, "a.<<", "a merge key takes"),
    ],
)
def test_what_is_no_clear_document_is_refused_with_its_place(
    tmp_path: Path, text: str, line: int, key_path: str, message: str
) -> None:
    """The error has file, line and key, as data and in the text."""
    with pytest.raises(ConfigFileError, match=message) as caught:
        _read(tmp_path, text)
    assert caught.value.line == line
    assert caught.value.key_path.startswith(key_path)
    assert caught.value.path == tmp_path / "init.yaml"
    assert str(caught.value).startswith(f"init.yaml:{line} {key_path}" if key_path else f"init.yaml:{line}: ")


def test_a_million_laughs_are_refused_at_once(tmp_path: Path) -> None:
    """Aliases of aliases are counted as they are written out, so memory stays small."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    with pytest.raises(ConfigFileError, match="after aliases are expanded"):
        _read(tmp_path, "\n".join(lines))
    merges = ["m0: &m0 {x: 1}"]
    merges += [f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}" for level in range(1, 12)]
    with pytest.raises(ConfigFileError, match="after aliases are expanded"):
        _read(tmp_path, "\n".join(merges))


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    """However deep, it ends in an error of ours."""
    with pytest.raises(ConfigFileError, match="nested more than 64 levels"):
        _read(tmp_path, "a: " + "[" * depth + "]" * depth)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00", b"\x80\x81", b"a: \xc3\x28"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    """An encoding error names the file."""
    with pytest.raises(ConfigFileError, match=r"init\.yaml: is not (valid YAML|text, and)"):
        _read(tmp_path, content)


def test_a_checkpoint_and_tabs_get_the_next_step(tmp_path: Path) -> None:
    """The likeliest slips: a file of weights behind the command, and an editor that indents by tabs."""
    with pytest.raises(ConfigFileError, match=r"is not text.* Next: ninit inspect "):
        _read(tmp_path, b"PK\x03\x04\x00\x00")
    with pytest.raises(ConfigFileError, match=r"init\.yaml:2: .* indent with spaces; YAML allows no tabs"):
        _read(tmp_path, "initializers:\n\t- kind: resume\n")


def test_tags_construct_nothing_and_are_noted(tmp_path: Path) -> None:
    """The place of every tag is there for the caller to refuse; nothing ran."""
    marker = tmp_path / "ran"
    text = f"a: !!python/object/apply:os.mknod ['{marker}']\nb: !mine 3\nc: 1\n? [x]\n: 2\n"
    document = _read(tmp_path, text)
    assert [place for place, _error in document.refusals] == [(), ("a",), ("b",)]
    assert {str(error) for place, error in document.refusals if place == ("a",)} == {
        "init.yaml:1 a: the tag !!python/object/apply:os.mknod is refused; a config is plain text, lists and mappings"
    }
    assert document.value["c"] == "1"
    assert not marker.exists()


def test_a_file_that_is_absent_names_its_neighbours(tmp_path: Path) -> None:
    """The folder's YAML files are listed."""
    (tmp_path / "other.yml").touch()
    with pytest.raises(ConfigFileError, match=r"does not exist; found in .*: other\.yml. Next: ninit validate"):
        read_yaml(tmp_path / "init.yaml")
    (tmp_path / "init.yml").touch()
    with pytest.raises(ConfigFileError, match=r"Next: ninit validate \S*init\.yml$"):
        read_yaml(tmp_path / "init.yaml")


def test_a_folder_or_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    """Only a regular file is opened."""
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(ConfigFileError, match="not a regular file"):
        read_yaml(tmp_path / "fifo.yaml")
    with pytest.raises(ConfigFileError, match="is a folder; a config is a YAML file; no YAML file found in"):
        read_yaml(tmp_path)


def test_a_file_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    """A checkpoint given for a config must not be parsed for minutes."""
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigFileError, match="is not text"):
        read_yaml(path)
    path.write_bytes(b"a" * (64 << 20))
    with pytest.raises(ConfigFileError, match="has 67,108,864 bytes, and a config has at most 524,288"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: [{}]", "[{}]", "a:\n{}"], ids=["flow", "list", "block"])
def test_many_short_values_are_refused_while_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Half a megabyte may hold a quarter of a million values; parsing stops at the limit."""
    path, taken = tmp_path / "many.yaml", list[None]()
    compose = yaml.BaseLoader.compose_scalar_node

    def counted(self: yaml.BaseLoader, anchor: dict[str, yaml.Node]) -> yaml.ScalarNode:
        taken.append(None)
        return compose(self, anchor)

    monkeypatch.setattr(yaml.BaseLoader, "compose_scalar_node", counted)
    for count, is_refused in ((1_000, False), (60_000, True)):
        path.write_text(text.format("- b\n" * count if "\n" in text else "b," * count))
        if is_refused:
            with pytest.raises(ConfigFileError, match="has more than 50,000 keys and values, the limit of a config"):
                read_yaml(path)
        else:
            read_yaml(path)
    assert len(taken) < 52_000
