"""Ask the endpoint one question; reads OPENAI_BASE_URL and OPENAI_API_KEY, which `source .cluster/env` sets."""

from app.config import load_config
from app.logs import job
from app.serving.config import AskConfig

if __name__ == "__main__":
    config = load_config(AskConfig, __doc__ or "")
    with job():
        from openai import OpenAI, OpenAIError

        print(f"Question: {config.question}\nAnswer:   ", end="", flush=True)
        try:
            stream = OpenAI().chat.completions.create(
                model=config.model,
                messages=[{"role": "user", "content": config.question}],
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                stream=True,
                extra_body={"min_tokens": min(config.min_tokens, config.max_tokens)},
            )
            for chunk in stream:
                print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
        except OpenAIError as error:
            raise ValueError(f"the endpoint did not answer: {error}") from error
        print()
