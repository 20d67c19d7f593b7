"""What the fields of requests mean, and their ranges as the code checks them: for the OpenAPI document.

A name stands for that field of every request type, `Type.name` for that of one. Keys beside the description are JSON Schema's.
A field that describes itself where it is defined needs no entry.
"""

from __future__ import annotations

from typing import Any

from engine.sampling_params import MAX_LOGPROBS, MAX_N

_COUNT = 2**31 - 1


def _field(description: str, **schema: Any) -> dict[str, Any]:
    return {"description": description, **schema}


_SAMPLING = {
    "model": _field("A name of the served model, as /v1/models lists them; left out, the first."),
    "temperature": _field("0 is greedy; higher is more random.", minimum=0, maximum=2),
    "top_p": _field("Sample from the fewest tokens that have this probability mass.", exclusiveMinimum=0, maximum=1),
    "top_k": _field("Sample from so many of the likeliest tokens; 0 or -1 is all.", minimum=-1, maximum=_COUNT),
    "min_p": _field("Leave out tokens less likely than this share of the likeliest one.", minimum=0, maximum=1),
    "typical_p": _field("Locally typical sampling: probability mass to keep; 1 is off.", exclusiveMinimum=0, maximum=1),
    "repetition_penalty": _field("Divides the logits of tokens seen in prompt or output; 1 is off.", minimum=0.01, maximum=100),
    "presence_penalty": _field("Taken from the logits of tokens that are in the output.", minimum=-2, maximum=2),
    "frequency_penalty": _field("Taken from a token's logit for every time it is in the output.", minimum=-2, maximum=2),
    "logit_bias": _field("Token id, as a decimal string -> added to its logit, -100 to 100."),
    "allowed_token_ids": _field("Nothing but these tokens is sampled.", minItems=1),
    "bad_words": _field("Texts that the output may not hold."),
    "seed": _field("The same seed and request give the same tokens; left out, one is drawn."),
    "stop": _field("Up to 16 texts that end the output; they are not part of it."),
    "stop_token_ids": _field("Tokens that end the output."),
    "include_stop_str_in_output": _field("Whether the text that ended the output is part of it."),
    "ignore_eos": _field("Go on where the model ends its answer."),
    "min_tokens": _field("Tokens before which the answer does not end.", minimum=0, maximum=_COUNT),
    "skip_special_tokens": _field("Whether special tokens are left out of the text."),
    "spaces_between_special_tokens": _field("With skip_special_tokens: false, a space between two special tokens."),
    "truncate_prompt_tokens": _field("Keep so many tokens of the prompt's end; -1 keeps as many as fit.", minimum=-1),
    "priority": _field("Lower goes first where requests wait."),
    "cache_salt": _field("Prompt beginnings are shared only with requests of the same salt."),
    "request_id": _field("The answer's id holds it."),
    "explain": _field("Adds `octavo` to the usage: times, cached tokens, preemptions and the seed used."),
    "stream": _field("Whether the answer comes as server-sent events."),
    "stream_options": _field("Only with `stream`."),
}

_GENERATION = {
    "n": _field("Choices.", minimum=1, maximum=MAX_N),
    "max_tokens": _field("Tokens to generate at most.", minimum=1, maximum=_COUNT),
    "prompt_logprobs": _field(
        "Logprobs of the prompt: so many of the likeliest tokens at each place.", minimum=0, maximum=MAX_LOGPROBS
    ),
    "return_token_ids": _field("Whether the answer has the token ids of prompt and output."),
    "StreamOptions.include_usage": _field("Whether a last chunk, without choices, has the usage."),
    "StreamOptions.continuous_usage_stats": _field("Whether every chunk has the usage so far."),
    "add_special_tokens": _field("Whether the tokenizer adds its special tokens, such as BOS."),
}

