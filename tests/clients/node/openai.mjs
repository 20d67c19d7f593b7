// OpenAI's client for Node. The scenarios are those of ../programs/openai_sync.py; a line of JSON in, one out.
import assert from "node:assert/strict";
import { createInterface } from "node:readline";

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const CITIES = ["Paris", "Rome", "Oslo"];
const CAPITAL = [{ role: "user", content: "What is the capital of France?" }];
const ANSWER = "The capital of France is Paris.";
const COUNT = "One, two, three, four, five,";
const QUESTION = [{ role: "user", content: "What is the weather in Paris?" }];
const PARALLEL = 32;

const Person = z.object({
  name: z.string().max(12),
  age: z.number().int().min(0).max(120),
  colors: z.array(z.string().max(12)).max(2),
});
const Code = z.object({ pin: z.string().regex(/^\d{3}-\w{2}$/), tag: z.string().startsWith("ab").max(6) });
const Formats = z.object({
  lasts: z.iso.duration(),
  host: z.hostname().max(20),
  mood: z.emoji().max(4),
  secret: z.string().regex(/^(?=.*[A-Z])(?=.*\d).{2,8}$/),
});
const WEATHER = {
  name: "get_weather",
  description: "The weather of a city.",
  strict: true,
  parameters: {
    type: "object",
    properties: { city: { type: "string", enum: CITIES }, days: { type: "integer", minimum: 1, maximum: 7 } },
    required: ["city", "days"],
    additionalProperties: false,
  },
};
const TOOLS = [{ type: "function", function: WEATHER }];

const connect = target => new OpenAI({ baseURL: `${target.url}/v1`, apiKey: target.key, maxRetries: 0, timeout: 60_000 });

function checkCall(name, text) {
  const given = JSON.parse(text);
  assert.equal(name, "get_weather");
  assert.deepEqual(Object.keys(given).sort(), ["city", "days"]);
  assert.ok(CITIES.includes(given.city) && Number.isInteger(given.days) && given.days >= 1 && given.days <= 7, text);
}

function checkUsage(prompt, completion, total) {
  assert.ok(prompt > 0 && completion > 0);
  assert.equal(prompt + completion, total);
}

async function expectError(kind, status, request) {
  try {
    await request;
  } catch (error) {
    assert.equal(error.constructor, kind, `${error.constructor.name}: ${error.message}`);
    assert.equal(error.status, status);
    return error;
  }
  assert.fail(`no ${kind.name}`);
}

