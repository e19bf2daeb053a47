// generateText, streamText, a forced tool, an object of a schema
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "ours",
  baseURL: process.env.ENGINE_URL + "/v1",
  apiKey: "none",
  supportsStructuredOutputs: true,
});
const common = { model: provider(process.env.ENGINE_MODEL), maxOutputTokens: 80, maxRetries: 0 };

assert((await generateText({ ...common, prompt: "Say hello." })).text);
let text = "";
for await (const part of streamText({ ...common, prompt: "Say hello.", onError: ({ error }) => { throw error; } }).textStream)
  text += part;
assert(text);
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async ({ city }) => `Rain in ${city}.`,
});
const called = await generateText({
  ...common,
  prompt: "What is the weather in Paris?",
  tools: { weather },
  toolChoice: "required",
});
assert(called.toolResults[0].output.startsWith("Rain in"));
const person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
const read = await generateText({ ...common, prompt: "Ann is 30 years old.", output: Output.object({ schema: person }) });
assert(read.output.age >= 0);
