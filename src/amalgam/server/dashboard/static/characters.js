// Tokens → what a reader takes for one character.

const segmenter = globalThis.Intl?.Segmenter ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : null;

// Groups tokens that together make one character: the bytes of one code point, and the code points of one emoji or
// accented letter. tokens: [{text, bytes}], with `bytes` (hex) where a token is no whole characters.
// Returns [{indices, text}]; text is null for bytes that do not make a character.
export function characters(tokens) {
  const whole = joinBytes(tokens);
  const groups = [];
  let open = null; // the group before, if it ends with text
  for (const group of whole) {
    if (group.text !== null && open !== null && isWithinOne(open.text, group.text)) {
      open.indices.push(...group.indices);
      open.text += group.text;
    } else {
      groups.push(group);
      open = group.text ? group : null;
    }
  }
  return groups;
}

function joinBytes(tokens) {
  const groups = [];
  for (let index = 0; index < tokens.length; index += 1) {
    if (!tokens[index].bytes) {
      groups.push({ indices: [index], text: tokens[index].text });
      continue;
    }
    const end = endOfCharacters(tokens, index);
    if (end === null) {
      groups.push({ indices: [index], text: null });
    } else {
      groups.push({ indices: Array.from({ length: end.index - index + 1 }, (_, i) => index + i), text: end.text });
      index = end.index;
    }
  }
  return groups;
}

// The first token at which the bytes from `start` on are whole characters.
function endOfCharacters(tokens, start) {
  let hex = "";
  for (let index = start; index < tokens.length && tokens[index].bytes; index += 1) {
    hex += tokens[index].bytes;
    try {
      const bytes = Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
      return { index, text: new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes) };
    } catch {
      // not yet
    }
  }
  return null;
}

// Whether the border between two texts lies within a character.
function isWithinOne(before, after) {
  if (!segmenter || !after) return false;
  const borders = [...segmenter.segment(before + after)].map(({ index }) => index);
  return !borders.includes(before.length);
}
