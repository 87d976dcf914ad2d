"""The YAML loader: what it reads otherwise than PyYAML, and what it refuses."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_eagle.config.yaml_file import YamlError, parse_yaml, read_yaml
from megatron_eagle.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("true", True), ("False", False),
        ("010", "010"), ("-017", "-017"), ("0o17", "0o17"), ("0", 0), ("1:30", "1:30"), ("12:30:45.5", "12:30:45.5"),
        ("1e-4", "1e-4"), ("1.0e-4", 1e-4), ("1_000", 1000), ("1__0", "1__0"), ("0x1F", 31),
        ("2024-01-31", "2024-01-31"), ("2024-01-31 10:00:00", "2024-01-31 10:00:00"), ("=", "="),
        ("~", None), ("", None), ("'010'", "010"), ("!!str 010", "010"), ("+5", 5), (".5", 0.5), ("[]", []), ("{}", {}),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


def test_nothing_becomes_a_number_that_pyyaml_writes_as_a_text() -> None:
    texts = [
        "1e5",
        "1.5e5",
        "010",
        "1:30",
        "yes",
        "~",
        "null",
        "0b1",
        "=",
        "<<",
        ".",
        "-",
        "1_0",
        ".inf",
        "0x",
        "2024-01-31",
    ]
    assert parse_yaml(yaml.safe_dump(texts)) == texts
    numbers = [1e-5, 1e300, 5.0, 10**18, -3, True, None, 1e16]
    assert parse_yaml(yaml.safe_dump(numbers)) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "a is given twice, in lines 1 and 3"),
        ("m:\n  a: 1\n  'a': 1", "m.a is given twice, in lines 2 and 3"),
        ("s:\n- name: s1\n  x: 1\n- name: s2\n  x: 1\n  y: 2\n  x: 1", "s.s2.x is given twice, in lines 5 and 7"),
        ("s: [{x: {y: 1, y: 2}}]", "s.0.x.y is given twice, in lines 1 and 1"),
        ("b: &b {x: 1}\nc: {<<: *b, <<: *b}", "c.<< is given twice"),
        ("1: a", "line 1: the key '1' is no text: put it in quotes"),
        ("a: {true: 1}", "the key 'true' is no text"),
        ("? [a]\n: b", "the key a sequence is no text"),
        ("a: 1\n--- \nb: 2", "expected a single document in the stream but found another document"),
        ("a:\n\tb: 1", r"line 2, column 1: while scanning for the next token found character '\t'"),
        ("a:\n\tb: 1", "(indent with spaces)"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: *x", "found undefined alias 'x'"),
        ("a: &x [*x]", "a.0 is an alias of what it is in"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!int 010", "line 1: '010' is no int"),
        ("a: !!bool yes", "'yes' is no bool"),
        ("a: !!float x", "'x' is no float"),
        ("a: \x07", "not YAML"),
        ('a: "\\0"', "line 1: '\\x00' cannot be written to a file"),
        ('a: "\\ud800"', "cannot be written to a file"),
        ("[" * 60 + "]" * 60, "nested more than 40 deep"),
        ("[" * 5000, "not YAML"),
        ("a: " + "9" * 5000, "4300 digits"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(YamlError, match=re.escape(words)) as refused:
        parse_yaml(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_aliases_of_aliases_are_counted_before_they_are_written_out() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdef", "bcdefg", strict=True)]
    with pytest.raises(YamlError, match="more than 100000 values, aliases written out"):
        parse_yaml("\n".join(lines))


def test_merge_keys_and_anchors_are_read_and_nothing_is_shared() -> None:
    found = parse_yaml("base: &b {x: 1, y: [2]}\none: {<<: *b, x: 3}\ntwo: *b\nthree: {<<: [*b, {z: 4}]}")
    assert found["one"] == {"x": 3, "y": [2]} and found["two"] == found["base"]
    assert found["three"] == {"x": 1, "y": [2], "z": 4}
    found["two"]["y"].append(5)
    assert found["base"]["y"] == found["one"]["y"] == [2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "x.yaml is empty; a recipe is a mapping of keys"),
        (b"# nothing\n---\n", "x.yaml is empty"),
        (b"- a\n", "x.yaml must hold a mapping of keys, it holds a list"),
        (b"word", "it holds a str"),
        (b"a: \xe9", "x.yaml: not UTF-8: byte 0xe9 at 3"),
        ("a: 1".encode("utf-16"), "not UTF-8: byte 0xff at 0"),
        (b"a: 1\x00", "x.yaml: not YAML: "),
        (b"a: 1\na: 2", "x.yaml: a is given twice, in lines 1 and 2"),
    ],
)
def test_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(words)):
        read_yaml(path, "recipe")


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(tmp_path / "x.yaml", "recipe") == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="cannot read recipe .*: Is a directory"):
        read_yaml(tmp_path, "recipe")
