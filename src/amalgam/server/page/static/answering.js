// Answers as they come: what is sent, what is kept, and what went wrong. An answer goes on while another conversation is
// shown.

import { app, emit, isAnswering, keep } from "./app.js";
import { answer } from "./chat.js";
import { Stopwatch } from "./clock.js";
import { look, server } from "./server.js";
import { checkSettings } from "./settings.js";
import { begin, end } from "./tabs.js";
import { addNode, path, siblings, titleFrom } from "./tree.js";
import { useOf } from "./use.js";

const SAVE_MS = 2000; // so that a page that is closed loses no more

// One answer at a time in a conversation, in all tabs, and none with settings that the server would refuse. What is not
// taken is to stay where it was written: the functions below say whether it was.
const isTaken = (conversation) => !isAnswering(conversation.id) && checkSettings();

// Say something at the end of the branch that is shown, or below `parent`.
export function say(conversation, content, parent = conversation.leaf) {
  if (!isTaken(conversation)) return false;
  const node = addNode(conversation, parent, { role: "user", content });
  if (!conversation.title) conversation.title = titleFrom(content);
  reply(conversation, node);
  return true;
}

export function giveResults(conversation, calls) {
  if (!isTaken(conversation)) return false;
  let parent = conversation.leaf;
  for (const { id, name, content } of calls) parent = addNode(conversation, parent, { role: "tool", content, callId: id, name }).id;
  reply(conversation, conversation.nodes[parent]);
  return true;
}

export function regenerate(conversation, node) {
  if (isTaken(conversation)) reply(conversation, conversation.nodes[node.parent]);
}

// An answer to `parent`, beside those that there are.
async function reply(conversation, parent) {
  const node = addNode(conversation, parent.id, { role: "assistant", content: "", isOpen: true });
  const clock = new Stopwatch();
  const run = { node, clock, controller: new AbortController(), usage: null };
  app.running.set(conversation.id, run);
  begin(conversation.id, node.id);
  emit("thread", { hasGrown: true });
  keep(conversation, { isTouched: true });
  let savedAt = performance.now();
  try {
    if (!server.info) await look(); // whether it takes chats
    const nodes = path(conversation, parent.id);
    const result = await answer(conversation, nodes, {
      seed: seedFor(conversation, node), signal: run.controller.signal,
      take(piece) {
        if (piece.usage) {
          run.usage = piece.usage;
          clock.tick(piece.usage.completion_tokens);
        }
        grow(node, piece);
        emit("grown", run);
        if (performance.now() - savedAt > SAVE_MS) {
          savedAt = performance.now();
          keep(conversation);
        }
      },
    });
    await finish(node, result);
  } catch (error) {
    fail(node, error, run.controller.signal);
  } finally {
    if (run.usage) node.figures = figures(run);
    delete node.isOpen;
    app.running.delete(conversation.id);
    emit("thread", { finished: node });
    await keep(conversation, { isTouched: true });
    end(conversation.id);
  }
}

// With the same seed the same answer would come again: each further one has a seed of its own, always the same.
function seedFor(conversation, node) {
  const { seed } = conversation.sampling;
  return seed === undefined ? undefined : seed + siblings(conversation, node).indexOf(node);
}

function grow(node, { text, reasoning, toolCall }) {
  if (text) node.content += text;
  if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
  if (!toolCall) return;
  node.toolCalls ??= [];
  const call = node.toolCalls[toolCall.index] ??= { id: "", name: "", arguments: "" };
  call.id ||= toolCall.id ?? "";
  call.name ||= toolCall.function?.name ?? "";
  call.arguments += toolCall.function?.arguments ?? "";
}

async function finish(node, result) {
  node.finish = result.finish;
  node.model = server.model;
  try {
    const use = useOf(result, await result.precision);
    if (use) node.use = use;
  } catch {
    // the answer stands without it
  }
}

function figures({ clock, usage }) {
  const found = {
    tokens: usage.completion_tokens, first: clock.waited, speed: clock.speed, prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details?.cached_tokens,
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== null && value !== undefined));
}

function fail(node, error, signal) {
  if (signal.aborted) {
    node.finish = "stopped";
    return;
  }
  node.finish = "error";
  const isTold = error.status !== undefined && error.type !== "cut_off"; // by the server
  node.problem = { status: error.status ?? null, kind: error.type ?? null, text: isTold ? error.message : "", retryAfter: error.retryAfter ?? null };
  look();
}
