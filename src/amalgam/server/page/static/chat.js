// One answer: a conversation goes to the OpenAI interface, its stream comes back piece by piece.

import { ApiError, stream } from "./api.js";
import { precisionOf, server, tellsExperts } from "./server.js";

const WEIGHTS = /-weights-(\d+)$/; // of a system_fingerprint

// A model without a chat template gets the bare text of the conversation to continue.
export const isContinuing = () => server.info?.has_chat_template === false;

// Streams the answer to `nodes` (see tree.js) and calls take({text, reasoning, toolCall, usage}) for each
// piece, which has one of these; `usage` counts what has come so far. Returns {finish, usage, routedExperts, version,
// precision}, the last a promise. Raises ApiError, or what `signal` aborts with.
export async function answer(conversation, nodes, { seed, signal, take }) {
  if (isContinuing()) {
    return run("v1/completions", { ...common(conversation, seed), prompt: nodes.map((node) => node.content).join("") }, { signal, take });
  }
  return run("v1/chat/completions", chatBody(conversation, nodes, seed), { signal, take });
}

function common({ sampling }, seed) {
  return {
    model: server.modelId || server.model, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, ...sampling, seed,
    routed_experts: tellsExperts() ? true : undefined,
  };
}

function chatBody(conversation, nodes, seed) {
  const { system, tools } = conversation;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  return {
    ...common(conversation, seed), messages: messages.concat(nodes.map(message)),
    tools: tools.trim() ? JSON.parse(tools) : undefined,
  };
}

function message({ role, content, toolCalls, callId }) {
  if (role === "tool") return { role, content, tool_call_id: callId };
  if (!toolCalls?.length) return { role, content };
  const calls = toolCalls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return { role, content, tool_calls: calls };
}

async function run(path, body, { signal, take }) {
  const result = { finish: null, usage: null, routedExperts: null, version: null, precision: null };
  await stream(path, body, (event) => {
    if (event.error) throw new ApiError(event.error.message, event.error.status ?? null, event.error.type);
    if (event.usage) {
      result.usage = event.usage;
      take({ usage: event.usage });
    }
    const weights = event.system_fingerprint?.match(WEIGHTS);
    if (weights && Number(weights[1]) !== result.version) {
      result.version = Number(weights[1]);
      result.precision = precisionOf(result.version); // asked now: with the answer, weights that were replaced may go
    }
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) result.finish = choice.finish_reason;
    if (choice.routed_experts) result.routedExperts = choice.routed_experts;
    const delta = choice.delta ?? { content: choice.text };
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (reasoning) take({ reasoning });
    if (delta.content) take({ text: delta.content });
    for (const call of delta.tool_calls ?? []) take({ toolCall: call });
  }, { signal });
  if (result.finish === null) throw new ApiError("", null, "cut_off");
  return result;
}
