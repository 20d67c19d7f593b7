"""What the fields of requests mean, and their ranges as the code checks them: for the OpenAPI document.

A name stands for that field of every request type, `Type.name` for that of one. Keys beside the description are JSON Schema's.
A field that describes itself where it is defined needs no entry.
"""

from __future__ import annotations

from typing import Any

from engine.sampling_params import MAX_LOGPROBS, MAX_N

_COUNT = 2**31 - 1
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_PROMPTS = [
    _TEXT,
    {"type": "array", "items": _TEXT, "minItems": 1},
    _TOKEN_IDS,
    {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
]


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
    "allowed_token_ids": _field("Nothing but these tokens is sampled.", **_TOKEN_IDS),
    "bad_words": _field("Texts that the output may not hold."),
    "seed": _field("The same seed and request give the same tokens; left out, one is drawn."),
    "stop": _field(
        "Up to 16 texts that end the output; they are not part of it.",
        anyOf=[_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}],
    ),
    "stop_token_ids": _field("Tokens that end the output.", items=_TOKEN_IDS["items"]),
    "include_stop_str_in_output": _field("Whether the text that ended the output is part of it."),
    "ignore_eos": _field("Go on where the model ends its answer."),
    "min_tokens": _field("Tokens before which the answer does not end.", minimum=0, maximum=_COUNT),
    "skip_special_tokens": _field("Whether special tokens are left out of the text."),
    "spaces_between_special_tokens": _field("With skip_special_tokens: false, a space between two special tokens."),
    "truncate_prompt_tokens": _field("Keep so many tokens of the prompt's end; -1 keeps as many as fit.", minimum=-1),
    "priority": _field("Lower goes first where requests wait; ten seconds of waiting make up for one."),
    "timeout": _field("Seconds that the whole answer may take; left out, as the server is set."),
    "first_token_timeout": _field("Seconds that the first token may take; left out, as the server is set."),
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
    "prompt": _field("A text, token ids, or an array of either.", anyOf=_PROMPTS),
    "suffix": _field("What follows the answer: fill-in-the-middle, for models whose tokenizer has the marks."),
    "echo": _field("Whether the answer begins with the prompt."),
    "best_of": _field("Generate so many choices and answer with the n of the highest mean logprob.", minimum=1, maximum=MAX_N),
    "CompletionRequest.max_tokens": _field(
        "Tokens to generate at most; 0 only with echo.", minimum=0, maximum=_COUNT, default=16
    ),
    "CompletionRequest.logprobs": _field("So many of the likeliest tokens at each place.", minimum=0, maximum=MAX_LOGPROBS),
}

_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}

_CHAT = {
    "messages": _field("The conversation so far."),
    "max_completion_tokens": _field("Tokens to generate at most; left out, all the room there is.", minimum=1, maximum=_COUNT),
    "ChatRequest.max_tokens": _field("Older name of max_completion_tokens.", minimum=1, maximum=_COUNT),
    "ChatRequest.logprobs": _field("Whether the answer has logprobs."),
    "ChatRequest.echo": _field("Whether the answer begins with the message that it goes on from."),
    "top_logprobs": _field("So many of the likeliest tokens at each place.", minimum=0, maximum=MAX_LOGPROBS),
    "tools": _field("Functions that the model may call."),
    "tool_choice": _field("none, auto, required, or what may be called; left out, auto where there are tools."),
    "parallel_tool_calls": _field("Whether one answer may hold several calls."),
    "reasoning_effort": _field("Given to the chat template."),
    "include_reasoning": _field("Whether the answer has the reasoning."),
    "chat_template": _field("A Jinja template to use instead of the model's own."),
    "chat_template_kwargs": _field("Variables for the chat template."),
    "documents": _field("Documents for the chat template."),
    "add_generation_prompt": _field("Whether the assistant's turn is begun after the last message."),
    "continue_final_message": _field("Whether the answer goes on from the last message, the assistant's."),
    "ChatMessage.role": _field("Who speaks; developer is system where the template knows no developer."),
    "ChatMessage.content": _field(
        "A text, or text parts; only an assistant's turn may have none.",
        anyOf=[{"type": "string"}, {"type": "array", "items": _PART}],
    ),
    "ChatMessage.refusal": _field("The assistant's refusal, in place of a text."),
    "ChatMessage.name": _field("Of the speaker or the tool, for the template."),
    "ChatMessage.tool_calls": _field("The calls of an assistant's turn."),
    "ChatMessage.tool_call_id": _field("Which call a tool's message answers."),
    "ChatMessage.reasoning_content": _field("The reasoning of an assistant's turn."),
    "ChatMessage.reasoning": _field("Another name of reasoning_content."),
    "GivenToolCall.id": _field("The call's id, as the answer had it."),
    "GivenToolCall.type": _field("Only functions."),
    "GivenToolCall.function": _field("What was called."),
    "CalledFunction.name": _field("The function's name."),
    "CalledFunction.arguments": _field("A JSON text, as the answer had it, or the object."),
    "ChatTool.type": _field("Only functions.", enum=["function"]),
    "ChatTool.function": _field("The function."),
    "ChatFunction.name": _field("The function's name."),
    "ChatFunction.description": _field("When and how to call it, for the model."),
    "ChatFunction.parameters": _field("JSON Schema of an object; left out, a function without arguments."),
    "ChatFunction.strict": _field("Calls follow the schema also where the model makes them of its own accord."),
}

