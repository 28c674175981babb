// Markdown text → blocks: the structure of lines. What is within a line is `inline.js`'s; HTML is text like any other.
//
// It follows CommonMark and GitHub's tables where models keep to them, and is lenient where they do not: nested lists
// may be indented by two, and a fence that has not been closed yet goes to the end.

const MAX_DEPTH = 16; // of quotes and lists within each other
const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+]|(\d{1,9})[.)])(?:([ \t]+)(.*)|)$/;
const MATH = [[/^ {0,3}\$\$/, /\$\$\s*$/], [/^ {0,3}\\\[/, /\\\]\s*$/]];

const isBlank = (line) => line.trim() === "";
const indent = (line) => line.match(/^\s*/)[0].length;

// Blocks of lines, each with the lines that it was made of as `source`.
export function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = (depth < MAX_DEPTH && container(lines, at)) || leaf(lines, at);
    block.source = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

export function split(text) {
  return text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
}

function container(lines, at) {
  if (QUOTE.test(lines[at])) return quote(lines, at);
  if (RULE.test(lines[at])) return null;
  return isItem(lines[at]) ? list(lines, at) : null;
}

function leaf(lines, at) {
  const line = lines[at];
  return fence(lines, at) ?? heading(line, at) ?? (RULE.test(line) ? [{ type: "rule" }, at + 1] : null)
    ?? math(lines, at) ?? table(lines, at) ?? paragraph(lines, at);
}

function fence(lines, at) {
  const opening = lines[at].match(FENCE);
  if (!opening) return null;
  const [, spaces, marks, info] = opening;
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  const indentation = new RegExp(`^ {0,${spaces.length}}`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.replace(indentation, "")).join("\n");
  return [{ type: "code", language: info.trim().split(/[\s{]/)[0], text }, Math.min(end + 1, lines.length)];
}

function heading(line, at) {
  const found = line.match(HEADING);
  return found && [{ type: "heading", level: found[1].length, text: found[2] ?? "" }, at + 1];
}

// A formula on lines of its own stays as it is written.
function math(lines, at) {
  for (const [opening, closing] of MATH) {
    const start = lines[at].match(opening);
    if (!start) continue;
    for (let end = at; end < lines.length && !isBlank(lines[end]); end += 1) {
      const rest = end === at ? lines[end].slice(start[0].length) : lines[end];
      if (closing.test(rest)) return [{ type: "math", text: lines.slice(at, end + 1).join("\n").trim() }, end + 1];
    }
  }
  return null;
}

function quote(lines, at) {
  const inner = [];
  let end = at;
  for (; end < lines.length && !isBlank(lines[end]); end += 1) {
    const found = lines[end].match(QUOTE);
    if (!found && interrupts(lines, end)) break;
    inner.push(found ? found[1] : lines[end]);
  }
  return [{ type: "quote", lines: inner }, end];
}

function isItem(line) {
  const found = line.match(ITEM);
  return found !== null && found[1].length <= 3;
}

function list(lines, at) {
  const [, base, , number] = lines[at].match(ITEM);
  const isOrdered = number !== undefined;
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const found = lines[end].match(ITEM);
    if (!found || RULE.test(lines[end]) || found[1].length >= base.length + 2 || (found[3] !== undefined) !== isOrdered) break;
    const [item, next] = listItem(lines, end, found);
    items.push(item);
    let following = next;
    while (following < lines.length && isBlank(lines[following])) following += 1;
    if (following > next && following < lines.length && continues(lines[following], base, isOrdered)) isLoose = true;
    else if (following > next) return [{ type: "list", isOrdered, start: Number(number), items, isLoose }, next];
    end = following;
  }
  return [{ type: "list", isOrdered, start: Number(number), items, isLoose }, end];
}

function continues(line, base, isOrdered) {
  const found = line.match(ITEM);
  return found !== null && !RULE.test(line) && found[1].length < base.length + 2 && (found[3] !== undefined) === isOrdered;
}

// The lines of one item, without their indentation.
function listItem(lines, at, [, spaces, marker, , gap, text]) {
  const width = spaces.length + marker.length + (gap && gap.length <= 4 ? gap.length : 1);
  const inner = [text ?? ""];
  let end = at + 1;
  let open = inner[0].match(FENCE)?.[2] ?? null; // the marks of a fence that has not been closed
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (isBlank(line)) {
      let next = end + 1;
      while (next < lines.length && isBlank(lines[next])) next += 1;
      if (open === null && (next === lines.length || indent(lines[next]) < Math.min(width, spaces.length + 2))) break;
      for (; end + 1 < next; end += 1) inner.push("");
      inner.push("");
      continue;
    }
    const isInside = indent(line) >= Math.min(width, spaces.length + 2);
    if (!isInside && open === null && (isBlank(lines[end - 1]) || ITEM.test(line) || interrupts(lines, end))) break;
    if (!isInside && open !== null && ITEM.test(line)) break;
    inner.push(line.slice(Math.min(width, indent(line))));
    const marks = inner.at(-1).match(FENCE)?.[2] ?? null;
    if (marks !== null) open = open === null ? marks : marks.startsWith(open) ? null : open;
  }
  return [inner, end];
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (parts.length > 1 && parts.at(-1).trim() === "") parts.pop();
  return parts.map((part) => part.trim().replaceAll("\\|", "|"));
}

function table(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return null;
  const marks = cells(lines[at + 1]);
  const head = cells(lines[at]);
  if (marks.length !== head.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  const aligned = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : null));
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|") && !FENCE.test(lines[end]); end += 1) {
    const row = cells(lines[end]).slice(0, head.length);
    rows.push([...row, ...new Array(head.length - row.length).fill("")]);
  }
  return [{ type: "table", aligned, head, rows }, end];
}

// Whether a line begins something else, so that a paragraph ends before it.
function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  if (MATH.some(([opening]) => opening.test(line))) return math(lines, at) !== null;
  const item = line.match(ITEM);
  if (item && item[1].length <= 3 && item[5] && (item[3] === undefined || item[3] === "1")) return true;
  return table(lines, at) !== null;
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}
