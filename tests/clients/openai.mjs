// The `openai` package of npm: `node openai.mjs FEATURE BASE_URL`, run by test_openai_npm.py. A failed assertion is exit 1.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.ONELOOP_NODE}/package.json`);
const { OpenAI } = require("openai");
const { zodResponseFormat } = require("openai/helpers/zod");
const { z } = require("zod");

const [feature, baseURL] = process.argv.slice(2);
const { model, sum, sumAnswer, person, personAnswer, weather, weatherAnswer, weatherParameters } = JSON.parse(
  readFileSync(0, "utf8"),
);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const ask = (content) => ({ model, temperature: 0, messages: [{ role: "user", content }] });

const features = {
  async text() {
    const answer = await client.chat.completions.create(ask(sum));
    assert.equal(answer.choices[0].message.content, sumAnswer);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    const ids = [];
    for await (const card of client.models.list()) ids.push(card.id);
    assert.deepEqual(ids, [model]);
    await assert.rejects(client.chat.completions.create({ ...ask(sum), temperature: 3 }), OpenAI.BadRequestError);
  },

  async stream() {
    let text = "";
    const chunks = await client.chat.completions.create({ ...ask(sum), stream: true });
    for await (const chunk of chunks) text += chunk.choices[0].delta.content ?? "";
    assert.equal(text, sumAnswer);
    const helper = client.chat.completions.stream(ask(sum));
    assert.equal(await helper.finalContent(), sumAnswer);
  },

  async "tool loop"() {
    const cities = [];
    const tools = [
      {
        type: "function",
        function: {
          name: "get_weather",
          description: "Get the current weather",
          parameters: weatherParameters,
          parse: JSON.parse,
          function: ({ city }) => (cities.push(city), JSON.stringify(weatherAnswer)),
        },
      },
    ];
    for (const stream of [false, true]) {
      const runner = client.chat.completions.runTools({ ...ask(weather), tools, stream });
      assert.match(await runner.finalContent(), /sunny/);
    }
    assert.deepEqual(cities, ["Paris", "Paris"]);
  },

  async "structured object"() {
    const shape = z.object({ name: z.string(), age: z.int(), city: z.string() });
    const answer = await client.chat.completions.parse({
      ...ask(person),
      response_format: zodResponseFormat(shape, "person"),
    });
    assert.deepEqual(answer.choices[0].message.parsed, personAnswer);
  },

  async logprobs() {
    const answer = await client.chat.completions.create({ ...ask(sum), logprobs: true, top_logprobs: 2 });
    const { content } = answer.choices[0].logprobs;
    assert.ok(content.map(({ token }) => token).join("").startsWith(sumAnswer));
    assert.ok(content.every(({ top_logprobs }) => top_logprobs.length === 2));
  },
};

await features[feature]();
