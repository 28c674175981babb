// Which experts an answer used and in which precision each ran, small enough to be kept beside it.
//
// use: {version, isExperts, formats: [{name, bits, share}], layers: [id], numExperts, topK, cells}
// cells: per layer [expert, tokens of the prompt, tokens of the answer, index of its format (-1: unknown)], by use.
// Without experts, `formats` has the shares of the weights' bytes.

import { readNpy } from "./npy.js";
import { server, tellsExperts } from "./server.js";

// `precision`: see `precisionOf`. null: nothing is known.
// Row i of the routing belongs to the step that gave token i + 1: the prompt's last row gave the answer's first token.
export function useOf({ routedExperts, usage, version }, precision) {
  if (routedExperts) return ofExperts(readNpy(routedExperts), usage?.prompt_tokens ?? 1, precision, version);
  return precision && !tellsExperts() ? ofWeights(precision, version) : null;
}

function ofWeights({ precisions }, version) {
  const rows = Object.entries(precisions);
  const total = rows.reduce((sum, [, row]) => sum + row.bytes, 0);
  const formats = rows.map(([name, row]) => ({ name, bits: (row.bytes * 8) / row.parameters, share: row.bytes / total }));
  return { version, isExperts: false, formats: formats.sort((a, b) => b.share - a.share) };
}

export function ofExperts({ shape: [, numLayers, topK], values }, numPromptTokens, map, version) {
  const numExperts = map?.num_experts ?? server.info.sizes.experts_per_layer;
  const layers = map?.layer_ids.length === numLayers ? map.layer_ids : Array.from({ length: numLayers }, (_, row) => row);
  const counts = [new Int32Array(numLayers * numExperts), new Int32Array(numLayers * numExperts)];
  for (let index = 0; index < values.length; index += 1) {
    const token = Math.floor(index / (numLayers * topK));
    const layer = Math.floor(index / topK) % numLayers;
    if (values[index] >= 0) counts[token < numPromptTokens - 1 ? 0 : 1][layer * numExperts + values[index]] += 1;
  }
  const formats = map ? formatsOf(map) : [];
  const places = new Map(formats.map(({ name }, index) => [name, index]));
  const cells = layers.map((_, layer) => {
    const row = [];
    for (let expert = 0; expert < numExperts; expert += 1) {
      const [prompt, answer] = counts.map((part) => part[layer * numExperts + expert]);
      if (prompt + answer) row.push([expert, prompt, answer, map ? places.get(formatOf(map, layer, expert)) : -1]);
    }
    return row.sort((a, b) => b[2] - a[2] || b[1] - a[1]);
  });
  return { version, isExperts: true, formats, layers, numExperts, topK, cells };
}

// An expert whose projections differ has all their formats.
const formatOf = (map, layer, expert) => [...new Set(map.formats[layer][expert].filter(Boolean))].join(" + ");

// Those of all experts, used or not, so that each has one colour in all answers of a weight version: [{name, bits}].
function formatsOf(map) {
  const found = new Map();
  map.formats.forEach((row, layer) => row.forEach((_, expert) => {
    const name = formatOf(map, layer, expert);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(map.bits[layer][expert]);
  }));
  return [...found].map(([name, bits]) => ({ name, bits: bits.reduce((sum, value) => sum + value, 0) / bits.length }));
}

// Shares of the activations by format, widest format first: [{index, name, bits, share}].
export function shares(use) {
  const widest = (rows) => rows.sort((a, b) => b.bits - a.bits);
  if (!use.isExperts) return widest(use.formats.map((row, index) => ({ ...row, index })));
  const sums = use.formats.map(() => 0);
  let total = 0;
  for (const [, , answer, format] of use.cells.flat()) {
    if (format < 0) continue;
    sums[format] += answer;
    total += answer;
  }
  return widest(use.formats.map((row, index) => ({ ...row, index, share: total ? sums[index] / total : 0 })));
}
