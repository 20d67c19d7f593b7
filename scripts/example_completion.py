"""Completes a text with a running server, through OpenAI's SDK, and prints the words as they come.

scripts/serve &                                        # or any other OpenAI-compatible server
pip install openai                                     # .venv/bin/python has it after scripts/install --dev
python scripts/example_completion.py                   # "The quick brown fox"
python scripts/example_completion.py "Once upon a time" --max-tokens 80 --temperature 0.8
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import openai


def complete(client: openai.OpenAI, model: str, prompt: str, *, max_tokens: int, temperature: float, seed: int) -> str:
    """The completion, printed behind its prompt while it is made. Raises openai.OpenAIError."""
    print(prompt, end="", flush=True)
    text, usage = "", None
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
            text += choice.text
    print()
    if usage is not None:
        print(f"\n{usage.prompt_tokens} tokens in the prompt, {usage.completion_tokens} generated")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="The quick brown fox")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest word")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    # The SDK wants a key even for a server that wants none.
    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    try:
        model = args.model or client.models.list().data[0].id
        complete(client, model, args.prompt, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    except openai.APIConnectionError as error:
        print(f"\n{args.base_url} did not answer: {error} Is a server running there (scripts/serve)?", file=sys.stderr)
        return 1
    except openai.OpenAIError as error:
        print(f"\n{args.base_url} answered with an error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
