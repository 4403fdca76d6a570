"""Malformed data in the layout of every reader, given to `train --stages prepare`."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import formats
import pytest
from malformed_input import Malformed, check_refusal, rows, settings, write

from dpo4rec_jax import train

RATINGS = "1::10::5::978300760\n1::20::3::978302109\n2::10::4::978301968\n"
U_DATA = RATINGS.replace("::", "\t")
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
INTER_ROWS = "1\ta\t5\t881250949\n1\tb\t3.5\t8.8125095e8\n2\ta\t1\t881250951\n"
LOG = "user_id,item_id,rating,timestamp\n1,a,5,10\n1,b,3,9\n2,a,,11\n"
REVIEW = {"reviewerID": "u", "asin": "a", "overall": 4.0, "unixReviewTime": 5}
REVIEW_2023 = {"user_id": "u", "parent_asin": "a", "rating": 4.0, "timestamp": 5000}

Make = Callable[[Path], Sequence[str]]


def data(files: dict[str, str | bytes], **more: Any) -> Make:
    """A directory of files as data.path."""
    return lambda d: settings(data__path=write(d / "raw", files), **more)


def zipped(files: dict[str, str | bytes]) -> Make:
    def make(directory: Path) -> list[str]:
        directory.mkdir(exist_ok=True)
        with zipfile.ZipFile(directory / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return settings(data__path=directory / "a.zip")

    return make


def scrambled(member: str, old: bytes, new: bytes) -> Make:
    """A zip in whose stored member bytes were exchanged, behind the back of its checksum."""

    def make(directory: Path) -> list[str]:
        with zipfile.ZipFile(directory / "a.zip", "w") as archive:
            archive.writestr(member, RATINGS)
        content = (directory / "a.zip").read_bytes()
        (directory / "a.zip").write_bytes(content.replace(old, new))
        return settings(data__path=directory / "a.zip")

    return make


def sound(layout: str, **more: Any) -> Make:
    """A small log without a fault, in one of the layouts."""
    return lambda d: settings(data__path=formats.WRITERS[layout](d, formats.make_log()), **more)


def ml_1m(**files: str | bytes) -> Make:
    return data({"ratings.dat": RATINGS} | {f"{k}.dat": v for k, v in files.items()})


def inter(text: str, **more: str | bytes) -> Make:
    return data({"set.inter": text} | {f"set.{k}": v for k, v in more.items()})


def log(text: str | bytes, **columns: str) -> Make:
    return data({"log.csv": text}, **{f"data__columns__{k}": v for k, v in columns.items()})


def lines(*values: Any) -> bytes:
    return "".join(f"{v if isinstance(v, str) else json.dumps(v)}\n" for v in values).encode()


def reviews(second: Any, metadata: bytes | None = None) -> Make:
    held = {} if metadata is None else {"meta.json": metadata}
    return data({"reviews.json": lines(REVIEW, second, REVIEW), **held})


def metadata(line: str) -> Make:
    return reviews(REVIEW | {"asin": "b"}, lines({"asin": "b"}, line))


def parquet(**columns: list[Any]) -> bytes:
    import polars as pl

    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


CUT_GZ = gzip.compress((LOG + "".join(f"3,{i},5,{i}\n" for i in range(5000))).encode())[:-999]
BOMB = gzip.compress(bytes(80 * 2**20))
CUT_PARQUET = parquet(user=list(range(999)), item=list(range(999)))[400:]

PATHS = (
    Malformed(
        "nothing there", lambda d: settings(data__path=d / "x"), "/x: no such file or direct"
    ),
    Malformed("an empty directory", data({}), "raw: no files in it; check data.path"),
    Malformed(
        "files of no format", data({"a.txt": "x"}), r"no files of a known format, got a\.txt"
    ),
    Malformed(
        "not of the format asked for",
        data({"log.csv": LOG}, data__format="amazon"),
        r"no files of format amazon, got log\.csv",
    ),
    Malformed(
        "no zip",
        lambda d: settings(data__path=write(d, {"b.zip": b"PK\3\4 no"}) / "b.zip"),
        r"b\.zip: not a readable zip",
    ),
    *(
        Malformed(f"zip with {name}", zipped({name: "x"}), "unsafe member name .* points outside")
        for name in ("../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:/evil")
    ),
    Malformed(
        "zip of other bytes than its checksum's",
        scrambled("ratings.dat", b"978300760", b"978300761"),
        r"a\.zip/ratings\.dat: truncated or damaged",
    ),
    Malformed(
        "zip bomb",
        zipped({"ratings.dat": bytes(80 * 2**20)}),
        r"ratings\.dat: unpacks to more than 64 MiB, over 200 times its size",
    ),
    Malformed(
        "gz bomb",
        data({"log.csv.gz": BOMB}),
        r"log\.csv\.gz: unpacks to more than 64 MiB, over 200",
    ),
    Malformed("cut gz", data({"log.csv.gz": CUT_GZ}), r"log\.csv\.gz: truncated or damaged"),
    Malformed("no gz", data({"log.csv.gz": LOG}), r"log\.csv\.gz: truncated or damaged"),
)
MOVIELENS = (
    Malformed("1m: empty", ml_1m(ratings=""), r"ratings\.dat: expected data, got an empty file"),
    Malformed(
        "1m: a field too few",
        ml_1m(ratings=RATINGS + "1::10::5\n"),
        r"dat:4: expected 4 fields .* 3",
    ),
    Malformed(
        "1m: too many", ml_1m(ratings=RATINGS + "1::10::5::9::9\n"), r"dat:4: expected 4 fiel"
    ),
    Malformed(
        "1m: 2, then 6", ml_1m(ratings="1::1\n2::3::4::5::6::7\n"), r"dat:1: expected 4 field"
    ),
    Malformed(
        "1m: a blank line", ml_1m(ratings=f"{RATINGS}\n{RATINGS}"), r"dat:4: expected 4 field"
    ),
    Malformed(
        "1m: a word", ml_1m(ratings=RATINGS + "1::1::bad::9\n"), r"dat:4: rating: expected a f"
    ),
    Malformed(
        "1m: nan", ml_1m(ratings=RATINGS + "1::10::nan::9\n"), r"dat:4: rating: expected a fin"
    ),
    Malformed(
        "1m: 55 stars",
        ml_1m(ratings=RATINGS + "1::10::55::9\n"),
        r"dat:4: rating: expected 0\.5 to 5",
    ),
    Malformed(
        "1m: no time", ml_1m(ratings=RATINGS + "1::10::5::\n"), r"dat:4: time: expected a whol"
    ),
    Malformed(
        "1m: then", ml_1m(ratings=RATINGS + "1::10::5::then\n"), r"dat:4: time: expected a wh"
    ),
    Malformed(
        "1m: other bytes",
        ml_1m(ratings=RATINGS.encode() + b"\xff::1::5::9\n"),
        r"ratings\.dat:4: expected UTF-8",
    ),
    Malformed("1m: movies", ml_1m(movies="1::Heat\n"), r"movies\.dat:1: expected 3 fields"),
    Malformed("1m: users", ml_1m(users="1::F::1\n"), r"users\.dat:1: expected 5 fields"),
    Malformed("100k: fields", data({"u.data": "1\t2\t3\n"}), r"u\.data:1: expected 4 fields"),
    Malformed("100k: stars", data({"u.data": "1\t2\t9\t4\n"}), r"u\.data:1: rating: expected 0\.5"),
    Malformed(
        "100k: items",
        data({"u.data": U_DATA, "u.item": "1|T|||\n"}),
        r"u\.item:1: expected 24 fiel",
    ),
    Malformed(
        "100k: users", data({"u.data": U_DATA, "u.user": "1|2\n"}), r"u\.user:1: expected 5 fields"
    ),
    Malformed(
        "1m in a zip",
        zipped({"ml-1m/ratings.dat": RATINGS + "1::2\n"}),
        r"a\.zip/ml-1m/ratings\.dat:4: expected 4 fields",
    ),
    Malformed("too few users", ml_1m(), "expected users to train on, got 1 users"),
)
RECBOLE = (
    Malformed(
        "recbole: no types", inter("user_id\titem_id\n1\t2\n"), r"set\.inter:1: expected head"
    ),
    Malformed(
        "recbole: a type", inter("user_id:text\titem_id:token\n"), r"inter:1: .*user_id:text"
    ),
    Malformed(
        "recbole: twice", inter("u:token\tu:token\n1\t1\n"), r"inter:1: column 'u' stands twic"
    ),
    Malformed("recbole: bytes", data({"s.inter": b"\xff:token\n"}), r"s\.inter:1: expected UTF-8"),
    Malformed("recbole: no rows", inter(INTER), r"set\.inter: expected data, got an empty file"),
    Malformed(
        "recbole: fields", inter(INTER + INTER_ROWS + "1\t2\t3\n"), r"inter:5: expected 4 fiel"
    ),
    Malformed(
        "recbole: a word",
        inter(INTER + INTER_ROWS + "1\t2\tx\t3\n"),
        r"inter:5: rating: expected a f",
    ),
    Malformed(
        "recbole: no id", inter(INTER + INTER_ROWS + "\ta\t3\t3\n"), r"inter:5: .* expected ids"
    ),
    Malformed(
        "recbole: items",
        inter(INTER + INTER_ROWS, item="title:token\nx\n"),
        r"set\.item: no column of",
    ),
    Malformed(
        "recbole: two sets",
        data({"a.inter": INTER, "b.inter": INTER}),
        r"expected one \.inter file, got a\.inter, b\.inter",
    ),
    Malformed(
        "recbole: names",
        inter("who:token\twhat:token\n1\t2\n"),
        "no column of user ids among who, what",
    ),
    Malformed(
        "recbole: time",
        inter(INTER + INTER_ROWS + "1\t2\t3\t1e30\n"),
        r"set\.inter:5: timestamp: expected seconds, got 1e\+30",
    ),
)
AMAZON = (
    Malformed(
        "amazon: cut", reviews('{"reviewerID": "u", "asin"'), r"reviews\.json:2: not a JSON obj"
    ),
    Malformed(
        "amazon: a list", reviews('["u", "a"]'), r"reviews\.json:2: expected an object, got li"
    ),
    Malformed("amazon: null", reviews(REVIEW | {"overall": None}), r"json:2: overall: .* got None"),
    Malformed(
        "amazon: time", reviews(REVIEW | {"unixReviewTime": "x"}), r"json:2: unixReviewTime: ex"
    ),
    Malformed(
        "amazon: no user", reviews(REVIEW | {"reviewerID": None}), r"json:2: reviewerID: expec"
    ),
    Malformed("amazon: lacks", reviews({"asin": "a", "overall": 1.0}), r"reviewerID: .*, got none"),
    Malformed(
        "amazon: bytes",
        data({"reviews.json": lines(REVIEW) + lines(REVIEW).replace(b'"u"', b'"\xff"')}),
        r"reviews\.json:2: expected UTF-8",
    ),
    Malformed(
        "amazon 2023: rating",
        data({"r.jsonl": lines(REVIEW_2023, REVIEW_2023 | {"rating": "good"})}),
        r"r\.jsonl:2: rating: expected a number, got 'good'",
    ),
    Malformed(
        "amazon: metadata alone", data({"meta.json": lines({"asin": "a"})}), "no Amazon reviews"
    ),
    Malformed(
        "amazon: empty", data({"meta.json": ""}), r"meta\.json: expected data, got an empty file"
    ),
    Malformed(
        "amazon: call", metadata("{'asin': 'a', 'title': open('x')}"), r"meta\.json:2: not a JS"
    ),
    Malformed(
        "amazon: deep", metadata('{"asin": "a", "x": ' + "[" * 9999), r"json:2: .* too deeply"
    ),
    Malformed(
        "amazon: half", metadata(r'{"asin": "a", "title": "\ud800"}'), r"json:2: .*surrogate"
    ),
    Malformed(
        "amazon: cut gz",
        data(
            {
                "r.json.gz": gzip.compress(lines(*(REVIEW | {"asin": str(i)} for i in range(999))))[
                    :-9
                ]
            }
        ),
        r"r\.json\.gz: truncated or damaged",
    ),
    Malformed(
        "amazon: bomb", data({"r.json.gz": BOMB}), r"r\.json\.gz: .* unpacks|unpacks to more"
    ),
)
TABLES = (
    Malformed("csv: empty", log(""), r"log\.csv: expected a table, got an empty file"),
    Malformed(
        "csv: no rows", log("user_id,item_id\n"), r"log\.csv: expected rows below the header"
    ),
    Malformed(
        "csv: twice", log("user_id,user_id,item_id\n"), r"log\.csv:1: column 'user_id' stands"
    ),
    Malformed("csv: no name", log("user_id,,item_id\n"), r"log\.csv:1: column 2 has no name"),
    Malformed(
        "csv: no item", log("user_id,rating\n1,2\n"), "no column of item ids among user_id, rati"
    ),
    Malformed("csv: fields", log(LOG + "1,c,5,9,9\n"), r"log\.csv:5: expected 4 fields .* got 5"),
    Malformed(
        "csv: a word", log(LOG + "1,c,good,9\n"), r"csv:5: rating: expected a finite .* 'good'"
    ),
    Malformed(
        "csv: inf", log(LOG + "1,c,inf,9\n"), r"log\.csv:5: rating: expected a finite number"
    ),
    Malformed(
        "csv: soon", log(LOG + "1,c,5,soon\n"), r"csv:5: timestamp: expected a number or a date"
    ),
    Malformed(
        "csv: cut line", log(LOG + "1,c,5\n"), r"csv:5: timestamp: expected a number or a date"
    ),
    Malformed(
        "csv: no id", log(LOG + ",c,5,9\n"), r"log\.csv:5: user_id: expected an id, got None"
    ),
    Malformed("csv: bytes", log(LOG.encode() + b"\xff,c,5,9\n"), r"log\.csv:5: expected UTF-8"),
    Malformed("csv: bytes above", log(b"\xffuser_id,item_id\n"), r"log\.csv:1: expected UTF-8"),
    Malformed(
        "csv: column", log(LOG, user="who"), r"data\.columns\.user: no column 'who' in any tabl"
    ),
    Malformed(
        "csv: time", log(LOG, time="when"), r"data\.columns\.time: no column 'when' in .*csv"
    ),
    Malformed(
        "csv: title as attribute",
        data({"l.csv": LOG, "i.csv": "item_id\n1\n"}, data__columns__attributes="[title]"),
        r"data\.columns\.attributes: 'title' is no attribute; leave it out",
    ),
    Malformed(
        "csv: below a field of two lines",
        log('user_id,item_id,rating,note\n1,a,5,"two\nlines"\n1,b,bad,x\n'),
        r"log\.csv:4: rating",
    ),
    Malformed(
        "two logs", data({"a.csv": LOG, "b.csv": LOG}), r"expected one table .* a\.csv, b\.csv"
    ),
    Malformed(
        "no log", data({"a.csv": "item_id\n1\n", "b.csv": "item_id\n1\n"}), "one table .* got none"
    ),
    Malformed(
        "two of items",
        data({"l.csv": LOG, "a.csv": "item_id\n1\n", "b.csv": "item_id\n1\n"}),
        r"cannot tell which table to take: a\.csv, b\.csv",
    ),
    Malformed(
        "attributes of no items",
        data({"l.csv": LOG}, data__columns__attributes="[genre, artist]"),
        r"data\.columns\.attributes: genre, artist needs a table of items.*l\.csv: user",
    ),
    Malformed(
        "parquet: short", data({"log.parquet": b"PAR1"}), r"log\.parquet: not a readable Parq"
    ),
    Malformed(
        "parquet: cut", data({"log.parquet": CUT_PARQUET}), r"log\.parquet: not a readable Parquet"
    ),
    Malformed(
        "parquet: nan",
        data({"log.parquet": parquet(user=[1, 2], item=[1, 2], rating=[1.0, float("nan")])}),
        r"log\.parquet: row 2: rating: expected a finite number",
    ),
)
SOUND = (  # sound files that cannot give what the config asks for
    Malformed(
        "a window over all", sound("csv", data__min_item_interactions=99), "min_item_interact"
    ),
    Malformed(
        "no rating above", sound("recbole", data__rating_threshold=5), "highest rating is 5; lo"
    ),
)


@rows(*PATHS, *MOVIELENS, *RECBOLE, *AMAZON, *TABLES, *SOUND)
def test_it_is_one_line_and_status_2(
    row: Malformed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = command(row.make(tmp_path), tmp_path)
    check_refusal(train.main(arguments), capsys.readouterr().err, row.says, tmp_path / "w")
    assert not [path for path in tmp_path.parent.glob("evil*")]


def command(made: Sequence[str], directory: Path) -> list[str]:
    config = write(directory, {"toy.yaml": "data: {name: toy}\n"}) / "toy.yaml"
    workdir = str(directory / "w")
    return ["--config", str(config), "--workdir", workdir, "--stages", "prepare", *made]


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    row = next(row for row in PATHS if row.name == "zip with ../evil")
    program = [sys.executable, "-m", "dpo4rec_jax.train", *command(row.make(tmp_path), tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    check_refusal(done.returncode, done.stderr, row.says, tmp_path / "w")
