"""Settings of the augmentation stage: which documents get variants, made how, and which variants are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig

Method = Literal["synonyms", "local_translation", "endpoint_translation"]


class SynonymsConfig(Config):
    """Words replaced by synonyms of a lexicon."""

    lexicon_uri: str = Field(
        "lexicon.txt", description="text file in the layout of Cilin: `Aa01A01= 人 士 人物`, UTF-8"
    )
    replaced_share: float = Field(0.15, gt=0, le=1, description="share of the Chinese words of a document replaced")
    max_length_difference: int = Field(1, ge=0, description="characters that a synonym may be longer or shorter")


class LocalTranslationConfig(Config):
    """Chinese to English and back with two Marian model directories."""

    to_english_uri: str = Field("", description="Hugging Face directory of the zh-en model (safetensors)")
    to_chinese_uri: str = Field("", description="Hugging Face directory of the en-zh model (safetensors)")
    to_chinese_prefix: str = Field("", description="before each English passage: `>>cmn_Hans<< ` for opus-mt-en-zh")
    batch_passages: int = Field(16, ge=1, description="passages translated at once")
    num_beams: int = Field(4, ge=1, description="beams of the search")


class EndpointTranslationConfig(Config):
    """Chinese to English and back through an OpenAI-compatible endpoint, which sees the documents."""

    base_url: str = Field("", description="such as http://127.0.0.1:8000/v1")
    model: str = Field("", description="model name at the endpoint")
    api_key_variable: str = Field(
        "", description="environment variable that holds the key; empty: the endpoint has none"
    )
    timeout_seconds: float = Field(60.0, gt=0, description="of one request")
    max_retries: int = Field(3, ge=0, description="of one request, with growing pauses")
    num_requests: int = Field(8, ge=1, description="requests under way at once, of each actor")
    max_tokens: int = Field(1024, ge=1, description="of one answer; a cut answer drops its variant")


class DiversityConfig(Config):
    """On how many documents the diversity figures are computed, chosen by hash."""

    num_documents: int = Field(2000, ge=1, description="parents for distinct-2 and distinct-3, with their variants")
    num_self_bleu_documents: int = Field(60, ge=2, description="parents for self-BLEU; its cost grows with the square")
    self_bleu_characters: int = Field(200, ge=10, description="beginning of a text that self-BLEU compares")


class AugmentConfig(RunConfig):
    """Settings of `augment_corpus`."""

    corpus_uri: str = Field("corpus", description="corpus artifact; its train split holds the parents")
    output_uri: str = Field("augmented", description="where part-*.jsonl go: a source for prepare_corpus")
    methods: list[Method] = Field(
        ["synonyms"], min_length=1, description="synonyms local_translation endpoint_translation"
    )
    variants_per_method: int = Field(1, ge=1, description="synonym variants of a document; translation makes one")
    document_fraction: float = Field(1.0, gt=0, le=1, description="share of the train documents augmented, by hash")
    min_similarity: float = Field(
        0.75, ge=-1, le=1, description="cosine of sentence embeddings; below it: too_different"
    )
    passage_characters: int = Field(200, ge=20, description="longer documents are translated in passages of sentences")
    shard_documents: int = Field(500, ge=1, description="documents per output file, the unit that a restart repeats")
    num_actors: int = Field(2, ge=1, description="Ray actors that share the work; the output does not depend on it")
    seed: int = Field(0, description="of the choice of documents, words and synonyms")
    synonyms: SynonymsConfig = SynonymsConfig()
    local_translation: LocalTranslationConfig = LocalTranslationConfig()
    endpoint_translation: EndpointTranslationConfig = EndpointTranslationConfig()
    diversity: DiversityConfig = DiversityConfig()

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> AugmentConfig:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: each once, got {', '.join(self.methods)}")
        needed = {
            "synonyms": ("lexicon_uri",),
            "local_translation": ("to_english_uri", "to_chinese_uri"),
            "endpoint_translation": ("base_url", "model"),
        }
        for method in self.methods:
            for key in needed[method]:
                if not getattr(getattr(self, method), key):
                    raise ValueError(f"{method}.{key}: set it, or leave {method} out of methods")
        return self

    def inputs(self) -> dict[Method, list[str]]:
        """Method -> full URIs of the lexicon or the models that it reads, for the methods in use."""
        given: dict[Method, list[str]] = {
            "synonyms": [self.synonyms.lexicon_uri],
            "local_translation": [self.local_translation.to_english_uri, self.local_translation.to_chinese_uri],
        }
        return {method: [self.resolve(uri) for uri in given[method]] for method in self.methods if method in given}

    def plan(self) -> list[str]:
        """What is read and written."""
        reads = {"endpoint_translation": [f"send the documents to {self.endpoint_translation.base_url}"]}
        for method, uris in self.inputs().items():
            reads[method] = [f"read {uri}" for uri in uris]
        return [
            f"read {self.resolve(self.corpus_uri)}/train, {self.document_fraction:.0%} of its documents",
            *(line for method in self.methods for line in reads[method]),
            f"write {self.resolve(self.output_uri)}/part-*.jsonl",
        ]