_STRUCTURED = {
    "response_format": _field("What the answer must be: text, a JSON object, or JSON that follows a schema."),
    "structured_outputs": _field("What the answer must match, in vLLM's form; excludes response_format."),
    "guided_json": _field("Older name of structured_outputs.json."),
    "guided_regex": _field("Older name of structured_outputs.regex."),
    "guided_choice": _field("Older name of structured_outputs.choice."),
    "guided_grammar": _field("Older name of structured_outputs.grammar."),
    "ResponseFormat.type": _field("The kind of answer.", enum=["text", "json_object", "json_schema"]),
    "ResponseFormat.json_schema": _field("With type json_schema."),
    "JsonSchemaFormat.name": _field("The schema's name."),
    "JsonSchemaFormat.description": _field("What the answer is for; without effect."),
    "JsonSchemaFormat.schema": _field("JSON Schema that the answer follows."),
    "JsonSchemaFormat.strict": _field("The answer follows the schema either way."),
    "StructuredOutputs.json": _field("JSON Schema, or its text."),
    "StructuredOutputs.json_object": _field("Any JSON object."),
    "StructuredOutputs.regex": _field("A regular expression for the whole answer."),
    "StructuredOutputs.choice": _field("The answer is one of these.", minItems=1),
    "StructuredOutputs.grammar": _field("Lark as llguidance reads it, or GBNF."),
}

_COMPLETION = {
    "prompt": _field("A text, token ids, or an array of either."),
    "suffix": _field("What follows the answer: fill-in-the-middle, for models whose tokenizer has the marks."),
    "echo": _field("Whether the answer begins with the prompt."),
    "best_of": _field("Generate so many choices and answer with the n of the highest mean logprob.", minimum=1, maximum=MAX_N),
    "CompletionRequest.max_tokens": _field(
        "Tokens to generate at most; 0 only with echo.", minimum=0, maximum=_COUNT, default=16
    ),
    "CompletionRequest.logprobs": _field("So many of the likeliest tokens at each place.", minimum=0, maximum=MAX_LOGPROBS),
}

_CHAT = {
    "messages": _field("The conversation so far."),
    "max_completion_tokens": _field("Tokens to generate at most; left out, all the room there is.", minimum=1, maximum=_COUNT),
    "ChatRequest.max_tokens": _field("Older name of max_completion_tokens.", minimum=1, maximum=_COUNT),
    "ChatRequest.logprobs": _field("Whether the answer has logprobs."),
    "top_logprobs": _field("So many of the likeliest tokens at each place.", minimum=0, maximum=MAX_LOGPROBS),
    "tools": _field("Functions that the model may call."),
    "tool_choice": _field("none, auto, required, or the function to call."),
    "parallel_tool_calls": _field("Whether one answer may hold several calls."),
    "functions": _field("Older form of tools."),
    "function_call": _field("Older form of tool_choice."),
    "reasoning_effort": _field("Given to the chat template."),
    "include_reasoning": _field("Whether the answer has the reasoning."),
    "echo_prompt": _field("Whether the answer begins with the last message."),
    "chat_template": _field("A Jinja template to use instead of the model's own."),
    "chat_template_kwargs": _field("Variables for the chat template."),
    "documents": _field("Documents for the chat template."),
    "add_generation_prompt": _field("Whether the assistant's turn is begun after the last message."),
    "continue_final_message": _field("Whether the answer goes on from the last message, the assistant's."),
    "ChatMessage.role": _field("Who speaks; developer is system where the template knows no developer."),
    "ChatMessage.content": _field("A text, text parts, or null, as in a turn that only called tools."),
    "ChatMessage.name": _field("Of the speaker or the tool, for the template."),
    "ChatMessage.tool_calls": _field("The calls of an assistant's turn."),
    "ChatMessage.tool_call_id": _field("Which call a tool's message answers."),
    "ChatMessage.reasoning_content": _field("The reasoning of an assistant's turn."),
}

FIELDS: dict[str, dict[str, Any]] = {**_SAMPLING, **_GENERATION, **_STRUCTURED, **_COMPLETION, **_CHAT}