const SCENARIOS = {
  async list_models(target) {
    const client = connect(target), names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.ok(names.includes(target.model));
    assert.equal((await client.models.retrieve(target.model)).id, target.model);
  },

  async complete_batch(target) {
    const prompt = [COUNT, "The capital of France is"];
    const answer = await connect(target).completions.create({ model: target.model, prompt, max_tokens: 5, temperature: 0 });
    assert.ok(answer.choices[0].text.startsWith(" six") && answer.choices[1].text.startsWith(" Paris"));
    checkUsage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens);
  },

  async chat(target) {
    const request = connect(target).chat.completions.create({ model: target.model, messages: CAPITAL, temperature: 0 });
    const { data: answer, response } = await request.withResponse();
    assert.equal(answer.choices[0].message.content, ANSWER);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(response.headers.get("x-request-id"));
    checkUsage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens);
  },

  async stream_with_usage(target) {
    const client = connect(target), asked = { model: target.model, messages: CAPITAL, temperature: 0 };
    let text = "", usage = null;
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, ANSWER);
    checkUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens);
    assert.equal(await client.chat.completions.stream(asked).finalContent(), ANSWER);
  },

  async tool_loop(target) {
    const client = connect(target);
    const asked = { model: target.model, tools: TOOLS, temperature: 0, max_completion_tokens: 60 };
    const first = await client.chat.completions.create({ ...asked, messages: QUESTION, tool_choice: "required", parallel_tool_calls: false });
    const { message } = first.choices[0], [call] = message.tool_calls;
    checkCall(call.function.name, call.function.arguments);
    assert.equal(first.choices[0].finish_reason, "tool_calls");
    const named = { type: "function", function: { name: "get_weather" } };
    const streamed = await client.chat.completions.stream({ ...asked, messages: QUESTION, tool_choice: named }).finalChatCompletion();
    checkCall(streamed.choices[0].message.tool_calls[0].function.name, streamed.choices[0].message.tool_calls[0].function.arguments);
    const messages = [...QUESTION, message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
    const second = await client.chat.completions.create({ ...asked, messages, tool_choice: "none", max_completion_tokens: 20 });
    assert.ok(second.choices[0].message.content);
  },

  async structured_output(target) {
    const asked = { model: target.model, messages: [{ role: "user", content: "Invent a person." }], temperature: 0, max_completion_tokens: 120 };
    const answer = await connect(target).chat.completions.parse({ ...asked, response_format: zodResponseFormat(Person, "person") });
    Person.parse(answer.choices[0].message.parsed);
    // Zod checks the answer with JavaScript's reading of the pattern, in which a digit is one of ASCII's.
    const coded = await connect(target).chat.completions.parse({ ...asked, response_format: zodResponseFormat(Code, "code") });
    Code.parse(coded.choices[0].message.parsed);
    // Patterns of zod's own that look ahead.
    const long = { ...asked, max_completion_tokens: 300 };
    const formed = await connect(target).chat.completions.parse({ ...long, response_format: zodResponseFormat(Formats, "formats") });
    Formats.parse(formed.choices[0].message.parsed);
  },

  async embeddings(target) {
    const answer = await connect(target).embeddings.create({ model: target.model, input: ["a cat", "the stock market"] });
    assert.equal(answer.data.length, 2);
    for (const { embedding } of answer.data) {
      assert.ok(Math.abs(embedding.reduce((sum, number) => sum + number * number, 0) - 1) < 1e-3);
    }
  },

  async responses(target) {
    const client = connect(target), asked = { model: target.model, temperature: 0, max_output_tokens: 120 };
    const first = await client.responses.create({ ...asked, input: CAPITAL[0].content });
    assert.equal(first.output_text, ANSWER);
    checkUsage(first.usage.input_tokens, first.usage.output_tokens, first.usage.total_tokens);
    assert.equal((await client.responses.retrieve(first.id)).id, first.id);
    await client.responses.delete(first.id);
    await expectError(OpenAI.NotFoundError, 404, client.responses.retrieve(first.id));
    const parsed = await client.responses.parse({ ...asked, input: "Invent a person.", text: { format: zodTextFormat(Person, "person") } });
    Person.parse(parsed.output_parsed);
    const tools = [{ type: "function", ...WEATHER }];
    const called = await client.responses.create({ ...asked, input: QUESTION, tools, tool_choice: { type: "function", name: "get_weather" } });
    const call = called.output.find(item => item.type === "function_call");
    checkCall(call.name, call.arguments);
    const input = [{ type: "function_call_output", call_id: call.call_id, output: "sunny" }];
    assert.ok((await client.responses.create({ ...asked, input, previous_response_id: called.id, max_output_tokens: 20 })).output_text);
  },

  async responses_stream(target) {
    const asked = { model: target.model, input: CAPITAL[0].content, temperature: 0 };
    const client = connect(target);
    let text = "", last = null;
    for await (const event of await client.responses.create({ ...asked, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    assert.equal(text, ANSWER);
    assert.equal(last.type, "response.completed");
    assert.equal((await client.responses.stream(asked).finalResponse()).output_text, ANSWER);
  },

  async parallel(target) {
    const client = connect(target), asked = { model: target.model, messages: CAPITAL, temperature: 0 };
    const answers = await Promise.all(Array.from({ length: PARALLEL }, () => client.chat.completions.create(asked)));
    for (const answer of answers) assert.equal(answer.choices[0].message.content, ANSWER);
  },

  async cancel(target) {
    const asked = { model: target.model, prompt: COUNT, max_tokens: 3000, ignore_eos: true };
    const client = connect(target);
    const stream = await client.completions.create({ ...asked, stream: true });
    for await (const chunk of stream) {
      assert.equal(chunk.object, "text_completion");
      break; // closes the connection
    }
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 700);
    await assert.rejects(client.completions.create(asked, { signal: controller.signal }), OpenAI.APIUserAbortError);
  },

  async bad_request(target) {
    const request = connect(target).chat.completions.create({ model: target.model, messages: CAPITAL, temperature: 9 });
    assert.equal((await expectError(OpenAI.BadRequestError, 400, request)).param, "temperature");
  },

  async not_found(target) {
    const request = connect(target).chat.completions.create({ model: "nobody", messages: CAPITAL });
    assert.equal((await expectError(OpenAI.NotFoundError, 404, request)).code, "model_not_found");
  },

  async unauthorized(target) {
    const request = connect(target).chat.completions.create({ model: target.model, messages: CAPITAL });
    await expectError(OpenAI.AuthenticationError, 401, request);
  },

  async rate_limited(target) {
    const request = connect(target).chat.completions.create({ model: target.model, messages: CAPITAL });
    assert.equal((await expectError(OpenAI.RateLimitError, 429, request)).code, "rate_limit_exceeded");
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { scenario, ...target } = JSON.parse(line), begin = performance.now();
  let result;
  try {
    await SCENARIOS[scenario](target);
    result = { seconds: Math.round(performance.now() - begin) / 1000 };
  } catch (error) {
    result = { error: error.stack ?? String(error) };
  }
  process.stdout.write(JSON.stringify(result) + "\n");
}
