"""Train the byte-level BPE tokenizer: reads the corpus artifact, writes the tokenizer artifact."""

from app.config import load_config
from app.logs import job
from app.tokens.config import TokenizerConfig

if __name__ == "__main__":
    config = load_config(TokenizerConfig, __doc__ or "")
    with job():
        from app.tokens import stage

        stage.run_tokenizer(config)
