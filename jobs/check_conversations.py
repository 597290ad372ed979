"""Look at chat jsonl before training: lengths, truncations, duplicates, personal data, how the model will read it."""

from app.config import load_config
from app.conversations.config import CheckConversationsConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(CheckConversationsConfig, __doc__ or "")
    with job():
        from app.conversations import stage

        print(stage.check(config))
