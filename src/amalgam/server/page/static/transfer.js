// Conversations as a file, and back. What a file holds is checked piece by piece: nothing else gets in.

import { newId, VERSION } from "./tree.js";

const FORMAT = "amalgam-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export class TransferError extends Error {}

export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, exported_at: new Date().toISOString(), conversations }, null, 1);
}

export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  Object.assign(link, { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

// Conversations with ids of their own, so that a file read twice replaces nothing.
// Raises a TransferError whose message is the word for what is wrong.
export function fromFile(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new TransferError("import_not_json");
  }
  if (document?.format !== FORMAT || !Array.isArray(document.conversations)) throw new TransferError("import_other");
  if (document.version !== VERSION) throw new TransferError("import_newer");
  return document.conversations.map(conversation);
}

const string = (value) => {
  if (typeof value !== "string") throw new TransferError("import_damaged");
  return value;
};
const number = (value) => {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new TransferError("import_damaged");
  return value;
};
const optional = (check, value) => (value === undefined || value === null ? undefined : check(value));
const object = (value) => {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new TransferError("import_damaged");
  return value;
};
const list = (check) => (value) => {
  if (!Array.isArray(value)) throw new TransferError("import_damaged");
  return value.map(check);
};

function conversation(given) {
  object(given);
  const nodes = new Map();
  for (const [id, fields] of Object.entries(object(given.nodes))) nodes.set(id, { ...node(object(fields)), id });
  for (const { parent } of nodes.values()) if (parent !== null && !nodes.has(parent)) throw new TransferError("import_damaged");
  for (const start of nodes.values()) { // a ring of parents would have no end
    const seen = new Set();
    for (let at = start; at; at = nodes.get(at.parent)) {
      if (seen.has(at.id)) throw new TransferError("import_damaged");
      seen.add(at.id);
    }
  }
  const leaf = optional(string, given.leaf) ?? null;
  if (leaf !== null && !nodes.has(leaf)) throw new TransferError("import_damaged");
  const ids = new Map([...nodes.keys()].map((id) => [id, newId()]));
  const renamed = [...nodes.values()].map((item) => ({ ...item, id: ids.get(item.id), parent: ids.get(item.parent) ?? null }));
  const sampling = object(given.sampling ?? {});
  return {
    id: newId(), title: string(given.title), createdAt: number(given.createdAt), updatedAt: number(given.updatedAt), leaf: ids.get(leaf) ?? null, version: VERSION,
    system: optional(string, given.system) ?? "", tools: optional(string, given.tools) ?? "",
    sampling: Object.fromEntries(SAMPLING.filter((name) => sampling[name] !== undefined).map((name) => [name, number(sampling[name])])),
    nodes: Object.fromEntries(renamed.map((item) => [item.id, item])),
  };
}

function node(given) {
  if (!ROLES.has(given.role)) throw new TransferError("import_damaged");
  const result = {
    parent: optional(string, given.parent) ?? null, role: given.role, content: string(given.content), at: number(given.at),
    reasoning: optional(string, given.reasoning), finish: given.isOpen === true ? "interrupted" : optional(string, given.finish), callId: optional(string, given.callId),
    name: optional(string, given.name), model: optional(string, given.model), isEdited: given.isEdited === true || undefined,
    problem: optional(problem, given.problem),
    toolCalls: optional(list((call) => ({ id: string(object(call).id), name: string(call.name), arguments: string(call.arguments) })), given.toolCalls),
    figures: optional((figures) => Object.fromEntries(Object.entries(object(figures)).map(([name, value]) => [name, number(value)])), given.figures),
    use: optional(use, given.use),
  };
  return JSON.parse(JSON.stringify(result)); // without what is undefined
}

function problem(given) {
  object(given);
  const [status, kind, text] = [optional(number, given.status), optional(string, given.kind), optional(string, given.text)];
  return { status: status ?? null, kind: kind ?? null, text: text ?? "", retryAfter: null };
}

const MAX_EXPERTS = 4096;

function use(given) {
  object(given);
  const isExperts = given.isExperts === true;
  const formats = list((row) => ({ name: string(object(row).name), bits: number(row.bits), ...(isExperts ? {} : { share: number(row.share) }) }))(given.formats);
  const version = optional(number, given.version);
  if (!isExperts) return { version, isExperts, formats };
  const numExperts = within(given.numExperts, 1, MAX_EXPERTS);
  const layers = list(number)(given.layers);
  const cells = list(list((cell) => {
    const [expert, prompt, answer, format] = list(number)(cell);
    return [within(expert, 0, numExperts - 1), number(prompt), number(answer), within(format, -1, formats.length - 1)];
  }))(given.cells);
  if (cells.length !== layers.length) throw new TransferError("import_damaged");
  return { version, isExperts, formats, layers, numExperts, topK: number(given.topK), cells };
}

function within(value, low, high) {
  if (!Number.isInteger(value) || value < low || value > high) throw new TransferError("import_damaged");
  return value;
}
