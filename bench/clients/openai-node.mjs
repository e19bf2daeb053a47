// chat, stream, a forced call, a response
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.ENGINE_URL + "/v1", apiKey: "none" });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Say hello." }];
const city = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] };

assert((await client.chat.completions.create({ model, messages, max_tokens: 20 })).choices[0].message.content);
let text = "";
for await (const event of await client.chat.completions.create({ model, messages, max_tokens: 20, stream: true }))
  text += event.choices[0].delta.content ?? "";
assert(text);
const called = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  max_tokens: 80,
  tools: [{ type: "function", function: { name: "weather", parameters: city } }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
assert(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city);
assert((await client.responses.create({ model, input: "Say hello.", max_output_tokens: 20 })).output_text);
