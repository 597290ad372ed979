"""Pack documents into token blocks: reads corpus and tokenizer, writes the tokens artifact."""

from app.config import load_config
from app.logs import job
from app.tokens.config import PackConfig

if __name__ == "__main__":
    config = load_config(PackConfig, __doc__ or "")
    with job():
        from app.tokens import stage

        stage.run(config)
