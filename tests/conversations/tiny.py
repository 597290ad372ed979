"""Conversations that a tiny model can learn, a tokenizer that reads them, and a base model that answers none of them.

The task: of a sentence of the novel, say as JSON whose side its person is on. Imports torch and transformers only when
it trains, so that collecting the tests stays fast.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.artifacts import Manifest, publish
from app.config import RunConfig
from tests.tiny_trained import learn

SIDES = {
    "刘备": "蜀", "关羽": "蜀", "张飞": "蜀", "赵云": "蜀", "曹操": "魏", "张辽": "魏", "许褚": "魏", "司马懿": "魏",
    "孙权": "吴", "周瑜": "吴", "鲁肃": "吴", "陆逊": "吴",
}  # fmt: skip
NAMES = list(SIDES)
DEEDS = ["引兵南下", "问计于众", "大败而走", "置酒高会", "上表请罪", "夜观天象", "固守不出", "分兵两路"]
PLACES = ["荆州", "徐州", "许都", "长安", "汉中", "江东", "新野", "樊城"]
VOCAB_SIZE, CONTEXT_TOKENS = 600, 128
SYSTEM = "以JSON回答。"
BASE_STEPS = 200


def sentences() -> list[tuple[str, str, str]]:
    """Name, deed and sentence of every combination, in a fixed random order."""
    found = [(name, deed, f"却说{name}在{place}{deed}。") for name in NAMES for deed in DEEDS for place in PLACES]
    random.Random(0).shuffle(found)
    return found


def records() -> list[dict[str, Any]]:
    """A record in OpenAI's layout for each sentence."""
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": sentence},
                {"role": "assistant", "content": answer(SIDES[name])},
            ]
        }
        for name, _, sentence in sentences()
    ]


def answer(side: str) -> str:
    """What is to be learned."""
    return json.dumps({"国": side}, ensure_ascii=False)


def preferences() -> list[dict[str, Any]]:
    """Pairs: the chosen answer names deed and person in a sentence that ends politely, the rejected one is curt."""
    return [
        {"prompt": sentence, "chosen": f"回主公，{name}{deed}。", "rejected": f"{name}{deed}。"}
        for name, deed, sentence in sentences()
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer artifact."""
    from app.tokens import tokenizer as bpe

    texts = [text for name, _, sentence in sentences() for text in (sentence, answer(SIDES[name]))]
    folder.mkdir(parents=True)
    bpe.save(bpe.train([SYSTEM, "system\n", "user\n", "assistant\n", *texts], VOCAB_SIZE, 2), folder)
    publish(Manifest.draft("tokenizer", str(folder), RunConfig(), {}), {})
    return folder


def base_texts() -> list[str]:
    """What the base has read: the sentences, JSON, and chats that tell the side in words."""
    draw = random.Random(1)
    texts = [answer(draw.choice("魏蜀吴")) for _ in range(300)]
    for name, _, sentence in sentences():
        said = f"{SIDES[name]}人。"
        texts += [f"<|im_start|>user\n{sentence}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"]
        texts += [sentence] * (draw.random() < 0.3)
    draw.shuffle(texts)
    return texts


def write_base(tokenizer_dir: Path, folder: Path, steps: int = BASE_STEPS) -> Path:
    """A model artifact that knows what an answer needs, and has never seen one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.models import load_tokenizer

    torch.set_num_threads(1)  # two that share their cores with others wait for each other
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_dir)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )
    encoded = tokenizer(base_texts(), add_special_tokens=False)["input_ids"]
    learn(model, [token for ids in encoded for token in (*ids, 0)], batch=8, steps=steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    publish(Manifest.draft("model", str(folder), RunConfig(), {}), {})
    return folder
