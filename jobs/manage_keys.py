"""Create, list or revoke the endpoint's API keys; a created key is shown once. A running endpoint notices by itself."""

from pathlib import Path

from app.config import load_config
from app.logs import job
from app.serving.config import ManageKeysConfig

if __name__ == "__main__":
    config = load_config(ManageKeysConfig, __doc__ or "")
    with job():
        from app.serving import auth

        path = Path(config.keys_file)
        if config.action == "create":
            settings = config.model_dump(include={"models", "limits", "policy", "expires_at"})
            print(auth.create_key(path, config.name, settings))
        elif config.action == "revoke":
            auth.revoke_key(path, config.name)
        else:
            for key in auth.read_keys(path):
                print(key.model_dump_json(exclude={"digest"}))
