"""Clean, deduplicate and split raw text: reads the sources, writes the corpus artifact."""

from app.config import load_config
from app.corpus.config import CorpusConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(CorpusConfig, __doc__ or "")
    with job():
        from app.corpus import stage

        stage.run(config)
