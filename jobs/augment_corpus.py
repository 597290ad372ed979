"""Make variants of documents by synonyms or back-translation: reads the corpus, writes jsonl for prepare_corpus."""

from app.augmentation.config import AugmentConfig
from app.config import load_config
from app.logs import job

if __name__ == "__main__":
    config = load_config(AugmentConfig, __doc__ or "")
    with job():
        from app.augmentation import stage

        stage.run(config)
