import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.tokens import packing

END = 0
documents = st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=12)


def test_by_hand() -> None:
    stream = packing.concatenate_documents([[1, 2], [], [3, 4, 5]], END)
    assert stream.input_ids.tolist() == [1, 2, 0, 0, 3, 4, 5, 0]
    assert stream.document_starts.tolist() == [0, 3, 4]
    blocks, starts, tail = packing.cut_blocks(stream, 3)
    assert blocks.tolist() == [[1, 2, 0], [0, 3, 4]]
    assert [part.tolist() for part in starts] == [[0], [0, 1]]
    assert (tail.input_ids.tolist(), tail.document_starts.tolist()) == ([5, 0], [])


@given(shards=st.lists(documents, max_size=4), block_tokens=st.integers(1, 9))
def test_no_token_and_no_document_is_lost(shards: list[list[list[int]]], block_tokens: int) -> None:
    """Packing shard by shard and joining the tails keeps all tokens, documents and their order within a shard."""
    written, tails, num_starts = [], [], 0
    for shard in shards:
        blocks, starts, tail = packing.cut_blocks(packing.concatenate_documents(shard, END), block_tokens)
        written.append(blocks.reshape(-1))
        tails.append(tail)
        num_starts += sum(map(len, starts))
    blocks, starts, tail = packing.cut_blocks(packing.join(tails), block_tokens)
    num_starts += sum(map(len, starts)) + len(tail.document_starts)
    packed = np.concatenate([*written, blocks.reshape(-1), tail.input_ids])
    expected = [token for shard in shards for document in shard for token in (*document, END)]
    assert sorted(packed.tolist()) == sorted(expected)
    assert num_starts == sum(map(len, shards))
    assert len(tail.input_ids) < block_tokens


def test_a_stream_longer_than_32_bits_keeps_its_starts() -> None:
    stream = packing.Stream(np.array([1, 2], np.int32), np.array([0], np.int64))
    far = packing.Stream(np.broadcast_to(np.int32(7), 2**31), np.empty(0, np.int64))  # 2^31 tokens in 4 bytes
    starts = packing.join_starts([far, stream])
    assert starts.tolist() == [2**31]


@given(documents, st.integers(1, 9))
def test_starts_point_to_the_first_token_of_a_document(shard: list[list[int]], block_tokens: int) -> None:
    stream = packing.concatenate_documents(shard, END)
    _, starts, _ = packing.cut_blocks(stream, block_tokens)
    before = np.concatenate([[END], stream.input_ids])
    for index, part in enumerate(starts):
        for start in part:
            assert before[index * block_tokens + start] == END


def test_copies_are_the_whole_part_and_a_share_by_id() -> None:
    ids = [f"{number * 2**16:08x}" for number in range(2**16)]
    assert sum(packing.num_copies(identity, 2.25) for identity in ids) == 2.25 * len(ids)
    assert {packing.num_copies(identity, 1.0) for identity in ids} == {1}
