// The text of a line or paragraph → a list of strings and {type, …} with `children`. Formulas stay as they are written.
//
// Emphasis follows CommonMark's delimiter runs, with one difference: beside Chinese, Japanese and Korean letters, which
// have no spaces between words, punctuation does not keep `**` from opening or closing.

const MAX_EMPHASIS = 20000; // characters; longer paragraphs go without
const CODE = /(`+)(?!`)/y;
const ADDRESS = /<((?:https?|mailto):[^\s<>]{1,2000})>/y;
const URL_START = /https?:[^\s<>"'`\]）】》」，。；、！？]{3,2000}/y;
const TARGET = /\(\s*(?:<([^<>\n]{0,2000})>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.){0,500}\)){0,2000}))(?:\s+(?:"[^"]{0,500}"|'[^']{0,500}'))?\s*\)/y;
const BREAK = /<br\s*\/?>/iy;
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6}));/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

export function parseInline(text) {
  return emphasize(scan(text, brackets(text), 0, text.length, false));
}

// Where each `[` is closed: a map from one position to the other, as far as they are pairs.
function brackets(text) {
  const closed = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) closed.set(open.pop(), at);
  }
  return closed;
}

// Strings, elements, and runs of delimiters that have not been paired yet.
function scan(text, closed, start, end, isInLink) {
  const nodes = [];
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  const missing = new Set(); // lengths of runs of backticks, and other ends, that do not come: looked for once
  let at = start;
  while (at < end) {
    const char = text[at];
    const found = special(char, at);
    if (found) {
      if (typeof found.node === "string") plain += found.node;
      else push(found.node);
      at = found.next;
    } else {
      plain += char;
      at += 1;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;

  function special(char, from) {
    switch (char) {
      case "\\": return escape(from);
      case "`": return code(from);
      case "$": return formula(from);
      case "[": return link(from);
      case "!": return text[from + 1] === "[" ? image(from) : null;
      case "<": return angle(from);
      case "&": return entity(from);
      case "h": return isInLink ? null : address(from);
      case "*": case "_": case "~": return run(char, from);
      default: return null;
    }
  }

  function escape(from) {
    const next = text[from + 1];
    const close = next === "(" ? "\\)" : next === "[" ? "\\]" : null;
    if (close && !missing.has(close)) {
      const until = text.indexOf(close, from + 2);
      if (until >= 0 && until < end) return { node: text.slice(from, until + 2), next: until + 2 };
      missing.add(close);
    }
    return from + 1 < end && ESCAPABLE.test(next) ? { node: next, next: from + 2 } : null;
  }

  function code(from) {
    const [marks] = match(CODE, text, from) ?? [text.slice(from, from + 1)];
    const after = from + marks.length;
    if (!missing.has(marks.length)) {
      for (let until = text.indexOf(marks, after); until >= 0 && until < end;) {
        let stop = until;
        while (text[stop] === "`") stop += 1;
        if (stop - until === marks.length) {
          const inner = text.slice(after, until).replaceAll("\n", " ");
          const isPadded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
          return { node: { type: "code", text: isPadded ? inner.slice(1, -1) : inner }, next: stop };
        }
        until = text.indexOf(marks, stop);
      }
      missing.add(marks.length);
    }
    return { node: marks, next: after };
  }

  function formula(from) {
    const marks = text[from + 1] === "$" ? "$$" : "$";
    const first = from + marks.length;
    if (/\s/.test(text[first] ?? " ")) return { node: marks, next: first };
    const until = text.indexOf(marks, first + 1);
    const isOne = until >= 0 && until + marks.length <= end && !/\s/.test(text[until - 1]) && !/\d/.test(text[until + marks.length] ?? "")
      && !text.slice(first, until).includes("\n\n");
    return isOne ? { node: text.slice(from, until + marks.length), next: until + marks.length } : { node: marks, next: first };
  }

  // Stays as it is written: nothing is fetched from elsewhere.
  function image(from) {
    const until = closed.get(from + 1);
    const target = until === undefined || until >= end ? null : match(TARGET, text, until + 1);
    if (!target) return null;
    const next = until + 1 + target[0].length;
    return { node: text.slice(from, next), next };
  }

  function link(from) {
    const until = closed.get(from);
    if (until === undefined || until >= end || isInLink) return null;
    const target = match(TARGET, text, until + 1);
    if (!target) return null;
    const children = emphasize(scan(text, closed, from + 1, until, true));
    return { node: { type: "link", href: (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"), children }, next: until + 1 + target[0].length };
  }

  function angle(from) {
    const broken = match(BREAK, text, from);
    if (broken) return { node: { type: "break" }, next: from + broken[0].length };
    const found = isInLink ? null : match(ADDRESS, text, from);
    return found && { node: { type: "link", href: found[1], children: [found[1]] }, next: from + found[0].length };
  }

  function entity(from) {
    const found = match(ENTITY, text, from);
    if (!found) return null;
    const number = found[2] ? Number(found[2]) : found[3] ? parseInt(found[3], 16) : null;
    const isChar = number !== null && number > 0 && number <= 0x10ffff && !(number >= 0xd800 && number < 0xe000);
    const node = number === null ? ENTITIES[found[1]] : isChar ? String.fromCodePoint(number) : "\ufffd";
    return { node, next: from + found[0].length };
  }

  function address(from) {
    if (from > start && /\w/.test(text[from - 1])) return null;
    const found = match(URL_START, text, from);
    if (!found) return null;
    let href = found[0].slice(0, end - from).replace(/[.,:;!?*_~]+$/, "");
    while (href.endsWith(")") && href.split(")").length > href.split("(").length) href = href.slice(0, -1);
    return { node: { type: "link", href, children: [href] }, next: from + href.length };
  }

  function run(char, from) {
    let until = from;
    while (until < end && text[until] === char) until += 1;
    const count = until - from;
    if (char === "~" && count !== 2) return { node: text.slice(from, until), next: until };
    const [before, after] = [from > start ? text[from - 1] : " ", until < end ? text[until] : " "];
    const isOpen = (side, other) => !/\s/.test(side) && (!PUNCTUATION.test(side) || /\s/.test(other) || PUNCTUATION.test(other) || CJK.test(other));
    const [isLeft, isRight] = [isOpen(after, before), isOpen(before, after)];
    const isWord = char === "_";
    return {
      node: {
        type: "run", char, count, original: count,
        canOpen: isLeft && (!isWord || !isRight || PUNCTUATION.test(before)),
        canClose: isRight && (!isWord || !isLeft || PUNCTUATION.test(after)),
      },
      next: until,
    };
  }
}

// Pairs the runs of delimiters (CommonMark, "process emphasis"), and makes strings of those left.
function emphasize(nodes) {
  const size = nodes.reduce((sum, node) => sum + (typeof node === "string" ? node.length : 1), 0);
  const stack = []; // what has been read: nodes, and runs that may still open
  const barren = {}; // closers for which there was no opener below this place
  for (const node of nodes) {
    if (node.type !== "run" || size > MAX_EMPHASIS) {
      stack.push(node);
      continue;
    }
    while (node.canClose && node.count > 0) {
      const key = `${node.char}${node.canOpen}${node.original % 3}`;
      let opener = stack.length - 1;
      while (opener >= (barren[key] ?? 0) && !pairs(stack[opener], node)) opener -= 1;
      if (opener < (barren[key] ?? 0)) {
        barren[key] = stack.length;
        break;
      }
      const begin = stack[opener];
      const used = node.char === "~" ? 2 : Math.min(2, begin.count, node.count);
      const children = stack.splice(opener + 1).map(toText);
      begin.count -= used;
      node.count -= used;
      if (begin.count === 0) stack.pop();
      stack.push({ type: node.char === "~" ? "strike" : used === 2 ? "strong" : "emphasis", children });
      for (const name of Object.keys(barren)) barren[name] = Math.min(barren[name], stack.length);
    }
    if (node.count > 0) stack.push(node.canOpen ? node : toText(node));
  }
  return stack.map(toText);
}

function pairs(opener, closer) {
  if (opener.type !== "run" || opener.char !== closer.char || !opener.canOpen || opener.count === 0) return false;
  const isOdd = (opener.canClose || closer.canOpen) && (opener.original + closer.original) % 3 === 0;
  return !isOdd || (opener.original % 3 === 0 && closer.original % 3 === 0);
}

const toText = (node) => (node.type === "run" ? node.char.repeat(node.count) : node);
