"""Two characters, Alice and Bob, discuss their favorite books in turns: one model speaks for both, through OpenAI's SDK.

    scripts/serve &                                        # or any other server that takes continue_final_message
    pip install openai                                     # .venv/bin/python has it after scripts/install --dev
    python scripts/example_dialogue.py --turns 8

Every turn is a request of its own: the scene, all that was said, and the name of who speaks next, which the model goes on
from. It stops where the other's name would come. All turns begin with the same text, so each new one finds nearly all of its
prompt in the server's prefix cache and computes only the last line; at the end the script says how many tokens that saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import openai
from openai.types import CompletionUsage

SCENE = """Write a conversation between two friends, Alice and Bob, about their favorite books. Alice loves \
"The Hound of the Baskervilles", a detective story. Bob loves "The Time Machine", a science fiction novel. They take turns, \
say one or two sentences each, and ask each other questions about the books."""
OPENING = ("Alice", "Hello Bob! What is your favorite book?")
NAMES = ("Bob", "Alice")  # in the order of their turns after the opening


@dataclass
class Saved:
    """Tokens of all prompts, and those of them that the prefix cache served."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, usage: CompletionUsage) -> None:
        self.prompt_tokens += usage.prompt_tokens
        details = usage.prompt_tokens_details
        self.cached_tokens += (details.cached_tokens or 0) if details else 0


def say(client: openai.OpenAI, model: str, transcript: str, *, temperature: float, seed: int, saved: Saved) -> str:
    """What the one whose name ends the transcript says, printed while it is made. Raises openai.OpenAIError."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": SCENE}, {"role": "assistant", "content": transcript}],
        max_tokens=80,
        temperature=temperature,
        frequency_penalty=0.3,  # small models like to repeat what the other has said
        seed=seed,
        stop=[*(f"{name}:" for name in NAMES), "\n"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    text = ""
    for chunk in stream:
        if chunk.usage:
            saved.add(chunk.usage)
        for choice in chunk.choices:
            part = choice.delta.content or ""
            print(part if text else part.lstrip(), end="", flush=True)
            text += part
    print()
    return text.strip()


def talk(client: openai.OpenAI, model: str, *, turns: int, temperature: float, seed: int) -> Saved:
    """The whole conversation. Raises openai.OpenAIError."""
    saved = Saved()
    transcript = ": ".join(OPENING)
    print(transcript)
    for turn in range(turns):
        name = NAMES[turn % len(NAMES)]
        print(f"{name}: ", end="", flush=True)
        transcript += f"\n{name}:"
        transcript += f" {say(client, model, transcript, temperature=temperature, seed=seed + turn, saved=saved)}"
    return saved


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=11, help="another one is another conversation")
    args = parser.parse_args(argv)
    # The SDK wants a key even for a server that wants none.
    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    try:
        model = args.model or client.models.list().data[0].id
        saved = talk(client, model, turns=args.turns, temperature=args.temperature, seed=args.seed)
    except openai.APIConnectionError as error:
        print(f"\n{args.base_url} did not answer: {error} Is a server running there (scripts/serve)?", file=sys.stderr)
        return 1
    except openai.OpenAIError as error:
        print(f"\n{args.base_url} answered with an error: {error}", file=sys.stderr)
        return 1
    share = saved.cached_tokens / max(saved.prompt_tokens, 1)
    print(
        f"\n{saved.prompt_tokens:,} tokens in {args.turns} prompts, of which the prefix cache served {saved.cached_tokens:,} "
        f"({share:.0%}): {saved.prompt_tokens - saved.cached_tokens:,} were computed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
