"""Arrow schemas of what passes between stages, and nothing else."""

import pyarrow as pa

CLEAN_DOCUMENT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # sha256 of the normalised text, 32 hex digits
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

REJECTED_DOCUMENT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("excerpt", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),  # the document or evaluation item that it repeats, or ""
    ]
)

TOKEN_BLOCK = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),  # [T]
        pa.field("document_starts", pa.list_(pa.int32()), nullable=False),  # offsets in the block where documents begin
    ]
)

CONVERSATION_BLOCK = TOKEN_BLOCK.append(
    pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False)  # [T], the tokens that are predicted
)

SPLITS = ("train", "held_out")
