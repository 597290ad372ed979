"""A Marian directory as users have it, tiny and random, made in a second."""

import json
from pathlib import Path


def write_tiny_marian(folder: Path) -> None:
    """A random Marian of some thousand parameters, with the tokenizer files that such a directory has."""
    import sentencepiece
    import torch
    from transformers import MarianConfig, MarianMTModel

    folder.mkdir()
    texts = ["天下大势，分久必合，合久必分。", "The general trend: long divided, must unite."] * 20
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    for name in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "texts.txt"),
            model_prefix=str(folder / name),
            vocab_size=50,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    words = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "zho", "target_lang": "eng"}))
    torch.manual_seed(0)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 48}
    ends = {"eos_token_id": 0, "pad_token_id": len(words) - 1, "decoder_start_token_id": len(words) - 1}
    config = MarianConfig(vocab_size=len(words), decoder_vocab_size=len(words), **size, **heads, **ends)
    MarianMTModel(config).save_pretrained(folder)