_RESPONSES = {
    "ResponseRequest.input": _field("A text, or items: messages, calls and what they returned."),
    "instructions": _field("A system message in front; it is not handed on by previous_response_id."),
    "previous_response_id": _field("A stored response to go on from."),
    "ResponseRequest.store": _field("Whether the answer can be gone on from."),
    "ResponseRequest.metadata": _field("Up to 16 texts that are kept with the response."),
    "max_output_tokens": _field("Tokens to generate at most; left out, all the room there is.", minimum=1, maximum=_COUNT),
    "ResponseRequest.top_logprobs": _field(
        "So many of the likeliest tokens at each place; with include.", minimum=0, maximum=MAX_LOGPROBS
    ),
    "include": _field("message.output_text.logprobs adds logprobs; the others have no effect."),
    "text": _field("What the answer's text must be."),
    "reasoning": _field("How much to think."),
    "truncation": _field("auto drops the oldest items where the input is too long; disabled refuses it."),
    "ResponseTool.type": _field("Only functions."),
    "ResponseTool.name": _field("The function's name."),
    "ResponseTool.description": _field("When and how to call it, for the model."),
    "ResponseTool.parameters": _field("JSON Schema of an object; left out, a function without arguments."),
    "ResponseTool.strict": _field("Calls follow the schema also where the model makes them of its own accord."),
    "TextConfig.format": _field("Text, a JSON object, or JSON that follows a schema."),
    "TextFormat.type": _field("The kind of text."),
    "TextFormat.name": _field("The schema's name."),
    "TextFormat.schema": _field("JSON Schema that the answer follows."),
    "TextFormat.strict": _field("The answer follows the schema either way."),
    "TextFormat.description": _field("What the answer is for; without effect."),
    "ReasoningConfig.effort": _field("Given to the chat template."),
    "id": _field("The item's id; left out, it gets one."),
    "status": _field("As the answer had it."),
    "call_id": _field("Which call this is, or answers."),
    "GivenMessage.type": _field("A message; may be left out."),
    "GivenMessage.role": _field("Who speaks."),
    "GivenMessage.content": _field("A text, or text parts."),
    "GivenMessage.phase": _field("As the answer had it."),
    "GivenFunctionCall.type": _field("A call that the model made."),
    "GivenFunctionCall.name": _field("The function's name."),
    "GivenFunctionCall.arguments": _field("JSON text, as the answer had it."),
    "GivenFunctionCallOutput.type": _field("What a call returned."),
    "GivenFunctionCallOutput.output": _field("A text, or text parts."),
    "GivenReasoning.type": _field("The model's thoughts of an earlier turn."),
    "GivenReasoning.summary": _field("Without effect: the text stands in content."),
    "GivenReasoning.content": _field("The thoughts."),
    "GivenReasoning.encrypted_content": _field("Without effect: the text stands in content."),
    "GivenReference.type": _field("An item of a stored response."),
    "GivenReference.id": _field("That item's id."),
}

_VECTORS_AND_TOKENS = {
    "EmbeddingRequest.input": _field("A text, token ids, or an array of either.", anyOf=_PROMPTS),
    "encoding_format": _field("Numbers, or base64 of little-endian float32."),
    "dimensions": _field("Keep so many numbers of the vector, scaled to length 1 again.", minimum=1),
    "pooling": _field("The mean of all tokens' states, or the last token's; left out, as the server is set."),
    "EmbeddingRequest.explain": _field("Adds `octavo` to the usage: times and cached tokens."),
    "TokenizeRequest.prompt": _field("A text; not with messages."),
    "TokenizeRequest.add_special_tokens": _field("Whether a prompt gets special tokens, such as BOS; left out, yes."),
    "return_token_strs": _field("Whether the answer has the tokens as the vocabulary writes them."),
    "DetokenizeRequest.tokens": _field("Token ids.", items=_TOKEN_IDS["items"]),
}

FIELDS: dict[str, dict[str, Any]] = {
    **_SAMPLING,
    **_GENERATION,
    **_STRUCTURED,
    **_COMPLETION,
    **_CHAT,
    **_RESPONSES,
    **_VECTORS_AND_TOKENS,
}

_GIVEN = {"not": {"type": "null"}}
TYPES: dict[str, dict[str, Any]] = {
    "ChatMessage": {
        "oneOf": [
            {
                "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": _GIVEN},
                "required": ["content"],
            },
            {
                "properties": {"role": {"const": "tool"}, "content": _GIVEN, "tool_call_id": _GIVEN},
                "required": ["content", "tool_call_id"],
            },
            {"properties": {"role": {"const": "assistant"}}},
        ]
    },
    "TokenizeRequest": {
        "oneOf": [
            {"properties": {"prompt": _GIVEN}, "required": ["prompt"]},
            {"properties": {"messages": {"type": "array", "minItems": 1}}, "required": ["messages"]},
        ]
    },
}
"""What holds of several fields of a type together."""
