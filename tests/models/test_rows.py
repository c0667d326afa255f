"""Lists as people write them: each is read whole, or what is wrong with it is named."""

import json
from pathlib import Path

import pytest

from models.data.rows import mend, read_rows
from models.data.sets import BadDataError, BadDataLog

IMAGE, CAPTION = ("image", "filepath"), ("caption", "title")


def read(path: Path, text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The images and captions of a list, and what was said of it."""
    path.write_bytes(text.encode())
    said: list[str] = []
    rows = [row for _, row in read_rows(path, BadDataLog(warn=said.append), (IMAGE, CAPTION), lists=CAPTION)]
    found = [(row.get("image") or row["filepath"], row.get("caption") or row.get("title", "")) for row in rows]
    return found, [one.split(f"{path}, ")[1] for one in said]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
def test_separators_and_ends_of_lines(tmp_path: Path, mark: str, end: str) -> None:
    lines = [mark.join(line) for line in (("filepath", "title"), ("a.png", f'"one{mark} two"'), ("b.png", '5" pipe'))]
    assert read(tmp_path / "list.csv", end.join(lines)) == ([("a.png", f"one{mark} two"), ("b.png", '5" pipe')], [])


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c"])
def test_signs_that_only_look_like_ends_of_lines(tmp_path: Path, sign: str) -> None:
    caption = f"a red{sign}square"
    assert read(tmp_path / "list.csv", f"image,caption\na.png,{caption}\n") == ([("a.png", caption)], [])
    if sign > "\x1f":  # JSON wants the others escaped
        row = json.dumps({"image": "a.png", "caption": caption}, ensure_ascii=False)
        assert read(tmp_path / "list.jsonl", row + "\n") == ([("a.png", caption)], [])


def test_quotes_span_lines(tmp_path: Path) -> None:
    text = 'image,caption\na.png,"first, line\nsecond, line"\nb.png,"says ""no"""\n'
    assert read(tmp_path / "list.csv", text) == ([("a.png", "first, line\nsecond, line"), ("b.png", 'says "no"')], [])


@pytest.mark.parametrize("count", [40, 4000])
@pytest.mark.parametrize("closed_by", [None, 'x.png,"a caption, with a comma"', 'x.png,a pipe of 5"'])
def test_a_quote_that_does_not_end_swallows_no_row(tmp_path: Path, count: int, closed_by: str | None) -> None:
    lines = [f"{i}.png,plain caption {i}" for i in range(count)]
    lines[2] = '2.png,"quoted from the start'
    if closed_by:
        lines[30] = closed_by
    found, said = read(tmp_path / "list.csv", "image,caption\n" + "\n".join(lines))
    assert len(found) == count - 1
    assert said == ["line 4: begins a quote that does not end"]


def test_a_row_with_too_many_fields_is_named(tmp_path: Path) -> None:
    found, said = read(tmp_path / "list.csv", "image,caption\na.png,one, two\nb.png,three\nc.png\n")
    assert found == [("b.png", "three"), ("c.png", "")]
    assert said == ["line 2: has 3 fields for 2 columns (a field with ',' wants quotes)"]


def test_a_list_without_a_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"has no column caption or title; its first line has 'image', 'words'"):
        read(tmp_path / "list.csv", "image,words\na.png,one\n")


def test_json_arrays_and_lists_of_captions(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": [f"thing {i}", f"object {i}"], "tags": ["x", "y"]} for i in range(2)]
    right = [(row["image"], caption) for row in rows for caption in row["caption"]]
    assert read(tmp_path / "list.json", json.dumps(rows, indent=1)) == (right, [])
    assert read(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows))) == (right, [])


@pytest.mark.parametrize("value", ["NaN", "null", "{}", "[]", "[null]", "[[1]]"])
def test_what_is_no_text_is_no_caption(tmp_path: Path, value: str) -> None:
    found, _ = read(tmp_path / "list.jsonl", f'{{"image": "a.png", "caption": {value}}}')
    assert all(caption == "" for _, caption in found)


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_numbers_too_long_for_python_are_no_json(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadDataError, match=r"line 1: not JSON \(Exceeds the limit"):
        read(tmp_path / name, '{"image": "a.png", "caption": ' + "9" * 5000 + "}\n")


def test_fields_too_long_for_csv(tmp_path: Path) -> None:
    long = "x" * 200_000
    found, said = read(tmp_path / "list.csv", f"image,caption\na.png,{long}\nb.png,two\n")
    assert found == [("b.png", "two")]
    assert len(said) == 1
    with pytest.raises(BadDataError, match="has no column image or filepath"):
        read(tmp_path / "list.csv", f"image,caption,{long}\na.png,one\n")


def test_coco_and_karpathy(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": " a dog "}, {"image_id": 7, "caption": "its toy"}],
    }
    assert read(tmp_path / "coco.json", json.dumps(coco))[0] == [("a.jpg", " a dog "), ("a.jpg", "its toy")]
    sentences = [{"raw": "a dog"}, {"raw": "its toy"}]
    karpathy = {"images": [{"filepath": "val2014", "filename": "a.jpg", "split": "restval", "sentences": sentences}]}
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    assert [row for _, row in read_rows(tmp_path / "k.json", BadDataLog())] == [
        {"image": "val2014/a.jpg", "caption": text, "split": "train"} for text in ("a dog", "its toy")
    ]
    with pytest.raises(BadDataError, match=r"neither COCO captions .* nor Karpathy's"):
        read(tmp_path / "k.json", json.dumps({"images": [{"filename": "a.jpg"}]}))


def test_lone_surrogates_are_mended() -> None:
    assert mend("so funny \ud83d") == "so funny \ufffd"
    assert mend("so funny \ud83d\ude00") == "so funny \U0001f600"
