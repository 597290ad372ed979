import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.corpus.config import CorpusConfig, Format, SourceConfig
from app.corpus.sources import RawFile, Shard, find_files, find_shards


def found(uri: str, file_format: Format = "auto") -> list[RawFile]:
    return find_files(CorpusConfig(sources=[SourceConfig(name="a", uri=uri, format=file_format)]))


def spans(path: Path, file_format: Format, shard_bytes: int) -> list[tuple[int, int | None]]:
    shards = find_shards([RawFile(0, str(path), "a", file_format, "text")], shard_bytes)
    return [(shard.start, shard.end) for shard in shards]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.v2.ndjson.gz", "jsonl"),
        ("a.json.zst", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.csv.bz2", "csv"),
        ("a.txt.xz", "text"),
        ("a.html", "html"),
        ("a.HTM", "html"),
        ("a.warc.gz", "warc"),
        ("a.warc.wet.gz", "warc"),
        ("zhwiki-latest-pages-articles.xml.bz2", "mediawiki"),
        ("data-00000-of-00001.arrow", "huggingface"),
    ],
)
def test_the_format_is_known_by_name(tmp_path: Path, name: str, expected: Format) -> None:
    (tmp_path / name).write_bytes(b"")
    assert [file.format for file in found(str(tmp_path))] == [expected]
    assert [file.format for file in found(str(tmp_path), "text")] == ["text"]


def test_a_missing_or_unknown_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.a\.uri: no file at"):
        found(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "a.doc").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.doc: format unknown from its name; set format to one of: jsonl, parquet"):
        found(str(tmp_path / "a.doc"))


def test_files_of_several_sources_are_numbered_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    sources = [SourceConfig(name="x", uri=f"{tmp_path}/*.jsonl"), SourceConfig(name="y", uri=f"{tmp_path}/c.txt")]
    files = find_files(CorpusConfig(sources=sources))
    assert [(file.index, Path(file.uri).name, file.source) for file in files] == [
        (0, "a.jsonl", "x"),
        (1, "b.jsonl", "x"),
        (2, "c.txt", "y"),
    ]


def save_dataset(folder: Path, names: list[str], state: object = None) -> None:
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    content = {"_data_files": [{"filename": name} for name in names]} if state is None else state
    (folder / "state.json").write_text(json.dumps(content))
    for name in names:
        (folder / name).write_bytes(b"")


def test_a_saved_dataset_is_read_by_its_state_and_not_by_what_lies_there(tmp_path: Path) -> None:
    save_dataset(tmp_path / "set", ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"])
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"")
    files = found(str(tmp_path / "set"))
    assert [Path(file.uri).name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert {file.format for file in files} == {"huggingface"}


def test_a_dataset_dict_is_all_its_splits_in_order(tmp_path: Path) -> None:
    for split in ("test", "train"):
        save_dataset(tmp_path / split, ["data-00000-of-00001.arrow"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [Path(file.uri).parent.name for file in found(f"{tmp_path}/", "huggingface")] == ["train", "test"]


@pytest.mark.parametrize("state", [[], {"_data_files": 3}, {"other": []}])
def test_a_damaged_dataset_is_named(tmp_path: Path, state: object) -> None:
    save_dataset(tmp_path / "set", [], state)
    with pytest.raises(ValueError, match=r"state\.json: cannot be read as a saved dataset"):
        found(str(tmp_path / "set"))


def test_arrow_files_may_be_named_themselves(tmp_path: Path) -> None:
    for name in ("a.arrow", "state.json"):
        (tmp_path / name).write_bytes(b"")
    assert [Path(file.uri).name for file in found(str(tmp_path), "huggingface")] == ["a.arrow"]


def test_remote_paths_go_through_fsspec() -> None:
    with fsspec.open("memory://corpus/a.jsonl", "wb") as target:
        target.write(b'{"text": "a"}\n' * 100)
    files = found("memory://corpus")
    assert [file.uri for file in files] == ["memory:///corpus/a.jsonl"]
    assert len(find_shards(files, 500)) == 3


def test_plain_lines_are_cut_by_bytes_and_evenly(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    assert spans(tmp_path / "a", "jsonl", 400) == [(0, 333), (333, 666), (666, None)]
    assert spans(tmp_path / "a", "text", 1000) == [(0, None)]
    for other in ("csv", "html", "warc", "mediawiki", "huggingface"):
        assert spans(tmp_path / "a", other, 400) == [(0, None)]


def test_compressed_and_empty_files_are_one_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 1000)
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert spans(tmp_path / "a.jsonl.gz", "jsonl", 400) == [(0, None)]
    assert spans(tmp_path / "a.jsonl", "jsonl", 400) == [(0, None)]


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{row}" * 50 for row in range(100)]})
    pq.write_table(table, tmp_path / "a", row_group_size=10, use_dictionary=False, compression="none")
    group_bytes = pq.read_metadata(tmp_path / "a").row_group(5).total_byte_size
    assert spans(tmp_path / "a", "parquet", 1) == [(row, row + 10 if row < 90 else None) for row in range(0, 100, 10)]
    assert spans(tmp_path / "a", "parquet", 5 * group_bytes) == [(0, 50), (50, None)]


def test_a_damaged_parquet_file_is_left_to_the_task_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"PAR1 this is no parquet file PAR1")
    file = RawFile(0, str(tmp_path / "a"), "a", "parquet", "text")
    assert find_shards([file], 1) == [Shard(file, 0, None)]
