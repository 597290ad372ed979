import hashlib

from app.corpus.dedup import document_id, mark_duplicates, partition_of, split_of


def test_the_id_is_the_hash_of_the_text() -> None:
    assert document_id("刘备") == hashlib.sha256("刘备".encode()).hexdigest()[:32]


def test_the_first_copy_is_kept() -> None:
    assert mark_duplicates(["a", "b", "a", "a", "c"]) == [False, False, True, True, False]


def test_the_split_is_stable_and_has_the_asked_share() -> None:
    ids = [document_id(str(number)) for number in range(20_000)]
    held_out = {identity for identity in ids if split_of(identity, 0.02) == "held_out"}
    assert 330 < len(held_out) < 470  # 400 expected, standard deviation 20
    assert held_out < {identity for identity in ids if split_of(identity, 0.05) == "held_out"}
    assert not [identity for identity in ids if split_of(identity, 0.0) == "held_out"]


def test_partitions_are_even() -> None:
    partitions = [partition_of(document_id(str(number)), 4) for number in range(4000)]
    assert all(900 < partitions.count(partition) < 1100 for partition in range(4))
