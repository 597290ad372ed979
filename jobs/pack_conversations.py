"""Pack chat jsonl into token blocks with the answers marked: what train_model tunes a model on."""

from app.config import load_config
from app.conversations.config import PackConversationsConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(PackConversationsConfig, __doc__ or "")
    with job():
        from app.conversations import stage

        stage.run(config)
